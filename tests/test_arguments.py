"A wrong argument is an error that names it as the caller wrote it: never one from deep inside."

import contextlib, copy, importlib, inspect, io, pickle, pkgutil, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import modelzip
from guards import FUZZ
from modelzip import (
    auto,
    channels,
    cli,
    data,
    distill,
    exchange,
    kernels,
    language,
    lossless,
    measure,
    pack,
    prune,
    ptq,
    qat,
    quant,
    recipe,
    structured,
    threads,
)
from modelzip.data import Data, LeNet5, Split
from modelzip.workshop import coded, english, gguf_archive, gguf_blocks, gguf_files, key_value_cache, listening
from modelzip.workshop import quick_llama, smollm2, tokenizing
from modelzip.workshop.arguments import fits, in_words

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
X, Y = torch.randn(20, 6), torch.arange(20) % 3
SPLIT = Split(X, Y)
DATA, W, H = Data(SPLIT, SPLIT, SPLIT), torch.randn(4, 6), X.T @ X
SMALL, STATISTICS = quant.quantize_model(NET, 8), ptq.calibrate(NET, [X], second_moments=True)
MASKED, PREPARED = prune.prune_model(NET, 0.5), qat.prepare(NET, bits=4, batches=[X])
SPARSE, IMAGES = prune.sparsify_model(MASKED, bits=4), nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()

LLAMA = language.Llama(words=40, width=64, layers=1, heads=2, kv_heads=1, hidden=64, context=32).eval()
TOLD = {"tokens": ["<|end|>", *tokenizing.byte_letters()], "token_type": [3] + [1] * 256, "merges": []}
TOLD = {f"tokenizer.ggml.{k}": v for k, v in {**TOLD, "model": "gpt2", "pre": "smollm", "eos_token_id": 0}.items()}
BYTES, PROSE = tokenizing.BytePairs(TOLD), ["One is here. Two is there. " * 3, "Cats do not bark. Birds do sing. " * 3]
PAGES = dict(texts=english.English("test", ["a", "b"], PROSE, {"python": "3"}), tokenizer=BYTES)
TEXTS, FOUR, KEYS = [torch.arange(8), torch.arange(3, 12)], torch.randn(32, 64), torch.randn(1, 1, 4, 32)
ASKED = english.NextSentences(torch.arange(8).view(2, 4), torch.arange(6).view(2, 3), torch.arange(6, 12).view(2, 3))
BLOCKS, BATCHES = gguf_blocks.quantize_blocks(FOUR, "Q4_0"), [torch.arange(8)[None]]
COSTS, SAYS = coded.sensitivities(LLAMA, BATCHES), {f"llama.{k}": 1 for k in smollm2.OPTIONS.values()}
SEEN = ptq.calibrate(nn.Sequential(nn.Linear(64, 32)), [torch.randn(99, 64)], second_moments=True)["0"]
SHAPE = dict(width=32, heads=4, kv_heads=2)

