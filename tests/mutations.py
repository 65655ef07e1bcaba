"""Damage of every sort for `.mz` files, drawn from a seeded `random.Random`, and the judge of what comes of it. For
tests and bench/pack.py.

*Damage* is what disks, cables and editors do: whatever comes of it must be a `PackError` or the exact model.
*Forgery* changes what a file says and makes all its checksums right again, so that the deeper checks are reached:
it must be a
`PackError`, or a model on which all ways of reading agree (or refuse)."""

import copy, json, math, zlib
from collections import Counter

import torch
from torch import nn

from modelzip import archive as zips, pack
from modelzip.archive import PackError
from modelzip.pack import inspect, load, read_tensor, save
from modelzip.quant import CompressedTensor, quantize_layer, quantize_model


# ---- damage: bytes, without understanding -------------------------------------------------------------------------
def span(data, rng, most=200):
    "A range of positions, short ones more often."
    i = rng.randrange(len(data))
    return i, min(len(data), i + rng.choice([1, 2, 4, 16, 64, most]))


def flip_bit(data, rng):
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


def change_byte(data, rng):
    i = rng.randrange(len(data))
    return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]


def cut_off(data, rng):
    return data[: rng.randrange(len(data))]


def insert(data, rng):
    i, j = span(data, rng)
    return data[:i] + rng.randbytes(j - i) + data[i:]


def delete(data, rng):
    i, j = span(data, rng)
    return data[:i] + data[j:]


def zero(data, rng):
    i, j = span(data, rng)
    return data[:i] + bytes(j - i) + data[j:]


def overwrite(data, rng):
    i, j = span(data, rng)
    return data[:i] + rng.randbytes(j - i) + data[j:]


def repeat(data, rng):
    i, j = span(data, rng)
    return data[:j] + data[i:]


def swap(data, rng):
    i, j, k = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:i] + data[j:k] + data[i:j] + data[k:]


def number(data, rng):
    "A number of 4 bytes, of those that lengths and offsets like to be confused with."
    i = rng.randrange(max(1, len(data) - 4))
    return data[:i] + rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(data)]).to_bytes(4, "little") + data[i + 4 :]


def at_the_end(data, rng):
    "One byte of the last 600: directory and manifest."
    i = max(0, len(data) - 1 - rng.randrange(600))
    return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]


def several(data, rng):
    for _ in range(rng.randrange(2, 6)):
        data = rng.choice([flip_bit, change_byte, insert, delete, zero, swap, number])(data, rng) or b"\0"
    return data


DAMAGE = {
    f.__name__: f
    for f in (
        flip_bit,
        change_byte,
        cut_off,
        insert,
        delete,
        zero,
        overwrite,
        repeat,
        swap,
        number,
        at_the_end,
        several,
    )
}


# ---- forgery: what the file says, with checksums that are right ---------------------------------------------------
JUNK = [
    -1,
    0,
    1,
    2,
    3,
    7,
    64,
    2**31,
    2**32,
    2**62,
    2**63,
    2**64,
    10**30,
    1.5,
    True,
    None,
    "",
    "float32",
    "uint8",
    "bool",
    "int4",
    "same",
    "coded",
    "crc",
    [],
    {},
    [0],
    [-1],
    [2**40, 2**40],
    {"w": 1},
    "\0",
    "quantized",
    "Dequantize",
    "QLinear",
    "os.system",
]


def opened(path):
    "The manifest and the payload of a good file."
    with open(path, "rb") as f:
        text, payload = zips.unseal(f)
        f.seek(zips.data_offset(payload))
        return json.loads(text), f.read(payload.size)


def sealed(manifest, payload, fix=lambda entries: entries):
    "A well-formed archive with whatever manifest and payload; `fix` may lie in the entries, and the headers follow it."
    text = json.dumps(manifest).encode() if not isinstance(manifest, bytes) else manifest
    packed, at = zips.deflate(text), 64 + len(payload)
    entries = fix(
        [
            zips.Entry("payload", 0, zlib.crc32(payload), len(payload), len(payload)),
            zips.Entry("manifest.json", 8, zlib.crc32(text), len(packed), len(text), at),
        ]
    )
    body = zips.local_header(entries[0]) + payload + zips.local_header(entries[1]) + packed
    return body + zips.directory(entries, len(body))


