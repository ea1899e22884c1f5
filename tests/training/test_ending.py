"""What a run needs at its end is tried before its first step; what it leaves is said of the weights that it saved."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.base.errors import ConfigError
from pipeline.config.reader import load_config
from pipeline.models.loading import load_policy
from pipeline.run.attempts import Attempt
from pipeline.run.reading import read_run
from pipeline.training.ending import rehearse_saving, save_policy
from stages.sweep.command import _row
from support.runs import refshard, simple_rows, write_jsonl

MakeRun = Callable[..., Path]


class Unsaveable:
    def save_pretrained(self, folder: Path) -> None:
        raise ValueError("temperature is not for greedy search")


@pytest.fixture
def trainer(model_folder: Path, make_run: MakeRun, tokenizer: Any) -> Any:
    return SimpleNamespace(model=load_policy(load_config(make_run())), processing_class=tokenizer)


def test_all_but_the_weights_is_saved_and_deleted(trainer: Any, tmp_path: Path) -> None:
    found: list[str] = []

    def card() -> bytes:
        found.extend(sorted(file.name for file in (tmp_path / ".saving-0001").iterdir()))
        return b"card"

    rehearse_saving(trainer, Attempt(tmp_path, 1), card)
    assert found == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert not (tmp_path / ".saving-0001").exists()


def test_what_can_not_be_saved_is_named(trainer: Any, tmp_path: Path) -> None:
    trainer.model.generation_config = Unsaveable()
    with pytest.raises(
        ConfigError, match=r"^policy\.model: its generation configuration .* got temperature is not for"
    ):
        rehearse_saving(trainer, Attempt(tmp_path, 1), lambda: b"card")
    assert not (tmp_path / ".saving-0001").exists()


@pytest.mark.slow
def test_the_step_and_the_metrics_are_those_of_the_weights_that_were_saved(make_run: MakeRun, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held-out.jsonl", simple_rows(6, start=100))
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        # The loss is largest at first.
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    config = make_run(data={"eval": {"test": {"path": str(held_out)}}}, train=best)
    refshard("precompute", "--config", config)
    done = refshard("train", "--config", config)
    output = tmp_path / "policy"
    record = json.loads((output / "run.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    step = max(losses, key=lambda step: losses[step])
    assert step < 4
    assert (record["step"], record["trained_steps"], record["metrics"]["eval_loss"]) == (step, 4, losses[step])
    assert (output / "model.safetensors").read_bytes() == (output / f"checkpoint-{step}/model.safetensors").read_bytes()
    assert f"its weights are those of step {step}, the best" in done.stdout
    card = (output / "README.md").read_text()
    assert f"| weights | of step {step}, of 4 that were trained |" in card
    assert f"| `eval_loss` | {losses[step]:.4g} |" in card
    row = _row("run", read_run(output))
    assert (row["steps"], row["loss"]) == (f"{step} of 4", f"{losses[step]:.4g}")
    refshard("report", output)
    page = (output / "report.html").read_text()
    assert f"the policy is that of step {step}" in page
    said = refshard("generate", output, "--prompts", 1, "--max-tokens", 2).stdout
    assert f"policy after step {step}:" in said


@pytest.mark.parametrize(
    "saved", [("config.json", "model.safetensors"), ("adapter_config.json", "adapter_model.safetensors")]
)
def test_nothing_of_an_overwritten_runs_policy_stays_beside_the_new_one(tmp_path: Path, saved: tuple[str, ...]) -> None:
    """A loader would take an adapter beside weights with them, and a whole file before its shards."""
    mine = ("model_backup.safetensors", "notes.json", "config.json.bak", "checkpoint-2/adapter_config.json")
    earlier = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "additional_chat_templates/a.jinja")
    for name in (
        *mine,
        *earlier,
        "config.json",
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("earlier")

    def save_model(folder: str, _internal_call: bool) -> None:
        Path(folder).mkdir()
        for name in (*saved, "tokenizer.json"):
            (Path(folder) / name).write_text("new")

    trainer: Any = SimpleNamespace(save_model=save_model, accelerator=SimpleNamespace(wait_for_everyone=lambda: None))
    save_policy(trainer, Attempt(tmp_path, 1))
    there = {file.relative_to(tmp_path).as_posix(): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert there == dict.fromkeys(mine, "earlier") | dict.fromkeys((*saved, "tokenizer.json"), "new")
