"""Model + batch -> token logps: the one scorer that both stages call.

`prepare` gives a loaded causal language model a second way through its forward: backbone, then the chunked head
on the positions that predict a completion token. It is the model's own forward that is extended, not a function
beside it, so wrappers that act on forward (DDP, FSDP, autocast, PEFT) act on scoring too.
"""

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import ConfigError
from pipeline.head import TokenStatistics, head_of, token_statistics
from pipeline.packing import Batch, make_batch
from pipeline.tokens import TokenizedPair

__all__ = ["Scores", "check_scoring", "prepare", "score", "sum_logps", "weighted_sums"]


@dataclass(frozen=True)
class Scores:
    """Scored tokens of a batch of P pairs, strung together row by row: all chosen, then all rejected."""

    tokens: TokenStatistics
    """Of N tokens, the batch's completion tokens"""
    lengths: torch.Tensor
    """[2P] int64, completion tokens of each row; their sum is N"""
    aux_loss: torch.Tensor | None = None
    """Scalar, a mixture of experts' balance loss over all real tokens; None where it was not asked for"""

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logps of the chosen and of the rejected completions, [P] and [P] float32. They carry the gradient."""
        return sum_logps(self.tokens.logps, self.lengths)


def prepare(model: Any) -> None:
    """Let the model's forward answer `completion_mask=...` with token statistics instead of logits.

    Without that argument forward is as it was, so generation and saving do not notice.

    Raises:
        ConfigError: An adapter sits on the head, where the scorer would pass it by.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(causal.get_output_embeddings()).__module__.startswith("peft."):
        raise ConfigError(
            "policy: an adapter on the head (lm_head) can't be trained: the scorer reads the head's weight itself; "
            "leave lm_head out of target_modules and modules_to_save"
        )
    original = causal.forward

    def forward(
        self: Any,
        *args: Any,
        completion_mask: torch.Tensor | None = None,
        squares: bool = False,
        aux_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        if completion_mask is None:
            return original(*args, **kwargs)
        if aux_loss:
            hidden, balance = _hidden_and_balance(self, original, args, kwargs)
        else:
            hidden, balance = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state, None
        # The position before a token predicts it: shift the mask by one, so N positions remain of rows * length.
        predicts = completion_mask[:, 1:]
        targets = kwargs["input_ids"][:, 1:][predicts]  # [N]
        # hidden: [rows, length, hidden] -> [N, hidden]
        statistics = token_statistics(hidden[:, :-1][predicts], targets, head_of(self), squares=squares)
        return {**vars(statistics), "aux_loss": balance}

    # `generate` asks the signature whether forward takes masks and positions, and leaves them out where it does not.
    forward.__signature__ = inspect.signature(type(causal).forward)  # type: ignore[attr-defined]
    causal.forward = types.MethodType(forward, causal)


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


def score(model: Any, batch: Batch, *, squares: bool = False, aux_loss: bool = False) -> Scores:
    """Score every completion token of the batch.

    The model must have been through `prepare`. Gradients flow to its parameters unless the caller switched them
    off. No tensor of [tokens, vocabulary] is made, forward or backward.

    Args:
        model: A prepared causal language model, wrapped or not.
        batch: P pairs.
        squares: Also give the tokens' `log_sum_squares`.
        aux_loss: Also give a mixture of experts' balance loss.
    """
    wanted = {name: True for name, on in (("squares", squares), ("aux_loss", aux_loss)) if on}
    outputs = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        completion_mask=batch.completion_mask,
        **wanted,
    )
    balance = outputs.pop("aux_loss")
    return Scores(TokenStatistics(**outputs), batch.completion_mask.sum(dim=1), balance)


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


def check_scoring(model: Any, key: str) -> None:
    """Compare the scorer with the model's own logits on one small batch, and the model with itself.

    Some families do more after the backbone than a projection. Those that head.py does not know would get wrong
    numbers without a sign of it, so they are refused. So are models that see the tokens that they are to predict.

    Raises:
        ConfigError: The two differ by more than the dtype's rounding, or a later token changes an earlier log-prob.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(7 * i + 3) % vocabulary for i in range(12)]
    others = [(id + 1) % vocabulary for id in ids]
    # Equal but for the last two tokens of either completion.
    pair = TokenizedPair(prompt_ids=ids[:4], chosen_ids=ids[4:9], rejected_ids=ids[5:12])
    changed = TokenizedPair(
        prompt_ids=ids[:4], chosen_ids=ids[4:7] + others[7:9], rejected_ids=ids[5:10] + others[10:12]
    )
    device = next(model.parameters()).device
    batch, later = (make_batch([p], pad_id=0).to(device) for p in (pair, changed))
    training = model.training
    model.eval()
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    try:
        with torch.no_grad():
            ours = score(model, batch).tokens.logps.float()
            ours_later = score(model, later).tokens.logps.float()
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}: {name} can't be run as a causal language model ({' '.join(str(error).split())}); "
            "this architecture is not supported"
        ) from error
    finally:
        model.train(training)
    plain = torch.log_softmax(logits.float()[:, :-1], dim=-1)[batch.completion_mask[:, 1:]]
    plain = plain.gather(1, batch.input_ids[:, 1:][batch.completion_mask[:, 1:]][:, None]).squeeze(1)
    # One bf16 logit near 16 is rounded by up to 1/16; float32 agrees to five digits.
    tolerance = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.25
    gap = (ours - plain).abs().max().item()
    if not gap <= tolerance:
        raise ConfigError(
            f"{key}: {name} makes its logits in a way that the scorer does not know "
            f"(log-probs differ by {gap:.3g} from its own); this architecture is not supported"
        )
    same = [i for i in range(len(ours)) if i not in (3, 4, 10, 11)]
    moved = (ours - ours_later)[same].abs().max().item()
    # Which columns LLM.int8() keeps in float16 depends on all tokens of a batch, which is felt by tenths of a nat.
    if moved > (0.25 if getattr(model.config, "quantization_config", None) else tolerance):
        raise ConfigError(
            f"{key}: {name} sees tokens that come later (changing them moves log-probs before them by {moved:.3g}), "
            "so it gives no log-probs of a text; a causal language model is needed"
        )
