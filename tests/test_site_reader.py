"""Files read by who was told of the format by its page alone: tools/site/mz.js, in Chromium, beside PyTorch; and what
the site's readers try with it."""

import base64, inspect, io, itertools, json, math, random, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from browsing import ROOT, browser_only, site, wait
from modelzip.data import LeNet5, LeNet300, accuracy, mnist5k, seeded
from modelzip.pack import load, read_tensor, save
from modelzip.prune import prune_model, sparsify_model
from modelzip.quant import Dequantize, quantize_model
from modelzip.trellis import trellis_weight
from test_streams import WRONG_PAIRS, stream_of_pairs

FILES = Path(__file__).resolve().parent / "files"
RECORD = ROOT / "bench/results/record.mz"
pytestmark = browser_only

# ---- a page with nothing but the reader ----------------------------------------------------------------------------

HELPERS = """
    window.bytesOf = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
    window.textOf = array => {
      const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength), parts = [];
      for (let i = 0; i < bytes.length; i += 8192) parts.push(String.fromCharCode(...bytes.subarray(i, i + 8192)));
      return btoa(parts.join(""));
    };
    window.tried = f => { try { return f(); } catch (e) { if (e instanceof mz.MzError) return e.message; throw e; } };"""


@pytest.fixture
def reader(browser):
    "A blank page with the reader; a function that runs JavaScript there."
    browser.get("about:blank")
    source = (ROOT / "tools/site/mz.js").read_text().replace("const mz = (", "window.mz = (", 1)
    browser.execute_script(
        f"const s = document.createElement('script'); s.text = {json.dumps(source)} + {json.dumps(HELPERS)};"
        " document.head.append(s)"
    )
    return browser.execute_script


def coded(data):
    return base64.b64encode(data).decode()


def array(text, dtype="float32"):
    return np.frombuffer(base64.b64decode(text), dtype)


ALL = """
    return arguments[0].map(text => tried(() => {
      const file = mz.read(bytesOf(text));
      return Object.fromEntries([...file.tensors.keys()].map(name => [name, tried(() => {
        const { shape, data } = file.tensor(name), kind = [Float64Array, Uint8Array].find(k => data instanceof k) ?? Float32Array;
        return [shape, textOf(kind.from(data)), kind.name.replace("Array", "").toLowerCase()];
      })]));
    }))"""


def check_equal(reader, paths):
    "The numbers of each tensor of some files, to the last bit."
    for path, found in zip(paths, reader(ALL, [coded(p.read_bytes()) for p in paths])):
        assert isinstance(found, dict), (path.name, found)
        for name, (shape, data, kind) in found.items():
            ours = read_tensor(path, name)
            ours = (ours if isinstance(ours, torch.Tensor) else ours.dequantize()).to(getattr(torch, kind))
            assert tuple(shape) == tuple(ours.shape), (path.name, name)
            theirs = array(data, kind).reshape(ours.shape)
            assert np.array_equal(theirs, ours.numpy(), equal_nan=kind != "uint8"), (path.name, name)


# ---- payloads ------------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    "Numbers of every type, and some for which each method of a stream is the best."

    def __init__(self):
        super().__init__()
        dice = torch.Generator().manual_seed(1)
        normal, whole = (
            lambda n: torch.randn(n, generator=dice),
            lambda most, n: torch.randint(0, most, (n,), generator=dice),
        )
        of_bits = lambda dtype: torch.arange(256).to(torch.uint8).view(dtype)
        floats8 = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")
        for name, x in {
            "labels": whole(10, 5000).int(),
            "ones": (torch.rand(9000, generator=dice) < 0.03).long(),
            "three": torch.tensor([-70_000, 5, 123_456])[whole(3, 4000)].int(),
            "bell": (normal(9000) * 3000).int(),
            "int16": (normal(5000) * 300).short(),
            "int64": (normal(999) * 1e12).long(),
            "int8": normal(999).char(),
            "float64": normal(300).double(),
            "float16": normal(300).half(),
            "bfloat16": normal(300).bfloat16(),
            **{
                f"{n} times {w:.0%}": (normal(9600) * w).to(getattr(torch, n))
                for n in ("bfloat16", "float32")
                for w in (0.05, 9)
            },
            "empty": torch.zeros(0, 3),
            "truth": normal(99) > 0,
            "text": torch.tensor(list(b"to be or not to be " * 400), dtype=torch.uint8),
            "zeros": torch.zeros(1_200_000, dtype=torch.uint8),
            **{n: of_bits(getattr(torch, f"float8_{n}")) for n in floats8},
        }.items():
            self.register_buffer(f"of_{name}", x)


def network(**options):
    with seeded(0):
        return quantize_model(LeNet5(channels=[3, 5], hidden=30), **options)


