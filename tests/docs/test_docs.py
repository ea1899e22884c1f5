"""The pages are true: links lead somewhere, commands and settings exist, tables are complete, code runs."""

import ast
import dataclasses
import json
import re
import shlex
import shutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import trl

from pipeline.base.errors import ConfigError
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.config.training import FIXED_TRAIN_FIELDS, TrainSection
from pipeline.data.layouts import to_pair
from stages.cli import main
from support.processes import ROOT
from support.runs import refshard, simple_rows, write_config, write_jsonl

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
    kinds = typing.get_type_hints(Config)
    config = Config(**{name: (kinds[name] if name != "train" else TrainSection)(**LEAST[name]) for name in LEAST})
    library = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields_of_library()}
    own = {f.name: f.default for f in dataclasses.fields(TrainSection) if f.name not in ("output_dir", "given")}
    train = {**own, **library, **config.train.options}
    return {**keys_of(Config), **{f"train.{key}": value for key, value in train.items()}}


def fields_of_library() -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(transformers.TrainingArguments)


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
        command = re.sub(r"^(torchrun|accelerate launch) .*-m (?=refshard )", "", line.lstrip("$ "))
        if command.startswith("refshard "):
            wrong += problems_of(shlex.split(command, comments=True), whole=True)
        if re.search(r" -m (stages|pipeline)\b", line):
            wrong.append(f"{line}: a launcher must start refshard by its name")
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
    # For an argument that is not there, click's newer versions have a mark of their own in place of None.
    given = {name for name, value in values.items() if value and isinstance(value, str | list | tuple)}
    missing = [p.name for p in command.params if p.required and p.name not in given]
    return [f"{' '.join(words)}: {what}" for what in (*missing, *left)]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_a_page_names_exists(name: str, known: dict[str, Any]) -> None:
    assert not unknown_settings(read(name), known)


def unknown_settings(text: str, known: dict[str, Any]) -> list[str]:
    """Dotted keys in a page's inline code, and after -o, that no settings have."""
    sections = "|".join(f.name for f in dataclasses.fields(Config))
    found = re.findall(rf"(?:^|[\s,(])((?:{sections})\.[a-z_][\w.]*)", "\n".join(spans(text)))
    found += re.findall(r"-o ((?:\w+\.)+\w+)=", text)
    keys = {
        re.sub(r"^data\.(eval|sets)\.\w+\.", r"data.\1.*.", key.rstrip("."))
        for key in found
        if key.rsplit(".", 1)[-1] not in ("py", "sh", "jsonl", "parquet", "md")
    }
    # Names of the user's own, and mappings of which the library knows the keys.
    own = re.compile(
        r"(data\.columns|data\.eval|data\.sets|train\.fsdp_config|cluster\.kubernetes\.node_selector)\.\w+"
    )
    return sorted(key for key in keys if key not in known and not own.fullmatch(key))


def test_the_readme_counts_the_faults_that_the_page_of_reliability_counts() -> None:
    counted = re.search(r"^([\d,]+) faults, injected for real", read("docs/reliability.md"), re.MULTILINE)
    assert counted is not None and f"| {counted[1]} faults, injected for real |" in read("README.md")


