"""Estimates against what the library's own models have, keep and compute, and against closed forms."""

import dataclasses
from typing import Any, Literal

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from pipeline.base.errors import ConfigError
from pipeline.config.data import DataConfig
from pipeline.config.schema import (
    Config,
    LoraSettings,
    PolicyConfig,
    PrecomputeConfig,
    Quantization,
    ReferenceConfig,
    SyncConfig,
)
from pipeline.config.training import TrainSection
from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.forward import prepare, score
from pipeline.scoring.packing import pad_pairs
from stages.check.estimate import UTILISATION, Estimate, Lengths, estimate
from stages.check.hardware import Hardware, hardware_named
from stages.check.probe import Probe
from stages.check.shapes import Shapes, activation_bytes, forward_flops, shapes_of

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES, num_hidden_layers=3),
    "tied": transformers.Qwen2Config(**SIZES, num_hidden_layers=2, tie_word_embeddings=True),
    "experts": transformers.MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2),
    "not gated": transformers.GPT2Config(vocab_size=200, n_embd=64, n_layer=2, n_head=4),
}
LENGTHS = Lengths(
    pairs=1000, prompt_tokens=200_000, chosen_tokens=100_000, rejected_tokens=60_000, longest_pair=900, usual_pair=700
)
# About what a model of 8 billion parameters has, in round numbers.
EIGHT = Shapes(
    layers=32,
    hidden=4096,
    intermediate=14336,
    query=4096,
    key_value=1024,
    vocabulary=128_256,
    parameters=8_000_000_000,
    layer_parameters=7_000_000_000,
    active_parameters=7_000_000_000,
    trained_parameters=8_000_000_000,
)
ADAPTER: dict[str, int] = {"trained_parameters": 40_000_000, "rank": 16}


def make_config(policy: dict[str, Any] | None = None, precompute: dict[str, Any] | None = None, **train: Any) -> Config:
    return Config(
        data=DataConfig(path="x"),
        policy=PolicyConfig(model="m", **(policy or {})),
        precompute=PrecomputeConfig(output="o", **(precompute or {})),
        train=TrainSection(output_dir="o", given={key: str(value) for key, value in train.items()}),
    )


def made(config: Config, hardware: str = "h100-80gb", lengths: Lengths = LENGTHS, **changes: Any) -> Estimate:
    return estimate(config, Shapes(**{**vars(EIGHT), **changes}), lengths, hardware_named(hardware))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_weights_as_the_library_has_them(family: str) -> None:
    settings = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(settings)
    shapes = shapes_of(settings)
    assert shapes.parameters == shapes.trained_parameters == sum(p.numel() for p in model.parameters())
    layers = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    assert shapes.layer_parameters == sum(p.numel() for p in layers.parameters())
    head = 0 if family in ("tied", "not gated") else model.get_output_embeddings().weight.numel()
    products = [p for name, p in layers.named_parameters() if p.dim() == 2 and "gate.weight" not in name]
    assert shapes.product_parameters == head + sum(p.numel() for p in products)
    assert shapes.head_parameters == head
    # Of four experts two are passed, each with three matrices.
    idle = 2 * 2 * 3 * 128 * 352 if family == "experts" else 0
    assert shapes.layer_parameters - shapes.active_parameters == idle


def test_the_parameters_of_a_known_model_and_adapter_are_those_that_are_published() -> None:
    settings = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    assert shapes_of(settings).parameters == 494_032_768
    shapes = shapes_of(FAMILIES["llama"], PolicyConfig(model="m", lora=LoraSettings(r=4)))
    # Each factor pair has rank times the sum of both widths.
    widths = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 352)
    assert (shapes.trained_parameters, shapes.rank) == (3 * 4 * widths, 4)


