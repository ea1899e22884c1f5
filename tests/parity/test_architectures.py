"""Families of models through both commands: stored numbers are the model's own, or the model is refused by name.

The models are tiny and random, and known to transformers under the names of the real ones. What is equal here is
the code path: masks, windows, caps, scales, state spaces and experts, in the reference and in the policy.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.config.reader import load_config
from pipeline.data.intake import KeptPair
from support import models
from support.runs import kept, logged_steps, refshard, simple_rows
from support.stores import stored_rows

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]

TOKENIZER = models.make_tokenizer(bos=True)

IDS = {
    "vocab_size": len(TOKENIZER),
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}
# Sharp enough that log-probs differ by nats, and that windows, caps and scales are felt.
SHARP = {"initializer_range": 0.2}
SMALL = {**models.SMALL, **IDS, **SHARP, "max_position_embeddings": 256}
GROUPED = {**SMALL, "num_key_value_heads": 2}
# Where the family would take another width of a head than hidden_size / num_attention_heads.
WITH_HEAD = {**GROUPED, "head_dim": 8}
WINDOW = {"sliding_window": 6}
ALTERNATING = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
STATES = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}


@dataclass(frozen=True)
class Family:
    """A causal language model: its class's name before ForCausalLM, and the settings of its config."""

    name: str
    settings: Mapping[str, Any]
    model_class: str = ""
    config_class: str = ""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Settings that switch off what the family is here for; with them the numbers must differ"""
    has_balance: bool = False
    """A mixture of experts whose router is kept in balance"""

    def make(self) -> Any:
        config = getattr(transformers, self.config_class or f"{self.name}Config")(**self.settings)
        transformers.set_seed(0)
        return getattr(transformers, self.model_class or f"{self.name}ForCausalLM")(config)


NO_WINDOW = {"sliding_window": 256}
NO_CAPS = {"final_logit_softcapping": None}

FAMILIES = {
    "llama": Family("Llama", GROUPED),
    "llama, tied": Family("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": Family("Qwen2", GROUPED),
    "qwen3": Family("Qwen3", WITH_HEAD),
    "mistral, window": Family("Mistral", {**GROUPED, **WINDOW}, neutral=NO_WINDOW),
    "gemma2, window": Family(
        "Gemma2", {**WITH_HEAD, **WINDOW, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING}, neutral=NO_WINDOW
    ),
    "gemma2, softcap": Family(
        "Gemma2",
        {**WITH_HEAD, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
        neutral=NO_CAPS,
    ),
    "gemma3, window": Family(
        "Gemma3",
        {**WITH_HEAD, **WINDOW, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
        config_class="Gemma3TextConfig",
        neutral=NO_WINDOW,
    ),
    "gemma3, softcap": Family(
        "Gemma3",
        {**WITH_HEAD, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "layer_types": ALTERNATING},
        config_class="Gemma3TextConfig",
        neutral=NO_CAPS,
    ),
    "phi3, window": Family("Phi3", {**GROUPED, **WINDOW}, neutral=NO_WINDOW),
    "gpt2": Family(
        "GPT2",
        {**IDS, **SHARP, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        model_class="GPT2LMHeadModel",
    ),
    "gpt-neox": Family("GPTNeoX", SMALL),
    "olmo2": Family("Olmo2", GROUPED),
    "granite": Family("Granite", {**GROUPED, "logits_scaling": 4.0}, neutral={"logits_scaling": 1.0}),
    "cohere": Family("Cohere", {**GROUPED, "logit_scale": 0.25}, neutral={"logit_scale": 1.0}),
    "mixtral": Family("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, has_balance=True),
    "qwen3-moe": Family("Qwen3Moe", {**WITH_HEAD, **EXPERTS}, has_balance=True),
    "qwen3-moe, no layer of experts": Family("Qwen3Moe", {**WITH_HEAD, **EXPERTS, "mlp_only_layers": [0, 1]}),
    "mamba": Family("Mamba", {**IDS, **SHARP, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
    "falcon-h1, attention beside a state space": Family(
        "FalconH1",
        {
            **WITH_HEAD,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "lm_head_multiplier": 0.5,
        },
        neutral={"lm_head_multiplier": 1.0},
    ),
    "jamba, layers in turn and experts": Family(
        "Jamba",
        {**GROUPED, **JAMBA, **STATES, "num_experts": 4, "num_experts_per_tok": 2},
        has_balance=True,
    ),
    "jamba, one expert": Family("Jamba", {**GROUPED, **JAMBA, **STATES, "num_experts": 1, "num_experts_per_tok": 1}),
}


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def plain_token_logps(folder: Path, pairs: list[KeptPair], **changes: Any) -> dict[tuple[bytes, str], list[float]]:
    """Log-softmax over the model's own logits in float64, each completion by itself, without padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes).double().eval()
    if "experts" in {name.rpartition(".")[2] for name, _ in model.named_modules()}:
        # The grouped product of all experts at once takes no float64.
        model.set_experts_implementation("eager")
    found = {}
    for pair in pairs:
        prompt = pair.pair.prompt_ids
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*prompt, *getattr(pair.pair, f"{side}_ids")]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            logps = torch.log_softmax(logits[0, :-1].double(), dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)
            found[pair.key, side] = logps[len(prompt) - 1 :].tolist()
    return found


def stored_token_logps(store: Path) -> dict[tuple[bytes, str], list[float]]:
    rows = stored_rows(store)
    return {(row["pair_key"], side): row[f"{side}_token_logps"] for row in rows for side in ("chosen", "rejected")}