CALLS = {  # a call that works, from which one argument after the other is spoilt
    quant: dict(
        quantize=dict(x=W, bits=4),
        quantize_layer=dict(layer=NET[0]),
        quantize_model=dict(model=NET),
        dequantize_model=dict(model=SMALL),
        Dequantize=dict(layer=nn.Linear(6, 4), q=quant.quantize(W)),
        pack_bits=dict(codes=torch.arange(8, dtype=torch.uint8), bits=3),
    ),
    prune: dict(
        mask_layer=dict(layer=nn.Linear(6, 4), keep=W > 0),
        masks=dict(model=MASKED),
        remove_masks=dict(model=MASKED),
        prunable_layers=dict(model=NET),
        prune_model=dict(model=NET, sparsity=0.5),
        sparsity_table=dict(model=NET),
        left_whole=dict(model=NET),
        sparsify_model=dict(model=MASKED),
        sensitivity=dict(model=NET, evaluate=lambda m: 0.5, sparsities=(0.5,)),
        rewind=dict(model=copy.deepcopy(NET), state=NET.state_dict()),
        lottery_ticket=dict(model=NET, retrain=lambda m, i: None, sparsity=0.5, rounds=1),
        fill_zeros=dict(model=SPARSE),
        use_sparse_products=dict(model=SPARSE),
        surgeon_weight=dict(weight=W, moment=H, sparsity=0.5),
        iterative=dict(t=0.5, final=0.5),
        cubic=dict(t=0.5, final=0.5),
        cosine=dict(t=0.5, final=0.5),
        collect=dict(model=NET, batches=[X], needs="power"),
    ),
    ptq: dict(
        calibrate=dict(model=NET, batches=[X]),
        gptq=dict(model=NET, batches=[X]),
        awq=dict(model=NET, statistics=STATISTICS),
        smooth=dict(model=NET, statistics=STATISTICS),
        hqq=dict(model=NET),
        shrink=dict(error=W),
        correct_bias=dict(quantized=SMALL, model=NET, statistics=STATISTICS),
    ),
    qat: dict(
        prepare=dict(model=NET, batches=[X]),
        convert=dict(model=PREPARED),
        set_bits=dict(model=copy.deepcopy(PREPARED), bits=3),
        WeightQuantizer=dict(weight=W, levels=15),
        ActivationQuantizer={},
    ),
    kernels: dict(use_kernels=dict(model=SMALL), what_runs=dict(model=SMALL), quantize_rows=dict(x=X)),
    structured: dict(
        shrink=dict(model=NET, example=X[:2], ratio=0.5),
        fold_batchnorm=dict(model=IMAGES, example=torch.rand(2, 1, 6, 6)),
        factorize=dict(model=NET, rank=2),
    ),
    channels: dict(dependency_graph=dict(model=NET, example=X[:2])),
    measure: dict(
        file_bytes=dict(path="a.mz"),
        count_parameters=dict(model=NET),
        macs=dict(model=NET, example=X),
        sqnr=dict(x=W, x_hat=W),
        wilson=dict(correct=5, n=10),
    ),
    data: dict(Split=dict(x=X, y=Y), accuracy=dict(model=NET, split=SPLIT), LeNet5={}),
    distill: dict(SoftTargets={}),
    pack: dict(
        save=dict(model=NET, path="b.mz"),
        load=dict(path="a.mz", model=NET),
        read_tensor=dict(path="a.mz", name="0.weight"),
        inspect=dict(path="a.mz"),
        diff=dict(a="a.mz", b="a.mz"),
    ),
    exchange: dict(to_safetensors=dict(model=NET, path="b.safetensors"), from_npz=dict(path="a.npz", model=NET)),
    recipe: dict(
        Recipe=dict(steps=["fold_batchnorm"]), samples_of=dict(data=DATA), grid_points=dict(grid={"bits": [4]})
    ),
    auto: dict(
        output_change=dict(model=NET, values={}, batches=[X]),
        allocate=dict(bytes=[[1, 2]], errors=[[2, 1]], budget=3.0),
        compress=dict(model=NET, data=DATA, bytes=600),
    ),
    language: dict(
        rotary_angles=dict(start=0, length=4, head=8),
        rotary=dict(x=KEYS, angles=language.rotary_angles(0, 4, 32)),
        GroupedAttention=SHAPE,
        Llama=SHAPE | dict(words=40, layers=1, hidden=48),
        generate=dict(model=LLAMA, prompt=[1, 2, 3], tokens=2),
        listen=dict(model=LLAMA, documents=TEXTS),
        perplexity=dict(model=LLAMA, documents=TEXTS),
        kl_divergence=dict(model=LLAMA, reference=LLAMA, documents=TEXTS),
        next_token_agreement=dict(model=LLAMA, reference=LLAMA, documents=TEXTS),
        right_answers=dict(model=LLAMA, questions=ASKED),
    ),
    smollm2: dict(
        gguf_metadata=dict(path="a.gguf"),
        llama_options=dict(metadata=SAYS | {"general.architecture": "llama"}),
        llama_name=dict(key="blk.0.attn_q.weight"),
        rows_in_halves=dict(weight=FOUR, heads=2),
    ),
    tokenizing: dict(
        joined=dict(letters=["a", "b"], ranks={}), BytePairs=dict(metadata=TOLD), sayable=dict(text="a", lacking={1})
    ),
    english: dict(
        paragraphs_of=dict(text="A b."),
        docstrings_in=dict(package="numpy", folders=["fft"]),
        documents=dict(length=16, **PAGES),
        sentence_starts=dict(text="A. B."),
        next_sentences=dict(questions=2, before=4, after=3, **PAGES),
    ),
    listening: dict(
        exp_or_inf=dict(x=1.0),
        ratio_interval=dict(top=torch.ones(3), bottom=torch.ones(3), draws=10),
        check_documents=dict(documents=TEXTS),
        whole_numbers=dict(tokens=[1], name="tokens"),
    ),
    key_value_cache: dict(QuantizedCache={}, ThroughCache=dict(model=LLAMA, make=key_value_cache.QuantizedCache)),
    quick_llama: dict(
        stacked_tensors=dict(qs=[quant.quantize(FOUR)]),
        stacked_blocks=dict(qs=[BLOCKS]),
        stacked=dict(layers=[nn.Linear(64, 32, bias=False), nn.Linear(64, 16, bias=False)]),
        SideBySide=dict(layers=[nn.Linear(64, 32)]),
        RoomyCache={},
        quick_llama=dict(model=LLAMA),
    ),
    coded: dict(
        fine_step=dict(statistics=SEEN, rows=torch.ones(len(FOUR)), nats=1e-3),
        coded_weight=dict(weight=FOUR, statistics=SEEN, nats=1e-3),
        expected_bits=dict(weight=FOUR, statistics=SEEN, nats=1e-3, rows=torch.ones(len(FOUR))),
        is_bargain=dict(kept=BLOCKS, bits=4.0),
        sensitivities=dict(model=LLAMA, batches=BATCHES),
        sum_of_costs=dict(parts=[COSTS]),
        table_costs=dict(costs=COSTS),
        expected_share=dict(seen=torch.ones(5)),
        coded_table=dict(model=LLAMA, costs=COSTS, nats=1e-3),
        coded=dict(model=LLAMA, batches=BATCHES, costs=COSTS),
    ),
    gguf_files: dict(
        read_head=dict(data=b"GGUF"),
        from_gguf=dict(path="a.gguf"),
        to_gguf=dict(tensors={"a": FOUR}, path="b.gguf"),
        inspect_gguf=dict(path="a.gguf"),
    ),
    gguf_archive: dict(
        archive_gguf=dict(path="a.gguf", output="b.mz"),
        restore_gguf=dict(path="g.mz", output="b.gguf"),
        diff_gguf=dict(a="a.gguf", b="g.mz"),
    ),
    threads: dict(amdahl=dict(n=2, serial=0.1), save_multi_threaded_model=dict(model=NET, path="c.mz")),
}


