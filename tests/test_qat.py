"""Training through rounding: gradients against PyTorch's own, and integers that put out the same bits as the model
that was trained."""

import copy, math, threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from guards import FUZZ
from modelzip.integers import codes_of
from modelzip.data import LeNet5, accuracy, digits, train
from modelzip.pack import load, save
from modelzip.qat import (
    ActivationQuantizer,
    FakeQuantized,
    StaticConv2d,
    StaticLinear,
    WeightQuantizer,
    convert,
    freeze,
    prepare,
    set_bits,
    static_codes,
    straight_through,
)
from modelzip.quant import quantize_model


class Convolutions(nn.Module):
    """What a convolution can look like: normalized, strided, dilated, grouped, depthwise, padded in odd ways, with
    a residual."""

    def __init__(self, width=32):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.deep, self.norm2 = nn.Conv2d(width, width, 3, padding="same", groups=width), nn.BatchNorm2d(width)
        self.wide, self.odd = (
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.Conv2d(width, width, (2, 3), padding="same", padding_mode="circular", groups=2),
        )
        self.head = nn.Linear(width, 700)

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        x = x + F.leaky_relu(self.norm2(self.deep(x)), 0.2)
        return self.head(self.odd(self.wide(x)).mean((2, 3)))


class Tokens(nn.Module):
    "Embedding, normalization, attention, and an output layer that is tied to the embedding."

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(300, 64), nn.LayerNorm(64)
        self.attention, self.up, self.down = (
            nn.MultiheadAttention(64, 4, batch_first=True),
            nn.Linear(64, 256),
            nn.Linear(256, 64),
        )
        self.out = nn.Linear(64, 300, bias=False)
        self.out.weight = self.words.weight

    def forward(self, i):
        x = self.norm(self.words(i))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(x + self.down(F.gelu(self.up(x))))


def images(n=16, seed=0):
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def words(n=8, seed=0):
    return torch.randint(0, 300, (n, 7), generator=torch.Generator().manual_seed(seed))


def digits28(n=16, seed=0):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


MODELS = {"convolutions": (Convolutions, images), "tokens": (Tokens, words), "LeNet-5": (LeNet5, digits28)}


def a_model(name):
    torch.manual_seed(0)
    make, data = MODELS[name]
    return make(), data


