"""Job files for Slurm: what they say, and both stages on a real one."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.cluster import ClusterConfig
from pipeline.config.reader import load_config
from support.runs import has_stepped, refshard, simple_rows
from support.slurm_cluster import WHY_NOT, Slurm, slurm_cluster
from support.tally import tally

slow = pytest.mark.slow
needs_slurm = pytest.mark.skipif(bool(WHY_NOT), reason=f"no Slurm here: {WHY_NOT} missing (Debian: slurm-wlm, munge)")

# No GPU is asked for.
CPU = {"precompute": {"gpus": 0}, "train": {"gpus": 0}}
SAME = "final weights bit for bit those of an undisturbed run"
SCRIPTS = ["precompute.sh", "finish.sh", "train.sh", "submit.sh"]


def submit(config: Path, *words: str) -> Path:
    """Write the job files; gives their folder."""
    out = refshard("submit", "slurm", "--config", config, *words).stdout
    return Path(out.splitlines()[0].removeprefix("Job files: "))


def directives(script: Path) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]


# What the files say


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cluster": {"workers": 64, "setup": "module load cuda\nsource env/bin/activate", "options": ["--qos=high"]}},
        {"cluster": {"container": "apptainer exec --nv ref.sif", "train": {"nodes": 2, "processes": 8}}},
        {"cluster": {"precompute": {"processes": 2, "gpus": 2, "cpus": 8, "memory": "64G", "time": "4:00:00"}}},
        {"reference": {"sync": {"steps": 2}}},
        {"reference": {"sync": {"steps": 2}}, "cluster": {"workers": 2}},
    ],
    ids=["plain", "setup", "ranks", "tensor-parallel", "windows", "windows-of-an-array"],
)
def test_the_files_are_short_and_nothing_is_wrong_with_them(
    make_run: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = submit(make_run(**changes))
    scripts = sorted(folder.glob("*.sh"))
    # What `setup` sources is not there to be followed.
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, "--exclude=SC1091", *scripts], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
    assert all(len(script.read_text().splitlines()) < 60 for script in scripts)
    one_job = "sync" in changes.get("reference", {}) and "cluster" not in changes
    assert [s.name for s in scripts] == (["submit.sh", "train.sh"] if one_job else sorted(SCRIPTS))


def test_what_the_cluster_section_asks_for_is_what_the_files_ask_for(make_run: Callable[..., Path]) -> None:
    folder = submit(
        make_run(
            cluster={
                "workers": 4,
                "partition": "gpu",
                "account": "team-a",
                "options": ["--qos=high"],
                "grace": 300,
                "precompute": {"cpus": 4, "memory": "32G", "time": "2:00:00"},
                "train": {"nodes": 2, "processes": 8, "cpus": 6, "memory": "400Gi", "time": "1-00:00:00"},
            }
        ),
        "--workers",
        "6",
        "-o",
        "cluster.partition=a100",
    )
    array, train = directives(folder / "precompute.sh"), directives(folder / "train.sh")
    common = {"--partition=a100", "--account=team-a", "--qos=high", "--signal=B:USR1@300", "--requeue"}
    assert {*common, "--array=0-5", "--gpus-per-node=1", "--cpus-per-task=4", "--mem=32G", "--time=2:00:00"} <= {*array}
    ranks = {
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=6",
        "--mem=400G",
        "--time=1-00:00:00",
    }
    assert {*common, *ranks, "--kill-on-invalid-dep=yes", "--open-mode=append"} <= {*train}
    assert "  srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task=6\n" in (folder / "train.sh").read_text()
    assert not any(option.startswith("--array") for option in [*train, *directives(folder / "finish.sh")])


def test_jobs_read_a_copy_of_the_settings_that_is_never_written_over(make_run: Callable[..., Path]) -> None:
    config = make_run(cluster={"workers": 3})
    folder = submit(config, "-o", "loss.beta=0.25")
    (copy,) = folder.glob("settings-*.yaml")
    saved = load_config(copy)
    assert saved.loss.beta == 0.25
    assert saved.cluster == ClusterConfig()
    assert all(f"--config {copy}" in (folder / name).read_text() for name in SCRIPTS[:3])
    before = copy.read_bytes()
    submit(config)
    # The same settings with another number of workers are the same file.
    submit(config, "-o", "loss.beta=0.25", "--workers", "7")
    assert len(list(folder.glob("settings-*.yaml"))) == 2
    assert copy.read_bytes() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.partition=gpu; touch x", "cluster.partition: must be a name of letters"),
        ('cluster.options=["--qos=a\\ntouch x"]', "cluster.options[0]: must be an option of sbatch in one line"),
        ("cluster.options=[touch x]", "cluster.options[0]: must be an option of sbatch in one line"),
        ("cluster.train.time=tomorrow", "cluster.train.time: must be minutes"),
        ("cluster.train.memory=lots", "cluster.train.memory: must be a size like 200G"),
        ("cluster.train.nodes=0", "cluster.train.nodes: must be at least 1, got 0"),
        ("cluster.precompute.nodes=2", "cluster.precompute.nodes: must be 1 for a worker"),
        ("cluster.worker=2", "cluster.worker: unknown key; did you mean cluster.workers?"),
        ('train.output_dir="a\\nb"', "train.output_dir: must hold printable characters only, got 'a\\nb'"),
        ("train.output_dir=", "train.output_dir: missing"),
        ('train.output_dir="a\\\\b"', "--into: must not hold a backslash"),
    ],
)
def test_what_can_not_be_a_job_is_refused_by_its_key(
    make_run: Callable[..., Path], override: str, message: str
) -> None:
    done = refshard("submit", "slurm", "--config", make_run(), "-o", override, check=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_moving_reference_is_not_trained_by_several_processes(make_run: Callable[..., Path]) -> None:
    config = make_run(reference={"sync": {"steps": 2}}, cluster={"train": {"processes": 2}})
    assert "cluster.train.processes" in refshard("submit", "slurm", "--config", config, check=2).stderr


def test_without_sbatch_the_files_are_there_and_the_message_says_what_to_do(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("sh", "dirname"):
        (bin_ / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(bin_))
    done = refshard("submit", "slurm", "--config", make_run(), "--submit", check=2)
    assert "sbatch: not a command here" in done.stderr
    assert (tmp_path / "policy" / "jobs" / "submit.sh").exists()


# The scripts, with a program and a Slurm that are played

PLAYED = {
    # Ends with STATUS: at once, or when it is signalled.
    "refshard": """[ -n "$WAIT" ] || exit "$STATUS"
