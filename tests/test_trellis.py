"""Trellis-coded quantization against exhaustive search, the tensor through files and damage, and the reader's order."""

import copy, itertools, math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import modelzip.trellis
from guards import FUZZ, examples, unchanged
from modelzip.kernels import use_kernels
from modelzip.pack import PackError, inspect, load, read_tensor, save
from modelzip.ptq import calibrate, output_error
from modelzip.quant import Dequantize, dequantize_model
from modelzip.trellis import PRICE, TrellisTensor, next_states, trellis, trellis_weight
from modelzip.trellis import feedback_codes, learned_bits, trellis_codes
from modelzip.workshop.engines import why_not_int8
from modelzip.workshop.trellis_tensors import deal, from_codes, grids, walk

STATES = [4, 8, 16, 32]


def cost(codes, x, bits, price, states):
    "Of one sequence, by the definition of the machine alone."
    after, state, total = next_states(states).tolist(), 0, 0.0
    for v, k in zip(x, codes):
        odd = state >= states // 2
        total += (v - 2 * k + odd * ((k > 0) - (k < 0))) ** 2 + price * bits[int(odd)][abs(k)]
        state = after[state][k % 2]
    return total


PRICES = [0.0, 0.2, 0.5]


@pytest.mark.hypothesis  # so that a search comes here: every price with every number of states
@pytest.mark.parametrize(
    "states, price", [(s, p) for i, s in enumerate(STATES) for j, p in enumerate(PRICES) if FUZZ or (i + j) % 2 == 0]
)
def test_it_is_the_best_of_all_sequences(states, price):
    "Every sequence of five codes, for random weights and random prices that grow with the code."
    dice = torch.Generator().manual_seed(states)
    for _ in range(2):
        x = 1.5 * torch.randn(1, 5, generator=dice, dtype=torch.float64)
        bits = torch.rand(2, 3, generator=dice, dtype=torch.float64).cumsum(1) * 2
        found = trellis_codes(x.clamp(-4, 4), bits, price, states)[0].tolist()
        every = itertools.product(range(-2, 3), repeat=5)
        least = min(cost(c, x[0].clamp(-4, 4).tolist(), bits.tolist(), price, states) for c in every)
        assert math.isclose(cost(found, x[0].clamp(-4, 4).tolist(), bits.tolist(), price, states), least, abs_tol=1e-9)


@pytest.mark.parametrize("states", STATES)
def test_lanes_do_not_know_each_other(states):
    x = 3 * torch.randn(50, 9)
    bits = learned_bits(x, states=states)
    whole = trellis_codes(x, bits, states=states)
    assert torch.equal(whole, trellis_codes(x, bits, states=states, bite=7))
    assert torch.equal(whole[3:4], trellis_codes(x[3:4], bits, states=states))


@pytest.mark.parametrize("states", STATES)
def test_feedback_with_nothing_to_pull_is_the_plain_search(states):
    x = (3 * torch.randn(6, 24)).double()
    classes = torch.randint(0, 3, x.shape)
    bits = learned_bits(x.view(12, 12), states=states, classes=classes.view(12, 12))
    found = feedback_codes(x, torch.eye(24).double(), torch.ones(24).double(), bits, PRICE, states, 12, classes)
    assert torch.equal(found, trellis_codes(x.view(12, 12), bits, PRICE, states, classes.view(12, 12)).view(6, 24))


