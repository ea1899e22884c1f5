"""The schema for editors: every ready file fits, and a wrong one that a schema can know does not."""

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.base.errors import ConfigError
from pipeline.config.keys import settings
from pipeline.config.published import _LIMITS, schema_of_settings
from pipeline.config.reader import load_config
from support.wrong_settings import fits

SCHEMA = schema_of_settings()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
RECIPES = sorted(file.name for file in files("stages.recipes").iterdir() if file.name.endswith(".yaml"))
SMALL = {
    "data": {"path": "pairs.jsonl"},
    "policy": {"model": "m"},
    "precompute": {"output": "shards"},
    "train": {"output_dir": "policy"},
}


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_and_tells_the_editor_so(name: str) -> None:
    text = (files("stages.recipes") / name).read_text()
    assert list(VALIDATOR.iter_errors(yaml.safe_load(text))) == []
    assert text.startswith("# yaml-language-server: $schema=refshard.schema.json\n")


def test_every_key_is_there_with_its_meaning() -> None:
    for setting in settings():
        place: Any = SCHEMA
        for name in setting.key.split("."):
            place = next(
                branch["additionalProperties"] if name == "NAME" else branch["properties"][name]
                for branch in (place, *place.get("anyOf", ()))
                if "properties" in branch or "additionalProperties" in branch
            )
        if not setting.key.endswith("NAME"):
            assert place["description"] == setting.meaning


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"output_dir": "p", "learning_rate": "5e-7", "bf16": "yes", "save_strategy": "no", "max_steps": 1e3}},
        {"policy": {"model": "m", "lora": {"r": 8}}, "reference": None},
        {"policy": {"model": "m", "lora": {}}, "precompute": {"output": "s", "token_logps": False}},
        {"data": {"path": "p", "max_length": None, "eval": {"test": {"split": "test"}}}},
        {"loss": {"type": ["sigmoid", "ipo"], "weights": [1.0, "5e-1"]}},
    ],
)
def test_what_the_commands_take_fits(change: dict[str, Any]) -> None:
    assert [error.message for error in VALIDATOR.iter_errors({**SMALL, **change})] == []


@pytest.mark.parametrize(
    "change",
    [
        {"polcy": {}},
        {"policy": {"model": "m", "lora": {"rank": 8}}},
        {"policy": {}},
        {"data": ["pairs.jsonl"]},
        {"data": {"path": "p", "max_length": "long"}},
        {"reference": {"dtype": "float8"}},
        {"loss": {"type": "sigmoidal"}},
        {"loss": {"beta": "high"}},
        {"train": {"output_dir": "p", "lr": 1e-4}},
        {"train": {"output_dir": "p", "learning_rate": "fast"}},
        {"train": {"output_dir": "p", "save_strategy": "sometimes"}},
        {"train": {"output_dir": "p", "hub_token": "x"}},
        {"train": {"output_dir": "p", "remove_unused_columns": True}},
    ],
    ids=str,
)
def test_a_wrong_key_or_value_does_not(change: dict[str, Any]) -> None:
    assert list(VALIDATOR.iter_errors({**SMALL, **change}))


def with_value(key: str, value: float) -> dict[str, Any]:
    """Give the smallest settings with a number, and with the loss that takes it."""
    tree: dict[str, Any] = {name: dict(section) for name, section in SMALL.items()}
    losses = [name for name in ("discopop", "dpop", "beta_dpo", "r_dpo", "simpo", "cpo") if name in key]
    tree["loss"] = {"type": losses[0]} if losses else {}
    if key == "loss.f_alpha_divergence_coef":
        tree["loss"] = {"f_divergence_type": "alpha_divergence"}
    if "NAME" in key:
        tree["data"] = {"sets": {"NAME": {"path": "p"}}}
    *names, last = key.split(".")
    place = tree
    for name in names:
        place = place.setdefault(name, {})
    place[last] = [value] if key == "loss.weights" else value
    return tree


@pytest.mark.parametrize("key", _LIMITS)
def test_the_limits_of_a_number_are_those_of_the_commands(key: str, tmp_path: Path) -> None:
    whole = any(setting.key == key and "int" in str(setting.hint) for setting in settings())
    file = tmp_path / "run.yaml"
    for value in {*(float(limit) for limit in _LIMITS[key].values()), 7.0}:
        for near in (value - 1, value, value + 1) if whole else (value - 1e-3, value, value + 1e-3, math.inf):
            tree = with_value(key, int(near) if whole else near)
            file.write_text(yaml.safe_dump(tree).replace(".inf", "inf"))
            try:
                load_config(file)
            except ConfigError as error:
                assert not fits(yaml.safe_load(file.read_text())), error
            else:
                assert fits(yaml.safe_load(file.read_text())), near
