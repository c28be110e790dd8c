"""How concentrated an update is, what positions of its largest values cost, and what of it arrives in how many bytes.

Four clients of chitchat tune SmolLM2 for five SGD steps of one example at 0.03, one client a run of one round. What a
method's round changes is compared with what FedAvg's changes: the share of energy that arrives is 1 − ‖Δ − Δ̃‖² / ‖Δ‖².
Bytes are of the client's whole message.

    python -m benchmarks.update_energy [--save]       about 20 minutes of one core
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedferret import recipe
from fedferret.bases.gaps import encode_gaps
from fedferret.core import tree
from fedferret.core.files import write_atomically
from fedferret.experiment import Experiment
from fedferret.tracking.environment import environment

RESULTS = Path(__file__).parent / "results" / "update-energy.json"
COUNTS = (100, 382, 4_754, 60_396)
CLIENTS = (1, 2, 3, 4)  # seeds of runs with one client each
METHODS: Sequence[Mapping[str, Any]] = (
    *(
        {"name": "fedavg-top-k", "values": count, "bits": bits, "error_feedback": False}
        for count in COUNTS[1:]
        for bits in (1, 8, 16)
    ),
    *({"name": "sparse-loco", "values_per_chunk": count, "bits": bits} for count in (1, 2, 8) for bits in (32, 2)),
    {"name": "uni-lora", "bits": 1},
    {"name": "uni-lora", "bits": 32},
    {"name": "fetch-sgd", "num_columns": 100_000, "kept": 10_000, "momentum": 0.0},
)


def changed(algorithm: Mapping[str, Any], seed: int) -> tuple[dict[str, Tensor], int]:
    """One client's round.

    Args:
        algorithm: its table, without training.
        seed: of the run, which draws the client.

    Returns:
        What the round takes from the weights, by tensor, and the bytes of the client's message.
    """
    made = recipe(
        seed=seed,
        rounds=1,
        model={"name": "packaged:smollm2"},
        data={"source": "chitchat", "max_held_out": 64},
        text={"cut": "prompt", "max_tokens": 64},
        clients={"per_round": 1},
        algorithm={**algorithm, "training": {"learning_rate": 0.03, "batch_size": 1, "steps": 5}},
        evaluation={"local_only_clients": 0},
    )
    experiment = Experiment.load(made, log=lambda line: None)
    state = experiment.initial_state()
    with made.algorithm.model(experiment.task, state.public) as model:
        assert model is not None
        before = tree.clone(tree.parameters(model))
    (record,) = experiment.run_rounds(state, experiment.engine(state))
    with made.algorithm.model(experiment.task, state.public) as model:
        assert model is not None
        return dict(tree.difference(before, tree.parameters(model))), sum(record.bytes_up.values())


def position_bits(positions_K: Tensor, sizes: Sequence[int]) -> dict[str, float]:
    """Bits per position by four codes.

    Args:
        positions_K: ascending.
        sizes: of the tensors.
    """
    count, total = len(positions_K), sum(sizes)
    low = int(math.log2(total / count))
    elias_fano = count * low + (total >> low) + count
    starts = torch.tensor([0, *sizes]).cumsum(0)
    apart = 0.0
    for start, end in pairwise(starts.tolist()):
        own = positions_K[(positions_K >= start) & (positions_K < end)] - start
        apart += _rice(own) + 2 * math.log2(len(own) + 1) + 1  # the count of a tensor by Elias' gamma code
    return {
        "elias-fano": elias_fano / count,
        "rice, all tensors": _rice(positions_K) / count,
        "rice, tensor by tensor": apart / count,
        "adaptive gaps": 8 * len(encode_gaps(positions_K.numpy())) / count,
    }


def _rice(positions_K: Tensor) -> float:
    """Bits of Rice's code of the gaps, with the best parameter; five bits name it."""
    if not len(positions_K):
        return 0.0
    gaps = positions_K.diff(prepend=torch.tensor([-1])) - 1
    return 5 + min(float((gaps >> low).sum()) + (low + 1) * len(gaps) for low in range(28))


def measured(seed: int) -> Iterator[dict[str, Any]]:
    """All figures of one client.

    Args:
        seed: as in ``changed``.
    """
    delta, _ = changed({"name": "fedavg"}, seed)
    flat = torch.cat([each.flatten() for each in delta.values()])
    energy = float(flat.double().square().sum())
    sizes = [each.numel() for each in delta.values()]
    for count in COUNTS:
        positions_K = flat.abs().topk(count).indices.sort().values
        share = float(flat[positions_K].double().square().sum()) / energy
        yield {"client": seed, "largest": count, "energy": share, **position_bits(positions_K, sizes)}
    for method in METHODS:
        arrived, size = changed(method, seed)
        row = {"client": seed, **method, "bytes": size}
        if arrived.keys() == delta.keys():  # the model's own weights are tuned
            lost = sum(float((delta[name] - arrived[name]).double().square().sum()) for name in delta)
            row["energy"] = 1 - lost / energy
        yield row


def main() -> None:
    """Print, and save where asked, the least, mean and most of every figure over the clients."""
    rows = []
    for seed in CLIENTS:
        for row in measured(seed):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    figures = ("energy", "bytes", "elias-fano", "rice, all tensors", "rice, tensor by tensor", "adaptive gaps")
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        what = {name: value for name, value in row.items() if name not in (*figures, "client")}
        grouped.setdefault(json.dumps(what), []).append(row)
    result: dict[str, Any] = {"machine": environment(), "clients": len(CLIENTS), "figures": []}
    for what, group in grouped.items():
        found: dict[str, Any] = json.loads(what)
        for name in figures:
            if name in group[0]:
                values = [row[name] for row in group]
                found[name] = [round(each, 4) for each in (min(values), statistics.fmean(values), max(values))]
        result["figures"].append(found)
    text = json.dumps(result, indent=1)
    print(text)
    if "--save" in sys.argv[1:]:
        write_atomically(RESULTS, text.encode() + b"\n")


if __name__ == "__main__":
    main()
