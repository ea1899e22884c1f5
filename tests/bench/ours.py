"""Our side: the two places where the benchmark calls refshard."""

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import transformers
from gauge import Gauge
from model import build_model
from outcome import Outcome, StepClock, add_adapter, step_arguments
from workloads import PAD_ID, SEED, Workload, make_pairs, reference_logps

from pipeline.config.schema import LossConfig
from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.forward import prepare
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.selfcheck import check_scoring
from pipeline.training.batches import make_collator
from pipeline.training.trainer import PairTrainer


def score_all(
    model: Any, pairs: Sequence[TokenizedPair], tokens_per_batch: int, packed: bool
) -> tuple[list[float], list[float]]:
    """Score as stage one does; give the summed log-probs of chosen and of rejected, in the pairs' order."""
    scorer = Scorer(model=model, packed=packed, pad_id=PAD_ID, key="model", tokens_per_batch=tokens_per_batch)
    sums = {i: (math.fsum(a.tolist()), math.fsum(b.tolist())) for i, a, b in scorer.logps(pairs)}
    return [sums[i][0] for i in range(len(pairs))], [sums[i][1] for i in range(len(pairs))]


def make_trainer(
    model: Any, rows: datasets.Dataset, arguments: transformers.TrainingArguments, max_length: int, callback: Any
) -> transformers.Trainer:
    """Build stage two's trainer on rows as the join gives them."""
    prepare(model)
    return PairTrainer(
        loss=LossConfig(),
        model=model,
        args=arguments,
        data_collator=make_collator(PAD_ID, max_length, packed=check_scoring(model, "policy.model")),
        train_dataset=rows,
        callbacks=[callback],
    )


def run_stage_one(workload: Workload, count: int) -> Outcome:
    pairs = [TokenizedPair(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in make_pairs(workload, count)]
    model = build_model(workload).eval().requires_grad_(False)
    prepare(model)
    packed = check_scoring(model, "reference.model")
    gauge = Gauge(workload.device)
    gauge.watch()
    score_all(model, pairs[:2], workload.tokens_per_batch, packed)
    gauge.start()
    chosen, rejected = score_all(model, pairs, workload.tokens_per_batch, packed)
    gauge.stop()
    return Outcome(gauge.read(), [*chosen, *rejected])


def run_stage_two(workload: Workload, count: int) -> Outcome:
    pairs = make_pairs(workload, count)
    rows = [
        {
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "row": i,
            "truncated": False,
            "ref_chosen_logps": references[0],
            "ref_rejected_logps": references[1],
        }
        for i, ((prompt, chosen, rejected), references) in enumerate(
            zip(pairs, reference_logps(workload, pairs), strict=True)
        )
    ]
    model = build_model(workload)
    if workload.lora:
        transformers.set_seed(SEED)
        model = add_adapter(model)
    gauge = Gauge(workload.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            **step_arguments(workload, count, folder), remove_unused_columns=False, label_names=[]
        )
        trainer = make_trainer(
            model, datasets.Dataset.from_list(rows), arguments, workload.lengths.max_length, StepClock(gauge)
        )
        trainer.train()
    first = trainer.state.log_history[0]
    return Outcome(gauge.read(), [first["loss"], first["grad_norm"]])
