"""The parity gate: before step one, a policy that equals the reference must reproduce the shards' log-probs.

The policy scores a sample of pairs, across lengths and shards, as it will train: train mode, its dtype and autocast,
its wrappers. The gate compares token by token. It allows the noise floor that stage one measured for this model, dtype
and kernel. The loss is no measure: a healthy mixture of experts is far from ln 2.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from pipeline.base.errors import ConfigError, DataError, IdentityError, RefshardError, number_of
from pipeline.config.schema import Config
from pipeline.models.identity import PolicyReferenceRelation, policy_reference_relation
from pipeline.models.precision import Precision, policy_precision, recorded_precision
from pipeline.scoring.agreement import (
    ROUNDING,
    Agreement,
    allowed_gap,
    compare,
    completion_gap,
    distance_from_start,
)
from pipeline.scoring.forward import LOGPS, score
from pipeline.store.format import part_name
from pipeline.store.store import Store
from pipeline.training.processes import of_main_process
from pipeline.training.trainer import gpus_of
from pipeline.training.windows import Window

__all__ = ["Gaps", "Gate", "choose_sample", "make_gate", "run_gate"]

_SAMPLE = 32
"""Number of pairs to compare, over all lengths; up to `_MOST_PARTS` parts that have none of them add one each"""

_MOST_PARTS = 128


@dataclass(frozen=True)
class Gaps:
    """Policy logps minus stored logps of the sampled completions."""

    values: list[npt.NDArray[np.float64]]
    """Gaps of each completion, from `completion_gap`"""
    parts: list[int]
    """Part of each completion"""
    margins: list[float]
    """Policy margin minus stored margin of each pair, nats"""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The store to compare with, and the conditions of the comparison."""

    store: Store
    allowed: tuple[float, float]
    """Mean and largest gap that the store's noise floor allows, nats a token"""
    reference: Precision
    policy: Precision
    beta: float
    relation: PolicyReferenceRelation
    """States in which the policy must equal the reference"""
    start: int
    """Step after which the policy has its initial weights"""
    warn_only: bool
    """Print a warning instead of stopping"""

    def judge(self, gaps: Gaps) -> Agreement:
        """Compare the gaps with what is allowed."""
        return compare(gaps.values, self.allowed)


def make_gate(config: Config, scored: Config, store: Store, window: Window | None) -> Gate:
    """Make the gate of a run on the training set's store.

    `scored` holds the settings that the store was scored with: the run's own, or those of its window.
    """
    relation = policy_reference_relation(scored)
    if window is not None and window.number > 0:
        # A moved reference equals the policy only if it is a copy.
        copied = config.reference.sync is not None and config.reference.sync.mixup_alpha == 1
        relation = PolicyReferenceRelation(at_start=copied, adapters_off=False, frozen_adapter=None)
    reference = store.manifest["identity"]["reference"]
    # Nothing is known of a reference that is known by name alone, and nothing is compared.
    precision, in_8_bits = recorded_precision(reference), (reference.get("quantization") or {}).get("bits") == 8
    return Gate(
        store=store,
        allowed=allowed_gap(store.noise, precision.products, in_8_bits=in_8_bits),
        reference=precision,
        policy=policy_precision(config),
        beta=config.loss.beta,
        relation=relation,
        start=0 if window is None else window.first,
        warn_only=config.train.on_mismatch == "warn",
    )


