"""The pages are true: links lead somewhere, commands and settings exist, tables are complete, code runs."""

import ast
import dataclasses
import inspect
import re
import shlex
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import transformers
import trl
from conftest import make_run, refshard, simple_rows  # noqa: F401  make_run is a fixture
from test_layout import PIPELINE, STAGES

from pipeline.config import (
    _FIXED_TRAIN_FIELDS,
    OWN_TRAIN_FIELDS,
    Config,
    load_config,
    training_settings,
)
from pipeline.pairs import to_pair
from stages.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LEAST = {
    "data": {"path": "pairs.jsonl"},
    "policy": {"model": "model"},
    "precompute": {"output": "shards"},
    "train": {"output_dir": "policy"},
}


# --- Reading pages ---


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each code block: fenced, also in a list, or indented by four spaces ("shell")."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
    for found in fence.finditer(text):
        lines = found[3].splitlines(keepends=True)
        yield found[2], "".join(line.removeprefix(found[1]) for line in lines)
    for found in re.finditer(r"(?<=\n\n)(?:    [^\n]*\n)+", fence.sub("", text) + "\n"):
        yield "shell", "".join(line[4:] for line in found[0].splitlines(keepends=True))


def blocks_in(name: str, language: str) -> list[str]:
    return [content for found, content in blocks(read(name)) if found == language]


def spans(text: str) -> list[str]:
    """The inline code of a page."""
    prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]


