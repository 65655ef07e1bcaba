"""The two ends of what is promised: the oldest Python and PyTorch that settings.ini admits, and the newest there are.

    python tools/ends.py oldest [python]     make .venv-oldest with the lowest versions that settings.ini names
    python tools/ends.py newest [python]     make .venv-newest with the newest that pip finds

and run a part of the tests there: what a user meets first, files (of former versions, too), graphs. What `python` is
called decides which Python it is: `python3.10` (what settings.ini names) for the oldest, else the one that runs this.
A PyTorch that lies in the folder already, such as the build for CPUs, is kept where its version fits.
"""

import configparser, os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "notebook", "data", "hdf5", "cli"  # that the tests need, beside what they are written with
TOOLS = "pytest", "hypothesis", "pyyaml"
TESTS = "first_minute", "quant", "pack", "updates", "graph", "specification"


def settings():
    found = configparser.ConfigParser(delimiters=["="], interpolation=None)
    found.read(ROOT / "settings.ini", encoding="utf-8")
    return found["DEFAULT"]


def requirements(end):
    "What pip is asked for: `torch>=2.6` is torch 2.6 at the one end, and any torch at the other."
    said = settings()
    own = said["requirements"].split()
    if end == "oldest":
        own = [r.replace(">=", "==") for r in own]
    return [*own, *(r for e in EXTRAS for r in said[f"{e}_requirements"].split()), *TOOLS]


def python_of(end):
    return f"python{settings()['min_python']}" if end == "oldest" else sys.executable


def run(end, python):
    "The exit status of the tests."
    folder = ROOT / f".venv-{end}"
    bin = folder / "bin" / "python"
    if not bin.exists():
        if shutil.which(python) is None:
            sys.exit(f"there is no {python}; say which Python it may be: python tools/ends.py {end} PYTHON")
        subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [bin, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *["--upgrade"] * (end == "newest"), *requirements(end)], check=True, cwd=ROOT)
    there = "import platform, torch; print('Python', platform.python_version(), 'PyTorch', torch.__version__)"
    subprocess.run([bin, "-c", there], check=True)
    quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MODELZIP_STATIC": "1", "PYTHONPATH": str(ROOT)}
    tests = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
    return subprocess.run([bin, "-m", "pytest", "-q", *tests], env=os.environ | quiet, cwd=ROOT).returncode


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["oldest" | "newest" as end, *python] if len(python) < 2:
            sys.exit(run(end, *(python or [python_of(end)])))
        case _:
            sys.exit(__doc__)
