"""The `cluster` section: the resources of each stage under a scheduler."""

import re
from dataclasses import dataclass, field

from pipeline.config.convert import require, require_at_least

__all__ = ["ClusterConfig", "JobConfig", "KubernetesConfig"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Resources of one job."""

    nodes: int = 1
    """Number of machines that train together in stage two; 1 for a worker of stage one."""
    processes: int = 1
    """Number of processes on each machine: one for each GPU in stage two; 1 in stage one,
    or more with `precompute.tp_plan`."""
    gpus: int | None = None
    """Number of GPUs on each machine, 0 for none; if left out, as many as processes."""
    cpus: int | None = None
    """Number of CPU cores of each process; if left out, the scheduler's default."""
    memory: str | None = None
    """Memory on each machine: `200G` is 200 GiB for both schedulers; a number alone is in MiB."""
    time: str | None = None
    """Time limit: `90` minutes, `4:00:00`, `2-00:00:00`. A job that reaches it is queued again."""

    def __post_init__(self) -> None:
        require_at_least(self, nodes=1, processes=1, gpus=0, cpus=1)
        _require_form(self, "memory", r"[0-9]+([KMGT]i?)?", "a size like 200G")
        _require_form(self, "time", _TIME_LIMIT, "minutes, hours:minutes:seconds or days-hours")

    @property
    def gpus_of_node(self) -> int:
        """Number of GPUs on each machine."""
        return self.processes if self.gpus is None else self.gpus


# As sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
_TIME_LIMIT = r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}"


def _require_form(section: object, key: str, pattern: str, rule: str) -> None:
    """Refuse a text that is set and does not match. Raises ValueError."""
    value = getattr(section, key)
    require(value is None or re.fullmatch(pattern, value, re.ASCII) is not None, key, rule, value)


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """Further settings for Kubernetes."""

    image: str | None = None
    """Container image with refshard in it, as the `Dockerfile` of its sources builds it."""
    namespace: str | None = None
    """Namespace; if left out, that of the current context."""
    claim: str | None = None
    """Existing persistent volume claim, which may hold data and models; if left out, the manifests make a new one."""
    size: str = "100Gi"
    """Size of the new claim."""
    storage_class: str | None = None
    """Storage class of the new claim, which must allow ReadWriteMany; if left out, the cluster's default."""
    mount: str = "/data"
    """Mount point of the volume; relative paths of the settings start here."""
    secret: str | None = None
    """A secret whose entries become environment variables: HF_TOKEN, AWS_ACCESS_KEY_ID, ..."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that may run the pods."""

    def __post_init__(self) -> None:
        for key in ("namespace", "claim", "storage_class", "secret"):
            rule = "a Kubernetes name of lower-case letters, digits, - and ."
            _require_form(self, key, r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", rule)
        _require_form(self, "size", r"[0-9]+[KMGTPE]i?", "a size like 100Gi")
        is_path = self.mount.startswith("/") and ":" not in self.mount
        require(is_path, "mount", "an absolute path without a colon", self.mount)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Resources of the jobs that `refshard submit` writes; neither stage reads this section."""

    workers: int = 1
    """Number of workers of stage one: tasks of the Slurm array, indexes of the Kubernetes Job."""
    precompute: JobConfig = field(default_factory=JobConfig)
    """Resources of one worker of stage one."""
    train: JobConfig = field(default_factory=JobConfig)
    """Resources of stage two."""
    partition: str | None = None
    """Partition of Slurm; if left out, the cluster's default."""
    account: str | None = None
    """Account of Slurm; if left out, the user's default."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch for every job: `[--qos=high, --constraint=a100]`."""
    setup: str | None = None
    """Shell lines before the program in a Slurm job: `module load cuda`, `source env/bin/activate`."""
    container: str | None = None
    """Command that runs the program in a Slurm job: `apptainer exec --nv refshard.sif`."""
    grace: int = 120
    """Seconds between the signal to stop and the end of a job, for a step and a save. Slurm may signal 60 s earlier."""
    restarts: int = 100
    """Number of times that a job is queued again, or a pod is started again, before the job fails."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """Settings for Kubernetes alone."""

    def __post_init__(self) -> None:
        require_at_least(self, workers=1, grace=1, restarts=0)
        for key in ("partition", "account"):
            _require_form(self, key, r"[\w.,@+-]+", "a name of letters, digits and _.,@+-")
        for i, option in enumerate(self.options):
            is_option = re.fullmatch(r"--?[a-zA-Z][^\n\r]*", option) is not None
            require(is_option, f"options[{i}]", "an option of sbatch in one line, like --qos=high", option)
        nodes = self.precompute.nodes
        require(nodes == 1, "precompute.nodes", "1 for a worker of stage one", nodes, "Set workers for more machines")
