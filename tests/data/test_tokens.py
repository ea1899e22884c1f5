"""A pair's key is all of its ids, truncation keeps what comes first, and a template that fails says for which row."""

import hashlib
import logging
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pipeline.base.errors import BadRow, ConfigError
from pipeline.data.pairs import Pair
from pipeline.data.tokens import TokenizedPair, pair_key, tokenize, truncate
from support.models import make_tokenizer
from support.tally import tally

IDS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**31 - 1)), min_size=1, max_size=6)
PAIRS = st.builds(TokenizedPair, prompt_ids=IDS, chosen_ids=IDS, rejected_ids=IDS, merged=st.booleans())
relaxed = settings(deadline=None)


def parts_of(pair: TokenizedPair) -> tuple[list[int], list[int], list[int]]:
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


# --- The key ------------------------------------------------------------------------------------------------------


@given(PAIRS)
@relaxed
def test_key_is_blake2b_128_of_three_int64_lengths_and_the_int32_ids(pair: TokenizedPair) -> None:
    parts = parts_of(pair)
    data = struct.pack("<qqq", len(parts[0]), len(parts[1]), len(parts[2]))
    for ids in parts:
        for i in ids:
            data += struct.pack("<i", i)
    assert pair_key(pair) == hashlib.blake2b(data, digest_size=16).digest()


def test_key_of_one_known_pair_stays() -> None:
    # Shards on disk are joined by it.
    pair = TokenizedPair(prompt_ids=[1, 2, 3], chosen_ids=[4, 5], rejected_ids=[6])
    assert pair_key(pair).hex() == "d063eef3a76f0bfb8ea29e5a58e057d2"


@given(PAIRS, PAIRS)
@relaxed
def test_keys_are_equal_only_for_equal_ids(a: TokenizedPair, b: TokenizedPair) -> None:
    assert (pair_key(a) == pair_key(b)) is (parts_of(a) == parts_of(b))


@given(PAIRS, st.data())
@relaxed
def test_key_depends_on_every_id(pair: TokenizedPair, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["prompt_ids", "chosen_ids", "rejected_ids"]))
    ids = list(getattr(pair, name))
    at = data.draw(st.integers(0, len(ids) - 1))
    ids[at] ^= 1
    assert pair_key(replace(pair, **{name: ids})) != pair_key(pair)


@given(PAIRS, st.sampled_from([("prompt_ids", "chosen_ids"), ("chosen_ids", "rejected_ids")]))
@relaxed
def test_key_depends_on_every_boundary(pair: TokenizedPair, names: tuple[str, str]) -> None:
    left, right = (getattr(pair, name) for name in names)
    moved = replace(pair, **{names[0]: left[:-1], names[1]: [left[-1], *right]})
    assert pair_key(moved) != pair_key(pair)


@given(PAIRS)
@relaxed
def test_key_tells_chosen_from_rejected(pair: TokenizedPair) -> None:
    assume(pair.chosen_ids != pair.rejected_ids)
    swapped = replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
    assert pair_key(swapped) != pair_key(pair)


@given(PAIRS)
@relaxed
def test_key_does_not_depend_on_the_remark_that_tokens_merged(pair: TokenizedPair) -> None:
    assert pair_key(replace(pair, merged=not pair.merged)) == pair_key(pair)


# --- Truncation ---------------------------------------------------------------------------------------------------


@given(PAIRS, st.integers(1, 14))
@relaxed
def test_truncation_keeps_the_prompt_and_the_start_of_both_completions(pair: TokenizedPair, max_length: int) -> None:
    cut = truncate(pair, max_length)
    if len(pair.prompt_ids) >= max_length:
        assert cut is None
        return
    assert cut is not None
    assert (cut.prompt_ids, cut.merged) == (pair.prompt_ids, pair.merged)
    for whole, kept in ((pair.chosen_ids, cut.chosen_ids), (pair.rejected_ids, cut.rejected_ids)):
        assert kept
        assert kept == whole[: len(kept)]
        assert len(kept) == len(whole) or len(cut.prompt_ids) + len(kept) == max_length
        assert len(cut.prompt_ids) + len(kept) <= max_length


@given(PAIRS)
@relaxed
def test_pair_that_fits_or_has_no_limit_is_the_same_object(pair: TokenizedPair) -> None:
    longest = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    assert truncate(pair, longest) is pair
    assert truncate(pair, None) is pair
    assert truncate(pair, longest - 1) is not pair


@given(PAIRS, st.integers(2, 14), st.integers(0, 12))
@relaxed
def test_truncating_twice_is_truncating_to_the_shorter(pair: TokenizedPair, max_length: int, more: int) -> None:
    wider = truncate(pair, max_length + more)
    assert (wider and truncate(wider, max_length)) == truncate(pair, max_length)


