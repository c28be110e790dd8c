"""The relay: a ClientApp that passes messages to the site's trainer and returns the trainer's responses.

The relay does not decode messages and has no access to the data; the trainer is another process, behind a socket in
the site's folder. The relay waits for a trainer that is missing, because the supervisor is starting it. It sends a
message again to a trainer that ended, because the same request has the same response.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedferret.core.text import plain_line
from fedferret.engines.flower_records import content_of, records_of
from fedferret.engines.relay import UNLISTED, call

SENDINGS = 3  # of one message to trainers that end: then the message itself is the cause
PAUSE = 0.5  # seconds between two tries to reach a trainer that is starting; loading a model takes longer

app = ClientApp()


@app.train()
def relay(message: Message, context: Context) -> Message:
    """Pass a request to the trainer and return its response.

    Args:
        message: with the request.
        context: its node_config has the trainer's socket.
    Raises:
        OSError: if there is no response before the message expires.
        ValueError: if the message holds no request.
    """
    content, reason = content_of(message)
    if content is None:
        raise ValueError(reason)
    return Message(
        records_of(deliver(content, Path(str(context.node_config["socket"])), expiry(message))), reply_to=message
    )


@app.query()
def name(message: Message, context: Context) -> Message:
    """Return the site's name, for a server in insecure mode.

    Args:
        message: the question; with content where the server asks again, because it does not know the name.
        context: its node_config has the name.
    """
    content, _ = content_of(message)
    if content:
        print(f"{UNLISTED}{plain_line(content.decode(errors='replace'))}", file=sys.stderr, flush=True)
    return Message(records_of(str(context.node_config["name"]).encode()), reply_to=message)


def deliver(content: bytes, socket: Path, end: float) -> bytes:
    """Send a request to the trainer and return its response; wait for a trainer that is starting.

    Args:
        content: the request, bytes.
        socket: the trainer's.
        end: the last moment to wait, in seconds since the epoch by this machine's clock.
    Raises:
        OSError: if there is no response by then, or ``SENDINGS`` trainers ended.
    """
    endings = 0
    while True:
        try:
            return call(socket, content, max(1.0, end - time.time()))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.time() + PAUSE > end:
                raise
        except TimeoutError:
            raise
        except OSError:
            endings += 1
            if endings == SENDINGS:
                raise
        time.sleep(PAUSE)


def expiry(message: Message) -> float:
    """Return when the message expires, in seconds since the epoch by the server's clock.

    Flower refuses a site with a clock that differs by some seconds, so the site's clock can be compared with it.
    """
    return message.metadata.created_at + message.metadata.ttl
