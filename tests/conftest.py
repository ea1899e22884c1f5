"""Fixtures that many tests share, and the order in which files of tests are run."""

import gc
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.base import signals
from support.models import make_model, make_tokenizer
from support.processes import ROOT
from support.runs import simple_rows, write_config, write_jsonl

# The checkout's own package, also where another checkout is installed.
_spec = importlib.util.spec_from_file_location("refshard", ROOT / "stages" / "refshard" / "__init__.py")
assert _spec is not None and _spec.loader is not None
sys.modules["refshard"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["refshard"])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Let `-m gpu` import only the modules that have such tests: a GPU machine may lack what the others need."""
    if config.option.markexpr != "gpu" or collection_path.suffix != ".py":
        return None
    return "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put modules with slow tests first, so that at the end of a run on two workers neither waits for the other long.

    A module stays whole and in its own order, for its fixtures. Tests of a GPU are skipped without one.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU is visible"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of the garbage collections that every trainer asks for; each takes long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_request_to_stop_is_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_watched", None)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture
def make_run(tmp_path: Path, model_folder: Path) -> Callable[..., Path]:
    """Write a config of both stages on `rows`; keyword arguments are merged into its sections."""

    def make(rows: list[Any] | None = None, **changes: Mapping[str, Any]) -> Path:
        data = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(24) if rows is None else rows)
        sections: dict[str, Any] = {
            "data": {"path": str(data), "max_length": 128},
            "policy": {"model": str(model_folder)},
            "precompute": {"output": str(tmp_path / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
            "loss": {"beta": 0.1},
            "train": {
                "output_dir": str(tmp_path / "policy"),
                "per_device_train_batch_size": 4,
                "max_steps": 4,
                "learning_rate": "1e-3",
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": True,
            },
        }
        for name, values in changes.items():
            sections.setdefault(name, {}).update(values)
        return write_config(tmp_path / "run.yaml", **sections)

    return make
