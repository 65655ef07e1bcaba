"The first minute of somebody who has installed the library: `import modelzip`, Tab, `help`, a slip, a missing package."

import ast, collections.abc, importlib, inspect, re, subprocess, sys, textwrap, typing
from functools import cache
from pathlib import Path

import pytest
import torch
from fastcore.docments import docments

import modelzip

ROOT = Path(__file__).resolve().parent.parent
MODULES = [m for m in modelzip._MODULES if m != "cli"]


def child(code, *options):
    "What a fresh interpreter prints."
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def public(modules=tuple(MODULES)):
    "Name → function or class, of all that `import *` brings from a module that is the library's own."
    found = {}
    for m in modules:
        module = importlib.import_module(f"modelzip.{m}")
        for name in module.__all__:
            x = getattr(module, name)
            if getattr(x, "__module__", "").startswith("modelzip.") and (inspect.isfunction(x) or inspect.isclass(x)):
                found[name] = x
    return found


# ---------------------------------------------------------------------------------- import modelzip


def test_the_import_alone_loads_nothing():
    assert (
        child("""
        import sys, modelzip
        loaded = [m for m in sys.modules if m.startswith(("torch", "numpy", "modelzip."))]
        assert not loaded, loaded
        assert {"quantize_model", "save", "pack", "__version__"} <= {*dir(modelzip)}
        assert not {"sys", "importlib", "Any"} & {*dir(modelzip)}  # not what Tab is for
        modelzip.explore  # what is asked for, and what that needs
        assert "modelzip.explore" in sys.modules and not {"modelzip.pack", "torch"} & {*sys.modules}
        print(modelzip.__version__)
    """)
        == modelzip.__version__ + "\n"
    )


