"""What trackers show of a run: its metrics, the library's settings and refshard's own, and stage one."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers.integrations import integration_utils
from transformers.trainer_callback import CallbackHandler

from pipeline.config.reader import load_config
from pipeline.run.attempts import claim_run
from pipeline.run.inputs import PolicyInputs, ReferenceInputs, RunInputs
from pipeline.run.records import PAGES
from pipeline.training.arguments import arguments_of_loop, training_arguments
from pipeline.training.tracking import attach, one_page
from support.processes import ROOT
from support.runs import refshard, simple_rows, write_jsonl

MakeRun = Callable[..., Path]

POLICY = PolicyInputs(model="m", adapter=None, dtype=None, parameters=1, trained_parameters=1)
INPUTS = RunInputs(
    reference=ReferenceInputs(name="sft", identity={}, fingerprint="f00d"),
    policy=POLICY,
    sets={},
    stage_one=[
        {"set": "train", "worker": "0/2", "pairs": 10, "tokens": 300, "seconds": 2.5, "device": "H200"},
        {"set": "train", "worker": "1/2", "pairs": 11, "tokens": 310, "seconds": 2.0, "device": "H200"},
        {"set": "test", "worker": "0/2", "pairs": None, "tokens": None, "seconds": None, "device": None},
    ],
)


def test_arguments_give_trackers_refshard_s_settings_and_stage_one_s_figures(make_run: MakeRun) -> None:
    held_out = {"été_2": {"split": "test"}}
    config = load_config(make_run(data={"eval": held_out}, cluster={"setup": "export KEY=secret"}))
    arguments = arguments_of_loop(training_arguments(config))
    before = arguments.to_dict()
    attach(arguments, config, INPUTS)
    shown = arguments.to_dict()
    assert before.items() <= shown.items()
    ours = {name: value for name, value in shown.items() if name not in before}
    assert json.loads(arguments.to_json_string()).keys() == shown.keys()
    assert (ours["loss/beta"], ours["loss/type"], ours["data/max_length"]) == (0.1, "sigmoid", 128)
    assert ours["precompute/output"] == config.precompute.output
    assert (ours["train/on_missing"], ours["data/eval/_t__2/split"]) == ("stop", "test")
    stage_one = {
        name.removeprefix("stage_one/"): value for name, value in ours.items() if name.startswith("stage_one/")
    }
    assert stage_one == {
        "reference": "sft",
        "fingerprint": "f00d",
        "pairs": 21,
        "tokens": 610,
        "seconds": 4.5,
        "device": "H200",
    }
    assert "secret" not in str(shown) and not any(name.startswith("cluster") for name in shown)


def test_a_run_without_a_reference_or_costs_shows_none(make_run: MakeRun) -> None:
    config = load_config(make_run())
    arguments = training_arguments(config)
    attach(arguments, config, dataclasses.replace(INPUTS, reference=None, stage_one=[]))
    assert not any(name.startswith("stage_one") for name in arguments.to_dict())


# --- One page for a run ---

VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME", "MLFLOW_RUN_ID", "MLFLOW_MAX_LOG_PARAMS")


class Tracker(transformers.TrainerCallback):
    """Behaves as the library's trackers do."""

    logging_dir: str | None = None
    ended = 0

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        self.told = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        self.logging_dir = self.logging_dir or f"{args.output_dir}/runs/first"

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ended += 1


