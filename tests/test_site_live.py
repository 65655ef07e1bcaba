"""Explorers that the site computes: tools/site/try/live.js in Chromium, beside the functions of the library."""

import base64, bisect, heapq, itertools, json, random, re, statistics

import numpy as np
import pytest
import torch

from browsing import ROOT, browser_only, wait
from modelzip.data import minilm
from modelzip.measure import sqnr
from modelzip.quant import quantize
from modelzip.rounding import scale_and_zero_point, symmetric_zero_point

TRIES = ROOT / "tools/site/try"
LAYERS = "attention.query", "up", "down"


@pytest.fixture(scope="module")
def weights():
    held = json.loads((TRIES / "weights.js").read_text().removeprefix("const mzWeights = ").removesuffix(";\n"))
    read = lambda w: torch.from_numpy(np.frombuffer(base64.b64decode(w["data"]), "f2").astype("f4")).view(w["shape"])
    return {name: read(w) for name, w in held.items()}


def test_weights_are_those_of_the_model(weights):
    model = minilm()
    assert tuple(weights) == LAYERS
    for name, w in weights.items():
        assert torch.equal(w, model.get_submodule(f"blocks.0.{name}").weight[:16, :384].half().float())


@pytest.fixture
def computed(browser):
    "A blank page with the functions; a function that runs JavaScript there."
    browser.get("about:blank")
    source = (TRIES / "weights.js").read_text() + (TRIES / "live.js").read_text() + "window.mzLive = mzLive;"
    browser.execute_script(
        "const s = document.createElement('script'); s.text = arguments[0]; document.head.append(s)", source
    )
    return browser.execute_script


@browser_only
def test_clips_are_those_of_the_chapter(computed, weights):
    cases = [(n, levels, share) for n in LAYERS for levels in (2, 3, 4, 15, 16, 64) for share in (0.1, 0.37, 0.8, 1)]
    cases = [(n, levels, float(share * weights[n].abs().max())) for n, levels, share in cases]
    found = computed(
        "return arguments[0].map(([n, levels, limit]) => mzLive.clip(mzLive.weights(n), levels, limit))", cases
    )
    for (name, levels, limit), there in zip(cases, found):
        w, end = weights[name].flatten(), torch.tensor(limit)
        scale, middle = scale_and_zero_point(-end, end, levels)[0], symmetric_zero_point(levels)
        codes = (w / scale + middle).round()
        back = scale * ((kept := codes.clip(0, levels - 1)) - middle)
        assert there["db"] == pytest.approx(sqnr(w, back), abs=1e-6)
        np.testing.assert_array_equal(there["marks"], scale * (torch.arange(levels) - middle))
        beyond = codes != kept
        error = (w - back).double().square()
        assert there["beyond"] == beyond.sum() and there["clipped"] == pytest.approx(
            float(error[beyond].sum() / error.sum()), abs=1e-6
        )


@browser_only
def test_groups_are_those_of_quantize(computed, weights):
    cases = [(n, bits, group) for n in LAYERS for bits in (2, 3, 4, 5, 6) for group in (4, 8, 16, 32, 64, 128, 384)]
    found = computed(
        "return arguments[0].map(([n, bits, group]) => mzLive.groups(mzLive.weights(n), bits, group))", cases
    )
    for (name, bits, group), there in zip(cases, found):
        q = quantize(weights[name], bits, group=group)
        assert there["db"] == pytest.approx(sqnr(weights[name], q.dequantize()), abs=1e-6)
        assert (there["codes"], there["scales"]) == tuple(q.parts()[p].nbytes for p in ("codes", "scale"))
        assert there["bits"] == q.bits_per_weight


@pytest.fixture(scope="module")
def serve():
    "The chapter's simulated server, from the chapter."
    cells = json.loads((ROOT / "nbs/12_threads.ipynb").read_text(encoding="utf-8"))["cells"]
    code = next("".join(c["source"]) for c in cells if "".join(c["source"]).startswith("def serve("))
    exec(code, names := dict(random=random, itertools=itertools, heapq=heapq, bisect=bisect))
    return names["serve"]


@browser_only
def test_requests_are_those_of_the_chapter(computed, serve):
    cases = [(2.0, 1, 1, 0), (4.4, 3, 8, 0), (0.5, 2, 16, 12345), (6.0, 4, 32, 2**32 - 1), (1.0, 2, 1, 7)]
    found = computed(
        "return arguments[0].map(([rate, k, most, seed]) => mzLive.serve(rate, k, most, 300, seed))", cases
    )
    for (rate, workers, most, seed), there in zip(cases, found):
        come, leave = serve(rate, workers, most, requests=300, seed=seed)
        np.testing.assert_allclose(there["come"] + there["leave"], come + leave, rtol=1e-12)
        assert there["stay"] == pytest.approx(statistics.mean(b - a for a, b in zip(come, leave)))
        assert all(a <= s < b for a, s, b in zip(there["come"], there["start"], there["leave"]))


PAGES = {"03_rounding": "clip", "03a_qtensor": "groups", "12_threads": "queue"}


@browser_only
@pytest.mark.parametrize("page", PAGES)
def test_every_knob_changes_what_is_shown(browser, address, page):
    browser.get(f"{address}/{page}.html")
    root = f"#mz-try-{PAGES[page]}"
    wait(browser, "return document.querySelector(arguments[0]).dataset.ready !== undefined", root)
    picture = (
        "const r = document.querySelector(arguments[0]); return [...r.querySelectorAll('svg')].map(s => s.innerHTML)"
    )
    said = lambda: browser.find_element("css selector", f"{root} .mz-said").text
    for i in range(len(browser.find_elements("css selector", f"{root} :is(input, select)"))):
        before, now = browser.execute_script(picture, root), said()
        moved = """const k = document.querySelectorAll(arguments[0] + ' :is(input, select)')[arguments[1]];
            if (k.tagName == 'SELECT') k.selectedIndex = 2; else k.value = k.value == k.max ? k.min : k.max;
            k.dispatchEvent(new Event('input', {bubbles: true})); return k.tagName == 'SELECT' || k.getAttribute('aria-valuetext')"""
        assert browser.execute_script(moved, root, i)
        assert browser.execute_script(picture, root) != before and said() != now
        assert not re.search("NaN|Infinity|undefined", str(browser.execute_script(picture, root)) + said())