class Odd:
    pass


BAD = {
    **{"text": "nonsense", "object": Odd(), "None": None, "class": Odd, "bytes": b"bytes"},
    **{"empty": [], "no tuple": (), "no dict": {}, "no text": "", "no set": set(), "whole numbers": [1, 2]},
    **{"nan": float("nan"), "inf": float("inf"), "-0.0": -0.0, "-1": -1, "huge": 10**30, "complex": 1j},
    **{"np nan": np.float32("nan"), "np -1": np.int64(-1), "np bool": np.bool_(True), "array": np.ones(3)},
    **{"scalar": torch.tensor(3.5), "scalar nan": torch.tensor(float("nan")), "no tensor": torch.empty(0)},
}


def left_out(name, p, kind, bad, given):
    "What is no mistake, or takes as long as was asked for."
    return (
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        or bad is p.default
        or name == "compress"
        and (not given or kind != "text")
        or kind == "class"
        and fits(bad, p.annotation)  # a class can be called: what it says of that is its own
        or kind == "huge"
        and p.name in ("steps", "rounds", "layers", "damping")
        or p.name == "device"  # PyTorch says it
        or p.name == "compiled"  # whatever is true compiles, for many seconds
        or isinstance(bad, torch.Tensor)
        and p.name == "example"  # what the model says of its shape
    )


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack.save(NET, "a.mz")
    exchange.to_npz(NET, "a.npz")
    gguf_files.to_gguf({"a.weight": BLOCKS}, "a.gguf", {"general.architecture": "toy"})
    gguf_archive.archive_gguf("a.gguf", "g.mz", threads=1)


