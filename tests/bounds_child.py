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


def ways(path, skeleton, good):
    ending = os.path.splitext(path)[1]
    if ending in READERS:
        return {
            "from": lambda: READERS[ending](path, skeleton),
            "alone": lambda: READERS[ending](path),
            "open": lambda: cli.open_model(path),
        }
    return {
        "load": lambda: pack.load(path),
        "state": lambda: pack.load(path, skeleton),
        "inspect": lambda: shown(pack.inspect(path)),
        "table": lambda: shown(pack.inspect(path, entropy=False)),
        "diff": lambda: shown(pack.diff(path, good)),
        "same": lambda: shown(pack.diff(path, path)),
        "open": lambda: cli.open_model(path),
        "command": lambda: inspected(path),
    }


def outcome(f):
    began = time.process_time()
    try:
        said = "read", 0 * bool(f())
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
