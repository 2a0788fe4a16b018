"""The last lines that each step logged, in the database, so that they are read where the worker is not.

A handler collects what the process logs while it works on a step and writes it now and then. Only the last
``KEEP_LINES`` lines of a step are kept, so a run's log does not grow with its length.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from atlas.db.engine import UnreachableError
from atlas.db.log_models import LEVELS, StepLine
from atlas.db.session import reading, writing
from atlas.errors import DatabaseError
from atlas.logs import current_scope, formatter, redact
from atlas.settings import Settings

KEEP_LINES = 400
LINE_LENGTH = 8000
_WAITING = 1000


@dataclass(frozen=True)
class LogLine:
    """One line of a step's log."""

    id: int
    step: str
    at: datetime
    level: str
    worker: str
    line: str


@dataclass(frozen=True)
class NewLine:
    """A line that is not in the database yet."""

    at: datetime
    level: str
    worker: str
    line: str


def append_lines(settings: Settings, run_id: str, step: str, lines: Sequence[NewLine]) -> None:
    """Add lines to a step's log and drop all but its last ``KEEP_LINES``; a run that is gone is no error."""
    if not lines:
        return
    kept = lines[-KEEP_LINES:]
    mine = (StepLine.run_id == run_id) & (StepLine.step == step)
    try:
        with writing(settings) as session:
            session.add_all(StepLine(run_id=run_id, step=step, **vars(new)) for new in kept)
            session.flush()
            newest = select(StepLine.id).where(mine).order_by(StepLine.id.desc())
            last_out = session.scalar(newest.offset(KEEP_LINES).limit(1))
            if last_out is not None:
                session.execute(delete(StepLine).where(mine, StepLine.id <= last_out))
    except IntegrityError:
        return


def read_lines(
    settings: Settings, run_id: str, *, step: str | None = None, after: int = 0, last: int | None = None
) -> list[LogLine]:
    """Lines of a run in the order in which they came: of one step, after an id, or the ``last`` ones."""
    where = [StepLine.run_id == run_id, StepLine.id > after]
    if step is not None:
        where.append(StepLine.step == step)
    query = select(StepLine).where(*where).order_by(StepLine.id.desc())
    with reading(settings) as session:
        rows = session.scalars(query.limit(last)).all()
        return [LogLine(r.id, r.step, r.at, r.level, r.worker, r.line) for r in reversed(rows)]


class StepLog(logging.Handler):
    """Collects what this process logs and keeps it with a step; ``flush_lines`` writes it."""

    def __init__(self, settings: Settings, run_id: str, step: str) -> None:
        super().__init__(logging.INFO)
        self._settings, self._run_id, self._step = settings, run_id, step
        self._lines: deque[NewLine] = deque(maxlen=_WAITING)
        self._guard = threading.Lock()
        self._text = formatter("text")
        self.urgent = False

    def __enter__(self) -> "StepLog":
        """Begin to listen, also to our own loggers' INFO where nobody has chosen a level."""
        ours = logging.getLogger("atlas")
        if ours.level == logging.NOTSET:
            ours.setLevel(logging.INFO)
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening and write what is left; a database that is away must not hide another error."""
        logging.getLogger().removeHandler(self)
        try:
            self.flush_lines()
        except DatabaseError:
            logging.getLogger(__name__).warning("the last lines of step %s could not be kept", self._step)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record: of ours from INFO on, of other libraries from WARNING on."""
        if record.levelno < logging.WARNING and not record.name.startswith("atlas"):
            return
        try:
            said = redact(record.getMessage())
            if record.exc_info and record.exc_info[1] is not None:
                said += "\n" + redact(self._text.formatException(record.exc_info))
            level = record.levelname if record.levelname in LEVELS else "INFO"
            at = datetime.fromtimestamp(record.created, UTC)
            line = NewLine(at, level, current_scope().worker, shortened(said).replace("\0", ""))
        except Exception:  # noqa: BLE001 (logging never ends the work)
            self.handleError(record)
            return
        with self._guard:
            self._lines.append(line)
            self.urgent = self.urgent or record.levelno >= logging.WARNING

    def flush_lines(self) -> None:
        """Write the waiting lines; while the database is away they wait on, the oldest dropped first."""
        with self._guard:
            lines, self.urgent = list(self._lines), False
            self._lines.clear()
        try:
            append_lines(self._settings, self._run_id, self._step, lines)
        except UnreachableError:
            with self._guard:
                self._lines = deque([*lines, *self._lines], maxlen=_WAITING)
            raise


def shortened(text: str) -> str:
    """The text, or its beginning and its end where it is longer than a line may be.

    >>> len(shortened("x" * 20_000)) <= LINE_LENGTH
    True
    """
    if len(text) <= LINE_LENGTH:
        return text
    return f"{text[:1000]}\n...\n{text[-(LINE_LENGTH - 1010) :]}"
