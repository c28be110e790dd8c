"""A whole round of Ferret against one of FedAvg with the same model, clients, steps and batches."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Figure, alternate, main
from fedferret import recipe
from fedferret.experiment import Experiment, load_data
from fedferret.models import load

CLIENTS, STEPS = 4, 10
MODEL = "packaged:smollm2"
FEDAVG, FERRET = {"name": "fedavg"}, {"name": "ferret", "preset": "one-bit"}


def figures() -> Iterator[Figure]:
    """Seconds of a round, all but evaluation."""

    def settings(method: dict[str, str]):  # type: ignore[no-untyped-def]
        return recipe(
            rounds=1,
            model={"name": MODEL},
            data={"source": "chitchat", "num_clients": 20, "max_messages": 40},
            text={"max_tokens": 128},
            clients={"per_round": CLIENTS},
            algorithm={**method, "training": {"steps": STEPS}},
        )

    model, data = load(MODEL), load_data(settings(FEDAVG))

    def round_of(method: dict[str, str]) -> float:
        run = Experiment(settings(method), model, data)
        state = run.initial_state()
        (record,) = run.run_rounds(state, run.engine(state))
        assert not record.failures, record.failures
        return record.seconds

    ratio = alternate(lambda: round_of(FERRET), lambda: round_of(FEDAVG), 2, 0)
    note = f"SmolLM2-135M, {CLIENTS} clients x {STEPS} steps of 4 examples of at most 128 tokens, fp32, chitchat"
    yield Figure("a round of Ferret against one of FedAvg", ratio, "at most", 1.05, note)


if __name__ == "__main__":
    main("round", "A round of Ferret takes as long as a round of FedAvg.", figures)
