"""Checkpoints: only one whose marker and every file hold is resumed from; only older ones are ever deleted."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from pipeline.base.digests import WatchedFiles
from pipeline.base.errors import DataError, FencedError, IdentityError
from pipeline.base.signals import StopFlag
from pipeline.config.reader import load_config
from pipeline.run import attempts, checkpoints
from pipeline.run.attempts import Attempt, claim_run
from pipeline.run.checkpoints import (
    MARKER,
    best_checkpoint,
    commit_checkpoint,
    delete_older,
    delete_run,
    find_checkpoint,
    reference_folder,
    reference_folders,
    refuse_other_run,
)
from pipeline.run.identity import check_same_run, identity_of_training, run_identity
from pipeline.training.commit import CommitCallback
from pipeline.training.trainer import EvaluationLeft, PairTrainer
from support.runs import simple_rows, write_jsonl
from support.tally import tally

IDENTITY = {
    "fingerprint": "f" * 64,
    "beta": 0.1,
    "learning_rate": 5e-7,
    "lora": None,
    "train": {"seed": 42, "max_steps": 3},
}

FILES = {
    "model.safetensors": bytes(range(256)) * 20,
    "optimizer.pt": b"moments" * 100,
    "scheduler.pt": b"rates" * 10,
    "rng_state.pth": b"chance" * 10,
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


def _edit_marker(folder: Path, change: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> None:
    """Change a marker; `sealed` as its writer would have, with a digest that is right."""
    marker = json.loads((folder / MARKER).read_text())
    change(marker)
    if sealed:
        marker["digest"] = checkpoints._digest({key: value for key, value in marker.items() if key != "digest"})
    (folder / MARKER).write_text(json.dumps(marker))


def _move_out(file: Path) -> None:
    """Put a link to a file, or to a folder, in its place."""
    real = file.parent.parent / f"real-{file.name}"
    file.rename(real)
    file.symlink_to(real)


def _name_file(name: str) -> Callable[[Path], None]:
    """Have the marker name another file, which is there, with the right size and digest."""
    return lambda f: _edit_marker(f, lambda m: m["files"].update({name.format(f.parent): m["files"]["empty.txt"]}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), f"no {MARKER}"),
    "only the model": (
        lambda f: [(f / name).unlink() for name in (*FILES, MARKER) if name != "model.safetensors"],
        f"no {MARKER}",
    ),
    **{
        f"{name} missing": ((lambda n: lambda f: (f / n).unlink())(name), f"{name} is missing")
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    },
    **{
        f"{name} empty": ((lambda n: lambda f: (f / n).write_bytes(b""))(name), f"{name} has 0 bytes")
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    },
    **{
        f"{name} cut": (
            (lambda n: lambda f: (f / n).write_bytes(FILES[n][:-1]))(name),
            f"{name} has {len(FILES[name]) - 1} bytes, not {len(FILES[name])}",
        )
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")
    },
    **{
        f"{name}, one bit": ((lambda n: lambda f: _flip(f / n, 7))(name), f"{name} has another SHA-256")
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    },
    "first bit flipped": (lambda f: _flip(f / "model.safetensors", 0), "model.safetensors has another SHA-256"),
    "last bit flipped": (lambda f: _flip(f / "model.safetensors", -1), "model.safetensors has another SHA-256"),
    "nested flipped": (lambda f: _flip(f / "adapter/adapter_model.safetensors", 2), "another SHA-256"),
    "optimizer a folder": (
        lambda f: ((f / "optimizer.pt").unlink(), (f / "optimizer.pt").mkdir()),
        "optimizer.pt is missing",
    ),
    "a link to a file outside": (lambda f: _move_out(f / "optimizer.pt"), "optimizer.pt leads out of the folder"),
    "a link to a folder outside": (lambda f: _move_out(f / "adapter"), "leads out of the folder"),
    "a name that leads out": (_name_file("../x"), "../x leads out of the folder"),
    "a name from the root": (_name_file("{}/x"), "leads out of the folder"),
    "grown": (lambda f: (f / "empty.txt").write_bytes(b"x"), "empty.txt has 1 bytes, not 0"),
    "marker missing": (lambda f: (f / MARKER).unlink(), f"no {MARKER}"),
    "marker cut": (lambda f: (f / MARKER).write_bytes((f / MARKER).read_bytes()[:50]), f"{MARKER}: damaged, not JSON"),
    "marker empty": (lambda f: (f / MARKER).write_bytes(b""), "not JSON"),
    "marker a list": (lambda f: (f / MARKER).write_text("[]"), "expected a JSON object"),
    "marker, one bit": (lambda f: _flip(f / MARKER, (f / MARKER).read_bytes().index(b"0.1")), MARKER),
    "marker of other settings": (
        lambda f: _edit_marker(f, lambda m: m["identity"].update(beta=9), sealed=False),
        f"{MARKER}: edited or damaged, its digest",
    ),
    "marker with a file less": (
        lambda f: (
            (f / "optimizer.pt").unlink(),
            _edit_marker(f, lambda m: m["files"].pop("optimizer.pt"), sealed=False),
        ),
        f"{MARKER}: edited or damaged, its digest",
    ),
    "marker without files": (lambda f: _edit_marker(f, lambda m: m.pop("files")), f"{MARKER}: files: must be there"),
    "marker without identity": (
        lambda f: _edit_marker(f, lambda m: m.pop("identity")),
        f"{MARKER}: identity: must be there",
    ),
    "marker of data that is no section": (
        lambda f: _edit_marker(f, lambda m: m["identity"].update(data=[1])),
        f"{MARKER}: identity.data: must be object, got a list",
    ),
    "marker of a held-out set that is no section": (
        lambda f: _edit_marker(f, lambda m: m["identity"].update(held_out={"a": 1})),
        f"{MARKER}: identity.held_out.a: must be object, got 1",
    ),
    "marker without digest": (
        lambda f: _edit_marker(f, lambda m: m.pop("digest"), sealed=False),
        f"{MARKER}: digest: must be there",
    ),
    "marker of another step": (lambda f: _edit_marker(f, lambda m: m.update(step=5)), f"{MARKER} is of step 5"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_taken(tmp_path: Path, kind: str) -> None:
    damage, named = DAMAGE[kind]
    before = make_checkpoint(tmp_path, 5)
    (tmp_path / "x").write_bytes(b"")
    damage(make_checkpoint(tmp_path, 10))
    found, warnings = find(tmp_path)
    assert found == before
    there = {name for name in names(tmp_path) if not name.startswith("real-")}
    assert there == {"checkpoint-5", "broken-checkpoint-10-0", "x"}
    assert len(warnings) == 1
    assert "checkpoint-10: damaged" in warnings[0] or "checkpoint-10: cut short" in warnings[0]
    assert named in warnings[0]
    assert "broken-checkpoint-10-0" in warnings[0]
    tally("a checkpoint damaged in one of many ways", 1, outcome="named, set aside, the one before taken")


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_best_checkpoint_is_checked_before_its_weights_are_used(tmp_path: Path, kind: str) -> None:
    damage, named = DAMAGE[kind]
    # The run's folder has moved since the path was recorded.
    recorded = "/a/run/before/checkpoint-10"
    best = make_checkpoint(tmp_path, 10)
    assert best_checkpoint(tmp_path, recorded) == best
    damage(best)
    with pytest.raises(DataError, match=f"^{best}: .*{re.escape(named)}.*load_best_model_at_end: false"):
        best_checkpoint(tmp_path, recorded)


def test_a_best_checkpoint_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"checkpoint-10: .* it is gone"):
        best_checkpoint(tmp_path, "/a/run/before/checkpoint-10")


def test_files_added_later_do_no_harm(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    (folder / "notes.txt").write_text("looked at")
    assert find(tmp_path) == (folder, [])


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_from_the_beginning_by_itself(tmp_path: Path) -> None:
    for step in (5, 10):
        (make_checkpoint(tmp_path, step) / "optimizer.pt").unlink()
    make_checkpoint(tmp_path, 15, commit=False)
    before = {name: contents(tmp_path / name) for name in names(tmp_path)}
    for _ in range(2):
        with pytest.raises(DataError, match="every checkpoint is damaged") as caught:
            find(tmp_path)
        assert caught.value.exit_status == 65
        assert f"{tmp_path}: " in str(caught.value)
        assert "checkpoint-5 (optimizer.pt is missing)" in str(caught.value)
        assert "--overwrite" in str(caught.value)
        assert {name: contents(tmp_path / name) for name in names(tmp_path)} == before
    # The way on that the message names.
    delete_run(tmp_path)
    assert find(tmp_path) == (None, [])


def test_a_checkpoint_brought_back_from_a_backup_is_gone_on_from(tmp_path: Path) -> None:
    optimizer = make_checkpoint(tmp_path, 5) / "optimizer.pt"
    optimizer.unlink()
    with pytest.raises(DataError):
        find(tmp_path)
    optimizer.write_bytes(FILES["optimizer.pt"])
    assert find(tmp_path) == (tmp_path / "checkpoint-5", [])


def test_everything_is_on_the_disk_before_the_marker_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    opened: dict[int, str] = {}
    real_open, real_sync, real_replace = os.open, os.fsync, Path.replace

    def remember(path: Any, *arguments: Any) -> int:
        descriptor = real_open(path, *arguments)
        opened[descriptor] = Path(path).relative_to(tmp_path).as_posix()
        return descriptor

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(opened[fd]), real_sync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append(f"name {Path(b).name}"), real_replace(a, b))[1])
    folder = make_checkpoint(tmp_path, 5)
    before = set(done[: done.index(f"name {MARKER}")])
    assert before >= {f"checkpoint-5/{name}" for name in FILES} | {"checkpoint-5/adapter", "checkpoint-5", "."}
    assert done[-1] == "checkpoint-5"
    assert (folder / MARKER).exists()


@pytest.mark.parametrize(
    ("keep", "left"), [(2, {40, 50}), (3, {30, 40, 50}), (4, {20, 30, 40, 50}), (9, set(range(10, 60, 10)))]
)
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int, left: set[int]) -> None:
    for step in (50, 10, 20, 40, 30):  # also written in another order than their steps'
        make_checkpoint(tmp_path, step)
    delete_older(tmp_path, keep)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}


def test_checkpoints_that_are_not_whole_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        make_checkpoint(tmp_path, step, commit=step != 50)
    (tmp_path / "checkpoint-40" / "optimizer.pt").write_bytes(b"cut")
    delete_older(tmp_path, 2)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in (20, 30, 40, 50)}
    assert find(tmp_path)[0] == tmp_path / "checkpoint-30"


def test_nothing_is_deleted_before_two_newer_ones_are_whole(tmp_path: Path) -> None:
    for step in (10, 20):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 30, commit=False)
    delete_older(tmp_path, 1)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}


def test_the_best_checkpoint_and_copies_of_somebody_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-10-backup").mkdir()
    delete_older(tmp_path, 2, "checkpoint-10")
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-30", "checkpoint-40", "checkpoint-10-backup"}
    delete_run(tmp_path)
    assert names(tmp_path) == {"checkpoint-10-backup"}


def test_a_deletion_cut_short_leaves_no_marker_and_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda folder, **_: None)
        delete_older(tmp_path, 2)
    assert contents(tmp_path / "checkpoint-10").keys() == FILES.keys()
    assert find(tmp_path) == (tmp_path / "checkpoint-30", [])
    delete_older(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-20", "checkpoint-30"}


def test_an_earlier_run_is_deleted_and_what_others_put_beside_it_stays(tmp_path: Path) -> None:
    ours = ("checkpoint-4", "references/step-00000004", f"references/.tmp-{'a' * 32}")
    theirs = ("checkpoint-4-copy", "references/papers", "references/step-4")
    for name in (*ours, *theirs):
        (tmp_path / name).mkdir(parents=True)
    for name in ("margins/train.parquet", "margins/notes.txt"):
        (tmp_path / "margins").mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert reference_folders(tmp_path) == {4: reference_folder(tmp_path, 4)}
    delete_run(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {*theirs, "references", "margins", "margins/notes.txt"}


def test_each_start_takes_the_next_number_and_only_the_newest_may_save(tmp_path: Path) -> None:
    first = claim_run(tmp_path, IDENTITY)
    first.check()
    second = claim_run(tmp_path, IDENTITY)
    assert (first.number, second.number) == (1, 2)
    second.check()
    with pytest.raises(FencedError, match="attempt 2") as caught:
        first.check()
    assert caught.value.exit_status == 79
    (tmp_path / "attempts" / ".tmp-0123").write_text("a start that was killed in its first moment")
    second.check()
    delete_run(tmp_path)
    assert claim_run(tmp_path, IDENTITY).number == 3


def test_of_two_starts_at_once_each_has_a_number_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_run(tmp_path, IDENTITY)
    real, stale = attempts._newest, [0, 0]
    # The folder as it looked before the other start had put its file.
    monkeypatch.setattr(attempts, "_newest", lambda folder: stale.pop() if stale else real(folder))
    assert claim_run(tmp_path, IDENTITY).number == 2


def test_a_folder_of_another_run_is_refused_before_it_is_taken_over(tmp_path: Path) -> None:
    refuse_other_run(tmp_path, IDENTITY)
    make_checkpoint(tmp_path, 5)
    (make_checkpoint(tmp_path, 10) / MARKER).write_text("cut")
    refuse_other_run(tmp_path, IDENTITY)
    with pytest.raises(IdentityError, match=r"beta: saved 0\.1, this run 0\.2"):
        refuse_other_run(tmp_path, {**IDENTITY, "beta": 0.2})
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-10"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beta": 0.2}, "beta: saved 0.1, this run 0.2"),
        ({"fingerprint": "e" * 64}, "fingerprint: saved ffff"),
        ({"lora": {"r": 8}}, "lora: saved none, this run {'r': 8}"),
        ({"train": {"seed": 1, "max_steps": 3}}, "train.seed: saved 42, this run 1."),
        ({"new": 1}, "new: saved none, this run 1"),
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
    assert "max_steps" not in str(caught.value)
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


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def make_callback(run: Path, flag: StopFlag, clock: Clock) -> tuple[CommitCallback, Callable[[int], Any], Any, Any]:
    """A callback, its step's end as a function, the state and the control of a run of 100 steps."""
    callback = CommitCallback(IDENTITY, flag, attempt=claim_run(run, IDENTITY), clock=clock)
    arguments = SimpleNamespace(output_dir=str(run))
    state = SimpleNamespace(global_step=0, max_steps=100, best_model_checkpoint=None)

    def end_step(step: int) -> Any:
        control = transformers.TrainerControl()
        state.global_step = step
        callback.on_step_end(arguments, state, control)
        return control

    return callback, end_step, arguments, state


