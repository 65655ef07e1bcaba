"""A file gives back the function that was saved, or nothing: every transformation, every sort of owner, in a
process that knows only the classes."""

import collections, copy, json, math, os, subprocess, sys, types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from guards import FUZZ, turns
from modelzip.archive import PackError
from modelzip.data import LeNet5, register_model
from modelzip.exchange import from_npz, from_safetensors, to_npz, to_safetensors
from modelzip import pack
from modelzip.workshop import inspecting
from modelzip.pack import load, save
from modelzip.quant import quantize_model
from modelzip.workshop import kinds, layer_table

torch.set_num_threads(1)

CLASSES = '''
import torch
from torch import nn
from modelzip.data import register_model

class Images(nn.Module):
    "BatchNorm, strides, slopes."
    def __init__(self, width=16):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(.3)
        self.conv2, self.bn2, self.head = nn.Conv2d(width, width, 3, stride=2), nn.BatchNorm2d(width, eps=.1), nn.Linear(width, 5)
    def forward(self, x): return self.head(torch.relu(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))).mean((2, 3)))

class Words(nn.Module):
    "LayerNorm and attention."
    def __init__(self, width=16):
        super().__init__()
        self.inp, self.norm = nn.Linear(7, width), nn.LayerNorm(width, eps=1e-3)
        self.attention, self.norm2, self.fc1, self.fc2, self.out = nn.MultiheadAttention(width, 2, batch_first=True), nn.LayerNorm(width), nn.Linear(width, 2*width), nn.Linear(2*width, width), nn.Linear(width, 3)
    def forward(self, x):
        x = self.norm(self.inp(x))
        x = self.norm2(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(x + self.fc2(torch.nn.functional.gelu(self.fc1(x))))

@register_model("b8 images")
class KnownImages(Images): pass

@register_model("b8 words")
class KnownWords(Words): pass

def example(name):
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 9, 9, generator=g) if "Images" in name else torch.randn(4, 6, 7, generator=g)
'''

CHILD = '''
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import b8_classes as here
from modelzip.pack import PackError, load
out = {}
for case, (name, path, widths, want) in torch.load(sys.argv[1]).items():
    cls, x = getattr(here, name), here.example(name)
    for how, model in ({"alone": None} | {f"width {w}": cls(w).eval() for w in widths}).items():
        try: got = load(path, model)
        except PackError as e: out[f"{case}, {how}"] = str(e); continue
        with torch.no_grad(): y = got(x)
        out[f"{case}, {how}"] = (y - want).abs().max().item()
print(json.dumps(out))
'''


def transformations(x):
    "Name → what turns a model into what is saved."
    from modelzip import auto, kernels, prune, ptq, qat, structured

    def shrunk(m):
        return structured.shrink(m, (x,), ratio=0.5)

    made = []

    def shrunk_once(m):  # two files begin with the same model
        made.extend([] if made else [shrunk(m)])
        return copy.deepcopy(made[0])

    def quick(m):
        return kernels.use_kernels(quantize_model(m, 8))

    def trained(m):
        return qat.convert(qat.prepare(m, 8, batches=[x]))

    def thin(m):
        return structured.factorize(
            m,
            rank=2,
            layers=[n for n, l in m.named_modules() if isinstance(l, (nn.Linear, nn.Conv2d)) and "attention" not in n],
        )

    def sparse(m):
        return prune.sparsify_model(prune.prune_model(m, 0.6))

    found = {
        "nothing": lambda m: m,
        "quantize_model": lambda m: quantize_model(m, 4),
        "use_kernels": quick,
        "prune and sparsify": sparse,
        "shrink": shrunk_once,
        "shrink, then quantize": lambda m: quantize_model(shrunk_once(m), 4),
        "fold_batchnorm": structured.fold_batchnorm,
        "factorize": thin,
        "convert": trained,
        "gptq": lambda m: ptq.gptq(m, [x]),
        "awq": lambda m: ptq.awq(m, ptq.calibrate(m, [x])),
        "smooth": lambda m: ptq.smooth(m, ptq.calibrate(m, [x])),
        "half": lambda m: copy.deepcopy(m).bfloat16().float(),
        "everything": lambda m: quantize_model(thin(shrunk(structured.fold_batchnorm(m))), 4),
    }
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    "Everything is saved here and loaded elsewhere, in one process that has nothing but the classes."
    folder = tmp_path_factory.mktemp("b8")
    (folder / "b8_classes.py").write_text(CLASSES)
    (folder / "child.py").write_text(CHILD)
    sys.path.insert(0, str(folder))
    try:
        import b8_classes as here
    finally:
        sys.path.remove(str(folder))
    cases = {}
    for k, name in enumerate(("KnownImages", "KnownWords", "Images", "Words")):
        x, solid = here.example(name), ("factorize", "shrink")
        solid = solid if FUZZ else solid[k % 2 :][:1]
        for i, (how, change) in enumerate(transformations(x).items()):
            if not FUZZ and i % 2 == (k + k // 2) % 2:  # else one that is known meets it, and one that is not
                continue
            torch.manual_seed(0)
            m = getattr(here, name)().eval()
            for norm in m.modules():  # statistics that are not those of a new layer
                if isinstance(norm, nn.BatchNorm2d):
                    norm.running_mean.normal_()
                    norm.running_var.uniform_(0.5, 2)
                    nn.init.normal_(norm.weight)
                    nn.init.normal_(norm.bias)
            m = change(m).eval()
            if not how.startswith("nothing"):
                assert m is not None
            with torch.no_grad():
                y = m(x)
            path = save(
                m,
                folder / f"{name} {how}.mz".replace(",", ""),
                archive="solid" if how in solid else how != "quantize_model",
            )
            widths = [16, 8, 12] if FUZZ else [(16, 8, 12)[i % 3], (16, 8, 12)[(i + 1) % 3]]
            cases[f"{name}, {how}"] = (name, str(path), widths, y)
    torch.save(cases, folder / "cases.pt")
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent.parent), os.environ["PYTHONPATH"]]),
    }
    r = subprocess.run(
        [sys.executable, "child.py", "cases.pt"], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout)


