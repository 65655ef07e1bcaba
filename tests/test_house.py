"""The shape of the house: what was once public can still be imported, chapters stay short, modules say only what their
users call, and no name has two meanings.

`UNDER_WORK` lists what does not keep a rule yet. An entry that keeps it must be taken off the list: the lists only
become shorter.
"""

import ast, importlib, json, re, sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import house

FORMER = json.loads((Path(__file__).parent / "files/public_names.json").read_text(encoding="utf-8"))
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
MODULES = sorted(p for p in (ROOT / "modelzip").glob("**/*.py") if p.name not in ("_modidx.py", "__init__.py"))
CELLS, LINES, SILENT, NAMES = 100, 450, 6, 30  # code cells, lines and cells without a word; names of `import *`
COLUMNS = 120  # of a line
MAP = 88  # columns of a picture drawn in characters: what a page shows without scrolling

UNDER_WORK = {"chapters": set(), "names": set(), "twice": set(), "head": set(), "wide": set(), "private": set()}


def kept_or_listed(kind, name, kept, why):
    "A rule is kept, or its breach is listed, and a list holds breaches alone."
    if name in UNDER_WORK[kind]:
        assert not kept, f"{name} keeps the rule now: take it off UNDER_WORK[{kind!r}]"
    else:
        assert kept, f"{name}: {why}"


def is_workshop(path):
    return path.parent.name == "workshop"


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def star(tree):
    "What `import *` brings."
    for n in tree.body:
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__":
            return ast.literal_eval(n.value)
    return []


def made_here(tree):
    "Names of functions, classes and values that a module makes itself."
    made = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    made |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    return made | {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


@pytest.mark.parametrize("module", FORMER)
def test_former_names_are_where_they_were(module):
    have = importlib.import_module(module)
    assert not [n for n in FORMER[module] if not hasattr(have, n)]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_is_short(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code, silent, run = [], 0, 0
    for c in cells:
        text = "".join(c["source"])
        if c["cell_type"] == "code" and text.strip():
            lines = [l for l in text.splitlines() if l.strip() and not l.startswith("#| fig-alt:")]  # that is prose
            code.append(len(lines))
        run = 0 if c["cell_type"] == "markdown" else run + bool(text.strip())
        silent = max(silent, run)
    shape = f"{len(code)} code cells, {sum(code)} lines, {silent} cells without a word"
    kept = len(code) <= CELLS and sum(code) <= LINES and silent <= SILENT
    kept_or_listed("chapters", path.stem, kept, shape)


def is_hidden(cell):
    "Whether readers of the site do not see a cell: set-up, `#| default_exp`, what is marked `#| hide`, nothing."
    text = "".join(cell["source"])
    return cell["cell_type"] == "code" and (not text.strip() or re.search(r"^#\| *(hide|default_exp)\b", text, re.M))


def begins_with(cells):
    "What a reader sees first below title and description: 'prose', 'a picture', 'imports' or 'code'."
    title = re.sub(r"\A\s*# .*\n?|^>.*$", "", "".join(cells[0]["source"]), flags=re.M)
    first = next(c for c in cells[1:] if not is_hidden(c))
    if title.strip() or first["cell_type"] == "markdown":
        return "prose"
    if any(k.startswith(("image/", "text/html")) for o in first["outputs"] for k in o.get("data", {})):
        return "a picture"
    tree = ast.parse(re.sub(r"^[#!%].*$", "", "".join(first["source"]), flags=re.M))
    return "imports" if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body) else "code"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_begins_with_its_question(path):
    "Title, then words or a picture; imports come after them, folded."
    begins = begins_with(json.loads(path.read_text(encoding="utf-8"))["cells"])
    kept_or_listed("head", path.stem, begins in ("prose", "a picture"), f"begins with {begins}")


def test_what_a_chapter_begins_with():
    title = dict(cell_type="markdown", source="# T\n\n> what it says\n")
    md, code = lambda s: dict(cell_type="markdown", source=s), lambda s, *o: dict(cell_type="code", source=s, outputs=o)
    hidden, picture = code("#| hide\nimport sys"), dict(data={"image/png": ""})
    assert begins_with([title, hidden, code("#| default_exp x"), md("Why?"), code("import math")]) == "prose"
    assert begins_with([title, hidden, code("#| export\nimport math"), md("Why?")]) == "imports"
    assert begins_with([title, hidden, code("from x import draw\ndraw()", picture)]) == "a picture"
    assert (
        begins_with([title, code("1 + 1")]) == "code" and begins_with([md("# T\n\nWhy?"), code("import x")]) == "prose"
    )


def wide(path):
    "Lines that are too long, without the module's docstring and the names of `import *`, which nbdev writes."
    lines = path.read_text(encoding="utf-8").splitlines()
    if max(map(len, lines)) <= COLUMNS:
        return []
    tree = tree_of(path)
    free = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    free += [n for n in tree.body[:1] if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    free = {i for n in free for i in range(n.lineno, n.end_lineno + 1)}
    return [i for i, l in enumerate(lines, 1) if len(l) > COLUMNS and i not in free]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT / "modelzip").as_posix())
