"""What `make course` writes and `make grade` says: handouts that give nothing away and run, instructor's pages with all
of it, slides without a network, and marks that no notebook can give itself."""

import csv, functools, json, re, resource, subprocess, sys, threading, types
from pathlib import Path

import pytest
import torch

import answers, course, grade
from browsing import browser_only, wait
from modelzip.data import LeNet5, seeded
from modelzip.pack import save
from modelzip.quant import quantize_model
from modelzip.symbols import entropy

site, ROOT = course.site, answers.ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return course.build(tmp_path_factory.mktemp("teaching") / "course")


handout = functools.cache(course.handout)  # nobody here changes one


def lines(cells):
    return {l.strip() for c in cells for l in course.text(c).splitlines() if l.strip() and not l.startswith("#|")}


def solutions(name):
    "Lines of a notebook's solutions that stand nowhere else in it."
    cells = course.book(name)["cells"]
    return lines(filter(course.is_solution, cells)) - lines(c for c in cells if not course.is_solution(c))


# ---------------------------------------------------------------------------------- handouts


@pytest.mark.parametrize("name", course.exercised())
def test_a_handout_gives_nothing_away(name):
    import nbformat

    nb = handout(name)
    nbformat.validate(nbformat.from_dict(nb))
    assert len(solutions(name)) >= 2 and not lines(nb["cells"]) & solutions(name)
    assert not any(c.get("outputs") for c in nb["cells"] if course.is_code(c))
    assert not any("instructor" in course.tags(c) or course.ANSWER.search(course.text(c)) for c in nb["cells"])
    there = {course.text(c) for c in nb["cells"]}
    for chapter, i in answers.EXERCISES.values():
        if chapter == name:  # the check and its stub are as they were
            assert {answers.cells(chapter)[k].text for k in (i, i + 1)} <= there


@pytest.mark.parametrize("name", course.exercised())
def test_a_handout_needs_nothing_that_was_taken_away(name):
    "No cell reads a name that only cells define which are gone."
    whole, kept = (
        [course.text(c) for c in nb["cells"] if course.is_code(c)] for nb in (course.book(name), handout(name))
    )
    defined = lambda sources: set().union(*(course.stored(s)[0] for s in sources))
    gone = defined(whole) - defined(kept)
    for source in kept:
        assert not course.stored(source)[1] & gone, source[:80]


def test_the_cell_that_tries_a_solution_goes_with_it():
    "lamp(w) is the stub in a handout, and raises; an answer told in prose is not told, a prediction not anticipated."
    told = lines(course.book("07_saliency")["cells"]) - lines(handout("07_saliency")["cells"])
    assert any('ninety["LAMP"] = ' in l for l in told)
    text = "\n".join(course.text(c) for c in handout("08_channels")["cells"])
    assert "But $\\sqrt d$ counts them" not in text and text.count("*Your answer:*") >= 1
    assert re.search(r"<summary>After you have predicted</summary>\s+- \*\*ReLU\*\*", text)
    assert "## Numbers that travel" in re.sub(r"<details>.*?</details>", "", text, flags=re.S)


def test_handouts_bring_what_they_read(built):
    for path in (built / "handouts/nbs").rglob("*.ipynb"):
        for asked in re.findall(r"\.\./bench/results/[\w.]+\w", path.read_text(encoding="utf-8")):
            assert (built / "handouts/nbs" / asked).exists(), f"{path.name} reads {asked}"


# ---------------------------------------------------------------------------------- for instructors


@pytest.mark.parametrize("name", course.exercised())
def test_the_instructors_notebook_has_everything(name):
    mine, theirs = course.edition(name)["cells"], course.book(name)["cells"]
    assert lines(filter(course.is_solution, theirs)) <= lines(mine) and len(mine) == len(theirs)
    assert "<details>" not in "".join(course.text(c) for c in mine if not course.is_code(c))


def test_every_row_of_every_session_has_something(built):
    found = course.sessions()
    assert [s["number"] for s in found] == list(range(1, 7))
    for s in found:
        assert all(course.part(s, p) for p in ("Question", "Aims", "Prepare", "Hand in"))
        rows = {int(t[4:]) for c in s["notes"] for t in course.tags(c) if t.startswith("row-")}
        assert rows == set(range(1, len(s["rows"]) + 1)), f"session {s['number']} has notes for the rows {rows}"
        asked = "".join(
            course.text(c) for c in s["notes"] if not course.is_code(c) and not course.tags(c) - {"instructor"}
        )
        assert len(re.findall(r"^\*\*[^*]+\?[^*]*\*\* \S", asked, re.M)) >= 3, (
            f"session {s['number']}: questions with answers"
        )
        assert 20 <= course.to_prepare(s) <= 75
        page = (built / f"instructor/session{s['number']}.html").read_text(encoding="utf-8")
        for c in s["notes"]:
            if not course.is_code(c):
                assert course.prose(course.text(c))[:60] in page
        for n in course.handed_in(s):
            assert f"handouts/nbs/{n}.ipynb" in page


