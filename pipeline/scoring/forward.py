"""Model + batch -> token logps: the one scorer that both stages call.

`prepare` gives a loaded causal language model a second way through its forward: backbone, then the chunked head
on the positions that predict a completion token. It is the model's own forward that is extended, and the head's, not a
function beside them, so wrappers that act on forward (DDP, FSDP, DeepSpeed, autocast, PEFT) act on scoring too.
"""

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device

from pipeline.base.errors import ConfigError
from pipeline.scoring.attention import NOT_A_MASK
from pipeline.scoring.head import TokenStatistics, head_of, token_logps, token_statistics
from pipeline.scoring.packing import Batch

__all__ = [
    "Scores",
    "input_device",
    "prepare",
    "score",
    "sum_logps",
    "weighted_sums",
]


@dataclass(frozen=True)
class Scores:
    """Scored tokens of a batch of P pairs, strung together: all chosen completions, then all rejected ones."""

    tokens: TokenStatistics
    """Of N tokens, the batch's completion tokens"""
    lengths: torch.Tensor
    """[2P] int64, tokens of each completion; their sum is N"""
    aux_loss: torch.Tensor | None = None
    """Scalar, a mixture of experts' balance loss over all real tokens; None where it was not asked for"""

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logps of the chosen and of the rejected completions, [P] and [P] float32. They carry the gradient."""
        return sum_logps(self.tokens.logps, self.lengths)


def prepare(model: Any) -> None:
    """Let the model's forward answer `predictors=..., targets=...` with token statistics instead of logits.

    Without those arguments forward is as it was, so generation and saving do not notice.

    Raises:
        ConfigError: An adapter sits on the head, where the scorer would pass it by.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(causal.get_output_embeddings()).__module__.startswith("peft."):
        raise ConfigError(
            "policy: an adapter on the head (lm_head) can't be trained: the scorer reads the head's weight itself; "
            "leave lm_head out of target_modules and modules_to_save"
        )
    _prepare_head(causal)
    original = causal.forward

    def forward(
        self: Any,
        *args: Any,
        predictors: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        statistics: bool = True,
        squares: bool = False,
        aux_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        if predictors is None or targets is None:
            return original(*args, **kwargs)
        if aux_loss:
            hidden, balance = _hidden_and_balance(self, original, args, kwargs)
        else:
            hidden, balance = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state, None
        # [rows, length, hidden] -> [M, hidden]
        hidden = hidden.flatten(0, 1).index_select(0, predictors.to(hidden.device))
        scored = self.get_output_embeddings()(hidden, targets=targets, statistics=statistics, squares=squares)
        return {**scored, "aux_loss": balance}

    # `generate` asks the signature whether forward takes masks and positions, and leaves them out where it does not.
    forward.__signature__ = inspect.signature(type(causal).forward)  # type: ignore[attr-defined]
    causal.forward = types.MethodType(forward, causal)


def _prepare_head(causal: Any) -> None:
    """Let the head's forward score `targets=...` from final hidden states, [M, hidden].

    Its weight is read inside its own call, since only there FSDP and DeepSpeed have put it together.
    """
    head = causal.get_output_embeddings()
    project = head.forward

    def forward(self: Any, hidden: torch.Tensor, *, targets: torch.Tensor | None = None, **wanted: bool) -> Any:
        return project(hidden) if targets is None else _read_off(causal, hidden, targets, **wanted)

    head.forward = types.MethodType(forward, head)


# Not traced by torch.compile, which would take the head's chunks apart for every length anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _read_off(
    causal: Any, hidden: torch.Tensor, targets: torch.Tensor, *, statistics: bool, squares: bool
) -> dict[str, torch.Tensor | None]:
    """Score the targets from their predictors' final hidden states, [M, hidden]."""
    # A weight that accelerate keeps off the device is fetched for the head's own forward alone, and this is another.
    with align_module_device(causal.get_output_embeddings()):
        head = head_of(causal)
        # Of a model that is spread over several devices, the head need not be where its last layer is.
        hidden, there = hidden.to(head.weight.device), targets.to(head.weight.device)
        if not statistics:
            return {"logps": token_logps(hidden, there, head).to(targets.device)}
        found = vars(token_statistics(hidden, there, head, squares=squares))
    return {name: None if value is None else value.to(targets.device) for name, value in found.items()}


