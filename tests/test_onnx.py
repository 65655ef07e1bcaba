"""ONNX files: what ONNX Runtime computes from them is what our layers compute, and no float copy of a compressed
weight is in them."""

import importlib.util, json, os, subprocess, sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from guards import FUZZ, examples, share, unchanged

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
if importlib.util.find_spec("onnxscript") is None:  # it would import sympy, which nobody needs who only collects
    pytest.skip("onnxscript is not installed", allow_module_level=True)
helper, TensorProto = onnx.helper, onnx.TensorProto

from modelzip import onnx_export
from modelzip.data import Attention, LeNet5, TransformerBlock
from modelzip.deploy import deploy
from modelzip.kernels import QConv2d, QLinear, use_kernels
from modelzip.onnx_export import Graph, onnx_bytes, onnx_model, to_onnx
from modelzip.prune import Inputs
from modelzip.qat import StaticConv2d, StaticLinear, convert, prepare
from modelzip.quant import QUANTIZABLE, Dequantize, quantize, quantize_layer, quantize_model
from modelzip.static import quantize_static
from modelzip.workshop import onnx_files
from modelzip.workshop.integer_attention import StaticAttention
from modelzip.workshop.onnx_expanded import fetched_rows, fits_rows, float_linear
from modelzip.workshop.onnx_graph import expanded_weight, store_number
from modelzip.workshop.onnx_products import integer_conv, integer_linear
from modelzip.workshop.onnx_static import whole_bias

FAST = settings(max_examples=examples(40), deadline=None)


pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def computed(g, out, inputs=(), exact=True):
    "What ONNX Runtime makes of a graph."
    kinds = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    g.nodes.append(helper.make_node("Identity", [out], ["result"]))
    graph = helper.make_graph(
        g.nodes,
        "g",
        [helper.make_tensor_value_info(n, kinds[x.dtype], [None] * x.dim()) for n, x in inputs],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
        list(g.stored.values()),
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return torch.from_numpy(
        runtime.InferenceSession(model.SerializeToString(), options).run(None, {n: x.numpy() for n, x in inputs})[0]
    )


def near(a, b, relative=1e-5):
    assert a.shape == b.shape and (a - b).norm() <= relative * b.norm() + 1e-12


@FAST
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.integers(1, 16),
    symmetric=st.booleans(),
    where=st.sampled_from(["tensor", "first", "last", "group"]),
    group=st.integers(1, 20),
    table=st.sampled_from([None, None, "nf4", "kmeans"]),
    columns=st.booleans(),
    seed=st.integers(0, 99),
)
def test_expanded_weights(shape, bits, symmetric, where, group, table, columns, seed):
    torch.manual_seed(seed)
    how = {"tensor": {}, "first": {"axis": 0}, "last": {"axis": -1}, "group": {"group": group}}[where]
    if table:
        bits, symmetric, how = 4 if table == "nf4" else min(bits, 4), True, how | {"codebook": table}
    if columns and len(shape) > 1:
        how |= {"columns": torch.rand(shape[1]) + 0.5}
    q, g = quantize(torch.randn(shape), bits, symmetric=symmetric, **how), Graph(onnx)
    near(computed(g, expanded_weight(g, "w", q)), q.dequantize())


@FAST
@given(
    inputs=st.sampled_from([32, 64, 96]),
    outputs=st.integers(1, 40),
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    how=st.sampled_from([{}, {"axis": 0}, {"axis": 1}, {"group": 16}, {"group": 32}]),
    microsoft=st.booleans(),
    columns=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_with_expanded_weights(inputs, outputs, bits, symmetric, how, microsoft, columns, seed):
    torch.manual_seed(seed)
    q, g, x = (
        quantize(
            torch.randn(outputs, inputs),
            bits,
            symmetric=symmetric,
            **how,
            **({"columns": torch.rand(inputs) + 0.5} if columns else {}),
        ),
        Graph(onnx),
        torch.randn(3, 2, inputs),
    )
    near(
        computed(g, float_linear(g, "x", q, "w", microsoft), [("x", x)]), nn.functional.linear(x, q.dequantize()), 2e-5
    )


@FAST
@given(
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 60),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    activations=st.sampled_from(["row", "tensor"]),
    columns=st.booleans(),
    seed=st.integers(0, 99),
)
def test_integer_products(inputs, outputs, bits, symmetric, activations, columns, seed):
    "Both sides round the input to 8 bits; each is within that of the exact product."
    torch.manual_seed(seed)
    small = quantize_layer(
        nn.Linear(inputs, outputs, bias=False),
        bits,
        symmetric=symmetric,
        **({"columns": torch.rand(inputs) + 0.5} if columns else {}),
    )
    layer, g, x = (
        QLinear(small.layer, small.packed, activations=activations),
        Graph(onnx),
        torch.randn(7, inputs) * 2 + 1,
    )
    exact, got = small(x), computed(g, integer_linear(g, "x", layer, "w"), [("x", x)])
    scaled = x if small.q.columns is None else x * small.q.columns
    ranges = (
        (scaled.amax(1).clamp(min=0) - scaled.amin(1).clamp(max=0))
        if activations == "row"
        else (scaled.max().clamp(min=0) - scaled.min().clamp(max=0)).expand(7)
    )
    weight = small.weight if small.q.columns is None else small.weight / small.q.columns
    assert (
        (got - exact).abs() <= (0.51 * ranges / 255 * 1.01)[:, None] * weight.abs().sum(1) + 1e-4 * exact.abs().max()
    ).all()  # half a step for each input


