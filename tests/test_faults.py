"""Damaged and forged files of every sort (bench/pack.py judges ten thousand)."""

import resource
from collections import Counter

import pytest
import torch

from guards import FUZZ, examples
from mutations import DAMAGE, FORGERY, fuzz

torch.set_num_threads(1)


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_mutations(tmp_path):
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, examples(250)
    counts = fuzz(times, tmp_path, seed=FUZZ or 7)
    outcomes = Counter()
    for (kind, _, outcome), n in counts.items():
        outcomes[kind in FORGERY, outcome] += n
    assert (
        sum(counts.values()) == times
        and {k for k, _, _ in counts} == {*DAMAGE, *FORGERY}
        and {u for _, u, _ in counts} == {"mapped", "archived"}
    )
    assert {o for forged, o in outcomes if not forged} <= {"refused", "exact"}
    assert outcomes[False, "exact"] < 0.1 * outcomes[False, "refused"]  # (mutations that change nothing)
    assert (
        outcomes[True, "another valid file"] > 0.02 * times and outcomes[True, "refused"] > 0.1 * times
    )  # forgery reaches the deeper checks
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
