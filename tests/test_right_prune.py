"""Pruning is right or refused: shares, hidden weights, hooks, batches, ties, degenerate numbers; nothing of the
caller's changes."""

import copy, itertools, math, warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from guards import codes_alone, examples, unchanged
from inputs import related
from modelzip import prune
from modelzip.data import Split
from modelzip.prune import (
    CRITERIA,
    Mask,
    Pruner,
    SparseLinear,
    collect,
    cut_layer,
    cut_model,
    fill_zeros,
    group_lasso,
    inverse_factor,
    l1_penalty,
    left_whole,
    lottery_ticket,
    mask_layer,
    masks,
    prunable_layers,
    prune_gradually,
    prune_model,
    remove_masks,
    rewind,
    sensitivity,
    sparsegpt_weight,
    sparsify,
    sparsify_layer,
    sparsify_model,
    sparsity_table,
    unit_scores,
    units,
    use_sparse_products,
)
from modelzip.quant import floats_left
from modelzip.quant import Dequantize, quantize, quantize_model
from modelzip.workshop.models import Inputs, Labelled

Linear = nn.Linear
X, Y = torch.randn(24, 8, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3


pytestmark = pytest.mark.usefixtures("seeded")


def net():
    return nn.Sequential(Linear(8, 12), nn.ReLU(), Linear(12, 6), nn.ReLU(), Linear(6, 3)).eval()


def gone(model):
    return {n: 1 - m.float().mean().item() for n, m in masks(model).items()}


def moment(x):
    return (x.T @ x)[None]


# ---- a share is a share


@given(
    st.integers(2, 12),
    st.integers(1, 40),
    st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 4), (4, 8)]),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(max_examples=examples(40), deadline=None)
def test_sparsegpt_with_n_of_m_cuts_the_share(outputs, inputs, nm, part, seed):
    n, m = nm
    share, w = part * (1 - n / m), torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    new, keep = sparsegpt_weight(w, moment(related(50, inputs, seed)), share, f"{n}:{m}")
    most = outputs * sum(max(0, min(m, inputs - i) - n) for i in range(0, inputs, m))
    assert abs(int((~keep).sum()) - min(share * w.numel(), most)) <= m - n and (new[~keep] == 0).all()
    groups = F.pad(keep, (0, -inputs % m)).unflatten(1, (-1, m)).sum(-1)
    assert part < 1 or (groups <= n).all()


def test_sparsegpt_with_n_of_m_by_the_issue():
    w = torch.randn(16, 32)
    assert (~sparsegpt_weight(w, moment(torch.randn(99, 32)), 0.25, "2:4")[1]).float().mean() == 0.25
    x = torch.randn(50, 32)
    pruner = Pruner(m := Linear(32, 16), 0.5, "sparsegpt", "2:4", schedule="cubic", batches=[x])
    for i in range(1, 9):
        pruner.step(i / 8)
        assert abs(gone(m)["weight"] - 0.5 * (1 - (1 - i / 8) ** 3)) < 0.01


@given(st.integers(1, 9), st.integers(2, 40), st.floats(0, 0.95), st.integers(0, 99))
@settings(max_examples=examples(20), deadline=None)
def test_sparsegpt_within_each_output(outputs, inputs, share, seed):
    layer = Linear(inputs, outputs)
    pruned = prune_model(
        layer, share, "sparsegpt", scope="output", batches=[related(50, inputs, seed)], allow_empty=True
    )
    cut = (~masks(pruned)["weight"]).sum(1) if masks(pruned) else torch.zeros(outputs)
    assert (cut == round(share * inputs)).all()


@given(
    st.sampled_from(["row", "column", "2x3", "kernel", "weight"]),
    st.floats(0, 0.7),
    st.floats(0, 0.9),
    st.sampled_from(["weight", "row"]),
    st.sampled_from(["global", "layer"]),
    st.integers(0, 99),
)
@settings(max_examples=examples(40), deadline=None)
def test_pruning_what_is_pruned_counts_what_is_gone(granularity, first, second, before, scope, seed):
    torch.manual_seed(seed)
    model = prune_model(
        nn.Sequential(Linear(20, 30), nn.ReLU(), Linear(30, 24)),
        first,
        granularity=before,
        scope=scope,
        allow_empty=True,
    )
    again = prune_model(model, second, "magnitude", granularity, scope, allow_empty=True)
    share = lambda m, n: (
        1 - torch.cat([k.flatten().float() for key, k in masks(m).items() if n in key] or [torch.ones(1)]).mean().item()
    )
    for n, k in masks(model).items():
        assert not (masks(again)[n] & ~k).any()  # what is cut stays cut
    for n, size in (("0.", 600), ("2.", 720)) if scope == "layer" else (("", 1320),):
        assert share(again, n) == pytest.approx(
            max(share(model, n), second), abs={"row": 30, "column": 30, "2x3": 6}.get(granularity, 1) / size
        )


def test_a_unit_is_worth_the_mean_of_what_is_left():
    s = torch.tensor([[4.0, -math.inf], [3.0, 3.0], [-math.inf, -math.inf]])
    assert unit_scores(s, units(s, "row")).tolist() == [4.0, 3.0, -math.inf]


