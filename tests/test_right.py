"""What holds for every function that returns a model: nothing of the caller's is changed, what runs depends on the
codes alone, hooks act, and what cannot be copied or compressed is refused by name."""

import collections, functools, types, warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune as torch_prune

from guards import FUZZ, codes_alone, unchanged
from modelzip.auto import compress
from modelzip.data import Split
from modelzip.distill import SoftTargets, distill
from modelzip.kernels import use_kernels
from modelzip.ptq import awq, calibrate, correct_bias, equalize, gptq, hqq, smooth
from modelzip.prune import fill_zeros, prune_gradually, prune_model, sparsify_model, use_sparse_products
from modelzip.qat import convert, prepare
from modelzip.quant import dequantize_model, quantize_model
from modelzip.recipe import Recipe, learn
from modelzip.structured import factorize, fold_batchnorm, shrink
from modelzip.trellis import trellis

torch.set_num_threads(1)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 * 16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = F.max_pool2d(torch.relu(self.second(x)), 2)
        return self.last(x.flatten(1))


class Layered(nn.Module):
    "Linear layers with a LayerNorm, as in a transformer, and an answer in a dict."

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.last = (
            nn.Linear(64, 32),
            nn.LayerNorm(32),
            nn.Linear(32, 32),
            nn.Linear(32, 10),
        )

    def forward(self, x):
        x = self.norm(self.first(x.flatten(1)))
        return {"logits": self.last(torch.relu(self.second(x)) + x)}


def made(cls):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                (
                    m.running_mean.normal_(),
                    m.running_var.uniform_(0.5, 2),
                    nn.init.uniform_(m.weight, 0.5, 2),
                    nn.init.normal_(m.bias),
                )
        return model.eval()


X = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(96) % 10
BATCHES = [X[:48], X[48:]]
DATA = Split(X, Y)

CLOSE = {  # the result stays near the original: name → function of the model
    "quantize_model": lambda m: quantize_model(m, 8),
    "dequantize_model": lambda m: dequantize_model(quantize_model(m, 8)),
    "use_kernels": lambda m: use_kernels(quantize_model(m, 8)),
    "hqq": lambda m: hqq(m, bits=8),
    "gptq": lambda m: gptq(m, BATCHES, bits=8),
    "trellis": lambda m: trellis(m, BATCHES, bits=7),
    "awq": lambda m: awq(m, calibrate(m, BATCHES), bits=8),
    "smooth": lambda m: smooth(m, calibrate(m, BATCHES)),
    "correct_bias": lambda m: correct_bias(quantize_model(m, 8), m, calibrate(m, BATCHES)),
    "equalize": equalize,
    "fold_batchnorm": fold_batchnorm,
    "factorize": lambda m: factorize(m, rank=9, layers=["last"]),
    "prepare": lambda m: prepare(m, 8, batches=BATCHES),
    "convert": lambda m: convert(prepare(m, 8, batches=BATCHES)),
    "prune_model": lambda m: prune_model(m, 0.05),
    "prune_model wanda": lambda m: prune_model(m, 0.05, "wanda", batches=BATCHES),
    "prune_model sparsegpt": lambda m: prune_model(m, 0.05, "sparsegpt", batches=BATCHES),
    "sparsify_model": lambda m: sparsify_model(prune_model(m, 0.05)),
    "use_sparse_products": lambda m: use_sparse_products(sparsify_model(prune_model(m, 0.05))),
    "recipe": lambda m: Recipe([("quantize_model", {"bits": 8}), "use_kernels"])(m),
    "compress": lambda m: compress(m, BATCHES, cosine=0.99)[0],
}
FAR = {  # the result is another model
    "shrink": lambda m: shrink(m, X[:2], 0.25),
    "prune_gradually": lambda m: prune_gradually(m, DATA, sparsity=0.2, epochs=1),
    "learn": lambda m: learn(m, m, DATA, epochs=1),
    "distill": lambda m: distill(made(type(m)), m, DATA, SoftTargets(2.0), epochs=1),
}
ALL = CLOSE | FAR
MODELS = [Convolutional, Layered]
logits = lambda output: output["logits"] if isinstance(output, dict) else output

# where there is nothing to do, the function says so
NOTHING = {("equalize", Layered)}


