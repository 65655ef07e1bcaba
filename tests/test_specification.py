"""Mapped files, read by a reader that was written from the specification alone (nbs/workshop/specification.ipynb): `zipfile`,
`json` and NumPy, nothing of modelzip."""

import copy, hashlib, itertools, json, math, zipfile, zlib

import numpy as np
import pytest
import torch
import zstandard
from torch import nn

from modelzip.coding import decode
from modelzip.data import LeNet300, LeNet5, seeded
from modelzip.pack import read_tensor, save
from modelzip.prune import prune_model, sparsify, sparsify_model
from modelzip.ptq import LayerStatistics
from modelzip.quant import Dequantize, pack_bits, quantize_model, unpack_bits
from modelzip.trellis import trellis_weight
from modelzip.workshop.trellis_tensors import from_codes

# ---- the reader ---------------------------------------------------------------------------------------------------


def unpacked(packed, bits, n):
    "Codes from planes of 8, 4, 2 and 1 bits, widest first, the lowest bits of a code in the first."
    codes, shift = np.zeros(n, np.int64), 0
    for width in [8] * (bits // 8) + [w for w in (4, 2, 1) if bits % 8 & w]:
        size = -(-n * width // 8)
        plane = packed[:size, None] >> np.arange(0, 8, width, dtype="u1") & np.uint8((1 << width) - 1)
        codes |= plane.reshape(-1)[:n].astype(np.int64) << shift
        packed, shift = packed[size:], shift + width
    return codes


def spread(x, meta):
    "One value for the tensor, for each index along an axis, or for each run of a row, as an array of the tensor's shape."
    shape, axis, group = meta["shape"], meta.get("axis"), meta.get("group")
    if axis is not None:
        x = x.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if group is not None:
        x = np.repeat(x, group, 1)[:, : math.prod(shape) // len(x)].reshape(shape)
    return np.broadcast_to(x, shape)


def quantized(parts, meta, keep=None):
    "Kind quantized; `keep` says which elements of a sparse tensor have codes."
    levels, shape, scale = meta["levels"], meta["shape"], parts["scale"]
    bits = max(1, (levels - 1).bit_length())
    keep = np.ones(shape, bool) if keep is None else keep
    codes = unpacked(parts["codes"], bits, int(keep.sum()))
    step = spread(scale, meta)[keep].astype(np.float32)
    if "codebook" in parts:
        return parts["codebook"].astype(np.float32)[codes] * step
    if "zero_point" in parts:
        zero = spread(unpacked(parts["zero_point"], bits, scale.size).reshape(scale.shape), meta)[keep]
    else:
        zero = 0.5 if levels == 2 else levels // 2
    return (codes - zero).astype(np.float32) * step


def places(parts, meta):
    "Which elements of a sparse tensor are stored."
    shape, layout = meta["shape"], meta["layout"]
    keep = np.zeros(shape, bool)
    if layout == "dense":
        keep[...] = True
    elif layout == "bitmap":
        keep.reshape(-1)[:] = unpacked(parts["positions"], 1, keep.size)
    elif layout == "gaps":
        at, most = -1, (1 << meta["gap"]) - 1
        for code in unpacked(parts["positions"], meta["gap"], meta["gaps"]):
            at += int(code) + (code < most)
            if code < most:
                keep.reshape(-1)[at] = True
    else:
        n, m = meta["n"], meta["m"]
        patterns = list(itertools.combinations(range(m), n))
        last = np.moveaxis(keep, 1, -1)
        runs = -(-last.shape[-1] // m)
        rows = np.zeros((*last.shape[:-1], runs * m), bool)
        codes = unpacked(parts["positions"], max(1, (len(patterns) - 1).bit_length()), rows.size // m)
        for run, code in zip(rows.reshape(-1, m), codes):
            run[list(patterns[code])] = True
        keep = np.ascontiguousarray(np.moveaxis(rows[..., : last.shape[-1]], -1, 1))
    return keep


def sparse(parts, meta):
    keep = places(parts, meta)
    assert keep.sum() == meta["count"]
    x = np.zeros(meta["shape"], np.float32)
    x[keep] = quantized(parts, meta, keep) if "levels" in meta else parts["values"].astype(np.float32)
    return x


def trellis(parts, meta):
    "Kind trellis, one element after the other."
    shape, run, n, states = meta["shape"], meta["run"], math.prod(meta["shape"]), meta["states"]
    streams = [
        iter(unpacked(parts[f"codes{i}"], (levels - 1).bit_length(), count) - levels // 2)
        for i, (count, levels) in enumerate(zip(meta["counts"], meta["levels"]))
    ]
    fallen, odd = {4: (1, 2), 8: (5, 2), 16: (9, 4), 32: (9, 4)}[states]
    width = n // shape[0]
    rows, columns = parts.get("row_spread", np.zeros(shape[0])), parts.get("column_spread", np.zeros(width))
    state, x = [0] * -(-n // run), np.zeros(n, np.float32)
    for step in range(run):
        for lane in range(len(state)):
            if (i := lane * run + step) >= n:
                continue
            kind = min(int(rows[i // width]) + int(columns[i % width]) >> 1, len(streams) // 2 - 1)
            grid = int(state[lane] >= states // 2)
            k = int(next(streams[2 * kind + grid]))
            x[i] = 2 * k - grid * np.sign(k)
            state[lane] = 2 * state[lane] % states ^ (fallen if grid else 0) ^ (odd if k % 2 else 0)
    assert all(next(s, None) is None for s in streams)
    power = {k: (2.0 ** (v.astype(np.float64) / 8)).astype(np.float32) for k, v in parts.items() if "steps" in k}
    x = x.reshape(shape) * (parts["scale"] * power.get("row_steps", np.ones(1, np.float32)))[:, None]
    return x * power.get("column_steps", np.float32(1))


def contents(path):
    "The manifest and what gives an entry of it as an array: entry, name of its tensor, name of its part."
    with zipfile.ZipFile(path) as z:
        payload, manifest = z.read("payload"), json.loads(z.read("manifest.json"))
    base, old = manifest.get("base"), None
    if base is not None:
        old, older = contents(path.with_name(base["name"]))
        with zipfile.ZipFile(path.with_name(base["name"])) as z:
            crc = z.getinfo("payload").CRC.to_bytes(4, "little")
            assert hashlib.sha256(z.read("manifest.json") + crc).hexdigest() == base["content"]

    def array(e, name, key=None):
        if "base" not in e:
            return np.frombuffer(payload, e["dtype"], math.prod(e["shape"]), e["offset"]).reshape(e["shape"])
        assert e.keys() == {"dtype", "shape", "base"}
        name = old["tensors"][name].get("same", name)
        there = old["tensors"][name] if key is None else old["tensors"][name]["parts"][key]
        assert [there[k] for k in ("dtype", "shape")] == [e[k] for k in ("dtype", "shape")]
        found = older(there, name, key)
        assert zlib.crc32(found.tobytes()) == e["base"]
        return found

    return manifest, array


def tensors(path):
    manifest, array = contents(path)
    table = manifest["tensors"]

    def whole(name):
        e = table[name]
        if "same" in e:
            return whole(e["same"])
        if "parts" not in e:
            return array(e, name)
        parts, meta = {k: array(p, name, k) for k, p in e["parts"].items()}, e["meta"]
        if e["kind"] == "trellis":
            return trellis(parts, meta)
        x = sparse(parts, meta) if e["kind"] == "sparse" else quantized(parts, meta).reshape(meta["shape"])
        if "columns" in parts:
            x = x * parts["columns"].astype(np.float32).reshape([-1 if i == 1 else 1 for i in range(x.ndim)])
        return x

    return {name: whole(name) for name in table}


# ---- what it reads ------------------------------------------------------------------------------------------------


def same(model, path, **how):
    save(model, path, archive=False, **how)
    found = tensors(path)
    for name, theirs in found.items():
        ours = read_tensor(path, name)
        ours = (ours if isinstance(ours, torch.Tensor) else ours.dequantize()).numpy()
        assert theirs.shape == ours.shape and np.array_equal(theirs, ours), name
    return found


def tied():
    m = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20))
    m[1].weight = m[0].weight
    return m


@pytest.mark.parametrize("model", [LeNet5, tied, lambda: nn.BatchNorm1d(3).half()])
def test_plain_tensors(tmp_path, model):
    same(model(), tmp_path / "x.mz")


@pytest.mark.parametrize(
    "how",
    [
        *({"bits": b} for b in (1, 2, 3, 5, 8, 11, 16)),
        {"bits": 4, "group": 7},
        {"bits": 4, "group": 64, "symmetric": False},
        {"bits": 3, "per_channel": False},
        {"bits": 6, "symmetric": False},
        {"bits": 4, "codebook": "nf4", "group": 32},
        {"bits": 3, "codebook": "kmeans"},
    ],
    ids=str,
)
def test_quantized_tensors(tmp_path, how):
    with seeded(0):
        same(quantize_model(LeNet5(channels=[3, 5], hidden=30), **how), tmp_path / "x.mz")
        same(quantize_model(tied(), **how), tmp_path / "x.mz")


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("how", ["2:4", 0.3, 0.7, 0.97], ids=str)
def test_sparse_tensors(tmp_path, how, bits):
    with seeded(0):
        m = prune_model(LeNet300(), granularity="2:4") if how == "2:4" else prune_model(LeNet300(), how, scope="layer")
    same(sparsify_model(m, bits=bits), tmp_path / "x.mz")


@pytest.mark.parametrize("layout", ["bitmap", "gaps", "n:m", "dense"])
def test_every_layout_of_sparse_tensors(tmp_path, layout):
    layer = nn.Linear(12, 8)
    layer.weight.data[:, ::2] = 0
    same(nn.Sequential(Dequantize(layer, sparsify(layer.weight.detach(), layout=layout))), tmp_path / "x.mz")
    with zipfile.ZipFile(tmp_path / "x.mz") as z:
        assert json.loads(z.read("manifest.json"))["tensors"]["0.weight"]["meta"]["layout"] == layout


# ---- updates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 3])
def test_mapped_updates(tmp_path, bits):
    "Of an update, and of one of that."
    with seeded(0):
        m = quantize_model(tied(), bits) if bits else tied()
        models = [nn.Sequential(*copy.deepcopy(m), nn.Linear(3, 3)) for _ in range(3)]
    for i, m in enumerate(models):
        m[2].load_state_dict(models[0][2].state_dict())
        m[2].bias.data += i
        same(m, tmp_path / f"{i}.mz", **({"base": tmp_path / f"{i - 1}.mz"} if i else {}))


def test_differences(tmp_path):
    "Streams that are added to what was there; how a stream is expanded is the matter of others."
    with seeded(0):
        m = nn.Sequential(nn.Linear(60, 50), quantize_model(nn.Linear(50, 40), 3, group=20))
        new, levels = copy.deepcopy(m), m[1].q.levels
        new[0].weight.data *= 1.001 - 0.002 * (torch.rand(50, 60) < 0.5)
        codes = unpack_bits(new[1].q.codes, 3, 2000)
        new[1].packed.codes = pack_bits((codes.int() + (torch.rand(2000) < 0.1)) % levels, 3)
    old, path = save(m, tmp_path / "old.mz"), tmp_path / "new.mz"
    save(new, path, base=old)
    with zipfile.ZipFile(path) as z:
        payload, table = z.read("payload"), json.loads(z.read("manifest.json"))["tensors"]
    step = lambda e: decode(payload[e["offset"] : e["offset"] + e["coded"]])
    weight, part = table["0.weight"], table["1.weight"]["parts"]["codes"]
    assert weight["base"] and part["base"] and weight["coded"] < 0.7 * 4 * 3000 and part["coded"] < 0.7 * 750
    turned = lambda i: np.where(i < 0, i ^ 0x7FFFFFFF, i).astype("<i4")
    was = read_tensor(old, "0.weight").numpy().view("<i4")
    now = turned(turned(was) + step(weight).view("<i4").reshape(was.shape)).view("<f4")
    assert np.array_equal(now, new[0].weight.detach().numpy()) and zlib.crc32(now.tobytes()) == weight["base"]
    was = unpacked(read_tensor(old, "1.weight").codes.numpy(), 3, 2000)
    now = (was + unpacked(step(part), 3, 2000)) % levels
    assert np.array_equal(now, unpacked(new[1].q.codes.numpy(), 3, 2000))


# ---- streams of floats --------------------------------------------------------------------------------------------


def number(data, at):
    n = shift = 0
    while True:
        n, shift, at = n | (data[at] & 127) << shift, shift + 7, at + 1
        if data[at - 1] < 128:
            return n, at


def block(data):
    "A chunk of method 0 or 1."
    if data[0] == 0:
        return np.frombuffer(data[1:], "u1")
    assert data[0] == 1
    frame = zstandard.ZstdDecompressor().decompress(b"\x28\xb5\x2f\xfd" + data[1:], max_output_size=2**21)
    return np.frombuffer(frame, "u1")


def float_stream(data):
    "A stream of floats: the bytes of its elements, and the methods of its chunks."
    assert data[0] == 0 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
    width, at = number(data, 1)
    size, at = number(data, at)
    step, lengths, out, methods = 2**20 // width * width, [], [], []
    for _ in range(-(-size // step)):
        length, at = number(data, at)
        lengths.append(length)
    for length in lengths:
        chunk, at = data[at : at + length], at + length
        methods.append(chunk[0])
        if chunk[0] in (0, 1):
            out.append(block(chunk))
            continue
        assert chunk[0] in (5, 8, 9)
        planes, within, together = [], (1, 2, 3)[max(0, chunk[0] - 7)], chunk[0] == 9 and chunk[2]
        for _ in range(width + (chunk[0] == 9) - together):
            n, within = number(chunk, within)
            planes.append(block(chunk[within : within + n]).astype(np.int64))
            within += n
        assert within == length
        if chunk[0] == 9:
            strays, pairs, b, *below = planes
            blocks = -(-2 * len(pairs) >> 16)
            a = chunk[1] + np.concatenate([pairs & 15, pairs >> 4])
            counts, rest = strays[: 4 * blocks].astype("u1").view("<u4"), strays[4 * blocks :]
            for i, where in enumerate(np.repeat(np.arange(blocks), counts)):
                low, high = rest[2 * i : 2 * i + 2]
                a[65536 * where + low + 256 * high] = rest[2 * counts.sum() + i]
            if together:
                below = [below[0][0::2], below[0][1::2]]
            top = (b >> 7) << 15 | a << 7 | b & 127
            planes = [*below, top & 255, top >> 8]
        if chunk[0] == 8:
            a, b, *below = planes
            if chunk[1]:
                last = sum((eighth >> 7) << j for j, eighth in enumerate(b.reshape(7, -1)))
                b = np.concatenate([b & 127, last])
                top = (b >> 6 & 1) << 15 | a << 6 | b & 63
            else:
                top = (b >> 7) << 15 | a << 7 | b & 127
            planes = [*below, top & 255, top >> 8]
        out.append(np.stack(planes, 1).astype("u1").reshape(-1))
    return b"".join(x.tobytes() for x in out), methods


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"])
def test_archived_floats(tmp_path, dtype):
    "Weights below two and above, and numbers of few bits, as the page on the format describes it."
    model, dice, found = nn.Module(), torch.Generator().manual_seed(0), set()
    w = torch.randn(600_000, generator=dice)
    for name, x in {"small": w / 20, "large": w * 9, "few": w.bfloat16().float()}.items():
        model.register_buffer(name, x.to(getattr(torch, dtype)))
    path = save(model, tmp_path / "x.mz")
    with zipfile.ZipFile(path) as z:
        payload, table = z.read("payload"), json.loads(z.read("manifest.json"))["tensors"]
    for name, e in table.items():
        theirs, methods = float_stream(payload[e["offset"] : e["offset"] + e["coded"]])
        found |= set(methods)
        assert theirs == bytes(read_tensor(path, name).view(torch.uint8).numpy()), name
    assert found == {"float16": {8}, "bfloat16": {9}, "float32": {9}}.get(dtype, found - {8, 9})


@pytest.mark.parametrize("states", [4, 8, 16, 32])
def test_trellis_tensors(tmp_path, states):
    dice = torch.Generator().manual_seed(states)
    w = torch.randn(40, 60, generator=dice) * torch.rand(40, 1, generator=dice).mul(5).exp2()
    seen = LayerStatistics()
    seen.add(torch.randn(1, 200, 60, generator=dice) * torch.rand(60, generator=dice))
    layer = nn.Linear(60, 40)
    kinds = [
        trellis_weight(w, None, 3.0, states=states),
        trellis_weight(w, seen, 3.0, states=states, importance=torch.rand(40, generator=dice) + 0.1),
    ]
    spread = torch.arange(40).clamp(max=12).to(torch.uint8)
    kinds.append(from_codes((2 * w / w.std()).round().int(), 0.1, states=states, run=17, row_spread=spread))
    same(nn.ModuleList([Dequantize(layer, q) for q in kinds]), tmp_path / "x.mz")
    assert len(kinds[2].codes) > 2
