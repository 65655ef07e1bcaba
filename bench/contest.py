"""Engines against each other, each in a process of its own, in turns.

Several engines in one process falsify each other's times: their threads go on spinning for work after a call, on the
processors that the next one needs. So every contestant here lives in a process of its own, which is stopped (SIGSTOP)
while others have their turn. A round is one turn of each, in random order; what is reported is the median over rounds
of the ratio to the first contestant in the same round, with an interval of order statistics (`median_interval`).

A program that uses this calls `contest` with the names of its contestants, and answers `serve` when it is started as
one of them.
"""

import os, signal, statistics, subprocess, sys, time
from pathlib import Path

import numpy as np

from modelzip.measure import median_interval

CALLS = {1: 12, 8: 4, 32: 2}  # in one turn, by batch: its time is their median


def serve(build):
    """Be a contestant: build the engine, then answer each line 'batch' of the input with seconds.

    `build()` gives a function of a batch size that runs the engine and returns its output as an array, and the output
    that float32 gives for the largest batch.
    """
    run, exact = build()
    batch = len(exact)
    found = np.asarray(run(batch), dtype=np.float64).reshape(batch, -1)
    exact = np.asarray(exact, dtype=np.float64).reshape(batch, -1)
    cosine = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
    print(f"{cosine.mean():.6f}", flush=True)
    for line in sys.stdin:
        batch, times = int(line), []
        run(batch)  # what others pushed out of the caches comes back
        for _ in range(CALLS[batch]):
            began = time.perf_counter()
            run(batch)
            times.append(time.perf_counter() - began)
        print(statistics.median(times), flush=True)


class Contestant:
    "A process that waits, stopped, for its turn."

    def __init__(self, command, threads, log):
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        pipe, self.log = subprocess.PIPE, open(log, "w+")
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=env)
        self.cosine = float(self._line())
        self.process.send_signal(signal.SIGSTOP)

    def _line(self):
        while line := self.process.stdout.readline():
            try:
                return str(float(line))
            except ValueError:  # what the engine itself prints
                continue
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["it ended without a word"])[-1][:160]
        raise RuntimeError(f"{' '.join(self.process.args[3:6])} (exit status {self.process.wait()}): {last}")

    def seconds(self, batch):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        found = float(self._line())
        self.process.send_signal(signal.SIGSTOP)
        return found

    def end(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def contest(program, table, names, folder, threads=(1, 2), batches=(1, 8, 32), rounds=9, seed=0):
    "Rows by name: `cosine`, and for each cell how many times as fast as the first, with an interval."
    rows, rng = {}, np.random.default_rng(seed)
    for count in threads:
        players = {}
        for name in names:
            command = [sys.executable, str(program), "--serve", table, name, str(count), str(folder)]
            try:
                players[name] = Contestant(command, count, Path(folder) / "log")
            except RuntimeError as why:
                print(f"{name} is left out: {why}", flush=True)
        times = {(n, b): [] for n in players for b in batches}
        try:
            for _ in range(rounds):
                for batch in batches:
                    for i in rng.permutation(len(players)):
                        name = list(players)[i]
                        times[name, batch].append(players[name].seconds(batch))
        except RuntimeError:
            for player in players.values():
                player.process.kill()
            raise
        first = next(iter(players))
        for name, player in players.items():
            row = rows.setdefault(name, {"cosine": player.cosine})
            for batch in batches:
                ratio = np.array(times[first, batch]) / np.array(times[name, batch])
                low, high, _ = median_interval(ratio)
                row[f"threads {count}, batch {batch}"] = {
                    "times as fast": float(np.median(ratio)),
                    "low": low,
                    "high": high,
                }
            player.end()
    return rows


def show(title, rows, ours="ours", least=0.998):
    "The table, and in each cell our best with a cosine of at least `least` beside the best other."
    cells = [c for c in next(iter(rows.values())) if c.startswith("threads")]
    print(f"\n{title}\n{'':<60}{'cosine':>8}" + "".join(f"{c:>21}" for c in cells))
    for name, r in rows.items():
        line = "".join(f"{r[c]['times as fast']:>8.2f}× ({r[c]['low']:.2f}–{r[c]['high']:.2f})" for c in cells)
        print(f"{name:<60}{r['cosine']:>8.4f}{line}")
    speed = lambda r, c: r[c]["times as fast"]
    for bound in (least, 0.999):
        mine = {n: r for n, r in rows.items() if n.startswith(ours) and r["cosine"] >= bound}
        others = {n: r for n, r in rows.items() if not n.startswith(ours) and r["cosine"] >= 0.99}
        for c in cells if mine and others else ():
            best, peer = max(mine, key=lambda n: speed(mine[n], c)), max(others, key=lambda n: speed(others[n], c))
            ratio = speed(mine[best], c) / speed(others[peer], c)
            print(f"cosine ≥ {bound}, {c}: {best} is {ratio:.2f} times as fast as {peer}")
