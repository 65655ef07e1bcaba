"""The .mz format from outside: what comes back, and what happens to files that are damaged, forged or interrupted."""
import copy, io, json, math, os, pickle, random, resource, stat, struct, subprocess, sys, tracemalloc, zipfile, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from modelzip import pack
from modelzip.pack import PackError, inspect, load, save
from modelzip.data import LeNet5, register_model
from modelzip.quant import CompressedTensor, Dequantize, quantize_layer, quantize_model

torch.set_num_threads(1)
DTYPES = list(pack.DTYPES.values())
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")


# ---- helpers ------------------------------------------------------------------------------------------------------
def raw(t): return bytes(pack.as_bytes(t))

def state(model):
    "Everything a model holds, bit by bit: name -> what it is and its bytes."
    out = {}
    for i in pack.items(model):
        if isinstance(i.value, torch.Tensor): out[i.name] = (i.value.dtype, tuple(i.value.shape), raw(i.value))
        else: out[i.name] = (type(i.layer), type(i.value), json.dumps(i.value.meta(), sort_keys=True), {k: (t.dtype, tuple(t.shape), raw(t)) for k, t in i.value.parts().items()})
    return out

class Holder(nn.Module):
    "A module with the given tensors as buffers."
    def __init__(self, **tensors):
        super().__init__()
        for k, t in tensors.items(): self.register_buffer(k, t)

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
        self.register_buffer("only_code", torch.arange(3.), persistent=False)

def small(seed=0):
    "…with one compressed layer."
    m = Small(seed)
    m.body[2][0] = quantize_layer(m.body[2][0], bits=4)
    return m.eval()

@pytest.fixture(scope="module")
def one(): return small()

@pytest.fixture(scope="module")
def one_bytes(one, tmp_path_factory): return save(one, tmp_path_factory.mktemp("one")/"one.mz").read_bytes()

def exact_or_refused(path, data, model, want):
    "Load damaged data: True if the exact model came back, False for a PackError; everything else fails the test."
    Path(path).write_bytes(data)
    try: got = load(path, model)
    except PackError as e:
        assert str(e).startswith(str(path)) and len(str(e)) > len(str(path)) + 10
        return False
    assert state(got) == want, "another model was loaded"
    return True

def archive(path, manifest, payload=b"", text=None, extra=()):
    "A well-formed archive with whatever manifest: only its content can be wrong."
    text = json.dumps(manifest).encode() if text is None else text
    entries, out = [], b""
    for name, method, data in [("payload", 0, payload), ("manifest.json", 8, text), *extra]:
        packed = pack.deflate(data) if method == 8 else data
        e = pack.Entry(name, method, zlib.crc32(data), len(packed), len(data), len(out))
        entries.append(e); out += pack.local_header(e) + packed
    Path(path).write_bytes(out + pack.directory(entries, len(out)))
    return path

def plain(shape=(2,), offset=0, dtype="float32"): return {"dtype": dtype, "shape": list(shape), "offset": offset}
def manifest(**tensors): return {"modelzip": 1, "architecture": None, "tensors": tensors}
def refused(path, *words, model=None):
    with pytest.raises(PackError) as e: load(path, model or Holder(w=torch.zeros(2)))
    assert str(path) in str(e.value)
    for w in words: assert w in str(e.value)


# ---- what comes back ----------------------------------------------------------------------------------------------
@st.composite
def tensors(draw):
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=4))
    n = math.prod(shape)*dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8).copy()
    t = torch.from_numpy(data)
    if dtype == torch.bool: return (t & 1).bool().reshape(shape)
    return (t.view(dtype) if n else torch.empty(0, dtype=dtype)).reshape(shape)

@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda k: "." not in k and not hasattr(nn.Module(), k)), tensors(), max_size=5))
def test_any_tensor_under_any_name(tmp_path, named):
    "Random bits (NaN with payload, signed zeros, subnormals), all types, empty and scalar shapes, any Unicode name."
    m = Holder(**named)
    path = save(m, tmp_path/"x.mz")
    got = load(path, Holder(**{k: torch.zeros_like(t) for k, t in named.items()}))
    assert state(got) == state(m)
    assert list(got.state_dict()) == list(m.state_dict())
    str(inspect(path)); inspect(path)._repr_html_()

