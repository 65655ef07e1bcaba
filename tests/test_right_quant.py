"""Quantized layers and models: what runs depends on the codes alone, equals the model with these numbers put in, or
is refused by name."""

import copy, functools, io, math, warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from guards import FUZZ, codes_alone, conv1d, examples, unchanged
from modelzip import quant
from modelzip.rounding import OBSERVERS
from modelzip.workshop import bites
from modelzip.workshop.floats import all_finite
from modelzip.quant import (
    MATRICES,
    Dequantize,
    QTensor,
    choose_matrices,
    dequantize_layer,
    dequantize_model,
    floats_left,
    layers_of,
    matrices_of,
    quantize,
    quantize_layer,
    quantize_model,
    unwrapped,
)

r, ids = lambda *shape: torch.randn(shape, generator=torch.manual_seed(0)), torch.arange(6).reshape(2, 3)

LAYERS = {  # layer, arguments
    "Linear": (lambda: nn.Linear(6, 5), (r(3, 6),)),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 5), (r(2, 3), r(2, 4))),
    "Embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), (ids,)),
    "Embedding with max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), (ids,)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 4), (ids,)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (r(2, 4, 7),)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (r(2, 3, 5, 5),)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (r(1, 2, 3, 3, 3),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (r(2, 4, 7),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (r(2, 3, 5, 5),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (r(1, 2, 3, 3, 3),)),
    "LSTM": (lambda: nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True, proj_size=3), (r(2, 3, 4),)),
    "GRU": (lambda: nn.GRU(4, 5, bias=False), (r(3, 2, 4),)),
    "RNN": (lambda: nn.RNN(4, 5), (r(3, 2, 4),)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 5), (r(2, 4),)),
    "GRUCell": (lambda: nn.GRUCell(4, 5), (r(2, 4),)),
    "RNNCell": (lambda: nn.RNNCell(4, 5), (r(2, 4),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2), (r(3, 2, 8),) * 3),
    "MultiheadAttention with kdim": (
        lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True),
        (r(3, 2, 8), r(3, 2, 5), r(3, 2, 6)),
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), (r(3, 2, 8),)),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(8, 2, 16), (r(3, 2, 8), r(4, 2, 8))),
    "Conv1D": (lambda: conv1d(5, 6), (r(3, 6),)),
}
OPTIONS = [
    dict(bits=8),
    dict(bits=3, group=4),
    dict(bits=1),
    dict(bits=4, symmetric=False),
    dict(bits=4, per_channel=False, observer="mse"),
    dict(codebook="nf4", group=8),
    dict(bits=2, codebook="kmeans"),
    dict(levels=3),
    dict(step=0.1),
]


def make(name):
    build, args = LAYERS[name]
    torch.manual_seed(1)
    return build().eval(), args


def assert_same(a, b, **tolerance):
    for x, y in zip(*map(torch.utils._pytree.tree_leaves, (a, b))):
        torch.testing.assert_close(x, y, **tolerance)


def with_numbers_of(model, small):
    "The model, with the numbers that the codes stand for put into its own parameters."
    new = copy.deepcopy(model)
    for m in small.modules():
        if isinstance(m, Dequantize):
            new.get_submodule(layers_of(small)[id(unwrapped(m))][1][0])._parameters[m.name].data.copy_(m.q.dequantize())
    return new


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_compressed_and_runs_on_its_codes_alone(name):
    for how in OPTIONS if FUZZ else [OPTIONS[(list(LAYERS).index(name) + i) % len(OPTIONS)] for i in (0, 4)]:
        model, args = make(name)
        with unchanged(model, args):
            small = quantize_model(model, **how)
        assert not [n for n, why in floats_left(small).items() if "small" not in why], floats_left(small)
        for mode in True, False:
            torch.manual_seed(3)
            got = small.train(mode)(*args)
            torch.manual_seed(3)
            assert_same(got, with_numbers_of(model, small).train(mode)(*args))
            codes_alone(model, small, *args)
        with unchanged(small, args):
            back = dequantize_model(small)
        assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert_same(back(*args), small(*args))
        codes_alone(small, back, *args)
        if matrices_of(model):
            with unchanged(model):
                lone = quantize_layer(model, **how)
            codes_alone(model, lone, *args)
            assert_same(dequantize_layer(lone)(*args), lone(*args))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_lie_where_the_table_says(name):
    "Scaling one output channel scales one scale."
    model, _ = make(name)
    for m in choose_matrices(model):
        with torch.no_grad():
            m.weight.fill_(1)
        a = quantize(m.weight, 8, axis=m.axis).scale
        with torch.no_grad():
            m.weight.select(m.axis, 0).mul_(2)
        assert torch.equal(quantize(m.weight, 8, axis=m.axis).scale, a * torch.tensor([2.0] + [1.0] * (len(a) - 1)))
    model, args = make(name)
    if len(matrices_of(model)) == 1 and not isinstance(
        model, (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    ):
        ((key, axis),) = matrices_of(model).items()
        before, groups = model(*args), getattr(model, "groups", 1)
        with torch.no_grad():
            model._parameters[key].select(axis, 0).zero_()
        moved = (
            (model(*args) != before).transpose(1, -1).flatten(0, -2).any(0)
            if model.__class__.__name__.startswith("Conv") and name != "Conv1D"
            else (model(*args) != before).any(0)
        )
        assert moved.sum() == (groups if axis == 1 and name != "Conv1D" else 1)


def test_state_dicts_copies_and_half_of_several_matrices():
    for name in "LSTM", "MultiheadAttention", "Conv1D", "GRUCell", "TransformerEncoderLayer":
        model, args = make(name)
        small, other = quantize_model(model, 4, group=4), quantize_model(LAYERS[name][0]().eval(), 4, group=4)
        other.load_state_dict(small.state_dict())
        assert_same(other(*args), small(*args), rtol=0, atol=0)
        assert_same(copy.deepcopy(small)(*args), small(*args), rtol=0, atol=0)
        file = io.BytesIO()
        torch.save(small, file)
        file.seek(0)
        assert_same(torch.load(file, weights_only=False)(*args), small(*args), rtol=0, atol=0)
        assert_same(copy.deepcopy(small).double().float()(*args), small(*args))


def test_of_several_matrices_none_takes_anothers_place():
    torch.manual_seed(0)
    a, b, x = nn.LSTM(4, 4), nn.LSTM(4, 4), r(3, 2, 4)
    first, then = quantize_model(nn.Sequential(a)), quantize_model(nn.Sequential(b), overrides={"0.weight_hh_l0": None})
    then = quantize_model(then)
    assert first[0].name == "weight_ih_l0" and quantize_layer(a).name == "weight_ih_l0"
    if then[0].name != first[0].name:
        with pytest.raises(ValueError, match="weight_"):
            then.load_state_dict(first.state_dict())
    other = quantize_model(nn.Sequential(b))
    other.load_state_dict(first.state_dict())
    assert torch.equal(other[0].weight_hh_l0, first[0].weight_hh_l0)


def test_torch_compile_follows_layers_with_several_matrices():
    for name in "Conv1D", "MultiheadAttention":
        model, args = make(name)
        small = quantize_model(model)
        with torch.no_grad():
            assert_same(
                torch.compile(small, backend="eager", fullgraph=True)(*args), small(*args), rtol=1e-5, atol=1e-6
            )
    with torch.no_grad():
        exported = torch.export.export(small, args).module()
        assert_same(exported(*args), small(*args), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="torch.export"):
        torch.jit.trace(small, args)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 5])
