"""A small student with and without a teacher: everything equal but the loss, five seeds, differences with their
interval.

python bench/distill.py            five seeds, measured once on the test part; writes bench/results/distill.json
python bench/distill.py few        only the table without labels, into the file that is there
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


def halves(seed):
    "Two halves of the digits with labels: one for the teacher, one for the student."
    data = mnist5k().fit
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return data[order[: len(data) // 2]], data[order[len(data) // 2 :]]


def unlabelled(seed):
    """A student of the second half, three times with as many steps: from FEW labels, from all, and from none but the
    word of a teacher that was trained on the first half and has seen none of these images."""
    torch.set_num_threads(1)
    known, others = halves(seed)
    master = LeNet5(seed=seed)
    distill(master, copy.deepcopy(master), known, Labels(), 2 * EPOCHS, seed=seed, augment=affine, progress=False)
    found, test = {}, mnist5k().test
    for name, part in ((f"{FEW} labels", others[:FEW]), ("all labels", others)):
        student = LeNet5(seed=100 + seed, **SMALL)
        train(student, part, 2 * EPOCHS * len(others) // len(part), LR, seed=seed, progress=False)
        found[name] = accuracy(student, test)
    student, blank = LeNet5(seed=100 + seed, **SMALL), Split(others.x, torch.zeros_like(others.y))
    distill(student, master, blank, SoftTargets(SOFT["temperature"]), 2 * EPOCHS, LR, seed=seed, progress=False)
    return found | {"no label, a teacher's word": accuracy(student, test), "its teacher": accuracy(master, test)}


def few_rows():
    "Accuracies by row, and what the last student gains over the one with FEW labels, and over the one with all."
    with ProcessPoolExecutor(2) as pool:
        found = [*pool.map(unlabelled, SEEDS)]
    a = {name: [f[name] for f in found] for name in found[0]}
    few, full, taught = a[f"{FEW} labels"], a["all labels"], a["no label, a teacher's word"]
    rows = [{"name": name, "accuracy": values} for name, values in a.items()]
    rows[2] |= interval(taught, few) | {"behind all labels": interval(full, taught)}
    return rows


def store_few():
    table = json.loads(RESULTS.read_text())
    table["unlabelled"] = few_rows()
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    for r in table["unlabelled"]:
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
    RESULTS.write_text(
        json.dumps(
            {
                "seeds": SEEDS,
                "epochs": EPOCHS,
                "lr": LR,
                "parameters": sum(p.numel() for p in LeNet5(**SMALL).parameters()),
                "rows": rows,
                "unlabelled": few_rows(),
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