@given(PAIRS, st.integers(1, 14))
@relaxed
def test_truncation_leaves_the_whole_pair_and_its_key_as_they_were(pair: TokenizedPair, max_length: int) -> None:
    before, key = [list(ids) for ids in parts_of(pair)], pair_key(pair)
    truncate(pair, max_length)
    assert [list(ids) for ids in parts_of(pair)] == before
    assert pair_key(pair) == key


# --- Tokenization -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> Any:
    return make_tokenizer()


def chat(template: str) -> Any:
    return make_tokenizer(bos=True, template=template)


SIMPLE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
CONVERSATION = Pair(
    prompt=[{"role": "user", "content": "Two plus two?"}],
    chosen=[{"role": "assistant", "content": "Four."}],
    rejected=[{"role": "assistant", "content": "Five."}],
)


_TEXTS = st.text("abI' .?\n\u00e9\u4f60", min_size=1, max_size=12)
_TOKENIZERS = [make_tokenizer(), make_tokenizer(bos=True), make_tokenizer(bos=True, auto_eos=True)]


@given(prompt=_TEXTS, chosen=_TEXTS, rejected=_TEXTS, tokenizer=st.sampled_from(_TOKENIZERS))
@settings(deadline=None, max_examples=100)
def test_prompt_and_completion_are_the_text_with_one_eos_and_at_most_one_bos(
    prompt: str, chosen: str, rejected: str, tokenizer: Any
) -> None:
    try:
        pair = tokenize(Pair(prompt=prompt, chosen=chosen, rejected=rejected), tokenizer, "row 1")
    except BadRow as error:
        # A prompt of one space merges with the completions into their first token.
        assert (error.reason, prompt.strip(), tokenizer.bos_token_id) == ("empty_prompt", "", None)
        return
    for completion, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        whole = pair.prompt_ids + ids
        assert whole.count(tokenizer.eos_token_id) == 1
        assert whole[-1] == tokenizer.eos_token_id
        assert whole.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
        assert tokenizer.decode(whole, skip_special_tokens=True) == prompt + completion
    assert pair.prompt_ids
    # The prompt ends at its text, or a little before where tokens merge across its end; never after.
    assert len(tokenizer.decode(pair.prompt_ids, skip_special_tokens=True).rstrip("\ufffd")) <= len(prompt)


def test_text_that_ends_in_eos_gets_no_second(plain: Any) -> None:
    with_eos = tokenize(Pair(prompt="Two?", chosen=" Four.</s>", rejected=" Five."), plain, "row")
    without = tokenize(Pair(prompt="Two?", chosen=" Four.", rejected=" Five."), plain, "row")
    assert with_eos == without
    assert without.chosen_ids.count(plain.eos_token_id) == 1


def test_tokenizer_without_eos_adds_none() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    pair = tokenize(Pair(prompt="Two?", chosen=" Four.", rejected=" Five."), tokenizer, "row")
    assert tokenizer.decode(pair.chosen_ids) == " Four."


def test_text_longer_than_the_model_is_tokenized_whole_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        pair = tokenize(Pair(prompt="Two?", chosen=" Four." * 50, rejected=" Five."), tokenizer, "row")
    finally:
        logger.removeHandler(caplog.handler)
    assert tokenizer.decode(pair.chosen_ids) == " Four." * 50 + "</s>"
    assert not caplog.records


@pytest.mark.parametrize("auto_eos", [False, True])
def test_prompt_without_a_token_is_a_bad_row(auto_eos: bool) -> None:
    with pytest.raises(BadRow, match=r"pairs\.csv:3: the prompt has no token") as caught:
        tokenize(Pair(prompt="", chosen="Four.", rejected="Five."), make_tokenizer(auto_eos=auto_eos), "pairs.csv:3")
    assert caught.value.reason == "empty_prompt"


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_completion_without_a_token_is_a_bad_row(name: str) -> None:
    # A template that leaves a message out renders prompt and answer alike.
    tokenizer = chat(SIMPLE.replace("{% for m in messages %}", "{% for m in messages if m.content != 'Hidden' %}"))
    pair = replace(CONVERSATION, **{name: [{"role": "assistant", "content": "Hidden"}]})
    with pytest.raises(BadRow, match=rf"pairs\.csv:3: {name} has no token after the prompt") as caught:
        tokenize(pair, tokenizer, "pairs.csv:3")
    assert caught.value.reason == "empty_completion"


FAILING: dict[str, tuple[str, str]] = {
    "refuses": ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    "lacks a key": ("{{ messages[0].thought.length }}", "no attribute 'thought'"),
    "adds text to null": ("{{ 'a' + none }}", "NoneType"),
    "calls what is no function": ("{{ messages() }}", "not callable"),
    "is no Jinja": ("{% for m in messages %}", "Unexpected end of template"),
}