def result(name, model):
    "What a function makes of a model; None where it says that there is nothing to do."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (name, type(model)) in NOTHING:
            with pytest.raises(ValueError):
                ALL[name](model)
            return None
        return ALL[name](model)


@pytest.mark.parametrize("cls", MODELS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ALL)
def test_the_callers_things_stay_and_codes_alone_run(name, cls):
    model = made(cls)
    for m in model.modules():
        m.train(False)
    model.last.train()  # a mode of its own, which must stay
    with unchanged(model, X, Y, BATCHES):
        small = result(name, model)
    if small is None:
        return
    codes_alone(model, small.eval(), X[:5] * 1.1)
    if name in CLOSE:
        exact, found = logits(answers_of(model.eval(), X[:20] * 1.1)), logits(answers_of(small, X[:20] * 1.1))
        assert (exact - found).norm() < 0.2 * exact.norm(), f"{(exact - found).norm() / exact.norm():.3f} off"


def answers_of(model, x):
    with torch.no_grad():
        return model(x)


def compiled(m):
    m.forward = torch.compile(m.forward, backend="eager")


def compiled_layer(m):
    m.last.forward = torch.compile(m.last.forward, backend="eager")


def rebound(m):
    m.second.forward = types.MethodType(lambda self, x: type(self).forward(self, x), m.second)


def partial(m):
    m.last.forward = functools.partial(type(m.last).forward, m.last)


def closure(m):
    inner = m.last

    class Calls(nn.Module):
        def forward(self, x):
            return self.f(x)

    m.wrapped = Calls()
    m.wrapped.f = lambda x: inner(x)


def hook(m):
    m.second.register_forward_hook(lambda layer, i, o: o + m.last.bias.sum())


@pytest.mark.parametrize("hide", [compiled, compiled_layer, rebound, partial, closure, hook])
@pytest.mark.parametrize("name", [n for n in ALL if n != "distill"])  # whose result is made of the student alone
def test_what_a_copy_would_run_of_the_original_is_refused(name, hide):
    model = made(Convolutional)
    hide(model)
    with pytest.raises(ValueError, match="forward of its own|reaches the model"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ALL[name](model)


HOOKED = [(l, k) for l in ("second", "norm", "last") for k in ("forward", "pre", "kwargs", "always")]


@pytest.mark.hypothesis  # so that a search comes here: each layer and each kind with each function
@pytest.mark.parametrize(
    "name, layer, kind",
    # else each function meets two layers and two kinds, and each kind on each layer three functions or more
    [(n, *h) for f, n in enumerate(CLOSE) for i, h in enumerate(HOOKED) if FUZZ or i % 6 == f % 6],
)
def test_hooks_act_or_are_refused(name, layer, kind):
    model = made(Convolutional)
    m = model.get_submodule(layer)
    if kind == "forward":
        m.register_forward_hook(lambda l, i, o: 2 * o)
    if kind == "pre":
        m.register_forward_pre_hook(lambda l, i: (2 * i[0],))
    if kind == "kwargs":
        m.register_forward_pre_hook(lambda l, i, k: ((2 * i[0],), k), with_kwargs=True)
    if kind == "always":
        m.register_forward_hook(lambda l, i, o: 2 * o, always_call=True)
    with unchanged(model, X):
        try:
            small = result(name, model)
        except ValueError as e:
            assert layer in str(e) or "hook" in str(e), e
            return
    exact, found = answers_of(model, X[:20] * 1.1), answers_of(small.eval(), X[:20] * 1.1)
    assert (exact - found).norm() < 0.2 * exact.norm(), f"{(exact - found).norm() / exact.norm():.3f} off"


def buffer(l):
    w = l.weight.detach()
    del l.weight
    l.register_buffer("weight", w)


def attribute(l):
    w = l.weight.detach()
    del l.weight
    l.weight = w


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "torch's prune": lambda l: torch_prune.l1_unstructured(l, "weight", 0.1),
    "a buffer": buffer,
    "an attribute": attribute,
}


STILL = [n for n in ALL if n not in ("learn", "distill", "prune_gradually")]  # the others train


