"""The page about Python is true: its code runs as it stands, and it names all that the package promises."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

import refshard
from support.models import make_model
from support.processes import ROOT
from support.runs import simple_rows, write_jsonl

TEXT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


class LibrarysBar(transformers.TrainerCallback):
    """A bar of the library's own, as in notebooks: it would stand beside our line."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the library draws its bar")


def test_every_block_runs_in_one_process(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "models" / "sft", tokenizer, num_hidden_layers=1)
    write_jsonl(tmp_path / "pairs.jsonl", simple_rows(8))
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", LibrarysBar)
    [settings] = blocks("yaml")
    (tmp_path / "run.yaml").write_text(settings)
    names: dict[str, Any] = {}
    code = blocks("python")
    for block in code:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert len(code) == 5
    assert names["policy"] == Path("runs/a/policy") and list(names["stores"]) == ["train"]
    for folder in ("policy", "ipo-0.05", "ipo-0.5"):
        assert (tmp_path / "runs" / "a" / folder / "adapter_model.safetensors").exists(), folder
    assert len(names["surprising"]) and set(names["surprising"]) <= set(range(8))
    rows = {row["prompt"]: row for row in names["dataset"]}
    assert len(rows) == 8
    stored = [row for batch in names["store"].pairs() for row in batch.to_pylist()]
    for number, row in enumerate(simple_rows(8)):
        for side in ("chosen", "rejected"):
            assert rows[row["prompt"]][f"ref_{side}_logps"] == stored[number][f"ref_{side}_logps"]
    said = capsys.readouterr().out
    assert f"8 pairs, scored by {Path('models/sft')}" in said
    assert said.endswith("loss.beta: must be a positive finite number, got -1.0\n")


def test_the_page_names_what_is_promised_and_nothing_else() -> None:
    assert refshard.__all__ == [
        "ConfigError", "DataError", "FencedError", "IdentityError", "RefshardError", "StorageError", "Store",
        "UnfinishedError", "open_store", "precompute", "reference_columns", "train",
    ]  # fmt: skip
    named = set(re.findall(r"`(\w+Error)`", TEXT)) - {"ImportError"} | {"RefshardError"}
    assert named == {name for name in refshard.__all__ if name.endswith("Error")}
    for name in ("precompute", "train", "open_store", "reference_columns"):
        assert f"refshard.{name}(" in TEXT
    public = {name for name in vars(refshard.Store) if name[0] != "_"} - {"parts"}
    assert public == {"folder", "manifest", "pairs"}
    assert all(name in TEXT for name in ("store.folder", "store.manifest", "store.pairs("))
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING
