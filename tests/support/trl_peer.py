"""TRL's DPOTrainer with its reference in memory: the peer that training on shards is compared with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trl_trainer(
    model: Path,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    reference: Any,
    lora: Mapping[str, Any] | None = None,
    held_out: Sequence[Mapping[str, Any]] | None = None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    **settings: Any,
) -> trl.DPOTrainer:
    """Make the trainer of a saved model; `settings` are DPOConfig's, `lora` is our section."""
    adapter = {"r": lora["r"], "lora_alpha": lora["alpha"], "target_modules": lora["target_modules"]} if lora else None
    return trl.DPOTrainer(
        model=load(model),
        ref_model=reference,
        args=trl.DPOConfig(bf16=False, gradient_checkpointing=False, **settings),
        train_dataset=datasets.Dataset.from_list(list(rows)),
        eval_dataset=datasets.Dataset.from_list(list(held_out)) if held_out else None,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **adapter) if adapter else None,
        callbacks=list(callbacks),
    )


class CaptureWeights(transformers.TrainerCallback):
    """Keeps the weights that each step starts with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
