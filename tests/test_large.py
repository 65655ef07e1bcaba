"""Models larger than memory: the same file as from memory, in bounded memory, whole or not at all, and by many
workers."""

import json, os, signal, subprocess, sys, textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelzip.cli import cli, quantize_weights, weights_in
from modelzip.pack import diff, inspect, save
from modelzip.quant import MSE
from modelzip.workshop import bites, out_of_core
from modelzip.workshop.out_of_core import compress_shards, compress_weights
from modelzip.workshop.weights import as_model
from test_recipe import processes


def some_tensors():
    "Of every sort that is rounded, left alone, sliced, or decides for all (scales too small for 16 bits in one slice)."
    dice = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=dice)
    return {
        "a.u": normal(70, 37),
        "a.v": normal(33, 4, 3, 3).half(),
        "a.bias": normal(9),
        "b.w": normal(129, 64).bfloat16(),
        "b.b": normal(300),
        "b.c.x": (normal(50, 40) * 9).long(),
        "mixed": torch.cat([normal(64, 64) * 1e-6, normal(64, 64)]),
        "wide": normal(40, 40).double(),
        "eight": normal(40, 40).to(torch.float8_e4m3fn),
        "mask": normal(8, 8) > 0,
    }


WAYS = [
    (8, None, {}),
    (3, None, {"symmetric": False}),
    (4, 32, {}),
    (5, 24, {"symmetric": False, "observer": "minmax"}),
    (4, 64, {"codebook": "nf4"}),
    (3, None, {"codebook": "kmeans"}),
]


@pytest.mark.parametrize("bits, group, how", WAYS)
@pytest.mark.parametrize("archive", [True, False])
def test_the_file_is_the_one_that_save_writes(tmp_path, monkeypatch, bits, group, how, archive):
    monkeypatch.setattr(out_of_core, "SLICE", 1 << 10)
    how = how if "codebook" in how else {"observer": "mse"} | how
    save_file(some_tensors(), source := tmp_path / "w.safetensors")
    model = quantize_weights(as_model(load_file(source)), bits, group, **how)
    save(model, one := tmp_path / "one.mz", archive=archive, note="x")
    seen = []
    with weights_in(str(source)) as (found, tied):
        options = dict(info={"note": "x"}, tied=tied, done=seen.append)
        compress_weights(found, two := tmp_path / "two.mz", bits, group, archive, 2, **options, **how)
    assert one.read_bytes() == two.read_bytes()
    assert sum(seen) == sum(p.nbytes for p in found.index.values())


def test_ties_stay_ties(tmp_path):
    w, b = torch.randn(20, 30), torch.randn(700)
    torch.save({"in.weight": w, "out.weight": w, "in.b": b, "out.b": b, "none": torch.empty(0)}, tmp_path / "w.pt")
    assert cli(["compress", str(tmp_path / "w.pt"), "-o", str(tmp_path / "w.mz"), "--quiet"]) == 0
    kinds = {l.name: l.kind for l in inspect(tmp_path / "w.mz").lines}
    assert sorted(k for k in kinds.values() if k.startswith("=")) == ["= in.b", "= in.weight"]


def test_every_source_gives_the_same_file(tmp_path, monkeypatch):
    "Mapped, read, or a tensor at a time out of another `.mz`: also where a slice is a small part of a large tensor."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(out_of_core, "SLICE", 1 << 14)
    dice = torch.Generator().manual_seed(0)
    tensors = {f"l.{n}": torch.randn(300, 200, generator=dice) for n in "abc"} | {"b": torch.randn(9, generator=dice)}
    save_file(tensors, "w.safetensors")
    tensors = load_file("w.safetensors")  # in the order that the file has
    torch.save(tensors, "w.pt")
    assert cli(["convert", "w.pt", "w.mz"]) == 0
    for name in "w.safetensors", "w.pt", "w.mz":
        assert cli(["compress", name, "-o", f"{name}.mz", "--bits", "4", "--group", "32", "--quiet"]) == 0
    files = [Path(f"{name}.mz").read_bytes() for name in ("w.safetensors", "w.pt", "w.mz")]
    assert files[0] == files[1] == files[2]


