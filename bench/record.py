"""A thousand times smaller: LeNet-5 as the smallest `.mz` file that loses at most half a percentage point, and
LeNet-300-100 by the recipe that did so before.

    python bench/record.py             three seeds in two processes, measured on the test part; writes
    bench/results/record.json and record.mz
    python bench/record.py validate    one further seed, trained without the validation images and measured on them:
    for whoever changes the numbers in NETS
    python bench/record.py smoke       the whole path in a minute, with next to no training: does it run?

The name of a network behind these does that one alone.

For each seed: (1) a full network learns from augmented images and their labels; it is the float32 reference and the
teacher. (2) A small relative learns from it, in floats. (3) Its weights are rounded to LEVELS values while it
learns on, and every bit has a price in the loss: those that the coder of the file will take for LeNet-5's, those of the
entropy for LeNet-300-100's. (4) Steps become powers of two, biases floats of few bits, units and channels stand in an
order that the coder likes, and a solid file is written; the first seed's is record.mz. Every size is that of a file,
every accuracy that of the model which was loaded from it by its path alone.
"""

import copy, functools, itertools, json, math, os, random, statistics, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from modelzip.coding import AdaptiveEncoder, adaptive_bytes, adaptive_codes
from modelzip.data import LeNet5, LeNet300, Split, accuracy, mnist5k, seeded, train
from modelzip.distill import Labels, affine, distill
from modelzip.measure import write_whole
from modelzip.pack import inspect, load, save
from modelzip.qat import StepAdam, WeightQuantizer, convert, entropy_bits, prepare, quantizers_of, straight_through
from modelzip.quant import pack_bits, quantize_model