@pytest.mark.hypothesis  # so that a search comes here: every function with every way
@pytest.mark.parametrize(
    "name, how",
    [(n, how) for i, n in enumerate(STILL) for j, how in enumerate(COMPUTED) if FUZZ or j % 2 == (i + j // 2) % 2],
)
def test_weights_that_are_computed_are_refused_by_name_or_right(name, how):
    model = made(Convolutional)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        COMPUTED[how](model.last)
        with torch.no_grad():
            model(X[:2])
        with unchanged(model, X):
            try:
                small = ALL[name](model)
            except ValueError as e:
                assert "last" in str(e), e
                return
        codes_alone(model, small.eval(), X[:5])
        if name in CLOSE:
            exact, found = answers_of(model, X[:20] * 1.1), answers_of(small, X[:20] * 1.1)
            assert (exact - found).norm() < 0.2 * exact.norm(), f"{(exact - found).norm() / exact.norm():.3f} off"


class Asks(nn.Module):
    "Its code asks what its layers are."

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if type(layer) in (nn.Linear, nn.ReLU) else 0 * x
        return x


class Penalized(nn.Module):
    "It goes through its parameters, in a method."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def penalty(self):
        return sum(p.square().sum() for p in self.parameters())

    def forward(self, x):
        return self.b(self.a(x).to(next(self.parameters()).dtype)) + self.penalty()


class Borrowed(nn.Module):
    "A layer runs with another's parameters."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.func.functional_call(self.a, dict(self.b.named_parameters()), (torch.relu(self.a(x)),))


def penalty_of(model):
    return _summed(model)


def _summed(model):
    return sum(p.square().sum() for p in model.parameters())


class ByFunction(nn.Module):
    "It goes through its parameters, in a function that a function calls."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(self.a(x)) + penalty_of(self)


def read_shared(x):
    return x @ SHARED.weight.T


class ByGlobalFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = SHARED, nn.Linear(6, 4)

    def forward(self, x):
        return self.b(read_shared(self.a(x)))


def by_hook():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    model.register_forward_hook(lambda m, args, y: y + penalty_of(m))
    return model


class InAList(nn.Module):
    "A weight is also in a plain list."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.weights = [self.a.weight]

    def forward(self, x):
        return self.b(torch.relu(x @ self.weights[0].T))


class AlsoAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.more = nn.ParameterList([self.a.weight])

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) @ self.more[0])


class CountsBuffers(nn.Module):
    "The code goes through buffers, where packed codes appear."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x):
        return self.b(self.a(x + sum(b.float().mean() for b in self.buffers())))


SHARED = nn.Linear(6, 6)


class ByGlobal(nn.Module):
    "The code reads a layer of the model by a global name."

    def __init__(self):
        super().__init__()
        self.a, self.b = SHARED, nn.Linear(6, 4)

    def forward(self, x):
        return self.b(torch.relu(SHARED(x)))


class ByClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        ByClass.last = self.a

    def forward(self, x):
        return self.b(torch.relu(type(self).last(x)))


class Itself(nn.Linear):
    def __deepcopy__(self, memo):
        return self


CODES = {
    Asks: "the model.*asks whether a layer is a Linear",
    Penalized: "the model.*goes through parameters",
    Borrowed: "goes through named_parameters",
    CountsBuffers: "the model.*goes through buffers",
    InAList: r"a\b.*weights\[0\]",
    AlsoAParameter: r"a\b.*more\.0",
    ByGlobal: "reads SHARED",
    ByClass: "reads ByClass.last",
    ByFunction: "the model.*goes through parameters",
    ByGlobalFunction: "reads SHARED",
    by_hook: "a hook on the model goes through parameters",
    lambda: nn.Sequential(Itself(6, 6), nn.ReLU(), nn.Linear(6, 4)): "0.* __deepcopy__",
}
BY = {
    "quantize_model": lambda m: quantize_model(m, 4),
    "hqq": lambda m: hqq(m),
    "gptq": lambda m: gptq(m, [torch.ones(3, 6)]),
    "trellis": lambda m: trellis(m),
    "prune_model": lambda m: prune_model(m, 0.3),
    "sparsify_model": lambda m: sparsify_model(prune_model(m, 0.9)),
    "factorize": lambda m: factorize(m, rank=1),
    "prepare": lambda m: prepare(m),
    "prepare weights": lambda m: prepare(m, activations=None),
}


