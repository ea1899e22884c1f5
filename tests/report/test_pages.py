"""Pages in one file: what is in the data stays text, nothing is fetched, and no library where there is no chart."""

import re
import sys
from pathlib import Path

import plotly.graph_objects as go
import pytest
from markupsafe import Markup, escape

from pipeline.base.errors import ConfigError, StorageError
from pipeline.report.pages import Section, chart, check_charts, facts, page, table, write_page

EVIL = "<script>alert('x')</script>\"&\x1b[31m"


def section(body: Markup, **settings: str) -> Section:
    return Section(title=settings.pop("title", "One"), body=body, **settings)


def test_what_is_in_the_data_stays_text_wherever_it_stands() -> None:
    bodies = [table(["name", EVIL], [[EVIL, 1.5]]), facts({EVIL: EVIL}), Markup("<p>{}</p>").format(EVIL)]
    text = page(EVIL, [section(body, title=EVIL, note=EVIL) for body in bodies], subtitle=EVIL)
    assert "<script" not in text
    assert text.count(str(escape("<script>alert('x')</script>"))) >= 8


def test_control_characters_are_shown_and_not_sent() -> None:
    body = table(["a\x1b"], [["b\x1b"]]) + facts({"c\x1b": "d\x1b"})
    assert "\x1b" not in page("t\x1b", [section(body, title="s\x1b", note="n\x1b")], subtitle="\x1b")


def test_a_page_forbids_its_browser_to_fetch_and_names_no_address(tmp_path: Path) -> None:
    drawn = chart(go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name=EVIL)), label=EVIL)
    text = page("Run", [section(drawn)])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "http" not in policy[1]
    outside_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", outside_scripts)
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", text)
    assert "@import" not in text
    assert EVIL not in text


def test_the_library_of_charts_is_there_once_and_only_with_a_chart() -> None:
    plain = page("Run", [section(facts({"a": 1}))])
    assert len(plain) < 10_000
    drawn = chart(go.Figure(go.Scatter(x=[1], y=[2])), label="a line")
    two = page("Run", [section(drawn), section(chart(go.Figure(go.Scatter(x=[1], y=[2])), label="another"))])
    assert 1 < len(two) / len(page("Run", [section(drawn)])) < 1.01
    assert 'aria-label="a line"' in two


def test_a_long_title_of_a_column_keeps_room_for_three_lines_on_a_narrow_screen() -> None:
    widths = re.findall(r"min-width:(\d+)ch", table(["row", "log-prob shift of chosen"], [[1, 2]]))
    assert widths == ["3", "10"]


def test_numbers_are_set_to_the_right_and_words_are_not() -> None:
    cells = re.findall(r"<td.*?</td>", table(["a"] * 5, [["x", 12345, 0.123456, True, None]]))
    assert cells == [
        "<td>x</td>",
        '<td class="number">12,345</td>',
        '<td class="number">0.1235</td>',
        "<td>True</td>",
        "<td></td>",
    ]


def test_without_plotly_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_charts()
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ConfigError, match=r"pip install 'refshard\[report\]'"):
        check_charts()


def test_a_page_is_whole_or_not_there(tmp_path: Path) -> None:
    write_page(tmp_path / "new" / "report.html", "<p>1\ud800</p>")
    assert (tmp_path / "new" / "report.html").read_text() == "<p>1?</p>"
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["report.html"]
    with pytest.raises(StorageError, match="can't be made"):
        write_page(tmp_path / "new" / "report.html" / "inside.html", "")
