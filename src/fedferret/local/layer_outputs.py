"""What the layers of a model compute, seen while the model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def observing_outputs(layers: Sequence[nn.Module], observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Observe what layers compute.

    Args:
        layers: modules that return hidden states, alone or as the first of several results.
        observe: called with a layer's place in ``layers`` and its hidden states, whenever the layer has computed.

    Returns:
        A context in which ``observe`` is called.
    """

    def hook(place: int) -> Callable[..., None]:
        return lambda module, given, output: observe(place, output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook(place)) for place, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
