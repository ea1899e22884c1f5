"""The scorer: the model's own log-probs, pair by pair, whoever the neighbours are and whatever the family."""

import dataclasses
import itertools
import types
from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache

from pipeline.base.errors import ConfigError
from pipeline.data.tokens import TokenizedPair
from pipeline.scoring import attention, selfcheck
from pipeline.scoring import forward as scoring_forward
from pipeline.scoring.forward import LOGPS, Scores, Want, prepare, score, sum_logps, weighted_sums
from pipeline.scoring.packing import Batch, Layout, make_batch, pack_pairs, pad_pairs
from pipeline.scoring.selfcheck import check_scoring
from support.models import GROUPED, SMALL, VOCABULARY

FAMILIES: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "phi, a head with bias": ("PhiForCausalLM", "PhiConfig", SMALL),
    "gemma2, softcap": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "final_logit_softcapping": 3.0},
    ),
    "gemma3, softcap": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "granite, logits_scaling": ("GraniteForCausalLM", "GraniteConfig", {**GROUPED, "logits_scaling": 4.0}),
    "cohere, logit_scale": ("CohereForCausalLM", "CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.3,
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "mpt, an unused logit_scale": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "logit_scale": "inv_sqrt_d_model"},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "gpt-oss, sinks and windows": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "llama4, chunks": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 0],
            "floor_scale": 8,
        },
    ),
}
WITH_EXPERTS = ["mixtral", "qwen3-moe"]


def make_model(family: str) -> Any:
    model_class, config_class, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**changes)
    return getattr(transformers, model_class)(config).eval()


def random_pairs(count: int, seed: int = 0) -> list[TokenizedPair]:
    random = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(1, 9, (1,), generator=random))
        return torch.randint(3, VOCABULARY, (length,), generator=random).tolist()

    return [TokenizedPair(prompt_ids=ids(), chosen_ids=ids(), rejected_ids=ids()) for _ in range(count)]


