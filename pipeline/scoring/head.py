"""Hidden states -> token logps, with few logits in memory.

The logits of N positions over a vocabulary of V are the largest tensor of a language model's step. Here they exist
for one chunk of positions at a time: forward keeps one number per position, and backward recomputes each chunk. Two
cases recompute none. If the head is frozen, as under adapters, the gradient of the hidden states is linear in that of
the logps, and forward makes it on the way. If the logits of a small batch fit in `_KEPT_BYTES`, forward keeps them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

__all__ = ["Head", "TokenStatistics", "head_of", "positions_of_chunk", "token_logps", "token_statistics"]

# Bytes of one chunk's float32 logits: few enough for a CPU's caches, enough for an efficient product.
_CHUNK_BYTES = 64 * 2**20
_CHUNK_BYTES_ON_GPU = 256 * 2**20
# Products of fewer rows are slower: a CPU reads the whole weight for each chunk.
_SMALLEST_CHUNK = 256
# Logits that forward may keep for backward. The product that backward saves is a quarter of the head's operations.
_KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Head:
    """Output projection, from a final hidden state h to logits: softcap(scale * (W h + b))."""

    weight: torch.Tensor
    """[vocabulary, hidden]"""
    bias: torch.Tensor | None
    """[vocabulary]"""
    scale: float = 1.0
    softcap: float | None = None
    """Logits are softcap * tanh(logits / softcap), as in Gemma 2."""


@dataclass
class TokenStatistics(ModelOutput):  # type: ignore[misc, unused-ignore]
    """Numbers of each of N scored tokens; only `logps` carries a gradient, and stage one needs only it.

    A library output, since every wrapper of a model finds the tensors in those.
    """

    logps: torch.Tensor
    """Natural log, [N] float32"""
    entropy: torch.Tensor | None = None
    """Entropy of the prediction, [N] float32, nats"""
    mean_logit: torch.Tensor | None = None
    """Mean of the logits over the vocabulary, [N] float32"""
    is_top1: torch.Tensor | None = None
    """True if the token is the model's first choice, [N] bool"""
    log_sum_squares: torch.Tensor | None = None
    """Log of the summed squares of all probabilities, [N] float32; None if not wanted"""


def head_of(model: Any) -> Head:
    """Read the head of a transformers causal language model, with its family's extras.

    Scales by family: Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, Granite and MiniCPM3
    divide by `logits_scaling`; Gemma caps with `final_logit_softcapping`.
    """
    config = model.config.get_text_config()
    # MPT has a `logit_scale` too, sometimes a word, which the library's forward ignores.
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