trap 'exit "$STATUS"' USR1
[ "$WAIT" != dies ] || trap - USR1
touch "$LOG/started"
for _ in {1..600}; do /bin/sleep 0.05; done
""",
    "scontrol": 'echo "$@" >> "$LOG/asked"\nexit "${REFUSED:-0}"\n',
    "squeue": 'echo "${STATE:-RUNNING None}"\n',
    "sbatch": 'echo "$@" >> "$LOG/asked"\necho "$((100 + $(wc -l < "$LOG/asked")));main"\n',
    "sleep": 'echo "sleep $*" >> "$LOG/asked"\n',
}


class Played:
    """Starts a job file as Slurm does, where program and commands are played and note what they are asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in PLAYED.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}")
            (folder / name).chmod(0o755)

    def start(self, script: Path, status: int, **variables: str) -> "subprocess.Popen[bytes]":
        task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "3"}
        environment = {"PATH": f"{self.folder}:{os.environ['PATH']}", "LOG": str(self.folder), "STATUS": str(status)}
        (self.folder / "asked").unlink(missing_ok=True)
        (self.folder / "started").unlink(missing_ok=True)
        return subprocess.Popen(["bash", script], env={**os.environ, **task, **environment, **variables})

    def warned(self, script: Path, status: int, **variables: str) -> int:
        """Run a job that Slurm warns once its program runs."""
        job = self.start(script, status, **variables)
        end = time.monotonic() + 20
        while not (self.folder / "started").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        return job.wait(20)

    @property
    def asked(self) -> list[str]:
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def played(tmp_path: Path) -> Played:
    (tmp_path / "played").mkdir()
    return Played(tmp_path / "played")


