"""Fixed ranges without training: integers that equal their simulation to the last bit, files, what is refused."""

import copy, math

import pytest
import torch
import torch.nn.functional as F
from guards import examples, seeded, unchanged
from torch import nn

from modelzip.data import Attention, LeNet5, TransformerBlock, mnist5k, train
from modelzip import ptq
from modelzip.integers import codes_of
from modelzip.kernels import QConv2d, QLinear, use_kernels
from modelzip.pack import load, save
from modelzip.qat import StaticConv2d, StaticLinear
from modelzip.quant import dequantize_model, quantize, quantize_layer
from modelzip.workshop.specimens import shuffle_unit
from modelzip.static import choose_static, quantize_static, split_codes
from modelzip.workshop.alternatives import places_of
from modelzip.workshop.halves import seen_in_halves
from modelzip.workshop.integer_attention import KEPT, STATIC_ATTENTION, StaticAttention, choose_attention, seen_products
from modelzip.workshop.models import Inputs
from modelzip.workshop.open_attention import OpenAttention, open_attention, opened
from modelzip.workshop.static_layers import static_codes
from modelzip.workshop.static_models import fold_all


def simulated(layer, x):
    "What a static layer should put out: its codes by plain arithmetic, sums in float64, one multiplication."
    q, s, z = layer.q, layer.input_scale, layer.input_zero_point
    across = (-1, *[1] * (x.dim() - 2)) if isinstance(layer, StaticConv2d) else (-1,)
    x = x.float()
    x = x if q.columns is None else x * q.columns.view(across)
    codes = codes_of(x, s, z, 255).double() - z
    steps = q.scale.float().view(-1, *[1] * (len(q.shape) - 1))
    w = q.unpack().double().view(q.shape) - (q.levels // 2)
    if isinstance(layer, StaticLinear):
        sums, out = F.linear(codes, w), steps.view(-1)
    else:
        conv = copy.deepcopy(layer.layer).double()
        conv.weight, conv.bias = nn.Parameter(w), None
        sums, out = conv(codes), steps.view(-1, 1, 1)
    y = sums.float() * (out * s)
    bias = layer.layer.bias
    return y if bias is None else y + bias.float().view([-1, 1, 1] if y.dim() > x.dim() - 1 and across[1:] else [-1])


def check_bits(static, x):
    "Every static layer of a model, on what it is given."
    seen = []
    for m in static.modules():
        if isinstance(m, (StaticLinear, StaticConv2d)):
            m.register_forward_hook(lambda m, args, y: seen.append((m, args[0].clone(), y.clone())))
    with torch.no_grad():
        static(x)
        assert seen
        for m, given, y in seen:
            assert torch.equal(y, simulated(m, given).to(given.dtype)), m


LAYERS = {
    "linear": (lambda: nn.Linear(37, 19), (7, 37)),
    "three axes": (lambda: nn.Linear(130, 70), (2, 5, 130)),
    "no bias": (lambda: nn.Linear(129, 65, bias=False), (3, 129)),
    "one output": (lambda: nn.Linear(5, 1), (4, 5)),
    "same": (lambda: nn.Conv2d(5, 7, 4, padding="same"), (2, 5, 9, 11)),
    "circular": (lambda: nn.Conv2d(16, 64, 3, padding=1, padding_mode="circular"), (2, 16, 9, 7)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", stride=2), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12), (2, 12, 6, 6)),
    "groups": (lambda: nn.Conv2d(32, 64, 3, padding=1, groups=2, dilation=2), (1, 32, 8, 8)),
}
INPUTS = {
    "both signs": lambda x: x,
    "negative": lambda x: -x.abs() - 0.5,
    "positive": lambda x: x.abs(),
    "zero": lambda x: x * 0,
    "one wild channel": lambda x: (
        x * torch.where(torch.arange(x.shape[1]) == 1, 90.0, 1.0).view(-1, *[1] * (x.dim() - 2))
    ),
}


@pytest.mark.parametrize("values", INPUTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_integers_equal_their_simulation(kind, values):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model, x = nn.Sequential(make()).eval(), INPUTS[values](torch.randn(shape))
    static = quantize_static(model, [x], overrides={"*": "static"})
    for given in (x, 3 * x, x.double(), x.bfloat16()):
        check_bits(static, given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 130), nn.GELU(), nn.Linear(130, 9)).to(dtype).eval(), torch.randn(20, 64)
    static = quantize_static(model, [x.to(dtype)])
    y = model(x.to(dtype))
    assert static(x.to(dtype)).dtype == dtype and (static(x.to(dtype)) - y).norm() < 0.05 * y.norm()


@pytest.fixture(scope="module")
def lenet():
    digits = mnist5k()
    return train(LeNet5(), digits.train, epochs=1, progress=False), digits


def test_lenet_keeps_its_accuracy_and_its_file(lenet, tmp_path):
    model, digits = lenet
    static = quantize_static(model, [digits.train.x[:128]])
    with torch.no_grad():
        right = lambda m: (m(digits.valid.x).argmax(1) == digits.valid.y).float().mean().item()
        assert right(static) > right(model) - 0.005
    save(static, tmp_path / "static.mz")
    back = load(tmp_path / "static.mz")
    assert torch.equal(back(digits.valid.x[:100]), static(digits.valid.x[:100]).detach())
    check_bits(back, digits.valid.x[:50])


def test_batchnorms_are_folded_first():
    torch.manual_seed(0)
    model, x = shuffle_unit()
    model.train()(x)  # gives the BatchNorm something to fold
    model.eval()
    static = quantize_static(model, [x])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in static.modules())
    with torch.no_grad():
        assert (static(x) - model(x)).norm() < 0.05 * model(x).norm()
    check_bits(static, x)


def test_layers_with_one_input_have_the_same_codes():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 130), nn.Linear(64, 70)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], -1)

    torch.manual_seed(0)
    static = quantize_static(Both().eval(), [torch.randn(90, 64) * torch.logspace(-1, 1, 64)])
    a, b = static.a, static.b
    assert (a.input_scale, a.input_zero_point) == (b.input_scale, b.input_zero_point)
    assert torch.equal(a.q.columns, b.q.columns)


