"""Options of which one would be ignored are refused, by every function that takes them"""

import itertools

import pytest
import torch
from torch import nn

from modelzip.distill import Relations
from modelzip.prune import prune_model, sparsify_layer, sparsify_model
from modelzip.ptq import awq, calibrate, gptq, gptq_weight, hqq, hqq_weight, quantize_with, smooth
from modelzip.qat import prepare
from modelzip.quant import quantize, quantize_layer, quantize_model
from modelzip.threads import Pool

TABLE = torch.tensor([-1.0, 0.0, 1.0])
CONTRARY = [
    dict(bits=4, levels=3),
    dict(bits=8, levels=16),
    dict(bits=8, codebook="nf4"),
    dict(bits=4, codebook=TABLE),
    dict(bits=2, codebook="kmeans", levels=8),
    dict(bits=4, step=0.1),
    dict(levels=3, step=0.1),
    dict(levels=3, codebook="nf4"),
    dict(step=0.1, codebook="nf4"),
    dict(codebook="nf4", symmetric=False),
    dict(step=0.1, symmetric=False),
    dict(codebook="nf4", observer="mse"),
    dict(step=0.1, observer="mse"),
]
AGREED = [
    dict(bits=2, levels=3),
    dict(bits=4, codebook="nf4"),
    dict(bits=2, codebook=TABLE),
    dict(bits=2, codebook="kmeans", levels=4),
    dict(levels=3),
    dict(codebook="nf4"),
    dict(step=0.1),
    dict(),
]
words = lambda how: " ".join(f"{k}={v}" if not torch.is_tensor(v) else k for k, v in how.items())


@pytest.mark.parametrize("how", CONTRARY, ids=words)
def test_contrary_options_are_refused(how):
    layer = nn.Linear(8, 4)
    model = nn.Sequential(layer)
    for act in (
        lambda: quantize(layer.weight, **how),
        lambda: quantize_layer(layer, **how),
        lambda: quantize_model(model, **how),
        lambda: quantize_model(model, overrides={"0": how}),
    ):
        with pytest.raises(ValueError, match="give one of them|it leaves nothing|leaves nothing for|levels is|makes"):
            act()
    if "bits" in how and "step" not in how:
        with pytest.raises(ValueError):
            sparsify_model(prune_model(model, 0.5, "magnitude"), **how)


@pytest.mark.parametrize("how", AGREED, ids=words)
def test_options_that_agree_are_taken(how):
    layer = nn.Linear(8, 4)
    want = quantize_layer(
        layer,
        **{
            k: v
            for k, v in how.items()
            if k != "bits" or len(how) == 1 or v == how.get("bits") and how.get("codebook") == "kmeans"
        },
    ).q
    assert quantize_layer(layer, **how).q == want and quantize_model(nn.Sequential(layer), **how)[0].q == want


def contents(model):
    "What a model computes with, to the last bit."
    return str(model), [(n, t.tolist()) for n, t in model.state_dict().items() if torch.is_tensor(t)]


ROUNDING = dict(bits=3, group=4, symmetric=False, overrides={"0": {"bits": 2}})
OF_GPTQ = dict(act_order=True, damping=0.3, catch_up=False)
OF_PRUNING = dict(criterion=["wanda", "sparsegpt", "random"], granularity=["row", "2:4"], scope=["model", "output"])
SAME = {  # the one is what the other says by itself, or what takes its place
    ("prune_model", "output", "wanda"),
    ("prune_model", "output", "2:4"),  # half of each group is half of each row
    ("quantize_model", 3, 5),  # five levels are codes of 3 bits
}


