"""Wrong settings are answered before the libraries load."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.base.errors import ConfigError, DataError
from pipeline.config.reader import load_config
from stages.early import refuse_early, settings_of_run
from support.processes import ROOT

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1", "train.lr: no such field"),
        ("train.max_steps=many", "train.max_steps: must be a whole number"),
        ("train.save_strategy=step", "train.save_strategy: must be one of"),
        ("data.path=./nowhere.jsonl", "data.path: './nowhere.jsonl': no such file"),
        ("data.split=train[3:2]", "data.split: must hold rows"),
        ("policy.model=./nowhere", "policy.model: './nowhere': no such model folder"),
        ("reference.model=./nowhere", "reference.model: './nowhere': no such model folder"),
    ],
)
def test_what_settings_and_folders_show_to_be_wrong_is_refused(make_run: MakeRun, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_early(load_config(make_run(), [override]))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("key", ["precompute.output", "train.output_dir"])
def test_an_output_in_a_folder_of_the_users_is_refused(make_run: MakeRun, key: str) -> None:
    model = load_config(make_run()).policy.model
    with pytest.raises(ConfigError, match=rf"{key}.* must not be, hold or lie in policy\.model"):
        refuse_early(load_config(make_run(), [f"{key}={model}/inner"]))


def test_a_model_of_the_hub_is_not_asked_for(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    refuse_early(load_config(make_run(), ["policy.model=owner/name", "reference.model=owner/other"]))


def test_training_without_shards_is_told_to_run_stage_one(make_run: MakeRun) -> None:
    config = load_config(make_run())
    refuse_early(config)
    with pytest.raises(DataError, match=r"no shards there\. Run: refshard precompute"):
        refuse_early(config, is_scored=True)


def test_a_reference_that_moves_is_scored_by_stage_two_itself(make_run: MakeRun) -> None:
    refuse_early(load_config(make_run(), ["reference.sync={steps: 2, mixup_alpha: 0.5}"]), is_scored=True)


def test_replies_need_the_folder_of_a_run_and_a_set_that_it_has(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a run's folder"):
        settings_of_run(tmp_path)
    (tmp_path / "refshard.yaml").write_bytes(make_run().read_bytes())
    assert settings_of_run(tmp_path, "train").data.path
    with pytest.raises(ConfigError, match=r"--set tset: data\.eval names no such set"):
        settings_of_run(tmp_path, "tset")


def test_the_commands_that_train_or_score_answer_a_wrong_field_without_torch(make_run: MakeRun) -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from stages.cli import main\n"
        f"given = ['--config', {str(make_run())!r}]\n"
        "for command in (['check'], ['precompute'], ['train'], ['sweep', '--over', 'train.lr=1']):\n"
        "    wrong = [] if command[0] == 'sweep' else ['-o', 'train.lr=1']\n"
        "    found = CliRunner().invoke(main, [*command, *given, *wrong])\n"
        "    assert 'train.lr: no such field' in str(found.exception), found.exception\n"
        "    assert 'torch' not in sys.modules, command\n"
        "CliRunner().invoke(main, ['train', *given])\n"
        "CliRunner().invoke(main, ['generate', '.'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
