"""The page of settings is the one that the settings' dataclasses give."""

from support.settings_page import PAGE, page


def test_the_page_of_settings_is_made_from_todays_sources() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/support/settings_page.py"
