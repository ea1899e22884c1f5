"""Rows, settings and commands: what a run is made of, and what it leaves."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair, Ledger, kept_pairs
from pipeline.data.sources import open_source, read_rows
from pipeline.models.files import load_tokenizer
from support.processes import ROOT, Command

HH = ROOT.parent / "shared" / "data" / "hh-rlhf-harmless.jsonl.gz"


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def simple_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Explicit-prompt pairs, all different, of varying length."""
    return [
        {
            "prompt": f"What is {i} plus {i + 1}?" + " Please answer." * (i % 4),
            "chosen": f" It is {2 * i + 1}." + " I am sure." * (i % 3),
            "rejected": f" Nobody knows {i}" + " or cares" * (i % 5) + ".",
        }
        for i in range(start, start + count)
    ]


def write_config(file: Path, **sections: Any) -> Path:
    file.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return file


def refshard(
    *arguments: Any, check: int | None = 0, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own; `check` is the exit status to expect."""
    command = Command(*arguments, before=before)
    status = command.wait()
    assert status is not None, f"{command.words} still runs after 600 s"
    out, err = command.said()
    if check is not None:
        assert status == check, f"exit {status}, expected {check}\n{out}\n{err}"
    return subprocess.CompletedProcess(command.words, status, out, err)


def has_stepped(said: str) -> bool:
    """Whether a training that said this has taken a step; its line shows what comes before that, too."""
    return re.search(r"^train: (?!0 )[\d,]+ of [\d,]+ steps", said, re.MULTILINE) is not None


def logged_steps(output: Path) -> list[dict[str, float]]:
    """What a finished run has logged of each step, evaluations left out."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def kept(config: Config) -> list[KeptPair]:
    """The pairs that the settings' data comes to, under the policy's tokenizer."""
    rows = read_rows(open_source(config.data))
    return list(kept_pairs(rows, load_tokenizer(config), config.data, Ledger()))


def write_log(folder: Path, lines: list[dict[str, Any] | str]) -> Path:
    """A log of lines as they stand, or of records with what every record has."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"kind": "log", "attempt": 1, "time": 1000.0, "seconds": 1.0}
    texts = [line if isinstance(line, str) else json.dumps({**whole, **line}) for line in lines]
    (folder / "log.jsonl").write_text("\n".join(texts) + "\n")
    return folder


def write_settings(folder: Path, **sections: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = {"data": {"path": "pairs.jsonl"}, "policy": {"model": "m"}, "precompute": {"output": "shards"}}
    write_config(folder / "refshard.yaml", **{**needed, **sections})
