"""Removing channels: the smaller model must give what the masked one gives, for every kind of layer and of wiring;
and what is not safe is left alone."""

import copy, math, warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelzip.data import LeNet5, minilm, register_model
from modelzip.measure import tensor_bytes
from modelzip.pack import load, save
from modelzip.quant import quantize_model
from modelzip.prune import mask_layer, prune_model
from modelzip.structured import (
    RemainingAttention,
    RemainingLayerNorm,
    RemainingRMSNorm,
    ThinLinear,
    channel_groups,
    channel_scores,
    choose_channels,
    factorize,
    fold_batchnorm,
    foldable,
    shrink,
    total_macs,
)
from torchvision_models import torchvision_models

torch.set_num_threads(1)


# ---- the acid test ------------------------------------------------------------------------------------------------
def messy(model, seed=0):
    "Random numbers everywhere, so that nothing is zero or one by chance."
    g = torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    for n, b in model.named_buffers():
        if n.endswith("running_mean"):
            b.data = 0.3 * torch.randn(b.shape, generator=g)
        if n.endswith("running_var"):
            b.data = torch.rand(b.shape, generator=g) + 0.5
    return model.eval()


def outputs(model, example):
    with torch.no_grad():
        y = (
            model(**example)
            if isinstance(example, dict)
            else model(*example)
            if isinstance(example, tuple)
            else model(example)
        )
    return [
        t
        for t in (y if isinstance(y, (tuple, list)) else y.values() if isinstance(y, dict) else [y])
        if isinstance(t, torch.Tensor)
    ]


def zeroed(model, channels):
    "The channels set to zero, by hand."
    new = copy.deepcopy(model)
    for (name, axis), gone in channels.items():
        if name in dict(new.named_parameters()):
            new.get_parameter(name).data.movedim(axis, 0)[gone] = 0
    return new


