"""Updates of files beside programs that make patches of any two files: LeNet-5 after one epoch more, MiniLM after some
steps for its last block, in floats and in 4 bits. What is left to send, as a share of the new file.

    python bench/updates.py                writes bench/results/updates.json

The full file is our archived one. A patch is made from what suits it best: our mapped files, in which numbers lie as
they are. `zstd --patch-from` (level 19, long distances) is the program on the path. xdelta, HDiffPatch and bsdiff are
found through an interpreter that has them (`pip install pyxdelta==0.2.3 hdiffpatch==2.6.0 bsdiff4==1.3.2`):
PATCH_PYTHON=/path/to/python python bench/updates.py. What is not there is left out, and a line says so. bsdiff, which
sorts all that both files hold, is asked for small ones only. Every patch is applied, and what comes of it compared.
"""

import copy, json, os, shutil, subprocess, tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from modelzip.data import LeNet5, docstrings, minilm, mnist5k, train
from modelzip.measure import write_whole
from modelzip.pack import inspect, save
from modelzip.quant import quantize_model

RESULTS, PEER = Path(__file__).parent / "results/updates.json", os.environ.get("PATCH_PYTHON")
ZSTD = shutil.which("zstd")
SMALL = 1 << 22  # bytes of a file that bsdiff is asked for
STEPS, BATCH, RATE = 8, 16, 2e-5  # of MiniLM's last block
# self-contained: the peer's interpreter need not have this library
PEER_PROGRAM = """
import json, os, sys
import bsdiff4, hdiffpatch, pyxdelta

folder, small = sys.argv[1], int(sys.argv[2])
old, new, patch, back = (os.path.join(folder, n) for n in ("old.bin", "new.bin", "patch.bin", "back.bin"))
a, b = open(old, "rb").read(), open(new, "rb").read()
found = {}
pyxdelta.run(old, new, patch)
pyxdelta.decode(old, patch, back)
assert open(back, "rb").read() == b
found["xdelta"] = os.path.getsize(patch)
d = hdiffpatch.diff(a, b, hdiffpatch.COMPRESSION_ZSTD)
assert hdiffpatch.apply(a, d) == b
found["HDiffPatch"] = len(d)
if len(b) <= small:
    d = bsdiff4.diff(a, b)
    assert bsdiff4.patch(a, d) == b
    found["bsdiff"] = len(d)
print(json.dumps(found))
"""


def zstd_patch(old: Path, new: Path, folder: Path) -> int:  # bytes
    "What `zstd --patch-from` makes."
    patch, back = folder / "patch.zst", folder / "back.zst"
    reach = f"--long={min(31, (old.stat().st_size + new.stat().st_size).bit_length())}"  # both files are within it
    run = lambda *how: subprocess.run(
        ["zstd", "-q", "-f", reach, f"--patch-from={old}", *how], check=True, stderr=subprocess.DEVNULL
    )
    run("-19", new, "-o", patch), run("-d", patch, "-o", back)
    assert back.read_bytes() == new.read_bytes()
    return patch.stat().st_size


def patches(old: Path, new: Path, folder: Path) -> dict:  # bytes by program
    found = {"zstd --patch-from": zstd_patch(old, new, folder)} if ZSTD else {}
    if PEER is not None:
        shutil.copy(old, folder / "old.bin"), shutil.copy(new, folder / "new.bin")
        done = subprocess.run(
            [PEER, "-c", PEER_PROGRAM, folder, str(SMALL)], capture_output=True, text=True, check=True
        )
        found |= json.loads(done.stdout)
    return found


def lenets():
    "Name → old and new."
    data = mnist5k()
    old = train(LeNet5(), data.train, epochs=3, progress=False)
    for rate in 3e-3, 3e-4:
        new = train(copy.deepcopy(old), data.train, epochs=1, lr=rate, seed=1, progress=False)
        yield f"LeNet-5, an epoch at {rate:g}", old, new


def sentences():
    old = minilm()
    new = copy.deepcopy(old).requires_grad_(False)
    block = new.blocks[-1].requires_grad_(True)
    pairs, step = docstrings(STEPS * BATCH), torch.optim.AdamW(block.parameters(), lr=RATE)
    tokens = lambda found: (torch.tensor([t.ids for t in found]), torch.tensor([t.attention_mask for t in found]))
    for i in range(0, STEPS * BATCH, BATCH):
        texts = (list(x[i : i + BATCH]) for x in (pairs.queries, pairs.documents))
        q, d = (new(*tokens(new.tokenizer.encode_batch(x))) for x in texts)
        loss = F.cross_entropy(20 * q @ d.T, torch.arange(BATCH))
        step.zero_grad()
        loss.backward()
        step.step()
    yield "MiniLM, its last block", old, new.eval().requires_grad_(True)


def main():
    if ZSTD is None:
        print("there is no program zstd: it is left out")
    if PEER is None:
        print("PATCH_PYTHON is not set: xdelta, HDiffPatch and bsdiff are left out")
    table = {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for name, old, new in [*lenets(), *sentences()]:
            for how, made in {"float32": lambda m: m, "4 bits": lambda m: quantize_model(m, 4, group=64)}.items():
                a, b = made(old), made(new)
                base, full = save(a, folder / "old.mz"), save(b, folder / "full.mz")
                update = save(b, folder / "update.mz", base=base)
                mapped = [save(m, folder / f"{i}.mz", archive=False) for i, m in enumerate((a, b))]
                found = {"an update": update.stat().st_size} | patches(*mapped, folder)
                size = full.stat().st_size
                row = table[f"{name}, {how}"] = {
                    "bytes": size,
                    "mapped bytes": mapped[1].stat().st_size,
                    "tensors kept": sum(l.coder == "base" for l in inspect(update).lines),
                    "tensors": len(inspect(update).lines),
                    "left": {k: n / size for k, n in found.items()},
                }
                print(
                    f"{name}, {how}: {size:,} bytes; " + ", ".join(f"{k} {x:.1%}" for k, x in row["left"].items()),
                    flush=True,
                )
    about = {"steps": STEPS, "batch": BATCH, "rate": RATE, "peers": PEER is not None}
    write_whole(RESULTS, json.dumps({"table": table, "about": about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
