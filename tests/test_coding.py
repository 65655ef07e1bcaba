"The coders of chapters 04 and 04b: exact inverses, equal to independent references, and safe against damaged data."

import itertools, math, random, time, tracemalloc, zlib
from collections import Counter

import constriction
import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings, strategies as st

from modelzip.coding import (
    CODERS,
    Coder,
    CodingError,
    bits_to_bytes,
    borders,
    bytes_to_bits,
    canonical_codes,
    divergence,
    entropy,
    find_gaps,
    huffman_lengths,
    lz77_parse,
    lz77_replay,
    lz78_parse,
    lzw_parse,
    quantize_counts,
    range_decode,
    range_encode,
    rans_decode,
    rans_encode,
    rans_pop,
    rans_push,
    read_varint,
    read_words,
    rice_bits,
    rice_word,
    runs,
    write_varint,
)
from guards import FUZZ, examples, seeded

TEXT = zlib.__doc__.encode() + b" ".join(str(f.__doc__).encode() for f in vars(math).values())
each = pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS)
quick = settings(max_examples=examples(30), deadline=None)


def weights(n, seed=0, levels=16):
    "Codes with the histogram of quantized weights."
    return (
        np.random.default_rng(seed)
        .normal(levels / 2, levels / 5, n)
        .round()
        .clip(0, levels - 1)
        .astype(np.uint8)
        .tobytes()
    )


def sparse(n, p=0.1, seed=0):
    return (np.random.default_rng(seed).random(n) < p).astype(np.uint8).tobytes()


SAMPLES = {
    "nothing": b"",
    "a byte": b"x",
    "equal": b"z" * 300,
    "two": b"ab" * 40,
    "text": TEXT[:400],
    "weights": weights(300),
    "sparse": sparse(600),
    "ascending": bytes(range(256)),
    "random": random.Random(1).randbytes(200),
}


def test_every_method_is_there():
    assert set(CODERS) == {"huffman", "lz77", "lz78", "lzw", "run_length", "gaps", "golomb_rice", "arithmetic", "rans"}
    assert all(isinstance(c, Coder) and c.name == name for name, c in CODERS.items())


# ---- exact inverses


@each
@pytest.mark.parametrize("data", SAMPLES.values(), ids=SAMPLES)
def test_inverse(coder, data):
    assert coder.decode(coder.encode(data)) == data


KINDS = ["random", "equal", "text", "weights", "sparse", "nearly equal", "sorted", "period"]


@pytest.mark.hypothesis  # so that a search comes here: every coder with every kind
@pytest.mark.parametrize(
    "name, kind", [(c, k) for i, c in enumerate(CODERS) for j, k in enumerate(KINDS) if FUZZ or (i + j) % 4 == 0]
)
def test_inverse_of_64_KiB(name, kind):
    coder, n = CODERS[name], 1 << 16
    data = {
        "random": random.Random(2).randbytes(n),
        "equal": bytes(n),
        "text": (TEXT * 20)[:n],
        "weights": weights(n),
        "sparse": sparse(n),
        "nearly equal": bytes(n - 1) + b"\1",
        "sorted": bytes(sorted(random.Random(3).randbytes(n))),
        "period": (b"abcab" * n)[:n],
    }[kind]
    assert coder.decode(coder.encode(data)) == data


@each
@quick
@given(data=st.binary(max_size=1500))
def test_inverse_of_any_bytes(coder, data):
    assert coder.decode(coder.encode(data)) == data


@each
@quick
@given(data=st.lists(st.tuples(st.sampled_from([0, 0, 1, 7, 255]), st.integers(1, 400)), max_size=30))
def test_inverse_of_runs(coder, data):
    data = b"".join(bytes([v]) * n for v, n in data)
    assert coder.decode(coder.encode(data)) == data


@each
@quick
@given(data=st.text(max_size=200))
def test_inverse_of_text(coder, data):
    assert coder.decode(coder.encode(data)).decode() == data