def table(name: str, first: str) -> list[list[str]]:
    """Rows of the page's table whose heading starts with this cell."""
    text = read(name)
    lines = text[text.index(f"\n| {first} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def code_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def written(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, [])


def completed(tmp_path: Path, text: str) -> Config:
    """A config of a page, which may leave out the sections that it is not about."""
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    least = [f"{s}.{k}={v}" for s, values in LEAST.items() for k, v in values.items() if f"\n{s}:" not in f"\n{text}"]
    return load_config(file, least)


def keys_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the settings, with its default; `*` for names of the user's own."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = None if field.default is dataclasses.MISSING else field.default
        found[f"{prefix}{field.name}"] = default
        inner, name = hints[field.name], field.name
        if typing.get_origin(inner) is dict and dataclasses.is_dataclass(typing.get_args(inner)[1]):
            inner, name = typing.get_args(inner)[1], f"{field.name}.*"
        members = typing.get_args(inner) if isinstance(inner, types.UnionType) else (inner,)
        for member in members:
            if dataclasses.is_dataclass(member):
                found |= keys_of(member, f"{prefix}{name}.")
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """All keys with our defaults, the fields of TrainingArguments among them."""
    config = Config(**{name: _section(name) for name in ("data", "policy", "precompute")}, train=dict(LEAST["train"]))
    library = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields_of_library()}
    ours = training_settings(config)
    return {
        **keys_of(Config),
        **{f"train.{key}": value for key, value in {**own_defaults(), **library, **ours}.items()},
    }


def _section(name: str) -> Any:
    return typing.get_type_hints(Config)[name](**LEAST[name])


def fields_of_library() -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(transformers.TrainingArguments)


def own_defaults() -> dict[str, Any]:
    return {"on_missing": "stop", "on_mismatch": "stop", "activation_offload": False}


# --- All pages ---


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file_and_an_anchor_that_are_there(name: str) -> None:
    text = read(name)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_every_command_that_a_page_shows_exists_with_its_options(name: str) -> None:
    text = read(name)
    lines = [line for kind, block in blocks(text) if kind in ("", "sh", "shell", "bash") for line in block.splitlines()]
    wrong = []
    for line in lines:
        if line.lstrip("$ ").startswith("refshard "):
            wrong += problems_of(shlex.split(line.lstrip("$ "), comments=True), whole=True)
    for span in spans(text):
        if span.startswith("refshard "):
            wrong += problems_of(span.split(), whole=False)
    assert not wrong


def problems_of(words: list[str], *, whole: bool) -> list[str]:
    """What is wrong with a command line, read by click's own parser; a mention in the text may leave out the rest."""
    command: click.Command = main
    rest = [word for word in words[1:] if word not in ("...", "--debug")]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, *rest = rest
        if name not in command.commands:
            return [f"{' '.join(words)}: no command {name}"]
        command = command.commands[name]
    if not whole:
        options = {option for parameter in command.params for option in parameter.opts}
        return [
            f"{' '.join(words)}: no option {w}" for w in rest if w.startswith("--") and w.split("=")[0] not in options
        ]
    try:
        values, left, _ = command.make_parser(click.Context(command)).parse_args(list(rest))
    except click.UsageError as error:
        return [f"{' '.join(words)}: {error.format_message()}"]
    missing = [p.name for p in command.params if p.required and values.get(p.name or "") is None]
    return [f"{' '.join(words)}: {what}" for what in (*missing, *left)]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_a_page_names_exists(name: str, known: dict[str, Any]) -> None:
    sections = "|".join(f.name for f in dataclasses.fields(Config))
    found = re.findall(
        rf"(?:^|[\s,(])((?:{sections})\.[a-z_][\w.]*)(?![\w/]*\.(?:py|sh|md))", "\n".join(spans(read(name)))
    )
    found += re.findall(r"-o ((?:\w+\.)+\w+)=", read(name))
    files = {"py", "sh", "jsonl", "parquet", "md", "yaml", "json"}
    keys = {key.rstrip(".") for key in found if key.rsplit(".", 1)[-1] not in files}
    open_ended = {"data.columns", "train.fsdp_config", "cluster.kubernetes.node_selector"}
    unknown = [
        key
        for key in keys
        if key not in known and key.rpartition(".")[0] not in open_ended and not re.fullmatch(r"data\.eval\.\w+", key)
    ]
    assert not unknown


@pytest.mark.parametrize("name", NAMES)
def test_every_settings_file_that_a_page_shows_loads(name: str, tmp_path: Path) -> None:
    for text in blocks_in(name, "yaml"):
        training_settings(completed(tmp_path, text))


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_test_that_a_page_names_is_there(name: str) -> None:
    text = read(name)
    named = set(re.findall(r"(?<![\w./:])((?:tests|pipeline|stages|docs)/[\w/]+\.\w+)(?:::(\w+))?", text))
    missing = [
        f"{path}::{test}" if test else path
        for path, test in named
        if path not in MADE_LATER
        and (not (ROOT / path).exists() or (test and f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8")))
    ]
    assert not missing


MADE_LATER = {"tests/bench/results/cpu.json", "tests/bench/results/gpu.json"}


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_that_a_page_shows_exists(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    shown = [
        *spans(read(name)),
        *(line for kind, block in blocks(read(name)) if kind == "shell" for line in block.splitlines()),
    ]
    assert {words[1] for line in shown if (words := line.split())[:1] == ["make"] and len(words) > 1} <= targets


# --- Coming from TRL ---

TRL_PAGE = "docs/coming-from-trl.md"


def fields_of_dpo() -> dict[str, Any]:
    """DPOConfig's own fields, with their defaults."""
    library = {f.name for f in fields_of_library()}
    return {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(trl.DPOConfig)
        if f.name not in library
    }


def mapped(first: str) -> dict[str, list[str]]:
    """A table of the page: their option -> our keys, none where there is no such thing here."""
    rows = table(TRL_PAGE, first)
    assert all(len(code_of(theirs)) == 1 for theirs, *_ in rows)
    assert len({theirs for theirs, *_ in rows}) == len(rows), "an option is there twice"
    assert all(code_of(ours) or ours == "not there" for _, ours, *_ in rows)
    assert all(code_of(ours) or why for _, ours, why in rows), "not there, because?"
    return {code_of(theirs)[0]: code_of(ours) for theirs, ours, *_ in rows}


def test_every_option_of_dpoconfig_is_in_the_table_once() -> None:
    assert mapped("DPOConfig").keys() == fields_of_dpo().keys()


def test_every_argument_of_the_trainer_and_every_option_of_the_command_is_in_its_table() -> None:
    assert mapped("DPOTrainer").keys() == inspect.signature(trl.DPOTrainer.__init__).parameters.keys() - {"self"}
    options = [f.name for kind in (trl.ModelConfig, trl.ScriptArguments) for f in dataclasses.fields(kind)]
    assert mapped("`trl dpo`").keys() == {f"--{name}" for name in options}


@pytest.mark.parametrize("first", ["DPOConfig", "DPOTrainer", "`trl dpo`"])
def test_every_key_of_ours_in_the_tables_exists(first: str, known: dict[str, Any]) -> None:
    assert not [key for keys in mapped(first).values() for key in keys if key not in known]


def test_the_page_names_the_library_s_fields_that_are_refused() -> None:
    text = read(TRL_PAGE)
    sentence = text[text.index("These alone are refused") :].split("\n\n")[0]
    assert {key.removeprefix("train.") for key in code_of(sentence)} == _FIXED_TRAIN_FIELDS.keys()


def test_the_defaults_that_differ_are_those_on_the_page(known: dict[str, Any]) -> None:
    theirs = {f.name: f.default for f in dataclasses.fields(trl.DPOConfig) if f.default is not dataclasses.MISSING}
    theirs |= fields_of_dpo()
    names = mapped("DPOConfig")
    ours = {name: known[keys[0]] for name, keys in names.items() if len(keys) == 1}
    ours |= {
        f.name: known[f"train.{f.name}"] for f in fields_of_library() if f.name in theirs and f.name != "output_dir"
    }
    differ = {name: (theirs[name], value) for name, value in ours.items() if not is_same(theirs[name], value)}
    listed = {
        code_of(row[0])[0]: (ast.literal_eval(code_of(row[1])[0]), ast.literal_eval(code_of(row[2])[0]))
        for row in table(TRL_PAGE, "option")
    }
    assert differ == listed


def is_same(theirs: Any, ours: Any) -> bool:
    """One loss may be a list of one; what is off may be None or False, where its key is a section of ours."""
    return theirs == ours or theirs == [ours] or (theirs is False and ours is None)


def test_the_settings_after_say_what_the_script_before_says(tmp_path: Path) -> None:
    [script] = [block for block in blocks_in(TRL_PAGE, "python") if "DPOTrainer(" in block]
    [settings] = blocks_in(TRL_PAGE, "yaml")
    config = written(tmp_path, settings)
    training = training_settings(config)
    calls = {node.func.id: node for node in ast.walk(ast.parse(script))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    arguments = {word.arg: ast.literal_eval(word.value) for word in calls["DPOConfig"].keywords}
    assert arguments.pop("precompute_ref_log_probs") is True
    names = mapped("DPOConfig")
    for name, value in arguments.items():
        found: Any = training[name] if name in training else config
        if found is config:
            for key in names[name][0].split("."):
                found = getattr(found, key)
        assert found == value, name
    assert config.train.keys() == arguments.keys() - names.keys(), "settings that the script does not have"
    lora = {word.arg: ast.literal_eval(word.value) for word in calls["LoraConfig"].keywords}
    assert config.policy.lora is not None
    assert lora == {"r": config.policy.lora.r, "lora_alpha": config.policy.lora.alpha,
                    "target_modules": config.policy.lora.target_modules}  # fmt: skip
    words = {word.arg: word.value for word in calls["DPOTrainer"].keywords}
    assert ast.literal_eval(words["model"]) == config.policy.model
    sets = [ast.unparse(words[name]) for name in ("train_dataset", "eval_dataset")]
    assert sets == [f"load_dataset({config.data.path!r}, split={split!r})"
                    for split in (config.data.split, config.data.eval["test"].split)]  # fmt: skip


def test_own_fields_of_train_have_the_defaults_that_are_compared() -> None:
    assert own_defaults().keys() == OWN_TRAIN_FIELDS.keys()
