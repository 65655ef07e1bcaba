"""Engines for whole models: each computes what PyTorch computes, for calls like the example's and for no others; `auto`
takes none that does not; the caller's model, threads and random numbers stay as they were."""

import copy, dataclasses, importlib.util, pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from guards import FUZZ
from modelzip.data import LeNet5
from modelzip.deploy import ENGINES, deploy, register_engine
from modelzip.kernels import use_kernels
from modelzip.onnx_export import onnx_model, to_onnx
from modelzip.qat import convert, prepare
from modelzip.quant import quantize_model
from modelzip.prune import Inputs
from modelzip.threads import Pool
from modelzip.workshop.models import call, own_copy
from modelzip.workshop.runtimes import compiler

NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino", "onnx", "onnxscript")}
PRESENT = [n for n in ENGINES if n != "compile" and all(map(importlib.util.find_spec, NEEDS.get(n, ())))]
FILES = [n for n in PRESENT if ENGINES[n].forms]


pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@dataclasses.dataclass
class Answer:
    vectors: torch.Tensor
    past: tuple | None = None


class Encoder(nn.Module):
    "A small transformer for sentences, called as those of transformers are."

    def __init__(self, words=50, width=32):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(64, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, activation="gelu")
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, input_ids, attention_mask=None, *, normal=True, past=None):
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = x + torch.softmax(self.query(x) @ x.mT - 1e4 * (1 - seen[:, None]), -1) @ self.out(x)
        pooled = (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        return Answer(nn.functional.normalize(pooled, dim=1) if normal else pooled, (x, {"seen": seen}))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(12, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return {"scores": self.out(y), "state": (h, c)}


def convolutional():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, 2, groups=2),
        nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 7),
    )  # fmt: skip
    for m in model:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-1, 1)
            m.running_var.uniform_(0.5, 2)
    return model


def sentences(batch, length):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": mask}


BOTH = {0: "batch", 1: "length"}
MODELS = {
    "LeNet-5": (LeNet5, lambda n, k: {"x": torch.rand(n, 1, 28, 28)}, {0: "batch"}),
    "convolutions": (convolutional, lambda n, k: {"input": torch.randn(n, 3, 12, 12)}, {0: "batch"}),
    "LSTM": (Recurrent, lambda n, k: {"x": torch.randn(n, k, 12)}, BOTH),
    "transformer": (Encoder, sentences, BOTH),
}


