"The command `modelzip` as a shell runs it: in processes of its own, with files of every sort, good and bad."

import argparse, contextlib, io, itertools, json, os, re, shutil, signal, stat, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelzip.cli
import modelzip.deploy
from guards import share
from modelzip.archive import PackError
from modelzip.cli import COMMANDS, as_model, cli, expanded_tensors, open_model, parser, quantize_weights
from modelzip.data import LeNet5
from modelzip.exchange import to_gguf, to_safetensors
from modelzip.pack import inspect, load, read_tensor, save
from modelzip.quant import Dequantize, quantize_model
from modelzip.recipe import RECIPES
from modelzip.workshop import search


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Files of one LeNet-5 in every format that can be read."
    folder = tmp_path_factory.mktemp("cli")
    sys.modules.pop("mine", None)  # of a folder before this one, where a worker comes back to this file
    torch.manual_seed(0)
    model = LeNet5().eval()
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    save(model, folder / "own.mz")
    to_safetensors(model, folder / "own.safetensors")
    save_file(state, folder / "foreign.safetensors")
    little = LeNet5(channels=[10, 20], hidden=64).eval()
    save(little, folder / "little.mz")
    save_file({n: t.contiguous() for n, t in little.state_dict().items()}, folder / "little.safetensors")
    torch.save(state, folder / "state.pt")
    torch.save({"state_dict": state, "epoch": 3}, folder / "checkpoint.pth")
    hub = folder / "hub"
    hub.mkdir()
    names = sorted(state)
    save_file({n: state[n] for n in names[:3]}, hub / "model-00001-of-00002.safetensors")
    save_file({n: state[n] for n in names[3:]}, hub / "model-00002-of-00002.safetensors")
    index = {
        "metadata": {},
        "weight_map": {n: f"model-0000{1 + (i >= 3)}-of-00002.safetensors" for i, n in enumerate(names)},
    }
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    single = folder / "single"
    single.mkdir()
    save_file(state, single / "model.safetensors")
    (folder / "mine.py").write_text(
        "import torch\nfrom torch import nn\ndef net():\n    torch.manual_seed(1)\n    return"
        " nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))\ndef number(): return 3\n"
    )
    return folder


def run(place, line, **environment):
    "A process of its own: status, standard output, standard error."
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from modelzip.cli import cli; sys.exit(cli())", *line.split()],
        cwd=place,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "source", ["own.mz", "own.safetensors", "foreign.safetensors", "state.pt", "checkpoint.pth", "hub", "single"]
)
def test_every_source_gives_the_same_numbers(place, source, monkeypatch):
    monkeypatch.chdir(place)
    want, found = LeNet5().state_dict().keys(), open_model(source)
    own = load(place / "own.mz").state_dict()
    assert dict(found.named_parameters()).keys() == want
    assert all(torch.equal(p, own[n]) for n, p in found.named_parameters())


def test_a_process_of_its_own(place):
    status, out, err = run(place, "compress foreign.safetensors -o out.mz --bits 4 --group 32 --json --quiet")
    assert (status, err) == (0, "")
    assert json.loads(out)["bytes"] == os.path.getsize(place / "out.mz") < 431_080 * 0.6


