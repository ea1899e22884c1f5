"""The runs of a sweep: which there are, what they are called, and what is no list of values."""

import pytest

from pipeline.base.errors import ConfigError
from stages.sweep.grid import make_grid, split_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.05,0.1,0.5", ["0.05", "0.1", "0.5"]),
        ("sigmoid, [sigmoid, sft],ipo", ["sigmoid", "[sigmoid, sft]", "ipo"]),
        ("{r: 4, alpha: 8},{r: 8},null", ["{r: 4, alpha: 8}", "{r: 8}", "null"]),
        ("train[:100],train[:200]", ["train[:100]", "train[:200]"]),
        ("'a,b',\"c,d\",it's,that's", ["'a,b'", '"c,d"', "it's", "that's"]),
        ("['x,]', y],z", ["['x,]', y]", "z"]),
        ("5e-7", ["5e-7"]),
    ],
)
def test_values_are_split_at_commas_that_are_in_nothing(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_every_combination_has_a_folder_that_says_what_it_is() -> None:
    members = make_grid(["loss.beta=0.05,0.5", "loss.type=ipo,[sigmoid, sft]"])
    assert {member.name: member.overrides for member in members} == {
        "beta-0.05_type-ipo": ("loss.beta=0.05", "loss.type=ipo"),
        "beta-0.05_type-sigmoid+sft": ("loss.beta=0.05", "loss.type=[sigmoid, sft]"),
        "beta-0.5_type-ipo": ("loss.beta=0.5", "loss.type=ipo"),
        "beta-0.5_type-sigmoid+sft": ("loss.beta=0.5", "loss.type=[sigmoid, sft]"),
    }


def test_names_are_plain_and_never_shared() -> None:
    # Two keys with one last part, paths, and values that differ in signs which no folder should have.
    names = [member.name for member in make_grid(["a.r=1", "b.r=../x/y", "c.s=<é>,<è>"])]
    assert names == ["a.r-1_b.r-x-y_s-empty", "a.r-1_b.r-x-y_s-empty.2"]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (["loss.beta"], "like loss.beta="),
        (["=1,2"], "like loss.beta="),
        (["loss.beta=1,,2"], "empty"),
        (["loss.beta="], "empty"),
        (["loss.beta=1,2,1"], "1 is repeated"),
        (["loss.beta=1", "loss.beta=2"], "loss.beta is repeated"),
    ],
)
def test_what_is_no_list_of_different_values_is_refused(over: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_grid(over)
