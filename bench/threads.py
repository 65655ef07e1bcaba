"""Does a Pool answer single requests faster than the alternatives, with the same answers, and does it lose nothing?

    python bench/threads.py [speed] [save] [share] [soak]      all of them by default; writes bench/results/threads.json

speed  LeNet-5 and MiniLM at single-sample requests, as ratios to one thread of the same round, rounds interleaved:
       one thread · operations of two threads · two processes that each own half of the requests beforehand (nothing
       is sent) · two processes that are sent one request at a time · Pool, all requests at once · Pool, 16 callers
       or one who wait for each answer · Pool with processes. "identical" says whether every answer has the bits of
       a serial one.
save   save_multi_threaded_model of MiniLM, 1 and 2 threads.
share  proportional memory of the file's pages in four processes that map it.
soak   100,000 requests from 16 threads, with errors, cancellations and time-outs at random.
"""

import functools, json, multiprocessing, os, platform, random, statistics, sys, tempfile, time
from collections import Counter
from concurrent.futures import CancelledError, ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from modelzip.data import LeNet5, docstrings, minilm, mnist5k
from modelzip.kernels import use_kernels
from modelzip.workshop.footprint import status_bytes as _status, trim as _trim
from modelzip.pack import save
from modelzip.quant import quantize_model
from modelzip.threads import Pool, intra_op_threads, run_in_threads, save_multi_threaded_model

RESULTS = Path(__file__).parent / "results" / "threads.json"
KINDS = {
    "fp32": lambda m: m,
    "4 bits": lambda m: quantize_model(m, 4, group=25 if isinstance(m, LeNet5) else 32),
    "int8 kernels": lambda m: use_kernels(quantize_model(m, 8)),
}


# ---------------------------------------------------------------- speed


def build(name, kind):
    "A model and its single-sample requests."
    torch.set_grad_enabled(False)
    if name == "LeNet-5":
        return KINDS[kind](LeNet5().eval()), [(x,) for x in mnist5k().test.x[:512]]
    m = minilm()
    ids = [
        torch.tensor(t.ids)[: sum(t.attention_mask)] for t in (m.tokenizer.encode(q) for q in docstrings(96).queries)
    ]
    return KINDS[kind](m), [(i, torch.ones_like(i)) for i in ids]


def serial(model, requests):
    return [model(*(t[None] for t in r))[0] for r in requests]


def owner(name, kind, part, pipe):
    "A process that owns its part of the requests and answers them when told."
    torch.set_num_threads(1)
    model, requests = build(name, kind)
    mine = requests[part]
    serial(model, mine[:8])
    pipe.send("ready")
    while pipe.recv():
        serial(model, mine)
        pipe.send("done")


@functools.cache
def remote(name, kind):
    torch.set_num_threads(1)
    return build(name, kind)[0]


def one_remote(name, kind, request):
    with torch.no_grad():
        return remote(name, kind)(*(torch.from_numpy(a)[None] for a in request))[0].numpy()


class Owners:
    "Two processes with half of the work each."

    def __init__(self, name, kind):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for i in range(2):
            ours, theirs = context.Pipe()
            p = context.Process(target=owner, args=(name, kind, slice(i, None, 2), theirs), daemon=True)
            p.start()
            self.pipes.append(ours)
            self.processes.append(p)
        for pipe in self.pipes:
            pipe.recv()

    def __call__(self):
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()

    def close(self):
        for pipe in self.pipes:
            pipe.send(False)
        for p in self.processes:
            p.join()


