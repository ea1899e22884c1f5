"""A transformers.Trainer for joined preference pairs: ours are the collator, the loss and the metrics.

The reference is two numbers per pair in the batch; nothing here knows how to load a second model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.losses import PairLogps, dpo_loss
from pipeline.packing import Batch, make_batch
from pipeline.scoring import Scores, score
from pipeline.tokens import TokenizedPair, truncate

__all__ = ["PairTrainer", "make_collator"]


def make_collator(pad_id: int, max_length: int | None) -> Any:
    """Make the function that turns rows of the joined set into the tensors of one micro-batch."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = []
        for row in rows:
            whole = TokenizedPair(
                prompt_ids=row["prompt_ids"], chosen_ids=row["chosen_ids"], rejected_ids=row["rejected_ids"]
            )
            pair = truncate(whole, max_length)
            if pair is None:
                raise AssertionError(f"row {row['row']} should have been dropped: its prompt fills max_length")
            pairs.append(pair)
        batch = make_batch(pairs, pad_id)
        # The first entry tells the library how many pairs there are; the sequences are twice as many.
        return {
            "ref_chosen_logps": torch.tensor([row["ref_chosen_logps"] for row in rows], dtype=torch.float32),
            "ref_rejected_logps": torch.tensor([row["ref_rejected_logps"] for row in rows], dtype=torch.float32),
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "completion_mask": batch.completion_mask,
        }

    return collate


class PairTrainer(transformers.Trainer):
    """Trains a policy on pairs that carry their reference logps."""

    model: torch.nn.Module

    def __init__(self, *, beta: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._beta = beta
        # The loss is a mean over pairs already; the library must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._totals: dict[str, dict[str, float]] = {"train": {}, "eval": {}}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean DPO loss of the micro-batch's pairs; metrics are added up on the way."""
        batch = Batch(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
        scores = score(model, batch)
        policy = PairLogps(*scores.sums())
        ref = PairLogps(inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        pair_loss = dpo_loss(policy, ref, beta=self._beta)
        self._add_metrics(
            batch,
            scores,
            {
                "logps/chosen": policy.chosen,
                "logps/rejected": policy.rejected,
                "rewards/chosen": pair_loss.chosen_rewards,
                "rewards/rejected": pair_loss.rejected_rewards,
            },
        )
        loss = pair_loss.losses.mean()
        return (loss, {"losses": pair_loss.losses.detach()}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, access tokens included. Nothing here reads it; refshard.yaml has the settings.
        (Path(output_dir or str(self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log to what the library logs, under TRL's names."""
        mode = "train" if self.model.training else "eval"
        totals = self._totals[mode]
        # The library also logs a summary of the whole run at its end, when nothing has been added up.
        if totals:
            prefix = "" if mode == "train" else next((k[: -len("loss")] for k in logs if k.endswith("_loss")), "eval_")
            logs.update({f"{prefix}{name}": value for name, value in _averages(totals).items()})
            logs[f"{prefix}num_tokens"] = float(self.state.num_input_tokens_seen)
            totals.clear()
        super().log(logs, start_time)

    def _add_metrics(self, batch: Batch, scores: Scores, per_pair: dict[str, torch.Tensor]) -> None:
        mode = "train" if self.model.training else "eval"
        columns = _per_pair_columns(batch, scores, per_pair)
        # One collective per micro-batch: [pairs of all ranks, columns], without the pairs that padded the last one.
        stacked = self.accelerator.gather_for_metrics(torch.stack(list(columns.values()), dim=1))
        totals = self._totals[mode]
        for name, total in zip(columns, stacked.double().sum(dim=0).tolist(), strict=True):
            totals[name] = totals.get(name, 0.0) + total
        totals["pairs"] = totals.get("pairs", 0.0) + stacked.shape[0]
        if mode == "train":
            # Kept in the library's own counter, so that a checkpoint carries it.
            self.state.num_input_tokens_seen += int(stacked[:, list(columns).index("tokens")].sum().item())


def _per_pair_columns(batch: Batch, scores: Scores, per_pair: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything that is averaged, as sums per pair: each [P], float32."""
    margins = per_pair["rewards/chosen"] - per_pair["rewards/rejected"]
    columns = {name: value.detach().float() for name, value in per_pair.items()}
    columns["rewards/margins"] = margins
    # A tie says nothing: it counts as half right, so a policy equal to its reference reads 0.5, not 0.
    columns["rewards/accuracies"] = (margins > 0).float() + 0.5 * (margins == 0).float()
    columns["tokens"] = _pairwise(batch.attention_mask.sum(dim=1).float())
    rows = torch.repeat_interleave(scores.lengths)
    tokens = scores.tokens
    for name, values in (("entropy", tokens.entropy), ("top1", tokens.is_top1), ("logit", tokens.mean_logit)):
        sums = torch.zeros(len(scores.lengths), device=values.device).index_add(0, rows, values.detach().float())
        columns[f"{name}_chosen"], columns[f"{name}_rejected"] = sums.chunk(2)
    columns["num_chosen"], columns["num_rejected"] = scores.lengths.float().chunk(2)
    return columns


def _pairwise(rows: torch.Tensor) -> torch.Tensor:
    chosen, rejected = rows.chunk(2)
    return chosen + rejected


def _averages(totals: Mapping[str, float]) -> dict[str, float]:
    """Averages over pairs, or over tokens where the metric is one of tokens."""
    chosen, rejected, pairs = totals["num_chosen"], totals["num_rejected"], totals["pairs"]
    per_pair = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )
    return {
        **{name: totals[name] / pairs for name in per_pair},
        "logits/chosen": totals["logit_chosen"] / chosen,
        "logits/rejected": totals["logit_rejected"] / rejected,
        "entropy": (totals["entropy_chosen"] + totals["entropy_rejected"]) / (chosen + rejected),
        "mean_token_accuracy": totals["top1_chosen"] / chosen,
    }
