"""What a run needs of the disk: the log with the rounds that can be rewound, and simulated clients' private states.

log        the files that ``core/log.py`` keeps: entries by the formula's bytes, snapshots of the public state
server     its own state, once for each round that can be rewound
states     one a client, and one for each client of each round that can be rewound

States are measured on the meta device (``core/by_round.py``).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedferret.build import Parts, check, tuned_skeleton
from fedferret.config import Recipe
from fedferret.core.algorithm import StateBytes, WireCost
from fedferret.core.by_round import shapes_by_round, state_bytes_by_round
from fedferret.core.task import Task
from fedferret.tracking.units import as_bytes
from fedferret.wire import codec


def wire_costs(recipe: Recipe) -> Callable[[int], WireCost]:
    """What the method costs in a round.

    Args:
        recipe: resolved.

    Returns:
        A function from a round's number, from 1, to the round's cost.
    """
    shapes = shapes_by_round(recipe.algorithm, tuned_skeleton(recipe), recipe.rounds)
    return lambda number: recipe.algorithm.wire_cost(shapes(number), recipe.clients.per_round, number)


def all_state_bytes(recipe: Recipe, clients: int) -> list[StateBytes]:
    """What the method's states have after each round.

    Args:
        recipe: resolved.
        clients: of the run.

    Returns:
        Bytes, round by round.
    """
    task = Task.of(tuned_skeleton(recipe), recipe.objective, recipe.rounds)
    of_round = state_bytes_by_round(recipe.algorithm, task, recipe.clients.per_round, clients, codec)
    return [of_round(number) for number in range(1, recipe.rounds + 1)]


def kept_rounds(recipe: Recipe, versions: Mapping[str, int]) -> dict[str, int]:
    """Say which simulated clients have a private state on disk.

    Args:
        recipe: resolved.
        versions: of the run, by client: each is the one before the round in which the client was last counted.

    Returns:
        By client with a private state, the round that left it.
    """
    if not versions:
        return {}
    costs, counted = wire_costs(recipe), {client: version + 1 for client, version in versions.items()}
    keeps = {number: costs(number).client_state_bytes > 0 for number in set(counted.values())}
    return {client: number for client, number in counted.items() if keeps[number]}


def log_bytes(entries: Sequence[float], snapshots: Sequence[float], history: int) -> float:
    """The most that a log takes, over all rounds.

    Args:
        entries: bytes of each round's entry.
        snapshots: bytes of the public state after each round.
        history: so many rounds before the last stay whole on disk.

    Returns:
        Bytes.
    """
    files: dict[tuple[str, int], tuple[float, float]] = {}  # size, and the version from which no node is sent it
    sent: list[tuple[int, float]] = []  # records that nodes are sent, the oldest first
    base, since, total, most = 0, 0.0, 0.0, 0.0
    for version, (entry, snapshot) in enumerate(zip(entries, snapshots, strict=True), start=1):
        sent.append((version, entry))
        files["record", version] = entry, math.inf
        total, since = total + entry, since + entry
        if 2 * since > snapshot:
            if base:
                files["snapshot", base] = files["snapshot", base][0], version
            files["snapshot", version], base = (snapshot, math.inf), version
            total, since, kept = total + snapshot, 0.0, 0.0
            for number, size in reversed(sent):
                kept += size
                if kept >= snapshot:
                    files["record", number] = size, version
            sent = [(number, size) for number, size in sent if files["record", number][1] == math.inf]
        most = max(most, total)
        for (kind, number), (size, until) in list(files.items()) if base else ():
            if until <= max(version - history, number):
                del files[kind, number]
                total -= size
    return most


def server_bytes(recipe: Recipe, states: Sequence[StateBytes]) -> float:
    """The most that the log and the server's own states take, over all rounds.

    Args:
        recipe: resolved.
        states: of each round.

    Returns:
        Bytes.
    """
    costs, history = wire_costs(recipe), recipe.execution.history
    entries = [costs(number).down_most for number in range(1, recipe.rounds + 1)]
    own = max(sizes.server for sizes in states) * min(recipe.rounds, history + 1)
    return own + log_bytes(entries, [sizes.public for sizes in states], history)


def kept_states(clients: int, rounds: int, cohort: int, history: int) -> int:
    """How many private states of simulated clients are on disk at most.

    Args:
        clients: of the data.
        rounds: of the run.
        cohort: clients of a round.
        history: rounds before the last that can be rewound.
    """
    return min(rounds * cohort, min(clients, rounds * cohort) + history * cohort)


def log_room(experiment: Parts, out: Path, log: Callable[[str], None]) -> None:
    """Log what private states take, and whether they or the log may not fit on the disk: found late, it costs rounds.

    Args:
        experiment: of the run.
        out: the run's folder.
        log: called with up to two lines.
    """
    recipe, history = experiment.recipe, experiment.recipe.execution.history
    each = all_state_bytes(recipe, len(experiment.data.clients))
    kept = max(sizes.client for sizes in each)
    count = kept_states(len(experiment.data.clients), recipe.rounds, recipe.clients.per_round, history)
    states = kept * count if experiment.trains_here else 0.0
    rounds = server_bytes(recipe, each)
    there = sum(path.stat().st_size for path in [*out.glob("state/clients/*"), *out.glob("log/*")])
    free = shutil.disk_usage(out).free + there
    stops = "where the disk is full the run stops, and goes on once there is more"
    if states:
        fits = "" if states <= free else f", and {out} has room for {as_bytes(free)}: {stops}"
        log(
            f"{recipe.algorithm.name} keeps {as_bytes(kept)} of every client that took part, up to "
            f"{as_bytes(states)} in all on disk{fits}"
        )
    elif kept:
        log(f"{recipe.algorithm.name} keeps {as_bytes(kept)} at every site that took part, on the site's disk")
    if states <= free < states + rounds:
        log(
            f"the log and the server's state take up to {as_bytes(rounds)}, so that {history} rounds can be "
            f"rewound, and {out} has room for {as_bytes(free - states)}: lower execution.history, or {stops}"
        )


def site_states(recipe: Recipe, history: int) -> str:
    """Say what a method keeps on a site's disk.

    Args:
        recipe: as the site runs it.
        history: the private states of so many past rounds stay there, beside the newest two.

    Returns:
        A line; "" where the method keeps nothing.
    """
    kept = max(sizes.client for sizes in all_state_bytes(recipe, recipe.clients.per_round))
    most = as_bytes(kept * min(recipe.rounds, history + 2))
    return (
        f"{recipe.algorithm.name} keeps {as_bytes(kept)} here between rounds, up to {most} in all on disk"
        if kept
        else ""
    )


def update_bytes(recipe: Recipe) -> float:
    """The most bytes of one client's update by the method's formula, over all rounds.

    Raises:
        UserError: the recipe is known to be wrong.
    """
    check(recipe)
    return max(cost.up_most for cost in map(wire_costs(recipe), range(1, recipe.rounds + 1)))
