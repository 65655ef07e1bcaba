"""How many tokens a second does SmolLM2 read and say, in floats, int8 and 4 bits, beside llama.cpp on its own file, and
how near is that to what the memory allows? Each in a process of its own, in turns (see contest.py).

    python bench/tokens.py               prints the tables and writes bench/results/tokens.json
    python bench/tokens.py --quick       fewer rounds and one thread, and nothing is written
    python bench/tokens.py --cache       only what the key-value cache in few bits costs and saves
    python bench/tokens.py --speeds      only the speeds; names of rows behind it choose some of them, beside the first

llama.cpp is found through an interpreter that has `llama-cpp-python`, which is best built in an environment of its own:
LLAMA_PYTHON=/path/to/python python bench/tokens.py. Where there is none it is left out, and a line says so.

"says" is one token at a time behind a text of 128, "reads" a prompt of 512. `cosine` compares the scores behind the
prompt with those of float32. Ratios are of rates in the same round, to the first row and to llama.cpp. "of memory" is
bytes that a token has to read, times tokens a second, over the bandwidth that a sum over 1 GB has with as many threads:
weights in the caches may exceed it.
"""

import json, os, platform, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")
import torch

from contest import Contestant
from modelzip.kernels import use_kernels
from modelzip.language import KeyValueCache, QuantizedCache, documents, english, listen, smollm2, smollm2_tokenizer
from modelzip.measure import median_interval
from modelzip.quant import quantize_model
from modelzip.workshop.key_value_cache import ThroughCache
from modelzip.workshop.listening import log_probabilities
from modelzip.workshop.quick_llama import RoomyCache, quick_llama, smollm2_in_blocks
from modelzip.workshop.smollm2 import smollm2_file

