"""Property tests try the same examples each time, so that the suite is not red by chance; `make fuzz` searches for
new ones."""

import gc

from hypothesis import HealthCheck, settings

from guards import FUZZ

settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
settings.load_profile("search" if FUZZ else "same")


def pytest_collection_finish():
    """What was imported stays until the end: no collection of garbage looks at these million objects again. (Each
    measurement of time begins with one.)"""
    gc.collect()
    gc.freeze()