def test_attention_sees_its_expanded_weights_in_every_mode(batch_first, kdim):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim)
    small = quantize_model(attention, 2)
    like, q, k = with_numbers_of(attention, small), r(3, 4, 8), r(3, 4, kdim or 8)
    assert (
        isinstance(small, Dequantize)
        and isinstance(small.out_proj, Dequantize)
        and (small(q, k, q)[0] - attention(q, k, q)[0]).abs().max() > 0.05
    )
    for mode in True, False:
        for need in True, False:
            for grad in True, False:
                with torch.set_grad_enabled(grad):
                    assert_same(
                        small.train(mode)(q, k, q, need_weights=need), like.train(mode)(q, k, q, need_weights=need)
                    )
    with torch.no_grad():
        got = (
            F.multi_head_attention_forward(
                *(q.mT.mT,) * 3,
                8,
                2,
                small.in_proj_weight,
                small.in_proj_bias,
                None,
                None,
                False,
                0.0,
                small.out_proj.weight,
                small.out_proj.bias,
                training=False,
            )
            if kdim is None
            else None
        )
        if got is not None:
            assert_same(
                got,
                F.multi_head_attention_forward(
                    q,
                    q,
                    q,
                    8,
                    2,
                    like.in_proj_weight,
                    like.in_proj_bias,
                    None,
                    None,
                    False,
                    0.0,
                    like.out_proj.weight,
                    like.out_proj.bias,
                    training=False,
                ),
            )


def test_encoders_take_their_quick_path_with_the_codes():
    "Also with padding, where the quick path puts out zeros: what the original does, its quantized copy does."
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    small = quantize_model(encoder, 4)
    like, x, padding = (
        with_numbers_of(encoder, small),
        r(2, 5, 8),
        torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    )
    for mode in True, False:
        for grad in True, False:
            for mask in None, padding:
                with torch.set_grad_enabled(grad):
                    torch.manual_seed(1)
                    got = small.train(mode)(x, src_key_padding_mask=mask)
                    torch.manual_seed(1)
                    assert_same(got, like.train(mode)(x, src_key_padding_mask=mask))
    codes_alone(encoder, small, x, src_key_padding_mask=padding)


# hooks, forward, compiled: what hangs on an instance


def doubled(layer, args, out):
    return 2 * out


def shifted(layer, args):
    return (args[0] + 1,)


def named(layer, args, kwargs, out):
    return out * kwargs.get("times", 3)


def test_hooks_are_called_once_after_every_transformation():
    x = r(2, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model[0].register_forward_hook(doubled)
    model[0].register_forward_pre_hook(shifted)
    model[0].register_forward_hook(named, with_kwargs=True)
    model.register_forward_hook(doubled)
    want = lambda w: 2 * F.relu(6 * F.linear(x + 1, w, model[0].bias))
    small = quantize_model(model, 8)
    for m in (
        small,
        copy.deepcopy(small),
        dequantize_model(small),
        dequantize_model(copy.deepcopy(small)),
        quantize_model(dequantize_model(small)),
    ):
        assert torch.allclose(m(x), want(small[0].weight), rtol=1e-5)
    lone = quantize_layer(model[0], 8)
    lone.register_forward_hook(doubled)  # on the wrapper, after it was made
    model[0].register_forward_hook(doubled)  # on the original, which is another layer
    right = 12 * F.linear(x + 1, lone.weight, model[0].bias)
    for m in lone, copy.deepcopy(lone), dequantize_layer(lone):
        assert torch.allclose(m(x), right, rtol=1e-5)
    calls = []
    inside = nn.LSTM(3, 4)
    inside.register_forward_hook(functools.partial(lambda calls, *a: calls.append(1), calls))
    m = quantize_model(inside)
    m(r(2, 1, 3))
    assert len(unwrapped(m)._forward_hooks) == 1
    m.register_forward_pre_hook(lambda layer, a: (a[0] * 2,))
    assert_same(dequantize_model(m)(r(2, 1, 3)), m(r(2, 1, 3)))


def test_what_a_copy_would_run_of_the_original_is_refused():
    own, compiled, inner = (
        nn.Sequential(nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3)),
    )
    own.forward = torch.compile(own.forward, backend="eager")
    inner[0].forward = functools.partial(nn.Linear.forward, inner[0])
    hooked = nn.Sequential(nn.Linear(3, 3))
    hooked[0].register_forward_hook(lambda l, i, o: o + hooked[0].weight.sum())
    for model in own, inner, hooked, torch.compile(compiled, backend="eager"):
        with pytest.raises(ValueError, match="original"):
            quantize_model(model)
    for layer in inner[0], hooked[0]:
        with pytest.raises(ValueError, match="original"):
            quantize_layer(layer)
    with pytest.raises(ValueError, match="original"):
        Dequantize(inner[0], quantize(inner[0].weight))
    small = quantize_model(compiled)
    small.forward = functools.partial(nn.Sequential.forward, small)
    with pytest.raises(ValueError, match="original"):
        dequantize_model(small)
    layer = nn.Linear(3, 3)
    layer.compile(backend="eager")  # remembers a compiled call of the original
    with pytest.raises(ValueError, match="original"):
        quantize_layer(layer)
    assert (Dequantize(layer, quantize(layer.weight, 1))(r(2, 3)) - layer(r(2, 3))).abs().max() > 0.01


class Streaming(nn.Conv1d):
    "Keeps the last inputs in a plain attribute, as streaming models do."

    past = None
    calls = 0

    def forward(self, x):
        y = F.conv1d(x if self.past is None else torch.cat([self.past, x], -1), self.weight, self.bias)
        self.past, self.calls = x[..., -2:], self.calls + 1
        return y

    def forget(self):
        self.past = None

    def norm(self):
        return self.weight.norm()


