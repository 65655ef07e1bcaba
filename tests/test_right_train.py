"""Training through rounding and distillation, right or refused: what runs equals what was trained, is in the state,
and nothing of the caller's is changed."""

import copy, functools, itertools, math, warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from guards import FUZZ, answers, codes_alone, conv1d, unchanged
from modelzip.pack import load, save
from modelzip.prune import prune_model
from modelzip.qat import (
    ActivationQuantizer,
    EntropyBits,
    FakeQuantized,
    FakeRecurrent,
    StaticLinear,
    StepAdam,
    WeightQuantizer,
    convert,
    entropy_bits,
    freeze,
    prepare,
    set_bits,
    soft_counts,
    static_codes,
)
from modelzip.quant import Dequantize
from modelzip.structured import RemainingAttention, RemainingLayerNorm
from modelzip.workshop.matrices import floats_left
from modelzip.workshop.models import logits_of


class Takes(nn.Module):
    "A layer that may put out a tuple, and a head."

    def __init__(self, layer, width=8):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 5)

    def forward(self, x):
        y = self.layer(x)
        return self.head(y[0] if isinstance(y, tuple) else y)


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 5)

    def forward(self, x):
        return self.rnn(self.gru(self.lstm(x)[0]))


class Attention(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.a, self.width = nn.MultiheadAttention(8, 2, batch_first=True, **how), how.get("kdim", 8)

    def forward(self, x):
        return self.a(x, x[..., : self.width], x[..., : self.width])[0]


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Bilinear(8, 8, 5)

    def forward(self, x):
        return self.b(x, x + 1)


class Low(nn.Linear):
    "A subclass that computes something else."

    def __init__(self):
        super().__init__(8, 6)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Remaining(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = (
            RemainingAttention(12, 2, 4, batch_first=True),
            RemainingLayerNorm(12, 16),
            nn.Linear(12, 3),
        )
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, x):
        return self.head(self.norm(self.a(x, x, x)[0]))


class Twice(nn.Module):
    "One layer at two places and in a plain list."

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(8, 8), nn.Conv1d(3, 3, 1)
        self.b, self.listed = self.a, [self.a, (self.c,)]

    def forward(self, x):
        return self.listed[1][0](self.b(self.a(x).relu())) + self.listed[0](x)


class Reads(nn.Module):
    "A weight that is read, and a tied one."

    def __init__(self):
        super().__init__()
        self.a, self.words, self.out = nn.Linear(8, 6), nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return F.linear(self.out(self.a(x)), self.words.weight.T) @ self.a.weight


def normed():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular", groups=2),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def with_(tool, layer, rest=()):
    return nn.Sequential(tool(layer), nn.ReLU(), *rest)


MODELS = {
    "LSTM": (lambda: Takes(nn.LSTM(4, 4, 2, batch_first=True, bidirectional=True, dropout=0.1)), (3, 6, 4)),
    "GRU": (lambda: Takes(nn.GRU(4, 8)), (3, 6, 4)),
    "RNN": (lambda: Takes(nn.RNN(4, 8)), (3, 6, 4)),
    "cells": (Cells, (3, 4)),
    "transformer": (lambda: Takes(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)), (3, 6, 8)),
    "attention": (Attention, (3, 6, 8)),
    "attention, own keys": (lambda: Attention(kdim=4, vdim=4), (3, 6, 8)),
    "bilinear": (Bilinear, (3, 8)),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 6, 3)),
        (3, 4, 9),
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ConvTranspose3d(4, 4, 2, groups=2)),
        (2, 2, 4, 4, 4),
    ),
    "normed": (normed, (4, 2, 6, 6)),
    "subclass": (lambda: nn.Sequential(Low(), nn.ReLU(), nn.Linear(6, 3)), (3, 8)),
    "two names": (Twice, (2, 3, 8)),
    "read": (Reads, (3, 8)),
    "lone": (lambda: nn.Linear(8, 3), (3, 8)),
    "no rows": (lambda: nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2)), (3, 0)),
    "remaining attention": (lambda: Remaining(), (2, 5, 12)),
    "weight norm": (lambda: with_(parametrizations.weight_norm, nn.Linear(8, 8), [nn.Linear(8, 3)]), (3, 8)),
    "spectral norm": (lambda: with_(parametrizations.spectral_norm, nn.Conv2d(2, 4, 3)), (3, 2, 6, 6)),
    "orthogonal": (lambda: with_(parametrizations.orthogonal, nn.Linear(8, 8)), (3, 8)),
    "computed bias": (
        lambda: with_(functools.partial(parametrizations.weight_norm, name="bias", dim=None), nn.Linear(8, 8)),
        (3, 8),
    ),
    "Conv1D": (lambda: nn.Sequential(conv1d(12, 8), nn.GELU(), nn.Linear(12, 3)), (3, 8)),
}


def made(name, seed=0):
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    return make(), lambda: torch.randn(shape)


