"""Files whose layers lie: attributes, shapes, types and parts that no constructor made, for every class of layer
that a file may hold.
Each is loaded, and what loads is run once. A process of its own does it, since the question is whether native code
lives through it:

    python tests/native.py 0 1000        cases 0 to 999: says before each which it is, and what became of it
"""

import copy, math, random, resource, signal, subprocess, sys, warnings
from pathlib import Path

import torch
from torch import nn

import mutations
from guards import FUZZ
from modelzip import pack
from modelzip.data import register_model
from modelzip.pack import PackError, load, save
from modelzip.workshop import asked, facts, kinds, layer_table
from test_right_pack import OTHER, has, made

ROOM, SECONDS = 2**31, 10  # bytes on top of what the process has when it starts; for a case


@register_model("native box")
def box():
    return nn.Sequential(nn.Identity())


# ---- forged layers ------------------------------------------------------------------------------------------------
COUNTS = [0, -1, 1, 2, 3, 5, 7, 64, 1000, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**39, -(2**31), -2, -7]
ODD = [
    True,
    False,
    None,
    0.5,
    0.0,
    -1.5,
    2.5,
    1e30,
    {"float": "inf"},
    {"float": "nan"},
    "same",
    "valid",
    "zeros",
    "reflect",
    "replicate",
    "circular",
    "sum",
    "mean",
    "max",
    "nearest",
    "bilinear",
    "bicubic",
    "trilinear",
    "linear",
    "tanh",
    "relu",
    "x",
    "",
    [],
    [2],
    [0, 0],
    {"dtype": "int8"},
]
DTYPES = ["float16", "bfloat16", "float64", "int8", "int64", "bool", "complex64", "float8_e4m3fn", "uint8"]
NAMES = [n for n in layer_table.LAYERS if has(n)]


def junk(rng):
    return (
        rng.choice(COUNTS)
        if rng.random() < 0.6
        else rng.choice(ODD)
        if rng.random() < 0.7
        else [rng.choice(COUNTS) for _ in range(rng.randrange(1, 5))]
    )


def good_layer(name, rng):
    "A layer with a few arguments that are not the usual ones."
    for _ in range(4):
        some = {k: OTHER[k] for k in layer_table.LAYERS[name].split() if k in OTHER and rng.random() < 0.3}
        try:
            return made(name, **some)
        except (TypeError, ValueError):
            continue
    return made(name)


def tensors_of(layer):
    return {f"0.{i.name}": (str(i.value.dtype)[6:], list(i.value.shape)) for i in pack.items(layer)}


def described(layer):
    return {"" if not n else f".{n}": kinds.entry_of(m) for n, m in kinds.walk(layer)}


def forged(name, rng):
    "A manifest and a payload."
    layer = good_layer(name, rng)
    about, table = described(layer), tensors_of(layer)
    how, keys = rng.random(), layer_table.LAYERS[name].split()
    if how < 0.7 and keys:
        for k in rng.sample(keys, min(len(keys), rng.choice([1, 1, 1, 2, 3]))):
            about[""][k] = junk(rng)
        try:
            with torch.device("meta"), asked.counted(500), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new = layer_table.layer_class(name)(
                    **{
                        k: tuple(facts.meant(v) for v in v) if isinstance(v, list) else facts.meant(v)
                        for k, v in about[""].items()
                        if k != "class"
                    }
                )
            if sum(math.prod(s) for _, s in tensors_of(new).values()) < 1e6 and len(table) < 100:
                table, about = tensors_of(new), described(new) | {"": about[""]}
        except Exception:
            pass  # nothing that can be made
    if how > 0.6 and table:
        n = rng.choice([*table])
        shape = list(table[n][1])
        if shape and rng.random() < 0.8:
            shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 3, 7, 64])
        else:
            shape = rng.choice([[], [0], [0, 3], [3, 0], [1], [2, 2], [1] * 4])
        table[n] = rng.choice([table[n][0], rng.choice(DTYPES)]), shape
        if rng.random() < 0.8:
            where, _, key = n[2:].rpartition(".")
            e = about.setdefault("." + where if where else "", {})
            form = rng.randrange(3)
            shapes = {key: shape}
            about["." + where if where else ""] = (
                {"module": e.get("class", e.get("module", name)), "shapes": shapes} if form else {"shapes": shapes}
            )
            if form == 2:
                about["." + where if where else ""]["attributes"] = {
                    k: junk(rng) for k in rng.sample(keys, min(len(keys), 2))
                }
    elif how > 0.95 and keys:
        about[""] = {"module": name, "attributes": {k: junk(rng) for k in rng.sample(keys, min(len(keys), 2))}}
    layers = {"": {"class": "Sequential"}} | {f"0{n}": e for n, e in about.items()}
    return sealed(layers, table, rng.choice([3, 5, 5])), layer