def score_pairs(model: Any, pairs: list[TokenizedPair]) -> list[tuple[float, float]]:
    with torch.no_grad():
        chosen, rejected = score(model, pad_pairs(pairs, pad_id=0)).sums()
    return list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def plain_token_logps(model: Any, batch: Batch) -> torch.Tensor:
    """Log-softmax over all logits, then the completion tokens' entries, row by row."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    logps = logps.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    ends = batch.attention_mask.sum(dim=1).tolist()
    return torch.cat([row[end - 1 - n : end - 1] for row, end, n in zip(logps, ends, batch.lengths, strict=True)])


@pytest.fixture(scope="module")
def llama() -> Any:
    model = make_model("llama")
    prepare(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scorer_gives_the_families_own_log_probs(family: str) -> None:
    model = make_model(family)
    batch = pad_pairs(random_pairs(5), pad_id=0)
    with torch.no_grad():
        plain = plain_token_logps(model, batch)
        prepare(model)
        check_scoring(model, "policy.model")
        found = score(model, batch)
    assert plain.std() > 0.01
    torch.testing.assert_close(found.tokens.logps, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2, softcap", "cohere, logit_scale"])
def test_gradients_are_those_of_the_models_own_logits(family: str) -> None:
    model = make_model(family)
    batch = pad_pairs(random_pairs(4), pad_id=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(plain_token_logps(model, batch).sum(), parameters)
    prepare(model)
    chosen, rejected = score(model, batch).sums()
    found = torch.autograd.grad((chosen + rejected).sum(), parameters)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-6)


# L6: neighbours, packing and batch size change nothing.

_PAIRS = random_pairs(8, seed=1)


@given(order=st.permutations(range(len(_PAIRS))), cuts=st.sets(st.integers(1, len(_PAIRS) - 1)))
@settings(max_examples=25, deadline=None)
def test_a_pairs_log_probs_do_not_depend_on_its_batch(llama: Any, order: list[int], cuts: set[int]) -> None:
    alone = [score_pairs(llama, [pair])[0] for pair in _PAIRS]
    bounds = [0, *sorted(cuts), len(order)]
    for start, end in itertools.pairwise(bounds):
        group = order[start:end]
        for i, found in zip(group, score_pairs(llama, [_PAIRS[i] for i in group]), strict=True):
            assert found == pytest.approx(alone[i], abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2, softcap", "gemma3, softcap", "mistral", *WITH_EXPERTS])
def test_a_pairs_log_probs_do_not_depend_on_a_longer_neighbour(family: str) -> None:
    model = make_model(family)
    prepare(model)
    long = TokenizedPair(prompt_ids=list(range(3, 40)), chosen_ids=list(range(40, 80)), rejected_ids=[5])
    alone = [score_pairs(model, [pair])[0] for pair in _PAIRS]
    together = score_pairs(model, [long, *_PAIRS])[1:]
    for found, expected in zip(together, alone, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_the_value_of_the_padding_token_is_never_seen(llama: Any) -> None:
    with torch.no_grad():
        one, other = (score(llama, pad_pairs(_PAIRS, pad_id)).tokens.logps for pad_id in (0, 55))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_sums_add_the_tokens_of_each_completion(llama: Any) -> None:
    with torch.no_grad():
        scores = score(llama, pad_pairs(_PAIRS, pad_id=0))
    rows = [part.double().sum().item() for part in scores.tokens.logps.split(scores.lengths.tolist())]
    chosen, rejected = scores.sums()
    assert chosen.dtype == rejected.dtype == torch.float32
    assert [*chosen.tolist(), *rejected.tolist()] == pytest.approx(rows, rel=1e-6)
    assert [len(p.chosen_ids) for p in _PAIRS] + [len(p.rejected_ids) for p in _PAIRS] == scores.lengths.tolist()


def test_a_long_sum_is_rounded_once() -> None:
    """Adding in float32, every term of 2**-24 beside a 1 would be lost."""
    logps = torch.cat([torch.tensor([-1.0]), torch.full((1024,), -(2.0**-24)), torch.tensor([-0.5])])
    chosen, rejected = sum_logps(logps, torch.tensor([1025, 1]))
    assert chosen.item() == -1.0 - 1024 * 2.0**-24
    assert rejected.item() == -0.5


# What is asked for on top.


def test_squares_come_only_where_they_are_asked_for(llama: Any) -> None:
    batch = pad_pairs(_PAIRS, pad_id=0)
    with torch.no_grad():
        plain, with_squares = score(llama, batch), score(llama, batch, Want(squares=True))
        logits = llama(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
    assert plain.tokens.log_sum_squares is None and plain.aux_loss is None and with_squares.aux_loss is None
    assert torch.equal(plain.tokens.logps, with_squares.tokens.logps)
    probabilities = torch.softmax(logits, dim=-1).flatten(0, 1)[batch.logit_positions]
    found = with_squares.tokens.log_sum_squares
    assert found is not None
    torch.testing.assert_close(found.double(), probabilities.square().sum(dim=-1).log(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_the_balance_loss_is_the_models_own_forward_and_backward(family: str) -> None:
    """Over chosen and rejected sequences of the batch, padding left out, as transformers counts it."""
    model = make_model(family)
    batch = pad_pairs(random_pairs(5), pad_id=0)
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    own = model(**arguments, output_router_logits=True).aux_loss
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("lm_head")}

    def gradients(value: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}

    expected = gradients(own)
    assert any("gate" in name and g.abs().max() > 1e-6 for name, g in expected.items())
    prepare(model)
    scores = score(model, batch, Want(aux_loss=True))
    assert scores.aux_loss is not None and scores.aux_loss.shape == ()
    torch.testing.assert_close(scores.aux_loss, own, rtol=0, atol=0)
    found = gradients(scores.aux_loss)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_asking_for_the_balance_loss_changes_no_log_prob_and_no_gradient(family: str) -> None:
    model = make_model(family)
    prepare(model)
    batch = pad_pairs(random_pairs(5), pad_id=0)
    without, with_balance = score(model, batch), score(model, batch, Want(squares=True, aux_loss=True))
    assert without.aux_loss is None
    assert with_balance.tokens.log_sum_squares is not None
    torch.testing.assert_close(without.tokens.logps, with_balance.tokens.logps, rtol=0, atol=1e-5)
    gradients = [
        torch.autograd.grad(scores.tokens.logps.sum(), model.model.embed_tokens.weight)[0]
        for scores in (without, with_balance)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    # The hook that caught the hidden states is gone.
    assert not model.base_model._forward_hooks


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_padding_is_not_in_the_balance_loss(family: str) -> None:
    model = make_model(family)
    prepare(model)
    pair = TokenizedPair(prompt_ids=[5, 6, 7], chosen_ids=[8, 9], rejected_ids=[10])
    batch = pad_pairs([pair], pad_id=0)
    ids, mask = (torch.nn.functional.pad(t, (0, 20)) for t in (batch.input_ids, batch.attention_mask))
    # The second row begins 20 tokens later.
    places = batch.logit_positions + torch.tensor([0, 0, 20])
    wide = dataclasses.replace(batch, input_ids=ids, attention_mask=mask, logit_positions=places)
    with torch.no_grad():
        one, other = (score(model, b, Want(aux_loss=True)).aux_loss for b in (batch, wide))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# Sums that weigh the tail (LD-DPO).

_token_logps = st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=12)


@given(
    pairs=st.lists(st.tuples(_token_logps, _token_logps), min_size=1, max_size=5),
    ld_alpha=st.floats(0, 1, width=32),
)
@settings(max_examples=60, deadline=None)
def test_weighted_sums_are_those_of_a_loop_over_tokens(
    pairs: list[tuple[list[float], list[float]]], ld_alpha: float
) -> None:
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    flat = torch.tensor([value for row in rows for value in row])
    found = weighted_sums(flat, torch.tensor([len(row) for row in rows]), ld_alpha)
    for side, sums in enumerate(found):
        assert sums.dtype == torch.float32
        for pair, total in zip(pairs, sums.tolist(), strict=True):
            shared = min(map(len, pair))
            expected = sum(value * (1.0 if t < shared else ld_alpha) for t, value in enumerate(pair[side]))
            assert total == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_weight_of_1_gives_plain_sums_and_0_the_common_length(llama: Any) -> None:
    with torch.no_grad():
        scores = score(llama, pad_pairs(_PAIRS, pad_id=0))
    logps, lengths = scores.tokens.logps, scores.lengths
    for a, b in zip(weighted_sums(logps, lengths, 1.0), scores.sums(), strict=True):
        assert torch.equal(a, b)
    cut = [
        TokenizedPair(prompt_ids=p.prompt_ids, chosen_ids=p.chosen_ids[:n], rejected_ids=p.rejected_ids[:n])
        for p in _PAIRS
        for n in [min(len(p.chosen_ids), len(p.rejected_ids))]
    ]
    for a, b in zip(weighted_sums(logps, lengths, 0.0), zip(*score_pairs(llama, cut), strict=True), strict=True):
        assert a.tolist() == pytest.approx(b, abs=1e-4)


def test_the_gradient_of_a_weighted_sum_is_the_weight() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], requires_grad=True)
    chosen, rejected = weighted_sums(logps, torch.tensor([3, 2]), 0.25)
    (chosen + rejected).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [1, 1, 0.25, 1, 1]


# What prepare leaves alone.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prepare_leaves_forward_and_generate_as_they_were(family: str) -> None:
    model = make_model(family)
    batch = pad_pairs(random_pairs(3), pad_id=0)
    # Padded on the left: generation must go on handing the mask and the positions that follow from it to forward.
    prompts = {
        "input_ids": torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }

    def observe() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            outputs = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.input_ids, use_cache=True
            )
            generated = model.generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert outputs.past_key_values is not None
        return outputs.logits, outputs.loss, generated

    before = observe()
    prepare(model)
    for a, b in zip(before, observe(), strict=True):
        assert torch.equal(a, b)


def test_prepare_twice_is_prepare_once(llama: Any) -> None:
    model = make_model("llama")
    prepare(model)
    prepare(model)
    assert score_pairs(model, _PAIRS) == score_pairs(llama, _PAIRS)


def test_prepare_adds_no_parameter_and_no_buffer() -> None:
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_the_check_leaves_the_mode_and_the_gradients_as_they_were(llama: Any, training: bool) -> None:
    llama.train(training)
    check_scoring(llama, "policy.model")
    assert llama.training == training
    assert all(p.grad is None for p in llama.parameters())
    llama.eval()


# What the scorer does not know is refused.


class ScaledLlama(transformers.LlamaForCausalLM):
    """Does more after the backbone than a projection, under no name that head.py reads."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs


def test_a_model_that_scales_its_logits_in_an_unknown_way_is_refused() -> None:
    torch.manual_seed(0)
    model = ScaledLlama(transformers.LlamaConfig(**GROUPED))
    prepare(model)
    with pytest.raises(ConfigError, match=r"policy\.model: ScaledLlama .* not supported") as caught:
        check_scoring(model, "policy.model")
    assert caught.value.exit_status == 2


def test_a_model_whose_numbers_are_nan_is_refused() -> None:
    model = make_model("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    prepare(model)
    with pytest.raises(ConfigError, match="differ by nan"):
        check_scoring(model, "reference.model")


def test_an_adapted_model_is_scored_with_its_adapter() -> None:
    base = make_model("llama")
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = pad_pairs(_PAIRS, pad_id=0)
    with torch.no_grad():
        plain = plain_token_logps(adapted, batch)
        prepare(adapted)
        check_scoring(adapted, "policy.model")
        found: Scores = score(adapted, batch)
        with adapted.disable_adapter():
            off = score(adapted, batch)
    torch.testing.assert_close(found.tokens.logps, plain, rtol=1e-5, atol=1e-4)
    assert (off.tokens.logps - plain).abs().max() > 0.01


# Packed rows.

# Longer than the windows of the families, and than the batch that a model is checked with; a prompt and a completion
# that two pairs share, and completions of one token.
_LONG = [
    TokenizedPair(prompt_ids=_ids_[:20], chosen_ids=_ids_[20:60], rejected_ids=_ids_[60:61])
    for _ids_ in [torch.randint(3, VOCABULARY, (61,), generator=torch.Generator().manual_seed(5)).tolist()]
]
_LONG += [
    TokenizedPair(prompt_ids=_LONG[0].prompt_ids, chosen_ids=[5, 6, 7, 8, 9, 10, 11], rejected_ids=_LONG[0].chosen_ids),
    *random_pairs(3, seed=2),
]
NOT_PACKED = ["mpt, an unused logit_scale", "llama4, chunks"]
if make_model("gemma2, softcap").config._attn_implementation == "sdpa":
    # Before transformers chose another attention for it, its scores went without their cap.
    NOT_PACKED.append("gemma2, softcap")
SPECIAL = [
    "llama, tied",
    "mistral",
    "gemma2, softcap",
    "gemma3, softcap",
    "cohere, logit_scale",
    "gpt2",
    "qwen3-moe",
    "gpt-oss, sinks and windows",
    "llama4, chunks",
]


def alone_token_logps(model: Any, pairs: list[TokenizedPair], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of each sequence by itself, without padding: log-softmax over the model's own logits, in the batch's order."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([[*pair.prompt_ids, *getattr(pair, side)]])
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].to(dtype), dim=-1)
            found.append(logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(pair.prompt_ids) - 1 :])
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_gives_the_families_own_log_probs(family: str) -> None:
    model = make_model(family)
    with torch.no_grad():
        plain = alone_token_logps(model, _LONG)
        prepare(model)
        reading = check_scoring(model, "policy.model")
        assert (reading == "packed") == (family not in NOT_PACKED)
        batch = make_batch(_LONG, 0, reading)
        found, lean = score(model, batch), score(model, batch, LOGPS)
        # What it does without a layout is what it did before.
        again = alone_token_logps(model, _LONG)
    torch.testing.assert_close(found.tokens.logps, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lean.tokens.logps, found.tokens.logps, rtol=0, atol=1e-5)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("family", SPECIAL)