def trained(model, data, steps=3):
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    for _ in range(steps):
        logits_of(model(data())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# ---------------------------------------------------------------- prepare and convert, over all kinds of layers

HOWS = [{}, {"activations": None, "group": 8}, {"bits": 1, "activations": 4}, {"levels": 3, "per_channel": False}]


@pytest.mark.parametrize(
    "name,how",
    [(name, how) for i, name in enumerate(MODELS) for j, how in enumerate(HOWS) if FUZZ or (i + j) % 4 == 0],
    ids=lambda v: v if isinstance(v, str) else "-".join(v) or "4 bits",
)
def test_what_runs_is_what_was_trained_and_depends_on_codes_alone(name, how):
    model, data = made(name)
    with unchanged(model):
        prepared = prepare(model, **how)
    trained(prepared, data)
    with unchanged(prepared):
        integers = convert(prepared)
    for _ in range(2):
        x, x2 = data(), data() * 3
        for y in (x, x2):
            a, b = answers(prepared, y), answers(integers, y)
            assert all(torch.equal(a[k], b[k]) for k in a)
    codes_alone(model, prepared, x)
    codes_alone(prepared, integers, x)
    codes_alone(model, integers, x)
    assert not [n for n, why in floats_left(integers).items() if "matrix" in why], "a matrix stayed float"
    assert not any(isinstance(m, (FakeQuantized, FakeRecurrent, WeightQuantizer)) for m in integers.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_state_holds_all_that_is_computed_with(name, tmp_path):
    model, data = made(name)
    prepared, x = trained(prepare(model, 4, 8), data), data()
    integers = convert(prepared)
    twin = prepare(model, 3, 5, learn=False)  # other widths, other ranges
    twin.load_state_dict(prepared.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(answers(prepared, x).values(), answers(twin.eval(), x).values()))
    other = convert(trained(prepare(model, 4, 6), data))
    other.load_state_dict(integers.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(answers(integers, x).values(), answers(other, x).values()))
    if any(isinstance(m, FakeQuantized) for m in prepared.modules()):
        for built, key in ((integers, "_extra_state"), (prepared, "settings")):
            state = built.state_dict()
            state = {k: v for k, v in state.items() if not k.endswith(key) or "packed" in k}
            with pytest.raises(RuntimeError, match=key):
                built.load_state_dict(state)


def test_files_hold_what_a_prepared_model_computes_with(tmp_path):
    model, data = made("normed")
    prepared, x = trained(prepare(model, 4, 8), data), data()
    again = load(save(prepared, tmp_path / "p.mz"), prepare(model, 2, 4))
    assert torch.equal(again.eval()(x), prepared(x))


def test_half_precision_leaves_steps_and_settings_alone():
    prepared = trained(prepare(made("normed")[0]), made("normed")[1])
    for made_half in (
        copy.deepcopy(prepared).half(),
        copy.deepcopy(prepared).bfloat16(),
        copy.deepcopy(prepared).double(),
    ):
        for m in made_half.modules():
            if isinstance(m, (WeightQuantizer, ActivationQuantizer)):
                assert {t.dtype for t in (*m.parameters(), *m.buffers())} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["normed", "LSTM", "two names", "read", "one dimension"])
def test_other_precisions_to_the_last_bit(name, dtype):
    if name == "LSTM" and dtype == torch.float16:
        pytest.skip("PyTorch's LSTM has no half precision on the CPU")
    model, data = made(name)
    for levels in (2, 16):
        prepared = prepare(model.to(dtype), levels=levels)
        for _ in range(2):
            prepared(data().to(dtype))
        for p in prepared.eval().parameters():
            p.data.mul_(1.01)
        integers, x = convert(prepared), data().to(dtype)
        a, b = answers(prepared, x), answers(integers, x)
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == dtype for k in a)


def test_a_convolution_of_bfloat16_with_a_normalization_of_float32():
    model, data = made("normed")
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.bfloat16()
    prepared = trained(prepare(model), lambda: data().bfloat16())
    assert torch.equal(convert(prepared)(data().bfloat16() * 0 + 1), prepared(data().bfloat16() * 0 + 1))


def test_autocast_changes_no_whole_number():
    prepared = prepare(nn.Sequential(nn.Linear(900, 40), nn.Linear(40, 30)), 8)
    x = torch.randn(5, 900)
    prepared(x)
    integers, want = convert(prepared), prepared.eval()(x).detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(prepared[0](x), integers[0](x)) and torch.equal(prepared(x), integers(x))
        assert torch.equal(prepared[0](x).float(), prepared[0](x).float().bfloat16().float())
    assert torch.equal(integers(x), want)
    with torch.autocast("cpu", torch.bfloat16, enabled=False), torch.no_grad():
        exact = prepared[0](x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(prepared[0](x).to(torch.bfloat16), exact.bfloat16())


def test_the_sign_of_two_levels():
    w = torch.tensor([[1.0, -1e-9]])
    quantizer = WeightQuantizer(w, 2)
    assert torch.equal(quantizer(w).detach(), quantizer.as_qtensor(w).dequantize()) and quantizer(w)[0, 1] < 0
    for levels, layout in itertools.product(
        (2, 3, 16, 255), ({}, {"axis": 1}, {"group": 7})
    ):  # at and beside every edge between two codes
        q = WeightQuantizer(torch.randn(4, 6), levels, **layout)
        edges = (torch.arange(-levels - 3, levels + 4) / 2)[:, None] * q.scale.detach().max()
        w = torch.cat(
            [edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1), edges * 0, edges * 1e-30], 1
        ).flatten()
        w = F.pad(w, (0, -len(w) % 24)).view(-1, 4, 6)
        for v in w:
            assert torch.equal(q(v).detach(), q.as_qtensor(v).dequantize())


def test_nothing_but_zeros_stays_nothing():
    for levels, layout in itertools.product((2, 3, 16), ({}, {"axis": 0}, {"group": 4})):
        w = torch.randn(3, 8)
        w[1] = 0
        q = WeightQuantizer(w, levels, **layout)
        if layout:
            assert q(w)[1].abs().max() < 1e-6 and q.as_qtensor(w).dequantize()[1].abs().max() < 1e-6
        assert WeightQuantizer(w * 0, levels, **layout)(w * 0).abs().max() < 1e-6


# ---------------------------------------------------------------- state outside of parameters


def refuse(model, says, **how):
    with unchanged(model), pytest.raises(ValueError, match=says):
        prepare(model, **how)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv1d", "Embedding", "LSTM"])
