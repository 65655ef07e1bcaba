"""Which of two products of bytes is quicker: oneDNN's (`run_large`), or the one that starts sooner and returns int32
(`run_small`)? Both with all that follows until they are floats; and one product for three layers beside three products.

    python bench/products.py           prints the tables and writes bench/results/products.json (about two minutes)
    python bench/products.py --quick   fewer repeats, nothing is written

A ratio above 1: the product that starts sooner (the three products) is the quicker one. `FEW_ROWS`, `FEW_WEIGHTS` and
`FEW_TOGETHER` of modelzip/workshop/integer_linear.py are read off these tables; each cell that the rule decides is
marked with a star. The rule is one of shapes alone, so the same input takes the same way each time; and both ways
have the same bits.
"""

import json, sys
from pathlib import Path

import torch

from modelzip.measure import latency
from modelzip.workshop import engines
from modelzip.workshop.integer_linear import FEW_ROWS, FEW_TOGETHER, FEW_WEIGHTS

RESULTS, QUICK = Path(__file__).parent / "results" / "products.json", "--quick" in sys.argv
SHAPES = (128, 128), (256, 256), (384, 384), (512, 512), (384, 1536), (1536, 384), (768, 768)
ROWS = 1, 2, 8, 32, 64, 128, 256, 512


def prepared(inputs, outputs):
    weight, scale = torch.randint(-127, 128, (outputs, inputs)).to(torch.int8), torch.rand(outputs)
    return engines.pack_small(weight), engines.pack_large(weight), scale


def one(rows, inputs, outputs):
    "Small against large, one layer."
    codes = torch.randint(0, 256, (rows, inputs)).to(torch.uint8)
    small, large, scale = prepared(inputs, outputs)
    assert torch.equal(engines.run_small(codes, small, scale), engines.run_large(codes, large, scale))
    return lambda: engines.run_small(codes, small, scale), lambda: engines.run_large(codes, large, scale)


def three(rows, inputs, outputs):
    "Three products against one of all, and a pass over what comes out, which the single one does in slices."
    codes = torch.randint(0, 256, (rows, inputs)).to(torch.uint8)
    small, large, scale = prepared(inputs, outputs)
    all_large, all_scale = prepared(inputs, 3 * outputs)[1:]
    few = rows <= FEW_ROWS and inputs * outputs <= FEW_WEIGHTS
    single = (
        (lambda: engines.run_small(codes, small, scale)) if few else (lambda: engines.run_large(codes, large, scale))
    )

    def together():
        y = engines.run_large(codes, all_large, all_scale)
        return [y.narrow(1, i * outputs, outputs).add(1) for i in range(3)]

    return lambda: [single().add_(1) for _ in range(3)], together


def table(title, pair, rule):
    print(f"\n{title}\n{'inputs × outputs':<18}" + "".join(f"{r:>9}" for r in ROWS))
    found = {}
    for inputs, outputs in SHAPES:
        cells = {}
        for rows in ROWS:
            first, second = pair(rows, inputs, outputs)
            cells[rows] = round(
                latency({"first": first, "second": second}, repeats=6 if QUICK else 40)["second"].ratio, 2
            )
        found[f"{inputs} × {outputs}"] = cells
        marks = {r: "*" if rule(r, inputs * outputs) else " " for r in ROWS}
        print(f"{inputs:>5} × {outputs:<10}" + "".join(f"{c:>8.2f}{marks[r]}" for r, c in cells.items()))
    return found


def main():
    if not engines.capabilities().small:
        raise SystemExit("this machine lacks one of the two products, or their bits differ")
    torch.set_num_threads(1)
    few = lambda rows, weights: rows <= FEW_ROWS and weights <= FEW_WEIGHTS
    with torch.no_grad():
        tables = {
            "the product that starts sooner, times as fast": table("one layer, rows →", one, few),
            "three products, times as fast as one": table(
                "three layers with one input, rows →", three, lambda r, w: r > FEW_TOGETHER and few(r, w)
            ),
        }
    if not QUICK:
        about = {"torch": torch.__version__, "kernels": vars(engines.capabilities()), "threads": 1}
        RESULTS.write_text(json.dumps({"about": about} | tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