def train_some(model, data, steps=3, lr=1e-3):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for i in range(steps):
        y = model(data(16, i + 1))
        (y - y.detach().roll(1, 0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


WIDTHS = [(1, 8), (2, 4), (4, 8), (8, 8), (8, 5)]


@pytest.mark.hypothesis  # so that a search comes here: all widths of every model
@pytest.mark.parametrize(
    "name, bits, activations",
    [(n, *w) for i, n in enumerate(MODELS) for j, w in enumerate(WIDTHS) if FUZZ or (i + j) % 2 == 0],
)
def test_integers_equal_what_was_trained_bit_for_bit(name, bits, activations):
    model, data = a_model(name)
    trained = train_some(prepare(model, bits, activations), data)
    integers, x = convert(trained), data(24, 99)
    with torch.no_grad():
        assert torch.equal(integers(x), trained(x))
    kinds = [type(m) for m in integers.modules()]
    assert (
        kinds.count(StaticLinear) + kinds.count(StaticConv2d)
        == sum(isinstance(m, FakeQuantized) for m in trained.modules())
        > 0
    )
    assert not any(isinstance(m, (nn.BatchNorm2d, FakeQuantized, WeightQuantizer)) for m in integers.modules())


def test_kernels_equal_their_emulation():
    model, data = a_model("convolutions")
    integers = convert(train_some(prepare(model, 8), data))
    x = data(16, 5)
    with torch.no_grad():
        expected = integers(x)
        ran = {m.kernel for m in integers.modules() if isinstance(m, (StaticLinear, StaticConv2d))}
        for m in integers.modules():
            if isinstance(m, (StaticLinear, StaticConv2d)):
                m.kernel = "plain"
        assert torch.equal(integers(x), expected)
    assert "plain" in ran or {"onednn", "int8"} & ran


def test_a_long_sum_beyond_float32_is_still_exact():
    torch.manual_seed(0)
    model = nn.Linear(4096, 16)
    model.weight.data.fill_(0.5).add_(torch.rand(16, 4096) * 0.01)
    trained = prepare(model, 8)
    trained(torch.rand(8, 4096) + 1)  # sums of about 4096 · 127 · 200 > 2^24
    x = torch.rand(4, 4096) + 1
    with torch.no_grad():
        assert torch.equal(convert(trained)(x), trained.eval()(x))


def test_layers_that_the_kernels_cannot_take_keep_their_activations():
    model, data = a_model("tokens")
    prepared = prepare(model, 4)
    assert isinstance(prepared.attention.out_proj, nn.Linear) and parametrize.is_parametrized(
        prepared.attention.out_proj, "weight"
    )
    assert parametrize.is_parametrized(prepared.words, "weight")
    assert prepared.words.parametrizations.weight[0] is prepared.out.weights, "tied weights share one quantizer"
    integers = convert(train_some(prepared, data))
    assert integers.words.packed is integers.out.packed


@pytest.mark.parametrize("name", MODELS)
def test_files_give_back_the_same_bits(name, tmp_path):
    model, data = a_model(name)
    integers = convert(train_some(prepare(model, 4), data))
    again = load(save(integers, tmp_path / "m.mz"), integers)
    x = data(8, 7)
    with torch.no_grad():
        assert torch.equal(again(x), integers(x))
    assert [m.options() for m in again.modules() if isinstance(m, StaticLinear)] == [
        m.options() for m in integers.modules() if isinstance(m, StaticLinear)
    ]


def test_lenet_loads_with_nothing_else_at_hand(tmp_path):
    model, data = a_model("LeNet-5")
    integers = convert(train_some(prepare(model, 2), data))
    again = load(save(integers, tmp_path / "m.mz"))
    with torch.no_grad():
        assert torch.equal(again(data(8)), integers(data(8)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0},
        {"scale": -1.0},
        {"scale": "1"},
        {"scale": 1e999},
        {"zero_point": 256},
        {"zero_point": 1.5},
        {"zero_point": True},
        {"levels": 1},
        {"levels": 1 << 20},
    ],
    ids=lambda w: "-".join(f"{k}={v}" for k, v in w.items()),
)
def test_hostile_options_are_refused(wrong):
    layer = nn.Linear(4, 4)
    q = quantize_model(layer, 4).q
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StaticLinear(layer, q, **({"scale": 1.0, "zero_point": 0} | wrong))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_gradients_equal_pytorchs_learnable_quantizer(bits):
    torch.manual_seed(bits)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    w, scale = torch.randn(6, 50) * 3, torch.rand(6) + 0.2
    ratio = w / scale[:, None]
    w = torch.where(
        (ratio > low) & (ratio < high) | (ratio.abs() > high + 2), w, 0.0
    )  # see the chapter: half a step beyond the last code
    pull = torch.randn(6, 50)
    ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    quantizer = WeightQuantizer(w, 1 << bits, axis=0)
    quantizer.scale.data.copy_(scale)
    (quantizer(ours) * pull).sum().backward()
    s = scale.clone().requires_grad_()
    factor = 1 / math.sqrt(50 * max(high, 1))
    (
        torch._fake_quantize_learnable_per_channel_affine(theirs, s, torch.zeros(6), 0, low, high, factor) * pull
    ).sum().backward()
    torch.testing.assert_close(quantizer.scale.grad, s.grad, rtol=1e-4, atol=1e-5)
    inside = (ratio > low) & (ratio < high)
    torch.testing.assert_close(ours.grad[inside], theirs.grad[inside])
    assert (ours.grad[ratio.abs() > high + 2] == 0).all()


def test_activation_gradients_equal_held_rounding():
    "The rounding error is held while step and zero point move a little; that function is smooth."
    torch.manual_seed(0)
    x, s0, z0, top, h = torch.randn(500, dtype=torch.float64) * 2, 0.21, 7.0, 15, 1e-6
    quantizer = ActivationQuantizer(4)
    quantizer.set_range(-z0 * s0, (top - z0) * s0)
    s0 = quantizer.scale.item()
    offset = (x / s0).round() - x / s0
    code = x / s0 + z0

    def held(s, z):
        return torch.where(code > top, (top - z) * s, torch.where(code < 0, -z * s, s * (x / s + offset))).sum().item()

    quantizer.eval()(x.float()).sum().backward()
    factor = 1 / math.sqrt(15)
    assert quantizer.scale.grad.item() == pytest.approx(
        (held(s0 + h, z0) - held(s0 - h, z0)) / (2 * h) * factor, rel=1e-2, abs=0.5
    )
    assert quantizer.zero_point.grad.item() == pytest.approx((held(s0, z0 + h) - held(s0, z0 - h)) / (2 * h), rel=1e-3)


@pytest.mark.parametrize("channels", [2, 15, 16, 31, 32, 64, 256])
def test_the_first_range_is_that_of_all_channels(channels):
    "A batch of a million numbers is sampled; each channel is in the sample, whatever their number."
    torch.manual_seed(0)
    x = torch.rand((1 << 20) // channels, channels)
    for wide in range(0, channels, -(-channels // 3)):
        one = x.clone()
        one[:, wide] *= 100
        quantizer = ActivationQuantizer(8)
        quantizer.train()(one)
        reach = quantizer.scale.item() * (255 - quantizer.zero_point.item())
        assert 60 < reach < 101, wide


def test_straight_through_is_exact():
    value, smooth = torch.tensor([1e8, 1 / 3]), torch.tensor([1.0, 2.0], requires_grad=True)
    y = straight_through(value, smooth)
    assert torch.equal(y.detach(), value)
    y.sum().backward()
    assert torch.equal(smooth.grad, torch.ones(2))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 0.7, 1e20])
@pytest.mark.parametrize("zero_point,levels", [(0, 256), (128, 256), (7, 16), (255, 256)])
def test_static_codes_against_plain_arithmetic(scale, zero_point, levels):
    zero_point = min(zero_point, levels - 1)
    torch.manual_seed(0)
    x = torch.cat([torch.randn(2000) * scale * levels, torch.tensor([0.0, 3e38, -3e38, scale / 3])])
    codes = static_codes(x, scale, zero_point, levels)
    ideal = x.double() / torch.tensor(scale).double() + zero_point
    inside = ideal.clamp(0, levels - 1)
    assert codes.dtype == torch.uint8 and (codes.double() - inside).abs().max() <= 0.5001
    assert codes[2000] == zero_point and codes[2001] == levels - 1 and codes[2002] == 0
    assert torch.equal(
        codes, codes_of(x.clamp(-scale * 2.0**22, scale * 2.0**22), scale, zero_point, 255).clamp(max=levels - 1)
    )


# ---------------------------------------------------------------- BatchNorm, masks, widths


def test_folding_in_eval_mode_is_the_same_function():
    model, data = a_model("convolutions")
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            (
                nn.init.uniform_(m.weight, 0.5, 2),
                nn.init.normal_(m.bias),
                nn.init.normal_(m.running_mean),
                nn.init.uniform_(m.running_var, 0.5, 2),
            )
    prepared = prepare(model, 8, batches=[data(64)]).eval()
    assert isinstance(prepared.norm1, nn.Identity) and isinstance(prepared.norm2, nn.Identity)
    with torch.no_grad():
        y, exact = prepared(data()), model.eval()(data())
    assert ((y - exact).norm() / exact.norm()).item() < 0.05
    assert isinstance(model.norm1, nn.BatchNorm2d) and type(model.first) is nn.Conv2d, (
        "the model itself is left as it is"
    )


def test_batch_statistics_are_those_of_batchnorm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3))
    prepared, usual = prepare(model, 8, learn=False), copy.deepcopy(model)
    for i in range(4):
        prepared.train()(images(16, i))
        usual.train()(prepared[0].activations.eval()(images(16, i)))
        prepared.train()
    torch.testing.assert_close(prepared[0].norm.running_mean, usual[1].running_mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prepared[0].norm.running_var, usual[1].running_var, rtol=1e-2, atol=1e-3)
    freeze(prepared)
    kept = prepared[0].norm.running_mean.clone()
    prepared.train()(images(16, 9) + 5)
    assert torch.equal(prepared[0].norm.running_mean, kept) and not prepared[0].activations.scale.requires_grad