def test_each_name_is_that_of_its_module():
    for home, names in modelzip._HOMES.items():
        module = importlib.import_module(f"modelzip.{home}")
        for name in names.split():
            thing = getattr(modelzip, name)
            assert thing is getattr(module, name) or thing is module, name  # a module of this name can be called
    assert sorted(n for names in modelzip._HOMES.values() for n in names.split()) == sorted(modelzip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise_model'") as e:
        modelzip.quantise_model
    assert e.value.obj is modelzip  # so that Python can say which name was meant


def test_a_checker_of_types_knows_the_same_names():
    text = (ROOT / "modelzip/__init__.py").read_text(encoding="utf-8")
    said = re.findall(r"^    from \.(\w+) import (\w+) as (\w+)$", text, re.M)
    assert {(m, n) for m, n, _ in said} == {(m, n) for m, names in modelzip._HOMES.items() for n in names.split()}
    assert all(n == as_ for _, n, as_ in said)


def test_a_module_with_the_name_of_its_function_is_called_like_it():
    "Whichever was imported first, and in whichever way."
    child("""
        import inspect, torch
        import modelzip.deploy
        from modelzip.trellis import trellis
        m, x = torch.nn.Linear(4, 3).eval(), torch.randn(2, 4)
        assert torch.allclose(modelzip.deploy(m, x, "torch")(x), m(x), atol=1e-5)
        assert inspect.signature(modelzip.deploy) == inspect.signature(modelzip.deploy.deploy)
        assert isinstance(modelzip.trellis(m).q, modelzip.trellis.TrellisTensor)  # the function's module
        assert "teacher" in inspect.signature(modelzip.distill).parameters  # not imported before
        import pydoc
        both = [home for home, names in modelzip._HOMES.items() if home in names.split()]
        assert {"deploy", "distill", "explore", "trellis"} <= {*both}
        for name in both:
            module = getattr(modelzip, name)
            f, page = getattr(module, name), pydoc.plain(pydoc.render_doc(module))
            page, doc = " ".join(page.replace("DESCRIPTION", "").split()), " ".join(inspect.getdoc(f).split())
            assert module.__doc__ == inspect.getdoc(f) and doc in page.partition(" CLASSES ")[0], page[:500]
    """)


# ---------------------------------------------------------------------------------- help


def test_help_shows_what_stands_beside_each_argument():
    "Held against fastcore's own reading of the comments (which may take a line for the next argument's)."
    words, seen, wrong = lambda text: " ".join(text.split()), 0, []
    for name, x in public().items():
        f = inspect.unwrap(x.__init__ if inspect.isclass(x) else x)
        if (
            not x.__doc__
            or not getattr(f, "__module__", "").startswith("modelzip.")
            or f.__code__.co_filename[0] == "<"
        ):
            continue
        doc = words(inspect.getdoc(x))
        for argument, text in docments(f).items():
            if text and argument not in ("self", "return"):
                seen += 1
                if not all(words(line) in doc for line in text.splitlines()):
                    wrong.append((name, argument, text))
    assert seen > 800 and not wrong, wrong[:5]


def test_help_has_every_argument_of_the_signature_and_no_other():
    wrong = []
    for name, x in public().items():
        if inspect.isfunction(x) and "\nParameters\n" in inspect.getdoc(x):
            section = inspect.getdoc(x).partition("\nParameters\n----------\n")[2].partition("\nReturns\n")[0]
            said = re.findall(r"^\*{0,2}(\w+)", section, re.M)
            if said != [*inspect.signature(x).parameters]:
                wrong.append((name, said, [*inspect.signature(x).parameters]))
    assert not wrong, wrong[:3]


def test_every_public_function_has_types():
    "Each argument, and the result."
    wrong = []
    for name, f in public().items():
        if inspect.isfunction(f):
            s = inspect.signature(f)
            bare = [p.name for p in s.parameters.values() if p.annotation is p.empty and p.kind is not p.VAR_KEYWORD]
            if bare or s.return_annotation is s.empty:
                wrong.append((name, bare, s.return_annotation is s.empty))
    assert not wrong, wrong


def test_every_annotation_can_be_evaluated():
    """Of all functions and classes, with their methods: what makes forms or checks of them asks so. (A field named `bytes`
    once hid the class from the annotation of the next.)"""
    names = [f"modelzip.{p.stem}" for p in ROOT.glob("modelzip/[a-z]*.py")]
    names += [f"modelzip.workshop.{p.stem}" for p in ROOT.glob("modelzip/workshop/[a-z]*.py") if p.stem != "terminal"]
    wrong, seen = [], 0
    for module in map(importlib.import_module, names):
        for name, x in vars(module).items():
            if getattr(x, "__module__", None) == module.__name__ and (inspect.isclass(x) or inspect.isfunction(x)):
                members = [getattr(f, "__func__", getattr(f, "fget", f)) for f in vars(x).values()] * inspect.isclass(x)
                for f in [x, *filter(inspect.isfunction, members)]:
                    seen += 1
                    try:
                        typing.get_type_hints(f)
                    except Exception as e:
                        wrong.append((module.__name__, name, f, e))
    assert seen > 3000 and not wrong, wrong


OPEN = {dict, list, tuple, set, frozenset, *(getattr(collections.abc, n) for n in collections.abc.__all__)} - {
    collections.abc.Buffer if hasattr(collections.abc, "Buffer") else None,
    collections.abc.Hashable,
    collections.abc.Sized,
}  # that hold or take something, which is to be said


def left_open(kind):
    "What an annotation does not say the contents of."
    return [kind] * (kind in OPEN if isinstance(kind, type) else False) + [
        x for of in typing.get_args(kind) for each in (of if isinstance(of, list) else [of]) for x in left_open(each)
    ]


def test_types_say_what_a_container_holds_and_what_a_function_takes():
    "Of public functions, of the methods of public classes, and of their fields."
    assert left_open(dict[str, list | None]) == [list] and left_open(collections.abc.Callable | int)
    assert not left_open(collections.abc.Callable[[dict[str, int]], tuple[int, ...]] | type | None)
    workshop = tuple(f"workshop.{p.stem}" for p in ROOT.glob("modelzip/workshop/[a-z]*.py") if p.stem != "terminal")
    wrong, seen = [], 0
    for name, x in (*public().items(), *public(workshop).items()):
        members = vars(x) if inspect.isclass(x) else {}
        members = {n: getattr(f, "__func__", getattr(f, "fget", f)) for n, f in members.items()}
        for f in [x, *(f for f in members.values() if inspect.isfunction(f))]:
            for argument, kind in getattr(inspect.unwrap(f), "__annotations__", {}).items():
                seen += 1
                if left_open(kind):
                    wrong.append((name, getattr(f, "__name__", f), argument, kind))
    assert seen > 4000 and not wrong, wrong[:5]


def test_what_an_object_holds_has_a_type():
    "Each public attribute that a method of a public class sets, where it is set, in the class, or in a base."
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in sorted(ROOT.glob("modelzip/**/*.py"))]
    every = [c for tree in trees for c in tree.body if isinstance(c, ast.ClassDef)]
    classes = {c.name: c for c in every}
    called = lambda t: t.attr if isinstance(t, ast.Attribute) else t.id if isinstance(t, ast.Name) else None

    @cache
    def says(c):
        "Names that a class annotates, defines, or sets for all its objects; and those of its bases."
        inside = [*ast.walk(c)]
        found = {called(n.target) for n in inside if isinstance(n, ast.AnnAssign)}
        found |= {n.name for n in inside if isinstance(n, ast.FunctionDef)}
        found |= {called(t) for n in c.body if isinstance(n, ast.Assign) for x in n.targets for t in ast.walk(x)}
        bases = [classes.get(called(b)) for b in c.bases]
        return found.union(*(says(b) for b in bases if b is not None and b is not c))

    sets = [
        (c, n.attr)
        for c in every
        for f in c.body
        if isinstance(f, ast.FunctionDef)
        for n in ast.walk(f)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and called(n.value) == "self"
    ]
    hidden = lambda name: name.startswith("_")
    wrong = {(c.name, a) for c, a in sets if not hidden(c.name) and not hidden(a) and a not in says(c)}
    assert len(sets) > 600 and not wrong, sorted(wrong)


