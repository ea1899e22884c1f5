"""The schema is printed as it is made."""

import json

from click.testing import CliRunner

from pipeline.config.published import schema_of_settings
from stages.cli import main


def test_the_schema_is_printed_whole() -> None:
    printed = CliRunner().invoke(main, ["schema"])
    assert json.loads(printed.output) == json.loads(json.dumps(schema_of_settings(), default=str))
