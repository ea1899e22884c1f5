"""Write and submit job files for Slurm: stage one as an array, a check that nothing is missing, stage two.

    precompute.sh (array) --afterany--> finish.sh --afterok--> train.sh

Shards and checkpoints are safe whatever the scheduler does: it may run two copies of a task, or kill a task. The check
does what killed tasks left undone.
"""

import subprocess
import sys
from pathlib import Path

from pipeline.base.errors import ConfigError
from pipeline.base.progress import say
from pipeline.config.cluster import ClusterConfig
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
    files.write_and_submit(config, into, _job_files, _submit if submit else None)


def _job_files(config: Config, folder: Path) -> dict[str, str]:
    """Give the text of each job file by its name."""
    files.check_text(str(folder), "--into")
    if "\\" in str(folder):
        raise ConfigError(f"--into: must not hold a backslash, which Slurm reads in its own way, got {folder}")
    files.check_text(str(Path.cwd()), "the working folder")
    settings, text = files.settings_file(config)
    jobs = files.jobs_of(config, in_turn=config.reference.sync is not None and config.cluster.workers == 1)
    # As in sbatch's --dependency; stage two alone waits for nothing.
    waits_for = {"precompute": "", "finish": "afterany:$precompute", "train": "afterok:$finish"}
    submit = files.render(
        "slurm-submit.sh.jinja",
        folder=str(folder),
        jobs={job.name: waits_for[job.name] if len(jobs) > 1 else "" for job in jobs},
    )
    scripts = {f"{job.name}.sh": _script(config, folder, str(folder / settings), job) for job in jobs}
    return {settings: text, **scripts, files.SUBMIT: submit}


def _script(config: Config, folder: Path, settings: str, job: files.Job) -> str:
    cluster, asked = config.cluster, getattr(config.cluster, job.stage)
    program = [*_program(cluster), job.stage, "--config", settings]
    # Workers of their own need jobs of their own, for each window.
    repeats = job.stage == "train" and config.reference.sync is not None and cluster.workers > 1
    if repeats:
        program.append("--one-window")
    # Slurm replaces what follows a percent sign in a file's name.
    log = f"{str(folder).replace('%', '%%')}/{'%x-%A_%a.log' if job.workers else '%x-%j.log'}"
    options = {
        "array": job.workers and f"0-{job.workers - 1}",
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
        asked=asked,
        cluster=cluster,
        program=program,
        repeats=repeats,
        name=f"{files.name_of_run(config)}-{job.name}",
        output=_quoted(log),
        options=options,
        folder=str(Path.cwd()),
        record=str(Path(files.output_of(config)) / RECORD),
        submit=str(folder / files.SUBMIT),
        # In an array SLURM_JOB_ID may be the id of the whole array, which would be started again.
        id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.workers else "$SLURM_JOB_ID",
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
    say(f"Submitted: {submitted}")
