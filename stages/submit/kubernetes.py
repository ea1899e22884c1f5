"""Manifests for Kubernetes: settings, a volume, stage one as an Indexed Job, stage two as a Job; and their submission.

    settings.yaml, volume.yaml     precompute.yaml (Indexed) --> finish.yaml --> train.yaml

Kubernetes has no dependencies between Jobs, and a pod that waited would hold its GPUs: so `submit.sh` waits. Safety is
the shards' and checkpoints' own: two pods of one index may run, a pod may be killed at any time.
"""

import posixpath
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import yaml

from pipeline.base.errors import ConfigError, StorageError
from pipeline.config.cluster import JobConfig
from pipeline.config.schema import Config
from stages.submit.files import check_text, job_folder, name_of_run, output_of, render, settings_file, write_job_files

__all__ = [
    "run",
]


def run(config: Config, *, into: Path | None = None, submit: bool = False) -> None:
    """Write the manifests; submit them if asked to, which waits until stage two has begun.

    Args:
        config: The run's settings. Relative paths in them start at the volume, `cluster.kubernetes.mount`.
        into: Folder of the manifests; `jobs` in the policy's folder, from here, if left out.
        submit: Hand them to Kubernetes.

    Raises:
        ConfigError: The settings can't be run like this, kubectl refuses them, or stage one failed.
        StorageError: The files can't be written.
    """
    folder = job_folder(config, into)
    files = _manifests(config)
    write_job_files(folder, files)
    click.echo(f"Manifests: {folder}")
    if submit:
        _submit(folder)
    else:
        click.echo(f"Submit them with: sh {shlex.quote(str(folder / _SUBMIT))}")


_SUBMIT = "submit.sh"


def _manifests(config: Config) -> dict[str, str]:
    """Give the text of each file by its name."""
    cluster, kubernetes, run = config.cluster, config.cluster.kubernetes, name_of_run(config)
    _check(config)
    settings, text = settings_file(config)
    # In ASCII each line of the text is a line for every reader of YAML.
    text = yaml.safe_dump(yaml.safe_load(text), sort_keys=False).rstrip()
    # The shards are all that the workers share.
    in_object_store, moves = "://" in config.precompute.output, config.reference.sync is not None
    # Only the workers of stage one are on several nodes at a time, and then a volume serves any number of runs, which
    # share shards and what comes from the hub.
    alone = in_object_store or moves
    claim = kubernetes.claim or (f"{run}-data" if alone else "refshard-data")
    common: dict[str, Any] = {"namespace": kubernetes.namespace}
    name_of_settings = f"{run}-{settings.removesuffix('.yaml')}"
    files = {"settings.yaml": render("kubernetes-settings.yaml.jinja", name=name_of_settings, settings=text, **common)}
    if kubernetes.claim is None:
        files["volume.yaml"] = render(
            "kubernetes-volume.yaml.jinja",
            about="What the pods keep: checkpoints, the policy, files from the hub"
            + (". The shards are in an object store." if in_object_store else ", and the shards."),
            name=claim,
            access="ReadWriteOnce" if alone else "ReadWriteMany",
            storage_class=kubernetes.storage_class,
            size=kubernetes.size,
            **common,
        )
    # Without it the workers may be wherever there are GPUs; a claim that is there may hold the data.
    mounted = None if in_object_store and kubernetes.claim is None else claim
    common |= {"config": config, "settings": name_of_settings}
    stage_one = {"job": cluster.precompute, "program": "precompute", "claim": mounted, **common}
    stage_two = {"job": cluster.train, "program": "train", "claim": claim, **common}
    if moves:
        jobs = {"train": _job("train", about="Both stages in turn, while the reference moves.", **stage_two)}
    else:
        jobs = {
            "precompute": _job(
                "precompute",
                about="Stage one: each index does its share of the units. Another number of workers does as well.",
                workers=cluster.workers,
                **stage_one,
            ),
            "finish": _job(
                "finish",
                about="Stage one is complete when this ends well: it does what is still missing, usually nothing.",
                **stage_one,
            ),
            "train": _job("train", about="Stage two. It checks by itself that stage one is complete.", **stage_two),
        }
    submit = render(
        "kubernetes-submit.sh.jinja",
        objects=[name.removesuffix(".yaml") for name in files],
        jobs=list(jobs),
    )
    return {**files, **{f"{name}.yaml": text for name, text in jobs.items()}, _SUBMIT: submit}


