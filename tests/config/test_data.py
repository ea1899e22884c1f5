"""The `data` section: several training sets in place of one path, and what each set has of its own."""

from typing import Any

import pytest

from pipeline.base.errors import ConfigError
from pipeline.config.data import DataConfig, EvalSetConfig, TrainSetConfig
from pipeline.config.schema import Config, PolicyConfig, PrecomputeConfig, ReferenceConfig, SyncConfig

HH = TrainSetConfig(path="hh.jsonl", columns={"prompt": "question"}, fraction=0.5)
ULTRA = TrainSetConfig(path="org/ultra", revision="v1", split="train[:9]", format="hub")
HELD_OUT = EvalSetConfig(path="test.jsonl", columns={"chosen": "better"})


def test_a_set_has_its_own_settings_and_those_of_data() -> None:
    data = DataConfig(sets={"hh": HH, "ultra": ULTRA}, eval={"test": HELD_OUT}, split="all", max_length=64)
    assert (data.training, data.names) == (("hh", "ultra"), ("hh", "ultra", "test"))
    assert [data.fraction(name) for name in data.names] == [0.5, 1.0, 1.0]
    assert data.of("hh") == DataConfig(path="hh.jsonl", columns={"prompt": "question"}, split="all", max_length=64)
    assert data.of("ultra") == DataConfig(
        path="org/ultra", revision="v1", split="train[:9]", format="hub", max_length=64
    )
    assert data.of("test") == DataConfig(path="test.jsonl", columns={"chosen": "better"}, split="all", max_length=64)
    with pytest.raises(ConfigError, match=r"^--set train: data\.sets and data\.eval name no such set; there are hh, "):
        data.of("train")


def test_a_held_out_set_of_another_repository_has_no_revision_of_the_training_set() -> None:
    data = DataConfig(path="org/a", revision="v1", eval={"own": EvalSetConfig(path="org/b"), "same": EvalSetConfig()})
    assert [data.of(name).revision for name in data.names] == ["v1", None, "v1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "a.jsonl"}, "path: must be left out if data.sets is set. Keep one of the two"),
        ({"revision": "v1"}, "revision: must be left out if data.sets is set"),
        ({"eval": {"test": EvalSetConfig()}}, "eval.test.path: must be set with data.sets, got nothing"),
        ({"eval": {"hh": EvalSetConfig(path="b")}}, "eval.hh: must differ from the names in data.sets, got 'hh'"),
        ({"sets": {"a/b": HH}}, "sets.a/b: must be named by letters"),
        ({"sets": {"costs": HH}}, "sets.costs: must be named by letters"),
        ({"sets": {}}, "path: missing; it has no default"),
    ],
)
def test_sets_that_contradict_other_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        DataConfig(**{"sets": {"hh": HH}, **changes})
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("fraction", [0.0, -1.0, float("inf"), float("nan")])
def test_a_fraction_is_a_positive_number(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"^fraction: must be a positive finite number, got"):
        TrainSetConfig(path="a", fraction=fraction)


def test_a_reference_that_moves_takes_one_set() -> None:
    with pytest.raises(ValueError, match=r"^data\.sets: must be left out if reference\.sync is set\. Write the pairs"):
        Config(
            data=DataConfig(sets={"hh": HH}),
            policy=PolicyConfig(model="m"),
            precompute=PrecomputeConfig(output="o"),
            reference=ReferenceConfig(sync=SyncConfig()),
        )
