"""The page of what was tried is that of its results, and the safeguards that are taken away are in the sources."""

import json

import pytest

from faults.mutate import MUTATIONS, Mutation
from faults.report import FILES, PAGE, RESULTS, file_of, page
from support.processes import ROOT


def test_the_page_is_that_of_the_results_and_all_of_them_are_good() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(results)
    assert all((entry["lost"], entry["wrong"]) == (0, 0) for entry in results["tallies"])
    assert results["mutations"] == {mutation.name: True for mutation in MUTATIONS}


def test_every_test_that_the_page_names_is_there() -> None:
    for entry in json.loads(RESULTS.read_text(encoding="utf-8"))["tallies"]:
        file, _, name = entry["test"].partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
        assert any(file_of(entry) in names for names in FILES.values())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_a_safeguard_that_is_taken_away_is_in_the_sources_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.before) == 1
    for word in mutation.tests.split():
        assert not word.startswith("tests/") or (ROOT / word).is_file()
