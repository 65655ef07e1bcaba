"""Pruning, measured: how far LeNet-5 and LeNet-300-100 can be pruned at no loss, MiniLM by magnitude, Wanda and
SparseGPT, and when sparsity pays in time.

    python bench/prune.py            everything (about half an hour on one core)
    python bench/prune.py lenet      one of the parts: lenet, minilm, time (on a quiet machine); the others stay in
    the table that is there

Choices (how sparse, how many bits) are made on the validation part, by the mean of three seeds. Then the models are
trained on training and validation part together, and the test part is looked at once.
"""

import copy, itertools, json, math, os, statistics, sys, tempfile, time, warnings
from pathlib import Path

import torch
from torch import nn

from modelzip.data import LeNet5, LeNet300, accuracy, docstrings, minilm, mnist5k, train
from modelzip.measure import latency, machine, wilson
from modelzip.pack import load, save
from modelzip.prune import (
    prunable_layers,
    prune_gradually,
    prune_model,
    sparsify_model,
    sparsity_table,
    use_sparse_products,
)
from modelzip.saliency import collect, reconstruction_error
from modelzip.workshop.models import Inputs

warnings.filterwarnings("ignore")
RESULTS = Path(__file__).parent / "results" / "prune.json"
SEEDS = (0, 1, 2)
NETS = {
    "LeNet-5": (LeNet5, (0.95, 0.97, 0.98, 0.985, 0.99)),
    "LeNet-300-100": (LeNet300, (0.92, 0.95, 0.96, 0.97, 0.98)),
}
DENSE, PRUNED = (
    dict(epochs=6, lr=3e-3),
    dict(epochs=16, lr=2e-3),
)  # of the first training, and of the one during which masks tighten
TOLERANCE = 0.002  # one digit of the 500 of the validation part


def gradually(model, data, sparsity, seed):
    "Global magnitude; the masks tighten epoch by epoch (cubic), the last third of the epochs is for healing."
    return prune_gradually(model, data, sparsity, seed=seed, progress=False, **PRUNED)


def longer(model, data, seed):
    "The dense model, trained on for as long: pruning must not win by training alone."
    return train(copy.deepcopy(model), data, seed=seed, progress=False, **PRUNED)


def validated(net, data, sparsities):
    "Mean accuracy over the seeds on the validation part: of the dense model, and at each sparsity."
    valid = {"dense": []} | {s: [] for s in sparsities}
    for seed in SEEDS:
        base = train(net(seed=seed), data.train, seed=seed, progress=False, **DENSE)
        valid["dense"].append(accuracy(longer(base, data.train, seed), data.valid))
        for s in sparsities:
            valid[s].append(accuracy(gradually(base, data.train, s, seed), data.valid))
    return {k: round(statistics.mean(v), 4) for k, v in valid.items()}


def choice(means):
    "The largest sparsity at which, and at all below which, nothing is lost but for one digit of the validation part."
    passed = list(
        itertools.takewhile(lambda s: means[s] >= means["dense"] - TOLERANCE, [s for s in means if s != "dense"])
    )
    return passed[-1] if passed else min(s for s in means if s != "dense")


def lenet():
    data, out = mnist5k(), {}
    for name, (net, sparsities) in NETS.items():
        means = validated(net, data, sparsities)
        chosen = choice(means)
        print(name, means, "chosen", chosen, flush=True)
        rows = [final(net, data, chosen, seed) for seed in SEEDS]
        out[name] = {
            "validation": {str(k): v for k, v in means.items()},
            "chosen": chosen,
            "rows": rows,
            "summary": summary(rows),
        }
        print(name, out[name]["summary"], flush=True)
    return out


def final(net, data, sparsity, seed):
    "Train on all but the test part, prune, make it real, and look at the test part once, through the files."
    base = train(net(seed=seed), data.fit, seed=seed, progress=False, **DENSE)
    dense, pruned = longer(base, data.fit, seed), gradually(base, data.fit, sparsity, seed)
    models = {
        "dense": dense,
        "pruned": sparsify_model(pruned),
        "pruned, 4 bits": sparsify_model(pruned, bits=4, codebook="kmeans"),
    }
    row = {"seed": seed, "sparsity": sparsity_table(pruned).sparsity}
    with tempfile.TemporaryDirectory() as folder:
        for name, m in models.items():
            path = save(m, Path(folder) / "m.mz")
            row[name] = {"bytes": path.stat().st_size, "accuracy": accuracy(load(path), data.test)}
    row["float32 bytes"] = 4 * sum(p.numel() for p in dense.parameters())
    return row


def summary(rows):
    "Means over seeds, and the difference to the dense model with its standard error over seeds."
    out = {"seeds": len(rows), "sparsity": rows[0]["sparsity"]}
    for name in ("dense", "pruned", "pruned, 4 bits"):
        out[name] = {
            "accuracy": statistics.mean(r[name]["accuracy"] for r in rows),
            "bytes": statistics.mean(r[name]["bytes"] for r in rows),
            "times smaller": statistics.mean(r["float32 bytes"] / r[name]["bytes"] for r in rows),
        }
        difference = [r[name]["accuracy"] - r["dense"]["accuracy"] for r in rows]
        out[name] |= {
            "difference": statistics.mean(difference),
            "standard error": statistics.stdev(difference) / math.sqrt(len(rows)),
        }
    n = 1000 * len(rows)
    out["interval of the dense model"] = wilson(round(out["dense"]["accuracy"] * n), n)
    return out