def tensors(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if dataclasses.is_dataclass(x):
        x = vars(x)
    return [t for y in (x.values() if isinstance(x, dict) else x or ()) for t in tensors(y)]


def near(got, want, relative):
    assert type(got) is type(want)
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and not a.requires_grad
        assert (a.double() - b.double()).norm() <= relative * b.double().norm() + 1e-6


@pytest.mark.hypothesis  # so that a search comes here: every model on every engine
@pytest.mark.parametrize("name", MODELS)
def test_every_engine_agrees(name):
    """On another batch and length than the example's; the same bits when asked again; the model as it was. (Of two
    models of images one engine meets one, the next one the other.)"""
    make, inputs, free = MODELS[name]
    model, example = make().train(), inputs(2, 6)
    before, count = copy.deepcopy(model.state_dict()), torch.get_num_threads()
    want = copy.deepcopy(model).eval()
    i = [*MODELS].index(name)
    for engine in PRESENT if FUZZ or i > 1 else PRESENT[i::2]:
        state = torch.random.get_rng_state()
        found = deploy(model, example, engine, threads=1, dynamic=free)
        assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == count
        assert found.engine == engine and found.cosine > 0.9999 and (found.bytes is not None) == (engine in FILES)
        for n, k in ((2, 6), (1, 6), (3, 9)):
            other = inputs(n, k)
            near(found(**other), want(**other), 1e-4)
            near(found(*other.values()), want(**other), 1e-4)
            assert all(torch.equal(a, b) for a, b in zip(tensors(found(**other)), tensors(found(**other))))
    assert model.training and all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.hypothesis
@pytest.mark.parametrize("engine", PRESENT)
def test_compressed_models(engine):
    "As they are, with integer products, and with known ranges in each form."
    net, x = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 16)).eval(), torch.randn(6, 32)
    eight, four = quantize_model(net), quantize_model(net, 4, group=32)
    every = [(eight, True), (four, False), (eight, False)][: 3 if FUZZ else 2]
    for model, kernels in every if engine != "given" else ((four, None),):
        near(deploy(model, x, engine, kernels=kernels)(x[:2]), model(x[:2]), 0.03 if kernels else 1e-4)
    known = convert(prepare(net, bits=8, batches=[x])).eval()
    steps = max(m.input_scale * m.q.dequantize().norm(dim=1).max().item() for m in known if hasattr(m, "input_scale"))
    for form in ENGINES[engine].forms or (None,):
        assert (deploy(known, x, engine, form=form)(x[:2]) - known(x[:2])).abs().max() <= 3 * steps


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_by_default_pytorch_keeps_what_is_quicker(engine, monkeypatch):
    "A layer that is quicker as floats is left so; with `kernels=True` none is measured, and all are integers."
    net, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval(), torch.randn(6, 64)
    small, asked = quantize_model(net), []

    def chosen(integers, floats, example, repeats=15):
        asked.append(call(integers, example))
        return {"0"}

    monkeypatch.setattr("modelzip.kernels.quicker_as_floats", chosen)
    monkeypatch.setattr("modelzip.kernels.is_slower", lambda *a: False)
    monkeypatch.setattr("modelzip.deploy._fastest", lambda able, *a: able[-1][1])
    mixed, integers = use_kernels(small, example=x), use_kernels(small)
    assert [m.floats for m in mixed if hasattr(m, "floats")] == [True, False] and len(asked) == 1
    found = deploy(small, x, engine, engines=["torch"] if engine == "auto" else None, threads=1)
    assert found.engine == "torch" and found.kernels and torch.equal(asked[1], integers(x))
    assert torch.equal(found(x), mixed(x)) and not torch.equal(found(x), integers(x))
    assert torch.equal(deploy(small, x, "torch", kernels=True)(x), integers(x)) and len(asked) == 2
    monkeypatch.setattr("modelzip.kernels.is_slower", lambda *a: True)
    assert torch.equal(deploy(small, x, "torch")(x), use_kernels(small, example=x)(x))
    assert (deploy(small, x, "torch")(x) - small(x)).abs().max() < 1e-5  # all of them floats


def test_calls_that_the_example_does_not_vouch_for():
    model = deploy(Encoder(), sentences(2, 6), "given", dynamic=BOTH)
    good = sentences(2, 6)
    for bad, error, said in (
        ({"input_ids": good["input_ids"].int()}, TypeError, "input_ids is int32"),
        ({"input_ids": good["input_ids"][0]}, ValueError, "input_ids has the shape [6]"),
        ({"attention_mask": good["attention_mask"][:1]}, ValueError, "attention_mask has 1 in 'batch'"),
        ({"attention_mask": None}, TypeError, "attention_mask is None, and was a tensor"),
        ({"normal": False}, ValueError, "normal is False; the model was deployed for True"),
        ({"past": good["input_ids"]}, TypeError, "past is a tensor, and was None"),
        ({"past": (good["input_ids"],)}, TypeError, "past"),
        ({"labels": good["input_ids"]}, TypeError, "labels"),
    ):
        with pytest.raises(error) as e:
            model(**good | bad)
        assert said in str(e.value)
    with pytest.raises(ValueError, match=r"x has the shape \[2, 1, 28, 27\]; .* float32\[batch, 1, 28, 28\]"):
        deploy(LeNet5(), torch.rand(2, 1, 28, 28), "given")(torch.rand(2, 1, 28, 27))