def test_lines_are_no_longer_than_a_page_is_wide(path):
    found = wide(path)
    kept_or_listed("wide", path.relative_to(ROOT / "modelzip").as_posix(), not found, f"lines {found} are too long")


@pytest.mark.parametrize("path", [p for p in MODULES if not is_workshop(p)], ids=lambda p: p.stem)
def test_import_star_brings_what_a_user_calls(path):
    names = star(tree_of(path))
    kept_or_listed("names", path.stem, len(names) <= NAMES, f"{len(names)} names")


def test_no_public_name_has_two_meanings():
    owners = defaultdict(set)
    for p in MODULES:
        if not is_workshop(p):
            tree = tree_of(p)
            for name in set(star(tree)) & made_here(tree):
                owners[name].add(p.stem)
    assert {n for n, where in owners.items() if len(where) > 1} == UNDER_WORK["twice"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT / "modelzip").as_posix())
def test_private_names_stay_at_home(path):
    mine = path.relative_to(ROOT / "modelzip").as_posix()
    private = [
        f"{n.module}.{a.name}"
        for n in ast.walk(tree_of(path))
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith("modelzip"))
        for a in n.names
        if re.match(r"_(?!_)", a.name)
    ]
    kept_or_listed("private", mine, not private, f"imports {private}")


# ---------------------------------------------------------------------------------- registries

# A table of names, and the module whose users look names up in it: who enters something must be imported by that one.
TABLES = {
    "workshop.coders:CODERS": "coding",
    "workshop.criteria:CRITERIA": "prune",
    "workshop.choosing:CRITERIA": "structured",
    "workshop.pruner:SCHEDULES": "prune",
    "workshop.layouts:LAYOUTS": "prune",
    "workshop.drivers:COLUMNS": "ptq",
    "workshop.observers:OBSERVERS": "quant",
    "workshop.streams:FOR_CODES": "pack",
    "channels:RULES": "structured",
    "kernels:KERNELS": "kernels",
    "recipe:STEPS": "recipe",
    "tour:TECHNIQUES": "tour",
    "cli:COMMANDS": "cli",
}


def reached(module, used):
    "A module of the house and all that are imported when it is."
    seen, todo = set(), [module]
    while todo:
        if (m := todo.pop()) not in seen:
            seen.add(m)
            todo += used[m]
    return seen


def makers(value):
    "The modules of the house that make an entry of a table: those of its class and of the functions that it holds."
    held = [*vars(value).values()] if hasattr(value, "__dict__") and not isinstance(value, type) else []
    found = {getattr(x, "__module__", None) for x in (value, type(value), *held)}
    return {m.removeprefix("modelzip.") for m in found if isinstance(m, str) and m.startswith("modelzip.")}


@pytest.fixture(scope="module")
def everything():
    "All modules are imported, each by its name; what imports what."
    for module in house.modules().values():
        if module:
            importlib.import_module(f"modelzip.{module}")
    return house.uses()


@pytest.mark.parametrize("table", TABLES)
def test_who_enters_a_table_is_imported_by_its_users(table, everything):
    "Else a name is there or not, depending on what else was imported."
    module, name = table.split(":")
    known = reached(TABLES[table], everything)
    for key, value in getattr(importlib.import_module(f"modelzip.{module}"), name).items():
        for maker in makers(value) & everything.keys():
            assert maker in known, f"{name}[{key!r}] is made by {maker}: import it in modelzip.{TABLES[table]}"


def test_files_find_every_kind_of_tensor_and_layer(everything):
    "A reader has imported nothing: `HOMES` says where a kind is made, and importing that module makes it."
    from modelzip.quant import CompressedTensor, Dequantize
    from modelzip.workshop.manifest import HOMES

    for kinds in (CompressedTensor.kinds, Dequantize.kinds):
        for kind, cls in kinds.items():
            home = cls.__module__.removeprefix("modelzip.")
            made_there = getattr(sys.modules[cls.__module__], cls.__name__, None) is cls  # and not in an exercise
            if made_there and home in everything and kind != "IntegerLayer":  # a base, of which there is no layer
                assert kind in HOMES, f"{home} makes the kind {kind!r}: a line in HOMES of workshop.manifest is missing"
                assert home in reached(HOMES[kind], everything), f"HOMES[{kind!r}] does not import {home}"


