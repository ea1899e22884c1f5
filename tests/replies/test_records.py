"""generations.jsonl: what is written is read again, and a damaged file is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import DataError
from pipeline.replies.records import Generation, Reply, read_generations, write_generations

REPLY = Reply(text="\ud800 a\n\u2028", num_tokens=1, ref_logps=-1.25, policy_logps=-2.0, reward=None)
GENERATION = Generation(
    set_name="test",
    row=3,
    prompt="ü\n",
    step=7,
    temperature=0.5,
    max_tokens=9,
    seed=1,
    num_prompts=2,
    reward_by="a judge",
    reference=REPLY,
    policy=replace(REPLY, reward=2.0),
)


def test_generations_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_generations(tmp_path, [GENERATION, replace(GENERATION, row=4, reward_by=None, num_prompts=None)])
    (first, second) = read_generations(tmp_path / "generations.jsonl")
    assert first == GENERATION
    assert (second.row, second.reward_by, second.num_prompts) == (4, None, None)
    assert json.loads((tmp_path / "generations.jsonl").read_text().splitlines()[0])["prompts"] == 2


@pytest.mark.parametrize("change", [{"policy": {"ref_logps": None}}, {"prompt": None}, {"reference": 1}, {"row": "x"}])
def test_generations_that_were_damaged_are_refused_by_line(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "generations.jsonl"
    write_generations(tmp_path, [GENERATION])
    good = file.read_text()
    for bad in (json.dumps({**json.loads(good), **change}), good[:-9], "[" * 9000):
        file.write_text(good + bad)
        with pytest.raises(DataError, match=r"generations\.jsonl, line 2"):
            read_generations(file)
