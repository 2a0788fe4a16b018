"""What a report is made of: columns as they are shown, and tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Shown:
    """A column as it is shown: a field of the rows, its heading, a format of Python's, and what it means."""

    name: str
    title: str
    form: str = ""
    help: str = ""


@dataclass(frozen=True)
class Part:
    """One table of a report; ``foot`` is a last row, by field."""

    title: str
    columns: tuple[Shown, ...]
    rows: pa.Table
    foot: Mapping[str, Any] = field(default_factory=dict)
