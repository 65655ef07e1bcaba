"""Quantization without training on MiniLM: closeness, recall and bytes of ours, round-to-nearest, optimum-quanto
and HQQ's package, side by side.

python bench/ptq.py            everything, on the 600 pairs that no choice was made on (some minutes)
python bench/ptq.py cost       only time and memory of GPTQ, in the table that is there
python bench/ptq.py validate   a few recipes on the pairs between (where the choices were made)
"""

import json, math, sys, tempfile, time, warnings
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from modelzip.data import docstrings, minilm
from modelzip.measure import peak_memory
from modelzip.pack import load, save
from modelzip.ptq import awq, calibrate, gptq, hqq, output_error
from modelzip.quant import dequantize_model, quantize_model
from modelzip.workshop.models import Inputs

warnings.filterwarnings("ignore")
RESULTS = Path(__file__).parent / "results"
TEST, VALIDATION = slice(0, 600), slice(600, 1000)  # calibration takes pairs from 1,200 on
RECIPES = {  # chosen on VALIDATION
    8: dict(bits=8, group=None),
    4: dict(bits=4, group=32, symmetric=False, overrides={"words": dict(bits=5, group=None)}),
    3: dict(bits=3, group=32, symmetric=False, overrides={"words": dict(bits=4, group=None)}),
}


def calibration(model, pairs=128, size=16):
    "Questions and texts, sorted by length so that little is padding."
    found = docstrings(1200 + pairs)
    tokens = sorted(
        model.tokenizer.encode_batch(found.queries[1200:] + found.documents[1200:]), key=lambda t: sum(t.attention_mask)
    )
    out = []
    for i in range(0, len(tokens), size):
        some = tokens[i : i + size]
        longest = max(sum(t.attention_mask) for t in some)
        out.append(
            Inputs(*(torch.tensor([getattr(t, part)[:longest] for t in some]) for part in ("ids", "attention_mask")))
        )
    return out


class Judge:
    """Mean cosine to the original's vectors, recall@1, and the mean output error of the linear layers, on one part
    of the data."""

    def __init__(self, model, part):
        found = docstrings(part.stop)
        self.pairs = type(found)(found.queries[part], found.documents[part])
        self.model, self.exact = model, model.encode(self.pairs.queries + self.pairs.documents)
        ids = (
            [model.tokenizer.encode_batch(t) for t in (found.queries[600:664], found.documents[600:616])]
            if part.start
            else None
        )
        self.seen = (
            calibrate(
                model,
                [
                    Inputs(*(torch.tensor([getattr(t, p) for t in some]) for p in ("ids", "attention_mask")))
                    for some in ids
                ],
            )
            if ids
            else None
        )

    def recall(self, vectors):
        n = len(self.pairs)
        similar = vectors[:n] @ vectors[n:].T
        return (similar >= similar.diagonal()[:, None]).sum(1).eq(1).float().mean().item()

    def __call__(self, model):
        vectors = model.encode(self.pairs.queries + self.pairs.documents)
        return dict(cosine=(vectors * self.exact).sum(1).mean().item(), recall=self.recall(vectors))


def layer_error(model, other, seen):
    "Geometric mean over linear layers of the relative output error, on inputs of the original model."
    weights = {n: (model.get_submodule(n).weight.detach(), other.get_submodule(n).weight.detach()) for n in seen}
    return math.exp(sum(math.log(output_error(*w, seen[n])) for n, w in weights.items()) / len(seen))


def with_weights(model, expand):
    "A copy whose weights went through a peer's quantizer, and the bytes that the peer keeps (the rest stays fp32)."
    other, total = minilm(), 0
    chosen = {n for n, m in other.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    for name, p in other.named_parameters():
        if name.rpartition(".")[0] in chosen and name.endswith("weight"):
            p.data, size = expand(p.data)
            total += size
        else:
            total += p.nbytes
    return other, total


def quanto(bits, group):
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight

    def expand(w):
        if bits == 8 or w.shape[1] % (group or 1):
            q = quantize_weight(w, qint8, 0, AbsmaxOptimizer()(w, qint8, 0))
        else:
            q = quantize_weight(w, qint4, 0, *MaxOptimizer()(w, qint4, 0, group), group)
        scale, shift = q._scale, getattr(q, "_shift", None)
        return q.dequantize(), w.numel() * (8 if bits == 8 else 4) // 8 + scale.numel() * 2 + (
            0 if shift is None else shift.numel() * 2
        )

    return expand