@pytest.mark.parametrize(
    "tool,says",
    [
        (lambda m, k: prune.l1_unstructured(m, k, 0.5), "prune.remove"),
        (lambda m, k: weight_norm(m, k), "remove_weight_norm"),
        (lambda m, k: spectral_norm(m, k), "remove_spectral_norm"),
        (lambda m, k: as_buffer(m, k), "is a buffer"),
        (lambda m, k: as_attribute(m, k), "plain attribute"),
    ],
    ids=["prune", "weight_norm", "spectral_norm", "buffer", "attribute"],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_something_else_computes_are_refused_by_name(kind, tool, says):
    layer = {
        "Linear": lambda: nn.Linear(4, 4),
        "Conv2d": lambda: nn.Conv2d(4, 4, 3),
        "Conv1d": lambda: nn.Conv1d(4, 4, 3),
        "Embedding": lambda: nn.Embedding(4, 4),
        "LSTM": lambda: nn.LSTM(4, 4),
    }[kind]()
    key = "weight_hh_l0" if kind == "LSTM" else "weight"
    tool(layer, key)
    model = nn.ModuleDict({"odd": layer, "fine": nn.Linear(3, 3)})
    refuse(model, f"odd.{key} .*{says}")
    if says in ("is a buffer", "plain attribute"):
        assert isinstance(prepare(model, overrides={"odd": None}).fine, FakeQuantized)


def as_buffer(m, k):
    w = m._parameters.pop(k).detach()
    m.register_buffer(k, w)


def as_attribute(m, k):
    w = m._parameters.pop(k).detach()
    m.__dict__[k] = w


def test_other_things_refused_by_name():
    own = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    own[1].forward = own[1].forward
    refuse(own, "layer 1 has a forward of its own")
    compiled = nn.Sequential(nn.Linear(4, 4))
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    refuse(compiled, "forward of its own")
    bias = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.random_unstructured(bias[1], "bias", 0.5)
    refuse(bias, "1.bias .*prune.remove")
    with pytest.raises(ValueError, match="before the first call"):
        prepare(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="meta device"):
        prepare(nn.Linear(3, 3, device="meta"))
    refuse(nn.Sequential(nn.Linear(0, 4)), "no layer to quantize")
    hurt = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    hurt[1].weight.data[0, 0] = math.nan
    refuse(hurt, "layer 1: the weight holds NaN")
    refuse(nn.Linear(4, 4), "'bit'", overrides={"": {"bit": 3}})
    with pytest.raises(ValueError, match="levels is 1"):
        set_bits(prepare(nn.Linear(4, 4)), levels=1)
    with pytest.raises(ValueError, match="rounds its input"):
        set_bits(prepare(nn.Embedding(4, 4)), activations=4)


def test_what_stays_float_is_said():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.fc, self.hidden = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 8), [nn.Linear(8, 8)]

        def forward(self, x):
            return self.hidden[0](self.fc(x + self.places))

    with pytest.warns(UserWarning, match=r"(?s)prepare leaves these as floats.*places.*hidden"):
        prepare(Bare())
    for name in MODELS:
        model = made(name)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(model)


@pytest.mark.parametrize("kind", ["both", "pre-hook with names"])
@pytest.mark.parametrize(
    "name,layers",
    [
        ("normed", ("0", "1", "3", "6")),
        ("LSTM", ("layer", "head")),
        ("attention", ("a",)),
        ("one dimension", ("0", "2")),
        ("two names", ("a",)),
        ("cells", ("lstm", "gru")),
    ],
)
def test_hooks_are_called_once(name, layers, kind):
    for which in layers:
        model, data = made(name)
        calls, layer = [], model.get_submodule(which)
        double = lambda t: (
            tuple(2 * u if u is not None and torch.is_tensor(u) else u for u in t) if isinstance(t, tuple) else 2 * t
        )
        if kind == "both":
            layer.register_forward_hook(lambda m, i, o: (calls.append("out"), double(o))[1])
        if kind == "both":
            layer.register_forward_pre_hook(lambda m, i: (calls.append("in"), double(i))[1])
        if kind == "pre-hook with names":
            layer.register_forward_pre_hook(lambda m, i, k: (calls.append("in"), (double(i), k))[1], with_kwargs=True)
        prepared = prepare(model, 8)
        trained(prepared, data, 1)
        x, count = data(), {}
        for m in (model.eval(), prepared, convert(prepared)):
            calls.clear()
            y = answers(m, x)
            count[type(m), len(count)] = list(calls)
            if len(count) == 1:
                continue
            if len(count) == 2:
                kept = y
            else:
                assert all(torch.equal(kept[k], y[k]) for k in y)
        first, *others = count.values()
        assert first and all(o == first for o in others), f"{which}: {count}"


# ---------------------------------------------------------------- names and ties


def test_both_names_of_a_layer():
    model, data = made("two names")
    prepared = prepare(model, overrides={"a": {"bits": 8}, "b": {"bits": 8}})
    assert (
        prepared.a is prepared.b is prepared.listed[0]
        and isinstance(prepared.a, FakeQuantized)
        and prepared.a.weights.levels == 256
    )
    assert prepared.listed[1][0] is prepared.c and model.listed[0] is model.a and isinstance(model.a, nn.Linear)
    integers = convert(trained(prepared, data))
    assert integers.a is integers.b is integers.listed[0] and isinstance(integers.a, StaticLinear)
    with pytest.raises(ValueError, match="a and b are one layer"):
        prepare(model, overrides={"a": {"bits": 8}})
    with pytest.raises(ValueError, match="a and b are one layer"):
        prepare(model, overrides={"b": None})


def test_both_sides_of_a_tied_weight(tmp_path):
    model, data = made("read")
    for overrides in (
        {"out": {"bits": 8}},
        {"words": {"bits": 8}},
        {"out": None},
        {"words": None},
        {"out": {"per_channel": False}},
    ):
        with (
            unchanged(model),
            pytest.raises(
                ValueError, match="words and out are one tensor|out.weight and words.weight|words.weight|out"
            ),
        ):
            prepare(model, overrides=overrides)
    prepared = prepare(model, overrides={"out": {"bits": 8}, "words": {"bits": 8}})
    integers = convert(trained(prepared, data))
    assert integers.words.packed is integers.out.packed and integers.out.packed.meta["levels"] == 256
    assert prepare(model, overrides={"out": None, "words": None}).out.weight is not model.out.weight

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4)
            self.back = self.words.weight

        def forward(self, i):
            return self.words(i) @ self.back.T

    with pytest.raises(ValueError, match="back"):
        prepare(Bare())


def test_a_masked_and_a_whole_layer_with_one_weight():
    class Half(nn.Module):
        def forward(self, w):
            return w.tril()

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    parametrize.register_parametrization(model[1], "weight", Half())
    prepared = trained(prepare(model), lambda: torch.randn(4, 6))
    integers, x = convert(prepared), torch.randn(4, 6)
    assert (
        torch.equal(integers(x), prepared(x))
        and integers[0].packed is not integers[1].packed
        and (integers[1].weight.triu(1) == 0).all()
    )


def test_a_convolution_that_shares_its_weight_keeps_its_normalization():
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
    )
    model[2].weight = model[0].weight
    prepared = trained(prepare(model), lambda: torch.randn(4, 2, 5, 5))
    integers, x = convert(prepared), torch.randn(4, 2, 5, 5)
    assert torch.equal(integers(x), prepared(x)) and integers[0].packed is integers[2].packed


def test_a_weight_read_behind_its_normalization_is_refused_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)).mean((2, 3)) @ self.conv.weight.flatten(1)

    prepared, x = prepare(Net()), torch.randn(3, 2, 4, 4)
    if prepared.conv.norm is None:
        prepared(x)
        assert torch.equal(convert(prepared)(x), prepared.eval()(x))
    else:
        with pytest.raises(AttributeError, match="conv.weight is read by the model"):
            prepared(x)


