"""The site can be read by everyone: by eye in both themes and on a telephone, by ear, by keyboard (WCAG 2.2, level AA).
What a file tells is checked on every page by tools/book_site.py; what only a browser sees is checked here by axe-core,
on a page of each kind, and on all of them by `make fuzz`."""

import importlib.util, json, random, re
from pathlib import Path

import access
import book
import figures
import nbformat
import paper
import pytest

from browsing import ROOT, browser_only, site, wait
from guards import FUZZ
from modelzip.workshop.controls import control
from modelzip.workshop.player import page as flip_book
from test_site import EXPLORED, FIGURE, page_of

KINDS = ["index", "11b_price", "workshop_controls", "api_price", "glossary"]
PAGES = ["index", *(Path(site.page_name(p)).stem for p in (*site.chapters(ROOT / "nbs"), *site.workshop(ROOT / "nbs")))]
PAGES = list(dict.fromkeys([*PAGES, "api", *(f"api_{name}" for name in site.api.modules())])) if FUZZ else KINDS


# ---------------------------------------------------------------------------------- colours


def test_contrast():
    "Against values that WebAIM's checker gives."
    pairs = {
        ("#000000", "#ffffff"): 21,
        ("#777777", "#ffffff"): 4.48,
        ("#2780e3", "#f8f9fa"): 3.77,
        ("#ff0000", "#ffffff"): 4.0,
    }
    for (a, b), want in pairs.items():
        assert access.contrast(a, b) == access.contrast(b, a) == pytest.approx(want, abs=0.01)
    assert access.over("#000000", 0.5, "#ffffff") == "#808080"


@pytest.mark.parametrize("sheet", site.THEMES)
def test_texts_stand_out_in_both_themes(sheet):
    colours = access.variables((site.ASSETS / sheet).read_text())
    assert list(access.pale(colours)) == []
    dull = {**colours, "--quarto-hl-co": access.over(colours["--quarto-hl-co"], 0.5, colours["--bs-body-bg"])}
    (found,) = access.pale(dull)
    assert found.startswith("--quarto-hl-co")


# ---------------------------------------------------------------------------------- pages


FRAMES = ["<img src='x' alt='a line'>", "<img src='x'>"]
EXPLORER = dict(
    output_type="display_data",
    metadata={},
    data={
        "text/html": flip_book(
            [control("n", [1, 2, 3])], ["<b>1</b>", *(f.replace("'", '"') for f in FRAMES)], [0, 1, 2]
        )
    },
)


@pytest.mark.parametrize(
    "cells, says",
    [
        (["# t", ("draw()", FIGURE)], "a figure without a text"),
        (["# t", ('#| fig-alt: "one"\ndraw()', FIGURE, FIGURE)], "a figure without a text"),
        (["# t\n\n### deep", ('#| fig-alt: "one"\ndraw()', FIGURE)], "a heading of level 3 follows one of level 1"),
        (["# t\n\n[](index.html)", ('#| fig-alt: "one"\ndraw()', FIGURE)], "a link or button that says nothing"),
        (["# t", ("explore(draw)", EXPLORER)], "1 frames of explorers without a text"),
    ],
)
def test_check_finds_what_is_in_a_readers_way(tmp_path, cells, says):
    _, problems = page_of(tmp_path, *cells)
    assert [p for p in problems if says in p], problems


def test_figures_have_a_text_and_a_size(tmp_path):
    page, problems = page_of(tmp_path, "# t", ('#| fig-alt: ["a \\"line\\"", "b"]\ndraw()', FIGURE, FIGURE))
    found = re.findall(r'<img src="data:[^"]*" alt="([^"]*)" width="1" height="1"', page)
    assert found == ["a &quot;line&quot;", "b"] and problems == [] and "fig-alt" not in page


