"""Weights that autocast would cast are loaded in its dtype: no log-prob changes, and no float32 copy is made."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from pipeline.config.data import DataConfig
from pipeline.config.schema import Config, PolicyConfig, PrecomputeConfig, ReferenceConfig
from pipeline.data.tokens import TokenizedPair
from pipeline.models import loading
from pipeline.models.products import dtype_of_products
from pipeline.scoring.scorer import load_scorer
from support.models import GROUPED, SMALL, VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
}
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama, tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "phi, a head with bias": transformers.PhiConfig(**SMALL),
    "gpt2": transformers.GPT2Config(**SIZES),
    "qwen3-moe": transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS),
}
ADAPTERS = {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}


def save(folder: Path, family: str, dtype: str = "float32") -> Path:
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def settings(policy: PolicyConfig, autocast: str | None = "bfloat16", **reference: Any) -> Config:
    named = ReferenceConfig(dtype="float32", autocast=autocast, **reference)  # type: ignore[arg-type]
    return Config(
        data=DataConfig(path="x", max_length=64),
        policy=policy,
        reference=named,
        precompute=PrecomputeConfig(output="o"),
    )


def logps(config: Config, tokenizer: Any) -> tuple[list[bytes], Any]:
    """Score a few pairs; give the bytes of all token logps, and the model."""
    ids = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [TokenizedPair(prompt_ids=i[:5], chosen_ids=i[5 : 9 + n], rejected_ids=i[12:]) for n, i in enumerate(ids)]
    with load_scorer(config, tokenizer, tokens_per_batch=64) as scorer:
        scored = sorted(scorer.logps(pairs), key=lambda one: one[0])
        return [side.tobytes() for _, *sides in scored for side in sides], scorer.model


def cast_each_time(config: Config, tokenizer: Any) -> list[bytes]:
    """Score as training does: all weights are float32, and autocast casts them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "dtype_of_products", lambda config: None)
        scored, model = logps(config, tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return scored


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_log_prob_is_that_of_weights_which_autocast_casts(
    tmp_path: Path, tokenizer: Any, family: str, autocast: str
) -> None:
    config = settings(PolicyConfig(model=str(save(tmp_path, family))), autocast)
    scored, model = logps(config, tokenizer)
    narrow = {name for name, p in model.named_parameters() if p.dtype == getattr(torch, autocast)}
    layers = [name for name in narrow if ".layers." in name or ".h." in name]
    assert layers and all(name.endswith(".weight") for name in narrow)
    assert not any(
        part in name for name in narrow for part in ("norm", "ln_", "embed", "wte", "experts", "gate.weight")
    )
    assert ("lm_head.weight" in narrow) == (family not in ("llama, tied", "gpt2"))
    assert scored == cast_each_time(config, tokenizer)


def test_a_bf16_checkpoint_is_read_without_a_copy_in_float32(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[torch.dtype] = set()
    own = loading._own_weights

    def loaded(model: Any) -> None:
        read.update(p.dtype for name, p in model.named_parameters() if "proj" in name or "lm_head" in name)
        own(model)

    monkeypatch.setattr(loading, "_own_weights", loaded)
    config = settings(PolicyConfig(model=str(save(tmp_path, "llama", "bfloat16"))))
    scored, _ = logps(config, tokenizer)
    assert read == {torch.bfloat16}
    assert scored == cast_each_time(config, tokenizer)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_reads_weights_itself_keeps_them_in_float32(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    folder = save(tmp_path / "model", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **ADAPTERS[kind]))
    for name, weight in wrapped.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(weight, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    config = settings(PolicyConfig(model=str(folder)), model=str(folder), adapter=str(tmp_path / "adapter"))
    assert dtype_of_products(config) == ("bfloat16" if kind == "lora" else None)
    scored, model = logps(config, tokenizer)
    assert (torch.bfloat16 in {p.dtype for p in model.parameters()}) == (kind == "lora")
    assert scored == cast_each_time(config, tokenizer)


def test_nothing_is_narrowed_without_autocast(tmp_path: Path) -> None:
    policy = PolicyConfig(model=str(save(tmp_path, "llama")))
    model = loading.load_reference(settings(policy, None), torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # The policy is trained: its weights are float32, whatever the reference's are.
    trained = loading.load_policy(settings(policy))
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
