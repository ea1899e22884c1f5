"""What a bug report is told: versions, devices and extras; nothing secret."""

import json
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from stages.cli import main
from stages.env import _devices, environment


def test_versions_devices_and_extras_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == metadata.version("transformers")
    assert any(name.startswith(("GPU", "CUDA")) for name in found["devices"])
    assert {"bitsandbytes", "s3fs", "plotly", "deepspeed"} <= found["optional"].keys()
    assert found["variables"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("major", "hip", "said"), [(7, None, "bfloat16 emulated"), (8, None, "bfloat16"), (7, "6", "bfloat16")]
)
def test_emulated_bfloat16_is_told(major: int, hip: str | None, said: str) -> None:
    """torch counts it as supported."""
    facts = SimpleNamespace(name="T4", total_memory=16 * 2**30, major=major, minor=5)
    found: Any = SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 1,
            get_device_properties=lambda index: facts,
            is_bf16_supported=lambda including_emulation=True: True,
        ),
        version=SimpleNamespace(cuda=None if hip else "12.8", hip=hip),
        distributed=SimpleNamespace(is_nccl_available=lambda: False),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
    )
    assert dict(_devices(found))["GPU 0"] == f"T4, 16 GiB, capability {major}.5, {said}"


def test_a_missing_extra_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.env.version_of", lambda name: None)
    assert environment()["optional"]["s3fs"] == "missing (pip install 'refshard[s3]')"


def test_both_forms_are_the_same_and_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    shown = CliRunner().invoke(main, ["env"])
    found = CliRunner().invoke(main, ["env", "--json"])
    assert shown.exit_code == found.exit_code == 0
    assert "hf_secret" not in shown.output + found.output
    for section, entries in json.loads(found.output).items():
        assert section in shown.output
        assert all(name in shown.output for name in entries)