def _hidden_and_balance(
    causal: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model's own forward, which knows its balance loss, and catch the hidden states on their way to the head.

    Returns:
        Hidden states, [rows, length, hidden], and the balance loss, a scalar with a gradient.
    """
    caught: list[torch.Tensor] = []
    hook = causal.base_model.register_forward_hook(lambda *call: caught.append(call[-1].last_hidden_state))
    try:
        # One position of logits, since forward makes some.
        outputs = forward(*args, use_cache=False, output_router_logits=True, logits_to_keep=1, **kwargs)
    finally:
        hook.remove()
    return caught[0], outputs.aux_loss


def score(
    model: Any, batch: Batch, *, statistics: bool = True, squares: bool = False, aux_loss: bool = False
) -> Scores:
    """Score every completion token of the batch.

    The model must have been through `prepare`, and `check_scoring` says whether it can read packed batches.
    Gradients flow to its parameters unless the caller switched them off. No tensor of [tokens, vocabulary] is made,
    forward or backward.

    Args:
        model: A prepared causal language model, wrapped or not.
        batch: P pairs.
        statistics: Also give what training logs about each token, and let gradients flow.
        squares: Also give the tokens' `log_sum_squares`.
        aux_loss: Also give a mixture of experts' balance loss, which padded batches alone have.
    """
    wanted = {name: True for name, on in (("squares", squares), ("aux_loss", aux_loss)) if on}
    if batch.layout is None:
        reading: dict[str, Any] = {"attention_mask": batch.attention_mask}
    else:
        assert not aux_loss, "the balance loss counts tokens as they stand in padded rows"
        mask = NOT_A_MASK.to(batch.input_ids.device)
        reading = {"attention_mask": mask, "position_ids": batch.position_ids, "layout": batch.layout}
    outputs = model(
        input_ids=batch.input_ids,
        predictors=batch.predictors,
        targets=batch.targets,
        statistics=statistics,
        **reading,
        **wanted,
    )
    balance = outputs.pop("aux_loss")
    if batch.shared is not None:
        # [M] -> [N]
        outputs = {name: None if v is None else v.index_select(0, batch.shared) for name, v in outputs.items()}
    return Scores(TokenStatistics(**outputs), batch.lengths, balance)


def input_device(model: Any) -> torch.device:
    """Give the device that a model takes its token ids on, however it is spread."""
    # The embeddings come first of all.
    device: torch.device = next(model.parameters()).device
    if device.type == "meta":
        # Kept off the device, and brought there for every pass.
        device = torch.device(model.get_input_embeddings()._hf_hook.execution_device)
    return device


def sum_logps(token_logps: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum token logps per completion, in float64, rounded once to float32; halves are chosen and rejected.

    Args:
        token_logps: [N], row by row.
        lengths: [2P], tokens of each row.
    """
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    wide = token_logps if token_logps.device.type == "mps" else token_logps.double()
    sums = torch.zeros(len(lengths), dtype=wide.dtype, device=wide.device).index_add(0, rows, wide).float()
    chosen, rejected = sums.chunk(2)
    return chosen, rejected


def weighted_sums(
    token_logps: torch.Tensor, lengths: torch.Tensor, ld_alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum token logps as LD-DPO does (arXiv 2409.06411): past the shorter completion's length a token counts alpha.

    Args:
        token_logps: [N], row by row.
        lengths: [2P], tokens of each row.
        ld_alpha: 0 sums the common length alone, 1 everything.
    """
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)  # [2P]
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(len(token_logps), device=lengths.device) - starts.repeat_interleave(lengths)  # [N]
    weights = torch.where(position < shared.repeat_interleave(lengths), 1.0, ld_alpha)
    return sum_logps(token_logps * weights, lengths)