@pytest.mark.parametrize(
    ("seconds", "terminations", "saves"),
    [(59.9, 2, False), (60.0, 2, True), (-5.0, 2, False), (1.0, 1, True), (None, 2, True)],
    ids=["just saved", "saved too long ago", "clock read at the save", "asked once", "never saved"],
)
def test_a_second_sigterm_skips_the_save_only_where_a_fresh_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float | None, terminations: int, saves: bool
) -> None:
    # What the wall clock says does not matter, however it jumps.
    monkeypatch.setattr("time.time", lambda: -1e9)
    flag, clock = StopFlag(), Clock()
    callback, end_step, arguments, state = make_callback(tmp_path, flag, clock)
    assert not end_step(4).should_training_stop
    if seconds is not None:
        make_checkpoint(tmp_path, 5, commit=False)
        state.global_step = 5
        callback.on_save(arguments, state, transformers.TrainerControl())
        assert find(tmp_path) == (tmp_path / "checkpoint-5", [])
        clock.seconds += max(seconds, 0)
    for _ in range(terminations):
        flag.request(terminate=True)
    control = end_step(6)
    assert control.should_training_stop
    assert control.should_save is saves
    assert callback.stopped_early


def test_usr1_before_sigterm_is_not_a_second_sigterm(tmp_path: Path) -> None:
    flag, clock = StopFlag(), Clock()
    callback, end_step, arguments, state = make_callback(tmp_path, flag, clock)
    make_checkpoint(tmp_path, 5, commit=False)
    state.global_step = 5
    callback.on_save(arguments, state, transformers.TrainerControl())
    flag.request()
    flag.request(terminate=True)
    assert end_step(6).should_save


