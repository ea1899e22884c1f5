"""Settings: strict YAML, converted by the declared type; every refusal names the key."""

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.base.errors import ConfigError
from pipeline.config.loss import LossName
from pipeline.config.reader import as_dict, load_config, settings_text
from pipeline.config.schema import Config, Quantization
from support.processes import ROOT

# Every option that a user can write, and its default, frozen: a change here is a change of the interface.
DEFAULTS = {
    "data": {
        "path": "pairs.jsonl",
        "name": None,
        "revision": None,
        "sets": {},
        "split": "train",
        "format": None,
        "columns": {},
        "roles": None,
        "max_length": 1024,
        "streaming": False,
        "on_bad_row": "stop",
        "on_identical": "keep",
        "random_rejected": None,
        "template_date": None,
        "eval": {},
    },
    "policy": {
        "model": "m",
        "revision": None,
        "adapter": None,
        "lora": None,
        "ia3": None,
        "dtype": "float32",
        "quantization": None,
    },
    "precompute": {
        "output": "out",
        "reuse": [],
        "rows_per_shard": 1024,
        "tokens_per_batch": None,
        "token_logps": True,
        "on_nonfinite": "stop",
        "device_map": None,
        "tp_plan": None,
    },
    "reference": {
        "model": None,
        "revision": None,
        "adapter": None,
        "disable_adapters": False,
        "dtype": "auto",
        "autocast": None,
        "quantization": None,
        "declared": None,
        "sync": None,
    },
    "loss": {
        "type": "sigmoid",
        "weights": None,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "discopop_tau": 0.05,
        "dpop_lambda": None,
        "beta_dpo_alpha": None,
        "beta_dpo_filter": None,
        "r_dpo_alpha": None,
        "simpo_gamma": None,
        "cpo_alpha": None,
        "router_aux_loss_coef": None,
    },
    "cluster": {
        "workers": 1,
        "precompute": {"nodes": 1, "processes": 1, "gpus": None, "cpus": None, "memory": None, "time": None},
        "train": {"nodes": 1, "processes": 1, "gpus": None, "cpus": None, "memory": None, "time": None},
        "partition": None,
        "account": None,
        "options": [],
        "setup": None,
        "container": None,
        "grace": 120,
        "restarts": 100,
        "kubernetes": {
            "image": None,
            "namespace": None,
            "claim": None,
            "size": "100Gi",
            "storage_class": None,
            "mount": "/data",
            "secret": None,
            "node_selector": {},
        },
    },
    "train": {},
}

# Defaults of the settings that are left out by default, once they are there.
INNER_DEFAULTS: dict[str, Any] = {
    "policy.lora": {
        "r": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "modules_to_save": [],
        "rslora": False,
        "dora": False,
    },
    "policy.ia3": {"target_modules": None, "feedforward_modules": None},
    "reference.quantization": {"bits": 8, "type": "nf4", "double": False},
    "reference.sync": {"steps": 512, "mixup_alpha": 0.6},
    "data.eval.test": {"path": None, "name": None, "split": None, "columns": None, "roles": None},
}

LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm dpop beta_dpo cal_dpo r_dpo simpo cpo orpo"
)

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
    return lambda text: dict(load(f"{SMALLEST}train: {{output_dir: o, {text}}}").train.options)


def test_the_defaults_are_the_frozen_ones(load: Load) -> None:
    assert as_dict(load()) == DEFAULTS


@pytest.mark.parametrize("key", INNER_DEFAULTS)
def test_the_defaults_of_what_is_left_out_are_the_frozen_ones(load: Load, key: str) -> None:
    """An empty mapping is there, and stands for its defaults; null is not there."""
    found: Any = as_dict(load(SMALLEST, f"{key}={'{bits: 8}' if 'quantization' in key else '{}'}"))
    for name in key.split("."):
        found = found[name]
    assert found == INNER_DEFAULTS[key]


