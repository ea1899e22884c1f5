"""The parts of a model, whatever name its class declares for them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from pipeline.models.parts import backbone_of, causal_of
from support.models import GROUPED

TEXT = {**GROUPED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0]}


def make(name: str) -> Any:
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    if name == "llama4":
        return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**TEXT))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


@pytest.mark.parametrize(("name", "part"), [("llama", "model"), ("gpt2", "transformer"), ("llama4", "model")])
def test_the_backbone_is_found_under_an_adapter_too(name: str, part: str) -> None:
    causal = make(name)
    backbone = getattr(causal, part)
    assert causal_of(causal) is causal and backbone_of(causal) is backbone
    adapted = peft.get_peft_model(causal, peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=name == "gpt2"))
    assert causal_of(adapted) is causal and backbone_of(causal_of(adapted)) is backbone


def test_a_model_that_is_all_in_one_has_no_backbone() -> None:
    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.embeddings = [torch.nn.Embedding(2, 2)]

        @property
        def base_model(self) -> Any:
            return self

        def get_input_embeddings(self) -> Any:
            return self.embeddings[0]

    with pytest.raises(LookupError, match="Whole"):
        backbone_of(Whole())


def test_the_text_part_of_a_multimodal_llama4_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    torch.manual_seed(0)
    whole = transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(text_config=TEXT, vision_config=vision)
    ).eval()
    whole.save_pretrained(tmp_path)
    text, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(text(input_ids=ids).logits, whole(input_ids=ids).logits)
        assert text.lm_head(backbone_of(text)(ids).last_hidden_state).shape == (1, 17, GROUPED["vocab_size"])
