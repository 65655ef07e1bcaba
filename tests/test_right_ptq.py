"""Right, or refused, without training: equalization, calibration, GPTQ, AWQ, SmoothQuant and HQQ on models and
numbers that nobody expects."""

import copy, math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune as torch_prune

from guards import codes_alone, examples, turns, unchanged
from inputs import related
from modelzip.data import LeNet5
from modelzip.prune import prune_model
from modelzip.ptq import (
    LayerStatistics,
    awq,
    awq_columns,
    calibrate,
    correct_bias,
    equalize,
    equalizing_scales,
    find_pairs,
    fitted_scales,
    gptq,
    gptq_weight,
    half_quadratic,
    hqq,
    hqq_weight,
    nearest_weight,
    output_error,
    quantize_with,
    smooth,
    smooth_columns,
)
from modelzip.quant import OBSERVERS, Dequantize, dequantize_model, quantize_model
from modelzip.workshop import bites
from modelzip.workshop.scales import as_columns, rounded, scale_of


pytestmark = pytest.mark.usefixtures("seeded")


# ---- equalization: proved, or left alone ----


def uneven(model):
    "Channels of very different size, so that equalization has something to move."
    with torch.no_grad():
        for p in model.parameters():
            (
                p.mul_(torch.logspace(-1, 1, len(p))[torch.randperm(len(p))].view(-1, *[1] * (p.dim() - 1)))
                if p.dim()
                else None
            )
    return model


def same(a, b, x):
    return torch.allclose(a.eval()(x), b.eval()(x), atol=1e-4 * b(x).abs().max().item(), rtol=1e-4)


BETWEEN = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "drop": nn.Dropout,
    "identity": nn.Identity,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "relu6": nn.ReLU6,
    "max1": lambda: nn.MaxPool1d(2),
    "avg1": lambda: nn.AvgPool1d(2),
    "max2": lambda: nn.MaxPool2d(2),
    "avg2": lambda: nn.AvgPool2d(2, 1, 1),
    "all2": lambda: nn.AdaptiveAvgPool2d(2),
    "flat": nn.Flatten,
    "flat2": lambda: nn.Flatten(2),
    "flat12": lambda: nn.Flatten(1, 2),
    "channel": lambda: nn.PReLU(8),
    "norm": lambda: nn.LayerNorm(8),
    "pool": lambda: nn.MaxPool1d(2, return_indices=True),
}
LAYERS = {
    "linear": lambda n: nn.Linear(8, n),
    "conv1": lambda n: nn.Conv1d(8, n, 3, padding=1),
    "conv2": lambda n: nn.Conv2d(8, n, 3, padding=1),
    "grouped": lambda n: nn.Conv2d(8, n, 3, padding=1, groups=4),
    "linear4": lambda n: nn.Linear(4, n),
    "linear64": lambda n: nn.Linear(64, n),
    "linear32": lambda n: nn.Linear(32, n),
}


@settings(max_examples=examples(150), deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(list(LAYERS)), st.sampled_from(list(BETWEEN))), min_size=3, max_size=7),
    st.sampled_from([(3, 8), (3, 8, 8), (3, 8, 4), (3, 8, 8, 8), (3, 8, 4, 4), (2, 3, 8)]),
    st.integers(0, 99),
)
def test_equalize_never_changes_the_function(names, shape, seed):
    "Any chain that runs at all: the same outputs, or no pair."
    torch.manual_seed(seed)
    model, x = (
        uneven(nn.Sequential(*[(LAYERS | BETWEEN)[n](*([8] if n in LAYERS else [])) for n in names])).eval(),
        torch.randn(shape),
    )
    try:
        y = model(x)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return
    if not torch.is_tensor(y):
        return
    try:
        even = equalize(model)
    except ValueError as e:
        assert "no pair" in str(e)
        return
    assert same(even, model, x), (names, find_pairs(model))


class Net(nn.Module):
    "Two layers of four, and whatever a test does with them."

    def __init__(self, forward, layers=None):
        super().__init__()
        self.net, self.how = layers or nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), forward

    def forward(self, x, taps=None):
        return self.how(self, x, taps)


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def tied(model):
    model[2].weight = model[0].weight
    return model


def biased_alike(model):
    model[2].bias = model[0].bias
    return model


def viewed(model):
    flat = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])
    model[0].weight, model[2].weight = nn.Parameter(flat[:16].view(4, 4)), nn.Parameter(flat[16:].view(4, 4))
    return model


def hooked(model, *names):
    for n in names:
        model.get_submodule(n).register_forward_hook(lambda m, i, o: o.clamp(max=0.1))
    return model


def kept(model):
    model.weights = [model[0].weight]
    return model


def taps(self, x, _):
    found = []
    for m in self.net:
        found.append(x := m(x))
    return torch.cat(found, 1)


