"""Stage one as several processes: each a worker of its own, or all of them one reference."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.base.errors import ConfigError
from pipeline.base.folders import open_folder
from pipeline.base.signals import StopFlag
from pipeline.scoring.tensor_parallel import Ensemble, share_of_process
from pipeline.store.store import Store, open_store, read_part
from support.installed import as_installed, folder_of_others
from support.models import make_model
from support.processes import _FORKS, redirected, said
from support.runs import refshard, simple_rows
from support.stores import bytes_of_stores
from support.watched import Watched, start_ranks

pytestmark = pytest.mark.slow

SPLIT = "precompute.tp_plan=auto"


def _store(folder: Path) -> Store:
    return open_store(open_folder(str(folder / "train")))


def _token_logps(store: Store) -> np.ndarray[Any, Any]:
    rows = [row for number in store.units for row in read_part(store, number).to_pylist()]
    return np.concatenate([row[f"{side}_token_logps"] for row in rows for side in ("chosen", "rejected")])


@pytest.fixture
def config(make_run: Callable[..., Path]) -> Path:
    """A run whose shards one process has written."""
    file = make_run(simple_rows(40))
    refshard("precompute", "--config", file)
    return file


# Each a worker of its own


@pytest.mark.parametrize(
    ("worker", "rank", "processes", "share"),
    [((0, 1), 0, 1, (0, 1)), ((0, 1), 1, 2, (1, 2)), ((2, 3), 0, 4, (8, 12)), ((2, 3), 3, 4, (11, 12))],
)
def test_the_processes_of_a_worker_share_its_share(
    worker: tuple[int, int],
    rank: int,
    processes: int,
    share: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert share_of_process(worker) == share


def test_the_processes_of_a_launch_need_nothing_of_each_other_and_write_what_one_writes(config: Path) -> None:
    folder = config.parent
    words = ("precompute", "--config", config, "-o", f"precompute.output={folder / 'two'}")
    # One after the other: a process group would wait for both.
    for rank, parts in ((1, 2), (0, 5)):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        process = Watched(*words, environment={name: str(value) for name, value in launched.items()})
        assert process.finish(60) == 0, process.err
        assert len(list((folder / "two").rglob("part-*"))) == parts
    assert "Worker 1/2 is done; 3 units of other workers are still missing." not in process.out
    assert bytes_of_stores(folder / "two") == bytes_of_stores(folder / "shards")


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        pytest.param(
            [
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes=2",
                "--num_machines=1",
                "--mixed_precision=no",
            ],
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_launcher_starts_workers_that_write_what_one_writes(
    config: Path, launcher: list[str], tmp_path: Path
) -> None:
    """It starts the installed program by name, also in a folder with packages of the same names as ours."""
    words = ["precompute", "--config", config, "-o", f"precompute.output={config.parent / 'launched'}"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "refshard", *map(str, words)],
        cwd=folder_of_others(tmp_path / "work"),
        env=as_installed(tmp_path / "site"),
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert bytes_of_stores(config.parent / "launched") == bytes_of_stores(config.parent / "shards")


def test_a_reference_that_is_spread_over_devices_is_the_same_reference(config: Path) -> None:
    folder = config.parent
    words = ("--config", config, "-o", "precompute.device_map=auto", "-o", f"precompute.output={folder / 'spread'}")
    refshard("precompute", *words)
    one, other = _store(folder / "shards"), _store(folder / "spread")
    assert one.manifest == other.manifest
    assert (_token_logps(one) == _token_logps(other)).all()
    assert b"device_map" in (folder / "spread" / "train" / "part-00000.parquet").read_bytes()


# All of them one reference


def test_one_reference_in_two_processes_gives_the_shards_of_one_process_but_for_rounding(config: Path) -> None:
    folder = config.parent
    ranks = start_ranks(2, "precompute", "--config", config, "-o", SPLIT, "-o", f"precompute.output={folder / 'two'}")
    assert [rank.finish(60) for rank in ranks] == [0, 0], [rank.err for rank in ranks]
    assert "on 2 processes" in ranks[0].out and "can't be packed" not in ranks[0].err
    assert not ranks[1].out
    one, two = _store(folder / "shards"), _store(folder / "two")
    assert one.manifest == two.manifest
    gap = np.abs(_token_logps(one) - _token_logps(two)).max()
    assert gap < 1e-5
    # And it really was computed in two halves.
    assert gap > 0


def test_a_stop_that_one_of_them_hears_stops_all_and_they_go_on_to_the_same_shards(config: Path) -> None:
    folder = config.parent
    words = ("precompute", "--config", config, "-o", SPLIT, "-o", f"precompute.output={folder / 'two'}")
    ranks = start_ranks(2, *words, "-o", "precompute.tokens_per_batch=1", "-o", "precompute.rows_per_shard=4")
    try:
        assert ranks[0].wait_until(lambda: bool(list(folder.glob("two/train/part-*"))))
        ranks[1].signal(signal.SIGTERM)
        assert [rank.finish(20) for rank in ranks] == [75, 75], [rank.err for rank in ranks]
        assert "stopped as asked; " in ranks[0].err and "units of train saved" in ranks[0].err
        assert "refshard:" not in ranks[1].err
    finally:
        for rank in ranks:
            rank.kill()


def test_an_error_of_the_leader_ends_all_with_its_status(config: Path) -> None:
    folder = config.parent
    with (folder / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": "a", "chosen": 3, "rejected": "b"}\n')
    words = ("precompute", "--config", config, "-o", SPLIT, "-o", f"precompute.output={folder / 'two'}")
    ranks = start_ranks(2, *words)
    assert [rank.finish(30) for rank in ranks] == [65, 65], [rank.err for rank in ranks]
    assert "pairs.jsonl:41: chosen" in ranks[0].err


@pytest.mark.parametrize("victim", [0, 1], ids=["the leader", "a follower"])
def test_one_of_them_killed_ends_the_other_with_75(config: Path, victim: int) -> None:
    folder = config.parent
    words = ("precompute", "--config", config, "-o", SPLIT, "-o", f"precompute.output={folder / 'two'}")
    ranks = start_ranks(2, *words, "-o", "precompute.tokens_per_batch=1", "-o", "precompute.rows_per_shard=4")
    try:
        assert ranks[0].wait_until(lambda: bool(list(folder.glob("two/train/part-*"))))
        ranks[victim].kill()
        assert ranks[1 - victim].finish(20) == 75, ranks[1 - victim].err
        assert "another process of this launch has ended" in ranks[1 - victim].err
    finally:
        for rank in ranks:
            rank.kill()


def _rank_without_memory(config: str, folder: str, environment: dict[str, str], fault: str) -> None:
    """A process of a launch in which batches of more than 200 tokens do not fit; run in a process of its own."""
    redirected(folder, environment)
    from pipeline.scoring import forward as scoring_forward
    from pipeline.scoring import scorer, tensor_parallel
    from stages import cli

    rank = int(environment["RANK"])

    def prepare(model: Any) -> None:
        scoring_forward.prepare(model)
        forward = model.forward

        def short_of_memory(*args: Any, **kwargs: Any) -> Any:
            large = kwargs["input_ids"].numel() > 200
            if large and (fault == "in all" or (fault == "in the follower, before" and rank == 1)):
                raise torch.OutOfMemoryError("CUDA out of memory")
            outputs = forward(*args, **kwargs)
            if large and fault == "in the follower, after" and rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return outputs

        model.forward = short_of_memory

    scorer.prepare = prepare
    tensor_parallel._PATIENCE_AFTER_FAILURE = tensor_parallel.timedelta(seconds=1)
    cli.sys.argv = ["refshard", "precompute", "--config", config, "-o", SPLIT, "-o", "precompute.output=" + folder]
    cli.run()


def _run_without_memory(config: Path, fault: str) -> tuple[list[int], list[str], Path]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [Path(tempfile.mkdtemp(dir=config.parent)) for _ in range(2)]
    ranks = []
    for rank, folder in enumerate(folders):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in launched.items()}}
        process = _FORKS.Process(target=_rank_without_memory, args=(str(config), str(folder), environment, fault))
        process.start()
        ranks.append(process)
    for process in ranks:
        process.join(30)
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return statuses, [said(str(folder))[1] for folder in folders], folders[0]


@pytest.mark.parametrize("fault", ["in all", "in the follower, after"])
def test_memory_that_ran_out_halves_the_batches_of_all(config: Path, fault: str) -> None:
    statuses, errors, folder = _run_without_memory(config, fault)
    assert statuses == [0, 0], errors
    assert "Out of memory: resuming with 256 tokens in a batch" in errors[0]
    assert "Out of memory: resuming with 128 tokens in a batch" in errors[0]
    gap = np.abs(_token_logps(_store(folder)) - _token_logps(_store(config.parent / "shards"))).max()
    assert gap < 1e-5


def test_memory_that_ran_out_in_one_while_the_other_waits_for_it_ends_both_with_the_way_on(config: Path) -> None:
    statuses, errors, _ = _run_without_memory(config, "in the follower, before")
    assert statuses[1] == 2
    assert "precompute.tokens_per_batch: memory ran out in one process of this launch" in errors[1]
    assert statuses[0] == 75
    assert "another process of this launch has ended" in errors[0]


def _one_of_one(monkeypatch: pytest.MonkeyPatch) -> Ensemble:
    """A launch of one process, as far as it is told."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.scoring.tensor_parallel.processes_of_launch", lambda: (0, 2))
    return Ensemble(StopFlag())