def test_each_layer_starts_from_its_own_sparsity():
    m = prune_model(net(), {"0": 0.9, "2": 0.0}, scope="layer")
    p = Pruner(m, {"0": 0.9, "2": 0.5}, schedule="cubic")
    p.step(0.01)
    assert gone(m)["2.weight"] < 0.05


# ---- weights that are computed


def pruned_by_torch(l):
    torch_prune.l1_unstructured(l, "weight", 0.5)
    return l


def buffered(l):
    w = l.weight.detach()
    del l.weight
    l.register_buffer("weight", w)
    return l


def attributed(l):
    w = l.weight.detach()
    del l.weight
    l.weight = w
    return l


class Plus(nn.Module):
    def forward(self, w):
        return w + 1


def shifted(l):
    torch.nn.utils.parametrize.register_parametrization(l, "weight", Plus())
    return l


HIDDEN = {
    "torch.nn.utils.prune": pruned_by_torch,
    "remove_weight_norm": nn.utils.weight_norm,
    "remove_spectral_norm": nn.utils.spectral_norm,
    "weight_norm|remove_parametrizations": parametrizations.weight_norm,
    "remove_parametrizations": parametrizations.spectral_norm,
    "Orthogonal": parametrizations.orthogonal,
    "Plus": shifted,
    "buffer": buffered,
    "attribute": attributed,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("says", HIDDEN)
@pytest.mark.parametrize(
    "call",
    [
        lambda m: prune_model(m, 0.5),
        lambda m: prune_model(m, 0.5, "wanda", batches=[X]),
        lambda m: prune_model(m, 0.5, "sparsegpt", batches=[X]),
        lambda m: prune_model(m, 0.5, "taylor", batches=[(X, Y)]),
        lambda m: sparsify_model(m),
        lambda m: sparsify_model(m, 4),
        lambda m: cut_model(m, torch.abs, 0.1),
        lambda m: prune_gradually(m, Split(X, Y), 0.5, 1, progress=False),
        lambda m: collect(m, [X], "power"),
        lambda m: lottery_ticket(m, lambda m, i: None, 0.5, 1),
        lambda m: sensitivity(m, lambda m: 0.0),
        lambda m: l1_penalty(m),
        lambda m: group_lasso(m),
    ],
)
def test_weights_that_are_computed_are_refused_by_name(says, call):
    model = net()
    model[0].weight.data[0, 0] = 0
    model[2] = HIDDEN[says](model[2])
    with pytest.raises(ValueError, match=f"layer 2 .*({says})"):
        call(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("says", HIDDEN)
def test_other_layers_can_be_pruned(says):
    model = net()
    model[2] = HIDDEN[says](model[2])
    found = (
        prune_model(model.eval(), 0.5, skip="2", scope="layer") if says not in ("remove_weight_norm",) or True else None
    )
    assert set(masks(found)) == {"0.weight", "4.weight"}
    real = sparsify_model(found, overrides={"2": None})
    assert isinstance(real[0], Dequantize) and not isinstance(real[2], Dequantize)
    torch.testing.assert_close(real.eval()(X), found.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_masking_by_hand_what_is_computed():
    for says, hide in HIDDEN.items():
        if hide is shifted or says in ("remove_parametrizations", "Orthogonal"):
            continue
        with pytest.raises(ValueError, match=f"weight of .*({says})"):
            mask_layer(hide(Linear(4, 3)), torch.ones(3, 4))
    with pytest.raises(ValueError, match="no parameter 'w'"):
        mask_layer(Linear(4, 3), torch.ones(3, 4), "w")
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        mask_layer(quantize_model(Linear(4, 3)), torch.ones(3, 4))


@pytest.mark.parametrize("how", ["forward", "closure"])
def test_models_that_a_copy_cannot_follow_are_refused(how):
    m = net()
    if how == "forward":
        m.forward = torch.compile(m.forward, backend="eager")
    else:
        m[0].register_forward_hook(lambda l, i, o: m[2](o)[:, :1] + o)
    zero = net()
    zero[0].weight.data.zero_()
    zero.forward = zero.forward
    for call in (
        lambda: prune_model(m, 0.5),
        lambda: cut_model(m, torch.abs, 0.01),
        lambda: prune_gradually(m, Split(X, Y), 0.5, 1),
        lambda: lottery_ticket(m, print, 0.5),
        lambda: sparsify_model(zero),
        lambda: remove_masks(m),
        lambda: collect(m, [X], "power"),
    ):
        with pytest.raises(ValueError, match="copy of it would run the original"):
            call()


def test_what_runs_depends_on_the_codes_alone():
    m = net()
    pruned = prune_model(m, 0.6, "wanda", batches=[X])
    codes_alone(m, pruned, X)
    for made in (
        sparsify_model(pruned),
        sparsify_model(pruned, 4),
        use_sparse_products(sparsify_model(pruned)),
        remove_masks(pruned),
        fill_zeros(sparsify_model(pruned, 4)),
    ):
        codes_alone(pruned, made, X)


# ---- hooks


def hooked(kind):
    m, calls = net(), []

    def after(l, i, o):
        calls.append("after")
        return 2 * o

    def before(l, i):
        calls.append("before")
        return (i[0] + 1,)

    def named(l, args, kwargs, o):
        calls.append("named")
        return o - 1

    for l in (m[0], m[2]):
        if kind == "after":
            l.register_forward_hook(after)
        elif kind == "before":
            l.register_forward_pre_hook(before)
        else:
            l.register_forward_hook(named, with_kwargs=True)
    return m, calls


@pytest.mark.parametrize("kind", ["after", "before", "named"])
def test_hooks_are_kept_and_called_once(kind):
    m, calls = hooked(kind)
    pruned = prune_model(m, 0.6)
    right = remove_masks(pruned)
    sparse = sparsify_model(pruned)
    quick = use_sparse_products(sparse, 1.0)
    want = right(X)
    for made in (
        pruned,
        sparse,
        quick,
        use_sparse_products(sparse, 0.0),
        fill_zeros(sparse),
        fill_zeros(sparsify_model(pruned, 8)),
        sparsify_model(quantize_model(pruned_zeros(right), 8)),
    ):
        calls.clear()
        tolerance = (
            0.1
            if any(isinstance(l, Dequantize) and getattr(l.q, "quantized", 1) is not None for l in made.modules())
            else 1e-5
        )
        torch.testing.assert_close(made(X), want, rtol=tolerance, atol=tolerance)
        assert len(calls) == 2, type(made[0])
    calls.clear()
    quick(X.clone().requires_grad_())
    assert len(calls) == 2
    outer = sparsify_model(pruned)
    outer[4].register_forward_hook(lambda l, i, o: 3 * o)  # on the wrapper
    for made in (use_sparse_products(outer), fill_zeros(outer)):
        torch.testing.assert_close(made(X), 3 * want, rtol=1e-5, atol=1e-5)


def pruned_zeros(m):
    return copy.deepcopy(m)


# ---- batches


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = Linear(8, 3)

    def forward(self, x, mask=None):
        return self.fc(x if mask is None else x * mask[:, None])


CALIBRATING = [
    lambda m, b: prune_model(m, 0.5, "wanda", batches=b),
    lambda m, b: prune_model(m, 0.5, "sparsegpt", batches=b),
    lambda m, b: collect(m, b, "power"),
    lambda m, b: collect(m, b, "moment"),
    lambda m, b: cut_model(m, "wanda", 0.05, b),
    lambda m, b: Pruner(copy.deepcopy(m), 0.5, "obs", batches=b).step(),
    lambda m, b: sensitivity(m, lambda m: 0.0, (0.5,), "wanda", batches=b),
]


@pytest.mark.parametrize("call", CALIBRATING)
def test_labels_are_never_a_mask(call):
    with pytest.raises(ValueError, match="cannot take batch 0.*Labelled"):
        call(Masked(), [(X, Y)])
    for batch in (Labelled(X, Y), {"x": X, "labels": Y}, X, (X,), Inputs(X), Inputs(x=X)):
        call(Masked(), [batch])


def test_labels_are_left_out_and_arguments_are_given():
    plain = collect(Masked(), [X], "power")["fc"].power
    for b in (Labelled(X, Y), {"x": X, "labels": Y}, Inputs(x=X)):
        assert torch.equal(collect(Masked(), [b], "power")["fc"].power, plain)
    for b in (Inputs(X, Y), {"x": X, "mask": Y}, Inputs(X, mask=Y)):
        assert torch.equal(collect(Masked(), [b], "power")["fc"].power, (X * Y[:, None]).square().sum(0)[None])
    m, want = Masked(), collect(net(), [(X, Y)], "gradient")["0"].gradient
    a, b = (collect(m, [q], "gradient")["fc"].gradient for q in (Labelled(X, Y), {"x": X, "labels": Y}))
    F.cross_entropy(m(X), Y).backward()
    assert torch.equal(a, b) and torch.allclose(a, m.fc.weight.grad) and want is not None


@pytest.mark.parametrize("call", CALIBRATING)
def test_batches_may_come_from_a_generator(call):
    m = nn.Sequential(Linear(8, 8), Linear(8, 8))

    def result(b):
        torch.manual_seed(0)
        r = call(m, b)
        return [
            t
            for v in (r.values() if isinstance(r, dict) else [r])
            if v is not None
            for t in (vars(v).values() if not isinstance(v, nn.Module) else masks(v).values())
            if isinstance(t, torch.Tensor)
        ]

    for a, b in zip(result([X[:9], X[9:]]), result(x for x in (X[:9], X[9:]))):
        assert torch.equal(a, b)


class Routed(nn.Module):
    "Layers that run for some batches only, several times, by keyword."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = Linear(8, 8), Linear(8, 8), Linear(8, 8), Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        if len(x) > 5:
            x = self.b(input=x)
        if len(x) % 2:
            x = self.c(self.c(self.c(x)))
        return self.head(x)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "obs", "taylor"])
def test_layers_that_some_batches_call(criterion):
    batches = [X[:4], X[4:9], X[9:20], X[20:24]]
    if criterion == "taylor":
        batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]
    pruned = prune_model(Routed(), 0.5, criterion, scope="layer", batches=batches)
    assert all(v == pytest.approx(0.5, abs=0.05) for v in gone(pruned).values()) and len(gone(pruned)) == 4
    with pytest.raises(ValueError, match="layer b was never called"):
        prune_model(Routed(), 0.5, "wanda" if criterion == "taylor" else criterion, batches=[X[:4], X[:3]])


