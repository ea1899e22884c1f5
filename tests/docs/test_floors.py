"""The picture of the floors is the one that the sources give."""

from support.floors import PAGE, PICTURE, page, picture


def test_the_picture_of_the_floors_is_made_from_todays_imports() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run: python tests/support/floors.py"


def test_the_lists_of_modules_and_types_are_made_from_todays_sources() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/support/floors.py"
