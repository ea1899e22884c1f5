"""`refshard merge`: one plain model of a run's adapter and base, whole or not at all, and of no other base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from pipeline.base.errors import (
    ConfigError,
    DataError,
    IdentityError,
    RefshardError,
    StorageError,
    UnfinishedError,
)
from pipeline.config.reader import load_config
from pipeline.models.loading import load_policy
from pipeline.run.identity import identity_of_base
from stages.merge import command
from support.models import make_model
from support.runs import simple_rows, write_jsonl, write_settings

CARD = "---\nlibrary_name: peft\ntags:\n- dpo\n---\n\n# run\n\nTrained by refshard.\n"


@pytest.fixture
def run(tmp_path: Path, tokenizer: Any) -> Path:
    """A finished run whose adapter changes log-probs by nats; its base has a template and a generation config."""
    base = make_model(tmp_path / "base", tokenizer, num_hidden_layers=1)
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    transformers.GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(base)
    data = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(4))
    folder = tmp_path / "runs" / "run"
    write_settings(
        folder,
        data={"path": str(data)},
        policy={"model": str(base), "lora": {"r": 4}},
        precompute={"output": str(tmp_path / "runs" / "shards")},
        train={"output_dir": str(folder), "use_cpu": True},
    )
    config = load_config(folder / "refshard.yaml")
    policy = load_policy(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    policy.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "run.json").write_text(
        json.dumps({"finished": True, "step": 4, "identity": {"policy_base": identity_of_base(config)}})
    )
    return folder


def test_the_model_is_whole_and_its_agreement_is_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    command.run(run, tmp_path / "new" / "merged", sample=3)
    merged = tmp_path / "new" / "merged"
    said = capsys.readouterr().out
    assert "3 pairs scored by both models: token log-probs differ by" in said
    assert f"The merged model is in {merged} (float32, " in said
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert not (merged / "adapter_config.json").exists() and model.generation_config.temperature == 0.3
    assert transformers.AutoTokenizer.from_pretrained(merged).chat_template == "{{ messages[0]['content'] }}"
    card = (merged / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"library_name": "transformers", "tags": ["dpo"]}
    assert "Trained by refshard." in card and f"merged into `{tmp_path / 'base'}`, in float32" in card
    assert "Compared with the unmerged policy: token log-probs differ by" in card
    assert {file: file.read_bytes() for file in before} == before
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


def test_large_weights_are_split_and_the_dtype_is_the_one_asked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_SHARD", "40KB")
    command.run(run, tmp_path / "merged", dtype="bfloat16", sample=0)
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 1
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert "Compared" not in (tmp_path / "merged" / "README.md").read_text()


def test_another_model_than_the_runs_is_not_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(*args: Any) -> Any:
        model = command_load(*args)
        for parameter in model.parameters():
            parameter.data /= 2
        return model

    command_load = command.load_merged
    monkeypatch.setattr(command, "load_merged", halved)
    said = "must score as the run's policy, got other log-probs: token log-probs differ"
    with pytest.raises(DataError, match=f"{said}.* Load the adapter with PEFT instead$"):
        command.run(run, tmp_path / "merged", sample=2)
    with pytest.raises(DataError, match=r"Choose --dtype float32$"):
        command.run(run, tmp_path / "merged", dtype="bfloat16", sample=2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".tmp-", "merged"))]


def test_an_output_that_can_not_be_made_is_refused_before_a_model_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "_logps", load)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        command.run(run, tmp_path / "file" / "merged")


def changed_base(run: Path) -> Path:
    base = Path(yaml.safe_load((run / "refshard.yaml").read_text())["policy"]["model"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    make_model(base, tokenizer, num_hidden_layers=1, seed=1)
    return run


def without_record(run: Path) -> Path:
    (run / "run.json").unlink()
    return run


def trained_whole(run: Path) -> Path:
    settings = yaml.safe_load((run / "refshard.yaml").read_text())
    del settings["policy"]["lora"]
    (run / "refshard.yaml").write_text(yaml.safe_dump(settings))
    return run


def checkpoint_of(run: Path) -> Path:
    return Path(shutil.copytree(run, run / "checkpoint-4", ignore=shutil.ignore_patterns("refshard.yaml", "run.json")))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (changed_base, IdentityError, "must be the one that the adapter was trained on, got another weights"),
        (without_record, UnfinishedError, "must be finished, got a run that is not. Run: refshard train"),
        (trained_whole, ConfigError, "must be a run that trains an adapter, got one that trains all weights"),
        (checkpoint_of, ConfigError, r"must be a run's folder, got a checkpoint of one. Name the run, .*runs/run$"),
        (lambda run: run.parent, ConfigError, r"must be a run's folder, got one without refshard.yaml"),
    ],
)
def test_other_folders_are_refused(
    made: Any, error: type[RefshardError], message: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        command.run(made(run), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("where", ["runs/run/merged", "base/merged", "runs/run", "pairs.jsonl"])
def test_nothing_of_the_users_is_written_to(where: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=r"must (not be, hold or lie|not lie in|be a new folder)"):
        command.run(run, tmp_path / where)
