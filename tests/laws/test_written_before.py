"""Stores and runs that earlier versions wrote: this one reads them, and resumes them to the same numbers.

Everything goes through the command line, in a copy of the folder that the earlier version has left.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support.processes import ROOT, Command

WRITTEN = sorted((ROOT / "tests" / "data").glob("written_by_*"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=WRITTEN, ids=lambda folder: folder.name)
def written(request: pytest.FixtureRequest) -> Path:
    """Give the folder that an earlier version has left."""
    return Path(request.param)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Copy that folder, to be the working folder of commands."""
    return Path(shutil.copytree(written, tmp_path / "elsewhere"))


def refshard(folder: Path, *words: str) -> str:
    """Run a command of refshard in the folder, on the CPU and on one thread; give what it prints."""
    command = Command(*words, folder=folder, environment={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    status = command.wait()
    out, err = command.said()
    assert status == 0, f"exit {status}\n{out}\n{err}"
    return out


def files_in(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read(file: Path) -> Any:
    """Read a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def made_elsewhere(made_with: dict[str, str]) -> bool:
    """Say whether another processor or library has made the numbers, so that their last digits may differ."""
    now = {"processor": torch.backends.cpu.get_cpu_capability()}
    now |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return any(made_with[key] != value for key, value in now.items())


def test_a_store_is_whole_and_says_what_it_holds(folder: Path) -> None:
    before = files_in(folder)
    assert refshard(folder, "verify", "shards").count("  whole  ") == 2
    stores = {store["store"]: store for store in json.loads(refshard(folder, "inspect", "shards", "--json"))}
    found = {name: (store["finished"], store["parts"], store["pairs"]) for name, store in stores.items()}
    assert found == {"shards/train": (True, 3, 12), "shards/heldout": (True, 1, 4)}
    assert files_in(folder) == before


def test_stage_one_finds_the_store_finished_and_scores_nothing(folder: Path) -> None:
    before = files_in(folder)
    refshard(folder, "precompute", "--config", "run.yaml")
    # What scoring had cost would be in a file of its own.
    assert files_in(folder) == before


def test_stage_two_goes_on_from_the_checkpoint_to_the_same_policy(folder: Path) -> None:
    expected = read(folder / "expected.json")
    assert not (folder / "policy" / "run.json").exists()
    refshard(folder, "train", "--config", "run.yaml")

    log = [json.loads(line) for line in (folder / "policy" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log if line["kind"] == "start"] == [0, 3]
    assert read(folder / "policy" / "run.json")["finished"] is True
    history = read(folder / "policy" / "trainer_state.json")["log_history"]
    for kind, key in (("losses", "loss"), ("eval_losses", "eval_loss")):
        assert [entry[key] for entry in history if key in entry] == pytest.approx(expected[kind], rel=1e-4)
    if made_elsewhere(expected["made_with"]):
        pytest.skip(f"the losses agree; the last digits are those of {expected['made_with']}")
    weights = (folder / "policy" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == expected["sha256 of model.safetensors"]