def test_lone_surrogates_and_control_characters_in_names(tmp_path):
    m = nn.ModuleDict({"\ud800": nn.Linear(1, 1), "a\nb\x1b[31m<script>": nn.Linear(1, 1)})
    path = save(m, tmp_path/"x.mz")
    assert state(load(path, m)) == state(m)
    assert "\x1b" not in str(inspect(path)) and "<script>" not in inspect(path)._repr_html_()

def test_strided_expanded_conjugated(tmp_path):
    z = torch.randn(3, 4, dtype=torch.complex64)
    m = Holder(t=torch.randn(3, 4).T, e=torch.tensor([1., 2.])[:, None].expand(2, 3), s=torch.arange(20)[::3], c=z.conj(), i=z.conj().imag, p=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    got = load(save(m, tmp_path/"x.mz"), m)
    for k, t in m.state_dict().items(): assert torch.equal(got.state_dict()[k], t) and got.state_dict()[k].is_contiguous()

def test_small_model_of_everything(tmp_path, one):
    path = save(one, tmp_path/"x.mz")
    for given in one, Small(1), small(2):
        before = state(given)
        got = load(path, given)
        assert state(got) == state(one) and state(given) == before
        assert got.decode.weight is got.embed.weight
        assert type(got.body[2][0]) is type(one.body[2][0]) and not got.training
        assert torch.equal(got.only_code, given.only_code) and got.only_code is not given.only_code
        assert got.body[1].num_batches_tracked.dtype == torch.int64

def test_same_bytes_again(tmp_path, one):
    path = save(one, tmp_path/"x.mz")
    again = save(load(path, Small(5)), tmp_path/"y.mz")
    assert path.read_bytes() == again.read_bytes()
    assert save(copy.deepcopy(one), path).read_bytes() == again.read_bytes()

def test_registered_architecture_and_untouched_random_state(tmp_path):
    for m in LeNet5(), quantize_model(LeNet5(), bits=8), quantize_model(LeNet5(), bits=4, group=64):
        path = save(m, tmp_path/"x.mz")
        before = torch.random.get_rng_state()
        got = load(path)
        assert torch.equal(before, torch.random.get_rng_state())
        assert type(got) is LeNet5 and state(got) == state(m) and got.architecture == {"name": "LeNet5", "options": {}}

def test_overhead_and_ratios(tmp_path):
    m = LeNet5()
    size = {n: os.path.getsize(save(q, tmp_path/"x.mz")) for n, q in {"fp32": m, 8: quantize_model(m, bits=8), 4: quantize_model(m, bits=4, group=64)}.items()}
    assert size["fp32"] - 4*431_080 <= 512
    assert size[8] <= .26*size["fp32"] and size[4] <= .14*size["fp32"]

def test_large_tensors_are_aligned(tmp_path):
    m = nn.Sequential(nn.Linear(3, 7), nn.Linear(200, 301), Holder(x=torch.zeros(3, dtype=torch.uint8), d=torch.zeros(3).double()))
    table = pack.table_of(m)[0]
    for e in table.values():
        assert e["offset"] % DTYPES[0].itemsize == 0 or e["dtype"] != "float64"
        assert e["offset"] % (64 if math.prod(e["shape"])*4 >= pack.LARGE else 1) == 0
    save(m, tmp_path/"x.mz")
    assert (tmp_path/"x.mz").read_bytes()[pack.ALIGN:].startswith(raw(m[1].weight)[:64])

def test_info_and_inspect(tmp_path, one):
    path = save(one, tmp_path/"x.mz", recipe=["prune", {"bits": 4}], note="höher")
    c = inspect(path)
    assert c.info == {"recipe": ["prune", {"bits": 4}], "note": "höher"} and c.bytes == os.path.getsize(path)
    assert sum(l.bytes for l in c.lines) + c.rest == c.bytes
    assert "decode.weight" in str(c) and "= embed.weight" in str(c) and "quantized" in str(c)
    import matplotlib; matplotlib.use("agg")
    assert c.plot().get_xlabel() == "kilobytes"

def test_recurrent_and_attention_layers(tmp_path):
    for m, x in [(nn.LSTM(3, 4, num_layers=2, batch_first=True), torch.randn(2, 5, 3)), (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8))]:
        m.eval()
        got = load(save(m, tmp_path/"x.mz"), m)
        first = lambda y: y[0] if isinstance(y, tuple) else y
        assert torch.equal(first(got(x)), first(m(x))) and state(got) == state(m)

