"""Saving that is killed, raced or out of room, mapped files that are replaced, and how much memory all this takes.
Run by the test suite in a process of its own, because it forks and kills:

    python tests/faults_pack.py [kills]
"""

import ctypes, errno, os, random, signal, subprocess, sys, tempfile, time, zlib
from pathlib import Path

import torch
from torch import nn

from modelzip.exchange import load_many, save_many, to_npz, to_safetensors
from modelzip.pack import as_bytes, load, save
from modelzip.quant import quantize_model

torch.set_num_threads(1)
PATTERN = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))


def child(f, *args):
    "Run f in a forked process; returns its id."
    if pid := os.fork():
        return pid
    try:
        f(*args)
    except BaseException as e:
        print("child:", repr(e), flush=True)
        os._exit(1)
    os._exit(0)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def scaled(value):
    """A model whose weights are one value times a fixed pattern, so that they have to be coded in earnest: a
    mixture of two saves would show."""
    m = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(PATTERN * value)
    return m


def value_in(m):
    "The one value by which all weights are scaled."
    values = {round(p[0, 0].item() / PATTERN[0, 0].item()) for p in m.parameters()}
    value = values.pop()
    assert not values and all(torch.equal(p, PATTERN * value) for p in m.parameters()), "a mixture of models"
    return value


def value_of(path, skeleton):
    return value_in(load(path, skeleton))


# ---- memory -------------------------------------------------------------------------------------------------------
def status(key, pid="self"):
    "A line of /proc/…/status, in bytes."
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


M_MMAP_THRESHOLD = -3  # <malloc.h>


def peak_of(f, first=lambda: None):
    """By how many bytes a process of its own grows at most while it runs f(), after it has run first(), which touches
    the code (of some builds of PyTorch 17 MB). What is freed goes back to the system at once: by itself glibc keeps
    freed blocks of up to 32 MB for each thread, more of them the busier the machine is."""
    read, write = os.pipe()

    def measured():
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(M_MMAP_THRESHOLD, 2**17)
        first()
        with open("/proc/self/clear_refs", "w") as c:
            c.write("5")  # the high-water mark starts anew
        before = status("VmRSS")
        f()
        os.write(write, str(status("VmHWM") - before).encode())

    assert wait(child(measured)) == 0
    os.close(write)
    with os.fdopen(read) as r:
        return int(r.read())


LAYERS, N = 3, 2000  # tensors of 16 MB
WORK = {"mapped": 8 * 2**20, "archived": 28 * 2**20}  # what coding by two threads and reading need, whatever the model


def big(seed=0, n=N):
    "Random weights, quickly."
    m = nn.Sequential(*(nn.Linear(n, n, bias=False, device="meta") for _ in range(LAYERS)))
    g = torch.Generator().manual_seed(seed)
    for layer in m:
        layer.weight = nn.Parameter(torch.empty(n, n).uniform_(generator=g), requires_grad=False)
    return m


def peak_memory(folder):
    """Making and saving: the model, one tensor more, and one that is read back; loading: the model and one tensor
    more. Whichever use, and however many models in a row."""
    with torch.device("meta"):
        skeleton = nn.Sequential(*(nn.Linear(N, N, bias=False) for _ in range(LAYERS)))

    def models(n):
        for i in range(n):
            yield f"big{i}", big(i)

    def load_all(paths, **how):
        for _, m in load_many(paths, skeleton, progress=False, **how):
            del m

    tensor, model, said, paths = 4 * N * N, 4 * N * N * LAYERS, [], [folder / f"big{i}.mz" for i in range(2)]
    for use, work in WORK.items():
        how = dict(progress=False, archive=use == "archived", threads=2)
        small = lambda: save_many({"small": big(n=4)}, folder, **how)
        saving = peak_of(lambda: save_many(models(2), folder, **how), small)
        loading = peak_of(lambda: load_all(paths), lambda: load_all([folder / "small.mz"]))
        said.append(f"{use}: saving {saving / model:.2f}, loading {loading / model:.2f}")
        assert saving < model + 2 * tensor + work and loading < model + tensor + work, said
        if use == "mapped":
            touched = peak_of(lambda: load_all(paths, mmap=True), lambda: load_all([folder / "small.mz"], mmap=True))
            assert touched < tensor, touched
            said.append(f"with mmap {touched / model:.2f}")
    for p in paths:
        p.unlink()
    return f"peak memory in models of {LAYERS} tensors, two in a row: {'; '.join(said)}"


