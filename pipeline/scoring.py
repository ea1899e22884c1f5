"""Model + batch -> token logps: the one scorer that both stages call.

`prepare` gives a loaded causal language model a second way through its forward: backbone, then the chunked head
on the positions that predict a completion token. It is the model's own forward that is extended, and the head's, not a
function beside them, so wrappers that act on forward (DDP, FSDP, DeepSpeed, autocast, PEFT) act on scoring too.
"""

import dataclasses
import inspect
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import align_module_device

from pipeline.attention import NOT_A_MASK, switch_attention
from pipeline.errors import ConfigError
from pipeline.head import TokenStatistics, head_of, token_logps, token_statistics
from pipeline.packing import Batch, make_batch, pack_pairs, pad_pairs, plan_batches
from pipeline.tokens import TokenizedPair

__all__ = [
    "ROUNDING",
    "Scores",
    "check_scoring",
    "input_device",
    "not_packed",
    "prepare",
    "score",
    "score_pairs",
    "sum_logps",
    "weighted_sums",
]


ROUNDING = {
    "float64": (1e-4, 5e-3),
    "float32": (1e-4, 5e-3),
    "float16": (2e-2, 5e-1),
    "bfloat16": (1e-1, 3.0),
    # LLM.int8() rounds activations, and which of them it leaves alone depends on the batch.
    "int8": (1e-1, 3.0),
}
"""Mean and largest difference, nats a token, that rounding alone may make between two ways of computing in a dtype:
pure bf16 weights against float32 weights under autocast, for one."""


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


def score_pairs(
    model: Any, pairs: Sequence[TokenizedPair], *, tokens_per_batch: int, pad_id: int, packed: bool
) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Score pairs without gradients, in batches of similar lengths, the longest first.

    Args:
        model: A prepared causal language model.
        pairs: In any order; their order and lengths alone decide what is scored with what.
        tokens_per_batch: Most tokens of one forward pass.
        pad_id: What padding is filled with, where there is any.
        packed: Pack the batches, if the model can read that.

    Yields:
        A pair's index, and the token logps of its chosen and of its rejected completion.
    """
    device = input_device(model)
    for indices in plan_batches(pairs, tokens_per_batch, packed=packed):
        batch = make_batch([pairs[i] for i in indices], pad_id, packed=packed)
        with torch.inference_mode():
            scores = score(model, batch.to(device), statistics=False)
        flat = scores.tokens.logps.float().cpu().numpy()
        completions = np.split(flat, np.cumsum(batch.lengths.numpy())[:-1])
        yield from zip(indices, completions[: len(indices)], completions[len(indices) :], strict=True)


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


def check_scoring(model: Any, key: str) -> bool:
    """Compare the scorer with the model's own logits, and the model with itself, on small batches.

    Some families do more after the backbone than a projection. Those that head.py does not know would get wrong
    numbers without a sign of it, so they are refused. So are models that see the tokens that they are to predict.
    A family whose layers do not keep the sequences of a packed row apart is found, too.

    Returns:
        Whether the model reads packed batches; where it does not, it is to be scored in padded ones.

    Raises:
        ConfigError: The two differ by more than the dtype's rounding, or a later token changes an earlier log-prob.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _check_padded(model, key)
            return _reads_packed(model)
    finally:
        model.train(training)


def _check_padded(model: Any, key: str) -> None:
    ids = _some_ids(model, 12)
    others = _some_ids(model, 12, start=1)
    # Equal but for the last two tokens of either completion.
    pair = TokenizedPair(prompt_ids=ids[:4], chosen_ids=ids[4:9], rejected_ids=ids[5:12])
    changed = TokenizedPair(
        prompt_ids=ids[:4], chosen_ids=ids[4:7] + others[7:9], rejected_ids=ids[5:10] + others[10:12]
    )
    device = input_device(model)
    batch, later = (pad_pairs([p], pad_id=0).to(device) for p in (pair, changed))
    name = _name_of(model)
    try:
        ours = score(model, batch, statistics=False).tokens.logps.float()
        ours_later = score(model, later, statistics=False).tokens.logps.float()
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}: {name} can't be run as a causal language model ({' '.join(str(error).split())}); "
            "this architecture is not supported"
        ) from error
    plain = torch.log_softmax(logits.float(), dim=-1).flatten(0, 1)[batch.predictors, batch.targets]
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


