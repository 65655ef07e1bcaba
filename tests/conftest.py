"""Property tests try the same examples each time, so that the suite is not red by chance; `make fuzz` searches for
new ones."""

import contextlib, gc, importlib, os, sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))  # what tools and tests share
sys.path.append(ending := str(Path(__file__).resolve().parent / "ending"))  # of what tests start, too
os.environ["PYTHONPATH"] = os.pathsep.join([ending, *filter(None, [os.environ.get("PYTHONPATH")])])
import once
from browsing import address, browser, built, chromium  # noqa: F401, fixtures

# PyTorch is imported by the tests, not here: whoever hands tests to workers runs none
settings.register_profile("same", max_examples=40, deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
settings.load_profile("search" if os.environ.get("MODELZIP_FUZZ") else "same")
if not os.environ.get("MODELZIP_FUZZ"):  # Hypothesis would try the numbers that stand in modules, and so other examples
    providers._get_local_constants = lambda: providers.Constants()  # in each process, by what it has imported till then


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """Of several workers each begins with other test files, and finds the rest compiled, with asserts rewritten, by the
    others; else each would do all of it. The order of the tests is everywhere the same."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker or sys.dont_write_bytecode or not any(Path(a).is_dir() for a in session.config.args):
        return
    gc.disable()  # until all is imported
    names = sorted(p.stem for p in Path(__file__).parent.glob("test_*.py"))
    first = int(worker[2:]) * len(names) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for name in names[first:] + names[:first]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # it is imported again, and says so then
            importlib.import_module(name)


DEAR = ["wheel", "site", "graph", "site_reader", "right_pack", "teaching", "access", "threads", "onnx", "cli", "recipe"]
DEAR = [f"test_{name}" for name in DEAR]


def pytest_collection_modifyitems(items):
    "What takes longest begins first: else a processor waits for it at the end. (A worker gets the tests of a file whole.)"
    items.sort(key=lambda item: DEAR.index(item.path.stem) if item.path.stem in DEAR else len(DEAR))


def pytest_collection_finish():
    "What was imported stays: whoever collects garbage need not look at a million objects each time."
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 10, 10)  # who follows a model makes a million objects, and was interrupted every 700


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """What a file of tests leaves behind stays, too: caches, trees of code, what a library loaded when it was asked. Each
    time that is measured begins with a look at all objects for garbage, and a worker that has made the site has a million
    of them."""
    try:
        return (yield)
    finally:
        if nextitem and nextitem.path != item.path:
            gc.collect()
            gc.freeze()


@pytest.fixture
def seeded():
    "PyTorch's numbers by chance are the same ones in every test."
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def read_once():
    "What PyTorch reads anew for every ONNX file is read for the first."
    with once.translations_read_once():
        yield


@pytest.fixture(scope="module")
def asked_once():
    "What PyTorch asks itself anew for every model that it follows is asked for the first."
    with once.operations_asked_once():
        yield


@pytest.fixture(scope="module")
def fewer_choices():
    """What a search has on offer for each tensor: 2, 4, 6 and 8 bits, groups, every other step, and each share of zeros
    but one; all where the suite is a search itself."""
    from guards import share
    from modelzip.workshop import search

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "DENSE", share(search.DENSE, 5))
        patch.setattr(search, "SPARSE", share(search.SPARSE, 4))
        patch.setattr(search, "SPACED", share(search.SPACED, 6))
        yield
