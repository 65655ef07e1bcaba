"""Smaller, folded and thin models are right, or refused: random programs, models that mislead, and models that were written by others."""
import copy, dataclasses, math, types, warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from guards import codes_alone, examples, unchanged
from modelzip import structured
from modelzip.structured import (Choice, RemainingAttention, RemainingLayerNorm, ThinConv2d, ThinLinear, channel_groups, choose_channels, factorize, fold_batchnorm,
                                 foldable, shrink)
from modelzip.workshop.models import output_tensors
from modelzip.workshop.rehearsal import disagreement, examples_of, reweigh

torch.set_num_threads(1)
L = nn.Linear


# ---- random programs ----------------------------------------------------------------------------------------------
class Attention(nn.Module):
    "Heads by hand, in the ways that people write them."
    def __init__(self, d, heads, scale, way):
        super().__init__()
        self.num_heads, self.head_dim, self.split_size, self.scale, self.way, self.kind = heads, d//heads, d, (d//heads)**-.5, way, scale
        self.qkv, self.out = L(d, 3*d), L(d, d)
    def forward(self, x):
        b, n, d = x.shape
        y = self.qkv(x)
        if self.way == 0: q, k, v = y.view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.way == 1: q, k, v = (t.view(b, n, -1, self.head_dim).transpose(1, 2) for t in y.split(self.split_size, -1))
        if self.way == 2: q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in y.chunk(3, -1))
        width = q.shape[-1]
        if self.kind == 4: z = F.scaled_dot_product_attention(q, k, v)
        else:
            a = q @ k.mT
            a = [a*self.scale, a/math.sqrt(width), a/width, a/torch.tensor(width)][self.kind]
            z = a.softmax(-1) @ v
        z = z.transpose(1, 2)
        return self.out(z.reshape(b, n, -1) if self.way else z.flatten(2))

class Gated(nn.Module):
    def __init__(self, d, h, way):
        super().__init__()
        self.size, self.way, self.up, self.down = h, way, L(d, 2*h), L(h, d)
    def forward(self, x):
        y = self.up(x)
        a, b = [lambda: y.chunk(2, -1), lambda: y.split(self.size, -1), lambda: (y[..., :self.size], y[..., self.size:]), lambda: y.unflatten(-1, (2, -1)).unbind(-2), lambda: (F.glu(y), None)][self.way]()
        return self.down(a if b is None else a*b.sigmoid())

class Wrapped(nn.Module):
    "f(x), x + f(x), or both side by side."
    def __init__(self, f, how, norm=None): super().__init__(); self.f, self.how, self.norm = f, how, norm
    def forward(self, x):
        y = self.f(x if self.norm is None else self.norm(x))
        return y if self.how == 0 else x + y if self.how == 1 else torch.cat([x, y], -1)

class Recurrent(nn.Module):
    def __init__(self, kind, d, h): super().__init__(); self.rnn = kind(d, h, batch_first=True)
    def forward(self, x): return self.rnn(x)[0]

