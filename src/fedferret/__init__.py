"""fedferret: federated tuning of all the weights of a language model, with kilobytes on the wire.

>>> from fedferret import load_recipe, run                       # doctest: +SKIP
>>> summary = run(load_recipe("recipes/demo.toml"), out="runs/demo")  # doctest: +SKIP
>>> summary["eval_loss"][0] > summary["eval_loss"][-1]           # doctest: +SKIP
True

Importing the package is cheap: torch and transformers are imported when a run is set up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedferret.api import load_recipe, recipe, run
    from fedferret.core.errors import RunError, UserError
    from fedferret.experiment import Experiment

__version__ = "0.2.0"
__all__ = ["Experiment", "RunError", "UserError", "__version__", "load_recipe", "recipe", "run"]

_HOMES = {
    "Experiment": "fedferret.experiment",
    "RunError": "fedferret.core.errors",
    "UserError": "fedferret.core.errors",
    "load_recipe": "fedferret.api",
    "recipe": "fedferret.api",
    "run": "fedferret.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
