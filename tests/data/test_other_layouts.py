"""A row of another tool's layout is called by its name, with how to convert it; the page's conversions are read."""

import re
from typing import Any

import pytest

from pipeline.base.errors import BadRow
from pipeline.data.layouts import to_pair
from pipeline.data.other_layouts import looks_like
from pipeline.data.pairs import Pair
from support.processes import ROOT


def says(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


ASK, YES, NO = says("user", "Two?"), says("assistant", "Yes."), says("assistant", "No.")
PAIR = Pair(prompt=[ASK], chosen=[YES], rejected=[NO])


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


SHARE_GPT = {
    "conversations": [turn("human", "Two?")],
    "chosen": turn("gpt", "Yes."),
    "rejected": turn("gpt", "No."),
}
OPEN_AI = {
    "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [YES],
    "non_preferred_output": [NO],
}
ALPACA = {"instruction": "Two?", "input": "", "chosen": "Yes.", "rejected": "No."}
SWIFT = {"messages": [ASK, YES], "rejected_response": "No."}
SYSTEM_BESIDE = {"system": "Be brief.", "prompt": [ASK], "chosen": [YES], "rejected": [NO]}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (SHARE_GPT, "ShareGPT"),
        ({"chosen": [turn("human", "Two?"), turn("gpt", "Yes.")], "rejected": [turn("human", "Two?")]}, "ShareGPT"),
        (OPEN_AI, "OpenAI"),
        ({"input": OPEN_AI["input"], "chosen": None, "rejected": None}, "OpenAI"),
        (SWIFT, "ms-swift"),
        ({"messages": [ASK, YES], "rejected_messages": [ASK, NO]}, "ms-swift"),
        ({"messages": [ASK], "chosen_message": YES, "rejected_message": NO}, "LLaMA-Factory"),
        ({"context": [ASK], "completions": [{"rank": 0, "completion": [YES]}]}, "several scored or ranked"),
        ({"context": [ASK], "response1": "Yes.", "response2": "No.", "overall_preference": -2}, "two answers and a"),
        ({"prompt": "Two?", "completion": "Yes.", "label": True}, "KTO"),
        (ALPACA, "Alpaca"),
        ({"prompt": [ASK], "chosen": YES, "rejected": NO}, "one message where a list is expected"),
        ({"prompt": "Two?", "chosen": ["Yes."], "rejected": ["No."]}, "lists of texts"),
    ],
)
def test_a_row_that_fits_no_layout_is_called_what_it_looks_like(row: dict[str, Any], name: str) -> None:
    with pytest.raises(BadRow, match=rf"pairs\.jsonl:7: .*It looks like .*{name}.*Converting rows"):
        to_pair(row, {}, "pairs.jsonl:7")


@pytest.mark.parametrize("row", [{}, {"a": 1}, {"prompt": "Two?", "chosen": None, "rejected": 5}, {"chosen": [[]]}])
def test_a_row_like_no_layout_is_called_nothing(row: dict[str, Any]) -> None:
    assert looks_like(row) is None


def test_a_null_prompt_is_called_null() -> None:
    for row in ({"prompt": None, "chosen": [YES], "rejected": [NO]}, {"prompt": None, "chosen": "a", "rejected": "b"}):
        with pytest.raises(BadRow, match="prompt is null, and chosen and rejected share no"):
            to_pair(row, {}, "row")


def test_the_pages_conversions_give_pairs() -> None:
    text = (ROOT / "docs" / "guide.md").read_text()
    section = text[text.index("## Converting rows") :]
    [code] = re.findall(r"```python\n(.*?)```", section[: section.index("\n## ", 5)], re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # the page's own functions
    for name, row in (("sharegpt", SHARE_GPT), ("openai", OPEN_AI), ("alpaca", ALPACA), ("swift", SWIFT)):
        assert to_pair(names[name](row), {}, name) == PAIR, name
    joined = names["alpaca"]({**ALPACA, "instruction": "Add them.", "input": "2, 3"})
    assert joined["prompt"] == [says("user", "Add them.\n2, 3")]
    with_system = to_pair(names["system"](SYSTEM_BESIDE), {}, "system")
    assert with_system.prompt == [says("system", "Be brief."), ASK]