def test_what_a_layer_remembers_between_calls_is_kept():
    torch.manual_seed(0)
    layer = Streaming(2, 3, 3)
    MATRICES_BEFORE = dict(MATRICES)
    small, x = quantize_model(layer, 8), r(1, 2, 9)
    like = dequantize_layer(small)
    for part in x.split(3, -1):
        assert torch.equal(small(part), like(part))
    assert small.calls == 3 and torch.equal(small.past, like.past) and torch.allclose(small.norm(), small.weight.norm())
    assert layer.calls == 0 and layer.past is None
    small.forget()
    assert small.past is None and small(x).shape == (1, 3, 7) and dict(MATRICES) == MATRICES_BEFORE


# weights that are no parameters


def buffered(layer):
    w = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", w)
    return layer


def attribute(layer):
    w = layer.weight.detach()
    del layer.weight
    layer.weight = w
    return layer


class Halved(nn.Module):
    def forward(self, w):
        return w / 2


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda l: prune.l1_unstructured(l, "weight", 0.5),
    "random": lambda l: prune.random_unstructured(l, "weight", 0.5),
    "buffer": buffered,
    "attribute": attribute,
    "own": lambda l: (nn.utils.parametrize.register_parametrization(l, "weight", Halved()), l)[1],
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.Conv1d(4, 4, 1),
        lambda: nn.Embedding(4, 4),
        lambda: nn.Bilinear(4, 4, 4),
        lambda: nn.ConvTranspose1d(4, 4, 1),
    ],
)
def test_computed_weights_are_refused_by_name_or_left_alone(kind, build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"odd": COMPUTED[kind](build())}))
    with pytest.raises(ValueError, match=r"1\.odd\.weight .*overrides=\{'1.odd': None\}"):
        quantize_model(model)
    with pytest.raises(ValueError, match="weight"):
        quantize_layer(model[1].odd)
    small = quantize_model(model, overrides={"1.odd": None})
    assert isinstance(small[0][0], Dequantize) and any(n.startswith("1.odd") for n in floats_left(small))
    assert any(
        "computed" in why or "parametrized" in why or "buffer" in why or "attribute" in why
        for n, why in floats_left(small).items()
        if n.startswith("1.odd")
    )


def test_computed_matrices_of_recurrent_and_attention_layers_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer, key in (
            (nn.LSTM(3, 3), "weight_hh_l0"),
            (nn.GRUCell(3, 3), "weight_ih"),
            (nn.MultiheadAttention(4, 2), "in_proj_weight"),
        ):
            for wrap in (
                nn.utils.weight_norm,
                parametrizations.weight_norm,
                lambda l, k: prune.l1_unstructured(l, k, 0.3),
            ):
                odd = wrap(copy.deepcopy(layer), key)
                with pytest.raises(ValueError, match=key):
                    quantize_model(nn.Sequential(odd))
                with pytest.raises(ValueError, match=key):
                    quantize_layer(odd)
                assert key in str(floats_left(odd)) and any(
                    isinstance(m, Dequantize)
                    for m in quantize_model(nn.Sequential(odd), overrides={f"0.{key}": None}).modules()
                )
    with pytest.raises(ValueError, match="layer 0 is a LazyLinear without a size"):
        quantize_model(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))


# what stays float


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.hidden, self.fc, self.norm = (
            nn.Parameter(torch.randn(4, 4)),
            [nn.Linear(4, 4)],
            nn.Linear(4, 4),
            nn.LayerNorm(4),
        )
        self.register_buffer("grid", torch.randn(4, 4))

    def forward(self, x):
        return self.hidden[0](self.norm(self.fc(x)) @ self.proj) + self.grid


def test_whatever_stays_float_is_listed_with_its_reason():
    model = Bare()
    left = floats_left(quantize_model(model))
    assert (
        "bare parameter of a Bare" in left["proj"]
        and "buffer" in left["grid"]
        and "ModuleList" in left["hidden[0].weight"]
        and "small" in left["norm.weight"]
        and "fc.weight" not in left
    )
    assert (
        "left alone"
        in floats_left(quantize_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), overrides={"0": None}))[
            "0.weight"
        ]
    )
    assert "hidden[0].weight" in repr(left) and "more" in repr(left) and left.bytes["proj"] == 64
    MATRICES[Bare] = {"proj": 1}
    try:
        small = quantize_model(model)
    finally:
        del MATRICES[Bare]
    assert small.q.axis == 1 and isinstance(small.fc, Dequantize) and "proj" not in floats_left(small)
    assert repr(floats_left(quantize_model(nn.Linear(2, 2, bias=False)))) == "no tensor is float"


def test_a_compressed_model_prints_as_pytorch_prints_models():
    small = quantize_model(
        nn.Sequential(nn.ModuleDict({"rnn": nn.LSTM(8, 8), "look": nn.MultiheadAttention(8, 2)}), nn.Linear(8, 8)), 4
    )
    said = ": 4-bit symmetric, per channel (axis 0), "
    assert (
        repr(small)
        == f"""Sequential(
  (0): ModuleDict(
    (rnn): Dequantize(
      LSTM(8, 8)
      weight_ih_l0{said}256 bytes
      weight_hh_l0{said}256 bytes
    )
    (look): Dequantize(
      MultiheadAttention(
        (out_proj): Dequantize(NonDynamicallyQuantizableLinear(in_features=8, out_features=8, bias=True), weight{said}64 bytes)
      )
      in_proj_weight{said}192 bytes
    )
  )
  (1): Dequantize(Linear(in_features=8, out_features=8, bias=True), weight{said}64 bytes)
)"""
    )


def test_no_tensor_is_lost_between_the_codes_and_the_list():
    for name in LAYERS:
        model, _ = make(name)
        small = quantize_model(model)
        coded = {id(m.packed): m.q.numel() for m in small.modules() if isinstance(m, Dequantize)}
        state = {n: t for n, t in model.state_dict().items()}
        assert set(floats_left(small)) < set(state) and sum(coded.values()) + sum(
            state[n].numel() for n in floats_left(small)
        ) == sum(t.numel() for t in state.values())


# writing

