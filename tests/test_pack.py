"""The .mz format from outside: what comes back, and what happens to files that are damaged, forged or interrupted."""

import copy, io, json, math, os, pickle, random, resource, stat, struct, subprocess, sys, tracemalloc, zipfile, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from inputs import Holder
from mutations import JUNK, places
from modelzip import archive as zips, pack
from modelzip.workshop import writing
from modelzip.archive import PackError
from modelzip.workshop import kinds
from modelzip.cli import expanded_tensors
from modelzip.coding import encode
from modelzip.pack import diff, inspect, load, read_tensor, save
from modelzip.data import LeNet5, register_model
from modelzip.kernels import use_kernels
from modelzip.prune import prune_model, sparsify_model
from modelzip.quant import CompressedTensor, Dequantize, quantize_layer, quantize_model
from guards import FUZZ, examples, seeded

torch.set_num_threads(1)
DTYPES = list(pack.DTYPES.values())
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")


# ---- helpers ------------------------------------------------------------------------------------------------------
def raw(t):
    return bytes(pack.as_bytes(t))


def state(model):
    "Everything a model holds, bit by bit: name -> what it is and its bytes."
    out = {}
    for i in pack.items(model):
        if isinstance(i.value, torch.Tensor):
            out[i.name] = (i.value.dtype, tuple(i.value.shape), raw(i.value))
        else:
            out[i.name] = (
                type(i.layer),
                type(i.value),
                json.dumps(i.value.meta(), sort_keys=True),
                {k: (t.dtype, tuple(t.shape), raw(t)) for k, t in i.value.parts().items()},
            )
    return out


class Small(nn.Module):
    "A bit of everything, in little room."

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.decode = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.decode.weight = self.embed.weight
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ModuleList([nn.Linear(4, 3, bias=False)]))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("halves", torch.randn(3).half())
        self.register_buffer("only_code", torch.arange(3.0), persistent=False)


def small(seed=0):
    "…with one compressed layer."
    m = Small(seed)
    m.body[2][0] = quantize_layer(m.body[2][0], bits=4)
    return m.eval()


@pytest.fixture(scope="module")
def one():
    return small()


@pytest.fixture(scope="module", params=["mapped", "archived"])
def one_bytes(request, one, tmp_path_factory):
    return save(one, tmp_path_factory.mktemp("one") / "one.mz", archive=request.param == "archived").read_bytes()


def exact_or_refused(path, data, model, want, **how):
    "Load damaged data: True if the exact model came back, False for a PackError; everything else fails the test."
    Path(path).write_bytes(data)
    try:
        got = load(path, model, **how)
    except PackError as e:
        assert str(e).startswith(str(path)) and len(str(e)) > len(str(path)) + 10
        return False
    assert state(got) == want, "another model was loaded"
    return True


class Wide(nn.Module):
    "Layers that are large enough for every way of storing: raw with a checksum of its own, and all the coders."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Linear(150, 120)
        self.register_buffer("halves", torch.randn(40_000).half())
        self.register_buffer("sparse", (torch.rand(30_000) < 0.02).float())
        for name, how in {
            "eight": dict(bits=8),
            "three": dict(bits=3, group=50),
            "ternary": dict(levels=3, group=50),
            "zeros": dict(bits=4),
        }.items():
            layer = nn.Linear(150, 120, bias=False)
            if name == "zeros":
                layer.weight.data *= torch.rand(120, 150) < 0.05
            self.add_module(name, quantize_layer(layer, **how))


@pytest.fixture(scope="module")
def wide():
    return Wide().eval()


def archive(path, manifest, payload=b"", text=None, extra=()):
    "A well-formed archive with whatever manifest: only its content can be wrong."
    text = json.dumps(manifest).encode() if text is None else text
    entries, out = [], b""
    for name, method, data in [("payload", 0, payload), ("manifest.json", 8, text), *extra]:
        packed = zips.deflate(data) if method == 8 else data
        e = zips.Entry(name, method, zlib.crc32(data), len(packed), len(data), len(out))
        entries.append(e)
        out += zips.local_header(e) + packed
    Path(path).write_bytes(out + zips.directory(entries, len(out)))
    return path


def plain(shape=(2,), offset=0, dtype="float32"):
    return {"dtype": dtype, "shape": list(shape), "offset": offset}


def manifest(version=1, **tensors):
    return {"modelzip": version, "architecture": None, "tensors": tensors}


def refused(path, *words, model=None):
    with pytest.raises(PackError) as e:
        load(path, model or Holder(w=torch.zeros(2)))
    assert str(path) in str(e.value)
    for w in words:
        assert w in str(e.value)


# ---- what comes back ----------------------------------------------------------------------------------------------
@st.composite
def tensors(draw):
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=4))
    n = math.prod(shape) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8).copy()
    t = torch.from_numpy(data)
    if dtype == torch.bool:
        return (t & 1).bool().reshape(shape)
    return (t.view(dtype) if n else torch.empty(0, dtype=dtype)).reshape(shape)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda k: "." not in k and not hasattr(nn.Module(), k)),
        tensors(),
        max_size=5,
    )
)
def test_any_tensor_under_any_name(tmp_path, named):
    "Random bits (NaN with payload, signed zeros, subnormals), all types, empty and scalar shapes, any Unicode name."
    m = Holder(**named)
    empty = Holder(**{k: torch.zeros_like(t) for k, t in named.items()})
    for how in dict(archive=True), dict(archive=False):
        path = save(m, tmp_path / "x.mz", **how)
        got = load(path, empty)
        assert state(got) == state(m) and list(got.state_dict()) == list(m.state_dict())
        for k, t in named.items():
            assert raw(read_tensor(path, k)) == raw(t)
    assert state(load(path, empty, mmap=True)) == state(m)
    str(inspect(path))
    inspect(path)._repr_html_()


def test_lone_surrogates_and_control_characters_in_names(tmp_path):
    m = nn.ModuleDict({"\ud800": nn.Linear(1, 1), "a\nb\x1b[31m<script>": nn.Linear(1, 1)})
    path = save(m, tmp_path / "x.mz")
    assert state(load(path, m)) == state(m)
    assert "\x1b" not in str(inspect(path)) and "<script>" not in inspect(path)._repr_html_()


def test_strided_expanded_conjugated(tmp_path):
    z = torch.randn(3, 4, dtype=torch.complex64)
    m = Holder(
        t=torch.randn(3, 4).T,
        e=torch.tensor([1.0, 2.0])[:, None].expand(2, 3),
        s=torch.arange(20)[::3],
        c=z.conj(),
        i=z.conj().imag,
        p=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    )
    got = load(save(m, tmp_path / "x.mz"), m)
    for k, t in m.state_dict().items():
        assert torch.equal(got.state_dict()[k], t) and got.state_dict()[k].is_contiguous()


def test_small_model_of_everything(tmp_path, one):
    path = save(one, tmp_path / "x.mz")
    for given in one, Small(1), small(2):
        before = state(given)
        got = load(path, given)
        assert state(got) == state(one) and state(given) == before
        assert got.decode.weight is got.embed.weight
        assert type(got.body[2][0]) is type(one.body[2][0]) and not got.training
        assert torch.equal(got.only_code, given.only_code) and got.only_code is not given.only_code
        assert got.body[1].num_batches_tracked.dtype == torch.int64


def test_same_bytes_again(tmp_path, one):
    path = save(one, tmp_path / "x.mz")
    again = save(load(path, Small(5)), tmp_path / "y.mz")
    assert path.read_bytes() == again.read_bytes()
    assert save(copy.deepcopy(one), path).read_bytes() == again.read_bytes()


def test_registered_architecture_and_untouched_random_state(tmp_path):
    for m in LeNet5(), quantize_model(LeNet5(), bits=8), quantize_model(LeNet5(), bits=4, group=64):
        path = save(m, tmp_path / "x.mz")
        before = torch.random.get_rng_state()
        got = load(path)
        assert torch.equal(before, torch.random.get_rng_state())
        assert type(got) is LeNet5 and state(got) == state(m) and got.architecture == {"name": "LeNet5", "options": {}}


