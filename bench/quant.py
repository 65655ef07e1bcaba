"Speed and memory of quantize and dequantize over MiniLM's weights, against torch and optimum-quanto in the same run."

import json, statistics, time, warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from modelzip.data import minilm
from modelzip.measure import sqnr
from modelzip.quant import quantize

warnings.filterwarnings("ignore")
RESULTS = Path(__file__).parent / "results"


def interleaved(candidates, rounds=9):
    "Median seconds of each, measured in turns so that drift hits all alike."
    times = {name: [] for name in candidates}
    for r in range(rounds + 1):
        for name, f in candidates.items():
            began = time.perf_counter()
            f()
            if r:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}


def peak_bytes(f):
    "Most memory that torch held at once beyond what was there before."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        kept = f()
    now = peak = 0
    for e in sorted(
        (e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def torch_int8(w):
    "What torch's own per-channel quantization takes: the range, then the codes."
    scale = (w.abs().amax(1) / 127).clamp(min=1e-30)
    return torch.quantize_per_channel(w, scale, torch.zeros(len(w), dtype=torch.int32), 0, torch.qint8)


def quanto_int4(w):
    "optimum-quanto's 4-bit weights in groups of 32, asymmetric, packed two to a byte."
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    scale, shift = MaxOptimizer()(w, qint4, 0, 32)
    return quantize_weight(w, qint4, 0, scale, shift, 32)


def main():
    weights = [p.detach() for p in minilm().parameters() if p.dim() == 2 and p.shape[1] % 32 == 0]
    every = lambda f: lambda: [f(x) for x in weights]
    pairs = {
        "int8 per channel": (lambda w: quantize(w, 8, axis=0), torch_int8, "torch.quantize_per_channel"),
        "4-bit group 32": (lambda w: quantize(w, 4, group=32, symmetric=False), quanto_int4, "optimum-quanto qint4"),
    }
    table = []
    for name, (ours, theirs, peer) in pairs.items():
        mine, other = every(ours)(), every(theirs)()
        for what, a, b in (
            ("quantize", every(ours), every(theirs)),
            ("dequantize", lambda: [q.dequantize() for q in mine], lambda: [q.dequantize() for q in other]),
        ):
            t = interleaved({"ours": a, "peer": b})
            table.append(
                dict(
                    what=f"{what}, {name}",
                    peer=peer,
                    ours_over_peer=t["ours"] / t["peer"],
                    million_weights_a_second=sum(map(torch.numel, weights)) / t["ours"] / 1e6,
                )
            )
        largest = max(weights, key=torch.numel)
        q = ours(largest)
        table[-2]["peak_over_tensor"] = peak_bytes(lambda: ours(largest)) / largest.nbytes
        table[-1]["peak_over_tensor"] = peak_bytes(q.dequantize) / largest.nbytes
        table[-2]["db_ours"], table[-2]["db_peer"] = (
            sqnr(largest, q.dequantize()),
            sqnr(largest, theirs(largest).dequantize()),
        )
    print(f"MiniLM's {sum(map(torch.numel, weights)):,} weights, {torch.get_num_threads()} threads\n")
    print(
        f"{'what':<30} {'peer':<28} {'time ours/peer':>14} {'M weights/s':>12} {'peak memory/tensor':>19}"
        f" {'SQNR ours':>10} {'peer':>7}"
    )
    for r in table:
        print(
            f"{r['what']:<30} {r['peer']:<28} {r['ours_over_peer']:>14.2f} {r['million_weights_a_second']:>12.0f}"
            f" {r['peak_over_tensor']:>19.2f} "
            + (f"{r['db_ours']:>10.2f} {r['db_peer']:>7.2f}" if "db_ours" in r else "")
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quant.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
