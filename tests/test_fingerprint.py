"""What enters the identity, what does not, and how a mismatch is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from pipeline.config import Config, load_config
from pipeline.fingerprint import differences, fingerprint_of, identity_of_run
from pipeline.models import load_tokenizer


@pytest.fixture
def config_file(tmp_path: Path, model_folder: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {{path: pairs.jsonl}}\npolicy: {{model: {model_folder}}}\nprecompute: {{output: shards}}\n"
        f"train: {{output_dir: policy}}\n"
    )
    return file


def identity(file: Path, *overrides: str) -> dict[str, Any]:
    config: Config = load_config(file, overrides)
    return identity_of_run(config, load_tokenizer(config))


@pytest.mark.parametrize(
    "override",
    [
        "loss.beta=0.5",
        "train.learning_rate=1e-3",
        "train.seed=7",
        "train.output_dir=elsewhere",
        "policy.lora={r: 64}",
        "policy.dtype=bfloat16",
        "precompute.output=elsewhere",
        "precompute.tokens_per_batch=99",
        "precompute.rows_per_shard=99",
        "data.path=other.jsonl",
        "data.split=train[5:]",
        "reference.dtype=float32",
    ],
)
def test_what_no_log_prob_depends_on_leaves_the_fingerprint(config_file: Path, override: str) -> None:
    assert fingerprint_of(identity(config_file, override)) == fingerprint_of(identity(config_file))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.max_length=77", "tokenization.max_length"),
        ("data.max_length=null", "tokenization.max_length"),
        ("reference.dtype=bfloat16", "reference.dtype"),
        ("precompute.token_logps=false", "tokenization.token_logps"),
    ],
)
def test_what_a_log_prob_depends_on_changes_it_by_name(config_file: Path, override: str, field: str) -> None:
    a, b = identity(config_file), identity(config_file, override)
    assert fingerprint_of(a) != fingerprint_of(b)
    (found,) = differences(a, b, joining=False)
    assert found.startswith(f"{field}: ")


def test_a_moved_or_copied_model_is_the_same_and_one_changed_weight_is_not(
    config_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    override = f"policy.model={copy}"
    assert identity(config_file, override) == identity(config_file)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert [
        d.split(":")[0] for d in differences(identity(config_file), identity(config_file, override), joining=True)
    ] == ["reference.weights"]


def test_a_config_field_of_the_forward_pass_counts_and_one_of_bookkeeping_does_not(
    config_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    content = json.loads((copy / "config.json").read_text())
    override = f"policy.model={copy}"
    (copy / "config.json").write_text(json.dumps({**content, "transformers_version": "9.9", "use_cache": False}))
    assert identity(config_file, override) == identity(config_file)
    (copy / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 1e-3}))
    assert identity(config_file, override)["reference"]["config"] != identity(config_file)["reference"]["config"]


def test_padding_or_truncating_with_the_tokenizer_does_not_change_it(config_file: Path) -> None:
    config = load_config(config_file)
    tokenizer: Any = load_tokenizer(config)
    before = identity_of_run(config, tokenizer)
    tokenizer(["a", "a b c d e"], padding=True, truncation=True, max_length=2)
    assert identity_of_run(config, tokenizer) == before


def test_another_vocabulary_template_or_special_token_changes_the_tokenization(
    config_file: Path, tmp_path: Path
) -> None:
    base = identity(config_file)["tokenization"]
    changed = {
        "tokenizer": make_tokenizer(bos=False),
        "chat_template": make_tokenizer(bos=True, template="{{ messages[0].content }}"),
    }
    for field, tokenizer in changed.items():
        folder = make_model(tmp_path / field, tokenizer)
        assert identity(config_file, f"policy.model={folder}")["tokenization"][field] != base[field]


def test_a_longer_stored_cut_serves_a_shorter_run_only_where_token_logps_are_stored(config_file: Path) -> None:
    def told(stored: str, run: str, token_logps: str = "true") -> list[str]:
        keep = f"precompute.token_logps={token_logps}"
        return differences(
            identity(config_file, f"data.max_length={stored}", keep),
            identity(config_file, f"data.max_length={run}"),
            joining=True,
        )

    assert told("512", "128") == []
    assert told("null", "128") == []
    assert told("512", "512", "false") == []
    assert "cut shorter" in told("128", "512")[0]
    assert "cut shorter" in told("128", "null")[0]
    assert "no token logps" in told("512", "128", "false")[0]
