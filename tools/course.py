"""What an instructor needs, made from the chapters.

    python tools/course.py build [folder]     write course/ (or the folder)

`handouts/` are the chapters without solutions, answers and outputs, with stubs that run, and with the measurements that
they read; `instructor/` has them whole, as pages and as notebooks, and a plan for each session; `slides/` a deck for
each session, that opens without a network. Where to begin says `index.html`.

Nothing is executed. Cells are taken by their tags:

    instructor   a derivation for the board, an answer to a question: on no page of the site, in no handout
    row-2        (in nbs/course.ipynb) it belongs to the second row of the session's plan
    slide        it is a slide: of a chapter, where a row of the plan links to its section; of nbs/course.ipynb, in
                 its row
    essential    it is on the path of fifteen minutes through its chapter
"""

import ast, json, re, shutil, symtable, sys, tempfile
from functools import cache
from html import escape
from pathlib import Path

import book_site as site

ROOT = Path(__file__).resolve().parent.parent
NBS, OUT, ASSETS = ROOT / "nbs", ROOT / "course", Path(__file__).resolve().parent / "course"
text = site.text
SOLUTION, ANSWER = (
    re.compile(r'^#\| *code-summary: *"Solution', re.M),
    re.compile(r"<details>\s*<summary>(?:Model )?[Aa]nswers?</summary>.*?</details>", re.S),
)


def tags(cell):
    return set(cell.get("metadata", {}).get("tags", []))


def is_code(cell):
    return cell["cell_type"] == "code"


@cache
def book(name):
    "A notebook by its name under nbs/: `03_rounding`, `workshop/archive`."
    return json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))


def title(name):
    return re.search(r"^# +(.+)$", text(book(name)["cells"][0]), re.M)[1].strip()


def chapters():
    return [p.stem for p in site.chapters(NBS) if p.stem[0].isdigit()]


def slug(heading):
    "The name that the site gives to a heading's place."
    heading = re.sub(r"[`*$]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", heading.lower()).strip()))


@cache
def sections(name):
    "Place → (its heading, the numbers of its cells), down to the next heading of its rank."
    found, within = {}, []
    for i, cell in enumerate(book(name)["cells"]):
        here = list(within)
        for line in text(cell).split("\n") if not is_code(cell) else ():
            if m := re.match(r"(#+) +(.*)", line):
                within = [(rank, s) for rank, s in within if rank < len(m[1])] + [(len(m[1]), slug(m[2]))]
                found.setdefault(within[-1][1], (m[2], []))
                here += within[-1:] if within[-1] not in here else []
        for _, s in here:
            found[s][1].append(i)
    return found


def links(markdown):
    "(label, notebook, place or '') of all links to notebooks."
    return [
        (m[1], m[2], m[3] or "")
        for m in re.finditer(r"\[([^\]]+)\]\(((?:workshop/)?\w+)\.ipynb(?:#([^)]+))?\)", markdown)
    ]


# ------------------------------------------------------------------------------------------------ handouts


def stored(source):
    "Names that a cell defines for the cells behind it; and those that it reads and does not bind inside a function."
    try:
        top = symtable.symtable(source, "cell", "exec")
    except SyntaxError:  # a magic of the notebook
        return set(), set()
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    reads, inner = {s.get_name() for s in top.get_symbols() if s.is_referenced()}, top.get_children()
    while inner:
        table = inner.pop()
        reads |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
        inner += table.get_children()
    return defined, reads


def is_solution(cell):
    return is_code(cell) and bool(SOLUTION.search(text(cell)))


