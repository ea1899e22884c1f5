"""Every settings file of these tests, right or wrong, is shown to the schema for editors too."""

import functools
from typing import Any

import pytest

from pipeline.base.errors import ConfigError
from pipeline.config import convert, reader
from pipeline.config.training import TrainSection
from support.wrong_settings import fits, require_agreement

SMALLEST = {"data": {"path": "pairs.jsonl"}, "policy": {"model": "m"}, "precompute": {"output": "out"}}


@pytest.fixture(autouse=True)
def _the_schema_agrees_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    options_of: Any = TrainSection.options.func  # type: ignore[attr-defined]

    def converted(tree: Any, hint: Any, where: str) -> Any:
        try:
            config = convert.convert(tree, hint, where)
        except ConfigError as error:
            require_agreement(tree, str(error))
            raise
        # The library's fields are converted when they are asked for.
        assert fits({**tree, "train": {}}), "the schema refuses what the commands take"
        return config

    def options(section: TrainSection) -> Any:
        tree = {**SMALLEST, "train": section.as_dict()}
        try:
            found = options_of(section)
        except ConfigError as error:
            require_agreement(tree, str(error))
            raise
        assert fits(tree), "the schema refuses what the commands take"
        return found

    cached = functools.cached_property(options)
    cached.__set_name__(TrainSection, "options")
    monkeypatch.setattr(reader, "convert", converted)
    monkeypatch.setattr(TrainSection, "options", cached)
