"""Wrong settings files beside the published schema: it refuses them too, but for rules that it cannot know."""

import datetime
import functools
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import yaml

from pipeline.config.published import schema_of_settings

__all__ = ["BEYOND_A_SCHEMA", "fits", "require_agreement"]

BEYOND_A_SCHEMA = {
    "two settings contradict each other; of such a rule an editor could only say that a whole section is wrong": (
        r"(?!data\.columns\.user:)\S+: must be left out (if|unless|with|without|for) ",
        r"\S+: must be set together with (target_modules|an adapter)",
        r"loss\.weights: must be \d+ finite numbers, one for each loss, got \[[\d., ]*\]",
        r"loss\.label_smoothing: must be (0 for|above 0 for|below 0\.5 for) ",
        r"loss\.f_divergence_type: must be reverse_kl for ",
        r"loss\.use_weighting: must be false for ",
        r"\S+\.bits: must be 4 with type or double",
        r"train\.\w+: must be stop with reference\.sync",
        r"data\.eval\.\w+\.path: must be set with data\.sets",
        r"data\.eval\.\w+: must differ from the names in data\.sets",
    ),
    "two values of a mapping are equal": (r"\S+\.roles\.\w+: must be the name of one role alone",),
    "-o may give the folder on the command line": (r"train\.output_dir: missing",),
    "YAML has made another number of it before the schema sees it": (
        r"data\.max_length: must be a whole number, got '(1__0|0x10)'",
        r"policy\.quantization\.bits: must be one of 4, 8, got '4\.0'",
    ),
}
"""Reason -> the beginnings of the messages whose rule the schema lacks"""


@functools.cache
def _validator() -> Any:
    checker = jsonschema.FormatChecker(["date"])
    return jsonschema.Draft202012Validator(schema_of_settings(), format_checker=checker)


def fits(settings: Any) -> bool:
    """Return True if the schema takes the settings, given as YAML's own types or as words."""
    return bool(_validator().is_valid(_as_an_editor_reads(settings)))


def _as_an_editor_reads(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_an_editor_reads(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_an_editor_reads(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        read = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return value
    # Dates are texts in YAML 1.2.
    return value if isinstance(read, datetime.date | Mapping | list) else read


def require_agreement(settings: Any, message: str) -> None:
    """Require that the schema refuses settings which a command has refused, unless the rule is beyond it."""
    beyond = any(re.match(rule, message) for rules in BEYOND_A_SCHEMA.values() for rule in rules)
    taken = fits(settings)
    found = "takes what a command refuses" if taken else "refuses what BEYOND_A_SCHEMA says it can't know"
    assert taken == beyond, f"the schema {found}: {message}. Change pipeline/config/published.py or BEYOND_A_SCHEMA"
