"""What a small file may demand: every reader, on files that claim too much, in 2 GiB and 10 seconds, with a
`PackError` of some lines or an answer."""

import contextlib, copy, cProfile, io, json, math, os, random, select, struct, subprocess, sys, warnings, zipfile, zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from guards import FUZZ, examples
from modelzip import coding, pack
from modelzip.archive import MAX_PARTS, PackError
from modelzip.data import LeNet5
from modelzip.coding import CODES, encode, write_varint
from modelzip.pack import diff, inspect, load, save
from modelzip.quant import dequantize_model, quantize_model
from modelzip.workshop import inspecting
from mutations import Sample, follow, opened, other_value, places, sealed, sorts

HERE = Path(__file__).parent


class Child:
    "A process that reads files; another one takes its place when it dies or is not done in time."

    def __init__(self, good):
        self.good, self.process = good, None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "bounds_child.py", self.good],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"},
        )
        assert self.line(120) == "ready"

    def line(self, seconds):
        assert select.select([self.process.stdout], [], [], seconds)[0], "it takes too long"
        return self.process.stdout.readline().rstrip("\n")

    def __call__(self, path):
        if self.process is None or self.process.poll() is not None:
            self.start()
        print(path, file=self.process.stdin, flush=True)
        try:
            text = self.line(90)
        except AssertionError:
            self.close()
            raise
        if not text:
            raise AssertionError(f"the process died: {self.process.wait()}")
        return json.loads(text)

    def close(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    c = Child(save(Sample(None), tmp_path_factory.mktemp("good") / "good.mz"))
    yield c
    c.close()


def judged(child, path, what):
    "Every reader answers or refuses, in a few lines and in time."
    for way, (said, length, seconds) in child(path).items():
        good = said in ("read", "exit", "PackError") or said == "ValueError" and way == "open"
        assert good and length < 2500 and seconds < 10, (
            f"{what}, {way}: {said} ({length:,} characters, {seconds:.1f} s of {path})"
        )


# ---- files that were found ----------------------------------------------------------------------------------------
def plain(shape=(), offset=0, dtype="float32", **more):
    return {"dtype": dtype, "shape": [*shape], "offset": offset} | more


def mz(tensors, payload=b"", version=5, **more):
    return sealed({"modelzip": version, "architecture": None, "tensors": tensors} | more, payload)


def gaps(n, gap, of=b"\xff", size=13_000_000):
    "Few bytes of gaps, and as many weights left out as one likes."
    stream = encode(np.full(size, of[0], np.uint8))
    parts = {"positions": plain([size], 0, "uint8", coded=len(stream)), "values": plain([0], -(-len(stream) // 4) * 4)}
    meta = {"shape": [n], "dtype": "float32", "layout": "gaps", "count": 0, "gap": gap, "gaps": 8 * size // gap}
    return mz(
        {
            "w": {
                "dtype": "float32",
                "shape": [n],
                "kind": "sparse",
                "meta": meta,
                "parts": parts,
                "layer": "Dequantize",
            }
        },
        stream + bytes(-len(stream) % 4),
    )


def stream(bits, kind, count, *chunks, lengths=None):
    text = (
        bytes([bits])
        + write_varint(kind)
        + write_varint(count)
        + b"".join(map(write_varint, lengths or map(len, chunks)))
        + b"".join(chunks)
    )
    return text + zlib.crc32(text).to_bytes(4, "little")


def frame(claim):
    return (
        bytes([0b11100000]) + claim.to_bytes(8, "little") + b"\1\0\0"
    )  # zstandard, its size in the header, one empty block


def coded(data, size):
    return mz({"w": plain([size], 0, "uint8", coded=len(data))}, data)


NOISE = random.Random(0).randbytes(24_000).hex()  # in `info`: more text gets past the ratio of deflate
FOUND = {
    "a shape without end": lambda: mz({"w": plain([2**62] * 45_000)}),
    "… that may be inflated": lambda: mz({"w": plain([2**62] * 60_000)}, info={"n": NOISE}),
    "a shape in meta": lambda: mz(
        {
            "w": {
                "dtype": "float32",
                "shape": [4],
                "kind": "quantized",
                "meta": {"shape": [2**47] * 45_000, "dtype": "float32", "levels": 16},
                "parts": {"codes": plain([2], 0, "uint8")},
                "layer": "Dequantize",
            }
        },
        bytes(2),
    ),
    "a name of 2,000 parts": lambda: mz({".".join(["a" * 250] * 2000): plain()}, bytes(4)),
    "names without end": lambda: mz({".".join("a" * i): plain((), 4 * i - 4) for i in range(1, 1000)}, bytes(3996)),
    "a tree of empty modules": lambda: mz(
        {".".join([str(i)] + ["a"] * 62): plain((), 4 * i) for i in range(1700)}, bytes(6800), info={"n": NOISE}
    ),
    "layers without end": lambda: mz({}, layers={".".join("0" * i): {"class": "Sequential"} for i in range(1000)}),
    "a long type": lambda: mz({"w": plain(dtype="x" * 500_000)}, bytes(4)),
    "a long name beside short ones": lambda: mz(
        {"a" * 60_000: plain()} | {str(i): plain((), 4 * i + 4) for i in range(500)}, bytes(2004), info={"n": NOISE}
    ),
    "a long builder": lambda: sealed(
        {"modelzip": 5, "architecture": {"name": "x" * 500_000, "options": {}}, "tensors": {}}, b""
    ),
    "long hooks": lambda: mz({}, layers={"": {"class": "Linear", "hooks": ["x" * 1000] * 800}}),
    "2**47 weights left out": lambda: gaps(2**47, 16),
    "2**31 weights left out": lambda: gaps(2**31, 1),
    "2**31 by wide gaps": lambda: gaps(2**31, 16, size=3000),
    "a frame of 1 TB": lambda: coded(data := stream(0, 1, 10**5, b"\1" + frame(10**12)), 10**5),
    "a stream of 2**62": lambda: coded(stream(0, 1, 2**62, b"\0"), 10**5),
    "deep info": lambda: sealed(b'{"modelzip":5,"architecture":null,"tensors":{},"info":' + b'{"a":' * 150_000, b""),
    "a number of a million digits": lambda: sealed(b'{"modelzip":' + b"9" * 10**6 + b"}", b""),
    "many values": lambda: mz({}, info={"a": [{"a": 1}] * 40_000}),
}


@pytest.mark.parametrize("what", FOUND)
def test_files_that_claim_too_much(tmp_path, child, what):
    (tmp_path / "x.mz").write_bytes(FOUND[what]())
    judged(child, tmp_path / "x.mz", what)


def npz(**entries):
    with zipfile.ZipFile(f := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in entries.items():
            z.writestr(f"{name}.npy", data)
    return f.getvalue()


def npy(header, data=b"", version=2):
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 * version, "little") + header + data


def bombs(folder):
    "Files of other formats that expand to gigabytes."
    said = lambda shape: f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    (folder / "header.npz").write_bytes(npz(a=npy(b" " * 10**7)))  # a header of 10 MB
    (folder / "note.npz").write_bytes(
        npz(__modelzip__=npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000,), }\n", b"[" * 10**7))
    )
    (folder / "shape.npz").write_bytes(npz(a=npy(said((2**40, 2**40)), bytes(100))))
    (folder / "dims.npz").write_bytes(npz(a=npy(said((1,) * 3000), bytes(4))))
    for name, text in (
        ("values", b"{" + b'"a":[],' * 100_000 + b'"b":[]}'),
        ("deep", b'{"a":' + b"[" * 10**5),
        ("shape", json.dumps({"w": {"dtype": "F32", "shape": [2**62] * 60_000, "data_offsets": [0, 4]}}).encode()),
        ("name", json.dumps({"a." * 50_000: {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).encode()),
    ):
        (folder / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with h5py.File(folder / "fill.h5", "w") as h:
        h.create_dataset("w", (2**20, 2**20), "f4", chunks=(2**9, 2**9), compression="gzip", fillvalue=3.0)[0, 0] = 1
    with h5py.File(folder / "unwritten.h5", "w") as h:
        h.create_dataset("w", (2**13, 2**12), "f4", chunks=(2**9, 2**9), compression="gzip", fillvalue=3.0)[
            : 2**9, : 2**9
        ] = np.random.default_rng(0).random((2**9, 2**9))
    with h5py.File(folder / "huge.h5", "w") as h:
        h.create_dataset("w", (2**30, 2**20), "f4", fillvalue=3.0)


def test_other_formats_that_claim_too_much(tmp_path, child):
    bombs(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        judged(child, path, path.name)


# ---- files that nobody thought of ---------------------------------------------------------------------------------
HUGE = [2**15, 2**20, 2**31, 2**40, 2**47, 2**62, 10**400]


def larger(x, rng):
    "A number, text, list or table that has become large."
    if type(x) is int:
        return rng.choice([*HUGE, x << 15, x * 1000])
    if isinstance(x, str):
        return rng.choice([x * rng.choice([10, 10_000]), ".".join([x] * rng.choice([3, 70, 2000])), "\u2028" * 1000])
    if isinstance(x, list):
        return x * rng.choice([2, 65, 5000])
    if isinstance(x, dict) and x:
        return x | {f"{k}{i}": v for k, v in [rng.choice([*x.items()])] for i in range(rng.choice([1, 2000]))}
    return rng.choice([HUGE, [[]] * 10_000, {"a": {"a": {}}}])


def nested(x, n):
    for _ in range(n):
        x = {"a": x} if n % 2 else [x]
    return x


def grown(manifest, payload, rng):
    "Some fields of a manifest, larger; sizes that belong together grow together now and then."
    m = copy.deepcopy(manifest)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.choice([*places(m)][1:])
        owner = follow(m, at[:-1])
        how = rng.randrange(5)
        if how == 0 and isinstance(owner, dict):
            owner[rng.choice([".".join("a" * 60), "n" * 50_000, "", "a.b"])] = owner.pop(at[-1])
        elif how == 1:
            owner[at[-1]] = nested(owner[at[-1]], rng.choice([3, 62, 400]))
        elif how == 2:
            owner[at[-1]] = other_value(owner[at[-1]], rng)
        else:
            owner[at[-1]] = larger(owner[at[-1]], rng)
    if rng.random() < 0.3:  # every mention of a shape
        d = rng.choice(HUGE[:6])
        for at in [*places(m)]:
            if at and at[-1] == "shape" and isinstance(s := follow(m, at), list) and s and rng.random() < 0.8:
                s[0] = d
    return sealed(m, payload)


def streams(manifest, payload, rng):
    """Other streams in the place of those that are there, each with its checksum: headers, methods, frames, tables,
    lengths."""
    m, data = copy.deepcopy(manifest), b""
    for e in [e for at in places(m) for e in [follow(m, at)] if isinstance(e, dict) and "offset" in e]:
        n = math.prod(e["shape"]) * pack.DTYPES[e["dtype"]].itemsize
        old = payload[e["offset"] : e["offset"] + e.get("coded", n)]
        if "coded" in e or rng.random() < 0.3:
            bits, kind, count = rng.choice(
                [
                    (0, 1, n),
                    (0, 4, n),
                    (8, 256, n),
                    (4, 16, 2 * n),
                    (3, 5, 2 * n),
                    (12, 4096, n // 2),
                    (1, 2, 8 * n),
                    (rng.randrange(18), rng.choice([0, 1, 2, 256, 65_536]), rng.choice([n, 2**20, 2**40])),
                ]
            )
            body = rng.choice(
                [
                    frame(rng.choice([n, 10**6, 10**12])),
                    write_varint(rng.choice([0, n, 2**40])) + b"\1" + rng.randbytes(9),
                    rng.randbytes(rng.choice([0, 20, 300])),
                    b"".join(write_varint(rng.choice([0, 1, 4096])) for _ in range(kind if kind < 300 else 9))
                    + rng.randbytes(8),
                    old[6:-4],
                ]
            )
            chunk = bytes([rng.randrange(9)]) + body
            new = old if rng.random() < 0.2 else stream(bits, max(kind, 0), count, *[chunk] * rng.choice([1, 1, 2, 40]))
            e.pop("crc", None)
            e["coded"], e["offset"] = len(new), len(data)
            if rng.random() < 0.3:
                e["shape"] = [len(new) << rng.choice([10, 14, 15])]
        else:
            data += bytes(-len(data) % 8)
            new, e["offset"] = old, len(data)
        data += new
    return sealed(m, data)


WHERE = {  # signature → (offset, format) of the fields behind it; APPNOTE 4.3.7, 4.3.12, 4.3.16
    b"PK\3\4": [
        (4, "H"),
        (6, "H"),
        (8, "H"),
        (10, "H"),
        (12, "H"),
        (14, "I"),
        (18, "I"),
        (22, "I"),
        (26, "H"),
        (28, "H"),
    ],
    b"PK\1\2": [(i, "H") for i in (4, 6, 8, 10, 12, 14, 28, 30, 32, 34, 36)] + [(i, "I") for i in (16, 20, 24, 38, 42)],
    b"PK\5\6": [(4, "H"), (6, "H"), (8, "H"), (10, "H"), (12, "I"), (16, "I"), (20, "H")],
}


def flags(manifest, payload, rng):
    "Fields of the headers of the archive, in both places or in one: versions, flags, methods, sizes, lengths, offsets."
    data = bytearray(sealed(manifest, payload))
    for _ in range(rng.choice([1, 1, 2, 3])):
        of = rng.choice([*WHERE])
        at = [i for i in range(len(data)) if data[i : i + 4] == of]
        if not at:
            continue
        where, form = rng.choice(WHERE[of])
        most = 2 ** (16 if form == "H" else 32) - 1
        old = struct.unpack_from("<" + form, data, at[0] + where)[0]
        new = rng.choice([0, 1, 8, 9, 93, 45, most, most // 2 + 1, old ^ 1 << rng.randrange(16), old + 1, len(data)])
        for i in at if rng.random() < 0.3 else [rng.choice(at)]:
            if i + where + 4 <= len(data):
                struct.pack_into("<" + form, data, i + where, new & most)
    how = rng.random()
    if how < 0.15:  # entries that nobody expects
        f = io.BytesIO(bytes(data))
        with warnings.catch_warnings(), contextlib.suppress(Exception):  # a library that does not want to add any
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(f, "a") as z:
                name = rng.choice(["payload", "manifest.json", "../x", "model", "x" * 60_000])
                z.writestr(name, bytes(rng.randrange(99)))
        data = f.getvalue()
    elif how < 0.25:
        data = data[: -rng.choice([1, 22, 23])] if rng.random() < 0.5 else data + bytes(rng.choice([1, 65_536]))
    return bytes(data)


def of_zip(manifest, payload, rng):
    "The same archive by another program: methods, zip64, comments, data descriptors."
    entries, f = (
        {"payload": payload, "manifest.json": json.dumps(manifest, separators=(",", ":")).encode()},
        io.BytesIO(),
    )
    with zipfile.ZipFile(f, "w") as z:
        for name in sorted(entries, reverse=rng.random() < 0.8):
            entry = zipfile.ZipInfo(name)
            entry.compress_type = rng.choice([0, 8, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            entry.flag_bits |= rng.choice([0, 0, 1, 8, 0x800])
            entry.extra = rng.choice([b"", struct.pack("<HH", 0xD935, 0), struct.pack("<2HQ", 1, 8, 2**62), b"\1"])
            with z.open(entry, "w", force_zip64=rng.random() < 0.3) as g:
                g.write(entries[name])
        z.comment = rng.choice([b"", b"x", b"PK\5\6" + bytes(18)])
    return f.getvalue()


def zstd(data, rng):
    "A frame of Zstandard (RFC 8878) whose header lies, whose blocks repeat a byte without end, or several frames."
    block = lambda kind, size, last, body: (last | kind << 1 | size << 3).to_bytes(3, "little") + body
    blocks = b"".join(
        rng.choice(
            [
                lambda: block(1, rng.choice([1, 2**17, 2**21 - 1]), 0, b"\7") * rng.choice([1, 100, 3000]),
                lambda: block(0, min(len(data), 2**17), 0, data[: 2**17]),
                lambda: block(2, rng.choice([0, 5, 2**21 - 1]), 0, rng.randbytes(5)),
                lambda: block(3, 5, 0, b""),
            ]
        )()
        for _ in range(rng.choice([0, 1, 1, 3]))
    )
    size = rng.choice([0, 1, 2, 3])
    single = rng.randrange(2)
    head = bytes([size << 6 | single << 5 | rng.choice([0, 0, 4, 3, 8, 16])])
    window = b"" if single else bytes([rng.randrange(256)])
    claim = rng.choice([len(data), 0, 2**17, 2**31, 2**40, 2**63 - 1, 2**64 - 2])
    width = [single, 2, 4, 8][size]
    frame = (
        b"\x28\xb5\x2f\xfd" * rng.randrange(2)
        + head
        + window
        + (claim & 2 ** (8 * width) - 1).to_bytes(width, "little")
        + blocks
        + block(0, 0, 1, b"")
    )
    skip = struct.pack("<II", 0x184D2A50, rng.choice([0, 4, 2**32 - 1])) + bytes(4)
    return rng.choice([frame, frame, frame * 2, skip + frame, frame + bytes(4), frame[: rng.randrange(len(frame))]])


def frames(manifest, payload, rng):
    "Streams with such frames, whose counts and checksums are right or not."
    m, data = copy.deepcopy(manifest), b""
    for e in [e for at in places(m) for e in [follow(m, at)] if isinstance(e, dict) and "offset" in e]:
        n = math.prod(e["shape"]) * pack.DTYPES[e["dtype"]].itemsize
        new = payload[e["offset"] : e["offset"] + e.get("coded", n)]
        if "coded" in e or rng.random() < 0.3:
            chunk = bytes([rng.choice([1, 1, 1, 2, 3, 5, 6, 7])]) + zstd(new, rng)
            count = rng.choice([n, n, 2**17, 2**20])
            new = stream(rng.choice([0, 0, 0, 8]), rng.choice([1, 1, 2, 4]), count, *[chunk] * rng.choice([1, 1, 2]))
            e.pop("crc", None)
            e["coded"], e["shape"] = len(new), [count // pack.DTYPES[e["dtype"]].itemsize] if count != n else e["shape"]
        else:
            data += bytes(-len(data) % 8)
        e["offset"], data = len(data), data + new
    return sealed(m, data)


def builders(manifest, payload, rng):
    "A builder of this library's, called with anything; or one that nobody knows."
    m = copy.deepcopy(manifest)
    some = lambda: rng.choice(
        [0, -1, 1, 3, 64, 2**16, 2**31, 2**62, 10**400, 0.5, True, None, "", "x" * 9, "x" * 10**5, [], {}, [3] * 10**4]
        + [[10**9, 10**9], [20, 50], [[1, 2], 3], {"hidden": 3}]
    )
    name, options = rng.choice(
        [
            ("LeNet5", ["channels", "hidden", "seed", "x"]),
            ("LeNet300", ["hidden", "seed", "self"]),
            ("minilm", ["x"]),
            ("LeNet5", ["channels", "hidden"]),
            ("", ["name"]),
            ("__class__", []),
        ]
    )
    chosen = rng.sample(options, rng.randrange(len(options) + 1))
    m["architecture"] = {"name": name, "options": {o: some() for o in chosen}}
    if rng.random() < 0.5:
        m.pop("kind", None), m.pop("layers", None)
    if m.get("kind") is None and "layers" not in m:
        m["modelzip"] = rng.choice([2, 3, 5])
    return sealed(m, payload)


MUTATORS = [grown, streams, flags, frames, builders, grown, streams, of_zip, flags, frames]


def of_the_seed(folder):
    "Files to start from; a source of randomness, which a search for new cases seeds."
    files, small = [], LeNet5(channels=[2, 3], hidden=5)
    for name, model in [*sorts(), ("built", small), ("built, 4 bits", quantize_model(small, 4))]:
        for archive in False, True:
            files.append(opened(save(model, folder / "good.mz", archive=archive)))
    return files


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_a_mutator_that_knows_the_format(tmp_path, child):
    """Every reader, and one forward pass of what loads. A file of which only the archive was touched is what it was,
    or refused."""
    seed = int(os.environ.get("MODELZIP_FUZZ") or 11)
    rng, files, path = random.Random(seed), of_the_seed(tmp_path), tmp_path / "x.mz"
    for i in range(examples(20)):
        how = MUTATORS[i % len(MUTATORS)]
        file = files[rng.randrange(len(files)) if how is not builders or rng.random() < 0.3 else -1 - rng.randrange(4)]
        path.write_bytes(how(*file, rng))
        (tmp_path / "same.mz").unlink(missing_ok=True)
        if how in (flags, of_zip):
            (tmp_path / "same.mz").write_bytes(sealed(*file))
        judged(child, path, f"mutation {i} (seed {seed}, {how.__name__})")


# ---- work that grows with the number of tensors, not with its square ----------------------------------------------
def test_a_manifest_is_read_once(tmp_path, monkeypatch):
    from modelzip import cli, threads

    m = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    for i, n in enumerate(["a.mz", "b.mz"]):
        save(m, tmp_path / n, archive=bool(i), note=i)
    read, count = pack.read_manifest, []
    for module in pack, inspecting:
        monkeypatch.setattr(module, "read_manifest", lambda f: count.append(1) or read(f))
    for times, f in (
        (1, lambda: inspect(tmp_path / "a.mz")),
        (2, lambda: diff(tmp_path / "a.mz", tmp_path / "b.mz")),
        (2, lambda: cli.open_model(str(tmp_path / "a.mz"))),
        (1, lambda: load(tmp_path / "a.mz", m)),
    ):
        count.clear()
        f()
        assert len(count) <= times


def test_what_is_tied_stays_so_without_an_architecture(tmp_path):
    from modelzip import cli

    m = Sample(None)
    for model in m, quantize_model(m, 4, group=8):
        back = cli.open_model(str(save(model, tmp_path / "x.mz")))
        found = {i.name: pack.identity(i) for i in pack.items(back)}
        assert found["embed.weight"] == found["out.weight"] and len(set(found.values())) == len(found) - 1


def test_messages_and_tables_are_short(tmp_path):
    m = nn.Sequential(*(nn.Linear(1, 1) for _ in range(300)))
    with pytest.raises(PackError, match="592 more") as e:
        pack.check_match(m, {})
    assert len(str(e.value)) < 1000
    with pytest.raises(ValueError, match="parts"):
        deep = nn.Linear(1, 1)
        for _ in range(MAX_PARTS):
            deep = nn.Sequential(deep)
        save(deep, tmp_path / "x.mz")


def test_ties_are_compared_once(tmp_path, monkeypatch):
    "2 kB of 200 names for one tensor of 16 MB: `diff` expanded it 400 times."
    m = nn.Module()
    m.w0 = nn.Parameter(torch.zeros(50, 50))
    for i in range(1, 30):
        m.register_parameter(f"w{i}", m.w0)
    path, read, calls = save(m, tmp_path / "ties.mz"), inspecting.read_blocks, []
    monkeypatch.setattr(inspecting, "read_blocks", lambda *a: calls.append(a) or read(*a))
    assert diff(path, path).same and len(diff(path, path).changes) == 30 and len(calls) == 4


def calls_of(f):
    "How many functions of Python's are called."
    with cProfile.Profile(builtins=False) as profile:
        f()
    return sum(entry.callcount for entry in profile.getstats())


def work(folder, names):
    "Way → how many calls it takes for so many tensors."
    from modelzip import cli, exchange

    state, at = {n: torch.linspace(0, i + 1, 12).reshape(3, 4) for i, n in enumerate(names)}, lambda n: folder / n
    torch.save(state, at("m.pt"))
    tree, done = cli.as_model(state), {}

    def step(what, f):
        done[what] = calls_of(lambda: done.update({"last": f()}))
        return done["last"]

    small = step("compress", lambda: cli.quantize_weights(tree, 8))
    for archive in False, True:
        step(f"save {archive}", lambda: save(small, at(f"{archive}.mz"), archive=archive))
    back = step("open", lambda: cli.open_model(str(at("True.mz"))))
    assert {n: t.shape for n, t in cli.expanded_tensors(back).items()} == dict.fromkeys(names, (3, 4))
    into = step("load", lambda: load(at("False.mz"), tree))
    assert dequantize_model(into).state_dict().keys() == dict.fromkeys(names).keys()
    assert len(step("inspect", lambda: inspect(at("True.mz"))).lines) == len(names)
    assert step("diff", lambda: diff(at("False.mz"), at("True.mz"))).same
    for end, write, read in (
        ("npz", exchange.to_npz, exchange.from_npz),
        ("safetensors", exchange.to_safetensors, exchange.from_safetensors),
        ("h5", exchange.to_hdf5, exchange.from_hdf5),
    ):
        step(f"to_{end}", lambda: write(small, at(f"x.{end}")))
        got = step(f"from_{end}", lambda: read(at(f"x.{end}"), tree))
        assert all(torch.equal(a, b) for a, b in zip(got.buffers(), into.buffers(), strict=True))
        step(f"open {end}", lambda: cli.open_model(str(at(f"x.{end}"))))
        step(f"plain to_{end}", lambda: write(tree, at(f"p.{end}")))
        step(f"plain from_{end}", lambda: read(at(f"p.{end}"), tree))
    for command in (
        ["compress", "m.pt", "-o", "c.mz", "--force"],
        ["inspect", "c.mz"],
        ["convert", "c.mz", "c.npz", "--expand"],
    ):
        command = [str(at(c)) if "." in c else c for c in command]
        with contextlib.redirect_stdout(io.StringIO()):
            step(f"command {command[0]}", lambda: cli.cli(command))
    del done["last"]
    return done


@pytest.mark.parametrize("name", ["w{i}", "a.b{j}.w{i}"])
def test_work_grows_with_the_number_of_tensors(tmp_path, name):
    """Also where all of them hang in one module: the third six tensors add as many calls as the second. (One call for
    each pair of tensors would be 72 more.)"""
    work(tmp_path, [name.format(i=i, j=0) for i in range(2)])  # what is imported or asked for once
    few, some, many = (work(tmp_path, [name.format(i=i, j=i // 3) for i in range(n)]) for n in (6, 12, 18))
    assert {k: (few[k], some[k], many[k]) for k in few if many[k] - 2 * some[k] + few[k] > 50} == {}


def test_copies_of_tied_tensors_are_merged_once(tmp_path):
    "Files from others hold a tied tensor under each of its names."
    from safetensors.torch import save_file

    from modelzip.exchange import from_safetensors

    calls = {}
    for n in 100, 300:
        m = nn.Sequential(*[nn.Sequential(nn.Linear(3, 3))] * n)
        save_file({k: t.clone() for k, t in m.state_dict().items()}, tmp_path / "x.safetensors")
        calls[n] = calls_of(lambda: from_safetensors(tmp_path / "x.safetensors", m))
        apart = {k: t + i for i, (k, t) in enumerate(m.state_dict().items())}
        save_file(apart, tmp_path / "y.safetensors")
        calls[n, "apart"] = calls_of(lambda: pytest.raises(PackError, from_safetensors, tmp_path / "y.safetensors", m))
    assert calls[300] < 3.2 * calls[100] + 1000 and calls[300, "apart"] < 3.2 * calls[100, "apart"] + 1000
    got = from_safetensors(tmp_path / "x.safetensors", m)
    assert len({id(p) for p in got.parameters()}) == 2 and torch.equal(got[7][0].weight, m[0][0].weight)


@pytest.mark.hypothesis  # so that a search comes here: as many as may be
def test_many_compressed_tensors_in_a_layer_that_computes_are_refused(tmp_path, monkeypatch):
    "One more than may be; and as many as may be, where that is few."
    from modelzip.cli import MOST_BESIDE, as_model, quantize_weights
    from modelzip.workshop import weights

    class Chain(nn.Module):
        def __init__(self, n):
            super().__init__()
            for i in range(n):
                self.register_parameter(f"w{i}", nn.Parameter(torch.eye(2)))

        def forward(self, x):
            for w in self.parameters():
                x = x @ w
            return x

    few = MOST_BESIDE if FUZZ else 24
    for most, n in (MOST_BESIDE, MOST_BESIDE + 1), (few, few + 1), (few, few):
        monkeypatch.setattr(weights, "MOST_BESIDE", most)
        m = Chain(n)
        path = save(quantize_weights(as_model(m.state_dict())), tmp_path / "x.mz")
        if n == most:
            assert load(path, m)(torch.ones(2)).tolist() == [1, 1]
            continue
        with pytest.raises(PackError, match=f"{n} compressed tensors beside 'w.*--expand"):
            load(path, m)
