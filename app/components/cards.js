// The features of one head as cards: shares, logits, and examples with this head's sources marked.

function shareBar(name, value, title) {
  const box = el("span", "share");
  box.title = title;
  const track = el("span", "track");
  const fill = el("i", value < 0 ? "minus" : "");
  fill.style.width = `${Math.min(100, 100 * Math.abs(value || 0)).toFixed(1)}%`;
  track.appendChild(fill);
  box.append(el("span", "muted", name), track, el("b", "", value === null ? "–" : value.toFixed(2).replace("-", "−")));
  return box;
}

function logitLine(name, items) {
  const line = el("div", "logits");
  line.appendChild(el("span", "muted side", name));
  for (const [text, value] of items) {
    const chip = el("span", "chip");
    tokenText(chip, text);
    chip.title = `${text}  ${num(value)} logits`;
    line.appendChild(chip);
  }
  return line;
}

function exampleRow(example, card, data, tip) {
  const row = el("div", "row");
  const sums = bySource(example.dfa, data.head);
  const ranges = shownRanges(example, sums, data.before, data.after, 3);
  const draw = (all) => tokenLine(example, data.texts, card.max, sums, all ? [[0, example.t.length - 1]] : ranges);
  let line = draw(false);
  const meta = el("button", "meta");
  meta.type = "button";
  meta.setAttribute("aria-expanded", "false");
  meta.setAttribute("aria-label", `Example ${example.r + 1}: show the whole block`);
  meta.appendChild(el("span", "value", num(example.a)));
  const mine = example.dfa ? example.dfa.h[data.head] / example.dfa.sum : null;
  const part = el("span", "part", mine === null ? "" : percent(mine));
  part.title = `L${data.layer}H${data.head}'s part of this pre-activation, without the bias term`;
  meta.appendChild(part);
  meta.addEventListener("click", () => {
    const all = meta.getAttribute("aria-expanded") === "false";
    meta.setAttribute("aria-expanded", String(all));
    const next = draw(all);
    line.replaceWith(next);
    line = next;
  });
  row.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".tok");
    if (token) tip.show(token, tokenTip(example, Number(token.dataset.position), data.texts, sums, data.layer, data.head));
    else tip.hide();
  });
  row.addEventListener("pointerleave", tip.hide);
  row.append(meta, line);
  return row;
}

function cardNode(card, data, tip, open) {
  const node = el("article", "card");
  const head = el("header");
  head.appendChild(el("span", "rank", String(card.rank + 1)));
  head.appendChild(link(`feature ${card.feature}`, card.href, "name", open));
  if (card.label) head.appendChild(el("span", "label", card.label));
  for (const [family, rule] of card.families) {
    const chip = el("span", "family", family);
    chip.title = rule;
    head.appendChild(chip);
  }
  const shares = el("span", "shares");
  shares.append(
    shareBar("decoder", card.decoder_share, "decoder share: norm of this head's slice of W_dec over the sum over heads"),
    shareBar("FVE", card.fve, "share of the variance of the pre-activation that this head explains"),
    shareBar("DFA", card.dfa_share, "mean share of the pre-activation over the top examples"),
  );
  head.appendChild(shares);
  node.appendChild(head);
  const facts = el("div", "facts");
  facts.append(logitLine("promotes", card.up), logitLine("suppresses", card.down));
  const stats = el("div", "stats muted", `density ${percent(card.density)} · max ${num(card.max)}`);
  if (card.other) stats.appendChild(document.createTextNode(` · largest share in ${card.other}`));
  facts.prepend(stats);
  node.appendChild(facts);
  for (const example of card.examples) node.appendChild(exampleRow(example, card, data, tip));
  if (!card.examples.length) node.appendChild(el("p", "muted", "No example of this feature was kept."));
  return node;
}

// What the marks mean, above the first card.
function legend(data) {
  const key = el("div", "keys");
  const fire = el("span", "tok act fire", "token");
  fire.style.setProperty("--a", "0.8");
  const source = el("span", "tok src", "token");
  source.style.setProperty("--w", "3px");
  source.style.setProperty("--s", "0.8");
  const minus = el("span", "tok src-minus", "token");
  minus.style.setProperty("--w", "2px");
  for (const [mark, text] of [[fire, "fires here"], [source, `L${data.layer}H${data.head} reads from here (+)`], [minus, "against (−)"]]) {
    const item = el("span", "key");
    item.append(mark, el("span", "", text));
    key.appendChild(item);
  }
  key.appendChild(el("span", "key", "numbers: activation, this head's part · click one for the whole block"));
  if (data.cards.some((card) => card.examples.some((example) => example.dfa && example.dfa.match))) {
    const item = el("span", "key");
    item.append(el("span", "tok match", "token"), el("span", "", "repeats, before the source and up to here"));
    key.insertBefore(item, key.lastChild);
  }
  return key;
}

// Places of later cards are as high as the first cards are on average, so that little moves when they come.
function keepHeight(root) {
  const heights = [...root.querySelectorAll(".card")].map((card) => card.offsetHeight);
  if (!heights.length || !heights[0]) return;
  const mean = heights.reduce((a, b) => a + b) / heights.length;
  document.documentElement.style.setProperty("--ha-card-height", `${mean.toFixed(1)}px`);
}

function scroller(node) {
  for (let at = node.getRootNode().host || node; at; at = at.parentElement) {
    if (/auto|scroll/.test(getComputedStyle(at).overflowY)) return at;
  }
  return null;
}

// Cards that have not come yet: asked for when the reader is two windows away. What is asked for is a state of
// the component, so that the cards also come with whatever else the page asks of the server meanwhile.
function places(root, data, ask) {
  root.setAttribute("aria-busy", "true");
  for (const rank of data.waiting) {
    const node = el("article", "card waiting");
    node.appendChild(el("span", "rank", String(rank + 1)));
    root.appendChild(node);
  }
  const watcher = new IntersectionObserver(
    (seen) => {
      if (!seen.some((one) => one.isIntersecting)) return;
      watcher.disconnect();
      ask(data.of);
    },
    { root: scroller(root), rootMargin: "200% 0px" },
  );
  watcher.observe(root);
  return watcher;
}

export default function (component) {
  const { parentElement, setTriggerValue, setStateValue } = component;
  const data = received(component);
  const root = parentElement.querySelector(".root");
  if (root.dataset.version !== data.version) {
    root.dataset.version = data.version;
    root.replaceChildren();
    root.removeAttribute("aria-busy");
    root.watcher?.disconnect();
    if (data.waiting) root.watcher = places(root, data, (of) => setStateValue("wanted", of));
    else {
      const tip = tooltip(root);
      if (!data.of) root.appendChild(legend(data));
      for (const card of data.cards) root.appendChild(cardNode(card, data, tip, (href) => setTriggerValue("open", href)));
      if (!data.of) keepHeight(root);
    }
    drawn(root);
  }
  if (!data.waiting) return undefined;
  return () => {
    root.watcher.disconnect();
    delete root.dataset.version;
  };
}
