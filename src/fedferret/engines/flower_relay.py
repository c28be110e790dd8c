"""The site's half of Flower: a ClientApp that hands letters to the site's trainer and brings its replies back.

It reads no letter and has no access to the data; the trainer is another process, behind a socket in the site's
folder. A trainer that is not there is waited for, since its supervisor is starting it; one that ends at a letter gets
it again, for the same letter has the same answer.
"""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedferret.engines.flower import content_of, records_of
from fedferret.engines.relay import call

SENDINGS = 3  # of one letter to trainers that end at it: by then it is the letter's fault
PAUSE = 0.5  # seconds between two looks for a trainer that is starting; loading a model takes many

app = ClientApp()


@app.train()
def relay(message: Message, context: Context) -> Message:
    """Give the letter to the trainer, and its receipt back. Raises OSError when none came before the letter is void."""
    content, reason = content_of(message)
    if content is None:
        raise ValueError(reason)
    return Message(
        records_of(deliver(content, Path(str(context.node_config["socket"])), expiry(message))), reply_to=message
    )


@app.query()
def name(message: Message, context: Context) -> Message:
    """The site's name, for a server that has no keys to know it by."""
    return Message(records_of(str(context.node_config["name"]).encode()), reply_to=message)


def deliver(content: bytes, socket: Path, end: float) -> bytes:
    """The trainer's reply to ``content``, waiting for a trainer until ``end``, in seconds of this machine's clock."""
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
    """When the message is void, by the server's clock; Flower refuses sites whose own is seconds away from that."""
    return message.metadata.created_at + message.metadata.ttl