@pytest.fixture
def scripts(make_run: Callable[..., Path]) -> Path:
    """Job files whose program is the one in PATH."""
    return submit(make_run(cluster={"setup": ":", "restarts": 3}))


def test_setup_comes_before_the_program_and_a_container_around_it(
    make_run: Callable[..., Path], played: Played
) -> None:
    # As a module would, setup finds the program; as a container would, env runs it.
    folder = submit(make_run(cluster={"setup": "STATUS=3\nexport STATUS", "container": "env WAIT="}))
    assert played.start(folder / "finish.sh", 0, WAIT="yes").wait(20) == 3


@pytest.mark.parametrize("status", [0, 1, 2, 65, 74, 78, 79, 137, 138])
def test_whatever_is_not_unfinished_ends_the_job_with_the_programs_status(
    scripts: Path, played: Played, status: int
) -> None:
    assert played.start(scripts / "precompute.sh", status).wait(20) == status
    assert played.asked == []


def test_an_unfinished_task_asks_to_be_started_again_alone_and_stays(scripts: Path, played: Played) -> None:
    assert played.start(scripts / "precompute.sh", 75).wait(20) == 75
    assert played.asked == ["requeue 7_2", "sleep 600"]
    assert played.start(scripts / "train.sh", 75).wait(20) == 75
    assert played.asked == ["requeue 7", "sleep 600"]


def test_a_warned_job_tells_its_program_and_asks_to_be_started_again(scripts: Path, played: Played) -> None:
    assert played.warned(scripts / "train.sh", 75, WAIT="yes") == 75
    assert played.asked == ["requeue 7", "sleep 600"]
    # The warning came before the program could do anything about it.
    assert played.warned(scripts / "train.sh", 0, WAIT="dies") == 75
    assert played.asked == ["requeue 7", "sleep 600"]
    # srun has ended the ranks that were left.
    assert played.warned(scripts / "train.sh", 137, WAIT="yes") == 75
    assert played.asked == ["requeue 7", "sleep 600"]
    # It was finished all the same.
    assert played.warned(scripts / "train.sh", 0, WAIT="yes") == 0
    assert played.asked == []
    assert played.warned(scripts / "train.sh", 78, WAIT="yes") == 78
    assert played.asked == []


def test_a_job_is_not_started_again_for_ever(scripts: Path, played: Played) -> None:
    assert played.start(scripts / "train.sh", 75, SLURM_RESTART_COUNT="2").wait(20) == 75
    assert played.asked == ["requeue 7", "sleep 600"]
    assert played.start(scripts / "train.sh", 75, SLURM_RESTART_COUNT="3").wait(20) == 75
    assert played.asked == []


def test_a_job_that_slurm_does_not_take_back_leaves_at_once(scripts: Path, played: Played) -> None:
    assert played.start(scripts / "train.sh", 75, REFUSED="1").wait(20) == 75
    assert played.asked == ["requeue 7"]


def test_a_job_that_was_cancelled_does_not_ask_to_come_back(scripts: Path, played: Played) -> None:
    assert played.warned(scripts / "train.sh", 75, WAIT="yes", STATE="COMPLETING None") == 75
    assert played.asked == []
    # What came of the warning took longer than it left time for.
    assert played.warned(scripts / "train.sh", 75, WAIT="yes", STATE="COMPLETING TimeLimit") == 75
    assert played.asked == ["requeue 7", "sleep 600"]
    # Slurm does not answer.
    assert played.warned(scripts / "train.sh", 75, WAIT="yes", STATE=" ") == 75
    assert played.asked == ["requeue 7", "sleep 600"]


