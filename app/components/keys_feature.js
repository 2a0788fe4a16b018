// The letters of the form about a feature; the rest of its keyboard is that of the form about a head.

const RATINGS = ["1", "2", "3"];
const FEATURE_KEYS = [
  ["e / w / t", "write the label / notes / tags"],
  ["1, 2, 3", "interpretable, partly, not interpretable"],
  ["x", "take the rating back"],
  ["c", "write a comment"],
  ["z, Shift+z", "undo, redo"],
  ["Esc", "leave a field"],
  ["Ctrl+s", "save"],
  ["Ctrl+Enter", "save, go to the next feature that fires"],
  ["n, p", "next, previous feature that fires"],
  ["u", "next feature that you have not rated"],
  ["b", "back to the head that one came from"],
  ["?", "this help"],
];

function rate(at) {
  const buttons = [...(fresh(".st-key-note_rating")?.querySelectorAll("[role=radio]") || [])];
  const chosen = buttons.findIndex((one) => one.getAttribute("aria-checked") === "true");
  // A press on the chosen one would take it back, which is what x is for.
  if (at !== chosen) buttons[at === null ? chosen : at]?.click();
}

function comment() {
  const box = fresh(".st-key-note-form .st-key-note-talk details");
  if (!box) return;
  if (!box.open) box.querySelector("summary")?.click();
  focusSoon(".st-key-note-talk textarea");
}

// A field that is unfolded first needs a moment to be there.
async function focusSoon(selector) {
  for (let i = 0; i < 20; i++) {
    if (into(selector)) return;
    await new Promise((done) => setTimeout(done, 25));
  }
}

// What a letter does while no field is edited; false if it does nothing here.
function featureLetter(event) {
  const key = event.key.toLowerCase();
  if (key === "e") into("input[aria-label=Label]");
  else if (key === "w") into("textarea[aria-label=Notes]");
  else if (key === "t") into(".st-key-note_tags input");
  else if (key === "c") comment();
  else if (RATINGS.includes(key)) rate(RATINGS.indexOf(key));
  else if (key === "x") rate(null);
  else if (key === "z") press(event.shiftKey ? ".st-key-note_redo button" : ".st-key-note_undo button");
  else if (event.key === "?") help();
  else return false;
  return true;
}
