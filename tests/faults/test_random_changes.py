"""Two hundred random changes of what a log-prob depends on: each is refused by its field, or changes no number.

Scored once. Then a value or a byte of model, tokenizer, adapter, data, settings or environment is changed, and the
changed run asks the stored log-probs for its pairs. It must be refused, or get what its own reference gives. Both
stages, finished before the change, must not answer that there is nothing to do unless that holds. The joined sets that
stage two keeps must be those of a run that joins anew.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from pipeline.base.errors import RefshardError
from pipeline.base.signals import StopFlag
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.models.files import load_tokenizer
from pipeline.models.identity import differences, identity_of_run
from pipeline.scoring.scorer import load_scorer
from pipeline.training.joined_cache import JoinedCache
from pipeline.training.joining import join_sets, open_joined, open_stores_of_run
from stages import finished, train
from stages.precompute import command as precompute
from support.models import make_model, make_tokenizer
from support.runs import kept, simple_rows, write_config, write_jsonl
from support.tally import tally

pytestmark = pytest.mark.slow

CHANGES = 200
CHANGES_OF_SETS = 30
# Batches of other pairs round otherwise; a wrong model, token or length differs by far more.
ROUNDING = 2e-5

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
Logps = dict[bytes, tuple[np.ndarray, np.ndarray]]


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {column: [{"role": role, "content": row[column]}] for column, role in roles.items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished stores and a finished run, to be copied to the place where it was made."""
    folder = tmp_path_factory.mktemp("changes") / "now"
    write_jsonl(folder / "pairs.jsonl", [*simple_rows(6), *map(as_messages, simple_rows(6, start=6))])
    model = make_model(folder / "model", make_tokenizer(bos=True, template=TEMPLATE))
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        config = settings(folder)
        precompute.run(config)
        train.run(config)
    return folder.rename(folder.parent / "original")


def settings(folder: Path, *overrides: str) -> Config:
    file = write_config(
        folder / "run.yaml",
        data={"path": str(folder / "pairs.jsonl"), "max_length": 48},
        policy={"model": str(folder / "model")},
        reference={"adapter": str(folder / "adapter")},
        precompute={"output": str(folder / "shards"), "tokens_per_batch": 512},
        train={"output_dir": str(folder / "policy"), "max_steps": 1, "save_strategy": "no", "use_cpu": True},
    )
    return load_config(file, overrides)


def score(config: Config) -> Logps:
    """Give each pair's token logps by its key, as stage one would store them."""
    tokenizer: Any = load_tokenizer(config)
    pairs = kept(config)
    with load_scorer(config, tokenizer, tokens_per_batch=512) as scorer:
        return {pairs[i].key: (chosen, rejected) for i, chosen, rejected in scorer.logps([p.pair for p in pairs])}


# Changes