def test_overhead_and_ratios(tmp_path):
    m = LeNet5()
    models = {"fp32": m, 8: quantize_model(m, bits=8), 4: quantize_model(m, bits=4, group=64)}
    mapped, archived = (
        {n: os.path.getsize(save(q, tmp_path / "x.mz", archive=a)) for n, q in models.items()} for a in (False, True)
    )
    assert mapped["fp32"] - 4 * 431_080 <= 512
    assert mapped[8] <= 0.26 * mapped["fp32"] and mapped[4] <= 0.14 * mapped["fp32"]
    for n in models:
        assert archived[n] < mapped[n]  # untrained weights are uniform: little to gain


def test_large_tensors_are_aligned(tmp_path):
    m = nn.Sequential(
        nn.Linear(3, 7), nn.Linear(200, 301), Holder(x=torch.zeros(3, dtype=torch.uint8), d=torch.zeros(3).double())
    )
    save(m, tmp_path / "x.mz", archive=False)
    with zipfile.ZipFile(tmp_path / "x.mz") as z:
        table = json.loads(z.read("manifest.json"))["tensors"]
    assert {n for n, e in table.items() if "crc" in e} == {"1.weight"} and not any("coded" in e for e in table.values())
    for e in table.values():
        assert e["offset"] % DTYPES[0].itemsize == 0 or e["dtype"] != "float64"
        assert e["offset"] % (64 if math.prod(e["shape"]) * 4 >= pack.LARGE else 1) == 0
    assert (tmp_path / "x.mz").read_bytes()[pack.ALIGN :].startswith(raw(m[1].weight)[:64])


def test_info_and_inspect(tmp_path, one):
    path = save(one, tmp_path / "x.mz", recipe=["prune", {"bits": 4}], note="höher")
    c = inspect(path)
    assert c.info == {"recipe": ["prune", {"bits": 4}], "note": "höher"} and c.bytes == os.path.getsize(path)
    assert sum(l.bytes for l in c.lines) + c.rest == c.bytes
    assert "decode.weight" in str(c) and "= embed.weight" in str(c) and "quantized" in str(c)
    import matplotlib

    matplotlib.use("agg")
    assert c.plot().get_xlabel() == "kilobytes"


def test_recurrent_and_attention_layers(tmp_path):
    for m, x in [
        (nn.LSTM(3, 4, num_layers=2, batch_first=True), torch.randn(2, 5, 3)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)),
    ]:
        m.eval()
        got = load(save(m, tmp_path / "x.mz"), m)
        first = lambda y: y[0] if isinstance(y, tuple) else y
        assert torch.equal(first(got(x)), first(m(x))) and state(got) == state(m)


def test_parametrized_and_nested(tmp_path):
    m = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    m = nn.Sequential(nn.ModuleDict({"a b": nn.ModuleList([m, nn.ParameterList([torch.ones(2)])])}))
    assert state(load(save(m, tmp_path / "x.mz"), m)) == state(m)


def test_root_may_be_a_compressed_layer(tmp_path):
    layer = nn.Linear(8, 4)
    q = quantize_layer(layer, bits=8)
    got = load(save(q, tmp_path / "x.mz"), layer)
    assert type(got) is type(q) and state(got) == state(q)
    x = torch.randn(2, 8)
    assert torch.equal(got(x), q(x))


def test_empty_model(tmp_path):
    assert not state(load(save(nn.ReLU(), tmp_path / "x.mz"), nn.ReLU()))


def test_requires_grad_is_the_models(tmp_path):
    m = nn.Linear(2, 2)
    path = save(m, tmp_path / "x.mz")
    assert load(path, m).weight.requires_grad
    m.weight.requires_grad_(False)
    got = load(path, m)
    assert not got.weight.requires_grad and got.bias.requires_grad and not got.training


def test_types_are_the_files(tmp_path):
    m = nn.Linear(2, 2)
    assert load(save(copy.deepcopy(m).half(), tmp_path / "x.mz"), m).weight.dtype == torch.float16


def test_a_model_on_the_meta_device_is_enough(tmp_path):
    m = nn.Linear(2, 3)
    with torch.device("meta"):
        skeleton = nn.Linear(2, 3)
    assert state(load(save(m, tmp_path / "x.mz"), skeleton)) == state(m)


# ---- ties ---------------------------------------------------------------------------------------------------------
class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.a, self.b = nn.Linear(300, 300), nn.Linear(300, 300)
        if tie:
            self.b.weight = self.a.weight


def test_tied_parameters(tmp_path):
    path = save(Tied(), tmp_path / "x.mz")
    assert os.path.getsize(path) < 1.1 * 4 * 300 * 300
    for given in Tied(), Tied(tie=False):
        got = load(path, given)
        assert got.a.weight is got.b.weight and got.a.bias is not got.b.bias
    free = Tied(tie=False)
    got = load(save(free, path), Tied())
    assert state(got) == state(free) and got.a.weight is not got.b.weight


def test_tied_compressed_layers(tmp_path):
    m = quantize_model(Tied(), bits=8)
    m.b.packed = m.a.packed
    path = save(m, tmp_path / "x.mz")
    assert os.path.getsize(path) < 1.2 * 300 * 300
    for given in m, Tied(), Tied(tie=False):
        got = load(path, given)
        assert got.a.packed is got.b.packed and got.a is not got.b and state(got) == state(m)


def test_one_layer_twice(tmp_path):
    layer = nn.Linear(3, 3)
    for m in nn.Sequential(layer, nn.ReLU(), layer), quantize_model(nn.Sequential(layer, nn.ReLU(), layer), bits=8):
        got = load(save(m, tmp_path / "x.mz"), m)
        assert got[0] is got[2] and state(got) == state(m)


def test_one_layer_cannot_hold_two_tensors(tmp_path):
    layer = nn.Linear(3, 3)
    path = save(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), tmp_path / "x.mz")
    refused(path, "0.weight", "2.weight", model=nn.Sequential(layer, nn.ReLU(), layer))


def test_parameter_and_buffer_that_share_memory(tmp_path):
    m = nn.Linear(2, 2)
    m.register_buffer("view", m.weight.data)
    got = load(save(m, tmp_path / "x.mz"), m)
    assert (
        isinstance(got.weight, nn.Parameter)
        and not isinstance(got.view, nn.Parameter)
        and got.view.data_ptr() == got.weight.data_ptr()
    )


def test_overlapping_views_come_back_apart(tmp_path):
    x = torch.arange(6.0)
    m = Holder(a=x[:4], b=x[2:], e=torch.empty(0), f=torch.empty(0))
    got = load(save(m, tmp_path / "x.mz"), m)
    assert state(got) == state(m) and got.a.untyped_storage().data_ptr() != got.b.untyped_storage().data_ptr()


# ---- what cannot be saved -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "model, error, words",
    [
        (nn.LazyLinear(3), ValueError, "run the model once"),
        (Holder(w=torch.eye(2).to_sparse()), TypeError, "sparse"),
        (nn.Linear(2, 2, device="meta"), ValueError, "meta"),
        ({"w": torch.zeros(2)}, TypeError, "dict"),
    ],
)
def test_unstorable(tmp_path, model, error, words):
    with pytest.raises(error, match=words):
        save(model, tmp_path / "x.mz")
    assert not os.listdir(tmp_path)


def test_extra_state(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"x": 1}

    with pytest.raises(TypeError, match="extra state"):
        save(nn.Sequential(Odd(1, 1)), tmp_path / "x.mz")


@pytest.mark.parametrize(
    "info", [{"x": math.nan}, {"x": math.inf}, {"x": object()}, {"x": {1, 2}}, {"x": np.float32(1)}]
)
def test_info_must_be_json(tmp_path, info):
    with pytest.raises((TypeError, ValueError), match="besides model and path"):
        save(nn.ReLU(), tmp_path / "x.mz", **info)


def test_info_may_not_be_deep(tmp_path):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError):
        save(nn.ReLU(), tmp_path / "x.mz", x=deep)


def test_odd_architecture_attribute_is_not_ours(tmp_path):
    m = nn.Linear(1, 1)
    m.architecture = "resnet"
    assert inspect(save(m, tmp_path / "x.mz")).architecture is None


# ---- damage -------------------------------------------------------------------------------------------------------
def test_truncated_at_every_length(tmp_path, one, one_bytes):
    want = state(one)
    for n in range(len(one_bytes)):
        assert not exact_or_refused(tmp_path / "x.mz", one_bytes[:n], one, want), n


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_every_byte_flipped(tmp_path, one, one_bytes):
    "All bits of a byte, one bit of the next (in a search: both of each)."
    want, rng, loaded = state(one), seeded(0), []
    for i in range(len(one_bytes)):
        for mask in [0xFF, 1 << rng.randrange(8)] if FUZZ else [0xFF if i % 2 else 1 << rng.randrange(8)]:
            data = bytearray(one_bytes)
            data[i] ^= mask
            if exact_or_refused(tmp_path / "x.mz", data, one, want):
                loaded.append(i)
    assert len(loaded) <= 1, loaded  # the unused bits at the end of the deflate stream


