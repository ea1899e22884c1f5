"""The first loss is ln 2 by default, since the reference computes as the policy will: law L1 on bf16 checkpoints."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from stages import train
from stages.check import command as check
from stages.precompute import command as precompute
from support.models import make_model
from support.processes import ROOT
from support.runs import logged_steps, simple_rows, write_config, write_jsonl

LN_2 = np.log(2)


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A checkpoint in bfloat16, as nearly all of the hub's are."""
    folder = make_model(tmp_path_factory.mktemp("bf16"), tokenizer)
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def both_stages(config: Config) -> float:
    """Run both stages; give the loss of the first step."""
    precompute.run(config)
    train.run(config)
    return logged_steps(config.train.folder)[0]["loss"]


@pytest.fixture
def readme_run(tmp_path: Path, bf16_folder: Path) -> Path:
    """The README's own settings, on a small model and small data, for two steps on a CPU."""
    found = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    sections = yaml.safe_load(found[1])
    data = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(24))
    sections["data"] |= {"path": str(data), "split": "train[:16]", "eval": {"test": {"split": "train[16:]"}}}
    sections["policy"]["model"] = str(bf16_folder)
    sections["precompute"]["output"] = str(tmp_path / "shards")
    sections["train"] |= {"output_dir": str(tmp_path / "policy"), "max_steps": 2, "logging_steps": 1, "use_cpu": True}
    return write_config(tmp_path / "run.yaml", **sections)


@pytest.mark.parametrize(
    ("precision", "within"), [(["train.bf16=false"], 1e-6), ([], 2e-4)], ids=["float32", "bf16 autocast"]
)
def test_the_readmes_own_settings_start_at_ln_2(readme_run: Path, precision: list[str], within: float) -> None:
    assert both_stages(load_config(readme_run, precision)) == pytest.approx(LN_2, abs=within)


def test_so_does_full_fine_tuning_whose_policy_is_told_to_be_wider_than_its_checkpoint(
    readme_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(readme_run, ["policy.lora=null", "train.bf16=false"])
    assert both_stages(config) == pytest.approx(LN_2, abs=1e-6)
    shown = capsys.readouterr()
    told = "float32, twice as large as the bfloat16 checkpoint"
    assert f"; its weights are {told}" in shown.out
    assert f"| dtype of the weights | {told} |" in (config.train.folder / "README.md").read_text()
    assert "warning" not in shown.out + shown.err


def test_so_does_a_bf16_policy_which_is_told_that_its_steps_are_rounded_away(
    readme_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(readme_run, ["policy.lora=null", "policy.dtype=bfloat16", "train.learning_rate=1e-6"])
    assert both_stages(config) == pytest.approx(LN_2, abs=2e-4)
    told = r"warning: step 1 moved [01]\.\d% of the policy's weights: .*policy.dtype: float32"
    assert re.search(told, capsys.readouterr().out)


def test_so_does_each_window_on_a_reference_that_is_a_copy_of_the_policy(readme_run: Path) -> None:
    config = load_config(
        readme_run, ["reference.sync={steps: 1, mixup_alpha: 1.0}", "data.eval={}", "policy.lora=null"]
    )
    for _ in range(2):
        precompute.run(config)
        train.run(config)
    steps = logged_steps(config.train.folder)
    assert [step["loss"] for step in steps] == pytest.approx([LN_2] * 2, abs=2e-4)


def test_who_sets_them_apart_is_told_how_far_off_it_starts(
    readme_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(readme_run, ["train.bf16=false", "reference.dtype=bfloat16", "loss.beta=1.0"])
    check.run(config, hardware="h100-80gb", rows=None, limits=check.Limits(), as_json=False)
    told = "reference.dtype: the reference is scored in bfloat16, the policy computes in float32"
    assert f"warning: {told}. The first rewards/margins are about" in capsys.readouterr().out
    first = both_stages(config)
    shown = capsys.readouterr()
    (measured,) = re.findall(rf"warning: {told}: on 16 pairs, .* and the sigmoid loss at (\S+),", shown.err)
    was = told.replace("is scored", "was scored")
    (by_gate,) = re.findall(rf"warning: {was}: on 16 pairs, .* and the sigmoid loss at (\S+),", shown.out)
    assert float(measured) == pytest.approx(float(by_gate), abs=2e-4)
    assert abs(first - LN_2) > 1e-4
