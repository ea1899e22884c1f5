"""TR-DPO's windows: consecutive optimizer steps that share one reference, and the folders of each.

The reference moves after steps K, 2K, ... Window w trains steps wK + 1 to (w + 1)K on the reference after step wK. An
evaluation at step wK uses the moved reference. Every process reads the run's current window from its checkpoints.

    precompute.output/train                        log-probs of the pairs of window 0 alone
    train.output_dir/references/step-00001024/     the reference of window 2, float32, if K is 512
    train.output_dir/references/.../shards/train   log-probs of the pairs of window 2 alone
"""

import contextlib
import dataclasses
import math
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from pipeline.base.errors import ConfigError, DataError, IdentityError, StorageError
from pipeline.base.files import read_json
from pipeline.base.progress import say
from pipeline.config.schema import Config, ReferenceConfig
from pipeline.data.intake import Ledger
from pipeline.data.loading import load_pairs
from pipeline.data.rows import Source
from pipeline.models.files import ADAPTER_CONFIG, NamedModel, find_adapter
from pipeline.models.identity import (
    fingerprint_of,
    identity_of_reference,
    identity_of_run,
    in_other_precision,
    remedy,
)
from pipeline.models.precision import recorded_precision
from pipeline.run.checkpoints import (
    checkpoint_folders,
    digests_of_weights,
    find_checkpoint,
    is_recorded,
    newest_identity,
    problem_of,
    reference_folder,
    reference_folders,
)
from pipeline.run.identity import identity_of_training, run_identity
from pipeline.run.reading import part
from pipeline.training.arguments import training_arguments
from pipeline.training.mixing import MARKER, mix
from pipeline.training.steps import Order, order_of_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Window",
    "WindowCallback",
    "first_reference",
    "next_window",
    "prepare_reference",
    "window_at",
    "window_config",
]


@dataclass(frozen=True)
class Window:
    """Steps first + 1 to last, on the reference after step first."""

    number: int
    first: int
    last: int
    evaluations: frozenset[int]
    """Steps at which held-out sets are evaluated on this window's reference, possibly with `first`"""
    is_last: bool

    def uses(self, name: str) -> bool:
        """Return True if pairs of the set are scored for this window."""
        return self.last > self.first if name == "train" else bool(self.evaluations)


