// What can stand at a place of a query: tables after FROM, columns of the tables that are named there, and so on.

const CLAUSES = new Set(
  "select from where group order having limit offset join left right full inner cross semi anti asof using on as and or not in is between like ilike case when then else end union intersect except with over partition by qualify filter asc desc nulls distinct all lateral exists natural outer recursive values window sample any some null true false similar to interval".split(" "),
);
const PIECES = /--[^\n]*|\/\*[\s\S]*?(?:\*\/|$)|'(?:[^']|'')*(?:'|$)|"(?:[^"]|"")*(?:"|$)|[A-Za-z_]\w*|\d[\w.]*|\s+|[\s\S]/g;
const GROUPS = { alias: 1, table: 2, function: 3, keyword: 4, other: 5 };

function kindOf(text) {
  if (text.startsWith("--") || text.startsWith("/*")) return "comment";
  if (text[0] === "'") return "string";
  if (text[0] === '"') return "quoted";
  if (/[A-Za-z_]/.test(text[0])) return CLAUSES.has(text.toLowerCase()) ? "clause" : "name";
  if (/\d/.test(text[0])) return "number";
  return /\s/.test(text[0]) ? "space" : "mark";
}

function pieces(sql) {
  const found = [];
  for (const match of sql.matchAll(PIECES)) {
    const [text] = match;
    found.push({ text, low: text.toLowerCase(), kind: kindOf(text), from: match.index, to: match.index + text.length });
  }
  return found;
}

// Whether a place lies inside a string or comment, where nothing is suggested.
function isQuiet(found, at) {
  return found.some((one) => {
    if (at <= one.from || at > one.to) return false;
    if (one.kind === "comment") return at < one.to || one.text.startsWith("--") || !one.text.endsWith("*/");
    if (one.kind === "string" || one.kind === "quoted") return at < one.to || one.text.length === 1 || !one.text.endsWith(one.text[0]);
    return false;
  });
}

const bare = (piece) => (piece.kind === "quoted" ? piece.text.slice(1, -1) : piece.text);

// The tables that a query names after FROM and JOIN, each with its alias and the brackets that it stands in; names
// given by WITH; and whether a table's name is awaited after the last piece.
function named(found) {
  const said = found.filter((one) => one.kind !== "space" && one.kind !== "comment");
  const tables = [];
  const given = [];
  const open = [{ from: 0, list: false }];
  const spans = [];
  let awaits = false;
  for (let i = 0; i < said.length; i++) {
    const one = said[i];
    const here = open[open.length - 1];
    if (one.text === "(") {
      const before = said[i - 1];
      if (before?.low === "as" && said[i - 2] && bare(said[i - 2])) given.push(bare(said[i - 2]));
      open.push({ from: one.from, list: false });
      awaits = false;
    } else if (one.text === ")") {
      if (open.length > 1) spans.push({ span: open.pop(), to: one.to });
      awaits = false;
    } else if (one.low === "from" || one.low === "join") {
      awaits = true;
      here.list = one.low === "from";
    } else if (one.text === "," && here.list) awaits = true;
    else if (one.kind === "clause" && one.low !== "as" && one.low !== "lateral") {
      if (one.kind === "clause") awaits = false;
      if (["where", "group", "order", "select", "having", "limit", "qualify", "on", "using", "join"].includes(one.low)) here.list = false;
    } else if (awaits && (one.kind === "name" || one.kind === "quoted")) {
      while (said[i + 1]?.text === "." && said[i + 2] && said[i + 2].kind !== "mark") i += 2;
      const table = bare(said[i]);
      let next = said[i + 1];
      if (next?.low === "as") next = said[i + 2];
      const alias = next && (next.kind === "name" || next.kind === "quoted") ? bare(next) : null;
      tables.push({ table, alias, at: said[i].to, span: here });
      awaits = false;
      here.list = true;
    }
  }
  return { tables, given, awaits, ends: new Map(spans.map(({ span, to }) => [span, to])) };
}

// The tables that a place can see: those of its own brackets and of the brackets around them.
function seen(sql, at) {
  const { tables, given, ends } = named(pieces(sql));
  const visible = tables.filter(({ span }) => span.from <= at && at <= (ends.get(span) ?? sql.length));
  return { visible, given };
}

function quality(name, typed) {
  if (!typed) return 0;
  const low = name.toLowerCase();
  if (low.startsWith(typed)) return low === typed ? 0 : 1;
  if (low.includes(`_${typed}`)) return 2;
  return typed.length > 1 && low.includes(typed) ? 3 : null;
}

function columnsOf(words, table) {
  const low = table.toLowerCase();
  return words.tables.find(([name]) => name.toLowerCase() === low);
}

function columnItems(words, visible) {
  const items = new Map();
  for (const { table, alias } of visible) {
    const found = columnsOf(words, table);
    for (const [name, type, meaning] of found ? found[3] : []) {
      const where = alias ? `${table} ${alias}` : table;
      if (items.has(name)) items.get(name).also.push(where);
      else items.set(name, { name, text: name, kind: type, meaning, also: [where], group: 0 });
    }
  }
  return [...items.values()].map(({ also, ...one }) => ({ ...one, from: also.join(", ") }));
}

const everyTable = (words) => words.tables.map(([table]) => ({ table, alias: null }));

function tableItems(words, group) {
  return words.tables.map(([name, kind, row]) => ({ name, text: name, kind, meaning: row, group }));
}

// Every suggestion for a place of an expression: columns first, then aliases, functions, keywords, tables.
function everything(words, sql, at, lower, afterValue) {
  const { visible, given } = seen(sql, at);
  const items = columnItems(words, visible);
  for (const { table, alias } of visible) {
    const row = columnsOf(words, table)?.[2] || "";
    items.push({ name: alias || table, text: alias || table, kind: alias ? `alias of ${table}` : "table", meaning: row, group: GROUPS.alias });
  }
  for (const name of given) items.push({ name, text: name, kind: "named by WITH", meaning: "", group: GROUPS.alias });
  for (const [name, call, meaning] of words.functions) {
    items.push({ name, text: `${name}(`, kind: "function", call, meaning, group: GROUPS.function });
  }
  for (const name of words.keywords) {
    items.push({ name, text: lower ? name.toLowerCase() : name, kind: "keyword", meaning: "", group: afterValue ? -1 : GROUPS.keyword });
  }
  if (!visible.length) items.push(...columnItems(words, everyTable(words)).map((one) => ({ ...one, group: GROUPS.other })));
  return [...items, ...tableItems(words, GROUPS.other)];
}

// Whether a value, a column or a table ends here, so that a keyword comes next.
function isValue(last, before) {
  if (last.text === "*") return ["select", "distinct", ",", ".", "("].includes(before?.low);
  return ["name", "number", "string", "quoted"].includes(last.kind) || [")", "null", "true", "false", "end"].includes(last.low);
}

// Suggestions at a place: what was typed of the word so far, where it begins, and the items, best first.
function suggest(words, sql, at, most) {
  const found = pieces(sql);
  const nothing = { from: at, typed: "", items: [] };
  if (isQuiet(found, at)) return nothing;
  const typed = /[A-Za-z_]\w*$/.exec(sql.slice(0, at))?.[0] || "";
  const from = at - typed.length;
  if (/\d$/.test(sql.slice(0, from))) return nothing;
  const before = found.filter((one) => one.to <= from && one.kind !== "space" && one.kind !== "comment");
  const last = before.at(-1);
  // The half-written word would itself be read as a table or an alias.
  const rest = `${sql.slice(0, from)} ${sql.slice(at)}`;
  let items;
  if (last?.text === ".") {
    const name = before.at(-2) ? bare(before.at(-2)).toLowerCase() : "";
    const { visible } = seen(rest, from);
    const meant = visible.find(({ alias, table }) => (alias || table).toLowerCase() === name) || { table: name, alias: null };
    // An alias that is not given yet may become any table's.
    items = columnItems(words, columnsOf(words, meant.table) ? [meant] : everyTable(words));
  } else if (named(before).awaits) {
    const given = seen(rest, from).given.map((name) => ({ name, text: name, kind: "named by WITH", meaning: "", group: 0 }));
    items = [...given, ...tableItems(words, 1)];
  } else {
    const lower = typed !== "" && typed === typed.toLowerCase();
    items = everything(words, rest, from, lower, !last || isValue(last, before.at(-2)));
  }
  const low = typed.toLowerCase();
  const ranked = items.map((item, i) => ({ item, i, q: quality(item.name, low) })).filter(({ q }) => q !== null);
  ranked.sort((a, b) => a.q - b.q || a.item.group - b.item.group || a.i - b.i);
  return { from, typed, items: ranked.slice(0, most).map(({ item }) => item) };
}
