"""List the keys of the settings, read from the dataclasses: type, default, meaning, and what its change needs."""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union

from pipeline.config.schema import Config

__all__ = ["CHANGES", "REQUIRED", "Change", "Setting", "section_in", "settings"]

Change = Literal["shards", "pairs", "store", "run", "free", "jobs"]

CHANGES: dict[Change, str] = {
    "shards": "log-probs depend on it. Set a new `precompute.output` and a new `train.output_dir`",
    "pairs": "it decides which pairs there are, or how they are read. Set a new `train.output_dir`. Stage two reads "
    "existing shards if they hold all its pairs; stage one needs a new `precompute.output`, and `precompute.reuse` "
    "copies known log-probs",
    "store": "stage one continues a store only with the same value. Stage two reads a store with any value",
    "run": "shards serve any value. A run resumes only with the same value; for another one set a new "
    "`train.output_dir`",
    "free": "it may change at any time. Another folder begins another store or another run",
    "jobs": "only `refshard submit` reads it",
}
"""Kind of a setting -> the steps that its change needs once shards or a run exist"""

# The longest key that a setting's key begins with decides.
_CHANGES: dict[str, Change] = {
    "data": "pairs",
    "data.format": "run",
    "data.max_length": "shards",
    "data.sets.NAME.fraction": "run",
    "data.on_bad_row": "run",
    "data.streaming": "run",
    "data.template_date": "shards",
    "policy": "run",
    "policy.adapter": "shards",
    "policy.dtype": "shards",
    "policy.model": "shards",
    "policy.quantization": "shards",
    "policy.revision": "shards",
    "precompute": "free",
    "precompute.reuse": "store",
    "precompute.rows_per_shard": "store",
    "precompute.token_logps": "store",
    "reference": "shards",
    "reference.sync": "run",
    "loss": "run",
    "cluster": "jobs",
    "train": "free",
    "train.on_missing": "run",
}

REQUIRED = dataclasses.MISSING
"""Default of a setting that a file must give"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of the settings file, or a section of keys."""

    key: str
    """Dotted, from its section on: `policy.lora.r`; NAME stands for a name of the user's own"""
    hint: Any
    """Declared type"""
    default: Any
    """Value if the file has no such key, or REQUIRED"""
    meaning: str
    """The docstring of the field in one line, or of the section"""

    @property
    def section(self) -> type | None:
        """The dataclass of a section; None for a key with a value."""
        return section_in(self.hint)

    @property
    def change(self) -> Change:
        """Kind of the key: a name in `CHANGES`."""
        found = [prefix for prefix in _CHANGES if f"{self.key}.".startswith(f"{prefix}.")]
        return _CHANGES[max(found, key=len)]


def settings(section: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Yield the keys of a section in the order of the code, each followed by the keys below it.

    The fields of `transformers.TrainingArguments` are not among them.
    """
    hints, meanings = typing.get_type_hints(section, include_extras=True), _meanings(section)
    for field in dataclasses.fields(section):
        if field.metadata.get("rest"):
            continue
        key, hint = f"{prefix}{field.name}", hints[field.name]
        made = field.default_factory
        inner = section_in(hint)
        yield Setting(
            key=key,
            hint=hint,
            default=field.default if made is dataclasses.MISSING else made(),
            meaning=meanings.get(field.name) or (inspect.getdoc(inner) or "" if inner else ""),
        )
        if inner is not None:
            named = f"{key}.NAME" if typing.get_origin(hint) is dict else key
            yield from settings(inner, f"{named}.")


def section_in(hint: Any) -> type | None:
    """Give the dataclass that a type is, may be, or has as the values of its mapping."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType, dict) else (hint,)
    return next((member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)), None)


def _meanings(section: type) -> dict[str, str]:
    """Give the text below each field of a dataclass, which Python does not keep, from its source."""
    [tree] = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found
