"""Solid files: what comes back, and what happens to files that are damaged or forged. And the bets that learn, and
the price of bits."""

import copy, io, itertools, json, math, random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from modelzip import archive as zips, pack
from modelzip.workshop import solid
from modelzip.archive import PackError
from modelzip.coding import AdaptiveDecoder, AdaptiveEncoder, CodingError, adaptive_bytes, adaptive_codes, entropy
from modelzip.data import LeNet5
from modelzip.pack import diff, inspect, load, read_tensor, save
from modelzip.qat import entropy_bits, prepare, soft_counts
from modelzip.quant import quantize_model
from mutations import DAMAGE, JUNK, places, sorts, state, stored
from test_pack import Holder, tensors
from guards import examples, seeded

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")


def forged(text, numbers):
    "A solid file with whatever manifest and numbers, and a checksum that is right."
    zips.seal_solid(f := io.BytesIO(), solid.pack_text(json.dumps(text).encode()) + numbers)
    return f.getvalue()


def opened(path):
    with open(path, "rb") as f:
        text, numbers = solid.unpack_text(zips.unseal_solid(f))
    return json.loads(text), numbers


@pytest.fixture(scope="module")
def tiny():
    model = quantize_model(LeNet5(channels=[2, 3], hidden=4), levels=7, per_channel=False)
    return model.eval()


# ---- what comes back ----------------------------------------------------------------------------------------------
@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda k: "." not in k and not hasattr(nn.Module(), k)),
        tensors(),
        max_size=5,
    )
)
def test_any_tensor_under_any_name(tmp_path, named):
    "Random bits, all types, empty and scalar shapes, any Unicode name."
    m, empty = Holder(**named), Holder(**{k: torch.zeros_like(t) for k, t in named.items()})
    assert state(load(save(m, tmp_path / "x.mz", "solid"), empty)) == state(m)


@pytest.mark.parametrize(
    "name, model", [s for s in sorts() if "large" not in s[0]], ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_sort_of_model(tmp_path, name, model):
    one, mapped = save(model, tmp_path / "solid.mz", "solid"), save(model, tmp_path / "mapped.mz", False)
    assert state(load(one, model)) == state(model) and diff(one, mapped).same
    i = random.Random(name).choice([*pack.items(model)])
    assert stored(read_tensor(one, i.name)) == stored(i.value)
    contents = inspect(one)
    assert (
        sum(l.bytes for l in contents.lines) + contents.rest == contents.bytes == one.stat().st_size
        and contents.version == 6
    )
    assert one.read_bytes() == save(copy.deepcopy(model), tmp_path / "again.mz", "solid").read_bytes()


def test_lean(tmp_path, tiny):
    """Beside its numbers a file that a builder knows has about 150 bytes, and its numbers take their entropy and
    little more."""
    contents = inspect(save(tiny, tmp_path / "x.mz", "solid"))
    assert contents.rest <= 150
    codes = [m.q.unpack().flatten() for m in tiny.children()]
    ideal = sum(float(entropy(c)) * c.numel() for c in codes) / 8
    assert sum(l.bytes for l in contents.lines if "weight" in l.name) <= ideal + 4 * (
        4 + 8
    )  # a scale and a learned histogram each
    assert state(load(tmp_path / "x.mz")) == state(tiny)


def test_layers_that_differ(tmp_path):
    model = LeNet5(channels=[2, 3], hidden=4)
    model.conv2 = nn.Conv2d(2, 5, 5)
    model.fc1 = nn.Sequential(nn.Linear(80, 3, bias=False), nn.Linear(3, 4))
    assert state(load(save(model, tmp_path / "x.mz", "solid"))) == state(model)


def test_what_cannot_be_solid(tmp_path, tiny):
    with pytest.raises(ValueError, match="more numbers"):
        save(LeNet5(), tmp_path / "x.mz", "solid")
    assert not (tmp_path / "x.mz").exists()
    with pytest.raises(ValueError, match="mmap"):
        load(save(tiny, tmp_path / "x.mz", "solid"), mmap=True)
    with pytest.raises(TypeError, match="archive"):
        save(tiny, tmp_path / "x.mz", "tight")


# ---- damage and forgery -------------------------------------------------------------------------------------------
def test_every_byte_flipped_and_every_length(tmp_path, tiny):
    good, rng = save(tiny, tmp_path / "good.mz", "solid").read_bytes(), random.Random(0)
    for i in range(len(good)):
        for bad in good[:i], good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1 :]:
            (tmp_path / "x.mz").write_bytes(bad)
            with pytest.raises(PackError, match="x.mz"):
                load(tmp_path / "x.mz")


