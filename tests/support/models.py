"""Tiny models and tokenizers; everything is made here, nothing is fetched."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)

CORPUS = [
    "Human: how do I bake bread? Assistant: mix flour, water, salt and yeast; wait; bake it hot.",
    "The quick brown fox jumps over the lazy dog. What is two plus two? Four! Or, if you insist, 5.",
    "I'm sorry, but I can't help with that. Sure, here is what you asked for: one, two, three.",
    "Review the film called The Silent River. The acting felt dull. I would happily recommend it.",
]

VOCABULARY = 97

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Sharp enough that log-probs differ by nats, and that softcaps and scales are felt.
    "initializer_range": 0.3,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
"""Settings of a decoder whose heads share keys and values, for any family that takes them"""


def make_tokenizer(*, bos: bool = False, auto_eos: bool = False, template: str | None = None) -> Any:
    """A byte-level BPE tokenizer of 400 tokens; merges across spaces and punctuation as trained."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos or auto_eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if auto_eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def make_model(folder: Path, tokenizer: Any, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random Llama of about 0.1 million parameters, sharp enough that its log-probs differ by nats."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    transformers.set_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