def measure(name, kind, rounds):
    "Requests a second of every way, as ratios to one thread in the same round."
    model, requests = build(name, kind)
    truth, answers = serial(model, requests), {}
    samples = [r if len(r) > 1 else r[0] for r in requests]
    arrays = [tuple(t.numpy() for t in r) for r in requests]
    owners, executor = Owners(name, kind), ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    pool, processes = Pool(model, workers=2), Pool(model, workers=2, processes=True)

    def two_threads():
        with intra_op_threads(2):
            return serial(model, requests)

    ways = {
        "one thread": lambda: serial(model, requests),
        "intra-op 2": two_threads,
        "two processes, halves": owners,
        "two processes, sent": lambda: [
            torch.from_numpy(f.result()) for f in [executor.submit(one_remote, name, kind, a) for a in arrays]
        ],
        "Pool": lambda: pool.map(samples),
        "Pool, 16 callers": lambda: run_in_threads(pool, 16, [(s,) for s in samples]),
        "Pool, 1 caller": lambda: [pool(s) for s in samples],
        "Pool, processes": lambda: processes.map(samples),
    }
    times = {w: [] for w in ways}
    for r in range(-2, rounds):
        for w in random.Random(r).sample(list(ways), len(ways)):
            start = time.perf_counter()
            got = ways[w]()
            if r >= 0:
                times[w].append(time.perf_counter() - start)
            if got is not None:
                answers[w] = answers.get(w, True) and all(map(torch.equal, got, truth))
    batch = pool.stats.mean_batch
    for closing in (pool, processes, owners):
        closing.close()
    executor.shutdown()
    return times, answers, batch


def quartiles(values):
    return [round(v, 3) for v in statistics.quantiles(values, n=4, method="inclusive")]


def speed(rounds=7):
    found = {}
    for name in ("LeNet-5", "MiniLM"):
        for kind in KINDS:
            times, same, batch = measure(name, kind, rounds)
            ratio = {w: quartiles([a / b for a, b in zip(times["one thread"], t)]) for w, t in times.items()}
            rivals = [
                min(times[w][r] for w in ("one thread", "intra-op 2", "two processes, halves", "two processes, sent"))
                for r in range(rounds)
            ]
            goal = {
                w: quartiles([a / b for a, b in zip(rivals, times[w])])
                for w in ("Pool", "Pool, 16 callers", "Pool, processes")
            }
            found[f"{name}, {kind}"] = {
                "times as fast as one thread": ratio,
                "over the best rival": goal,
                "identical": same,
                "mean batch": round(batch, 1),
            }
            print(f"\n{name}, {kind} (mean batch {batch:.1f})")
            for w, (low, middle, high) in ratio.items():
                more = f"   × best rival {goal[w][1]:.2f} ({goal[w][0]:.2f}–{goal[w][2]:.2f})" if w in goal else ""
                bits = {True: "identical", False: "other bits"}.get(same.get(w), "")
                print(f"  {w:<22} {middle:5.2f} ({low:.2f}–{high:.2f})  {bits:<10}{more}", flush=True)
    return found


# ---------------------------------------------------------------- files


def saving(rounds=5):
    model, found = quantize_model(minilm(), 4, group=32), {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for r in range(-1, rounds):
            for n in found:
                start = time.perf_counter()
                save_multi_threaded_model(model, f"{folder}/{n}.mz", threads=n)
                if r >= 0:
                    found[n].append(time.perf_counter() - start)
        same = Path(f"{folder}/1.mz").read_bytes() == Path(f"{folder}/2.mz").read_bytes()
    gain = quartiles([a / b for a, b in zip(found[1], found[2])])
    print(
        f"\nsave_multi_threaded_model, MiniLM at 4 bits: two threads {gain[1]:.2f} ({gain[0]:.2f}–{gain[2]:.2f}) times"
        f" as fast as one; same file: {same}"
    )
    return {"two threads over one": gain, "same file": same}


def mapped(pid, name):
    "Bytes of a process's mappings of a file: resident, and its proportional share."
    totals, here = Counter(), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):
            here = line.endswith(name)
        elif here and word in ("Rss:", "Pss:"):
            totals[word] += int(rest[0]) * 1024
    return totals["Rss:"], totals["Pss:"]


def sharing():
    "Four processes that serve one mapped file."
    with tempfile.TemporaryDirectory() as folder:
        path = save(minilm(), f"{folder}/minilm.mz", archive=False)
        ids = torch.arange(1000, 1032)
        with Pool(path, workers=4, processes=True) as pool:
            for _ in range(8):
                pool.map([(ids, torch.ones_like(ids))] * 64)
            rows = [mapped(pid, "minilm.mz") for pid in pool.pids]
        size = path.stat().st_size
    print(f"\nfour processes with one mapped MiniLM of {size:,} bytes")
    for rss, pss in rows:
        print(f"  resident {rss / size:.2f} of the file, proportional share {pss / size:.2f}")
    return {"file": size, "resident": [r for r, _ in rows], "proportional": [p for _, p in rows]}


