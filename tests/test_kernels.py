"""Integer layers: the fast kernels against exact integers, torch.ao, and whole models."""

import copy, gc, io, math, re, subprocess, sys, threading, time, warnings, weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from torch import nn

from modelzip import kernels, pack
from modelzip.workshop import engines, integer_layers
from modelzip.data import LeNet5, accuracy, minilm, mnist5k, train
from modelzip.kernels import (
    QConv2d,
    QEmbedding,
    QLinear,
    accumulator_fits,
    as_int8,
    capabilities,
    gather_rows,
    integer_linear,
    quantize_activations,
    use_kernels,
    what_runs,
)
from modelzip.qat import convert, prepare
from modelzip.quant import Dequantize, quantize, quantize_layer, quantize_model
from modelzip.workshop.integer_linear import FEW_TOGETHER
from modelzip.workshop.models import check_ordinary
from guards import FUZZ, codes_alone, examples, unchanged

FAST = settings(max_examples=examples(30), deadline=None)


def both(layer, cls, x, **options):
    "The outputs of the kernel chosen here, and of exact integers."
    fast = cls(layer.layer, layer.packed, **options)
    if fast.kernel == "tiny":
        fast.kernel = {
            QLinear: "int8" if capabilities().linear else "plain",
            QConv2d: "onednn" if capabilities().convolution else "plain",
        }[cls]
    plain = copy.deepcopy(fast)
    plain.kernel = "plain"
    with torch.no_grad():
        return fast(x), plain(x)


def close(a, b):
    """Sums of integers are exact on both sides. What may differ is the final product of sum and scales in float32
    (a few 2^-24 of the value) and adding the bias, so the tolerance is relative to the largest value that went into
    the addition."""
    scale = b.abs().max().item() if b.numel() else 0
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.allclose(a, b, rtol=2e-6, atol=4e-6 * scale + 1e-30)


# ---------------------------------------------------------------- products


def test_product_by_hand():
    x, w = torch.tensor([[0.0, 1.0, 2.55]]), torch.tensor([[1, -2, 3], [127, 0, -127]], dtype=torch.int8)
    codes, scale, zero = quantize_activations(x)
    assert codes.tolist() == [[0, 100, 255]] and zero == 0 and scale == pytest.approx(0.01)
    y = integer_linear(x, w, torch.tensor([0.5, 2.0]))
    assert y[0, 0].item() == pytest.approx(0.5 * 0.01 * (-200 + 765), rel=1e-6)
    assert y[0, 1].item() == pytest.approx(2 * 0.01 * (-127 * 255), rel=1e-6)


def test_activation_codes_are_those_of_torch():
    torch.manual_seed(0)
    for shift in (-3.0, 0.0, 3.0):
        x = torch.randn(50, 40) + shift
        codes, scale, zero = quantize_activations(x)
        s, z = torch._choose_qparams_per_tensor(x, False)
        assert scale == pytest.approx(s, rel=1e-6) and zero == z
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(codes, torch.quantize_per_tensor(x, s, z, torch.quint8).int_repr())


@FAST
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 130),
    bits=st.sampled_from([1, 2, 3, 4, 5, 8]),
    symmetric=st.booleans(),
    axis=st.sampled_from([0, None]),
    bias=st.booleans(),
    activations=st.sampled_from(["row", "tensor"]),
    seed=st.integers(0, 99),
)
def test_linear_kernel_equals_integers(rows, inputs, outputs, bits, symmetric, axis, bias, activations, seed):
    torch.manual_seed(seed)
    layer = quantize_layer(nn.Linear(inputs, outputs, bias=bias), bits, per_channel=axis == 0, symmetric=symmetric)
    close(*both(layer, QLinear, torch.randn(rows, inputs) * 3 + 0.5, activations=activations))


@FAST
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 5),
    out=st.integers(1, 20),
    size=st.integers(7, 14),
    k=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    bits=st.sampled_from([2, 4, 8]),
    activations=st.sampled_from(["row", "tensor"]),
    seed=st.integers(0, 99),
)
def test_convolution_kernel_equals_integers(
    batch, channels, out, size, k, stride, padding, dilation, groups, bits, activations, seed
):
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels * groups, out * groups, k, stride, padding, dilation, groups)
    close(
        *both(
            quantize_layer(conv, bits),
            QConv2d,
            torch.randn(batch, channels * groups, size, size) + 0.3,
            activations=activations,
        )
    )


@pytest.mark.parametrize("activations", ["row", "tensor"])
@pytest.mark.parametrize(
    "batch, inputs, outputs, groups, kernel, stride, padding, dilation, size",
    [
        (1, 1, 1, 1, (2, 2), 1, 2, 1, (8, 8)),  # windows of padding alone: numbers from anywhere, up to 10⁷
        (8, 16, 16, 1, (4, 5), (1, 3), (6, 0), (3, 3), (18, 14)),  # an output of one column behind a stride
        (2, 24, 24, 10, 3, 1, 1, 1, (7, 7)),  # RegNet's groups: all but the first were wrong
        (2, 48, 48, 2, 3, 1, 0, 1, (14, 14)),
        (2, 3, 80, 3, (1, 2), (2, 3), 0, (3, 1), (5, 8)),
        (2, 8, 16, 1, (6, 5), (2, 1), (7, 4), (2, 1), (1, 1)),  # an image smaller than the kernel: the process died
        (3, 1, 32, 1, (2, 4), 1, (1, 6), (2, 3), (1, 6)),
    ],
)
def test_convolutions_that_onednn_gets_wrong(
    activations, batch, inputs, outputs, groups, kernel, stride, padding, dilation, size
):
    torch.manual_seed(0)
    conv, x = (
        nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, padding, dilation, groups),
        torch.randn(batch, inputs * groups, *size) + 0.3,
    )
    for images in x, x.relu():
        close(*both(quantize_layer(conv, 8), QConv2d, images, activations=activations))


def test_depthwise_and_rectangular():
    torch.manual_seed(0)
    for conv in (
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(3, 8, (1, 5), stride=(1, 2), padding=(0, 2)),
        nn.Conv2d(3, 8, 3, padding="valid"),
    ):
        small, x = quantize_layer(conv), torch.randn(3, conv.in_channels, 11, 12)
        a, b = both(small, QConv2d, x)
        close(a, b)
        assert (a - small(x)).norm() / small(x).norm() < 0.03


