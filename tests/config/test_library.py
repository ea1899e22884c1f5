"""The fields of TrainingArguments as its source has them, beside the class itself."""

import dataclasses
import typing
from enum import Enum
from typing import Any, Literal

import pytest
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config import library
from pipeline.config.library import defaults_of_training, fields_of_training, hint_of_field
from pipeline.config.training import TrainSection

OF_CLASS = typing.get_type_hints(transformers.TrainingArguments)


def words(hint: Any) -> set[str]:
    """Every word of the enums in a type."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {member.value for member in hint}
    return {word for inner in typing.get_args(hint) for word in words(inner)}


def test_the_source_has_the_fields_of_the_class() -> None:
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.init}
    assert set(fields_of_training()) == fields


def test_the_source_has_the_defaults_of_the_class() -> None:
    """Also the one that depends on torch's version."""
    assert library._read().defaults is not None
    assert defaults_of_training() == library._defaults_of_class()


@pytest.mark.parametrize("name", sorted(fields_of_training()))
def test_a_field_has_the_type_that_the_class_declares_or_the_words_of_its_enum(name: str) -> None:
    known, hint = words(OF_CLASS[name]), hint_of_field(name)
    if known and typing.get_origin(hint) is Literal:
        assert set(typing.get_args(hint)) == known
    elif known:
        assert all(word in repr(hint) for word in known)
    else:
        assert hint == OF_CLASS[name]


@pytest.mark.parametrize(
    "source",
    [
        "class TrainingArguments(Base):\n    seed: int = 1",
        "class TrainingArguments:\n    seed: int = field(default=of())",
    ],
)
def test_a_class_whose_fields_or_defaults_are_elsewhere_is_asked_itself(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(library, "_sources", lambda: [source])
    library._read.cache_clear()
    try:
        assert ("learning_rate" in fields_of_training()) == ("Base" in source)
        assert hint_of_field("seed") is int
        assert defaults_of_training()["seed"] == 42
    finally:
        library._read.cache_clear()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eval_strategy", "stepss", "must be one of no, steps, epoch, got 'stepss'. Set train.eval_strategy: steps"),
        ("lr_scheduler_type", "cosin", "Set train.lr_scheduler_type: cosine"),
        ("optim", "adamw_torhc", "Set train.optim: adamw_torch"),
    ],
)
def test_a_word_that_a_field_does_not_take_is_answered_with_the_nearest(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _ = TrainSection(output_dir="run", given={key: value}).options
    assert str(caught.value).startswith(f"train.{key}: must be one of ")
    assert str(caught.value).endswith(message)
