// The keyboard of the annotation form: letters act while no field is edited, and nothing typed is lost.

const ASKED_BY = { note_next: "next", before: "before", after: "after", unseen: "unseen" };
const JUMP = ".st-key-jump, .st-key-jump_feature";
// The map of heads, and links to heads and features.
const LEADS = ".mini .cell, a[href^='head?'], a[href^='feature?']";
const MOVING = Object.keys(ASKED_BY).map((name) => `.st-key-${name}`).join(", ");

// What a letter does while no field is edited; false if it does nothing here.
function letter(event) {
  if (form.kind === "feature") return featureLetter(event);
  const key = event.key.toLowerCase();
  if (event.shiftKey && /^Digit[1-5]$/.test(event.code)) {
    const buttons = fresh(own("confidence"))?.querySelectorAll("[role=radio]") || [];
    buttons[Number(event.code.at(-1)) - 1]?.click();
  } else if (key === "e") into(`${own("label")} input`);
  else if (key === "w") into(`${own("notes")} textarea`);
  else if (key === "r") into(`${own("role")} input`);
  else if (key === "m") into(`${own("semanticity")} [role=radio]`);
  else if (key === "s") press(`${own("star")} input`);
  else if (key === "v") press(`${own("novel")} input`);
  else if (key === "z") ask(event.shiftKey ? "redo" : "undo");
  else if (key === "b") press(".st-key-blind_switch input");
  else if (key === "h") unfold(`${own("history")} summary`);
  else if (key === "t") comment();
  else if (key === "/") fresh(".st-key-jump input")?.focus();
  else if (event.key === "?") help();
  else return false;
  return true;
}

function pressed(event) {
  if (!form.mounted) return;
  const shown = document.querySelector("dialog.ha-help[open]");
  if (shown) {
    // Closed by the browser it would be there for a moment more, and the next key go nowhere.
    if (event.key === "Escape") shown.close();
    return;
  }
  if (form.held && event.isTrusted) {
    queued(event);
    return;
  }
  const modified = event.ctrlKey || event.metaKey || event.altKey;
  const active = deepActive();
  const key = event.key.toLowerCase();
  if (event.key === "Escape" && isField(active) && (inForm(active) || active.closest?.(JUMP))) {
    // A list of choices would take Escape as the wish to have nothing chosen.
    if (active.role === "combobox") event.stopImmediatePropagation();
    if (unlisted(active)) later(active, () => leave(active));
    else leave(active);
    return;
  }
  if (key === "enter" && !modified && event.isTrusted && unlisted(active)) {
    event.preventDefault();
    event.stopImmediatePropagation();
    later(active, () => confirm(active));
    return;
  }
  if (key === "enter" && event.isTrusted && jumps(active)) {
    // After the field has seen the key.
    queueMicrotask(() => hold({ at: form.place, leads: true }));
    return;
  }
  // The list closes itself on Tab, and is deaf from then on.
  if (key === "tab" && form.typing === active) choose(active);
  if (key.startsWith("arrow") && active?.ariaExpanded === "true") form.arrowed = active;
  const command = event.ctrlKey || event.metaKey ? { s: "save", enter: "next" }[key] : null;
  if (command) ask(command);
  else if (modified || isField(active)) return;
  else if (MOVES[key]) ask(MOVES[key]);
  else if (!letter(event)) return;
  // The page has shortcuts for the same buttons, which can miss while it draws itself.
  event.preventDefault();
  event.stopImmediatePropagation();
}

// Whether Enter in a field that asks for another head or feature leads there: not to where one is, nor to none at all.
function jumps(field) {
  if (!field?.closest?.(JUMP)) return false;
  if (field.type === "number") return field.value !== "" && field.validity.valid && field.value !== form.place.split(" ").at(-1);
  const chosen = document.getElementById(field.getAttribute("aria-activedescendant"));
  return field.ariaExpanded === "true" && Boolean(chosen) && chosen.textContent.trim() !== form.place;
}

// What a click leads to another head or feature by; null if it does not.
function leadsOn(event) {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return null;
  const node = event.composedPath().find((one) => one.matches?.(LEADS));
  if (!node?.href) return node && node.getAttribute("aria-current") !== "true" ? node : null;
  const asked = new URL(node.href).searchParams;
  const place = asked.has("feature") ? `${asked.get("sae")} ${asked.get("feature")}` : asked.get("head");
  return form.place !== place ? node : null;
}

// The first part of the page, or of a component in it, that a selector is for.
function deepFind(selector, within = document) {
  const found = within.querySelector(selector);
  if (found) return found;
  for (const { shadowRoot } of within.querySelectorAll("*")) {
    const inner = shadowRoot && deepFind(selector, shadowRoot);
    if (inner) return inner;
  }
  return null;
}

