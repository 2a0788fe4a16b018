// The examples of one feature; hovering or focusing one shows which heads and sources made it fire.

const GROUP_NAMES = {
  top: "Strongest examples",
  random: "Drawn from all its active tokens",
  fp: "It fires, the guess does not hold",
  fn: "The guess holds, it is silent",
  own: "Your text, at the tokens on which it fires most strongly",
  negative: "Near misses: did not fire. The number is the pre-activation",
};
const WHY_MISS = "Near miss: did not fire. DFA is kept for examples on which the feature fires.";

function groupName(group) {
  if (GROUP_NAMES[group]) return GROUP_NAMES[group];
  const tenth = Number(group.slice(1));
  return `Quantile ${group}: ${10 * tenth}–${10 * tenth + 10} % of its active tokens, by activation`;
}

function headBar(head, value, largest, data, hooks) {
  const row = el("button", "head-bar");
  row.type = "button";
  row.setAttribute("aria-label", `L${data.layer}H${head}: ${num(value)}; show only its sources`);
  const track = el("span", "axis-track");
  const fill = el("i", value < 0 ? "minus" : "");
  const width = largest > 0 ? (50 * Math.abs(value)) / largest : 0;
  fill.style.width = `${width.toFixed(1)}%`;
  fill.style.left = value < 0 ? `${(50 - width).toFixed(1)}%` : "50%";
  track.appendChild(fill);
  row.append(el("span", "head-name", `H${head}`), track, el("span", "head-value", num(value)));
  row.addEventListener("pointerenter", () => hooks.preview(head));
  row.addEventListener("pointerleave", () => hooks.preview(undefined));
  row.addEventListener("click", () => hooks.choose(head));
  return row;
}

function sourceList(example, data, head) {
  const list = el("div", "sources");
  const entries = example.dfa.src
    .filter(([h]) => head === null || h === head)
    .sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]))
    .slice(0, 8);
  for (const [h, source, value] of entries) {
    const row = el("div", "source-row");
    const chip = el("span", "chip");
    if (source === 0) chip.textContent = "BOS";
    else tokenText(chip, data.texts[example.t[source]]);
    const offset = source - example.p;
    row.append(el("span", "head-name", `H${h}`), chip);
    row.append(el("span", "muted", offset === 0 ? "here" : `${offset}`.replace("-", "−")), el("b", "", num(value)));
    list.appendChild(row);
  }
  return list;
}

// The panel beside the list. It keeps its height, so that hovering never moves the text.
function drawPanel(panel, example, state, data, hooks) {
  panel.replaceChildren();
  if (!example || !example.dfa) {
    const miss = example && example.miss !== null;
    panel.appendChild(el("p", "muted", miss && data.has_dfa && example.g !== "fn" ? WHY_MISS : data.why_no_dfa));
    if (miss && example.g !== "fn") panel.appendChild(el("div", "small", `pre-activation ${num(example.miss)} at position ${example.p} of block ${example.b}`));
    return;
  }
  const { h, bias, pre, sum, match } = example.dfa;
  const head = state.head;
  panel.appendChild(el("h3", "", "What made it fire"));
  const where = example.g === "own" ? `position ${example.p}` : `block ${example.b}, position ${example.p}`;
  panel.appendChild(el("div", "muted small", `${where} · ${state.pinned === example ? "pinned, Esc frees it" : "click to pin"}`));
  const largest = Math.max(...h.map(Math.abs));
  const bars = el("div", "bars");
  h.forEach((value, i) => {
    const own = data.heads ? data.heads[i] : i;
    const row = headBar(own, value, largest, data, hooks);
    if (head === own) row.classList.add("chosen");
    bars.appendChild(row);
  });
  panel.appendChild(bars);
  const total = el("div", "total");
  for (const [name, value] of [["heads", sum], ["bias term", bias], ["pre-activation", pre], ["activation", example.a]]) {
    const item = el("span", "");
    item.append(el("span", "muted", name), el("b", "", num(value)));
    total.appendChild(item);
  }
  panel.appendChild(total);
  if (match) {
    const tokens = match[1] === 1 ? "1 token that repeats the one" : `${match[1]} tokens that repeat those`;
    panel.appendChild(el("div", "small match-note", `The strongest source follows ${tokens} up to here (dashed)`));
  }
  panel.appendChild(el("h3", "", head === null ? "Largest sources, all heads" : `Largest sources of L${data.layer}H${head}`));
  panel.appendChild(sourceList(example, data, head));
  if (example.dfa.src.length) {
    const heat = el("details", "heat-box");
    heat.open = state.heat;
    heat.appendChild(el("summary", "", "Heads and sources as a heat map"));
    heat.appendChild(heatMap(example, data));
    heat.addEventListener("toggle", () => (state.heat = heat.open));
    panel.appendChild(heat);
  }
  if (head !== null) {
    panel.appendChild(link(`Open L${data.layer}H${head}`, data.head_href.replace("HEAD", head), "", hooks.open));
  }
}

