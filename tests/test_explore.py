"""What explorers promise wherever they are shown: one piece of HTML, the same every time, safe, small, and live in
a kernel."""

import html, inspect, io, json, math, os, re, subprocess, sys, textwrap
from html.parser import HTMLParser

import matplotlib
from guards import examples

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from modelzip import explore as module
from modelzip.explore import Explorer, MAX_BYTES, combinations, control, explore, frame, in_script, page, table
from modelzip.workshop import frames

from book import WIDGET


def words(n=2, loud=False):
    return ("ONE", "TWO", "THREE")[n - 1] if loud else ("one", "two", "three")[n - 1]


def curve(k=1):
    "a wave"
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot(np.sin(np.linspace(0, k, 50)))
    return fig


@pytest.fixture
def live(monkeypatch):
    "As if a kernel were listening."
    monkeypatch.setattr(module, "is_live", lambda: True)


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.script, self.inside, self.stack = [], "", None, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag not in ("input", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.script += data

    def all(self, tag):
        return [a for t, a in self.tags if t == tag]


def data_of(explorer):
    "The frames and their order as the script of the page has them."
    script = Parsed(explorer.html()).script
    labels, order, frames = re.search(r"labels = (.*), order = (\[[\d,]*\]), frames = (.*);\n", script).groups()
    return json.loads(labels), json.loads(order), json.loads(frames)


# ---------------------------------------------------------------------------------- static


def test_bundle_is_html_and_text():
    bundle = explore(words, n=range(1, 4), loud=False)._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert bundle["text/plain"] == "explore(words, n=2, loud=off)"


def test_markup():
    parsed = Parsed(explore(words, n=range(1, 4), loud=True).html())
    assert not parsed.stack, "every element is closed"
    slider, box = parsed.all("input")
    assert (slider["type"], slider["min"], slider["max"], slider["value"], slider["aria-valuetext"]) == (
        "range",
        "0",
        "2",
        "1",
        "2",
    )
    assert box["type"] == "checkbox" and "checked" in box
    assert "disabled" in parsed.all("fieldset")[0], "without the script nothing pretends to work"
    assert not any("id" in a for _, a in parsed.tags), "no ids that two explorers could share"


def test_first_frame_is_the_direct_call():
    e = explore(words, n=range(1, 4), loud=False)
    assert f'<div class="mz-frame" aria-live="polite">{frame(words, dict(n=2, loud=False))}</div>' in e.html()
    drawn = explore(curve, k=[3, 1, 2])
    assert any(
        f'<div class="mz-frame" aria-live="polite">{frame(curve, dict(k=1), form)}</div>' in drawn.html()
        for form in ("png", "svg")
    )


def test_every_combination_shows_its_frame():
    e = explore(words, n=range(1, 4), loud=False)
    labels, order, frames = data_of(e)
    assert labels == [["1", "2", "3"], ["off", "on"]]
    first = frames.index(None)
    frames[first] = re.search(r'<div class="mz-frame" aria-live="polite">(.*?)</div>', e.html())[1]
    for p, places in zip(order, combinations(e.controls)):
        values = {c.name: c.values[i] for c, i in zip(e.controls, places)}
        assert frames[p] == frame(words, values)


def test_equal_frames_are_kept_once():
    calls = []

    def parity(n):
        calls.append(n)
        return "odd" if n % 2 else "even"

    _, order, frames = data_of(explore(parity, n=range(100)))
    assert len(frames) == 2 and order == [0, 1] * 50
    _, order, frames = data_of(explore(lambda k, unused: curve(k), k=[1, 2], unused=range(4)))
    assert len(frames) == 2 and order == [0] * 4 + [1] * 4


def test_figures_are_closed_and_those_of_others_left():
    plt.close("all")
    mine = plt.figure()
    explore(curve, k=[1, 2, 3])

    def careless(k=1):
        plt.plot([k])  # returns nothing, leaves its figure open

    explore(careless, k=[1, 2]).html()

    def fails(k):
        plt.figure()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        explore(fails, k=[1])
    assert plt.get_fignums() == [mine.number]
    plt.close("all")


def test_results_of_all_kinds():
    from PIL import Image

    class Svg:
        def _repr_svg_(self):
            return '<svg xmlns="http://www.w3.org/2000/svg"/>'

    class Html:
        def _repr_html_(self):
            return "<b>4</b>"

    results = dict(
        axes=lambda: curve().axes[0],
        array=lambda: plt.subplots(1, 2)[1],
        svg=Svg,
        html=Html,
        number=lambda: 4,
        picture=lambda: Image.new("RGB", (2, 2)),
    )
    shown = {k: frame(lambda kind: results[kind](), dict(kind=k)) for k in results}
    assert all(shown[k].startswith('<img src="data:image/png;base64,') for k in ("axes", "array", "picture"))
    assert (
        shown["svg"].startswith('<img src="data:image/svg+xml,')
        and shown["html"] == "<b>4</b>"
        and shown["number"] == "<pre>4</pre>"
    )


def test_printed_text_comes_before_the_result():
    def both(n):
        print("<printed>")
        return "returned"

    assert frame(both, dict(n=1)) == "<pre>&lt;printed&gt;\n</pre><pre>returned</pre>"


def test_nothing_from_elsewhere():
    text = explore(curve, k=range(1, 5)).html()
    for _, a in Parsed(text).tags:
        for key in ("src", "href"):
            assert a.get(key, "data:").startswith("data:")
    assert "http" not in re.sub(r"data:image[^\"\\]*", "", text)


NASTY = [
    '</script><script>alert(1)</script>',
    '<!-- <script>',
    '"quoted" \'single\'',
    "a & b < c",
    "\u2028line",
    "naïve 日本",
    "\\u003c",
    "$x$",
    "IDENTITY ORDER FRAMES LABELS ID FIRST",
]


@pytest.mark.parametrize("text", NASTY)
def test_escaping(text):
    e = explore(lambda menu, v, **other: f"{menu}{v}", menu={text: text, "plain": 1}, v=[1, 2], **{text: [1, 2]})
    parsed = Parsed(e.html())
    assert not parsed.stack and len(parsed.all("script")) == 1
    labels, _, frames = data_of(e)
    assert labels[0] == [text, "plain"]
    assert f"<pre>{html.escape(text)}2</pre>" in frames
    assert f"<label>{html.escape(text)} <input" in e.html()


@settings(max_examples=examples(200), deadline=None)
@given(
    st.recursive(
        st.text() | st.integers(-(10**6), 10**6) | st.none(), lambda inner: st.lists(inner, max_size=4), max_leaves=12
    )
)
def test_in_script_is_json_that_cannot_end_the_script(value):
    text = in_script(value)
    assert json.loads(text) == value
    assert "</" not in text and "<!" not in text


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_page_starts_where_its_controls_stand(sizes, data):
    controls = [control(f"c{i}", list(range(n)), data.draw(st.integers(0, n - 1))) for i, n in enumerate(sizes)]
    frames, order = table(lambda **values: str(sorted(values.items())), controls)
    start = {c.name: c.values[c.start] for c in controls}
    assert (
        f'<div class="mz-frame" aria-live="polite"><pre>{html.escape(str(sorted(start.items())))}</pre></div>'
        in page(controls, frames, order)
    )


# ---------------------------------------------------------------------------------- the same every time


def test_two_runs_give_the_same_bytes(monkeypatch):
    "Here, and in a process with another order of sets."
    pages = lambda: (
        explore(curve, k=[1, 2]).html() + explore(lambda k: curve().axes[0].imshow(np.eye(9) * k), k=[1]).html()
    )
    code = f"""if True:
        import matplotlib
        matplotlib.use('agg')
        import numpy as np, matplotlib.pyplot as plt
        from modelzip.explore import explore
{textwrap.indent(inspect.getsource(curve), " " * 8)}
        print(explore(curve, k=[1, 2]).html() + explore(lambda k: curve().axes[0].imshow(np.eye(9) * k), k=[1]).html())"""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    monkeypatch.setenv("MODELZIP_STATIC", "1")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": seed},
    )
    here = pages()
    assert done.stdout == here + "\n" and here.count("mz-explore mz-") == 2


