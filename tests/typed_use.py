"""What checkers of types say to somebody who uses the front page: right calls pass `mypy --strict`, and wrong ones are found.

`make types` checks it. It is not run: `warn_unused_ignores` makes an error of a wrong call that nobody finds.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import modelzip as mz

net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
x = torch.randn(32, 8)
part = mz.Split(x, torch.zeros(32, dtype=torch.long))
data = mz.Data(part, part, part)
batches: list[Tensor] = [x, x]


def judge(model: nn.Module) -> float:
    return mz.accuracy(model, part)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def measured() -> None:
    models: dict[str, nn.Module] = {"float": net, "int8": mz.use_kernels(mz.quantize_model(net))}
    report: mz.Report = mz.compare(models, part)
    page: Path = report.to_html("report.html")
    rows: list[str] = [f"{r.name}: {r.bytes:,} bytes, {r.accuracy:.3f}" for r in report.rows]
    again: mz.Report = mz.Report.from_json(report.to_json())
    calls = {"net": lambda: net(x)}
    fastest: float = min(t.median for t in mz.latency(calls).values())
    total: int = mz.count_parameters(net) + mz.file_bytes(page) + mz.peak_memory(lambda: net(x))
    products: dict[str, int] = mz.macs(net, x)
    print(rows, again, fastest, total, products, mz.what_runs(net), mz.floats_left(net), mz.left_whole(net))


def quantized() -> None:
    q: mz.QTensor = mz.quantize(x, bits=4, group=8)
    back: Tensor = mz.dequantize(q.to("cpu")) + q.dequantize()
    size: tuple[int, float] = q.nbytes, q.bits_per_weight
    small: nn.Module = mz.quantize_model(net, 4, overrides={"0": {"bits": 8}, "2": None}, symmetric=False)
    by_rule: nn.Module = mz.quantize_model(net, overrides=lambda name, layer: {"bits": 8} if name == "0" else {})
    plain: nn.Module = mz.dequantize_model(small)
    one: nn.Module = mz.quantize_layer(nn.Linear(8, 8), bits=8)
    statistics = mz.calibrate(net, batches)
    chosen: list[nn.Module] = [
        mz.awq(net, statistics),
        mz.smooth(net, statistics),
        mz.correct_bias(small, net, statistics),
        mz.equalize(net),
        mz.gptq(net, batches, bits=4),
        mz.hqq(net),
        mz.learned_rounding(net, batches),
        mz.trellis(net, batches),
        mz.quantize_static(net, batches),
        mz.convert(mz.set_bits(mz.prepare(net, bits=8, batches=batches), bits=4)),
    ]
    print(back, size, by_rule, plain, one, chosen)


def smaller() -> None:
    masked: nn.Module = mz.prune_model(net, 0.5, criterion="magnitude", batches=[(x, part.y)], loss=cross_entropy)
    gradual: nn.Module = mz.prune_gradually(net, part, {"0": 0.5}, schedule=lambda t, final, initial: final * t)
    kept: nn.Module = mz.sparsify_model(mz.remove_masks(masked))
    thinner: nn.Module = mz.shrink(mz.fold_batchnorm(net), x, ratio=0.5)
    thin: nn.Module = mz.factorize(net, error=0.1)
    student: nn.Module = mz.distill(mz.train(net, part, epochs=1), net, part, optimizer=torch.optim.SGD)
    print(mz.sensitivity(net, judge), gradual, kept, thinner, thin, student)


def stored() -> None:
    file: Path = mz.save(net, "net.mz", author="somebody")
    model: nn.Module = mz.load(file, mmap=True)
    try:
        weight: Tensor | object = mz.read_tensor(file, "0.weight")
    except mz.PackError as e:
        weight = str(e)
    many: list[Path] = mz.save_many({"a": net, "b": net}, "folder", archive=False, accuracy=0.9, sizes={"a": 3})
    opened: Iterator[tuple[Path, nn.Module]] = mz.load_many(many, mmap=True, verify=False)
    others: list[Path] = [
        mz.to_safetensors(net, "net.safetensors"),
        mz.to_npz(net, "net.npz"),
        mz.to_hdf5(net, "net.h5"),
        mz.to_onnx(net, "net.onnx", x),
        mz.to_gguf({"weight": x}, "net.gguf"),
    ]
    read: list[nn.Module] = [
        mz.from_safetensors(others[0], net, rename=lambda name: name.removeprefix("model.")),
        mz.from_npz(others[1], net),
        mz.from_hdf5(others[2], net),
    ]
    print(model, weight, opened, read, mz.from_gguf(others[4]), mz.inspect(file), mz.diff(file, file))


def repeated() -> None:
    recipe = mz.Recipe([("quantize_model", {"bits": 4})])
    compressed: nn.Module = recipe(net, data)
    result = mz.compress(net, data, accuracy_loss=0.01, evaluate=judge)
    results = mz.sweep(lambda bits: recipe, {"bits": [2, 4]}, net, data, evaluate=judge)
    ready = mz.deploy(net, x, engine="torch")
    y: Tensor = ready(x)
    mz.register_model("net", lambda: net)
    mz.explore(lambda bits, of: bits, bits=range(1, 9), of={"inputs": x, "nothing": None})
    mz.explore(lambda scale, on: scale, scale=torch.linspace(0, 1, 5), on=True)
    print(compressed, result, results, y)


def wrong() -> None:
    mz.quantize_model("net")  # type: ignore[arg-type]  # a path is no model
    mz.quantize_model(net, bits="4")  # type: ignore[arg-type]
    mz.quantize_model(net, layers=[nn.Linear])  # type: ignore[arg-type]  # classes come in a tuple
    mz.calibrate(net, 3)  # type: ignore[arg-type]
    mz.compare({"net": 3}, part)  # type: ignore[dict-item]
    mz.compare(models={"net": net})  # type: ignore[call-arg]  # nothing to judge by
    mz.load(3)  # type: ignore[arg-type]
    mz.load("net.mz", mmaps=True)  # type: ignore[call-arg]
    mz.save("net.mz", net)  # type: ignore[arg-type]
    mz.save(net, "net.mz", note=x)  # type: ignore[arg-type]  # JSON knows no tensor
    mz.save_many({"net": net}, thread=None, threads="all")  # type: ignore[arg-type]
    mz.load_many(["net.mz"], mmaps=True)  # type: ignore[call-arg]
    mz.distill(net, net, part, optimiser=torch.optim.SGD)  # type: ignore[call-arg]
    mz.explore(lambda bits: bits, bits="8")  # type: ignore[arg-type]
    mz.prune_model(net, sparsity="half")  # type: ignore[arg-type]
    mz.train(net, x)  # type: ignore[arg-type]  # inputs without labels
    mz.latency({"net": net})["net"].meadian  # type: ignore[attr-defined]
    mz.quantize(x).bits_per_wait  # type: ignore[attr-defined]
    size: str = mz.file_bytes("net.mz")  # type: ignore[assignment]
    mz.compare({"net": net}, part).to_htm("page.html")  # type: ignore[attr-defined]
    mz.sensitivity(net, lambda model: "good")  # type: ignore[arg-type,return-value]
    print(size)
