"""Results of studies: one folder of Parquet files per run, below ``$ATLAS_HOME/studies``.

A study of a name replaces the last one of that name: the new folder appears whole, and then the old one goes.
SQL sees the rows of all studies beside the release that it asks (``study_tables``).
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atlas.errors import StoreError
from atlas.settings import Settings
from atlas.store.atomic import WORK_PREFIX, atomic_dir, discard, disk_errors, work_path
from atlas.store.parquet import conform
from atlas.store.study_tables import STUDY_TABLES
from atlas.tables import Table

_TRIES = 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FOLDER = re.compile(r"(?P<name>.+)\+[0-9]{14}-[0-9a-f]{8}")


def studies_folder(settings: Settings) -> Path:
    """Where studies lie."""
    return settings.home / "studies"


def check_name(name: str) -> str:
    """The name itself; StoreError unless it is safe as a folder's name."""
    if not _NAME.fullmatch(name):
        raise StoreError(f"study name {name!r} is not allowed; use letters, digits, '.', '_' and '-'")
    return name


def write_study(
    settings: Settings,
    name: str,
    about: Mapping[str, str],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Path:
    """Write a study's rows; ``about`` holds the columns of ``studies`` but the name and the time.

    Raises StoreError for a table or column that is not declared, a key that occurs twice, or a full disk.
    """
    now = datetime.now(UTC)
    known = {"study": check_name(name), "created": now.isoformat(timespec="seconds"), **about}
    tables = {key: _table(key, name, some) for key, some in rows.items()} | {
        "studies": _table("studies", name, [known])
    }
    folder = studies_folder(settings)
    old = _folders(folder).get(name, [])
    final = folder / f"{name}+{now:%Y%m%d%H%M%S}-{secrets.token_hex(4)}"
    with atomic_dir(final) as work:
        for key, table in tables.items():
            pq.write_table(table, work / f"{key}.parquet", compression="zstd")
    for path in old:
        _take_away(path)
    return final


def _take_away(path: Path) -> None:
    """Remove a study's folder at once, as readers see it: it loses its name before it loses files."""
    gone = work_path(path)
    with disk_errors(path):
        path.rename(gone)
    discard(gone)


def _table(key: str, name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    if key not in STUDY_TABLES:
        raise StoreError(f"study table {key!r} is not known; allowed: {', '.join(STUDY_TABLES)}")
    declared = STUDY_TABLES[key]
    given = [{"study": name, **row} for row in rows]
    wrong = sorted({column for row in given for column in row} - set(declared.schema.names))
    if wrong:
        raise StoreError(f"study table {key!r} has no column {wrong[0]!r}")
    columns = {f.name: pa.array([row.get(f.name) for row in given], f.type) for f in declared.schema}
    table = conform(pa.table(columns), declared)
    keys = [tuple(row[column] for column in declared.key) for row in given]
    if len(set(keys)) < len(keys):
        raise StoreError(f"study table {key!r} holds a key twice; it must be unique in {declared.key}")
    return table.sort_by([(column, "ascending") for column in declared.key])


def _folders(folder: Path) -> dict[str, list[Path]]:
    """Folders of each study, the newest last."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*+*")) if folder.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match is not None and not path.name.startswith(WORK_PREFIX):
            found.setdefault(match["name"], []).append(path)
    return found


def study_names(settings: Settings) -> list[str]:
    """Names of the studies that there are."""
    return sorted(_folders(studies_folder(settings)))


def remove_study(settings: Settings, name: str) -> None:
    """Remove a study; StoreError if there is none of that name."""
    folders = _folders(studies_folder(settings))
    if name not in folders:
        raise StoreError(f"there is no study {name!r}; existing: {', '.join(sorted(folders)) or 'none yet'}")
    for path in folders[name]:
        _take_away(path)


def study_table(settings: Settings, key: str) -> pa.Table:
    """The rows of all studies in one table; empty where there are none.

    StoreError for a file that cannot be read, naming it.
    """
    declared = STUDY_TABLES[key]
    for _ in range(_TRIES):
        paths = [folders[-1] / f"{key}.parquet" for folders in _folders(studies_folder(settings)).values()]
        try:
            parts = [_read(path, declared) for path in paths]
        except FileNotFoundError:  # a newer study has just taken the place of one
            continue
        return pa.concat_tables([declared.schema.empty_table(), *parts])
    raise StoreError(f"studies in {studies_folder(settings)} change faster than they can be read")


def _read(path: Path, declared: Table) -> pa.Table:
    try:
        if not path.is_file() and path.parent.is_dir():
            return declared.schema.empty_table()
        return conform(pq.read_table(path), declared)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"study file {path} cannot be read: {str(error).splitlines()[0]}") from None


def study_tables(settings: Settings) -> dict[str, pa.Table]:
    """Every table of studies, for SQL beside a release."""
    return {key: study_table(settings, key) for key in STUDY_TABLES}


def chosen(settings: Mapping[str, Any]) -> str:
    """What a study was run with, as the text that ``studies.settings`` holds."""
    return json.dumps(settings, sort_keys=True)