DRAWN = """<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" height="36pt" viewBox="0 0 72 36"
xmlns="http://www.w3.org/2000/svg" version="1.1"><defs><style type="text/css">*{stroke-linejoin: round}</style></defs>
<g><path d="M 0 36 L 72 36 L 72 0 L 0 0 z" style="fill: #ffffff"/>
<path id="bar" d="M 0 20 L 30 20 L 30 0 L 0 0 z" style="fill: #0072b2"/>
<path d="M 40 20 L 70 20 L 70 0 L 40 0 z" style="fill: #0072b2; fill-opacity: 0.2"/>
<defs><clipPath id="axes"><rect x="0" y="0" width="72" height="20"/></clipPath></defs>
<path d="M 0 -99 L 0 99 L 20 99 L 20 -99 z" clip-path="url(#axes)" style="fill: #0072b2"/>
<path d="M 0 30 L 72 30" clip-path="url(#bar)" style="fill: none; stroke: #b2b2b2"/><use xlink:href="#bar" x="0" y="0"/>
<text style="font: 10px 'DejaVu Sans', sans-serif; text-anchor: middle" x="15" y="12">on</text>
<text style="font: 10px 'DejaVu Sans', sans-serif; text-anchor: middle" x="55" y="12">tint</text>
<text style="font: 8px 'DejaVu Sans', sans-serif; fill: #d55e00" x="40" y="34">said</text>
<text style="font: 10px 'DejaVu Sans', sans-serif; text-anchor: middle" x="10" y="34">beside</text>
<g style="fill: #ffffff" transform="translate(50 12)"><text><tspan style="font: 10px sans-serif" x="0">white</tspan></text></g>
<text x="66" y="30" transform="rotate(-90 66 30)" style="font: 10px sans-serif; fill: #ffffff">up</text></g></svg>"""


def test_figures_take_the_colours_of_their_page():
    """Black, white and greys are the page's, and what is written in a colour is told from it; a coloured ground stays, and
    what is written on it."""
    made = figures.in_page(DRAWN, 'a "bar"')
    style = lambda word: re.search(rf"<text ([^>]*)>{word}<", made)[1]
    assert "fill:" not in style("on") and 'fill="#000000"' in style("on")
    assert "fill" not in style("tint") + style("beside") and '<text fill="#ffffff">' in made
    assert "fill:var(--mz-d55e00)" in style("said")
    assert (
        "fill:var(--mz-0)" in style("up") and "fill:#0072b2;fill-opacity:0.2" in made and "stroke:var(--mz-30)" in made
    )
    head = re.match(r"<svg [^>]*>", made)[0]
    for mixed in (
        "--mz-0:color-mix(in srgb, currentColor 0%,",
        "--mz-30:color-mix(",
        "--mz-d55e00:color-mix(in srgb, #d55",
    ):
        assert mixed in head
    assert 'fill="currentColor"' in head and 'aria-label="a &quot;bar&quot;"' in head and "<style" not in made
    assert "--least:99px" in head and 'width="99" height="50"' in head  # 8 points are 11 pixels where 72 are 99
    names = set(re.findall(r'id="(\w+)"', made))
    assert len(names) == 2 and not names & {"bar", "axes"}
    assert {*re.findall(r'href="#(\w+)"', made), *re.findall(r"url\(#(\w+)\)", made)} == names