def test_a_trained_window_submits_the_next_one_until_the_run_is_finished(
    make_run: Callable[..., Path], played: Played, tmp_path: Path
) -> None:
    folder = submit(make_run(reference={"sync": {"steps": 2}}, cluster={"workers": 2, "setup": ":"}))
    assert "--one-window" in (folder / "train.sh").read_text()
    assert played.start(folder / "train.sh", 0).wait(20) == 0
    assert played.asked == [
        "--parsable precompute.sh",
        "--parsable --dependency=afterany:101 finish.sh",
        "--parsable --dependency=afterok:102 train.sh",
    ]
    assert played.start(folder / "train.sh", 65).wait(20) == 65
    assert played.asked == []
    (tmp_path / "policy" / "run.json").write_text("{}")
    assert played.start(folder / "train.sh", 0).wait(20) == 0
    assert played.asked == []


def test_what_a_job_that_submits_has_is_not_handed_on(scripts: Path, played: Played) -> None:
    """srun would ask for it as well, and refuses a size of memory for each core beside one for each node."""
    (played.folder / "sbatch").write_text('#!/bin/sh\nenv | grep ^SLURM_ >> "$LOG/asked"\necho 1\n')
    job = played.start(scripts / "submit.sh", 0, SLURM_MEM_PER_CPU="50", SLURM_CONF="/etc/slurm.conf")
    assert job.wait(20) == 0
    assert played.asked == ["SLURM_CONF=/etc/slurm.conf"] * 3


# On a real Slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def launch(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Submit a run through the command; gives the ids of its jobs."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.environment[name])

    def launch(config: Path, *words: str) -> list[str]:
        out = refshard("submit", "slurm", "--config", config, "--submit", *words).stdout
        return re.findall(r"[a-z]+ (\d+)", out.splitlines()[-1])

    return launch


def logs(folder: Path) -> str:
    return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')}" for f in sorted(folder.glob("*.log")))