@pytest.mark.parametrize(
    "how, error, said",
    [
        ({"engine": "tensorrt"}, ValueError, "engine is 'tensorrt'; it may be 'auto', 'given'"),
        ({"engines": ["tensorrt"]}, ValueError, "tensorrt"),
        ({"threads": 0}, ValueError, "threads"),
        ({"callers": 0}, ValueError, "callers"),
        ({"cosine": 2}, ValueError, "cosine is 2"),
        ({"precision": "f16"}, ValueError, "precision is 'f16'; it may be 'f32' or 'bf16'"),
        ({"precision": "bf16", "engine": "torch"}, ValueError, "precision does not act: engine is 'torch'"),
        ({"form": "codes"}, ValueError, "form is 'codes'"),
        ({"form": "qdq", "engine": "torch"}, ValueError, "form does not act"),
        ({"path": "x.onnx", "engine": "torch"}, ValueError, "path does not act"),
        ({"kernels": True, "engine": "given"}, ValueError, "kernels does not act"),
        ({"engines": ["torch"], "engine": "torch"}, ValueError, "engines does not act"),
        ({"dynamic": {"y": {}}, "engine": "given"}, ValueError, "dynamic names 'y'"),
        ({"dynamic": [{}, {}], "engine": "given"}, ValueError, "dynamic describes 2 tensors"),
        ({"example": (1.0,)}, TypeError, "example"),
        ({"example": {"z": torch.ones(2)}}, TypeError, "example does not fit the model"),
        ({"model": "net"}, TypeError, "model is"),
        ({"repeats": 2}, ValueError, "repeats is 2; it may be 6 or more"),
        ({"engines": "torch"}, TypeError, "engines is 'torch'; it may be a list"),
        ({"engine": "given", "dynamic": {-1: "n"}}, ValueError, "dynamic says {-1: 'n'} of input"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(how, error, said):
    with pytest.raises(error, match=said):
        deploy(**{"model": nn.Linear(4, 4), "example": torch.randn(3, 4)} | how)


def test_an_engine_is_one_function():
    "What is entered is found; `auto` takes no engine below the cosine that is asked for, however quick."
    net, x = nn.Linear(16, 16).eval(), torch.randn(4, 16)

    @register_engine("off")
    def off(work):
        "wrong by a tenth"
        noise = torch.randn(4, 16)
        noise *= 0.3 * net(x).norm() / noise.norm()
        answer = net(x) + noise
        return lambda *tensors: answer

    @register_engine("broken")
    def broken(work):
        raise RuntimeError("no such processor\nat all")

    try:
        found = deploy(net, x, engines=["off", "broken"], threads=1, repeats=8)
        rows = {a.engine: a for a in found.tried}
        assert found.engine == "given" and torch.equal(found(x), net(x))
        assert 0.9 < rows["off"].cosine < 0.99 and rows["off"].note == "below the cosine 0.999"
        assert rows["off"].ratio is None and rows["given"].note == "taken" and rows["given"].ratio == 1
        assert rows["broken"].note == "no such processor" and "no such processor" in repr(found.tried)
        with pytest.raises(ValueError, match="engine 'off' reaches a cosine of 0.9.*cosine asks for 0.999"):
            deploy(net, x, "off")
        with pytest.raises(RuntimeError, match="no such processor"):
            deploy(net, x, "broken")
        rough = deploy(net, x, engines=["off"], cosine=0.9, threads=1, repeats=8)
        assert rough.engine in ("off", "given") and {a.engine: a for a in rough.tried}["off"].ratio is not None
        assert deploy(net, x, "off", cosine=None).cosine == rows["off"].cosine
    finally:
        del ENGINES["off"], ENGINES["broken"]


def test_auto_is_never_slower_than_what_was_given():
    "An engine that waits is not taken; whoever only perhaps is quicker is not, either."
    import time

    net, x = nn.Linear(16, 16).eval(), torch.randn(4, 16)

    @register_engine("slow")
    def slow(work):
        def run(x):
            time.sleep(0.002)
            return net(x)

        return run

    try:
        found = deploy(net, x, engines=["slow"], threads=1, repeats=8)
        assert found.engine == "given" and {a.engine: a for a in found.tried}["slow"].low > 1
    finally:
        del ENGINES["slow"]


@pytest.mark.parametrize("engine", NEEDS)
def test_without_an_engine_the_error_says_what_to_install(engine, monkeypatch):
    import importlib

    missing = "onnxruntime" if engine == "onnxruntime" else "openvino"
    extra = {"onnxruntime": "onnx", "openvino": "openvino"}[engine]
    find = importlib.import_module

    def without(name, *a):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return find(name, *a)

    monkeypatch.setattr("importlib.import_module", without)
    net, x = nn.Linear(4, 4), torch.randn(3, 4)
    with pytest.raises(ImportError, match=rf"`{missing}`.*modelzip\[{extra}\]"):
        deploy(net, x, engine)
    found = deploy(net, x, engines=[engine], repeats=6)
    assert found.engine == "given" and f"modelzip[{extra}]" in found.tried[1].note


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = deploy(nn.Linear(4, 4), torch.randn(3, 4), engines=["compile"], repeats=6)
    assert found.engine == "given" and "C++ compiler" in found.tried[1].note


def test_threads_are_set_for_the_call_and_put_back():
    seen = []

    class Tells(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return x + 1

    before = torch.get_num_threads()
    for n in (1, 2, 3):
        found = deploy(Tells(), torch.randn(2, 2), "given", threads=n)
        seen.clear()
        found(torch.randn(5, 2))
        assert seen == [n] and found.threads == n and torch.get_num_threads() == before
        assert f"{n} thread" in repr(found)


@pytest.mark.parametrize("engine", PRESENT)
def test_many_threads_call_at_once(engine):
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(40, 32)
    model = deploy(net, x[:4], engine, threads=1, callers=3)
    alone = [model(row[None])[0] for row in x]
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(lambda row: model(row[None])[0], x)))
    with Pool(model, 2, max_batch=4) as pool:
        for got, want in zip([pool.submit(row) for row in x], net(x)):
            near(got.result(), want, 1e-4)


def test_what_a_deployed_model_is_not():
    net, x = nn.Linear(4, 4).eval(), torch.randn(3, 4)
    model = deploy(net, x, "given")
    assert isinstance(model, nn.Module) and not model.training and model.eval() is model and not [*model.parameters()]
    for what, said in (
        (lambda: model.train(), "cannot be trained"),
        (lambda: model.state_dict(), "no weights to save"),
        (lambda: pickle.dumps(model), "pickled"),
        (lambda: copy.deepcopy(model), "copied"),
        (lambda: deploy(model, x), "deployed already"),
    ):
        with pytest.raises(TypeError, match=said):
            what()
    net.weight.zero_()  # what is deployed has its own numbers
    assert model(x).norm() > 0.1 and net.bias.equal(net(x)[0])


@pytest.mark.skipif("onnxruntime" not in PRESENT, reason="needs onnxruntime")
def test_the_file_is_kept_where_it_is_wanted(tmp_path, monkeypatch):
    import onnx

    net, x = Encoder(), sentences(2, 6)
    found = deploy(net, x, "onnxruntime", path=tmp_path / "m.onnx", dynamic=BOTH)
    assert found.path == tmp_path / "m.onnx" and found.path.stat().st_size == found.bytes and "m.onnx" in repr(found)
    graph = onnx.load(found.path).graph
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in graph.output] == ["vectors", "past.0", "past.1.seen"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(OSError):
        deploy(nn.Linear(4, 4), torch.randn(2, 4), "onnxruntime", path=tmp_path / "nowhere" / "m.onnx")
    found.path.unlink()
    monkeypatch.setattr("modelzip.workshop.onnx_files.LIMIT", 0)
    monkeypatch.setattr("modelzip.workshop.runtimes.LIMIT", 0)
    for engine in FILES:
        large = deploy(nn.Linear(64, 64), torch.randn(2, 64), engine, path=tmp_path / "large.onnx")
        assert large(torch.randn(3, 64)).shape == (3, 64)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
        assert large.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


class Looks(nn.Module):
    "What it computes depends on the number of rows."

    def __init__(self, limit, beyond):
        super().__init__()
        self.limit, self.beyond, self.a = limit, beyond, nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x) if x.shape[0] <= self.limit else self.beyond(self.a(x))


def fails(x):
    raise ValueError("too many rows")


@pytest.mark.skipif("onnxruntime" not in PRESENT, reason="needs onnxruntime")
def test_a_model_that_looks_at_a_size(tmp_path):
    "A graph holds one way through the model; where the model goes another, no file stands for it."
    x = torch.randn(4, 8)
    for net, example in ((Looks(5, torch.neg), x), (Looks(1, torch.neg), x[:1])):
        for engine in FILES:
            with pytest.raises(ValueError, match="off the model's own output"):
                deploy(net, example, engine)
    with pytest.raises(ValueError, match="off the model's own output"):
        to_onnx(quantize_model(Looks(5, torch.neg)), tmp_path / "m.onnx", x)
    for engine in FILES:
        model = deploy(Looks(5, fails), x, engine)
        assert model(torch.randn(5, 8)).shape == (5, 8)
        with pytest.raises(ValueError, match="batch is 6; the model's own code allows 0 to 5"):
            model(torch.randn(6, 8))


@pytest.mark.skipif("onnxruntime" not in PRESENT, reason="needs onnxruntime")
def test_outputs_and_calls_of_every_shape(capfd):
    class Says(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.a, self.b, self.f = nn.Linear(8, 8), nn.Linear(8, 8), f

        def forward(self, x, *more, **named):
            return self.f(self, x, *more, **named)

    x = torch.randn(4, 8)
    many = lambda s, x, i, *more: {
        "linear": s.a(x), "linear_1": s.b(x), "x": sum(more) + s.a(s.b(x)), "twice": (y := s.b(x), [y, x]),
        "weight": s.a.weight, "codes": (s.a(x) * i).to(torch.int8),
    }  # fmt: skip
    named = lambda s, x, **named: {k: s.a(x.mul_(2)).log() * v for k, v in named.items()}
    for f, example in (
        (many, (x, torch.full((4, 1), 2, dtype=torch.int32), x, x)),
        (named, {"x": x, "u": x + 1, "v": x}),
    ):
        model = Says(f)
        for engine in FILES:
            got, want = (call(m, own_copy(example)) for m in (deploy(model, example, engine), model))
            for a, b in zip(tensors(got), tensors(want), strict=True):
                assert (
                    torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True) and a.dtype == b.dtype
                )
    with pytest.raises(ValueError):
        deploy(Says(lambda s, x: s.a(x) + torch.rand(8)), x, "onnxruntime")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif("onnxruntime" not in PRESENT, reason="needs onnxruntime")
def test_what_a_file_cannot_say_is_left_out():
    class Counts(nn.Module):
        def forward(self, x):
            return x + 1, len(x)

    found = deploy(Counts(), torch.randn(3, 4), engines=["onnxruntime"], repeats=6)
    assert found(torch.randn(5, 4))[1] == 5 and "output 1 is a int" in found.tried[1].note
    with pytest.raises(ValueError, match="output 1 is a int"):
        deploy(Counts(), torch.randn(3, 4), "onnxruntime")

    class Depends(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    found = deploy(Depends(), torch.ones(3, 4), engines=["onnxruntime"], repeats=6)
    assert found.engine == "given" and found.tried[1].note

    class Words(nn.Module):
        def forward(self, x):
            return (x[:, :2] > 0).long().argmax(1), x.isnan()

    x = torch.randn(6, 4)
    near(deploy(Words(), x, "onnxruntime")(x[:2]), Words()(x[:2]), 0)


def test_likeness_sees_past_what_is_not_finite():
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(x > 0, float("-inf"))

    x = torch.randn(6, 4)
    for engine in PRESENT:
        assert deploy(Masked(), x, engine).cosine == 1


@pytest.mark.skipif("openvino" not in PRESENT, reason="needs openvino")
def test_openvino_computes_floats_as_floats():
    "With bfloat16 only when asked; on a processor that has none there is no difference."
    net, x = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 64)).eval(), torch.randn(16, 256)
    off = lambda m: ((m(x) - net(x)).norm() / net(x).norm()).item()
    assert off(deploy(net, x, "openvino")) < 1e-5
    assert off(deploy(net, x, "openvino", precision="bf16")) < 0.02


