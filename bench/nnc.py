"""NNCodec, the software of the standard for compressed networks (ISO/IEC 15938-17), beside our files: the network of
results/record.mz, whose codes both write without loss and which it also quantizes anew, and LeNet-5 in full, in
floats, with its trellis and ours at several widths, neither of them with data.

    python bench/nnc.py                writes bench/results/nnc.json

NNCodec is found through an interpreter that has it, which is best built in an environment of its own (`pip install
nncodec==2.1.3 torch==2.13.0`): NNCODEC_PYTHON=/path/to/python python bench/nnc.py. Where there is none it is left out,
and a line says so.

Its bytes are those of its stream, which has no architecture in it; biases are not given to it and cost it nothing.
Ours are those of files. Accuracies are those of what was decoded, or loaded, on the test digits; nothing is chosen by
them.
"""

import copy, json, os, subprocess, tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modelzip.data import LeNet5, accuracy, mnist5k, train
from modelzip.measure import write_whole
from modelzip.pack import inspect, load, save
from modelzip.quant import Dequantize
from modelzip.trellis import trellis

RESULTS, PEER = Path(__file__).parent / "results", os.environ.get("NNCODEC_PYTHON")
# self-contained: the peer's interpreter need not have this library
PEER_PROGRAM = """
import json, sys
import numpy as np
import torch

for name in ("nms", "qnms"):  # of a torchvision for another torch
    torch.library.define("torchvision::" + name, "(Tensor a, Tensor b, float c) -> Tensor")
from nncodec import nnc

folder = sys.argv[1]
for i, (name, qp, trellis) in enumerate(json.load(open(folder + "/jobs.json"))):
    weights = dict(np.load(f"{folder}/{name}.npz"))
    data = nnc.compress(weights, None, qp=qp, use_dq=trellis, row_skipping=True, return_bitstream=True)
    np.savez(f"{folder}/{i}.npz", **nnc.decompress(data))
    print("bytes", len(data), flush=True)
"""
# (weights, quantization parameter, trellis): the step is 2^(qp/4), and between these straight; -32 with the trellis is
# what it does unless it is told otherwise
JOBS = [("record, its codes", 0, False)]
JOBS += [("record, its weights", qp, trellis) for trellis in (True, False) for qp in (-8, -4, 0, 4)]
JOBS += [("LeNet-5", qp, trellis) for trellis in (True, False) for qp in (-32, -20, -16, -12)]


def weights_of(model: nn.Module) -> dict:
    return {n: p.detach().numpy().astype(np.float32) for n, p in model.named_parameters() if p.dim() > 1}


@torch.no_grad()
def in_steps(model: nn.Module) -> nn.Module:
    """The network in floats, with codes as its weights: all its answers are multiplied by one number. (Between its
    layers are only maxima and ReLU. NNCodec has one step for all of them, to which each would have to fit.)"""
    model, factor = copy.deepcopy(model), 1.0
    for name, layer in list(model.named_children()):
        factor, new = factor / layer.q.scale, layer.expanded()
        new.weight.copy_(layer.q.unpack().int() - layer.q.levels // 2)
        new.bias.copy_(layer.bias * factor)
        setattr(model, name, new)
    return model


def theirs(models: dict, codes: dict, test) -> list[dict]:
    "What the peer makes of each job."
    rows, given = [], {name: weights_of(m) for name, m in models.items()} | {"record, its codes": codes}
    with tempfile.TemporaryDirectory() as folder:
        for name, weights in given.items():
            np.savez(f"{folder}/{name}.npz", **weights)
        Path(folder, "jobs.json").write_text(json.dumps(JOBS))
        said = subprocess.run([PEER, "-c", PEER_PROGRAM, folder], check=True, capture_output=True, text=True).stdout
        sizes = [int(line.split()[1]) for line in said.splitlines() if line.startswith("bytes ")]
        for i, ((name, qp, trellis_too), size) in enumerate(zip(JOBS, sizes, strict=True)):
            decoded = dict(np.load(f"{folder}/{i}.npz"))
            row = dict(who="NNCodec", weights=name, qp=qp, trellis=trellis_too, bytes=size)
            if name == "record, its codes":
                assert all(np.array_equal(decoded[n], codes[n]) for n in codes)  # nothing was lost
            else:
                model = copy.deepcopy(models[name])
                model.load_state_dict({n: torch.from_numpy(w) for n, w in decoded.items()}, strict=False)
                row["test"] = accuracy(model, test)
            rows.append(row)
    return rows


def main():
    data, record = mnist5k(), load(RESULTS / "record.mz")
    full = train(LeNet5(), data.fit, progress=False)
    lines = inspect(RESULTS / "record.mz").lines
    rows = [
        dict(who="modelzip", weights="record, its codes", bytes=sum(l.bytes for l in lines if "weight" in l.name)),
        dict(who="modelzip", weights="LeNet-5", bits=None, bytes=4 * 431_080, test=accuracy(full, data.test)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for bits in (3.0, 2.0, 1.5, 1.0):
            path = save(trellis(full, bits=bits), Path(folder) / "x.mz", archive=True)
            again = accuracy(load(path), data.test)
            rows.append(dict(who="modelzip", weights="LeNet-5", bits=bits, bytes=path.stat().st_size, test=again))
    if PEER:
        layers = {n: m for n, m in record.named_children() if isinstance(m, Dequantize)}
        codes = {f"{n}.weight": (m.q.unpack().int() - m.q.levels // 2).float().numpy() for n, m in layers.items()}
        rows += theirs({"record, its weights": in_steps(record), "LeNet-5": full}, codes, data.test)
    else:
        print("NNCodec is left out: NNCODEC_PYTHON names no interpreter that has it")
    for row in rows:
        how = f"{row['bits']} bits" if row.get("bits") else f"qp {row['qp']}" if "qp" in row else ""
        how += ", trellis" if row.get("trellis") else ""
        right = f"{row['test']:.1%}" if "test" in row else ""
        print(f"{row['who']:<10}{row['weights']:<22}{how:<18}{row['bytes']:>10,}  {right}")
    if PEER:
        write_whole(RESULTS / "nnc.json", json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
