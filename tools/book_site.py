"""The site: saved notebooks → pages that need no kernel and no network.

    python tools/book_site.py build [folder]     render nbs/ to _docs/ (or to the folder)
    python tools/book_site.py check [folder]     what is wrong with it: links, network, figures, math, hidden cells, sizes

Nothing is executed: a page shows what its notebook has saved. Chapters, translations and the workshop's notebooks lie
side by side on the site: nbs/workshop/explore.ipynb is workshop_explore.html, nbs/zh/90_article.ipynb is
zh_90_article.html. Notebooks are first prepared (hidden cells and nbdev's directives dropped, the output of `show_doc`
set as documentation, names in backticks linked to where they are defined), then rendered by Quarto where it is on PATH,
and by smalldocs elsewhere. nbdev's own `nbdev_docs` is not used for that, because it leaves out the code of every
exported cell: here that code is the book.

A cell that is nothing but the comment `<!-- try: digits -->` becomes tools/site/try/digits.html: what readers of the site
try for themselves, with the scripts try.js beside it and mz.js, a second reader of .mz files; explorers that compute have
live.js, and weights.js with numbers of a real model.
"""

import ast, base64, configparser, gc, json, re, shutil, subprocess, sys, tempfile
from contextlib import contextmanager
from functools import cache, cached_property
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakKeyDictionary

import yaml

import access, api, figures
from translations import MARK

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(__file__).resolve().parent / "site"
KATEX = "site_libs/katex"
TRIES, TRIED = ASSETS / "try", "site_libs/try"
DIRECTIVE = re.compile(r"^\s*#\|\s*([\w-]+)")
HIDE = {"hide", "default_exp", "exporti_hide"}
THEMES = {"light.css": "cosmo", "dark.css": "darkly"}  # our colours, and the sheet at whose end they stand
DEFINES = re.compile(r"^(?:async )?(?:def|class)\b", re.M)  # what need not be parsed where it is not found
IMPORTS = re.compile(r"(?:[ \t]*(?:#.*)?\n)*(?:import|from|_all_)\b")
SHORT = 44  # characters of code that fit on a telephone
LANGUAGES = {  # of translations, with what the site says around what a notebook says
    "zh": {
        "{} min to read": "阅读约 {} 分钟",
        "{} to run": "运行约 {}",
        "open in {}": "在 {} 中打开",
        "On this page": "本页内容",
        "Imports": "导入",
        "Solution": "解答",
    }
}
TRY = re.compile(r"<!-- try: (\w+) -->")  # a cell of nothing else: what tools/site/try/ has of that name stands there
QUARTO = re.compile(r"^\s*#\|\s*(code-[\w-]+|fig-[\w-]+|tbl-[\w-]+|layout-[\w-]+|column|echo|output|include|label)\s*:")


# ------------------------------------------------------------------------------------------------ preparing notebooks


def directives(source):
    "The names of the `#| …` lines of a cell."
    return {m[1] for line in source.splitlines() if (m := DIRECTIVE.match(line))}


def is_hidden(cell):
    "Whether a reader of the site is not meant to see a cell: plumbing, and what is for instructors (tools/course.py)."
    told = "instructor" in cell.get("metadata", {}).get("tags", [])
    return told or cell["cell_type"] == "code" and bool(directives(text(cell)) & HIDE)


def is_folded(cell):
    "Whether a cell is shown only to whoever unfolds it."
    return bool(re.search(r"^#\| *code-fold: *true", text(cell), re.M)) or is_imports(text(cell))


@cache
def parsed(code):
    try:
        return ast.parse(code).body
    except SyntaxError:
        return []


def statements(source):
    "What a cell consists of; nothing where it is no Python."
    return parsed("\n".join(l for l in source.splitlines() if not DIRECTIVE.match(l)).strip("\n"))


def is_imports(source):
    "Whether a cell only imports, and says with `_all_` what of that is for users: then it is folded by itself."
    if not IMPORTS.match(source):
        return False
    kinds = {type(n) for n in statements(source) if not says_all(n)}
    return bool(kinds) and kinds <= {ast.Import, ast.ImportFrom}


def says_all(node):
    "Whether a statement is `_all_ = …` or `_all_ += …`."
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {getattr(t, "id", "") for t in targets} == {"_all_"}


def text(cell):
    return "".join(cell["source"])


def definitions(source):
    """The public functions and classes that a cell defines; methods are left out, those too that are patched onto a
    class."""

    def is_patch(d):
        return "patch" in ast.unparse(d)

    if not DEFINES.search(source):
        return []
    return [
        n.name
        for n in statements(source)
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
        and not n.name.startswith("_")
        and not any(map(is_patch, n.decorator_list))
    ]


def chapters(folder):
    "The notebooks of the book, in order."
    return sorted(p for p in Path(folder).glob("*.ipynb") if not p.name.startswith("."))


def workshop(folder):
    "The notebooks of the workshop, in order."
    return chapters(Path(folder) / "workshop")


def notebooks(folder):
    "All that have a page."
    return chapters(folder) + workshop(folder) + translations(folder)


def in_workshop(path):
    return path.parent.name == "workshop"


def translations(folder):
    "The notebooks in other languages, each in the folder of its language: `zh/90_article.ipynb`."
    return [p for code in LANGUAGES for p in chapters(Path(folder) / code)]


def language(path):
    return path.parent.name if path.parent.name in LANGUAGES else "en"


