"""Check a loaded model: the scorer gives its own log-probs, and packed or cached batches give those of padded ones."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.base.errors import ConfigError, is_out_of_memory, one_line
from pipeline.data.tokens import TokenizedPair
from pipeline.models.lengths import positions_of
from pipeline.models.parts import causal_of
from pipeline.scoring.agreement import ROUNDING
from pipeline.scoring.attention import restore_attention, switch_attention
from pipeline.scoring.forward import LOGPS, input_device, score
from pipeline.scoring.memory import free_memory
from pipeline.scoring.packing import Batch, Kernel, Reading, cache_pairs, pack_pairs, pad_pairs

__all__ = ["check_scoring", "not_packed"]

_USUAL_LENGTH = 8192
"""Tokens of the longest sequence that is tried if the longest that can come is not known"""
_END = 16
"""Tokens at a sequence's end whose log-probs are compared: those beyond a length"""
_FAILURES = (LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""Errors of a model that can't run a batch, or has no memory for it"""


def check_scoring(model: Any, key: str, max_length: int | None = 1024, autocast: str | None = None) -> Reading:
    """Compare the scorer with the model's own logits, and the model with itself, on small batches.

    Some families do more after the backbone than a projection. A family that head.py does not know would silently get
    wrong numbers, so it is refused; so is a model that sees the tokens that it is to predict. Then try sequences just
    beyond each length that the config names, up to `max_length`: in a batch they must score as they do alone.
    `autocast` is the dtype of autocast that the model's forward pass runs under; it decides what counts as rounding.

    Return how the model reads batches: packed, else cached, else padded. Messages begin with `key`.

    Raises:
        ConfigError: The two differ by more than the dtype's rounding, or a later token changes an earlier log-prob, or
            a longer sequence of the batch does.
    """
    training = model.training
    own_dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    dtype = "int8" if _is_quantized(model) else autocast or own_dtype
    model.eval()
    try:
        with torch.no_grad():
            _check_padded(model, key, dtype)
            trials: list[_Trial] = []
            for length, longest in _named_lengths(model, max_length):
                beyond = _trials_beyond(model, length, longest, dtype)
                # Rounding must not refuse a model.
                if not all(trial.agrees(model, lambda pairs: pad_pairs(pairs, 0), slack=4) for trial in beyond):
                    raise ConfigError(
                        f"data.max_length: must be at most {length} for {key}: one longer sequence changes how "
                        f"{_name_of(model)} scores all others of its batch, got {max_length}. "
                        f"Set data.max_length: {length}"
                    )
                trials.extend(beyond)
            before = model.config.get_text_config()._attn_implementation
            if _reads_packed(model, dtype, max_length) and all(trial.agrees(model, pack_pairs) for trial in trials):
                return "packed"
            if model.config.get_text_config()._attn_implementation != before:
                restore_attention(model, before)
            if _reads_cached(model, dtype, max_length) and all(trial.agrees_cached(model) for trial in trials):
                return "cached"
            return "padded"
    finally:
        model.train(training)


def _logps_of(model: Any, batch: Batch) -> torch.Tensor:
    return score(model, batch.to(input_device(model)), LOGPS).tokens.logps.float().cpu()


def _check_padded(model: Any, key: str, dtype: str) -> None:
    ids = _some_ids(model, 12)
    others = _some_ids(model, 12, start=1)
    # Equal except the last two tokens of each completion.
    pair = TokenizedPair(prompt_ids=ids[:4], chosen_ids=ids[4:9], rejected_ids=ids[5:12])
    changed = TokenizedPair(
        prompt_ids=ids[:4], chosen_ids=ids[4:7] + others[7:9], rejected_ids=ids[5:10] + others[10:12]
    )
    batch, later = (pad_pairs([p], pad_id=0) for p in (pair, changed))
    there = batch.to(input_device(model))
    name = _name_of(model)
    try:
        ours, ours_later = _logps_of(model, batch), _logps_of(model, later)
        logits = model(input_ids=there.input_ids, attention_mask=there.attention_mask, use_cache=False).logits
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{key}: {name} can't be run as a causal language model ({one_line(str(error))}); "
            "this architecture is not supported"
        ) from error
    plain = torch.log_softmax(logits.float().cpu(), dim=-1).flatten(0, 1)[batch.logit_positions, batch.targets]
    # One bf16 logit near 16 is rounded by up to 1/16; float32 agrees to five digits.
    tolerance = 1e-3 if dtype in ("float32", "float64") else 0.25
    gap = (ours - plain).abs().max().item()
    if not gap <= tolerance:
        raise ConfigError(
            f"{key}: {name} makes its logits in a way that the scorer does not know "
            f"(log-probs differ by {gap:.3g} from its own); this architecture is not supported"
        )
    same = [i for i in range(len(ours)) if i not in (3, 4, 10, 11)]
    moved = (ours - ours_later)[same].abs().max().item()
    # LLM.int8() keeps columns in float16 that all tokens of a batch decide on; this moves log-probs by 0.1 nats.
    if moved > (0.25 if _is_quantized(model) else tolerance):
        raise ConfigError(
            f"{key}: {name} sees tokens that come later (changing them moves log-probs before them by {moved:.3g}), "
            "so it gives no log-probs of a text; a causal language model is needed"
        )


