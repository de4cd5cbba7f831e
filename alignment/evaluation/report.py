"""One self-contained HTML page with the tables, figures and settings of an evaluation."""

import base64
import json
from html import escape
from pathlib import Path

from evaluation.tables import MISSING

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 100rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { background: #f4f4f4; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.missing { color: #a33; font-style: italic; }
figure { margin: 1.2rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: 13px; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; font-size: 12.5px; }
"""


def page(
    title: str,
    verdict: str,
    tables: dict[str, tuple[str, list[list[str]]]],
    figures: dict[str, tuple[str, Path]],
    settings: dict[str, dict],
) -> str:
    """The page's HTML.

    Args:
        title, verdict: heading and the finding in words.
        tables: heading → (note, rows, the first being the heading row).
        figures: name → (caption, PNG file), put into the page itself.
        settings: heading → what made the data.
    """
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(verdict)}</p>"]
    for heading, (note, rows) in tables.items():
        body += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(note)}</p>", _table(rows)]
    body.append("<h2>Figures</h2>")
    body += [_figure(name, *found) for name, found in figures.items()]
    body.append("<h2>Settings</h2>")
    for heading, values in settings.items():
        text = json.dumps(values, indent=2, ensure_ascii=False)
        body.append(f"<h3>{escape(heading)}</h3><pre>{escape(text)}</pre>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in rows[0])
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    return f'<td class="missing">{text}</td>' if text == MISSING else f"<td>{escape(text)}</td>"


def _figure(name: str, caption: str, image: Path) -> str:
    data = base64.b64encode(image.read_bytes()).decode()
    alt = escape(name.replace("_", " "))
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{alt}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'
