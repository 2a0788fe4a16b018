// Keys pressed before the form is there: on a page that is still loading, or on the way from the grid or a link to a
// head or a feature. They are held here and played into the form when it comes (keys_hold.js); a line says so. Where no
// form comes (nobody may write, the address names nothing), they are let go, and the line says that.
//
// This stands in the page itself, before any script of the app has been read.

(() => {
  const REST_MS = 2500;
  const LONGEST_MS = 30000;
  const VIEWS = /\/(head|feature)$/;
  const LEADS = ".cell[data-at], a[href^='head?'], a[href^='feature?']";
  const EDIT_MS = 15000;
  const BEGINS = /^[a-z0-9?/]$/i;
  const state = { keys: [], leads: 0, rest: 0, timer: 0, said: null, since: 0, asked: null, edit: null };

  const ready = () => document.documentElement.dataset.keys === "ready";

  // Whether the page is drawn as far as it will be, without a form. That the server has said all does not tell: a slow
  // browser draws it seconds later, and the scripts of some parts are still on their way then.
  function atRest() {
    const { testScriptState, testConnectionState } = document.querySelector(".stApp")?.dataset || {};
    if (testScriptState !== "notRunning" || testConnectionState !== "CONNECTED") return false;
    const main = document.querySelector("[data-testid=stMain]");
    const drawn = main?.querySelector("[data-testid=stElementContainer]");
    return Boolean(drawn) && !main.querySelector("[data-testid=stSkeleton], .st-key-note-form");
  }

  function active() {
    let node = document.activeElement;
    while (node?.shadowRoot?.activeElement) node = node.shadowRoot.activeElement;
    return node;
  }

  function say(text, forMs) {
    state.said?.remove();
    state.said = null;
    if (!text) return;
    const line = document.createElement("div");
    line.className = "ha-early";
    line.setAttribute("role", "status");
    line.style.cssText =
      "position:fixed;left:50%;bottom:1.5rem;transform:translateX(-50%);z-index:1000000;padding:.4rem .9rem;" +
      "border-radius:.5rem;font:14px/1.5 system-ui,sans-serif;color:#fff;background:#31333f;border:1px solid #8a8c96";
    line.textContent = text;
    document.body.append(line);
    state.said = line;
    if (forMs) setTimeout(() => state.said === line && say(null), forMs);
  }

  function stop() {
    clearInterval(state.timer);
    state.timer = state.leads = state.rest = 0;
  }

  function look() {
    if (ready()) return stop();
    if (!atRest()) state.rest = 0;
    else state.rest ||= Date.now();
    const rested = state.rest && Date.now() - state.rest >= REST_MS;
    if (!rested && Date.now() - state.since < LONGEST_MS) return;
    letGo(state.keys.splice(0), rested ? "There is no form here to type into" : "The form did not come");
    state.asked = null;
    stop();
  }

  function letGo(keys, why) {
    if (keys.length) say(`${why}; what was typed was let go.`, 4000);
  }

  function watch() {
    if (state.timer) return;
    state.since = Date.now();
    state.timer = setInterval(look, 100);
  }

  function coming() {
    return !ready() && (state.leads || (VIEWS.test(location.pathname) && (state.keys.length || !atRest())));
  }

  // Whether a field was taken away in the middle of writing: what is pressed then goes on with it.
  function editing() {
    return state.edit && Date.now() - state.edit.at < EDIT_MS;
  }

  function held(event) {
    const { key, ctrlKey, metaKey, altKey } = event;
    const modified = ctrlKey || metaKey || altKey;
    if (!state.keys.length && !editing()) return !modified && BEGINS.test(key);
    if (modified) return !altKey && /^(enter|s)$/i.test(key);
    return key.length === 1 || ["Enter", "Escape", "Backspace"].includes(key);
  }

  function pressed(event) {
    const field = active()?.matches?.("input:not([type=checkbox], [type=radio]), textarea, [contenteditable=true]");
    if (!event.isTrusted || event.repeat || field || !coming() || !held(event)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    state.keys.push(event);
    watch();
    if (state.keys.length === 1) say("Opening … what you type is kept.");
  }

  // Where somebody goes on purpose, what was asked for before does not matter.
  function forget() {
    state.asked = null;
  }

  function clicked(event) {
    if (event.isTrusted) forget();
    if (ready() || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (!event.composedPath().some((node) => node.matches?.(LEADS))) return;
    state.leads = Date.now();
    state.rest = 0;
    watch();
  }

  window.addEventListener("keydown", pressed, true);
  window.addEventListener("click", clicked, true);
  // The first to hear of it: what a form has to say before goes first, and the page hears then.
  window.addEventListener("popstate", (event) => {
    if (window.headAtlasEarly.beforeBack?.()) return event.stopImmediatePropagation();
    forget();
    letGo(state.keys.splice(0), "That did not open");
  });
  window.headAtlasEarly = {
    beforeBack: null,
    // The keys that wait, for the form that has come, what was asked for when the form before went, and the field of
    // this very place that somebody wrote in then.
    take(place) {
      stop();
      const { asked } = state;
      const edit = editing() && state.edit.place === place ? state.edit : null;
      if (edit) state.edit = null;
      state.asked = null;
      if (state.keys.length) say(null);
      return { keys: state.keys.splice(0), asked, edit };
    },
    // What a form holds for another one, which is not there yet, and what was being written in it.
    keep(held, edit) {
      if (edit) state.edit = { ...edit, at: Date.now() };
      state.keys.push(...(held?.keys.splice(0) || []));
      state.asked = held?.asked?.way || held?.asked || null;
      state.rest = 0;
      if (held) watch();
    },
    // Keys that were for a place that did not come.
    letGo: (keys) => letGo(keys, "That did not open"),
  };
})();