@each
def test_what_may_come_in(coder):
    codes = torch.arange(60, dtype=torch.uint8).reshape(6, 10)
    for data in codes, codes.T, codes.numpy(), codes.numpy()[::-2], codes > 7, codes.numpy() > 7:
        assert coder.decode(coder.encode(data)) == np.ascontiguousarray(np.asarray(data)).tobytes()
    for data in bytearray(b"abc"), memoryview(b"abc"), "abc":
        assert coder.decode(coder.encode(data)) == b"abc"
    for form in bytearray, memoryview, lambda d: np.frombuffer(d, np.uint8):
        assert coder.decode(form(coder.encode(b"abc"))) == b"abc"
    for bad in 3, None, [1, 2], torch.zeros(3), np.zeros(3), object():
        with pytest.raises(TypeError, match="data is a"):
            coder.encode(bad)
        with pytest.raises(TypeError, match="data is a"):
            coder.decode(bad)
    with pytest.raises(TypeError, match="data is a str"):
        coder.decode("abc")


@each
def test_input_is_left_alone(coder):
    codes = torch.tensor([3, 1, 2, 2, 2, 2, 2], dtype=torch.uint8)
    before = codes.clone()
    coder.encode(codes)
    assert torch.equal(codes, before)


# ---- damaged data


def framed(n, body):
    "A body behind a header that is in order, as somebody would write it who wants to deceive."
    head = write_varint(n)
    return head + zlib.crc32(head + body).to_bytes(4, "little") + body


@each
@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation(coder, name):
    data = SAMPLES[name]
    coded = coder.encode(data)
    for n in range(len(coded)):
        with pytest.raises(CodingError):
            coder.decode(coded[:n])


