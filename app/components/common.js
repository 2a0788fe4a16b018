// Shared by every component. All text enters the page through textContent, never as markup.

// What the server sent: JSON as bytes, which it writes once.
function received(component) {
  return JSON.parse(new TextDecoder().decode(component.data));
}

// Says on the page itself that there is something to see: until then its place is kept (early.css).
function drawn(root) {
  root.getRootNode().host.dataset.drawn = "";
}

function el(tag, cls, text) {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  if (text !== undefined && text !== null) node.textContent = text;
  return node;
}

function num(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 10000 || size < 0.0005) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
  const shown = size >= 100 ? value.toFixed(0) : value.toPrecision(digits);
  return shown.replace(/^-/, "−");
}

function percent(value) {
  if (value === null || value === undefined) return "–";
  return `${(100 * value).toFixed(Math.abs(value) < 0.0995 ? 1 : 0).replace(/^-/, "−")}%`;
}

// One tooltip per component, placed beside what it explains and inside the window.
function tooltip(host) {
  const box = el("div", "tip");
  box.setAttribute("role", "tooltip");
  box.setAttribute("aria-hidden", "true");
  host.appendChild(box);
  return {
    show(target, lines) {
      box.replaceChildren(
        ...lines.map(([name, value]) => {
          const row = el("div", value === undefined ? "tip-head" : "tip-row");
          row.appendChild(el("span", "", name));
          if (value !== undefined) row.appendChild(el("b", "", value));
          return row;
        }),
      );
      box.removeAttribute("aria-hidden");
      box.classList.add("on");
      const outer = host.getBoundingClientRect();
      const rect = target.getBoundingClientRect();
      const left = Math.min(rect.left - outer.left, outer.width - box.offsetWidth - 4);
      const above = rect.top - box.offsetHeight - 6;
      const top = above > 60 ? above - outer.top : rect.bottom - outer.top + 6;
      box.style.left = `${Math.max(0, left)}px`;
      box.style.top = `${top}px`;
    },
    hide() {
      box.setAttribute("aria-hidden", "true");
      box.classList.remove("on");
    },
  };
}

// A plain click goes through the app (fast, keeps the session); other clicks are the browser's own.
function link(text, href, cls, open) {
  const a = el("a", cls, text);
  a.href = href;
  a.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    event.stopPropagation();
    open(href);
  });
  return a;
}

// The visible form of a token with its whitespace marks dimmed; a long run of one mark is counted.
function tokenText(node, text) {
  for (const part of text.split(/(·+|[⏎⇥]+)/)) {
    if (!part) continue;
    if (!/[·⏎⇥]/.test(part)) {
      node.appendChild(document.createTextNode(part));
      continue;
    }
    const mark = el("span", "ws", part.length > 3 ? part[0] : part);
    if (part.length > 3) mark.appendChild(el("sub", "", String(part.length)));
    node.appendChild(mark);
  }
}

// Sum of contributions per source position; one head alone if head is a number.
function bySource(dfa, head) {
  const sums = new Map();
  for (const [h, source, value] of dfa ? dfa.src : []) {
    if (head === null || head === undefined || h === head) sums.set(source, (sums.get(source) || 0) + value);
  }
  return sums;
}

// Which positions a compact line shows: around the firing token and around its strongest sources.
function shownRanges(example, sums, before, after, limit) {
  const last = example.t.length - 1;
  const strongest = [...sums].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, limit);
  const top = strongest.length ? Math.abs(strongest[0][1]) : 0;
  const ranges = [[example.p - before, example.p + after]];
  for (const [source, value] of strongest) {
    if (source > 0 && Math.abs(value) >= 0.2 * top) ranges.push([source - 3, source + 2]);
  }
  const sorted = ranges
    .map(([a, b]) => [Math.max(0, a), Math.min(last, b)])
    .sort((a, b) => a[0] - b[0]);
  const merged = [sorted[0]];
  for (const [a, b] of sorted.slice(1)) {
    const end = merged[merged.length - 1];
    if (a <= end[1] + 4) end[1] = Math.max(end[1], b);
    else merged.push([a, b]);
  }
  return merged;
}

function markSource(node, value, largest) {
  const share = largest > 0 ? Math.abs(value) / largest : 0;
  if (share < 0.08) return;
  node.classList.add(value < 0 ? "src-minus" : "src");
  node.style.setProperty("--w", `${(1 + 3 * share).toFixed(1)}px`);
  node.style.setProperty("--s", share.toFixed(2));
}

// Whether a position belongs to the stretch before the strongest source, or to its repetition up to the example's;
// only while that source is the strongest of those that are marked.
function repeats(example, position, sums) {
  if (!example.dfa || !example.dfa.match) return false;
  const [source, n] = example.dfa.match;
  if (!sums.size || sums.get(source) !== Math.max(...sums.values())) return false;
  return (position >= source - n && position < source) || (position > example.p - n && position <= example.p);
}

function tokenSpan(example, position, texts, max, activations) {
  const text = texts[example.t[position]];
  const node = el("span", "tok");
  if (position === 0) {
    node.classList.add("bos");
    node.textContent = "BOS";
  } else tokenText(node, text);
  const value = activations.get(position);
  if (value > 0) {
    node.classList.add("act");
    node.style.setProperty("--a", Math.min(1, 0.15 + (0.85 * value) / (max || value)).toFixed(3));
  }
  if (position === example.p) node.classList.add(example.miss === null ? "fire" : "miss");
  node.dataset.position = position;
  return node;
}

// The tokens of one example; `sums` marks source positions, `ranges` says which positions to draw.
function tokenLine(example, texts, max, sums, ranges) {
  const line = el("div", "line");
  line.dir = "auto";
  const activations = new Map(example.act);
  const largest = Math.max(0, ...[...sums.values()].map(Math.abs));
  let next = 0;
  for (const [from, to] of ranges) {
    if (from > next) line.appendChild(el("span", "gap", "⋯"));
    for (let i = from; i <= to; i++) {
      const node = tokenSpan(example, i, texts, max, activations);
      if (sums.has(i)) markSource(node, sums.get(i), largest);
      if (repeats(example, i, sums)) node.classList.add("match");
      line.appendChild(node);
      if (texts[example.t[i]] === "⏎") line.appendChild(document.createElement("wbr"));
    }
    next = to + 1;
  }
  if (next < example.t.length) line.appendChild(el("span", "gap", "⋯"));
  return line;
}

function tokenTip(example, position, texts, sums, layer, head) {
  const lines = [[position === 0 ? "BOS" : texts[example.t[position]]]];
  lines.push(["position", `${position} (${position - example.p})`.replace("-", "−")]);
  const activation = new Map(example.act).get(position);
  if (activation) lines.push(["activation", num(activation)]);
  if (position === example.p && example.dfa) {
    const made = example.dfa.src.filter(([h]) => head === null || head === undefined || h === head);
    for (const [h, source, value] of made.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).slice(0, 3)) {
      const from = source === 0 ? "BOS" : `${texts[example.t[source]]} (${source - example.p})`.replace("-", "−");
      lines.push([`L${layer}H${h} from ${source === position ? "here" : from}`, num(value)]);
    }
  }
  if (sums.has(position)) {
    const who = head === null || head === undefined ? "as a source, all heads" : `as a source of L${layer}H${head}`;
    lines.push([who, num(sums.get(position))]);
    const heads = example.dfa.src
      .filter(([h, s]) => s === position && h !== head)
      .sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
    for (const [h, , value] of heads.slice(0, 4)) lines.push([`L${layer}H${h}`, num(value)]);
  }
  return lines;
}