def _reads_packed(model: Any) -> bool:
    """Whether a packed row gives what padded rows give, and keeps each sequence from the tokens of all others.

    The first is judged by the dtype's rounding, in which small faults could hide. The rest exactly: tokens that a
    completion may not see move it no further than in padded batches, where experts' shapes and LLM.int8()'s columns
    may; and positions move something.
    """
    settings = model.config.get_text_config()
    before = settings._attn_implementation
    if _hides_in_masks(settings):
        return False
    pairs, company = _check_pairs(model)
    packed, packed_company = pack_pairs(pairs), pack_pairs(company)
    nowhere = dataclasses.replace(packed, position_ids=torch.zeros_like(packed.input_ids))
    device = input_device(model)

    def logps_of(batch: Batch) -> torch.Tensor:
        return score(model, batch.to(device), statistics=False).tokens.logps.float().cpu()

    try:
        # Before the switch: what an implementation of another name does differently must show.
        padded, padded_company = logps_of(pad_pairs(pairs, 0)), logps_of(pad_pairs(company, 0))
        if not switch_attention(model):
            return False
        found, found_company, misplaced = (logps_of(batch) for batch in (packed, packed_company, nowhere))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # NotImplementedError is a RuntimeError: attention refused a keyword or a mask that it does not know.
        reads = False
    else:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        mean, largest = ROUNDING["int8" if getattr(model.config, "quantization_config", None) else dtype]
        gap = (found - padded).abs()
        reads = bool(gap.mean() <= mean and gap.max() <= largest)
        # The last completion of all is that which is the same in other company.
        kept = slice(-len(pairs[-1].rejected_ids), None)
        moved = (padded - padded_company)[kept].abs().max()
        # Experts get other numbers of tokens in other company, which a few tokens may feel in one of the two alone.
        experts = any("expert" in name for name, _ in model.named_modules())
        floor = mean / 10 * min(1.0, found.std().item()) if experts else 1e-6
        reads &= bool((found - found_company)[kept].abs().max() <= floor + 4 * moved)
        # Positions that are not read would be right for the row's first sequence alone.
        reads &= not torch.equal(found, misplaced)
        assert packed.layout is not None
        # A window that attention was not told of is in its mask alone.
        reads &= "window" in packed.layout.memo or not _has_window(settings)
    if not reads:
        model.set_attn_implementation(before)
    return reads


def not_packed(model: Any) -> str:
    """What to tell people of a model that `check_scoring` found not to read packed batches."""
    return (
        f"{_name_of(model)} does not keep the sequences of a packed row apart (its layers are not all attention, or "
        "attention of a kind unknown here); it is scored in padded batches, with the same numbers, but slower"
    )


def _hides_in_masks(settings: Any) -> bool:
    """Whether attention is of a kind that says only in its mask what it sees: chunks, blocks, an index of the best.

    Those are longer than any batch that is small enough to check a model with.
    """
    kinds = set(getattr(settings, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return bool(kinds or getattr(settings, "attention_chunk_size", None))


def _has_window(settings: Any) -> bool:
    if getattr(settings, "layer_types", None):
        return "sliding_attention" in settings.layer_types
    return getattr(settings, "sliding_window", None) is not None


def _check_pairs(model: Any) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Pairs of which two share a prompt and a completion, and the same in other company.

    There every token is another but for the last pair's prompt and rejected completion, which stand amid the row.
    """
    ids, others = _some_ids(model, 60), _some_ids(model, 60, start=5)
    ours, theirs = (
        [
            TokenizedPair(prompt_ids=some[:9], chosen_ids=some[9:14], rejected_ids=some[14:26]),
            TokenizedPair(prompt_ids=ids[26:30], chosen_ids=some[30:41], rejected_ids=some[41:42]),
            TokenizedPair(prompt_ids=some[42:50], chosen_ids=some[50:54], rejected_ids=some[54:60]),
            TokenizedPair(prompt_ids=ids[26:30], chosen_ids=some[30:41], rejected_ids=ids[11:17]),
        ]
        for some in (ids, others)
    )
    return ours, theirs


def _some_ids(model: Any, count: int, start: int = 0) -> list[int]:
    vocabulary = model.config.get_text_config().vocab_size
    return [(7 * i + 3 + start) % vocabulary for i in range(count)]


def _name_of(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