class Gone(Exception):
    """A run that the server does not have."""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Train with trackers; gives what they are told of their pages."""
    kinds = {name: type(name, (Tracker,), {}) for name in ("wandb", "mlflow", "trackio", "tensorboard", "clearml")}
    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", kinds)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def get_run(page: str) -> Any:
        if page != "m1":
            raise Gone
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))

    def trained(*, resumes: bool, page: str = "m1", names: Collection[str] = kinds, fails: bool = False) -> Any:
        active = SimpleNamespace(info=SimpleNamespace(run_id=page))
        monkeypatch.setitem(
            sys.modules,
            "mlflow",
            SimpleNamespace(
                get_run=get_run, active_run=lambda: active, exceptions=SimpleNamespace(MlflowException=Gone)
            ),
        )
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="w1")))
        current = SimpleNamespace(get=lambda: SimpleNamespace(name="t1"))
        trackio = SimpleNamespace(context_vars=SimpleNamespace(current_run=current))
        monkeypatch.setitem(sys.modules, "trackio", trackio)
        trackers = [kinds[name]() for name in names]
        handler = CallbackHandler([*trackers], None, None, None, None)
        trainer: Any = SimpleNamespace(
            callback_handler=handler,
            add_callback=handler.add_callback,
            args=SimpleNamespace(run_name=None, output_dir=str(tmp_path)),
            state=transformers.TrainerState(is_world_process_zero=True),
            control=transformers.TrainerControl(),
            model=None,
            processing_class=None,
        )
        begun = (trainer.args, trainer.state, trainer.control)
        with one_page(trainer, claim_run(tmp_path, {}), resumes=resumes):
            handler.on_train_begin(*begun)
            handler.on_train_end(*begun)
            # The last evaluation may follow.
            assert [tracker.ended for tracker in trackers] == [0] * len(trackers)
            if fails:
                raise KeyError
        assert [tracker.ended for tracker in trackers] == [1] * len(trackers)
        return {
            "run_name": trainer.args.run_name,
            **{type(tracker).__name__: tracker.logging_dir for tracker in trackers if tracker.logging_dir},
            **(trackers[0].told if trackers else {}),
        }

    return trained


def test_a_resumed_run_continues_the_pages_of_the_attempt_before(
    train: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(resumes=True)["run_name"] is None
    pages = {"wandb": "w1", "mlflow": "m1", "trackio": "t1", "tensorboard": "runs/first"}
    assert json.loads((tmp_path / PAGES).read_text()) == pages
    (tmp_path / PAGES).write_text(json.dumps({**pages, "tensorboard": "runs/earlier"}))
    told = {"run_name": "t1", "WANDB_RUN_ID": "w1", "WANDB_RESUME": "allow"}
    told |= {"MLFLOW_RUN_ID": "m1", "MLFLOW_MAX_LOG_PARAMS": "0"}
    again = train(resumes=True)
    assert told.items() <= again.items() and again["tensorboard"] == str(tmp_path / "runs/earlier")
    assert not os.environ.keys() & set(VARIABLES)
    # Only those of the trackers that are in use, and what the environment says first.
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert train(resumes=True, names=["wandb"])["WANDB_RUN_ID"] == "mine"
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert train(resumes=True)["run_name"] == "t1"


def test_a_run_that_begins_anew_gets_new_pages(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    train(resumes=False)
    again = train(resumes=False)
    assert again["run_name"] is None and not again.keys() & set(VARIABLES)


def test_a_page_that_is_gone_stops_no_run(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    train(resumes=False, page="m2")
    assert "MLFLOW_RUN_ID" not in train(resumes=True)
    (tmp_path / PAGES).write_text("{")
    assert "WANDB_RUN_ID" not in train(resumes=True)


def test_an_error_leaves_the_environment_as_it_was(train: Callable[..., dict[str, Any]]) -> None:
    train(resumes=False)
    with pytest.raises(KeyError):
        train(resumes=True, fails=True)
    assert not os.environ.keys() & set(VARIABLES)


# --- The trackers themselves: pip install wandb mlflow trackio ---

_Page = tuple[str, Mapping[str, Any], list[tuple[int, dict[str, Any]]]]
"""Name, settings, and what was logged at each step, under the log's names"""


