"""What a page needs so that everyone can read it, by eye, ear or keyboard (WCAG 2.2, level AA). tools/book_site.py mends
rendered pages with `mend`, and its check says with `problems` and `pale` what is still in a reader's way. What only a
browser sees, tests/test_access.py checks there."""

import re
from html import escape, unescape

SKIP = '<a class="mz-skip" href="#quarto-document-content">Skip to the text</a>'
NAMED = {  # parts of a page that several others are like: what they are called
    ' id="quarto-sidebar"': ' aria-label="Book"',
    ' class="page-navigation"': ' aria-label="Next and previous page"',
    ' id="TOC"': ' aria-labelledby="toc-title"',
    '<main class="content"': ' tabindex="-1"',  # where the skip link leads
}
TOGGLE = re.compile(r'<a( class="sidebar-item-text[^>]*data-bs-toggle[^>]*) role="navigation"([^>]*)>(.*?)</a>')
CHEVRON = re.compile(r'<a( class="sidebar-item-toggle[^>]*) role="navigation"([^>]*) aria-label="Toggle section">')
SCHEME = re.compile(r'<a( class="quarto-color-scheme-toggle[^>]*) href=""( title="[^"]*")([^>]*)>(.*?)</a>')
TABLE = re.compile(r"<table\b[^>]*>.*?</table>", re.S)


def mend(page):
    "A page of smalldocs with names for its parts, buttons that are buttons, tables with headers, and a way past the sidebar."
    for part, attribute in NAMED.items():
        page = page.replace(part, part + attribute)
    page = re.sub(r'<nav class="quarto-secondary-nav">(.*?)</nav></header>', bar, page, count=1, flags=re.S)
    page = TOGGLE.sub(r'<button type="button"\1\2>\3</button>', page)
    page = CHEVRON.sub(r'<span\1\2 aria-hidden="true">', page)
    page = re.sub(r'(<span class="sidebar-item-toggle[^>]*>(?:(?!</a>).)*)</a>', r"\1</span>", page)
    page = re.sub(r'(<span class="sidebar-item-toggle[^>]*?) aria-expanded="\w+"', r"\1", page)
    page = SCHEME.sub(r'<button type="button"\1\2 aria-label="Light or dark"\3>\4</button>', page)
    page = page.replace('<i class="bi', '<i aria-hidden="true" class="bi')
    page = page.replace(
        '<i aria-hidden="true" class="bi bi-search" aria-hidden="true">', '<i class="bi bi-search" aria-hidden="true">'
    )
    page = page.replace('class="code-copy-button"', 'class="code-copy-button" aria-label="Copy the code"')
    page = page.replace("<head>", '<head><meta name="color-scheme" content="light dark">', 1)
    page = re.sub(r"<body[^>]*>", lambda m: m[0] + SKIP, page, count=1)
    return TABLE.sub(lambda m: table(m[0]), page)


def bar(found):
    "The bar of narrow screens: it holds the way to the page, which is navigation, and is none itself."
    return f'<div class="quarto-secondary-nav">{found[1]}</div></header>'


def table(html):
    """A table whose headers say whether they are of a column or of a row; one that says how much smaller a model is has a
    class, for a telephone shows its accuracy beside that."""
    if "<th" not in html:
        return html
    head, body = (html.split("</thead>") + [""])[:2] if "</thead>" in html else ("", html)
    if not head and (
        first := re.match(r"<table\b[^>]*>\s*(?:<tbody>)?\s*<tr\b[^>]*>(?:(?!</tr>|<td).)*</tr>", body, re.S)
    ):
        head, body = first[0], body[first.end() :]  # headers without a <thead>
    if re.search(r">\s*smaller\s*<", head):
        head = re.sub(
            r"<table\b( class=\")?", lambda m: f'<table class="mz-compact{" " if m[1] else chr(34)}', head, count=1
        )
        body = re.sub(r"(?:\xa0|&nbsp;)±", " ±", body)
    head = re.sub(r"<th\b([^>]*)>\s*</th>", r"<td\1></td>", head)  # a corner
    head = re.sub(r"<th\b(?![^>]*scope)", '<th scope="col"', head)
    body = re.sub(r"<th\b(?![^>]*scope)", '<th scope="row"', body)
    return head + ("</thead>" if "</thead>" in html else "") + body


# ------------------------------------------------------------------------------------------------ checking

VOID = {"img", "input", "br", "hr", "meta", "link", "source", "wbr", "col"}