@pytest.mark.parametrize("cls", CODES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", BY)
def test_code_that_would_see_the_difference_is_refused(name, cls):
    model = cls().eval()
    with unchanged(model):
        if (name, cls) in {("factorize", InAList), ("factorize", AlsoAParameter)}:
            assert BY[name](model).a.weight.shape == (6, 6)  # a weight that others hold stays
        else:
            with pytest.raises(ValueError, match=CODES[cls]):
                BY[name](model)


class Slot:
    __slots__ = ("v",)

    def __init__(self, v):
        self.v = v


class Chest:
    def __init__(self, v):
        self.v = v

    def get(self):
        return self.v


def same(v):
    return v


HOLDERS = {
    "dict": (lambda v: {"v": v}, lambda h: h["v"]),
    "namespace": (lambda v: types.SimpleNamespace(v=v), lambda h: h.v),
    "object": (Chest, lambda h: h.v),
    "slots": (Slot, lambda h: h.v),
    "deque": (lambda v: collections.deque([v]), lambda h: h[0]),
    "set": (lambda v: {v}, lambda h: next(iter(h))),
    "UserDict": (lambda v: collections.UserDict(v=v), lambda h: h["v"]),
    "key": (lambda v: {v: 1}, lambda h: next(iter(h))),
    "deep": (lambda v: [[[[[[Chest(v)]]]]]], lambda h: h[0][0][0][0][0][0].v),
    "partial": (lambda v: functools.partial(same, v), lambda h: h()),
    "keyword": (lambda v: functools.partial(same, v=v), lambda h: h()),
    "method": (lambda v: Chest(v).get, lambda h: h()),
    "closure": (lambda v: lambda: v, lambda h: h()),
}


class Held(nn.Module):
    "A weight, or its memory, is also where only Python finds it."

    def __init__(self, how, what):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 6), nn.Linear(6, 4), how
        self.held = HOLDERS[how][0](what(self.a.weight))

    def forward(self, x):
        return self.b(torch.relu(F.linear(x, HOLDERS[self.how][1](self.held), self.a.bias)))


@pytest.mark.parametrize("what", [lambda w: w, torch.Tensor.detach], ids=["weight", "memory"])
@pytest.mark.parametrize("how", HOLDERS)
def test_a_weight_that_is_held_elsewhere_is_refused(how, what):
    model = Held(how, what).eval()
    for name, run in BY.items():
        if name == "factorize" and not (how == "closure" and what(model.a.weight) is model.a.weight):
            assert type(run(model).a) is nn.Linear
        else:
            with pytest.raises(ValueError, match=r"\ba\b.*held|held.*model itself"):
                run(model)