def test_frozen_parts_stay_frozen():
    model, data = made("normed")
    for p in model[0].parameters():
        p.requires_grad_(False)
    prepared = prepare(model)
    assert (
        not prepared[0].weights.scale.requires_grad
        and not prepared[0].layer.weight.requires_grad
        and prepared[3].weights.scale.requires_grad
    )
    model[6].bias.requires_grad_(False), model[6].weight.requires_grad_(False)
    integers = convert(trained(prepare(model), data))
    assert not integers[6].layer.bias.requires_grad and integers[3].layer.bias.requires_grad


# ---------------------------------------------------------------- gradients and ranges


def test_lsq_at_the_last_code_is_the_papers():
    for levels in (3, 4, 16):
        q = WeightQuantizer(torch.ones(1), levels)
        q.scale.data.fill_(0.5)
        low, high = -q.zero, levels - 1 - q.zero
        for code, right in ((high, high), (low, low), (high + 3, high), (low - 3, low), (0.2, -0.2)):
            w = torch.tensor([code * 0.5], requires_grad=True)
            gradient, by_weight = torch.autograd.grad(q(w).sum(), [q.scale, w])
            assert gradient.item() * math.sqrt(max(1.0, high)) == pytest.approx(
                right, abs=1e-6
            ) and by_weight.item() == (low < code < high)


def test_no_zero_point_and_no_step_is_stuck():
    q = ActivationQuantizer(8)
    q.set_range(-1.0, 3.0)
    x = torch.tensor([-0.5, -1.0, -2.0, 1.0])
    for start, inward in ((-0.001, -1), (-7.0, -1), (0.0, -1), (255.001, 1), (300.0, 1), (255.0, 1)):
        for direction in (1, -1):
            q.zero_point.data.fill_(start)
            q.zero_point.grad = None
            (direction * q(x)).sum().backward()
            g = q.zero_point.grad.item()
            assert g == 0 or math.copysign(1, g) == inward, "nothing leads outward"
            if inward < 0 and direction == 1:
                assert g == pytest.approx(-3 * q.scale.item())
    q.zero_point.data.fill_(-0.001)
    for _ in range(200):
        q.zero_grad()
        F.mse_loss(q(x), x).backward()
        q.zero_point.data -= 20 * q.zero_point.grad
    assert q.zero_point.item() > 40, "what is negative found its codes"


def test_ranges_of_all_kinds():
    for batch in (
        torch.zeros(50),
        torch.full((50,), 3.0),
        torch.full((50,), -3.0),
        torch.full((50,), 3e38),
        torch.tensor([-3e38, 3e38]),
        torch.full((50,), 1e-40),
        torch.full((4,), 1e-45),
        torch.tensor([0.0, 1e-30]),
    ):
        for bits, learn in itertools.product((4, 8), (True, False)):
            q = ActivationQuantizer(bits, learn=learn)
            y = q(batch)
            assert (
                y.isfinite().all()
                and (y - batch).abs().max() <= batch.abs().max() * (0.6 if len(batch.unique()) == 1 else 1) + 1e-37
            )
            assert q.ready and 0 <= q.zero_point.item() < 1 << bits and q.scale.item() > 0
    q = ActivationQuantizer(8)
    assert q(torch.zeros(0, 3)).shape == (0, 3) and not q.ready
    for low, high in ((math.nan, 1.0), (2.0, 1.0), (-math.inf, 0.0)):
        with pytest.raises(ValueError, match="the range is"):
            q.set_range(low, high)


@pytest.mark.parametrize("scale", [1e-300, 1e-39, 1e-37, 1e-30, 1e-20, 0.5, 1e30])
def test_static_codes_are_their_formula(scale):
    torch.manual_seed(0)
    x = torch.cat(
        [torch.randn(500) * min(scale, 1e30) * s for s in (1.0, 100.0, 1e9, 1e20, 1e-9)]
        + [torch.tensor([0.0, 3e38, -3e38])]
    ).clamp(-3e38, 3e38)
    for zero, levels in ((0, 256), (7, 16), (255, 256)):
        got, ideal = static_codes(x, scale, zero, levels), (x.double() / scale + zero).clamp(0, levels - 1)
        assert int(got.max()) < levels and (got - ideal).abs().max() <= 0.5001
        assert got[-3:].tolist() == [zero, levels - 1, 0]
    assert static_codes(torch.tensor([0.25]), 0.5, 1).item() == 2


def test_entropy_is_that_of_the_codes():
    model = nn.Linear(10, 10, bias=False)
    model.weight.data.fill_(0.51)
    prepared = prepare(model, levels=7, activations=None, per_channel=False)
    prepared.parametrizations.weight[0].scale.data.fill_(1.0)
    assert entropy_bits(prepared).item() == 0
    torch.manual_seed(0)
    for how in ({"bits": 1}, {"levels": 5}, {"bits": 4, "group": 8}):
        prepared = prepare(nn.Sequential(nn.Linear(20, 9), nn.Linear(9, 7)), activations=None, **how)
        want = 0.0
        for m in convert(prepared).modules():
            if isinstance(m, Dequantize):
                n = m.q.unpack().flatten().bincount().double()
                want -= (n * (n / n.sum()).clamp(min=1e-12).log2()).sum().item()
        bits = entropy_bits(prepared)
        bits.backward()
        assert bits.item() == pytest.approx(want, rel=1e-5) and all(
            p.grad is not None for n, p in prepared.named_parameters() if "original" in n
        )
    assert soft_counts(WeightQuantizer(torch.ones(1), 3), torch.zeros(5)).dtype == torch.float64, (
        "a float32 counts to 2^24 only"
    )


def test_freeze_waits_for_a_first_batch_and_stops_what_is_due():
    prepared, x = prepare(nn.Sequential(nn.Linear(4, 4))), torch.randn(8, 4)
    freeze(prepared).train()(x)
    scale = prepared[0].activations.scale.item()
    prepared(x * 9)
    assert prepared[0].activations.scale.item() == scale != 1
    due = prepare(nn.Sequential(nn.Linear(4, 4)))
    optimizer = torch.optim.Adam(due.parameters(), 0.1)
    due(x).sum().backward()
    before = due[0].activations.scale.item()
    freeze(due)
    optimizer.step()
    assert due[0].activations.scale.item() == before


