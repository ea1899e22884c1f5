"""What enters the identity, what does not, and how a mismatch is told."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.models.files import load_tokenizer
from pipeline.models.identity import (
    PolicyReferenceRelation,
    differences,
    fingerprint_of,
    identity_of_run,
    policy_reference_relation,
    remedy,
)
from support.models import make_model, make_tokenizer
from support.tally import tally


@pytest.fixture
def config_file(tmp_path: Path, model_folder: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {{path: pairs.jsonl}}\npolicy: {{model: {model_folder}}}\nprecompute: {{output: shards}}\n"
        f"train: {{output_dir: policy}}\n"
    )
    return file


def identity(file: Path, *overrides: str) -> dict[str, Any]:
    config: Config = load_config(file, overrides)
    return identity_of_run(config, load_tokenizer(config))


@pytest.mark.parametrize(
    "override",
    [
        "loss.beta=0.5",
        "train.learning_rate=1e-3",
        "train.seed=7",
        "train.output_dir=elsewhere",
        "policy.lora={r: 64}",
        "precompute.output=elsewhere",
        "precompute.tokens_per_batch=99",
        "precompute.rows_per_shard=99",
        "data.path=other.jsonl",
        "data.split=train[5:]",
        "reference.dtype=float32",
        "policy.lora={dora: on}",
        "policy.ia3={}",
        "loss={type: [sigmoid, sft], weights: [1, 0.5], ld_alpha: 0.5, use_weighting: on}",
        "reference.sync={steps: 8}",
        "reference.quantization=null",
    ],
)
def test_what_no_log_prob_depends_on_leaves_the_fingerprint(config_file: Path, override: str) -> None:
    assert fingerprint_of(identity(config_file, override)) == fingerprint_of(identity(config_file))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.max_length=77", "tokenization.max_length"),
        ("data.max_length=null", "tokenization.max_length"),
        ("reference.dtype=bfloat16", "reference.dtype"),
        ("policy.dtype=bfloat16", "reference.dtype"),
        ("train.bf16=true", "reference.autocast"),
        ("train.fp16=true", "reference.autocast"),
        ("reference.autocast=bfloat16", "reference.autocast"),
        ("precompute.token_logps=false", "tokenization.token_logps"),
        ("reference.quantization.bits=8", "reference.quantization"),
        ("reference.quantization={bits: 4, double: on}", "reference.quantization"),
    ],
)
def test_what_a_log_prob_depends_on_changes_it_by_name(config_file: Path, override: str, field: str) -> None:
    a, b = identity(config_file), identity(config_file, override)
    assert fingerprint_of(a) != fingerprint_of(b)
    (found,) = differences(a, b, joining=False)
    assert found.startswith(f"{field}: ")


def test_a_store_without_the_autocast_field_counts_as_without_autocast(config_file: Path) -> None:
    """Stores from before it was recorded keep their fingerprint, so they are continued and resumed."""
    plain = identity(config_file)
    assert "autocast" not in plain["reference"]
    under = identity(config_file, "train.bf16=true")
    assert under["reference"]["autocast"] == "bfloat16"
    assert differences(plain, under, joining=True) == ["reference.autocast: shards none, this run bfloat16"]


def test_the_settings_that_a_refusal_names_make_the_run_use_the_store(config_file: Path) -> None:
    """A store that an earlier `auto` scored in the checkpoint's bfloat16, and one that was scored under autocast."""
    for scored, this_run in (
        (["reference.dtype=bfloat16"], []),
        (["reference.dtype=bfloat16"], ["train.bf16=true"]),
        (["train.bf16=true"], []),
    ):
        stored = identity(config_file, *scored)
        named = re.findall(r"(reference\.\w+): (\w+)", remedy(stored, identity(config_file, *this_run)))
        assert named
        assert identity(config_file, *this_run, *("=".join(pair) for pair in named)) == stored


def test_a_refusal_names_no_settings_that_the_gate_would_refuse(config_file: Path) -> None:
    plain = identity(config_file)
    assert remedy(plain, identity(config_file, "train.bf16=true")) == ""
    assert remedy(plain, plain) == ""
    other = {**identity(config_file, "reference.dtype=bfloat16")}
    other["reference"] = {**other["reference"], "weights": "0" * 64}
    assert remedy(other, plain) == ""


