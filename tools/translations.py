"""Translations: nbs/zh/90_article.ipynb is nbs/90_article.ipynb in Chinese.

    python tools/translations.py write    give every translation the code and the outputs of its original
    python tools/translations.py check    exit 1, and say which prose no longer fits

Code has one source, the original: `write` copies it (`tools/book.py run` does that, too), and nobody executes a
translation. Prose has one source as well, the cells of the translation, found by their ids. Each of them ends with a
mark, `<!-- of 1a2b3c4d -->`, made from the text that it translates: when that changes, `check` asks for the cell to be
translated anew. A cell that the original has gained is put in as it is, in English, without a mark.
"""

import hashlib, json, re, sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"\n*<!-- of (\w+) -->\s*\Z")


def pairs(root=ROOT):
    "Original and translation, for each of those in folders with the code of a language: `nbs/zh`."
    return [(root / "nbs" / p.name, p) for p in sorted((root / "nbs").glob("[a-z][a-z]/*.ipynb"))]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def text(cell):
    return "".join(cell["source"])


def mark(source):
    "What a translated cell ends with: a short name of the text that it translates."
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def made(original, translation):
    "A translation as a file holds it: all of the original but its prose."
    prose = {c["id"]: c for c in read(translation)["cells"] if c["cell_type"] == "markdown"}
    book = read(original)
    book["cells"] = [prose.get(c["id"], c) if c["cell_type"] == "markdown" else c for c in book["cells"]]
    return json.dumps(book, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def write(root=ROOT):
    for original, translation in pairs(root):
        translation.write_text(made(original, translation), encoding="utf-8")


def facts(source, name, up=""):
    """What both languages must have alike: kind → how often there is what. `name`: the notebook's; a line that begins
    with a link from one language to the other is not compared. `up`: how a translation leads to the chapters."""
    source = re.sub(rf"^\[[^\]\n]+\]\((\w\w|\.\.)/{re.escape(name)}\).*$", "", source, flags=re.M)
    links = [l.removeprefix(up) for l in re.findall(r"\]\(([^)\s]+)\)", source)]
    source = re.sub(r"\]\([^)\s]+\)", "]", MARK.sub("", source))
    formulas, code = re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", source, re.S), re.findall(r"`[^`\n]+`", source)
    bare = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]+`", " ", source, flags=re.S)
    found = {
        "links": links,
        "formulas": formulas,
        "names": code,
        "numbers": re.findall(r"\d+(?:[.,]\d+)*", bare),
        "headings": re.findall(r"^#+(?= )", bare, re.M),
        "points of a list": re.findall(r"^- ", bare, re.M),
        "paragraphs in bold": re.findall(r"^\*\*", bare, re.M),
    }
    return {kind: Counter(what) for kind, what in found.items()}


def problems(original, translation):
    "What does not agree, a line each; a translation may name more in backticks, to explain what its outputs say."
    there = {c["id"]: c for c in read(translation)["cells"]}
    if [c["id"] for c in read(original)["cells"]] != list(there):
        yield f"{translation.name}: other cells than the original, or in another order: tools/translations.py write"
    for cell in read(original)["cells"]:
        mine = there.get(cell["id"], cell)
        where = f"{translation.parent.name}/{translation.name}, cell {cell['id']}"
        ours, theirs = text(mine), text(cell)
        if cell["cell_type"] != "markdown":
            if mine != cell:
                yield f"{where}: not the original's code or outputs: tools/translations.py write"
            continue
        if not (m := MARK.search(ours)) or m[1] != mark(theirs):
            yield f"{where}: translate it anew, and end it with <!-- of {mark(theirs)} --> ({theirs[:60]!r} …)"
        have = facts(ours, original.name, up="../")
        for kind, want in facts(theirs, original.name).items():
            missing, more = want - have[kind], have[kind] - want if kind != "names" else Counter()
            if missing or more:
                yield f"{where}: {kind}: {[*missing]} missing, {[*more]} too many"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write"]:
            write()
        case ["check"]:
            found = [p for pair in pairs() for p in problems(*pair)]
            print("\n".join(found) or "nothing is wrong")
            sys.exit(bool(found))
        case _:
            sys.exit(__doc__)