@each
@pytest.mark.parametrize("name", ["a byte", "equal", "two", "weights", "sparse"])
def test_every_bit(coder, name):
    data = SAMPLES[name]
    coded = bytearray(coder.encode(data))
    for i in range(min(8 * len(coded), 1500)):
        coded[i // 8] ^= 1 << i % 8
        with pytest.raises(CodingError):
            coder.decode(bytes(coded))
        coded[i // 8] ^= 1 << i % 8


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
@each
def test_random_damage(coder):
    rng = seeded(4)
    for data in TEXT[:1000], weights(2000), sparse(3000), bytes(5000):
        coded = coder.encode(data)
        for _ in range(examples(20)):
            bad = bytearray(coded)
            for _ in range(rng.choice([1, 1, 2, 5])):
                what = rng.randrange(5)
                i = (
                    rng.randrange(len(bad)) if rng.random() < 0.5 else rng.randrange(min(len(bad), 24))
                )  # often in the header
                if what == 0:
                    bad[i] = rng.randrange(256)
                elif what == 1:
                    bad[i] ^= 1 << rng.randrange(8)
                elif what == 2:
                    del bad[i : i + rng.randrange(1, 9)]
                elif what == 3:
                    bad[i:i] = rng.randbytes(rng.randrange(1, 9))
                else:
                    bad[i : i + 4] = b"\xff" * 4
                if not bad:
                    bad += b"\0"
            if bad != coded:
                with pytest.raises(CodingError):
                    coder.decode(bytes(bad))
            body = bytes(bad[6:])
            if not body:
                continue
            try:
                assert len(coder.decode(framed(min(len(data), coder.at_most * len(body)), body))) == len(data)
            except CodingError as e:
                assert str(e)


@each
@quick
@given(data=st.binary(max_size=300))
def test_garbage(coder, data):
    try:
        assert isinstance(coder.decode(data), bytes)
    except CodingError:
        pass


@each
@quick
@given(body=st.binary(min_size=1, max_size=200), n=st.integers(1, 3000))
def test_garbage_behind_a_possible_header(coder, body, n):
    n = min(n, coder.at_most * len(body))
    try:
        assert len(coder.decode(framed(n, body))) == n
    except CodingError:
        pass


@each
@pytest.mark.parametrize(
    "body", [b"", b"\0" * 30, b"\xff" * 30, random.Random(5).randbytes(500)], ids=["none", "zeros", "ones", "random"]
)
def test_a_claim_takes_neither_time_nor_memory(coder, body):
    tracemalloc.start()
    began = time.perf_counter()
    for claim in 2**60, 2**40, coder.at_most * len(body):
        if claim:
            with pytest.raises(CodingError):
                coder.decode(framed(claim, body))
    assert time.perf_counter() - began < 10  # generous: it takes a fraction of a second
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@each
def test_the_densest_honest_data_keeps_its_own_limit(coder):
    for n in 1, 100, 10_000, 300_000:
        assert coder.decode(coder.encode(bytes(n))) == bytes(n)


# ---- varints and bits


@quick
@given(n=st.integers(0, 2**63 - 1), before=st.binary(max_size=5), after=st.binary(max_size=5))
def test_varint(n, before, after):
    coded = write_varint(n)
    assert read_varint(before + coded + after, len(before)) == (n, len(before) + len(coded))
    assert len(coded) == max(1, -(-n.bit_length() // 7))
    for cut in range(len(coded)):
        with pytest.raises(CodingError, match="cut off"):
            read_varint(coded[:cut], 0)


def test_varint_takes_one_form_only():
    for bad in b"\x80\x00", b"\x81\x80\x00", b"\xff" * 9 + b"\x01":
        pytest.raises(CodingError, read_varint, bad, 0)
    with pytest.raises(ValueError, match="n is -3"):
        write_varint(-3)


@quick
@given(bits=st.text("01", max_size=300))
def test_bits(bits):
    data = bits_to_bytes(bits)
    assert len(data) == -(-len(bits) // 8)
    assert bytes_to_bits(data).startswith(bits) and "1" not in bytes_to_bits(data)[len(bits) :]
    if bits:
        assert data == np.packbits([int(b) for b in bits]).tobytes()


# ---- entropy


@quick
@given(x=st.lists(st.integers(-5, 300), min_size=1, max_size=200))
def test_entropy_is_scipys(x):
    expected = scipy.stats.entropy(list(Counter(x).values()), base=2)
    assert entropy(x) == pytest.approx(expected, abs=1e-12)
    assert entropy(torch.tensor(x)) == pytest.approx(expected, abs=1e-12)
    assert entropy(torch.tensor(x).short()) == pytest.approx(expected, abs=1e-12)


@quick
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=100), wide=st.booleans())
def test_conditional_entropy_by_hand(pairs, wide):
    x, y = (np.array(v, dtype=np.int64 if wide else np.uint8) for v in zip(*pairs))
    by_hand = sum((y == v).mean() * scipy.stats.entropy(np.bincount(x[y == v]), base=2) for v in set(y.tolist()))
    assert entropy(x, given=y) == pytest.approx(by_hand, abs=1e-9)
    assert 0 <= entropy(x, given=y) <= entropy(x) + 1e-9
    assert entropy(x, given=x) == pytest.approx(0, abs=1e-9)


def test_entropy_along_an_axis():
    x = torch.randint(0, 7, (4, 5, 60), generator=torch.manual_seed(0), dtype=torch.uint8)
    for axis in (0, 1, 2, -1):
        each = entropy(x, axis=axis)
        assert each.shape == (x.shape[axis],) and each.dtype == torch.float64
        for i in range(x.shape[axis]):
            assert each[i] == pytest.approx(entropy(x.select(axis, i)))
    given_ = x.roll(1, 2)
    assert entropy(x, given=given_, axis=1)[3] == pytest.approx(entropy(x[:, 3], given=given_[:, 3]))


def test_entropy_of_many_types():
    texts = "abab", b"abab", bytearray(b"abab"), memoryview(b"abab"), [0, 1, 0, 1], (5, 9, 5, 9)
    tensors = (
        torch.tensor([True, False]),
        torch.tensor([1, 2], dtype=torch.int8),
        torch.tensor([1, 2], dtype=torch.uint16),
    )
    arrays = (
        np.array([1, 2], np.uint16),
        np.array([[1], [2]], ">i4"),
        np.array([2**62, -(2**62)]),
        np.array([0, 2**64 - 1], np.uint64),
    )
    for x in texts + tensors + arrays:
        assert entropy(x) == 1
    for x in b"", "", torch.zeros(0, dtype=torch.uint8), np.array([], np.int64), 7, [3, 3, 3]:
        assert entropy(x) == 0
    for bad in torch.randn(3), np.zeros(3), [0.5], torch.zeros(2, dtype=torch.complex64), ["a"], None:
        with pytest.raises(TypeError, match="x holds"):
            entropy(bad)
    with pytest.raises(TypeError, match="given holds"):
        entropy([1, 2], given=[0.1, 0.2])
    with pytest.raises(ValueError, match="given has shape"):
        entropy([1, 2], given=[1, 2, 3])
    for axis in 1, -2, "0", True, 1.0:
        with pytest.raises(ValueError, match="axis is"):
            entropy([1, 2], axis=axis)


@quick
@given(
    counts=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=20).filter(
        lambda c: sum(a for a, _ in c)
    )
)
def test_divergence_is_scipys(counts):
    p, q = zip(*counts)
    assert divergence(p, q) == pytest.approx(scipy.stats.entropy(p, q, base=2), abs=1e-9)


@pytest.mark.parametrize(
    "counts, model", [([1, 1], [0, 0]), ([0, 0], [1, 1]), ([1, -1], [1, 1]), ([1, 1], [math.nan, 1])]
)
def test_divergence_wants_shares(counts, model):
    with pytest.raises(ValueError, match="below 0, or adds up to nothing"):
        divergence(counts, model)


def test_what_no_coder_writes_is_refused():
    from modelzip.coding import AdaptiveEncoder
    from modelzip.symbols import decode_huffman, lz78_parse

    with pytest.raises(ValueError, match="bit is 2"):
        AdaptiveEncoder().bit("c", 2)
    for length in 2, 7:  # a symbol that is alone has one bit
        with pytest.raises(CodingError):
            decode_huffman(bytes([0, 97, length]) + bytes(9), 8)
    assert lz78_parse(b"aaaa", phrases=1) == [(0, 97)] * 4  # a list that starts afresh each time


# ---- Huffman


def two_queues(counts):
    """Cost of an optimal prefix code without a heap: leaves in order, and merged nodes, which come in order by
    themselves."""
    leaves, merged, cost = sorted(counts), [], 0
    if len(leaves) == 1:
        return leaves[0]
    for _ in range(len(counts) - 1):
        two = [(leaves if leaves and (not merged or leaves[0] <= merged[0]) else merged).pop(0) for _ in range(2)]
        merged.append(sum(two))
        cost += merged[-1]
    return cost


@quick
@given(
    counts=st.dictionaries(st.integers(0, 255), st.integers(0, 10_000), min_size=1, max_size=60).filter(
        lambda c: any(c.values())
    )
)
def test_huffman_is_optimal(counts):
    lengths = huffman_lengths(counts)
    seen = {s: n for s, n in counts.items() if n}
    assert set(lengths) == set(seen)
    cost = sum(n * lengths[s] for s, n in seen.items())
    assert cost == two_queues(list(seen.values()))
    if len(seen) > 1:
        assert sum(2.0**-l for l in lengths.values()) == 1
        H = scipy.stats.entropy(list(seen.values()), base=2)
        assert H - 1e-9 <= cost / sum(seen.values()) < H + 1


def test_huffman_costs_what_constrictions_does():
    for data in TEXT[:3000], weights(3000), sparse(3000):
        symbols, n = np.unique(list(data), return_counts=True)
        tree, coder = (
            constriction.symbol.huffman.EncoderHuffmanTree(n.astype(np.float64)),
            constriction.symbol.QueueEncoder(),
        )
        for s in np.searchsorted(symbols, list(data)):
            coder.encode_symbol(int(s), tree)
        lengths = huffman_lengths(Counter(data))
        assert sum(lengths[b] for b in data) == coder.get_compressed()[1]


def test_huffman_on_the_deepest_tree():
    fibonacci = [1, 1]
    while len(fibonacci) < 80:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman_lengths(dict(enumerate(fibonacci)))
    assert max(lengths.values()) == 79
    words = canonical_codes(lengths)
    assert read_words(words[0] + words[79] + words[5], words, 3) == [0, 79, 5]


@quick
@given(counts=st.dictionaries(st.integers(0, 255), st.integers(1, 1000), min_size=2, max_size=40))
def test_canonical_words(counts):
    lengths = huffman_lengths(counts)
    words = canonical_codes(lengths)
    assert {s: len(w) for s, w in words.items()} == lengths
    ordered = sorted(words.values())
    assert not any(b.startswith(a) for a, b in zip(ordered, ordered[1:]))  # no word begins another
    assert [words[s] for s in sorted(words, key=lambda s: (lengths[s], s))] == ordered  # they ascend
    message = list(counts) * 3
    assert read_words("".join(words[s] for s in message), words, len(message)) == message


def test_lengths_over_budget():
    for lengths in ({0: 1, 1: 1, 2: 1}, {0: 1, 1: 2, 2: 2, 3: 5}, {i: 7 for i in range(129)}):
        with pytest.raises(ValueError, match="Kraft"):
            canonical_codes(lengths)


# ---- sparse data


@quick
@given(data=st.binary(min_size=1, max_size=300))
def test_gaps_and_runs_say_it_all(data):
    background, gaps, values = find_gaps(data)
    assert len(gaps) == len(values) + 1
    back = b"".join(bytes([background]) * g + values[i : i + 1] for i, g in enumerate(gaps))
    assert back == data and background not in values
    assert b"".join(bytes([v]) * n for v, n in runs(data)) == data
    assert all(a[0] != b[0] for a, b in itertools.pairwise(runs(data)))


@quick
@given(numbers=st.lists(st.integers(0, 500), min_size=1, max_size=40), k=st.integers(0, 10))
def test_rice_words(numbers, k):
    bits, out, at = "".join(rice_word(n, k) for n in numbers), [], 0
    assert len(bits) == rice_bits(numbers, k)
    for _ in numbers:
        ones = bits.index("0", at) - at
        out.append(ones << k | int("0" + bits[at + ones + 1 : at + ones + 1 + k], 2))
        at += ones + 1 + k
    assert out == numbers and at == len(bits)


def test_rice_is_near_the_entropy_of_a_coin():
    for p in 0.01, 0.03, 0.1, 0.2:
        mask = sparse(60_000, p)
        bits = 8 * len(CODERS["golomb_rice"].encode(mask)) / len(mask)
        assert entropy(mask) < bits < 1.05 * entropy(mask)


def test_run_length_is_packbits():
    "Apple's example of TN1023, unpacked by its published rules."
    packed = bytes.fromhex("FE AA 02 80 00 2A FD AA 03 80 00 2A 22 F7 AA")
    data = bytes.fromhex("AA AA AA 80 00 2A AA AA AA AA 80 00 2A 22 AA AA AA AA AA AA AA AA AA AA")
    ours = CODERS["run_length"].encode_body(data)
    assert len(ours) == len(packed)
    assert [(c if c < 128 else 126 - c + 1) % 256 for c in (ours[0], ours[2], ours[6], ours[8], ours[13])] == [
        packed[i] for i in (0, 2, 6, 8, 13)
    ]


def test_incompressible_data_grows_little():
    data = random.Random(6).randbytes(20_000)
    assert len(CODERS["run_length"].encode(data)) < 1.01 * len(data) + 20
    for name in "huffman", "arithmetic", "rans":
        assert len(CODERS[name].encode(data)) < len(data) + 900
    assert len(CODERS["lz77"].encode(data)) <= 1.13 * len(data) + 20


# ---- Lempel and Ziv


def naive_matches(data, i):
    "The longest earlier copy of what begins at i, by looking everywhere."
    best = 0
    for j in range(i):
        n = 0
        while i + n < len(data) and data[j + n] == data[i + n]:
            n += 1
        best = max(best, n)
    return best


@quick
@given(data=st.lists(st.integers(0, 2), max_size=120).map(bytes))
def test_lz77_takes_the_longest_match(data):
    tokens, at = lz77_parse(data, patience=1000), 0
    assert lz77_replay(tokens) == data
    for t in tokens:
        longest = naive_matches(data, at)
        assert t[0] == min(longest, 259) if isinstance(t, tuple) else longest < 4
        at += t[0] if isinstance(t, tuple) else 1


def test_lz77_keeps_to_its_window():
    data = random.Random(7).randbytes(50)
    far = data + bytes(range(256)) * 3 + data
    assert all(t[1] <= 100 for t in lz77_parse(far, window=100) if isinstance(t, tuple))
    assert any(t[1] > 700 for t in lz77_parse(far, window=1000) if isinstance(t, tuple))
    for bad in [(3, 1)], [65, (3, 2)], [65, (3, 0)]:
        with pytest.raises(CodingError, match="points"):
            lz77_replay(bad)


def naive_lz78(data):
    phrases, now, out = [b""], b"", []
    for i in range(len(data)):
        now += data[i : i + 1]
        if now not in phrases:
            out.append((phrases.index(now[:-1]), now[-1]))
            phrases.append(now)
            now = b""
    return out + ([(phrases.index(now), None)] if now else [])


def naive_lzw(data):
    phrases, now, out = [bytes([i]) for i in range(256)], b"", []
    for i in range(len(data)):
        if now + data[i : i + 1] in phrases:
            now += data[i : i + 1]
        else:
            out.append(phrases.index(now))
            phrases.append(now + data[i : i + 1])
            now = data[i : i + 1]
    return out + ([phrases.index(now)] if now else [])


@quick
@given(data=st.lists(st.integers(0, 2), max_size=200).map(bytes))
def test_lz78_and_lzw_by_their_definition(data):
    assert lz78_parse(data) == naive_lz78(data)
    assert lzw_parse(data) == naive_lzw(data)


@quick
@given(data=st.lists(st.integers(0, 3), max_size=300).map(bytes), phrases=st.integers(2, 40))
def test_full_lists_start_afresh(data, phrases):
    for name, least in ("lz78", 0), ("lzw", 255):
        coder = CODERS[name]
        body = coder.encode_body(data, phrases + least)
        assert bytes(coder.decode_body(body, len(data), phrases + least)) == data


def test_text_has_order_and_weights_have_none():
    text, codes = (TEXT * 3)[:20_000], weights(20_000)
    assert 8 * len(CODERS["lz77"].encode(text)) / len(text) < entropy(text)
    assert 8 * len(CODERS["lz77"].encode(codes)) / len(codes) > entropy(codes)


# ---- shares, arithmetic coding


@quick
@given(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=4).filter(any), bits=st.integers(2, 4))
def test_quantized_counts_are_the_best(counts, bits):
    f, total = quantize_counts(counts, bits), 1 << bits
    assert f.sum() == total and all((a > 0) == (n > 0) for a, n in zip(f, counts))
    used = [n for n in counts if n]
    cost = lambda f: sum(n * math.log2(total / a) for n, a in zip(used, f))
    best = min(cost(g) for g in itertools.product(range(1, total + 1), repeat=len(used)) if sum(g) == total)
    assert cost([int(a) for a in f if a]) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "counts, bits, want", [([22, 5], 3, [6, 2]), ([39, 66], 2, [2, 2]), ([44, 45, 381], 4, [2, 2, 12])]
)
def test_quantized_counts_where_rounding_misleads(counts, bits, want):
    "The nearest whole shares are not the cheapest."
    assert quantize_counts(counts, bits).tolist() == want