def places(x, at=()):
    "Every place in a piece of JSON."
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from places(v, (*at, k))


def other_value(x, rng):
    "Something else in its place: a neighbour if it is a number, or junk."
    if type(x) is int and rng.random() < 0.6:
        return rng.choice([x + 1, x - 1, 2 * x, x // 2, -x, x ^ 1 << rng.randrange(8)])
    return rng.choice(JUNK)


def forge_manifest(manifest, payload, rng):
    m = copy.deepcopy(manifest)
    at = rng.choice([*places(m)][1:])
    owner = m
    for k in at[:-1]:
        owner = owner[k]
    how = rng.randrange(6)
    if how == 0:
        del owner[at[-1]]
    elif how == 1 and isinstance(owner, dict):
        owner[rng.choice(["x", "same", "layer", "kind", "offset", "coded", "crc", "meta"])] = rng.choice(JUNK)
    elif how == 2:
        owner[at[-1]] = copy.deepcopy(rng.choice([v for p in [*places(m)][1:] for v in [follow(m, p)]]))
    else:
        owner[at[-1]] = other_value(owner[at[-1]], rng)
    return sealed(m, payload)


def follow(x, at):
    for k in at:
        x = x[k]
    return x


def parts_of(manifest):
    "The entries of all plain parts that lie in the payload."
    for e in manifest["tensors"].values():
        if "same" not in e:
            yield from (p for p in e.get("parts", {"": e}).values() if "offset" in p)


def forge_numbers(manifest, payload, rng):
    "Other numbers, or another stream, with every checksum corrected: of the part, of the stream, of the payload."
    m, data = copy.deepcopy(manifest), bytearray(payload)
    part = rng.choice([*parts_of(m)] or [{"offset": 0, "shape": [0], "dtype": "uint8"}])
    begin, end = (
        part["offset"],
        part["offset"] + part.get("coded", math.prod(part["shape"]) * pack.DTYPES[part["dtype"]].itemsize),
    )
    body = end - 4 if "coded" in part else end
    if body > begin:
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(begin, min(body, begin + rng.choice([4, 40, 10**9])))] = rng.choice(
                [0, 1, 127, 128, 255, rng.randrange(256)]
            )
    if "coded" in part:
        data[body:end] = zlib.crc32(bytes(data[begin:body])).to_bytes(4, "little")
    if "crc" in part:
        part["crc"] = zlib.crc32(bytes(data[begin:end]))
    return sealed(m, bytes(data))


def forge_headers(manifest, payload, rng):
    "Sizes, places, methods that lie, in headers that agree with each other."

    def fix(entries):
        e = rng.choice(entries)
        field = rng.choice(["method", "crc", "packed", "size", "offset"])
        wrong = rng.choice(
            [0, 1, 8, 99, 2**31, 2**32 - 1, 2**32, 2**40, getattr(e, field) + 1, max(0, getattr(e, field) - 1)]
        )
        if field in ("method", "crc"):
            wrong &= 0xFFFF if field == "method" else 0xFFFFFFFF
        object.__setattr__(e, field, wrong)
        return entries

    return sealed(manifest, payload, fix)


FORGERY = {f.__name__: f for f in (forge_manifest, forge_numbers, forge_headers)}


# ---- files of every sort ------------------------------------------------------------------------------------------
class Sample(nn.Module):
    "An embedding tied to the last layer, a plain layer, a quantized one, buffers of odd types."

    def __init__(self, how, n=24):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.plain, self.body, self.out = (
            nn.Embedding(n, 8),
            nn.Linear(8, 150),
            nn.Linear(150, 8, bias=False),
            nn.Linear(8, n),
        )
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.arange(9) % 2 == 0)
        self.register_buffer("halves", torch.randn(5).bfloat16())
        self.register_buffer("count", torch.tensor(7))
        if how is not None:
            self.body = quantize_layer(self.body, **how)


HOW = {
    "plain": None,
    "8 bits": dict(bits=8),
    "4 bits": dict(bits=4, group=50),
    "3 bits": dict(bits=3),
    "2 bits": dict(bits=2, group=30),
    "ternary": dict(levels=3),
    "codebook": dict(codebook="nf4", group=50),
    "asymmetric": dict(bits=5, symmetric=False),
}