def test_what_does_not_exist_is_found(known: dict[str, Any], tmp_path: Path) -> None:
    for words in (
        "refshard trian --config F",
        "refshard train --config F --one-windows",
        "refshard train -o loss.beta=1",
        "refshard inspect",
        "refshard inspect one two",
        "refshard report",
        "refshard submit slurm --config",
    ):
        assert problems_of(words.split(), whole=True), words
    assert not problems_of(shlex.split("refshard submit k8s --config F --workers 3 --submit"), whole=True)
    assert problems_of(["refshard", "verify", "--model"], whole=False) == []
    assert problems_of(["refshard", "verify", "--modal", "M"], whole=False)
    assert unknown_settings("`loss.betta: 1`, `train.lerning_rate`, -o data.pth=x, `train.py`, `loss.beta`", known) == [
        "data.pth",
        "loss.betta",
        "train.lerning_rate",
    ]
    with pytest.raises(ConfigError, match="betta"):
        completed(tmp_path, "loss: {betta: 1}")
    assert anchors("# One, two\n```\n# no\n```\n## `a_b`: c-d") == {"one-two", "a_b-c-d"}
    assert list(blocks("a\n\n    refshard x\n    y\n\nb\n```yaml\nk: v\n```\n")) == [
        ("yaml", "k: v\n"),
        ("shell", "refshard x\ny\n"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_settings_file_that_a_page_shows_loads(name: str, tmp_path: Path) -> None:
    for text in blocks_in(name, "yaml"):
        _ = completed(tmp_path, text).train.options


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
    shown = [*spans(read(name)), *(block for kind, block in blocks(read(name)) if kind == "shell")]
    assert {target for code in shown for target in re.findall(r"\bmake ([a-z][\w-]*)", code)} <= targets


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
    assert mapped("DPOTrainer").keys() == arguments_of_trainer()
    options = [f.name for kind in (trl.ModelConfig, trl.ScriptArguments) for f in dataclasses.fields(kind)]
    assert mapped("`trl dpo`").keys() == {f"--{name}" for name in options}


def arguments_of_trainer() -> set[str]:
    """Arguments of DPOTrainer, read from its source, whose import takes seconds."""
    source = Path(trl.__file__).parent / "trainer" / "dpo_trainer.py"
    [trainer] = [
        node for node in ast.parse(source.read_text("utf-8")).body if getattr(node, "name", "") == "DPOTrainer"
    ]
    [made] = [node for node in trainer.body if getattr(node, "name", "") == "__init__"]
    return {argument.arg for argument in made.args.args} - {"self"}


@pytest.mark.parametrize("first", ["DPOConfig", "DPOTrainer", "`trl dpo`"])
def test_every_key_of_ours_in_the_tables_exists(first: str, known: dict[str, Any]) -> None:
    assert not [key for keys in mapped(first).values() for key in keys if key not in known]


def test_the_page_names_the_library_s_fields_that_are_refused() -> None:
    text = read(TRL_PAGE)
    sentence = text[text.index("Only these are refused") :].split("\n\n")[0]
    assert {key.removeprefix("train.") for key in code_of(sentence)} == FIXED_TRAIN_FIELDS.keys()


def test_the_defaults_that_differ_are_those_on_the_page(known: dict[str, Any]) -> None:
    theirs = {f.name: f.default for f in dataclasses.fields(trl.DPOConfig) if f.default is not dataclasses.MISSING}
    theirs |= fields_of_dpo()
    names = mapped("DPOConfig")
    ours = {name: known[keys[0]] for name, keys in names.items() if len(keys) == 1}
    ours |= {
        f.name: known[f"train.{f.name}"] for f in fields_of_library() if f.name in theirs and f.name != "output_dir"
    }
    # What is off is False in some versions of the library and None in others.
    differ = {name: (theirs[name], value or 0) for name, value in ours.items() if not is_same(theirs[name], value)}
    listed = {
        code_of(row[0])[0]: (ast.literal_eval(code_of(row[1])[0]), ast.literal_eval(code_of(row[2])[0]) or 0)
        for row in table(TRL_PAGE, "option")
    }
    assert differ == listed


def is_same(theirs: Any, ours: Any) -> bool:
    """One loss may be a list of one; what is off may be None or False, where its key is a section of ours."""
    return theirs == ours or theirs == [ours] or (theirs is False and ours is None)


def test_the_settings_after_say_what_the_script_before_says(tmp_path: Path) -> None:
    [script] = [block for block in blocks_in(TRL_PAGE, "python") if "DPOTrainer(" in block]
    [settings] = blocks_in(TRL_PAGE, "yaml")
    config = completed(tmp_path, settings)
    training = config.train.as_dict() | dict(config.train.options)
    calls = {node.func.id: node for node in ast.walk(ast.parse(script))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    arguments = {word.arg: ast.literal_eval(word.value) for word in calls["DPOConfig"].keywords}
    assert arguments.pop("precompute_ref_log_probs") is True
    names = mapped("DPOConfig")
    for name, value in arguments.items():
        found: Any = training.get(name, config)
        if found is config:
            for key in names[name][0].split("."):
                found = getattr(found, key)
        assert found == value, name
    assert config.train.as_dict().keys() == arguments.keys() - names.keys(), "settings that the script does not have"
    lora = {word.arg: ast.literal_eval(word.value) for word in calls["LoraConfig"].keywords}
    assert config.policy.lora is not None
    assert lora == {"r": config.policy.lora.r, "lora_alpha": config.policy.lora.alpha,
                    "target_modules": config.policy.lora.target_modules}  # fmt: skip
    words = {word.arg: word.value for word in calls["DPOTrainer"].keywords}
    assert ast.literal_eval(words["model"]) == config.policy.model
    sets = [ast.unparse(words[name]) for name in ("train_dataset", "eval_dataset")]
    assert sets == [f"load_dataset({config.data.path!r}, split={split!r})"
                    for split in (config.data.split, config.data.eval["test"].split)]  # fmt: skip


def test_the_trainer_that_reads_exported_columns_is_the_one_that_is_tested() -> None:
    [shown] = [block for block in blocks_in("docs/guide.md", "python") if "class ReadsColumns" in block]
    tested = read("tests/stages/test_import_export.py")
    both = [
        next(n for n in ast.walk(ast.parse(text)) if getattr(n, "name", "") == "ReadsColumns")
        for text in (shown, tested)
    ]
    methods = [[n for n in found.body if isinstance(n, ast.FunctionDef)] for found in both]
    said = [[(m.name, [a.arg for a in m.args.args], ast.unparse(m.body)) for m in found] for found in methods]
    assert said[0] == said[1]
    assert ast.unparse(both[0].bases[0]) == ast.unparse(both[1].bases[0])


# --- The shard format ---

FORMAT = "docs/shard-format.md"
PLACE = "runs/default/shards"


@dataclasses.dataclass(frozen=True)
class Scored:
    """A store that the real command made, and the pairs in it as transformers scores them."""

    folder: Path
    rows: list[dict[str, str]]
    ids: list[tuple[list[int], list[int], list[int]]]
    """Of prompt, chosen, rejected"""
    logps: list[tuple[list[float], list[float]]]
    """Token logps of chosen and rejected"""

    @property
    def margins(self) -> np.ndarray:
        return np.array([sum(chosen) - sum(rejected) for chosen, rejected in self.logps])


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, tokenizer: Any) -> Scored:
    folder, rows = tmp_path_factory.mktemp("format"), simple_rows(20)
    config = write_config(
        folder / "run.yaml",
        data={"path": str(write_jsonl(folder / "pairs.jsonl", [*rows, {"prompt": "?"}])), "on_bad_row": "skip"},
        policy={"model": str(model_folder)},
        precompute={"output": str(folder / PLACE), "rows_per_shard": 8, "tokens_per_batch": 512},
    )
    refshard("precompute", "--config", config)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)

    def after(prompt: list[int], text: str) -> tuple[list[int], list[float]]:
        whole = tokenizer(text + tokenizer.eos_token)["input_ids"]
        assert whole[: len(prompt)] == prompt
        with torch.no_grad():
            logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return whole[len(prompt) :], [logps[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))]

    ids, logps = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        (chosen, of_chosen), (rejected, of_rejected) = (
            after(prompt, row["prompt"] + row[s]) for s in ("chosen", "rejected")
        )
        ids.append((prompt, chosen, rejected))
        logps.append((of_chosen, of_rejected))
    return Scored(folder, rows, ids, logps)


