// The keyboard of the annotation form: letters act while no field is edited, and nothing typed is lost.
//
// Moving to another head takes a moment in which the old form still stands on the page. What is typed in that
// moment would land in the note of the head just left, so keys are held back from the press that moves until
// the form of the new head is there, and are then played again in order.
//
// A text area tells the server when it is left, so it is left for a moment after a pause in typing, before a
// save by keyboard, and when the page goes away.

const PAUSE_MS = 800;
const QUIET_MS = 800;
const NO_ANSWER_MS = 3000;
const SETTLE_MS = 80;
const LONGEST_SETTLE_MS = 2000;
const LONGEST_HOLD_MS = 8000;
const MOVES = ["n", "p", "u"];
const TO_FIELDS = { head: ["e", "w", "r", "g"], feature: ["e", "w", "t", "c"] };
const MOVING = ".st-key-note_next, .st-key-before, .st-key-after, .st-key-unseen";

function isField(node) {
  const text = node instanceof HTMLInputElement && !["checkbox", "radio", "button"].includes(node.type);
  return text || node instanceof HTMLTextAreaElement || Boolean(node?.isContentEditable);
}

function deepActive() {
  let active = document.activeElement;
  while (active?.shadowRoot?.activeElement) active = active.shadowRoot.activeElement;
  return active;
}

// A part of the form. While it is drawn again its old parts are marked stale; where there is only such a one, it is
// the part itself, and where there are two, the stale one belongs to the head before.
function fresh(selector) {
  const found = [...document.querySelectorAll(selector)];
  return found.find((node) => !node.closest("[data-stale=true]")) || found[0];
}

function keep(field) {
  if (!(field instanceof HTMLTextAreaElement)) {
    if (isField(field) && field.closest(".st-key-note-form")) leave(field);
    return;
  }
  const { selectionStart, selectionEnd, selectionDirection } = field;
  leave(field);
  field.focus({ preventScroll: true });
  field.setSelectionRange(selectionStart, selectionEnd, selectionDirection);
}

// While the page draws itself again it may move the form about, which takes the focus out of a field in the middle of
// a word. Nobody asked for that, so the focus goes back, before the next key.
const wanted = { until: 0 };

function leave(field) {
  wanted.until = Date.now() + 50;
  field.blur();
}