@FAST
@given(
    rows=st.integers(1, 30),
    width=st.sampled_from([8, 16, 24, 64]),
    bits=st.integers(1, 8),
    layout=st.sampled_from([dict(axis=0), dict(group=8), {}]),
    symmetric=st.booleans(),
    n=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_gathered_rows_equal_expanded_rows(rows, width, bits, layout, symmetric, n, seed):
    torch.manual_seed(seed)
    q, at = quantize(torch.randn(rows, width), bits, symmetric=symmetric, **layout), torch.randint(0, rows, (n,))
    assert torch.equal(gather_rows(q, at).dequantize(), q.dequantize()[at])


def test_extremes_do_not_saturate():
    "All codes at the ends of their ranges: where 16-bit sums would clip, 32-bit sums must not."
    w = torch.full((64, 512), 127, dtype=torch.int8)
    w[::2] = -127
    x = torch.full((3, 512), 5.0)
    x[:, ::3] = 0.0
    q = quantize(w.float(), 8, axis=0, scale=torch.ones(64))
    layer = Dequantize(nn.Linear(512, 64), q)
    fast, plain = both(layer, QLinear, x)
    close(fast, plain)
    assert torch.allclose(fast, layer(x), rtol=5e-3)


def test_accumulator_bound():
    assert accumulator_fits(66_311) and not accumulator_fits(66_312)
    q = quantize(torch.randn(1, 70_000), 8, axis=0)
    with pytest.raises(ValueError, match="overflow 32 bits"):
        as_int8(q)
    assert type(use_kernels(quantize_model(nn.Linear(70_000, 1)))) is Dequantize


def test_close_to_torch_ao():
    """PyTorch's own dynamic quantization rounds weights and activations likewise (per tensor): outputs agree within
    both roundings."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 300), torch.randn(40, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
        theirs = ao(x)
    exact = layer(x)
    off = lambda y: ((y - exact).norm() / exact.norm()).item()
    ours = QLinear(*_parts(layer), activations="tensor")(x)
    assert off(ours) < 0.02 and ((ours - theirs).norm() / exact.norm()).item() <= off(ours) + off(theirs)


def _parts(layer, **options):
    small = quantize_layer(layer, **options)
    return small.layer, small.packed


# ---------------------------------------------------------------- inputs of every sort


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return QLinear(*_parts(nn.Linear(200, 150)))


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return QConv2d(*_parts(nn.Conv2d(16, 80, 3)))


def test_shapes_and_precisions(linear, conv):
    x = torch.randn(6, 4, 200)
    full = linear(x)
    assert full.shape == (6, 4, 150)
    assert torch.allclose(linear(x[2, 1]), full[2, 1], rtol=0.05, atol=0.03) and linear(x[2, 1]).shape == (150,)
    assert torch.allclose(linear(x[:, ::2]), full[:, ::2], atol=1e-5)  # not contiguous
    assert torch.allclose(linear(x.permute(1, 0, 2)), full.permute(1, 0, 2), atol=1e-5)
    for dtype in (torch.half, torch.bfloat16, torch.double):
        y = linear(x.to(dtype))
        assert y.dtype == dtype and torch.allclose(y.float(), full, atol=0.05)
    assert linear(torch.empty(0, 200)).shape == (0, 150) and linear(torch.empty(2, 0, 200)).shape == (2, 0, 150)
    image = torch.randn(3, 16, 8, 9)
    assert conv(image[:0]).shape == (0, 80, 6, 7) and conv(image[0]).shape == (80, 6, 7)
    assert torch.allclose(conv(image.contiguous(memory_format=torch.channels_last)), conv(image), atol=1e-6)
    assert torch.allclose(
        conv(image.transpose(2, 3)), F.conv2d(image.transpose(2, 3), conv.weight, conv.bias), atol=0.1
    )


def test_low_precision_layers():
    for dtype in (torch.bfloat16, torch.half):
        layer = nn.Linear(200, 150).to(dtype)
        quick, x = QLinear(*_parts(layer)), torch.randn(5, 200)
        assert quick(x.to(dtype)).dtype == dtype
        assert torch.allclose(quick(x.to(dtype)).float(), layer(x.to(dtype)).float(), atol=0.1)
        moved = QLinear(*_parts(nn.Linear(200, 150))).to(dtype)
        assert moved(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("activations", ["row", "tensor"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_activations_stay_in_their_row(activations, bad):
    torch.manual_seed(0)
    layer = quantize_layer(nn.Linear(200, 150))
    quick, x = QLinear(layer.layer, layer.packed, activations=activations), torch.randn(5, 200)
    x[2, 7] = bad
    y, want = quick(x), layer(x)
    assert torch.equal(y[2].isnan(), want[2].isnan()) and torch.equal(y[2].nan_to_num(), want[2].nan_to_num())
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], quick(x[keep]))
    assert torch.equal(quick(x[2]).isnan(), want[2].isnan())


def test_nonfinite_images():
    layer = quantize_layer(nn.Conv2d(16, 80, 3))
    quick, x = QConv2d(layer.layer, layer.packed), torch.randn(3, 16, 6, 6)
    x[1, 0, 0, 0] = float("nan")
    y = quick(x)
    assert torch.equal(y.isnan(), layer(x).isnan()) and torch.equal(y[[0, 2]], quick(x[[0, 2]]))


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-6, 1e-3, 1e6, 1e25])
@pytest.mark.parametrize("activations", ["row", "tensor"])
def test_activations_of_every_size(size, activations):
    torch.manual_seed(0)
    layer = quantize_layer(nn.Linear(200, 150, bias=False))
    quick, x = QLinear(layer.layer, layer.packed, activations=activations), torch.randn(4, 200)
    y, want = quick(x * size) / size, layer(x)
    assert (y - want).norm() / want.norm() < 0.02
    assert torch.equal(quick(x * 0), torch.zeros(4, 150))


def test_rows_do_not_depend_on_their_batch(linear):
    x = torch.randn(7, 200) * torch.logspace(-2, 2, 7)[:, None]
    assert torch.allclose(linear(x)[2:4], linear(x[2:4]), rtol=0.05, atol=0.02 * x[3].abs().max().item())


def test_gradients_are_refused_not_invented(linear):
    x = torch.randn(3, 200, requires_grad=True)
    y = linear(x)
    with pytest.raises(RuntimeError, match="QLinear computes with integers"):
        y.sum().backward()
    assert not linear(x.detach()).requires_grad


def test_errors_name_what_is_wrong(linear, conv):
    with pytest.raises(ValueError, match="last dimension must be 200"):
        linear(torch.randn(3, 7))
    with pytest.raises(TypeError, match="dtype torch.int64"):
        linear(torch.zeros(3, 200, dtype=torch.long))
    with pytest.raises(TypeError, match="is a list"):
        linear([1.0])
    with pytest.raises(ValueError, match="height and width"):
        conv(torch.randn(1, 16, 2, 2))
    with pytest.raises(ValueError, match=r"\[batch, 16"):
        conv(torch.randn(1, 3, 9, 9))
    with pytest.raises(ValueError, match="activations is 'column'"):
        QLinear(*_parts(nn.Linear(3, 3)), activations="column")
    with pytest.raises(ValueError, match="groups of 4"):
        QLinear(*_parts(nn.Linear(8, 8), group=4))
    with pytest.raises(ValueError, match="activations names 'up'"):
        use_kernels(quantize_model(nn.Sequential(nn.Linear(8, 8))), activations={"up": "row"})
    with pytest.raises(ValueError, match="activations is 'rows'"):
        use_kernels(quantize_model(nn.Sequential(nn.Linear(8, 8))), activations={"*": "rows"})
    with pytest.raises(ValueError, match="padding is 'same'"):
        QConv2d(*_parts(nn.Conv2d(2, 2, 3, padding="same")))
    with pytest.raises(ValueError, match="padding_mode is 'reflect'"):
        QConv2d(*_parts(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")))
    with pytest.raises(ValueError, match="max_norm"):
        QEmbedding(*_parts(nn.Embedding(8, 8, max_norm=1.0)))
    table = QEmbedding(*_parts(nn.Embedding(8, 8)))
    for row in (8, -1):
        with pytest.raises((IndexError, RuntimeError)):
            table(torch.tensor([row]))
    with pytest.raises(TypeError, match="float32"):
        table(torch.randn(3))


def test_embedding_is_exact():
    torch.manual_seed(0)
    for options in (dict(bits=8), dict(bits=4), dict(bits=3), dict(bits=8, symmetric=False), dict(bits=4, group=16)):
        small = quantize_layer(nn.Embedding(40, 32, padding_idx=0), **options)
        quick = QEmbedding(small.layer, small.packed)
        for ids in (
            torch.randint(0, 40, (3, 5)),
            torch.tensor(7),
            torch.empty(0, 4, dtype=torch.long),
            torch.randint(0, 40, (6,), dtype=torch.int32),
        ):
            assert torch.equal(quick(ids), small(ids))


# ---------------------------------------------------------------- rows, columns, many rows, groups


@FAST
@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 60),
    scale=st.floats(-20, 20),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 99),
)
def test_stretched_rows_reach_from_zero_to_one(rows, n, scale, shift, seed):
    torch.manual_seed(seed)
    x = (torch.randn(rows, n) + shift) * 2.0**scale
    stretched, low, width = kernels.stretch_rows(x.clone())
    assert (
        stretched.min() == 0
        and stretched.max() <= 1
        and torch.allclose(stretched * width + low, x, rtol=1e-5, atol=1e-5 * x.abs().max().item())
    )


@FAST
@given(
    rows=st.integers(1, 300),
    inputs=st.sampled_from([16, 60]),
    outputs=st.integers(1, 80),
    symmetric=st.booleans(),
    kept=st.sampled_from([torch.float16, torch.float32]),
    activations=st.sampled_from(["row", "tensor"]),
    seed=st.integers(0, 99),
)
def test_columns_multiply_the_input(rows, inputs, outputs, symmetric, kept, activations, seed):
    "A layer with column scales is the layer without them on a scaled input, in integers too."
    torch.manual_seed(seed)
    linear, c, x = nn.Linear(inputs, outputs), (torch.rand(inputs) * 3 + 0.1).to(kept), torch.randn(rows, inputs)
    small = quantize_layer(linear, columns=c, symmetric=symmetric)
    close(*both(small, QLinear, x, activations=activations))
    bare = copy.deepcopy(linear)
    bare.weight.data /= c
    inner = quantize_layer(bare, symmetric=symmetric)
    close(both(small, QLinear, x, activations=activations)[0], both(inner, QLinear, x * c, activations=activations)[0])


def test_columns_of_convolutions_and_tables():
    torch.manual_seed(0)
    c = torch.rand(8) + 0.5
    small, x = quantize_layer(nn.Conv2d(8, 200, 3, padding=1), columns=c), torch.randn(4, 8, 9, 9)
    a, b = both(small, QConv2d, x)
    close(a, b)
    assert (a - small(x)).norm() / small(x).norm() < 0.02
    for layer, x in (
        (nn.Linear(8, 6), torch.randn(3, 8)),
        (nn.Conv2d(8, 6, 3), torch.randn(2, 8, 5, 5)),
    ):  # so few weights that they are expanded
        small = quantize_layer(layer, columns=c)
        assert "too small" in repr(use_kernels(small)) and torch.allclose(use_kernels(small)(x), small(x), atol=1e-6)
    table = quantize_layer(nn.Embedding(50, 8), columns=c)
    assert torch.equal(QEmbedding(table.layer, table.packed)(torch.arange(50)), table(torch.arange(50)))
    with pytest.raises(ValueError, match="between its groups"):
        QConv2d(*_parts(nn.Conv2d(8, 8, 3, groups=2), columns=torch.ones(4)))


def test_smoothing_makes_outliers_harmless():
    """SmoothQuant's case: a few channels are a hundred times the others; scales that move over to the weight save
    the rest."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 196, bias=False), torch.randn(40, 64)
    x[:, ::16] *= 100
    c = (layer.weight.detach().abs().amax(0) / x.abs().amax(0)).sqrt()

    def off(**how):
        with torch.no_grad():
            return (
                (QLinear(*_parts(layer, **how), activations="tensor")(x) - layer(x)).norm() / layer(x).norm()
            ).item()

    assert off(columns=c) < 0.5 * off()


def test_many_rows_use_another_kernel_and_the_same_integers():
    torch.manual_seed(0)
    for bias in (True, False):
        quick, x = (
            QLinear(*_parts(nn.Linear(100, 150, bias=bias)), activations="tensor"),
            torch.randn(2 * kernels.LARGE, 100),
        )
        few = copy.deepcopy(quick)
        if capabilities().large:
            assert quick(x) is not None and set(quick.prepared.entry[2]) == {"whole"}
        few.kernel = "plain"
        close(quick(x), few(x))
        for rows in (kernels.LARGE - 1, kernels.LARGE):  # either way the answer is the weight's
            assert (quick(x[:rows]) - F.linear(x[:rows], quick.weight, quick.bias)).norm() < 0.01 * quick(
                x[:rows]
            ).norm()


@FAST
@given(
    rows=st.integers(1, 60),
    n=st.integers(1, 90),
    scale=st.floats(-6, 20),
    shift=st.floats(-30, 30),
    seed=st.integers(0, 99),
)
def test_rows_in_one_pass(rows, n, scale, shift, seed):
    """What PyTorch packs is what the formula says: a code may differ where a tie is rounded, never a step or a
    smallest value."""
    torch.manual_seed(seed)
    x = (torch.randn(rows, n) + shift) * 2.0**scale
    packed, step, low = engines.rows_in_one_pass(x)
    codes, *same = kernels.quantize_rows(x)
    assert torch.equal(step, same[0]) and torch.equal(low, same[1])
    assert (packed[:, :n].int() - codes.int()).abs().max() <= 1 and (
        packed[:, :n] != codes
    ).float().mean() < 0.01 + 1 / codes.numel()
    assert ((codes * step + low - x).abs() <= 0.51 * step + 1e-6 * x.abs().max()).all()


@pytest.mark.parametrize("activations", ["row", "tensor"])
def test_an_input_is_quantized_once_for_layers_that_share_it(activations, monkeypatch):
    torch.manual_seed(0)
    counted = []
    ready, coded = QLinear._ready, QLinear._coded
    monkeypatch.setattr(QLinear, "_ready", lambda self, *args: counted.append(self) or ready(self, *args))
    monkeypatch.setattr(QLinear, "_coded", lambda self, *args: counted.append(self) or coded(self, *args))
    for c, rows in ((None, 300), (torch.rand(100) + 0.5, 300), (torch.rand(100) + 0.5, 30)):
        layers = [
            QLinear(*_parts(nn.Linear(100, 150), **({} if c is None else {"columns": c})), activations=activations)
            for _ in range(3)
        ]
        apart, x = [copy.deepcopy(l) for l in layers], torch.randn(rows, 100)
        want = [l(x.clone()) for l in apart]
        counted.clear()
        with torch.no_grad():
            assert all(torch.equal(l(x), w) for l, w in zip(layers, want)) and len(counted) == 1
        with torch.no_grad():  # written to in place, by PyTorch or by NumPy
            for write in (lambda: x.mul_(2), lambda: x.__setitem__(0, 7.0), lambda: x.numpy().__imul__(3)):
                layers[0](x)
                write()
                assert torch.equal(layers[1](x), apart[1](x.clone()))
        other = QLinear(*_parts(nn.Linear(100, 150), columns=torch.rand(100) + 0.5), activations=activations)
        x = torch.randn(rows, 100)
        with torch.no_grad():
            layers[0](x)
            assert torch.equal(other(x), copy.deepcopy(other)(x.clone()))  # other column scales
        with torch.inference_mode():
            y = torch.randn(rows, 100)
            layers[0](y)
            y.mul_(2)
            assert torch.equal(layers[1](y), apart[1](y.clone()))


def _sharing(widths=(100, 150, 200), inputs=100, bias=True, **options):
    "Layers for one input, and the same layers that never meet each other's."
    parts = [_parts(nn.Linear(inputs, n, bias=bias), **options) for n in widths]
    return [QLinear(*p) for p in parts], [QLinear(*p) for p in parts]


def _answers(layers, x, copied=False):
    with torch.no_grad():
        return [layer(x.clone() if copied else x) for layer in layers]


@FAST
@given(
    rows=st.integers(2, 70),
    widths=st.lists(st.integers(100, 300), min_size=2, max_size=4),
    inputs=st.integers(90, 200),
    bias=st.booleans(),
    columns=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers_that_share_an_input_are_one_product_with_the_same_bits(rows, widths, inputs, bias, columns, seed):
    torch.manual_seed(seed)
    options = {"columns": torch.rand(inputs) + 0.5} if columns else {}
    layers, apart = _sharing(widths, inputs, bias, **options)
    for _ in range(3):
        x = torch.randn(rows, inputs) * 10.0 ** torch.randint(-2, 3, (rows, 1))
        got = _answers(layers, x)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, _answers(apart, x, True)))
    if capabilities().large and rows <= FEW_TOGETHER:
        assert len(layers[0].prepared.group[0]) == len(widths) and all(l.prepared.group is None for l in layers[1:])
    x[0, 0] = float("nan")
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(_answers(layers, x), _answers(apart, x, True)))