def leaves(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the place of every value in a JSON document: its parent and its key."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from leaves(tree[key])


def other_value(value: Any, chance: random.Random) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return chance.choice([value + 1, value * 2, -value, 0])
        case str():
            return chance.choice([value + "x", value[:-1], value.upper(), ""])
        case None:
            return chance.choice([0, 1, True, "x"])
    return chance.choice([None, 1, [], {}])


def change_json(file: Path, chance: random.Random) -> str:
    tree = json.loads(file.read_text())
    places = list(leaves(tree))
    # Of a vocabulary's thousands of entries as often as of the rest.
    shallow = [place for place in places if len(place[0]) < 60]
    parent, key = chance.choice(chance.choice([places, shallow or places]))
    before = parent[key]
    if isinstance(parent, dict) and not chance.randrange(4):
        del parent[key]
        what = "removed"
    else:
        parent[key] = other_value(before, chance)
        what = f"{str(before)[:40]!r} -> {str(parent[key])[:40]!r}"
    file.write_text(json.dumps(tree))
    return f"{file.name}: {key}: {what}"


def change_bytes(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"{file.name}: a bit of byte {at}"


def change_rows(file: Path, chance: random.Random) -> str:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    at = chance.randrange(len(rows))
    what = chance.choice(["drop", "repeat", "shuffle", "swap", "edit", "add a column"])
    if what == "drop":
        del rows[at]
    elif what == "repeat":
        rows.insert(chance.randrange(len(rows)), rows[at])
    elif what == "shuffle":
        chance.shuffle(rows)
    elif what == "swap":
        rows[at]["chosen"], rows[at]["rejected"] = rows[at]["rejected"], rows[at]["chosen"]
    elif what == "add a column":
        rows[at][chance.choice(["note", "system", "tools", "score", "id"])] = None
    else:
        parent, key = chance.choice([place for place in leaves(rows[at]) if isinstance(place[0][place[1]], str)])
        text = parent[key]
        parent[key] = chance.choice([text + " more", text[1:], text + " ", text.replace(" ", "  "), text + "é"])
    write_jsonl(file, rows)
    return f"pairs.jsonl: {what} row {at}"


def add_file(folder: Path, chance: random.Random) -> str:
    name, source = chance.choice(
        [
            ("adapter_config.json", folder.parent / "adapter/adapter_config.json"),
            ("adapter_model.safetensors", folder.parent / "adapter/adapter_model.safetensors"),
            ("other.safetensors", folder / "model.safetensors"),
            ("model-00001-of-00001.safetensors", folder / "model.safetensors"),
            ("generation_config.json", None),
            ("chat_template.jinja", None),
            ("model.safetensors.index.json", None),
            ("added_tokens.json", None),
            ("special_tokens_map.json", None),
            ("vocab.json", None),
        ]
    )
    if source is None:
        (folder / name).write_text(
            chance.choice(["{}", '{"weight_map": {}}', '{"temperature": 0.5}', "{{ messages }}"])
        )
    else:
        shutil.copy(source, folder / name)
    return f"model/{name} added"


OVERRIDES = [
    "data.max_length=24",
    "data.max_length=47",
    "data.max_length=200",
    "data.max_length=null",
    "data.on_identical=drop",
    "data.split=train[2:9]",
    "data.columns.chosen=rejected",
    "reference.dtype=bfloat16",
    "reference.dtype=float16",
    "reference.dtype=float32",
    "reference.disable_adapters=true",
    "policy.dtype=bfloat16",
    "loss.beta=0.5",
    "loss.type=ipo",
    "policy.lora.r=4",
    "precompute.tokens_per_batch=64",
    "precompute.tokens_per_batch=4096",
    "precompute.rows_per_shard=3",
    "precompute.token_logps=off",
    "loss.ld_alpha=0.5",
    "data.on_bad_row=skip",
    "data.streaming=true",
]
VARIABLES = (
    "TZ=Asia/Kathmandu",
    "LANG=tr_TR.UTF-8",
    "OMP_NUM_THREADS=2",
    "TOKENIZERS_PARALLELISM=true",
    "LOCAL_RANK=0",
)


def change(folder: Path, chance: random.Random) -> tuple[str, tuple[str, ...]]:
    """Make one change; give its description and the overrides of the settings."""
    model, adapter = folder / "model", folder / "adapter"
    kinds: list[Callable[[], str]] = [
        lambda: change_json(model / "config.json", chance),
        lambda: change_json(model / "tokenizer.json", chance),
        lambda: change_json(model / "tokenizer_config.json", chance),
        lambda: change_json(adapter / "adapter_config.json", chance),
        lambda: change_bytes(model / "model.safetensors", chance),
        lambda: change_bytes(adapter / "adapter_model.safetensors", chance),
        lambda: change_rows(folder / "pairs.jsonl", chance),
        lambda: change_rows(folder / "pairs.jsonl", chance),
        lambda: add_file(model, chance),
    ]
    if (kind := chance.randrange(len(kinds) + 2)) < len(kinds):
        return kinds[kind](), ()
    if kind == len(kinds):
        override = chance.choice(OVERRIDES)
        return override, (override,)
    variable, _, value = chance.choice(VARIABLES).partition("=")
    os.environ[variable] = value
    return f"${variable}={value}", ()


def outcome_of(folder: Path, overrides: tuple[str, ...], identity: dict[str, Any], stored: Logps) -> str:
    """Say how the change was refused, or that it changed no number; fail if a wrong number would be read."""
    answered = False
    try:
        config = settings(folder, *overrides)
        answered = finished.reported_stores(config) | finished.reported_run(config)
        found = differences(identity, identity_of_run(config, load_tokenizer(config)), joining=True)
        if found:
            assert not answered, f"nothing to do, although {found[0]}"
            return f"refused by {found[0]}"
        now = score(config)
    except RefshardError as error:
        assert not answered, f"nothing to do, although {error}"
        return f"refused: {error}"
    # A pair that was not stored is missing, which stage two refuses; one that was must have these numbers.
    for key in now.keys() & stored.keys():
        for ours, theirs in zip(now[key], stored[key], strict=True):
            gap = np.abs(ours - theirs[: len(ours)]).max()
            assert len(ours) <= len(theirs)
            assert gap < ROUNDING, f"{gap:.1e} nats apart"
    assert not answered or now.keys() == stored.keys(), "nothing to do, although the pairs are others"
    return "no number changed" + ", nothing to do" * answered


def joined(config: Config, folder: Path, cache: JoinedCache | None) -> Any:
    """Give what stage two trains on, or how it is refused: inputs of the set, rows, token logps."""
    try:
        tokenizer = load_tokenizer(config)
        stores = open_stores_of_run(config, ["train"], tokenizer)
        inputs = join_sets(config, stores, tokenizer, folder, StopFlag(), cache=cache)
    except RefshardError as error:
        return type(error), str(error)
    logps = folder / "token-logps.f32"
    return inputs, open_joined(folder, "train").data.table.to_pylist(), logps.exists() and logps.read_bytes()


def test_joined_sets_that_are_kept_are_those_of_a_run_that_joins_anew(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scored = Path(shutil.copytree(original, tmp_path / "scored"))
    precompute.run(settings(scored))
    kept = JoinedCache(scored / "shards" / ".joined", lambda: True)
    joined(settings(scored), tmp_path / "first", kept)
    outcomes: list[str] = []
    for seed in range(CHANGES_OF_SETS):
        folder = Path(shutil.copytree(scored, tmp_path / str(seed)))
        environment = dict(os.environ)
        # Other changes than those of the test below.
        what, overrides = change(folder, random.Random(-1 - seed))
        try:
            with contextlib.suppress(RefshardError):
                config = settings(folder, *overrides)
                cache = JoinedCache(folder / "shards" / ".joined", lambda: True)
                with_cache, anew = (joined(config, folder / name, one) for name, one in (("a", cache), ("b", None)))
                assert with_cache == anew, what
                is_one = len(list(cache.folder.iterdir())) == 1
                outcomes.append("refused" if isinstance(with_cache[0], type) else "found" if is_one else "joined")
        finally:
            os.environ.clear()
            os.environ.update(environment)
            shutil.rmtree(folder)
    found, again = outcomes.count("found"), outcomes.count("joined")
    assert min(found, again) > CHANGES_OF_SETS // 10
    tally(
        "one value or byte changed at random beside joined sets that are kept",
        CHANGES_OF_SETS,
        outcome=f"{found} found, {again} joined anew, the others refused; the rows and values of a join anew",
    )


def test_each_of_two_hundred_random_changes_is_refused_or_changes_no_number(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(original.parent / "cache"))
    now = original.parent / "now"
    config = settings(Path(shutil.copytree(original, now)))
    assert finished.reported_stores(config) and finished.reported_run(config)
    identity, stored = identity_of_run(config, load_tokenizer(config)), score(config)
    shutil.rmtree(now)
    outcomes = []
    for seed in range(CHANGES):
        folder = Path(shutil.copytree(original, now))
        environment = dict(os.environ)
        what, overrides = change(folder, random.Random(seed))
        try:
            outcomes.append(outcome_of(folder, overrides, identity, stored))
        except Exception as error:
            raise AssertionError(f"change {seed}, {what}: {type(error).__name__}: {error}") from error
        finally:
            os.environ.clear()
            os.environ.update(environment)
            shutil.rmtree(folder)
        if os.environ.get("REFSHARD_SHOW"):
            print(f"{seed}: {what}: {outcomes[-1][:150]}")
    refused = sum(text.startswith("refused") for text in outcomes)
    assert CHANGES // 4 < refused < CHANGES
    # Variables of the environment, and keys that nothing reads.
    assert any(text.endswith("nothing to do") for text in outcomes)
    tally(
        "one value or byte of model, tokenizer, adapter, data, settings or environment changed at random",
        CHANGES,
        outcome=f"{refused} refused by field or file, {CHANGES - refused} change no number",
    )