def test_random_damage(tmp_path, tiny):
    good, rng, want = save(tiny, tmp_path / "good.mz", "solid").read_bytes(), random.Random(1), state(tiny)
    for n, damage in zip(range(600), itertools.cycle(DAMAGE.values())):
        (tmp_path / "x.mz").write_bytes(bad := damage(good, rng))
        try:
            got = load(tmp_path / "x.mz")
        except PackError:
            continue
        assert bad == good and state(got) == want


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_forged_manifests_and_numbers(tmp_path, tiny):
    """Checksums are right, the rest is nonsense: a PackError or some model, never another exception, and never long
    or large."""
    good, numbers = opened(save(tiny, tmp_path / "good.mz", "solid"))
    rng, path, loaded, times = seeded(2), tmp_path / "x.mz", 0, examples(200)
    every = list(places(good))
    assert times > 2 * len(every)
    for n in range(times):
        m, at = copy.deepcopy(good), every[n % len(every)] if n < 2 * len(every) else rng.choice(every)
        if not at:
            m = rng.choice(JUNK)
        else:
            owner = m
            for k in at[:-1]:
                owner = owner[k]
            if rng.random() < 0.2:
                del owner[at[-1]]
            else:
                owner[at[-1]] = rng.choice([*JUNK, 15, [15, 3], "float16", {"dtype": "float32", "shape": [2]}])
        data = (
            numbers if rng.random() < 0.7 else bytes(rng.randrange(256) if rng.random() < 0.1 else b for b in numbers)
        )
        path.write_bytes(forged(m, data))
        try:
            load(path)
            loaded += 1
        except PackError as e:
            assert str(path) in str(e)
        try:
            inspect(path)
        except PackError:
            pass
    assert 0 < loaded < 0.7 * times  # a changed shape changes neighbours, and so what the numbers say


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m | {"modelzip": 7}, "newer modelzip"),
        (lambda m: m | {"modelzip": "4"}, "which version"),
        (lambda m: m | {"x": 1}, "fields"),
        (lambda m: m | {"tensors": m["tensors"][:-1]}, "another length"),
        (lambda m: m | {"tensors": [*m["tensors"][:-1], {"dtype": "uint8", "shape": [2**40]}]}, "more numbers"),
        (lambda m: m | {"architecture": {"name": "Unheard", "options": {}}}, "cannot be built"),
        (lambda m: {k: v for k, v in m.items() if k != "kind"} | {"architecture": None}, "another length"),
        (lambda m: m | {"tensors": [*m["tensors"][:-1], {"offset": 3}]}, "unknown form"),
    ],
)
def test_manifests_that_lie(tmp_path, tiny, change, words):
    good, numbers = opened(save(tiny, tmp_path / "x.mz", "solid"))
    (tmp_path / "x.mz").write_bytes(forged(change(good), numbers))
    with pytest.raises(PackError, match=words):
        load(tmp_path / "x.mz")


def test_numbers_too_long_or_strange(tmp_path, tiny):
    good, numbers = opened(save(tiny, tmp_path / "x.mz", "solid"))
    for bad in (
        numbers + bytes(9) + b"1",
        numbers + b"123456",
        numbers * 2,
    ):  # (a byte or two more may name another point of the same interval)
        (tmp_path / "x.mz").write_bytes(forged(good, bad))
        with pytest.raises(PackError, match="left over"):
            load(tmp_path / "x.mz")


def test_bombs(tmp_path):
    path = tmp_path / "x.mz"
    for text in bytes(2**25), b"[" + b"[]," * 2**18 + b"0]", b'{"modelzip":' + b"[" * 10**5:
        zips.seal_solid(f := io.BytesIO(), solid.pack_text(text))
        path.write_bytes(f.getvalue())
        with pytest.raises(PackError):
            load(path)
    zips.seal_solid(f := io.BytesIO(), bytes(2**21))
    path.write_bytes(f.getvalue())
    with pytest.raises(PackError, match="too large"):
        load(path)


