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
from stages.precompute.command import run as precompute
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
    (folder / "model/additional_chat_templates").mkdir()
    (folder / "model/additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
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
    "a chat template in another folder": (
        lambda folder: shutil.move(folder / "model/additional_chat_templates/tool_use.jinja", folder / "model"),
        (False, False),
    ),
    "a file in the other model's folder": (
        lambda folder: shutil.move(folder / "model/tokenizer_config.json", folder / "scored/a.json"),
        (False, False),
    ),
    "data": (lambda folder: _append(folder / "pairs.jsonl"), (False, False)),
    "a byte of the data": (lambda folder: _flip(folder / "pairs.jsonl"), (False, False)),
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
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", ["library_versions", "digest_of_code", "_place_of"])
def test_other_libraries_and_other_code_recall_nothing(done: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(recollection, name, lambda *given: {"torch": "0"})
    assert answers(done) == (False, False)


def test_a_library_that_is_worked_on_where_it_lies_recalls_nothing(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout/tokenizers"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").touch()
    monkeypatch.syspath_prepend(checkout.parent)
    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    assert answers(done) == (False, False)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("number", ["2", "many"])
def test_one_of_several_processes_recalls_nothing(
    done: Path, monkeypatch: pytest.MonkeyPatch, variable: str, number: str
) -> None:
    monkeypatch.setenv(variable, number)
    assert answers(done) == (False, False)


@pytest.mark.parametrize("content", ["", "[1", "{}", "[]", "1", "null", "facts"])
def test_a_cache_that_is_damaged_or_another_programs_recalls_nothing(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    shutil.copytree(done / "cache", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "cache/refshard/recollections.json"
    if content == "facts":
        content = json.dumps({key: {"tokenizer": {"digest": 1}} for key in json.loads(file.read_text())})
    file.write_text(content)
    assert answers(done) == (False, False)


def test_without_a_home_folder_nothing_is_cached_and_nothing_fails(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", lambda path: homeless(path) if str(path).startswith("~") else path)
    assert answers(done) == (False, False)


def test_stores_that_serve_a_smaller_length_are_reported_as_the_full_command_does(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(done / "run.yaml", ["data.max_length=100"])
    assert not reported_stores(config)
    precompute(config)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "these shards serve max_length 100 as they are" in said
    assert reported_stores(config)
    assert capsys.readouterr().out.splitlines() == [said]


def test_an_adapter_that_the_reference_does_not_use_is_looked_at(done: Path, tmp_path: Path) -> None:
    overrides = [f"policy.adapter={tmp_path}", "reference.disable_adapters=true", "reference.model=null"]
    config = load_config(done / "run.yaml", overrides)
    for content in ("{}", '{"r": 1}'):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name).write_text(content)
        found = recollection.Recollection("train", config)
        assert found.recall() is None
        found.remember({"content": content})
        assert recollection.Recollection("train", config).recall() == {"content": content}
