"""A store keeps the date on which it was created, for every worker, stage two, and the stores that copy from it."""

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import EvalSetConfig
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.models.files import load_tokenizer
from pipeline.models.identity import identity_of_run
from pipeline.store import dating
from pipeline.store.dating import with_template_date
from pipeline.store.store import create_store
from support.models import make_model, make_tokenizer
from support.stores import DECLARED, PLAN

MakeRun = Callable[..., Path]
TEMPLATE = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def config(make_run: MakeRun, tmp_path: Path) -> Config:
    model = make_model(tmp_path / "dated", make_tokenizer(template=TEMPLATE))
    return load_config(make_run(policy={"model": str(model)}))


def on(monkeypatch: pytest.MonkeyPatch, date: str) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls.fromisoformat(f"{date}T23:59:59")

    monkeypatch.setattr(dating.datetime, "datetime", Clock)


def create(config: Config) -> None:
    identity = identity_of_run(config, load_tokenizer(config))
    create_store(Path(config.precompute.output) / "train", identity, PLAN, DECLARED)


def test_the_store_fixes_the_date_of_its_creation(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(config)
    on(monkeypatch, "2026-11-28")
    first = with_template_date(config, tokenizer)
    assert first.data.template_date == "2026-11-28"
    assert identity_of_run(first, tokenizer)["tokenization"]["template_date"] == "2026-11-28"
    create(first)
    on(monkeypatch, "2026-11-29")
    assert with_template_date(config, tokenizer) == first
    # A set that is added to the run, a store that copies from this one, and a new start.
    held_out = dataclasses.replace(config.data, eval={"held": EvalSetConfig(split="test")})
    assert with_template_date(dataclasses.replace(config, data=held_out), tokenizer).data.template_date == "2026-11-28"
    copying = dataclasses.replace(
        config.precompute, output=f"{config.precompute.output}-2", reuse=[f"{config.precompute.output}/train"]
    )
    copied = with_template_date(dataclasses.replace(config, precompute=copying), tokenizer)
    assert copied.data.template_date == "2026-11-28"
    assert with_template_date(config, tokenizer, overwrite=True).data.template_date == "2026-11-29"


def test_the_setting_comes_first_and_is_compared(config: Config) -> None:
    tokenizer = load_tokenizer(config)
    fixed = dataclasses.replace(config, data=dataclasses.replace(config.data, template_date="2024-07-26"))
    assert with_template_date(fixed, tokenizer) is fixed
    create(fixed)
    assert with_template_date(config, tokenizer) == fixed


def test_a_store_of_an_earlier_version_has_no_date(config: Config) -> None:
    create(config)
    manifest = json.loads((Path(config.precompute.output) / "train" / "manifest.json").read_text())
    assert "template_date" not in manifest["identity"]["tokenization"]
    assert with_template_date(config, load_tokenizer(config)) == config


def test_a_template_that_asks_for_none_has_none(make_run: MakeRun) -> None:
    config = load_config(make_run(data={"template_date": "2024-07-26"}))
    tokenizer = load_tokenizer(config)
    assert "template_date" not in identity_of_run(config, tokenizer)["tokenization"]
    config = load_config(make_run())
    assert with_template_date(config, tokenizer) is config
