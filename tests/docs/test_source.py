"""What must hold for every module of the sources: the size of its functions, the first word of its docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.floors import ROOT

SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES}

MOST_LINES_OF_A_FUNCTION = 80
MOST_PARAMETERS = 7


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


@pytest.mark.parametrize("name", TREES)
def test_no_docstring_starts_with_a_word_that_hides_its_subject(name: str) -> None:
    texts = [
        (node.lineno, node.value.value.strip())
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    assert not [found for found in texts if re.match(r"(Of|What|Whose|That|Where|Whether)\b", found[1])]


def test_a_function_fits_on_a_screen_or_two() -> None:
    long = [
        (name, node.name) for name, node in functions() if node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION
    ]  # type: ignore[operator]
    assert not long


def test_a_function_takes_at_most_seven_parameters_unless_click_calls_it() -> None:
    many = []
    for name, node in functions():
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([p for p in parameters if p.arg not in ("self", "cls")])
        is_command = any("command" in ast.unparse(decorator) for decorator in node.decorator_list)
        if count > MOST_PARAMETERS and not is_command:
            many.append((name, node.name, count))
    assert not many


def test_every_test_module_lies_in_a_folder() -> None:
    assert sorted(path.name for path in (ROOT / "tests").glob("*.py")) == ["conftest.py"]
    assert Path(ROOT / "tests" / "support" / "__init__.py").exists()


def test_what_is_printed_goes_through_say_which_escapes_it() -> None:
    printed = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text(encoding="utf-8").splitlines()
        if "click.echo(" in line or line.strip().startswith("print(")
    }
    # JSON escapes by itself; colors are a terminal's commands, and what is colored was escaped before.
    assert all("json" in line or "color=True" in line for line in printed), printed
