"""Structured pruning: the acid test on torchvision's classification models, and half the MACs on LeNet-5. Writes results/structured.json.

    python bench/structured.py            # all (torchvision is optional: pip install --no-deps torchvision)
    python bench/structured.py resnet18 vit_b_16

For each architecture, random weights: half of the channels of every group go. Passed means that the smaller model gives the outputs of the masked one
to 0.1 % of the largest output, and has fewer parameters; then both are timed, paired and interleaved."""
import json, sys, time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent/"tests"))
from torchvision_models import torchvision_models

from modelzip.data import LeNet5, accuracy, mnist5k, train
from modelzip.measure import count_parameters, file_bytes, latency, machine
from modelzip.pack import load, save
from modelzip.structured import answers, channel_groups, choose_channels, close, factorize, fold_batchnorm, foldable, shrink, total_macs

RESULTS = Path(__file__).parent/"results"/"structured.json"
FIXED_SIZE = ("vit_", "swin", "maxvit")      # they want 224 × 224; maxvit besides has a size of window that divides it
MOST = 150e6                                 # parameters: larger ones would say nothing new

def lively(model):
    "Statistics of BatchNorms as after some training, so that activations have a size."
    generator = torch.Generator().manual_seed(0)
    for n, b in model.named_buffers():
        if n.endswith("running_mean"): b.copy_(.1*torch.randn(b.shape, generator=generator))
        if n.endswith("running_var"): b.copy_(torch.rand(b.shape, generator=generator) + .5)
    return model.eval()

def one(models, name):
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **({"init_weights": True} if name in ("googlenet", "inception_v3") else {}))
    parameters = count_parameters(model)
    if parameters > MOST: return {"name": name, "passed": None, "why": f"not tried: {parameters/1e6:,.0f} million parameters", "parameters": parameters}
    lively(model)
    size = 224 if name.startswith(FIXED_SIZE) else 299 if name == "inception_v3" else 224 if name in ("alexnet", "squeezenet1_0", "squeezenet1_1") else 96
    x = torch.randn(1, 3, size, size)
    began = time.perf_counter()
    groups = channel_groups(model, x)
    row = {"name": name, "parameters": parameters, "groups": len(groups), "left": len(groups.left), "input": size}
    if not len(groups): return row | {"passed": False, "why": "nothing can be removed: " + next(iter(groups.left.values()))}
    choice = choose_channels(model, x, .5, groups=groups)
    small, masked = choice.shrunk(), choice.masked()
    seconds = time.perf_counter() - began
    got, want = answers(small, x), answers(masked, x)
    passed = all(map(close, got, want)) and count_parameters(small) < parameters
    with torch.inference_mode(): t = latency({"whole": lambda: model(x), "shrunk": lambda: small(x)}, repeats=7, progress=False)["shrunk"]
    reasons = sorted(set(groups.left.values()), key=lambda w: -list(groups.left.values()).count(w))
    return row | {"passed": passed, "remaining": count_parameters(small)/parameters, "macs": total_macs(small, x)/total_macs(model, x), "time": t.ratio,
                  "time_low": t.ratio_low, "time_high": t.ratio_high, "error": max(float((a - b).abs().max()/b.abs().max()) for a, b in zip(got, want)),
                  "seconds": seconds, "why": "; ".join(r for r in reasons if "output of the model" not in r)[:300]}

def lenet():
    "Half the MACs with training on, and SVD: files and times of what was loaded, three seeds."
    data, rows = mnist5k(), []
    for seed in range(3):
        whole = train(LeNet5(seed=seed), data.train, epochs=6, seed=seed, progress=False)
        one = data.valid.x[:1]
        small = train(shrink(whole, one, macs=.5), data.train, epochs=6, lr=2e-3, seed=seed, progress=False)
        thin = train(factorize(whole, bytes=.3), data.train, epochs=3, lr=1e-3, seed=seed, progress=False)
        models = {"fp32": whole, "structured, half the MACs, trained on": small, "SVD, 30 % of the bytes, trained on": thin}
        loaded = {}
        for name, m in models.items():
            path = save(m, RESULTS.parent/"structured.tmp.mz")
            loaded[name] = load(path)
            rows.append({"seed": seed, "model": name, "bytes": file_bytes(path), "valid": accuracy(loaded[name], data.valid), "test": accuracy(loaded[name], data.test),
                         "macs": total_macs(loaded[name], one)})
            path.unlink()
        for n in 1, 64:
            x = data.valid.x[:n]
            with torch.inference_mode(): times = latency({k: lambda m=m: m(x) for k, m in loaded.items()}, repeats=25, progress=False)
            for r in rows[-3:]: r[f"time_{n}"] = times[r["model"]].ratio
    return rows

if __name__ == "__main__":
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"torchvision": [], "lenet": []}
    results["machine"], models = machine(), torchvision_models()
    names = [n for n in sys.argv[1:] if n != "lenet"] or (models.list_models(module=models) if models and len(sys.argv) == 1 else [])
    for name in names:
        try: row = one(models, name)
        except Exception as e: row = {"name": name, "passed": False, "why": f"{type(e).__name__}: {e}"[:300]}
        results["torchvision"] = sorted([r for r in results["torchvision"] if r["name"] != name] + [row], key=lambda r: r["name"])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name:24} {str(row['passed']):6} parameters {row.get('remaining', 1):.2f}  MACs {row.get('macs', 1):.2f}  time {row.get('time', 1):.2f}  {row.get('seconds', 0):5.1f} s  {row['why'][:90]}", flush=True)
    if "lenet" in sys.argv or len(sys.argv) == 1:
        results["lenet"] = lenet()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        for r in results["lenet"]: print(r)
    tried = [r for r in results["torchvision"] if r["passed"] is not None]
    print(f"{sum(r['passed'] for r in tried)} of {len(tried)} architectures passed, {len(results['torchvision']) - len(tried)} were not tried")
