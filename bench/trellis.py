"""Trellis-coded quantization of MiniLM: at equal bytes beside rounding, and the smallest files at a cosine of 0.99
and of 0.999. Whole files, everything counted.

    python bench/trellis.py gain            rounding and trellises, each with steps in proportion to the tensors' sizes
    python bench/trellis.py 0.99 0.999      the files (some three minutes of one processor each)

One number fixes a file, `STEPS`: the step of all weights, where each is measured by what its error does to the
sentence vectors. For a row of a layer that is the mean squared gradient of a random direction of the vectors, for a
column GPTQ's factor. Gradients and second moments come from pairs of `docstrings` from 1,200 on. The numbers in
`STEPS` follow from one trial at 6e-5 on pairs 600 to 750, where the cosine was 0.98879, and from a loss that grows as
the square of the step; the table's cosine is measured on the first 600 pairs, on which nothing was chosen (of the trial
it was seen, too: 0.98870).
"""

import json, math, sys, tempfile, time, warnings
from pathlib import Path

import torch
from torch import nn

from ptq import TEST, Judge, calibration
from modelzip.data import minilm
from modelzip.measure import write_whole
from modelzip.pack import load, save
from modelzip.ptq import calibrate, inverse_factor, quantize_with
from modelzip.quant import dequantize_model, quantize_model
from modelzip.trellis import trellis, trellis_weight
from modelzip.workshop.scales import scaled_to_one

warnings.filterwarnings("ignore")
OUT = Path(__file__).parent / "results/trellis.json"
STEPS, DAMPING = {0.99: 5.5e-5, 0.999: 1.7e-5}, 0.01


