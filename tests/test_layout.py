"""The house's plan: which modules there are, in which order, and that imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import only modules above it. A new one is added here, with its one job in its docstring.
PIPELINE = [
    "errors",
    "versions",
    "progress",
    "signals",
    "commands",
    "grid",
    "storage",
    "attempts",
    "folders",
    "records",
    "digests",
    "config",
    "hardware",
    "jobs",
    "sources",
    "pairs",
    "tokens",
    "pieces",
    "survey",
    "intake",
    "loading",
    "models",
    "fingerprint",
    "packing",
    "attention",
    "fused",
    "head",
    "scoring",
    "memory",
    "estimate",
    "probe",
    "runs",
    "reply_means",
    "generating",
    "rewarding",
    "ensemble",
    "shards",
    "verify",
    "ranking",
    "contents",
    "explaining",
    "reuse",
    "join",
    "processes",
    "gate",
    "losses",
    "offload",
    "sharded",
    "recording",
    "trainer",
    "checkpoints",
    "order",
    "mixing",
    "windows",
    "card",
    "reviews",
    "pages",
    "store_page",
    "charts",
    "comparison",
    "curves",
    "report",
    "heatmap",
]
STAGES = [
    "cli",
    "launch",
    "precompute",
    "train",
    "windows",
    "check",
    "generate",
    "sweep",
    "inspect",
    "verify",
    "report",
    "explain",
    "import_scores",
    "export",
    "submit_slurm",
    "submit_kubernetes",
    "demo",
]
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "docs",
    "pipeline",
    "pyproject.toml",
    "stages",
    "tests",
}
ANSWERS_WITHOUT_TORCH = [
    "pipeline.config",
    "pipeline.hardware",
    "pipeline.jobs",
    "pipeline.sources",
    "pipeline.pairs",
    "pipeline.tokens",
    "pipeline.pieces",
    "pipeline.survey",
    "pipeline.intake",
    "pipeline.models",
    "pipeline.fingerprint",
    "pipeline.folders",
    "pipeline.grid",
    "pipeline.progress",
    "pipeline.records",
    "pipeline.report",
    "pipeline.shards",
    "pipeline.verify",
    "pipeline.ranking",
    "pipeline.contents",
    "pipeline.explaining",
    "pipeline.reuse",
    "pipeline.reviews",
    "pipeline.heatmap",
    "stages.cli",
    "stages.explain",
    "stages.inspect",
    "stages.report",
    "stages.submit_slurm",
    "stages.submit_kubernetes",
    "stages.verify",
]


def _imports(file: Path) -> set[str]:
    """Modules of this project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if "." not in node.module else [node.module]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] in ("pipeline", "stages")}


def _modules(package: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / package).glob("*.py") if file.stem != "__init__")


def test_every_module_is_in_the_plan() -> None:
    assert _modules("pipeline") == sorted(PIPELINE)
    assert _modules("stages") == sorted(STAGES)


@pytest.mark.parametrize("name", PIPELINE)
def test_a_part_imports_only_parts_above_it(name: str) -> None:
    above = {f"pipeline.{other}" for other in PIPELINE[: PIPELINE.index(name)]}
    assert _imports(ROOT / "pipeline" / f"{name}.py") <= above


@pytest.mark.parametrize("name", [s for s in STAGES if s != "cli"])
def test_no_stage_imports_another(name: str) -> None:
    assert not {i for i in _imports(ROOT / "stages" / f"{name}.py") if i.startswith("stages")}


def test_every_module_opens_with_its_job_and_names_what_it_offers() -> None:
    for file in [*(ROOT / "pipeline").glob("*.py"), *(ROOT / "stages").glob("*.py")]:
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), file
        if file.stem == "__init__":
            continue
        exported = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        defined = {
            name
            for node in tree.body
            for name in (
                [node.name]
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                else [ast.unparse(t) for t in node.targets]
                if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Tuple)
                else [e.id for e in node.targets[0].elts if isinstance(e, ast.Name)]
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
                else []
            )
        }
        assert set(exported) <= defined, file
        public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"}
        if file.parent.name == "pipeline":
            assert public == set(exported) & public, (file, public - set(exported))


def test_the_top_level_holds_nothing_else() -> None:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in done.stdout.splitlines()} <= TOP_LEVEL


def test_settings_help_and_inspection_load_no_torch() -> None:
    code = f"import sys\nfor m in {ANSWERS_WITHOUT_TORCH!r}: __import__(m)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
