"""Write and submit manifests for Kubernetes: settings, a volume, stage one as an Indexed Job, stage two as a Job.

    settings.yaml, volume.yaml     precompute.yaml (Indexed) --> finish.yaml --> train.yaml

Kubernetes has no dependencies between Jobs, and a waiting pod would hold its GPUs, so `submit.sh` waits. Shards and
checkpoints are safe if two pods of one index run, or a pod is killed at any time.
"""

import posixpath
import re
from pathlib import Path

import yaml

from pipeline.base.errors import ConfigError
from pipeline.base.progress import say
from pipeline.config.schema import Config
from stages.submit import files

__all__ = ["run"]


def run(config: Config, *, into: Path | None = None, submit: bool = False) -> None:
    """Write the manifests; submit them if asked to, which waits until stage two has begun.

    Relative paths in the settings start at the volume, `cluster.kubernetes.mount`.

    Raises:
        ConfigError: Kubernetes can't run these settings, kubectl refuses them, or stage one failed.
        StorageError: The files can't be written.
    """
    files.write_and_submit(config, into, _manifests, _submit if submit else None)


def _manifests(config: Config, folder: Path) -> dict[str, str]:
    """Give the text of each file by its name."""
    kubernetes, run = config.cluster.kubernetes, files.name_of_run(config)
    _check(config)
    settings, text = files.settings_file(config)
    # In ASCII, each line of the text is a line for every reader of YAML.
    text = yaml.safe_dump(yaml.safe_load(text), sort_keys=False).rstrip()
    # The workers share only the shards.
    in_object_store, moves = "://" in config.precompute.output, config.reference.sync is not None
    # Only the workers of stage one are on several nodes at a time. Then one volume serves any number of runs, which
    # share shards and files from the hub.
    alone = in_object_store or moves
    claim = kubernetes.claim or (f"{run}-data" if alone else "refshard-data")
    name = f"{run}-{settings.removesuffix('.yaml')}"
    objects = {
        "settings.yaml": files.render("kubernetes-settings.yaml.jinja", name=name, settings=text, kubernetes=kubernetes)
    }
    if kubernetes.claim is None:
        volume = {"claim": claim, "alone": alone, "in_object_store": in_object_store}
        objects["volume.yaml"] = files.render("kubernetes-volume.yaml.jinja", kubernetes=kubernetes, **volume)
    # Without a claim, which may hold the data, the workers may be on any node with GPUs.
    mounted = None if in_object_store and kubernetes.claim is None else claim
    jobs = files.jobs_of(config, in_turn=moves)
    submit = files.render(
        "kubernetes-submit.sh.jinja",
        objects=[file.removesuffix(".yaml") for file in objects],
        jobs=[job.name for job in jobs],
    )
    claims = {"precompute": mounted, "train": claim}
    manifests = {f"{job.name}.yaml": _manifest(config, job, name, claims[job.stage]) for job in jobs}
    return {**objects, **manifests, files.SUBMIT: submit}


def _check(config: Config) -> None:
    """Refuse settings that would fail only on the cluster, or lose their results there."""
    cluster, kubernetes = config.cluster, config.cluster.kubernetes
    image = kubernetes.image
    if image is None:
        raise ConfigError(
            "cluster.kubernetes.image: missing; name a container image with refshard in it, built with its Dockerfile"
        )
    if not re.fullmatch(r"[\w./:@-]+", image, re.ASCII):
        raise ConfigError(f"cluster.kubernetes.image: must be an image's name, got {image!r}")
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest"):
        raise ConfigError(
            f"cluster.kubernetes.image: must have a digest or a tag other than latest, got {image}, which may be "
            "another image tomorrow"
        )
    files.check_text(kubernetes.mount, "cluster.kubernetes.mount")
    if cluster.train.nodes > 1:
        raise ConfigError(
            f"cluster.train.nodes: must be 1 for a Job of Kubernetes, got {cluster.train.nodes}. Use refshard submit "
            "slurm for more, or run train.yaml's command under JobSet or Kubeflow Trainer"
        )
    kept = {"train.output_dir": files.output_of(config)}
    if "://" not in config.precompute.output:
        kept["precompute.output"] = config.precompute.output
    for where, path in kept.items():
        mount = posixpath.normpath(kubernetes.mount)
        place = posixpath.normpath(posixpath.join(mount, path))
        if "://" in path or not place.startswith(f"{mount.rstrip('/')}/"):
            raise ConfigError(
                f"{where}: must be on the volume, got {path}, which is lost with its pod. Name a folder in {mount} "
                "(cluster.kubernetes.mount), where relative paths start"
            )


def _manifest(config: Config, job: files.Job, settings: str, claim: str | None) -> str:
    cluster, kubernetes, asked = config.cluster, config.cluster.kubernetes, getattr(config.cluster, job.stage)
    command = ["refshard", job.stage, "--config", "/etc/refshard/settings.yaml"]
    # The kubelet fills in the index.
    command += ["--worker", f"$(JOB_COMPLETION_INDEX)/{job.workers}"] if job.workers else []
    command += ["--processes", str(asked.processes)] if asked.processes > 1 else []
    if asked.time is not None:
        command += ["--stop-after", _time_to_work(asked.time, cluster.grace, f"cluster.{job.stage}.time")]
    memory = {} if asked.memory is None else {"memory": _quantity(asked.memory)}
    return files.render(
        "kubernetes-job.yaml.jinja",
        job=job,
        cluster=cluster,
        kubernetes=kubernetes,
        name=f"{files.name_of_run(config)}-{job.name}",
        command=command,
        # $(NAME) in a variable's value stands for another variable.
        cache=posixpath.join(kubernetes.mount, ".cache").replace("$", "$$"),
        # A limit on the cores would keep idle ones from use.
        requests=memory | ({} if asked.cpus is None else {"cpu": str(asked.cpus * asked.processes)}),
        limits=memory | ({"nvidia.com/gpu": str(asked.gpus_of_node)} if asked.gpus_of_node else {}),
        settings=settings,
        claim=claim,
    )


def _quantity(memory: str) -> str:
    """Give a size in Kubernetes' form. As with Slurm, G is GiB, and a number alone is in MiB."""
    return f"{memory}Mi" if memory.isdecimal() else f"{memory.removesuffix('i')}i"


def _time_to_work(limit: str, grace: int, where: str) -> str:
    """Give the time for --stop-after that lets a pod leave within its time limit.

    A deadline of Kubernetes' own would fail the Job.
    """
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # As in sbatch: from minutes, or from hours after days.
    hours, minutes, seconds = ([*parts, 0, 0] if days or len(parts) == 3 else [0, *parts, 0])[:3]
    left = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds - grace
    if left <= 0:
        raise ConfigError(f"{where}: must be longer than the {grace} s for a save (cluster.grace), got {limit}")
    return f"{left // 3600}h{left // 60 % 60}m{left % 60}s"


def _submit(script: Path) -> None:
    say("Waiting for stage one; stage two starts after it. If this is interrupted, run the same command again.")
    done = files.run_script(script, "kubectl")
    if done.returncode:
        raise ConfigError(f"Kubernetes, {script.parent}: {done.stderr.strip()}. See kubectl logs; then run this again")
