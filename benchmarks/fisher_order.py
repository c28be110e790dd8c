"""Are texts with a wrong label harder by FibecFed's measure? Before and after the head has learned anything.

python -m benchmarks.fisher_order        three minutes of one core; prints JSON

100 texts of 20 Newsgroups of 64 tokens, every fifth with the label seven classes on; FedIT's factors (rank 8, B = 0) on
MiniLM with a head for 20 classes. The area under the curve is the share of pairs of a wrong and a right label in which
the wrong one has the larger f_i; 0.5 is chance. The head learns in twenty steps of AdamW on 400 other texts.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.classification import TASKS
from fedferret import recipe
from fedferret.algorithms.fibecfed_messages import factors_of
from fedferret.build import Parts, load_data
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.data.examples import Example
from fedferret.data.labelled import labelled_text
from fedferret.local.fisher import fisher

TEXTS, OTHERS, EVERY, FURTHER, STEPS, RATE = 100, 400, 5, 7, 20, 0.01


def area(difficulties: Tensor, wrong: Tensor) -> float:
    """The area under the curve of the wrong labels, equal values counted half."""
    gaps = difficulties[wrong][:, None] - difficulties[~wrong][None]
    return float((gaps > 0).double().mean() + (gaps == 0).double().mean() / 2)


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


def mislabelled(examples: list[Example], classes: tuple[str, ...]) -> list[Example]:
    """Every fifth example with the label seven classes on."""
    found = []
    for number, example in enumerate(examples):
        other = classes[(classes.index(example.response) + FURTHER) % len(classes)]
        found.append(labelled_text(example.turns[0].content, other) if number % EVERY == 0 else example)
    return found


def main() -> None:
    """Measure both orders."""
    made: Any = recipe(
        rounds=1,
        model=TASKS["newsgroups"]["model"],
        data={"source": "newsgroups", "max_held_out": 20, "partition": {"kind": "iid", "clients": 1}},
        text={"max_tokens": 64},
        clients={"per_round": 1},
        algorithm={"name": "fedit"},
    )
    data = load_data(made)
    (rows,) = data.clients.values()
    chosen = [rows[number] for number in Key.of(1, "texts").sample(range(len(rows)), TEXTS + OTHERS)]
    step = OTHERS // TEXTS + 1  # rows and samples come by class: the first hundred would be of few classes
    measured, further = chosen[::step], [row for number, row in enumerate(chosen) if number % step]
    parts = Parts.over(made, data, log=lambda line: None)
    classes = parts.recipe.objective.classes  # type: ignore[attr-defined]
    texts = parts.examples.encode(tuple(mislabelled(measured, classes)))
    others = parts.examples.encode(tuple(further))
    task, wrong = parts.task, torch.arange(TEXTS) % EVERY == 0
    names = factors_of(tree.parameters(task.model))
    started = time.process_time()
    drawn = fisher(task, texts, names).by_example
    seconds = (time.process_time() - started) / TEXTS
    learn_head(task.model, others)
    learned = fisher(task, texts, names).by_example
    figures = {
        "area_drawn_head": area(drawn, wrong),
        "area_learned_head": area(learned, wrong),
        "rank_correlation": rank_correlation(drawn, learned),
        "seconds_per_example": seconds,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def learn_head(model: Any, data: Any) -> None:
    """Train a classifier's head alone, on features that are computed once."""
    with torch.no_grad():
        batches = list(data.batches(64, None))
        features_NH = torch.cat([model.features(batch) for batch in batches])
        labels_N = torch.cat([batch.labels for batch in batches])
    optimizer = torch.optim.AdamW(model.head.parameters(), RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(model.head(features_NH), labels_N).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
