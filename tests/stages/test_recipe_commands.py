"""The ready settings are listed with what they need, and copied once."""

from importlib.resources import files
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.base.errors import ConfigError, StorageError
from stages.cli import main


def test_every_recipe_is_listed_with_its_hardware() -> None:
    listed = CliRunner().invoke(main, ["recipes"]).output
    names = [file.name for file in files("stages.recipes").iterdir() if file.name.endswith(".yaml")]
    assert len(names) > 10
    assert all(f"{name.removesuffix('.yaml')}\n" in listed for name in names)
    assert listed.count("    hardware   ") == len(names) - 1  # the embedded default runs anywhere
    assert "yaml-language-server" not in listed


@pytest.mark.parametrize("name", ["hh_rlhf", "hh_rlhf.yaml"])
def test_a_copy_is_the_recipe_and_replaces_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["recipes", "copy", name])
    assert "refshard check --config hh_rlhf.yaml" in done.output
    copied = (tmp_path / "hh_rlhf.yaml").read_text()
    assert copied == (files("stages.recipes") / "hh_rlhf.yaml").read_text()
    again = CliRunner().invoke(main, ["recipes", "copy", name])
    assert isinstance(again.exception, ConfigError)
    assert "hh_rlhf.yaml: must be a new file, it exists already" in str(again.exception)
    CliRunner().invoke(main, ["recipes", "copy", name, "other.yaml"])
    assert (tmp_path / "other.yaml").read_text() == copied
    nowhere = CliRunner().invoke(main, ["recipes", "copy", name, "no/such.yaml"])
    assert isinstance(nowhere.exception, StorageError)


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    refused = CliRunner().invoke(main, ["recipes", "copy", "nothing"])
    assert str(refused.exception).startswith("NAME: must be one of default, hh_rlhf, ")