def acid(model, example, groups=None, ratio=0.5, **how):
    "Mask by hand, shrink, compare in double precision; returns the choice and the smaller model."
    model = messy(copy.deepcopy(model)).double()
    to = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    example = (
        [to(x) for x in example]
        if isinstance(example, list)
        else (
            {k: to(v) for k, v in example.items()}
            if isinstance(example, dict)
            else tuple(map(to, example))
            if isinstance(example, tuple)
            else to(example)
        )
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    choice = choose_channels(model, example, ratio, round_to=1, **how)
    small = shrink(model, example, ratio, round_to=1, groups=choice.groups, **how)  # the same groups, found once
    for x in example if isinstance(example, list) else [example]:
        for a, b in zip(outputs(small, x), outputs(zeroed(model, choice.channels), x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    if groups is not None:
        assert {g.name: len(g) for g in choice.groups} == groups
    return choice, small


class Net(nn.Module):
    "Layers by name, and a function that calls them."

    def __init__(self, forward, **layers):
        super().__init__()
        self.f = forward
        for k, m in layers.items():
            setattr(self, k, m)

    def forward(self, *args, **kwargs):
        return self.f(self, *args, **kwargs)


IMAGE, ROWS, SEQUENCE = torch.randn(2, 3, 12, 12), torch.randn(5, 12), torch.randn(2, 7, 12)
conv = lambda i, o, k=3, **how: nn.Conv2d(i, o, k, padding=k // 2, **how)

CASES = {
    "dense": (
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 4)),
        ROWS,
        {"0": 16, "2": 8},
    ),
    "LeNet-5": (LeNet5(), torch.randn(2, 1, 28, 28), {"conv1": 20, "conv2": 50, "fc1": 500}),
    "BatchNorm and bias": (
        nn.Sequential(
            conv(3, 8, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            conv(8, 8),
            nn.BatchNorm2d(8, affine=False),
            nn.Flatten(),
            nn.Linear(8 * 144, 3),
        ),
        IMAGE,
        {"0": 8, "3": 8},
    ),
    "BatchNorm1d": (nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), ROWS, {"0": 8}),
    "InstanceNorm": (
        nn.Sequential(
            conv(3, 8),
            nn.InstanceNorm2d(8),
            conv(8, 8),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            conv(8, 2),
        ),
        IMAGE,
        {"0": 8, "2": 8},
    ),
    "GroupNorm": (nn.Sequential(conv(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 2)), IMAGE, {"0": 4}),
    "GroupNorm without parameters": (
        nn.Sequential(conv(3, 16), nn.GroupNorm(8, 16, affine=False), nn.ReLU(), conv(16, 2)),
        IMAGE,
        {"0": 8},
    ),
    "LayerNorm": (nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)), ROWS, {"0": 16}),
    "LayerNorm without parameters": (
        nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16, elementwise_affine=False), nn.GELU(), nn.Linear(16, 4)),
        ROWS,
        {"0": 16},
    ),
    "PReLU": (nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 8), nn.PReLU(), conv(8, 2)), IMAGE, {"0": 8, "2": 8}),
    "Conv1d": (
        nn.Sequential(nn.Conv1d(7, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 2, 1)),
        SEQUENCE,
        {"0": 8},
    ),
    "Conv3d": (
        nn.Sequential(nn.Conv3d(1, 6, 3), nn.BatchNorm3d(6), nn.MaxPool3d(2), nn.Conv3d(6, 2, 1)),
        torch.randn(1, 1, 8, 8, 8),
        {"0": 6},
    ),
    "transposed": (
        nn.Sequential(
            nn.ConvTranspose2d(3, 8, 2, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 3),
            nn.ConvTranspose2d(6, 6, 2, groups=6),
            conv(6, 2),
        ),
        IMAGE,
        {"0": 8, "3": 6},
    ),
    "transposed in groups": (
        nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, groups=4), conv(12, 2)),
        IMAGE,
        {"0": 4},
    ),
    "depthwise": (
        nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.ReLU(), conv(8, 4, 1), conv(4, 2)),
        IMAGE,
        {"0": 8, "3": 4},
    ),
    "depthwise, two each": (
        nn.Sequential(conv(3, 8), conv(8, 16, groups=8), nn.BatchNorm2d(16), conv(16, 2)),
        IMAGE,
        {"0": 8},
    ),
    "many groups": (nn.Sequential(conv(3, 32), conv(32, 32, groups=8), conv(32, 2)), IMAGE, {"0": 8}),
    "few groups": (nn.Sequential(conv(3, 16), conv(16, 32, groups=2), conv(32, 2)), IMAGE, {"0": 8, "1": 16}),
    "circular padding": (
        nn.Sequential(conv(3, 8, padding_mode="circular"), nn.ZeroPad2d(1), conv(8, 2)),
        IMAGE,
        {"0": 8},
    ),
    "pooling and upsampling": (
        nn.Sequential(
            conv(3, 8),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.Upsample(scale_factor=2),
            conv(8, 4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        IMAGE,
        {"0": 8, "4": 4},
    ),
    "flatten": (
        nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(4 * 144, 6), nn.Linear(6, 2)),
        IMAGE,
        {"0": 4, "2": 6},
    ),
    "unflatten": (
        nn.Sequential(nn.Linear(12, 96), nn.Unflatten(1, (24, 2, 2)), nn.ConvTranspose2d(24, 6, 2), conv(6, 2)),
        ROWS,
        {"0": 24, "2": 6},
    ),
    "embedding": (
        nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randint(0, 20, (2, 5)),
        {"0": 16, "1": 8},
    ),
    "LSTM": (
        Net(
            lambda s, x: s.fc(s.rnn(s.stem(x))[0]),
            stem=nn.Linear(12, 8),
            rnn=nn.LSTM(8, 10, batch_first=True),
            fc=nn.Linear(10, 2),
        ),
        SEQUENCE,
        {"stem": 8, "rnn": 10},
    ),
    "LSTM, deep, both ways": (
        Net(
            lambda s, x: s.fc(s.rnn(x)[0]),
            rnn=nn.LSTM(12, 6, 3, bidirectional=True, batch_first=True),
            fc=nn.Linear(12, 2),
        ),
        SEQUENCE,
        {"rnn": 6},
    ),
    "GRU, last state": (
        Net(lambda s, x: s.fc(s.rnn(x)[1][-1]), rnn=nn.GRU(12, 6, 2, batch_first=True), fc=nn.Linear(6, 2)),
        SEQUENCE,
        {"rnn": 6},
    ),
    "RNN without bias": (
        Net(lambda s, x: s.fc(s.rnn(x)[0]), rnn=nn.RNN(12, 6, bias=False), fc=nn.Linear(6, 2)),
        SEQUENCE,
        {"rnn": 6},
    ),
    "glu": (Net(lambda s, x: s.b(F.glu(s.a(x))), a=nn.Linear(12, 16), b=nn.Linear(8, 2)), ROWS, {"a": 8}),
    "gate by chunk": (
        Net(
            lambda s, x: (lambda a, b: s.b(a * F.silu(b)))(*s.a(x).chunk(2, -1)), a=nn.Linear(12, 16), b=nn.Linear(8, 2)
        ),
        ROWS,
        {"a": 8},
    ),
    "gate by slices": (
        Net(
            lambda s, x: (lambda y: s.b(y[..., : y.shape[-1] // 2] * y[..., y.shape[-1] // 2 :].sigmoid()))(s.a(x)),
            a=nn.Linear(12, 16),
            b=nn.Linear(8, 2),
        ),
        ROWS,
        {"a": 8},
    ),
    "two gates": (
        Net(lambda s, x: s.c(F.silu(s.a(x)) * s.b(x)), a=nn.Linear(12, 8), b=nn.Linear(12, 8), c=nn.Linear(8, 2)),
        ROWS,
        {"a": 8},
    ),
    "squeeze and excite": (
        Net(
            lambda s, x: (lambda y: s.out(y * s.up(s.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()))(s.stem(x)),
            stem=conv(3, 8),
            down=conv(8, 4, 1),
            up=conv(4, 8, 1),
            out=conv(8, 2),
        ),
        IMAGE,
        {"stem": 8, "down": 4},
    ),
    "concatenation": (
        Net(lambda s, x: s.c(torch.cat([s.a(x), x, s.b(x)], 1)), a=conv(3, 6), b=conv(3, 4), c=conv(13, 2)),
        IMAGE,
        {"a": 6, "b": 4},
    ),
    "dense block": (
        Net(
            lambda s, x: (lambda a: (lambda b: s.c(torch.cat([x, a, b], 1)))(s.b(torch.cat([x, a], 1))))(s.a(x)),
            a=conv(3, 6),
            b=conv(9, 4),
            c=conv(13, 2),
        ),
        IMAGE,
        {"a": 6, "b": 4},
    ),
    "residual": (
        Net(
            lambda s, x: (lambda y: s.out(y + s.b(s.a(y).relu())))(s.stem(x)),
            stem=conv(3, 8),
            a=conv(8, 6),
            b=conv(6, 8),
            out=conv(8, 2),
        ),
        IMAGE,
        {"stem": 8, "a": 6},
    ),
    "residual over a concatenation": (
        Net(
            lambda s, x: s.out(torch.cat([s.a(x), s.b(x)], 1) + s.c(x)),
            a=conv(3, 4),
            b=conv(3, 6),
            c=conv(3, 10),
            out=conv(10, 2),
        ),
        IMAGE,
        None,
    ),
    "one layer twice": (
        Net(
            lambda s, x: s.out(s.a(s.a(s.stem(x)).relu())),
            stem=nn.Linear(12, 8),
            a=nn.Linear(8, 8),
            out=nn.Linear(8, 2),
        ),
        ROWS,
        {"stem": 8},
    ),
    "split": (
        Net(
            lambda s, x: (lambda a, b: s.c(a) + s.d(b))(*s.a(x).split(8, 1)), a=conv(3, 16), c=conv(8, 2), d=conv(8, 2)
        ),
        IMAGE,
        {},
    ),
    "shuffle": (
        Net(
            lambda s, x: s.b(s.a(x).view(2, 2, -1, 12, 12).transpose(1, 2).reshape(2, -1, 12, 12)),
            a=conv(3, 16),
            b=conv(16, 2),
        ),
        IMAGE,
        {"a": 8},
    ),
    "pixel shuffle": (
        nn.Sequential(conv(3, 32), nn.PixelShuffle(2), conv(8, 4), nn.PixelUnshuffle(2), conv(16, 2)),
        IMAGE,
        {"0": 8, "2": 4},
    ),
    "a parameter of the model itself": (None, SEQUENCE, None),
    "matrix product": (
        Net(
            lambda s, x: (s.q(x) @ s.k(x).mT).softmax(-1) @ s.v(x) @ s.w.weight.T,
            q=nn.Linear(12, 8),
            k=nn.Linear(12, 8),
            v=nn.Linear(12, 6),
            w=nn.Linear(6, 3, bias=False),
        ),
        SEQUENCE,
        {"q": 8, "v": 6},
    ),
    "einsum": (
        Net(
            lambda s, x: s.out(torch.einsum("bid,bjd->bij", s.q(x), s.k(x)).softmax(-1) @ s.v(x)),
            q=nn.Linear(12, 8),
            k=nn.Linear(12, 8),
            v=nn.Linear(12, 6),
            out=nn.Linear(6, 3),
        ),
        SEQUENCE,
        {"q": 8, "v": 6},
    ),
    "permute and channels last": (
        Net(lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1)).movedim(-1, 1), a=conv(3, 8), b=nn.Linear(8, 3)),
        IMAGE,
        {"a": 8},
    ),
    "sum over channels": (Net(lambda s, x: s.out(s.a(x).sum(1)), a=conv(3, 8), out=nn.Linear(12, 3)), IMAGE, {"a": 8}),
    "named arguments": (
        Net(
            lambda s, left, right: s.out(s.a(left) + s.b(right)),
            a=nn.Linear(12, 8),
            b=nn.Linear(12, 8),
            out=nn.Linear(8, 3),
        ),
        {"left": ROWS, "right": ROWS},
        {"a": 8},
    ),
    "several outputs": (
        Net(
            lambda s, x: {"x": s.b(h := s.a(x)), "y": s.c(h)}, a=nn.Linear(12, 8), b=nn.Linear(8, 2), c=nn.Linear(8, 3)
        ),
        ROWS,
        {"a": 8},
    ),
    "attention of PyTorch": (
        Net(
            lambda s, x: s.out(s.mha(y := s.stem(x), y, y)[0]),
            stem=nn.Linear(12, 16),
            mha=nn.MultiheadAttention(16, 4, batch_first=True),
            out=nn.Linear(16, 2),
        ),
        SEQUENCE,
        None,
    ),
    "attention, keys of another width": (
        Net(
            lambda s, x, y: s.out(s.mha(s.stem(x), y, y, need_weights=False)[0]),
            stem=nn.Linear(12, 16),
            mha=nn.MultiheadAttention(16, 4, batch_first=True, kdim=5, vdim=5),
            out=nn.Linear(16, 2),
        ),
        (SEQUENCE, torch.randn(2, 4, 5)),
        None,
    ),
    "TransformerEncoder": (
        Net(
            lambda s, x: s.out(s.body(s.stem(x))),
            stem=nn.Linear(12, 16),
            body=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=False
            ),
            out=nn.Linear(16, 2),
        ),
        SEQUENCE,
        None,
    ),
    "TransformerDecoder, norm first": (
        Net(
            lambda s, x, y: s.out(s.body(s.stem(x), s.stem(y))),
            stem=nn.Linear(12, 16),
            body=nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, norm_first=True), 1),
            out=nn.Linear(16, 2),
        ),
        (SEQUENCE, torch.randn(5, 7, 12)),
        None,
    ),
}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 8, 16))
        self.scale, self.stem, self.out = nn.Parameter(torch.randn(16)), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.stem(x)], 1) + self.place
        return self.out((x * self.scale)[:, 0])


