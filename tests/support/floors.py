"""Draw docs/floors.svg, and write the lists of modules and types in docs/contributing.md, all read from the sources.

python tests/support/floors.py    writes both files
"""

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["FLOORS", "PAGE", "PICTURE", "ROOT", "page", "picture"]

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "floors.svg"
PAGE = ROOT / "docs" / "contributing.md"

FLOORS = (
    ("base",),
    ("config",),
    ("data",),
    ("models",),
    ("scoring",),
    ("store", "replies"),
    ("run",),
    ("training", "report"),
    ("stages",),
)
"""Packages from the lowest floor to the highest; a package imports only from floors below its own"""

TYPES = (
    ("data/rows.py", "Row"),
    ("data/pairs.py", "Pair"),
    ("data/tokens.py", "TokenizedPair"),
    ("data/intake.py", "KeptPair"),
    ("scoring/packing.py", "Batch"),
    ("scoring/forward.py", "Scores"),
    ("store/format.py", "ScoredPair"),
    ("training/losses.py", "Pairs"),
    ("training/losses.py", "PairLoss"),
)
"""The types that a pair passes through, in order"""

WIDTH, LEFT, FLOOR_GAP, LINE, TOP = 1160, 20, 12, 16, 58
ROOMS_END = 760
LANE_STEP = 33
HUES = ("#0b62c4", "#8a5a00", "#1a7a37", "#9a3fb5", "#b3362b", "#00758a", "#6a6f00", "#4b55c4", "#b0457a", "#5b6672")


@dataclass(frozen=True)
class Room:
    """One package and its place in the picture."""

    name: str
    x: float
    y: float
    width: float
    height: float
    says: str
    """First line of the package's docstring"""
    modules: list[str]
    """Lines of module names"""


def imports_of(file: Path) -> set[str]:
    """List the modules of this project that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith(("pipeline.", "stages."))}


def arrows() -> Counter[tuple[str, str]]:
    """Count the modules of one package that import from another: (importer, imported) -> modules."""
    count: Counter[tuple[str, str]] = Counter()
    for package in (name for floor in FLOORS for name in floor):
        for file in files_of(package):
            targets = {name.split(".")[1] for name in imports_of(file) if name.startswith("pipeline.")}
            count.update((package, target) for target in targets - {package})
    return count


def files_of(package: str) -> list[Path]:
    folder = ROOT / "stages" if package == "stages" else ROOT / "pipeline" / package
    return sorted(file for file in folder.rglob("*.py") if file.name != "__init__.py")


def rooms() -> dict[str, Room]:
    """Lay the packages out, the highest floor on top."""
    placed = {}
    y = float(TOP)
    for floor in reversed(FLOORS):
        width = (ROOMS_END - LEFT - FLOOR_GAP * (len(floor) - 1)) / len(floor)
        lines = {package: _wrapped(_module_names(package), int(width / 6.9)) for package in floor}
        height = 44 + LINE * max(map(len, lines.values()))
        for i, package in enumerate(floor):
            x = LEFT + i * (width + FLOOR_GAP)
            placed[package] = Room(package, x, y, width, height, _says(package, int(width / 7.6)), lines[package])
        y += height + FLOOR_GAP
    return placed


def _module_names(package: str) -> list[str]:
    if package != "stages":
        return [file.stem for file in files_of(package)]
    folder = ROOT / "stages"
    files = [file.stem for file in folder.glob("*.py") if file.name != "__init__.py"]
    folders = [f"{file.parent.name}/" for file in folder.glob("*/__init__.py")]
    return sorted([*files, *folders])


def _says(package: str, most: int) -> str:
    folder = ROOT / "stages" if package == "stages" else ROOT / "pipeline" / package
    text = (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "").splitlines()[0]
    most -= len(package) + 2
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0] + " ..."


def _wrapped(words: list[str], most: int) -> list[str]:
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}  {word}" if lines[-1] else word
        if len(longer) <= most:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def picture() -> str:
    """Make the SVG: one room a package, and a number for every two of them with an import between."""
    placed, count = rooms(), arrows()
    floor_of = {package: i for i, floor in enumerate(FLOORS) for package in floor}
    upward = [pair for pair in count if floor_of[pair[0]] <= floor_of[pair[1]]]
    assert not upward, f"imports against the order: {upward}"
    height = max(room.y + room.height for room in placed.values()) + 24
    importers = [package for floor in reversed(FLOORS) for package in floor]
    lines = [_HEAD.format(width=WIDTH, height=f"{height:.0f}")]
    lines += [
        f"  .from-{package} {{ stroke: {HUES[i % len(HUES)]}; }} .dot-{package} {{ fill: {HUES[i % len(HUES)]}; }}"
        for i, package in enumerate(importers)
    ]
    lines.append(_BODY.format(width=WIDTH, height=f"{height:.0f}"))
    lines += _lanes(placed, count, importers)
    return "\n".join(lines) + "\n</svg>\n"


def _lanes(placed: dict[str, Room], count: Counter[tuple[str, str]], importers: list[str]) -> list[str]:
    """Draw the imports beside the rooms: a lane for each importer, a number where it meets a room that it uses."""
    lanes = {importer: ROOMS_END + 30 + LANE_STEP * i for i, importer in enumerate(reversed(importers))}
    behind, before = [], []
    for target in reversed(importers):
        users = [importer for importer in importers if count[importer, target]]
        if users:
            edge, y = placed[target].x + placed[target].width, _door(placed[target], target)
            end = max(lanes[user] for user in users)
            behind.append(f'<path class="wire" d="M{end} {y:.1f} H{edge + 2:.1f}" marker-end="url(#head)"/>')
    for importer in importers:
        used = [target for target in importers if count[importer, target]]
        if not used:
            continue
        x, start = lanes[importer], _door(placed[importer], importer)
        low = max(_door(placed[target], target) for target in used)
        edge = placed[importer].x + placed[importer].width
        behind.append(f'<path class="lane from-{importer}" d="M{edge:.1f} {start:.1f} H{x} V{low:.1f}"/>')
        before.append(f'<text class="label dot-{importer}" x="{x}" y="{start - 6:.1f}">{importer}</text>')
        for target in used:
            y, number = _door(placed[target], target), count[importer, target]
            plural = "s" if number > 1 else ""
            before.append(
                f"<g><title>{number} module{plural} of {importer} import from {target}</title>"
                f'<circle class="dot-{importer}" cx="{x}" cy="{y:.1f}" r="9"/>'
                f'<text class="number" x="{x}" y="{y + 3.5:.1f}">{number}</text></g>'
            )
    return [*behind, *(line for room in placed.values() for line in _room(room)), *before]


def _room(room: Room) -> list[str]:
    lines = [
        f'<rect class="box" x="{room.x:.1f}" y="{room.y:.1f}" width="{room.width:.1f}" height="{room.height:.1f}" '
        'rx="6"/>',
        f'<text x="{room.x + 12:.1f}" y="{room.y + 21:.1f}"><tspan class="name">{room.name}</tspan>',
        f'<tspan dx="10">{escape(room.says)}</tspan></text>',
    ]
    for i, text in enumerate(room.modules):
        y = room.y + 42 + LINE * i
        lines.append(f'<text class="module" x="{room.x + 12:.1f}" y="{y:.1f}" xml:space="preserve">{text}</text>')
    return lines


def _door(room: Room, name: str) -> float:
    """Height at which a room's arrows leave or arrive; two rooms of one floor have theirs apart."""
    shared = next(floor for floor in FLOORS if name in floor)
    return room.y + room.height * (shared.index(name) + 1) / (len(shared) + 1)


