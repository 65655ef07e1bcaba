"""The picture of the house in CONTRIBUTING.md, made from the notebooks and from the site's sidebar.

    python tools/house.py write     put it between the two marks in CONTRIBUTING.md
    python tools/house.py check     exit 1 when what stands there is out of date

A floor is a part of the book: its chapters, and the groups of workshop notebooks that they are built from. Where a
notebook stands says `_quarto.yml`; on which floor a group of the workshop lies says `FLOORS`, from the ground up.
"""

import ast, graphlib, json, re, sys
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE, MARK = ROOT / "CONTRIBUTING.md", "<!-- the house: made by tools/house.py -->"
FLOORS = {
    "Tools": ["Data, models, measuring", "Explorers", "Models as callers hand them over"],
    "A smaller number": ["Matrices and compressed layers", "Coders", "Files", "Kernels"],
    "Fewer numbers": ["Layers one by one", "Pruning", "The tracer", "Rewriting and teaching models"],
    "Better numbers": ["Calibration"],
    "Many at once": ["Waiting and sending"],
    "All together": ["Language", "Running and repeating"],
}


def source(path):
    cells = json.loads((ROOT / "nbs" / path).read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def modules():
    "Notebook (its path under nbs/) → the module that it makes: `workshop.rules`, or None."
    found = sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "nbs/workshop").glob("*.ipynb"))
    paths = [p.relative_to(ROOT / "nbs").as_posix() for p in found]
    made = {p: re.search(r"^#\| *default_exp +(\S+)", source(p), re.M) for p in paths}
    return {p: m and m[1] for p, m in made.items()}


def imports(module, known):
    "The modules of the house that one imports when it is imported itself, not later, inside a function."
    tree = ast.parse((ROOT / "modelzip" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    package = ["modelzip", *module.split(".")[:-1]]
    found = set()
    for n in tree.body:
        if isinstance(n, ast.ImportFrom):
            base = package[: len(package) - n.level + 1] if n.level else []
            base = ".".join(base + ([n.module] if n.module else []))
            found |= {base, *(f"{base}.{a.name}" for a in n.names)}
        elif isinstance(n, ast.Import):
            found |= {a.name for a in n.names}
    return {f.removeprefix("modelzip.") for f in found} & known - {module}


@cache
def rooms():
    "Room → its notebooks, from the ground up: (floor, '' for the chapters, else the workshop's group)."
    bar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    parts = {s["section"]: s["contents"] for s in bar if isinstance(s, dict)}
    groups = {s["section"]: s["contents"] for s in parts["Workshop"]}
    found = {}
    for floor, names in FLOORS.items():
        found |= {(floor, g): groups.pop(g) for g in names}
        found[floor, ""] = parts[floor]
    assert not groups, f"on no floor: {list(groups)} (see FLOORS in tools/house.py)"
    return found


def homeless():
    "Notebooks of the workshop and chapters that have no place in the sidebar."
    placed = {p for paths in rooms().values() for p in paths}
    return [p for p in modules() if p not in placed and (p[0].isdigit() or p.startswith("workshop/"))]


@cache
def uses():
    "Module → the modules that it imports."
    known = {m for m in modules().values() if m}
    return {m: imports(m, known) for m in sorted(known)}


def upward():
    "Imports that go from a floor to one above it: (module, module)."
    floors, made = list(FLOORS), modules()
    floor = {made[p]: floors.index(f) for (f, _), paths in rooms().items() for p in paths if p in made}
    return [(a, b) for a, used in uses().items() for b in sorted(used) if floor.get(a, 99) < floor.get(b, 99)]


def below(module, used, chapters):
    "The chapters that a chapter stands on: those that it imports, or that a notebook of the workshop between them does."
    found, seen, todo = set(), {module}, list(used[module])
    while todo:
        m = todo.pop()
        if m in chapters:
            found.add(m)
        elif m not in seen:
            todo += used[m]
        seen.add(m)
    return found - {module}


def picture():
    "The chapters and what stands on what, without the lines that follow from others, as a mermaid graph."
    made, used = modules(), uses()
    placed = {f: [p for p in rooms()[f, ""] if made.get(p)] for f in FLOORS}
    chapters = {made[p]: p for paths in placed.values() for p in paths}
    stands = {m: below(m, used, chapters) for m in chapters}
    far = {}
    for m in graphlib.TopologicalSorter(stands).static_order():
        far[m] = set().union(*(far[b] | {b} for b in stands[m]))
    lines = ["```mermaid", "flowchart BT"]
    for i, (floor, paths) in enumerate(placed.items()):
        lines += [f'  subgraph f{i}["{floor}"]', *(f'    {made[p]}["{p[:-6]}"]' for p in paths), "  end"]
    for m, on in stands.items():
        lines += [f"  {b} --> {m}" for b in sorted(on) if not any(b in far[c] for c in on)]
    return "\n".join([*lines, "```"])


def table():
    "All rooms from the roof down, the notebooks in them, and the rooms that they use on their own floor and below."
    made, used = modules(), uses()
    name = lambda f, g: g or f"*{f}* (chapters)"
    home = {made[p]: r for r, paths in rooms().items() for p in paths if made.get(p)}
    lines = ["| floor | room | notebook → module, where that has another name | uses |", "|---|---|---|---|"]
    for (floor, group), paths in reversed(rooms().items()):
        paths = [p for p in paths if p in made]
        on = {home[b] for p in paths if made[p] for b in used[made[p]] if b in home} - {(floor, group)}
        shown = [entry(p, made[p]) for p in paths]
        lines.append(
            f"| {floor} | {group or '*its chapters*'} | {', '.join(shown)} | {' · '.join(name(*r) for r in rooms() if r in on)} |"
        )
    return "\n".join(lines)


def entry(path, module):
    "A notebook in the table; with its module, where it is not called as the notebook is."
    stem = path.removesuffix(".ipynb").removeprefix("workshop/")
    short = re.sub(r"^\d+[a-z]?_", "", stem)
    usual = f"workshop.{stem}" if path.startswith("workshop/") else short
    other = "" if module == usual else f" → {module}" if module else " → none"
    return f"[{stem}](nbs/{path}){other}"


def text():
    return f"{MARK}\n\n{picture()}\n\n{table()}\n\n{MARK}"


def page():
    "CONTRIBUTING.md as it should be."
    before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
    return before + text() + after


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write"]:
            PAGE.write_text(page(), encoding="utf-8")
        case ["check"]:
            sys.exit(page() != PAGE.read_text(encoding="utf-8"))
        case _:
            sys.exit(__doc__)