def _reads_packed(model: Any, dtype: str, max_length: int | None) -> bool:
    """Return True if a packed row gives the padded rows' log-probs and no sequence attends to another.

    The log-probs agree to the dtype's rounding, in which small faults could hide. The rest is exact: tokens that a
    completion must not see move it no further than in padded batches, and positions matter.
    """
    model_config = model.config.get_text_config()
    if _hides_in_masks(model_config):
        return False
    pairs, other_pairs = _check_pairs(model)
    packed, other_batch = pack_pairs(pairs), pack_pairs(other_pairs)
    kernels: set[Kernel] = set()
    assert packed.layout is not None
    packed = dataclasses.replace(packed, layout=dataclasses.replace(packed.layout, kernels=kernels))
    unplaced = dataclasses.replace(packed, position_ids=torch.zeros_like(packed.input_ids))
    try:
        # Before the switch, so that a difference between the two implementations shows.
        padded, other_padded = (_logps_of(model, pad_pairs(p, 0)) for p in (pairs, other_pairs))
        if not switch_attention(model):
            return False
        found, other_found, misplaced = (_logps_of(model, batch) for batch in (packed, other_batch, unplaced))
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        # Attention raises NotImplementedError, a RuntimeError, for keywords and masks that it does not support.
        reads = False
    else:
        reads = _agree(found, padded, dtype)
        reads &= _unmoved(model, pairs, (found, other_found), (padded, other_padded), dtype)
        # A model that ignores positions gives right numbers only for the row's first sequence.
        reads &= not torch.equal(found, misplaced)
        # If no layer passes its window to attention, the window is only in the mask.
        reads &= any(kernel.window is not None for kernel in kernels) or not _has_window(model_config, max_length)
    return reads


def _reads_cached(model: Any, dtype: str, max_length: int | None) -> bool:
    """Return True if completions that start from the cached states of their prompts give the padded rows' log-probs.

    Prompts of different lengths are in one batch. A model must ignore the ids of the padding before them as of other
    pairs, exactly. States must come from their own prompts, whatever the dtype and however little a layer does.
    """
    pairs, other_pairs = _check_pairs(model)
    cached, other_batch = cache_pairs(pairs, 0), cache_pairs(other_pairs, 1)
    assert cached.continuations is not None
    swapped = tuple(part._replace(prompts=part.prompts.roll(1)) for part in cached.continuations)
    batches = (cached, other_batch, dataclasses.replace(cached, continuations=swapped))
    try:
        padded, other_padded = (_logps_of(model, pad_pairs(p, 0)) for p in (pairs, other_pairs))
        found, other_found, astray = (_logps_of(model, batch) for batch in batches)
    except (AssertionError, AttributeError, *_FAILURES) as error:
        if is_out_of_memory(error):
            raise
        return False
    reads = _agree(found, padded, dtype) and _unmoved(model, pairs, (found, other_found), (padded, other_padded), dtype)
    # States of few tokens have not met the ends of a layer's chunks.
    trials = _trials_beyond(model, 100, min(140, _longest(model, max_length)), dtype)
    # A fault in the states moves log-probs like other prompts' states do, rounding far less.
    reads &= bool((found - padded).abs().mean() < 0.1 * (astray - padded).abs().mean())
    return reads and all(trial.agrees_cached(model) for trial in trials)


def _unmoved(
    model: Any,
    pairs: Sequence[TokenizedPair],
    found: tuple[torch.Tensor, torch.Tensor],
    padded: tuple[torch.Tensor, torch.Tensor],
    dtype: str,
) -> bool:
    """Return True if the last completion, the same in both batches, moves no further than in padded batches."""
    kept = slice(-len(pairs[-1].rejected_ids), None)
    moved, in_padded = ((one - other)[kept].abs().max() for one, other in (found, padded))
    # In another batch experts get other numbers of tokens, which may move a few tokens in only one of the two.
    experts = any("expert" in name for name, _ in model.named_modules())
    floor = ROUNDING[dtype][0] / 10 * min(1.0, found[0].std().item()) if experts else 1e-6
    return bool(moved <= floor + 4 * in_padded)


def _named_lengths(model: Any, max_length: int | None) -> Iterator[tuple[int, int]]:
    """Yield each length that the config names, and the tokens of the sequence to try beyond it."""
    parts = ("window", "position", "length", "chunk", "block", "seq", "topk")

    def named(settings: Mapping[str, Any]) -> Iterator[int]:
        for name, value in settings.items():
            # A list has a value for each layer.
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, Mapping):
                    yield from named(one)
                elif type(one) is int and any(part in name for part in parts):
                    yield one

    most = _longest(model, max_length)
    for length in sorted(set(named(model.config.get_text_config().to_dict()))):
        # The other checks have sequences beyond shorter ones.
        if 16 <= length < most:
            yield length, min(length + 24, most)