def test_a_request_ends_an_evaluation_and_the_way_to_the_first_step(tmp_path: Path) -> None:
    flag = StopFlag()
    callback, _, arguments, state = make_callback(tmp_path, flag, Clock())
    control = transformers.TrainerControl()
    callback.on_prediction_step(arguments, state, control)
    callback.leave_if_asked()
    flag.request()
    with pytest.raises(EvaluationLeft) as caught:
        callback.on_prediction_step(arguments, state, control)
    assert caught.value.save
    with pytest.raises(EvaluationLeft) as caught:
        callback.leave_if_asked()
    assert not caught.value.save


def test_a_start_that_was_overtaken_commits_nothing(tmp_path: Path) -> None:
    callback, _, arguments, state = make_callback(tmp_path, StopFlag(), Clock())
    make_checkpoint(tmp_path, 5, commit=False)
    claim_run(tmp_path, IDENTITY)
    state.global_step = 5
    with pytest.raises(FencedError):
        callback.on_save(arguments, state, transformers.TrainerControl())
    assert not (tmp_path / "checkpoint-5" / MARKER).exists()


def test_no_checkpoint_counts_once_the_model_below_its_adapter_has_changed(tmp_path: Path) -> None:
    weights = tmp_path / "base.safetensors"
    weights.write_bytes(b"before")
    callback = CommitCallback(
        IDENTITY, StopFlag(), attempt=claim_run(tmp_path, IDENTITY), watched=[WatchedFiles([weights])]
    )
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    for step in (5, 10):
        make_checkpoint(tmp_path, step, commit=False)
    state = SimpleNamespace(global_step=5)
    callback.on_save(arguments, state, transformers.TrainerControl())
    weights.write_bytes(b"behind")
    state.global_step = 10
    with pytest.raises(IdentityError, match=r"base\.safetensors: changed while it was in use"):
        callback.on_save(arguments, state, transformers.TrainerControl())
    assert [step for step in (5, 10) if (tmp_path / f"checkpoint-{step}" / MARKER).exists()] == [5]