def test_appended_and_prepended_bytes(tmp_path, one, one_bytes):
    want = state(one)
    for data in one_bytes + b"\0", b"\0" + one_bytes, one_bytes * 2, one_bytes[:-2] + b"\1\0x":
        assert not exact_or_refused(tmp_path / "x.mz", data, one, want)


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        n = min(rng.choice([1, 4, 16, 100]), len(data) - i)
        kind = rng.randrange(7)
        if kind == 0:
            data[i : i + n] = rng.randbytes(n)
        elif kind == 1:
            del data[i : i + n]
        elif kind == 2:
            data[i:i] = rng.randbytes(n)
        elif kind == 3:
            data[i : i + n] = bytes(n)
        elif kind == 4:
            data[i : i + n] = data[j : j + n]
        elif kind == 5:
            data[i:i] = data[j : j + n]
        elif kind == 6 and i + 4 <= len(data):
            struct.pack_into("<I", data, i, rng.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, len(data)]))
        if not data:
            break
    return bytes(data)


def test_random_mutations(tmp_path, one, one_bytes):
    want, rng = state(one), random.Random(1)
    loaded = sum(exact_or_refused(tmp_path / "x.mz", mutate(one_bytes, rng), one, want) for _ in range(300))
    assert loaded < 50  # (mutations that change nothing)


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_forged_manifests(tmp_path, one, one_bytes):
    "Checksums are right, the manifest is nonsense: a PackError or some model, never another exception."
    with zipfile.ZipFile(io.BytesIO(one_bytes)) as z:
        good, payload = json.loads(z.read("manifest.json")), z.read("payload")
    every, rng, path, same, times = list(places(good)), seeded(2), tmp_path / "x.mz", 0, examples(200)
    assert times > len(every)
    for n in range(times):  # each place once, then places by chance
        m = copy.deepcopy(good)
        at = every[n % len(every)] if n < len(every) else rng.choice(every)
        if not at:
            m = rng.choice(JUNK)
        else:
            owner = m
            for k in at[:-1]:
                owner = owner[k]
            how = rng.randrange(4)
            if how == 0:
                del owner[at[-1]]
            elif how == 1 and isinstance(owner, dict):
                owner[rng.choice(["x", "same", "layer", "kind", "offset", "coded", "crc"])] = rng.choice(JUNK)
            else:
                owner[at[-1]] = rng.choice(JUNK)
        archive(path, m, payload)
        try:
            inspect(path)._repr_html_()
        except PackError:
            pass
        try:
            load(path, one)
            same += 1
        except PackError as e:
            assert str(path) in str(e)
        try:
            read_tensor(path, "halves")
        except PackError as e:
            assert str(path) in str(e)
        except ValueError as e:
            assert "name is 'halves'" in str(e)
    assert same < 0.14 * times


def test_memory_stays_small_whatever_a_file_claims(tmp_path):
    bombs = [
        archive(tmp_path / "deflate.mz", None, text=bytes(2**25)),
        archive(tmp_path / "values.mz", None, text=b"[" + b"[]," * 2**21 + b"0]"),
        archive(tmp_path / "deep.mz", None, text=b'{"modelzip":' + b"[" * 10**6),
        archive(tmp_path / "shape.mz", manifest(w=plain([2**50])), bytes(8)),
        archive(tmp_path / "many.mz", manifest(w=plain([2**20] * 3)), bytes(8)),
        archive(tmp_path / "digits.mz", None, text=b"9" * 10**6),
    ]
    lying = bytearray((tmp_path / "shape.mz").read_bytes())
    at = lying.rindex(b"PK\1\2manifest.json"[:4])
    struct.pack_into("<I", lying, at + 24, 0xFFFFFFF0)
    (tmp_path / "size.mz").write_bytes(lying)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for b in [*bombs, tmp_path / "size.mz"]:
        with pytest.raises(PackError):
            load(b, Holder(w=torch.zeros(2)))
        with pytest.raises(PackError):
            inspect(b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25, peak
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


@pytest.mark.parametrize(
    "table, words",
    [
        (dict(w=plain(), v=plain()), "overlap"),
        (dict(w=plain(offset=4)), "need"),
        (dict(w=plain([1])), "need"),
        (dict(w=plain([4])), "need"),
        (dict(w=plain([-2])), "shape"),
        (dict(w=plain([2**62, 2**62])), "shape"),
        (dict(w=plain([0, 2**62, 2**62])), "shape"),
        (dict(w=plain([2.0])), "shape"),
        (dict(w=plain([True, True])), "shape"),
        (dict(w=plain(offset=1)), "offset"),
        (dict(w=plain(offset=-8)), "offset"),
        (dict(w=plain(offset=2**80)), "offset"),
        (dict(w=plain(dtype="object")), "type"),
        (dict(w=plain(dtype=["float32"])), "type"),
        (dict(w={"same": "w"}), "does not come before"),
        (dict(w={"same": "v"}, v=plain()), "does not come before"),
        (dict(w=plain() | {"coder": "zstd"}), "form"),
        (dict(w=plain() | {"coded": 8}), "version 1"),
        (dict(w=plain() | {"crc": 8}), "version 1"),
        (dict(w=plain() | {"crc": 8, "coded": 8}), "form"),
        (dict(w=plain() | {"layer": "Dequantize"}), "form"),
        (dict(w=[]), "form"),
        (
            dict(
                w={
                    "dtype": "float32",
                    "shape": [2],
                    "kind": "magic",
                    "meta": {},
                    "parts": {"x": plain()},
                    "layer": "Dequantize",
                }
            ),
            "magic",
        ),
        (
            dict(
                w={
                    "dtype": "float32",
                    "shape": [2],
                    "kind": "quantized",
                    "meta": {},
                    "parts": {"x": plain()},
                    "layer": "Dequantize",
                }
            ),
            "fit together",
        ),
        (
            dict(
                w={
                    "dtype": "float32",
                    "shape": [2],
                    "kind": "quantized",
                    "meta": {},
                    "parts": {"x": plain()},
                    "layer": "subprocess.Popen",
                }
            ),
            "",
        ),
    ],
)
def test_tables_that_lie(tmp_path, table, words):
    refused(archive(tmp_path / "x.mz", manifest(**table), bytes(8)), words)


def test_bool_bytes(tmp_path):
    refused(archive(tmp_path / "x.mz", manifest(w=plain([2], dtype="bool")), b"\1\2"), "bool")
    assert load(
        archive(tmp_path / "x.mz", manifest(w=plain([2], dtype="bool")), b"\1\0"), Holder(w=torch.zeros(2))
    ).w.tolist() == [True, False]


def test_gaps_must_be_zero(tmp_path):
    refused(archive(tmp_path / "x.mz", manifest(w=plain(offset=4)), b"\0\1\0\0" + bytes(8)), "zero")


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "JSON"),
        (b"null", "version"),
        (b"{}", "version"),
        (b'{"modelzip":NaN}', "JSON"),
        (b'{"modelzip":1e999}', "JSON"),
        (b'{"modelzip":1,"modelzip":1}', "twice"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 50_000, "deep"),
        (b"1" * 10_000, "JSON"),
        (b'{"modelzip":1.0}', "version"),
        (b'{"modelzip":true}', "version"),
        (b'{"modelzip":0}', "version"),
        (b'{"modelzip":1,"tensors":[]}', "fields"),
        (b'{"modelzip":1,"tensors":{},"later":1}', "fields"),
        (b'{"modelzip":1,"tensors":{},"architecture":{"name":1,"options":{}}}', "architecture"),
    ],
)
def test_manifests_that_are_wrong(tmp_path, text, words):
    refused(archive(tmp_path / "x.mz", None, text=text), words)


def test_newer_version(tmp_path):
    "…even if nearly everything about it is unknown."
    words = "newer modelzip", "version 6"
    refused(archive(tmp_path / "x.mz", {"modelzip": 6}), *words)
    refused(
        archive(tmp_path / "x.mz", {"modelzip": 6, "tensors": []}, extra=[("index", 0, b"xyz"), ("codes", 8, b"abc")]),
        *words,
    )


