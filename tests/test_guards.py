"The guards notice what they are there for."

import copy

import pytest
import torch
from torch import nn

from guards import codes_alone, unchanged


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())


def note(m):
    m.seen = 1


def mark(x):
    x._marks = 1


CHANGES = {
    "a parameter": lambda m, x: m[0].weight.data.add_(1),
    "a buffer": lambda m, x: m(x),
    "a mode": lambda m, x: m[1].eval(),
    "an attribute": lambda m, x: note(m[2]),
    "a hook": lambda m, x: m[0].register_forward_hook(print),
    "another layer": lambda m, x: m.__setitem__(2, nn.ReLU()),
    "frozen": lambda m, x: m[0].weight.requires_grad_(False),
    "a gradient": lambda m, x: m(x).sum().backward(),
    "the example": lambda m, x: x.add_(1),
    "a mark": lambda m, x: mark(x),
    "random numbers": lambda m, x: torch.rand(1),
    "the fast path": lambda m, x: torch.backends.mha.set_fastpath_enabled(False),
    "gradients": lambda m, x: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what):
    m, x = model(), torch.randn(5, 3)
    with torch.random.fork_rng():
        try:
            with pytest.raises(AssertionError):
                with unchanged(m, [x]):
                    CHANGES[what](m, x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
            torch.set_grad_enabled(True)


def test_nothing_is_noticed_where_nothing_changed():
    m, x = model().eval(), torch.randn(5, 3)
    with unchanged(m, {"x": x}), torch.no_grad():
        m(x), copy.deepcopy(m).train()(x)


def test_codes_alone_tells_a_copy_from_a_reference():
    m, x = model().eval(), torch.randn(5, 3)
    codes_alone(m, copy.deepcopy(m), x)
    shared = nn.Sequential(m[0])
    before = m[0].weight.clone()
    with pytest.raises(AssertionError, match="moved by"):
        codes_alone(m, shared, x)
    assert torch.equal(m[0].weight, before)