@pytest.mark.skipif(not capabilities().small, reason="one product of codes alone")
@FAST
@given(rows=st.integers(1, 140), inputs=st.integers(1, 300), outputs=st.integers(1, 300), seed=st.integers(0, 99))
def test_the_product_that_is_quick_to_start_has_the_same_bits(rows, inputs, outputs, seed):
    torch.manual_seed(seed)
    codes = torch.randint(0, 256, (rows, inputs)).to(torch.uint8)
    weight = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8)
    scale = torch.rand(outputs) * 10.0 ** torch.randint(-9, 9, (outputs,))
    quick = engines.run_small(codes, engines.pack_small(weight), scale)
    assert torch.equal(quick, engines.run_large(codes, engines.pack_large(weight), scale))
    assert torch.equal(quick, (codes.double() @ weight.double().t()).float() * scale)


def _grouped(**options):
    layers, apart = _sharing(**options)
    for _ in range(3):
        _answers(layers, torch.randn(20, 100))
    assert not capabilities().large or layers[0].prepared.group
    return layers, apart


def _same_answers(layers, apart, x=None):
    x = torch.randn(20, 100) if x is None else x
    return all(torch.equal(a, b) for a, b in zip(_answers(layers, x), _answers(apart, x, True)))


def test_what_was_multiplied_together_is_not_taken_when_something_changed():
    torch.manual_seed(0)
    for change in range(7):
        layers, apart = _grouped()
        first, second, third = layers
        x = torch.randn(20, 100)
        if change == 0:  # a weight
            _answers([first], x)
            second.packed.scale.mul_(2)  # which `apart` shares
            assert torch.equal(_answers([second], x)[0], _answers(apart[1:2], x, True)[0])
        elif change == 1:  # a state
            other = QLinear(*_parts(nn.Linear(100, 150)))
            _answers([first], x)
            second.load_state_dict(other.state_dict())
            apart[1] = copy.deepcopy(other)
        elif change == 2:  # a bias
            _answers([first], x)
            third.layer.bias.data.add_(1)
        elif change == 3:  # a hook that exchanges the input
            second.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
            apart[1].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        elif change == 4:  # how a layer computes
            second.activations = apart[1].activations = "tensor"
        elif change == 5:  # one of them is gone
            del second, layers[1], apart[1]
        elif change == 6:  # another order, another input
            layers, apart = layers[::-1], apart[::-1]
            _answers([third], torch.randn(5, 100))
        for _ in range(5):
            assert _same_answers(layers, apart)


def test_products_that_nobody_wants_are_no_longer_made(monkeypatch):
    "An encoder-decoder attention asks its key and value for another input than its query."
    torch.manual_seed(0)
    layers, apart = _grouped()
    made, run = [], engines.run_large
    monkeypatch.setattr(engines, "run_large", lambda c, w, s, *a: made.append(len(s)) or run(c, w, s, *a))
    for _ in range(9):  # always two of three
        x, z = torch.randn(20, 100), torch.randn(20, 100)
        assert _same_answers(layers[:1], apart[:1], x) and _same_answers(layers[1:], apart[1:], z)
    assert not capabilities().large or made.count(100 + 150 + 200) <= 3
    for i in range(20):  # and never the same
        x = torch.randn(20, 100)
        some = [0, 1] if i % 2 else [0, 2]
        assert _same_answers([layers[j] for j in some], [apart[j] for j in some], x)
    assert layers[0].prepared.in_vain <= 4


def test_a_group_is_neither_copied_nor_kept():
    torch.manual_seed(0)
    layers, apart = _grouped()
    model = nn.ModuleList(layers)
    names, size = list(model.state_dict()), [l.nbytes for l in layers]
    again = copy.deepcopy(model)
    assert all(l.prepared.group is None and l.prepared.others is None for l in again)
    assert _same_answers(list(again), apart) and list(again.state_dict()) == names
    check_ordinary(model)  # nothing in it leads back to the original
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert _same_answers(list(torch.load(stream, weights_only=False)), apart)
    if capabilities().large:  # the weights lie in the group, once
        weights = sum(l.q.numel() for l in layers)
        assert weights < size[0] - layers[0].q.nbytes < 1.3 * weights and size[1] < 1.2 * layers[1].q.nbytes
    weak = weakref.ref(layers[1].prepared)
    del layers, model, apart, again
    gc.collect()
    assert weak() is None


