"""A template that asks for the date: both stages tell it the store's, on whatever day they run."""

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from pipeline.config.reader import load_config
from pipeline.store import dating
from stages import inspect, train
from stages.check import command as check
from stages.precompute import command as precompute
from support.models import make_model, make_tokenizer

TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def go_on(monkeypatch: pytest.MonkeyPatch, date: str) -> None:
    """Let it be another day, for the library and for this program."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls.fromisoformat(f"{date}T12:00:00")

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(dating.datetime, "datetime", Clock)


def test_both_stages_tell_it_the_day_on_which_the_store_was_created(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Is it {i}?"}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": f"No, {i + 1}."}],
        }
        for i in range(32)
    ]
    model = make_model(tmp_path / "dated", make_tokenizer(template=TEMPLATE))
    config = load_config(make_run(rows=rows, policy={"model": str(model)}, train={"max_steps": 1}))
    go_on(monkeypatch, "2026-11-28")
    precompute.run(config, worker=(0, 2))
    go_on(monkeypatch, "2026-11-29")
    precompute.run(config, worker=(1, 2))
    # Stops if a pair has no log-probs.
    train.run(config)
    capsys.readouterr()
    limits = check.Limits()
    check.run(config, hardware="cpu", rows=None, limits=limits, as_json=False)
    assert "template date: 2026-11-28, which" in capsys.readouterr().out
    check.run(config, hardware="cpu", rows=None, limits=limits, as_json=True)
    assert json.loads(capsys.readouterr().out)["template_date"] == "2026-11-28"
    inspect.run(config.precompute.output, as_json=False)
    assert "template date 2026-11-28" in capsys.readouterr().out
    # The run's own settings name it too, for the commands that read them.
    assert load_config(tmp_path / "policy" / "refshard.yaml").data == dataclasses.replace(
        config.data, template_date="2026-11-28"
    )