WRITES = [
    "w.data += 1",
    "layer.weight.add_(1)",
    "layer.weight = nn.Parameter(torch.ones(4, 3))",
    "layer.weight = None",
    "with torch.no_grad(): layer.weight.copy_(torch.ones(4, 3))",
    "layer.weight.data.zero_()",
    "layer.weight.data = torch.ones(4, 3)",
    "layer.weight[0] = 0.",
    "layer.weight.T[0] += 1",
    "layer.weight.view(-1)[:2] = 0",
    "nn.init.zeros_(layer.weight)",
    "torch.mul(layer.weight, 2, out=layer.weight)",
    "F.relu(layer.weight, inplace=True)",
    "layer.weight.detach().mul_(2)",
    "for row in layer.weight: row.zero_()",
    "layer.weight.numpy()[0] = 1",
    "layer.weight += 1",
    "setattr(layer, 'weight', layer.weight + 1)",
    "torch._foreach_add_([layer.weight], 1.)",
    "layer.weight.requires_grad_()",
    "del layer.weight",
    "layer.weight.flatten()[0] = 1",
    "layer.weight.to(torch.float32).zero_()",
    "layer.weight.unbind()[0].zero_()",
    "layer.weight.squeeze().clamp_(0, 1)",
    "layer.weight.fill_diagonal_(3.)",
    "layer.weight.index_fill_(0, torch.tensor([0]), 1.)",
]


@pytest.mark.parametrize("write", WRITES)
def test_no_write_into_a_compressed_weight_is_lost(write):
    for layer in quantize_layer(nn.Linear(3, 4)), quantize_model(nn.Sequential(nn.Linear(3, 4)))[0]:
        before = layer(r(2, 3))
        with pytest.raises((RuntimeError, AttributeError, ValueError)):
            exec(
                write.replace("w.", "layer.weight.", 1) if write.startswith("w.") else write,
                globals() | {"layer": layer},
            )
        assert torch.equal(layer(r(2, 3)), before)


def test_what_is_set_beside_the_weight_acts():
    conv = quantize_layer(nn.Conv1d(2, 2, 3))
    conv.stride, x = (2,), r(1, 2, 9)
    assert conv(x).shape == (1, 2, 4) and conv.stride == (2,)
    linear = quantize_layer(nn.Linear(3, 4))
    linear.bias = None
    assert torch.equal(linear(r(2, 3)), F.linear(r(2, 3), linear.weight)) and linear.bias is None
    linear.bias = nn.Parameter(torch.ones(4))
    assert torch.equal(linear(r(2, 3)), F.linear(r(2, 3), linear.weight, torch.ones(4)))
    linear.note = "mine"
    assert linear.note == copy.deepcopy(linear).note == "mine"
    lstm = quantize_layer(nn.LSTM(3, 4))
    lstm.batch_first = True
    assert lstm(r(2, 5, 3))[0].shape == (2, 5, 4) and lstm(r(2, 5, 3))[1][0].shape == (1, 2, 4)
    with pytest.raises(AttributeError, match="weight_ih_l0 of this LSTM"):
        lstm.weight_ih_l0 = nn.Parameter(torch.ones(16, 3))
    with pytest.raises(RuntimeError, match="weight_ih_l0 of this LSTM"):
        lstm.weight_ih_l0.data.zero_()
    lstm.flatten_parameters()
    assert len(lstm.all_weights[0]) == 4 and lstm.all_weights[0][0].shape == (16, 3)


def test_reading_a_compressed_weight():
    layer = quantize_layer(nn.Linear(3, 4))
    w = layer.weight
    assert torch.equal(w, layer.q.dequantize()) and type(w + 1) is type(w.clone()) is torch.Tensor and w.shape == (4, 3)
    assert (
        torch.equal(nn.Parameter(w.clone()), w)
        and torch.equal(copy.deepcopy(w), w)
        and w.numpy().shape == (4, 3)
        and w.tolist() == layer.q.dequantize().tolist()
    )
    file = io.BytesIO()
    torch.save({"w": w}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["w"], layer.q.dequantize())
    x = r(2, 3).requires_grad_()
    F.linear(x, w).sum().backward()
    assert torch.allclose(x.grad, w.sum(0).expand(2, 3))
    assert torch.allclose(torch.func.vmap(lambda v: F.linear(v, w))(r(2, 3)), F.linear(r(2, 3), w))


# names, ties, frozen


def tied(a=None, b=None):
    m = nn.ModuleDict({"table": a or nn.Embedding(6, 4), "head": b or nn.Linear(4, 6)})
    m["head"].weight = m["table"].weight
    return m


def test_tied_weights_are_treated_alike_or_both_are_named():
    for overrides in (
        {"head": {"bits": 4}},
        {"table": None},
        {"head": None},
        {"table": {"bits": 4}, "head": {"bits": 2}},
        {"head.weight": {"symmetric": False}},
    ):
        with pytest.raises(ValueError, match=r"(table|head)\.weight and (table|head)\.weight"):
            quantize_model(tied(), overrides=overrides)
    for overrides in {"*": {"bits": 4}}, {"table": {"bits": 4}, "head": {"bits": 4}}, {}:
        small = quantize_model(tied(), overrides=overrides)
        assert small["head"].packed is small["table"].packed
        back = dequantize_model(small)
        assert back["head"].weight is back["table"].weight
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize_model(tied(), overrides={"*": None})
    with pytest.raises(ValueError, match=r"head\.weight and table\.weight"):
        quantize_model(tied(), layers=(nn.Linear,))
    m = tied(b=nn.Linear(4, 6))
    m.own = m["table"].weight
    with pytest.raises(ValueError, match=r"table\.weight and own"):
        quantize_model(m)
    views = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})
    views["b"].weight = nn.Parameter(views["a"].weight.data)  # two parameters, one memory
    assert (small := quantize_model(views))["a"].packed is small["b"].packed
    bias = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})
    bias["b"].bias = bias["a"].bias
    small = quantize_model(bias)
    assert small["a"].bias is small["b"].bias and small["a"].bias is not bias["a"].bias


def test_a_layer_under_two_names_is_one():
    m = nn.ModuleDict({"a": nn.Linear(3, 3)})
    m["b"] = m["a"]
    m["c"] = nn.Linear(3, 3)
    small = quantize_model(m)
    assert small["a"] is small["b"] and isinstance(small["a"], Dequantize)
    for overrides in {"b": None}, {"a": {"bits": 2}}:
        with pytest.raises(ValueError, match="a and b are one layer"):
            quantize_model(m, overrides=overrides)
    assert quantize_model(m, overrides={"[ab]": {"bits": 2}})["b"].q.bits == 2


