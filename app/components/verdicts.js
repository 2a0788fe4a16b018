// Verdicts on the top features of a head: a list with one chosen row, and keys that say what it is.
//
// The component holds the verdicts while keys are pressed, and sends the whole map each time, so that fast keys
// cannot overtake each other. What the server sends back is taken over only if it has seen the newest press, or
// if it filled the form anew (undo, another text taken over, another head).

const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#8c6bb1", "#7f7f7f"];
const UNANSWERED_MS = 4000;
const NAMES = { odd: "odd one out", unsure: "can't say" };

function inField(event) {
  const path = event.composedPath();
  return path.some((n) => (n instanceof HTMLInputElement && !["checkbox", "radio"].includes(n.type)) || n instanceof HTMLTextAreaElement || n.isContentEditable);
}

function allRoots(node) {
  const found = [node];
  for (const inner of node.querySelectorAll("*")) if (inner.shadowRoot) found.push(...allRoots(inner.shadowRoot));
  return found;
}

// The card of a feature in the panel beside the form.
function cardOf(feature) {
  const panel = document.querySelector(".st-key-cards-panel");
  for (const root of panel ? allRoots(panel) : []) {
    for (const card of root.querySelectorAll(".card")) {
      const name = card.querySelector("a.name")?.textContent || "";
      if (card.dataset.feature === String(feature) || name === `feature ${feature}`) return card;
    }
  }
  return null;
}

function showCard(feature) {
  for (const [card] of shown) card.style.outline = "";
  shown.clear();
  const card = cardOf(feature);
  if (!card) return;
  card.style.outline = "2px solid #0072b2";
  shown.set(card, true);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  card.style.scrollMarginTop = "4.5rem";
  card.scrollIntoView({ block: "start", behavior: still ? "auto" : "smooth" });
}
const shown = new Map();

class Judge {
  constructor(root) {
    this.root = root;
    this.seq = 0;
    this.here = 0;
    this.place = null;
    this.naming = null;
  }

  update(component) {
    const { data } = component;
    this.send = component.setStateValue;
    const anew = this.place !== data.place || this.fills !== data.fills;
    if (this.place !== data.place) {
      this.here = 0;
      this.seq = data.echo || 0;
      if (this.naming) this.naming.finished = true;
      this.naming = null;
    }
    if (anew || data.echo >= this.seq) {
      this.verdicts = { ...data.verdicts };
      this.groups = [...data.groups];
    }
    this.place = data.place;
    this.echo = data.echo || 0;
    this.fills = data.fills;
    this.features = data.features;
    this.known = data.known;
    this.longest = data.longest;
    if (!this.naming) this.draw();
    drawn(this.root);
  }

  draw() {
    const focused = this.root.getRootNode().activeElement?.classList?.contains("row");
    const list = el("div", "list");
    list.setAttribute("role", "group");
    list.setAttribute("aria-label", "Verdicts on the top features");
    this.features.forEach((one, i) => list.appendChild(this.row(one, i)));
    this.root.replaceChildren(el("div", "title", "Its top features"), list, this.palette());
    if (this.naming) this.root.appendChild(this.naming.node);
    if (focused) list.children[this.here]?.focus({ preventScroll: true });
  }

  row(one, i) {
    const [verdict, group] = this.verdicts[one.feature] || ["", ""];
    const node = el("button", i === this.here ? "row here" : "row");
    node.type = "button";
    node.tabIndex = i === this.here ? 0 : -1;
    if (i === this.here) node.setAttribute("aria-current", "true");
    const said = el("span", verdict ? "said" : "said none", group || NAMES[verdict] || "–");
    if (group) said.style.borderColor = said.style.color = this.colour(group);
    if (group) said.style.color = "inherit";
    if (group) said.style.borderWidth = "2px";
    const hint = el("span", "hint");
    hint.textContent = one.hint;
    node.append(el("span", "rank", String(i + 1)), el("span", "id", String(one.feature)), hint, said);
    node.setAttribute("aria-label", `Feature ${one.feature}, ${group || NAMES[verdict] || "not judged"}`);
    node.addEventListener("click", () => this.go(i));
    return node;
  }