def test_layers_whose_inputs_have_one_sum_but_not_one_range_have_steps_of_their_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 130), nn.Linear(8, 70)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(100 * x)], -1)

    x = torch.tensor([[1.0], [-1.0]]).repeat(32, 8)  # sums of zero, whatever it is multiplied with
    torch.manual_seed(0)
    model = Two().eval()
    static = quantize_static(model, [x, x])
    assert static.b.input_scale > 50 * static.a.input_scale
    with torch.no_grad():
        assert (static(x) - model(x)).norm() < 0.02 * model(x).norm()


def test_rows_are_kept_from_all_places_of_an_image(lenet):
    "LeNet-5's first convolution looks at 576 places: every 288th row is one of two, at the edge."
    model, digits = lenet
    seen = seen_in_halves(model, [digits.train.x[:256]], ["conv1"])["conv1"]
    assert seen.rows(0).mean() == pytest.approx(seen.statistics(0).mean.mean().item(), rel=0.2)


def test_rows_where_a_fixed_range_is_worse_than_the_limit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 130)).eval()
    x = torch.randn(200, 64) * torch.logspace(-2, 2, 200)[:, None]  # rows of very different size
    chosen = choose_static(model, [x], limit=0.0)
    assert chosen["0"].kind == "row" and chosen["0"].error < chosen["0"].other
    assert choose_static(model, [x], limit=1.0)["0"].kind == "static"
    assert choose_static(model, [x], overrides={"0": "row"})["0"].kind == "row"
    assert type(quantize_static(model, chosen=chosen)[0]) is QLinear


def test_what_is_refused():
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for how, says in (
        ({"observer": "median"}, "observer is 'median'"),
        ({"alphas": [2.0]}, "alphas has 2.0"),
        ({"limit": -1}, "limit is -1"),
        ({"limit": math.nan}, "limit is nan"),
        ({"overrides": {"fc": None}}, "'fc'"),
        ({"overrides": {"0": "float"}}, "'float'"),
        ({"overrides": {"*": None}}, "no layer"),
    ):
        with pytest.raises(ValueError, match=says):
            quantize_static(model, [x], **how)
    for batches in ([], [torch.full((2, 8), math.nan)], [torch.randn(2, 9)]):
        with pytest.raises(ValueError):
            quantize_static(model, batches)
    masked = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(masked[0])
    with pytest.raises(ValueError, match="layer 0"):
        quantize_static(masked, [x])
    with pytest.raises(ValueError, match="chosen has '7'"):
        quantize_static(model, chosen={"7": choose_static(model, [x])["0"]})
    with pytest.raises(TypeError, match="model is a list"):
        quantize_static([model], [x])


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    quantize_static(model, [x])
    assert model.training and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert type(model[0]) is nn.Conv2d and isinstance(fold_all(copy.deepcopy(model).eval())[1], nn.Identity)


@pytest.mark.parametrize("groups, channels, out", [(1, 8, 12), (2, 8, 12), (4, 8, 8), (8, 8, 8), (8, 8, 16)])
def test_column_scales_of_grouped_convolutions(groups, channels, out):
    "Right, or refused by name: by hand, by `smooth`, with kernels, and with ranges that are known beforehand."
    torch.manual_seed(0)
    x = torch.rand(4, channels, 7, 7) * torch.logspace(-1, 1, channels).view(1, -1, 1, 1)
    model = nn.Sequential(nn.Conv2d(channels, out, 3, groups=groups)).eval()
    right, layer = model(x), model[0]
    off = lambda y: ((y - right).norm() / right.norm()).item()
    small = ptq.smooth(model, ptq.calibrate(model, [x]))
    assert off(small(x)) < 0.02 and off(use_kernels(small)(x)) < 0.02
    assert off(quantize_static(model, [x])(x)) < 0.05
    columns = torch.rand(channels // groups) / 2 + 0.5
    q = quantize(layer.weight.detach(), 8, axis=0, columns=columns)
    peak = (x * columns.repeat(groups).view(1, -1, 1, 1)).max().item()
    for make in lambda: QConv2d(layer, q), lambda: StaticConv2d(layer, q, scale=peak / 255):
        try:
            new = make()
        except ValueError as e:
            assert "column scales would differ between its groups" in str(e) and groups > 1
        else:
            assert off(new(x)) < 0.05 and len(columns) == 1 or groups == 1


class Tied(nn.Module):
    "Two linear layers with one weight behind different inputs, and a head that has that of the table."

    def __init__(self, table):
        super().__init__()
        self.words, self.a, self.b, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        self.b.weight = self.a.weight
        if table:
            self.head.weight = self.words.weight

    def forward(self, i):
        return self.head(self.b(10 * self.a(self.words(i)).relu()))


@pytest.mark.parametrize("table", [False, True])
def test_tied_weights_are_treated_alike(table, tmp_path, recwarn):
    "Both users get the same codes, once in the file; or both stay, and a warning names them."
    torch.manual_seed(0)
    model, x = Tied(table).eval(), torch.arange(12).repeat(8).view(-1, 6)
    static = quantize_static(model, [x])
    assert type(static.a) is type(static.b) is StaticLinear and static.a.packed is static.b.packed
    assert static.a.input_scale != static.b.input_scale and static.a.q.columns is None
    said = [str(w.message) for w in recwarn if "stay" in str(w.message) or "as they are" in str(w.message)]
    assert (type(static.head) is nn.Linear) == table and said == [
        "quantize_static leaves these as they are: the weight of head is also that of words"
    ] * table
    assert table == (static.head.weight is static.words.weight if table else False)
    right = model(x)
    assert (static(x) - right).norm() < 0.03 * right.norm()
    save(static, tmp_path / "m.mz")
    back = load(tmp_path / "m.mz", Tied(table))
    assert back.a.packed is back.b.packed and torch.equal(back(x), static(x))
    for overrides in {"a": None}, {"b": None}:
        with pytest.raises(ValueError, match="has its weight"):
            quantize_static(model, [x], overrides=overrides)
    if table:
        with pytest.raises(ValueError, match="has its weight"):
            quantize_static(model, [x], overrides={"head": "static"})
    alone = quantize_static(model, [x], overrides={"[ab]": "row"} if table else {"[ab]": None})
    assert type(alone.a) is type(alone.b) is (QLinear if table else nn.Linear)


def outlier_net(seed=0):
    "Two layers with a GELU between; one hidden number is large, and so are its weights."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 24)).eval()
    with torch.no_grad():
        net[0].weight[7] *= 5
        net[2].weight[:, 7] *= 5
    return net, torch.randn(3000, 32)


