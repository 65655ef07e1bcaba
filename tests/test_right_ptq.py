"""Right, or refused, without training: equalization, calibration, GPTQ, AWQ, SmoothQuant and HQQ on models and numbers that nobody expects."""
import copy, math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune as torch_prune

from guards import codes_alone, examples, unchanged
from inputs import related
from modelzip.data import LeNet5
from modelzip.prune import prune_model
from modelzip.ptq import (LayerStatistics, awq, awq_columns, calibrate, correct_bias, equalize, equalizing_scales, find_pairs, fitted_scales, gptq, gptq_weight, half_quadratic, hqq,
                          nearest_weight, output_error, smooth, smooth_columns, _columns, _rounded, _scale_of)
from modelzip.quant import OBSERVERS, Dequantize, dequantize_model, quantize, quantize_model


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


# ---- equalization: proved, or left alone ----

def uneven(model):
    "Channels of very different size, so that equalization has something to move."
    with torch.no_grad():
        for p in model.parameters(): p.mul_(torch.logspace(-1, 1, len(p))[torch.randperm(len(p))].view(-1, *[1] * (p.dim() - 1))) if p.dim() else None
    return model

def same(a, b, x): return torch.allclose(a.eval()(x), b.eval()(x), atol=1e-4 * b(x).abs().max().item(), rtol=1e-4)


BETWEEN = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "prelu": nn.PReLU, "drop": nn.Dropout, "identity": nn.Identity, "gelu": nn.GELU, "tanh": nn.Tanh, "relu6": nn.ReLU6, "max1": lambda: nn.MaxPool1d(2),
           "avg1": lambda: nn.AvgPool1d(2), "max2": lambda: nn.MaxPool2d(2), "avg2": lambda: nn.AvgPool2d(2, 1, 1), "all2": lambda: nn.AdaptiveAvgPool2d(2), "flat": nn.Flatten, "flat2": lambda: nn.Flatten(2),
           "flat12": lambda: nn.Flatten(1, 2), "channel": lambda: nn.PReLU(8), "norm": lambda: nn.LayerNorm(8), "pool": lambda: nn.MaxPool1d(2, return_indices=True)}
LAYERS = {"linear": lambda n: nn.Linear(8, n), "conv1": lambda n: nn.Conv1d(8, n, 3, padding=1), "conv2": lambda n: nn.Conv2d(8, n, 3, padding=1), "grouped": lambda n: nn.Conv2d(8, n, 3, padding=1, groups=4),
          "linear4": lambda n: nn.Linear(4, n), "linear64": lambda n: nn.Linear(64, n), "linear32": lambda n: nn.Linear(32, n)}

@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.one_of(st.sampled_from(list(LAYERS)), st.sampled_from(list(BETWEEN))), min_size=3, max_size=7), st.sampled_from([(3, 8), (3, 8, 8), (3, 8, 4), (3, 8, 8, 8), (3, 8, 4, 4), (2, 3, 8)]), st.integers(0, 99))
def test_equalize_never_changes_the_function(names, shape, seed):
    "Any chain that runs at all: the same outputs, or no pair."
    torch.manual_seed(seed)
    model, x = uneven(nn.Sequential(*[(LAYERS | BETWEEN)[n](*([8] if n in LAYERS else [])) for n in names])).eval(), torch.randn(shape)
    try: y = model(x)
    except (RuntimeError, TypeError, ValueError, IndexError): return
    if not torch.is_tensor(y): return
    try: even = equalize(model)
    except ValueError as e:
        assert "no pair" in str(e)
        return
    assert same(even, model, x), (names, find_pairs(model))


class Net(nn.Module):
    "Two layers of four, and whatever a test does with them."
    def __init__(self, forward, layers=None):
        super().__init__()
        self.net, self.how = layers or nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), forward
    def forward(self, x, taps=None): return self.how(self, x, taps)

class Twice(nn.Linear):
    def forward(self, x): return super().forward(x) + 1

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
    for n in names: model.get_submodule(n).register_forward_hook(lambda m, i, o: o.clamp(max=.1))
    return model

def kept(model):
    model.weights = [model[0].weight]
    return model

def taps(self, x, _):
    found = []
    for m in self.net: found.append(x := m(x))
    return torch.cat(found, 1)

