"""The public face: it leaves the process as it was, and works wherever it is started."""

import importlib
import os
import signal
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import datasets
import numpy as np
import pytest
import setuptools.config.pyprojecttoml
import torch
import transformers

import refshard
from pipeline.base import signals
from pipeline.base.folders import LocalFolder
from pipeline.base.signals import STOP_SIGNALS, StopFlag, watch_signals
from pipeline.data.intake import KeptPair
from pipeline.store.finishing import finish_store
from pipeline.store.format import ScoredPair
from support.installed import as_installed, folder_of_others
from support.models import make_tokenizer
from support.processes import ROOT
from support.runs import kept, simple_rows, write_jsonl
from support.stores import made_pairs, make_store

running = importlib.import_module("refshard.running")

# Where it is started


def test_all_packages_are_installed_each_once() -> None:
    found = setuptools.config.pyprojecttoml.read_configuration(ROOT / "pyproject.toml", expand=True)["tool"][
        "setuptools"
    ]
    folders = {file.parent.relative_to(ROOT) for top in ("pipeline", "stages") for file in (ROOT / top).rglob("*.py")}
    folders -= {folder for folder in folders if "__pycache__" in folder.parts}
    names = {".".join(folder.parts) for folder in folders}
    assert sorted(found["packages"]) == sorted(names - {"stages.refshard"} | {"refshard"})
    assert Path(found["package-dir"]["refshard"]) == Path("stages/refshard")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "refshard", "recipes"], "ultrafeedback_lora"),
        # As the installed command is, with the working folder on the path.
        (["-c", "import sys; sys.argv = ['refshard', 'recipes']; from refshard.__main__ import main; main()"], "ultra"),
    ],
    ids=["-m", "command"],
)
def test_the_command_works_in_a_folder_with_packages_of_the_same_names(
    words: list[str], said: str, tmp_path: Path
) -> None:
    environment = as_installed(tmp_path / "site")
    folder = folder_of_others(tmp_path / "work")
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stdout, done.stderr


def test_the_import_loads_no_library_and_refuses_a_package_of_the_same_name_that_was_there_before(
    tmp_path: Path,
) -> None:
    code = """
import sys
import refshard
print([name for name in ("torch", "pyarrow", "datasets", "click") if name in sys.modules])
import pipeline, stages
pipeline.__path__ = ["elsewhere"]
del sys.modules["refshard"]
try:
    import refshard
except ImportError as error:
    print(error)
"""
    environment = as_installed(tmp_path / "site")
    folder = folder_of_others(tmp_path / "work")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    loaded, refused = done.stdout.splitlines()
    assert loaded == "[]"
    assert refused.startswith(f"refshard: its package pipeline must be the one in {tmp_path / 'site'}, got another one")


# What it leaves


def test_signals_warnings_and_the_librarys_verbosity_are_as_before() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    level = transformers.logging.get_verbosity()
    with pytest.raises(refshard.DataError), running._visiting():
        flag = watch_signals()
        transformers.logging.set_verbosity_debug()
        os.kill(os.getpid(), signal.SIGINT)
        assert flag and signals.is_stop_requested()
        raise refshard.DataError("damaged")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert transformers.logging.get_verbosity() == level
    assert not signals.is_stop_requested()


@pytest.mark.parametrize(
    ("error", "ours", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), refshard.UnfinishedError, "memory ran out"),
        (
            click.exceptions.Exit(65),
            refshard.RefshardError,
            "another process of this launch has failed, with status 65",
        ),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ],
)
def test_no_error_ends_the_process(error: Exception, ours: type[Exception], said: str) -> None:
    with pytest.raises(ours, match=said), running._visiting():
        raise error


class Model:
    """Stands for a model, of which one in memory is enough."""


@pytest.mark.parametrize(
    "error",
    [refshard.UnfinishedError("stopped as asked"), torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()],
)
def test_an_error_that_a_notebook_keeps_holds_no_model(error: BaseException) -> None:
    models = []

    def stage() -> None:
        model = Model()
        models.append(weakref.ref(model))
        raise error

    with pytest.raises((refshard.UnfinishedError, KeyboardInterrupt)) as kept, running._visiting():
        stage()
    assert kept.value.__traceback__ is not None and models[0]() is None


def test_a_reference_that_moves_is_refused(make_run: Callable[..., Path]) -> None:
    config = make_run(reference={"sync": {"steps": 2}})
    for stage in (refshard.precompute, refshard.train):
        with pytest.raises(refshard.ConfigError, match=r"^reference\.sync: must be left out here"):
            stage(config)


def test_a_loss_without_a_reference_has_no_stores(make_run: Callable[..., Path]) -> None:
    assert refshard.precompute(make_run(loss={"type": "simpo"})) == {}


def test_a_process_of_several_waits_for_the_others_shards_until_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LocalFolder(make_store(tmp_path / "train", [made_pairs(2)], finish=False))
    running._wait_for_others([folder])
    looks = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            finish_store(folder, 1)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(running, "time", types.SimpleNamespace(sleep=look))
    running._wait_for_others([folder])
    assert len(looks) == 2
    (tmp_path / "train" / "index.json").unlink()
    monkeypatch.setattr(signals, "_watched", StopFlag(0))
    with pytest.raises(refshard.UnfinishedError, match="stopped as asked; the finished units are saved"):
        running._wait_for_others([folder])


