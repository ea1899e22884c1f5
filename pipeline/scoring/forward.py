"""Model + batch -> token logps: the one scorer that both stages call.

`prepare` gives a loaded causal language model a second path through its forward: the backbone, then the chunked head
on the positions that predict a completion token. It extends the forward methods of the model and of its head, so
wrappers that act on forward (DDP, FSDP, DeepSpeed, autocast, PEFT) act on scoring too.
"""

import copy
import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device

from pipeline.models.parts import backbone_of, causal_of
from pipeline.scoring.attention import carry_layout, stand_in_mask
from pipeline.scoring.head import TokenStatistics, head_of, token_logps, token_statistics
from pipeline.scoring.packing import Batch, Continuation

__all__ = [
    "LOGPS",
    "Scores",
    "Want",
    "input_device",
    "prepare",
    "score",
    "sum_logps",
    "under_autocast",
    "weighted_sums",
]


@dataclass(frozen=True, kw_only=True)
class Want:
    """Results that scoring gives beside the log-probs."""

    statistics: bool = True
    """Numbers that training logs about each token; without them no gradient flows"""
    squares: bool = False
    """The tokens' `log_sum_squares`"""
    aux_loss: bool = False
    """A mixture of experts' balance loss, which only padded batches have"""


LOGPS, STATISTICS = Want(statistics=False), Want()
"""The log-probs alone, and what training needs"""


@dataclass(frozen=True)
class Scores:
    """Scored tokens of a batch of P pairs, concatenated: all chosen completions, then all rejected ones."""

    tokens: TokenStatistics
    """Statistics of the batch's N completion tokens"""
    lengths: torch.Tensor
    """Number of tokens of each completion, [2P] int64; their sum is N"""
    aux_loss: torch.Tensor | None = None
    """A mixture of experts' balance loss over all real tokens, scalar; None if not wanted"""

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the logps of the chosen and of the rejected completions: [P] and [P] float32, with their gradient."""
        return sum_logps(self.tokens.logps, self.lengths)


@dataclass
class _Output(TokenStatistics):
    """Output of a prepared model's forward."""

    aux_loss: torch.Tensor | None = None


def prepare(model: Any) -> None:
    """Let the model's forward accept `logit_positions=..., targets=...` and give token statistics for them.

    Without these arguments forward is unchanged, and so are generation and saving.
    """
    causal = causal_of(model)
    head = causal.get_output_embeddings()
    project, original = head.forward, causal.forward

    def project_or_score(
        self: Any, hidden: torch.Tensor, *, targets: torch.Tensor | None = None, want: Want = LOGPS
    ) -> Any:
        # FSDP and DeepSpeed gather the head's weight only inside the head's own call.
        return project(hidden) if targets is None else _score_targets(causal, hidden, targets, want)

    def forward(
        self: Any,
        *args: Any,
        logit_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        want: Want = LOGPS,
        continuations: tuple[Continuation, ...] | None = None,
        **kwargs: Any,
    ) -> Any:
        if logit_positions is None or targets is None:
            return original(*args, **kwargs)
        if "layout" in kwargs:
            # Here, after wrappers have moved the arguments to their device.
            carry_layout(kwargs["attention_mask"], kwargs["layout"])
        balance = None
        if want.aux_loss:
            hidden, balance = _hidden_and_balance(self, original, args, kwargs)
        elif continuations is not None:
            hidden = _through_cache(backbone_of(self), continuations, **kwargs)
        else:
            hidden = backbone_of(self)(*args, use_cache=False, **kwargs).last_hidden_state.flatten(0, 1)
        # [rows * length, hidden] -> [M, hidden]
        hidden = hidden.index_select(0, logit_positions.to(hidden.device))
        return _Output(**self.get_output_embeddings()(hidden, targets=targets, want=want), aux_loss=balance)

    # `generate` passes masks and positions only if the signature has them.
    forward.__signature__ = inspect.signature(type(causal).forward)  # type: ignore[attr-defined]
    causal.forward = types.MethodType(forward, causal)
    head.forward = types.MethodType(project_or_score, head)


def under_autocast(model: Any, dtype: torch.dtype) -> None:
    """Run a prepared model's forward under autocast, as accelerate runs that of a model in training."""
    causal = causal_of(model)
    autocast = torch.autocast(input_device(model).type, dtype)
    causal.forward = types.MethodType(autocast(causal.forward.__func__), causal)


# Not traced by torch.compile, which would recompile the head's chunks for every length.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _score_targets(causal: Any, hidden: torch.Tensor, targets: torch.Tensor, want: Want) -> TokenStatistics:
    """Score each target from the final hidden state that predicts it, [M, hidden]."""
    # accelerate fetches an offloaded weight only for the head's original forward, which this is not.
    with align_module_device(causal.get_output_embeddings()):
        head = head_of(causal)
        # If a model is spread over several devices, head and last layer may be on different ones.
        hidden, there = hidden.to(head.weight.device), targets.to(head.weight.device)
        if want.statistics:
            found = token_statistics(hidden, there, head, squares=want.squares)
        else:
            found = TokenStatistics(token_logps(hidden, there, head))
    return TokenStatistics(**{name: value.to(targets.device) for name, value in found.items()})