def test_all_rows_of_all_calls_are_used():
    seen, m = {}, Routed()

    class Look(prune.SparseGPT):
        def cut(self, weight, keep, s, *how):
            seen[len(seen)] = s.rows
            return super().cut(weight, keep, s, *how)

    prune_model(m, 0.5, Look(), batches=[X[:4], X[4:9], X[9:20], X[20:24]])
    assert list(seen.values()) == [24, 11, 3 * 16, 24]  # a, b, c three times for 5 and 11 rows, head


def test_batches_and_models_are_left():
    class Odd(nn.Module):
        """Writes to its input, counts its calls, makes a cache at first use, renormalizes its embedding, draws
        random numbers."""

        def __init__(self):
            super().__init__()
            self.fc, self.out, self.e, self.grid = Linear(8, 8), Linear(8, 3), nn.Embedding(4, 8, max_norm=0.1), None
            self.register_buffer("calls", torch.zeros(()))
            self.past = []

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.rand(8)
            self.calls += 1
            self.past.append(len(x))
            return self.out(F.relu_(self.fc(x.add_(1)) + self.grid + self.e(torch.zeros((), dtype=torch.long))))

    b, pairs = [X.clone(), X[:3].clone()], [(X.clone(), Y.clone())]
    m = Odd().train()
    m.fc.eval()
    with unchanged(m, b, pairs):
        for c in ("wanda", "obs", "sparsegpt", "magnitude"):
            prune_model(m, 0.5, c, batches=b)
        for c in ("taylor", "fisher", "movement"):
            prune_model(m, 0.5, c, batches=pairs)
        for needs in ("power", "moment"):
            collect(m, b, needs)
        for needs in ("gradient", "movement"):
            collect(m, pairs, needs)
        cut_model(m, "wanda", 0.01, b)
        prune_gradually(m, Split(X, Y), 0.5, 1, progress=False)
        lottery_ticket(m, lambda t, i: None, 0.5, 2)
        sensitivity(m, lambda m: 0.0, (0.5,), "wanda", batches=b)
        sparsity_table(m)
        left_whole(m)
        prunable_layers(m)
        masks(m)
        l1_penalty(m)
        group_lasso(m)
    pruned = prune_model(m, 0.5, batches=b)
    with unchanged(m, pruned, b):
        remove_masks(pruned)
        real = sparsify_model(pruned)
        four = sparsify_model(pruned, 4)
    assert pruned.calls == 0 and pruned.grid is None  # calibration is no part of the result
    with unchanged(m, pruned, real, four):
        use_sparse_products(real)
        fill_zeros(real)
        fill_zeros(four)
        sparsify_model(quantize_model(remove_masks(pruned)))
    keep = torch.ones(3, 8, dtype=torch.bool)
    l, other = Linear(8, 3), Linear(8, 3)
    with unchanged(keep):
        mask_layer(l, keep)
        mask_layer(l, torch.zeros(3, 8))
        cut_layer(other, keep)
    with unchanged(state := m.state_dict()):
        rewind(copy.deepcopy(m), state)
    p = Pruner(m, 0.5, "wanda", batches=b)
    p.step()
    assert m.calls == 0 and m.grid is None and not m.past


