"""Reads hostile files in a process of its own: a line in is a path, a line out is what every reader made of it.
Memory ends 2 GiB above what importing took."""

import contextlib, io, json, os, resource, sys, time

import torch
from torch import nn

from modelzip import cli, exchange, pack, prune
from modelzip.archive import PackError
from mutations import Sample

torch.set_num_threads(1)
READERS = {".npz": exchange.from_npz, ".safetensors": exchange.from_safetensors, ".h5": exchange.from_hdf5}


def shown(x):
    return len(repr(x))


def inspected(path):
    with contextlib.redirect_stdout(out := io.StringIO()), contextlib.redirect_stderr(err := io.StringIO()):
        cli.cli(["inspect", path])
    assert len(err.getvalue()) < 3000, "an error of many lines"
    return len(out.getvalue())


def ran(model):
    "One forward pass of what was loaded, if it is one that can be called."
    if type(model).forward is nn.Module.forward:
        return model
    for x in torch.zeros(1, 1, 28, 28), torch.zeros(2, 130), torch.zeros(1, 3, dtype=torch.long):
        try:
            with torch.no_grad():
                model(x)
            return model
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            if "memory" in str(e):
                raise MemoryError(str(e)[:200]) from None
    return model


def same(model, path):
    "The file beside it, if there is one, holds the same: only its archive was touched."
    if os.path.exists(beside := os.path.join(os.path.dirname(path), "same.mz")):
        a, b = (cli.expanded_tensors(m) for m in (model, cli.open_model(beside)))
        if a.keys() != b.keys() or not all(pack.identical(a[n], b[n]) for n in a):
            raise AssertionError("another answer")
    return model


def ways(path, skeleton, good):
    ending = os.path.splitext(path)[1]
    if ending in READERS:
        return {
            "from": lambda: READERS[ending](path, skeleton),
            "alone": lambda: READERS[ending](path),
            "open": lambda: cli.open_model(path),
        }
    return {
        "load": lambda: ran(pack.load(path)),
        "state": lambda: pack.load(path, skeleton),
        "inspect": lambda: shown(pack.inspect(path)),
        "table": lambda: shown(pack.inspect(path, entropy=False)),
        "diff": lambda: shown(pack.diff(path, good)),
        "same": lambda: shown(pack.diff(path, path)),
        "open": lambda: same(cli.open_model(path), path),
        "command": lambda: inspected(path),
    }


def outcome(f):
    began = time.process_time()
    try:
        f()
        said = "read", 0
    except Exception as e:
        said = type(e).__name__, len(str(e))
    except SystemExit:
        said = "exit", 0
    return [*said, time.process_time() - began]


if __name__ == "__main__":
    skeleton, good = Sample(None), sys.argv[1]
    pack.inspect(good)
    repr(cli.open_model(good))  # imports what is imported late
    import h5py, safetensors

    size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, size + 2**31))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps({name: outcome(f) for name, f in ways(line.rstrip("\n"), skeleton, good).items()}), flush=True)