_own = {}


def own_class(cls):
    return _own.setdefault(cls, type(f"Own{cls.__name__}", (cls,), {}))


def forged_own(name, rng):
    "The same for a class that inherits from one of the table, which is described by attributes and shapes."
    layer = good_layer(name, rng)
    layer.__class__ = own_class(type(layer))
    about, table = described(layer), tensors_of(layer)
    e = about[""]
    facts = e.setdefault("attributes", {})
    for k in rng.sample([*facts], min(len(facts), rng.choice([0, 1, 1, 2]))):
        facts[k] = (
            rng.choice(COUNTS)
            if type(facts[k]) is int and rng.random() < 0.8
            else [rng.choice(COUNTS) for _ in facts[k]]
            if isinstance(facts[k], list)
            else junk(rng)
        )
    mine = [n for n in table if "." not in n[2:]]
    for n in rng.sample(mine, min(len(mine), rng.choice([0, 0, 1, 2]))):
        shape = list(table[n][1]) or [1]
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 3, 7, 64])
        table[n] = rng.choice([table[n][0], table[n][0], rng.choice(DTYPES)]), shape
        if rng.random() < 0.9:
            e["shapes"][n[2:]] = shape
    return sealed({"": {"class": "Sequential"}} | {f"0{n}": e for n, e in about.items()}, table), nn.Sequential(layer)


@register_model("native layer")
def built(cls, **how):
    return nn.Sequential(
        layer_table.layer_class(cls)(**{k: tuple(v) if isinstance(v, list) else v for k, v in how.items()})
    )


def forged_options(name, rng):
    "What a builder is called with."
    layer = good_layer(name, rng)
    options, keys = (
        {k: v for k, v in layer_table.layer_entry(layer).items() if k != "class"},
        layer_table.LAYERS[name].split(),
    )
    table = tensors_of(layer)
    for k in rng.sample(keys, min(len(keys), rng.choice([1, 1, 2]))):
        options[k] = junk(rng)
    try:
        with torch.device("meta"), asked.counted(500):
            new = built(name, **options)
        if sum(math.prod(s) for _, s in tensors_of(new[0]).values()) < 1e6:
            table = tensors_of(new[0])
    except Exception:
        pass
    return sealed({}, table, 1, {"name": "native layer", "options": {"cls": name} | options}), None


def sealed(layers, table, version=5, architecture=None):
    "A file with numbers that are none in particular."
    payload, entries = b"", {}
    for n, (dtype, shape) in table.items():
        size = pack.DTYPES[dtype].itemsize
        payload += bytes(-len(payload) % size)
        entries[n] = {"dtype": dtype, "shape": shape, "offset": len(payload)}
        t = torch.linspace(-1, 1, math.prod(shape)).to(pack.DTYPES[dtype])
        payload += bytes(pack.as_bytes(t.reshape(shape)))
    about = {
        "modelzip": version,
        "architecture": architecture or {"name": "native box", "options": {}},
        "tensors": entries,
    }
    return mutations.sealed(about | ({"layers": layers} if layers else {}), payload)


# ---- forged compressed layers -------------------------------------------------------------------------------------
_saved = {}


def compressed(folder):
    "Name → a model with compressed layers, its manifest, its payload."
    if _saved:
        return _saved
    from modelzip import kernels, prune, qat
    from modelzip.quant import quantize_model

    torch.manual_seed(0)
    body = lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(1, 2), nn.Linear(8, 64), nn.LSTM(64, 16, 2)
    )

    def sparse(m, layout):
        return prune.sparsify_model(prune.prune_model(m, 0.8), layout=layout)

    wide = lambda: nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 64))
    words = lambda: nn.Sequential(nn.Embedding(32, 16), nn.GRU(16, 8, batch_first=True))
    x = torch.randn(2, 3, 8, 8)
    found = {
        "4 bits in groups": quantize_model(body(), 4, group=8),
        "8 bits": quantize_model(body(), 8),
        "codebook": quantize_model(words(), 4, codebook="nf4"),
        "3 bits": quantize_model(words(), 3, symmetric=False),
        "kernels": kernels.use_kernels(quantize_model(body()[:4], 8)),
        "int4": kernels.use_kernels(quantize_model(wide(), 4, group=32)),
        "rows": kernels.use_kernels(quantize_model(words(), 8)),
        "static": qat.convert(qat.prepare(body()[:4], 8, batches=[x])),
        "bag": quantize_model(nn.Sequential(nn.EmbeddingBag(32, 16)), 4),
    }
    for layout in "bitmap", "gaps":
        found[layout] = sparse(wide(), layout)
        found[layout + ", products"] = prune.use_sparse_products(found[layout])
    for name, m in found.items():
        path = save(m.eval(), folder / "good.mz", archive=False)
        _saved[name] = m, *mutations.opened(path)
    return _saved