class Odd(nn.Module):
    "What looks at widths, or at all channels together."
    def __init__(self, kind, d): super().__init__(); self.kind, self.width, self.a, self.gain = kind, d, L(d, d), nn.Parameter(torch.rand(d) + .5)
    def forward(self, x):
        y = self.a(x)
        n = y.shape[-1]
        return [lambda: y/n, lambda: y*self.width**-.5, lambda: y - y.mean(-1, keepdim=True), lambda: y.softmax(-1), lambda: y[..., torch.arange(n - 1, -1, -1)],
                lambda: y.roll(1, -1), lambda: torch.cat([y[..., n//2:], -y[..., :n//2]], -1), lambda: y*self.gain, lambda: y.flip(-1), lambda: y/np.sqrt(n),
                lambda: y.view(*y.shape[:-1], 2, -1).transpose(-1, -2).reshape(y.shape), lambda: y/y.norm(dim=-1, keepdim=True).clamp(min=.1), lambda: y.cumsum(-1),
                lambda: y + y.sum(-1, keepdim=True), lambda: torch.einsum("bnd,bmd->bnm", y, y).softmax(-1) @ y, lambda: y.new_tensor([float(n)])*y,
                lambda: torch.where(y > 0, y, -y*n)][self.kind]()

class MHA(nn.Module):
    def __init__(self, d, heads): super().__init__(); self.mha = nn.MultiheadAttention(d, heads, batch_first=True)
    def forward(self, x): return self.mha(x, x, x, need_weights=False)[0]

def norm_for(pick, d): return pick([None, nn.LayerNorm(d), nn.RMSNorm(d), nn.LayerNorm(d, elementwise_affine=False)])

def sequence_program(pick):
    "[n, places, 6] → [n, places, 3]"
    d = pick([8, 16])
    layers = [L(6, d)]
    for _ in range(pick([1, 2, 3])):
        kind = pick(["mlp", "attention", "gated", "recurrent", "odd", "mha", "cat"])
        h = pick([8, 12, 16])
        how = pick([0, 1, 1])
        if kind == "mlp": f = nn.Sequential(L(d, h), pick([nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Dropout(.3)]), L(h, d))
        elif kind == "attention": f = Attention(d, pick([2, 4]), pick(range(5)), pick(range(3)))
        elif kind == "gated": f = Gated(d, h, pick(range(5)))
        elif kind == "recurrent": f = Recurrent(pick([nn.GRU, nn.LSTM, nn.RNN]), d, d)
        elif kind == "odd": f = Odd(pick(range(17)), d)
        elif kind == "mha": f = MHA(d, pick([2, 4]))
        else: f, how = L(d, h), 2
        layers += [Wrapped(f, how, norm_for(pick, d))]
        if kind == "cat": layers, d = [*layers, L(d + h, d)], d
    return nn.Sequential(*layers, *([n] if (n := norm_for(pick, d)) is not None else []), L(d, 3)), torch.randn(2, 5, 6), torch.randn(3, 7, 6)

class Excite(nn.Module):
    def __init__(self, d): super().__init__(); self.down, self.up = nn.Conv2d(d, 4, 1), nn.Conv2d(4, d, 1)
    def forward(self, x): return x*self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

class Shuffle(nn.Module):
    def __init__(self, d): super().__init__(); self.groups, self.conv = 2, nn.Conv2d(d, d, 1)
    def forward(self, x):
        b, c, h, w = x.shape
        return self.conv(x).view(b, self.groups, c//self.groups, h, w).transpose(1, 2).reshape(b, -1, h, w)

class Both(nn.Module):
    def __init__(self, f, how): super().__init__(); self.f, self.how = f, how
    def forward(self, x): return x + self.f(x) if self.how else torch.cat([x, self.f(x)], 1)

def image_program(pick):
    "[n, 3, 6, 6] → [n, 3]"
    d = pick([8, 16])
    norm = lambda d: pick([nn.Identity(), nn.BatchNorm2d(d), nn.GroupNorm(4, d), nn.GroupNorm(1, d), nn.InstanceNorm2d(d, affine=True)])
    layers = [nn.Conv2d(3, d, 3, padding=1)]
    for _ in range(pick([1, 2, 3])):
        kind, h = pick(["conv", "residual", "depthwise", "cat", "excite", "shuffle", "grouped"]), pick([8, 12, 16])
        if kind == "conv": layers, d = [*layers, norm(d), nn.ReLU(), nn.Conv2d(d, h, 3, padding=1, bias=pick([True, False]))], h
        if kind == "residual": layers += [Both(nn.Sequential(nn.Conv2d(d, h, 1), norm(h), nn.SiLU(), nn.Conv2d(h, d, 3, padding=1)), True)]
        if kind == "depthwise": layers += [nn.Conv2d(d, d, 3, padding=1, groups=d), norm(d)]
        if kind == "grouped": layers += [nn.Conv2d(d, d, 1, groups=pick([2, 4]))]
        if kind == "cat": layers, d = [*layers, Both(nn.Conv2d(d, h, 1), False), nn.Conv2d(d + h, d, 1)], d
        if kind == "excite": layers += [Excite(d)]
        if kind == "shuffle": layers += [Shuffle(d)]
    tail = pick([[nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(d, 3)], [nn.Flatten(), L(d*36, 3)]])
    return nn.Sequential(*layers, norm(d), nn.ReLU(), *tail), torch.randn(2, 3, 6, 6), torch.randn(5, 3, 6, 6)

def program(seed):
    "A model, an example, other inputs."
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pick = lambda options: list(options)[rng.integers(len(options))]
    return pick([sequence_program, sequence_program, image_program])(pick), pick([.25, .5, .75, .9]), pick([1, 4]), pick(["group", "global"])

def same(a, b, x, training):
    "Two models put out the same, in double precision."
    a, b = (ready_for(m, training) for m in (a, b))
    with torch.no_grad(): got, want = (output_tensors(m(x.double())) for m in (a, b))
    for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-6, atol=1e-8)

def ready_for(m, training):
    m = copy.deepcopy(m).double().train(training)
    for layer in m.modules():
        if isinstance(layer, nn.Dropout): layer.p = 0.
    return m

def holds(seed):
    "The property. What went, or the refusal."
    (model, x, other), ratio, round_to, scope = program(seed)
    try:
        with unchanged(model, x):
            choice = choose_channels(model, x, ratio, round_to=round_to, scope=scope)
            small = shrink(model, x, ratio, round_to=round_to, scope=scope)
    except ValueError as e:
        assert "no channels that can be removed" in str(e), e
        return None
    for y in x, other:
        for training in False, True: same(small, choice.masked(), y, training)
    codes_alone(model, small, x)
    changed = Choice(reweigh(copy.deepcopy(model), torch.Generator().manual_seed(seed)), choice.groups, choice.roots)
    for y in x, other: same(changed.shrunk(), changed.masked(), y, False)
    return choice

@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed): holds(seed)
