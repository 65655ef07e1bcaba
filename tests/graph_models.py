"""Small networks of the families that people bring: what a file with a graph has to hold without their code, which is
here and in no module of the library."""

import torch
import torch.nn.functional as F
from torch import nn


def convolution(a, b, size=3, stride=1, groups=1, act=nn.ReLU):
    layers = [nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(b), act()]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.down = None if a == b else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pool = convolution(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1)
        self.blocks, self.head = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.blocks(self.pool(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Squeeze(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, 4, 1), nn.Conv2d(4, n, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))


class Inverted(nn.Module):
    def __init__(self, a, wide, b, stride, act):
        super().__init__()
        self.expand, self.depth = convolution(a, wide, 1, act=act), convolution(wide, wide, 5, stride, wide, act)
        self.squeeze = Squeeze(wide)
        self.project = nn.Sequential(nn.Conv2d(wide, b, 1, bias=False), nn.BatchNorm2d(b))
        self.same = stride == 1 and a == b

    def forward(self, x):
        y = self.project(self.squeeze(self.depth(self.expand(x))))
        return x + y if self.same else y


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = convolution(3, 8, 3, 2, act=nn.Hardswish)
        self.blocks = nn.Sequential(Inverted(8, 16, 8, 1, nn.ReLU), Inverted(8, 24, 12, 2, nn.Hardswish))
        self.head = nn.Sequential(nn.Linear(12, 20), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(20, 5))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Norm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.depth, self.norm = nn.Conv2d(n, n, 7, padding=3, groups=n), nn.LayerNorm(n)
        self.up, self.down = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)
        self.gamma = nn.Parameter(torch.full((n,), 0.5))

    def forward(self, x):
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Norm2d(8))
        self.stages = nn.ModuleList([ConvNeXtBlock(8), ConvNeXtBlock(8)])
        self.between, self.norm, self.head = (
            nn.Sequential(Norm2d(8), nn.Conv2d(8, 12, 2, 2)),
            nn.LayerNorm(12),
            nn.Linear(12, 5),
        )

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(self.between(x).mean([-2, -1])))


class ViTBlock(nn.Module):
    def __init__(self, n, heads):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(n), nn.LayerNorm(n), heads
        self.qkv, self.out, self.mlp = (
            nn.Linear(n, 3 * n),
            nn.Linear(n, n),
            nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n)),
        )

    def forward(self, x):
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((a @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 16, 7, 7), nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks, self.norm, self.head = (
            nn.ModuleList([ViTBlock(16, 4) for _ in range(2)]),
            nn.LayerNorm(16),
            nn.Linear(16, 10),
        )

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Window(nn.Module):
    "Attention in windows of 4 x 4, shifted by 2 every other time (Swin)."

    def __init__(self, n, heads, shift):
        super().__init__()
        self.heads, self.shift, self.size = heads, shift, 4
        self.norm, self.qkv, self.out = nn.LayerNorm(n), nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.table = nn.Parameter(torch.randn(49, heads))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        off = at[:, :, None] - at[:, None] + 3
        self.register_buffer("index", off[0] * 7 + off[1])

    def forward(self, x):
        n, h, w, c = x.shape
        y, s = self.norm(x), self.size
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(n, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).view(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        a = q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5 + self.table[self.index.view(-1)].view(
            16, 16, -1
        ).permute(2, 0, 1)
        if self.shift:
            rows = torch.zeros(h, w)
            for i, part in enumerate((slice(0, -s), slice(-s, -self.shift), slice(-self.shift, None))):
                for j, other in enumerate((slice(0, -s), slice(-s, -self.shift), slice(-self.shift, None))):
                    rows[part, other] = 3 * i + j
            rows = rows.view(h // s, s, w // s, s).transpose(1, 2).reshape(-1, s * s)
            mask = (rows[:, None] != rows[:, :, None]).float() * -100
            a = (a.view(n, -1, self.heads, 16, 16) + mask[None, :, None]).view(-1, self.heads, 16, 16)
        y = self.out((a.softmax(-1) @ v).transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(n, h // s, w // s, s, s, c).transpose(2, 3).reshape(n, h, w, c)
        return x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)


class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(Window(8, 2, 0), Window(8, 2, 2))
        self.merge, self.head = nn.Linear(32, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))


class Recurrent(nn.Module):
    def __init__(self, kind, **how):
        super().__init__()
        self.words, self.layer = nn.Embedding(20, 6), kind(6, 7, batch_first=True, **how)
        self.head = nn.Linear(14 if how.get("bidirectional") else 7, 4)

    def forward(self, ids):
        y, state = self.layer(self.words(ids))
        last = state[0] if isinstance(state, tuple) else state
        return {"scores": self.head(y[:, -1]), "state": last}


class Encoder(nn.Module):
    "What PyTorch brings itself: MultiheadAttention with a mask."

    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x, mask):
        y, weights = self.attention(x, x, x, key_padding_mask=mask)
        return self.norm(x + y), weights


def networks():
    "Name → model, example, dynamic."
    torch.manual_seed(0)
    image, ids = torch.rand(2, 3, 32, 32), torch.randint(0, 20, (2, 5))
    batch, both = {0: "batch"}, {0: "batch", 1: "length"}
    made = {
        "ResNet": (ResNet(), image, batch),
        "MobileNet": (MobileNet(), image, batch),
        "ConvNeXt": (ConvNeXt(), image, batch),
        "ViT": (ViT(), torch.rand(2, 1, 28, 28), batch),
        "Swin": (Swin(), image, batch),
        "LSTM": (Recurrent(nn.LSTM, bidirectional=True), ids, both),
        "GRU": (Recurrent(nn.GRU, num_layers=2), ids, both),
        "Encoder": (Encoder(), (torch.rand(2, 5, 8), torch.rand(2, 5) > 0.8), both),
    }
    for model, _, _ in made.values():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.2, 0.2)
                nn.init.uniform_(m.running_var, 0.5, 2.0)
    return {name: (model.eval(), *rest) for name, (model, *rest) in made.items()}
