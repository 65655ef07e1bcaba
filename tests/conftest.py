"""Property tests try the same examples each time, so that the suite is not red by chance; `make fuzz` searches for
new ones."""

import gc, importlib.util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from guards import FUZZ, share

settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
settings.load_profile("search" if FUZZ else "same")


def pytest_collection_finish():
    "What was imported stays: whoever collects garbage need not look at a million objects each time."
    gc.collect()
    gc.freeze()


spec = importlib.util.spec_from_file_location("modelzip_once", Path(__file__).parent.parent / "tools/once.py")
once = importlib.util.module_from_spec(spec)
spec.loader.exec_module(once)


@pytest.fixture(scope="module")
def read_once():
    "What PyTorch reads anew for every ONNX file is read for the first."
    with once.translations_read_once():
        yield


@pytest.fixture(scope="module")
def fewer_choices():
    """What a search has on offer for each tensor: 2, 4, 6 and 8 bits, groups, every other step, and each share of zeros
    but one; all where the suite is a search itself."""
    from modelzip.workshop import search

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "DENSE", share(search.DENSE, 5))
        patch.setattr(search, "SPARSE", share(search.SPARSE, 4))
        patch.setattr(search, "SPACED", share(search.SPACED, 6))
        yield