@pytest.mark.hypothesis  # so that a search comes here: everything of everything
def test_no_file_gives_another_function(outcomes):
    wrong = {k: v for k, v in outcomes.items() if not isinstance(v, str) and not v <= 1e-5}
    assert not wrong


@pytest.mark.hypothesis
def test_what_is_known_opens_alone_and_what_is_not_says_what_to_pass(outcomes):
    refused = {k: v for k, v in outcomes.items() if isinstance(v, str)}
    for k, v in refused.items():
        if k.startswith("Known"):
            raise AssertionError(f"{k}: {v}")
        assert k.endswith("alone") and "load(path, model)" in v and k.split(",")[0] in v, (k, v)
    assert len(refused) == sum(k.endswith("alone") and not k.startswith("Known") for k in outcomes)


# ---- what a state dict does not say -------------------------------------------------------------------------------
@register_model("sequence of test_right_pack")
def sequence(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def lenet(change):
    m = LeNet5(channels=[3, 4], hidden=8)
    change(m)
    return m.eval()


def appended(m, *more):
    return nn.Sequential(*m, *more)


def known(m, name="sequence of test_right_pack", **options):
    m.architecture = {"name": name, "options": options}
    return m.eval()


X, IMAGE = (
    torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),
    torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
)
PAIRS = {
    "a ReLU between two matrices": (
        lenet(lambda m: setattr(m, "fc1", nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 8)))),
        IMAGE,
    ),
    "a stride": (
        lenet(
            lambda m: (
                setattr(m.conv1, "stride", (2, 2)),
                setattr(m.conv1, "padding", (12, 12)),
                setattr(m.conv2, "padding_mode", "circular"),
            )
        ),
        IMAGE,
    ),
    "a Softmax behind": (known(appended(sequence(), nn.Softmax(-1))), X),
    "a Linear behind": (known(appended(sequence(), nn.Linear(3, 2))), X),
    "GELU for ReLU": (known(nn.Sequential(nn.Linear(4, 6), nn.GELU("tanh"), nn.Linear(6, 3))), X),
    "a slope": (known(nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.7), nn.Linear(6, 3))), X),
    "another order": (known(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.ReLU())), X),
    "nothing between": (known(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))), X),
    "an infinite bound": (
        known(nn.Sequential(nn.Linear(4, 6), nn.Hardtanh(-0.5, math.inf), nn.BatchNorm1d(6, eps=1.0), nn.Linear(6, 3))),
        X,
    ),
    "a pooling": (
        known(
            nn.Sequential(
                nn.Linear(4, 6),
                nn.Unflatten(1, (1, 6)),
                nn.AvgPool1d(3, 2, 1, count_include_pad=False),
                nn.Flatten(),
                nn.Linear(3, 3),
            )
        ),
        X,
    ),
}
WAYS = {
    "archived": (save, load),
    "mapped": (lambda m, p: save(m, p, False), lambda p, *m: load(p, *m, mmap=True)),
    "solid": (lambda m, p: save(m, p, "solid"), load),
    "safetensors": (to_safetensors, from_safetensors),
    "npz": (to_npz, from_npz),
}


@pytest.mark.hypothesis  # so that a search comes here: every pair in every format
@pytest.mark.parametrize("what", PAIRS)
def test_the_function_comes_back(tmp_path, what):
    "Alone, into what the builder makes, and into itself: the same outputs, or an error; never others."
    model, x = PAIRS[what]
    want = model(x)
    ways = turns([*PAIRS].index(what), {way: lambda both=both: both for way, both in WAYS.items()}, 3)
    for way, (write, read) in ways.items():
        if way == "solid" and what in ("a ReLU between two matrices", "a stride"):
            model = quantize_model(model, 4)
            want = model(x)
        path = write(model, tmp_path / way)
        others = [(), (model,), (lenet(lambda m: m),) if x is IMAGE else (sequence().eval(),)]
        exact = 0
        for given in others:
            try:
                got = read(path, *given)
            except PackError as e:
                assert (
                    "was saved" in str(e)
                    or "cannot be made" in str(e)
                    or "another architecture" in str(e)
                    or "Unflatten" in str(e)
                    or "does not have" in str(e)
                ), e
            else:
                assert torch.equal(got(x), want), (way, given)
                exact += 1
        assert exact >= 1 and torch.equal(read(path, model)(x), want)
        if what != "a pooling":
            assert torch.equal(read(path)(x), want)