def test_what_stands_beside_a_coloured_ground_is_told_from_the_page():
    "A formula's parts stand on lines of their own: where it ends is not told by the spaces between them."
    parts = "".join(f'\n        <tspan x="{6 * i}">{c}</tspan>' for i, c in enumerate("102"))
    label = f'<g><g transform="translate(4 50)"><text style="font-size:10px">{parts}\n        </text></g></g>'
    ground = '<g><path d="M 40 0 L 99 0 L 99 99 L 40 99 z" style="fill: #0072b2"/></g>'
    for svg, inside in (ground + label, False), (ground + label.replace("(4 ", "(60 "), True):
        made = figures.in_page(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 99 99">{svg}</svg>', "a label")
        assert ('fill="#000000"' in made) == inside


def test_frames_of_explorers_take_the_colours_of_their_page():
    from modelzip.workshop.frames import img
    from modelzip.workshop.pictures import data_uri

    held = [img(data_uri(DRAWN.encode(), "image/svg+xml"), said, "96px") for said in ("a</b", "c")]
    pixels = img("data:image/png;base64,AAAA", "grey", "120px")
    made = figures.explorer(flip_book([control("n", [1, 2, 3])], [*held, pixels], [0, 1, 2]))
    first, _, script = made.partition("<script>")
    assert '<svg role="img" aria-label="a&lt;/b"' in first and "data:image/svg" not in made
    later = json.loads(re.search(r" frames = (\[.*\]);\n", script)[1])
    assert later[0] is None and later[1].startswith('<svg role="img" aria-label="c"')
    assert 'style="width:120px;--least:110px"' in later[2] and "</" not in script.partition("</script>")[0]


def test_a_figure_is_kept_once():
    "As strokes, unless these take over twice the bytes of pixels when both are compressed."
    dice, kept = random.Random(0), {}
    drawn = lambda letters, n: "".join(dice.choices(letters, k=n))
    for strokes in (0, 2000, 6000), (10**5, 2000, 6000):  # what repeats itself weighs next to nothing
        for n in strokes[1:]:
            cell = nbformat.v4.new_code_cell()
            path = f'<path d="{"M 1 1 " * (strokes[0] // 6)}M {drawn("0123456789", n)}"/>'
            data = {"image/png": drawn("".join(map(chr, range(48, 112))), 1000), "text/plain": "x"}
            data["image/svg+xml"] = f"<svg>\n {path}</svg>"
            cell.outputs = [nbformat.v4.new_output("display_data", data)]
            book.drawn_once(nbformat.v4.new_notebook(cells=[cell]))
            kept[strokes[0], n] = min(cell.outputs[0].data)
    assert kept == {(k, n): f"image/{form}" for k in (0, 10**5) for n, form in ((2000, "svg+xml"), (6000, "png"))}


def test_tables_say_of_what_their_headers_are():
    made = access.table(
        "<table><thead><tr><th></th><th>bits</th></tr></thead><tbody><tr><th>a</th><td>1</td></tr></tbody></table>"
    )
    assert made == (
        '<table><thead><tr><td></td><th scope="col">bits</th></tr></thead><tbody><tr><th scope="row">a</th><td>1</td></tr></tbody></table>'
    )
    assert access.table("<table><tr><th>a</th></tr><tr><td>1</td></tr></table>").count('scope="col"') == 1
    assert access.table("<table><tr><td>1</td></tr></table>") == "<table><tr><td>1</td></tr></table>"
    assert 'class="mz-compact"' in access.table("<table><thead><tr><th>smaller</th></tr></thead></table>")


def test_solutions_start_folded_and_say_what_they_are():
    "In JupyterLab, which shows the first line of a cell that it hides."
    found = []
    for path in (*site.chapters(ROOT / "nbs"), *site.workshop(ROOT / "nbs")):
        for cell in json.loads(path.read_text())["cells"]:
            if re.search(r'^#\| *code-summary: *"Solution"', site.text(cell), re.M):
                found.append(
                    (site.text(cell).startswith('#| code-summary: "Solution"\n#| code-fold: true\n'), cell["metadata"])
                )
    assert len(found) >= 70 and all(f == (True, {"jupyter": {"source_hidden": True}}) for f in found)


def test_a_program_finds_every_page(built):
    said = (built / "llms.txt").read_text()
    pages = {p.name for p in built.glob("*.html") if not p.name.startswith("api_")}
    assert set(re.findall(r"\]\((\w+\.html)\)", said)) == pages and said.startswith("# modelzip\n\n> ")


def test_pages_say_their_version_and_lead_to_the_source(built):
    for page in ("index", "api_pack", "workshop_explore"):
        html = (built / f"{page}.html").read_text()
        assert f"modelzip {site.settings()['version']}" in html.partition("<footer")[2]
        assert f'href="{site.settings()["git_url"]}"' in html


# ---------------------------------------------------------------------------------- in a browser


def axe():
    "axe-core, where a package has it."
    found = importlib.util.find_spec("axe_playwright_python")
    path = Path(found.origin).parent / "axe.min.js" if found else None
    if path is None:
        pytest.skip("axe-core is not installed: pip install --no-deps axe-playwright-python")
    return path.read_text()


def shown(browser, width, theme):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", dict(features=[dict(name="prefers-color-scheme", value=theme)])
    )


