"""Hidden states -> token logps, without logits.

The logits of N positions over a vocabulary of V are the largest tensor of a language model's step. Here they
exist for one chunk of positions at a time: forward keeps one number per position, backward computes each chunk
again and turns it into the gradient at once.
"""

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Head", "TokenStatistics", "head_of", "token_statistics"]

# Float32 logits of one chunk. Small enough to stay near the caches, large enough for an efficient product.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Head:
    """What turns a final hidden state h into logits: softcap(scale * (W h + b))."""

    weight: torch.Tensor
    """[vocabulary, hidden]"""
    bias: torch.Tensor | None
    """[vocabulary]"""
    scale: float = 1.0
    softcap: float | None = None
    """Logits are softcap * tanh(logits / softcap), as in Gemma 2."""


@dataclass(frozen=True)
class TokenStatistics:
    """What training logs about each of N scored tokens; only `logps` carries a gradient."""

    logps: torch.Tensor
    """[N] float32, natural log"""
    entropy: torch.Tensor
    """[N] float32, nats"""
    mean_logit: torch.Tensor
    """[N] float32, over the vocabulary"""
    is_top1: torch.Tensor
    """[N] bool, the token is the model's first choice"""
    log_sum_squares: torch.Tensor | None = None
    """[N] float32, log of the summed squares of all probabilities; None where it was not asked for"""


def head_of(model: Any) -> Head:
    """Read the head of a transformers causal language model, with its family's extras.

    Scales by family: Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, Granite and MiniCPM3
    divide by `logits_scaling`; Gemma caps with `final_logit_softcapping`.
    """
    config = model.config.get_text_config()
    # MPT has a `logit_scale` too, at times a word, which the library's forward takes no notice of.
    scale = None if config.model_type == "mpt" else getattr(config, "logit_scale", None)
    if scale is None:
        scale = getattr(config, "lm_head_multiplier", None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / config.logits_scaling
    embeddings = model.get_output_embeddings()
    return Head(
        weight=embeddings.weight,
        bias=getattr(embeddings, "bias", None),
        scale=1.0 if scale is None else float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def token_statistics(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, *, squares: bool = False
) -> TokenStatistics:
    """Score each position's target token.

    Products run in the dtype of autocast where it is on, else in that of `hidden`; log-sum-exp and all sums over
    the vocabulary in float32 (float64 for a float64 model).

    Args:
        hidden: Final hidden states of the predicting positions, [N, hidden].
        targets: The token each of them predicts, [N] int64.
        head: Output projection.
        squares: Also give `log_sum_squares`, which costs one more pass over each chunk.
    """
    logps, entropy, mean_logit, is_top1, log_sum_squares = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head.scale, head.softcap, squares
    )
    return TokenStatistics(logps, entropy, mean_logit, is_top1, log_sum_squares if squares else None)


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunk_positions(vocabulary: int) -> int:
    return max(16, _CHUNK_BYTES // (4 * vocabulary))


def _chunk_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """Logits of one chunk, [positions, vocabulary], in float32 or wider; operands in the product's dtype."""
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = torch.tanh(logits.div_(softcap)).mul_(softcap)
    return logits


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
        squares: bool,
    ) -> tuple[torch.Tensor, ...]:
        dtype = _product_dtype(hidden)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        h, w = hidden.to(dtype), weight.to(dtype)
        count = hidden.shape[0]
        logps, log_sums, entropy, mean_logit, log_sum_squares = (
            torch.full((count,), float("nan"), dtype=wide, device=hidden.device) for _ in range(5)
        )
        is_top1 = torch.zeros(count, dtype=torch.bool, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, count, _chunk_positions(weight.shape[0])):
                part = slice(start, start + _chunk_positions(weight.shape[0]))
                logits = _chunk_logits(h[part], w, bias, scale, softcap)  # [positions, vocabulary]
                target = targets[part, None]
                log_sum = torch.logsumexp(logits, dim=-1)
                log_sums[part] = log_sum
                logps[part] = logits.gather(1, target).squeeze(1) - log_sum
                mean_logit[part] = logits.mean(dim=-1)
                is_top1[part] = logits.argmax(dim=-1) == target.squeeze(1)
                # Entropy = log-sum-exp minus the mean logit under the model's own probabilities.
                probabilities = torch.exp(logits - log_sum[:, None])
                if squares:
                    # The sum is at least one over the vocabulary, so its logarithm needs no care.
                    log_sum_squares[part] = 2 * torch.linalg.vector_norm(probabilities, dim=-1).log()
                entropy[part] = log_sum - (probabilities.mul_(logits)).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums)
        ctx.scale, ctx.softcap, ctx.dtype = scale, softcap, dtype
        ctx.mark_non_differentiable(entropy, mean_logit, is_top1, log_sum_squares)
        return logps, entropy, mean_logit, is_top1, log_sum_squares

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logps = gradients[0]
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        wide = log_sums.dtype
        grad_hidden = torch.empty_like(h) if need_hidden else None
        # The weight's gradient sums over all positions; float32 keeps what bf16 sums would lose.
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], _chunk_positions(weight.shape[0])):
                part = slice(start, start + _chunk_positions(weight.shape[0]))
                logits = _chunk_logits(h[part], w, bias, ctx.scale, ctx.softcap)
                slope = 1.0 - (logits / ctx.softcap) ** 2 if ctx.softcap is not None else None
                # d logp / d logit = [logit is the target's] - probability
                gradient = torch.exp(logits - log_sums[part, None]).neg_()
                rows = torch.arange(gradient.shape[0], device=gradient.device)
                gradient[rows, targets[part]] += 1.0
                gradient *= grad_logps[part, None]
                if slope is not None:
                    gradient *= slope
                if ctx.scale != 1.0:
                    gradient *= ctx.scale
                narrow = gradient.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = narrow @ w
                if grad_weight is not None:
                    grad_weight += narrow.t() @ h[part]
                if grad_bias is not None:
                    grad_bias += gradient.sum(dim=0)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