def test_pickle_inside(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for extra in [("data.pkl", 0, pickle.dumps(Bad()))], [("archive/data.pkl", 8, pickle.dumps(Bad()))]:
        refused(archive(tmp_path / "x.mz", manifest(w=plain()), bytes(8), extra=extra), "do not belong")
    (tmp_path / "x.mz").write_bytes(pickle.dumps(Bad()))
    refused(tmp_path / "x.mz")
    torch.save({"w": Bad()}, tmp_path / "x.mz")
    refused(tmp_path / "x.mz", "not of a model")
    archive(tmp_path / "x.mz", manifest(w=plain()), pickle.dumps(Bad()))
    refused(tmp_path / "x.mz")
    assert not (tmp_path / "executed").exists()
    assert not any("pickle" in Path(m.__file__).read_text() for m in (pack, zips))


def test_other_files(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.zeros(2))
    refused(tmp_path / "x.npz", "not of a model")
    (tmp_path / "empty.mz").touch()
    refused(tmp_path / "empty.mz", "empty")
    refused(tmp_path, "folder")
    refused("/dev/null", "regular")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.mz")
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "nothing.mz")
    with pytest.raises(TypeError):
        load(tmp_path / "empty.mz", {"w": 1})


def test_zip_archives_that_are_not_ours(tmp_path, one, one_bytes):
    "Repacked, encrypted, split, commented, doubled, overlapping: everything that the zip format allows and we do not."
    with zipfile.ZipFile(io.BytesIO(one_bytes)) as z:
        content = {n: z.read(n) for n in z.namelist()}

    def repack(names, method=zipfile.ZIP_DEFLATED, comment=b""):
        with zipfile.ZipFile(tmp_path / "x.mz", "w", method) as z:
            for n in names:
                z.writestr(n, content[n])
            z.comment = comment
        refused(tmp_path / "x.mz", model=one)

    repack(content)
    repack(content, zipfile.ZIP_STORED)
    repack(content, comment=b"hello")
    repack(["manifest.json"])
    repack([])
    with pytest.warns(UserWarning):
        repack(["payload", "payload", "manifest.json"])
    entries = zips.read_entries(io.BytesIO(one_bytes), len(one_bytes))
    p, m = entries
    body = one_bytes[: m.offset + len(zips.local_header(m)) + m.packed]
    for wrong in (
        [p, p, m],
        [m, p],
        [m],
        [p, zips.Entry("manifest.json", 8, m.crc, m.packed, m.size, 0)],
        [p, m, m],
        [p, zips.Entry("manifest.json", 0, m.crc, m.packed, m.packed, m.offset)],
    ):
        (tmp_path / "x.mz").write_bytes(body + zips.directory(wrong, len(body)))
        refused(tmp_path / "x.mz", model=one)


# ---- streams ------------------------------------------------------------------------------------------------------
def test_all_ways_of_storing(tmp_path, wide):
    "Each way in which a part can be stored occurs, and gives back the same bits: whole, mapped, and one by one."
    archived, mapped = save(wide, tmp_path / "a.mz"), save(wide, tmp_path / "m.mz", archive=False)
    used = {c for l in inspect(archived).lines for c in l.coder.split("; ")}
    assert {"raw", "float planes", "float pairs", "values", "rans"} <= used, used
    for got in (
        load(archived, wide),
        load(mapped, wide),
        load(mapped, wide, mmap=True),
        load(mapped, wide, mmap=True, verify=False),
    ):
        assert state(got) == state(wide)
    for item in pack.items(wide):
        for path in archived, mapped:
            one = read_tensor(path, item.name)
            assert one == item.value if isinstance(one, CompressedTensor) else raw(one) == raw(item.value)
    assert diff(archived, mapped).same and archived.stat().st_size < 0.75 * mapped.stat().st_size