class Norms(nn.Module):
    def __init__(self, width=16, heads=2, act=F.relu):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3)
        self.heads, self.act, self.limit, self._scale = heads, act, math.inf, 1.0

    def forward(self, x):
        return self.out(
            self._scale
            * self.act(self.norm(self.fc(x)))
            .unflatten(-1, (self.heads, -1))
            .softmax(-1)
            .flatten(-2)
            .clamp(max=self.limit)
        )


def test_shrunk_norm_into_the_smaller_class(tmp_path):
    from modelzip.structured import shrink

    torch.manual_seed(0)

    class Thin(Norms):
        def forward(self, x):
            return self.out(self.act(self.norm(self.fc(x))))

    m = shrink(Thin().eval(), (X,), ratio=0.5)
    width, want = m.fc.out_features, m(X)
    assert width < 16
    for model in Thin(width), Thin():
        assert torch.equal(load(save(m, tmp_path / "x.mz"), model)(X), want) and torch.equal(
            from_npz(to_npz(m, tmp_path / "x.npz"), model)(X), want
        )


def test_own_attributes_come_back_and_functions_are_named(tmp_path):
    m = Norms(heads=4).eval()
    m._scale, m.limit, m.norm.eps = 3.0, 0.2, 0.5
    back = load(save(m, tmp_path / "x.mz"), Norms())
    assert torch.equal(back(X), m(X)) and (back.heads, back._scale, back.limit, back.norm.eps) == (4, 3.0, 0.2, 0.5)
    m = Norms(act=F.gelu).eval()
    with pytest.raises(PackError, match="another 'act' than gelu"):
        load(save(m, tmp_path / "x.mz"), Norms())
    assert torch.equal(load(tmp_path / "x.mz", Norms(act=F.gelu))(X), m(X))
    relu, gelu = (nn.TransformerEncoderLayer(8, 2, 16, activation=a, batch_first=True).eval() for a in ("relu", "gelu"))
    with pytest.raises(PackError, match="gelu"):
        load(save(gelu, tmp_path / "x.mz"), relu)
    x = torch.randn(2, 3, 8)
    assert torch.equal(load(tmp_path / "x.mz", gelu)(x), gelu(x))


class Told:
    def __init__(self, by=1.0):
        self.by = by

    def of(self, x):
        return x * self.by


class Odd(nn.Module):
    "Facts that JSON has no word for."

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.some, self.by, self.frozen, self.rows, self.part = {1}, {0: 1.5}, frozenset({2}), range(3), slice(0, 2)
        self.turn, self.key, self.told, self.wave, self.third, self.named = (
            1 + 2j,
            b"a",
            Told(),
            np.arange(3.0),
            Fraction(1, 2),
            collections.OrderedDict(a=1.0),
        )
        self.number, self.long = np.float32(1.5), [1.0] * 300
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x):
        y = (
            self.fc(x) * self.by[0] * self.table
            + len(self.rows)
            + sum(self.some)
            + sum(self.frozen)
            + self.turn.imag
            + len(self.key)
            + float(self.wave.sum())
            + float(self.third)
        )
        y[:, self.part] += self.named["a"] + float(self.number) + sum(self.long)
        return self.told.of(y)


ODD = dict(
    some={5},
    by={0: 9.0},
    frozen=frozenset({7, 8}),
    rows=range(7),
    part=slice(1, 4),
    turn=9j,
    key=b"abc",
    told=Told(5.0),
    wave=np.ones(5),
    third=Fraction(7),
    named=collections.OrderedDict(a=3.0),
    number=np.float32(9.0),
    table=torch.full((4,), 3.0),
)


@pytest.mark.parametrize("key", ODD)
def test_every_sort_of_attribute_comes_back(tmp_path, key):
    m = Odd().eval()
    setattr(m, key, ODD[key])
    x, same = torch.randn(2, 4), Odd().eval()
    assert torch.equal(load(save(m, tmp_path / "x.mz"), same)(x), m(x))
    back = from_safetensors(to_safetensors(m, tmp_path / "x.safetensors"), same)
    assert torch.equal(back(x), m(x)) and type(getattr(back, key)) is type(getattr(m, key)) and same.told.by == 1.0


def test_what_cannot_come_back_is_refused(tmp_path):
    class Local(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.fc, self.f = nn.Linear(4, 4), lambda x: x * by

        def forward(self, x):
            return self.f(self.fc(x))

    m, x = Local(2), torch.randn(2, 4)
    save(m, tmp_path / "x.mz")
    assert torch.equal(load(tmp_path / "x.mz", Local(2))(x), m(x))
    with pytest.raises(PackError, match="another 'f'"):
        load(tmp_path / "x.mz", Local(3))
    m = Odd()
    m.long = [2.0] * 300
    with pytest.raises(PackError, match="another 'long'"):
        load(save(m, tmp_path / "x.mz"), Odd())
    m = Odd()
    m.told = Told().of
    with pytest.raises(PackError, match="'told'"):
        load(save(m, tmp_path / "x.mz"), Odd())


def test_a_tensor_less_module_is_missed(tmp_path):
    class Acts(nn.Module):
        def __init__(self, *acts):
            super().__init__()
            self.fc, self.acts = nn.Linear(4, 4), nn.ModuleList(acts)

        def forward(self, x):
            x = self.fc(x)
            for a in self.acts:
                x = a(x)
            return x

    m = Acts(nn.ReLU(), nn.Tanh())
    save(m, tmp_path / "x.mz")
    for other in Acts(nn.ReLU()), Acts(nn.ReLU(), nn.Tanh(), nn.Softmax(-1)), Acts(nn.ReLU(), nn.Sigmoid()), Acts():
        with pytest.raises(PackError):
            load(tmp_path / "x.mz", other)
    assert torch.equal(load(tmp_path / "x.mz", Acts(nn.ReLU(), nn.Tanh()))(X), m.eval()(X))


def test_a_builder_that_was_changed(tmp_path, monkeypatch):
    from modelzip import data

    m = sequence().eval()
    for way, (write, read) in WAYS.items():
        with monkeypatch.context() as patch:
            path = write(m, tmp_path / way)
            patch.setitem(
                data.model_builders,
                "sequence of test_right_pack",
                lambda width=6: known(nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 3)), width=width),
            )
            with pytest.raises(PackError, match="makes other layers here"):
                read(path)
            assert torch.equal(read(path, m)(X), m(X))
            with pytest.raises(PackError):
                read(path, nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)))
            del data.model_builders["sequence of test_right_pack"]
            if way != "solid":
                assert torch.equal(read(path, m)(X), m(X))
            with pytest.raises(PackError):
                read(path, nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)))