def test_a_frozen_normalization_uses_its_averages():
    model, data = made("normed")
    prepared = prepare(model)
    prepared(data())
    prepared[0].norm.eval()
    kept = prepared[0].norm.running_mean.clone()
    prepared(data() + 5)
    assert torch.equal(prepared[0].norm.running_mean, kept)


def test_step_adam_takes_groups():
    prepared = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), activations=None)
    optimizer = StepAdam(
        [
            {"params": prepared[0].parameters(), "weight_decay": 0.1},
            {"params": list(prepared[1].parameters()), "lr": 1.0},
        ],
        0.01,
        prepared,
        share=0.5,
    )
    assert [(len(g["params"]), g["share"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (2, 1.0, 0.01, 0.1),
        (1, 0.5, 0.01, 0.1),
        (2, 1.0, 1.0, 0),
        (1, 0.5, 1.0, 0),
    ]
    before = {n: p.detach().clone() for n, p in prepared.named_parameters()}
    prepared(torch.randn(9, 4)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in prepared.named_parameters())


# ---------------------------------------------------------------- distillation

from dataclasses import dataclass  # noqa: E402

from modelzip.data import Split, accuracy, train  # noqa: E402
from modelzip.distill import (
    AttentionTransfer,
    Hints,
    Labels,
    Logits,
    Relations,
    Seen,
    SoftTargets,
    affine,
    classes_last,
    distill,
    watched,
)  # noqa: E402


def examples_of(*shape, n=24, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Split(torch.randn(n, *shape, generator=g), torch.randint(0, classes, (n,), generator=g))


def net(hidden=6, outputs=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def taught(student, teacher, data=None, loss=None, **how):
    return distill(
        student, teacher, examples_of(8) if data is None else data, loss, epochs=1, batch_size=8, progress=False, **how
    )


@pytest.mark.parametrize(
    "shape,axis",
    [
        ((6, 5), 1),
        ((6, 5), -1),
        ((2, 5, 3, 4), 1),
        ((2, 3, 4, 5), -1),
        ((2, 3, 4, 5), 3),
        ((2, 5, 7), 1),
        ((2, 7, 5), 2),
        ((4, 1), 1),
        ((4,), 1),
        ((3, 1, 2, 2), 1),
        ((3, 4, 1), -1),
    ],
)
def test_soft_targets_over_the_axis_of_the_classes(shape, axis):
    torch.manual_seed(0)
    z, v, T = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64), 3.0
    rows = lambda t: (t.view(-1, 1) if t.dim() == 1 else t.movedim(axis, -1)).reshape(
        -1, shape[axis] if len(shape) > 1 else 1
    )
    a, b = rows(z), rows(v)
    if a.shape[1] == 1:
        q, p = (torch.cat([(t / T).sigmoid(), (-t / T).sigmoid()], 1) for t in (a, b))
    else:
        q, p = (a / T).softmax(1), (b / T).softmax(1)
    want = T * T * (p * (p / q).log()).sum(1).mean()
    assert SoftTargets(T, axis)(Seen(z), Seen(v), None).item() == pytest.approx(want.item(), rel=1e-9) and want > 0
    labels = torch.randint(0, max(2, a.shape[1]), (len(a),))
    cross = (
        F.cross_entropy(a, labels) if a.shape[1] > 1 else F.binary_cross_entropy_with_logits(a[:, 0], labels.double())
    )
    assert Labels(axis)(Seen(z), None, labels.view(classes_last(z, axis).shape[:-1])).item() == pytest.approx(
        cross.item()
    )


def test_a_wrong_axis_is_an_error_where_it_shows():
    z = Seen(torch.randn(2, 7, 5))
    for loss in (SoftTargets(), Labels()):
        with pytest.raises(ValueError, match="axis=-1"):
            loss(z, z, torch.zeros(2, 7).long())
    for axis in (0, 3, -3, -4):
        with pytest.raises(ValueError, match="axis is"):
            SoftTargets(axis=axis)(z, z, None)
    with pytest.raises(ValueError, match="0 or 1"):
        Labels()(Seen(torch.randn(3, 1)), None, torch.tensor([0, 1, 2]))
    for loss in (SoftTargets(), Logits()):
        with pytest.raises(ValueError, match="must be the same"):
            loss(Seen(torch.randn(3, 5)), Seen(torch.randn(3, 1)), None)
    assert (
        repr(SoftTargets(2, -1)) == "SoftTargets(2, axis=-1)"
        and repr(Labels(axis=-1)) == "Labels(axis=-1)"
        and repr(0.9 * SoftTargets(4) + 0.1 * Labels()) == "0.9 * SoftTargets(4) + 0.1 * Labels()"
    )


@pytest.mark.parametrize("temperature", [0.02, 0.5, 4.0, 100.0, 1e4, 1e5, 1e8])
@pytest.mark.parametrize("far", [1.0, 30.0])
def test_soft_targets_in_float32(temperature, far):
    torch.manual_seed(0)
    z, v = torch.randn(9, 10) * far, torch.randn(9, 10) * far
    a, b = z.double().requires_grad_(), v.double()
    if temperature < 1e6:
        right = temperature**2 * F.kl_div(
            (a / temperature).log_softmax(1), (b / temperature).log_softmax(1), log_target=True, reduction="batchmean"
        )
    else:
        right = ((a - a.mean(1, keepdim=True) - b + b.mean(1, keepdim=True)).square().sum(1) / 20).mean()  # the limit
    z.requires_grad_()
    got = SoftTargets(temperature)(Seen(z), Seen(v), None)
    assert got.item() == pytest.approx(right.item(), rel=3e-3)
    slope, want = torch.autograd.grad(got, z)[0], torch.autograd.grad(right, a)[0]
    torch.testing.assert_close(slope.double(), want, rtol=1e-2, atol=2e-4 * want.abs().max().item())


def test_matching_logits_is_the_limit_for_equal_means_only():
    z = torch.randn(4, 10, dtype=torch.float64)
    assert Logits()(Seen(z), Seen(z + 5), None).item() == pytest.approx(25) and SoftTargets(1e6)(
        Seen(z), Seen(z + 5), None
    ).item() == pytest.approx(0, abs=1e-9)
    v = torch.randn(4, 10, dtype=torch.float64)
    v += (z - v).mean(1, keepdim=True)
    assert 2 * SoftTargets(1e6)(Seen(z), Seen(v), None).item() == pytest.approx(
        Logits()(Seen(z), Seen(v), None).item(), rel=1e-4
    )


@dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor
    hidden: tuple = ()


class Puts(nn.Module):
    "Puts out what it computes in one of many shapes."

    def __init__(self, shape, hidden=6):
        super().__init__()
        self.body, self.shape = net(hidden), shape

    def forward(self, x):
        y = self.body(x)
        return {
            "tensor": y,
            "tuple": (y, x),
            "dict": {"loss": y.mean(), "logits": y},
            "dataclass": Answer(y.mean(), y),
            "list": [y.sum(), y],
        }[self.shape]


@pytest.mark.parametrize(
    "mine,yours", [(a, b) for a in ("tensor", "tuple", "dict", "dataclass", "list") for b in ("tensor", "dataclass")]
)
def test_outputs_of_all_shapes_teach_the_same(mine, yours):
    data, teacher = examples_of(8), net(16, seed=3)
    plain = taught(net(), copy.deepcopy(teacher), data)
    other, wrapped = Puts(mine), Puts(yours, 16)
    wrapped.body.load_state_dict(teacher.state_dict())
    with unchanged(wrapped, data.x, data.y):
        taught(other, wrapped, data)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.body.parameters()))


def test_layers_that_put_out_tuples_or_are_overwritten_are_tapped():
    class Rnn(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.keys, self.act, self.head = nn.LSTM(8, width, batch_first=True), nn.ReLU(), nn.Linear(width, 5)

        def forward(self, x):
            return self.head(self.act(self.keys(x[:, None])[0])[:, -1])

    torch.manual_seed(0)
    hints = Hints({"keys": "keys"})
    taught(Rnn(4), Rnn(6), loss=hints + SoftTargets())
    assert [tuple(m.weight.shape) for m in hints.maps.values()] == [(6, 4)]
    with pytest.raises(ValueError, match="learned a map from 4 to 6"):
        taught(Rnn(3), Rnn(6), loss=hints)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True))
    with watched(model, ("0",)) as seen:
        model(torch.randn(50, 8))
    assert seen["0"].min() < 0, "as it was before the ReLU wrote into it"

    class Skips(nn.Sequential):
        def __init__(self):
            super().__init__(*net().children(), nn.Linear(8, 8))

        def forward(self, x):
            return self[2](self[1](self[0](x)))

    with pytest.raises(ValueError, match="student's layer '3' was not called"):
        taught(Skips(), net(), loss=Hints({"3": "0"}))
    with pytest.raises(ValueError, match="teacher's layer '3' was not called"):
        taught(net(), Skips(), loss=Hints({"0": "3"}))
    with pytest.raises(ValueError, match="as many dimensions"):
        Hints({"a": "b"})(Seen(None, {"a": torch.randn(2, 3, 4)}), Seen(None, {"b": torch.randn(2, 4)}), None)
    with pytest.raises(ValueError, match="all but the channels"):
        Hints({"a": "b"})(Seen(None, {"a": torch.randn(2, 3, 4)}), Seen(None, {"b": torch.randn(2, 1, 4)}), None)