def wait_for(ready: Callable[[], Any], folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, logs(folder)
        time.sleep(0.05)


def log_of(job: str, folder: Path) -> Path:
    """Give the log of a job that starts or has started."""
    wait_for(lambda: list(folder.glob(f"*-{job}.log")), folder)
    return next(iter(folder.glob(f"*-{job}.log")))


def wait_for_steps(job: str, folder: Path) -> Path:
    """Wait until a training has taken steps; gives its log."""
    log = log_of(job, folder)
    wait_for(lambda: has_stepped(log.read_text()), folder)
    return log


def weights(policy: Path) -> str:
    return hashlib.sha256((policy / "model.safetensors").read_bytes()).hexdigest()


def parts(store: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in store.glob("part-*.parquet")}


@slow
@needs_slurm
def test_the_pipeline_survives_a_killed_task_and_a_requeue_in_the_middle_of_training(
    slurm: Slurm, launch: Callable[..., list[str]], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    # A folder that a shell would make something of.
    odd = tmp_path / 'a run\'s $(touch x) "%j" folder'
    config = make_run(simple_rows(64), cluster=CPU, train={"max_steps": 150, "learning_rate": "1e-4"})
    undisturbed = (
        "-o",
        f"train.output_dir={tmp_path / 'other'}",
        "-o",
        f"precompute.output={tmp_path / 'other-shards'}",
    )
    refshard("precompute", "--config", config, *undisturbed)
    refshard("train", "--config", config, *undisturbed)

    run = ("-o", f"train.output_dir={odd / 'policy'}", "-o", f"precompute.output={odd / 'shards'}")
    array, finish, train = launch(config, *run, "--workers", "2")
    folder = odd / "policy" / "jobs"
    # Before it can have done its share.
    wait_for(lambda: slurm.programs("precompute", SLURM_ARRAY_TASK_ID="1"), folder)
    os.kill(slurm.programs("precompute", SLURM_ARRAY_TASK_ID="1")[0], signal.SIGKILL)
    assert slurm.wait(finish) == "COMPLETED", logs(folder)
    states = slurm.states()
    assert [states[f"{array}_{task}"] for task in range(2)] == ["COMPLETED", "FAILED"]
    assert parts(odd / "shards" / "train") == parts(tmp_path / "other-shards" / "train")

    log = wait_for_steps(train, folder)
    slurm.run("scancel", "--signal=USR1", "--batch", train)
    assert slurm.wait(train) == "COMPLETED", logs(folder)
    assert slurm.restarts(train) == 1
    assert "stopped as asked after step" in log.read_text()
    assert "Resuming" in log.read_text()
    assert weights(odd / "policy") == weights(tmp_path / "other")
    assert not list(tmp_path.rglob("x"))
    tally("a task of an array killed; Slurm's warning in the middle of training", 2, outcome=SAME)


@slow
@needs_slurm
def test_a_cancelled_job_stays_so_and_ranks_may_take_longer_than_the_first(
    slurm: Slurm, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "refshard").write_text(f"""#!/bin/bash
trap 'sleep 1; exit 75' USR1 TERM
cd {tmp_path} || exit
case $1-${{RANK:-alone}} in
  train-0) for _ in {{1..40}}; do sleep 0.1; done ;;
  precompute-alone) [ -e started ] || {{ touch started; for _ in {{1..400}}; do sleep 0.1; done; }} ;;
esac
""")
    (tmp_path / "refshard").chmod(0o755)
    cluster = {"setup": f"PATH={tmp_path}:$PATH", "precompute": {"gpus": 0}, "train": {"gpus": 0, "processes": 2}}
    folder = submit(make_run(cluster=cluster))
    ranks = slurm.run("sbatch", "--parsable", str(folder / "train.sh")).strip()
    one = slurm.run("sbatch", "--parsable", str(folder / "finish.sh")).strip()
    wait_for((tmp_path / "started").exists, folder)
    slurm.run("scancel", one)
    # It comes back as another start, which would be done at once.
    assert slurm.wait(one) == "CANCELLED", logs(folder)
    assert slurm.wait(ranks) == "COMPLETED", logs(folder)


@slow
@needs_slurm
def test_stage_two_does_not_start_when_stage_one_failed(
    slurm: Slurm, launch: Callable[..., list[str]], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    # The first worker and the check come upon a bad row.
    program = f"""#!/bin/bash
[ "$1" = precompute ] || touch {tmp_path}/trained
[ "$5" = 1/2 ] || {{ echo pairs.jsonl:21 >&2; exit 65; }}
"""
    (tmp_path / "refshard").write_text(program)
    (tmp_path / "refshard").chmod(0o755)
    array, finish, train = launch(make_run(cluster={**CPU, "setup": f"PATH={tmp_path}:$PATH"}), "--workers", "2")
    assert slurm.wait(train) == "CANCELLED"
    folder = tmp_path / "policy" / "jobs"
    states = slurm.states()
    assert [states[f"{array}_{task}"] for task in range(2)] == ["FAILED", "COMPLETED"], logs(folder)
    assert states[finish] == "FAILED"
    assert not list(folder.glob(f"*-{train}.log"))
    assert "pairs.jsonl:21" in next(iter(folder.glob(f"*-{finish}.log"))).read_text()
    assert not (tmp_path / "trained").exists()
    tally("a task of an array that ends with 65, its program played", 1, outcome="FAILED; stage two never started")


@slow
@needs_slurm
def test_another_number_of_tasks_and_of_nodes_goes_on_with_what_is_there(
    slurm: Slurm, launch: Callable[..., list[str]], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_run(simple_rows(64), cluster={**CPU, "train": {"gpus": 0, "nodes": 2}}, train={"max_steps": 8})
    alone = ("-o", f"train.output_dir={tmp_path / 'other'}", "-o", "train.per_device_train_batch_size=8")
    first = launch(config, "--workers", "2")
    store, folder = tmp_path / "shards" / "train", tmp_path / "policy" / "jobs"
    wait_for(lambda: parts(store), folder)
    slurm.run("scancel", *first)
    there = parts(store)
    _, _, train = launch(config, "--workers", "1")
    assert slurm.wait(train) == "COMPLETED", logs(folder)
    assert "NumNodes=2 " in slurm.run("scontrol", "-o", "show", "job", train)
    assert there.items() <= parts(store).items()
    assert len(parts(store)) == 8
    refshard("train", "--config", config, *alone)
    steps, steps_alone = (
        [entry for entry in json.loads((policy / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
        for policy in (tmp_path / "policy", tmp_path / "other")
    )
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in steps_alone], rel=1e-5)
    tally("jobs cancelled, submitted again with another array and two nodes", 1, outcome="the losses of one process")


# Longer, and what a cluster does to jobs besides: a run is as long as it takes to be disturbed in its middle

SLOWER = {
    "max_steps": 1500,
    "learning_rate": "1e-4",
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The weights of the longer run, once they are known."""
    return []


@pytest.fixture
def long_run(make_run: Callable[..., Path], tmp_path: Path, undisturbed: list[str]) -> Callable[..., Path]:
    def make(**cluster: Any) -> Path:
        config = make_run(simple_rows(64), cluster={**CPU, "workers": 2, **cluster}, train=SLOWER)
        if not undisturbed:
            other = ("-o", f"train.output_dir={tmp_path / 'other'}", "-o", f"precompute.output={tmp_path / 'o-shards'}")
            refshard("precompute", "--config", config, *other)
            refshard("train", "--config", config, *other)
            undisturbed.append(weights(tmp_path / "other"))
        return config

    return make


@pytest.mark.nightly
@needs_slurm
def test_jobs_that_more_urgent_ones_push_out_come_back_and_finish(
    slurm: Slurm,
    launch: Callable[..., list[str]],
    long_run: Callable[..., Path],
    tmp_path: Path,
    undisturbed: list[str],
) -> None:
    urgent = ("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    array, finish, train = launch(long_run())
    folder = tmp_path / "policy" / "jobs"
    wait_for(lambda: slurm.programs("precompute", SLURM_ARRAY_TASK_ID="1"), folder)
    slurm.run(*urgent)
    assert slurm.wait(finish) == "COMPLETED", logs(folder)
    assert [slurm.states()[f"{array}_{task}"] for task in range(2)] == ["COMPLETED"] * 2
    assert max(slurm.restarts(f"{array}_{task}") for task in range(2)) >= 1
    log = wait_for_steps(train, folder)
    slurm.run(*urgent)
    assert slurm.wait(train, 240) == "COMPLETED", logs(folder)
    assert slurm.restarts(train) == 1
    assert "Resuming" in log.read_text()
    assert weights(tmp_path / "policy") == undisturbed[0]
    tally("array and trainer pushed out by more urgent jobs", 2, outcome=f"queued again by themselves; {SAME}")


@pytest.mark.nightly
@needs_slurm
def test_a_job_at_its_time_limit_goes_on_where_it_was(
    slurm: Slurm,
    launch: Callable[..., list[str]],
    long_run: Callable[..., Path],
    tmp_path: Path,
    undisturbed: list[str],
) -> None:
    # Slurm looks every half minute or so, and gives the warning as much earlier.
    *_, train = launch(long_run(train={"gpus": 0, "time": "1"}, grace=20), "-o", "train.max_steps=6000")
    folder = tmp_path / "policy" / "jobs"
    assert slurm.wait(train, 400) == "COMPLETED", logs(folder)
    assert slurm.restarts(train) >= 1
    assert "Resuming" in log_of(train, folder).read_text()
    tally("the time limit", slurm.restarts(train), outcome="queued again, resumed from its checkpoint")


@pytest.mark.nightly
@needs_slurm
def test_a_trainer_that_slurm_lost_sight_of_is_overtaken_by_the_next(
    slurm: Slurm,
    launch: Callable[..., list[str]],
    long_run: Callable[..., Path],
    tmp_path: Path,
    undisturbed: list[str],
) -> None:
    _, finish, train = launch(long_run())
    folder = tmp_path / "policy" / "jobs"
    assert slurm.wait(finish) == "COMPLETED", logs(folder)
    wait_for_steps(train, folder)
    node = int(slurm.run("squeue", "-ho", "%N", "-j", train).strip().removeprefix("n"))
    (old,) = slurm.programs("train", SLURM_JOB_ID=train)
    attempts = tmp_path / "policy" / "attempts"
    # It must not be done before the next one begins.
    os.kill(old, signal.SIGSTOP)
    slurm.kill_daemon(f"slurmd-{node}")
    slurm.run("scontrol", "update", f"nodename=n{node}", "state=down", "reason=test")
    try:
        wait_for(lambda: len(list(attempts.iterdir())) == 2, folder)
        os.kill(old, signal.SIGCONT)
        assert slurm.wait(train, 240) == "COMPLETED", logs(folder)
        assert slurm.restarts(train) == 1
        wait_for(lambda: not Path(f"/proc/{old}").exists(), folder)
        assert weights(tmp_path / "policy") == undisturbed[0]
        tally("a node declared dead while its trainer lives on", 1, outcome=f"the older one overtaken; {SAME}")
    finally:
        slurm.start_node(node)
        slurm.run("scontrol", "update", f"nodename=n{node}", "state=resume")


@pytest.mark.nightly
@needs_slurm
def test_jobs_do_not_notice_that_slurms_own_daemons_die(
    slurm: Slurm,
    launch: Callable[..., list[str]],
    long_run: Callable[..., Path],
    tmp_path: Path,
    undisturbed: list[str],
) -> None:
    _, finish, train = launch(long_run())
    folder = tmp_path / "policy" / "jobs"
    assert slurm.wait(finish) == "COMPLETED", logs(folder)
    wait_for_steps(train, folder)
    # What the controller knows is on the disk after some seconds.
    time.sleep(6)
    node = int(slurm.run("squeue", "-ho", "%N", "-j", train).strip().removeprefix("n"))
    slurm.kill_daemon("slurmctld")
    slurm.kill_daemon(f"slurmd-{node}")
    time.sleep(2)
    slurm.start_controller()
    slurm.start_node(node)
    assert slurm.wait(train, 240) == "COMPLETED", logs(folder)
    assert weights(tmp_path / "policy") == undisturbed[0]
    tally("slurmctld and slurmd killed while a trainer runs", 2, outcome=SAME)


@pytest.mark.nightly
@needs_slurm
def test_windows_follow_each_other_until_the_run_is_finished(
    slurm: Slurm, launch: Callable[..., list[str]], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_run(reference={"sync": {"steps": 2}}, cluster={**CPU, "workers": 2}, train={"max_steps": 5})
    other = ("-o", f"train.output_dir={tmp_path / 'other'}", "-o", f"precompute.output={tmp_path / 'other-shards'}")
    refshard("train", "--config", config, *other)
    launch(config)
    folder = tmp_path / "policy" / "jobs"
    wait_for((tmp_path / "policy" / "run.json").exists, folder, 240)
    assert weights(tmp_path / "policy") == weights(tmp_path / "other")
    wait_for(lambda: not slurm.run("squeue", "-h"), folder)
    # Three windows, each a stage one of two tasks, a check and a training.
    assert len([log for log in folder.glob("*.log") if "-train-" in log.name]) == 3
