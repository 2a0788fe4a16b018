"""Notes in the making: widgets filled from the database, every change saved back, conflicts kept.

The keys of one note's widgets share a prefix. Its version is the one that the widgets were filled from;
every save goes on top of it, so that nobody's text is overwritten unseen.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import streamlit as st

from app import ways
from app.state import plain
from app.whole import whole
from atlas.db import annotations, changes
from atlas.db.annotations import Saved, StaleAnnotationError
from atlas.db.changes import as_it_was
from atlas.db.notes import FeatureAnnotation, HeadAnnotation
from atlas.errors import AtlasError
from atlas.judging import FeatureVerdict
from atlas.settings import Settings

N = TypeVar("N", HeadAnnotation, FeatureAnnotation)
LONGEST_PAUSE = 300.0
"""Seconds without a save after which the clock of the time spent stops counting."""
HEAD_FIELDS = (
    "label",
    "role",
    "semanticity",
    "groupings",
    "confidence",
    "star",
    "novel",
    "notes",
    "verdicts",
)
BESIDE = ("stored", "opened", "shown", "conflict", "error", "fills", "echo", "arrival")
"""What is remembered of a note beside its fields, whose widgets Streamlit forgets by itself."""
REMEMBERED = 3
"""Notes left that are remembered, for a browser may go back at once to where it was."""
_LEFT = "notes left"
FEATURE_FIELDS = ("label", "tags", "interpretability", "notes")


@dataclass(frozen=True)
class Draft(Generic[N]):
    """One note as it stands in this session's widgets."""

    blank: N
    names: tuple[str, ...]
    choices: tuple[str, ...]
    """Text fields that are chosen from a list, where nothing chosen is None and not an empty text."""
    load: Callable[[], N | None]
    store: Callable[[N, int], N]
    history: Callable[[], Sequence[Saved]]

    @property
    def prefix(self) -> str:
        """What the keys of this note's widgets begin with."""
        return f"{self.blank.subject}|"

    def key(self, name: str) -> str:
        """The key of a field's widget, or of what is remembered beside it."""
        return self.prefix + name

    def get(self, name: str) -> Any:
        """What is remembered or typed under a name; None if nothing is."""
        return st.session_state.get(self.key(name))

    def put(self, name: str, value: object) -> None:
        """Remember a value, or fill a widget before it is drawn."""
        st.session_state[self.key(name)] = value

    @whole
    def open(self) -> None:
        """Fill the widgets from the database, unless they are on the page already.

        A request from before a way to another view brings values of widgets that the browser has forgotten
        since: it would show the fields empty, and what is empty would be stored with the next change.
        """
        there = all(self.key(name) in st.session_state for name in (self.names[0], "stored"))
        settled = self.get("conflict") is None and self.get("error") is None
        if not there or (settled and self.get("arrival") != ways.arrivals()):
            self.fill(self.load() or self.blank)
            self.put("arrival", ways.arrivals())
            self.put("opened", time.monotonic())
            self._forget_older()

    def _forget_older(self) -> None:
        """Forget what is remembered of notes left long ago: every field on a page looks through all of it."""
        left: list[str] = [one for one in st.session_state.get(_LEFT, []) if one != self.prefix]
        for prefix in left[:-REMEMBERED]:
            for name in BESIDE:
                st.session_state.pop(prefix + name, None)
        st.session_state[_LEFT] = [*left[-REMEMBERED:], self.prefix]

    def fill(self, note: N) -> None:
        """Take over a stored note: its fields, version and status."""
        self._take(note)
        self.put("shown", None)
        self.put("stored", note)
        self.put("conflict", None)
        self.put("error", None)

    @property
    def stored(self) -> N:
        """What the database held when these widgets were filled or last saved."""
        return self.get("stored") or self.blank

    def typed(self) -> N:
        """The note as the widgets have it now, on top of the stored one."""
        values: dict[str, Any] = {}
        for name in self.names:
            value = self.get(name)
            blank = getattr(self.blank, name)
            if isinstance(blank, tuple):
                value = tuple(value or ())
            values[name] = blank if value is None else value
        return replace(self.stored, **values)

    def is_blank(self) -> bool:
        """Whether nothing at all is written or chosen."""
        typed = self.typed()
        return all(getattr(typed, name) == getattr(self.blank, name) for name in self.names)

    @whole
    def save(self, changes: Mapping[str, Any] | None = None, *, over: int | None = None) -> bool:
        """Store what is typed; True if it was stored or nothing had changed.

        ``over`` is the version to write on top of when somebody else's text is to be replaced on purpose.
        """
        note = replace(self.typed(), **(changes or {}))
        if note == self.stored and over is None:
            return True
        note = replace(note, **self._time(note))
        try:
            saved = self.store(note, self.stored.version if over is None else over)
        except StaleAnnotationError as error:
            self.put("conflict", error)
            return False
        except AtlasError as error:
            self.put("error", str(error))
            return False
        self.put("stored", saved)
        self.put("conflict", None)
        self.put("error", None)
        self.put("shown", None)
        return True

    def _time(self, note: N) -> dict[str, Any]:
        """The time spent so far, for notes that keep it; a long pause counts as a short one."""
        before = getattr(note, "seconds_spent", None)
        if before is None:
            return {}
        now = time.monotonic()
        spent = min(LONGEST_PAUSE, now - (self.get("opened") or now))
        self.put("opened", now)
        return {"seconds_spent": before + spent}

    @property
    def shown_version(self) -> int:
        """The version whose text the widgets show: the newest, unless undo went back from it."""
        return self.get("shown") or self.stored.version

    @whole
    def restore(self, version: int) -> None:
        """Take over the text of an earlier save; it is saved as a new version, so that nothing goes away."""
        self.save()
        save = next((one for one in self.history() if one.version == version), None)
        if save is None or self.get("conflict") is not None:
            return
        self._take(as_it_was(self.stored, save))
        status = save.payload.get("status")
        if self.save({"status": status} if status else None):
            self.put("shown", version)

    @whole
    def undo(self) -> None:
        """Go back to the save before the one that is shown."""
        self.save()
        self.restore(self.shown_version - 1)

    @whole
    def redo(self) -> None:
        """Go forward again after an undo."""
        if self.get("shown"):
            self.restore(self.shown_version + 1)

    def _take(self, note: N) -> None:
        """Fill the widgets with a note's fields."""
        for name in self.names:
            value = getattr(note, name)
            if name in self.choices:
                value = value or None
            self.put(name, list(value) if isinstance(value, tuple) else value)
        self.put("fills", (self.get("fills") or 0) + 1)

    @whole
    def autosave(self) -> None:
        """Save after a change of any widget."""
        self.save()

    @whole
    def keep_mine(self) -> None:
        """Resolve a conflict by writing what is typed over what somebody else stored."""
        conflict = self.get("conflict")
        if conflict is not None:
            self.save(over=0 if conflict.theirs is None else conflict.theirs.version)

    @whole
    def take_theirs(self) -> None:
        """Resolve a conflict by taking what is stored in place of what is typed."""
        self.fill(self.load() or self.blank)


