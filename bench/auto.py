"""MiniLM without training: the smallest file at a cosine of 0.99 and of 0.999, of steps that `compress` finds, rounded
("rounded") and along trellises.

    python bench/auto.py            both
    python bench/auto.py 0.99       one of them

`compress` calibrates on pairs of `docstrings` from 1,200 on and chooses by 200 pairs from 600 on. The table's
cosine is then measured on the first 600 pairs, which nothing was chosen on, as `bench/ptq.py` does it. Times are of
the search alone, and of loading and expanding the file that it found; those of processors do not depend on who else is
at work.
"""

import json, sys, tempfile, time, warnings
from pathlib import Path

import torch

from ptq import TEST, Judge, calibration
from modelzip.auto import compress
from modelzip.data import docstrings, minilm
from modelzip.pack import load, save
from modelzip.quant import dequantize_model
from modelzip.recipe import Samples
from modelzip.workshop.models import Inputs

warnings.filterwarnings("ignore")
RESULTS = Path(__file__).parent / "results"
MARGIN = {
    0.99: 0.0005,
    0.999: 0.00005,
}  # wished for beyond the target, two standard errors of a mean over 400 texts: others may fare a little worse


def samples(model, size=16):
    "To calibrate with, and to choose by."
    found = docstrings(800)
    texts = sorted(found.queries[600:] + found.documents[600:], key=len)
    tokens = [model.tokenizer.encode_batch(texts[i : i + size]) for i in range(0, len(texts), size)]
    held = [
        Inputs(*(torch.tensor([getattr(t, part) for t in some]) for part in ("ids", "attention_mask")))
        for some in tokens
    ]
    return Samples(batches=calibration(model), held=held, example=held[0])


def timed(f, *args, **kwargs):
    "What a function returns, and its seconds: of the clock, and of processors."
    began, used = time.perf_counter(), time.process_time()
    out = f(*args, **kwargs)
    return out, dict(seconds=time.perf_counter() - began, processor_seconds=time.process_time() - used)


def row(model, judge, found, fp32, cosine, folder):
    "One target: what `compress` found, and what the file is worth on other sentences."
    path = Path(folder) / f"{cosine}.mz"
    how = dict(cosine=cosine + MARGIN[cosine], tries=6, progress=False)
    (_, rounded), rounding = timed(compress, model, found, **how)
    (_, report), searching = timed(compress, model, found, **how, trellis=True, path=path)
    print(report, flush=True)
    size = path.stat().st_size
    back, loading = timed(lambda: dequantize_model(load(path)))
    reached = judge(back)
    print(
        f"cos ≥ {cosine}: {size:,} bytes, {size / fp32:.4f} of fp32, cosine {reached['cosine']:.5f}, recall@1"
        f" {reached['recall']:.4f}, {searching}, loaded in {loading}",
        flush=True,
    )
    return dict(
        target=cosine,
        bytes=size,
        share=size / fp32,
        chosen_at=report.quality,
        **reached,
        **searching,
        load=loading,
        threads=torch.get_num_threads(),
        rounded=dict(bytes=rounded.bytes, cosine=rounded.quality, tries=len(rounded.tries), **rounding),
        recipe=report.recipe.to_dict(),
        tries=[
            dict(
                why=t.why,
                bytes=t.bytes,
                cosine=t.quality,
                steps=[n for n, _ in t.recipe.steps] if t.recipe else [],
                met=t.bytes is not None and report.target.met_by(t),
            )
            for t in report.tries
        ],
        layers=report.layers,
    )


def main():
    model, wanted = minilm(), [float(a) for a in sys.argv[1:]] or list(MARGIN)
    judge, found, out = Judge(model, TEST), samples(model), RESULTS / "auto.json"
    rows = {r["target"]: r for r in (json.loads(out.read_text())["rows"] if out.exists() else [])}
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "fp32.mz", archive=False)
        fp32 = (Path(folder) / "fp32.mz").stat().st_size
        for cosine in wanted:
            rows[cosine] = row(model, judge, found, fp32, cosine, folder)
            out.write_text(
                json.dumps(
                    dict(fp32_bytes=fp32, fp32_recall=judge.recall(judge.exact), rows=[rows[c] for c in sorted(rows)]),
                    indent=1,
                )
                + "\n"
            )


if __name__ == "__main__":
    main()
