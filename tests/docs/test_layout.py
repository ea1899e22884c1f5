"""The house's plan: which package may import which, what loads no torch, and that no test leans on another."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from support.floors import FLOORS, ROOT

BELOW = {name: {n for below in FLOORS[:i] for n in below} for i, floor in enumerate(FLOORS[:-1]) for name in floor}
"""Package of `pipeline` -> those of the floors below it, which it may import; the stages are the last floor"""

SHARED_BY_STAGES = {"stages.early", "stages.subprocesses"}

TORCH_FREE = [
    "base",
    "config",
    "data",
    "models.files",
    "models.identity",
    "models.recollection",
    "store",
    "replies.records",
    "run",
    "report",
]
LOADS_TORCH = {"pipeline.data.loading"}
"""Modules of those packages that load it"""
STAGES_WITHOUT_TORCH = [
    "stages.cli",
    "stages.check.hardware",
    "stages.demo.reviews",
    "stages.early",
    "stages.explain",
    "stages.export",
    "stages.finished",
    "stages.inspect",
    "stages.refshard",
    "stages.report",
    "stages.submit",
    "stages.sweep",
    "stages.verify",
]
"""Help, settings, inspection and job files answer at once."""

MOST_LINES = 450

TOP_LEVEL = {
    ".github",
    ".ci",
    ".dockerignore",
    ".gitignore",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "docs",
    "pipeline",
    "pyproject.toml",
    "requirements.lock",
    "stages",
    "tests",
}


def modules(folder: str) -> dict[str, Path]:
    """Give the modules below a folder by their dotted names, packages' own files left out."""
    files = sorted(file for file in (ROOT / folder).rglob("*.py") if file.stem != "__init__")
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


MODULES = {**modules("pipeline"), **modules("stages")}


def imports(file: Path, *, at_module_level: bool = False) -> Iterator[str]:
    """Give what a file imports, as dotted names; `from a import b` gives a.b where that is a module, else a."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in _of_module(tree) if at_module_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _of_module(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs when a module is imported: no functions, no `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from _of_module(node)


def test_every_package_has_its_floor() -> None:
    packages = {file.parent.name for file in (ROOT / "pipeline").glob("*/__init__.py")}
    assert packages == set(BELOW)
    assert {name for name in MODULES if name.startswith("pipeline.") and name.count(".") != 2} == set()


@pytest.mark.parametrize("name", BELOW)
def test_a_package_imports_only_packages_below_it(name: str) -> None:
    for module, file in modules(f"pipeline/{name}").items():
        ours = {found for found in imports(file) if found.split(".")[0] in ("pipeline", "stages")}
        allowed = {found for found in ours if found.split(".")[:1] == ["pipeline"] and len(found.split(".")) > 2}
        assert ours == allowed, (module, ours - allowed)
        assert {found.split(".")[1] for found in ours} <= {name, *BELOW[name]}, module


def test_no_modules_import_each_other() -> None:
    graph = {name: set(imports(file, at_module_level=True)) & set(MODULES) for name, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"they import each other: {error.args[1]}")


def test_a_stage_is_imported_by_the_command_line_and_its_own_folder_alone() -> None:
    stages = {name: file for name, file in MODULES.items() if name.startswith("stages.")}
    for name, file in stages.items():
        if name.split(".")[-1] == "cli" or name.startswith("stages.refshard."):
            # They declare commands, and run them for scripts.
            continue
        ours = {found for found in imports(file) if found.split(".")[0] == "stages"} - SHARED_BY_STAGES
        own = {found for found in ours if name.count(".") == 2 and found.rpartition(".")[0] == name.rpartition(".")[0]}
        assert ours == own, (name, ours - own)


def test_what_answers_at_once_loads_no_torch() -> None:
    free = [*(f"pipeline.{name}" for name in TORCH_FREE), *STAGES_WITHOUT_TORCH]
    names = [name for name in MODULES if any(f"{name}.".startswith(f"{one}.") for one in free)]
    assert {one for one in free if not any(f"{name}.".startswith(f"{one}.") for name in names)} == set()
    code = (
        "import importlib, sys\n"
        f"for name in {[name for name in names if name not in LOADS_TORCH]!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_opens_with_its_job_and_names_what_it_offers(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    [exported] = [
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and _targets(n) == ["__all__"]
    ]
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    values = [target for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) for target in _targets(n)]
    assert set(exported) <= {*functions, *values}
    if name.startswith("pipeline."):
        assert {function for function in functions if function[0] != "_"} <= set(exported)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def test_packages_open_with_their_job() -> None:
    for file in [*(ROOT / "pipeline").rglob("__init__.py"), *(ROOT / "stages").rglob("__init__.py")]:
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


@pytest.mark.parametrize("name", modules("pipeline"))
def test_a_module_can_be_read_at_one_sitting(name: str) -> None:
    most = {"pipeline.report.run_page": 600}.get(name, MOST_LINES)  # to be parted
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= most


def test_no_test_imports_another_or_the_fixtures() -> None:
    """Nor does code that a test hands to another process."""
    files = list((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    leaning = re.compile(r"^.*?\b(?:from|import) (?:\w+\.)*(?:conftest|test_\w+)\b", re.MULTILINE)
    assert {file: found for file in files if (found := leaning.findall(file.read_text(encoding="utf-8")))} == {}


def test_the_top_level_holds_nothing_else() -> None:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in done.stdout.splitlines()} <= TOP_LEVEL