def test_parametrized_and_nested(tmp_path):
    m = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    m = nn.Sequential(nn.ModuleDict({"a b": nn.ModuleList([m, nn.ParameterList([torch.ones(2)])])}))
    assert state(load(save(m, tmp_path/"x.mz"), m)) == state(m)

def test_root_may_be_a_compressed_layer(tmp_path):
    layer = nn.Linear(8, 4)
    q = quantize_layer(layer, bits=8)
    got = load(save(q, tmp_path/"x.mz"), layer)
    assert type(got) is type(q) and state(got) == state(q)
    x = torch.randn(2, 8)
    assert torch.equal(got(x), q(x))

def test_empty_model(tmp_path): assert not state(load(save(nn.ReLU(), tmp_path/"x.mz"), nn.ReLU()))

def test_requires_grad_is_the_models(tmp_path):
    m = nn.Linear(2, 2)
    path = save(m, tmp_path/"x.mz")
    assert load(path, m).weight.requires_grad
    m.weight.requires_grad_(False)
    got = load(path, m)
    assert not got.weight.requires_grad and got.bias.requires_grad and not got.training

def test_types_are_the_files(tmp_path):
    m = nn.Linear(2, 2)
    assert load(save(copy.deepcopy(m).half(), tmp_path/"x.mz"), m).weight.dtype == torch.float16

def test_a_model_on_the_meta_device_is_enough(tmp_path):
    m = nn.Linear(2, 3)
    with torch.device("meta"): skeleton = nn.Linear(2, 3)
    assert state(load(save(m, tmp_path/"x.mz"), skeleton)) == state(m)


# ---- ties ---------------------------------------------------------------------------------------------------------
class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.a, self.b = nn.Linear(300, 300), nn.Linear(300, 300)
        if tie: self.b.weight = self.a.weight

def test_tied_parameters(tmp_path):
    path = save(Tied(), tmp_path/"x.mz")
    assert os.path.getsize(path) < 1.1*4*300*300
    for given in Tied(), Tied(tie=False):
        got = load(path, given)
        assert got.a.weight is got.b.weight and got.a.bias is not got.b.bias
    free = Tied(tie=False)
    got = load(save(free, path), Tied())
    assert state(got) == state(free) and got.a.weight is not got.b.weight

def test_tied_compressed_layers(tmp_path):
    m = quantize_model(Tied(), bits=8)
    m.b.packed = m.a.packed
    path = save(m, tmp_path/"x.mz")
    assert os.path.getsize(path) < 1.2*300*300
    for given in m, Tied(), Tied(tie=False):
        got = load(path, given)
        assert got.a.packed is got.b.packed and got.a is not got.b and state(got) == state(m)

def test_one_layer_twice(tmp_path):
    layer = nn.Linear(3, 3)
    for m in nn.Sequential(layer, nn.ReLU(), layer), quantize_model(nn.Sequential(layer, nn.ReLU(), layer), bits=8):
        got = load(save(m, tmp_path/"x.mz"), m)
        assert got[0] is got[2] and state(got) == state(m)

def test_one_layer_cannot_hold_two_tensors(tmp_path):
    layer = nn.Linear(3, 3)
    path = save(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), tmp_path/"x.mz")
    refused(path, "0.weight", "2.weight", model=nn.Sequential(layer, nn.ReLU(), layer))

def test_parameter_and_buffer_that_share_memory(tmp_path):
    m = nn.Linear(2, 2)
    m.register_buffer("view", m.weight.data)
    got = load(save(m, tmp_path/"x.mz"), m)
    assert isinstance(got.weight, nn.Parameter) and not isinstance(got.view, nn.Parameter) and got.view.data_ptr() == got.weight.data_ptr()

def test_overlapping_views_come_back_apart(tmp_path):
    x = torch.arange(6.)
    m = Holder(a=x[:4], b=x[2:], e=torch.empty(0), f=torch.empty(0))
    got = load(save(m, tmp_path/"x.mz"), m)
    assert state(got) == state(m) and got.a.untyped_storage().data_ptr() != got.b.untyped_storage().data_ptr()


