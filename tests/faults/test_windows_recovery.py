"""TR-DPO, killed, signalled, damaged or called with other settings: the same command goes on, or says why not."""

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.checkpoints import commit_checkpoint
from support.runs import refshard
from support.watched import Watched
from support.windows import ALPHA, EVERY, STEPS, history, losses, write_inputs, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("windows"))


def two_halves(config: Path) -> None:
    refshard("precompute", "--config", config)
    refshard("train", "--config", config, "--one-window")


def seal_again(marker: Path, **changes: Any) -> None:
    """Change what a moved reference says that it was made from, as if it had been."""
    made_from = {**json.loads(marker.read_text())["identity"], **changes}
    shutil.rmtree(marker.parent / "shards")
    commit_checkpoint(marker.parent, made_from["step"], made_from, marker_name=marker.name)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_killed_at_any_point_the_same_command_goes_on_with_the_moved_reference(
    folder: Path, tmp_path: Path, lora: bool
) -> None:
    sync = {"steps": EVERY, "mixup_alpha": ALPHA}
    train = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3}
    # The first command of a test process takes the libraries' import longer than all others.
    refshard("--version")
    begin = time.monotonic()
    refshard("train", "--config", write_run(folder, tmp_path / "undisturbed", sync, lora=lora, **train))
    duration = time.monotonic() - begin
    config = write_run(folder, tmp_path / "killed", sync, lora=lora, **train)
    chance = random.Random(int(lora))
    kills = 0
    for _ in range(40):
        process = Watched("train", "--config", config)
        # From before the first scoring to the middle of a window further on.
        process.wait(chance.uniform(0.05, 0.5) * duration)
        if process.status is None:
            process.signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if kills >= 2 or process.status == 0:
            break
    assert kills >= 1, process.err
    refshard("train", "--config", config)
    assert history(tmp_path / "killed") == history(tmp_path / "undisturbed")
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    killed, undisturbed = (tmp_path / name / "policy" / weights for name in ("killed", "undisturbed"))
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert not (tmp_path / "killed" / "policy" / "references").exists()


def test_a_signal_ends_a_run_between_steps_with_75_and_it_goes_on(folder: Path, tmp_path: Path) -> None:
    sync = {"steps": EVERY, "mixup_alpha": ALPHA}
    config = write_run(folder, tmp_path, sync)
    process = Watched("train", "--config", config)
    process.wait_until((tmp_path / "policy" / "checkpoint-4").exists)
    process.signal(signal.SIGTERM)
    assert process.finish() == 75, process.err
    assert "Run the same command again" in process.err
    refshard("train", "--config", config)
    assert len(losses(history(tmp_path))) == STEPS
    assert "finished already" in refshard("train", "--config", config).stdout


def test_a_reference_made_from_another_training_is_made_again(folder: Path, tmp_path: Path) -> None:
    """A checkpoint that differs from what the reference was mixed from: the reference follows it."""
    config = write_run(folder, tmp_path, {"steps": 2, "mixup_alpha": ALPHA}, eval_strategy="no")
    two_halves(config)
    refshard("precompute", "--config", config)
    marker = tmp_path / "policy" / "references" / "step-00000002" / "refshard-reference.json"
    right = marker.read_bytes()
    seal_again(marker, policy={"model.safetensors": "0" * 64})
    refshard("precompute", "--config", config)
    assert marker.read_bytes() == right


def test_a_refused_command_with_other_settings_moves_nothing(folder: Path, tmp_path: Path) -> None:
    config = write_run(folder, tmp_path, {"steps": EVERY, "mixup_alpha": ALPHA})
    two_halves(config)
    other = ["-o", "reference.sync.mixup_alpha=0.1"]
    assert "sync.mixup_alpha: saved" in refshard("train", "--config", config, *other, check=78).stderr
    assert "sync.mixup_alpha: saved" in refshard("precompute", "--config", config, *other, check=78).stderr
    assert not (tmp_path / "policy" / "references").exists()


def test_a_reference_moved_otherwise_is_not_taken_for_this_runs(folder: Path, tmp_path: Path) -> None:
    config = write_run(folder, tmp_path, {"steps": 2, "mixup_alpha": ALPHA}, eval_strategy="no")
    two_halves(config)
    refshard("precompute", "--config", config)
    marker = tmp_path / "policy" / "references" / "step-00000002" / "refshard-reference.json"
    right = marker.read_bytes()
    for change in ({"sync": {"steps": 2, "mixup_alpha": 0.1}}, {"first": {"weights": "0" * 64}}):
        seal_again(marker, **change)
        refshard("precompute", "--config", config)
        assert marker.read_bytes() == right


@pytest.mark.parametrize(("name", "how"), [("model.safetensors", "cut"), ("scheduler.pt", "flipped")])
def test_a_damaged_checkpoint_at_a_windows_edge_is_gone_back_from(
    folder: Path, tmp_path: Path, name: str, how: str
) -> None:
    config = write_run(folder, tmp_path, {"steps": EVERY, "mixup_alpha": ALPHA})
    two_halves(config)
    two_halves(config)
    file = tmp_path / "policy" / "checkpoint-8" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "flipped" else content[:1000])
    done = refshard("train", "--config", config)
    assert "checkpoint-8: damaged" in done.stderr
    assert (tmp_path / "policy" / "broken-checkpoint-8-0").exists()
    assert len(losses(history(tmp_path))) == STEPS


def test_a_finished_run_is_neither_scored_nor_trained_again(folder: Path, tmp_path: Path) -> None:
    config = write_run(folder, tmp_path, {"steps": EVERY})
    refshard("train", "--config", config)
    assert "finished already" in refshard("precompute", "--config", config).stdout
    assert "finished already" in refshard("train", "--config", config).stdout
    assert not (tmp_path / "policy" / "references").exists()


def test_overwrite_starts_over_with_other_settings(folder: Path, tmp_path: Path) -> None:
    config = write_run(folder, tmp_path, {"steps": EVERY, "mixup_alpha": ALPHA}, eval_strategy="no")
    two_halves(config)
    changed = ["-o", "train.seed=8", "-o", "train.max_steps=5"]
    assert "train.seed: saved" in refshard("train", "--config", config, *changed, check=78).stderr
    refshard("train", "--config", config, *changed, "--overwrite")
    assert len(losses(history(tmp_path))) == 5


def test_a_signal_in_the_middle_of_an_epoch_evaluates_nothing(folder: Path, tmp_path: Path) -> None:
    """The library ends the epoch where it is left, and would evaluate on what this window has no log-probs for."""
    config = write_run(
        folder, tmp_path, {"steps": 30}, eval_strategy="epoch", max_steps=120, gradient_accumulation_steps=2
    )
    process = Watched("train", "--config", config)
    process.wait_until(lambda: bool(list((tmp_path / "policy").glob("joined/*/test.arrow"))))
    time.sleep(0.5)
    process.signal(signal.SIGTERM)
    assert process.finish() in (0, 75), process.err