def without_solutions(cells):
    """The cells of a handout: no solution, no output, nothing for instructors; nor what needs a solution to run. What
    is said behind a cell to be predicted is folded."""
    kept, gone, there, predicted = [], set(), set(), False
    for i, cell in enumerate(cells):
        source = text(cell)
        if "instructor" in tags(cell):
            if ANSWER.search(source):
                kept.append(cell | {"source": "*Your answer:*", "metadata": {}})
            continue
        if not is_code(cell):
            source, n = ANSWER.subn("*Your answer:*", source)
            if predicted:
                source = folded(source)
            predicted = bool(re.search(r"\*\*Predict", source)) and not n and "# Exercises" not in source
            kept.append(cell | {"source": source})
            continue
        defines, reads = stored(source)
        if is_solution(cell):
            mine = {n.name for n in site.statements(source) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            gone |= mine | defines - there
            if "your turn" not in text(cells[i - 1]):
                kept.append(cell | {"source": "# your turn: what do you expect, and what do you find?"} | EMPTY)
            continue
        if "your turn" not in source and reads & gone and not site.is_hidden(cell):
            gone |= defines - there
            continue
        there |= defines
        kept.append(cell | {"source": source} | EMPTY)
    return kept


EMPTY = {"outputs": [], "execution_count": None}


def folded(source):
    "Prose that tells what came out, to be unfolded; what stands below the next heading is not."
    said, heading, rest = re.match(r"(.*?)(^#+ .*|\Z)(.*)", source, re.M | re.S).groups()
    if not said.strip():
        return source
    return f"<details><summary>After you have predicted</summary>\n\n{said.strip()}\n\n</details>\n\n{heading}{rest}"


def handout(name):
    "A chapter as students get it."
    nb = book(name)
    meta = nb["metadata"] | {"modelzip": {"chapter": name}}
    return nb | {"cells": without_solutions(nb["cells"]), "metadata": meta}


def edition(name):
    "A chapter as instructors get it: whole, answers unfolded."
    nb = book(name)
    opened = lambda c: c if is_code(c) else c | {"source": text(c).replace("<details>", "<details open>")}
    return nb | {"cells": [opened(c) for c in nb["cells"]]}


# ------------------------------------------------------------------------------------------------ rendering


@cache
def coloured(code):
    from nbconvert.filters import Highlight2HTML  # who only looks at notebooks need not wait a second for it

    return Highlight2HTML()(code, language="python")


def prose(markdown, here=""):
    "Markdown as HTML, with links that lead where the pages of the course lie."
    from nbconvert.filters import markdown2html

    html = re.sub(r'<a class="anchor-link".*?</a>', "", markdown2html(markdown))
    html = re.sub(r'<h(\d) id="[^"]*">(.*?)</h\1>', lambda m: heading(m[1], m[2]), html, flags=re.S)
    return re.sub(r'href="((?:\.\./)?(?:\w+/)?\w+)\.ipynb', lambda m: f'href="{page_of(m[1], here)}', html)


def heading(rank, html):
    place = slug(re.sub(r"<[^>]*>", "", html))
    return f'<h{rank} id="{place}">{html}</h{rank}>'


def page_of(name, here):
    "Where a link to a notebook leads: the instructor's page, or the site."
    name = name.removeprefix("../")
    page = site.page_name(NBS / f"{name}.ipynb").removesuffix(".ipynb") + ".html"
    if name in pages():
        return here + page
    return f"{site.settings()['doc_host']}{site.settings()['doc_baseurl']}/{page}"


@cache
def pages():
    "The notebooks that have a page: what is handed out, and what the course links to."
    named = {n for c in book("course")["cells"] if not is_code(c) for _, n, _ in links(text(c))}
    return {*exercised(), *(n for n in named if (NBS / f"{n}.ipynb").exists())} - {"course"}


def output(out):
    "One output, as the notebook would show it."
    data = {k: "".join(v) if isinstance(v, list) else v for k, v in out.get("data", {}).items()}
    if "text/html" in data:
        return data["text/html"]
    if "image/svg+xml" in data:
        return site.figures.in_page(data["image/svg+xml"], "")
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{data["image/png"].strip()}">'
    if "text/markdown" in data:
        return prose(data["text/markdown"])
    plain = "".join(out.get("text", [])) or data.get("text/plain", "")
    return f'<pre class="out">{escape(plain.rstrip())}</pre>' if plain.strip() else ""


def outputs(cell):
    return "".join(output(o) for o in site.joined([o for o in cell.get("outputs", []) if not site.is_noise(o)]))


def shown(cell, code=True, here=""):
    "A cell as HTML; folded code is folded."
    if not is_code(cell):
        return prose(text(cell), here)
    source = "\n".join(l for l in text(cell).splitlines() if not site.DIRECTIVE.match(l)).strip("\n")
    html = coloured(source) if code and not source.startswith("show_doc(") else ""
    if html and site.is_folded(cell):
        summary = re.search(r'^#\| *code-summary: *"(.*)"', text(cell), re.M)
        html = f"<details><summary>{escape(summary[1]) if summary else 'Imports'}</summary>{html}</details>"
    return html + outputs(cell)


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="{lib}/katex/katex.min.css">{more}<link rel="stylesheet" href="{lib}/course.css">
<script src="{lib}/katex/katex.min.js"></script><script src="{lib}/katex/auto-render.min.js"></script></head>
"""
TYPESET = """<script>renderMathInElement(document.body, {delimiters: [{left: "$$", right: "$$", display: true},
{left: "$", right: "$", display: false}], throwOnError: false});</script>"""


def page(heading, body, lib="../lib"):
    "A page of its own."
    return (
        f"{HEAD.format(title=escape(heading), lib=lib, more='')}<body class=\"page\">{body}\n{TYPESET}</body></html>\n"
    )


def deck(heading, slides, lib="../lib"):
    "Slides: a list of columns, each a list of slides."
    styles = f'<link rel="stylesheet" href="{lib}/reveal.css">'
    inside = "\n".join(
        "<section>" + "\n".join(f"<section>{s}</section>" for s in column) + "</section>" for column in slides
    )
    return (
        f"{HEAD.format(title=escape(heading), lib=lib, more=styles)}<body>"
        f'<div class="reveal"><div class="slides">{inside}</div></div>{TYPESET}\n'
        f'<script src="{lib}/reveal.js"></script>'
        '<script>Reveal.initialize({hash: true, slideNumber: "c/t", center: false, transition: "none", width: 1100, '
        "height: 700});</script></body></html>\n"
    )


# ------------------------------------------------------------------------------------------------ sessions


def sessions():
    "Of each of the sessions: title, the text for everybody, the plan's rows, and what is tagged for its rows."
    found = []
    for cell in book("course")["cells"]:
        if m := not is_code(cell) and re.match(r"## Session (\d): (.*)", text(cell)):
            rows = re.findall(r"^\| (\d+) \| (.*?) \|$", text(cell), re.M)
            found.append({"number": int(m[1]), "title": m[2], "text": text(cell), "rows": rows, "notes": []})
        elif not is_code(cell) and re.match(r"## ", text(cell)):
            if found and len(found) == 6:
                break
        elif found and "instructor" in tags(cell):
            found[-1]["notes"].append(cell)
    return found


def notes_of(session, row):
    return [c for c in session["notes"] if f"row-{row}" in tags(c)]


def part(session, name):
    "What stands behind `**Name` in a session's text, up to the next paragraph."
    return re.search(rf"^\*\*{name}[^*]*\*\*(.*?)(?:\n\n|\Z)", session["text"], re.M | re.S)[1].strip(" :")


def minutes(name, places=()):
    "Reading time of a chapter, or of sections of it."
    cells = book(name)["cells"]
    numbers = {i for p in places for i in sections(name)[p][1]} if places else range(len(cells))
    return site.minutes_to_read([cells[i] for i in sorted(numbers)])


def to_prepare(session):
    "Minutes of reading that a session's preparation takes: sections whole, chapters by their short path."
    places = {}
    for _, name, place in links(part(session, "Prepare")):
        places.setdefault(name, set()).add(place)
    short = sum(in_short(n) for n, p in places.items() if "" in p)
    return short + sum(minutes(n, p) for n, p in places.items() if "" not in p)


def handed_in(session):
    "The notebooks whose exercises are handed in."
    return [name for _, name, place in links(part(session, "Hand in")) if place == "exercises"]


def exercises_of(name):
    "The place where a notebook's exercises begin."
    return next(p for p in sections(name) if p.startswith("exercise"))


def in_short(*names):
    "Minutes that the essential paths of some notebooks take."
    return sum(site.minutes_to_read(cells) for cells, _ in map(essential, names) if cells)


def essential(name):
    "The cells on the path of fifteen minutes, and the headings that they stand under."
    cells = book(name)["cells"]
    numbers = [i for i, c in enumerate(cells) if "essential" in tags(c)]
    under = [
        p for p, (_, inside) in sections(name).items() if p != slug(title(name)) and any(i in numbers for i in inside)
    ]
    return [cells[i] for i in numbers], under


def slide_cells(name, place):
    "What a section has to show."
    cells = book(name)["cells"]
    numbers = sections(name)[place][1] if place else ()
    return [cells[i] for i in numbers if "slide" in tags(cells[i])]


def slides_of(session):
    "A column for the head, one for each row of the plan, one for what is handed in."
    n, columns, seen = session["number"], [], set()
    columns.append(
        [
            f"<h1>{escape(session['title'])}</h1><p class='quiet'>Session {n} of 6</p>"
            f"{prose(part(session, 'Question'))}",
            f"<h2>Afterwards</h2>{prose(part(session, 'Aims'))}",
        ]
    )
    for k, (time, what) in enumerate(session["rows"], 1):
        column = [
            f"<p class='minutes'>{time} minutes</p><h2 style='font-weight:normal'>{prose(what, '../instructor/')}</h2>"
        ]
        column += [projected(c) for c in notes_of(session, k) if "slide" in tags(c)]
        for label, name, place in links(what):
            for cell in slide_cells(name, place):
                if id(cell) not in seen:
                    seen.add(id(cell))
                    html = outputs(cell) if is_code(cell) and has_picture(cell) else shown(cell, here="../instructor/")
                    column.append(
                        f"{html}<p class='from'>{escape(title(name))}: {escape(sections(name)[place][0])}</p>"
                    )
        columns.append(column)
    columns.append([f"<h2>Hand in</h2>{prose(part(session, 'Hand in'), '../instructor/')}"])
    return columns


def is_test(cell):
    "Whether a cell is there to check what is said beside it."
    return is_code(cell) and bool(re.search(r"^\s*(assert |test_\w+\()", text(cell), re.M))


def projected(cell):
    "A cell as a slide: of a picture, and of what was computed for the board, without its code."
    alone = is_test(cell) if "instructor" in tags(cell) else is_code(cell) and has_picture(cell)
    return outputs(cell) if alone else shown(cell, here="../instructor/")


def beside(cell):
    "A cell among an instructor's notes: what only checks is folded, what came out is not."
    if not is_test(cell):
        return shown(cell)
    return f"<details><summary>as computed</summary>{shown(cell | EMPTY)}</details>{outputs(cell)}"


def has_picture(cell):
    return any(k.startswith("image/") or k == "text/html" for o in cell.get("outputs", []) for k in o.get("data", {}))


def plan(session):
    "A session as its instructor reads it, with what stands at the board, and what is answered."
    n = session["number"]
    intro, rest = session["text"].split("| minutes | |", 1)
    after = re.split(r"\n\n", rest, maxsplit=1)[1]
    body = [
        f"<p><a href='../index.html'>The course</a> · <a href='../slides/session{n}.html'>slides</a></p>",
        prose(intro),
    ]
    body.append(
        f"<p class='quiet'>To prepare: {to_prepare(session)} minutes of reading for everybody. For you: this page, the "
        f"slides, and {in_short(*handed_in(session))} minutes for the short paths through the chapters of the "
        "exercises.</p>"
    )
    for k, (time, what) in enumerate(session["rows"], 1):
        body.append(f"<div class='row'><b>{time} min</b><span>{prose(what)}</span></div>")
        if inside := notes_of(session, k):
            body.append(f"<div class='notes'>{''.join(map(beside, inside))}</div>")
    if others := [c for c in session["notes"] if not any(t.startswith("row-") for t in tags(c))]:
        body.append(f"<h2>Questions, with answers</h2>{''.join(map(beside, others))}")
    body.append("<h2>Afterwards</h2>" + prose(after))
    rows = "".join(
        f"<tr><td><a href='{page_of(name, '')}#{exercises_of(name)}'>{escape(title(name))}</a></td>"
        f"<td><a href='../handouts/nbs/{name}.ipynb' download>handout</a></td>"
        f"<td><a href='notebooks/{name}.ipynb' download>with solutions</a></td></tr>"
        for name in handed_in(session)
    )
    body.append(f"<h3>Exercises of this session</h3><table>{rows}</table>")
    return page(f"Session {n}: {session['title']}", "\n".join(body))


def taught_alone():
    "The plans for single chapters, with the answers behind them."
    cells = book("course")["cells"]
    first = next(i for i, c in enumerate(cells) if text(c).startswith("## One chapter"))
    notes = [beside(c) for c in cells[first + 1 :] if "instructor" in tags(c)]
    body = [prose(text(cells[first])), f"<div class='notes'>{''.join(notes)}</div>"]
    return page("One chapter, ninety minutes", "<p><a href='../index.html'>The course</a></p>" + "".join(body))


def chapter_page(name):
    "A whole notebook with solutions; a button leaves the fifteen minutes."
    body = ["<p><a href='../index.html'>The course</a></p>"]
    if essential(name)[0]:
        body.append(
            "<div class='switch'><button onclick=\"document.body.classList.toggle('short')\">fifteen minutes / all"
            "</button> <span class='quiet'>the bar on the left marks the essential path</span></div>"
        )
    for cell in edition(name)["cells"]:
        if site.is_hidden(cell) and "instructor" not in tags(cell):
            continue
        kinds = "cell" + " essential" * ("essential" in tags(cell))
        html = shown(cell).replace("<details>", "<details open>") if is_solution(cell) else shown(cell)
        body.append(
            f"<div class='{kinds}'>"
            + (f"<div class='notes'>{html}</div>" if "instructor" in tags(cell) else html)
            + "</div>"
        )
    return page(title(name), "\n".join(body))


def start(named):
    "The first page."
    rows = "".join(
        f"<tr><td>{s['number']}</td><td><a href='instructor/session{s['number']}.html'>{escape(s['title'])}</a></td>"
        f"<td>{to_prepare(s)} min</td><td><a href='slides/session{s['number']}.html'>slides</a></td></tr>"
        for s in sessions()
    )
    listed = "".join(
        f"<tr><td><a href='instructor/{page_of(n, '')}'>{escape(title(n))}</a></td><td>{minutes(n)} min"
        f"{f', in short {in_short(n)}' if in_short(n) else ''}</td>"
        f"<td><a href='handouts/nbs/{n}.ipynb' download>handout</a></td>"
        f"<td><a href='instructor/notebooks/{n}.ipynb' download>with solutions</a></td></tr>"
        for n in named
    )
    ready = [
        c
        for c in book("course")["cells"]
        if not is_code(c) and re.match(r"## (Before the first|For whoever teaches|How to mark)", text(c))
    ]
    return page(
        "The course",
        "<h1>modelzip: the course</h1>"
        "<p>Six sessions of ninety minutes. For a session: read its page, look through its slides, hand out the "
        "notebooks of its exercises. Everything here opens without a network. Students get the folder "
        "<code>handouts</code>, open its <code>nbs</code> in JupyterLab where modelzip is installed (as below), "
        "and hand in notebooks that keep "
        "their names.</p>"
        f"<h2>Sessions</h2><table><tr><th></th><th></th><th>to read before</th><th></th></tr>{rows}</table>"
        "<p>For whoever teaches one chapter: <a href='instructor/alone.html'>three plans of ninety minutes</a>.</p>"
        f"{''.join(prose(text(c), 'instructor/') for c in ready)}"
        f"<h2>Chapters</h2><table><tr><th></th><th>to read</th><th></th><th></th></tr>{listed}</table>",
        lib="lib",
    )


# ------------------------------------------------------------------------------------------------ writing


def exercised():
    "Notebooks that are handed out: the chapters, and what else of the workshop has exercises."
    more = [
        f"workshop/{p.stem}"
        for p in site.workshop(NBS)
        if any(is_solution(c) for c in book(f"workshop/{p.stem}")["cells"])
    ]
    return [*chapters(), *more]


def saved_results():
    "The measurements that handouts read: `../bench/results/…` from where they lie."
    named = {
        m for n in exercised() for c in book(n)["cells"] for m in re.findall(r"\.\./bench/results/([\w.]+\w)", text(c))
    }
    return [p for p in sorted((ROOT / "bench/results").iterdir()) if p.name in named]


def write(path, what):
    "A page, a notebook, or a file as it is."
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(what, dict):
        what = json.dumps(what, ensure_ascii=False, indent=1) + "\n"
    path.write_bytes(what if isinstance(what, bytes) else what.encode())


def build(out=OUT):
    "Write everything into a folder; what was there is replaced when all went well."
    out = Path(out).resolve()
    if out.is_dir() and any(out.iterdir()) and not (out / "lib/course.css").exists():
        raise SystemExit(f"{out} is not empty and no course: give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".course-") as tmp:
        new = Path(tmp) / "course"
        for name in exercised():
            write(new / f"handouts/nbs/{name}.ipynb", handout(name))
            write(new / f"instructor/notebooks/{name}.ipynb", edition(name))
        for result in saved_results():
            write(new / f"handouts/bench/results/{result.name}", result.read_bytes())
        for name in pages():
            write(new / f"instructor/{page_of(name, '')}", chapter_page(name))
        for s in sessions():
            write(new / f"instructor/session{s['number']}.html", plan(s))
            write(new / f"slides/session{s['number']}.html", deck(f"Session {s['number']}: {s['title']}", slides_of(s)))
        write(new / "instructor/alone.html", taught_alone())
        write(new / "index.html", start(exercised()))
        shutil.copytree(ASSETS, new / "lib")
        shutil.copytree(site.ASSETS / "katex", new / "lib/katex")
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)
    return out


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", *folder]:
            print(build(*folder))
        case _:
            sys.exit(__doc__)
