"""LSTM and GRU in integers: PyTorch's loop against single integer products, calls of every form, whole models."""

import copy, pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from guards import codes_alone, examples, unchanged
from modelzip import pack
from modelzip.kernels import QLinear, QRecurrent, capabilities, use_kernels, what_runs
from modelzip.quant import Dequantize, quantize_layer, quantize_model
from modelzip.workshop import engines, integer_recurrent
from modelzip.workshop.alone import serving_copy
from modelzip.workshop.integer_recurrent import loop_is_right, matrix_names, stepwise

pytestmark = pytest.mark.skipif(not loop_is_right(), reason="PyTorch's integer loop is missing here")
BOTH = pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def integers(net, *, how={}, **options):
    small = quantize_layer(net, **how)
    return small, QRecurrent(small.layer, small.packed, **options)


def parts(answer):
    "Tensors of an output, in order."
    if isinstance(answer, torch.Tensor):
        return [answer]
    if isinstance(answer, PackedSequence):
        return [answer.data]
    return [t for a in answer for t in parts(a)]


def near(got, want, relative):
    for a, b in zip(parts(got), parts(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= relative * b.norm()


def starts(net, batch):
    shape = net.num_layers * (1 + net.bidirectional), *batch, net.hidden_size
    two = torch.randn(shape).tanh(), torch.randn(shape)
    return two if isinstance(net, nn.LSTM) else two[0]


def single(layer):
    "For each cell its two integer products, one operation a product."
    held, inner = layer._parts()
    q = {n: engines.as_int8(p.q) for n, p in held.items()}
    products = []
    for name in matrix_names(inner):
        bias = inner._parameters.get(name.replace("weight", "bias"))
        packed = engines.pack_linear(*q[name], bias=torch.zeros(len(q[name][1])) if bias is None else bias)
        reduce = capabilities().reduce_range
        products.append(lambda x, p=packed: torch.ops.quantized.linear_dynamic.default(x.contiguous(), p, reduce))
    return [*zip(products[::2], products[1::2])]


@settings(max_examples=examples(25), deadline=None)
@given(
    st.sampled_from([nn.LSTM, nn.GRU]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.sampled_from([dict(), dict(symmetric=False), dict(bits=4), dict(per_channel=False)]),
    st.booleans(),
)
def test_recurrent_kernel_equals_single_products(cls, layers, both, bias, inputs, hidden, lengths, how, starting):
    "All integers of PyTorch's loop are those of one product after the other."
    net = cls(inputs, hidden, layers, bias, bidirectional=both)
    small, quick = integers(net, how=how)
    x = pack_sequence([torch.randn(n, inputs) for n in sorted(lengths)[::-1]])
    hx = starts(net, [len(lengths)]) if starting else None
    first = hx if isinstance(hx, tuple) else (hx,)
    if hx is None:
        shape = layers * (1 + both), len(lengths), hidden
        first = (torch.zeros(shape),) * (1 + (cls is nn.LSTM))
    want = stepwise(x.data, x.batch_sizes.tolist(), first, single(quick), 1 + both)
    for a, b in zip(parts(quick(x, hx)), want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)
    plain = copy.deepcopy(quick)
    plain.kernel = "plain"
    near(plain(x, hx), small(x, hx), 0.2 if how else 0.05)


@BOTH
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activations", ["tensor", "row"])
def test_calls_of_every_form(cls, batch_first, activations):
    "Padded, packed in any order, and lone sequences, with and without first states: the structure of the float layer."
    net = cls(20, 48, 2, batch_first=batch_first, bidirectional=True)
    _, quick = integers(net, activations=activations)
    plain = copy.deepcopy(quick)
    plain.kernel = "plain"
    sequences = [torch.randn(n, 20) for n in (4, 7, 1)]
    ragged = pack_sequence(sequences, enforce_sorted=False)
    for x, batch in ((torch.randn(3, 3, 20), [3]), (torch.randn(5, 20), []), (ragged, [3])):
        for hx in (None, starts(net, batch)):
            got, want = quick(x, hx), net(x, hx)
            near(got, want, 0.03)
            near(plain(x, hx), got, 0.01)
            assert type(got[0]) is type(want[0]) and type(got[1]) is type(want[1])
            if isinstance(x, PackedSequence):
                assert all(a is b for a, b in zip(got[0][1:], x[1:]))
    for sequence, got in zip(sequences, zip(*[t.unbind(1) for t in parts(quick(ragged)[1])])):
        near(got, [t for t in parts(quick(sequence)[1])], 1e-6 if activations == "row" else 0.03)


@BOTH
def test_sequences_alone_do_not_depend_on_the_others(cls):
    net = cls(24, 40, 2, bidirectional=True)
    _, quick = integers(net, activations="row")
    x = torch.randn(6, 5, 24) * torch.logspace(-1, 2, 5)[:, None]
    y = quick(x)[0]
    for i in range(5):
        assert torch.equal(y[:, i], quick(x[:, i])[0]) and torch.equal(y[:, i], quick(x[:, i : i + 2])[0][:, 0])
    served = serving_copy(integers(net)[1])
    assert torch.equal(served(x)[0], y) and served.activations == "row"


@BOTH
@pytest.mark.parametrize("activations", ["tensor", "row"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 1e-30, 0.0])
def test_inputs_of_every_size(cls, activations, bad):
    "What is not finite stays in its sequence, and is what a float layer makes of it; what is tiny or huge is right."
    net = cls(24, 40, 2)
    small, quick = integers(net, activations=activations)
    for x in (torch.randn(6, 4, 24), torch.full((6, 4, 24), bad), torch.zeros(6, 4, 24)):
        x[2, 1, 3] = bad
        y, want = quick(x), small(x)
        for a, b in zip(parts(y), parts(want)):
            finite = b.isfinite()
            assert torch.equal(finite, a.isfinite()) and (a - b)[finite].norm() <= 0.03 * b[finite].norm()
    x = torch.randn(6, 4, 24)
    states = starts(net, [4])
    for s in parts(states):
        kept = s.clone()
        s[1, 2, 5] = bad
        y, want = quick(x, states), small(x, states)
        for a, b in zip(parts(y), parts(want)):
            finite = b.isfinite()
            assert torch.equal(finite, a.isfinite()) and (a - b)[finite].norm() <= 0.03 * b[finite].norm() + 1e-3
        s.copy_(kept)


def test_what_is_refused_and_why():
    def why(net, overrides=None, **how):
        model = quantize_model(nn.ModuleDict({"a": net, "b": nn.Linear(400, 400)}), overrides=overrides, **how)
        quick = use_kernels(model)
        assert type(quick["a"]) in (Dequantize, type(net)) and type(quick["b"]) is QLinear or how
        rows = {n: r for n, _, r in what_runs(quick)}
        assert all(r in repr(quick["a"]) for n, r in rows.items() if n.startswith("a.") and r.startswith("expands"))
        return rows

    big = lambda cls=nn.LSTM, **more: cls(8, 400, **more)
    assert "too small to gain" in why(nn.LSTM(64, 64))["a.weight_ih_l0"]
    assert "proj_size" in why(big(proj_size=8))["a.weight_hr_l0"]
    assert "its weight_hh_l0 is not compressed" in why(big(), {"a.weight_hh_l0": None})["a.weight_ih_l0"]
    assert "weight_hh_l0: its codes have 9 bits" in why(big(), {"a.weight_hh_l0": {"bits": 9}})["a.weight_hh_l0"]
    assert "groups of 8" in why(big(), {"a.weight_*": {"group": 8}})["a.weight_ih_l0"]
    assert "RNN has no integer kernel" in why(big(nn.RNN))["a.weight_ih_l0"]
    assert "no integer kernel" in why(nn.LSTMCell(8, 400))["a.weight_ih"]
    assert "column scales" in why(big(), {"a.weight_ih_l0": {"columns": torch.ones(8)}})["a.weight_ih_l0"]

    class Mine(nn.LSTM):
        pass

    assert "Mine" in why(big(Mine))["a.weight_ih_l0"]
    with pytest.raises(ValueError, match="layer cannot be a QRecurrent: its weight_hh_l0 is not compressed"):
        QRecurrent(nn.LSTM(4, 4), quantize_layer(nn.LSTM(4, 4), name="weight_ih_l0").packed)
    _, quick = integers(nn.LSTM(5, 9), activations="row")
    quick.where = "tagger"
    for bad, hx, error, said in (
        (torch.randn(3, 2, 4), None, ValueError, r"'tagger' has shape \(3, 2, 4\)"),
        (torch.randn(5), None, ValueError, "2 or 3 dimensions"),
        (torch.ones(3, 2, 5, dtype=torch.int64), None, TypeError, "int64"),
        ("text", None, TypeError, "is a str"),
        (torch.randn(3, 2, 5), torch.zeros(1, 2, 9), TypeError, "two tensors"),
        (torch.randn(3, 2, 5), (torch.zeros(1, 2, 9), torch.zeros(1, 3, 9)), ValueError, r"hx .* \(1, 2, 9\)"),
    ):
        with pytest.raises(error, match=said):
            quick(bad, hx)


class Tagger(nn.Module):
    def __init__(self, cls=nn.LSTM):
        super().__init__()
        self.words, self.rnn = nn.Embedding(50, 32), cls(32, 450, batch_first=True)
        self.out = nn.Linear(450, 40)

    def forward(self, ids):
        return self.out(self.rnn(self.words(ids))[0])


@BOTH
def test_whole_models(cls, tmp_path):
    "Exchanged, printed, saved, loaded, copied, pickled; the given model stays as it is, and the codes are shared."
    model, ids = quantize_model(Tagger(cls).eval()), torch.randint(0, 50, (3, 6))
    with unchanged(model):
        quick = use_kernels(model)
    assert type(quick.rnn) is QRecurrent and quick.rnn.packed is model.rnn.packed
    assert quick.rnn.layer.packed is model.rnn.layer.packed and quick.rnn.layer is not model.rnn.layer
    want = quick(ids)
    near(want, model(ids), 0.03)
    rows = {n: r for n, _, r in what_runs(quick)}
    assert (
        "fbgemm in PyTorch's loop" in rows["rnn.weight_ih_l0"] and rows["rnn.weight_hh_l0"] == rows["rnn.weight_ih_l0"]
    )
    assert f"QRecurrent({cls.__name__} 32→450" in repr(quick)
    numbers = sum(p.numel() for n, p in Tagger(cls).rnn.named_parameters() if "weight" in n)
    assert 2 * numbers < quick.rnn.nbytes < 2.1 * numbers
    pack.save(quick, tmp_path / "m.mz")
    for again in (pack.load(tmp_path / "m.mz", Tagger(cls)), copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        assert type(again.rnn) is QRecurrent and torch.equal(again(ids), want)
        assert again.rnn.prepared is not quick.rnn.prepared
    other = use_kernels(quantize_model(Tagger(cls).eval()))
    other(ids)
    other.load_state_dict(quick.state_dict())
    assert torch.equal(other(ids), want)
    quick.rnn.layer.layer.bias_hh_l0.data.add_(1)  # a bias that is written to is heard
    assert (quick(ids) - want).norm() > 0.01 * want.norm()
    original = Tagger(cls)
    codes_alone(original, use_kernels(quantize_model(original)).eval(), ids)


def test_hooks_of_all_wrappers_go_on():
    net, seen = quantize_model(nn.Sequential(nn.LSTM(8, 400))), []
    net[0].register_forward_hook(lambda *a: seen.append("outer"))
    net[0].layer.layer.register_forward_hook(lambda *a: seen.append("inner"))
    quick, x = use_kernels(net), torch.randn(3, 2, 8)
    for model in (net, quick):
        seen.clear()
        model(x)
        assert seen == ["inner", "outer"]
    seen.clear()
    quick(x * float("nan"))
    assert seen == ["inner", "outer"]


@BOTH
def test_floats_where_they_were_quicker(cls, monkeypatch, tmp_path):
    "Measured beside other layers; small ones, which nobody exchanges otherwise, are kept expanded."
    model, ids = quantize_model(Tagger(cls).eval()), torch.randint(0, 50, (3, 6))
    monkeypatch.setattr("modelzip.kernels.is_slower", lambda *a: False)
    for chosen in ({"rnn"}, set()):
        monkeypatch.setattr("modelzip.kernels.quicker_as_floats", lambda *a, c=chosen: set(c))
        quick = use_kernels(model, example=ids)
        assert quick.rnn.floats == bool(chosen) == ("computes in floats" in repr(quick.rnn))
    floats = use_kernels(quantize_model(nn.Sequential(cls(8, 16))), example=torch.randn(3, 2, 8))
    assert floats[0].floats and type(floats[0]) is QRecurrent
    monkeypatch.setattr("modelzip.kernels.quicker_as_floats", lambda *a: {"rnn"})
    quick = use_kernels(model, example=ids)
    near(quick(ids), model(ids), 0.03)
    near(quick.rnn(torch.randn(2, 3, 32).fill_(0.3)), model.rnn(torch.full((2, 3, 32), 0.3)), 1e-5)
    pack.save(quick, tmp_path / "m.mz")
    again = pack.load(tmp_path / "m.mz", Tagger(cls))
    assert again.rnn.kernel == "floats" and torch.equal(again(ids), quick(ids))


def test_requantized_groups():
    net, x = nn.LSTM(32, 64), torch.randn(5, 2, 32)
    small = quantize_layer(net, 4, group=16)
    assert "groups" in QRecurrent.refuses(small.layer, small.q, small.name)
    for floats in (False, True):
        near(QRecurrent(small.layer, small.packed, requantize=True, floats=floats)(x), small(x), 0.05)


@BOTH
def test_surroundings(cls):
    "Gradients are refused, autocast casts the result, other precisions go in and out; programs and dropout: floats."
    net = cls(24, 40, 2, dropout=0.5).eval()
    small, quick = integers(net)
    x = torch.randn(5, 3, 24)
    want = quick(x)
    with torch.enable_grad():
        assert all(torch.equal(a, b) for a, b in zip(parts(quick(x)), parts(want)))
        y = quick(x.clone().requires_grad_())[0]
        with pytest.raises(RuntimeError, match="QRecurrent computes with integers and has no gradient"):
            y.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quick(x)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(parts(cast), parts(want)))
    assert all(t.dtype == torch.float64 for t in parts(quick(x.double())))
    near([t.float() for t in parts(quick(x.double()))], want, 1e-6)
    for layer in (quick, small):
        found = torch.compile(nn.Sequential(layer), backend="eager")(x)
        near(found, small(x), 1e-6)
    exported = torch.export.export(quick, (x,)).module()
    near(exported(x), small(x), 1e-6)
    quick.train()
    assert not torch.equal(quick(x)[0], quick(x)[0])
    with pytest.raises(RuntimeError, match="torch.jit"):
        torch.jit.trace(quick.eval(), x)


def test_without_the_loop_nothing_is_exchanged(monkeypatch):
    monkeypatch.setattr("modelzip.kernels.loop_is_right", lambda: False)
    monkeypatch.setattr(integer_recurrent, "loop_is_right", lambda: False)
    model = quantize_model(Tagger().eval())
    assert type(use_kernels(model).rnn) is Dequantize
    assert "no exact kernel" in str(what_runs(model))
    small = quantize_layer(nn.GRU(6, 10))
    layer, x = QRecurrent(small.layer, small.packed), torch.randn(4, 2, 6)
    assert layer.kernel == "plain" and "emulated" in repr(layer)
    near(layer(x), small(x), 0.02)


def test_onnx_and_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    quick = use_kernels(quantize_model(Tagger().eval()))
    ids = torch.randint(0, 50, (8, 3, 6))
    want = [quick(i) for i in ids]
    with ThreadPoolExecutor(4) as pool:
        run = lambda i: quick(i)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(pool.map(torch.no_grad()(run), ids), want))
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from modelzip.onnx_export import to_onnx

    to_onnx(quick, tmp_path / "m.onnx", ids[0])
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: ids[0].numpy()})[0]
    near(torch.from_numpy(got), want[0], 0.05)
