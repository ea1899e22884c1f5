"""Kubernetes' Job controller in small: it starts a manifest's command as real processes, and a `kubectl` speaks to it.

What it plays is what the documentation says of Jobs: indexes, parallelism, a failure policy with its limits, SIGTERM
and after a grace SIGKILL, disruptions, two pods of one index at once. What it does not play is a cluster: pods have no
containers, so a volume is a folder of this machine at the very path where it is mounted, and the program is not PID 1.
"""

import functools
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import kubernetes_validate
import yaml

from support.kubernetes_lint import complaints
from support.processes import Command


class Process(Protocol):
    """What runs in a pod."""

    @property
    def status(self) -> int | None: ...
    def signal(self, number: int) -> None: ...


@dataclass
class Pod:
    job: str
    index: int
    process: Process
    grace: float
    disrupted: bool = False
    killed_at: float | None = None
    """When it is killed, once it has been told to leave."""
    status: int | None = None
    """Its exit status as Kubernetes shows it, once the controller has seen its end."""

    def look(self) -> None:
        if self.status is None and (status := self.process.status) is not None:
            self.status = status if status >= 0 else 128 - status

    def tell_to_leave(self) -> None:
        if self.killed_at is None:
            self.killed_at = time.monotonic() + self.grace
            self.process.signal(signal.SIGTERM)


@dataclass
class Job:
    manifest: dict[str, Any]
    pods: list[Pod] = field(default_factory=list)
    judged: set[int] = field(default_factory=set)
    """Pods, by their place among `pods`, whose end has been looked at"""
    succeeded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    failures: Counter[int] = field(default_factory=Counter)
    failure: str | None = None
    """Why the Job as a whole fails"""
    conditions: list[dict[str, str]] = field(default_factory=list)

    @property
    def spec(self) -> Any:
        return self.manifest["spec"]

    @property
    def running(self) -> list[Pod]:
        return [pod for pod in self.pods if pod.status is None]

    @property
    def ended(self) -> str | None:
        return self.conditions[-1]["type"] if self.conditions else None


class RefusedError(Exception):
    """What the server says of a manifest that it does not take."""


