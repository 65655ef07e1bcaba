"""Structured pruning: the acid test on torchvision's classifiers, torch-pruning side by side, half the MACs on
LeNet-5. Writes results/structured.json.

    python bench/structured.py                          # everything, on a quiet machine
    python bench/structured.py torchvision resnet18     # a part: torchvision, peer or lenet; of some architectures only
    pip install --no-deps torchvision torch-pruning     # what the first two parts need

torchvision: half of the channels of every group go. Passed means that the smaller model gives the outputs of the
masked one to 0.1 % of the largest output, and has fewer parameters; then both are timed, paired and interleaved.
peer: ours and torch-pruning each take the largest channels that fit half of the MACs, in double precision. Weights
are random."""

import argparse, copy, importlib.metadata, json, sys, time, warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from torchvision_models import torchvision_models

from modelzip.data import LeNet5, accuracy, mnist5k, train
from modelzip.measure import count_parameters, file_bytes, latency, machine
from modelzip.pack import load, save
from modelzip.structured import channel_groups, choose_channels, factorize, shrink, total_macs
from modelzip.workshop.rehearsal import answers_of, unlike

warnings.filterwarnings("ignore")
RESULTS = Path(__file__).parent / "results" / "structured.json"
FIXED_SIZE = ("vit_", "swin", "maxvit")  # they want 224 × 224; maxvit besides has a size of window that divides it
MOST = 150e6  # parameters: larger ones would say nothing new


def answers(model, x):
    "What a model puts out, one tensor after the other."
    return [*answers_of(model, x)[0].values()]


def close(a, b):
    "Equal up to rounding errors."
    return unlike({"output": a}, {"output": b}, torch.finfo(a.dtype).eps) is None


@torch.no_grad()
def lively(model):
    """As after some training: BatchNorms have statistics, and nothing is constant (a fresh ViT's last layer is
    zero, so that it would pass any test)."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.numel() > 1 and p.std() < 1e-3:
            p += 0.02 * torch.randn(p.shape, generator=generator)
    for n, b in model.named_buffers():
        if n.endswith("running_mean"):
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
        if n.endswith("running_var"):
            b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model.eval()


def made(models, name):
    "An architecture and an image."
    torch.manual_seed(0)
    model = models.get_model(
        name, weights=None, **({"init_weights": True} if name in ("googlenet", "inception_v3") else {})
    )
    size = (
        224
        if name.startswith(FIXED_SIZE)
        else 299
        if name == "inception_v3"
        else 224
        if name in ("alexnet", "squeezenet1_0", "squeezenet1_1")
        else 96
    )
    return model, torch.randn(1, 3, size, size)


def one(models, name):
    model, x = made(models, name)
    parameters, size = count_parameters(model), x.shape[-1]
    if parameters > MOST:
        return {
            "name": name,
            "passed": None,
            "why": f"not tried: {parameters / 1e6:,.0f} million parameters",
            "parameters": parameters,
        }
    lively(model)
    began = time.perf_counter()
    groups = channel_groups(model, x)
    row = {"name": name, "parameters": parameters, "groups": len(groups), "left": len(groups.left), "input": size}
    if not len(groups):
        return row | {"passed": False, "why": "nothing can be removed: " + next(iter(groups.left.values()))}
    choice = choose_channels(model, x, 0.5, groups=groups)
    small, masked = choice.shrunk(), choice.masked()
    seconds = time.perf_counter() - began
    got, want = answers(small, x), answers(masked, x)
    passed = all(map(close, got, want)) and count_parameters(small) < parameters
    with torch.inference_mode():
        t = latency({"whole": lambda: model(x), "shrunk": lambda: small(x)}, repeats=7, progress=False)["shrunk"]
    reasons = sorted(set(groups.left.values()), key=lambda w: -list(groups.left.values()).count(w))
    return row | {
        "passed": passed,
        "remaining": count_parameters(small) / parameters,
        "macs": total_macs(small, x) / total_macs(model, x),
        "time": t.ratio,
        "time_low": t.ratio_low,
        "time_high": t.ratio_high,
        "error": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want)),
        "seconds": seconds,
        "why": "; ".join(r for r in reasons if "output of the model" not in r)[:300],
    }


def lenet():
    "Half the MACs with training on, and SVD: files and times of what was loaded, three seeds."
    data, rows = mnist5k(), []
    for seed in range(3):
        whole = train(LeNet5(seed=seed), data.train, epochs=6, seed=seed, progress=False)
        one = data.valid.x[:1]
        small = train(shrink(whole, one, macs=0.5), data.train, epochs=6, lr=2e-3, seed=seed, progress=False)
        thin = train(factorize(whole, bytes=0.3), data.train, epochs=3, lr=1e-3, seed=seed, progress=False)
        models = {
            "fp32": whole,
            "structured, half the MACs, trained on": small,
            "SVD, 30 % of the bytes, trained on": thin,
        }
        loaded = {}
        for name, m in models.items():
            path = save(m, RESULTS.parent / "structured.tmp.mz")
            loaded[name] = load(path)
            rows.append(
                {
                    "seed": seed,
                    "model": name,
                    "bytes": file_bytes(path),
                    "valid": accuracy(loaded[name], data.valid),
                    "test": accuracy(loaded[name], data.test),
                    "macs": total_macs(loaded[name], one),
                }
            )
            path.unlink()
        for n in 1, 64:
            x = data.valid.x[:n]
            with torch.inference_mode():
                times = latency({k: lambda m=m: m(x) for k, m in loaded.items()}, repeats=25, progress=False)
            for r in rows[-3:]:
                r[f"time_{n}"] = times[r["model"]].ratio
    return rows


MOST_FOR_PEERS = 90e6  # parameters, in double precision


def peer(models, name):
    """Half of the MACs: by torch-pruning, with the hints that its own examples give (the classifier, numbers of
    heads, ConvNeXt's scales), and by us, without any."""
    model, x = made(models, name)
    if (parameters := count_parameters(model)) > MOST_FOR_PEERS:
        return {"name": name, "why": f"not tried: {parameters / 1e6:,.0f} million parameters"}
    lively(model)
    model, x = model.double(), x.double()
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-3 * torch.randn(p.shape, dtype=p.dtype)  # so that no two weights are equal
    return {
        "name": name,
        "macs": total_macs(model, x),
        "torch-pruning": judged(by_torch_pruning, model, x),
        "modelzip": judged(by_us, model, x),
    }


def judged(prune, model, x):
    """Does it run, what does it put out, how many MACs remain, and are the outputs those of the model whose weights
    are zero where they were removed?"""
    began = time.perf_counter()
    try:
        small, plan = prune(model, x)
        row = {
            "plan_s": plan,
            "total_s": time.perf_counter() - began,
            "macs": total_macs(small, x) / total_macs(model, x),
        }
        (got,), (want,), (whole,) = (answers(m, x) for m in (small, zeroed(model, small), model))
    except Exception as e:
        return {"ran": False, "why": f"{type(e).__name__}: {e}".split("\n")[0][:200]}
    same = got.shape == want.shape
    return row | {
        "ran": True,
        "shape": got.shape == whole.shape,
        "exact": same and torch.allclose(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max())),
        "difference": float((got - want).abs().max() / want.abs().max()) if same else None,
    }


