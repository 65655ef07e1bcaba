"Quantization as a property: whatever the shape, the width and the granularity, nothing moves by more than half a step."

import copy, math, threading, time, warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from modelzip.pack import PackError, inspect, load, read_tensor, save
from modelzip.quant import (
    kl_after_quantizing,
    Entropy,
    MSE,
    CompressedTensor,
    Dequantize,
    QTensor,
    as_blocks,
    bit_planes,
    dequantize,
    dequantize_layer,
    dequantize_model,
    kmeans,
    nf4,
    number_of_blocks,
    pack_bits,
    packed_bytes,
    quantize,
    quantize_layer,
    quantize_model,
    unpack_bits,
)
from modelzip.workshop.compressed import Sized
from modelzip.workshop.observers import divergences
from guards import examples

warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


@st.composite
def tensors(draw):
    "Any shape (empty and scalar too), dtype, magnitude (huge and subnormal too) and memory layout."
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    info = torch.finfo(dtype)
    low = {torch.float16: -6, torch.bfloat16: -37, torch.float32: -42, torch.float64: -300}[dtype]
    magnitude = draw(st.floats(low, math.log10(info.max) - 1.5))
    x = torch.randn(shape, generator=torch.manual_seed(draw(st.integers(0, 99))), dtype=torch.float64)
    x = (x.clamp(-5, 5) * 10**magnitude).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, 1)
    if layout == "strided" and x.dim():
        x = x.repeat_interleave(2, 0)[::2]
    return x


@st.composite
def layouts(draw, x):
    which = draw(st.sampled_from(["tensor", "axis", "group"])) if x.dim() else "tensor"
    if which == "axis":
        return {"axis": draw(st.integers(-x.dim(), x.dim() - 1))}
    if which == "group":
        return {"group": draw(st.integers(1, 40))}
    return {}


