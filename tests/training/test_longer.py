"""A run that is made longer ends in the weights of one that was as long from the start, bit for bit; also a mixture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.base.errors import IdentityError
from pipeline.config.reader import load_config
from stages import train
from stages.precompute import command as precompute
from support.runs import simple_rows, write_jsonl

MakeRun = Callable[..., Path]
SAVED = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "save_strategy": "steps", "save_steps": 3}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def steps_of(folder: Path) -> list[tuple[int, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


@pytest.mark.parametrize(
    ("shorter", "longer", "sections"),
    [
        # 24 pairs of two sets are 6 steps an epoch.
        ({"max_steps": 5}, {"max_steps": 8}, {"policy": {"lora": {"r": 4, "dropout": 0.1}}}),
        (
            {"max_steps": -1, "num_train_epochs": 1},
            {"max_steps": -1, "num_train_epochs": 2},
            # Its running means and its draws go on, too.
            {"loss": {"type": "beta_dpo", "beta_dpo_filter": 0.25}},
        ),
    ],
    ids=["over an epoch's end, with dropout", "by an epoch, with a beta of each micro-batch"],
)
def test_a_longer_run_is_the_same_as_one_at_once(
    shorter: dict[str, Any],
    longer: dict[str, Any],
    sections: dict[str, Any],
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = {
        "twice": {"path": str(write_jsonl(tmp_path / "twice.jsonl", simple_rows(8))), "fraction": 2.0},
        "once": {"path": str(write_jsonl(tmp_path / "once.jsonl", simple_rows(8, start=8)))},
    }
    config = make_run(data={"path": None, "sets": sets}, train=SAVED, **sections)
    precompute.run(load_config(config))

    def run(output: str, length: dict[str, Any]) -> Path:
        words = (f"train.output_dir={tmp_path / output}", *(f"train.{key}={value}" for key, value in length.items()))
        train.run(load_config(config, words))
        return tmp_path / output

    at_once = run("at once", longer)
    grown = run("grown", shorter)
    first = json.loads((grown / "run.json").read_text())["step"]
    (grown / "generations.jsonl").write_text("")
    capsys.readouterr()
    run("grown", longer)
    said = capsys.readouterr().out
    assert f"finished after step {first}, and made longer since; it resumes after step {first}." in said
    assert steps_of(grown) == steps_of(at_once)
    ours, theirs = weights_of(grown), weights_of(at_once)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # What was recorded of the shorter run's policy is gone.
    assert not (grown / "generations.jsonl").exists()
    run("grown", longer)
    assert "finished already; nothing to do" in capsys.readouterr().out
    with pytest.raises(IdentityError, match="differs in train"):
        run("grown", shorter)


def test_without_a_checkpoint_a_finished_run_can_not_be_made_longer(make_run: MakeRun) -> None:
    config = make_run(train={"max_steps": 1, "lr_scheduler_type": "constant"})
    precompute.run(load_config(config))
    train.run(load_config(config))
    with pytest.raises(
        IdentityError, match=r"can't be made longer: it is finished after 1 steps and has kept no check"
    ):
        train.run(load_config(config, ["train.max_steps=2"]))
