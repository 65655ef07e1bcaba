/* What a page lets its readers try with mz.js: draw a digit (#mz-try-digits), look into a file (#mz-try-file). Files lie
   beside this script as scripts that hold them in base 64, since a page that was opened from a disk may load nothing else. */
"use strict";
(() => {
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  const $ = (root, query) => root.querySelector(query);
  const count = n => n.toLocaleString("en");
  const percent = p => p > 0.9995 ? "100 %" : `${(100 * p).toFixed(1)} %`;
  const bits = (size, weights) => weights ? `${(8 * size / weights).toFixed(2)} bits a weight` : "no weights";
  function make(name, text, attributes = {}) {
    const e = document.createElement(name);
    if (text !== undefined) e.textContent = text;
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    return e;
  }
  const reason = e => e instanceof mz.MzError ? e.message : `something went wrong (${e.message})`;

  const asked = new Map();
  window.mzFiles = {};
  function fileNamed(name) {  // bytes, once
    if (!asked.has(name)) asked.set(name, new Promise((good, bad) => {
      const s = make("script", undefined, { src: `${here}${name}.js` });
      s.onload = () => good(Uint8Array.from(atob(window.mzFiles[name]), c => c.charCodeAt(0)));
      s.onerror = () => { asked.delete(name); bad(new mz.MzError("the file could not be loaded")); };
      document.head.append(s);
    }));
    return asked.get(name);
  }

  // ---------------------------------------------------------------------------------------- a drawing as the digits were

  const SIDE = 28, BOX = 20, RADIUS = 1.4;

  function far(x, y, [[ax, ay], [bx, by]]) {  // from a segment
    const dx = bx - ax, dy = by - ay, t = Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy || 1)));
    return Math.hypot(x - ax - t * dx, y - ay - t * dy);
  }

  // Strokes, lists of points → 28 × 28 grey values from 0 to 1, as those of MNIST: the longer side of the digit is 20
  // pixels, its centre of mass in the middle; null where nothing is drawn.
  function normalized(strokes) {
    const points = strokes.flat();
    if (!points.length) return null;
    const ends = [0, 1].map(i => [Math.min(...points.map(p => p[i])), Math.max(...points.map(p => p[i]))]);
    const side = Math.max(...ends.map(([a, b]) => b - a)), by = side > 8 ? (BOX - 1 - 2 * RADIUS) / side : 0;
    const middle = ends.map(([a, b]) => (a + b) / 2), at = p => p.map((v, i) => (v - middle[i]) * by + SIDE / 2);
    const segments = strokes.flatMap(s => s.map((p, i) => [at(s[Math.max(0, i - 1)]), at(p)]));
    const grey = new Float32Array(SIDE * SIDE), sums = [0, 0];
    let ink = 0;
    for (let y = 0; y < SIDE; y++) for (let x = 0; x < SIDE; x++) {
      const d = segments.reduce((least, s) => Math.min(least, far(x, y, s)), Infinity), g = Math.max(0, Math.min(1, RADIUS + 0.5 - d));
      grey[y * SIDE + x] = g;
      ink += g;
      sums[0] += g * x;
      sums[1] += g * y;
    }
    const [mx, my] = sums.map(s => Math.round(s / ink - SIDE / 2)), out = new Float32Array(SIDE * SIDE);
    for (let y = 0; y < SIDE; y++) for (let x = 0; x < SIDE; x++) {
      const v = y + my, u = x + mx;
      if (v >= 0 && v < SIDE && u >= 0 && u < SIDE) out[y * SIDE + x] = grey[v * SIDE + u];
    }
    return out;
  }

  function probabilities(logits) {
    const most = Math.max(...logits), e = Array.from(logits, v => Math.exp(v - most)), sum = e.reduce((a, b) => a + b);
    return e.map(v => v / sum);
  }

  // ---------------------------------------------------------------------------------------- draw a digit

  function drawing(root) {
    const files = JSON.parse(root.dataset.files), ink = $(root, ".mz-ink"), pen = ink.getContext("2d"), seen = $(root, ".mz-seen").getContext("2d");
    const nets = [...root.querySelectorAll(".mz-net")], knob = $(root, "input"), chosen = $(root, "output"), said = $(root, ".mz-said");
    const loaded = new Map();
    let strokes = [], grey = null, sample = -1, down = false, cursor = [140, 140], keys = false, turn = 0, soon = 0;

    function networkNamed(name) {
      if (!loaded.has(name)) loaded.set(name, fileNamed(name).then(bytes => {
        const file = mz.read(bytes), run = mz.network(file);
        return { size: bytes.length, weights: file.table().reduce((n, r) => n + r.weights, 0), run };
      }).catch(e => { loaded.delete(name); throw e; }));
      return loaded.get(name);
    }
    const beside = () => files[+knob.value];

    function panel(place, { title, accuracy }) {
      place.replaceChildren(make("h3", title), make("p", "…", { class: "mz-facts" }), make("p", "–", { class: "mz-answer" }));
      const bars = make("ol", undefined, { class: "mz-bars" });
      for (let d = 0; d < 10; d++) {
        const row = make("li", undefined);
        row.append(make("b", d), make("span", undefined, { class: "mz-bar" }), make("i", ""));
        bars.append(row);
      }
      place.append(bars);
      place.dataset.accuracy = accuracy;
    }
    function show(place, net, p) {
      $(place, ".mz-facts").textContent = `${count(net.size)} bytes, ${bits(net.size, net.weights)}; ${place.dataset.accuracy} of 1,000 test digits`;
      const best = p ? p.indexOf(Math.max(...p)) : -1;
      $(place, ".mz-answer").textContent = p ? best : "–";
      place.querySelectorAll("li").forEach((row, d) => {
        row.classList.toggle("mz-best", d === best);
        $(row, ".mz-bar").style.setProperty("--p", p ? p[d] : 0);
        $(row, "i").textContent = p ? percent(p[d]) : "";
      });
      return p ? `${best} (${percent(p[best])})` : "";
    }

    async function answer(aloud) {
      const mine = ++turn, answers = [];
      for (const [i, about] of [files.at(-1), beside()].entries()) try {
        const net = await networkNamed(about.name);
        if (mine !== turn) return;
        answers.push(`${about.title}, ${count(net.size)} bytes: ${show(nets[i], net, grey && probabilities(net.run({ shape: [1, 1, SIDE, SIDE], data: grey }).data))}`);
      } catch (e) {
        $(nets[i], ".mz-facts").textContent = reason(e);
      }
      if (aloud) said.textContent = grey ? `Read as: ${answers.join("; ")}.` : "";
    }

    function paint() {
      pen.fillStyle = "#000";
      pen.fillRect(0, 0, 280, 280);
      if (!strokes.length && grey) pen.drawImage(seen.canvas, 0, 0, 280, 280);
      pen.strokeStyle = pen.fillStyle = "#fff";
      pen.lineWidth = 24;
      pen.lineCap = pen.lineJoin = "round";
      for (const s of strokes) {
        pen.beginPath();
        pen.moveTo(...s[0]);
        pen.lineTo(s[0][0] + 0.1, s[0][1]);  // a dot, if nothing follows
        for (const p of s.slice(1)) pen.lineTo(...p);
        pen.stroke();
      }
      if (keys) {
        pen.strokeStyle = down ? "#f33" : "#6cf";
        pen.lineWidth = 3;
        pen.beginPath();
        pen.arc(...cursor, 8, 0, 7);
        pen.stroke();
      }
    }
    function changed(aloud) {
      cancelAnimationFrame(soon);
      soon = 0;
      if (strokes.length || sample < 0) grey = normalized(strokes);
      const picture = seen.createImageData(SIDE, SIDE);
      for (let i = 0; i < SIDE * SIDE; i++) picture.data.set([...Array(3).fill(255 * (grey ? grey[i] : 0)), 255], 4 * i);
      seen.putImageData(picture, 0, 0);
      paint();
      answer(aloud);
    }
    function begin(p) {
      if (sample >= 0) strokes = [];
      sample = -1;
      strokes.push([p]);
    }
    function clear() {
      strokes = [];
      sample = -1;
      down = false;
      changed(true);
    }

    const place = e => { const r = ink.getBoundingClientRect(); return [(e.clientX - r.left) * 280 / r.width, (e.clientY - r.top) * 280 / r.height]; };
    const later = () => { soon ||= requestAnimationFrame(() => changed(false)); };
    ink.addEventListener("pointerdown", e => {
      if (e.button) return;
      e.preventDefault();
      ink.focus({ preventScroll: true });
      ink.setPointerCapture(e.pointerId);
      keys = false;
      down = true;
      begin(place(e));
      later();
    });
    ink.addEventListener("pointermove", e => {
      if (!down || keys) return;
      const between = e.getCoalescedEvents?.() ?? [];
      for (const m of between.length ? between : [e]) strokes.at(-1).push(place(m));
      later();
    });
    for (const end of ["pointerup", "pointercancel"]) ink.addEventListener(end, () => { if (down && !keys) { down = false; changed(true); } });
    ink.addEventListener("keydown", e => {
      const move = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] }[e.key];
      if (move) {
        cursor = cursor.map((v, i) => Math.max(10, Math.min(270, v + move[i])));
        keys = true;
        if (down) strokes.at(-1).push(cursor);
        if (down) changed(false); else paint();
      } else if (e.key === " " || e.key === "Enter") {
        keys = true;
        down = !down;
        if (down) begin(cursor);
        changed(!down);
        said.textContent ||= down ? "Pen down." : "Pen up.";
      } else if (e.key === "Escape" || e.key === "Delete") clear();
      else return;
      e.preventDefault();
    });
    ink.addEventListener("blur", () => { keys = false; down = false; paint(); });
    $(root, ".mz-clear").addEventListener("click", clear);
    $(root, ".mz-sample").addEventListener("click", async () => {
      try {
        const { shape, data } = mz.read(await fileNamed("digits")).tensor("x");
        strokes = [];
        sample = (sample + 1) % shape[0];
        grey = Float32Array.from(data.subarray(sample * SIDE * SIDE, (sample + 1) * SIDE * SIDE), v => v / 255);
        changed(true);
      } catch (e) { said.textContent = reason(e); }
    });
    function turned(aloud) {
      const about = beside();
      chosen.textContent = `${about.title}, ${count(about.bytes)} bytes`;
      knob.setAttribute("aria-valuetext", chosen.textContent);
      panel(nets[1], about);
      if (aloud) answer(true);
    }
    knob.addEventListener("input", () => turned(true));

    knob.max = files.length - 2;
    knob.value = files.findIndex(f => f.bytes < 1e5);  // the large ones are loaded when somebody asks for them
    knob.disabled = false;
    panel(nets[0], files.at(-1));
    turned(false);
    paint();
    for (const [i, about] of [files.at(-1), beside()].entries()) $(nets[i], ".mz-facts").textContent = `${count(about.bytes)} bytes; ${about.accuracy} of 1,000 test digits`;
    root.dataset.ready = "";
  }

  // ---------------------------------------------------------------------------------------- look into a file

  const ROWS = 300;

  function looking(root) {
    const said = $(root, ".mz-said"), where = $(root, ".mz-where"), rows = $(root, ".mz-rows"), input = $(root, "input"), drop = $(root, ".mz-drop");

    function table(found, file) {
      const t = make("table"), head = make("tr");
      t.append(make("caption", `${count(found.length)} tensors${found.length > ROWS ? `, of which the first ${ROWS}` : ""}`), make("thead"), make("tbody"));
      for (const h of ["tensor", "shape", "kind", "layer", "bits", "bytes", "share"]) head.append(make("th", h, { scope: "col" }));
      $(t, "thead").append(head);
      const line = (name, ...cells) => {
        const row = make("tr");
        row.append(make("th", name, { scope: "row" }), ...cells.map(c => make("td", c)));
        $(t, "tbody").append(row);
      };
      const share = n => `${(100 * n / file.size).toFixed(1)} %`;
      for (const r of found.slice(0, ROWS)) line(r.name, r.shape.join("×"), r.what, r.layer, r.bytes && r.weights ? (8 * r.bytes / r.weights).toFixed(2) : "", count(r.bytes), share(r.bytes));
      const rest = file.size - found.reduce((n, r) => n + r.bytes, 0);
      line("manifest, directory, gaps", "", "", "", "", count(rest), share(rest));
      return t;
    }
    function bar(found, size) {  // where the bytes are, in the order of the model
      const shares = [...found.filter(r => r.bytes).map(r => [r.name, r.bytes]), ["manifest, directory, gaps", size - found.reduce((n, r) => n + r.bytes, 0)]];
      where.replaceChildren(...shares.map(([name, n], i) => make("span", undefined, { title: `${name}: ${count(n)} bytes`, style: `flex-grow: ${n}`, class: i === shares.length - 1 ? "mz-rest" : "" })));
      const largest = shares.slice().sort((a, b) => b[1] - a[1]).slice(0, 3).map(([name, n]) => `${name} ${(100 * n / size).toFixed(0)} %`);
      where.setAttribute("aria-label", `Where the bytes are: ${largest.join(", ")}`);
    }
    function show(bytes, name) {
      where.hidden = rows.hidden = true;
      try {
        const file = mz.read(bytes), found = file.table(), weights = found.reduce((n, r) => n + r.weights, 0), { architecture } = file.manifest;
        bar(found, file.size);
        rows.replaceChildren(table(found, file));
        where.hidden = rows.hidden = false;
        said.textContent = `${name}: ${count(file.size)} bytes, ${architecture ? `architecture ${architecture.name}, ` : ""}format ${file.version}, ${count(weights)} numbers, ${bits(file.size, weights)}.`;
      } catch (e) { said.textContent = `${name}: ${reason(e)}.`; }
    }
    async function take(file) {
      if (!file) return;
      if (file.size > 2 ** 29) said.textContent = `${file.name}: it has ${count(file.size)} bytes, too many for a page.`;
      else show(await file.arrayBuffer(), file.name);
    }
    input.addEventListener("change", () => take(input.files[0]));
    for (const over of ["dragenter", "dragover"]) root.addEventListener(over, e => { e.preventDefault(); drop.classList.add("mz-over"); });
    for (const out of ["dragleave", "drop"]) root.addEventListener(out, () => drop.classList.remove("mz-over"));
    root.addEventListener("drop", e => { e.preventDefault(); take(e.dataTransfer.files[0]); });
    $(root, ".mz-sample").addEventListener("click", () => fileNamed("record").then(b => show(b, "record.mz"), e => { said.textContent = reason(e); }));
    root.dataset.ready = "";
  }

  window.mzTry = { normalized, probabilities, fileNamed };
  document.querySelectorAll("#mz-try-digits").forEach(drawing);
  document.querySelectorAll("#mz-try-file").forEach(looking);
})();
