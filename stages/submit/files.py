"""Job files of every scheduler: a copy of the settings, the jobs' name, templates, writing and submitting.

A job starts hours after it was submitted, so it reads a copy of the settings that nobody edits. The copy's name holds
its digest, and it is never overwritten.
"""

import dataclasses
import hashlib
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from pipeline.base.errors import ConfigError, StorageError
from pipeline.base.files import read_head, replace_file
from pipeline.base.progress import say
from pipeline.config.cluster import ClusterConfig
from pipeline.config.reader import settings_text
from pipeline.config.schema import Config

__all__ = [
    "SUBMIT",
    "Job",
    "check_text",
    "jobs_of",
    "name_of_run",
    "output_of",
    "render",
    "run_script",
    "settings_file",
    "write_and_submit",
]

SUBMIT = "submit.sh"


@dataclass(frozen=True)
class Job:
    """One job of a run."""

    name: str
    about: str
    workers: int | None = None
    """Number of workers that share stage one; None for a job that is not shared"""

    @property
    def stage(self) -> str:
        """Command of the job, and the section of its resources in `cluster`."""
        return "train" if self.name == "train" else "precompute"


def jobs_of(config: Config, *, in_turn: bool) -> list[Job]:
    """Plan the jobs, in their order; a single one if the stages alternate in one job."""
    if in_turn:
        return [Job("train", "Both stages in turn, while the reference moves.")]
    stage_two = "Stage two. It checks by itself that stage one is complete."
    if config.reference.sync is not None:
        stage_two = "Stage two up to the step where the reference moves."
    return [
        Job("precompute", "Stage one, shared by its workers; any number of them does.", config.cluster.workers),
        Job("finish", "Stage one is complete when this ends well: it does what is still missing, usually nothing."),
        Job("train", stage_two),
    ]


def output_of(config: Config) -> str:
    """Give the folder of the trained policy. Raises ConfigError if the settings name none."""
    output = config.train.output_dir or str(config.train.folder)
    check_text(output, "train.output_dir")
    return output


def check_text(text: str, where: str) -> None:
    """Refuse text that breaks a line of a job file, or can't be shown. Raises ConfigError."""
    if not text.isprintable():
        raise ConfigError(f"{where}: must hold printable characters only, got {text!r}")


def name_of_run(config: Config) -> str:
    """Give the name of the run's jobs: the last two folders of its output, as a DNS label of at most 40 characters.

    A longer name ends in a digest, since runs side by side may differ only at their ends, and Kubernetes refuses two
    Jobs of one name.
    """
    folders = [part for part in Path(output_of(config)).parts if part not in ("/", "..", ".")]
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(folders[-2:]).lower()).strip("-")
    if len(name) > 40:
        name = f"{name[:31].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "refshard"


def settings_file(config: Config) -> tuple[str, str]:
    """Give name and text of the jobs' copy of the settings."""
    # The job files hold what the jobs ask of the cluster.
    text = settings_text(dataclasses.replace(config, cluster=ClusterConfig()))
    return f"settings-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml", text


def render(name: str, /, **values: Any) -> str:
    """Fill in a template of `stages/submit/templates`.

    Filters: `quote` makes one word of a shell, `words` a command, and `tojson`, which is YAML too, a manifest's value.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"quote": shlex.quote, "words": shlex.join}
    template = (resources.files("stages.submit.templates") / name).read_text()
    return environment.from_string(template).render(values)


def write_and_submit(
    config: Config,
    into: Path | None,
    make: Callable[[Config, Path], Mapping[str, str]],
    submit: Callable[[Path], None] | None,
) -> None:
    """Write the files that `make` gives, each whole or not at all; then submit them, or print how to.

    Args:
        config: The run's settings.
        into: Folder of the files; `jobs` in the run's folder if left out.
        make: Gives the text of each file by its name, from the settings and the absolute folder.
        submit: Runs the file `submit.sh` among them; None: not now.

    Raises:
        ConfigError: The folder holds files of another program under these names.
        StorageError: The folder can't be written.
    """
    folder = (into or Path(output_of(config)) / "jobs").absolute()
    files = make(config, folder)
    there = [folder / name for name in files if (folder / name).exists()]
    if there and not _is_ours(folder / SUBMIT):
        raise ConfigError(f"--into: must hold no files of another program, got {there[0]}. Name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_file(folder / name, text.encode())
    except OSError as error:
        raise StorageError(
            f"{folder}: the job files can't be written there ({error.strerror}). Name another folder with --into"
        ) from error
    say(f"Job files: {folder}")
    if submit is None:
        say(f"Submit them with: sh {shlex.quote(str(folder / SUBMIT))}")
    else:
        submit(folder / SUBMIT)


def _is_ours(script: Path) -> bool:
    """Return True if a script is the one that this program writes, by the sentence at its start."""
    head = read_head(script, 1000)
    return any(words in head for words in _OPENINGS)


_OPENINGS = (b"# Each job waits for the one before it", b"# Each Job begins when the one before it")


def run_script(script: Path, tool: str, *, stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script that submits; its stderr is captured. Raises ConfigError if this machine lacks the tool."""
    try:
        done = subprocess.run(["sh", str(script)], stdout=stdout, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise StorageError(f"sh can't be started ({error.strerror})") from error
    if done.returncode == 127:
        raise ConfigError(f"{tool}: not a command here. Submit on a machine that has it, from the folder above")
    return done
