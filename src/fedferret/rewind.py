"""Rewind a run: its folder goes back to an earlier round, and a site may be retired from the next one on.

The folder must be nobody else's. Nothing is asked. Weights are not read, so this takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from fedferret.begun import begun_recipe, check_events
from fedferret.build import load_data
from fedferret.config import Recipe
from fedferret.core.errors import UserError
from fedferret.disk import kept_rounds
from fedferret.engines.client_store import FolderClientStore, held
from fedferret.run_folder import alone, check_begun, lost_files_in_a_line
from fedferret.sites.members import Members, check_left
from fedferret.sites.supervisor import alone_in
from fedferret.tracking import checkpoint, events, rewinding
from fedferret.tracking.report import write_report
from fedferret.tracking.starts import SERVED
from fedferret.tracking.summary import read_summary, write_summary
from fedferret.tracking.units import as_bytes
from fedferret.wire import codec


def rewind(out: Path, to: int, without: str | None = None, log: Callable[[str], None] = print) -> events.Rewind:
    """Take a run back to an earlier round.

    Args:
        out: the run's folder; no process may use it.
        to: the round; those after it are discarded, and run again by the run's command. The present round discards
            nothing: with the folder of an earlier day, which sites refuse, the run goes on from there.
        without: a client that is not sampled from the next round on.
        log: called with lines for the terminal.

    Returns:
        What was discarded, as the event log has it.

    Raises:
        UserError: the folder, the round or the client is wrong; nothing is changed.
        RunError: a file of that round is damaged; nothing is changed.
    """
    recipe = begun_recipe(out)
    with ExitStack() as stack:
        stack.enter_context(lost_files_in_a_line(out))
        if (out / SERVED).is_dir():
            stack.enter_context(alone_in(out / SERVED, "a server"))
        stack.enter_context(alone(out))
        now = checkpoint.progress(out)
        if now is None:
            raise UserError(f"{out}: no round is finished yet, so there is nothing to rewind")
        check_begun(out)
        check_events(out, events.read(out), now.round)  # damage is found now, while nothing is changed
        read_summary(out)
        rewinding.log_rewind(out)  # an earlier command may have been killed in the middle
        then = rewinding.past_progress(out, now, to, recipe.execution.history)
        if without is not None:
            _check_left(out, recipe, without, now)
            then.retired = (*now.retired, without)
        states = out / "state" / "clients"
        kept = kept_rounds(recipe, then.versions if any(states.glob("*.state")) else {})  # sites keep their own
        anew = tuple(sorted(client for client, number in kept.items() if not held(states, client, number)))
        versions = {client: version for client, version in then.versions.items() if client not in anew}
        rewinding.rewind(out, replace(then, versions=versions, begun_anew=anew))
        FolderClientStore(states, codec, {name: kept[name] for name in kept if name not in anew})  # drops all others
        found = rewinding.log_rewind(out)
        assert found is not None  # the epoch is new
        write_summary(out)
        write_report(out)
    log(described(out, found))
    return found


def _check_left(out: Path, recipe: Recipe, without: str, now: checkpoint.Progress) -> None:
    """Refuse to retire a client that is none of the run's, or that the run cannot do without. Raises UserError."""
    if recipe.data_source == "sites":
        members = Members(out, recipe)
        left, retired = members.names(), members.retired()
    else:
        left, retired = now.changes.applied(load_data(recipe).clients), list(now.retired)
    check_left(recipe, left, retired, without, f"--without {without}")


def described(out: Path, found: events.Rewind) -> str:
    """What was discarded, in lines."""
    rounds = found.discarded
    gone = f"rounds {rounds[0]} to {rounds[-1]} ({as_bytes(found.bytes)} were sent)" if rounds else "no round"
    lines = [f"{out} is at round {found.round}, epoch {found.epoch}. Discarded: {gone}."]
    lines += [f"{name} is retired: no round from {found.round + 1} on samples it." for name in found.retired]
    if found.begun_anew:
        lines.append(f"Begins anew, as its private state is no longer held: {', '.join(found.begun_anew)}.")
    return "\n".join([*lines, "The command that ran it (`fedferret run` or `serve`) goes on from there."])