# ---------------------------------------------------------------------------------- the map


def test_every_notebook_has_a_room():
    "In the sidebar, and so on the map: a place in `_quarto.yml`, and every group of the workshop on a floor."
    assert not house.homeless(), "give them a place in _quarto.yml"
    rooms = [p for paths in house.rooms().values() for p in paths]
    assert len(set(rooms)) == len(rooms)


def test_the_map_is_that_of_the_house():
    page = house.PAGE.read_text(encoding="utf-8")
    assert page == house.page(), "run: python tools/house.py write"
    missing = [p for p in house.modules() if f"(nbs/{p})" not in page]
    assert {p for p in missing if p[0].isdigit() or p.startswith("workshop/")} == set()


def test_nothing_stands_on_what_is_above_it():
    assert not house.upward(), "(who imports, what stands above it): move one of the two, or the group in _quarto.yml"


def test_a_notebook_and_its_module_have_one_name():
    for path, module in house.modules().items():
        stem = re.sub(r"^\d+[a-z]?_", "", Path(path).stem)
        assert module in (None, stem, f"workshop.{stem}"), (path, module)


# ---------------------------------------------------------------------------------- what the workshop's pages name


WORKSHOP = sorted((ROOT / "nbs/workshop").glob("*.ipynb"))


@cache
def defined_by_tests():
    "Names of all functions in tests/ and in code cells."
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py")]
    texts += [c for p in [*CHAPTERS, *WORKSHOP] for kind, c in cells_of(p) if kind == "code"]
    return {m for t in texts for m in re.findall(r"^ *def (test_\w+)", t, re.M)} | FASTCORE


FASTCORE = {"test_eq", "test_ne", "test_close", "test_fail", "test_is", "test_warns", "test_stdout", "test_sig"}


def cells_of(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    return [(c["cell_type"], "".join(c["source"])) for c in nb["cells"]]


def wrongly_named(text):
    "Files of tests and tests that a text names, and that are not there."
    files = {f for f in re.findall(r"tests/[\w/]+\.py", text) if not (ROOT / f).exists()}
    spoken = re.sub(r"tests/[\w/]+\.py(?!::)|\w+\.py|\w*_test_\w+", " ", text)
    names = {n for n in re.findall(r"\btest_\w+", spoken) if n not in defined_by_tests()}
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", text):
        if file not in files and f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8"):
            names.add(f"{file}::{name}")
    return files | names


@pytest.mark.parametrize("path", [*WORKSHOP, *CHAPTERS], ids=lambda p: p.stem)
def test_tests_that_prose_names_are_there(path):
    assert not wrongly_named("\n".join(t for kind, t in cells_of(path) if kind == "markdown"))


def test_tests_that_the_map_names_are_there():
    assert not wrongly_named(house.PAGE.read_text(encoding="utf-8"))
    assert wrongly_named("see tests/test_nobody.py and `test_nothing_at_all`") == {
        "tests/test_nobody.py",
        "test_nothing_at_all",
    }
    assert wrongly_named("`tests/test_house.py::test_exercises`")


def maps(text):
    "Blocks of a text that have no language: pictures drawn in characters."
    inside, language, lines, found = False, "", [], []
    for line in text.splitlines():
        if line.startswith("```"):
            found += ["\n".join(lines)] if inside and not language else []
            inside, language, lines = not inside, line[3:].strip(), []
        elif inside:
            lines.append(line)
    return found


def test_maps_fit_on_a_page():
    assert maps("a\n```\nb ─ c\n```\n```sh\nd\n```\ne\n```\nf\n```") == ["b ─ c", "f"]
    wide = {}
    for path in sorted((ROOT / "nbs").glob("**/*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for text in maps("".join(cell["source"])) if cell["cell_type"] == "markdown" else ():
                if (width := max(map(len, text.splitlines()), default=0)) > MAP:
                    wide[path.stem] = width
    assert not wide, f"maps of more than {MAP} columns: {wide}"


def test_outputs_hold_no_warnings_and_no_places():
    "What a notebook shows is what its cells print: no warning, and no path of whoever ran it."
    found = []
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/workshop").glob("*.ipynb")]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for out in cell.get("outputs", []):
                if out.get("name") == "stderr" or re.search(r"/site-packages/|/ipykernel_\d", json.dumps(out)):
                    found.append(f"{path.stem}, cell {cell['id']}")
    assert not found
