"""The precision of policy and reference, as the settings name it."""

from pathlib import Path

import pytest

from pipeline.base.errors import ConfigError
from pipeline.base.files import read_json, write_json
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.models.files import policy_as_reference
from pipeline.models.identity import check_dtypes, precisions_apart
from pipeline.models.precision import Precision, policy_precision, recorded_precision, reference_precision


@pytest.fixture
def config_file(tmp_path: Path, model_folder: Path) -> Path:
    """Settings of a run whose policy's checkpoint, and another model's, say that they are bfloat16."""
    for name in ("own", "other"):
        folder = tmp_path / name
        folder.mkdir()
        for file in model_folder.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "config.json").unlink()
        write_json(folder / "config.json", {**read_json(model_folder / "config.json"), "dtype": "bfloat16"})
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {{path: pairs.jsonl}}\npolicy: {{model: {tmp_path / 'own'}}}\nprecompute: {{output: shards}}\n"
        "train: {output_dir: policy}\n"
    )
    return file


def settings(file: Path, *overrides: str) -> Config:
    return load_config(file, overrides)


@pytest.mark.parametrize(
    ("overrides", "weights", "autocast"),
    [
        ([], "float32", None),
        (["train.bf16=true"], "float32", "bfloat16"),
        (["train.fp16=true"], "float32", "float16"),
        (["policy.dtype=bfloat16"], "bfloat16", None),
        (["policy.dtype=bfloat16", "train.bf16=true"], "bfloat16", "bfloat16"),
        (["policy.dtype=auto", "train.bf16=true"], "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("other", [False, True], ids=["own reference", "another model"])
def test_the_reference_computes_as_the_policy(
    config_file: Path, other: bool, overrides: list[str], weights: str, autocast: str | None
) -> None:
    named = [f"reference.model={config_file.parent / 'other'}"] if other else []
    config = settings(config_file, *overrides, *named)
    found = Precision(weights=weights, autocast=autocast)
    assert reference_precision(config) == policy_precision(config) == found
    # So does a trained policy that is scored again.
    assert reference_precision(policy_as_reference(config, config_file.parent)) == found
    assert precisions_apart(config) is None


@pytest.mark.parametrize(
    ("overrides", "reference"),
    [
        (["reference.dtype=bfloat16"], Precision(weights="bfloat16")),
        (["reference.dtype=bfloat16", "train.bf16=true"], Precision(weights="bfloat16")),
        (["reference.dtype=float32", "reference.autocast=float16"], Precision(weights="float32", autocast="float16")),
        (["reference.autocast=bfloat16"], Precision(weights="float32", autocast="bfloat16")),
    ],
)
def test_a_named_dtype_is_without_the_policys_autocast(
    config_file: Path, overrides: list[str], reference: Precision
) -> None:
    config = settings(config_file, *overrides)
    assert reference_precision(config) == reference
    assert precisions_apart(config) == (reference, policy_precision(config))
    check_dtypes(config)


def test_a_reference_of_more_digits_than_its_policy_is_refused(config_file: Path) -> None:
    words = ("reference.dtype=float32", "train.bf16=true")
    with pytest.raises(ConfigError, match=r"reference\.dtype: must be left out, or be no wider than float32 under bfl"):
        check_dtypes(settings(config_file, *words))
    check_dtypes(settings(config_file, *words, "train.on_mismatch=warn"))
    # Naming what `auto` gives sets nothing apart.
    assert precisions_apart(settings(config_file, "reference.dtype=float32")) is None


def test_a_manifest_gives_its_precision_back() -> None:
    assert recorded_precision({"dtype": "bfloat16"}) == Precision(weights="bfloat16")
    under = recorded_precision({"dtype": "float32", "autocast": "bfloat16"})
    assert str(under) == "float32 under bfloat16 autocast"
    assert (under.products, under.bits) == ("bfloat16", 8)
    assert recorded_precision({"declared": "judge"}) == Precision(weights="float32")