def test_several_on_one_page_do_not_share_a_name():
    names = {
        re.search(r"mz-explore (mz-\w+)", explore(words, n=ns, loud=loud).html())[1]
        for ns in ([1, 2], [2, 3])
        for loud in (True, False)
    }
    assert len(names) == 4


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "controls, error, says",
    [
        (dict(n=4), TypeError, "n is 4"),
        (dict(n="abc"), TypeError, "n is 'abc'"),
        (dict(n=[]), ValueError, "n has no values"),
        (dict(n={}), ValueError, "n has no values"),
        (dict(n=()), ValueError, "n has no values"),
        (dict(n=(1, 2, 3, 4)), ValueError, "n is a tuple of 4 numbers"),
        (dict(n=(1.0,)), ValueError, "write a list"),
        (dict(n=(3, 1)), ValueError, "low <= high"),
        (dict(n=(0, 1, 0)), ValueError, "step > 0"),
        (dict(n=(0, float("inf"))), ValueError, "finite"),
        (dict(n=(0, 1, 1e-9)), ValueError, "larger step"),
        (dict(n=[1, 1]), ValueError, "the same label"),
        (dict(m=[1]), TypeError, "words has no argument m; it has n, loud"),
        ({}, ValueError, "no control"),
        (dict(n=np.eye(2)), TypeError, "n is"),
    ],
)
def test_bad_controls(controls, error, says):
    with pytest.raises(error, match=re.escape(says)):
        explore(words, **controls)