# ---- what cannot be saved -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("model, error, words", [
    (nn.LazyLinear(3), ValueError, "run the model once"),
    (Holder(w=torch.eye(2).to_sparse()), TypeError, "sparse"),
    (nn.Linear(2, 2, device="meta"), ValueError, "meta"),
    ({"w": torch.zeros(2)}, TypeError, "dict"),
])
def test_unstorable(tmp_path, model, error, words):
    with pytest.raises(error, match=words): save(model, tmp_path/"x.mz")
    assert not os.listdir(tmp_path)

def test_extra_state(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self): return {"x": 1}
    with pytest.raises(TypeError, match="extra state"): save(nn.Sequential(Odd(1, 1)), tmp_path/"x.mz")

@pytest.mark.parametrize("info", [{"x": math.nan}, {"x": math.inf}, {"x": object()}, {"x": {1, 2}}, {"x": np.float32(1)}])
def test_info_must_be_json(tmp_path, info):
    with pytest.raises((TypeError, ValueError), match="besides model and path"): save(nn.ReLU(), tmp_path/"x.mz", **info)
    deep = []
    for _ in range(100_000): deep = [deep]
    with pytest.raises(ValueError): save(nn.ReLU(), tmp_path/"x.mz", x=deep)

def test_odd_architecture_attribute_is_not_ours(tmp_path):
    m = nn.Linear(1, 1); m.architecture = "resnet"
    assert inspect(save(m, tmp_path/"x.mz")).architecture is None


# ---- damage -------------------------------------------------------------------------------------------------------
def test_truncated_at_every_length(tmp_path, one, one_bytes):
    want = state(one)
    for n in range(len(one_bytes)): assert not exact_or_refused(tmp_path/"x.mz", one_bytes[:n], one, want), n

def test_every_byte_flipped(tmp_path, one, one_bytes):
    "All bits of each byte, one bit of each byte."
    want, rng, loaded = state(one), random.Random(0), []
    for i in range(len(one_bytes)):
        for mask in 0xFF, 1 << rng.randrange(8):
            data = bytearray(one_bytes); data[i] ^= mask
            if exact_or_refused(tmp_path/"x.mz", data, one, want): loaded.append(i)
    assert len(loaded) <= 1, loaded      # the unused bits at the end of the deflate stream

def test_appended_and_prepended_bytes(tmp_path, one, one_bytes):
    want = state(one)
    for data in one_bytes + b"\0", b"\0" + one_bytes, one_bytes*2, one_bytes[:-2] + b"\1\0x": assert not exact_or_refused(tmp_path/"x.mz", data, one, want)

def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        n = min(rng.choice([1, 4, 16, 100]), len(data) - i)
        kind = rng.randrange(7)
        if kind == 0: data[i:i + n] = rng.randbytes(n)
        elif kind == 1: del data[i:i + n]
        elif kind == 2: data[i:i] = rng.randbytes(n)
        elif kind == 3: data[i:i + n] = bytes(n)
        elif kind == 4: data[i:i + n] = data[j:j + n]
        elif kind == 5: data[i:i] = data[j:j + n]
        elif kind == 6 and i + 4 <= len(data): struct.pack_into("<I", data, i, rng.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, len(data)]))
        if not data: break
    return bytes(data)

def test_random_mutations(tmp_path, one, one_bytes):
    want, rng = state(one), random.Random(1)
    loaded = sum(exact_or_refused(tmp_path/"x.mz", mutate(one_bytes, rng), one, want) for _ in range(600))
    assert loaded < 100      # (mutations that change nothing)

JUNK = [-1, 0, 1, 2, 3, 7, 64, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, True, None, "", "float32", "int4", "w", [], {}, [0], [-1], [2**40, 2**40], {"w": 1}, "\0", "quantized", "Dequantize", "os.system"]

def places(x, at=()):
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from places(v, (*at, k))

