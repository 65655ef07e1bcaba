"""A thousand times smaller: LeNet-5 and LeNet-300-100 as the smallest `.mz` files that lose at most a third of a
percentage point.

    python bench/record.py             three seeds in two processes, measured on the test part; writes
    bench/results/record.json and record.mz
    python bench/record.py validate    one further seed, trained without the validation images and measured on them:
    for whoever changes the numbers in NETS
    python bench/record.py smoke       the whole path in a minute, with next to no training: does it run?

The name of a network behind these does that one alone.

For each seed: (1) a full network learns from augmented images and their labels; it is the float32 reference and the
teacher. (2) A small relative learns from it, in floats. (3) Its weights are rounded to LEVELS values while it learns
on, and every bit that the file's coder will take for them has a price in the loss. (4) Steps become powers of two and
biases eight-bit floats, and a solid file is written. Every size is that of a file, every accuracy that of the model
which was loaded from it by its path alone.

Beside it NNCodec, the software of the standard for compressed networks (ISO/IEC 15938-17), codes the very same weights,
in an environment of its own: NNCODEC_PYTHON=/path/to/python python bench/record.py, where that interpreter has
`nncodec`. Where there is none it is left out, and a line says so.
"""

import copy, functools, itertools, json, os, statistics, subprocess, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelzip.data import LeNet5, LeNet300, Split, accuracy, mnist5k, seeded, train
from modelzip.distill import affine
from modelzip.measure import write_whole
from modelzip.pack import inspect, load, save
from modelzip.qat import StepAdam, WeightQuantizer, convert, prepare, quantizers_of, straight_through
from modelzip.quant import Dequantize, quantize_model

RESULTS = Path(__file__).parent / "results"
SEEDS, COPIES, TEACHING, BATCH, TEMPERATURE = (0, 1, 2), 40, 20, 128, 2.0
GENTLE = dict(degrees=6.0, shift=0.05, scale=0.07, shear=0.07)  # of `affine`, for students: they have no room for more
# LeNet-5's: chosen on the validation part; LeNet-300-100's were set once, before its first run, and not searched.
# `lines`: how wide the pictures in the rows of a matrix are, behind a `flatten`
NETS = {
    "LeNet-5": dict(
        make=LeNet5,
        student=dict(channels=[8, 16], hidden=24),
        lines={"fc1": 4},
        levels=15,
        price=0.018,
        first=1,
        then=5,
        lr=1e-2,
    ),
    "LeNet-300-100": dict(
        make=LeNet300, student=dict(hidden=[32, 16]), lines={"fc1": 28}, levels=15, price=0.01, first=1, then=4, lr=1e-2
    ),
}
LITERATURE = [  # factor, error in percent on MNIST's 10,000 test images, source
    dict(
        net="LeNet-5", name="Deep Compression", factor=39, error=0.74, source="Han, Mao & Dally 2016, arXiv:1510.00149"
    ),
    dict(
        net="LeNet-5",
        name="Sparse variational dropout",
        factor=228,
        error=1.0,
        source="Molchanov, Ashukha & Vetrov 2017, arXiv:1701.05369, by the table of arXiv:1705.08665",
    ),
    dict(
        net="LeNet-5",
        name="Bayesian Compression, fast to decode",
        factor=419,
        error=1.0,
        source="Louizos, Ullrich & Welling 2017, arXiv:1705.08665",
    ),
    dict(
        net="LeNet-5",
        name="Bayesian Compression, smallest",
        factor=771,
        error=1.0,
        source="Louizos, Ullrich & Welling 2017, arXiv:1705.08665",
    ),
    dict(
        net="LeNet-5",
        name="Entropy penalized reparameterization",
        factor=606,
        error=1.0,
        source="Oktay, Ballé, Singh & Shrivastava 2020, arXiv:1906.06624",
    ),
    dict(
        net="LeNet-5",
        name="MIRACLE, lowest error",
        factor=555,
        error=0.69,
        source="Havasi, Peharz & Hernández-Lobato 2019, arXiv:1810.00440",
    ),
    dict(
        net="LeNet-5",
        name="MIRACLE, highest compression",
        factor=1110,
        error=0.96,
        source="Havasi, Peharz & Hernández-Lobato 2019, arXiv:1810.00440",
    ),
]