@pytest.mark.parametrize("activations", ["row", "tensor"])
def test_integer_convolutions(activations):
    torch.manual_seed(0)
    for conv in (
        nn.Conv2d(8, 200, 3, 2, 1, bias=False),
        nn.Conv2d(8, 400, (3, 2), 1, (1, 0), 2, groups=2, bias=False),
        nn.Conv2d(900, 900, 3, padding=1, groups=900, bias=False),
    ):
        layer, g, x = (
            use_kernels(quantize_layer(conv), activations=activations),
            Graph(onnx),
            torch.randn(3, conv.in_channels, 9, 10),
        )
        assert type(layer) is QConv2d
        near(
            computed(g, integer_conv(g, "x", layer, "w"), [("x", x)]), layer(x), 0.03
        )  # two roundings of nine inputs each


@FAST
@given(
    rows=st.integers(1, 20),
    width=st.sampled_from([8, 16, 24]),
    bits=st.integers(1, 8),
    how=st.sampled_from([{"axis": 0}, {}, {"group": 8}]),
    symmetric=st.booleans(),
    columns=st.booleans(),
    shape=st.sampled_from([(3,), (2, 3), (1, 2, 2)]),
    seed=st.integers(0, 99),
)
def test_embeddings_fetch_rows_of_codes(rows, width, bits, how, symmetric, columns, shape, seed):
    torch.manual_seed(seed)
    q = quantize(
        torch.randn(rows, width),
        bits,
        symmetric=symmetric,
        **how,
        **({"columns": torch.rand(width) + 0.5} if columns else {}),
    )
    g, ids = Graph(onnx), torch.randint(0, rows, shape)
    assert fits_rows(q)
    near(computed(g, fetched_rows(g, "ids", q, "w", len(shape)), [("ids", ids)]), q.dequantize()[ids])


class Everything(nn.Module):
    "Layers of every sort, some of which share a weight."

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(120, 64), nn.Linear(64, 120, bias=False)
        self.head.weight = self.words.weight
        self.block, self.lstm = (
            nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, dropout=0.0),
            nn.LSTM(64, 32, batch_first=True, bidirectional=True),
        )
        self.conv, self.up = nn.Conv1d(64, 48, 3, padding=1), nn.ConvTranspose1d(48, 64, 1)

    def forward(self, ids):
        x = self.lstm(self.block(self.words(ids)))[0]
        return self.head(self.up(self.conv(x.transpose(1, 2)).relu()).transpose(1, 2))


@pytest.fixture(scope="module")
def everything():
    torch.manual_seed(0)
    return Everything().eval()


def test_whole_models(everything, tmp_path):
    model = quantize_model(everything, 8)
    path = to_onnx(model, tmp_path / "m.onnx", torch.randint(0, 120, (2, 5)), dynamic={0: "batch", 1: "length"})
    run = onnx_model(path)
    for shape in ((2, 5), (1, 9), (4, 3)):
        ids = torch.randint(0, 120, shape)
        near(run(ids), model(ids), 1e-4)
    compressed = sum(
        m.q.numel() for m in {id(m.packed): m for m in model.modules() if isinstance(m, Dequantize)}.values()
    )
    plain = sum(p.numel() for n, p in everything.named_parameters()) - compressed
    stored = onnx_bytes(path)
    assert stored["float"] <= 4 * (plain + compressed // 8)  # the rest of the model, scales and nothing else
    assert all(
        not n.name.endswith("weight") or "lstm" in n.name or "norm" in n.name for n in onnx.load(path).graph.initializer
    )


class Recurrent(nn.Module):
    "A recurrent layer that starts from given states."

    def __init__(self, layer):
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(120, 64), layer, nn.Linear(32 * (1 + layer.bidirectional), 10)

    def forward(self, ids, *starts):
        x = self.words(ids if self.layer.batch_first else ids.t())
        y, ends = self.layer(x, starts if len(starts) > 1 else starts[0] if starts else None)
        return self.head(y), *(ends if isinstance(ends, tuple) else (ends,))


ONE, TWO = dict(batch_first=True), dict(num_layers=2, bidirectional=True, bias=False)


@pytest.mark.hypothesis  # so that a search comes here: every layer with both
@pytest.mark.parametrize(
    "cls, options",
    [(nn.LSTM, ONE), (nn.GRU, TWO), (nn.RNN, ONE), *[(nn.LSTM, TWO), (nn.GRU, ONE), (nn.RNN, TWO)] * bool(FUZZ)],
)
def test_recurrent_layers_of_any_length(cls, options, tmp_path):
    torch.manual_seed(0)
    model = quantize_model(Recurrent(cls(64, 32, **options)).eval(), 4, group=32)
    start = torch.randn(options.get("num_layers", 1) * (1 + options.get("bidirectional", False)), 2, 32)
    ids, starts = torch.randint(0, 120, (2, 5)), (start, -start)[: 1 + (cls is nn.LSTM)]
    for given, free in (((), ()), (starts, [{1: "batch"}] * len(starts))):
        if given and options.get("bias", True):
            continue
        run = onnx_model(
            to_onnx(
                model,
                tmp_path / "m.onnx",
                (ids, *given),
                dynamic=({0: "batch", 1: "length"}, *free) if given else {0: "batch", 1: "length"},
            )
        )
        for shape in ((2, 5), (2, 9)):
            ids = torch.randint(0, 120, shape)
            for got, want in zip(run(ids, *given), model(ids, *given)):
                near(got, want, 1e-4)


@pytest.mark.hypothesis  # so that a search comes here, also without integer products (of 8 bits: `test_whole_models`)
def test_four_bits_with_every_sort_of_layer(tmp_path):
    "Attention, an LSTM and convolutions around layers of 4 bits."
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv = nn.Embedding(100, 64), nn.Conv1d(64, 64, 3, padding=1)
            self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1)
            self.lstm, self.head = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 10)

        def forward(self, ids):
            return self.head(self.lstm(self.blocks(self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2)))[0])

    model = quantize_model(Model().eval(), 4, group=32)
    for m in (model, use_kernels(model)) if FUZZ else (use_kernels(model),):
        run = onnx_model(
            to_onnx(m, tmp_path / "m.onnx", torch.randint(0, 100, (2, 7)), dynamic={0: "batch", 1: "length"})
        )
        for shape in ((2, 7), (1, 12)):
            ids = torch.randint(0, 100, shape)
            near(run(ids), model(ids), 1e-4)


