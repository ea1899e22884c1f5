"""The books balance: every row is kept or dropped, and every drop and remark is counted under its name."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import BadRow, ConfigError, DataError
from pipeline.config.data import DataConfig
from pipeline.data.intake import KeptPair, Ledger, kept_pairs
from pipeline.data.layouts import to_pair
from pipeline.data.rows import Row
from pipeline.data.tokens import pair_key, tokenize
from support.models import make_tokenizer
from support.runs import simple_rows

TOKENIZER = make_tokenizer(bos=True)

# What each kind of row does at a max_length of 32: kept with these remarks, or dropped for this reason.
GOOD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({"prompt": "Two?", "chosen": " Yes.", "rejected": " No."}, ()),
    "identical": ({"prompt": "Two?", "chosen": " Yes.", "rejected": " Yes."}, ("identical",)),
    "long": ({"prompt": "Two?", "chosen": " Yes." * 40, "rejected": " No."}, ("truncated",)),
    "alike when cut": (
        {"prompt": "Two?", "chosen": " Yes." * 40, "rejected": " Yes." * 41},
        ("truncated", "identical_after_truncation"),
    ),
    "identical and long": (
        {"prompt": "Two?", "chosen": " Yes." * 40, "rejected": " Yes." * 40},
        ("identical", "truncated"),
    ),
    "merged": ({"prompt": "Two? ", "chosen": "I", "rejected": "A"}, ("merged_at_the_prompt's_end",)),
}
BAD: dict[str, tuple[Any, str]] = {
    "long prompt": ({"prompt": "Two?" * 40, "chosen": " Yes.", "rejected": " No."}, "prompt_too_long"),
    "identical behind a long prompt": (
        {"prompt": "Two?" * 40, "chosen": " Yes.", "rejected": " Yes."},
        "prompt_too_long",
    ),
    "damaged": (BadRow("not_json", "pairs.jsonl:5: not JSON"), "not_json"),
    "no rejected": ({"prompt": "Two?", "chosen": " Yes."}, "missing_column"),
    "null": ({"prompt": "Two?", "chosen": None, "rejected": " No."}, "wrong_type"),
    "empty": ({"prompt": "Two?", "chosen": "", "rejected": " No."}, "empty_completion"),
    "nothing shared": ({"chosen": "Yes.", "rejected": "No."}, "no_shared_prompt"),
}


def make_row(number: int, content: Mapping[str, Any] | Exception) -> Row:
    def load() -> Mapping[str, Any]:
        if isinstance(content, Exception):
            raise content
        return content

    return Row(number, f"pairs.jsonl:{number + 1}", load)


def take(contents: list[Any], **changes: Any) -> tuple[list[KeptPair], Ledger]:
    ledger = Ledger()
    data = DataConfig(**{"path": "pairs.jsonl", "max_length": 32, "on_bad_row": "skip", **changes})
    rows = [make_row(number, content) for number, content in enumerate(contents)]
    return list(kept_pairs(rows, TOKENIZER, data, ledger)), ledger


# --- The sums -----------------------------------------------------------------------------------------------------


@given(
    names=st.lists(st.sampled_from([*GOOD, *BAD]), max_size=12),
    on_identical=st.sampled_from(["keep", "drop"]),
)
@settings(deadline=None, max_examples=60)
def test_rows_are_those_kept_and_those_dropped_and_each_is_counted_as_what_it_is(
    names: list[str], on_identical: str
) -> None:
    kept, ledger = take([(GOOD | BAD)[name][0] for name in names], on_identical=on_identical)
    gone = {name: reason for name, (_, reason) in BAD.items()}
    if on_identical == "drop":
        gone |= {name: "identical" for name, (_, remarks) in GOOD.items() if "identical" in remarks}
    stays = [(number, name) for number, name in enumerate(names) if name not in gone]

    assert ledger.rows == len(names) == ledger.kept + sum(ledger.dropped.values())
    assert ledger.kept == len(kept)
    assert [pair.row for pair in kept] == [number for number, _ in stays]
    assert ledger.dropped == {r: n for r in set(gone.values()) if (n := sum(gone.get(name) == r for name in names))}
    remarks = [remark for _, name in stays for remark in GOOD[name][1]]
    assert ledger.noted == {remark: remarks.count(remark) for remark in remarks}
    assert [entry["row"] for entry in ledger.skipped] == [
        number for number, name in enumerate(names) if name in BAD and BAD[name][1] != "prompt_too_long"
    ]


@given(parts=st.lists(st.lists(st.sampled_from([*GOOD, *BAD]), max_size=5), max_size=4))
@settings(deadline=None, max_examples=30)
def test_ledgers_of_parts_add_up_to_that_of_the_whole(parts: list[list[str]]) -> None:
    total = Ledger()
    for names in parts:
        total.add(take([(GOOD | BAD)[name][0] for name in names])[1].as_dict())
    whole = take([(GOOD | BAD)[name][0] for names in parts for name in names])[1]
    assert total.as_dict() == whole.as_dict()


# --- Single rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_good_row_is_kept_with_its_remarks(name: str) -> None:
    content, remarks = GOOD[name]
    kept, ledger = take([content])
    assert len(kept) == ledger.kept == ledger.rows == 1
    assert ledger.noted == dict.fromkeys(remarks, 1)
    assert kept[0].truncated is ("truncated" in remarks)
    assert not ledger.dropped
    assert not ledger.skipped


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_dropped_under_its_reason(name: str) -> None:
    content, reason = BAD[name]
    kept, ledger = take([content])
    assert not kept
    assert ledger.dropped == {reason: 1}
    assert not ledger.noted


def test_skipped_row_is_listed_with_place_reason_and_message() -> None:
    _, ledger = take([GOOD["plain"][0], BAD["empty"][0]])
    assert ledger.skipped == [
        {
            "row": 1,
            "place": "pairs.jsonl:2",
            "reason": "empty_completion",
            "message": "pairs.jsonl:2: chosen is empty after the prompt",
        }
    ]


@pytest.mark.parametrize("name", [name for name in BAD if "long prompt" not in name])
def test_bad_row_stops_the_run_and_names_the_way_on(name: str) -> None:
    content, reason = BAD[name]
    with pytest.raises(BadRow, match=r"^pairs\.jsonl:\d+: .*Set data\.on_bad_row: skip, or fix the row") as caught:
        take([content], on_bad_row="stop")
    assert caught.value.reason == reason


def test_too_long_prompt_and_identical_pair_do_not_stop_the_run() -> None:
    contents = [BAD["long prompt"][0], GOOD["identical"][0], GOOD["plain"][0]]
    kept, ledger = take(contents, on_bad_row="stop", on_identical="drop")
    assert [pair.row for pair in kept] == [2]
    assert ledger.dropped == {"prompt_too_long": 1, "identical": 1}


def test_identical_is_judged_before_truncation() -> None:
    kept, ledger = take([GOOD["alike when cut"][0]], on_identical="drop")
    assert kept[0].pair.chosen_ids == kept[0].pair.rejected_ids
    assert ledger.noted["identical_after_truncation"] == 1


@pytest.mark.parametrize("max_length", [8, 32, None])
def test_key_is_that_of_the_pair_before_truncation(max_length: int | None) -> None:
    content = GOOD["long"][0]
    kept, _ = take([content], max_length=max_length)
    whole = tokenize(to_pair(content, {}, "row"), TOKENIZER, "row")
    assert kept[0].key == pair_key(whole)
    assert (kept[0].pair == whole) is (max_length is None)


def test_pair_carries_the_row_s_own_number_and_place() -> None:
    data = DataConfig(path="pairs.jsonl")
    kept = list(kept_pairs([make_row(4711, GOOD["plain"][0])], TOKENIZER, data, Ledger()))
    assert (kept[0].row, kept[0].place) == (4711, "pairs.jsonl:4712")


def test_columns_are_renamed() -> None:
    content = {"q": "Two?", "good": " Yes.", "bad": " No."}
    kept, _ = take([content], columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert kept[0].key == take([GOOD["plain"][0]])[0][0].key


# --- The stream ---------------------------------------------------------------------------------------------------


def test_rows_are_taken_one_at_a_time() -> None:
    taken: list[int] = []

    def rows() -> Iterator[Row]:
        for number, content in enumerate(simple_rows(5)):
            taken.append(number)
            yield make_row(number, content)

    ledger = Ledger()
    pairs = kept_pairs(rows(), TOKENIZER, DataConfig(path="pairs.jsonl"), ledger)
    assert taken == []
    next(pairs)
    assert taken == [0]
    assert (ledger.rows, ledger.kept) == (1, 1)


def _damaged_file() -> Iterator[Row]:
    yield make_row(0, GOOD["plain"][0])
    raise DataError("pairs.jsonl.gz: damaged gzip file")


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (_damaged_file, DataError),
        (lambda: iter([make_row(0, {"prompt": [{"role": "user", "content": "a"}], **_ANSWERS})]), ConfigError),
    ],
    ids=["damaged file", "no chat template"],
)
def test_what_is_no_fault_of_a_row_is_never_skipped(rows: Callable[[], Iterator[Row]], error: type[Exception]) -> None:
    data = DataConfig(path="pairs.jsonl", on_bad_row="skip")
    with pytest.raises(error):
        list(kept_pairs(rows(), TOKENIZER, data, Ledger()))


_ANSWERS = {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}


# --- Anything at all ----------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab \n\ud83d\x00", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner),
    max_leaves=6,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.sampled_from(["a", "b", ""])}),
    max_size=3,
)
_ROWS = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "other"]),
    _JSON | _MESSAGES | st.text("abc ", max_size=8),
)
_CHAT_TOKENIZER = make_tokenizer(template="{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")


@given(rows=st.lists(_ROWS, max_size=6), order=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_whatever_rows_hold_each_is_kept_or_dropped_by_name_in_any_order(rows: list[Any], order: Any) -> None:
    data = DataConfig(path="pairs.jsonl", max_length=32, on_bad_row="skip")
    numbered = [make_row(number, row) for number, row in enumerate(rows)]
    ledgers = [Ledger(), Ledger()]
    kept = list(kept_pairs(numbered, _CHAT_TOKENIZER, data, ledgers[0]))
    order.shuffle(numbered)
    shuffled = list(kept_pairs(numbered, _CHAT_TOKENIZER, data, ledgers[1]))
    assert ledgers[0].rows == len(rows) == len(kept) + ledgers[0].dropped.total()
    assert ledgers[0].as_dict() == ledgers[1].as_dict()
    assert [pair.row for pair in shuffled] == [row.number for row in numbered if row.number in {p.row for p in kept}]
    assert {pair.row: (pair.key, pair.pair) for pair in shuffled} == {pair.row: (pair.key, pair.pair) for pair in kept}


# --- For people ---------------------------------------------------------------------------------------------------


def test_summary_names_every_count_in_one_line() -> None:
    _, ledger = take([content for content, _ in (*GOOD.values(), *BAD.values())])
    assert ledger.summary() == (
        "13 rows, 6 pairs kept; 1 dropped: empty completion; 1 dropped: missing column; 1 dropped: no shared prompt; "
        "1 dropped: not json; 2 dropped: prompt too long; 1 dropped: wrong type; 2 identical; "
        "1 identical after truncation; 1 merged at the prompt's end; 3 truncated"
    )


def test_summary_writes_large_numbers_with_commas() -> None:
    assert Ledger(rows=12345, kept=12345).summary() == "12,345 rows, 12,345 pairs kept"


def test_a_tie_is_dropped_and_counted_and_stops_nothing() -> None:
    tied = {"context": "Two?", "response1": "a", "response2": "b", "overall_preference": 0}
    kept, ledger = take(
        [GOOD["plain"][0] if "plain" in GOOD else next(iter(GOOD.values()))[0], tied], on_bad_row="stop"
    )
    assert len(kept) == 1 and dict(ledger.dropped) == {"tie": 1} and not ledger.skipped


# Numbers that the loss takes besides the pair.

WITH_NUMBERS = DataConfig(path="pairs.jsonl", columns={"weight": "w", "margin": "m"})
PLAIN: dict[str, Any] = {"prompt": "Two?", "chosen": " Yes.", "rejected": " No."}


def test_weight_and_margin_are_read_and_do_not_change_the_key() -> None:
    rows = [make_row(0, {**PLAIN, "w": 2, "m": -0.5}), make_row(1, {**PLAIN, "w": 0, "m": 1})]
    first, second = kept_pairs(rows, TOKENIZER, WITH_NUMBERS, Ledger())
    assert (first.weight, first.margin, second.weight, second.margin) == (2.0, -0.5, 0.0, 1.0)
    (plain,) = kept_pairs(rows[:1], TOKENIZER, DataConfig(path="pairs.jsonl"), Ledger())
    assert (plain.weight, plain.margin) == (1.0, 0.0)
    assert first.key == second.key == plain.key


def test_weights_are_rounded_as_the_joined_sets_hold_them() -> None:
    (pair,) = kept_pairs([make_row(0, {**PLAIN, "w": 1e-60, "m": 0.1})], TOKENIZER, WITH_NUMBERS, Ledger())
    # One above 0 here that is 0 there would be trained on, and a step of such pairs would divide 0 by 0.
    assert pair.weight == 0 and pair.margin == np.float32(0.1)


@pytest.mark.parametrize(
    ("numbers", "reason", "message"),
    [
        ({"w": math.nan, "m": 0}, "bad_weight", "w must be a finite number from 0, got nan"),
        ({"w": math.inf, "m": 0}, "bad_weight", "got inf"),
        ({"w": 10**400, "m": 0}, "bad_weight", "got 1000"),
        ({"w": -1, "m": 0}, "bad_weight", "w must be a finite number from 0, got -1"),
        ({"w": "2", "m": 0}, "bad_weight", "got '2'"),
        ({"w": True, "m": 0}, "bad_weight", "got True"),
        ({"w": None, "m": 0}, "bad_weight", "got None"),
        ({"w": 1, "m": math.nan}, "bad_margin", "m must be a finite number, got nan"),
        ({"w": 1, "m": [1]}, "bad_margin", r"got \[1\]"),
        ({"m": 1}, "missing_column", "no column 'w' for data.columns.weight"),
    ],
    ids=str,
)
def test_a_weight_or_margin_that_is_no_number_is_refused_with_row_and_value(
    numbers: dict[str, Any], reason: str, message: str
) -> None:
    with pytest.raises(BadRow, match=f"pairs.jsonl:4: .*{message}") as refused:
        list(kept_pairs([make_row(3, {**PLAIN, **numbers})], TOKENIZER, WITH_NUMBERS, Ledger()))
    assert refused.value.reason == reason
