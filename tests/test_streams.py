"""encode and decode: exact for whatever goes in, near the entropy, and never surprised by what comes back."""

import random, resource, struct, zlib

import numpy as np
import pytest
import torch
from concurrent.futures import ThreadPoolExecutor
from hypothesis import given, settings, strategies as st

from modelzip.coding import CodingError, coders, decode, encode, entropy
from modelzip.quant import pack_bits, packed_bytes, quantize, unpack_bits
from modelzip.workshop import blocks, planes, streams
from modelzip.workshop.coders import write_varint
from guards import examples

torch.set_num_threads(1)


def codes_of(rng, levels, n, kind):
    "Streams of every character: flat, bell, one common value, nothing else, runs."
    if kind == "flat":
        return rng.integers(0, levels, n)
    if kind == "bell":
        return np.clip(np.round(rng.normal(levels / 2, levels / 8 + 0.3, n)), 0, levels - 1)
    if kind == "sparse":
        return np.where(rng.random(n) < 0.05, rng.integers(0, levels, n), levels // 2)
    if kind == "rare":
        return np.where(rng.random(n) < 0.002, rng.integers(0, levels, n), levels // 2)
    if kind == "constant":
        return np.full(n, levels - 1)
    return np.repeat(rng.integers(0, levels, n // 50 + 1), 50)[:n]


KINDS = ["flat", "bell", "sparse", "rare", "constant", "runs"]


def packed(codes, bits):
    return pack_bits(torch.from_numpy(codes.astype(np.int32)), bits)


# ---- exact --------------------------------------------------------------------------------------------------------
@settings(max_examples=examples(150), deadline=None)
@given(st.binary(max_size=3000))
def test_any_bytes(data):
    coded = encode(data)
    assert decode(coded).tobytes() == decode(coded, len(data)).tobytes() == data
    assert len(coded) <= len(data) + 16


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(2, 1 << 16), st.integers(0, 3000), st.sampled_from(KINDS), st.integers(0, 2**32))
def test_any_codes(levels, n, kind, seed):
    bits = (levels - 1).bit_length()
    x = packed(codes_of(np.random.default_rng(seed), levels, n, kind), bits)
    coded = encode(x, bits, n, levels)
    assert np.array_equal(decode(coded, len(x)), x.numpy())
    assert len(coded) <= len(x) + 24


@pytest.mark.parametrize("levels", [2, 3, 5, 7, 16, 40, 100, 256, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_more_than_one_chunk(levels, kind, monkeypatch):
    "Chunks begin in the middle of the planes; threads do not change a byte."
    monkeypatch.setattr(streams, "CODES", 1200)
    bits, n = (levels - 1).bit_length(), 4321
    x = packed(codes_of(np.random.default_rng(levels), levels, n, kind), bits)
    coded = encode(x, bits, n, levels)
    with ThreadPoolExecutor(3) as pool:
        assert encode(x, bits, n, levels, map=pool.map) == coded
        assert np.array_equal(decode(coded, map=pool.map), x.numpy())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.complex64,
        torch.int64,
        torch.int16,
        torch.uint8,
        torch.bool,
    ],
)
def test_any_type(dtype):
    x = torch.randn(777, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    assert decode(encode(x)).tobytes() == bytes(x.view(torch.uint8).numpy())
    assert decode(encode(x[::2])).tobytes() == bytes(x[::2].contiguous().view(torch.uint8).numpy())


def test_large_elements_and_many_chunks():
    x = torch.arange(400_000, dtype=torch.float64)
    assert decode(encode(x)).tobytes() == x.numpy().tobytes()


def test_numpy_arrays_of_any_shape():
    for x in (
        np.zeros((3, 0)),
        np.arange(12, dtype=">i4").reshape(3, 4)[::-1],
        np.float32(1.5),
        np.asfortranarray(np.eye(3)),
    ):
        assert decode(encode(np.asarray(x))).tobytes() == np.ascontiguousarray(x).tobytes()


# ---- small --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["flat", "bell", "sparse", "rare"])
@pytest.mark.parametrize("levels", [2, 3, 4, 6, 8, 16, 30, 64, 100, 256])
def test_within_a_percent_of_the_entropy(levels, kind):
    "…and what a table and a header cost."
    n, bits = 300_000, (levels - 1).bit_length()
    codes = codes_of(np.random.default_rng(0), levels, n, kind)
    ideal = float(entropy(torch.from_numpy(codes.astype(np.int64)))) * n / 8
    size = len(encode(packed(codes, bits), bits, n, levels))
    assert size <= 1.01 * ideal + 2 * levels + 120, (size / ideal, coders(encode(packed(codes, bits), bits, n, levels)))


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
SHAPES = ["ones among zeros", "few", "few and far", "skewed", "bell", "range", "two clusters", "signs", "sorted"]


def array_of(rng, dtype, shape, n):
    "An array of integers with this character, whatever range its type has."
    info = np.iinfo("u1" if dtype == "bool" else dtype)
    top, low = int(info.max), int(info.min)
    if shape == "ones among zeros":
        x = rng.random(n) < rng.choice([0.0005, 0.01, 0.03, 0.2, 0.5])
    elif shape == "few":
        x = rng.integers(0, rng.integers(1, 12) + 1, n)
    elif shape == "few and far":
        x = rng.choice([low, top, 0, top // 3, low // 2 + 7, 5], n, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    elif shape == "skewed":
        x = rng.geometric(rng.choice([0.01, 0.1, 0.5, 0.9]), n)
    elif shape == "bell":
        x = np.round(rng.normal(0 if low else min(top // 2, 2**62), min(top / 8, rng.choice([2, 30, 900])), n))
    elif shape == "range":
        x = rng.integers(0, min(top, rng.choice([3, 100, 1000])), n)
    elif shape == "two clusters":
        x = np.where(rng.random(n) < 0.5, rng.integers(0, 20, n), top - 50 + rng.integers(0, 20, n).astype(info.dtype))
    elif shape == "signs":
        x = rng.choice([-1, 0, 1] if low else [0, 1, top], n)
    else:
        x = np.sort(rng.integers(0, min(top, 200), n))
    if dtype == "bool":
        return (x.astype("i8") & 1).astype(bool)
    return x.astype(np.int64).astype(dtype) if x.dtype.kind == "f" else x.astype(dtype)


@settings(max_examples=examples(120), deadline=None)
@given(
    st.sampled_from(INTEGERS),
    st.sampled_from(SHAPES),
    st.sampled_from([0, 1, 7, 300, 5000, 60_000]),
    st.integers(0, 2**32),
)
def test_integers_are_within_a_percent_of_their_entropy(dtype, shape, n, seed):
    """…and a table of the values that occur; exact, and never above what zstandard makes of the bytes or of their
    planes."""
    x = array_of(np.random.default_rng(seed), dtype, shape, n)
    coded, used, width = encode(x), len(np.unique(x)), x.itemsize
    assert decode(coded).tobytes() == x.tobytes()
    ideal = float(entropy(x.view("u1") if x.dtype == bool else x.astype("i8"))) * n / 8
    assert len(coded) <= 1.01 * ideal + min(used, n) * (width + 2) + 40, (len(coded), ideal, used, coders(coded))
    raw = np.frombuffer(x.tobytes(), "u1")
    if 0 < len(raw) <= streams.BYTES:
        assert (
            len(coded)
            <= min(
                len(blocks.code_bytes(raw)),
                1 + len(blocks.pieces(*(blocks.code_bytes(p) for p in planes.byte_planes(raw, width)))),
            )
            + 16
        )


def test_three_percent_of_ones():
    "The example that was 58 % above."
    x = (np.random.default_rng(0).random(100_000) < 0.03).astype(np.int64)
    for y in (
        x,
        x.astype("i1"),
        x.astype("u2"),
        torch.from_numpy(x),
        torch.from_numpy(x).bool(),
        x.astype("i4") * 70_000 - 5,
    ):
        assert 8 * len(encode(y)) <= 1.01 * float(entropy(x)) * len(x) + 8 * 40
    q = packed(np.where(x == 1, 3000, 17), 12)  # the same as codes of twelve bits
    coded = encode(q, 12, len(x))
    assert np.array_equal(decode(coded), q.numpy()) and 8 * len(coded) <= 1.01 * float(entropy(x)) * len(x) + 8 * 40


def test_runs_go_below_the_entropy():
    codes = codes_of(np.random.default_rng(0), 16, 100_000, "runs")
    assert len(encode(packed(codes, 4), 4, len(codes))) < 0.1 * float(entropy(torch.from_numpy(codes))) * len(codes) / 8


def test_floats_lose_their_exponents():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for dtype, share, how in (
        (torch.float32, 0.84, "pairs"),
        (torch.bfloat16, 0.672, "pairs"),
        (torch.float16, 0.855, "planes"),
    ):
        y = x.to(dtype)
        assert set(coders(encode(y))) == {f"float {how}"} and len(encode(y)) < share * y.nbytes, dtype
    assert set(coders(encode(x.double()))) == {"byte planes"}


# ---- floats -------------------------------------------------------------------------------------------------------
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def raw(x):
    "The bytes of a tensor."
    return bytes(x.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_come_back_to_the_bit(dtype):
    "NaNs with whatever they carry, infinities, both zeros, the smallest; weights around them; any shape and size."
    rng, word = np.random.default_rng(0), getattr(torch, f"int{8 * dtype.itemsize}")
    if dtype.itemsize <= 2:
        odd = torch.arange(1 << 8 * dtype.itemsize).to(word).view(dtype)  # all that there are
    else:
        tops = np.arange(1 << 16).astype(f"u{dtype.itemsize}") << (8 * dtype.itemsize - 16)
        odd = torch.from_numpy((tops | rng.integers(0, 1 << 16, 1 << 16).astype(tops.dtype)).view(f"i{tops.itemsize}"))
        odd = odd.view(dtype)
    weights = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).mul(0.05).to(dtype)
    cases = [
        weights,
        torch.cat([weights, odd, weights]),
        odd[:0],
        odd[7],
        weights.reshape(400, 500).T,
        weights[:: -3 % 7],
    ]
    cases += [weights[:n] for n in (1, 2, 63, 64, 65, 40_000, 65_537)]
    cases += [weights[::2], weights.reshape(20, 100, 100)[:, 3:77]]
    for x in cases:
        assert decode(encode(x), x.nbytes).tobytes() == raw(x), (dtype, x.shape)
    found = {1: "zstd", 2: "float pairs", 4: "float pairs", 8: "byte planes"}
    how = "float planes" if dtype is torch.float16 else found[dtype.itemsize]
    assert {how} == set(coders(encode(weights)))


def test_floats_in_another_byte_order():
    x = np.random.default_rng(0).normal(0, 0.05, 30_000).astype(">f4")
    assert (
        decode(encode(x)).tobytes() == x.tobytes()
        and decode(encode(x.astype("<f4"))).tobytes() == x[:].astype("<f4").tobytes()
    )


def test_floats_that_are_not_ordinary():
    "Zeros, clusters, repetitions, counters, a mask: hardly larger than what zstandard makes of bytes and planes."
    g = torch.Generator().manual_seed(0)
    w = torch.randn(60_000, generator=g) * 0.05
    cases = {
        "zeros": torch.zeros(60_000),
        "pruned": torch.where(torch.rand(60_000, generator=g) < 0.8, 0, w),
        "clusters": w.mul(50).round() / 50,
        "one pattern": w[:5000].repeat(12),
        "counted": torch.arange(60_000.0),
        "a mask": (w > 0.08).float(),
        "sorted": w.sort().values,
        "two": torch.where(w > 0, 1.5, -7.25),
        "few bits": w.bfloat16().float(),
        "fewer": w.to(torch.float8_e4m3fn).float(),
        "large and small": torch.cat([w, 1e20 * w, 1e-20 * w]),
    }
    for name, x in cases.items():
        for dtype in FLOATS[:4]:
            y = x.to(dtype)
            data = np.frombuffer(raw(y), np.uint8)
            ways = [blocks.code_bytes(data)]
            ways.append(blocks.pieces(*(blocks.code_bytes(p) for p in planes.byte_planes(data, y.itemsize))))
            coded = encode(y)
            assert decode(coded).tobytes() == raw(y), (name, dtype)
            assert len(coded) <= 1.03 * min(map(len, ways)) + 40, (name, dtype, len(coded), list(map(len, ways)))


def test_a_chunk_of_floats_is_taken_apart_by_hand():
    "The words of the specification, one weight after the other; two of them are strays."
    from modelzip.workshop.float_chunks import code_floats

    n = 1 << 13
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[x.abs() < 0.01] = 0.3  # no strays but two
    x[77], x[n - 5] = -1e30, 1e-30
    words = x.view(torch.int16).numpy().view("u2").tolist()
    chunk, _ = code_floats(np.frombuffer(raw(x), np.uint8), 2)
    strays, pairs, rest = blocks.take_pieces(chunk, 3, 3)
    assert chunk[0] == blocks.FLOAT_PAIRS and chunk[2] == 0 and rest[0] == strays[0] == blocks.RAW
    pairs = blocks.expand_bytes(pairs, n // 2).tolist()
    exponents = [chunk[1] + (p & 15) for p in pairs] + [chunk[1] + (p >> 4) for p in pairs]
    assert strays[1:9] == struct.pack("<IHH", 2, 77, n - 5) and len(strays) == 11
    exponents[77], exponents[n - 5] = strays[9:]
    assert [(r >> 7) << 15 | a << 7 | r & 127 for a, r in zip(exponents, rest[1:])] == words
    x = x[:64]  # few: one to a byte
    chunk, _ = code_floats(np.frombuffer(raw(x), np.uint8), 2)
    symbols, rest = blocks.take_pieces(chunk, 2, 2)
    assert chunk[:2] == bytes([blocks.FLOAT_PLANES, 0]) and rest[0] == blocks.RAW
    symbols = blocks.expand_bytes(symbols, 64).tolist()
    assert [(r >> 7) << 15 | a << 7 | r & 127 for a, r in zip(symbols, rest[1:])] == words[:64]


def test_all_methods_occur():
    rng, found = np.random.default_rng(0), set()
    for levels in 3, 16, 64, 3000:
        for kind in KINDS:
            for n in 200, 3000, 100_000:
                bits = (levels - 1).bit_length()
                found |= set(coders(encode(packed(codes_of(rng, levels, n, kind), bits), bits, n, levels)))
    found |= (
        set(coders(encode(torch.randn(1000))))
        | set(coders(encode(torch.randn(20_000))))
        | set(coders(encode(torch.randn(20_000).double())))
    )
    found |= set(coders(encode(np.clip(rng.geometric(0.45, 20_000), 0, 63).astype("u1"), 8, 20_000)))
    assert found == set(blocks.METHODS), found ^ set(blocks.METHODS)


# ---- damaged and hostile ------------------------------------------------------------------------------------------
def samples():
    rng = np.random.default_rng(0)
    for levels in 3, 7, 16, 64, 256, 3000:
        for kind in KINDS:
            bits, n = (levels - 1).bit_length(), 2000
            yield encode(packed(codes_of(rng, levels, n, kind), bits), bits, n, levels)
    yield encode(torch.randn(300))
    for dtype in torch.bfloat16, torch.float32, torch.float64:  # with room for a bit, and without
        yield encode(torch.rand(640, generator=torch.Generator().manual_seed(0)).sub(0.5).to(dtype))
        yield encode(torch.randn(300, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype))
    yield encode(b"to be or not to be " * 50)
    yield encode(bytes(3000))
    yield encode(b"")
    yield encode((rng.random(3000) < 0.03).astype("i8"))
    yield encode(rng.normal(0, 900, 3000).astype("i4"))
    yield encode(rng.choice([1, 2**60, -5], 3000))
    yield encode((rng.random(3000) < 0.03))
    x = packed(np.where(rng.random(3000) < 0.03, 3000, 17), 12)
    yield encode(x, 12, 3000)
    x = packed(rng.geometric(0.3, 3000).clip(0, 99), 7)
    yield encode(x, 7, 3000, 100)


def test_every_truncation_and_every_flipped_bit():
    for s in list(samples())[::7]:
        for n in range(len(s)):
            with pytest.raises(CodingError):
                decode(s[:n])
            with pytest.raises(CodingError):
                decode(s[:n] + bytes([s[n] ^ 1 << n % 8]) + s[n + 1 :])


def test_nonsense_with_the_right_checksum():
    "The decoder itself is safe: whatever the bytes, a CodingError or so many bytes as were asked for."
    rng, before, fine = random.Random(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for s in samples():
        size = len(decode(s))
        for _ in range(120):
            data = bytearray(s[:-4])
            for _ in range(rng.choice([1, 1, 3])):
                at = rng.randrange(min(len(data), rng.choice([12, 60, 10**9])))
                if rng.random() < 0.7:
                    data[at] = rng.choice([0, 1, 2, 127, 128, 254, 255, rng.randrange(256)])
                elif rng.random() < 0.5:
                    del data[at : at + rng.choice([1, 4, 50])]
                else:
                    data[at:at] = rng.randbytes(rng.choice([1, 4, 50]))
                if not data:
                    data = bytearray(b"\0")
            data += zlib.crc32(data).to_bytes(4, "little")
            try:
                assert len(decode(bytes(data), size)) == size
                fine += 1
            except CodingError:
                pass
            try:
                decode(bytes(data))
            except CodingError:
                pass
    assert fine > 100 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_nonsense_in_a_chunk_of_floats():
    "Whatever a chunk says, exactly the bytes that were asked for are written, or there is a CodingError."
    from modelzip.workshop.float_chunks import code_floats, expand_floats

    rng, fine, refused = random.Random(0), 0, 0
    for dtype in torch.bfloat16, torch.float32:
        x = torch.randn(1 << 13, generator=torch.Generator().manual_seed(0)).mul(0.05).to(dtype)
        x[:3] = 1e30
        starts = [(y, code_floats(np.frombuffer(raw(y), np.uint8), dtype.itemsize)[0]) for y in (x, x[:1280])]
        starts.append((x[:1280], bytes([blocks.FLOAT_PLANES, 1]) + planes_with_room(x[3:1283])))
        assert [start[0] for _, start in starts] == [blocks.FLOAT_PAIRS, blocks.FLOAT_PLANES, blocks.FLOAT_PLANES]
        for y, start in starts:
            for _ in range(200):
                data = bytearray(start)
                for _ in range(rng.choice([1, 1, 3])):
                    at = rng.randrange(min(len(data), rng.choice([3, 12, 24, 10**9])))
                    data[at : at + rng.choice([0, 1, 1, 9])] = rng.randbytes(rng.choice([1, 1, 1, 0, 5]))
                for size in y.nbytes, 128, 4 * 77, 0:
                    out = np.full(size + 8, 77, np.uint8)
                    try:
                        expand_floats(bytes(data), out[:size], dtype.itemsize)
                        fine += 1
                    except CodingError:
                        refused += 1
                    assert (out[size:] == 77).all()
    assert fine > 100 and refused > 1000


WRONG_PAIRS = dict(  # what is not as the specification has it: where, and what is there instead
    order=(struct.pack("<I2H2B", 2, 9, 3, 1, 2), b""),
    twice=(struct.pack("<I2H2B", 2, 9, 9, 1, 2), b""),
    many=(struct.pack("<I", 300_000) + bytes(900_000), b""),
    behind=(struct.pack("<IHB", 1, 1 << 13, 1), b""),
    lower=(bytes(4), blocks.zstd_compress(bytes(1 << 14))),
)


def stream_of_pairs(strays, lower=b"", n=1 << 13):  # of float32; lower: coded halves in place of plain ones
    halves = bytes([blocks.ZSTD if lower else blocks.RAW]) + (lower or bytes(2 * n))
    chunk = bytes([blocks.FLOAT_PAIRS, 100, 1]) + blocks.pieces(
        bytes([blocks.RAW]) + strays, bytes([blocks.RAW]) + bytes(n // 2), bytes([blocks.RAW]) + bytes(n), halves
    )
    data = b"\0\4" + write_varint(4 * n) + write_varint(len(chunk)) + chunk
    return data + zlib.crc32(data).to_bytes(4, "little")


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_pairs_of_floats_have_one_form(name):
    "Strays come in order and once, so never more than there are elements; halves are not coded."
    assert len(decode(stream_of_pairs(struct.pack("<I2H2B", 2, 3, 9, 1, 2)))) == 1 << 15
    with pytest.raises(CodingError, match="strays? of|lower halves"):
        decode(stream_of_pairs(*WRONG_PAIRS[name]))


def planes_with_room(x):
    "The pieces of a chunk as they once were: the symbols begin a bit later, and of the rest an eighth rides on others."
    words = np.frombuffer(raw(x), f"u{x.itemsize}").astype("u8") >> 8 * (x.itemsize - 2)
    rest = (words >> 9 & 64 | words & 63).astype("u1")
    last = rest[len(rest) // 8 * 7 :]
    packed = [r | (last >> j & 1) << 7 for j, r in enumerate(rest.reshape(8, -1)[:7])]
    parts = [(words >> 6).astype("u1"), np.concatenate(packed)]
    parts += [np.frombuffer(raw(x), "u1")[j :: x.itemsize] for j in range(x.itemsize - 2)]
    return blocks.pieces(*(b"\0" + p.tobytes() for p in parts))


def test_floats_as_they_once_were():
    from modelzip.workshop.float_chunks import expand_floats

    for dtype in torch.bfloat16, torch.float32:
        x = torch.rand(1280, generator=torch.Generator().manual_seed(0)).sub(0.5).to(dtype)
        expand_floats(
            bytes([blocks.FLOAT_PLANES, 1]) + planes_with_room(x), out := np.empty(x.nbytes, "u1"), x.itemsize
        )
        assert out.tobytes() == raw(x)


def test_floats_in_threads():
    x = torch.randn(1_300_000, generator=torch.Generator().manual_seed(0)).mul(0.05)
    coded = encode(x)
    with ThreadPoolExecutor(3) as pool:
        assert encode(x, map=pool.map) == coded
        assert np.array_equal(decode(coded, map=pool.map), np.frombuffer(raw(x), np.uint8))


def test_a_frame_that_says_how_large_it_is():
    "Memory is taken for what is expected, not for what a frame claims; one that tells the truth is read."
    import zstandard

    make = lambda data: zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(1, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    ).compress(data)
    boast, before = make(bytes(2**28)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (
        boast,
        bytes([0xE0]) + (2**40).to_bytes(8, "little") + boast[9:],
        bytes([0xE0]) + b"\xff" * 8 + bytes(29),
        b"",
        b"\0",
    ):
        for size in 0, 100, 100_000:
            with pytest.raises(CodingError):
                blocks.zstd_expand(data, size)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB
    assert blocks.zstd_expand(make(b"honest" * 50), 300) == b"honest" * 50


def test_a_stream_cannot_claim_the_moon():
    for bits, kind in (0, 1), (4, 16), (8, 256):
        body = bytes([bits]) + write_varint(kind) + write_varint(2**50)
        with pytest.raises(CodingError):
            decode(body + zlib.crc32(body).to_bytes(4, "little"))


def test_codes_beyond_the_levels_never_come_out():
    """Ternary codes have two bits; a forged stream must not smuggle in a fourth value through joined, sparse or
    rans chunks."""
    rng = random.Random(1)
    for kind in "flat", "sparse", "rare":
        s = encode(packed(codes_of(np.random.default_rng(0), 3, 5000, kind), 2), 2, 5000, 3)
        for _ in range(200):
            data = bytearray(s[:-4])
            data[rng.randrange(8, len(data))] = rng.randrange(256)
            data += zlib.crc32(data).to_bytes(4, "little")
            try:
                out = decode(bytes(data), packed_bytes(5000, 2))
            except CodingError:
                continue
            if set(coders(bytes(data))) <= {"zstd, joined", "sparse", "rans"}:
                assert int(unpack_bits(torch.from_numpy(out.copy()), 2, 5000).max()) <= 2


# ---- arguments ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "args, words",
    [
        ((b"abc", 4, 7), "count is 7"),
        ((b"abc", 4), "count is None"),
        ((b"abc", 0, 6), "bits is 0"),
        ((b"abc", 17, 6), "bits is 17"),
        ((b"abc", 4, 6, 17), "levels is 17"),
        ((b"abc", 4, 6, 8), "levels is 8"),
        ((b"\xff", 2, 4, 3), "holds the code 3"),
        (("text",), "x is a str"),
        (([1.5],), "x is a list"),
        ((np.array(["a"]),), "array of <U1"),
        ((b"abc", 4, True), "count is True"),
    ],
)
def test_arguments(args, words):
    with pytest.raises((TypeError, ValueError), match=words):
        encode(*args)


def test_wrong_size_and_type():
    with pytest.raises(CodingError, match="3 bytes instead of 4"):
        decode(encode(b"abc"), 4)
    with pytest.raises(TypeError, match="data is a str"):
        decode("abc")


def test_quantized_tensor_of_every_kind():
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    for how in (
        dict(bits=8, axis=0),
        dict(bits=1),
        dict(bits=5, group=25, symmetric=False),
        dict(levels=3),
        dict(bits=12),
        dict(codebook="nf4", group=50),
    ):
        q = quantize(w, **how)
        for name, (bits, count, levels) in q.packed_parts().items():
            part = q.parts()[name]
            assert np.array_equal(decode(encode(part, bits, count, levels)), part.numpy()), (how, name)