def test_each_way_of_quantizing_is_another_reference(config_file: Path) -> None:
    ways = ["{bits: 4}", "{bits: 8}", "{bits: 4, type: fp4}", "{bits: 4, double: on}", "null"]
    found = [identity(config_file, f"reference.quantization={way}") for way in ways]
    assert len({fingerprint_of(one) for one in found}) == len(ways)
    assert found[0]["reference"]["quantization"] == {"bits": 4, "type": "nf4", "double": False}
    (told,) = differences(found[0], found[3], joining=True)
    assert told.startswith("reference.quantization.double: shards False, this run True")


def test_the_policys_quantization_counts_only_where_the_reference_is_the_policy(
    config_file: Path, model_folder: Path
) -> None:
    quantized = ["policy.lora={}", "policy.quantization.bits=4"]
    named = f"reference.model={model_folder}"
    plain, inherited = identity(config_file), identity(config_file, *quantized)
    assert inherited["reference"]["quantization"] == {"bits": 4, "type": "nf4", "double": False}
    assert inherited != plain
    # Said once for both models, or for the reference alone: the same reference.
    assert inherited == identity(config_file, "reference.quantization.bits=4")
    assert inherited == identity(config_file, named, "reference.quantization.bits=4")
    assert identity(config_file, *quantized, named) == identity(config_file, named) == plain
    own = identity(config_file, *quantized, "reference.quantization.bits=8")
    assert own["reference"]["quantization"]["bits"] == 8


def test_a_declared_reference_is_its_name_alone(config_file: Path) -> None:
    declared = identity(config_file, "reference.declared=somebody's model")
    assert declared["reference"] == {"declared": "somebody's model"}
    assert declared["tokenization"] == identity(config_file)["tokenization"]
    # What the policy is or becomes has no part in it.
    for override in ("policy.lora={}", "policy.dtype=bfloat16", "loss.beta=0.5"):
        assert identity(config_file, "reference.declared=somebody's model", override) == declared
    (told,) = differences(declared, identity(config_file, "reference.declared=another"), joining=True)
    assert told == "reference.declared: shards somebody's model, this run another"
    fields = [told.partition(":")[0] for told in differences(declared, identity(config_file), joining=True)]
    assert {"reference.declared", "reference.weights"} <= set(fields)


def test_a_moved_or_copied_model_is_the_same_and_one_changed_weight_is_not(
    config_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    override = f"policy.model={copy}"
    assert identity(config_file, override) == identity(config_file)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert [
        d.split(":")[0] for d in differences(identity(config_file), identity(config_file, override), joining=True)
    ] == ["reference.weights"]


def test_a_config_field_of_the_forward_pass_counts_and_one_of_bookkeeping_does_not(
    config_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    content = json.loads((copy / "config.json").read_text())
    override = f"policy.model={copy}"
    (copy / "config.json").write_text(json.dumps({**content, "transformers_version": "9.9", "use_cache": False}))
    assert identity(config_file, override) == identity(config_file)
    (copy / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 1e-3}))
    assert identity(config_file, override)["reference"]["config"] != identity(config_file)["reference"]["config"]