def test_feedback_keeps_its_promise_of_cost():
    """The error that survivors note is that of the output: Σ counts · errors² = δ H δᵀ for H⁻¹ = UᵀU, whatever
    the lanes."""
    torch.manual_seed(0)
    A = torch.randn(40, 12).double() @ torch.randn(12, 12).double()
    H = A.T @ A
    U = torch.linalg.cholesky(H.inverse(), upper=True)
    w, d = 4 * torch.randn(5, 12).double(), U.diagonal()
    x = w / d
    bits = learned_bits(x)
    codes = feedback_codes(x, d[:, None].reciprocal() * 0 + U / d, torch.ones(12).double(), bits, 0.0, 8, 12)
    odd = torch.from_numpy(grids(codes.flatten().numpy(), 12, 8)).view(5, 12)
    δ = w - (2 * codes - odd * codes.sign()) * d
    nearest = w - (w / d / 2).round() * 2 * d
    ours, plain = (((e @ H) * e).sum() for e in (δ, nearest))
    assert ours < 0.6 * plain


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
@pytest.mark.hypothesis
def test_what_goes_in_comes_out(data):
    "Any codes, machine, lanes and classes."
    states, run = data.draw(st.sampled_from(STATES)), data.draw(st.integers(1, 40))
    codes = np.array(data.draw(st.lists(st.integers(-300, 300), min_size=1, max_size=120)), np.int32)
    kinds = data.draw(st.integers(1, 4))
    classes = None if kinds == 1 else np.array([hash((i, kinds)) % kinds for i in range(len(codes))], np.uint8)
    streams = deal(codes, classes, run, states)
    want = 2 * codes - np.sign(codes) * grids(codes, run, states)
    assert np.array_equal(walk(streams, classes, len(codes), run, states), want)
    q = from_codes(torch.from_numpy(codes), 0.5, torch.float32, states, run)
    back = TrellisTensor.from_parts(q.parts(), q.meta())
    assert back == q and torch.equal(back.dequantize(), torch.from_numpy(want) * 0.5)
    assert torch.equal(q.as_qtensor().dequantize(), q.dequantize())


def test_classes_that_are_all_the_first():
    "Two contexts, whether classes are named or not."
    codes, none = np.array([0, 3, -2, 1, 1, 0, 2], np.int32), np.zeros(7, np.uint8)
    for run in (1, 3, 40):
        streams = deal(codes, none, run, 4)
        want = 2 * codes - np.sign(codes) * grids(codes, run, 4)
        assert len(streams) == 2 and all(map(np.array_equal, streams, deal(codes, None, run, 4)))
        assert np.array_equal(walk(streams, none, 7, run, 4), want)


