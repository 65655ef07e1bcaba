"""How many sentences a second, when they differ in length? MiniLM on docstrings, as they come and sorted by length, in
floats and in integers, with a batch at a time and through a Pool, beside sentence-transformers: each in a process of
its own, in turns (see contest.py).

    python bench/sentences.py            prints the table and writes bench/results/sentences.json (about 15 minutes on
    two cores)
    python bench/sentences.py --quick    fewer rounds

A batch is filled up to its longest sentence, so the order of sentences decides how many word pieces are computed:
"pieces" counts those, filling included. Ratios are of the time for all sentences, to the first row's. Peers that are
not installed are left out.
"""

import json, os, platform, sys, tempfile, warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
import torch
import torch.nn.functional as F

import contest
from kernels import openvino, to_bert, tokens
from modelzip.data import docstrings, minilm
from modelzip.kernels import use_kernels
from modelzip.onnx_export import onnx_model, to_onnx
from modelzip.prune import Inputs
from modelzip.quant import quantize_model
from modelzip.threads import Pool
from modelzip.static import quantize_static

RESULTS, QUICK = Path(__file__).parent / "results" / "sentences.json", "--quick" in sys.argv
SENTENCES, BATCH = 512, 32
contest.CALLS = {SENTENCES: 1}


def texts():
    found = docstrings(SENTENCES // 2)
    return [t for pair in zip(found.queries, found.documents) for t in pair]


def pieces(model):
    "Word pieces of each sentence, as the model counts them."
    return [sum(t.attention_mask) for t in model.tokenizer.encode_batch(texts())]


def computed(lengths, order):
    "Word pieces that are computed, filling included, when sentences are taken in this order."
    batches = [[lengths[i] for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    return sum(max(b) * len(b) for b in batches)


# --- contestants: each a function (model, folder, threads) → function from texts to vectors

CONTESTANTS = {}


def contestant(name):
    return lambda f: CONTESTANTS.setdefault(name, f)


def in_order(run, model, order, longest=None):
    "Vectors of all texts, a batch at a time."

    def encode(these):
        found = torch.empty(len(these), 384)
        for at in range(0, len(these), BATCH):
            places = order(these)[at : at + BATCH]
            batch = model.tokenizer.encode_batch([these[i] for i in places])
            ids, mask = (torch.tensor([getattr(b, part) for b in batch]) for part in ("ids", "attention_mask"))
            if longest:
                ids, mask = (F.pad(t, (0, longest - t.shape[1])) for t in (ids, mask))
            found[places] = torch.as_tensor(run(ids, mask))
        return found

    return encode


def as_given(these):
    return list(range(len(these)))


def by_length(these):
    return sorted(range(len(these)), key=lambda i: len(these[i]))


@contestant("torch fp32, as they come")
def _(model, folder, threads):
    return in_order(model, model, as_given)


@contestant("torch fp32, all filled up to 128")
def _(model, folder, threads):
    return in_order(model, model, as_given, 128)


@contestant("sentence-transformers, torch")
def _(model, folder, threads):
    return peer(model, folder, "torch")


@contestant("sentence-transformers, onnx")
def _(model, folder, threads):
    return peer(model, folder, "onnx")


@contestant("sentence-transformers, openvino")
def _(model, folder, threads):
    return peer(model, folder, "openvino")


def peer(model, folder, backend):
    "The same weights, as sentence-transformers runs them (it sorts by length as well)."
    from sentence_transformers import SentenceTransformer, models

    def write(path):
        to_bert(model, path / "bert")
        bert = models.Transformer(str(path / "bert"), max_seq_length=128)
        pooling = models.Pooling(384, pooling_mode="mean")
        SentenceTransformer(modules=[bert, pooling, models.Normalize()]).save(str(path / "whole"))

    if not (path := Path(folder) / "sentences").exists():
        path.mkdir()
        write(path)
    found = SentenceTransformer(str(path / "whole"), backend=backend, device="cpu")
    return lambda these: found.encode(these, batch_size=BATCH, show_progress_bar=False, convert_to_tensor=True)


@contestant("ours, fp32, sorted")
def _(model, folder, threads):
    return lambda these: model.encode(these, batch_size=BATCH)


@contestant("ours, int8 rows, sorted")
def _(model, folder, threads):
    small = use_kernels(quantize_model(model, 8))
    return in_order(small, model, by_length)


def static(model, folder):
    path, others = Path(folder) / "static.onnx", docstrings(400).documents[300:]
    if not path.exists():
        batches = [Inputs(*tokens(model, others[i : i + 25])) for i in range(0, 100, 25)]
        example = tuple(x[:2] for x in batches[0].args)
        small = quantize_static(model, batches)
        to_onnx(small, path, example, dynamic={0: "batch", 1: "length"}, check=False)
    return path


@contestant("ours, static, ONNX Runtime, sorted")
def _(model, folder, threads):
    return in_order(onnx_model(static(model, folder), threads), model, by_length)


@contestant("ours, static, OpenVINO, sorted")
def _(model, folder, threads):
    return in_order(openvino(static(model, folder), None, threads), model, by_length)


def pooled(run, model, threads):
    "Every sentence a request of its own, of its own length: nothing is filled up but what a Pool puts together."
    pool = Pool(run, workers=threads, max_batch=BATCH, exact=False)

    def encode(these):
        found = model.tokenizer.encode_batch(these)
        ids = [torch.tensor(t.ids)[: sum(t.attention_mask)] for t in found]
        return torch.stack([f.result() for f in [pool.submit((i, torch.ones_like(i))) for i in ids]])

    return encode


@contestant("ours, fp32, Pool")
def _(model, folder, threads):
    return pooled(model, model, threads)


@contestant("ours, int8 rows, Pool")
def _(model, folder, threads):
    return pooled(use_kernels(quantize_model(model, 8)), model, threads)


@contestant("ours, static, ONNX Runtime, Pool")
def _(model, folder, threads):
    return pooled(onnx_model(static(model, folder), 1), model, threads)


# --- the program


def built(name, threads, folder):
    torch.set_num_threads(threads)
    model, these = minilm().eval(), texts()
    with torch.inference_mode():
        exact, encode = model.encode(these), CONTESTANTS[name](model, folder, threads)

    @torch.inference_mode()
    def run(count):
        return encode(these[:count])

    return run, exact


def main():
    model, these = minilm(), texts()
    lengths = pieces(model)
    counts = {
        "pieces": sum(lengths),
        "filled up to 128": 128 * len(lengths),
        "as they come": computed(lengths, as_given(these)),
        "sorted": computed(lengths, by_length(these)),
    }
    with tempfile.TemporaryDirectory() as folder:
        rounds = 6 if QUICK else 9
        rows = contest.contest(__file__, "-", list(CONTESTANTS), folder, batches=(SENTENCES,), rounds=rounds)
    contest.show(f"{SENTENCES} docstrings, {counts}", rows)
    about = {"torch": torch.__version__, "python": platform.python_version()}
    RESULTS.write_text(json.dumps({"about": about, "counts": counts, "times as fast": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _, _, _, name, threads, folder = sys.argv
        contest.serve(lambda: built(name, int(threads), folder))
    else:
        main()
