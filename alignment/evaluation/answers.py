"""The part of the report page that shows what the models say, side by side, and how much they repeat themselves."""

from collections import Counter
from html import escape

import numpy as np

from bandit.palette import color_of
from evaluation.run_files import BASE, FIRST, Answers, Model, Run
from evaluation.stats import distinct
from evaluation.tables import lost_diversity

SHOWN_PROMPTS = 24
EXTREMES = 3  # best and worst responses per model
OPENING_WORDS = 4
REPEATS = 3  # from so many equal responses on, each of them says so


def answers_section(run: Run, models: list[Model]) -> str:
    """Return the section's HTML: diversity, search, chosen prompts, best and worst; empty without any responses."""
    there = {model: answers for model in models if (answers := run.test(model))}
    if not there:
        return ""
    count = len(next(iter(there.values())).prompts)
    rows = shown_rows(count)
    prompts = "".join(_prompt(run, there, row, opened=row == rows[0]) for row in rows)
    extremes = "".join(_extremes(run, model) for model in there)
    return (
        f"{_diversity(there)}{_tools(there)}<h3>{len(rows)} of {count} test prompts, evenly spaced</h3>\n{prompts}"
        f"<h3>Best and worst responses of each model, by the training reward model</h3>\n{extremes}"
    )


def shown_rows(count: int) -> list[int]:
    """Return which of `count` prompts are shown: evenly spaced, whatever the models answered."""
    return sorted({int(row) for row in np.linspace(0, count - 1, min(count, SHOWN_PROMPTS))})


def opening(text: str) -> str:
    """Return the first words of a response, in lower case."""
    return " ".join(text.lower().split()[:OPENING_WORDS])


def _diversity(there: dict[Model, Answers]) -> str:
    heading = ("model", "different responses", "distinct-2", "most frequent opening", "most frequent response")
    head = "".join(f'<th scope="col"{" class=text" * (i > 2)}>{text}</th>' for i, text in enumerate(heading))
    base = there.get(BASE)
    lines = "".join(_diversity_row(model, answers.texts, base and base.texts) for model, answers in there.items())
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>\n'


def _diversity_row(model: Model, texts: list[str], base: list[str] | None) -> str:
    pairs = distinct(texts, 2)
    collapsed = base is not None and lost_diversity(texts, base)
    [(start, starts)] = Counter(map(opening, texts)).most_common(1)
    [(same, count)] = Counter(texts).most_common(1)
    share = len(set(texts)) / len(texts)
    cells = (
        f"<td>{escape(model.title)}{' · collapsed' if collapsed else ''}</td>"
        f'<td><span class="bar"><i style="width:{100 * share:.0f}%"></i></span>{len(set(texts))} of {len(texts)}</td>'
        f"<td>{'–' if pairs is None else f'{pairs:.2f}'}</td>"
        f'<td class="text">{100 * starts / len(texts):.0f}%: {escape(start)} …</td>'
        f'<td class="text">{f"{count} times: {escape(same[:160])}" if count > 1 else "each occurs once"}</td>'
    )
    return f'<tr class="bad">{cells}</tr>\n' if collapsed else f"<tr>{cells}</tr>\n"


def _tools(there: dict[Model, Answers]) -> str:
    buttons = "".join(
        f'<button data-model="{escape(model.title)}" aria-pressed="true">{escape(model.short)}</button>'
        for model in there
    )
    return (
        '<div class="tools" hidden><input type="search" placeholder="search questions and responses" '
        f'aria-label="search"><output></output><button class="all">open or close all</button>{buttons}</div>\n'
    )


def _prompt(run: Run, there: dict[Model, Answers], row: int, opened: bool) -> str:
    says = "".join(_article(run, model, row, 0) for model in there)
    scores = [answers.scores[row, 0] for answers in there.values()]
    question = next(iter(there.values())).questions[row]
    return _fold(question, _range(min(scores), max(scores)), says, opened)


def _extremes(run: Run, model: Model) -> str:
    answers = run.test(model)
    order = np.argsort(answers.scores, axis=None, kind="stable")
    chosen = [*order[::-1][:EXTREMES], *order[:EXTREMES][::-1]]
    cells = [map(int, np.unravel_index(i, answers.scores.shape)) for i in dict.fromkeys(chosen)]
    says = "".join(_article(run, model, *cell, with_question=True) for cell in cells)
    scores = answers.scores.flat[order[[0, -1]]]
    return _fold(f"{model.title}: best and worst", _range(*scores), says, False)


def _range(low: float, high: float) -> str:
    return f"reward {low:z.2f} to {high:z.2f}"


def _fold(question: str, scores: str, says: str, opened: bool) -> str:
    return (
        f'<details class="ask-all"{" open" * opened}><summary><span class="ask">{escape(question)}</span>'
        f'<span class="scores">{scores}</span></summary><div class="says">{says}</div></details>\n'
    )


def _article(run: Run, model: Model, row: int, k: int, with_question: bool = False) -> str:
    """Return response `k` to prompt `row` with its scores, its length, and how often the model says just that."""
    answers, judged = run.test(model), run.test(model, "judge")
    text = answers.responses[row][k]
    same = answers.texts.count(text)
    facts = [f"reward {answers.scores[row, k]:z.2f}"]
    facts += [f"judge {judged.scores[row, k]:z.2f}"] if judged else []
    facts += [f"{answers.tokens[row, k]:.0f} tokens{', cut' if answers.cut[row, k] else ''}"]
    spans = "".join(f"<span>{fact}</span>" for fact in facts)
    if same >= REPEATS:
        spans += f'<span class="tag">one of {same} equal responses</span>'
    color = "" if model in (BASE, FIRST) else f' style="--model:{color_of(model.label)}"'
    asked = f'<p class="ask">{escape(answers.questions[row])}</p>' if with_question else ""
    said = f"<p>{escape(text)}</p>" if text.strip() else "<p><i>(empty)</i></p>"
    return (
        f'<article data-model="{escape(model.title)}"{color}>'
        f"<header><b>{escape(model.short)}</b>{spans}</header>{asked}{said}</article>"
    )
