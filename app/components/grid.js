// The grid of heads: one button per head, arrow keys move, Enter or a click opens.

function legend(data) {
  const box = el("div", "legend");
  box.appendChild(el("span", "legend-title", data.title));
  if (data.scale) {
    const bar = el("span", "bar");
    bar.style.background = `linear-gradient(to right, ${data.scale.stops.join(",")})`;
    const tick = (value) => el("span", "tick", Number.isInteger(value) ? String(value) : num(value));
    box.append(tick(data.scale.low), bar, tick(data.scale.high));
    if (data.scale.unit) box.appendChild(el("span", "muted", data.scale.unit));
  }
  for (const item of data.classes || []) {
    const key = el("span", "class");
    const swatch = el("i", "swatch", item.mark || "");
    swatch.style.background = item.bg;
    swatch.style.color = item.fg;
    key.append(swatch, el("span", "", `${item.name} (${item.n})`));
    box.appendChild(key);
  }
  return box;
}

function cellButton(cell, data, open) {
  const node = el("button", "cell");
  node.type = "button";
  node.style.background = cell.bg;
  node.style.color = cell.fg;
  node.tabIndex = -1;
  node.dataset.at = `${cell.layer},${cell.head}`;
  const spoken = cell.tip.slice(1).map(([k, v]) => `${k} ${v}`).join(", ");
  node.setAttribute("aria-label", `L${cell.layer}H${cell.head}: ${spoken}`);
  node.append(el("span", "value", cell.text), el("span", "label", cell.label));
  if (cell.faded) node.classList.add("faded");
  if (cell.here) {
    node.classList.add("here");
    node.setAttribute("aria-current", "true");
  }
  node.addEventListener("click", () => open({ layer: cell.layer, head: cell.head }));
  return node;
}

function arrowKeys(table, data) {
  table.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const at = event.target.dataset?.at;
    if (!at || !steps[event.key]) return;
    const [layer, head] = at.split(",").map(Number);
    const [dl, dh] = steps[event.key];
    const next = table.querySelector(`[data-at="${layer + dl},${head + dh}"]`);
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

// While nothing has the focus, an arrow to the side goes into the grid, which is far down in the order of the page.
const reached = new WeakMap();

function reachable(root) {
  if (!reached.has(root)) {
    const pressed = (event) => {
      const plain = !(event.ctrlKey || event.metaKey || event.altKey || event.shiftKey);
      if (!plain || !/^Arrow(Left|Right)$/.test(event.key) || document.activeElement !== document.body) return;
      event.preventDefault();
      root.querySelector(".cell[tabindex='0']")?.focus();
    };
    window.addEventListener("keydown", pressed);
    reached.set(root, () => {
      window.removeEventListener("keydown", pressed);
      reached.delete(root);
    });
  }
  return reached.get(root);
}

export default function (component) {
  const root = component.parentElement.querySelector(".root");
  const data = received(component);
  draw(data, component.setTriggerValue, root);
  drawn(root);
  return data.mini ? undefined : reachable(root);
}

function draw(data, setTriggerValue, root) {
  if (root.dataset.version === data.version) return;
  root.dataset.version = data.version;
  root.replaceChildren();
  const tip = tooltip(root);
  const table = el("div", data.mini ? "grid mini" : "grid");
  table.setAttribute("role", "group");
  table.setAttribute("aria-label", `Heads by layer and head, coloured by ${data.title}`);
  const column = data.mini ? "minmax(0, 13px)" : "minmax(0, 1fr)";
  table.style.gridTemplateColumns = `${data.mini ? "" : "3.2em "}repeat(${data.n_heads}, ${column})`;
  if (!data.mini) {
    table.appendChild(el("span", "axis", ""));
    for (let h = 0; h < data.n_heads; h++) table.appendChild(el("span", "axis top", `H${h}`));
  }
  const cells = new Map(data.cells.map((c) => [`${c.layer},${c.head}`, c]));
  for (let l = 0; l < data.n_layers; l++) {
    if (!data.mini) table.appendChild(el("span", "axis side", `L${l}`));
    for (let h = 0; h < data.n_heads; h++) {
      const cell = cells.get(`${l},${h}`);
      const node = cellButton(cell, data, (value) => setTriggerValue("open", value));
      node.addEventListener("pointerenter", () => tip.show(node, cell.tip));
      node.addEventListener("pointerleave", tip.hide);
      node.addEventListener("focus", () => tip.show(node, cell.tip));
      node.addEventListener("blur", tip.hide);
      table.appendChild(node);
    }
  }
  const first = table.querySelector(".cell.here") || table.querySelector(".cell");
  if (first) first.tabIndex = 0;
  arrowKeys(table, data);
  if (data.mini) root.append(table);
  else root.append(legend(data), table);
}
