"""Prefixes of chosen layers: what FedPepTAO averages, without its server's step.

    warm-up     W rounds of FedAvg of all layers' prefixes               only where the number of layers is measured
    scoring     client j: ζ_l of each layer from one batch's hidden states (local/similarity.py), without prefixes
                and where it is measured, the share of layers to keep, from the Hessian's spectrum (local/lanczos.py)
                server: the mean of both; the layers with the highest ζ are shared from now on
    training    client j: T local steps; sends Δ_j of the shared layers, keeps the prefixes of the others
                server: Σ p_j Δ_j

With ``layers = 1.0`` every round is a training round. Wire: as in ``fedpeptao.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fedferret.algorithms.fedavg import Delta, FedAvgEntry
from fedferret.algorithms.fedpeptao_layers import blocks_of, choice, in_range, measured, rounded_count
from fedferret.algorithms.fedpeptao_messages import FedPepTAOPublic, LayerScores, SharedLayers
from fedferret.algorithms.fedpeptao_prefixes import PartialPrefixes
from fedferret.algorithms.full_model import loaded
from fedferret.algorithms.partly_private import PrivateWeights
from fedferret.core.algorithm import ClientReply, Pooled, Shapes, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.models.adapters.attention import prefix_groups


@dataclass(frozen=True, kw_only=True)
class ChosenPrefixes(PartialPrefixes):
    """FedAvg of the prefixes of chosen layers. See ``Algorithm`` for arguments and results."""

    layers: float | Literal["spectrum"] = "spectrum"  # the share of layers that are shared; the paper measures it
    keep: Literal["highest", "lowest"] = "highest"  # scores; the code's, where others prefer examples that differ
    scoring_batch: int = 8  # examples that a client scores layers on, the code's; at least 2, or all scores are equal
    warm_up_rounds: int = 10  # of all layers before the spectrum is measured, the code's
    lanczos_steps: int = 50  # the code's; each takes one product with the Hessian

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("warm_up_rounds", 0), ("lanczos_steps", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.scoring_batch < 2:
            raise UserError(
                f"scoring_batch={self.scoring_batch}: of one example every layer has the same score; use at least 8"
            )
        if self.layers != "spectrum" and not 0 < self.layers <= 1:
            raise UserError(f'layers={self.layers}: give a share of all layers, above 0 to 1.0, or "spectrum"')

    def check(self, model: nn.Module, rounds: int) -> None:
        """Some layers must be left to choose, and rounds to train them."""
        super().check(model, rounds)
        if self.layers == 1:
            return
        layers = len(blocks_of(model))
        if layers == 1:
            raise UserError("the model has one layer, of which none can be chosen: set layers=1.0")
        if self.layers != "spectrum" and not 0 < rounded_count(self.layers, layers) < layers:
            raise UserError(
                f"layers={self.layers}: {rounded_count(self.layers, layers)} of {layers} layers would be shared; give "
                f"a share for 1 to {layers - 1} of them, or 1.0 for all, which needs no scoring round"
            )
        before = self._scoring_round
        if rounds <= before:
            given = '"spectrum"' if self._measured else self.layers
            raise UserError(
                f"layers={given} takes {before} rounds before training and the run has {rounds}; raise rounds, "
                f"lower warm_up_rounds, or set layers to a share, which takes 1, or to 1.0, which takes none"
            )

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """By the round's kind; least and most where the number of layers is measured."""
        sizes = {name: 4.0 * torch.Size(shape).numel() for name, shape in shapes.items()}
        groups = sorted(sum(sizes[name] for name in group) for group in prefix_groups(shapes).values())
        everything, layers = sum(sizes.values()), len(groups)
        if self.layers == 1 or round < self._scoring_round:
            return WireCost.exact(everything, everything)
        if round == self._scoring_round:
            return WireCost.exact(4 * (layers - 1 + self._measured), layers)
        fewest, largest = (1, layers) if self._measured else (rounded_count(float(self.layers), layers),) * 2
        rest = everything - sum(groups)
        least, most = rest + sum(groups[:fewest]), rest + sum(groups[layers - largest :])
        return WireCost(least, most, least, most, everything - least if self.personal else 0.0)

    def client_update(  # type: ignore[override]
        self, task: Task, public: FedPepTAOPublic, client: PrivateWeights | None, data: Examples, key: Key
    ) -> ClientReply[PrivateWeights, Any]:
        """Score layers in the scoring round; in others train, and send the update of the shared weights."""
        if self._scores_next(public):
            return self._scored(task, public, data, key)
        reply = super().client_update(task, public, client, data, key)
        if reply.client is None and self._measured and self.personal and self._trains_next(public):
            # all layers were chosen, which ``wire_cost`` cannot know
            return ClientReply(reply.payload, PrivateWeights({}), reply.metrics)
        return reply

    def accept(self, task: Task, public: FedPepTAOPublic, payload: Any) -> None:  # type: ignore[override]
        """Refuse what is of another kind of round, and scores that no batch gives."""
        expected = LayerScores if self._scores_next(public) else self.update_type(public)
        if type(payload) is not expected:
            raise ValueError(f"a {type(payload).__name__} came where a {expected.__name__} was expected")
        if isinstance(payload, LayerScores):
            self.accept_sum(task, public, payload)
            if not in_range(payload.scores, self.scoring_batch) or not all(0 <= x <= 1 for x in payload.share.tolist()):
                raise ValueError("scores or a share came that no batch gives")
            return
        super().accept(task, public, payload)

    def update_type(self, public: FedPepTAOPublic) -> type[Delta]:
        """The type of clients' updates.

        Args:
            public: the public state after the round before.

        Returns:
            The one type that ``accept`` takes in a round that is no scoring round.
        """
        return Delta

    def accept_sum(self, task: Task, public: FedPepTAOPublic, sum: Any) -> None:  # type: ignore[override]
        """Refuse sums of other names or shapes."""
        if not self._scores_next(public):
            super().accept_sum(task, public, sum)
            return
        if not isinstance(sum, LayerScores):
            raise ValueError(f"a sum of type {type(sum).__name__} came where LayerScores were expected")
        if (sum.scores.shape, sum.share.shape) != ((len(public.chosen) - 1,), (self._measured,)):
            raise ValueError("scores of another number of layers came: the client has other settings")

    def update_norm(self, task: Task, public: FedPepTAOPublic, payload: Any) -> float | None:  # type: ignore[override]
        """‖Δ_j‖, without what the server's memory adds; None of scores."""
        return None if isinstance(payload, LayerScores) else super().update_norm(task, public, payload)

    def server_update(  # type: ignore[override]
        self, task: Task, public: FedPepTAOPublic, server: Any, pooled: Pooled[Any], key: Key
    ) -> tuple[Any, FedAvgEntry | SharedLayers]:
        """Choose layers in the scoring round; in others the mean is the entry."""
        mean = pooled.only
        if not isinstance(mean, LayerScores):
            return super().server_update(task, public, server, pooled, key)
        layers = len(public.chosen)
        share = float(mean.share) if self._measured else float(self.layers)
        count = min(max(1, rounded_count(share, layers)), layers)
        return server, SharedLayers(choice(mean.scores.tolist(), count, self.keep))

    def apply(self, task: Task, public: FedPepTAOPublic, entry: FedAvgEntry | SharedLayers) -> None:  # type: ignore[override]
        """Move the shared weights, or note which they are from now on."""
        if isinstance(entry, SharedLayers):
            public.chosen = entry.chosen.clone()
        else:
            super().apply(task, public, entry)
        public.round += 1

    def note(self, public: FedPepTAOPublic) -> str | None:  # type: ignore[override]
        """Which layers are shared, where they were chosen."""
        if self.layers == 1 or not self._trains_next(public):
            return None
        chosen = public.chosen.nonzero().flatten().tolist()
        return f"of {len(public.chosen)} layers, counted from 0, these are shared: {', '.join(map(str, chosen))}"

    @property
    def _measured(self) -> bool:
        return self.layers == "spectrum"

    @property
    def _scoring_round(self) -> int:
        """From 1; 0 where no layer is chosen."""
        return 0 if self.layers == 1 else 1 + (self.warm_up_rounds if self._measured else 0)

    def _scores_next(self, public: FedPepTAOPublic) -> bool:
        return public.round + 1 == self._scoring_round

    def _trains_next(self, public: FedPepTAOPublic) -> bool:
        return public.round >= self._scoring_round

    def _scored(
        self, task: Task, public: FedPepTAOPublic, data: Examples, key: Key
    ) -> ClientReply[PrivateWeights, LayerScores]:
        with loaded(task, public.weights):
            scores, share, metrics = measured(
                task, data, key, self.scoring_batch, self.lanczos_steps if self._measured else None
            )
        return ClientReply(LayerScores(scores, share), None, metrics)
