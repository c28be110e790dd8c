"""A campaign against everything that reads a peer's bytes: mutated messages, and payloads mutated field by field.

    a handler   a function of bytes that returns, or refuses with the one kind of error that its callers expect
    a corpus    messages that the handler takes; each attack changes, cuts, repeats or joins pieces of them
    a payload   of every method, one to two fields changed; what is accepted must be within cost, kinds and bounds
    a kill      of the server or a site of a real run, at random; the run must end with the bits of an undisturbed one
    a flood     of bodies through nginx to a real SuperLink, which must stay below 300 MB

Usage: python -m benchmarks.attack [--messages 100000] [--payloads 10000] [--kills 2] [--flood 16] [--seed 1]
                                   [--coverage HANDLER]

What lies in an envelope is attacked one layer at a time, with the layers around it as they must be: each of the three
objects of the transport, the response behind a right signature, the reply in a right response. ``--kills 0`` and
``--flood 0`` leave these out; ``--flood 250`` is the size of the issue's. ``--coverage`` lets atheris (``pip install
atheris``) look for new paths through one handler's code, without end. What a handler does not expect is printed with
the message in hexadecimal, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the contract's methods and the mutations

LARGEST_PEAK = 300e6  # bytes of the SuperLink's memory in a flood
KILLS = "tests/unit/test_processes.py::test_random_kills_end_in_the_undisturbed_weights"

HEADS = (
    b"",
    b"\xff" * 11,
    b"\x80" * 10 + b"\x01",
    b"[\xff\xff\x03",
    b"T\x00\x09" + b"\x01" * 9,
    b"\x00" * 40,
    b"9" * 5000,
)


class Refused(Exception):
    """The server took a reply for a failure of its site."""


@dataclass(frozen=True)
class Handler:
    """What reads a peer's bytes."""

    name: str
    read: Callable[[bytes], Any]
    expected: tuple[type[Exception], ...]
    corpus: Sequence[bytes]
    share: int = 1  # of the messages, one in so many: some handlers sign, or write a file


def handlers(folder: Path) -> list[Handler]:
    """Every handler, with messages that it takes."""
    from attack.hostile import honest
    from contract.methods import METHODS, reference
    from fedferret.core.exchanges import ClientUpdate, Train
    from fedferret.core.keys import Key
    from fedferret.engines.trainer import read_request
    from fedferret.engines.transport import SERVER, Request, Response
    from fedferret.export import read_delta
    from fedferret.sites.archive import unpack
    from fedferret.sites.credentials import read_server, read_site
    from fedferret.sites.pki import Authority
    from fedferret.sites.signing import ServerSeal, SiteSeal
    from fedferret.wire import codec

    updates = []
    for name in METHODS:
        run = reference(name)
        updates.append(codec.encode(run.state.server))
        updates += run.state.log.since(run.state.round - 1).records
    request = Request("a" * 64, 0, 1, "t", "a", "", "b", 0, "f", b"", (b"one",), 0, 0, False, b"", Train(1), 7)
    response = Response("a" * 64, 0, 1, "t", "a", "done", 0, "f", 1, codec.encode(ClientUpdate((), 1, {})), "", b"", 7)
    messages = [codec.encode(request), codec.encode(response)]
    authority = Authority.create(folder / "pki", ["127.0.0.1"])
    archive = authority.issue("a")
    server = ServerSeal(read_server(authority.folder))
    site = SiteSeal(read_site(authority.folder / "sites" / "a"), folder)
    objects = {each.name: each.content for each in honest(messages[1]).all().values()}
    trained = reference("ferret")
    private = trained.store.get("a")
    update = trained.algorithm.client_update(trained.task, trained.state.public, private, trained.data["a"], Key.of(1))
    reply = codec.encode(ClientUpdate(update.payload, 9, {"loss": 1.0, "seconds": 0.0}))

    def answered(content: bytes, request: Request) -> bytes:
        """The content as the reply in a right response."""
        head = (request.run, request.epoch, request.round, request.ticket, request.client, "done", request.version)
        return codec.encode(Response(*head, request.fingerprint, 1, content, "", b"", request.sequence))

    return [
        Handler("codec", codec.decode, (ValueError,), [*updates, *messages]),
        Handler("request at the site", read_request, (ValueError,), messages[:1]),
        Handler("seal at the server", lambda each: server.open("a", each), (ValueError,), [site.close(messages[1])]),
        Handler("seal at the site", lambda each: site.open(SERVER, each), (ValueError,), [server.close(messages[0])]),
        *(
            Handler(
                f"reply: its {content.split()[0].decode()}", _object(objects, name), (ValueError, KeyError), [content]
            )
            for name, content in objects.items()
        ),
        Handler("response at the server", _exchange(server, site, lambda each, _: each), (Refused,), messages[1:], 10),
        Handler("reply at the server", _exchange(server, site, answered), (Refused,), [reply], 10),
        Handler(
            "archive",
            _in_a_file(folder / "x.tar", lambda path: unpack(path, folder / "new")),
            _user(),
            [archive.read_bytes()],
            100,
        ),
        Handler("delta", _in_a_file(folder / "x.fedferret", read_delta), _user(), updates[:8], 100),
    ]


