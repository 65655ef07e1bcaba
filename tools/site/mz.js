/* A reader of .mz files in JavaScript, for browsers and Node. It was written from the page "the format, specified", and
   needs nothing else.

     const file = mz.read(bytes)      an opened file: version, manifest, table(), info
     file.tensor("fc1.weight")        {shape, dtype, data}: the numbers that the file stands for
     mz.network(file)                 ({shape, data}, …) → {shape, data}: the model, in float32

   Whatever is wrong with a file is an MzError that says so, before memory is taken for it; so is what it does not know: the
   kind "gguf coded", complex numbers, files of 4 GiB, builders other than LeNet5 and LeNet300 (a graph needs none), layers
   that compute in integers, and models in other numbers than float32. */
"use strict";
const mz = (() => {
  class MzError extends Error {}
  MzError.prototype.name = "MzError";
  const demand = (fine, says) => { if (!fine) throw new MzError(says); };
  const quoted = x => { const s = JSON.stringify(x) ?? String(x); return s.length > 60 ? s.slice(0, 57) + "…" : s; };
  const MOST = 2 ** 26;      // numbers in a tensor, bytes in a stream: what a page can hold
  const has = (table, name) => typeof name === "string" && Object.hasOwn(table, name);
  const product = shape => shape.reduce((a, b) => a * b, 1);
  const isSize = n => Number.isSafeInteger(n) && n >= 0;
  const bitsFor = levels => Math.max(1, 32 - Math.clz32(levels - 1));

  // ------------------------------------------------------------------------------------------------ bytes

  const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });
  function crc32(data) {
    let c = -1;
    for (let i = 0; i < data.length; i++) c = TABLE[(c ^ data[i]) & 255] ^ (c >>> 8);
    return (c ^ -1) >>> 0;
  }

  class Bytes {  // what is read from the front, and must be there
    constructor(data, what) { this.data = data; this.at = 0; this.what = what; }
    get left() { return this.data.length - this.at; }
    take(n) {
      demand(isSize(n) && n <= this.left, `${this.what} is cut off`);
      return this.data.subarray(this.at, this.at += n);
    }
    byte() { return this.take(1)[0]; }
    number() {  // LEB128
      let n = 0;
      for (let by = 1; ; by *= 128) {
        const b = this.byte();
        n += (b & 127) * by;
        demand(n <= Number.MAX_SAFE_INTEGER && by < 2 ** 56, `${this.what} holds a number that is too large`);
        if (b < 128) return n;
      }
    }
    piece() { return this.take(this.number()); }
    rest() { return this.take(this.left); }
    end() { demand(!this.left, `${this.what} has bytes left over`); }
  }

  // ------------------------------------------------------------------------------------------------ deflate (RFC 1951)

  class Deflated {
    constructor(data, at) { this.data = data; this.at = at; this.hold = this.held = 0; }
    bits(n) {  // n is 13 at most
      while (this.held < n) {
        demand(this.at < this.data.length, "its manifest is cut off");
        this.hold |= this.data[this.at++] << this.held;
        this.held += 8;
      }
      const out = this.hold & (1 << n) - 1;
      this.hold >>>= n;
      this.held -= n;
      return out;
    }
    symbol(code) {  // canonical Huffman, a bit at a time
      let first = 0, index = 0, word = 0;
      for (let length = 1; length < 16; length++) {
        word = word << 1 | this.bits(1);
        const count = code.counts[length];
        if (word - first < count) return code.symbols[index + word - first];
        index += count;
        first = first + count << 1;
      }
      throw new MzError("its manifest cannot be unpacked");
    }
  }
  function huffman(lengths) {
    const counts = new Uint16Array(16), at = new Uint16Array(17), symbols = new Uint16Array(lengths.length);
    for (const n of lengths) counts[n]++;
    counts[0] = 0;
    let room = 1;
    for (let n = 1; n < 16; n++) {
      at[n + 1] = at[n] + counts[n];
      demand((room = 2 * room - counts[n]) >= 0, "its manifest cannot be unpacked");
    }
    lengths.forEach((n, s) => { if (n) symbols[at[n]++] = s; });
    return { counts, symbols };
  }
  const ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
  const FIXED = [huffman(Array.from({ length: 288 }, (_, i) => i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8)), huffman(Array(30).fill(5))];

  function tables(z) {
    const literals = z.bits(5) + 257, distances = z.bits(5) + 1, n = z.bits(4) + 4, few = Array(19).fill(0), lengths = [];
    for (let i = 0; i < n; i++) few[ORDER[i]] = z.bits(3);
    const code = huffman(few);
    while (lengths.length < literals + distances) {
      const s = z.symbol(code);
      demand(s !== 16 || lengths.length, "its manifest cannot be unpacked");
      if (s < 16) lengths.push(s);
      else lengths.push(...Array(s === 16 ? 3 + z.bits(2) : s === 17 ? 3 + z.bits(3) : 11 + z.bits(7)).fill(s === 16 ? lengths.at(-1) : 0));
    }
    demand(lengths.length === literals + distances, "its manifest cannot be unpacked");
    return [huffman(lengths.slice(0, literals)), huffman(lengths.slice(literals))];
  }

  // A deflate stream: its text, and where it ends. `words` is a preset dictionary.
  function inflate(data, most, words = new Uint8Array()) {
    const z = new Deflated(data, 0);
    let out = new Uint8Array(Math.min(most, 4 * data.length + 1024) + words.length), n = words.length, last;
    const room = by => {
      demand(n + by - words.length <= most, `its manifest unpacks to more than ${most} bytes`);
      if (n + by > out.length) { const more = new Uint8Array(2 * (n + by)); more.set(out.subarray(0, n)); out = more; }
    };
    out.set(words);
    do {
      last = z.bits(1);
      const kind = z.bits(2);
      demand(kind < 3, "its manifest cannot be unpacked");
      if (!kind) {
        z.at -= z.held >> 3;
        z.hold = z.held = 0;
        const here = data.subarray(z.at, z.at + 4), length = here[0] | here[1] << 8;
        demand(here.length === 4 && length === (~(here[2] | here[3] << 8) & 65535) && z.at + 4 + length <= data.length, "its manifest is cut off");
        room(length);
        out.set(data.subarray(z.at + 4, z.at += 4 + length), n);
        n += length;
        continue;
      }
      const [literal, distance] = kind === 1 ? FIXED : tables(z);
      for (let s; (s = z.symbol(literal)) !== 256;) {
        if (s < 256) { room(1); out[n++] = s; continue; }
        demand(s < 286, "its manifest cannot be unpacked");
        const more = s < 265 || s === 285 ? 0 : s - 261 >> 2;
        const length = s < 265 ? s - 254 : s === 285 ? 258 : (4 + (s - 265) % 4 << more) + 3 + z.bits(more);
        const d = z.symbol(distance), extra = d < 4 ? 0 : (d >> 1) - 1;
        const back = d < 4 ? d + 1 : (2 + d % 2 << extra) + 1 + z.bits(extra);
        demand(d < 30 && back <= n, "its manifest cannot be unpacked");
        room(length);
        for (let i = 0; i < length; i++, n++) out[n] = out[n - back];
      }
    } while (!last);
    return { text: out.subarray(words.length, n), end: z.at - (z.held >> 3) };
  }

  // ------------------------------------------------------------------------------------------------ Zstandard (RFC 8878)

  const damaged = () => { throw new MzError("a Zstandard frame is damaged"); };
  const BASES = (first, extras) => { let at = first; return extras.map(e => { const b = at; at += 2 ** e; return b; }); };
  const LITERAL_BITS = [...Array(16).fill(0), 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
  const MATCH_BITS = [...Array(32).fill(0), 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
  const LITERAL_BASES = BASES(0, LITERAL_BITS), MATCH_BASES = BASES(3, MATCH_BITS);
  const USUAL = {
    literals: [6, [4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1]],
    offsets: [5, [1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1]],
    matches: [6, [1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1]],
  };

  class Backwards {  // bits from the end of some bytes; before their beginning there are zeros
    constructor(data) {
      if (!data.length || !data.at(-1)) damaged();
      this.data = data;
      this.left = 8 * data.length + 23 - Math.clz32(data.at(-1));
    }
    bits(n) {
      if (n > 24) { const high = this.bits(n - 24); return high * 2 ** 24 + this.bits(24); }
      const from = this.left -= n;
      if (from >= 0) return this.at(from) & (1 << n) - 1;
      return n + from > 0 ? (this.at(0) & (1 << n + from) - 1) << -from : 0;
    }
    at(from) {
      const d = this.data, i = from >> 3;
      return (d[i] | d[i + 1] << 8 | d[i + 2] << 16 | d[i + 3] << 24) >>> (from & 7);
    }
  }

  function stateTable(log, counts) {  // of a finite-state entropy code
    const size = 1 << log, symbols = new Uint8Array(size), next = counts.map(c => Math.abs(c));
    const bits = new Uint8Array(size), base = new Uint16Array(size);
    let high = size - 1, at = 0;
    counts.forEach((c, s) => { if (c < 0) symbols[high--] = s; });
    counts.forEach((c, s) => {
      for (let i = 0; i < c; i++) {
        symbols[at] = s;
        do at = at + (size >> 1) + (size >> 3) + 3 & size - 1; while (at > high);
      }
    });
    for (let i = 0; i < size; i++) {
      const n = next[symbols[i]]++;
      bits[i] = log - 31 + Math.clz32(n);
      base[i] = (n << bits[i]) - size;
    }
    return { log, symbols, bits, base };
  }
  const single = s => ({ log: 0, symbols: [s], bits: [0], base: [0] });

  function readCounts(from, most, symbols) {  // the description of such a table
    const d = from.data.subarray(from.at);
    let at = 0;
    const bits = n => {
      if (at + n > 8 * d.length + 16) damaged();
      const i = at >> 3, x = (d[i] | d[i + 1] << 8 | d[i + 2] << 16) >>> (at & 7) & (1 << n) - 1;
      at += n;
      return x;
    };
    const log = bits(4) + 5, counts = [];
    if (log > most) damaged();
    let left = (1 << log) + 1;
    while (left > 1) {
      if (counts.length >= symbols) damaged();
      const size = 32 - Math.clz32(left), spare = (1 << size) - 1 - left;
      let x = bits(size - 1);
      if (x >= spare) { x |= bits(1) << size - 1; if (x >= 1 << size - 1) x -= spare; }
      counts.push(x - 1);
      left -= Math.abs(x - 1);
      if (left < 1) damaged();
      if (x === 1) for (let more = 3; more === 3;) {
        more = bits(2);
        for (let i = 0; i < more; i++) counts.push(0);
        if (counts.length > symbols) damaged();
      }
    }
    from.take(at + 7 >> 3);
    return stateTable(log, counts);
  }

  function readWeights(from) {  // the Huffman code of literals
    const head = from.byte(), weights = [];
    if (head >= 128) {
      const packed = from.take(head - 126 >> 1);
      for (let i = 0; i < head - 127; i++) weights.push(i % 2 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4);
    } else {
      const body = new Bytes(from.take(head), "a Zstandard frame"), t = readCounts(body, 6, 13), b = new Backwards(body.rest());
      const states = [b.bits(t.log), b.bits(t.log)];
      if (b.left < 0) damaged();
      for (let i = 0; ; i ^= 1) {
        const s = states[i];
        weights.push(t.symbols[s]);
        if (weights.length > 254) damaged();
        if (t.bits[s] > b.left) { weights.push(t.symbols[states[i ^ 1]]); break; }
        states[i] = t.base[s] + b.bits(t.bits[s]);
      }
    }
    let sum = 0;
    for (const w of weights) { if (w > 11) damaged(); sum += w && 1 << w - 1; }
    const log = 32 - Math.clz32(sum), rest = (1 << log) - sum;
    if (!sum || log > 11 || rest & rest - 1) damaged();
    weights.push(32 - Math.clz32(rest));
    const symbols = new Uint8Array(1 << log), bits = new Uint8Array(1 << log);
    let at = 0;
    for (let w = 1; w <= log; w++) weights.forEach((x, s) => {
      if (x !== w) return;
      symbols.fill(s, at, at + (1 << w - 1));
      bits.fill(log + 1 - w, at, at += 1 << w - 1);
    });
    return { log, symbols, bits };
  }

  function readSymbols(code, data, out) {
    const b = new Backwards(data);
    const mask = (1 << code.log) - 1;
    let state = b.bits(code.log);
    for (let i = 0; i < out.length; i++) {
      out[i] = code.symbols[state];
      const n = code.bits[state];
      state = (state << n | b.bits(n)) & mask;
    }
    if (b.left !== -code.log) damaged();
  }

  function literals(block, memory) {
    const head = block.byte(), kind = head & 3, form = head >> 2 & 3;
    if (kind < 2) {
      const size = form === 1 ? head >> 4 | block.byte() << 4 : form === 3 ? head >> 4 | block.byte() << 4 | block.byte() << 12 : head >> 3;
      if (size > 2 ** 17) damaged();
      return kind ? new Uint8Array(size).fill(block.byte()) : block.take(size);
    }
    const more = form < 2 ? 2 : form + 1, width = form < 2 ? 10 : form === 2 ? 14 : 18;
    let x = head >> 4;
    for (let i = 0; i < more; i++) x += block.byte() * 2 ** (8 * i + 4);
    const size = x % 2 ** width, packed = Math.floor(x / 2 ** width);
    if (size > 2 ** 17) damaged();
    const body = new Bytes(block.take(packed), "a Zstandard frame"), out = new Uint8Array(size);
    if (kind === 2) memory.code = readWeights(body);
    if (!memory.code) damaged();
    if (!form) { readSymbols(memory.code, body.rest(), out); return out; }
    const jumps = body.take(6), part = size + 3 >> 2;
    for (let i = 0; i < 4; i++) {
      const here = out.subarray(Math.min(size, i * part), i < 3 ? Math.min(size, (i + 1) * part) : size);
      readSymbols(memory.code, i < 3 ? body.take(jumps[2 * i] | jumps[2 * i + 1] << 8) : body.rest(), here);
    }
    return out;
  }

  function sequences(block, memory, text, out, n) {
    let count = block.byte();
    if (count > 127) count = count < 255 ? (count - 128 << 8) + block.byte() : block.byte() + (block.byte() << 8) + 0x7f00;
    const copy = size => {
      if (size > text.left || n + size > out.length) damaged();
      out.set(text.take(size), n);
      n += size;
    };
    if (count) {
      const modes = block.byte(), table = (name, mode, most, symbols) => {
        if (!mode) memory[name] = stateTable(...USUAL[name]);
        else if (mode === 1) memory[name] = single(block.byte());
        else if (mode === 2) memory[name] = readCounts(block, most, symbols);
        if (!memory[name]) damaged();
        return memory[name];
      };
      if (modes & 3) damaged();
      const L = table("literals", modes >> 6, 9, 36), O = table("offsets", modes >> 4 & 3, 8, 32), M = table("matches", modes >> 2 & 3, 9, 53);
      const b = new Backwards(block.rest()), recent = memory.recent;
      let l = b.bits(L.log), o = b.bits(O.log), m = b.bits(M.log);
      for (let i = 0; i < count; i++) {
        const oc = O.symbols[o], mc = M.symbols[m], lc = L.symbols[l];
        if (oc > 30 || mc > 52 || lc > 35) damaged();
        let offset = 2 ** oc + b.bits(oc), length = MATCH_BASES[mc] + b.bits(MATCH_BITS[mc]);
        const before = LITERAL_BASES[lc] + b.bits(LITERAL_BITS[lc]);
        if (offset > 3) { offset -= 3; recent.pop(); recent.unshift(offset); }
        else {
          const which = offset - 1 + (before ? 0 : 1);
          offset = which < 3 ? recent[which] : recent[0] - 1;
          if (which) { recent.splice(Math.min(which, 2), 1); recent.unshift(offset); }
        }
        if (i < count - 1) {
          l = L.base[l] + b.bits(L.bits[l]);
          m = M.base[m] + b.bits(M.bits[m]);
          o = O.base[o] + b.bits(O.bits[o]);
        }
        copy(before);
        if (b.left < 0 || offset < 1 || offset > n || n + length > out.length) damaged();
        if (offset >= length) { out.copyWithin(n, n - offset, n - offset + length); n += length; }
        else for (; length; length--, n++) out[n] = out[n - offset];
      }
      if (b.left) damaged();
    } else block.end();
    copy(text.left);
    return n;
  }

  // One whole frame without its magic number, which expands to `size` bytes.
  function unzstd(data, size) {
    const from = new Bytes(data, "a Zstandard frame"), head = from.byte(), lone = head >> 5 & 1;
    if (head & 8 || head & 3) damaged();
    if (!lone) from.byte();
    const claim = from.take([lone, 2, 4, 8][head >> 6]);
    const says = claim.reduceRight((n, b) => 256 * n + b, 0) + (head >> 6 === 1 ? 256 : 0);
    demand(!claim.length || says === size, `a Zstandard frame says that it expands to ${says} bytes instead of ${size}`);
    const out = new Uint8Array(size), memory = { recent: [1, 4, 8] };
    let n = 0, last;
    do {
      const b = from.byte() | from.byte() << 8 | from.byte() << 16, kind = b >> 1 & 3, length = b >> 3;
      last = b & 1;
      if (kind === 3 || length > 2 ** 17 || kind < 2 && n + length > size) damaged();
      if (kind === 0) out.set(from.take(length), n), n += length;
      else if (kind === 1) out.fill(from.byte(), n, n += length);
      else {
        const block = new Bytes(from.take(length), "a Zstandard frame"), text = new Bytes(literals(block, memory), "a Zstandard frame");
        n = sequences(block, memory, text, out, n);
      }
    } while (!last);
    if (head & 4) from.take(4);  // a checksum, beside that of the stream
    from.end();
    demand(n === size, `a Zstandard frame expands to ${n} bytes instead of ${size}`);
    return out;
  }

  // ------------------------------------------------------------------------------------------------ codes and streams

  const planesOf = bits => [...Array(bits >> 3).fill(8), ...[4, 2, 1].filter(w => bits & 7 & w)];
  const packedSize = (n, bits) => planesOf(bits).reduce((sum, w) => sum + Math.ceil(n * w / 8), 0);
  const holder = bits => bits > 16 ? Float64Array : bits > 8 ? Uint16Array : Uint8Array;

  function unpack(packed, bits, n) {  // codes from planes, the widest first
    const codes = new (holder(bits))(n);
    let at = 0, shift = 0;
    for (const w of planesOf(bits)) {
      const mask = (1 << w) - 1, by = 2 ** shift;
      for (let i = 0, bit = 0; i < n; i++, bit += w) codes[i] += (packed[at + (bit >> 3)] >> (bit & 7) & mask) * by;
      at += Math.ceil(n * w / 8);
      shift += w;
    }
    return codes;
  }

  function bytesOf(chunk, size) {  // a chunk that holds bytes
    const method = chunk.byte();
    demand(method < 2, `a chunk of bytes has the method ${method}`);
    if (method) return unzstd(chunk.rest(), size);
    demand(chunk.left === size, `a chunk has ${chunk.left} bytes instead of ${size}`);
    return chunk.rest();
  }
  const chunkOf = data => new Bytes(data, "a chunk");

  // Asymmetric numeral systems: n ranks by their counts, from 32-bit words, the last one first.
  function ranksOf(counts, words, n) {
    demand(counts.length > 1 && words.length % 4 === 0, "the words of a chunk are no ANS stream");
    const k = counts.length, left = new Float64Array(k + 1), near = new Uint16Array(4097), out = new Uint16Array(n);
    const sum = counts.reduce((a, b) => a + b), shares = counts.map(c => c / sum);
    const scale = (2 ** 24 - k) / shares.reduce((a, b) => a + b, 0);
    for (let i = 0, before = 0; i < k; before += shares[i++]) left[i] = Math.floor(before * scale) + i;
    left[k] = 2 ** 24;
    for (let i = 0, s = 0; i <= 4096; near[i++] = Math.min(s, k - 1)) while (s < k - 1 && left[s + 1] <= i * 4096) s++;
    const view = new DataView(words.buffer, words.byteOffset, words.length);
    let at = words.length, high = 0, low = 0;
    const word = () => view.getUint32(at -= 4, true);
    if (at) { low = word(); demand(low, "the words of a chunk are no ANS stream"); }
    if (at) { high = low; low = word(); }
    for (let i = 0; i < n; i++) {
      const q = low & 0xffffff;
      let s = near[q >> 12];
      while (left[s + 1] <= q) s++;
      out[i] = s;
      // state = (state >> 24) * share + q - left: in pieces that a double holds
      const share = left[s + 1] - left[s], top = (high >>> 16) * share, mid = (high & 65535) * share;
      const sum = top % 256 * 2 ** 24 + mid * 256 + (low >>> 24) * share + q - left[s];
      low = sum % 2 ** 32;
      high = Math.floor(top / 256) + Math.floor(sum / 2 ** 32);
      if (!high && at) { high = low; low = word(); }
    }
    demand(!at && !high && !low, "the words of a chunk are no ANS stream of that length");
    return out;
  }

  // Whole numbers by a table of values, n of w bytes each.
  function valuesOf(chunk, n, w) {
    const wrong = "a table of values is damaged";
    demand([1, 2, 4, 8].includes(w) && n, wrong);
    const s = chunk.byte(), first = chunk.take(w), k = chunk.number(), t = chunk.number();
    demand(s < 64 && k && k <= Math.min(n, 2 ** 15) && t <= 20 * k + 1, wrong);
    const table = new Bytes(bytesOf(chunkOf(chunk.piece()), t), "a table of values"), low = chunk.piece(), words = chunk.piece();
    chunk.end();
    const g = table.byte();
    demand(g <= 8 && low.length === n * (s >> 3) + packedSize(n, s & 7), wrong);
    const gaps = table.take(g * (k - 1)), counts = Array.from({ length: k }, () => table.number());
    table.end();
    demand(counts.every(c => c) && counts.reduce((a, b) => a + b) === n, wrong);
    const start = first.reduceRight((x, b) => x << 8n | BigInt(b), 0n), lows = new Uint32Array(k), highs = new Uint32Array(k);
    for (let i = 0, u = 0n; i < k; i++) {
      let gap = 0n;
      for (let j = g - 1; i && j >= 0; j--) gap = gap << 8n | BigInt(gaps[j * (k - 1) + i - 1]);
      u += gap;
      demand((!i || gap) && u < 1n << BigInt(64 - s), wrong);
      const value = BigInt.asUintN(64, start + (u << BigInt(s)));
      lows[i] = Number(value & 0xffffffffn);
      highs[i] = Number(value >> 32n);
    }
    demand(k > 1 || !words.length, wrong);
    const ranks = k > 1 ? ranksOf(counts, words, n) : new Uint16Array(n), out = new Uint8Array(n * w);
    const rest = unpack(low.subarray(n * (s >> 3)), s & 7, n), own = 8 * (s >> 3);
    for (let i = 0; i < n; i++) {
      let a = lows[ranks[i]], b = highs[ranks[i]], more = 0, above = 0;
      for (let j = 0; j < s >> 3; j++) if (j < 4) more += low[j * n + i] * 2 ** (8 * j); else above += low[j * n + i] * 2 ** (8 * j - 32);
      if (own < 32) { more += rest[i] * 2 ** own; above += Math.floor(more / 2 ** 32); more %= 2 ** 32; } else above += rest[i] * 2 ** (own - 32);
      a += more;
      b += above + (a >= 2 ** 32 ? 1 : 0);
      for (let j = 0; j < w; j++) out[i * w + j] = j < 4 ? (a >>> 0) >>> 8 * j : Math.floor(b / 2 ** (8 * j - 32));
    }
    return out;
  }

  // A chunk of n codes of so many bits, all below `levels`.
  function codesOf(chunk, bits, levels, n, inner = false) {
    const method = chunk.byte(), small = [0, 1, 6, 7].includes(method) || bits <= 8;
    demand(small && !(inner && method === 3), `a chunk of ${bits}-bit codes has the method ${method}`);
    let codes;
    if (method < 2) { chunk.at--; codes = unpack(bytesOf(chunk, packedSize(n, bits)), bits, n); }
    else if (method === 2) {
      let k = 1;
      while (levels ** (k + 1) <= 256) k++;
      const joined = bytesOf(chunk, Math.ceil(n / k));
      codes = new Uint8Array(n);
      for (let i = 0, x = 0; i < n; i++, x = Math.floor(x / levels)) { if (i % k === 0) x = joined[i / k]; codes[i] = x % levels; }
    } else if (method === 3) {
      codes = new Uint8Array(n).fill(chunk.byte());
      const others = chunk.number(), where = chunkOf(chunk.piece()), rare = chunkOf(chunk.piece());
      chunk.end();
      demand(others <= n, "a chunk has more rare codes than codes");
      const which = codesOf(rare, bits, levels, others, true);
      let i = 0;
      if (where.byte()) {
        const size = where.number();
        demand(size <= others + n / 255, "the gaps of a chunk do not fit");
        let at = -1, open = false;
        for (const gap of bytesOf(where, size)) {
          at += gap;
          if ((open = gap === 255)) continue;
          demand(++at < n && i < others, "the gaps of a chunk do not fit");
          codes[at] = which[i++];
        }
        demand(!open, "the gaps of a chunk do not fit");
      } else {
        const mask = bytesOf(where, Math.ceil(n / 8));
        for (let at = 0; at < n; at++) if (mask[at >> 3] >> (at & 7) & 1) codes[at] = which[i++];
      }
      demand(i === others, "the mask of a chunk does not fit");
    } else if (method === 4) {
      const counts = Array.from({ length: levels }, () => chunk.number()), used = [];
      counts.forEach((c, i) => { if (c) used.push(i); });
      demand(used.length && Math.max(...counts) <= 4096, "the counts of a chunk are damaged");
      const words = chunk.rest();
      codes = used.length === 1 && !words.length ? new Uint8Array(n).fill(used[0]) : Uint8Array.from(ranksOf(used.map(i => counts[i]), words, n), r => used[r]);
    } else if (method === 6) {
      demand(bits > 8, "only codes of more than eight bits are split");
      const low = chunk.piece(), high = codesOf(chunkOf(chunk.piece()), 8, 256, n);
      chunk.end();
      demand(low.length === packedSize(n, bits - 8), "the low bits have a wrong size");
      codes = Uint16Array.from(unpack(low, bits - 8, n), (x, i) => x | high[i] << bits - 8);
    } else if (method === 7) {
      const w = bits > 8 ? 4 : 1, data = valuesOf(chunk, n, w), view = new DataView(data.buffer);
      codes = new (holder(bits))(n);
      for (let i = 0; i < n; i++) {
        const x = w === 1 ? data[i] : view.getInt32(4 * i, true);
        demand(x >= 0 && x < levels, "a code is too large");
        codes[i] = x;
      }
    } else throw new MzError(`a chunk of codes has the unknown method ${method}`);
    if (levels < 2 ** bits) for (let i = 0; i < n; i++) demand(codes[i] < levels, "a code is too large");
    return codes;
  }

  function elementsOf(chunk, size, w) {  // a chunk of elements of w bytes
    const method = chunk.byte();
    if (method === 7) return valuesOf(chunk, size / w, w);
    if (method !== 5 && method !== 8 && method !== 9) { chunk.at--; return bytesOf(chunk, size); }
    demand(w > 1 && (method === 5 || w === 2 || w === 4), "such elements have no planes");
    const out = new Uint8Array(size), n = size / w, plane = count => bytesOf(chunkOf(chunk.piece()), count);
    const put = (i, top) => { out[i * w + w - 2] = top; out[i * w + w - 1] = top >> 8; };
    const below = () => { for (let j = 0; j < w - 2; j++) { const own = plane(n); for (let i = 0; i < n; i++) out[i * w + j] = own[i]; } };
    if (method === 8) {
      const free = chunk.byte(), part = n / 8, stored = free ? 7 * part : n;
      demand(free < 2 && !(free && n % 64), "planes of floats are described in an unknown form");
      const a = plane(n), b = new Uint8Array(n);
      b.set(plane(stored));
      if (free) for (let j = 0; j < 7; j++) for (let i = 0; i < part; i++) { b[7 * part + i] |= b[j * part + i] >> 7 << j; b[j * part + i] &= 127; }
      for (let i = 0; i < n; i++) put(i, free ? (b[i] & 64) << 9 | a[i] << 6 | b[i] & 63 : (b[i] & 128) << 8 | a[i] << 7 | b[i] & 127);
      below();
      chunk.end();
      return out;
    }
    if (method === 9) {
      const first = chunk.byte(), together = chunk.byte();
      demand(first <= 240 && together <= (w === 4 ? 1 : 0) && n % 16 === 0, "pairs of floats are described in an unknown form");
      const strays = chunkOf(chunk.piece());
      demand(strays.byte() === 0, "the strays of a chunk are coded");
      const pairs = plane(n / 2), a = new Uint8Array(n), half = n / 2;
      for (let i = 0; i < half; i++) { a[i] = first + (pairs[i] & 15); a[half + i] = first + (pairs[i] >> 4); }
      const number = count => strays.take(count).reduceRight((sum, b) => 256 * sum + b, 0), places = [];
      const counts = Array.from({ length: Math.ceil(n / 65536) }, () => number(4));
      const all = counts.reduce((x, y) => x + y, 0);
      demand(all <= n && strays.left === 3 * all, "the strays of a chunk have a wrong size");
      counts.forEach((count, block) => { while (count--) places.push(65536 * block + number(2)); });
      demand(places.every(at => at < n), "a stray lies behind the end of its chunk");
      demand(places.every((at, i) => !i || at > places[i - 1]), "the strays of a chunk are out of order");
      for (const at of places) a[at] = strays.byte();
      const b = plane(n);
      for (let i = 0; i < n; i++) put(i, (b[i] & 128) << 8 | a[i] << 7 | b[i] & 127);
      if (!together) below();
      else {
        const low = chunkOf(chunk.piece());
        demand(low.byte() === 0 && low.left === 2 * n, "the lower halves of floats have a wrong size");
        for (let i = 0; i < n; i++) { out[4 * i] = low.byte(); out[4 * i + 1] = low.byte(); }
      }
      chunk.end();
      return out;
    }
    for (let j = 0; j < w; j++) {
      const plane = bytesOf(chunkOf(chunk.piece()), n);
      for (let i = 0; i < n; i++) out[i * w + j] = plane[i];
    }
    chunk.end();
    return out;
  }

  // A stream: {bits, levels, codes} or {bytes}; `size` is how many bytes it stands for.
  function readStream(data, size) {
    demand(data.length > 4 && crc32(data.subarray(0, -4)) === new DataView(data.buffer, data.byteOffset + data.length - 4).getUint32(0, true), "the checksum of a stream is wrong");
    const from = new Bytes(data.subarray(0, -4), "a stream"), bits = from.byte(), levels = from.number(), n = from.number();
    demand(bits <= 16 && levels && (!bits || levels > 1 && levels <= 2 ** bits), "the head of a stream is damaged");
    demand((bits ? packedSize(n, bits) : n) === size && size <= 2 ** 15 * data.length && n <= MOST && (bits || n % levels === 0 && levels <= 16), `a stream of ${n} does not stand for ${size} bytes`);
    const step = bits ? 983040 : 2 ** 20 - 2 ** 20 % levels, sizes = [];
    for (let at = 0; at < n; at += step) sizes.push(from.number());
    const out = new (holder(bits))(n);
    sizes.forEach((s, i) => {
      const chunk = chunkOf(from.take(s)), here = Math.min(step, n - i * step);
      out.set(bits ? codesOf(chunk, bits, levels, here) : elementsOf(chunk, here, levels), i * step);
    });
    from.end();
    return bits ? { bits, levels, codes: out } : { bytes: out };
  }

  // ------------------------------------------------------------------------------------------------ numbers

  // A small float by its code: a sign, so many bits of exponent, so many of fraction; `special` says what is no number.
  const small = (exponents, bits, bias, special) => Float32Array.from({ length: 2 ** (1 + exponents + bits) }, (_, x) => {
    const sign = x >> exponents + bits ? -1 : 1, e = x >> bits & 2 ** exponents - 1, f = x & 2 ** bits - 1;
    return special(x, e, f) ?? sign * (e ? (1 + f / 2 ** bits) * 2 ** (e - bias) : f / 2 ** bits * 2 ** (1 - bias));
  });
  const once = make => { let made; return () => made ??= make(); };  // tables are made when somebody asks
  const ieee = (exponents, bits) => once(() => small(exponents, bits, 2 ** (exponents - 1) - 1, (x, e, f) => e < 2 ** exponents - 1 ? undefined : f ? NaN : x >> exponents + bits ? -Infinity : Infinity));
  const fnuz = (exponents, bits) => once(() => small(exponents, bits, 2 ** (exponents - 1), x => x === 128 ? NaN : undefined));
  const TYPES = {  // name → bytes of an element, and what reads them: a class of arrays, or a table of all codes
    float64: [8, Float64Array], float32: [4, Float32Array], float16: [2, ieee(5, 10)], bfloat16: [2, ieee(8, 7)],
    float8_e4m3fn: [1, once(() => small(4, 3, 7, x => (x & 127) === 127 ? NaN : undefined))], float8_e5m2: [1, ieee(5, 2)],
    float8_e4m3fnuz: [1, fnuz(4, 3)], float8_e5m2fnuz: [1, fnuz(5, 2)],
    float8_e8m0fnu: [1, once(() => Float32Array.from({ length: 256 }, (_, x) => x === 255 ? NaN : 2 ** (x - 127)))],
    complex128: [16], complex64: [8], complex32: [4],
    int64: [8, BigInt64Array], int32: [4, Int32Array], int16: [2, Int16Array], int8: [1, Int8Array],
    uint64: [8, BigUint64Array], uint32: [4, Uint32Array], uint16: [2, Uint16Array], uint8: [1, Uint8Array], bool: [1, Uint8Array],
  };
  const isType = name => has(TYPES, name);

  function numbersOf(bytes, dtype) {  // (all machines that browsers run on are little-endian, as files are)
    const [size, Kind] = TYPES[dtype], own = bytes.slice().buffer;
    demand(Kind, `numbers of type ${dtype} are beyond this reader`);
    if (!Kind.BYTES_PER_ELEMENT) { const table = Kind(); return Float32Array.from(new (size === 1 ? Uint8Array : Uint16Array)(own), x => table[x]); }
    return Kind.name.startsWith("Big") ? Float64Array.from(new Kind(own), Number) : new Kind(own);
  }

  const word = new DataView(new ArrayBuffer(4));
  // float32 numbers rounded to the type of the tensor for which they stand
  const ROUND = {
    float32: x => x, float64: x => x,
    bfloat16: x => {
      word.setFloat32(0, x);
      const b = word.getUint32(0);
      word.setUint32(0, (b + 32767 + (b >>> 16 & 1)) >>> 16 << 16);
      return x !== x ? x : word.getFloat32(0);
    },
    float16: x => {
      const a = Math.abs(x), step = 2 ** (Math.max(-14, Math.floor(Math.log2(a))) - 10);
      if (!a || a === Infinity || x !== x) return x;
      const r = a / step, down = Math.floor(r), up = r - down > 0.5 || r - down === 0.5 && down % 2 ? down + 1 : down;
      return Math.sign(x) * (up * step > 65504 ? Infinity : up * step);
    },
  };

  // ------------------------------------------------------------------------------------------------ the archive

  function entriesOf(data) {  // of the zip archive: name → bytes
    const view = new DataView(data.buffer, data.byteOffset, data.length), end = data.length - 22;
    demand(data.length > 3 && view.getUint32(0) === 0x504b0304, "it is no .mz file: it does not begin as a zip archive");
    demand(end > 0 && view.getUint32(end) === 0x504b0506, "it is no .mz file, or is cut off: it does not end as a zip archive");
    const count = view.getUint16(end + 10, true), size = view.getUint32(end + 12, true), start = view.getUint32(end + 16, true);
    demand(start + size === end && count && count < 3, "it is no .mz file: its directory is another one");
    const found = new Map();
    let at = start, next = 0;
    for (let i = 0; i < count; i++) {
      demand(at + 46 <= end && view.getUint32(at) === 0x504b0102, "its directory is damaged");
      const [flags, method] = [8, 10].map(k => view.getUint16(at + k, true)), [crc, packed, full] = [16, 20, 24].map(k => view.getUint32(at + k, true));
      const [letters, extra, comment] = [28, 30, 32].map(k => view.getUint16(at + k, true)), local = view.getUint32(at + 42, true);
      const name = String.fromCharCode(...data.subarray(at + 46, Math.min(end, at + 46 + letters)).subarray(0, 99));
      demand(!flags && (method === 0 || method === 8) && local === next && local + 30 <= start && view.getUint32(local) === 0x504b0304, "its directory is damaged");
      const from = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
      next = from + packed;
      demand(next <= start && (method || packed === full), "its directory is damaged");
      found.set(name, { method, crc, full, data: data.subarray(from, next) });
      at += 46 + letters + extra + comment;
    }
    demand(at === end && next === start && found.size === count, "its directory is damaged");
    return found;
  }
  const whole = (bytes, crc, name) => { demand(crc32(bytes) === crc, `the checksum of ${name} is wrong: the file is damaged`); return bytes; };

  // JSON in ASCII: no name twice, nothing nested deeper than 64, 2 ** 22 values at most.
  function readJSON(bytes) {
    let at = 0, values = 0;
    const text = new TextDecoder("latin1").decode(bytes), wrong = () => { throw new MzError("its manifest is not JSON as a manifest has it"); };
    const token = /[ \n\r\t]*(?:([{}[\],:])|("(?:[ !#-[\]-~]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*")|(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)|(true|false|null))/y;
    const take = () => { token.lastIndex = at; const m = token.exec(text); if (!m) wrong(); at = token.lastIndex; return m; };
    const value = (m, depth) => {
      if (++values > 2 ** 22 || depth > 63) wrong();
      if (m[2] !== undefined || m[4] !== undefined) return JSON.parse(m[2] ?? m[4]);
      if (m[3] !== undefined) { const x = Number(m[3]); return Number.isFinite(x) ? x : wrong(); }
      if (m[1] === "[") {
        const out = [];
        for (let t = take(); t[1] !== "]"; t = take()) {
          out.push(value(t, depth + 1));
          t = take();
          if (t[1] === "]") break;
          if (t[1] !== ",") wrong();
        }
        return out;
      }
      if (m[1] !== "{") wrong();
      const out = Object.create(null);
      for (let t = take(); t[1] !== "}";) {
        if (t[2] === undefined) wrong();
        const name = JSON.parse(t[2]);
        if (name in out || take()[1] !== ":") wrong();
        out[name] = value(take(), depth + 1);
        t = take();
        if (t[1] === "}") break;
        if (t[1] !== ",") wrong();
        t = take();
      }
      return out;
    };
    const out = value(take(), 0);
    if (text.slice(at).trim() || Array.isArray(out) || typeof out !== "object" || !out) wrong();
    return out;
  }
  const isObject = x => x !== null && typeof x === "object" && !Array.isArray(x);

  // ------------------------------------------------------------------------------------------------ what builders make

  // The layers of the models that a file may name as its architecture, in their order, with their arguments.
  const conv = (i, o, k) => ({ class: "Conv2d", in_channels: i, out_channels: o, kernel_size: [k, k] });
  const linear = (i, o) => ({ class: "Linear", in_features: i, out_features: o });
  const sizesOf = (list, n, name) => {
    demand(Array.isArray(list) && list.length === n && list.every(x => isSize(x) && x && x < 2 ** 20), `the architecture's ${name} is ${quoted(list)}`);
    return list;
  };
  const BUILDERS = {
    LeNet5({ channels = [20, 50], hidden = 500 }) {
      const [a, b] = sizesOf(channels, 2, "channels"), [h] = sizesOf([hidden], 1, "hidden");
      return { conv1: conv(1, a, 5), conv2: conv(a, b, 5), fc1: linear(16 * b, h), fc2: linear(h, 10) };
    },
    LeNet300({ hidden = [300, 100] }) {
      const [a, b] = sizesOf(hidden, 2, "hidden");
      return { fc1: linear(784, a), fc2: linear(a, b), fc3: linear(b, 10) };
    },
  };
  const bias = (layer, n) => layer.bias === false ? {} : { bias: [n] };
  const TENSORS = {  // class → its own tensors, in the order of the state dict
    Linear: l => ({ weight: [l.out_features, l.in_features], ...bias(l, l.out_features) }),
    Conv2d: l => ({ weight: [l.out_channels, l.in_channels / (l.groups ?? 1), ...[l.kernel_size, l.kernel_size].flat().slice(0, 2)], ...bias(l, l.out_channels) }),
    ...Object.fromEntries(["BatchNorm1d", "BatchNorm2d"].map(n => [n, l => ({ weight: [l.num_features], ...bias(l, l.num_features), running_mean: [l.num_features], running_var: [l.num_features], num_batches_tracked: [] })])),
    LayerNorm: l => ({ weight: [l.normalized_shape].flat(), ...l.bias === false ? {} : { bias: [l.normalized_shape].flat() } }),
    Embedding: l => ({ weight: [l.num_embeddings, l.embedding_dim] }),
    ...Object.fromEntries(["Sequential", "Tanh", "ReLU", "ReLU6", "Sigmoid", "GELU", "SiLU", "Hardswish", "Hardsigmoid", "Identity", "Dropout", "Flatten", "Softmax", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d"].map(n => [n, () => ({})])),
  };

  function layersOf(manifest) {  // what the builder makes, and what the file says differs
    const { architecture: a, layers = {} } = manifest;
    demand(isObject(a) && isObject(a.options), "its architecture is described in an unknown form");
    demand(has(BUILDERS, a.name), `this reader does not know the architecture ${quoted(a.name)}`);
    demand(isObject(layers), "its layers are described in an unknown form");
    const made = BUILDERS[a.name](a.options), out = new Map(), below = name => Object.keys(layers).filter(n => n.startsWith(`${name}.`));
    for (const name of Object.keys(made)) for (const n of [name, ...below(name)]) out.set(n, layers[n] ?? made[n]);
    for (const name of Object.keys(layers)) demand(out.has(name), `this reader does not know where the layer ${quoted(name)} belongs`);
    return out;
  }

  function expectedOf(manifest) {  // the tensors of such a model: name → type and shape
    const out = new Map(), told = manifest.graph === undefined ? layersOf(manifest) : Object.entries(isObject(manifest.layers) ? manifest.layers : {});
    for (const [name, layer] of told) {
      demand(isObject(layer) && (has(TENSORS, layer.class) || layer.class === undefined), `this reader does not know the layer ${quoted(layer?.class ?? name)}`);
      const own = layer.class === undefined ? layer.shapes ?? {} : TENSORS[layer.class](layer);
      demand(isObject(own), "its layers are described in an unknown form");
      for (const [n, shape] of Object.entries(own)) out.set(name ? `${name}.${n}` : n, { dtype: n === "num_batches_tracked" ? "int64" : "float32", shape });
    }
    return out;
  }

  // ------------------------------------------------------------------------------------------------ solid files

  const WORDS = {
    5: '"modelzip":4,"same":"class":"Linear","in_features":"out_features":"Conv2d","in_channels":"out_channels":"kernel_size":"bias":false"module":"attributes":"shapes":"info":{"recipe":"note":"kind":"sparse","meta":{"shape":[],"count":"layout":"gaps","gap":"values":"positions":"zero_point":"columns":"codebook":[256,"bfloat16""layer":"StaticConv2d","options":{"scale":"StaticLinear","QConv2d","QLinear","act":"dtype":"float16","shape":[{"levels":256,"axis":0},"group":64},"layers":{"":{"class":,"tensors":{"MiniLM","LeNet300","options":{"hidden":[{"how":{"levels":16},"parts":{"codes":16,"scale":"float32"}},{},{"parts":{"codes":15,"scale":"float32"},"how":{"levels":15}},{},{"modelzip":5,"architecture":null,{"modelzip":5,"architecture":{"name":"LeNet5","options":{"channels":[,],"hidden":}},"layers":{"options":{}},"kind":"","tensors":[{"how":{"levels":7},"parts":{"codes":7,"scale":"float32"}},{},',
    4: '"same":"layers":{"":{"class":"Linear","in_features":"out_features":"Conv2d","in_channels":"kernel_size":"bias":false"info":{"recipe":"note":"kind":"sparse","meta":{"shape":[],"count":"layout":"gaps","gap":"values":"positions":"zero_point":"columns":"codebook":[256,"bfloat16""layer":"StaticConv2d","options":{"scale":"StaticLinear","QConv2d","QLinear","act":"dtype":"float16","shape":[{"levels":256,"axis":0},"group":64},{"modelzip":4,"architecture":null,"architecture":{"name":"options":{}},"tensors":[{},{"how":{"levels":16},"parts":{"codes":16,"scale":"float32"}},{},{"parts":{"codes":15,"scale":"float32"},"how":{"levels":15}},{},',
  };

  function solidText(data) {  // the manifest, whichever words it was packed with, and the message behind it
    for (const version of [5, 4]) try {
      const { text, end } = inflate(data, 2 ** 20, new TextEncoder().encode(WORDS[version]));
      return { short: readJSON(text), message: data.subarray(end) };
    } catch (e) { if (!(e instanceof MzError) || version === 4) throw e; }
  }

  class Adaptive {  // an arithmetic decoder whose bets learn
    constructor(data) {
      this.data = data;
      this.bets = new Map();
      this.width = 2 ** 40;
      this.offset = this.at = 0;
      while (this.at < 5) this.offset = 256 * this.offset + this.next();
    }
    next() { return this.data[this.at++] ?? 0; }
    bit(context) {
      let bet = this.bets.get(context);
      if (!bet) this.bets.set(context, bet = { q: 32768, n: 0 });
      const q = Math.min(65504, Math.max(32, bet.q)), cut = Math.floor(this.width / 65536) * (65536 - q);
      const bit = this.offset >= cut ? 1 : 0;
      if (bit) { this.offset -= cut; this.width -= cut; } else this.width = cut;
      while (this.width < 2 ** 32) { this.offset = 256 * this.offset + this.next(); this.width *= 256; }
      bet.q += Math.floor((65536 * bit - bet.q) / (bet.n + 2));
      if (bet.n < 255) bet.n++;
      return bit;
    }
    bytes(n, width, name) {
      const out = new Uint8Array(n);
      for (let i = 0, last = 1; i < n; last = out[i++]) {
        const plane = i % width;
        if (!this.bit(`${name} ${plane} ${last !== 0} some`)) continue;
        let seen = 1;
        for (let k = 7; k >= 0; k--) seen = seen << 1 | this.bit(`${name} ${plane} ${plane === width - 1 ? `seen ${seen}` : `bit ${k}`}`);
        out[i] = seen & 255;
      }
      return out;
    }
    // One code less the middle one, its first two questions in contexts of their own.
    code(levels, name, where, side) {
      if (!this.bit(`${name} ${where} other`)) return 0;
      const middle = levels >> 1, up = levels > 2 && this.bit(`${name} ${side} up`), most = up ? levels - 1 - middle : middle;
      let v = 1;
      while (v < most && this.bit(`${name} ${v}`)) v++;
      return up ? v : -v;
    }
    codes(n, levels, name) {  // each in the context of the one before
      if (levels > 32) return this.bytes(n, 1, name);
      const out = new Uint8Array(n), middle = levels >> 1;
      for (let i = 0, last = 0; i < n; i++) out[i] = middle + (last = this.code(levels, name, last !== 0, ""));
      return out;
    }
    pictures(shape, levels, name) {  // of a whole tensor, each in the context of those to its left and above it
      const n = product(shape), out = new Uint8Array(n), signs = new Int8Array(n), middle = levels >> 1;
      const size = shape.length > 2 ? product(shape.slice(2)) : shape.length === 2 && shape[0] ? n / shape[0] : n;
      const line = (shape.length > 2 ? shape.at(-1) : this.bytes(1, 1, `${name} width`)[0]) || size;
      for (let i = 0; i < n; i++) {
        const k = i % size, left = k % line ? signs[i - 1] : 0, above = k >= line ? signs[i - line] : 0;
        const v = this.code(levels, name, `${left !== 0} ${above !== 0}`, left + above);
        signs[i] = Math.sign(v);
        out[i] = middle + v;
      }
      return out;
    }
    end() {  // only the data of an encoder that ended here is a message
      const window = Array.from({ length: 5 }, (_, i) => this.data[this.at - 5 + i] ?? 0).reduce((x, b) => 256 * x + b, 0);
      const low = window - this.offset, up = k => (2 ** k - (low % 2 ** k + 2 ** k) % 2 ** k) % 2 ** k;
      let keep = 40;
      while (up(keep) >= this.width) keep--;
      demand(this.at >= this.data.length && this.data.at(-1) !== 0 && this.offset === up(keep), "its numbers have bytes left over, or missing");
    }
  }

  // The mapped manifest for which a solid one stands, and its numbers: plain entry → {bytes} or {bits, levels, codes}
  function lengthened(short, message) {
    const wrong = name => `${quoted(name)} is described in an unknown form`, lists = Array.isArray(short.tensors);
    const knows = short.graph !== undefined || short.architecture && (short.modelzip < 5 || "kind" in short), known = knows ? expectedOf(short) : new Map();
    demand(lists || isObject(short.tensors), "its manifest has unknown or missing fields");
    demand(!lists || short.tensors.length === known.size, "it is of another architecture: its table has another length");
    const names = lists ? [...known.keys()] : Object.keys(short.tensors), tensors = Object.create(null), parts = [];
    let total = 0, end = 0;
    const place = (entry, levels, count, whole) => {
      checkPlain(entry, "a tensor", true);
      const size = TYPES[entry.dtype][0], bytes = size * product(entry.shape);
      total += levels ? count : bytes;
      demand(total <= 2 ** 16, "it claims more numbers than the 65,536 that a solid file may have");
      entry.offset = end + (size - end % size) % size;
      end = entry.offset + bytes;
      parts.push({ entry, levels, count, whole });
      return entry;
    };
    for (const name of names) {
      const s = lists ? short.tensors[names.indexOf(name)] : short.tensors[name], base = known.get(name) ?? {};
      demand(isObject(s) && !("offset" in s), wrong(name));
      if ("same" in s) { tensors[name] = s; continue; }
      if (!("parts" in s)) { tensors[name] = place({ ...base, ...s }); continue; }
      const { how, ...said } = s, entry = { ...base, kind: "quantized", layer: "Dequantize", ...said, parts: Object.create(null) };
      checkShape(entry, name);
      demand(isObject(s.parts) && (!how || isObject(how) && !("meta" in s)), wrong(name));
      if (how) entry.meta = { shape: entry.shape, dtype: entry.dtype, ...how };
      for (const [n, p] of Object.entries(s.parts)) {
        const [levels, count] = Array.isArray(p) ? p : [p, product(entry.shape)];
        if (typeof p === "string") entry.parts[n] = place({ dtype: p, shape: [] });
        else if (isObject(p)) entry.parts[n] = place({ ...p });
        else {
          demand((typeof p === "number" || Array.isArray(p) && p.length === 2) && isSize(levels) && isSize(count) && levels > 1 && levels <= 256, wrong(`${name}/${n}`));
          entry.parts[n] = place({ dtype: "uint8", shape: [packedSize(count, bitsFor(levels))] }, levels, count, count === product(entry.shape) && entry.shape);
        }
      }
      tensors[name] = entry;
    }
    const coder = new Adaptive(message), numbers = new Map(), upTo = () => Math.min(coder.at, message.length);
    parts.forEach(({ entry, levels, count, whole }, i) => {
      const before = i ? upTo() : Math.min(5, message.length), size = TYPES[entry.dtype][0], name = `#${i}`;
      const codes = () => whole && levels <= 32 && short.modelzip > 5 ? coder.pictures(whole, levels, name) : coder.codes(count, levels, name);
      const held = levels ? { bits: bitsFor(levels), levels, codes: codes() } : { bytes: coder.bytes(size * product(entry.shape), size, entry.dtype) };
      if (levels) demand(held.codes.every(c => c < levels), "a code is too large");
      numbers.set(entry, { ...held, size: upTo() - before });
    });
    coder.end();
    return { manifest: { ...short, tensors }, numbers };
  }

  // ------------------------------------------------------------------------------------------------ entries

  function checkShape(e, name) {
    demand(isObject(e), `${quoted(name)} is described in an unknown form`);
    demand(isType(e.dtype), `${quoted(name)} has the unknown type ${quoted(e.dtype)}`);
    demand(Array.isArray(e.shape) && e.shape.length <= 64 && e.shape.every(isSize) && product(e.shape) <= MOST, `${quoted(name)} has the shape ${quoted(e.shape)}, which this reader cannot hold`);
  }
  function checkPlain(e, name, placeless) {
    checkShape(e, name);
    demand(placeless || isSize(e.offset), `${quoted(name)} says no place`);
    demand((e.crc === undefined || isSize(e.crc)) && (e.coded === undefined || isSize(e.coded)), `${quoted(name)} is described in an unknown form`);
  }
  const bytesHere = e => e.coded ?? TYPES[e.dtype][0] * product(e.shape);

  class File {
    constructor(manifest, payload, numbers, size) {
      Object.assign(this, { manifest, payload, numbers, size, version: manifest.modelzip, info: manifest.info ?? {} });
      this.tensors = new Map(Object.entries(manifest.tensors));
      const pieces = [];
      for (const [name, e] of this.tensors) {
        demand(name.length < 2 ** 16 && isObject(e), `${quoted(name)} is described in an unknown form`);
        if ("same" in e) {
          const other = this.tensors.get(e.same);
          demand(other && !("same" in other) && [...this.tensors.keys()].indexOf(e.same) < [...this.tensors.keys()].indexOf(name), `${quoted(name)} is tied to ${quoted(e.same)}, which does not stand before it`);
        } else if ("parts" in e) {
          checkShape(e, name);
          demand(isObject(e.parts) && isObject(e.meta) && typeof e.kind === "string" && typeof e.layer === "string", `${quoted(name)} is described in an unknown form`);
          demand(e.meta.shape === undefined || JSON.stringify(e.meta.shape) === JSON.stringify(e.shape), `${quoted(name)} says two shapes`);
          const { levels, group, axis, layout } = e.meta;
          demand([levels, group, axis].every(n => n === undefined || n === null || isSize(n) || Array.isArray(n) && n.every(isSize)) && (layout === undefined || typeof layout === "string"), `${quoted(name)} is described in an unknown form`);
          let held = 0;
          for (const [n, p] of Object.entries(e.parts)) { checkPlain(p, `${name}/${n}`); pieces.push(p); held += TYPES[p.dtype][0] * product(p.shape); }
          demand(product(e.shape) <= 2 ** 15 * held, `${quoted(name)} stands for more numbers than its parts can hold`);
        } else { checkPlain(e, name); pieces.push(e); }
      }
      if (!numbers) this.checkPlaces(pieces);
    }
    checkPlaces(pieces) {
      let end = 0;
      for (const p of pieces.sort((a, b) => a.offset - b.offset || bytesHere(a) - bytesHere(b))) {
        const gap = p.offset - end;
        demand(gap >= 0 && gap < 64 && (p.coded !== undefined || p.offset % TYPES[p.dtype][0] === 0), "its tensors overlap, or leave holes between them");
        demand(this.payload.subarray(end, p.offset).every(b => !b), "there is something between its tensors");
        end = p.offset + bytesHere(p);
        demand(end <= this.payload.length, "its tensors end beyond the payload");
      }
      demand(end === this.payload.length, "its payload has bytes left over");
    }
    held(e) {  // a plain entry: {bytes}, or {bits, levels, codes} of a stream of codes
      if (this.numbers) return this.numbers.get(e);
      const bytes = this.payload.subarray(e.offset, e.offset + bytesHere(e));
      if (e.crc !== undefined) demand(crc32(bytes) === e.crc, "a tensor has a wrong checksum: the file is damaged");
      return e.coded === undefined ? { bytes } : readStream(bytes, TYPES[e.dtype][0] * product(e.shape));
    }
    plain(e) {
      const { bytes, codes, bits } = this.held(e);
      demand(bytes || codes && e.dtype === "uint8", "numbers are coded as if they were codes");
      return numbersOf(bytes ?? packed(codes, bits), e.dtype);
    }
    codes(e, bits, n) {
      const held = this.held(e);
      demand(e.dtype === "uint8" && product(e.shape) === packedSize(n, bits), `codes have another number than ${n}`);
      demand(!held.codes || held.bits === bits && held.codes.length === n, `codes have another number than ${n}`);
      return held.codes ?? unpack(held.bytes, bits, n);
    }
    entry(name) {
      const e = this.tensors.get(name);
      demand(e, `there is no tensor ${quoted(name)} in the file`);
      return "same" in e ? this.tensors.get(e.same) : e;
    }
    tensor(name) {
      const e = this.entry(name), { shape, dtype } = e;
      if (!("parts" in e)) return { shape, dtype, data: this.plain(e) };
      demand(has(KINDS, e.kind), `${quoted(name)} is of the kind ${quoted(e.kind)}, which this reader does not know`);
      demand(has(ROUND, dtype), `${quoted(name)} stands for numbers of type ${dtype}, which this reader does not know`);
      const data = KINDS[e.kind](this, e, e.meta, product(shape));
      if (has(ROUND, dtype) && dtype !== "float32") data.forEach((x, i) => { data[i] = ROUND[dtype](x); });
      return { shape, dtype, data };
    }
    table() {  // a row for each tensor: what it is, and which bytes of the file it takes
      return [...this.tensors].map(([name, e]) => {
        if ("same" in e) return { name, what: `the same as ${e.same}`, layer: e.layer ?? "", shape: this.entry(name).shape, weights: 0, bytes: 0 };
        const pieces = "parts" in e ? Object.values(e.parts) : [e];
        const bytes = pieces.reduce((sum, p) => sum + (this.numbers ? this.numbers.get(p).size : bytesHere(p)), 0);
        return { name, what: describe(e), layer: e.layer ?? "", shape: e.shape, weights: product(e.shape), bytes };
      });
    }
  }
  function describe(e) {
    if (!("parts" in e)) return e.dtype;
    const { levels, states, group, axis, layout } = e.meta, some = [isSize(levels) && `${levels} levels`, isSize(states) && `${states} states`, group && `group ${group}`, axis !== undefined && axis !== null && `axis ${axis}`, layout];
    return `${e.kind}${some.some(x => x) ? ` (${some.filter(x => x).join(", ")})` : ""}`;
  }
  function packed(codes, bits) {
    const out = new Uint8Array(packedSize(codes.length, bits));
    let at = 0, shift = 0;
    for (const w of planesOf(bits)) {
      codes.forEach((c, i) => { out[at + (i * w >> 3)] |= (c >> shift & (1 << w) - 1) << (i * w & 7); });
      at += Math.ceil(codes.length * w / 8);
      shift += w;
    }
    return out;
  }

  function read(data) {
    data = data instanceof ArrayBuffer ? new Uint8Array(data) : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    const zip = entriesOf(data), part = name => zip.get(name);
    let manifest, numbers, payload;
    const checkVersion = (version, most) => {
      demand(isSize(version) && version > 0, "its manifest does not say which version of the format it has");
      demand(version <= most, `it has version ${version} of the format; this reader knows versions up to ${most}`);
    };
    if (zip.size === 1 && zip.has("model")) {
      const { method, crc, data: model } = part("model");
      demand(!method && model.length <= 2 ** 20, "its directory is damaged");
      const { short, message } = solidText(whole(model, crc, "the model"));
      checkVersion(short.modelzip, 6);
      ({ manifest, numbers } = lengthened(short, message));
    } else {
      demand(zip.size === 2 && zip.has("payload") && zip.has("manifest.json") && !part("payload").method, "it is a zip archive, but no .mz file");
      payload = whole(part("payload").data, part("payload").crc, "the payload");
      const { method, crc, full, data: about } = part("manifest.json");
      demand(full <= 2 ** 26 && full <= 2 ** 20 + 64 * about.length, "its manifest is too large");
      const text = method ? inflate(about, full) : { text: about, end: about.length };
      demand(text.end === about.length && text.text.length === full, "its manifest is damaged");
      manifest = readJSON(whole(text.text, crc, "the manifest"));
      demand(!isObject(manifest) || manifest.base === undefined, `it is an update of ${quoted(manifest?.base?.name)}, and this reader knows whole files only`);
      checkVersion(manifest.modelzip, 5);
      demand(isObject(manifest.tensors), "its manifest has unknown or missing fields");
    }
    return new File(manifest, payload, numbers, data.length);
  }

  // ------------------------------------------------------------------------------------------------ kinds of tensors

  // How the scales lie: `scales` of them; elements in C order have the same one for `run` in a row, then the next one,
  // all over again after the last; or, where a row is no whole number of runs, a new one with each row.
  function scalesOf({ axis, group }, shape, n) {
    if (axis !== undefined && axis !== null) {
      demand(isSize(axis) && axis < shape.length, "a tensor has its scales along an axis that it does not have");
      return { scales: shape[axis], run: product(shape.slice(axis + 1)), row: Infinity };
    }
    if (group === undefined || group === null) return { scales: 1, run: n, row: Infinity };
    demand(isSize(group) && group, `a group has ${quoted(group)} elements`);
    const rows = shape[0] ?? 1, row = rows ? n / rows : 1;
    return { scales: rows * Math.ceil(row / group), run: group, row };
  }
  function scaleOfEach({ scales, run, row }, n) {
    const out = new Uint32Array(n);
    for (let i = 0, s = 0, used = 0, along = 0; i < n; i++) {
      if (used === run || along === row) { s = s + 1 === scales ? 0 : s + 1; used = 0; if (along === row) along = 0; }
      out[i] = s;
      used++;
      along++;
    }
    return out;
  }

  // `at`: which elements have codes (of a sparse tensor); without it, all of them.
  function quantized(file, e, meta, n, at) {
    const { levels } = meta, { codes: packed, scale: scales, zero_point: zeros, codebook: book, columns } = e.parts, count = at ? at.length : n;
    demand(isSize(levels) && levels > 1 && levels <= 65536 && isObject(packed) && isObject(scales), "a quantized tensor is described in an unknown form");
    const lie = scalesOf(meta, e.shape, n), wanted = lie.scales, of = scaleOfEach(lie, n), bits = bitsFor(levels), codes = file.codes(packed, bits, count);
    demand(product(scales.shape) === wanted, `a quantized tensor has ${product(scales.shape)} scales instead of ${wanted}`);
    const scale = file.plain(scales), zero = zeros && file.codes(zeros, bits, wanted), values = book && file.plain(book), by = columns && file.plain(columns);
    demand(!values || values.length === levels, "a table of values has another length");
    const wide = e.dtype === "float64" || scales.dtype === "float64", round = wide ? x => x : Math.fround;
    const middle = levels === 2 ? 0.5 : levels >> 1, out = new (wide ? Float64Array : Float32Array)(n), inner = product(e.shape.slice(2));
    demand(!by || by.length === e.shape[1], "a quantized tensor has another number of columns");
    for (let j = 0; j < count; j++) {
      const i = at ? at[j] : j, s = of[i], c = codes[j];
      demand(c < levels, "a code is too large");
      const x = round((values ? values[c] : c - (zero ? zero[s] : middle)) * scale[s]);
      out[i] = by ? x * by[Math.floor(i / inner) % e.shape[1]] : x;
    }
    return out;
  }

  function choose(m, n) {  // the n-subsets of 0 … m - 1, in lexicographic order
    const out = [], walk = (from, some) => {
      if (some.length === n) { out.push(some); return; }
      for (let i = from; i <= m - n + some.length; i++) walk(i + 1, [...some, i]);
    };
    walk(0, []);
    return out;
  }

  function placesOf(file, e, meta, n) {  // the stored elements of a sparse tensor, in C order
    const { layout, count } = meta, { positions } = e.parts;
    demand(isSize(count) && count <= n, "a sparse tensor is described in an unknown form");
    const at = new Uint32Array(count);
    let found = 0;
    const put = i => { demand(found < count && i < n, "the positions of a sparse tensor do not fit"); at[found++] = i; };
    if (layout === "dense") for (let i = 0; i < n; i++) put(i);
    else if (layout === "bitmap") file.codes(positions, 1, n).forEach((b, i) => { if (b) put(i); });
    else if (layout === "gaps") {
      demand(isSize(meta.gap) && meta.gap > 0 && meta.gap <= 16 && isSize(meta.gaps) && meta.gaps <= MOST, "a sparse tensor is described in an unknown form");
      const most = 2 ** meta.gap - 1;
      let i = 0;
      for (const c of file.codes(positions, meta.gap, meta.gaps)) { i += c; if (c < most) put(i++); }
      demand(i <= n, "the positions of a sparse tensor do not fit");
    } else if (layout === "n:m") {
      const { n: few, m } = meta, shape = e.shape, columns = shape[1], inner = product(shape.slice(2));
      demand(isSize(few) && isSize(m) && few > 0 && few <= m && m <= 16 && shape.length > 1, "a sparse tensor is described in an unknown form");
      const patterns = choose(m, few), runs = Math.ceil(columns / m), codes = file.codes(positions, bitsFor(patterns.length), shape[0] * inner * runs), places = [];
      codes.forEach((c, r) => {
        demand(c < patterns.length, "the positions of a sparse tensor do not fit");
        const line = Math.floor(r / runs), first = r % runs * m, row = Math.floor(line / inner), rest = line % inner;
        for (const j of patterns[c]) if (first + j < columns) places.push((row * columns + first + j) * inner + rest);
      });
      places.sort((a, b) => a - b).forEach(put);
    } else throw new MzError(`a sparse tensor has the unknown layout ${quoted(layout)}`);
    demand(found === count, "the positions of a sparse tensor do not fit");
    return at;
  }

  function sparse(file, e, meta, n) {
    const at = placesOf(file, e, meta, n);
    if (meta.levels !== undefined) return quantized(file, e, meta, n, at);
    demand(isObject(e.parts.values) && product(e.parts.values.shape) === at.length, "a sparse tensor has another number of values");
    const values = file.plain(e.parts.values), out = new values.constructor(n);
    at.forEach((i, j) => { out[i] = values[j]; });
    return out;
  }

  // [codes, weights in a block, middle, groups of a block]
  const BLOCKS = { Q4_0: [4, 32, 8, 1], Q4_1: [4, 32, 0, 1], Q8_0: [8, 32, 128, 1], Q4_K: [4, 256, 0, 8], Q6_K: [6, 256, 32, 16] };
  function gguf(file, e, meta, n) {
    demand(has(BLOCKS, meta.type), `blocks of the unknown type ${quoted(meta.type)}`);
    const [bits, block, middle, groups] = BLOCKS[meta.type], p = e.parts, blocks = n / block, out = new Float32Array(n), f = Math.fround;
    demand(Number.isInteger(blocks) && e.shape.at(-1) % block === 0, "a row is no whole number of blocks");
    const part = name => { demand(isObject(p[name]) && product(p[name].shape) === blocks, "a tensor of blocks is described in an unknown form"); return file.plain(p[name]); };
    const codes = file.codes(p.codes, bits, n), scale = part("scale"), minimum = p.minimum && part("minimum");
    const scales = p.scales && file.codes(p.scales, groups === 8 ? 6 : 8, blocks * groups), minima = p.minima && file.codes(p.minima, 6, blocks * groups);
    for (let i = 0; i < n; i++) {
      const b = Math.floor(i / block), g = b * groups + Math.floor(i % block / (block / groups));
      const s = scales ? f(scale[b] * (scales[g] - (groups === 16 ? 128 : 0))) : scale[b];
      const low = minima ? -f(minimum[b] * minima[g]) : minimum ? minimum[b] : 0;
      out[i] = f(f(s * (codes[i] - middle)) + low);
    }
    return out;
  }

  function trellis(file, e, meta, n) {
    const { states, run, counts, levels } = meta, { shape } = e, contexts = Array.isArray(counts) ? counts.length : 0, round = e.dtype === "float64" ? x => x : Math.fround;
    demand([4, 8, 16, 32].includes(states) && isSize(run) && run && Array.isArray(levels) && levels.length === contexts && contexts >= 2 && contexts <= 256 && contexts % 2 === 0 && shape.length > 1, "a trellis is described in an unknown form");
    const codes = counts.map((c, i) => {
      demand(isSize(c) && isSize(levels[i]) && levels[i] % 2 && levels[i] > 2 && levels[i] < 32768 && isObject(e.parts[`codes${i}`]), "a trellis is described in an unknown form");
      return file.codes(e.parts[`codes${i}`], bitsFor(levels[i]), c);
    });
    demand(counts.reduce((a, b) => a + b) === n, "a trellis has another number of codes");
    const width = n / (shape[0] || 1), inner = product(shape.slice(2));
    const vector = (name, length) => {
      if (!e.parts[name]) return null;
      demand(product(e.parts[name].shape) === length, "a trellis is described in an unknown form");
      return file.plain(e.parts[name]);
    };
    const rows = vector("row_spread", shape[0]), columns = vector("column_spread", width);
    const [rowSteps, columnSteps] = [vector("row_steps", shape[0]), vector("column_steps", shape[1])].map(v => v && Array.from(v, s => Math.fround(2 ** (s / 8))));
    const [fallen, odd] = { 4: [1, 2], 8: [5, 2], 16: [9, 4], 32: [9, 4] }[states], lanes = Math.ceil(n / run), state = new Uint8Array(lanes), taken = new Uint32Array(contexts);
    const scale = file.plain(e.parts.scale)[0], out = new (e.dtype === "float64" ? Float64Array : Float32Array)(n);
    for (let step = 0; step < Math.min(run, n); step++) for (let lane = 0; lane < lanes; lane++) {
      const i = lane * run + step;
      if (i >= n) continue;
      const row = Math.floor(i / width), spread = (rows ? rows[row] : 0) + (columns ? columns[i % width] : 0) >> 1;
      const grid = state[lane] >= states / 2 ? 1 : 0, context = 2 * Math.min(spread, contexts / 2 - 1) + grid;
      const c = codes[context][taken[context]++];
      demand(c < levels[context], "a trellis has another number of codes");
      const k = c - (levels[context] >> 1);
      state[lane] = 2 * state[lane] % states ^ (grid ? fallen : 0) ^ (k & 1 ? odd : 0);
      const x = round((2 * k - grid * Math.sign(k)) * (rowSteps ? Math.fround(scale * rowSteps[row]) : scale));
      out[i] = columnSteps ? x * columnSteps[Math.floor(i / inner) % shape[1]] : x;
    }
    return out;
  }

  const KINDS = { quantized, sparse, gguf, trellis };

  // ------------------------------------------------------------------------------------------------ operations, in float32

  // A tensor is {shape, data, type}, its numbers in C order. Sums are taken in float64 and rounded to float32 once, so
  // that they are at least as close to the true ones as PyTorch's. `budget` says what a run may still take: numbers that
  // are alive, and steps of work.
  const budget = { room: MOST, work: Infinity };
  const HOLDS = { float32: Float32Array, int64: Float64Array, int32: Float64Array, bool: Uint8Array };
  const isFloat = x => x.type === "float32";
  function tensor(shape, data, type = "float32") {
    demand(shape.every(isSize) && product(shape) <= budget.room, `a tensor of shape ${quoted(shape)} is beyond this reader`);
    demand(has(HOLDS, type), `numbers of type ${quoted(type)} are beyond this reader`);
    return { shape, type, data: data ?? new HOLDS[type](product(shape)) };
  }
  function work(steps) { demand((budget.work -= steps) > 0, "the model takes more work than this reader does"); }
  const given = x => tensor(x.shape, x.data, x.data instanceof Float32Array ? "float32" : x.type ?? (x.dtype === "bool" ? "bool" : "int64"));
  const alike = (x, data) => tensor(x.shape, data, x.type);
  const pair = x => Array.isArray(x) ? x.length === 1 ? [x[0], x[0]] : x : [x, x];
  const fits = (x, shape, name) => demand(x.shape.length === shape.length && shape.every((n, i) => n === null || n === x.shape[i]), `${name} is given a tensor of shape ${quoted(x.shape)}`);
  const dimOf = (x, d, more = 0) => {
    const n = x.shape.length + more;
    demand(Number.isInteger(d) && d >= -n && d < Math.max(n, 1), `a tensor of shape ${quoted(x.shape)} has no dimension ${quoted(d)}`);
    return d < 0 ? d + n : d;
  };
  const without = (list, i, ...by) => [...list.slice(0, i), ...by, ...list.slice(i + 1)];
  const stridesOf = shape => shape.map((_, i) => product(shape.slice(i + 1)));

  // Calls f(a, b, …) with the places of each element under several strides, in C order of the shape.
  function walk(shape, strides, starts, f) {
    const at = Array(shape.length).fill(0), here = starts.slice(), n = product(shape), last = shape.length - 1;
    work(n);
    for (let i = 0; i < n; i++) {
      f(i, here);
      for (let d = last; d >= 0; d--) {
        for (let k = 0; k < here.length; k++) here[k] += strides[k][d];
        if (++at[d] < shape[d]) break;
        for (let k = 0; k < here.length; k++) here[k] -= strides[k][d] * shape[d];
        at[d] = 0;
      }
    }
  }
  function taken(x, shape, strides, start = 0) {  // the numbers of x at these places
    const out = tensor(shape, undefined, x.type), { data } = x;
    walk(shape, [strides], [start], (i, [at]) => { out.data[i] = data[at]; });
    return out;
  }
  const permute = (x, dims) => {
    const d = dims.map(i => dimOf(x, i)), s = stridesOf(x.shape);
    demand(new Set(d).size === x.shape.length && d.length === x.shape.length, `dimensions ${quoted(dims)} are no order of those of a tensor of shape ${quoted(x.shape)}`);
    return taken(x, d.map(i => x.shape[i]), d.map(i => s[i]));
  };
  const swapped = (x, a, b) => { const d = [...x.shape.keys()]; [d[a], d[b]] = [d[b], d[a]]; return permute(x, d); };
  const reshaped = (x, shape) => {
    const rest = shape.indexOf(-1), known = product(shape.filter(n => n !== -1));
    const full = rest < 0 ? shape : without(shape, rest, known ? x.data.length / known : 0);
    demand(product(full) === x.data.length, `${x.data.length} numbers have not the shape ${quoted(shape)}`);
    return tensor(full, x.data, x.type);
  };
  function wider(...shapes) {  // the shape to which these are repeated
    const n = Math.max(...shapes.map(s => s.length));
    return Array.from({ length: n }, (_, i) => {
      const sizes = shapes.map(s => s[i - n + s.length] ?? 1), most = sizes.find(k => k !== 1) ?? 1;
      demand(sizes.every(k => k === 1 || k === most), `shapes ${quoted(shapes)} do not match`);
      return most;
    });
  }
  const repeatedStrides = (from, to) => {
    const s = stridesOf(from), less = to.length - from.length;
    return to.map((n, i) => i < less || from[i - less] === 1 ? 0 : s[i - less]);
  };
  const expanded = (x, shape) => taken(x, shape, repeatedStrides(x.shape, wider(x.shape, shape)));

  function unary(f, type) {
    return (x, ...how) => {
      const out = tensor(x.shape, undefined, type ?? x.type);
      work(x.data.length);
      for (let i = 0; i < out.data.length; i++) out.data[i] = f(x.data[i], ...how);
      return out;
    };
  }
  // A number among the arguments is a tensor whose type does not count.
  const plainNumber = v => typeof v === "number" ? { shape: [], data: [v], type: Number.isInteger(v) ? "whole" : "float" } : v;
  const RANK = ["bool", "whole", "int32", "int64", "float", "float32"];
  function together(a, b) {
    const most = RANK[Math.max(RANK.indexOf(a.type), RANK.indexOf(b.type))];
    return { whole: "int64", float: "float32" }[most] ?? most;
  }
  function binary(f, type) {
    return (x, y, ...how) => {
      const a = plainNumber(x), b = plainNumber(y), shape = wider(a.shape, b.shape), out = tensor(shape, undefined, type ?? together(a, b));
      const [p, q, to] = [a.data, b.data, out.data], n = to.length;
      if (p.length === n && q.length === n) { work(n); for (let i = 0; i < n; i++) to[i] = f(p[i], q[i], ...how); }
      else if (q.length === 1) { work(n); for (let i = 0; i < n; i++) to[i] = f(p[i], q[0], ...how); }
      else walk(shape, [repeatedStrides(a.shape, shape), repeatedStrides(b.shape, shape)], [0, 0], (i, [j, k]) => { to[i] = f(p[j], q[k], ...how); });
      return out;
    };
  }
  const where = (c, x, y) => {
    const a = plainNumber(x), b = plainNumber(y), shape = wider(c.shape, a.shape, b.shape), out = tensor(shape, undefined, together(a, b));
    walk(shape, [c, a, b].map(t => repeatedStrides(t.shape, shape)), [0, 0, 0], (i, [k, p, q]) => { out.data[i] = c.data[k] ? a.data[p] : b.data[q]; });
    return out;
  };

  // What f makes of the numbers along some dimensions; f gets each run of them as an array.
  function over(f, type) {
    return (x, dim, keep, ...how) => {
      const all = dim === null || Array.isArray(dim) && !dim.length, dims = new Set(all ? x.shape.keys() : [dim].flat().map(d => dimOf(x, d)));
      const left = [...x.shape.keys()].filter(d => !dims.has(d)), rows = permute(x, [...left, ...dims]), k = product([...dims].map(d => x.shape[d]));
      const kept = left.map(d => x.shape[d]), out = tensor(keep ? x.shape.map((n, d) => dims.has(d) ? 1 : n) : kept, undefined, type ?? x.type);
      for (let i = 0; i < out.data.length; i++) out.data[i] = f(rows.data.subarray(i * k, (i + 1) * k), ...how);
      return out;
    };
  }
  function along(x, dim, f) {  // f changes each run along a dimension in place
    const d = dimOf(x, dim), last = x.shape.length - 1, rows = x.shape.length ? swapped(x, d, last) : alike(x, x.data.slice()), k = x.shape[d] ?? 1;
    for (let i = 0; i < rows.data.length; i += k) f(rows.data.subarray(i, i + k));
    return d < last ? swapped(rows, d, last) : rows;
  }
  const sumOf = v => { let s = 0; for (const x of v) s += x; return s; };
  const meanOf = v => sumOf(v) / v.length;
  const mostOf = v => { let m = -Infinity; for (const x of v) { if (x !== x) return x; if (x > m) m = x; } return m; };
  const placeOf = v => { let at = 0; for (let i = 1; i < v.length; i++) if (v[i] > v[at] || v[i] !== v[i] && v[at] === v[at]) at = i; return at; };
  const spreadOf = (v, correction) => { const m = meanOf(v); let s = 0; for (const x of v) s += (x - m) ** 2; return s / Math.max(0, v.length - correction); };
  const floats = x => isFloat(x) ? x : unary(v => v, "float32")(x);
  const softmax = (x, dim, log = false) => along(floats(x), dim, v => {
    const most = mostOf(v), e = Float64Array.from(v, t => Math.exp(t - most)), s = sumOf(e);
    for (let i = 0; i < v.length; i++) v[i] = log ? v[i] - most - Math.log(s) : e[i] / s;
  });

  function erf(x) {  // a series without differences
    const a = Math.abs(x);
    if (!(a < 6)) return x !== x ? x : Math.sign(x);
    let sum = 0;
    for (let term = a, n = 1; term > 1e-18 * sum; term *= 2 * a * a / (2 * n++ + 1)) sum += term;
    return Math.sign(x) * Math.min(1, 2 / Math.sqrt(Math.PI) * Math.exp(-a * a) * sum);
  }
  const sigmoid = x => 1 / (1 + Math.exp(-x)), softplus = x => x > 20 ? x : Math.log1p(Math.exp(x));
  const gelu = (x, how) => how === "tanh" ? x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))) : x / 2 * (1 + erf(x / Math.SQRT2));
  const within = (x, low, high) => x < low ? low : x > high ? high : x;
  const even = x => { const f = Math.floor(x), d = x - f; return d > 0.5 || d === 0.5 && f % 2 ? f + 1 : f; };
  const elu = (x, alpha = 1) => x > 0 ? x : alpha * Math.expm1(x);
  const ACTS = {
    relu: x => x > 0 || x !== x ? x : 0, sigmoid, tanh: Math.tanh, gelu, elu, silu: x => x * sigmoid(x), mish: x => x * Math.tanh(softplus(x)),
    hardtanh: (x, low = -1, high = 1) => within(x, low, high), relu6: x => within(x, 0, 6), hardswish: x => x * within(x + 3, 0, 6) / 6, hardsigmoid: x => within(x + 3, 0, 6) / 6,
    leaky_relu: (x, slope = 0.01) => x < 0 ? slope * x : x, selu: x => 1.0507009873554805 * elu(x, 1.6732632423543772), log_sigmoid: x => -softplus(-x),
    softplus: (x, beta = 1, threshold = 20) => beta * x > threshold ? x : Math.log1p(Math.exp(beta * x)) / beta,
  };

  function convolve(x, w, b, { stride = 1, padding = 0, dilation = 1, groups = 1 } = {}) {
    const [n, ci, h, wide] = x.shape, [co, cg, kh, kw] = w.shape, [sy, sx] = pair(stride), [py, px] = pair(padding), [dy, dx] = pair(dilation);
    demand(x.shape.length === 4 && ci === cg * groups && co % groups === 0 && [sy, sx, dy, dx].every(v => isSize(v) && v) && [py, px].every(isSize), `a convolution of ${quoted(w.shape)} is given a tensor of shape ${quoted(x.shape)}`);
    const oh = Math.floor((h + 2 * py - dy * (kh - 1) - 1) / sy) + 1, ow = Math.floor((wide + 2 * px - dx * (kw - 1) - 1) / sx) + 1;
    const out = tensor([n, co, oh, ow]), sum = new Float64Array(oh * ow);
    work(out.data.length * cg * kh * kw);
    for (let i = 0; i < n; i++) for (let o = 0; o < co; o++) {
      sum.fill(b ? b[o] : 0);
      const first = Math.floor(o / (co / groups)) * cg;
      for (let c = 0; c < cg; c++) for (let ky = 0; ky < kh; ky++) for (let kx = 0; kx < kw; kx++) {
        const v = w.data[((o * cg + c) * kh + ky) * kw + kx], from = (i * ci + first + c) * h, left = kx * dx - px;
        if (!v) continue;
        const start = Math.max(0, Math.ceil(-left / sx)), stop = Math.min(ow, Math.floor((wide - 1 - left) / sx) + 1);
        for (let y = 0; y < oh; y++) {
          const row = y * sy + ky * dy - py;
          if (row < 0 || row >= h) continue;
          for (let z = start, at = (from + row) * wide + left + start * sx; z < stop; z++, at += sx) sum[y * ow + z] += v * x.data[at];
        }
      }
      out.data.set(sum, (i * co + o) * oh * ow);
    }
    return out;
  }

  function dense(x, w, b) {  // x wᵀ + b along the last dimension
    const [o, k] = w.shape, rows = x.data.length / k, out = tensor([...x.shape.slice(0, -1), o]);
    demand(x.shape.at(-1) === k, `a product with ${quoted(w.shape)} is given a tensor of shape ${quoted(x.shape)}`);
    work(out.data.length * k);
    for (let r = 0; r < rows; r++) for (let j = 0; j < o; j++) {
      let sum = b ? b[j] : 0;
      for (let i = 0; i < k; i++) sum += w.data[j * k + i] * x.data[r * k + i];
      out.data[r * o + j] = sum;
    }
    return out;
  }

  function matmul(x, y) {
    const [a, b] = [x.shape.length === 1 ? reshaped(x, [1, -1]) : x, y.shape.length === 1 ? reshaped(y, [-1, 1]) : y];
    const [m, k] = a.shape.slice(-2), [l, n] = b.shape.slice(-2), stacks = wider(a.shape.slice(0, -2), b.shape.slice(0, -2));
    demand(k === l && x.shape.length && y.shape.length, `no product of shapes ${quoted(x.shape)} and ${quoted(y.shape)}`);
    const out = tensor([...stacks, m, n]), row = new Float64Array(n);
    work(out.data.length * k);
    const [p, q] = [[a, [...stacks, m, k]], [b, [...stacks, k, n]]].map(([t, shape]) => String(t.shape) === String(shape) ? t.data : expanded(t, shape).data);
    for (let s = 0; s < product(stacks); s++) for (let i = 0; i < m; i++) {
      row.fill(0);
      for (let j = 0; j < k; j++) {
        const v = p[(s * m + i) * k + j], from = (s * k + j) * n;
        for (let z = 0; z < n; z++) row[z] += v * q[from + z];
      }
      out.data.set(row, (s * m + i) * n);
    }
    return reshaped(out, [...stacks, ...x.shape.length === 1 ? [] : [m], ...y.shape.length === 1 ? [] : [n]]);
  }

  function attention(q, k, v, mask, causal, scale, grouped) {
    const more = grouped ? q.shape.at(-3) / k.shape.at(-3) : 1, share = t => more === 1 ? t : repeatEach(t, more, t.shape.length - 3);
    demand(Number.isInteger(more), "attention is given heads that do not match");
    const [keys, values] = [share(k), share(v)], last = keys.shape.length - 1;
    let scores = matmul(unary(x => x * (scale ?? 1 / Math.sqrt(q.shape.at(-1))))(q), swapped(keys, last - 1, last));
    const [m, n] = scores.shape.slice(-2);
    if (causal) scores = alike(scores, scores.data.map((x, i) => i % n > Math.floor(i / n) % m ? -Infinity : x));
    if (mask) scores = mask.type === "bool" ? where(mask, scores, -Infinity) : binary((a, b) => a + b)(scores, mask);
    return matmul(softmax(scores, -1), values);
  }

  // Windows over the last two dimensions; `finish` gets the values of each that lie inside, and the size of the window.
  function pool(x, { kernel_size, stride, padding = 0, dilation = 1, ceil_mode = false }, finish) {
    const [kh, kw] = pair(kernel_size), [sy, sx] = pair(stride === undefined || stride === null || stride.length === 0 ? kernel_size : stride);
    const [py, px] = pair(padding), [dy, dx] = pair(dilation), [h, w] = x.shape.slice(-2);
    demand(x.shape.length > 2 && [kh, kw, sy, sx, dy, dx].every(v => isSize(v) && v) && [py, px].every(isSize), "pooling is described in an unknown form");
    const size = (n, k, s, p, d) => {
      const full = (n + 2 * p - d * (k - 1) - 1) / s, out = (ceil_mode ? Math.ceil(full) : Math.floor(full)) + 1;
      return ceil_mode && (out - 1) * s >= n + p ? out - 1 : out;
    };
    const oh = size(h, kh, sy, py, dy), ow = size(w, kw, sx, px, dx), planes = product(x.shape.slice(0, -2)), out = tensor([...x.shape.slice(0, -2), oh, ow]);
    work(out.data.length * kh * kw);
    for (let p = 0, to = 0; p < planes; p++) for (let y = 0; y < oh; y++) for (let z = 0; z < ow; z++) {
      let most = -Infinity, sum = 0, inside = 0;
      for (let i = 0; i < kh; i++) for (let j = 0; j < kw; j++) {
        const a = y * sy + i * dy - py, b = z * sx + j * dx - px;
        if (a < 0 || a >= h || b < 0 || b >= w) continue;
        const v = x.data[(p * h + a) * w + b];
        if (v > most || v !== v) most = v;
        sum += v;
        inside++;
      }
      const rows = Math.min(y * sy - py + kh, h + py) - (y * sy - py), columns = Math.min(z * sx - px + kw, w + px) - (z * sx - px);
      out.data[to++] = finish({ most, sum, inside, padded: rows * columns });
    }
    return out;
  }
  const maxPool = (x, how) => pool(x, how, w => w.most);
  const averagePool = (x, how) => pool(x, how, w => w.sum / (how.divisor_override ?? (how.count_include_pad === false ? w.inside : w.padded)));
  function regions(x, size, finish) {  // adaptive pooling
    const [h, w] = x.shape.slice(-2), [oh, ow] = pair(size).map((n, i) => n ?? [h, w][i]), planes = product(x.shape.slice(0, -2)), out = tensor([...x.shape.slice(0, -2), oh, ow]);
    demand(x.shape.length > 2, "pooling is described in an unknown form");
    work(planes * (h + oh) * (w + ow));
    for (let p = 0, to = 0; p < planes; p++) for (let y = 0; y < oh; y++) for (let z = 0; z < ow; z++) {
      const some = [];
      for (let i = Math.floor(y * h / oh); i < Math.ceil((y + 1) * h / oh); i++) for (let j = Math.floor(z * w / ow); j < Math.ceil((z + 1) * w / ow); j++) some.push(x.data[(p * h + i) * w + j]);
      out.data[to++] = finish(some);
    }
    return out;
  }

  const SIZED = "a norm is given a tensor of another shape";
  function scaled(out, k, w, b, channel) {  // times w plus b, by the channel of each element
    demand((!w || w.length === k) && (!b || b.length === k), SIZED);
    for (let i = 0; i < out.data.length; i++) { const c = channel(i); out.data[i] = out.data[i] * (w ? w[c] : 1) + (b ? b[c] : 0); }
    return out;
  }
  function normalized(x, k, shift, variance) {  // runs of k elements
    const out = tensor(x.shape);
    demand(k && x.data.length % k === 0, SIZED);
    work(4 * x.data.length);
    for (let at = 0; at < x.data.length; at += k) {
      const v = x.data.subarray(at, at + k), m = shift ? meanOf(v) : 0, s = 1 / Math.sqrt(variance(v));
      for (let i = 0; i < k; i++) out.data[at + i] = (v[i] - m) * s;
    }
    return out;
  }
  const layerNorm = (x, shape, w, b, eps) => {
    const k = product(shape);
    demand(String(x.shape.slice(-shape.length)) === String(shape), SIZED);
    return scaled(normalized(x, k, true, v => spreadOf(v, 0) + eps), k, w?.data, b?.data, i => i % k);
  };
  const rmsNorm = (x, shape, w, eps) => {
    const k = product(shape);
    demand(String(x.shape.slice(-shape.length)) === String(shape), SIZED);
    return scaled(normalized(x, k, false, v => { let s = 0; for (const a of v) s += a * a; return s / k + (eps ?? 1.1920928955078125e-7); }), k, w?.data, undefined, i => i % k);
  };
  const groupNorm = (x, groups, w, b, eps) => {
    const [n, c] = x.shape, inner = product(x.shape.slice(2));
    demand(x.shape.length > 1 && c % groups === 0, SIZED);
    return scaled(normalized(x, c / groups * inner, true, v => spreadOf(v, 0) + eps), c, w?.data, b?.data, i => Math.floor(i / inner) % c);
  };
  function batchNorm(x, w, b, mean, variance, eps) {
    const c = x.shape[1], inner = product(x.shape.slice(2)), out = tensor(x.shape), by = Float64Array.from(variance.data, v => 1 / Math.sqrt(v + eps));
    demand(x.shape.length > 1 && mean.data.length === c && by.length === c, SIZED);
    work(2 * x.data.length);
    for (let i = 0; i < x.data.length; i++) { const k = Math.floor(i / inner) % c; out.data[i] = (x.data[i] - mean.data[k]) * by[k]; }
    return scaled(out, c, w?.data, b?.data, i => Math.floor(i / inner) % c);
  }

  const placed = (k, n) => { demand(Number.isInteger(k) && k >= -n && k < n, `there is no place ${k} among ${n}`); return k < 0 ? k + n : k; };
  function rowsOf(x, dim, index) {  // slices along a dimension, wherever the numbers in `index` say
    const d = dimOf(x, dim), n = x.shape[d], inner = product(x.shape.slice(d + 1)), outer = product(x.shape.slice(0, d)), at = Array.from(index.data, k => placed(k, n));
    const out = tensor([...x.shape.slice(0, d), ...index.shape, ...x.shape.slice(d + 1)], undefined, x.type);
    work(out.data.length);
    for (let o = 0, to = 0; o < outer; o++) for (const k of at) { const from = (o * n + k) * inner; out.data.set(x.data.subarray(from, from + inner), to); to += inner; }
    return out;
  }
  const repeatEach = (x, times, dim) => rowsOf(x, dim, tensor([x.shape[dim] * times], Float64Array.from({ length: x.shape[dim] * times }, (_, i) => Math.floor(i / times)), "int64"));
  const range = (x, dim, start, end, step = 1) => {
    const d = dimOf(x, dim), n = x.shape[d], edge = (v, usual) => v === null ? usual : Math.max(0, Math.min(n, v < 0 ? v + n : v));
    demand(Number.isInteger(step) && step > 0, "a slice has a step below 1");
    const from = edge(start, 0), size = Math.max(0, Math.ceil((edge(end, n) - from) / step)), s = stridesOf(x.shape);
    return taken(x, without(x.shape, d, size), without(s, d, s[d] * step), from * s[d]);
  };
  const picked = (x, dim, k) => { const d = dimOf(x, dim), s = stridesOf(x.shape); return taken(x, without(x.shape, d), without(s, d), placed(k, x.shape[d]) * s[d]); };
  const pieces = (x, sizes, dim) => {
    const d = dimOf(x, dim);
    demand(sizes.every(isSize) && sumOf(sizes) === x.shape[d] && sizes.length <= 4096, `a dimension of ${x.shape[d]} is cut into ${quoted(sizes)}`);
    let at = 0;
    return sizes.map(n => range(x, d, at, at += n));
  };
  function joined(list, dim) {
    const d = dimOf(list[0], dim), n = sumOf(list.map(x => x.shape[d])), outer = product(list[0].shape.slice(0, d)), type = list.map(x => x.type).reduce((a, b) => together({ type: a }, { type: b }));
    for (const x of list) demand(String(without(x.shape, d)) === String(without(list[0].shape, d)), `tensors of shapes ${quoted(list.map(t => t.shape))} are put behind each other`);
    const out = tensor(without(list[0].shape, d, n), undefined, type);
    work(out.data.length);
    for (let o = 0, to = 0; o < outer; o++) for (const x of list) { const k = x.data.length / outer; out.data.set(x.data.subarray(o * k, o * k + k), to); to += k; }
    return out;
  }
  const onlyPart = keeps => (x, diagonal) => {
    const [m, n] = x.shape.slice(-2), out = alike(x, x.data.slice());
    for (let i = 0; i < out.data.length; i++) if (!keeps(i % n - Math.floor(i / n) % m, diagonal)) out.data[i] = 0;
    return out;
  };
  function padded(x, pad, value) {
    const n = x.shape.length, before = x.shape.map((_, d) => pad[2 * (n - 1 - d)] ?? 0), after = x.shape.map((_, d) => pad[2 * (n - 1 - d) + 1] ?? 0);
    demand(pad.length % 2 === 0 && pad.length <= 2 * n && pad.every(Number.isInteger), "padding is described in an unknown form");
    const out = tensor(x.shape.map((k, d) => k + before[d] + after[d]), undefined, x.type).data.fill(value), s = stridesOf(x.shape), shape = x.shape.map((k, d) => k + before[d] + after[d]), t = stridesOf(shape);
    const starts = x.shape.map((_, d) => Math.max(0, before[d])), inner = shape.map((k, d) => Math.max(0, Math.min(k, before[d] + x.shape[d]) - starts[d]));
    walk(inner, [s, t], [sumOf(starts.map((v, d) => (v - before[d]) * s[d])), sumOf(starts.map((v, d) => v * t[d]))], (_, [from, to]) => { out[to] = x.data[from]; });
    return tensor(shape, out, x.type);
  }

  // ------------------------------------------------------------------------------------------------ layers

  const act = name => l => { const f = unary(ACTS[name]), how = { gelu: [l.approximate], hardtanh: [l.min_val, l.max_val], leaky_relu: [l.negative_slope], elu: [l.alpha], softplus: [l.beta, l.threshold] }[name] ?? []; return x => f(x, ...how); };
  const same = () => x => x;
  const batch = (l, own) => {
    demand(l.track_running_stats !== false, "batch norms that have learned nothing are beyond this reader");
    const [w, b, mean, variance] = [own("weight", true), own("bias", true), own("running_mean"), own("running_var")];
    return x => batchNorm(x, w, b, mean, variance, l.eps ?? 1e-5);
  };
  // class → (arguments, its tensors by name) → a function of a tensor
  const LAYERS = {
    Linear: (l, own) => { const [w, b] = [own("weight"), own("bias", true)]; return x => dense(x, w, b?.data); },
    Conv2d: (l, own) => {
      demand((l.padding_mode ?? "zeros") === "zeros", "convolutions whose padding is not of zeros are beyond this reader");
      const [w, b] = [own("weight"), own("bias", true)], more = w.shape.slice(2).map((k, i) => l.padding === "same" ? pair(l.dilation ?? 1)[i] * (k - 1) : 0);
      const how = typeof l.padding === "string" ? { ...l, padding: 0 } : l, pad = more.slice().reverse().flatMap(n => [Math.floor(n / 2), Math.ceil(n / 2)]);
      return x => convolve(l.padding === "same" ? padded(x, pad, 0) : x, w, b?.data, how);
    },
    BatchNorm1d: batch, BatchNorm2d: batch,
    LayerNorm: (l, own) => { const [w, b] = [own("weight", true), own("bias", true)]; return x => layerNorm(x, [l.normalized_shape].flat(), w, b, l.eps ?? 1e-5); },
    RMSNorm: (l, own) => { const w = own("weight", true); return x => rmsNorm(x, [l.normalized_shape].flat(), w, l.eps ?? null); },
    GroupNorm: (l, own) => { const [w, b] = [own("weight", true), own("bias", true)]; return x => groupNorm(x, l.num_groups, w, b, l.eps ?? 1e-5); },
    Embedding: (l, own) => { const w = own("weight"); demand(!l.max_norm, "embeddings with a largest norm are beyond this reader"); return x => rowsOf(w, 0, x); },
    ReLU: act("relu"), ReLU6: act("relu6"), Sigmoid: act("sigmoid"), Tanh: act("tanh"), GELU: act("gelu"), SiLU: act("silu"), Mish: act("mish"), ELU: act("elu"), SELU: act("selu"),
    Hardswish: act("hardswish"), Hardsigmoid: act("hardsigmoid"), Hardtanh: act("hardtanh"), LeakyReLU: act("leaky_relu"), Softplus: act("softplus"), LogSigmoid: act("log_sigmoid"),
    Identity: same, Dropout: same, Dropout1d: same, Dropout2d: same, Dropout3d: same, AlphaDropout: same, FeatureAlphaDropout: same,
    Softmax: l => { demand(Number.isInteger(l.dim), "a Softmax says no dimension"); return x => softmax(x, l.dim); },
    LogSoftmax: l => { demand(Number.isInteger(l.dim), "a LogSoftmax says no dimension"); return x => softmax(x, l.dim, true); },
    Flatten: ({ start_dim = 1, end_dim = -1 }) => x => {
      const [a, b] = [start_dim, end_dim].map(d => dimOf(x, d));
      return reshaped(x, [...x.shape.slice(0, a), product(x.shape.slice(a, b + 1)), ...x.shape.slice(b + 1)]);
    },
    MaxPool2d: l => { demand(!l.return_indices, "pooling that gives places is beyond this reader"); return x => maxPool(x, l); },
    AvgPool2d: l => x => averagePool(x, l),
    AdaptiveAvgPool2d: l => x => regions(x, l.output_size, meanOf),
    AdaptiveMaxPool2d: l => x => regions(x, l.output_size, mostOf),
  };

  // The layers of a file that this reader can run, made when they are first asked for.
  function layersFrom(file, layers) {
    const made = new Map();
    return name => {
      if (!made.has(name)) {
        const l = layers.get(name);
        demand(isObject(l) && has(LAYERS, l.class), `this reader does not know the layer ${quoted(l?.class ?? name)}`);
        const simple = v => v === null || typeof v !== "object";
        demand(Object.values(l).every(v => simple(v) || Array.isArray(v) && v.every(simple)), `the layer ${quoted(name)} is described in an unknown form`);
        made.set(name, LAYERS[l.class](l, (part, may) => may && !file.tensors.has(`${name}.${part}`) ? undefined : usable(file, `${name}.${part}`)));
      }
      return made.get(name);
    };
  }
  function usable(file, name) {
    const e = file.tensors.get(name);
    demand(!e?.layer || e.layer === "Dequantize", `${quoted(name)} is used by a ${e?.layer}, which does more than this reader can`);
    const t = file.tensor(name);
    demand(has(HOLDS, t.dtype), `${quoted(name)} has numbers of type ${t.dtype}; this reader computes in float32`);
    return given(t);
  }

  // ------------------------------------------------------------------------------------------------ graphs

  // name: [arguments as the page has them, what it computes]. A type of one letter: t tensor, v value, n number, i whole
  // number, s size, f flag, w word; in capitals a list of them; with ? it may be null; behind = is the default.
  const OPERATIONS = {
    ...Object.fromEntries(["abs", "exp", "expm1", "log", "log1p", "log2", "sqrt", "sin", "cos", "floor", "ceil", "trunc", "sign"].map(n => [n, ["t", unary(Math[n])]])),
    neg: ["t", unary(x => -x)], rsqrt: ["t", unary(x => 1 / Math.sqrt(x))], reciprocal: ["t", unary(x => 1 / x)], erf: ["t", unary(erf)], round: ["t", unary(even)],
    isnan: ["t", unary(x => x !== x, "bool")], isinf: ["t", unary(x => Math.abs(x) === Infinity, "bool")], logical_not: ["t", unary(x => !x, "bool")],
    ...Object.fromEntries(["relu", "sigmoid", "log_sigmoid", "tanh", "silu", "mish", "hardswish", "hardsigmoid", "selu"].map(n => [n, ["t", unary(ACTS[n])]])),
    gelu: ["t w=none", unary(gelu)], hardtanh: ["t n=-1 n=1", unary(within)], leaky_relu: ["t n=0.01", unary(ACTS.leaky_relu)], elu: ["t n=1", unary(elu)], softplus: ["t n=1 n=20", unary(ACTS.softplus)],
    to: ["t w", (x, type) => unary(v => type === "bool" ? v !== 0 : HOLDS[type] === Float64Array ? Math.trunc(v) : v, type)(x)],
    add: ["t v n=1", binary((a, b, k) => a + k * b)], sub: ["t v n=1", binary((a, b, k) => a - k * b)], rsub: ["t v n=1", binary((a, b, k) => b - k * a)], mul: ["t v", binary((a, b) => a * b)],
    div: ["t v w?=", (a, b, how) => binary((x, y) => how === "floor" ? Math.floor(x / y) : how === "trunc" ? Math.trunc(x / y) : x / y, how || isFloat(a) || isFloat(plainNumber(b)) ? undefined : "float32")(a, b)],
    pow: ["v v", binary((a, b) => a ** b)], remainder: ["v v", binary((a, b) => a - b * Math.floor(a / b))],
    maximum: ["t t", binary((a, b) => a !== a || a > b ? a : b)], minimum: ["t t", binary((a, b) => a !== a || a < b ? a : b)],
    eq: ["t v", binary((a, b) => a === b, "bool")], ne: ["t v", binary((a, b) => a !== b, "bool")], lt: ["t v", binary((a, b) => a < b, "bool")],
    le: ["t v", binary((a, b) => a <= b, "bool")], gt: ["t v", binary((a, b) => a > b, "bool")], ge: ["t v", binary((a, b) => a >= b, "bool")],
    logical_and: ["t t", binary((a, b) => a && b ? 1 : 0, "bool")], logical_or: ["t t", binary((a, b) => a || b ? 1 : 0, "bool")],
    clamp: ["t v?= v?=", (x, low, high) => { const a = low === null ? x : binary((p, q) => p < q ? q : p)(x, low); return high === null ? a : binary((p, q) => p > q ? q : p)(a, high); }],
    where: ["t v v", where], masked_fill: ["t t v", (x, mask, v) => where(mask, v, x)],
    sum: ["t I?= f=false w?=", (x, dim, keep) => over(sumOf, x.type === "bool" ? "int64" : undefined)(x, dim, keep)], mean: ["t I?= f=false w?=", (x, dim, keep) => over(meanOf)(floats(x), dim, keep)],
    var: ["t I?= n?=1 f=false", (x, dim, correction, keep) => over(spreadOf)(x, dim, keep, correction ?? 1)], prod: ["t i f=false", over(v => v.reduce((a, b) => a * b, 1))],
    amax: ["t I=[] f=false", over(mostOf)], amin: ["t I=[] f=false", over(v => -mostOf(v.map(x => -x)))],
    argmax: ["t i?= f=false", over(placeOf, "int64")], argmin: ["t i?= f=false", over(v => placeOf(v.map(x => -x)), "int64")],
    any: ["t I?= f=false", over(v => v.some(x => x), "bool")], all: ["t I?= f=false", over(v => v.every(x => x), "bool")],
    norm: ["t n=2 I?= f=false", (x, ord, dim, keep) => over(v => ord === Infinity ? mostOf(v.map(Math.abs)) : sumOf(Float64Array.from(v, t => Math.abs(t) ** ord)) ** (1 / ord))(x, dim, keep)],
    logsumexp: ["t I f=false", over(v => { const m = mostOf(v); return m + Math.log(sumOf(Float64Array.from(v, t => Math.exp(t - m)))); })],
    cumsum: ["t i w?=", (x, dim) => along(x, dim, v => { let s = 0; for (let i = 0; i < v.length; i++) v[i] = s += v[i]; })],
    softmax: ["t i w?=", (x, dim) => softmax(x, dim)], log_softmax: ["t i w?=", (x, dim) => softmax(x, dim, true)],
    view: ["t S", reshaped], permute: ["t I", permute], transpose: ["t i i", (x, a, b) => swapped(x, dimOf(x, a), dimOf(x, b))],
    unsqueeze: ["t i", (x, dim) => { const d = dimOf(x, dim, 1); return reshaped(x, [...x.shape.slice(0, d), 1, ...x.shape.slice(d)]); }],
    squeeze: ["t I", (x, dims) => { const some = dims.map(d => dimOf(x, d)); return reshaped(x, x.shape.filter((n, d) => n !== 1 || !some.includes(d))); }],
    expand: ["t S", (x, shape) => { const less = shape.length - x.shape.length, full = shape.map((n, i) => n === -1 ? x.shape[i - less] : n); demand(less >= 0 && String(wider(x.shape, full)) === String(full), `a tensor of shape ${quoted(x.shape)} cannot become ${quoted(shape)}`); return expanded(x, full); }],
    repeat: ["t S", (x, times) => times.reduce((y, n, d) => rowsOf(y, d, tensor([n * y.shape[d]], Float64Array.from({ length: n * y.shape[d] }, (_, i) => i % y.shape[d]), "int64")), reshaped(x, [...Array(times.length - x.shape.length).fill(1), ...x.shape]))],
    repeat_interleave: ["t s i", (x, times, dim) => repeatEach(x, times, dimOf(x, dim))],
    flip: ["t I", (x, dims) => { const s = stridesOf(x.shape), some = dims.map(d => dimOf(x, d)); return x.data.length ? taken(x, x.shape, s.map((v, d) => some.includes(d) ? -v : v), sumOf(some.map(d => (x.shape[d] - 1) * s[d]))) : x; }],
    roll: ["t S I", (x, shifts, dims) => dims.reduce((y, dim, i) => { const d = dimOf(y, dim), n = y.shape[d], k = n ? (shifts[i] % n + n) % n : 0; return joined([range(y, d, n - k, n), range(y, d, 0, n - k)], d); }, x)],
    cat: ["T i=0", joined], stack: ["T i=0", (list, dim) => { const d = dimOf(list[0], dim, 1); return joined(list.map(x => reshaped(x, [...x.shape.slice(0, d), 1, ...x.shape.slice(d)])), d); }],
    select: ["t i s", picked], slice: ["t i=0 s?= s?= i=1", range],
    split: ["t s i=0", (x, size, dim) => { const n = x.shape[dimOf(x, dim)]; demand(isSize(size) && size && n / size <= 4096, "a split is described in an unknown form"); return pieces(x, Array.from({ length: Math.max(1, Math.ceil(n / size)) }, (_, i) => Math.min(size, n - i * size)), dim); }],
    split_with_sizes: ["t S i=0", pieces],
    unbind: ["t i=0", (x, dim) => { const n = x.shape[dimOf(x, dim)]; demand(n <= 4096, "a node has more than 4,096 values"); return Array.from({ length: n }, (_, i) => picked(x, dim, i)); }],
    tril: ["t i=0", onlyPart((above, k) => above <= k)], triu: ["t i=0", onlyPart((above, k) => above >= k)], constant_pad_nd: ["t S n=0", padded],
    embedding: ["t t", (w, index) => rowsOf(w, 0, index)], index_select: ["t i t", rowsOf],
    linear: ["t t t?=", (x, w, b) => dense(x, w, b?.data)], matmul: ["t t", matmul], mm: ["t t", matmul], bmm: ["t t", matmul],
    addmm: ["t t t n=1 n=1", (x, a, b, beta, alpha) => binary((p, q) => beta * p + alpha * q)(x, matmul(a, b))], baddbmm: ["t t t n=1 n=1", (x, a, b, beta, alpha) => binary((p, q) => beta * p + alpha * q)(x, matmul(a, b))],
    scaled_dot_product_attention: ["t t t t?= f=false n?= f=false", attention],
    conv2d: ["t t t?= S=[1,1] S=[0,0] S=[1,1] i=1", (x, w, b, stride, padding, dilation, groups) => convolve(x, w, b?.data, { stride, padding, dilation, groups })],
    layer_norm: ["t S t?= t?= n=1e-5", layerNorm], rms_norm: ["t S t?= n?=", rmsNorm], group_norm: ["t i t?= t?= n=1e-5", groupNorm], batch_norm: ["t t? t? t t n", batchNorm],
    max_pool2d: ["t S S=[] S=[0,0] S=[1,1] f=false", (x, kernel_size, stride, padding, dilation, ceil_mode) => maxPool(x, { kernel_size, stride, padding, dilation, ceil_mode })],
    avg_pool2d: ["t S S=[] S=[0,0] f=false f=true", (x, kernel_size, stride, padding, ceil_mode, count_include_pad) => averagePool(x, { kernel_size, stride, padding, ceil_mode, count_include_pad })],
    adaptive_avg_pool2d: ["t S", (x, size) => regions(x, size, meanOf)], adaptive_max_pool2d: ["t S", (x, size) => regions(x, size, mostOf)],
    full: ["S v w", (shape, v, type) => { const out = tensor(shape, undefined, type); out.data.fill(plainNumber(v).data[0]); return out; }],
    full_like: ["t v w", (x, v, type) => { const out = tensor(x.shape, undefined, type); out.data.fill(plainNumber(v).data[0]); return out; }],
    arange: ["v v v w", (start, end, step, type) => {
      const [a, b, by] = [start, end, step].map(v => plainNumber(v).data[0]), n = Math.max(0, Math.ceil((b - a) / by));
      const out = tensor([by ? n : NaN], undefined, type);
      for (let i = 0; i < n; i++) out.data[i] = a + i * by;
      return out;
    }],
    constant: ["S N w", (shape, numbers, type) => { demand(numbers.length === product(shape), "a constant has another number of numbers"); const out = tensor(shape, undefined, type); out.data.set(numbers); return out; }],
  };

  const AT_MOST = { nodes: 2 ** 16, levels: 32, size: 2 ** 31 - 1, work: 2 ** 34 };
  const SIZES = { "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "//": (a, b) => Math.floor(a / b), "%": (a, b) => a - b * Math.floor(a / b), max: Math.max, min: Math.min };

  function graphOf(file) {
    const { graph, layers } = file.manifest, bad = (i, why) => { throw new MzError(`node ${i} of the graph ${why}`); };
    demand(isObject(graph) && isObject(layers) && Array.isArray(graph.inputs) && Array.isArray(graph.nodes) && isObject(graph.sizes), "its graph is described in an unknown form");
    demand(graph.nodes.length <= AT_MOST.nodes && graph.inputs.length <= 2 ** 12, "its graph has too many nodes");
    const layer = layersFrom(file, new Map(Object.entries(layers))), tensors = new Map();
    demand(graph.inputs.every(Array.isArray), "its graph is described in an unknown form");
    for (const [name, type, shape] of graph.inputs) demand(typeof name === "string" && has(HOLDS, type) && Array.isArray(shape) && shape.every(n => isSize(n) || typeof n === "string" && n in graph.sizes), `the input ${quoted(name)} of the graph is described in an unknown form`);
    const bounds = n => { const s = graph.sizes[n]; return Array.isArray(s) ? s.slice(1) : [1, AT_MOST.size]; };

    // A size as a function of the named ones.
    function sizeOf(s, i, depth = 0) {
      if (Number.isSafeInteger(s)) return () => s;
      if (typeof s === "string" && s in graph.sizes) return named => named[s];
      if (!Array.isArray(s) || s.length !== 3 || !has(SIZES, s[0]) || depth > AT_MOST.levels) bad(i, `has the size ${quoted(s)}`);
      const [a, b] = [sizeOf(s[1], i, depth + 1), sizeOf(s[2], i, depth + 1)];
      return named => { const n = SIZES[s[0]](a(named), b(named)); demand(Number.isSafeInteger(n), "a size of the graph is no whole number"); return n; };
    }
    const numberOf = (x, i) => isObject(x) && ["inf", "-inf", "nan"].includes(x.float) ? Number(x.float.replace("inf", "Infinity")) : typeof x === "number" || typeof x === "boolean" ? Number(x) : bad(i, `has ${quoted(x)} for a number`);

    const before = i => graph.inputs.length + i;
    function back(n, i) { if (!isSize(n) || !n || n > before(i)) bad(i, `refers to ${quoted(n)} values back`); return before(i) - n; }

    // An argument of a type as a function of (values, sizes); `uses` collects the values that it needs.
    function argument(kind, x, i, uses) {
      const many = kind >= "A" && kind <= "Z", one = kind.toLowerCase();
      if (many) {
        if (!Array.isArray(x) || one === "t" && !x.length) bad(i, `has ${quoted(x)} for a list`);
        const each = x.map(y => argument(one, y, i, uses));
        return (...given) => each.map(f => f(...given));
      }
      if (one === "t" || one === "v" && !Array.isArray(x)) { const k = back(x, i); uses.push(k); return values => values[k]; }
      if (one === "v") {
        if (x.length === 1 && typeof x[0] !== "string") { const v = numberOf(x[0], i); return () => v; }
        const s = sizeOf(x.length === 1 ? x[0] : x, i);
        return (_, named) => s(named);
      }
      if (one === "s") { const s = sizeOf(x, i); return (_, named) => s(named); }
      if (one === "n") { const v = numberOf(x, i); return () => v; }
      if (one === "i" && !Number.isSafeInteger(x) || one === "f" && typeof x !== "boolean" || one === "w" && typeof x !== "string") bad(i, `has the argument ${quoted(x)}`);
      return () => x;
    }

    const nodes = graph.nodes.map((node, i) => {
      if (!Array.isArray(node) || typeof node[0] !== "string") bad(i, "is described in an unknown form");
      const [what, ...args] = node, uses = [];
      if (what === "item") {
        if (args.length !== 2 || !isSize(args[1])) bad(i, "is described in an unknown form");
        const k = back(args[0], i);
        return { uses: [k], run: values => { if (!Array.isArray(values[k]) || !values[k][args[1]]) bad(i, "takes a value that is not there"); return values[k][args[1]]; } };
      }
      if (what[0] === "=") {
        const name = what.slice(1);
        if (args.length || !file.tensors.has(name)) bad(i, `names the tensor ${quoted(name)}`);
        if (!tensors.has(name)) tensors.set(name, usable(file, name));
        return { uses, run: () => tensors.get(name) };
      }
      if (what[0] === ".") {
        const f = layer(what.slice(1));
        if (args.length !== 1 || !isSize(args[0])) bad(i, `gives ${quoted(what)} other arguments than this reader knows`);
        const k = back(args[0], i);
        return { uses: [k], run: values => Array.isArray(values[k]) ? bad(i, "gives a layer a list of values") : f(values[k]) };
      }
      if (!has(OPERATIONS, what)) bad(i, `has the operation ${quoted(what)}, which this reader does not know`);
      const [signature, f] = OPERATIONS[what], kinds = signature.split(" ").map(k => /^(\w)(\?)?(=(.*))?$/.exec(k)), read = [];
      if (args.length > kinds.length) bad(i, `gives ${what} ${args.length} arguments`);
      kinds.forEach(([, kind, may, usual, value], j) => {
        if (j >= args.length && usual === undefined) bad(i, `gives ${what} ${args.length} arguments`);
        const x = j < args.length ? args[j] : value === "" ? null : kind === "w" ? value : JSON.parse(value);
        if (x === null && !may) bad(i, `has null for an argument of ${what}`);
        read.push(x === null ? () => null : argument(kind, x, i, uses));
      });
      return { uses, run: (values, named) => {
        const full = read.map(r => r(values, named));
        for (const [j, x] of full.entries()) if ("tv".includes(kinds[j][1]) && Array.isArray(x) || kinds[j][1] === "T" && x.some(Array.isArray)) bad(i, "takes a list of values for one");
        return f(...full);
      } };
    });

    const last = nodes.map(() => []), kept = new Set(), ends = new Map();
    const outputOf = (o, depth = 0) => {
      if (o === null || depth > 64) return () => null;
      if (isSize(o)) { const k = back(o, nodes.length); kept.add(k); return values => values[k]; }
      const [[kind, inside] = []] = isObject(o) ? Object.entries(o) : [];
      demand(kind === "dict" ? isObject(inside) : (kind === "list" || kind === "tuple") && Array.isArray(inside), "the output of the graph is described in an unknown form");
      const each = Object.entries(inside).map(([n, x]) => [n, outputOf(x, depth + 1)]);
      return values => kind === "dict" ? Object.fromEntries(each.map(([n, f]) => [n, f(values)])) : each.map(([, f]) => f(values));
    };
    const output = outputOf(graph.output);
    nodes.forEach(({ uses }, i) => [...uses, before(i)].forEach(k => ends.set(k, i)));
    ends.forEach((i, k) => { if (!kept.has(k)) last[i].push(k); });

    const numbersIn = v => Array.isArray(v) ? sumOf(v.map(numbersIn)) : v?.data?.length ?? 0;
    const held = sumOf([...file.tensors.keys()].map(n => product(file.entry(n).shape)));
    return (...inputs) => {
      demand(inputs.length === graph.inputs.length, `the model takes ${graph.inputs.length} inputs`);
      const named = Object.create(null), values = inputs.map((x, k) => {
        const [name, type, shape] = graph.inputs[k];
        demand(x.shape.length === shape.length && product(x.shape) === x.data.length, `the input ${quoted(name)} has the shape ${quoted(x.shape)} instead of ${quoted(shape)}`);
        shape.forEach((n, d) => {
          const [least, most] = typeof n === "string" ? bounds(n) : [n, n];
          demand(x.shape[d] >= least && x.shape[d] <= most && (named[n] ?? x.shape[d]) === x.shape[d], `the input ${quoted(name)} has the shape ${quoted(x.shape)} instead of ${quoted(shape)}`);
          if (typeof n === "string") named[n] = x.shape[d];
        });
        return { shape: x.shape, type, data: HOLDS[type].from(x.data) };
      });
      const most = Math.min(MOST, 2 ** 26 + 256 * (sumOf(values.map(numbersIn)) + held));
      try {
        budget.work = AT_MOST.work;
        let alive = sumOf(values.map(numbersIn));
        nodes.forEach(({ run }, i) => {
          budget.room = most - alive;
          values.push(run(values, named));
          alive += numbersIn(values.at(-1));
          demand(alive <= most, "the model takes more memory than this reader does");
          for (const k of last[i]) { alive -= numbersIn(values[k]); values[k] = null; }
        });
      } finally { Object.assign(budget, { room: MOST, work: Infinity }); }
      return output(values);
    };
  }

  // ------------------------------------------------------------------------------------------------ whole models

  const half = x => maxPool(x, { kernel_size: 2 }), flat = LAYERS.Flatten({}), relu = unary(ACTS.relu);
  const FORWARD = {  // the architectures: what is done with the layers of a name
    LeNet5: (run, x) => { fits(x, [null, 1, 28, 28], "LeNet5"); return run("fc2", relu(run("fc1", flat(half(run("conv2", half(run("conv1", x)))))))); },
    LeNet300: (run, x) => { fits(x, [null, 1, 28, 28], "LeNet300"); return run("fc3", relu(run("fc2", relu(run("fc1", flat(x)))))); },
  };

  // What is said of the model, as its seal has it.
  const inOrder = x => Array.isArray(x) ? `[${x.map(inOrder).join(", ")}]` : !isObject(x) ? JSON.stringify(x) : `{${Object.keys(x).sort().map(k => `${JSON.stringify(k)}: ${inOrder(x[k])}`).join(", ")}}`;
  function sealOf(name, layers) {
    const c = crc32(new TextEncoder().encode(inOrder([["", { module: name }], ...layers])));
    return btoa(String.fromCharCode(c >>> 24, c >>> 16 & 255, c >>> 8 & 255));
  }

  // The model of a file: (input {shape, data}, …) → what it puts out, tensors of the same form
  function network(file) {
    const { architecture, graph, kind } = file.manifest;
    if (graph !== undefined) return graphOf(file);
    demand(architecture, "the file says no architecture and has no graph that this reader could run");
    const layers = layersOf(file.manifest), { name } = architecture, layer = layersFrom(file, layers);
    demand(kind === undefined || kind === sealOf(name, layers), `it was made of another ${name} than this reader knows`);
    const inside = n => [...layers.keys()].filter(m => m.startsWith(`${n}.`) && !m.slice(n.length + 1).includes("."));
    const run = (n, x) => layers.get(n).class === "Sequential" ? inside(n).reduce((y, m) => run(m, y), x) : layer(n)(x);
    for (const [n, l] of layers) if (l?.class !== "Sequential") layer(n);
    return x => {
      demand(x.data.length === product(x.shape), `${x.data.length} numbers have not the shape ${quoted(x.shape)}`);
      return FORWARD[name](run, tensor(x.shape, x.data));
    };
  }

  return { read, network, MzError, parts: { unzstd, readStream } };
})();
if (typeof module !== "undefined") module.exports = mz;
