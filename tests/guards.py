"""What several tests ask of every function: nothing of the caller's is changed, and what runs depends on the codes
alone."""

import collections, copy, os, random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelzip.ranges import LayerStatistics, calibrate
from modelzip.workshop.models import output_tensors

FUZZ = os.environ.get("MODELZIP_FUZZ", "")  # `make fuzz` sets it to its seed


def conv1d(*sizes: int) -> nn.Module:
    "GPT-2's layer, where transformers is installed. (Imported when asked for: it takes a second.)"
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(*sizes)


def seen_by(layer: nn.Module, x: Tensor) -> LayerStatistics:
    "What a layer's inputs are like."
    return calibrate(layer, [x])[""]


def examples(n: int) -> int:
    "How many examples a property test tries: n, and 25 times as many in a search for new ones."
    return n * 25 if FUZZ else n


def seeded(seed: int) -> random.Random:
    "Numbers by chance: the same ones each time, and others in a search."
    return random.Random(f"{FUZZ} {seed}" if FUZZ else seed)


def share(cases, n: int) -> list:
    """n of the cases, evenly spread and always the same; all of them in a search. Mark the test
    `pytest.mark.hypothesis`, too, so that `make fuzz` comes to it."""
    cases = list(cases)
    return cases if FUZZ or n >= len(cases) else [cases[i * len(cases) // n] for i in range(n)]


def turns(i: int, ways: dict, n: int) -> dict:
    """What case number i makes of some ways (name → function without arguments): n of them in turn, so that each way
    meets some cases and each case some ways; all of them in a search."""
    names = list(ways)
    return {k: ways[k]() for k in (names if FUZZ else [names[(i * n + j) % len(names)] for j in range(n)])}


def _tensor(t):
    return (id(t), t.detach().clone(), t.requires_grad, None if t.grad is None else t.grad.clone(), dict(t.__dict__))


def _same_tensor(a, b):
    same = lambda x, y: (
        x.dtype == y.dtype
        and x.shape == y.shape
        and (
            torch.equal(x, y)
            or x.is_floating_point()
            and torch.equal(x.nan_to_num(), y.nan_to_num())
            and torch.equal(x.isnan(), y.isnan())
        )
    )
    return (
        a[0] == b[0]
        and same(a[1], b[1])
        and a[2] == b[2]
        and (a[3] is None) == (b[3] is None)
        and (a[3] is None or same(a[3], b[3]))
        and a[4].keys() == b[4].keys()
    )


def _picture(x, name, found, depth=0):
    "Everything that can be seen of an object: name → what it was."
    if isinstance(x, Tensor):
        found[name] = _tensor(x)
    elif isinstance(x, nn.Module):
        for n, m in x.named_modules():
            where = f"{name}.{n}" if n else name
            found[f"{where} attributes"] = sorted(vars(m))
            for k, v in vars(m).items():
                if k in ("_parameters", "_buffers"):
                    found[f"{where} {k}"] = list(v)
                    for key, t in v.items():
                        if t is not None:
                            found[f"{where}.{key}"] = _tensor(t)
                elif k == "_modules":
                    found[f"{where} modules"] = {n: id(v) for n, v in v.items()}
                elif isinstance(v, Tensor):
                    found[f"{where}.{k}"] = (
                        0,
                        *_tensor(v)[1:],
                    )  # what a hook computes before each call is a new tensor
                else:
                    _picture(v, f"{where}.{k}", found, depth + 1)
    elif isinstance(x, (list, tuple, collections.deque)) and depth < 6:
        found[f"{name} ids"] = [id(v) for v in x]
        for i, v in enumerate(x):
            _picture(v, f"{name}[{i}]", found, depth + 1)
    elif isinstance(x, dict) and depth < 6:
        found[f"{name} keys"] = list(x)
        for k, v in x.items():
            _picture(v, f"{name}[{k!r}]", found, depth + 1)
    elif isinstance(x, np.ndarray):
        found[name] = x.tobytes()
    elif isinstance(x, (int, float, str, bool, bytes, type(None), set, frozenset)):
        found[name] = copy.copy(x) if x == x else "nan"
    else:
        found[name] = id(x)
    return found


def _ambient():
    "State of the process that a function could leave changed."
    return {
        "torch RNG": torch.get_rng_state().numpy().tobytes(),
        "numpy RNG": (numbers := np.random.get_state())[1].tobytes() + repr(numbers[2:]).encode(),
        "Python RNG": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "MHA fast path": torch.backends.mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flush denormal": float(torch.tensor(1e-40)) != 0,
        "autocast": torch.is_autocast_enabled("cpu"),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
    }


@contextmanager
def unchanged(*objects):
    "A block that must leave models, examples, containers of them, random numbers and global flags as they were."
    before = [_picture(x, f"object {i} ({type(x).__name__})", {}) for i, x in enumerate(objects)]
    ambient = _ambient()
    yield
    for x, old, i in zip(objects, before, range(len(objects))):
        new = _picture(x, f"object {i} ({type(x).__name__})", {})
        assert old.keys() == new.keys(), f"other attributes: {sorted(old.keys() ^ new.keys())[:8]}"
        for k in old:
            same = (
                _same_tensor(old[k], new[k])
                if isinstance(old[k], tuple) and len(old[k]) == 5 and isinstance(old[k][1], Tensor)
                else old[k] == new[k]
            )
            assert same, f"{k} was changed: {str(old[k])[:120]} → {str(new[k])[:120]}"
    now = _ambient()
    assert now == ambient, f"changed: {[k for k in now if now[k] != ambient[k]]}"


def answers(model: nn.Module, *args, **kwargs) -> dict[str, Tensor]:
    "All tensors that a model puts out, without gradients, from the same random numbers."
    state = torch.get_rng_state()
    with torch.no_grad():
        found = {k: t.clone() for k, t in output_tensors(model(*args, **kwargs)).items()}
    torch.set_rng_state(state)
    return found


def codes_alone(original: nn.Module, compressed: nn.Module, *args, **kwargs) -> None:
    "What was made from a model must not move when the original's numbers do. They are put back afterwards."
    before = answers(compressed, *args, **kwargs)
    kept = [
        (t, t.detach().clone())
        for t in {id(t): t for t in (*original.parameters(), *original.buffers()) if t.is_floating_point()}.values()
    ]
    try:
        with torch.no_grad():
            for t, _ in kept:
                t.mul_(1.5).add_(0.1)
        after = answers(compressed, *args, **kwargs)
    finally:
        with torch.no_grad():
            for t, old in kept:
                t.copy_(old)
    assert before.keys() == after.keys()
    for k in before:
        assert torch.equal(before[k].nan_to_num(), after[k].nan_to_num()), (
            f"output {k} moved by {(before[k].float() - after[k].float()).abs().max():.3g} with the original's numbers"
        )