@settings(max_examples=examples(120), deadline=None)
@given(st.data())
@pytest.mark.hypothesis
def test_damage_is_an_error_or_a_tensor_of_the_right_size(data):
    q = DAMAGED
    parts, meta = {k: p.clone() for k, p in q.parts().items()}, dict(q.meta())
    name = data.draw(st.sampled_from([*parts, "counts", "levels", "run", "states", "shape"]))
    if name in parts:
        flat = parts[name].reshape(-1).view(torch.uint8)
        at = data.draw(st.integers(0, len(flat) - 1))
        flat[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            parts[name] = parts[name][:-1] if parts[name].dim() else parts[name][None]
    elif isinstance(meta[name], list):
        v = list(meta[name])
        v[data.draw(st.integers(0, len(v) - 1))] += data.draw(st.sampled_from([-2, -1, 1, 2, 10**9]))
        meta[name] = v
    else:
        meta[name] = data.draw(st.sampled_from([0, -1, 1, 7, 4, 16, 2**40, True, 8.0, "8", None]))
    try:
        out = TrellisTensor.from_parts(parts, meta).dequantize()
    except ValueError:
        return
    assert out.shape == q.shape and out.dtype == q.dtype


torch.manual_seed(0)
DAMAGED = from_codes(
    (2 * torch.randn(8, 20)).round().int(),
    0.25,
    run=20,
    row_spread=torch.arange(8).to(torch.uint8),
    column_steps=torch.arange(20).to(torch.uint8),
)


SHAPES = [(), (0,), (1,), (7,), (3, 0), (0, 3), (5, 1), (33, 47), (4, 3, 2, 2), (2, 257)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.hypothesis  # so that a search comes here: every shape of every type
@pytest.mark.parametrize(
    "shape, dtype", [(s, d) for i, s in enumerate(SHAPES) for j, d in enumerate(DTYPES) if FUZZ or (i + j) % 2 == 0]
)
def test_weights_of_every_shape_and_type(shape, dtype):
    w = torch.randn(shape, dtype=torch.float64).to(dtype)
    q = trellis_weight(w, None, bits=4)
    y = q.dequantize()
    assert y.shape == w.shape and y.dtype == dtype and TrellisTensor.from_parts(q.parts(), q.meta()) == q
    if w.numel() > 100:
        assert (y.double() - w.double()).square().mean() < 0.02 * w.double().square().mean()


def test_zeros_infinities_and_options():
    assert not trellis_weight(torch.zeros(4, 4)).dequantize().any()
    for bad in (torch.tensor([[math.nan, 1.0]]), torch.tensor([[math.inf, 1.0]])):
        with pytest.raises(ValueError, match="weight"):
            trellis_weight(bad)
    w = torch.randn(8, 8)
    for why, how in {
        "0.1 to 12": dict(bits=0.0),
        "too small": dict(step=1e-6),
        "a step is above 0": dict(step=-1.0),
        "4, 8, 16 or 32": dict(states=6),
        "a price": dict(price=-0.1),
        "price inf": dict(price=math.inf),
        "spacing is 0": dict(spacing=0),
        "spacing is nan": dict(spacing=math.nan),
        "spacing is True": dict(spacing=True),
        "one of them": dict(spacing=1.0, step=1.0),
    }.items():
        with pytest.raises(ValueError, match=why):
            trellis_weight(w, None, **how)


def test_what_is_rounded_stays_finite_or_is_refused():
    refused = 0
    for dtype in torch.float16, torch.bfloat16:
        for bits in 0.7, 2:
            try:
                assert (
                    trellis_weight(torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype), bits=bits)
                    .dequantize()
                    .isfinite()
                    .all()
                )
            except ValueError as e:
                assert "rounded to holds" in str(e) or "the step is" in str(e)
                refused += 1
    assert 0 < refused < 4


def test_long_lanes_are_taken_in_smaller_bites():
    "Inputs of a prime number are one lane: rows at a time are as many fewer."
    x, pull = torch.randn(3, 131) * 3, torch.randn(131, 131).triu(1) / 200 + torch.eye(131)
    bits, counts = learned_bits(x), torch.ones(131)
    at_once = feedback_codes(x, pull, counts, bits, run=131)
    with patch.object(modelzip.trellis, "lane_with_feedback", wraps=modelzip.trellis.lane_with_feedback) as lane:
        assert torch.equal(feedback_codes(x, pull, counts, bits, run=131, bite=2), at_once)
    assert [call.args[0].shape[1] for call in lane.call_args_list] == [1] * 3  # 2 · 128 // 131


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e30])
def test_weights_of_every_size(size):
    "Squares of these are zero or infinite in float32."
    w = torch.randn(16, 32)
    own, alike = (trellis_weight(size * w).dequantize() / size, trellis_weight(w).dequantize())
    assert (own - w).norm() < 1.1 * (alike - w).norm()


@pytest.mark.parametrize("shape", [(64, 64), (1, 700), (300,), (8, 4, 3, 3)])
def test_spacing_is_in_units_of_the_weights_own_size(shape):
    "A grid's values are so far apart; an outlier that no code would reach makes the step larger, and is kept."
    torch.manual_seed(0)
    w = torch.randn(shape)
    q = trellis_weight(w, spacing=0.25)
    assert q.scale.item() == pytest.approx(0.125 * w.square().mean().sqrt().item(), rel=1e-5)
    assert (q.dequantize() - w).abs().max() <= 4 * q.scale
    w.view(-1)[0] = 1e6
    off = trellis_weight(w, spacing=1e-4).dequantize() - w
    assert off.abs().max() < 1e6 / 5000


def test_nothing_is_built_that_no_file_could_say():
    k, row = torch.ones(4, 6, dtype=torch.int32), torch.zeros(5, dtype=torch.uint8)
    for how in dict(scale=0.0), dict(scale=-1.0), dict(scale=math.nan), dict(scale=1e-60), dict(scale=torch.ones(2)):
        with pytest.raises(ValueError, match="scale is"):
            from_codes(k, **how)
    for why, how in {
        "part row_steps": dict(row_steps=row),
        "unknown": dict(steps=row),
        "states": dict(states=6),
    }.items():
        with pytest.raises(ValueError, match=why):
            from_codes(k, 1.0, **how)
    with pytest.raises(ValueError, match="states"):
        trellis_weight(torch.zeros(0, 3), states=6)