# ---- names, ties


def tied():
    m = nn.ModuleDict({"a": Linear(8, 8), "b": Linear(8, 8), "c": Linear(8, 8)})
    m["b"].weight = m["a"].weight
    return m


def test_skipping_one_of_two_names_skips_both():
    for skip in ("a", "b"):
        assert list(prunable_layers(tied(), skip=skip)) == ["c"] and set(
            masks(prune_model(tied(), 0.5, skip=[skip]))
        ) == {"c.weight"}
    m = nn.Sequential(l := Linear(8, 8), nn.ReLU(), l, Linear(8, 3))
    for skip in ("0", "2"):
        assert list(prunable_layers(m, skip=skip)) == ["3"]
    ten = nn.Sequential(*(Linear(4, 4) for _ in range(11)))
    assert "10" not in prunable_layers(ten, skip="10") and len(prunable_layers(ten, skip="10")) == 10


def test_tied_layers_have_the_same_options():
    m = tied()
    m["a"].weight.data[:4] = 0
    m["c"].weight.data[:4] = 0
    for how in ({"a": {"bits": 4}}, {"b": None}, {"a": {"bits": 4}, "b": {"bits": 8}}):
        with pytest.raises(ValueError, match="b .* and a .* share a weight"):
            sparsify_model(m, overrides=how)
    real = sparsify_model(m, overrides={"[ab]": {"bits": 4}})
    assert real["a"].packed is real["b"].packed


