"""What a running training has logged, written out for whoever looks on (see ``atlas.store.live``)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atlas.sae.group import TABLES, Group


class LiveLog:
    """The rows of the training tables as JSON lines, for whoever looks on."""

    def __init__(self, path: Path | None, groups: Sequence[Group]) -> None:
        self.path, self.groups = path, groups
        self.written = [dict.fromkeys(TABLES, 0) for _ in groups]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf8")
            self.write()

    def write(self) -> None:
        """Append what came since the last time."""
        if self.path is None:
            return
        lines: list[dict[str, Any]] = []
        for group, written in zip(self.groups, self.written, strict=True):
            for table, rows in group.rows.items():
                lines += [{"table": table, **row} for row in rows[written[table] :]]
                written[table] = len(rows)
        with self.path.open("a", encoding="utf8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