def test_bad_functions():
    with pytest.raises(TypeError, match="needs a function"):
        explore(4, n=[1])
    with pytest.raises(TypeError, match="needs loud"):
        explore(lambda n, loud: n, n=[1])
    with pytest.raises(ValueError, match="showed nothing for {'n': 1}"):
        explore(lambda n: None, n=[1])


def test_an_error_says_where():
    with pytest.raises(ZeroDivisionError) as caught:
        explore(lambda n: 1 / n, n=[1, 0])
    if sys.version_info >= (3, 11):
        assert "n=0" in caught.value.__notes__[0]


def test_too_many_frames_is_said_before_any_is_drawn():
    def never(**values):
        raise AssertionError("drawn")

    with pytest.raises(
        ValueError,
        match=(
            r"a 100 × b 20 = 2,000 frames: at most 1,000 are drawn\. Give fewer values, first of all to 'a', which"
            r" has 100"
        ),
    ):
        table(never, [control("a", range(100)), control("b", range(20))])


def test_too_many_bytes():
    with pytest.raises(
        ValueError, match=r"n 9 = 9 frames: the first 5 take 1,000,055 bytes, and 1,000,000 are allowed"
    ):
        explore(lambda n: str(n) * 200_000, n=range(1, 10))
    e = Explorer(lambda n: str(n) * 200_000, [control("n", range(1, 10))])
    assert len(e.html(limit=10 * MAX_BYTES)) > MAX_BYTES


# ---------------------------------------------------------------------------------- controls