@pytest.fixture
def adapter_folder(model_folder: Path, tmp_path: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_relation_tells_where_policy_and_reference_must_agree(
    config_file: Path, model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    def told(*overrides: str) -> PolicyReferenceRelation:
        return policy_reference_relation(load_config(config_file, overrides))

    other = make_model(tmp_path / "other", make_tokenizer(bos=True), seed=1)
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    continued = f"policy.adapter={adapter_folder}"
    assert told() == told(f"reference.model={copy}") == PolicyReferenceRelation(True, False, None)
    assert told("reference.dtype=bfloat16") == PolicyReferenceRelation(True, False, None)
    assert told("policy.lora={}") == PolicyReferenceRelation(True, True, None)
    assert told(continued) == PolicyReferenceRelation(True, False, adapter_folder)
    assert told(continued, "reference.disable_adapters=on") == PolicyReferenceRelation(False, True, None)
    assert told(continued, f"reference.model={copy}") == PolicyReferenceRelation(False, True, None)
    assert told(f"reference.adapter={adapter_folder}") == PolicyReferenceRelation(False, False, None)
    assert told(f"reference.model={other}", "policy.lora={}") == PolicyReferenceRelation(False, False, None)
    assert told("reference.quantization.bits=8", "policy.lora={}") == PolicyReferenceRelation(False, False, None)
    assert told("policy.quantization.bits=8", "policy.lora={}") == PolicyReferenceRelation(True, True, None)
    assert told("reference.declared=somebody's model", "policy.lora={}") == PolicyReferenceRelation(False, False, None)


def test_padding_or_truncating_with_the_tokenizer_does_not_change_it(config_file: Path) -> None:
    config = load_config(config_file)
    tokenizer: Any = load_tokenizer(config)
    before = identity_of_run(config, tokenizer)
    tokenizer(["a", "a b c d e"], padding=True, truncation=True, max_length=2)
    assert identity_of_run(config, tokenizer) == before


def test_another_vocabulary_template_or_special_token_changes_the_tokenization(
    config_file: Path, tmp_path: Path
) -> None:
    base = identity(config_file)["tokenization"]
    changed = {
        "tokenizer": make_tokenizer(bos=False),
        "chat_template": make_tokenizer(bos=True, template="{{ messages[0].content }}"),
    }
    for field, tokenizer in changed.items():
        folder = make_model(tmp_path / field, tokenizer)
        assert identity(config_file, f"policy.model={folder}")["tokenization"][field] != base[field]


def test_named_templates_are_the_same_in_whatever_order_the_disk_lists_them(config_file: Path) -> None:
    """The library reads `additional_chat_templates` in the file system's order, which a copy changes."""
    config, named = load_config(config_file), {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "rag": "{{ 3 }}"}
    prints = set()
    for names in (named, reversed(named)):
        tokenizer = load_tokenizer(config)
        tokenizer.chat_template = {name: named[name] for name in names}  # type: ignore[assignment]
        prints.add(fingerprint_of(identity_of_run(config, tokenizer)))
    assert len(prints) == 1
    tally("named chat templates that a copy lists in another order", 1, outcome="served, the same fingerprint")


def test_a_padding_token_counts_where_it_takes_a_position_out_of_a_table(config_file: Path, tmp_path: Path) -> None:
    """XGLM's sines are zero in the row of the padding token's id."""
    sizes = {"vocab_size": 400, "d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 48, "init_std": 0.2}
    model = transformers.XGLMForCausalLM(transformers.XGLMConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "xglm")
    make_tokenizer().save_pretrained(tmp_path / "xglm")
    file, ids = tmp_path / "xglm/config.json", torch.arange(3, 40)[None]
    found: dict[Any, tuple[str, Any]] = {}
    for padding in (None, 0, 1, 2, 7):
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": padding}))
        fingerprint = json.dumps(identity(config_file, f"policy.model={file.parent}")["reference"])
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent)
        found[padding] = fingerprint, loaded(input_ids=ids).logits.detach()
    for one, other in itertools.combinations(found.values(), 2):
        assert (one[0] == other[0]) == torch.equal(one[1], other[1])
    assert len({fingerprint for fingerprint, _ in found.values()}) == 3
    tally("a padding token that decides a position", 2, outcome="78 in both stages, the field named")


def test_a_longer_stored_cut_serves_a_shorter_run_only_where_token_logps_are_stored(config_file: Path) -> None:
    def told(stored: str, run: str, token_logps: str = "true") -> list[str]:
        keep = f"precompute.token_logps={token_logps}"
        return differences(
            identity(config_file, f"data.max_length={stored}", keep),
            identity(config_file, f"data.max_length={run}"),
            joining=True,
        )

    assert told("512", "128") == []
    assert told("null", "128") == []
    assert told("512", "512", "false") == []
    assert "cut shorter" in told("128", "512")[0]
    assert "cut shorter" in told("128", "null")[0]
    assert "no token logps" in told("512", "128", "false")[0]
