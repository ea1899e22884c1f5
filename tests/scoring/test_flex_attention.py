"""Packed rows through compiled flex attention, which a GPU uses, on a CPU: its numbers, and how often it compiles."""

import random
from typing import Any

import pytest
import torch
import transformers

from pipeline.data.tokens import TokenizedPair
from pipeline.scoring import attention
from pipeline.scoring.attention import switch_attention
from pipeline.scoring.forward import LOGPS, prepare, score
from pipeline.scoring.packing import Layout, pack_pairs
from support.flex_attention import compilations, flex_on_any_device, forget_compilations
from support.models import GROUPED, VOCABULARY

BATCHES = 12
# Scores of attention near 1: sharper ones carry the rounding of float32 further, whatever computes them.
FLAT = {"initializer_range": 0.1}


def make_batches() -> list[list[TokenizedPair]]:
    """Batches of different numbers of pairs and different lengths; none fits one block of 128 tokens."""
    pick = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [pick.randrange(3, VOCABULARY) for _ in range(pick.randint(least, most))]

    return [
        [
            TokenizedPair(prompt_ids=ids(60, 150), chosen_ids=ids(60, 150), rejected_ids=ids(60, 150))
            for _ in range(1 + number % 4)
        ]
        for number in range(BATCHES)
    ]


def plain_logps(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.nightly
def test_any_number_of_layouts_is_compiled_twice_and_attends_as_sdpa_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**GROUPED, "max_position_embeddings": 512, "hidden_size": 64, **FLAT})
    model, exact = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    exact.load_state_dict(model.state_dict())
    exact.double()
    prepare(model)
    assert switch_attention(model)

    gaps, real_flex, real_packed = [], attention._flex, attention._packed

    def compared(module: Any, query: Any, key: Any, value: Any, layout: Any, kernel: Any) -> Any:
        found = real_flex(module, query, key, value, layout, kernel)
        wide = (tensor.double() for tensor in (query, key, value))
        kept = Layout(layout.groups)
        wanted, _ = real_packed(module, *wide, attention.NOT_A_MASK, layout=kept, scaling=kernel.scaling)
        gaps.append((found - wanted).abs().max().item())
        return found

    monkeypatch.setattr(attention, "_flex", compared)
    forget_compilations()
    with torch.inference_mode(), flex_on_any_device():
        for pairs in make_batches():
            scored = score(model, pack_pairs(pairs), want=LOGPS)
            wanted = [
                plain_logps(exact, pair.prompt_ids, completion)
                for side in ("chosen_ids", "rejected_ids")
                for pair in pairs
                for completion in [getattr(pair, side)]
            ]
            # Two layers in float32; attention alone is held to more below.
            torch.testing.assert_close(scored.tokens.logps.double(), torch.cat(wanted), rtol=0, atol=1e-5)
    assert len(gaps) == 2 * BATCHES
    assert max(gaps) < 1e-6
    # Once for the first row's length, once for any length.
    assert compilations() == 2