class Cluster:
    """A namespace with its Job controller. As a context it works by itself; else `work` does one round.

    Args:
        folder: For its own files.
        start: Starts a pod's process, given the Job's name, index, command, working folder and environment.
        twice: Indexes of which two pods are started at once.
        second: What a second of a grace lasts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: Callable[[str, int, list[str], Path, Mapping[str, str]], Process] | None = None,
        twice: frozenset[int] = frozenset(),
        second: float = 1.0,
    ) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.jobs: dict[str, Job] = {}
        self.deleted: list[Job] = []
        self._start, self._twice, self._second = start or _start, twice, second
        self._folder, self._requests = folder, folder / "requests"
        # Of two threads that ask after a process at once, one gets a wrong answer.
        self._lock, self._leave = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._work_until_left)
        self._requests.mkdir(parents=True)
        self.commands = folder / "bin"
        """To be put on PATH: a `kubectl`, and a `sleep` that does not."""
        self.commands.mkdir()
        for name, text in {"kubectl": _KUBECTL.format(requests=self._requests), "sleep": _SLEEP}.items():
            (self.commands / name).write_text(text)
            (self.commands / name).chmod(0o755)

    def __enter__(self) -> "Cluster":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave.set()
        self._thread.join()
        for job in [*self.jobs.values(), *self.deleted]:
            for pod in job.running:
                pod.process.signal(signal.SIGKILL)

    def wait_for(self, seen: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait until something is true, and give it."""
        end = time.monotonic() + seconds
        while not (found := seen()):
            stands = {name: (job.ended, job.pods) for name, job in self.jobs.items()}
            assert self._thread.is_alive() and time.monotonic() < end, stands
            time.sleep(0.002)
        return found

    def pods(self, job: str, index: int = 0) -> list[Pod]:
        """The pods that an index of a Job has had."""
        return [pod for pod in self.jobs[job].pods if pod.index == index] if job in self.jobs else []

    def disrupt(self, pod: Pod) -> None:
        """Evict a pod, as for a drained node or a more important one."""
        with self._lock:
            pod.disrupted = True
            pod.tell_to_leave()

    def kill(self, pod: Pod) -> None:
        """End a pod's process, as where memory is short."""
        with self._lock:
            pod.process.signal(signal.SIGKILL)

    # The server

    def apply(self, manifest: dict[str, Any], *, dry_run: bool = False) -> str:
        """Make an object or leave it as it is; what must not change is not changed."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if wrong := _wrong(json.dumps(manifest)):
            raise RefusedError(f"{kind} {name} is invalid: {wrong}")
        there = self.objects.get((kind, name))
        if there is not None and there != manifest:
            raise RefusedError(f"{kind} {name} is invalid: field is immutable")
        if there is None and not dry_run:
            self.objects[kind, name] = manifest
            if kind == "Job":
                self.jobs[name] = Job(manifest)
        return f"{kind.lower()}/{name} {'unchanged' if there else 'created'}"

    def delete(self, kind: str, name: str) -> str:
        del self.objects[kind, name]
        self.deleted.append(self.jobs.pop(name))
        return f'{kind.lower()} "{name}" deleted'

    # The controller

    def work(self) -> None:
        """Do what there is to do for each Job."""
        with self._lock:
            for job in list(self.jobs.values()):
                self._look_after(job)

    def _work_until_left(self) -> None:
        try:
            while not self._leave.wait(0.005):
                self._answer()
                self.work()
        finally:
            # Nobody is left waiting for one who is gone.
            self._requests.rename(self._folder / "closed")

    def _look_after(self, job: Job) -> None:
        for pod in job.running:
            pod.look()
            if pod.killed_at is not None and time.monotonic() > pod.killed_at:
                pod.process.signal(signal.SIGKILL)
        for i, pod in enumerate(job.pods):
            if pod.status is not None and i not in job.judged:
                job.judged.add(i)
                self._judge(job, pod)
        if job.failure is not None:
            for pod in job.running:
                pod.tell_to_leave()
        if job.ended or (job.running and job.failure):
            return
        indexes = range(job.spec.get("completions", 1))
        done = len(job.succeeded | job.failed) == len(indexes)
        if job.failure is None and done and not job.running and job.failed:
            job.failure = f"Job has failed indexes: {sorted(job.failed)}"
        if job.failure is not None:
            job.conditions = [
                {"type": "FailureTarget", "status": "True"},
                {"type": "Failed", "status": "True", "message": job.failure},
            ]
        elif done and not job.running:
            job.conditions = [
                {"type": "SuccessCriteriaMet", "status": "True"},
                {"type": "Complete", "status": "True"},
            ]
        elif self._is_mountable(job):
            self._start_missing(job, indexes)

    def _judge(self, job: Job, pod: Pod) -> None:
        """Do as the failure policy says, once for each pod."""
        if pod.status == 0:
            job.succeeded.add(pod.index)
        if pod.index in job.succeeded | job.failed or job.failure is not None:
            return
        action = next((r["action"] for r in job.spec["podFailurePolicy"]["rules"] if _fits(r, pod)), "Count")
        what = f"index {pod.index} failed with exit code {pod.status}"
        if action == "FailJob":
            job.failure = f"Container refshard of {what} matching FailJob rule"
        elif action == "FailIndex":
            job.failed.add(pod.index)
        elif action == "Count":
            job.failures[pod.index] += 1
            limit = job.spec.get("backoffLimitPerIndex", job.spec.get("backoffLimit", 6))
            if job.failures[pod.index] > limit:
                job.failed.add(pod.index)
                if "backoffLimitPerIndex" not in job.spec:
                    job.failure = "Job has reached the specified backoff limit"
        if len(job.failed) > job.spec.get("maxFailedIndexes", len(job.failed)):
            job.failure = "Job has exceeded the specified maximal number of failed indexes"

    def _start_missing(self, job: Job, indexes: range) -> None:
        for index in indexes:
            if len(job.running) >= job.spec.get("parallelism", 1) + len(self._twice):
                return
            if index in job.succeeded | job.failed or any(pod.index == index for pod in job.running):
                continue
            is_first = all(pod.index != index for pod in job.pods)
            for _ in range(2 if is_first and index in self._twice else 1):
                job.pods.append(self._start_pod(job, index))

    def _start_pod(self, job: Job, index: int) -> Pod:
        pod, name = job.spec["template"]["spec"], job.manifest["metadata"]["name"]
        (container,) = pod["containers"]
        environment = {"JOB_COMPLETION_INDEX": str(index)} if job.spec.get("completionMode") == "Indexed" else {}
        for variable in container["env"]:
            environment[variable["name"]] = _expanded(variable["value"], environment)
        settings = next(volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume)
        mounted = self._folder / settings
        if not mounted.exists():
            # Written once: other pods may be reading it.
            mounted.mkdir()
            for file, text in self.objects["ConfigMap", settings]["data"].items():
                (mounted / file).write_text(text)
        words = [_expanded(word, environment).replace("/etc/refshard", str(mounted)) for word in container["command"]]
        process = self._start(name, index, words, Path(container["workingDir"]), environment)
        return Pod(name, index, process, pod["terminationGracePeriodSeconds"] * self._second)

    def _is_mountable(self, job: Job) -> bool:
        volumes = job.spec["template"]["spec"]["volumes"]
        needed = [("ConfigMap", v["configMap"]["name"]) for v in volumes if "configMap" in v]
        claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]
        return {*needed, *(("PersistentVolumeClaim", claim) for claim in claims)} <= self.objects.keys()

    # kubectl

    def _answer(self) -> None:
        for request in self._requests.glob("*.asked"):
            folder, *words = request.read_text().splitlines()
            try:
                with self._lock:
                    status, out, err = 0, self._kubectl(Path(folder), words), ""
            except RefusedError as error:
                status, out, err = 1, "", f"Error from server: {error}\n"
            for ending, text in (("out", out), ("err", err), ("status.new", str(status))):
                request.with_suffix(f".{ending}").write_text(text)
            request.with_suffix(".status.new").rename(request.with_suffix(".status"))
            request.unlink()

    def _kubectl(self, folder: Path, words: list[str]) -> str:
        verb, options = words[0], dict(_option(word, following) for word, following in _options(words[1:]))
        manifest = yaml.safe_load((folder / options["filename"]).read_text())
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if verb == "apply":
            return self.apply(manifest, dry_run=options.get("dry-run") == "server") + "\n"
        if (kind, name) not in self.objects:
            if options.get("ignore-not-found") == "true":
                return ""
            raise RefusedError(f'{kind.lower()} "{name}" not found')
        if verb == "delete":
            return self.delete(kind, name) + "\n"
        assert verb == "get"
        shown = {**self.objects[kind, name], "status": {"conditions": self.jobs[name].conditions}}
        return jsonpath(options["output"].removeprefix("jsonpath="), shown)


_KUBECTL = """#!/bin/sh
request=$(mktemp '{requests}/XXXXXXXXXX') || exit
printf '%s\\n' "$PWD" "$@" > "$request"
mv "$request" "$request.asked"
while [ ! -e "$request.status" ]; do
  [ -e "$request.asked" ] || [ -e "$request.status" ] || exit
  /bin/sleep 0.01
