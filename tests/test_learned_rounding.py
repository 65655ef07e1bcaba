"""Learned rounding: up or down and nothing else, never worse than nearest, no single flip better, the same each time."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from guards import examples, seen_by, unchanged
from modelzip.learned_rounding import (
    adaround_weight,
    flipped,
    indecision,
    learned_rounding,
    learned_switches,
    rectified,
)
from modelzip.pack import load, save
from modelzip.ptq import nearest_weight, output_error
from modelzip.quant import Dequantize, QTensor
from modelzip.recipe import Recipe
from modelzip.workshop.scales import row_errors


pytestmark = pytest.mark.usefixtures("seeded")


@settings(max_examples=examples(25))
@given(
    bits=st.integers(1, 5),
    group=st.sampled_from([None, 4, 5]),
    symmetric=st.booleans(),
    steps=st.sampled_from([0, 20]),
    seed=st.integers(0, 99),
)
def test_never_worse_than_nearest_and_one_step_away(bits, group, symmetric, steps, seed):
    g = torch.Generator().manual_seed(seed)
    w, x = torch.randn(5, 12, generator=g), torch.randn(40, 12, generator=g) @ torch.randn(12, 12, generator=g)
    layer = nn.Linear(12, 5, bias=False)
    layer.weight.data = w
    s, how = seen_by(layer, x), dict(bits=bits, group=group, symmetric=symmetric)
    q, near = adaround_weight(w, s, steps=steps, **how), nearest_weight(w, s, **how)
    assert type(q) is QTensor and q.nbytes == near.nbytes and torch.equal(q.scale, near.scale)
    assert ((q.unpack().int() - near.unpack().int()).abs() <= 1).all()
    error = lambda q: row_errors(w, q.dequantize(), s)
    assert (error(q) <= error(near) * (1 + 1e-5) + 1e-12).all()
    assert q == adaround_weight(w, s, steps=steps, **how)


@pytest.mark.parametrize("seed", range(4))
def test_flips_stop_where_no_single_one_helps_and_meet_the_best_of_small_rows(seed):
    g = torch.Generator().manual_seed(seed)
    part, size = torch.rand(6, 9, generator=g), torch.rand(6, 9, generator=g) + 0.5
    H = (lambda A: A.T @ A)(torch.randn(30, 9, generator=g) @ torch.randn(9, 9, generator=g))
    free = torch.rand(6, 9, generator=g) < 0.8
    begun = part > 0.5
    up = flipped(begun, part, size, H, free)
    error = lambda up: ((((up.float() - part) * size) @ H) * (up.float() - part) * size).sum(1)
    assert torch.equal(up[~free], begun[~free]) and (error(up) <= error(begun) * 1.0001).all()
    for j in range(9):
        other = up.clone()
        other[:, j] ^= free[:, j]
        assert (error(other) >= error(up) - 1e-3 * error(up)).all()
    both = flipped(learned_switches(part, size, H), part, size, H, free | True)
    best = torch.stack([error(torch.tensor(c).expand(6, 9)) for c in itertools.product((False, True), repeat=9)]).amin(
        0
    )
    assert (error(both) >= best * 0.999).all() and (error(both) / best).median() < 2


def test_errors_of_clipped_weights_are_made_up_for():
    H, free = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor([[True, False]])
    part = torch.tensor([[0.4, 1.4]])  # the second stands beyond its last code, and stays below by 1.4
    assert learned_switches(part, torch.ones(1, 2), H, free=free).tolist() == [[True, False]]
    assert learned_switches(part, torch.ones(1, 2), -H + 2 * torch.eye(2), free=free).tolist() == [[False, False]]
    w = torch.randn(12, 32)
    s = seen_by(nn.Linear(32, 12), torch.randn(200, 32) @ torch.randn(32, 32))
    for bits in 2, 3:
        near = nearest_weight(w, s, bits=bits, group=None)
        assert (near.dequantize() - w).abs().amax() > 0.6 * near.scale.max()  # some are beyond
        ours, flips = (
            row_errors(w, adaround_weight(w, s, bits, None, steps=n).dequantize(), s).sum() for n in (300, 0)
        )
        assert ours < 0.95 * flips


def test_derivatives():
    V = torch.randn(50, dtype=torch.float64, requires_grad=True)
    (h,) = torch.autograd.grad(rectified(V)[0].sum(), V)
    assert torch.allclose(h, rectified(V)[1])
    h = torch.rand(50, dtype=torch.float64, requires_grad=True)
    for beta in 1.5, 2.0, 9.0:
        assert torch.allclose(torch.autograd.grad(indecision(h, beta)[0].sum(), h)[0], indecision(h, beta)[1])


@pytest.mark.parametrize(
    "layer, shape", [(nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8)), (nn.Conv1d(3, 4, 2), (3, 9)), (nn.Linear(6, 4), (6,))]
)
def test_layers_of_every_kind(layer, shape):
    x = torch.randn(9, *shape)
    s = seen_by(layer, x)
    for how in dict(group=None, bits=2), dict(group=4, bits=3, symmetric=False):
        w = layer.weight.detach()
        q, near = adaround_weight(w, s, steps=50, **how), nearest_weight(w, s, **how)
        assert (
            q.shape == w.shape and output_error(w, q.dequantize(), s) <= output_error(w, near.dequantize(), s) * 1.0001
        )


def test_extreme_weights():
    x = torch.randn(30, 6)
    for w in torch.zeros(3, 6), torch.full((3, 6), 1e30), torch.full((3, 6), 1e-30), torch.randn(3, 6) * 1e-20:
        layer = nn.Linear(6, 3, bias=False)
        layer.weight.data = w
        q = adaround_weight(w, seen_by(layer, x), bits=3, steps=10)
        assert torch.isfinite(q.dequantize()).all()
    q = adaround_weight(torch.randn(3, 6), seen_by(nn.Linear(6, 3), torch.zeros(4, 6)), bits=3, steps=10)
    assert torch.isfinite(q.dequantize()).all()


@pytest.mark.parametrize(
    "how, why", [(dict(steps=-1), "steps is -1"), (dict(steps=0.5), "steps is 0.5"), (dict(bits=9), "bits")]
)
def test_refused(how, why):
    with pytest.raises(ValueError, match=why):
        adaround_weight(torch.randn(3, 6), None, **how)


def net():
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def test_a_model_repeats_and_nothing_of_the_callers_changes(tmp_path, capsys):
    model, x = net(), torch.randn(60, 8)
    batches = [x[:30], x[30:]]
    with unchanged(model, x):
        new = learned_rounding(model, batches, bits=3, group=None, steps=40, progress=False)
    assert capsys.readouterr().err == ""
    again = learned_rounding(model, batches, bits=3, group=None, steps=40, progress=False)
    assert torch.equal(new(x), again(x)) and all(type(new[i]) is Dequantize for i in (0, 2, 4))
    assert torch.equal(load(save(new, tmp_path / "x.mz"), net())(x), new(x))
    from modelzip.quant import quantize_model

    off = lambda m: (m(x) - model(x)).square().mean()
    assert off(new) < off(quantize_model(model, bits=3))


def test_progress_counts_tensors(capsys, monkeypatch):
    import modelzip.learned_rounding as home

    bars = []

    class Bar(home.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"disable": False}))
            bars.append(self)

    monkeypatch.setattr(home, "tqdm", Bar)
    model = net()
    model[4] = nn.Linear(12, 12)
    model[4].weight = model[2].weight
    learned_rounding(model, [torch.randn(20, 8)], steps=3, group=None, overrides={"0": None})
    assert [(b.total, b.n) for b in bars] == [(1, 1)]


def test_a_recipe_can_learn():
    x = torch.randn(40, 8)
    made = Recipe([("learned_rounding", {"bits": 4, "group": None, "steps": 10})])(net(), [x])
    assert sum(isinstance(m, Dequantize) for m in made.modules()) == 3


def test_from_ptq():
    from modelzip import ptq

    assert ptq.learned_rounding is learned_rounding and ptq.adaround_weight is adaround_weight
    everything = {}
    exec("from modelzip.ptq import *", everything)
    assert everything["learned_rounding"] is learned_rounding