two = lambda *more: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), *more)
ALONE = {
    "piecewise": lambda: Net(taps),
    "weight read elsewhere": lambda: Net(lambda s, x, _: F.linear(s.net(x), s.net[0].weight.T)),
    "called twice": lambda: Net(lambda s, x, _: s.net(s.net(x))),
    "first called twice": lambda: Net(lambda s, x, _: s.net(x) + s.net[0](x)),
    "second called twice": lambda: Net(lambda s, x, _: s.net(x) + s.net[2](x)),
    "parameters": lambda: Net(lambda s, x, _: s.net(x) * sum(p.abs().max() for p in s.parameters())),
    "item": lambda: Net(lambda s, x, _: s.net(x) * max(p.abs().max().item() for p in s.parameters())),
    "state_dict": lambda: Net(lambda s, x, _: s.net(x) * s.state_dict()["net.0.weight"].norm()),
    "branch": lambda: Net(lambda s, x, _: s.net(x) if x.sum() > 0 else s.net[0](x)),
    "taps asked for": lambda: Net(lambda s, x, t: s.net(x) if t is None else s.net[1](s.net[0](x))),
    "in training": lambda: Net(lambda s, x, _: s.net[1](s.net[0](x)) if s.training else s.net(x)),
    "isinstance": lambda: Net(lambda s, x, _: s.net[1](s.net[0](x)) if isinstance(x, torch.Tensor) else s.net(x)),
    "subclass": lambda: nn.Sequential(Twice(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    "second subclass": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Twice(4, 4)),
    "tied": lambda: tied(two()),
    "one bias": lambda: biased_alike(two()),
    "one memory": lambda: viewed(two()),
    "kept in a list": lambda: kept(two()),
    "hook": lambda: hooked(two(), "0"),
    "hook between": lambda: hooked(two(), "1"),
    "hook of second": lambda: hooked(two(), "2"),
    "hook around": lambda: hooked(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)), "0"),
    "in place": lambda: Net(lambda s, x, _: (lambda h: (s.net[2](s.net[1](h)), h)[1])(s.net[0](x))),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4)),
    "weight norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), parametrizations.weight_norm(nn.Linear(4, 4))),
    "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4)),
    "prune": lambda: nn.Sequential(
        torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), nn.ReLU(), nn.Linear(4, 4)
    ),
    "GELU": lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
    "scaled": lambda: Net(lambda s, x, _: s.net[2](F.relu(s.net[0](x)) * x)),
    "residual": lambda: Net(lambda s, x, _: s.net[2]((h := F.relu(s.net[0](x)))) + h),
    "two names": lambda: nn.Sequential(*(lambda l: (l, nn.ReLU(), l))(nn.Linear(4, 4))),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_proved_is_left_alone(name):
    model, x = uneven(ALONE[name]()).eval(), torch.randn(9, 4)
    y = model(x).detach()
    with (
        unchanged(model),
        pytest.raises(ValueError, match="no pair|closure|cannot be copied|computation with gradients|is computed by"),
    ):
        equalize(model)
    with pytest.raises(ValueError):
        equalize(
            model, [("net.0", "net.2") if isinstance(model, Net) else ("0", "2") if len(model) > 2 else ("0.0", "1")]
        )
    assert torch.equal(model(x), y)


FINE = {
    "sequential": two,
    "called as a whole": lambda: Net(lambda s, x, _: s.net(x) + x),
    "functions": lambda: Net(lambda s, x, _: s.net[2](F.relu(s.net[0](x)))),
    "shape": lambda: Net(lambda s, x, _: s.net[2](F.relu(s.net[0](x)).view(x.shape[0], -1))),
    "hook at the end": lambda: hooked(nn.Sequential(two(), nn.Linear(4, 4)), ""),
    "masked": lambda: prune_model(two(), 0.5),
    "masked twice": lambda: prune_model(prune_model(two(), 0.3), 0.3, "random"),
    "frozen": lambda: two().requires_grad_(False),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4)),
    "double": lambda: two().double(),
    "shared bias of seconds": lambda: two(),
}


@pytest.mark.parametrize("name", [n for n in FINE if n != "shape"])
def test_what_is_proved_is_equalized_and_the_same(name):
    model, x = uneven(FINE[name]()), torch.randn(9, 4)
    if name == "double":
        x = x.double()
    with unchanged(model, x):
        even = equalize(model, example=x)
    assert same(even, model, x) and any(not torch.equal(a, b) for a, b in zip(even.parameters(), model.parameters()))
    assert [p.requires_grad for p in even.parameters()] == [p.requires_grad for p in model.parameters()]
    codes_alone(model, even, x)


def test_lenet_is_equalized_through_its_functions():
    model, x = uneven(LeNet5()).eval(), torch.randn(5, 1, 28, 28)
    assert find_pairs(model) == [("conv1", "conv2"), ("conv2", "fc1"), ("fc1", "fc2")] and same(
        equalize(model, example=x), model, x
    )