def test_what_was_quantized_goes_with_its_input():
    layer, x = QLinear(*_parts(nn.Linear(100, 150))), torch.randn(30, 100)
    layer(x)
    assert integer_layers.LAST_INPUT.one.made is not None
    del x
    assert integer_layers.LAST_INPUT.one.made is None


def test_threads_share_layers_and_inputs():
    torch.manual_seed(0)
    layers, xs = [QLinear(*_parts(nn.Linear(100, 150))) for _ in range(3)], [torch.randn(40, 100) for _ in range(4)]
    want = [[l(x.clone()) for l in layers] for x in xs]
    wrong = []

    def work(seed):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist() * 10
        with torch.no_grad():
            wrong.extend((i, j) for i in order for j, l in enumerate(layers) if not torch.equal(l(xs[i]), want[i][j]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_rows_of_extreme_sizes():
    "Rows that are constant, tiny or huge beside ordinary ones."
    torch.manual_seed(0)
    small = quantize_layer(nn.Linear(200, 150, bias=False))
    quick, x = QLinear(small.layer, small.packed), torch.randn(6, 200)
    x *= torch.tensor([1.0, 1e-9, 1e-30, 1e15, 1e25, 0.0])[:, None]
    with torch.no_grad():
        for part in (x, x[[0, 5]], x[[0, 1]], x[[0, 4]]):
            y, want = quick(part), small(part)
            assert ((y - want).norm(dim=1) <= 0.01 * want.norm(dim=1)).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(bits=4, group=32),
        dict(bits=4, group=32, symmetric=False),
        dict(bits=4, group=64, columns=torch.linspace(0.5, 1.5, 128)),
        dict(bits=3, group=32),
        dict(bits=2, group=32, symmetric=False),
        dict(bits=4, group=128, symmetric=False),
    ],
    ids=lambda o: " ".join(f"{k}={v}" if k != "columns" else k for k, v in o.items()),
)
def test_groups_of_four_bits(options):
    torch.manual_seed(0)
    for bias in (True, False):
        small = quantize_layer(nn.Linear(128, 64, bias=bias), **options)
        quick = QLinear(small.layer, small.packed)
        for x in (
            torch.randn(128),
            torch.randn(1, 128),
            torch.randn(2, 3, 128),
            torch.randn(30, 128),
            torch.randn(0, 128),
            torch.randn(3, 128).half(),
        ):
            want = small.float()(x.float())
            got = quick(x)
            assert got.shape == want.shape and got.dtype == x.dtype
            assert (
                not x.numel() or (got.float() - want).norm() <= 0.005 * want.norm()
            )  # bfloat16 has 8 significant bits
        x = torch.randn(3, 128)
        x[1, 5] = float("nan")
        assert torch.equal(quick(x).isnan(), small(x).isnan())
    assert ("bfloat16" in repr(quick)) == capabilities().int4


def test_requantized_layers_run_as_int8():
    torch.manual_seed(0)
    x = torch.randn(50, 96)
    for options in (
        dict(bits=4, group=32),
        dict(codebook="nf4", group=32),
        dict(bits=12),
        dict(bits=4, group=32, columns=torch.rand(96) + 0.5),
        dict(bits=3, group=20),
    ):
        small = quantize_layer(nn.Linear(96, 130), **options)
        quick = use_kernels(small, requantize=True)
        assert (
            type(quick) is QLinear
            and quick.options()["requantize"]
            and "requantized" in repr(quick)
            and quick.packed is small.packed
        )
        close(*both(small, QLinear, x, requantize=True))
        assert (quick(x) - small(x)).norm() / small(x).norm() < 0.02
    conv = quantize_layer(nn.Conv2d(8, 200, 3), 4, group=8)
    quick, x = use_kernels(conv, requantize=True), torch.randn(2, 8, 9, 9)
    assert type(quick) is QConv2d and (quick(x) - conv(x)).norm() / conv(x).norm() < 0.03


def test_activations_by_pattern():
    model = quantize_model(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))
    quick = use_kernels(model, activations={"2": "row", "*": "tensor"})
    assert (quick[0].activations, quick[2].activations) == ("tensor", "row")
    assert use_kernels(model, activations={"2": "tensor"})[0].activations == "row"


# ---------------------------------------------------------------- by time


def _slowed(monkeypatch, what, seconds=0.002):
    "Make the kernels (or floats) of this process wait."

    def wait(f):
        return lambda *a, **k: (time.sleep(seconds), f(*a, **k))[1]

    if what == "integers":
        for name in ("run_small", "run_large", "run_convolution"):
            monkeypatch.setattr(engines, name, wait(getattr(engines, name)))
        monkeypatch.setattr(
            torch.ops.quantized.linear_dynamic, "default", wait(torch.ops.quantized.linear_dynamic.default)
        )
    else:
        monkeypatch.setattr(F, "linear", wait(F.linear))
        monkeypatch.setattr(F, "conv2d", wait(F.conv2d))


class _Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(8, 128, 3, padding=1), nn.Linear(128, 150), nn.Linear(128, 150)
        self.words = nn.Embedding(9, 128)

    def forward(self, ids, scale=1.0):
        x = self.words(ids)
        x = self.conv(x.view(len(x), 8, 4, 4) * scale).reshape(len(x), 16, 128)
        return self.a(x) + self.b(x)


@pytest.mark.skipif(not (capabilities().linear and capabilities().convolution), reason="no integer kernels")
@pytest.mark.parametrize("slow", ["integers", "floats"])
def test_with_an_example_the_quicker_layer_stays(slow, monkeypatch):
    torch.manual_seed(0)
    model, ids = quantize_model(_Three().eval()), torch.randint(0, 9, (3,))
    before = copy.deepcopy(model.state_dict())
    _slowed(monkeypatch, slow)
    quick = use_kernels(model, example=(ids, 2.0))
    monkeypatch.undo()
    for layer in (quick.conv, quick.a, quick.b):
        assert (layer.kernel == "floats") == layer.floats == (slow == "integers")
        assert ("computes in floats: quicker" in repr(layer)) == (slow == "integers")
    assert type(quick.words) is QEmbedding and "computes in floats" in str(what_runs(quick)) or slow == "floats"
    with torch.no_grad():
        want = model(ids) if slow == "integers" else use_kernels(model)(ids)
        assert torch.allclose(quick(ids), want, atol=1e-5) and torch.equal(copy.deepcopy(quick)(ids), quick(ids))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in quick.modules())


@pytest.mark.parametrize(
    "options", [dict(bits=8), dict(bits=8, symmetric=False), dict(bits=3, group=32), dict(codebook="nf4", group=16)]
)
@pytest.mark.parametrize("requantize", [False, True])
def test_floats_that_were_quicker_are_those_of_the_file(options, requantize, tmp_path):
    torch.manual_seed(0)
    columns = {"columns": torch.rand(128) + 0.5}
    for layer, how in ((nn.Linear(128, 160), columns), (nn.Linear(128, 160), {}), (nn.Conv2d(32, 40, 3), {})):
        small = quantize_layer(layer, **options | how)
        cls = QLinear if isinstance(layer, nn.Linear) else QConv2d
        if cls.refuses(small.layer, small.q, "weight", requantize) is not None:
            continue
        quick = cls(small.layer, small.packed, requantize=requantize, floats=True)
        x = torch.randn(5, 128) if cls is QLinear else torch.randn(5, 32, 7, 7)
        with torch.no_grad():
            y = quick(x)
            if not requantize:
                assert torch.allclose(y, small(x), rtol=1e-4, atol=1e-5)
            assert (y - small(x)).norm() < 0.02 * y.norm()
            x[0] = float("nan")
            assert quick(x)[0].isnan().all() and torch.allclose(quick(x)[1:], y[1:], atol=1e-5)
        model = nn.Sequential(quick)
        pack.save(model, tmp_path / "m.mz")
        again = pack.load(tmp_path / "m.mz", nn.Sequential(copy.deepcopy(layer)))
        assert again[0].floats and again[0].kernel == "floats" and again[0].options() == quick.options()
        with torch.no_grad():
            assert torch.equal(again(x)[1:], quick(x)[1:])
        other = cls(small.layer, small.packed, requantize=requantize)
        other.load_state_dict(quick.state_dict())
        with torch.no_grad():
            assert torch.equal(other(x)[1:], quick(x)[1:]) and other.kernel == "floats"
        state = quick.state_dict()
        state["_extra_state"] = integer_layers.as_state('{"activations": "row", "floats": 1}')
        with pytest.raises((ValueError, RuntimeError), match="floats"):
            other.load_state_dict(state)


# ---------------------------------------------------------------- compiled


