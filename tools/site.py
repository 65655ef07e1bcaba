"""The site: saved notebooks → pages that need no kernel and no network.

    python tools/site.py build [folder]     render nbs/ to _docs/ (or to the folder)
    python tools/site.py check [folder]     what is wrong with it: links, network, figures, math, hidden cells, sizes

Nothing is executed: a page shows what its notebook has saved. Notebooks are first prepared (hidden cells and nbdev's
directives dropped, the output of `show_doc` set as documentation, names in backticks linked to where they are
defined), then rendered by Quarto where it is on PATH, and by smalldocs elsewhere. nbdev's own `nbdev_docs` is not
used for that, because it leaves out the code of every exported cell: here that code is the book.
"""
import ast, html, json, os, re, shutil, subprocess, sys, tempfile
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(__file__).resolve().parent / "site"
KATEX = "site_libs/katex"
DIRECTIVE = re.compile(r"^\s*#\|\s*([\w-]+)")
HIDE = {"hide", "default_exp", "exporti_hide"}
QUARTO = re.compile(r"^\s*#\|\s*(code-[\w-]+|fig-[\w-]+|tbl-[\w-]+|layout-[\w-]+|column|echo|output|include|label)\s*:")


# ------------------------------------------------------------------------------------------------ preparing notebooks

def directives(source):
    "The names of the `#| …` lines of a cell."
    return {m[1] for line in source.splitlines() if (m := DIRECTIVE.match(line))}


def is_hidden(cell):
    "Whether a reader of the site is not meant to see a cell."
    return cell["cell_type"] == "code" and bool(directives(text(cell)) & HIDE)


def text(cell):
    return "".join(cell["source"])


def definitions(source):
    "The public functions and classes that a cell defines; methods are left out."
    try: tree = ast.parse(source)
    except SyntaxError: return []
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


def chapters(folder):
    "The notebooks of the book, in order."
    return sorted(p for p in Path(folder).glob("*.ipynb") if not p.name.startswith("."))


def symbols(folder):
    "Where each exported name is defined: name → `03_quant.ipynb#def-quantize`."
    where = {}
    for path in chapters(folder):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and directives(text(cell)) & {"export", "exporti", "exports"}:
                names = definitions(text(cell))
                if names: where.update({n: f"{path.name}#def-{names[0]}" for n in names})
    return where


def front_matter(source):
    "nbdev's first cell (`# Title`, `> description`) as YAML front matter, and the rest of the cell."
    title = re.search(r"^# +(.+)$", source, re.M)
    if not title: return None, source
    rest = source[:title.start()] + source[title.end():]
    quote = re.match(r"\s*((?:>.*\n?)+)", rest)
    head = {"title": title[1].strip()}
    if quote:
        head["description"] = " ".join(line.lstrip("> ").strip() for line in quote[1].strip().splitlines())
        rest = rest[quote.end():]
    return head, rest


def linked(source, where, page):
    "Link the first mention of every exported name in backticks; headings, code blocks and links stay as they are."
    done, fenced, lines = set(), False, []
    for line in source.split("\n"):
        if line.lstrip().startswith(("```", "~~~")): fenced = not fenced
        if not fenced and not line.startswith(("#", "    ")):
            def link(m):
                name = m[2].removesuffix("()")
                if m[1] or name not in where or name in done: return m[0]
                done.add(name)
                return f"[`{m[2]}`]({where[name].removeprefix(page)})"
            line = re.sub(r"(\[[^\]]*\]\([^)]*\)|\[[^\]]*\])|(?<!`)`([\w.]+(?:\(\))?)`(?!`)", lambda m: m[0] if m[1] else link(m), line)
        lines.append(line)
    return "\n".join(lines)


def documentation(markdown):
    "What `show_doc` saved, as a block of its own: signature as code, then the text and the table of arguments."
    body = re.sub(r"^\s*---\s*\n", "", markdown).strip()
    name = re.search(r"^#+ +(\S+)", body, re.M)
    body = re.sub(r"^\[source\]\(.*?\).*$", "", body, flags=re.M)
    body = re.sub(r"^#+ +.*$", "", body, count=1, flags=re.M)
    def signature(m): return "\n```python\n" + "\n".join(re.sub(r"^> {0,6}", "", l) for l in m[0].strip("\n").split("\n")) + "\n```\n"
    body = re.sub(r"(?:^> {2,}.*\n?)+", signature, body, count=1, flags=re.M)
    return f"::: {{.api}}\n\n{body.strip()}\n\n:::\n" if name else body


def prepare(path, where):
    "One notebook as the renderers are to see it."
    book = json.loads(path.read_text(encoding="utf-8"))
    cells, labelled = [], set()
    for i, cell in enumerate(book["cells"]):
        source = text(cell)
        if is_hidden(cell) or not source.strip(): continue
        if cell["cell_type"] == "markdown":
            if not cells:
                head, source = front_matter(source)
                if head: cells.append({"cell_type": "raw", "metadata": {}, "source": "---\n" + yaml.safe_dump(head, allow_unicode=True, sort_keys=False) + "---\n"})
                if not source.strip(): continue
            source = linked(source.replace("](nbs/", "]("), where, path.name)
            cells.append({**cell, "source": source})
        elif cell["cell_type"] == "code": cells.append(prepare_code(cell, source, where, path.name, labelled))
        else: cells.append(cell)
    return {**book, "cells": cells}


