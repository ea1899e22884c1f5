"""Keys of other trainers and misspelled ones are answered with the right key."""

import dataclasses
import typing

import pytest
import transformers

from pipeline.config.names import NAMES_ELSEWHERE, NOT_NEEDED, hint_for_key, hint_for_value
from pipeline.config.schema import Config
from pipeline.config.training import TrainSection

DTYPES = ("auto", "float32", "bfloat16", "float16")


def exists(path: str) -> bool:
    """Return True if a file of settings may hold the key."""
    kind: typing.Any = Config
    for name in path.split("."):
        if kind is TrainSection:
            return name in {f.name for f in dataclasses.fields(transformers.TrainingArguments)} | {
                f.name for f in dataclasses.fields(TrainSection)
            }
        if name not in {f.name for f in dataclasses.fields(kind)}:
            return False
        hint = typing.get_type_hints(kind)[name]
        kind = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
    return True


@pytest.mark.parametrize("path", NAMES_ELSEWHERE)
def test_each_key_that_is_suggested_exists(path: str) -> None:
    assert exists(path)
    assert not exists("policy.lora.rank")


def test_a_name_stands_for_one_key() -> None:
    names = [name for names in NAMES_ELSEWHERE.values() for name in names]
    assert len(names) == len(set(names)) and not set(names) & NOT_NEEDED.keys()


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("policy.lora", "rank", "; did you mean policy.lora.r?"),
        ("", "cutoff_len", "; did you mean data.max_length?"),
        ("train", "lr", "; did you mean train.learning_rate?"),
        ("train", "beta", "; did you mean loss.beta?"),
        ("train", "packing", "; batches never have padding. Leave it out"),
        ("loss", "bata", "; did you mean loss.beta?"),
        ("loss", "xyz", "; known: type, beta"),
        ("train", "warmup_ratio", "; did you mean train.warmup_steps? A value below 1 is a share of all steps"),
        ("", "weight_decay", "; did you mean train.weight_decay?"),
        ("", "adapter", "; did you mean policy.adapter?"),
    ],
)
def test_a_key_is_answered_with_its_name_here(section: str, key: str, hint: str) -> None:
    assert hint_for_key(section, key, ("type", "beta")) == hint


@pytest.mark.parametrize(
    ("value", "hint"),
    [("bf16", ". Set d: bfloat16"), ("fp32", ". Set d: float32"), ("bfloat", ". Set d: bfloat16"), ("int8", "")],
)
def test_a_dtype_is_answered_with_its_name_here(value: str, hint: str) -> None:
    assert hint_for_value(value, DTYPES, "d") == hint


def test_a_loss_without_pairs_or_reference_is_not_taken_for_another() -> None:
    assert "not there" in hint_for_value("kto", ["sigmoid", "ipo"], "loss.type")
    assert hint_for_value("dpo", ["sigmoid", "ipo"], "loss.type") == ". Set loss.type: sigmoid"