@pytest.mark.parametrize(
    "act, options",
    [
        (lambda m, b, **how: quantize_model(m, **how), ROUNDING | dict(levels=5, observer="mse", codebook="nf4")),
        (lambda m, b, **how: gptq(m, b, **how), ROUNDING | OF_GPTQ),
        (lambda m, b, **how: hqq(m, **how), ROUNDING),
        (lambda m, b, **how: awq(m, calibrate(m, b), **how), dict(bits=3, group=4, symmetric=False)),
        (lambda m, b, **how: smooth(m, calibrate(m, b), **how), ROUNDING | dict(alpha=0.3)),
        (lambda m, b, **how: prune_model(m, 0.5, batches=b, **how), OF_PRUNING),
    ],
    ids=["quantize_model", "gptq", "hqq", "awq", "smooth", "prune_model"],
)
@pytest.mark.filterwarnings("ignore")
def test_of_every_pair_both_act_or_one_is_refused(act, options, request):
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), [torch.randn(8, 8)] * 2

    def made(**how):
        try:
            return contents(act(model, batches, **how))
        except (ValueError, TypeError):
            return None

    options = {n: v if isinstance(v, list) else [v] for n, v in options.items()}
    plain, alone = made(), {(n, str(v)): made(**{n: v}) for n, vs in options.items() for v in vs}
    same, name = {tuple(map(str, s)) for s in SAME}, request.node.callspec.id
    for (a, xs), (b, ys) in itertools.combinations(options.items(), 2):
        for x, y in itertools.product(xs, ys):
            both, one, other = made(**{a: x, b: y}), alone[a, str(x)], alone[b, str(y)]
            if both is None or one is None or other is None:
                continue
            assert one == plain or both != other or (name, str(x), str(y)) in same, (a, x, b, y)
            assert other == plain or both != one or (name, str(y), str(x)) in same, (a, x, b, y)


def test_settings_of_a_pool_that_would_not_act_are_refused():
    with pytest.raises(ValueError, match="max_wait does not act with max_batch=1"):
        Pool(nn.Linear(2, 2), workers=1, max_batch=1, max_wait=0.1)
    with Pool(nn.Linear(2, 2), workers=1, max_batch=1, max_wait=0) as pool:
        with pytest.raises(ValueError, match="timeout does not act with wait=False"):
            pool.close(wait=False, timeout=1)


def test_a_group_and_a_tensor_as_one_are_refused():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    for act in (
        lambda: quantize_layer(model[0], group=4, per_channel=False),
        lambda: quantize_model(model, group=4, per_channel=False),
        lambda: prepare(model, group=4, per_channel=False, activations=None),
        lambda: quantize(model[0].weight, axis=0, group=4),
    ):
        with pytest.raises(ValueError, match="give one of them"):
            act()
    assert quantize_model(model, per_channel=False, overrides={"1": {"group": 4}})[1].q.group == 4
    assert (
        prepare(model, per_channel=False, activations=None, overrides={"1": {"group": 4}})[1]
        .parametrizations.weight[0]
        .group
        == 4
    )


def test_prepare_tells_a_wish_from_the_default():
    layer = nn.Sequential(nn.Linear(8, 4))
    for how in (dict(bits=4, levels=3), dict(bits=8, levels=5)):
        with pytest.raises(ValueError, match="give one of them"):
            prepare(layer, **how)
        with pytest.raises(ValueError, match="give one of them"):
            prepare(layer, overrides={"0": how})
    levels = lambda **how: prepare(layer, **how)[0].weights.levels
    assert [
        levels(),
        levels(bits=4),
        levels(levels=3),
        levels(bits=2, levels=3),
        levels(bits=8, overrides={"0": {"levels": 3}}),
        levels(levels=3, overrides={"0": {"bits": 8}}),
    ] == [16, 16, 3, 3, 3, 256]


def test_how_to_quantize_without_bits_is_refused():
    model = prune_model(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)), 0.9, "magnitude")
    for act in (
        lambda: sparsify_model(model, group=4),
        lambda: sparsify_model(model, codebook="kmeans"),
        lambda: sparsify_layer(model[0], levels=3),
    ):
        with pytest.raises(ValueError, match="bits is None"):
            act()
    found = sparsify_model(model, 4, group=4, overrides={"1": {"bits": None}})
    assert found[0].q.quantized and not found[1].q.quantized


def test_a_warning_says_what_was_done():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.up = nn.Linear(8, 8), nn.ConvTranspose1d(2, 2, 3)

        def forward(self, x):
            return self.up(self.a(x).view(-1, 2, 4))

    batches = [torch.randn(4, 8)]
    for method, says in (
        (gptq_weight, "^rounded to nearest: up"),
        (hqq_weight, "^given to hqq_weight without statistics: up"),
    ):
        with pytest.warns(UserWarning, match=says):
            quantize_with(method, Odd(), batches, bits=4, group=None)
    assert (
        repr(Relations(angles=0.0)) == "Relations(None, None, angles=0)"
        and repr(Relations("a", "b")) == "Relations('a', 'b')"
    )