CASES["a parameter of the model itself"] = Tokens(), SEQUENCE, {"stem": 16}


class Heads(nn.Module):
    "Attention as it is written by hand, with sizes in attributes."

    def __init__(self, width=24, heads=6, way=0):
        super().__init__()
        self.width, self.heads, self.head_dim, self.way = width, heads, width // heads, way
        self.qkv, self.out = nn.Linear(12, 3 * width), nn.Linear(width, 5)

    def forward(self, x):
        b, n, _ = x.shape
        if self.way == 0:
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.way == 1:
            q, k, v = (
                t.view(b, n, self.heads, self.width // self.heads).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
            )
        if self.way == 2:
            q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v) if self.way else (q @ k.mT * self.head_dim**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, self.width) if self.way < 2 else y.transpose(1, 2).flatten(2))


for way in range(3):
    CASES[f"heads by hand, {way}"] = Heads(way=way), SEQUENCE, {"qkv": 6}


@pytest.mark.parametrize("name", CASES)
def test_shrunk_gives_what_the_masked_gives(name):
    model, example, groups = CASES[name]
    if groups == {}:
        return
    _, small = acid(model, example, groups)
    assert not any(isinstance(m, (nn.MultiheadAttention,)) for m in small.modules())


@pytest.mark.parametrize(
    "name", ["dense", "residual", "many groups", "LSTM", "attention of PyTorch", "heads by hand, 0", "LayerNorm"]
)
def test_shrunk_twice(name):
    model, example, _ = CASES[name]
    acid(acid(model, example)[1].float(), example)


