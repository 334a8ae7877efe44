"""Reports as HTML: everything in one file, with the figures of the report."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from commands import run
from tiny import write_tiny

import prox24
from prox24._jobs import page

WINDOWS = np.arange(4 * 32).reshape(4, 32) % 260


class Tags(HTMLParser):
    """Checks that tags are closed, and collects their attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.given = [], []
        self.feed(text)
        assert not [tag for tag in self.open if tag not in ("meta",)]

    def handle_starttag(self, tag, attrs):
        self.given += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("family", ["llama1", "gpt2"])
def test_the_page_of_a_report_shows_losses_and_the_mask_that_was_written(tmp_path, family):
    write_tiny(tmp_path / "model", family)
    report = prox24.prune(
        tmp_path / "model", tmp_path / "out", prox24.Recipe.wanda(), calibration=WINDOWS
    )
    text = report.to_html()
    given = Tags(text).given
    assert not [value for name, value in given if name in ("src", "href")]
    for linear in report.linears:
        assert f">{linear.statistics.relative_loss:.3f}<" in text
    for name, value in report.totals.items():
        assert f"<td>{name}</td><td>{value}</td>" in text
    for name, value in report.stages.items():
        assert f"<td>{name}</td><td>{value:.1f}</td>" in text
    (squares,) = re.findall(r'<path d="((?:M\d+ \d+h1v1h-1z)+)"', text)
    rows, columns = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', text).groups()[::-1])
    places = np.array(re.findall(r"M(\d+) (\d+)", squares), int)
    mask = np.zeros((rows, columns), bool)
    mask[places[:, 1], places[:, 0]] = True
    assert np.all(mask.reshape(rows, -1, 4).sum(axis=-1) == 2)


def test_the_file_name_of_a_report_chooses_its_format(tmp_path):
    write_tiny(tmp_path / "model")
    for name, begin in (("report.html", "<!doctype html>"), ("report.json", "{")):
        assert run("verify", tmp_path / "model", "--report", tmp_path / name, "--quiet") == 1
        assert (tmp_path / name).read_text().startswith(begin)


def test_text_is_no_markup():
    assert "<b>" not in page.page("<b>", page.paragraph("<b>"), page.table([["<b>"]]))


def test_a_name_without_a_layer_is_a_row_of_its_own():
    shown = page.heat_map({"layers.0.a.weight": 0.5, "layers.1.a.weight": 0.25, "head": 0.0})
    Tags(shown)
    assert shown.count("<tr>") == 4
    assert [shown.count(f">{value}<") for value in ("0.500", "0.250", "0.000")] == [1, 1, 1]
