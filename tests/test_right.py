"""What holds for every function that returns a model: nothing of the caller's is changed, what runs depends on the codes alone,
hooks act, and what cannot be copied or compressed is refused by name."""
import functools, types, warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune as torch_prune

from guards import answers, codes_alone, unchanged
from modelzip.auto import compress
from modelzip.data import Split
from modelzip.distill import SoftTargets, distill
from modelzip.kernels import use_kernels
from modelzip.ptq import awq, calibrate, correct_bias, equalize, gptq, hqq, smooth
from modelzip.prune import prune_gradually, prune_model, sparsify_model, use_sparse_products
from modelzip.qat import convert, prepare
from modelzip.quant import dequantize_model, quantize_model
from modelzip.recipe import Recipe, learn
from modelzip.structured import factorize, fold_batchnorm, shrink

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
        self.first, self.norm, self.second, self.last = nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 10)
    def forward(self, x):
        x = self.norm(self.first(x.flatten(1)))
        return {"logits": self.last(torch.relu(self.second(x)) + x)}


def made(cls):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(), m.running_var.uniform_(.5, 2), nn.init.uniform_(m.weight, .5, 2), nn.init.normal_(m.bias)
        return model.eval()


X = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(96) % 10
BATCHES = [X[:48], X[48:]]
DATA = Split(X, Y)

