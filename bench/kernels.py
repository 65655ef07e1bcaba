"""How much faster are integer layers, and how close is the answer? MiniLM and convolutional models in PyTorch and in
the engines that read ONNX, beside the peers: each in a process of its own, in turns (see contest.py).

    python bench/kernels.py            prints the tables and writes bench/results/kernels.json (about half an hour on
    two cores)
    python bench/kernels.py --quick    fewer rounds
    python bench/kernels.py MiniLM     only that table (or LeNet-5, Depthwise, MBConv, 4096); the others stay as they
    were saved

MiniLM on docstrings cut to 64 tokens; threads 1 and 2, batch 1, 8 and 32. A ratio of 2 is twice as fast as float32 in
PyTorch; "cosine" is that of the outputs with float32's, the mean over 32 inputs. Peers that are not installed are left
out. On processors with bfloat16 units OpenVINO runs float32 models in bfloat16 unless told not to: both are shown.
"""

import copy, functools, json, os, platform, sys, tempfile, warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
import numpy as np
import torch
from torch import nn

from contest import contest, serve, show
from modelzip.data import LeNet5, docstrings, minilm, mnist5k, train
from modelzip.kernels import capabilities, use_kernels
from modelzip.onnx_export import onnx_model, to_onnx
from modelzip.quant import quantize_layer, quantize_model
from modelzip.prune import Inputs
from modelzip.ranges import calibrate, smooth
from modelzip.static import quantize_static

RESULTS, QUICK = Path(__file__).parent / "results" / "kernels.json", "--quick" in sys.argv
ROWS = {"*.down": "row", "*": "tensor"}  # a range for each token only where outliers are worst: after the GELU


# --- models and their inputs


class Depthwise(nn.Module):
    "Depthwise and pointwise convolutions with BatchNorm, as in MobileNet, for 28 × 28 images."

    def __init__(self):
        super().__init__()
        block = lambda i, o, s: nn.Sequential(*convolution(i, i, 3, s, i), *convolution(i, o, 1))
        blocks = block(32, 64, 1), block(64, 128, 2), block(128, 128, 1), block(128, 256, 2)
        self.body = nn.Sequential(*convolution(1, 32, 3), *blocks)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def convolution(i, o, kernel, stride=1, groups=1, act=nn.ReLU):
    found = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return [*found, act()] if act else found