def test_forged_manifests(tmp_path, one, one_bytes):
    "Checksums are right, the manifest is nonsense: a PackError or some model, never another exception."
    with zipfile.ZipFile(io.BytesIO(one_bytes)) as z: good, payload = json.loads(z.read("manifest.json")), z.read("payload")
    every, rng, path, same = list(places(good)), random.Random(2), tmp_path/"x.mz", 0
    for n in range(900):
        m = copy.deepcopy(good)
        at = every[n % len(every)] if n < len(every) else rng.choice(every)
        if not at: m = rng.choice(JUNK)
        else:
            owner = m
            for k in at[:-1]: owner = owner[k]
            how = rng.randrange(4)
            if how == 0: del owner[at[-1]]
            elif how == 1 and isinstance(owner, dict): owner[rng.choice(["x", "same", "layer", "kind", "offset"])] = rng.choice(JUNK)
            else: owner[at[-1]] = rng.choice(JUNK)
        archive(path, m, payload)
        try: inspect(path); inspect(path)._repr_html_()
        except PackError: pass
        try: load(path, one); same += 1
        except PackError as e: assert str(path) in str(e)
    assert same < 120

def test_memory_stays_small_whatever_a_file_claims(tmp_path):
    bombs = [archive(tmp_path/"deflate.mz", None, text=bytes(2**25)), archive(tmp_path/"values.mz", None, text=b"[" + b"[],"*2**21 + b"0]"),
             archive(tmp_path/"deep.mz", None, text=b'{"modelzip":' + b"["*10**6), archive(tmp_path/"shape.mz", manifest(w=plain([2**50])), bytes(8)),
             archive(tmp_path/"many.mz", manifest(w=plain([2**20]*3)), bytes(8)), archive(tmp_path/"digits.mz", None, text=b"9"*10**6)]
    lying = bytearray((tmp_path/"shape.mz").read_bytes())
    at = lying.rindex(b"PK\1\2manifest.json"[:4]); struct.pack_into("<I", lying, at + 24, 0xFFFFFFF0); (tmp_path/"size.mz").write_bytes(lying)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for b in [*bombs, tmp_path/"size.mz"]:
        with pytest.raises(PackError): load(b, Holder(w=torch.zeros(2)))
        with pytest.raises(PackError): inspect(b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25, peak
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16      # KiB

@pytest.mark.parametrize("table, words", [
    (dict(w=plain(), v=plain()), "overlap"), (dict(w=plain(offset=4)), "need"), (dict(w=plain([1])), "need"), (dict(w=plain([4])), "need"),
    (dict(w=plain([-2])), "shape"), (dict(w=plain([2**62, 2**62])), "shape"), (dict(w=plain([0, 2**62, 2**62])), "shape"), (dict(w=plain([2.0])), "shape"), (dict(w=plain([True, True])), "shape"),
    (dict(w=plain(offset=1)), "offset"), (dict(w=plain(offset=-8)), "offset"), (dict(w=plain(offset=2**80)), "offset"),
    (dict(w=plain(dtype="object")), "type"), (dict(w=plain(dtype=["float32"])), "type"), (dict(w={"same": "w"}), "does not come before"), (dict(w={"same": "v"}, v=plain()), "does not come before"),
    (dict(w=plain() | {"coder": "zstd"}), "form"), (dict(w=plain() | {"layer": "Dequantize"}), "form"), (dict(w=[]), "form"),
    (dict(w={"dtype": "float32", "shape": [2], "kind": "magic", "meta": {}, "parts": {"x": plain()}, "layer": "Dequantize"}), "magic"),
    (dict(w={"dtype": "float32", "shape": [2], "kind": "quantized", "meta": {}, "parts": {"x": plain()}, "layer": "Dequantize"}), "fit together"),
    (dict(w={"dtype": "float32", "shape": [2], "kind": "quantized", "meta": {}, "parts": {"x": plain()}, "layer": "subprocess.Popen"}), ""),
])
def test_tables_that_lie(tmp_path, table, words): refused(archive(tmp_path/"x.mz", manifest(**table), bytes(8)), words)

def test_bool_bytes(tmp_path):
    refused(archive(tmp_path/"x.mz", manifest(w=plain([2], dtype="bool")), b"\1\2"), "bool")
    assert load(archive(tmp_path/"x.mz", manifest(w=plain([2], dtype="bool")), b"\1\0"), Holder(w=torch.zeros(2))).w.tolist() == [True, False]

def test_gaps_must_be_zero(tmp_path): refused(archive(tmp_path/"x.mz", manifest(w=plain(offset=4)), b"\0\1\0\0" + bytes(8)), "zero")

@pytest.mark.parametrize("text, words", [(b"", "JSON"), (b"null", "version"), (b"{}", "version"), (b'{"modelzip":NaN}', "JSON"), (b'{"modelzip":1e999}', "JSON"), (b'{"modelzip":1,"modelzip":1}', "twice"),
    (b"\xff\xfe", "JSON"), (b"["*50_000, "deep"), (b"1"*10_000, "JSON"), (b'{"modelzip":1.0}', "version"), (b'{"modelzip":true}', "version"), (b'{"modelzip":0}', "version"), (b'{"modelzip":1,"tensors":[]}', "fields"),
    (b'{"modelzip":1,"tensors":{},"later":1}', "fields"), (b'{"modelzip":1,"tensors":{},"architecture":{"name":1,"options":{}}}', "architecture")])
def test_manifests_that_are_wrong(tmp_path, text, words): refused(archive(tmp_path/"x.mz", None, text=text), words)

def test_newer_version(tmp_path):
    "…even if nearly everything about it is unknown."
    words = "newer modelzip", "version 2"
    refused(archive(tmp_path/"x.mz", {"modelzip": 2}), *words)
    refused(archive(tmp_path/"x.mz", {"modelzip": 2, "tensors": []}, extra=[("index", 0, b"xyz"), ("codes", 8, b"abc")]), *words)

def test_pickle_inside(tmp_path):
    class Bad:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"executed"),)
    for extra in [("data.pkl", 0, pickle.dumps(Bad()))], [("archive/data.pkl", 8, pickle.dumps(Bad()))]:
        refused(archive(tmp_path/"x.mz", manifest(w=plain()), bytes(8), extra=extra), "do not belong")
    (tmp_path/"x.mz").write_bytes(pickle.dumps(Bad())); refused(tmp_path/"x.mz")
    torch.save({"w": Bad()}, tmp_path/"x.mz"); refused(tmp_path/"x.mz", "not of a model")
    archive(tmp_path/"x.mz", manifest(w=plain()), pickle.dumps(Bad())); refused(tmp_path/"x.mz")
    assert not (tmp_path/"executed").exists()
    assert "pickle" not in Path(pack.__file__).read_text()