# ---- memory -----------------------------------------------------------------------------------------------------
CHILD = """
import sys
from modelzip.cli import cli
peak = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1000
before = peak()
for line in sys.argv[1:]:
    assert cli(line.split()) in (0, 1)
    print("PEAK", peak() - before)
"""


def peaks(*lines):
    """MB beyond what is there at the start, after each of these commands in one process. What is freed goes back to the
    system at once, see `faults_pack.peak_of`: else the peak is by 30 to 90 MB another from run to run."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run([sys.executable, "-c", CHILD, *lines], capture_output=True, text=True, check=True, env=env)
    return [float(l.split()[1]) for l in done.stdout.splitlines() if l.startswith("PEAK")]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_memory_is_that_of_the_largest_tensor(tmp_path, monkeypatch):
    """Two files of a tensor of 96 MB are never in memory; nor are fourteen tensors of 16 MB, 235 in all. (Threads, their
    chunks and their heaps take what they take of a small model, too.)"""
    monkeypatch.chdir(tmp_path)
    one = torch.randn(2048, 2048)
    save_file({f"l{i}.weight": one + i for i in range(14)}, "many.safetensors")
    for name in "a.mz", "b.mz":
        save(as_model({"w": torch.randn(6000, 4000), "v": torch.zeros(2)}), name, archive=False)
    table, entropies, differences, compressed = peaks(
        "inspect a.mz",
        "inspect a.mz --entropy",
        "diff a.mz b.mz",
        "compress many.safetensors -o many.mz --observer minmax --quiet",
    )
    assert table < 10 and entropies < 50 and differences < 80 and compressed < 3 * 17 + 130


def test_who_is_killed_leaves_the_old_file(tmp_path):
    save_file({"a": torch.randn(64, 64), "b": torch.randn(64, 64)}, source := tmp_path / "w.safetensors")
    (output := tmp_path / "w.mz").write_bytes(b"old")
    code = f"""
        import os, signal
        from modelzip.cli import weights_in
        from modelzip.workshop.out_of_core import compress_weights
        seen = []
        def done(nbytes):
            seen.append(nbytes)
            if len(seen) == 2: os.kill(os.getpid(), signal.SIGKILL)
        with weights_in({str(source)!r}) as (found, tied): compress_weights(found, {str(output)!r}, done=done)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    assert output.read_bytes() == b"old"


def test_what_would_not_come_back_is_not_written(tmp_path, monkeypatch):
    from modelzip.coding import CodingError
    from modelzip.workshop import streams

    save_file({"a": torch.randn(64, 64)}, source := tmp_path / "w.safetensors")
    monkeypatch.setattr(streams, "code_codes", lambda *a: bytes([streams.RAW]) + bytes(64 * 64))
    with weights_in(str(source)) as (found, tied), pytest.raises(CodingError, match="come back"):
        compress_weights(found, tmp_path / "w.mz")
    assert os.listdir(tmp_path) == ["w.safetensors"]


# ---- the search for a range that stops early --------------------------------------------------------------------
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("levels", [2, 3, 4, 16, 256])
def test_a_search_that_stops_finds_what_one_to_the_end_finds(monkeypatch, levels, symmetric):
    dice = torch.Generator().manual_seed(levels)
    blocks = torch.randn(300, 96, generator=dice)
    blocks[::3] = blocks[::3].pow(5)  # outliers
    blocks[1::50], blocks[2::50, 5:] = 0, 0
    blocks[4::7] += 3
    blocks[5::60] = blocks[5::60].round()
    found = [MSE()(b, levels, symmetric) for b in (blocks, blocks.double(), blocks * 1e-30)]
    monkeypatch.setattr(bites, "cut_off_errors", lambda blocks, *ruler: torch.zeros(len(blocks)))
    for before, b in zip(found, (blocks, blocks.double(), blocks * 1e-30)):
        assert all(map(torch.equal, before, MSE()(b, levels, symmetric)))