def test_a_start_that_was_overtaken_in_the_middle_of_a_save_writes_no_further_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    trainer = object.__new__(PairTrainer)
    trainer._attempt = claim_run(tmp_path, {})
    trainer.is_fsdp_enabled = False

    def save(self: Any, folder: str) -> None:
        written.append(folder)
        if folder == "second":
            claim_run(tmp_path, {})

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", save)
    trainer._save_optimizer_and_scheduler("first")
    # Overtaken while the optimizer was saved: its random state is the next file.
    with pytest.raises(FencedError):
        trainer._save_optimizer_and_scheduler("second")
    with pytest.raises(FencedError):
        trainer._save_optimizer_and_scheduler("third")
    assert written == ["first", "second"]


def test_the_marker_says_which_start_wrote_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5, commit=False)
    commit_checkpoint(folder, 5, IDENTITY, Attempt(tmp_path, 7).number)
    assert json.loads((folder / MARKER).read_text())["attempt"] == 7


# One value other than the default for every field that the run's mathematics may depend on, and for some that it may
# not; whatever field a later version of the library adds is taken for one of the first kind.
FIXED = {
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "average_tokens_across_devices": False,
    "bf16": True,
    "data_seed": 3,
    "dataloader_drop_last": True,
    "full_determinism": True,
    "learning_rate": 1e-4,
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "max_steps": 7,
    "metric_for_best_model": "loss",
    "num_train_epochs": 2.0,
    "on_missing": "drop",
    "optim": "sgd",
    "optim_args": "x=1",
    "per_device_train_batch_size": 2,
    "seed": 1,
    "tf32": True,
    "train_sampling_strategy": "sequential",
    "warmup_steps": 3,
    "weight_decay": 0.1,
}
FREE = {
    "dataloader_num_workers": 2,
    "disable_tqdm": True,
    "eval_steps": 3,
    "fsdp": True,
    "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"},
    "gradient_checkpointing": True,
    "logging_steps": 3,
    "output_dir": "elsewhere",
    "per_device_eval_batch_size": 2,
    "on_nonfinite": "continue",
    "push_to_hub": True,
    "report_to": ["wandb"],
    "run_name": "x",
    "save_steps": 3,
    "save_total_limit": 3,
    "torch_compile": True,
}