def test_other_files(tmp_path):
    np.savez(tmp_path/"x.npz", w=np.zeros(2)); refused(tmp_path/"x.npz", "not of a model")
    (tmp_path/"empty.mz").touch(); refused(tmp_path/"empty.mz", "empty")
    refused(tmp_path, "folder"); refused("/dev/null", "regular")
    with pytest.raises(FileNotFoundError): load(tmp_path/"nothing.mz")
    with pytest.raises(FileNotFoundError): inspect(tmp_path/"nothing.mz")
    with pytest.raises(TypeError): load(tmp_path/"empty.mz", {"w": 1})

def test_zip_archives_that_are_not_ours(tmp_path, one, one_bytes):
    "Repacked, encrypted, split, commented, doubled, overlapping: everything that the zip format allows and we do not."
    with zipfile.ZipFile(io.BytesIO(one_bytes)) as z: content = {n: z.read(n) for n in z.namelist()}
    def repack(names, method=zipfile.ZIP_DEFLATED, comment=b""):
        with zipfile.ZipFile(tmp_path/"x.mz", "w", method) as z:
            for n in names: z.writestr(n, content[n])
            z.comment = comment
        refused(tmp_path/"x.mz", model=one)
    repack(content); repack(content, zipfile.ZIP_STORED); repack(content, comment=b"hello"); repack(["manifest.json"]); repack([])
    with pytest.warns(UserWarning): repack(["payload", "payload", "manifest.json"])
    entries = pack.read_entries(io.BytesIO(one_bytes), len(one_bytes))
    p, m = entries
    body = one_bytes[:m.offset + len(pack.local_header(m)) + m.packed]
    for wrong in [p, p, m], [m, p], [m], [p, pack.Entry("manifest.json", 8, m.crc, m.packed, m.size, 0)], [p, m, m], [p, pack.Entry("manifest.json", 0, m.crc, m.packed, m.packed, m.offset)]:
        (tmp_path/"x.mz").write_bytes(body + pack.directory(wrong, len(body))); refused(tmp_path/"x.mz", model=one)


# ---- another architecture -----------------------------------------------------------------------------------------
def test_wrong_architecture_lists_everything(tmp_path):
    path = save(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), tmp_path/"x.mz")
    refused(path, "the file lacks 0.running_mean", "2.weight", "the model has no 1.bias, 1.weight"[:18], "0.weight (file (4, 3), model (7,))", model=nn.Sequential(nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(1, 1)))
    refused(save(LeNet5(), path), "fc1.weight", model=nn.Linear(1, 1))