def test_hooks_and_forwards_of_an_instance(tmp_path):
    plain, hooked = (nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval() for _ in range(2))
    hooked[0].register_forward_hook(lambda layer, args, out: 2 * out)
    from modelzip.kernels import use_kernels

    for m in hooked, quantize_model(hooked, 8), use_kernels(quantize_model(hooked, 8)):
        if not m[0]._forward_hooks and hasattr(m[0], "runs"):
            continue  # an integer layer that dropped it
        with pytest.raises(PackError, match="forward hook .*lambda"):
            load(save(m, tmp_path / "x.mz"), plain)
        assert torch.equal(load(tmp_path / "x.mz", m)(X), m(X)) and torch.equal(
            load(tmp_path / "x.mz", hooked)(X), m(X)
        )
        with pytest.raises(PackError, match="0 "):
            load(save(plain, tmp_path / "x.mz"), m)  # nor is one added
    plain.forward = lambda x: x
    with pytest.raises(ValueError, match="a forward of its own instance"):
        save(plain, tmp_path / "y.mz")
    with pytest.raises(ValueError, match="a forward of its own instance"):
        to_npz(plain, tmp_path / "y.npz")
    assert not (tmp_path / "y.mz").exists() and not (tmp_path / "y.npz").exists()
    with pytest.raises(ValueError, match="a forward of its own instance"):
        load(tmp_path / "x.mz", plain)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_computed(tmp_path):
    norm = (
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        lambda l: nn.utils.prune.l1_unstructured(l, "weight", 0.5),
    )
    for make in norm:
        torch.manual_seed(0)
        m, other = (nn.Sequential(make(nn.Linear(4, 3)), nn.ReLU()).eval() for _ in range(2))
        want = m(X)
        assert torch.allclose(load(save(m, tmp_path / "x.mz"), other)(X), want, atol=1e-6) and torch.allclose(
            load(tmp_path / "x.mz", m)(X), want, atol=1e-6
        )
        with pytest.raises(PackError):
            load(tmp_path / "x.mz", nn.Sequential(nn.Linear(4, 3), nn.ReLU()))


# ---- the table of layers ------------------------------------------------------------------------------------------
def made(name, **how):
    need = dict(
        in_features=3,
        out_features=2,
        in1_features=2,
        in2_features=3,
        in_channels=4,
        out_channels=4,
        kernel_size=2,
        num_features=4,
        normalized_shape=4,
        num_groups=2,
        num_channels=4,
        size=3,
        num_embeddings=5,
        embedding_dim=4,
        input_size=3,
        hidden_size=4,
        embed_dim=4,
        num_heads=2,
        threshold=0.1,
        value=0.2,
        upscale_factor=2,
        downscale_factor=2,
        groups=2,
        padding=1,
        output_size=2,
        channels=4,
        total=6,
        head_dim=2,
        rank=2,
        norm_type=2.0,
        lambd=0.5,
        width=6,
        heads=2,
        query_step=0.1,
        key_step=0.2,
        value_step=0.3,
    )
    cls = layer_table.layer_class(name)
    from inspect import signature

    takes = signature(nn.RNNBase if issubclass(cls, nn.RNNBase) else cls).parameters
    arguments = {
        k: need[k]
        for k in layer_table.LAYERS[name].split()
        if k in need and k in takes and takes[k].default is takes[k].empty
    } | how
    return cls(**arguments)


OTHER = dict(
    bias=False,
    stride=3,
    padding=1,
    dilation=2,
    padding_mode="circular",
    output_padding=1,
    eps=0.1,
    momentum=0.3,
    affine=False,
    track_running_stats=False,
    elementwise_affine=False,
    alpha=0.3,
    beta=0.2,
    k=2.0,
    padding_idx=1,
    max_norm=1.0,
    norm_type=1.0,
    scale_grad_by_freq=True,
    sparse=True,
    mode="sum",
    include_last_offset=True,
    num_layers=2,
    batch_first=True,
    dropout=0.3,
    bidirectional=True,
    proj_size=2,
    nonlinearity="relu",
    add_bias_kv=True,
    add_zero_attn=True,
    kdim=3,
    vdim=3,
    num_parameters=4,
    approximate="tanh",
    dim=0,
    min_val=-0.5,
    max_val=math.inf,
    negative_slope=0.4,
    lambd=0.2,
    lower=0.2,
    upper=0.3,
    keepdim=True,
    p=0.25,
    start_dim=0,
    end_dim=1,
    size=5,
    scale_factor=2.0,
    align_corners=True,
    recompute_scale_factor=True,
    return_indices=True,
    ceil_mode=True,
    count_include_pad=False,
    divisor_override=3,
    value=0.5,
    threshold=3.0,
    channels_first=True,
    groups=2,
)


