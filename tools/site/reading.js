// What a page does for its readers beside smalldocs.js: boxes that scroll can be reached by keyboard, the telephone's
// sidebar says whether it is open, and search.
(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- boxes that scroll: a stop for the keyboard, with a name, as long as they do
  const BOXES = {
    Code: ".sourceCode pre",
    Output: ".cell-output pre",
    Table: ".sd-table, .cell-output-display, .cell-output-display > div, .mz-rows",
    Formula: ".katex-display, .math.display",
    Documentation: ".api",
    Picture: ".mz-frame",
  };
  const scrolls = (box) => {
    const wide = box.scrollWidth > box.clientWidth, high = box.scrollHeight > box.clientHeight, may = /auto|scroll/;
    if (!wide && !high) return false;
    const style = getComputedStyle(box);
    return (wide && may.test(style.overflowX)) || (high && may.test(style.overflowY));
  };
  const stop = (box, name) => {
    const now = scrolls(box);
    if (now === "stop" in box.dataset) return;
    if (now) Object.assign(box, { tabIndex: 0, role: "group", ariaLabel: name + ", scrolls" });
    else ["tabindex", "role", "aria-label"].forEach((a) => box.removeAttribute(a));
    if (now) box.dataset.stop = "";
    else delete box.dataset.stop;
  };
  const text = document.querySelector("main") || document;
  const mark = () => Object.entries(BOXES).forEach(([name, selector]) => all(selector, text).forEach((box) => stop(box, name)));
  let waiting = 0;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(mark, 100); };
  mark();
  for (const what of ["load", "resize", "input"]) window.addEventListener(what, soon);
  document.addEventListener("toggle", soon, true);

  // ---- the sidebar of narrow screens
  const sidebar = document.getElementById("quarto-sidebar"), opener = document.querySelector(".quarto-btn-toggle");
  const say = () => opener.setAttribute("aria-expanded", sidebar.classList.contains("show"));
  if (sidebar && opener) {
    say();
    new MutationObserver(say).observe(sidebar, { attributeFilter: ["class"] });
    sidebar.addEventListener("keydown", (e) => {
      if (e.key !== "Escape" || !sidebar.classList.contains("show")) return;
      opener.click();
      opener.focus();
    });
  }

  // ---- search: words of a question, by how rare they are and where they stand; chapters before the workshop and the reference
  const IDLE = new Set(("a an and are as at be by can do does for from has have how i if in is it its me my of on or that the this to " +
    "was what when where which why with you your").split(" "));
  const KINDS = { chapter: 1, course: 0.6, workshop: 0.4, reference: 0.2 };
  const NAMES = { workshop: /^workshop_/, reference: /^api/, course: /^(course|glossary|references)/, chapter: /./ };
  const kindOf = (href) => Object.keys(NAMES).find((kind) => NAMES[kind].test(href));
  const HAN = /\p{Script=Han}/u;  // words that no spaces part from others
  const stem = (word) => word.replace(/(?:ing|ed|es|s|e)$/, (end) => (word.length - end.length < 3 ? end : ""));
  const offset = (document.querySelector('meta[name="smalldocs:offset"]') || { content: "./" }).content;
  let entries = null;
  const index = async () => {
    if (entries) return;
    await new Promise((done) => {
      const script = document.createElement("script");
      Object.assign(script, { src: offset + "search.js", onload: done, onerror: done });
      document.head.append(script);
    });
    const lower = (e) => ({ name: e.title.toLowerCase(), part: e.section.toLowerCase(), low: e.text.toLowerCase() });
    entries = (window.searchIndex || []).map((e) => ({ ...e, ...lower(e), kind: kindOf(e.href) }));
  };
  const count = (text, pattern) => {
    let n = 0;
    for (pattern.lastIndex = 0; n < 9 && pattern.test(text); ) n++;
    return n;
  };
  const found = (question, limit) => {
    const once = (text, term) => Math.min(1, count(text, term));
    const said = question.toLowerCase().match(/[\p{L}\p{N}_]+/gu) || [];
    const words = said.filter((w) => !IDLE.has(w));
    const begins = (t) => new RegExp((HAN.test(t) ? "" : "(?<![\\p{L}\\p{N}_])") + t, "gu");
    const whole = (w) => (HAN.test(w) ? begins(w) : begins(w + "(?![\\p{L}\\p{N}_])"));
    const terms = (words.length ? words : said).map((w) => [begins(stem(w)), whole(w)]);
    const hits = terms.map(([t, exact]) => entries.map((e) => {
      const n = count(e.low, t) + count(e.low, exact);
      return 2 * once(e.part, t) + 2 * once(e.part, exact) + 2 * once(e.name, t) + (3 * n) / (n + 4);
    }));
    const rare = hits.map((h) => Math.log(1 + entries.length / (1 + h.filter(Boolean).length)));
    const phrase = said.length > 1 ? said.join(" ") : null;
    const scored = entries.map((e, i) => {
      const met = hits.filter((h) => h[i]).length / terms.length;
      const sum = hits.reduce((s, h, t) => s + h[i] * rare[t], 0) * met ** 3 * KINDS[e.kind];
      return [sum * (phrase && (e.part + " " + e.low).includes(phrase) ? 2 : 1), i];
    }).filter(([s]) => s).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    const pages = new Map();
    return scored.map(([, i]) => entries[i]).filter((e) => {
      const n = (pages.get(e.title) || 0) + 1;
      pages.set(e.title, n);
      return n <= 3;
    }).slice(0, limit);
  };
  const safe = (s) => s.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const part = (text, question) => {
    const words = (question.match(/[\p{L}\p{N}_]+/gu) || []).filter((w) => !IDLE.has(w.toLowerCase()) && (w.length > 1 || HAN.test(w)));
    const shape = (w) => (HAN.test(w) ? w : "(?<![\\p{L}\\p{N}_])" + stem(w) + "[\\p{L}\\p{N}_]*");
    const marks = new RegExp(words.map(shape).join("|"), "giu");
    const from = Math.max(0, (words.length ? text.search(marks) : 0) - 50), shown = text.slice(from, from + 180);
    return (from ? "…" : "") + (words.length ? safe(shown).replace(marks, "<mark>$&</mark>") : safe(shown));
  };
  const entry = (question) => (e) => {
    const page = e.section && e.section !== e.title ? e.title : "", kind = e.kind === "chapter" ? "" : e.kind;
    const line = (what, html) => `<div class="search-result-${what}">${html}</div>`;
    const lines = line("title", safe(e.section || e.title)) + line("section", safe(`${page} ${kind}`)) + line("text", part(e.text, question));
    return `<a class="search-result" href="${offset}${safe(e.href)}">${lines}</a>`;
  };
  all(".smalldocs-search").forEach((box) => {
    const input = box.querySelector("input"), results = box.querySelector(".smalldocs-search-results");
    const status = document.createElement("span");
    Object.assign(status, { className: "visually-hidden", role: "status" });
    box.append(status);
    let active = -1, timer = 0;
    const hide = () => results.classList.remove("show");
    const run = async () => {
      const question = input.value.trim();
      if (question.length < 2 && !HAN.test(question)) return hide();
      await index();
      const place = input.getBoundingClientRect(), width = Math.min(560, innerWidth - 16);
      const left = Math.max(8, Math.min(place.left, innerWidth - width - 8));
      const edges = { top: place.bottom + 4, left, width, maxHeight: innerHeight - place.bottom - 16 };
      for (const [side, pixels] of Object.entries(edges)) results.style[side] = pixels + "px";
      const hits = found(question, 12);
      status.textContent = `${hits.length} found`;
      results.innerHTML = hits.map(entry(question)).join("") || '<div class="search-none">Nothing found</div>';
      results.classList.add("show");
      active = -1;
    };
    input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(run, 120); });
    input.addEventListener("focus", () => { if (input.value.trim()) run(); });
    input.addEventListener("keydown", (e) => {
      const items = all(".search-result", results), step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
      if (e.key === "Escape") { hide(); input.blur(); }
      if (!items.length) return;
      if (step) {
        active = (active + step + items.length + (active < 0 && step < 0)) % items.length;
        items.forEach((item, i) => item.classList.toggle("active", i === active));
        items[active].scrollIntoView({ block: "nearest" });
      } else if (e.key === "Enter") (items[active] || items[0]).click();
      if (step || e.key === "Enter") e.preventDefault();
    });
    document.addEventListener("click", (e) => { if (!box.contains(e.target)) hide(); });
    document.addEventListener("keydown", (e) => { if (e.key === "Escape") hide(); });
  });
})();