def test_a_student_that_waits_for_its_first_batch():
    data, teacher = examples_of(8), net(16, seed=3)
    student = prepare(net())
    watch = []
    student[0].activations.register_forward_hook(lambda *a: None)
    original = ActivationQuantizer._watch
    try:
        ActivationQuantizer._watch = lambda self, x: (watch.append(len(x)), original(self, x))[1]
        with unchanged(teacher, data.x, data.y):
            taught(student, teacher, data)
    finally:
        ActivationQuantizer._watch = original
    assert watch[:4] == [2, 2, 8, 8], "rehearsed with two examples, then set by the first batch"
    x = torch.randn(4, 8)
    assert torch.equal(convert(student)(x), student(x)) and not student.training


@pytest.mark.parametrize("share", ["layer", "parameter", "view", "buffer", "whole", "dropout", "loss"])
def test_what_a_student_shares_with_its_teacher_is_refused(share):
    teacher, student, loss = (
        nn.Sequential(*net(8, seed=3), nn.BatchNorm1d(5), nn.Dropout(0.5)),
        nn.Sequential(*net(8), nn.BatchNorm1d(5), nn.Dropout(0.5)),
        SoftTargets(),
    )
    if share == "layer":
        student[0] = teacher[0]
    if share == "parameter":
        student[0].weight = teacher[0].weight
    if share == "view":
        student[0].weight = nn.Parameter(teacher[0].weight.data)
    if share == "buffer":
        student[3].running_mean = teacher[3].running_mean
    if share == "whole":
        student = nn.Sequential(teacher, nn.Linear(5, 5))
    if share == "dropout":
        student[4] = teacher[4]
    if share == "loss":
        loss = SoftTargets()
        loss.peek = teacher
    with unchanged(teacher, student), pytest.raises(ValueError, match="is the teacher's"):
        taught(student, teacher, loss=loss)
    if share in ("layer", "parameter", "whole", "dropout"):
        taught(copy.deepcopy(student), teacher)
    frozen = nn.Sequential(*net(8))
    frozen[0].weight = teacher[0].weight
    teacher[0].weight.requires_grad_(False)
    with unchanged(teacher):
        taught(frozen, teacher)


def test_networks_that_write_into_their_input_and_examples_stay():
    class Writes(nn.Module):
        def __init__(self, hidden):
            super().__init__()
            self.net = net(hidden)

        def forward(self, x):
            return self.net(x.relu_())

    data = examples_of(8)

    def darker(x):
        return x.mul_(0.5)

    student, teacher = net(), Writes(16)
    with unchanged(data.x, data.y, teacher):
        taught(student, teacher, data, augment=darker)
    a, b = taught(net(), Writes(16), data), taught(net(), nn.Sequential(nn.ReLU(), *net(16)), data)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())), "the student saw the same inputs"