def positions_of_chunk(positions: int, vocabulary: int, *, on_gpu: bool) -> int:
    """Give the number of positions whose logits are in memory at once."""
    bytes_of_chunk = _CHUNK_BYTES_ON_GPU if on_gpu else _CHUNK_BYTES
    return min(positions, max(_SMALLEST_CHUNK, bytes_of_chunk // (4 * vocabulary)))


@torch.no_grad()
def token_logps(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """Score each position's target token without a gradient: what stage one needs, [N] as `TokenStatistics.logps`.

    The products and sums are those of `token_statistics`, so the numbers are equal.
    """
    chunks = _Chunks(hidden, head, _operand_dtype(hidden))
    logps = torch.empty(len(targets), dtype=chunks.wide, device=hidden.device)
    for part, logits in chunks:
        top = logits.amax(dim=-1, keepdim=True)
        target = logits.gather(1, targets[part, None]).sub_(top).squeeze(1)
        logps[part] = target.sub_(logits.sub_(top).exp_().sum(dim=-1).log_())
    return logps


def token_statistics(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, *, squares: bool = False
) -> TokenStatistics:
    """Score targets, [N] int64, by the final hidden states of the positions that predict them, [N, hidden].

    Products run in autocast's dtype if it is on, else in that of `hidden`. Log-sum-exp and all sums over the
    vocabulary are float32 (float64 for a float64 model). `squares` also gives `log_sum_squares`, which costs one more
    pass over each chunk.
    """
    frozen = not head.weight.requires_grad and (head.bias is None or not head.bias.requires_grad)
    # Inside the function gradients are always off, so it can't ask.
    backward_follows = torch.is_grad_enabled() and (hidden.requires_grad or not frozen)
    options = _Options(
        scale=head.scale,
        softcap=head.softcap,
        squares=squares,
        gradient_in_forward=backward_follows and frozen,
        keep=backward_follows and not frozen,
    )
    logps, entropy, mean_logit, is_top1, log_sum_squares = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, options
    )
    return TokenStatistics(logps, entropy, mean_logit, is_top1, log_sum_squares if squares else None)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Everything but tensors that `_TokenStatistics` needs."""

    scale: float
    softcap: float | None
    squares: bool
    gradient_in_forward: bool
    keep: bool
    """Keep the logits for backward, if they fit"""


def _operand_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _Chunks:
    """Logits of a few positions at a time, in two buffers that all chunks reuse, or in one of all positions.

    New memory costs more than the passes over it, since each of its pages is a fault.
    """

    def __init__(self, hidden: torch.Tensor, head: Head, dtype: torch.dtype, *, keep: bool = False) -> None:
        self.dtype = dtype
        """Dtype of the products' operands"""
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        """Dtype of the logits and everything after them"""
        self.hidden, self.weight = hidden.to(dtype), head.weight.to(dtype)
        self._head = head
        self._size = positions_of_chunk(len(hidden), len(head.weight), on_gpu=hidden.device.type != "cpu")
        shape = (len(hidden), len(head.weight))
        fits = keep and self.wide.itemsize * shape[0] * shape[1] <= _KEPT_BYTES
        self.kept = torch.empty(shape, dtype=self.wide, device=hidden.device) if fits else None
        """Logits of all positions once they were iterated over, [N, vocabulary], if they are to be kept and fit"""

    def parts(self) -> Iterator[slice]:
        """Yield the positions of each chunk."""
        for start in range(0, len(self.hidden), max(self._size, 1)):
            yield slice(start, min(start + self._size, len(self.hidden)))

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Give each chunk's positions and its logits, [positions, vocabulary].

        The next chunk overwrites them, unless they are kept.
        """
        device = self.hidden.device
        shape = (self._size, len(self.weight))
        buffer = torch.empty(shape, dtype=self.wide, device=device) if self.kept is None else self.kept
        products = None if self.wide == self.dtype else torch.empty(shape, dtype=self.dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            for part in self.parts():
                count = part.stop - part.start
                logits = buffer[:count] if self.kept is None else buffer[part]
                if products is None:
                    torch.mm(self.hidden[part], self.weight.t(), out=logits)
                else:
                    logits.copy_(torch.mm(self.hidden[part], self.weight.t(), out=products[:count]))
                if self._head.bias is not None:
                    logits += self._head.bias
                if self._head.scale != 1.0:
                    logits *= self._head.scale
                if self._head.softcap is not None:
                    logits.div_(self._head.softcap).tanh_().mul_(self._head.softcap)
                yield part, logits


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        options: _Options,
    ) -> tuple[torch.Tensor, ...]:
        head = Head(weight, bias, options.scale, options.softcap)
        chunks = _Chunks(hidden, head, _operand_dtype(hidden), keep=options.keep)
        logps, log_sums, entropy, mean_logit, log_sum_squares = (
            torch.empty(len(targets), dtype=chunks.wide, device=hidden.device) for _ in range(5)
        )
        is_top1 = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        # d logp / d hidden of each position.
        slopes = torch.empty_like(chunks.hidden) if options.gradient_in_forward else None
        powers: torch.Tensor | None = None
        for part, logits in chunks:
            mean_logit[part] = logits.mean(dim=-1)
            top, first = logits.max(dim=-1, keepdim=True)
            is_top1[part] = first.squeeze(1) == targets[part]
            target = logits.gather(1, targets[part, None]).sub_(top).squeeze(1)
            powers = torch.empty_like(logits) if powers is None else powers
            power = torch.sub(logits, top, out=powers[: len(logits)]).exp_()
            total = power.sum(dim=-1)
            log_total = total.log()
            log_sums[part] = log_total + top.squeeze(1)
            logps[part] = target.sub_(log_total)
            if options.squares:
                # The sum is at least 1 / vocabulary, so its logarithm is finite.
                log_sum_squares[part] = 2 * (torch.linalg.vector_norm(power, dim=-1).log() - log_total)
            # Entropy = log-sum-exp minus the mean logit under the model's own probabilities.
            entropy[part] = log_sums[part] - power.mul_(logits).sum(dim=-1) / total
            if slopes is not None:
                gradient = _to_gradient(logits, log_sums[part], targets[part], head)
                torch.mm(gradient.to(chunks.dtype), chunks.weight, out=slopes[part])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, log_sums, chunks.kept)
        ctx.options, ctx.operand_dtype, ctx.hidden_dtype = options, chunks.dtype, hidden.dtype
        ctx.mark_non_differentiable(entropy, mean_logit, is_top1, log_sum_squares)
        return logps, entropy, mean_logit, is_top1, log_sum_squares

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logps, options = gradients[0], ctx.options
        if options.gradient_in_forward:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad_logps[:, None]).to(ctx.hidden_dtype), *[None] * 4
        hidden, weight, bias, targets, log_sums, kept = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        head = Head(weight, bias, options.scale, options.softcap)
        chunks = _Chunks(hidden, head, ctx.operand_dtype)
        wide = chunks.wide
        grad_hidden = torch.empty_like(chunks.hidden) if need_hidden else None
        # The weight's gradient sums over all positions; bf16 sums would lose small terms.
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if need_bias else None
        narrow: torch.Tensor | None = None
        product: torch.Tensor | None = None
        for part, logits in chunks if kept is None else ((part, kept[part]) for part in chunks.parts()):
            gradient = _to_gradient(logits, log_sums[part], targets[part], head)
            gradient *= grad_logps[part, None]
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
            if wide == chunks.dtype:
                operand = gradient
            else:
                narrow = torch.empty_like(gradient, dtype=chunks.dtype) if narrow is None else narrow
                operand = narrow[: len(gradient)].copy_(gradient)
            if grad_hidden is not None:
                torch.mm(operand, chunks.weight, out=grad_hidden[part])
            if grad_weight is not None:
                if wide == chunks.dtype:
                    grad_weight.addmm_(operand.t(), chunks.hidden[part])
                else:
                    product = torch.empty_like(weight, dtype=chunks.dtype) if product is None else product
                    grad_weight += torch.mm(operand.t(), chunks.hidden[part], out=product)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 2,
        )


def _to_gradient(logits: torch.Tensor, log_sums: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """Turn the logits of some positions into d logp / d (W h + b), in place: [positions, vocabulary]."""
    slope = 1.0 - (logits / head.softcap) ** 2 if head.softcap is not None else None
    # d logp / d logit = [logit is the target's] - probability
    gradient = logits.sub_(log_sums[:, None]).exp_().neg_()
    gradient.scatter_add_(1, targets[:, None], torch.ones_like(log_sums[:, None]))
    if head.scale != 1.0:
        gradient *= head.scale
    if slope is not None:
        gradient *= slope
    return gradient