@pytest.mark.parametrize(
    "spec, kind, values",
    [
        (range(3), "slider", (0, 1, 2)),
        ([1, 2.5], "slider", (1, 2.5)),
        ([2, 1], "menu", (2, 1)),
        (["a", "b"], "menu", ("a", "b")),
        (("a", "b"), "menu", ("a", "b")),
        ((0, 3), "slider", (0, 1, 2, 3)),
        ((0.0, 1.0, 0.5), "slider", (0.0, 0.5, 1.0)),
        ((0, 0.3, 0.1), "slider", (0.0, 0.1, 0.2, 0.3)),
        ({"x": 1, "y": 2}, "menu", (1, 2)),
        (True, "checkbox", (False, True)),
        (np.arange(3), "slider", (0, 1, 2)),
        ([None, "a"], "menu", (None, "a")),
        ([True, False], "menu", (True, False)),
    ],
)
def test_rules(spec, kind, values):
    c = control("x", spec)
    assert (c.kind, c.values) == (kind, values) and len(c.labels) == len(values)


@settings(max_examples=examples(200), deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(1e-2, 10), st.integers(0, 200))
def test_both_ends_are_included(low, step, n):
    values = module.steps(low, low + n * step, step)
    assert len(values) == n + 1 and np.allclose(values, low + np.arange(n + 1) * step)


# ---------------------------------------------------------------------------------- files and sizes


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = explore(words, n=[1, 2]).save(tmp_path / "a.html")
    before = path.read_bytes()
    assert before.startswith(b"<!doctype html>") and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        explore(words, n=[2, 3]).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_frames_are_small():
    def line(k=1):
        ax = plt.figure(figsize=(6.4, 3.2)).subplots()
        ax.plot(np.sin(np.linspace(0, k, 300)))
        ax.set(xlabel="x", title="line")
        return ax

    def picture(k=1):
        return module.plot_matrix(np.random.default_rng(k).normal(size=(40, 80)))

    assert len(explore(line, k=[1, 2]).html()) < 2 * 15_000
    assert len(explore(picture, k=[1, 2]).html()) < 2 * 20_000


def test_compact_svg_draws_the_same():
    text = module.drawn(curve(), "svg")
    small = module.compact_svg(text).decode()
    import xml.etree.ElementTree as ET

    old, new = ET.fromstring(text), ET.fromstring(small)
    count = lambda root: sorted(
        e.tag.split("}")[1] for e in root.iter() if e.tag.split("}")[1] in ("path", "use", "text")
    )
    assert count(old) == count(new) and len(small) < 0.75 * len(text)
    numbers = lambda root: np.array(
        [float(n) for e in root.iter() if e.tag.endswith("path") for n in re.findall(r"-?[\d.]+", e.get("d", ""))]
    )
    assert np.abs(numbers(old) - numbers(new)).max() <= 0.0051
    for used in re.findall(r"#([\w]{9,})", small):
        assert f'id="{used}"' in small


# ---------------------------------------------------------------------------------- a guess first


ASKED = dict(guess="Is one < two?", answers={"yes": True, "no": False, "both": 0.5}, measured="One & two.")


@pytest.mark.parametrize("static", ["1", "sample"])
def test_a_guess_comes_first(monkeypatch, static):
    "The question, then everything else behind a fold; the right answer is inside the fold alone."
    monkeypatch.setenv("MODELZIP_STATIC", static)
    plain, asked = (explore(words, **how, n=[1, 2]) for how in ({}, ASKED))
    page, said = (e._repr_mimebundle_()["text/html"] for e in (plain, asked))
    before, after = said.split("<details>")
    assert page in after and page not in before and "One &amp; two" in after and "One &amp; two" not in before
    assert before.count("<button") == 3 and "Is one &lt; two?" in before and "<fieldset disabled" in before
    assert not Parsed(said).stack and not any("id" in a for _, a in Parsed(said).tags)
    assert said == explore(words, **ASKED, n=[1, 2])._repr_mimebundle_()["text/html"]


def test_a_guess_comes_first_in_a_kernel(live):
    calls = []
    box = explore(lambda n: calls.append(n) or f"{n}", **ASKED, n=[1, 2]).widget()
    buttons = box.children[1].children
    assert [b.description for b in buttons] == ["yes", "no", "both"] and len(box.children) == 2 and calls == []
    buttons[1].click()
    verdict, shown = box.children[2:]
    assert verdict.value == "Measured otherwise: yes. One &amp; two." and shown.children[1].value == "<pre>1</pre>"
    assert all(b.disabled for b in buttons)


