"""Name the right key for one that other trainers use, or for a misspelled one."""

from collections.abc import Sequence

from pipeline.base.errors import did_you_mean, nearest
from pipeline.config.library import fields_of_training

__all__ = ["NAMES_ELSEWHERE", "NOT_NEEDED", "hint_for_key", "hint_for_value"]

NAMES_ELSEWHERE = {
    # The policy, in TRL's ModelConfig, PEFT, LLaMA-Factory and axolotl.
    "policy.model": ("base_model", "model", "model_name", "model_name_or_path", "pretrained_model_name_or_path"),
    "policy.revision": ("model_revision",),
    "policy.adapter": ("adapter", "adapter_name_or_path", "lora_model_dir", "peft_model"),
    "policy.lora": ("peft", "peft_config", "use_lora", "use_peft"),
    "policy.lora.r": ("lora_r", "lora_rank", "rank"),
    "policy.lora.alpha": ("alpha", "lora_alpha"),
    "policy.lora.dropout": ("dropout", "lora_dropout"),
    "policy.lora.target_modules": ("lora_target", "lora_target_linear", "lora_target_modules", "target_modules"),
    "policy.lora.modules_to_save": ("additional_target", "lora_modules_to_save", "modules_to_save"),
    "policy.lora.rslora": ("peft_use_rslora", "use_rslora"),
    "policy.lora.dora": ("peft_use_dora", "use_dora"),
    "policy.dtype": ("torch_dtype",),
    "policy.quantization.bits": ("load_in_4bit", "load_in_8bit", "quantization_bit"),
    "policy.quantization.type": ("bnb_4bit_quant_type", "quantization_type"),
    "policy.quantization.double": ("bnb_4bit_use_double_quant", "double_quantization", "use_bnb_nested_quant"),
    # The reference.
    "reference.model": ("ref_model", "ref_model_name_or_path", "reference_model"),
    "reference.adapter": ("ref_adapter_name", "ref_model_adapters", "reference_adapter"),
    "reference.quantization.bits": ("ref_model_quantization_bit",),
    "reference.sync": ("sync_ref_model",),
    "reference.sync.steps": ("ref_model_sync_steps",),
    "reference.sync.mixup_alpha": ("ref_model_mixup_alpha",),
    "precompute.tokens_per_batch": ("precompute_batch_size", "precompute_ref_batch_size"),
    # The data.
    "data.path": ("dataset", "dataset_dir", "dataset_name", "datasets", "train_file"),
    "data.name": ("dataset_config", "dataset_config_name"),
    "data.split": ("dataset_split", "dataset_train_split"),
    "data.eval": ("dataset_test_split", "eval_dataset", "test_datasets", "val_set_size", "val_size"),
    "data.streaming": ("dataset_streaming",),
    "data.max_length": (
        *("cutoff_len", "max_completion_length", "max_length", "max_prompt_length", "max_seq_length", "max_seq_len"),
        *("model_max_length", "sequence_len"),
    ),
    # The loss.
    "loss.beta": ("beta", "dpo_beta", "orpo_alpha", "pref_beta", "rl_beta"),
    "loss.type": ("loss_type", "pref_loss", "rl"),
    "loss.weights": ("dpo_ftx", "loss_weights", "pref_ftx", "rpo_alpha"),
    "loss.label_smoothing": ("dpo_label_smoothing", "label_smoothing"),
    "loss.use_weighting": ("dpo_use_weighting",),
    "loss.simpo_gamma": ("simpo_gamma",),
    "loss.cpo_alpha": ("cpo_alpha",),
    "loss.dpop_lambda": ("dpop_lambda",),
    # The training.
    "train.output_dir": ("output_dir",),
    "train.learning_rate": ("learning_rate", "lr"),
    "train.per_device_train_batch_size": (
        *("batch_size", "micro_batch_size", "per_device_batch_size", "per_device_train_batch_size"),
        *("per_gpu_train_batch_size", "train_batch_size"),
    ),
    "train.per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size"),
    "train.gradient_accumulation_steps": ("grad_accum", "gradient_accumulation", "gradient_accumulation_steps"),
    "train.num_train_epochs": ("epochs", "num_epochs", "num_train_epochs"),
    "train.max_steps": ("max_steps", "num_steps"),
    "train.optim": ("optimizer",),
    "train.lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "train.warmup_steps": ("warmup", "warmup_proportion", "warmup_ratio"),
    "train.max_grad_norm": ("grad_clip", "max_norm"),
    "train.eval_strategy": ("evaluation_strategy",),
    "train.eval_steps": ("evals_per_epoch",),
    "train.save_steps": ("saves_per_epoch",),
    "train.gradient_checkpointing": ("gradient_checkpointing",),
    "train.activation_offload": ("activation_offloading",),
    "train.report_to": ("use_wandb", "wandb_project"),
}
"""Keys by what TRL, PEFT, LLaMA-Factory and axolotl call them, and own keys that are looked for in another section"""

NOT_NEEDED = {
    "precompute_ref_log_probs": "stage one always does it",
    "finetuning_type": "policy.lora trains an adapter; without it all weights are trained",
    "stage": "refshard always trains with DPO",
    **dict.fromkeys(
        ("packing", "pad_to_multiple_of", "pad_to_sequence_len", "padding_free", "sample_packing"),
        "batches never have padding",
    ),
    **dict.fromkeys(
        ("attn_implementation", "flash_attention", "flash_attn"), "the attention is chosen by a check at load"
    ),
    **dict.fromkeys(
        ("chat_template", "template"), "the template in the folder of policy.model is used, so put yours there"
    ),
    "trust_remote_code": "no code of a model or dataset is run",
    "disable_dropout": "dropout is off in both models",
    "truncation_mode": "what is longer than data.max_length is cut at its end",
}
"""Other trainers' keys that have none here, with the reason"""

_PATHS = {name: path for path, names in NAMES_ELSEWHERE.items() for name in names}

_MORE = {"warmup_ratio": " A value below 1 is a share of all steps"}
"""Sentences on keys whose values are written otherwise here"""

_VALUES = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "float", "torch.float32"), "float32"),
    "dpo": "sigmoid",
}

_NOT_DPO = ("grpo", "kto", "kto_pair", "ppo")
"""Losses of other trainers that train without pairs"""


def hint_for_key(section: str, key: str, known: Sequence[str]) -> str:
    """Give a hint for an unknown key of a section (dotted, empty at the top): the right key, or the section's keys."""
    path = _PATHS.get(key)
    if path is not None and path != f"{section}.{key}":
        return f"; did you mean {path}?{_MORE.get(key, '')}"
    if key in NOT_NEEDED:
        return f"; {NOT_NEEDED[key]}. Leave it out"
    near = nearest(key, known)
    if near is None and section != "train" and key in fields_of_training():
        return f"; did you mean train.{key}?"
    return did_you_mean(key, known) if near is None else f"; did you mean {f'{section}.{near}'.removeprefix('.')}?"


def hint_for_value(value: object, choices: Sequence[str], where: str) -> str:
    """Give a sentence that names the choice which was meant; empty if none is near."""
    word = str(value).lower()
    if where == "loss.type" and word in _NOT_DPO:
        return f". {value} does not compare the completions of a pair, so it is not there. Choose one of these"
    meant = _VALUES.get(word)
    meant = meant if meant in choices else nearest(word, choices)
    return "" if meant is None else f". Set {where}: {meant}"