# ---- bets that learn ----------------------------------------------------------------------------------------------
@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=400))
def test_bits_in_contexts(pairs):
    encoder = AdaptiveEncoder()
    for context, bit in pairs:
        assert encoder.bit(context, bit) == bit
    decoder = AdaptiveDecoder(encoder.finish())
    assert [decoder.bit(context) for context, _ in pairs] == [bit for _, bit in pairs]
    decoder.finish()


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.integers(0, 1), max_size=60), st.binary(max_size=12), st.integers(0, 2**32))
def test_only_the_encoders_own_data_is_accepted(bits, noise, seed):
    "Whatever else gives bits as well: longer, shorter, another point of the same interval."
    encoder = AdaptiveEncoder()
    for b in bits:
        encoder.bit("c", b)
    true = encoder.finish()
    rng = random.Random(seed)
    near = bytearray(true or b"\0")
    near[rng.randrange(len(near))] ^= 1 << rng.randrange(8)
    for data in true, true + noise, true[:-1], bytes(near), noise, b"abcd":
        decoder = AdaptiveDecoder(data)
        got, again = [decoder.bit("c") for _ in bits], AdaptiveEncoder()
        for b in got:
            again.bit("c", b)
        if again.finish() == data:
            decoder.finish()
        else:
            with pytest.raises(CodingError):
                decoder.finish()


def test_carries():
    "Long runs of the likelier bit, then the unlikely one: the low end runs into the next byte again and again."
    for seed in range(30):
        rng = random.Random(seed)
        bits = [int(rng.random() < rng.choice([0.001, 0.5, 0.999])) for _ in range(3000)]
        encoder = AdaptiveEncoder()
        for i, bit in enumerate(bits):
            encoder.bit(i % 3, bit)
        decoder = AdaptiveDecoder(encoder.finish())
        assert [decoder.bit(i % 3) for i in range(3000)] == bits
        decoder.finish()


@settings(max_examples=examples(60), deadline=None)
@given(
    st.integers(2, 256).flatmap(
        lambda levels: st.tuples(st.just(levels), st.lists(st.integers(0, levels - 1), max_size=60))
    ),
    st.binary(max_size=60),
    st.integers(1, 8),
    st.sampled_from([[], [1], [2], [4, 1], [2, 3], [1, 2, 2]]),  # of a tensor, or of a part of it, beyond the rows
)
def test_codes_and_bytes(case, data, width, beyond):
    levels, codes = case
    rows = len(codes) // math.prod(beyond)
    shape = [rows, *beyond] if beyond else None
    codes = codes[: rows * math.prod(beyond)]
    encoder = AdaptiveEncoder()
    adaptive_codes(encoder, len(codes), levels, "w", codes, shape)
    adaptive_bytes(encoder, len(data), width, "b", data)
    decoder = AdaptiveDecoder(encoder.finish())
    assert (
        adaptive_codes(decoder, len(codes), levels, "w", shape=shape) == codes
        and adaptive_bytes(decoder, len(data), width, "b") == data
    )
    decoder.finish()


@pytest.mark.parametrize("p", [0.02, 0.2, 0.5])
def test_within_the_cost_of_learning(p):
    "Krichevsky and Trofimov's bound: half a logarithm and a bit above the entropy."
    bits = (np.random.default_rng(0).random(250) < p).astype(int)
    encoder = AdaptiveEncoder()
    for bit in bits.tolist():
        encoder.bit("c", bit)
    assert 8 * len(encoder.finish()) <= float(entropy(bits)) * 250 + 0.5 * math.log2(250) + 1 + 8


# ---- the price of bits --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [dict(per_channel=False), dict(), dict(group=5)])
def test_gradient_of_entropy(how):
    """That of the soft counts, against central differences away from the codes themselves; the value is that of the
    codes."""
    torch.manual_seed(0)
    model = prepare(nn.Linear(20, 6), levels=7, activations=None, **how)
    w = model.parametrizations.weight.original
    quantizer = model.parametrizations.weight[0]
    entropy = lambda n: -(n * (n / n.sum()).clamp(min=1e-12).log2()).sum().item()
    entropy_bits(model).backward()
    for i, j in ((0, 0), (3, 7), (5, 19)):
        values = []
        with torch.no_grad():
            for step in (1e-3, -2e-3):
                w[i, j] += step
                values.append(entropy(soft_counts(quantizer, w)))
            w[i, j] += 1e-3
        assert math.isclose((values[0] - values[1]) / 2e-3, w.grad[i, j].item(), rel_tol=0.05, abs_tol=0.5), (i, j)


def test_entropy_of_weights_on_codes():
    "Where all weights lie on codes, the estimate is the true entropy."
    model = prepare(nn.Conv2d(3, 4, 5), levels=15, activations=None, per_channel=False)
    with torch.no_grad():
        model.parametrizations.weight.original.copy_(model.weight)
    codes = model.parametrizations.weight[0].as_qtensor(model.weight).unpack().flatten()
    assert math.isclose(entropy_bits(model).item(), float(entropy(codes)) * codes.numel(), rel_tol=1e-3)