# Stores


def test_a_store_gives_its_pairs_part_by_part(tmp_path: Path) -> None:
    pairs = made_pairs(5)
    make_store(tmp_path / "out" / "train", [pairs[:3], pairs[3:]])
    store = refshard.open_store(tmp_path / "out")
    assert len(store) == 5 and repr(store) == f"Store('{tmp_path / 'out' / 'train'}', 5 pairs)"
    batches = list(store.pairs())
    assert [batch.num_rows for batch in batches] == [3, 2]
    found = [row for batch in batches for row in batch.to_pylist()]
    for pair, row in zip(pairs, found, strict=True):
        assert (row["pair_key"], row["row"]) == (pair.key, pair.row)
        assert row["chosen_token_logps"] == pair.chosen_token_logps.tolist()
    assert [batch.schema.names for batch in store.pairs(["row"])] == [["row"], ["row"]]
    with pytest.raises(refshard.ConfigError, match=r"^columns: must be names of pair_key, row, .*, got 'logps'"):
        list(store.pairs(["row", "logps"]))


def test_a_folder_of_several_stores_or_of_an_unfinished_one_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "train", [made_pairs(2)])
    make_store(tmp_path / "test", [made_pairs(2)], finish=False)
    with pytest.raises(refshard.DataError, match=r"must be one store, got .*train, .*test\. Name one of them"):
        refshard.open_store(tmp_path)
    with pytest.raises(refshard.UnfinishedError):
        refshard.open_store(tmp_path / "test")


# Columns


@pytest.fixture
def scored(tmp_path: Path, tokenizer: Any, model_folder: Path) -> tuple[Any, list[KeptPair]]:
    """A store of six pairs, whose log-probs are their rows' numbers."""
    from pipeline.config.data import DataConfig
    from pipeline.config.schema import Config, PolicyConfig, PrecomputeConfig

    write_jsonl(tmp_path / "pairs.jsonl", simple_rows(6))
    config = Config(
        data=DataConfig(path=str(tmp_path / "pairs.jsonl"), max_length=64),
        policy=PolicyConfig(model=str(model_folder)),
        precompute=PrecomputeConfig(output="unused"),
    )
    pairs = kept(config)
    scores = [
        ScoredPair(
            key=pair.key,
            row=pair.row,
            prompt_tokens=len(pair.pair.prompt_ids),
            chosen_token_logps=np.array([-pair.row], np.float32),
            rejected_token_logps=np.array([-10 - pair.row], np.float32),
        )
        for pair in pairs
    ]
    make_store(tmp_path / "store", [scores])
    return refshard.open_store(tmp_path / "store"), pairs


def test_columns_are_added_by_content(scored: tuple[Any, list[KeptPair]], tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_list(simple_rows(6)).shuffle(seed=1).select(range(4)).with_format("numpy")
    added = refshard.reference_columns(dataset, scored[0], tokenizer)
    assert added.column_names == ["prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps"]
    assert str(added.features["ref_chosen_logps"].dtype) == "float32"
    numbers = [int(str(row["prompt"]).split()[2]) for row in added]
    assert sorted(numbers) != numbers
    assert [row["ref_chosen_logps"] for row in added] == [-n for n in numbers]
    assert [row["ref_rejected_logps"] for row in added] == [-10 - n for n in numbers]


def test_rows_that_were_not_scored_are_told_or_dropped_and_get_no_number(
    scored: tuple[Any, list[KeptPair]], tokenizer: Any
) -> None:
    store, rows = scored[0], simple_rows(8)
    rows[1]["rejected"] = ""
    dataset = datasets.Dataset.from_list(rows)
    with pytest.raises(refshard.DataError, match=r"got 3 rows without log-probs in it \(first: row 1; row 1: .*empty"):
        refshard.reference_columns(dataset, store, tokenizer)
    added = refshard.reference_columns(dataset, store, tokenizer, on_missing="drop")
    assert added["ref_chosen_logps"][:] == [0, -2, -3, -4, -5]
    with pytest.raises(refshard.ConfigError, match=r"^on_missing: must be 'stop' or 'drop', got 'warn'"):
        refshard.reference_columns(dataset, store, tokenizer, on_missing="warn")  # type: ignore[arg-type]
    with pytest.raises(refshard.DataError, match=r"The tokenizer is another one than the store's: .*eos"):
        refshard.reference_columns(dataset, store, make_tokenizer(bos=False))


def test_other_kinds_of_datasets_and_columns_that_are_there_are_refused(
    scored: tuple[Any, list[KeptPair]], tokenizer: Any
) -> None:
    dataset = datasets.Dataset.from_list([{**row, "ref_chosen_logps": 0.0} for row in simple_rows(2)])
    with pytest.raises(refshard.ConfigError, match="must not have the column ref_chosen_logps yet"):
        refshard.reference_columns(dataset, scored[0], tokenizer)
    with pytest.raises(refshard.ConfigError, match=r"must be a datasets\.Dataset, got DatasetDict. Name one"):
        refshard.reference_columns(datasets.DatasetDict(train=dataset), scored[0], tokenizer)