def test_the_defaults_of_our_own_train_options_are_the_frozen_ones(load: Load) -> None:
    assert dataclasses.asdict(load().train) == {
        "output_dir": None,
        "joined_dir": None,
        "on_missing": "stop",
        "on_mismatch": "stop",
        "on_nonfinite": "stop",
        "activation_offload": False,
        "given": {},
    }


def test_the_losses_are_the_frozen_ones() -> None:
    assert " ".join(typing.get_args(LossName)) == LOSSES


def test_importing_the_settings_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, pipeline.config.reader; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_saved_settings_load_as_the_same_settings(load: Load) -> None:
    config = load(
        "data: {path: p, columns: {prompt: q}, eval: {test: {split: 'test[:9]'}}}\n"
        "policy: {model: m, quantization: {bits: 4, double: on},\n"
        "  lora: {target_modules: [q_proj, v_proj], modules_to_save: [norm], dora: on}}\n"
        "precompute: {output: out}\n"
        "reference: {quantization: {bits: 8}}\n"
        "loss: {type: [sigmoid, sft], weights: [1, 5e-1], ld_alpha: .5, use_weighting: on}\n"
        "train: {output_dir: o, save_strategy: no, learning_rate: 5e-7}\n"
    )
    again = load(yaml.safe_dump(as_dict(config)))
    assert again == config
    assert again.train.options == config.train.options