CLOSE = {       # the result stays near the original: name → function of the model
    "quantize_model": lambda m: quantize_model(m, 8),
    "dequantize_model": lambda m: dequantize_model(quantize_model(m, 8)),
    "use_kernels": lambda m: use_kernels(quantize_model(m, 8)),
    "hqq": lambda m: hqq(m, bits=8),
    "gptq": lambda m: gptq(m, BATCHES, bits=8),
    "awq": lambda m: awq(m, calibrate(m, BATCHES), bits=8),
    "smooth": lambda m: smooth(m, calibrate(m, BATCHES)),
    "correct_bias": lambda m: correct_bias(quantize_model(m, 8), m, calibrate(m, BATCHES)),
    "equalize": equalize,
    "fold_batchnorm": fold_batchnorm,
    "factorize": lambda m: factorize(m, rank=9, layers=["last"]),
    "prepare": lambda m: prepare(m, 8, batches=BATCHES),
    "convert": lambda m: convert(prepare(m, 8, batches=BATCHES)),
    "prune_model": lambda m: prune_model(m, .05),
    "prune_model wanda": lambda m: prune_model(m, .05, "wanda", batches=BATCHES),
    "prune_model sparsegpt": lambda m: prune_model(m, .05, "sparsegpt", batches=BATCHES),
    "sparsify_model": lambda m: sparsify_model(prune_model(m, .05)),
    "use_sparse_products": lambda m: use_sparse_products(sparsify_model(prune_model(m, .05))),
    "recipe": lambda m: Recipe([("quantize_model", {"bits": 8}), "use_kernels"])(m),
    "compress": lambda m: compress(m, BATCHES, cosine=.99)[0],
}
FAR = {         # the result is another model
    "shrink": lambda m: shrink(m, X[:2], .25),
    "prune_gradually": lambda m: prune_gradually(m, DATA, sparsity=.2, epochs=1),
    "learn": lambda m: learn(m, m, DATA, epochs=1),
    "distill": lambda m: distill(made(type(m)), m, DATA, SoftTargets(2.), epochs=1),
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
            with pytest.raises(ValueError): ALL[name](model)
            return None
        return ALL[name](model)


@pytest.mark.parametrize("cls", MODELS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ALL)
def test_the_callers_things_stay_and_codes_alone_run(name, cls):
    model = made(cls)
    for m in model.modules(): m.train(False)
    model.last.train()                        # a mode of its own, which must stay
    with unchanged(model, X, Y, BATCHES): small = result(name, model)
    if small is None: return
    codes_alone(model, small.eval(), X[:5] * 1.1)
    if name in CLOSE:
        exact, found = logits(answers_of(model.eval(), X[:20] * 1.1)), logits(answers_of(small, X[:20] * 1.1))
        assert (exact - found).norm() < .2 * exact.norm(), f"{(exact - found).norm() / exact.norm():.3f} off"


def answers_of(model, x):
    with torch.no_grad(): return model(x)


def compiled(m): m.forward = torch.compile(m.forward, backend="eager")
def compiled_layer(m): m.last.forward = torch.compile(m.last.forward, backend="eager")
def rebound(m): m.second.forward = types.MethodType(lambda self, x: type(self).forward(self, x), m.second)
def partial(m): m.last.forward = functools.partial(type(m.last).forward, m.last)
def closure(m):
    inner = m.last
    class Calls(nn.Module):
        def forward(self, x): return self.f(x)
    m.wrapped = Calls()
    m.wrapped.f = lambda x: inner(x)
def hook(m): m.second.register_forward_hook(lambda layer, i, o: o + m.last.bias.sum())

@pytest.mark.parametrize("hide", [compiled, compiled_layer, rebound, partial, closure, hook])
@pytest.mark.parametrize("name", [n for n in ALL if n != "distill"])      # whose result is made of the student alone
def test_what_a_copy_would_run_of_the_original_is_refused(name, hide):
    model = made(Convolutional)
    hide(model)
    with pytest.raises(ValueError, match="forward of its own|reaches the model"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ALL[name](model)


@pytest.mark.parametrize("kind", ["forward", "pre", "kwargs", "always"])
@pytest.mark.parametrize("layer", ["second", "norm", "last"])
@pytest.mark.parametrize("name", CLOSE)
def test_hooks_act_or_are_refused(name, layer, kind):
    model, calls = made(Convolutional), []
    m = model.get_submodule(layer)
    if kind == "forward": m.register_forward_hook(lambda l, i, o: 2 * o)
    if kind == "pre": m.register_forward_pre_hook(lambda l, i: (2 * i[0],))
    if kind == "kwargs": m.register_forward_pre_hook(lambda l, i, k: ((2 * i[0],), k), with_kwargs=True)
    if kind == "always": m.register_forward_hook(lambda l, i, o: 2 * o, always_call=True)
    with unchanged(model, X):
        try: small = result(name, model)
        except ValueError as e:
            assert layer in str(e) or "hook" in str(e), e
            return
    exact, found = answers_of(model, X[:20] * 1.1), answers_of(small.eval(), X[:20] * 1.1)
    assert (exact - found).norm() < .2 * exact.norm(), f"{(exact - found).norm() / exact.norm():.3f} off"


def buffer(l):
    w = l.weight.detach()
    del l.weight
    l.register_buffer("weight", w)

def attribute(l):
    w = l.weight.detach()
    del l.weight
    l.weight = w

COMPUTED = {"weight_norm": parametrizations.weight_norm, "old weight_norm": nn.utils.weight_norm, "spectral_norm": parametrizations.spectral_norm, "old spectral_norm": nn.utils.spectral_norm,
            "orthogonal": parametrizations.orthogonal, "torch's prune": lambda l: torch_prune.l1_unstructured(l, "weight", .1), "a buffer": buffer, "an attribute": attribute}

@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("name", [n for n in ALL if n not in ("learn", "distill", "prune_gradually")])
def test_weights_that_are_computed_are_refused_by_name_or_right(name, how):
    model = made(Convolutional)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        COMPUTED[how](model.last)
        with torch.no_grad(): model(X[:2])
        with unchanged(model, X):
            try: small = ALL[name](model)
            except ValueError as e:
                assert "last" in str(e), e
                return
        codes_alone(model, small.eval(), X[:5])
        if name in CLOSE:
            exact, found = answers_of(model, X[:20] * 1.1), answers_of(small, X[:20] * 1.1)
            assert (exact - found).norm() < .2 * exact.norm(), f"{(exact - found).norm() / exact.norm():.3f} off"