def _saved(dtype: torch.dtype, layers: int, *, lora: bool, autocast: bool) -> float:
    """Bytes that one token of a pair leaves for backward, weights and their copies aside."""
    settings = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers)
    model: Any = transformers.LlamaForCausalLM(settings).to(dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    prepare(model)
    sides = [[3 + (step * i) % 90 for i in range(100)] for step in (1, 3, 7)]
    pair = TokenizedPair(prompt_ids=sides[0], chosen_ids=sides[1], rejected_ids=sides[2])
    # A packed row keeps as much on a GPU; on a CPU its attention copies the prompt's keys and values.
    batch = pad_pairs([pair], 0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(reversed(p.shape)) for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        score(model, batch)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / batch.input_ids.numel()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("weights", "autocast"), [("float32", False), ("float32", True), ("bfloat16", False)], ids=["32", "mixed", "16"]
)
def test_a_layer_keeps_for_backward_what_is_estimated(
    weights: Literal["float32", "bfloat16"], autocast: bool, lora: bool
) -> None:
    settings = transformers.LlamaConfig(**SIZES, num_hidden_layers=1)
    shapes = shapes_of(settings, PolicyConfig(model="m", lora=LoraSettings(r=8) if lora else None))
    one, two = (_saved(getattr(torch, weights), n, lora=lora, autocast=autocast) for n in (1, 2))
    assert activation_bytes(shapes, weights, autocast=autocast) == pytest.approx(two - one, rel=0.08)


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_operations_are_those_that_torch_counts(family: str) -> None:
    settings = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(64)[None])
    # The library's whole square of scores: each token meets all 64.
    estimated = forward_flops(shapes_of(settings), 64, 64, 64)
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_full_training_takes_sixteen_bytes_a_parameter_and_fsdp_shares_them() -> None:
    """Weights, gradients and AdamW's two moments in float32: ZeRO, arXiv 1910.02054, section 3.1."""
    alone = made(make_config()).train
    assert alone is not None
    state = {name: alone.memory[name] for name in ("weights", "gradients", "optimizer")}
    assert state == {"weights": 32 * 10**9, "gradients": 32 * 10**9, "optimizer": 64 * 10**9}
    shared = made(make_config(fsdp="true", bf16="true"), "8xh100-80gb").train
    assert shared is not None
    assert {name: shared.memory[name] for name in state} == {name: size / 8 for name, size in state.items()}
    replicated = made(make_config(), "8xh100-80gb").train
    assert replicated is not None
    assert {name: replicated.memory[name] for name in state} == state
    assert replicated.memory["buckets of DDP"] == 32 * 10**9


@pytest.mark.parametrize(
    ("optim", "expected"), [("adamw_torch", 64), ("sgd", 0), ("adamw_bnb_8bit", 16), ("adafactor", 0), ("adagrad", 32)]
)
def test_an_optimizer_has_the_states_that_it_has(optim: str, expected: int) -> None:
    train = made(make_config(optim=optim)).train
    assert train is not None
    assert train.memory.get("optimizer", 0) == expected * 10**9


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_weights_in_four_bits_and_an_adapter(double: bool, bits: float) -> None:
    """QLoRA, arXiv 2305.14314, section 3: 0.5 bits a weight for scales, 0.127 with scales quantized in turn."""
    quantized = {"quantization": Quantization(bits=4, double=double), "lora": LoraSettings(), "dtype": "bfloat16"}
    both = made(make_config(quantized), **ADAPTER)
    outside, adapter = 2 * 10**9, 4 * 40 * 10**6
    assert both.train is not None
    assert both.train.memory["weights"] == pytest.approx(7e9 * bits / 8 + outside + adapter, rel=1e-3)
    assert both.train.memory["optimizer"] == 2 * adapter
    assert both.precompute.memory["weights"] == pytest.approx(7e9 * bits / 8 + outside, rel=1e-3)


def test_checkpointing_keeps_a_layers_input_and_computes_once_more() -> None:
    plain, again = (made(make_config(gradient_checkpointing=on)).train for on in ("false", "true"))
    assert plain is not None and again is not None
    assert again.memory["activations"] < plain.memory["activations"] / 5
    # Forward is a third of a step's work in the layers.
    assert 1.2 < again.flops / plain.flops < 4 / 3