# What is refused, and the key that the message starts with.


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (SMALLEST + "los: {beta: 1}\n", "", "los: unknown key; did you mean loss?"),
        (SMALLEST, "loss.betta=1", "loss.betta: unknown key; did you mean loss.beta?"),
        (SMALLEST, "policy.lora.rank=4", "policy.lora.rank: unknown key"),
        (SMALLEST, "data.eval.test.spilt=a", "data.eval.test.spilt: unknown key; did you mean data.eval.test.split?"),
        (SMALLEST, "data.columns.promt=q", "data.columns.promt: unknown column of a pair; did you mean prompt?"),
        (SMALLEST, "=1", "-o =1: must be key=value"),
        (SMALLEST, "loss.beta", "-o loss.beta: must be key=value"),
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
        ("loss.beta=high", "loss.beta: must be a number, got 'high'"),
        ("loss.beta=null", "loss.beta: must be a number, got nothing"),
        ("loss.beta=[0.1]", "loss.beta: must be a number, got a list"),
        ("loss.type=dpo", "loss.type: must be one of sigmoid, hinge, ipo, "),
        ("loss.type=[sigmoid, dpo]", "loss.type[1]: must be one of sigmoid, hinge, ipo, "),
        ("loss.type={sigmoid: 1}", "loss.type: "),
        ("loss.type=", "loss.type: must be one of sigmoid, "),
        ("loss.weights=1", "loss.weights: must be a list, got '1'"),
        ("loss.weights=[heavy]", "loss.weights[0]: must be a number, got 'heavy'"),
        ("loss.f_divergence_type=kl", "loss.f_divergence_type: must be one of reverse_kl, forward_kl, "),
        ("loss.use_weighting=2", "loss.use_weighting: must be true or false, got '2'"),
        ("loss=0.1", "loss: must be a mapping of settings, got '0.1'"),
        ("data.max_length=2.5", "data.max_length: must be a whole number, got '2.5'"),
        ("data.max_length=inf", "data.max_length: must be a whole number, got 'inf'"),
        ("data.max_length=1__0", "data.max_length: must be a whole number, got '1__0'"),
        ("data.max_length=0x10", "data.max_length: must be a whole number, got '0x10'"),
        ("data.max_length=true", "data.max_length: must be a whole number, got 'true'"),
        ("data.streaming=1", "data.streaming: must be true or false, got '1'"),
        ("data.streaming=maybe", "data.streaming: must be true or false, got 'maybe'"),
        ("data.on_bad_row=off", "data.on_bad_row: must be one of stop, skip, got 'off'"),
        ("data.path={a: b}", "data.path: must be text, got a mapping"),
        ("data.path=", "data.path: missing; it has no default. Name a file"),
        ("policy.model=null", "policy.model: must be text, got nothing"),
        ("precompute.output=", "precompute.output: must be text, got nothing"),
        ("data.split=~", "data.split: must be text, got nothing"),
        ("data.columns=prompt", "data.columns: must be a mapping, got 'prompt'"),
        ("data.template_date=28 Nov 2026", "data.template_date: must be a date as YYYY-MM-DD, got '28 Nov 2026'"),
        ("data.template_date=2026-02-30", "data.template_date: must be a date as YYYY-MM-DD, got '2026-02-30'"),
        ("data.columns={system: s}", "data.columns.system: must be set together with columns.user"),
        ("data.columns={user: q, prompt: p}", "data.columns.user: must be left out if columns.prompt is set"),
        (
            "data.roles={users: a}",
            "data.roles: must name only user, assistant, system, tool, function_call, got 'users'; did you mean",
        ),
        ("data.roles={user: a, tool: a}", "data.roles.user: must be the name of one role alone, got 'a'"),
        ("data.eval.test.roles={user: [a]}", "data.eval.test.roles.user: must be text, got a list"),
        ("data.columns.prompt=", "data.columns.prompt: must be text, got nothing"),
        ("data.eval=[test]", "data.eval: must be a mapping, got a list"),
        ("data.eval.test=[a]", "data.eval.test: must be a mapping of settings, got a list"),
        ("policy.dtype=fp32", "policy.dtype: must be one of auto, float32, bfloat16, float16, got 'fp32'"),
        ("policy.lora=yes", "policy.lora: must be a mapping of settings, got 'yes'"),
        ("policy.lora.r=many", "policy.lora.r: must be a whole number, got 'many'"),
        ("policy.lora.target_modules=[{a: b}]", "policy.lora.target_modules[0]: must be text, got a mapping"),
        ("policy.lora.modules_to_save=norm", "policy.lora.modules_to_save: must be a list, got 'norm'"),
        ("policy.ia3=on", "policy.ia3: must be a mapping of settings, got 'on'"),
        ("policy.quantization=4", "policy.quantization: must be a mapping of settings, got '4'"),
        ("policy.quantization={bits: 5}", "policy.quantization.bits: must be one of 4, 8, got '5'"),
        ("policy.quantization={bits: 4.0}", "policy.quantization.bits: must be one of 4, 8, got '4.0'"),
        ("policy.quantization={type: nf4}", "policy.quantization.bits: missing; it has no default"),
        ("reference.quantization={bits: 4, type: int4}", "reference.quantization.type: must be one of nf4, fp4"),
        ("reference.sync=512", "reference.sync: must be a mapping of settings, got '512'"),
        ("reference.sync.steps=2.5", "reference.sync.steps: must be a whole number, got '2.5'"),
        ("reference.declared=[a]", "reference.declared: must be text, got a list"),
    ],
)
def test_a_wrong_type_is_refused_with_what_was_found(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALLEST, override)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=1", "data.max_length: must be at least 2, got"),
        ("data.max_length=-5", "data.max_length: must be at least 2, got"),
        ("precompute.rows_per_shard=0", "precompute.rows_per_shard: must be at least 1, got 0"),
        ("precompute.tokens_per_batch=0", "precompute.tokens_per_batch: must be at least 1, got 0"),
        ("loss.beta=0", "loss.beta: must be a positive finite number, got "),
        ("loss.beta=-0.1", "loss.beta: must be a positive finite number, got "),
        ("loss.beta=nan", "loss.beta: must be a positive finite number, got "),
        ("loss.beta=inf", "loss.beta: must be a positive finite number, got inf"),
        ("loss.type=[]", "loss.type: must be at least one loss, got []"),
        ("loss.type=[hinge, hinge]", "loss.type: must be different losses, got 'hinge, hinge'"),
        ("loss={weights: [1, 2]}", "loss.weights: must be 1 finite numbers, one for each loss, got [1.0, 2.0]"),
        (
            "loss={type: [sigmoid, sft], weights: [1]}",
            "loss.weights: must be 2 finite numbers",
        ),
        (
            "loss={type: [sigmoid, sft], weights: []}",
            "loss.weights: must be 2 finite numbers",
        ),
        ("loss.weights=[nan]", "loss.weights: must be 1 finite numbers, one for each loss, got [nan]"),
        ("loss.label_smoothing=-0.1", "loss.label_smoothing: must be from 0 to 0.5, got"),
        ("loss.label_smoothing=0.6", "loss.label_smoothing: must be from 0 to 0.5, got"),
        ("loss.label_smoothing=nan", "loss.label_smoothing: must be from 0 to 0.5, got"),
        ("loss={type: hinge, label_smoothing: 0.1}", "loss.label_smoothing: must be 0 for hinge, got 0.1"),
        ("loss={type: robust, label_smoothing: 0.5}", "loss.label_smoothing: must be below 0.5 for robust, got 0.5"),
        ("loss.type=exo_pair", "loss.label_smoothing: must be above 0 for exo_pair, got 0.0"),
        (
            "loss={type: [sigmoid, aot], f_divergence_type: forward_kl}",
            "loss.f_divergence_type: must be reverse_kl for",
        ),
        (
            "loss.f_alpha_divergence_coef=0.7",
            "loss.f_alpha_divergence_coef: must be left out unless",
        ),
        (
            "loss={f_divergence_type: alpha_divergence, f_alpha_divergence_coef: nan}",
            "loss.f_alpha_divergence_coef: must",
        ),
        ("loss.ld_alpha=1.1", "loss.ld_alpha: must be from 0 (the common"),
        ("loss.ld_alpha=-0.1", "loss.ld_alpha: must be from 0 (the common"),
        ("loss.ld_alpha=nan", "loss.ld_alpha: must be from 0 (the common"),
        ("loss={type: aot, use_weighting: on}", "loss.use_weighting: must be false for aot"),
        ("loss={type: discopop, discopop_tau: 0}", "loss.discopop_tau: must be a positive finite number, got 0.0"),
        ("loss.discopop_tau=0.1", "loss.discopop_tau: must be left out unless discopop"),
        ("loss.router_aux_loss_coef=-1", "loss.router_aux_loss_coef: must be a finite number from 0, got"),
        ("loss.router_aux_loss_coef=inf", "loss.router_aux_loss_coef: must be a finite number from 0, got"),
        (
            "policy.ia3.feedforward_modules=[w]",
            "policy.ia3.feedforward_modules: must be set together with",
        ),
        (
            "policy={model: m, quantization: {bits: 8, type: fp4}, lora: {}}",
            "policy.quantization.bits: must be 4 with type or double, got 8",
        ),
        (
            "policy={model: m, quantization: {bits: 8, double: on}, lora: {}}",
            "policy.quantization.bits: must be 4 with type or double, got 8",
        ),
        ("policy.quantization.bits=4", "policy.quantization: must be set together with an adapter"),
        ("reference.sync.steps=0", "reference.sync.steps: must be at least 1, got 0"),
        ("reference.sync.mixup_alpha=1.5", "reference.sync.mixup_alpha: must be from 0 to 1, got"),
        ("reference.sync.mixup_alpha=nan", "reference.sync.mixup_alpha: must be from 0 to 1, got"),
        ("policy.lora.r=0", "policy.lora.r: must be at least 1, got 0"),
        ("policy.lora.alpha=0", "policy.lora.alpha: must be a positive finite number, got"),
        ("policy.lora.alpha=nan", "policy.lora.alpha: must be a positive finite number, got"),
        ("policy.lora.dropout=1", "policy.lora.dropout: must be from 0 to below 1, got"),
        ("policy.lora.dropout=nan", "policy.lora.dropout: must be from 0 to below 1, got"),
        ("data.eval.train.split=a", "data.eval.train: must be named by letters, digits, - and _"),
        ("data.eval.costs.split=a", "data.eval.costs: must be named by letters, digits, - and _"),
        ("data.eval={../up: {split: a}}", "data.eval.../up: must be named by letters, digits, - and _"),
        ("data.eval={'': {split: a}}", "data.eval.: must be named by letters, digits, - and _"),
    ],
)
def test_an_impossible_value_is_refused(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALLEST, override)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.adapter=sft", "policy.lora.r=4"], "policy.lora: must be left out if adapter is set"),
        (["policy.adapter=sft", "policy.ia3={}"], "policy.ia3: must be left out if adapter is set"),
        (["policy.lora={}", "policy.ia3={}"], "policy.ia3: must be left out if lora is set"),
        (["policy.lora={}", "policy.ia3={}", "policy.adapter=sft"], "policy.lora: must be left out if adapter is set"),
        (["reference.declared=gpt", "reference.model=m"], "reference.model: must be left out if declared is set"),
        (
            ["reference.declared=gpt", "reference.revision=v1"],
            "reference.revision: must be left out if declared",
        ),
        (["reference.declared=gpt", "reference.adapter=sft"], "reference.adapter: must be left out if declared is set"),
        (
            ["reference.declared=gpt", "reference.quantization.bits=4"],
            "reference.quantization: must be left out",
        ),
        (["reference.declared=gpt", "reference.sync={}"], "reference.sync: must be left out if declared is set"),
        (
            ["reference.sync={}", "reference.quantization.bits=4"],
            "reference.quantization: must be left out if sync",
        ),
        (
            ["reference.sync={}", "policy.lora={}", "policy.quantization.bits=4"],
            "policy.quantization: must be left out if reference.sync is set",
        ),
        (
            ["reference.sync={}", "train.load_best_model_at_end=true"],
            "train.load_best_model_at_end: must be left out",
        ),
        (["reference.sync={}", "train.push_to_hub=on"], "train.push_to_hub: must be left out if reference.sync is set"),
        (
            ["reference.sync={}", "train.on_missing=drop"],
            "train.on_missing: must be stop with reference.sync, got 'drop'",
        ),
        (
            ["reference.sync={}", "train.on_nonfinite=continue"],
            "train.on_nonfinite: must be stop with reference.sync, got 'continue'",
        ),
        (
            ["loss.ld_alpha=0.5", "precompute.token_logps=off"],
            "loss.ld_alpha: must be left out without token",
        ),
        (["loss.ld_alpha=1", "precompute.token_logps=off"], "loss.ld_alpha: must be left out without token"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(load: Load, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALLEST, *overrides)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["reference.sync={}", "policy.lora={}", "train.load_best_model_at_end=off", "train.on_missing=stop"],
        ["reference.sync={}", "reference.model=other", "reference.adapter=sft"],
        ["policy.quantization.bits=4", "policy.adapter=sft", "reference.model=other"],
        ["policy.quantization={bits: 4, type: fp4, double: on}", "policy.ia3={}"],
        ["reference.quantization.bits=8"],
        ["reference.declared=somebody's model", "policy.lora={}", "policy.quantization.bits=8"],
        ["policy.ia3={target_modules: [k_proj, down_proj], feedforward_modules: [down_proj]}"],
        ["loss={type: [sigmoid, exo_pair, robust], label_smoothing: 0.1, weights: [1, 0, -1]}"],
        ["loss={f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 0.3, ld_alpha: 0}"],
        ["loss={type: [discopop, apo_zero], discopop_tau: 0.1, router_aux_loss_coef: 0, use_weighting: on}"],
        ["precompute.token_logps=off"],
    ],
)
def test_settings_that_go_together_are_taken(load: Load, overrides: list[str]) -> None:
    config = load(SMALLEST, *overrides)
    assert load(yaml.safe_dump(as_dict(config))) == config