@pytest.mark.hypothesis
@pytest.mark.skipif(compiler() is None or not FUZZ, reason="needs a C++ compiler, and a minute: `make fuzz`")
def test_compiled():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval(), torch.randn(4, 8)
    model = deploy(net, x, "compile")
    near(model(x[:2]), net(x[:2]), 1e-5)


def test_engines_are_given_nothing_empty(tmp_path):
    "At a batch of 0 an LSTM in ONNX Runtime, a pooling in OpenVINO end the process: they are not asked."
    model, x = Recurrent().eval(), torch.randn(2, 6, 12)
    with pytest.raises(ValueError, match="empty tensor"):
        to_onnx(model, tmp_path / "m.onnx", x[:0])
    for engine in PRESENT:
        how = {"path": tmp_path / "n.onnx"} if engine in FILES else {}
        found = deploy(model, x, engine, threads=1, **how)
        if engine not in FILES:
            assert found(x[:0])["scores"].shape == model(x[:0])["scores"].shape
            continue
        with pytest.raises(ValueError, match="^x is empty.*ask the model itself"):
            found(x[:0])
        with pytest.raises(ValueError, match="empty tensor"):
            deploy(model, x[:0], engine)
        with pytest.raises(ValueError, match="is empty"):
            onnx_model(found.path)(x[:0])
    tried = deploy(model, x[:0], engines=FILES, threads=1, repeats=6).tried
    assert {a.note for a in tried if a.engine in FILES and a.engine in PRESENT} <= {
        "example holds an empty tensor, (0, 6, 12); give one with a size of 1 or more everywhere"
    }


