"""At the edges of files: options with a wrong letter, names that no tree can hold, and files that are read back before
they are there; and at those of models: modules in modules, and very many."""

import contextlib, zipfile

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from guards import FUZZ

import modelzip

from modelzip import cli, exchange
from modelzip.data import LeNet5
from modelzip.exchange import from_hdf5, from_npz, from_safetensors, save_many, to_hdf5, to_npz, to_safetensors
from modelzip.kernels import use_kernels
from modelzip.pack import load, save
from modelzip.prune import masks, prune_model
from modelzip.qat import convert, prepare
from modelzip.quant import quantize_model
from modelzip.structured import shrink

WRITERS = {"mz": save, "npz": to_npz, "safetensors": to_safetensors, "h5": to_hdf5}


# ---- options ------------------------------------------------------------------------------------------------------
def test_a_misspelt_option_is_no_information(tmp_path):
    m = nn.Linear(2, 2)
    for write, wrong, right in (
        (save, "archiv", "archive"),
        (save, "thread", "threads"),
        (lambda m, path, **how: save_many({"a": m}, tmp_path, **how), "Archive", "archive"),
        (to_npz, "compressed", "compress"),
        (to_hdf5, "compres", "compress"),
    ):
        with pytest.raises(TypeError, match=f"{wrong} is no option; did you mean {right}"):
            write(m, tmp_path / "x", **{wrong: False})
    assert not [*tmp_path.iterdir()]
    save(m, tmp_path / "x.mz", note=1, recipe="4-bit", accuracy=0.5, architecture="none", read=2)


def test_what_one_format_may_say_and_another_may_not(tmp_path, capsys):
    save(nn.Linear(2, 2), tmp_path / "x.mz", compressed="4 bits")
    assert cli.cli(["convert", str(tmp_path / "x.mz"), str(tmp_path / "x.npz")]) == 2
    assert "'compressed', which .npz files cannot say" in capsys.readouterr().err
    assert not cli.cli(["convert", str(tmp_path / "x.mz"), str(tmp_path / "x.safetensors")])