# ---- degenerate numbers


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "obs"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e15, 1e30, 3e38])
def test_inputs_of_any_size_end(criterion, scale):
    try:
        pruned = prune_model(Linear(8, 5), 0.5, criterion, batches=[X * scale])
    except ValueError as e:
        assert scale > 1e15 and ("overflow" in str(e) or "NaN" in str(e))
    else:
        assert pruned.weight.isfinite().all() and gone(pruned)["weight"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(bad):
    m = net()
    m[2].weight.data[1, 1] = bad
    for c in sorted(CRITERIA):
        if c in ("gradient", "taylor", "snip", "fisher", "obd", "movement"):
            continue  # the loss is not finite first
        with pytest.raises(ValueError, match="the weight of layer 2 holds .* NaN"):
            prune_model(m, 0.5, c, batches=[X])
    with pytest.raises(ValueError, match="the weight of layer 2 holds .* NaN"):
        cut_model(m, torch.abs, 0.01)
    with pytest.raises(ValueError, match="NaN"):
        sparsegpt_weight(m[2].weight.detach(), moment(torch.randn(50, 12)), 0.5)
    with pytest.raises(ValueError, match="NaN"):
        inverse_factor(torch.full((3, 3), bad))
    keep = m[2].weight.isfinite()
    assert cut_model(m, {"2": keep})[2].weight.isfinite().all()  # cut by hand: really zero
    if math.isnan(bad):
        with pytest.raises(ValueError, match="1 NaN"):
            sparsify(m[2].weight.detach())
        with pytest.raises(ValueError, match="layer 2: .*NaN"):
            sparsify_model(m)


def test_layers_without_numbers():
    m = nn.Sequential(Linear(8, 0), Linear(0, 8), Linear(8, 3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for c in ("magnitude", "wanda", "sparsegpt", "obs", "random"):
            assert set(masks(prune_model(m, 0.5, c, batches=[X]))) == {"2.weight"}
        assert set(masks(prune_model(m, 0.5, "taylor", batches=[(X, Y)]))) == {"2.weight"}
        real = sparsify_model(prune_model(m, 0.8))
        for how in (dict(bits=4), dict(bits=3, codebook="kmeans"), dict(layout="gaps"), dict(bits=4, group=4)):
            assert [type(l) for l in sparsify_model(prune_model(m, 0.8), **how)] == [Linear, Linear, Dequantize]
    torch.testing.assert_close(real(X), prune_model(m, 0.8)(X))
    with pytest.raises(ValueError, match="nothing to prune"):
        prune_model(Linear(0, 3), 0.5)
    for shape in ((0,), (0, 3), (3, 0), ()):
        t = sparsify(torch.zeros(shape))
        assert t.dequantize().shape == shape
    assert sparsity_table(m).rows[0][2] == 0 and "0" in repr(sparsity_table(m))


def test_a_wide_layer_whose_inputs_are_zero():
    layer = Linear(1030, 2)
    assert prune_model(layer, 0.5, "sparsegpt", batches=[torch.zeros(3, 1030)]).weight.isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_mask_over_anything_is_zero(value):
    w = nn.Parameter(torch.tensor([value, 2.0]))
    y = Mask(torch.tensor([False, True]))(w)
    y.sum().backward()
    assert y.tolist() == [0, 2] and w.grad.tolist() == [0, 1]


# ---- rewinding, filling, generators


def test_rewinding_any_masked_parameter():
    a = nn.MultiheadAttention(8, 2)
    plain = copy.deepcopy(a.state_dict())
    keep = torch.rand(24, 8) < 0.5
    b = copy.deepcopy(a)
    mask_layer(b, ~keep, "in_proj_weight")
    masked = copy.deepcopy(b.state_dict())
    for masked_now, state in itertools.product((True, False), (plain, masked)):
        m = copy.deepcopy(a)
        if masked_now:
            mask_layer(m, keep, "in_proj_weight")
            mask_layer(m.out_proj, torch.ones(8, 8))
        for p in m.parameters():
            p.data += 1
        rewind(m, state)
        torch.testing.assert_close(
            m.in_proj_weight, torch.where(keep, a.in_proj_weight, 0) if masked_now else a.in_proj_weight
        )
        assert torch.equal(m.out_proj.weight, a.out_proj.weight) and (
            not masked_now or torch.equal(masks(m)["in_proj_weight"], keep)
        )
    with pytest.raises(ValueError, match="no 'in_proj_weight' of shape"):
        rewind(m, {k: v for k, v in plain.items() if k != "in_proj_weight"})
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="out_proj.bias"):
        rewind(m, {k: v + 9 for k, v in plain.items() if k != "out_proj.bias"})
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_rewinding_another_parametrization_under_a_mask():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.ones(()))

        def forward(self, w):
            return w * self.s

    layer = Linear(4, 3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    before, weight = copy.deepcopy(layer.state_dict()), layer.weight.detach().clone()
    mask_layer(layer, torch.eye(3, 4))
    layer.parametrizations.weight[1].s.data += 5
    layer.parametrizations.weight.original.data += 1
    assert torch.equal(rewind(layer, before).weight, weight * torch.eye(3, 4))


@pytest.mark.parametrize(
    "how",
    [
        dict(bits=4, codebook="nf4"),
        dict(bits=3, codebook=torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])),
        dict(bits=1, codebook=torch.tensor([-1.0, 1.0])),
        dict(bits=8),
        dict(bits=2, symmetric=False),
        dict(bits=1),
        dict(bits=2, levels=3),
    ],
)
def test_zeros_are_filled_with_codes_where_there_is_a_code(how):
    pruned = prune_model(net(), 0.7, scope="layer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = {"bits": 8} | how
        real = sparsify_model(pruned, **how)
    full = fill_zeros(real)
    torch.testing.assert_close(full(X), real(X), rtol=0, atol=0)
    table = how.get("codebook")
    zero = how["bits"] > 1 if table is None else isinstance(table, str) or bool((table == 0).any())
    assert all(isinstance(m, Dequantize) == zero for m in (full[0], full[2]))


def test_the_matrix_follows_its_codes():
    pruned = prune_model(net(), 0.9, scope="layer")
    other = prune_model(net(), 0.9, scope="layer")
    a, b = (use_sparse_products(sparsify_model(m, layout="bitmap"), 1.0) for m in (pruned, other))
    a(X)
    a.load_state_dict(b.state_dict())
    torch.testing.assert_close(a(X), other(X), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        a[0].packed.values.mul_(2)
    torch.testing.assert_close(a[0](X), 2 * (other[0](X) - other[0].bias) + other[0].bias, rtol=1e-5, atol=1e-6)


# ---- the smallest of all layouts


@given(
    st.integers(1, 9),
    st.integers(1, 24),
    st.floats(0, 1),
    st.sampled_from([None, 2, 3, 4, 8]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 999),
)
@settings(max_examples=examples(60), deadline=None)
def test_the_smallest_layout_is_chosen(outputs, inputs, density, bits, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=g, dtype=dtype) * (torch.rand(outputs, inputs, generator=g) < density)
    x = w if bits is None else quantize(w, bits)
    sizes, chosen = [], sparsify(x)
    for layout in ("bitmap", "gaps", "n:m", "dense"):
        try:
            t = sparsify(x, layout=layout)
        except ValueError:
            continue
        sizes.append(t.nbytes)
        assert torch.equal(t.dequantize(), (w if bits is None else x.dequantize()))
    assert chosen.nbytes == min(sizes)


@pytest.mark.filterwarnings("ignore")
def test_sparse_products_wherever_they_run():
    right = prune_model(net(), 0.9, scope="layer")
    quick = use_sparse_products(sparsify_model(right), 1.0)
    close = lambda a, b, tolerance=1e-5: torch.testing.assert_close(
        a.float(), b.float(), rtol=tolerance, atol=tolerance
    )
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = quick(X)
        assert y.dtype == dtype
        close(y, right(X), 0.05)
    close(torch.compile(quick, backend="eager")(X), right(X))
    with torch.inference_mode():
        close(quick(X), right(X))


@pytest.mark.filterwarnings("ignore")
def test_masks_in_recorded_programs():
    m = prune_model(net(), 0.5)
    close = lambda f: torch.testing.assert_close(f(X), m(X), rtol=1e-5, atol=1e-6)
    close(torch.compile(m, backend="eager"))
    close(torch.export.export(m, (X,)).module())
    close(torch.jit.trace(m, X))
    close(torch.fx.symbolic_trace(m))
    close(torch.vmap(m))
    close(lambda x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)))
    assert copy.deepcopy(m).to("meta")(X.to("meta")).shape == (24, 3)


