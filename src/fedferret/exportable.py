"""What a finished run can be told to export, found on the meta device, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedferret.build import tuned_skeleton
from fedferret.config import Recipe
from fedferret.core.errors import UserError
from fedferret.disk import wire_costs
from fedferret.models.adapters import adapter_of


@dataclass(frozen=True)
class Exportable:
    """What `fedferret export` can write of a recipe's run.

    Attributes:
        global_model: whether there is one for all; without it every client keeps its own.
        no_folder: why no folder of a plain architecture can hold the tuned model, one line; "": one can.
    """

    global_model: bool
    no_folder: str

    def lines(self, folder: Path) -> str:
        """Where a finished run's files are, and how to export its model.

        Args:
            folder: of the run.

        Returns:
            Two to four lines.
        """
        files = f"Report:       {folder / 'report.html'}\nFigures:      {folder / 'summary.json'}\n"
        if self.no_folder:
            return f"{files}No folder can hold what was tuned: {self.no_folder}."
        if not self.global_model:
            return (
                f"{files}Tuned models: each client keeps its own: fedferret export {folder} --client NAME --to FOLDER"
            )
        return (
            f"{files}"
            f"Tuned model:  fedferret export {folder} --to FOLDER   (the whole model)\n"
            f"              fedferret export {folder} --delta FILE  (what was learned, to be applied to the base)"
        )


def exportable(recipe: Recipe) -> Exportable:
    """Find what can be exported.

    Args:
        recipe: resolved.

    Returns:
        What there is, and what stands against a folder of it.
    """
    algorithm, why = recipe.algorithm, ""
    # where nothing stays at the clients, such as under a frozen body, all of them have one model
    of_all = algorithm.has_global_model or not wire_costs(recipe)(recipe.rounds).client_state_bytes
    model = tuned_skeleton(recipe)
    adapter = adapter_of(model)
    if adapter is None or adapter.merges:  # an adapter that stays apart is a folder by itself
        try:
            algorithm.release(model)
        except UserError as error:
            why = str(error)
    return Exportable(of_all, why)
