"""Our side, by what the stages themselves call."""

import math
import tempfile
from collections.abc import Sequence

import transformers
from gauge import Gauge
from model import build_model
from outcome import Outcome, StepClock, add_adapter, step_arguments
from workloads import PAD_ID, SEED, Workload, make_pairs, reference_logps

from pipeline.data.tokens import TokenizedPair, pair_key
from pipeline.scoring.forward import prepare
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.selfcheck import check_scoring


def run_stage_one(workload: Workload, count: int) -> Outcome:
    pairs = [TokenizedPair(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in make_pairs(workload, count)]
    model = build_model(workload).eval().requires_grad_(False)
    prepare(model)
    reading = check_scoring(model, "reference.model")
    gauge = Gauge(workload.device)

    def score(some: Sequence[TokenizedPair]) -> list[tuple[float, float]]:
        """Score as stage one does."""
        scorer = Scorer(
            model=model, reading=reading, pad_id=PAD_ID, key="model", tokens_per_batch=workload.tokens_per_batch
        )
        sums = {i: (math.fsum(a.tolist()), math.fsum(b.tolist())) for i, a, b in scorer.logps(some)}
        return [sums[i] for i in range(len(some))]

    gauge.watch()
    score(pairs[:2])
    gauge.start()
    scored = score(pairs)
    gauge.stop()
    return Outcome(gauge.read(), [sums[side] for side in (0, 1) for sums in scored])


def run_stage_two(workload: Workload, count: int) -> Outcome:
    # What a GPU machine may lack, and stage one does without.
    import datasets

    from pipeline.config.schema import LossConfig
    from pipeline.training.batches import Collator
    from pipeline.training.trainer import PairTrainer

    pairs = make_pairs(workload, count)
    rows = [
        {
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "row": i,
            "pair_key": pair_key(TokenizedPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)),
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
        prepare(model)
        packed = check_scoring(model, "policy.model") == "packed"
        trainer = PairTrainer(
            loss=LossConfig(),
            model=model,
            args=arguments,
            data_collator=Collator(PAD_ID, workload.lengths.max_length, packed=packed),
            train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[StepClock(gauge)],
        )
        trainer.train()
    first = trainer.state.log_history[0]
    return Outcome(gauge.read(), [first["loss"], first["grad_norm"]])
