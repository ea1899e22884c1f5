"""List the ready settings, and put one into the working folder."""

import re
import textwrap
from importlib.resources import files
from pathlib import Path

import click

from pipeline.base.errors import ConfigError
from pipeline.base.files import put_if_absent
from pipeline.base.progress import say

__all__ = ["recipes"]


@click.group(invoke_without_command=True, short_help="List the ready settings, or copy one.")
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the ready settings with the hardware and the time that they need; `copy NAME` puts one here."""
    if context.invoked_subcommand is not None:
        return
    for name, text in _texts().items():
        # The first line is for editors.
        comment = "\n".join(line[1:].strip() for line in text.splitlines()[1:] if line.startswith("#"))
        about, _, facts = comment.partition("\n\n")
        say(f"{name}\n{textwrap.indent(textwrap.fill(about, 100), '  ')}")
        for key in ("hardware", "stage one", "stage two"):
            if found := re.search(rf"^{key} +(.*)$", facts, re.MULTILINE):
                say(f"    {key:<9}  {found[1]}")
    say("\nrefshard recipes copy NAME puts one here, to be read and adapted.")


@recipes.command("copy")
@click.argument("name")
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path), required=False)
def copy(name: str, target: Path | None) -> None:
    """Copy the recipe NAME to TARGET, by default NAME.yaml in the working folder. A file there is kept."""
    texts = _texts()
    name = name.removesuffix(".yaml")
    if name not in texts:
        raise ConfigError(f"NAME: must be one of {', '.join(texts)}, got {name!r}")
    target = target or Path(f"{name}.yaml")
    if not put_if_absent(target, texts[name].encode()):
        raise ConfigError(
            f"{target}: must be a new file, it exists already. Name another one: refshard recipes copy {name} FILE"
        )
    say(f"{target}: copied. Adapt data.path, policy.model and the folders, then: refshard check --config {target}")
    say("For an editor that knows the keys: refshard schema > refshard.schema.json")


def _texts() -> dict[str, str]:
    """Read all recipes, by name."""
    folder = files("stages.recipes")
    found = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): (folder / name).read_text(encoding="utf-8") for name in found}
