"""Fix the date that a chat template reads from the clock (`strftime_now`), so that tokens depend on no day."""

import datetime
from typing import Any, Protocol

__all__ = ["asks_for_date", "fix_date"]

_CLOCK = "strftime_now"
"""The one function by which the library tells a template the time"""


class _Templated(Protocol):
    @property
    def chat_template(self) -> Any: ...


def asks_for_date(tokenizer: _Templated) -> bool:
    """Return True if the tokenizer's chat template, or one of its templates, reads the clock."""
    return _CLOCK in str(tokenizer.chat_template)


def fix_date(tokenizer: Any, tools: Any, date: str | None) -> None:
    """Have the template that serves `tools` read this date, YYYY-MM-DD at midnight; without one, the clock again."""
    template = tokenizer.get_chat_template(None, tools)
    if _CLOCK not in template:
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Arguments of `apply_chat_template` can't be functions: the library makes text of them.
    variables = _compile_jinja_template(template).globals
    variables.pop(_CLOCK, None)
    if date is not None:
        variables[_CLOCK] = datetime.datetime.fromisoformat(date).strftime
