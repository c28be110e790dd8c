"""Let threads that wait for one another go to sleep soon, so that a busy machine costs a run its share and no more.

A step is hundreds of short parallel regions. At the end of each, GNU OpenMP's threads wait in a loop for some
milliseconds before they sleep. Beside another busy process the loop takes the processor from the thread that it waits
for: a step took 6 to 25 times as long as with 3,000 turns of the loop. On an idle machine those cost 6%
(``python -m benchmarks.busy_machine``). Results do not depend on it.
"""

from __future__ import annotations

from collections.abc import MutableMapping

_TURNS = "3000"
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # either of them is the user's own decision


def sleep_soon(environment: MutableMapping[str, str]) -> None:
    """Say so to OpenMP, which reads it once, when torch is imported; processes that are started from here inherit it.

    Args:
        environment: of the process, changed in place where the user has not decided.
    """
    if not any(name in environment for name in _CHOICES):
        environment["GOMP_SPINCOUNT"] = _TURNS
