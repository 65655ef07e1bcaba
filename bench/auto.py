"""MiniLM without training: the smallest file at a cosine of 0.99 and of 0.999, by mixed precision that `compress` finds.

    python bench/auto.py            both (tens of minutes on one thread)
    python bench/auto.py 0.99       one of them

What `compress` looks at, to calibrate and to choose by, are pairs of `docstrings` from 1,200 on. The table's cosine is then measured on the 600 pairs before, which nothing was chosen on, as `bench/ptq.py` does it.
"""
import json, sys, tempfile, time, warnings
from pathlib import Path

from ptq import TEST, Judge, as_file, calibration
from modelzip.auto import compress
from modelzip.data import minilm
from modelzip.pack import load, save
from modelzip.quant import dequantize_model

warnings.filterwarnings("ignore")
RESULTS = Path(__file__).parent / "results"
MARGIN = {0.99: 0.0003, 0.999: 0.00003}     # wished for beyond the target: other sentences may fare a little worse


def row(model, judge, batches, fp32, cosine, folder):
    "One target: what `compress` found, and what the file is worth on other sentences."
    began, path = time.perf_counter(), Path(folder) / f"{cosine}.mz"
    _, report = compress(model, batches, cosine=cosine + MARGIN[cosine], tries=6, path=path, progress=False)
    print(report, flush=True)
    size = path.stat().st_size
    found = judge(dequantize_model(load(path)))
    print(f"cos ≥ {cosine}: {size:,} bytes, {size / fp32:.4f} of fp32, cosine {found['cosine']:.5f}, recall@1 {found['recall']:.4f}", flush=True)
    return dict(target=cosine, bytes=size, share=size / fp32, chosen_at=report.quality, **found, seconds=time.perf_counter() - began, recipe=report.recipe.to_dict(),
                tries=[dict(why=t.why, bytes=t.bytes, cosine=t.quality) for t in report.tries], layers=report.layers)


def main():
    model, wanted = minilm(), [float(a) for a in sys.argv[1:]] or list(MARGIN)
    judge, batches, out = Judge(model, TEST), calibration(model), RESULTS / "auto.json"
    rows = {r["target"]: r for r in (json.loads(out.read_text())["rows"] if out.exists() else [])}
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "fp32.mz", archive=False)
        fp32 = (Path(folder) / "fp32.mz").stat().st_size
        for cosine in wanted:
            rows[cosine] = row(model, judge, batches, fp32, cosine, folder)
            out.write_text(json.dumps(dict(fp32_bytes=fp32, fp32_recall=judge.recall(judge.exact), rows=[rows[c] for c in sorted(rows)]), indent=1) + "\n")


if __name__ == "__main__": main()