@pytest.fixture
def identity_of(make_run: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    file = make_run()

    def identity(config_changes: tuple[str, ...] = (), processes: int = 1, **train: Any) -> dict[str, Any]:
        overrides = (f"train.{key}={json.dumps(value)}" for key, value in train.items())
        config = load_config(file, (*config_changes, *overrides))
        kept = {
            key: config.train.given[key] for key in ("save_strategy", "use_cpu", *train) if key in config.train.given
        }
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, given=kept))
        return run_identity(config, {"train": "f" * 64}, processes, identity_of_training(config))

    return identity


@pytest.mark.parametrize("field", FIXED)
def test_a_setting_that_changes_the_mathematics_is_refused_by_its_name(
    tmp_path: Path, identity_of: Callable[..., dict[str, Any]], field: str
) -> None:
    folder = tmp_path / "run" / "checkpoint-5"
    folder.mkdir(parents=True)
    commit_checkpoint(folder, 5, identity_of())
    with pytest.raises(IdentityError, match=f"train.{field}: saved") as caught:
        find(tmp_path / "run", identity_of(**{field: FIXED[field]}))
    assert str(caught.value).count(", this run ") == 1


@pytest.mark.parametrize("field", FREE)
def test_a_setting_that_changes_only_what_is_written_or_how_is_free(
    tmp_path: Path, identity_of: Callable[..., dict[str, Any]], field: str
) -> None:
    changed = identity_of(**{field: FREE[field]})
    assert changed == identity_of()
    assert "hf_canary" not in json.dumps(changed)


