"""The exercises of the book: check, stub and solution, and a place where a check can run without its notebook.

A notebook is not executed for that. Of its cells only these are: imports, the check, and the definitions that it
mentions. Where a check looks at something that the chapter has made (a trained model, a file), `SETUP` makes a small
one.
"""

import ast, importlib, json, re, textwrap
from functools import cache, cached_property
from pathlib import Path

import fastcore.test

ROOT = Path(__file__).resolve().parent.parent


class Cell:
    "A code cell: text and syntax tree, which is empty where it is no plain Python."

    def __init__(self, text):
        self.text = text

    @cached_property
    def tree(self):
        try:
            return ast.parse(self.text)
        except SyntaxError:
            return ast.parse("")


@cache
def cells(chapter):
    "The code cells of a chapter."
    book = json.loads((ROOT / f"nbs/{chapter}.ipynb").read_text(encoding="utf-8"))
    return [Cell("".join(c["source"])) for c in book["cells"] if c["cell_type"] == "code"]


def found():
    "Notebook and number of the check's cell; the stub and the solution are the two cells behind it."
    for path in sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/workshop").glob("*.ipynb")]):
        chapter = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        for i, cell in enumerate(cells(chapter)):
            if (
                re.search(r"^@exercise$", cell.text, re.M)
                and not cell.text.startswith("#| export")
                and "your turn" in cells(chapter)[i + 1].text
            ):
                yield chapter, i


def check_name(chapter, i):
    return next(
        n.name
        for n in cells(chapter)[i].tree.body
        if isinstance(n, ast.FunctionDef) and any(ast.unparse(d) == "exercise" for d in n.decorator_list)
    )


EXERCISES = {f"{c}:{check_name(c, i)}": (c, i) for c, i in found()}


def names(tree):
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


def run(nodes, space, chapter):
    exec(compile(ast.Module(list(nodes), []), f"nbs/{chapter}.ipynb", "exec"), space)


def define(wanted, space, chapter, before):
    """Execute the functions and classes of earlier cells that are mentioned and not there yet, and what they
    mention in turn."""
    for name in wanted - space.keys():
        for cell in reversed(cells(chapter)[:before]):
            found = [n for n in cell.tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
            if found:
                space[name] = None
                define(names(found[-1]), space, chapter, before)
                run(found[-1:], space, chapter)
                break


@cache
def imported(chapter):
    "What the chapter's module defines, and all that its cells import."
    space = dict(vars(fastcore.test))
    module = next((m[1] for c in cells(chapter) if (m := re.search(r"^#\| ?default_exp ([\w.]+)", c.text, re.M))), None)
    if module:
        space |= vars(importlib.import_module(f"modelzip.{module}"))
    for cell in cells(chapter):
        if "#| export" not in cell.text:
            run([n for n in cell.tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], space, chapter)
    return space


def namespace(chapter, folder):
    "What is imported, and what `SETUP` makes, files in the folder."
    space = imported(chapter) | {"folder": folder}
    exec(textwrap.dedent(SETUP.get(chapter, "")), space)
    return space


def with_check(exercise, space):
    "The namespace of an exercise, with its check defined."
    chapter, i = EXERCISES[exercise]
    space, tree = dict(space), cells(chapter)[i].tree
    define(names(tree) - {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, space, chapter, i)
    run(tree.body, space, chapter)
    return space, space[check_name(chapter, i)]


def definitions(tree):
    return [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def stub(exercise):
    "The cell that a reader fills in, and the name of what it defines."
    chapter, i = EXERCISES[exercise]
    cell = cells(chapter)[i + 1]
    return cell, definitions(cell.tree)[0].name


def solution(exercise):
    "The cell with the solution."
    chapter, i = EXERCISES[exercise]
    return cells(chapter)[i + 2]


def answer_of(cell, space, name):
    "What a cell's definitions and imports make of a name."
    space = dict(space)
    kept = ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom
    run([n for n in cell.tree.body if isinstance(n, kept)], space, "an answer")
    return space[name]


SETUP = {
    "workshop/archive": "mz = bytes(range(256)) * 5",
    "05_pack": (
        """
        from modelzip.quant import quantize_model
        model = LeNet5()
        save(model, folder / "mapped.mz", archive=False)"""
    ),
    "workshop/inspecting": (
        """
        from modelzip.quant import quantize_model
        model = LeNet5()
        save(model, folder / "archived.mz")
        save(quantize_model(model, 4), folder / "archived4.mz")"""
    ),
    "workshop/exchange": (
        """
        from modelzip.data import LeNet5
        model = LeNet5()
        state = model.state_dict()
        to_safetensors(model, folder / "l.safetensors")"""
    ),
    "workshop/recipe": (
        """
        import copy, torch
        from modelzip.data import LeNet5
        net = LeNet5().eval()
        with torch.no_grad(): net.fc1.weight.mul_(4)"""
    ),
}
