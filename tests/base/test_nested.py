"""Nested mappings on one level."""

from typing import Any

from pipeline.base.nested import flatten


def test_values_are_named_by_their_path_and_none_is_left_out() -> None:
    tree: dict[Any, Any] = {"a": 1, "b": {"c": [2], "d": {"e": False, "f": None}, "g": {}}, 3: 4, "h": None}
    assert flatten(tree) == {"a": 1, "b.c": [2], "b.d.e": False, "3": 4}
    assert flatten(tree, "/") == {"a": 1, "b/c": [2], "b/d/e": False, "3": 4}
