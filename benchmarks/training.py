"""Tokens per second of local training against transformers' Trainer: same examples, precision, batch size, SGD, clip.

Both train one epoch on the same examples of one chitchat client. Trainer has its default behaviour: it pads random
batches to the longest example and computes logits at all positions. Padding does not count as tokens for either.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.measure import Figure, alternate, main
from fedferret import recipe
from fedferret.core.keys import Key
from fedferret.data.templates import template
from fedferret.experiment import Experiment, load_data
from fedferret.local.first_order import FirstOrder
from fedferret.models import load

MODEL = "packaged:smollm2"
EXAMPLES, BATCH, TOKENS = 32, 4, 128


def figures() -> Iterator[Figure]:
    """In fp32, and in bf16 autocast."""
    settings = recipe(
        rounds=1,
        model={"name": MODEL},
        data={"source": "chitchat", "num_clients": 4, "min_messages": EXAMPLES, "max_messages": EXAMPLES},
        text={"max_tokens": TOKENS},
        clients={"per_round": 1},
        algorithm={"name": "fedavg"},
    )
    run = Experiment(settings, load(MODEL), load_data(settings))
    client = sorted(run.data.clients)[0]
    encoded = [template("chat").encode(example, run.loaded.tokenizer, TOKENS) for example in run.data.clients[client]]
    tokens = sum(len(example.ids) for example in encoded)
    for precision in ("fp32", "bf16"):

        def ours(precision: Any = precision) -> float:
            training = FirstOrder(learning_rate=1e-4, epochs=1, batch_size=BATCH, precision=precision)
            return tokens / training.train(run.task, run.examples[client], Key.of(1))["seconds"]

        ratio = alternate(ours, lambda precision=precision: tokens / peer(run, encoded, precision), 3, 1)  # type: ignore[misc]
        note = f"SmolLM2-135M, {len(encoded)} examples of at most {TOKENS} tokens, batches of {BATCH}, clip 1"
        yield Figure(f"the local loop against Trainer in {precision}", ratio, "at least", 1.3, note, "tokens/s")


def peer(run: Experiment, encoded: Sequence[Any], precision: str) -> float:
    """Seconds of one epoch of Trainer, without set-up.

    Args:
        run: has the model and the tokenizer.
        encoded: the client's examples as tokens.
        precision: "fp32" or "bf16" (autocast).
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    pad = run.loaded.tokenizer.pad_token_id

    def collate(batch: Sequence[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(example.ids) for example in batch)
        rows = {"input_ids": [], "attention_mask": [], "labels": []}  # type: ignore[var-annotated]
        for example in batch:
            gap = longest - len(example.ids)
            rows["input_ids"].append([*example.ids, *[pad] * gap])
            rows["attention_mask"].append([1] * len(example.ids) + [0] * gap)
            scored = example.ids[example.response_start :]
            rows["labels"].append([-100] * example.response_start + [*scored] + [-100] * gap)
        return {name: torch.tensor(values) for name, values in rows.items()}

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        started = 0.0
        seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=precision == "bf16",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        model = run.loaded.model
        trainer = Trainer(
            model=model, args=arguments, train_dataset=list(encoded), data_collator=collate, callbacks=[stopwatch]
        )
        trainer.train()
        model.eval()
    return stopwatch.seconds


if __name__ == "__main__":
    main("training", "Local training is fast.", figures)