@pytest.mark.parametrize(
    "dtype, small, large",
    [
        (torch.float16, 1e-4, 1e-4),
        (torch.float16, 6e-8, 6e4),
        (torch.float16, 6e4, 6e-8),
        (torch.float32, 1e-25, 1e-25),
        (torch.float32, 1e-38, 1e38),
        (torch.bfloat16, 1e-38, 3e38),
        (torch.float64, 1e-300, 1e300),
    ],
)
def test_equalizing_scales_are_positive(dtype, small, large):
    s = equalizing_scales(torch.full((3, 2), small, dtype=dtype), torch.full((2, 3), large, dtype=dtype))
    assert (s > 0).all() and s.isfinite().all()
    if small == large:
        assert torch.allclose(s, torch.ones_like(s), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equalize_half_precision(dtype):
    model, x = (
        uneven(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))).to(dtype),
        torch.randn(20, 8).to(dtype),
    )
    even = equalize(model, example=x)
    y, z = model.double()(x.double()), even.double()(x.double())
    assert (y - z).norm() < 3 * torch.finfo(dtype).eps * y.norm()


# ---- one layer: what docstrings promise ----


@settings(max_examples=examples(60), deadline=None)
@given(
    st.integers(1, 6),
    st.integers(2, 40),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([None, 5, 16]),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([0, 1]),
    st.integers(0, 999),
)
def test_no_row_of_gptq_is_worse_than_nearest(bits, inputs, outputs, symmetric, group, act_order, damping, axis, seed):
    torch.manual_seed(seed)
    w, s = torch.randn((outputs, inputs) if axis == 0 else (inputs, outputs)), LayerStatistics()
    s.add(related(4 * inputs, inputs, seed)[None])
    how = dict(bits=bits, group=group, symmetric=symmetric, axis=axis)
    rows = [
        ((d := (w - q.dequantize() if axis == 0 else (w - q.dequantize()).t())) @ s.moment[0] * d).sum(1)
        for q in (gptq_weight(w, s, act_order=act_order, damping=damping, **how), nearest_weight(w, s, **how))
    ]
    assert (rows[0] <= rows[1] * (1 + 1e-4) + 1e-6 * s.moment[0].diagonal().max()).all()


def test_gptq_that_lost_at_one_bit():
    torch.manual_seed(13)
    layer = nn.Linear(17, 2)
    s = calibrate(layer, [related(68, 17, 13)])[""]
    error = lambda q: output_error(layer.weight, q.dequantize(), s)
    assert error(gptq_weight(layer.weight, s, bits=1, group=None)) <= error(
        nearest_weight(layer.weight, s, bits=1, group=None)
    )


@settings(max_examples=examples(6), deadline=None)
@given(st.integers(1, 4), st.sampled_from([None, 8]), st.booleans(), st.integers(0, 999))
def test_awq_takes_the_best_of_its_grid(bits, group, symmetric, seed):
    torch.manual_seed(seed)
    w, s = torch.randn(6, 24), LayerStatistics()
    s.add(related(80, 24, seed)[None])
    how, x = dict(bits=bits, group=group, symmetric=symmetric), (s.magnitude / s.count)[0].double()
    error = lambda c: output_error(w, nearest_weight(w, s, columns=c, **how).dequantize(), s)
    assert error(awq_columns(w, s, **how)) <= min(
        map(error, [None, *(as_columns(x ** (i / 12), x > 0) for i in range(1, 13))])
    ) * (1 + 1e-6)


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(2, 16), st.booleans(), st.sampled_from([0.4, 0.7, 1.0]), st.integers(0, 999))
def test_half_quadratic_is_never_above_what_it_has_to_beat(levels, symmetric, p, seed):
    b = torch.randn(30, 24, generator=torch.manual_seed(seed)) ** 3
    loss = lambda s, z: (rounded(b, s, z, levels) - b).abs().pow(p).sum(1)
    ours = loss(*half_quadratic(b, levels, symmetric, p=p))
    for other in (
        fitted_scales(b, None, levels, symmetric),
        scale_of(*OBSERVERS["minmax"]()(b, levels, symmetric), levels, symmetric),
    ):
        assert (ours <= loss(*other) * (1 + 1e-5) + 1e-7).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inputs_that_are_never_used_keep_one(alpha, dtype):
    s, x = LayerStatistics(), torch.randn(1, 50, 8) * torch.tensor([0.0, 1e-3, 1, 50, 7e4, 2, 0, 3])
    s.add(x)
    w = torch.randn(5, 8).to(dtype)
    w[:, 2] = 0
    c = smooth_columns(w, s, alpha)
    assert (c[[0, 2, 6]] == 1).all() and (c > 0).all() and c.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize(
    "method",
    [gptq_weight, nearest_weight, lambda w, s, **how: nearest_weight(w, s, columns=awq_columns(w, s, **how), **how)],
)
def test_inputs_of_any_size_give_the_same_codes(method, size):
    x, w = related(60, 12), torch.randn(4, 12)
    near, far = LayerStatistics(), LayerStatistics()
    near.add(x[None])
    far.add((x * size)[None])
    a, b = (method(w, s, bits=3, group=4).dequantize() for s in (near, far))
    assert b.isfinite().all() and output_error(w, b, near) <= output_error(w, a, near) * 1.05


