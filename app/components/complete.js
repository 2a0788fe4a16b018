// Suggestions below the place in the SQL editor where one types. The editor is Streamlit's own text area; text is
// put into it as if it were typed, so that the browser's undo takes it back.

const EDITOR = ".st-key-sql textarea";
const MOST = 60;
const VARIABLES = ["--st-background-color", "--st-text-color", "--st-code-font", "--st-font", "--st-primary-color"];
const shown = { words: null, area: null, at: 0, from: 0, typed: "", items: [], chosen: 0, root: null, went: 0, own: false };

const box = el("div", "ha-complete");
const list = el("div", "ha-complete-list");
const said = el("div", "ha-complete-said");
const count = el("div", "ha-complete-count");
list.id = "ha-complete-list";
list.setAttribute("role", "listbox");
list.setAttribute("aria-label", "Suggestions");
count.setAttribute("role", "status");
box.hidden = true;
box.append(list, said);

// Where a place of a text area is on the screen, by way of an invisible copy of its text.
function placeOf(area, at) {
  const copy = el("div");
  const style = getComputedStyle(area);
  for (const name of ["font", "letterSpacing", "lineHeight", "padding", "borderWidth", "tabSize", "textIndent"]) copy.style[name] = style[name];
  Object.assign(copy.style, { position: "absolute", visibility: "hidden", whiteSpace: "pre-wrap", overflowWrap: "break-word", boxSizing: "border-box", borderStyle: "solid", width: `${area.clientWidth}px` });
  copy.textContent = area.value.slice(0, at);
  const mark = el("span", "", "|");
  copy.appendChild(mark);
  document.body.appendChild(copy);
  const inner = { left: mark.offsetLeft, top: mark.offsetTop, height: mark.offsetHeight };
  copy.remove();
  const outer = area.getBoundingClientRect();
  const top = Math.min(outer.bottom, Math.max(outer.top, outer.top + inner.top - area.scrollTop));
  return { left: outer.left + inner.left - area.scrollLeft, top, bottom: top + inner.height };
}

function setPlace() {
  const at = placeOf(shown.area, shown.from);
  const width = box.offsetWidth;
  const below = innerHeight - at.bottom - 8;
  const up = below < box.offsetHeight && at.top > below;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  box.style.top = `${Math.max(8, up ? at.top - box.offsetHeight - 4 : at.bottom + 2)}px`;
}

function option(item, i) {
  const row = el("div", "ha-complete-row");
  row.id = `ha-complete-${i}`;
  row.setAttribute("role", "option");
  row.append(el("b", "", item.name), el("span", "", item.meaning), el("i", "", item.kind));
  row.addEventListener("pointerdown", (event) => {
    // The editor keeps the focus.
    event.preventDefault();
    accept(i);
  });
  return row;
}

function choose(i) {
  const rows = list.children;
  rows[shown.chosen]?.setAttribute("aria-selected", "false");
  shown.chosen = (i + rows.length) % rows.length;
  rows[shown.chosen].setAttribute("aria-selected", "true");
  rows[shown.chosen].scrollIntoView({ block: "nearest" });
  shown.area.setAttribute("aria-activedescendant", rows[shown.chosen].id);
  const { name, call, kind, from, meaning } = shown.items[shown.chosen];
  const head = [call || name, kind, from && `in ${from}`].filter(Boolean).join(" · ");
  said.replaceChildren(el("b", "", head), el("span", "", meaning));
}

function close() {
  box.hidden = true;
  count.textContent = "";
  shown.area?.removeAttribute("aria-activedescendant");
}

// `asked`: by Ctrl+Space, so that there is a list also where nothing was typed yet.
function look(area, asked) {
  const at = area.selectionStart;
  const { from, typed, items } = suggest(shown.words, area.value, at, MOST);
  const dot = area.value[from - 1] === ".";
  const complete = items[0]?.name.toLowerCase() === typed.toLowerCase();
  if (at !== area.selectionEnd || !items.length || (!asked && (complete || (typed.length < 2 && !dot)))) return close();
  Object.assign(shown, { area, at, from, typed, items, chosen: 0 });
  prepare(area);
  const theme = getComputedStyle(shown.root);
  for (const name of VARIABLES) box.style.setProperty(name, theme.getPropertyValue(name));
  box.style.colorScheme = theme.colorScheme;
  list.replaceChildren(...items.map(option));
  box.hidden = false;
  choose(0);
  setPlace();
  count.textContent = `${items.length} suggestion${items.length > 1 ? "s" : ""}`;
  return undefined;
}

function prepare(area) {
  area.setAttribute("aria-autocomplete", "list");
  area.setAttribute("aria-controls", list.id);
  area.spellcheck = false;
}

function accept(i) {
  const { area, from, at, items } = shown;
  const item = items[i];
  close();
  shown.own = true;
  area.focus();
  area.setSelectionRange(from, at);
  document.execCommand("insertText", false, item.text);
  shown.own = false;
}

const MOVE = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 };

function onKey(event) {
  const area = event.target;
  if (!area.matches?.(EDITOR)) return;
  const control = event.ctrlKey || event.metaKey;
  const handled = () => {
    event.preventDefault();
    event.stopImmediatePropagation();
  };
  if (control && event.code === "Space") {
    handled();
    look(area, true);
  } else if (box.hidden || event.isComposing) return;
  else if (MOVE[event.key] && !control) {
    handled();
    choose(shown.chosen + MOVE[event.key]);
  } else if ((event.key === "Enter" || event.key === "Tab") && !control && !event.shiftKey) {
    handled();
    accept(shown.chosen);
  } else if (event.key === "Escape") {
    handled();
    close();
  } else if (control || ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) close();
}

function onInput(event) {
  if (!event.target.matches?.(EDITOR) || shown.own) return;
  if (event.isComposing || event.inputType?.startsWith("history")) close();
  else look(event.target, false);
}

// Selects the place of an error in the editor; once for each time that it is asked for.
function goTo({ line, column, length, seq }) {
  const area = document.querySelector(EDITOR);
  if (!area || seq === shown.went) return;
  shown.went = seq;
  const before = area.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
  area.focus();
  area.setSelectionRange(before + column - 1, before + column - 1 + length);
}

const away = (event) => box.hidden || box.contains(event.target) || event.target === shown.area || close();
const LISTENERS = [
  ["keydown", onKey],
  ["input", onInput],
  ["focusin", (event) => event.target.matches?.(EDITOR) && prepare(event.target)],
  ["focusout", (event) => event.target.matches?.(EDITOR) && close()],
  ["pointerdown", away],
  ["scroll", (event) => box.hidden || box.contains(event.target) || close()],
  ["resize", close],
];

export default function (component) {
  const { data, parentElement } = component;
  shown.words = data;
  shown.root = parentElement.querySelector(".root");
  if (!box.isConnected) {
    document.body.append(box, count);
    for (const [name, listener] of LISTENERS) window.addEventListener(name, listener, true);
  }
  const area = document.querySelector(EDITOR);
  if (area) prepare(area);
  document.documentElement.dataset.complete = "ready";
  if (data.goto) goTo(data.goto);
  return () => {
    close();
    box.remove();
    count.remove();
    delete document.documentElement.dataset.complete;
    for (const [name, listener] of LISTENERS) window.removeEventListener(name, listener, true);
  };
}