class ChannelsLast(nn.Module):
    "The same network, given images in the order of memory in which pooling is quick."

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.as_strided(x.shape, (x[0].numel(), 1, x.shape[3], 1)))  # one channel: the same numbers


class Moved(nn.Module):
    "A network that sees every image moved a little, as long as it learns."

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(affine(x) if self.training else x)


def teacher(how, part, seed, epochs=TEACHING):
    "The full network, trained with augmentation on the labels."
    model = how["make"](seed=seed)
    train(Moved(ChannelsLast(model)), part, epochs, seed=seed, progress=False)
    return model


def lesson(master, part, seed, copies=COPIES):
    """Augmented images, once and for all: [images as a Split whose labels are their numbers], what the teacher says
    of them, their labels."""
    with seeded(1000 + seed), torch.no_grad():
        x = torch.cat([part.x] + [affine(part.x, **GENTLE) for _ in range(copies - 1)])
        said = torch.cat([ChannelsLast(master)(b) for b in x.split(1000)])
    return Split(x, torch.arange(len(x))), said, part.y.repeat(copies)


# --- the price: what the coder of solid files takes for codes that know their neighbours ---


def as_pictures(name: str, weight: Tensor, lines: dict) -> tuple:  # pictures, their lines, the length of a line
    "How the coder sees a weight."
    if weight.dim() > 2:
        return -1, *weight.shape[-2:]
    return (len(weight), -1, lines[name]) if name in lines else (len(weight), 1, -1)


def bits_of_codes(codes: Tensor, left: Tensor, above: Tensor, most: int) -> Tensor:  # [9 neighbourhoods, 2 most + 1]
    """What each code takes beside each pair of neighbours' signs, by how often the three questions are answered so:
    zero? by whether the neighbours are, above? by the sum of their signs, how far away? by nothing."""
    other, near = codes != 0, lambda left, above: (left != 0).long() + 2 * (above != 0).long()

    def answers(question, n):  # [n, 2]: bits of no and yes
        counts = question.bincount(minlength=2 * n).view(n, 2) + 0.5
        return (counts.sum(1, keepdim=True) / counts).log2()

    zero = answers((2 * near(left, above) + other).flatten(), 4)
    side = answers((2 * (left + above + 2) + (codes > 0))[other], 5)
    sizes = codes.abs()[other].bincount(minlength=most + 1)[1:] + 0.5
    size = (sizes.sum() / sizes).log2()
    left, above = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).t()
    where, sign = near(left, above), left + above + 2
    outside = zero[where, 1, None]
    return torch.cat([outside + side[sign, :1] + size.flip(0), zero[where, :1], outside + side[sign, 1:] + size], 1)