def test_bias_correction_is_exact_for_each_layer_on_the_originals_inputs():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.rand(50, 6)
    fixed = correct_bias(quantize_model(model, 2), model, calibrate(model, [x]))
    h = F.relu(model[0](x))
    assert (fixed[0](x) - model[0](x)).mean(0).abs().max() < 1e-5 and (fixed[2](h) - model[2](h)).mean(
        0
    ).abs().max() < 1e-5


# ---- matrices of every kind ----


class Small(nn.Module):
    "Attention over its own input and over another's, an LSTM and a GRU, cells, a Bilinear layer."

    def __init__(self, kind):
        super().__init__()
        self.kind, self.out = kind, nn.Linear(6, 3)
        self.core = {
            "mha": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            "cross": lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True),
            "lstm": lambda: nn.LSTM(8, 3, 2, bidirectional=True, batch_first=True),
            "proj": lambda: nn.LSTM(8, 9, proj_size=6),
            "gru": lambda: nn.GRU(8, 6),
            "rnn": lambda: nn.RNN(8, 6, 2),
            "lstmcell": lambda: nn.LSTMCell(8, 6),
            "grucell": lambda: nn.GRUCell(8, 6),
            "rnncell": lambda: nn.RNNCell(8, 6),
            "bilinear": lambda: nn.Bilinear(8, 8, 6),
            "packed": lambda: nn.LSTM(8, 6),
        }[kind]()
        self.fit = nn.Linear(8, 6) if kind in ("mha", "cross") else None

    def forward(self, x):
        core = self.core
        if self.kind == "mha":
            y = self.fit(core(x, x.flip(0), x)[0])
        elif self.kind == "cross":
            y = self.fit(core(x, x[:, :4, :5], x[:, :4, 2:])[0])
        elif self.kind.endswith("cell"):
            h = None
            for t in range(x.shape[1]):
                h = core(x[:, t], h)
            y = h[0] if isinstance(h, tuple) else h
        elif self.kind == "bilinear":
            y = core(x, x.flip(0))
        elif self.kind == "packed":
            y = nn.utils.rnn.pad_packed_sequence(
                core(nn.utils.rnn.pack_padded_sequence(x.transpose(0, 1), [3, 5, 2, 4], enforce_sorted=False))[0]
            )[0]
        else:
            y = core(x)[0]
        return self.out(y)


KINDS = ["mha", "cross", "lstm", "proj", "gru", "rnn", "lstmcell", "grucell", "rnncell", "bilinear", "packed"]


@pytest.mark.hypothesis
@pytest.mark.parametrize("kind", KINDS)
def test_all_matrices_are_compressed_by_every_method_and_the_codes_alone_run(kind):
    model, batches = Small(kind).eval(), [torch.randn(4, 5, 8) for _ in range(3)]
    with unchanged(model, batches):
        seen = calibrate(model, batches)
        ways = {
            "gptq": lambda: gptq(model, batches, 4, group=None),
            "grouped": lambda: gptq(model, batches, 8, group=4, symmetric=False),
            "awq": lambda: awq(model, seen, 8, group=8),
            "smooth": lambda: smooth(model, seen),
            "hqq": lambda: hqq(model, 8, group=8),
        }
        made = turns(KINDS.index(kind), ways, 2)
    y = model(batches[0])
    for how, q in made.items():
        left = [n for n, p in q.named_parameters() if p.dim() > 1]
        assert not left, (how, left)
        z = q(batches[0])
        assert (z - y).norm() < (0.6 if how == "gptq" else 0.1) * y.norm(), how
        codes_alone(model, q, batches[0])
        assert torch.allclose(dequantize_model(q)(batches[1]), q(batches[1]), atol=1e-5)
    assert len(seen) == sum(p.dim() > 1 for _, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["lstm", "gru", "mha", "cross", "proj"])
def test_gptq_beats_nearest_on_matrices_inside_layers(kind):
    lost = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = Small(kind).eval()
        x = (torch.randn(40, 5, 8) @ torch.randn(8, 8)).tanh()
        y = model(x)
        error = lambda q: (q(x) - y).square().mean()
        lost += error(gptq(model, [x], 3, group=None)) > error(quantize_model(model, 3))
    assert lost <= 1