def prepare_code(cell, source, where, page, labelled):
    "A code cell without nbdev's directives, with an anchor where it defines something that others link to."
    names, lines = directives(source), source.splitlines()
    keep = [l for l in lines if QUARTO.match(l)]
    code = "\n".join(l for l in lines if not DIRECTIVE.match(l)).strip("\n")
    shown = re.match(r"\s*show_doc\(", code)
    if "hide_input" in names or shown: keep.append("#| echo: false")
    if "hide_output" in names: keep.append("#| output: false")
    defined = definitions(code)
    if defined and where.get(defined[0]) == f"{page}#def-{defined[0]}" and defined[0] not in labelled:
        labelled.add(defined[0])
        keep.append(f"#| label: def-{defined[0]}")
    outputs = [document_output(o) if shown else o for o in cell.get("outputs", []) if not is_noise(o)]
    return {**cell, "source": "\n".join(keep + [code]), "outputs": outputs}


def is_noise(output):
    "Whether an output is left out: the text of a figure, and what goes to standard error."
    return output.get("name") == "stderr"


def document_output(output):
    "The output of show_doc, made ready for the page."
    data = output.get("data", {})
    if "text/markdown" not in data: return output
    return {**output, "data": {"text/markdown": documentation("".join(data["text/markdown"]))}}


# ------------------------------------------------------------------------------------------------ rendering

def config(present):
    "`_quarto.yml` with the chapters that are there."
    settings = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    def pruned(items):
        out = []
        for item in items:
            if isinstance(item, str) and item in present: out.append(item)
            elif isinstance(item, dict) and (inside := pruned(item["contents"])): out.append({**item, "contents": inside})
        return out
    bar = settings["website"]["sidebar"]
    bar["contents"] = pruned(bar["contents"])
    return settings


def listed(contents):
    "All notebooks that a sidebar names."
    return [n for c in contents for n in (listed(c["contents"]) if isinstance(c, dict) else [c])]


def stage(nbs, folder):
    "Everything that a renderer reads, in one folder."
    where, present = symbols(nbs), {p.name for p in chapters(nbs)}
    for path in chapters(nbs):
        (folder / path.name).write_text(json.dumps(prepare(path, where), ensure_ascii=False), encoding="utf-8")
    if "index.ipynb" not in present:
        (folder / "index.md").write_text("---\ntitle: modelzip\n---\n" + "".join(f"- [{p.stem}]({p.name})\n" for p in chapters(nbs)), encoding="utf-8")
    settings = config(present)
    (folder / "_quarto.yml").write_text(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8")
    shutil.copy(ASSETS / "book.css", folder / "book.css")


def by_smalldocs(folder, out):
    "Render with smalldocs, then take its pages off the network."
    from smalldocs.config import load
    from smalldocs.site import Site
    site = Site(load(folder), quiet=True)
    site.out = out.resolve()
    site.build()
    for warning in site.warnings: print("warning:", warning, file=sys.stderr)
    shutil.copytree(ASSETS / "katex", out / KATEX)
    for page in out.glob("*.html"): replace(page, {r"https://cdn\.jsdelivr\.net/npm/katex@[^/]+/dist(/contrib)?": KATEX})
    for css in out.glob("site_libs/**/*.css"): replace(css, {r"@import\s+url\([^)]*\);?": ""})
    offline_search(out)


def replace(path, patterns):
    old = new = path.read_text(encoding="utf-8")
    for pattern, by in patterns.items(): new = re.sub(pattern, by, new)
    if new != old: path.write_text(new, encoding="utf-8")


def offline_search(out):
    "The search index as a script: unlike fetch, it also loads from file://."
    index = (out / "search.json").read_text(encoding="utf-8")
    (out / "search.js").write_text(f"window.searchIndex = {index};\n", encoding="utf-8")
    load = ('index = await new Promise((good, bad) => { const s = document.createElement("script"); s.src = offset + "search.js"; '
            "s.onload = () => good(window.searchIndex); s.onerror = bad; document.head.append(s); });")
    script = out / "site_libs/smalldocs.js"
    old = script.read_text(encoding="utf-8")
    new = re.sub(r'const r = await fetch\(offset \+ "search\.json"\);\s*index = await r\.json\(\);', lambda m: load, old)
    if new == old: raise SystemExit("smalldocs.js reads its search index in a new way: adapt offline_search in tools/site.py")
    script.write_text(new, encoding="utf-8")


def by_quarto(folder, out):
    "Render with Quarto, with the same KaTeX beside the pages."
    settings = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
    settings["format"]["html"]["html-math-method"] = {"method": "katex", "url": f"{KATEX}/"}
    settings["execute"] = {"enabled": False}
    (folder / "_quarto.yml").write_text(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8")
    subprocess.run(["quarto", "render", str(folder), "--no-execute"], check=True)
    made = folder / settings["project"]["output-dir"]
    shutil.copytree(made, out, dirs_exist_ok=True)
    shutil.copytree(ASSETS / "katex", out / KATEX, dirs_exist_ok=True)


def build(out=ROOT / "_docs", nbs=ROOT / "nbs"):
    "Render all chapters into a folder; what was there is replaced only when everything went well."
    out = Path(out).resolve()
    with tempfile.TemporaryDirectory() as tmp:
        source, made = Path(tmp) / "book", Path(tmp) / "made"
        source.mkdir()
        stage(nbs, source)
        (by_quarto if shutil.which("quarto") else by_smalldocs)(source, made)
        if out.exists():
            if any(out.iterdir()) and not (out / "site_libs").is_dir(): raise SystemExit(f"{out} is not empty and not a site: give another folder")
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, out)
    return out


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", *folder]: print(build(*folder))
        case _: sys.exit(__doc__)