function strayed(event) {
  const field = event.target;
  if (!form.mounted || Date.now() < wanted.until || !isField(field) || !field.closest?.(".st-key-note-form")) return;
  if (event.relatedTarget || field.type === "checkbox") return;
  const { selectionStart, selectionEnd } = field;
  queueMicrotask(() => {
    if (!field.isConnected || document.activeElement !== document.body || !document.hasFocus()) return;
    field.focus({ preventScroll: true });
    if (selectionStart !== null) field.setSelectionRange?.(selectionStart, selectionEnd);
  });
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

// What a letter does while no field is edited; false if it does nothing here.
function letter(event) {
  if (form.kind === "feature") return featureLetter(event);
  const key = event.key.toLowerCase();
  if (event.shiftKey && /^Digit[1-5]$/.test(event.code)) {
    const buttons = fresh(".st-key-note_confidence")?.querySelectorAll("[role=radio]") || [];
    buttons[Number(event.code.at(-1)) - 1]?.click();
  } else if (key === "e") into(".st-key-note-grid input[aria-label=Label]");
  else if (key === "w") into("textarea[aria-label=Notes]");
  else if (key === "r") into(".st-key-note_role input");
  else if (key === "m") into(".st-key-note_semanticity [role=radio]");
  else if (key === "s") press(".st-key-note_star input");
  else if (key === "v") press(".st-key-note_novel input");
  else if (key === "z") press(event.shiftKey ? ".st-key-note_redo button" : ".st-key-note_undo button");
  else if (event.key === "?") help();
  else return false;
  return true;
}

const KEYS = [
  ["e / w / r", "write the label / notes / role"],
  ["j, k", "next, previous feature of the list"],
  ["1 to 9", "the feature belongs to that group"],
  ["g", "name a new group and put the feature in it"],
  ["o", "odd one out"],
  ["c", "cannot say"],
  ["x", "take the verdict back"],
  ["m, then Tab and Space", "class of semanticity (follows from the verdicts by itself)"],
  ["Shift+1 to Shift+5", "confidence"],
  ["s, v", "star, novel"],
  ["z, Shift+z", "undo, redo"],
  ["Esc", "leave a field"],
  ["Ctrl+s", "save as done"],
  ["Ctrl+Enter", "save as done, go to the next open head"],
  ["n, p", "next, previous head"],
  ["u", "next head that is not done"],
  ["?", "this help"],
];

function help() {
  document.querySelector("dialog.ha-help")?.remove();
  const dialog = document.createElement("dialog");
  dialog.className = "ha-help";
  dialog.setAttribute("aria-label", "Keys");
  const title = document.createElement("h2");
  title.textContent = "Keys";
  const list = document.createElement("dl");
  for (const [keys, does] of form.kind === "feature" ? FEATURE_KEYS : KEYS) {
    const name = document.createElement("dt");
    for (const [i, part] of keys.split(/(, then | to | \/ |, )/).entries()) {
      const node = document.createElement(i % 2 ? "span" : "kbd");
      node.textContent = part;
      name.append(node);
    }
    const text = document.createElement("dd");
    text.textContent = does;
    list.append(name, text);
  }
  const close = document.createElement("button");
  close.textContent = "Close (Esc)";
  close.addEventListener("click", () => dialog.close());
  dialog.append(title, list, close);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
}

const form = { mounted: false, kind: "head", place: null, held: null, timer: 0 };

function running() {
  return document.querySelector(".stApp")?.dataset.testScriptState === "running";
}

function hold() {
  if (form.held) return;
  form.held = { from: form.place, since: Date.now(), quiet: Date.now(), keys: [] };
  form.held.poll = setInterval(() => {
    if (running()) {
      form.held.quiet = Date.now();
      form.held.answered = true;
    }
    // The new form may be filled once more until the page is at rest, and would then forget what was typed.
    const arrived = form.held.arrived && Date.now() - form.held.arrived;
    if (arrived && ((arrived > SETTLE_MS && !running()) || arrived > LONGEST_SETTLE_MS)) return release();
    // The same head again: it could not be saved. Another head: the form itself says when it is there.
    const quiet = Date.now() - form.held.quiet > (form.held.answered ? QUIET_MS : NO_ANSWER_MS);
    if (quiet || Date.now() - form.held.since > LONGEST_HOLD_MS) release();
    return undefined;
  }, 40);
}

function release() {
  const held = form.held;
  if (!held || held.ending) return;
  clearInterval(held.poll);
  held.ending = true;
  // What is pressed while the others are played again still queues up behind them.
  play(held);
}

const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

// Plays keys that were held back, in order. A key that moves on holds the rest back again.
async function play(held) {
  await painted();
  while (held.keys.length) {
    const key = held.keys.shift();
    const active = deepActive();
    if (isField(active) && isText(key)) {
      let text = key.key;
      while (held.keys.length && isText(held.keys[0])) text += held.keys.shift().key;
      await write(active, text);
      continue;
    }
    await painted();
    const goes = command(key, deepActive());
    if (goes) {
      form.held = null;
      hold();
      form.held.keys = held.keys;
      return;
    }
    await painted();
    if (TO_FIELDS[form.kind].includes(key.key) && !isField(active)) await focused();
  }
  form.held = null;
}

const isText = (key) => key.key.length === 1 && !key.ctrlKey && !key.metaKey;

// Writes into a field that has just come; a field that is drawn anew meanwhile loses it, so it is looked at again.
async function write(field, text) {
  for (let i = 0; i < 4; i++) {
    document.execCommand("insertText", false, text);
    await painted();
    await new Promise((done) => setTimeout(done, 30));
    const now = deepActive();
    if ((now?.value ?? now?.textContent ?? "").includes(text)) return;
    if (!isField(now)) field.focus();
  }
}

// Until a field has the focus, for a key that goes to one; given up after a moment.
async function focused() {
  for (let i = 0; i < 20 && !isField(deepActive()); i++) await new Promise((done) => setTimeout(done, 25));
}

// Presses a button; false where there is none that can be pressed, as at the last feature.
function pushed(selector) {
  const button = fresh(selector);
  if (!button || button.disabled) return false;
  button.click();
  return true;
}

// One held key that is no text; true if it moves to another head.
function command(key, active) {
  const name = key.key.toLowerCase();
  const modified = key.ctrlKey || key.metaKey;
  if (modified && (name === "enter" || name === "s")) {
    keep(active);
    if (name === "enter" && pushed(".st-key-note_next button")) return true;
    pushed(".st-key-note_save button");
    return false;
  }
  if (!isField(active) && MOVES.includes(name)) {
    return pushed(`.st-key-${{ n: "after", p: "before", u: "unseen" }[name]} button`);
  }
  if (name === "backspace") document.execCommand("delete");
  else {
    const { code, shiftKey } = key;
    const same = { key: key.key, code, shiftKey, bubbles: true, cancelable: true, composed: true };
    (active || document.body).dispatchEvent(new KeyboardEvent("keydown", same));
  }
  return false;
}

// A key that has a button: the button is pressed here, for the page's own shortcut can miss it while it draws itself.
function act(event, active) {
  event.preventDefault();
  event.stopImmediatePropagation();
  if (command(event, active)) hold();
}

function pressed(event) {
  if (!form.mounted || document.querySelector("dialog.ha-help")) return;
  const modified = event.ctrlKey || event.metaKey || event.altKey;
  if (form.held && event.isTrusted) {
    if (["Control", "Shift", "Alt", "Meta"].includes(event.key)) return;
    if (modified && event.key !== "Enter" && event.key.toLowerCase() !== "s") return;
    event.preventDefault();
    event.stopImmediatePropagation();
    // Pressed once more because nothing seemed to happen: the next head must not be saved with nothing in it.
    const again = (modified && event.key === "Enter") || MOVES.includes(event.key.toLowerCase());
    if (!(again && !form.held.keys.length && !form.held.arrived)) form.held.keys.push(event);
    return;
  }
  const active = deepActive();
  const key = event.key.toLowerCase();
  if (event.key === "Escape" && isField(active) && active.closest?.(".st-key-note-form")) {
    leave(active);
    return;
  }
  if ((event.ctrlKey || event.metaKey) && (key === "s" || key === "enter")) {
    act(event, active);
    return;
  }
  if (modified || isField(active)) return;
  if (MOVES.includes(key)) act(event, active);
  else if (letter(event)) {
    event.preventDefault();
    event.stopImmediatePropagation();
  }
}

function typed(event) {
  if (!(event.target instanceof HTMLTextAreaElement) || !event.target.closest(".st-key-note-form")) return;
  clearTimeout(form.timer);
  const field = event.target;
  form.timer = setTimeout(() => document.activeElement === field && keep(field), PAUSE_MS);
}

function clicked(event) {
  if (form.mounted && event.isTrusted && event.target.closest?.(MOVING)) hold();
}

const listeners = [
  ["input", typed],
  ["keydown", pressed],
  ["click", clicked],
  ["focusout", strayed],
  ["pointerdown", () => (wanted.until = Date.now() + 400)],
];
const leaving = () => document.activeElement && leave(document.activeElement);

function install() {
  for (const [name, listener] of listeners) window.addEventListener(name, listener, true);
  window.addEventListener("pagehide", leaving);
}

function uninstall() {
  clearTimeout(form.timer);
  release();
  for (const [name, listener] of listeners) window.removeEventListener(name, listener, true);
  window.removeEventListener("pagehide", leaving);
}

export default function (component) {
  const page = document.documentElement.dataset;
  if (!form.mounted) install();
  form.mounted = true;
  const moved = form.place !== component.data.place;
  form.place = component.data.place;
  form.kind = component.data.kind;
  page.keys = "ready";
  page.head = form.place;
  if (moved && form.held) form.held.arrived = Date.now();
  return () => {
    form.mounted = false;
    uninstall();
    delete page.keys;
    delete page.head;
  };
}
