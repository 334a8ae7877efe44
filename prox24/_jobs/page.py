"""A report as one HTML file without a server: tables, bars, a heat map of losses, a mask."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1, h2 { line-height: 1.2; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #999; }
.heat td { font: 12px monospace; padding: .1rem .35rem; }
.bar { display: inline-block; height: .8em; background: #3b6ea8; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
svg { border: 1px solid #999; max-width: 100%; }
"""


def page(title: str, *sections: str) -> str:
    """An HTML document. The sections are HTML, the title is plain text."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(sections) + "\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading with its parts. The parts are HTML, the title is plain text."""
    return "\n".join([f"<h2>{html.escape(title)}</h2>", *parts])


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    """Lines of plain text to copy."""
    return f"<pre>{html.escape(text)}</pre>"


def table(rows: Iterable[Sequence[str]], columns: Sequence[str] = ()) -> str:
    """A table of plain text: names to the left, figures to the right."""
    head = f"<thead>{_row(columns, 'th')}</thead>" if columns else ""
    return f"<table>{head}{''.join(_row(row) for row in rows)}</table>"


def bars(values: Mapping[str, float]) -> str:
    """Positive numbers as bars on a logarithmic scale; the smallest number has the shortest bar."""
    logs = np.log(list(values.values()))
    widths = 20 + 380 * (logs - logs.min()) / max(float(np.ptp(logs)), 1e-9)
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{value:.2f}</td>"
        f'<td style="text-align: left"><span class="bar" style="width: {width:.0f}px"></span></td>'
        "</tr>"
        for (name, value), width in zip(values.items(), widths, strict=True)
    )
    return f"<table>{''.join(rows)}</table>"


def heat_map(losses: Mapping[str, float]) -> str:
    """Losses of tensors: a row for each layer, a column for each kind. Large losses are dark."""
    places = {name: _place(name) for name in losses}
    columns = list(dict.fromkeys(column for _, column in places.values()))
    layers = list(dict.fromkeys(layer for layer, _ in places.values()))
    by_place = {place: losses[name] for name, place in places.items()}
    largest = max(losses.values(), default=0.0) or 1.0

    def cell(layer: str, column: str) -> str:
        loss = by_place.get((layer, column))
        if loss is None:
            return "<td></td>"
        share = loss / largest
        ink = "#fff" if share > 0.55 else "#222"
        colour = f"rgb({255 - 205 * share:.0f}, {255 - 160 * share:.0f}, {255 - 90 * share:.0f})"
        return f'<td style="background: {colour}; color: {ink}">{loss:.3f}</td>'

    def line(layer: str) -> str:
        cells = "".join(cell(layer, column) for column in columns)
        return f"<tr><td>{html.escape(layer)}</td>{cells}</tr>"

    body = "".join(map(line, layers))
    return f'<table class="heat"><thead>{_row(["layer", *columns], "th")}</thead>{body}</table>'


def picture(mask: NDArray[np.bool_], group: int | None) -> str:
    """A bool matrix as SVG: a square for each True, a line between groups of columns."""
    rows, columns = mask.shape
    squares = "".join(f"M{j} {i}h1v1h-1z" for i, j in np.argwhere(mask))
    lines = "".join(f"M{j} 0v{rows}" for j in range(group, columns, group)) if group else ""
    return (
        f'<svg viewBox="0 0 {columns} {rows}" width="{12 * columns}" role="img" '
        f'aria-label="nonzero weights"><path d="{squares}" fill="#3b6ea8"/>'
        f'<path d="{lines}" stroke="#999" stroke-width=".08"/></svg>'
    )


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _place(name: str) -> tuple[str, str]:
    """The layer and the kind of a tensor, by the first number of its name."""
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.*)", name)
    layer, kind = found.groups() if found else ("", name)
    return layer, kind.removesuffix(".weight")