def test_the_largest_answer_is_right():
    for numbers in ([1, 2, 3], [-1.0, -2.0], [np.float32(0.5), 0], [True, False]):
        question = module.Question("Which?", {f"a{i}": v for i, v in enumerate(numbers)})
        assert question.right == f"a{int(np.argmax(numbers))}"
        assert [question.verdict(a).startswith("Right.") for a in question.answers].count(True) == 1


@pytest.mark.parametrize(
    "how, error, says",
    [
        (dict(guess="Which?"), ValueError, "answers is None"),
        (dict(answers=dict(a=1, b=2)), TypeError, "belong to a guess"),
        (dict(measured="3"), TypeError, "belong to a guess"),
        (dict(guess="Which?", answers=dict(a=1, b=1)), ValueError, "stands there twice"),
        (dict(guess="Which?", answers={1: 1, "1": 2}), ValueError, "the same text"),
        (dict(guess="Which?", answers=dict(a=1, b=None)), TypeError, "answers['b'] is None"),
    ],
)
def test_a_question_without_an_answer(how, error, says):
    with pytest.raises(error, match=re.escape(says)):
        explore(words, **how, n=[1, 2])


# ---------------------------------------------------------------------------------- live


def test_live_bundle_has_widgets_and_html(live):
    bundle = explore(words, n=range(1, 4), loud=False)._repr_mimebundle_()
    assert set(bundle) == {WIDGET, "text/html", "text/plain"} and bundle[WIDGET]["model_id"]
    assert "<pre>two</pre>" in bundle["text/html"]


def test_live_draws_only_what_is_asked_for(live):
    calls = []

    def f(n, loud):
        calls.append(n)
        return str(n)

    box = explore(f, n=range(5_000), loud=False).widget()
    assert calls == [0]
    box.children[0].children[0].value = 4_321
    assert calls == [0, 4_321] and box.children[1].value == "<pre>4321</pre>"


def test_live_controls_change_the_frame(live):
    box = explore(words, n=[3, 1, 2], loud=False).widget()
    (menu, check), stage = box.children[0].children, box.children[1]
    assert stage.value == "<pre>two</pre>"
    menu.value = 0
    assert stage.value == "<pre>three</pre>"
    check.value = True
    assert stage.value == "<pre>THREE</pre>"


def test_live_shows_errors_inside_and_goes_on(live):
    slider, stage = (box := explore(lambda n: 1 / n, n=range(2)).widget()).children[0].children[0], box.children[1]
    assert "ZeroDivisionError: division by zero" in stage.value and "/" not in re.sub(
        r"</?\w+[^>]*>|1 / n", "", stage.value
    ).replace("1 / n", "")
    slider.value = 1
    assert stage.value == "<pre>1.0</pre>"


def test_live_figures_are_closed(live):
    plt.close("all")
    slider = explore(curve, k=range(1, 5)).widget().children[0].children[0]
    for v in range(4):
        slider.value = v
    assert plt.get_fignums() == []


def test_environment_and_kernel_decide(monkeypatch):
    monkeypatch.setenv("MODELZIP_STATIC", "0")
    assert not module.is_live(), "no kernel here"

    class Shell:
        kernel = object()

    class IPython:
        @staticmethod
        def get_ipython():
            return Shell()

    monkeypatch.setitem(sys.modules, "IPython", IPython)
    assert module.is_live()
    monkeypatch.setenv("MODELZIP_STATIC", "1")
    assert not module.is_live()