def test_minilm_loses_heads_and_hidden_channels():
    model = copy.deepcopy(minilm())
    del model.blocks[2:]  # two of six that are alike
    example = torch.randint(1000, 20000, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    groups = channel_groups(model, example)
    assert {g.name: (len(g), g.width) for g in groups} == {
        f"blocks.{i}.{n}": s for i in range(2) for n, s in {"attention.query": (12, 32), "up": (1536, 1)}.items()
    }
    choice = choose_channels(model, example, 0.25, groups=groups)
    small = shrink(model, example, 0.25, groups=groups)
    assert [b.attention.heads for b in small.blocks] == [9] * 2 and small.blocks[0].up.out_features == 1152
    torch.testing.assert_close(small(*example), choice.masked()(*example), rtol=1e-4, atol=1e-5)


# ---- whole architectures ------------------------------------------------------------------------------------------
class ChannelsFirst(nn.LayerNorm):
    "As in ConvNeXt."

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class ConvBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.depthwise, self.norm, self.up, self.down = (
            conv(d, d, 5, groups=d),
            nn.LayerNorm(d),
            nn.Linear(d, 4 * d),
            nn.Linear(4 * d, d),
        )
        self.scale = nn.Parameter(torch.rand(d))

    def forward(self, x):
        return x + (self.scale * self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))).permute(
            0, 3, 1, 2
        )


class Decoder(nn.Module):
    "Llama's block: RMSNorm, keys that serve two heads each, rotated; a gated network."

    def __init__(self, d=32, heads=4, keys=2):
        super().__init__()
        self.heads, self.keys, self.head_dim = heads, keys, d // heads
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.norm1, self.norm2, self.q, self.k, self.v, self.o = (
            nn.RMSNorm(d),
            nn.RMSNorm(d, 1e-5),
            linear(d, d),
            linear(d, d // 2),
            linear(d, d // 2),
            linear(d, d),
        )
        self.gate, self.up, self.down = linear(d, 48), linear(d, 48), linear(48, d)

    def attention(self, x):
        b, n, _ = x.shape
        angle = torch.arange(n, dtype=x.dtype)[:, None] * torch.rand(
            self.head_dim, generator=torch.Generator().manual_seed(0)
        ).to(x.dtype)
        turned = lambda t: (
            t * angle.cos() + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * angle.sin()
        )
        q, k, v = (
            f(x).view(b, n, h, self.head_dim).transpose(1, 2)
            for f, h in ((self.q, self.heads), (self.k, self.keys), (self.v, self.keys))
        )
        k, v = (
            t[:, :, None]
            .expand(b, self.keys, self.heads // self.keys, n, self.head_dim)
            .reshape(b, self.heads, n, self.head_dim)
            for t in (turned(k), v)
        )
        return self.o(F.scaled_dot_product_attention(turned(q), k, v, is_causal=True).transpose(1, 2).reshape(b, n, -1))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Packed(nn.Module):
    "Sequences of different lengths."

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.out = (
            nn.Embedding(20, 8),
            nn.LSTM(8, 10, 2, batch_first=True, bidirectional=True),
            nn.Linear(20, 3),
        )

    def forward(self, x, lengths):
        y, _ = self.rnn(
            nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        )
        return self.out(nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0])


class Causal(nn.Module):
    "Places and a mask for longer sequences than the example's; width and number of heads stand in one reshape."

    def __init__(self, d=24, heads=4, longest=16):
        super().__init__()
        self.heads, self.place, self.embed = heads, nn.Parameter(torch.randn(1, longest, d)), nn.Embedding(20, d)
        self.qkv, self.o, self.up, self.down = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 64), nn.Linear(64, d)
        self.register_buffer("mask", torch.ones(longest, longest).tril()[None, None])

    def forward(self, x):
        x = self.embed(x) + self.place[:, : x.shape[1]]
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, d // self.heads).transpose(1, 2) for t in self.qkv(x).split(d, 2))
        p = (q @ k.mT / math.sqrt(k.shape[-1])).masked_fill(self.mask[:, :, :n, :n] == 0, -math.inf).softmax(-1)
        x = x + self.o((p @ v).transpose(1, 2).reshape(b, n, d))
        return (x + self.down(self.up(x).relu())) @ self.embed.weight.T


WORDS = torch.randint(0, 20, (2, 6))
WHOLE = {
    "ConvNeXt": (
        nn.Sequential(
            nn.Conv2d(3, 12, 2, 2),
            ChannelsFirst(12),
            ConvBlock(12),
            ChannelsFirst(12),
            nn.Conv2d(12, 16, 2, 2),
            ConvBlock(16),
            conv(16, 3),
        ),
        IMAGE,
        {"0": 12, "2.up": 48, "4": 16, "5.up": 64},
    ),
    "Llama": (
        nn.Sequential(
            nn.Embedding(20, 32), Decoder(), Decoder(), nn.RMSNorm(32, elementwise_affine=False), nn.Linear(32, 20)
        ),
        WORDS,
        {"0": 32, "1.q": 2, "1.gate": 48, "2.q": 2, "2.gate": 48},
    ),
    "packed": (Packed(), (WORDS, torch.tensor([6, 3])), {"embed": 8, "rnn": 10}),
    "causal": (Causal(), WORDS, {"up": 64}),
    "U-Net": (
        Net(
            lambda s, x: s.out(
                torch.cat([y := s.down1(x).relu(), F.pad(s.up(s.down2(F.max_pool2d(y, 2)).relu()), (0, 1, 0, 1))], 1)
            ),
            down1=conv(3, 8),
            down2=conv(8, 16),
            up=nn.ConvTranspose2d(16, 8, 2, 2),
            out=conv(16, 2),
        ),
        torch.randn(1, 3, 13, 13),
        {"down1": 8, "down2": 16, "up": 8},
    ),
    "WaveNet": (
        Net(
            lambda s, x: (
                lambda y: (
                    s.skip(z := s.filter(F.pad(y, (2, 0))).tanh() * s.gate(F.pad(y, (2, 0))).sigmoid())
                    + s.last(y + s.res(z))
                )
            )(s.i(x)),
            i=nn.Conv1d(7, 12, 1),
            filter=nn.Conv1d(12, 10, 2, dilation=2),
            gate=nn.Conv1d(12, 10, 2, dilation=2),
            res=nn.Conv1d(10, 12, 1),
            skip=nn.Conv1d(10, 4, 1),
            last=nn.Conv1d(12, 4, 1),
        ),
        SEQUENCE,
        {"i": 12, "filter": 10},
    ),
    "two towers": (
        Net(
            lambda s, x, y: (lambda a, b: a / a.norm(dim=-1, keepdim=True) @ (b / b.norm(dim=-1, keepdim=True)).T)(
                s.a(x), s.b(y)
            ),
            a=nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 24)),
            b=nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 24)),
        ),
        (ROWS, ROWS.flip(0)),
        {"a.0": 16, "a.2": 24, "b.0": 20},
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_architectures(name):
    model, example, groups = WHOLE[name]
    choice, small = acid(model, example, groups)
    if name in ("Llama", "causal"):  # longer sequences than the example's are as right as they were
        longer = torch.randint(0, 20, (1, 16))
        torch.testing.assert_close(
            outputs(small, longer), outputs(zeroed(choice.model, choice.channels), longer), rtol=1e-8, atol=1e-9
        )
    if name == "Llama":
        assert sum(type(m) is RemainingRMSNorm for m in small.modules()) == 5