def test_work_is_six_operations_a_weight_and_token_and_divides_among_gpus() -> None:
    """arXiv 2001.08361, section 2.1, for the layers; the head sees completions alone, and runs forward twice."""
    short = Lengths(
        pairs=1000, prompt_tokens=2000, chosen_tokens=2000, rejected_tokens=2000, longest_pair=6, usual_pair=6
    )
    one = made(make_config(num_train_epochs=2, bf16="true"), "h100-80gb", short).train
    four = made(make_config(num_train_epochs=2, bf16="true"), "4xh100-80gb", short).train
    assert one is not None and four is not None and one.seconds is not None and four.seconds is not None
    layers, head = 2 * 4000 * 6 * 7e9, 2 * 4000 * 8 * 128_256 * 4096
    assert one.flops == pytest.approx(layers + head, rel=1e-3)
    assert one.seconds[1] == pytest.approx(one.flops / (989e12 * UTILISATION[1]))
    assert four.seconds[1] == pytest.approx(one.seconds[1] / 4)
    assert one.seconds[0] < one.seconds[1] < one.seconds[2]
    assert (one.steps, four.steps) == (250, 64)


def test_a_measured_speed_takes_the_place_of_the_assumed_one() -> None:
    measured = estimate(make_config(), EIGHT, LENGTHS, hardware_named("24GB"), probe=Probe(2e9, 1e9))
    assert measured.train is not None
    assert measured.train.seconds is not None and measured.precompute.seconds is not None
    assert measured.train.seconds[1] == pytest.approx(measured.train.flops / 0.9e9)
    assert measured.precompute.seconds[1] == pytest.approx(measured.precompute.flops / 1.8e9)
    unknown = made(make_config(), "24GB")
    assert unknown.precompute.seconds is None


def moving(steps: int, policy: dict[str, Any] | None = None, **train: Any) -> Config:
    return dataclasses.replace(make_config(policy, **train), reference=ReferenceConfig(sync=SyncConfig(steps=steps)))


@pytest.mark.parametrize(
    ("window", "train", "passes"),
    [
        (25, {"num_train_epochs": 3}, 3),
        # Four steps of eight pairs, of 1000; so many more that the pairs of an epoch are there several times.
        (2, {"max_steps": 4}, 4 / 125),
        (512, {"num_train_epochs": 3}, 1),
    ],
)
def test_a_reference_that_moves_scores_each_windows_pairs_once(
    window: int, train: dict[str, Any], passes: float
) -> None:
    windows, still = made(moving(window, **train)).precompute, made(make_config(**train)).precompute
    assert windows.flops == pytest.approx(passes * still.flops)
    assert windows.tokens == pytest.approx(passes * still.tokens, abs=1)


def test_held_out_pairs_are_scored_in_each_window_that_evaluates() -> None:
    # Of 125 steps in windows of 25: at 50, 100 and, the last window, 125.
    config = moving(25, num_train_epochs=1, eval_strategy="steps", eval_steps=50)
    found = estimate(config, EIGHT, LENGTHS, hardware_named("h100-80gb"), held_out=LENGTHS)
    assert found.precompute.tokens == 4 * LENGTHS.packed_tokens


def test_a_reference_that_moves_has_one_process_on_one_gpu() -> None:
    one, eight = (made(moving(25), hardware) for hardware in ("h100-80gb", "8xh100-80gb"))
    assert (one.precompute, one.train, one.host_memory) == (eight.precompute, eight.train, eight.host_memory)


