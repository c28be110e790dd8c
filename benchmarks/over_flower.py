"""Personal, one-shot and server-side methods over Flower, with real processes on loopback: the bits of one process.

Two sites of twenty-four short texts in three classes tune a tiny encoder for two rounds; personal models stay at their
sites, which run one method after the other. The same recipe is run in one process. Equal must be the log, byte for
byte, the clients' scores, and the private state that every site has on disk.

    python -m benchmarks.over_flower [METHOD ...]      prints a JSON object per method; exit code 1 where any differs
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import tomli_w

from fedferret import load_recipe, run
from fedferret.algorithms.registry import catalogue
from fedferret.core.keys import Key
from fedferret.tracking import events

if TYPE_CHECKING:
    from federation import Federation

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the federation of the tests

SITES, ROUNDS, ROWS = ("site-1", "site-2"), 2, 24
AT_SITES = "sites/*/runs/*/clients/*.state"
WORDS = {"food": ("soup", "bread", "salt"), "sky": ("star", "moon", "cloud"), "sport": ("ball", "goal", "team")}
MODEL = {"name": "tiny-encoder"}
FROZEN = {**MODEL, "train": "head"}
TRAINING = {"learning_rate": 0.1, "steps": 3, "batch_size": 4}
METHODS: Mapping[str, Mapping[str, Any]] = {  # tables that differ from those of ``tables``, by method
    "fedsa-lora": {"algorithm": {"modules": "all-linear", "training": TRAINING}},
    "fedper": {},
    "fedrep": {"algorithm": {"head_times": 2, "training": TRAINING}},
    "lg-fedavg": {},
    "fedavg-ft": {"algorithm": {"fine_tuning": 2, "training": TRAINING}},
    "local-only": {},
    "fedlog": {},
    "spafl": {},
    "fedpft": {"rounds": 1, "model": FROZEN, "algorithm": {}},
    "fedptr": {"model": FROZEN, "algorithm": {"matching_steps": 2, "training": TRAINING}},
    "fedpft-then": {"algorithm": {"then": {"name": "fedit", "modules": "all-linear", "training": TRAINING}}},
    "spafl-gates": {},
    "fedpm": {},
    "scaffold": {},
    "fednova": {},
    "fedavg": {"algorithm": {"server_optimizer": {"name": "adam"}, "training": TRAINING}},
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
        "model": MODEL,
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


def alone(name: str, folder: Path) -> None:
    """Run a method in this process, in ``folder/NAME-alone``."""
    (folder / f"{name}.toml").write_text(tomli_w.dumps(tables(name, folder)))
    run(load_recipe(folder / f"{name}.toml"), out=folder / f"{name}-alone", log=lambda line: None)


def served(name: str, folder: Path, made: Federation, address: str) -> dict[str, Any]:
    """Run a method over Flower, in ``folder/NAME``, and compare that with the run in one process.

    Args:
        name: of the method; ``alone`` has run it.
        folder: with recipe and data.
        made: the federation; its sites call.
        address: of the server.

    Returns:
        What is equal, and the figures of the run over Flower.
    """
    from federation import private_states, records

    started, before = time.perf_counter(), {*folder.glob(AT_SITES)}
    server = f"serve-{name}"
    made.start(server, "serve", f"{name}.toml", "--out", name, "--listen", address, "--insecure")
    if made.end(server):
        raise SystemExit(f"{name}: the server ended\n{made.output(server)}")
    seconds, here = time.perf_counter() - started, folder / f"{name}-alone"
    one, many = events.read(here), events.read(folder / name)
    scores = [each.evaluations[each.done].clients for each in (one, many)]
    files = [*here.glob("state/clients/*.state")], [*{*folder.glob(AT_SITES)} - before]
    states = [private_states(each) for each in files]
    return {
        "method": name,
        "rounds": many.done,
        "same_log": records(here) == records(folder / name),
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
    from federation import federation, free_port

    asked, differs = sys.argv[1:] or [name for name in METHODS if name in catalogue()], False
    with TemporaryDirectory() as name:
        folder, address = Path(name), f"127.0.0.1:{free_port()}"
        for each in (*SITES, "held-out"):
            write_rows(folder / f"{each}.jsonl")
        for method in asked:
            alone(method, folder)
        with federation(folder) as made:
            for site in SITES:
                made.start(site, "join", address, "--name", site, "--data", f"{site}.jsonl", "--insecure")
            for method in asked:
                found = served(method, folder, made, address)
                print(json.dumps(found), flush=True)
                same = all(value for each, value in found.items() if each.startswith("same"))
                differs |= not same or found["failures"] > 0
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    main()