def test_ordinary_norms_on_request():
    for name in "ConvNeXt", "Llama":
        model, example, _ = WHOLE[name]
        small = shrink(model, example, 0.5, exact=False)
        assert {type(m) for m in small.modules() if "Norm" in type(m).__name__ or isinstance(m, nn.LayerNorm)} <= {
            nn.LayerNorm,
            nn.RMSNorm,
            ChannelsFirst,
        }
        assert all(y.isfinite().all() for y in outputs(small, example))


def test_a_bias_lifts_zeros_along_another_axis():
    mixer = Net(
        lambda s, x: s.out(s.norm((y := s.stem(x)) + s.mix(y.mT).mT)),
        stem=nn.Linear(12, 16),
        mix=nn.Linear(7, 7),
        norm=nn.LayerNorm(16),
        out=nn.Linear(16, 2),
    )
    groups = channel_groups(mixer, SEQUENCE)
    assert [g.name for g in groups] == [] and "need not be zero" in groups.left["stem"]
    mixer.mix = nn.Linear(7, 7, bias=False)
    acid(mixer, SEQUENCE, {"stem": 16})


def test_masked_layers_are_named():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    assert "its weight is parametrized, such as by a mask" in channel_groups(prune_model(model, 0.5), ROWS).left["0"]


# ---- what is left alone -------------------------------------------------------------------------------------------
class Flat(nn.Module):
    "Its size stands in the code."

    def __init__(self):
        super().__init__()
        self.conv, self.mid, self.fc = conv(3, 8), conv(8, 4), nn.Linear(4 * 144, 5)

    def forward(self, x):
        return self.fc(self.mid(self.conv(x).relu()).view(-1, 576))


@pytest.mark.parametrize(
    "model, example, free, left",
    [
        (Flat(), IMAGE, ["conv"], {"mid": "view"}),
        (
            Flat(),
            torch.randn(4, 3, 12, 12),
            ["conv"],
            {"mid": "view"},
        ),  # two of these images with half of the channels are one with all
        (Net(lambda s, x: s.b(s.a(x).softmax(-1)), a=nn.Linear(12, 8), b=nn.Linear(8, 2)), ROWS, [], {"a": "softmax"}),
        (
            Net(lambda s, x: s.b(s.a(x) + s.a(x).mean(-1, keepdim=True)), a=nn.Linear(12, 8), b=nn.Linear(8, 2)),
            ROWS,
            [],
            {"a": "mean"},
        ),
        (Net(lambda s, x: s.b(s.a(x)[:, 3:4]), a=nn.Linear(12, 8), b=nn.Linear(1, 2)), ROWS, [], {"a": "number"}),
        (
            Net(lambda s, x: s.b(s.a(x)[:, [0, 2, 1, 3]]), a=nn.Linear(12, 4), b=nn.Linear(4, 2)),
            ROWS,
            [],
            {"a": "number"},
        ),
        (Net(lambda s, x: s.b(s.a(x).cumsum(-1)), a=nn.Linear(12, 4), b=nn.Linear(4, 2)), ROWS, [], {"a": "cumsum"}),
        (Net(lambda s, x: s.b(s.a(x) + x), a=nn.Linear(12, 12), b=nn.Linear(12, 2)), ROWS, [], {"a": "fixed size"}),
        (
            Net(lambda s, x: s.b(torch.fft.fft(s.a(x)).real), a=nn.Linear(12, 12), b=nn.Linear(12, 2)),
            ROWS,
            [],
            {"a": "fft"},
        ),
        (
            Net(lambda s, x: s.b(torch.from_numpy(s.a(x).numpy() * 2)), a=nn.Linear(12, 12), b=nn.Linear(12, 2)),
            ROWS,
            [],
            {"a": ""},
        ),
        (Net(lambda s, x: s.b(s.a(x).sigmoid().sum(1)), a=conv(3, 8), b=nn.Linear(12, 2)), IMAGE, [], {"a": "sum"}),
        (
            Net(lambda s, x: s.b(s.a(x) / math.sqrt(s.a(x).shape[-1])), a=nn.Linear(12, 8), b=nn.Linear(8, 2)),
            ROWS,
            [],
            {"a": "constant"},
        ),
        (
            Net(lambda s, x: s.b(F.local_response_norm(s.a(x), 3)), a=conv(3, 8), b=conv(8, 2)),
            IMAGE,
            [],
            {"a": "local_response_norm"},
        ),
        (nn.Sequential(nn.Linear(12, 8), nn.Sigmoid(), nn.LayerNorm(8), nn.Linear(8, 2)), ROWS, [], {"0": "LayerNorm"}),
        (nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), conv(8, 2)), IMAGE, [], {}),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 8)), nn.Linear(8, 2)), ROWS, [], {}),
        (quantize_model(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)), 8), ROWS, [], {}),
    ],
    ids=range(17),
)
def test_what_is_not_safe_is_left_alone(model, example, free, left):
    groups = channel_groups(model.eval(), example)
    assert [g.name for g in groups] == free
    for layer, why in left.items():
        assert why in groups.left[layer]
    if not free:
        with pytest.raises(ValueError, match="no channels that can be removed"):
            shrink(model, example, 0.5)


