// The bar above the examples: how much text is shown, which examples are, and ways to save them.

const MODES = [["compact", "Compact"], ["whole", "Whole block"], ["aligned", "Aligned"]];

// The head with the largest part of an example; null without DFA.
function strongestHead(example, data) {
  if (!example.dfa) return null;
  const at = example.dfa.h.indexOf(Math.max(...example.dfa.h));
  return data.heads ? data.heads[at] : at;
}

// Whether an example passes the filters: its strongest head, and a token among its sources.
function passes(example, state, data) {
  if (state.onlyHead !== null && strongestHead(example, data) !== state.onlyHead) return false;
  const wanted = state.onlySource.replaceAll(" ", "·").toLowerCase();
  if (!wanted) return true;
  const sources = example.dfa ? example.dfa.src.filter(([, , value]) => value > 0) : [];
  return sources.some(([, source]) => source > 0 && data.texts[example.t[source]].toLowerCase().includes(wanted));
}

function modeButtons(state, redraw) {
  const box = el("span", "modes");
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "How much of the text is shown");
  for (const [mode, name] of MODES) {
    const button = el("button", mode === state.mode ? "mode on" : "mode", name);
    button.type = "button";
    button.setAttribute("aria-pressed", String(mode === state.mode));
    button.addEventListener("click", () => {
      state.mode = mode;
      redraw();
    });
    box.appendChild(button);
  }
  for (const [name, factor] of [["Narrower", 0.5], ["Wider", 2]]) {
    const button = el("button", "mode", factor > 1 ? "⟷ wider" : "⇥⇤ narrower");
    button.type = "button";
    button.setAttribute("aria-label", `${name} text around the token`);
    button.disabled = state.mode === "whole" || (factor < 1 ? state.width <= 0.25 : state.width >= 8);
    button.addEventListener("click", () => {
      state.width *= factor;
      redraw();
    });
    box.appendChild(button);
  }
  return box;
}

function filters(state, data, filter) {
  const box = el("span", "filters");
  const heads = [...new Set(data.examples.map((one) => strongestHead(one, data)))].filter((head) => head !== null);
  if (heads.length > 1) {
    const choice = el("select");
    choice.setAttribute("aria-label", "Only examples whose strongest head is");
    choice.appendChild(el("option", "", "any strongest head")).value = "";
    for (const head of heads.sort((a, b) => a - b)) {
      const option = el("option", "", `strongest: L${data.layer}H${head}`);
      option.value = String(head);
      option.selected = head === state.onlyHead;
      choice.appendChild(option);
    }
    choice.addEventListener("change", () => {
      state.onlyHead = choice.value === "" ? null : Number(choice.value);
      filter();
    });
    box.appendChild(choice);
  }
  if (heads.length) {
    const field = el("input");
    field.type = "search";
    field.placeholder = "reads from token …";
    field.setAttribute("aria-label", "Only examples with this text among their source tokens");
    field.value = state.onlySource;
    field.addEventListener("input", () => {
      state.onlySource = field.value;
      filter();
    });
    box.appendChild(field);
  }
  return box;
}

// Head x source of one example: blue for, purple against; only heads and sources that are kept.
function heatMap(example, data) {
  const values = new Map(example.dfa.src.map(([head, source, value]) => [`${head},${source}`, value]));
  const heads = [...new Set(example.dfa.src.map(([head]) => head))].sort((a, b) => a - b);
  const sources = [...new Set(example.dfa.src.map(([, source]) => source))].sort((a, b) => a - b);
  const largest = Math.max(...[...values.values()].map(Math.abs));
  const table = el("table", "heat");
  table.appendChild(el("caption", "", "Head × source"));
  const top = el("tr");
  top.appendChild(el("td"));
  for (const source of sources) {
    const cell = el("th");
    cell.scope = "col";
    const name = el("span", "");
    if (source === 0) name.textContent = "BOS";
    else tokenText(name, data.texts[example.t[source]]);
    cell.title = `${source - example.p}`.replace("-", "−");
    cell.appendChild(name);
    top.appendChild(cell);
  }
  table.appendChild(top);
  for (const head of heads) {
    const row = el("tr");
    const name = el("th", "", `H${head}`);
    name.scope = "row";
    row.appendChild(name);
    for (const source of sources) {
      const value = values.get(`${head},${source}`);
      const cell = el("td", value === undefined ? "" : value < 0 ? "minus" : "plus");
      if (value !== undefined) {
        cell.style.setProperty("--s", (Math.abs(value) / largest).toFixed(3));
        cell.title = `L${data.layer}H${head} from ${source === 0 ? "BOS" : data.texts[example.t[source]]} (${source - example.p}): ${num(value)}`;
      }
      row.appendChild(cell);
    }
    table.appendChild(row);
  }
  return table;
}