def test_processes_and_accumulation_are_free_as_long_as_a_step_sees_as_many_pairs(
    tmp_path: Path, identity_of: Callable[..., dict[str, Any]]
) -> None:
    folder = tmp_path / "run" / "checkpoint-5"
    folder.mkdir(parents=True)
    size = {"per_device_train_batch_size": 2}
    commit_checkpoint(folder, 5, identity_of(gradient_accumulation_steps=4, **size))
    for processes, accumulation in ((1, 4), (2, 2), (4, 1)):
        run = identity_of(processes=processes, gradient_accumulation_steps=accumulation, **size)
        assert find(tmp_path / "run", run) == (folder, [])
    with pytest.raises(
        IdentityError, match="in processes x gradient_accumulation_steps: saved 4, this run 8"
    ) as caught:
        find(tmp_path / "run", identity_of(processes=2, gradient_accumulation_steps=4, **size))
    assert str(caught.value).count(", this run ") == 1
    # The same pairs in a step, but not in the same micro-batches at an epoch's end.
    with pytest.raises(IdentityError, match="per_device_train_batch_size"):
        find(tmp_path / "run", identity_of(gradient_accumulation_steps=2, per_device_train_batch_size=4))


def test_a_default_spelled_out_is_the_same_run(identity_of: Callable[..., dict[str, Any]]) -> None:
    spelled = identity_of(seed=42, adam_beta1=0.9, bf16=False, lr_scheduler_type="linear", on_missing="stop")
    assert spelled == identity_of()