def test_a_builder_of_ones_own(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert cli(["compress", "mine:net", "-o", "net.mz", "--bits", "8"]) == 0
    assert "times smaller" in capsys.readouterr().out
    assert (
        cli(["bench", "mine:net", "net.mz", "--input", "2x64", "--repeats", "3", "--json"]) == 2
    )  # net.mz does not say how it runs
    assert "without the code" in capsys.readouterr().err
    for wrong in "mine:number", "mine:absent", "absent:net":
        assert cli(["compress", wrong, "-o", "net.mz"]) == 2
        assert wrong in capsys.readouterr().err


OWN = """
import torch
from torch import nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.tags = nn.Embedding(100, 16), nn.Linear(16, 5)
    def forward(self, words):
        return self.tags(self.words(words))
def own():
    return Own()
def wants(n):
    return Own()
"""


@pytest.mark.parametrize("ending", ["mz", "safetensors", "npz", "h5", "pt", "hub"])
def test_a_class_of_ones_own_runs_what_a_file_holds(ending, tmp_path, monkeypatch, capsys):
    "In whatever file the weights are, compressed or not; and where it does not act, or does not fit, an error says so."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "owner", raising=False)
    Path("owner.py").write_text(OWN)
    torch.manual_seed(0)
    rows = {"words.weight": torch.randn(100, 16), "tags.weight": torch.randn(5, 16), "tags.bias": torch.randn(5)}
    source = {"hub": "hub", "pt": "plain.pt"}.get(ending, f"plain.{ending}")
    if ending == "hub":
        Path("hub").mkdir()
        save_file(rows, "hub/model.safetensors")
    elif ending == "pt":
        torch.save({"state_dict": rows}, source)
    else:
        torch.save(rows, "plain.pt")
        assert cli(["compress", "plain.pt", "-o", "plain.mz", "--bits", "8"]) == 0
        assert ending == "mz" or cli(["convert", "plain.mz", source]) == 0
    how = ["--input", "3x7:int64", "--repeats", "2"]
    capsys.readouterr()
    assert cli(["bench", source, *how]) == 2 and "--model package.module:class" in capsys.readouterr().err
    assert cli(["bench", source, "--input", "3x7", "--model", "owner:Own"]) == 2
    said = capsys.readouterr().err
    assert f"--input 3x7 does not fit {source}: " in said and "like 1x64:int64" in said
    for code in "owner:Own", "owner:own":
        assert cli(["bench", source, "owner:Own", *how, "--model", code, "--json"]) == 0
        assert [*json.loads(capsys.readouterr().out)] == [source, "owner:Own"]
    found = open_model(source, sys.modules["owner"].own)
    expanded = expanded_tensors(found)
    assert all(
        (expanded[n] - t).abs().max() < (0.05 if ending in ("mz", "safetensors", "npz", "h5") else 1e-9)
        for n, t in rows.items()
    )
    words = torch.arange(6).reshape(2, 3)
    assert (
        found(words) - nn.functional.linear(rows["words.weight"][words], rows["tags.weight"], rows["tags.bias"])
    ).abs().max() < 0.5
    for wrong, says in (
        ("owner", "--model is 'owner'"),
        ("owner:absent", "owner:absent"),
        ("owner:wants", "missing 1 required positional argument"),
        ("modelzip.data:LeNet5", "of another architecture"),
    ):
        assert cli(["bench", source, *how, "--model", wrong]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert cli(["bench", "owner:Own", *how, "--model", "owner:Own"]) == 2
    assert "--model does not act" in capsys.readouterr().err
    if ending in ("pt", "hub"):
        assert cli(["compress", source, "-o", "small.mz", "--model", "owner:Own", "--recipe", "int8", "--json"]) == 0
        assert cli(["convert", "small.mz", "small.npz", "--model", "owner:Own", "--expand"]) == 0


def test_where_no_bar_can_be_drawn_there_is_a_line_a_step(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    lines = {
        "compress little.safetensors -o steps.mz --bits 4": ["rounding to 4 bits, and writing"],
        "compress little.mz -o steps.mz --recipe int8": ["try 1: the given recipe"],
        "bench little.mz --input 1x1x28x28 --repeats 2": ["timing little.mz: 2 rounds"],
    }
    for line, steps in lines.items():
        assert cli(line.split()) == 0 and capsys.readouterr().err.splitlines() == steps
        assert cli([*line.split(), "--quiet"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert all(cli(line.split()) == 0 and capsys.readouterr().err == "" for line in lines)


def test_names_of_recipes_are_told_apart(capsys):
    assert cli(["compress", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"'{name}'" in text for name in RECIPES)


def test_targets(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(search, "DENSE", share(search.DENSE, 4))
    assert cli(["compress", "little.mz", "-o", "target.mz", "--bytes", "14000", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] <= 14_000
    load("target.mz")
    assert cli(["compress", "little.safetensors", "-o", "tree.mz", "--bytes", "14000"]) == 0
    assert os.path.getsize("tree.mz") <= 14_000
    assert cli(["compress", "little.mz", "-o", "named.mz", "--recipe", "int8"]) == 0
    capsys.readouterr()
    for line in ("--cosine 0.9", "--accuracy-loss 1", "--recipe absent", "--bytes -3"):
        before = Path("named.mz").read_bytes()
        assert cli(["compress", "little.mz", "-o", "named.mz", *line.split()]) == 2
        assert capsys.readouterr().err.startswith("modelzip: ") and Path("named.mz").read_bytes() == before


@pytest.mark.parametrize("ending", [".mz", ".safetensors", ".h5", ".npz"])
def test_there_and_back(place, ending, tmp_path):
    small = quantize_model(load(place / "own.mz"), 4, group=32)
    save(small, tmp_path / "small.mz")
    assert cli(["convert", str(tmp_path / "small.mz"), str(tmp_path / f"there{ending}")]) == 0
    assert cli(["convert", str(tmp_path / f"there{ending}"), str(tmp_path / "back.mz")]) == 0
    assert cli(["diff", str(tmp_path / "small.mz"), str(tmp_path / "back.mz")]) == 0


def test_weights_without_code_are_converted(place, tmp_path):
    tensors = {
        "cls": torch.randn(1, 1, 64),
        "block.gain": torch.randn(16, 16),
        "block.fc.weight": torch.randn(32, 16),
        "block.fc.bias": torch.randn(32),
        "count": torch.tensor(3),
    }
    save(quantize_weights(as_model(tensors), 8), tmp_path / "tree.mz")
    found = open_model(str(tmp_path / "tree.mz"))
    assert sum(isinstance(m, Dequantize) for m in found.modules()) == 3
    assert cli(["convert", str(tmp_path / "tree.mz"), str(tmp_path / "tree.safetensors"), "--expand"]) == 0
    from safetensors.torch import load_file

    back = load_file(tmp_path / "tree.safetensors")
    assert back.keys() == tensors.keys()
    for name, t in tensors.items():
        kept = read_tensor(tmp_path / "tree.mz", name)
        assert torch.equal(back[name], kept if isinstance(kept, torch.Tensor) else kept.dequantize())
        assert (back[name] - t).abs().max() < 0.05


@pytest.mark.usefixtures("read_once")
def test_onnx(place, tmp_path):
    pytest.importorskip("onnxruntime")
    model = load(place / "own.mz")
    save(quantize_model(model, 8), tmp_path / "small.mz")
    assert cli(["convert", str(tmp_path / "small.mz"), str(tmp_path / "small.onnx"), "--input", "1x1x28x28"]) == 0
    from modelzip.onnx_export import onnx_model

    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        want = model(x)
    assert (onnx_model(tmp_path / "small.onnx")(x) - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.usefixtures("read_once")
def test_engines(place, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    assert cli(["compress", str(place / "own.mz"), "-o", "small.mz", "--bits", "8"]) == 0
    capsys.readouterr()
    line = ["bench", "small.mz", "--input", "2x1x28x28", "--repeats", "6", "--engine", "onnxruntime"]
    assert cli([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["small.mz", "small.mz, onnxruntime"] and found["small.mz"]["ratio"] == 1
    assert found["small.mz, onnxruntime"]["cosine"] > 0.99
    for absent in [n for n in modelzip.cli.ENGINES if n not in ("given", "torch")]:
        monkeypatch.delitem(modelzip.cli.ENGINES, absent)

    @modelzip.deploy.register_engine("broken")
    def broken(work):
        raise RuntimeError("no such processor")

    try:
        assert cli([*line[:-1], "all"]) == 0
    finally:
        del modelzip.cli.ENGINES["broken"]
    out = capsys.readouterr().out
    assert "small.mz, torch" in out and "cosine" in out and out.endswith("small.mz, broken: no such processor\n")
    assert cli(["convert", "small.mz", "--to", "onnx", "--input", "2x1x28x28"]) == 0
    assert (tmp_path / "small.onnx").exists()
    capsys.readouterr()
    for line, said in (
        ("convert small.mz", "output is missing: name the file to write, or say --to onnx or --to openvino"),
        ("convert small.mz x.mz --to onnx", "--to onnx writes .onnx, and the output is 'x.mz'"),
        ("convert small.mz --to openvino", "an .xml file needs --input"),
        ("convert small.mz x.npz --input 2x1", "--input does not act"),
        ("convert some:where --to onnx --input 2x1", "output is missing: some:where is no file"),
    ):
        assert cli(line.split()) == 2 and said in capsys.readouterr().err, line


def test_openvino(place, tmp_path, monkeypatch, capsys):
    vino = pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    shutil.copy(place / "own.mz", "lenet.mz")
    assert cli(["convert", "lenet.mz", "--to", "openvino", "--input", "2x1x28x28"]) == 0
    assert f"{sum(p.stat().st_size for p in (Path('lenet.xml'), Path('lenet.bin'))):,} bytes" in capsys.readouterr().out
    x, net = torch.rand(3, 1, 28, 28), load("lenet.mz").eval()
    got = vino.Core().compile_model("lenet.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    assert (torch.tensor(got) - net(x)).norm() < 1e-4 * net(x).norm()
    torch.save(net.state_dict(), "own.bin")
    before = Path("own.bin").read_bytes()
    assert cli(["convert", "own.bin", "--to", "openvino", "--input", "2x1x28x28"]) == 2
    assert Path("own.bin").read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"no model at all", b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03."]
)
@pytest.mark.parametrize("ending", [".mz", ".safetensors", ".h5", ".npz", ".pt"])
def test_files_that_are_none(place, tmp_path, capsys, content, ending):
    path = tmp_path / f"bad{ending}"
    path.write_bytes(content)
    assert cli(["compress", str(path), "-o", str(tmp_path / "out.mz")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("modelzip: ") and err.count("\n") == 1 and not (tmp_path / "out.mz").exists()


def test_hostile_index(place, tmp_path, capsys):
    for text in ("{", '{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": 3}', "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert cli(["compress", str(tmp_path), "-o", str(tmp_path / "out.mz")]) == 2
        assert "model.safetensors.index.json" in capsys.readouterr().err


def test_eval_sets_a_limit(place, capsys):
    assert cli(["eval", str(place / "own.mz"), "--data", "digits"]) == 2  # LeNet-5 reads 28 × 28, these are 8 × 8
    assert "size" in capsys.readouterr().err
    assert (
        cli(["eval", str(place / "own.mz"), "--data", "mnist5k", "--json", "--at-least", "0.9"]) == 1
    )  # it is not trained
    found = json.loads(capsys.readouterr().out)
    assert 0.02 < found["accuracy"] < 0.3 and found["low"] < found["accuracy"] < found["high"] and found["n"] == 1000


def test_help_of_every_command_has_its_example(capsys):
    for name, f in COMMANDS.items():
        assert cli([name, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f.example in text and f.help.split(";")[0].lower() in text.lower()


def test_examples_are_commands_that_parse():
    from modelzip.cli import parser

    said = {name: parser().parse_args(f.example.split(">")[0].split()[1:]) for name, f in COMMANDS.items()}
    assert said["convert"].output != said["compress"].model  # pasted one after the other, they leave the original


def test_an_update_from_the_shell(place, tmp_path, monkeypatch, capsys):
    "Compressed against an older file, looked into, made whole again; and what is no base."
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    new = load(place / "little.mz")
    new.fc2.bias.data += 1
    save(new, "new.mz")
    assert cli(["compress", str(place / "little.mz"), "-o", "old4.mz", "--bits", "4", "--quiet"]) == 0
    assert cli(["compress", "new.mz", "-o", "new4.mz", "--bits", "4", "--base", "old4.mz", "--quiet"]) == 0
    assert "an update of old4.mz: both are needed" in capsys.readouterr().out
    assert os.path.getsize("new4.mz") < 1000 and inspect("new4.mz").base["name"] == "old4.mz"
    assert cli(["convert", "new4.mz", "whole.mz"]) == 0 and inspect("whole.mz").base is None
    assert cli(["diff", "new4.mz", "whole.mz"]) == 0 and cli(["inspect", "new4.mz"]) == 0
    assert "an update of old4.mz" in capsys.readouterr().out
    assert cli(["inspect", "new4.mz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == inspect("new4.mz").base
    assert cli(["compress", "new.mz", "-o", "old4.mz", "--bits", "4", "--base", "old4.mz", "--quiet"]) == 2
    assert "cannot take the place of" in capsys.readouterr().err
    os.remove("old4.mz")
    assert cli(["inspect", "new4.mz"]) == 0 and cli(["inspect", "new4.mz", "--entropy"]) == 2  # the table is its own
    assert "it is an update of 'old4.mz'" in capsys.readouterr().err


def test_colours_on_a_terminal_alone(place, monkeypatch, capsys):
    assert not modelzip.cli._colours()
    monkeypatch.setattr("modelzip.cli._colours", lambda: True)
    assert cli(["inspect", str(place / "own.mz")]) == 0
    assert "\033[1m" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough(place):
    line = f'{sys.executable} -c "import sys; from modelzip.cli import cli; sys.exit(cli())" inspect own.mz | head -1'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=place,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("own.mz")


def test_completion(capsys):
    pytest.importorskip("shtab")
    for shell in "bash", "zsh", "tcsh":
        assert cli(["completion", shell]) == 0
        assert "compress" in capsys.readouterr().out
    done = subprocess.run(["bash", "-n"], input="", text=True)
    assert done.returncode == 0


# --- right, or refused


class Mine(nn.Module):
    "Whose architecture nobody has registered."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    "A compressed model of unknown code, in every format."
    from modelzip.exchange import to_hdf5, to_npz

    folder = tmp_path_factory.mktemp("coded")
    torch.manual_seed(0)
    small = quantize_model(Mine().eval(), 4, group=16)
    for name, write in ("mz", save), ("safetensors", to_safetensors), ("npz", to_npz), ("h5", to_hdf5):
        write(small, folder / f"coded.{name}")
    plain = Mine().eval()
    for name, write in ("npz", to_npz), ("h5", to_hdf5), ("safetensors", to_safetensors):
        write(plain, folder / f"plain.{name}")
    return folder, small, plain


@pytest.mark.parametrize("ending", ["mz", "safetensors", "npz", "h5"])
def test_codes_are_no_weights(coded, ending, monkeypatch, capsys, tmp_path):
    folder, small, plain = coded
    monkeypatch.chdir(tmp_path)
    found, want = open_model(str(folder / f"coded.{ending}")), Mine().state_dict().keys()
    values = expanded_tensors(found)
    assert values.keys() == want
    assert all(torch.equal(values[n], expanded_tensors(small)[n]) for n in want)
    assert (
        cli(["compress", str(folder / f"coded.{ending}"), "-o", "twice.mz"]) == 2
        and "compressed already" in capsys.readouterr().err
        and not Path("twice.mz").exists()
    )
    assert cli(["convert", str(folder / f"coded.{ending}"), "floats.safetensors", "--expand"]) == 0
    from safetensors.torch import load_file

    floats = load_file("floats.safetensors")
    assert floats.keys() == want and all(torch.equal(floats[n], values[n]) for n in want)
    assert cli(["convert", str(folder / f"coded.{ending}"), "same.npz"]) == 0
    again = expanded_tensors(open_model("same.npz"))
    assert all(torch.equal(again[n], values[n]) for n in want)


@pytest.mark.parametrize("ending", ["npz", "h5", "safetensors"])
def test_what_convert_wrote_without_code_is_read(coded, ending):
    folder, _, plain = coded
    found = dict(open_model(str(folder / f"plain.{ending}")).named_parameters())
    assert all(torch.equal(found[n], p) for n, p in plain.named_parameters())


@pytest.mark.parametrize(
    "line, says",
    [
        ("compress own.mz -o x.mz --bytes 200000 --bits 3", "--bits does not act"),
        ("compress own.mz -o x.mz --bytes 200000 --group 16", "--group does not act"),
        ("compress own.mz -o x.mz --recipe 4-bit --mapped", "--mapped does not act"),
        ("compress own.mz -o x.mz --bytes 200000 --codebook nf4", "--codebook does not act"),
        ("compress own.mz -o x.mz --recipe 4-bit --asymmetric", "--asymmetric does not act"),
        ("compress own.mz -o x.mz --recipe 4-bit --observer minmax", "--observer does not act"),
        ("compress foreign.safetensors -o x.mz --codebook kmeans --asymmetric", "--asymmetric does not act"),
        ("compress foreign.safetensors -o x.mz --trellis", "--trellis does not act"),
        ("compress own.mz -o x.mz --milliseconds 9 --data digits --trellis", "--trellis does not act"),
        ("compress own.mz -o x.mz --recipe 4-bit --trellis", "--trellis does not act"),
        ("compress foreign.safetensors -o x.mz --codebook kmeans --observer minmax", "--observer does not act"),
        ("compress foreign.safetensors -o x.mz --codebook nf4 --bits 3", "nf4 has 4 bits"),
        ("compress foreign.safetensors -o x.mz --codebook nf4 --bytes 300000", "nf4 always has 4"),
        ("compress foreign.safetensors -o x.mz --seed 3", "--seed does not act"),
        ("compress foreign.safetensors -o x.mz --data digits", "--data does not act"),
        ("compress own.mz -o own.mz", "is the input"),
        ("compress state.pt -o ./state.pt", "is the input"),
        ("compress own.mz -o x.pt", "ends in '.pt'"),
        ("compress own.mz -o x.safetensors", "ends in '.safetensors'"),
        ("convert own.mz own.mz", "is the input"),
        ("convert own.mz x.safetensors --input 1x1x28x28", "--input does not act"),
        ("compress sys:exit -o x.mz", "ends the program"),
        ("compress os:getcwd -o x.mz", "returns a str"),
        ("eval own.mz --data digits --at-least nan", "may be a share"),
        ("eval own.mz --data digits --at-least 94", "may be a share"),
        ("eval own.mz --data digits --at-least -1", "may be a share"),
        ("compress hub -o hub/model-00001-of-00002.safetensors", "is the input"),
        ("convert hub hub/model-00001-of-00002.safetensors", "is the input"),
        ("convert single single/model.safetensors", "is the input"),
        ("compress mine:net -o source.mz", "is the input"),
        ("compress own.mz -o recipe.mz --recipe recipe.mz", "is the input"),
        ("compress state.pt -o hard.mz", "is the input"),
        ("compress own.mz -o x.zzz", "ends in '.zzz'"),
        ("compress own.mz -o x", "ends in ''"),
        ("compress own.mz -o ", "ends in ''"),
        ("compress own.mz -o x.mz --bits 0", "bits is 0"),
        ("compress own.mz -o x.mz --recipe 4-bit --seed 3", "--seed does not act"),
        ("compress own.mz -o x.mz --bits 3 --bits 4", "--bits is there twice"),
        ("convert own.mz x.safetensors --expand", "--expand does not act"),
        ("convert foreign.safetensors x.npz --expand", "--expand does not act"),
        ("bench own.mz --input 1x1x28x28 --kernels", "--kernels does not act"),
        ("eval own.mz --data mnist5k --kernels", "--kernels does not act"),
        ("bench own.mz --input 9999999999999999999x1", "no such tensor"),
        ("bench own.mz own.mz --input 1x1x28x28", "there twice"),
        ("bench own.mz --input 1x1x28x28 --threads 0", "--threads is 0"),
    ],
)
def test_what_would_not_act_is_refused(place, line, says, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if not os.path.exists("hard.mz"):
        os.link("state.pt", "hard.mz")
        os.symlink("mine.py", "source.mz")
        Path("recipe.mz").write_text(RECIPES["4-bit"].to_json())
    files = lambda: {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    before = files()
    assert cli(line.split(" ")) == 2
    assert says in capsys.readouterr().err
    assert files() == before


def test_numbers_that_no_machine_has(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for line, says in (
        ("bench own.mz --input 1x1x28x28 --threads 100000", "--threads is 100000; it may be 1 to 1024"),
        ("bench own.mz --input 1x1x28x28 --threads 0", "--threads is 0; it may be 1 to 1024"),
    ):
        assert cli(line.split()) == 2 and says in capsys.readouterr().err


def test_an_empty_recipe_is_no_missing_one(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    assert cli(["compress", "mine:net", "-o", str(tmp_path / "x.mz"), "--recipe", ""]) == 2
    assert capsys.readouterr().err.startswith("modelzip: ") and not (tmp_path / "x.mz").exists()


def test_an_empty_name_is_no_folder(place, monkeypatch, capsys):
    monkeypatch.chdir(place / "single")
    assert cli(["compress", "", "-o", "x.mz"]) == 2 and not Path("x.mz").exists()


def test_the_codebook_says_its_bits(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert cli(["compress", "foreign.safetensors", "-o", "nf4.mz", "--codebook", "nf4"]) == 0
    assert capsys.readouterr().out.startswith("4 bits")
    assert cli(["compress", "own.mz", "-o", "four.mz", "--recipe", "4-bit", "--quiet"]) == 0
    assert "int8" not in (out := capsys.readouterr().out).splitlines()[0] and "the given recipe" in out.splitlines()[0]


def test_no_option_is_taken_for_another(capsys):
    "Each of each command with its last letter missing."
    seen = 0
    for name, p in parser()._subparsers._group_actions[0].choices.items():
        for option in p._option_string_actions:
            if option.startswith("--") and option[:-1] not in p._option_string_actions:
                seen += 1
                assert cli([name, "x", f"{option[:-1]}=1"]) == 2
                assert capsys.readouterr().err.startswith(f"modelzip: there is no {option[:-1]}; did you mean --")
    assert seen > 50


def test_a_misspelt_command_is_named(capsys):
    for name in COMMANDS:
        assert cli([name[:-1], "x"]) == 2
        assert f"there is no {name[:-1]}; did you mean {name}?" in capsys.readouterr().err


def test_a_number_out_of_range_is_refused_before_anything_is_done(place, monkeypatch, capsys):
    "Each number of each command: nothing is announced, read or written."
    monkeypatch.chdir(place)
    beyond = {"bits": ["0", "17", "2.5"], "threads": ["0", "1025"], "seed": [str(2**64), "one"]}
    seen, before = 0, {p: p.stat().st_mtime_ns for p in place.rglob("*")}
    for name, p in parser()._subparsers._group_actions[0].choices.items():
        for action in p._actions:
            assert action.type not in (int, float), action.dest  # what these are of knows what it may be
            if action.type is None:
                continue
            option, needed = action.option_strings[0], [a for a in p._actions if a.required]
            rest = [w for a in needed for w in (*a.option_strings[-1:], (a.choices or ["own.mz"])[0])]
            for value in beyond.get(action.dest, ["-1", "nan", "-inf", "x"]):
                assert cli([name, f"{option}={value}", *rest]) == 2
                out, err = capsys.readouterr()
                assert not out and err.startswith(f"modelzip: {option} is {value}; it may be "), err
                seen += 1
    assert seen > 30 and before == {p: p.stat().st_mtime_ns for p in place.rglob("*")}


def test_an_update_is_written_beside_its_base(place, tmp_path, monkeypatch, capsys):
    "No command is told where else the base is, so a file that none could read is not written."
    monkeypatch.chdir(tmp_path)
    whole = ["compress", str(place / "own.mz"), "-o", "a.mz", "--bits", "4", "--quiet"]
    assert cli(whole) == 0
    os.mkdir("d")
    line = [*whole[:3], "d/x.mz", *whole[4:], "--base", "a.mz"]
    assert cli(line) == 2 and not os.listdir("d")
    assert "an update finds its base beside itself: copy it to d/a.mz first" in capsys.readouterr().err
    os.symlink("d/x.mz", "link.mz")
    line[3] = "link.mz"  # which lies beside the base, and the file does not
    assert cli(line) == 2 and not os.listdir("d") and "copy it to" in capsys.readouterr().err
    os.link("a.mz", "d/a.mz")
    assert cli(line) == 0 and os.path.islink("link.mz")
    os.remove("a.mz")  # beside the link: there is the other one
    for name in "link.mz", "d/x.mz":
        assert cli(["inspect", name]) == 0 and "update of a.mz" in capsys.readouterr().out


def test_a_whole_model_of_pytorch_says_how_it_becomes_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Linear(3, 3), "whole.pt")
    says = "modelzip.save(torch.load(path, weights_only=False), 'model.mz', example=…)"
    with pytest.raises(PackError, match=re.escape(says)):
        load("whole.pt")
    assert cli(["compress", "whole.pt", "-o", "x.mz"]) == 2 and not os.path.exists("x.mz")
    assert says in capsys.readouterr().err


def test_what_is_no_file_of_ours_says_what_reads_it(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = {"a.weight": torch.rand(4, 4)}
    torch.save(weights, "m.pt")
    torch.save(weights, "m.pth", _use_new_zipfile_serialization=False)
    for ending in "safetensors", "npz", "h5":
        assert cli(["convert", str(place / "little.safetensors"), f"m.{ending}"]) == 0
    to_gguf(weights, "m.gguf")
    for name, reader in {
        "m.safetensors": "modelzip.from_safetensors",
        "m.npz": "modelzip.from_npz",
        "m.h5": "modelzip.from_hdf5",
        "m.gguf": "modelzip.from_gguf",
        "m.pt": "torch.load",
        "m.pth": "torch.load",
    }.items():
        for f in load, inspect, lambda path: read_tensor(path, "a.weight"):
            with pytest.raises(PackError, match=f"{reader} reads it; in a shell, `modelzip convert`"):
                f(name)
        capsys.readouterr()
        assert cli(["run", name, "x.npy"]) == 2 and reader in capsys.readouterr().err
        assert cli(["convert", name, "back.mz"]) == 0


def test_what_names_no_model_says_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tagging.py").write_text("from torch import nn\nclass Tagger(nn.Linear): ...\n")
    (tmp_path / "lacking.py").write_text("import no_such_module\n")
    (tmp_path / "many.py").write_text("".join(f"def f{i}(): ...\n" for i in range(300)))
    for what, says in {
        "tagger:Tagger": "there is no module tagger, neither in ",
        "tagging:Taggr": "tagging has no 'Taggr'; did you mean Tagger?",
        "tagging:Other": "tagging has no 'Other'; it has Tagger",
        "lacking:Tagger": "No module named 'no_such_module' (lacking.py, line 1)",
        "many:Other": "many has no 'Other'; it has f0, f1, f2, f3, f4, f5, f6, f7, …",
    }.items():
        assert cli(["bench", what, "--input", "1x4"]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1 and "frozen" not in err, err
    for what in "tagging", ":Tagger", "tagging:", ".tagging:Tagger":
        assert cli(["compress", "no.pt", "-o", "x.mz", "--bits", "4", "--model", what]) == 2
        assert f"--model is {what!r}; it may be package.module:class" in capsys.readouterr().err


def test_run_says_what_it_needs_before_it_computes(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

    save(Own(), "own.mz")
    np.save("x.npy", np.zeros((1, 4), np.float32))
    assert cli(["run", "own.mz", "x.npy"]) == 2
    assert "own.mz holds no graph; in Python, save(model, path, example=...) writes one" in capsys.readouterr().err
    assert cli(["run", "absent.mz", "x.npy", "-o", "no/y.npy"]) == 2
    assert "The folder to save into does not exist; make it first" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["compress {} -o {}.mz", "convert {} {}.mz", "convert {} {}.npz", "convert {} {}.h5"])
def test_where_nothing_can_be_written_is_said_before_anything_is_done(place, tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    source, ending = place / "little.safetensors", line.rpartition(".")[2]
    (tmp_path / f"folder.{ending}").mkdir()
    (tmp_path / f"full.{ending}").symlink_to("/dev/full")
    (tmp_path / f"loop.{ending}").symlink_to(f"loop.{ending}")
    os.mkfifo(tmp_path / f"pipe.{ending}")
    for name, says in (
        ("folder", "over a folder"),
        ("full", "not a regular file"),
        ("pipe", "not a regular file"),
        ("loop", "symbolic links"),
        ("no/such", "folder to save into does not exist"),
    ):
        assert cli(line.format(source, name).split()) == 2
        out, err = capsys.readouterr()
        assert out == "" and says.lower() in err.lower() and err.count("\n") == 1, (name, err)
    assert sorted(p.name.partition(".")[0] for p in tmp_path.iterdir()) == ["folder", "full", "loop", "pipe"]


@pytest.mark.parametrize("name", ["a b", "a\nb", "-x", "\033[31m", "\u202e", "\udcff", "%s{}", "'\"`$(x)"])
def test_odd_names_are_written_and_said_on_a_line(place, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert cli(["compress", str(place / "little.safetensors"), f"--output={name}.mz", "--quiet"]) == 0
    assert cli(["convert", "--", f"{name}.mz", f"{name}.npz"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3 and all(c.isprintable() for l in out.splitlines() for c in l), out
    assert sorted(os.listdir(".")) == [f"{name}.mz", f"{name}.npz"]


def test_a_folder_has_no_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.v1").mkdir()
    for model in "model.v1", "model.v1/", "./model.v1//":
        said = argparse.Namespace(model=model, output=None, to="onnx")
        assert os.path.normpath(modelzip.cli._output_of(said)) == "model.v1.onnx"


def test_force_writes_over_the_input(place, tmp_path, capsys):
    state = {n: t.contiguous() for n, t in LeNet5().state_dict().items()}
    torch.save(state, tmp_path / "m.mz.pt")
    save(LeNet5(), tmp_path / "m.mz")
    assert cli(["compress", str(tmp_path / "m.mz"), "-o", str(tmp_path / "m.mz"), "--force"]) == 0


RIVALS = {
    "bits": ["3"],
    "group": ["8"],
    "codebook": ["kmeans"],
    "asymmetric": [],
    "observer": ["minmax"],
    "mapped": [],
    "base": ["own.mz"],
    "bytes": ["2000"],
    "cosine": [".9"],
    "accuracy-loss": ["5"],
    "milliseconds": ["9"],
    "data": ["digits"],
    "recipe": ["4-bit"],
    "seed": ["3"],
    "trellis": [],
}
ROUNDING, TARGETS = (
    {"bits", "group", "codebook", "asymmetric", "observer", "mapped", "base"},
    {"cosine", "accuracy-loss", "milliseconds", "recipe"},
)


@pytest.mark.parametrize("source", ["mine:net", "little.safetensors"])
def test_pairs_of_options(place, source, monkeypatch, capsys, tmp_path):
    """Every pair of options of compress: both act, or one is refused by name. (Nothing is searched for: that both
    are let through is enough.)"""
    monkeypatch.chdir(place)
    os.link("own.mz", tmp_path / "own.mz")  # an update is written beside its base
    monkeypatch.setattr("modelzip.cli._by_bits", lambda model, o: save(model, o.output) and "")
    monkeypatch.setattr("modelzip.cli._by_target", lambda model, o: save(model, o.output) and "")
    written = lambda found, tied, o: Path(o.output).write_bytes(b"x") and ("", 1)
    monkeypatch.setattr("modelzip.cli._tensor_by_tensor", written)
    known = source == "mine:net"
    for a, b in itertools.combinations(RIVALS, 2):
        status = cli(
            ["compress", source, "-o", str(tmp_path / "x.mz"), *sum(([f"--{k}", *RIVALS[k]] for k in (a, b)), [])]
        )
        searched = {a, b} & TARGETS or known and "bytes" in (a, b)
        idle = (
            searched
            and {a, b} & ROUNDING
            or not searched
            and {a, b} & {"data", "seed", "trellis"}
            or "trellis" in (a, b)
            and not {a, b} & {"bytes", "cosine", "accuracy-loss"}
            or {"recipe", "seed"} == {a, b}
            or "codebook" in (a, b)
            and {a, b} & {"asymmetric", "observer"}
        )
        assert (status, bool(idle)) in ((0, False), (2, True)), (a, b)
        err = capsys.readouterr().err
        assert not idle or any(f"--{k}" in err for k in (a, b)), err


def test_a_shared_storage_is_stored_once(tmp_path, monkeypatch, capsys):
    "What is the same tensor is one; views that are turned, cut or spread out keep their own values."
    monkeypatch.chdir(tmp_path)
    w = torch.randn(64, 64)
    state = {
        "a.weight": w,
        "b.weight": w,
        "c.weight": w.view(64, 64),
        "turned.weight": w.t(),
        "head.weight": w[:40],
        "tail.weight": w[20:],
        "flat.weight": w.view(32, 128),
        "wide.weight": w[:1].expand(8, 64),
    }
    torch.save(state, "m.pt")
    once = 4 * sum(state[n].numel() for n in state if n[0] not in "bc" or n[1] != ".")
    for path in "c.mz", "c.npz", "c.h5", "c.safetensors":
        assert cli(["convert", "m.pt", path]) == 0 and os.path.getsize(path) < once + 5000
        assert all(torch.equal(expanded_tensors(open_model(path))[n], t) for n, t in state.items())
    assert (
        cli(["compress", "m.pt", "-o", "q.mz"]) == 0
        and [l.kind for l in inspect("q.mz").lines].count("= a.weight") == 2
    )
    small = expanded_tensors(open_model("q.mz"))
    assert all((small[n] - t).abs().max() < 0.05 for n, t in state.items())
    for there in "q.safetensors", "q.h5", "q.npz":
        assert (
            cli(["convert", "q.mz", there])
            == cli(["convert", there, "back.mz"])
            == cli(["diff", "q.mz", "back.mz"])
            == 0
        )
    assert cli(["convert", "q.mz", "e.safetensors", "--expand"]) == 0 and os.path.getsize("e.safetensors") < once + 5000


class Strided(Mine):
    "Whose layers are not what their class makes."

    def __init__(self, stride=1, eps=1e-5):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3, stride=stride), nn.BatchNorm1d(4, eps=eps)

    def forward(self, x):
        return super().forward(self.norm(self.conv(x)).flatten(1)[:, :64])


@pytest.mark.parametrize("ending", ["mz", "safetensors", "npz", "h5"])
def test_what_a_file_says_goes_along(tmp_path, ending, monkeypatch):
    "Converted without its code, and twice: strides, eps, integer layers, ties and info arrive, or the file is refused."
    from modelzip.exchange import from_hdf5, from_npz, from_safetensors
    from modelzip.kernels import use_kernels
    from modelzip.qat import convert, prepare

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    m, x = Strided(2, 0.5).eval(), torch.randn(3, 1, 80)
    read = {"mz": load, "safetensors": from_safetensors, "npz": from_npz, "h5": from_hdf5}[ending]
    for q in m, quantize_model(m, 4, group=8), use_kernels(quantize_model(m, 8)), convert(prepare(m, 8, batches=[x])):
        save(q, "a.mz", note={"x": [1]})
        assert (
            cli(["convert", "a.mz", f"b.{ending}"])
            == cli(["convert", f"b.{ending}", "c.mz"])
            == cli(["diff", "a.mz", "c.mz"])
            == 0
        )
        with torch.no_grad():
            assert all(torch.equal(r(p, Strided())(x), q(x)) for r, p in ((read, f"b.{ending}"), (load, "c.mz")))
    assert cli(["convert", "a.mz", "e.npz", "--expand"]) == cli(["compress", "e.npz", "-o", "d.mz"]) == 0
    assert load("d.mz", Strided()).conv.stride == (2,)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda hub, w: save_file({"more": torch.ones(2), "fc2.weight": torch.ones(3)}, hub / "b.safetensors"),
            "does not list",
        ),
        (lambda hub, w: w.update({"fc9.weight": "b.safetensors"}), "lacks 'fc9.weight'"),
        (lambda hub, w: w.update({"fc9.weight": "c.safetensors"}), "c.safetensors"),
        (
            lambda hub, w: save_file(
                {"fc1.weight": torch.zeros(2)} | {"fc2.weight": torch.ones(3)}, hub / "b.safetensors"
            ),
            "says is in a.safetensors",
        ),
        *[
            (lambda hub, w, bad=bad: w.update({"x": bad}), "no file beside it")
            for bad in (
                "../a.safetensors",
                "..",
                "",
                ".",
                "/etc/a.safetensors",
                "sub/a.safetensors",
                "c:\\a.safetensors",
                "a\0.safetensors",
                3,
                None,
                ["a.safetensors"],
            )
        ],
        (lambda hub, w: (hub / "model.safetensors").write_bytes(b""), "which of them"),
        (lambda hub, w: to_safetensors(Mine(), hub / "b.safetensors"), "whole model"),
        (lambda hub, w: (hub / "b.safetensors").write_bytes(b"version https://git-lfs"), "b.safetensors"),
    ],
)
def test_the_index_decides(tmp_path, change, says):
    save_file({"fc1.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"fc2.weight": torch.ones(3)}, tmp_path / "b.safetensors")
    where = {"fc1.weight": "a.safetensors", "fc2.weight": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert dict(open_model(str(tmp_path)).named_parameters()).keys() == where.keys()
    change(tmp_path, where)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises((ValueError, OSError, PackError), match=says):
        open_model(str(tmp_path))


# --- whatever the file, wherever the output, whenever the interrupt

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid"
    b" sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def spoil(path, good, kind):
    "Put a bad file of some kind at a path."
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "nowhere":
        path.symlink_to(path.parent / "absent")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "unreadable":
        path.write_bytes(good)
        path.chmod(0)
    elif kind != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "text": b"no model at all, but a letter to somebody\n" * 9,
                "cut": good[: len(good) // 2],
                "pointer": POINTER,
                "zip": b"PK\3\4" + bytes(99),
            }[kind]
        )


@contextlib.contextmanager
def within(seconds):
    def late(*_):
        raise AssertionError(f"it has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "kind",
    ["missing", "empty", "text", "cut", "zip", "pointer", "folder", "FIFO", "device", "nowhere", "loop", "unreadable"],
)
def test_every_command_with_every_bad_file(coded, place, kind, tmp_path, monkeypatch, capsys):
    "One line, status 2, nothing written, nobody waits for ever."
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    monkeypatch.chdir(tmp_path)
    good, (folder, _, _) = str(place / "own.mz"), coded
    sources = [
        folder / "plain.npz",
        folder / "plain.h5",
        place / "foreign.safetensors",
        place / "state.pt",
        place / "own.mz",
    ]
    for source in sources:
        spoil(Path(f"bad{source.suffix}"), source.read_bytes(), kind)
    spoil(Path("bad.json"), b'{"seed": 0, "steps": ["convert"]}', kind)
    hub = Path("hub")
    hub.mkdir()
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    spoil(hub / "part.safetensors", (place / "foreign.safetensors").read_bytes(), kind)
    models = [f"bad{s.suffix}" for s in sources] + ["hub"]
    lines = [
        [*words, *more]
        for m in models
        for words, more in ((["compress", m], ["-o", "out.mz"]), (["convert", m], ["out.npz"]))
    ]
    lines += [
        ["bench", "bad.mz", "--input", "1x1x28x28"],
        ["eval", "bad.mz", "--data", "mnist5k"],
        ["inspect", "bad.mz", "--entropy"],
        ["diff", "bad.mz", good],
        ["diff", good, "bad.mz"],
        ["compress", good, "-o", "out.mz", "--recipe", "bad.json"],
    ]
    for line in lines:
        with within(30):
            assert cli(line) == 2, line
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("modelzip: ") and err.count("\n") == 1 and len(err) < 600, (line, err)
        assert any(name in err for name in ("bad.", "part.safetensors")), (line, err)
        assert kind != "pointer" or "pointer of Git LFS" in err, (line, err)
    assert not any(Path(p).exists() for p in ("out.mz", "out.npz"))


def written(line, out, err=None):
    "Status and what stands on standard error."
    err = err or io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return cli(line.split()), err.getvalue()


def test_outputs_of_every_sort(place, monkeypatch):
    monkeypatch.chdir(place)
    for line in ("inspect own.mz", "inspect own.mz --json", "--help", "compress --help", "--version"):
        raw = io.BytesIO()
        plain = io.TextIOWrapper(raw, encoding="ascii")
        assert written(line, plain) == (0, "") and raw.getvalue().isascii()
        if "json" in line:
            assert json.loads(raw.getvalue())["bytes"] == os.path.getsize("own.mz")
        with open("/dev/full", "w") as full:
            status, err = written(line, full)
        assert (status, err) == (2, "modelzip: standard output: No space left on device\n")
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            assert written(line, pipe) == (0, "")  # and closing it is silent
        if "--" not in line:
            assert written(line, None) == (2, "modelzip: standard output is closed\n")
    for nobody in open("/dev/full", "w"), open(os.devnull, "w"):
        with nobody, contextlib.redirect_stderr(nobody):
            assert cli(["inspect", "absent.mz"]) == 2
    with contextlib.redirect_stderr(None):
        assert cli(["inspect", "absent.mz"]) == 2
    odd = "a\nb\033[31m\udcff.mz"
    status, err = written("inspect x", io.StringIO())
    with contextlib.redirect_stderr(said := io.StringIO()):
        assert cli(["inspect", odd]) == 2
    assert said.getvalue() == "modelzip: a b\\x1b[31m\\udcff.mz: No such file or directory\n"


@pytest.mark.parametrize(
    "error, status, says",
    [
        ("KeyboardInterrupt()", 130, "interrupted"),
        ("MemoryError()", 2, "not enough memory"),
        ("SystemExit(3)", 2, "ends the program"),
        ("ZeroDivisionError('zero')", 2, "ZeroDivisionError: zero (broken.py, line 4)"),
        ("AssertionError()", 2, "AssertionError"),
    ],
)
def test_what_a_builder_raises(tmp_path, monkeypatch, capsys, error, status, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    where = "    " if "Zero" in error else ""
    Path("broken.py").write_text(
        f"import torch\n\ndef net():\n    {'raise ' + error if where else 'pass'}\n"
        + ("" if where else f"raise {error}\n")
    )
    assert cli(["compress", "broken:net", "-o", "x.mz"]) == status
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


HEARD = "".join(  # whatever the suite itself ignores, as a job in the background does, a child starts like any program
    f"signal.signal(signal.{name}, signal.{how}); "
    for name, how in (("SIGINT", "default_int_handler"), ("SIGTERM", "SIG_DFL"), ("SIGHUP", "SIG_DFL"))
)


def test_interrupted_while_it_is_imported(place):
    code = (
        f"import os, signal, sys, threading; {HEARD}from modelzip.workshop.terminal import main;"
        " threading.Timer(.2, os.kill, (os.getpid(), signal.SIGINT)).start(); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "own.mz"],
        cwd=place,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "modelzip: interrupted\n")


def test_ended_while_it_writes(place, tmp_path):
    """The old file stays, nothing lies beside it, and the status says which signal it was. (One process imports, and
    has a child for each signal.)"""
    signals = {"SIGTERM": "terminated", "SIGHUP": "closed"}
    code = f"""if True:
        import os, signal, sys, time
        {HEARD}
        from modelzip.workshop.terminal import main
        import modelzip.cli
        def slow(*_):
            print(os.getpid(), flush=True)
            for _ in range(600): time.sleep(.1)  # a signal just before one long sleep would wait for its end
        os.fsync = slow
        for name in {[*signals]}:
            if not os.fork():
                os.chdir(name)
                os.environ["TMPDIR"] = os.path.abspath("temporary")
                os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)
                sys.exit(main())
            print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)"""
    for name in signals:
        (tmp_path / name / "temporary").mkdir(parents=True)
        (tmp_path / name / "out.mz").write_bytes(b"before")
    with subprocess.Popen(
        [sys.executable, "-c", code, "compress", str(place / "state.pt"), "-o", "out.mz", "--quiet"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as run:
        for name, says in signals.items():
            number = getattr(signal, name)
            os.kill(int(run.stdout.readline()), number)
            assert run.stdout.readline() == f"{128 + number}\n"
            folder = tmp_path / name
            err = (folder / "err").read_text()
            assert says in err and err.count("\n") == 1
            assert (folder / "out.mz").read_bytes() == b"before" and not any((folder / "temporary").iterdir())
            assert sorted(p.name for p in folder.iterdir()) == ["err", "out.mz", "temporary"]
    assert run.returncode == 0


def test_float8_stays_and_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.randn(8, 8), "b": torch.randn(8, 8).to(torch.float8_e4m3fn), "c": torch.ones(8)}
    save_file(state, "mixed.safetensors")
    assert cli(["compress", "mixed.safetensors", "-o", "x.mz"]) == 0
    assert "left as they are: b (float8_e4m3fn)" in capsys.readouterr().out
    assert torch.equal(read_tensor("x.mz", "b").view(torch.uint8), state["b"].view(torch.uint8)) and torch.equal(
        read_tensor("x.mz", "c"), state["c"]
    )


def test_a_state_dict_among_other_things(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state, rest = (
        {"a.weight": torch.randn(8, 8)},
        {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 0.1}]}},
    )
    for key in "model", "model_state_dict", "state_dict":
        torch.save({key: state, **rest}, "c.pt")
        assert torch.equal(dict(open_model("c.pt").named_parameters())["a.weight"], state["a.weight"])
    for odd in (
        torch.eye(4).to_sparse(),
        torch.ones(4, 4, device="meta"),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ):
        torch.save({"odd": odd}, "c.pt")
        assert cli(["compress", "c.pt", "-o", "x.mz"]) == 2 and (
            ("'odd', which is no dense" in (err := capsys.readouterr().err)) or "without running code" in err
        )
    torch.save({".".join("a" * 3000): torch.ones(4, 4)}, "c.pt")
    assert cli(["compress", "c.pt", "-o", "x.mz"]) == 2 and "a name in 3,000 parts" in capsys.readouterr().err
    torch.save({"model": state, "ema": state, **rest}, "c.pt")
    assert cli(["compress", "c.pt", "-o", "x.mz"]) == 2 and "'model', 'ema'" in capsys.readouterr().err


def test_an_old_checkpoint_is_read_and_not_unpickled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = {"a.weight": torch.randn(8, 8), "a.bias": torch.randn(8)}
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    assert all(torch.equal(p, state[n]) for n, p in open_model("old.pth").named_parameters())
    torch.save({"w": nn.Linear(2, 2)}, "code.pth", _use_new_zipfile_serialization=False)
    assert cli(["compress", "code.pth", "-o", "x.mz"]) == 2 and "without running code" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
def test_a_replaced_file_keeps_its_owner(tmp_path):
    from modelzip.measure import write_whole

    for name, write in (
        ("m.mz", lambda p: save(nn.Linear(2, 2), p)),
        ("t.safetensors", lambda p: to_safetensors(nn.Linear(2, 2), p)),
        ("r.html", lambda p: write_whole(p, "text")),
    ):
        path, link = tmp_path / name, tmp_path / f"link-{name}"
        path.write_bytes(b"before")
        os.chown(path, 1234, 2345)
        path.chmod(0o640)
        link.symlink_to(path)
        write(link)
        now = path.stat()
        assert (
            (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (1234, 2345, 0o640)
            and link.is_symlink()
            and path.read_bytes() != b"before"
        )


def test_the_tour_says_what_it_does_where_no_bar_can_be_drawn(monkeypatch, capsys, tmp_path):
    from modelzip import tour
    from modelzip.data import Data, Split

    few = Split(torch.rand(4, 1, 28, 28), torch.arange(4))
    monkeypatch.setattr(tour, "mnist5k", lambda: Data(few, few, few))
    monkeypatch.setattr(tour, "train", lambda model, *args, **kwargs: model.eval())
    monkeypatch.setattr(
        tour, "TECHNIQUES", {n: tour.TECHNIQUES[n] for n in ("float32, entropy-coded", "8-bit weights, per channel")}
    )
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    tour.tour(tmp_path, repeats=2)
    assert capsys.readouterr().err.splitlines() == [
        "training LeNet-5",
        "compressing 1/2: float32, entropy-coded",
        "compressing 2/2: 8-bit weights, per channel",
        "measuring 1/3: fp32",
        "measuring 2/3: float32, entropy-coded",
        "measuring 3/3: 8-bit weights, per channel",
    ]
    tour.tour(tmp_path, repeats=2, progress=False, techniques=["float32, entropy-coded"])
    assert capsys.readouterr().err == ""