def page() -> str:
    """Give docs/contributing.md with the lists between its marks made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (("modules", _module_list()), ("types", _type_list())):
        start, end = f"<!-- {name}, by tests/support/floors.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.split(end)[1]}"
    return text


def _module_list() -> list[str]:
    """List every package with its modules, the lowest floor first, each with the first line of its docstring."""
    lines = ["| module | |", "|---|---|"]
    for package in (name for floor in FLOORS for name in floor):
        folder = "stages" if package == "stages" else f"pipeline/{package}"
        lines.append(f"| **{folder}/** | {_first_line(ROOT / folder / '__init__.py')} |")
        for file in files_of(package):
            lines.append(f"| `{file.relative_to(ROOT / folder).as_posix()}` | {_first_line(file)} |")
    return lines


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def _type_list() -> list[str]:
    lines = ["| type | what it is | fields |", "|---|---|---|"]
    for file, name in TYPES:
        tree = ast.parse((ROOT / "pipeline" / file).read_text(encoding="utf-8"))
        [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        says = " ".join((ast.get_docstring(found) or "").split("\n\n")[0].split())
        fields = [ast.unparse(node.target) for node in found.body if isinstance(node, ast.AnnAssign)]
        lines.append(f"| `{name}`, {file} | {says} | {', '.join(f'`{field}`' for field in fields)} |")
    return lines


_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"
 aria-labelledby="title about">
<title id="title">The floors of refshard</title>
<desc id="about">Each package imports only packages on lower floors. Made by tests/support/floors.py.</desc>
<style>
  :root {{ --page: #ffffff; --box: #f3f5f8; --line: #8b95a1; --text: #1c2128; --soft: #4d5763; }}
  @media (prefers-color-scheme: dark) {{
    :root {{ --page: #0e1217; --box: #181e26; --line: #76818d; --text: #eaeef3; --soft: #b4bdc8; }}
  }}
  text {{ font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12.5px;
         fill: var(--soft); }}
  .page {{ fill: var(--page); }}
  .box {{ fill: var(--box); stroke: var(--line); stroke-width: 1.2; }}
  .name {{ font-size: 15px; font-weight: 600; fill: var(--text); }}
  .module {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 11px; }}
  .label {{ font-size: 11px; font-weight: 600; text-anchor: middle; }}
  .number {{ font-size: 10px; font-weight: 600; text-anchor: middle; fill: #ffffff; }}
  .lane {{ fill: none; stroke-width: 2; }}
  .wire {{ fill: none; stroke: var(--line); stroke-width: 1; }}
  .head {{ fill: var(--line); }}"""

_BODY = """</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"
 markerUnits="userSpaceOnUse" orient="auto"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>
<rect class="page" width="{width}" height="{height}" rx="10"/>
<text x="20" y="26"><tspan class="name">Each package imports only packages on lower floors</tspan></text>
<text x="20" y="44">On the right, one line a package. A number counts
its modules that import from the room at that height.</text>"""


def main() -> None:
    PICTURE.write_text(picture(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