def ran(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, FORMAT, "exec"), names)
    return names


def block_with(word: str) -> str:
    [block] = [block for block in blocks_in(FORMAT, "python") if word in block]
    return block


@pytest.mark.parametrize("library", ["duckdb", "polars", "pandas"])
def test_readers_give_what_transformers_gives(scored: Scored, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scored.folder)
    [block] = [b for b in blocks_in(FORMAT, "python") if f"import {library}" in b and "most_wrong" in b]
    found = ran(block)
    margins = scored.margins
    assert found["pairs"] == len(margins) == 20
    assert 0 < found["agrees"] < 1 and found["agrees"] == pytest.approx((margins > 0).mean())
    assert found["most_wrong"] == margins.argmin()


def test_the_lists_are_token_log_probs_in_nats(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scored.folder)
    tokens = [value for chosen, _ in scored.logps for value in chosen]
    assert ran(block_with("per_token"))["per_token"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)


def test_the_key_made_by_hand_is_the_stores(scored: Scored) -> None:
    block = block_with("def pair_key")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    by_hand = ran(block)["pair_key"]
    keys = [row["pair_key"] for part in parts(scored) for row in part.to_pylist()]
    assert keys == [by_hand(*ids) for ids in scored.ids]
    prompt, chosen, rejected = scored.ids[0]
    assert by_hand([*prompt, chosen[0]], chosen[1:], rejected) != keys[0]