def test_data_whose_rows_have_changed_is_another_run(
    tmp_path: Path, identity_of: Callable[..., dict[str, Any]]
) -> None:
    before = identity_of()
    write_jsonl(tmp_path / "pairs.jsonl", simple_rows(24)[::-1])
    assert [key for key, value in identity_of().items() if value != before[key]] == ["dataset"]


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("loss.beta=0.3", "loss"),
        ("policy.lora.r=4", "policy"),
        ("data.max_length=64", "data"),
        ("reference.sync.steps=2", "sync"),
    ],
)
def test_what_is_trained_and_how_is_part_of_the_run(
    identity_of: Callable[..., dict[str, Any]], override: str, field: str
) -> None:
    before, after = identity_of(), identity_of((override,))
    assert [key for key, value in before.items() if value != after[key]] == [field]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_the_model_below_an_adapter_is_part_of_the_run(
    tmp_path: Path, model_folder: Path, identity_of: Callable[..., dict[str, Any]], file: str
) -> None:
    own = Path(shutil.copytree(model_folder, tmp_path / "own"))
    changes = ("policy.lora.r=4", f"policy.model={own}", "reference.declared=another")
    before = identity_of(changes)
    content = (own / file).read_bytes()
    (own / file).write_bytes(content[:-1] + b"\x01" if file != "config.json" else content.replace(b"1e-06", b"1e-01"))
    with pytest.raises(IdentityError, match="policy_base") as caught:
        check_same_run(tmp_path, before, identity_of(changes))
    assert str(caught.value).count(", this run ") == 1
    # An earlier version recorded nothing of it.
    del before["policy_base"]
    check_same_run(tmp_path, before, identity_of(changes))


HELD_OUT = ("data.eval.one.path=one.jsonl",)


def test_data_that_has_moved_is_the_same_run_and_so_is_one_with_another_held_out_set(
    tmp_path: Path, identity_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "one.jsonl", simple_rows(4))
    before = identity_of(HELD_OUT)
    (tmp_path / "moved").mkdir()
    for name in ("pairs", "one"):
        shutil.move(tmp_path / f"{name}.jsonl", tmp_path / "moved" / f"{name}.jsonl")
    moved = ("data.path=moved/pairs.jsonl", "data.eval.one.path=moved/one.jsonl")
    after = identity_of(moved)
    assert after == before
    more = identity_of((*moved, "data.eval.two.split=train[:3]"))
    more["fingerprints"]["two"] = "f" * 64
    check_same_run(tmp_path, before, more)
    with pytest.raises(IdentityError, match=r"held_out\.two"):
        check_same_run(tmp_path, more, after)
    write_jsonl(tmp_path / "moved" / "one.jsonl", simple_rows(4)[::-1])
    with pytest.raises(IdentityError, match=r"held_out\.one\.dataset"):
        check_same_run(tmp_path, before, identity_of(moved))


def test_a_run_of_an_earlier_version_is_compared_in_what_it_recorded(
    tmp_path: Path, identity_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "one.jsonl", simple_rows(4))
    now = identity_of(HELD_OUT)
    sets = {"one": {"path": "elsewhere.jsonl", "name": None, "split": None}}
    before = {key: value for key, value in now.items() if key != "held_out"}
    before["data"] = {**now["data"], "path": "elsewhere/pairs.jsonl", "eval": sets}
    check_same_run(tmp_path, before, now)
    for key, value in (("dataset", {"pairs.jsonl": "0" * 64}), ("data", {**before["data"], "max_length": 7})):
        with pytest.raises(IdentityError, match=f"differs in {key}") as caught:
            check_same_run(tmp_path, {**before, key: value}, now)
        assert str(caught.value).count(", this run ") == 1