# ---- checkpoints in many files ----------------------------------------------------------------------------------
def sharded(folder, tensors, shards=3):
    "A folder as the Hugging Face Hub has them."
    folder.mkdir()
    places = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(tensors)}
    for s in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == s}, folder / s)
    (index := folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return index


def test_a_folder_is_its_index(tmp_path):
    index = sharded(tmp_path / "hub", some_tensors())
    for source, output in ((index.parent, "a.mz"), (index, "b.mz")):
        assert cli(["compress", str(source), "-o", str(tmp_path / output), "--bits", "4", "--quiet"]) == 0
    assert (tmp_path / "a.mz").read_bytes() == (tmp_path / "b.mz").read_bytes()
    assert {l.name for l in inspect(tmp_path / "a.mz").lines} == set(some_tensors())


def test_many_files_and_back(tmp_path, monkeypatch, capsys):
    "Compressed, expanded into many files, read from there: the numbers are those of the compressed file."
    monkeypatch.chdir(tmp_path)
    save_file(some_tensors(), "w.safetensors")
    assert cli("compress w.safetensors -o w.mz --bits 4 --quiet".split()) == 0
    Path("out").mkdir()
    assert cli("convert w.mz out/model.safetensors.index.json --expand --shard-bytes 20000".split()) == 0
    places = json.loads(Path("out/model.safetensors.index.json").read_text())["weight_map"]
    assert places.keys() == some_tensors().keys() and len(set(places.values())) > 2
    assert cli("convert out out.safetensors".split()) == cli("convert w.mz one.safetensors --expand".split()) == 0
    assert (
        cli("convert out/model.safetensors.index.json out.mz".split())
        == cli("convert one.safetensors one.mz".split())
        == 0
    )
    assert all(c.what == "same" for c in diff("out.mz", "one.mz").changes)
    capsys.readouterr()
    for line, said in (
        ("convert w.mz out/model.safetensors.index.json --expand", "is there already"),
        ("convert w.mz new.safetensors.index.json", "--expand"),
        ("convert w.safetensors new.safetensors.index.json --expand", "does not act"),
        ("convert w.mz new.json --expand", "may end in .safetensors.index.json"),
        ("convert w.mz x.npz --shard-bytes 7", "does not act"),
        ("convert w.safetensors new.safetensors.index.json --shard-bytes 0", "1 or more"),
    ):
        assert cli(line.split()) == 2 and said in capsys.readouterr().err


def test_many_workers_write_the_file_of_one(tmp_path):
    index, how = sharded(tmp_path / "hub", some_tensors()), dict(bits=4, group=32, observer="mse")
    with weights_in(str(index)) as (found, _):
        one = compress_weights(found, tmp_path / "one.mz", info={"note": "x"}, **how).read_bytes()
        mapped = compress_weights(found, tmp_path / "mapped.mz", archive=False, **how).read_bytes()
    with ProcessPoolExecutor(2, processes()) as pool:
        assert compress_shards(index, tmp_path / "two.mz", pool, info={"note": "x"}, **how).read_bytes() == one
        assert compress_shards(index, tmp_path / "two.mz", pool, archive=False, **how).read_bytes() == mapped
    assert sorted(os.listdir(tmp_path)) == ["hub", "mapped.mz", "one.mz", "two.mz"]


def test_dask_writes_the_file_of_one(tmp_path):
    dask, distributed = (pytest.importorskip(name) for name in ("dask", "distributed"))
    index = sharded(tmp_path / "hub", some_tensors())
    with weights_in(str(index)) as (found, _):
        one = compress_weights(found, tmp_path / "one.mz").read_bytes()
    processes()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert compress_shards(index, tmp_path / "two.mz", client.get_executor()).read_bytes() == one