def test_any_branch_the_example_takes():
    "Control flow that a tracer could not follow."
    f = lambda s, x: s.c(s.a(x) if x.sum() > 0 else s.b(x))
    net = Net(f, a=nn.Linear(12, 8), b=nn.Linear(12, 8), c=nn.Linear(8, 2))
    with pytest.raises(ValueError, match="b may read it, which no example calls"):
        choose_channels(net, ROWS.abs(), 0.5)
    choice, small = acid(net, [ROWS.abs(), -ROWS.abs()])
    assert [g.name for g in choice.groups] == ["a"] and {m[0] for m in choice.groups["a"].members} == {
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
        "c.weight",
    }


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.mid(self.embed(x)).relu())

    _, small = acid(Tied(), torch.randint(0, 20, (2, 5)))
    assert small.out.weight is small.embed.weight and small.embed.embedding_dim == 8 == small.out.in_features


def test_kept_layers_and_names():
    model, example, _ = CASES["dense"]
    assert [g.name for g in channel_groups(model, example, keep=["0"])] == ["2"]
    with pytest.raises(ValueError, match="'9'"):
        channel_groups(model, example, keep=["9"])
    with pytest.raises(TypeError, match="model is 3; it may be an nn.Module"):
        channel_groups(3, example)


def test_mode_gradients_and_hooks_are_as_before():
    model = CASES["residual"][0].train()
    model.a.weight.requires_grad_(False)
    small = shrink(model, IMAGE, 0.5)
    assert model.training and small.training and not small.a.weight.requires_grad and small.b.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, small) for m in net.modules())
    small(IMAGE).sum().backward()
    assert small.b.weight.grad.shape == small.b.weight.shape
    model.a.weight.requires_grad_(True)


# ---- choosing -----------------------------------------------------------------------------------------------------
def test_the_lowest_go():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data = torch.arange(8.0)[:, None].expand(8, 12)[torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])].clone()
    choice = choose_channels(
        model,
        ROWS,
        0.5,
        round_to=1,
        criterion=lambda name, w, axis: (
            w.abs().movedim(axis, 0).flatten(1).sum(1) if name == "0.weight" else torch.zeros(w.shape[axis])
        ),
    )
    assert choice.channels == {
        ("0.weight", 0): [0, 1, 3, 5],
        ("0.bias", 0): [0, 1, 3, 5],
        ("2.weight", 1): [0, 1, 3, 5],
    }
    assert choice.remaining == {"0": (4, 8)}


@pytest.mark.parametrize("ours, p", [("l1", 1), ("l2", 2)])
def test_the_same_scores_as_torch_pruning(ours, p):
    "Over a whole group: rows, columns, BatchNorm's factors. (It leaves biases out, we do not: here they are zero.)"
    tp = pytest.importorskip("torch_pruning")
    model = Net(
        lambda s, x: (lambda y: s.out(y + s.n2(s.b(s.n1(s.a(y)).relu()))))(s.stem(x)),
        stem=conv(3, 8),
        a=conv(8, 6),
        n1=nn.BatchNorm2d(6),
        b=conv(6, 8),
        n2=nn.BatchNorm2d(8),
        out=conv(8, 2),
    )
    messy(model)
    for n, b in model.named_parameters():
        if n.endswith("bias"):
            b.data.zero_()
    groups = channel_groups(model, IMAGE)
    scores = channel_scores(model, groups, ours)
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    for g in groups:
        whole = graph.get_pruning_group(model.get_submodule(g.name), tp.prune_conv_out_channels, list(range(len(g))))
        theirs = tp.importance.GroupMagnitudeImportance(p, "sum", None)(whole)
        torch.testing.assert_close(torch.tensor(scores[g.name]).float(), theirs.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "ratio, round_to, remain",
    [(0, 8, 64), (0.5, 8, 32), (0.1, 8, 56), (0.99, 8, 8), (0.5, 64, 32), (0.99, 1, 1), (0.3, 1, 45)],
)
def test_rounding(ratio, round_to, remain):
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 2))
    assert shrink(model, ROWS, ratio, round_to=round_to)[0].out_features == remain


def test_budgets():
    model = nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 32), nn.ReLU(), conv(32, 8))
    groups, whole, size = channel_groups(model, IMAGE), total_macs(model, IMAGE), tensor_bytes(model)
    for share in 0.7, 0.4:
        assert (
            0.5 * share
            < total_macs(shrink(model, IMAGE, macs=share, round_to=1, groups=groups), IMAGE) / whole
            <= share
        )
    assert total_macs(shrink(model, IMAGE, macs=whole // 3, groups=groups), IMAGE) <= whole // 3
    assert tensor_bytes(shrink(model, IMAGE, bytes=0.5)) <= size / 2
    shrink(model, IMAGE, milliseconds=1e4, groups=groups)
    for wrong in {"macs": 10}, {"bytes": 10}, {"milliseconds": 1e-9}:
        with pytest.raises(ValueError, match="with the fewest channels"):
            shrink(model, IMAGE, **wrong, groups=groups)


def test_global_scope_takes_where_it_is_lowest():
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    with torch.no_grad():
        model[2].weight[:16] *= 0.01
        model[4].weight[:, :16] *= 0.01
        model[2].bias[:16] *= 0.01
    left = choose_channels(model, ROWS, 0.25, scope="global", round_to=1).remaining
    assert left["2"][0] < left["0"][0]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"ratio": 0.5, "macs": 3},
        {"ratio": 1},
        {"ratio": -0.1},
        {"ratio": math.nan},
        {"macs": 0},
        {"bytes": -1},
        {"ratio": 0.5, "round_to": 0},
        {"ratio": 0.5, "scope": "all"},
        {"ratio": 0.5, "criterion": "l3"},
        {"ratio": 0.5, "criterion": lambda n, w, a: torch.zeros(3)},
    ],
)
def test_impossible_wishes(how):
    with pytest.raises(ValueError):
        shrink(CASES["dense"][0], ROWS, **how)