@pytest.mark.parametrize(("template", "message"), FAILING.values(), ids=FAILING)
def test_template_that_fails_is_a_bad_row_that_names_the_place(template: str, message: str) -> None:
    with pytest.raises(BadRow, match=rf"^chat\.jsonl:12: the chat template refuses it: .*({message})") as caught:
        tokenize(CONVERSATION, chat(template), "chat.jsonl:12")
    assert caught.value.reason == "template_error"


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_text_at_which_the_tokenizer_fails_is_a_bad_row_that_names_the_place(as_chat: bool) -> None:
    """A regular expression of tokenizer.json that gives up is a panic in Rust, which is no `Exception` of Python's."""
    tokenizer = chat(SIMPLE)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    answer = "a" * 40 + "!"
    as_text = Pair(prompt="Two?", chosen=answer, rejected="No.")
    pair = replace(CONVERSATION, chosen=[{"role": "assistant", "content": answer}]) if as_chat else as_text
    with pytest.raises(BadRow, match=r"^row 7: the .* refuses it: .*retry-limit-in-match") as caught:
        tokenize(pair, tokenizer, "row 7")
    assert caught.value.reason == ("template_error" if as_chat else "tokenizer_error")
    tally("a text at which the tokenizer's own library fails", 1, outcome="65, the row named; or skipped and counted")


def test_a_message_without_content_is_named_if_the_template_refuses_it() -> None:
    silent = replace(CONVERSATION, rejected=[{"role": "assistant"}, *CONVERSATION.rejected])
    with pytest.raises(BadRow, match=r"^row: rejected message 1: content is null, not text") as caught:
        tokenize(silent, chat("{% for m in messages %}{{ m.content + '' }}{% endfor %}"), "row")
    assert caught.value.reason == "not_text"
    assert tokenize(silent, chat("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"), "row").rejected_ids


@pytest.mark.parametrize("kwargs", [{"tokenize": False}, {"add_generation_prompt": True}])
def test_template_kwargs_that_are_no_variables_of_a_template_are_a_bad_row(kwargs: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="row: the chat template refuses it"):
        tokenize(replace(CONVERSATION, chat_template_kwargs=kwargs), chat(SIMPLE), "row")


def test_conversation_without_a_template_is_a_setting_to_mend(plain: Any) -> None:
    with pytest.raises(ConfigError, match=r"no chat template, but chat\.jsonl:12 is a conversation"):
        tokenize(CONVERSATION, plain, "chat.jsonl:12")


def test_what_a_base_model_can_not_read_of_alpaca_is_named_with_the_way_to_read_the_rest(plain: Any) -> None:
    message = r"or set data\.columns: \{prompt: instruction\} for texts without input, system and history$"
    with pytest.raises(ConfigError, match=message):
        tokenize(replace(CONVERSATION, form="alpaca"), plain, "chat.jsonl:12")


def test_named_templates_without_a_default_are_a_setting_to_mend() -> None:
    tokenizer = chat({"rag": SIMPLE, "tool_use": SIMPLE})
    with pytest.raises(
        ConfigError, match=r"^policy\.model: .* like chat\.jsonl:12, got named ones: rag, tool_use\. Save"
    ):
        tokenize(CONVERSATION, tokenizer, "chat.jsonl:12")
    assert tokenize(replace(CONVERSATION, tools=[{"name": "t"}]), tokenizer, "row")
    assert tokenize(CONVERSATION, chat({"default": SIMPLE, "rag": "{{ 1 }}"}), "row")


RENDERED: dict[str, Callable[[str], Pair]] = {
    "role": lambda text: replace(CONVERSATION, chosen=[{"role": text, "content": "Four."}]),
    "tools": lambda text: replace(CONVERSATION, tools=[{"name": text}]),
    "part of a content": lambda text: replace(
        CONVERSATION, chosen=[{"role": "assistant", "content": [{"text": text}]}]
    ),
    "template kwargs": lambda text: replace(CONVERSATION, chat_template_kwargs={"today": text}),
}


@pytest.mark.parametrize("make", RENDERED.values(), ids=RENDERED)
def test_half_a_surrogate_pair_that_a_template_renders_is_a_bad_row(make: Callable[[str], Pair]) -> None:
    tokenizer = chat(
        "{{ tools | tojson }}{{ today }}{% for m in messages %}{{ m.role }}: "
        "{{ m.content if m.content is string else m.content[0].text }}\n{% endfor %}"
    )
    tokenize(make("whole"), tokenizer, "row")
    with pytest.raises(BadRow, match="row: the chat template refuses it"):
        tokenize(make("\ud83d"), tokenizer, "row")