def test_gpt2_layers_are_transposed():
    transformers = pytest.importorskip("transformers")
    Conv1D = transformers.pytorch_utils.Conv1D
    torch.manual_seed(0)
    layer, x = Conv1D(12, 16), related(200, 16) / 10
    nn.init.normal_(layer.weight)
    twin = nn.Linear(16, 12)
    twin.weight, twin.bias = nn.Parameter(layer.weight.t().contiguous()), layer.bias
    a, b = gptq(layer, [x], 3, group=None), gptq(twin, [x], 3, group=None)
    assert torch.allclose(a(x), b(x), atol=1e-4) and a.q.shape == layer.weight.shape and a.q.axis == 1
    y = layer(x)
    for group in None, 4:
        error = lambda q: (q(x) - y).square().mean()
        assert error(gptq(layer, [x], 3, group=group)) < 0.9 * error(quantize_model(layer, 3, group=group))
    with pytest.warns(UserWarning, match="column scales"):
        awq(layer, calibrate(layer, [x]))
    codes_alone(layer, a, x)


# ---- batches: which layers run, how they are passed ----


class Some(nn.Module):
    "Layers that run for some batches only, more often for some than for others, and never."

    def __init__(self):
        super().__init__()
        self.a, self.large, self.often, self.never, self.aux = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        x = self.a(x)
        if len(x) > 8:
            x = self.large(x)
        for part in x.split(8):
            y = self.often(part)
        if self.training:
            y = y + self.aux(x[: len(y)])
        return torch.cat([self.often(part) for part in x.split(8)])


@pytest.mark.parametrize("sizes", [(12, 20, 8), (8, 20, 12), (4, 8, 9)])
def test_all_rows_that_ran_are_used(sizes):
    model, batches, seen = Some().eval(), [torch.randn(n, 8) for n in sizes], {}

    def method(weight, statistics, **how):
        seen[weight.data_ptr()] = None if statistics is None else statistics.count
        return nearest_weight(weight, statistics, **how)

    from modelzip.ptq import quantize_with

    with pytest.warns(UserWarning, match="never, aux .no batch reached it"):
        q = quantize_with(method, model, batches, bits=4)
    s = calibrate(model, batches)
    count = lambda layer: seen[layer.weight.data_ptr()]
    assert count(model.a) == s["a"].count == sum(sizes) and count(model.large) == s["large"].count == sum(
        n for n in sizes if n > 8
    )
    assert count(model.often) == s["often"].count and count(model.never) is None and isinstance(q.never, Dequantize)


def test_a_router_that_decides_otherwise():
    "Experts get other rows in the quantized model; nothing breaks, and catching up is not misled."

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            choice, out = self.router(x).argmax(1), torch.zeros_like(x)
            for i, e in enumerate(self.experts):
                if (choice == i).any():
                    out[choice == i] = e(x[choice == i])
            return out

    model, batches = Experts().eval(), [torch.randn(30, 8) for _ in range(3)]
    q = gptq(model, batches, 2, group=None, catch_up=1.0)
    for e, f in zip(model.experts, q.experts):
        x = batches[0]
        assert (e(x) - f(x)).norm() < 1.2 * (e(x) - quantize_model(e, 2)(x)).norm()


def test_labels_are_never_a_mask():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, mask=None):
            return self.fc(x) if mask is None else self.fc(x * mask[:, None])

    x, y = torch.randn(6, 4), torch.zeros(6)
    for f in (calibrate, gptq):
        with pytest.raises(ValueError, match="may be labels, or its optional mask"):
            f(Masked(), [(x, y)])
    assert (
        calibrate(Masked(), [{"x": x, "mask": y}])["fc"].high.abs().max()
        == 0
        < calibrate(Masked(), [{"x": x}])["fc"].high.max()
    )


# ---- models that hide something ----


def rebound(m):
    m.forward = (lambda f: lambda x: f(x))(m.forward)
    return m


def closed(m):
    m[0].register_forward_hook(lambda l, i, o, w=m[0].weight: o + i[0] @ w.t())
    return m


def buffered(m):
    w = m[0].weight.detach()
    del m[0].weight
    m[0].register_buffer("weight", w)
    return m


HIDDEN = {
    "own forward": (rebound, "forward of its own instance"),
    "own forward inside": (lambda m: (rebound(m[0]), m)[1], "forward of its own instance"),
    "closure": (closed, "reaches the model itself"),
    "weight_norm": (lambda m: (parametrizations.weight_norm(m[0]), m)[1], "0.weight is parametrized"),
    "spectral_norm": (lambda m: (parametrizations.spectral_norm(m[0]), m)[1], "0.weight is parametrized"),
    "prune": (lambda m: (torch_prune.l1_unstructured(m[0], "weight", 0.5), m)[1], "prune.remove"),
    "buffer": (buffered, "is a buffer"),
    "masks": (lambda m: prune_model(m, 0.5), "remove_masks|parametrized by Mask"),
    "NaN": (lambda m: (m[0].weight.data.fill_(math.nan), m)[1], "weight of layer 0 holds"),
    "infinite": (lambda m: (m[2].weight.data[0].fill_(math.inf), m)[1], "weight of layer 2 holds"),
}


