"""What cells give to a class with fastcore's `@patch`, written down in the class for checkers of types and editors.

A checker does not run `@patch`, so that it knows nothing of `report.table()`. tools/export.py gives each cell that becomes
a module to `with_declarations`: at the end of a class stands what is added below it, under `TYPE_CHECKING`, which is
false when the module runs. The notebooks stay as they are.
"""

import ast, copy, re, textwrap

HEAD = "    if TYPE_CHECKING:  # what cells below give it with @patch"
WIDTH = 120


def patches(sources):
    "Name of a class that these cells define → what they give it: the lines of its declarations."
    trees = [tree for s in sources if (tree := parsed(s)) is not None]
    classes = {n.name for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}
    found = {}
    for n in (n for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)):
        if (mark := patched(n)) is not None and (name := ast.unparse(n.args.args[0].annotation)) in classes:
            found.setdefault(name, []).extend(declaration(n, mark))
    return found


def parsed(source):
    try:
        return ast.parse(source)
    except SyntaxError:  # a magic
        return None


def patched(node):
    "None for a function of its own; else what it becomes: the decorator in a class, or nothing."
    for d in node.decorator_list:
        if ast.unparse(d).partition("(")[0] == "patch":
            how = {k.arg for k in d.keywords} if isinstance(d, ast.Call) else set()
            return "@property" if "as_prop" in how else "@classmethod" if "cls_method" in how else ""
    return None


def declaration(node, mark):
    "A method without its body, with the first paragraph of what it says of itself."
    f = copy.deepcopy(node)
    f.decorator_list, f.args.args[0].annotation = [], None
    f.args.args[0].arg = "cls" if mark == "@classmethod" else "self"
    given, returns = arguments(f.args), f" -> {ast.unparse(f.returns)}" if f.returns else ""
    head = f"def {f.name}({', '.join(given)}){returns}:"
    if len(head) > WIDTH - 8:
        head = f"def {f.name}(\n    " + "\n    ".join(a + "," for a in given) + f"\n){returns}:"
    said = textwrap.fill((ast.get_docstring(node) or "").partition("\n\n")[0], WIDTH - 15)
    quote = '"""' if "\n" in said or '"' in said else '"'
    escaped = said.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    body = [*f"{quote}{escaped}{quote}".splitlines(), "..."] if said and not said.endswith('"') else ["..."]
    lines = [*([mark] if mark else []), *head.splitlines(), *("    " + line for line in body), ""]
    return [(" " * 8 + line).rstrip() for line in lines]


def arguments(args):
    "Each argument as text, with stars, annotation and default."
    text = ast.unparse(args)
    cuts, depth, quoted = [-1], 0, None
    for i, c in enumerate(text):
        if quoted:
            quoted = None if c == quoted else quoted
        elif c in "\"'":
            quoted = c
        else:
            depth += (c in "([{") - (c in ")]}")
            if c == "," and not depth:
                cuts.append(i)
    each = [text[a + 1 : b].strip() for a, b in zip(cuts, [*cuts[1:], len(text)])]
    return [re.sub(r"^(\w+: [^=]*)=", r"\1 = ", a) for a in each]


def with_declarations(source, found):
    "A cell whose classes declare what they get."
    tree = parsed(source)
    lines = source.splitlines()
    for n in reversed(tree.body if tree and found else []):
        if isinstance(n, ast.ClassDef) and n.name in found:
            lines[n.end_lineno : n.end_lineno] = ["", HEAD, "", *found[n.name][:-1]]
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
        typing.names = sorted([*typing.names, ast.alias("TYPE_CHECKING")], key=lambda a: a.name)
        lines[typing.lineno - 1 : typing.end_lineno] = [ast.unparse(typing)]
    return "\n".join(lines)
