"""A merged model, saved and loaded as any other, gives the log-probs of base and adapter."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config, Ia3Settings, LoraSettings, PolicyConfig, PrecomputeConfig, Quantization
from pipeline.models import merging
from pipeline.models.loading import load_policy
from pipeline.models.merging import dtype_of_base, load_merged
from support.models import make_model

IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))

FRESH: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraSettings(r=4)},
    "rslora": {"lora": LoraSettings(r=4, rslora=True)},
    "dora": {"lora": LoraSettings(r=4, dora=True)},
    "saved whole": {"lora": LoraSettings(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"])},
    "on embeddings": {"lora": LoraSettings(r=4, target_modules=["q_proj", "embed_tokens"])},
    "ia3": {"ia3": Ia3Settings()},
    "4 bits": {"lora": LoraSettings(r=4), "quantization": Quantization(bits=4)},
    "8 bits": {"lora": LoraSettings(r=4), "quantization": Quantization(bits=8)},
}


CHANGING_EMBEDDINGS = ("saved whole", "on embeddings")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[bool, Path]:
    """A bfloat16 model with a head of its own, and one whose head is its embeddings; wide enough to be quantized."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_key_value_heads": 4}
    made = {}
    for tied in (False, True):
        folder = make_model(tmp_path_factory.mktemp("base"), tokenizer, tie_word_embeddings=tied, **sizes)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        made[tied] = folder
    return made


def config_of(base: Path, **policy: Any) -> Config:
    return Config(
        data=DataConfig(path="unused"),
        policy=PolicyConfig(model=str(base), **policy),
        precompute=PrecomputeConfig(output="unused"),
    )


def trained(config: Config, folder: Path) -> Any:
    """Give the policy with an adapter that changes log-probs by nats, and save the adapter."""
    torch.manual_seed(0)
    policy = load_policy(config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    policy.save_pretrained(folder)
    return policy


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits.float(), dim=-1)


@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, False) for kind in FRESH), *((kind, True) for kind in ("lora", *CHANGING_EMBEDDINGS))]
)
def test_a_merged_model_gives_the_log_probs_of_base_and_adapter(
    kind: str, tied: bool, bases: dict[bool, Path], tmp_path: Path
) -> None:
    if "bits" in kind:
        pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    config = config_of(bases[tied], **FRESH[kind])
    policy = trained(config, tmp_path / "adapter")
    load_merged(config, tmp_path / "adapter", "float32").save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not hasattr(merged.config, "quantization_config")
    # Two matrices of the same size that differ can't be one.
    assert merged.config.tie_word_embeddings == (tied and kind not in CHANGING_EMBEDDINGS)
    # LLM.int8() rounds activations too.
    torch.testing.assert_close(logps(merged), logps(policy), atol=0.5 if kind == "8 bits" else 1e-4, rtol=0)
    with policy.disable_adapter():
        assert (logps(policy) - logps(merged)).abs().max() > 0.1


def test_each_weight_is_rounded_once(bases: dict[bool, Path], tmp_path: Path) -> None:
    """Also where the policy was trained in float32 on a bfloat16 checkpoint, which is loaded as it is."""
    config = config_of(bases[False], **FRESH["lora"])
    trained(config, tmp_path / "adapter")
    exact, rounded = (load_merged(config, tmp_path / "adapter", dtype) for dtype in ("float32", "bfloat16"))
    assert dtype_of_base(config) == "bfloat16" and rounded.dtype == torch.bfloat16
    for (name, wide), narrow in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(wide.to(torch.bfloat16), narrow), name


