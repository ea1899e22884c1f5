"""One process loads the policy, and others get all of it but the weights, which take no memory."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config.schema import LoraSettings, PolicyConfig
from pipeline.models import loading
from pipeline.scoring.scorer import Scorer
from pipeline.training import handover
from pipeline.training.handover import load_in_main_process
from support.models import GROUPED

TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=1)


def arguments(mixed_precision: str = "no") -> Any:
    return SimpleNamespace(mixed_precision=mixed_precision)


def config_of(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**GROUPED, "attention_dropout": 0.1, **changes})


@pytest.fixture
def hand_over(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """Give the main process's policy and another's, made one after the other in this process."""

    def between(
        policy: PolicyConfig, model: Any, mixed_precision: str = "no", leave: Callable[[Any], None] = id
    ) -> tuple[Any, Any]:
        def check(loaded: Any) -> Scorer:
            leave(loaded)
            return Scorer.check(loaded, TOKENIZER, "policy.model", 64)  # type: ignore[arg-type]

        outlines: list[Any] = []
        given = (check, policy, TOKENIZER, arguments(mixed_precision))
        monkeypatch.setattr(handover, "on_main_process", lambda action: outlines.append(action()) or outlines[0])
        main = load_in_main_process(lambda: model, *given)
        monkeypatch.setattr(handover, "on_main_process", lambda action: outlines[0])
        other = load_in_main_process(lambda: pytest.fail("loaded twice"), *given)
        assert (other.reading, other.pad_id, other.key) == (main.reading, main.pad_id, main.key)
        return main.model, other.model

    return between


@pytest.mark.parametrize("kind", ["plain", "tied", "lora"])
def test_another_process_gets_all_of_the_policy_but_its_weights(
    hand_over: Callable[..., tuple[Any, Any]], kind: str
) -> None:
    policy = PolicyConfig(model="m", lora=LoraSettings(r=2, dropout=0.5) if kind == "lora" else None)
    model = transformers.LlamaForCausalLM(config_of(tie_word_embeddings=kind == "tied")).to(torch.bfloat16).eval()
    loading.disable_dropout(model)
    if kind == "lora":
        model = loading._with_fresh_adapter(model, policy, loading._adapter_config(policy))
    model.get_output_embeddings().weight.data = model.get_output_embeddings().weight.data.T.contiguous().T
    main, other = hand_over(policy, model)
    ours, theirs = (dict(each.named_parameters(remove_duplicate=False)) for each in (other, main))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        found = theirs[name]
        assert (parameter.shape, parameter.dtype, parameter.requires_grad, parameter.device.type) == (
            (found.shape, found.dtype, found.requires_grad, "cpu")
        )
        assert found.is_contiguous()
        assert [key for key in ours if ours[key] is parameter] == [key for key in theirs if theirs[key] is found]
    # accelerate knows parameters by their memory.
    assert len({parameter.data_ptr() for parameter in other.parameters()}) == len(list(other.parameters()))
    for name, buffer in main.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer), name
    for module, found in zip(other.modules(), main.modules(), strict=True):
        assert type(module) is type(found)
        assert module.training == found.training
        for name in ("p", "attention_dropout"):
            assert getattr(module, name, None) == getattr(found, name, None)
    assert other.config._attn_implementation == main.config._attn_implementation != "sdpa"


def test_trained_weights_are_wide_where_accelerate_would_fill_them(hand_over: Callable[..., tuple[Any, Any]]) -> None:
    model = transformers.LlamaForCausalLM(config_of()).to(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    main, other = hand_over(PolicyConfig(model="m"), model, "bf16")
    assert {parameter.dtype for parameter in main.parameters()} == {torch.bfloat16}
    assert other.lm_head.weight.dtype == torch.float32
    assert other.model.norm.weight.dtype == torch.bfloat16


def memory(name: str) -> int:
    """This process's resident memory, now (VmRSS) or at its peak (VmHWM), in bytes."""
    return 1024 * int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def test_another_process_needs_no_memory_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = config_of(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=4000)
    policy = PolicyConfig(model="m")
    loaded = loading.policy_without_weights(wide, policy)
    outline = handover._outline(loaded)
    monkeypatch.setattr(handover, "on_main_process", lambda action: (outline, "padded"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    given = (pytest.fail, policy, TOKENIZER, arguments("bf16"))
    scorer = load_in_main_process(lambda: pytest.fail("loaded"), *given)  # type: ignore[arg-type]
    weights = sum(parameter.nbytes for parameter in scorer.model.parameters())
    assert weights > 400 * 2**20
    assert memory("VmHWM") - before < 40 * 2**20
    # Content would show.
    scorer.model.lm_head.weight.data.fill_(1)
    assert memory("VmHWM") - before > scorer.model.lm_head.weight.nbytes * 0.9


def test_states_that_the_check_leaves_in_modules_are_not_handed_on(hand_over: Callable[..., tuple[Any, Any]]) -> None:
    """RecurrentGemma keeps the states of its last batch, which a model without weights does not have."""

    def leave(model: Any) -> None:
        model.model.layers[0].state = torch.zeros(1)

    main, other = hand_over(PolicyConfig(model="m"), transformers.LlamaForCausalLM(config_of()), leave=leave)
    assert [hasattr(each.model.layers[0], "state") for each in (main, other)] == [True, False]


def test_a_head_that_the_config_ties_and_the_files_do_not_is_refused(hand_over: Callable[..., tuple[Any, Any]]) -> None:
    """The library loads it untied, and accelerate would tie it: in one process before it shards, in another after."""
    model = transformers.LlamaForCausalLM(config_of(tie_word_embeddings=True))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ConfigError, match=r"the tie of lm_head\.weight and model\.embed_tokens\.weight is not in both"):
        hand_over(PolicyConfig(model="m"), model)


@pytest.mark.parametrize("is_main", [True, False])
def test_a_policy_that_others_can_not_make_is_refused_by_all(monkeypatch: pytest.MonkeyPatch, is_main: bool) -> None:
    model = transformers.LlamaForCausalLM(config_of())
    outline = dataclasses.replace(handover._outline(model), model_config=config_of(num_hidden_layers=1))
    monkeypatch.setattr(handover, "on_main_process", lambda action: action() if is_main else (outline, "padded"))
    monkeypatch.setattr(handover, "largest", lambda value: 1)
    reason = "another process says why" if is_main else r"model.layers.1.input_layernorm.weight is not in both"
    with pytest.raises(ConfigError, match=rf"cpu_ram_efficient_loading: must be false for this policy.*{reason}"):
        load_in_main_process(
            lambda: model,
            lambda loaded: SimpleNamespace(model=loaded, reading="padded"),  # type: ignore[arg-type, return-value]
            PolicyConfig(model="m"),
            TOKENIZER,
            arguments(),
        )
