"""The runs of a sweep: every combination of the settings' values, each with a folder's name."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.errors import ConfigError

__all__ = ["Member", "make_grid", "split_values"]


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    """Name of its folder: `beta-0.1_type-ipo`"""
    overrides: tuple[str, ...]
    """`key=value`, as `-o` takes them"""


def make_grid(over: Sequence[str]) -> list[Member]:
    """Combine the values of all settings, `key=value,value,...` each; the last setting's change first.

    Raises:
        ConfigError: A text has another form, or a key or value is repeated.
    """
    values: dict[str, list[str]] = {}
    for text in over:
        key, equals, listed = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--over {text}: must be a key and its values, like loss.beta=0.05,0.1,0.5")
        if key in values:
            raise ConfigError(f"--over {text}: {key} is repeated. Name all its values at once")
        values[key] = split_values(listed)
        for value in values[key]:
            if not value:
                raise ConfigError(f"--over {text}: a value is empty. Write null to leave a setting out")
            if values[key].count(value) > 1:
                raise ConfigError(f"--over {text}: {value} is repeated. Name it once")
    last = [key.rpartition(".")[2] for key in values]
    # Keys that share their last part are named in full.
    labels = {key: key if last.count(short) > 1 else short for key, short in zip(values, last, strict=True)}
    members: list[Member] = []
    for combination in itertools.product(*values.values()):
        pairs = list(zip(values, combination, strict=True))
        name = "_".join(f"{labels[key]}-{_plain(value)}" for key, value in pairs)
        namesakes = sum(re.sub(r"\.\d+$", "", member.name) == name or member.name == name for member in members)
        name = f"{name}.{namesakes + 1}" if namesakes else name
        members.append(Member(name, tuple(f"{key}={value}" for key, value in pairs)))
    return members


def split_values(text: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes: `sigmoid,[sigmoid, sft]` are two values."""
    values, depth, quote, start = [], 0, "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and text[:i].rstrip()[-1:] in ("", ",", "[", "{", ":"):
            # Elsewhere it is an apostrophe.
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(text[start:i].strip())
            start = i + 1
    return [*values, text[start:].strip()]


def _plain(value: str) -> str:
    """Write a value as a part of a folder's name."""
    words = re.sub(r"[^\w.+-]+", "-", re.sub(r"\s*,\s*", "+", value), flags=re.ASCII).strip("-.")
    return words[:60] or "empty"
