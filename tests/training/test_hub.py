"""What is pushed to the hub, read by a hub on this machine: the policy, and nothing else of the run's folder."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers

from pipeline.base.errors import ConfigError, StorageError
from pipeline.run.checkpoints import MARKER
from pipeline.training.hub import Hub
from support.hub import LocalHub, local_hub
from support.processes import Command
from support.runs import refshard
from support.tally import tally

POLICY = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("README.md", "refshard.yaml"),
}
NEVER = (
    *("joined/0001/train.arrow", "joined/0001/token-logps.f32", "training_args.bin", "run.json", "log.jsonl"),
    *("inputs.json", "attempts/0001.json", "margins/train.parquet", "generations.jsonl", "events.out.tfevents.1"),
    *(".saving-0001/model.safetensors", "references/step-1/model.safetensors", "model.safetensors.tmp"),
)
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MARKER}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_canary")
        yield hub


@pytest.fixture
def output(tmp_path: Path) -> Path:
    output = tmp_path / "policy"
    checkpoint = {f"checkpoint-2/{name}" for name in (*POLICY, *STATE, "training_args.bin")}
    for name in (*POLICY, *NEVER, *checkpoint):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("---\n{}\n---\n" if name.endswith(".md") else name)
    return output


def arguments(output: Path, **options: object) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(output_dir=str(output), use_cpu=True, report_to="none", **options)


def test_the_policys_files_are_pushed_and_nothing_else_of_its_folder(hub: LocalHub, output: Path) -> None:
    pushed = Hub(arguments(output, hub_private_repo=True)).push(output, "Model save")
    assert pushed == "ada/policy"
    assert hub.files.keys() == POLICY
    assert hub.files["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert [made["name"] for made in hub.created] == ["policy"]
    assert "private" in hub.created[0].values() or hub.created[0]["private"]
    assert hub.tokens == {"Bearer hf_canary"}
    assert not any(b"canary" in content for content in hub.files.values())


@pytest.mark.parametrize(
    ("strategy", "whole"),
    [("end", None), ("every_save", None), ("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-2")],
)
def test_a_checkpoint_pushes_what_the_strategy_says(
    hub: LocalHub, output: Path, strategy: str, whole: str | None
) -> None:
    there = Hub(arguments(output, hub_strategy=strategy))
    there.open()
    there.begin_checkpoint(output / "checkpoint-2")
    there.push(output, "Model save")
    wanted = [] if strategy == "end" else [POLICY]
    wanted += [] if whole is None else [{f"{whole}/{name}" for name in POLICY | STATE}]
    assert [set(paths) for paths in hub.commits] == [*wanted, POLICY]


def test_a_hub_that_refuses_or_is_not_there_is_said(hub: LocalHub, output: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train\.hub_model_id: must name a repository, got a/b/c"):
        Hub(arguments(output, hub_model_id="a/b/c")).open()
    hub.is_open = False
    with pytest.raises(StorageError, match=r"^train\.push_to_hub: the hub must let this user write to policy, got 403"):
        Hub(arguments(output)).open()


def _ask_the_hub_at(url: str) -> None:
    """Set what the hub's client has read from the environment when it was imported."""
    huggingface_hub.constants.ENDPOINT, huggingface_hub.constants.HF_HUB_OFFLINE = url, False


@pytest.mark.slow
def test_a_run_is_pushed_once_it_is_whole_and_tries_before_its_first_step(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_run(train={"push_to_hub": True, "save_strategy": "steps", "save_steps": 2, "hub_strategy": "end"})
    refshard("precompute", "--config", config)
    with local_hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_canary", "HF_HUB_OFFLINE": "0"}

        def train(status: int) -> tuple[str, str]:
            there = functools.partial(_ask_the_hub_at, hub.url)
            command = Command("train", "--config", config, environment=environment, before=there)
            assert command.wait() == status, command.said()
            return command.said()

        hub.is_open = False
        _, refused = train(74)
        assert "train.push_to_hub: the hub must let this user write" in refused
        assert "train: 1 of" not in refused
        hub.is_open = True
        train(0)
        assert hub.files.keys() == POLICY
        tally("what a run pushes to the hub, read there", 1, outcome="the policy, its card and settings, nothing else")
        output = tmp_path / "policy"
        assert hub.files["README.md"] == (output / "README.md").read_bytes()
        record = output / "run.json"
        told = json.loads(record.read_text())
        assert told.pop("pushed_to") == "ada/policy"
        # A push that did not come through is made up for.
        record.write_text(json.dumps(told))
        hub.files.clear()
        assert "The policy is on the hub, in ada/policy" in train(0)[0]
        assert hub.files.keys() == POLICY
