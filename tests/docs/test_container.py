"""The container image: its Dockerfile, and the lock file with the hashes of all that is installed in it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from support.processes import ROOT

FOR_GPUS = re.compile(r"cuda-|nvidia-|triton$|setuptools$")
"""Packages of torch's build for CUDA, which the tests run without; setuptools, which every environment has"""


def pins(text: str) -> dict[str, str]:
    """Give the version of each package that a file of pins names."""
    found = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


LOCK, DOCKERFILE = read("requirements.lock"), read("Dockerfile")


def test_the_image_has_the_versions_that_the_tests_passed_with() -> None:
    locked, tested = pins(LOCK), pins(read("constraints.txt"))
    assert {name for name in locked if name not in tested and not FOR_GPUS.match(name)} == set()
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}


def test_the_lock_holds_what_refshard_and_its_extras_need() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = (needed for name, needed in project["optional-dependencies"].items() if name != "test")
    needed = {re.split(r"[^\w-]", line)[0].replace("_", "-") for line in sum(extras, project["dependencies"])}
    assert needed <= pins(LOCK).keys()


def test_the_lock_has_hashes_of_every_package_and_no_other_source() -> None:
    entries = re.findall(r"^\S+==\S+ \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", LOCK, re.MULTILINE)
    assert len(entries) == len(pins(LOCK)) > 50
    rest = [line for line in LOCK.splitlines() if not re.match(r"#|    --hash=|\S+==\S+ \\$", line)]
    assert rest == []


def test_the_base_has_the_cuda_that_torch_was_built_for() -> None:
    base = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)\.", DOCKERFILE, re.MULTILINE)
    assert base is not None
    assert pins(LOCK)["cuda-toolkit"].startswith(f"{base[1]}.")


def test_the_image_is_built_of_what_is_here_and_runs_the_command_as_a_user_of_its_own() -> None:
    copied = [name for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")} == set(copied)
    assert re.findall(r"^USER (.*)", DOCKERFILE, re.MULTILINE) == ["1000"]
    assert "--uid 1000" in DOCKERFILE and 'ENTRYPOINT ["refshard"]' in DOCKERFILE
    installs = re.findall(r"pip install ([^&]*?)(?:\n\S|\n\n|&&)", DOCKERFILE)
    assert len(installs) == 2
    assert all("--require-hashes" in words or "--no-deps --no-build-isolation" in words for words in installs)
    # The user can't write there, so what is not compiled is compiled in each process.
    assert "--no-compile" not in DOCKERFILE and "DONTWRITEBYTECODE" not in DOCKERFILE


def test_the_dockerfile_passes_hadolint() -> None:
    program = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
