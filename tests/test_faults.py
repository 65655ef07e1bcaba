"""A thousand damaged and forged files of every sort (bench/pack.py judges ten times as many)."""

import resource
from collections import Counter

import torch

from mutations import DAMAGE, FORGERY, fuzz

torch.set_num_threads(1)


def test_a_thousand_mutations(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = fuzz(1000, tmp_path, seed=7)
    outcomes = Counter()
    for (kind, _, outcome), n in counts.items():
        outcomes[kind in FORGERY, outcome] += n
    assert (
        sum(counts.values()) == 1000
        and {k for k, _, _ in counts} == {*DAMAGE, *FORGERY}
        and {u for _, u, _ in counts} == {"mapped", "archived"}
    )
    assert {o for forged, o in outcomes if not forged} <= {"refused", "exact"}
    assert outcomes[False, "exact"] < 0.1 * outcomes[False, "refused"]  # (mutations that change nothing)
    assert (
        outcomes[True, "another valid file"] > 20 and outcomes[True, "refused"] > 100
    )  # forgery reaches the deeper checks
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