def _object(objects: Mapping[str, bytes], name: str) -> Callable[[bytes], Any]:
    """Read a reply of which one object is other bytes."""
    from fedferret.engines.flower_reply import read_reply

    root = next(iter(objects))
    return lambda content: read_reply(root, {**objects, name: content}.__getitem__)


def _exchange(server: Any, site: Any, respond: Callable[[bytes, Any], bytes]) -> Callable[[bytes], Any]:
    """Let the server exchange one request; the site signs what ``respond`` makes of given bytes and the request."""
    from attack.hostile import honest
    from contract.methods import reference
    from fedferret.core.exchanges import Failure, Reply, Train
    from fedferret.engines.flower_reply import read_reply
    from fedferret.engines.remote import Remote
    from fedferret.engines.replay import Protection
    from fedferret.engines.trainer import read_request
    from fedferret.engines.transport import SERVER, Received
    from fedferret.wire import codec
    from toy_sites import BASE, RECIPE

    given = [b""]

    class Replies:
        """The transport: every site replies at once."""

        def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
            for name, message in messages.items():
                sealed = site.close(respond(given[0], read_request(site.open(SERVER, message))))
                objects = {each.name: each.content for each in honest(sealed).all().values()}
                yield Received(name, read_reply(next(iter(objects)), objects.__getitem__).content)

        def close(self) -> None:
            """Nothing to end."""

    engine = Remote(Replies(), codec, recipe=RECIPE, base=BASE, deadline=60.0, protection=Protection(server))
    state = reference("ferret").state

    def read(content: bytes) -> Reply | Failure:
        given[0] = content
        (outcome,) = engine.exchange({"a": Train(state.round + 1)}, state)
        if isinstance(outcome, Failure):
            raise Refused(outcome.reason)
        return outcome

    return read


def _user() -> tuple[type[Exception], ...]:
    from fedferret.core.errors import RunError, UserError

    return UserError, RunError


def _in_a_file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    def written(content: bytes) -> Any:
        path.write_bytes(content)
        return read(path)

    return written


def changed(message: bytes, choose: random.Random) -> bytes:
    """A message with one to four of its pieces changed, and most often a right checksum, to reach further."""
    content = bytearray(message)
    for _ in range(1 + choose.randrange(4)):
        place = choose.randrange(len(content) + 1)
        kind = choose.randrange(5)
        if kind == 0 and place < len(content):
            content[place] = choose.randrange(256)
        elif kind == 1:
            content[place:place] = choose.choice(HEADS)
        elif kind == 2:
            del content[place : place + 1 + choose.randrange(8)]
        elif kind == 3:
            content[place:place] = content[place : place + choose.randrange(64)]
        else:
            del content[place:]
    if message[:2] == b"fF" and len(content) > 8 and choose.randrange(8):
        content[:3] = message[:3]
        content[-4:] = zlib.crc32(content[:-4]).to_bytes(4, "little")
    return bytes(content)


