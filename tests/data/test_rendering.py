"""A template has bounds that it can't evade, and its process is never asked for another template's text."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import signals
from pipeline.base.errors import UnfinishedError
from pipeline.config.data import DataConfig
from pipeline.data import rendering
from pipeline.data.loading import UnitQueue
from pipeline.data.rendering import TemplateError, apply_template
from pipeline.data.sources import open_source
from support.models import make_tokenizer
from support.runs import write_jsonl

TURNS = [{"role": "user", "content": "Hi"}]
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
# Python's own loop; one product of integers in C; one regular expression in C.
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x = 7 ** (7 ** 12) %}",
    "{{ ('a ' * 3000000) | wordwrap(1) | length }}",
]
GREEDY = ["{{ 'a b ' * 50000000 }}", "{% set x = 'a' * (2 ** 33) %}"]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_MOST_SECONDS", 0.4)


def render(template: str, tokenizer: Any = None) -> list[tuple[str, list[int]]]:
    return apply_template(tokenizer or make_tokenizer(template=template), [(TURNS, True), (TURNS, False)], {})


def test_it_gives_what_the_library_gives() -> None:
    tokenizer = make_tokenizer(bos=True, template="{{ bos_token }}" + PLAIN + "{{ x }}")
    found = apply_template(tokenizer, [(TURNS, True), (TURNS * 2, False)], {"x": "!", "tools": None})
    for (text, ids), messages in zip(found, (TURNS, TURNS * 2), strict=True):
        assert text == tokenizer.apply_chat_template(messages, tokenize=False, x="!")
        assert ids == tokenizer.apply_chat_template(messages, x="!")["input_ids"]


@pytest.mark.parametrize("template", ENDLESS)
@pytest.mark.usefixtures("brief")
def test_a_template_without_an_end_is_ended_from_outside(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError, match=r"it runs for more than 0\.4 seconds"):
        render(template)
    assert time.monotonic() - began < 10
    assert render(PLAIN)[0][0] == "Hi"


@pytest.mark.parametrize("template", GREEDY)
def test_a_templates_text_and_memory_are_bounded(template: str) -> None:
    with pytest.raises(TemplateError, match=r"it writes 200,000,000 characters, more than 16,777,216|MemoryError"):
        render(template)


def test_a_tokenizer_that_has_changed_is_seen() -> None:
    tokenizer = make_tokenizer(template=PLAIN)
    assert render("", tokenizer)[0][0] == "Hi"
    tokenizer.chat_template = PLAIN + "!"
    assert render("", tokenizer)[0][0] == "Hi!"
    tokenizer.add_tokens(["Hi!"])
    assert render("", tokenizer)[0] == ("Hi!", [len(tokenizer) - 1])
    tokenizer.chat_template = PLAIN + "{{ eos_token }}"
    tokenizer.eos_token = "<pad>"
    assert render("", tokenizer)[0][0] == "Hi<pad>"
    assert render(PLAIN + "?")[0][0] == "Hi?"


def test_each_thread_and_each_fork_has_a_process_of_its_own() -> None:
    tokenizer = make_tokenizer(template=PLAIN)
    found = [render("", tokenizer)]
    thread = threading.Thread(target=lambda: found.append(render("", tokenizer)))
    thread.start()
    thread.join()
    ours, theirs = multiprocessing.Pipe()
    if os.fork() == 0:
        theirs.send(render("", tokenizer))
        os._exit(0)
    assert ours.poll(20)
    assert [*found, ours.recv(), render("", tokenizer)] == [found[0]] * 4


def test_a_process_that_is_killed_is_not_the_templates_fault() -> None:
    tokenizer = make_tokenizer(template=PLAIN)
    render("", tokenizer)
    os.kill(rendering._of_thread.process._pid, signal.SIGKILL)
    with pytest.raises(UnfinishedError, match="ended from outside"):
        render("", tokenizer)
    assert render("", tokenizer)[0][0] == "Hi"


@pytest.mark.parametrize("num_loaders", [0, 1])
def test_a_request_to_stop_is_heeded_while_a_template_computes(
    num_loaders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = signals.StopFlag(time.monotonic() + 3600)
    monkeypatch.setattr(signals, "_watched", flag)
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = [{"prompt": TURNS, **answers}] * 3
    data = DataConfig(path=str(write_jsonl(tmp_path / "chat.jsonl", rows)), on_bad_row="skip")
    tokenizer = make_tokenizer(template=ENDLESS[1])
    threading.Timer(0.5, flag.request).start()
    began = time.monotonic()
    queue = UnitQueue(open_source(data), tokenizer, data, rows_per_unit=2, num_loaders=num_loaders)
    with queue as units, pytest.raises(UnfinishedError, match="stopped as asked"):
        list(units)
    assert time.monotonic() - began < 20