def test_a_turn_is_a_turn_in_images_that_are_no_squares():
    image = torch.zeros(1, 1, 41, 81)
    image[..., 18:23, 28:53] = 1.0  # a bar of 5 by 25
    turned = affine(image.expand(200, -1, -1, -1), degrees=90, shift=0, scale=0, shear=0)
    mass = turned.sum((1, 2, 3))
    y, x = (torch.arange(n).float() - n // 2 for n in (41, 81))
    moment = (turned.sum((1, 3)) * y**2).sum(1) / mass + (turned.sum((1, 2)) * x**2).sum(1) / mass
    assert (mass / image.sum() - 1).abs().max() < 0.05 and (moment / moment.max()).min() > 0.9


@pytest.mark.parametrize(
    "act", [prepare, freeze, set_bits, convert, entropy_bits, EntropyBits, distill], ids=lambda f: f.__name__
)
def test_nothing_of_the_callers_is_changed(act):
    model, data = made("normed")
    model[1].extra, model[2].train = torch.randn(3), model[2].train
    del model[2].train
    x, prepared = data(), trained(prepare(model), data)
    x.requires_grad_(False)
    if act is prepare:
        with unchanged(model, x):
            prepare(model, batches=[x], overrides={"0": {"bits": 2}})
        batches = [(x, torch.zeros(4).long())]
        with unchanged(model.eval(), x):
            prepare(model, batches=iter(batches))
    elif act is distill:
        teacher, pairs = made("normed", 1)[0], Split(torch.randn(12, 2, 6, 6), torch.zeros(12).long())
        with unchanged(teacher, pairs.x, pairs.y):
            taught(
                prepared.train(),
                teacher,
                pairs,
                SoftTargets() + Hints({"0": "0"}) + AttentionTransfer({"2": "2"}) + Relations("5", "5"),
                augment=affine,
            )
        assert not any(m._forward_hooks for m in (*prepared.modules(), *teacher.modules())) and not prepared.training
    elif act in (convert, entropy_bits, EntropyBits):
        for mode in (True, False):
            with unchanged(prepared.train(mode)):
                act(prepared)
    else:
        with unchanged(model, x):
            act(prepared) if act is freeze else act(prepared, 3, 5)


def test_a_state_of_a_loss_belongs_to_its_settings():
    a = [
        SoftTargets(2),
        SoftTargets(4, -1),
        Labels(-1),
        0.5 * SoftTargets(2) + Labels(),
        Hints({"a": "b"}),
        Relations("a", "b"),
        AttentionTransfer({"a": "b"}),
        Logits(),
    ]
    b = [
        SoftTargets(4),
        SoftTargets(4),
        Labels(),
        0.25 * SoftTargets(2) + Labels(),
        Hints({"a": "c"}),
        Relations("a", "b", angles=0.0),
        AttentionTransfer({"c": "b"}),
    ]
    for one in a:
        copy.deepcopy(one).load_state_dict(one.state_dict())
    for one, other in zip(a, b):
        with pytest.raises((ValueError, RuntimeError), match="other settings"):
            other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-7, 1.0, 1e9, 1e25])
def test_relations_and_attention_have_no_scale(size):
    torch.manual_seed(0)
    a, b = torch.randn(6, 4), torch.randn(6, 9)
    want = Relations()(Seen(a), Seen(b), None)
    x = (a * size).requires_grad_()
    got = Relations()(Seen(x), Seen(b * size), None)
    assert got.item() == pytest.approx(want.item(), rel=1e-4) and torch.autograd.grad(got, x)[0].isfinite().all()
    f, g = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    loss = lambda s: AttentionTransfer({"x": "y"})(Seen(None, {"x": f * s}), Seen(None, {"y": g * s}), None).item()
    assert loss(size) == pytest.approx(loss(1.0), rel=1e-4)


def test_every_loss_has_its_factor():
    with pytest.raises(ValueError, match="2 factors and 1 losses"):
        (Labels() + Logits()).__class__([1.0, 2.0], [Labels()])


def test_without_kernels_the_whole_numbers_are_the_same():
    "What runs on a device for which there are no integer kernels."
    for model, shape in (
        (nn.Linear(900, 40), (5, 900)),
        (nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), (2, 3, 7, 7)),
        (nn.Conv2d(40, 40, 3, padding=1, stride=2), (2, 40, 9, 9)),
    ):
        for bits, activations in ((8, 8), (2, 4)):
            prepared = prepare(model, bits, activations)
            prepared(torch.randn(shape) + 1)
            integers, x = convert(prepared), torch.randn(shape) + 1
            with torch.no_grad():
                assert torch.equal(integers._anywhere(x), integers(x))


def test_an_override_is_stronger_than_the_default():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prepared = prepare(model, levels=3, overrides={"1": {"bits": 8}})
    assert [m.weights.levels for m in prepared] == [3, 256]
    prepared = prepare(model, group=4, activations=None, overrides={"1": {"per_channel": False}})
    assert [m.parametrizations.weight[0].scale.numel() for m in prepared] == [16, 1]
    assert prepare(model, per_channel=False, overrides={"1": {"levels": 3, "bits": 2}})[1].weights.levels == 3


def test_a_rounded_weight_can_be_read_and_not_written():
    for name, which, key in (("lone", "", "weight"), ("LSTM", "layer", "weight_hh_l0")):
        model, data = made(name)
        prepared = trained(prepare(model), data)
        for built in (prepared, convert(prepared)):
            w = getattr(built.get_submodule(which), key)
            assert (
                (w @ w.T).shape and torch.equal(w.clone(), w) and built.get_submodule(which).bias is not None
                if key == "weight"
                else True
            )
            with pytest.raises(RuntimeError, match="would be lost"):
                w.mul_(2)
            with pytest.raises(RuntimeError, match="would be lost"):
                w.data[0] = 1.0


@pytest.mark.parametrize(
    "build",
    [
        lambda: prepare(nn.Linear(4, 4)),
        lambda: prepare(nn.Linear(4, 4), activations=None),
        lambda: prepare(nn.Embedding(4, 4)),
        lambda: prepare(prune_model(nn.Sequential(nn.Linear(4, 4)), 0.5, "magnitude"), activations=None)[0],
    ],
)
def test_no_write_into_a_rounded_weight_is_lost(build):
    layer, write = build(), torch.ones(4, 4)
    for act in (
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.data.copy_(write),
        lambda: setattr(layer.weight, "data", write),
        lambda: layer.weight.data.add_(write),
        lambda: nn.init.zeros_(layer.weight),
        lambda: layer.weight[0].zero_(),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match="would be lost"):
            act()
    with pytest.raises((ValueError, RuntimeError)):
        layer.weight.detach().numpy()[0] = 0
    if hasattr(layer, "parametrizations"):
        layer.weight = write
        assert torch.equal(layer.parametrizations.weight.original, write)
    assert (layer.weight @ layer.weight.T).requires_grad


