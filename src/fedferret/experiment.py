"""A recipe's parts and the engine that its clients run in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedferret.begun import check_start
from fedferret.build import Parts, check, load_data
from fedferret.config import Recipe
from fedferret.core import rounds, tree
from fedferret.core.clients import ClientChanges
from fedferret.core.errors import RunError
from fedferret.core.exchanges import Failure, Reply
from fedferret.core.keys import Key
from fedferret.core.log import Log
from fedferret.core.rounds import Engine, RoundRecord, RunState
from fedferret.core.task import Replica, added_scores
from fedferret.core.weighting import weights_of
from fedferret.disk import kept_rounds
from fedferret.engines.client_store import ClientStore, FolderClientStore
from fedferret.engines.debug import Debug
from fedferret.engines.in_process import InProcess
from fedferret.engines.remote import Remote
from fedferret.engines.replay import Protection
from fedferret.engines.transport import Transport
from fedferret.evaluation.evaluator import Results, Scores
from fedferret.evaluation.per_client import spread
from fedferret.resident.simulation import simulation
from fedferret.tracking import checkpoint, events
from fedferret.wire import codec

HELD_OUT_BY_CLIENTS = "clients"  # the main set's name where no figure is of examples that are held out elsewhere
ENGINES = {"in-process": InProcess, "debug": Debug}


@dataclass
class Experiment(Parts):
    """A recipe's parts, and where its clients run.

    Attributes:
        transport: to sites that hold the data; None: clients run on this machine or cluster.
        protection: of the messages to sites.
        changes: returns the changes to the list of clients that are asked for; called as a round begins.
    """

    transport: Transport | None = None
    protection: Protection | None = None
    changes: Callable[[], ClientChanges] = ClientChanges

    def __post_init__(self) -> None:
        self.trains_here = self.transport is None
        super().__post_init__()

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        folder: Path | None = None,
        log: Callable[[str], None] = print,
        transport: Transport | None = None,
        protection: Protection | None = None,
        changes: Callable[[], ClientChanges] = ClientChanges,
    ) -> Experiment:
        """Check, then load data and model.

        Args:
            recipe: resolved.
            folder: of the run; None keeps nothing on disk.
            log: called with lines on slow steps.
            transport: to sites that hold the data; None: clients run on this machine or cluster.
            protection: of the messages to sites; None: no seal.
            changes: returns the changes to the list of clients that are asked for; called as a round begins.

        Returns:
            The experiment; no round has been run.

        Raises:
            UserError: whatever the recipe gets wrong.
        """
        check(recipe)
        data = load_data(recipe, transport is not None, log)
        options = {"transport": transport, "protection": protection, "changes": changes}
        return cls.over(recipe, data, folder, log, **options)

    def initial_state(self) -> RunState:
        """Start the run, or resume the run in ``folder``.

        Returns:
            The state before round 1, or after the last finished round of the run in ``folder``.

        Raises:
            RunError: the run began from another base, or this machine rebuilds other weights.
        """
        if self.folder and (saved := checkpoint.saved_round(self.folder)) is not None:
            if (self.folder / events.FILE).exists():  # `fedferret run` writes one; a caller of this class need not
                check_start(self.folder, self.base_fingerprint, saved)
            node, server = self.start_node()
            return checkpoint.resume(self.folder, node, server, self.recipe.execution.history)
        node, server = self.start_node()
        log = Log(self.folder / "log", self.recipe.execution.history) if self.folder else Log()
        return RunState(node, server, log)

    def engine(
        self,
        state: RunState,
        on_client_start: Callable[[str], None] = lambda client: None,
        log: Callable[[str], None] = lambda line: None,
        on_message: Callable[[Mapping[str, Any]], None] = lambda event: None,
        run: str = "",
    ) -> Engine:
        """Make the engine of the recipe. The caller closes the engine.

        Args:
            state: of the run.
            on_client_start: called with a client's name before its work.
            log: called with lines that an operator should read.
            on_message: called with every message, where there are messages.
            run: a name that no other run has, also not one of the same recipe; "": sites tell runs by recipe alone.

        Returns:
            The recipe's engine, or ``Remote`` over ``transport``. Simulated clients go on from their private states
            after ``state.round``.
        """
        folder = self.folder and self.folder / "state" / "clients"
        execution = self.recipe.execution
        kept = kept_rounds(self.recipe, state.versions) if self.trains_here else {}
        store = FolderClientStore(folder, codec, kept, execution.history) if folder else ClientStore()
        if self.transport is None and execution.engine in ENGINES:
            held_out = self.examples.held_out_by_client
            return ENGINES[execution.engine](self.examples, codec, store, on_client_start, held_out)
        workers = None if self.transport else simulation(execution, self.folder)
        return Remote(
            self.transport or workers,  # type: ignore[arg-type]  # one of them is there
            codec,
            recipe=(f"# run {run}\n" if run else "") + self.recipe.identity_toml(),
            base=self.base_fingerprint,
            deadline=execution.deadline,
            workers=workers.workers if workers else (),
            store=store,
            protection=self.protection,
            on_client_start=on_client_start,
            log=log,
            on_message=on_message,
        )

    def run_rounds(
        self,
        state: RunState,
        engine: Engine,
        on_outcome: Callable[[Reply | Failure], None] = lambda outcome: None,
        on_round: Callable[[RoundRecord], None] = lambda record: None,
        on_clients: Callable[[int, Sequence[str]], None] = lambda round, clients: None,
    ) -> Iterator[RoundRecord]:
        """Run the rounds after ``state.round``.

        Args:
            state: changed in place.
            engine: of this experiment.
            on_outcome: called with every client's reply or failure, in every exchange of a round.
            on_round: called with a round's record just before the checkpoint: a round that a crash undoes is run again,
                and the call repeated.
            on_clients: called as a round begins, with its number and all who may be sampled.

        Returns:
            A record per round, in order; each round is committed before its record is yielded.
        """

        def save(record: RoundRecord) -> None:
            on_round(record)
            if self.folder:
                checkpoint.save(self.folder, state)

        def clients(number: int) -> list[str]:
            state.changes |= self.changes()
            names = state.changes.applied(self.data.clients)
            on_clients(number, names)
            return names

        return rounds.run(engine, clients, state, self.plan(), on_outcome, save)

    def score(
        self,
        state: RunState,
        engine: Engine,
        on_progress: Callable[[], None] = lambda: None,
        extra: bool = False,
    ) -> Scores:
        """What ``[evaluation]`` asks for, in fp32.

        The global model is scored on every held-out set. Clients score the model that they would use, global or
        personal, on what they hold out: simulated ones before round 1, all at the end, in between the last round's
        cohort. Where the method has no global model, the sums of the clients stand for the main set, as "clients" where
        what they hold out is no part of it.

        Args:
            state: after the round to score.
            engine: reaches the clients.
            on_progress: called after every batch that is scored here.
            extra: whether metrics beside the objective's figures are due.

        Returns:
            The figures by held-out set and by client, and the bytes that moved; empty where nothing is scored.

        Raises:
            RunError: a simulated client could not score.
        """
        results: Results = {}
        with self.recipe.algorithm.model(self.task, state.public) as model:
            is_global = model is not None
            if model is not None and self.data.held_out:
                results = self.evaluator.score(model, extra, on_progress)
        if (is_global and not self.recipe.scores_clients) or state.node.guards:  # what guards hide, scores would tell
            return Scores(results)
        asked = self._scoring_clients(state)
        if not asked:
            return Scores(results)
        sums, failures, moved = rounds.score(
            engine, asked, state, self.recipe.evaluation.batch_size, trusted=self.trains_here
        )
        if failures and self.trains_here:
            raise RunError(f"clients could not be scored ({rounds.reasons(failures)})")
        unscored = {failure.client: failure.reason for failure in failures}
        if not sums:
            return Scores(results, failures=unscored)
        figures = self.objective.figures
        per_client = {client: figures(each) for client, each in sums.items()}
        primary = {client: each[self.objective.primary] for client, each in per_client.items()}
        main = next(iter(self.data.held_out), HELD_OUT_BY_CLIENTS)
        if not is_global and (self.recipe.held_out_share or not self.trains_here):
            main = HELD_OUT_BY_CLIENTS  # what clients hold out is no part of the main set
        if main not in results:
            results[main] = figures(self._added(sums))
        results[main] |= spread(primary, self.objective.higher_is_better)
        return Scores(results, per_client, moved, unscored)

    def _added(self, sums: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """All clients' sums together; where claims are bounded, a client weighs what its claim of targets gives."""
        counts = [int(each["count"]) for each in sums.values()]
        weights = weights_of(counts, "examples", self.recipe.clients.bounds())
        scale = sum(map(min, counts, weights)) / sum(weights) if self.recipe.clients.bounds() else 1.0
        shares = [scale * weight / count for weight, count in zip(weights, counts, strict=True)]
        names = next(iter(sums.values()))
        return {
            name: math.fsum(share * each[name] for share, each in zip(shares, sums.values(), strict=True))
            for name in names
        }

    def _scoring_clients(self, state: RunState) -> list[str]:
        """Who is asked to score after the last round: all at either end, in between the cohort.

        Sites are not asked before round 1, when few of them have called yet.
        """
        clients = state.changes.applied(self.data.clients)
        if self.trains_here:
            clients = [client for client in clients if client in self.examples.held_out_by_client]
        elif not state.round:
            return []
        if 0 < state.round < self.recipe.rounds:
            clients = [client for client in clients if state.versions.get(client) == state.round - 1]
        return sorted(clients)

    def local_only(
        self, base: Mapping[str, Tensor], on_progress: Callable[[], None] = lambda: None, model: nn.Module | None = None
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """The local-only baseline: some clients train alone from the base for as many rounds as the federation.

        Args:
            base: the weights before tuning.
            on_progress: called after each client's round.
            model: to train, with the weights of ``base``; None: the run's own.

        Returns:
            By client, its loss on the main held-out set, and its figures on what it holds out itself.
        """
        recipe, model = self.recipe, model or self.model
        training = getattr(recipe.algorithm, "training", None)
        count = min(recipe.evaluation.local_only_clients, len(self.data.clients)) if training else 0
        if not self.trains_here or not self.data.held_out:
            return {}, {}
        main = next(iter(self.data.held_out))
        losses: dict[str, float] = {}
        own: dict[str, dict[str, float]] = {}
        for client in Key.of(recipe.seed, "local-only").sample(sorted(self.data.clients), count):
            tree.copy_(tree.parameters(model), base)
            for number in range(1, recipe.rounds + 1):
                assert training is not None
                task = replace(self.task, replica=Replica(model), round=number)
                key = Key.of(recipe.seed, "local-only", number, client)
                training.train(task, self.examples[client], key)
                on_progress()
            losses[client] = self.evaluator.figures(model, main)["loss"]
            if recipe.scores_clients and client in self.examples.held_out_by_client:
                rows, size = self.examples.held_out_by_client[client], recipe.evaluation.batch_size
                own[client] = self.objective.figures(added_scores(self.objective, model, rows, size))
        tree.copy_(tree.parameters(model), base)
        return losses, own
