"""Loads files in a process that has none of their models' code and compares what they compute with what was written
down beside them: python graph_child.py FOLDER."""

import json, sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from modelzip.pack import load
from modelzip.workshop.models import output_tensors


def off(path):
    "How far each output of a file is from what is beside it, relative to the largest number."
    held = load_file(path.with_suffix(".safetensors"))
    inputs = [held[f"in{i}"] for i in range(sum(k.startswith("in") for k in held))]
    with torch.no_grad():
        got = list(output_tensors(load(path)(*inputs)).values())
    want = [held[f"out{i}"] for i in range(sum(k.startswith("out") for k in held))]
    assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in want]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in zip(got, want))


if __name__ == "__main__":
    found = {}
    for path in sorted(Path(sys.argv[1]).glob("*.mz")):
        try:
            found[path.stem] = off(path)
        except Exception as e:
            found[path.stem] = f"{type(e).__name__}: {e}"
    print(json.dumps(found))
    assert not {"graph_models", "torchvision", "transformers"} & set(sys.modules)