class Told(nn.Module):
    "Something of PyTorch's attention, and a head that is compressed."

    def __init__(self, body, *more, **how):
        super().__init__()
        self.body, self.more, self.how, self.head = body, more, how, nn.Linear(64, 10)

    def forward(self, x, hidden=None):
        how = self.how | ({"src_key_padding_mask": hidden} if hidden is not None else {})
        y = self.body(x, *[x] * sum(self.more), **how)
        return self.head(y[0] if isinstance(y, tuple) else y)


def _layer(**how):
    return nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, **how)


WITH_FAST_PATHS = {
    "encoder": lambda: Told(nn.TransformerEncoder(_layer(), 2)),
    "encoder with a norm": lambda: Told(nn.TransformerEncoder(_layer(activation="gelu"), 1, nn.LayerNorm(64))),
    "norms first": lambda: Told(nn.TransformerEncoder(_layer(norm_first=True), 1, enable_nested_tensor=False)),
    "layer": lambda: Told(_layer()),
    "layer, length first": lambda: Told(nn.TransformerEncoderLayer(64, 4, 96)),
    "attention": lambda: Told(nn.MultiheadAttention(64, 4, batch_first=True), 2),
    "attention without weights": lambda: Told(nn.MultiheadAttention(64, 4, batch_first=True), 2, need_weights=False),
    "decoder": lambda: Told(nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 96, batch_first=True), 1), 1),
    "both": lambda: Told(nn.Transformer(64, 4, 1, 1, 96, batch_first=True), 1),
}


@pytest.mark.hypothesis  # so that a search comes here
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", share([*WITH_FAST_PATHS][1:], 2) + ["encoder"] * bool(FUZZ))  # which stands below, too
def test_fast_paths_are_spelled_out(name, tmp_path):
    torch.manual_seed(0)
    model = quantize_model(WITH_FAST_PATHS[name]().eval(), 8, overrides={"body*": None, "*": {}})
    x, y = torch.randn(2, 5, 64), torch.randn(3, 5, 64)
    with unchanged(model, x), torch.no_grad():
        near(onnx_model(to_onnx(model, tmp_path / "m.onnx", x))(y), model(y), 1e-5)


@pytest.mark.filterwarnings("ignore:.*nested")
def test_an_encoder_that_puts_out_zeros_is_refused(tmp_path):
    torch.manual_seed(0)
    model = quantize_model(WITH_FAST_PATHS["encoder"]().eval(), 8, overrides={"body*": None, "*": {}})
    x, hidden = torch.randn(2, 5, 64), torch.zeros(2, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    with pytest.raises(ValueError, match="body puts out zeros .*use_nested_tensor to False"), torch.no_grad():
        to_onnx(model, tmp_path / "m.onnx", (x, hidden))
    model.body.use_nested_tensor = False
    with torch.no_grad():
        run = onnx_model(to_onnx(model, tmp_path / "m.onnx", (x, hidden)))
        for y, h in ((x, hidden), (x.flip(0), hidden.flip(0)), (x, ~hidden.any(1, keepdim=True).expand(2, 5) & False)):
            near(run(y, h), model(y, h), 1e-5)


class Zoo(nn.Module):
    "Every layer beside the usual ones, each with an output of its own."

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn, self.pair = (
            nn.LSTMCell(16, 16),
            nn.GRUCell(16, 16),
            nn.RNNCell(16, 16, nonlinearity="relu"),
            nn.Bilinear(16, 16, 8),
        )
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 16, mode=mode, padding_idx=3) for mode in ("sum", "mean", "max"))
        self.table, self.head = nn.Embedding(20, 16, padding_idx=2), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight
        self.attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True)
        self.convs = nn.ModuleList(
            cls(2, 4, 3, padding=2, dilation=2, padding_mode=mode)
            for cls, mode in [
                (nn.Conv1d, "reflect"),
                (nn.Conv1d, "circular"),
                *((nn.Conv2d, m) for m in ("zeros", "reflect", "replicate", "circular")),
                (nn.Conv3d, "replicate"),
            ]
        )
        self.same = nn.ModuleList(cls(2, 4, 2, padding="same", groups=2) for cls in (nn.Conv1d, nn.Conv2d))
        self.ups = nn.ModuleList(
            cls(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
            for cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        )

    def forward(self, x, ids):
        seen = {1: x.reshape(-1, 2, 64), 2: x.reshape(-1, 2, 8, 8), 3: x.reshape(-1, 2, 4, 4, 4)}
        h, c = self.lstm(x[:, :16])
        h, c = self.lstm(x[:, 16:32], (h, c))
        g = self.gru(x[:, 32:48], h)
        r = self.rnn(g)
        k = x.reshape(-1, 16, 8)
        drawn = [layer(seen[layer.weight.dim() - 2]) for layer in (*self.convs, *self.same, *self.ups)]
        return (
            h,
            c,
            g,
            r,
            self.pair(c, r),
            *(bag(ids) for bag in self.bags),
            self.head(self.table(ids)),
            self.attention(x.reshape(-1, 8, 16), k, k)[0],
            *drawn,
        )


def test_every_other_layer(tmp_path):
    """At 1 to 8 bits, in groups and with codebooks, with a batch of any size; what is small is rounded once more,
    as the model does it."""
    torch.manual_seed(0)
    zoo, some = (
        Zoo().eval(),
        [{"bits": b} for b in range(1, 9)]
        + [
            {"bits": 3, "group": 4},
            {"bits": 4, "codebook": "nf4"},
            {"bits": 5, "symmetric": False},
            {"bits": 2, "codebook": "kmeans"},
        ],
    )
    names = [
        n
        for n, m in zoo.named_modules()
        if isinstance(m, QUANTIZABLE) or n in ("lstm", "gru", "rnn", "pair", "attention")
    ]
    model = quantize_model(
        zoo,
        overrides={
            n: {"bits": 4, "group": 8} if n in ("table", "head") else some[i % len(some)]
            for i, n in enumerate(names)
            if not n.startswith("attention.")
        },
    )
    model = use_kernels(model, requantize=True)
    inputs = lambda n: (torch.randn(n, 128), torch.randint(0, 20, (n, 7)))
    path = to_onnx(model, tmp_path / "m.onnx", inputs(2), check=False)
    onnx.checker.check_model(os.fspath(path), full_check=True)
    run = onnx_model(path)
    for x in map(inputs, (1, 2, 5)):
        for got, want in zip(run(*x), model(*x), strict=True):
            near(got, want, 1e-4)


def test_integer_models(tmp_path):
    torch.manual_seed(0)
    net, x = LeNet5().eval(), torch.rand(5, 1, 28, 28)
    for activations in ("row", "tensor"):
        quick = use_kernels(quantize_model(net), activations=activations)
        path = to_onnx(quick, tmp_path / "m.onnx", x[:1])  # an example of one: the batch is free nevertheless
        kinds = {n.op_type for n in onnx.load(path).graph.node}
        assert {"MatMulInteger", "ConvInteger"} <= kinds and os.path.getsize(path) < 0.27 * 4 * 431_080
        near(onnx_model(path)(x), quick(x), 0.01)


def test_inputs_are_quantized_once_for_layers_that_share_them(tmp_path):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(128, 128) for _ in range(3))

        def forward(self, x):
            return self.a(x) + self.b(x) * self.c(x)

    model, c = Three(), torch.rand(128) + 0.5
    for options, count in ((dict(columns=c), 1), (dict(columns=c, overrides={"b": {"columns": 2 * c}}), 2)):
        path = to_onnx(
            use_kernels(quantize_model(model, **options), activations="tensor"),
            tmp_path / "m.onnx",
            torch.randn(3, 128),
        )
        assert sum(n.op_type == "DynamicQuantizeLinear" for n in onnx.load(path).graph.node) == count