def test_overrides_name_layers_matrices_and_attention():
    model = nn.ModuleDict(
        {"lstm": nn.LSTM(3, 4), "attention": nn.MultiheadAttention(4, 2), "box": nn.Sequential(nn.Linear(3, 3))}
    )
    bits = lambda s: {
        n.replace(".layer", "") + "." + m.name: m.q.bits for n, m in s.named_modules() if isinstance(m, Dequantize)
    }
    assert bits(quantize_model(model, 8, overrides={"lstm.weight_hh_l0": {"bits": 4}, "attention": {"bits": 2}})) == {
        "lstm.weight_hh_l0": 4,
        "lstm.weight_ih_l0": 8,
        "attention.in_proj_weight": 2,
        "attention.out_proj.weight": 2,
        "box.0.weight": 8,
    }
    assert "attention" not in str(bits(quantize_model(model, overrides={"attention": None})))
    assert bits(quantize_model(model, overrides={"attention.out_proj": None, "lstm.weight_ih*": None})).keys() == {
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "box.0.weight",
    }
    for wrong, says in (
        ({"box": None}, "means all in it"),
        ({"lstm.bias_ih_l0": None}, "overrides names"),
        ({"": None}, "overrides names"),
    ):
        with pytest.raises(ValueError, match=says):
            quantize_model(model, overrides=wrong)
    for wrong in "box", ["lstm"], {"lstm": 4}, {"lstm": "8"}:
        with pytest.raises(TypeError, match="overrides"):
            quantize_model(model, overrides=wrong)
    half = quantize_model(model, overrides={"lstm.weight_ih_l0": None})
    rest = quantize_model(half, 4, overrides={"attention*": None} if False else None)
    assert bits(rest)["lstm.weight_ih_l0"] == 4 and bits(rest)["lstm.weight_hh_l0"] == 8
    x = r(2, 1, 3)
    assert_same(rest["lstm"](x), dequantize_model(rest)["lstm"](x), rtol=0, atol=0)


def test_frozen_layers_stay_frozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[1].weight_hh_l0.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    small = quantize_model(model)
    for m in small, copy.deepcopy(small), quantize_model(dequantize_model(small)):
        assert {n: p.requires_grad for n, p in dequantize_model(m).named_parameters()} == flags
    assert not dequantize_layer(quantize_layer(model[0])).weight.requires_grad


def test_errors_name_the_layer():
    model = nn.ModuleDict({"ok": nn.Linear(3, 3), "lstm": nn.LSTM(3, 3)})
    with torch.no_grad():
        model["lstm"].weight_hh_l0[0, 0] = math.nan
    for how, says in (
        (dict(), r"lstm\.weight_hh_l0: x holds 1 values"),
        (dict(columns=[1.0, 1.0], overrides={"lstm": None}), r"ok\.weight: columns"),
        (dict(scale=torch.ones(2)), r"ok\.weight: scale"),
    ):
        with pytest.raises(ValueError, match=says):
            quantize_model(model, **how)
    with pytest.raises(ValueError, match="weight_hh_l0: x holds"):
        quantize_layer(model["lstm"])
    with pytest.raises(TypeError, match="0.weight: x is on the meta device"):
        quantize_model(nn.Sequential(nn.Linear(3, 3, device="meta")))
    with pytest.raises(TypeError, match="bitz"):
        quantize_model(nn.Linear(3, 3), bitz=3)
    with pytest.raises(TypeError, match=r"axis is no argument of quantize_model\(\); it has .*per_channel"):
        quantize_model(nn.Linear(3, 3), axis=1)
    with pytest.raises(TypeError, match="weight: axis follows"):
        quantize_model(nn.Linear(3, 3), overrides={"": {"axis": 1}})


def test_layers_without_numbers():
    for layer, x in (
        (nn.Linear(0, 3), r(2, 0)),
        (nn.Linear(3, 0), r(2, 3)),
        (nn.Conv1d(2, 0, 1), None),
        (nn.Embedding(0, 3), None),
        (nn.Linear(0, 0, bias=False), r(2, 0)),
    ):
        for how in OPTIONS:
            if how.get("codebook") == "kmeans":
                continue
            small = quantize_model(nn.Sequential(layer, nn.Flatten()), **how)
            assert isinstance(small[0], Dequantize) and dequantize_model(small)[0].weight.shape == layer.weight.shape
            if x is not None:
                assert torch.equal(small(x), nn.Sequential(layer, nn.Flatten())(x))


# rounding


def sqnr(x, y):
    return 10 * math.log10(x.double().square().mean() / (x.double() - y.double()).square().mean())


WITHOUT_ZERO = [
    dict(bits=1),
    dict(bits=1, observer="percentile"),
    dict(bits=1, observer="entropy"),
    dict(bits=1, observer="mse"),
    dict(levels=2),
    dict(bits=1, stochastic=True),
    dict(codebook=torch.tensor([-1.0, -0.3, 0.2, 1.0])),
    dict(bits=2, codebook="kmeans"),
]


@pytest.mark.parametrize(
    "how",
    WITHOUT_ZERO
    + [dict(bits=b, symmetric=s) for b in (1, 2, 4, 16) for s in (True, False)]
    + [dict(codebook="nf4"), dict(step=0.3), dict(levels=3), dict(bits=4, stochastic=True)],
)
def test_blocks_of_zeros_are_exact_zeros(how):
    x = torch.zeros(6, 64)
    x[1:3], x[4, :32] = r(2, 64), r(32)
    for where in (
        dict(axis=0),
        dict(group=32),
        dict(axis=0, scale_dtype=torch.float16),
        dict(axis=0, scale_dtype=torch.bfloat16),
    ):
        if "step" in how and len(where) > 1:
            continue
        q = quantize(x, **how, **where)
        assert (
            not q.dequantize()[[0, 3, 5]].any()
            and q.dequantize()[1:3].abs().amax(1).min() > 0.1
            and torch.isfinite(q.dequantize()).all()
        )
        if "group" in where:
            assert not q.dequantize()[4, 32:].any() and q.scale.dtype == (
                torch.float32 if "step" in how else torch.float16
            )
        assert QTensor.from_parts(q.parts(), q.meta()) == q
    assert not quantize(torch.zeros(5), **how).dequantize().any()
    for dtype in torch.float16, torch.bfloat16, torch.float64:
        assert not quantize(torch.zeros(2, 8, dtype=dtype), axis=0, **how).dequantize().any()


def test_padding_rows_of_embeddings_stay_zero():
    for how in dict(bits=1), dict(bits=1, group=4), dict(bits=2, codebook="kmeans"):
        small = quantize_layer(nn.Embedding(9, 8, padding_idx=0), **how)
        assert not small(torch.tensor([0])).any() and small(torch.tensor([1])).any()


def test_two_levels_are_the_best_two_for_every_observer():
    x = torch.randn(20_000, generator=torch.manual_seed(0))
    for observer in OBSERVERS:
        assert sqnr(x, quantize(x, 1, observer=observer).dequantize()) > 4.3