@pytest.mark.hypothesis  # so that a search comes here: also traced with every layer
def test_compiled_layers_give_the_same_numbers():
    "No C++ compiler is needed: the graph is captured as a whole and run as it is."
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.a, self.b = (
                nn.Embedding(300, 64),
                nn.Conv2d(1, 8, 3, padding=1),
                nn.Linear(512, 128),
                nn.Linear(128, 48),
            )

        def forward(self, ids):
            return self.b(F.gelu(self.a(self.conv(self.words(ids)[:, None]).transpose(1, 2).flatten(2))))

    ids = torch.randint(0, 300, (3, 7))
    for options, example in ((dict(bits=8), None), (dict(bits=4, group=32), None), (dict(bits=8), ids)):
        quick = use_kernels(quantize_model(Model().eval(), **options), example=example)
        with torch.no_grad():
            want = quick(ids)
            torch._dynamo.reset()
            if FUZZ or "group" in options:
                traced = torch.compile(copy.deepcopy(quick), backend="aot_eager", fullgraph=True)
                assert torch.allclose(traced(ids), want, rtol=1e-5, atol=1e-5)
            compiled = torch.compile(quick, backend="eager", fullgraph=True)
            assert torch.equal(compiled(ids), want) and torch.equal(compiled(ids[:2]), quick(ids[:2]))
    other = copy.deepcopy(quick)
    with torch.no_grad():
        assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(ids), want)
    assert other.a.key != quick.a.key


# ---------------------------------------------------------------- modules


def test_copies_states_and_threads(linear):
    x = torch.randn(9, 200)
    want = linear(x)
    assert torch.equal(copy.deepcopy(linear)(x), want)
    torch.manual_seed(1)
    other = QLinear(*_parts(nn.Linear(200, 150)))
    other(x)  # prepared for its first weight
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), want)
    fresh, results = copy.deepcopy(linear), [None] * 8

    def work(i):
        results[i] = fresh(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(r, want) for r in results)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(linear)(x), want)
    assert (
        linear.nbytes < 4 * 200 * 150 * 0.9 and "200→150" in repr(linear) and linear.options() == {"activations": "row"}
    )


def test_no_float_copy_is_kept(linear):
    linear(torch.randn(2, 200))
    assert all(t.dtype != torch.float32 or t.numel() <= 150 for t in (*linear.parameters(), *linear.buffers()))
    assert all(
        not isinstance(t, torch.Tensor) or t.dtype != torch.float32 or t.numel() <= 150
        for made in linear.prepared.entry[2].values()
        for t in (made if isinstance(made, tuple) else (made,))
    )


def test_use_kernels_leaves_what_it_cannot_do():
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.MultiheadAttention(64, 4),
        nn.TransformerEncoderLayer(64, 4, 64),
        nn.Conv1d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding_mode="circular"),
        nn.EmbeddingBag(10, 8),
        nn.Embedding(10, 8),
    )
    q = quantize_model(model)
    before = str(what_runs(q))
    quick = use_kernels(q)
    kinds = {n: k for n, k, _ in what_runs(quick)}
    assert kinds["0"] == "QLinear" and kinds["6"] == "QEmbedding"
    assert all(k == "Dequantize" for n, k in kinds.items() if n not in "06")
    reasons = {n: r for n, _, r in what_runs(quick)}
    assert (
        "MultiheadAttention" in reasons["1.out_proj"]
        and "TransformerEncoderLayer" in reasons["2.linear1"]
        and "circular" in reasons["4"]
    )
    assert all(reasons[n] in repr(quick.get_submodule(n)) for n in kinds if not n.endswith("weight"))
    assert "expands" not in repr(q) and repr(copy.deepcopy(quick)) == repr(use_kernels(quick)) == repr(quick)
    assert str(what_runs(q)) == before and type(q[0]) is Dequantize and quick[0].packed is q[0].packed
    x = torch.randn(2, 5, 64)
    assert torch.allclose(quick[2].eval()(x), q[2].eval()(x), atol=1e-5)
    with pytest.raises(ValueError, match="no compressed layer"):
        use_kernels(model)
    with pytest.raises(TypeError, match="model is 'model'; it may be an nn.Module"):
        use_kernels("model")


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(300, 64), nn.Linear(64, 300, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids))

    quick = use_kernels(quantize_model(Tied()))
    assert quick.words.packed is quick.head.packed and type(quick.head) is QLinear and type(quick.words) is QEmbedding
    assert quick(torch.tensor([3])).shape == (1, 300)


def test_without_kernels_the_same_numbers(monkeypatch):
    "On a machine that has no int8 kernel a layer from a file computes the same integers."
    torch.manual_seed(0)
    model, x = quantize_model(nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 100))), torch.randn(4, 200)
    with torch.no_grad():
        here = use_kernels(model)(x)
    monkeypatch.setattr(
        engines, "capabilities", lambda: engines.Capabilities("none", False, False, False, False, False)
    )
    assert all(type(m) is not QLinear for m in use_kernels(model).modules())
    there = nn.Sequential(QLinear(model[0].layer, model[0].packed), nn.ReLU(), QLinear(model[2].layer, model[2].packed))
    assert there[0].kernel == "plain"
    with torch.no_grad():
        assert (there(x) - here).norm() / here.norm() < 2e-3  # a last bit may tip a code of the second layer


# ---------------------------------------------------------------- right, or refused

HOOKS = {
    "forward": lambda l: l.register_forward_hook(lambda m, i, o: 2 * o),
    "pre": lambda l: l.register_forward_pre_hook(lambda m, i: (3 * i[0],)),
    "keywords": lambda l: l.register_forward_pre_hook(lambda m, i, k: ((3 * i[0],), k), with_kwargs=True),
    "always": lambda l: l.register_forward_hook(lambda m, i, o: o + 1, always_call=True),
    "reads the weight": lambda l: l.register_forward_hook(lambda m, i, o: o + m.weight.sum()),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["layer", "wrapper", "both"])
def test_hooks_go_on(kind, where):
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(64, 200), torch.randn(5, 64)), (nn.Conv2d(16, 96, 3), torch.randn(2, 16, 6, 6))):
        if where != "wrapper":
            HOOKS[kind](layer)
        q = quantize_model(nn.Sequential(layer))
        if where != "layer":
            HOOKS["pre" if kind == "pre" else "forward"](q[0])
        with torch.no_grad(), unchanged(q, x):
            quick, want = use_kernels(q), q(x)
            assert type(quick[0]) in (QLinear, QConv2d) and (quick(x) - want).norm() < 0.02 * want.norm()
        codes_alone(layer, quick, x)


def test_a_hook_that_is_a_method_belongs_to_the_copy():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.factor = quantize_layer(nn.Linear(64, 200)), nn.Parameter(torch.tensor(2.0))
            self.layer.register_forward_hook(self.scale)

        def scale(self, layer, args, y):
            return y * self.factor

        def forward(self, x):
            return self.layer(x)

    model, x = Scaled(), torch.randn(3, 64)
    quick = use_kernels(model)
    with torch.no_grad():
        want = quick(x)
        model.factor.mul_(7)
        assert torch.equal(quick(x), want)
        quick.factor.mul_(2)
        assert torch.equal(quick(x), 2 * want)


def test_an_own_forward_is_refused():
    model = quantize_model(nn.Sequential(nn.Linear(64, 64)))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="forward of its own instance"):
        use_kernels(model)


def test_programs_hold_their_weights(tmp_path):
    "Exported, saved, and run in a process that has never seen the models; compiled, and changed afterwards."
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.a, self.up = (
                nn.Embedding(60, 32),
                nn.Conv2d(1, 96, (3, 4), padding=(1, 0)),
                nn.Linear(96 * 29, 48),
                nn.ConvTranspose1d(48, 8, 3),
            )

        def forward(self, ids):
            return self.up(
                self.a(self.conv(self.words(ids)[:, None]).transpose(1, 2).flatten(2).relu()).transpose(1, 2)
            )

    ids, images = torch.randint(0, 60, (3, 7)), torch.randn(3, 2, 6, 6)
    static = nn.Sequential(
        nn.Conv2d(2, 96, 3, padding="same", padding_mode="reflect"), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 36, 10)
    ).eval()
    models = [
        (quantize_model(Model().eval(), 4, group=32), ids),
        (use_kernels(quantize_model(Model().eval())), ids),
        (use_kernels(quantize_model(Model().eval(), symmetric=False)), ids),
        (use_kernels(quantize_model(Model().eval(), 4, group=16), activations="row", requantize=True), ids),
        (convert(prepare(static, 4, batches=[images], activations=6)), images),
    ]
    with torch.no_grad():
        for i, (model, x) in enumerate(models):
            torch.export.save(
                torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)),
                tmp_path / f"{i}.pt2",
            )
            x = x[[0, 1, 2, 0]]
            torch.save((x, model(x)), tmp_path / f"{i}.pt")
        torch._dynamo.reset()
        quick = models[1][0]
        compiled = torch.compile(quick, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids), quick(ids))
        quick.a.activations = "tensor"
        assert torch.equal(compiled(ids), quick(ids))
        quick.a.layer.bias.add_(1)
        assert torch.equal(compiled(ids), quick(ids))
        quick.load_state_dict(use_kernels(quantize_model(Model().eval())).state_dict())
        assert torch.equal(compiled(ids), quick(ids))
    code = (
        "import sys, torch, modelzip.kernels\nfor i in range(int(sys.argv[2])):\n    x, y ="
        " torch.load(f'{sys.argv[1]}/{i}.pt')\n    assert"
        " torch.equal(torch.export.load(f'{sys.argv[1]}/{i}.pt2').module()(x), y), i"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(len(models))], check=True)