def error(static, model, x):
    with torch.no_grad():
        return ((static(x) - model(x)).norm() / model(x).norm()).item()


@pytest.mark.parametrize("weights", ["gptq", "nearest"])
@pytest.mark.parametrize("copies", [4, 8, 32])
def test_copies_are_integers_as_simulated_and_go_through_a_file(copies, weights, tmp_path):
    model, x = outlier_net()
    static = quantize_static(model, [x[:2000]], copies=copies, weights=weights)
    assert (static[0].outputs, static[2].inputs) == (128 + copies, 128 + copies)
    assert error(static, model, x[2000:]) < error(quantize_static(model, [x[:2000]], copies=0), model, x[2000:])
    save(static, tmp_path / "copies.mz")
    back = load(tmp_path / "copies.mz", outlier_net()[0])
    assert torch.equal(back(x), static(x).detach())
    check_bits(back, x)


def test_shares_of_a_code_add_up_to_it():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        n = int(torch.randint(1, 9, (), generator=g))
        times = torch.randint(1, 12, (n,), generator=g)
        whole = (torch.rand(5, n, generator=g) * 2 - 1).mul(127 * times).round()
        shares, at = split_codes(whole, times), places_of(times)
        assert torch.equal(torch.zeros(5, n).index_add_(1, at, shares), whole)
        assert shares.abs().max() <= 127 and torch.equal(at.bincount(minlength=n), times)
        for j in range(n):
            assert shares[:, at == j].amax(1).sub(shares[:, at == j].amin(1)).max() <= 1


class Looks(nn.Module):
    "A feed-forward part, of which somebody else may look at the hidden numbers."

    def __init__(self, looks=lambda h, y: y, act=F.gelu):
        super().__init__()
        net, _ = outlier_net()
        self.up, self.down, self.looks, self.act = net[0], net[2], looks, act

    def forward(self, x):
        h = self.act(self.up(x))
        return self.looks(h, self.down(h))


def test_copies_are_made_only_where_nobody_else_reads():
    _, x = outlier_net()
    model = Looks().eval()
    static = quantize_static(model, [x])
    assert static.down.inputs == 136 and error(static, model, x) < 0.02
    readers = {
        "a mean": lambda h, y: y + h.mean(-1, keepdim=True),
        "a norm": lambda h, y: y * h.norm(dim=-1, keepdim=True),
        "a place": lambda h, y: y + h[..., 7:8],
        "an output": lambda h, y: (y, h)[0] + 0 * h.sum(),
        "a softmax": lambda h, y: y + h.softmax(-1)[..., :1],
    }
    for name, looks in readers.items():
        seen = Looks(looks).eval()
        static = quantize_static(seen, [x])
        assert (static.up.outputs, static.down.inputs) == (128, 128), name
        check_bits(static, x)
    for name, act in {
        "a softmax": lambda h: h.softmax(-1),
        "a norm": F.normalize,
        "a sort": lambda h: h.sort().values,
    }.items():
        static = quantize_static(Looks(act=act).eval(), [x])
        assert (static.up.outputs, static.down.inputs) == (128, 128), name


def test_who_has_a_hook_sees_what_he_saw_before():
    net, x = outlier_net()
    shapes = []
    net[1].register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    static = quantize_static(net, [x[:2000]])
    shapes.clear()
    static(x[:5])
    assert shapes == [(5, 128)]


def test_a_weight_that_is_not_finite_is_refused_by_name():
    net, x = outlier_net()
    with torch.no_grad():
        net[2].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="^2: .*infinite"):
        quantize_static(net, [x[:50]])


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_one_row_is_enough(rows):
    "The second half may have no row of its own."
    net, x = outlier_net()
    static = quantize_static(net, [x[:rows]])
    check_bits(static, x[:9])


def test_a_gate_makes_copies_in_both_of_its_layers():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            net, _ = outlier_net()
            self.gate, self.up, self.down = net[0], nn.Linear(32, 128), net[2]

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    model, (_, x) = Gated().eval(), outlier_net()
    static = quantize_static(model, [x])
    assert (static.gate.outputs, static.up.outputs, static.down.inputs) == (136, 136, 136)
    check_bits(static, x)
    assert error(static, model, x) < 0.03


