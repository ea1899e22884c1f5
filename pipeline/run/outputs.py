"""Guard the user's folders: refuse an output that is, holds or lies in a model, a dataset, a store or another run.

The guard compares an output with the settings' own inputs, and looks at what the folders around it and in it hold.
Links are followed. Only a run's folder or a store of this program is written into a second time.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipeline.base.errors import ConfigError, DataError, StorageError
from pipeline.base.files import TEMPORARY, read_file
from pipeline.base.folders import Folder, LocalFolder, open_folder
from pipeline.config.schema import Config
from pipeline.models.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHT_SUFFIXES
from pipeline.run.attempts import ATTEMPT_NAME
from pipeline.run.checkpoints import MARKER, checkpoint_folders
from pipeline.run.reading import RECORD, SETTINGS
from pipeline.run.records import COSTS, INPUTS, LOG, MARGINS
from pipeline.store.format import is_ours

__all__ = ["guard_output", "guard_run", "guard_shards"]

_ATTEMPTS = "attempts"
_OF_A_RUN = (
    *("joined", "references", MARGINS, LOG, INPUTS, RECORD, SETTINGS, "README.md", "trainer_state.json"),
    *("config.json", "generation_config.json", "model.safetensors", ADAPTER_CONFIG, ADAPTER_WEIGHTS),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)
"""Names that a run writes, besides its checkpoints and `attempts`"""
_OF_A_DATASET = ("state.json", "dataset_info.json")
"""Names that `save_to_disk` writes"""
_MOST_FOLDERS = 1000
"""Folders looked into below an output that is not ours yet"""


def guard_shards(config: Config, *, overwrite: bool = False) -> None:
    """Check `precompute.output` before anything is made.

    Args:
        config: The run's settings.
        overwrite: The stores that are there will be deleted.

    Raises:
        ConfigError: A store would be, hold or lie in a folder of the user's; the message names both.
    """
    output = open_folder(config.precompute.output)
    for name in config.data.names:
        store = output.child(name)
        if isinstance(store, LocalFolder):
            guard_output("precompute.output", store.path, config, ours="a store")
        for reused in config.precompute.reuse if overwrite else ():
            if _are_one(store, open_folder(reused)):
                raise ConfigError(
                    f"precompute.reuse: must not be what --overwrite deletes, got {reused}. Set precompute.output to a "
                    "new folder"
                )
    if isinstance(output, LocalFolder):
        guard_output("precompute.output", output.path / COSTS, config)


def guard_run(config: Config) -> None:
    """Check `train.output_dir` before anything is made. Raises ConfigError as `guard_shards` does."""
    folder = config.train.folder
    shards = open_folder(config.precompute.output)
    if isinstance(shards, LocalFolder):
        for name in (*config.data.names, COSTS):
            _refuse_overlap("train.output_dir", folder, f"precompute.output/{name}", shards.path / name)
    guard_output("train.output_dir", folder, config, ours="a run")
    if config.train.joined_dir:
        guard_output("train.joined_dir", Path(config.train.joined_dir), config)
    if not _is_run(folder):
        there = [name for name in _OF_A_RUN if (folder / name).exists()]
        there += [path.name for path in checkpoint_folders(folder).values()]
        # A kill may leave it empty, or with a file that was being written.
        there += [_ATTEMPTS for path in (folder / _ATTEMPTS).glob("*") if not TEMPORARY.fullmatch(path.name)]
        if there:
            raise ConfigError(
                f"train.output_dir: must be a new folder or a run of refshard, got {folder}, which holds {there[0]} of "
                "another program. Name a new folder"
            )


def guard_output(key: str, folder: Path, config: Config, *, ours: str | None = None) -> None:
    """Refuse a folder that is, holds or lies in one of the user's.

    Args:
        key: Setting or option that names the folder, for messages.
        folder: The output.
        config: The run's settings, whose inputs must not be touched.
        ours: Kind of folder that may be there already: `a run` or `a store`.
    """
    for setting, path in _inputs(config):
        _refuse_overlap(key, folder, setting, path)
    there = folder.expanduser().resolve()
    for parent in there.parents:
        if kind := _kind_of(parent):
            raise ConfigError(f"{key}: must not lie in {kind}, got {folder}, which is in {parent}. Name another folder")
    kind = _kind_of(there)
    if kind not in (None, ours):
        raise ConfigError(f"{key}: must be a new folder, got {folder}, which is {kind}. Name another folder")
    if kind is None:
        for inner in _folders_in(there):
            if found := _kind_of(inner):
                raise ConfigError(
                    f"{key}: must not hold {found}, got {folder}, which holds {inner}. Name another folder"
                )
    else:
        for entry in there.iterdir():
            if entry.is_symlink():
                raise ConfigError(
                    f"{key}: must hold no links, got {entry}, through which files would be written. Remove it"
                )


def _inputs(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield the settings that name an input on this machine, with its path."""
    named = {
        "policy.model": config.policy.model,
        "policy.adapter": config.policy.adapter,
        "reference.model": config.reference.model,
        "reference.adapter": config.reference.adapter,
        "data.path": config.data.path,
        **{f"data.sets.{name}.path": train_set.path for name, train_set in config.data.sets.items()},
        **{f"data.eval.{name}.path": eval_set.path for name, eval_set in config.data.eval.items()},
    }
    for key, name in named.items():
        if name and _exists(Path(name)):
            yield key, Path(name)


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError, RuntimeError):
        return path.expanduser().exists()
    return False


