"""Files of models: ten thousand damaged ones, sizes and speeds against safetensors and others in the same run,
memory of four processes.

python bench/pack.py [fuzz] [sizes] [speeds] [sharing]      (everything when nothing is named; OMP_NUM_THREADS as it is)
"""

import json, lzma, math, multiprocessing, os, resource, statistics, sys, tempfile, time, warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import zstandard
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from mutations import FORGERY, fuzz

from modelzip.data import build_model, minilm
from modelzip.exchange import from_hdf5, from_npz, from_safetensors, to_hdf5, to_npz, to_safetensors
from modelzip.pack import inspect, load, read_tensor, save
from modelzip.quant import quantize_model

warnings.filterwarnings("ignore")
RESULTS = Path(__file__).parent / "results"
WAYS = {
    "int8 per channel": dict(bits=8),
    "6-bit per channel": dict(bits=6),
    "4-bit group 32": dict(bits=4, group=32),
    "3-bit group 32": dict(bits=3, group=32),
    "ternary group 32": dict(levels=3, group=32, observer="mse"),
}


# ---- damage -------------------------------------------------------------------------------------------------------
def fuzzing(n=12_000, seed=11, room=2**31):
    "Judge n mutations in a process that may not take more than `room` bytes of addresses beyond what it has."

    def work(out):
        torch.set_num_threads(1)
        with open("/proc/self/statm") as f:
            resource.setrlimit(resource.RLIMIT_AS, (int(f.read().split()[0]) * resource.getpagesize() + room,) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as tmp:
            counts = fuzz(n, Path(tmp), seed)
        out.put(
            ([(*k, c) for k, c in counts.items()], 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
        )

    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    p = context.Process(target=work, args=(out,))
    p.start()
    p.join()
    assert p.exitcode == 0, "a mutation was judged badly (see above)"
    counts, grown = out.get()
    table = defaultdict(lambda: defaultdict(int))
    for kind, use, outcome, c in counts:
        table[kind][outcome] += c
    total = {o: sum(row[o] for row in table.values()) for o in ("refused", "exact", "another valid file")}
    print(
        f"\n{n:,} mutated files, each read by load, load(mmap=True), inspect and read_tensor; memory grew by"
        f" {grown / 1e6:.0f} MB at most"
    )
    print(f"{'mutation':<18} {'refused':>8} {'exact':>6} {'another valid file':>19}")
    for kind, row in table.items():
        print(
            f"{kind:<18} {row['refused']:>8,} {row['exact']:>6,}"
            f" {row['another valid file'] if kind in FORGERY else '':>19}"
        )
    print(f"{'together':<18} {total['refused']:>8,} {total['exact']:>6,} {total['another valid file']:>19,}")
    return dict(
        mutations=n,
        seed=seed,
        memory_growth_bytes=grown,
        outcomes=total,
        by_mutation={k: dict(v) for k, v in table.items()},
    )


# ---- sizes --------------------------------------------------------------------------------------------------------
def versions():
    bert = minilm()
    yield "fp32", bert
    for name, how in WAYS.items():
        yield name, quantize_model(bert, **how)


def sizes(folder):
    "Bytes of every file as a share of fp32's mapped one."
    table, weights = [], sum(p.numel() for p in minilm().parameters())
    for name, m in versions():
        path = folder / "x"
        row = {"archived": os.path.getsize(save(m, path))}
        c = inspect(path)
        entropy = sum(l.entropy * math.prod(l.shape) for l in c.lines if l.entropy is not None) / weights
        row |= {
            "mapped": os.path.getsize(save(m, path, archive=False)),
            "npz, deflated": os.path.getsize(to_npz(m, path, compress=True)),
            "HDF5": os.path.getsize(to_hdf5(m, path)),
        }
        plain = to_safetensors(m, path).read_bytes()
        row |= {
            "safetensors": len(plain),
            "safetensors, zstd -19": len(zstandard.ZstdCompressor(level=19).compress(plain)),
            "safetensors, xz": len(lzma.compress(plain)),
        }
        torch.save(m.state_dict(), path)
        row["torch.save"] = os.path.getsize(path)
        path.unlink()
        table.append(
            dict(
                version=name,
                bytes=row,
                entropy_bits_a_weight=entropy,
                archived_bits_a_weight=8 * row["archived"] / weights,
            )
        )
    whole = table[0]["bytes"]["mapped"]
    columns = [
        "mapped",
        "archived",
        "safetensors",
        "safetensors, zstd -19",
        "safetensors, xz",
        "npz, deflated",
        "HDF5",
        "torch.save",
    ]
    print(
        f"\nMiniLM's {weights:,} weights: size of the file, mapped fp32 ({whole:,} bytes) = 1; bits a weight of the"
        " archived file, and order-0 entropy"
    )
    print(
        f"{'':<18}"
        + "".join(f"{c.replace('safetensors,', 'st,'):>15}" for c in columns)
        + f"{'bits':>8}{'entropy':>9}{'over':>8}"
    )
    for r in table:
        over = r["archived_bits_a_weight"] / r["entropy_bits_a_weight"] - 1
        print(
            f"{r['version']:<18}"
            + "".join(f"{r['bytes'][c] / whole:>15.4f}" for c in columns)
            + f"{r['archived_bits_a_weight']:>8.3f}{r['entropy_bits_a_weight']:>9.3f}{over:>8.1%}"
        )
        r["share_of_fp32"] = {c: round(b / whole, 5) for c, b in r["bytes"].items()}
    return table


# ---- speeds -------------------------------------------------------------------------------------------------------
def interleaved(candidates, rounds=9):
    "Seconds of each, measured in turns so that drift hits all alike: all rounds but the first."
    times = {name: [] for name in candidates}
    for r in range(rounds + 1):
        for name, f in candidates.items():
            began = time.perf_counter()
            kept = f()
            seconds = time.perf_counter() - began
            del kept
            if r:
                times[name].append(seconds)
    return times


def ratios(times, base):
    "Median and quartiles of the ratio to one of them, round by round; median milliseconds."
    out = {}
    for name, t in times.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(t, times[base])], n=4)
        out[name] = dict(ratio=middle, low=low, high=high, milliseconds=1000 * statistics.median(t))
    return out


