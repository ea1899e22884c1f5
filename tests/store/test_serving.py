"""A finished store serves a run that needs less of it, or that it was imported for; other refusals name the way out."""

import copy
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import DataError, IdentityError
from pipeline.base.folders import open_folder
from pipeline.config.data import DataConfig, EvalSetConfig
from pipeline.config.schema import Config, PolicyConfig, PrecomputeConfig, ReferenceConfig
from pipeline.store.format import INDEX, part_name
from pipeline.store.serving import open_stores, remedy_for_missing, serving_store
from pipeline.store.store import create_store, open_store
from support.stores import IDENTITY, PLAN, write_store


def identity_of(max_length: int) -> dict[str, Any]:
    identity = copy.deepcopy(IDENTITY)
    identity["tokenization"]["max_length"] = max_length
    return identity


def serves(folder: Path, identity: dict[str, Any], plan: dict[str, Any], exact: int | None = None) -> bool:
    return serving_store(open_folder(folder), identity, plan, exact) is not None


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "train")
    return tmp_path / "train"


@pytest.fixture
def imported(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pipeline.store.store.Store.is_imported", True)
    return store


def test_a_store_of_longer_pairs_serves_a_smaller_length_as_long_as_it_is_whole(store: Path) -> None:
    assert serves(store, identity_of(32), PLAN)
    assert not serves(store, identity_of(128), PLAN)
    assert not serves(store, identity_of(32), PLAN, exact=48)
    assert not serves(store, identity_of(32), {**PLAN, "rows": "0:10"})
    (store / part_name(1)).unlink()
    assert not serves(store, identity_of(32), PLAN)


def test_a_store_of_this_run_and_an_unfinished_one_are_continued(store: Path) -> None:
    assert not serves(store, IDENTITY, PLAN)
    (store / INDEX).unlink()
    assert not serves(store, identity_of(32), PLAN)
    assert not serves(store.parent / "none", IDENTITY, PLAN)


def test_an_imported_store_serves_whatever_the_plan(imported: Path) -> None:
    assert serves(imported, IDENTITY, {"rows_per_shard": 9})
    assert not serves(imported, identity_of(128), PLAN)
    assert "refshard import --overwrite" in remedy_for_missing(open_store(imported))


def config_of(output: Path, **reference: Any) -> Config:
    return Config(
        data=DataConfig(path="unused", eval={"test": EvalSetConfig()}),
        policy=PolicyConfig(model="unused"),
        precompute=PrecomputeConfig(output=str(output)),
        reference=ReferenceConfig(**reference),
    )


def test_a_set_without_a_store_is_refused_with_the_command_that_makes_it(store: Path) -> None:
    with pytest.raises(DataError, match=r"test: no shards there\. Run: refshard precompute --config F$"):
        open_stores(config_of(store.parent), ["train", "test"])
    with pytest.raises(DataError, match=r"Run: refshard import FILE --config F --set test$"):
        open_stores(config_of(store.parent, declared="judge"), ["train", "test"])


def test_beside_an_imported_store_both_commands_are_named(imported: Path) -> None:
    with pytest.raises(DataError, match=r"Run: refshard import FILE --config F --set test, or refshard precompute"):
        open_stores(config_of(imported.parent), ["train", "test"])


def test_another_dataset_is_answered_with_reuse_and_another_reference_is_not(store: Path) -> None:
    with pytest.raises(IdentityError, match=rf"precompute\.reuse: \[{store}\], which copies the pairs"):
        create_store(store, IDENTITY, {**PLAN, "dataset": {"pairs.jsonl": "new"}}, {})
    with pytest.raises(IdentityError) as refused:
        create_store(store, identity_of(128), PLAN, {})
    assert "reuse" not in str(refused.value)
    assert f"precompute.reuse: [{store}]" in remedy_for_missing(open_store(store))