# ---------------------------------------------------------------- soak


class Fragile(torch.nn.Module):
    "Answers 3x + its number; refuses negative ones."

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.layer.weight.data = torch.tensor([[3.0, 0], [0, 1]])
        self.layer.bias.data.zero_()

    def forward(self, x):
        if (x[:, 0] < 0).any():
            raise ValueError(f"refused {x[x[:, 0] < 0][0, 1]:.0f}")
        return self.layer(x)


class Client:
    "Asks, cancels, asks too late, asks what is refused; checks every answer."

    def __init__(self, number, pool, requests):
        self.draw, self.pool, self.requests, self.number, self.seen, self.called = (
            random.Random(number),
            pool,
            requests,
            number,
            Counter(),
            Counter(),
        )

    def ask(self, i):
        kind = self.draw.choices(["fine", "refused", "cancel", "late"], [80, 8, 8, 4])[0]
        x = torch.tensor([-1.0 if kind == "refused" else float(i % 1000), float(self.number * self.requests + i)])
        f = self.pool.submit(x, timeout=0.0 if kind == "late" else None, wait=60)
        f.add_done_callback(lambda f, i=i: self.called.update([i]))
        if kind == "cancel":
            f.cancel()
        return kind, x, f

    def check(self, kind, x, f):
        try:
            y = f.result()
        except CancelledError:
            end = "cancelled"
            assert kind == "cancel"
        except TimeoutError:
            end = "late"
            assert kind == "late"
        except ValueError as e:
            end = "refused"
            assert kind == "refused" and str(e) == f"refused {x[1]:.0f}", (kind, e, x)
        else:
            end = "fine"
            assert kind != "refused" and y.tolist() == [3 * x[0], x[1]], (kind, x, y)
        self.seen[end] += 1

    def run(self):
        done = 0
        while done < self.requests:
            burst = [self.ask(i) for i in range(done, min(self.requests, done + self.draw.randint(1, 12)))]
            for b in burst:
                self.check(*b)
            done += len(burst)
        assert len(self.called) == self.requests and set(self.called.values()) == {1}
        return self.seen


def soak(requests=100_000, clients=16, workers=2, parts=5):
    "Returns what happened; any lost, doubled or mixed-up answer raises."
    memory, seen = [], Counter()
    with Pool(Fragile(), workers=workers, max_batch=16, queue_size=64) as pool:
        for part in range(parts):
            team = [Client(part * clients + i, pool, requests // clients // parts) for i in range(clients)]
            for counts in run_in_threads(lambda c: c.run(), clients, team):
                seen += counts
            del team
            _trim()
            memory.append(_status("VmRSS"))
        stats = pool.stats
    assert (
        sum(seen.values())
        == stats.served + stats.failed + stats.cancelled + stats.expired
        == requests // clients // parts * parts * clients
    )
    assert (stats.served, stats.failed, stats.expired) == (
        seen["fine"],
        seen["refused"],
        seen["late"],
    ) and stats.waiting == 0
    return {
        "requests": sum(seen.values()),
        "clients": clients,
        "outcomes": dict(seen),
        "mean batch": round(stats.mean_batch, 1),
        "resident bytes after each fifth": memory,
    }


def soaking():
    found = soak()
    first, last = found["resident bytes after each fifth"][0], found["resident bytes after each fifth"][-1]
    print(
        f"\nsoak: {found['requests']:,} requests from {found['clients']} threads: {found['outcomes']}, mean batch"
        f" {found['mean batch']}; nothing lost, doubled or mixed up; memory after the last fifth / after the first:"
        f" {last / first:.3f}"
    )
    return found


def main():
    parts = {"speed": speed, "save": saving, "share": sharing, "soak": soaking}
    chosen = [a for a in sys.argv[1:] if a in parts] or list(parts)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in chosen:
        found[name] = parts[name]()
    found["about"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPUs": len(os.sched_getaffinity(0)),
        "SIMD": torch.backends.cpu.get_cpu_capability(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
