"""Write and submit job files for Slurm: stage one as an array, a check that nothing is missing, stage two.

    precompute.sh (array) --afterany--> finish.sh --afterok--> train.sh

Shards and checkpoints are safe whatever the scheduler does: it may run two copies of a task, or kill a task. The check
does what killed tasks left undone.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.base.errors import ConfigError
from pipeline.config.cluster import ClusterConfig, JobConfig
from pipeline.config.schema import Config
from pipeline.run.reading import RECORD
from stages.submit import files

__all__ = ["run"]


def run(config: Config, *, into: Path | None = None, submit: bool = False) -> None:
    """Write the job files; submit them if asked to.

    Raises:
        ConfigError: Slurm can't run these settings, or sbatch refuses a job.
        StorageError: The files can't be written.
    """
    folder = files.job_folder(config, into)
    files.write_and_submit("Job files", folder, _job_files(config, folder), _submit if submit else None)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One job script."""

    name: str
    about: str
    resources: JobConfig
    program: Sequence[str]
    share: str | None = None
    """Value of `--worker`, in which the shell replaces variables"""
    array: str | None = None
    """Indexes of the array, like `0-7`"""
    repeats: bool = False
    """True if the job submits all jobs again, until the run's record exists"""


def _job_files(config: Config, folder: Path) -> dict[str, str]:
    """Give the text of each job file by its name."""
    files.check_text(str(folder), "--into")
    if "\\" in str(folder):
        raise ConfigError(f"--into: must not hold a backslash, which Slurm reads in its own way, got {folder}")
    files.check_text(str(Path.cwd()), "the working folder")
    settings, text = files.settings_file(config)
    jobs = _jobs(config, str(folder / settings))
    # As in sbatch's --dependency; stage two alone waits for nothing.
    waits_for = {"precompute": "", "finish": "afterany:$precompute", "train": "afterok:$finish"}
    submit = files.render(
        "slurm-submit.sh.jinja",
        folder=str(folder),
        jobs={job.name: waits_for[job.name] if len(jobs) > 1 else "" for job in jobs},
    )
    scripts = {f"{job.name}.sh": _script(config, folder, job) for job in jobs}
    return {settings: text, **scripts, files.SUBMIT: submit}


def _jobs(config: Config, settings: str) -> list[_Job]:
    """Plan the jobs, in their order."""
    cluster, moves = config.cluster, config.reference.sync is not None
    precompute, train = ([*_program(cluster), stage, "--config", settings] for stage in ("precompute", "train"))
    if moves and cluster.workers == 1:
        # One job alternates between the stages, and waits in the queue once.
        about = "Both stages in turn, while the reference moves."
        return [_Job(name="train", about=about, resources=cluster.train, program=train)]
    about = "Stage two. It checks by itself that stage one is complete."
    if moves:
        train.append("--one-window")
        about = "Stage two up to the step where the reference moves."
    return [
        _Job(
            name="precompute",
            about="Stage one: this task's share of the units. By hand: sbatch precompute.sh; --array=0-N with another "
            "N does as well.",
            resources=cluster.precompute,
            program=precompute,
            share="$SLURM_ARRAY_TASK_ID/$((SLURM_ARRAY_TASK_MAX + 1))",
            array=f"0-{cluster.workers - 1}",
        ),
        _Job(
            name="finish",
            about="Stage one is complete when this ends well: it does what killed tasks left undone, usually nothing.",
            resources=cluster.precompute,
            program=precompute,
        ),
        _Job(name="train", about=about, resources=cluster.train, program=train, repeats=moves),
    ]


def _script(config: Config, folder: Path, job: _Job) -> str:
    cluster, asked = config.cluster, job.resources
    # Slurm replaces what follows a percent sign in a file's name.
    log = f"{str(folder).replace('%', '%%')}/{'%x-%A_%a.log' if job.array else '%x-%j.log'}"
    options = {
        "array": job.array,
        "cpus-per-task": asked.cpus,
        "gpus-per-node": asked.gpus_of_node or None,
        # Slurm's G is Kubernetes' Gi.
        "mem": asked.memory and asked.memory.removesuffix("i"),
        "time": asked.time,
        "partition": cluster.partition,
        "account": cluster.account,
    }
    return files.render(
        "slurm.sh.jinja",
        job=job,
        cluster=cluster,
        name=f"{files.name_of_run(config)}-{job.name}",
        output=_quoted(log),
        options=options,
        folder=str(Path.cwd()),
        record=str(Path(files.output_of(config)) / RECORD),
        submit=str(folder / files.SUBMIT),
        # In an array SLURM_JOB_ID may be the id of the whole array, which would be started again.
        id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.array else "$SLURM_JOB_ID",
    )


def _program(cluster: ClusterConfig) -> list[str]:
    """Give the command: the one that runs now, unless the job has an environment of its own."""
    own = Path(sys.executable).with_name("refshard")
    return ["refshard"] if cluster.setup or cluster.container or not own.exists() else [str(own)]


def _quoted(text: str) -> str:
    """Quote a value of an #SBATCH line, which no shell reads."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _submit(script: Path) -> None:
    done = files.run_script(script, "sbatch", stdout=subprocess.PIPE)
    submitted = ", ".join(done.stdout.split("\n")[:-1])
    if done.returncode:
        there = f". Cancel with scancel what was submitted before that: {submitted}" if submitted else ""
        raise ConfigError(f"sbatch refused a job of {script.parent}: {done.stderr.strip()}{there}")
    click.echo(f"Submitted: {submitted}")
