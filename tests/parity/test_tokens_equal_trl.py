"""The same row, tokenizer and template give the token ids that TRL's own preparation gives, run here beside ours.

Where TRL's way is a defect, a test named for it holds both: what TRL does, so that a change there is noticed, and
what is done here instead.
"""

import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.data_utils import extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from pipeline.config.data import DataConfig
from pipeline.data.intake import Ledger, kept_pairs
from pipeline.data.layouts import to_pair
from pipeline.data.rows import Row
from pipeline.data.sources import open_source, read_rows
from pipeline.data.tokens import TokenizedPair, tokenize
from support.models import make_tokenizer
from support.runs import HH, simple_rows

Ids = tuple[list[int], list[int], list[int]]


@pytest.fixture(scope="module", autouse=True)
def _without_progress_bars() -> Iterator[None]:
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not were_off:
        datasets.enable_progress_bars()


def trl_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int | None = None) -> list[dict[str, Any]]:
    """Prepare the rows as a DPOTrainer does when it is built."""
    return list(
        DPOTrainer._prepare_dataset(
            types.SimpleNamespace(_tokenizer=tokenizer),
            datasets.Dataset.from_list([dict(row) for row in rows]),
            tokenizer,
            types.SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"),
            "train",
        )
    )


def trl_ids(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Ids]:
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trl_rows(rows, tokenizer)]


def our_pair(row: Mapping[str, Any], tokenizer: Any) -> TokenizedPair:
    return tokenize(to_pair(row, {}, "row"), tokenizer, "row")


def our_ids(row: Mapping[str, Any], tokenizer: Any) -> Ids:
    pair = our_pair(row, tokenizer)
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def assert_equal_to_trl(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> None:
    """Compare all rows, both as they were written and as Arrow gives them back, nulls added."""
    theirs = trl_ids(rows, tokenizer)
    assert [our_ids(row, tokenizer) for row in rows] == theirs
    assert [our_ids(row, tokenizer) for row in datasets.Dataset.from_list([dict(row) for row in rows])] == theirs


# --- Plain text ---------------------------------------------------------------------------------------------------

PLAIN = [
    *simple_rows(6),
    {"prompt": "Say it in Greek:", "chosen": " Γειά σου, κόσμε! 👋🏽", "rejected": " 你好\n\n"},
    {"prompt": "It ends in a space: ", "chosen": "Four!", "rejected": " Five!"},
    {"prompt": "It ends in a newline:\n", "chosen": "\nFour!", "rejected": "Five!"},
    {"prompt": "EOS is there.", "chosen": " Four.</s>", "rejected": " Five.</s> "},
    {"prompt": "Two turns.</s>And one more", "chosen": " turn", "rejected": " turn."},
    {"prompt": "The turn is over.</s>", "chosen": "Four.", "rejected": "Five."},
    {"prompt": "Twice over.</s></s>", "chosen": "Four.</s></s>", "rejected": "</s>"},
    {"prompt": "Equal?", "chosen": " Yes.", "rejected": " Yes."},
]


@pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])
def test_plain_text_has_trl_s_ids(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    assert_equal_to_trl(PLAIN, tokenizer)
    prompt_ids, chosen_ids, _ = our_ids(PLAIN[0], tokenizer)
    assert (prompt_ids[0] == 0) is bos
    assert chosen_ids[-1] == tokenizer.eos_token_id


def test_empty_prompt_of_a_tokenizer_with_bos_has_trl_s_ids() -> None:
    assert_equal_to_trl([{"prompt": "", "chosen": "Four.", "rejected": "Five."}], make_tokenizer(bos=True))


def test_eos_that_swallows_the_space_after_it_stays_in_the_prompt() -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, special=True, normalized=False)], special_tokens=True)
    row = {"prompt": "The turn is over.</s> ", "chosen": "Four.", "rejected": "Five."}
    assert_equal_to_trl([row], tokenizer)
    assert our_ids(row, tokenizer)[0][-1] == tokenizer.eos_token_id


