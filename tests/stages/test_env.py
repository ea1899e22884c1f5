"""What a bug report is told: versions, devices and extras; nothing secret."""

import json
from importlib import metadata

import pytest
import torch
from click.testing import CliRunner

from stages.cli import main
from stages.env import environment


def test_versions_devices_and_extras_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == metadata.version("transformers")
    assert any(name.startswith(("GPU", "CUDA")) for name in found["devices"])
    assert {"bitsandbytes", "s3fs", "plotly", "deepspeed"} <= found["optional"].keys()
    assert found["variables"]["OMP_NUM_THREADS"] == "1"


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