@pytest.mark.hypothesis  # so that a search comes here: every value for every argument
@pytest.mark.parametrize("module", CALLS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_no_wrong_argument_is_an_error_from_deep_inside(module):
    wrong = []
    for name, good in CALLS[module].items():
        f = getattr(module, name)
        for i, p in enumerate(inspect.signature(f).parameters.values()):
            for kind, bad in list(BAD.items()) if FUZZ else list(BAD.items())[i % 5 :: 5]:
                if left_out(name, p, kind, bad, p.name in good):
                    continue
                try:
                    with contextlib.redirect_stderr(io.StringIO()):
                        done = f(**{**good, p.name: bad})
                        inspect.isgenerator(done) and list(done)
                except (TypeError, ValueError, OSError, pack.PackError) as e:
                    says = (
                        p.name.rstrip("s"),
                        *["batch 0", "'input'"] * (p.name == "batches"),
                        *["kept"] * (p.name == "keep"),
                    )
                    if not any(word in str(e) for word in says) and not isinstance(e, (OSError, pack.PackError)):
                        wrong.append(f"{name}({p.name}={kind}): {e}")
                except Exception as e:
                    wrong.append(f"{name}({p.name}={kind}): {type(e).__name__}: {e}")
    assert not wrong, "\n".join(wrong)


def test_every_public_function_says_what_its_arguments_may_be():
    for found in pkgutil.iter_modules(modelzip.__path__):
        if found.name.startswith("_") or found.name in ("cli", "workshop"):
            continue
        module = importlib.import_module(f"modelzip.{found.name}")
        for name in module.__all__:
            f = getattr(module, name)
            if not inspect.isfunction(f) or f.__module__ != module.__name__:
                continue
            assert hasattr(f, "__wrapped__"), f
            assert all(
                d is getattr(module, d.__name__, d)
                for p in inspect.signature(f).parameters.values()
                for d in [p.default]
                if inspect.isfunction(d)
            ), f
            assert pickle.loads(pickle.dumps(f)) is f and inspect.getsource(f).lstrip("@").strip()
            for p in inspect.signature(f).parameters.values():
                assert p.annotation is p.empty or in_words(p.annotation)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: ptq.shrink(NET), "error is a Sequential; it may be a tensor"),
        (lambda: prune.iterative(NET, 2), "t is a Sequential; it may be a number"),
        (lambda: prune.prunable_layers(NET, skip=[1]), "skip is a list; it may be an iterable"),
        (lambda: prune.prunable_layers(NET, skip=torch.tensor(1)), "skip is a Tensor; it may be an iterable"),
        (lambda: data.LeNet5(hidden=10**30), "hidden is 1000000000000000000000000000000; it may be .* at most 64 bits"),
        (
            lambda: pack.load("a.mz", nn.Sequential),
            "model is the class Sequential; it may be an nn.Module or None; call it: Sequential()",
        ),
        (lambda: quant.quantize_model(LeNet5), "model is the class LeNet5; it may be an nn.Module; call it: LeNet5()"),
        (lambda: ptq.gptq(NET, X), "batches is a Tensor"),
        (
            lambda: modelzip.ranges.equalize(NET, X),
            "^pairs holds a Tensor at 0; it may hold a tuple .text, text. there",
        ),
        (lambda: modelzip.ranges.equalize(NET, ["a", "b"]), "^pairs holds 'a' at 0; it may hold a tuple"),
        (
            lambda: modelzip.ranges.equalize(NET, [("a", "b", "c")]),
            "^pairs holds a tuple at 0; it may hold a tuple .text, text",
        ),
        (lambda: auto.compress(NET, X, bytes=600), "^data is a Tensor; it may be an iterable of batches, such as"),
        (lambda: data.train(NET, SPLIT, epochs="two"), "epochs is 'two'; it may be a whole number"),
        (lambda: prune.masks(None), "model is None; it may be an nn.Module"),
        (lambda: measure.macs(NET, "x"), "example is 'x'; it may be what the model is called with"),
        (lambda: pack.save(NET, None), "path is None; it may be a path"),
    ],
)
def test_the_argument_is_named_as_the_caller_wrote_it(call, said):
    with pytest.raises(TypeError, match=said):
        call()


NO_MODEL = {  # and what is said of it, with what makes a model of it
    "None": (None, "None; it may be "),
    "a class": (LeNet5, "the class LeNet5; it may be an nn.Module{}; call it: LeNet5()"),
    "tensors": (NET.state_dict(), "an OrderedDict; it may be an nn.Module{}; load_state_dict(…) of your model takes a"),
    "a dict": ({"w": 1}, "a dict; it may be an nn.Module{}"),
    "text": ("a.mz", "'a.mz'; it may be an nn.Module{}; load(path) gives the model of a .mz file"),
    "a path": (Path("a.mz"), "a PosixPath; it may be an nn.Module{}; load(path) gives the model of a .mz file"),
    "an array": (np.ones(2), "a ndarray; it may be an nn.Module{}"),
}
OTHERS = dict(  # what a function that is not among CALLS is given besides
    **dict(
        data=DATA, split=SPLIT, batches=[X], example=X[:2], samples=[X], statistics=STATISTICS, path="c.mz", layers=None
    ),
    **dict(values={}, changes={}, given=NET, options={}, make=lambda bits: None, grid={"bits": [4]}, method=ptq.gptq),
    **dict(
        model=NET, teacher=NET, student=NET, quantized=SMALL, new=NET, norm=nn.BatchNorm1d(4), dynamic=None, paths=[]
    ),
    **dict(weight=W, bias=None, mean=W[:, 0], variance=W[:, 0]),
)