class Times(nn.Module):
    def forward(self, x, k=3, *, flag=True):
        return x * k if flag else x


def test_what_a_call_leaves_out_has_its_default():
    "Not what the example said instead."
    x = torch.randn(2, 4)
    for example in (Inputs(x, k=5), Inputs(x, 5), Inputs(x, flag=False), {"x": x, "k": 5}):
        found = deploy(Times(), example, "given")
        assert torch.equal(call(found, example), call(Times(), example))
        with pytest.raises(ValueError, match="the model was deployed for"):
            found(x)
    for example in (x, Inputs(x, k=3), Inputs(x, 3, flag=True)):
        found = deploy(Times(), example, "given")
        assert torch.equal(found(x), 3 * x) and torch.equal(found(x, 3), 3 * x) and found.layout.in_order


@pytest.mark.parametrize("engine", ["given", "onnxruntime"])
def test_views_of_every_sort_are_inputs(engine):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5).eval(), torch.randn(4, 6)
    found = deploy(model, x, engine)
    for view in (
        torch._neg_view(x),
        torch.complex(x, x).conj().imag,
        x.t().contiguous().t(),
        x[:1].expand(4, 6),
        torch.randn(4, 12)[:, ::2],
        nn.Parameter(x.clone()),
    ):
        torch.testing.assert_close(found(view), model(view).detach(), atol=1e-5, rtol=1e-5)