@pytest.mark.parametrize(
    ("policy", "steps", "limit", "copies"),
    [
        # 500 steps in windows of 100, the last of them not followed by a move; all are kept, or those of two
        # checkpoints and the next.
        ({}, 500, None, 4),
        ({}, 500, 2, 3),
        ({}, 200, 2, 2),
        ({}, 100, 2, 0),
        ({"lora": LoraSettings()}, 500, 2, 4),
    ],
)
def test_moved_references_are_on_the_disk_in_float32(
    policy: dict[str, Any], steps: int, limit: int | None, copies: int
) -> None:
    train = {"max_steps": steps} | ({} if limit is None else {"save_total_limit": limit})
    changes = ADAPTER if policy else {}
    disk = made(moving(100, policy, **train), **changes).disk
    assert disk["moved references"] == copies * 32 * 10**9
    assert "moved references" not in made(make_config(policy, **train), **changes).disk


def test_one_model_over_several_gpus_is_divided_and_workers_each_have_it_whole() -> None:
    workers, turns, split = (
        made(
            dataclasses.replace(make_config(None, plan), reference=ReferenceConfig(dtype="bfloat16")), "8xa100-80gb"
        ).precompute
        for plan in ({}, {"device_map": "auto"}, {"tp_plan": "auto"})
    )
    assert workers.memory["weights"] == 16 * 10**9
    assert turns.memory["weights"] == 2 * 10**9
    # Layers alone are split: embedding and head are whole in each process.
    assert split.memory["weights"] == 14 * 10**9 / 8 + 2 * 10**9
    # One GPU works at a time where layers take turns, all of them otherwise.
    assert workers.seconds is not None and turns.seconds is not None and split.seconds is not None
    assert turns.seconds[1] == pytest.approx(8 * workers.seconds[1])
    assert split.seconds[1] == pytest.approx(workers.seconds[1])


def test_a_reference_under_autocast_has_products_in_16_bits_and_the_rest_in_float32() -> None:
    head = EIGHT.vocabulary * EIGHT.hidden
    products: dict[str, int] = {"product_parameters": EIGHT.layer_parameters + head, "head_parameters": head}
    plain, under = (made(make_config(bf16=bf16), "h100-80gb", **products).precompute for bf16 in ("false", "true"))
    assert plain.memory["weights"] == 32 * 10**9
    assert under.memory["weights"] == 32 * 10**9 - 2 * products["product_parameters"]
    assert "copies of weights" not in plain.memory | under.memory
    # A tied head is cast in each forward pass.
    tied = made(make_config(bf16="true"), product_parameters=EIGHT.layer_parameters).precompute
    assert tied.memory["copies of weights"] == 2 * head
    assert plain.seconds is not None and under.seconds is not None
    assert under.seconds[1] < plain.seconds[1] / 2


def test_a_process_holds_python_and_its_imports_beside_the_model() -> None:
    cpu = Hardware(name="cpu", memory=64 * 10**9, is_gpu=False)
    config = dataclasses.replace(make_config(), reference=ReferenceConfig(dtype="float32"))
    found = estimate(config, EIGHT, LENGTHS, cpu)
    assert found.train is not None
    for stage in (found.precompute, found.train):
        assert 0.4e9 < stage.memory["Python and torch"] < 0.7e9
    eight = made(make_config(), "8xh100-80gb").host_memory
    assert eight == 8 * found.host_memory and 0.4e9 < found.host_memory - 32 * 10**9 < 0.7e9


@pytest.mark.parametrize(
    ("policy", "options", "weights"),
    [
        ({}, {"fsdp": "true"}, 32 * 10**9),
        ({"dtype": "bfloat16"}, {"fsdp": "true"}, 16 * 10**9),
        # FSDP trains float32 weights under mixed precision.
        ({"dtype": "bfloat16"}, {"fsdp": "true", "bf16": "true"}, 32 * 10**9),
        ({"dtype": "bfloat16"}, {"bf16": "true"}, 8 * 16 * 10**9),
        ({}, {"fsdp": "true", "fsdp_config": {"cpu_ram_efficient_loading": False}}, 8 * 32 * 10**9),
        ({}, {"fsdp": "true", "fsdp_config": {"cpu_ram_efficient_loading": "off"}}, 8 * 32 * 10**9),
    ],
)
def test_under_fsdp_one_process_loads_the_policy(policy: dict[str, Any], options: dict[str, Any], weights: int) -> None:
    # As read from a file, where a mapping is no text.
    section = TrainSection(output_dir="o", given=options)
    config = dataclasses.replace(make_config(policy), train=section)
    programs = made(config, "8xh100-80gb").host_memory - weights
    assert 8 * 0.4e9 < programs < 8 * 0.7e9


