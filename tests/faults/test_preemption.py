"""Stage two, ended in every way that there is: it says so, and the same command goes on as if nothing had been."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from faults.kill_train import Scenario, digest, disturb, prepare
from pipeline.base.errors import UnfinishedError
from pipeline.base.signals import StopFlag
from pipeline.base.versions import library_versions
from pipeline.config.reader import load_config
from pipeline.run.checkpoints import MARKER, checkpoint_folders, commit_checkpoint, newest_step, problem_of
from stages import train as stages_train
from support.disks import remount, tmpfs
from support.runs import refshard
from support.tally import tally
from support.watched import Watched, start_ranks

pytestmark = pytest.mark.slow

nightly = pytest.mark.nightly

SAME = "final weights bit for bit those of an undisturbed run"


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return prepare(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """A run whose reference moves."""
    return prepare(tmp_path_factory.mktemp("moving"), sync=True)


@pytest.fixture
def output(scenario: Scenario, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = scenario.folder / f"policy-{abs(hash(request.node.name))}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def words(scenario: Scenario, output: Path, **train: Any) -> list[str]:
    (command,) = scenario.commands(output)
    return [*command, *(word for key, value in train.items() for word in ("-o", f"train.{key}={value}"))]


def history(output: Path) -> list[dict[str, float]]:
    """All that was logged but how long it took."""
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    timing = ("runtime", "per_second", "preparation", "train_loss", "total_flos")
    kept = [{k: v for k, v in entry.items() if not any(word in k for word in timing)} for entry in entries]
    return [entry for entry in kept if entry.keys() - {"epoch", "step", "num_tokens", "num_input_tokens_seen"}]


def whole(output: Path) -> bool:
    """Whether every committed checkpoint holds."""
    return all(
        problem_of(folder, step) is None
        for step, folder in checkpoint_folders(output).items()
        if (folder / MARKER).exists()
    )


# Killed and asked to stop, at random


def test_killed_anywhere_the_same_command_comes_to_the_same_weights(scenario: Scenario) -> None:
    summary = disturb(scenario, kills=5, seed=0)
    assert summary.in_saves >= 1
    assert summary.equal == summary.runs
    tally(f"SIGKILL of stage two ({summary.in_saves} inside a save)", summary.kills, outcome=SAME)


def test_a_run_whose_reference_moves_killed_anywhere_comes_to_the_same_weights(moving: Scenario) -> None:
    summary = disturb(moving, kills=5, seed=0)
    assert summary.equal == summary.runs
    tally(f"SIGKILL of TR-DPO's two stages ({summary.in_saves} inside a save)", summary.kills, outcome=SAME)


def test_asked_to_stop_anywhere_it_leaves_with_75_and_goes_on_to_the_same_weights(scenario: Scenario) -> None:
    summary = disturb(scenario, kills=3, seed=0, signals=True)
    assert (summary.damaged, summary.equal) == (0, summary.runs)
    tally("SIGTERM, USR1 or USR2 to stage two at random moments", summary.kills, outcome=f"75; {SAME}")


@nightly
@pytest.mark.parametrize("signals", [False, True], ids=["killed", "asked"])
@pytest.mark.parametrize("kind", ["scenario", "moving"])
def test_fifty_times(request: pytest.FixtureRequest, kind: str, signals: bool) -> None:
    summary = disturb(request.getfixturevalue(kind), kills=30 if signals else 50, seed=1, signals=signals)
    print(summary)
    assert summary.equal == summary.runs
    what = f"{'signals to' if signals else 'SIGKILL of'} {'stage two' if kind == 'scenario' else 'TR-DPO'}, at length"
    tally(f"{what} ({summary.in_saves} inside a save)", summary.kills, outcome=SAME)


# Asked to stop, at every point where it looks


class AskedAfter(StopFlag):
    """A stop request that comes when the flag has been looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def _stop_at(scenario: Scenario, output: Path, looks: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Train in this process up to a look; says whether the run was finished before that."""
    # Sets that another run has joined are not looked at pair by pair.
    places = [f"train.output_dir={output}", f"train.joined_dir={output}-joined"]
    config = load_config(scenario.folder / "run.yaml", places)
    monkeypatch.setattr(stages_train, "watch_signals", lambda stop_at: AskedAfter(looks))
    try:
        stages_train.run(config)
    except UnfinishedError as error:
        assert "Run the same command again" in str(error) or "run the same command again" in str(error)
        return False
    return True


# It looks at each of the 44 pairs that are joined, 8 times in the gate, once after it, at each of 10 steps, and 3 times
# in the evaluations at steps 3, 6, 9 and at the end.
@pytest.mark.parametrize("looks", [0, 48, 53, 55, 57, 73])
def test_a_request_is_heard_while_joining_in_the_gate_at_a_step_and_in_an_evaluation(
    scenario: Scenario, output: Path, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _check_stop(scenario, output, looks, monkeypatch)


@nightly
def test_a_request_is_heard_at_every_look(scenario: Scenario, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 38
    while _check_stop(scenario, output / str(looks), looks, monkeypatch):
        looks += 1
    assert looks == 75


def _check_stop(scenario: Scenario, output: Path, looks: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    if _stop_at(scenario, output, looks, monkeypatch):
        return False
    saved = newest_step(output)
    assert (saved > 0) == (looks >= 53), "nothing was to be saved before the first step"
    assert whole(output)
    refshard(*words(scenario, output))
    assert digest(output) == scenario.weights
    assert history(output) == history(scenario.folder / "undisturbed")
    return True


def test_a_time_limit_that_is_known_ends_both_stages_with_75_and_they_go_on(
    scenario: Scenario, moving: Scenario, output: Path
) -> None:
    train = words(scenario, output)
    precompute = ["precompute", *train[1:], "-o", f"precompute.output={output}-shards"]
    left = refshard(*precompute, "--stop-after", "0s", check=75)
    assert "units of train saved" in left.stderr
    refshard(*precompute, "--stop-after", "1h")
    refshard(*train, "--stop-after", "0s", check=75)
    refshard(*train, "--stop-after", "1h")
    assert digest(output) == scenario.weights
    # The command that alternates between the stages hands it on to the one that runs.
    beside = output.with_name(f"{output.name}-moving")
    alternating = [word for word in moving.commands(beside)[1] if word != "--one-window"]
    left = refshard(*alternating, "--stop-after", "1s", check=75)
    assert "stopped as asked" in left.stderr
    refshard(*alternating)
    assert digest(beside) == moving.weights


# Two processes, asked at different times


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """A run of two processes that evaluates for about as long as it trains."""
    return prepare(
        tmp_path_factory.mktemp("two"),
        processes=2,
        rows=60,
        eval_rows=60,
        eval_steps=1,
        max_steps=12,
        save_total_limit=9,
    )


def _signal_ranks(scenario: Scenario, output: Path, seed: int) -> None:
    chance = random.Random(seed)
    ranks = start_ranks(2, *words(scenario, output))
    try:
        # At a random moment: before the first step, at steps and in evaluations.
        ready = chance.choice(["joined", "checkpoint-2", "checkpoint-6"])
        assert ranks[0].wait_until(lambda: bool(list(output.glob(f"{ready}*"))))
        time.sleep(chance.uniform(0, 0.2))
        first = chance.randrange(2)
        ranks[first].signal(signal.SIGTERM)
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0, 2))
            ranks[1 - first].signal(signal.SIGUSR1)
        asked = time.monotonic()
        statuses = [rank.finish(30) for rank in ranks]
        assert time.monotonic() - asked < 10
    finally:
        for rank in ranks:
            rank.signal(signal.SIGKILL)
    assert statuses[0] == statuses[1], [rank.err for rank in ranks]
    assert statuses[0] in (0, 75), [rank.err for rank in ranks]
    assert whole(output)
    for folder in checkpoint_folders(output).values():
        assert {file.name for file in folder.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    ranks = start_ranks(2, *words(scenario, output))
    assert [rank.finish() for rank in ranks] == [0, 0], [rank.err for rank in ranks]
    assert digest(output) == scenario.weights


@pytest.mark.parametrize("seed", [0, 1])
def test_two_processes_asked_at_different_times_leave_at_the_same_step(
    two_processes: Scenario, output: Path, seed: int
) -> None:
    _signal_ranks(two_processes, output, seed)
    tally("two processes, signals up to two seconds apart or to one alone", 1, outcome="75, saved at one step")


@nightly
@pytest.mark.parametrize("seed", range(2, 22))
def test_two_processes_asked_at_any_times_leave_at_the_same_step(
    two_processes: Scenario, output: Path, seed: int
) -> None:
    _signal_ranks(two_processes, output, seed)
    tally("two processes, signals up to two seconds apart or to one alone", 1, outcome="75, saved at one step")


# A process that comes back after another one has taken over


@pytest.mark.parametrize("where", ["after a save", "inside a save"])
def test_a_process_that_comes_back_leaves_with_79_and_changes_nothing(
    scenario: Scenario, output: Path, where: str
) -> None:
    zombie = Watched(*words(scenario, output))
    marker = output / "checkpoint-4" / MARKER

    def is_there() -> bool:
        return marker.exists() if where == "after a save" else marker.parent.exists() and not marker.exists()

    try:
        assert zombie.wait_until(is_there)
        zombie.signal(signal.SIGSTOP)
        refshard(*words(scenario, output))
        before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
        zombie.signal(signal.SIGCONT)
        assert zombie.finish() == 79, zombie.err
    finally:
        zombie.signal(signal.SIGKILL)
    assert "attempt 2 of this run has taken over from this one (attempt 1)" in zombie.err
    assert len(zombie.err.strip().splitlines()[-1]) < 400
    assert digest(output) == scenario.weights
    assert whole(output)
    changed = {file for file, content in before.items() if not file.exists() or file.read_bytes() != content}
    # What it was writing when it was stopped is out of the way by then, and its own.
    assert all("broken-checkpoint" in str(file) for file in changed)
    assert {json.loads(marker.read_text())["attempt"] for marker in output.glob(f"checkpoint-*/{MARKER}")} == {2}
    tally("a stopped trainer that comes back after another attempt", 1, outcome="79, nothing changed")


def test_a_process_that_comes_back_while_the_other_trains_makes_no_mixed_checkpoint(
    scenario: Scenario, output: Path
) -> None:
    zombie = Watched(*words(scenario, output))
    try:
        assert zombie.wait_until((output / "checkpoint-2" / MARKER).exists)
        zombie.signal(signal.SIGSTOP)
        newer = Watched(*words(scenario, output))
        assert newer.wait_until((output / "checkpoint-6" / MARKER).exists)
        zombie.signal(signal.SIGCONT)
        assert (zombie.finish(), newer.finish()) == (79, 0), zombie.err + newer.err
    finally:
        zombie.signal(signal.SIGKILL)
    assert {json.loads((f / MARKER).read_text())["attempt"] for f in checkpoint_folders(output).values()} == {2}
    assert whole(output)
    assert digest(output) == scenario.weights


# Damaged checkpoints, through the command


@pytest.fixture(scope="module")
def stopped(scenario: Scenario) -> Path:
    """A run that was killed after its checkpoint of step 6."""
    output = scenario.folder / "stopped"
    command = Watched(*words(scenario, output, save_total_limit=5))
    assert command.wait_until((output / "checkpoint-6" / MARKER).exists)
    command.signal(signal.SIGKILL)
    command.finish()
    for step in (8, 10):
        shutil.rmtree(output / f"checkpoint-{step}", ignore_errors=True)
    return output


def _cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MARKER)
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    **{f"no {name}": (lambda n: lambda folder: (folder / n).unlink())(name) for name in FILES},
    **{f"{name} empty": (lambda n: lambda folder: (folder / n).write_bytes(b""))(name) for name in FILES},
    **{f"{name} cut": (lambda n: lambda folder: _cut(folder / n))(name) for name in FILES},
    **{f"{name} flipped": (lambda n: lambda folder: _flip(folder / n))(name) for name in FILES},
}


def _resume_damaged(scenario: Scenario, stopped: Path, output: Path, kind: str) -> None:
    shutil.copytree(stopped, output)
    DAMAGES[kind](output / "checkpoint-6")
    done = refshard(*words(scenario, output))
    assert "Resuming" in done.stdout
    assert "checkpoint-4" in done.stdout
    name = MARKER if kind == "empty" else next(name for name in FILES if name in kind)
    gone = kind in ("empty", f"no {MARKER}")
    assert f"checkpoint-6: {'cut short while it was saved' if gone else 'damaged'}" in done.stderr
    assert name in done.stderr
    assert digest(output) == scenario.weights
    assert (output / "broken-checkpoint-6-0").exists()
    tally("a damaged or half-saved newest checkpoint", 1, outcome=f"stepped over with a warning; {SAME}")


@pytest.mark.parametrize("kind", ["no optimizer.pt", "model.safetensors flipped", f"no {MARKER}"])
def test_a_damaged_checkpoint_is_stepped_over_and_the_weights_are_the_same(
    scenario: Scenario, stopped: Path, output: Path, kind: str
) -> None:
    _resume_damaged(scenario, stopped, output, kind)


@nightly
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damaged_checkpoint_is_stepped_over(scenario: Scenario, stopped: Path, output: Path, kind: str) -> None:
    _resume_damaged(scenario, stopped, output, kind)


def test_a_run_with_damaged_checkpoints_alone_is_refused_again_and_again(
    scenario: Scenario, stopped: Path, output: Path
) -> None:
    shutil.copytree(stopped, output)
    for folder in checkpoint_folders(output).values():
        _flip(folder / "model.safetensors")
    for _ in range(2):
        refused = refshard(*words(scenario, output), check=65)
        assert "every checkpoint is damaged" in refused.stderr
        assert "--overwrite" in refused.stderr
    refshard(*words(scenario, output), "--overwrite")
    assert digest(output) == scenario.weights
    tally("every checkpoint damaged", 2, outcome="65 each time, never a start from the beginning")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("optimizer.pt", lambda state: [s["step"].fill_(5) for s in state["state"].values()], "has taken 5 steps, the"),
        ("scheduler.pt", lambda state: state.update(last_epoch=5), "is at step 5, the training at 6"),
    ],
)
def test_a_checkpoint_whose_parts_are_of_different_steps_is_refused(
    scenario: Scenario, stopped: Path, output: Path, name: str, change: Callable[[Any], Any], message: str
) -> None:
    """As a later version of the library might save it: every digest holds."""
    shutil.copytree(stopped, output)
    folder = output / "checkpoint-6"
    state = torch.load(folder / name)
    change(state)
    torch.save(state, folder / name)
    _commit_again(folder)
    refused = refshard(*words(scenario, output), check=65)
    assert f"{folder / name}: " in refused.stderr
    assert message in refused.stderr


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_saved_without_a_part_is_refused(
    scenario: Scenario, stopped: Path, output: Path, name: str
) -> None:
    shutil.copytree(stopped, output)
    (output / "checkpoint-6" / name).unlink()
    _commit_again(output / "checkpoint-6")
    assert f"{name} is missing" in refshard(*words(scenario, output), check=65).stderr


def _commit_again(folder: Path) -> None:
    marker = json.loads((folder / MARKER).read_text())
    commit_checkpoint(folder, marker["step"], marker["identity"], marker["attempt"])


# What a start leaves behind


def test_settings_fingerprints_and_versions_are_there_while_the_run_is_on(scenario: Scenario, stopped: Path) -> None:
    assert yaml.safe_load((stopped / "refshard.yaml").read_text())["loss"]["beta"] == 0.1
    start = json.loads((stopped / "attempts" / "0001.json").read_text())
    manifest = json.loads((scenario.folder / "shards" / "train" / "manifest.json").read_text())
    assert start["identity"]["fingerprints"]["train"] == manifest["fingerprint"]
    assert start["versions"] == library_versions()
    assert not (stopped / "run.json").exists()


def test_a_finished_run_claims_nothing_and_leaves_nothing_of_its_own(scenario: Scenario) -> None:
    output = scenario.folder / "undisturbed"
    assert "finished already" in refshard(*words(scenario, output)).stdout
    assert [file.name for file in (output / "attempts").iterdir()] == ["0001.json"]
    assert not [entry.name for entry in output.iterdir() if entry.name.startswith(".") or entry.name == "joined"]


def test_checkpoints_are_kept_as_the_settings_say_and_the_best_besides(scenario: Scenario, output: Path) -> None:
    settings = {
        "load_best_model_at_end": "true",
        "metric_for_best_model": "eval_loss",
        # The loss is largest at first.
        "greater_is_better": "true",
        "eval_steps": 2,
        "save_total_limit": 2,
    }
    refshard(*words(scenario, output, **settings))
    first = json.loads((output / "trainer_state.json").read_text())["best_global_step"]
    assert first < 8
    assert checkpoint_folders(output).keys() == {first, 8, 10}
    weights = (output / "model.safetensors").read_bytes()
    assert weights == (output / f"checkpoint-{first}" / "model.safetensors").read_bytes()
    # Killed after its last checkpoint, it ends with the best weights all the same.
    for name in ("run.json", "model.safetensors"):
        (output / name).unlink()
    refshard(*words(scenario, output, **settings))
    assert (output / "model.safetensors").read_bytes() == weights
    # A damaged one is named, and the last step's policy can be had instead.
    (output / "run.json").unlink()
    damaged = output / f"checkpoint-{first}" / "model.safetensors"
    damaged.write_bytes(weights[:-2] + b"\0\0")
    assert (
        f"{damaged.parent}: must be the run's best" in refshard(*words(scenario, output, **settings), check=65).stderr
    )
    assert not (output / "run.json").exists()
    refshard(*words(scenario, output, **{**settings, "load_best_model_at_end": "false"}))
    assert (output / "model.safetensors").read_bytes() == (output / "checkpoint-10/model.safetensors").read_bytes()


# Workers

WORKERS = {
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": "true",
    # As in a command that is started in a shell; a fork of the tests' server has another default.
    "dataloader_multiprocessing_context": "fork",
}


def test_workers_of_the_loader_outlive_a_signal_to_all_processes(scenario: Scenario, output: Path) -> None:
    command = Watched(*words(scenario, output, **WORKERS))
    assert command.wait_until((output / "checkpoint-2" / MARKER).exists), command.err
    children = psutil.Process(command.pid).children(recursive=True)
    assert len(children) >= 2
    for child in children:
        child.send_signal(signal.SIGTERM)
    command.signal(signal.SIGTERM)
    assert command.finish(30) == 75, command.err
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
    assert whole(output)
    refshard(*words(scenario, output))
    assert digest(output) == scenario.weights


def test_workers_of_the_loader_leave_with_a_killed_run(scenario: Scenario, output: Path) -> None:
    command = Watched(*words(scenario, output, **WORKERS))
    assert command.wait_until((output / "checkpoint-2" / MARKER).exists), command.err
    children = psutil.Process(command.pid).children(recursive=True)
    command.signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, 3)
    assert not alive


# Bit for bit


def test_evaluations_do_not_change_what_is_trained(scenario: Scenario, output: Path) -> None:
    adapter = ["-o", "policy.lora.r=4", "-o", "policy.lora.dropout=0.3"]
    refshard(*words(scenario, output / "often", eval_steps=1), *adapter)
    refshard(*words(scenario, output / "never", eval_strategy="no"), *adapter)
    often, never = (output / name / "adapter_model.safetensors" for name in ("often", "never"))
    assert often.read_bytes() == never.read_bytes()
    assert not [key for entry in history(output / "never") for key in entry if key.startswith("eval")]
    assert [file.stem for file in (output / "never" / "margins").iterdir()] == ["train"]


def _resume_from(scenario: Scenario, undisturbed: Path, output: Path, step: int, *options: str) -> None:
    output.mkdir(parents=True)
    shutil.copytree(undisturbed / f"checkpoint-{step}", output / f"checkpoint-{step}")
    scenario.train([*words(scenario, output), *options])


@pytest.mark.parametrize("step", [4, 6], ids=["an epoch's end", "inside an epoch"])
def test_an_adapter_with_dropout_goes_on_bit_for_bit(scenario: Scenario, output: Path, step: int) -> None:
    """An epoch of ten micro-batches is four steps of three, the last one incomplete."""
    options = ["-o", "policy.lora.r=4", "-o", "policy.lora.dropout=0.3", "-o", "train.save_total_limit=9"]
    undisturbed = scenario.folder / "adapter"
    if not (undisturbed / "run.json").exists():
        refshard(*words(scenario, undisturbed), *options)
    _resume_from(scenario, undisturbed, output, step, *options)
    found, expected = (folder / "adapter_model.safetensors" for folder in (output, undisturbed))
    assert found.read_bytes() == expected.read_bytes()
    assert history(output) == history(undisturbed)


@pytest.mark.parametrize("step", [2, 6], ids=["inside an epoch", "an epoch's end"])
def test_two_processes_go_on_bit_for_bit(two_processes: Scenario, output: Path, step: int) -> None:
    undisturbed = two_processes.folder / "undisturbed"
    _resume_from(two_processes, undisturbed, output, step)
    assert digest(output) == two_processes.weights
    assert history(output) == history(undisturbed)


# A disk that is full


@pytest.mark.parametrize("size", ["400k", "900k", "1600k"])
def test_a_full_disk_under_the_run_is_told_as_such_and_the_run_goes_on_once_there_is_room(
    scenario: Scenario, tmp_path: Path, size: str
) -> None:
    with tmpfs(tmp_path / "disk", size) as disk:
        output = disk / "policy"
        refused = refshard(*words(scenario, output), check=74)
        assert "this is a bug" not in refused.stderr
        remount(disk, "size=64m")
        refshard(*words(scenario, output))
        assert digest(output) == scenario.weights
        assert whole(output)
    tally("disk full in the middle of stage two", 1, outcome=f"74; {SAME}")