def hqq_package(bits, group):
    from hqq.core.quantize import Quantizer

    def expand(w):
        q, meta = Quantizer.quantize(
            w.clone(),
            nbits=bits,
            channel_wise=True,
            group_size=group,
            optimize=True,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )
        back = Quantizer.dequantize(q, meta).float()
        return (
            back.reshape(w.shape),
            -(-w.numel() * bits // 8) + (meta["scale"].numel() + meta["zero"].numel()) * 2,
        )  # both in 16 bits

    return expand


def held(f):
    "Most bytes of tensors that torch held at once, beyond those that were there before."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    now = peak = 0
    for e in sorted(
        (e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def cost_of_gptq(model, batches):
    "Time and memory of the 4-bit recipe; memory with small batches too, whose activations weigh less."
    began, busy = time.perf_counter(), time.process_time()
    gptq(model, batches, **RECIPES[4])
    cost = dict(
        gptq_seconds=time.perf_counter() - began,
        gptq_processor_seconds=time.process_time() - busy,
        threads=torch.get_num_threads(),
        tokens=sum(int(b.args[1].sum()) for b in batches),
        resident_bytes=peak_memory(lambda: gptq(model, batches, **RECIPES[4])),
        tensor_bytes=held(lambda: gptq(model, calibration(model, 16, 4), **RECIPES[4])),
        model_bytes=sum(p.nbytes for p in model.parameters()),
        largest_layer_bytes=max(p.nbytes for p in model.parameters()),
    )
    print(
        f"GPTQ of the whole model: {cost['gptq_seconds']:.0f} s on {cost['threads']} threads"
        f" ({cost['gptq_processor_seconds']:.0f} s of a processor), {cost['tokens']:,} tokens; beyond the model"
        f" {cost['resident_bytes'] / 1e6:.0f} MB resident, with 32 texts in batches of 4"
        f" {cost['tensor_bytes'] / 1e6:.0f} MB in tensors (two of its largest layers:"
        f" {2 * cost['largest_layer_bytes'] / 1e6:.0f} MB)",
        flush=True,
    )
    return cost


def as_file(model, folder):
    "What counts: the model that comes back from the file, and the file's bytes."
    path = Path(folder) / "model.mz"
    save(model, path)
    return dequantize_model(load(path)), path.stat().st_size  # expanded once: the same numbers, sooner


def write(rows, cost):
    "Best of each width last; what is there so far is kept if the run is cut short."
    RESULTS.mkdir(exist_ok=True)
    ordered = sorted(rows, key=lambda r: (-r["bits"], r["cosine"]))
    (RESULTS / "ptq.json").write_text(json.dumps(dict(rows=ordered, cost=cost), indent=1) + "\n")


def main():
    validate = "validate" in sys.argv
    model = minilm()
    if "cost" in sys.argv:
        there = json.loads((RESULTS / "ptq.json").read_text())
        return write(there["rows"], cost_of_gptq(model, calibration(model)))
    judge, errors = Judge(model, VALIDATION if validate else TEST), Judge(model, VALIDATION).seen
    batches = calibration(model)
    rows, cost = [], {}
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "fp32.mz", archive=False)
        fp32 = (Path(folder) / "fp32.mz").stat().st_size

        def add(bits, name, how, other, size, seconds=None, busy=None):
            row = dict(
                bits=bits,
                method=name,
                kept=how,
                bytes=size,
                share=size / fp32,
                seconds=seconds,
                processor_seconds=busy,
                **judge(other),
            )
            row["output_error"] = layer_error(model, other, errors) if bits < 32 else 0.0
            rows.append(row)
            if not validate:
                write(rows, cost)
            print(
                f"{bits:>2} bits  {name:<42} cos {row['cosine']:.5f}  recall@1 {row['recall']:.4f}  share"
                f" {row['share']:.4f}  output error {row['output_error']:.2e}  "
                + (f"{seconds:.0f} s, of a processor {busy:.0f} s" if seconds else ""),
                flush=True,
            )

        def ours(bits, name, make):
            began, busy = time.perf_counter(), time.process_time()
            other = make()
            seconds, busy = time.perf_counter() - began, time.process_time() - busy
            add(bits, name, "file", *as_file(other, folder), seconds, busy)

        add(32, "fp32", "file", model, fp32)
        ours(8, "gptq, per channel", lambda: gptq(model, batches, **RECIPES[8]))
        ours(4, "gptq, group 32, asymmetric, words 5 bits", lambda: gptq(model, batches, **RECIPES[4]))
        ours(3, "gptq, group 32, asymmetric, words 4 bits", lambda: gptq(model, batches, **RECIPES[3]))
        if validate:
            return
        cost.update(cost_of_gptq(model, batches))
        ours(4, "nearest, group 32, symmetric", lambda: quantize_model(model, 4, group=32))
        ours(4, "nearest, group 32, asymmetric", lambda: quantize_model(model, 4, group=32, symmetric=False))
        add(4, "optimum-quanto qint4, group 32", "parts", *with_weights(model, quanto(4, 32)))
        add(4, "HQQ's package, group 32", "parts", *with_weights(model, hqq_package(4, 32)))
        ours(4, "hqq, group 32", lambda: hqq(model, 4))
        ours(4, "gptq, group 32, symmetric", lambda: gptq(model, batches, 4))
        ours(8, "nearest, per channel", lambda: quantize_model(model, 8))
        add(8, "optimum-quanto qint8", "parts", *with_weights(model, quanto(8, None)))
        ours(3, "nearest, group 32, asymmetric", lambda: quantize_model(model, 3, group=32, symmetric=False))
        add(3, "HQQ's package, group 32", "parts", *with_weights(model, hqq_package(3, 32)))
        ours(4, "awq, group 32, asymmetric", lambda: awq(model, calibrate(model, batches), 4, symmetric=False))


if __name__ == "__main__":
    main()