def _hidden_and_balance(
    causal: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model's original forward, which computes its balance loss, a scalar with a gradient.

    Give the hidden states before the head, [rows * length, hidden], and that loss.
    """
    caught: list[torch.Tensor] = []
    hook = backbone_of(causal).register_forward_hook(lambda *call: caught.append(call[-1].last_hidden_state))
    try:
        # Forward always makes logits; one position is the least.
        outputs = forward(*args, use_cache=False, output_router_logits=True, logits_to_keep=1, **kwargs)
    finally:
        hook.remove()
    return caught[0].flatten(0, 1), outputs.aux_loss


def _through_cache(
    backbone: Any, continuations: tuple[Continuation, ...], *, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Run the prompts, [rows, length] and padded on the left, and let each continuation start from their state.

    Give the hidden states of the prompts' last tokens, then those of each continuation: [positions, hidden].

    Raises:
        LookupError: The model gives no cache.
    """
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    def run(ids: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> Any:
        if takes_positions:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return backbone(input_ids=ids, attention_mask=mask, use_cache=True, **kwargs)

    outputs = run(input_ids, attention_mask)
    # State-space models give it a name of its own.
    name = "cache_params" if outputs.get("past_key_values") is None else "past_key_values"
    hidden = [outputs.last_hidden_state[:, -1]]
    for i, (ids, mask, prompts) in enumerate(continuations, start=1):
        # Going on changes a cache.
        cache = outputs[name] if i == len(continuations) else copy.deepcopy(outputs[name])
        cache.reorder_cache(prompts)
        mask = torch.cat([attention_mask.index_select(0, prompts), mask], dim=1)
        hidden.append(run(ids, mask, **{name: cache}).last_hidden_state.flatten(0, 1))
    return torch.cat(hidden)


def score(model: Any, batch: Batch, want: Want = STATISTICS) -> Scores:
    """Score every completion token of the batch.

    `prepare` must have been called on the model; `check_scoring` tells if it reads packed batches. Gradients flow to
    its parameters unless the caller switched them off. Logits of all tokens are in memory at once for small batches
    alone (head.py).
    """
    if batch.layout is None:
        reading: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.continuations is not None:
            reading["continuations"] = batch.continuations
    else:
        assert not want.aux_loss, "the balance loss counts tokens as they stand in padded rows"
        mask = stand_in_mask(batch.input_ids.device)
        reading = {"attention_mask": mask, "position_ids": batch.position_ids, "layout": batch.layout}
    ids, positions = batch.input_ids, batch.logit_positions
    outputs = dict(model(input_ids=ids, logit_positions=positions, targets=batch.targets, want=want, **reading))
    aux_loss = outputs.pop("aux_loss", None)
    if batch.expand_index is not None:
        # [M] -> [N]
        outputs = {name: value.index_select(0, batch.expand_index) for name, value in outputs.items()}
    return Scores(TokenStatistics(**outputs), batch.lengths, aux_loss)


def input_device(model: Any) -> torch.device:
    """Give the device that a model takes its token ids on, however it is spread."""
    # The embeddings are the first parameters.
    device: torch.device = next(model.parameters()).device
    if device.type == "meta":
        # accelerate keeps them off the device, and fetches them for every pass.
        device = torch.device(model.get_input_embeddings()._hf_hook.execution_device)
    return device


def sum_logps(token_logps: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum token logps per completion, in float64, rounded once to float32; give the chosen and the rejected sums.

    Args:
        token_logps: [N], the completions concatenated.
        lengths: Number of tokens of each completion, [2P]: P chosen, then P rejected.
    """
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    wide = token_logps if token_logps.device.type == "mps" else token_logps.double()
    sums = torch.zeros(len(lengths), dtype=wide.dtype, device=wide.device).index_add(0, rows, wide).float()
    chosen, rejected = sums.chunk(2)
    return chosen, rejected


def weighted_sums(
    token_logps: torch.Tensor, lengths: torch.Tensor, ld_alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum token logps as `sum_logps` does, but past the shorter completion's length a token counts `ld_alpha`.

    LD-DPO (arXiv 2409.06411): 0 sums the common length only, 1 everything.
    """
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)  # [2P]
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(len(token_logps), device=lengths.device) - starts.repeat_interleave(lengths)  # [N]
    weights = torch.where(position < shorter.repeat_interleave(lengths), 1.0, ld_alpha)
    return sum_logps(token_logps * weights, lengths)