class MBConv(nn.Module):
    "A block of EfficientNet (Tan and Le 2019, arXiv:1905.11946): expand, depthwise, squeeze and excite, project."

    def __init__(self, i, o, stride=1, expand=4):
        super().__init__()
        wide = i * expand
        self.expand = nn.Sequential(
            *convolution(i, wide, 1, act=nn.SiLU), *convolution(wide, wide, 3, stride, wide, nn.SiLU)
        )
        self.squeeze, self.excite = nn.Conv2d(wide, max(4, i // 4), 1), nn.Conv2d(max(4, i // 4), wide, 1)
        self.project, self.same = nn.Sequential(*convolution(wide, o, 1, act=None)), stride == 1 and i == o

    def forward(self, x):
        y = self.expand(x)
        y = y * torch.sigmoid(self.excite(nn.functional.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.project(y) + x if self.same else self.project(y)


class Efficient(nn.Module):
    "Seven such blocks, for 28 × 28 images."

    def __init__(self):
        super().__init__()
        blocks = MBConv(16, 24), MBConv(24, 24), MBConv(24, 40, 2), MBConv(40, 40), MBConv(40, 80, 2), MBConv(80, 80)
        self.body = nn.Sequential(*convolution(1, 16, 3, act=nn.SiLU), *blocks, MBConv(80, 112))
        self.head = nn.Linear(112, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


NETS = {"LeNet-5": LeNet5, "Depthwise": Depthwise, "MBConv": Efficient}


def tokens(model, texts):
    found = model.tokenizer.encode_batch(texts)
    return tuple(torch.tensor([getattr(a, part) for a in found])[:, :64] for part in ("ids", "attention_mask"))


@functools.cache
def subject(table, folder):
    "The float32 model of a table, 32 inputs, and batches of others to calibrate on."
    if table == "MiniLM":
        model, texts = minilm().eval(), docstrings(400).documents
        return (
            model,
            tokens(model, texts[:32]),
            [Inputs(*tokens(model, texts[i : i + 32])) for i in range(100, 228, 32)],
        )
    if table == "4096":
        torch.manual_seed(0)
        return nn.Linear(4096, 4096), (torch.randn(32, 4096),), []
    data, path = mnist5k(), Path(folder) / "trained.pt"
    model = NETS[table]()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        model = train(model, data.fit, epochs=1, progress=False)
        torch.save(model.state_dict(), path)
    batches = [Inputs(data.train.x[i : i + 32]) for i in range(0, 512, 32)]
    return model.eval(), (data.test.x[:32],), batches


def smoothed(model, batches, alpha, leave=()):
    "8 bits, each column's scale balanced between weight and input (SmoothQuant, arXiv:2211.10438)."
    seen = calibrate(model, batches, second_moments=False)
    return smooth(model, seen, alpha, overrides={f"*{end}": {"columns": None} for end in leave})


# --- contestants: each a function (model, inputs, calibration batches, folder, threads) → function of inputs

CONTESTANTS = {}


def contestant(name, *tables):
    def add(f):
        CONTESTANTS[name] = tables, f
        return f

    return add


ALL, IMAGES = ("MiniLM", *NETS), tuple(NETS)


@contestant("torch fp32", *ALL, "4096")
def _(model, inputs, batches, folder, threads):
    return model


@contestant("ours, expanded", *IMAGES)
def _(model, inputs, batches, folder, threads):
    return quantize_model(model)


@contestant("ours, rows, no data", *ALL)
def _(model, inputs, batches, folder, threads):
    return use_kernels(quantize_model(model, 8))


@contestant("ours, smoothed", "MiniLM")
def _(model, inputs, batches, folder, threads):
    return use_kernels(smoothed(model, batches, 0.65, (".down",)), activations=ROWS)


@contestant("ours, static", *ALL)
def _(model, inputs, batches, folder, threads):
    return quantize_static(model, batches)


@contestant("ours, 4 bits, group 32", "4096")
def _(model, inputs, batches, folder, threads):
    return use_kernels(quantize_layer(model, 4, group=32))


@contestant("ours, int8", "4096")
def _(model, inputs, batches, folder, threads):
    return use_kernels(quantize_layer(model))


@contestant("torch.ao quantize_dynamic", "MiniLM")
def _(model, inputs, batches, folder, threads):
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


@contestant("torchao int8 dynamic", "MiniLM")
def _(model, inputs, batches, folder, threads):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model := copy.deepcopy(model), Int8DynamicActivationInt8WeightConfig())
    return model


@contestant("optimum-quanto int8 weights", "MiniLM")
def _(model, inputs, batches, folder, threads):
    from optimum.quanto import freeze, qint8, quantize

    quantize(model := copy.deepcopy(model), weights=qint8)
    freeze(model)
    return model


def once(folder, name, write):
    "A file that the first who needs it writes; all others find it."
    path = Path(folder) / name
    if not path.exists():
        write(path)
    return path


def free(inputs):
    return {0: "batch", 1: "length"} if inputs[0].dim() == 2 and len(inputs) == 2 else {0: "batch"}


def floats(model, inputs, folder):
    example = tuple(x[:2] for x in inputs)
    shapes = (free(inputs),) * len(inputs)
    write = lambda path: torch.onnx.export(model, example, dynamo=True, dynamic_shapes=shapes, verbose=False).save(path)
    return once(folder, "fp32.onnx", write)


def written(made, inputs, folder, name, **how):
    "Our ONNX file. (A static MiniLM differs from PyTorch's integers by codes at ties: its cosine is in the table.)"
    example = tuple(x[:2] for x in inputs)
    return once(folder, name, lambda path: to_onnx(made(), path, example, dynamic=free(inputs), check=False, **how))


def openvino(path, inputs, threads, hint="f32"):
    import openvino as ov

    how = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    found = ov.Core().compile_model(path, "CPU", how | {"INFERENCE_PRECISION_HINT": hint})
    request = found.create_infer_request()
    return lambda *x: request.infer([t.numpy() for t in x])[found.output(0)]


@contestant("ONNX Runtime fp32", *ALL)
def _(model, inputs, batches, folder, threads):
    return onnx_model(floats(model, inputs, folder), threads)


def own(per_channel):
    def build(model, inputs, batches, folder, threads):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        source, kind = floats(model, inputs, folder), QuantType.QInt8
        write = lambda path: quantize_dynamic(source, path, weight_type=kind, per_channel=per_channel)
        return onnx_model(once(folder, f"own{per_channel}.onnx", write), threads)

    return build


contestant("ONNX Runtime quantize_dynamic", "MiniLM")(own(False))
contestant("ONNX Runtime quantize_dynamic, per channel", "MiniLM")(own(True))


@contestant("OpenVINO fp32", *ALL)
def _(model, inputs, batches, folder, threads):
    return openvino(floats(model, inputs, folder), inputs, threads)


@contestant("OpenVINO fp32 in bf16", *ALL)
def _(model, inputs, batches, folder, threads):
    return openvino(floats(model, inputs, folder), inputs, threads, "bf16")


def nncf_file(model, inputs, batches, folder):
    import openvino as ov

    def write(path):
        import nncf

        with torch.no_grad():
            graph = ov.convert_model(model, example_input=inputs if len(inputs) > 1 else inputs[0])
        items = [[x[i : i + 1].numpy() for x in b.args] for b in batches for i in range(len(b.args[0]))]
        kind = nncf.ModelType.TRANSFORMER if len(inputs) > 1 else None
        ov.save_model(nncf.quantize(graph, nncf.Dataset(items), model_type=kind, subset_size=len(items)), path)

    return once(folder, "nncf.xml", write)


@contestant("OpenVINO, NNCF static int8", *ALL)
def _(model, inputs, batches, folder, threads):
    return openvino(nncf_file(model, inputs, batches, folder), inputs, threads)


@contestant("OpenVINO, NNCF static int8, rest in bf16", *ALL)
def _(model, inputs, batches, folder, threads):
    return openvino(nncf_file(model, inputs, batches, folder), inputs, threads, "bf16")


@contestant("CTranslate2 int8", "MiniLM")
def _(model, inputs, batches, folder, threads):
    import ctranslate2

    encoder = ctranslate2.Encoder(
        str(once(folder, "ctranslate2", lambda path: to_ctranslate2(model, path))), intra_threads=threads
    )

    def run(ids, mask):
        y = encoder.forward_batch([i[: int(m.sum())].tolist() for i, m in zip(ids, mask)]).last_hidden_state
        y, m = np.array(y, dtype=np.float32), mask.numpy()[:, : y.shape[1], None]
        y = (y * m).sum(1)
        return y / np.linalg.norm(y, axis=1, keepdims=True)

    return run


def to_bert(model, folder):
    "The same weights as transformers' BertModel, in a folder."
    from transformers import BertConfig, BertModel

    width, layers = model.norm.normalized_shape[0], len(model.blocks)
    up, heads = model.blocks[0].up.out_features, model.blocks[0].attention.heads
    config = BertConfig(
        vocab_size=model.words.num_embeddings,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=up,
        position_embedding_type="absolute",  # which the converter asks for
    )
    bert, names = BertModel(config), {"norm": "embeddings.LayerNorm", "pooler": "pooler.dense"}
    names |= {
        a: f"embeddings.{b}_embeddings"
        for a, b in (("words", "word"), ("positions", "position"), ("types", "token_type"))
    }
    inside = {f"attention.{n}": f"attention.self.{n}" for n in ("query", "key", "value")}
    inside |= {"attention.out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm"}
    inside |= {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}
    for i in range(layers):
        names |= {f"blocks.{i}.{a}": f"encoder.layer.{i}.{b}" for a, b in inside.items()}
    own = {k.rpartition(".")[::2]: v for k, v in model.state_dict().items()}
    state = {f"{names[layer]}.{key}": v for (layer, key), v in own.items() if layer in names}
    bert.load_state_dict(state, strict=False)
    bert.save_pretrained(folder)
    model.tokenizer.save(str(Path(folder) / "tokenizer.json"))
    words = sorted(model.tokenizer.get_vocab().items(), key=lambda w: w[1])
    (Path(folder) / "vocab.txt").write_text("\n".join(w for w, _ in words), encoding="utf-8")
    (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def to_ctranslate2(model, path):
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as folder:
        to_bert(model, folder)
        TransformersConverter(folder).convert(str(path), quantization="int8")


@contestant("ours through ONNX Runtime, smoothed, fast", "MiniLM")
def _(model, inputs, batches, folder, threads):
    made = lambda: use_kernels(smoothed(model, batches, 0.7), activations="tensor")
    return onnx_model(written(made, inputs, folder, "fast.onnx"), threads)


@contestant("ours through ONNX Runtime, smoothed", "MiniLM")
def _(model, inputs, batches, folder, threads):
    made = lambda: use_kernels(smoothed(model, batches, 0.65, (".down",)), activations=ROWS)
    return onnx_model(written(made, inputs, folder, "rows.onnx"), threads)


def fixed(model, inputs, batches, folder, name="static.onnx", **how):
    return written(lambda: quantize_static(model, batches, **how), inputs, folder, name)


def attentive(model, inputs, batches, folder):
    "Fixed ranges, the products of attention among them."
    return fixed(model, inputs, batches, folder, "attention.onnx", attention=True)


@contestant("ours through ONNX Runtime, static", *ALL)
def _(model, inputs, batches, folder, threads):
    return onnx_model(fixed(model, inputs, batches, folder), threads)


@contestant("ours through OpenVINO, static", *ALL)
def _(model, inputs, batches, folder, threads):
    return openvino(fixed(model, inputs, batches, folder), inputs, threads)


@contestant("ours through OpenVINO, static, rest in bf16", *ALL)
def _(model, inputs, batches, folder, threads):
    return openvino(fixed(model, inputs, batches, folder), inputs, threads, "bf16")


@contestant("ours through ONNX Runtime, static with attention", "MiniLM")
def _(model, inputs, batches, folder, threads):
    return onnx_model(attentive(model, inputs, batches, folder), threads)


@contestant("ours through OpenVINO, static with attention", "MiniLM")
def _(model, inputs, batches, folder, threads):
    return openvino(attentive(model, inputs, batches, folder), inputs, threads)


@contestant("ours through OpenVINO, static with attention, rest in bf16", "MiniLM")
def _(model, inputs, batches, folder, threads):
    return openvino(attentive(model, inputs, batches, folder), inputs, threads, "bf16")


# --- the program


def built(table, name, threads, folder):
    torch.set_num_threads(threads)
    model, inputs, batches = subject(table, folder)
    with torch.no_grad():
        exact = model(*inputs)
        f = CONTESTANTS[name][1](model, inputs, batches, folder, threads)

    @torch.inference_mode()
    def run(batch):
        return f(*(x[:batch] for x in inputs))

    return run, exact


def main():
    tables = ["MiniLM", *NETS, "4096"]
    asked = [t for t in tables if t in sys.argv[1:]] or tables
    found = json.loads(RESULTS.read_text())["times as fast as fp32"] if RESULTS.exists() else {}
    for table in asked:
        names = [n for n, (where, _) in CONTESTANTS.items() if table in where]
        with tempfile.TemporaryDirectory() as folder:
            subject(table, folder)
            batches = (1,) if table == "4096" else (1, 8, 32)
            found[table] = contest(__file__, table, names, folder, batches=batches, rounds=6 if QUICK else 11)
        show(table, found[table])
        about = {"torch": torch.__version__, "python": platform.python_version(), "kernels": vars(capabilities())}
        for package in ("onnxruntime", "openvino", "nncf", "ctranslate2", "torchao", "optimum.quanto"):
            try:
                about[package] = __import__(package, fromlist=["x"]).__version__
            except Exception:
                pass
        found = {t: found[t] for t in tables if t in found}
        RESULTS.write_text(json.dumps({"about": about, "times as fast as fp32": found}, indent=1) + "\n")
    print(f"\n{about}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _, _, table, name, threads, folder = sys.argv
        serve(lambda: built(table, name, int(threads), folder))
    else:
        main()