def test_a_group_of_zeros_costs_no_bytes():
    x = r(4, 64)
    x[2, :32] = 0
    for how in (
        dict(codebook="nf4"),
        dict(bits=4),
        dict(bits=1),
        dict(bits=4, symmetric=False),
        dict(bits=4, codebook="kmeans"),
    ):
        q = quantize(x, group=32, **how)
        assert q.scale.dtype == torch.float16 and not q.dequantize()[2, :32].any()
    assert quantize(x, codebook="nf4", group=32).bits_per_weight == 4 + 16 / 32 + 16 * 32 / 256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_do_not_overflow(dtype):
    top = torch.finfo(dtype).max
    for bits in (2, 3, 4, 8, 12, 16) if FUZZ else (2, 4, 8, 16):
        for symmetric in True, False:
            for where in {}, dict(group=32), dict(axis=0), dict(group=7):
                for values in ([1.0, 1.0], [1.0, -1.0], [-1.0, 0.3], [0.999, -0.2])[: 4 if FUZZ else 2]:
                    x = torch.tensor(values, dtype=torch.float64).mul(top).to(dtype).repeat(2, 16)
                    q = quantize(x, bits, symmetric=symmetric, **where)
                    error = (q.dequantize().double() / 2 - x.double() / 2).abs()
                    assert (
                        torch.isfinite(q.dequantize()).all()
                        and (
                            error.reshape(-1) <= (0.5001 * q.scale.max().double() / 2 + top * torch.finfo(dtype).eps)
                        ).all()
                    )
    assert torch.equal(
        quantize(torch.full((32,), 65504.0, dtype=torch.float16), 4, group=32).dequantize(),
        torch.full((32,), 65504.0, dtype=torch.float16),
    )
    assert torch.isfinite(
        quantize(torch.full((2, 4), top, dtype=dtype), 8, columns=[2.0, 3.0, 4.0, 5.0]).dequantize()
    ).all()
    for how in dict(codebook="nf4"), dict(bits=3, codebook="kmeans"):
        x = torch.tensor([top, -top, top / 3, 0.0], dtype=dtype)
        assert torch.isfinite(quantize(x, **how).dequantize()).all() and quantize(x, **how).dequantize()[0] == top
    try:
        assert torch.isfinite(
            quantize(torch.full((8,), top, dtype=dtype), 1).dequantize()
        ).all()  # twice the largest number is a scale that float32 does not have: refused
    except ValueError as e:
        assert "scale" in str(e) and dtype in (torch.bfloat16, torch.float32, torch.float64)
    assert torch.isinf(
        quantize(torch.tensor([1e6])).to(torch.float16).dequantize()
    )  # too large for the dtype that was asked for, and not by rounding


@pytest.mark.parametrize("m", [1, 2, 10, 999, 1000, 1001, 2000])
@pytest.mark.parametrize("percent", [99.9, 99.8, 99, 50, 33.3, 0.1, 100])
def test_percentile_keeps_what_it_says(m, percent):
    from fractions import Fraction
    from modelzip.quant import Percentile

    x = torch.randn(1, m, generator=torch.manual_seed(m))
    share = Fraction(str(percent)) / 100
    keep = lambda low, high: ((x >= low) & (x <= high)).sum().item()
    low, high = Percentile(percent)(x, 256, True)
    assert low == -high and keep(low, high) == math.ceil(m * share)
    low, high = Percentile(percent)(x, 256, False)
    assert (x < low).sum() == (x > high).sum() == (m - math.ceil(m * (1 + share) / 2)) and keep(low, high) >= m * share
    assert percent != 99.9 or m != 1000 or keep(*Percentile()(x, 256, True)) == 999


def best_error(x, k):
    "Least squared error of k centroids, by dynamic programming over all cuts."
    x = sorted(x.double().tolist())
    n = len(x)
    total, squares = [0.0], [0.0]
    for v in x:
        total.append(total[-1] + v)
        squares.append(squares[-1] + v * v)
    cost = lambda i, j: squares[j] - squares[i] - (total[j] - total[i]) ** 2 / (j - i)
    best = [0.0] + [cost(0, j) for j in range(1, n + 1)]
    for _ in range(k - 1):
        best = [0.0] + [min([best[j]] + [best[i] + cost(i, j) for i in range(1, j)]) for j in range(1, n + 1)]
    return max(best[n], 0.0)


@settings(max_examples=examples(20), deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 3),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([0.0, 1e2, 1e4, -1e6]),
    st.sampled_from([0.0, 1e3]),
    st.booleans(),
    st.integers(0, 999),
)
def test_kmeans_is_the_best_there_is_on_few_values(n, bits, power, outlier, offset, rounded, seed):
    from modelzip.quant import kmeans

    x = torch.randn(n, generator=torch.manual_seed(seed), dtype=torch.float64).pow(power) + offset
    if rounded:
        x = x.round()
    if outlier:
        x[0] = outlier
    centroids = kmeans(x, bits)
    error = (x[:, None] - centroids.double()).abs().amin(1)
    assert error.square().sum() <= best_error(x, 1 << bits) * 1.0001 + 1e-9 * n * x.abs().max() ** 2 * 1e-3
    assert centroids.shape == (1 << bits,) and (centroids.diff() >= 0).all()
    if x.unique().numel() <= 1 << bits:
        assert set(x.float().tolist()) <= set(centroids.tolist())


def test_kmeans_with_one_far_outlier():
    from modelzip.quant import kmeans

    x = torch.cat([torch.randn(10_000, generator=torch.manual_seed(0)), torch.tensor([1e4])])
    assert (x.double()[:, None] - kmeans(x, 4).double()).abs().amin(1).square().sum() < 114
    assert kmeans(torch.arange(8.0), 3).tolist() == [*range(8)]


@pytest.mark.parametrize("where", [{}, dict(group=32), dict(axis=0), dict(group=5)])
def test_a_step_is_kept_exactly(where):
    for dtype, step in (torch.float32, 0.01), (torch.float16, 0.01), (torch.float64, 0.01), (torch.float32, 1 / 3):
        q = quantize(r(4, 64).to(dtype), step=step, **where)
        assert (
            q.scale.double()
            == torch.tensor(step, dtype=torch.float64 if dtype == torch.float64 else torch.float32).double()
        ).all()
    with pytest.raises(ValueError, match="step=0.01 exactly"):
        quantize(r(4, 64), step=0.01, scale_dtype=torch.float16)
    assert quantize(r(4, 64), step=0.25, scale_dtype=torch.float16, **where).scale.dtype == torch.float16