def sparse(how, bits):
    with seeded(0):
        small = LeNet300(hidden=[40, 12])
        pruned = prune_model(small, granularity="2:4") if how == "2:4" else prune_model(small, how, scope="layer")
        return sparsify_model(pruned, bits=bits)


def on_two_grids():
    dice = torch.Generator().manual_seed(0)
    weights = [torch.randn(20, 24, generator=dice) for _ in range(2)]
    return nn.ModuleList(
        [Dequantize(nn.Linear(24, 20), trellis_weight(w, None, 3.0, states=s)) for w, s in zip(weights, (4, 16))]
    )


MODELS = {
    "buffers": Buffers,
    **{f"{b} bits": lambda b=b: network(bits=b) for b in (1, 3, 8, 11)},
    "asymmetric": lambda: network(bits=4, group=7, symmetric=False),
    "nf4": lambda: network(bits=4, codebook="nf4", group=32),
    "half": lambda: quantize_model(LeNet5(channels=[2, 3], hidden=9).half(), 4, group=32),
    "double": lambda: quantize_model(LeNet5(channels=[2, 3], hidden=9).double(), 5),
    **{f"sparse {how}": lambda h=how, b=bits: sparse(h, b) for how, bits in (("2:4", 4), (0.3, None), (0.97, 4))},
    "trellis": on_two_grids,
}


def test_every_kind_of_payload(reader, tmp_path):
    paths = []
    for i, (name, make) in enumerate(MODELS.items()):
        model, place = make(), tmp_path / name.replace(":", "")
        ways = (
            (True, False)
            if name == "buffers"
            else ("solid", i % 2 == 0)
            if "bits" in name or name == "trellis"
            else [i % 2 == 0]
        )
        paths += [save(model, place.with_name(f"{place.name} {how}.mz"), how) for how in ways]
    check_equal(reader, paths)


def test_files_of_every_version(reader):
    check_equal(reader, [RECORD, *(FILES / f"version{v}.mz" for v in (1, 2, 3, 4, 5, "5_solid", 6))])


def test_codes_that_the_reader_says_it_does_not_know(reader):
    (found,) = reader(ALL, [coded((FILES / "version5_gguf.mz").read_bytes())])
    assert found["Q8_0"] == '"Q8_0" is of the kind "gguf coded", which this reader does not know'


def test_pairs_of_floats_have_one_form(reader):
    tried = "return arguments[0].map(text => tried(() => mz.parts.readStream(bytesOf(text), 32768).bytes.length))"
    good, *wrong = reader(tried, [coded(stream_of_pairs(*w)) for w in [(bytes(4),), *WRONG_PAIRS.values()]])
    assert good == 1 << 15 and all(isinstance(w, str) and ("stray" in w or "halves" in w) for w in wrong), wrong


def test_zstandard_frames(reader):
    "The decoder of Zstandard frames is the largest part of the reader: levels, tables, repetitions, several blocks."
    import zstandard

    rng = np.random.default_rng(3)
    text = b" ".join(rng.choice([b"the", b"quick", b"brown", b"fox", b"jumps", b"over"], 9000))
    kinds = [
        b"",
        b"a",
        bytes(3000),
        text,
        rng.normal(8, 3, 200_000).clip(0, 15).astype("u1").tobytes(),
        rng.bytes(9000),
    ]
    kinds.append(text[:500] + bytes(140_000) + text[300:900] + rng.bytes(300) + text[:999])
    frames = []
    for data, level in itertools.product(kinds, (1, 9, 19)):
        p = zstandard.ZstdCompressionParameters.from_level(
            level, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_checksum=level == 9
        )
        frames.append((zstandard.ZstdCompressor(compression_params=p).compress(data), data))
    found = reader(
        "return arguments[0].map(([text, size]) => textOf(mz.parts.unzstd(bytesOf(text), size)))",
        [(coded(f), len(d)) for f, d in frames],
    )
    assert [base64.b64decode(t) for t in found] == [d for _, d in frames]


# ---- models --------------------------------------------------------------------------------------------------------

RUN = """
    const [text, inputs] = arguments;
    return tried(() => {
      const run = mz.network(mz.read(bytesOf(text)));
      const back = run(...inputs.map(([shape, data, whole]) => ({ shape, data: whole ? Float64Array.from(new Float32Array(bytesOf(data).buffer)) : new Float32Array(bytesOf(data).buffer) })));
      return [back].flat().map(({ shape, data }) => [shape, textOf(Float32Array.from(data))]);
    })"""


def run(reader, path, *inputs):
    given = [[list(x.shape), coded(x.float().numpy().tobytes()), not x.is_floating_point()] for x in inputs]
    found = reader(RUN, coded(path.read_bytes()), given)
    assert isinstance(found, list), found
    return [torch.from_numpy(array(data).copy()).reshape(shape) for shape, data in found]


TRIED = site.tried_files()