def parts(scored: Scored) -> list[pa.Table]:
    return [pq.read_table(file) for file in sorted((scored.folder / PLACE / "train").glob("part-*.parquet"))]


def test_seals_are_as_the_page_says_and_a_changed_value_breaks_each(
    scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(scored.folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    seals, digest = block_with("def sha256_of"), block_with("expected = footer.pop")
    ran(seals)
    ran(digest)
    store = tmp_path / PLACE / "train"
    for name, old, new in (
        ("manifest.json", '"split": "train"', '"split": "test"'),
        ("index.json", '"kept": 20', '"kept": 19'),
    ):
        text = (store / name).read_text()
        assert old in text
        (store / name).write_text(text.replace(old, new))
        with pytest.raises(AssertionError):
            ran(seals)
        (store / name).write_text(text)
    part = pq.read_table(store / "part-00000.parquet")
    changed = part.set_column(1, part.schema.field("row"), pa.array([7, *part["row"].to_pylist()[1:]], pa.int64()))
    pq.write_table(changed, store / "part-00000.parquet")
    for block in (seals, digest):
        with pytest.raises(AssertionError):
            ran(block)


def test_the_tables_of_the_format_name_what_is_in_the_files_and_nothing_else(scored: Scored) -> None:
    store = scored.folder / PLACE / "train"
    for part in parts(scored):
        assert [[name, kind] for name, kind, _ in table(FORMAT, "column")] == [
            [f"`{field.name}`", str(field.type)] for field in part.schema
        ]
        assert not any(field.nullable for field in part.schema)
        assert {code_of(key)[0] for key, _ in table(FORMAT, "key")} == {key.decode() for key in part.schema.metadata}
    manifest, index = (json.loads((store / name).read_text()) for name in ("manifest.json", "index.json"))
    of_manifest, of_index = [
        [line.split("|")[1].strip(" `") for line in found.splitlines()]
        for found in re.findall(r"^\| field \| \|\n\|---\|---\|\n((?:\|.*\n)+)", read(FORMAT), re.MULTILINE)
    ]
    assert set(of_manifest) == {*manifest, *(f"identity.{name}" for name in manifest["identity"])}
    assert set(of_index) == set(index)
    said = read(FORMAT)
    for inner in (*manifest["identity"].values(), manifest["plan"], *index["parts"], index["totals"], index["noise"]):
        assert not isinstance(inner, dict) or all(f"`{name}`" in said for name in inner)
    [line] = (store / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"row", "place", "reason", "message"}


# --- Contributing ---

HOW_TO = "docs/contributing.md"


def test_every_law_names_tests() -> None:
    laws = [line.strip("|").split(" | ") for line in read(HOW_TO).splitlines() if line.startswith("| L")]
    assert [row[0].strip() for row in laws] == [f"L{n}" for n in range(1, 12)]
    assert all("tests/" in row[2] or row[2].strip() == "the same" for row in laws)


def test_the_example_of_a_loss_is_its_formula() -> None:
    [block] = [block for block in blocks_in(HOW_TO, "python") if "def dpop" in block]
    dpop = ran(block)["dpop"]
    # Chosen has become less likely by 1 nat: -log sigmoid(0.1 (1 - 5)); more likely: plain DPO.
    found = dpop(torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 0.0]), beta=0.1, lam=5.0)
    assert found.tolist() == pytest.approx([np.log1p(np.exp(0.4)), np.log1p(np.exp(-0.1))])


def test_the_examples_of_a_family_and_of_a_dataset_form_are_true() -> None:
    family, form = (block for block in blocks_in(HOW_TO, "python") if "def dpop" not in block)
    assert family.strip() in read("tests/parity/test_architectures.py")
    exec(compile(form, HOW_TO, "exec"), {"to_pair": to_pair})
