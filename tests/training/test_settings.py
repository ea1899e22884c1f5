"""Settings that no machine could train with are refused before any model is loaded, by both stages and `check`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config.loss import LossConfig
from pipeline.config.reader import load_config
from pipeline.training.arguments import refused_here, training_arguments
from pipeline.training.settings import check_metric, check_training, too_few_pairs

MakeRun = Callable[..., Path]
HELD_OUT = {"eval": {"test": {"split": "train[20:]"}}}


def arguments(**options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(output_dir="unused", use_cpu=True, eval_strategy="steps", **options)


@pytest.mark.parametrize(
    ("metric", "held_out", "balanced"),
    [
        (None, {"a": False}, False),
        ("loss", {"a": False}, False),
        ("eval_rewards/margins", {"a": False}, False),
        ("b_rewards/accuracies", {"a": False, "b": False}, False),
        ("kl/chosen", {"a": True}, False),
        ("aux_loss", {"a": False}, True),
    ],
)
def test_a_metric_that_is_measured_is_taken(metric: str | None, held_out: dict[str, Any], balanced: bool) -> None:
    check_metric(arguments(metric_for_best_model=metric), LossConfig(), held_out, balanced=balanced)


@pytest.mark.parametrize(
    ("metric", "held_out"),
    [
        ("eval_los", {"a": False}),
        # Several sets have metrics of their own alone.
        ("loss", {"a": False, "b": False}),
        ("kl/chosen", {"a": False}),
        ("aux_loss", {"a": False}),
    ],
)
def test_a_metric_that_is_not_measured_is_refused(metric: str, held_out: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.metric_for_best_model: must be a metric .*, got {metric}\. "):
        check_metric(arguments(metric_for_best_model=metric), LossConfig(), held_out, balanced=False)


@pytest.mark.parametrize(
    ("metric", "held_out", "meant"),
    [("eval_los", {"a": False}, "eval_loss"), ("loss", {"a": False, "b": False}, "eval_a_loss")],
)
def test_the_metric_that_was_meant_is_named(metric: str, held_out: dict[str, bool], meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"Set train\.metric_for_best_model: {meant}$"):
        check_metric(arguments(metric_for_best_model=metric), LossConfig(), held_out, balanced=False)


@pytest.mark.parametrize(
    ("train", "refusal"),
    [
        ({"optim": "apollo_adamw"}, "train.optim: must be .*apollo_torch"),
        ({"optim": "stable_adamw"}, "train.optim: must be .*torch-optimi"),
        ({"adam_beta1": 1.5}, "train.optim: must be .*beta"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "train.lr_scheduler_type: must be .*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "train.lr_scheduler_type: must be .*num_decay_steps"),
        (
            {"lr_scheduler_kwargs": {"num_cycle": 2}, "lr_scheduler_type": "cosine"},
            "train.lr_scheduler_type: .*num_cycle",
        ),
        ({"max_steps": 0}, "train.max_steps: must be at least 1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "train.num_train_epochs: must be positive"),
        ({"per_device_train_batch_size": 0}, "train.per_device_train_batch_size: must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "train.gradient_accumulation_steps: must be at least 1"),
        ({"report_to": "trackio"}, "train.report_to: must name installed trackers"),
        ({"eval_strategy": "steps", "metric_for_best_model": "acuracies"}, "train.metric_for_best_model: must be"),
    ],
    ids=str,
)
def test_what_the_library_would_refuse_after_the_model_is_loaded_is_refused_before(
    train: dict[str, Any], refusal: str, make_run: MakeRun
) -> None:
    with pytest.raises(ConfigError, match=rf"^{refusal}"):
        check_training(load_config(make_run(train=train, data=HELD_OUT)))


@pytest.mark.parametrize(
    "train",
    [
        {"optim": "sgd", "lr_scheduler_type": "constant"},
        {"optim": "adafactor", "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 10},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        # What the machine of stage two decides does not stop stage one.
        {"bf16": True, "use_cpu": False, "tf32": True, "deepspeed": "not-here.json"},
        {"max_steps": -1, "num_train_epochs": 0.1},
    ],
    ids=str,
)
def test_what_can_train_passes(train: dict[str, Any], make_run: MakeRun) -> None:
    check_training(load_config(make_run(train=train)))


def test_bfloat16_without_a_gpu_is_refused_by_the_stage_that_trains_with_the_option_to_set(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: False)
    for field in ("bf16", "bf16_full_eval"):
        config = load_config(make_run(train={field: True, "use_cpu": False}))
        with pytest.raises(ConfigError, match=rf"^train\.{field}: must be false .*set train\.use_cpu: true$"):
            training_arguments(config)
        assert refused_here(config) is not None
    assert refused_here(load_config(make_run(train={"bf16": True, "use_cpu": True}))) is None
    assert refused_here(load_config(make_run(train={"use_cpu": False}))) is None


def test_a_quantized_checkpoint_trains_with_an_adapter_alone(
    make_run: MakeRun, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"^policy\.model: must have weights that can be trained.*bitsandbytes"):
        check_training(load_config(make_run(policy={"model": str(folder)})))
    check_training(load_config(make_run(policy={"model": str(folder), "lora": {"r": 4}})))


@pytest.mark.parametrize(
    ("pairs", "processes", "drops", "refused"),
    [(7, 1, True, True), (8, 1, True, False), (8, 2, True, True), (7, 1, False, False)],
)
def test_a_batch_must_be_filled_if_incomplete_ones_are_dropped(
    pairs: int, processes: int, drops: bool, refused: bool
) -> None:
    error = too_few_pairs({"dataloader_drop_last": drops}, pairs, processes)
    assert (error is not None) == refused


def test_a_trial_of_the_arguments_joins_no_processes(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers of stage one that were launched together, none may wait for the other."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    check_training(load_config(make_run()))
    assert not torch.distributed.is_initialized()  # type: ignore[no-untyped-call]