def test_a_policy_has_an_adapter_if_it_continues_or_starts_one(load: Load) -> None:
    assert not load().policy.has_adapter
    for override in ("policy.adapter=sft", "policy.lora={}", "policy.ia3={}"):
        assert load(SMALLEST, override).policy.has_adapter


def test_one_loss_and_a_list_of_one_are_the_same(load: Load) -> None:
    one, listed = load(SMALLEST, "loss.type=hinge").loss, load(SMALLEST, "loss.type=[hinge]").loss
    assert one.types == listed.types == ["hinge"]
    assert one.weights_of_types == listed.weights_of_types == [1.0]
    assert load(SMALLEST, "loss={type: [hinge, sft], weights: [2, 5e-1]}").loss.weights_of_types == [2.0, 0.5]


def test_a_reference_adapter_that_is_also_disabled_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"^reference.adapter: must be left out if disable_adapters"):
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
        (SMALLEST + "loss: {beta: 1, beta: 2}\n", "line 4: key 'beta' is repeated"),
        (SMALLEST + "data: {path: other}\n", "line 4: key 'data' is repeated"),
        (SMALLEST + "loss: {beta: 1\n", "not valid YAML"),
        (SMALLEST + "? [a, b]\n: c\n", "a key must be a word"),
        (SMALLEST + "train: &a {x: *a}\n", "not valid YAML"),
        (SMALLEST + "--- \nloss: {}\n", "not valid YAML"),
        pytest.param(SMALLEST + "loss: \x00\n", "not valid YAML", id="control character"),
        pytest.param("[" * 5000, "not valid YAML", id="too deep"),
        ("", "got nothing"),
        ("just words", "got 'just words'"),
        ("- data\n- policy\n", "got a list"),
    ],
)
def test_a_file_that_is_not_a_mapping_of_settings_is_refused(load: Load, tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(tmp_path / "run.yaml") in str(caught.value)
    assert found in str(caught.value)


def test_a_mapping_means_what_its_file_means(tmp_path: Path) -> None:
    settings = {
        "data": {"path": tmp_path / "pairs.jsonl", "max_length": None, "streaming": False, "split": "on"},
        "policy": {"model": "m", "lora": {"r": 4, "target_modules": ("q_proj", "v_proj")}},
        "precompute": {"output": "out"},
        "loss": {"type": ["sigmoid", "sft"], "weights": [1, 0.5], "beta": np.float64(0.3)},
        "train": {"output_dir": "p", "learning_rate": 5e-7, "save_strategy": "no", "bf16": True, "max_steps": 3},
    }
    config = load_config(settings, ["loss.beta=0.2"])
    assert config.data.path == str(tmp_path / "pairs.jsonl") and config.data.max_length is None
    assert config.data.split == "on" and config.policy.lora.target_modules == ["q_proj", "v_proj"]
    assert (config.loss.beta, config.loss.weights, config.train.given["save_strategy"]) == (0.2, [1.0, 0.5], "no")
    assert load_config(settings).loss.beta == 0.3
    file = tmp_path / "run.yaml"
    file.write_text(settings_text(config))
    assert load_config(file) == config
    assert config.train.options["learning_rate"] == 5e-7 and config.train.options["bf16"] is True
    with pytest.raises(ConfigError, match=r"^loss\.beta: must be"):
        load_config({**settings, "loss": {"beta": "much"}})
    with pytest.raises(ConfigError, match=r"^config: must hold text, numbers, lists and mappings, got .*object"):
        load_config({**settings, "loss": object()})


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
        ("policy.lora.modules_to_save=[norm, off]", ["norm", "off"]),
        ("policy.lora.dora=on", True),
        ("loss.type=[sigmoid]", ["sigmoid"]),
        ("loss.type=ipo", "ipo"),
        ("loss.weights=[5e-1]", [0.5]),
        ("loss.weights=null", None),
        ("loss.ld_alpha=0", 0.0),
        ("loss.ld_alpha=", None),
        ("loss.router_aux_loss_coef=1e-3", 0.001),
        ("reference.quantization={bits: 8}", Quantization(bits=8)),
        ("reference.quantization={bits: '4'}", Quantization(bits=4)),
        ("reference.quantization=null", None),
        ("reference.sync.steps=1e3", 1000),
        ("reference.sync.mixup_alpha=1", 1.0),
        ("reference.sync=null", None),
        ("reference.declared=off", "off"),
        ("reference.declared=", None),
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
    assert config.train.options["seed"] == 8
    assert config.train.folder == Path("o")


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


def test_saved_settings_have_numbers_as_numbers_booleans_as_booleans_and_words_as_words(load: Load) -> None:
    train = {"max_steps": 12, "use_cpu": True, "learning_rate": 0.5, "save_strategy": "no", "report_to": ["none"]}
    train |= {"bf16": False, "gradient_checkpointing": True}
    train |= {"run_name": "2024-01-01", "save_total_limit": "null", "fsdp_config": {"version": 2}, "warmup_steps": 1e-3}
    config = load(
        SMALLEST + "train: {output_dir: '7', max_steps: '12', use_cpu: 'true', learning_rate: '.5', save_strategy: no, "
        "report_to: [none], run_name: 2024-01-01, save_total_limit: null, fsdp_config: {version: 2}, "
        "warmup_steps: 1.0e-3, bf16: 'off', gradient_checkpointing: 'yes'}\n"
    )
    text = settings_text(config)
    assert yaml.safe_load(text)["train"] == {"output_dir": 7, **train}
    assert load(text) == config


# The train section, whose fields are the library's.


def test_train_fields_are_converted_by_the_librarys_types(train: Callable[[str], dict[str, Any]]) -> None:
    settings = train(
        "learning_rate: 5e-7, max_steps: 1_000, save_strategy: no, eval_strategy: 'no', bf16: off, "
        "gradient_checkpointing: yes, optim: adamw_torch, report_to: [tensorboard, wandb], save_total_limit: null, "
        "lr_scheduler_kwargs: {num_cycles: 2, power: 1e-1, name: off}, run_name: on, eval_steps: 0.25, "
        "average_tokens_across_devices: on"
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
        "average_tokens_across_devices": True,
    }
    assert {key: settings[key] for key in expected} == expected
    assert settings["lr_scheduler_kwargs"] == {"num_cycles": 2, "power": 0.1, "name": False}


def test_train_defaults_are_those_of_dpo(train: Callable[[str], dict[str, Any]]) -> None:
    assert train("seed: 1") == {
        "seed": 1,
        "learning_rate": 1e-6,
        "logging_steps": 10,
        "report_to": "none",
        "ddp_timeout": 21600,
        "logging_nan_inf_filter": False,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rte: 1",
            "train.learning_rte: no such field of TrainingArguments; did you mean train.learning_rate?",
        ),
        ("on_mising: drop", "train.on_mising: no such field of TrainingArguments; did you mean train.on_missing?"),
        ("learning_rate: fast", "train.learning_rate: must be a number, got 'fast'"),
        ("max_steps: 2.5", "train.max_steps: must be a whole number, got '2.5'"),
        ("bf16: 2", "train.bf16: must be true or false, got '2'"),
        ("seed: [1]", "train.seed: must be a whole number, got a list"),
        ("on_missing: ignore", "train.on_missing: must be one of stop, drop, got 'ignore'"),
        ("on_mismatch: drop", "train.on_mismatch: must be one of stop, warn, got 'drop'"),
        ("on_nonfinite: go", "train.on_nonfinite: must be one of stop, continue, got 'go'"),
        ("hub_token: hf_x", "train.hub_token: must not be in the settings, which are saved. Set HF_TOKEN instead"),
        ("activation_offload: some", "train.activation_offload: "),
        ("on_mismtch: warn", "train.on_mismtch: no such field of TrainingArguments; did you mean train.on_mismatch?"),
        (
            "xyz: 1",
            "train.xyz: no such field of TrainingArguments; "
            "known: output_dir, joined_dir, on_missing, on_mismatch, on_nonfinite",
        ),
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
            _ = load(f"{SMALLEST}{text}").train.folder


def test_a_tilde_is_the_home_folder_in_every_path(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load(
        "data: {path: ~/p.jsonl, eval: {a: {path: ~/a.jsonl}, b: {split: test}}}\npolicy: {model: m}\n"
        "precompute: {output: ~/shards, reuse: [~/old]}\n"
    )
    assert (config.data.path, config.data.eval["a"].path) == ("/home/ada/p.jsonl", "/home/ada/a.jsonl")
    assert config.data.eval["b"].path is None
    assert (config.precompute.output, config.precompute.reuse) == ("/home/ada/shards", ["/home/ada/old"])
