"""What FedPepTAO's scoring round finds and costs on packaged:minilm: scores by layer, spectrum of the Hessian, share.

python -m benchmarks.spectrum            three clients of recipes/small/fedpeptao.toml, two minutes of one core

For each of three clients: the scores of a batch of 8, then the Hessian's spectrum in the prefixes, as they begin and
after 10 local steps. Seconds are of the process, which a machine under load does not stretch.
"""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from pathlib import Path

from fedferret.algorithms.fedpeptao_layers import layer_scores
from fedferret.algorithms.full_model import loaded
from fedferret.api import load_recipe
from fedferret.build import Parts, load_data
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.lanczos import hessian_product, plateau, spectrum
from fedferret.models.adapters.attention import prefix_groups

RECIPE = Path(__file__).parents[1] / "recipes" / "small" / "fedpeptao.toml"


def peak() -> float:
    """The most memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def look(task: Task, batch: object, key: Key) -> str:
    """The spectrum at the weights that the model has."""
    started, before = time.process_time(), peak()
    names = [name for group in prefix_groups(dict(task.model.named_parameters())).values() for name in group]
    weights = {name: task.model.get_parameter(name) for name in names}
    product = hessian_product(lambda: task.objective.loss(task.model, batch), weights)
    found = spectrum(product, sum(weight.numel() for weight in weights.values()), key)
    least, most = float(found.values[0]), float(found.values[-1])
    positive = float(found.weights[found.values > 0].sum())
    return (
        f"eigenvalues {least:.2e} to {most:.2e}, {positive:.3f} of them above 0; above 0 with the kernel "
        f"{found.above(0.0):.3f}, plateau {plateau(found.above):.3f}; {time.process_time() - started:.1f} s, "
        f"{peak() - before:.0f} MB more"
    )


def main() -> None:
    """Three clients, one after the other."""
    recipe = load_recipe(RECIPE)
    parts = Parts.over(recipe, load_data(recipe), log=lambda line: None)
    task, (node, _) = parts.task, parts.start_node()
    training = replace(recipe.algorithm.training, steps=10, batch_size=8)
    for client in sorted(parts.examples)[:3]:
        data, key = parts.examples[client], Key.of(1, client)
        batch = next(iter(data.take(key.sample(range(len(data)), 8)).batches(8, None)))
        with loaded(task, node.public.weights):
            started = time.process_time()
            scores, _ = layer_scores(task, batch)
            print(
                f"{client}: ζ {[round(score, 3) for score in scores.tolist()]}, {time.process_time() - started:.2f} s"
            )
            print(f"  at first        {look(task, batch, key)}")
            started = time.process_time()
            training.train(task, data, key)
            print(f"  10 steps take {time.process_time() - started:.1f} s")
            print(f"  after 10 steps  {look(task, batch, key)}", flush=True)


if __name__ == "__main__":
    main()