def test_gradients_of_a_packed_row_are_those_of_the_models_own_logits(family: str) -> None:
    model = make_model(family)
    parameters = dict(model.named_parameters())
    # Completions weigh differently, so that a gradient that goes to the wrong one shows.
    lengths = pad_pairs(_LONG, 0).lengths
    weights = torch.linspace(-1, 2, len(lengths)).repeat_interleave(lengths)
    plain = torch.autograd.grad((weights * alone_token_logps(model, _LONG)).sum(), list(parameters.values()))
    prepare(model)
    packed = check_scoring(model, "policy.model") == "packed"
    assert packed == (family not in NOT_PACKED)
    logps = score(model, pack_pairs(_LONG) if packed else pad_pairs(_LONG, 0)).tokens.logps
    found = torch.autograd.grad((weights * logps).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, found, plain, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["llama", "gpt-oss, sinks and windows", "llama4, chunks"])
def test_float64_agrees_with_the_models_own_logits_to_six_decimals(family: str) -> None:
    model = make_model(family).double()
    # The grouped product of all experts at once takes no float64. (Llama 4 itself turns its positions in float32.)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        plain = alone_token_logps(model, _LONG, torch.float64)
        prepare(model)
        packed = check_scoring(model, "policy.model") == "packed"
        batch = pack_pairs(_LONG) if packed else pad_pairs(_LONG, 0)
        found = score(model, batch).tokens.logps
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


