"""A real Slurm on this machine, for tests: its daemons as plain processes, on loopback, without systemd or root.

Debian's packages `slurm-wlm` and `munge` have them. Several nodes are several slurmd's on one host. Jobs of the
partition `batch` are put back in the queue by those of `urgent`.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
WHY_NOT = ", ".join(name for name in NEEDED if shutil.which(name, path=_PATH) is None)

_CONF = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start again once its credential has expired: five seconds is the least that Slurm takes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}
JobRequeue=1
KillWait=5
# As some clusters have it: what srun is not told otherwise, it does to the ranks that are left after the first.
WaitTime=2
MinJobAge=86400
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
# Nodes may have more processors in the file than in the machine.
SlurmdParameters=config_overrides
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=60 DefaultTime=10 State=UP
PartitionName=batch Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """The cluster, as long as it runs."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self.folder, self._nodes, self._cpus = folder, nodes, cpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        port = _free_ports(1 + self._nodes)
        # The name of this setting changed in 23.02.
        old = "slurm-wlm 22" in self._ask("slurmctld", "-V")
        nodes = (
            f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port + 1 + i} CPUs={self._cpus} "
            "RealMemory=8000 State=UNKNOWN"
            for i in range(self._nodes)
        )
        (self.folder / "slurm.conf").write_text(
            _CONF.format(
                folder=self.folder,
                port=port,
                user=self._ask("id", "-un").strip(),
                user_signal="SlurmctldParameters=preempt_send_user_signal"
                if old
                else "PreemptParameters=send_user_signal",
                nodes="\n".join(nodes),
            )
        )
        munge = ("munge.socket", "munge.log", "munge.seed", "munge.pid")
        names = (f"--{name.split('.')[1]}{'' if 'socket' in name else '-file'}={self.folder / name}" for name in munge)
        self._launch("munged", "--foreground", "--force", f"--key-file={key}", *names)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.start_controller()
        for i in range(self._nodes):
            self.start_node(i)
        self._until(lambda: self._ask("sinfo", "-hNp", "batch", "-o", "%t").split() == ["idle"] * self._nodes, "slurmd")

    def start_controller(self) -> None:
        self._launch("slurmctld", "-D", "-i")
        self._until(lambda: "UP" in self._ask("scontrol", "ping"), "slurmctld")

    def start_node(self, i: int) -> None:
        (self.folder / f"spool-n{i}").mkdir(exist_ok=True)
        self._launch("slurmd", "-D", "-N", f"n{i}", name=f"slurmd-{i}")

    def kill_daemon(self, name: str) -> None:
        self._daemons[name].kill()
        self._daemons[name].wait()

    def stop(self) -> None:
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            self._ask("scancel", f"--user={self._ask('id', '-un').strip()}")
            with contextlib.suppress(AssertionError):
                self._until(lambda: not self._ask("squeue", "-hat", "R,CG"), "scancel", 15)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        # What a lost slurmstepd left.
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, **variables: str) -> list[int]:
        """Processes of this cluster's jobs whose environment has the variables."""
        wanted = {f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        wanted |= {f"{name}={value}".encode() for name, value in variables.items()}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = set((folder / "environ").read_bytes().split(b"\0"))
                if wanted <= environment and any(v.startswith(b"SLURM_JOB_ID=") for v in environment):
                    found.append(int(folder.name))
        return found

    def programs(self, command: str, **variables: str) -> list[int]:
        """Processes that run `refshard COMMAND` itself: not the shell, srun or what hands the program its rank."""
        found = []
        for pid in self.processes(**variables):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if len(words) > 2 and words[1].endswith(b"/refshard") and words[2] == command.encode():
                    found.append(pid)
        return found

    def run(self, *words: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run a command that talks to the cluster; gives what it prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, cwd=cwd)
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def states(self) -> dict[str, str]:
        """State of every job and array task, by its id."""
        lines = self.run("squeue", "-hrat", "all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def restarts(self, job: str) -> int:
        """How often a job, or a task of an array, was put back in the queue."""
        fields = self.run("scontrol", "-o", "show", "job", job).split()
        return max(int(field.partition("=")[2]) for field in fields if field.startswith("Restarts="))

    def wait(self, job: str, seconds: float = 120) -> str:
        """Wait for a job that is no array to end; gives its last state."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        self._until(lambda: self.states().get(job) in ended, f"job {job}", seconds)
        return self.states()[job]

    def _launch(self, program: str, *words: str, name: str | None = None) -> None:
        # Ends with the tests, however they end.
        command = ["setpriv", "--pdeathsig", "TERM", program, *words]
        with (self.folder / f"{name or program}.out").open("ab") as out:
            self._daemons[name or program] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def _ask(self, *words: str) -> str:
        return self.run(*words, check=False)

    def _until(self, ready: Callable[[], bool], what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = "\n".join(
                    f"{f.name}: {f.read_text(errors='replace')[-1500:]}" for f in self.folder.glob("*.out")
                )
                raise AssertionError(f"{what}: not in {seconds} s\n{self._ask('squeue', '-at', 'all')}\n{logs}")
            time.sleep(0.1)


@contextlib.contextmanager
def slurm_cluster(nodes: int = 2, cpus: int = 4) -> Iterator[Slurm]:
    """Start a cluster; end it, and all that its jobs left, at the end."""
    # The name of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        cluster = Slurm(Path(folder), nodes, cpus)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _free_ports(count: int) -> int:
    """Give the first of some ports in a row that are free, below those that the system hands out itself."""
    for first in range(17000 + os.getpid() % 10000, 32000, count):
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