def test_stage_one_is_charged_for_the_pairs_that_it_has_still_to_score() -> None:
    def left(*unscored: float) -> Estimate:
        sets = [dataclasses.replace(LENGTHS, unscored=share) for share in unscored]
        return estimate(make_config(), EIGHT, sets[0], hardware_named("h100-80gb"), held_out=sets[1])

    whole, quarter, none = left(1, 1), left(0.5, 0), left(0, 0)
    assert quarter.precompute.flops == pytest.approx(whole.precompute.flops / 4)
    assert quarter.precompute.tokens == whole.precompute.tokens / 4
    assert none.precompute.tokens == 0 and none.precompute.seconds == (0, 0, 0)
    assert none.train == whole.train


def test_the_last_batch_of_an_epoch_is_not_filled() -> None:
    one = Lengths(pairs=1, prompt_tokens=4, chosen_tokens=4, rejected_tokens=4, longest_pair=12, usual_pair=12)
    train = made(make_config(max_steps=250, per_device_train_batch_size=16), lengths=one).train
    assert train is not None and train.tokens == 250 * one.packed_tokens


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({"eval_strategy": "steps", "eval_steps": 50}, 5),
        ({"eval_strategy": "steps", "eval_steps": 60}, 4),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, 4),
        # 240 steps are an epoch of 125 and part of another.
        ({"eval_strategy": "epoch"}, 2),
        ({}, 1),
        ({"eval_strategy": "no"}, 0),
    ],
)
def test_evaluations_are_those_that_stage_two_makes_the_one_at_its_end_among_them(
    settings: dict[str, Any], evaluations: int
) -> None:
    config = make_config(max_steps=240, **settings)
    alone = estimate(config, EIGHT, LENGTHS, hardware_named("h100-80gb"))
    found = estimate(config, EIGHT, LENGTHS, hardware_named("h100-80gb"), held_out=LENGTHS)
    assert found.train is not None and alone.train is not None
    assert found.train.tokens - alone.train.tokens == evaluations * LENGTHS.packed_tokens


def test_checkpoints_are_counted_as_they_are_kept() -> None:
    pairs = Lengths(**{**vars(LENGTHS), "pairs": 8000})
    whole = 12 * 8 * 10**9
    for settings, saves in (
        ({"num_train_epochs": 1}, 2),
        ({"num_train_epochs": 1, "save_strategy": "no"}, 0),
        ({"num_train_epochs": 3, "save_strategy": "epoch"}, 3),
        ({"num_train_epochs": 3, "save_total_limit": 2}, 3),
    ):
        assert made(make_config(**settings), lengths=pairs).disk["checkpoints"] == saves * whole
    adapter = made(make_config({"lora": LoraSettings()}, num_train_epochs=1), lengths=pairs, **ADAPTER)
    assert adapter.disk["checkpoints"] == 2 * 12 * 40 * 10**6


@pytest.mark.parametrize(
    ("text", "label", "memory"),
    [("8xH100-80GB", "8x h100-80gb", 80), ("t4-16gb", "t4-16gb", 16), ("2x24GB", "2x 24gb", 24)],
)
def test_hardware_is_read_as_people_write_it(text: str, label: str, memory: int) -> None:
    found: Hardware = hardware_named(text)
    assert (found.label, found.memory) == (label, memory * 10**9)


@pytest.mark.parametrize("text", ["h100", "0xt4-16gb", "xt4-16gb", "-2xt4-16gb", ""])
def test_unknown_hardware_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ConfigError, match=r"at least one device|a100-40gb"):
        hardware_named(text)