def say(words, path):
    "What the site says on a notebook's page, in its language."
    return LANGUAGES.get(language(path), {}).get(words, words)


def versions(path):
    "Language → the notebook in it: a chapter and its translations."
    home = path.parent if language(path) == "en" else path.parent.parent
    there = {"en": home / path.name} | {code: home / code / path.name for code in LANGUAGES}
    return {code: p for code, p in there.items() if p.is_file()}


def within(path):
    "The folder of nbs/ in which a notebook lies: `workshop/`, that of a language, or none."
    return f"{path.parent.name}/" if path.parent.name in {"workshop", *LANGUAGES} else ""


def page_name(path):
    "What a notebook is called on the site, where all of them lie in one folder."
    return within(path).replace("/", "_") + path.name


def site_links(source, path):
    "Links between notebooks, as they are where all of them lie in one folder."
    if within(path):
        source = re.sub(r"\]\((?!\.\.)(\w+\.ipynb)", rf"]({within(path)}\1", source).replace("](../", "](")
    return re.sub(rf"\]\((workshop|{'|'.join(LANGUAGES)})/", r"](\1_", source.replace("](nbs/", "]("))


def defined_in(path):
    "Where each name is defined that a notebook exports: name → `03a_qtensor.ipynb#def-quantize`."
    where = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and directives(text(cell)) & {"export", "exporti", "exports"}:
            names = definitions(text(cell))
            where.update({n: f"{page_name(path)}#def-{names[0]}" for n in names})
    return where


def symbols(folder):
    """Where each name is defined that a reader may meet: all that chapters export, and what of the workshop is public.
    (Names that only the workshop uses, such as `page`, are words elsewhere.)"""
    users = set().union(*(api.public(name) for name in api.modules()))
    built = {n: place for path in workshop(folder) for n, place in defined_in(path).items() if n in users}
    return built | {n: place for path in chapters(folder) for n, place in defined_in(path).items()}


def titles(folder):
    "The title of each notebook, by its page's name."
    first = lambda p: next(
        "".join(c["source"]) for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"
    )
    return {page_name(p): (front_matter(first(p))[0] or {"title": p.stem})["title"] for p in notebooks(folder)}


def front_matter(source):
    "nbdev's first cell (`# Title`, `> description`) as YAML front matter, and the rest of the cell."
    title = re.search(r"^# +(.+)$", source, re.M)
    if not title:
        return None, source
    rest = source[: title.start()] + source[title.end() :]
    quote = re.match(r"\s*((?:>.*\n?)+)", rest)
    head = {"title": title[1].strip()}
    if quote:
        head["description"] = " ".join(line.lstrip("> ").strip() for line in quote[1].strip().splitlines())
        rest = rest[quote.end() :]
    return head, rest


# Prose is read at 238 words a minute (M. Brysbaert, How many words do we read per minute?, Journal of Memory and Language
# 109, 2019: the mean of 190 studies of silent reading in English). For code there is no such mean; our rule is ten lines
# a minute, 600 an hour: somewhat above the 500 an hour beyond which reviewers were seen to overlook errors (J. Cohen, Best
# Kept Secrets of Peer Code Review, 2006). A formula that stands by itself is a sentence: 15 words. Folded cells (imports,
# solutions) are not counted, nor is the time that an exercise takes.
WORDS_A_MINUTE, LINES_A_MINUTE, WORDS_A_FORMULA = 238, 10, 15


def minutes_to_read(cells):
    "How long the prose and the code of a page take to read: what is shown and not folded."
    words = lines = 0
    for c in cells:
        if is_hidden(c):
            continue
        if c["cell_type"] == "markdown":
            prose = re.sub(r"\$\$.*?\$\$", " word " * WORDS_A_FORMULA, text(c), flags=re.S)
            words += sum(bool(re.search(r"\w", w)) for w in prose.split())
        elif c["cell_type"] == "code" and not is_folded(c):
            lines += sum(bool(l.strip()) and not DIRECTIVE.match(l) for l in text(c).splitlines())
    return max(1, round(words / WORDS_A_MINUTE + lines / LINES_A_MINUTE))


def duration(seconds):
    "Seconds as a reader wants to know them: `15 s`, `3 min`."
    return f"{max(5, -(-seconds // 5) * 5)} s" if seconds <= 90 else f"{round(seconds / 60)} min"


@cache
def settings():
    "What settings.ini says."
    read = configparser.ConfigParser(delimiters=["="], interpolation=None)
    read.read(ROOT / "settings.ini", encoding="utf-8")
    return read["DEFAULT"]


def repository():
    "Address and branch of the book's source."
    return settings()["git_url"], settings()["branch"]


def at_a_glance(path, cells):
    """The line under a chapter's title: how long it takes to read and to run, and where it can be run without
    installing anything."""
    url, branch = repository()
    where, times = urlsplit(url).path.strip("/"), ROOT / "bench/results/chapter_times.json"
    file = f"nbs/{within(path)}{path.name}"
    key = f"{'workshop/' if in_workshop(path) else ''}{path.stem}"
    seconds = json.loads(times.read_text(encoding="utf-8")).get(key) if times.exists() else None
    facts = [say("{} min to read", path).format(minutes_to_read(cells))]
    facts += [] if seconds is None else [say("{} to run", path).format(duration(seconds))]
    places = {
        "Colab": f"https://colab.research.google.com/github/{where}/blob/{branch}/{file}",
        "Binder": f"https://mybinder.org/v2/gh/{where}/{branch}?urlpath={quote(f'lab/tree/{file}', safe='')}",
        "GitHub": f"{url}/blob/{branch}/{file}",
    }
    links = " · ".join(f"[{name}]({address})" for name, address in places.items())
    return "::: {.at-a-glance}\n\n" + " · ".join([*facts, say("open in {}", path).format(links)]) + "\n\n:::\n"


