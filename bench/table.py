"""The table of results that the README and the site show, made from what the other programs here have measured.

python bench/table.py     prints it as Markdown
"""

import json, statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
LENET5, LENET300 = 4 * 431_080, 4 * 266_610  # bytes of the float32 weights


def read(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def spread(values, scale=100.0):
    "Mean of several seeds and how far they lie apart."
    mean = scale * statistics.mean(values)
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {scale * statistics.stdev(values):.2f}"


def line(model, how, size, before, quality, reference, chapter):
    quality, reference = (
        t.replace(" ", "\u00a0") for t in (quality, reference)
    )  # numbers and their spread stay on one line
    return (
        model,
        size,
        f"| {model} | [{how}]({chapter}) | {size:,.0f} | {before / size:,.1f}× | {quality} | {reference} |",
    )


def record(found):
    for name, net in found["nets"].items():
        last = net["table"][-1]
        runs = [r["rows"][-1]["test"] for r in net["runs"]]
        yield line(
            name,
            "distilled, bits at a price",
            last["bytes"],
            net["weights"],
            f"{spread(runs)} %",
            f"{spread([r['rows'][0]['test'] for r in net['runs']])} %",
            "13b_record.ipynb",
        )


def qat(found):
    rows = {r["name"]: r for r in found["rows"]}
    for name in "2 bits, 8 bits", "binary, 8 bits":
        weights = name.split(",")[0]
        yield line(
            "LeNet-5",
            f"{weights.replace('binary', '1 bit')}, trained through rounding",
            statistics.mean(rows[name]["bytes"]),
            LENET5,
            f"{spread(rows[name]['accuracy'])} %",
            f"{spread(rows['float32']['accuracy'])} %",
            "11_lsq.ipynb",
        )


def prune(found):
    for name, before in ("LeNet-5", LENET5), ("LeNet-300-100", LENET300):
        runs = found["lenet"][name]["rows"]
        size = statistics.mean(r["pruned, 4 bits"]["bytes"] for r in runs)
        yield line(
            name,
            f"{100 * runs[0]['sparsity']:.0f} % pruned, then 4 bits",
            size,
            before,
            f"{spread([r['pruned, 4 bits']['accuracy'] for r in runs])} %",
            f"{spread([r['dense']['accuracy'] for r in runs])} %",
            "07b_prune.ipynb",
        )


def ptq(found):
    full = next(r for r in found["rows"] if r["bits"] == 32)
    for bits, method in (8, "gptq, per channel"), (4, "gptq, group 32, symmetric"):
        r = next(r for r in found["rows"] if (r["bits"], r["method"]) == (bits, method))
        yield line(
            "MiniLM",
            f"{bits} bits, GPTQ",
            r["bytes"],
            full["bytes"],
            f"{r['cosine']:.4f}, {r['recall']:.3f}",
            f"1, {full['recall']:.3f}",
            "10b_ptq.ipynb",
        )


def auto(found):
    for r in found["rows"]:
        how = "steps along trellises" if any(name == "trellis" for name, _ in r["recipe"]["steps"]) else "mixed bits"
        yield line(
            "MiniLM",
            f"{how} for cosine {r['target']}",
            r["bytes"],
            found["fp32_bytes"],
            f"{r['cosine']:.4f}, {r['recall']:.3f}",
            f"1, {found['fp32_recall']:.3f}",
            "13_budget.ipynb",
        )


def table():
    "Markdown, one row a model and technique; what has not been measured is left out."
    rows = [row for part in (record, prune, qat, ptq, auto) if (found := read(part.__name__)) for row in part(found)]
    head = (
        "| model | how | bytes of the file | smaller | accuracy (or cosine, recall) | float32"
        " |\n|---|---|--:|--:|---|---|\n"
    )
    return head + "\n".join(text for *_, text in sorted(rows)) + "\n"


def answers():
    "Markdown: what one asks first, answered with the numbers of the tour and of the record."
    from modelzip.data import LeNet5

    tour = {r["name"]: r["ratios"] for r in read("tour")["rows"]}
    times = lambda name: f"{tour[name]['1'][0]:.2f}× the time for one input and {tour[name]['64'][0]:.2f}× for 64"
    slow = [r["1"][0] for n, r in tour.items() if "weights" in n and "kernels" not in n and r["1"][0] > 1]
    net, own = read("record")["nets"]["LeNet-5"], next(text for *_, text in prune(read("prune")) if "LeNet-5" in text)
    size, runs = sum(p.numel() for p in LeNet5(**net["how"]["student"]).parameters()), net["runs"]
    tests = [r["rows"][-1]["test"] for r in runs]
    mean = f"{net['table'][-1]['bytes']:,.0f} bytes, {spread(tests)} % of the digits"
    now = f"{(RESULTS / 'record.mz').stat().st_size:,} bytes, {tests[0]:.1%}"
    return f"""- **Does it get faster?** With fewer multiplications, yes: half of LeNet-5's take {times("half the multiplications, retrained")}, a distilled student {times("student of 19,454 parameters, distilled")}. Products of integers pay for many inputs at once ({tour["8-bit weights, int8 kernels"]["64"][0]:.2f}× for 64), not for one ({tour["8-bit weights, int8 kernels"]["1"][0]:.2f}×). Few bits make the *file* small; run by PyTorch such a model is slower, {min(slow):.1f} to {max(slow):.1f} times for one input, because weights are expanded when they are used. (Rows of the [tour's table](#the-tours-table), on a CPU.) `deploy` measures your model on the engines that are installed, and takes the quickest that computes the same.
- **Language models?** Small ones, on a CPU: files of llama.cpp are read, written, archived and rounded anew, and a Llama of one page runs them ([below](#a-language-model)). It is no engine for chats.
- **Models of Hugging Face?** They are modules like yours: `quantize_model(model)`, `gptq(model, [{{"input_ids": ids}}])`, `save`, `load(path, model)`. From the shell `modelzip compress` takes a folder of the Hub, its weights alone.
- **A GPU?** Nothing here was tested or timed on one. The integer products are those of CPUs.
- **{net["weights"] / net["table"][-1]["bytes"]:,.0f} times smaller?** That is another network: a student of {size:,} parameters, distilled from LeNet-5 and trained with a price on each bit (the mean of {len(runs)} seeds: {mean}; [the first of them](13b_record.ipynb): {now}). Of LeNet-5 itself, pruned and rounded, the file is {own.split("|")[4].strip().rstrip("×")} times smaller."""


def language():
    "Markdown: SmolLM2's file, its exact archive, and what rounding it once more costs."
    found, exact = read("language"), read("gguf")
    named = {
        "gptq-4": "4 bits, GPTQ",
        "coded-0.01": "kept as it was where that pays, the rest along trellises",
        "gptq-3": "3 bits, GPTQ",
        "coded-0.052": "along trellises, coarser",
    }
    rows = {r["name"]: r for r in found["rows"]}
    named = {name: how for name, how in named.items() if name in rows}
    text = "| SmolLM2-135M-Instruct | bytes of the file | of the GGUF | perplexity | same next token |\n"
    text += "|---|--:|--:|--:|--:|\n"
    sizes = {"file": "the GGUF file"} | ({"exact": "archived, byte for byte"} if exact["same"] else {}) | named
    for name, how in sizes.items():
        r = rows["file" if name == "exact" else name]
        size = exact["archived"] if name == "exact" else r["bytes"]
        share, perplexity = size / found["gguf_bytes"], r["perplexity"][0]
        text += f"| {how} | {size:,} | {share:.1%} | {perplexity:.2f} | {r['agreement'][0]:.1%} |\n"
    return text


if __name__ == "__main__":
    print(table())
    print(answers())
    print(language())