def test_threads_do_not_matter(tmp_path, wide):
    assert len({save(wide, tmp_path / "x.mz", threads=n).read_bytes() for n in (1, 2, 7, None)}) == 1


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
@pytest.mark.parametrize("way", ["archived", "mapped"])
def test_damage_anywhere_and_any_way_of_reading(tmp_path, wide, way):
    "Bits, bytes and ranges of a file with every coder in it: load, load mapped, and every tensor by itself."
    good, want, rng, path = (
        save(wide, tmp_path / "good.mz", archive=way == "archived").read_bytes(),
        state(wide),
        seeded(3),
        tmp_path / "x.mz",
    )
    names = [i.name for i in pack.items(wide)]
    single = {i.name: i.value for i in pack.items(wide)}
    for n in range(examples(100)):
        data = bytearray(good)
        if n % 2:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            data = mutate(good, rng)
        exact_or_refused(path, data, wide, want)
        if way == "mapped":
            exact_or_refused(path, data, wide, want, mmap=True)
        name = rng.choice(names)
        try:
            got = read_tensor(path, name)
        except PackError as e:
            assert str(e).startswith(str(path))
        else:
            assert got == single[name] if isinstance(got, CompressedTensor) else raw(got) == raw(single[name]), name


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_forged_streams(tmp_path):
    "The zip's checksum and the stream's are right, the stream is nonsense: a PackError, quickly and in little memory."
    rng, path, skeleton = seeded(4), tmp_path / "x.mz", Holder(w=torch.zeros(3000))
    good = encode(torch.randn(3000, generator=torch.Generator().manual_seed(0)).mul(8).round())

    def forged(data, shape=(3000,)):
        stream = bytes(data) + zlib.crc32(bytes(data)).to_bytes(4, "little")
        return archive(path, manifest(2, w=plain(shape) | {"coded": len(stream)}), stream)

    assert load(forged(good[:-4]), skeleton).w.abs().max() > 1
    same, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(examples(160)):
        data = bytearray(good[:-4])
        at = rng.randrange(min(len(data), 40 if n % 2 else 10**9))
        data[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        try:
            load(forged(data), skeleton)
            same += 1
        except PackError as e:
            assert str(path) in str(e)
    assert same < examples(160) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16
    for shape in [2**40], [3001], []:
        refused(forged(good[:-4], shape), model=Holder(w=torch.zeros(2)))
    with pytest.raises(PackError):
        read_tensor(forged(good[:-4], [2**30]), "w")


def test_first_version_is_still_read():
    "A file of the first version of the format, as it was written then."
    path = Path(__file__).with_name("files") / "version1.mz"
    model = nn.Sequential(
        nn.Embedding(12, 8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8, bias=False), nn.Linear(8, 12)
    )
    model[4].weight = model[0].weight
    torch.manual_seed(0)
    again = nn.Sequential(
        nn.Embedding(12, 8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8, bias=False), nn.Linear(8, 12)
    )
    again[4].weight = again[0].weight
    want = quantize_model(again, 3, group=4, symmetric=False)
    for got in load(path, model), load(path, model, mmap=True):
        assert state(got) == state(want) and got[0].packed is got[4].packed
    assert inspect(path).version == 1 and read_tensor(path, "4.weight") == want[4].q


def patterned(m):
    with torch.no_grad():
        for p in m.parameters():
            p.copy_((torch.arange(p.numel()) % 13 - 6).reshape(p.shape) / 8)
    return m.eval()


def test_later_versions_are_still_read():
    """Coded streams (2), layers that differ from the builder's (3), a solid file (4), and one whose codes know their
    neighbours (6), as they were written then."""
    files = Path(__file__).with_name("files")
    two = quantize_model(patterned(LeNet5(channels=[2, 3], hidden=40)), levels=7, per_channel=False)
    three, four = LeNet5(channels=[2, 3], hidden=4), LeNet5(channels=[2, 3], hidden=4)
    six = quantize_model(patterned(LeNet5(channels=[3, 2], hidden=5)), levels=7, per_channel=False)
    three.fc1, four.conv2 = nn.Sequential(nn.Linear(48, 3, bias=False), nn.Linear(3, 4)), nn.Conv2d(2, 3, 5, bias=False)
    for version, want in (
        (2, two),
        (3, patterned(three)),
        (4, quantize_model(patterned(four), levels=7, per_channel=False)),
        (6, six),
    ):
        path = files / f"version{version}.mz"
        assert inspect(path).version == version and state(load(path)) == state(load(path, want)) == state(want)


class Fifth(nn.Module):
    "What files of version 5 say of a model that nobody registered."

    def __init__(self, slope=0.01, limit=1.0):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(slope)
        self.rnn, self.fc, self.tied, self.out = (
            nn.LSTM(4, 6, batch_first=True),
            nn.Linear(6, 16),
            nn.Linear(6, 16),
            nn.Sequential(nn.GELU(), nn.Linear(16, 3), nn.Hardtanh()),
        )
        self.limit, self.by, self.pair = limit, {0: 1.0}, (1, 1)
        self.tied.weight = self.fc.weight

    def forward(self, x):
        x = self.rnn(self.act(self.norm(self.conv(x))).flatten(2).mT)[0][:, -1]
        return self.out(self.fc(x) + self.tied(x)).clamp(max=self.limit) * self.by[0] * self.pair[1]


def fifth():
    "As it was when its file was written: `save(…, archive=True, note=…)`; the other file is `shrunk`, solid."
    m = Fifth(0.3, math.inf)
    m.conv, m.norm, m.by, m.pair = (
        nn.Conv2d(1, 4, 3, stride=2, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(4, eps=0.5),
        {0: 2.0},
        (1, 3),
    )
    m.out = nn.Sequential(nn.GELU("tanh"), nn.Linear(16, 3), nn.Hardtanh(-9, math.inf))
    m.norm.running_var.mul_(2)
    m = quantize_model(
        patterned(m),
        4,
        group=8,
        overrides={"conv": {"levels": 7, "group": None}, "rnn*": {"bits": 8, "group": None}, "out.*": None},
    )
    m.out[1] = sparsify_model(prune_model(m.out[1], 0.7))
    return m


def shrunk():
    m = LeNet5(channels=[2, 3], hidden=4)
    m.conv1, m.fc1 = (
        nn.Conv2d(1, 2, 5, stride=2, padding=12),
        nn.Sequential(nn.Linear(48, 3, bias=False), nn.Tanh(), nn.Linear(3, 4)),
    )
    return use_kernels(quantize_model(patterned(m), levels=7, per_channel=False))


def test_fifth_version_is_still_read():
    """Classes, arguments and attributes of a model's layers (archived), and a builder's seal (solid), as they were
    written then. The sums were taken then, too."""
    files, x = Path(__file__).with_name("files"), torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)
    for name, like, crc, want in (
        ("version5.mz", Fifth, 767001999, [[5.74644, -5.19758, -4.3478], [4.7424, -6.22647, -3.82178]]),
        (
            "version5_solid.mz",
            None,
            4141358475,
            [
                [-0.81249, -0.625, -0.43751, -0.46873, -0.28124, -0.09376, 0.09373, 0.06251, 0.25, 0.43749],
                [-0.8125, -0.625, -0.4375, -0.4375, -0.25, -0.0625, -0.0625, 0.125, 0.3125, 0.28125],
            ],
        ),
    ):
        path = files / name
        assert inspect(path).version == 5
        for got in [load(path, like())] if like else [load(path), load(path, LeNet5(channels=[2, 3], hidden=4))]:
            numbers = b"".join(bytes(pack.as_bytes(t)) for t in expanded_tensors(got).values())
            with torch.no_grad():
                out = got(x)
            assert zlib.crc32(numbers) == crc and torch.allclose(
                out, torch.tensor(want), atol=1e-3 if like else 0.02
            ), (zlib.crc32(numbers), out.tolist())
        if like:
            assert got.tied.packed is got.fc.packed and (
                got.by,
                got.pair,
                got.limit,
                got.conv.stride,
                got.norm.eps,
            ) == ({0: 2.0}, (1, 3), math.inf, (2, 2), 0.5)
    with pytest.raises(PackError, match="no registered builder"):
        load(files / "version5.mz")


def floats():
    "Weights that were saved, archived, when floats were first coded by their exponents."
    m = nn.Module()
    dice = [12345]
    for _ in range(2 * 1920):
        dice.append((dice[-1] * 1103515245 + 12345) % 2**31)
    w = (torch.tensor(dice[1:]).double() / 2**31 - 0.5).reshape(2, -1).prod(0)
    for name, x in {"below": w, "above": w * 30}.items():
        for dtype in torch.bfloat16, torch.float32:
            m.register_buffer(f"{name}_{dtype}".replace("torch.", ""), x.to(dtype))
    return m


def test_streams_of_floats_are_still_read():
    path = Path(__file__).with_name("files") / "version5_floats.mz"
    assert [line.coder for line in inspect(path).lines].count("float planes") >= 3
    assert state(load(path, floats())) == state(floats())


def test_the_version_is_the_lowest_that_can_read_the_file(tmp_path):
    """Codes in streams need version 2; whole numbers as values (method 7), also inside of other methods, and floats by
    their exponents (method 8) are read from version 5 on."""
    g = torch.Generator().manual_seed(0)
    labels, few = torch.randint(-9, 9, (9000,), generator=g, dtype=torch.int32) * 70_001, torch.randn(9000, generator=g)
    for t, archive, version in (
        (few[:50], True, 1),
        (few[:50], False, 1),
        (few, True, 5),
        (torch.arange(90_000, dtype=torch.uint8) % 7, True, 2),
        (few.repeat(3), False, 2),
        (labels, True, 5),
        (labels[:9000], False, 1),
        (labels.repeat(3), False, 2),
    ):
        m = nn.Module()
        m.register_buffer("w", t)
        path = save(m, tmp_path / "x.mz", archive)
        assert inspect(path).version == version and torch.equal(load(path, m).w, t), (archive, version)


def test_values_inside_other_methods_are_found(monkeypatch):
    "`has_values` says of a chunk whether reading it will need the method."
    from modelzip import coding
    from modelzip.quant import pack_bits
    from modelzip.workshop import blocks, streams

    called, expand = [], streams.expand_values
    monkeypatch.setattr(streams, "expand_values", lambda *a: called.append(1) or expand(*a))
    g, found = torch.Generator().manual_seed(0), set()
    for n, bits, zeros, k in (
        (9000, 8, 0.97, 30),
        (9000, 8, 0.9, 200),
        (9000, 6, 0.995, 3),
        (90_000, 8, 0.95, 20),
        (9000, 4, 0.5, 9),
        (5000, 11, 0.5, 1500),
        (5000, 16, 0.0, 5000),
        (60_000, 12, 0.0, 4000),
        (3000, 3, 0.99, 5),
    ):
        codes = torch.where(
            torch.rand(n, generator=g) < zeros, 0, torch.randint(0, min(k, 2**bits), (n,), generator=g)
        ).int()
        chunk = streams.code_codes(pack_bits(codes, bits).numpy(), bits, n, 2**bits)
        called.clear()
        streams.expand_codes(chunk, bits, n, 2**bits)
        assert coding.has_values(chunk) == bool(called), (n, bits)
        found.add((chunk[0], bool(called)))
    for rare in (
        streams.code_elements(np.arange(9, dtype="u1"), 1),
        streams.code_codes(np.arange(200, dtype="u1") % 7, 8, 200, 256),
    ):
        assert coding.has_values(b"\3\0" + coding.write_varint(200) + blocks.pieces(b"\0\0", rare)) == (rare[0] == 7)
    assert {f for _, f in found} == {True, False}


def test_the_page_names_every_form_of_a_value():
    "What `said` can say of an attribute stands in the specification."
    page = (Path(__file__).parent.parent / "nbs/workshop/specification.ipynb").read_text(encoding="utf-8")
    page = page.replace('\\"', '"')
    import types
    from modelzip.workshop.facts import LIBRARIES, said

    values = math.inf, torch.float16, {"a": 1}, types.SimpleNamespace(a=1), torch.ones(2), torch.ones(99), torch.relu
    assert all(f'{{"{next(iter(said(v)))}": ' in page for v in values) and all(f"`{l}`" in page for l in LIBRARIES)


# ---- mapped -------------------------------------------------------------------------------------------------------
def test_writing_into_a_mapped_model_stays_private(tmp_path, wide):
    path = save(wide, tmp_path / "x.mz", archive=False)
    old = path.read_bytes()
    a, b = load(path, wide, mmap=True), load(path, wide, mmap=True)
    with torch.no_grad():
        for t in [*a.parameters(), *a.buffers()]:
            t.view(-1).view(torch.uint8).fill_(7)
    opt = torch.optim.SGD(b.plain.parameters(), 0.1)
    b.plain(torch.randn(2, 150)).sum().backward()
    opt.step()
    assert path.read_bytes() == old and state(load(path, wide, mmap=True)) == state(wide)
    assert not torch.equal(b.plain.weight, wide.plain.weight)


def test_mapping_is_lazy(tmp_path, wide):
    path = save(wide, tmp_path / "x.mz", archive=False)
    m = load(path, wide, mmap=True)
    with open("/proc/self/maps") as f:
        assert sum("x.mz" in line for line in f) == 1
    del m
    import gc

    gc.collect()
    with open("/proc/self/maps") as f:
        assert not any("x.mz" in line for line in f), "the map outlives its model"


def test_saving_over_what_is_mapped(tmp_path, wide):
    path = save(wide, tmp_path / "x.mz", archive=False)
    m = load(path, wide, mmap=True)
    save(m, path, archive=True)
    assert state(m) == state(wide) and state(load(path, wide)) == state(wide)
    path.unlink()
    assert state(m) == state(wide)


def test_what_cannot_be_asked(tmp_path, wide):
    path = save(wide, tmp_path / "x.mz")
    with pytest.raises(ValueError, match="is archived"):
        load(path, wide, mmap=True)
    with pytest.raises(ValueError, match="verify is False"):
        load(path, wide, verify=False)
    with pytest.raises(ValueError, match="name is 'nobody'"):
        read_tensor(path, "nobody")
    for threads in 0, -1, 2.0, True, 65:
        with pytest.raises(ValueError, match="threads is"):
            save(wide, path, threads=threads)
    with pytest.raises(TypeError, match="archive is"):
        save(wide, path, archive=1)


# ---- differences --------------------------------------------------------------------------------------------------
def test_diff(tmp_path):
    a, b = (
        Holder(x=torch.arange(4.0), y=torch.ones(2), z=torch.zeros(3)),
        Holder(x=torch.arange(4.0), y=torch.tensor([1.0, 1.5]), w=torch.zeros(1)),
    )
    d = diff(save(a, tmp_path / "a.mz", note=1), save(b, tmp_path / "b.mz", note=2))
    assert {c.name: c.what for c in d.changes} == {
        "x": "same",
        "y": "other numbers",
        "z": "only in a.mz",
        "w": "only in b.mz",
    }
    assert not d.same and d.changes[1].largest == 0.5 and abs(d.changes[1].sqnr - 10 * math.log10(2 / 0.25)) < 1e-9
    assert "note" in str(d) and "1 of 4 tensors are the same" in str(d) and "<table>" in d._repr_html_()
    q = nn.Sequential(nn.Linear(8, 8, bias=False))
    save(q, tmp_path / "a.mz")
    save(quantize_model(q, 8), tmp_path / "b.mz")
    assert [c.what for c in diff(tmp_path / "a.mz", tmp_path / "b.mz").changes] == ["other numbers"] and diff(
        tmp_path / "b.mz", tmp_path / "b.mz"
    ).same


# ---- another architecture -----------------------------------------------------------------------------------------
def test_wrong_architecture_lists_everything(tmp_path):
    path = save(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), tmp_path / "x.mz")
    refused(
        path,
        "the file lacks 0.running_mean",
        "2.weight",
        "the model has no 1.bias, 1.weight"[:18],
        "0.weight (file (4, 3), model (7,))",
        model=nn.Sequential(nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(1, 1)),
    )
    refused(save(LeNet5(), path), "fc1.weight", model=nn.Linear(1, 1))


