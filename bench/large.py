"""Models of up to 2 GB through the command line: memory, processor time and wall time of each command, in a process
of its own; and once the way through memory (`quantize_weights`, then `save`).

python bench/large.py [folder]     needs 6 GB there
"""

import json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
CHILD = """
import resource, sys, time
from modelzip.cli import as_model, cli, quantize_weights, save, weights_in
status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1000
used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
peak, cpu, began = status("VmHWM"), used(), time.perf_counter()
if sys.argv[1] == "memory":
    from safetensors.torch import load_file
    save(quantize_weights(as_model(load_file(sys.argv[2])), 8, observer="mse"), sys.argv[3])
else:
    assert cli(sys.argv[1:]) in (0, 1)
print("FOUND", peak, status("VmHWM"), used() - cpu, time.perf_counter() - began)
"""


def written(path, shapes, kind="F32"):
    "A safetensors file of normally distributed rows, made without having it in memory."
    width, dice, header, at = {"F32": 4, "BF16": 2}[kind], np.random.default_rng(0), {}, 0
    for i, shape in enumerate(shapes):
        end = at + width * int(np.prod(shape))
        header[f"layers.{i}.weight"] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    base = dice.standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes:
            left = int(np.prod(shape))
            while left:
                some = np.roll(base, int(dice.integers(1 << 22)))[:left] * np.float32(dice.uniform(0.8, 1.2))
                f.write(some.tobytes() if width == 4 else (some.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= len(some)
    return path


def child(*words):
    "What a command takes."
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # PyTorch's own threads wait for each other on a busy machine
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, words)], capture_output=True, text=True, env=alone)
    if done.returncode:
        raise SystemExit(done.stderr)
    start, peak, cpu, wall = map(float, done.stdout.rpartition("FOUND")[2].split())
    return {"MB at the start": start, "MB at the peak": peak, "processor seconds": cpu, "seconds": wall}


def main(folder):
    square, found = [4096, 4096], {}

    def note(what, source, *words):
        found[what] = {"MB of the file": os.path.getsize(source) / 1e6} | child(*words)
        print(what, found[what], flush=True)

    for n in 4, 8, 32:
        source, output = written(folder / "w.safetensors", [square] * n), folder / f"{n}.mz"
        note(f"compress, {n} tensors", source, "compress", source, "-o", output, "--quiet")
        if n == 4:
            note(f"in memory, {n} tensors", source, "memory", source, folder / "memory.mz")
            assert output.stat().st_size - (folder / "memory.mz").stat().st_size < 100  # what it says of itself
    note("inspect, 32 tensors", output, "inspect", output)
    source, output = written(folder / "w.safetensors", [square] * 4, "BF16"), folder / "bfloat16.mz"
    note("compress, 4 tensors of bfloat16", source, "compress", source, "-o", output, "--quiet")
    note("diff, 4 tensors that differ", output, "diff", folder / "4.mz", output)
    source, output = written(folder / "w.safetensors", [[16384, 16384]]), folder / "one.mz"
    note("compress, one tensor", source, "compress", source, "-o", output, "--quiet")
    note("inspect --entropy, one tensor", output, "inspect", output, "--entropy")
    source, output = written(folder / "w.safetensors", [[16, 32]] * 20_000), folder / "many.mz"
    note("compress, 20,000 tensors of 2 kB", source, "compress", source, "-o", output, "--quiet")
    note("inspect, 20,000 tensors", output, "inspect", output)
    (RESULTS / "large.json").write_text(json.dumps({"cores": os.cpu_count(), "commands": found}, indent=1) + "\n")


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        main(folder)
    finally:
        shutil.rmtree(folder)