@pytest.fixture
def as_before(browser):
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[]))


# tokens of code have the colours that are computed above, and formulae are KaTeX's: neither is looked at. They are most
# elements of a page, and axe-core visits also what it is told to leave out: they go, and leave their place empty
EMPTIED = """
    const drawn = [...document.querySelectorAll(".katex")], boxes = drawn.map(e => e.getBoundingClientRect());
    drawn.forEach((e, i) => {
      e.replaceChildren();
      e.style = `display: inline-block; max-width: 100%; width: ${boxes[i].width}px; height: ${boxes[i].height}px`;
    });
    for (const token of document.querySelectorAll("pre code span:not(.hang, :has(span))")) token.replaceWith(token.textContent);"""


# all pages have the same sidebar
WRONG = """
    const [few, once, done] = arguments, out = [["pre code span"], [".katex"], ...(once ? [] : [["#quarto-sidebar .sidebar-section"]])];
    const only = few ? { runOnly: ["color-contrast", "scrollable-region-focusable", "target-size", "landmark-unique"] } : {};
    axe.run({ exclude: out }, { resultTypes: ["violations"], ...only }).then(
      (r) => done(r.violations.flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.target} ${n.html.slice(0, 120)}`))),
      (e) => done([String(e)]));"""


# letters of figures that say no colour of their own have that of the page
OTHER_INK = """
    const ink = getComputedStyle(document.querySelector("main")).color;
    const own = t => t.style.fill || t.hasAttribute("fill") || t.closest("g[style*=fill]");
    return [...document.querySelectorAll("main svg[role=img] text")].filter(t => !own(t) && getComputedStyle(t).fill != ink)
      .map(t => `not in the colour of the page: ${t.textContent}`);"""
WAYS = [(1400, "light"), (390, "dark"), (1400, "dark"), (390, "light")]


@browser_only
@pytest.mark.hypothesis
@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_in_a_readers_way(browser, address, as_before, page):
    "In both themes and on both widths; where the suite is no search, each page in two of the four ways."
    ways = WAYS if FUZZ else WAYS[2 * (PAGES.index(page) % 2) :][:2]
    shown(browser, *ways[0])
    browser.set_script_timeout(240)
    browser.get(f"{address}/{page}.html")
    browser.execute_script(EMPTIED + axe())
    found = {}
    for way in ways:
        shown(browser, *way)
        dark = way[1] == "dark"
        wait(
            browser,
            "return document.documentElement.classList.contains('quarto-dark') == arguments[0]",
            dark,
            seconds=20,
        )
        browser.execute_async_script("setTimeout(arguments[0], 250)")  # what scrolls is marked a moment after a change
        found[way] = browser.execute_async_script(WRONG, way != ways[0], page == "index")
        found[way] += browser.execute_script(OTHER_INK)
    assert {k: v for k, v in found.items() if v} == {}