def test_groups_whose_steps_float16_cannot_say_are_refused():
    for size in (1e-6, 1e9):
        layer = nn.Linear(32, 4)
        layer.weight.data.mul_(size)
        with pytest.raises(ValueError, match="leave group out"):
            prepare(layer, group=8, activations=None)
        rounded = prepare(layer, activations=None).weight
        assert (rounded - layer.weight).abs().max() <= layer.weight.abs().max() / 6


def test_the_callers_default_device_and_type_do_not_matter():
    model, data = made("normed")
    x, want = data(), None
    for context in (
        lambda: torch.device("cpu"),
        lambda: torch.device("meta"),
        lambda: functools.partial(torch.set_default_dtype, torch.float64),
    ):
        c = context()
        try:
            if isinstance(c, functools.partial):
                c()
            with c if isinstance(c, torch.device) else torch.device("cpu"):
                prepared = prepare(model, batches=[x])
                integers = convert(prepared)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {t.device.type for t in (*prepared.state_dict().values(), *integers.state_dict().values())} == {"cpu"}
        assert {t.dtype for t in prepared.state_dict().values() if t.is_floating_point()} == {torch.float32}
        y = integers(x)
        assert torch.equal(y, prepared.eval()(x)) and (want is None or torch.equal(y, want))
        want = y


def test_code_that_reads_a_recurrent_layers_matrices():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.RNN(6, 6, batch_first=True)

        def forward(self, x):
            return self.a(x)[0] + x @ self.a.weight_ih_l0 + x @ self.a.all_weights[0][1]

    prepared, x = prepare(Reads(), 2).eval(), torch.randn(2, 5, 6)
    assert torch.allclose(prepared(x), convert(prepared)(x), atol=1e-5)


def test_layers_used_again_ties_of_recurrent_layers_and_packed_sequences():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.layers, self.a, self.b = (
                nn.ModuleList([layer] * 3),
                nn.LSTM(8, 8, batch_first=True),
                nn.LSTM(8, 8, batch_first=True),
            )
            self.b.weight_hh_l0 = self.a.weight_hh_l0

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.b(self.a(x)[0])[0]

    model, x = Again(), torch.randn(2, 5, 8)
    prepared = trained(prepare(model), lambda: torch.randn(2, 5, 8), 2)
    integers = convert(prepared)
    assert all(torch.equal(a, b) for a, b in zip(answers(prepared, x).values(), answers(integers, x).values()))
    packed = [m.packed for m in integers.modules() if isinstance(m, Dequantize)]
    assert integers.layers[0] is integers.layers[2] and len(packed) - len({id(p) for p in packed}) == 1
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 4), [5, 3, 2])
    prepared = prepare(nn.GRU(4, 4))
    prepared(x)[0].data.sum().backward()
    assert (
        torch.equal(convert(prepared)(x)[0].data, prepared.eval()(x)[0].data)
        and prepared.weights["weight_ih_l0"].scale.grad is not None
    )


def test_tied_layers_whose_outputs_lie_along_different_axes():
    for first, second, shape in (
        (nn.ConvTranspose2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), (2, 4, 6, 6)),
        (nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3, padding=1), (2, 4, 6, 6)),
        (nn.Embedding(8, 8), nn.Linear(8, 8), None),
    ):
        second.weight = first.weight
        with torch.no_grad():
            first.weight.mul_(
                torch.tensor([1.0, 10, 100, 0.1] * (first.weight.shape[0] // 4)).view(
                    -1, *[1] * (first.weight.dim() - 1)
                )
            )
        model = nn.Sequential(first, second)
        x = torch.randn(shape) if shape else torch.arange(8)
        prepared = prepare(model, 8)
        prepared(x)
        integers = convert(prepared.eval())
        with torch.no_grad():
            assert (
                torch.equal(integers(x), prepared(x))
                and integers[0].packed is integers[1].packed
                and ((prepared(x) - model(x)).norm() / model(x).norm()) < 0.05
            )
    refuse(nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)), "0.weight has sparse gradients")


def test_one_number_an_example_chooses_no_class():
    data, model = Split(torch.ones(8, 4), torch.arange(8) % 2), nn.Linear(4, 1)
    with pytest.raises(ValueError, match="chooses no class"):
        accuracy(model, data)
    with pytest.raises(ValueError, match="always 0"):
        train(model, Split(data.x, data.y * 0), 1, progress=False)


@pytest.mark.parametrize("temperature", [1e30, 1e-30, math.inf, 0, -1, math.nan])
def test_temperatures_that_overflow(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        SoftTargets(temperature)


def test_hot_targets_are_half_the_variance():
    z, v = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    d = z - v
    assert SoftTargets(1e9)(Seen(z), Seen(v), None).item() == pytest.approx(
        float((d - d.mean(1, keepdim=True)).square().mean() / 2), rel=1e-4
    )


def test_a_teacher_keeps_its_own_state():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 2)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n += 1
            self.last = x
            return self.l(x)

    student, teacher, data = nn.Linear(4, 2), Counts(), Split(torch.ones(8, 4), torch.arange(8) % 2)
    with unchanged(teacher, data.x, data.y):
        distill(student, teacher, data, epochs=1, progress=False)


def test_fields_in_another_order_than_arguments_are_refused():
    import collections
    from modelzip.workshop.models import feed, labelled

    class Two(nn.Module):
        def forward(self, a, b):
            return a - b

    class Masks(nn.Module):
        def forward(self, x, *, mask=None):
            return x if mask is None else x * mask

    pair = lambda names: collections.namedtuple("Pair", names)(torch.ones(2), torch.zeros(2))
    assert torch.equal(feed(Two(), pair("a b")), torch.ones(2)) and torch.equal(
        feed(Two(), pair("left right")), torch.ones(2)
    )
    for model, names in (Two(), "b a"), (Masks(), "x mask"), (Masks(), "mask x"):
        with pytest.raises(ValueError, match="by its name or by its place"):
            feed(model, pair(names))
    assert torch.equal(feed(Masks(), pair("x y")), torch.ones(2)) and torch.equal(
        labelled(pair("labels x")).labels, torch.ones(2)
    )


def test_scripted_layers_are_refused_by_name():
    from modelzip.measure import macs

    with pytest.raises(ValueError, match="layer 0 is a torch.jit.ScriptModule"):
        macs(nn.Sequential(torch.jit.trace(nn.Linear(4, 2), torch.ones(1, 4))), torch.ones(1, 4))


def test_bits_and_levels_are_one_wish():
    with pytest.raises(ValueError, match="give one"):
        set_bits(prepare(nn.Linear(4, 2), 4, activations=None), 4, levels=5)
