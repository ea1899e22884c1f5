"""The `data` section of the settings: the sets of pairs, and how they become tokens."""

import contextlib
import dataclasses
import datetime
import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.base.errors import ConfigError, did_you_mean
from pipeline.config.columns import LAYOUT_COLUMNS, LOSS_COLUMNS, PAIR_COLUMNS, ROLES, SPOKEN_COLUMNS
from pipeline.config.convert import PathText, refuse_both, require, require_at_least

__all__ = ["DataConfig", "EvalSetConfig", "TrainSetConfig"]

Format = Literal["jsonl", "parquet", "csv", "disk", "hub"]


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One held-out set; all its other settings are those of `data`."""

    path: PathText | None = None
    """File, folder or hub name; if left out, `data.path`."""
    name: str | None = None
    """Configuration of a hub dataset; if left out, `data.name`."""
    split: str | None = None
    """Split, with an optional range of rows: `test`, `train[2000:]`; if left out, `data.split`."""
    columns: dict[str, str] | None = None
    """Your column names by ours; if left out, `data.columns`."""
    roles: dict[str, str] | None = None
    """Your speakers' names by ours; if left out, `data.roles`."""

    def __post_init__(self) -> None:
        _check_columns(self.columns or {})
        _check_roles(self.roles or {})


@dataclass(frozen=True, kw_only=True)
class TrainSetConfig:
    """One of several training sets; all its other settings are those of `data`."""

    path: PathText
    """File, folder or hub name."""
    name: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str | None = None
    """Split, with an optional range of rows; if left out, `data.split`."""
    format: Format | None = None
    """Format of the files; if left out, `data.format`."""
    columns: dict[str, str] | None = None
    """Your column names by ours; if left out, `data.columns`."""
    roles: dict[str, str] | None = None
    """Your speakers' names by ours; if left out, `data.roles`."""
    fraction: float = 1.0
    """Number of times that an epoch has each pair: 0.25 takes a quarter of the pairs, 2 takes every pair twice. Stage
    one scores all pairs."""

    def __post_init__(self) -> None:
        require(0 < self.fraction < math.inf, "fraction", "a positive finite number", self.fraction)
        _check_columns(self.columns or {})
        _check_roles(self.roles or {})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The preference pairs, and how they become tokens."""

    path: PathText | None = None
    """File (JSON Lines, a JSON array, CSV, each also as .gz, or Parquet), folder with a file for each split,
    `save_to_disk` folder, or hub name. Required unless `data.sets` is set."""
    sets: dict[str, TrainSetConfig] = field(default_factory=dict)
    """Several training sets by name, in place of `data.path`: `{ultra: {path: a.jsonl}, hh: {path: b.jsonl, fraction:
    0.25}}`. Each has a store of its own, `precompute.output/NAME`."""
    name: str | None = None
    """Configuration (subset) of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Split, with an optional range of rows: `train`, `train[:2000]`, `train[2000:4000]`. Of a single file, only the
    range counts."""
    format: Format | None = None
    """Format of the files; if left out, their ending decides. `jsonl` also stands for a JSON array (`.json`)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Your column names by ours (prompt, chosen, rejected, tools, chat_template_kwargs, or those of another tool's
    layout): `{prompt: question}`; a dot leads into an object: `{prompt: input.messages}`. With `user` instead of
    `prompt`, and optionally `system`, texts become a conversation: `{user: question}`. `weight` and `margin`
    name numbers that training reads besides the pair; shards do not hold them."""
    roles: dict[str, str] | None = None
    """Your speakers' names by ours (user, assistant, system, tool, function_call), in ShareGPT's turns and in messages:
    `{user: customer, assistant: agent}`. Usual names need no setting."""
    max_length: int | None = 1024
    """Largest number of tokens of prompt and completion together; the end of a longer completion is cut. `null`: no
    limit. Stores with token log-probs also serve a smaller value."""
    template_date: str | None = None
    """Date (YYYY-MM-DD) for a chat template that asks for today's; if left out, the day on which the store was
    created."""
    streaming: bool = False
    """Stream a hub dataset instead of downloading it. Local files are always streamed by stage one."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Stop at a row that can't be a pair, or skip, count and list it."""
    on_identical: Literal["keep", "drop"] = "keep"
    """Keep or drop pairs with equal chosen and rejected; their loss is a constant. Both ways count them."""
    random_rejected: int | None = None
    """Seed with which one of the worse completions is rejected, in rows of several ranked or scored completions; if
    left out, the worst one. It depends on the seed and the row's texts alone."""
    eval: dict[str, EvalSetConfig] = field(default_factory=dict)
    """Held-out sets by name: `{test: {split: test}}`. Each has a store of its own, beside that of `train`."""

    def __post_init__(self) -> None:
        require_at_least(self, max_length=2)  # one token of the prompt and one of the completion
        if self.template_date is not None:
            require(_is_date(self.template_date), "template_date", "a date as YYYY-MM-DD", self.template_date)
        for name in self.eval:
            _check_name("eval", name, ("train", "costs"))
        for name in self.sets:
            _check_name("sets", name, ("costs",))
            if name in self.eval:
                raise ValueError(f"eval.{name}: must differ from the names in data.sets, got {name!r}. Name it anew")
        _check_columns(self.columns)
        _check_roles(self.roles or {})
        self._check_path()

    def _check_path(self) -> None:
        if not self.sets:
            if self.path is None:
                raise ValueError("path: missing; it has no default. Name a file, a folder or a dataset of the hub")
            return
        for key in ("path", "name", "revision"):
            refuse_both(key, "data.sets", getattr(self, key) is not None)
        for name, own in self.eval.items():
            if own.path is None:
                raise ValueError(f"eval.{name}.path: must be set with data.sets, got nothing. Name the set's file")

    @property
    def training(self) -> tuple[str, ...]:
        """Names of the training sets: `train`, or those of `sets`."""
        return tuple(self.sets) or ("train",)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sets, each of which has a store: the training sets, then the held-out ones."""
        return (*self.training, *self.eval)

    def fraction(self, name: str) -> float:
        """Give how often an epoch has each pair of a set."""
        return self.sets[name].fraction if name in self.sets else 1.0

    def of(self, name: str) -> "DataConfig":
        """Give the settings of one set as those of a run that has no other. Raises ConfigError for an unknown name."""
        if name not in self.names:
            where = "data.sets and data.eval name" if self.sets else "data.eval names"
            raise ConfigError(f"--set {name}: {where} no such set; there are {', '.join(self.names)}")
        whole = dataclasses.replace(self, path="", sets={}, eval={})
        if name in self.sets:
            given = dataclasses.asdict(self.sets[name])
            del given["fraction"]
            return dataclasses.replace(whole, **{key: value for key, value in given.items() if value is not None})
        own = self.eval.get(name, EvalSetConfig())
        path = own.path or self.path
        return dataclasses.replace(
            whole,
            path=path,
            name=own.name or self.name,
            # A revision belongs to the repository of data.path.
            revision=self.revision if path == self.path else None,
            split=own.split or self.split,
            columns=self.columns if own.columns is None else own.columns,
            roles=self.roles if own.roles is None else own.roles,
        )


def _is_date(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return datetime.date.fromisoformat(text).isoformat() == text
    return False


def _check_name(section: str, name: str, reserved: tuple[str, ...]) -> None:
    is_name = name not in reserved and name.replace("-", "").replace("_", "").isalnum()
    rule = f"named by letters, digits, - and _, and not {' or '.join(reserved)}, for it names a folder"
    require(is_name, f"{section}.{name}", rule, name)


def _check_columns(columns: dict[str, str]) -> None:
    known = (*PAIR_COLUMNS, *SPOKEN_COLUMNS, *LAYOUT_COLUMNS, *LOSS_COLUMNS)
    for column in columns:
        if column not in known:
            raise ValueError(f"columns.{column}: unknown column of a pair{did_you_mean(column, known)}")
    if "user" in columns:
        refuse_both("columns.user", "columns.prompt", "prompt" in columns)
    elif "system" in columns:
        raise ValueError(
            "columns.system: must be set together with columns.user, whose column holds text. Name it there; "
            "in conversations, write the system message as the first one"
        )


def _check_roles(roles: dict[str, str]) -> None:
    for ours, name in roles.items():
        if ours not in ROLES:
            raise ValueError(f"roles: must name only {', '.join(ROLES)}, got {ours!r}{did_you_mean(ours, ROLES)}")
        if [*roles.values()].count(name) > 1:
            raise ValueError(
                f"roles.{ours}: must be the name of one role alone, got {name!r}. Name each role's speaker"
            )