done
cat "$request.out"
cat "$request.err" >&2
exit "$(cat "$request.status")"
"""
_SLEEP = "#!/bin/sh\nexec /bin/sleep 0.05\n"


@functools.cache
def _wrong(manifest: str) -> str:
    try:
        kubernetes_validate.validate(json.loads(manifest), "1.37", strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return "; ".join(complaints(json.loads(manifest)))


def _start(job: str, index: int, words: list[str], folder: Path, environment: Mapping[str, str]) -> Process:
    assert words[0] == "refshard"
    return Command(*words[1:], folder=folder, environment={**os.environ, **environment})


def _fits(rule: dict[str, Any], pod: Pod) -> bool:
    if "onPodConditions" in rule:
        return pod.disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
    codes = rule["onExitCodes"]
    return (pod.status in codes["values"]) == (codes["operator"] == "In")


def _expanded(word: str, environment: Mapping[str, str]) -> str:
    """Put in variables as the kubelet does: $(NAME) if there is one, and $$ is a dollar."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else environment.get(m[1], m[0]), word)


def _options(words: list[str]) -> list[tuple[str, str]]:
    return [(word, words[i + 1] if i + 1 < len(words) else "") for i, word in enumerate(words) if word[:2] == "--"]


def _option(word: str, following: str) -> tuple[str, str]:
    name, equals, value = word[2:].partition("=")
    return name, value if equals else following


def jsonpath(template: str, value: Any) -> str:
    """Fill in a template of kubectl's: names, and one kind of filter."""

    def found(match: re.Match[str]) -> str:
        nodes = [value]
        for name, key, wanted in re.findall(r'\.(\w+)|\[\?\(@\.(\w+)=="(\w+)"\)\]', match[1]):
            if name:
                nodes = [node[name] for node in nodes if name in node]
            else:
                nodes = [item for node in nodes for item in node if item.get(key) == wanted]
        return " ".join(map(str, nodes))

    return re.sub(r"\{((?:[^{}\"]|\"[^\"]*\")*)\}", found, template)