def test_states_carry_options():
    small, x = quantize_layer(nn.Linear(200, 150)), torch.randn(5, 200) + 2
    a, b = (QLinear(small.layer, small.packed, activations=how) for how in ("row", "tensor"))
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        assert b.activations == "row" and torch.equal(a(x), b(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_integer(dtype):
    torch.manual_seed(0)
    layers = [
        (use_kernels(quantize_layer(nn.Linear(n, 150), **how), activations=a), torch.randn(5, n) * 300)
        for n, how in ((200, {}), (200, {"symmetric": False}), (8, {}), (64, {"bits": 4, "group": 32}))
        for a in ("row", "tensor")
        if not (how.get("group") and 150 % 16)
    ]
    layers += [(use_kernels(quantize_layer(nn.Linear(64, 160), 4, group=32)), torch.randn(3, 64) * 300)]
    layers += [
        (use_kernels(quantize_layer(nn.Conv2d(8, n, 3)), activations=a), torch.randn(2, 8, 6, 6) * 300)
        for n in (4, 200)
        for a in ("row", "tensor")
    ]
    with torch.no_grad():
        for layer, x in layers:
            want = layer(x)
            with torch.autocast("cpu", dtype=dtype):
                got, wide = layer(x), layer(x.double())
            hole = x.clone()
            hole[1].view(-1)[0] = float("nan")
            with torch.autocast("cpu", dtype=dtype):
                assert layer(hole)[1].isnan().any() and not layer(hole)[0].isnan().any()
            assert got.dtype == dtype and wide.dtype == torch.float64 and torch.equal(got, want.to(dtype))


def test_what_the_caller_has_set_does_not_matter():
    found = capabilities.__wrapped__()
    assert found == capabilities()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert capabilities.__wrapped__() == found
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert capabilities.__wrapped__() == found
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert capabilities.__wrapped__() == found
    small, conv = quantize_layer(nn.Linear(33, 270)), quantize_layer(nn.Conv2d(7, 231, 3))
    x, image = torch.randn(3, 33), torch.randn(2, 7, 5, 5)
    with torch.no_grad():
        want = (
            QLinear(small.layer, small.packed)(x),
            QConv2d(conv.layer, conv.packed)(image),
            QConv2d(conv.layer, conv.packed, activations="row")(image),
        )
        for state in (lambda: torch.device("meta"), lambda: torch.autocast("cpu", enabled=False)):
            linear, convolution, images = (
                QLinear(small.layer, small.packed),
                QConv2d(conv.layer, conv.packed),
                QConv2d(conv.layer, conv.packed, activations="row"),
            )
            with state():
                got = linear(x), convolution(image), images(image)
            assert all(map(torch.equal, got, want))


def test_writes_that_nobody_counts_are_seen():
    torch.manual_seed(0)
    for rows, how in ((5, {}), (1, {}), (30, {"columns": torch.rand(100) + 0.5}), (400, {}), (2000, {})):
        a, b = (QLinear(*_parts(nn.Linear(100, 150), **how)) for _ in range(2))
        alone = copy.deepcopy(b)
        with torch.no_grad():
            for write in (
                lambda x: x.data.mul_(3),
                lambda x: x.data[0].neg_(),
                lambda x: x.numpy().__imul__(3),
                lambda x: torch.from_dlpack(x)[-1].zero_(),
                lambda x: x.data.copy_(x.flip(0).clone()),
                lambda x: x.untyped_storage().fill_(0),
            ):
                x = torch.randn(rows, 100)
                a(x)
                write(x)
                assert torch.equal(b(x), alone(x.clone()))
        with torch.inference_mode():
            x = torch.randn(rows, 100)
            a(x)
            x.mul_(3)
            assert torch.equal(b(x), alone(x.clone()))
    with torch.no_grad():
        x = torch.randn(5, 100)
        for layer in (a, QConv2d(*_parts(nn.Conv2d(8, 200, 3)))):
            x = torch.randn(5, 100) if layer is a else torch.randn(1, 8, 5, 5)
            y = layer(x)
            layer.layer.bias.data.add_(1)
            assert torch.allclose(layer(x), y + 1, atol=1e-5)


@settings(max_examples=examples(25))
@given(
    rows=st.integers(3, 30),
    inputs=st.integers(1, 120),
    outputs=st.integers(1, 90),
    symmetric=st.booleans(),
    bias=st.booleans(),
    columns=st.booleans(),
    odd=st.sampled_from(["", "nan", "tiny", "huge", "zero"]),
    seed=st.integers(0, 9999),
)
@example(3, 49, 1, False, False, False, "huge", 0)
def test_what_becomes_of_a_row_does_not_depend_on_the_others(
    rows, inputs, outputs, symmetric, bias, columns, odd, seed
):
    "To the last bit, for batches of two rows and more."
    torch.manual_seed(seed)
    small = quantize_layer(
        nn.Linear(inputs, outputs, bias=bias),
        symmetric=symmetric,
        **({"columns": torch.rand(inputs) + 0.5} if columns else {}),
    )
    layer, x = QLinear(small.layer, small.packed), torch.randn(rows, inputs) * torch.logspace(-3, 2, rows)[:, None]
    if capabilities().linear:
        layer.kernel = "int8"
    if odd:
        x[0] = {"nan": float("nan"), "tiny": x[0] * 1e-12, "huge": 3e38, "zero": 0.0}[odd]
    if odd == "huge":
        x[0, 0] = -3e38
    some = torch.randperm(rows)[: max(2, rows // 2)]
    with torch.no_grad():
        y, part = layer(x)[some], layer(x[some])
    wide = (
        x[some].amax(1) - x[some].amin(1)
    ).isinf()  # a range that float32 cannot hold: the row is computed in floats, whose sums depend on the batch
    assert torch.allclose(y[wide], part[wide], rtol=1e-5)
    assert torch.equal(y.isnan(), part.isnan()) and torch.equal(y[~wide].nan_to_num(), part[~wide].nan_to_num())


@settings(max_examples=examples(20))
@given(
    channels=st.sampled_from([4, 8, 12]),
    out=st.integers(1, 12),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2, 4]),
    relu=st.sampled_from(["none", "all", "some"]),
    seed=st.integers(0, 9999),
)
def test_an_image_is_answered_the_same_in_any_batch(channels, out, kernel, stride, padding, groups, relu, seed):
    "To the last bit, alone too; and with 255 steps for its own range."
    torch.manual_seed(seed)
    small = quantize_layer(nn.Conv2d(channels, out * groups, kernel, stride, padding, groups=groups))
    layer, x = (
        QConv2d(small.layer, small.packed, activations="row"),
        torch.randn(5, channels, 7, 8) * torch.logspace(-3, 2, 5).view(-1, 1, 1, 1),
    )
    if capabilities().convolution:
        layer.kernel = "onednn"
    if relu != "none":
        x[: 5 if relu == "all" else 3].relu_()
    with torch.no_grad():
        y, exact = layer(x), small(x)
        for some in ([0], [4, 1], [2, 0, 3]):
            assert torch.equal(y[some], layer(x[some]))
    step = (x.amax((1, 2, 3)).clamp(min=0) - x.amin((1, 2, 3)).clamp(max=0)) / 255
    assert (
        (y - exact).abs().amax((2, 3))
        <= 0.505 * step[:, None] * small.weight.abs().sum((1, 2, 3)) + 1e-5 * exact.abs().amax((1, 2, 3))[:, None]
    ).all()


@settings(max_examples=examples(60))
@given(
    rows=st.integers(1, 30),
    inputs=st.integers(1, 100),
    outputs=st.integers(1, 60),
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    activations=st.sampled_from(["row", "tensor"]),
    shift=st.sampled_from([0.0, 3.0, -20.0]),
    columns=st.booleans(),
    requantize=st.booleans(),
    kernel=st.sampled_from(["int8", "plain", "own"]),
    seed=st.integers(0, 9999),
)
def test_the_answer_is_within_the_promised_rounding(
    rows, inputs, outputs, bits, symmetric, activations, shift, columns, requantize, kernel, seed
):
    "Half a step of its row's range for each input; of the range of all, extended to hold zero, with one scale."
    torch.manual_seed(seed)
    small = quantize_layer(
        nn.Linear(inputs, outputs),
        bits,
        symmetric=symmetric,
        **({"columns": torch.rand(inputs) + 0.5} if columns else {}),
    )
    layer, x = (
        QLinear(small.layer, small.packed, activations=activations, requantize=requantize),
        (torch.randn(rows, inputs) + shift) * torch.logspace(-2, 2, rows)[:, None],
    )
    if kernel != "own" and (kernel == "plain" or capabilities().linear):
        layer.kernel = kernel
    scaled = x if not columns else x * small.q.columns
    weight, y = (engines.one_scale_an_output(small.q) if requantize else small.q).dequantize(), layer(x)
    exact = F.linear(x.double(), weight.double(), layer.bias.double())
    if activations == "row":
        step = (scaled.amax(1) - scaled.amin(1)) / 255
    else:
        step = ((scaled.max().clamp(min=0) - scaled.min().clamp(max=0)) / 255).expand(rows)
    bare = weight / small.q.columns if columns else weight
    assert (
        (y - exact).abs() <= 0.505 * step[:, None] * bare.abs().sum(1) + 1e-5 * (scaled.abs() @ bare.abs().t()) + 1e-6
    ).all()
    codes_alone(small.layer, copy.deepcopy(layer), x)


def test_activation_codes_at_ties_and_at_the_ends_of_floats():
    for reduced in (False, True):
        for x in (
            torch.arange(-255, 256) / 2.0,
            torch.randint(-20, 20, (50,)) / 4.0,
            torch.tensor([0.0, 127.5, 255.0]),
        ):
            scale, zero = torch._choose_qparams_per_tensor(x, reduced)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert torch.equal(
                    quantize_activations(x, reduced)[0],
                    torch.quantize_per_tensor(x, scale, zero, torch.quint8).int_repr(),
                )
    for size in (0.0, 1e-45, 1e-39, 1e-37, 1e30):
        codes, scale, zero = quantize_activations(torch.tensor([0.0, -size, size]))
        assert codes[0] == zero and (
            scale * (codes.double() - zero) - torch.tensor([0.0, -size, size]).double()
        ).abs().max() <= 0.51 * max(scale, 1e-36)


def test_bytes_and_words_say_what_is(monkeypatch):
    small, x = quantize_layer(nn.Linear(800, 500)), torch.randn(1, 800)
    layer = QLinear(small.layer, small.packed, activations="tensor")
    if layer.kernel != "int8":
        pytest.skip("no int8 kernel here")
    layer(x)
    assert layer.nbytes == small.q.nbytes + 800 * 500 + 8 * 500  # one copy, however it was come by
    assert "oneDNN" in layer.runs and "oneDNN" not in QLinear(*_parts(nn.Linear(800, 500), symmetric=False)).runs
    monkeypatch.setattr(engines, "capabilities", lambda: engines.Capabilities("none", True, False, False, False, False))
    assert "oneDNN" not in layer.runs


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(100, 100), torch.randn(2, 100)),
        (nn.Conv2d(1, 2, 3), torch.randn(1, 1, 5, 5)),
        (nn.Embedding(9, 8), torch.zeros(2, dtype=torch.long)),
    ],
)
def test_torch_jit_is_refused_by_name(layer, x):
    quick = use_kernels(quantize_model(nn.Sequential(layer)))
    for f in (lambda: torch.jit.trace(quick, (x,)), lambda: torch.jit.script(quick)):
        with pytest.raises(RuntimeError, match=f"{type(quick[0]).__name__} '0' cannot be traced or scripted"):
            f()