def models_asked_for():
    "(function, name of an argument that is a model, other arguments) of all public functions."
    modules = [importlib.import_module(f"modelzip.{m.name}") for m in pkgutil.iter_modules(modelzip.__path__)]
    for module in modules:
        for name in getattr(module, "__all__", ()) if module is not cli else ():
            f = getattr(module, name)
            if inspect.isfunction(f) and f.__module__ == module.__name__:
                takes = inspect.signature(f).parameters
                needed = [n for n, p in takes.items() if p.default is p.empty and n in OTHERS]
                given = CALLS.get(module, {}).get(name) or {n: OTHERS[n] for n in needed}
                given = given | (
                    {"batches": [X]} if f is modelzip.quantize_static else {}
                )  # one of two that it may be given
                for n, p in takes.items():
                    if p.annotation in (nn.Module, nn.Module | None) and n != "reference":  # texts stand for that, too
                        yield f, n, p.annotation, given


def test_what_is_no_model_says_what_makes_one():
    "Of every public function, whichever of its arguments is a model."
    seen, wrong = 0, []
    for f, name, kind, given in models_asked_for():
        for what, (bad, says) in NO_MODEL.items():
            if bad is None and kind != nn.Module:
                continue
            seen += 1
            want = f"{name} is {says}".format(" or None" * (kind != nn.Module))
            try:
                done = f(**{**given, name: bad})
                inspect.isgenerator(done) and list(done)
                wrong.append(f"{f.__name__}({name}={what}): takes it")
            except Exception as e:
                if not isinstance(e, TypeError) or want not in str(e):
                    wrong.append(f"{f.__name__}({name}={what}): {type(e).__name__}: {e}")
    assert seen > 500 and not wrong, "\n".join(wrong)


def test_a_scripted_model_is_told_from_one_without_layers():
    scripted, seen, wrong = torch.jit.trace(NET, X, check_trace=False), 0, []
    for module in (modelzip.prune, modelzip.ptq, modelzip.qat, modelzip.auto, modelzip.static):
        for name, good in CALLS.get(module, {}).items():
            if isinstance(good.get("model"), nn.Module):
                try:
                    getattr(module, name)(**{**good, "model": scripted})
                except Exception as e:
                    seen += "ScriptModule" in str(e)
                    if "it may have" in str(e) and "ScriptModule" not in str(e):
                        wrong.append(f"{name}: {e}")
    assert seen > 10 and not wrong, "\n".join(wrong)


