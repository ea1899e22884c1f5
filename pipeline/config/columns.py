"""Names of the columns that a pair is read from, and of those who speak in it."""

__all__ = ["LAYOUT_COLUMNS", "LOSS_COLUMNS", "PAIR_COLUMNS", "ROLES", "SPOKEN_COLUMNS"]

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
SPOKEN_COLUMNS = ("system", "user")
"""Texts that become the prompt's messages; read only if `data.columns` names them"""
LAYOUT_COLUMNS = (
    "chosen_message",
    "chosen_messages",
    "completions",
    "context",
    "conversations",
    "history",
    "input",
    "instruction",
    "messages",
    "non_preferred_output",
    "overall_preference",
    "preferred_output",
    "rejected_message",
    "rejected_messages",
    "rejected_response",
    "response1",
    "response2",
)
"""Columns of other tools' layouts"""
LOSS_COLUMNS = ("weight", "margin")
"""Numbers that the loss takes besides the pair; read only if `data.columns` names them"""
ROLES = ("user", "assistant", "system", "tool", "function_call")
"""Those who speak, as `data.roles` names them; `function_call`: a turn whose text is the JSON of a call"""