@settings(max_examples=examples(200), deadline=None)
@given(st.data(), tensors(), st.integers(2, 16), st.booleans())
def test_error_is_at_most_half_a_step(data, x, bits, symmetric):
    how = data.draw(layouts(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = quantize(x, bits, symmetric=symmetric, **how)
    back = dequantize(q)
    assert back.shape == x.shape and back.dtype == x.dtype and torch.isfinite(back).all()
    if not x.numel():
        return
    error = as_blocks((back.double() - x.double()).abs(), q.axis, q.group).amax(1)
    step = q.scale.reshape(-1).double()
    arithmetic = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps * q.levels
    output = (
        as_blocks(x.double().abs(), q.axis, q.group).amax(1) * torch.finfo(x.dtype).eps
        + torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
    )
    assert (error <= step * (0.5 + 2 * arithmetic) + 2 * output).all(), (error / step).max()


@settings(max_examples=examples(80), deadline=None)
@given(st.data(), tensors(), st.integers(1, 16), st.booleans())
def test_parts_and_meta_carry_everything(data, x, bits, symmetric):
    how = data.draw(layouts(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = quantize(x, bits, symmetric=symmetric, **how)
    again = CompressedTensor.kinds["quantized"].from_parts(q.parts(), q.meta())
    assert again == q and torch.equal(again.dequantize(), q.dequantize())
    assert q.nbytes == sum(p.nbytes for p in q.parts().values())
    assert q.codes.numel() == packed_bytes(x.numel(), bits) and q.scale.numel() == number_of_blocks(
        x.shape, q.axis, q.group
    )
    assert copy.deepcopy(q) == q


def test_a_kind_of_five_methods_goes_everywhere(tmp_path):
    "What the map promises: five methods and two attributes are enough for a layer, a print, a file and a copy."

    class Powers(Sized, CompressedTensor, kind="powers"):  # the nearest power of two, and its sign
        def __init__(self, codes, shape, dtype):
            self.codes, self.shape, self.dtype = codes, torch.Size(shape), dtype

        def parts(self):
            return {"codes": self.codes}

        def meta(self):
            return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

        @classmethod
        def from_parts(cls, parts, meta):
            return cls(parts["codes"], meta["shape"], getattr(torch, meta["dtype"]))

        def dequantize(self):
            size = 2.0 ** (self.codes.abs().to(self.dtype) - 64)
            return size * self.codes.sign()

    try:
        linear = nn.Linear(8, 4)
        exponents = linear.weight.detach().abs().clamp_min(2.0**-40).log2().round() + 64
        q = Powers((exponents * linear.weight.detach().sign()).to(torch.int8), linear.weight.shape, torch.float32)
        small = nn.Sequential(Dequantize(linear, q))
        assert "powers" in str(small) and "32 bytes" in str(small) and "powers" in repr(q) and "0x" not in repr(q)
        x = torch.randn(3, 8)
        want = nn.functional.linear(x, q.dequantize(), linear.bias)
        assert torch.equal(small(x), want) and torch.equal(copy.deepcopy(small)(x), want)
        assert q.clone() == q and q.to(torch.float64).dequantize().dtype == torch.float64
        path = save(small, tmp_path / "powers.mz")
        back = load(path, nn.Sequential(nn.Linear(8, 4)))
        assert torch.equal(back(x), want) and back[0].q == q
        assert read_tensor(path, "0.weight") == q and "powers" in str(inspect(path))
        again = nn.Sequential(Dequantize(nn.Linear(8, 4), q.clone()))
        again.load_state_dict(small.state_dict())
        assert torch.equal(again(x), want)
        del CompressedTensor.kinds["powers"]
        with pytest.raises(PackError, match="'powers', which this modelzip does not know"):
            load(path, nn.Sequential(nn.Linear(8, 4)))
    finally:
        CompressedTensor.kinds.pop("powers", None)


@settings(max_examples=examples(300), deadline=None)
@given(st.integers(1, 16), st.lists(st.integers(0, (1 << 16) - 1), max_size=100))
def test_packing_is_exact(bits, codes):
    codes = torch.tensor(codes, dtype=torch.int64) % (1 << bits)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(len(codes), bits) <= len(codes) * bits / 8 + len(
        bit_planes(bits)
    )
    assert torch.equal(unpack_bits(packed, bits, len(codes)).long(), codes)


@pytest.mark.parametrize("dtype", "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64".split())
@pytest.mark.parametrize("bits", [1, 3, 8, 12, 16])
def test_codes_of_every_integer_type_are_packed(bits, dtype):
    dtype = getattr(torch, dtype)
    last = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    codes = torch.tensor([0, fits := min(2**bits - 1, last), 0, fits, 1]).to(dtype)
    for c in codes, codes[:0], codes[::2]:
        assert unpack_bits(pack_bits(c, bits), bits, len(c)).tolist() == c.long().tolist()
    if last > fits:
        with pytest.raises(ValueError, match=f"codes run from 0 to {last}; {bits} bits hold"):
            pack_bits(torch.tensor([last, 0], dtype=dtype), bits)


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.floats(1e-4, 10))
def test_codes_are_those_of_torch(seed, zero_point, scale):
    x = torch.randn(8, 16, generator=torch.manual_seed(seed)) * 20
    scale = torch.tensor(scale).item()
    ours = quantize(x, 8, symmetric=False, scale=scale, zero_point=zero_point)
    theirs = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    assert torch.equal(ours.unpack(), theirs.int_repr()) and torch.equal(ours.dequantize(), theirs.dequantize())
    signed = torch.quantize_per_tensor(x, scale, 0, torch.qint8)
    assert torch.equal(quantize(x, 8, scale=scale).dequantize(), signed.dequantize())


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_are_those_of_torch(axis):
    x = torch.randn(24, 40, generator=torch.manual_seed(0))
    ours = quantize(x, 8, axis=axis, symmetric=False)
    theirs = torch.quantize_per_channel(x, ours.scale, ours.zero_point, axis, torch.quint8)
    assert torch.equal(ours.unpack(), theirs.int_repr()) and torch.equal(ours.dequantize(), theirs.dequantize())


def test_ties_go_to_even_as_in_torch():
    x = torch.arange(-20, 20) * 0.5
    for zero_point in 100, 101:
        ours = quantize(x, symmetric=False, scale=1.0, zero_point=zero_point).unpack()
        assert torch.equal(ours, (x + zero_point).round().to(torch.uint8))
        if zero_point % 2 == 0:  # else PyTorch 2.6 rounds before it is added, and other ties are even
            assert torch.equal(ours, torch.quantize_per_tensor(x, 1.0, zero_point, torch.quint8).int_repr())


def test_by_hand():
    x = torch.tensor([[-0.75, -0.2, 0.0, 0.31, 1.0]])
    q = quantize(x, 3, symmetric=False)
    assert q.scale.item() == 0.25 and q.zero_point.item() == 3
    assert q.unpack().tolist() == [[0, 2, 3, 4, 7]] and q.dequantize().tolist() == [[-0.75, -0.25, 0, 0.25, 1]]
    ternary = quantize(torch.tensor([-2.0, -0.4, 0.9, 2.0]), levels=3)
    assert ternary.dequantize().tolist() == [-2, 0, 0, 2] and ternary.bits == 2
    binary = quantize(torch.tensor([-3.0, 1.0, 2.0, -2.0]), 1)
    assert binary.dequantize().tolist() == [-2, 2, 2, -2]
    step = quantize(torch.tensor([-0.26, 0.1, 0.5]), step=0.1)
    assert step.levels == 11 and torch.allclose(step.dequantize(), torch.tensor([-0.3, 0.1, 0.5]))


def test_more_bits_and_finer_blocks_never_hurt():
    x = torch.randn(64, 256, generator=torch.manual_seed(1)) * torch.logspace(-2, 0, 64)[:, None]
    error = lambda **how: (quantize(x, **how).dequantize() - x).square().mean().item()
    by_bits = [error(bits=b, axis=0) for b in range(2, 13)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(bits=4, group=32) < error(bits=4, axis=0) < error(bits=4)
    assert error(bits=3, axis=0, observer="mse") < error(bits=3, axis=0)
    assert error(bits=4, group=32, symmetric=False) < error(bits=4, group=32)


def test_entropy_observer_is_its_definition():
    "Prefix sums give the divergences of the definition, and the observer the first threshold of the least."
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        n, levels = (int(torch.randint(a, b, (1,), generator=draw)) for a, b in ((1, 300), (2, 400)))
        blocks = (
            torch.randn(3, n, generator=draw)
            * (torch.rand(3, n, generator=draw) < torch.rand(1, generator=draw))
            * torch.tensor([[1e-30], [1.0], [1e30]])
        )
        codes, tries = max(2, (levels - 1) // 2 + 1), [*range(min(max((levels - 1) // 2 + 1, 128), 256), 256), 256]
        for block, high in zip(blocks.abs().double(), Entropy(256)(blocks, levels, True)[1]):
            if levels == 2 or not block.any():
                continue
            counts = torch.histc(block, 256, 0, block.max().item())
            exact = torch.tensor([kl_after_quantizing(counts, k, codes) for k in tries], dtype=torch.float64)
            assert torch.allclose(divergences(counts[None], codes, torch.tensor(tries))[0], exact, atol=1e-9)
            chosen = round(high.item() / block.max().item() * 256)
            assert exact[tries.index(chosen)] <= exact.min() + 1e-9
    start = time.process_time()
    Entropy()(torch.randn(400, 384), 256, True)
    assert time.process_time() - start < 10  # seconds; the definition takes some 30


def test_mse_observer_against_a_fine_search():
    x = torch.randn(4, 500, generator=torch.manual_seed(2))
    ours = (quantize(x, 3, axis=0, observer=MSE()).dequantize() - x).square().sum(1)
    tries = torch.stack(
        [
            (quantize(x, 3, axis=0, scale=x.abs().amax(1) / 3 * s).dequantize() - x).square().sum(1)
            for s in np.linspace(0.1, 1, 300)
        ]
    )
    assert (ours <= 1.02 * tries.amin(0)).all()


def test_kmeans_against_scikit_learn():
    from sklearn.cluster import KMeans

    for seed, bits in (0, 2), (1, 3), (2, 4):
        x = torch.randn(2000, generator=torch.manual_seed(seed)).pow(3)
        peer = KMeans(1 << bits, n_init=10, random_state=0).fit(x[:, None].numpy()).inertia_
        ours = (x[:, None] - kmeans(x, bits)).abs().amin(1).square().sum().item()
        assert ours <= 1.1 * peer
    few = torch.tensor([1.0, 1.0, 5.0])
    assert set(few.tolist()) <= set(kmeans(few, 2).tolist())
    assert torch.isfinite(kmeans(torch.ones(5), 4)).all()
    with pytest.raises(ValueError, match="centroids are float32"):
        kmeans(torch.tensor([1e300, 1.0], dtype=torch.float64))


def test_no_negative_number_of_codes():
    with pytest.raises(ValueError, match="-1 codes of 3 bits"):
        unpack_bits(torch.zeros(0, dtype=torch.uint8), 3, -1)


def test_nf4_has_an_exact_zero_and_uses_its_whole_table():
    x = torch.randn(64, 64, generator=torch.manual_seed(3))
    q = quantize(x, codebook="nf4", group=64)
    assert q.unpack().unique().numel() == 16 and nf4()[7] == 0
    assert quantize(torch.zeros(4, 64), codebook="nf4", group=64).dequantize().count_nonzero() == 0
    mine = quantize(x, codebook=torch.tensor([-1.0, -0.2, 0.2, 1.0]), axis=0)
    assert mine.bits == 2 and set(mine.unpack().unique().tolist()) <= {0, 1, 2, 3}
    real = quantize(x, codebook=torch.tensor([-1.0, 0.0, 1.0]), scale=1.0)
    assert set(real.dequantize().unique().tolist()) == {-1, 0, 1}


def test_a_step_or_a_codebook_needs_no_zero_point():
    x = torch.randn(4, 64, generator=torch.manual_seed(4))
    for how in dict(step=0.1), dict(codebook="nf4", group=32), dict(codebook="kmeans"):
        q = quantize(x, **how)
        with pytest.raises(ValueError, match="symmetric=False"):
            quantize(x, symmetric=False, **how)
        assert QTensor.from_parts(q.parts(), q.meta()) == q and (q.dequantize() < 0).any()


def test_stochastic_rounding_is_unbiased_and_seeded():
    x = torch.full((200_000,), 0.3)
    roll = lambda seed: quantize(x, step=1.0, stochastic=True, generator=torch.manual_seed(seed)).dequantize()
    assert abs(roll(0).mean() - 0.3) < 4 * math.sqrt(0.21 / 200_000)
    assert torch.equal(roll(1), roll(1)) and not torch.equal(roll(1), roll(2))


@pytest.mark.parametrize(
    "x",
    [
        np.float32([[1, -2], [3, 4]]),
        np.float64([1, 2])[::-1],
        np.broadcast_to(np.float32(2), (3, 4)),
        np.float16([1, 2]),
        np.float32(1.5),
    ],
)
def test_arrays_of_other_libraries(x):
    assert np.allclose(quantize(x, 12).dequantize().numpy(), np.array(x), rtol=1e-2)


def test_what_speaks_dlpack_is_enough():
    class Array:
        def __init__(self, t):
            self.t = t

        def __dlpack__(self, **kwargs):
            return self.t.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.t.__dlpack_device__()

    t = torch.randn(5, 6)
    assert quantize(Array(t)) == quantize(t)


BAD = [
    (dict(bits=0), "bits"),
    (dict(bits=17), "bits"),
    (dict(bits=2.5), "bits"),
    (dict(bits="8"), "bits"),
    (dict(axis=2), "axis"),
    (dict(axis="0"), "axis"),
    (dict(group=0), "group"),
    (dict(group=1.5), "group"),
    (dict(axis=0, group=4), "axis"),
    (dict(levels=1), "levels"),
    (dict(levels=1 << 17), "levels"),
    (dict(step=0), "step"),
    (dict(step=float("nan")), "step"),
    (dict(step=1e-30), "step"),
    (dict(codebook="nf5"), "codebook"),
    (dict(codebook=torch.tensor([1.0, 0.0])), "codebook"),
    (dict(codebook=torch.zeros(0)), "codebook"),
    (dict(observer="max"), "observer"),
    (dict(nonfinite="ignore"), "nonfinite"),
    (dict(scale=-1.0), "scale"),
    (dict(scale=torch.ones(3)), "scale"),
    (dict(scale=1.0, zero_point=3), "zero_point"),
    (dict(scale=1.0, zero_point=300, symmetric=False), "zero_point"),
    (dict(scale_dtype=torch.int8), "scale_dtype"),
    (dict(zero_point=3, symmetric=False), "zero_point"),
    (dict(scale=1.0, symmetric=False), "zero_point"),
]


@pytest.mark.parametrize("options,name", BAD, ids=lambda v: str(v)[:40])
def test_bad_options_name_the_argument(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        quantize(torch.randn(4, 5), **options)


@pytest.mark.parametrize(
    "x",
    [
        [1.0, 2.0],
        3.0,
        "x",
        None,
        torch.arange(4),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        np.array(["a"]),
        np.arange(3),
    ],
    ids=lambda v: type(v).__name__,
)
def test_bad_tensors(x):
    with pytest.raises(TypeError, match="x "):
        quantize(x)


@pytest.mark.parametrize(
    "how",
    [{}, {"axis": 0}, {"group": 2}, {"codebook": "nf4"}, {"codebook": "kmeans"}, {"observer": "mse"}, {"step": 0.1}],
)
def test_nonfinite(how):
    x = torch.tensor([[1.0, float("nan"), -3.0], [float("inf"), 2.0, float("-inf")]])
    with pytest.raises(ValueError, match="3 values that are NaN or infinite"):
        quantize(x, **how)
    with pytest.warns(UserWarning, match="replaced 3"):
        zero = quantize(x, nonfinite="zero", **how).dequantize()
    with pytest.warns(UserWarning, match="replaced 3"):
        clip = quantize(x, nonfinite="clip", **how).dequantize()
    assert zero[0, 1] == clip[0, 1] == 0 or "kmeans" in how.values()
    assert (
        torch.isfinite(zero).all()
        and clip[1, 0] == pytest.approx(3, abs=0.06)
        and clip[1, 2] == pytest.approx(-3, abs=0.06)
    )


def test_underflow_and_overflow_of_scales():
    assert torch.equal(quantize(torch.full((8,), 1e-44)).dequantize(), torch.full((8,), 1e-44))
    with pytest.warns(UserWarning, match="every code is zero"):
        quantize(torch.full((8,), 0.1), step=1.0)
    huge = torch.full((4, 32), 3e38)
    assert torch.allclose(quantize(huge, 4, group=32).dequantize(), huge)
    assert (
        quantize(huge, 4, group=32).scale.dtype == torch.float32
        and quantize(huge / 3e38, 4, group=32).scale.dtype == torch.float16
    )
    with pytest.raises(ValueError, match="overflow"):
        quantize(huge, 4, group=32, scale_dtype=torch.float16)
    mixed = torch.cat([torch.zeros(1, 32), torch.ones(1, 32)])
    q = quantize(mixed, 4, group=32)
    assert q.scale.dtype == torch.float16 and torch.equal(q.dequantize()[0], torch.zeros(32))


def test_damaged_parts_are_refused():
    q = quantize(torch.randn(6, 64), 4, group=32, symmetric=False)
    parts, meta = q.parts(), q.meta()
    for name in parts:
        with pytest.raises(ValueError):
            QTensor.from_parts(
                (
                    {k: v for k, v in parts.items() if k != name}
                    if name != "zero_point"
                    else parts | {name: parts[name][:-1]}
                ),
                meta,
            )
        with pytest.raises(ValueError):
            QTensor.from_parts(parts | {name: parts[name].double().flatten()[:-1]}, meta)
    for wrong in (
        {"shape": [6, 65]},
        {"shape": [-6, -64]},
        {"shape": "6x64"},
        {"shape": [2**60, 2**60]},
        {"levels": 17},
        {"levels": True},
        {"dtype": "int64"},
        {"dtype": "os"},
        {"group": 16},
        {"group": None},
        {"axis": 0},
        {"more": 1},
    ):
        with pytest.raises(ValueError):
            QTensor.from_parts(parts, meta | wrong)


@settings(max_examples=examples(150), deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=4),
    st.sampled_from(DTYPES),
    st.integers(1, 16),
    st.booleans(),
    st.sampled_from(["tensor", 0, 1, "group"]),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_columns_are_divided_out_and_multiplied_back(shape, dtype, bits, symmetric, where, kept, seed):
    generator = torch.manual_seed(seed)
    x, c = (
        torch.randn(shape, generator=generator).to(dtype),
        torch.exp(torch.randn(shape[1], generator=generator) * 2).to(kept),
    )
    how = dict(bits=bits, symmetric=symmetric) | (
        {} if where == "tensor" else {"group": 3} if where == "group" else {"axis": where}
    )
    wide = torch.promote_types(dtype, torch.float32)
    across = (
        c.to(torch.float16 if kept == torch.float16 else torch.float32).to(wide).reshape(1, -1, *[1] * (len(shape) - 2))
    )
    q, inner = quantize(x, columns=c, **how), quantize(x.to(wide) / across, **how)
    assert (
        q.columns.dtype == (kept if kept == torch.float16 else torch.float32)
        and q.shape == x.shape
        and q.dtype == dtype
    )
    assert torch.equal(q.codes, inner.codes) and torch.equal(q.scale, inner.scale)
    assert torch.equal(q.dequantize(), (inner.dequantize() * across).to(dtype))
    assert q.nbytes == inner.nbytes + q.columns.nbytes and q.meta() == inner.meta() | {
        "dtype": str(dtype).removeprefix("torch.")
    }
    assert CompressedTensor.kinds["quantized"].from_parts(q.parts(), q.meta()) == q == copy.deepcopy(
        q
    ) and "column scales" in repr(q)


def test_without_columns_nothing_changed():
    q = quantize(torch.randn(4, 6), 4)
    assert q.columns is None and set(q.parts()) == {"codes", "scale"} and "column" not in repr(q)
    assert quantize(torch.eye(2), columns=None) == quantize(torch.eye(2)) != quantize(torch.eye(2), columns=[1, 1])
    assert torch.equal(quantize(torch.eye(2), columns=[1, 1]).dequantize(), quantize(torch.eye(2)).dequantize())


def test_bad_columns_are_refused():
    x, nan = torch.randn(4, 6), float("nan")
    for c in (
        torch.ones(4),
        torch.zeros(6),
        -torch.ones(6),
        torch.full((6,), nan),
        torch.full((6,), math.inf),
        torch.full((6,), 1e-60, dtype=torch.float64),
        torch.ones(1, 6),
    ):
        with pytest.raises(ValueError, match="columns"):
            quantize(x, columns=c)
    with pytest.raises(TypeError, match="columns"):
        quantize(x, columns=torch.ones(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="two dimensions"):
        quantize(x[0], columns=torch.ones(6))
    q = quantize(x, columns=torch.ones(6))
    for bad in (
        torch.ones(5),
        torch.zeros(6),
        torch.full((6,), nan),
        torch.ones(6, dtype=torch.bfloat16),
        torch.ones(6, dtype=torch.int8),
        None,
        1.0,
    ):
        if bad is not None:
            with pytest.raises(ValueError, match="columns"):
                QTensor.from_parts(q.parts() | {"columns": bad}, q.meta())


def test_layers_with_columns():
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(6, 5), torch.randn(3, 6)),
        (nn.Conv2d(6, 4, 3), torch.randn(2, 6, 5, 5)),
        (nn.Embedding(9, 6), torch.arange(9)),
        (nn.ConvTranspose1d(3, 6, 2), torch.randn(2, 3, 4)),
    ):
        c = torch.rand(6) + 0.5
        small = quantize_layer(layer, 8, columns=c)
        assert torch.allclose(small(x), layer(x), atol=0.1) and torch.equal(small.packed.columns, c)
        assert torch.equal(copy.deepcopy(small).half().packed.columns, c)
        other = quantize_layer(layer, 8, columns=torch.ones(6))
        other.load_state_dict(small.state_dict())
        assert other.q == small.q


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16, padding_idx=0)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(2)]
        )
        self.up = nn.ConvTranspose1d(16, 8, 2, stride=2, groups=2)
        self.head = nn.Linear(8, 40)
        self.tied = nn.Linear(16, 40, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        y = x.mT
        for b in self.blocks:
            y = b(y)
        return self.head(self.up(y).mean(-1)) + self.tied(x.mean(1))


def test_a_model_keeps_its_function_its_ties_and_its_original():
    model = Everything().eval()
    before = copy.deepcopy(model.state_dict())
    small = quantize_model(model, 8)
    tokens = torch.randint(0, 40, (3, 6))
    assert (small(tokens) - model(tokens)).abs().max() < 0.05
    assert small.embed.packed is small.tied.packed and small.blocks[0][0] is not model.blocks[0][0]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    plain = dequantize_model(small)
    assert torch.equal(plain(tokens), small(tokens)) and not any(isinstance(m, Dequantize) for m in plain.modules())
    assert small.up.q.axis == 1 and small.embed.padding_idx == 0
    other = quantize_model(Everything().eval(), 8)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(tokens), small(tokens))
    assert torch.equal(copy.deepcopy(small)(tokens), small(tokens))
    half = copy.deepcopy(small).half()
    assert half.head.weight.dtype == torch.float16 and half.head.packed.scale.dtype == torch.float32
    assert (half.float()(tokens) - small(tokens)).abs().max() < 0.01
    assert small.train().blocks[0][0].training and not small.eval().head.training


def test_a_new_bias_is_not_shared_with_the_original():
    model = nn.Sequential(nn.Linear(4, 4))
    small = quantize_model(model)
    with torch.no_grad():
        small[0].bias.zero_()
    assert model[0].bias.abs().sum() > 0


def test_modules_that_read_weights_directly():
    z = torch.randn(2, 5, 16)
    attention, block = (
        nn.MultiheadAttention(16, 2, batch_first=True).eval(),
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(),
    )
    with torch.no_grad():
        assert (quantize_model(attention)(z, z, z)[0] - attention(z, z, z)[0]).abs().max() < 0.05
        assert (quantize_model(block)(z) - block(z)).abs().max() < 0.05


def test_threads_share_a_layer():
    layer = quantize_layer(nn.Linear(64, 64), 4, group=32)
    x = torch.randn(8, 64)
    want, wrong = layer(x), []

    def work():
        for _ in range(50):
            if not torch.equal(layer(x), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_gradients_pass_to_the_input():
    layer = quantize_layer(nn.Linear(8, 3), 8)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(2, 8), atol=1e-6)


def test_who_finds_nothing_says_that_all_is_compressed_already():
    from modelzip import calibrate, compress, factorize, gptq, prune_model, quantize_static, sensitivity, trellis

    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 8)
    small, masked = quantize_model(model, 4), prune_model(model, 0.5)
    for f in (
        lambda m: quantize_model(m, 2),
        lambda m: prune_model(m, 0.5),
        lambda m: gptq(m, [x], 4),
        lambda m: calibrate(m, [x]),
        lambda m: quantize_static(m, [x]),
        lambda m: sensitivity(m, lambda _: 1.0),
        trellis,
        compress,
        lambda m: factorize(m, rank=2),
    ):
        with pytest.raises(ValueError, match="compressed already: 2 .*dequantize_model"):
            f(small)
    for f in compress, lambda m: factorize(m, rank=2):
        with pytest.raises(ValueError, match="0.weight is parametrized by Mask; call .*remove_masks"):
            f(masked)


def test_bad_models():
    with pytest.raises(ValueError, match="no layer to quantize"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="model is a dict"):
        quantize_model({})
    with pytest.raises(ValueError, match="overrides"):
        quantize_model(nn.Linear(3, 3), overrides={"nothing": None})
    with pytest.raises(ValueError, match="quantized already"):
        quantize_layer(quantize_layer(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="no parameter 'weights'"):
        quantize_layer(nn.Linear(3, 3), name="weights")
    with pytest.raises(ValueError, match="parametri"):
        Dequantize(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), quantize(torch.ones(3, 3)))
    with pytest.raises(TypeError):
        dequantize_layer(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no quantized layer"):
        dequantize_model(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="shape"):
        Dequantize(nn.Linear(3, 3), quantize(torch.ones(3, 4)))
    broken = nn.Linear(3, 3)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_model(broken)


def test_memory_stays_small():
    "Quantizing needs less than the tensor again, its result included."
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(4096, 2048)
    for how in dict(bits=8, axis=0), dict(bits=4, group=32):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            q = quantize(x, **how)
        events = sorted(
            (e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
        )
        peak, now = 0, 0
        for e in events:
            now += e.nbytes()
            peak = max(peak, now)
        assert q.nbytes <= peak <= 1.0 * x.nbytes, peak / x.nbytes


def test_a_recurrent_layer_of_very_many_layers_is_quantized_or_named():
    for model, name in (nn.LSTM(4, 4, num_layers=100), "the model"), (nn.Sequential(nn.GRU(4, 4, 150)), "0"):
        x = torch.randn(3, 2, 4)
        try:
            y = quantize_model(model, 8)(x)[0]
        except ValueError as e:
            assert str(e).startswith(f"{name} cannot be copied: ") and "split it into several layers" in str(e)
        else:
            assert torch.isfinite(y).all()
    assert torch.isfinite(quantize_model(nn.LSTM(4, 4, num_layers=10), 8)(x)[0]).all()
