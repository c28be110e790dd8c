"""Run an experiment in a folder: events as they happen, a summary after every round, a report at the end.

A folder with an unfinished run of the same recipe is continued; with another recipe, it is refused. Ctrl-C ends the
run; what is safely on disk stays, and the same command goes on from there.
"""

from __future__ import annotations

import itertools
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedferret.begun import recipe_fingerprint
from fedferret.build import load_base, prepare
from fedferret.config import Recipe
from fedferret.core import tree
from fedferret.core.clients import ClientChanges
from fedferret.core.exchanges import ClientUpdate, Failure, Reply
from fedferret.core.files import check_place, write_atomically
from fedferret.core.mapped import MappedTree
from fedferret.core.norms import limits_off
from fedferret.core.rounds import Engine, RunState
from fedferret.core.signals import Stopped, code_of
from fedferret.core.stages import Staged
from fedferret.data.pinned import pins
from fedferret.data.summary import plot_partition, summarise
from fedferret.disk import log_room
from fedferret.engines.replay import Protection
from fedferret.engines.transport import Transport
from fedferret.evaluation.per_client import spread
from fedferret.experiment import Experiment
from fedferret.exportable import exportable
from fedferret.local.first_order import observing_steps
from fedferret.run_folder import alone, belongs, check_begun, finished_summary, lost_files_in_a_line
from fedferret.tracking import client_lists, events, folder, rewinding
from fedferret.tracking.console import plain_console
from fedferret.tracking.environment import write_environment
from fedferret.tracking.figures import headline
from fedferret.tracking.pins import Pinned, changed_files, check_data, check_files
from fedferret.tracking.progress import Progress
from fedferret.tracking.report import write_report
from fedferret.tracking.starts import discard, leaving_nothing, replaceable
from fedferret.tracking.summary import read_summary, write_summary


class Interrupted(Stopped):
    """Ctrl-C or another signal, after the run's folder was left resumable."""


def run(
    recipe: Recipe,
    out: Path,
    log: Callable[[str], None] = print,
    *,
    transport: Transport | None = None,
    protection: Protection | None = None,
    changes: Callable[[], ClientChanges] = ClientChanges,
    on_message: Callable[[Mapping[str, Any]], None] = lambda event: None,
    on_client: Callable[[str], None] = lambda client: None,
    accept_changed_data: bool = False,
) -> dict[str, Any]:
    """Run a recipe in a folder; an unfinished run of it is continued.

    Args:
        recipe: resolved.
        out: the run's folder.
        log: called with lines for the terminal.
        transport: reaches sites that hold the data, in place of the recipe's engine; it is closed at the end.
        protection: of messages to and from them.
        changes: returns the changes to the list of clients that are asked for; called as a round begins.
        on_message: called with every message to and from them.
        on_client: called with a client's name before its reply is read, and with "" after that.
        accept_changed_data: go on with other data than the run began with.

    Returns:
        The summary, as ``summary.json`` holds it.

    Raises:
        UserError: the recipe or the folder is wrong, before any work.
        RunError: the run cannot go on; what is finished stays.
        Interrupted: Ctrl-C.
    """
    check_place(out)
    resumes = belongs(recipe, out)
    if resumes:
        read_summary(out)  # damage is found now, before the model is loaded
        if (done := finished_summary(recipe, out, log)) is not None:
            return done
    pinned = pinned_files(recipe, accept_changed_data)
    if resumes and replaceable(out) and changed_files(out, pinned.files):
        resumes = False  # it is begun anew, with the files as they are
    with ExitStack() as stack:
        stack.enter_context(lost_files_in_a_line(out))
        if resumes:
            stack.enter_context(alone(out))  # before the model is loaded, which takes long
            check_begun(out)
            check_files(out, pinned)
        else:
            stack.enter_context(leaving_nothing(out))
            if replaced := replaceable(out):
                stack.enter_context(alone(out))
                log(f"{out} holds a start that came to nothing: it is replaced.")
                discard(out, locked=True)
        experiment = Experiment.load(recipe, out, log, transport, protection, changes)
        if not resumes:  # only now: a recipe that was refused claims no folder
            write_environment(out)
            folder.explain(out)
            write_atomically(out / "recipe.toml", recipe.to_toml())
            if not replaced:
                stack.enter_context(alone(out))
        log_room(experiment, out, log)
        return Run(experiment, out, log, on_message, on_client, pinned).finish()


def pinned_files(recipe: Recipe, accept: bool) -> Pinned:
    """The files that a run of a recipe reads.

    Args:
        recipe: resolved.
        accept: whether data may be other than the run began with.
    """
    near, adapter = map(Path, recipe.execution.places), getattr(recipe.algorithm, "adapter", None)
    return Pinned(pins(recipe.data, recipe.model.name, recipe.text.template, adapter, near), accept=accept)