@pytest.mark.parametrize("file", TRIED, ids=lambda f: f["name"])
def test_digits_by_the_files_of_the_first_page(reader, file):
    "Two hundred of them, of which large files get twenty; and all test digits by the library, for what the page says."
    path, data = RECORD if file["name"] == "record" else ROOT / f"tools/site/try/{file['name']}.mz", mnist5k()
    model, x = load(path), data.valid.x[: 200 if file["bytes"] < 1e5 else 20]
    with torch.no_grad():
        want = model(x)
    (got,) = run(reader, path, x)
    assert (got - want).abs().max() < 1e-3 and torch.equal(got.argmax(1), want.argmax(1))
    assert abs(accuracy(model, data.test) - float(file["accuracy"].strip("%")) / 100) < 2e-3


def test_other_networks_of_the_same_builder_are_refused(reader, tmp_path):
    path = save(LeNet5(), tmp_path / "x.mz")
    other = rewritten(path, lambda m: m.update(kind="AAAA"))
    assert "another LeNet5 than this reader knows" in reader(
        "return tried(() => mz.network(mz.read(bytesOf(arguments[0]))))", coded(other)
    )
    small = save(network(bits=4), tmp_path / "small.mz")
    other = rewritten(small, lambda m: m["tensors"]["fc1.weight"].update(layer="StaticLinear"))
    assert "does more than this reader can" in reader(
        "return tried(() => mz.network(mz.read(bytesOf(arguments[0]))))", coded(other)
    )


def test_updates_are_refused_by_the_name_of_their_base(reader, tmp_path):
    path = save(LeNet5(), tmp_path / "new.mz", base=save(LeNet5(), tmp_path / "old.mz"))
    path = save(load(path), tmp_path / "newer.mz", base=path)
    said = reader("return tried(() => mz.read(bytesOf(arguments[0])))", coded(path.read_bytes()))
    assert "it is an update of 'new.mz'" in said.replace('"', "'")


# ---- graphs: the page's, written here by hand ----------------------------------------------------------------------


def with_graph(path, model, x, nodes, names=("batch",), output=1, plain=None):
    "A mapped file of a model with a graph. `plain`: the model before it was compressed."
    save(model, path, archive=False)
    layers = {
        n: {"class": type(m).__name__, **SAID.get(type(m), lambda m: {})(m)}
        for n, m in (plain or model).named_modules()
        if n
    }
    shape = [names[i] if i < len(names) else s for i, s in enumerate(x.shape)]
    graph = {
        "inputs": [["x", str(x.dtype).removeprefix("torch."), shape]],
        "sizes": {n: x.shape[i] for i, n in enumerate(names)},
        "nodes": nodes,
        "output": output,
    }

    def change(m):
        m.pop("kind", None)
        m.update(modelzip=5, architecture=None, layers={"": {"module": "Model"}, **layers}, graph=graph)

    path.write_bytes(rewritten(path, change))
    return path


SAID = {  # what a file says of a layer
    nn.Conv2d: lambda m: dict(in_channels=m.in_channels, out_channels=m.out_channels, kernel_size=list(m.kernel_size),
                              stride=list(m.stride), padding=list(m.padding), groups=m.groups),
    nn.Linear: lambda m: dict(in_features=m.in_features, out_features=m.out_features),
    nn.BatchNorm2d: lambda m: dict(num_features=m.num_features, eps=m.eps),
    nn.LayerNorm: lambda m: dict(normalized_shape=list(m.normalized_shape)),
    nn.Embedding: lambda m: dict(num_embeddings=m.num_embeddings, embedding_dim=m.embedding_dim),
    nn.AdaptiveAvgPool2d: lambda m: dict(output_size=m.output_size),
}  # fmt: skip


def rewritten(path, change):
    "The bytes of a mapped or archived file with another manifest."
    with zipfile.ZipFile(path) as z:
        payload, manifest = z.read("payload"), json.loads(z.read("manifest.json"))
    change(manifest)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr(zipfile.ZipInfo("payload"), payload)
        z.writestr(zipfile.ZipInfo("manifest.json"), json.dumps(manifest), zipfile.ZIP_DEFLATED)
    return out.getvalue()


class MobileNet(nn.Module):
    "What a MobileNetV3 has: depthwise convolutions, batch norm, squeeze and excitation, a residual."

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.act = nn.Conv2d(8, 8, 5, 1, 2, groups=8), nn.Hardswish()
        self.pool, self.fc, self.head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        y = self.depth(x)
        return self.head((x + y * F.hardsigmoid(self.fc(self.pool(y)))).mean((2, 3)))


MOBILE = [[".stem", 1], [".norm", 1], [".act", 1], [".depth", 1], [".pool", 1], [".fc", 1], ["hardsigmoid", 1], ["mul", 4, 1],
          ["add", 6, 1], ["mean", 1, [2, 3]], [".head", 1]]  # fmt: skip


