"""Turn token ids into the bytes that each stands for, and show them so that line ends, blanks and halves are visible.

A tokenizer spells bytes in letters of its own: byte-level ones as `Ġ` and `â`, SentencePiece's as `▁` and `<0xE2>`.
Decoding ids one by one would turn half a character into U+FFFD, and drop blanks.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.base.errors import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["shown", "token_bytes"]


def token_bytes(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[bytes]:
    """Return the bytes of each token; concatenated they are UTF-8. An unknown id has no bytes."""
    added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    spelled = tokenizer.convert_ids_to_tokens(list(ids))
    steps = _decoding_steps(tokenizer)
    return [
        added[id].encode() if id in added else _bytes_of(token or "", steps)
        for id, token in zip(ids, spelled, strict=True)
    ]


def shown(piece: bytes) -> str:
    r"""Write a token for people: a blank as ·, an end of line as ↵, a tab as ⇥, part of a character as \xe2.

    A terminal obeys nothing in it.
    """
    text = piece.decode("utf-8", errors="backslashreplace")
    return printable(text.translate({ord(" "): "·", ord("\n"): "↵", ord("\t"): "⇥"}))


def _decoding_steps(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """Return the types of the steps in which the tokenizer decodes tokens to text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # The tokenizer uses SentencePiece's own library.
        return frozenset({"Metaspace", "ByteFallback"})
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return frozenset(str(step.get("type")) for step in decoder.get("decoders", [decoder]))


def _bytes_of(token: str, steps: frozenset[str]) -> bytes:
    if "ByteLevel" in steps:
        return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in token)
    if "ByteFallback" in steps and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
        return bytes.fromhex(byte[1])
    # A decoder's Replace step replaces SentencePiece's blank.
    return (token.replace("▁", " ") if steps & {"Metaspace", "Replace"} else token).encode()


# GPT-2's alphabet: bytes that print in Latin-1 are letters, the others are letters from U+0100 on.
_OWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _OWN]
_BYTES = {chr(byte): byte for byte in _OWN} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