def show(title, rows):
    print(f"\n{title}\n{'':<44} {'ratio':>7} {'quartiles':>15} {'ms':>8}")
    for name, r in rows.items():
        print(f"{name:<44} {r['ratio']:>7.2f} {r['low']:>7.2f}–{r['high']:<7.2f} {r['milliseconds']:>8.1f}")


def speeds(folder):
    """Loading and saving, against safetensors in the same rounds. In memory (tmpfs) where there is one, so that no
    disk is measured."""
    bert = minilm()
    four, eight = quantize_model(bert, 4, group=32), quantize_model(bert, 8)
    with torch.device("meta"):
        skeleton = build_model("minilm")
    files = {
        f"{v}, {use}": save(m, folder / f"{v} {use}.mz", archive=use == "archived")
        for v, m in (("fp32", bert), ("int8", eight), ("4-bit", four))
        for use in ("mapped", "archived")
    }
    state = bert.state_dict()
    save_file(state, folder / "bert.safetensors")
    torch.save(state, folder / "bert.pt")
    others = {
        "safetensors": (to_safetensors, from_safetensors),
        "npz": (to_npz, from_npz),
        "HDF5": (to_hdf5, from_hdf5),
    }
    for name, (to, _) in others.items():
        to(four, folder / f"four {name}")
    loading = {
        "fp32, safetensors, copied into memory": lambda: {
            k: t.clone() for k, t in load_file(folder / "bert.safetensors").items()
        },
        "fp32, safetensors, mapped": lambda: load_file(folder / "bert.safetensors"),
        "fp32, torch.load": lambda: torch.load(folder / "bert.pt"),
    }
    for name, path in files.items():
        loading[name] = partial(load, path, skeleton)
        if "mapped" in name:
            loading[f"{name}, mmap"] = partial(load, path, skeleton, mmap=True)
            loading[f"{name}, mmap, verify=False"] = partial(load, path, skeleton, mmap=True, verify=False)
    loading |= {
        f"4-bit, from_{name}": partial(back, folder / f"four {name}", skeleton) for name, (_, back) in others.items()
    }
    loading["4-bit, archived, read_tensor(words.weight)"] = partial(
        read_tensor, files["4-bit, archived"], "words.weight"
    )
    loads = ratios(interleaved(loading), "fp32, safetensors, copied into memory")
    show("Loading MiniLM, safetensors (copied) = 1", loads)
    out = folder / "out"
    saving = {
        "fp32, safetensors": lambda: save_file(state, out),
        "fp32, torch.save": lambda: torch.save(state, out),
        "fp32, mapped": lambda: save(bert, out, archive=False),
    }
    for v, m in ("fp32", bert), ("int8", eight), ("4-bit", four):
        for threads in 1, 2:
            saving[f"{v}, archived, threads={threads}"] = partial(save, m, out, threads=threads)
    saving |= {"4-bit, mapped": lambda: save(four, out, archive=False)} | {
        f"4-bit, to_{name}": partial(to, four, out) for name, (to, _) in others.items()
    }
    saves = ratios(interleaved(saving, rounds=5), "fp32, safetensors")
    show("Saving MiniLM, safetensors = 1", saves)
    print(f"\n{torch.get_num_threads()} threads; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    return dict(
        threads_of_torch=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        processors=os.cpu_count(),
        loading=loads,
        saving=saves,
    )


