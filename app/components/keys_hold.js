// Moving to another head takes a moment in which the old form still stands on the page. What is typed in that
// moment would land in the note of the head just left, so keys are held back from the press that moves until
// the server has answered that very press: with the form of the new head, or with the same one, if it could not
// be saved. Then they are played again in order. They never go anywhere without an answer.
//
// What a key asks of the server is a value with a number, not a press of a button: a press is forgotten where a
// newer message overtakes it, a value comes along with that one.

const ASK_AGAIN_MS = 3000;
// A link, a choice of a head, or the way back leads to another place, however long the server takes; a press that was
// lost on the way is made again after a while in which the server did nothing, and then given up.
const LEADS_MS = 15000;
const SETTLE_MS = 60;
const LONGEST_SETTLE_MS = 3000;
const MOVES = { n: "after", p: "before", u: "unseen" };
const GOES = ["next", "after", "before", "unseen"];
const TO_FIELDS = { head: ["e", "w", "r", "g"], feature: ["e", "w", "t", "c"] };

// Whether every part of the form is there: one whose script is still on its way is a placeholder, deaf to keys.
function whole() {
  const placeholders = `:is(.st-key-note-form, ${JUMP}) [data-testid=stSkeleton]`;
  const verdicts = ".st-key-note-verdicts [data-testid=stBidiComponentIsolated]:not([data-drawn])";
  return !document.querySelector(`${placeholders}, ${verdicts}`);
}

function running() {
  return document.querySelector(".stApp")?.dataset.testScriptState === "running";
}

function send(asked) {
  form.send("asked", asked);
}

// Whether something was typed into a list of choices that has not yet found what it could be.
function unlisted(field) {
  const typed = field?.role === "combobox" && field.value && form.choosing === field;
  return Boolean(typed && !field.getAttribute("aria-activedescendant"));
}

// Enter, pressed in a field that was not yet ready for it; true if it leads to another head.
function confirm(field) {
  const leads = jumps(field);
  form.choosing = null;
  field.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", code: "Enter", bubbles: true, cancelable: true }));
  if (leads) hold({ at: form.place, leads: true });
  return leads;
}

// The entry of an open list of choices that says what is typed: the one an arrow key went to, else the one with these
// words, else the one that adds them. The list draws only the part that one sees, and the last comes at its end.
function entry(field) {
  const list = document.getElementById(field.getAttribute("aria-controls"));
  if (!list) return null;
  const words = field.value.trim().toLowerCase();
  const find = () => {
    const options = [...list.querySelectorAll("[role=option]")];
    const same = options.find((one) => one.textContent.trim().toLowerCase() === words);
    return same || options.find((one) => one.dataset.key === "__creatable__");
  };
  const reached = form.arrowed === field && document.getElementById(field.getAttribute("aria-activedescendant"));
  const found = reached || find();
  if (found) return found;
  list.scrollTop = list.scrollHeight;
  list.dispatchEvent(new Event("scroll"));
  return find();
}

// What is typed into an open list of choices is chosen, for leaving it would forget it.
function choose(field) {
  form.choosing = form.typing = null;
  if (field.role !== "combobox" || field.ariaExpanded !== "true" || !field.value.trim()) return;
  entry(field)?.click();
}

async function listed(field) {
  for (let i = 0; i < 40 && unlisted(field); i++) await new Promise((done) => setTimeout(done, 25));
  form.choosing = null;
}

// Does something once the list of choices has seen what was typed; other keys wait. ``act`` says whether they go on
// to wait for another head.
async function later(field, act) {
  const held = { keys: [], arrived: Date.now(), playing: true };
  form.held = held;
  document.documentElement.dataset.held = "1";
  await listed(field);
  form.held = null;
  if (act()) form.held.keys.push(...held.keys);
  else {
    form.held = held;
    play(held);
  }
}

// Asks the server to do something with this note; true if that may lead to another head.
function ask(name) {
  if (name === "next" && sendComment()) return false;
  const does = form.does.includes(name) ? name : name === "next" ? "save" : null;
  if (!does) return false;
  const active = deepActive();
  const goes = GOES.includes(does);
  if (unlisted(active)) {
    later(active, () => ask(name));
    return true;
  }
  if (isField(active) && inForm(active)) {
    choose(active);
    if (goes || !(active instanceof HTMLTextAreaElement)) leave(active);
    else keep(active);
  }
  form.seq = Math.max(Date.now(), form.seq + 1, form.answered + 1);
  const asked = { seq: form.seq, do: does, at: form.place };
  if (goes) hold(asked);
  // What the field that was just left has to say goes first.
  setTimeout(() => send(asked));
  return goes;
}

// To the head that one came from; true if there is one.
function back() {
  const button = fresh(".st-key-came button");
  if (!button) return false;
  const again = () => fresh(".st-key-came button")?.click();
  hold({ at: form.place, leads: true, again });
  button.click();
  return true;
}

// ``asked``: where one is, and the number of what was asked there, or that it leads to another place and how to ask again.
function hold(asked) {
  const held = { asked, keys: [], since: Date.now(), asks: 0, arrived: 0, playing: false };
  form.held = held;
  document.documentElement.dataset.held = "1";
  held.poll = setInterval(() => look(held), 30);
}

function look(held) {
  const { at, seq } = held.asked;
  const moved = form.place !== at;
  const here = moved ? Boolean(fresh(own("label"))) && whole() : form.answered >= (seq ?? Infinity);
  if (!here) {
    wait(held, moved);
    return;
  }
  held.arrived ||= Date.now();
  const waited = Date.now() - held.arrived;
  // Until the page is at rest its parts may still be moved about.
  if (waited > LONGEST_SETTLE_MS || (waited > SETTLE_MS && !running())) finish(held);
}

