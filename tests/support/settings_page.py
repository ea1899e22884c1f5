"""Write docs/settings.md: every key of the settings file, from the settings' own dataclasses.

python tests/support/settings_page.py    writes the page
"""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union

from pipeline.config.convert import PathText
from pipeline.config.keys import CHANGES, REQUIRED, Setting, settings
from pipeline.config.training import FIXED_TRAIN_FIELDS, TRAIN_DEFAULTS

__all__ = ["PAGE", "page"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"

ORDER = ("data", "policy", "reference", "precompute", "loss", "train", "cluster")

HEAD = """# Settings

This page lists every key of the YAML file that both stages read. `tests/support/settings_page.py` makes it from the
code. A minimal file has four sections:

```yaml
data: {path: pairs.jsonl}
policy: {model: Qwen/Qwen2.5-0.5B-Instruct}
precompute: {output: runs/a/shards}
train: {output_dir: runs/a/policy}
```

- `-o KEY=VALUE` on the command line overrides one key: `-o loss.beta=0.3 -o policy.lora.r=8`.
- `required` means that the file must have the key. `null` means "not set".
- A key below an optional section counts only if the section is set: `policy.lora: {}` is enough to train LoRA.
- An unknown key, or a value of another type, is refused with exit status 2.
- Paths are relative to the folder in which the command runs. `~` is the home folder.
- `train` writes all settings of a run, with their defaults, to `refshard.yaml` in the run's folder.

The column "a change" says what a change needs if shards or a run exist already:

| a change | |
|---|---|
"""

HELD_OUT = """
### Holding out pairs of one file

`data.split` takes a range of rows, counted from 0; the end is not included. A held-out set takes its path from
`data.path`. So these settings train on rows 0 to 1,999 and evaluate on rows 2,000 to 2,199 of the same file:

```yaml
data:
  path: pairs.jsonl
  split: "train[:2000]"
  eval:
    test: {split: "train[2000:2200]"}
train:
  output_dir: runs/a/policy
  eval_strategy: steps
  eval_steps: 50
```

The rows are not shuffled before they are split. If equal prompts lie in adjacent rows, shuffle the file first, or cut
between two prompts. A second file is also possible: `eval: {test: {path: held_out.jsonl}}`.
"""

TRAIN = """
All other keys of this section are fields of
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments),
with its names, types and meanings: `num_train_epochs`, `max_steps`, `per_device_train_batch_size`,
`gradient_accumulation_steps`, `lr_scheduler_type`, `warmup_steps`, `bf16`, `gradient_checkpointing`, `save_steps`,
`eval_steps`, `seed`, `fsdp`, ...

Fields of outputs, logging, saving, evaluation and data loading, and those that save memory, may change at any time.
`bf16` and `fp16` need new shards, since the reference computes [as the policy will](guide.md#precision).
[Some schedules](guide.md#making-a-run-longer) allow more steps or epochs. All other fields need a new
`train.output_dir`.

These fields have other defaults here:
"""

REFUSED = """
These fields are refused, because refshard sets them itself or because they have no meaning here:
"""

TOKENS = """
`train.hub_token` and every other key that ends in `_token` is refused too, since settings are saved. Set `HF_TOKEN` in
the environment.
"""


def page() -> str:
    """Make the page."""
    listed = list(settings())
    lines = [HEAD + "\n".join(f"| {change} | {text} |" for change, text in CHANGES.items())]
    for name in ORDER:
        [section] = [setting for setting in listed if setting.key == name]
        lines += ["", f"## {name}", "", section.meaning, ""]
        inside = [setting for setting in listed if setting.key.startswith(f"{name}.")]
        lines += _table(("key", "type", "default", "a change", "meaning"), map(_row, inside))
        if name == "data":
            lines.append(HELD_OUT.rstrip())
        elif name == "train":
            lines += _library()
    return "\n".join(lines) + "\n"


def _library() -> Iterator[str]:
    """Write what the `train` section does with the fields of TrainingArguments."""
    yield TRAIN
    defaults = [(f"`{key}`", _value(value), reason) for key, (value, reason) in TRAIN_DEFAULTS.items()]
    yield from _table(("field", "default", ""), defaults)
    yield REFUSED
    reasons = [(f"`{key}`", text.partition(": ")[2]) for key, text in FIXED_TRAIN_FIELDS.items()]
    yield from _table(("field", "reason"), reasons)
    yield TOKENS.rstrip()


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _row(setting: Setting) -> tuple[str, ...]:
    default = "" if dataclasses.is_dataclass(setting.default) else _value(setting.default)
    return f"`{setting.key}`", _kind(setting.hint), default, setting.change, setting.meaning.replace("|", "\\|")


def _value(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{text.replace('e-0', 'e-')}`"


def _kind(hint: Any) -> str:
    """Name a type; a list of choices as the choices."""
    names = {bool: "true, false", int: "whole number", float: "number", str: "text", PathText: "path"}
    if hint in names:
        return names[hint]
    if dataclasses.is_dataclass(hint):
        return "section"
    kind, members = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return ", ".join(f"`{choice}`" for choice in members)
    if kind is list:
        return f"list of {_kind(members[0])}s"
    if kind is dict:
        return "sections by name" if dataclasses.is_dataclass(members[1]) else "mapping of texts"
    assert kind in (Union, UnionType)
    kinds = [member for member in members if member is not type(None)]
    single = [_kind(member) for member in kinds if typing.get_origin(member) is not list]
    return ", ".join(single) + ", or a list" if len(single) < len(kinds) and single else _kind(kinds[0])


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
