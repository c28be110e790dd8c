"""Whether labelled data fit the classes of a recipe; each fault is one line, before work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from fedferret.core.errors import UserError
from fedferret.core.text import printable
from fedferret.data.examples import Example, listed
from fedferret.data.labelled_batches import labels_of


def check_labels(
    clients: Mapping[str, Sequence[Example]],
    held_out: Mapping[str, Sequence[Example]],
    classes: Sequence[str],
    *,
    images: bool,
    complete: bool = True,
) -> None:
    """Refuse labelled data that cannot be learned or scored.

    Args:
        clients: training examples by client.
        held_out: examples to score by held-out set.
        classes: names of the classes, in the order of their indices.
        images: whether the model reads images; else it reads texts.
        complete: whether these are all clients; a site sees itself alone, and may have few of the classes.

    Raises:
        UserError: fewer than two classes; an image where text is expected or the reverse; an empty text; labels that
            differ in case or spaces only; a label that is no class; a class that no client has.
    """
    _check_classes(classes)
    parts = {f"client {listed([name])}": examples for name, examples in clients.items()}
    parts |= {f"held-out set {listed([name])}": examples for name, examples in held_out.items()}
    _check_spelling(parts, classes)
    training = list(chain.from_iterable(clients.values()))
    labels_of(training, classes, images=images)
    for examples in held_out.values():
        labels_of(examples, classes, images=images)
    present = {example.response for example in training}
    if complete and len(present) == 1:
        raise UserError(f"all training examples are of class {listed([*present])}: give data of at least two classes")
    missing = [name for name in classes if name not in present]
    if complete and missing:
        raise UserError(
            f"no client has a training example of class {listed(missing)}: "
            "take it out of objective.classes, or change the seed or data.partition"
        )


def _check_classes(classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise UserError(f"objective.classes names {len(classes)} of at least two classes")
    twice = [name for number, name in enumerate(classes) if name in classes[:number]]
    if twice:
        raise UserError(f"objective.classes names {listed(twice)} twice: name each class once")


def _check_spelling(parts: Mapping[str, Sequence[Example]], classes: Sequence[str]) -> None:
    """Refuse labels that differ in case or spaces only, unless both are classes."""
    first: dict[str, str] = {}  # where each label occurs first
    for place, examples in parts.items():
        for example in examples:
            first.setdefault(example.response, place)
    spelled: dict[str, str] = {}
    for label in sorted(first, key=lambda label: label not in classes):  # the classes come first
        other = spelled.setdefault(" ".join(label.split()).casefold(), label)
        if other != label and label not in classes:
            one, two = (f'"{printable(name, 60)}" ({first[name]})' for name in (other, label))
            raise UserError(f"labels {one} and {two} differ in case or spaces only: write one of them everywhere")
