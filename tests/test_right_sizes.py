"""Numbers of any size: what is rounded keeps its relative error from float's smallest to its largest, or is refused
by name"""

import copy

import pytest
import torch
from torch import nn

from modelzip.kernels import stretch_rows, use_kernels
from modelzip.ptq import awq_columns, calibrate, gptq_weight, hqq_weight, nearest_weight, output_error
from modelzip.qat import StaticLinear, convert, prepare
from modelzip.quant import quantize, quantize_model

SIZES = {
    torch.float32: (1e-44, 1e-42, 1e-40, 1e-38, 1e-37, 1e-30, 1e-20, 1e10, 1e20, 1e37),
    torch.float64: (1e-320, 1e-310, 1e-200, 1e-40, 1e40, 1e307),
    torch.bfloat16: (1e-38, 1e-37, 1e37),
    torch.float16: (1e-5, 1e4),
}
HOW = [
    dict(bits=8),
    dict(bits=8, axis=0),
    dict(bits=4, group=16),
    dict(bits=4, symmetric=False, axis=0),
    dict(bits=8, symmetric=False),
    dict(levels=3, axis=0),
    dict(bits=1, axis=0),
    dict(bits=16),
    dict(bits=4, observer="entropy"),
    *(dict(bits=4, observer=o, axis=0, symmetric=s) for o in ("mse", "percentile") for s in (True, False)),
    dict(codebook="nf4", group=16),
    dict(codebook="kmeans", bits=4, axis=0),
    dict(codebook=torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]), axis=0),
    dict(bits=8, columns=torch.linspace(0.5, 2, 32)),
]


def error(got, want):
    "Relative, in units in which nothing overflows."
    unit = want.double().abs().max()
    got, want = got.double() / unit, want.double() / unit
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize(
    "how", HOW, ids=lambda how: " ".join(f"{k}={v}" if not torch.is_tensor(v) else k for k, v in how.items())
)
def test_quantize_at_any_size(how):
    base = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    usual = error(quantize(base.float(), **how).dequantize(), base)
    for dtype, sizes in SIZES.items():
        for size in sizes:
            x = (base * size).to(dtype)
            step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # what numbers of this dtype can differ by
            extra = 3 * step / x.double().abs().max().item() * 32**0.5 + torch.finfo(dtype).eps
            assert error(quantize(x, **how).dequantize(), x) <= 1.1 * usual + extra, (dtype, size)


def test_small_steps_cover_their_range():
    for levels in (3, 255, 65535):
        for symmetric in (True, False):
            for ulps in (1, 2, 3, 100, 12345, 99999):
                x = torch.tensor([0.0, ulps * 2.0**-149, -ulps * 2.0**-149 / 2])
                q = quantize(x, levels=levels, symmetric=symmetric)
                assert (q.dequantize() - x).abs().max() <= q.scale / 2 + 2.0**-149
    x = torch.tensor([1e-40, -5e-41])
    assert error(quantize(x, scale=1e-42, zero_point=100, symmetric=False).dequantize(), x) < 0.01


@pytest.mark.parametrize("bits,group,symmetric", [(4, 8, False), (1, None, True)])
def test_rounding_with_data_at_any_size(bits, group, symmetric):
    torch.manual_seed(0)
    base, how = torch.randn(8, 24, dtype=torch.float64), dict(bits=bits, group=group, symmetric=symmetric)
    seen = calibrate(nn.Sequential(nn.Linear(24, 8)), [torch.randn(50, 24)])["0"]
    methods = (
        gptq_weight,
        nearest_weight,
        hqq_weight,
        lambda w, s, **k: nearest_weight(w, s, columns=awq_columns(w, s, **k), **k),
    )
    for method in methods:
        usual = method(base.float(), seen, **how).dequantize().double()
        for dtype, size in ((torch.float32, 2.0**-130), (torch.float32, 2.0**120), (torch.float64, 2.0**-1000)):
            got = method((base.float().double() * size).to(dtype), seen, **how).dequantize().double() / size
            assert (got - usual).abs().max() <= usual.abs().max() * 0.01, (method, dtype, size)
    w = base.float() * 1e-30
    assert output_error(w, w * 1.1, seen) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "build,shape",
    [
        (lambda: nn.Linear(128, 96), (40, 128)),
        (lambda: nn.Linear(128, 96), (1, 128)),
        (lambda: nn.Conv2d(32, 40, 3, padding=1), (3, 32, 6, 6)),
        (lambda: nn.Linear(8, 4), (5, 8)),
    ],
    ids=["linear", "one row", "convolution", "small"],
)
def test_kernels_at_any_size(build, shape):
    torch.manual_seed(0)
    layer, x = build(), torch.randn(shape)
    layer.bias.data.zero_()
    for size, of_weights in (
        (1e-42, 1),
        (1e-38, 1),
        (1e-30, 1),
        (1e36, 1),
        (1, 1e-42),
        (1, 1e-25),
        (1, 1e36),
        (1e20, 1e-40),
        (1e-20, 1e20),
    ):
        model = nn.Sequential(copy.deepcopy(layer))
        model[0].weight.data = (model[0].weight.double() * of_weights).float().detach()
        inputs = (x.double() * size).float()
        want = copy.deepcopy(model).double()(inputs.double())
        for activations in ("row", "tensor"):
            with torch.no_grad():
                got = use_kernels(quantize_model(model, 8), activations=activations)(inputs)
            assert error(got, want) < 0.015, (size, of_weights, activations)
        try:
            prepared = prepare(model, 8, batches=[inputs])
        except ValueError as e:
            assert "0: " in str(e) and "too little" in str(e) and min(size, of_weights) < 1e-26
            continue
        assert error(prepared.eval()(inputs), want) < 0.015, (size, of_weights)
        try:
            assert error(convert(prepared)(inputs), want) < 0.015, (size, of_weights)
        except ValueError as e:
            assert "layer 0" in str(e) and "its scales reach" in str(e) and not 1e-23 < of_weights < 1e23


def test_rows_are_stretched_at_any_size():
    for size in (2.0**-149, 2.0**-140, 2.0**-133, 2.0**-127, 1.0, 2.0**126):
        x = (
            torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
            * size
        ).float()
        stretched, low, width = stretch_rows(x)
        assert (
            torch.equal(stretched[:2], torch.tensor([[0.0, 0.5, 1.0]] * 2))
            and not stretched[2:].any()
            and torch.equal(stretched * width + low, x)
        )


def test_what_float32_cannot_multiply_is_refused():
    q = quantize(torch.randn(4, 8), 8, axis=0)
    for scale in (1e-40, 1e-300, 1e39):
        with pytest.raises(ValueError, match="scale is"):
            StaticLinear(nn.Linear(8, 4), q, scale=scale)
    with pytest.raises(ValueError, match="0: its input reaches"):
        prepare(nn.Sequential(nn.Linear(8, 4)), 8)(torch.full((3, 8), 1e-38))