def linked(source, where, page):
    "Link the first mention of every exported name in backticks; headings, code blocks and links stay as they are."
    done, fenced, lines = set(), False, []
    for line in source.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        if not fenced and not line.startswith(("#", "    ")):

            def link(m):
                name = m[2].removesuffix("()")
                if m[1] or name not in where or name in done:
                    return m[0]
                done.add(name)
                return f"[`{m[2]}`]({where[name].removeprefix(page)})"

            line = re.sub(
                r"(\[[^\]]*\]\([^)]*\)|\[[^\]]*\])|(?<!`)`([\w.]+(?:\(\))?)`(?!`)",
                lambda m: m[0] if m[1] else link(m),
                line,
            )
        lines.append(line)
    return "\n".join(lines)


def documentation(markdown):
    "What `show_doc` saved, as a block of its own: signature as code, then the text and the table of arguments."
    body = re.sub(r"^\s*---\s*\n", "", markdown).strip()
    name = re.search(r"^#+ +(\S+)", body, re.M)
    body = re.sub(r"^\[source\]\(.*?\).*$", "", body, flags=re.M)
    body = re.sub(r"^#+ +.*$", "", body, count=1, flags=re.M)
    body = re.sub(r"(?:^> {2,}.*\n?)+", lambda m: f"\n```python\n{signature(m[0])}\n```\n", body, count=1, flags=re.M)
    body = re.sub(
        r"\| \*\*(.*?)\*\* (?=\|)", lambda m: "| " + m[1].replace("**", r"\*\*") + " ", body
    )  # no bold: it may hold a power such as 2**bits
    body = "\n".join(
        (
            short_names(l).replace("| VAR_KEYWORD |", "| keywords |").replace("| VAR_POSITIONAL |", "| values |")
            if l.startswith("|")
            else l
        )
        for l in body.split("\n")
    )
    return f"::: {{.api}}\n\n{body.strip()}\n\n:::\n" if name else body


def signature(quoted):
    "A signature as show_doc breaks it, even within a word, on one line again: the page breaks it where it has to."
    parts = [re.sub(r"^> *", "", l).rstrip() for l in quoted.strip("\n").split("\n")]
    whole = "".join(p + " " * p.endswith((",", "<class")) for p in parts).strip()
    return re.sub(r"(\w):(?=\S)", r"\1: ", short_names(whole)).replace(" (", "(", 1)


def short_names(text):
    "Classes without the modules that they come from: `Module` for `torch.nn.modules.module.Module`."
    text = re.sub(r"<class '([^']*)'>", r"\1", text)
    return re.sub(r"(?<![\w'`/])(?:_*[a-z]\w*\.)+(?=[A-Z])", "", text)


def in_languages(path):
    "What the head of a page says of its language, and of the page in others."
    others = versions(path)
    alternate = '<link rel="alternate" hreflang="{}" href="{}">'
    pages = [alternate.format(code, page_name(p).replace(".ipynb", ".html")) for code, p in others.items()]
    own = {} if language(path) == "en" else {"lang": language(path), "toc-title": say("On this page", path)}
    return own | ({"include-in-header": [{"text": "\n".join(pages)}]} if len(others) > 1 else {})


def prepare(path, where):
    "One notebook as the renderers are to see it."
    book = json.loads(path.read_text(encoding="utf-8"))
    cells, labelled, page = [], set(), page_name(path)
    if in_workshop(path):
        where = where | defined_in(path)
    for i, cell in enumerate(book["cells"]):
        source = MARK.sub("", text(cell))
        if is_hidden(cell) or not source.strip():
            continue
        if cell["cell_type"] == "markdown" and (what := TRY.fullmatch(source.strip())):
            cells.append(to_try(what[1]))
        elif cell["cell_type"] == "markdown":
            if not cells:
                head, source = front_matter(source)
                if head:
                    head |= in_languages(path)
                    cells.append(
                        {
                            "cell_type": "raw",
                            "metadata": {},
                            "source": "---\n" + yaml.safe_dump(head, allow_unicode=True, sort_keys=False) + "---\n",
                        }
                    )
                if head and (path.name[0].isdigit() or in_workshop(path)):
                    read = json.loads(versions(path).get("en", path).read_text(encoding="utf-8"))["cells"]
                    cells.append({"cell_type": "markdown", "metadata": {}, "source": at_a_glance(path, read)})
                if not source.strip():
                    continue
            cells.append({**cell, "source": linked(site_links(source, path), where, page)})
        elif cell["cell_type"] == "code":
            made = prepare_code(cell, source, where, page, labelled)
            folded = lambda m: f'{m[1]}"{say(m[2], path)}"'
            cells.append({**made, "source": re.sub(r'(code-summary: *)"(.*)"', folded, made["source"])})
        else:
            cells.append(cell)
    return {**book, "cells": cells}


