"""LeNet-5 with few bits: rounded after training against trained through rounding, three seeds, from files loaded back.

    python bench/qat.py            three seeds, measured once on the test part; writes bench/results/qat.json (about
    ten minutes)
    python bench/qat.py validate   learning rates compared on the validation part, where LR was chosen

float32 trains six epochs; what trains through rounding starts there and trains EPOCHS more. "float32, trained on"
has the same further epochs without rounding, so that nobody takes the longer training for a merit of the rounding.
"""

import json, statistics, sys, tempfile
from pathlib import Path

import torch

from modelzip.data import LeNet5, accuracy, mnist5k, train
from modelzip.pack import load, save
from modelzip.qat import convert, freeze, prepare
from modelzip.quant import quantize_model

RESULTS = Path(__file__).parent / "results" / "qat.json"
EPOCHS, SEEDS = 6, (0, 1, 2)
CASES = {  # name → arguments of prepare, and of quantize_model for rounding afterwards
    "8 bits, 8 bits": (dict(bits=8), dict(bits=8)),
    "4 bits, 8 bits": (dict(bits=4), dict(bits=4, observer="mse")),
    "4 bits, 4 bits": (dict(bits=4, activations=4), None),
    "3 bits, 8 bits": (dict(bits=3), dict(bits=3, observer="mse")),
    "2 bits, 8 bits": (dict(bits=2), dict(bits=2, observer="mse")),
    "2 bits, float": (dict(bits=2, activations=None), None),
    "ternary, 8 bits": (dict(levels=3), dict(levels=3, observer="mse")),
    "binary, 8 bits": (dict(bits=1), dict(bits=1)),
}
LR = 1e-3  # chosen on the validation part, among 3e-4, 1e-3 and 3e-3: best or equal in most cases


def trained(model, part, how, lr, seed, calibration):
    "Prepare and train; the last epoch with frozen ranges."
    prepared = prepare(model, batches=[calibration], **how)
    after = lambda epoch, loss: freeze(prepared) if epoch == EPOCHS - 1 else None
    return convert(train(prepared, part, epochs=EPOCHS, lr=lr, seed=100 + seed, progress=False, after_epoch=after))


def file_of(model, folder):
    "The model loaded back from its file, and the file's bytes."
    path = save(model, Path(folder) / "model.mz", archive=True)
    return load(path), path.stat().st_size


def validate():
    data = mnist5k()
    for seed in (10,):  # none of SEEDS
        base = train(LeNet5(), data.train, seed=seed, progress=False)
        print(f"seed {seed}: float32 {accuracy(base, data.valid):.3f}", flush=True)
        for name, (how, _) in CASES.items():
            found = {
                lr: accuracy(trained(base, data.train, how, lr, seed, data.train.x[:500]), data.valid)
                for lr in (3e-4, 1e-3, 3e-3)
            }
            print(f"  {name:<20}" + "  ".join(f"{lr:g}: {a:.3f}" for lr, a in found.items()), flush=True)


def main():
    data, rows = mnist5k(), {}

    def add(name, key, value):
        rows.setdefault(name, {"name": name}).setdefault(key, []).append(value)

    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            base = train(LeNet5(), data.fit, seed=seed, progress=False)
            longer = train(
                train(LeNet5(), data.fit, seed=seed, progress=False),
                data.fit,
                epochs=EPOCHS,
                lr=LR,
                seed=100 + seed,
                progress=False,
            )
            for name, model in {"float32": base, "float32, trained on": longer}.items():
                again, size = file_of(model, folder)
                add(name, "accuracy", accuracy(again, data.test)), add(name, "bytes", size)
            for name, (how, crude) in CASES.items():
                again, size = file_of(trained(base, data.fit, how, LR, seed, data.fit.x[:500]), folder)
                add(name, "accuracy", accuracy(again, data.test)), add(name, "bytes", size)
                if crude:
                    add(name, "rounded", accuracy(file_of(quantize_model(base, **crude), folder)[0], data.test))
                print(seed, name, rows[name]["accuracy"][-1], size, flush=True)
    RESULTS.write_text(
        json.dumps(
            {"epochs": EPOCHS, "seeds": SEEDS, "torch": torch.__version__, "rows": list(rows.values())}, indent=1
        )
        + "\n"
    )
    for r in rows.values():
        print(
            f"{r['name']:<24}{100 * statistics.mean(r['accuracy']):.2f} % "
            f" {min(r['accuracy']):.3f}–{max(r['accuracy']):.3f}"
        )


if __name__ == "__main__":
    validate() if "validate" in sys.argv else main()
