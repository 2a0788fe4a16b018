// The letters of the form about a feature; the rest of its keyboard is that of the form about a head.

const RATINGS = ["1", "2", "3"];
const FEATURE_KEYS = [
  ["e / w / t", "write the label / notes / tags"],
  ["1, 2, 3", "interpretable, partly, not interpretable"],
  ["x", "take the rating back"],
  ["c", "write a comment; Ctrl+Enter there sends it"],
  ["z, Shift+z", "undo, redo"],
  ["Esc", "leave a field"],
  ["Ctrl+s", "save"],
  ["Ctrl+Enter", "save, go to the next feature that fires"],
  ["n, p", "next, previous feature that fires"],
  ["u", "next feature that you have not rated"],
  ["/", "go to a feature by its number"],
  ["h", "history of the note"],
  ["b", "back to the head that one came from"],
  ["?", "this help"],
];

function rate(at) {
  const buttons = [...(fresh(own("interpretability"))?.querySelectorAll("[role=radio]") || [])];
  const chosen = buttons.findIndex((one) => one.getAttribute("aria-checked") === "true");
  // A press on the chosen one would take it back, which is what x is for.
  if (at !== chosen) buttons[at === null ? chosen : at]?.click();
}

function number() {
  const field = fresh(".st-key-jump_feature input");
  field?.focus();
  field?.select();
}

// Opens the comments; false if there is no place for them.
function unfolded() {
  const box = fresh(".st-key-note-talk details");
  if (box && !box.open) box.querySelector("summary")?.click();
  return Boolean(box);
}

function comment() {
  if (!unfolded()) return;
  // What is typed until the field is there waits for it.
  if (form.held) return;
  const held = { keys: [], arrived: Date.now(), playing: true };
  form.held = held;
  document.documentElement.dataset.held = "1";
  focusSoon(".st-key-note-talk textarea").then((there) => (there ? play(held) : drop()));
}

// In a comment, Ctrl+Enter sends it: until then it is kept nowhere else. False if no comment is being written.
function sendComment() {
  const active = deepActive();
  if (!active?.closest?.(".st-key-note-talk")) return false;
  leave(active);
  fresh(".st-key-note-talk [class*=st-key-say-] button")?.click();
  return true;
}

// A field that is unfolded first needs a moment until it can have the focus; false if it never got it.
async function focusSoon(selector) {
  for (let i = 0; i < 160; i++) {
    const field = into(selector);
    if (field && field === document.activeElement) return true;
    await new Promise((done) => setTimeout(done, 25));
  }
  return false;
}

// What a letter does while no field is edited; false if it does nothing here.
function featureLetter(event) {
  const key = event.key.toLowerCase();
  if (key === "e") into(`${own("label")} input`);
  else if (key === "w") into(`${own("notes")} textarea`);
  else if (key === "t") into(`${own("tags")} input`);
  else if (key === "c") comment();
  else if (key === "h") press(`${own("history")} summary`);
  else if (key === "/") number();
  else if (key === "b") return back();
  else if (RATINGS.includes(key)) rate(RATINGS.indexOf(key));
  else if (key === "x") rate(null);
  else if (key === "z") ask(event.shiftKey ? "redo" : "undo");
  else if (event.key === "?") help();
  else return false;
  return true;
}
