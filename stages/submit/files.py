"""What the job files of every scheduler share: the settings as they are now, a name, templates, whole files.

A job starts hours after it was submitted, so it reads a copy of the settings that nobody edits: its name holds its
digest, and it is never written over.
"""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from pipeline.base.errors import ConfigError, StorageError
from pipeline.base.files import replace_file
from pipeline.config.cluster import ClusterConfig
from pipeline.config.reader import settings_text
from pipeline.config.schema import Config

__all__ = [
    "check_text",
    "job_folder",
    "name_of_run",
    "output_of",
    "render",
    "settings_file",
    "write_job_files",
]


def output_of(config: Config) -> str:
    """Give the folder of the trained policy.

    Raises:
        ConfigError: The settings name none.
    """
    output = config.train.output_dir or str(config.train.folder)
    check_text(output, "train.output_dir")
    return output


def check_text(text: str, where: str) -> None:
    """Refuse what breaks a line of a job file in two, or can't be shown.

    Raises:
        ConfigError: The text has such characters.
    """
    if not text.isprintable():
        raise ConfigError(f"{where}: {text!r} holds characters that do not print, which no job file may")


def job_folder(config: Config, into: Path | None) -> Path:
    """Give the folder that the job files go to, from the root: the one that is named, or `jobs` beside the policy."""
    return (into or Path(output_of(config)) / "jobs").absolute()


def name_of_run(config: Config) -> str:
    """Give the name of the run's jobs: the last two folders of its output, as a DNS label of at most 40 characters.

    Of what is longer, a digest is the end: runs that are tried side by side may differ at their ends alone, and two
    Jobs of Kubernetes can't have one name.
    """
    folders = [part for part in Path(output_of(config)).parts if part not in ("/", "..", ".")]
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(folders[-2:]).lower()).strip("-")
    if len(name) > 40:
        name = f"{name[:31].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "refshard"


def settings_file(config: Config) -> tuple[str, str]:
    """Give the name and the text of the copy of the settings that the jobs read."""
    # What the jobs ask of the cluster is in the job files themselves.
    text = settings_text(dataclasses.replace(config, cluster=ClusterConfig()))
    return f"settings-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml", text


def render(name: str, /, **values: Any) -> str:
    """Fill in a template of `stages/submit/templates`.

    In templates `quote` makes one word of a shell of a value, and `words` a command; `tojson`, which is YAML too,
    makes a value of a manifest.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["words"] = shlex.join
    template = (resources.files("stages.submit.templates") / name).read_text()
    return environment.from_string(template).render(values)


def write_job_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files, each whole or not at all.

    Raises:
        StorageError: The folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_file(folder / name, text.encode())
    except OSError as error:
        raise StorageError(
            f"{folder}: the job files can't be written there ({error.strerror}); name another folder with --into"
        ) from error