def test_a_sample_calls_for_all_pages_and_draws_the_first(monkeypatch):
    monkeypatch.setenv("MODELZIP_STATIC", "sample")
    asked, pictures, drawn = [], [], frames.drawn

    def noted(k=2):
        asked.append(k)
        return curve(k)

    monkeypatch.setattr(frames, "drawn", lambda *how: pictures.append(how) or drawn(*how))
    explorer = explore(noted, k=range(1, 6))
    shown = explorer._repr_mimebundle_()["text/html"]
    assert sorted(asked) == [1, 2, 3, 4, 5] and len(pictures) == 1 and plt.get_fignums() == []
    assert shown.startswith(frame(curve, {"k": 2}).replace("a wave", "noted")) and "<script>" not in shown
    with pytest.raises(ZeroDivisionError):
        explore(lambda n: 1 / n, n=[1, 0])
    with pytest.raises(ValueError, match="frames: at most"):
        explore(noted, k=range(module.MAX_FRAMES + 1))
    monkeypatch.setenv("MODELZIP_STATIC", "1")
    assert "<script>" in explorer._repr_mimebundle_()["text/html"], "asked for all pages it draws them"


def test_importing_needs_no_widgets_and_no_kernel():
    code = (
        "import sys, modelzip.explore as e; e.explore(lambda n: n, n=[1]); print([m for m in ('IPython', 'ipywidgets',"
        " 'matplotlib', 'nbdev', 'torch') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_in_a_real_kernel():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = (
        "import os\nos.environ['MODELZIP_STATIC'] = '{}'\nfrom modelzip.explore import explore\nfrom matplotlib import"
        " pyplot as plt\ndef f(n=2): plt.plot([n])\nexplore(f, n=range(1, 4))",
        "explore(lambda n: 1 / n, n=[1, 0])",
    )
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.format(s)) for s in ("1", "") for c in cells])
    run = nbclient.NotebookClient(nb, timeout=60, kernel_name="python3", allow_errors=True)
    run.execute(env={**os.environ, "PYTHONPATH": os.getcwd()})
    for static, page, wrong in (True, *nb.cells[:2]), (False, *nb.cells[2:]):
        (shown,), (error,) = page.outputs, wrong.outputs
        assert set(shown.data) == ({"text/html", "text/plain"} if static else {WIDGET, "text/html", "text/plain"}), (
            "one output, and no second figure"
        )
        assert '<img src="data:image/' in shown.data["text/html"] and (
            not static or shown.data["text/html"].count("<fieldset") == 1
        )
        assert (error.output_type == "error") == static, (
            "a published notebook stops at an error; a live explorer shows it inside"
        )


# ---------------------------------------------------------------------------------- what a function returns