def to_try(name):
    """What readers of the site try for themselves, by scripts of the page (elsewhere the cell is a comment): a cell with
    tools/site/try/<name>.html as its output."""
    html = (TRIES / f"{name}.html").read_text(encoding="utf-8")
    files = tried_files()
    at_once = (ASSETS / "mz.js").stat().st_size + (TRIES / "try.js").stat().st_size + 4 / 3 * files[-1]["bytes"]
    said = {
        "files": escape(json.dumps(files), quote=True),
        "record": f"{files[-1]['bytes']:,}",
        "weight": f"{at_once / 1e3:.0f}",
    }
    html = re.sub(r"\{\{(\w+)\}\}", lambda m: said[m[1]], html)
    scripts = ("weights", "live") if 'class="mz-try mz-live"' in html else ("mz", "try")
    html += "".join(f'<script src="{TRIED}/{script}.js" defer></script>\n' for script in scripts)
    output = {"output_type": "display_data", "metadata": {}, "data": {"text/html": html}}
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "source": "#| echo: false\npass",
        "outputs": [output],
    }


def tried_files():
    "The files of the first page, large ones first: name, title, bytes, share of the test digits that are read."
    named = json.loads((TRIES / "files.json").read_text(encoding="utf-8"))
    files = [(TRIES / f"{f['name']}.mz", f["title"], f["accuracy"]) for f in named]
    record = json.loads((ROOT / "bench/results/record.json").read_text(encoding="utf-8"))["nets"]["LeNet-5"]["runs"][0]
    files.append((ROOT / "bench/results/record.mz", "The record", record["rows"][-1]["test"]))
    return [
        {
            "name": path.stem,
            "title": title[0].upper() + title[1:],
            "bytes": path.stat().st_size,
            "accuracy": f"{accuracy:.1%}",
        }
        for path, title, accuracy in files
    ]


def lay_out_tries(out):
    "The scripts of what readers try, and files as scripts: a page that was opened from a disk may load nothing else."
    folder = out / TRIED
    folder.mkdir(parents=True)
    for script in (ASSETS / "mz.js", *TRIES.glob("*.js")):
        shutil.copy(script, folder / script.name)
    for path in (*TRIES.glob("*.mz"), ROOT / "bench/results/record.mz"):
        held = base64.b64encode(path.read_bytes()).decode()
        (folder / f"{path.stem}.js").write_text(f'mzFiles["{path.stem}"] = "{held}";\n', encoding="utf-8")


def prepare_code(cell, source, where, page, labelled):
    "A code cell without nbdev's directives, with an anchor where it defines something that others link to."
    names, lines = directives(source), source.splitlines()
    keep = [l for l in lines if QUARTO.match(l)]
    code = "\n".join(l for l in lines if not DIRECTIVE.match(l)).strip("\n")
    shown = re.match(r"\s*show_doc\(", code)
    if "hide_input" in names or shown:
        keep.append("#| echo: false")
    if is_imports(code) and not any("code-fold" in l for l in keep):
        keep += ["#| code-fold: true", '#| code-summary: "Imports"']
    if "hide_output" in names:
        keep.append("#| output: false")
    defined = definitions(code)
    if defined and where.get(defined[0]) == f"{page}#def-{defined[0]}" and defined[0] not in labelled:
        labelled.add(defined[0])
        keep.append(f"#| label: def-{defined[0]}")
    outputs = joined([document_output(o) if shown else o for o in cell.get("outputs", []) if not is_noise(o)])
    texts = iter(figure_texts(source))
    outputs = [figure_output(o, texts) for o in outputs]
    keep = [l for l in keep if "fig-alt" not in l]
    return {**cell, "source": "\n".join(keep + [code]), "outputs": outputs}


def joined(outputs):
    "Texts that were printed one after the other as one output."
    out = []
    for o in outputs:
        if out and "stream" == o.get("output_type") == out[-1].get("output_type"):
            out[-1] = {**o, "text": "".join(out[-1]["text"]) + "".join(o["text"])}
        else:
            out.append(o)
    return out


def figure_texts(source):
    "What `#| fig-alt:` says in a cell for those who do not see its figures: a text, or a list of them."
    said = re.search(r"^#\| *fig-alt: *(.+)$", source, re.M)
    texts = yaml.safe_load(said[1]) if said else []
    return [texts] if isinstance(texts, str) else texts


def figure_output(output, texts):
    "A figure, and those of an explorer, as elements of the page (tools/figures.py)."
    data = output.get("data", {})
    if "mz-explore" in (html := "".join(data.get("text/html", ""))):
        return {**output, "data": {"text/html": figures.explorer(html)}}
    kind = next((k for k in ("image/svg+xml", "image/png") if k in data and not html), None)
    if not kind:
        return output
    held, alt = "".join(data[kind]).strip(), next(texts, "")
    shown = figures.in_page(held, alt) if kind == "image/svg+xml" else figures.pixels(held, alt)
    return {**output, "data": {"text/html": shown}}


def is_noise(output):
    "Whether an output is left out: what goes to standard error."
    return output.get("name") == "stderr"


def document_output(output):
    "The output of show_doc, made ready for the page."
    data = output.get("data", {})
    if "text/markdown" not in data:
        return output
    return {**output, "data": {"text/markdown": documentation("".join(data["text/markdown"]))}}


# ------------------------------------------------------------------------------------------------ rendering