class Bill:
    """What the codes of a prepared model take in a solid file, but for learning. The gradient of a weight is how much
    dearer the code above it is than the one below, where it stands (after Agustsson et al. 2017, arXiv:1704.00648);
    prices change slowly, and are looked up anew at every fourth step."""

    def __init__(self, model: nn.Module, lines: dict):
        self.parts = [(q, w, as_pictures(name, w, lines)) for name, q, w in quantizers_of(model)]
        self.calls = 0

    def __call__(self) -> Tensor:
        places = [self.place(*part) for part in self.parts]
        if self.calls % 4 == 0:
            self.bits, self.dearer = zip(
                *(self.prices(u.detach(), q.levels // 2) for u, (q, *_) in zip(places, self.parts))
            )
        self.calls += 1
        return straight_through(sum(self.bits), sum((d * u).sum() for d, u in zip(self.dearer, places)))

    def place(self, quantizer: WeightQuantizer, weight: Tensor, pictures: tuple) -> Tensor:
        "Where each weight stands among the codes."
        most = quantizer.levels // 2
        return (weight / quantizer.steps(weight.numel())[0]).clamp(-most, most).view(pictures)

    @staticmethod
    def prices(u: Tensor, most: int) -> tuple[Tensor, Tensor]:
        "Bits of all codes; of each weight what the code above costs more than that below."
        codes = u.round().long()
        signs = codes.sign()
        left, above = F.pad(signs, (1, 0))[..., :-1], F.pad(signs, (0, 0, 1, 0))[:, :-1]
        bits, at = bits_of_codes(codes, left, above, most), 3 * left + above + 4
        low = u.floor().long().clamp(max=most - 1) + most
        return bits[at, codes + most].sum(), bits[at, low + 1] - bits[at, low]


def taught(model, pupils, epochs, how, seed, price=0.0):
    "Learn from teacher and labels; with a price for a thousand bits, which rises during the first half."
    images, said, labels = pupils
    calls, half = itertools.count(), epochs * len(images) / BATCH / 2
    bill = Bill(model, how["lines"]) if price else None

    def loss(out, i):
        soft = F.kl_div(
            (out / TEMPERATURE).log_softmax(1),
            (said[i] / TEMPERATURE).log_softmax(1),
            log_target=True,
            reduction="batchmean",
        )
        total = 0.5 * TEMPERATURE**2 * soft + 0.5 * F.cross_entropy(out, labels[i])
        return total + min(1.0, next(calls) / half) * price * bill() / 1000 if price else total

    is_prepared = any(isinstance(m, WeightQuantizer) for m in model.modules())
    optimizer = functools.partial(StepAdam, model=model) if is_prepared else torch.optim.Adam
    train(ChannelsLast(model), images, epochs, how["lr"], BATCH, seed, progress=False, loss=loss, optimizer=optimizer)
    return model


def student(how, seed):
    """A small relative. In LeNet-5 no nonlinearity but pooling follows the convolutions, so that their biases only
    move those of fc1: they stay zero. (How it began is no part of its file.)"""
    model = how["make"](**how["student"])
    with seeded(100 + seed):
        for m in model.children():
            m.reset_parameters()
            if isinstance(m, nn.Conv2d):
                nn.init.zeros_(m.bias).requires_grad_(False)
    return model


@torch.no_grad()
def whole_steps(model):
    """A copy of a converted network whose steps are powers of two, and whose biases are eight-bit floats. Where
    layers follow each other through nothing but maxima and ReLU, a positive factor of one multiplies all that comes
    later, if biases are multiplied as well: no answer changes but by the rounding of biases. (Steps that were only
    rounded would change them: weights would no longer fit each other.)"""
    model, factor = copy.deepcopy(model), 1.0
    for layer in model.children():
        whole = layer.q.scale.log2().round().exp2()
        factor = factor * whole / layer.q.scale
        layer.q.scale.copy_(whole)
        layer.bias.copy_((layer.bias * factor).to(torch.float8_e4m3fn))
    return model


def learned(how, part, seed, scale=1):
    "The full network, the small one, the same rounded, and with a price on bits; seconds of one processor."
    began, times = time.process_time(), {}

    def clock(name):
        times[name] = round(time.process_time() - began - sum(times.values()), 1)

    master = teacher(how, part, seed, max(1, TEACHING // scale))
    clock("teacher")
    pupils = lesson(master, part, seed, max(2, COPIES // scale))
    clock("what it says")
    small = taught(student(how, seed), pupils, how["first"], how, seed)
    clock("student")
    free = prepare(small, levels=how["levels"], activations=None, per_channel=False)
    taught(free, pupils, 1, how, seed)
    clock("rounding")
    paid = taught(copy.deepcopy(free), pupils, how["then"], how, seed, how["price"])
    clock("rounding and price")
    return (master, small, free, paid), times


def files(how, master, small, free, paid):
    "From the full network to the smallest file: (step, model, how it is saved)."
    return [
        ("float32", master, False),
        ("float32, entropy-coded", master, True),
        ("small student, float32", small, True),
        ("8 bits, rounded afterwards", quantize_model(small, 8, per_channel=False), True),
        (f"{how['levels']} levels, trained", convert(free), True),
        ("a price on bits", convert(paid), True),
        ("solid file", convert(paid), "solid"),
        ("8-bit biases, whole steps", whole_steps(convert(paid)), "solid"),
    ]


def measured(made, split, on):
    "Bytes and accuracies of every step's file, loaded back by its path; the last file."
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (step, model, archive) in enumerate(made):
            path = save(model, Path(folder) / f"{i}.mz", archive)
            rows.append(dict(step=step, bytes=os.path.getsize(path)) | {on: accuracy(load(path), split)})
        rows[-1]["tensors"] = {line.name: line.bytes for line in inspect(path).lines}
        return rows, path.read_bytes()


# --- the standard's codec, beside it ---

# self-contained: the peer's interpreter need not have this library
PEER_PROGRAM = """
import json, sys
import numpy as np
import torch

for name in ("nms", "qnms"):  # of a torchvision for another torch
    torch.library.define("torchvision::" + name, "(Tensor a, Tensor b, float c) -> Tensor")
from nncodec import nnc

folder = sys.argv[1]
for i, (name, qp, trellis) in enumerate(json.load(open(folder + "/jobs.json"))):
    weights = dict(np.load(f"{folder}/{name}.npz"))
    data = nnc.compress(weights, None, qp=qp, use_dq=trellis, row_skipping=True, return_bitstream=True)
    np.savez(f"{folder}/{i}.npz", **nnc.decompress(data))
    print("bytes", len(data), flush=True)
"""
PEER = os.environ.get("NNCODEC_PYTHON")
# weights, quantization parameters (the step is 2^(qp/4), and between these straight); -32 is the default
PEER_JOBS = {"float32": (-32,), "student": (-32, -20, -16, -12), "priced": (-8, -4, 0, 4), "codes": (0,)}


def apart(model: nn.Module) -> tuple[dict, dict]:
    "Weights, biases."
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {n: p for n, p in state.items() if p.dim() > 1}, {n: p for n, p in state.items() if p.dim() == 1}


def in_steps(paid: nn.Module) -> tuple[dict, dict]:
    """Weights in units of their steps, before they are rounded, and biases that go with them: all answers are
    multiplied by one number."""
    weights, biases, factor = {}, {}, 1.0
    for (name, quantizer, weight), layer in zip(quantizers_of(paid), paid.children()):
        step = quantizer.steps(weight.numel())[0].detach()
        factor = factor * step
        weights[f"{name}.weight"], biases[f"{name}.bias"] = weight.detach() / step, layer.bias.detach() / factor
    return weights, biases


def peer_rows(how: dict, models: tuple, split: Split, on: str) -> list[dict]:
    """What NNCodec makes of the very weights: with its trellis, which is its default, and without. Bytes are its
    stream's, which has no biases in it, accuracies those of what it decodes, with the biases as they were."""
    full, small, _, paid = models
    priced, biases = in_steps(paid)
    codes = {n: w.round().clamp(-(how["levels"] // 2), how["levels"] // 2) for n, w in priced.items()}
    given = {"float32": apart(full), "student": apart(small), "priced": (priced, biases), "codes": (codes, biases)}
    jobs = [(n, qp, t) for n, qps in PEER_JOBS.items() for t in (True, False)[n == "codes" :] for qp in qps]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (weights, _) in given.items():
            np.savez(f"{folder}/{name}.npz", **{n: w.numpy() for n, w in weights.items()})
        Path(folder, "jobs.json").write_text(json.dumps(jobs))
        said = subprocess.run([PEER, "-c", PEER_PROGRAM, folder], check=True, capture_output=True, text=True).stdout
        sizes = [int(line.split()[1]) for line in said.splitlines() if line.startswith("bytes ")]
        for i, ((name, qp, trellis), size) in enumerate(zip(jobs, sizes, strict=True)):
            decoded = {n: torch.from_numpy(np.asarray(w)) for n, w in np.load(f"{folder}/{i}.npz").items()}
            model = copy.deepcopy(full if name == "float32" else small)
            model.load_state_dict(decoded | given[name][1])
            rows.append(dict(weights=name, qp=qp, trellis=trellis, bytes=size) | {on: accuracy(model, split)})
    return rows


def run(job):
    "One seed of one network."
    name, seed, part, on, scale = job
    torch.set_num_threads(1)
    data, how = mnist5k(), NETS[name]
    models, times = learned(how, getattr(data, part), seed, scale)
    split = getattr(data, on)
    rows, last = measured(files(how, *models), split, on)
    return name, seed, rows, peer_rows(how, models, split, on) if PEER and name == "LeNet-5" else [], times, last


def summary(name, runs, on):
    "Means over the seeds."
    weights = 4 * sum(p.numel() for p in NETS[name]["make"]().parameters())
    mean = lambda i, key: statistics.mean(r["rows"][i][key] for r in runs)
    table = [
        dict(step=row["step"], bytes=mean(i, "bytes"), factor=weights / mean(i, "bytes")) | {on: mean(i, on)}
        for i, row in enumerate(runs[0]["rows"])
    ]
    for row in table:
        print(f"{name:<15}{row['step']:<28}{row['bytes']:>12,.0f}{row['factor']:>8,.0f}×  {100 * row[on]:.2f} %")
    for i, row in enumerate(runs[0]["peer"]):
        means = {key: statistics.mean(r["peer"][i][key] for r in runs) for key in ("bytes", on)}
        said = f"NNCodec, {row['weights']}, qp {row['qp']}{', trellis' if row['trellis'] else ''}"
        print(f"{name:<15}{said:<40}{means['bytes']:>12,.0f}  {100 * means[on]:.2f} %")
    how = {k: v for k, v in NETS[name].items() if k != "make"}
    return dict(how=how, weights=weights, table=table, lost=100 * (table[0][on] - table[-1][on]), runs=runs)


def minutes(runs):
    "What the seeds took, added up: two of them run at the same time, and those of one network beside another's."
    return round(sum(sum(r["seconds"].values()) for r in runs) / 60, 1)


def store(out, path=RESULTS / "record.json"):
    "Put these networks beside those that the table has already."
    old = json.loads(path.read_text())["nets"] if path.exists() else {}
    nets = old | out["nets"]
    write_whole(path, json.dumps(out | {"nets": {name: nets[name] for name in NETS if name in nets}}, indent=1) + "\n")


def main(names, scale=1, seeds=SEEDS, part="fit", on="test", write=True):
    found = {name: [] for name in names}
    out = {
        "seeds": seeds,
        "teaching": TEACHING,
        "copies": COPIES,
        "torch": torch.__version__,
        "literature": LITERATURE,
        "nets": {},
    }
    if not PEER:
        print("NNCodec is left out: NNCODEC_PYTHON names no interpreter that has it")
    with ProcessPoolExecutor(2) as pool:
        for name, seed, rows, peer, times, last in pool.map(
            run, [(name, seed, part, on, scale) for name in names for seed in seeds]
        ):
            found[name].append(dict(seed=seed, rows=rows, peer=peer, seconds=times))
            print(name, seed, rows[0][on], rows[-1]["bytes"], rows[-1][on], times, flush=True)
            if write and name == "LeNet-5" and seed == seeds[0]:
                (RESULTS / "record.mz").write_bytes(last)
            if len(found[name]) < len(seeds):
                continue
            out["nets"][name] = summary(name, found[name], on) | {"minutes": minutes(found[name])}
            if write:
                store(out)


if __name__ == "__main__":
    chosen = [name for name in NETS if name in sys.argv] or list(NETS)
    if "validate" in sys.argv:
        main(chosen, seeds=(10,), part="train", on="valid", write=False)
    elif "smoke" in sys.argv:
        main(chosen, scale=40, seeds=(10,), part="train", on="valid", write=False)
    else:
        main(chosen)