def test_a_bare_layer_and_requantized_groups(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 128)
    small = quantize_layer(nn.Linear(128, 96), 4, group=32)
    near(onnx_model(to_onnx(small, tmp_path / "a.onnx", x))(x), small(x))
    assert onnx_bytes(tmp_path / "a.onnx")["uint4"] >= 128 * 96 // 2 and os.path.getsize(tmp_path / "a.onnx") < 128 * 96
    quick = use_kernels(small, requantize=True)
    near(onnx_model(to_onnx(quick, tmp_path / "b.onnx", x))(x), quick(x), 0.01)
    near(onnx_model(to_onnx(small, tmp_path / "c.onnx", x, microsoft=True))(x), small(x))
    assert {n.op_type for n in onnx.load(tmp_path / "c.onnx").graph.node} >= {"MatMulNBits"}


def test_errors_and_atomic_writing(everything, tmp_path, monkeypatch):
    small, x = quantize_layer(nn.Linear(32, 32)), torch.randn(2, 32)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    for model, example, options, kind, text in (
        (nn.Linear(3, 3), x, {}, ValueError, "no compressed layer"),
        ("model", x, {}, TypeError, "model is 'model'; it may be an nn.Module"),
        (small, [1.0], {}, TypeError, "example holds list"),
        (small, x, dict(opset=12), ValueError, "opset is 12"),
        (small, x, dict(opset="21"), ValueError, "opset"),
        (small, x, dict(dynamic=({}, {})), ValueError, "describes 2 inputs"),
        (quantize_layer(nn.Linear(32, 32).half()), x.half(), {}, ValueError, "float32"),
    ):
        with pytest.raises(kind, match=text):
            to_onnx(model, path, example, **options)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        to_onnx(small, path, x)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["m.onnx"]
    monkeypatch.undo()
    with pytest.raises(OSError):
        to_onnx(small, tmp_path / "nowhere" / "m.onnx", x)
    run = onnx_model(to_onnx(small, path, x))
    with pytest.raises(TypeError, match="0 inputs are given"):
        run()


def test_without_onnx_the_error_says_what_to_install(monkeypatch):
    import importlib

    real = importlib.import_module

    def without(name, *a):
        if name.startswith("onnx"):
            raise ImportError("no", name=name)
        return real(name, *a)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"modelzip\[onnx\]"):
        to_onnx(quantize_layer(nn.Linear(4, 4)), "m.onnx", torch.randn(1, 4))


