// Features that stand near one feature, in groups: links with numbers, tokens and families.

function relatedRow(row, columns, open) {
  const line = el("tr");
  const name = el("td", "who");
  name.appendChild(link(row.name || `${row.sae ? `${row.sae} · ` : ""}feature ${row.feature}`, row.href, "", open));
  if (row.also) {
    const also = link("compare", row.also, "also", open);
    also.setAttribute("aria-label", `compare with ${row.name}`);
    name.appendChild(also);
  }
  if (row.label) name.appendChild(el("span", "said", row.label));
  line.appendChild(name);
  const told = el("td", "told");
  if (row.token !== null) {
    const chip = el("span", "chip");
    tokenText(chip, row.token);
    chip.title = "the commonest of its strongest tokens";
    told.appendChild(chip);
  }
  for (const family of row.families) told.appendChild(el("span", "family", family));
  line.appendChild(told);
  row.values.forEach((value, i) => {
    const cell = el("td", "", value.replace(/^-/, "−"));
    cell.title = columns[i][1];
    line.appendChild(cell);
  });
  if (!row.name) line.appendChild(el("td", "muted", row.density === null || row.density === undefined ? "–" : percent(row.density)));
  return line;
}

function relatedGroup(group, open, plain) {
  const box = el("section", group.wide ? "group wide" : "group");
  const title = el("h3", "", group.title);
  if (group.note) title.appendChild(el("span", "muted", group.note));
  const table = el("table");
  const head = el("tr");
  head.append(el("td"), el("td"));
  const density = plain ? [] : [["density", "share of tokens on which it fires"]];
  for (const [name, meaning] of [...group.columns, ...density]) {
    const cell = el("th", "", name);
    cell.title = meaning;
    head.appendChild(cell);
  }
  table.append(head, ...group.rows.map((row) => relatedRow(row, group.columns, open)));
  box.append(...(group.title ? [title] : []), table);
  return box;
}

export default function (component) {
  const { parentElement, setTriggerValue } = component;
  const data = received(component);
  const root = parentElement.querySelector(".root");
  if (root.dataset.version === data.version) return;
  root.dataset.version = data.version;
  root.replaceChildren();
  const groups = el("div", "groups");
  for (const group of data.groups) groups.appendChild(relatedGroup(group, (href) => setTriggerValue("open", href), data.plain));
  drawn(root);
  root.appendChild(data.groups.length ? groups : el("p", "muted", data.empty));
}
