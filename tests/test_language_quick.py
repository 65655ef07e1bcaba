"""`quick_llama` says what the model says, whatever its layers are made of; and the cache with room."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from modelzip.data import seeded
from modelzip.kernels import use_kernels
from modelzip.language import KeyValueCache, Llama, QuantizedCache, generate
from modelzip.prune import prune_model, sparsify_model
from modelzip.ptq import awq, calibrate
from modelzip.quant import Dequantize, quantize_model
from modelzip.workshop.gguf_blocks import quantize_blocks
from modelzip.workshop import quick_llama as room
from modelzip.workshop.quick_llama import FewRows, RoomyCache, SideBySide, quick_llama, stacked_tensors
from modelzip.workshop.runtimes import compiler
from guards import FUZZ, examples, unchanged

COARSE = {"words": dict(bits=8, group=None), "head": dict(bits=8, group=None)}


def llama(**how):
    with seeded(0):
        shape = dict(words=320, width=192, layers=2, heads=6, kv_heads=3, hidden=160, context=64)
        model = Llama(**shape | how).eval()
        for p in model.parameters():
            p.data.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 if p.dim() > 1 else 1 + 0.1 * torch.randn_like(p))
    return model


def calibrated(model):
    return awq(model, calibrate(model, [torch.arange(40)[None]]), 4, group=32, overrides=COARSE)


def in_blocks(model, type):
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and name != "head":
            model.set_submodule(name, Dequantize(layer, quantize_blocks(layer.weight.detach(), type)))
    return model


KINDS = {
    "floats": lambda m: m,
    "one head of keys": lambda m: llama(kv_heads=1, tied=False),
    "no groups": lambda m: llama(kv_heads=6, base=500.0),
    "codes": lambda m: quantize_model(m, 8),
    "8 bits": lambda m: use_kernels(quantize_model(m, 8)),
    "8 bits, zero points": lambda m: use_kernels(quantize_model(m, 8, symmetric=False)),
    "8 bits, a range for the tensor": lambda m: use_kernels(quantize_model(m, 8), activations="tensor"),
    "8 bits, a scale for the matrix": lambda m: use_kernels(quantize_model(m, 8, per_channel=False)),
    "4 bits": lambda m: use_kernels(quantize_model(m, 4, group=32, overrides=COARSE)),
    "4 bits, zero points": lambda m: use_kernels(quantize_model(m, 4, group=32, symmetric=False, overrides=COARSE)),
    "3 bits": lambda m: use_kernels(quantize_model(m, 3, group=32, overrides=COARSE)),
    "4 bits, made int8": lambda m: use_kernels(quantize_model(m, 4, group=32), requantize=True),
    "mixed": lambda m: use_kernels(
        quantize_model(m, 4, group=32, overrides=COARSE | {"*.key": dict(bits=8, group=None), "*.gate": None})
    ),
    "a scale for each column": lambda m: use_kernels(calibrated(m)),
    "blocks of a GGUF file": lambda m: in_blocks(m, "Q4_1"),
    "symmetric blocks": lambda m: in_blocks(m, "Q4_0"),
    "8-bit blocks": lambda m: in_blocks(m, "Q8_0"),
    "sparse": lambda m: sparsify_model(prune_model(m, 0.5, skip=["head"]), overrides={"head": None, "words": None}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_model_says(kind):
    model = KINDS[kind](llama())
    ids = torch.randint(0, 320, (2, 31), generator=torch.Generator().manual_seed(1))
    with unchanged(model):
        quick = quick_llama(model)
        most = 2e-5 if kind in ("floats", "one head of keys", "no groups", "codes", "sparse") else 2e-2
        close = lambda a, b: (a - b).norm() <= most * b.norm()
        assert close(quick(ids), model(ids)) and close(quick(ids, last=True), model(ids, last=True))
        caches = KeyValueCache(), RoomyCache(3)
        for part in ids[:1].split([12, 1, 1, 8, 9], 1):  # one token, few, many
            assert close(quick(part, caches[1]), model(part, caches[0]))
        assert caches[0].length == caches[1].length == 31


@torch.no_grad()
@pytest.mark.parametrize("kind", ["floats", "8 bits", "4 bits, zero points", "blocks of a GGUF file"])
def test_biases_are_not_lost(kind):
    model, ids = llama(), torch.tensor([[5, 3, 8]])
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.split(".")[-1] in ("query", "value", "gate", "down"):
            dice = torch.Generator().manual_seed(len(name))
            layer.bias = nn.Parameter(torch.randn(layer.out_features, generator=dice))
    without, model = KINDS[kind](llama()), KINDS[kind](model)
    want, got = model(ids), quick_llama(model)(ids)
    assert (want - got).norm() < 2e-2 * want.norm() < 2e-1 * (want - without(ids)).norm()


class AsWritten:
    "A `Program` that nobody compiled."

    made = 0

    def __init__(self, between):
        AsWritten.made, self.calls = AsWritten.made + 1, 0
        self.names, self.between = list(between.weights()), between

    def run(self, given):
        self.calls, weights = self.calls + 1, dict(zip(self.names, given))
        return torch.func.functional_call(self.between, weights, tuple(given[len(weights) :]))


class Compiled(room.Program):
    def __init__(self, between):
        super().__init__(between)
        AsWritten.made, self.calls, program = AsWritten.made + 1, 0, self.run

        def counted(given):
            self.calls += 1
            return program(given)

        self.run = counted


needs_a_minute = pytest.mark.skipif(compiler() is None or not FUZZ, reason="a C++ compiler, and a minute: `make fuzz`")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["floats", "3 bits", "4 bits", "blocks of a GGUF file"])
@pytest.mark.parametrize("program", [AsWritten, pytest.param(Compiled, marks=needs_a_minute)])
def test_one_program_says_what_the_blocks_say(program, kind, monkeypatch):
    monkeypatch.setattr(room, "Program", program)
    monkeypatch.setattr(AsWritten, "made", 0)
    model = KINDS[kind](llama(layers=3))
    dice = torch.get_rng_state()
    with unchanged(model):
        quick, plain = quick_llama(model, compiled=True), quick_llama(model)
    calls = lambda: sum(p.calls for p in {id(p): p for p, _ in quick.programs}.values())
    assert AsWritten.made == 1 and len(quick.programs) == 3 and torch.equal(dice, torch.get_rng_state())
    ids = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(1))
    close = lambda a, b: (a - b).norm() <= (2e-5 if kind == "floats" else 2e-2) * b.norm()
    caches = RoomyCache(3), RoomyCache(3)
    for part in ids.split([12, 1, 1, 8, *[1] * 18], 1):  # the room grows twice on the way
        assert close(quick(part, caches[0]), plain(part, caches[1]))
    assert calls() == 3 * 20 and AsWritten.made == 1
    assert caches[0].length == caches[1].length == 40 and caches[0].nbytes == caches[1].nbytes
    for layer in range(3):
        for a, b in zip(caches[0].kept[layer][1:], caches[1].kept[layer][1:]):
            assert close(a[:, :, :40], b[:, :, :40])
    for cache, ids in ((KeyValueCache, ids[:, :3]), (RoomyCache, ids[:, :4].view(2, 2)), (RoomyCache, ids[:, :1])):
        pair = cache(), cache()
        for part in ids.split(1, 1) if cache is KeyValueCache or len(ids) > 1 else [ids]:  # not compiled for these
            assert torch.equal(quick(part, pair[0]), plain(part, pair[1]))
    assert calls() == 3 * 20
    with pytest.raises(ValueError, match="keys of layer 0"):  # of another model
        other = RoomyCache()
        quick_llama(llama(kv_heads=6))(torch.tensor([[1, 2]]), other)
        quick(torch.tensor([[3]]), other)
    said = generate(quick, [5, 3, 8], 20, cache=RoomyCache())
    assert said == generate(plain, [5, 3, 8], 20, cache=RoomyCache())
    if program is Compiled:  # as written, one call puts its weights into the module that the other is using
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(lambda _: generate(quick, [5, 3, 8], 20, cache=RoomyCache()), range(2))
            assert list(both) == [said, said]
    assert generate(copy.deepcopy(quick), [5, 3, 8], 20, cache=RoomyCache()) == said


def test_blocks_that_differ_have_programs_of_their_own(monkeypatch):
    monkeypatch.setattr(room, "Program", AsWritten)
    model = llama(layers=6)
    model.blocks[2].norm.eps = 1e-3
    quick = quick_llama(model, compiled=True)
    a, b, c, *rest = [id(p) for p, _ in quick.programs]
    assert len({a, b, c}) == 3 and set(rest) == {a}  # before it, as it follows, as it is followed
    ids = torch.arange(9)[None]
    caches = RoomyCache(), RoomyCache()
    with torch.no_grad():
        for part in ids.split([7, 1, 1], 1):
            want, got = quick_llama(model)(part, caches[0]), quick(part, caches[1])
            assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("kind", ["8 bits", "mixed", "codes", "8-bit blocks", "sparse"])
def test_what_cannot_be_compiled_is_refused_by_name(kind, monkeypatch):
    monkeypatch.setattr(room, "Program", AsWritten)
    with pytest.raises(
        ValueError, match=r"blocks.0.(attention.query, .key or .value|feed.gate or .up) is a \w+ without"
    ):
        quick_llama(KINDS[kind](llama()), compiled=True)


def test_without_a_compiler_it_says_so(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("no g++ here")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(RuntimeError, match="needs torch.export and a C.. compiler, such as g..: no g.. here"):
        quick_llama(llama(), compiled=True)


def test_layers_of_one_input_are_one_product():
    layers = lambda kind: quick_llama(KINDS[kind](llama())).blocks[1]
    for kind, all_of, both in (
        ("floats", nn.Linear, nn.Linear),
        ("4 bits", FewRows, FewRows),
        ("8 bits", FewRows, FewRows),
        ("blocks of a GGUF file", FewRows, FewRows),
        ("8-bit blocks", SideBySide, SideBySide),
        ("3 bits", SideBySide, SideBySide),
        ("mixed", SideBySide, SideBySide),
        ("codes", SideBySide, SideBySide),
    ):
        block = layers(kind)
        assert (type(block.all), type(block.both)) == (all_of, both), kind


def test_generate_says_the_same():
    model = llama()
    said = [generate(m, [5, 3, 8], 30, cache=c) for m, c in ((model, None), (quick_llama(model), RoomyCache()))]
    assert said[0] == said[1]
    assert len(generate(quick_llama(model), [5], 40, cache=QuantizedCache(8, 8, 8))) == 40


@torch.no_grad()
def two(layer):
    inside = nn.Linear(layer.in_features, 8, bias=False), nn.Linear(8, layer.out_features, bias=False)
    return nn.Sequential(*inside)


PLACES = ["attention.query", "attention.key", "attention.value", "attention.out", "feed.gate", "feed.up", "feed.down"]


@pytest.mark.parametrize("places", [*([p] for p in PLACES), PLACES], ids=lambda p: p[0] if len(p) == 1 else "all")
@torch.no_grad()
def test_layers_in_the_place_of_one(places):
    model, ids = llama(), torch.arange(14).view(2, 7)
    for place in places:
        with seeded(1):
            model.set_submodule(f"blocks.1.{place}", two(model.get_submodule(f"blocks.1.{place}")))
    want, got = model(ids), quick_llama(model)(ids)
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max().item())


def test_it_is_not_the_model_any_more():
    model, ids = llama(), torch.tensor([[1, 2, 3]])
    quick = quick_llama(model)
    before = quick(ids)
    copy.deepcopy(quick)(ids)
    with pytest.raises(RuntimeError, match="stays as it was made"):
        quick.double()
    with pytest.raises(RuntimeError, match="stays as it was made"):
        quick.load_state_dict(quick.state_dict())
    assert torch.equal(quick(ids), before) and not quick.training


def shouting(module, input, output):
    return 2 * output


class Other(Llama):
    "Computes something else."

    def forward(self, *args, **kwargs):
        return -super().forward(*args, **kwargs)


def test_what_it_cannot_promise_is_refused_by_name():
    def but(change):
        model = llama()
        change(model)
        return model

    cases = {
        "model is a Linear": nn.Linear(2, 2),
        "model is a Other": Other(words=8, width=8, layers=1, heads=2, kv_heads=1, hidden=8),
        "blocks.1.feed.up has a forward hook": but(lambda m: m.blocks[1].feed.up.register_forward_hook(shouting)),
        "blocks.0 has a forward hook": but(lambda m: m.blocks[0].register_forward_hook(shouting)),
        "blocks.1.feed is a Identity": but(lambda m: setattr(m.blocks[1], "feed", nn.Identity())),
        "blocks.0.norm is a LayerNorm": but(lambda m: setattr(m.blocks[0], "norm", nn.LayerNorm(192))),
        "blocks.0 has a forward of its own": but(lambda m: setattr(m.blocks[0], "forward", lambda x, *_: x)),
        "dtype torch.float64": llama().double(),
        "words.weight has dtype torch.bfloat16": llama().bfloat16(),
    }
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            quick_llama(model)
    with pytest.raises(ValueError, match="65 tokens behind 0"):
        quick_llama(llama())(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.hypothesis
@given(cuts=st.lists(st.integers(0, 40), max_size=8), room=st.integers(1, 50), layers=st.integers(1, 2))
@settings(max_examples=examples(25), deadline=None)
def test_a_cache_with_room_gives_what_the_other_gives(cuts, room, layers):
    keys, values = torch.randn(2, 2, 3, sum(cuts), 4, generator=torch.Generator().manual_seed(0))
    roomy, plain = RoomyCache(room), KeyValueCache()
    for k, v in zip(keys.split([0, *cuts], 2), values.split([0, *cuts], 2)):
        for layer in range(layers):
            for a, b in zip(roomy.update(layer, k, v), plain.update(layer, k, v), strict=True):
                assert torch.equal(a, b)
    assert roomy.length == plain.length == sum(cuts)
    buffers = [t for _, *both in roomy.kept.values() for t in both]
    assert roomy.nbytes == sum(t.untyped_storage().nbytes() for t in buffers)
    assert all(max(room, sum(cuts)) <= t.shape[2] <= max(room, 2 * sum(cuts)) for t in buffers)


def test_a_cache_with_room_refuses_by_name():
    with pytest.raises(ValueError, match="room is 0"):
        RoomyCache(0)
    cache, x = RoomyCache(), torch.ones(1, 2, 3, 4)
    cache.update(0, x, x)
    with pytest.raises(ValueError, match="keys of layer 0 have n × heads × head 2 × 2 × 4"):
        cache.update(0, x.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1))
    assert cache.length == 3


def test_only_what_is_alike_is_stacked():
    with seeded(0):
        ws = torch.randn(2, 16, 64)
    from modelzip.quant import quantize

    for a, b in ((dict(bits=4, group=32), dict(bits=8, group=32)), (dict(bits=4, group=32), dict(bits=4, group=64))):
        assert stacked_tensors([quantize(ws[0], **a), quantize(ws[1], **b)]) is None
    for how in (dict(bits=8), dict(bits=8, axis=1), dict(codebook="nf4", group=32), dict(bits=3, axis=0)):
        assert stacked_tensors([quantize(w, **how) for w in ws]) is None
