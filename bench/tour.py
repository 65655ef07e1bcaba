"""The tour's table as the chapter and the first page show it: what `make tour` prints, kept.

python bench/tour.py     trains, compresses and measures (two to three minutes); writes bench/results/tour.json
"""

import datetime, sys, tempfile
from pathlib import Path

from modelzip.measure import write_whole
from modelzip.tour import tour

RESULTS = Path(__file__).parent / "results" / "tour.json"


def main():
    with tempfile.TemporaryDirectory() as folder:
        report = tour(folder, progress=sys.stderr.isatty())
    report.facts["measured on"] = datetime.date.today().isoformat()
    write_whole(RESULTS, report.to_json() + "\n")
    print(report)


if __name__ == "__main__":
    main()
