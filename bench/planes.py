"""Floats without loss: the share that is left of real weights, and how quickly they are coded and come back, beside
zipnn and zstandard. One thread; each in a process of its own, in turns (bench/contest.py). Seconds are those of the
processor, user and system: for one thread on an idle machine the same as on the wall.

    python bench/planes.py [--peer PYTHON] [--rounds 9] [--only "bfloat16, 256 MiB" …]

`--peer` is the Python of an environment that has zipnn; without it zipnn is left out. Its tensors are MiniLM's, each
coded by itself (as in a file), in several types; "256 MiB" has them one behind the other, again and again, as one.
zipnn changes the bytes that it is given, so each of its turns gets a copy, made before the clock starts.
"""

import argparse, json, os, statistics, sys, tempfile, time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results/planes.json"
DATA = {"bfloat16": 0, "float16": 0, "float32": 0, "float32 of bfloat16": 0, "bfloat16, 256 MiB": 1 << 28}
STEPS = ["bytes by zstd -3", "planes as they lie", "exponents whole", "Huffman alone", "ours", "everything tried"]
PEERS = ["zipnn", "memory"]
CHUNK = 1 << 20


def prepare(name, folder):
    "Write the tensors of one kind as arrays of words."
    import torch
    from modelzip.data import minilm

    tensors = [p.detach().flatten() for p in minilm().parameters() if p.numel() >= 256]
    if name != "float32":
        tensors = [t.to(getattr(torch, name.partition(",")[0].rpartition(" ")[2])) for t in tensors]
    if name.startswith("float32 of"):
        tensors = [t.float() for t in tensors]
    arrays = [t.view(torch.uint8).numpy() for t in tensors]
    if size := DATA[name]:
        whole = np.concatenate(arrays)
        arrays = [np.resize(whole, size)]
    np.savez(Path(folder) / "tensors.npz", *arrays)


def of_type(name):
    return "float32" if name.startswith("float32") else name.partition(",")[0]


def chunked(code, back):
    "A coder of chunks as one of whole tensors."
    cut = lambda x: [x[i : i + CHUNK] for i in range(0, len(x), CHUNK)]
    return lambda x: [(len(c), code(c)) for c in cut(x)], lambda z: np.concatenate([back(s, n) for n, s in z])


