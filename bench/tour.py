"""The tour's table as the chapter and the first page show it: what `make tour` prints, kept, with the files that readers of
the first page try.

python bench/tour.py     trains, compresses and measures (two to three minutes); writes bench/results/tour.json and
                         tools/site/try/*.mz with files.json
python bench/tour.py files     writes these files alone
"""

import datetime, json, shutil, sys, tempfile
from pathlib import Path

import torch
from torch import nn

from modelzip.data import mnist5k
from modelzip.measure import write_whole
from modelzip.pack import save
from modelzip.tour import tour

RESULTS = Path(__file__).parent / "results" / "tour.json"
TRIES = Path(__file__).parent.parent / "tools/site/try"
TRIED = {
    "coded": "float32, entropy-coded",
    "channel8": "8-bit weights, per channel",
    "group4": "4-bit weights, group 64",
    "pruned4": "95 % pruned, 4-bit weights",
    "priced": "the student, every bit at a price",
}  # what readers of the first page try, large ones first: file → technique, none that computes in integers


def keep(folder, report):
    "These files, what they reach, and ten digits: the first of each kind in the validation part."
    rows, paths = {row.name: row for row in report.rows}, sorted(Path(folder).glob("*.mz"))
    for name, title in TRIED.items():
        shutil.copyfile(paths[list(rows).index(title)], TRIES / f"{name}.mz")
    said = [{"name": n, "title": t, "accuracy": rows[t].accuracy} for n, t in TRIED.items()]
    write_whole(TRIES / "files.json", json.dumps(said, indent=1) + "\n")
    x, y = mnist5k().valid
    first = torch.stack([x[(y == digit).nonzero()[0, 0]] for digit in range(10)])
    digits = nn.Module()
    digits.register_buffer("x", (first * 255).round().to(torch.uint8))
    save(digits, TRIES / "digits.mz")


def main():
    alone = {"techniques": [*TRIED.values()], "repeats": 2} if sys.argv[1:] == ["files"] else {}
    with tempfile.TemporaryDirectory() as folder:
        report = tour(folder, progress=sys.stderr.isatty(), **alone)
        keep(folder, report)
    if not alone:
        report.facts["measured on"] = datetime.date.today().isoformat()
        write_whole(RESULTS, report.to_json() + "\n")
    print(report)


if __name__ == "__main__":
    main()
