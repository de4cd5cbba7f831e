"""One self-contained HTML page: verdict, main figure, tables, what the models say, settings."""

import base64
import json
from html import escape
from pathlib import Path

from evaluation.answers import answers_section
from evaluation.run_files import Model, Run
from evaluation.tables import MISSING

HERE = Path(__file__).parent
NO_NETWORK = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    title: str,
    verdict: list[str],
    warnings: list[str],
    tables: dict[str, tuple[str, list[list[str]]]],
    figures: dict[str, tuple[str, Path]],
    run: Run,
    models: list[Model],
) -> str:
    """Return the page's HTML.

    Args:
        title: its heading.
        verdict, warnings: findings in sentences.
        tables: heading → (note, rows, the first being the heading row).
        figures: name → (caption, PNG file), put into the page itself; the first stands beside the verdict.
        run: its responses and settings are shown.
        models: whose responses, side by side.
    """
    shown = [_figure(name, *found) for name, found in figures.items()]
    sections = [_section(heading, f'<p class="note">{escape(note)}</p>{html_table(rows)}')
                for heading, (note, rows) in tables.items()]  # fmt: skip
    says = answers_section(run, models)
    if says:
        sections.insert(1, _section("What the models say", says))
    if shown[1:]:
        sections.append(_section("More figures", f'<div class="figures">{"".join(shown[1:])}</div>'))
    sections.append(_section("Settings", "".join(_settings(*item) for item in run.settings.items())))
    cards = _card(warnings, "card bad") + _card(verdict, "card")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">'
        f"<style>\n{(HERE / 'report.css').read_text()}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<div class="first"><div>{cards}</div>{"".join(shown[:1])}</div>\n{"".join(sections)}'
        f"<script>\n{(HERE / 'report.js').read_text()}</script>\n</body></html>\n"
    )


def _section(heading: str, html: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{html}</section>\n"


def _card(sentences: list[str], kind: str) -> str:
    return f'<div class="{kind}">{"".join(f"<p>{escape(s)}</p>" for s in sentences)}</div>' if sentences else ""


def html_table(rows: list[list[str]]) -> str:
    """Return a table; an interval stands below its value."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in rows[0])
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    if text == MISSING:
        return f'<td class="missing">{text}</td>'
    value, bracket, interval = escape(text).partition(" [")
    return f"<td>{value}<small>[{interval}</small></td>" if bracket else f"<td>{value}</td>"


def _figure(name: str, caption: str, image: Path) -> str:
    data = base64.b64encode(image.read_bytes()).decode()
    alt = escape(name.replace("_", " "))
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{alt}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def _settings(heading: str, values: dict) -> str:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return f"<details><summary><span>{escape(heading)}</span></summary><pre>{escape(text)}</pre></details>"