def kill(times: int, seed: int) -> dict[str, Any]:
    """Kill the server and the sites of a real run at random."""
    started, environment = time.perf_counter(), {"KILLS": str(times), "KILL_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-q", KILLS]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    wrong = [done.stdout[-2000:]] if done.returncode else []
    return {"kills": times, "seconds": time.perf_counter() - started, "wrong": wrong}


def flood(folder: Path, size: int) -> dict[str, Any]:
    """Send bodies of so many bytes to every call, and uploads as long as they may be; returns the SuperLink's peaks."""
    from benchmarks import flood as floods
    from fedferret import load_recipe
    from fedferret.runner import update_bytes
    from fedferret.sites import nginx

    started, limits = time.perf_counter(), nginx.Limits(nginx.upload_limit(update_bytes(load_recipe(floods.RECIPE))))
    peaks = [1e6 * each for each in floods.flood(folder, limits, size)]
    wrong = [f"the SuperLink took {max(peaks):,.0f} bytes"] if max(peaks) > LARGEST_PEAK else []
    seconds = time.perf_counter() - started
    return {"body_bytes": size, "superlink_peak_bytes": peaks, "seconds": seconds, "wrong": wrong}


def attack(handler: Handler, messages: int, seed: int) -> dict[str, Any]:
    """Send one handler changed messages; returns counts, the slowest in seconds, and what was not expected."""
    choose, accepted, slowest = random.Random(seed), 0, 0.0
    wrong: list[str] = []
    started = time.perf_counter()
    for _ in range(messages):
        content = changed(choose.choice(handler.corpus), choose)
        begun = time.perf_counter()
        try:
            handler.read(content)
            accepted += 1
        except handler.expected:
            pass
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}; {content[:400].hex()}")
        slowest = max(slowest, time.perf_counter() - begun)
    seconds = time.perf_counter() - started
    return {
        "messages": messages,
        "accepted": accepted,
        "seconds": seconds,
        "slowest_seconds": slowest,
        "wrong": wrong[:5],
    }


def attack_payloads(name: str, examples: int, seed: int) -> dict[str, Any]:
    """Send the intake one method's mutated payloads."""
    from fedferret.core.exchanges import Failure
    from fuzz.payloads import Attacked

    attacked, choose, refused = Attacked(name), random.Random(seed), 0
    wrong: list[str] = []
    for _ in range(examples):
        try:
            refused += isinstance(attacked.example(choose.randrange), Failure)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
    return {"payloads": examples, "refused": refused, "wrong": wrong[:5]}


def explore(handler: Handler) -> None:
    """Let atheris look for paths through a handler's code, without end."""
    import atheris

    head = handler.corpus[0][:3]

    def once(content: bytes) -> None:
        if head[:2] == b"fF":  # the fuzzer cannot guess a checksum
            content = head + content
            content += zlib.crc32(content).to_bytes(4, "little")
        with suppress(*handler.expected):
            handler.read(content)

    atheris.Setup([sys.argv[0], "-max_len=4096"], once)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--payloads", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--flood", type=int, default=16, metavar="MiB")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--coverage", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if given.coverage:
            import atheris

            with atheris.instrument_imports(include=["fedferret"]):  # before anything of the package is imported
                known = handlers(Path(name))
            explore(next(each for each in known if each.name == given.coverage))
            return
        known = handlers(Path(name))
        found: dict[str, Any] = {}
        for handler in known:
            found[handler.name] = attack(handler, given.messages // handler.share, given.seed)
            print(handler.name, json.dumps(found[handler.name]), file=sys.stderr, flush=True)
        if given.payloads:
            from fuzz.payloads import rows

            for row in rows():
                found[row] = attack_payloads(row, given.payloads, given.seed)
                print(row, json.dumps(found[row]), file=sys.stderr, flush=True)
        if given.kills:
            found["kills"] = kill(given.kills, given.seed)
            print("kills", json.dumps(found["kills"]), file=sys.stderr, flush=True)
        if given.flood:
            found["flood"] = flood(Path(name) / "flood", given.flood << 20)
            print("flood", json.dumps(found["flood"]), file=sys.stderr, flush=True)
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found, indent=2))
    sys.exit(any(entry["wrong"] for entry in found.values() if isinstance(entry, dict)))


if __name__ == "__main__":
    main()