@dataclass(frozen=True)
class _Trial:
    """Two sequences that begin alike, the first of them beyond a length."""

    pair: TokenizedPair
    dtype: str
    long: torch.Tensor
    """Last token logps of the chosen sequence by itself"""
    other: torch.Tensor
    """Last token logps of the rejected sequence by itself"""

    def agrees(self, model: Any, make: Callable[[Sequence[TokenizedPair]], Batch], slack: float = 1) -> bool:
        """Return True if both score in a batch as they do alone, or if memory does not hold them."""
        try:
            return _agree(
                torch.cat([self.long, self.other]), torch.cat(_ends(model, make([self.pair]))), self.dtype, slack
            )
        except _FAILURES:
            free_memory()
            return True

    def agrees_cached(self, model: Any) -> bool:
        """Return True if both score in a cached batch as they do alone, with prompts of very different lengths."""
        prompt, chosen = self.pair.prompt_ids, self.pair.chosen_ids
        late = TokenizedPair(
            prompt_ids=[*prompt, *chosen[:-_END]], chosen_ids=chosen[-_END:], rejected_ids=chosen[-_END:]
        )
        try:
            found = torch.cat(_ends(model, cache_pairs([late, self.pair], 0)))
        except _FAILURES:
            free_memory()
            return False
        return _agree(torch.cat([self.long, self.long, self.long, self.other]), found, self.dtype)


def _longest(model: Any, max_length: int | None) -> int:
    most = max_length or _USUAL_LENGTH
    return min(most, positions_of(model) or most)


def _trials_beyond(model: Any, length: int, longest: int, dtype: str) -> list[_Trial]:
    """Score sequences alone, one of `longest` tokens, which is beyond `length`; none if the model can't run them.

    No such pair can be scored then, either.
    """
    # As in a text, tokens come again.
    kinds, generator = min(16, _vocabulary(model)), torch.Generator().manual_seed(0)
    some = torch.randint(0, kinds, (2 * longest,), generator=generator).tolist()
    prompt, long, middle = some[:4], some[4:longest], some[longest : longest + min(length + 8, longest - 1) - 4]
    trials = []
    for other in (middle, some[-12:]):
        pair = TokenizedPair(prompt_ids=prompt, chosen_ids=long, rejected_ids=other)
        twins = [dataclasses.replace(pair, chosen_ids=ids, rejected_ids=ids) for ids in (long, other)]
        try:
            trials.append(_Trial(pair, dtype, *(_ends(model, pad_pairs([twin], 0))[0] for twin in twins)))
        except _FAILURES:
            free_memory()
    return trials


def _ends(model: Any, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Score a pair, and give the last token logps of each completion, which are those beyond a length."""
    return tuple(logps[-_END:] for logps in torch.split(_logps_of(model, batch), batch.lengths.tolist()))


def _agree(one: torch.Tensor, other: torch.Tensor, dtype: str, slack: float = 1) -> bool:
    """Return True if two scorings differ by no more than `slack` times the dtype's rounding; NaN does not agree."""
    mean, largest = ROUNDING[dtype]
    gap = (one - other).abs()
    return bool(gap.mean() <= slack * mean and gap.max() <= slack * largest)


def not_packed(model: Any, reading: Reading) -> str:
    """Write the warning for a model that does not read packed batches."""
    how = "in padded batches, with the same numbers, but slower"
    if reading == "cached":
        how = "through its cache: each prompt once, its completions padded, with the same numbers, but slower"
    return (
        f"{_name_of(model)} does not keep the sequences of a packed row apart (its layers are not all attention, or "
        f"attention of an unknown kind); it is scored {how}"
    )


def _hides_in_masks(model_config: Any) -> bool:
    """Return True if attention puts what it sees only into its mask: chunks, blocks, an index of the best keys.

    These are longer than any batch small enough for this check.
    """
    kinds = set(getattr(model_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return bool(kinds or getattr(model_config, "attention_chunk_size", None))


def _has_window(model_config: Any, max_length: int | None) -> bool:
    """Return True if a window hides tokens of a sequence of up to `max_length` tokens; None is any length."""
    window = getattr(model_config, "sliding_window", None)
    if max_length is not None and isinstance(window, int) and window >= max_length:
        return False
    if getattr(model_config, "layer_types", None):
        return "sliding_attention" in model_config.layer_types
    return window is not None


def _is_quantized(model: Any) -> bool:
    return bool(getattr(model.config, "quantization_config", None))


def _check_pairs(model: Any) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Make pairs of which two share a prompt and a completion, and the pairs of another batch.

    Between the two, all tokens differ except the last pair's prompt and rejected completion.
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
    return [(7 * i + 3 + start) % _vocabulary(model) for i in range(count)]


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _name_of(model: Any) -> str:
    return type(causal_of(model)).__name__