RESULTS = Path(__file__).parent / "results"
SEEDS, COPIES, TEACHING, TEMPERATURE = (0, 1, 2), 40, 20, 2.0
GENTLE = dict(degrees=6.0, shift=0.05, scale=0.07, shear=0.07)  # of `affine`, for students: they have no room for more
# LeNet-5's: chosen on ten versions of each validation digit, nine of them turned and moved, where of the trials in
# results/record_former.json the recipe before lost more; LeNet-300-100's were set once, before its first run, and not
# searched. `pictures`: how long the lines of the pictures are that the rows of a matrix have, where the price is that of
# the coder
NETS = {
    "LeNet-5": dict(
        make=LeNet5,
        student=dict(channels=[8, 16], hidden=24),
        levels=15,
        pictures={"fc1": 4},
        price=0.013,
        batch=256,
        first=5,
        then=18,
        lr=1e-2,
    ),
    "LeNet-300-100": dict(
        make=LeNet300, student=dict(hidden=[32, 16]), levels=15, price=0.01, batch=128, first=1, then=4, lr=1e-2
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


def teacher(how, part, seed, epochs=TEACHING):
    "The full network, trained with augmentation on the labels."
    first = how["make"](seed=seed)
    with seeded(seed):
        return distill(
            first, copy.deepcopy(first), part, Labels(), epochs=epochs, seed=seed, augment=affine, progress=False
        )


def lesson(master, part, seed, copies=COPIES):
    """Augmented images, once and for all: [images as a Split whose labels are their numbers], what the teacher says
    of them, their labels."""
    with seeded(1000 + seed), torch.no_grad():
        x = torch.cat([part.x] + [affine(part.x, **GENTLE) for _ in range(copies - 1)])
        said = torch.cat([master(b) for b in x.split(1000)])
    return Split(x, torch.arange(len(x))), said, part.y.repeat(copies)


class Quick(nn.Module):
    """The same network, given images in the order of memory in which pooling is quick; while it learns, its layers
    multiply in bfloat16."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        x = x.as_strided(x.shape, (x[0].numel(), 1, x.shape[3], 1))  # one channel: the same numbers
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            return self.model(x).float()


def as_pictures(name, weight, lines):  # pictures, their lines, the length of a line
    "How the coder sees a weight."
    if weight.dim() > 2:
        return -1, *weight.shape[-2:]
    return (len(weight), -1, lines[name]) if name in lines else (len(weight), 1, -1)


def bits_of_codes(codes, left, above, most):  # [9 neighbourhoods, 2 most + 1]
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

    def __init__(self, model, lines):
        self.parts = [(q, w, as_pictures(name, w, lines)) for name, q, w in quantizers_of(model)]
        self.calls = 0

    def __call__(self):
        steps = [q.steps(w.numel()).view(()) for q, w, _ in self.parts]
        if self.calls % 4 == 0:
            looked = zip(*(self.prices(w, s, q.levels // 2, p) for s, (q, w, p) in zip(steps, self.parts)))
            self.bits, self.dearer = sum(next(looked)), next(looked)
        self.calls += 1
        slope = sum((d * w).sum() / s for d, s, (_, w, _) in zip(self.dearer, steps, self.parts))
        return straight_through(self.bits, slope)

    @staticmethod
    @torch.no_grad()
    def prices(weight, step, most, pictures):
        "Bits of all codes; of each weight what the code above costs more than that below, nothing beyond the last."
        u = (weight / step).clamp(-most, most).view(pictures)
        codes = u.round().long()
        signs = codes.sign()
        left, above = F.pad(signs, (1, 0))[..., :-1], F.pad(signs, (0, 0, 1, 0))[:, :-1]
        bits, at = bits_of_codes(codes, left, above, most), 3 * left + above + 4
        low = u.floor().long().clamp(max=most - 1) + most
        dearer = (bits[at, low + 1] - bits[at, low]) * (u.abs() < most)
        return bits[at, codes + most].sum(), dearer.view_as(weight)


def taught(model, pupils, epochs, how, seed, price=0.0):
    "Learn from teacher and labels; with a price for a thousand bits, which rises during the first half."
    images, said, labels = pupils
    calls, half = itertools.count(), epochs * len(images) / how["batch"] / 2
    bits = Bill(model, how["pictures"]) if price and "pictures" in how else lambda: entropy_bits(model)

    def loss(out, i):
        soft = F.kl_div(
            (out / TEMPERATURE).log_softmax(1),
            (said[i] / TEMPERATURE).log_softmax(1),
            log_target=True,
            reduction="batchmean",
        )
        total = 0.5 * TEMPERATURE**2 * soft + 0.5 * F.cross_entropy(out, labels[i])
        return total + min(1.0, next(calls) / half) * price * bits() / 1000 if price else total

    is_prepared = any(isinstance(m, WeightQuantizer) for m in model.modules())
    optimizer = functools.partial(StepAdam, model=model) if is_prepared else torch.optim.Adam
    learner = Quick(model) if "pictures" in how else model
    train(learner, images, epochs, how["lr"], how["batch"], seed, progress=False, loss=loss, optimizer=optimizer)
    return model


def student(how, seed):
    """A small relative. In LeNet-5 no nonlinearity but pooling follows the convolutions, so that their biases only
    move those of fc1: they stay zero. How it began is no part of its file."""
    model = how["make"](**how["student"])
    model.load_state_dict(how["make"](seed=100 + seed, **how["student"]).state_dict())
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        nn.init.zeros_(conv.bias).requires_grad_(False)
    return model


@torch.no_grad()
def rounded(model):
    """A copy of a prepared model whose biases are eight-bit floats. (Its steps stay: a price on bits leaves many
    weights beside a border between two codes, and the slightest change of a step moves them across; on validation
    digits that cost half a percentage point.)"""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(getattr(m, "bias", None), nn.Parameter):
            m.bias.copy_(m.bias.to(torch.float8_e4m3fn))
    return model


@torch.no_grad()
def lean(model):
    """A copy of a converted network whose steps are powers of two, and whose biases have one bit behind the first.
    Where layers follow each other through nothing but maxima and ReLU, a positive factor of one multiplies all that
    comes later, if biases are multiplied as well: no answer changes but by the rounding of biases, and all by one
    factor near one. (Steps that were only rounded would change them: weights would no longer fit each other.) Which
    powers have that product, the coder chooses."""
    model = copy.deepcopy(model)
    layers = list(model.children())
    exact = [math.log2(layer.q.scale) for layer in layers]

    def made(powers):
        factor = 1.0
        for layer, power in zip(layers, powers):
            factor = factor * 2.0**power / layer.q.scale
            first, power_of_two = torch.frexp(layer.bias * factor)
            yield torch.full_like(layer.q.scale, 2.0**power), torch.ldexp((first * 4).round() / 4, power_of_two)

    def cost(powers):
        encoder = AdaptiveEncoder()
        for t in itertools.chain(*made(powers)):
            adaptive_bytes(encoder, 4 * t.numel(), 4, "float32", t.numpy().tobytes())
        return 8 * len(encoder.out) - math.log2(encoder.width)

    powers = [round(power) for power in exact]
    powers[-1] += round(sum(exact)) - sum(powers)
    for up, down in [*itertools.permutations(range(len(layers)), 2)] * 2:
        others = [[p + k * ((i == up) - (i == down)) for i, p in enumerate(powers)] for k in range(9)]
        powers = min(others, key=cost)
    for layer, (step, bias) in zip(layers, [*made(powers)]):
        layer.q.scale.copy_(step)
        layer.bias.copy_(bias)
    return model


def bits_of(codes, levels):
    "What the coder of a solid file takes for a layer's codes less the middle one, to the fraction of a bit."
    encoder, values = AdaptiveEncoder(), (codes + levels // 2).flatten().tolist()
    adaptive_codes(encoder, len(values), levels, codes=values, shape=list(codes.shape))
    return 8 * len(encoder.out) - math.log2(encoder.width)


def reordered(codes, later, order):
    "The outputs of a layer in another order, and the inputs of the next one with them."
    return codes[order], later.view(len(later), len(order), -1)[:, order].reshape(later.shape)


@torch.no_grad()
def in_order(model, tries=250):
    """A copy of a converted network that computes the same, sums in another order, and takes fewer bytes. What stands
    between two layers has no order of its own: from that by the number of weights we try to put one elsewhere, and keep
    what helps."""
    model, draw = copy.deepcopy(model), random.Random(0)
    layers = list(model.children())
    codes, levels = [m.q.unpack().int() - m.q.levels // 2 for m in layers], [m.q.levels for m in layers]
    for i in reversed(range(len(layers) - 1)):
        cost = lambda order: sum(map(bits_of, reordered(*codes[i : i + 2], order), levels[i:]))
        order = (codes[i] != 0).flatten(1).sum(1).argsort(stable=True).tolist()
        least = cost(order)
        for _ in range(tries):
            other = order.copy()
            other.insert(draw.randrange(len(order)), other.pop(draw.randrange(len(order))))
            if (bits := cost(other)) < least:
                order, least = other, bits
        codes[i : i + 2] = reordered(*codes[i : i + 2], order)
        layers[i].bias.copy_(layers[i].bias[order])
    for layer, c in zip(layers, codes):
        layer.q.codes.copy_(pack_bits(c + layer.q.levels // 2, layer.q.bits))
    return model


def steps(how, part, seed, scale=1):
    "From the full network to the smallest file: (name, model, how it is saved), and seconds of one processor."
    began, times = time.process_time(), {}

    def clock(name):
        times[name] = round(time.process_time() - began - sum(times.values()), 1)

    master = teacher(how, part, seed, max(1, TEACHING // scale))
    clock("teacher")
    pupils = lesson(master, part, seed, max(2, COPIES // scale))
    clock("what it says")
    small = taught(student(how, seed), pupils, how["first"], how, seed)
    clock("student")
    ready = dict(levels=how["levels"], activations=None, per_channel=False)
    free = taught(prepare(small, **ready), pupils, 1, how, seed)
    clock("rounding")
    paid = taught(prepare(small, **ready), pupils, how["then"], how, seed, how["price"])
    clock("rounding and price")
    if "pictures" in how:
        last = [("lean steps and biases", lean(convert(paid)), "solid")]
        last += [("units in order", in_order(last[0][1]), "solid")]
    else:
        last = [("8-bit biases", convert(rounded(paid)), "solid")]
    return [
        ("float32", master, False),
        ("float32, entropy-coded", master, True),
        ("small student, float32", small, True),
        ("8 bits, rounded afterwards", quantize_model(small, 8, per_channel=False), True),
        (f"{how['levels']} levels, trained", convert(free), True),
        ("a price on bits", convert(paid), True),
        ("solid file", convert(paid), "solid"),
        *last,
    ], times


def run(job):
    "One seed of one network: bytes and accuracies of every step's file, loaded back by its path."
    name, seed, part, on, scale = job
    torch.set_num_threads(1)
    data, how = mnist5k(), NETS[name]
    made, times = steps(how, getattr(data, part), seed, scale)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (step, model, archive) in enumerate(made):
            path = save(model, Path(folder) / f"{i}.mz", archive)
            again = load(path)
            rows.append(dict(step=step, bytes=os.path.getsize(path)) | {on: accuracy(again, getattr(data, on))})
        last = path.read_bytes()
        rows[-1]["tensors"] = {line.name: line.bytes for line in inspect(path).lines}
    return name, seed, rows, times, last


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
    how = {k: v for k, v in NETS[name].items() if k != "make"}
    return dict(how=how, weights=weights, table=table, lost=100 * (table[0][on] - table[-1][on]), runs=runs)


def minutes(runs):
    "Of one processor, for all seeds."
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
    with ProcessPoolExecutor(2) as pool:
        for name, seed, rows, times, last in pool.map(
            run, [(name, seed, part, on, scale) for name in names for seed in seeds]
        ):
            found[name].append(dict(seed=seed, rows=rows, seconds=times))
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