def test_rows_of_gpt2s_layers_are_outputs():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    m = nn.Sequential(Conv1D(6, 8)).eval()
    pruned = prune_model(m, 0.5, granularity="row", layers=(Conv1D,))
    assert ((pruned(X) - pruned[0].bias) == 0).all(0).sum() == 3  # silent outputs
    each = prune_model(m, 0.5, scope="output", layers=(Conv1D,))
    assert (~masks(each)["0.weight"]).sum(0).tolist() == [4] * 6
    pairs = prune_model(m, granularity="2:4", layers=(Conv1D,))
    assert (masks(pairs)["0.weight"].view(2, 4, 6).sum(1) == 2).all()
    with pytest.raises(ValueError, match="0 is a Conv1D"):
        prune_model(m, 0.5, "wanda", batches=[X], layers=(Conv1D,))


def test_a_matrix_made_in_inference_mode_can_be_differentiated():
    quick = use_sparse_products(sparsify_model(prune_model(net(), 0.5, scope="layer")))  # dense products
    with torch.inference_mode():
        quick(X)
    quick(X.clone().requires_grad_()).sum().backward()


def test_masks_of_other_parameters_are_made_final_too():
    m = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    pruned = prune_model(m, 0.8, scope="layer")
    mask_layer(pruned.self_attn, torch.rand(24, 8) < 0.5, "in_proj_weight")
    real = sparsify_model(pruned)
    assert not masks(real) and isinstance(real.linear1, Dequantize)
    torch.testing.assert_close(real(X[None]), pruned(X[None]), rtol=1e-4, atol=1e-5)