def test_copies_of_a_chain():
    "A layer that makes copies and is given some."
    torch.manual_seed(0)
    parts = nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 24)
    model, x = nn.Sequential(*parts).eval(), torch.randn(3000, 32)
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight[7] *= 10
            model[i + 2].weight[:, 7] *= 10
    static = quantize_static(model, [x[:2000]])
    assert (static[2].inputs, static[2].outputs, static[4].inputs) == (136, 136, 136)
    check_bits(static, x)
    assert error(static, model, x) < 0.05


def test_options_do_what_they_say():
    model, x = outlier_net()
    chosen = lambda **how: choose_static(model, [x[:1000], x[1000:2000]], **how)
    assert all(f.at is None and not f.makers for f in chosen(copies=0).values())
    assert {f.weights for f in chosen(weights="nearest").values()} == {"nearest"}
    assert all(f.shift is None for f in chosen(biases=False).values())
    assert chosen(alphas=())["0"].columns is None
    everything = chosen()
    assert everything["2"].makers == {"0"} and "8 copies" in repr(everything)
    assert chosen(overrides={"0": None}).keys() == {"2"} and chosen(overrides={"0": None})["2"].at is None
    for how, says in (
        ({"copies": -1}, "copies is -1"),
        ({"copies": 2.0}, "copies is 2.0"),
        ({"weights": "hqq"}, "weights is 'hqq'"),
    ):
        with pytest.raises(ValueError, match=says):
            chosen(**how)
    no_bias = nn.Sequential(nn.Linear(32, 16, bias=False)).eval()
    assert quantize_static(no_bias, [x])[0].layer.bias is None


def test_what_was_chosen_for_another_model_is_refused():
    net, x = outlier_net()
    chosen = choose_static(net, [x[:1000], x[1000:2000]])
    assert chosen["2"].at is not None and quantize_static(net, chosen=chosen)(x).shape == net(x).shape
    wide, inputs = copy.deepcopy(net), net[2].in_features
    wide[2] = nn.Linear(len(chosen["2"].at), net[2].out_features)  # as wide as with copies
    for other in (wide, nn.Sequential(nn.Linear(3, inputs), nn.GELU(), net[2])):
        with pytest.raises(ValueError, match="^chosen was made for another model: the weight of"):
            quantize_static(other, chosen=chosen)
    other = copy.deepcopy(net)
    torch.nn.init.normal_(other[2].weight)
    with pytest.raises(ValueError, match="the weight of 2 has other values there"):
        quantize_static(other, chosen=chosen)
    with pytest.raises(ValueError, match="copies does not act: chosen is given"):
        quantize_static(net, chosen=chosen, copies=0)
    del chosen["0"]
    with pytest.raises(ValueError, match="chosen has no '0', which is to make copies for '2'"):
        quantize_static(net, chosen=chosen)


@pytest.mark.parametrize("training", [False, True])
def test_what_was_chosen_for_a_model_with_batchnorms_fits_it(training):
    torch.manual_seed(0)
    model, x = shuffle_unit()
    model.train()(x)
    model.train(training)
    static, direct = quantize_static(model, chosen=choose_static(model, [x])), quantize_static(model, [x])
    assert torch.equal(static(x), direct(x)) and model.training is training


def test_what_is_fitted_is_not_what_is_judged():
    "Noise in the first half alone: GPTQ and biases that learn it are not taken."
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(8, 64)
    chosen = choose_static(model, [x[:4], x[4:]])
    with torch.no_grad():
        fresh = torch.randn(2000, 64).clamp(-2, 2)
        plain = quantize_static(model, [x], weights="nearest", biases=False)
        assert error(quantize_static(model, chosen=chosen), model, fresh) < 1.2 * error(plain, model, fresh)


def test_copies_in_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    from modelzip.onnx_export import to_onnx

    model, x = outlier_net()
    static = quantize_static(model, [x[:2000]])
    assert static[2].inputs == 136
    path = to_onnx(static, tmp_path / "copies.onnx", x[:2])
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        assert (y - static(x)).norm() < 0.01 * y.norm()


class Branches(nn.Module):
    "What is positive goes one way, what is negative another."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.out(F.gelu((self.a if x.sum() >= 0 else self.b)(x)))


def kinds_of_calibration(x):
    "The same rows in batches of several kinds."
    return {
        "an empty batch between": [x[:8], x[:0], x[8:]],
        "empty ones around": [x[:0], x, x[:0]],
        "small last": [x[:15], x[15:]],
        "one row": [x[:1]],
        "one row and nothing": [x[:1], x[:0]],
    }


@pytest.mark.parametrize("kind", kinds_of_calibration(torch.zeros(16, 16)))
def test_choices_on_few_rows_hold_on_others(kind):
    "What is fitted is judged on other rows, or nothing is fitted: however the rows come, no choice costs much."
    torch.manual_seed(0)
    net, x, new = Branches().eval(), torch.randn(16, 16).abs(), torch.randn(500, 16).abs()
    batches = kinds_of_calibration(x)[kind]
    chosen, plain = (
        quantize_static(net, batches),
        quantize_static(net, batches, alphas=(), weights="nearest", biases=False),
    )
    assert error(chosen, net, new) < 1.6 * error(plain, net, new)


def test_a_layer_that_one_batch_reaches_is_judged_on_other_rows():
    torch.manual_seed(0)
    net, x = Branches().eval(), torch.randn(16, 16).abs()
    once = choose_static(net, [x, -x, x + 0.1, x])
    alone = choose_static(net, [-x])
    assert once["b"].alpha == alone["b"].alpha and once["b"].error == alone["b"].error > 0