# ---- what is written is read back ---------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["npz", "safetensors", "h5"])
def test_a_file_that_does_not_come_back_is_not_written(tmp_path, monkeypatch, end):
    m, path = quantize_model(LeNet5(), 4), tmp_path / f"x.{end}"
    WRITERS[end](m, path)
    before = path.read_bytes()
    back = exchange.reading_back

    def spoiled(f):
        f.flush()
        size = f.seek(0, 2)
        f.seek(size // 2)
        byte = f.read(1)
        f.seek(size // 2)
        f.write(bytes([byte[0] ^ 1]))
        return back(f)

    with monkeypatch.context() as wrong:
        wrong.setattr(exchange, "reading_back", spoiled)
        with pytest.raises(ValueError, match="does not come back from its file"):
            WRITERS[end](m, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


# ---- names --------------------------------------------------------------------------------------------------------
ODD = {
    "a beside a.b": ["a", "a.b"],
    "a.b beside a": ["a.b", "a"],
    "a method": ["train.weight"],
    "an attribute": ["a.training"],
    "nothing": [""],
    "an empty part": ["a..b"],
    "a dot behind": ["a."],
}


def written(folder, names, end):
    "A file from somebody else."
    import safetensors.torch

    path, state = folder / f"x.{end}", {n: torch.ones(2, 2) for n in names}
    if end == "pt":
        torch.save(state, path)
    elif end == "safetensors":
        safetensors.torch.save_file(state, path)
    elif end == "npz":
        with zipfile.ZipFile(path, "w") as z:
            for n in names:
                with z.open(f"{n}.npy", "w") as f:
                    np.lib.format.write_array(f, np.ones((2, 2)))
    else:
        with h5py.File(path, "w") as h:
            for n in names:
                h.create_dataset(n.replace(".", "/") if "." in n else n, data=np.ones((2, 2)))
    return path


@pytest.mark.parametrize("end", ["pt", "safetensors", "npz", "h5"])
@pytest.mark.parametrize("what", ODD)
def test_names_that_no_model_has_are_refused_by_name(tmp_path, capsys, end, what):
    names = ODD[what]
    if end == "h5" and what in ("a beside a.b", "a.b beside a", "nothing", "an empty part", "a dot behind"):
        pytest.skip("HDF5 cannot hold it")
    path = written(tmp_path, names, end)
    for command in (["compress", path, "-o", tmp_path / "y.mz"], ["convert", path, tmp_path / "y.npz"]):
        assert cli.cli([str(c) for c in command]) == 2, command
        said = capsys.readouterr().err
        assert any(repr(n) in said for n in names) and len(said.splitlines()) < 5, said
    with pytest.raises(ValueError) as e:
        cli.open_model(str(path))
    assert any(repr(n) in str(e.value) for n in names)
    if end != "pt":  # a model that does not have the name says so
        read = {"safetensors": from_safetensors, "npz": from_npz, "h5": from_hdf5}[end]
        with pytest.raises(exchange.PackError, match="another architecture|no name"):
            read(path, nn.Linear(2, 2))
    assert not (tmp_path / "y.mz").exists() and not (tmp_path / "y.npz").exists()


# ---- depth --------------------------------------------------------------------------------------------------------
def nested(depth):
    layer = nn.Linear(4, 4)
    for _ in range(depth):
        layer = nn.Sequential(layer)
    return layer.eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.b(self.a(x).relu()) / 8


@pytest.mark.parametrize("depth", [20, 60, 140, 170, 260, 320])
def test_modules_in_modules(depth, tmp_path):
    "However deep they are nested: right, or an error that says so, and never the one of Python's limit."
    model, x = nested(depth), torch.randn(3, 4)
    path = tmp_path / "m.mz"
    for what, work in {
        "quantize": lambda: quantize_model(model, 8)(x),
        "kernels": lambda: use_kernels(quantize_model(model, 8))(x),
        "prepare": lambda: convert(prepare(model, bits=8, batches=[x]))(x),
        "prune": lambda: prune_model(model, 0.25)(x),
        "save": lambda: load(save(model, path), model)(x),
    }.items():
        try:
            y = work()
        except RecursionError:
            assert depth >= 170, what  # of the model's own call, which is as deep
            with pytest.raises(RecursionError):
                model(x)
        except ValueError as e:
            assert "nested too deeply" in str(e) and depth >= 140 or what == "save" and depth >= 60, e
        else:
            assert depth <= 170 and (y - model(x)).norm() < (1 if what == "prune" else 0.05) * model(x).norm(), what
    with contextlib.suppress(RecursionError), pytest.raises(ValueError, match="nested too deeply|no channels"):
        shrink(model, x, ratio=0.5)


@pytest.mark.hypothesis
def test_many_layers(tmp_path):
    "A hundred residual blocks, two hundred layers; three times as many in a search."
    torch.manual_seed(0)
    many = 300 if FUZZ else 100
    model, x = nn.Sequential(*(Residual() for _ in range(many))).eval(), torch.randn(3, 8)
    small, right = quantize_model(model, 8), model(x)
    assert (small(x) - right).norm() < 0.05 * right.norm()
    save(small, tmp_path / "m.mz")
    assert torch.equal(load(tmp_path / "m.mz", model)(x), small(x))
    pruned = prune_model(model, 0.5)
    assert sum(int((keep == 0).sum()) for keep in masks(pruned).values()) == many * 64
    fewer = nn.Sequential(*list(model)[:12])
    fake = convert(prepare(fewer, bits=8, batches=[x]))
    assert (fake(x) - fewer(x)).norm() < 0.05 * fewer(x).norm()
    assert shrink(fewer, x, ratio=0.5)[3].a.out_features == 4


# ---- models without numbers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: modelzip.quantize_model(m, 4),
        lambda m, x: modelzip.gptq(m, [x]),
        lambda m, x: modelzip.awq(m, [x]),
        lambda m, x: modelzip.hqq(m),
        lambda m, x: modelzip.trellis(m, [x]),
        lambda m, x: modelzip.learned_rounding(m, [x], steps=1),
        lambda m, x: modelzip.quantize_static(m, [x]),
        lambda m, x: prune_model(m, 0.5),
        lambda m, x: modelzip.factorize(m, 0.5),
        lambda m, x: modelzip.equalize(m, example=x),
        lambda m, x: prepare(m, 4),
        lambda m, x: modelzip.compress(m, [x], bytes=9999, progress=False),
        lambda m, x: modelzip.deploy(m, x),
        lambda m, x: save(m, "x.mz"),
    ],
)
def test_a_model_without_numbers_says_so(f, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to("meta")
    with pytest.raises((TypeError, ValueError), match=r"(on|device) meta|meta device"):
        f(model, torch.rand(2, 4))