def head_draft(settings: Settings, model: str, layer: int, head: int, who: str) -> Draft[HeadAnnotation]:
    """The note of one annotator about one head."""
    return Draft(
        HeadAnnotation(model, layer, head, who),
        HEAD_FIELDS,
        ("role",),
        lambda: annotations.load_head(settings, model, layer, head, who),
        lambda note, version: annotations.save_head(settings, note, version),
        lambda: annotations.head_history(settings, model, layer, head, who),
    )


def feature_draft(settings: Settings, sae: str, feature: int, who: str) -> Draft[FeatureAnnotation]:
    """The note of one annotator about one feature."""
    return Draft(
        FeatureAnnotation(sae, feature, who),
        FEATURE_FIELDS,
        (),
        lambda: annotations.load_feature(settings, sae, feature, who),
        lambda note, version: annotations.save_feature(settings, note, version),
        lambda: annotations.feature_history(settings, sae, feature, who),
    )


def show_state(draft: Draft[Any]) -> None:
    """Say whether everything is saved; show both texts when somebody else saved in between.

    It has a place of its own: what stands below is not drawn anew when a warning comes or goes.
    """
    with st.container(key="note-state"):
        _show_state(draft)


def _show_state(draft: Draft[Any]) -> None:
    conflict, error = draft.get("conflict"), draft.get("error")
    if error:
        st.error(plain(error), icon=":material/error:")
    if conflict is None:
        return
    st.warning("This note was changed elsewhere since you opened it. Nothing of it or of yours is lost yet.")
    for name in draft.names:
        mine, theirs = getattr(conflict.yours, name), getattr(conflict.theirs, name, None)
        if mine != theirs:
            left, right = st.columns(2)
            left.text(f"{name}, yours\n{told(mine)}")
            right.text(f"{name}, stored\n{told(theirs)}")
    one, two = st.columns(2)
    one.button("Keep mine", on_click=draft.keep_mine, key=draft.key("mine"), width="stretch")
    two.button("Take the stored", on_click=draft.take_theirs, key=draft.key("theirs"), width="stretch")


def told(value: object) -> str:
    """A field's value for the eye; a dash for nothing."""
    if isinstance(value, tuple | list):
        value = [asdict(one) if isinstance(one, FeatureVerdict) else one for one in value]
    return changes.told(value) or "–"
