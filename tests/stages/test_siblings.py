"""A pair of several finished stores is copied from the same one in every process."""

from pathlib import Path

import pytest

from pipeline.base.folders import LocalFolder
from stages.precompute.siblings import Siblings


def test_the_other_stores_are_asked_in_the_order_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Siblings, "_open", lambda self, name: asked.append(name))
    names = [f"set-{number}" for number in range(8)]
    siblings = Siblings(dict.fromkeys(names, LocalFolder(Path("nowhere"))), {})
    assert siblings.copy("set-3", []) == {}
    assert asked == [name for name in names if name != "set-3"]