def forged_parts(rng, folder):
    m, manifest, payload = rng.choice([*compressed(folder).values()])
    change = rng.choice([mutations.forge_manifest, mutations.forge_manifest, mutations.forge_numbers, other_meta])
    return change(manifest, payload, rng), m


def other_meta(manifest, payload, rng):
    "A number of a compressed tensor, or of its layer, is another."
    m = copy.deepcopy(manifest)
    entry = rng.choice([e for e in m["tensors"].values() if "meta" in e])
    owner = rng.choice(
        [entry["meta"], entry["meta"], entry.setdefault("options", {}), rng.choice([*entry["parts"].values()])]
    )
    owner[rng.choice([*owner, "group", "axis", "scale", "zero_point", "levels", "density"])] = junk(rng)
    return mutations.sealed(m, payload)


# ---- small files that ask for much --------------------------------------------------------------------------------
def quantized(shape, **meta):
    "The entry of a weight that is quantized to 8 bits in groups, with one scale a row."
    n = math.prod(shape)
    parts = {
        "codes": {"dtype": "uint8", "shape": [n], "offset": 0},
        "scale": {"dtype": "float32", "shape": [shape[0], 1], "offset": n + -n % 4},
    }
    entry = {
        "dtype": "float32",
        "shape": shape,
        "kind": "quantized",
        "meta": {"shape": shape, "dtype": "float32", "levels": 256} | meta,
        "parts": parts,
        "layer": "Dequantize",
    }
    return entry, bytes(n + -n % 4) + b"\0\0\x80?" * shape[0]


def of_a_group(group):
    entry, payload = quantized([4, 8], group=group)
    return mutations.sealed(
        {
            "modelzip": 5,
            "architecture": {"name": "native box", "options": {}},
            "layers": {
                "": {"class": "Sequential"},
                "0": {"class": "Linear", "in_features": 8, "out_features": 4, "bias": False},
            },
            "tensors": {"0.weight": entry},
        },
        payload,
    )


@register_model("native depth")
def deep(depth=1, width=2, table=0):
    m = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    if table:
        m.register_buffer("table", torch.arange(table), persistent=False)
    return m


def called(name, **options):
    return sealed({}, {"fc1.weight": ("float32", [2, 2])}, 1, {"name": name, "options": options})


def of_no_weights():
    "A sparse tensor of 2⁴⁰ zeros."
    shape = [2**20, 2**20]
    entry = {
        "dtype": "float32",
        "shape": shape,
        "kind": "sparse",
        "meta": {"shape": shape, "dtype": "float32", "layout": "gaps", "count": 0, "gap": 4, "gaps": 0},
        "layer": "Dequantize",
        "parts": {
            "positions": {"dtype": "uint8", "shape": [0], "offset": 0},
            "values": {"dtype": "float32", "shape": [0], "offset": 0},
        },
    }
    return mutations.sealed(
        {
            "modelzip": 5,
            "architecture": {"name": "native box", "options": {}},
            "layers": {
                "": {"class": "Sequential"},
                "0": {"class": "Linear", "in_features": 2**20, "out_features": 2**20, "bias": False},
            },
            "tensors": {"0.weight": entry},
        },
        b"",
    )


def many(n, entry):
    return sealed({"": {"class": "Sequential"}} | {str(i): entry for i in range(n)}, {"0.weight": ("float32", [2, 2])})


