// E goes to the label and Esc leaves a field, so that a head is annotated by keyboard alone.
//
// Keeps what is being typed: a text area tells the server when it is left, so this leaves it for a moment
// after a pause in typing, before a save by keyboard, and when the page goes away.

const PAUSE_MS = 800;

function keep(field) {
  if (!(field instanceof HTMLTextAreaElement)) {
    if (isField(field) && field.closest(".st-key-note-grid")) field.blur();
    return;
  }
  const { selectionStart, selectionEnd, selectionDirection } = field;
  field.blur();
  field.focus({ preventScroll: true });
  field.setSelectionRange(selectionStart, selectionEnd, selectionDirection);
}

function isField(node) {
  return node instanceof HTMLInputElement || node instanceof HTMLTextAreaElement || node?.isContentEditable;
}

function move(event) {
  const active = document.activeElement;
  if (event.key === "Escape" && isField(active) && active.closest(".st-key-note-grid")) {
    active.blur();
  } else if (event.key.toLowerCase() === "e" && !isField(active) && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const label = document.querySelector(".st-key-note-grid input");
    if (!label) return;
    event.preventDefault();
    label.focus();
    label.select();
  }
}

export default function () {
  let timer = 0;
  const typed = (event) => {
    if (!(event.target instanceof HTMLTextAreaElement) || !event.target.closest(".st-key-note-grid")) return;
    clearTimeout(timer);
    const field = event.target;
    timer = setTimeout(() => document.activeElement === field && keep(field), PAUSE_MS);
  };
  const pressed = (event) => {
    move(event);
    const saves = event.key === "s" || event.key === "S" || event.key === "Enter";
    if (saves && (event.ctrlKey || event.metaKey)) keep(document.activeElement);
  };
  const leaving = () => document.activeElement?.blur();
  document.addEventListener("input", typed, true);
  document.addEventListener("keydown", pressed, true);
  window.addEventListener("pagehide", leaving);
  document.documentElement.dataset.keys = "ready";
  return () => {
    clearTimeout(timer);
    delete document.documentElement.dataset.keys;
    document.removeEventListener("input", typed, true);
    document.removeEventListener("keydown", pressed, true);
    window.removeEventListener("pagehide", leaving);
  };
}
