"""Manifests for Kubernetes: checked against the published schemas and a lint, and run by a small Job controller."""

import copy
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipeline.base.errors import ConfigError
from pipeline.config.reader import load_config
from pipeline.config.training import TrainSection
from stages.options import parse_stop_after
from stages.submit import kubernetes as submit_kubernetes
from stages.submit.files import name_of_run
from support.job_controller import Cluster, RefusedError, jsonpath
from support.kubernetes_lint import complaints
from support.processes import ROOT, Command
from support.runs import refshard, simple_rows, write_config, write_jsonl
from support.tally import tally

IMAGE = "registry.example:5000/refshard:1.0"
VERSIONS = ("1.29", "1.37")


@pytest.fixture
def render(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Render the manifests of settings with sections changed; gives each file's content by its name."""

    def make(**changes: Any) -> dict[str, Any]:
        sections: dict[str, Any] = {
            "data": {"path": "org/pairs"},
            "policy": {"model": "org/model"},
            "precompute": {"output": "runs/shards"},
            "train": {"output_dir": "runs/dpo", "learning_rate": "5e-7"},
            "cluster": {"workers": 8, "kubernetes": {"image": IMAGE}},
        }
        for name, values in changes.items():
            part = sections.setdefault(name, {})
            kubernetes = {**part.get("kubernetes", {}), **values.get("kubernetes", {})}
            part.update({**values, **({"kubernetes": kubernetes} if kubernetes else {})})
        config = load_config(write_config(tmp_path / "run.yaml", **sections))
        submit_kubernetes.run(config, into=tmp_path / "jobs")
        files = sorted((tmp_path / "jobs").iterdir())
        shown = {file.name: file.read_text() for file in files}
        shutil.rmtree(tmp_path / "jobs")
        return {name: yaml.safe_load(text) if name.endswith(".yaml") else text for name, text in shown.items()}

    return make


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    (only,) = manifest["spec"]["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def refused_by(manifest: dict[str, Any]) -> str | None:
    """Who refuses a manifest: the schema of every version, the lint, or nobody."""
    outcomes = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
            outcomes.append(False)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError):
            outcomes.append(True)
    if all(outcomes):
        return "schema"
    assert not any(outcomes), outcomes
    return "lint" if complaints(manifest) else None


# What is rendered

SETTINGS: dict[str, dict[str, Any]] = {
    "the least": {},
    "all": {
        "cluster": {
            "precompute": {"processes": 2, "cpus": 4, "memory": "200G", "time": "4:00:00"},
            "train": {"processes": 8, "gpus": 8, "cpus": 12, "memory": "1T", "time": "2-00"},
            "kubernetes": {
                "namespace": "ml",
                "storage_class": "nfs.fast",
                "size": "2Ti",
                "mount": "/mnt/a $(b) 'c' \"d\"",
                "secret": "tokens",
                "node_selector": {"gpu/kind": "yes", "zone": "1", "quoted": "a: \"b\" # 'c'"},
            },
        }
    },
    "a claim that is there": {"cluster": {"kubernetes": {"claim": "data"}}},
    "no GPUs, one worker": {"cluster": {"workers": 1, "precompute": {"gpus": 0}, "train": {"gpus": 0}}},
    "shards in an object store": {"precompute": {"output": "s3://bucket/shards"}},
    "a reference that moves": {"reference": {"sync": {"steps": 8}}},
    "a digest": {"cluster": {"kubernetes": {"image": f"refshard@sha256:{'0' * 64}"}}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_rendered_is_valid_and_short(render: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    for name, manifest in render(**settings).items():
        if name.endswith(".yaml"):
            assert refused_by(manifest) is None, (name, complaints(manifest))
            if name != "settings.yaml":
                assert len(yaml.safe_dump(manifest).splitlines()) < 120


def test_the_jobs_run_the_two_stages_on_one_copy_of_the_settings(render: Callable[..., Any], tmp_path: Path) -> None:
    files = render()
    assert files.keys() == {
        "settings.yaml", "volume.yaml", "precompute.yaml", "finish.yaml", "train.yaml", "submit.sh",
    }  # fmt: skip
    program = ["refshard", "precompute", "--config", "/etc/refshard/settings.yaml"]
    assert container(files["precompute.yaml"])["command"] == [*program, "--worker", "$(JOB_COMPLETION_INDEX)/8"]
    assert container(files["finish.yaml"])["command"] == program
    assert container(files["train.yaml"])["command"] == ["refshard", "train", *program[2:]]
    spec = files["precompute.yaml"]["spec"]
    assert [spec[key] for key in ("completionMode", "completions", "parallelism")] == ["Indexed", 8, 8]
    assert spec["podReplacementPolicy"] == "Failed"
    assert files["settings.yaml"]["immutable"] is True
    for name in ("precompute", "finish", "train"):
        pod = files[f"{name}.yaml"]["spec"]["template"]["spec"]
        volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
        assert volumes["settings"] == {"configMap": {"name": files["settings.yaml"]["metadata"]["name"]}}
        assert volumes["data"] == {"persistentVolumeClaim": {"claimName": files["volume.yaml"]["metadata"]["name"]}}
        assert volumes["memory"] == {"emptyDir": {"medium": "Memory"}}
        assert pod["terminationGracePeriodSeconds"] == 120
        mounts = {mount["name"]: mount["mountPath"] for mount in container(files[f"{name}.yaml"])["volumeMounts"]}
        assert mounts == {"settings": "/etc/refshard", "data": "/data", "memory": "/dev/shm"}
    (tmp_path / "copy.yaml").write_text(files["settings.yaml"]["data"]["settings.yaml"])
    copied, meant = load_config(tmp_path / "copy.yaml"), load_config(tmp_path / "run.yaml")
    assert (copied.train, copied.data, copied.precompute) == (meant.train, meant.data, meant.precompute)
    # Settings that are others have another name.
    other = render(loss={"beta": 0.2})
    assert other["settings.yaml"]["metadata"]["name"] != files["settings.yaml"]["metadata"]["name"]


def test_a_job_asks_for_what_the_settings_say(render: Callable[..., Any]) -> None:
    files = render(**SETTINGS["all"])
    one, two = container(files["precompute.yaml"]), container(files["train.yaml"])
    # As with Slurm, G is GiB.
    assert one["resources"] == {
        "requests": {"cpu": "8", "memory": "200Gi"},
        "limits": {"memory": "200Gi", "nvidia.com/gpu": "2"},
    }
    assert two["resources"]["limits"] == {"memory": "1Ti", "nvidia.com/gpu": "8"}
    assert one["command"][4:] == [
        "--worker", "$(JOB_COMPLETION_INDEX)/8", "--processes", "2", "--stop-after", "3h58m0s",
    ]  # fmt: skip
    assert two["command"][4:] == ["--processes", "8", "--stop-after", "47h58m0s"]
    assert one["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    assert files["volume.yaml"]["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "nfs.fast",
        "resources": {"requests": {"storage": "2Ti"}},
    }
    assert {manifest["metadata"]["namespace"] for manifest in files.values() if isinstance(manifest, dict)} == {"ml"}
    assert "nvidia.com/gpu" not in str(render(**SETTINGS["no GPUs, one worker"]))


@pytest.mark.parametrize(
    ("limit", "left"),
    [("90", "1h28m0s"), ("3:30", "0h1m30s"), ("1:00:30", "0h58m30s"), ("1-2", "25h58m0s"), ("1-2:3", "26h1m0s"),
     ("1-2:3:4", "26h1m4s")],
)  # fmt: skip
def test_a_pod_leaves_by_itself_within_its_time(render: Callable[..., Any], limit: str, left: str) -> None:
    # As sbatch reads it, with the two minutes of the grace left for a save.
    command = container(render(cluster={"train": {"time": limit}})["train.yaml"])["command"]
    assert command[-2:] == ["--stop-after", left]
    parse_stop_after(left)


def test_runs_whose_names_differ_at_their_ends_alone_have_jobs_of_their_own() -> None:
    names = []
    for end in ("5e-7", "1e-6"):
        config: Any = SimpleNamespace(
            train=TrainSection(output_dir=f"experiments/zephyr-7b-ultrafeedback-dpo-beta-0.1-lr-{end}")
        )
        names.append(name_of_run(config))
    assert names[0] != names[1]
    for name in names:
        assert name.startswith("experiments-zephyr-7b-")
        assert len(name) <= 40


@pytest.mark.parametrize(("memory", "quantity"), [("64Gi", "64Gi"), ("64000", "64000Mi"), ("2048K", "2048Ki")])
def test_memory_is_in_powers_of_two(render: Callable[..., Any], memory: str, quantity: str) -> None:
    resources = container(render(cluster={"train": {"memory": memory}})["train.yaml"])["resources"]
    assert (resources["requests"], resources["limits"]["memory"]) == ({"memory": quantity}, quantity)


def test_workers_that_share_an_object_store_need_no_volume(render: Callable[..., Any]) -> None:
    files = render(**SETTINGS["shards in an object store"])
    volumes = {name: str(files[f"{name}.yaml"]["spec"]["template"]["spec"]["volumes"]) for name in ("finish", "train")}
    assert "persistentVolumeClaim" not in volumes["finish"]
    assert "persistentVolumeClaim" in volumes["train"]
    assert files["volume.yaml"]["spec"]["accessModes"] == ["ReadWriteOnce"]
    # One that is there may hold the data.
    files = render(precompute={"output": "s3://b/s"}, cluster={"kubernetes": {"claim": "mine"}})
    assert "volume.yaml" not in files
    assert "volume.yaml" not in files["submit.sh"]
    for name in ("precompute", "finish", "train"):
        assert "'claimName': 'mine'" in str(files[f"{name}.yaml"])


def test_a_new_volume_is_writable_for_the_user_of_refshards_image(render: Callable[..., Any]) -> None:
    user = re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    context = render()["train.yaml"]["spec"]["template"]["spec"]["securityContext"]
    assert context == {"fsGroup": int(user[1]), "fsGroupChangePolicy": "OnRootMismatch"}
    # The files of a claim that was there before keep their group.
    assert "securityContext" not in str(render(cluster={"kubernetes": {"claim": "mine"}})["train.yaml"])


def test_one_job_alternates_while_the_reference_moves(render: Callable[..., Any]) -> None:
    files = render(**SETTINGS["a reference that moves"])
    assert files.keys() == {"settings.yaml", "volume.yaml", "train.yaml", "submit.sh"}
    assert container(files["train.yaml"])["command"][:2] == ["refshard", "train"]
    assert "precompute.yaml" not in files["submit.sh"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"cluster": {"kubernetes": {"image": None}}}, "image: missing; name a container image"),
    "no tag": ({"cluster": {"kubernetes": {"image": "a.b:50/refshard"}}}, "may be another image tomorrow"),
    "latest": ({"cluster": {"kubernetes": {"image": "refshard:latest"}}}, "may be another image tomorrow"),
    "no image's name": ({"cluster": {"kubernetes": {"image": "a:1 b"}}}, "image: must be an image's name, got 'a:1 b'"),
    "two nodes": ({"cluster": {"train": {"nodes": 2}}}, "Use refshard submit slurm"),
    "no time": ({"cluster": {"train": {"time": "2"}}}, "cluster.train.time: must be longer than"),
    "policy lost": (
        {"train": {"output_dir": "/home/me/dpo"}},
        "train.output_dir: must be on the volume, got /home/me",
    ),
    "policy beside": (
        {"train": {"output_dir": "../dpo"}},
        "train.output_dir: must be on the volume, got ../dpo",
    ),
    "policy at home": ({"train": {"output_dir": "~/dpo"}}, "train.output_dir: must be on the volume"),
    "policy in a store": ({"train": {"output_dir": "s3://b/dpo"}}, "output_dir: must be on the volume, got s3://b/dpo"),
    "shards lost": (
        {"precompute": {"output": "/data2/s"}},
        "precompute.output: must be on the volume, got /data2/s",
    ),
    "a line in a name": ({"train": {"output_dir": "a\nb"}}, "must hold printable characters only"),
    "a line in the mount": ({"cluster": {"kubernetes": {"mount": "/a\nb"}}}, "must hold printable characters only"),
    "a moving reference in two processes": (
        {"reference": {"sync": {"steps": 8}}, "cluster": {"train": {"processes": 2}}},
        "cluster.train.processes: must be 1 with reference.sync",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_fail_or_be_lost_on_the_cluster_is_refused(
    render: Callable[..., Any], tmp_path: Path, settings: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        render(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "jobs").exists()


def test_no_token_is_in_a_file(render: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "canary")
    assert "canary" not in str(render(cluster={"kubernetes": {"secret": "s"}}))


# What is hostile

HOSTILE = [
    "$(touch x)",
    "`touch x`",
    "a'; touch x; '",
    'a" && touch x && "',
    "$HOME ${x}",
    "*?[a]",
    "-rf",
    "é: {}",
    "a #b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_only_a_name(tmp_path: Path, make_run: Callable[..., Path], name: str) -> None:
    mount = f"/data/{name.replace(':', '')}"
    kubernetes = {"image": IMAGE, "mount": mount}
    config = load_config(
        make_run(train={"output_dir": name}, precompute={"output": name}, cluster={"kubernetes": kubernetes})
    )
    folder = tmp_path / name
    submit_kubernetes.run(config, into=folder)
    assert _shellcheck(folder / "submit.sh") == ""
    with Cluster(tmp_path / "cluster", start=_Scripted({})) as cluster:
        done = _submit(folder, cluster)
        assert (done.returncode, done.stderr) == (0, "")
        cluster.wait_for(lambda: "Complete" in (job.ended for job in cluster.jobs.values()))
        started = cluster._start
        assert isinstance(started, _Scripted)
        words, working_folder, environment = started.last
        assert str(working_folder) == mount
        assert environment["XDG_CACHE_HOME"] == f"{mount}/.cache"
        read = load_config(Path(words[words.index("--config") + 1]))
        assert (read.train.output_dir, read.precompute.output) == (name, name)
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize(
    "text", ["a\u2028b", "a\x85  b", "\t|\n  - x: {", "é\ufeff", " # x", "{{ 1 }}", "\U0001f600", "'\""]
)
def test_the_settings_arrive_as_they_were_whatever_is_in_them(
    render: Callable[..., Any], tmp_path: Path, text: str
) -> None:
    files = render(data={"columns": {"prompt": text}}, reference={"declared": text})
    (tmp_path / "copy.yaml").write_text(files["settings.yaml"]["data"]["settings.yaml"])
    copied = load_config(tmp_path / "copy.yaml")
    assert (copied.data.columns, copied.reference.declared) == ({"prompt": text}, text)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_script_passes_shellcheck(render: Callable[..., Any], tmp_path: Path, settings: Mapping[str, Any]) -> None:
    script = tmp_path / "submit.sh"
    script.write_text(render(**settings)["submit.sh"])
    assert _shellcheck(script) == ""


def _shellcheck(script: Path) -> str:
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(program), "--shell=sh", str(script)], capture_output=True, text=True)
    return done.stdout + done.stderr


# What is wrong

CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "misspelt field": ("schema", lambda job: job["spec"].update(completionmode="Indexed")),
    "wrong type": ("schema", lambda job: job["spec"].update(completions="eight")),
    "no template": ("schema", lambda job: job["spec"].pop("template")),
    "no container name": ("schema", lambda job: container(job).pop("name")),
    "number in the environment": ("schema", lambda job: container(job)["env"][0].update(value=1)),
    "unknown version": ("schema", lambda job: job.update(apiVersion="batch/v2")),
    "mode in small letters": ("lint", lambda job: job["spec"].update(completionMode="indexed")),
    "unknown action": ("lint", lambda job: _rule(job, 0).update(action="ignore")),
    "unknown replacement": ("lint", lambda job: job["spec"].update(podReplacementPolicy="Always")),
    "replacement of pods that run": (
        "lint", lambda job: job["spec"].update(podReplacementPolicy="TerminatingOrFailed"),
    ),
    "restarted always": ("lint", lambda job: _pod(job).update(restartPolicy="Always")),
    "restarted in place": ("lint", lambda job: _pod(job).update(restartPolicy="OnFailure")),
    "no completions": ("lint", lambda job: job["spec"].pop("completions")),
    "limit per index without indexes": ("lint", lambda job: job["spec"].pop("completionMode")),
    "exit code 0": ("lint", lambda job: _rule(job, 1)["onExitCodes"].update(values=[0, 2])),
    "exit codes out of order": ("lint", lambda job: _rule(job, 1)["onExitCodes"].update(values=[65, 2])),
    "mount without volume": ("lint", lambda job: _pod(job)["volumes"].pop()),
    "no DNS name": ("lint", lambda job: job["metadata"].update(name="My_Run")),
    "no quantity": ("lint", lambda job: container(job)["resources"]["limits"].update(memory="200GB")),
    "memory without a unit": ("lint", lambda job: container(job)["resources"]["limits"].update(memory="200")),
    "failed indexes without their limit": ("lint", lambda job: job["spec"].pop("backoffLimitPerIndex")),
    "more failed indexes than there are": ("lint", lambda job: job["spec"].update(maxFailedIndexes=9)),
    "policy of another container": ("lint", lambda job: _rule(job, 1)["onExitCodes"].update(containerName="other")),
    "name too long for a pod's": ("lint", lambda job: job["metadata"].update(name="a" * 58)),
    "grace too short": ("lint", lambda job: _pod(job).pop("terminationGracePeriodSeconds")),
    "image of today": ("lint", lambda job: container(job).update(image="refshard:latest")),
    "deadline": ("lint", lambda job: job["spec"].update(activeDeadlineSeconds=3600)),
    "variable that is none": ("lint", lambda job: container(job)["command"].append("$(touch x)")),
    "codes and conditions": ("lint", lambda job: _rule(job, 1).update(onPodConditions=[])),
    "one index fails of none": (
        "lint", lambda job: [job["spec"].pop(key) for key in ("backoffLimitPerIndex", "maxFailedIndexes")],
    ),
    "two volumes of one name": ("lint", lambda job: _pod(job)["volumes"].append(_pod(job)["volumes"][0])),
    "two mounts at one place": ("lint", lambda job: container(job)["volumeMounts"][0].update(mountPath="/dev/shm")),
    "colon in a mount": ("lint", lambda job: container(job)["volumeMounts"][0].update(mountPath="/a:b")),
    "more than its limit": (
        "lint", lambda job: container(job)["resources"].update(requests={"memory": "2Gi"}, limits={"memory": "2G"}),
    ),
    "half a GPU": ("lint", lambda job: container(job)["resources"].update(limits={"nvidia.com/gpu": "500m"})),
    "GPU without a limit": (
        "lint", lambda job: container(job)["resources"].update(requests={"nvidia.com/gpu": 1}, limits={}),
    ),
    "behind a shell": ("lint", lambda job: container(job).update(command=["sh", "-c", "refshard precompute"])),
}  # fmt: skip


def _pod(job: dict[str, Any]) -> Any:
    return job["spec"]["template"]["spec"]


def _rule(job: dict[str, Any], number: int) -> Any:
    return job["spec"]["podFailurePolicy"]["rules"][number]


@pytest.mark.parametrize(("by", "change"), CHANGES.values(), ids=CHANGES)
def test_a_wrong_manifest_is_refused(
    render: Callable[..., Any], by: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    manifest = render()["precompute.yaml"]
    wrong = copy.deepcopy(manifest)
    change(wrong)
    assert wrong != manifest
    assert refused_by(wrong) == by


# What the Job controller makes of it


class _Scripted:
    """Pods that end at once, with the statuses that a script has for a Job's index, then with 0."""

    def __init__(self, script: Mapping[tuple[str, int], list[int]]) -> None:
        self._script = {key: list(statuses) for key, statuses in script.items()}
        self.last: tuple[list[str], Path, Mapping[str, str]]

    def __call__(self, job: str, index: int, words: list[str], folder: Path, environment: Mapping[str, str]) -> Any:
        self.last = (words, folder, environment)
        left = self._script.get((job.rpartition("-")[2], index))
        return _Ended(left.pop(0) if left else 0)


class _Ended:
    def __init__(self, status: int) -> None:
        self.status = status

    def signal(self, number: int) -> None:
        pass


def _settle(files: Mapping[str, Any], cluster: Cluster, name: str, disrupted: bool = False) -> Any:
    """Have a Job run to its end; gives it."""
    for file in ("settings.yaml", "volume.yaml", f"{name}.yaml"):
        cluster.apply(files[file])
    job = cluster.jobs[f"runs-dpo-{name}"]
    for _ in range(100):
        for pod in job.pods:
            pod.disrupted = disrupted
        cluster.work()
    assert job.ended is not None
    return job


OUTCOMES = [
    # (statuses of index 0, how the Job ends, pods of index 0): the limit is two.
    ([0], "Complete", 1),
    ([75, 75], "Complete", 3),
    ([74, 75], "Complete", 3),
    ([-9, -15], "Complete", 3),
    ([79, 0], "Complete", 2),
    ([75, 75, 75], "Failed", 3),
    ([-9, 74, 75], "Failed", 3),
    ([2], "Failed", 1),
    ([65], "Failed", 1),
    ([78], "Failed", 1),
    ([1], "Failed", 1),
    ([75, 2], "Failed", 2),
]


@pytest.mark.parametrize("name", ["precompute", "finish", "train"])
@pytest.mark.parametrize(("statuses", "end", "pods"), OUTCOMES)
def test_an_exit_status_decides_whether_there_is_another_pod(
    render: Callable[..., Any], tmp_path: Path, name: str, statuses: list[int], end: str, pods: int
) -> None:
    files = render(cluster={"workers": 1, "restarts": 2})
    job = _settle(files, Cluster(tmp_path / "cluster", start=_Scripted({(name, 0): statuses})), name)
    assert (job.ended, len(job.pods)) == (end, pods)


@pytest.mark.parametrize("name", ["precompute", "train"])
@pytest.mark.parametrize("status", [-9, 75, 1, 2, 79])
def test_a_disruption_never_counts_whatever_the_pod_left_with(
    render: Callable[..., Any], tmp_path: Path, name: str, status: int
) -> None:
    files = render(cluster={"workers": 1, "restarts": 0})
    script = _Scripted({(name, 0): [status] * 20})
    job = _settle(files, Cluster(tmp_path / "cluster", start=script), name, disrupted=True)
    assert (job.ended, len(job.pods)) == ("Complete", 21)


def test_one_broken_machine_leaves_the_others_to_their_shares_and_a_bug_in_all_ends_them(
    render: Callable[..., Any], tmp_path: Path
) -> None:
    files = render(cluster={"workers": 4})
    script = _Scripted({("precompute", 2): [1], ("precompute", 3): [75, 75]})
    job = _settle(files, Cluster(tmp_path / "one", start=script), "precompute")
    assert (job.ended, job.succeeded, job.failed) == ("Failed", {0, 1, 3}, {2})
    assert Counter(pod.index for pod in job.pods) == {0: 1, 1: 1, 2: 1, 3: 3}
    script = _Scripted({("precompute", i): [1] for i in range(4)})
    job = _settle(files, Cluster(tmp_path / "all", start=script), "precompute")
    assert (job.ended, len(job.pods)) == ("Failed", 4)
    assert "maximal number of failed indexes" in job.failure


def test_a_job_that_runs_is_never_started_a_second_time(render: Callable[..., Any], tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", start=_Scripted({}))
    one, other = render(), render(cluster={"workers": 9})
    assert cluster.apply(one["precompute.yaml"]).endswith("created")
    assert cluster.apply(one["precompute.yaml"]).endswith("unchanged")
    with pytest.raises(RefusedError, match="immutable"):
        cluster.apply(other["precompute.yaml"])


def test_kubectl_templates_are_read_as_kubectl_reads_them() -> None:
    conditions = [
        {"type": "A", "status": "False"},
        {"type": "B", "status": "True", "message": "m"},
        {"type": "C", "status": "True"},
    ]
    job = {"metadata": {"name": "n"}, "status": {"conditions": conditions}}
    assert jsonpath('{.status.conditions[?(@.status=="True")].type}', job) == "B C"
    assert jsonpath('{.metadata.name}: {.status.conditions[?(@.type=="B")].message}', job) == "n: m"
    assert jsonpath("{.status.nothing}", job) == ""


# submit.sh, and the whole of it


def _environment(cluster: Cluster) -> dict[str, str]:
    return {**os.environ, "PATH": f"{cluster.commands}:{os.environ['PATH']}"}


def _submit(folder: Path, cluster: Cluster) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(folder / "submit.sh")]
    return subprocess.run(command, env=_environment(cluster), capture_output=True, text=True, timeout=60)


def _jobs(cluster: Cluster) -> dict[str, int]:
    """How many pods each Job has had."""
    return {name.rpartition("-")[2]: len(job.pods) for name, job in cluster.jobs.items()}


def test_submitted_again_the_script_goes_on_where_the_run_stands(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(cluster={"workers": 2, "restarts": 1, "kubernetes": {"image": IMAGE, "mount": str(tmp_path)}})
    folder = tmp_path / "jobs"

    def write(*overrides: str) -> None:
        submit_kubernetes.run(load_config(run, overrides), into=folder)

    write()
    script = _Scripted({("precompute", 1): [75, 75], ("finish", 0): [78], ("train", 0): [2]})
    with Cluster(tmp_path / "cluster", start=script) as cluster:
        # Stage one fails, and what it is for never starts.
        done = _submit(folder, cluster)
        assert done.returncode == 1
        assert "precompute failed: Job has failed indexes: [1]" in done.stderr
        assert _jobs(cluster) == {"precompute": 3}
        # Then the check does; stage one is done again since it failed, and not yet again.
        done = _submit(folder, cluster)
        assert done.returncode == 1
        assert "finish failed: Container refshard of index 0 failed with exit code 78" in done.stderr
        assert _jobs(cluster) == {"precompute": 2, "finish": 1}
        first = cluster.jobs[next(iter(cluster.jobs))]
        assert _submit(folder, cluster).returncode == 0
        assert cluster.jobs[next(iter(cluster.jobs))] is first
        assert cluster.wait_for(lambda: cluster.jobs[next(reversed(cluster.jobs))].ended) == "Failed"
        # Stage two failed by its settings; with others all of it is asked again.
        write("train.learning_rate=2e-3")
        assert _submit(folder, cluster).returncode == 0
        assert cluster.wait_for(lambda: cluster.jobs[next(reversed(cluster.jobs))].ended) == "Complete"
        pods = [len(job.pods) for job in (*cluster.deleted, *cluster.jobs.values())]
        assert _submit(folder, cluster).returncode == 0
        assert [len(job.pods) for job in (*cluster.deleted, *cluster.jobs.values())] == pods


def test_without_kubectl_the_command_says_so(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(cluster={"kubernetes": {"image": IMAGE, "mount": str(tmp_path)}})
    shell = shutil.which("sh")
    assert shell is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").symlink_to(shell)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match="kubectl: not a command here"):
        submit_kubernetes.run(load_config(run), submit=True)


@pytest.fixture
def volume(tmp_path: Path, make_run: Callable[..., Path]) -> Path:
    """A volume with data on it, and settings, beside it, whose paths are relative to it."""
    make_run()
    volume = tmp_path / "volume"
    write_jsonl(volume / "pairs.jsonl", simple_rows(24))
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    settings["data"]["path"] = "pairs.jsonl"
    settings["precompute"] |= {"output": "runs/shards", "rows_per_shard": 4}
    settings["train"] |= {"output_dir": "runs/dpo", "max_steps": 40, "save_strategy": "steps", "save_steps": 5}
    settings["cluster"] = {
        "workers": 2,
        "precompute": {"gpus": 0},
        "train": {"gpus": 0},
        "kubernetes": {"image": IMAGE, "mount": str(volume)},
    }
    write_config(tmp_path / "run.yaml", **settings)
    return volume


def _contents(volume: Path) -> dict[str, bytes]:
    """The shards and the policy, byte for byte."""
    parts = sorted((volume / "runs" / "shards" / "train").glob("part-*"))
    assert len(parts) == 6
    files = [*parts, volume / "runs" / "dpo" / "model.safetensors"]
    return {str(file.relative_to(volume)): file.read_bytes() for file in files}


@pytest.fixture
def undisturbed(volume: Path, tmp_path: Path) -> dict[str, bytes]:
    """What the plain commands come to in a folder with the same data."""
    plain = tmp_path / "plain"
    shutil.copytree(volume, plain)
    for command in ("precompute", "train"):
        program = Command(command, "--config", tmp_path / "run.yaml", folder=plain)
        assert program.wait(60) == 0, program.said()
    return _contents(plain)


@pytest.mark.slow
def test_killed_doubled_and_evicted_the_pods_come_to_what_the_plain_commands_come_to(
    volume: Path, undisturbed: Mapping[str, bytes], tmp_path: Path
) -> None:
    with Cluster(tmp_path / "cluster", twice=frozenset({0})) as cluster:
        words = ["submit", "k8s", "--config", tmp_path / "run.yaml", "--into", tmp_path / "jobs", "--submit"]
        command = Command(*words, environment=_environment(cluster))
        (pod,) = cluster.wait_for(lambda: cluster.pods("runs-dpo-precompute", 1))
        cluster.kill(pod)
        assert command.wait(60) == 0, command.said()
        assert [pod.status for pod in cluster.pods("runs-dpo-precompute", 0)] == [0, 0]
        assert [pod.status for pod in cluster.pods("runs-dpo-precompute", 1)] == [137, 0]
        checkpoint = volume / "runs" / "dpo" / "checkpoint-5" / "refshard-commit.json"
        # Of two trainers the one that came first leaves: that it was overtaken ends only itself.
        train = cluster.jobs["runs-dpo-train"]
        cluster.wait_for(lambda: checkpoint.exists() and len(train.running) == 1)
        cluster.disrupt(train.running[0])
        assert cluster.wait_for(lambda: train.ended) == "Complete"
        assert sorted(pod.status or 0 for pod in train.pods) == [0, 75, 79]
        before = _jobs(cluster)
        assert _submit(tmp_path / "jobs", cluster).returncode == 0
        assert _jobs(cluster) == before
    assert _contents(volume) == undisturbed
    tally(
        "pods killed, doubled and evicted, emulated", 4, outcome="shards and weights of the plain commands, to the bit"
    )


@pytest.mark.slow
def test_a_moving_reference_goes_on_after_an_eviction(volume: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    write_config(tmp_path / "run.yaml", **settings, reference={"sync": {"steps": 20, "mixup_alpha": 0.6}})
    plain = tmp_path / "plain"
    shutil.copytree(volume, plain)
    assert Command("train", "--config", tmp_path / "run.yaml", folder=plain).wait(60) == 0
    with Cluster(tmp_path / "cluster") as cluster:
        assert _submit(_rendered(tmp_path), cluster).returncode == 0
        checkpoint = volume / "runs" / "dpo" / "checkpoint-5" / "refshard-commit.json"
        cluster.wait_for(checkpoint.exists)
        (pod,) = cluster.pods("runs-dpo-train")
        cluster.disrupt(pod)
        assert cluster.wait_for(lambda: cluster.jobs["runs-dpo-train"].ended) == "Complete"
        assert [pod.status for pod in cluster.pods("runs-dpo-train")] == [75, 0]
    weights = Path("runs", "dpo", "model.safetensors")
    assert (volume / weights).read_bytes() == (plain / weights).read_bytes()


@pytest.mark.slow
def test_a_mistake_of_the_user_ends_the_run_at_once_and_stage_two_never_starts(volume: Path, tmp_path: Path) -> None:
    (volume / "pairs.jsonl").unlink()
    with Cluster(tmp_path / "cluster") as cluster:
        words = ["submit", "k8s", "--config", tmp_path / "run.yaml", "--into", tmp_path / "jobs", "--submit"]
        command = Command(*words, environment=_environment(cluster))
        assert command.wait(60) == 2
        (line,) = command.said()[1].splitlines()
        assert "precompute failed: Container refshard of index" in line
        assert "failed with exit code 2 matching FailJob rule" in line
        assert _jobs(cluster).keys() == {"precompute"}
        assert _jobs(cluster)["precompute"] <= 2
    tally("wrong settings in a Job, emulated", 1, outcome="2 at once; stage two never started")


@pytest.mark.nightly
@pytest.mark.parametrize("sync", [False, True], ids=["plain", "moving"])
def test_pods_killed_and_evicted_at_random_come_to_the_same(volume: Path, tmp_path: Path, sync: bool) -> None:
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    if sync:
        settings["reference"] = {"sync": {"steps": 10, "mixup_alpha": 0.6}}
        write_config(tmp_path / "run.yaml", **settings)
    plain = tmp_path / "plain"
    shutil.copytree(volume, plain)
    for command in ("train",) if sync else ("precompute", "train"):
        assert Command(command, "--config", tmp_path / "run.yaml", folder=plain).wait() == 0
    undisturbed = (plain / "runs" / "dpo" / "model.safetensors").read_bytes()
    chance, ended = random.Random(0), 0
    for round_ in range(4):
        shutil.rmtree(volume / "runs", ignore_errors=True)
        with Cluster(tmp_path / f"cluster-{round_}", twice=frozenset({round_ % 2})) as cluster:
            submitted = subprocess.Popen(
                ["sh", str(_rendered(tmp_path) / "submit.sh")], env=_environment(cluster), stdout=subprocess.DEVNULL
            )
            for _ in range(8):
                pause = chance.uniform(0.2, 2.5)
                running = [pod for job in list(cluster.jobs.values()) for pod in job.running]
                if running:
                    pod = chance.choice(running)
                    cluster.disrupt(pod) if chance.random() < 0.5 else cluster.kill(pod)
                cluster._leave.wait(pause)
            assert submitted.wait(120) == 0
            last = cluster.wait_for(lambda: cluster.jobs.get("runs-dpo-train"))
            assert cluster.wait_for(lambda job=last: job.ended) == "Complete"
            ended += sum(bool(pod.status) for job in cluster.jobs.values() for pod in job.pods)
        assert (volume / "runs" / "dpo" / "model.safetensors").read_bytes() == undisturbed
    # In a round that was over soon, there may have been none.
    assert ended
    tally("pods killed and evicted at random, emulated", ended, outcome="weights of the plain commands, to the bit")


def _rendered(tmp_path: Path) -> Path:
    refshard("submit", "k8s", "--config", tmp_path / "run.yaml", "--into", tmp_path / "jobs")
    return tmp_path / "jobs"


def test_the_command_says_how_to_submit_by_hand(volume: Path, tmp_path: Path) -> None:
    done = refshard("submit", "k8s", "--config", tmp_path / "run.yaml", "--into", tmp_path / "a b", "--workers", 3)
    assert done.stdout.splitlines()[-1] == f"Submit them with: sh {shlex.quote(str(tmp_path / 'a b' / 'submit.sh'))}"
    assert yaml.safe_load((tmp_path / "a b" / "precompute.yaml").read_text())["spec"]["completions"] == 3