def has(name):
    try:
        return bool(layer_table.layer_class(name))
    except PackError:
        return False


def variants():
    for name, keys in ((n, k) for n, k in layer_table.LAYERS.items() if has(n)):
        yield name, {}
        for k in keys.split():
            if k not in OTHER:
                continue
            more = (
                {"stride": 3}
                if k == "output_padding"
                else (
                    {"scale_factor": 2.0}
                    if k in ("recompute_scale_factor", "mode") and name == "Upsample"
                    else (
                        {"mode": "bilinear", "scale_factor": 2.0}
                        if k == "align_corners"
                        else {"num_layers": 2}
                        if k == "dropout" and name in ("LSTM", "GRU", "RNN")
                        else {}
                    )
                )
            )
            if name.startswith("InstanceNorm") and k in ("affine", "track_running_stats"):
                yield name, {k: True}
                continue
            if name.startswith("InstanceNorm") and k in ("bias", "momentum"):
                continue
            if k == "padding" and "Pad" in name or k == "groups" and name == "ChannelShuffle":
                yield name, {k: 3}
                continue
            how = {k: "nearest-exact" if k == "mode" and name == "Upsample" else OTHER[k]} | more
            try:
                yield name, made(name, **how) and how
            except (TypeError, ValueError):
                continue


@pytest.mark.filterwarnings("ignore")
def test_every_argument_of_every_class_is_kept(tmp_path):
    """Made anew from its entry, a layer is the same; with one argument changed, its entry is another, and the file
    tells."""
    seen = 0
    for name, how in variants():
        layer, plain = made(name, **how), made(name)
        entry = layer_table.layer_entry(layer)
        assert (
            kinds.are_kinds({"": entry})
            and layer_table.layer_entry(layer_table.make_plain("x", json.loads(json.dumps(entry)))) == entry
        ), (name, how)
        assert layer_table.layer_entry(layer_table.make_plain("x", entry)) == entry and repr(
            layer_table.make_plain("x", entry)
        ) == repr(layer), (name, how)
        if how:
            assert entry != layer_table.layer_entry(plain), (name, how)
            seen += 1
    assert seen > 180


def test_the_table_leaves_out_no_argument():
    from inspect import signature

    for name, keys in ((n, k) for n, k in layer_table.LAYERS.items() if has(n)):
        cls = layer_table.layer_class(name)
        takes = signature(nn.RNNBase if issubclass(cls, nn.RNNBase) else cls).parameters
        assert set(takes) - {
            "device",
            "dtype",
            "inplace",
            "args",
            "kwargs",
            "_weight",
            "_freeze",
            "mode" if issubclass(cls, nn.RNNBase) else "",
            "init" if name == "PReLU" else "",
            "seed" if name == "Turn" else "",  # of signs that are in the file
            "min_value",
            "max_value",
            "proj_size",
        } <= set(keys.split()), name


def test_files_stay_small(tmp_path):
    "A LeNet-5 that is what its builder makes pays eight bytes; a model that nobody registered says it all."

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(50)))

    about = json.dumps(kinds.kinds_of(Own()), separators=(",", ":"))
    import zlib

    assert len(zlib.compress(about.encode(), 9)) < 1500
    assert len(json.dumps(pack_meaning(LeNet5()))) <= 20


def pack_meaning(m):
    from modelzip.pack import meaning_of

    return meaning_of(m, m.architecture)


class Configured(nn.Module):
    "What people keep beside parameters."

    def __init__(self, cfg=None, act=torch.tanh, table=1.0, small=1.0):
        super().__init__()
        self.fc, self.cfg, self.act = nn.Linear(4, 6), cfg or Config(), act
        self.table, self.small, self.cache = table * torch.ones(6, 20), torch.tensor([small]), None

    def forward(self, x):
        self.cache = self.act(self.fc(x)) @ self.table * self.small * self.cfg.scale
        return self.cache


import dataclasses, functools


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    sizes: tuple = (1, 2)


def test_configurations_tensors_and_partials(tmp_path):
    """A small tensor and a dataclass come back; a large tensor and another function are refused by name; a cache is
    nobody's business."""
    m = Configured(Config(3.0, (4, 5)), small=2.0).eval()
    m.fc.weight.data.normal_()
    want = m(X)
    m.cache = None
    save(m, tmp_path / "x.mz")
    back = load(tmp_path / "x.mz", Configured())
    assert torch.equal(back(X), want) and back.cfg == Config(3.0, (4, 5)) and back.small == 2
    with torch.no_grad():
        m(X)
    assert torch.equal(load(save(m, tmp_path / "y.mz"), Configured())(X), want)  # with a full cache of 100 numbers
    for odd, word in (
        (Configured(table=2.0), "table"),
        (Configured(act=F.relu), "act"),
        (Configured(act=functools.partial(F.elu, alpha=2.0)), "act"),
    ):
        with pytest.raises(PackError, match=f"another '{word}'"):
            load(save(odd.eval(), tmp_path / "z.mz"), Configured())
        assert torch.equal(load(tmp_path / "z.mz", odd)(X), odd(X))


