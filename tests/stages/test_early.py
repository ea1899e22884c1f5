"""Wrong settings are answered before the libraries load."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.base.errors import ConfigError, DataError, IdentityError
from pipeline.base.files import write_json
from pipeline.config.reader import load_config
from pipeline.run.checkpoints import commit_checkpoint
from pipeline.run.identity import identity_of_training, run_identity
from pipeline.run.reading import RECORD
from stages.early import refuse_early, refuse_other_settings, settings_of_run
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


@pytest.mark.parametrize("override", ["reference.sync={steps: 2, mixup_alpha: 0.5}", "loss.type=simpo"])
def test_a_reference_that_moves_or_is_none_needs_no_shards_from_stage_one(make_run: MakeRun, override: str) -> None:
    refuse_early(load_config(make_run(), [override]), is_scored=True)


SAVED = ("train.lr_scheduler_type=constant",)


def save_run(file: Path, *, finished: bool) -> None:
    """Record a run of these settings as finished, or commit a checkpoint of it."""
    config = load_config(file, SAVED)
    identity = run_identity(config, {"train": "f" * 64}, 1, identity_of_training(config))
    folder = config.train.folder / "checkpoint-2"
    folder.mkdir(parents=True)
    if finished:
        write_json(folder.parent / RECORD, {"finished": True, "step": 4, "identity": identity})
    else:
        commit_checkpoint(folder, 2, identity)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("loss.beta=0.3", r"loss\.beta: saved 0\.1, this run 0\.3"),
        ("train.learning_rate=2e-3", r"train\.learning_rate: saved 0\.001, this run 0\.002"),
        ("train.optim=sgd", r"train\.optim: saved none, this run sgd"),
        ("train.gradient_accumulation_steps=2", "processes x gradient_accumulation_steps: saved 1, this run 2"),
        ("policy.lora.r=4", r"policy\.lora: saved none"),
    ],
)
def test_a_setting_other_than_a_saved_run_s_is_refused(
    make_run: MakeRun, finished: bool, override: str, field: str
) -> None:
    save_run(file := make_run(), finished=finished)
    with pytest.raises(IdentityError, match=rf"saved by a run with other settings\. It differs in {field}"):
        refuse_other_settings(load_config(file, [*SAVED, override]), 1)


@pytest.mark.parametrize(
    "override",
    ["train.logging_steps=3", "train.max_steps=9", "train.optim=adamw_torch_fused", "train.output_dir=another"],
)
def test_what_may_change_passes_and_so_does_what_the_full_command_compares(make_run: MakeRun, override: str) -> None:
    save_run(file := make_run(), finished=False)
    for more in ((), ("data.max_length=64",), ("data.path=moved.jsonl",), ("data.template_date=2026-01-01",)):
        refuse_other_settings(load_config(file, [*SAVED, override, *more]), 1)


def test_as_many_pairs_a_step_in_another_number_of_processes_pass(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(file := make_run(train={"gradient_accumulation_steps": 4}), finished=False)
    half = load_config(file, [*SAVED, "train.gradient_accumulation_steps=2"])
    refuse_other_settings(half, 2)
    with pytest.raises(IdentityError, match="processes x gradient_accumulation_steps: saved 4, this run 2"):
        refuse_other_settings(half, 1)
    # Only the libraries know how many processes a launcher has started.
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_other_settings(half, 1)


def test_replies_need_the_folder_of_a_run_and_a_set_that_it_has(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a run's folder"):
        settings_of_run(tmp_path)
    (tmp_path / "refshard.yaml").write_bytes(make_run().read_bytes())
    assert settings_of_run(tmp_path, "train").data.path
    with pytest.raises(ConfigError, match=r"--set tset: data\.eval names no such set"):
        settings_of_run(tmp_path, "tset")


def test_the_commands_answer_a_wrong_field_or_a_missing_file_without_torch(make_run: MakeRun) -> None:
    save_run(make_run(), finished=False)
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
        "found = CliRunner().invoke(main, ['train', *given, '-o', 'loss.type=simpo'])\n"
        "assert 'loss.type: saved ' in str(found.exception), found.exception\n"
        "found = CliRunner().invoke(main, ['check', *given, '--hardware', 'tpu'])\n"
        "assert '--hardware: must be here' in str(found.exception), found.exception\n"
        "found = CliRunner().invoke(main, ['export', 'out', *given])\n"
        "assert 'no shards there' in str(found.exception), found.exception\n"
        "for command in (['export', 'out'], ['explain', '--row', '0']):\n"
        "    found = CliRunner().invoke(main, [*command, *given, '-o', 'policy.model=./nowhere'])\n"
        "    assert 'no such' in str(found.exception) or 'no shards' in str(found.exception), found.exception\n"
        "CliRunner().invoke(main, ['generate', '.'])\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