class ViT(nn.Module):
    "What a vision transformer has: patches, a token, places, a block of attention."

    def __init__(self):
        super().__init__()
        self.patches, self.token, self.places = (
            nn.Conv2d(1, 16, 7, 7),
            nn.Parameter(torch.randn(1, 1, 16)),
            nn.Parameter(torch.randn(1, 17, 16)),
        )
        self.before, self.after, self.qkv, self.out = (
            nn.LayerNorm(16),
            nn.LayerNorm(16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
        )
        self.up, self.gelu, self.down, self.head = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x):
        n = x.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1) + self.places
        q, k, v = self.qkv(self.before(x)).view(n, 17, 3, 4, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, 17, 16))
        return self.head((x + self.down(self.gelu(self.up(self.after(x)))))[:, 0])


VIT = [[".patches", 1], ["view", 1, ["batch", 16, 16]], ["transpose", 1, 1, 2], ["=token"], ["expand", 1, ["batch", -1, -1]],
       ["cat", [1, 3], 1], ["=places"], ["add", 2, 1], [".before", 1], [".qkv", 1], ["view", 1, ["batch", 17, 3, 4, 4]],
       ["permute", 1, [2, 0, 3, 1, 4]], ["unbind", 1], ["item", 1, 0], ["item", 2, 1], ["item", 3, 2],
       ["scaled_dot_product_attention", 3, 2, 1], ["transpose", 1, 1, 2], ["view", 1, ["batch", ["*", 17, 1], 16]], [".out", 1],
       ["add", 13, 1], [".after", 1], [".up", 1], [".gelu", 1], [".down", 1], ["add", 5, 1], ["select", 1, 1, 0], [".head", 1]]  # fmt: skip
LENET = [[".conv1", 1], ["max_pool2d", 1, [2, 2]], [".conv2", 1], ["max_pool2d", 1, [2, 2]], ["view", 1, ["batch", 80]], [".fc1", 1],
         ["relu", 1], [".fc2", 1]]  # fmt: skip
GRAPHED = {
    "LeNet5": (lambda: LeNet5(channels=[3, 5], hidden=20), LENET, (3, 1, 28, 28)),
    "MobileNet": (MobileNet, MOBILE, (3, 3, 20, 20)),
    "ViT": (ViT, VIT, (3, 1, 28, 28)),
}


def made(name):
    "A model in evaluation mode, its norms with statistics of their own; and an example."
    with seeded(0):
        build, _, shape = GRAPHED[name]
        model = build().eval()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
        return model, torch.randn(shape)


@pytest.mark.parametrize("name", GRAPHED)
def test_graphs(reader, tmp_path, name):
    model, x = made(name)
    for m in model, quantize_model(model, 8):
        with torch.no_grad():
            (got,) = run(reader, with_graph(tmp_path / "x.mz", m, x, GRAPHED[name][1], plain=model), x)
            assert (got - m(x)).abs().max() < 1e-5
            (other,) = run(reader, tmp_path / "x.mz", x[:1])  # of another batch
            assert torch.allclose(other, got[:1], atol=1e-6)


@pytest.mark.skipif("example" not in inspect.signature(save).parameters, reason="this version saves no graphs")
@pytest.mark.parametrize("name", GRAPHED)
def test_graphs_that_the_library_saved(reader, tmp_path, name):
    model, x = made(name)
    with torch.no_grad():
        small, how = quantize_model(model, 4), "solid" if name == "LeNet5" else True
        (got,) = run(reader, save(small, tmp_path / "x.mz", how, example=x), x)
        assert (got - small(x)).abs().max() < 1e-5


