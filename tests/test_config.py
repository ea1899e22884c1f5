"""Settings: strict YAML, converted by the declared type; every refusal names the key."""

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config, as_dict, load_config, training_settings
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[1]

# Every option that a user can write, frozen: a change here is a change of the interface.
OPTIONS = [
    "data",
    "data.columns",
    "data.eval",
    "data.eval.NAME.name",
    "data.eval.NAME.path",
    "data.eval.NAME.split",
    "data.format",
    "data.max_length",
    "data.name",
    "data.on_bad_row",
    "data.on_identical",
    "data.path",
    "data.revision",
    "data.split",
    "data.streaming",
    "loss",
    "loss.beta",
    "loss.type",
    "policy",
    "policy.adapter",
    "policy.dtype",
    "policy.lora",
    "policy.lora.alpha",
    "policy.lora.dropout",
    "policy.lora.r",
    "policy.lora.target_modules",
    "policy.model",
    "policy.revision",
    "precompute",
    "precompute.on_nonfinite",
    "precompute.output",
    "precompute.reuse",
    "precompute.rows_per_shard",
    "precompute.token_logps",
    "precompute.tokens_per_batch",
    "reference",
    "reference.adapter",
    "reference.disable_adapters",
    "reference.dtype",
    "reference.model",
    "reference.revision",
    "train",
]

DEFAULTS = {
    "data": {
        "path": "pairs.jsonl",
        "name": None,
        "revision": None,
        "split": "train",
        "format": None,
        "columns": {},
        "max_length": 1024,
        "streaming": False,
        "on_bad_row": "stop",
        "on_identical": "keep",
        "eval": {},
    },
    "policy": {"model": "m", "revision": None, "adapter": None, "lora": None, "dtype": "float32"},
    "precompute": {
        "output": "out",
        "reuse": [],
        "rows_per_shard": 1024,
        "tokens_per_batch": 8192,
        "token_logps": True,
        "on_nonfinite": "stop",
    },
    "reference": {"model": None, "revision": None, "adapter": None, "disable_adapters": False, "dtype": "auto"},
    "loss": {"type": "sigmoid", "beta": 0.1},
    "train": {},
}

