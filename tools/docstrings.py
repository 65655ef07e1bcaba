"""Comments beside arguments, as a section "Parameters" of the docstring (numpydoc's form): what `help` and editors show.

tools/export.py gives each cell that becomes a module to `with_parameters`; the notebooks stay as they are.
"""

import ast, io, textwrap, tokenize
from functools import cache

WIDTH = 118


def with_parameters(
    source,  # of a cell
    known=None,  # name of a function → (definition, its cell's source), for options that are handed on
):
    "The cell with sections in the docstrings of its public functions and classes; what it does stays the same."
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic
        return source
    if not any(map(is_public, tree.body)):
        return source
    said, lines = comments(source), source.splitlines()
    found = [(node.body[0], text) for node, text in documented(tree, said, known or {})]
    if not found:
        return source
    for doc, text in sorted(found, key=lambda pair: -pair[0].lineno):
        lines[doc.lineno - 1 : doc.end_lineno] = text
    new = "\n".join(lines)
    assert same_program(ast.parse(new), tree), new
    return new


def is_public(node):
    "Whether a statement defines something for users."
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")


def documented(tree, said, known):
    "Each public definition whose docstring gets a section, with the lines of the new docstring."
    for n in tree.body:
        if is_public(n):
            if ast.get_docstring(n) and (text := docstring(n, said, known)):
                yield n, text
            if isinstance(n, ast.ClassDef):
                yield from documented(n, said, known)


def docstring(node, said, known):
    "The lines of a docstring with its sections; None where there is nothing to say beside the arguments."
    made = takes(node)
    if made is None:  # a class that takes what a base takes
        bases = [known[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in known]
        if not bases:
            return None
        made, said = known_of(bases[0])
    given, gives = parameters(made, said, known), returned(made, said) if made is node else None
    if not any(text for *_, text in given) and not gives:
        return None
    old = node.body[0]
    indent = " " * old.col_offset
    text = ast.get_docstring(node).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    first, *rest = text.strip().splitlines()
    body = [
        *(textwrap.wrap(first, WIDTH - len(indent) - 3) if len(first) > WIDTH - len(indent) - 1 else [first]),
        *rest,
        "",
    ]
    if given:
        body += ["Parameters", "----------", *(line for p in given for line in entry(p, indent)), ""]
    if gives:
        body += ["Returns", "-------", *entry(gives, indent), ""]
    quoted = ['"""' + body[0], *body[1:-1], '"""']
    return [(indent + line).rstrip() for line in quoted]


def known_of(entry):
    "A definition, and the comments of its cell."
    return entry[0], comments(entry[1])


def takes(node):
    "What says the arguments: a function, the fields of a dataclass, the `__init__` of another class."
    if isinstance(node, ast.ClassDef) and not fields(node):
        return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    return node


def entry(parameter, indent):
    "The lines of one parameter."
    name, kind, default, text = parameter
    head = " : ".join(x for x in (name, kind) if x) + (f", default {default}" if default is not None else "")
    wrap = dict(width=WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    lines = textwrap.wrap(head, subsequent_indent="  ", **wrap)
    lines += textwrap.wrap(text, initial_indent="    ", subsequent_indent="    ", **wrap) if text else []
    return [line.replace("\\", "\\\\").replace('"""', '\\"\\"\\"') for line in lines]


def parameters(node, said, known=None):
    "(name, kind, default, comment) of each argument of a function, or field of a dataclass; what is handed on, too."
    written, found = {p[0].lstrip("*") for p in spots(node)}, []
    beside = comments_beside(node, said)
    for name, kind, value, *_ in spots(node):
        plain = name.lstrip("*")
        if plain in ("self", "cls"):
            continue
        handed = handed_on(node, known or {}) if name.startswith("**") else []
        if handed:
            for p in handed:  # of two that have an option, the first shows it
                if p[0] not in written:
                    found.append(p)
                    written.add(p[0])
        else:
            found.append((name, in_text(kind), value and ast.unparse(value), beside.get(plain)))
    return found


def handed_on(node, known):
    "The parameters of the functions that take a function's further options: those with a default."
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "options_of":
            but = [ast.literal_eval(k.value) for k in mark.keywords if k.arg == "but"]
            names = [getattr(a, "id", None) or a.attr for a in mark.args]
            given = [p for n in names for p in parameters(*known_of(known[n]), known)]
            return [p for p in given if p[2] is not None and p[0] not in (but or [()])[0]]
    return []


def returned(node, said):
    "What a function returns, as a parameter without a name."
    text = comments_beside(node, said).get("return")
    return (None, in_text(node.returns), None, text) if text and node.returns else None


def in_text(kind):
    "An annotation as it is read; one that is quoted, without its quotes."
    return kind and (kind.value if isinstance(getattr(kind, "value", None), str) else ast.unparse(kind))


def fields(node):
    "The fields of a dataclass or of a named tuple."
    marks = [ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in node.decorator_list]
    if "dataclass" not in marks and not any("NamedTuple" in ast.unparse(b) for b in node.bases):
        return []
    return [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def spots(node):
    "(name with its stars, annotation, default, first line, last line) of each argument or field."
    if isinstance(node, ast.ClassDef):
        return [(n.target.id, n.annotation, n.value, n.lineno, n.end_lineno) for n in fields(node)]
    a = node.args
    plain = [("", p) for p in (*a.posonlyargs, *a.args)]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    pairs = [*zip(plain, defaults), *((("*", p), None) for p in [a.vararg] if p)]
    pairs += [*zip((("", p) for p in a.kwonlyargs), a.kw_defaults), *((("**", p), None) for p in [a.kwarg] if p)]
    return [(s + p.arg, p.annotation, d, p.lineno, (d or p).end_lineno) for (s, p), d in pairs]


@cache
def comments(source):
    "Line → (whether it has nothing else, text) of each comment."
    lines = source.splitlines()
    found = {}
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == tokenize.COMMENT:
            alone = not lines[t.start[0] - 1][: t.start[1]].strip()
            found[t.start[0]] = alone, t.string.lstrip("# ").rstrip()
    return found


def comments_beside(node, said):
    "Name of an argument, or `return` → what stands beside it, or above it on lines of their own."
    places = spots(node)
    if isinstance(node, ast.ClassDef):
        first, last, gives = node.lineno, places[-1][4], None
    else:
        first, last, gives = node.lineno, node.body[0].lineno - 1, node.returns
    found = {}
    for line in range(first, last + 1):
        if line not in said:
            continue
        alone, text = said[line]
        within = [p for p in places if p[3] <= line <= p[4]]
        if alone:
            name = next((p[0] for p in (*within, *places) if p in within or p[3] > line), None)
        elif gives is not None and gives.lineno <= line and line >= gives.end_lineno:
            name = "return"
        else:
            name = next((p[0] for p in reversed(places) if p[3] <= line), None)
        if name is not None:
            found.setdefault(name.lstrip("*"), []).append(text)
    return {name: " ".join(texts) for name, texts in found.items()}


def same_program(a, b):
    "Whether two trees are the same but for what docstrings say."
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_program, a, b))
    if not isinstance(a, ast.AST):
        return a == b
    documented = isinstance(a, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    if documented and ast.get_docstring(a) and ast.get_docstring(b):
        a, b = (type(t)(**{**vars(t), "body": t.body[1:]}) for t in (a, b))
    return all(same_program(getattr(a, f, None), getattr(b, f, None)) for f in a._fields)
