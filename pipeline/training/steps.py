"""Pairs of each optimizer step, known before training begins.

The library's own loader and sampler run over row numbers in place of pairs. Their rules for seeds, epochs,
accumulation and incomplete batches thus apply unchanged.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
import transformers

from pipeline.training.settings import too_few_pairs

__all__ = ["Order", "order_of_run"]


@dataclass(frozen=True)
class Order:
    """The pairs of a run, step by step."""

    steps: list[npt.NDArray[np.int64]]
    """Indices of each optimizer step's pairs in the training set"""
    steps_per_epoch: int

    def pairs_of(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Give the indices of the pairs of steps `first` + 1 to `last`, ascending, each once."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.steps[first:last]]))


def order_of_run(arguments: transformers.TrainingArguments, num_pairs: int) -> Order:
    """Give the pairs of every step of a run of one process. Raises ConfigError if no batch is full."""
    arguments = copy.copy(arguments)
    arguments.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO
    trainer = transformers.Trainer(
        model=torch.nn.Linear(1, 1),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"index": np.arange(num_pairs)}),
        data_collator=lambda rows: {"index": torch.tensor([row["index"] for row in rows])},
    )
    loader: Any = trainer.get_train_dataloader()
    accumulation = arguments.gradient_accumulation_steps
    steps_per_epoch = max(math.ceil(len(loader) / accumulation), 1)
    total = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
    if error := too_few_pairs(vars(arguments), num_pairs, 1):
        raise error
    steps: list[npt.NDArray[np.int64]] = []
    for epoch in range(math.ceil(total / steps_per_epoch)):
        loader.set_epoch(epoch)
        batches = [batch["index"].cpu().numpy() for batch in loader]
        # The last step of an epoch takes the remaining micro-batches.
        steps += [np.concatenate(batches[i : i + accumulation]) for i in range(0, len(batches), accumulation)]
    return Order(steps[:total], steps_per_epoch)
