"""One method's payload under attack: mutated, sent, taken in beside an honest one, and committed to a copy.

Attacked("ferret").example(choose)     raises AssertionError where a round would be lost
"""

from __future__ import annotations

from typing import Any

from contract.methods import METHODS, reference
from contract.unlike_methods import UNLIKE
from fedferret.core.exchanges import ClientUpdate, Failure, Reply
from fedferret.core.intake import Intake
from fedferret.core.keys import Key
from fedferret.core.pooling import nonfinite, tensors
from fedferret.core.rounds import Plan, longest_update
from fedferret.core.weighting import Bounds
from fedferret.wire import codec
from fuzz.mutations import Choose, mutated

# rows with payloads of another form than the method's first row
FORMS = (
    "ferret-32-bits", "ferret-16-bits", "ferret-1-bit", "ferret-half-a-bit", "ferret-per-client", "ferret-columns",
    "fedavg-2-bits", "fedavg-top-k-forgetful", "fedavg-top-k-signs", "fedkseed-many-directions", "fetch-sgd-plain",
    "two-stages",
)  # fmt: skip


def rows() -> list[str]:
    """The first row of every method, and those with payloads of another form."""
    unlike = {method.name for method in UNLIKE}
    first = {algorithm.name: name for name, algorithm in reversed(METHODS.items())}
    return [name for name in METHODS if (name in first.values() or name in FORMS) and name not in unlike]


class Attacked:
    """A run after its last round, with one honest client and one that sends something else than it meant."""

    def __init__(self, name: str) -> None:
        self.run = reference(name)
        self.honest, self.wrong = self._update_of("a"), self._update_of("b")
        self.most = longest_update(self.run.state.node, 3, self.run.state.round)
        self.size = sum(float(each.double().square().sum()) for _, each in tensors(self.run.state.public)) ** 0.5

    def example(self, choose: Choose) -> Reply | Failure:
        """What becomes of one mutated update."""
        update: Any = self.wrong
        for _ in range(1 + choose(2)):
            if isinstance(update, ClientUpdate) and choose(8):
                update = ClientUpdate(mutated(update.payload, choose), update.num_examples, update.metrics)
            else:
                update = mutated(update, choose)
        intake = Intake(self.run.state.node, Plan(3, 9, 3, bounds=Bounds() if choose(2) else None), self.most)
        assert isinstance(intake.take(Reply("a", self.honest, 100)), Reply)
        outcome = intake.take(self._received(update))
        if isinstance(outcome, Failure):
            assert intake.clients == ["a"] and [each.client for each in intake.failures] == ["b"]
            assert outcome.reason.isprintable() and 0 < len(outcome.reason) <= 300
            return outcome
        assert outcome.bytes_up <= self.most
        run = self.run
        norm = run.algorithm.update_norm(run.task, run.state.public, outcome.body.payload)
        # far above the norm of all weights, a finite update may leave the range of fp32; the norm tells
        assert nonfinite(self._committed(intake)) is None or (norm is not None and not norm <= 1 + self.size)
        return outcome

    def _update_of(self, client: str) -> ClientUpdate:
        """What a client would send in the next round; the run stays as it is."""
        run, private = self.run, self.run.store.get(client)
        reply = run.algorithm.client_update(run.task, run.state.public, private, run.data[client], Key.of(1, client))
        return ClientUpdate(reply.payload, len(run.data[client]), dict(reply.metrics))

    def _received(self, update: Any) -> Reply | Failure:
        try:
            encoded = codec.encode(update)
            return Reply("b", codec.decode(encoded), len(encoded))
        except ValueError as error:  # an integer of no message, or refused when it is decoded
            return Failure("b", "wire", str(error))

    def _committed(self, intake: Intake) -> Any:
        """The public state after the round, on a copy."""
        run, public, server = self.run, codec.decode(self.run.public), codec.encode(self.run.state.server)
        pooled, key = intake.result(), Key.of(1, "update")
        _, entry = run.algorithm.server_update(run.task, public, codec.decode(server), pooled, key)
        run.algorithm.apply(run.task, public, codec.decode(codec.encode(entry)))
        return public