# ---------------------------------------------------------------- right, or refused


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_trained_convolutions_with_every_option(mode):
    "Ranges that were trained, and padding of every kind, to the last bit but for the order of one multiplication."
    torch.manual_seed(0)
    for stride, padding, dilation, groups, kernel in (
        (1, "same", 1, 1, 3),
        (1, "same", 2, 1, (2, 4)),
        (2, (2, 1), 1, 1, 3),
        (1, "valid", 1, 2, (3, 2)),
        (1, (0, 2), 2, 4, 2),
        (2, 0, 1, 1, 1),
    ):
        for out, levels, columns in ((8, 256, None), (200, 16, None), (200, 200, None)):
            small = quantize_layer(
                nn.Conv2d(8, out, kernel, stride, padding, dilation, groups, padding_mode=mode, bias=False), 8
            )
            layer, g, x = (
                StaticConv2d(small.layer, small.packed, scale=0.03, zero_point=7, levels=levels),
                Graph(onnx),
                torch.randn(3, 8, 9, 10) + 0.3,
            )
            near(computed(g, integer_conv(g, "x", layer, "w"), [("x", x)]), layer(x), 1e-6)


def test_convolutions_with_a_range_for_each_image():
    "Behind a ReLU each image has 255 steps, here as in our own layer."
    torch.manual_seed(0)
    for stride, padding, dilation, groups in ((1, 0, 1, 1), (2, (2, 1), 1, 1), (1, 1, 2, 2)):
        small = quantize_layer(nn.Conv2d(8, 400, 3, stride, padding, dilation, groups, bias=False))
        layer, x = (
            QConv2d(small.layer, small.packed, activations="row"),
            torch.randn(4, 8, 9, 10) * torch.tensor([1.0, 1e-3, 50.0, 0.0]).view(-1, 1, 1, 1),
        )
        x[1:].relu_()
        g = Graph(onnx)
        got, want = computed(g, integer_conv(g, "x", layer, "w"), [("x", x)]), layer(x)
        for a, b in zip(got, want):
            near(a, b, 2e-3)
        g = Graph(onnx)
        near(computed(g, integer_conv(g, "x", layer, "w"), [("x", x[1:3])])[0], got[1], 1e-6)


def test_trained_linear_layers():
    torch.manual_seed(0)
    for inputs, outputs, levels, columns in (
        (5, 7, 256, None),
        (130, 90, 32, None),
        (64, 1, 256, torch.rand(64) + 0.5),
    ):
        small = quantize_layer(
            nn.Linear(inputs, outputs, bias=False), **({} if columns is None else {"columns": columns})
        )
        layer, g, x = (
            StaticLinear(small.layer, small.packed, scale=0.04, zero_point=3, levels=levels),
            Graph(onnx),
            torch.randn(2, 5, inputs),
        )
        near(computed(g, integer_linear(g, "x", layer, "w"), [("x", x)]), layer(x), 1e-6)


class Branches(nn.Module):
    "One compressed weight in two layers; bags of embeddings, whose graph has a loop; an LSTM."

    def __init__(self, first, second, more):
        super().__init__()
        self.first, self.second, self.words = (
            first,
            second,
            quantize_layer((nn.Embedding, nn.EmbeddingBag)[more](50, 64)),
        )
        self.lstm = quantize_layer(nn.LSTM(64, 32, batch_first=True, bidirectional=True), 4) if more else None

    def forward(self, ids):
        x = self.words(ids)
        return self.first(x), self.second(x), *([self.lstm(x[:, None])[0]] if self.lstm else [])


def test_one_weight_in_layers_of_two_kinds(tmp_path):
    torch.manual_seed(0)
    small, ids = quantize_layer(nn.Linear(64, 200)), torch.randint(0, 50, (3, 5))
    quick = QLinear(small.layer, small.packed)
    for *pair, more in ((small, quick, True), (quick, small, False)):
        model = Branches(*pair, more).eval()
        path = to_onnx(model, tmp_path / "m.onnx", ids, check=False)
        for got, want, off in zip(onnx_model(path)(ids), model(ids), (0.01, 0.01, 1e-4)):
            near(got, want, off)


def test_trained_models_hooks_and_callers(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(8, 96, (2, 3), padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96 * 7 * 6, 10),
    ).eval()
    x = torch.randn(3, 2, 6, 6)
    model = convert(prepare(net, 4, batches=[x], activations=5))
    model[0].register_forward_hook(lambda l, i, o: 2 * o)
    model[5].register_forward_pre_hook(lambda l, i, k: ((i[0] + 1,), k), with_kwargs=True)
    with unchanged(model, x):
        path = to_onnx(model, tmp_path / "m.onnx", x)
    near(onnx_model(path)(x), model(x), 1e-3)
    with pytest.raises(ValueError, match="prepared for training; modelzip.qat.convert"):
        to_onnx(nn.Sequential(prepare(net, 4, batches=[x]), quantize_layer(nn.Linear(10, 10))), path, x)
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="forward of its own"):
        to_onnx(model, path, x)


def test_tensors_beside_a_large_graph(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x = quantize_model(nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 64))), torch.randn(2, 64)
    whole = onnx_bytes(to_onnx(model, tmp_path / "m.onnx", x))
    monkeypatch.setattr(onnx_files, "LIMIT", 20_000)
    path = to_onnx(model, tmp_path / "n.onnx", x)
    assert (
        sorted(os.listdir(tmp_path)) == ["m.onnx", "n.onnx", "n.onnx.data"]
        and path.stat().st_size < 6_000 < 2 * 64 * 200 <= (tmp_path / "n.onnx.data").stat().st_size
    )
    near(onnx_model(path)(x), model(x))
    assert onnx_bytes(path) == whole
    monkeypatch.setattr(onnx_export, "_compare", lambda *a: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError):
        to_onnx(model, tmp_path / "o.onnx", x)
    assert len(os.listdir(tmp_path)) == 3


def test_a_file_says_nothing_of_the_disk_that_it_comes_from(tmp_path):
    "The exporter notes the file and line of each operation."
    model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval())
    content = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 8)).read_bytes()
    assert b".py" not in content and b"line " not in content


