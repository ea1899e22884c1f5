"""The page of families is what the families of today's transformers give, and their log-probs are their own."""

import re

import pytest

from support.families import LARGEST_GAP, NAMES, PAGE, page, row_of, version


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "nemotron", "mamba", "bert"])
def test_a_family_is_read_as_its_line_says(name: str) -> None:
    row = row_of(name)
    read = {"gpt_oss": "packed", "llama4_text": "padded", "nemotron": "packed", "bert": "refused"}
    assert row.reading == read[name] if name in read else row.reading in ("cached", "padded")
    assert row.gap <= LARGEST_GAP


@pytest.mark.nightly
def test_the_page_of_families_is_what_they_give_today() -> None:
    written = PAGE.read_text(encoding="utf-8")
    if f"transformers {version()}," not in written:
        pytest.skip(f"the page is of another transformers than {version()}")
    assert set(re.findall(r"^\| `(\S+)` \| `", written, flags=re.MULTILINE)) == set(NAMES)
    text, rows = page()
    assert not [(row.name, row.gap) for row in rows if not row.gap <= LARGEST_GAP]
    assert written == text, "run: python tests/support/families.py"
