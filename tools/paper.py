"""The book on paper and in a reader: the site's chapters as one PDF and one EPUB.

    python tools/paper.py [site] [folder]     from _docs/ (or another built site) into paper/

pandoc (the package pypandoc-binary) reads the pages, and typst sets the PDF. Of an explorer the first frame is left, and
what readers try by scripts is left out. Links lead to chapters within the book, and to the workshop's notebooks in the
repository.
"""

import re, sys, tempfile
from pathlib import Path

import book_site as site

ROOT = Path(__file__).resolve().parent.parent

GONE = (  # what only a screen has use for
    r"<script\b.*?</script>",
    r"<style\b.*?</style>",
    r"<fieldset\b.*?</fieldset>",
    r"<button\b.*?</button>",
    r'<p class="mz-note">.*?</p>',
    r'<div class="at-a-glance.*?</div>',
    r'<nav\b.*?</nav>',
    r'<section class="mz-try.*?</section>',
    r' (?:width|height|style)="[^"]*"',
)
LOOK = """
#set page(paper: "a4", numbering: "1", margin: (x: 2.2cm, y: 2.4cm))
#set text(size: 10pt)
#set par(justify: true)
#show raw: set text(size: 7.6pt)
#show raw.where(block: true): block.with(fill: luma(245), inset: 6pt, radius: 3pt, width: 100%)
#show table: set text(size: 7.4pt)
#show heading.where(level: 1): it => { pagebreak(weak: true); it }
#show link: set text(fill: rgb("#0067a5"))
"""


def order():
    "The pages of the book, in the order of its sidebar: chapters and course, no workshop."
    web = site.yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    return [Path(n).stem for n in site.listed(web["sidebar"]["contents"]) if n.endswith(".ipynb") and "/" not in n]


def chapter(page, name, names):
    "What a page says, with anchors that no other page has, and links that lead somewhere on paper."
    inside = page.partition("<main")[2].partition(">")[2].partition("</main>")[0]
    for what in GONE:
        inside = re.sub(what, "", inside, flags=re.S)
    inside = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{name}--{m[1]}"', inside)
    title = re.search(r'<h1 class="title">(.*?)</h1>', inside, re.S)[1]
    said = re.search(r'<div class="description">(.*?)</div>', inside, re.S)
    inside = re.sub(
        r"<header\b.*?</header>", "", inside, flags=re.S
    )  # headings stand by themselves, or pandoc makes no chapters of them
    inside = re.sub(r'<section id="([^"]*)"[^>]*>\s*<(h[2-6])\b[^>]*>', r'<\2 id="\1">', inside)
    inside = re.sub(r"</?section\b[^>]*>", "", inside)
    inside = f'<h1 id="{name}--">{title}</h1>' + (f"<p><em>{said[1]}</em></p>" if said else "") + inside
    url, branch = site.repository()

    def link(m):
        stem, _, anchor = m[1].partition("#")
        stem = stem.removesuffix(".html") or name
        if stem in names:
            return f'href="#{stem}--{anchor}"'
        if stem.startswith("workshop_"):
            return f'href="{url}/blob/{branch}/nbs/workshop/{stem.removeprefix("workshop_")}.ipynb"'
        return f'href="{url}"'

    return re.sub(r'href="(?!https?:|mailto:)([^"]*)"', link, inside)


def book(docs):
    "All chapters as one page."
    names = [n for n in order() if (docs / f"{n}.html").exists()]
    pages = (chapter((docs / f"{n}.html").read_text(encoding="utf-8"), n, names) for n in names)
    return f'<html lang="en"><head><title>modelzip</title></head><body>{"".join(pages)}</body></html>'


def build(docs=ROOT / "_docs", out=ROOT / "paper"):
    "Write modelzip.epub and modelzip.pdf."
    import pypandoc, typst

    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = ["--metadata=title:modelzip", f"--metadata=subtitle:Version {site.settings()['version']}"]
    about += [f"--metadata=author:{site.settings()['author']}", "--toc", "--toc-depth=2", "--standalone"]
    with tempfile.TemporaryDirectory() as tmp:
        whole, look, typ = (Path(tmp) / n for n in ("book.html", "look.typ", "book.typ"))
        whole.write_text(book(Path(docs)), encoding="utf-8")
        look.write_text(LOOK, encoding="utf-8")
        read = "html+tex_math_single_backslash"
        pypandoc.convert_file(
            str(whole),
            "epub3",
            read,
            outputfile=str(out / "modelzip.epub"),
            extra_args=[*about, "--mathml", "--split-level=1"],
        )
        pypandoc.convert_file(
            str(whole),
            "typst",
            read,
            outputfile=str(typ),
            extra_args=[*about, f"--extract-media={tmp}", f"--include-in-header={look}"],
        )
        text = re.sub(
            r"\b(times|plus|minus|dot)\.circle\b", r"\1.o", typ.read_text(encoding="utf-8")
        )  # typst 0.14 renamed them
        typ.write_text(text, encoding="utf-8")
        typst.compile(str(typ), output=str(out / "modelzip.pdf"), root="/")
    return out


if __name__ == "__main__":
    if len(sys.argv) > 3 or "-h" in sys.argv or "--help" in sys.argv:
        sys.exit(__doc__)
    print(build(*sys.argv[1:]))
