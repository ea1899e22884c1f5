"""Log-probs and gradients on a CUDA GPU against the same models in float64 on the CPU, one sequence at a time."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.forward import score
from pipeline.scoring.packing import pack_pairs, pad_pairs
from pipeline.scoring.scorer import Scorer
from support.models import GROUPED, VOCABULARY, make_tokenizer

# The same on a CPU, so that a GPU's time is not spent on a fault of the test.
DEVICES = [pytest.param("cpu", marks=pytest.mark.nightly), pytest.param("cuda", marks=pytest.mark.gpu)]

# Kernels of a GPU take heads of 16 numbers or more.
SETTINGS = {**GROUPED, "hidden_size": 64, "max_position_embeddings": 512, "initializer_range": 0.1}
WITH_HEAD = {**SETTINGS, "head_dim": 16}
ALTERNATING = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}
STATES = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}


@dataclass(frozen=True)
class Family:
    name: str
    settings: Mapping[str, Any]
    config_class: str = ""

    def make(self) -> Any:
        config = getattr(transformers, self.config_class or f"{self.name}Config")(**self.settings)
        transformers.set_seed(0)
        return getattr(transformers, f"{self.name}ForCausalLM")(config).eval()


FAMILIES = {
    "grouped heads": Family("Llama", SETTINGS),
    "window": Family("Mistral", {**SETTINGS, "sliding_window": 40}),
    "softcap": Family("Gemma2", {**WITH_HEAD, **ALTERNATING, "query_pre_attn_scalar": 16}),
    "sinks": Family(
        "GptOss", {**WITH_HEAD, **ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None}
    ),
    "latent attention": Family("DeepseekV3", {**SETTINGS, "num_key_value_heads": 4, **LATENT}),
    "attention beside a state space": Family("FalconH1", {**WITH_HEAD, **STATES, "mamba_chunk_size": 16}),
}

# Attention in float32 on a GPU and sums in another order: 1e-4 of log-probs of a few nats. bfloat16 carries 8 bits;
# the weights are the same on both sides, the activations are rounded on one only.
LOOSE = {"float32": 1e-3, "bfloat16": 0.25}
LOOSE_GRADIENTS = {"float32": 2e-3, "bfloat16": 0.15}


def make_pairs() -> list[TokenizedPair]:
    """Pairs longer and shorter than a block of 128 tokens, two of which share a prompt."""
    pick = random.Random(0)

    def ids(length: int) -> list[int]:
        return [pick.randrange(3, VOCABULARY) for _ in range(length)]

    lengths = [(150, 90, 20), (3, 140, 2), (60, 33, 61), (20, 1, 17)]
    pairs = [TokenizedPair(prompt_ids=ids(p), chosen_ids=ids(c), rejected_ids=ids(r)) for p, c, r in lengths]
    return [*pairs, TokenizedPair(prompt_ids=pairs[0].prompt_ids, chosen_ids=ids(11), rejected_ids=ids(70))]


def completions(pairs: Sequence[TokenizedPair]) -> list[tuple[list[int], list[int]]]:
    """List (prompt, completion): all chosen, then all rejected."""
    return [(list(p.prompt_ids), list(getattr(p, f"{side}_ids"))) for side in ("chosen", "rejected") for p in pairs]


def exact_logps(model: Any, pairs: Sequence[TokenizedPair]) -> list[torch.Tensor]:
    """Log-softmax of the model's own logits in float64, each sequence by itself."""
    found = []
    for prompt, completion in completions(pairs):
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits.double(), dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def make_both(family: Family, dtype: str, device: str) -> tuple[Any, Any]:
    """Make the model on the device, and one with the same rounded weights in float64 on the CPU."""
    model = family.make().to(getattr(torch, dtype))
    exact = family.make()
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    exact.set_attn_implementation("eager")
    if any(name.endswith("experts") for name, _ in exact.named_modules()):
        # The grouped product of all experts at once takes no float64.
        exact.set_experts_implementation("eager")
    return model.to(device), exact


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_float64(name: str, dtype: str, device: str) -> None:
    model, exact = make_both(FAMILIES[name], dtype, device)
    pairs = make_pairs()
    scorer = Scorer.check(model, make_tokenizer(bos=True), "reference.model", 512)
    scorer.tokens_per_batch = 400
    wanted = exact_logps(exact, pairs)
    if any("expert" in module for module, _ in model.named_modules()) and dtype == "bfloat16":
        # A rounded router sends some tokens to another expert; most of them it does not.
        compare = torch.median
    else:
        compare = torch.max
    for i, chosen, rejected in scorer.logps(pairs):
        for found, expected in ((chosen, wanted[i]), (rejected, wanted[len(pairs) + i])):
            assert compare((torch.from_numpy(found).double() - expected).abs()) < LOOSE[dtype]

    if compare is torch.median:
        return
    # Stage two: the gradient of a weighted sum, so that no two completions can be taken for one another.
    packed = str(model.config.get_text_config()._attn_implementation).startswith("refshard_")
    batch = (pack_pairs(pairs) if packed else pad_pairs(pairs, 0)).to(torch.device(device))
    weights = torch.linspace(-1, 1, 2 * len(pairs), dtype=torch.float64)
    chosen, rejected = score(model, batch).sums()
    (torch.cat([chosen, rejected]) * weights.to(chosen)).sum().backward()
    sum(weight * logps.sum() for weight, logps in zip(weights, wanted, strict=True)).backward()
    compared = 0
    for (key, found), (_, expected) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        if expected.grad is None or not expected.grad.any():
            continue
        assert found.grad is not None, key
        gap = (found.grad.cpu().double() - expected.grad).norm() / expected.grad.norm()
        assert gap < LOOSE_GRADIENTS[dtype], (key, gap)
        compared += 1
    assert compared > 10