def make_merging_tokenizer() -> Any:
    """Bytes, and two merges that reach across the end of a question into its answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "?Ġ", "?ĠF"]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("?", "Ġ"), ("?Ġ", "F")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(" Four", " Five"), (" four", " Four"), (" Four", "\nFive"), ("\nFour", " Five")]
)
def test_prompt_is_cut_as_by_trl_where_tokens_merge_across_its_end(chosen: str, rejected: str) -> None:
    tokenizer = make_merging_tokenizer()
    row = {"prompt": "2 and 2?", "chosen": chosen, "rejected": rejected}
    assert_equal_to_trl([row], tokenizer)
    pair = our_pair(row, tokenizer)
    assert tokenizer.decode(trl_ids([row], tokenizer)[0][0]) == "2 and 2"
    assert tokenizer.decode(pair.chosen_ids) == f"?{chosen}</s>"
    assert pair.merged


def test_prompt_is_whole_where_nothing_merges() -> None:
    tokenizer = make_merging_tokenizer()
    row = {"prompt": "2 and 2?", "chosen": "\nFour", "rejected": "\nFive"}
    assert_equal_to_trl([row], tokenizer)
    assert not our_pair(row, tokenizer).merged


@pytest.mark.skipif(not HH.exists(), reason=f"the HH-RLHF pairs are not at {HH}")
@pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])
def test_hh_pairs_have_trl_s_ids(bos: bool) -> None:
    data = DataConfig(path=str(HH), split="train[:50]", max_length=None)
    pairs = [to_pair(row.load(), {}, row.place) for row in read_rows(open_source(data))]
    assert len(pairs) == 50
    assert_equal_to_trl(
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs], make_tokenizer(bos=bos)
    )


# --- Conversations ------------------------------------------------------------------------------------------------

# Four families that differ in who writes BOS, what ends a turn, where the system message goes, and what becomes of
# white space. `today` stands for any variable that chat_template_kwargs sets.
CHATML = (
    "{% if today is defined %}<|im_start|>system\nToday is {{ today }}.<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}<tool_call>{{ m.tool_calls | tojson }}</tool_call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% if today is defined or tools %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ today }}{% if tools %}{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{% endif %}<|eot_id|>"
    "{% endif %}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set start = 0 %}{% if messages[0].role == 'system' %}{% set start = 1 %}{% endif %}"
    "{% for m in messages[start:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{% if loop.first and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST] {% if loop.first and start %}{{ messages[0].content }}\n\n{% endif %}"
    "{% if loop.first and today is defined %}{{ today }} {% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first and today is defined %}{{ today }} {% endif %}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FAMILIES: dict[str, tuple[str, list[str], bool]] = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], False),
    "llama": (LLAMA, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], True),
    "mistral": (MISTRAL, ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"], True),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], True),
}


def make_chat_tokenizer(family: str) -> Any:
    template, markers, bos = FAMILIES[family]
    tokenizer = make_tokenizer(bos=bos, template=template)
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in markers], special_tokens=True)
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather_of",
            "description": "The weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    }
]
TOOLS_JSON = (
    '[{"type": "function", "function": {"name": "weather_of", "description": "The weather of a town.", "parameters":'
    ' {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}}}]'
)
SINGLE = {
    "prompt": [user("What is two plus two?")],
    "chosen": [assistant("Four! ")],
    "rejected": [assistant("\n Or, if you insist, 5.\n")],
}
ROWS: dict[str, dict[str, Any]] = {
    "single turn": SINGLE,
    "several turns": {
        "prompt": [user(" How do I bake bread?"), assistant("Mix flour, water, salt and yeast."), user("And then? ")],
        "chosen": [assistant("Wait; bake it hot.")],
        "rejected": [assistant("Wait"), user("Is that all?"), assistant("It is.")],
    },
    "system message": {
        **SINGLE,
        "prompt": [{"role": "system", "content": "You are a calculator."}, *SINGLE["prompt"]],
    },
    "tools as a list": {**SINGLE, "tools": TOOLS},
    "tools as JSON": {**SINGLE, "tools": TOOLS_JSON},
    "template kwargs": {**SINGLE, "chat_template_kwargs": {"today": "Friday"}},
}
CASES = [
    (family, kind)
    for family, kind in itertools.product(FAMILIES, ROWS)
    if not (family == "gemma" and (kind == "system message" or "tools" in kind))
]


def implicit(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same conversation with its prompt at the head of both answers."""
    whole = {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}
    return {**{name: value for name, value in row.items() if name != "prompt"}, **whole}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_conversation_has_trl_s_ids_with_its_prompt_explicit_and_implicit(family: str, kind: str) -> None:
    tokenizer, row = make_chat_tokenizer(family), ROWS[kind]
    assert_equal_to_trl([row], tokenizer)
    assert_equal_to_trl([implicit(row)], tokenizer)
    assert our_ids(implicit(row), tokenizer) == our_ids(row, tokenizer)
    # What the row says reaches its prompt.
    text = tokenizer.decode(our_ids(row, tokenizer)[0])
    assert "What is two plus two?" in text or "And then?" in text
    assert ("weather_of" in text) is ("tools" in kind)
    assert ("Friday" in text) is (kind == "template kwargs")
    assert ("calculator" in text) is (kind == "system message")


