"""Save a finished policy; before the first step, try what that needs, so that no step is lost to it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError, RefshardError, is_out_of_memory, one_line
from pipeline.base.files import sync_tree
from pipeline.models.parts import causal_of
from pipeline.run.attempts import Attempt
from pipeline.training.hub import POLICY
from pipeline.training.processes import on_main_process
from pipeline.training.trainer import PairTrainer, saving

__all__ = ["STAGING", "metrics_of", "rehearse_saving", "save_policy"]

STAGING = ".saving-"
"""Prefix of the folder that a policy is saved in first; the attempt's number follows"""


def rehearse_saving(trainer: PairTrainer, attempt: Attempt, write_card: Callable[[], bytes]) -> None:
    """Save all that a policy's folder holds besides weights to a scratch folder, which is deleted.

    Raises:
        ConfigError: A part can't be saved.
        StorageError: The disk is full or failing.
    """
    model: Any = trainer.model
    base = causal_of(model)
    tokenizer: Any = trainer.processing_class
    parts: dict[str, Callable[[Path], Any]] = {
        "configuration": base.config.save_pretrained,
        "tokenizer": tokenizer.save_pretrained,
        "model card": lambda folder: (folder / "README.md").write_bytes(write_card()),
    }
    if getattr(base, "generation_config", None) is not None:
        parts["generation configuration"] = base.generation_config.save_pretrained
    for name, adapter in getattr(model, "peft_config", {}).items():
        parts[f"adapter {name}'s configuration"] = adapter.save_pretrained
    scratch = attempt.run_folder / f"{STAGING}{attempt.name}"
    try:
        with saving(f"{scratch}: the policy"):
            scratch.mkdir(parents=True, exist_ok=True)
        for part, save in parts.items():
            with saving(f"{scratch}: the {part}"), _tried(f"policy.model: its {part} must be one that can be saved"):
                save(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _tried(rule: str) -> Iterator[None]:
    try:
        yield
    except (RefshardError, OSError):
        raise
    except Exception as error:  # the libraries' checks raise errors of any type
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{rule}, got {one_line(str(error)) or type(error).__name__}. Correct its file") from error


def metrics_of(trainer: PairTrainer, step: int) -> dict[str, float]:
    """Give the held-out metrics of the policy after a step: those that were logged, or else of an evaluation now."""
    if trainer.eval_dataset is None:
        return {}
    logged = [entry for entry in trainer.state.log_history if entry.get("step") == step]
    held_out = {key: value for entry in logged for key, value in entry.items() if key.startswith("eval_")}
    return held_out or dict(trainer.evaluate())


def save_policy(trainer: PairTrainer, attempt: Attempt) -> None:
    """Save the policy in a folder of this attempt, then rename each file to its place in the run's folder.

    The files of two attempts that save at once thus never mix, nor do those of an earlier run that was overwritten: its
    adapter beside these weights would be loaded with them.
    """
    output, staging = attempt.run_folder, attempt.run_folder / f"{STAGING}{attempt.name}"
    with saving(f"{output}: the policy"):
        trainer.save_model(str(staging), _internal_call=True)
    trainer.accelerator.wait_for_everyone()

    def put() -> None:
        sync_tree(staging)
        attempt.check()
        with saving(f"{output}: the policy"):
            for stale in {path for pattern in POLICY for path in output.glob(pattern)}:
                if not (staging / stale.relative_to(output)).exists():
                    stale.unlink()
            for file in sorted(path for path in staging.rglob("*") if path.is_file()):
                target = output / file.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            shutil.rmtree(staging)

    on_main_process(put)