# ---- interrupted saves --------------------------------------------------------------------------------------------
def killed(folder, kills=50, seed=0):
    "kill -9 at random moments: the path always holds one whole model, and the next save works beside what was left."
    rng, path, skeleton, models = random.Random(seed), folder / "killed.mz", scaled(0), [scaled(1), scaled(2)]
    said = []
    for archive in True, False:
        began = time.perf_counter()
        save(models[0], path, archive)
        once = time.perf_counter() - began

        def forever():
            while True:
                for m in models:
                    save(m, path, archive)

        seen = []
        for _ in range(kills // 2):
            pid = child(forever)
            time.sleep(rng.random() * min(10 * once, 0.25))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            seen.append(value_of(path, skeleton))
        left = list(folder.glob(".modelzip-*.tmp"))
        assert set(seen) <= {1, 2}
        save(models[1], path, archive)
        assert value_of(path, skeleton) == 2
        for p in left:
            p.unlink()
        said.append(
            f"{kills // 2} kills of {'archived' if archive else 'mapped'} saves, {len(left)} left a temporary file,"
            f" {seen.count(2)} saw the second model"
        )
    return "; ".join(said)


def raced(folder, saves=30):
    "Two processes save to one path, one archived and one mapped, while a third one loads."
    path, skeleton = folder / "raced.mz", scaled(0)
    save(scaled(1), path)

    def writer(value, archive):
        m = scaled(value)
        for _ in range(saves):
            save(m, path, archive)

    pids, seen = [child(writer, v, v == 1) for v in (1, 2)], []
    while any(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for p in pids):
        seen.append(value_of(path, skeleton))
    assert [wait(p) for p in pids] == [0, 0] and set(seen) | {value_of(path, skeleton)} <= {1, 2}
    assert not list(folder.glob(".modelzip-*")), "a save left its temporary file"
    return f"2 × {saves} saves, {len(seen)} loads in between"


def full_disk(folder):
    "A file system with no room: a clear error, the old file, no leftover. Needs the right to mount one."
    disk = folder / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode
    ):
        return "full disk: not tried (may not mount)"
    ways = {
        "archived": save,
        "mapped": lambda m, p: save(m, p, archive=False),
        "safetensors": to_safetensors,
        "npz": to_npz,
    }
    try:
        from modelzip.exchange import to_hdf5
        import h5py

        ways["HDF5"] = to_hdf5
    except ImportError:
        pass
    try:
        for name, write in ways.items():
            path = write(nn.Linear(2, 2), disk / "x")
            old = path.read_bytes()
            try:
                write(scaled(1), path)
            except OSError as e:
                assert e.errno == errno.ENOSPC and str(path) in str(e), (name, e)
            else:
                raise AssertionError(f"{name}: no error on a full disk")
            assert path.read_bytes() == old and os.listdir(disk) == ["x"], name
    finally:
        subprocess.run(["umount", disk], check=True)
    return f"full disk: clear error, old file kept ({', '.join(ways)})"


# ---- mapped files -------------------------------------------------------------------------------------------------
def replaced_while_mapped(folder, times=10):
    "Other processes save over the file that is mapped, and delete it: the mapped model stays what it was."
    path, skeleton = folder / "mapped.mz", scaled(0)
    save(scaled(1), path, archive=False)
    mapped, lazy = (
        load(path, skeleton, mmap=True),
        load(path, skeleton, mmap=True, verify=False),
    )  # `lazy` has not been looked at yet
    for i in range(times):
        assert wait(child(save, scaled(2 + i), path, bool(i % 2))) == 0
        assert value_in(mapped) == 1 and value_of(path, skeleton) == 2 + i
    save(lazy, path, archive=False)
    assert value_of(path, skeleton) == 1  # over itself
    path.unlink()
    assert value_in(lazy) == value_in(mapped) == 1
    return f"a mapped model outlived {times} saves over its file"


def mapping(path):
    "What this process pays for a file that it has mapped: bytes by kind of memory."
    out, inside = {}, False
    with open("/proc/self/smaps") as f:
        for line in f:
            key, *rest = line.split()
            if "-" in key and not key.endswith(":"):
                inside = str(path) in line
            elif inside and rest[1:] == ["kB"]:
                out[key[:-1]] = out.get(key[:-1], 0) + 1024 * int(rest[0])
    return out


def shared(folder, processes=4):
    "Processes that load one mapped file share its pages; what one of them writes, the others never see."
    path = folder / "shared.mz"
    m = quantize_model(nn.Sequential(*(nn.Linear(2000, 2000, bias=False) for _ in range(6))), 8)
    save(m, path, archive=False)
    size = os.path.getsize(path)
    contents = lambda model: [zlib.crc32(as_bytes(b)) for b in model.buffers()]
    want = contents(m)

    def worker(i, go, done):
        got = load(path, m, mmap=True)
        first = contents(got)
        if i == 0:
            next(got.buffers()).view(torch.uint8)[:4096] = 7
        os.write(done, b".")
        os.read(go, 1)  # until everybody has touched everything
        again = contents(got)
        cost = mapping(path)
        os.write(done, b".")
        os.read(go, 1)
        assert first == want and (again == want) == (i != 0)
        assert (
            cost["Rss"] > 0.95 * size
            and cost["Pss"] < 1.2 * size / processes
            and cost["Private_Dirty"] <= (2**13 if i == 0 else 0)
        ), (cost, size)

    (go_r, go_w), (done_r, done_w) = os.pipe(), os.pipe()
    pids = [child(worker, i, go_r, done_w) for i in range(processes)]
    for _ in range(2):
        for _ in pids:
            os.read(done_r, 1)
        os.write(go_w, b"." * processes)
    assert [wait(p) for p in pids] == [0] * processes
    path.unlink()
    return f"{processes} processes share {size / 1e6:.0f} MB"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
        often = [lambda f: killed(f, kills), lambda f: raced(f, 3 * kills // 5)]
        for check in peak_memory, *often, full_disk, lambda f: replaced_while_mapped(f, 2 + kills // 6), shared:
            print(check(folder), flush=True)