HIDDEN_IN_THE_MASK: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "a window": ("PhimoeForCausalLM", "PhimoeConfig", {"num_local_experts": 2, "sliding_window": 40}),
    "a window of some layers": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "use_sliding_window": True,
            "sliding_window": 40,
            "max_window_layers": 1,
        },
    ),
    "distances": ("FalconForCausalLM", "FalconConfig", {"alibi": True}),
    "distances, of every head": ("BloomForCausalLM", "BloomConfig", {"n_head": 4, "n_layer": 2}),
    "local layers": ("GPTNeoForCausalLM", "GPTNeoConfig", {"attention_types": [[["global", "local"], 1]]}),
    "a state space": ("MambaForCausalLM", "MambaConfig", {"state_size": 8}),
    "a gated delta rule": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            "head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "the best keys by an index": (
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 100,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
        },
    ),
}


NOT_CACHED = ["a state space"]


@pytest.mark.parametrize("kind", HIDDEN_IN_THE_MASK)
def test_what_a_packed_row_cannot_serve_is_cached_or_padded(kind: str) -> None:
    """Windows and indices are longer than the batch that the model is checked with, as they are in earnest."""
    model_class, config_class, changes = HIDDEN_IN_THE_MASK[kind]
    if not hasattr(transformers, model_class):
        pytest.skip(f"this transformers has no {model_class}")
    torch.manual_seed(0)
    # What a family of its own words has no use for would not be accepted by some.
    general = {**GROUPED} if "n_head" not in changes and "attention_types" not in changes else {}
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "initializer_range": 0.3}
    config = getattr(transformers, config_class)(**{**(general or small), **changes})
    model = getattr(transformers, model_class)(config).eval()
    before = model.config._attn_implementation
    with torch.no_grad():
        plain = alone_token_logps(model, _LONG)
        prepare(model)
        reading = check_scoring(model, "policy.model", 64)
        assert reading == ("padded" if kind in NOT_CACHED else "cached")
        assert model.config._attn_implementation == before
        for batch in (pad_pairs(_LONG, 0), make_batch(_LONG, 0, reading)):
            torch.testing.assert_close(score(model, batch).tokens.logps, plain, rtol=1e-4, atol=2e-4)


PASS_THE_MASK_ALONE: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", {}),
}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("family", PASS_THE_MASK_ALONE)
def test_layers_that_pass_on_no_keywords_are_packed(
    monkeypatch: pytest.MonkeyPatch, family: str, reentrant: bool | None
) -> None:
    """Gradient checkpointing calls the layers again, after the forward has ended."""
    monkeypatch.setitem(FAMILIES, family, (*PASS_THE_MASK_ALONE[family][:2], {**GROUPED}))
    model = make_model(family).double()
    plain = alone_token_logps(model, _LONG, torch.float64)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(plain.square().sum(), parameters)
    prepare(model)
    assert check_scoring(model, "policy.model") == "packed"
    if reentrant is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    found = score(model, pack_pairs(_LONG)).tokens.logps
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    found.square().sum().backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-6)


