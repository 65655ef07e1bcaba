"""What checkers of types and editors cannot see in a class, declared in it.

They do not run fastcore's `@patch`, so that they know nothing of `report.table()`; and what `__init__` sets without an
annotation, each may infer as something else. tools/export.py gives each cell that becomes a module to
`with_declarations`: a class ends with what plainly follows, under `TYPE_CHECKING`, which is false when the module
runs. The notebooks stay as they are.
"""

import ast, copy, textwrap
from functools import cache

from docstrings import spots

HEAD = "    if TYPE_CHECKING:  # what its `__init__` sets, and what cells below give it with @patch"
WIDTH = 120
PLAIN = {"bool", "bytearray", "bytes", "float", "int", "str"}  # what a call of these returns
ARRAYS = {"np.arange", "np.empty", "np.full", "np.ones", "np.zeros"}
OPEN = {
    "Counter",
    "Future",
    "SimpleQueue",
    "TypeVar",
    "WeakIdKeyDictionary",
    "WeakKeyDictionary",
}  # of what is not said


def declarations(sources):
    "Name of a class that these cells define → the lines that declare what it has."
    trees = [tree for s in sources if (tree := parsed(s)) is not None]
    classes = {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}
    found = {}
    for name, c in classes.items():
        if kinds := attributes(c, classes):
            found[name] = [
                "",
                *(
                    f"        {a}: {ast.unparse(quoted(ast.parse(kind, mode='eval').body, classes))}"
                    for a, kind in kinds.items()
                ),
                "",
            ]
    for n in (n for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)):
        if (mark := patched(n)) is not None and (name := ast.unparse(n.args.args[0].annotation)) in classes:
            found.setdefault(name, [""]).extend(declaration(n, mark, classes))
    return found


@cache
def parsed(source):
    "The tree of a cell, which nobody changes; None for one with a magic."
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def patched(node):
    "None for a function of its own; else what it becomes: the decorator in a class, or nothing."
    for d in node.decorator_list:
        if ast.unparse(d).partition("(")[0] == "patch":
            how = {k.arg for k in d.keywords} if isinstance(d, ast.Call) else set()
            return "@property" if "as_prop" in how else "@classmethod" if "cls_method" in how else ""
    return None


def declaration(node, mark, classes):
    "A method without its body, with the first paragraph of what it says of itself; classes of its notebook are quoted."
    f = copy.deepcopy(node)
    others = [f"@{ast.unparse(d)}" for d in f.decorator_list if ast.unparse(d).partition("(")[0] != "patch"]
    f.args.args[0].annotation = None
    f.args.args[0].arg = "cls" if mark == "@classmethod" else "self"
    a = f.args
    for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
        if p is not None and p.annotation is not None:
            p.annotation = quoted(p.annotation, classes)
    given, returns = arguments(f), f" -> {ast.unparse(quoted(f.returns, classes))}" if f.returns else ""
    head = f"def {f.name}({', '.join(given)}){returns}:"
    if len(head) > WIDTH - 8:
        head = f"def {f.name}(\n    " + "\n    ".join(a + "," for a in given) + f"\n){returns}:"
    said = textwrap.fill((ast.get_docstring(node) or "").partition("\n\n")[0], WIDTH - 15)
    quote = '"""' if "\n" in said or '"' in said else '"'
    escaped = said.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    body = [*f"{quote}{escaped}{quote}".splitlines(), "..."] if said and not said.endswith('"') else ["..."]
    lines = [*([mark] if mark else []), *others, *head.splitlines(), *("    " + line for line in body), ""]
    return [(" " * 8 + line).rstrip() for line in lines]


def quoted(kind, classes):
    "An annotation that may name a class before it is there."
    known = any(isinstance(n, ast.Name) and n.id in classes for n in ast.walk(kind))
    return ast.Constant(in_text(kind)) if known else kind


def arguments(node):
    "Each argument as text, with stars, annotation and default."
    given = [
        name + (f": {ast.unparse(kind)}" if kind else "") + (f"{' = ' if kind else '='}{ast.unparse(d)}" if d else "")
        for name, kind, d, *_ in spots(node)
    ]
    a = node.args
    if a.kwonlyargs and not a.vararg:
        given.insert(len(a.posonlyargs) + len(a.args), "*")
    if a.posonlyargs:
        given.insert(len(a.posonlyargs), "/")
    return given