class Run:
    """One process's part in a run: from where the folder stands to its end, or to Ctrl-C."""

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        log: Callable[[str], None],
        on_message: Callable[[Mapping[str, Any]], None] = lambda event: None,
        on_client: Callable[[str], None] = lambda client: None,
        pinned: Pinned | None = None,
    ) -> None:
        self.pinned = pinned or Pinned({})
        self.experiment, self.out, self.log, self.on_message = experiment, out, log, on_message
        self.on_client = on_client
        self.recipe = experiment.recipe
        self.events = events.EventLog(out)
        self.tensorboard: Any = None
        self.index = 0  # of the client at work, within its round
        self.loss = math.nan  # of the last client with an update
        self.clients: Sequence[str] = ()  # who may be sampled, as the event log has it

    def finish(self) -> dict[str, Any]:
        """Run what is left, and leave a summary and a report whatever happens."""
        experiment, recipe = self.experiment, self.recipe
        state = experiment.initial_state()
        check_data(self.out, self.pinned, experiment.data.fingerprint, state.round)
        rewinding.log_rewind(self.out)
        self._announce(state)
        known = events.read(self.out)
        self.clients = client_lists.clients_at(known.lists, state.round, experiment.data.clients)
        for number, evaluation in sorted(known.evaluations.items()):  # what clients were sent to score
            state.held |= dict.fromkeys(evaluation.moved, number)
        state.rewinds = [(each.round, each.epoch) for each in known.rewinds]
        sent = known.ledger()
        if recipe.execution.tensorboard:
            from fedferret.tracking.tensorboard import TensorBoard  # torch's writer takes a second to import

            self.tensorboard = TensorBoard(self.out, state.round, (sent.up, sent.down))
        with Progress(recipe.rounds, state.round) as progress, self._reporting(state), ExitStack() as stack:
            on_client_start = partial(self._client, progress)
            engine = stack.enter_context(
                closing(
                    experiment.engine(
                        state, on_client_start, progress.message, self._message, known.start.get("run", "")
                    )
                )
            )
            if self._due(state.round) and state.round not in known.evaluations:
                self._evaluate(state, engine, progress)
            moved = sent.up + sent.down
            records = experiment.run_rounds(
                state,
                engine,
                self._outcome,
                lambda record: self._log_event("round", **events.round_fields(record)),
                partial(self._sampled, progress),
            )
            progress.round(state.round + 1, recipe.clients.per_round)
            note = recipe.algorithm.note(state.public)
            with observing_steps(lambda step, total: progress.step(step, total, self.loss)):
                for record in records:
                    self._log_event("saved", flushed=False, round=record.round, seconds=record.seconds_saving)
                    moved += sum(record.bytes_up.values()) + sum(record.bytes_down.values())
                    progress.finished_round(record, moved)
                    before, note = note, recipe.algorithm.note(state.public)
                    if note and note != before:
                        progress.message(note)
                        self._log_event("notice", round=record.round, client="server", note=note)
                    if self._due(record.round):
                        self._evaluate(state, engine, progress)
                    write_summary(self.out)
                    self.index = 0
                    if record.round < recipe.rounds:
                        progress.round(record.round + 1, recipe.clients.per_round)
            if self._has_baseline() and "local-only" not in known.baselines:
                self._run_baseline(progress)
            self._log_event("end", rounds=state.round)
        return write_summary(self.out)

    @contextmanager
    def _reporting(self, state: RunState) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt as error:
            self._log_event("interrupted", round=state.round)
            said = f"stopped after round {state.round}; the same command goes on from there"
            raise Interrupted(said, code_of(error)) from None
        finally:
            write_summary(self.out)
            write_report(self.out)
            if self.tensorboard:
                self.tensorboard.close()

    def _announce(self, state: RunState) -> None:
        experiment, recipe = self.experiment, self.recipe
        read: dict[str, Any] = {"files": self.pinned.files, "data_fingerprint": experiment.data.fingerprint}
        unlimited = limits_off(state.node, recipe.pool)
        if unlimited:
            self.log(f"The norms of clients' updates are not limited: {unlimited}.")
        if state.round or (self.out / events.FILE).exists():
            self.log(f"Resuming after round {state.round} of {recipe.rounds}.")
            self._log_event("resume", round=state.round, **(read if self.pinned.changed else {}))
            if self.pinned.changed:
                self.log("The data is not what the run began with: losses before and after are of different data.")
            return
        possible = exportable(recipe)
        self._log_event(
            "start",
            method=recipe.algorithm.name,
            model=recipe.model_name,
            data=experiment.data.source,
            **read,
            rounds=recipe.rounds,
            clients=len(experiment.data.clients),
            held_out=sum(map(len, experiment.data.held_out.values())),
            parameters=experiment.base_size,
            global_model=possible.global_model,
            no_folder=possible.no_folder,
            tuned=tree.size(tree.parameters(experiment.model)),
            seed=recipe.seed,
            notes=list(experiment.notes),
            base=experiment.base_fingerprint,
            recipe=recipe_fingerprint(self.out),
            run="" if experiment.trains_here else secrets.token_hex(8),  # sites keep runs of one recipe apart
        )
        if any(experiment.data.clients.values()):  # sites keep their examples
            plot_partition(experiment.data, self.out / "plots" / "data.svg")
        plain_console().print(summarise(experiment.data))

    def _due(self, round: int) -> bool:
        return round % self.recipe.evaluation.every == 0 or round == self.recipe.rounds

    def _extra_due(self, round: int) -> bool:
        """Whether metrics beside the loss are due, in a round that is evaluated."""
        every = self.recipe.evaluation.metrics_every or self.recipe.rounds
        return round % every == 0 or round == self.recipe.rounds

    def _client(self, progress: Progress, client: str) -> None:
        self.on_client(client)
        progress.client(client, self.index)
        self.index += 1

    def _message(self, event: Mapping[str, Any]) -> None:
        self.on_message(event)
        if event["what"] == "notice":
            self._log_event("notice", **{name: event[name] for name in ("round", "client", "note")})

    def _sampled(self, progress: Progress, round: int, clients: Sequence[str]) -> None:
        """Write down from which round on another list of clients holds."""
        fields = client_lists.list_fields(round, clients, self.clients)
        self.clients = clients
        for names, became in ((fields["added"], "came"), (fields["retired"], "retired")):
            if names:
                progress.message(f"From round {round} on, {became}: {', '.join(names)}.")
        if fields["added"] or fields["retired"]:
            self._log_event("clients", **fields)

    def _outcome(self, outcome: Reply | Failure) -> None:
        self.on_client("")
        if isinstance(outcome, Reply) and isinstance(outcome.body, ClientUpdate):
            self.loss = outcome.body.metrics.get("loss", math.nan)

    def _evaluate(self, state: RunState, engine: Engine, progress: Progress) -> None:
        if not self.experiment.data.held_out and not self.recipe.scores_clients:
            return
        started = time.perf_counter()
        extra = self._extra_due(state.round)
        with self._aside(progress, "evaluation", self.experiment.evaluator.num_progress_calls(extra)) as on_progress:
            scores = self.experiment.score(state, engine, on_progress, extra)
        self.on_client("")
        if scores.failures:
            client, reason = next(iter(scores.failures.items()))
            progress.message(f"{len(scores.failures)} clients sent no scores, such as {client}: {reason}")
        if not scores.results:
            return
        primary = self.experiment.objective.primary
        self._log_event(
            "evaluation",
            round=state.round,
            results=scores.results,
            per_client={client: each[primary] for client, each in scores.per_client.items()},
            primary=primary,
            clients=scores.per_client,
            bytes=dict(scores.moved),
            unscored=dict(scores.failures),
            seconds=time.perf_counter() - started,
            who="global",
        )
        main = next(iter(scores.results.values()))
        progress.evaluated(state.round, main["loss"], headline(main))

    @contextmanager
    def _aside(self, progress: Progress, label: str, total: int) -> Iterator[Callable[[], None]]:
        """Show work beside the clients'; yields a function to call after each of ``total`` steps."""
        done = itertools.count(1)
        progress.aside(label, 0, total)
        yield lambda: progress.aside(label, next(done), total)
        progress.end_aside()

    def _has_baseline(self) -> bool:
        """Whether clients can train alone here, and be scored."""
        experiment = self.experiment
        here = experiment.trains_here and bool(experiment.data.held_out)
        return here and self.recipe.evaluation.local_only_clients > 0

    def _run_baseline(self, progress: Progress) -> None:
        recipe, count = self.recipe, self.recipe.evaluation.local_only_clients
        who = "one client trains" if count == 1 else f"up to {count} clients train"
        progress.message(f"Local-only baseline: {who} alone, for comparison.")
        # in a file: this third copy of the weights would be the run's peak of memory
        untuned = prepare(
            self.recipe.algorithm,
            load_base(self.experiment.objective, recipe.model)[0].model,
            self.recipe.seed,
        )
        base = MappedTree(self.out / "state", tree.parameters(untuned))
        # a run of several stages ends in a model with the last stage's adapter, and clients train as the first begins;
        # a run with bodies of several architectures ends in one of them
        changed = tree.shapes(base) != tree.shapes(tree.parameters(self.experiment.model))
        staged = isinstance(recipe.algorithm, Staged)
        model = untuned.to(self.experiment.task.device) if staged or changed else None
        total = min(count, len(self.experiment.data.clients)) * self.recipe.rounds
        with self._aside(progress, "local-only training, in rounds", total) as on_progress:
            losses, own = self.experiment.local_only(base, on_progress, model)
        if losses:
            mean, objective = sum(losses.values()) / len(losses), self.experiment.objective
            primary = {client: each[objective.primary] for client, each in own.items()}
            own_spread = spread(primary, objective.higher_is_better)
            self._log_event("baseline", name="local-only", loss=mean, per_client=losses, own=own, spread=own_spread)
            said = f", {objective.primary} {own_spread['client-mean']:.4f} at its clients" if own_spread else ""
            progress.message(f"Local-only training ends at loss {mean:.4f}{said}.")

    def _log_event(self, kind: str, /, *, flushed: bool = True, **fields: Any) -> None:
        self.events.write(kind, flushed=flushed, **fields)
        if self.tensorboard:
            self.tensorboard.write(kind, **fields)
