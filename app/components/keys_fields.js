// The fields of the annotation form: which are this head's own, how they get the focus and how they give it up.
//
// A text area tells the server when it is left, so it is left for a moment after a pause in typing, every few
// seconds where there is none, before a save by keyboard, and when the page goes away.

const PAUSE_MS = 800;
// A field of one line tells by itself, so long after the last key: "live" in head_form.py and feature_form.py.
const LIVE_MS = 700;
const TELL_MS = 3000;
const LONGEST_MS = 4000;
const GONE_MS = 1000;

const form = {
  mounted: false,
  kind: "head",
  place: null,
  prefix: "",
  does: [],
  answered: 0,
  seq: 0,
  held: null,
  timer: 0,
  unkept: 0,
  choosing: null,
  typing: null,
  arrowed: null,
  edit: null,
};

function isField(node) {
  const text = node instanceof HTMLInputElement && !["checkbox", "radio", "button"].includes(node.type);
  return text || node instanceof HTMLTextAreaElement || Boolean(node?.isContentEditable);
}

function deepActive() {
  let active = document.activeElement;
  while (active?.shadowRoot?.activeElement) active = active.shadowRoot.activeElement;
  return active;
}

function inForm(node) {
  const outer = node?.getRootNode?.().host || node;
  return Boolean(outer?.closest?.(".st-key-note-form"));
}

// A part of the form. While it is drawn again its old parts are marked stale; where there is only such a one, it is
// the part itself, and where there are two, the stale one belongs to the head before.
function fresh(selector) {
  const found = [...document.querySelectorAll(selector)];
  return found.find((node) => !node.closest("[data-stale=true]")) || found[0];
}

// The place of a field of this very head; the fields of another one have other names.
function own(name) {
  return `.st-key-${(form.prefix + name).trim().replaceAll(/[^a-zA-Z0-9_-]/g, "-")}`;
}

// While the page draws itself again it may move the form about, which takes the focus out of a field in the middle of
// a word. Nobody asked for that, so the focus goes back, before the next key.
const wanted = { until: 0 };

function leave(field) {
  wanted.until = Date.now() + 50;
  field.blur();
}

// Tells the server what stands in a field, without leaving it for more than a moment.
function keep(field) {
  const { selectionStart, selectionEnd, selectionDirection } = field;
  leave(field);
  field.focus({ preventScroll: true });
  field.setSelectionRange(selectionStart, selectionEnd, selectionDirection);
}

// The field that somebody writes in, and what was written since the server was told. A page that is drawn anew by a
// request from before the way here takes the field away; the form that comes goes on with it (keys_hold.js).
function begun(event) {
  const field = event.target;
  if (!form.mounted || !isField(field) || !inForm(field)) return;
  const box = boxOf(field);
  const text = form.edit?.place === form.place && form.edit.box === box ? form.edit.text : null;
  form.edit = { place: form.place, box, text, caret: null, comment: Boolean(field.closest(".st-key-note-talk")) };
}

// What a field is found by in a form that is drawn anew.
function boxOf(field) {
  const name = [...field.closest("[class*=st-key-]").classList].find((one) => one.startsWith("st-key-"));
  return `.${CSS.escape(name)}`;
}

function strayed(event) {
  const field = event.target;
  const { edit } = form;
  if (edit && field.matches?.(`${edit.box} *`)) edit.caret = [field.selectionStart, field.selectionEnd];
  // A field that is taken away is left, too, a moment before it goes.
  setTimeout(() => {
    if (form.edit !== edit || !edit) return;
    if (field.isConnected) form.edit = null;
    else edit.gone ||= Date.now();
  });
  // A list of choices says of itself that its field was left, while an entry is pointed at.
  if (!event.isTrusted) return;
  if (!form.mounted || !isField(field) || !inForm(field) || field.type === "checkbox") return;
  if (event.relatedTarget || Date.now() < wanted.until || !document.hasFocus()) {
    // Typed and not confirmed is meant all the same.
    if (form.typing === field) choose(field);
    return;
  }
  const { selectionStart, selectionEnd } = field;
  queueMicrotask(() => {
    if (!field.isConnected || document.activeElement !== document.body || !document.hasFocus()) return;
    field.focus({ preventScroll: true });
    if (selectionStart !== null) field.setSelectionRange?.(selectionStart, selectionEnd);
  });
}

function typed(event) {
  if (form.edit && event.target.matches(`${form.edit.box} *`)) Object.assign(form.edit, { text: event.target.value, at: Date.now() });
  const choice = event.target.role === "combobox";
  if (choice && event.target.closest(JUMP)) form.choosing = event.target;
  if (choice && inForm(event.target)) {
    form.choosing = form.typing = event.target;
    form.arrowed = null;
  }
  if (!(event.target instanceof HTMLTextAreaElement) || !inForm(event.target)) return;
  clearTimeout(form.timer);
  const field = event.target;
  form.unkept ||= Date.now();
  const wait = Math.max(0, Math.min(PAUSE_MS, form.unkept + LONGEST_MS - Date.now()));
  form.timer = setTimeout(() => {
    form.unkept = 0;
    if (document.activeElement === field) keep(field);
  }, wait);
}

function into(selector) {
  const field = fresh(`.st-key-note-form ${selector}`);
  field?.focus();
  field?.select?.();
  return field;
}

function press(selector) {
  fresh(`.st-key-note-form ${selector}`)?.click();
}

// Opens or closes a part that is folded away, and shows where it is.
function unfold(selector) {
  const summary = fresh(`.st-key-note-form ${selector}`);
  if (!summary) return;
  summary.click();
  summary.focus({ preventScroll: true });
  summary.style.scrollMarginTop = "4.5rem";
  const show = () => document.activeElement === summary && summary.scrollIntoView({ block: "start" });
  show();
  // Once more when what is inside has come.
  setTimeout(show, 700);
}