def test_no_architecture(tmp_path):
    path = save(nn.Linear(2, 2), tmp_path/"x.mz")
    with pytest.raises(PackError, match=r"load\(path, model\)"): load(path)
    m = nn.Linear(2, 2); m.architecture = {"name": "nobody knows", "options": {}}
    with pytest.raises(PackError, match="nobody knows"): load(save(m, path))
    m.architecture = {"name": "LeNet5", "options": {"no": "such"}}
    with pytest.raises(PackError, match="LeNet5"): load(save(m, path))

def test_unknown_kinds_need_their_package(tmp_path):
    class Doubled(CompressedTensor, kind="doubled for a test"):
        def __init__(self, x): self.x, self.shape, self.dtype = x, x.shape, x.dtype
        nbytes, bits_per_weight = property(lambda s: s.x.nbytes), 32.
        def parts(self): return {"x": self.x}
        def meta(self): return {}
        @classmethod
        def from_parts(cls, parts, meta): return cls(parts["x"])
        def dequantize(self): return 2*self.x
    layer = nn.Linear(2, 3)
    m = Dequantize(copy.deepcopy(layer), Doubled(layer.weight.detach()/2))
    path = save(m, tmp_path/"x.mz")
    assert torch.equal(load(path, layer).weight, layer.weight)
    del CompressedTensor.kinds["doubled for a test"]
    refused(path, "doubled for a test", "import the package", model=layer)

def test_failing_load_leaves_the_model(tmp_path, one, one_bytes):
    (tmp_path/"x.mz").write_bytes(one_bytes[:100] + b"?" + one_bytes[101:])
    m = Small(3); before = state(m)
    refused(tmp_path/"x.mz", model=m)
    assert state(m) == before


# ---- a stranger's reader ------------------------------------------------------------------------------------------
def test_readable_from_the_description_alone(tmp_path, one):
    "zipfile, json, numpy and the page in the chapter."
    m = LeNet5()
    with zipfile.ZipFile(save(m, tmp_path/"x.mz")) as z:
        assert z.testzip() is None and z.namelist() == ["payload", "manifest.json"]
        payload, about = z.read("payload"), json.loads(z.read("manifest.json"))
    assert about["modelzip"] == 1 and about["architecture"]["name"] == "LeNet5"
    for name, t in m.state_dict().items():
        e = about["tensors"][name]
        assert (np.frombuffer(payload, e["dtype"], math.prod(e["shape"]), e["offset"]).reshape(e["shape"]) == t.numpy()).all()
    save(one, tmp_path/"x.mz")
    assert subprocess.run([sys.executable, "-m", "zipfile", "-t", tmp_path/"x.mz"], capture_output=True).returncode == 0