def test_modules_in_a_plain_list(tmp_path):
    m = Configured()
    m.more = [nn.Linear(2, 2)]
    with pytest.raises(ValueError, match="more holds a Linear in a plain list"):
        save(m, tmp_path / "x.mz")
    m.more = [m.fc, nn.ReLU()]  # a second way to what is there anyway
    assert isinstance(load(save(m, tmp_path / "x.mz"), Configured()), Configured)


# ---- two files ----------------------------------------------------------------------------------------------------
from modelzip.pack import diff, inspect
from modelzip.exchange import from_hdf5, save_many, to_hdf5


def two(tmp_path, a, b, **how):
    """What `diff` finds in the files of two models; it must be the same from the other side, and nothing between a
    file and itself."""
    one, other = save(a, tmp_path / "a.mz", **how), save(b, tmp_path / "b.mz", **how)
    assert diff(one, one).same and diff(other, other).same and diff(one, other).same == diff(other, one).same
    return diff(one, other)


def test_diff_sees_what_is_no_number(tmp_path):
    plain = lambda *layers: nn.Sequential(nn.Linear(4, 4), *layers)
    torch.manual_seed(0)
    a = plain(nn.ReLU())
    for b in plain(nn.GELU()), plain(nn.LeakyReLU(0.3)), plain(), plain(nn.ReLU(), nn.Softmax(-1)):
        b[0] = a[0]
        found = two(tmp_path, a, b)
        assert not found.same and "layers" in str(found)
    for what, (m, x) in PAIRS.items():
        if x is X and "behind" not in what:
            assert not two(tmp_path, m, known(copy.deepcopy(sequence()))).same
    assert two(tmp_path, sequence(), copy.deepcopy(sequence())).about == []


def test_diff_sees_layers_options_ties_and_signs(tmp_path):
    from modelzip.kernels import use_kernels
    from modelzip.qat import convert, prepare

    m = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    q = quantize_model(m, 8)
    assert "another layer" in str(two(tmp_path, q, use_kernels(q)))
    s, r = (convert(prepare(m, 8, batches=[n * torch.ones(4, 8)])) for n in (1, 3))
    assert not two(tmp_path, s, r).same
    tied = copy.deepcopy(m)
    tied[2].weight.data.copy_(tied[0].weight.data)
    apart = copy.deepcopy(tied)
    tied[2].weight = tied[0].weight
    assert "tied otherwise" in str(two(tmp_path, tied, apart))
    for a, b, largest, db in [
        ([2**60], [2**60 + 1], 1, 361.0),
        ([-math.inf, 1.0], [-math.inf, 2.0], 1.0, None),
        ([math.nan, 1.0], [math.nan, 3.0], 2.0, None),
        ([1e308], [-1e308], math.inf, None),
        ([0.0], [-0.0], 0.0, None),
        ([1.0, 2.0], [1.0, 2.5], 0.5, 13.0),
    ]:
        one, other = (nn.ParameterList([nn.Parameter(torch.tensor(v), requires_grad=False)]) for v in (a, b))
        (c,) = two(tmp_path, one, other).changes
        assert (
            c.what == "other numbers"
            and c.largest == largest
            and (c.sqnr is None if db is None else abs(c.sqnr - db) < 1)
        ), c
    one = nn.Linear(2, 2)
    assert not diff(save(one, tmp_path / "a.mz", flag=1), save(one, tmp_path / "b.mz", flag=True)).same
    with pytest.raises(ValueError, match="twice"):
        save(one, tmp_path / "c.mz", notes={1: "x", "1": "y"})
    with pytest.raises(ValueError, match="twice"):
        to_npz(one, tmp_path / "c.npz", notes={1: "x", "1": "y"})
    with pytest.raises(TypeError, match="the key 1 is a int"):
        save(one, tmp_path / "c.mz", notes=[{1: "x"}])
    (tmp_path / "broken.mz").write_bytes(b"PK")
    with pytest.raises(PackError) as e:
        diff(tmp_path / "a.mz", tmp_path / "broken.mz")
    assert str(e.value).startswith(str(tmp_path / "broken.mz"))


def test_what_is_written_is_read(tmp_path):
    deep = 1
    for _ in range(61):
        deep = [deep]
    for write, read in (to_safetensors, from_safetensors), (to_npz, from_npz), (to_hdf5, from_hdf5), (save, load):
        try:
            path = write(nn.Linear(2, 2), tmp_path / "x", deep=deep)
        except ValueError as e:
            assert "nested" in str(e)
        else:
            read(path, nn.Linear(2, 2))
        m = quantize_model(nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.BatchNorm1d(4)), 4).eval()
        path = write(m, tmp_path / "x")
        with torch.device("meta"):
            got = read(path, m)
        assert not any(t.is_meta for t in got.state_dict().values()) and torch.equal(
            got(torch.ones(1, 64)), m(torch.ones(1, 64))
        )