# ---- sharing ------------------------------------------------------------------------------------------------------
def rollup():
    with open("/proc/self/smaps_rollup") as f:
        return {k: int(v.split()[0]) * 1024 for k, v in (line.split(":") for line in f if line.count(":") == 1)}


def costs(path, model, how, processes=4):
    """What each process pays for the model: growth of its PSS and of its private memory, all of them holding it at
    the same time."""
    context = multiprocessing.get_context("fork")
    together, out = context.Barrier(processes), context.SimpleQueue()

    def worker():
        torch.set_num_threads(1)
        together.wait(60)
        before = rollup()
        together.wait(60)
        m = load(path, model, **how)
        loaded = rollup()
        together.wait(60)
        for t in [*m.parameters(), *m.buffers()]:
            t.detach().view(-1).view(torch.uint8)[::4096].clone()  # a byte of every page
        together.wait(60)
        touched = rollup()
        together.wait(60)
        private = lambda s: s["Private_Dirty"] + s["Private_Clean"]
        out.put((touched["Pss"] - before["Pss"], private(loaded) - private(before), private(touched) - private(before)))

    workers = [context.Process(target=worker) for _ in range(processes)]
    for w in workers:
        w.start()
    got = [out.get() for _ in workers]
    for w in workers:
        w.join()
    return [statistics.mean(x) for x in zip(*got)]


def sharing(folder):
    with torch.device("meta"):
        skeleton = build_model("minilm")
    bert, table = minilm(), []
    files = {
        "fp32": save(bert, folder / "fp32.mz", archive=False),
        "4-bit group 32": save(quantize_model(bert, 4, group=32), folder / "four.mz", archive=False),
    }
    del bert
    for name, path in files.items():
        for way, how in {
            "copied": {},
            "mmap": dict(mmap=True),
            "mmap, verify=False": dict(mmap=True, verify=False),
        }.items():
            pss, private, touched = costs(path, skeleton, how)
            table.append(
                dict(
                    version=name,
                    way=way,
                    file_bytes=os.path.getsize(path),
                    pss_bytes=pss,
                    private_after_loading_bytes=private,
                    private_after_touching_bytes=touched,
                )
            )
    print("\nFour processes hold MiniLM, every page touched: megabytes that each pays")
    print(f"{'':<36} {'file':>8} {'PSS':>8} {'private, loaded':>16} {'private, touched':>17}")
    for r in table:
        print(
            f"{r['version'] + ', ' + r['way']:<36} {r['file_bytes'] / 1e6:>8.1f} {r['pss_bytes'] / 1e6:>8.1f}"
            f" {r['private_after_loading_bytes'] / 1e6:>16.1f} {r['private_after_touching_bytes'] / 1e6:>17.1f}"
        )
    return table


def main():
    asked = sys.argv[1:] or ["fuzz", "sharing", "sizes", "speeds"]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "pack.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None
    for name in asked:
        with tempfile.TemporaryDirectory(dir=fast) as tmp:
            results[name] = (
                fuzzing() if name == "fuzz" else {"sharing": sharing, "sizes": sizes, "speeds": speeds}[name](Path(tmp))
            )
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
