"""The report as one HTML file that needs no network: plotly's script is inside it, once."""

import html
import json
from collections.abc import Sequence

from plotly.offline import get_plotlyjs

from experiments.report.figure import Figure, draw
from experiments.report.headline import Card
from experiments.report.style import CSS, SCRIPT
from experiments.report.tables import Table

# The browser is told to load nothing from anywhere; what is embedded is all there is.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

KEY = """<span class="tag measured">measured</span> the devices were here: filled marks, solid lines.
<span class="tag forecast">forecast</span> the same program compiled for them and simulated: hollow marks,
dashed lines."""


def page(
    title: str,
    sentences: Sequence[str],
    cards: Sequence[Card],
    figures: Sequence[Figure],
    tables: Sequence[Table],
    key: str = KEY,
) -> str:
    """The whole document. Every text that comes from a record is escaped; `key`, HTML, says what marks mean."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
<p class="kicker">Ladder report</p>
<h1>{html.escape(title)}</h1>
<ul class="asked">{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)}</ul>
<p class="key">{key}</p>
</header>
<section class="cards">{"".join(map(_card, cards))}</section>
<section class="figures">{"".join(map(_figure, figures))}</section>
<section class="tables">{"".join(map(_table, tables))}</section>
</main>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{_data(figures)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _card(card: Card) -> str:
    numbers = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}<small>{html.escape(remark)}</small></dd></div>"
        for label, value, remark in card.numbers
    )
    return (
        f'<article class="card {card.kind}"><p><span class="tag {card.kind}">{card.kind}</span> largest rung</p>'
        f'<h2>{html.escape(card.title)}</h2><p class="remark">{html.escape(card.subtitle)}</p><dl>{numbers}</dl>'
        "</article>"
    )


def _figure(figure: Figure) -> str:
    choice = ""
    if len(figure.views) > 1:
        options = "".join(
            f'<option value="{number}">{html.escape(view.name)}</option>' for number, view in enumerate(figure.views)
        )
        choice = f'<label>{html.escape(figure.chooses)} <select data-for="{figure.anchor}">{options}</select></label>'
    elif figure.chooses == "Curve":
        choice = f"<label>Curve {html.escape(figure.views[0].name)}</label>"
    return (
        f'<figure><h2>{html.escape(figure.title)}</h2><p class="remark">{html.escape(figure.caption)}</p>'
        f'<div>{choice}</div><div class="plot" id="{figure.anchor}"></div></figure>'
    )


def _table(table: Table) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}>{html.escape(text).replace(',', ',<wbr>')}</{tag}>"
            if number < table.n_words
            else f"<{tag} class=n>{html.escape(text)}</{tag}>"
            for number, text in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    return (
        f'<h2>{html.escape(table.title)}</h2><p class="remark">{html.escape(table.remark)}</p>'
        f'<div class="scroll"><table><thead><tr>{cells(table.columns, "th")}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _data(figures: Sequence[Figure]) -> str:
    """What the script draws. `<` is written as its code, or a text could close the element it stands in."""
    drawn = [
        {
            "id": figure.anchor,
            "plot": json.loads(str(draw(figure).to_json())),
            "views": [{"n_traces": len(view.traces), "y_title": view.y_title} for view in figure.views],
        }
        for figure in figures
    ]
    return json.dumps(drawn, separators=(",", ":")).replace("<", "\\u003c")