class Reader:
    "What somebody meets who has a page read to them. Fed by the parser of tools/book_site.py, tag by tag."

    def __init__(self):
        self.silent, self.levels, self.scopeless, self.navs, self.skips, self.language = [], [], 0, [], False, ""
        self.unnamed, self._button = [], None

    def starts(self, tag, a, inside):
        "A tag with its attributes. `inside`: whether it stands in <main>."
        if tag in ("img", "svg", "canvas"):
            named = a.get("alt") or a.get("aria-label") or a.get("aria-labelledby")
            if not named and a.get("aria-hidden") != "true" and inside:
                self.silent.append(a.get("src", tag)[:30])
            elif named and self._button is not None:
                self._button["text"] += named
        elif re.fullmatch("h[1-6]", tag) and inside:
            self.levels.append(int(tag[1]))
        elif tag == "th" and a.get("scope") not in ("col", "row"):
            self.scopeless += 1
        elif tag == "nav":
            self.navs.append(a.get("aria-label") or a.get("aria-labelledby") or "")
        elif tag == "html":
            self.language = a.get("lang", "")
        elif tag == "a" and a.get("href") == "#quarto-document-content":
            self.skips = True
        if tag in ("a", "button"):
            self._button = {"tag": tag, "text": a.get("aria-label", ""), "what": a.get("class") or a.get("href", "")}

    def says(self, text):
        if self._button is not None:
            self._button["text"] += text

    def ends(self, tag):
        if self._button is not None and tag == self._button["tag"]:
            if not self._button["text"].strip():
                self.unnamed.append(self._button["what"])
            self._button = None


def problems(reader, raw):
    "What is in somebody's way on one page."
    for what in reader.silent:
        yield f"a figure without a text that stands for it ({what}…): write `#| fig-alt:` into its cell"
    turned = "".join(line for line in raw.splitlines() if " frames = [" in line)  # what explorers show later
    if n := len(re.findall(r'<img(?![^>]* alt=\\"[^"\\])|<svg(?![^>]* aria-label=\\"[^"\\])', turned)):
        yield f"{n} frames of explorers without a text that stands for them: the first line of the function's docstring"
    if reader.levels[:1] != [1] or reader.levels.count(1) != 1:
        yield f"has {reader.levels.count(1)} headings of the first level: one stands first"
    for above, level in zip(reader.levels, reader.levels[1:]):
        if level > above + 1:
            yield f"a heading of level {level} follows one of level {above}"
            break
    if reader.scopeless:
        yield f"{reader.scopeless} table headers do not say whether they are of a column or a row"
    if "" in reader.navs or len(set(reader.navs)) < len([n for n in reader.navs if n != "breadcrumb"]):
        yield f"its landmarks cannot be told apart: {reader.navs}"
    if not reader.skips or 'id="quarto-document-content"' not in raw:
        yield "has no way past the sidebar"
    if not reader.language:
        yield "does not say its language"
    for what in reader.unnamed:
        yield f"a link or button that says nothing: {what}"


# ---- colours -------------------------------------------------------------------------------------------------------


def luminance(colour):
    "Relative luminance of `#rrggbb` (WCAG 2.2)."
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    "Contrast of two colours, 1 to 21."
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def over(colour, share, ground):
    "A colour laid over a ground, as CSS does with an opacity."
    mixed = [round(int(colour[i : i + 2], 16) * share + int(ground[i : i + 2], 16) * (1 - share)) for i in (1, 3, 5)]
    return "#" + "".join(f"{c:02x}" for c in mixed)


def variables(css):
    "The custom properties of a sheet that are plain colours: name → `#rrggbb`; the last wins."
    found = re.findall(r"(--[\w-]+)\s*:\s*(#[0-9a-fA-F]{6}|#[0-9a-fA-F]{3})\b", css)
    return {n: "#" + ("".join(c * 2 for c in v[1:]) if len(v) == 4 else v[1:]).lower() for n, v in found}


LEAST = 4.5  # contrast of a text (WCAG 2.2, 1.4.3)


def pale(colours):
    "Which texts of a theme stand out too little. `colours`: its custom properties."
    page, side = colours["--bs-body-bg"], colours["--mz-side"]
    code = over(colours["--bs-emphasis-color"], 0.06, page)
    texts = {n: v for n, v in colours.items() if n.startswith("--quarto-hl-")}
    grounds = {
        "--bs-link-color": (page, code, side),
        "--bs-body-color": (page, code, side),
        "--sd-muted": (page, side),
        "--sd-inline-code": (page, code),
        **{n: (code,) for n in texts},
    }
    for name, behind in grounds.items():
        for ground in behind:
            if (c := contrast(colours[name], ground)) < LEAST:
                yield f"{name} {colours[name]} on {ground} has a contrast of {c:.2f}, less than {LEAST}"