def test_a_policy_trained_on_rounded_weights_is_merged_into_those(bases: dict[bool, Path], tmp_path: Path) -> None:
    wide = transformers.AutoModelForCausalLM.from_pretrained(bases[False], dtype=torch.float32)
    with torch.no_grad():
        wide.model.layers[0].mlp.up_proj.weight += 1e-4
    wide.save_pretrained(tmp_path / "wide")
    config = config_of(tmp_path / "wide", lora=LoraSettings(r=4, target_modules=["q_proj"]), dtype="bfloat16")
    policy = trained(config, tmp_path / "adapter")
    merged = load_merged(config, tmp_path / "adapter", "float32")
    in_policy = policy.get_base_model().model.layers[0].mlp.up_proj.weight
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, in_policy.float())


def test_a_checkpoint_whose_config_names_a_narrower_dtype_than_its_files_is_not_rounded(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    wide = transformers.AutoModelForCausalLM.from_pretrained(bases[False], dtype=torch.float32)
    with torch.no_grad():
        wide.model.layers[0].mlp.up_proj.weight += 1e-4
    wide.save_pretrained(tmp_path / "wide")
    file = tmp_path / "wide" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    config = config_of(tmp_path / "wide", lora=LoraSettings(r=4, target_modules=["q_proj"]))
    trained(config, tmp_path / "adapter")
    merged = load_merged(config, tmp_path / "adapter", "float32")
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, wide.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(("dtype", "loaded"), [("float32", "bfloat16"), ("float16", "float16"), ("auto", "bfloat16")])
def test_only_for_a_policy_in_float32_a_checkpoint_may_stay_narrower(
    dtype: str, loaded: str, bases: dict[bool, Path], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert merging._loaded_in(config_of(bases[False], lora=LoraSettings(), dtype=dtype), tmp_path) == loaded


def test_a_weight_that_float16_can_not_hold_is_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[False], dtype=torch.float32)
    with torch.no_grad():
        base.model.norm.weight[0] = 1e5
    base.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", **FRESH["lora"])
    trained(config, tmp_path / "adapter")
    with pytest.raises(
        ConfigError, match=r"^--dtype: must hold every weight, got float16, .* model\.norm\.weight are inf"
    ):
        load_merged(config, tmp_path / "adapter", "float16")
    assert load_merged(config, tmp_path / "adapter", "bfloat16").model.norm.weight[0] > 9e4


def test_a_saved_adapter_that_was_continued_is_merged_whole(bases: dict[bool, Path], tmp_path: Path) -> None:
    config = config_of(bases[False], **FRESH["dora"])
    trained(config, tmp_path / "first")
    continued = dataclasses.replace(
        config, policy=PolicyConfig(model=str(bases[False]), adapter=str(tmp_path / "first"))
    )
    policy = trained(continued, tmp_path / "second")
    merged = load_merged(continued, tmp_path / "second", "float32")
    torch.testing.assert_close(logps(merged), logps(policy), atol=1e-4, rtol=0)


def test_weights_that_are_not_finite_and_a_base_that_stays_quantized_are_refused(
    bases: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(bases[False], **FRESH["lora"])
    trained(config, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: weight * float("nan") for name, weight in weights.items()}, file)
    with pytest.raises(ConfigError, match=r"adapter .*can't be merged into its base: .*NaN"):
        load_merged(config, tmp_path / "adapter", "float32")

    class Quantized(torch.nn.Module):
        is_quantized, quantization_method = True, "gptq"

        def dequantize(self) -> Any:
            raise NotImplementedError("gptq has no implementation of `dequantize`")

    monkeypatch.setattr(merging, "load_base", lambda config, dtype: Quantized())
    with pytest.raises(
        ConfigError, match=r"^policy\.model: must be a model whose weights can be dequantized, got .*gptq"
    ):
        load_merged(config, tmp_path / "adapter", "float32")


def test_an_adapter_of_another_kind_is_merged_too(bases: dict[bool, Path], tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[False], dtype=torch.float32)
    settings = peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "loha")
    config = config_of(bases[False], adapter=str(tmp_path / "loha"))
    merged = load_merged(config, tmp_path / "loha", "float32")
    torch.testing.assert_close(logps(merged), logps(load_policy(config).eval()), atol=1e-4, rtol=0)