X, Y = torch.linspace(-2.5, 3, 24).reshape(2, 3, 4), torch.linspace(1.5, -0.75, 12).reshape(3, 4)
# nodes that take the values X, Y and Z, which is Y transposed, and what PyTorch makes of X
NODES = {
    **{n: ([n, "X"], getattr(torch, n)) for n in "abs neg exp expm1 erf sin cos floor ceil round trunc sign relu sigmoid tanh".split()},
    **{n: ([n, "X"], getattr(F, n)) for n in "silu mish gelu hardtanh hardswish hardsigmoid leaky_relu elu selu softplus".split()},
    "log_sigmoid": (["log_sigmoid", "X"], F.logsigmoid),
    "gelu tanh": (["gelu", "X", "tanh"], lambda x: F.gelu(x, approximate="tanh")),
    **{n: ([n, "X", "Y"], lambda x, f=getattr(torch, n): f(x, Y)) for n in "add sub mul div maximum minimum lt ge eq remainder".split()},
    "rsub": (["rsub", "X", [3], 2], lambda x: 3 - 2 * x),
    "floor division": (["div", "X", [0.7], "floor"], lambda x: torch.div(x, 0.7, rounding_mode="floor")),
    "pow": (["pow", "X", [2]], lambda x: x**2),
    "clamp": (["clamp", "X", [-1], None], lambda x: x.clamp(min=-1)),
    "masked": (["masked_fill", "X", "Y", [7]], lambda x: x.masked_fill(Y.bool(), 7)),
    "sum": (["sum", "X", [0, 2]], lambda x: x.sum((0, 2))),
    "mean": (["mean", "X", [1], True], lambda x: x.mean(1, True)),
    "var": (["var", "X", [2]], lambda x: x.var(2)),
    "amax": (["amax", "X", [1]], lambda x: x.amax(1)),
    "argmax": (["argmax", "X", -1], lambda x: x.argmax(-1)),
    "logsumexp": (["logsumexp", "X", [0]], lambda x: x.logsumexp(0)),
    "norm": (["norm", "X", 2, [1]], lambda x: x.norm(dim=1)),
    "cumsum": (["cumsum", "X", 1], lambda x: x.cumsum(1)),
    "softmax": (["softmax", "X", 1], lambda x: x.softmax(1)),
    "log_softmax": (["log_softmax", "X", 0], lambda x: x.log_softmax(0)),
    "permute": (["permute", "X", [2, 0, 1]], lambda x: x.permute(2, 0, 1)),
    "flip": (["flip", "X", [0, 2]], lambda x: x.flip(0, 2)),
    "roll": (["roll", "X", [1, -1], [0, 2]], lambda x: x.roll((1, -1), (0, 2))),
    "slice": (["slice", "X", 2, -3, None, 2], lambda x: x[:, :, -3::2]),
    "select": (["select", "X", 1, -1], lambda x: x[:, -1]),
    "repeat": (["repeat", "X", [2, 1, 1, 3]], lambda x: x.repeat(2, 1, 1, 3)),
    "repeat_interleave": (["repeat_interleave", "X", 2, 1], lambda x: x.repeat_interleave(2, 1)),
    "stack": (["stack", ["X", "X"], 1], lambda x: torch.stack([x, x], 1)),
    "tril": (["tril", "X", -1], lambda x: x.tril(-1)),
    "pad": (["constant_pad_nd", "X", [1, -1, 0, 2], 5], lambda x: F.pad(x, [1, -1, 0, 2], value=5)),
    "matmul": (["matmul", "X", "Z"], lambda x: x @ Y.T),
    "linear": (["linear", "X", "Y"], lambda x: F.linear(x, Y)),
    "causal": (["scaled_dot_product_attention", "X", "X", "X", None, True], lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    "layer_norm": (["layer_norm", "X", [3, 4]], lambda x: F.layer_norm(x, (3, 4))),
    "rms_norm": (["rms_norm", "X", [4]], lambda x: F.rms_norm(x, (4,))),
    "group_norm": (["group_norm", "X", 3], lambda x: F.group_norm(x, 3)),
    "max_pool2d": (["max_pool2d", "X", [2, 3], [1, 2], [1, 1]], lambda x: F.max_pool2d(x, (2, 3), (1, 2), 1)),
    "ceil": (["max_pool2d", "X", [2, 2], [], [0, 0], [1, 1], True], lambda x: F.max_pool2d(x, 2, ceil_mode=True)),
    "avg_pool2d": (["avg_pool2d", "X", [2, 2], [2, 1], [1, 0], True, True], lambda x: F.avg_pool2d(x, 2, (2, 1), (1, 0), True)),
    "inside": (["avg_pool2d", "X", [2, 2], [1, 1], [1, 1], False, False], lambda x: F.avg_pool2d(x, 2, 1, 1, count_include_pad=False)),
    "regions": (["adaptive_avg_pool2d", "X", [2, 3]], lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
    "full": (["full", ["n", ["//", 7, "n"]], [2.5], "float32"], lambda x: torch.full((2, 3), 2.5)),
    "arange": (["arange", [0], ["n"], [0.5], "float32"], lambda x: torch.arange(0, 2, 0.5)),
    "whether": (["to", "X", "bool"], lambda x: x.bool()),
    "places": (["to", "X", "int64"], lambda x: x.long()),
}  # fmt: skip


def placed(node, values):
    "A node that stands behind so many values, with the names of values as how many back they are."
    back = {"X": values, "Y": values - 1, "Z": values - 2}
    return [
        placed(a, values) if isinstance(a, list) else back[a] if isinstance(a, str) and a in back else a for a in node
    ]


def test_each_operation(reader, tmp_path):
    model = nn.Linear(1, 1)
    model.register_buffer("y", Y)
    nodes = [["=y"], ["transpose", 1, 0, 1], *(placed(node, 3 + i) for i, (node, _) in enumerate(NODES.values()))]
    outputs = {"list": [len(NODES) - i for i in range(len(NODES))]}
    found = run(reader, with_graph(tmp_path / "x.mz", model, X, nodes, ("n",), outputs), X)
    for (name, (_, f)), got in zip(NODES.items(), found, strict=True):
        want = f(X).float()
        assert want.shape == got.shape and torch.allclose(want, got, atol=2e-6, rtol=1e-5), name


BAD_NODES = {
    "an operation that does not exist": [["system", 1]],
    "a name that every object has": [["constructor", 1]],
    "a value before the first": [["relu", 2]],
    "itself": [["relu", 0]],
    "no number": [["relu", "x"]],
    "too many arguments": [["relu", 1, 1]],
    "too few": [["transpose", 1, 0]],
    "another type": [["softmax", 1, "0"]],
    "a size without a name": [["view", 1, ["nobody"]]],
    "a division by zero": [["view", 1, [["//", 1, 0], 4]]],
    "a size that goes deep": [["view", 1, [eval("['+', 1, " * 40 + "1" + "]" * 40)]]],
    "a dimension too many": [["transpose", 1, 0, 7]],
    "a gigantic tensor": [["full", [10**12], [0], "float32"]],
    "a gigantic expansion": [["expand", 1, [10**7, 10, 2, 3, 4]]],
    "a gigantic repetition": [["repeat", 1, [10**6, 10**6, 1]]],
    "a gigantic range": [["arange", [0], [1], [1e-12], "float32"]],
    "gigantic padding": [["constant_pad_nd", 1, [10**9, 10**9]]],
    "no end of work": [
        ["full", [4200, 1000], [1], "float32"],
        ["full", [1000, 4200], [1], "float32"],
        ["matmul", 2, 1],
    ],
    "a layer that does not exist": [[".nobody", 1]],
    "a tensor that does not exist": [["=nobody"]],
    "a list for one value": [["unbind", 1], ["relu", 1]],
    "a list for a layer": [["unbind", 1], [".0", 1]],
    "no such value of several": [["unbind", 1], ["item", 1, 2]],
    "shapes that do not match": [["view", 1, [24]], ["add", 1, 2]],
    "a place that is not there": [["select", 1, 0, 9]],
    "an unknown type": [["to", 1, "object"]],
}


BAD_GRAPHS = {
    "no output": lambda g: g.update(output=2.5),
    "an output before the first": lambda g: g.update(output={"list": [9]}),
    "a size without a name": lambda g: g.update(inputs=[["x", "float32", ["m", 3, 4]]]),
    "another input": lambda g: g.update(inputs=[["x", "float32", [5, 3, 4]]]),
    "a size beyond its range": lambda g: g.update(sizes={"n": [4, 3, 9]}),
    "too many nodes": lambda g: g.update(nodes=[["relu", 1]] * (2**16 + 1)),
    "no nodes": lambda g: g.pop("nodes"),
    **{name: lambda g, nodes=nodes: g.update(nodes=nodes) for name, nodes in BAD_NODES.items()},
}


def test_bad_graphs_are_errors(reader, tmp_path):
    "An error, soon, and before memory is taken."
    path = with_graph(tmp_path / "x.mz", nn.Sequential(nn.Linear(4, 1)), X, [[".0", 1]], ("n",))
    assert run(reader, path, X)[0].shape == (2, 3, 1)
    bad = [coded(rewritten(path, lambda m: change(m["graph"]))) for change in BAD_GRAPHS.values()]
    given = [[list(X.shape), coded(X.numpy().tobytes()), False]]
    each = RUN.replace("const [text, inputs] = arguments;", "")
    found = reader(f"const [texts, inputs] = arguments; return texts.map(text => {{ {each} }})", bad, given)
    assert [name for name, says in zip(BAD_GRAPHS, found, strict=True) if not isinstance(says, str)] == []


# ---- damaged files -------------------------------------------------------------------------------------------------

DAMAGED = """
    const most = { taken: 0 }, names = ["Uint8Array", "Uint16Array", "Uint32Array", "Float32Array", "Float64Array", "BigInt64Array"];
    const watched = names.map(name => ({ [name]: class extends window[name] {
      constructor(...a) {
        if (typeof a[0] === "number") most.taken = Math.max(most.taken, a[0] * new.target.BYTES_PER_ELEMENT);
        super(...a);
      }
    } })[name]);
    const own = new Function(...names, arguments[1] + "; return mz")(...watched);
    return arguments[0].map(text => {
      const data = bytesOf(text), start = performance.now();
      most.taken = 0;
      let says = "read";
      try { const file = own.read(data); file.table(); for (const name of file.tensors.keys()) file.tensor(name); }
      catch (e) { says = e instanceof own.MzError ? e.message : `CRASH ${e.stack}`; }
      return [says, most.taken, performance.now() - start];
    })"""


def damaged(data, dice):
    "A file with some bits flipped, a piece missing, or a piece of something else."
    data, how = bytearray(data), dice.randrange(4)
    if how < 2:
        for _ in range(1 + how * dice.randrange(4)):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif how == 2:
        del data[dice.randrange(len(data)) :]
    else:
        at = dice.randrange(len(data))
        data[at : at + dice.randrange(40)] = dice.randbytes(dice.randrange(40))
    return bytes(data)


def lies(manifest, dice):
    "A manifest in which one value is another."
    places = []

    def walk(x):
        for k, v in x.items() if isinstance(x, dict) else enumerate(x):
            places.append((x, k))
            if isinstance(v, (dict, list)):
                walk(v)

    walk(manifest)
    x, k = dice.choice(places)
    x[k] = dice.choice(
        [0, -1, 1, 7, 2**26, 2**40, 1e300, 0.5, None, "", "float64", "same", [], [2**30] * 3, {}, True, [1], [[2]]]
    )


def test_damaged_files_are_errors(reader, tmp_path):
    "An error or the numbers, in no time, and with memory that the file accounts for."
    dice = random.Random(0)
    paths = [RECORD, FILES / "version5.mz", FILES / "version2.mz", FILES / "version5_solid.mz"]
    for i, model in enumerate(
        (network(bits=3), network(bits=11), sparse(0.97, 4), sparse("2:4", None), on_two_grids())
    ):
        paths.append(save(model, tmp_path / f"{i}.mz", archive=i % 2 == 0))
    files = [damaged(p.read_bytes(), dice) for p in paths for _ in range(8)]
    for path in paths:
        if "solid" not in path.name and path != RECORD:
            files += [rewritten(path, lambda m: lies(m, dice)) for _ in range(16)]
    source = (ROOT / "tools/site/mz.js").read_text()
    found = reader(DAMAGED, [coded(f) for f in files], source)
    for data, (says, taken, milliseconds) in zip(files, found):
        assert not says.startswith("CRASH"), says
        assert taken <= max(2**23, 2**15 * len(data)) and milliseconds < 5000, (says, taken, milliseconds)
    read = sum(says == "read" for says, *_ in found)
    assert 0 < read < len(found) / 3  # some changes say nothing of the numbers


def test_forged_streams_are_errors(reader):
    "Streams whose checksum is right, and nothing else: chunks by chance behind every method."
    import zlib

    dice, streams = random.Random(1), []
    for method, bits in itertools.product(range(9), (0, 3, 8, 11)):
        for _ in range(3):
            chunk = bytes([method]) + dice.randbytes(dice.randrange(60))
            levels = max(4, 1 << bits) if bits else dice.choice([1, 4, 8])
            count = dice.choice([0, 8, 64, 4096])
            number = lambda n: bytes([n & 127 | 128, n >> 7 & 127 | 128, n >> 14]) if n > 127 else bytes([n])
            data = bytes([bits]) + number(levels) + number(count) + (number(len(chunk)) + chunk if count else b"")
            size = (
                count
                if not bits
                else sum(-(-count * w // 8) for w in [8] * (bits // 8) + [w for w in (4, 2, 1) if bits % 8 & w])
            )
            streams.append((coded(data + zlib.crc32(data).to_bytes(4, "little")), size))
    found = reader(
        "return arguments[0].map(([text, size]) => tried(() => { mz.parts.readStream(bytesOf(text), size); return 'read'; }))",
        streams,
    )
    assert all(isinstance(says, str) for says in found) and 10 < found.count("read") < len(found) / 2


# ---- the pages -----------------------------------------------------------------------------------------------------


def draw(browser, *strokes):
    "With a mouse, on a canvas of 280 units."
    from selenium.webdriver.common.action_chains import ActionChains

    paper = browser.find_element("css selector", ".mz-ink")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", paper)
    by = browser.execute_script("return arguments[0].getBoundingClientRect().width / 280", paper)
    hand = ActionChains(browser, duration=0)
    for first, *others in strokes:
        hand.move_to_element_with_offset(paper, *(round((v - 140) * by) for v in first)).click_and_hold()
        for p in others:
            hand.move_to_element_with_offset(paper, *(round((v - 140) * by) for v in p))
        hand.release()
    hand.perform()


ANSWERS = "return [...document.querySelectorAll('.mz-answer')].map(e => e.textContent)"
CIRCLE = [(140 + 60 * math.sin(t / 3), 140 - 90 * math.cos(t / 3)) for t in range(20)]
SEVEN = [(80, 60), (200, 60), (160, 140), (130, 230)]


def page(browser, address, name):
    browser.get(f"{address}/{name}.html")
    wait(browser, "return document.querySelector('.mz-try[data-ready]') !== null")


def test_a_drawn_digit_is_read(browser, address):
    from selenium.webdriver.common.keys import Keys

    page(browser, address, "index")
    draw(browser, CIRCLE)
    assert wait(browser, f"{ANSWERS}.join() == '0,0'")
    said = browser.find_element("css selector", "#mz-try-digits [aria-live]")
    assert wait(browser, "return arguments[0].textContent", said).startswith(
        f"Read as: The record, {RECORD.stat().st_size:,} bytes: 0 ("
    )
    browser.find_element("css selector", ".mz-clear").click()
    assert wait(browser, f"{ANSWERS}.join() == '–,–'")
    draw(browser, SEVEN)
    assert wait(browser, f"{ANSWERS}.join() == '7,7'")
    knob = browser.find_element("css selector", "#mz-digits-file")
    titles = set()
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_LEFT):
        titles.add(browser.execute_script("return document.querySelectorAll('.mz-net h3')[1].textContent"))
        knob.send_keys(key)
        assert knob.get_attribute("aria-valuetext").endswith("bytes")
    assert len(titles) == 2 and wait(browser, f"{ANSWERS}.join() == '7,7'")
    for digit in range(3):
        browser.find_element("css selector", ".mz-sample").click()
        assert wait(browser, f"{ANSWERS}[0] == '{digit}'")


def test_a_digit_is_drawn_by_keys_and_without_a_server(browser, built):
    from selenium.webdriver.common.keys import Keys

    browser.get((built / "index.html").as_uri())
    wait(browser, "return document.querySelector('.mz-try[data-ready]') !== null")
    paper = browser.find_element("css selector", ".mz-ink")
    paper.send_keys(Keys.ARROW_UP * 8, Keys.SPACE, Keys.ARROW_DOWN * 16, Keys.SPACE)
    assert wait(browser, f"{ANSWERS}[0] == '1'")
    paper.send_keys(Keys.ESCAPE)
    assert wait(browser, f"{ANSWERS}[0] == '–'")


def test_drawings_become_what_digits_are(browser, address):
    "Strokes of any size and place: the longer side has 20 pixels, the centre of mass lies in the middle, grey is 0 to 1."
    page(browser, address, "index")
    normalized = "return Array.from(mzTry.normalized(arguments[0]) ?? [])"
    assert browser.execute_script(normalized, []) == []
    for by, dx in ((1, 0), (0.3, 50), (0.1, -8)):
        seen = np.array(browser.execute_script(normalized, [[(x * by + dx, y * by) for x, y in CIRCLE]])).reshape(
            28, 28
        )
        rows = np.flatnonzero(seen.max(1))
        assert (
            19 <= np.ptp(rows) + 1 <= 21
            and seen.min() == 0
            and seen.max() == 1
            and 0.4 < (seen[seen > 0] > 0.9).mean() < 0.9
        )
        centre = [(seen.sum(a) * np.arange(28)).sum() / seen.sum() for a in (0, 1)]
        assert max(abs(c - 14) for c in centre) <= 0.51
    assert 1 < np.sum(browser.execute_script(normalized, [[(3, 3)]])) < 20  # a dot


def test_a_file_of_ones_own(browser, address, tmp_path):
    page(browser, address, "05_pack")
    place = browser.find_element("css selector", "#mz-file-input")
    said = browser.find_element("css selector", "#mz-try-file [aria-live]")
    path = save(network(bits=4), tmp_path / "mine.mz")
    place.send_keys(str(path))
    assert wait(browser, "return arguments[0].textContent", said).startswith(
        f"mine.mz: {path.stat().st_size:,} bytes, architecture LeNet5, format"
    )
    rows = browser.execute_script(
        "return [...document.querySelectorAll('.mz-rows tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert [r[0] for r in rows[:-1]] == list(network(bits=4).state_dict()) or rows[0][0] == "conv1.weight"
    assert sum(int(r[5].replace(",", "")) for r in rows) == path.stat().st_size
    (tmp_path / "bad.mz").write_bytes(path.read_bytes()[:-50])
    place.send_keys(str(tmp_path / "bad.mz"))
    assert (
        wait(browser, "return arguments[0].textContent.startsWith('bad.mz') && arguments[0].textContent", said).count(
            "cut off"
        )
        == 1
    )
    assert not browser.find_element("css selector", ".mz-rows").is_displayed()


def test_a_comment_becomes_what_is_to_be_tried():
    made = site.to_try("digits")["outputs"][0]["data"]["text/html"]
    assert f"{RECORD.stat().st_size:,} bytes" in made and [f["bytes"] for f in TRIED] == sorted(
        (f["bytes"] for f in TRIED), reverse=True
    )
    assert site.TRY.fullmatch("<!-- try: digits -->")[1] == "digits" and not site.TRY.fullmatch(
        "see <!-- try: digits -->"
    )
