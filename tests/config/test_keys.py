"""The list of settings: complete, with the defaults that a file gets, and with what a change really needs."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.keys import CHANGES, REQUIRED, settings
from pipeline.config.reader import as_dict, load_config
from pipeline.config.schema import Config
from pipeline.data.sources import open_source
from pipeline.models.identity import differences, identity_of_run
from pipeline.run.identity import identity_of_training, run_identity
from pipeline.store.plan import plan_of
from support.runs import simple_rows, write_jsonl

LISTED = {setting.key: setting for setting in settings()}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def test_the_list_has_every_key_of_a_file_with_its_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: p}\npolicy: {model: m}\nprecompute: {output: o}\ntrain: {output_dir: t}\n")
    for optional in ("policy.lora", "policy.ia3", "policy.quantization", "reference.quantization", "reference.sync"):
        assert LISTED[optional].default is None
    whole = {
        **flat(as_dict(load_config(file, ["policy.lora.r=16", "data.eval.NAME.split="]))),
        **flat(as_dict(load_config(file, ["policy.lora.r=16", "policy.quantization.bits=4"]))),
        **flat(as_dict(load_config(file, ["policy.ia3.target_modules=", "reference.quantization.bits=4"]))),
        **flat(as_dict(load_config(file, ["reference.sync.steps=512"]))),
        **flat(as_dict(load_config(file, ["data.path=", "data.sets.NAME.path=p"]))),
        **{f"train.{key}": value for key, value in dataclasses.asdict(load_config(file).train).items()},
    }
    del whole["train.given"]
    keys = {key: setting for key, setting in LISTED.items() if setting.section is None}
    sections = {key for key, setting in LISTED.items() if setting.section is not None}
    assert whole.keys() - sections == keys.keys()
    given = {key: setting for key, setting in keys.items() if setting.default is not REQUIRED}
    assert {key: whole[key] for key in given if key != "train.output_dir"} == {
        key: setting.default for key, setting in given.items() if key != "train.output_dir"
    }
    assert sorted(key for key in keys if key not in given) == [
        "data.sets.NAME.path", "policy.model", "policy.quantization.bits", "precompute.output",
        "reference.quantization.bits",
    ]  # fmt: skip


@pytest.mark.parametrize("key", LISTED)
def test_a_setting_says_in_a_sentence_what_it_means(key: str) -> None:
    meaning = LISTED[key].meaning
    assert meaning.endswith((".", "...")) and "\n" not in meaning


# A key with a value other than that of the settings below, and other keys that this value needs.
CHANGED = {
    "data.path": ["data.path={folder}/other.jsonl"],
    "data.split": ["data.split=train[:5]"],
    "data.format": ["data.format=jsonl"],
    "data.columns": ["data.columns={{tools: other}}"],
    "data.roles": ["data.roles={{user: customer}}"],
    "data.max_length": ["data.max_length=512"],
    "data.streaming": ["data.streaming=true"],
    "data.on_bad_row": ["data.on_bad_row=skip"],
    "data.random_rejected": ["data.random_rejected=7"],
    "data.on_identical": ["data.on_identical=drop"],
    "policy.lora.r": ["policy.lora.r=8"],
    "policy.lora.target_modules": ["policy.lora.target_modules=[q_proj]"],
    "policy.dtype": ["policy.dtype=bfloat16"],
    "policy.quantization.bits": ["policy.quantization.bits=4"],
    "precompute.output": ["precompute.output=other"],
    "precompute.rows_per_shard": ["precompute.rows_per_shard=2"],
    "precompute.tokens_per_batch": ["precompute.tokens_per_batch=999"],
    "precompute.token_logps": ["precompute.token_logps=false"],
    "precompute.on_nonfinite": ["precompute.on_nonfinite=drop"],
    "precompute.device_map": ["precompute.device_map=auto"],
    "precompute.tp_plan": ["precompute.tp_plan=auto"],
    "reference.dtype": ["reference.dtype=float16"],
    "reference.quantization.bits": ["reference.quantization.bits=4"],
    "reference.declared": ["reference.declared=judge"],
    "reference.sync": ["reference.sync.steps=4"],
    "loss.type": ["loss.type=ipo"],
    "loss.weights": ["loss.weights=[2.0]"],
    "loss.beta": ["loss.beta=0.3"],
    "loss.ld_alpha": ["loss.ld_alpha=0.5"],
    "cluster.workers": ["cluster.workers=9"],
    "cluster.train.memory": ["cluster.train.memory=9G"],
    "cluster.kubernetes.image": ["cluster.kubernetes.image=a"],
    "train.output_dir": ["train.output_dir=other"],
    "train.on_missing": ["train.on_missing=drop"],
    "train.on_mismatch": ["train.on_mismatch=warn"],
    "train.on_nonfinite": ["train.on_nonfinite=continue"],
    "train.activation_offload": ["train.activation_offload=true"],
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGED)
def test_a_change_needs_what_the_list_says(
    key: str, make_run: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    file = make_run(policy={"lora": {}})
    write_jsonl(tmp_path / "other.jsonl", simple_rows(9))
    old, new = (
        _asked_of(load_config(file, overrides), tokenizer)
        for overrides in ([], [text.format(folder=tmp_path) for text in CHANGED[key]])
    )
    same_log_probs = not differences(old["identity"], new["identity"], joining=True)
    same_store = old["identity"] == new["identity"] and old["plan"] == new["plan"]
    same_run = old["run"] == new["run"]
    needed = {
        (True, True, True): ("free", "jobs"),
        (True, True, False): ("run",),
        (True, False, True): ("store",),
        (True, False, False): ("pairs",),
        (False, False, False): ("shards",),
        (False, False, True): ("shards",),
    }[same_log_probs, same_store, same_run]
    assert LISTED[key].change in needed and LISTED[key].change in CHANGES


def _asked_of(config: Config, tokenizer: Any) -> dict[str, Any]:
    """Give what a store, its plan and a run compare with those that are there."""
    identity = identity_of_run(config, tokenizer)
    nothing = SimpleNamespace(stores=[])
    return {
        "identity": identity,
        "plan": plan_of(config, open_source(config.data), nothing, None),  # type: ignore[arg-type]
        "run": run_identity(config, {}, 1, identity_of_training(config)),
    }
