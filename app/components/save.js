// Saves what a component shows: its data as JSON, its look as one HTML file or as a picture.

const KEPT_VARIABLES = ["--st-text-color", "--st-background-color", "--st-secondary-background-color", "--st-link-color", "--st-font", "--st-code-font"];

function download(name, blob) {
  const a = el("a");
  a.href = URL.createObjectURL(blob);
  a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
}

// The styles that the component has, with the theme's colours written out.
function styleText(root) {
  const found = [...root.getRootNode().querySelectorAll("style")].map((one) => one.textContent);
  const computed = getComputedStyle(root);
  const variables = KEPT_VARIABLES.map((name) => `${name}: ${computed.getPropertyValue(name)};`).join(" ");
  const scheme = computed.colorScheme || "light";
  const page = `.card-root { ${variables} color-scheme: ${scheme}; background: ${computed.getPropertyValue("--st-background-color")}; color: ${computed.getPropertyValue("--st-text-color")}; padding: 16px; }`;
  return [page, ...found].join("\n");
}

// What the feature writes, and which heads make it, as lines of a saved card.
function saidOf({ promotes, suppresses, heads }) {
  const lines = [["promotes", promotes], ["suppresses", suppresses]].filter(([, tokens]) => tokens.length);
  const made = lines.map(([name, tokens]) => {
    const line = el("p", "small");
    line.appendChild(el("span", "muted", `${name} `));
    for (const [text, value] of tokens) {
      const chip = el("span", "chip");
      tokenText(chip, text);
      line.append(chip, el("span", "muted", `${num(value)} `));
    }
    return line;
  });
  if (heads.length) {
    const shares = heads.slice(0, 5).map((one) => `${one.head} ${percent(one.decoder_share)}`);
    made.push(el("p", "small", `decoder share: ${shares.join(", ")}`));
  }
  return made;
}

function cardOf(data, list) {
  const card = el("div", "card-root root");
  card.setAttribute("xmlns", "http://www.w3.org/1999/xhtml");
  card.appendChild(el("h3", "", data.card.title));
  const facts = el("p", "small");
  facts.textContent = data.card.facts.map(([name, value]) => `${name}: ${value}`).join(" · ");
  card.append(facts, ...saidOf(data.card), list.cloneNode(true), el("p", "muted small", data.card.link));
  for (const node of card.querySelectorAll("button, .filtered")) node.remove();
  for (const node of card.querySelectorAll("[tabindex]")) node.removeAttribute("tabindex");
  return card;
}

function saveHtml(root, data, list) {
  const page = document.implementation.createHTMLDocument(data.card.title);
  const charset = page.createElement("meta");
  charset.setAttribute("charset", "utf-8");
  const style = page.createElement("style");
  style.textContent = styleText(root);
  page.head.prepend(charset);
  page.head.appendChild(style);
  page.body.appendChild(page.importNode(cardOf(data, list), true));
  download(`${data.card.file}.html`, new Blob([`<!doctype html>\n${page.documentElement.outerHTML}`], { type: "text/html" }));
}

// A picture by way of SVG; as a data URL, for a canvas refuses one that came from elsewhere.
function savePng(root, data, list, said) {
  const width = Math.max(640, list.getBoundingClientRect().width + 32);
  const card = cardOf(data, list);
  card.style.width = `${width - 32}px`;
  const style = el("style");
  style.textContent = styleText(root);
  card.prepend(style);
  root.appendChild(card);
  const height = Math.min(8000, Math.ceil(card.getBoundingClientRect().height) + 8);
  card.remove();
  const text = new XMLSerializer().serializeToString(card);
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"><foreignObject width="100%" height="100%">${text}</foreignObject></svg>`;
  const image = new Image();
  image.onload = () => {
    const canvas = el("canvas");
    const scale = Math.min(2, 8000 / height);
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.drawImage(image, 0, 0);
    canvas.toBlob((blob) => (blob ? download(`${data.card.file}.png`, blob) : said("The picture could not be made.")), "image/png");
  };
  image.onerror = () => said("The picture could not be made.");
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
}

// An example as a reader without this page understands it: token texts, names in full.
function exampleJson(example, data) {
  const { h, bias, pre, src } = example.dfa || {};
  const head = (i) => `L${data.layer}H${data.heads ? data.heads[i] : i}`;
  return {
    group: example.g, rank: example.r, source: example.s, block: example.b, position: example.p,
    activation: example.miss === null ? example.a : 0, near_miss: example.miss,
    tokens: example.t.map((place) => data.texts[place]),
    activations: example.act.map(([position, value]) => ({ position, value })),
    dfa: example.dfa && {
      by_head: Object.fromEntries(h.map((value, i) => [head(i), value])), bias_term: bias, pre_activation: pre,
      sources: src.map(([one, position, value]) => ({ head: `L${data.layer}H${one}`, position, value })),
    },
  };
}

function saveJson(data) {
  const { about, link, promotes, suppresses, heads } = data.card;
  const tokens = (list) => list.map(([token, logits]) => ({ token, logits }));
  const examples = data.examples.map((one) => exampleJson(one, data));
  const whole = { ...about, link, promotes: tokens(promotes), suppresses: tokens(suppresses), heads, examples };
  download(`${data.card.file}.json`, new Blob([JSON.stringify(whole, null, 1)], { type: "application/json" }));
}

function saveButtons(root, data, list) {
  const box = el("span", "saves");
  const said = el("span", "muted small");
  said.setAttribute("role", "status");
  const ways = [
    ["JSON", () => saveJson(data)],
    ["HTML", () => saveHtml(root, data, list)],
    ["PNG", () => savePng(root, data, list, (text) => (said.textContent = text))],
  ];
  for (const [name, save] of ways) {
    const button = el("button", "mode", name);
    button.type = "button";
    button.setAttribute("aria-label", `save this card as ${name}`);
    button.addEventListener("click", save);
    box.appendChild(button);
  }
  const link = el("a", "permanent", "Permanent link");
  link.href = data.card.href;
  box.append(link, said);
  return box;
}