def config(present, names=None):
    """`_quarto.yml` with the pages that are there, by the names that they have on the site. A notebook of the workshop
    stands in the sidebar without the word "Workshop" in front; one that no group names yet stands below the groups.
    `names`: page → title."""
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    bar, names = quarto["website"]["sidebar"], names or {}
    foot = quarto["website"]["page-footer"]
    foot["center"] = foot["center"].replace("modelzip", f"modelzip {settings()['version']}", 1)
    bar["tools"] = [{"icon": "github", "href": settings()["git_url"], "text": "The source on GitHub"}]

    def entry(name):
        title = names.get(name, "").removeprefix("Workshop: ")
        return {"text": title[0].upper() + title[1:], "href": name} if name.startswith("workshop_") and title else name

    def pruned(items):
        out = []
        for item in items:
            if isinstance(item, str) and (name := item.replace("/", "_")) in present:
                out.append(entry(name))
            elif isinstance(item, dict) and (inside := pruned(item["contents"])):
                out.append({**item, "contents": inside})
        return out

    named = {n.replace("/", "_") for n in listed(bar["contents"])}
    more = sorted(n for n in present if n.startswith("workshop_") and n not in named)
    bar["contents"] = pruned(bar["contents"])
    for section in bar["contents"]:
        if isinstance(section, dict) and section["section"] == "Workshop":
            section["contents"] += [entry(n) for n in more]
    return quarto


def listed(contents):
    "All notebooks that a sidebar names."
    return [n for c in contents for n in (listed(c["contents"]) if isinstance(c, dict) else [c])]


def stage(nbs, folder):
    "Everything that a renderer reads, in one folder."
    books, where = notebooks(nbs), symbols(nbs)
    present, names = {page_name(p) for p in books}, titles(nbs)
    for path in books:
        (folder / page_name(path)).write_text(json.dumps(prepare(path, where), ensure_ascii=False), encoding="utf-8")
    if "index.ipynb" not in present:
        (folder / "index.md").write_text(
            "---\ntitle: modelzip\n---\n" + "".join(f"- [{p.stem}]({p.name})\n" for p in chapters(nbs)),
            encoding="utf-8",
        )
    reference = api.pages(where, names, documentation)
    for name, page in reference.items():
        (folder / name).write_text(page, encoding="utf-8")
    quarto = config(present | reference.keys(), names)
    (folder / "_quarto.yml").write_text(yaml.safe_dump(quarto, allow_unicode=True, sort_keys=False), encoding="utf-8")
    for name in ("book.css", "favicon.svg"):
        shutil.copy(ASSETS / name, folder / name)


@cache
def quick_colors():
    """Let smalldocs remember what it has coloured, lexers, and the class of a token: they are asked for over and
    over."""
    from smalldocs import highlight, markdown

    highlight.get_lexer_by_name, highlight.css_class = cache(highlight.get_lexer_by_name), cache(highlight.css_class)
    markdown.highlight = cache(highlight.highlight)


@cache
def quick_sidebar():
    """Let smalldocs make an entry of the sidebar once, not for each of some two hundred pages: they lie in one folder, so
    that a link is the same on all of them. Sections, and the entry of the page itself, are made anew."""
    from fastcore.xml import Safe, to_xml
    from smalldocs.layout import Layout

    make, made = Layout.side_item, WeakKeyDictionary()

    def side_item(layout, item, depth):
        if item.sep or item.section or item.page is layout.page:
            return make(layout, item, depth)
        known = made.setdefault(layout.site, {})
        if id(item) not in known:
            known[id(item)] = item, Safe(to_xml(make(layout, item, depth), indent=False))
        return known[id(item)][1]

    Layout.side_item = side_item


def by_smalldocs(folder, out):
    "Render with smalldocs, then take its pages off the network."
    from smalldocs.config import load
    from smalldocs.site import Site

    quick_colors()
    quick_sidebar()
    site = Site(load(folder), quiet=True)
    site.out = out.resolve()
    site.build()
    for warning in site.warnings:
        print("warning:", warning, file=sys.stderr)
    shutil.copytree(ASSETS / "katex", out / KATEX)
    for page in out.glob("*.html"):
        html = spoken(access.mend(punctuated(hang(page.read_text(encoding="utf-8")))))
        html = re.sub(r"https://cdn\.jsdelivr\.net/npm/katex@[^/]+/dist(/contrib)?", KATEX, html)
        page.write_text(re.sub(r'<script src="[^"]*fuse\.min\.js"></script>', "", html), encoding="utf-8")
    for css in out.glob("site_libs/**/*.css"):
        replace(css, {r"@import\s+url\([^)]*\);?": ""})
    for name, theme in THEMES.items():
        sheet = out / f"site_libs/themes/{theme}.min.css"
        sheet.write_text(
            sheet.read_text(encoding="utf-8") + (ASSETS / name).read_text(encoding="utf-8"), encoding="utf-8"
        )
    own_search(out)


def replace(path, patterns):
    old = new = path.read_text(encoding="utf-8")
    for pattern, by in patterns.items():
        new = re.sub(pattern, by, new)
    if new != old:
        path.write_text(new, encoding="utf-8")


def punctuated(page):
    "A mark behind a formula becomes part of it: a browser would begin the next line with it."
    return re.sub(r'(<span class="math inline">\\\([^<]*)\\\)</span>([.,;:])', r"\1\\text{\2}\\)</span>", page)


