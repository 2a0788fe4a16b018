// The field in which a new group gets its name, with the names in use that contain what is typed.

const OFFERED = 6;

// Words that begin with the text first, then those that contain it; each in the order given, the most used first.
function matching(words, text) {
  const part = text.trim().toLowerCase();
  const begins = words.filter((word) => word.toLowerCase().startsWith(part));
  const holds = words.filter((word) => !begins.includes(word) && word.toLowerCase().includes(part));
  return [...begins, ...holds].slice(0, OFFERED);
}

class Naming {
  constructor(words, longest, done) {
    this.words = words;
    this.done = done;
    this.at = -1;
    this.input = el("input", "new");
    this.input.placeholder = "name of the group, Enter; ↓ for names in use";
    this.input.maxLength = longest;
    this.list = el("div", "offers");
    this.list.id = "offers";
    this.list.setAttribute("role", "listbox");
    this.list.setAttribute("aria-label", "Names in use");
    const said = { role: "combobox", "aria-label": "Name of the new group", "aria-controls": "offers", "aria-autocomplete": "list", autocomplete: "off" };
    for (const [name, value] of Object.entries(said)) this.input.setAttribute(name, value);
    this.input.addEventListener("input", () => this.offer());
    this.input.addEventListener("keydown", (event) => this.pressed(event));
    this.input.addEventListener("blur", () => this.left());
    this.node = el("div");
    this.node.append(this.input, this.list);
    this.offer();
  }

  offer() {
    this.at = -1;
    this.offered = matching(this.words, this.input.value);
    this.show();
  }

  show() {
    const options = this.offered.map((word, i) => {
      const option = el("div", i === this.at ? "offer here" : "offer", word);
      option.id = `offer${i}`;
      option.setAttribute("role", "option");
      option.setAttribute("aria-selected", String(i === this.at));
      // Before the field loses the focus, which would take what is typed.
      option.addEventListener("mousedown", (event) => {
        event.preventDefault();
        this.finish(word);
      });
      return option;
    });
    this.list.replaceChildren(...options);
    this.input.setAttribute("aria-expanded", String(options.length > 0));
    if (this.at < 0) this.input.removeAttribute("aria-activedescendant");
    else this.input.setAttribute("aria-activedescendant", `offer${this.at}`);
  }

  pressed(event) {
    event.stopPropagation();
    const n = this.offered.length;
    if (event.key === "Enter") this.finish(this.offered[this.at] ?? this.input.value);
    else if (event.key === "Escape") this.finish(null);
    else if (event.key === "ArrowDown" && n) this.at = (this.at + 1) % n;
    else if (event.key === "ArrowUp" && n) this.at = (Math.max(this.at, 0) + n - 1) % n;
    else return;
    event.preventDefault();
    if (!this.finished) this.show();
  }

  // Null: no name after all.
  finish(name) {
    if (this.finished) return;
    this.finished = true;
    this.done(name === null ? null : name.trim().replace(/\s+/g, " "));
  }

  left() {
    // The page moves this list about while it draws itself again, which takes the focus away without anybody
    // wanting it; a microtask comes after the move and before the next key. A name that is left counts.
    queueMicrotask(() => {
      const { input } = this;
      const strayed = input.isConnected && document.activeElement === document.body && document.hasFocus();
      if (strayed && !document.documentElement.dataset.held) input.focus();
      else this.finish(this.offered[this.at] ?? input.value);
    });
  }
}