def test_wrong_types():
    with pytest.raises(TypeError):
        shrink(CASES["dense"][0], ROWS, ratio="half")


# ---- files --------------------------------------------------------------------------------------------------------
class Registered(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.rms = nn.Parameter(torch.randn(1, 1, 16)), nn.RMSNorm(16)
        self.stem, self.norm, self.mha, self.mine = (
            nn.Linear(12, 16),
            nn.LayerNorm(16),
            nn.MultiheadAttention(16, 4, batch_first=True),
            Heads(24, 6, 0),
        )
        self.mine.qkv, self.fc = nn.Linear(16, 72), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.stem(x)], 1)
        x = self.rms(x + self.mha(y := self.norm(x), y, y, need_weights=False)[0])
        return self.fc(self.mine(x))


register_model("Registered of test_structured", Registered)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_shrunk_model_comes_back_from_its_file_alone(tmp_path, bits):
    small = factorize(shrink(messy(Registered()), SEQUENCE, 0.5, round_to=1), rank=2, layers=["fc.*"])
    assert {RemainingLayerNorm, RemainingRMSNorm, RemainingAttention} <= {type(m) for m in small.modules()}
    if bits:
        small = quantize_model(small, bits)
    back = load(save(small, tmp_path / "x.mz"))
    assert torch.equal(small(SEQUENCE), back(SEQUENCE)) and type(back) is Registered and back.mine.heads == 3


def test_a_folded_model_comes_back(tmp_path):
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2))

        def forward(self, x):
            return self.body(x)

    register_model(f"Folded {tmp_path.name}", Folded)
    folded = fold_batchnorm(messy(Folded()))
    assert torch.equal(load(save(folded, tmp_path / "x.mz"))(IMAGE), folded(IMAGE))


# ---- folding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "layer, norm, example",
    [
        (nn.Linear(12, 6), nn.BatchNorm1d(6), ROWS),
        (nn.Conv1d(7, 6, 3, bias=False), nn.BatchNorm1d(6), SEQUENCE),
        (conv(3, 6, groups=3), nn.BatchNorm2d(6), IMAGE),
        (nn.ConvTranspose2d(3, 6, 2), nn.BatchNorm2d(6, affine=False), IMAGE),
        (nn.Conv3d(1, 6, 2), nn.BatchNorm3d(6), torch.randn(2, 1, 4, 4, 4)),
    ],
)
def test_folding(layer, norm, example):
    net = messy(nn.Sequential(layer, norm))
    assert foldable(net, example) == {"0": "1"} and foldable(net) == (
        {} if example.dim() < 4 else {"0": "1"}
    )  # without an example nobody knows how many axes there are
    folded = fold_batchnorm(net, example)
    torch.testing.assert_close(folded(example), net(example), rtol=1e-4, atol=1e-5)
    assert type(folded[1]) is nn.Identity and type(net[1]) is type(norm)


def test_masks_become_real_before_folding():
    net = messy(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6)))
    mask_layer(net[0], torch.rand(net[0].weight.shape) < 0.5)
    folded = fold_batchnorm(net)
    torch.testing.assert_close(folded(IMAGE), net(IMAGE), rtol=1e-4, atol=1e-5)
    assert (
        type(folded[0]) is nn.Conv2d
        and type(folded[1]) is nn.Identity
        and torch.equal(folded[0].weight == 0, net[0].weight == 0)
    )


def test_what_cannot_be_folded():
    two = Net(lambda s, x: s.bn(y := s.a(x)) + y, a=conv(3, 4), bn=nn.BatchNorm2d(4))
    assert foldable(two) == {}
    assert foldable(nn.Sequential(conv(3, 4), nn.ReLU(), nn.BatchNorm2d(4))) == {}
    assert foldable(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False))) == {}
    shared = conv(3, 3)
    assert foldable(nn.Sequential(shared, nn.BatchNorm2d(3), shared)) == {}

    class Untraceable(nn.Sequential):
        def forward(self, x):
            return self[0](x) if x.sum() > 0 else x

    net = Untraceable(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)))
    assert foldable(net) == {} and foldable(net, IMAGE.abs()) == {"0.0": "0.1"}


# ---- thin matrices ------------------------------------------------------------------------------------------------
def test_error_is_what_was_asked():
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    for error in 0.2, 0.5, 0.8:
        thin = factorize(model, error=error)
        for a, b in zip(model, thin):
            if isinstance(b, nn.Sequential):
                w = b[1].weight @ b[0].weight
                assert (w - a.weight).norm() / a.weight.norm() <= error + 1e-5
                assert b[0].weight.numel() + b[1].weight.numel() < a.weight.numel()
    assert isinstance(factorize(model, error=0.8)[0], nn.Sequential) and type(factorize(model, error=0)[0]) is nn.Linear


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 20),
        nn.Conv2d(3, 20, 3, stride=2, padding=1, dilation=1, padding_mode="reflect"),
        nn.Conv2d(3, 9, (1, 5), bias=False),
    ],
)
def test_full_rank_is_exact(layer):
    from modelzip.structured import split_ranks, two_layers

    x = IMAGE if isinstance(layer, nn.Conv2d) else ROWS
    svd = split_ranks(layer.weight)
    torch.testing.assert_close(two_layers(layer, len(svd[1]), svd)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_bytes_and_what_is_not_touched():
    model = nn.Sequential(
        nn.Linear(64, 64), nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), nn.Conv2d(8, 8, 3, groups=2)
    )
    thin = factorize(model, rank=3)
    assert type(thin[0]) is ThinLinear and type(thin[1].linear1) is nn.Linear and type(thin[2]) is nn.Conv2d
    for share in 0.9, 0.7:
        assert tensor_bytes(factorize(LeNet5(), bytes=share)) <= share * tensor_bytes(LeNet5())
    for wrong in (
        {},
        {"error": 1.0},
        {"error": 0.1, "rank": 3},
        {"rank": 0},
        {"rank": 1.5},
        {"bytes": 1000},
        {"error": 0.1, "layers": ["nothing"]},
    ):
        with pytest.raises(ValueError):
            factorize(LeNet5(), **wrong)