two = lambda *more: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), *more)
ALONE = {
    "piecewise": lambda: Net(taps), "weight read elsewhere": lambda: Net(lambda s, x, _: F.linear(s.net(x), s.net[0].weight.T)), "called twice": lambda: Net(lambda s, x, _: s.net(s.net(x))),
    "first called twice": lambda: Net(lambda s, x, _: s.net(x) + s.net[0](x)), "second called twice": lambda: Net(lambda s, x, _: s.net(x) + s.net[2](x)),
    "parameters": lambda: Net(lambda s, x, _: s.net(x) * sum(p.abs().max() for p in s.parameters())), "item": lambda: Net(lambda s, x, _: s.net(x) * max(p.abs().max().item() for p in s.parameters())),
    "state_dict": lambda: Net(lambda s, x, _: s.net(x) * s.state_dict()["net.0.weight"].norm()), "branch": lambda: Net(lambda s, x, _: s.net(x) if x.sum() > 0 else s.net[0](x)),
    "taps asked for": lambda: Net(lambda s, x, t: s.net(x) if t is None else s.net[1](s.net[0](x))), "in training": lambda: Net(lambda s, x, _: s.net[1](s.net[0](x)) if s.training else s.net(x)),
    "isinstance": lambda: Net(lambda s, x, _: s.net[1](s.net[0](x)) if isinstance(x, torch.Tensor) else s.net(x)), "subclass": lambda: nn.Sequential(Twice(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    "second subclass": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Twice(4, 4)), "tied": lambda: tied(two()), "one bias": lambda: biased_alike(two()), "one memory": lambda: viewed(two()),
    "kept in a list": lambda: kept(two()), "hook": lambda: hooked(two(), "0"), "hook between": lambda: hooked(two(), "1"), "hook of second": lambda: hooked(two(), "2"),
    "hook around": lambda: hooked(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)), "0"), "in place": lambda: Net(lambda s, x, _: (lambda h: (s.net[2](s.net[1](h)), h)[1])(s.net[0](x))),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4)), "weight norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), parametrizations.weight_norm(nn.Linear(4, 4))),
    "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4)), "prune": lambda: nn.Sequential(torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", .5), nn.ReLU(), nn.Linear(4, 4)),
    "GELU": lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), "scaled": lambda: Net(lambda s, x, _: s.net[2](F.relu(s.net[0](x)) * x)), "residual": lambda: Net(lambda s, x, _: s.net[2]((h := F.relu(s.net[0](x)))) + h),
    "two names": lambda: nn.Sequential(*(lambda l: (l, nn.ReLU(), l))(nn.Linear(4, 4)))}

@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_proved_is_left_alone(name):
    model, x = uneven(ALONE[name]()).eval(), torch.randn(9, 4)
    y = model(x).detach()
    with unchanged(model), pytest.raises(ValueError, match="no pair|closure|cannot be copied|computation with gradients"): equalize(model)
    with pytest.raises(ValueError): equalize(model, [("net.0", "net.2") if isinstance(model, Net) else ("0", "2") if len(model) > 2 else ("0.0", "1")])
    assert torch.equal(model(x), y)


FINE = {
    "sequential": two, "called as a whole": lambda: Net(lambda s, x, _: s.net(x) + x), "functions": lambda: Net(lambda s, x, _: s.net[2](F.relu(s.net[0](x)))), "shape": lambda: Net(lambda s, x, _: s.net[2](F.relu(s.net[0](x)).view(x.shape[0], -1))),
    "hook at the end": lambda: hooked(nn.Sequential(two(), nn.Linear(4, 4)), ""), "masked": lambda: prune_model(two(), .5), "masked twice": lambda: prune_model(prune_model(two(), .3), .3, "random"),
    "frozen": lambda: two().requires_grad_(False), "no bias": lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4)), "double": lambda: two().double(), "shared bias of seconds": lambda: two()}

@pytest.mark.parametrize("name", [n for n in FINE if n != "shape"])
def test_what_is_proved_is_equalized_and_the_same(name):
    model, x = uneven(FINE[name]()), torch.randn(9, 4)
    if name == "double": x = x.double()
    with unchanged(model, x): even = equalize(model, example=x)
    assert same(even, model, x) and any(not torch.equal(a, b) for a, b in zip(even.parameters(), model.parameters()))
    assert [p.requires_grad for p in even.parameters()] == [p.requires_grad for p in model.parameters()]
    codes_alone(model, even, x)


def test_lenet_is_equalized_through_its_functions():
    model, x = uneven(LeNet5()).eval(), torch.randn(5, 1, 28, 28)
    assert find_pairs(model) == [("conv1", "conv2"), ("conv2", "fc1"), ("fc1", "fc2")] and same(equalize(model, example=x), model, x)


@pytest.mark.parametrize("dtype, small, large", [(torch.float16, 1e-4, 1e-4), (torch.float16, 6e-8, 6e4), (torch.float16, 6e4, 6e-8), (torch.float32, 1e-25, 1e-25), (torch.float32, 1e-38, 1e38), (torch.bfloat16, 1e-38, 3e38), (torch.float64, 1e-300, 1e300)])
def test_equalizing_scales_are_positive(dtype, small, large):
    s = equalizing_scales(torch.full((3, 2), small, dtype=dtype), torch.full((2, 3), large, dtype=dtype))
    assert (s > 0).all() and s.isfinite().all()
    if small == large: assert torch.allclose(s, torch.ones_like(s), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equalize_half_precision(dtype):
    model, x = uneven(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))).to(dtype), torch.randn(20, 8).to(dtype)
    even = equalize(model, example=x)
    y, z = model.double()(x.double()), even.double()(x.double())
    assert (y - z).norm() < 3 * torch.finfo(dtype).eps * y.norm()