SORTS = *HOW, "tied, compressed", "large enough for every coder"


def sorts():
    "Name → a small model."
    yield from ((name, Sample(how).eval()) for name, how in HOW.items())
    yield "tied, compressed", quantize_model(Sample(None), 4, group=8).eval()
    torch.manual_seed(1)
    wide = nn.Sequential(
        nn.Linear(130, 140),
        quantize_layer(nn.Linear(140, 150, bias=False), 8),
        quantize_layer(nn.Linear(150, 140), 3, group=50),
    )
    wide[0].weight.data *= torch.rand_like(wide[0].weight) < 0.03
    yield "large enough for every coder", wide.eval()


def state(model):
    "Everything a model holds, bit by bit."
    return {i.name: (type(i.layer).__name__, *stored(i.value)) for i in pack.items(model)}


def stored(value):
    if isinstance(value, CompressedTensor):
        return json.dumps(value.meta(), sort_keys=True), {k: stored(t) for k, t in value.parts().items()}
    return str(value.dtype), tuple(value.shape), bytes(pack.as_bytes(value))


# ---- the judge ----------------------------------------------------------------------------------------------------
def attempt(f, path):
    "What f() returns, or None for a PackError that names the file; any other exception goes through."
    try:
        return f()
    except PackError as e:
        assert str(e).startswith(str(path)) and len(str(e)) > len(str(path)) + 10, e
        return None


def judge(path, model, want, single, mapped, forged, rng):
    "Read a file in every way; returns 'refused', 'exact' or 'another valid file' (of a forgery)."
    ways = [
        attempt(lambda: load(path, model, **how), path)
        for how in ([{}, {"mmap": True}] if mapped else [{}])
        if not (
            forged
            and how
            and attempt(lambda: any("coded" in l.coder for l in inspect(path, entropy=False).lines), path)
        )
    ]
    states = [None if m is None else state(m) for m in ways]
    attempt(lambda: inspect(path), path)
    name = rng.choice([*single])
    try:
        one = attempt(lambda: read_tensor(path, name), path)
    except ValueError as e:
        assert forged and "name is" in str(e)
        one = None
    if not forged:
        assert all(s is None or s == want for s in states) and (one is None or stored(one) == single[name]), (
            "another model was loaded"
        )
        return "exact" if states[0] == want else "refused"
    states = [s for s in states if s is not None] or [None]
    assert all(s == states[0] for s in states), "two ways of loading do not agree"
    if states[0] is None:
        return "refused"
    assert one is None or stored(one) == states[0][name][1:], (
        "one tensor is not what the model holds"
    )  # (it may be refused for a checksum of its own)
    return "exact" if states[0] == want else "another valid file"


def fuzz(n, folder, seed=0, progress=lambda done: None):
    """Judge n mutations, spread over all sorts of files, both uses and all sorts of damage and forgery; returns
    {(sort of mutation, use, outcome): count}."""
    import random

    rng, counts, path = random.Random(seed), Counter(), folder / "x.mz"
    files = []
    for name, model in sorts():
        for use in "mapped", "archived":
            good = save(model, folder / "good.mz", archive=use == "archived").read_bytes()
            files.append(
                (
                    use,
                    model,
                    state(model),
                    {i.name: stored(i.value) for i in pack.items(model)},
                    good,
                    opened(folder / "good.mz"),
                )
            )
    kinds = [*DAMAGE, *FORGERY, *FORGERY]
    for i in range(n):
        use, model, want, single, good, (manifest, payload) = files[i % len(files)]
        kind = kinds[(i + i // len(files)) % len(kinds)]  # each sort with each kind, all kinds early
        data = DAMAGE[kind](good, rng) if kind in DAMAGE else FORGERY[kind](manifest, payload, rng)
        path.write_bytes(data)
        try:
            outcome = judge(path, model, want, single, use == "mapped", kind in FORGERY, rng)
        except BaseException as e:
            raise AssertionError(f"mutation {i} (seed {seed}, {kind}, {use}): {type(e).__name__}: {e}") from e
        counts[kind, use, outcome] += 1
        progress(i + 1)
    return counts