def test_a_typed_program_uses_every_name_of_the_front_page():
    "`make types` gives it to checkers."
    text = (ROOT / "tests/typed_use.py").read_text(encoding="utf-8")
    assert {*re.findall(r"\bmz\.(\w+)", text)} == {*modelzip.__all__}
    compile(text, "typed_use.py", "exec")


# ---------------------------------------------------------------------------------- a slip


def keywords(f):
    ways = inspect.signature(f).parameters.values()
    return [p.name for p in ways if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is not p.empty]


def test_a_slip_in_the_name_of_an_argument_is_named():
    "For each public function with options: the name as it was written, the function that was called, what was meant."
    wrong, seen = [], 0
    for name, f in public().items():
        options = keywords(f) if inspect.isfunction(f) else []
        if not options or any(p.kind is p.VAR_KEYWORD for p in inspect.signature(f).parameters.values()):
            continue
        option = max(options, key=len)
        slip = option[:-1] + "_x" if len(option) < 4 else option[:2] + option[3] + option[2] + option[4:] + "x"
        given = {p.name: None for p in inspect.signature(f).parameters.values() if p.default is p.empty}
        needed = [p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty]
        given = dict.fromkeys(needed) | ({"batches": []} if f is modelzip.quantize_static else {})  # one of two
        by_python = not hasattr(f, "__wrapped__")  # it hands nothing on: Python says which function it was
        seen += 1
        try:
            f(**given, **{slip: None})
        except TypeError as e:
            if not by_python and not re.match(
                rf"{slip} is no argument of {f.__name__}\(\); (did you mean \w+\?|it has )", str(e)
            ):
                wrong.append((name, slip, str(e)))
        except Exception as e:
            wrong.append((name, slip, repr(e)))
        else:
            wrong.append((name, slip, "nothing was said"))
    assert seen > 100 and not wrong, wrong[:10]
    model = torch.nn.Linear(8, 4)
    for f in modelzip.quantize_layer, modelzip.quantize_model, modelzip.hqq, modelzip.prune_model:
        with pytest.raises(TypeError, match=rf"^\w+ is no argument of {f.__name__}\(\)"):
            f(model, **{"bit" if "bits" in inspect.signature(f).parameters else "sparsty": 4})


# ---------------------------------------------------------------------------------- without plots and widgets