def spoken(page):
    "What is in another language than its page says so: Chinese links on all pages; code, outputs, sidebar on Chinese ones."
    page = re.sub(r"<(a|span)(?=[^>]*>[^<]*[\u4e00-\u9fff])", r'<\1 lang="zh"', page)
    if '<html lang="en"' in page[:100]:
        return page
    return re.sub(r'<(?=nav id="quarto-sidebar"|footer|pre\b|div class="cell-output)(\w+)', r'<\1 lang="en"', page)


def hang(page):
    """Long lines of code, and of outputs that are no table, in spans that wrap with a hanging indent: no line is
    cut off, no indent lost."""

    def block(m):
        lines = m[2].split("\n")
        bare = [unescape(re.sub(r"<[^>]*>", "", l)) for l in lines]
        columns = [bool(re.search(r"\S\s{2,}\S|[─│]", l)) for l in bare]
        drawn = (
            "python" not in m[1] and sum(bool(re.search("[─│├└┬▼]", l)) for l in bare) > 1
        )  # a map of who calls whom
        table = "sourceCode" not in m[1] and sum(columns) > 1 or drawn
        columns = [c or drawn for c in columns]
        out, still = [], []  # `still`: tags that a line leaves open, as a text of several lines does
        for line, text, column in zip(lines, bare, columns):
            line = "".join(still) + line
            still = unclosed(line)
            line += "</span>" * len(still) + "\n"
            out.append(
                line
                if len(text) <= SHORT or table and column
                else f'<span class="hang" style="--by:{continued(text)}ch">{line}</span>'
            )
        return (m[1] if table else m[1].replace("<code", "<code data-hang", 1)) + "".join(out).removesuffix("\n") + m[3]

    return re.sub(r"(<pre[^>]*><code[^>]*>)(.*?)(</code></pre>)", block, page, flags=re.S)


def unclosed(line):
    "The tags `<span …>` of a line that it does not close."
    still = []
    for tag in re.findall(r"<span[^>]*>|</span>", line):
        still.pop() if tag == "</span>" else still.append(tag)
    return still


def continued(line):
    """In which column a line goes on: under its comment where one stands to the right with room to spare, else four
    to the right of its start."""
    comment = re.search(r"\S\s{2,}(?=# )", line)
    return comment.end() + 2 if comment and comment.end() <= 80 else len(line) - len(line.lstrip()) + 4


def formula(found):
    "A formula as search has it: letters and numbers; what only TeX reads is left out."
    held = re.sub(r"\\text\{([.,;:])\}", r"\1", found[1])[2:-2]  # as `punctuated` writes it
    return " " if "\\" in held else held


def sections(page):
    """What search looks through on a page: (anchor, heading, words) of each section. Words are prose and printed outputs;
    of code only what it defines."""
    inside = page.partition("<main")[2].partition('<nav class="page-navigation"')[0]
    made = r'<span class="kw">(?:def|class)</span> <span class="\w\w">(\w+)</span>'
    code = lambda m: " ".join(re.findall(made, m[0])) + " " if "sourceCode" in m[0] else " " + m[0][:600]
    inside = re.sub(r"<(script|style|nav|h1|select|svg)\b.*?</\1>", " ", inside, flags=re.S)
    inside = re.sub(r'<span class="math[^>]*>(.*?)</span>', formula, inside, flags=re.S)
    inside = re.sub(r"<pre\b.*?</pre>", code, inside, flags=re.S)
    parts = re.split(r'<h[23] [^>]*data-anchor-id="([^"]*)"[^>]*>(.*?)</h[23]>', inside, flags=re.S)
    words = lambda html: re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html))).strip()
    for anchor, heading, body in zip(["", *parts[1::3]], ["", *parts[2::3]], parts[::3]):
        yield anchor, words(heading), words(body.partition(">")[2] if not anchor else body)


def own_search(out):
    """Search by tools/site/reading.js in place of smalldocs': its index is a script, which, unlike what is fetched, also
    loads from file://, and is loaded when somebody searches."""
    found = []
    for page in sorted(out.glob("*.html")):
        html = page.read_text(encoding="utf-8")
        title = unescape(re.sub(r"<[^>]*>", "", re.search(r'<h1 class="title">(.*?)</h1>', html, re.S)[1]))
        found += [
            {"href": page.name + (f"#{anchor}" if anchor else ""), "title": title, "section": heading, "text": text}
            for anchor, heading, text in sections(html)
            if text or heading
        ]
    index = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    (out / "search.js").write_text(f"window.searchIndex = {index};\n", encoding="utf-8")
    (out / "search.json").unlink()
    shutil.rmtree(out / "site_libs/fuse")
    script = out / "site_libs/smalldocs.js"
    theirs = script.read_text(encoding="utf-8")
    kept = re.sub(r"  // ---- search\n.*?(?=  // the keys that focus search)", "", theirs, flags=re.S)
    if kept == theirs:
        raise SystemExit("smalldocs.js has its search elsewhere: adapt own_search in tools/book_site.py")
    script.write_text(kept + (ASSETS / "reading.js").read_text(encoding="utf-8"), encoding="utf-8")


