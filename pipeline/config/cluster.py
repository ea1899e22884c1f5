"""The `cluster` section: what a scheduler needs to know of each stage."""

import re
from dataclasses import dataclass, field

__all__ = [
    "ClusterConfig",
    "JobConfig",
    "KubernetesConfig",
]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What one job asks its scheduler for."""

    nodes: int = 1
    """Machines that stage two trains on together; a worker of stage one has one."""
    processes: int = 1
    """Processes on each machine: for stage two one for each GPU; for stage one with `precompute.tp_plan` as well."""
    gpus: int | None = None
    """GPUs on each machine; as many as processes if left out, 0 for none."""
    cpus: int | None = None
    """CPU cores of each process; the scheduler's default if left out."""
    memory: str | None = None
    """Memory on each machine: `200G`, which is 200 GiB for either scheduler; a number alone is in MiB."""
    time: str | None = None
    """Time limit: `90` minutes, `4:00:00`, `2-00:00:00`. What is not done by then is put in the queue again."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("processes", 1), ("gpus", 0), ("cpus", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: at least {least}")
        if self.memory is not None and not re.fullmatch(r"[0-9]+([KMGT]i?)?", self.memory):
            raise ValueError(f"memory: expected a size like 200G, found {self.memory!r}")
        if self.time is not None and not _TIME_LIMIT.fullmatch(self.time):
            raise ValueError(f"time: expected minutes, hours:minutes:seconds or days-hours, found {self.time!r}")

    @property
    def gpus_of_node(self) -> int:
        """GPUs on each machine."""
        return self.processes if self.gpus is None else self.gpus


# As sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
_TIME_LIMIT = re.compile(r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}")


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """What Kubernetes needs to be told on top."""

    image: str | None = None
    """Container image with refshard in it."""
    namespace: str | None = None
    """Namespace; that of the current context if left out."""
    claim: str | None = None
    """A persistent volume claim that is there, which may hold data and models; one is rendered if left out."""
    size: str = "100Gi"
    """Size of the claim that is rendered."""
    storage_class: str | None = None
    """Its storage class, which must allow ReadWriteMany; the cluster's default if left out."""
    mount: str = "/data"
    """Where the volume is mounted, and where the settings' relative paths start."""
    secret: str | None = None
    """A secret whose entries become environment variables: HF_TOKEN, AWS_ACCESS_KEY_ID, ..."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that may run the pods."""

    def __post_init__(self) -> None:
        for name in ("namespace", "claim", "storage_class", "secret"):
            value = getattr(self, name)
            if value is not None and not _DNS_NAME.fullmatch(value):
                raise ValueError(f"{name}: {value!r} is no Kubernetes name: lower-case letters, digits, - and .")
        if not re.fullmatch(r"[0-9]+[KMGTPE]i?", self.size):
            raise ValueError(f"size: expected a size like 100Gi, found {self.size!r}")
        if not self.mount.startswith("/") or ":" in self.mount:
            raise ValueError(f"mount: expected an absolute path without a colon, found {self.mount!r}")


_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The job files that `refshard submit` makes; neither stage reads it."""

    workers: int = 1
    """Workers of stage one: tasks of the Slurm array, indexes of the Kubernetes Job."""
    precompute: JobConfig = field(default_factory=JobConfig)
    """One worker of stage one."""
    train: JobConfig = field(default_factory=JobConfig)
    """Stage two."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, for every job: `[--qos=high, --constraint=a100]`."""
    setup: str | None = None
    """Shell lines that come before the program in a Slurm job: `module load cuda`, `source env/bin/activate`."""
    container: str | None = None
    """What the program is run through in a Slurm job: `apptainer exec --nv refshard.sif`."""
    grace: int = 120
    """Seconds between the warning and the end: for a batch, or a step, and a save. Slurm warns up to 60 s earlier."""
    restarts: int = 100
    """How often the same job is put in the queue again, or a pod started again, before it counts as failed."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """What Kubernetes needs on top."""

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("grace", 1), ("restarts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: at least {least}")
        for name in ("partition", "account"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,@+-]+", value, re.ASCII):
                raise ValueError(f"{name}: {value!r} has characters that no such name has")
        for i, option in enumerate(self.options):
            if not re.fullmatch(r"--?[a-zA-Z][^\n\r]*", option):
                raise ValueError(f"options[{i}]: expected an option of sbatch in one line, like --qos=high")
        if self.precompute.nodes > 1:
            raise ValueError("precompute.nodes: a worker of stage one has one machine; set workers for more of them")