@quick
@given(counts=st.lists(st.integers(0, 10**6), min_size=2, max_size=80).filter(any), bits=st.integers(7, 16))
def test_no_share_is_better_somewhere_else(counts, bits):
    """The last share of each symbol saves at least what one more would save elsewhere: so the greedy choice, which
    is the best, ends."""
    f = quantize_counts(counts, bits)
    n = np.array(counts, dtype=np.float64)
    used = n > 0
    assert f.sum() == 1 << bits and ((f > 0) == used).all()
    more, last = (
        n[used] * np.log1p(1 / f[used]),
        np.where(f[used] > 1, n[used] * np.log1p(1 / np.maximum(f[used] - 1, 1)), np.inf),
    )
    assert more.max() <= last.min() * (1 + 1e-9)


def test_quantized_counts_of_many_rare_symbols():
    f = quantize_counts([10**9] + [1] * 255, 12)
    assert f.sum() == 4096 and f.min() == 1 and f[0] == 4096 - 255
    for bad in [], [0, 0], [-1, 3], [[1]], [float("nan")]:
        with pytest.raises(ValueError, match="counts"):
            quantize_counts(bad)
    with pytest.raises(ValueError, match="17 symbols"):
        quantize_counts([1] * 17, 4)


shares = st.lists(st.integers(0, 4000), min_size=2, max_size=30).filter(lambda c: sum(n > 0 for n in c) > 1)