def window_at(
    config: Config, arguments: transformers.TrainingArguments, order: Order, checkpoint: Path | None
) -> Window:
    """Give the window that a run's checkpoint begins or continues; without a checkpoint, the first one."""
    assert config.reference.sync is not None
    size, total = config.reference.sync.steps, len(order.steps)
    evaluated = _evaluated_steps(arguments, order) if config.data.eval else set()
    if not config.train.evaluates_at_end:
        evaluated -= {total}
    # If the reference moves at the very end, an evaluation there has a window of its own, without steps.
    last_number = total // size if total % size or total in evaluated else total // size - 1
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    number = min(step // size, last_number)
    return Window(
        number=number,
        first=size * number,
        last=min(size * (number + 1), total),
        evaluations=frozenset(step for step in evaluated if step // size == number),
        is_last=number == last_number,
    )


def _evaluated_steps(arguments: transformers.TrainingArguments, order: Order) -> set[int]:
    """Give the steps at which the library evaluates, and the last one, whose metrics go into the model card."""
    total = len(order.steps)
    steps = {0, total} if arguments.eval_on_start else {total}
    if arguments.eval_strategy == "steps":
        every = arguments.eval_steps or 1
        every = math.ceil(total * every) if every < 1 else int(every)
        steps |= {step for step in range(every, total, every) if step >= arguments.eval_delay}
    elif arguments.eval_strategy == "epoch":
        per_epoch = order.steps_per_epoch
        steps |= {step for step in range(per_epoch, total, per_epoch) if step / per_epoch >= arguments.eval_delay}
    return steps


def window_config(config: Config, window: Window, output: Path) -> Config:
    """Give the run's settings with the reference and the stores of one window."""
    if window.number == 0:
        return dataclasses.replace(config, reference=dataclasses.replace(config.reference, sync=None))
    folder = reference_folder(output, window.first)
    return dataclasses.replace(
        config,
        reference=ReferenceConfig(model=str(folder), dtype=config.reference.dtype, autocast=config.reference.autocast),
        precompute=dataclasses.replace(config.precompute, output=str(folder / "shards"), reuse=[]),
    )


def prepare_reference(config: Config, step: int, output: Path) -> Path | None:
    """Make the reference after a step, unless it is there and whole: the previous one, moved toward the checkpoint.

    A run that went back to an older checkpoint may reach this step with other weights. Then the reference is made
    again, and its log-probs are deleted. All files are read for their digests before they are used.

    Returns:
        The reference's folder; None after step 0, since the run's first reference is not moved.

    Raises:
        DataError: It must be made, and the checkpoint or the previous reference is damaged or gone.
    """
    assert config.reference.sync is not None
    if step == 0:
        return None
    target, checkpoint = reference_folder(output, step), output / f"checkpoint-{step}"
    made_from = {
        "step": step,
        "sync": dataclasses.asdict(config.reference.sync),
        "policy": digests_of_weights(checkpoint),
        # The previous reference may be deleted by now. The first one's identity stands for all that followed.
        "first": identity_of_reference(config),
    }
    problem = _problem_of_reference(target, made_from) if target.exists() else "it is not there"
    if problem is None:
        return target
    damage = problem_of(checkpoint, step)
    if damage is not None:
        raise DataError(
            f"{target}: must be a whole moved reference, but {problem}; nor is {checkpoint} whole, which it is made "
            f"from: {damage}. Restore one of the two, or start over with refshard train --overwrite"
        )
    previous = prepare_reference(config, step - config.reference.sync.steps, output)
    if target.exists():
        aside = target.with_name(f".tmp-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    mix(config, checkpoint=checkpoint, previous=previous, target=target, made_from=made_from)
    _delete_older(output, config.reference.sync.steps)
    return target


def _problem_of_reference(folder: Path, made_from: Mapping[str, Any]) -> str | None:
    """Describe why a moved reference can't be used; None if it can."""
    try:
        marker = read_json(folder / MARKER)
    except (DataError, StorageError) as error:
        return str(error)
    # Earlier versions recorded no digests.
    found = marker if "sync" in marker else part(marker, "identity")
    if any(found.get(key) != value for key, value in made_from.items() if key != "policy" or value):
        return "it was made from something else"
    return None if found is marker else problem_of(folder, made_from["step"], marker_name=MARKER)


def _check_mixable(config: Config) -> None:
    """Raise ConfigError for an adapter on embeddings that are tied to the head.

    It makes two tensors of one, and no checkpoint of the architecture holds both.
    """
    policy = config.policy
    if not policy.has_adapter or not getattr(NamedModel.policy(config).text_config(), "tie_word_embeddings", False):
        return
    if policy.adapter is not None:
        adapter = read_json(find_adapter(policy.adapter, "policy.adapter") / ADAPTER_CONFIG)
    else:
        adapter = vars(policy.lora or policy.ia3)
    given = (adapter.get(key) or [] for key in ("modules_to_save", "target_modules"))
    named = [name for names in given for name in ([names] if isinstance(names, str) else names)]
    embeddings = [name for name in named if re.search(r"emb|wte|word", name)]
    if embeddings:
        raise ConfigError(
            f"reference.sync: the adapter must not change embeddings that are tied to the head, got {embeddings[0]}. "
            "Leave it out of the adapter"
        )


def _delete_older(output: Path, size: int) -> None:
    """Delete the references that no checkpoint needs to resume."""
    oldest = min(checkpoint_folders(output), default=0) // size * size
    for step, folder in reference_folders(output).items():
        if step < oldest:
            shutil.rmtree(folder, ignore_errors=True)


def first_reference(config: Config, tokenizer: "PreTrainedTokenizerBase", *, overwrite: bool = False) -> dict[str, str]:
    """Check the run's first reference; give its fingerprint by its name in the run's identity.

    Earlier versions scored it in its checkpoint's dtype under `auto`. Unless `overwrite` drops it, a run that was begun
    in another precision is refused with the settings that name that.

    Raises:
        ConfigError: The policy can't be mixed into it.
        IdentityError: Only the precision differs, and the settings can name it.
    """
    _check_mixable(config)
    first = identity_of_run(config, tokenizer)
    fingerprint = fingerprint_of(first)
    saved = None if overwrite else newest_identity(config.train.folder)
    before = fingerprint if saved is None else saved[1].get("fingerprints", {}).get("reference", fingerprint)
    stored = None if before == fingerprint else in_other_precision(before, first)
    if saved is not None and stored is not None and (sentence := remedy(stored, first)):
        moved = [folder / "shards" for folder in reference_folders(config.train.folder).values()]
        again = ", ".join(str(shards) for shards in moved if shards.exists())
        raise IdentityError(
            f"{saved[0]}: the run's first reference was scored in {recorded_precision(stored['reference'])}, and would "
            f"now be in {recorded_precision(first['reference'])}.{sentence}"
            + (f" Delete {again} too, to score those references again in that dtype." if again else "")
            + " Or start over with refshard train --overwrite"
        )
    return {"reference": fingerprint}


def next_window(
    config: Config, sources: Mapping[str, Source], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Config, dict[str, Source], frozenset[int]] | None:
    """Find the next window of a TR-DPO run, and make its reference.

    Returns:
        The window's settings, the sets that it needs scored, and its training rows; None if the run is finished.
    """
    arguments = training_arguments(config)
    output = config.train.folder
    if is_recorded(output):
        say(f"{output}: this run is finished already; nothing to score.")
        return None
    kept = [pair.row for pair in load_pairs(sources["train"], tokenizer, config.data, Ledger())]
    order = order_of_run(arguments, len(kept))
    fingerprints = first_reference(config, tokenizer)
    identity = run_identity(config, fingerprints, arguments.world_size, identity_of_training(config))
    # Refuses another run's checkpoints too, before the reference is moved to them.
    checkpoint = find_checkpoint(output, identity, lambda text: say(f"warning: {text}", err=True))
    window = window_at(config, arguments, order, checkpoint)
    prepare_reference(config, window.first, output)
    rows = frozenset(kept[i] for i in order.pairs_of(window.first, window.last))
    steps = f"steps {window.first + 1} to {window.last} of {len(order.steps)}" if rows else "held-out sets alone"
    say(f"Window {window.number}: {steps}, {len(rows):,} of {len(kept):,} pairs")
    needed = {name: source for name, source in sources.items() if window.uses(name)}
    return window_config(config, window, output), needed, rows


class WindowCallback(transformers.TrainerCallback):
    """Ends training where the reference moves."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self._window.last:
            return
        control.should_log = control.should_save = control.should_training_stop = True
        control.should_evaluate = state.global_step in self._window.evaluations

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # If the step also ends an epoch, all was done at the step's end.
        if state.global_step == self._window.last:
            control.should_evaluate = control.should_save = False