def test_memory_in_another_shape_and_matching_of_classes_are_refused():
    class Turned(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.a = nn.Linear(6, 6)
            keep(self, self.a.weight.detach().T)

        def forward(self, x):
            return x @ self.w + self.a(x)

    for keep in (
        lambda m, w: m.register_buffer("w", w),
        lambda m, w: setattr(m, "w", w),
        lambda m, w: setattr(m, "w", w[:, :6]),
    ):
        for name, run in BY.items():
            if name != "factorize":
                with pytest.raises(ValueError, match=r"\ba\b.*\bw\b"):
                    run(Turned(keep))

    class Matches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            match self.a:
                case nn.Linear():
                    x = 2 * x
            return self.a(x)

    for name in "quantize_model", "gptq", "factorize", "prepare":
        with pytest.raises(ValueError, match="asks whether a layer is a Linear"):
            BY[name](Matches())


def test_what_a_first_call_has_kept_is_refused():
    class Caches(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.a, self.c, self.make = nn.Linear(6, 5), None, make

        def forward(self, x):
            if self.c is None:
                self.c = self.make(self.a.weight.detach())
            return nn.functional.linear(x, self.c) + self.a(x)

    for make in (
        lambda w: w * 2,
        lambda w: w.clone(),
        lambda w: w / w.norm(dim=1, keepdim=True),
        lambda w: w / w.abs().amax(0),
        lambda w: w.T.contiguous().T.clone() - 0.5,
    ):
        model = Caches(make).eval()
        fresh = {
            name: run(model) for name, run in BY.items() if name in ("quantize_model", "prepare", "prune_model")
        }  # nothing is kept yet
        assert all(m.c is None for m in fresh.values())
        model(torch.randn(2, 6))
        for name in fresh:
            with pytest.raises(ValueError, match=r"\bc is a plain attribute that looks made of.*\ba\b"):
                BY[name](model)
    model.c = torch.randn(5, 6)
    for name in fresh:
        BY[name](model)  # other numbers of the same shape


def test_layers_in_plain_containers_follow():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
            self.norm.running_var.fill_(3.0)
            self.pair, self.by, self.held = (self.a, self.norm), {"b": [self.b]}, types.SimpleNamespace(b=self.b)

        def forward(self, x):
            return self.by["b"][0](torch.relu(self.pair[1](self.pair[0](x)))) + self.held.b(x)

    model, x = Kept().eval(), torch.randn(5, 16)
    thin = factorize(model, rank=2)
    assert thin.by["b"][0] is thin.held.b is thin.b and type(thin.b).__name__ == "ThinLinear" and thin.pair[0] is thin.a
    codes_alone(model, thin, x)
    assert torch.allclose(fold_batchnorm(model, (x,))(x), model(x), atol=1e-5)
    assert torch.allclose(fold_batchnorm(quantize_model(model, 8), (x,))(x), quantize_model(model, 8)(x), atol=1e-5)


def test_what_is_written_into_a_computed_weight_is_not_lost():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    for small, says in (prune_model(model, 0.5), "masked"), (factorize(model, rank=1), "product"):
        for write in (
            lambda w: w.add_(1),
            lambda w: w.data.mul_(2),
            lambda w: w[0].zero_(),
            lambda w: setattr(w, "data", w * 2),
        ):
            with torch.no_grad(), pytest.raises(RuntimeError, match=says):
                write(small[0].weight)
        (
            small[0].weight.sum().backward(),
            small(torch.randn(2, 16)).sum().backward(),
            torch.func.vmap(small)(torch.randn(2, 16)),
        )


class Bounded(nn.Linear):
    "It keeps its rows short, in its own forward; and it merges what it has learned when it is to be evaluated."

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)

    def train(self, mode=True):
        if not mode and self.weight is not None:
            self.weight.data.clamp_(-0.2, 0.2)
        return super().train(mode)


@pytest.mark.parametrize("name", ["calibrate", "gptq", "equalize", "wanda", "shrink"])
def test_models_that_write_into_their_weights_are_left_alone(name):
    model, x = (
        nn.Sequential(Bounded(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
        torch.randn(40, 16),
    )
    hooked = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    hooked[0].register_forward_pre_hook(lambda m, i: (m.weight.data.clamp_(-0.1, 0.1), None)[1])
    run = {
        "calibrate": lambda m: calibrate(m, [x]),
        "gptq": lambda m: gptq(m, [x]),
        "equalize": equalize,
        "wanda": lambda m: prune_model(m, 0.3, "wanda", batches=[x]),
        "shrink": lambda m: shrink(m, x, 0.5),
    }
    for m in model, hooked:
        with unchanged(m, x):
            try:
                run[name](m)
            except (ValueError, RuntimeError):
                pass


def test_a_hook_that_is_a_method_of_the_model_belongs_to_every_copy():
    class Notes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.seen = nn.Linear(16, 16), nn.Linear(16, 4), {}
            self.a.register_forward_hook(self.note)

        def note(self, layer, i, o):
            self.seen["a"] = o

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.relu(self.seen["a"]))

    model, x = Notes().eval(), torch.randn(5, 16)
    pruned = prune_model(model, 0.8)
    with torch.no_grad():
        right = pruned(x)
        for small in (
            sparsify_model(pruned),
            use_sparse_products(sparsify_model(pruned)),
            fill_zeros(sparsify_model(pruned)),
            fill_zeros(sparsify_model(pruned, bits=8)),
        ):
            assert torch.allclose(small(x), right, atol=0.02 * right.abs().max()) and not torch.equal(
                small(2 * x), right
            )
            codes_alone(pruned, small, x)
        assert torch.equal(factorize(model, rank=16)(x), model(x))


def test_scripted_parts_are_refused_by_name():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    for f in (
        lambda: quantize_model(model),
        lambda: hqq(model),
        lambda: prune_model(model, 0.5),
        lambda: factorize(model, rank=1),
        lambda: fold_batchnorm(model),
        lambda: equalize(model),
    ):
        with pytest.raises(ValueError, match=r"layer 0 is a (torch\.jit\.)?ScriptModule"):
            f()