def test_inputs_that_add_up_to_the_same_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x) + self.b(3 * x)

    torch.manual_seed(0)
    net, x = Two().eval(), torch.randn(32, 8)
    both = [torch.cat([x, -x])] * 2
    chosen = choose_static(net, both, alphas=())
    assert chosen["b"].scale == pytest.approx(3 * chosen["a"].scale)
    assert error(quantize_static(net, both), net, both[0]) < 0.02


# ---------------------------------------------------------------------------------- attention's own products


class Encoder(nn.Module):
    "One block, as in a sentence encoder."

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.block = TransformerBlock(width, heads, 2 * width)

    def forward(self, x, mask):
        return self.block(x, mask)


@pytest.fixture(scope="module")
def attentive():
    "Model, inputs of which some are padding and one is nothing else, and what was chosen."
    torch.manual_seed(0)
    model, x, mask = Encoder().eval(), torch.randn(6, 7, 24), torch.ones(6, 7, dtype=torch.bool)
    mask[0, 3:] = mask[1] = False
    chosen = choose_static(model, [Inputs(x[:3], mask[:3]), Inputs(x[3:], mask[3:])], attention=True)
    return model, x, mask, chosen


def products_simulated(m, q, k, v, mask):
    "What a static attention should put out: codes and sums as whole numbers in int64."
    codes = lambda t, step: (t.float() * (torch.tensor(1.0) / step)).round().clamp(-128, 127).long()
    sums = lambda a, b: torch.einsum("nhid,nhdj->nhij", a, b).float()
    scores = sums(codes(q, m.query_step), codes(k, m.key_step).mT) * (m.query_step * m.key_step * q.shape[-1] ** -0.5)
    added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
    p = (scores + added).softmax(-1).nan_to_num(0.0)  # a row without keys
    assert (p.masked_select((added == -math.inf).expand_as(p)) == 0).all()
    return sums((p * 255).round().long(), codes(v, m.value_step)) * (m.value_step / 255)


@pytest.mark.parametrize("kind", ["bool", "float", "wide heads", "half"])
def test_attention_in_integers_equals_its_simulation(kind):
    torch.manual_seed(0)
    width, heads = (2048, 1) if kind == "wide heads" else (24, 3)
    m = StaticAttention.of(Attention(width, heads).eval(), (0.02, 0.013, 0.007))
    m = m.bfloat16() if kind == "half" else m
    x, mask = torch.randn(4, 9, width), torch.rand(4, 9) > 0.4
    mask[1], mask[2] = False, True
    if kind == "float":
        mask = torch.randn(4, 9).masked_fill(~mask, -math.inf)
    seen = []
    m.query.register_forward_hook(lambda m, args, y: seen.append(y))
    with torch.no_grad():
        x = x.bfloat16() if kind == "half" else 3 * x
        parts = [m.split(layer(x)) for layer in (m.query, m.key, m.value)]
        across = mask[:, None, None, :]
        y, want = m.products(*parts, across), products_simulated(m, *parts, across)
        assert torch.equal(y, want.to(x.dtype)) and y.dtype == x.dtype
        assert not y[1].any() and torch.equal(m(x, mask), m.out(y.transpose(1, 2).flatten(2)))
        assert len(seen) == 2


def test_what_a_mask_hides_does_not_count(attentive):
    model, x, mask, chosen = attentive
    static = quantize_static(model, chosen=chosen)
    with torch.no_grad():
        y, exact = static(x, mask), model(x, mask)
        assert (y - exact).norm() < 0.02 * exact.norm()
        other = torch.cat([x[:, :3], 50 * x[:, 3:]], 1)
        assert torch.equal(static(other, mask)[0, :3], y[0, :3])
        broken = x.index_fill(0, torch.tensor([2]), math.inf)
        assert static(broken, mask)[2].isnan().all() and torch.equal(static(broken, mask)[3:], y[3:])
        added = torch.zeros(6, 7).masked_fill(~mask, -math.inf)
        assert torch.equal(static(x, added), y)
    loud = Inputs(torch.cat([x[:1, :3], 90 * x[:1, 3:]], 1), mask[:1])  # nor for a range
    ranges = choose_attention(model, [loud], {"block.attention": None})["block.attention"]
    calm = choose_attention(model, [Inputs(x[:1], mask[:1])], {"block.attention": None})["block.attention"]
    assert (ranges.key_step, ranges.value_step) == (calm.key_step, calm.value_step)


def test_attention_in_files_and_copies(attentive, tmp_path):
    model, x, mask, chosen = attentive
    static = quantize_static(model, chosen=chosen)
    assert "StaticAttention(\n      3 heads, int8×int8→int32" in repr(static)
    assert type(model.block.attention) is Attention and "block.attention" in repr(chosen)
    save(static, tmp_path / "a.mz")
    for other in load(tmp_path / "a.mz", Encoder()), copy.deepcopy(static):
        with torch.no_grad():
            assert torch.equal(other(x, mask), static(x, mask))
        assert type(other.block.attention) is StaticAttention
    again = dequantize_model(static)
    assert type(again.block.attention) is Attention and type(again.block.attention.query) is nn.Linear
    floats = quantize_static(model, chosen={"block.attention": chosen["block.attention"]})
    assert type(floats.block.attention.query) is nn.Linear
    again = dequantize_model(floats)
    with torch.no_grad():
        assert torch.equal(again(x, mask), model(x, mask))


