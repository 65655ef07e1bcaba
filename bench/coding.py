"""MiniLM's codes as streams: bits a weight against the entropy and against zstd -19, xz and ANS alone; decoding in
the same run."""

import json, lzma, os, statistics, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import constriction
import numpy as np
import torch
import zstandard

from modelzip.coding import coders, decode, decoding, encode, entropy
from modelzip.data import minilm
from modelzip.quant import quantize

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "8 bits": dict(bits=8, axis=0),
    "6 bits": dict(bits=6, axis=0),
    "4 bits, group 32": dict(bits=4, group=32),
    "3 bits, group 32": dict(bits=3, group=32),
    "ternary, group 32": dict(levels=3, group=32, observer="mse"),
}


def pruned(w):
    "Nine weights of ten become zero."
    return w * (w.abs() > w.abs().flatten().kthvalue(int(0.9 * w.numel())).values)


def quantized():
    "Every way of quantizing, for all matrices of MiniLM."
    weights = [p.detach() for p in minilm().parameters() if p.dim() == 2]
    for name, how in WAYS.items():
        yield name, [quantize(w, **how) for w in weights]
    yield "4 bits, 90 % zero", [quantize(pruned(w), 4, group=32) for w in weights]


def interleaved(candidates, rounds=5):
    "Seconds of each, measured in turns: median and quartiles."
    times = {name: [] for name in candidates}
    for r in range(rounds + 1):
        for name, f in candidates.items():
            began = time.perf_counter()
            f()
            if r:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.quantiles(t, n=4) for name, t in times.items()}


def ans(q):
    "ANS alone (constriction), the counts of one matrix as its model; the model's own cost is left out."
    codes = q.unpack().numpy().reshape(-1)
    used, ranks = np.unique(codes, return_inverse=True)
    p = np.bincount(ranks).astype(float)
    if len(used) < 2:
        return np.zeros(0, np.uint32), None, len(codes)
    model = constriction.stream.model.Categorical(p / p.sum(), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(ranks.astype(np.int32), model)
    return coder.get_compressed(), model, len(codes)


def speeds(qs, streams, packed, words, n):
    "Million weights a second."
    outs = [np.empty(len(q.codes), np.uint8) for q in qs]

    def ours(threads):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda job: job(), [j for s, o in zip(streams, outs) for j in decoding(s, o)]))

    expand = zstandard.ZstdDecompressor()
    ways = {
        "ours, 1 thread": lambda: ours(1),
        "ours, 2 threads": lambda: ours(2),
        "zstd -19": lambda: [expand.decompress(z) for z in packed],
        "ANS": lambda: [constriction.stream.stack.AnsCoder(w).decode(m, k) for w, m, k in words if m is not None],
    }
    return {name: [n / s / 1e6 for s in q] for name, q in interleaved(ways).items()}


def row(name, qs):
    n = sum(q.numel() for q in qs)
    streams = [encode(q.codes, q.bits, q.numel(), q.levels) for q in qs]
    for q, s in zip(qs, streams):
        assert np.array_equal(decode(s), q.codes.numpy())
    packed, words = (
        [zstandard.ZstdCompressor(level=19).compress(q.codes.numpy().tobytes()) for q in qs],
        [ans(q) for q in qs],
    )
    bits = {
        "stored": 8 * sum(q.codes.nbytes for q in qs) / n,
        "entropy": sum(float(entropy(q.unpack())) * q.numel() for q in qs) / n,
        "ours": 8 * sum(map(len, streams)) / n,
        "zstd -19": 8 * sum(map(len, packed)) / n,
        "xz": 8 * sum(len(lzma.compress(q.codes.numpy().tobytes())) for q in qs) / n,
        "ANS": 8 * sum(w.nbytes for w, _, _ in words) / n,
    }
    methods = {}
    for s in streams:
        for m, b in coders(s).items():
            methods[m] = methods.get(m, 0) + b
    return {
        "bits": bits,
        "worst stream of 10,000 codes or more, over its entropy": worst(qs, streams),
        "methods": methods,
        "speed": speeds(qs, streams, packed, words, n),
    }


def worst(qs, streams):
    return max(
        8 * len(s) / (float(entropy(q.unpack())) * q.numel()) - 1 for q, s in zip(qs, streams) if q.numel() >= 10_000
    )


def main():
    table = {name: row(name, qs) for name, qs in quantized()}
    print(
        f"{'bits a weight':20}"
        + "".join(f"{k:>10}" for k in ("stored", "entropy", "ours", "over", "worst", "zstd -19", "xz", "ANS"))
    )
    for name, r in table.items():
        b = r["bits"]
        over = b["ours"] / b["entropy"] - 1
        worst_one = r["worst stream of 10,000 codes or more, over its entropy"]
        print(
            f"{name:20}{b['stored']:10.3f}{b['entropy']:10.4f}{b['ours']:10.4f}{over:+10.2%}{worst_one:+10.2%}{b['zstd -19']:10.4f}{b['xz']:10.4f}{b['ANS']:10.4f}"
        )
    print(
        f"\n{'M weights/s':20}" + "".join(f"{k:>26}" for k in ("ours, 1 thread", "ours, 2 threads", "zstd -19", "ANS"))
    )
    for name, r in table.items():
        print(
            f"{name:20}" + "".join(f"{m:12,.0f} ({hi:,.0f}-{lo:,.0f})".rjust(26) for lo, m, hi in r["speed"].values())
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coding.json").write_text(
        json.dumps(
            {
                "processors": os.cpu_count(),
                "torch": torch.__version__,
                "zstandard": zstandard.__version__,
                "table": table,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