def test_a_window_that_no_sequence_reaches_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-MoE's layers take their window from the mask, and its published window is longer than any pair."""
    settings = {**GROUPED, "num_local_experts": 2, "sliding_window": 40}
    monkeypatch.setitem(FAMILIES, "phimoe", ("PhimoeForCausalLM", "PhimoeConfig", settings))
    model, pairs = make_model("phimoe"), random_pairs(6)
    with torch.no_grad():
        plain = alone_token_logps(model, pairs)
        prepare(model)
        assert check_scoring(model, "policy.model", None) != "packed"
        assert check_scoring(model, "policy.model", 41) != "packed"
        assert check_scoring(model, "policy.model", 40) == "packed"
        torch.testing.assert_close(score(model, pack_pairs(pairs)).tokens.logps, plain, rtol=1e-5, atol=1e-4)


# What the check of a packed row must find, whatever the dtype and however little a layer does.


def leak_over_the_row(
    module: Any, query: Any, key: Any, value: Any, *rest: Any, layout: Layout, **keywords: Any
) -> Any:
    """Causal over the whole row: groups see those before them."""
    whole = Layout(((sum(p + sum(c) for p, c in layout.groups) - 1, (1,)),))
    return _REAL(module, query, key, value, *rest, layout=whole, **keywords)


def leak_within_groups(module: Any, query: Any, key: Any, value: Any, *rest: Any, layout: Layout, **kw: Any) -> Any:
    """Groups apart, but a completion sees those before it."""
    merged = Layout(tuple((prompt, (sum(completions),)) for prompt, completions in layout.groups))
    return _REAL(module, query, key, value, *rest, layout=merged, **kw)


_REAL = attention._packed