def test_empty_inputs_and_layers():
    for layer, x in (
        (nn.Linear(0, 5), torch.randn(3, 0)),
        (nn.Linear(5, 0), torch.randn(3, 5)),
        (nn.Linear(64, 200), torch.randn(2, 0, 64)),
        (nn.Conv2d(4, 96, 3, padding=1), torch.randn(0, 4, 5, 5)),
        (nn.Embedding(8, 0), torch.zeros(3, dtype=torch.long)),
        (nn.Embedding(8, 8), torch.zeros(0, 4, dtype=torch.long)),
        (nn.Conv2d(4, 2, 1), torch.randn(0, 4, 3, 3)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = quantize_layer(layer)
        for activations in ("row", "tensor"):
            assert use_kernels(small, activations=activations)(x).shape == layer(x).shape


def test_what_runs_lists_what_stays_float():
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 32), nn.Linear(32, 8)), overrides={"2": None})
    rows = {n: (kind, why) for n, kind, why in what_runs(use_kernels(model))}
    assert (
        rows["0"][0] == "QLinear" and rows["1.weight_ih_l0"][0] == "Dequantize" and "LSTM" in rows["1.weight_ih_l0"][1]
    )
    assert rows["2.weight"][0] == "float" and "Linear" in rows["2.weight"][1] and not any("bias" in n for n in rows)


def test_errors_name_the_layer():
    quick = use_kernels(
        quantize_model(
            nn.ModuleDict({"head": nn.Linear(64, 64), "stem": nn.Conv2d(3, 8, 3), "words": nn.Embedding(9, 8)})
        )
    )
    for name, x, kind in (
        ("head", torch.randn(2, 3), ValueError),
        ("stem", torch.randn(2, 2, 5, 5), ValueError),
        ("words", torch.randn(3), TypeError),
    ):
        with pytest.raises(kind, match=f"'{name}'"):
            quick[name](x)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="QLinear 'head' computes with integers"):
        quick["head"](torch.randn(2, 64, requires_grad=True)).sum().backward()


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def digits():
    data = mnist5k()
    return train(LeNet5(), data.train[:1500], epochs=2, progress=False), data.test[:500]


def test_lenet(digits):
    net, test = digits
    expanding = quantize_model(net)
    quick = use_kernels(expanding)
    assert abs(accuracy(quick, test) - accuracy(expanding, test)) <= 0.006
    with torch.no_grad():
        a, b = quick(test.x[:100]), expanding(test.x[:100])
    assert F.cosine_similarity(a, b).min() > 0.999


def test_pack_round_trip(digits, tmp_path):
    pack = pytest.importorskip("modelzip.pack")
    net, test = digits
    quick = use_kernels(quantize_model(net), activations="row")
    pack.save(quick, tmp_path / "lenet.mz")
    back = pack.load(tmp_path / "lenet.mz")
    assert [type(m) for m in back.modules()] == [type(m) for m in quick.modules()] and back.conv2.activations == "row"
    with torch.no_grad():
        assert torch.equal(back(test.x[:50]), quick(test.x[:50]))


def test_minilm():
    model = minilm()
    expanding = quantize_model(model)
    texts = [
        "Return the sum of the elements.",
        "Open a file and read its lines one by one.",
        "A matrix is positive definite.",
    ]
    exact, quick = model.encode(texts), use_kernels(expanding)
    assert F.cosine_similarity(quick.encode(texts), exact).min() > 0.997
    assert F.cosine_similarity(use_kernels(expanding, activations="tensor").encode(texts), exact).min() > 0.98