def texts(model, pairs, size=16):
    "Batches of questions and documents, sorted by length so that little is padding."
    tokens = sorted(model.tokenizer.encode_batch(pairs[0] + pairs[1]), key=lambda t: sum(t.attention_mask))
    out = []
    for i in range(0, len(tokens), size):
        longest = max(sum(t.attention_mask) for t in tokens[i : i + size])
        out.append(
            Inputs(
                *(
                    torch.tensor([getattr(t, part)[:longest] for t in tokens[i : i + size]])
                    for part in ("ids", "attention_mask")
                )
            )
        )
    return out


def found_first(vectors):
    "Recall@1: the share of questions (first half) whose own document (second half) is the most similar."
    similar = vectors[: len(vectors) // 2] @ vectors[len(vectors) // 2 :].T
    return (similar >= similar.diagonal()[:, None]).sum(1).eq(1).float().mean().item()


def encoder():
    model, found = minilm(), docstrings(1264)
    calibration = texts(model, (found.queries[1200:], found.documents[1200:1232]))
    others = texts(model, (found.queries[600:632], found.documents[600:616]))
    judged = found.queries[:300] + found.documents[:300]
    skip, exact = ["pooler"], model.encode(judged)
    layers = prunable_layers(model, skip=skip)
    moments = {n: s.moment for n, s in collect(model, others, "moment", layers=layers).items()}
    rows = [dict(granularity="", method="dense", recall=found_first(exact), cosine=1.0, error=0.0)]
    for granularity in ("weight", "2:4"):
        for method in ("magnitude", "wanda", "sparsegpt"):
            began = time.perf_counter()
            data = {} if method == "magnitude" else dict(batches=calibration)
            new = prune_model(
                model, 0.5, method, granularity, "output" if method == "wanda" else "layer", skip=skip, **data
            )
            seconds = time.perf_counter() - began
            error = math.exp(
                statistics.mean(
                    math.log(reconstruction_error(m.weight, new.get_submodule(n).weight, moments[n]))
                    for n, m in layers.items()
                )
            )
            vectors = new.encode(judged)
            rows.append(
                dict(
                    granularity=granularity,
                    method=method,
                    error=error,
                    cosine=(vectors * exact).sum(1).mean().item(),
                    recall=found_first(vectors),
                    seconds=seconds,
                )
            )
            print(rows[-1], flush=True)
    return {"rows": rows, "calibration tokens": sum(int(b.args[1].sum()) for b in calibration)}


def clock():
    "Dense, CSR and structured products; then LeNet-300-100 as a whole."
    rows = []
    for outputs, inputs in ((500, 800), (1536, 384), (4096, 4096)):
        for batch in (1, 64):
            x = torch.randn(batch, inputs)
            layer = nn.Linear(inputs, outputs)
            for sparsity in (0.5, 0.8, 0.9, 0.95, 0.98):
                sparse = use_sparse_products(sparsify_model(prune_model(nn.Sequential(layer), sparsity)), density=1.0)[
                    0
                ]
                part = (1 - sparsity) ** 0.5
                less = nn.Linear(round(inputs * part), round(outputs * part))
                few = x[:, : less.in_features].contiguous()
                masked = prune_model(nn.Sequential(layer), sparsity)
                times = latency(
                    {
                        "dense": lambda: layer(x),
                        "masked": lambda: masked(x),
                        "CSR": lambda: sparse(x),
                        "structured": lambda: less(few),
                    },
                    repeats=15,
                )
                rows.append(
                    dict(
                        outputs=outputs,
                        inputs=inputs,
                        batch=batch,
                        sparsity=sparsity,
                        dense_ms=times["dense"].median,
                        **{n: t.ratio for n, t in times.items()},
                    )
                )
            print(rows[-1], flush=True)
    return {"rows": rows, "network": network(), "threads": torch.get_num_threads()}


def network():
    "A pruned LeNet-300-100, loaded from its file, against the dense one."
    out = []
    for sparsity in (0.9, 0.95, 0.97):
        real = sparsify_model(prune_model(LeNet300(), sparsity, scope="erk"))
        with tempfile.TemporaryDirectory() as folder:
            quick = load(save(use_sparse_products(real), Path(folder) / "m.mz"))
        for batch in (1, 64):
            x = torch.rand(batch, 1, 28, 28)
            dense = LeNet300().eval()
            times = latency(
                {"dense": lambda: dense(x), "sparse": lambda: quick(x), "expanded each time": lambda: real(x)},
                repeats=15,
            )
            out.append(
                dict(
                    sparsity=sparsity,
                    batch=batch,
                    dense_ms=times["dense"].median,
                    **{n: t.ratio for n, t in times.items()},
                )
            )
    return out


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", 1)))
    parts = {"lenet": lenet, "minilm": encoder, "time": clock}
    wanted = sys.argv[1:] or list(parts)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in wanted:
        with torch.no_grad():
            result[part] = parts[part]()
        result.setdefault("machines", {})[part] = machine()  # with its versions, for parts may run at different times
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
