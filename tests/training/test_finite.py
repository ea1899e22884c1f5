"""Training that is no longer finite: the step is named, and nothing of it is saved."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.base.errors import DataError
from pipeline.run.checkpoints import MARKER, checkpoint_folders
from pipeline.training import finite as finite_module
from pipeline.training.finite import FiniteWatch
from support.runs import refshard
from support.tally import tally

NAN, INF = float("nan"), float("inf")


class Step:
    """A step of a model of two weights, one of which is frozen."""

    def __init__(self, folder: Path, *, go_on: bool = False) -> None:
        self.said: list[str] = []
        self.watch = FiniteWatch(folder, self.said.append, go_on=go_on)
        self.norm: Any = torch.tensor(1.0)
        self.accelerator = SimpleNamespace(
            clip_grad_norm_=lambda parameters, most: self.norm, optimizer_step_was_skipped=False
        )
        self.watch.attach(self.accelerator)
        self.model = torch.nn.Linear(2, 2)
        self.model.bias.requires_grad_(False)

    def end(self, *losses: float, norm: Any = 1.0, skipped: bool = False, number: int = 3) -> None:
        self.norm = norm
        for loss in losses:
            self.watch.take_loss(torch.tensor(loss))
        assert self.accelerator.clip_grad_norm_(None, 1.0) is norm
        self.accelerator.optimizer_step_was_skipped = skipped
        self.watch.on_step_end(None, SimpleNamespace(global_step=number, max_steps=9), None, model=self.model)


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step(tmp_path)


@pytest.mark.parametrize(
    ("losses", "norm", "named"),
    [
        ((0.5, NAN), 1.0, "loss"),
        ((INF, 0.5), 1.0, "loss"),
        ((0.5,), torch.tensor(NAN), "gradient"),
        ((0.5,), INF, "gradient"),
        ((NAN,), NAN, "loss, gradient"),
    ],
)
def test_a_loss_or_a_gradient_that_is_not_finite_ends_training(
    step: Step, tmp_path: Path, losses: tuple[float, ...], norm: Any, named: str
) -> None:
    step.end(0.5, 0.7)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / MARKER).touch()
    with pytest.raises(DataError, match=rf"since step 3 of 9: {named}; checkpoint-2 is the last finite one\. Lower "):
        step.end(*losses, norm=norm)


def test_a_weight_that_is_not_finite_ends_training_and_a_frozen_one_does_not_count(step: Step) -> None:
    step.model.bias.data[1] = NAN
    step.end(0.5)
    step.model.weight.data[1, 0] = INF
    with pytest.raises(DataError, match="since step 3 of 9: weights; no checkpoint was saved before"):
        step.end(0.5)
    assert not step.watch.weights_are_finite


def test_a_step_that_the_loss_scale_skips_and_a_norm_that_is_unknown_are_no_fault(step: Step) -> None:
    step.end(0.5, norm=INF, skipped=True)
    step.end(0.5, norm=None)
    with pytest.raises(DataError, match="gradient"):
        step.end(0.5, norm=INF)


def test_a_fault_of_another_process_counts(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite_module, "largest", lambda own: max(own, 1 << 2))
    with pytest.raises(DataError, match="weights"):
        step.end(0.5)


def test_told_to_go_on_it_warns_once_and_knows_whether_the_weights_are_finite(tmp_path: Path) -> None:
    step = Step(tmp_path, go_on=True)
    step.end(NAN, number=4)
    assert step.watch.weights_are_finite
    step.model.weight.data[0, 0] = NAN
    step.end(NAN, number=5)
    assert not step.watch.weights_are_finite
    assert step.said == ["warning: training is not finite since step 4 of 9: loss (train.on_nonfinite: continue)"]


@pytest.mark.slow
def test_a_run_that_turns_nan_keeps_its_last_finite_checkpoint_and_says_the_step(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_run(train={"learning_rate": "1e5", "save_strategy": "steps", "save_steps": 1, "logging_steps": 2})
    refshard("precompute", "--config", config)
    output = tmp_path / "policy"
    left = refshard("train", "--config", config, check=65)
    assert "since step 2 of 4: gradient, weights; checkpoint-1 is the last finite one" in left.stderr
    assert checkpoint_folders(output).keys() == {1}
    assert not (output / "run.json").exists()
    two = ("--processes", 2, "--overwrite", "-o", "train.per_device_train_batch_size=2")
    left = refshard("train", "--config", config, *two, check=65)
    assert "since step 2 of 4: gradient, weights; checkpoint-1 is the last finite one" in left.stderr
    assert checkpoint_folders(output).keys() == {1}
    tally("training that turns NaN or infinite", 2, outcome="65, the step named, the last finite checkpoint kept")
    went_on = refshard("train", "--config", config, "--overwrite", "-o", "train.on_nonfinite=continue")
    assert "warning: training is not finite since step 2 of 4" in went_on.stdout + went_on.stderr
    assert "training loss nan" in went_on.stdout
    assert checkpoint_folders(output).keys() == {1}
    assert any(weight.isnan().any() for weight in load_file(output / "model.safetensors").values())


def test_a_held_out_loss_that_is_not_finite_is_told_and_training_goes_on(step: Step) -> None:
    state = SimpleNamespace(global_step=4)
    step.watch.on_evaluate(None, state, None, metrics={"eval_a_loss": NAN, "eval_b_loss": 0.5, "eval_runtime": INF})
    step.watch.on_evaluate(None, state, None)
    (said,) = step.said
    assert said.startswith("warning: eval_a_loss is nan at step 4:")
    step.end(0.5)
