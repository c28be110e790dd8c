"""Remove neurons and filters that are all zero from an image model, with the same logits.

    layer l       rows that are zero, weights and bias, give 0 for every image: they are removed
    layer l + 1   what they fed gets 0: the columns that read them are removed; behind a flattening, a block of columns

That needs a body of one layer after another, and between them only modules that make 0 of 0 (ReLU, pooling,
flattening). A layer of which every row is zero keeps one. Names stay, and the widths are those of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.models.classifiers import ImageClassifier

_KEEP_ZERO = (nn.ReLU, nn.Tanh, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten, nn.Identity, nn.Dropout)


@torch.no_grad()
def without_zero_rows(model: nn.Module) -> nn.Module:
    """A smaller model with the same logits, up to the order in which sums are taken.

    Args:
        model: a classifier of images without an adapter; not changed.

    Returns:
        A copy without the rows of its body that are zero, and without what reads them.

    Raises:
        UserError: layers do not follow one another, or something between them makes more than 0 of 0.
    """
    smaller = copy.deepcopy(model)
    body = getattr(smaller, "body", None)
    if not isinstance(smaller, ImageClassifier) or not isinstance(body, nn.Sequential):
        raise UserError(
            f"zero rows can be removed from image models in which layers follow one another (lenet5, conv4), and not "
            f"from a {type(model).__name__}: export it without --prune"
        )
    kept, count = torch.empty(0, dtype=torch.long), 0  # rows of the layer before that stay, and how many it had
    for name, module in [*body.named_children(), ("head", smaller.head)]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            if isinstance(module, nn.Conv2d) and module.groups != 1:
                raise UserError(f"zero rows cannot be removed from a model with grouped convolutions ({name})")
            if count:
                area = module.weight.shape[1] // count  # features of a channel, where the layers are flattened between
                columns = kept[:, None] * area + torch.arange(area, device=kept.device)
                _replace(module, module.weight[:, columns.flatten()], module.bias)
            kept, count = _nonzero_rows(module), len(module.weight)
            if module is not smaller.head:
                _replace(module, module.weight[kept], None if module.bias is None else module.bias[kept])
        elif not isinstance(module, _KEEP_ZERO):
            raise UserError(f"zero rows cannot be removed from this model: {name} does not make 0 of 0")
    return smaller


def sized_for(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a skeleton the widths of a smaller model's weights, so that it can load them.

    Args:
        model: on the meta device, such as ``classifier_skeleton`` gives; changed in place.
        weights: of a model that ``without_zero_rows`` made, by name.

    Returns:
        ``model``.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.weight" in weights:
            weight, bias = weights[f"{name}.weight"].to("meta"), weights.get(f"{name}.bias")
            _replace(module, weight, None if bias is None else bias.to("meta"))
    return model


def _nonzero_rows(module: nn.Linear | nn.Conv2d) -> Tensor:
    """Numbers of the rows that stay; one of them at least."""
    parts = [module.weight.flatten(1).abs().amax(dim=1)]
    if module.bias is not None:
        parts.append(module.bias.abs())
    kept = torch.nonzero(torch.stack(parts).amax(dim=0))[:, 0]
    return kept if len(kept) else kept.new_zeros(1)


def _replace(module: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    """Give a module another weight and bias, and the widths that these have."""
    module.weight = nn.Parameter(weight.contiguous(), module.weight.requires_grad)
    module.bias = None if bias is None else nn.Parameter(bias.contiguous(), module.weight.requires_grad)
    rows, columns = weight.shape[:2]
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = rows, columns
    else:
        module.out_channels, module.in_channels = rows, columns