@pytest.mark.parametrize("family", FAMILIES)
def test_conversation_ends_as_its_template_ends_it(family: str) -> None:
    tokenizer = make_chat_tokenizer(family)
    end = {"chatml": "<|im_end|>\n", "llama": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>\n"}[family]
    prompt_ids, chosen_ids, _ = our_ids(SINGLE, tokenizer)
    answer = {"chatml": "Four! ", "llama": "Four! ", "mistral": " Four! ", "gemma": "Four!"}[family]
    assert tokenizer.decode(chosen_ids) == answer + end
    assert [*prompt_ids, *chosen_ids].count(0) == (tokenizer.bos_token_id is not None)


def test_rows_of_one_dataset_have_trl_s_ids_though_arrow_adds_null_keys() -> None:
    call = {"type": "function", "function": {"name": "weather_of", "arguments": {"town": "Turku"}}}
    rows = [
        ROWS["several turns"],
        {**SINGLE, "chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
    ]
    tokenizer = make_chat_tokenizer("chatml")
    assert datasets.Dataset.from_list(rows)[0]["chosen"][0]["tool_calls"] is None
    assert_equal_to_trl(rows, tokenizer)
    assert "Turku" in tokenizer.decode(our_ids(rows[1], tokenizer)[1])


def test_generation_prompt_that_the_answer_does_not_repeat_is_cut_as_by_trl() -> None:
    tokenizer = make_chat_tokenizer("chatml")
    row = {**SINGLE, "chat_template_kwargs": {"enable_thinking": False}}
    assert_equal_to_trl([row], tokenizer)
    assert our_pair(row, tokenizer).merged
    assert tokenizer.decode(trl_ids([row], tokenizer)[0][0]).endswith("<|im_start|>assistant\n")


def test_equal_conversations_end_their_prompt_before_the_last_message_as_by_trl() -> None:
    row = {"chosen": [user("Hello"), assistant("Hello"), user("Bye"), assistant("Bye")]}
    assert_equal_to_trl([{**row, "rejected": row["chosen"]}], make_chat_tokenizer("chatml"))
    assert_equal_to_trl([{**row, "rejected": row["chosen"][:2]}], make_chat_tokenizer("chatml"))


# --- Truncation ---------------------------------------------------------------------------------------------------

LONG = [
    *({**row, "row": i} for i, row in enumerate(simple_rows(8))),
    {"prompt": "Why?", "chosen": " Because." * 30, "rejected": " No.", "row": 8},
    {"prompt": "Why? " * 30, "chosen": " Because.", "rejected": " No.", "row": 9},
]


def _lengths_around_a_prompt_s() -> list[int]:
    prompt = len(our_ids(LONG[0], make_tokenizer(bos=True))[0])
    return [2, prompt - 1, prompt, prompt + 1, prompt + 4, 100_000]


@pytest.mark.parametrize("max_length", _lengths_around_a_prompt_s())
def test_ids_that_enter_trl_s_collator_are_ours_truncated_and_the_same_rows_are_dropped(max_length: int) -> None:
    tokenizer = make_tokenizer(bos=True)
    theirs = {row["row"]: row for row in trl_rows(LONG, tokenizer, max_length)}
    ledger = Ledger()
    rows = [Row(row["row"], f"row {row['row']}", lambda row=row: row) for row in LONG]  # type: ignore[misc]
    ours = {
        pair.row: pair.pair for pair in kept_pairs(rows, tokenizer, DataConfig(path="x", max_length=max_length), ledger)
    }
    assert list(ours) == list(theirs)
    assert ledger.dropped["prompt_too_long"] == len(LONG) - len(theirs)
    if not theirs:
        return
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)(list(theirs.values()))
    pairs = list(ours.values())
    wanted = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    for i, (prompt_ids, completion_ids) in enumerate(wanted):
        there, scored = batch["attention_mask"][i].bool(), batch["completion_mask"][i].bool()
        assert batch["input_ids"][i][there & ~scored].tolist() == prompt_ids
        assert batch["input_ids"][i][scored].tolist() == completion_ids


def test_lengths_under_test_drop_none_some_and_all() -> None:
    tokenizer = make_tokenizer(bos=True)
    kept = [len(trl_rows(LONG, tokenizer, max_length)) for max_length in _lengths_around_a_prompt_s()]
    assert kept[0] == 0
    assert 0 < kept[3] < len(LONG)
    assert kept[-1] == len(LONG)


# --- Where TRL's way is a defect ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])
def test_trl_doubles_the_eos_of_a_tokenizer_that_adds_its_own_and_we_keep_one(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos, auto_eos=True)
    eos = tokenizer.eos_token_id
    for row, (prompt_ids, *completions) in zip(PLAIN, trl_ids(PLAIN, tokenizer), strict=True):
        assert all(ids[-2:] == [eos, eos] for ids in completions)
        assert our_ids(row, tokenizer) == (prompt_ids, *(ids[:-1] for ids in completions))
        assert not our_pair(row, tokenizer).merged or row["prompt"].endswith(" ")


@pytest.mark.parametrize("auto_eos", [False, True], ids=["without EOS", "with EOS"])
def test_trl_doubles_the_bos_of_a_prompt_that_starts_with_one_and_we_keep_one(auto_eos: bool) -> None:
    tokenizer = make_tokenizer(bos=True, auto_eos=auto_eos)
    row = {"prompt": "<s>What is two plus two?", "chosen": " Four!", "rejected": " 5."}
    assert trl_ids([row], tokenizer)[0][0][:2] == [tokenizer.bos_token_id] * 2
    assert our_ids(row, tokenizer) == our_ids({**row, "prompt": "What is two plus two?"}, tokenizer)


@pytest.mark.parametrize("start", ["<s>", "<s><s>"])
def test_bos_of_the_text_alone_is_kept_as_by_trl(start: str) -> None:
    tokenizer = make_tokenizer(bos=False)
    tokenizer.bos_token = "<s>"
    row = {"prompt": f"{start}Two?", "chosen": " Yes.", "rejected": " No."}
    assert_equal_to_trl([row], tokenizer)
    assert our_ids(row, tokenizer)[0].count(tokenizer.bos_token_id) == start.count("<s>")


def test_trl_drops_a_too_long_prompt_without_a_word_and_we_count_it(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    with caplog.at_level("INFO"):
        assert [row["row"] for row in trl_rows(LONG[-2:], tokenizer, 32)] == [8]
    assert not caplog.records
    ledger = Ledger()
    rows = [Row(row["row"], "row", lambda row=row: row) for row in LONG[-2:]]  # type: ignore[misc]
    kept = kept_pairs(rows, tokenizer, DataConfig(path="x", max_length=32), ledger)
    assert [pair.row for pair in kept] == [8]
    assert "1 dropped: prompt too long" in ledger.summary()


@pytest.mark.parametrize(
    ("shared", "chosen", "rejected", "trl_prompt", "our_prompt"),
    [
        ("What is two plus two? F", "our", "ive", "What is two plus two? F", "What is two plus two?"),
        ("It's 19", "84", "99", "It's 19", "It's"),
        ("Γειά σου κό", "σμε", "ρη", "Γειά σου κό", "Γειά σου"),
    ],
)
def test_trl_cuts_an_implicit_prompt_inside_a_word_and_we_before_it(
    shared: str, chosen: str, rejected: str, trl_prompt: str, our_prompt: str
) -> None:
    tokenizer = make_tokenizer()
    row = {"chosen": shared + chosen, "rejected": shared + rejected}
    assert extract_prompt(row)["prompt"] == trl_prompt
    assert tokenizer.decode(trl_ids([row], tokenizer)[0][0]).startswith(our_prompt)
    ours = to_pair(row, {}, "row")
    assert (ours.prompt, ours.chosen) == (our_prompt, row["chosen"].removeprefix(our_prompt))
    explicit = {"prompt": our_prompt, "chosen": ours.chosen, "rejected": ours.rejected}
    assert [our_ids(row, tokenizer)] == trl_ids([explicit], tokenizer)


def test_trl_s_implicit_prompt_of_a_transcript_runs_into_the_answers_and_ours_ends_at_the_turn() -> None:
    row = {
        "chosen": "\n\nHuman: Help?\n\nAssistant: I can't do that.",
        "rejected": "\n\nHuman: Help?\n\nAssistant: I can do that.",
    }
    assert extract_prompt(row)["prompt"] == "\n\nHuman: Help?\n\nAssistant: I can"
    ours = to_pair(row, {}, "row")
    assert (ours.prompt, ours.rejected) == ("\n\nHuman: Help?\n\nAssistant:", " I can do that.")


def test_trl_cuts_an_implicit_prompt_inside_a_marker_and_in_both_the_marker_stays_one_token() -> None:
    # The texts part inside a marker: TRL's prompt ends in "<|im_", ours, which knows words but no markers, in "<|".
    # Ids are compared as wholes, so a marker that is a special token can't be torn by either.
    tokenizer = make_chat_tokenizer("chatml")
    row = {"chosen": "Hi there.<|im_end|>", "rejected": "Hi there.<|im_start|>user"}
    assert extract_prompt(row)["prompt"] == "Hi there.<|im_"
    assert to_pair(row, {}, "row").prompt == "Hi there.<|"
    assert_equal_to_trl([row], tokenizer)
    prompt_ids, chosen_ids, _ = our_ids(row, tokenizer)
    assert tokenizer.decode(prompt_ids) == "Hi there."
    assert chosen_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_trl_crashes_on_template_kwargs_that_are_null_and_we_take_them_as_not_set() -> None:
    tokenizer = make_chat_tokenizer("chatml")
    row = {**SINGLE, "chat_template_kwargs": None}
    with pytest.raises(TypeError, match="not a mapping"):
        trl_ids([row], tokenizer)
    assert our_ids(row, tokenizer) == our_ids(SINGLE, tokenizer)


def test_trl_s_template_sees_kwargs_that_only_another_row_set_and_ours_does_not() -> None:
    tokenizer = make_chat_tokenizer("chatml")
    rows = [
        {**SINGLE, "chat_template_kwargs": {"today": "Friday"}},
        {**SINGLE, "chat_template_kwargs": {"enable_thinking": True}},
    ]
    theirs = trl_ids(rows, tokenizer)
    assert "Today is None" in tokenizer.decode(theirs[1][0])
    assert [our_ids(row, tokenizer) for row in datasets.Dataset.from_list(rows)] == [
        theirs[0],
        our_ids(SINGLE, tokenizer),
    ]
