"""How long work says how far it is, and hears that it should stop."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Something that wants to know how far a step is: a terminal bar, a row in the database, or nothing."""

    def update(self, done: int, total: int, message: str = "") -> None:
        """Note that ``done`` of ``total`` units are finished; may raise ``Cancelled`` to stop the step."""
        ...


class NullProgress:
    """Progress that nobody watches."""

    def update(self, done: int, total: int, message: str = "") -> None:
        """Take no note."""
