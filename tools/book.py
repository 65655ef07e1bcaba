"""Run the book's chapters as they are committed: executed, exported, cleaned.

    python tools/book.py run [nbs/03_quant.ipynb …]     execute, export, clean (all chapters when none is named)
    python tools/book.py check                          exit 1 when modelzip/, README.md or a notebook is out of date
"""
import filecmp, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
STATIC = {"MODELZIP_STATIC": "1",      # explorers as HTML alone: what is saved must outlive its kernel
          "TQDM_DISABLE": "1",         # no progress bars in saved outputs
          "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def execute(path):
    "Run one notebook from top to bottom in a fresh kernel, in place; an error stops with the cell that raised it."
    nb = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    env = {**os.environ, **STATIC, "PYTHONPATH": str(ROOT)}
    client = NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}})
    client.execute(env=env)
    nbformat.write(nb, path)
    return time.perf_counter() - began


def nbdev(*command):
    "Run a command of nbdev from the project's root."
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True, cwd=ROOT)


def export(paths):
    "Write modules before anything runs: a chapter's later cells may import the module that its first cells make."
    code = "import sys; from nbdev.export import nb_export; [nb_export(p) for p in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, cwd=ROOT)


def run(paths):
    for p in paths:
        export([p])
        print(f"{p.name:<22} {execute(p):6.1f} s")
        nbdev("nbdev_clean", "--fname", str(p))


def check():
    "Compare what nbdev would make of the notebooks with what is there; report every difference."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "modelzip"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "_docs", "_proc", "tour", "bench", "__pycache__", "build"))
        shutil.rmtree(copy / "modelzip")
        bin = Path(sys.executable).parent
        for command in ["nbdev_export"], ["nbdev_clean"], ["nbdev_readme"]:
            subprocess.run([str(bin / command[0]), *command[1:]], check=True, cwd=copy, stdout=subprocess.DEVNULL)
        made = [p.relative_to(copy) for folder, glob in (("modelzip", "*.py"), ("nbs", "*.ipynb"), (".", "README.md")) for p in (copy / folder).glob(glob)]
        there = [p.relative_to(ROOT) for p in (ROOT / "modelzip").glob("*.py")]
        wrong = [p for p in sorted({*made, *there}) if not ((ROOT / p).exists() and (copy / p).exists() and filecmp.cmp(ROOT / p, copy / p, shallow=False))]
    for p in wrong: print(f"out of date: {p} (edit the notebook, then `make book`)")
    return not wrong


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *paths]: run([Path(p).resolve() for p in paths] or sorted((ROOT / "nbs").glob("*.ipynb")))
        case ["check"]: sys.exit(not check())
        case _: sys.exit(__doc__)