def test_attention_where_it_fits_and_where_not(attentive):
    model, x, mask, chosen = attentive
    batch, here = Inputs(x, mask), "block.attention"
    plain = dict(alphas=(), copies=0, weights="nearest", biases=False)
    choose = lambda m=model, b=batch, **how: choose_static(m, [b], **plain | {"attention": True} | how)
    assert here not in choose_static(model, [batch], **plain) and here not in choose(overrides={here: None})
    assert chosen[here].kind == "static" and 0 < chosen[here].error < 0.1
    stays = choose(limit=chosen[here].error / 100)
    assert stays[here].kind == "float" and type(quantize_static(model, chosen=stays).block.attention) is Attention
    assert choose(limit=0.0, overrides={here: "static"})[here].kind == "static"
    with pytest.raises(ValueError, match="overrides gives block.attention 'row'"):
        choose(overrides={"block.*": "row"})
    for spoilt in ("yes", 1, None, []):
        with pytest.raises(ValueError, match="attention is "):
            choose(attention=spoilt)
    with pytest.raises(ValueError, match="has no modelzip.data.Attention"):
        choose(nn.Sequential(nn.Linear(24, 24)), x)
    odd = nn.Sequential(nn.MultiheadAttention(24, 3, add_zero_attn=True)).eval()
    with pytest.warns(UserWarning, match=r"in floats: 0 \(it adds keys of its own"):
        with pytest.raises(ValueError, match=r"that can be opened; it has 0 \(MultiheadAttention\)"):
            choose(odd, Inputs(x, x, x))
    with pytest.raises(ValueError, match="chosen has 'norm'"):
        quantize_static(model, chosen={"norm": chosen[here]})
    static = quantize_static(model, chosen={here: chosen[here]})
    for derive in (
        lambda: static(x, mask).sum().backward(),
        lambda: torch.func.jvp(lambda t: static(t, mask), (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="StaticAttention computes with integers and has no gradient"):
            derive()
    for spoilt in (math.nan, math.inf, 0.0, -1.0, "1", True):
        with pytest.raises(ValueError, match="key_step is"):
            StaticAttention(24, 3, 1.0, spoilt, 1.0)
    state = static.state_dict()
    with pytest.raises(ValueError, match="2 heads|3 heads"):
        StaticAttention(24, 2, 1.0, 1.0, 1.0).set_extra_state(state["block.attention._extra_state"])


@pytest.mark.parametrize("sizes", [(4, 0, 3), (4, 5, 0), (0, 5, 3)], ids=str)
def test_layers_without_numbers_stay_as_they_are(sizes):
    a, b, c = sizes
    model, x = nn.Sequential(nn.Linear(a, b), nn.Linear(b, c)).eval(), torch.randn(6, a)
    model = nn.ModuleDict({"empty": model, "full": nn.Linear(8, 8)})

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x, y):
            return self.parts["empty"](x), self.parts["full"](y)

    batch = Inputs(x, torch.randn(6, 8))
    static = quantize_static(Both().eval(), [batch, batch])
    kinds = [type(m) for m in static.parts["empty"]]
    assert type(static.parts["full"]) is StaticLinear
    assert kinds == [nn.Linear if not m.weight.numel() else StaticLinear for m in model["empty"]]
    with pytest.raises(ValueError, match="overrides gives parts.empty.* is empty"):
        quantize_static(Both().eval(), [batch], overrides={"parts.empty.*": "static"})


def test_a_script_module_is_named():
    scripted = torch.jit.script(nn.Linear(4, 4))
    for f in choose_static, quantize_static:
        for model, name in (scripted, "the model"), (nn.Sequential(nn.Linear(4, 4), scripted), "layer 1"):
            with pytest.raises(ValueError, match=f"^{name} is a torch.jit.ScriptModule"):
                f(model, [torch.randn(5, 4)])


def test_attention_is_judged_on_what_it_was_not_fitted_to():
    "Whatever the sizes of batches: a half has a quarter of the examples at least, and any example may be kept."
    torch.manual_seed(0)
    model = Encoder().eval()
    attention, x, mask = model.block.attention, torch.randn(200, 7, 24), torch.ones(200, 7, dtype=torch.bool)
    mask[:, 5:] = False
    for sizes in ([200], [100, 100], [199, 1], [1, 199], [50, 0, 50, 0, 100]):
        batches = [Inputs(a, m) for a, m in zip(x.split(sizes), mask.split(sizes))]
        (seen,) = seen_products(model, batches, ["block.attention"]).values()
        assert sum(seen.count) == 200 and min(seen.count) >= 50, sizes
        assert [len(k) for k in seen.kept] == [KEPT, KEPT] and all(len(set(d)) == KEPT for d in seen.drawn)
        q = attention.split(attention.query(x))
        at = sorted(
            next(i for i in range(200) if torch.allclose(q[i], k[0][0], atol=1e-5)) for h in seen.kept for k in h
        )
        assert len(set(at)) == 2 * KEPT and at[-1] - at[0] > 100, at  # not the first of each half
    (one,) = seen_products(model, [Inputs(x, mask[:1])], ["block.attention"]).values()  # one mask for all
    (all_,) = seen_products(model, [Inputs(x, mask)], ["block.attention"]).values()
    assert one.reach == all_.reach and one.error() == all_.error()
    (lone,) = seen_products(model, [Inputs(x[:1], mask[:1])], ["block.attention"]).values()
    assert lone.count == [1, 0] and 0 < lone.error() < 0.1


class Turns(nn.Module):
    "Of two attentions each is called with every other batch."

    def __init__(self):
        super().__init__()
        self.a, self.b = Attention(24, 3), Attention(24, 3)

    def forward(self, x, mask):
        return (self.a if x.shape[1] % 2 else self.b)(x, mask)


def test_attention_that_is_not_always_called_has_two_halves():
    torch.manual_seed(0)
    ones = lambda n: Inputs(torch.randn(4, n, 24), torch.ones(4, n, dtype=torch.bool))
    seen = seen_products(Turns().eval(), [ones(n) for n in (3, 4, 5, 6, 7, 8, 9, 10)], ["a", "b"])
    assert [s.count for s in seen.values()] == [[8, 8], [8, 8]]


def test_attention_chosen_for_another_model_is_refused(attentive):
    model, x, mask, chosen = attentive
    here = {"block.attention": chosen["block.attention"]}
    other = Encoder().eval()
    with pytest.raises(ValueError, match="the layers of block.attention have other values"):
        quantize_static(other, chosen=here)
    other.load_state_dict(model.state_dict())
    assert torch.equal(quantize_static(other, chosen=here)(x, mask), quantize_static(model, chosen=here)(x, mask))


# ---------------------------------------------------------------------------------- attentions of PyTorch's own


def attention_call(rng):
    "An attention of PyTorch's, and what it is called with: every width, order of axes, mask and flag, by chance."
    pick, heads = rng.choice, rng.choice([1, 2, 3])
    width, n, queries = heads * pick([2, 5]), pick([1, 2, 4]), pick([1, 3, 6])
    alone, first, bias, itself = pick([0, 0, 1]), pick([True, False]), pick([True, False]), pick([True, False])
    keys = queries if itself else pick([1, 2, 7])
    kdim, vdim = (None, None) if itself else (pick([None, 4]), pick([None, 3]))
    m = nn.MultiheadAttention(width, heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=first).eval()
    shape = lambda places, w: (places, w) if alone else (n, places, w) if first else (places, n, w)
    x = torch.randn(shape(queries, width))
    args = (
        (x, x, x) if itself else (x, torch.randn(shape(keys, kdim or width)), torch.randn(shape(keys, vdim or width)))
    )
    hides = lambda *shape: (torch.rand(shape) > 0.6).index_fill(-1, torch.tensor([0]), False)  # one key is always seen
    as_numbers = lambda m, kind: m if kind == "bool" else torch.randn(m.shape).masked_fill(m, -math.inf)
    kinds, how = [pick([None, "bool", "float"]) for _ in range(2)], {}
    if None not in kinds:
        kinds[1] = kinds[0]  # PyTorch warns of two kinds
    if kinds[0]:
        how["key_padding_mask"] = as_numbers(hides(keys) if alone else hides(n, keys), kinds[0])
    if kinds[1]:
        several = (heads if alone else n * heads,) * pick([0, 1])
        how["attn_mask"] = as_numbers(hides(*several, queries, keys), kinds[1])
    how |= dict(need_weights=pick([True, False]), average_attn_weights=pick([True, False]))
    return m, args, how


@pytest.mark.hypothesis
@pytest.mark.parametrize("seed", range(examples(60)))
def test_an_opened_attention_answers_as_before(seed):
    torch.manual_seed(seed)
    m, args, how = attention_call(seeded(seed))
    new = opened(m)
    for grad in False, True:
        with torch.set_grad_enabled(grad), unchanged(m, *args):
            was, now = m(*args, **how), new(*args, **how)
        torch.testing.assert_close(now[0], was[0], atol=2e-5, rtol=1e-4)
        assert (now[1] is None) == (was[1] is None)
        if now[1] is not None:
            torch.testing.assert_close(now[1], was[1], atol=2e-5, rtol=1e-4)
    static = STATIC_ATTENTION[OpenAttention].of(new, (0.03, 0.03, 0.03))
    with torch.no_grad():
        y, p = static(*args, **how)
    assert (y - was[0]).norm() < 0.1 * was[0].norm() + 0.1 and (p is None or (p - was[1]).abs().max() < 0.15)
    other = STATIC_ATTENTION[OpenAttention](8, new.heads, 1.0, 1.0, 1.0)
    other._modules = new._modules
    other.load_state_dict(static.state_dict())
    assert (other.batch_first, other.steps) == (m.batch_first, static.steps)


def test_dropout_of_an_opened_attention():
    torch.manual_seed(0)
    m = nn.MultiheadAttention(8, 2, dropout=0.5)
    new, x = opened(m), torch.randn(5, 3, 8)
    assert new.training and not torch.equal(new(x, x, x)[0], new(x, x, x)[0])
    assert torch.equal(new.eval()(x, x, x)[0], new(x, x, x)[0])
    new(x, x, x)[0].sum().backward()
    assert all(p.grad is not None for p in new.parameters()) and m.in_proj_weight.grad is None


def half_compressed():
    m = nn.MultiheadAttention(8, 2)
    m.out_proj = quantize_layer(m.out_proj, 8)
    return m


CLOSED = {
    "adds keys": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "adds keys of its own"),
    "adds zeros": (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "adds keys of its own"),
    "another class": (lambda: type("Mine", (nn.MultiheadAttention,), {})(8, 2), "it is a Mine"),
    "compressed": (
        lambda: quantize_layer(nn.MultiheadAttention(8, 2), 8),
        "0.layer: its weights are compressed already",
    ),
    "half compressed": (half_compressed, "its out_proj is no ordinary layer"),
}