def read_wandb(folder: Path) -> _Page:
    """Read the files of an offline run: blocks of 32 KiB with pieces of records, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    # `wandb sync` makes one run of files with one ID.
    assert len({file.name for file in files}) == 1
    name, settings, logged = "", {}, []
    for content in (record for file in files for record in _records(file.read_bytes())):
        record = Record()
        record.ParseFromString(content)
        name = record.run.display_name or name
        for update in (*record.run.config.update, *record.config.update):
            settings[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if items:
            logged.append((items["train/global_step"], _as_logged(items)))
    return name, settings, logged


def _as_logged(items: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("eval/", "eval_", 1).removeprefix("train/"): value for key, value in items.items()}


def _records(content: bytes) -> Iterator[bytes]:
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole = (b"" if kind in (1, 2) else whole) + content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole


def read_mlflow(folder: Path) -> _Page:
    import mlflow

    client = mlflow.MlflowClient(f"file://{folder / 'mlruns'}")
    [run] = client.search_runs(["0"])
    by_step: dict[int, dict[str, Any]] = {}
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            by_step.setdefault(metric.step, {})[key] = metric.value
    return str(run.info.run_name), run.data.params, sorted(by_step.items())


def read_trackio(folder: Path) -> _Page:
    import sqlite3

    import orjson

    [file] = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        [(name, settings)] = database.execute("SELECT run_name, config FROM configs")
        rows = database.execute("SELECT metrics FROM metrics ORDER BY step").fetchall()
    logged = [orjson.loads(metrics) for (metrics,) in rows]
    return name, orjson.loads(settings), [(entry["train/global_step"], _as_logged(entry)) for entry in logged]


def read_tensorboard(folder: Path) -> _Page:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [page] = (folder / "policy" / "runs").iterdir()
    events = EventAccumulator(str(page))
    events.Reload()
    by_step: dict[int, dict[str, Any]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            by_step.setdefault(event.step, {}).update(_as_logged({tag: event.value}))
    settings = json.loads(events.Tensors("args/text_summary")[-1].tensor_proto.string_val[0])
    return settings["run_name"], settings, sorted(by_step.items())


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio, "tensorboard": read_tensorboard}


def command(folder: Path, *words: Any) -> None:
    """Run a command in a process of its own, since trackers keep threads and services. They write to the folder."""
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"file://{folder / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    subprocess.run([sys.executable, "-m", "stages.cli", *map(str, words)], cwd=ROOT, env=environment, check=True)


@pytest.mark.nightly
@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_shows_a_run_s_metrics_and_settings_on_one_page(make_run: MakeRun, tracker: str) -> None:
    """The run is trained in two attempts. Its held-out set is evaluated after the training."""
    pytest.importorskip(tracker)
    held_out = write_jsonl(make_run().parent / "test.jsonl", simple_rows(4, 50))
    config = make_run(
        data={"eval": {"test": {"path": str(held_out)}}},
        train={"report_to": tracker, "run_name": "first", "lr_scheduler_type": "constant", "save_strategy": "steps"},
        loss={"beta": 0.3},
    )
    folder = config.parent
    refshard("precompute", "--config", config)
    for steps in (2, 4):
        command(folder, "train", "--config", config, "-o", f"train.max_steps={steps}")
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    name, settings, logged = READERS[tracker](folder)
    assert name == "first"
    # MLflow's values are texts.
    assert float(settings["loss/beta"]) == 0.3
    assert float(settings["learning_rate"]) == 1e-3
    assert float(settings["stage_one/pairs"]) == 28
    log = [json.loads(line) for line in (folder / "policy" / "log.jsonl").read_text().splitlines()]
    for key, steps in (("loss", [1, 2, 3, 4]), ("rewards/margins", [1, 2, 3, 4]), ("eval_loss", [2, 4])):
        ours = [(entry["step"], entry[key]) for entry in log if key in entry]
        theirs = [(step, entry[key]) for step, entry in logged if key in entry]
        assert [step for step, _ in theirs] == steps
        assert theirs == [(step, pytest.approx(value, rel=1e-6)) for step, value in ours]


@pytest.mark.nightly
@pytest.mark.parametrize("tracker", READERS)
def test_windows_of_a_moving_reference_share_a_page_whose_end_is_there(make_run: MakeRun, tracker: str) -> None:
    """Each is trained in a fork, which must end as other processes do for its tracker to write all."""
    pytest.importorskip(tracker)
    sync = {"sync": {"steps": 2, "mixup_alpha": 0.5}}
    config = make_run(train={"report_to": tracker, "run_name": "first", "max_steps": 4}, reference=sync)
    command(config.parent, "train", "--config", config)
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    _, _, logged = READERS[tracker](config.parent)
    assert [step for step, entry in logged if "loss" in entry] == [1, 2, 3, 4]