def test_no_architecture(tmp_path):
    path = save(nn.Linear(2, 2), tmp_path / "x.mz")
    with pytest.raises(PackError, match=r"load\(path, model\)"):
        load(path)
    m = nn.Linear(2, 2)
    m.architecture = {"name": "nobody knows", "options": {}}
    with pytest.raises(PackError, match="nobody knows"):
        load(save(m, path))
    m.architecture = {"name": "LeNet5", "options": {"no": "such"}}
    with pytest.raises(PackError, match="LeNet5"):
        load(save(m, path))


def test_unknown_kinds_need_their_package(tmp_path):
    class Doubled(CompressedTensor, kind="doubled for a test"):
        def __init__(self, x):
            self.x, self.shape, self.dtype = x, x.shape, x.dtype

        nbytes, bits_per_weight = property(lambda s: s.x.nbytes), 32.0

        def parts(self):
            return {"x": self.x}

        def meta(self):
            return {}

        @classmethod
        def from_parts(cls, parts, meta):
            return cls(parts["x"])

        def dequantize(self):
            return 2 * self.x

    layer = nn.Linear(2, 3)
    m = Dequantize(copy.deepcopy(layer), Doubled(layer.weight.detach() / 2))
    path = save(m, tmp_path / "x.mz")
    assert torch.equal(load(path, layer).weight, layer.weight)
    del CompressedTensor.kinds["doubled for a test"]
    refused(path, "doubled for a test", "import the package", model=layer)


def test_failing_load_leaves_the_model(tmp_path, one, one_bytes):
    (tmp_path / "x.mz").write_bytes(one_bytes[:100] + b"?" + one_bytes[101:])
    m = Small(3)
    before = state(m)
    refused(tmp_path / "x.mz", model=m)
    assert state(m) == before


# ---- a stranger's reader ------------------------------------------------------------------------------------------
def test_readable_from_the_description_alone(tmp_path, one):
    "zipfile, json, numpy and the page in the chapter."
    m = LeNet5()
    with zipfile.ZipFile(save(m, tmp_path / "x.mz", archive=False)) as z:
        assert z.testzip() is None and z.namelist() == ["payload", "manifest.json"]
        payload, about = z.read("payload"), json.loads(z.read("manifest.json"))
    assert about["modelzip"] == 5 and len(about["kind"]) == 4 and about["architecture"]["name"] == "LeNet5"
    for name, t in m.state_dict().items():
        e = about["tensors"][name]
        assert (
            np.frombuffer(payload, e["dtype"], math.prod(e["shape"]), e["offset"]).reshape(e["shape"]) == t.numpy()
        ).all()
    save(one, tmp_path / "x.mz")
    assert (
        subprocess.run([sys.executable, "-m", "zipfile", "-t", tmp_path / "x.mz"], capture_output=True).returncode == 0
    )


