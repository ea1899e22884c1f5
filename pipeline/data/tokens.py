"""Tokenize a pair into prompt, chosen and rejected ids; truncate them; make the pair's key.

The ids equal TRL 1.16's for the same row, tokenizer and chat template, except for three of its defects: a second EOS
from a tokenizer that adds its own, a second BOS if the prompt already starts with one, and silently dropped pairs
(`intake` counts them).
"""

import dataclasses
import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.base.errors import BadRow, ConfigError, is_out_of_memory, one_line, panics_as_errors
from pipeline.data.pairs import Pair
from pipeline.data.rendering import Rendered, TemplateError, apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKENIZATION_VERSION", "TokenizedPair", "adds_bos", "num_beginnings", "pair_key", "tokenize", "truncate"]

TOKENIZATION_VERSION = 1
"""Part of every identity. Raise it with any change here, in layouts.py or in pairs.py that changes a token.

It stayed when nulls inside messages and lists of text parts became plain messages. Those rows alone have other keys
now, so their old log-probs are missed, never read, and no other pair must be scored again.
"""


@dataclass(frozen=True, kw_only=True)
class TokenizedPair:
    """Token ids of a pair. The prompt's last token predicts the first token of either completion."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    merged: bool = False
    """True if tokens merged across the prompt's end, so that the completions start a little before their texts."""
    template_differs: bool = False
    """True if the template writes the prompt differently when an answer follows: the rest is scored as its part."""


def tokenize(
    pair: Pair, tokenizer: "PreTrainedTokenizerBase", place: str, template_date: str | None = None
) -> TokenizedPair:
    """Tokenize prompt, prompt+chosen and prompt+rejected as wholes; the ids that all three share are the prompt.

    Plain text ends in one EOS if the tokenizer has one, a conversation's turn in what its chat template writes. The ids
    are not truncated.

    Raises BadRow if template or tokenizer refuses the pair, or the prompt or a completion has no token; ConfigError if
    a conversation meets a tokenizer without a chat template; UnfinishedError as `apply_template` does.
    """
    template_differs = False
    if isinstance(pair.prompt, str):
        try:
            with panics_as_errors():
                prompt, chosen, rejected = _tokenize_text(pair, tokenizer)
        except Exception as error:  # the library has no type of its own for a text that it can't tokenize
            if is_out_of_memory(error):
                raise
            raise BadRow("tokenizer_error", f"{place}: the tokenizer refuses it: {one_line(str(error))}") from error
    else:
        texts, (prompt, chosen, rejected) = zip(*_render(pair, tokenizer, place, template_date), strict=True)
        template_differs = not all(text.startswith(texts[0]) for text in texts)
    three = enumerate(zip(prompt, chosen, rejected, strict=False))
    length = next((i for i, (a, b, c) in three if not a == b == c), min(map(len, (prompt, chosen, rejected))))
    if length == 0:
        raise BadRow("empty_prompt", f"{place}: the prompt has no token before the completions")
    if length == len(chosen) or length == len(rejected):
        name = "chosen" if length == len(chosen) else "rejected"
        raise BadRow("empty_completion", f"{place}: {name} has no token after the prompt")
    return TokenizedPair(
        prompt_ids=prompt[:length],
        chosen_ids=chosen[length:],
        rejected_ids=rejected[length:],
        merged=length < len(prompt),
        template_differs=template_differs,
    )


def truncate(pair: TokenizedPair, max_length: int | None) -> TokenizedPair | None:
    """Cut both completions so that the prompt and either one fit (TRL's keep_start); None if no room is left."""
    if max_length is None:
        return pair
    room = max_length - len(pair.prompt_ids)
    if room <= 0:
        return None
    if room >= len(pair.chosen_ids) and room >= len(pair.rejected_ids):
        return pair
    return dataclasses.replace(pair, chosen_ids=pair.chosen_ids[:room], rejected_ids=pair.rejected_ids[:room])


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return True if the tokenizer writes its beginning token before any text."""
    return bool(tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id])


def num_beginnings(pair: TokenizedPair, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Count the beginning tokens in a row at the start of a pair. In a template, the same token may open every turn."""
    bos = tokenizer.bos_token_id
    return next((i for i, token in enumerate(pair.prompt_ids) if token != bos), len(pair.prompt_ids))


def pair_key(pair: TokenizedPair) -> bytes:
    """Return the join key of a pair before truncation, 16 bytes.

    It is BLAKE2b-128 over three lengths (int64) and the ids (int32) of prompt, chosen and rejected, little-endian. The
    lengths distinguish pairs whose concatenated ids are equal.
    """
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    digest = hashlib.blake2b(struct.pack("<3q", *map(len, parts)), digest_size=16)
    for ids in parts:
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.digest()


def _tokenize_text(pair: Pair, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token or ""
    # The tokens that the tokenizer adds to any text.
    around = tokenizer("a", verbose=False)["input_ids"]
    begins, adds_eos = around[:1] == [bos], around[-1:] == [tokenizer.eos_token_id]
    three = []
    for completion in ("", pair.chosen, pair.rejected):
        text = f"{pair.prompt}{completion}"
        if completion and not text.endswith(eos):
            text += eos
        ids = tokenizer(text, verbose=False)["input_ids"]
        if begins and ids[:2] == [bos, bos]:
            ids = ids[1:]
        # The completion's text already has its EOS, and the prompt alone must not have one.
        if adds_eos:
            ids = ids[:-1]
        three.append(ids)
    return three[0], three[1], three[2]


_ALPACA_AS_TEXT = ", or set data.columns: {prompt: instruction} for texts without input, system and history"


def _render(pair: Pair, tokenizer: "PreTrainedTokenizerBase", place: str, template_date: str | None) -> list[Rendered]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"policy.model: its tokenizer has no chat template, but {place} is a conversation; "
            "use a chat model, or save a template with its tokenizer"
            + (_ALPACA_AS_TEXT if pair.form == "alpaca" else "")
        )
    if isinstance(tokenizer.chat_template, dict):
        # The library's rule: the default one, and `tool_use` for pairs with tools.
        names = ("default", "tool_use") if pair.tools else ("default",)
        if not any(name in tokenizer.chat_template for name in names):
            raise ConfigError(
                f"policy.model: must have one chat template, or a default one, for conversations like {place}, got "
                f"named ones: {', '.join(tokenizer.chat_template)}. Save one as chat_template.jinja in its folder"
            )
    messages = [([*pair.prompt, *completion], not completion) for completion in ([], pair.chosen, pair.rejected)]
    arguments = {"tools": pair.tools, **(pair.chat_template_kwargs or {})}
    try:
        return apply_template(tokenizer, messages, arguments, template_date)
    except TemplateError as error:
        # Templates that can do without a content are let be.
        if silent := _without_content(pair):
            raise BadRow("not_text", f"{place}: {silent}: content is null, not text. Take the row out") from error
        raise BadRow("template_error", f"{place}: the chat template refuses it: {error}") from error


def _without_content(pair: Pair) -> str | None:
    """Name the first message that has neither content nor tool calls; None if all have."""
    for name, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        for number, message in enumerate(messages, start=1):
            if isinstance(message, dict) and message.get("content") is None and not message.get("tool_calls"):
                return f"{name} message {number}"
    return None
