"""Steps that are smaller than the spacing of a 16-bit policy's weights are told."""

from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.training.spacing import SpacingWatch


def told(tmp_path: Any, dtype: torch.dtype, rate: float, warmup: tuple[float, ...] = ()) -> list[str]:
    """Take a few optimizer steps as the library does, with one warm-up step at each share of the rate."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(64, 16), torch.nn.Linear(16, 16)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=rate, use_cpu=True)
    said: list[str] = []
    watch, state, control = SpacingWatch(said.append), TrainerState(), TrainerControl()
    for share in (*warmup, 1.0, 1.0):
        optimizer.param_groups[0]["lr"] = share * rate
        # Most rows of the embedding have no gradient, and so are not to move.
        model(torch.arange(8)).float().square().sum().backward()
        watch.on_pre_optimizer_step(arguments, state, control, model=model, optimizer=optimizer)
        optimizer.step()
        watch.on_optimizer_step(arguments, state, control, model=model)
        optimizer.zero_grad()
        state.global_step += 1
    return said


def test_a_policy_that_rounds_its_steps_away_is_told_once(tmp_path: Any) -> None:
    (said,) = told(tmp_path, torch.bfloat16, 1e-6)
    assert said.startswith("warning: step 1 moved ")
    assert float(said.split("moved ")[1].split("%")[0]) < 2
    assert "train.learning_rate 1e-06" in said and "bfloat16" in said
    assert "Set policy.dtype: float32, with train.bf16: true" in said


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-6)])
def test_a_policy_that_moves_is_not(tmp_path: Any, dtype: torch.dtype, rate: float) -> None:
    assert told(tmp_path, dtype, rate) == []


def test_the_small_steps_of_a_warm_up_are_no_fault(tmp_path: Any) -> None:
    assert told(tmp_path, torch.bfloat16, 1e-2, warmup=(0.0, 1e-4)) == []
