"""Job files for Slurm: stage one as an array, a check that nothing is missing, stage two; and their submission.

    precompute.sh (array) --afterany--> finish.sh --afterok--> train.sh

Safety is the shards' and checkpoints' own, whatever the scheduler does: two copies of one task may run, a task may
be killed, and the check does what killed tasks left undone.
"""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from pipeline.base.errors import ConfigError, StorageError
from pipeline.config.cluster import ClusterConfig, JobConfig
from pipeline.config.schema import Config
from pipeline.run.reading import RECORD
from stages.submit.files import check_text, job_folder, name_of_run, output_of, render, settings_file, write_job_files

__all__ = [
    "run",
]


def run(config: Config, *, into: Path | None = None, submit: bool = False) -> None:
    """Write the job files; submit them if asked to.

    Args:
        config: The run's settings.
        into: Folder of the job files; `jobs` in the policy's folder if left out.
        submit: Hand them to Slurm.

    Raises:
        ConfigError: The settings can't be run like this, or sbatch refuses them.
        StorageError: The files can't be written.
    """
    folder = job_folder(config, into)
    files = _job_files(config, folder)
    write_job_files(folder, files)
    click.echo(f"Job files: {folder}")
    if submit:
        _submit(folder)
    else:
        click.echo(f"Submit them with: sh {shlex.quote(str(folder / _SUBMIT))}")


_SUBMIT = "submit.sh"


def _job_files(config: Config, folder: Path) -> dict[str, str]:
    """Give the text of each job file by its name."""
    check_text(str(folder), "--into")
    if "\\" in str(folder):
        raise ConfigError(
            f"--into {folder}: Slurm reads a backslash in a log's name in its own way; name another folder"
        )
    check_text(str(Path.cwd()), "the working folder")
    cluster, moves = config.cluster, config.reference.sync is not None
    settings, text = settings_file(config)
    program = _program(cluster)
    precompute = [*program, "precompute", "--config", str(folder / settings)]
    train = [*program, "train", "--config", str(folder / settings)]
    if moves and cluster.workers == 1:
        # One job alternates between the stages by itself, and waits in the queue once.
        about = "Both stages in turn, while the reference moves."
        scripts = {"train": _script(config, folder, "train", cluster.train, about=about, program=train)}
        waits_for = {"train": ""}
    else:
        about = "Stage two. It checks by itself that stage one is complete."
        following = None
        if moves:
            train.append("--one-window")
            about = "Stage two up to the step where the reference moves."
            following = {
                "about": "The next window, stage one first, unless that was the last one.",
                "unless": str(Path(output_of(config)).expanduser() / RECORD),
                "script": str(folder / _SUBMIT),
            }
        scripts = {
            "precompute": _script(
                config,
                folder,
                "precompute",
                cluster.precompute,
                about="Stage one: this task's share of the units. By hand: sbatch precompute.sh; --array=0-N with "
                "another N does as well.",
                program=precompute,
                share="$SLURM_ARRAY_TASK_ID/$((SLURM_ARRAY_TASK_MAX + 1))",
                array=f"0-{cluster.workers - 1}",
            ),
            "finish": _script(
                config,
                folder,
                "finish",
                cluster.precompute,
                about="Stage one is complete when this ends well: it does what killed tasks left undone, usually "
                "nothing.",
                program=precompute,
            ),
            "train": _script(config, folder, "train", cluster.train, about=about, program=train, following=following),
        }
        # As sbatch's --dependency has it.
        waits_for = {"precompute": "", "finish": "afterany:$precompute", "train": "afterok:$finish"}
    submit = render(
        "slurm-submit.sh.jinja",
        about="Each job waits for the one before it. Submitted again, the jobs do what is missing.",
        folder=str(folder),
        jobs=waits_for,
    )
    return {settings: text, **{f"{name}.sh": text for name, text in scripts.items()}, _SUBMIT: submit}


def _script(
    config: Config,
    folder: Path,
    name: str,
    job: JobConfig,
    *,
    about: str,
    program: list[str],
    share: str | None = None,
    array: str | None = None,
    following: Mapping[str, str] | None = None,
) -> str:
    cluster = config.cluster
    log = "%x-%A_%a.log" if array else "%x-%j.log"
    # In a file's name, Slurm replaces what follows a percent sign.
    escaped = str(folder).replace("%", "%%")
    options = [
        f"--job-name={name_of_run(config)}-{name}",
        f"--output={_quoted(f'{escaped}/{log}')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{cluster.grace}",
        "--kill-on-invalid-dep=yes",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes}",
    ]
    options += [f"--array={array}"] if array else []
    asked = {
        "cpus-per-task": job.cpus,
        "gpus-per-node": job.gpus_of_node or None,
        # Slurm's G is Kubernetes' Gi.
        "mem": job.memory and job.memory.removesuffix("i"),
        "time": job.time,
        "partition": cluster.partition,
        "account": cluster.account,
    }
    options += [f"--{option}={value}" for option, value in asked.items() if value is not None]
    several = job.nodes * job.processes > 1
    return render(
        "slurm.sh.jinja",
        options=[*options, *cluster.options],
        about=about,
        folder=str(Path.cwd()),
        setup=(cluster.setup or "").strip(),
        container=(cluster.container or "").strip(),
        program=program,
        ranks=job.processes if several else 0,
        # srun does not take it over from sbatch (since 22.05), and would leave each rank one core.
        cpus=job.cpus,
        share=share,
        next=following,
        restarts=cluster.restarts,
        # In an array SLURM_JOB_ID may be the id of the whole of it, and all of it would be started again.
        job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID",
    )


def _program(cluster: ClusterConfig) -> list[str]:
    """The command as a job finds it: the one that runs now, unless the job has an environment of its own."""
    own = Path(sys.executable).with_name("refshard")
    return ["refshard"] if cluster.setup or cluster.container or not own.exists() else [str(own)]


def _quoted(text: str) -> str:
    """Quote a value of an #SBATCH line, which no shell reads."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _submit(folder: Path) -> None:
    try:
        done = subprocess.run(["sh", str(folder / _SUBMIT)], capture_output=True, text=True)
    except OSError as error:
        raise StorageError(f"sh can't be started ({error.strerror})") from error
    if done.returncode == 127:
        raise ConfigError("sbatch: no such command here; submit on a machine that has Slurm's, from the folder above")
    submitted = ", ".join(done.stdout.split("\n")[:-1])
    if done.returncode:
        there = f"; submitted before that: {submitted}, to be cancelled with scancel" if submitted else ""
        raise ConfigError(f"sbatch refused a job of {folder}: {done.stderr.strip()}{there}")
    click.echo(f"Submitted: {submitted}")