@pytest.mark.parametrize("name", CLOSED)
def test_what_cannot_be_opened_says_why(name):
    make, why = CLOSED[name]
    with pytest.raises(ValueError, match=why):
        open_attention(nn.Sequential(make()).eval())
    m = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)).eval()
    m[0].self_attn = nn.utils.parametrizations.weight_norm(m[0].self_attn, "in_proj_weight")
    with pytest.raises(ValueError, match="in_proj_weight .*parametri"):
        open_attention(m)


class Translator(nn.Module):
    "Encoder and decoder of PyTorch's own, with masks."

    def __init__(self, first=True):
        super().__init__()
        how = dict(dim_feedforward=48, batch_first=first, activation="gelu")
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, **how), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 2, **how), 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x, y, hidden, later):
        z = self.encoder(x, src_key_padding_mask=hidden)
        return self.head(self.decoder(y, z, tgt_mask=later, memory_key_padding_mask=hidden))


@pytest.mark.parametrize("first", [True, False])
def test_transformers_of_pytorch_in_integers(first, tmp_path):
    "Every linear layer and every product of attention; files, copies, the way back."
    torch.manual_seed(0)
    model = Translator(first).eval()
    turn = lambda t: t if first else t.transpose(0, 1)
    hidden = torch.zeros(6, 7, dtype=torch.bool)
    hidden[0, 4:] = True
    batch = lambda: Inputs(
        turn(torch.randn(6, 7, 24)), turn(torch.randn(6, 5, 24)), hidden, torch.ones(5, 5).triu(1).bool()
    )
    data, fresh = [batch(), batch()], batch()
    with unchanged(model):
        chosen = choose_static(model, data, attention=True, alphas=(0.5,), copies=0)
        static = quantize_static(model, chosen=chosen)
    kinds = [type(m).__name__ for m in static.modules()]
    assert kinds.count("StaticLinear") == 4 * 4 + 2 * 3 + 1 and kinds.count("StaticOpenAttention") == 4
    with torch.no_grad():
        y, exact = static(*fresh.args), model(*fresh.args)
        assert (y - exact).norm() < 0.06 * exact.norm()
        save(static, tmp_path / "a.mz")
        for other in load(tmp_path / "a.mz", Translator(first)), copy.deepcopy(static):
            assert torch.equal(other(*fresh.args), y)
        again = dequantize_model(static)
        assert [type(m) for m in again.modules()].count(OpenAttention) == 4
        floats = quantize_static(
            model, chosen={n: f for n, f in chosen.items() if type(f).__name__ == "FixedAttention"}
        )
        again = dequantize_model(floats)
        torch.testing.assert_close(again(*fresh.args), exact, atol=1e-4, rtol=1e-4)
        save(again, tmp_path / "b.mz")
        assert torch.equal(load(tmp_path / "b.mz", Translator(first))(*fresh.args), again(*fresh.args))
    alone = choose_static(model, data, attention=True, alphas=(), overrides={"encoder.layers.0.self_attn": None})
    kept = quantize_static(model, chosen=alone)
    assert type(kept.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert type(kept.encoder.layers[0].linear1) is nn.Linear and type(kept.encoder.layers[1].linear1) is StaticLinear


@pytest.mark.filterwarnings("ignore:.*nested")
def test_an_encoder_that_puts_out_zeros_stays_closed():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True), 1).eval()
    hidden = torch.zeros(6, 7, dtype=torch.bool)
    hidden[0, 4:] = True
    batch = dict(src=torch.randn(6, 7, 24), src_key_padding_mask=hidden)
    with (
        pytest.warns(UserWarning, match="use_nested_tensor to False first"),
        pytest.raises(ValueError, match="can be opened"),
    ):
        choose_static(model, [batch], attention=True)
    model.use_nested_tensor = False
    static = quantize_static(model, [batch], attention=True, alphas=())
    with torch.no_grad():
        exact = model(**batch)
        assert (static(**batch) - exact).norm() < 0.05 * exact.norm()


