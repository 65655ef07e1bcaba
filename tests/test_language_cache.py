"""The key-value cache in few bits: what is kept, how large it is, and what a model says through it."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st

from modelzip.data import seeded
from modelzip.language import KeyValueCache, Llama, QuantizedCache, generate, listen
from modelzip.workshop.key_value_cache import Rounded, ThroughCache
from guards import examples

SHAPES = [
    dict(words=40, width=32, layers=2, heads=4, kv_heads=2, hidden=48),  # head 8
    dict(words=40, width=128, layers=2, heads=2, kv_heads=1, hidden=32),  # head 64: two ranges a token
    dict(words=40, width=36, layers=1, heads=3, kv_heads=3, hidden=32, tied=False),  # head 12
]


def tiny(shape=0):
    with seeded(0):
        model = Llama(**SHAPES[shape]).eval()
        for p in model.parameters():
            p.data.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1))
    return model


def texts(n, length, seed=0):
    return torch.randint(0, 40, (n, length), generator=torch.Generator().manual_seed(seed))


def some(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def held(cache):
    return [t for *both, k, v in cache.kept.values() for t in (*(t for r in both if r for t in r.tensors()), k, v)]


@pytest.mark.hypothesis
@given(
    cuts=st.lists(st.integers(0, 50), max_size=8),
    bits=st.sampled_from([8, 4, 2, 1]),
    group=st.sampled_from([8, 16, 32]),
    recent=st.sampled_from([0, 1, 8, 33]),
    n=st.integers(1, 3),
    head=st.sampled_from([2, 12, 32, 64]),
)
@settings(max_examples=examples(25), deadline=None)
def test_what_is_kept_depends_on_the_tokens_alone(cuts, bits, group, recent, n, head):
    total = sum(cuts)
    keys, values = some(n, 2, total, head)
    one, other = QuantizedCache(bits, group, recent), QuantizedCache(bits, group, recent)
    for k, v in zip(keys.split([0, *cuts], 2), values.split([0, *cuts], 2)):
        was = one.length
        found = one.update(0, k, v)
        assert [list(t.shape) for t in found] == [[n, 2, was + k.shape[2], head]] * 2
        assert torch.equal(found[0][:, :, was:], k) and torch.equal(found[1][:, :, was:], v)
    for i in range(total):
        other.update(0, keys[:, :, i : i + 1], values[:, :, i : i + 1])
    if total:
        assert all(torch.equal(a, b) for a, b in zip(held(one), held(other), strict=True))
    assert one.length == other.length == total
    # sizes and errors, by hand
    groups = max(0, total - recent) // group
    chunks = head // group if head % group == 0 else 1
    codes, ranges = 2 * groups * group * head * bits // 8, groups * (head + group * chunks) * 2 * 2
    assert one.nbytes == n * 2 * (codes + ranges + 2 * (total - groups * group) * head * 4)
    assert one.nbytes == sum(t.untyped_storage().nbytes() for t in held(one))
    old = groups * group
    for name, now, x in zip(("keys", "values"), one.update(0, keys[:, :, :0], values[:, :, :0]), (keys, values)):
        assert torch.equal(now[:, :, old:], x[:, :, old:]), name
        off = (now - x)[:, :, :old].abs()
        assert not old or off.max() <= (x.max() - x.min()) / (2**bits - 1) / 2 + x.abs().max() * 2.0**-9, name


def test_a_channel_that_is_large_costs_the_others_nothing():
    keys, values = some(1, 1, 64, 16)
    keys[..., 3] += 1000
    cache = QuantizedCache(4, 32, 0)
    cache.update(0, keys, values)
    off = (cache.update(0, keys[:, :, :0], values[:, :, :0])[0] - keys).abs()
    others = [c for c in range(16) if c != 3]
    assert off[..., others].max() < 6 / 15 / 2 * 1.1 and off[..., 3].max() < 1
    wide = Rounded.of(keys.unflatten(2, (-1, 32)).unsqueeze(4), 4, 5).expand()  # by token
    assert (wide.flatten(2, 3).squeeze(3) - keys)[..., others].abs().max() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("shape", range(3))
@pytest.mark.parametrize("bits, most", [(8, 0.02), (4, 0.4)])
def test_a_model_says_nearly_the_same(shape, bits, most):
    model, ids = tiny(shape), texts(2, 90)
    exact = model(ids)
    assert torch.equal(model(ids, QuantizedCache(bits)), exact)  # one piece: rounded for later
    for piece in (1, 7, 32):
        off = (ThroughCache(model, lambda: QuantizedCache(bits, 16, 8), piece)(ids) - exact).norm() / exact.norm()
        assert 0 < off < most
    assert (ThroughCache(model, KeyValueCache, 7)(ids) - exact).abs().max() < 1e-4 * exact.abs().max()


@torch.no_grad()
def test_each_text_of_a_batch_is_as_alone():
    model, ids = tiny(), texts(3, 70)
    through = ThroughCache(model, lambda: QuantizedCache(4, 8, 4), 5)
    together, alone = through(ids), torch.cat([through(i[None]) for i in ids])
    assert (together - alone).norm() < 0.02 * alone.norm()  # sums in another order may round to another code


def test_generate_and_listen_take_it():
    model, cache = tiny(), QuantizedCache(8, 8, 0)
    said = generate(model, texts(1, 40)[0].tolist(), 20, cache=cache)
    assert len(said) == 20 and cache.length == 59
    assert listen(ThroughCache(model, QuantizedCache, 16), [t for t in texts(2, 80)]).tokens.tolist() == [79, 79]


@pytest.mark.hypothesis
@given(total=st.integers(0, 90), share=st.floats(0, 1), recent=st.sampled_from([0, 5, 32]))
@settings(max_examples=examples(20), deadline=None)
def test_truncated_it_has_the_first_tokens(total, share, recent):
    keys, values = some(2, 2, total, 16)
    cache, length = QuantizedCache(4, 16, recent), int(share * total)
    cache.update(0, keys, values)
    nothing = keys[:, :, :0]
    before = cache.update(0, nothing, nothing)
    cache.truncate(length)
    assert cache.length == length
    assert all(torch.equal(a, b[:, :, :length]) for a, b in zip(cache.update(0, nothing, nothing), before))
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in held(cache))
    more = cache.update(0, keys, values)
    assert more[0].shape[2] == length + total and torch.equal(more[0][:, :, length:], keys)


def test_nothing_is_shared_with_the_caller():
    keys, values = some(1, 2, 40, 8)
    cache = QuantizedCache()
    found = cache.update(0, keys, values)
    twin, before = copy.deepcopy(cache), [t.clone() for t in held(cache)]
    for t in (keys, values, *found):
        t.zero_()
    twin.update(0, keys, values)
    assert all(torch.equal(a, b) for a, b in zip(held(cache), before)) and cache.length == 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype):
    keys, values = some(1, 2, 80, 8).to(dtype)
    cache = QuantizedCache(8, 32, 16)
    cache.update(3, keys, values)
    k, v = cache.update(3, keys[:, :, :0], values[:, :, :0])
    assert k.dtype == v.dtype == dtype and 0 < (k - keys).abs().max() < 0.05
    assert cache.length == 80


def test_ranges_of_no_width():
    for value in (0.0, 2.5001, -1e-7, 60_000.0):
        keys = torch.full((1, 1, 32, 8), value)
        cache = QuantizedCache(2, 32, 0)
        cache.update(0, keys, keys)
        for now in cache.update(0, keys[:, :, :0], keys[:, :, :0]):
            assert (now - value).abs().max() <= abs(value) * 2.0**-11 + 2.0**-25


REFUSED = {
    "bits is 5": lambda c, k: QuantizedCache(5),
    "group is 12": lambda c, k: QuantizedCache(4, 12),
    "recent is -1": lambda c, k: QuantizedCache(4, 32, -1),
    "keys of layer 1 have shape": lambda c, k: c.update(1, k[0], k[0]),
    "values of layer 1 have shape": lambda c, k: c.update(1, k, k[:, :, :3]),
    "keys of layer 0 have n × heads × head 1 × 2 × 8": lambda c, k: c.update(0, k[:1], k[:1]),
    "values of layer 0 have n × heads × head 2 × 2 × 4": lambda c, k: c.update(0, k, k[..., :4]),
    "torch.float64 on cpu": lambda c, k: c.update(0, k.double(), k.double()),
    "values of layer 0 hold NaN": lambda c, k: c.update(0, k, k.log()),
    "keys of layer 2 hold NaN, or numbers that float16 cannot": lambda c, k: c.update(2, k * 1e6, k),
    "length is 41": lambda c, k: c.truncate(41),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(message):
    keys, values = some(2, 2, 40, 8)
    cache = QuantizedCache(4, 8, 0)
    cache.update(0, keys, values)
    before = [t.clone() for t in held(cache)]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        REFUSED[message](cache, keys)
    assert all(torch.equal(a, b) for a, b in zip(held(cache), before, strict=True))


def test_other_things_than_floats_are_refused():
    keys, _ = some(1, 1, 4, 8)
    cache = QuantizedCache()
    with pytest.raises(TypeError, match="keys of layer 0 are torch.int64"):
        cache.update(0, keys.long(), keys)
    with pytest.raises(TypeError, match="values of layer 0 are list"):
        cache.update(0, keys, keys.tolist())
    with pytest.raises(RuntimeError, match="want a gradient"):
        cache.update(0, keys.requires_grad_(), keys)
    assert cache.length == 0 and not cache.kept