def test_outliers_and_tiny_steps_take_no_memory(monkeypatch):
    "No code is looked at that a file could not say, so that no table of codes becomes large: 20 GB before."
    seen, plain = [], modelzip.trellis.spread_of
    monkeypatch.setattr(modelzip.trellis, "spread_of", lambda x: seen.append(x.abs().max().item()) or plain(x))
    w = torch.randn(64, 64)
    with pytest.raises(ValueError, match="step is 1e-09, which is too small: the largest weight is"):
        trellis_weight(w, step=1e-9)
    w[3, 5] = 1e9
    assert trellis_weight(w, bits=12).dequantize()[3, 5] > 0.99e9
    assert len(seen) == 1 and seen[0] <= 32700


@pytest.mark.parametrize("bits", [0.7, 1.5, 3.0, 5.0, 8.0])
def test_bits_are_what_was_asked_for(bits):
    torch.manual_seed(0)
    w = torch.randn(200, 256)
    assert abs(trellis_weight(w, None, bits).coded_bits() - bits) < 0.08
    w *= torch.randn(200, 1).exp()  # rows that differ
    assert abs(trellis_weight(w, None, bits).coded_bits() - bits) < 0.08


def test_a_whole_model_through_a_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).eval()
    batches = [torch.randint(0, 50, (40, 6))]
    with unchanged(model, batches):
        small = trellis(model, batches, bits=3.5)
    assert all(isinstance(m.q, TrellisTensor) for m in small if isinstance(m, Dequantize))
    x = torch.randint(0, 50, (10, 6))
    path = save(small, tmp_path / "small.mz")
    for back in (load(path, model), load(path, small), copy.deepcopy(small)):
        assert torch.equal(back(x), small(x))
    assert read_tensor(path, "1.weight") == small[1].q and "trellis" in str(inspect(path))
    assert torch.equal(dequantize_model(back)(x), small(x))
    for archive in (False, "solid"):
        assert torch.equal(load(save(small, tmp_path / "b.mz", archive), model)(x), small(x))
    again = trellis(model, batches, bits=3.5)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values()))


def test_integer_kernels_take_the_fine_grid():
    "At most 256 steps of the fine grid are one signed byte: a product of integers gives what the floats give."
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(10, 64)
    seen = calibrate(nn.Sequential(layer), [torch.randn(200, 64)])["0"]
    q = trellis_weight(layer.weight, seen, 3.0, importance=torch.rand(32) + 0.1)
    assert q.as_qtensor().levels <= 256 and why_not_int8(q.as_qtensor()) is None
    fine = nn.Sequential(Dequantize(layer, q.as_qtensor()))
    assert torch.equal(fine(x), nn.Sequential(Dequantize(layer, q))(x))
    fast = use_kernels(fine)(x)
    assert (fast - fine(x)).norm() < 0.02 * fine(x).norm()


def test_feedback_lowers_the_output_error():
    torch.manual_seed(0)
    layer = nn.Linear(96, 64)
    x = torch.randn(500, 96) @ torch.randn(96, 96) / 8
    seen = calibrate(nn.Sequential(layer), [x])["0"]
    plain, moved = (trellis_weight(layer.weight, s, 3.0) for s in (None, seen))
    error = lambda q: output_error(layer.weight, q.dequantize(), seen)
    assert error(moved) < 0.75 * error(plain)


def test_damaged_files_are_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    path = save(trellis(model, bits=3), tmp_path / "m.mz")
    data = bytearray(path.read_bytes())
    for at in range(70, len(data) - 60, max(1, len(data) // 40)):
        bad = bytearray(data)
        bad[at] ^= 0x55
        path.write_bytes(bad)
        try:
            y = load(path, model)
        except PackError:
            continue
        assert y[0].q.dequantize().shape == (32, 64)


def test_a_lane_longer_than_the_tensor_takes_no_memory():
    q = from_codes(torch.tensor([[1, 0], [-2, 1]]), 1.0, states=4, run=1 << 48)
    assert TrellisTensor.from_parts(q.parts(), q.meta()).dequantize().tolist() == [[2, 0], [-4, 1]]
    spread = torch.tensor([0, 4], dtype=torch.uint8)
    q = from_codes(torch.tensor([[1, 0], [-2, 1]]), 1.0, states=4, run=1 << 48, row_spread=spread)
    assert TrellisTensor.from_parts(q.parts(), q.meta()).dequantize().tolist() == [[2, 0], [-4, 1]]