def test_quantized_readable_from_the_description_alone(tmp_path):
    "Codes in planes of bits, scales by axis or group: numpy and the page."
    from modelzip.quant import quantize

    layer = nn.Conv2d(5, 7, 3)
    for how in (
        dict(bits=8, axis=0),
        dict(bits=5, axis=1),
        dict(bits=4, group=16),
        dict(bits=3),
        dict(bits=13),
        dict(levels=3),
        dict(bits=6, symmetric=False, axis=0),
        dict(codebook="nf4", group=16),
    ):
        q = quantize(layer.weight.detach(), **how)
        with zipfile.ZipFile(save(Dequantize(layer, q), tmp_path / "x.mz", archive=False)) as z:
            payload, e = z.read("payload"), json.loads(z.read("manifest.json"))["tensors"]["weight"]
        part = lambda k: np.frombuffer(
            payload, e["parts"][k]["dtype"], math.prod(e["parts"][k]["shape"]), e["parts"][k]["offset"]
        ).reshape(e["parts"][k]["shape"])
        levels, shape, axis, group = (e["meta"].get(k) for k in ("levels", "shape", "axis", "group"))

        def unpack(packed, n):
            codes, bits, shift = np.zeros(n, int), int(levels - 1).bit_length(), 0
            for w in [8] * (bits // 8) + [w for w in (4, 2, 1) if bits % 8 & w]:
                size = -(-n * w // 8)
                codes |= ((packed[:size, None] >> np.arange(0, 8, w, dtype=np.uint8)) & (2**w - 1)).reshape(-1)[
                    :n
                ].astype(int) << shift
                packed, shift = packed[size:], shift + w
            return codes

        def spread(s):
            if axis is not None:
                s = s.reshape([-1 if i == axis else 1 for i in range(len(shape))])
            if group is not None:
                s = np.repeat(s, group, 1)[:, : math.prod(shape) // len(s)].reshape(shape)
            return np.broadcast_to(s, shape)

        codes, scale = unpack(part("codes"), math.prod(shape)).reshape(shape), spread(part("scale"))
        zero = (
            levels // 2
            if "zero_point" not in e["parts"]
            else spread(unpack(part("zero_point"), part("scale").size).reshape(part("scale").shape))
        )
        x = part("codebook")[codes] * scale if "codebook" in e["parts"] else (codes - zero).astype(np.float32) * scale
        assert np.array_equal(x, q.dequantize().numpy()), how


def test_more_than_four_gigabytes(tmp_path):
    "Headers of a file with a hole, as another reader understands them, and as ours does."
    n = 5 * 2**30 + 3
    p = zips.Entry("payload", 0, 7, n, n)
    text = json.dumps(manifest(w=plain([n], dtype="uint8"))).encode()
    m = zips.Entry("manifest.json", 8, zlib.crc32(text), len(zips.deflate(text)), len(text), 64 + n)
    with open(tmp_path / "x.mz", "wb") as f:
        f.write(zips.local_header(p))
        f.seek(64 + n)
        f.write(zips.local_header(m) + zips.deflate(text))
        f.write(zips.directory([p, m], f.tell()))
    with zipfile.ZipFile(tmp_path / "x.mz") as z:
        assert [(i.filename, i.file_size) for i in z.infolist()] == [("payload", n), ("manifest.json", len(text))]
        assert z.read("manifest.json") == text
    assert inspect(tmp_path / "x.mz", entropy=False).lines[0].bytes == n


# ---- files and folders --------------------------------------------------------------------------------------------
def left(folder):
    return sorted(p.name for p in Path(folder).iterdir() if p.name.startswith("."))


def test_permissions_and_links(tmp_path):
    m, path = nn.Linear(2, 2), tmp_path / "x.mz"
    old = os.umask(0o027)
    try:
        save(m, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    save(m, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    (tmp_path / "deeper").mkdir()
    (tmp_path / "link.mz").symlink_to("deeper/real.mz")
    save(m, tmp_path / "link.mz")
    save(m, str(tmp_path / "link.mz"))
    assert (
        (tmp_path / "link.mz").is_symlink()
        and (tmp_path / "deeper/real.mz").read_bytes() == path.read_bytes()
        and state(load(tmp_path / "link.mz", m)) == state(m)
    )
    assert not left(tmp_path) and not left(tmp_path / "deeper")


def test_targets_that_are_refused(tmp_path):
    m = nn.Linear(2, 2)
    with pytest.raises(FileNotFoundError, match="folder to save into"):
        save(m, tmp_path / "no" / "x.mz")
    with pytest.raises(IsADirectoryError):
        save(m, tmp_path)
    with pytest.raises(OSError, match="regular"):
        save(m, "/dev/null")
    assert not list(tmp_path.iterdir())


def test_relative_path_and_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    m = nn.Linear(2, 2)
    assert state(load(save(m, "x.mz"), m)) == state(m)


def test_size_limit_leaves_the_old_file(tmp_path):
    path = save(nn.Linear(2, 2), tmp_path / "x.mz")
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for archive in True, False:
            with pytest.raises(OSError, match="x.mz") as e:
                save(nn.Linear(300, 300), path, archive)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in str(e.value) and path.read_bytes() == old and os.listdir(tmp_path) == ["x.mz"]


def test_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(nn.Linear(2, 2), tmp_path / "x.mz")
    old = path.read_bytes()
    for module, name in (pack, "write_payload"), (writing, "stream_parts"), (zips, "directory"), (zips, "deflate"):
        with monkeypatch.context() as patch:

            def fail(*a, **k):
                raise KeyboardInterrupt

            patch.setattr(module, name, fail)
            with pytest.raises(KeyboardInterrupt):
                save(nn.Linear(30, 30), path)
        assert path.read_bytes() == old and os.listdir(tmp_path) == ["x.mz"]


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_faults():
    "Kills at random moments, two writers, a full disk, peak memory: in a process of their own (see faults_pack.py)."
    script = Path(__file__).with_name("faults_pack.py")
    r = subprocess.run(
        [sys.executable, script, str(examples(10))],
        capture_output=True,
        text=True,
        timeout=900,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert r.returncode == 0, r.stdout + r.stderr


# ---- layers that differ from what the builder makes ----------------------------------------------------------------
class Parts(nn.Module):
    "One of every class in the table of layers, and a module with attributes and a tensor of its own."

    def __init__(self, n=8):
        super().__init__()
        self.heads, self.scale, self.name = n, 0.5, "parts"
        self.token = nn.Parameter(torch.zeros(1, n))
        self.linear, self.norm, self.group = nn.Linear(n, n), nn.LayerNorm(n), nn.GroupNorm(2, n)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(n, n, 3), nn.Conv2d(n, n, 3, padding=1), nn.Conv3d(n, n, 1)
        self.up1, self.up2, self.up3 = (
            nn.ConvTranspose1d(n, n, 2, 2),
            nn.ConvTranspose2d(n, n, 3),
            nn.ConvTranspose3d(n, n, 1),
        )
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(n), nn.BatchNorm2d(n), nn.BatchNorm3d(n)
        self.in1, self.in2, self.in3 = nn.InstanceNorm1d(n), nn.InstanceNorm2d(n, affine=True), nn.InstanceNorm3d(n)
        self.embed, self.prelu, self.lstm, self.gru = (
            nn.Embedding(n, n),
            nn.PReLU(n),
            nn.LSTM(n, n),
            nn.GRU(n, n, bidirectional=True),
        )
        self.attention, self.same, self.body = (
            nn.MultiheadAttention(n, 2),
            nn.Identity(),
            nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n)),
        )


register_model("parts of test_pack", Parts)
MADE = {"name": "parts of test_pack", "options": {}}


def unreadable(path, *words):
    with pytest.raises(PackError) as e:
        load(path)
    assert all(w in str(e.value) for w in (str(path), *words))


def said(path):
    with zipfile.ZipFile(path) as z:
        return json.loads(z.read("manifest.json"))


def of_modules(model):
    return [(n, type(m)) for n, m in model.named_modules()], kinds.kinds_of(model)


def test_layers_are_not_mentioned_when_nothing_differs(tmp_path):
    for model in Parts(), quantize_model(Parts(), 4), LeNet5().half():
        assert said(save(model, tmp_path / "x.mz")).keys() == {"modelzip", "architecture", "kind", "tensors"}
        assert state(load(tmp_path / "x.mz")) == state(model)


@pytest.mark.parametrize("bits", [None, 8])
def test_every_class_of_layer_comes_back_smaller(tmp_path, bits):
    "…also when it is compressed, and without a model being passed."
    model = Parts(6)
    model.architecture = MADE
    model.conv2, model.linear = (
        nn.Conv2d(6, 4, (3, 1), stride=2, groups=2, bias=False, padding_mode="circular"),
        nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6)),
    )
    model.lstm, model.bn2, model.same = (
        nn.LSTM(6, 3, 2, batch_first=True, proj_size=2),
        nn.Identity(),
        nn.Embedding(5, 3, padding_idx=1),
    )
    if bits:
        model = quantize_model(model, bits)
    rng = torch.get_rng_state()
    back = load(save(model.eval(), tmp_path / "x.mz"))
    assert torch.equal(rng, torch.get_rng_state())
    assert state(back) == state(model) and of_modules(back) == of_modules(model)
    assert said(tmp_path / "x.mz")["modelzip"] == 5 and not any(m.training for m in back.modules())
    assert state(load(tmp_path / "x.mz", model)) == state(model)


def test_what_cannot_be_said_needs_the_model(tmp_path):
    model = Parts()
    model.linear = Holder(w=torch.zeros(3))
    save(model, tmp_path / "x.mz")
    unreadable(
        tmp_path / "x.mz",
        "the layer linear was saved as Holder",
        "here it is Linear(in_features=8, out_features=8)",
        "load(path, model)",
    )
    assert state(load(tmp_path / "x.mz", model)) == state(model)


def test_a_builder_that_is_gone_or_broken(tmp_path):
    model = Parts(6)
    for model.architecture in {"name": "nobody", "options": {}}, {"name": MADE["name"], "options": {"n": "many"}}:
        assert list(said(save(model, tmp_path / "x.mz"))["layers"]) == [n for n, _ in kinds.walk(model)]
        unreadable(tmp_path / "x.mz", "load(path, model)")
        assert state(load(tmp_path / "x.mz", model)) == state(load(tmp_path / "x.mz", Parts())) == state(model)


HOSTILE = [
    {"linear": {"class": "Linear", "in_features": n, "out_features": m}}
    for n, m in [
        (2**50, 8),
        (2**39, 2**39),
        (-1, 8),
        ("8", 8),
        (8.0, 8),
        ([8] * 9, 8),
        ([[8]], 8),
        (None, 8),
        (True, []),
    ]
] + [
    {"lstm": {"class": "LSTM", "input_size": 8, "hidden_size": 8, "num_layers": 2**39}},
    {"lstm": {"class": "LSTM", "input_size": 8, "hidden_size": 8, "num_layers": "x"}},
    {"linear": {"class": "os.system"}},
    {"linear": {"class": "Linear", "device": "cpu"}},
    {"linear": {"class": "Module"}},
    {"linear": {}},
    {"linear": 3},
    [],
    {},
    {"linear": {"class": ["Linear"]}},
    {"nowhere": {"class": "Identity"}},
    {"linear.x": {"class": "Identity"}},
    {"body.forward": {"class": "Sequential"}},
    {"body.a.b": {"class": "Identity"}},
    {"": {"class": "Identity"}},
    {".": {"class": "Identity"}},
    {"": {"attributes": {"forward": "x"}}},
    {"": {"attributes": {"heads": "x"}}},
    {"": {"attributes": {"heads": True}}},
    {"": {"attributes": {"_modules": 3}}},
    {"": {"attributes": {"training": True}}},
    {"": {"attributes": []}},
    {"": {"shapes": {"token": [2**40, 2**40]}}},
    {"": {"shapes": {"token": [-1, 8]}}},
    {"": {"shapes": {"token": 3}}},
    {"": {"shapes": {"token": [1]}}},
    {"": {"shapes": {"linear": [1]}}},
    {"": {"shapes": {"token": [2**39, 8]}}},
    {"": {"attributes": {}, "class": "Identity"}},
    {"conv2": {"class": "Conv2d", "in_channels": 8, "out_channels": 8, "kernel_size": [2**39] * 8}},
    {"conv2": {"class": "Conv2d", "in_channels": 8, "out_channels": 8, "kernel_size": 3, "groups": 0}},
    {"embed": {"class": "Embedding", "num_embeddings": 8, "embedding_dim": 2**39}},
    {"norm": {"class": "LayerNorm", "normalized_shape": [2**39] * 8}},
    {"same": {"class": "RemainingLayerNorm", "channels": "x", "total": []}},
    {"attention": {"class": "MultiheadAttention", "embed_dim": 8, "num_heads": 3}},
    {"gru": {"class": "GRU", "input_size": 8, "hidden_size": 0}},
]


@pytest.mark.parametrize("layers", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_layers(tmp_path, layers):
    whole = save(Parts(), tmp_path / "good.mz", archive=False)
    with zipfile.ZipFile(whole) as z:
        m, payload = json.loads(z.read("manifest.json")), z.read("payload")
    tracemalloc.start()
    unreadable(archive(tmp_path / "x.mz", m | {"modelzip": 3, "layers": layers}, payload))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_layers_belong_to_version_3_and_to_an_architecture(tmp_path):
    layers = {"same": {"class": "Identity"}}
    with zipfile.ZipFile(save(Parts(), tmp_path / "good.mz", archive=False)) as z:
        m, payload = json.loads(z.read("manifest.json")), z.read("payload")
    del m["kind"]
    load(archive(tmp_path / "x.mz", m | {"modelzip": 3, "layers": layers}, payload))
    unreadable(archive(tmp_path / "x.mz", m | {"modelzip": 2, "layers": layers}, payload), "layers")
    unreadable(
        archive(tmp_path / "x.mz", m | {"modelzip": 3, "layers": layers, "architecture": None}, payload), "layers"
    )
    unreadable(archive(tmp_path / "x.mz", m | {"modelzip": 4, "kind": "abcd"}, payload), "the model in an unknown form")


# ---- what the maps of the workshop promise ------------------------------------------------------------------------
class Scaling(nn.Module):
    "A layer of the library, as a later chapter might make one."

    __module__ = "modelzip.example"

    def __init__(self, channels: int, eps: float = 0.0):
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * (self.weight + self.eps)


def test_a_registered_layer_goes_through_a_file(tmp_path, monkeypatch):
    from modelzip.workshop import layer_table

    for table in "LAYERS", "OWN":
        monkeypatch.setattr(layer_table, table, dict(getattr(layer_table, table)))
    with pytest.raises(ValueError, match="Scaling: HOMES_OF_LAYERS .* does not say that example makes it"):
        layer_table.register_layer("channels eps")(Scaling)
    monkeypatch.setitem(layer_table.HOMES_OF_LAYERS, "Scaling", "example")
    layer_table.register_layer("channels eps")(Scaling)
    model = nn.Sequential(nn.Linear(3, 4), Scaling(4, eps=2.0))
    model[1].weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    path = save(model, tmp_path / "x.mz")
    with zipfile.ZipFile(path) as z:
        assert json.loads(z.read("manifest.json"))["layers"]["1"] == {"class": "Scaling", "channels": 4, "eps": 2.0}
    x, other = torch.ones(1, 3), nn.Sequential(nn.Linear(3, 4), Scaling(4, eps=1.0))
    back = load(path, other)  # which has another eps: the file's is made
    assert back[1].eps == 2.0 and torch.equal(back(x), model(x))
    with pytest.raises(ValueError, match="cannot be a class that files name"):
        layer_table.register_layer("channels")(Scaling)
    with pytest.raises(ValueError, match="what power may be"):
        layer_table.register_layer("channels power")(type("Raising", (Scaling,), {"__module__": "modelzip.example"}))
    monkeypatch.setattr(layer_table, "LAYERS", {k: v for k, v in layer_table.LAYERS.items() if k != "Scaling"})
    with pytest.raises(PackError, match="layers"):
        load(path, model)


def test_a_file_finds_a_registered_layer_whose_module_nobody_imported(tmp_path, monkeypatch):
    import modelzip
    from modelzip.workshop import layer_table

    for table in "LAYERS", "OWN":
        monkeypatch.setattr(layer_table, table, dict(getattr(layer_table, table)))
    monkeypatch.setitem(layer_table.HOMES_OF_LAYERS, "Scaling", "example")
    layer_table.register_layer("channels eps")(Scaling)
    path = save(nn.Sequential(nn.Linear(3, 4), Scaling(4, eps=2.0)), tmp_path / "x.mz")
    del layer_table.LAYERS["Scaling"], layer_table.OWN["Scaling"]
    (tmp_path / "example.py").write_text(
        f"from {__name__} import Scaling\nfrom modelzip.workshop.layer_table import register_layer\n"
        "register_layer('channels eps')(Scaling)\n"
    )
    monkeypatch.setattr(modelzip, "__path__", [*modelzip.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "modelzip.example", raising=False)
    try:
        assert load(path, nn.Sequential(nn.Linear(3, 4), Scaling(4, eps=1.0)))[1].eps == 2.0
    finally:
        sys.modules.pop("modelzip.example", None)


def test_a_registered_kind_goes_through_a_file(tmp_path, request):
    from modelzip.quant import CompressedTensor, Dequantize

    request.addfinalizer(lambda: CompressedTensor.kinds.pop("halved"))

    class Halved(CompressedTensor, kind="halved"):
        "Numbers as float16, as a later chapter might keep them."

        def __init__(self, kept, dtype):
            self.kept, self.dtype, self.shape = kept, dtype, kept.shape

        def dequantize(self):
            return self.kept.to(self.dtype)

        def parts(self):
            return {"kept": self.kept}

        def meta(self):
            return {}

        @classmethod
        def from_parts(cls, parts, meta):
            return cls(parts["kept"], torch.float32)

    layer = nn.Linear(3, 4)
    model = nn.Sequential(Dequantize(layer, Halved(layer.weight.detach().half(), torch.float32)))
    path = save(model, tmp_path / "x.mz")
    back, x = load(path, nn.Sequential(nn.Linear(3, 4))), torch.ones(1, 3)
    assert type(back[0].q) is Halved and torch.equal(back(x), model(x))


def test_what_inspect_and_diff_gave_is_unpickled_from_its_former_place():
    for name in "Line", "Difference":
        kind = pickle.loads(b"cmodelzip.pack\n" + name.encode() + b"\n.")
        assert kind.__name__ == name and kind.__module__ == "modelzip.workshop.inspecting"
