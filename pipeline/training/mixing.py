"""The moved reference of TR-DPO: alpha * policy + (1 - alpha) * reference, weight by weight, from disk to disk.

One file of weights is in memory at a time. An adapter on the policy is merged into its base before mixing. Averaging
the adapter's factors would not average the models, since only their products add.
"""

import contextlib
import dataclasses
import gc
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.base.errors import ConfigError, DataError, StorageError
from pipeline.base.files import read_json
from pipeline.config.schema import Config, ReferenceConfig
from pipeline.models.files import ADAPTER_WEIGHTS
from pipeline.models.loading import load_plain
from pipeline.run.checkpoints import commit_checkpoint

__all__ = ["MARKER", "mix"]

MARKER = "refshard-reference.json"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def mix(config: Config, *, checkpoint: Path, previous: Path | None, target: Path, made_from: Mapping[str, Any]) -> None:
    """Mix a policy's checkpoint into the previous reference, and write the moved reference in float32.

    `target` appears whole or not at all. If another worker was first, its folder stays.

    Args:
        config: The run's settings, with `reference.sync`.
        checkpoint: Folder of the policy's full weights or of its adapter.
        previous: Folder of the previous reference, written by this function; None for the run's first one.
        target: Folder to write.
        made_from: Inputs that determine the result, `step` among them, recorded beside it with the files' digests.

    Raises:
        ConfigError: Policy and reference do not have the same weights by name and shape.
        DataError: A weight file is damaged.
        StorageError: The disk is full or failing.
    """
    assert config.reference.sync is not None
    work = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        work.mkdir(parents=True)
        if previous is None:
            previous = work / "reference"
            _save_plain(config, previous)
        policy = checkpoint
        if (checkpoint / ADAPTER_WEIGHTS).exists():
            policy = work / "policy"
            adapted = dataclasses.replace(config.policy, adapter=str(checkpoint), lora=None, ia3=None)
            # With the default reference, the policy's base and adapter are merged.
            _save_plain(dataclasses.replace(config, policy=adapted, reference=ReferenceConfig()), policy)
        mixed = work / "mixed"
        _mix_files(policy, previous, mixed, config.reference.sync.mixup_alpha)
        commit_checkpoint(mixed, made_from["step"], made_from, marker_name=MARKER)
        try:
            mixed.rename(target)
        except OSError:
            # If the name is taken, another worker was first and made the same.
            if not target.exists():
                raise
    except OSError as error:
        raise StorageError(f"{target}: the moved reference can't be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _save_plain(config: Config, folder: Path) -> None:
    """Save the configured reference as plain float32 weights, with adapters merged in."""
    model = load_plain(config)
    model.save_pretrained(folder, max_shard_size="2GB")
    del model
    gc.collect()


def _mix_files(policy: Path, reference: Path, target: Path, alpha: float) -> None:
    theirs = _files_by_tensor(policy)
    target.mkdir()
    for name in sorted(set(_files_by_tensor(reference).values())):
        mixed: dict[str, torch.Tensor] = {}
        with _opened(reference / name) as weights:
            for key in weights.keys():  # noqa: SIM118  # no mapping, though it has keys
                old = weights.get_tensor(key)
                if key not in theirs:
                    raise _not_alike(key, "is not among the policy's")
                with _opened(policy / theirs[key]) as other:
                    new = other.get_tensor(key)
                if new.shape != old.shape:
                    raise _not_alike(key, f"has shape {tuple(old.shape)}, the policy's {tuple(new.shape)}")
                # Counters and masks are not weights.
                mixed[key] = (
                    old.float().mul_(1.0 - alpha).add_(new.float(), alpha=alpha) if old.is_floating_point() else old
                )
        save_file(mixed, target / name, metadata={"format": "pt"})
    for file in reference.glob("*.json"):
        if file.name != MARKER:
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise DataError(f"{file}: damaged weight file: {error}") from error


def _files_by_tensor(folder: Path) -> Mapping[str, str]:
    """Give the name of each tensor's file, by the tensor's name."""
    if (folder / _INDEX).exists():
        names: Mapping[str, str] = read_json(folder / _INDEX)["weight_map"]
        return names
    with _opened(folder / _SINGLE) as weights:
        return dict.fromkeys(weights.keys(), _SINGLE)


def _not_alike(key: str, reason: str) -> ConfigError:
    return ConfigError(
        f"reference.sync: policy and reference can't be mixed: the reference's weight {key} {reason}. A reference that "
        "moves must have the policy's architecture"
    )