SMALL = {
    "a builder's argument": lambda: called("LeNet5", hidden=10**7),
    "… and more": lambda: called("LeNet300", hidden=[10**9, 10**9]),
    "… with too many digits": lambda: called("LeNet5", hidden=10**400),
    "… of another type": lambda: called("LeNet5", channels="x" * 10**5),
    "layers without end": lambda: called("native depth", depth=10**9),
    "a table": lambda: called("native depth", table=10**10),
    "a name that nobody knows": lambda: called("x" * 10**5),
    "a group of 50,000,000": lambda: of_a_group(5 * 10**7),
    "a group of 2⁴⁸": lambda: of_a_group(2**48),
    "60 LSTMs of 1,000 layers": lambda: many(
        60, {"class": "LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 1000}
    ),
    "40 wide layers": lambda: many(40, {"class": "Linear", "in_features": 2**30, "out_features": 2**30}),
    "zeros": of_no_weights,
    "5,000 layers": lambda: many(5000, {"class": "ReLU"}),
    "names of 2,000 parts": lambda: sealed(
        {".".join(["a"] * n): {"class": "Sequential"} for n in range(2000)} | {"": {"class": "Sequential"}}, {}
    ),
    "5,000 tensors that nobody has": lambda: sealed(
        {"": {"class": "Sequential"}, "0": {"class": "ReLU"}}, {f"{'x' * 50}{i}": ("float32", []) for i in range(5000)}
    ),
    "an argument of a million letters": lambda: many(
        1, {"class": "Linear", "in_features": "x" * 10**6, "out_features": 2}
    ),
    "a list of a million": lambda: many(1, {"class": "LayerNorm", "normalized_shape": [1] * 10**6}),
}


# ---- running ------------------------------------------------------------------------------------------------------
def inputs():
    g = torch.Generator().manual_seed(0)
    for shape in (
        (2, 4),
        (2, 3),
        (2, 4, 8),
        (2, 4, 9, 9),
        (1, 4, 5, 5, 5),
        (2, 64),
        (5, 2, 3),
        (2, 3, 8, 8),
        (2, 8, 4, 4),
        (2, 16, 6),
        (0, 4),
        (),
    ):
        yield (torch.randn(shape, generator=g),)
    ids = torch.tensor([[0, 1, 4], [3, 2, 0]])
    yield (ids,)
    yield ids.flatten(), torch.tensor([0, 2, 6])
    yield torch.randn(2, 2, generator=g), torch.randn(2, 3, generator=g)
    x = torch.randn(3, 2, 4, generator=g)
    yield x, x, x
    yield x, x[..., :3], x[..., :3]
    with torch.no_grad():
        yield x, x, x, None, False


def attempt(data, model, path, seconds=SECONDS):
    "What becomes of a file: refused, or what its forward passes say."
    path.write_bytes(data)
    try:
        got = load(path) if model is None else load(path, model)
    except PackError as e:
        assert len(str(e)) < 1000 and str(e).count("\n") < 5, f"an error of {len(str(e))} characters"
        return f"refused: {str(e)[len(str(path)) :]}"
    ran = []
    for args in inputs():
        for grad in False, True:
            try:
                with torch.set_grad_enabled(grad):
                    y = got(*args)
                ran.append("ran")
            except (
                ArithmeticError,
                AssertionError,
                AttributeError,
                LookupError,
                NotImplementedError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as e:
                assert "memory" not in str(e), f"forward: {e}"
                ran.append(type(e).__name__)
    return "ran" if "ran" in ran else f"failed: {sorted(set(ran))}"


def layer_of(i):
    return "compressed" if i % 3 == 2 else NAMES[(i - i // 3) % len(NAMES)]


def case(i, folder):
    rng = random.Random(f"{FUZZ} {i}" if FUZZ and i >= 0 else i)  # a search for new cases has its own
    if i < 0:
        data, model = [*SMALL.values()][-1 - i](), None
    elif i % 3 == 2:
        data, model = forged_parts(rng, folder)
    elif rng.random() < 0.4:
        data, model = rng.choice([forged_own, forged_own, forged_options])(layer_of(i), rng)
    else:
        data, layer = forged(layer_of(i), rng)
        model = None if rng.random() < 0.7 else nn.Sequential(layer)
    return data, model


def limited():
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))


def serve(start, stop, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    compressed(folder)
    limited()
    for i in range(start, stop):
        print(i, end=" ", flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(12 * SECONDS)  # of computing; of waiting
        try:
            said = attempt(*case(i, folder), folder / "x.mz")
        except BaseException as e:
            said = f"BAD {type(e).__name__}: {e}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(said.encode("ascii", "replace").decode().replace("\n", " ")[:300], flush=True)


def fuzz(n, folder, start=0):
    "Serve n cases by children that are replaced when they die; returns what each said, by number."
    said, end = {}, start + n
    while start < end:
        done = subprocess.run(
            [sys.executable, __file__, str(start), str(end), str(folder)], stdout=subprocess.PIPE, text=True
        )
        lines = done.stdout.splitlines()
        for line in lines:
            i, _, what = line.partition(" ")
            said[int(i)] = what
        if done.returncode == 0:
            break
        last = max((int(l.partition(" ")[0]) for l in lines), default=start)
        said[last] = f"BAD died of {signal.Signals(-done.returncode).name if done.returncode < 0 else done.returncode}"
        start = last + 1
    return said


if __name__ == "__main__":
    import tempfile

    start, stop = map(int, sys.argv[1:3])
    if len(sys.argv) > 3:
        serve(start, stop, Path(sys.argv[3]))
    else:
        import collections

        with tempfile.TemporaryDirectory() as tmp:
            said = fuzz(stop - start, Path(tmp), start)
        for i, what in said.items():
            if what.startswith("BAD"):
                print(i, [*SMALL][-1 - i] if i < 0 else layer_of(i), what)
        print(collections.Counter(w.partition(":")[0] for w in said.values()))
