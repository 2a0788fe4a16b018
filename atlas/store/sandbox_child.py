"""The process in which one user's query runs: started, given one request, and gone.

It is run as a script by ``atlas.store.sandbox`` and imports nothing of Atlas. Memory that DuckDB's own
bound does not see (``repeat('x', 3000000000)``) meets the limit of the process; a write to any file meets a
file-size limit of zero; and the parent can always end it.

Request on stdin: a line of JSON, then Arrow IPC streams of the annotation tables, each after its length.
Answer on stdout: a line of JSON, then one Arrow IPC stream if the query succeeded.
"""

import contextlib
import json
import os
import re
import resource
import sys
import threading
import time
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa

_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(ANALYZE\s+)?", re.IGNORECASE)
_BATCH = 2048
_ALLOWED = "allowed: SELECT, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN"


class Refused(Exception):  # noqa: N818 - reads as what happened
    """The request is answered with this text instead of rows."""


def _limit_process(data_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # unknown to this system, or it has a lower one already
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))


def _connect(request: dict[str, Any], tables: dict[str, pa.Table]) -> duckdb.DuckDBPyConnection:
    con = duckdb.connect(
        ":memory:",
        config={
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "python_enable_replacements": "false",
            "memory_limit": request["memory"],
            "threads": request["threads"],
            "temp_directory": "",
        },
    )
    path = request["path"].replace("'", "''")
    con.execute(f"ATTACH '{path}' AS atlas (READ_ONLY)")
    con.execute("USE atlas")
    for name, table in tables.items():
        con.register(name, table)
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")
    return con


def _one_statement(con: duckdb.DuckDBPyConnection, sql: str) -> Any:
    statements = con.extract_statements(sql)
    if len(statements) != 1:
        raise Refused(f"the query has {len(statements)} statements; allowed: exactly one")
    return statements[0]


def _until_semicolon(sql: str) -> str:
    """One statement's text without the semicolon that ends it and what comes after.

    >>> _until_semicolon("SELECT ';' AS x ; -- done;")
    "SELECT ';' AS x "
    """
    raw = sql.lstrip("; \t\r\n").encode()
    for position, kind in duckdb.tokenize(raw.decode()):
        if kind == duckdb.token_type.operator and raw[position : position + 1] == b";":
            return raw[:position].decode()
    return raw.decode()


def _check_select(con: duckdb.DuckDBPyConnection, sql: str) -> tuple[str, bool]:
    """The statement's own text, and whether it is an EXPLAIN; Refused for anything that is not a query."""
    statement = _one_statement(con, sql)
    kind, text = statement.type.name, statement.query
    explain = kind == "EXPLAIN"
    if explain:
        statement = _one_statement(con, _EXPLAIN.sub("", text, count=1))
        kind = statement.type.name
    if kind == "MULTI":
        raise Refused("PIVOT without its values is not allowed; write them out: ON column IN (...)")
    if kind != "SELECT":
        raise Refused(f"{kind.replace('_', ' ')} statements are refused; {_ALLOWED}")
    if statement.named_parameters:
        raise Refused("the query has parameters ($1 or ?) and nothing gives them a value")
    return _until_semicolon(text), explain


def _relation(con: duckdb.DuckDBPyConnection, sql: str) -> Any:
    """The checked query, bound but not run; an EXPLAIN is run and its plan is returned as a table."""
    text, explain = _check_select(con, sql)
    if explain:
        plan = con.execute(text).fetchall()
        return pa.table({"plan": pa.array([row[1] for row in plan], pa.string())})
    try:
        relation = con.sql(text)
    except duckdb.Error:
        con.execute(text)  # fails in the same way, and its message marks the place
        raise
    if relation is None:
        raise Refused(f"the statement returns no rows; {_ALLOWED}")
    return relation


def _run(relation: Any, rows: int, most_bytes: int) -> tuple[pa.Table, bool]:
    if isinstance(relation, pa.Table):
        return _collect(relation.to_reader(), rows, most_bytes)
    return _collect(relation.limit(rows + 1).to_arrow_reader(_BATCH), rows, most_bytes)