@pytest.mark.parametrize(
    "geometry", [dict(padding=2), dict(padding=(0, 1), stride=2, dilation=2), dict(padding=1, groups=2, bias=False)]
)
def test_images_of_any_range_have_the_integers_that_they_have_alone(geometry):
    small = quantize_layer(nn.Conv2d(16, 64, 5, **geometry))
    quick, plain = (QConv2d(small.layer, small.packed, activations="row") for _ in range(2))
    plain.kernel = "plain"
    x = torch.randn(6, 16, 14, 13) * torch.logspace(-3, 3, 6)[:, None, None, None]
    x[1], x[2], x[5] = x[1].relu(), -x[2].abs(), 0
    with torch.no_grad():
        y, exact = quick(x), plain(x)
        for i in range(6):
            assert torch.equal(quick(x[i : i + 1])[0], y[i])
    assert ((y - exact).flatten(1).norm(dim=1) <= 1e-6 * exact.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("rows", (1, 7, 9))
def test_4_bit_products_of_any_strides(rows):
    small = quantize_model(nn.Sequential(nn.Linear(64, 16)), 4, group=32)
    fast = use_kernels(small)
    for x in torch.randn(64, rows).t(), torch.randn(rows, 128)[:, ::2], torch.randn(1, 64).expand(rows, 64):
        with torch.no_grad():
            assert (
                torch.equal(fast(x), fast(x.clone(memory_format=torch.contiguous_format)))
                and (fast(x) - small(x)).abs().max() < 0.05
            )


# ---------------------------------------------------------------- tensors that are more than numbers


def _integers():
    from modelzip.prune import prune_model, sparsify_model, use_sparse_products

    torch.manual_seed(0)
    lin, conv = nn.Sequential(nn.Linear(128, 96)).eval(), nn.Sequential(nn.Conv2d(16, 64, 3, padding=1)).eval()
    x, image = torch.randn(3, 128), torch.randn(2, 16, 5, 5)
    for how in ("row", "tensor"):
        yield use_kernels(quantize_model(lin), activations=how), x
        yield use_kernels(quantize_model(conv), activations=how), image
    yield convert(_trained(lin, x)), x
    yield use_kernels(quantize_model(nn.Sequential(nn.Linear(128, 8)).eval())), x
    yield use_sparse_products(sparsify_model(prune_model(lin, 0.9))), x


def _trained(model, x):
    p = prepare(model, bits=4)
    p.train()(x)
    return p.eval()


def test_functions_that_map_or_derive():
    """What is mapped is what each part gives; a derivative of integers is refused, however it is asked for; nothing
    that was made on the way stays."""
    import torch.autograd.forward_ad as forward

    for model, x in _integers():
        sparse, seen = type(model[0]).__name__ == "SparseLinear", torch.stack([x, 2 * x, -x])
        with torch.no_grad():
            want = [model(v) for v in seen]
        fresh = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.allclose(torch.func.vmap(fresh)(seen), torch.stack(want), atol=1e-5)
        head = nn.Linear(want[0].shape[-1], 2)
        torch.func.grad(lambda w: torch.func.functional_call(head, {"weight": w}, (fresh(x),)).sum())(
            head.weight.detach()
        )  # x itself is not derived
        with torch.no_grad():
            assert torch.allclose(copy.deepcopy(fresh)(x), want[0], atol=1e-5) and torch.equal(fresh(x), want[0])

        def dual(f):
            with forward.dual_level():
                return forward.unpack_dual(f(forward.make_dual(x, torch.ones_like(x)))).tangent

        total = lambda v: model(v).sum()
        ways = (
            lambda: torch.func.grad(total)(x),
            lambda: torch.func.jvp(model, (x,), (x,)),
            lambda: dual(model),
            lambda: torch.func.vmap(torch.func.grad(total))(seen),
            lambda: torch.func.jacrev(model)(x),
            lambda: torch.autograd.grad(total(y := x.clone().requires_grad_()), y),
        )
        for way in ways:
            if sparse:
                way()
                continue
            with pytest.raises(RuntimeError, match="computes with integers and has no gradient"):
                way()


def test_an_ensemble_of_states_is_mapped():
    models = [use_kernels(quantize_model(nn.Sequential(nn.Linear(128, 96)).eval())) for _ in range(3)]
    states = {
        k: torch.stack([dict([*m.named_parameters(), *m.named_buffers()])[k].detach() for m in models])
        for k, _ in [*models[0].named_parameters(), *models[0].named_buffers()]
    }
    x = torch.randn(3, 4, 128)
    with torch.no_grad():
        got = torch.func.vmap(lambda state, x: torch.func.functional_call(models[0], state, (x,)))(states, x)
        for y, m, v in zip(got, models, x):
            assert torch.allclose(y, m(v), atol=1e-6)
    with pytest.raises(AttributeError, match="weight of this Linear is compressed and cannot be set"):
        torch.func.functional_call(models[0], {"0.weight": torch.zeros(96, 128)}, (x[0],))


def test_jagged_rows_replicas_and_meta():
    rows = [torch.randn(3, 128), torch.randn(5, 128)]
    for model, x in _integers():
        if x.dim() == 2:
            y = model(torch.nested.nested_tensor(rows, layout=torch.jagged))
            if type(model[0]).__name__ != "QLinear" or model[0].activations == "row":
                assert all(torch.allclose(a, model(r), atol=1e-5) for a, r in zip(y.unbind(), rows))
        if type(model[0]).__name__ != "SparseLinear":
            with pytest.raises(TypeError, match="is a nested tensor"):
                model(torch.nested.nested_tensor(rows))
        with torch.no_grad():
            want, parts = model(x), [m._replicate_for_data_parallel() for m in model.modules()]
            for m, r in zip(model.modules(), parts):  # as torch.nn.parallel.replicate does it
                for k, child in m._modules.items():
                    setattr(r, k, parts[[*model.modules()].index(child)])
                for k, p in (*m._parameters.items(), *m._buffers.items()):
                    setattr(r, k, None if p is None else p.detach().clone())
            assert torch.equal(parts[0](x), want)
            assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == want.shape
    table = QEmbedding(*_parts(nn.Embedding(20, 16)))
    ids = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    assert all(
        torch.equal(a, table(i))
        for a, i in zip(table(torch.nested.nested_tensor(ids, layout=torch.jagged)).unbind(), ids)
    )
    assert torch.equal(torch.func.vmap(table)(torch.tensor([[1, 2], [3, 4]])), table(torch.tensor([[1, 2], [3, 4]])))


def test_recording_a_program_leaves_no_class_behind():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.l = nn.Embedding(30, 12), nn.Linear(12, 30)
            self.l.weight = self.e.weight

        def forward(self, x):
            return self.l(self.e(x))

    known = dict(Dequantize.kinds)
    for i in range(2):
        model, x = use_kernels(quantize_model(Tied().eval(), 8)), torch.randint(0, 30, (3, 5))
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
        assert Dequantize.kinds == known


LAYERS = [
    (nn.Linear(8, 16), torch.randn(3, 8)),
    (nn.Bilinear(8, 8, 4), None),
    (nn.Embedding(9, 16), torch.tensor([[1, 2]])),
    (nn.EmbeddingBag(9, 16), torch.tensor([[1, 2]])),
    (nn.Conv1d(4, 8, 3), torch.randn(2, 4, 9)),
    (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 9, 9)),
    (nn.Conv2d(4, 8, 3, groups=4), torch.randn(2, 4, 9, 9)),
    (nn.Conv3d(4, 8, 3), torch.randn(2, 4, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 8, 3), torch.randn(2, 4, 9)),
    (nn.ConvTranspose2d(4, 8, 3), torch.randn(2, 4, 9, 9)),
    (nn.LSTM(8, 16, num_layers=2, bidirectional=True), torch.randn(5, 2, 8)),
    (nn.LSTM(8, 16, proj_size=4), torch.randn(5, 2, 8)),
    (nn.GRU(8, 16), torch.randn(5, 2, 8)),
    (nn.RNN(8, 16), torch.randn(5, 2, 8)),
    (nn.LSTMCell(8, 16), torch.randn(2, 8)),
    (nn.GRUCell(8, 16), torch.randn(2, 8)),
    (nn.MultiheadAttention(8, 2), None),
    (nn.TransformerEncoderLayer(8, 2, 16), torch.randn(5, 2, 8)),
]


@pytest.mark.hypothesis  # so that a search comes here: each layer with each number of bits
@pytest.mark.parametrize(
    "layer, x, bits",
    [(*both, (3, 4, 8)[j]) for i, both in enumerate(LAYERS) for j in range(3) if FUZZ or j == i % 3],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else v if isinstance(v, int) else "",
)
def test_nothing_is_printed(layer, x, bits, capfd, tmp_path):
    "Neither by Python nor by what it calls, for any kind of layer, on the way from the model to its answer."
    model = quantize_model(nn.Sequential(layer).eval(), bits)
    pack.save(model, tmp_path / "m.mz")
    kernels = use_kernels(pack.load(tmp_path / "m.mz", nn.Sequential(copy.deepcopy(layer))))
    assert repr(what_runs(kernels)) and repr(kernels)
    if x is not None:
        kernels(x)
        copy.deepcopy(kernels).train()(x)
    assert capfd.readouterr() == ("", "")


def test_a_model_that_has_run_is_saved_and_copied(tmp_path):
    "What layers remember of their inputs and of each other is no part of the model."
    model, x = nn.Sequential(nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 8)).eval(), torch.randn(64, 80)
    for k in use_kernels(quantize_model(model, 8)), convert(prepare(model, bits=8, batches=[x])):
        with torch.no_grad():
            y = k(x)
            pack.save(k, tmp_path / "m.mz")
            back = pack.load(tmp_path / "m.mz", model)
            assert torch.equal(back(x), y) and torch.equal(copy.deepcopy(k)(x), y)
            pack.save(back, tmp_path / "again.mz")


NO_ROWS = {
    "no axis": torch.tensor(1.5),
    "one": torch.randn(5),
    "three": torch.randn(2, 3, 5),
    "empty": torch.randn(3, 0),
}


@pytest.mark.parametrize("kind", NO_ROWS)
def test_shapes_are_refused_by_name(kind):
    "What has other axes than a function says would fail deep inside it, or have its channels taken for images."
    x = NO_ROWS[kind]
    for f in (kernels.stretch_rows, kernels.quantize_rows, kernels.quantize_images):
        with pytest.raises(ValueError, match="^x has the shape"):
            f(x)
    codes, _, _ = quantize_activations(x)  # of any shape
    assert codes.shape == x.shape


def test_shapes_of_integer_products_are_refused_by_name():
    x, w, s = torch.randn(3, 5), torch.ones(4, 5, dtype=torch.int8), torch.ones(4)
    images, filters = torch.randn(2, 3, 6, 6), torch.ones(4, 3, 3, 3, dtype=torch.int8)
    for call, says in (
        (lambda: integer_linear(x[0, 0], w, s), "x has the shape []"),
        (lambda: integer_linear(x[:, :4], w, s), "weight has 5 inputs, and x has 4"),
        (lambda: integer_linear(x, w, s[:3]), "scale has 3 outputs, and weight has 4"),
        (lambda: integer_linear(x, w, s[0]), "scale has the shape []"),
        (lambda: integer_linear(x, w, s, s[0]), "zero has the shape []"),
        (lambda: integer_linear(x * math.nan, w, s), "x holds NaN"),
        (lambda: kernels.integer_conv2d(images[0, 0], filters, s), "x has the shape [6, 6]"),
        (lambda: kernels.integer_conv2d(images, filters, s[0]), "scale has the shape []"),
        (lambda: kernels.integer_conv2d(images, filters[0], s), "weight has the shape [3, 3, 3]"),
        (lambda: kernels.quantize_images(images, 256), "top is 256"),
        (lambda: gather_rows(quantize(x, 8, axis=0), torch.tensor(1)), "rows has the shape []"),
        (lambda: gather_rows(quantize(torch.randn(3, 8), 8, axis=0), torch.ones(1)), "rows is torch.float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(says)):
            call()
    assert integer_linear(x[:0], w, s).shape == (0, 4) and integer_linear(x[0], w, s).shape == (4,)
    assert kernels.integer_conv2d(images[:0], filters, s).shape == (0, 4, 4, 4)
    assert kernels.integer_conv2d(images[0], filters, s).shape == (4, 4, 4)
    assert kernels.quantize_rows(x[:0])[0].shape == (0, 5) and kernels.quantize_images(images[:0])[0].shape[0] == 0
