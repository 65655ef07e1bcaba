"""A small student with and without a teacher: everything equal but the loss, five seeds, differences with their
interval.

python bench/distill.py            five seeds, measured once on the test part; writes bench/results/distill.json
python bench/distill.py few        only the rows with few labels, into the table that is there
python bench/distill.py validate   temperatures and weights compared on the validation part
"""

import copy, functools, json, statistics, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from scipy.stats import t as student_t

from modelzip.data import LeNet5, Split, accuracy, mnist5k, train
from modelzip.distill import AttentionTransfer, Hints, Labels, Logits, Relations, SoftTargets, affine, distill

RESULTS = Path(__file__).parent / "results" / "distill.json"
SEEDS, EPOCHS, LR = (0, 1, 2, 3, 4), 10, 5e-3
SMALL, FEW = dict(channels=[5, 10], hidden=40), 300
SOFT = dict(temperature=2.0, labels=0.5)  # chosen on the validation part
LOSSES = {  # name → (makes the loss, images augmented?)
    "labels alone": (Labels, False),
    "soft targets": (lambda: mixed(**SOFT), False),
    "labels, augmented": (Labels, True),
    "soft targets, augmented": (lambda: mixed(**SOFT), True),
    "logits, augmented": (lambda: 0.1 * Logits() + 0.1 * Labels(), True),
    "soft targets + hints, augmented": (lambda: mixed(**SOFT) + 0.5 * Hints({"conv2": "conv2"}), True),
    "soft targets + attention, augmented": (
        lambda: mixed(**SOFT) + 10 * AttentionTransfer({"conv1": "conv1", "conv2": "conv2"}),
        True,
    ),
    "soft targets + relations, augmented": (lambda: mixed(**SOFT) + Relations("fc1", "fc1"), True),
}


def mixed(temperature, labels):
    return (1 - labels) * SoftTargets(temperature) + labels * Labels()


@functools.cache
def teacher(seed, part, epochs=10):
    "LeNet-5, trained with augmentation: the better it is, the more it has to tell."
    torch.set_num_threads(1)
    first = LeNet5(seed=seed)
    return distill(
        first,
        copy.deepcopy(first),
        getattr(mnist5k(), part),
        Labels(),
        epochs=epochs,
        seed=seed,
        augment=affine,
        progress=False,
    )


def one(name, seed, part, on, make=None):
    "Accuracy of one student."
    torch.set_num_threads(1)
    data = mnist5k()
    loss, augmented = LOSSES[name] if make is None else make
    student = LeNet5(seed=100 + seed, **SMALL)
    torch.manual_seed(seed)
    distill(
        student,
        teacher(seed, part),
        getattr(data, part),
        loss(),
        EPOCHS,
        LR,
        seed=seed,
        augment=affine if augmented else None,
        progress=False,
    )
    return accuracy(student, getattr(data, on))


def validation(job):
    temperature, labels = job
    return job, one("", 10, "train", "valid", (functools.partial(mixed, temperature, labels), True))


def measured(job):
    name, seed = job
    data = mnist5k()
    return (
        name,
        seed,
        accuracy(teacher(seed, "fit"), data.test) if name == "teacher" else one(name, seed, "fit", "test"),
    )


def few(job):
    """FEW labels, as many steps as the others: alone, or with a teacher's word on all images, whose labels the
    student never sees."""
    seed, taught = job
    torch.set_num_threads(1)
    data = mnist5k()
    student = LeNet5(seed=100 + seed, **SMALL)
    if taught:
        distill(
            student,
            teacher(seed, "fit"),
            Split(data.fit.x, torch.zeros_like(data.fit.y)),
            SoftTargets(SOFT["temperature"]),
            EPOCHS,
            LR,
            seed=seed,
            progress=False,
        )
    else:
        train(
            student,
            data.fit[torch.randperm(len(data.fit), generator=torch.Generator().manual_seed(seed))[:FEW].tolist()],
            EPOCHS * len(data.fit) // FEW,
            LR,
            seed=seed,
            progress=False,
        )
    return accuracy(student, data.test)


def few_rows():
    with ProcessPoolExecutor(2) as pool:
        alone, taught = ([*pool.map(few, [(s, how) for s in SEEDS])] for how in (False, True))
    name = f"{FEW} labels alone"
    return [
        {"name": name, "accuracy": alone},
        {"name": "no label, the teacher's word on all images", "accuracy": taught} | interval(taught, alone),
    ]


def store_few():
    table = json.loads(RESULTS.read_text())
    rows = few_rows()
    table["rows"] = [r for r in table["rows"] if r["name"] not in [f["name"] for f in rows]] + rows
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    for r in rows:
        print(r)


def interval(a, b):
    "Mean difference in percentage points and its 95 % interval, over pairs of one seed."
    d = [100 * (x - y) for x, y in zip(a, b)]
    half = student_t.ppf(0.975, len(d) - 1) * statistics.stdev(d) / len(d) ** 0.5
    return dict(gain=statistics.mean(d), low=statistics.mean(d) - half, high=statistics.mean(d) + half)


def main():
    found = {}
    jobs = [(name, seed) for seed in SEEDS for name in ["teacher", *LOSSES]]
    with ProcessPoolExecutor(2) as pool:
        for name, seed, a in pool.map(
            measured, jobs, chunksize=len(LOSSES) + 1
        ):  # a worker has all jobs of one seed, and so one teacher
            found.setdefault(name, {})[seed] = a
            print(seed, name, a, flush=True)
    rows = []
    for name in found:
        a = [found[name][s] for s in SEEDS]
        row = {"name": name if name != "teacher" else "teacher, augmented", "accuracy": a}
        base = "labels, augmented" if name.endswith("augmented") else "labels alone"
        if name not in ("teacher", base):
            row |= interval(a, [found[base][s] for s in SEEDS])
        rows.append(row)
    rows += few_rows()
    RESULTS.write_text(
        json.dumps(
            {
                "seeds": SEEDS,
                "epochs": EPOCHS,
                "lr": LR,
                "parameters": sum(p.numel() for p in LeNet5(**SMALL).parameters()),
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )
    for r in rows:
        print(
            f"{r['name']:<44}{100 * statistics.mean(r['accuracy']):.2f}",
            *(f"{k} {r[k]:+.2f}" for k in ("gain", "low", "high") if k in r),
        )


def validate():
    with ProcessPoolExecutor(2) as pool:
        print("labels, augmented", one("labels, augmented", 10, "train", "valid"), flush=True)
        for job, a in pool.map(validation, [(t, l) for t in (1.0, 2.0, 4.0, 8.0) for l in (0.1, 0.5)]):
            print(job, a, flush=True)


if __name__ == "__main__":
    validate() if "validate" in sys.argv else store_few() if "few" in sys.argv else main()
