"""Commands with nothing to do answer without torch, and only as long as everything is as it was."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.reader import load_config
from pipeline.models import recollection
from stages.finished import reported_run, reported_stores
from support.models import make_model, make_tokenizer
from support.processes import ROOT
from support.runs import refshard, simple_rows, write_config, write_jsonl

_RUN = (
    "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules or 'transformers' in sys.modules)); "
    "from stages.cli import run; run()"
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished store and a finished run, and with a cache that knows both."""
    folder = tmp_path_factory.mktemp("done")
    make_model(folder / "model", make_tokenizer(bos=True))
    make_model(folder / "scored", make_tokenizer(bos=True), seed=3)
    write_config(
        folder / "run.yaml",
        data={"path": str(write_jsonl(folder / "pairs.jsonl", simple_rows(12))), "max_length": 128},
        policy={"model": str(folder / "model")},
        reference={"model": str(folder / "scored")},
        precompute={"output": str(folder / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
        train={"output_dir": str(folder / "policy"), "max_steps": 1, "save_strategy": "no", "use_cpu": True},
    )
    with _cache(folder) as _:
        refshard("precompute", "--config", folder / "run.yaml")
        refshard("train", "--config", folder / "run.yaml")
    return folder


class _cache:
    """Uses a cache of its own, in this process and in those that it starts."""

    def __init__(self, folder: Path) -> None:
        self._patch = pytest.MonkeyPatch()
        self._folder = folder

    def __enter__(self) -> "_cache":
        self._patch.setenv("XDG_CACHE_HOME", str(self._folder / "cache"))
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


@pytest.fixture(autouse=True)
def cached(done: Path) -> Iterator[None]:
    with _cache(done):
        yield


def answers(folder: Path) -> tuple[bool, bool]:
    config = load_config(folder / "run.yaml")
    return reported_stores(config), reported_run(config)


def test_both_stages_say_what_they_said_and_load_neither_torch_nor_transformers(done: Path) -> None:
    def run(command: str) -> list[str]:
        words = [sys.executable, "-c", _RUN, command, "--config", str(done / "run.yaml")]
        found = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
        assert found.stderr == ""
        return found.stdout.splitlines()

    assert run("precompute") == [f"train: 12 rows, 12 pairs kept; in {done}/shards/train (2 parts)", "False"]
    assert run("train") == [f"{done}/policy: this run is finished already; nothing to do.", "False"]


def _append(file: Path, text: str = "\n") -> None:
    file.write_bytes(file.read_bytes() + text.encode())


def _change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _flip(file: Path) -> None:
    """Change a byte and keep size and time of change."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], tuple[bool, bool]]] = {
    "nothing": (lambda folder: None, (True, True)),
    "policy's weights": (lambda folder: _flip(folder / "model/model.safetensors"), (False, False)),
    "reference's weights": (lambda folder: _flip(folder / "scored/model.safetensors"), (False, False)),
    "reference's config": (
        lambda folder: _change_json(folder / "scored/config.json", rope_theta=1.0),
        (False, False),
    ),
    "tokenizer": (lambda folder: _append(folder / "model/tokenizer.json"), (False, False)),
    "chat template": (lambda folder: (folder / "model/chat_template.jinja").write_text("{{ 1 }}"), (False, False)),
    "data": (lambda folder: _append(folder / "pairs.jsonl"), (False, False)),
    "settings": (lambda folder: _append(folder / "run.yaml", "loss: {beta: 0.7}\n"), (False, False)),
    "a part that is gone": (lambda folder: (folder / "shards/train/part-00001.parquet").unlink(), (False, True)),
    "a part cut short": (
        lambda folder: os.truncate(folder / "shards/train/part-00000.parquet", 100),
        (False, True),
    ),
    "manifest": (lambda folder: _append(folder / "shards/train/manifest.json", "x"), (False, False)),
    "index": (lambda folder: (folder / "shards/train/index.json").unlink(), (False, False)),
    "the run's record": (lambda folder: (folder / "policy/run.json").unlink(), (True, False)),
    "a record of another run": (
        lambda folder: _change_json(folder / "policy/run.json", identity={"loss": "other"}),
        (True, False),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_after_any_change_the_full_command_looks(done: Path, tmp_path: Path, what: str) -> None:
    change, expected = CHANGES[what]
    saved = tmp_path / "saved"
    shutil.copytree(done, saved, ignore=shutil.ignore_patterns("cache"))
    kept = {file: file.stat() for file in done.rglob("*") if file.is_file() and "cache" not in file.parts}
    change(done)
    try:
        assert answers(done) == expected
    finally:
        for file in set(done.rglob("*")) - set(kept):
            if file.is_file() and "cache" not in file.parts:
                file.unlink()
        for file, stat in kept.items():
            content = (saved / file.relative_to(done)).read_bytes()
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", ["library_versions", "digest_of_code", "_place_of"])
def test_other_libraries_and_other_code_recall_nothing(done: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(recollection, name, lambda *given: {"torch": "0"})
    assert answers(done) == (False, False)


def test_one_of_several_processes_recalls_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert answers(done) == (False, False)