SMALLEST = "data: {path: pairs.jsonl}\npolicy: {model: m}\nprecompute: {output: out}\n"

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load settings from text; the smallest valid ones if left out."""

    def load_text(text: str = SMALLEST, *overrides: str) -> Config:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return load_config(file, overrides)

    return load_text


@pytest.fixture
def train(load: Load) -> Callable[[str], dict[str, Any]]:
    """Convert a train section, given as the inside of a flow mapping."""
    return lambda text: training_settings(load(f"{SMALLEST}train: {{output_dir: o, {text}}}"))


def _dotted(cls: type, prefix: str = "") -> list[str]:
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        inner = [hint, *typing.get_args(hint)]
        nested = next((h for h in inner if dataclasses.is_dataclass(h)), None)
        names.append(f"{prefix}{name}")
        if nested is not None:
            step = ".NAME." if typing.get_origin(hint) is dict else "."
            names += _dotted(typing.cast(type, nested), f"{prefix}{name}{step}")
    return names


def test_the_options_are_the_frozen_ones() -> None:
    assert sorted(_dotted(Config)) == OPTIONS


def test_the_defaults_are_the_frozen_ones(load: Load) -> None:
    assert as_dict(load()) == DEFAULTS


def test_importing_the_settings_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, pipeline.config; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_saved_settings_load_as_the_same_settings(load: Load) -> None:
    config = load(
        "data: {path: p, columns: {prompt: q}, eval: {test: {split: 'test[:9]'}}}\n"
        "policy: {model: m, lora: {target_modules: [q_proj, v_proj]}}\n"
        "precompute: {output: out}\n"
        "train: {output_dir: o, save_strategy: no, learning_rate: 5e-7}\n"
    )
    again = load(yaml.safe_dump(as_dict(config)))
    assert again == config
    assert training_settings(again) == training_settings(config)


# What is refused, and the key that the message starts with.


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (SMALLEST + "los: {beta: 1}\n", "", "los: unknown key; did you mean loss?"),
        (SMALLEST, "loss.betta=1", "loss.betta: unknown key; did you mean beta?"),
        (SMALLEST, "policy.lora.rank=4", "policy.lora.rank: unknown key"),
        (SMALLEST, "data.eval.test.spilt=a", "data.eval.test.spilt: unknown key; did you mean split?"),
        (SMALLEST, "data.columns.promt=q", "data.columns.promt: no such column of a pair; did you mean prompt?"),
        (SMALLEST, "=1", "-o =1: expected key=value"),
        (SMALLEST, "loss.beta", "-o loss.beta: expected key=value"),
        (SMALLEST, "data.path.x=1", "-o data.path.x=1: path holds a value, not settings"),
        (SMALLEST, "data.path=[", "-o data.path=[: not valid YAML"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(load: Load, text: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, *([override] if override else []))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.beta=high", "loss.beta: expected a number, found 'high'"),
        ("loss.beta=null", "loss.beta: expected a number, found nothing"),
        ("loss.beta=[0.1]", "loss.beta: expected a number, found a list"),
        ("loss.type=dpo", "loss.type: expected one of sigmoid; found 'dpo'"),
        ("loss=0.1", "loss: expected settings (a mapping), found '0.1'"),
        ("data.max_length=2.5", "data.max_length: expected a whole number, found '2.5'"),
        ("data.max_length=inf", "data.max_length: expected a whole number, found 'inf'"),
        ("data.max_length=1__0", "data.max_length: expected a whole number, found '1__0'"),
        ("data.max_length=0x10", "data.max_length: expected a whole number, found '0x10'"),
        ("data.max_length=true", "data.max_length: expected a whole number, found 'true'"),
        ("data.streaming=1", "data.streaming: expected true or false, found '1'"),
        ("data.streaming=maybe", "data.streaming: expected true or false, found 'maybe'"),
        ("data.on_bad_row=off", "data.on_bad_row: expected one of stop, skip; found 'off'"),
        ("data.path={a: b}", "data.path: expected text, found a mapping"),
        ("data.path=", "data.path: expected text, found nothing"),
        ("policy.model=null", "policy.model: expected text, found nothing"),
        ("precompute.output=", "precompute.output: expected text, found nothing"),
        ("data.split=~", "data.split: expected text, found nothing"),
        ("data.columns=prompt", "data.columns: expected a mapping, found 'prompt'"),
        ("data.columns.prompt=", "data.columns.prompt: expected text, found nothing"),
        ("data.eval=[test]", "data.eval: expected a mapping, found a list"),
        ("data.eval.test=[a]", "data.eval.test: expected settings (a mapping), found a list"),
        ("policy.dtype=fp32", "policy.dtype: expected one of auto, float32, bfloat16, float16; found 'fp32'"),
        ("policy.lora=yes", "policy.lora: expected settings (a mapping), found 'yes'"),
        ("policy.lora.r=many", "policy.lora.r: expected a whole number, found 'many'"),
        ("policy.lora.target_modules=[{a: b}]", "policy.lora.target_modules: expected list[str] or text"),
    ],
)
def test_a_wrong_type_is_refused_with_what_was_found(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALLEST, override)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=1", "data.max_length: at least 2"),
        ("data.max_length=-5", "data.max_length: at least 2"),
        ("precompute.rows_per_shard=0", "precompute.rows_per_shard: at least 1"),
        ("precompute.tokens_per_batch=0", "precompute.tokens_per_batch: at least 1"),
        ("loss.beta=0", "loss.beta: above 0"),
        ("loss.beta=-0.1", "loss.beta: above 0"),
        ("loss.beta=nan", "loss.beta: above 0"),
        ("loss.beta=inf", "loss.beta: above 0 and finite"),
        ("policy.lora.r=0", "policy.lora.r: at least 1"),
        ("policy.lora.alpha=0", "policy.lora.alpha: above 0"),
        ("policy.lora.alpha=nan", "policy.lora.alpha: above 0"),
        ("policy.lora.dropout=1", "policy.lora.dropout: from 0 to below 1"),
        ("policy.lora.dropout=nan", "policy.lora.dropout: from 0 to below 1"),
        ("data.eval.train.split=a", "data.eval.train: a set's name is a folder's name"),
        ("data.eval={../up: {split: a}}", "data.eval.../up: a set's name is a folder's name"),
        ("data.eval={'': {split: a}}", "data.eval.: a set's name is a folder's name"),
    ],
)
def test_an_impossible_value_is_refused(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALLEST, override)
    assert str(caught.value).startswith(message)


def test_a_fresh_adapter_on_top_of_another_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"^policy.lora: a fresh adapter on top of `adapter`"):
        load(SMALLEST, "policy.adapter=sft", "policy.lora.r=4")


def test_a_reference_adapter_that_is_also_disabled_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"^reference.adapter: set together with disable_adapters"):
        load(SMALLEST, "reference.adapter=sft", "reference.disable_adapters=true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: {model: m}\nprecompute: {output: o}\n", "data: missing; it has no default"),
        ("data:\npolicy: {model: m}\nprecompute: {output: o}\n", "data.path: missing; it has no default"),
        ("data: {path: p}\npolicy: {}\nprecompute: {output: o}\n", "policy.model: missing"),
        ("data: {path: p}\npolicy: {model: m}\nprecompute: {rows_per_shard: 8}\n", "precompute.output: missing"),
    ],
)
def test_a_missing_setting_is_named(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (SMALLEST + "loss: {beta: 1, beta: 2}\n", "line 4: key 'beta' is there twice"),
        (SMALLEST + "data: {path: other}\n", "line 1: key 'data' is there twice"),
        (SMALLEST + "loss: {beta: 1\n", "not valid YAML"),
        (SMALLEST + "? [a, b]\n: c\n", "a key must be a word"),
        (SMALLEST + "train: &a {x: *a}\n", "not valid YAML"),
        (SMALLEST + "--- \nloss: {}\n", "not valid YAML"),
        pytest.param(SMALLEST + "loss: \x00\n", "not valid YAML", id="control character"),
        pytest.param("[" * 5000, "not valid YAML", id="too deep"),
        ("", "found nothing"),
        ("just words", "found 'just words'"),
        ("- data\n- policy\n", "found a list"),
    ],
)
def test_a_file_that_is_not_a_mapping_of_settings_is_refused(load: Load, tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(tmp_path / "run.yaml") in str(caught.value)
    assert found in str(caught.value)


def test_a_tag_runs_nothing(load: Load, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError):
        load(SMALLEST + f"loss: !!python/object/apply:os.system ['touch {canary}']\n")
    assert not canary.exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: can't be read \(No such file"):
        load_config(tmp_path / "missing.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("data: {path: café}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: can't be read"):
        load_config(latin)


# What is accepted, and as what.


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("loss.beta=5e-7", 5e-7),
        ("loss.beta=1e-4", 1e-4),
        ("loss.beta=1E2", 100.0),
        ("loss.beta=.5", 0.5),
        ("loss.beta='0.25'", 0.25),
        ("loss.beta=1", 1.0),
        ("data.max_length=4_096", 4096),
        ("data.max_length='512'", 512),
        ("data.max_length=1e3", 1000),
        ("data.max_length=null", None),
        ("data.max_length=", None),
        ("data.max_length=~", None),
        ("data.streaming=on", True),
        ("data.streaming=Yes", True),
        ("data.streaming=off", False),
        ("data.name=", None),
        ("data.name=null", None),
        ("data.name=off", "off"),
        ("data.name=no", "no"),
        ("data.name=2024-01-01", "2024-01-01"),
        ("data.name=1e3", "1e3"),
        ("data.path=a=b", "a=b"),
        ("policy.model=no", "no"),
        ("data.columns={prompt: question, chosen: on}", {"prompt": "question", "chosen": "on"}),
        ("policy.lora.r=4", 4),
        ("policy.lora.target_modules=[q_proj, off]", ["q_proj", "off"]),
        ("policy.lora.target_modules=all-linear", "all-linear"),
    ],
)
def test_a_scalar_is_converted_by_its_declared_type(load: Load, override: str, value: object) -> None:
    found: Any = load(SMALLEST, override)
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert (type(found), found) == (type(value), value)


def test_an_override_replaces_one_key_and_leaves_its_neighbours(load: Load) -> None:
    text = SMALLEST + "loss: {type: sigmoid, beta: 0.3}\ntrain: {output_dir: o, seed: 1}\n"
    config = load(text, "loss.beta=0.2", "train.seed=7", "train.seed=8")
    assert (config.loss.type, config.loss.beta) == ("sigmoid", 0.2)
    assert training_settings(config)["seed"] == 8
    assert training_settings(config)["output_dir"] == "o"


def test_an_override_opens_sections_that_are_not_there_or_null(load: Load) -> None:
    for text in (SMALLEST, SMALLEST.replace("{model: m}", "{model: m, lora: null}"), SMALLEST + "reference:\n"):
        config = load(text, "policy.lora.r=8", "reference.dtype=float32", "data.eval.test.split=test[:5]")
        assert config.policy.lora is not None
        assert (config.policy.lora.r, config.policy.lora.alpha) == (8, 32.0)
        assert config.reference.dtype == "float32"
        assert config.data.eval["test"].split == "test[:5]"


def test_an_empty_section_means_its_defaults(load: Load) -> None:
    config = load(SMALLEST + "loss:\nreference: null\ntrain: ~\n")
    assert as_dict(config) == DEFAULTS


# The train section, whose fields are the library's.


def test_train_fields_are_converted_by_the_librarys_types(train: Callable[[str], dict[str, Any]]) -> None:
    settings = train(
        "learning_rate: 5e-7, max_steps: 1_000, save_strategy: no, eval_strategy: 'no', bf16: off, "
        "gradient_checkpointing: yes, optim: adamw_torch, report_to: [tensorboard, wandb], save_total_limit: null, "
        "lr_scheduler_kwargs: {num_cycles: 2, power: 1e-1, name: off}, run_name: on, eval_steps: 0.25, "
        "include_num_input_tokens_seen: on"
    )
    expected = {
        "learning_rate": 5e-7,
        "max_steps": 1000,
        "save_strategy": "no",
        "eval_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": True,
        "optim": "adamw_torch",
        "report_to": ["tensorboard", "wandb"],
        "save_total_limit": None,
        "run_name": "on",
        "eval_steps": 0.25,
        "include_num_input_tokens_seen": True,
    }
    assert {key: settings[key] for key in expected} == expected
    assert settings["lr_scheduler_kwargs"] == {"num_cycles": 2, "power": 0.1, "name": False}


def test_train_defaults_are_those_of_dpo(train: Callable[[str], dict[str, Any]]) -> None:
    assert train("seed: 1") == {
        "output_dir": "o",
        "seed": 1,
        "learning_rate": 1e-6,
        "logging_steps": 10,
        "report_to": "none",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "train.learning_rte: no such field of TrainingArguments; did you mean learning_rate?"),
        ("on_mising: drop", "train.on_mising: no such field of TrainingArguments; did you mean on_missing?"),
        ("learning_rate: fast", "train.learning_rate: expected a number, found 'fast'"),
        ("max_steps: 2.5", "train.max_steps: expected a whole number, found '2.5'"),
        ("bf16: 2", "train.bf16: expected true or false, found '2'"),
        ("seed: [1]", "train.seed: expected a whole number, found a list"),
        ("on_missing: ignore", "train.on_missing: expected one of stop, drop; found 'ignore'"),
    ],
)
def test_a_wrong_train_field_is_refused(train: Callable[[str], dict[str, Any]], text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "name",
    [
        "remove_unused_columns",
        "label_names",
        "resume_from_checkpoint",
        "save_only_model",
        "enable_jit_checkpoint",
        "do_train",
        "do_predict",
        "label_smoothing_factor",
        "use_liger_kernel",
        "auto_find_batch_size",
        "neftune_noise_alpha",
    ],
)
def test_a_train_field_that_is_ours_to_set_is_refused(train: Callable[[str], dict[str, Any]], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.{name}: can't be set: "):
        train(f"{name}: true")


@pytest.mark.parametrize("value", ["", "null", "~"])
def test_training_without_an_output_folder_is_refused(load: Load, value: str) -> None:
    for text in ("train: {seed: 1}", f"train: {{output_dir: {value}}}"):
        with pytest.raises(ConfigError, match=r"^train\.output_dir: missing"):
            training_settings(load(f"{SMALLEST}{text}"))


def test_a_tilde_is_the_home_folder_in_every_path(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load(
        "data: {path: ~/p.jsonl, eval: {a: {path: ~/a.jsonl}, b: {split: test}}}\npolicy: {model: m}\n"
        "precompute: {output: ~/shards, reuse: [~/old]}\n"
    )
    assert (config.data.path, config.data.eval["a"].path) == ("/home/ada/p.jsonl", "/home/ada/a.jsonl")
    assert config.data.eval["b"].path is None
    assert (config.precompute.output, config.precompute.reuse) == ("/home/ada/shards", ["/home/ada/old"])
