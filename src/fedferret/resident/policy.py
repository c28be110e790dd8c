"""What a site lets a server ask of it: the table ``[policy]`` of ``site.toml``. What is left out is allowed.

    [policy]
    models = ["packaged:smollm2"]     # names of base models, as recipes have them
    model_sha256 = ["1f0c…"]          # SHA-256 of base weights; refusals and events.jsonl show it
    methods = ["ferret", "fedavg"]
    most_steps = 200                  # batches that a round trains on
    longest_round = 600.0             # seconds that a round may compute here
    fetch_models = false              # whether models may be fetched from the network; true by default
    scores = false                    # whether the rows that this site holds out may be scored; true by default

All but ``longest_round`` is checked before a model is loaded or fetched. A refusal names the key, what the run asks for
and what this site allows; it reaches the server as the reason of a failure, and ``audit.jsonl``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError

if TYPE_CHECKING:
    from fedferret.config import Recipe


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The limits of one site."""

    models: tuple[str, ...] | None = None  # names of base models; None: any
    model_sha256: tuple[str, ...] | None = None  # of their weights; None: any
    methods: tuple[str, ...] | None = None  # names; None: any
    most_steps: int | None = None  # batches that a round trains on; None: any number
    longest_round: float | None = None  # seconds that a round may compute here; None: as long as it takes
    fetch_models: bool = True  # whether models may be fetched; code never is
    scores: bool = True  # whether held-out rows may be scored: sums say how many rows each class has

    def __post_init__(self) -> None:
        for name in ("most_steps", "longest_round"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value}: must be greater than 0")
        for known in self.model_sha256 or ():
            if len(known) != 64 or not set(known) <= set("0123456789abcdef"):
                raise UserError(f'model_sha256="{known}": give 64 hexadecimal digits, in lower case')

    def check(self, recipe: Recipe, base: str, num_examples: int) -> None:
        """Refuse what a run asks for beyond these limits.

        Args:
            recipe: of the run, with the name of the model that is loaded here.
            base: SHA-256 of the base weights, as the request names it.
            num_examples: that this site trains on.

        Raises:
            UserError: as said.
        """
        _check("models", recipe.model.name, self.models)
        _check("model_sha256", base, self.model_sha256)
        _check("methods", recipe.algorithm.name, self.methods)
        if self.most_steps is not None:
            asked = batches_per_round(recipe.algorithm, num_examples)
            if asked is None:
                raise UserError(
                    f"policy.most_steps={self.most_steps}: {recipe.algorithm.name} does not say how many steps a "
                    f"round has, so this site does not take part"
                )
            if asked > self.most_steps:
                raise UserError(
                    f"policy.most_steps={self.most_steps}: this site allows no more steps in a round, and the run asks "
                    f"for {asked:,}"
                )

    def check_fetch(self, model: str) -> None:
        """Refuse a model that would be fetched, if models may not be. Raises UserError."""
        if not self.fetch_models:
            from fedferret.models import is_local

            if not is_local(model):
                raise UserError(
                    f'policy.fetch_models=false: the run asks for the model "{model}", which is not on this machine; '
                    f"this site allows only models that are"
                )


def batches_per_round(algorithm: Any, num_examples: int) -> int | None:
    """The most batches that a client trains on in a round; None where the method does not say."""
    stages = getattr(algorithm, "stages", None)
    parts = [stage.algorithm for stage in stages()] if stages else [algorithm]
    trainings = [getattr(part, "training", None) for part in parts if getattr(part, "trains_at_clients", True)]
    if any(training is None for training in trainings):
        return None
    return max((int(training.total_batches(num_examples)) for training in trainings if training), default=0)


def _check(key: str, asked: str, allowed: Sequence[str] | None) -> None:
    if allowed is not None and asked not in allowed:
        names = ", ".join(f'"{name}"' for name in allowed) or "nothing"
        raise UserError(f'policy.{key}: the run asks for "{asked}", and this site allows only {names}')
