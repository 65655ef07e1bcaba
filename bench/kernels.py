"""How much faster are integer layers? fp32, Dequantize, use_kernels and torch.ao's quantize_dynamic, paired in one run.

    python bench/kernels.py            prints two tables and writes bench/results/kernels.json

LeNet-5 on digits and MiniLM on docstrings cut to 64 tokens, at batch 1 and 32. A ratio of 2 is twice as fast as fp32.
"Agreement" is the cosine of the outputs with fp32's, the mean over 32 inputs.
"""
import copy, json, os, platform, warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F

from modelzip.data import LeNet5, docstrings, minilm, mnist5k, train
from modelzip.kernels import capabilities, use_kernels
from modelzip.measure import latency
from modelzip.quant import quantize_model

RESULTS = Path(__file__).parent / "results" / "kernels.json"


def versions(model):
    "The same network, computed in five ways."
    expanding = quantize_model(model, 8)
    with warnings.catch_warnings():                      # torch.ao announces its retirement
        warnings.simplefilter("ignore")
        peer = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    return {"fp32": model, "Dequantize": expanding, "use_kernels": use_kernels(expanding),
            "use_kernels, activations='tensor'": use_kernels(expanding, activations="tensor"), "torch.ao quantize_dynamic": peer}


def table(title, model, inputs, repeats):
    "Measure all versions on all batch sizes; print and return the rows."
    models, exact, rows = versions(model), model(*inputs(32)), {}
    for name, m in models.items(): rows[name] = {"cosine": F.cosine_similarity(m(*inputs(32)), exact).mean().item()}
    for batch in (1, 32):
        x = inputs(batch)
        times = latency({name: lambda m=m: m(*x) for name, m in models.items()}, repeats=repeats)
        for name, t in times.items():
            rows[name][f"batch {batch}"] = {"times as fast": 1 / t.ratio, "low": 1 / t.ratio_high, "high": 1 / t.ratio_low}
    print(f"\n{title}\n{'':<36}{'agreement':>10}{'batch 1':>20}{'batch 32':>20}")
    for name, r in rows.items():
        cells = [f"{c['times as fast']:.2f}× ({c['low']:.2f}–{c['high']:.2f})" for c in (r["batch 1"], r["batch 32"])]
        print(f"{name:<36}{r['cosine']:>10.4f}{cells[0]:>20}{cells[1]:>20}")
    return rows


def main():
    data = mnist5k()
    net = train(LeNet5(), data.train, epochs=2)
    with torch.inference_mode():
        language = minilm()
        tokens = language.tokenizer.encode_batch(docstrings(64).documents[:32])
        ids, mask = (torch.tensor([getattr(t, part) for t in tokens])[:, :64] for part in ("ids", "attention_mask"))
        found = {"LeNet-5": table("LeNet-5", net, lambda n: (data.test.x[:n],), 40),
                 "MiniLM": table("MiniLM, 64 tokens", language, lambda n: (ids[:n], mask[:n]), 12)}
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(), "kernels": vars(capabilities())}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"about": about, "times as fast as fp32": found}, indent=1) + "\n")
    print(f"\n{about}")


if __name__ == "__main__": main()
