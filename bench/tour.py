"""The tour's table as the chapter and the first page show it: what `make tour` prints, kept, with the files that readers of
the first page try.

python bench/tour.py     trains, compresses and measures (two to three minutes); writes bench/results/tour.json and
                         tools/site/try/*.mz
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


def keep(folder, report):
    "The files that the first page names; and ten digits, the first of each kind in the validation part."
    places = {row.name: path for row, path in zip(report.rows, sorted(Path(folder).glob("*.mz")), strict=True)}
    for name, title in json.loads((TRIES / "files.json").read_text(encoding="utf-8")).items():
        shutil.copyfile(places[title], TRIES / f"{name}.mz")
    x, y = mnist5k().valid
    first = torch.stack([x[(y == digit).nonzero()[0, 0]] for digit in range(10)])
    digits = nn.Module()
    digits.register_buffer("x", (first * 255).round().to(torch.uint8))
    save(digits, TRIES / "digits.mz")


def main():
    alone = sys.argv[1:] == ["files"]
    named = [*json.loads((TRIES / "files.json").read_text(encoding="utf-8")).values()]
    with tempfile.TemporaryDirectory() as folder:
        report = tour(folder, progress=sys.stderr.isatty(), **({"techniques": named, "repeats": 2} if alone else {}))
        keep(folder, report)
    if not alone:
        report.facts["measured on"] = datetime.date.today().isoformat()
        write_whole(RESULTS, report.to_json() + "\n")
    print(report)


if __name__ == "__main__":
    main()
