"""Take each safeguard away, one at a time, and see that a test fails: a test that can't fail holds nothing.

    python tests/faults/mutate.py                 all, in a copy of the sources; some minutes
    python tests/faults/mutate.py --only link

A mutation that no test notices, or whose text is not in the sources any more, ends it with status 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """One safeguard taken away."""

    name: str
    file: str
    before: str
    after: str
    tests: str
    """Where it must be noticed, as pytest is given it"""


MUTATIONS = [
    Mutation(
        "sync of a file",
        "pipeline/base/files.py",
        "            view = view[os.write(descriptor, view) :]\n        os.fsync(descriptor)",
        "            view = view[os.write(descriptor, view) :]",
        "tests/faults/test_crashes.py",
    ),
    Mutation(
        "sync of a folder after a new name",
        "pipeline/base/files.py",
        "            _sync(file.parent)\n",
        "",
        "tests/faults/test_crashes.py tests/base/test_files.py",
    ),
    Mutation(
        "sync of a folder after a replacement",
        "pipeline/base/files.py",
        "            temporary.replace(file)\n        _sync(file.parent)",
        "            temporary.replace(file)",
        "tests/base/test_files.py",
    ),
    Mutation(
        "sync of the folders that a new folder lies in",
        "pipeline/base/files.py",
        "        for path in missing:\n            _sync(path.parent)\n",
        "",
        "tests/base/test_files.py",
    ),
    Mutation(
        "put if absent (a rename instead of a link)",
        "pipeline/base/files.py",
        "        os.link(temporary, file)",
        "        os.rename(temporary, file)",
        "tests/base/test_files.py tests/faults/test_store_faults.py",
    ),
    Mutation(
        "put if absent (a plain rename where there are no links)",
        "pipeline/base/files.py",
        "here, replace_nothing = -100, 1",
        "here, replace_nothing = -100, 0",
        "tests/base/test_files.py",
    ),
    Mutation(
        "the condition of a PUT",
        "pipeline/base/folders.py",
        'self._ask(name, lambda fs, path: _put(fs, path, content, mode="create"))',
        'self._ask(name, lambda fs, path: _put(fs, path, content, mode="overwrite"))',
        "tests/base/test_folders.py",
    ),
    Mutation(
        "the probe of an object store",
        "pipeline/base/folders.py",
        "        if not _puts_if_absent(self.url):",
        "        if False:",
        "tests/base/test_folders.py",
    ),
    Mutation(
        "reading back what a lost answer left",
        "pipeline/base/folders.py",
        "            return self.read(name) == content",
        "            return False",
        "tests/base/test_folders.py",
    ),
    Mutation(
        "reading back before the commit",
        "pipeline/store/store.py",
        ".equals(table, check_metadata=False):",
        ".equals(table, check_metadata=False) and False:",
        "tests/store/test_store.py",
    ),
    Mutation(
        "the digest of a part in the index",
        "pipeline/store/store.py",
        '.hexdigest() != entry.get("sha256"):',
        ".hexdigest() is None:",
        "tests/store/test_store.py tests/faults/test_store_faults.py",
    ),
    Mutation(
        "the digest of a part's content",
        "pipeline/store/format.py",
        'if not vouched and footer.get("refshard.digest") != content_digest(table, footer):',
        "if False:",
        "tests/store/test_store.py tests/faults/test_store_faults.py",
    ),
    Mutation(
        "the digest of manifest and index",
        "pipeline/store/format.py",
        'return content.get("sha256") == _seal(',
        'return "sha256" in content or content == (',
        "tests/store/test_store.py",
    ),
    Mutation(
        "the fingerprint in a part's footer",
        "pipeline/store/format.py",
        "    if found != fingerprint:",
        "    if False:",
        "tests/store/test_store.py tests/faults/test_store_faults.py",
    ),
    Mutation(
        "the plan in a part's footer",
        "pipeline/store/format.py",
        "if plan != own and (plan is not None",
        "if False and (plan is not None",
        "tests/store/test_store.py",
    ),
    Mutation(
        "no index for a store that was replaced",
        "pipeline/store/finishing.py",
        "if header is not None and (header.fingerprint, header.plan) != stamp:",
        "if False:",
        "tests/store/test_store.py",
    ),
    Mutation(
        "no store among another program's files",
        "pipeline/store/store.py",
        "if named and not any(",
        "if False and not any(",
        "tests/store/test_store.py",
    ),
    Mutation(
        "only our names deleted",
        "pipeline/base/files.py",
        "if names.fullmatch(path.name)]:",
        "if names]:",
        "tests/base/test_files.py tests/run/test_checkpoints.py",
    ),
    Mutation(
        "the unit in a part's footer",
        "pipeline/store/format.py",
        'if footer.get("refshard.unit") != str(unit):',
        "if False:",
        "tests/store/test_store.py tests/faults/test_store_faults.py",
    ),
    Mutation(
        "the manifest compared with the run",
        "pipeline/store/store.py",
        'of_identity = differences(stored["identity"], identity, joining=False)',
        "of_identity = []",
        "tests/store/test_store.py",
    ),
    Mutation(
        "the index written last",
        "pipeline/store/finishing.py",
        "    if missing or is_finished(folder):\n        return missing",
        "    num_units -= len(missing)\n    if is_finished(folder):\n        return missing",
        "tests/store/test_store.py",
    ),
    Mutation(
        "finite log-probs alone",
        "pipeline/store/format.py",
        "if length == 0 or not np.isfinite(total):",
        "if length == 0:",
        "tests/store/test_store.py",
    ),
    Mutation(
        "the key of a pair in the join",
        "pipeline/store/reference_table.py",
        "same = self.keys[near] == wanted[some, None]",
        "same = self.keys[near] == self.keys[near]",
        "tests/store/test_join.py",
    ),
    Mutation(
        "NaN where nothing was scored",
        "pipeline/store/reference_table.py",
        '_ABSENT = np.array((b"", -1, np.nan, np.nan, 0, 0, -1), INDEX_ROW)',
        '_ABSENT = np.array((b"", -1, 0, 0, 0, 0, -1), INDEX_ROW)',
        "tests/store/test_join.py",
    ),
    Mutation(
        "the identity of the stores that are joined",
        "pipeline/store/store.py",
        'found = differences(store.manifest["identity"], identity, joining=True, exact=exact)',
        "found = []",
        "tests/laws/test_stale.py",
    ),
    Mutation(
        "a checkpoint on the disk before its marker",
        "pipeline/run/checkpoints.py",
        "    sync_tree(folder)\n",
        "",
        "tests/run/test_checkpoints.py",
    ),
    Mutation(
        "the marker of a checkpoint",
        "pipeline/run/checkpoints.py",
        '        return f"it has no {marker_name}"',
        "        return None",
        "tests/run/test_checkpoints.py",
    ),
    Mutation(
        "the digests in a marker",
        "pipeline/run/checkpoints.py",
        'if digests and read_sha256(file) != expected["sha256"]:',
        "if False:",
        "tests/run/test_checkpoints.py",
    ),
    Mutation(
        "the marker's own digest",
        "pipeline/run/checkpoints.py",
        'if marker["digest"] != _digest(',
        "if {} == bool(",
        "tests/run/test_checkpoints.py",
    ),
    Mutation(
        "no start from the beginning where all is damaged",
        "pipeline/run/checkpoints.py",
        "        if damaged:\n            raise DataError(",
        "        if False:\n            raise DataError(",
        "tests/run/test_checkpoints.py",
    ),
    Mutation(
        "the settings of a checkpoint compared with the run's",
        "pipeline/run/identity.py",
        "    if not found or is_longer(stored, run):\n",
        "    if True:\n",
        "tests/run/test_checkpoints.py",
    ),
    Mutation(
        "the fence before a marker",
        "pipeline/training/commit.py",
        "        self._attempt.check()\n        commit_checkpoint(",
        "        commit_checkpoint(",
        "tests/run/test_checkpoints.py",
    ),
    Mutation(
        "the owner looked up before each file of a save",
        "pipeline/training/trainer.py",
        "        if self._attempt is not None:\n            self._attempt.check()",
        "        pass",
        "tests/run/test_checkpoints.py",
    ),
    Mutation(
        "optimizer and schedule at the checkpoint's step",
        "pipeline/training/trainer.py",
        "        self._check_loaded(folder)",
        "",
        "tests/faults/test_preemption.py -k different_steps",
    ),
    Mutation(
        "training's random numbers kept from evaluations",
        "pipeline/training/trainer.py",
        "        with torch.random.fork_rng(devices=gpus_of(self)):\n            metrics = super().evaluate(",
        "        with nullcontext():\n            metrics = super().evaluate(",
        "tests/faults/test_preemption.py -k evaluations",
    ),
    Mutation(
        "weights as safetensors alone",
        "pipeline/models/files.py",
        "        _check_weight_index(folder",
        "        str(folder",
        "tests/faults/test_damage.py -k model",
    ),
    Mutation(
        "the tokenizer's files in the key of joined sets",
        "pipeline/training/joined_cache.py",
        '        "texts": [sorted(sha256_of_files(group).items()) for group in texts],\n',
        "",
        "tests/training/test_joined_cache.py",
    ),
    Mutation(
        "the stores in the key of joined sets",
        "pipeline/training/joined_cache.py",
        '"index": store.digest}',
        '"index": 0}',
        "tests/training/test_joined_cache.py",
    ),
    Mutation(
        "the digests of joined sets that are found",
        "pipeline/training/joined_cache.py",
        'sha256_of_files(into / n for n in record["files"]) != record["files"]',
        "False",
        "tests/training/test_joined_cache.py",
    ),
    Mutation(
        "the data unchanged while sets are joined that are kept",
        "pipeline/training/joining.py",
        "cache.unchanged() and find() == found",
        "True",
        "tests/training/test_joined_cache.py",
    ),
    Mutation(
        "the data unchanged while it is joined",
        "stages/train.py",
        "    run.data.check()\n",
        "",
        "tests/training/test_joining.py",
    ),
    Mutation(
        "the data file unchanged while it is scored",
        "pipeline/base/digests.py",
        "                if read_sha256(file) != digest:",
        "                if False:",
        "tests/faults/test_stage_one_faults.py -k changes",
    ),
    Mutation(
        "a job that asks to be queued again",
        "stages/submit/templates/slurm.sh.jinja",
        'scontrol requeue "{{ id }}" && sleep 600',
        "true",
        "tests/stages/test_submit_slurm.py",
    ),
    Mutation(
        "one task of an array queued again, not all of it",
        "stages/submit/slurm.py",
        'id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.workers else "$SLURM_JOB_ID"',
        'id="$SLURM_JOB_ID"',
        "tests/stages/test_submit_slurm.py",
    ),
    Mutation(
        "a warning handed on to the program",
        "stages/submit/templates/slurm.sh.jinja",
        '[ -z "$program" ] || kill -USR1 "$program" 2> /dev/null',
        "true",
        "tests/stages/test_submit_slurm.py",
    ),
    Mutation(
        "a disruption of a pod that does not count",
        "stages/submit/templates/kubernetes-job.yaml.jinja",
        "- action: Ignore",
        "- action: Count",
        "tests/stages/test_submit_kubernetes.py",
    ),
    Mutation(
        "a Job that wrong settings end at once",
        "stages/submit/templates/kubernetes-job.yaml.jinja",
        "values: [2, 65, 78]",
        "values: [99]",
        "tests/stages/test_submit_kubernetes.py",
    ),
    Mutation(
        "stage two only after the check of stage one",
        "stages/submit/slurm.py",
        '"train": "afterok:$finish"',
        '"train": "afterany:$finish"',
        "tests/stages/test_submit_slurm.py",
    ),
]


def notices(mutation: Mutation, tree: Path) -> bool:
    """Whether a test fails in a tree with that safeguard taken away; the tree is put right again."""
    file = tree / mutation.file
    whole = file.read_text(encoding="utf-8")
    assert whole.count(mutation.before) == 1, f"{mutation.name}: its text is {whole.count(mutation.before)} times there"
    file.write_text(whole.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests.split()],
            cwd=tree,
            capture_output=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
    finally:
        file.write_text(whole, encoding="utf-8")
    # 1: tests failed. Anything else (2: could not be collected) says nothing about a safeguard.
    assert done.returncode in (0, 1), done.stdout.decode()[-2000:]
    return done.returncode == 1


def copy_sources(target: Path) -> Path:
    """A tree of its own to be changed. The data beside the project is linked."""
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".*_cache", ".hypothesis", "*.egg-info")
    shutil.copytree(ROOT, target / "tree", ignore=ignored)
    if (shared := ROOT.parent / "shared").exists():
        (target / "shared").symlink_to(shared)
    return target / "tree"


def take_away(only: str = "") -> dict[str, bool]:
    """Take the safeguards with this in their name away, one at a time; say of each whether a test noticed."""
    noticed = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_sources(Path(folder))
        for mutation in MUTATIONS:
            if only in mutation.name:
                noticed[mutation.name] = notices(mutation, tree)
                print(f"{'noticed' if noticed[mutation.name] else 'SURVIVED':9} {mutation.name}", flush=True)
    return noticed


def main() -> None:
    parser = argparse.ArgumentParser(description="Take each safeguard away and see that a test fails.")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    noticed = take_away(parser.parse_args().only)
    survived = len(noticed) - sum(noticed.values())
    print(f"{survived} of {len(noticed)} safeguards can be taken away unnoticed")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