def attributes(c, classes):
    "Public attribute → type, of those that `__init__` sets without an annotation to something whose type is plain."
    init = next((n for n in c.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None or any("dataclass" in ast.unparse(d) for d in c.decorator_list):
        return {}
    nodes = list(ast.walk(init))
    changed = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    a = init.args
    known = {p.arg: in_text(p.annotation) for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.annotation}
    known = {name: kind for name, kind in known.items() if name not in changed}
    declared, said, found = declares(c, classes), of_bases(c, classes), {}
    for n in (n for n in nodes if isinstance(n, ast.Assign)):
        for target in n.targets:
            several = isinstance(target, ast.Tuple) and isinstance(n.value, ast.Tuple)
            if several and len(target.elts) == len(n.value.elts):
                pairs = zip(target.elts, n.value.elts)
            else:
                pairs = [(t, None) for t in target.elts] if isinstance(target, ast.Tuple) else [(target, n.value)]
            for t, value in pairs:
                if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self" and not t.attr.startswith("_"):
                    found.setdefault(t.attr, set()).add(value and kind_of(value, known))
    kinds = {n: said.get(n) or (k.pop() if len(k) == 1 else None) for n, k in found.items() if n not in declared}
    return {n: kind for n, kind in kinds.items() if kind}


def of_bases(c, classes):
    "What bases of the same notebook say of their attributes: attribute → type."
    bases = [classes[b.id] for b in c.bases if isinstance(b, ast.Name) and b.id in classes]
    said = [of_bases(b, classes) | attributes(b, classes) for b in bases]
    said += [
        {
            n.target.id: in_text(n.annotation)
            for n in b.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        for b in bases
    ]
    return {n: kind for one in said for n, kind in one.items()}


def declares(c, classes):
    "The attributes that a class itself says, or has as methods."
    targets = [n.target for n in ast.walk(c) if isinstance(n, ast.AnnAssign)]
    names = {t.attr if isinstance(t, ast.Attribute) else t.id for t in targets if not isinstance(t, ast.Subscript)}
    names |= {n.name for n in c.body if isinstance(n, ast.FunctionDef)}
    names |= {
        t.id for n in c.body if isinstance(n, ast.Assign) for t in ast.walk(n.targets[0]) if isinstance(t, ast.Name)
    }
    return names


def kind_of(value, known):
    "The type of an expression that is an argument, a number, a text, or a new object; None for others."
    if isinstance(value, ast.Name):
        return known.get(value.id)
    if isinstance(value, ast.Constant):
        return type(value.value).__name__ if type(value.value).__name__ in PLAIN else None
    if isinstance(value, ast.JoinedStr):
        return "str"
    if isinstance(value, ast.Dict) and value.keys:
        of = [{kind_of(v, known) for v in some} for some in (value.keys, value.values)]
        return f"dict[{of[0].pop()}, {of[1].pop()}]" if all(len(k) == 1 and None not in k for k in of) else None
    if isinstance(value, ast.Call) and isinstance(value.func, (ast.Name, ast.Attribute)):
        name = ast.unparse(value.func)
        last = name.rpartition(".")[2]
        if name in ARRAYS:
            return "np.ndarray"
        made = last[:1].isupper() and not last.isupper() and last not in OPEN
        return name if made or name in PLAIN else None
    if isinstance(value, ast.BinOp) and not isinstance(value.op, ast.Div):
        return "int" if kind_of(value.left, known) == kind_of(value.right, known) == "int" else None
    return None


def in_text(kind):
    "An annotation as it is read; one that is quoted, without its quotes."
    return kind.value if isinstance(getattr(kind, "value", None), str) else ast.unparse(kind)


def with_declarations(source, found):
    "A cell whose classes declare what they get."
    tree = parsed(source) if found else None
    lines = source.splitlines()
    for n in reversed(tree.body if tree else []):
        if isinstance(n, ast.ClassDef) and n.name in found:
            lines[n.end_lineno : n.end_lineno] = ["", HEAD, *found[n.name][:-1]]
    return "\n".join(lines)


def with_import(source):
    "The first cell of a module that imports, with `TYPE_CHECKING`; None when it imports nothing."
    tree = parsed(source)
    imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))] if tree else []
    if not imports:
        return None
    lines = source.splitlines()
    typing = next((n for n in imports if isinstance(n, ast.ImportFrom) and n.module == "typing"), None)
    if typing is None:
        lines.insert(imports[0].lineno - 1, "from typing import TYPE_CHECKING")
    else:
        names = sorted([*typing.names, ast.alias("TYPE_CHECKING")], key=lambda a: a.name)
        lines[typing.lineno - 1 : typing.end_lineno] = [ast.unparse(ast.ImportFrom("typing", names, 0))]
    return "\n".join(lines)