def _refuse_overlap(key: str, folder: Path, other: str, path: Path) -> None:
    if _overlap(folder, path):
        raise ConfigError(
            f"{key}: must not be, hold or lie in {other}, got {folder}, where {other} is {path}. Name another folder"
        )


def _are_one(a: Folder, b: Folder) -> bool:
    """Return True if one folder is the other or lies in it."""
    if isinstance(a, LocalFolder) and isinstance(b, LocalFolder):
        return _overlap(a.path, b.path)
    one, other = f"{a}/", f"{b}/"
    return one.startswith(other) or other.startswith(one)


def _overlap(a: Path, b: Path) -> bool:
    one, other = a.expanduser().resolve(), b.expanduser().resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def _kind_of(folder: Path) -> str | None:
    """Name what a folder is; None if it is nothing that a user could lose."""
    with contextlib.suppress(OSError):
        if _is_run(folder):
            return "a run"
        with contextlib.suppress(DataError, StorageError):
            if is_ours(LocalFolder(folder)):
                return "a store"
        if (folder / ADAPTER_CONFIG).is_file():
            return "an adapter"
        if (folder / "config.json").is_file() and any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir()):
            return "a model"
        if (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in _OF_A_DATASET):
            return "a dataset"
    return None


def _is_run(folder: Path) -> bool:
    """Return True if a folder has an attempt's file, or a checkpoint with our marker, maybe all that was kept."""
    attempts = (file for file in (folder / _ATTEMPTS).glob("*.json") if ATTEMPT_NAME.fullmatch(file.stem))
    with contextlib.suppress(DataError):
        if any(b'"identity"' in read_file(file, most=2**26) for file in attempts):
            return True
    return any(folder.glob(f"checkpoint-*/{MARKER}"))


def _folders_in(folder: Path) -> Iterator[Path]:
    """Yield the folders below a folder, the nearest first, links and hidden folders left out."""
    level, seen = [folder], 0
    while level:
        inner: list[Path] = []
        for place in level:
            with contextlib.suppress(OSError):
                inner += [p for p in sorted(place.iterdir()) if p.is_dir() and not p.is_symlink() and p.name[0] != "."]
        for path in inner:
            yield path
            seen += 1
            if seen >= _MOST_FOLDERS:
                return
        level = inner