def test_what_is_for_instructors_is_computed_and_not_on_the_site():
    cells = course.book("course")["cells"]
    notes = [c for c in cells if "instructor" in course.tags(c)]
    assert sum(course.is_code(c) and "test_" in course.text(c) for c in notes) >= 15
    prepared = site.prepare(course.NBS / "course.ipynb", {})["cells"]
    assert not lines(prepared) & lines(c for c in notes if not course.is_code(c)) and not any(
        map(course.is_code, prepared)
    )
    words = [{"cell_type": "markdown", "source": "word " * 2380, "metadata": {"tags": t}} for t in (["instructor"], [])]
    assert [site.minutes_to_read([c]) for c in words] == [1, 10]


@pytest.mark.parametrize("name", course.chapters())
def test_a_chapter_has_a_path_of_fifteen_minutes(name):
    "It is listed in the course: by the headings that its cells have, or stand under."
    cells, _ = course.essential(name)
    assert 8 <= site.minutes_to_read(cells) <= 15
    assert cells[0] is course.book(name)["cells"][0] and not any(site.is_hidden(c) for c in cells)
    headings, last = [], None
    for c in course.book(name)["cells"]:
        own = [] if course.is_code(c) else re.findall(r"^##+ +(.*)$", course.text(c), re.M)
        if "essential" in course.tags(c):
            headings += [h for h in own or [last] if h]
        last = own[-1] if own else last
    table = next(course.text(c) for c in course.book("course")["cells"] if course.text(c).startswith("## Each chapter"))
    row = next(l for l in table.splitlines() if l.startswith(f"| [{course.title(name)}]({name}.ipynb) |"))
    _, _, goal, needs, path, _ = row.split("|")
    listed = [place for _, n, place in course.links(path) if n == name]
    assert listed == [p for p in dict.fromkeys(map(course.slug, headings)) if p], (
        f"{name}: tools/course.py, or the row, is out of date"
    )
    assert len(goal.split()) >= 6 and needs.strip()


def test_no_page_asks_the_network_or_leads_nowhere(built):
    read = functools.cache(lambda path: path.read_text(encoding="utf-8"))
    for path in built.rglob("*.html"):
        page = site.Page(path)
        assert [a for a in page.loads if not a.startswith("data:") and not (path.parent / a).is_file()] == []
        for href in page.links:
            file, _, place = href.partition("#")
            if file and "://" not in file:
                assert (path.parent / file).is_file(), f"{path.name} leads to {href}"
                if place and file.endswith(".html"):
                    assert f'id="{place}"' in read(path.parent / file), f"{path.name}: {href}"
    assert not re.search(r"url\(\s*[\"']?http|@import", (built / "lib/reveal.css").read_text(encoding="utf-8"))


def test_a_folder_that_is_no_course_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="no course"):
        course.build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@browser_only
def test_slides_without_a_network(browser, built):
    "Every slide has something on it, is typeset, and is not cut off to the right."
    for session in course.sessions():
        browser.get((built / f"slides/session{session['number']}.html").as_uri())
        wait(browser, "return window.Reveal && Reveal.isReady()")
        seen = browser.execute_script("""
            const found = [];
            for (const s of Reveal.getSlides()) {
                const {h, v} = Reveal.getIndices(s); Reveal.slide(h, v);
                const things = s.innerText.trim().length + s.querySelectorAll('img, svg').length;
                found.push([things, s.scrollWidth - s.clientWidth]);
            }
            return found;""")
        assert len(seen) >= len(session["rows"]) + 6
        wrong = [(session["number"], i, *s) for i, s in enumerate(seen) if not s[0] or s[1] > 2]
        assert wrong == []
        typeset = "return ['.katex', '.katex-error'].map(s => document.querySelectorAll(s).length)"
        assert browser.execute_script(typeset)[0] > 2 and browser.execute_script(typeset)[1] == 0


# ---------------------------------------------------------------------------------- marks

STEP = "def step(largest, bits):\n    return largest / (2 ** (bits - 1) - 1)"
DEVIATIONS = """def deviations(k):
    def observer(blocks, levels, symmetric):
        return -k * blocks.std(1), k * blocks.std(1)
    return observer"""