def test_subclasses_that_compute_something_else_stay_as_they_are():
    class Twice(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    m = nn.Sequential(Twice(8, 8), Linear(8, 3)).eval()
    m = prune_model(m, 0.8, scope="layer")
    quick = use_sparse_products(sparsify_model(m), 1.0)
    torch.testing.assert_close(quick(X), m(X), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no sparse Linear"):
        use_sparse_products(sparsify_model(m[0]))
    with pytest.raises(ValueError, match="no subclass"):
        SparseLinear(Twice(8, 8), sparsify(torch.eye(8)))


def test_layers_without_weights_yet():
    with pytest.raises(ValueError, match="LazyLinear has no weights yet"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prunable_layers(nn.Sequential(nn.LazyLinear(3)))
    called = nn.Sequential(nn.LazyLinear(3))
    called(X)
    assert gone(prune_model(called, 0.5)) == {"0.weight": 0.5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_precision(dtype):
    m, x = net().to(dtype), X.to(dtype)
    for c in ("magnitude", "wanda", "sparsegpt", "obs", "taylor", "random"):
        p = prune_model(m, 0.5, c, scope="layer", batches=[(x, Y)] if c == "taylor" else [x])
        assert all(v == pytest.approx(0.5, abs=0.03) for v in gone(p).values()) and p[0].weight.dtype == dtype
        torch.testing.assert_close(sparsify_model(p)(x), p(x))
        torch.testing.assert_close(use_sparse_products(sparsify_model(p))(x), p(x), rtol=0.02, atol=0.02)


@given(
    st.integers(2, 60),
    st.integers(1, 16),
    st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    st.sampled_from(["weight", "row", "column"]),
    st.floats(0, 0.95),
    st.sampled_from(["layer", "output"]),
    st.integers(0, 99),
)
@settings(max_examples=examples(25), deadline=None)
def test_sparsegpt_on_what_is_pruned_already(inputs, outputs, first, before, share, scope, seed):
    torch.manual_seed(seed)
    layer = prune_model(Linear(inputs, outputs), first, granularity=before, allow_empty=True)
    was = ~masks(layer).get("weight", torch.ones(outputs, inputs, dtype=torch.bool))
    now = ~masks(
        prune_model(layer, share, "sparsegpt", scope=scope, batches=[torch.randn(60, inputs)], allow_empty=True)
    ).get("weight", ~was)
    assert not (was & ~now).any()
    if scope == "layer":
        assert abs(int(now.sum()) - max(int(was.sum()), round(share * was.numel()))) <= 1
    else:
        assert torch.equal(now.sum(1), was.sum(1).clamp(min=round(share * inputs)))


@given(
    st.integers(4, 40),
    st.integers(1, 12),
    st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 4)]),
    st.sampled_from(["weight", "row", "1:4", "2:4"]),
    st.floats(0, 1),
    st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
    st.integers(0, 99),
)
@settings(max_examples=examples(25), deadline=None)
def test_n_of_m_on_what_is_pruned_already(inputs, outputs, nm, before, part, criterion, seed):
    torch.manual_seed(seed)
    (n, m), share = nm, part * (1 - nm[0] / nm[1])
    layer = prune_model(Linear(inputs, outputs), 0.4, granularity=before, allow_empty=True)
    was = masks(layer)["weight"]
    keep = masks(
        prune_model(layer, share, criterion, f"{n}:{m}", "layer", batches=[torch.randn(60, inputs)], allow_empty=True)
    ).get("weight", was)
    assert not (keep & ~was).any()
    if part == 1:
        assert (F.pad(keep, (0, -inputs % m)).unflatten(1, (-1, m)).sum(-1) <= n).all()  # the whole pattern
    elif share < 1 - n / m - 1e-6:
        assert int((~keep).sum()) <= max(int((~was).sum()), share * keep.numel()) + m - n


class Drifting(nn.Module):
    "Writes into itself while it runs, and draws random numbers."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = Linear(8, 8), Linear(8, 3), None
        self.register_buffer("sum", torch.zeros(8))

    def forward(self, x):
        self.sum += x.mean(0)
        self.last = x.mean() if self.last is None else self.last + x.mean()
        return self.b(self.a(x + self.sum + self.last + torch.rand_like(x)).relu())


def test_sums_are_those_of_each_batch_whatever_ran_before():
    m, one, two = Drifting(), [X[:12]], [X[:12], X[12:]]
    seen = collect(m, two, "moment")
    torch.rand(99)
    again = collect(m, two, "moment")
    assert all(torch.equal(seen[n].moment, again[n].moment) for n in "ab")  # the same question, the same answer
    assert not m.sum.any() and m.last is None  # and the model is as it was
    alone = collect(m, one, "moment")
    more = {n: seen[n].moment - alone[n].moment for n in "ab"}  # what the second batch adds is a matrix of squares
    assert all(torch.linalg.eigvalsh(d.double())[0, 0] > -1e-3 for d in more.values())
    first, second = (masks(prune_model(m, 0.5, "sparsegpt", batches=two)) for _ in range(2))
    assert all(torch.equal(k, second[n]) for n, k in first.items())


def test_a_masked_layer_is_asked_for_its_width_too():
    m = mask_layer(Linear(8, 3), torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="batch 1.*given 5 inputs and has weights for 8"):
        collect(m, [torch.randn(4, 8), torch.randn(4, 5)], "moment")


@pytest.mark.parametrize(
    "ambient",
    [
        lambda: torch.inference_mode(),
        lambda: torch.no_grad(),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("cpu"),
    ],
)
def test_where_it_is_called_does_not_matter(ambient):
    m, batches = net(), [Labelled(X[:10], Y[:10]), Labelled(X[10:], Y[10:])]
    exact = lambda: (
        {
            c: prune_model(m, 0.5, c, scope="layer", batches=batches)
            for c in ("magnitude", "wanda", "obs", "taylor", "movement")
        }
        | {"sparsegpt": prune_model(m[0], 0.5, "sparsegpt", batches=[X, X])}
    )
    right, one = exact(), collect(m[0], [X, X], "moment")[""].moment
    with ambient():
        found, again = exact(), collect(m[0], [X, X], "moment")[""].moment
    assert torch.equal(one, again)
    for c in right:
        same = [torch.equal(a, b) for a, b in zip(masks(right[c]).values(), masks(found[c]).values())]
        assert (
            all(same) or c in ("wanda", "obs", "taylor", "movement") and same[0]
        )  # what deeper layers are given differs under autocast
    torch.set_default_dtype(torch.float64)
    try:
        other = exact()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for c in right for a, b in zip(masks(right[c]).values(), masks(other[c]).values()))


