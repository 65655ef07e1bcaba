"""Saving that is killed, raced or out of room. Run by test_pack.py in a process of its own, because it forks and kills:

    python tests/faults_pack.py [kills]
"""
import errno, os, random, resource, signal, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from torch import nn

from modelzip.pack import PackError, load, save

torch.set_num_threads(1)


def child(f, *args):
    "Run f in a forked process; returns its id."
    if pid := os.fork(): return pid
    try: f(*args)
    except BaseException as e: print("child:", repr(e), flush=True); os._exit(1)
    os._exit(0)

def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def constant(value, n=400):
    "A model whose every weight is one value: a mixture of two saves would show."
    m = nn.Sequential(nn.Linear(n, n), nn.Linear(n, n))
    with torch.no_grad():
        for p in m.parameters(): p.fill_(value)
    return m

def value_of(path, skeleton):
    "The one value that all weights have."
    values = {v.item() for p in load(path, skeleton).parameters() for v in (p.min(), p.max())}
    assert len(values) == 1, f"a mixture of models: {values}"
    return values.pop()

def peak_memory(folder):
    "Loading takes the memory of the model and little more."
    n = 5000
    assert wait(child(lambda: save(nn.Linear(n, n), folder/"big.mz"))) == 0
    with torch.device("meta"): skeleton = nn.Linear(n, n)
    size = os.path.getsize(folder/"big.mz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    m = load(folder/"big.mz", skeleton)
    grown = 1024*(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 1.2*size, f"loading {size:,} bytes took {grown:,}"
    (folder/"big.mz").unlink()
    return f"loading {size/1e6:.0f} MB took {grown/1e6:.0f} MB"

def killed(folder, kills=12, seed=0):
    "kill -9 at random moments: the path always holds one whole model, and the next save works beside what was left."
    rng, path, skeleton = random.Random(seed), folder/"killed.mz", constant(0)
    models = [constant(v) for v in (1, 2)]
    save(models[0], path)
    def forever():
        while True:
            for m in models: save(m, path)
    seen, left = [], 0
    for _ in range(kills):
        pid = child(forever)
        time.sleep(.02 + rng.random()*.1)
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        seen.append(value_of(path, skeleton))
        left = len(list(folder.glob(".modelzip-*.tmp")))
    assert set(seen) <= {1., 2.}
    save(models[1], path); assert value_of(path, skeleton) == 2
    for p in folder.glob(".modelzip-*.tmp"): p.unlink()
    return f"{kills} kills, {left} left a temporary file"

def raced(folder, saves=40):
    "Two processes save to one path while a third one loads."
    path, skeleton = folder/"raced.mz", constant(0)
    save(constant(1), path)
    def writer(value):
        m = constant(value)
        for _ in range(saves): save(m, path)
    pids, seen = [child(writer, v) for v in (1, 2)], []
    while any(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for p in pids): seen.append(value_of(path, skeleton))
    assert [wait(p) for p in pids] == [0, 0] and set(seen) | {value_of(path, skeleton)} <= {1., 2.}
    assert not list(folder.glob(".modelzip-*")), "a save left its temporary file"
    return f"2 × {saves} saves, {len(seen)} loads in between"

def full_disk(folder):
    "A file system with no room: a clear error, the old file, no leftover. Needs the right to mount one."
    disk = folder/"disk"; disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode: return "full disk: not tried (may not mount)"
    try:
        path = save(nn.Linear(2, 2), disk/"x.mz"); old = path.read_bytes()
        try: save(constant(1), path)
        except OSError as e: assert e.errno == errno.ENOSPC and str(path) in str(e), e
        else: raise AssertionError("no error on a full disk")
        assert path.read_bytes() == old and os.listdir(disk) == ["x.mz"]
    finally: subprocess.run(["umount", disk], check=True)
    return "full disk: clear error, old file kept"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        print(peak_memory(folder)); print(killed(folder, *map(int, sys.argv[1:2]))); print(raced(folder)); print(full_disk(folder))