def run_gate(
    trainer: Any,
    gate: Gate,
    pairs: Any,
    say: Callable[[str], None],
    leave_if_asked: Callable[[], None],
    show: Callable[[str], None],
) -> None:
    """Run the gate before the first step of an attempt, on every rank alike.

    `pairs` are those joined to the gate's store. `leave_if_asked` raises at a stop request; `show` takes how far the
    gate is.

    Raises:
        RefshardError: The policy differs from the reference; the message names the likely cause.
    """
    relation = gate.relation
    fresh = trainer.state.global_step == gate.start
    if not (relation.adapters_off or relation.frozen_adapter or (relation.at_start and fresh)):
        return
    rows = choose_sample(pairs)
    if not rows:
        return
    state: _State = contextlib.nullcontext
    if relation.at_start and fresh:
        which = "the policy before its first step"
    elif relation.adapters_off:
        state, which = _ADAPTER_OFF, "the policy with its adapter switched off"
    elif (
        trainer.is_fsdp_enabled
        or trainer.is_deepspeed_enabled
        or any(getattr(settings, "bias", "none") != "none" for settings in trainer.model.peft_config.values())
    ):
        # A model that is sharded over ranks takes no second adapter, and neither does one whose adapter has biases.
        say("Parity gate: not run, since the adapter that training began with can't be put back for it")
        return
    else:
        state = functools.partial(_with_adapter, folder=str(relation.frozen_adapter))
        which = f"the policy with the adapter {relation.frozen_adapter}"
    sample = [pairs[i] for i in rows]

    def before_batch(done: int) -> None:
        leave_if_asked()
        show(f"parity gate, {done:,} of {len(sample):,} pairs")

    measure = functools.partial(_measure, trainer, sample, before_batch)
    gaps = measure(state)
    judged = gate.judge(gaps)
    if judged.agrees:
        shards = number_of(len(set(gaps.parts)), "shard")
        say(f"Parity gate: {which} is the reference. {len(rows)} pairs of {shards}: {judged}")
        if relation.at_start and fresh and gate.reference != gate.policy:
            say(f"warning: {_distance(gate, gaps.margins)}")
        return
    error = _explain(gate, gaps, which, measure, state, fresh)
    if not gate.warn_only:
        raise error
    say(f"warning: {error}")


def _distance(gate: Gate, margins: Sequence[float]) -> str:
    """Say how far from ln 2 a policy starts that computes otherwise than its reference did."""
    start = distance_from_start(margins, gate.beta)
    return (
        f"reference.dtype: the reference was scored in {gate.reference}, the policy computes in {gate.policy}: {start}"
        ". To start at ln 2, leave reference.dtype and reference.autocast out, and score again into another "
        "precompute.output"
    )