def takes_one_channel(f):
    "A model whose first layer has one channel, called with three."
    model, x = (
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3)).eval(),
        torch.randn(4, 3, 8, 8),
    )
    f(model, x)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: pack.save(m, "b.mz", example=x),
        lambda m, x: modelzip.shrink(m, x, 0.5),
        lambda m, x: modelzip.deploy(m, x),
        lambda m, x: modelzip.macs(m, x),
        lambda m, x: modelzip.equalize(m, example=x),
        lambda m, x: modelzip.fold_batchnorm(m, x),
        lambda m, x: modelzip.gptq(m, [x]),
        lambda m, x: modelzip.trellis(m, [x]),
        lambda m, x: modelzip.quantize_static(m, [x]),
        lambda m, x: modelzip.compress(m, [x], bytes=3000, progress=False),
    ],
)
def test_the_layer_that_cannot_take_an_example_is_named(f):
    says = r"layer 0, Conv2d\(1, 8, kernel_size=\(3, 3\), stride=\(1, 1\)\), is given float32 \[4, 3, 8, 8\]: "
    with pytest.raises(ValueError, match=says):
        takes_one_channel(f)


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(32, 3), nn.Linear(32, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        if x.mean() > 0:
            return self.b(h)
        return self.c(h)


def test_a_model_that_decides_by_numbers_is_shrunk_by_examples_of_each_way():
    with pytest.raises(ValueError, match=r"Decides, test_arguments.py line \d+, `if x.mean\(\) > 0:`: .*go each way"):
        modelzip.shrink(Decides(), X.abs(), 0.5)
    assert modelzip.shrink(Decides(), [X.abs(), -X.abs()], 0.5).a.out_features == 16


BYTES_OF = np.arange(32, dtype=np.uint8)
SPLIT_FLOATS = {  # a call of `modelzip.lossless` that works, and what may be wrong with it
    "low_byte": (dict(words=BYTES_OF.astype(np.uint32), shift=8), dict(words=BYTES_OF, shift=25)),
    "float_symbols": (dict(words=BYTES_OF.astype(np.uint16)), dict(words=np.ones(4))),
    "float_rest": (dict(words=BYTES_OF.astype(np.uint64)), dict(words=[1, 2])),
    "best_window": (dict(symbols=BYTES_OF), dict(symbols=-np.ones(4, int))),
    "pack_pairs": (dict(symbols=BYTES_OF, first=3), dict(symbols=BYTES_OF[:15], first=300)),
    "unpack_pairs": (dict(pairs=BYTES_OF, first=3), dict(pairs=BYTES_OF[:7], first=-1)),
    "join_floats": (
        dict(symbols=BYTES_OF, rest=BYTES_OF, low=[BYTES_OF] * 2, out=np.empty(32, np.uint32)),
        dict(symbols=BYTES_OF[1:], rest=np.ones(32), low=[], out=np.empty(32, np.float32)),
    ),
}


def test_floats_are_split_and_joined_only_as_words():
    assert {*SPLIT_FLOATS} == {n for n in lossless.__all__ if inspect.isfunction(getattr(lossless, n))}
    for name, (good, bad) in SPLIT_FLOATS.items():
        getattr(lossless, name)(**good)
        for key, x in [*bad.items(), *((k, None) for k in good), *((k, "text") for k in good)]:
            with pytest.raises((TypeError, ValueError), match=f"^{key} (is|has)") as e:
                getattr(lossless, name)(**{**good, key: x})
            assert "modelzip" in str(e.traceback[-1].path)


ODDLY = {  # argument → calls that are given a function of another number of arguments
    "load": lambda: measure.compare({"a": NET}, SPLIT, load=lambda p: NET, batches=(), progress=False),
    "save": lambda: measure.compare({"a": NET}, SPLIT, save=lambda m: None, batches=(), progress=False),
    "right": lambda: measure.compare({"a": NET}, SPLIT, right=lambda m: Y == 0, batches=(), progress=False),
    "retrain": lambda: prune.prune_model(NET, 0.5, retrain=lambda m: None),
    "retrain ": lambda: prune.lottery_ticket(NET, lambda m: None, 0.5, rounds=1),
    "schedule": lambda: prune.prune_model(NET, 0.5, schedule=lambda t: t),
    "schedule ": lambda: prune.prune_gradually(NET, SPLIT, 0.5, 1, schedule=lambda t: t, progress=False),
    "evaluate": lambda: prune.sensitivity(NET, lambda: 0.5, (0.5,)),
    "loss": lambda: prune.prune_model(NET, 0.5, "taylor", batches=[X], loss=lambda m: 0),
    "loss ": lambda: data.train(copy.deepcopy(NET), SPLIT, 1, loss=lambda y: y.sum(), progress=False),
    "after_epoch": lambda: data.train(copy.deepcopy(NET), SPLIT, 1, after_epoch=lambda: 0, progress=False),
    "augment": lambda: distill.distill(copy.deepcopy(NET), NET, SPLIT, epochs=1, augment=lambda: 0, progress=False),
    "overrides": lambda: quant.quantize_model(NET, overrides=lambda name: None),
    "overrides ": lambda: ptq.gptq(NET, [X], overrides=lambda name: None),
    "overrides  ": lambda: ptq.awq(NET, statistics=STATISTICS, overrides=lambda: None),
}


@pytest.mark.parametrize("name", ODDLY)
def test_a_function_of_another_number_of_arguments_is_named(name):
    with pytest.raises((TypeError, ValueError), match=rf"^{name.strip()} .*(function|argument)"):
        ODDLY[name]()


def test_a_file_decides_the_sizes_of_what_is_loaded():
    wide = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    loaded = pack.load("a.mz", wide)
    assert loaded[0].out_features == 8 and wide[0].out_features == 16 and torch.equal(loaded(X), NET(X))


def test_a_warning_points_to_the_callers_line():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prune.prune_model(model, 0.5)
        quant.quantize(torch.tensor([1.0, float("nan")]), nonfinite="zero")
        ptq.gptq(First(), [torch.randn(3, 4)])
    assert len(said) == 3 and {w.filename for w in said} == {__file__}