@browser_only
def test_keyboard_and_ear(browser, address):
    "The first stop leads past the sidebar; what a control changes is announced, and its picture says how controls stand."
    from selenium.webdriver.common.keys import Keys

    browser.get(f"{address}/{EXPLORED[0]}.html")
    browser.find_element("tag name", "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "mz-skip"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert wait(browser, "return document.activeElement.tagName") == "MAIN"
    assert browser.find_elements("css selector", ".mz-note") == []
    stage = browser.find_element("css selector", ".mz-explore .mz-frame")
    assert stage.get_attribute("aria-live") == "polite"
    knob = browser.find_element("css selector", ".mz-explore input, .mz-explore select")
    knob.send_keys(Keys.ARROW_RIGHT if knob.get_attribute("value") == "0" else Keys.ARROW_LEFT)
    picture = stage.find_element("css selector", "img, [role=img]")
    assert re.search(r"\w: \w+ \S", picture.get_attribute("alt") or picture.get_attribute("aria-label"))


@browser_only
def test_formulae_are_read(browser, address):
    "Beside what is drawn stands MathML, with the formula as it was written."
    browser.get(f"{address}/03_rounding.html")
    wait(browser, "return document.querySelectorAll('main .katex').length > 0")
    silent = "[...document.querySelectorAll('main .katex')].filter(e => !e.querySelector('math annotation')).length"
    assert browser.execute_script(f"return {silent}") == 0


@browser_only
@pytest.mark.parametrize("page", ["index", "14_tour"])
def test_accuracy_stands_beside_the_ratio_on_a_telephone(browser, address, as_before, page):
    shown(browser, 390, "light")
    browser.get(f"{address}/{page}.html")
    right = browser.execute_script("""
        const table = document.querySelector('.mz-compact'), heads = [...table.querySelectorAll('thead :is(th, td)')];
        const at = heads.findIndex(h => h.textContent.startsWith('accuracy'));
        return [heads[at - 1].textContent, ...[...table.rows].map(r => r.cells[at].getBoundingClientRect().right)];""")
    assert right[0] == "smaller" and max(right[1:]) <= 390
    unsaid = browser.execute_script("""
        const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1;
        const fades = e => getComputedStyle(e).maskImage != 'none';
        return [...document.querySelectorAll('main *')].filter(e => scrolls(e) != fades(e)).map(e => e.outerHTML);""")
    assert unsaid == []  # what goes on beyond the edge fades there, and nothing else does


QUESTIONS = {
    "install": "index.html#install",
    "rounding error": "03_rounding.html",
    "how do I save": "90_article.html#save-load-test",
    "quantize": "03a_qtensor.html#quantize",
}


@browser_only
def test_search_answers_questions(browser, address):
    "Chapters stand before the reference, results are not cut off, and the index is loaded when somebody searches."
    browser.get(f"{address}/course.html")
    assert browser.execute_script("return window.searchIndex") is None
    box = browser.find_element("css selector", ".smalldocs-search input")
    for question, page in QUESTIONS.items():
        box.clear()
        browser.execute_script("document.querySelector('.smalldocs-search-results').innerHTML = ''")
        box.send_keys(question)
        wait(browser, "return document.querySelectorAll('.search-result').length > 0")
        found = [
            r.get_attribute("href").rsplit("/")[-1] for r in browser.find_elements("css selector", ".search-result")
        ]
        assert [f for f in found[:3] if f.startswith(page)], (question, found)
        assert not found[0].startswith("api"), (question, found)
    over = browser.execute_script("""
        const shown = document.querySelector('.smalldocs-search-results').getBoundingClientRect();
        const at = [[shown.left + 5, shown.top + 5], [shown.right - 5, shown.bottom - 5]];
        return at.map(([x, y]) => !!document.elementFromPoint(x, y)?.closest('.smalldocs-search-results'));""")
    assert over == [True, True]


# ---------------------------------------------------------------------------------- on paper


def test_links_on_paper_lead_within_the_book_or_to_the_source():
    page = (
        '<main class="x"><header><h1 class="title">T</h1><div class="description">what</div></header><section id="s" class="level2">'
        '\n<h2 class="anchored">S</h2><a href="#s">1</a><a href="b.html#t">2</a><a href="workshop_c.html#u">3</a>'
        '<a href="https://x.org/">4</a></section><fieldset>knobs</fieldset></main>'
    )
    made, url = paper.chapter(page, "a", ["a", "b"]), site.settings()["git_url"]
    assert made.startswith('<h1 id="a--">T</h1><p><em>what</em></p><h2 id="a--s">S</h2>') and "knobs" not in made
    links = re.findall(r'href="([^"]*)"', made)
    assert links == ["#a--s", "#b--t", f"{url}/blob/main/nbs/workshop/c.ipynb", "https://x.org/"]
    assert {"index", "03_rounding", "course"} <= set(paper.order()) and "explore" not in paper.order()