def test_the_library_works_without_plots_and_widgets(tmp_path):
    "matplotlib, ipywidgets and IPython are an extra; who asks for a picture is told which."
    said = child(f"""
        import sys
        for name in "matplotlib", "ipywidgets", "IPython":
            sys.modules[name] = None  # to import it fails
        import os, torch, modelzip as mz
        os.chdir({str(tmp_path)!r})
        model, x = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)), torch.randn(200, 64)
        small = mz.quantize_model(model, 4, group=16)
        mz.save(small, "a.mz", example=x[:1])
        mz.save(mz.sparsify_model(mz.prune_model(model, 0.8)), "b.mz")
        mz.to_safetensors(model, "m.safetensors")
        assert torch.allclose(mz.load("a.mz")(x), small(x), atol=1e-5)
        data = mz.Split(x, x[:, 0].gt(0).long())
        table = mz.compare({{"float32": model, "4 bits": small}}, data, save=mz.save, load=mz.load, batches=(), progress=False)
        mz.compress(model, bytes=5000)
        from modelzip import cli
        for line in "inspect a.mz", "compress m.safetensors -o m.mz --bits 4", "diff a.mz a.mz", "--version":
            assert cli.cli(line.split()) == 0, line
        for draw in table.pareto, mz.pack.inspect("a.mz").plot, lambda: mz.explore.plot_matrix(x):
            try: draw()
            except ImportError as e: print(e)
        print(table.to_html("report.html").read_text().partition("<figcaption>")[2])
    """)
    told = "this needs `matplotlib`, which is not installed: pip install 'modelzip[notebook]'"
    assert said.count(told) == 3 and "A picture is left out: this needs `matplotlib`" in said, said


# ---------------------------------------------------------------------------------- what is installed, what is promised


SETTINGS = dict(re.findall(r"^(\w+) = (.*)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M))


def test_the_ends_are_those_that_are_promised():
    import ends

    asked, newest = ends.requirements("oldest"), ends.requirements("newest")
    for r in SETTINGS["requirements"].split():
        assert r.replace(">=", "==") in asked and r in newest
    page = (ROOT / "nbs/promises.ipynb").read_text(encoding="utf-8")
    said = dict(r.split(">=") for r in SETTINGS["requirements"].split() if ">=" in r)
    assert f"Python {SETTINGS['min_python']} with PyTorch {said['torch']}.0 and fastcore {said['fastcore']}.0" in page
    assert ends.python_of("oldest") == f"python{SETTINGS['min_python']}"
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in ends.TESTS)


def test_each_block_of_the_readme_writes_files_of_its_own():
    blocks = re.findall(r"^```\w+\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    written = [{*re.findall(r"[\w-]+\.mz\b", b)} for b in blocks]
    names = [n for names in written for n in names]
    assert len(names) > 5 and len(names) == len({*names}), sorted(names)


def test_doctor_knows_every_extra():
    from modelzip.workshop.doctor import BRINGS, Findings, doctor

    assert {*BRINGS} == {k.removesuffix("_requirements") for k in SETTINGS if k.endswith("_requirements")} - {"dev"}
    found = doctor()
    assert all(name in repr(found) for name in (*found.extras, *found.engines, *found.packages))
    broken = Findings({}, {"numpy": None}, {"onnx": ["onnx"]}, {}, {})
    assert not broken.well and "numpy MISSING" in repr(broken) and "pip install 'modelzip[onnx]'" in repr(broken)
    assert "nobody knows" in repr(Findings({}, {}, {}, {}, {}))  # it runs from a folder


def test_promises_are_those_of_the_settings():
    page = (ROOT / "nbs/promises.ipynb").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"Python {SETTINGS['min_python']} or newer" in page
    assert f"PyTorch {re.search(r'torch>=([0-9.]+)', SETTINGS['requirements'])[1]} or newer" in page
    tested = re.search("^torch==([0-9.]+)", pins, re.M)[1]
    assert f"PyTorch {tested} on Linux" in page
    assert f"`torch=={tested}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    versions = {re.match(r"version(\d)", p.name)[1] for p in (ROOT / "tests/files").glob("version*.mz")}
    assert versions == set("1234567") and "there has been, 1 to 7, is read" in page
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {SETTINGS['version']}" in changes and modelzip.__version__ == SETTINGS["version"]


def test_models_of_hugging_face_are_models_like_others(tmp_path):
    "As the first page says: quantized, calibrated, saved, loaded with a model of their class."
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    ids = torch.arange(16).view(2, 8)
    for small in modelzip.quantize_model(model, 8), modelzip.gptq(model, [{"input_ids": ids}], 8):
        loaded = modelzip.load(modelzip.save(small, tmp_path / "bert.mz"), model)
        ours, exact = loaded(input_ids=ids)[0], model(input_ids=ids)[0]
        assert torch.equal(ours, small(input_ids=ids)[0]) and (ours - exact).norm() < 0.05 * exact.norm()