def methods(model, x):
    return {
        "gptq": lambda: gptq(model, [x]),
        "hqq": lambda: hqq(model),
        "awq": lambda: awq(model, calibrate(model, [x])),
        "smooth": lambda: smooth(model, calibrate(model, [x])),
    }


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("method", ["gptq", "hqq", "awq", "smooth"])
def test_what_hides_is_refused_by_name(name, method):
    change, says = HIDDEN[name]
    model, x = change(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))), torch.randn(9, 4)
    with unchanged(model), pytest.raises(ValueError, match=says + "|holds NaN or infinite") as e:
        methods(model, x)[method]()
    assert "nonfinite" not in str(e.value)  # which these functions do not take


@pytest.mark.parametrize("method", ["gptq", "hqq", "awq", "smooth"])
def test_hooks_of_layers_are_called(method):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(9, 4)
    model[0].register_forward_hook(lambda l, i, o: 2 * o)
    model[2].register_forward_pre_hook(lambda l, i: (i[0] + 1,))
    q = methods(model, x)[method]()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for i in 0, 2:
            plain[i].weight.copy_(q[i].q.dequantize())
    z = torch.randn(5, 4)
    assert torch.allclose(q(z), plain(z), atol=1e-6)
    codes_alone(model, q, z)


@pytest.mark.parametrize("method", ["gptq", "hqq", "awq", "smooth"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_layers(method, shape):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.fc = nn.Linear(*shape), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) + self.none(x[:, : shape[0]]).sum()

    model, x = Empty().eval(), torch.randn(6, 4)
    q = methods(model, x)[method]()
    assert (q(x) - model(x)).abs().max() < 0.5 and q.none.q.shape == model.none.weight.shape


@pytest.mark.parametrize("method", ["gptq", "hqq", "awq", "smooth"])
def test_two_names_and_ties(method):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(4, 4)
            self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)
            self.d.weight = self.c.weight

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x))).relu())

    model, x = Two().eval(), torch.randn(20, 4)
    q = methods(model, x)[method]()
    assert q.a is q.b and isinstance(q.a, Dequantize) and q.c.packed is q.d.packed
    codes_alone(model, q, x)
    how = {
        "gptq": lambda **o: gptq(model, [x], **o),
        "hqq": lambda **o: hqq(model, **o),
        "awq": lambda **o: awq(model, calibrate(model, [x]), **o),
        "smooth": lambda **o: smooth(model, calibrate(model, [x]), **o),
    }[method]
    for overrides in {"c": {"bits": 5}}, {"d": None}, {"a": {"bits": 8}, "b": {"bits": 2}}:
        with pytest.raises(ValueError, match="one tensor|one layer"):
            how(overrides=overrides)


def test_weights_that_are_read_elsewhere_are_the_rounded_ones():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.b = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(self.n(x)) + F.linear(self.n(self.a(x)), self.a.weight.T)

    model, x = Reads().eval(), torch.randn(20, 6) * torch.logspace(-1, 1, 6)
    for name, make in methods(model, x).items():
        q = make()
        assert torch.allclose(q(x), dequantize_model(q)(x), atol=1e-4), name
        codes_alone(model, q, x)


def test_statistics_of_another_model_are_refused():
    a, b = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(ValueError, match="another layer"):
        awq(a, calibrate(b, [torch.randn(9, 5)]))
    with pytest.raises(ValueError, match="none of 0"):
        awq(a, {})
    with pytest.raises(ValueError, match="none of 0"):
        smooth(a, calibrate(nn.Linear(4, 4), [torch.randn(9, 4)]))


PLAIN = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class State(nn.Module):
    "Streaming buffers, a cache made on first use, random numbers, work in place."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.register_buffer("last", torch.zeros(4))
        self.steps = 0

    def forward(self, x):
        if not hasattr(self, "grid"):
            self.grid = torch.ones(4)
        x.mul_(2)
        y = self.a(x + self.last) + F.dropout(x, 0.5, True) + self.grid
        self.last += y.mean(0)
        self.steps += 1
        return self.b(y).add_(y)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, b: calibrate(m, b),
        lambda m, b: gptq(m, b),
        lambda m, b: equalize(PLAIN, example=b[0]),
        lambda m, b: hqq(m),
        lambda m, b: awq(m, calibrate(m, b)),
        lambda m, b: smooth(m, calibrate(m, b)),
        lambda m, b: correct_bias(quantize_model(m, 4), m, calibrate(m, b)),
        lambda m, b: find_pairs(m),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_callers_is_changed(run, training):
    model, batches = State().train(training), [torch.randn(6, 4) for _ in range(2)]
    model.a.register_forward_hook(lambda m, i, o: o * 1)
    with unchanged(model, batches):
        run(model, batches)