function aligned(example, data, sums, width) {
  const row = el("div", "kwic");
  const left = tokenLine(example, data.texts, data.max, sums, [[Math.max(0, example.p - Math.round(24 * width)), example.p - 1]]);
  const right = tokenLine(example, data.texts, data.max, sums, [[example.p, Math.min(example.t.length - 1, example.p + Math.round(16 * width))]]);
  left.classList.add("left");
  if (example.p === 0) left.replaceChildren();
  for (const gap of [...left.querySelectorAll(".gap"), ...right.querySelectorAll(".gap")]) gap.remove();
  row.append(left, right);
  return row;
}

function drawLine(example, state, data) {
  const head = state.preview ?? (state.active === example ? state.head : null);
  const sums = state.active === example ? bySource(example.dfa, head) : new Map();
  const strongest = bySource(example.dfa, null);
  if (state.mode === "aligned") return aligned(example, data, sums, state.width);
  const all = [[0, example.t.length - 1]];
  const ranges = state.mode === "whole" ? all : shownRanges(example, strongest, Math.round(18 * state.width), Math.round(8 * state.width), 4);
  return tokenLine(example, data.texts, data.max, sums, ranges);
}

function view(root, data, open) {
  const state = { mode: root.dataset.mode || "compact", active: data.examples[0] || null, pinned: null, head: null, width: 1, onlyHead: null, onlySource: "", heat: root.dataset.heat === "1" };
  const tip = tooltip(root);
  const list = el("div", "list");
  const panel = el("aside", "panel");
  panel.setAttribute("aria-label", "Direct feature attribution by head");
  const rows = new Map();

  const refresh = (example) => {
    const row = example && rows.get(example);
    if (!row) return;
    row.classList.toggle("active", state.active === example);
    row.setAttribute("aria-current", String(state.active === example));
    row.querySelector(".line, .kwic").replaceWith(drawLine(example, state, data));
  };
  const hooks = {
    open,
    preview(head) {
      state.preview = head;
      refresh(state.active);
    },
    choose(head) {
      state.head = state.head === head ? null : head;
      state.preview = undefined;
      refresh(state.active);
      drawPanel(panel, state.active, state, data, hooks);
    },
  };
  const activate = (example) => {
    if (state.active === example) return;
    const old = state.active;
    state.active = example;
    refresh(old);
    refresh(example);
    drawPanel(panel, example, state, data, hooks);
  };
  const pin = (example) => {
    state.pinned = state.pinned === example ? null : example;
    for (const [one, row] of rows) row.classList.toggle("pinned", one === state.pinned);
    activate(example);
    drawPanel(panel, state.active, state, data, hooks);
  };
  const redraw = () => {
    root.dataset.mode = state.mode;
    const at = [...modeBox.children].indexOf(modeBox.getRootNode().activeElement);
    modeBox.replaceChildren(...modeButtons(state, redraw).childNodes);
    // The button that was pressed is a new one, and whoever pressed it by key goes on from there.
    if (at >= 0) [...modeBox.children].slice(at).concat([...modeBox.children]).find((one) => !one.disabled).focus();
    for (const example of rows.keys()) refresh(example);
  };
  const modeBox = modeButtons(state, redraw);

  const addRow = (example, part) => {
    const row = el("div", "row");
    row.tabIndex = 0;
    row.setAttribute("role", "button");
    const miss = example.miss !== null;
    const said = miss ? `near miss: did not fire, pre-activation ${num(example.miss)}` : `activation ${num(example.a)}`;
    row.setAttribute("aria-label", `${example.g} example ${example.r + 1}, ${said}`);
    row.append(el("span", miss ? "value miss" : "value", num(miss ? example.miss : example.a)), drawLine(example, state, data));
    row.addEventListener("pointerenter", () => state.pinned || activate(example));
    row.addEventListener("focus", () => state.pinned || activate(example));
    row.addEventListener("click", () => pin(example));
    row.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        pin(example);
      } else if (event.key === "Escape" && state.pinned) pin(state.pinned);
    });
    row.addEventListener("pointerover", (event) => {
      const token = event.target.closest?.(".tok");
      if (!token) return tip.hide();
      const shown = state.active === example ? state.head : null;
      return tip.show(token, tokenTip(example, Number(token.dataset.position), data.texts, bySource(example.dfa, shown), data.layer, shown));
    });
    row.addEventListener("pointerleave", tip.hide);
    rows.set(example, row);
    part.appendChild(row);
  };
  // A group is drawn when it comes near the window, so that the first examples are there at once.
  const groups = new Map();
  for (const example of data.examples) {
    if (!groups.has(example.g)) groups.set(example.g, []);
    groups.get(example.g).push(example);
  }
  const filter = () => {
    for (const part of list.children) {
      const shown = groups.get(part.dataset.group)?.filter((example) => passes(example, state, data)).length ?? 1;
      part.classList.toggle("filtered", !shown);
    }
    for (const [example, row] of rows) row.classList.toggle("filtered", !passes(example, state, data));
    none.hidden = data.examples.some((example) => passes(example, state, data));
  };
  const drawGroup = (part) => {
    if (part.dataset.drawn) return;
    part.dataset.drawn = "1";
    for (const example of groups.get(part.dataset.group)) addRow(example, part);
    filter();
  };
  const watcher = new IntersectionObserver(
    (seen) => seen.filter((one) => one.isIntersecting).forEach((one) => drawGroup(one.target)),
    { rootMargin: "600px" },
  );
  const none = el("p", "muted", "No example passes the filters.");
  none.hidden = true;
  let first = true;
  for (const [name, found] of groups) {
    const part = el("section", "group-part");
    part.dataset.group = name;
    part.style.minHeight = `${30 + 31 * found.length}px`;
    part.appendChild(el("h3", "", groupName(name)));
    list.appendChild(part);
    if (first) drawGroup(part);
    else watcher.observe(part);
    first = false;
  }
  list.appendChild(none);
  const everything = () => [...list.querySelectorAll(".group-part")].forEach(drawGroup);
  if (!data.examples.length) list.appendChild(el("p", "muted", "This feature never fires in the summarised text: no example."));
  refresh(state.active);
  drawPanel(panel, state.active, state, data, hooks);
  const bar = el("div", "bar");
  bar.append(modeBox, filters(state, data, filter));
  if (data.card) {
    const saves = saveButtons(root, data, list);
    saves.addEventListener("click", everything, true);
    bar.appendChild(saves);
  }
  const body = el("div", "body");
  body.append(list, panel);
  root.append(bar, body);
}

export default function (component) {
  const { parentElement, setTriggerValue } = component;
  const data = received(component);
  const root = parentElement.querySelector(".root");
  if (root.dataset.version === data.version) return;
  root.dataset.version = data.version;
  root.replaceChildren();
  view(root, data, (href) => setTriggerValue("open", href));
}
