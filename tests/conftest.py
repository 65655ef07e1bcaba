"""Property tests try the same examples each time, so that the suite is not red by chance; `make fuzz` searches for
new ones."""

import copy, functools, gc

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


@pytest.fixture(scope="module")
def read_once():
    """PyTorch reads the source of some 500 translations of its operations anew for every ONNX file, and asks for all
    of its operations some 120 times, half of the time that a small one takes: here once. Where these parts of PyTorch,
    which are not public, look different, nothing is changed."""
    try:
        from torch._export import utils
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read, asked = functools.cache(ONNXRegistry.from_torchlib), functools.cache(utils._materialize_cpp_cia_ops)
    except (ImportError, AttributeError):
        yield
        return

    def copied(*args, **kwargs):
        found = copy.copy(read(*args, **kwargs))
        found.functions = {name: [*ways] for name, ways in found.functions.items()}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        patch.setattr(utils, "_materialize_cpp_cia_ops", asked)
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