def test_a_normalization_that_others_read_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert prepare(Twice()).conv.norm is None and isinstance(prepare(Twice()).norm, nn.BatchNorm2d)


def test_masked_weights_stay_zero():
    model, data = a_model("LeNet-5")
    mask = (torch.rand(500, 800) > 0.9).float()

    class Mask(nn.Module):
        def forward(self, w):
            return w * mask

    parametrize.register_parametrization(model.fc1, "weight", Mask())
    trained = train_some(prepare(model, 4), data)
    integers = convert(trained)
    with torch.no_grad():
        assert torch.equal(integers(data()), trained(data()))
    assert integers.fc1.weight[mask == 0].abs().max() == 0
    assert type(integers.fc1.layer) is nn.Linear
    assert parametrize.is_parametrized(model.fc1, "weight") and model.fc1.weight.shape == (500, 800), (
        "the model itself still works"
    )


def test_progressive_widths():
    model, data = a_model("LeNet-5")
    prepared = train_some(prepare(model, 8), data)
    optimizer_sees = {id(p) for p in prepared.parameters()}
    for bits in (4, 2):
        set_bits(prepared, bits)
        train_some(prepared, data)
        assert {m.weights.levels for m in prepared.modules() if isinstance(m, FakeQuantized)} == {1 << bits}
    assert {id(p) for p in prepared.parameters()} == optimizer_sees, "an optimizer goes on with the same parameters"
    before = prepared.fc1.activations.scale.item() * 255
    set_bits(prepared, activations=4, layers="fc*")
    assert (
        prepared.fc1.activations.scale.item() * 15 == pytest.approx(before) and prepared.conv1.activations.levels == 256
    )
    with torch.no_grad():
        assert torch.equal(convert(prepared)(data()), prepared.eval()(data()))