def largest_gap(one: Mapping[Any, list[float]], other: Mapping[Any, list[float]]) -> float:
    assert one.keys() == other.keys()
    return max(abs(a - b) for key in one for a, b in zip(one[key], other[key], strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_stages_serve_the_family(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    folder = save(family.make(), tmp_path / "model")
    train = {"max_steps": 4, "learning_rate": "1e-2"}
    config = make_run(rows=simple_rows(12), policy={"model": str(folder)}, train=train)
    refshard("precompute", "--config", config)

    pairs = kept(load_config(config))
    stored, plain = stored_token_logps(tmp_path / "shards" / "train"), plain_token_logps(folder, pairs)
    # Float32 carries 7 digits, and logits here stay below 30; two layers of sums in another order and in batches
    # with padding cost a few units of the last digit, found to be up to 1e-5. What the tolerance must tell apart
    # (a window, a cap, a scale, a padded neighbour that is seen) moves log-probs by more than 1e-2.
    assert largest_gap(stored, plain) < 1e-4
    if family.neutral:
        window = family.settings.get("sliding_window", 0)
        assert all(len(p.pair.prompt_ids) + len(p.pair.chosen_ids) > window + 2 for p in pairs)
        assert largest_gap(stored, plain_token_logps(folder, pairs, **family.neutral)) > 1e-2

    refshard("train", "--config", config)
    steps = logged_steps(tmp_path / "policy")
    assert len(steps) == 4
    losses = [step["loss"] for step in steps]
    if family.has_balance:
        assert all(step["aux_loss"] > 0 for step in steps)
        weight = transformers.AutoConfig.from_pretrained(folder).router_aux_loss_coef
        assert weight > 0
        losses = [step["loss"] - weight * step["aux_loss"] for step in steps]
    else:
        assert not any("aux_loss" in step for step in steps)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(losses[-1] - math.log(2)) > 1e-3

    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    before = family.make().state_dict()
    assert any((value - before[key]).abs().max() > 1e-3 for key, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("name", "readings"),
    [
        ("mamba", ("padded batches", "padded batches")),
        ("falcon-h1, attention beside a state space", ("through its cache", "padded batches")),
        ("llama", None),
    ],
)
def test_a_family_that_reads_no_packed_rows_is_warned_of_once_in_each_stage(
    make_run: MakeRun, tmp_path: Path, name: str, readings: tuple[str, str] | None
) -> None:
    config = make_run(rows=simple_rows(12), policy={"model": str(save(FAMILIES[name].make(), tmp_path / "model"))})
    for stage, reading in zip(("precompute", "train"), readings or (None, None), strict=True):
        done = refshard(stage, "--config", config)
        text = done.stdout + done.stderr
        assert text.count("warning: ") == (reading is not None), text
        assert reading is None or text.count(reading) == 1, text
    assert json.loads((tmp_path / "policy" / "trainer_state.json").read_text())["global_step"] == 4


def test_offloaded_activations_leave_the_policy_as_it_is_through_the_command(make_run: MakeRun, tmp_path: Path) -> None:
    saved = []
    for offload in (False, True):
        output = tmp_path / f"policy-{offload}"
        train = {"output_dir": str(output), **({"activation_offload": True} if offload else {})}
        config = make_run(rows=simple_rows(12), train=train)
        if not offload:
            refshard("precompute", "--config", config)
        refshard("train", "--config", config)
        saved.append(transformers.AutoModelForCausalLM.from_pretrained(output).state_dict())
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())


# What can't be served is refused by the first command, with the reason, and nothing is scored.

ENCODER = {**SMALL, "is_decoder": False}
ENCODER_DECODER = {
    **IDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 2,
}
BART = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
BIDIRECTIONAL = {**WITH_HEAD, "use_bidirectional_attention": True, "query_pre_attn_scalar": 8}

REFUSED: dict[str, tuple[str, str, Mapping[str, Any], str]] = {
    "t5, an encoder and a decoder": (
        "T5ForConditionalGeneration",
        "T5Config",
        ENCODER_DECODER,
        "can't be loaded as a causal language model: .*T5Config",
    ),
    "bart, an encoder and a decoder": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
        "BartForCausalLM",
    ),
    "bert, an encoder": ("BertModel", "BertConfig", ENCODER, "BertLMHeadModel"),
    "bert, an encoder with its masked-word head": ("BertForMaskedLM", "BertConfig", ENCODER, "BertLMHeadModel"),
    "bert, as a decoder whose head is more than a projection": (
        "BertLMHeadModel",
        "BertConfig",
        {**ENCODER, "is_decoder": True},
        "BertLMHeadModel makes its logits in a way .* not supported",
    ),
    "electra, an encoder whose head has another width": (
        "ElectraForCausalLM",
        "ElectraConfig",
        {**ENCODER, "embedding_size": 16},
        "ElectraForCausalLM .*not supported",
    ),
    "gemma3, both directions": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**BIDIRECTIONAL, **WINDOW, "layer_types": ALTERNATING},
        "Gemma3ForCausalLM sees tokens that come later",
    ),
    "llama, both directions": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**GROUPED, "is_causal": False},
        "LlamaForCausalLM sees tokens that come later",
    ),
    "xlnet, both directions": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {**IDS, **SHARP, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "XLNetLMHeadModel sees tokens that come later",
    ),
    "llama, without its head": ("LlamaModel", "LlamaConfig", GROUPED, r"lm_head\.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_and_nothing_is_scored(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    model_class, config_class, settings, reason = REFUSED[name]
    transformers.set_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    config = make_run(policy={"model": str(save(model, tmp_path / "model"))})
    refused = refshard("precompute", "--config", config, check=None)
    assert refused.returncode == 2, f"{refused.stdout}\n{refused.stderr}"
    error = next(line for line in refused.stderr.splitlines() if "policy.model" in line)
    assert re.search(reason, error), error
    assert not list((tmp_path / "shards").rglob("part-*"))
