"""Notes out of the app and into it, as files."""

import streamlit as st

from app.state import Scope, plain
from atlas.db.exchange import FORMS, KINDS, decode, encode, notes_of
from atlas.db.loading import put_notes
from atlas.errors import AtlasError

_ENDINGS = {"csv": "csv", "jsonl": "jsonl", "parquet": "parquet", "spreadsheet": "csv"}
_MIME = {"parquet": "application/vnd.apache.parquet", "jsonl": "application/jsonl"}
LARGEST = 20_000_000


def files_box(scope: Scope, who: str) -> None:
    """Download notes in any form; put a file's notes in after saying what that would change."""
    with st.expander("Notes as files", key="files", on_change="rerun") as box:
        if not box.open:
            return
        left, right = st.columns(2)
        with left:
            _out(scope, who)
        with right:
            _in(scope, who)


def _out(scope: Scope, who: str) -> None:
    kind = st.segmented_control("About", list(KINDS), default="heads", required=True, key="files_kind")
    of = scope.model.model
    if kind == "features":
        of = st.selectbox("SAE", [ref.sae for ref in scope.saes], key="files_sae")
    form = st.segmented_control(
        "Form", [f for f in FORMS if kind == "heads" or f != "spreadsheet"], default="csv", required=True,
        key="files_form", help="spreadsheet: a row per head with groupings, role, notable, new",
    )  # fmt: skip
    everybody = st.toggle("Everybody's notes", value=True, key="files_all")
    notes = notes_of(scope.settings, kind, of, None if everybody else who)
    name = f"{of.replace('/', '-')}-{kind}{'-sheet' if form == 'spreadsheet' else ''}.{_ENDINGS[form]}"
    st.download_button(
        f"Download {len(notes)} notes", encode(notes, kind, form), name, _MIME.get(form, "text/csv"),
        key="files_out", disabled=not notes, icon=":material/download:", on_click="ignore",
    )  # fmt: skip


def _in(scope: Scope, who: str) -> None:
    upload = st.file_uploader("A file of notes", ["csv", "jsonl", "parquet"], key="files_upload")
    one, two = st.columns(2)
    kind = one.segmented_control("About", list(KINDS), default="heads", required=True, key="files_in_kind")
    sheet = two.toggle("It is a spreadsheet of heads", key="files_sheet")
    over = st.toggle("Replace notes that differ (the old ones stay in the history)", key="files_over")
    if upload is None or not st.button("Put in", key="files_in", icon=":material/upload:"):
        return
    form = "spreadsheet" if sheet else {v: k for k, v in _ENDINGS.items() if k != "spreadsheet"}[
        upload.name.rsplit(".", 1)[-1].lower()
    ]  # fmt: skip
    try:
        if upload.size > LARGEST:
            st.error(
                f"The file has {upload.size:,} bytes; allowed: {LARGEST:,}. Use atlas annotations import."
            )
            return
        notes = decode(upload.getvalue(), kind, form, model=scope.model.model, annotator=who)
        done = put_notes(scope.settings, notes, replace_existing=over)
    except AtlasError as error:
        st.error(plain(str(error)))
        return
    st.success(f"{done.new} new, {done.changed} changed, {done.same} there already")