  colour(group) {
    return COLOURS[Math.max(0, this.groups.indexOf(group)) % COLOURS.length];
  }

  palette() {
    const box = el("div", "palette");
    const give = (key, text, act) => {
      const node = el("button", "give");
      node.type = "button";
      node.append(el("kbd", "", key), document.createTextNode(text));
      node.addEventListener("click", act);
      box.appendChild(node);
      return node;
    };
    this.groups.slice(0, 9).forEach((group, i) => {
      const n = Object.values(this.verdicts).filter(([, g]) => g === group).length;
      give(String(i + 1), `${group} ${n}`, () => this.say("group", group)).style.borderColor = this.colour(group);
    });
    give("G", "new group", () => this.name());
    give("O", "odd one out", () => this.say("odd"));
    give("C", "can't say", () => this.say("unsure"));
    return box;
  }

  name() {
    const words = [...new Set([...this.groups, ...this.known])];
    this.naming = new Naming(words, this.longest, (word) => {
      this.naming = null;
      if (word) this.say("group", word);
      else setTimeout(() => this.draw());
    });
    this.draw();
    this.naming.input.focus();
  }

  go(i) {
    this.here = Math.max(0, Math.min(this.features.length - 1, i));
    this.draw();
    showCard(this.features[this.here].feature);
  }

  say(verdict, group = "") {
    const { feature } = this.features[this.here];
    if (verdict) this.verdicts[feature] = [verdict, group];
    else this.verdicts[feature] = ["", ""];
    if (group && !this.groups.includes(group)) this.groups.push(group);
    this.deliver();
    if (verdict && this.here < this.features.length - 1) this.go(this.here + 1);
    else this.draw();
  }

  // Sends all verdicts; once more if the server has not answered after a while.
  deliver() {
    this.seq += 1;
    const { seq, place } = this;
    this.send("verdicts", { ...this.verdicts, seq });
    setTimeout(() => {
      if (this.seq === seq && this.place === place && this.echo < seq && this.root.isConnected) this.deliver();
    }, UNANSWERED_MS);
  }

  // Everything that is not judged yet gets the verdict of the feature above the chosen one.
  rest() {
    const above = this.verdicts[this.features[Math.max(0, this.here - 1)].feature];
    if (!above?.[0]) return;
    for (const { feature } of this.features) if (!this.verdicts[feature]?.[0]) this.verdicts[feature] = [...above];
    this.deliver();
    this.go(this.features.length - 1);
  }

  pressed(event) {
    if (!this.place || inField(event) || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const page = document.documentElement.dataset;
    // While another head is on its way, keys wait for it (keys_hold.js).
    if (document.querySelector("dialog[open]") || page.head !== this.place || (page.held && event.isTrusted)) return;
    const key = event.key.toLowerCase();
    const group = this.groups[Number(key) - 1];
    if (key === "j" || (key === "arrowdown" && this.inside(event))) this.go(this.here + 1);
    else if (key === "k" || (key === "arrowup" && this.inside(event))) this.go(this.here - 1);
    else if (/^[1-9]$/.test(key) && group) this.say("group", group);
    else if (key === "g") this.name();
    else if (key === "o") this.say("odd");
    else if (key === "c") this.say("unsure");
    else if (key === "x") this.say("");
    else if (key === "a") this.rest();
    else return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }

  inside(event) {
    return event.composedPath().includes(this.root);
  }
}

const judges = new WeakMap();

export default function (component) {
  const root = component.parentElement.querySelector(".root");
  let judge = judges.get(root);
  if (!judge) {
    judge = new Judge(root);
    judges.set(root, judge);
  }
  judge.update(component);
  if (!judge.listening) {
    judge.listening = (event) => judge.pressed(event);
    window.addEventListener("keydown", judge.listening, true);
  }
  return () => {
    window.removeEventListener("keydown", judge.listening, true);
    judge.listening = null;
  };
}