def _check(config: Config) -> None:
    """Refuse what would fail only on the cluster, or lose its results there."""
    cluster, kubernetes = config.cluster, config.cluster.kubernetes
    image = kubernetes.image
    if image is None:
        raise ConfigError("cluster.kubernetes.image: missing; name a container image with refshard in it")
    if not re.fullmatch(r"[\w./:@-]+", image, re.ASCII):
        raise ConfigError(f"cluster.kubernetes.image: {image!r} has characters that no image's name has")
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest"):
        raise ConfigError(
            f"cluster.kubernetes.image: {image} may be another image tomorrow, in the middle of the run; name a tag "
            "other than latest, or a digest"
        )
    check_text(kubernetes.mount, "cluster.kubernetes.mount")
    if cluster.train.nodes > 1:
        raise ConfigError(
            "cluster.train.nodes: a Job of Kubernetes trains on one node. For more of them use refshard submit slurm, "
            "or run train.yaml's command under JobSet or Kubeflow Trainer"
        )
    kept = {"train.output_dir": output_of(config)}
    if "://" not in config.precompute.output:
        kept["precompute.output"] = config.precompute.output
    for where, path in kept.items():
        mount = posixpath.normpath(kubernetes.mount)
        place = posixpath.normpath(posixpath.join(mount, path))
        if path.startswith("~") or "://" in path or not place.startswith(f"{mount.rstrip('/')}/"):
            raise ConfigError(
                f"{where}: {path} is not on the volume, and would be lost with its pod; name a folder in "
                f"{mount} (cluster.kubernetes.mount), where relative paths start"
            )


def _job(
    name: str,
    *,
    about: str,
    config: Config,
    job: JobConfig,
    program: str,
    settings: str,
    namespace: str | None,
    claim: str | None,
    workers: int | None = None,
) -> str:
    cluster, kubernetes = config.cluster, config.cluster.kubernetes
    command = ["refshard", program, "--config", "/etc/refshard/settings.yaml"]
    # The kubelet puts in the index.
    command += ["--worker", f"$(JOB_COMPLETION_INDEX)/{workers}"] if workers else []
    command += ["--processes", str(job.processes)] if job.processes > 1 else []
    if job.time is not None:
        command += ["--stop-after", _time_to_work(job.time, cluster.grace, f"cluster.{program}.time")]
    memory = {} if job.memory is None else {"memory": _quantity(job.memory)}
    return render(
        "kubernetes-job.yaml.jinja",
        about=about,
        name=f"{name_of_run(config)}-{name}",
        namespace=namespace,
        workers=workers,
        restarts=cluster.restarts,
        grace=cluster.grace,
        node_selector=kubernetes.node_selector,
        image=kubernetes.image,
        command=command,
        mount=kubernetes.mount,
        # In the value of a variable, $(NAME) stands for another variable.
        cache=posixpath.join(kubernetes.mount, ".cache").replace("$", "$$"),
        secret=kubernetes.secret,
        # No limit on the cores: it would slow down what may use idle ones.
        requests=memory | ({} if job.cpus is None else {"cpu": str(job.cpus * job.processes)}),
        limits=memory | ({"nvidia.com/gpu": str(job.gpus_of_node)} if job.gpus_of_node else {}),
        settings=settings,
        claim=claim,
    )


def _quantity(memory: str) -> str:
    """Give a size as Kubernetes writes it. As with Slurm, G is GiB, and a number alone is in MiB."""
    return f"{memory}Mi" if memory.isdecimal() else f"{memory.removesuffix('i')}i"


def _time_to_work(limit: str, grace: int, where: str) -> str:
    """Give the time, as --stop-after reads it, after which a pod leaves so as to be gone within a time limit.

    A deadline of Kubernetes' own would fail the Job.
    """
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # As sbatch reads it: from minutes, or from hours where there are days.
    hours, minutes, seconds = ([*parts, 0, 0] if days or len(parts) == 3 else [0, *parts, 0])[:3]
    left = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds - grace
    if left <= 0:
        raise ConfigError(
            f"{where}: {limit} leaves no time before the {grace} s that are left for a save (cluster.grace)"
        )
    return f"{left // 3600}h{left // 60 % 60}m{left % 60}s"


def _submit(folder: Path) -> None:
    click.echo("Waiting for stage one, to start stage two then. Interrupted, the same command goes on.")
    try:
        done = subprocess.run(["sh", str(folder / _SUBMIT)], stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise StorageError(f"sh can't be started ({error.strerror})") from error
    if done.returncode == 127:
        raise ConfigError("kubectl: no such command here; submit on a machine that has it, from the folder above")
    if done.returncode:
        raise ConfigError(f"Kubernetes, {folder}: {done.stderr.strip()}. See kubectl logs; then run this again")
