// What the keys do, in a dialog.

const KEYS = [
  ["e / w / r", "write the label / notes / role"],
  ["j, k", "next, previous feature of the list"],
  ["1 to 9", "the feature belongs to that group"],
  ["g", "name a new group and put the feature in it"],
  ["o", "odd one out"],
  ["c", "cannot say"],
  ["a", "all that are not judged yet: the verdict of the feature above"],
  ["x", "take the verdict back"],
  ["m, then ←, → and Space", "class of semanticity (follows from the verdicts by itself)"],
  ["Shift+1 to Shift+5", "confidence"],
  ["s, v", "star, novel"],
  ["z, Shift+z", "undo, redo"],
  ["Esc", "leave a field"],
  ["Ctrl+s", "save as done"],
  ["Ctrl+Enter", "save as done, go to the next open head"],
  ["n, p", "next, previous head"],
  ["u", "next head that is not done"],
  ["/", "go to a head by its name"],
  ["h", "history of the note"],
  ["t", "write a comment; Ctrl+Enter there sends it"],
  ["b", "blind: hide scores and what others wrote"],
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