def test_parts_from_files_are_held_against_what_they_claim():
    x = r(6, 64)
    nan, inf = math.nan, math.inf
    for how in (
        dict(levels=3, axis=0),
        dict(levels=5, group=32, symmetric=False),
        dict(bits=4, axis=0),
        dict(levels=200),
        dict(codebook=torch.tensor([-1.0, 0.0, 1.0])),
        dict(bits=12),
        dict(levels=300),
        dict(codebook="nf4", group=32),
    ):
        q = quantize(x, **how)
        for wrong in nan, -1.0, 0.0, inf, -inf:
            bad = q.scale.clone()
            bad.view(-1)[-1] = wrong
            with pytest.raises(ValueError, match="scale must be positive and finite"):
                QTensor.from_parts(q.parts() | {"scale": bad}, q.meta())
        for name, (bits, count, levels) in q.packed_parts().items():
            if levels == 1 << bits:
                continue
            codes = torch.zeros(count, dtype=torch.int32)
            codes[-1] = levels
            from modelzip.quant import pack_bits

            with pytest.raises(ValueError, match=f"{name} has code {levels}; {levels} levels have 0 to {levels - 1}"):
                QTensor.from_parts(q.parts() | {name: pack_bits(codes, bits)}, q.meta())
            codes[-1] = levels - 1
            QTensor.from_parts(q.parts() | {name: pack_bits(codes, bits)}, q.meta())
        if q.codebook is not None:
            with pytest.raises(ValueError, match="codebook must be finite"):
                QTensor.from_parts(q.parts() | {"codebook": q.codebook * nan}, q.meta())
        small = quantize_layer(nn.Linear(64, 6), **{k: v for k, v in how.items() if k != 'axis'})
        state = small.state_dict()
        state["packed.scale"] = state["packed.scale"] * nan
        with pytest.raises(ValueError, match="scale"):
            small.load_state_dict(state)
    q = quantize(torch.zeros(2, 8), 1, axis=0)  # two levels have no zero; a scale of 0 says it
    assert (q.scale == 0).all() and QTensor.from_parts(q.parts(), q.meta()) == q
    assert (
        not quantize(torch.zeros(4), symmetric=False, scale=1e-40, zero_point=3).dequantize().any()
        and quantize(torch.zeros(4), symmetric=False, scale=1e-40, zero_point=3).unpack().tolist() == [3] * 4
    )


def test_codes_are_those_of_torch_where_rounding_twice_differs():
    seed, zero_point, scale = 14, 137, 3.007945463426312
    x = torch.randn(8, 16, generator=torch.manual_seed(seed)) * 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for s in range(40):
            if s:
                x, zero_point, scale = (
                    (torch.randn(8, 16, generator=torch.manual_seed(s)) * 160).round() / 8,
                    s,
                    torch.tensor(1 + s / 16).item(),
                )
            theirs = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
            ours = quantize(x, 8, symmetric=False, scale=scale, zero_point=zero_point)
            assert torch.equal(ours.unpack(), theirs.int_repr()) and torch.equal(ours.dequantize(), theirs.dequantize())


def test_short_groups_are_observed_without_what_fills_them_up():
    x = r(3, 35)
    x[:, -1] = 40.0
    q = quantize(x, 1, group=32)
    tail = x[:, 32:].abs().mean(1)
    assert torch.allclose(q.dequantize()[:, 32:].abs(), tail[:, None].expand(3, 3), rtol=1e-3)
    for observer in "percentile", "mse":
        for symmetric in True, False:
            whole, alone = (
                quantize(x, 3, group=32, observer=observer, symmetric=symmetric, scale_dtype=torch.float32),
                quantize(x[:, 32:], 3, axis=0, observer=observer, symmetric=symmetric),
            )
            assert torch.equal(whole.scale[:, 1], alone.scale)
    y = torch.cat([torch.linspace(-1, 1, 32), torch.tensor([0.11])])[None]
    assert torch.equal(
        quantize(y, 2, codebook="kmeans", group=32).codebook,
        quantize(torch.cat([y[:, :32], torch.tensor([[1.0]])], 1), 2, codebook="kmeans").codebook,
    )


@pytest.mark.parametrize(
    "how,says",
    [
        (dict(step=0.1, scale=0.2), "step and scale"),
        (dict(step=0.1, levels=3), "step and levels"),
        (dict(step=0.1, codebook="nf4"), "step and codebook"),
        (dict(codebook="nf4", stochastic=True), "codebook and stochastic"),
        (dict(codebook="nf4", levels=8), "levels is 8"),
        (dict(codebook="kmeans", levels=5), "levels is 5"),
        (dict(codebook=torch.ones(3).cumsum(0), levels=4), "levels is 4"),
        (dict(axis=0, scale=torch.ones(2, 2)), "scale has shape"),
        (dict(group=4, scale=torch.ones(2, 4)), "scale has shape"),
        (dict(scale="a"), "scale is 'a'"),
        (dict(symmetric=False, scale=1.0, zero_point=3.5), "zero_point must be whole"),
        (dict(symmetric=False, scale=1.0, zero_point="a"), "zero_point is 'a'"),
        (dict(axis=0, symmetric=False, scale=torch.ones(4), zero_point=torch.ones(3)), "zero_point has shape"),
        (dict(codebook=3), "codebook is"),
    ],
)
def test_what_would_be_ignored_or_guessed_is_refused(how, says):
    with pytest.raises((ValueError, TypeError), match=says):
        quantize(r(4, 8), **how)


def test_a_codebook_that_lets_everything_become_zero_warns():
    with pytest.warns(UserWarning, match="every code is zero"):
        quantize(torch.full((8,), 0.01), codebook=torch.tensor([-1.0, 0.0, 1.0]), scale=1.0)
    assert quantize(quantize_layer(nn.Linear(4, 4)).weight, 4).shape == (4, 4)  # a weight that can only be read


def test_ambient_state_and_the_callers_tensors_do_not_matter():
    x, columns, table = r(4, 8), torch.rand(8) + 0.5, torch.tensor([-1.0, 0.0, 0.5, 1.0])
    cases = [
        dict(bits=4, axis=0),
        dict(bits=1, group=4),
        dict(codebook="nf4", group=4),
        dict(codebook="kmeans", bits=2),
        dict(bits=4, symmetric=False, observer="mse"),
        dict(observer="entropy"),
        dict(step=0.1),
        dict(codebook=table),
        dict(columns=columns),
    ]
    for how in cases:
        with unchanged(x, columns, table):
            plain = quantize(x, **how)
        try:
            torch.set_default_dtype(torch.float64)
            with torch.autocast("cpu", torch.bfloat16):
                assert quantize(x, **how) == plain
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert quantize(x, **how) == plain
    before = [quantize(x, codebook=table), quantize(x, columns=columns)]
    values = [q.dequantize() for q in before]
    table.mul_(2)
    columns.mul_(2)
    for q, v in zip(before, values):
        assert torch.equal(q.dequantize(), v)
    layer = quantize_layer(nn.Linear(4, 4))
    with torch.device("meta"):
        state = layer.state_dict()
    assert not any(t.is_meta for t in state.values())


