"""What reports are made of: figures without a display, tables, and one HTML page that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

COLORS = ("#1f5a94", "#c0392b", "#2e8b57", "#8e5ea2", "#d98e04", "#4c9fb0", "#7f4f24", "#5c6770")
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:1060px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .9em;text-align:right;border-bottom:1px solid "
    "#ddd;vertical-align:top}th{border-bottom:2px solid #888}td:first-child,th:first-child{text-align:left}"
    "tr.best{background:#eaf4ec;font-weight:600}img{max-width:100%;margin:1em 0}details{margin:1em 0}"
    "h2{margin-top:2em;font-size:1.25em}.frame{display:flex;gap:1.5em;align-items:center}"
)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure; sizes in inches."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Any) -> None:
    """A light frame and grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def image_html(data: bytes, alt: str) -> str:
    """The PNG inside the page."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def table_html(rows: Sequence[Sequence[str]]) -> str:
    """Header and rows of plain text; a row with a cell marked by `**` is the best one."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0]) + "</tr>"]
    for row in rows[1:]:
        best = any(cell.startswith("**") for cell in row)
        cells = "".join(f"<td>{html.escape(cell.strip('*'))}</td>" for cell in row)
        lines.append(f"<tr{' class=best' if best else ''}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def page(title: str, body: Sequence[str]) -> str:
    """An HTML document; `title` is plain text, `body` HTML."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    text = f"<h1>{html.escape(title)}</h1>{''.join(body)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{text}</body></html>\n'
