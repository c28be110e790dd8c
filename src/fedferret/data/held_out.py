"""Each client's own held-out part, split off before training.

A client with n >= 2 examples holds out round(share x n) of them, at least one and at most n - 1, drawn by the key and
the client's name. So no draw depends on the other clients, and a site that holds its data splits them as a simulation
does. No example moves between clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.data.examples import Example, FederatedData, listed
from fedferret.data.stored import taken

if TYPE_CHECKING:
    from fedferret.core.keys import Key


def hold_out(data: FederatedData, share: float, key: Key, log: Callable[[str], None] | None = None) -> FederatedData:
    """Split a share of the training examples of every client off.

    Args:
        data: with the training examples of each client.
        share: of each client's examples, from 0 to below 1; 0 changes nothing.
        key: draws the examples of each client.
        log: is called with a line that names the clients that hold one example, and so hold nothing out.

    Returns:
        The data with ``kept``; a data set without held-out sets has the set "clients" of all kept examples.

    Raises:
        UserError: an impossible share, or no client holds more than one example.
    """
    if not 0 <= share < 1:
        raise UserError(f"clients.held_out is {share}: give a share of each client's examples, from 0 to below 1")
    if share == 0:
        return data
    training: dict[str, Sequence[Example]] = {}
    kept: dict[str, Sequence[Example]] = {}
    for client, examples in data.clients.items():
        training[client], unseen = _split(examples, share, key.fold("held out by client", client))
        if unseen:
            kept[client] = unseen
    single = [client for client, examples in data.clients.items() if len(examples) == 1]
    if single and not kept:
        raise UserError(
            f"clients.held_out is {share} but no client holds more than one example: set it to 0, or give clients more"
        )
    if single and log is not None:
        log(f"clients with a single example, which hold nothing out: {listed(single)}")
    everything = tuple(example for client in sorted(kept) for example in kept[client])
    held_out = data.held_out or ({"clients": everything} if kept else {})
    return replace(data, clients=training, kept=kept, held_out=held_out)


def nothing_held_out(data: FederatedData, client_column: str | None) -> str:
    """Words for data without an example to evaluate on, with a remedy that can help.

    Args:
        data: in which a held-out set is empty, or which has none.
        client_column: the setting, where the source has it; None: rows are partitioned.

    Returns:
        One line.
    """
    line = f"{data.source}: no held-out example is left to evaluate on"
    if client_column is not None and all(len(examples) == 1 for examples in data.clients.values()):
        return (
            f"{line}, because each client keeps at least one row and none has two: give other rows with "
            f"data.held_out_path, or leave data.client_column out"
        )
    return f"{line}: hold out a larger share of the data, or give other rows with data.held_out_path"


def _split(examples: Sequence[Example], share: float, key: Key) -> tuple[Sequence[Example], Sequence[Example]]:
    """The examples to train on and those held out, both in the order of ``examples``."""
    if len(examples) < 2:
        return examples, ()
    count = min(max(1, round(len(examples) * share)), len(examples) - 1)
    chosen = set(key.sample(range(len(examples)), count))
    training = (row for row in range(len(examples)) if row not in chosen)
    return taken(examples, training), taken(examples, sorted(chosen))