def choose_sample(dataset: Any) -> list[int]:
    """Choose rows of the joined set of every part and length, the same for every run.

    Rows without reference logps are left out.
    """
    table = dataset.data.table
    scored = np.flatnonzero(np.isfinite(table["ref_chosen_logps"].to_numpy()))
    if not len(scored):
        return []
    lengths = (
        pc.list_value_length(table["prompt_ids"]).to_numpy() + pc.list_value_length(table["chosen_ids"]).to_numpy()
    )
    parts = table["part"].to_numpy()
    by_length = scored[np.argsort(lengths[scored], kind="stable")]
    chosen = set(_spread(by_length, _SAMPLE))
    known = np.unique(parts[scored])
    for i, part in enumerate(_spread(known, _MOST_PARTS)):
        of_part = by_length[parts[by_length] == part]
        if not chosen & set(of_part.tolist()):
            # Of some parts a short pair, of others a long one.
            chosen.add(int(of_part[(i * len(of_part)) // len(known)]))
    return sorted(chosen)


def _spread(values: npt.NDArray[Any], count: int) -> list[int]:
    """Give at most `count` of the values, evenly spaced, with the first and the last."""
    at = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [int(value) for value in np.unique(values[at])]


_State = Callable[[Any], contextlib.AbstractContextManager[Any]]
"""Switches the unwrapped model to one of its states, as a context"""


_ADAPTER_OFF: _State = operator.methodcaller("disable_adapter")


@contextlib.contextmanager
def _with_adapter(model: Any, folder: str) -> Iterator[None]:
    """Activate the adapter in a folder in place of the model's own."""
    model.load_adapter(folder, "reference", is_trainable=False)
    active = model.active_adapter
    model.set_adapter("reference")
    try:
        yield
    finally:
        model.set_adapter(active)
        model.delete_adapter("reference")


def _measure(
    trainer: Any,
    rows: Sequence[dict[str, Any]],
    before_batch: Callable[[int], None],
    state: _State,
    *,
    training: bool = True,
) -> Gaps:
    """Score the sample with the policy in one of its states, and compare with the stored logps.

    `before_batch` is told the number of pairs that are scored.
    """
    model = trainer.model_wrapped
    was_training = model.training
    size = trainer.args.per_device_train_batch_size
    gaps = Gaps([], [], [])
    # The run's random state must not depend on whether the gate ran.
    with torch.random.fork_rng(devices=gpus_of(trainer)), torch.no_grad(), trainer.accelerator.autocast():
        with state(trainer.accelerator.unwrap_model(model)):
            model.train(training)
            _silence_adapter_dropout(model)
            for start in range(0, len(rows), size):
                before_batch(start)
                _add_gaps(gaps, trainer, rows[start : start + size])
        model.train(was_training)
    return of_main_process(gaps)


def _add_gaps(gaps: Gaps, trainer: Any, rows: Sequence[dict[str, Any]]) -> None:
    joined = trainer.data_collator(rows)["joined"]
    scores = score(trainer.model_wrapped, joined.batch.to(trainer.args.device), want=LOGPS)
    ends = np.cumsum(scores.lengths.cpu().numpy())[:-1]
    stored = [] if joined.ref_token_logps is None else np.split(joined.ref_token_logps.double().numpy(), ends)
    sums = []
    for i, ours in enumerate(np.split(scores.tokens.logps.double().cpu().numpy(), ends)):
        row, side = rows[i % len(rows)], ("chosen", "rejected")[i // len(rows)]
        # Sums are never weighted here: ld_alpha needs token logps.
        gaps.values.append(completion_gap(ours, stored[i] if stored else None, row[f"ref_{side}_logps"]))
        gaps.parts.append(row["part"])
        sums.append(float(ours.sum()) - row[f"ref_{side}_logps"])
    gaps.margins.extend(chosen - rejected for chosen, rejected in zip(*np.split(np.array(sums), 2), strict=True))


def _silence_adapter_dropout(model: Any) -> None:
    """Switch off the adapter's own dropout, which is the user's choice and not a fault."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" in name:
            module.train(False)


def _explain(
    gate: Gate, gaps: Gaps, which: str, measure: Callable[..., Gaps], state: _State, fresh: bool
) -> RefshardError:
    """Find the likely cause of gaps that do not pass."""
    judged = gate.judge(gaps)
    found = f"{which} is not the reference that {gate.store.folder} holds: {judged}"
    by_part: dict[int, list[npt.NDArray[np.float64]]] = {}
    for part, values in zip(gaps.parts, gaps.values, strict=True):
        by_part.setdefault(part, []).append(values)
    bad = [part for part, values in sorted(by_part.items()) if not compare(values, gate.allowed).agrees]
    if bad and len(bad) < len(by_part):
        names = ", ".join(part_name(part) for part in bad)
        return DataError(
            f"{found}, but only in {names}: the values there are not those of this reference. Delete it, then run "
            "refshard precompute again"
        )
    starts_with_adapter = gate.relation.adapters_off and gate.relation.at_start and fresh
    if starts_with_adapter and gate.judge(measure(_ADAPTER_OFF)).agrees:
        return ConfigError(
            f"{found}. With the adapter switched off it is, so the adapter, declared fresh, is not a zero change: "
            "start from one whose change is zero, or name it in policy.adapter, which puts it on the reference too"
        )
    if gate.judge(measure(state, training=False)).agrees:
        return ConfigError(
            f"{found}. In evaluation mode it is, so dropout, or another noise of training, is on in the policy; the "
            "reference was scored without. Set the rates in its config.json to 0"
        )
    flat = np.concatenate(gaps.values)
    shift, spread = float(flat.mean()), float(flat.std())
    if abs(shift) > 10 * spread:
        return DataError(
            f"{found}. Every token is off by the same {-shift:+.3g}, which no model does: the stored values were "
            "shifted. Score again into another precompute.output"
        )
    if gate.policy.bits < gate.reference.bits and judged.mean <= ROUNDING[gate.policy.products][0]:
        return IdentityError(
            f"{found}. The gap grows with length and is that of a dtype. {_distance(gate, gaps.margins)}, or train in "
            f"{gate.reference.products}"
        )
    edge = _share_at_edges(gaps)
    if edge > 0.9:
        return IdentityError(
            f"{found}, nearly all of it at the completions' first or last token: a chat template or an EOS rule that "
            "is not this run's. Score again with this run's tokenizer"
        )
    return IdentityError(
        f"{found}, token by token and in every shard: the stored values are of other weights (the policy was loaded "
        "from another checkpoint than the reference), or of other prompts (a chat template that is not this run's). "
        "Name what was scored in reference.model, or score again into another precompute.output"
    )


def _share_at_edges(gaps: Gaps) -> float:
    """Give the share of the absolute gap at the first and last tokens, of completions with more than four."""
    long = [np.abs(values) for values in gaps.values if len(values) > 4]
    total = sum(float(values.sum()) for values in long)
    return sum(float(values[0] + values[-1]) for values in long) / total if total and math.isfinite(total) else 0.0