@pytest.mark.parametrize("scale", [1.0, pytest.param(0.1, marks=pytest.mark.nightly), 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, scale: float) -> None:
    def make() -> Any:
        model = make_model(family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale if parameter.dim() > 1 else 1.0)
        prepare(model.to(dtype))
        return model

    assert check_scoring(make(), "policy.model") == "packed"
    for leak in (leak_over_the_row, leak_within_groups):
        monkeypatch.setattr(attention, "_packed", leak)
        assert check_scoring(make(), "policy.model") != "packed"
    monkeypatch.undo()
    # One that reads no positions keeps tokens apart, but thinks every sequence to follow the row's last.
    deaf = make()
    forward = deaf.base_model.forward
    deaf.base_model.forward = lambda *a, position_ids=None, **k: forward(*a, **k)
    assert check_scoring(deaf, "policy.model") != "packed"


def test_a_head_on_another_device_than_the_last_layer_is_read_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other device is one without memory, to which all that the head is to work on has to come."""
    elsewhere = torch.nn.Linear(8, 50, bias=False, device="meta")
    config = types.SimpleNamespace(get_text_config=lambda: transformers.LlamaConfig())
    causal = types.SimpleNamespace(config=config, get_output_embeddings=lambda: elsewhere)
    seen = []

    def read(hidden: torch.Tensor, targets: torch.Tensor, head: Any, **keywords: Any) -> Any:
        seen.append({hidden.device.type, targets.device.type, head.weight.device.type})
        return torch.zeros(len(targets)) if not keywords else scoring_forward.TokenStatistics(torch.zeros(len(targets)))

    monkeypatch.setattr(scoring_forward, "token_logps", read)
    monkeypatch.setattr(scoring_forward, "token_statistics", read)
    for statistics in (False, True):
        want = Want(statistics=statistics)
        found = scoring_forward._score_targets(causal, torch.zeros(2, 8), torch.tensor([7, 8]), want)
        assert found.logps.device.type == "cpu"
    assert seen == [{"meta"}, {"meta"}]


def lose_convolutions(cache: Any, rows: torch.Tensor) -> None:
    _REORDER(cache, rows)
    for layer in cache.layers:
        for state in getattr(layer, "conv_states", {}).values():
            state.zero_()


def take_anothers(cache: Any, rows: torch.Tensor) -> None:
    _REORDER(cache, rows.roll(1))


def see_the_padding(
    backbone: Any, continuations: Any, *, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    return _THROUGH_CACHE(backbone, continuations, input_ids=input_ids, attention_mask=torch.ones_like(attention_mask))


_REORDER, _THROUGH_CACHE = Cache.reorder_cache, scoring_forward._through_cache


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_a_state_that_is_lost_or_anothers_is_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(0)
    model_class, config_class, changes = HIDDEN_IN_THE_MASK["a gated delta rule"]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**GROUPED, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1.0)
    prepare(model.to(dtype))
    assert check_scoring(model, "policy.model", 64) == "cached"
    for owner, name, fault in (
        (Cache, "reorder_cache", lose_convolutions),
        (Cache, "reorder_cache", take_anothers),
        (scoring_forward, "_through_cache", see_the_padding),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            assert check_scoring(model, "policy.model", 64) == "padded", fault


# What only long rows feel, beyond lengths that the config names.

_STRETCHED = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG_ROWS: dict[str, tuple[str, str, Mapping[str, Any], int | None]] = {
    "positions by the longest row": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"max_position_embeddings": 32, "rope_parameters": _STRETCHED},
        32,
    ),
    "keys by the row's width": ("DogeForCausalLM", "DogeConfig", {"keep_window_size": 24}, 24),
    "a window": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 24}, None),
    "learned positions": ("GPT2LMHeadModel", "GPT2Config", {"n_positions": 64}, None),
}


@pytest.mark.parametrize("kind", LONG_ROWS)
def test_a_sequence_scores_as_it_does_alone_or_its_length_is_refused(kind: str) -> None:
    model_class, config_class, changes, refused_beyond = LONG_ROWS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**GROUPED, **changes})).eval()
    with torch.no_grad():
        plain = alone_token_logps(model, _LONG)
        prepare(model)
        if refused_beyond is not None:
            said = f"data.max_length: must be at most {refused_beyond} for policy.model: .*, got 64. Set"
            with pytest.raises(ConfigError, match=said):
                check_scoring(model, "policy.model", 64)
            check_scoring(model, "policy.model", refused_beyond)
            assert (score(model, pad_pairs(_LONG, 0)).tokens.logps - plain).abs().max() > 1e-3
            return
        found = score(model, make_batch(_LONG, 0, check_scoring(model, "policy.model", 64))).tokens.logps
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=2e-4)


def test_the_lengths_that_a_config_names_are_found_at_any_depth() -> None:
    named = {
        "sliding_window": 24,
        "of_layers": [{"chunk_size": 40}, {}],
        "window_sizes": [16, 48, 900],
        "hidden_size": 32,
    }
    config = types.SimpleNamespace(to_dict=lambda: {**named, "rope_parameters": {"original_length": 20}})
    model: Any = torch.nn.Linear(1, 1)
    model.config = types.SimpleNamespace(get_text_config=lambda: config)
    found = dict(selfcheck._named_lengths(model, 64))
    assert found == {16: 40, 20: 44, 24: 48, 40: 64, 48: 64}


def widen_the_window(module: Any, *tensors: Any, **keywords: Any) -> Any:
    return _REAL(module, *tensors, **{**keywords, "sliding_window": 1000})


def test_packed_rows_are_tried_beyond_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(longest: int) -> bool:
        torch.manual_seed(0)
        config = transformers.MistralConfig(**{**GROUPED, "sliding_window": 24})
        model = transformers.MistralForCausalLM(config)
        prepare(model)
        return check_scoring(model, "policy.model", longest) == "packed"

    assert packed(64)
    monkeypatch.setattr(attention, "_packed", widen_the_window)
    # Shorter sequences do not feel the difference.
    assert packed(24) and not packed(64)
