"""Small tables of tokens as HTML, every text escaped."""

import html
from collections.abc import Sequence
from typing import Any

from app.components.payload import Texts
from app.style import token


def logit_table(rows: Sequence[dict[str, Any]], texts: Texts, title: str) -> str:
    """Tokens with their logit effects as bars."""
    largest = max((abs(row["value"]) for row in rows), default=0.0) or 1.0
    body = "".join(
        f"<tr><td>{token(texts.text(row['token']))}</td><td class='ha-wide'>"
        f"<span class='ha-bar{' minus' if row['value'] < 0 else ''}' "
        f"style='width:{95 * abs(row['value']) / largest:.0f}%'></span></td>"
        f"<td>{row['value']:.3g}</td></tr>"
        for row in rows
    )
    head = f"<tr><th>{html.escape(title)}</th><td></td><th>logits</th></tr>"
    return f"<table class='ha-table'>{head}{body}</table>"


def token_table(rows: Sequence[dict[str, Any]], texts: Texts, title: str) -> str:
    """Tokens with the number of firings, precision, recall and the strongest activation."""
    body = "".join(
        f"<tr><td>{token(texts.text(row['token']))}</td><td>{row['n_active']:,}</td>"
        f"<td>{100 * row['precision']:.3g}%</td><td>{100 * row['recall']:.3g}%</td>"
        f"<td>{row['max_activation']:.3g}</td></tr>"
        for row in rows
    )
    heads = (
        f"<th>{html.escape(title)}</th><th title='firings with this token'>n</th>"
        "<th title='share of its firings that have this token'>precision</th>"
        "<th title='share of the occurrences of this token on which it fires'>recall</th>"
        "<th title='largest activation'>max</th>"
    )
    return f"<table class='ha-table'><tr>{heads}</tr>{body}</table>"


def source_table(rows: Sequence[dict[str, Any]], texts: Texts) -> str:
    """Source tokens with their share of the positive DFA as bars, and in how many top examples they are."""
    largest = max((row["share"] for row in rows), default=0.0) or 1.0
    body = "".join(
        f"<tr><td>{token(texts.text(row['token']))}</td><td class='ha-wide'>"
        f"<span class='ha-bar' style='width:{95 * row['share'] / largest:.0f}%'></span></td>"
        f"<td>{100 * row['share']:.3g}%</td><td>{row['n']}</td></tr>"
        for row in rows
    )
    heads = (
        "<th>source token</th><td></td><th title='share of the kept positive contributions'>share</th>"
        "<th title='top examples in which it is a kept source'>examples</th>"
    )
    return f"<table class='ha-table'><tr>{heads}</tr>{body}</table>"