def gradients(model, batches, draws=2):
    """Mean over texts of the squared gradient of a random direction of the sentence vectors, by layer and row of its
    weight, summed over the row."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    total = {n: torch.zeros(len(m.weight), dtype=torch.float64) for n, m in layers.items()}
    seen, dice, texts = {}, torch.Generator().manual_seed(0), 0

    def note(name):
        def hook(layer, x, y):
            y.retain_grad()
            seen[name] = x[0].detach(), y

        return hook

    hooks = [m.register_forward_hook(note(n)) for n, m in layers.items()]
    for batch in batches:
        vectors = model(*batch.args)
        texts += len(vectors)
        for i in range(draws):
            for _, y in seen.values():
                y.grad = None
            (vectors * torch.randn(vectors.shape, generator=dice)).sum().backward(retain_graph=i < draws - 1)
            for name, (x, y) in seen.items():
                if y.grad is not None:
                    add_squares(total[name], layers[name], x, y.grad)
        model.zero_grad()
    for h in hooks:
        h.remove()
    return {n: t / texts / draws for n, t in total.items()}


def add_squares(total, layer, x, grad):
    "Squared gradients of the weight, text by text."
    if isinstance(layer, nn.Linear):
        total += (grad.transpose(1, 2) @ x).square().sum((0, 2)).double()
        return
    for ids, g in zip(*((x, grad) if grad.dim() == 3 else (x[None], grad[None]))):
        own, at = ids.unique(return_inverse=True)
        total.index_add_(0, own, torch.zeros(len(own), g.shape[1]).index_add_(0, at, g).square().sum(1).double())


def steps_for(model, batches, step):
    "Options of `trellis_weight` for each layer, such that all weights lose alike at their margins."
    found, seen, how = gradients(model, batches[::2]), calibrate(model, batches), {}
    for name, layer in model.named_modules():
        if name == "pooler":  # no part of a sentence's vector
            how[name] = {"bits": 1.0}
        elif name == "types":
            how[name] = {"bits": 6.0}
        elif name == "words":  # all rows alike: who knows which words will come
            how[name] = {"step": step / (found[name].sum() / layer.weight.numel()).sqrt().item()}
        elif name == "positions":  # a fiftieth of the mean for those that no text reached
            each = found[name] / layer.weight.shape[1]
            how[name] = by_row(step, each + 0.02 * each.mean())
        elif isinstance(layer, nn.Linear):
            moment = scaled_to_one(seen[name].moment)[0].float()
            each = found[name] / moment.trace().item()
            how[name] = by_row(step, each.clamp(min=0.01 * each.mean()))
            how[name]["step"] *= inverse_factor(moment, DAMPING).diagonal().log().mean().exp().item()
    return how


def by_row(step, importance):
    "The step in the geometric mean over the rows, and how rows differ."
    return {"step": step / importance.log().mean().exp().sqrt().item(), "importance": importance.float()}


def smallest(model, judge, target, fp32, path):
    "A file for a target, and what it is worth on other sentences."
    began, batches = time.process_time(), calibration(model)
    how = steps_for(model, batches, STEPS[target])
    small = quantize_with(trellis_weight, model, batches[::2], None, None, 0.5, how, damping=DAMPING)
    made = time.process_time() - began
    size = save(small, path).stat().st_size
    began = time.process_time()
    back = dequantize_model(load(path))
    read = time.process_time() - began
    row = dict(target=target, step=STEPS[target], bytes=size, share=size / fp32, **judge(back), made=made, read=read)
    print(row, flush=True)
    return row


def decibels(model, other):
    "Signal over error, each tensor in units of its own size."
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    weights = [(model.get_submodule(n).weight, other.get_submodule(n).weight) for n in names]
    wrong = sum((w - v).square().sum() / w.square().mean() for w, v in weights)
    return 10 * math.log10(sum(w.numel() for w, _ in weights) / wrong)


@torch.no_grad()
def gains(model, path):
    "Files of rounded and of trellis-coded weights, and how many dB the one is above the other at equal bytes."
    sizes = {n: m.weight.square().mean().sqrt().item() for n, m in model.named_modules() if hasattr(m, "weight")}
    only = lambda m: isinstance(m, (nn.Linear, nn.Embedding))

    def row(method, share, compressed):
        size = save(compressed, path).stat().st_size
        return dict(method=method, share=share, bytes=size, dB=decibels(model, dequantize_model(compressed)))

    rounding = lambda s: lambda n, m: {"step": 2 * s * sizes[n]} if only(m) else None
    paths = lambda s: lambda n, m: {"step": s * sizes[n]} if only(m) else None
    rows = []
    for s in (0.24, 0.2):
        rows.append(row("rounding", s, quantize_model(model, overrides=rounding(s), per_channel=False)))
    for s in (0.21,):
        rows.append(row("trellis", s, trellis(model, overrides=paths(s))))
        rows[-1]["gain"] = above(rows[-1], [r for r in rows if r["method"] == "rounding"])
    for r in rows:
        print(r, flush=True)
    return rows


def above(row, others):
    "dB above the line through the two nearest files of the others; dB against the logarithm of bytes."
    (a, u), (b, v) = sorted(sorted((abs(r["bytes"] - row["bytes"]), i) for i, r in enumerate(others))[:2])
    a, b = others[u], others[v]
    t = (row["bytes"] - a["bytes"]) / (b["bytes"] - a["bytes"])
    return row["dB"] - a["dB"] - t * (b["dB"] - a["dB"])


def keep(**found):
    "Put what was found beside what is there."
    table = json.loads(OUT.read_text()) if OUT.exists() else {"files": [], "gains": []}
    rest = [r for r in table["files"] if r["target"] not in [f["target"] for f in found.get("files", ())]]
    table |= found | {"files": sorted([*rest, *found.get("files", ())], key=lambda r: r["target"])}
    write_whole(OUT, json.dumps(table, indent=1) + "\n")


def main():
    asked, model = sys.argv[1:] or ["gain", *map(str, STEPS)], minilm()
    with tempfile.TemporaryDirectory() as folder:
        fp32 = save(model, Path(folder) / "fp32.mz", archive=False).stat().st_size
        if "gain" in asked:
            keep(fp32_bytes=fp32, gains=gains(model, Path(folder) / "gain.mz"))
        judge = Judge(model, TEST) if asked != ["gain"] else None
        for target in sorted(float(a) for a in asked if a != "gain"):
            row = smallest(model, judge, target, fp32, Path(folder) / "small.mz")
            keep(fp32_bytes=fp32, files=[row])


if __name__ == "__main__":
    main()
