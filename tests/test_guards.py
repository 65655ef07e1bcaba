"The guards notice what they are there for."

import contextlib, copy, os, subprocess, sys

import matplotlib.pyplot as plt
import pytest
import torch
from fastcore.test import test_eq as check_equal
from IPython.core import pylabtools
from torch import nn

from conftest import once
from guards import codes_alone, unchanged
from modelzip import measure
from modelzip.data import LeNet300, Split, train
from modelzip.explore import explore


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


def test_what_was_trained_once_comes_back_to_the_bit_and_nothing_else_does(tmp_path):
    "What `tools/book.py test` does for notebooks that train the same network in the same way."
    images = Split(torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10)
    calls = []

    def counted(model, data, epochs=6, lr=3e-3, batch_size=64, seed=0, progress=True, loss=None, optimizer=None,
                after_epoch=None):  # fmt: skip
        calls.append(epochs)
        return train(model, data, epochs, lr, batch_size, seed, progress, after_epoch=after_epoch)

    kept = once.training_kept(counted, tmp_path)
    how = dict(epochs=2, batch_size=20, progress=False)
    first = kept(LeNet300(), images, **how)
    before = torch.get_rng_state()
    again, model = kept(LeNet300(), images, **how), LeNet300()
    assert calls == [2] and torch.equal(before, torch.get_rng_state()) and not again.training
    for a, b, c in zip(first.parameters(), again.parameters(), train(model, images, **how).parameters()):
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(a.grad, b.grad) and b.requires_grad
    hooked, frozen = LeNet300(), LeNet300()
    next(hooked.children()).register_forward_hook(lambda *_: None)
    next(frozen.parameters()).requires_grad_(False)
    others = [
        (LeNet300(), images, how | {"epochs": 1}),
        (LeNet300(), images, how | {"seed": 1}),
        (LeNet300(seed=1), images, how),
        (LeNet300(), Split(images.x, images.y.flip(0)), how),
        (LeNet300(), images, how | {"after_epoch": lambda *_: None}),
        (hooked, images, how),
        (frozen, images, how),
        (again, images, how),
    ]
    for i, (model, data, options) in enumerate(others):
        kept(model, data, **options)
        assert len(calls) == i + 2


def test_formulas_of_figures_that_nobody_draws_are_read():
    "What `tools/book.py test` does with figures: IPython shows an error in one, and goes on."
    fig, ax = plt.subplots()
    ax.set(title="$x^2$ and $5", xlabel=r"a step $\alpha$", ylabel="$x^$")
    ax.plot([1], label=r"$\nothing$")
    ax.legend()
    with once.figures_undrawn() as wrong:
        assert pylabtools.retina_figure(fig, base64=True) is None and pylabtools.print_figure(fig, "svg") is None
    with once.figures_undrawn(pages=True) as of_pages:
        plt.draw()  # as pyplot does after a cell
        assert explore(lambda size: fig, size=[1, 2]).sample().count("<img") == 1
    plt.close(fig)
    assert fig.stale and len(wrong) == 4
    for said in wrong, of_pages:
        assert {text.partition(":")[0] for text in said} == {"$x^$", r"$\nothing$"}


def test_a_comparison_that_nobody_keeps_has_six_rounds(monkeypatch):
    monkeypatch.setattr(measure, "compare", lambda models, data, repeats=20: repeats)
    with once.few_rounds():
        assert [measure.compare(0, 1), measure.compare(0, 1, repeats=2), measure.compare(0, 1, 9)] == [6, 2, 6]
    assert measure.compare(0, 1) == 20


def test_what_is_compared_whole_is_compared_as_before():
    same = [(b"ab", b"ab"), ([1, "a", True], [1, "a", 1]), ([[1], b"a"], [[1], b"a"]), (bytearray(2), bytearray(2))]
    other = [(b"ab", b"ac"), (b"a", b"ab"), ([1, 2], [1]), ([1, 2], [1, 3]), ([float("nan")] * 2, [float("nan")] * 2)]
    for whole in contextlib.nullcontext, once.compared_whole:
        with whole():
            for a, b in same:
                check_equal(a, b)
            for a, b in other:
                with pytest.raises(AssertionError):
                    check_equal(a, b)


def test_windows_are_pooled_as_before():
    def asked(x):
        out = torch.nn.functional.max_pool2d(x, 2)
        return out, torch.autograd.grad(out, x, torch.arange(out.numel()).view_as(out).float())[0]

    torch.manual_seed(0)
    ties = torch.randn(16, 3, 64, 48).mul(2).round_()
    images = [ties, ties[:1], ties[..., 1:], ties.double(), ties.to(memory_format=torch.channels_last), ties[0]]
    before = torch.nn.functional.max_pool2d
    for x in (x.requires_grad_() for x in images):
        want = asked(x)
        with once.pooled_by_rows():
            assert before is not torch.nn.functional.max_pool2d
            found = asked(x)
        assert all(map(torch.equal, want, found)) and all(a.stride() == b.stride() for a, b in zip(want, found))

    class Net(nn.Module):
        def forward(self, x):
            return torch.nn.functional.max_pool2d(x, 2)

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            names.append(f.__name__)
            return f(*args, **(kwargs or {}))

    net, x, names = Net(), torch.randn(64, 1, 32, 32), []
    with once.pooled_by_rows():
        assert torch.equal(torch.vmap(net)(x[:, None])[:, 0], net(x))
        with Watch():
            net(x)
        assert names == ["max_pool2d"] and "max_pool2d" in str(torch.fx.symbolic_trace(net).graph)
        assert "max_pool2d" in str(torch.jit.trace(net, x).graph) and "max_pool2d" in str(
            torch.export.export(net, (x,))
        )
    assert torch.nn.functional.max_pool2d is before


def test_a_sitecustomize_of_ones_own_runs_in_what_tests_start(tmp_path):
    "Ours, which Python finds first, hides it. Nothing but the standard library is needed to say so."
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['MINE'] = __name__")
    ending = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    code = (
        "import atexit, os, sys; print(os.environ['MINE'], sys.modules['sitecustomize'].__file__, atexit._ncallbacks())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([ending, str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sitecustomize", os.path.join(ending, "sitecustomize.py"), "1"], done