// How to make a click again that led on; what was clicked may have been drawn anew since.
function oncemore(lead) {
  const name = lead.href ? "href" : "data-at";
  const selector = `${lead.tagName}[${name}=${JSON.stringify(lead.getAttribute(name))}]`;
  return () => deepFind(selector)?.click();
}

// Whether nothing was typed that waits for the form, and nothing is being played into it.
function idle({ keys, edit, playing }) {
  return !keys.length && !edit && !playing;
}

function clicked(event) {
  if (!form.mounted || !event.isTrusted) return;
  const lead = leadsOn(event);
  // Another choice while the first is on its way; or a form that is not whole yet, and nothing typed for it.
  if (form.held?.asked?.leads && lead && form.held.asked.at === form.place) form.held.asked.again = oncemore(lead);
  if (form.held && form.held.asked?.at === null && idle(form.held)) drop();
  // Another field, while the one written in before is still to be filled again: that first, then this one.
  if (form.held?.edit && isField(event.target) && inForm(event.target)) form.held.edit.after = boxOf(event.target);
  if (form.held) return;
  if (lead) hold({ at: form.place, leads: true, again: oncemore(lead) });
  const box = event.target.closest?.(MOVING);
  if (!box) return;
  const [, name] = Object.entries(ASKED_BY).find(([key]) => box.classList.contains(`st-key-${key}`));
  if (!form.does.includes(name)) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  ask(name);
}

// Who goes back with the browser's own button means it; what was typed for the place on the way is not for another.
function wentBack() {
  if (!form.held?.asked?.leads) return;
  window.headAtlasEarly?.letGo(form.held.keys.splice(0));
  form.held.asked = { at: null, leads: true };
}

// What was typed a moment ago is told before the page hears of the way back: told later, it would name the view that
// was left, and lead there again; and a way back on its heels would make the server forget it. The run that takes it
// down puts the view that was left into the address again. Whether there is something to tell.
function tellFirst() {
  const field = deepActive();
  const { edit } = form;
  if (!isField(field) || !inForm(field) || !edit?.at || field.role === "combobox") return false;
  if (Date.now() - edit.at > (field instanceof HTMLTextAreaElement ? PAUSE_MS : LIVE_MS)) return false;
  const to = location.href;
  const since = Date.now();
  let seen = false;
  leave(field);
  form.edit = { ...edit, caret: form.edit?.caret, at: 0 };
  const poll = setInterval(() => {
    const over = seen ? !running() : Date.now() - since > TELL_MS;
    seen ||= running();
    if (location.href === to && !over) return;
    clearInterval(poll);
    if (location.href !== to) history.back();
    else window.dispatchEvent(new PopStateEvent("popstate", { state: history.state }));
  }, 10);
  return true;
}

const listeners = [
  ["input", typed],
  ["keydown", pressed],
  ["paste", pasted],
  ["click", clicked],
  ["focusin", begun],
  ["focusout", strayed],
  ["popstate", wentBack],
  ["pointerdown", () => (wanted.until = Date.now() + 400)],
];
const leaving = () => document.activeElement && leave(document.activeElement);

function install() {
  for (const [name, listener] of listeners) window.addEventListener(name, listener, true);
  window.addEventListener("pagehide", leaving);
  if (window.headAtlasEarly) window.headAtlasEarly.beforeBack = tellFirst;
}

function uninstall() {
  clearTimeout(form.timer);
  // On the way to another view this form goes before the next one comes.
  const edit = form.held?.edit || form.edit;
  window.headAtlasEarly?.keep(form.held, edit && Date.now() - (edit.gone || Date.now()) < GONE_MS ? edit : null);
  form.edit = null;
  drop();
  for (const [name, listener] of listeners) window.removeEventListener(name, listener, true);
  window.removeEventListener("pagehide", leaving);
  if (window.headAtlasEarly) window.headAtlasEarly.beforeBack = null;
}

export default function (component) {
  const { place, kind, prefix, does, answered } = component.data;
  const page = document.documentElement.dataset;
  if (!form.mounted) install();
  else if (form.place !== place) {
    form.edit = null;
    document.querySelector("[data-testid=stMain]")?.scrollTo(0, 0);
    if (deepActive()?.closest?.(JUMP)) leave(deepActive());
  }
  Object.assign(form, { place, kind, prefix, does, answered, mounted: true, send: component.setStateValue });
  page.keys = "ready";
  page.head = place;
  const { keys, asked, edit } = window.headAtlasEarly?.take(place) || { keys: [] };
  // Here again on the way to another place: a request from before the way can lead back for a moment.
  const onTheWay = asked?.at === place;
  if (!form.held && (keys.length || edit || !whole())) hold(onTheWay ? asked : { at: null, leads: true, way: asked });
  form.held?.keys.push(...keys);
  if (edit) form.held.edit = edit;
  return () => {
    form.mounted = false;
    uninstall();
    delete page.keys;
    delete page.head;
  };
}
