"""How much faster are integer layers, and how close is the answer? MiniLM in PyTorch and through ONNX Runtime,
beside the peers, paired in one run.

    python bench/kernels.py            prints the tables and writes bench/results/kernels.json (about 6 minutes on
    two cores)
    python bench/kernels.py --quick    fewer repeats
    python bench/kernels.py MiniLM     only that table (or LeNet-5, Depthwise, 4096); the others stay as they were saved

MiniLM on docstrings cut to 64 tokens; threads 1 and 2, batch 1, 8 and 32. A ratio of 2 is twice as fast as fp32 in
PyTorch. "Agreement" is the cosine of the sentence vectors with fp32's, the mean over 32 sentences. Peers that are
not installed are left out. Then LeNet-5, a convolutional model with BatchNorm and depthwise layers, and one linear
layer of 4096 × 4096 with 4-bit weights.
"""

import copy, json, os, platform, sys, tempfile, warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
import torch
import torch.nn.functional as F
from torch import nn

from modelzip.data import LeNet5, docstrings, minilm, mnist5k, train
from modelzip.kernels import capabilities, use_kernels
from modelzip.measure import latency
from modelzip.quant import quantize_layer, quantize_model

RESULTS, QUICK = Path(__file__).parent / "results" / "kernels.json", "--quick" in sys.argv
REPEATS = {1: 12, 8: 5, 32: 3} if QUICK else {1: 30, 8: 9, 32: 5}
ROWS = {"*.down": "row", "*": "tensor"}  # a range for each token only where outliers are worst: after the GELU
MOST_ROWS = {"*.down": "row", "*.up": "row", "*": "tensor"}


def smoothed(model, inputs, alpha, leave=()):
    """8 bits, each column's scale balanced between weight and input (SmoothQuant, arXiv:2211.10438); layers with a
    common input share it."""
    largest, hooks, groups = {}, [], {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def watch(m, a, name=name):
                largest[name] = a[0].abs().flatten(0, -2).amax(0)
                groups.setdefault(id(a[0]), []).append(name)

            hooks.append(layer.register_forward_pre_hook(watch))
    keep = []
    hooks.append(
        nn.modules.module.register_module_forward_pre_hook(lambda m, a: keep.append(a))
    )  # ids stay unique while inputs live
    model(*inputs)
    for h in hooks:
        h.remove()
    overrides = {}
    for names in groups.values():
        weight = torch.stack([model.get_submodule(n).weight.abs().amax(0) for n in names]).amax(0)
        c = weight.clamp(min=1e-5) ** (1 - alpha) / largest[names[0]].clamp(min=1e-5) ** alpha
        overrides |= {n: {"columns": c / c.mean()} for n in names if not n.endswith(leave or ("\0",))}
    return quantize_model(model, 8, overrides=overrides)


def peers(model):
    "The same network as other packages quantize it, in PyTorch's eager mode."
    found = {
        "torch.ao quantize_dynamic": torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )
    }
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        found["torchao int8 dynamic"] = copy.deepcopy(model)
        quantize_(found["torchao int8 dynamic"], Int8DynamicActivationInt8WeightConfig())
    except Exception as e:
        print("torchao:", str(e)[:100])
    try:
        from optimum.quanto import freeze, qint8, quantize

        found["optimum-quanto int8 weights"] = copy.deepcopy(model)
        quantize(found["optimum-quanto int8 weights"], weights=qint8)
        freeze(found["optimum-quanto int8 weights"])
    except Exception as e:
        print("optimum-quanto:", str(e)[:100])
    return found


def onnx_files(model, ours, example, folder):
    "fp32, ONNX Runtime's own dynamic quantization, and ours, as files."
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from modelzip.onnx_export import _exported, to_onnx

    free = {0: "batch", 1: "length"}
    (folder / "fp32.onnx").write_bytes(_exported(model, example, free, 21).SerializeToString())
    quantize_dynamic(folder / "fp32.onnx", folder / "own.onnx", weight_type=QuantType.QInt8)
    quantize_dynamic(folder / "fp32.onnx", folder / "own2.onnx", weight_type=QuantType.QInt8, per_channel=True)
    files = {
        "ONNX Runtime fp32": folder / "fp32.onnx",
        "ONNX Runtime quantize_dynamic": folder / "own.onnx",
        "ONNX Runtime quantize_dynamic, per channel": folder / "own2.onnx",
    }
    return files | {
        name: to_onnx(m, folder / f"{i}.onnx", example, dynamic=free) for i, (name, m) in enumerate(ours.items())
    }


def ratios(times):
    return {
        n: {"times as fast": 1 / t.ratio, "low": 1 / t.ratio_high, "high": 1 / t.ratio_low} for n, t in times.items()
    }


def show(title, rows, cells):
    print(f"\n{title}\n{'':<42}{'agreement':>10}" + "".join(f"{c:>22}" for c in cells))
    for name, r in rows.items():
        print(
            f"{name:<42}{r['cosine']:>10.4f}"
            + "".join(
                f"{r[c]['times as fast']:>8.2f}× ({r[c]['low']:.2f}–{r[c]['high']:.2f})" if c in r else f"{'':>22}"
                for c in cells
            )
        )


