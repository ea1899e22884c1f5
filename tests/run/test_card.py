"""The model card: what the policy was trained on is in it, and no name can break out of its place."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.versions import library_versions
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config, PolicyConfig, PrecomputeConfig
from pipeline.config.training import TrainSection
from pipeline.run import card as card_module
from pipeline.run.card import model_card
from pipeline.run.inputs import PolicyInputs, ReferenceInputs, RunInputs, SetInputs

ARGUMENTS: dict[str, Any] = {
    "name": "policy",
    "base_model": "models/base",
    "reference": "models/reference",
    "dataset": "data/pairs.jsonl",
    "pairs": 12345,
    "adapter": None,
    "metrics": {"eval_loss": 0.65432, "eval_runtime": 3.0},
    "steps": (4, 10),
}


def card_of(*, base_model: str, reference: str, dataset: str, adapter: str | None, **options: Any) -> str:
    config = Config(
        data=DataConfig(path=dataset, format="hub"),
        policy=PolicyConfig(model=base_model),
        precompute=PrecomputeConfig(output="shards"),
        train=TrainSection(output_dir="policy", given={"learning_rate": "5e-7", "max_steps": "10"}),
    )
    inputs = RunInputs(
        reference=ReferenceInputs(name=reference, identity={}, fingerprint="f" * 64),
        policy=PolicyInputs(model=base_model, adapter=adapter, dtype=None, parameters=2, trained_parameters=1),
        sets={
            "train": SetInputs(
                dataset=dataset, ledger={}, matched=12345, missing=0, tokens={}, store="shards", noise=None
            )
        },
        stage_one=[],
    )
    # A hub name that would be refused when the pairs are read.
    source = SimpleNamespace(format="hub", path=dataset)
    with mock.patch.object(card_module, "open_source", lambda data, name: source):
        return model_card(config, inputs, **options)


def split(card: str) -> tuple[dict[str, Any], str]:
    """Header, as the hub finds it (between the first two lines of three dashes), and text."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), card[match.end() :]


def cells(line: str) -> list[str]:
    """Split a table row at its pipes, but for those that a backslash escapes."""
    return ["".join(found) for found in re.findall(r"((?:\\.|[^|\\])*)\|", line)][1:]


def shape(card: str) -> list[Any]:
    """What a name must not change: per line, the number of cells, or the kind of the line."""
    _, text = split(card)
    return [len(cells(line)) if line.startswith("|") else re.match("#*", line)[0] for line in text.splitlines()]  # type: ignore[index]


def test_the_card_names_data_reference_fingerprint_and_beta() -> None:
    _, text = split(card_of(**ARGUMENTS))
    rows = {tuple(cell.strip() for cell in cells(line)) for line in text.splitlines() if line.startswith("|")}
    assert rows >= {
        ("data", "`data/pairs.jsonl`, 12,345 pairs"),
        ("reference", "`models/reference`"),
        ("fingerprint of the reference log-probs", f"`{'f' * 64}`"),
        ("loss", "`sigmoid`, beta 0.1"),
        ("learning\\_rate", "`5e-07`"),
        ("policy before training", "`models/base`"),
        ("trained weights", "all"),
        ("`eval_loss`", "0.6543"),
    }
    assert all(f"{library} {version}" in text for library, version in library_versions().items())
    assert "runtime" not in text
    assert "# policy" in text.splitlines()


def test_the_header_is_yaml_that_the_hub_knows() -> None:
    header, _ = split(card_of(**ARGUMENTS))
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "refshard", "preference-optimization"],
        "base_model": "models/base",
        "datasets": ["data/pairs.jsonl"],
    }
    header, text = split(card_of(**{**ARGUMENTS, "adapter": "LoRA, rank 8"}))
    assert header["library_name"] == "peft"
    assert "`LoRA, rank 8`" in text


def test_a_card_without_evaluation_has_no_table_of_it() -> None:
    assert "Held-out" not in card_of(**{**ARGUMENTS, "metrics": {}})


HOSTILE = [
    "a`b``c```",
    "a | b || c",
    "a\\|b\\",
    "a\\\\|b",
    "a\n---\nlicense: evil\n---\n# title",
    "a\r\n\r\n| x | y |",
    "---",
    "# title",
    '"quoted": {yaml: [1, 2]}',
    "' - a: &x *x !!python/object",
    "<script>alert(1)</script><!--",
    "[text](javascript:alert(1)) ![x](y)",
    "*bold* _it_ **",
    "next\u0085line\u2028and\u2029more\x0b\x0c\x1c",
    "",
]

NAMED = ["name", "base_model", "reference", "dataset", "adapter"]


def with_names(hostile: str) -> dict[str, Any]:
    return {
        **ARGUMENTS,
        **dict.fromkeys(NAMED, hostile),
        "metrics": {hostile: 0.5},
    }


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_name_stays_in_its_cell_and_out_of_the_header(hostile: str) -> None:
    card, plain = card_of(**with_names(hostile)), card_of(**with_names("plain"))
    assert shape(card) == shape(plain)
    header, harmless = split(card)[0], split(plain)[0]
    # No adapter: other weights were trained. A folder is no name on the hub.
    named = {"library_name": "", "base_model": hostile, "datasets": [hostile]}
    assert {**header, **named} == {**harmless, **named}


@given(hostile=st.text(alphabet="a`|\\\n-#<>[]*_& ", max_size=12))
@settings(max_examples=200, deadline=None)
def test_no_mix_of_markup_changes_the_cards_shape(hostile: str) -> None:
    assert shape(card_of(**with_names(hostile))) == shape(card_of(**with_names("plain")))


@given(hostile=st.text(alphabet="a`|\\\n-#<>[]*_& ", max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_name_in_code_never_ends_its_code(hostile: str) -> None:
    text = split(card_of(**{**ARGUMENTS, "reference": hostile}))[1]
    line = next(line for line in text.splitlines() if line.startswith("| reference |"))
    assert line.count("`") == 2
    assert "<script" not in split(card_of(**{**ARGUMENTS, "name": "<script>"}))[1].replace("\\<", "")


@pytest.mark.parametrize("hostile", [*HOSTILE[:-1], "tab\there", "émoji 🦊"])
def test_hub_names_come_back_from_the_header_as_they_were(hostile: str) -> None:
    header, _ = split(card_of(**{**ARGUMENTS, "base_model": hostile, "dataset": hostile}))
    assert header["base_model"] == hostile
    assert header["datasets"] == [hostile]
    assert header.keys() == {"library_name", "pipeline_tag", "tags", "base_model", "datasets"}


def test_the_hub_gets_names_and_no_paths(tmp_path: Path) -> None:
    header, _ = split(card_of(**{**ARGUMENTS, "base_model": str(tmp_path)}))
    assert "base_model" not in header
