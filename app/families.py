"""Families of features as chips: the rule that a feature meets is what one reads when pointing at it."""

import html
from collections.abc import Sequence

from app.state import Scope
from atlas.store.queries import evidence


def rules(scope: Scope) -> dict[str, str]:
    """The release's families in their order, each with its meaning and rule; empty where it has none."""
    rows = scope.ask(evidence.rules).to_pylist()
    return {row["family"]: f"{row['meaning']}\nrule: {row['rule']}" for row in rows}


def spoken(family: str) -> str:
    """The name of a family as it is read.

    >>> spoken("single_token")
    'single token'
    """
    return family.replace("_", " ")


def chips(families: Sequence[str], told: dict[str, str]) -> str:
    """Families as HTML, everything escaped; says that there is none rather than showing nothing.

    >>> chips(["dead"], {"dead": "never fires <ever>"})
    '<div class="ha-chips"><span title="never fires &lt;ever&gt;">dead</span></div>'
    """
    if not told:
        return ""
    if not families:
        return '<div class="ha-chips"><i>in no family</i></div>'
    made = (f'<span title="{html.escape(told.get(one, ""), quote=True)}">{html.escape(spoken(one))}</span>'
            for one in families)  # fmt: skip
    return f'<div class="ha-chips">{"".join(made)}</div>'