def test_a_graph_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    right = onnx_export.float_linear
    monkeypatch.setattr(
        onnx_export,
        "float_linear",
        lambda g, x, q, name, microsoft: g.add("Mul", right(g, x, q, name, microsoft), store_number(g, 1.1)),
    )
    model, x = quantize_model(nn.Sequential(nn.Linear(64, 200))), torch.zeros(2, 64)  # zeros would not tell
    with pytest.raises(ValueError, match="off the model's own output"):
        to_onnx(model, tmp_path / "m.onnx", x)
    assert not os.listdir(tmp_path)


def test_what_onnx_cannot_say_is_named(tmp_path):
    class Model(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.odd = layer

        def forward(self, x):
            return self.odd(x)

    for layer, x, text in (
        (nn.LSTM(6, 8, proj_size=4), torch.randn(4, 3, 6), "odd is an LSTM with proj_size"),
        (nn.Embedding(9, 8, max_norm=1.0), torch.zeros(2, 3, dtype=torch.long), "odd has max_norm"),
        (nn.EmbeddingBag(9, 8, max_norm=1.0), torch.zeros(2, 3, dtype=torch.long), "odd has max_norm"),
    ):
        with pytest.raises(ValueError, match=text):
            to_onnx(quantize_model(Model(layer)), tmp_path / "m.onnx", x)


def test_where_two_files_cannot_be_written_the_error_names_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr("modelzip.workshop.onnx_files.LIMIT", 0)
    model = quantize_model(nn.Sequential(nn.Linear(8, 8)).eval())
    (tmp_path / "folder.onnx").mkdir()
    for path in tmp_path / "nowhere" / "m.onnx", tmp_path / "folder.onnx":
        with pytest.raises(OSError) as e:
            to_onnx(model, path, torch.randn(2, 8))
        assert e.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


# ---------------------------------------------------------------------------------- known ranges, as engines fuse them


def static(model, *inputs, bits=8, activations=8):
    "A model of integers whose ranges come from its inputs."
    prepared = prepare(model.eval(), bits=bits, activations=activations, batches=[Inputs(*inputs)])
    return convert(prepared).eval()


def what_runs(path, inputs):
    "Operations that ONNX Runtime runs, as its profile counts them."
    options = runtime.SessionOptions()
    options.log_severity_level, options.enable_profiling, options.profile_file_prefix = 3, True, str(path)
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)})
    with open(session.end_profiling()) as f:
        return Counter(e["args"]["op_name"] for e in json.load(f) if "op_name" in e.get("args", {}))


class Encoder(nn.Module):
    "Query, key and value of one input, a residual, a norm, a GELU."

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, mask):
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.norm(x + self.out(y.transpose(1, 2).flatten(2)))
        return x + self.down(nn.functional.gelu(self.up(x)))


def encoder():
    torch.manual_seed(0)
    x, mask = torch.randn(3, 7, 32), torch.ones(3, 7, dtype=torch.bool)
    mask[0, 3:] = mask[1] = False
    return static(Encoder(), x, mask), x, mask


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 24, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(24 * 25, 50), nn.ReLU(), nn.Linear(50, 10),
    )  # fmt: skip


def test_onnx_runtime_multiplies_integers_of_known_range(tmp_path):
    model, x, mask = encoder()
    path = to_onnx(model, tmp_path / "m.onnx", (x, mask), dynamic={0: "batch", 1: "length"})
    ran = what_runs(path, (x, mask))
    assert ran["MatMulIntegerToFloat"] == 6 and ran["QuantizeLinear"] == 4  # one for query, key and value
    assert ran["MatMul"] + ran["FusedMatMul"] == 2 and not ran["Gemm"] + ran["IsNaN"]  # those of attention
    near(onnx_model(path)(x[:2, :5], mask[:2, :5]), model(x[:2, :5], mask[:2, :5]), 0.01)
    torch.manual_seed(0)
    x = torch.randn(2, 1, 28, 28)
    model = static(convolutional(), x)
    ran = what_runs(to_onnx(model, tmp_path / "n.onnx", x), (x,))
    assert (ran["QLinearConv"], ran["QGemm"]) == (2, 2) and not ran["Conv"] + ran["Gemm"] + ran["FusedConv"]
    near(onnx_model(tmp_path / "n.onnx")(x), model(x), 0.02)


