"""Labelled data that do not fit the recipe: each fault is one line that names it."""

from __future__ import annotations

from typing import Any

import pytest

from fedferret.core.errors import UserError
from fedferret.data.examples import Example
from fedferret.data.label_checks import check_labels
from fedferret.data.labelled import labelled_image, labelled_text

CLASSES = ("sport", "weather")


def texts(*labels: str) -> tuple[Example, ...]:
    return tuple(labelled_text(f"text {number}", label) for number, label in enumerate(labels))


def data(held_out: tuple[Example, ...] = (), **clients: tuple[Example, ...]) -> Any:
    return clients, {"test": held_out}


GOOD = texts("sport", "weather")
PICTURE = labelled_image(bytes(4), (1, 2, 2), "sport")
FAULTS = {
    'labels "sport" (client "a") and "Sport " (client "b") differ in case': (data(a=GOOD, b=texts("Sport ")), CLASSES),
    'labels "rain" (client "a") and "Rain" (held-out set "test") differ': (
        data(texts("Rain"), a=texts("rain")),
        CLASSES,
    ),
    'label "sports" (2 rows) is no class: did you mean "sport"': (data(a=GOOD, b=texts("sports", "sports")), CLASSES),
    'label "rain" (1 row) is no class: allowed: sport, weather': (data(texts("rain"), a=GOOD), CLASSES),
    'no client has a training example of class "snow", "hail"': (data(GOOD, a=GOOD), (*CLASSES, "snow", "hail")),
    'all training examples are of class "sport"': (data(GOOD, a=texts("sport"), b=texts("sport")), CLASSES),
    "objective.classes names 1 of at least two": (data(GOOD, a=GOOD), ("sport",)),
    'objective.classes names "sport" twice': (data(GOOD, a=GOOD), (*CLASSES, "sport")),
    "1 of 3 examples are images and the model reads texts": (data(GOOD, a=(*GOOD, PICTURE)), CLASSES),
    "1 of 1 examples are images and the model reads texts": (data((PICTURE,), a=GOOD), CLASSES),
    "1 of 3 texts are empty": (data(GOOD, a=GOOD, b=(labelled_text("\n", "sport"),)), CLASSES),
}


@pytest.mark.parametrize("message", FAULTS)
def test_labelled_data_that_do_not_fit_are_one_line(message: str) -> None:
    faulty, classes = FAULTS[message]
    with pytest.raises(UserError) as error:
        check_labels(*faulty, classes, images=False)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_data_that_fit_pass_and_a_site_may_miss_a_class() -> None:
    check_labels(*data(GOOD, a=GOOD, b=texts("sport")), CLASSES, images=False)
    check_labels(*data(a=texts("sport")), CLASSES, images=False, complete=False)
    check_labels(*data(texts("a"), a=texts("a", "A")), ("A", "a"), images=False)  # both are classes
    with pytest.raises(UserError, match="are texts and the model reads images"):
        check_labels(*data(GOOD, a=GOOD), CLASSES, images=True)
