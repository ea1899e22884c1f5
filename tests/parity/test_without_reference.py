"""SimPO, CPO and ORPO have the loss and the gradient of TRL's trainers, on the same model and pairs."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from pipeline.config.loss import LossConfig
from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.forward import Want, prepare, score
from pipeline.scoring.packing import make_batch
from pipeline.training.batches import JoinedBatch
from pipeline.training.losses import total_loss
from pipeline.training.metrics import pairs_of

pytestmark = pytest.mark.slow

PAIRS = [
    TokenizedPair(prompt_ids=[5, 9, 11], chosen_ids=[30, 31, 32, 33, 1], rejected_ids=[40, 41, 1]),
    TokenizedPair(prompt_ids=[7, 8], chosen_ids=[50, 1], rejected_ids=[60, 61, 62, 63, 64, 1]),
    TokenizedPair(prompt_ids=[12, 13, 14, 15], chosen_ids=[70, 71, 72, 1], rejected_ids=[80, 81, 82, 1]),
]
PAD = 2


def side(completions: list[list[int]], pairs: list[TokenizedPair]) -> dict[str, torch.Tensor]:
    """Ids, mask and labels of one side, as TRL's collator pads them."""
    rows = [[*pair.prompt_ids, *ids] for pair, ids in zip(pairs, completions, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for label, pair in zip(labels, pairs, strict=True):
        label[: len(pair.prompt_ids)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def theirs(trainer: Any, model: Any, **settings: Any) -> torch.Tensor:
    """Loss of TRL's trainer class, whose methods get the settings without a trainer being made."""
    sides = {"chosen": [p.chosen_ids for p in PAIRS], "rejected": [p.rejected_ids for p in PAIRS]}
    batch = {f"{name}_{key}": value for name, ids in sides.items() for key, value in side(ids, PAIRS).items()}
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda values: values)
    common = {"is_encoder_decoder": False, "aux_loss_enabled": False, "pad_token_id": PAD, "padding_value": PAD}
    peer: Any = object.__new__(trainer)
    for key, value in {**common, "accelerator": accelerator, **settings}.items():
        setattr(peer, key, value)
    loss, _ = peer.get_batch_loss_metrics(model, batch)
    return loss


def ours(model: Any, loss: LossConfig) -> torch.Tensor:
    nothing = torch.full((len(PAIRS),), torch.nan)
    joined = JoinedBatch(
        batch=make_batch(PAIRS, PAD, "padded"),
        ids=torch.zeros(len(PAIRS), 3),
        ref_chosen_logps=nothing,
        ref_rejected_logps=nothing,
        truncated=nothing,
        ref_token_logps=None,
    )
    scores = score(model, joined.batch, Want())
    return total_loss(pairs_of(scores, joined, loss), loss).loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("settings", "peer"),
    [
        ({"type": "simpo", "beta": 2.0}, {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
        (
            {"type": ["simpo", "sft"], "simpo_gamma": 1.2, "label_smoothing": 0.1},
            {"loss_type": "simpo", "simpo_gamma": 1.2, "cpo_alpha": 1.0, "label_smoothing": 0.1},
        ),
        ({"type": "cpo"}, {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
        (
            {"type": "cpo", "cpo_alpha": 0.3, "label_smoothing": 0.2, "beta": 0.5},
            {"loss_type": "sigmoid", "cpo_alpha": 0.3, "label_smoothing": 0.2},
        ),
        ({"type": "orpo"}, None),
        ({"type": "orpo", "beta": 0.7}, None),
    ],
    ids=str,
)
def test_loss_and_gradient_equal_trl(model_folder: Path, settings: dict[str, Any], peer: dict[str, Any] | None) -> None:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    loss = LossConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    if peer is None:
        expected = theirs(ORPOTrainer, model, beta=loss.beta)
        # Its cross-entropy is that of prompt and completion, ours that of the completion, as in the paper.
        chosen = side([p.chosen_ids for p in PAIRS], PAIRS)
        whole = {**chosen, "labels": chosen["input_ids"].masked_fill(chosen["attention_mask"] == 0, -100)}
        expected = expected - model(**whole).loss + model(**chosen).loss
    else:
        expected = theirs(CPOTrainer, model, **{"beta": loss.beta, "label_smoothing": 0.0, "alpha": 0.0, **peer})
    expected.backward()
    theirs_gradients = gradients(model)
    prepare(model)
    found = ours(model, loss)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        scale = theirs_gradients[name].abs().max().item()
        assert (gradient - theirs_gradients[name]).abs().max().item() <= 1e-5 * scale + 1e-8, name


def test_only_a_loss_without_a_reference_trains_on_pairs_that_have_none(model_folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    prepare(model)
    with torch.no_grad():
        assert torch.isfinite(ours(model, LossConfig(type="simpo")))
        assert torch.isnan(ours(model, dataclasses.replace(LossConfig(), type="sigmoid")))