def test_training_recovers_what_rounding_lost():
    data = digits()

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    torch.manual_seed(0)
    model = train(Net(), data.train, epochs=15, lr=1e-2, progress=False)
    crude = accuracy(quantize_model(model, 1), data.valid)
    better = accuracy(convert(train(prepare(model, 1), data.train, epochs=15, lr=1e-2, progress=False)), data.valid)
    assert better > crude + 0.02 and better > accuracy(model, data.valid) - 0.05


# ---------------------------------------------------------------- as a module


@pytest.fixture(scope="module")
def integers():
    model, data = a_model("convolutions")
    return convert(train_some(prepare(model, 4), data))


def test_copies_threads_and_layouts(integers):
    x = images()
    with torch.no_grad():
        y = integers(x)
        assert torch.equal(copy.deepcopy(integers)(x), y)
        assert torch.equal(integers.train().eval()(x), y)
        assert torch.equal(integers(x.to(memory_format=torch.channels_last)), y)
        assert integers(x[:0]).shape == (0, 700)
        torch.testing.assert_close(integers(x[:1])[0], y[0], rtol=1e-4, atol=1e-4)
        got = [None] * 4

        def work(i):
            got[i] = integers(x)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(torch.equal(g, y) for g in got)


def test_half_precision_and_nan(integers):
    layer, x = integers.head, torch.rand(4, 32)
    assert layer(x.half()).dtype == torch.float16
    x[1, 3] = math.nan
    with torch.no_grad():
        y = layer(x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all(), "a row with NaN says so, the others are as they were"
    with torch.no_grad():
        assert torch.equal(y[[0, 2, 3]], layer(x[[0, 2, 3]]))


def test_compiled_is_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 5))
    integers = convert(
        train_some(prepare(model), lambda n, seed=0: torch.randn(n, 40, generator=torch.Generator().manual_seed(seed)))
    )
    x = torch.randn(9, 40)
    with torch.no_grad():
        assert torch.equal(torch.compile(integers, backend="aot_eager", fullgraph=True)(x), integers(x))


def test_prepared_models_copy_and_restore():
    model, data = a_model("convolutions")
    prepared = train_some(prepare(model, 4), data)
    other = prepare(a_model("convolutions")[0], 4)
    other.load_state_dict(prepared.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(data()), prepared(data())) and torch.equal(
            copy.deepcopy(prepared)(data()), prepared(data())
        )


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "how,says",
    [
        (dict(bits=0), "bits is 0"),
        (dict(bits=9), "bits is 9"),
        (dict(activations=3), "activations is 3"),
        (dict(activations=9), "activations is 9"),
        (dict(levels=1), "levels is 1"),
        (dict(group=16), "group=16"),
        (dict(overrides={"nope": {}}), "'nope'"),
        (dict(overrides={"*": None}), "leaves no layer"),
        (dict(batches=[]), "no data"),
        (dict(batches=[torch.full((2, 1, 28, 28), math.nan)]), "NaN"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_what_prepare_refuses(how, says):
    with pytest.raises(ValueError, match=says):
        prepare(LeNet5(), **how)


def test_other_errors():
    with pytest.raises(TypeError, match="model is 'LeNet5'; it may be an nn.Module"):
        prepare("LeNet5")
    with pytest.raises(ValueError, match="no layer"):
        prepare(nn.ReLU())
    with pytest.raises(ValueError, match="already"):
        prepare(quantize_model(LeNet5(), 4))
    with pytest.raises(ValueError, match="never seen"):
        convert(prepare(LeNet5()))
    with pytest.raises(ValueError, match="layer conv1: the range"):
        prepare(LeNet5()).eval()(digits28())
    with pytest.raises(ValueError, match="layer fc1: .*NaN"):
        model = prepare(LeNet5(), batches=[digits28()])
        model.conv2.layer.bias.data.fill_(math.nan)
        model(digits28())
    with pytest.raises(ValueError, match="not prepared"):
        freeze(LeNet5())