def test_a_step_is_done_when_the_gpu_is_done_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is handed a whole pass at once: a sum that another process never came to would meet the next step's."""
    ensemble, events = _one_of_one(monkeypatch), list[str]()
    try:
        worst = ensemble._worst
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("waited"))
        monkeypatch.setattr(ensemble, "_worst", lambda *how: (events.append("said"), worst(*how))[1])

        def step() -> None:
            events.append("begun")

        def fails() -> None:
            step()
            raise torch.OutOfMemoryError("CUDA out of memory")

        ensemble.together(step)
        with pytest.raises(torch.OutOfMemoryError):
            ensemble.together(fails)
    finally:
        torch.distributed.destroy_process_group()
    assert events == ["begun", "waited", "said"] * 2


# What can't be split


def test_one_process_can_not_split_a_reference() -> None:
    with pytest.raises(ConfigError, match=r"precompute\.tp_plan: splits each layer over several processes"):
        Ensemble(StopFlag())


def test_a_reference_that_can_not_be_split_is_refused(
    config: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.config.reader import load_config
    from pipeline.models.loading import load_reference

    three = make_model(tmp_path / "three", tokenizer, num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    monkeypatch.setenv("WORLD_SIZE", "2")
    uneven = load_config(config, [SPLIT, f"policy.model={three}"])
    with pytest.raises(ConfigError, match="has 3 key and value heads, which 2 processes can't share evenly"):
        load_reference(uneven, torch.device("cpu"))
    settings = (three / "config.json").read_text()
    (three / "config.json").write_text(settings.replace('"model_type": "llama"', '"model_type": "gpt2"'))
    with pytest.raises(ConfigError, match=r"transformers has no plan to split gpt2; use precompute\.device_map: auto"):
        load_reference(uneven, torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precompute.device_map=auto"], "precompute.tp_plan: must be left out if device_map is set"),
        (["reference.model=m", "reference.quantization.bits=8"], "quantized weights, which can't be split"),
        (["policy.quantization.bits=4", "policy.lora.r=4"], "quantized weights, which can't be split"),
        (["policy.adapter=a"], "an adapter, whose weights are not split"),
        (["reference.model=m", "reference.adapter=a"], "an adapter, whose weights are not split"),
        (["reference.sync.steps=4"], "must be left out if reference.sync is set"),
    ],
)
def test_what_does_not_go_with_a_split_reference_is_refused_before_anything_is_loaded(
    config: Path, overrides: list[str], message: str
) -> None:
    from pipeline.config.reader import load_config

    with pytest.raises(ConfigError, match=message):
        load_config(config, [SPLIT, *overrides])


def test_a_sample_is_scored_again_by_a_reference_that_is_spread_where_there_are_several_gpus(
    config: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.scoring import scorer
    from stages import verify

    real, places = scorer.load_reference, []

    def load(config: Any, device: torch.device) -> Any:
        places.append(config.precompute.device_map)
        monkeypatch.undo()
        return real(config, device)

    for gpus in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(scorer, "load_reference", load)
        verify.run(str(config.parent / "shards"), model=str(model_folder), sample=4, clean=False)
    assert places == [None, "auto"]