@pytest.mark.parametrize("criterion", ["wanda", "obs", "sparsegpt"])
def test_batches_without_rows_are_no_data(criterion):
    for empty in (X[:0], X[None, :0]):
        with pytest.raises(ValueError, match="no data"):
            prune_model(Linear(8, 3), 0.5, criterion, batches=[empty])
    layer = Linear(8, 3)
    a, b = (prune_model(layer, 0.5, criterion, batches=x) for x in ([X], [X[:0], X]))
    assert torch.equal(a.weight, b.weight)


@given(st.integers(1, 12), st.integers(1, 8), st.lists(st.sampled_from([-1.0, 0.5, 0.5, 2.0]), min_size=1, max_size=4))
@settings(max_examples=examples(25), deadline=None)
def test_a_table_of_few_survivors(count, bits, values):
    w = torch.zeros(5, 6)
    w.view(-1)[torch.randperm(30)[:count]] = torch.tensor(values)[torch.randint(len(values), (count,))]
    q = prune.quantize_survivors(w, w != 0, bits, codebook="kmeans")
    got = sparsify(q, w != 0).dequantize()
    assert (got[w == 0] == 0).all() and (len(set(values)) > 1 << bits or len(set(values)) > 2 or torch.allclose(got, w))


@pytest.mark.parametrize("granularity", ["row", "column", "8x8"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_lone_unit_that_is_pruned_enough_stays(granularity, scope):
    "One unit in a layer, half of which is gone already: the share is reached."
    for shape in ((8, 1), (1, 8)):
        once = prune_model(nn.Sequential(nn.Linear(*shape)), 0.5)
        twice = prune_model(once, 0.5, "magnitude", granularity, scope)
        if granularity == "8x8" or granularity == ("row" if shape == (8, 1) else "column"):
            assert torch.equal(masks(twice)["0.weight"], masks(once)["0.weight"])
        assert int((~masks(twice)["0.weight"]).sum()) == 4


def test_hooks_of_one_layer_are_carried_when_its_codes_become_sparse():
    torch.manual_seed(0)
    layer, x = (
        quantize_model(nn.Sequential(prune.remove_masks(prune_model(nn.Linear(64, 32), 0.9))), 4)[0],
        torch.randn(3, 64),
    )
    layer.register_forward_hook(lambda m, args, y: 2 * y)
    assert torch.equal(sparsify_layer(layer)(x), layer(x))


def test_floats_that_are_left_in_a_sparse_layer_are_not_passed_over():
    "Quantizing after `sparsify_model` would leave them float without a word, in a larger file than without pruning."
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    sparse = sparsify_model(prune_model(model, 0.9))
    with pytest.raises(ValueError, match=r"^0.weight is sparse, .*bits="):
        quantize_model(sparse, 4)
    assert quantize_model(sparsify_model(prune_model(model, 0.9, skip=["2"])), 4, overrides={"0": None})
    small = sparsify_model(prune_model(model, 0.9), bits=4)
    assert floats_left(small).keys() == {"0.bias", "2.bias"}