def by_us(model, x):
    began = time.perf_counter()
    groups = channel_groups(model, x)
    plan = time.perf_counter() - began
    return choose_channels(model, x, macs=0.5, groups=groups).shrunk(), plan


def by_torch_pruning(model, x):
    "Step by step, one thirty-second of the channels at a time, as its documentation does."
    import torch_pruning as tp

    small, whole = copy.deepcopy(model), total_macs(model, x)
    final = [m for m in small.modules() if getattr(m, "out_features", getattr(m, "out_channels", 0)) == 1000]
    heads = {m: m.num_heads for m in small.modules() if isinstance(m, nn.MultiheadAttention)}
    scales = [(p, 0) for n, p in small.named_parameters() if n.endswith("layer_scale")] or None
    began = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        small,
        x,
        tp.importance.GroupMagnitudeImportance(2),
        pruning_ratio=31 / 32,
        iterative_steps=31,
        ignored_layers=final,
        num_heads=heads,
        unwrapped_parameters=scales,
    )
    plan = time.perf_counter() - began
    for _ in range(31):
        if total_macs(small, x) <= 0.5 * whole:
            break
        pruner.step()
    return small, plan


@torch.no_grad()
def zeroed(model, small):
    """The model with zeros wherever a weight is not found in the smaller one. No two weights are equal, so that
    this needs no help from who removed them."""
    new, numbers = copy.deepcopy(model), lambda m: torch.cat([p.flatten() for p in m.parameters()])
    found = torch.isin(numbers(model), numbers(small)).split([p.numel() for p in new.parameters()])
    for p, there in zip(new.parameters(), found):
        p *= there.view_as(p)
    return new


def update(results, part, row):
    results[part] = sorted(
        [r for r in results.get(part, []) if r["name"] != row["name"]] + [row], key=lambda r: r["name"]
    )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def say_one(r):
    print(
        f"{r['name']:24} {str(r['passed']):6} parameters {r.get('remaining', 1):.2f}  MACs {r.get('macs', 1):.2f}  time"
        f" {r.get('time', 1):.2f}  {r.get('seconds', 0):5.1f} s  {r['why'][:90]}",
        flush=True,
    )


def say_peer(r):
    tell = lambda k: (
        f"{k}: "
        + (
            f"MACs {r[k]['macs']:.2f}, shape {r[k]['shape']}, exact {r[k]['exact']}, {r[k]['plan_s']:.1f} s"
            if r[k]["ran"]
            else r[k]["why"][:60]
        )
    )
    print(
        f"{r['name']:24} " + (r["why"] if "why" in r else "   ".join(map(tell, ("torch-pruning", "modelzip")))),
        flush=True,
    )


def attempt(f, models, name):
    try:
        return f(models, name)
    except Exception as e:
        return {"name": name, "passed": False, "why": f"{type(e).__name__}: {e}"[:300]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("part", nargs="?", choices=("torchvision", "peer", "lenet"))
    parser.add_argument("names", nargs="*", help="architectures; none: all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results, models = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}, torchvision_models()
    version = lambda p: (
        importlib.metadata.version(p)
        if any(d.metadata["Name"] == p for d in importlib.metadata.distributions())
        else None
    )
    results["machine"] = machine() | {p: version(p) for p in ("torchvision", "torch-pruning")}
    for part, f, say in ("torchvision", one, say_one), ("peer", peer, say_peer):
        if (
            asked.part not in (None, part)
            or models is None
            or part == "peer"
            and not results["machine"]["torch-pruning"]
        ):
            continue
        for name in asked.names or models.list_models(module=models):
            row = attempt(f, models, name)
            update(results, part, row)
            say(row)
    if asked.part in (None, "lenet"):
        results["lenet"] = lenet()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        for r in results["lenet"]:
            print(r)
    tried = [r for r in results["torchvision"] if r["passed"] is not None]
    print(
        f"{sum(r['passed'] for r in tried)} of {len(tried)} architectures passed,"
        f" {len(results['torchvision']) - len(tried)} were not tried"
    )
