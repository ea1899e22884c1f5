"""The random Llama that both sides load, and how fast this machine multiplies matrices of its shapes."""

import time
from typing import Any

import torch
import transformers
from workloads import PAD_ID, SEED, Workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(workload: Workload) -> Any:
    """Make the model from a seed, so that every process has the same weights and none is written to disk."""
    shape = workload.shape
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD_ID,
        bos_token_id=1,
        eos_token_id=2,
        # The library's loss types and caches are not used; the attention is its default on either side.
        use_cache=False,
    )
    transformers.set_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[workload.weight_dtype])
    try:
        with torch.device(workload.device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        # A normed hidden state has the length of sqrt(hidden): logits get a standard deviation of about 1, not the
        # 0.4 of the library's default, under which all tokens are nearly alike.
        model.get_output_embeddings().weight.normal_(std=shape.hidden**-0.5)
    return model


def matrix_rate(workload: Workload, seconds: float = 1.0) -> float:
    """Operations per second of the layers' widest product, rows of one token budget times the up projection."""
    shape, device, dtype = workload.shape, workload.device, DTYPES[workload.dtype]
    rows = min(workload.tokens_per_batch, 2048) if device == "cpu" else workload.tokens_per_batch
    x = torch.randn(rows, shape.hidden, device=device).to(dtype)
    weight = torch.randn(shape.intermediate, shape.hidden, device=device).to(dtype)
    operations = 2.0 * rows * shape.hidden * shape.intermediate

    def timed(count: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    with torch.inference_mode():
        timed(3)
        count = max(1, int(seconds / 8 / timed(3)))
        # The middle of eight: on a busy machine the fastest says little of the second in which the model ran.
        times = sorted(timed(count) for _ in range(8))
    return operations / times[len(times) // 2]