def test_ties_are_groups(tmp_path):
    "Which of tied names comes first is no difference; who is tied to whom is one."
    a, b = (nn.ModuleDict({k: nn.Linear(2, 2, bias=False) for k in order}) for order in ("pqr", "rqp"))
    for m, other in (a, "pqr"), (b, "rqp"):
        for k in other[1:]:
            m[k].weight = m[other[0]].weight
        m.p.weight.data.copy_(torch.ones(2, 2))
    from modelzip.cli import as_model

    one, other = (
        as_model({f"{k}.weight": m[k].weight.detach() for k in order}) for m, order in ((a, "pqr"), (b, "rqp"))
    )
    assert two(tmp_path, one, other).same
    assert "tied otherwise" in str(
        two(tmp_path, one, as_model({"p.weight": torch.ones(2, 2), "q.weight": (w := torch.ones(2, 2)), "r.weight": w}))
    )


@pytest.mark.parametrize("archive", [True, False, "solid"])
def test_save_proves_it(tmp_path, monkeypatch, archive):
    "What does not come back as it was does not get into place, though every checksum is right."
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    path = save(m, tmp_path / "x.mz", archive)
    old = path.read_bytes()
    monkeypatch.setattr(
        inspecting,
        "read_row",
        lambda f, row, *rest, real=inspecting.read_row: (
            real(f, row, *rest).neg() if row.name == "1.bias" else real(f, row, *rest)
        ),
    )
    with pytest.raises(ValueError, match="'1.bias' comes back otherwise"):
        save(m, path, archive)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["x.mz"]


class Softened(nn.Module):
    "Takes the name of another class below."

    def __init__(self):
        super().__init__()
        self.fc, self.hidden = nn.Linear(4, 3), {i: i for i in range(999)}

    def forward(self, x):
        return self.fc(x)


Softened = Plain = register_model("softened of test_right_pack")(Softened)


def test_a_builder_is_relied_on_for_what_it_makes(tmp_path):
    "Another class of the same name, or another value for which a file has no word: then the file names no builder."

    class Softened(Plain):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    Softened.__qualname__ = "Softened"
    m, odd, same = Softened().eval(), Plain().eval(), Plain().eval()
    m.architecture = same.architecture
    odd.hidden[3] = 4
    for write, read in WAYS.values():
        if read is from_npz:
            continue
        for other in m, odd:
            path = write(other, tmp_path / "x")
            with pytest.raises(PackError, match="pass a model"):
                read(path)
            assert torch.equal(read(path, other)(X), other(X))
        assert torch.equal(read(write(same, path))(X), same(X))


@pytest.mark.parametrize(
    "a, b",
    [
        ([nn.ReLU()], [nn.Tanh()]),
        ([nn.LeakyReLU(0.1)], [nn.LeakyReLU(0.2)]),
        (np.sin, np.cos),
        (__import__("decimal").Decimal("1"), __import__("decimal").Decimal("2")),
        (collections.deque([1]), collections.deque([2])),
        (__import__("re").compile("a"), __import__("re").compile("b")),
        (Path("a"), Path("b")),
        (bytearray(b"a"), bytearray(b"b")),
        (__import__("operator").itemgetter(0), __import__("operator").itemgetter(1)),
    ],
)
def test_values_that_do_not_travel_are_missed(tmp_path, a, b):
    class Holds(nn.Module):
        def __init__(self, odd):
            super().__init__()
            self.fc, self.odd = nn.Linear(4, 3), odd

        def forward(self, x):
            return self.fc(x)

    path = save(Holds(a), tmp_path / "x.mz")
    with pytest.raises(PackError, match="another 'odd'"):
        load(path, Holds(b))
    load(path, Holds(copy.deepcopy(a)))
    assert not two(tmp_path, Holds(a), Holds(b)).same


def test_inspect_adds_up_where_tensors_are_empty(tmp_path):
    m = nn.Sequential(nn.Linear(3, 2), nn.Linear(0, 3), nn.Linear(2, 4, bias=False))
    for how in True, False, "solid":
        c = inspect(save(m, tmp_path / "x.mz", how))
        assert c.rest > 100 and sum(l.bytes for l in c.lines) + c.rest == c.bytes and c.lines[2].bytes == 0


