"""Checkpoints: only one whose marker and every file hold is resumed from; nothing is ever deleted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoints import MARKER, commit_checkpoint, find_checkpoint
from pipeline.errors import DataError, IdentityError

IDENTITY = {"fingerprint": "f" * 64, "beta": 0.1, "learning_rate": 5e-7, "lora": None}

FILES = {
    "model.safetensors": bytes(range(256)) * 20,
    "optimizer.pt": b"moments" * 100,
    "trainer_state.json": b'{"global_step": 5}',
    "adapter/adapter_model.safetensors": b"nested",
    "empty.txt": b"",
}


def make_checkpoint(run: Path, step: int, *, commit: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if commit:
        commit_checkpoint(folder, step, IDENTITY)
    return folder


def names(run: Path) -> set[str]:
    return {entry.name for entry in run.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def find(run: Path, identity: dict[str, Any] | None = None) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return find_checkpoint(run, identity or IDENTITY, warnings.append), warnings


def test_a_run_without_checkpoints_starts_at_the_beginning(tmp_path: Path) -> None:
    assert find(tmp_path) == (None, [])
    assert find(tmp_path / "missing") == (None, [])


def test_the_newest_committed_checkpoint_is_taken_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (5, 10, 9):
        make_checkpoint(tmp_path, step)
    assert find(tmp_path) == (tmp_path / "checkpoint-10", [])
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-9", "checkpoint-10"}


def test_the_marker_lists_every_file_with_size_and_digest(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    marker = json.loads((folder / MARKER).read_text())
    assert marker["files"].keys() == FILES.keys()
    assert {name: entry["bytes"] for name, entry in marker["files"].items()} == {n: len(c) for n, c in FILES.items()}
    assert (marker["step"], marker["identity"]) == (5, IDENTITY)


def test_a_checkpoint_committed_again_still_holds(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    commit_checkpoint(folder, 5, IDENTITY)
    assert find(tmp_path) == (folder, [])


def test_a_folder_without_a_marker_is_set_aside_whole_and_the_one_before_taken(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    half = contents(make_checkpoint(tmp_path, 10, commit=False))
    found, warnings = find(tmp_path)
    assert found == tmp_path / "checkpoint-5"
    assert names(tmp_path) == {"checkpoint-5", "broken-checkpoint-10-0"}
    assert contents(tmp_path / "broken-checkpoint-10-0") == half
    assert len(warnings) == 1
    assert "checkpoint-10: cut short" in warnings[0]


def test_a_run_cut_short_in_its_first_save_starts_at_the_beginning(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5, commit=False)
    found, warnings = find(tmp_path)
    assert found is None
    assert len(warnings) == 1
    assert names(tmp_path) == {"broken-checkpoint-5-0"}


def test_what_was_set_aside_before_is_not_overwritten(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10, commit=False)
    find(tmp_path)
    (tmp_path / "broken-checkpoint-10-0" / "empty.txt").write_bytes(b"the first")
    make_checkpoint(tmp_path, 10, commit=False)
    find(tmp_path)
    assert names(tmp_path) == {"broken-checkpoint-10-0", "broken-checkpoint-10-1"}
    assert (tmp_path / "broken-checkpoint-10-0" / "empty.txt").read_bytes() == b"the first"


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(bytes(content))


def _write_marker(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    marker = json.loads((folder / MARKER).read_text())
    change(marker)
    (folder / MARKER).write_text(json.dumps(marker))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first bit flipped": (lambda f: _flip(f / "model.safetensors", 0), "model.safetensors has another SHA-256"),
    "last bit flipped": (lambda f: _flip(f / "model.safetensors", -1), "model.safetensors has another SHA-256"),
    "nested flipped": (lambda f: _flip(f / "adapter/adapter_model.safetensors", 2), "another SHA-256"),
    "no optimizer": (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "optimizer a folder": (
        lambda f: ((f / "optimizer.pt").unlink(), (f / "optimizer.pt").mkdir()),
        "optimizer.pt is missing",
    ),
    "truncated": (
        lambda f: (f / "optimizer.pt").write_bytes(FILES["optimizer.pt"][:-1]),
        "optimizer.pt has 699 bytes, not 700",
    ),
    "grown": (lambda f: (f / "empty.txt").write_bytes(b"x"), "empty.txt has 1 bytes, not 0"),
    "marker cut": (lambda f: (f / MARKER).write_bytes((f / MARKER).read_bytes()[:50]), "not JSON"),
    "marker empty": (lambda f: (f / MARKER).write_bytes(b""), "not JSON"),
    "marker a list": (lambda f: (f / MARKER).write_text("[]"), "expected a JSON object"),
    "marker without files": (lambda f: _write_marker(f, lambda m: m.pop("files")), "not one of refshard"),
    "marker without identity": (lambda f: _write_marker(f, lambda m: m.pop("identity")), "not one of refshard"),
    "marker without digest": (
        lambda f: _write_marker(f, lambda m: m["files"]["optimizer.pt"].pop("sha256")),
        "not one of refshard",
    ),
    "marker leads out": (
        lambda f: _write_marker(f, lambda m: m["files"].update({"../x": m["files"]["empty.txt"]})),
        "is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_detected_and_the_checkpoint_before_taken(tmp_path: Path, kind: str) -> None:
    damage, named = DAMAGE[kind]
    before = make_checkpoint(tmp_path, 5)
    (tmp_path / "x").write_bytes(b"")
    damage(make_checkpoint(tmp_path, 10))
    found, warnings = find(tmp_path)
    assert found == before
    assert names(tmp_path) == {"checkpoint-5", "broken-checkpoint-10-0", "x"}
    assert len(warnings) == 1
    assert "checkpoint-10: damaged" in warnings[0]
    assert named in warnings[0]


def test_files_added_later_do_no_harm(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    (folder / "notes.txt").write_text("looked at")
    assert find(tmp_path) == (folder, [])


def test_a_run_whose_checkpoints_are_all_damaged_stops(tmp_path: Path) -> None:
    for step in (5, 10):
        (make_checkpoint(tmp_path, step) / "optimizer.pt").unlink()
    with pytest.raises(DataError, match="no whole checkpoint is left") as caught:
        find(tmp_path)
    assert caught.value.exit_status == 65
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == {"broken-checkpoint-5-0", "broken-checkpoint-10-0"}
    # As the message says, the next run starts at the beginning.
    assert find(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beta": 0.2}, "beta: saved 0.1, this run 0.2"),
        ({"fingerprint": "e" * 64}, "fingerprint: saved 'ffff"),
        ({"lora": {"r": 8}}, "lora: saved None, this run {'r': 8}"),
        ({"new": 1}, "new: saved None, this run 1"),
    ],
)
def test_another_runs_checkpoint_is_refused_and_only_the_differing_field_named(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    folder = make_checkpoint(tmp_path, 5)
    with pytest.raises(IdentityError) as caught:
        find(tmp_path, {**IDENTITY, **change})
    assert caught.value.exit_status == 78
    assert named in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "learning_rate" not in str(caught.value)
    assert names(tmp_path) == {"checkpoint-5"}


@pytest.mark.parametrize("name", ["checkpoint-500-backup", "checkpoint-", "checkpoint-best", "checkpoint-²", "old"])
def test_folders_of_other_names_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(b"somebody's")
    folder = make_checkpoint(tmp_path, 5)
    assert find(tmp_path) == (folder, [])
    assert names(tmp_path) == {"checkpoint-5", name}


def test_a_file_named_like_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").write_bytes(b"a file")
    assert find(tmp_path) == (None, [])
    assert names(tmp_path) == {"checkpoint-7"}