def test_gpt2_is_compressed_whole_and_stays_itself():
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
    ).eval()
    small, tokens = quantize_model(model, 4), torch.arange(6)[None]
    assert (
        set(floats_left(small).values()) == {"small: a bias, a norm or another vector"}
        and small.lm_head.packed is small.transformer.wte.packed
    )
    assert small.transformer.h[0].attn.c_attn.q.axis == 1 and small.transformer.h[0].attn.c_attn.q.scale.shape == (48,)
    with torch.no_grad():
        assert_same(small(tokens).logits, with_numbers_of(model, small)(tokens).logits)
        assert_same(dequantize_model(small)(tokens).logits, small(tokens).logits)
        codes_alone(model, small, tokens)


class HookOfItsOwn(nn.Module):
    "A hook that is a method of the model leads back to the model while it is copied."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(6, 6), nn.Linear(6, 6), 2.0
        self.first.register_forward_hook(self.scaled)

    def scaled(self, layer, inputs, output):
        return output * self.factor

    def forward(self, x):
        return self.second(self.first(x))


def test_a_hook_that_is_a_method_of_the_model_belongs_to_the_copy():
    model, x = HookOfItsOwn(), torch.randn(4, 6)
    small = quantize_model(model, 8)
    assert isinstance(small.first, Dequantize) and isinstance(small.second, Dequantize)
    plain = dequantize_model(small)
    assert not any(isinstance(m, Dequantize) for m in plain.modules())
    codes_alone(model, small, x)
    assert torch.equal(small(x), plain(x))
    small.factor = 0.0
    assert (
        torch.equal(small(x), small.second(torch.zeros(4, 6)))
        and not torch.equal(plain(x), small(x))
        and model.factor == 2.0
    )


@pytest.mark.parametrize(
    "usual, said, wanted",
    [
        (dict(levels=3), dict(bits=8), "8-bit symmetric"),
        (dict(step=0.1), dict(bits=8), "8-bit symmetric"),
        (dict(codebook="nf4"), dict(bits=8), "8-bit symmetric"),
        (dict(codebook="nf4"), dict(levels=3), "3-level symmetric"),
        (dict(levels=3), dict(codebook="nf4"), "4-bit codebook"),
        (dict(codebook="kmeans", levels=8), dict(bits=2), "2-bit codebook"),
        (dict(group=4), dict(per_channel=False), "8-bit symmetric, per tensor"),
        (dict(levels=3), dict(group=4), "3-level symmetric, group 4"),
    ],
)
def test_what_is_said_of_one_layer_wins_over_what_is_said_of_all(usual, said, wanted):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    whole, alone = quantize_model(model, **usual, overrides={"a": said}), quantize_model(model, **usual)
    assert whole["a"].q.describe().startswith(wanted)
    assert whole["b"].q == alone["b"].q


def test_an_option_that_would_not_act_is_refused():
    x = torch.randn(4, 8)
    for how, says in (
        (dict(codebook="nf4", observer="mse"), "codebook and observer"),
        (dict(step=0.1, observer="mse"), "step and observer"),
        (dict(scale=1.0, observer="nonsense"), "scale and observer"),
        (dict(generator=torch.Generator()), "stochastic=True"),
    ):
        with pytest.raises(ValueError, match=says):
            quantize(x, **how)


@pytest.mark.filterwarnings("ignore:quantize replaced")
def test_an_infinity_becomes_the_largest_value_with_column_scales_too():
    x = torch.tensor([[1.0, math.inf], [2.0, 3.0]])
    assert (
        quantize(x, 8, nonfinite="clip", columns=torch.tensor([1.0, 100.0])).dequantize()[:, 1] - 3
    ).abs().max() < 0.2


class Merging(nn.Linear):
    "An adapter that is merged in eval mode, as loralib does it."

    def __init__(self):
        super().__init__(16, 8)
        self.more, self.merged = nn.Parameter(torch.ones(8, 16)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.more.data * (-1 if mode else 1)
            self.merged = not mode
        return self


def test_what_merges_into_a_compressed_weight_and_what_scripts_it_is_refused_by_name():
    q = quantize_model(nn.Sequential(Merging()))
    with pytest.raises(RuntimeError, match=r"Merging.eval\(\) works on a weight that is compressed"):
        q.eval()
    q = quantize_model(nn.Sequential(Merging()).eval())
    assert q.eval() is q
    with pytest.raises(RuntimeError, match=r"Merging.train\(\) works on a weight that is compressed"):
        q.train()
    with pytest.raises(RuntimeError, match="torch.jit.script cannot read a Dequantize"):
        torch.jit.script(quantize_model(nn.Sequential(nn.Linear(8, 8))))


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (64, 9), (3, 5000), (33, 1000)])
@pytest.mark.parametrize(
    "levels, symmetric, dtype",
    [(256, True, torch.float32), (16, False, torch.float64), (2, True, torch.bfloat16), (3, False, torch.float16)],
)
def test_ranges_tried_together_are_those_tried_in_turn(monkeypatch, shape, levels, symmetric, dtype):
    "20,000 small tensors took 60 calls each: what is tried at once is the same to the bit."
    blocks = torch.randn(shape, generator=torch.manual_seed(0)).pow(3).to(dtype)
    together = quant.MSE()(blocks, levels, symmetric)
    monkeypatch.setattr(bites, "BITE", 1)
    assert all(map(torch.equal, together, quant.MSE()(blocks, levels, symmetric)))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.int32]
)
def test_one_value_that_is_not_finite_is_seen(dtype):
    for shape in ((0,), (1,), (3, 0), (257, 33)):
        x = torch.ones(shape).to(dtype)
        assert all_finite(x) and all_finite(x.t() if x.dim() == 2 else x)
        for bad in (math.nan, math.inf, -math.inf) if x.numel() and dtype.is_floating_point else ():
            for at in {0, x.numel() // 2, x.numel() - 1}:
                y = x.float().flatten().index_fill(0, torch.tensor(at), bad).reshape(shape).to(dtype)
                assert not all_finite(y)