def coder_of(who, name):
    "Two functions: bytes of a tensor → something with bytes in it, and back."
    width = 2 if "16" in of_type(name) else 4
    if who == "memory":
        return np.copy, np.copy
    if who == "zipnn":
        from zipnn import ZipNN

        make = lambda: ZipNN(bytearray_dtype=of_type(name), threads=1)
        return lambda x: make().compress(x), lambda z: make().decompress(z)
    import zstandard

    if who == "bytes by zstd -3":
        return lambda x: zstandard.compress(x, 3), lambda z: np.frombuffer(zstandard.decompress(z), np.uint8)
    import torch
    from modelzip.coding import decode, encode
    from modelzip.lossless import float_rest, float_symbols, join_floats, low_byte
    from modelzip.workshop.blocks import code_bytes, expand_bytes, zstd_compress
    from modelzip.workshop.float_chunks import HUFFMAN, code_plane
    from modelzip.workshop import streams
    from modelzip.workshop.planes import byte_planes

    if who in ("ours", "everything tried"):
        if who != "ours":
            streams.looks_ordinary = lambda data, width: False
        types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        return lambda x: encode(torch.from_numpy(x).view(types[of_type(name)])), decode
    if who == "planes as they lie":
        code = lambda c: [code_bytes(p) for p in byte_planes(c, width)]
        back = lambda z, n: np.stack([expand_bytes(p, n // width) for p in z], 1).reshape(-1)
        return chunked(code, back)

    def code(c):
        words = c.view(f"u{width}")
        planes = [float_rest(words), *(low_byte(words, 8 * j) for j in range(width - 2))]
        how = HUFFMAN if who == "Huffman alone" else {"min_match": 7}
        planes = [(method, bytes(coded)) for method, coded, _ in map(code_plane, planes)]
        return [(1, zstd_compress(float_symbols(words), **how)), *planes]

    def back(z, n):
        symbols, rest, *low = [expand_bytes(bytes([m]) + p, n // width) for m, p in z]
        join_floats(symbols, rest, low, out := np.empty(n // width, f"u{width}"))
        return out.view(np.uint8)

    return chunked(code, back)


def size_of(z):
    "Bytes in whatever a coder gives."
    if isinstance(z, (list, tuple)):
        return sum(map(size_of, z))
    return 0 if isinstance(z, int) else len(z)


def serve(who, name, folder):
    "Say the share that is left, then answer 0 with the seconds of coding everything and 1 with those of the way back."
    with np.load(Path(folder) / "tensors.npz") as arrays:
        tensors = [arrays[k] for k in arrays]
    code, back = coder_of(who, name)
    give = (lambda x: bytearray(x.tobytes())) if who == "zipnn" else (lambda x: x)
    coded = [code(give(x)) for x in tensors]
    for x, z in zip(tensors, coded):
        assert np.array_equal(np.frombuffer(back(z), np.uint8), x)
    print(f"{sum(map(size_of, coded)) / sum(x.nbytes for x in tensors):.9f}", flush=True)
    for line in sys.stdin:
        if int(line):
            began = time.process_time()
            for z in coded:
                back(z)
        else:
            given = [give(x) for x in tensors]
            began = time.process_time()
            for x in given:
                code(x)
        print(time.process_time() - began, flush=True)


def contest(name, peer, rounds, rng):
    "Share that is left and bytes a second, for each that takes part; medians, and those of the ratios to zipnn."
    from contest import Contestant  # not above: the peer's environment need not have what it imports

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        prepare(name, folder)
        with np.load(Path(folder) / "tensors.npz") as arrays:
            size = sum(arrays[k].nbytes for k in arrays)
        players = {}
        for who in [*STEPS, *PEERS] if not DATA[name] else ["bytes by zstd -3", "ours", *PEERS]:
            if who == "zipnn" and peer is None:
                continue
            command = [peer if who == "zipnn" else sys.executable, __file__, "--serve", who, name, folder]
            players[who] = Contestant(command, 1, Path(folder) / "log")
        times = {(who, way): [] for who in players for way in (0, 1)}
        for _ in range(rounds):
            for way in 0, 1:
                for i in rng.permutation(len(players)):
                    who = list(players)[i]
                    times[who, way].append(players[who].seconds(way))
        rows = {}
        for who, player in players.items():
            rows[who] = {"share left": player.cosine}
            for way, word in enumerate(("in", "out")):
                rows[who][f"MB/s {word}"] = size / statistics.median(times[who, way]) / 1e6
                if peer is not None:
                    ratios = [a / b for a, b in zip(times["zipnn", way], times[who, way])]
                    rows[who][f"times zipnn {word}"] = statistics.quantiles(ratios, n=4)
            player.end()
    return rows


def main():
    arguments = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_argument("--peer")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--only", nargs="*", choices=DATA)
    asked, rng = arguments.parse_args(), np.random.default_rng(0)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"table": {}}
    for name in asked.only or DATA:
        rows = results["table"][name] = contest(name, asked.peer, asked.rounds, rng)
        print(f"\n{name:<24}{'left':>8}{'MB/s in':>10}{'out':>8}   times zipnn's speed in, out (quartiles)")
        for who, r in rows.items():
            ratios = [r.get(f"times zipnn {word}") for word in ("in", "out")]
            said = "   ".join(f"{m:.2f} ({low:.2f}–{high:.2f})" for low, m, high in filter(None, ratios))
            print(f"{who:<24}{r['share left']:>8.4f}{r['MB/s in']:>10,.0f}{r['MB/s out']:>8,.0f}   {said}", flush=True)
        results |= {"processors": os.cpu_count(), "load average": os.getloadavg()[0]}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main()