def test_bias_correction_refuses_what_it_cannot_correct():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.rand(9, 4)
    seen, q = calibrate(model, [x]), quantize_model(model, 2)
    with pytest.raises(ValueError, match="another layer"):
        correct_bias(q, model, calibrate(nn.Sequential(nn.Linear(5, 4)), [torch.rand(9, 5)]))
    with pytest.raises(ValueError, match="0 is a NoneType"):
        correct_bias(q, nn.Linear(4, 4), seen)
    torch_prune.l1_unstructured(q[0].layer, "bias", 0.5)
    with pytest.raises(ValueError, match="bias"):
        correct_bias(q, model, seen)
    q = quantize_model(model, 2)
    q[0].register_forward_hook(lambda m, i, o: 2 * o)
    fixed = correct_bias(q, model, seen)
    assert torch.allclose(fixed[0](x), 2 * (F.linear(x, q[0].q.dequantize(), fixed[0].bias)), atol=1e-6)
    codes_alone(q, fixed, x)
    codes_alone(model, fixed, x)


class Busy(nn.Module):
    """Blocks that work on their input in place, hand out a cache, keep what others read, and are called in another
    order for other batches."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = block()

            def forward(self, x):
                x.add_(self.net(x))
                return x

        class Caches(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = block()

            def forward(self, x, cache):
                cache.append(self.net(x))
                self.kept = cache[-1].mean()
                return x + cache[-1]

        self.a, self.b, self.c, self.d = InPlace(), Caches(), block(), block()

    def forward(self, x):
        h, cache = x.clone(), []
        y = self.a(h) + h
        y = self.b(y, cache) + cache[0] + self.b.kept
        return self.c(self.d(y)) if len(x) > 5 else self.d(self.c(y))


def test_memory_is_right_for_blocks_that_do_odd_things(monkeypatch):
    from modelzip.ptq import Replay

    model, batches = Busy().eval(), [torch.randn(n, 6) for n in (4, 9, 5)]
    quick = gptq(model, batches, 3, group=6)
    monkeypatch.setattr(Replay, "remember", lambda *args: None)
    slow = gptq(model, batches, 3, group=6)
    for (n, a), (_, b) in zip(quick.named_modules(), slow.named_modules()):
        if isinstance(a, Dequantize):
            assert a.q == b.q, n


def test_overrides_name_single_matrices_and_layers_by_class():
    model, batches = Small("lstm").eval(), [torch.randn(4, 5, 8)]
    q = gptq(model, batches, overrides={"core.weight_hh_l0": {"bits": 8}, "core.weight_ih_*": None})
    assert q.core.weight_hh_l0.shape == (12, 3) and torch.equal(q.core.weight_ih_l1, model.core.weight_ih_l1)
    assert (q.core.weight_hh_l0 - model.core.weight_hh_l0).abs().max() < 0.01
    q = gptq(model, batches, layers=(nn.LSTM,))
    assert type(q.out) is nn.Linear and isinstance(q.core, Dequantize)
    with pytest.raises(ValueError, match="'core.weight_zz'"):
        gptq(model, batches, overrides={"core.weight_zz": None})


def test_threads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    model, batches = (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1, enable_nested_tensor=False
        ).train(),
        [torch.randn(3, 4, 8) for _ in range(2)],
    )
    alone = gptq(model, batches, 4)
    with unchanged(model, batches), ThreadPoolExecutor(3) as pool:
        several = list(pool.map(lambda _: gptq(model, batches, 4), range(6)))
    for q in several:
        assert all(a.q == b.q for a, b in zip(alone.modules(), q.modules()) if isinstance(a, Dequantize))


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("method", [nearest_weight, gptq_weight, hqq_weight])
def test_zeros_stay_zeros(method, bits, symmetric, group):
    w, s = torch.randn(5, 8), LayerStatistics()
    w[1], w[3, :4] = 0, 0
    s.add(related(40, 8)[None])
    q = method(w, s, bits=bits, group=group, symmetric=symmetric)
    y = q.dequantize()
    assert (
        (y[1] == 0).all() and (group is None or (y[3, :4] == 0).all() or method is gptq_weight) and y.isfinite().all()
    )
    assert type(q).from_parts(q.parts(), q.meta()) == q


@pytest.mark.parametrize("method", ["gptq", "hqq", "awq", "smooth"])
def test_lazy_layers_are_refused_and_tables_with_a_largest_norm_stay(method):
    model, x = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), torch.randn(5, 4)
    with pytest.raises(ValueError, match="0.weight has no shape"):
        methods(model, x)[method]()
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    model, ids = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 4)).eval(), torch.randint(9, (3, 5))
    with unchanged(model):
        methods(model, ids)[method]()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("how", ["given state", "no batch", "packed"])
def test_rows_inside_recurrent_layers(kind, how):
    "What is told of hidden states gives the layer's own outputs, step by step."
    from modelzip.workshop.watching import rows_given

    layer = kind(4, 3, bidirectional=True)
    x, n = (torch.randn(6, 4), 1) if how == "no batch" else (torch.randn(6, 2, 4), 2)
    h = torch.randn(2, 3) if how == "no batch" else torch.randn(2, 2, 3)
    state = (h, h.tanh()) if kind is nn.LSTM else h
    if how == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, [4, 6], enforce_sorted=False)
    with torch.no_grad():
        y, rows = layer(x, state)[0], rows_given(layer, (x, state), {})
    if how == "packed":
        y = nn.utils.rnn.pad_packed_sequence(y)[0]
    y, lengths = y.reshape(6, n, 6), [4, 6] if how == "packed" else [6] * n
    assert rows["weight_ih_l0"].shape == rows["weight_hh_l0"].shape[:2] + (4,) == (1, sum(lengths), 4)
    told = {w: torch.zeros(6, n, 3) for w in ("", "_reverse")}
    for w, t in told.items():
        t[torch.arange(6)[:, None] < torch.tensor(lengths)] = rows[f"weight_hh_l0{w}"][0]
    for b, end in enumerate(lengths):
        assert torch.allclose(told[""][0, b], h.reshape(2, n, 3)[0, b]) and torch.allclose(
            told["_reverse"][0, b], h.reshape(2, n, 3)[1, b]
        )
        assert torch.allclose(told[""][1:end, b], y[: end - 1, b, :3], atol=1e-6) and torch.allclose(
            told["_reverse"][1:end, b].flip(0), y[1:end, b, 3:], atol=1e-6
        )


def test_a_model_that_draws_is_calibrated_the_same_each_time():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x + torch.rand_like(x))

    model, batches = Draws(), [torch.randn(5, 4) for _ in range(2)]
    first, _, again = calibrate(model, batches), torch.rand(9), calibrate(model, batches)
    assert torch.equal(first["a"].moment, again["a"].moment)


class Counted(nn.Module):
    "Counts its runs where everybody sees it; draws random numbers if it is told to."

    runs = []

    def __init__(self, draws):
        super().__init__()
        self.a, self.b, self.draws = nn.Linear(6, 8), nn.Linear(8, 3), draws

    def forward(self, x):
        self.runs.append(1)
        x = self.a(x)
        return self.b(x + torch.randn_like(x) if self.draws else x)


@pytest.mark.parametrize("draws", [False, True])
def test_a_batch_is_run_once(draws):
    "The first one twice where random numbers are drawn: it then gets its seed. The sums are the same each time."
    from modelzip.prune import collect

    torch.manual_seed(0)
    model, batches = Counted(draws).eval(), [torch.randn(5, 6) for _ in range(3)]
    sums = []
    for see in (
        lambda: [s.moment for s in calibrate(model, batches).values()],
        lambda: [s.moment for s in collect(model, batches, "moment").values()],
    ):
        for _ in range(2):
            Counted.runs.clear()
            torch.manual_seed(len(sums))  # wherever the process's own generator is
            state = torch.get_rng_state()
            sums.append(see())
            assert len(Counted.runs) == 3 + draws and torch.equal(torch.get_rng_state(), state)
    for a, b in (sums[:2], sums[2:]):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    rows = torch.cat(batches)
    assert torch.allclose(
        sums[0][0].squeeze() / sums[0][0].abs().max(), (rows.T @ rows) / (rows.T @ rows).abs().max(), atol=1e-4
    )


def test_column_scales_of_overrides_go_before_the_method_s():
    "Of every method that chooses column scales itself: given ones are kept, and None is none."
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    batches, mine = [torch.randn(40, 12) * torch.linspace(0.2, 9, 12)], torch.linspace(0.5, 2, 8)
    seen, overrides = calibrate(model, batches), {"2": {"columns": mine}, "4": {"columns": None}}
    for made in (
        smooth(model, seen, 0.5, overrides=overrides),
        awq(model, seen, overrides=overrides),
        gptq(model, batches, 4, columns="awq", overrides=overrides),
        quantize_with(nearest_weight, model, batches, columns=awq_columns, overrides=overrides),
    ):
        found = {n: m.q.columns for n, m in made.named_modules() if isinstance(m, Dequantize)}
        assert found["0"] is not None and torch.equal(found["2"], mine) and found["4"] is None


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (40, 6), (3, 5000), (33, 1000)])
@pytest.mark.parametrize(
    "levels, symmetric, dtype",
    [(16, True, torch.float32), (8, False, torch.float64), (2, True, torch.bfloat16), (256, False, torch.float16)],
)
def test_scales_tried_together_are_those_tried_in_turn(monkeypatch, shape, levels, symmetric, dtype):
    "Of small tensors many ranges are tried in one call: to the bit as one after the other, with zeros and infinities."
    blocks = torch.randn(shape, generator=torch.Generator().manual_seed(0)).pow(3).to(dtype)
    if len(blocks) > 3:
        blocks[0], blocks[1], blocks[2, 0] = 0, blocks[1] * 1e-38, math.inf
    importance = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for counts in None, importance:
        monkeypatch.setattr(bites, "BITE", 1 << 20)
        together = fitted_scales(blocks, counts, levels, symmetric)
        monkeypatch.setattr(bites, "BITE", 1)
        assert all(a.equal(b) for a, b in zip(together, fitted_scales(blocks, counts, levels, symmetric)))