def test_quantized_readable_from_the_description_alone(tmp_path):
    "Codes in planes of bits, scales by axis or group: numpy and the page."
    from modelzip.quant import quantize
    layer = nn.Conv2d(5, 7, 3)
    for how in dict(bits=8, axis=0), dict(bits=5, axis=1), dict(bits=4, group=16), dict(bits=3), dict(bits=13), dict(levels=3), dict(bits=6, symmetric=False, axis=0), dict(codebook="nf4", group=16):
        q = quantize(layer.weight.detach(), **how)
        with zipfile.ZipFile(save(Dequantize(layer, q), tmp_path/"x.mz")) as z: payload, e = z.read("payload"), json.loads(z.read("manifest.json"))["tensors"]["weight"]
        part = lambda k: np.frombuffer(payload, e["parts"][k]["dtype"], math.prod(e["parts"][k]["shape"]), e["parts"][k]["offset"]).reshape(e["parts"][k]["shape"])
        levels, shape, axis, group = (e["meta"].get(k) for k in ("levels", "shape", "axis", "group"))
        def unpack(packed, n):
            codes, bits, shift = np.zeros(n, int), int(levels - 1).bit_length(), 0
            for w in [8]*(bits//8) + [w for w in (4, 2, 1) if bits % 8 & w]:
                size = -(-n*w//8)
                codes |= ((packed[:size, None] >> np.arange(0, 8, w, dtype=np.uint8)) & (2**w - 1)).reshape(-1)[:n].astype(int) << shift
                packed, shift = packed[size:], shift + w
            return codes
        def spread(s):
            if axis is not None: s = s.reshape([-1 if i == axis else 1 for i in range(len(shape))])
            if group is not None: s = np.repeat(s, group, 1)[:, :math.prod(shape)//len(s)].reshape(shape)
            return np.broadcast_to(s, shape)
        codes, scale = unpack(part("codes"), math.prod(shape)).reshape(shape), spread(part("scale"))
        zero = levels//2 if "zero_point" not in e["parts"] else spread(unpack(part("zero_point"), part("scale").size).reshape(part("scale").shape))
        x = part("codebook")[codes]*scale if "codebook" in e["parts"] else (codes - zero).astype(np.float32)*scale
        assert np.array_equal(x, q.dequantize().numpy()), how

def test_more_than_four_gigabytes(tmp_path):
    "Headers of a file with a hole, as another reader understands them, and as ours does."
    n = 5*2**30 + 3
    p = pack.Entry("payload", 0, 7, n, n)
    text = json.dumps(manifest(w=plain([n], dtype="uint8"))).encode()
    m = pack.Entry("manifest.json", 8, zlib.crc32(text), len(pack.deflate(text)), len(text), 64 + n)
    with open(tmp_path/"x.mz", "wb") as f:
        f.write(pack.local_header(p)); f.seek(64 + n); f.write(pack.local_header(m) + pack.deflate(text)); f.write(pack.directory([p, m], f.tell()))
    with zipfile.ZipFile(tmp_path/"x.mz") as z:
        assert [(i.filename, i.file_size) for i in z.infolist()] == [("payload", n), ("manifest.json", len(text))]
        assert z.read("manifest.json") == text
    assert inspect(tmp_path/"x.mz").lines[0].bytes == n


# ---- files and folders --------------------------------------------------------------------------------------------
def left(folder): return sorted(p.name for p in Path(folder).iterdir() if p.name.startswith("."))

def test_permissions_and_links(tmp_path):
    m, path = nn.Linear(2, 2), tmp_path/"x.mz"
    old = os.umask(0o027)
    try: save(m, path)
    finally: os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604); save(m, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    (tmp_path/"deeper").mkdir(); (tmp_path/"link.mz").symlink_to("deeper/real.mz")
    save(m, tmp_path/"link.mz"); save(m, str(tmp_path/"link.mz"))
    assert (tmp_path/"link.mz").is_symlink() and (tmp_path/"deeper/real.mz").read_bytes() == path.read_bytes() and state(load(tmp_path/"link.mz", m)) == state(m)
    assert not left(tmp_path) and not left(tmp_path/"deeper")

def test_targets_that_are_refused(tmp_path):
    m = nn.Linear(2, 2)
    with pytest.raises(FileNotFoundError, match="folder to save into"): save(m, tmp_path/"no"/"x.mz")
    with pytest.raises(IsADirectoryError): save(m, tmp_path)
    with pytest.raises(OSError, match="regular"): save(m, "/dev/null")
    assert not list(tmp_path.iterdir())

def test_relative_path_and_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    m = nn.Linear(2, 2)
    assert state(load(save(m, "x.mz"), m)) == state(m)

def test_size_limit_leaves_the_old_file(tmp_path):
    path = save(nn.Linear(2, 2), tmp_path/"x.mz"); old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="x.mz") as e: save(nn.Linear(300, 300), path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in str(e.value) and path.read_bytes() == old and os.listdir(tmp_path) == ["x.mz"]

def test_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(nn.Linear(2, 2), tmp_path/"x.mz"); old = path.read_bytes()
    for name in "write_payload", "directory", "deflate":
        with monkeypatch.context() as patch:
            def fail(*a): raise KeyboardInterrupt
            patch.setattr(pack, name, fail)
            with pytest.raises(KeyboardInterrupt): save(nn.Linear(3, 3), path)
        assert path.read_bytes() == old and os.listdir(tmp_path) == ["x.mz"]

def test_faults():
    "Kills at random moments, two writers, a full disk, peak memory: in a process of their own (see faults_pack.py)."
    script = Path(__file__).with_name("faults_pack.py")
    r = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])})
    assert r.returncode == 0, r.stdout + r.stderr