def by_quarto(folder, out):
    "Render with Quarto, with the same KaTeX beside the pages."
    quarto = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
    quarto["format"]["html"]["html-math-method"] = {"method": "katex", "url": f"{KATEX}/"}
    quarto["format"]["html"]["code-overflow"] = "wrap"
    quarto["execute"] = {"enabled": False}
    (folder / "_quarto.yml").write_text(yaml.safe_dump(quarto, allow_unicode=True, sort_keys=False), encoding="utf-8")
    subprocess.run(["quarto", "render", str(folder), "--no-execute"], check=True)
    made = folder / quarto["project"]["output-dir"]
    shutil.copytree(made, out, dirs_exist_ok=True)
    shutil.copytree(ASSETS / "katex", out / KATEX, dirs_exist_ok=True)


def for_machines(nbs):
    "The site's pages for a program that reads it (llmstxt.org): what it is, then a line for each page."

    def line(path):
        first = next(text(c) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if text(c).strip())
        head = front_matter(first)[0] or {"title": path.stem}
        said = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head.get("description", ""))
        return f"- [{head['title']}]({Path(page_name(path)).stem}.html)" + (f": {said}" if said else "")

    web = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    index = [p for p in chapters(nbs) if p.stem == "index"]
    rest = [p for p in chapters(nbs) if p.stem != "index"]
    parts = {"Chapters": [*index, *(p for p in rest if p.name[0].isdigit())]}
    parts["Course"] = [p for p in rest if not p.name[0].isdigit()]
    parts["In other languages"] = translations(nbs)
    parts["Workshop"] = workshop(nbs)
    lists = "\n\n".join(f"## {name}\n\n" + "\n".join(map(line, found)) for name, found in parts.items() if found)
    about = f"Version {settings()['version']}. Each page is a notebook of {settings()['git_url']}, under nbs/; the library is made from them."
    reference = "## Reference\n\n- [All names](api.html): every public name of the library, by module"
    return f"# {web['title']}\n\n> {web['description']}\n\n{about}\n\n{lists}\n\n{reference}\n"


@contextmanager
def garbage_left():
    "While pages are made, a great many objects stay and hardly any cycle goes: nobody need look for them."
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@garbage_left()
def build(out=ROOT / "_docs", nbs=ROOT / "nbs"):
    "Render all chapters into a folder; what was there is replaced only when everything went well."
    out = Path(out).resolve()
    if out.is_dir() and any(out.iterdir()) and not (out / "site_libs").is_dir():
        raise SystemExit(f"{out} is not empty and not a site: give another folder")
    with tempfile.TemporaryDirectory() as tmp:
        source, made = Path(tmp) / "book", Path(tmp) / "made"
        source.mkdir()
        stage(nbs, source)
        (by_quarto if shutil.which("quarto") else by_smalldocs)(source, made)
        if any(TRY.search(p.read_text(encoding="utf-8")) for p in chapters(nbs)):
            lay_out_tries(made)
        (made / "llms.txt").write_text(for_machines(nbs), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, out)
    return out


# ------------------------------------------------------------------------------------------------ checking

LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
    "input": "src",
}  # attributes that a browser fetches
LINK_RELS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch", "manifest"}
OUTSIDE = re.compile(r"^\s*(https?:)?//", re.I)
PLACES = re.compile(r"(?<![\w.])/(?:root|home|work|tmp|Users)/[\w.-]+/")
EXPLORERS = 2_000_000  # bytes of all explorers on a page
COLOURED = re.compile(r'<span class="[a-z]{2}">([^<]*)</span>')  # a token of code: nothing but its text is checked


class Page(HTMLParser):
    "What the checks need to know of one page."

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.path, self.raw = path, path.read_text(encoding="utf-8")
        self.links, self.loads, self.ids, self.math, self.figures = [], [], set(), 0, 0
        self.code, self.words, self.scripts, self.styles = [], [], [], []
        self.reader = access.Reader()
        self._inside, self._main = [], 0
        self.feed(COLOURED.sub(r"\1", self.raw))

    def handle_starttag(self, tag, attributes):
        a = {k: v or "" for k, v in attributes}
        if "id" in a:
            self.ids.add(a["id"])
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        if tag in LOADS and a.get(LOADS[tag]):
            self.loads.append(a[LOADS[tag]])
        if tag == "link" and set(a.get("rel", "").split()) & LINK_RELS:
            self.loads.append(a.get("href", ""))
        if "style" in a:
            self.styles.append(a["style"])
        if "math" in a.get("class", "").split():
            self.math += 1
        if tag == "main":
            self._main += 1
        if self._main and tag in ("img", "svg"):
            self.figures += 1
        if tag in ("pre", "script", "style", "main"):
            self._inside.append(tag)
        self.reader.starts(tag, a, self._main > 0)

    def handle_endtag(self, tag):
        self.reader.ends(tag)
        if tag in self._inside:
            del self._inside[len(self._inside) - 1 - self._inside[::-1].index(tag) :]
        if tag == "main":
            self._main -= 1

    def handle_data(self, data):
        if "script" in self._inside:
            self.scripts.append(data)
        elif "style" in self._inside:
            self.styles.append(data)
        else:
            self.words.append(data)
            self.reader.says(data)
            if "pre" in self._inside:
                self.code.append(data)

    @cached_property
    def explorers(self):
        "The HTML of the explorers on the page."
        return re.findall(r'<div class="mz-explore.*?</script></div>', self.raw, re.S)


def squeeze(s):
    return re.sub(r"\s+", "", s)