# ---- other people's models ----------------------------------------------------------------------------------------
TEN = (
    "resnet18 resnext50_32x4d densenet121 googlenet mobilenet_v3_small shufflenet_v2_x0_5 regnet_y_400mf squeezenet1_1"
    " mnasnet0_5 efficientnet_b0".split()
)


def of_torchvision(name):
    models = installed_models()
    torch.manual_seed(0)
    if name == "small ViT":
        return models.VisionTransformer(32, 8, 3, 4, 48, 96, num_classes=10)
    if name == "small Swin":
        return models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7], num_classes=10)
    if name == "small ConvNeXt":
        return models.ConvNeXt(
            [models.convnext.CNBlockConfig(16, 32, 2), models.convnext.CNBlockConfig(32, None, 2)], num_classes=10
        )
    return models.get_model(name, weights=None, **({"init_weights": True} if name == "googlenet" else {}))


@pytest.mark.parametrize("name", [*TEN, "small ViT", "small Swin", "small ConvNeXt"])
def test_torchvision(name):
    model = messy(of_torchvision(name))
    size = {"small ViT": 32, "small Swin": 56}.get(name, 64)
    example = torch.randn(1, 3, size, size)
    choice = choose_channels(model, example, 0.5)
    with torch.no_grad():
        got, want = choice.shrunk()(example), choice.masked()(example)
    assert (got - want).abs().max() <= 1e-3 * want.abs().max() and sum(a < b for a, b in choice.remaining.values()) >= 4


def installed_models():
    models = torchvision_models()
    if models is None:
        pytest.skip("torchvision is not installed: pip install --no-deps torchvision")
    return models


# ---- settings in the state, and products that are read only


def twins():
    norm = lambda *a, **k: RemainingLayerNorm(4, *a, **k)
    yield norm(6), norm(9), torch.randn(2, 4, 4)
    yield norm(6, channels_first=True, eps=0.5), norm(6), torch.randn(2, 4, 4)
    yield RemainingRMSNorm(4, 6), RemainingRMSNorm(4, 9, 0.1), torch.randn(2, 4)
    yield RemainingAttention(8, 2, 3), RemainingAttention(8, 3, 2, batch_first=True), torch.randn(5, 2, 8)


@pytest.mark.parametrize("i", range(4))
def test_a_state_brings_its_settings(i, tmp_path):
    a, b, x = [*twins()][i]
    out = lambda m: m(x, x, x)[0] if isinstance(m, RemainingAttention) else m(x)
    wrapped = [nn.Sequential(m).eval() for m in (a, b)]
    wrapped[1].load_state_dict(wrapped[0].state_dict())
    assert torch.equal(out(a), out(b))
    got = load(save(wrapped[0], tmp_path / "x.mz"), copy.deepcopy(wrapped[0]))
    assert torch.equal(out(got[0]), out(a))
    _, b, _ = [*twins()][i]
    before = [getattr(b, k) for k in b.in_state]
    b.load_state_dict({k: v for k, v in a.state_dict().items() if k != "_extra_state"})  # written before there were any
    assert before == [getattr(b, k) for k in b.in_state]
    others = [m.state_dict()["_extra_state"] for j, (m, _, _) in enumerate(twins()) if type(m) is not type(a)]
    for state in others + [
        torch.tensor([*said.encode()], dtype=torch.uint8)
        for said in (
            "1",
            '{"total": 3, "eps": 1, "channels_first": false}',
            '{"num_heads": 4, "head_dim": 2, "batch_first": false}',
        )
    ]:
        with pytest.raises(ValueError, match="this state"):
            b.load_state_dict(a.state_dict() | {"_extra_state": state})
    assert before == [getattr(b, k) for k in b.in_state]


def test_writes_into_the_weight_of_a_thin_layer_raise():
    for layer in factorize(nn.Sequential(nn.Linear(30, 30), nn.Conv2d(8, 8, 3)), rank=2):
        for write in (lambda w: w.data.add_(1), lambda w: w.__setitem__(0, 0), nn.init.zeros_, lambda w: w[:1].mul_(2)):
            with pytest.raises(RuntimeError, match="is a product"):
                write(layer.weight)
        layer.weight.square().sum().backward()
        assert type(layer.weight.clone()) is torch.Tensor and all(m.weight.grad is not None for m in layer)


def test_code_that_reads_a_thin_weight_can_be_recorded():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = factorize(nn.Sequential(nn.Linear(30, 30)), rank=2)[0]

        def forward(self, x):
            return F.linear(x, self.l.weight, self.l.bias) + self.l(x).to(self.l.weight.dtype)

    m, x = Reads(), torch.randn(2, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for again in (
            torch.export.export(m, (x,)).module(),
            torch.compile(m, backend="eager"),
            torch.jit.trace(m, (x,)),
        ):
            assert torch.allclose(again(x), m(x), atol=1e-6)


def test_keep_beside_groups_is_refused():
    m, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4)
    groups = channel_groups(m, x)
    for keep in (["0"], "0", ""):
        with pytest.raises(ValueError, match="give keep to channel_groups"):
            shrink(m, x, ratio=0.5, round_to=1, keep=keep, groups=groups)
    assert shrink(m, x, ratio=0.5, round_to=1, groups=groups)[0].out_features == 4


def test_channels_pass_through_the_weight_of_a_thin_layer():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.l, self.b = nn.Linear(6, 40), nn.Linear(40, 40), nn.Linear(40, 3)

        def forward(self, x):
            return self.b(F.linear(self.a(x).relu(), self.l.weight, self.l.bias).relu())

    m, x = factorize(Reads(), rank=4, layers=["l"]), torch.randn(2, 6)
    groups = channel_groups(m, x)
    assert {g.name: len(g) for g in groups} == {"a": 40, "l.1": 40, "l.0": 4}
    assert shrink(m, x, ratio=0.5, groups=groups).l.weight.shape == (24, 24)