@quick
@given(counts=shares, data=st.data())
def test_range_coder(counts, data):
    c = borders(quantize_counts(counts))
    used = [i for i, n in enumerate(counts) if n]
    message = data.draw(st.lists(st.sampled_from(used), max_size=300))
    coded = range_encode(message, c)
    assert range_decode(coded, len(message), c) == message
    ideal = sum(math.log2(c[-1] / (c[s + 1] - c[s])) for s in message)
    assert 8 * len(coded) <= ideal * 1.001 + 0.001 * len(message) + 16


def test_range_coder_carries():
    "Messages whose interval straddles round numbers: the last symbols of large alphabets push `low` over the edge."
    rng = random.Random(8)
    for c in [0, 4095, 4096], [0, 1, 4096], [0, 1, 4095, 4096], list(range(0, 65537, 256)):
        for _ in range(30):
            message = [rng.randrange(len(c) - 1) if rng.random() < 0.5 else len(c) - 2 for _ in range(200)]
            assert range_decode(range_encode(message, c), 200, c) == message
    for c, bad in ([0, 1, 2], 2), ([0, 1, 1, 2], 1), ([0, 1, 2], -1):
        with pytest.raises(ValueError, match="symbols holds"):
            range_encode([0, bad], c)
    with pytest.raises(ValueError, match="c ends with"):
        range_encode([0], [0, 1 << 17])


