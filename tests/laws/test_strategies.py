"""Who the reference is: explicit, quantized, with an adapter, or the policy's own weights under any kind of adapter."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from pipeline.config.reader import load_config
from pipeline.models.loading import load_policy, load_reference
from pipeline.scoring.forward import prepare, score
from pipeline.scoring.packing import pad_pairs
from pipeline.store.store import open_store
from support.models import make_model
from support.runs import kept, logged_steps, refshard, simple_rows
from support.stores import stored_rows

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]

PASSED = "Parity gate: the policy before its first step is the reference"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4}},
    "dora": {"lora": {"r": 4, "dora": True}},
    "rslora": {"lora": {"r": 4, "rslora": True, "dropout": 0.1}},
    "modules_to_save": {"lora": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}},
    "ia3": {"ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
}


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in logged_steps(output)]


def stored_sums(store: Path) -> np.ndarray[Any, Any]:
    """[2P] chosen and then rejected sums, in the rows' order."""
    rows = stored_rows(store)
    return np.array([row[f"ref_{side}_logps"] for side in ("chosen", "rejected") for row in rows])


def sums_of(model: Any, config_file: Path) -> np.ndarray[Any, Any]:
    """What a prepared model gives the config's pairs, [2P]."""
    batch = pad_pairs([pair.pair for pair in kept(load_config(config_file))], pad_id=0)
    with torch.no_grad():
        return torch.cat(score(model, batch).sums()).numpy()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_starts_as_the_reference_and_gives_it_back_when_off(
    make_run: MakeRun, tmp_path: Path, kind: str
) -> None:
    config = make_run(policy=ADAPTERS[kind], train={"max_steps": 5, "learning_rate": "5e-2", "optim": "adamw_torch"})
    refshard("precompute", "--config", config)
    done = refshard("train", "--config", config)
    assert PASSED in done.stdout
    found = losses(tmp_path / "policy")
    assert found[0] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(found[-1] - np.log(2)) > 1e-3

    card = (tmp_path / "policy" / "README.md").read_text()
    assert "| trained weights | all |" not in card
    assert f"`{'IA3' if kind == 'ia3' else 'LoRA'}, " in card

    continued = ["policy.lora=null", "policy.ia3=null", f"policy.adapter={tmp_path / 'policy'}"]
    policy = load_policy(load_config(config, continued)).eval()
    prepare(policy)
    on = sums_of(policy, config)
    with policy.disable_adapter():
        off = sums_of(policy, config)
    stored = stored_sums(tmp_path / "shards" / "train")
    np.testing.assert_allclose(off, stored, atol=2e-4)
    assert np.abs(on - stored).max() > 0.05


def test_an_adapter_of_the_reference_alone_is_scored_with_it(
    make_run: MakeRun, tmp_path: Path, model_folder: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    config = make_run(reference={"adapter": str(tmp_path / "adapter")})
    refshard("precompute", "--config", config)
    prepare(adapted.eval())
    np.testing.assert_allclose(stored_sums(tmp_path / "shards" / "train"), sums_of(adapted, config), atol=2e-4)
    # The policy is the base alone, so nothing must be equal, and nothing is compared.
    done = refshard("train", "--config", config)
    assert "Parity gate" not in done.stdout
    assert abs(losses(tmp_path / "policy")[0] - np.log(2)) > 1e-3


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_quantized_weights_has_the_same_weights_for_its_reference(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any, bits: int
) -> None:
    """QLoRA: the reference is the quantized base, so training starts at ln 2, and other bits are another reference."""
    model = make_model(tmp_path / "model", tokenizer, hidden_size=64, intermediate_size=128)
    quantized = {"model": str(model), "quantization": {"bits": bits}, "lora": {"r": 4}}
    config = make_run(rows=simple_rows(12), policy=quantized, train={"learning_rate": "2e-2"})
    refshard("precompute", "--config", config)
    identity = open_store(tmp_path / "shards" / "train").manifest["identity"]["reference"]
    assert identity["quantization"] == {"bits": bits, "type": "nf4", "double": False}
    done = refshard("train", "--config", config)
    assert PASSED in done.stdout
    found = losses(tmp_path / "policy")
    # 8-bit products round activations batch by batch.
    assert found[0] == pytest.approx(np.log(2), abs=1e-5 if bits == 4 else 2e-2)
    assert abs(found[-1] - np.log(2)) > 1e-3
    plain = refshard("train", "--config", config, "-o", "policy.quantization=null", "--overwrite", check=78)
    assert "reference.quantization" in plain.stderr


@needs_bitsandbytes
def test_a_quantized_reference_serves_a_policy_in_full_precision(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any
) -> None:
    model = make_model(tmp_path / "model", tokenizer, hidden_size=64, intermediate_size=128)
    config = make_run(policy={"model": str(model)}, reference={"quantization": {"bits": 4, "double": True}})
    refshard("precompute", "--config", config)
    loaded = load_reference(load_config(config), torch.device("cpu"))
    prepare(loaded)
    assert {type(m).__name__ for m in loaded.modules()} >= {"Linear4bit"}
    np.testing.assert_allclose(stored_sums(tmp_path / "shards" / "train"), sums_of(loaded, config), atol=1e-3)
    refshard("train", "--config", config)
    assert abs(losses(tmp_path / "policy")[0] - np.log(2)) > 1e-4
