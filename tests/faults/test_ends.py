"""Stage two, ended by what is no fault of it: 75, and the same command goes on as if nothing had been."""

import re
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from faults.kill_train import Scenario, digest, prepare
from pipeline.run.checkpoints import MARKER
from pipeline.training.trainer import PairTrainer
from stages import cli
from support.runs import refshard
from support.tally import tally
from support.watched import Watched

pytestmark = pytest.mark.slow

SAME = "final weights bit for bit those of an undisturbed run"

WORKERS = {
    "dataloader_num_workers": 2,
    # As in a command that is started in a shell; a fork of the tests' server has another default.
    "dataloader_multiprocessing_context": "fork",
}


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return prepare(tmp_path_factory.mktemp("run"))


@pytest.fixture
def output(scenario: Scenario, tmp_path: Path) -> Path:
    return tmp_path / "policy"


def words(scenario: Scenario, output: Path, **train: Any) -> list[str]:
    (command,) = scenario.commands(output)
    return [*command, *(word for key, value in train.items() for word in ("-o", f"train.{key}={value}"))]


def test_a_process_that_reads_the_data_and_is_killed_is_no_end(scenario: Scenario, output: Path) -> None:
    command = Watched(*words(scenario, output, **WORKERS))
    assert command.wait_until((output / "checkpoint-2" / MARKER).exists), command.err
    psutil.Process(command.pid).children(recursive=True)[0].kill()
    assert command.finish(60) == 75, command.err
    assert "a process that reads the data was ended from outside" in command.err
    refshard(*words(scenario, output))
    assert digest(output) == scenario.weights
    tally("a process that reads the data killed in stage two", 1, outcome=f"75; {SAME}")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["GPU", "CPU"],
)
def test_memory_that_runs_out_is_no_end(
    scenario: Scenario,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(PairTrainer, "compute_loss", fail)
    monkeypatch.setattr("sys.argv", ["refshard", *words(scenario, output)])
    # The tests' own process is not to end without its destructors.
    monkeypatch.setattr(cli, "leave", sys.exit)
    with pytest.raises(SystemExit) as left:
        cli.run()
    assert left.value.code == 75
    assert re.search(
        r"refshard: memory ran out .* Run the same command again with more memory", capsys.readouterr().err
    )
    tally("memory that runs out in stage two", 1, outcome="75, with advice")