# ---- rANS


def slow_rans(message, c, L, b, x):
    digits = []
    for s in reversed(message):
        while x >= b * (L // c[-1]) * (c[s + 1] - c[s]):
            digits.append(x % b)
            x //= b
        x = rans_push(x, s, c)
    return x, digits


@quick
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), x=st.integers(0, 2**70))
def test_push_and_pop(counts, x):
    c = borders(counts)
    s, before = rans_pop(x, c)
    assert rans_push(before, s, c) == x
    for s in range(len(counts)):
        if counts[s]:
            assert rans_pop(rans_push(x, s, c), c) == (s, x)
        else:
            with pytest.raises(ValueError, match=f"s is {s}, which has no share"):
                rans_push(x, s, c)
    for s in -1, len(counts):
        with pytest.raises(ValueError, match=f"s is {s}, which has no share"):
            rans_push(x, s, c)


@pytest.mark.parametrize("c", [[], [0], [0, 0, 0], [2, 8]])
def test_what_are_no_borders_has_no_owner(c):
    with pytest.raises(ValueError, match="borders begin with 0"):
        rans_pop(5, c)


def test_push_goes_to_the_xth_number_that_a_symbol_owns():
    c = borders([5, 2, 1])
    for s in range(3):
        owned = [x for x in range(400) if c[s] <= x % 8 < c[s + 1]]
        assert [rans_push(x, s, c) for x in range(40)] == owned[:40]