def _collect(reader: Any, rows: int, most_bytes: int) -> tuple[pa.Table, bool]:
    """Up to ``rows`` rows and ``most_bytes`` bytes, and whether there was more."""
    kept: list[pa.RecordBatch] = []
    room_rows, room_bytes, more = rows, most_bytes, False
    for batch in reader:
        fits = min(room_rows, batch.num_rows)
        if batch.nbytes > room_bytes:
            fits = min(fits, batch.num_rows * room_bytes // batch.nbytes)
        kept.append(batch.slice(0, fits))
        room_rows -= fits
        room_bytes -= kept[-1].nbytes
        if fits < batch.num_rows:
            more = True
            break
    if more and not sum(len(b) for b in kept):
        raise Refused(f"one row is larger than the bound of {most_bytes // 1_000_000} MB")
    return pa.Table.from_batches(kept, schema=reader.schema), more


def _own_lines(text: str) -> str:
    """LINE numbers of the user's text: DuckDB's wrapper of a limited query puts two lines before it.

    >>> _own_lines("Conversion Error: no\\nLINE 3: SELECT")
    'Conversion Error: no\\nLINE 1: SELECT'
    """
    return re.sub(r"(?m)^LINE (\d+):", lambda m: f"LINE {max(1, int(m[1]) - 2)}:", text)


def _explained(error: Exception, request: dict[str, Any], interrupted: bool) -> str:
    """The answer to an error: the bound it met, or DuckDB's message with its mark of the place."""
    if interrupted:
        return f"the query was stopped after its bound of {request['seconds']:g} seconds"
    text = str(error)
    memory = ("out of memory", "bad_alloc", "bad allocation")
    if isinstance(error, MemoryError) or any(words in text.lower() for words in memory):
        return f"the query needs more memory than its bound of {request['memory']}"
    lines = [line.rstrip() for line in text.split("Possible solutions")[0].splitlines() if line.strip()]
    return "\n".join(lines[:8])


def answer(request: dict[str, Any], tables: dict[str, pa.Table]) -> tuple[dict[str, Any], pa.Table | None]:
    """Run the request; the head of the answer and the rows."""
    try:
        con = _connect(request, tables)
    except duckdb.Error as error:
        return {"error": f"cannot open the release: {str(error).splitlines()[0]}"}, None
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        con.interrupt()

    timer = threading.Timer(request["seconds"], stop)
    timer.daemon = True
    timer.start()
    begun, running = time.perf_counter(), False
    try:
        relation = _relation(con, request["sql"])
        running = True
        table, more = _run(relation, request["rows"], request["bytes"])
    except Refused as refused:
        return {"error": str(refused)}, None
    except (duckdb.Error, MemoryError, pa.ArrowException, OSError, RuntimeError) as error:
        text = _explained(error, request, stopped.is_set())
        return {"error": _own_lines(text) if running else text}, None
    finally:
        timer.cancel()
    return {"truncated": more, "seconds": time.perf_counter() - begun}, table


def _read_tables(stream: BinaryIO, names: list[str]) -> dict[str, pa.Table]:
    tables = {}
    for name in names:
        size = int.from_bytes(stream.read(8), "big")
        with pa.ipc.open_stream(pa.py_buffer(stream.read(size))) as reader:
            tables[name] = reader.read_all()
    return tables


def main() -> None:
    """Serve one request; end quietly if the parent goes away instead of asking."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    line = sys.stdin.buffer.readline()
    if not line:
        return
    request = json.loads(line)
    tables = _read_tables(sys.stdin.buffer, request["tables"])
    _limit_process(request["data_bytes"])
    head, table = answer(request, tables)
    out.write(json.dumps(head).encode() + b"\n")
    if table is not None:
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    out.close()
    os._exit(0)  # no wait for query threads that an interrupt has not reached yet


if __name__ == "__main__":
    main()