def test_what_was_chosen_for_another_model_is_refused_by_name():
    torch.manual_seed(0)
    net = lambda *sizes: nn.Sequential(nn.Linear(16, sizes[0]), nn.GELU(), nn.Linear(sizes[0], 4)).eval()
    model, x = net(32), torch.randn(16, 16)
    chosen = choose_static(model, [x, x + 0.1])
    check_bits(quantize_static(model, chosen=chosen), x)
    for other, error, said in (
        (net(8), ValueError, r"the weight of 0 is \[32, 16\] there, and \[8, 16\] here"),
        (nn.Sequential(nn.Conv2d(16, 32, 1), nn.GELU(), nn.Linear(32, 4)), ValueError, "the weight of 0 is"),
        (model[:1], ValueError, "has '2', and model has no"),
    ):
        with pytest.raises(error, match=said):
            quantize_static(other, chosen=chosen)
    for junk in ({"0": 3}, {"0": None}, [1], "0"):
        with pytest.raises(TypeError, match="choose_static|chosen"):
            quantize_static(model, chosen=junk)
    wide, x = outlier_net()
    chosen = choose_static(wide, [x[:1000], x[1000:2000]])
    assert chosen["2"].makers == {"0"}
    del chosen["0"]
    with pytest.raises(ValueError, match="chosen has no '0', which is to make copies for '2'"):
        quantize_static(wide, chosen=chosen)


def test_simulation_rounds_in_one_step():
    "Near a tie the sum of product and zero point decides, rounded once: as the kernel does, at every place of a tensor."
    x, scale, zero = -0.04441395401954651, 0.0014099668054019703, 92
    for n in (1, 7, 16, 33, 100):
        assert static_codes(torch.full((n,), x), scale, zero).unique().tolist() == [61]
        assert codes_of(torch.full((n,), x), scale, zero, 255).unique().tolist() == [61]
