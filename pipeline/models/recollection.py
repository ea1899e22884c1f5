"""Recall what a command found out of its settings and models, as long as all that it read is the same.

The libraries that read a tokenizer take seconds to load. A command that finds nothing left to do needs only what they
said the last time. An entry is found by a digest of the settings, of every file in the models' and adapters' folders,
of the libraries' versions and of this program's own code, so anything that could change an answer makes another entry.
"""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.base.digests import add_to_cache, read_cache, sha256_of_file, stamp_of
from pipeline.base.errors import RefshardError
from pipeline.base.versions import library_versions
from pipeline.config.reader import as_dict
from pipeline.config.schema import Config
from pipeline.models.files import NamedModel, find_adapter, reference_sources
from pipeline.models.identity import TokenizerFacts
from pipeline.models.lengths import exact_length_of_reference

__all__ = ["Recollection", "digest_of_code", "facts_of_run", "facts_of_stores"]

_CACHE = "recollections.json"
_MOST_ENTRIES = 200
_MOST_BYTES = 64 * 2**20
"""Larger files are known by size and times of change, not by content: weights, whose digests the identity takes"""
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft")


class Recollection:
    """Holds the answers that one command found with these settings, if the cache has them."""

    def __init__(self, command: str, config: Config) -> None:
        """Take the digests of all that the answers depend on. Do this before it is read for the answers."""
        self._command, self._config = command, config
        self._stamps, self._key = self._look()

    def recall(self) -> dict[str, Any] | None:
        """Give what was remembered; None if nothing was, or if anything is other than it was."""
        found = None if self._key is None else read_cache(_CACHE).get(self._key)
        return found if isinstance(found, dict) else None

    def remember(self, found: Mapping[str, Any]) -> None:
        """Remember what was found out, unless a file was touched meanwhile, even if it was put back."""
        if self.is_current() and self._key is not None and self.recall() != found:
            add_to_cache(_CACHE, self._key, dict(found), most=_MOST_ENTRIES)

    def is_current(self) -> bool:
        """Return True if no file of the models was touched since the digests were taken."""
        return self._key is not None and (self._stamps, self._key) == self._look()

    def _look(self) -> tuple[list[Any], str | None]:
        """Give the stamps of all files, and the entry's key; None if a model or a library can't be known by it."""
        try:
            folders = [(folder, _files(folder)) for folder in _folders(self._config)]
            # The stamps first: a change while the digests are taken must be noticed.
            stamps = [(str(file), stamp_of(file)) for _, files in folders for file in files]
            libraries = {name: _place_of(name) for name in _LIBRARIES}
            if None in libraries.values():
                return [], None
            inputs = {
                "command": self._command,
                "settings": as_dict(self._config),
                "versions": library_versions(),
                "libraries": libraries,
                "code": digest_of_code(),
                "files": [
                    [(str(file.relative_to(folder)), _content(file)) for file in files] for folder, files in folders
                ],
            }
        except (RefshardError, OSError):
            return [], None
        return stamps, hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def facts_of_stores(config: Config, tokenizer: Any, kept: Mapping[str, int]) -> dict[str, Any]:
    """Give what is recalled of a `precompute` that has passed every check, with these numbers of pairs."""
    return {
        "tokenizer": asdict(TokenizerFacts.of(tokenizer)),
        "exact_length": exact_length_of_reference(config),
        "kept": dict(kept),
    }


def facts_of_run(config: Config, tokenizer: Any, training: Mapping[str, Any], *, pushes: bool) -> dict[str, Any]:
    """Give what is recalled of a `train` whose settings have passed every check.

    `training` is what `identity_of_training` gives; `pushes` says that the policy goes to the hub.
    """
    return {
        "tokenizer": asdict(TokenizerFacts.of(tokenizer)),
        "exact_length": exact_length_of_reference(config),
        "training": dict(training),
        "pushes": pushes,
    }


def _folders(config: Config) -> list[Path]:
    """List the folders that settings, tokenizer and adapters are read from. Fetches no weights."""
    reference, adapter = reference_sources(config)
    models = [NamedModel.policy(config).folder(weights=False), reference.folder(weights=False)]
    named = {"policy.adapter": config.policy.adapter, "reference.adapter": config.reference.adapter}
    adapters = [find_adapter(name, key) for key, name in named.items() if name is not None]
    return [*models, *adapters, *([] if adapter is None else [adapter])]


def _files(folder: Path) -> list[Path]:
    """List the files in a folder and in its folder of chat templates."""
    places = (folder, folder / "additional_chat_templates")
    return [file for place in places for file in sorted(place.glob("*")) if file.is_file()]


def _content(file: Path) -> Any:
    stamp = stamp_of(file)
    return sha256_of_file(file) if stamp[0] <= _MOST_BYTES else stamp


def _place_of(library: str) -> Any:
    """Give the place of a library and the time of the last installation beside it.

    None if it was not installed there: the files of a checkout change, and neither version nor place shows it.
    """
    found = importlib.util.find_spec(library)
    if found is None or found.origin is None:
        return None
    package = Path(found.origin).parent
    if package.parent.name not in ("site-packages", "dist-packages"):
        return None
    return [str(package), stamp_of(package)[1], stamp_of(package.parent)[1]]


@functools.cache
def digest_of_code() -> str:
    """Give the SHA-256, in hex, of this program's own sources."""
    digest = hashlib.sha256()
    for name in ("pipeline", "stages"):
        for file in sorted((Path(__file__).parents[2] / name).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