RESULTS, QUICK = Path(__file__).parent / "results" / "tokens.json", "--quick" in sys.argv
BEFORE, SAID, PROMPT = 128, 24, 512  # tokens: that stand there, that are said in a turn, that are read
TABLE = dict(bits=8, group=None, symmetric=True)  # of the words, as wide as in the file
FOUR = dict(bits=4, group=32, symmetric=False, overrides={"words": TABLE, "head": TABLE})
WEIGHTS, WORDS = 106_203_456, 49_152 * 576  # of the linear layers in blocks, and of the table
CACHED = 46_080 * (BEFORE + SAID // 2)  # bytes of keys and values in float32, in the middle of a turn

# --- contestants: name → a model and a cache, and the bytes that a token reads

OURS = {
    "fp32, the chapter's": (lambda m: m, KeyValueCache, 4 * (WEIGHTS + WORDS)),
    "fp32, quick": (quick_llama, RoomyCache, 4 * (WEIGHTS + WORDS)),
    "int8 kernels": (lambda m: use_kernels(quantize_model(m, 8)), KeyValueCache, WEIGHTS + WORDS),
    "int8 kernels, quick": (lambda m: quick_llama(use_kernels(quantize_model(m, 8))), RoomyCache, WEIGHTS + WORDS),
    "4-bit kernels": (lambda m: use_kernels(quantize_model(m, **FOUR)), KeyValueCache, WEIGHTS * 5 // 8 + WORDS),
    "the file's 4-bit codes, quick": (lambda m: quick_llama(smollm2_in_blocks()), RoomyCache, WEIGHTS * 5 // 8 + WORDS),
    "the file's 4-bit codes, compiled": (
        lambda m: quick_llama(smollm2_in_blocks(), compiled=True),
        RoomyCache,
        WEIGHTS * 5 // 8 + WORDS,
    ),
    "4-bit kernels, quick": (
        lambda m: quick_llama(use_kernels(quantize_model(m, **FOUR))),
        RoomyCache,
        WEIGHTS * 5 // 8 + WORDS,  # 4 bits, and a scale and an offset of 16 bits for 32 of them
    ),
}
MEMORY, PEER = "the memory", "llama.cpp"
ASKED = [a for a in sys.argv[1:] if a in OURS]
# self-contained: the peer's interpreter need not have this library
PEER_PROGRAM = """
import json, statistics, sys, time
import numpy as np
from llama_cpp import Llama

path, threads, folder, before, said = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
ids, exact = json.load(open(folder + "/ids.json")), np.load(folder + "/exact.npy")
how = dict(n_threads=threads, n_threads_batch=threads, n_batch=len(ids), n_ubatch=len(ids), verbose=False)
model = Llama(path, n_ctx=len(ids) + 64, **how)

def read(tokens):
    model.reset()
    model.eval(tokens)

read(ids)
scores = np.array(np.ctypeslib.as_array(model._ctx.get_logits(), shape=exact.shape), dtype=np.float64)
print(float(scores @ exact / np.linalg.norm(scores) / np.linalg.norm(exact)), flush=True)
for line in sys.stdin:
    if line.strip() == "reads":
        began = time.perf_counter()
        read(ids)
        print((time.perf_counter() - began) / len(ids), flush=True)
    else:
        read(ids[:before])
        model.eval(ids[before : before + 1])
        times = []
        for t in ids[before + 1 : before + 1 + said]:
            began = time.perf_counter()
            model.eval([t])
            times.append(time.perf_counter() - began)
        print(statistics.median(times), flush=True)
"""


def serve(name, threads, folder):
    "Be one of ours: answer 'says' and 'reads' with seconds a token."
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    ids, exact = torch.tensor([json.loads((folder / "ids.json").read_text())]), np.load(folder / "exact.npy")
    make, new_cache, _ = OURS[name]
    model = make(smollm2())
    timed = lambda f: (time.perf_counter(), f(), time.perf_counter())

    def reads():
        began, scores, ended = timed(lambda: model(ids, new_cache(), last=True))
        return (ended - began) / ids.shape[1], scores[0, 0].double().numpy()

    def says():
        cache, times = new_cache(), []
        model(ids[:, :BEFORE], cache, last=True)
        for i in range(BEFORE, BEFORE + SAID + 1):
            began, _, ended = timed(lambda: model(ids[:, i : i + 1], cache, last=True))
            times.append(ended - began)
        return statistics.median(times[1:])

    reads()  # what is prepared on the first use
    scores = reads()[1]
    print(float(scores @ exact / np.linalg.norm(scores) / np.linalg.norm(exact)), flush=True)
    for line in sys.stdin:
        print(says() if line.strip() == "says" else reads()[0], flush=True)


def serve_memory(threads):
    "Be the memory: seconds to read a byte, whatever is asked."
    torch.set_num_threads(threads)
    much = torch.ones(1 << 28)
    print(1.0, flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            much.sum()
            times.append(time.perf_counter() - began)
        print(min(times) / much.nbytes, flush=True)


def peer():
    "An interpreter with llama.cpp; None, with a line that says so."
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    found = subprocess.run(
        [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"], capture_output=True, text=True
    )
    if found.returncode:
        print("llama.cpp is left out: no llama-cpp-python; LLAMA_PYTHON names an interpreter that has it", flush=True)
        return None, None
    return python, found.stdout.strip()


def players(threads, folder, python):
    "The processes, by name."
    me = [sys.executable, str(Path(__file__))]
    names = [n for i, n in enumerate(OURS) if not ASKED or n in ASKED or i == 0]
    command = {name: [*me, "--serve", name, str(threads), str(folder)] for name in [*names, MEMORY]}
    if python:
        args = map(str, (smollm2_file(), threads, folder, BEFORE, SAID))
        command[PEER] = [python, "-c", PEER_PROGRAM, *args]
    found = {}
    for name, words in command.items():
        try:
            found[name] = Contestant(words, threads, folder / "log")
        except RuntimeError as why:
            print(f"{name} is left out: {why}", flush=True)
    return found


def interval(values):
    low, high, _ = median_interval(np.array(values))
    return dict(value=float(np.median(values)), low=float(low), high=float(high))


def speeds(rounds, all_threads):
    "Rows by name: tokens a second, and ratios to the first and to the peer, for each number of threads."
    torch.set_grad_enabled(False)
    python, version = peer()
    tokenizer, rng, rows = smollm2_tokenizer(), np.random.default_rng(0), {}
    ids = tokenizer.encode("\n\n".join(english("test").texts))[:PROMPT]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "ids.json").write_text(json.dumps(ids))
        np.save(folder / "exact.npy", smollm2()(torch.tensor([ids]), last=True)[0, 0].double().numpy())
        for threads in all_threads:
            there = players(threads, folder, python)
            times = {(name, what): [] for name in there for what in ("says", "reads")}
            for _ in range(rounds):
                for what in ("says", "reads"):
                    for i in rng.permutation(len(there)):
                        name = list(there)[i]
                        times[name, what].append(there[name].seconds(what))
            first, memory = next(iter(OURS)), np.array(times[MEMORY, "says"] + times[MEMORY, "reads"])
            for name, player in there.items():
                if name != MEMORY:
                    row = rows.setdefault(name, {"cosine": player.cosine})
                    for what in ("says", "reads"):
                        mine = np.array(times[name, what])
                        cell = row[f"{what}, threads {threads}"] = {"tokens a second": interval(1 / mine)}
                        for of in (first, PEER):
                            if of in there and of != name:
                                cell[f"times {of}"] = interval(np.array(times[of, what]) / mine)
                        if what == "says" and name in OURS:
                            size = OURS[name][2] + CACHED
                            cell["bytes a token"] = size
                            cell["of memory"] = size * float(np.median(memory)) / float(np.median(mine))
                player.end()
            rows.setdefault("memory, GB a second", {})[f"threads {threads}"] = float(1e-9 / np.median(memory))
    return rows, version


def show(rows):
    print(f"\n{'':<32}{'cosine':>8}{'':>4}{'tokens/s':>9}{'× fp32':>9}{'× llama.cpp':>22}{'of memory':>11}")
    for name, row in rows.items():
        for cell, r in row.items():
            if not isinstance(r, dict):
                continue
            ratio = lambda of: r.get(f"times {of}")
            first, other = ratio(next(iter(OURS))), ratio(PEER)
            line = f"{name:<32}{row['cosine']:>8.4f}    {r['tokens a second']['value']:>9.1f}"
            line += f"{first['value']:>9.2f}" if first else " " * 9
            line += f"{other['value']:>9.2f} ({other['low']:.2f}–{other['high']:.2f})" if other else " " * 22
            print(line + (f"{r['of memory']:>10.0%}" if "of memory" in r else " " * 10) + f"  {cell}")
    print({k: round(v, 1) for k, v in rows["memory, GB a second"].items()}, "GB a second from memory")


# --- what the cache in few bits costs and saves


def caches(pages, length, piece):
    "Bytes at 2,048 tokens, and what is said through each cache, beside the one in float32."
    torch.set_grad_enabled(False)
    model, tokenizer = smollm2(), smollm2_tokenizer()
    texts = documents(english("test"), tokenizer, length, least=length // 2, at_most=pages)
    logs = [log_probabilities(model, d[None])[0] for d in texts]
    keys, values = torch.randn(2, 1, 3, 2048, 64, generator=torch.Generator().manual_seed(0))
    plain, rows = listen(ThroughCache(model, KeyValueCache, piece), texts, logs), {}
    for bits in (None, 8, 4, 2):
        make = KeyValueCache if bits is None else lambda: QuantizedCache(bits)
        cache = make()
        for layer in range(len(model.blocks)):
            cache.update(layer, keys, values)
        heard = plain if bits is None else listen(ThroughCache(model, make, piece), texts, logs)
        row = rows["float32" if bits is None else f"{bits} bits"] = dict(
            bytes=cache.nbytes,
            perplexity=list(heard.perplexity),
            change=list(heard.against(plain)),
            kl=list(heard.kl),
            agreement=list(heard.agreement),
        )
        print(f"{'float32' if bits is None else f'{bits} bits':<8}", json.dumps(row), flush=True)
    return dict(
        texts=str(english("test")), documents=len(texts), tokens=int(plain.tokens.sum()), piece=piece, rows=rows
    )


def main():
    there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "--speeds" not in sys.argv:
        there["cache"] = caches(2, 256, 64) if QUICK else caches(20, 512, 32)
    if not QUICK and not ASKED:
        RESULTS.write_text(json.dumps(there, indent=1, ensure_ascii=False) + "\n")
    if "--cache" in sys.argv:
        return
    rows, version = speeds(3, [1]) if QUICK else speeds(7, [1, 2])
    show(rows)
    there["machine"] = dict(processor=platform.processor() or platform.machine(), torch=torch.__version__, peer=version)
    there["speeds"] = rows
    if not QUICK and not ASKED:
        RESULTS.write_text(json.dumps(there, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _, _, name, threads, folder = sys.argv
        serve_memory(int(threads)) if name == MEMORY else serve(name, int(threads), Path(folder))
    else:
        main()
