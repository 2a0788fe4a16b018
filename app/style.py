"""The design language: quiet type, close spacing, tabular figures; colours follow the theme."""

import html
import re
from pathlib import Path

import streamlit as st

_RUN = re.compile("·{4,}")
_CSS = Path(__file__).with_name("style.css")


def inject() -> None:
    """Put the style into the page; once per run."""
    st.html(f"<style>{_style()}</style>")


@st.cache_resource(show_spinner=False)
def _style() -> str:
    return _CSS.read_text("utf-8")


def facts(items: list[tuple[str, str]]) -> None:
    """A row of small named values; everything is escaped."""
    cells = "".join(f"<div><span>{html.escape(k)}</span><b>{html.escape(v)}</b></div>" for k, v in items)
    st.html(f'<div class="ha-facts">{cells}</div>')


def title(text: str, beside: str = "") -> None:
    """The heading of a view, with a quiet line beside it."""
    st.html(
        f'<div class="ha-title"><h1>{html.escape(text)}</h1>'
        f'<span class="ha ha-muted">{html.escape(beside)}</span></div>'
    )


def section(text: str, beside: str = "") -> None:
    """The heading of a part of a view, with a quiet line beside it."""
    st.html(f'<div class="ha-section" role="heading" aria-level="2">{html.escape(text)}'
            f"<span>{html.escape(beside)}</span></div>")  # fmt: skip


def number(value: object, digits: int = 3) -> str:
    """A number as people read it: thousands apart, few digits, a dash for nothing.

    >>> number(12345678), number(0.123456), number(None), number(0.00001234), number(True)
    ('12,345,678', '0.123', '–', '1.23e-05', 'yes')
    """
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return str(value)


def token(text: str) -> str:
    """A token as HTML, escaped, in the form of a chip; a long run of spaces is counted.

    >>> token("<b>·····")
    '<span class="ha-tok" title="&lt;b&gt;·····">&lt;b&gt;·<sub>5</sub></span>'
    """
    shown = _RUN.sub(lambda run: f"·<sub>{len(run[0])}</sub>", html.escape(text))
    return f'<span class="ha-tok" title="{html.escape(text, quote=True)}">{shown}</span>'
