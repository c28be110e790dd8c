"""Personal, one-shot and server-side methods over Flower, with real processes on loopback: the bits of one process.

Three sites of twenty-four short texts in three classes tune a tiny encoder for two rounds; personal models stay at
their sites. The same recipe is run in one process. Equal must be the log, byte for byte, the clients' scores, and the
private state that every site has on disk.

    python -m benchmarks.over_flower [METHOD ...]      prints a JSON object per method; exit code 1 where any differs
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w

from fedferret import load_recipe, run
from fedferret.algorithms.registry import catalogue
from fedferret.core.keys import Key
from fedferret.tracking import events
from fedferret.wire import codec

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the federation of the tests

SITES, ROUNDS, ROWS = ("site-1", "site-2", "site-3"), 2, 24
WORDS = {"food": ("soup", "bread", "salt"), "sky": ("star", "moon", "cloud"), "sport": ("ball", "goal", "team")}
TRAINING = {"learning_rate": 0.1, "steps": 3, "batch_size": 4}
METHODS: Mapping[str, Mapping[str, Any]] = {  # tables that differ from those of ``tables``, by method
    "fedsa-lora": {"algorithm": {"modules": "all-linear", "training": TRAINING}},
}


def tables(name: str, folder: Path) -> dict[str, Any]:
    """The recipe of a method.

    Args:
        name: of the method.
        folder: with the sites' files.
    """
    changes = METHODS.get(name, {})
    return {
        "rounds": ROUNDS,
        "model": {"name": "tiny-encoder"},
        "data": {
            "source": "sites",
            "sites": list(SITES),
            "files": {site: str(folder / f"{site}.jsonl") for site in SITES},
            "held_out_path": str(folder / "held-out.jsonl"),
        },
        "objective": {"name": "classification", "classes": list(WORDS)},
        "text": {"max_tokens": 32},
        "clients": {"per_round": len(SITES), "min_clients": len(SITES), "held_out": 0.25},
        "evaluation": {"local_only_clients": 0},
        "execution": {"deadline": 600.0},
        **changes,
        "algorithm": {"name": name, **changes.get("algorithm", {"training": TRAINING})},
    }


def write_rows(path: Path) -> None:
    """Short texts with their class, drawn by the file's name."""
    lines = []
    for row in range(ROWS):
        kind, *places = (int(3 * value) for value in Key.of(7, path.stem, row).uniform(3))
        name = list(WORDS)[kind]
        text = " and ".join(f"the {WORDS[name][place]}" for place in places)
        lines.append(json.dumps({"instruction": text, "response": name}) + "\n")
    path.write_text("".join(lines))


def private_states(files: list[Path]) -> dict[str, str]:
    """By client, a hash of its newest private state in these files."""
    newest: dict[str, tuple[int, str]] = {}
    for path in files:
        kept = codec.decode(path.read_bytes())
        client = kept.client.rpartition("/")[2]
        found = kept.round, hashlib.sha256(codec.encode(kept.state)).hexdigest()
        newest[client] = max(newest.get(client, found), found)
    return {client: digest for client, (_, digest) in newest.items()}


def compared(name: str, folder: Path) -> dict[str, Any]:
    """Run a method in one process and over Flower.

    Args:
        name: of the method.
        folder: empty; gets recipe, data and both runs.

    Returns:
        What is equal, and the figures of the run over Flower.
    """
    from federation import federation, free_port, records

    for each in (*SITES, "held-out"):
        write_rows(folder / f"{each}.jsonl")
    (folder / "run.toml").write_text(tomli_w.dumps(tables(name, folder)))
    alone, served = folder / "alone", folder / "served"
    run(load_recipe(folder / "run.toml"), out=alone, log=lambda line: None)
    started = time.perf_counter()
    with federation(folder) as made:
        address = f"127.0.0.1:{free_port()}"
        made.start("serve", "serve", "run.toml", "--out", "served", "--listen", address, "--insecure")
        for site in SITES:
            made.start(site, "join", address, "--name", site, "--data", f"{site}.jsonl", "--insecure")
        if made.end("serve"):
            raise SystemExit(f"{name}: the server ended\n{made.output('serve')}")
        seconds = time.perf_counter() - started
    one, many = events.read(alone), events.read(served)
    scores = [each.evaluations[each.done].clients for each in (one, many)]
    states = [
        private_states([*folder.glob(files)])
        for files in ("alone/state/clients/*.state", "sites/*/runs/*/clients/*.state")
    ]
    return {
        "method": name,
        "rounds": many.done,
        "same_log": records(alone) == records(served),
        "same_fingerprint": one.rounds[one.done].fingerprint == many.rounds[many.done].fingerprint != "",
        "fingerprint": many.rounds[many.done].fingerprint,
        "clients_scored": len(scores[1]),
        "same_scores": scores[0] == scores[1] and set(scores[1]) == set(SITES),
        "private_states": len(states[1]),
        "same_private_states": states[0] == states[1],
        "failures": len(many.failures),
        "up": sum(sum(each.bytes_up.values()) for each in many.rounds.values()),
        "down": sum(sum(each.bytes_down.values()) for each in many.rounds.values()),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Compare the methods that are named, or all that are known here."""
    asked, differs = sys.argv[1:] or [name for name in METHODS if name in catalogue()], False
    for name in asked:
        with TemporaryDirectory() as folder:
            found = compared(name, Path(folder))
        print(json.dumps(found), flush=True)
        differs |= not all(value for each, value in found.items() if each.startswith("same")) or found["failures"] > 0
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    main()
