"""From which size on are integers quicker in recurrent layers? An LSTM and a GRU of 8 bits against PyTorch's own in
float32, and against `torch.ao` (dynamic quantization), all in turns.

    python bench/recurrent.py           prints the tables and writes bench/results/recurrent.json (about two minutes)
    python bench/recurrent.py --quick   fewer repeats, nothing is written

A ratio above 1: quicker than float32. `LEAST_HIDDEN` of modelzip/workshop/integer_recurrent.py is read off this table;
sizes that the rule leaves in floats are marked with a star. Errors are relative, of the outputs.
"""

import json, sys, warnings
from pathlib import Path

import torch
from torch import nn

from modelzip.kernels import QRecurrent
from modelzip.measure import latency
from modelzip.quant import quantize_layer
from modelzip.workshop.integer_recurrent import loop_is_right, why_no_gain

RESULTS, QUICK = Path(__file__).parent / "results" / "recurrent.json", "--quick" in sys.argv
SHAPES = (64, 128), (128, 256), (128, 384), (256, 512), (1024, 1024)  # features, hidden units
BATCHES, STEPS = (1, 4, 16, 64), 30


def engines(cls, inputs, hidden):
    net = nn.Sequential(cls(inputs, hidden)).eval()
    small = quantize_layer(net[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao = torch.ao.quantization.quantize_dynamic(net, {cls}, dtype=torch.qint8)
    return {"float32": net, "ours": QRecurrent(small.layer, small.packed), "torch.ao": ao}


def main():
    if not loop_is_right():
        raise SystemExit("this machine lacks PyTorch's integer loop")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tables = {}
    for cls in nn.LSTM, nn.GRU:
        print(f"\n{cls.__name__}, {STEPS} steps, one thread: times as fast as float32, and error")
        print(f"{'features, hidden':<18}{'batch':>6}{'ours':>8}{'torch.ao':>10}{'error':>9}{'of ao':>8}")
        for inputs, hidden in SHAPES:
            models = engines(cls, inputs, hidden)
            for batch in BATCHES:
                x = torch.randn(STEPS, batch, inputs)
                y = {n: m(x)[0] for n, m in models.items()}
                error = {n: ((v - y["float32"]).norm() / y["float32"].norm()).item() for n, v in y.items()}
                times = latency({n: lambda m=m: m(x) for n, m in models.items()}, repeats=6 if QUICK else 30)
                row = {n: round(1 / times[n].ratio, 2) for n in ("ours", "torch.ao")}
                mark = "*" if why_no_gain(models["float32"][0]) else " "
                print(
                    f"{inputs:>5}, {hidden:<11}{batch:>6}{row['ours']:>7.2f}{mark}{row['torch.ao']:>10.2f}"
                    f"{error['ours']:>9.4f}{error['torch.ao']:>8.4f}"
                )
                tables[f"{cls.__name__} {inputs}, {hidden}, batch {batch}"] = row | {
                    f"error of {n}": round(error[n], 5) for n in row
                }
    if not QUICK:
        about = {"torch": torch.__version__, "threads": 1, "steps": STEPS}
        RESULTS.write_text(json.dumps({"about": about, "times as fast as float32": tables}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
