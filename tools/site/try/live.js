/* Explorers that compute: clip and levels (#mz-try-clip), bits and groups (#mz-try-groups), a queue (#mz-try-queue). What they
   show is what the library's functions give: float32 arithmetic, ties to even, scales of 16 bits, Python's random numbers. */
"use strict";
const mzLive = (() => {
  const f32 = Math.fround;
  function evenly(x) {  // to the nearest whole number, ties to even
    const r = Math.round(x);
    return r - x === 0.5 && r % 2 ? r - 1 : r;
  }
  function fromHalf(h) {
    const e = h >> 10 & 31, m = h & 1023, v = e ? (1 + m / 1024) * 2 ** (e - 15) : m / 1024 * 2 ** -14;
    return h >> 15 ? -v : v;
  }
  function toHalf(x) {  // a number above 0 as the next float16, so that nothing is clipped
    const unit = 2 ** (Math.max(Math.floor(Math.log2(x)), -14) - 10);
    return Math.ceil(x / unit) * unit;
  }
  const layers = {};
  function weights(name) {  // of one layer, as float32
    return layers[name] ??= Float32Array.from(new Uint16Array(Uint8Array.from(atob(mzWeights[name].data), c => c.charCodeAt(0)).buffer), fromHalf);
  }
  const middleOf = levels => levels === 2 ? 0.5 : levels >> 1, stepsOf = levels => Math.max(levels - 1 >> 1, 0.5);
  const decibels = (signal, error) => 10 * Math.log10(signal / error);
  const largestOf = w => w.reduce((m, v) => Math.max(m, Math.abs(v)), 0);

  function clip(w, levels, limit) {  // one symmetric ruler from -limit to limit
    const scale = f32(f32(limit) / stepsOf(levels)), middle = middleOf(levels);
    let signal = 0, rounding = 0, clipping = 0, beyond = 0;
    for (const v of w) {
      const code = evenly(f32(f32(v / scale) + middle)), kept = Math.min(Math.max(code, 0), levels - 1), e = (v - f32(scale * (kept - middle))) ** 2;
      signal += v * v;
      if (code !== kept) { clipping += e; beyond++; } else rounding += e;
    }
    const marks = Array.from({ length: levels }, (_, k) => f32(scale * (k - middle)));
    return { db: decibels(signal, rounding + clipping), clipped: clipping / (rounding + clipping), beyond, marks };
  }
  function groups(w, bits, group) {  // symmetric codes of 2 bits or more, one scale of 16 bits for each run of weights
    const levels = 2 ** bits, middle = middleOf(levels), runs = Math.ceil(w.length / group);
    let signal = 0, error = 0;
    for (let at = 0; at < w.length; at += group) {
      const run = w.subarray(at, at + group);
      const scale = toHalf(f32(largestOf(run) / stepsOf(levels)));
      for (const v of run) {
        const back = f32(scale * (Math.min(Math.max(evenly(f32(v / scale)) + middle, 0), levels - 1) - middle));
        signal += v * v;
        error += (v - back) ** 2;
      }
    }
    const codes = Math.ceil(w.length * bits / 8), scales = 2 * runs;
    return { db: decibels(signal, error), codes, scales, bits: 8 * (codes + scales) / w.length };
  }

  function dice(seed) {  // random.Random(seed).random of Python: the Mersenne Twister (Matsumoto and Nishimura 1998)
    const n = 624, s = new Uint32Array(n);
    s[0] = 19650218;
    for (let i = 1; i < n; i++) s[i] = Math.imul(1812433253, s[i - 1] ^ s[i - 1] >>> 30) + i;
    let i = 1;
    const next = () => { if (++i >= n) { s[0] = s[n - 1]; i = 1; } };
    for (let k = n; k; k--, next()) s[i] = (s[i] ^ Math.imul(s[i - 1] ^ s[i - 1] >>> 30, 1664525)) + seed;
    for (let k = n - 1; k; k--, next()) s[i] = (s[i] ^ Math.imul(s[i - 1] ^ s[i - 1] >>> 30, 1566083941)) - i;
    s[0] = 0x80000000;
    let at = n;
    function word() {
      if (at === n) {
        for (let k = 0; k < n; k++) {
          const y = s[k] & 0x80000000 | s[(k + 1) % n] & 0x7fffffff;
          s[k] = s[(k + 397) % n] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0);
        }
        at = 0;
      }
      let y = s[at++];
      y ^= y >>> 11; y ^= y << 7 & 0x9d2c5680; y ^= y << 15 & 0xefc60000;
      return (y ^ y >>> 18) >>> 0;
    }
    return () => ((word() >>> 5) * 67108864 + (word() >>> 6)) / 9007199254740992;
  }
  function serve(rate, workers, most, requests = 300, seed = 0, fixed = 0.7, each = 0.3) {  // the chapter's, line by line
    const random = dice(seed), come = [], start = [], leave = [], free = new Array(workers).fill(0);
    for (let t = 0, i = 0; i < requests; i++) come.push(t += -Math.log(1 - random()) / rate);
    while (leave.length < requests) {
      const i = leave.length, k = free.indexOf(Math.min(...free)), begin = Math.max(free[k], come[i]);
      let size = 0;
      while (size < most && i + size < requests && come[i + size] <= begin) size++;
      const end = free[k] = begin + fixed + each * size;
      for (let j = 0; j < size; j++) { start.push(begin); leave.push(end); }
    }
    const stay = come.reduce((sum, t, i) => sum + leave[i] - t, 0) / requests;
    return { come, start, leave, stay, inside: stay * requests / (Math.max(...leave) - come[0]) };
  }

  // ---------------------------------------------------------------------------------------- pictures

  const $ = (root, query) => root.querySelector(query);
  function draw(root, name, parts, told) {  // SVG from [tag, attributes, text?]
    const box = $(root, `svg.${name}`);
    box.setAttribute("aria-label", told);
    box.replaceChildren(...parts.map(([tag, attributes, text]) => {
      const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, typeof v === "number" ? +v.toFixed(2) : v);
      if (text !== undefined) e.textContent = text;
      return e;
    }));
  }
  const number = (root, name) => +$(root, `[name=${name}]`).value;
  function live(root, shown) {  // shown() gives what each slider says
    function turn() {
      for (const [name, text] of Object.entries(shown())) {
        const knob = $(root, `[name=${name}]`);
        knob.nextElementSibling.value = text;
        knob.setAttribute("aria-valuetext", text);
      }
    }
    $(root, "fieldset").disabled = false;
    root.addEventListener("input", turn);
    turn();
    root.dataset.ready = "";
  }
  const words = (x, y, text, more = {}) => ["text", { x, y, ...more }, text];

  function clipping(root) {
    function shown() {
      const name = $(root, "select").value, w = weights(name), most = largestOf(w), share = number(root, "clip"), levels = number(root, "levels");
      const at = clip(w, levels, most * share / 100), bins = new Array(120).fill(0), X = v => 300 + 290 * v / (1.05 * most);
      for (const v of w) bins[Math.min(119, Math.floor((v / (1.05 * most) + 1) * 60))]++;
      const high = Math.log10(Math.max(...bins) + 1), bars = bins.map((n, i) => ["rect", { x: 10 + i * 580 / 120, width: 4.6, y: 150 - 130 * Math.log10(n + 1) / high, height: 130 * Math.log10(n + 1) / high, class: "mz-grey" }]);
      const marks = at.marks.map(m => ["line", { x1: X(m), x2: X(m), y1: 20, y2: 156, class: "mz-mark" }]);
      const said = `${at.db.toFixed(1)} dB; ${at.beyond} of ${w.length} weights are clipped and make ${(100 * at.clipped).toFixed(0)} % of the squared error`;
      draw(root, "mz-one", [...bars, ...marks, words(300, 172, "weight; height: log of how many; lines: the levels")], `Histogram of the weights with ${levels} levels. ${said}`);
      const all = Array.from({ length: 46 }, (_, i) => 10 + 2 * i), curve = all.map(p => clip(w, levels, most * p / 100).db);
      const top = Math.max(...curve, at.db), low = Math.min(...curve, at.db), Y = d => 20 + 90 * (top - d) / (top - low || 1), Z = p => 40 + 540 * (p - 10) / 90;
      const best = all[curve.indexOf(Math.max(...curve))];
      draw(root, "mz-two", [["polyline", { points: all.map((p, i) => `${Z(p).toFixed(1)},${Y(curve[i]).toFixed(1)}`).join(" "), class: "mz-line" }], ["circle", { cx: Z(share), cy: Y(at.db), r: 6, class: "mz-here" }], words(300, 132, `clip, % of the largest: ${levels} levels are best at about ${best} %, ${top.toFixed(1)} dB`)], `Decibels over the clip: best at about ${best} %`);
      $(root, ".mz-said").textContent = said;
      return { clip: `${share} % of ${most.toFixed(3)}`, levels };
    }
    live(root, shown);
  }

  const SIZES = [4, 8, 16, 32, 64, 128, 384], WIDTHS = [2, 3, 4, 5, 6];
  function sharing(root) {
    const every = {};
    function shown() {
      const name = $(root, "select").value, w = weights(name), bits = number(root, "bits"), size = SIZES[number(root, "group")];
      const all = every[name] ??= WIDTHS.flatMap(b => SIZES.map(g => ({ b, g, ...groups(w, b, g) })));
      const at = all.find(a => a.b === bits && a.g === size), X = b => 40 + 540 * (b - 2) / 8.2, Y = d => 150 - 130 * d / 40;
      const better = all.filter(a => a.bits <= at.bits && a.db > at.db).sort((a, b) => b.db - a.db)[0];
      const dots = all.map(a => ["circle", { cx: X(a.bits), cy: Y(a.db), r: a === at ? 7 : 3.5, class: a === at ? "mz-here" : "mz-dot" }]);
      const axis = [2, 4, 6, 8, 10].map(b => words(X(b), 168, `${b}`)), side = [0, 20, 40].map(d => words(24, Y(d) + 4, `${d}`));
      const said = `${at.bits.toFixed(2)} bits a weight (codes ${at.codes.toLocaleString("en")} bytes, scales ${at.scales.toLocaleString("en")}), ${at.db.toFixed(1)} dB. ` + (better ? `${better.b} bits in groups of ${better.g} take ${better.bits.toFixed(2)} and keep ${better.db.toFixed(1)} dB.` : "None of the others is better with no more bits.");
      draw(root, "mz-one", [...dots, ...axis, ...side, words(300, 184, "bits a weight; upwards: dB; every choice a point")], `Bits a weight and decibels of ${all.length} choices. ${said}`);
      $(root, ".mz-said").textContent = said;
      return { bits, group: size };
    }
    live(root, shown);
  }

  function queueing(root) {
    function shown() {
      const rate = number(root, "rate") / 10, workers = number(root, "workers"), most = 2 ** number(root, "most"), n = 60;
      const q = serve(rate, workers, most), end = Math.max(...q.leave.slice(0, n)), X = t => 10 + 580 * t / end, batches = [...new Set(q.leave)];
      const rows = q.come.slice(0, n).flatMap((t, i) => {
        const y = 4 + 2.9 * i, b = batches.indexOf(q.leave[i]) % 2;
        return [["line", { x1: X(t), x2: X(q.start[i]), y1: y, y2: y, class: "mz-wait" }], ["line", { x1: X(q.start[i]), x2: X(q.leave[i]), y1: y, y2: y, class: `mz-serve mz-serve-${b}` }]];
      });
      const wall = workers * most / (0.7 + 0.3 * most), said = `average stay ${q.stay.toFixed(2)}, on average ${q.inside.toFixed(1)} in the system; ${workers === 1 ? "one worker does" : `${workers} workers do`} at most ${wall.toFixed(2)} requests in a unit of time${rate > wall ? ": the line grows as long as requests come" : ""}`;
      draw(root, "mz-one", rows, `60 requests, waiting and being served: ${said}`);
      $(root, ".mz-said").textContent = said;
      return { rate: rate.toFixed(1), workers, most };
    }
    live(root, shown);
  }

  if (typeof document !== "undefined") {
    document.querySelectorAll("#mz-try-clip").forEach(clipping);
    document.querySelectorAll("#mz-try-groups").forEach(sharing);
    document.querySelectorAll("#mz-try-queue").forEach(queueing);
  }
  return { weights, clip, groups, serve };
})();