def language():
    model = minilm().eval()
    texts = docstrings(200).documents

    def tokens(these):
        t = model.tokenizer.encode_batch(these)
        return tuple(torch.tensor([getattr(a, part) for a in t])[:, :64] for part in ("ids", "attention_mask"))

    inputs, sample = tokens(texts[:32]), tokens(texts[100:132])
    plain, smooth, smoother = (
        quantize_model(model, 8),
        smoothed(model, sample, 0.65, (".down",)),
        smoothed(model, sample, 0.7),
    )
    versions = {
        "torch fp32": model,
        "ours, rows, no data": use_kernels(plain),
        "ours, smoothed": use_kernels(smooth, activations=ROWS),
        **peers(model),
    }
    through = {
        "ours through ONNX, smoothed, fast": use_kernels(smoother, activations="tensor"),
        "ours through ONNX, smoothed": use_kernels(smooth, activations=ROWS),
        "ours through ONNX, smoothed, more rows": use_kernels(smooth, activations=MOST_ROWS),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = onnx_files(model, through, tuple(x[:2] for x in inputs), Path(folder))
        sizes = {n: os.path.getsize(p) for n, p in files.items()}
        rows = compare(versions, files, inputs)
    for n, s in sizes.items():
        rows[n]["bytes"] = s
    return rows


def compare(versions, files, inputs):
    from modelzip.onnx_export import onnx_model

    rows, exact, cells = {}, None, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        run = versions | {n: onnx_model(p, threads) for n, p in files.items()}
        if exact is None:
            exact = versions["torch fp32"](*inputs)
            rows = {n: {"cosine": F.cosine_similarity(m(*inputs), exact).mean().item()} for n, m in run.items()}
        for batch in (1, 8, 32):
            x = tuple(i[:batch] for i in inputs)
            cells.append(cell := f"threads {threads}, batch {batch}")
            for n, r in ratios(latency({n: lambda m=m: m(*x) for n, m in run.items()}, repeats=REPEATS[batch])).items():
                rows[n][cell] = r
    show("MiniLM, 64 tokens", rows, cells)
    return rows


class Depthwise(nn.Module):
    "Depthwise and pointwise convolutions with BatchNorm, as in MobileNet, for 28 × 28 images."

    def __init__(self):
        super().__init__()
        block = lambda i, o, s: nn.Sequential(
            nn.Conv2d(i, i, 3, s, 1, groups=i, bias=False),
            nn.BatchNorm2d(i),
            nn.ReLU(),
            nn.Conv2d(i, o, 1, bias=False),
            nn.BatchNorm2d(o),
            nn.ReLU(),
        )
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            block(32, 64, 1),
            block(64, 128, 2),
            block(128, 128, 1),
            block(128, 256, 2),
        )
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def images(title, model, x):
    with torch.enable_grad():
        model = train(model, mnist5k().train, epochs=1, progress=False)
    run, rows = (
        {"fp32": model, "Dequantize": quantize_model(model), "use_kernels": use_kernels(quantize_model(model))},
        {},
    )
    exact = model(x)
    rows = {n: {"cosine": F.cosine_similarity(m(x), exact).mean().item()} for n, m in run.items()}
    cells = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 32):
            cells.append(cell := f"threads {threads}, batch {batch}")
            for n, r in ratios(latency({n: lambda m=m: m(x[:batch]) for n, m in run.items()}, repeats=20)).items():
                rows[n][cell] = r
    show(title, rows, cells)
    return rows


def wide():
    "One vector and a layer of 4096 × 4096: memory is the limit."
    layer, x = nn.Linear(4096, 4096), torch.randn(1, 4096)
    small = quantize_layer(layer, 4, group=32)
    run, exact = (
        {"fp32": layer, "4 bits, group 32": use_kernels(small), "int8": use_kernels(quantize_layer(layer))},
        layer(x),
    )
    rows, cells = {n: {"cosine": F.cosine_similarity(m(x), exact).mean().item()} for n, m in run.items()}, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        cells.append(cell := f"threads {threads}")
        for n, r in ratios(latency({n: lambda m=m: m(x) for n, m in run.items()}, repeats=20)).items():
            rows[n][cell] = r
    show("Linear 4096 × 4096, one vector", rows, cells)
    return rows


def main():
    with torch.no_grad():
        test = mnist5k().test.x[:32]
        tables = {
            "MiniLM": language,
            "LeNet-5": lambda: images("LeNet-5", LeNet5(), test),
            "Depthwise": lambda: images("BatchNorm and depthwise convolutions", Depthwise(), test),
            "4096": wide,
        }
        asked = [name for name in tables if name in sys.argv[1:]] or list(tables)
        before = json.loads(RESULTS.read_text())["times as fast as fp32"] if RESULTS.exists() else {}
        found = {
            name: tables[name]() if name in asked else before[name]
            for name in tables
            if name in asked or name in before
        }
    about = {"torch": torch.__version__, "python": platform.python_version(), "kernels": vars(capabilities())}
    for package in ("onnxruntime", "torchao", "optimum.quanto"):
        try:
            about[package] = __import__(package, fromlist=["x"]).__version__
        except Exception:
            pass
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"about": about, "times as fast as fp32": found}, indent=1) + "\n")
    print(f"\n{about}")


if __name__ == "__main__":
    main()
