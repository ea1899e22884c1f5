"""Print the JSON schema of the settings file, with which editors complete and check it."""

import json

import click

from pipeline.base.progress import say

__all__ = ["show_schema"]


@click.command("schema", short_help="The settings' JSON schema, for editors.")
def show_schema() -> None:
    """Print a JSON schema of the settings file; editors complete keys and mark wrong ones with it.

    refshard schema > refshard.schema.json, beside a file that begins as the recipes do:
    # yaml-language-server: $schema=refshard.schema.json
    """
    from pipeline.config.published import schema_of_settings

    say(json.dumps(schema_of_settings(), indent=2, default=str))