// Nothing has come yet: asks again where the server is at rest, later each time, and gives up a way that leads nowhere.
// What was typed for another place is not for this one. A form that has come and is not whole is given up as it is.
function wait(held, moved) {
  const { asked } = held;
  if (running()) held.since = Date.now();
  const rested = Date.now() - held.since;
  if ((asked.leads || moved) && rested > LEADS_MS) {
    if (!moved) window.headAtlasEarly?.letGo(held.keys.splice(0));
    finish(held);
  } else if (!moved && rested > ASK_AGAIN_MS * (held.asks + 1)) {
    held.asks += 1;
    if (asked.leads) asked.again?.();
    else send(asked);
  }
}

function finish(held) {
  clearInterval(held.poll);
  // What is pressed while the others are played again still queues up behind them.
  held.playing = true;
  play(held);
}

function drop() {
  clearInterval(form.held?.poll);
  form.held = null;
  delete document.documentElement.dataset.held;
}

// A key pressed, or a text pasted, while keys are held back.
function queued(event) {
  const { held } = form;
  if (["Control", "Shift", "Alt", "Meta"].includes(event.key)) return;
  const modified = event.ctrlKey || event.metaKey || event.altKey;
  if ((modified && !/^(enter|s)$/i.test(event.key)) || /^F\d+$/.test(event.key)) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  // Pressed once more because nothing seemed to happen: the next head must not be saved with nothing in it.
  const repeats = held.asked && held.asked.at !== null;
  const again = repeats && modified && event.key === "Enter" && !held.keys.length && !held.arrived;
  if (!again && !event.repeat) held.keys.push(event);
}

function pasted(event) {
  if (!form.held || form.held.playing || !event.isTrusted) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  form.held.keys.push({ key: event.clipboardData?.getData("text") || "", text: true });
}

const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

const isText = (key) => key.text || (key.key.length === 1 && !key.ctrlKey && !key.metaKey);

// Goes on in a field that was taken away in the middle of writing: what the server was not told is written again.
async function rewrite({ box, text, caret, comment: talk, after }) {
  const active = deepActive();
  // Somebody is in another field already, since before there was this script to see the click.
  const other = isField(active) && inForm(active) && !active.matches(`${box} *`) ? boxOf(active) : null;
  if (talk) unfolded();
  if (!(await focusSoon(`${box} :is(input, textarea)`))) {
    if (text) window.headAtlasEarly?.letGo([text]);
    return;
  }
  const field = deepActive();
  if (text && field.value !== text) await write(field, text);
  else if (text === "") document.execCommand("delete");
  const end = field.value.length;
  const [from, to] = caret || [end, end];
  if (from !== null) field.setSelectionRange?.(from, to);
  const onward = after || other;
  if (onward && onward !== box) fresh(`${onward} :is(input, textarea)`)?.focus();
}

// Plays keys that were held back, in order. A key that moves on holds the rest back again.
async function play(held) {
  await painted();
  if (held.edit) await rewrite(held.edit);
  held.edit = null;
  while (held.keys.length) {
    const key = held.keys.shift();
    const active = deepActive();
    if (isField(active) && isText(key)) {
      let text = key.key;
      while (held.keys.length && isText(held.keys[0])) text += held.keys.shift().key;
      await write(active, text);
      continue;
    }
    if (key.text) continue;
    if (key.key === "Enter" && unlisted(active)) await listed(active);
    await painted();
    if (again(key, deepActive())) {
      form.held.keys = held.keys;
      return;
    }
    await painted();
    if (TO_FIELDS[form.kind].includes(key.key) && !isField(active)) await focused();
  }
  if (form.held === held) drop();
}

// Writes into a field that has just come; a field that is drawn anew meanwhile loses it, so it is looked at again.
// A click on another field meanwhile does not lead the text there.
async function write(field, text) {
  for (let i = 0; i < 4; i++) {
    if (i && field.isConnected) field.focus();
    document.execCommand("insertText", false, text);
    await painted();
    await new Promise((done) => setTimeout(done, 30));
    const now = field.isConnected ? field : deepActive();
    if ((now?.value ?? now?.textContent ?? "").includes(text)) return;
    if (!isField(now)) field.focus();
  }
}

// Until a field has the focus, for a key that goes to one; given up after a moment.
async function focused() {
  for (let i = 0; i < 40 && !isField(deepActive()); i++) await new Promise((done) => setTimeout(done, 25));
}

// One held key that is no text, played again; true if it may lead to another head.
function again(key, active) {
  const name = key.key.toLowerCase();
  if (key.ctrlKey || key.metaKey) return ask(name === "enter" ? "next" : "save");
  if (!isField(active) && MOVES[name]) return ask(MOVES[name]);
  if (!isField(active) && name === "b" && form.kind === "feature") return back();
  if (name === "enter" && jumps(active)) return confirm(active);
  if (name === "backspace") document.execCommand("delete");
  else if (name === "enter" && active instanceof HTMLTextAreaElement) document.execCommand("insertText", false, "\n");
  else {
    const { code, shiftKey } = key;
    const same = { key: key.key, code, shiftKey, bubbles: true, cancelable: true, composed: true };
    (active || document.body).dispatchEvent(new KeyboardEvent("keydown", same));
  }
  return false;
}