@pytest.mark.parametrize("way", WAYS)
def test_paths_that_cannot_be(tmp_path, way, monkeypatch):
    "Errors name the path that was given, never a file that only this library knows."
    monkeypatch.chdir(tmp_path)
    write, read = WAYS[way]
    for path, error in (
        ("a\0b", ValueError),
        ("\ud800", ValueError),
        ("a" * 300, OSError),
        ("/proc/x", OSError),
        ("no/x", OSError),
        (".", OSError),
        ("", OSError),
        (3, TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error) as e:
            write(nn.Linear(2, 2), path)
        assert ".tmp" not in str(e.value) and (error is not ValueError or repr(path) in str(e.value))
        assert (
            not isinstance(e.value, OSError)
            or e.value.filename2 is None
            and (path in ("no/x", ".", "") or e.value.filename == path)
        )
        with pytest.raises((error, PackError)) as e:
            read(path)
        assert error is not ValueError or repr(path) in str(e.value)
    assert not os.listdir(tmp_path)


def test_numbers_of_another_sort(tmp_path):
    "Whole numbers, bools and complex ones are no weights of a layer of floats, whoever wrote them; of floats, any are."
    for dtype in "int64", "uint8", "bool", "complex64", "float16", "float64":
        np.savez(tmp_path / "x.npz", weight=np.ones((2, 2), dtype), bias=np.zeros(2, "f4"))
        own = nn.Linear(2, 2)
        own.weight = nn.Parameter(torch.ones(2, 2, dtype=getattr(torch, dtype)), requires_grad=False)
        for read, path in (
            (from_npz, tmp_path / "x.npz"),
            (load, save(own, tmp_path / "x.mz")),
            (from_safetensors, to_safetensors(own, tmp_path / "x.safetensors")),
        ):
            if "float" in dtype:
                assert read(path, nn.Linear(2, 2)).weight.dtype == own.weight.dtype
            else:
                with pytest.raises(PackError, match=f"weight .file {dtype}, model float32"):
                    read(path, nn.Linear(2, 2))
            assert read(path, own).weight.dtype == own.weight.dtype


def test_what_hdf5_fills_in(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as h:
        h.create_dataset("weight", (4, 3), "f4", chunks=(1, 3), fillvalue=7.0, compression="gzip")[:1] = 1
        h["bias"] = np.zeros(4, "f4")
    assert from_hdf5(tmp_path / "x.h5", nn.Linear(3, 4)).weight.tolist() == [[1.0] * 3] + [[7.0] * 3] * 3


def test_two_names_of_one_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.mz").symlink_to("a.mz")
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    for other in "sub/../a", str(tmp_path / "a"), "link", "./a.mz":
        with pytest.raises(ValueError, match="twice"):
            save_many([("a", a), (other, b)], tmp_path, progress=False)
        assert torch.equal(load(tmp_path / "a.mz", b).weight, a.weight)


def test_three_tied_and_two_of_them_equal(tmp_path):
    import numpy as np

    m = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    m[1].weight = m[2].weight = m[0].weight
    np.savez(
        tmp_path / "x.npz",
        **{
            "0.weight": np.ones((2, 2), "f4"),
            "1.weight": 2 * np.ones((2, 2), "f4"),
            "2.weight": 2 * np.ones((2, 2), "f4"),
        },
    )
    got = from_npz(tmp_path / "x.npz", m)
    assert got[1].weight is got[2].weight is not got[0].weight and got[0].weight[0, 0] == 1 and got[1].weight[0, 0] == 2


class Mixed(nn.Module):
    "Layers that have several matrices."

    def __init__(self, width=8):
        super().__init__()
        self.embed, self.lstm, self.gru, self.cell = (
            nn.Embedding(9, width),
            nn.LSTM(width, width, 2, batch_first=True, bidirectional=True),
            nn.GRU(2 * width, width, batch_first=True),
            nn.GRUCell(width, width),
        )
        self.attention, self.block = (
            nn.MultiheadAttention(width, 2, batch_first=True),
            nn.TransformerEncoderLayer(width, 2, 12, batch_first=True, activation="gelu", norm_first=True),
        )
        self.up = nn.ConvTranspose1d(width, 3, 2, 2)

    def forward(self, x):
        x = self.gru(self.lstm(self.embed(x))[0])[0]
        x = self.block(x + self.attention(x, x, x)[0])
        x = x + self.cell(x.flatten(0, 1)).view_as(x)
        return self.up(x.mT)


@pytest.mark.hypothesis  # so that a search comes here: each way into each with both numbers of bits
@pytest.mark.parametrize("bits", [8, 4])
def test_layers_with_several_matrices(tmp_path, bits):
    from modelzip.kernels import use_kernels

    x = torch.arange(12).reshape(2, 6) % 9
    m = Mixed().eval()
    for k, q in enumerate((quantize_model(m, bits), use_kernels(quantize_model(m, bits)))):
        with torch.no_grad():
            want = q(x)
        for i, (way, (write, read)) in enumerate(WAYS.items()):
            path = write(q, tmp_path / way)
            for given in (Mixed(), q) if FUZZ else ((Mixed(), q)[(i + k + bits // 8) % 2],):
                with torch.no_grad():
                    assert torch.equal(read(path, given)(x), want), way


class Elsewhere(nn.Module):
    "A layer, or its weight, is also where only Python finds it."

    def __init__(self, keep):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.held, self.keep = keep(self.a), keep

    def forward(self, x):
        return self.b(HOW[self.keep](self.held, self.a, x))


def in_a_list(a):
    return [a]


def in_an_object(a):
    return types.SimpleNamespace(a=a)


def as_a_method(a):
    return a.forward


def as_a_weight(a):
    return a.weight


def as_memory(a):
    return a.weight.detach().T


HOW = {
    in_a_list: lambda h, a, x: h[0](x),
    in_an_object: lambda h, a, x: h.a(x),
    as_a_method: lambda h, a, x: h(x),
    as_a_weight: lambda h, a, x: x @ h.T + a.bias,
    as_memory: lambda h, a, x: x @ h + a.bias,
}


@pytest.mark.parametrize("keep", HOW, ids=lambda f: f.__name__)
def test_what_the_model_keeps_elsewhere_is_the_files_or_refused(tmp_path, keep):
    x, model = torch.randn(3, 6), Elsewhere(keep).eval()
    for change in (
        (lambda m: m, lambda m: quantize_model(m, 3))
        if "as_a_weight as_memory".find(keep.__name__) < 0
        else (lambda m: m,)
    ):
        small = change(model)
        try:
            save(small, tmp_path / "m.mz")
            back = load(tmp_path / "m.mz", Elsewhere(keep))
        except (ValueError, PackError) as e:
            assert "held" in str(e)
        else:
            assert torch.equal(back(x), small(x))
