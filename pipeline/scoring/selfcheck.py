"""Check a loaded model: the scorer gives its own log-probs, and packed rows give those of padded ones."""

import dataclasses
from typing import Any

import torch

from pipeline.base.errors import ConfigError, one_line
from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.agreement import ROUNDING
from pipeline.scoring.attention import switch_attention
from pipeline.scoring.forward import input_device, score
from pipeline.scoring.packing import Batch, pack_pairs, pad_pairs

__all__ = [
    "check_scoring",
    "not_packed",
]


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
            f"{key}: {name} can't be run as a causal language model ({one_line(str(error))}); "
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