def broken_links(page, pages, out, find):
    "Links to files or places that are not there. `find`: the file that a path from a page means, and if it is there."
    for href in page.links:
        url = urlsplit(href)
        if url.scheme or url.netloc or not href.strip("#"):
            continue
        target, there = find(unquote(url.path) or page.path.name)
        if not there:
            yield f"broken link {href}"
        elif out not in target.parents:
            yield f"link {href} leaves the site"
        elif url.fragment and target.name in pages and unquote(url.fragment) not in pages[target.name].ids:
            yield f"link {href}: {target.name} has no such place"


def outside(page, out):
    "Files that a browser would fetch from elsewhere, or that are not there."
    for address in page.loads:
        if OUTSIDE.match(address):
            yield f"loads {address}"
        elif not address.startswith("data:") and not (page.path.parent / unquote(urlsplit(address).path)).is_file():
            yield f"loads {address}, which is not there"
    for css in page.styles:
        yield from css_loads(css, "a style")
    for code in page.scripts:
        for m in re.finditer(
            r"""(?:import|fetch|importScripts)\s*\(?\s*(?:[\w{},*\s]+from\s*)?["'](https?:[^"']+)""", code
        ):
            yield f"a script loads {m[1]}"


def css_loads(css, where):
    for m in re.finditer(r"""@import\s+(?:url\()?["']?([^"')\s;]+)|url\(\s*["']?([^"')]+)""", css):
        address = m[1] or m[2]
        if OUTSIDE.match(address):
            yield f"{where} loads {address}"


def stylesheets(out):
    "What the site's style sheets fetch from elsewhere, or do not find."
    for path in out.rglob("*.css"):
        css = path.read_text(encoding="utf-8")
        name = path.relative_to(out)
        for problem in css_loads(css, name):
            yield str(problem)
        for m in re.finditer(r"""url\(\s*["']?([^"')]+)""", css):
            if (
                not m[1].startswith(("data:", "#"))
                and not OUTSIDE.match(m[1])
                and not (path.parent / urlsplit(m[1]).path).is_file()
            ):
                yield f"{name}: {m[1]} is not there"


def against_notebook(page, path):
    "What a chapter must show, and what it must not."
    book = json.loads(path.read_text(encoding="utf-8"))
    shown = squeeze("".join(page.code))
    for i, cell in enumerate(book["cells"]):
        if is_hidden(cell) and len(squeeze(text(cell))) > 40:
            code = squeeze("\n".join(l for l in text(cell).splitlines() if not DIRECTIVE.match(l)))
            if code and code in shown:
                yield f"shows hidden cell {i}"
    if re.search(r"^#\|", "".join(page.code), re.M):
        yield "shows a directive (#| …)"
    if re.match(r"\d", path.name) and not page.figures:
        yield "has no figure"
    math = any(re.search(r"\$[^$\n]+\$", text(c)) for c in book["cells"] if c["cell_type"] == "markdown")
    if math and not (page.math and any("katex" in a for a in page.loads)):
        yield "has mathematics, and nothing to typeset it"
    for what in TRY.findall("\n".join(text(c) for c in book["cells"] if c["cell_type"] == "markdown")):
        if f"mz-try-{what}" not in page.ids:
            yield f"has lost what is to be tried: {what}"
    wanted = sum(
        "mz-explore" in "".join(o.get("data", {}).get("text/html", ""))
        for c in book["cells"]
        for o in c.get("outputs", [])
        if not is_hidden(c)
    )
    if wanted > len(page.explorers):
        yield f"has lost {wanted - len(page.explorers)} of {wanted} explorers"


def check(out=ROOT / "_docs", nbs=ROOT / "nbs"):
    "Everything that is wrong with a built site, one line each."
    out = Path(out).resolve()
    pages = {p.name: Page(p) for p in sorted(out.glob("*.html"))}
    if "index.html" not in pages:
        return [f"{out} has no index.html: build it first"]
    problems = list(stylesheets(out))
    for sheet in THEMES:
        colours = access.variables((ASSETS / sheet).read_text(encoding="utf-8"))
        problems += [f"{sheet}: {p}" for p in access.pale(colours)]

    @cache  # two hundred pages have the same two hundred links
    def find(path):
        target = (out / path).resolve()
        target = target / "index.html" if target.is_dir() else target
        return target, target.is_file()

    books = {Path(page_name(p)).stem: p for p in notebooks(nbs)}
    for name, page in pages.items():
        found = [*broken_links(page, pages, out, find), *outside(page, out)]
        found += access.problems(page.reader, page.raw)
        if Path(name).stem in books:
            found += against_notebook(page, books[Path(name).stem])
        if (size := sum(map(len, page.explorers))) > EXPLORERS:
            found.append(f"its explorers take {size:,} bytes, more than {EXPLORERS:,}")
        if m := PLACES.search(" ".join(page.words)):
            found.append(f"names a place on somebody's machine: {m[0]}")
        problems += [f"{name}: {p}" for p in found]
    missing = [p.name for name, p in books.items() if f"{name}.html" not in pages]
    named = listed(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])
    problems += [f"{n} has no page" for n in missing] + [
        f"{name} is not in the sidebar of _quarto.yml"
        for name in (p.relative_to(nbs).as_posix() for p in chapters(nbs) + translations(nbs))
        if name not in named
    ]
    return list(dict.fromkeys(problems))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", *folder]:
            print(build(*folder))
        case ["check", *folder]:
            problems = check(*folder)
            print("\n".join(problems) or "nothing is wrong")
            sys.exit(bool(problems))
        case _:
            sys.exit(__doc__)
