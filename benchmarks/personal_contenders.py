"""The methods of ``benchmarks.personal``, with their settings and the rates that are tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGES, HEADS = "images", "heads"
EPOCH = {"batch_size": 32, "epochs": 1, "steps": "none", "clip": 1.0}
STEPS = {"batch_size": 16, "steps": 10, "clip": 1.0}


@dataclass(frozen=True)
class Contender:
    """A method in the comparison.

    Attributes:
        name: of the method in recipes.
        training: of the clients, without the rate; None: the method trains nothing there.
        rates: learning rates that are tried; one is taken as it is.
        settings: further ones of the method.
        rate: where the rate goes: a setting's name, or a table's and a setting's with a dot.
        like: the contender that a variant takes the rate of; empty where its own is found.
        model: further settings of the model.
        rounds: where they differ from the task's.
        all_clients: whether every client takes part in every round.
    """

    name: str
    training: Mapping[str, Any] | None
    rates: tuple[float, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: str = "training.learning_rate"
    like: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    rounds: int | None = None
    all_clients: bool = False

    def algorithm(self, rate: float | None) -> dict[str, Any]:
        """The table of the method in a recipe.

        Args:
            rate: learning rate; None: the method has none.
        """
        made = {"name": self.name, **self.settings}
        if self.training is not None:
            made["training"] = {**self.training, **made.get("training", {})}
        if rate is not None:
            table, _, name = self.rate.rpartition(".")
            if table:
                made[table] = {**made.get(table, {}), name: rate}
            else:
                made[name] = rate
        return made


SGD_EPOCH, SGD_STEPS = ({**each, "optimizer": "sgd"} for each in (EPOCH, STEPS))
ADAMW_EPOCH, ADAMW_STEPS = ({**each, "optimizer": "adamw"} for each in (EPOCH, STEPS))
RATES, SMALL_RATES, HEAD_RATES, ADAM_RATES = (0.1, 0.3, 1.0), (0.03, 0.1, 0.3), (1.0, 3.0, 10.0), (1e-3, 3e-3, 1e-2)
PULL = {"mu": 0.1}  # of FedProx as of FedPTR, so that what they pull to is all that differs


def _server(name: str, training: Mapping[str, Any], rates: tuple[float, ...]) -> Contender:
    """FedAvg with another optimiser at the server, at that optimiser's default rate."""
    return Contender("fedavg", training, rates, {"server_optimizer": {"name": name}})


def _spafl(rates: tuple[float, ...] = (), **settings: Any) -> Contender:
    """SpaFL with the momentum of the authors' code; without rates it takes those found at the default pressure."""
    return Contender("spafl", {**SGD_EPOCH, "momentum": 0.9}, rates, settings, like="" if rates else "spafl")


CONTENDERS: Mapping[str, Mapping[str, Contender]] = {
    IMAGES: {
        "local-only": Contender("local-only", SGD_EPOCH, RATES),
        "fedavg": Contender("fedavg", SGD_EPOCH, RATES),
        "fedprox": Contender("fedprox", SGD_EPOCH, RATES, PULL),
        "fedavg-ft": Contender("fedavg-ft", SGD_EPOCH, like="fedavg"),
        "fedper": Contender("fedper", SGD_EPOCH, RATES),
        "fedrep": Contender("fedrep", SGD_EPOCH, RATES),
        "lg-fedavg": Contender("lg-fedavg", SGD_EPOCH, RATES),
        "fedlog": Contender("fedlog", ADAMW_EPOCH, ADAM_RATES),
        "spafl": _spafl(SMALL_RATES),
        "spafl-0.01": _spafl(alpha=0.01),  # the default pressure of 0.002 is for 2,500 local epochs
        "spafl-0.02": _spafl(alpha=0.02),
        "spafl-weights-alone": _spafl(importance_update=False),
        "fedptr": Contender("fedptr", SGD_EPOCH, RATES, PULL),
        "fedptr-server": Contender("fedptr", SGD_EPOCH, (), {**PULL, "where": "server"}, like="fedptr"),
        "fedptr-extrapolated": Contender("fedptr", SGD_EPOCH, (), {**PULL, "target": "extrapolated"}, like="fedptr"),
        "scaffold": Contender("scaffold", SGD_EPOCH, RATES),
        "fednova": Contender("fednova", SGD_EPOCH, RATES),
        "fedpm": Contender("fedpm", ADAMW_EPOCH, RATES),
        "fedavgm": _server("momentum", SGD_EPOCH, SMALL_RATES),
        "fedadam": _server("adam", SGD_EPOCH, RATES),
        "fedyogi": _server("yogi", SGD_EPOCH, RATES),
    },
    HEADS: {
        "local-only": Contender("local-only", SGD_STEPS, HEAD_RATES),
        "fedavg": Contender("fedavg", SGD_STEPS, HEAD_RATES),
        "fedprox": Contender("fedprox", SGD_STEPS, HEAD_RATES, PULL),
        "fedavg-ft": Contender("fedavg-ft", SGD_STEPS, like="fedavg"),
        "fedlog": Contender("fedlog", None, rounds=1, all_clients=True),  # of a frozen body: statistics never change
        "fedlog-map": Contender("fedlog", ADAMW_STEPS, ADAM_RATES, {"features": 64}),  # a private map after the body
        "fedpft-diagonal": Contender("fedpft", None, (), {"covariance": "diagonal"}, rounds=1, all_clients=True),
        "fedpft-spherical": Contender("fedpft", None, (), {"covariance": "spherical"}, rounds=1, all_clients=True),
        "fedpft-full": Contender("fedpft", None, (), {"covariance": "full"}, rounds=1, all_clients=True),
        "fedptr-server": Contender("fedptr", SGD_STEPS, (), {**PULL, "where": "server"}, like="fedprox"),
        "scaffold": Contender("scaffold", SGD_STEPS, HEAD_RATES),
        "fednova": Contender("fednova", SGD_STEPS, HEAD_RATES),
        "fedadam": _server("adam", SGD_STEPS, HEAD_RATES),
    },
}