@quick
@given(counts=shares, lanes=st.integers(1, 40), bits=st.integers(5, 16), data=st.data())
def test_lanes(counts, lanes, bits, data):
    c = borders(quantize_counts(counts, bits))
    used = [i for i, n in enumerate(counts) if n]
    message = np.array(data.draw(st.lists(st.sampled_from(used), max_size=400)), dtype=np.int64)
    states, digits = rans_encode(message, c, lanes)
    assert states.dtype == np.uint32 and digits.dtype == np.uint16 and len(states) == lanes
    assert np.array_equal(rans_decode(states, digits, len(message), c), message)
    if lanes == 1:
        assert (int(states[0]), digits.tolist()) == slow_rans(message.tolist(), c, 1 << 16, 1 << 16, 1 << 16)


def test_lanes_refuse_nonsense():
    c = borders([2, 0, 2])
    for symbols in [1], [3], [-1]:
        with pytest.raises(ValueError, match="symbols holds"):
            rans_encode(symbols, c)
    with pytest.raises(ValueError, match="lanes is 0"):
        rans_encode([0], c, 0)
    for bad in [0, 3], [0, 1 << 17]:
        with pytest.raises(ValueError, match="c ends with"):
            rans_encode([0], bad)


@quick
@given(counts=st.lists(st.integers(1, 10**6), min_size=2, max_size=60), n=st.integers(0, 300), seed=st.integers(0, 99))
def test_the_same_words_as_constriction(counts, n, seed):
    f = quantize_counts(counts, 24)
    message = np.random.default_rng(seed).choice(len(f), n, p=np.array(counts) / sum(counts)).astype(np.int32)
    model = constriction.stream.model.Categorical((f - 1).astype(np.float32), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(message, model)
    x, words = slow_rans(message.tolist(), borders(f), 1 << 32, 1 << 32, 0)
    while x:
        x, words = x >> 32, words + [x & 0xFFFFFFFF]
    assert coder.get_compressed().tolist() == words
    assert np.array_equal(constriction.stream.stack.AnsCoder(np.array(words, np.uint32)).decode(model, n), message)


@pytest.mark.parametrize(
    "data",
    [weights(50_000), sparse(50_000), weights(50_000, levels=200), (TEXT * 9)[:50_000]],
    ids=["4 bits", "sparse", "8 bits", "text"],
)
def test_rans_and_arithmetic_reach_the_entropy(data):
    symbols = np.frombuffer(data, np.uint8)
    n = np.bincount(symbols)
    bound = entropy(data) * len(data) / 8
    table = 1 + 3 * (n > 0).sum() + 8
    for name in "rans", "arithmetic":
        assert bound < len(CODERS[name].encode(data)) < 1.002 * bound + table + 24
    coder = constriction.stream.stack.AnsCoder()
    rank = np.cumsum(n > 0) - 1
    coder.encode_reverse(
        rank[symbols].astype(np.int32), constriction.stream.model.Categorical(n[n > 0] / n.sum(), perfect=False)
    )
    assert len(CODERS["rans"].encode(data)) < coder.get_compressed().nbytes * 1.002 + table + 24


# ---- speed: bounds so wide that only a wrong complexity breaks them


@pytest.mark.parametrize(
    "data",
    [
        random.Random(9).randbytes(1 << 16),
        bytes(1 << 16),
        weights(1 << 16),
        weights(1 << 16, levels=3),
        (TEXT * 20)[: 1 << 16],
    ],
    ids=["random", "equal", "4 bits", "ternary", "text"],
)
def test_lz77_does_64_KiB(data):
    began = time.process_time()
    lz77_parse(data)
    assert time.process_time() - began < 20