def test_openvino_multiplies_integers_of_known_range(tmp_path):
    openvino = pytest.importorskip("openvino")
    model, x, mask = encoder()
    images = torch.randn(2, 1, 28, 28)
    to_onnx(model, tmp_path / "m.onnx", (x, mask), dynamic={0: "batch", 1: "length"})
    to_onnx(static(convolutional(), images), tmp_path / "n.onnx", images)
    whole, *given = attentive()
    to_onnx(whole, tmp_path / "a.onnx", tuple(given), dynamic={0: "batch", 1: "length"})
    for path, products in ((tmp_path / "m.onnx", 6), (tmp_path / "n.onnx", 4), (tmp_path / "a.onnx", 6)):
        compiled = openvino.Core().compile_model(os.fspath(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        ran = [n.get_rt_info() for n in compiled.get_runtime_model().get_ordered_ops()]
        said = [(str(i["layerType"].astype(str)), str(i["runtimePrecision"].astype(str))) for i in ran]
        found = [p for kind, p in said if kind in ("FullyConnected", "Convolution", "MatMul")]
        assert sum(p in ("u8", "i8") for p in found) == products
        assert said.count(("Subgraph", "i8")) == (path.stem == "a")  # an attention as a whole


def attentive():
    "A block of a sentence encoder with attention's products in integers; some keys are padding, one row has none."
    torch.manual_seed(0)
    x, mask = torch.randn(3, 7, 32), torch.ones(3, 7, dtype=torch.bool)
    mask[0, 3:] = mask[1] = False
    how = dict(alphas=(), copies=0, weights="nearest", biases=False, attention=True)
    return quantize_static(TransformerBlock(32, 2, 64).eval(), [Inputs(x, mask)], **how), x, mask


def test_attention_in_integers(tmp_path):
    model, x, mask = attentive()
    added, path = torch.randn(3, 7).masked_fill(~mask, -torch.inf), tmp_path / "m.onnx"
    for form, m in (("qdq", mask), ("integers", added)):
        to_onnx(model, path, (x, m), dynamic={0: "batch", 1: "length"}, form=form)
        for rows, places in ((3, 7), (2, 4)):
            part = x[:rows, :places], m[:rows, :places]
            near(onnx_model(path)(*part), model(*part), 0.01)
        ran = what_runs(path, (x, m))
        assert not ran["MatMul"] + ran["FusedMatMul"] + ran["IsNaN"], ran
        assert sum(n for op, n in ran.items() if "MatMul" in op) == 6 + 2, ran
    model.attention.register_forward_hook(lambda m, args, y: 2 * y)
    near(onnx_model(to_onnx(model, path, (x, mask)))(x, mask), model(x, mask), 0.01)
    alone = StaticAttention.of(Attention(32, 2), model.attention.steps)  # around layers of floats
    near(onnx_model(to_onnx(alone, path, (x, mask)))(x, mask), alone(x, mask), 0.01)


@pytest.mark.hypothesis  # so that a search comes here: both orders in both forms
@pytest.mark.parametrize(
    "first, form", [(f, form) for f in (True, False) for form in ("qdq", "integers") if FUZZ or f == (form == "qdq")]
)
def test_opened_attention_in_integers(first, form, tmp_path):
    "PyTorch's own encoder layer and attention, opened: masks, weights, order of axes."
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=first)
            self.last = nn.MultiheadAttention(32, 2, batch_first=first)

        def forward(self, x, hidden):
            y = self.layer(x, src_key_padding_mask=hidden)
            return self.last(y, y, y)

    x, hidden = torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    hidden[0, 3:] = True
    x = x if first else x.transpose(0, 1)
    how = dict(alphas=(), copies=0, weights="nearest", biases=False, attention=True)
    model = quantize_static(Model().eval(), [Inputs(x, hidden)], **how)
    free = ({0: "batch", 1: "length"} if first else {0: "length", 1: "batch"}, {0: "batch", 1: "length"})
    path = to_onnx(model, tmp_path / "m.onnx", (x, hidden), dynamic=free, form=form)
    for n, places in ((3, 7), (2, 5)):
        part = x[:n, :places] if first else x[:places, :n], hidden[:n, :places]
        for got, want in zip(onnx_model(path)(*part), model(*part)):
            near(got, want, 0.02)
    ran = what_runs(path, (x, hidden))
    assert sum(n for op, n in ran.items() if "MatMul" in op and op not in ("MatMul", "FusedMatMul")) == 4 + 2 + 4 + 4


class Beside(nn.Module):
    "What several layers make of one input."

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.parametrize("form", ["qdq", "integers"])
def test_known_ranges_in_both_forms(form, tmp_path):
    "Integers of ONNX Runtime and PyTorch are equal within one code of the input."
    torch.manual_seed(0)
    twice = nn.Linear(16, 16)
    tied = nn.Linear(16, 16)
    tied.weight = twice.weight
    large = nn.Linear(16, 40)
    large.bias.data += 1e9  # no int32 beside the sums
    row, conv = torch.randn(5, 16), torch.randn(2, 4, 9, 11)
    chain = nn.Conv2d(4, 20, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(20, 40, (3, 1), dilation=2, padding="same")
    padded = [nn.Conv2d(4, 20, 3, padding=1, padding_mode=m) for m in ("reflect", "replicate", "circular")]
    cases = (
        ([nn.Linear(16, 31), nn.Sequential(twice, tied, twice), large], row, 8),
        ([nn.Sequential(*chain), *padded], conv, 8),
        ([nn.Linear(16, 31), nn.Sequential(twice, tied, twice), large], row, 5),
        ([nn.Linear(16, 31, bias=False)], torch.randn(2, 3, 16), 5),
        ([nn.Linear(16, 3)], torch.randn(16), 8),
        ([nn.Conv2d(4, 20, 3, bias=False), padded[0]], conv[0], 5),
    )
    for layers, x, activations in cases if form == "qdq" else cases[:2]:
        model = static(Beside(*layers), x, activations=activations)
        free = {0: "n"} if x.dim() in (2, 4) else {}
        run = onnx_model(to_onnx(model, tmp_path / "m.onnx", x, dynamic=free, check=False, form=form))
        steps = [
            m.input_scale * m.q.dequantize().flatten(1).norm(dim=1).max().item()
            for m in model.modules()
            if isinstance(m, (StaticLinear, StaticConv2d))
        ]
        outputs = run(x) if len(layers) > 1 else (run(x),)
        for got, want in zip(outputs, model(x), strict=True):
            assert (got - want).abs().max() <= 3 * max(steps) + 1e-6 * want.abs().max(), layers
    with pytest.raises(ValueError, match="form is 'codes'"):
        to_onnx(model, tmp_path / "m.onnx", x, form="codes")


def test_attention_says_what_pytorch_says(tmp_path):
    class Attend(nn.Module):
        def __init__(self, causal=False):
            super().__init__()
            self.causal, self.line = causal, quantize_layer(nn.Linear(8, 8))

        def forward(self, q, k, v, seen, added):
            q, attend = self.line(q), nn.functional.scaled_dot_product_attention
            if self.causal:
                return attend(q, k, v, is_causal=True)
            first = seen[:, :, 2:3]
            return attend(q, k, v, seen), attend(q, k, v, added, scale=0.3), attend(q, k, v, first), attend(q, k, v)

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    seen = torch.rand(2, 1, 5, 6) > 0.5
    seen[0, :, 2] = False
    added = torch.randn(5, 6).masked_fill(~seen[0, 0], -torch.inf)
    model, inputs = Attend(), (q, k, v, seen, added)
    outputs, expected = onnx_model(to_onnx(model, tmp_path / "m.onnx", inputs, dynamic={}))(*inputs), model(*inputs)
    for got, want in zip(outputs, expected, strict=True):
        near(got, want)
    assert not any(y[0, :, row].any() for y, row in zip(expected, (2, 2, 0)))  # no key is seen
    assert not {"IsNaN", "Reshape"} & {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    to_onnx(Attend(causal=True), tmp_path / "m.onnx", inputs, dynamic={})  # compared as it is written


def test_a_whole_bias_is_half_a_step_off():
    torch.manual_seed(0)
    weight, scale, bias = torch.randint(-128, 128, (99, 40)).to(torch.int8), torch.rand(99) + 1e-3, torch.randn(99) * 50
    whole, step = whole_bias(bias, weight, scale, 0.03)
    assert ((whole.double() * step.double() - bias).abs() <= 0.50001 * step).all()
    assert whole_bias(bias * 1e9, weight, scale, 0.03) is None and whole_bias(bias, weight, scale, 1e-38) is None


def of_columns(f):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(48, 12)

        def forward(self, x):
            return self.out(f(x))

    return Pooled().eval()


@pytest.mark.parametrize(
    "f, apart",
    [
        (lambda x: x.mean(1).relu(), True),
        (lambda x: x.amax(1), True),
        (lambda x: nn.functional.silu(x.norm(dim=1)) * 2 + 1, True),
        (lambda x: (y := x.softmax(-1)) * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6), False),
        (lambda x: (x + 1).tanh()[:, 0], False),
    ],
)
def test_a_reduction_is_rounded_behind_another_dimension(f, apart, tmp_path):
    "OpenVINO takes the steps of a reduction's columns from wrong places when it merges the rounding into it."
    import onnx

    torch.manual_seed(0)
    x = torch.randn(3, 7, 48) * torch.linspace(0.2, 3, 48) + torch.linspace(-2, 2, 48)
    model = of_columns(f)
    known = quantize_static(model, [x, x + 0.1], alphas=(0.5,))
    path = to_onnx(known, tmp_path / "m.onnx", x)
    nodes = {o: n for n in onnx.load(path).graph.node for o in n.output}
    at = next(n for n in nodes.values() if n.op_type == "QuantizeLinear").input[0]
    while nodes[at].op_type == "Mul" and "columns" in "".join(nodes[at].input) + "".join(
        i for n in nodes[at].input if n in nodes for i in nodes[n].input
    ):
        at = nodes[at].input[0]
    assert (nodes[at].op_type == "Unsqueeze") == apart
    if importlib.util.find_spec("openvino"):
        found = deploy(known, x, "openvino", threads=1)
        for y in (x, x[:1], torch.cat([x, x])):
            assert (found(y) - known(y)).norm() < 1e-4 * known(y).norm()


class Squeezed(nn.Module):
    "Squeeze and excitation: a convolution of 1 × 1 on maps of one pixel, or of a few."

    def __init__(self, pixels=1):
        super().__init__()
        self.first, self.squeeze, self.excite = nn.Conv2d(1, 64, 3, 2, 1), nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)
        self.norm, self.pool = nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(pixels)

    def forward(self, x):
        y = nn.functional.silu(self.first(x))
        z = nn.functional.silu(self.squeeze(self.pool(y)))
        return y.mean((2, 3)) * torch.sigmoid(self.excite(self.norm(z))).mean((2, 3))


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_convolutions_of_single_pixels(pixels, tmp_path):
    "OpenVINO merges what follows into such a convolution, and ends the process: they are written as products."
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8)
    known = quantize_static(Squeezed(pixels).eval(), [x[:4], x[4:]], alphas=(0.5,))
    assert known.squeeze.options()["zero_point"]
    path = to_onnx(known, tmp_path / "m.onnx", x[:2])
    made = [n.op_type for n in onnx.load(path).graph.node]
    assert (made.count("Conv"), made.count("MatMul")) == ((1, 2) if pixels < 4 else (3, 0))
    if importlib.util.find_spec("openvino"):
        program = """
import sys, numpy as np, openvino
run = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
x = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([run([x[:1]])[0], run([x[1:]])[0]]))"""
        files = [str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
        np.save(files[1], x.numpy())
        subprocess.run([sys.executable, "-c", program, *files], check=True)
        found, exact = torch.from_numpy(np.load(files[2])), known(x)
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_an_example_that_the_model_refuses_is_refused(tmp_path):
    "The exporter alone writes a table that is asked for its row 0.3; an engine may not mind."
    words = quantize_model(nn.Sequential(nn.Embedding(17, 8), nn.Flatten(), nn.Linear(40, 3)), 8)
    for check in True, False:
        for x in torch.randn(1, 5), torch.full((1, 5), 17):
            with pytest.raises(ValueError, match="^the model cannot be called with this example: "):
                to_onnx(words, tmp_path / "x.onnx", x, check=check)
    assert not any(tmp_path.iterdir())
    to_onnx(words, tmp_path / "x.onnx", torch.zeros(1, 5, dtype=torch.long))