RETURNS = {
    "plot": lambda: plt.plot([1, 2]),
    "hist": lambda: plt.hist([1, 2, 2]),
    "two hists": lambda: plt.hist([[1, 2], [2, 3]]),
    "bar": lambda: plt.bar([1], [2]),
    "pie": lambda: plt.pie([1, 2]),
    "box": lambda: plt.boxplot([1, 2, 3]),
    "errorbar": lambda: plt.errorbar([1], [2], 1),
    "title": lambda: plt.title("t"),
    "image": lambda: plt.imshow(np.eye(3)),
    "contour": lambda: plt.contour(np.eye(3)),
    "scatter": lambda: plt.scatter([1], [2]),
    "pair": lambda: plt.subplots(),
    "grid": lambda: plt.subplots(2, 2),
    "mosaic": lambda: plt.figure().subplot_mosaic("AB"),
    "axes": lambda: list(plt.subplots(1, 2)[1]),
    "set": lambda: plt.subplots()[1].set(title="t", xlabel="x"),
    "nothing": lambda: (plt.plot([1]), None)[1],
    "part": lambda: plt.figure().subfigures(1, 2)[0].add_subplot(),
    "parts": lambda: plt.figure().subfigures(1, 2),
    "text too": lambda: (plt.plot([1]), "text")[1],
    "with a text": lambda: (plt.figure(), "text"),
    "own": lambda: __import__("matplotlib.figure").figure.Figure(),
    "tuple": lambda: (plt.gcf().add_subplot(), 3),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_every_way_to_return_a_figure_shows_it_once(kind):
    plt.close("all")
    shown = frame(lambda: RETURNS[kind](), {})
    assert shown.count("<img") == 1 and plt.get_fignums() == []
    assert (
        ("<pre>text</pre>" in shown) == ("text" in kind)
        and ("<pre>3</pre>" in shown) == (kind == "tuple")
        and shown.count("<pre>") == ("text" in kind) + (kind == "tuple")
    )


def test_several_figures_and_what_is_drawn_beside_them():
    assert frame(lambda: [plt.figure(), plt.figure()], {}).count("<img") == 2
    assert frame(lambda: {"a": plt.subplots()[1], "b": plt.figure()}, {}).count("<img") == 2

    def drawn_and_returned():
        plt.plot([1])
        return plt.figure()

    assert frame(drawn_and_returned, {}).count("<img") == 2


def test_what_says_how_it_is_shown():
    from IPython.display import HTML, Latex, Markdown, Math

    class Bundle:
        def __init__(self, **data):
            self.data = {k.replace("_", "/").replace("svg", "svg+xml"): v for k, v in data.items()}

        def _repr_mimebundle_(self, include=None, exclude=None):
            return self.data

    class Tupled:
        def _repr_png_(self):
            return b"\x89PNG", {"width": 3}

    class Anything:
        def __getattr__(self, name):
            return "surprise"

    show = lambda x: frame(lambda: x, {})
    assert (
        show(Markdown("**a** < b")) == "<pre>**a** &lt; b</pre>"
        and show(Latex("$x^2$")) == "<pre>$x^2$</pre>"
        and "x^2" in show(Math("x^2"))
        and show(HTML("<b>4</b>")) == "<b>4</b>"
    )
    assert (
        show(Bundle(text_plain="p", text_html="<i>h</i>")) == "<i>h</i>"
        and show(Bundle(text_markdown=["*a*", "\nb"])) == "<pre>*a*\nb</pre>"
    )
    assert show(Bundle(image_svg="<svg/>", text_html="h")).startswith('<img src="data:image/svg+xml,') and show(
        Bundle(image_png="iVBORw==")
    ).startswith('<img src="data:image/png;base64,iVBORw==')

    class ByName:
        def _repr_mimebundle_(self, **how):
            return {"text/html": f"<b>{sorted(how)}</b>"}

    assert show(ByName()) == "<b>['exclude', 'include']</b>"
    assert show(Tupled()).startswith('<img src="data:image/png;base64,iVBORw==')
    assert (
        show(dict) == "<pre>&lt;class &#x27;dict&#x27;&gt;</pre>"
        and show(Bundle).startswith("<pre>")
        and "Anything object" in show(Anything())
    )
    with pytest.raises(ValueError, match="cannot hold an explorer"):
        show(explore(words, n=[1, 2]))
    with pytest.raises(ValueError, match="cannot hold an explorer"):
        show((plt.figure(), explore(words, n=[1, 2])))
    plt.close("all")


@pytest.mark.parametrize("nothing", ["", " \n", [], (), {}, None], ids=repr)
def test_an_empty_page_is_an_error(nothing):
    with pytest.raises(ValueError, match="showed nothing"):
        explore(lambda n: nothing, n=[1])
    assert frame(lambda: (print("said"), nothing)[1], {}) == "<pre>said\n</pre>"


def test_the_first_frame_has_the_default():
    start = lambda spec, **default: (c := module.control("x", spec, **default)).values[c.start]
    assert [
        start((0.0, 4.0), first=2),
        start((0, 4), first=2.0),
        start((0, 0.3, 0.1), first=0.1 + 0.2),
        start([1, True], first=True),
        start([True, 1], first=1),
        start((1 / 3, 1, 1 / 3), first=2 / 3),
    ] == [2.0, 2, 0.3, True, 1, pytest.approx(2 / 3)]
    assert [
        start(["x", None]),
        start(["x", None], first=None),
        start([3, 4], first=9),
        start([np.eye(2).tolist(), "b"], first="b"),
    ] == ["x", None, 3, "b"]
    assert explore(lambda x: str(x), x=["x", None]).html().count("<pre>x</pre>") == 1

    def f(x=None):
        return str(x)

    assert '<div class="mz-frame" aria-live="polite"><pre>None</pre>' in explore(f, x=["x", None]).html()
    with pytest.raises(TypeError, match="takes x by position alone"):
        explore(lambda x, /, n: n, n=[1])


@settings(max_examples=examples(100), deadline=None)
@given(st.floats(-1e14, 1e14), st.floats(1e-9, 1e6), st.integers(0, 50))
def test_steps_are_where_they_should_be(low, step, n):
    high = low + n * step
    if (high - low) / step > 9_000:
        return
    values = module.steps(low, high, step)
    count = math.floor((high - low) / step + 1e-9) + 1
    assert len(values) == count and values[0] == low and values[-1] <= high + 1e-9 * step
    assert all(abs(v - (low + i * step)) <= 1e-9 * step for i, v in enumerate(values))


def test_a_limit_counts_each_time():
    e = explore(words, n=[1, 2], loud=False)
    with pytest.raises(ValueError, match="5 are allowed"):
        e.html(limit=5)
    with pytest.raises(ValueError, match="5 are allowed"):
        e.save("/nonexistent/never.html", limit=5)
    assert e.html() == e.html(limit=10**9)


# ---------------------------------------------------------------------------------- pictures stay what they are


@settings(max_examples=examples(60), deadline=None)
@given(st.text(st.sampled_from(' idxyf="\'<>#&;:.0123456789/-!?'), min_size=1, max_size=40))
def test_svg_says_what_its_texts_say(said):
    import xml.etree.ElementTree as ET
    from xml.sax.saxutils import escape

    svg = (
        '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><g id="text_1"><text x="1.23456" style="font:'
        f' 10px \'DejaVu\', \'Arial\', sans-serif">{escape(said)}</text></g></svg>'
    )
    texts = [e.text for e in ET.fromstring(module.compact_svg(svg.encode())).iter() if e.tag.endswith("text")]
    assert texts == [said]


def test_a_title_with_quotes_keeps_its_letters():
    ax = plt.figure().subplots()
    ax.set_title('a title id="fc1" x="0.123456"')
    text = module.compact_svg(module.drawn(ax.figure, "svg")).decode()
    plt.close("all")
    assert 'a title id="fc1" x="0.123456"' in html.unescape(text)


@pytest.mark.parametrize("color", ["magenta", "cyan", "yellow", "lime", "red", "blue", "black", "white"])
def test_rare_colours_stay(color):
    from PIL import Image
    from matplotlib.colors import to_rgb

    rng = np.random.default_rng(0)
    picture = np.concatenate(
        [rng.integers(60, 200, (60, 80, 3)), np.tile(rng.integers(0, 255, (60, 1, 1)), (1, 80, 3))]
    ).astype(np.uint8)
    picture[30:34, 40:44] = want = np.array([round(255 * v) for v in to_rgb(color)])
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "png")
    after = np.asarray(Image.open(io.BytesIO(module.palette_png(out.getvalue()))).convert("RGB")).astype(int)
    assert np.abs(after[30:34, 40:44] - want).max() <= 24


def test_transparent_pictures_lie_on_white():
    from PIL import Image

    picture = Image.new("RGBA", (400, 300), (0, 0, 0, 0))
    picture.putpixel((5, 5), (255, 0, 0, 255))
    out = io.BytesIO()
    picture.save(out, "png", compress_level=0)
    after = np.asarray(Image.open(io.BytesIO(module.palette_png(out.getvalue()))).convert("RGB"))
    assert (after[0, 0] == 255).all() and (after[5, 5] == (255, 0, 0)).all()