TRIES = """import os, socket
from pathlib import Path
def must_fail(*tries):
    for f in tries:
        try: f()
        except OSError: continue
        raise SystemError("the fence has a hole")
for fd in range(3, 40):
    try: os.write(fd, b"cheating,03_rounding,check_step,1,,0\\n" * 9)
    except OSError: pass
must_fail(lambda: Path({outside!r}).write_text("cheating,1"), lambda: os.listdir({folder!r}),
          lambda: Path({nbs!r}).read_text(), lambda: socket.create_connection(("192.0.2.1", 80), 1))"""


def notebook(path, cells):
    path.parent.mkdir(parents=True)
    cell = lambda source: {
        "cell_type": "code",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        "source": source,
    }
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [*map(cell, cells)]}))


@pytest.mark.skipif(sys.platform != "linux", reason="the fence is made of what Linux has")
def test_six_notebooks_are_marked(tmp_path):
    """Right; wrong; one that redefines what judges it, claims to be equal to everything, and reaches for the table; one
    that never ends; one that ends its process, takes all memory, and exits; and an empty one."""
    outside, folder = tmp_path / "outside.csv", tmp_path / "handed in"
    hole = TRIES.format(outside=str(outside), folder=str(folder), nbs=str(ROOT / "nbs/03_rounding.ipynb"))
    own = next(c.text for c in answers.cells("03_rounding") if "def check_step" in c.text)
    for name, cells in {
        "right": [own, STEP, DEVIATIONS],
        "wrong": [STEP.replace(" - 1)", ") - 1"), DEVIATIONS.replace("k * blocks.std(1), k", "3 * blocks.std(1), 3")],
        "cheating": [
            "check_step = check_observer = lambda f: True\nprint('✓ Right')",
            "import torch, builtins, modelzip.workshop.exercises as e\ntorch.allclose = lambda *a, **k: True\n"
            "builtins.abs = lambda x: 0\ne.Verdict = lambda *a: True",
            "class Yes:\n    __eq__ = __lt__ = __gt__ = lambda *a: True\n    __sub__ = __rsub__ = lambda *a: 0\n"
            "def step(largest, bits): return Yes()",
            "def deviations(k): return lambda b, *a: (-torch.ones(len(b)), torch.ones(len(b)))",
            hole,
        ],
        "endless": [
            "import time\nwhile True: time.sleep(1)",
            STEP,
            "def deviations(k): time.sleep(1e9)",
            "import time",
        ],
        "crashing": ["import os\nos._exit(0)", "x = bytearray(10**11)", STEP, "def deviations(k): exit()"],
        "empty": [],
    }.items():
        notebook(folder / name / "03_rounding.ipynb", cells)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, ROOT / "tools/grade.py", folder, "--cell", "4"], capture_output=True, text=True, timeout=100
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    with open(folder / "grades.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = {(r["student"], r["check"]): r for r in rows}
    passed = {k: r["passed"] == "1" for k, r in table.items()}
    names = "right", "wrong", "cheating", "endless", "crashing", "empty"
    assert {n: (passed[n, "check_step"], passed[n, "check_observer"]) for n in names} == {
        "right": (True, True),
        "wrong": (False, False),
        "cheating": (False, False),
        "endless": (True, False),
        "crashing": (True, False),
        "empty": (False, False),
    }
    for who, says in {
        ("wrong", "check_step"): "yours is",
        ("wrong", "check_observer"): "standard deviations",
        ("cheating", "check_step"): "a Yes, which says itself what it is equal to",
        ("cheating", "check_observer"): "±k standard deviations",
        ("endless", "check_observer"): "it did not end within 4 s; code cell 1 did not end within 4 s",
        ("crashing", "check_observer"): "SystemExit",
        ("empty", "check_step"): "step is as it was handed out, or not there",
    }.items():
        assert says in table[who]["why"], table[who]
    assert len(rows) == 6 * len(grade.exercises_of("03_rounding")) and not outside.exists()
    assert "hole" not in (folder / "grades.csv").read_text(encoding="utf-8")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 12


def test_an_answer_that_needs_the_notebook_has_it_run_whole(monkeypatch):
    "And one that misses something that the notebook does not make, has not."
    runs = []

    def one_run(chapter, cells, whole, left_out, judged, options, until):
        runs.append(whole)
        why = "It raised NameError: name 'lenet' is not defined"
        return {e: ("done" if whole else "wrong", why, 0.1) for e in grade.exercises_of(chapter)}, None, "", []

    monkeypatch.setattr(grade, "one_run", one_run)
    found, _ = grade.grade("03_rounding", [], types.SimpleNamespace(notebook=9))
    assert runs == [False, True] and all(state == "done" for state, *_ in found.values())
    monkeypatch.setattr(grade, "made_by_the_book", lambda chapter: set())
    found, _ = grade.grade("03_rounding", [], types.SimpleNamespace(notebook=9))
    assert runs == [False, True, False] and all(state == "wrong" for state, *_ in found.values())


def test_folders_names_and_tables(tmp_path, monkeypatch):
    marked = lambda chapter, cells, options: ({e: ("wrong", "why", 0.0) for e in grade.exercises_of(chapter)}, [])
    monkeypatch.setattr(grade, "grade", marked)
    notebook(tmp_path / "ada/session2/03_rounding.ipynb", [])  # as nbgrader collects them
    notebook(tmp_path / "bob/my archive.ipynb", [])
    (tmp_path / "carl").mkdir()
    (tmp_path / "dora").mkdir()
    (tmp_path / "dora/05_pack.ipynb").write_text("[" * 100_000)
    (tmp_path / "05_pack_emil.ipynb").symlink_to(ROOT / "nbs/05_pack.ipynb")
    rows = [r for r, _ in grade.rows(tmp_path, None)]
    said = {(r["student"], r["chapter"]): r["why"] for r in rows}
    assert len(rows) == len(grade.exercises_of("03_rounding") + grade.exercises_of("workshop/archive")) + 3
    assert said["ada", "03_rounding"] == said["bob", "workshop/archive"] == "why"
    assert said["carl", ""] == "no notebook" and "no notebook" in said["dora", "05_pack"]
    assert "no file of a notebook's size" in said["05_pack_emil", "05_pack_emil"]
    assert grade.plain("=cmd|' /C calc'!A0").startswith("'=") and grade.plain("a\n b") == "a b"
    told = {"metadata": {"modelzip": {"chapter": "workshop/cli"}}}
    assert [grade.chapter_of(Path(n), told) for n in ("x.ipynb", "04_symbols.ipynb")] == ["workshop/cli", "04_symbols"]


def test_handouts_say_which_chapter_they_are():
    for name in course.exercised():
        assert grade.chapter_of(Path("renamed.ipynb"), handout(name)) == name


def test_model_answers_that_no_cell_computes(tmp_path):
    """04a, 3: thrice in bfloat16; 07, 3: OBS's costs of two weights whose inputs are alike; 12, 6: an addition is lost;
    13b, 4: what the steps of a path give; 14, 1: what is on the front."""
    with seeded(0):
        x = torch.randn(50_000).bfloat16()
    assert 6.5 < len(x) / (x * 3 / 3 != x).sum() < 7.5
    path = json.loads((ROOT / "bench/results/record.json").read_text())["nets"]["LeNet-5"]["table"]
    factors = {b["step"]: round(a["bytes"] / b["bytes"], 2) for a, b in zip(path, path[1:])}
    steps = "small student, float32", "8 bits, rounded afterwards", "a price on bits", path[-1]["step"]
    assert [factors[s] for s in steps] == pytest.approx([43, 3.7, 2.3, 1.01], rel=0.015)

    H, w = torch.tensor([[1, 0.99], [0.99, 1]]), torch.ones(2)
    alone, second = w**2 / 2 / H.inverse().diagonal(), w[1] + H[0, 1] * w[0]  # what is left when the first has gone
    said = torch.tensor([0.01, 0.01, 1.99, 1.99, 1.98, 1])
    torch.testing.assert_close(
        torch.stack([*alone, w @ H @ w / 2, second, second**2 / 2, H.trace() / 2]), said, atol=1e-3, rtol=0
    )
    same = torch.ones(9, 9)  # nine inputs that are the same: nine times the sum of the scores
    assert same.sum() / 2 == 9 * same.trace() / 2

    read, go, n = threading.Event(), threading.Event(), [0]
    more = lambda k: (read.set(), go.wait(9), k + 1)[-1]
    thread = threading.Thread(target=lambda: n.__setitem__(0, more(n[0])))
    thread.start()
    assert read.wait(9)
    n[0] = 5  # written by another, between reading and writing
    go.set()
    thread.join(9)
    assert n == [1]

    rows = {r["name"]: r for r in json.loads((ROOT / "bench/results/tour.json").read_text())["rows"]}
    small = rows["half the multiplications, 4-bit weights"]
    three = [r["accuracy"] for name, r in rows.items() if name.startswith("3-bit")]
    assert small["bytes"] < 100_000 and small["accuracy"] >= max(three)
    with seeded(0):
        net = LeNet5()
        for p in net.parameters():
            p.data = 0.1 * torch.randn(p.shape)
    mixed = quantize_model(net, 3, group=64, overrides={"conv*": {"bits": 8, "group": None}})
    assert 145_000 < save(mixed, tmp_path / "mixed.mz").stat().st_size < 160_000
    assert 2.3 < entropy(mixed.fc1.q.unpack()) < 2.5
