"""Trivial answers, made of a right one: what no check may take for right.

A check calls the solution; the arguments and answers are written down. From these come constants, one of the
arguments, an argument that is ignored, a table of what was asked another time, the right answer in another shape or
type, a little off, right for some inputs only, and answers that change their input, or raise.
"""

import copy, functools, math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

NUMBER = (int, float, np.number)


def recorder(solution: Callable, calls: list) -> Callable:
    "The same, with (arguments, answer) of each call noted."

    @functools.wraps(solution, updated=())
    def noted(*args):
        kept = frozen(args)
        answer = solution(*args)
        calls.append((kept, plain(answer)))
        return answer

    return noted


def plain(x):
    "A tensor as nothing but a tensor."
    return x.as_subclass(Tensor) if isinstance(x, Tensor) else x


def frozen(x):
    "A copy, where there is one."
    try:
        return copy.deepcopy(x)
    except Exception:
        return x


def key(x) -> str:
    "What a table of examples is asked by."
    if isinstance(x, (list, tuple)):
        return f"({', '.join(map(key, x))})"
    if isinstance(x, Tensor):  # by its bytes: numbers as texts take a while
        held = plain(x).detach().cpu().reshape(-1).view(torch.uint8).numpy()
        return f"{tuple(x.shape)} {x.dtype} {held.tobytes()}"
    if isinstance(x, np.ndarray):
        return f"{x.shape} torch.{x.dtype} {x.tobytes()}"
    if isinstance(x, nn.Module):
        return f"{type(x).__name__}{[key(t) for t in x.state_dict().values() if isinstance(t, Tensor)]}"
    return repr(x)


def is_number(x):
    return isinstance(x, NUMBER) and not isinstance(x, (bool, np.bool_))


def values(x) -> list:
    "The numbers of a tensor or of a list of numbers; nothing for anything else."
    if isinstance(x, (Tensor, np.ndarray)):
        x = plain(x)
        return x.reshape(-1).tolist() if x.ndim else []
    return list(x) if isinstance(x, (list, tuple)) and x and all(map(is_number, x)) else []


def off(x) -> list:
    "The same a little off: a whole number by one, another by a hundredth of its size."
    if isinstance(x, bool):
        return [not x]
    if is_number(x):
        if isinstance(x, float) and x != x:
            return [0.0]
        return [x + 1, x - 1] if isinstance(x, (int, np.integer)) else [x * 1.01 or 0.01, x * 0.99 or -0.01]
    if isinstance(x, Tensor) and x.numel() and x.dtype != torch.bool and not x.is_complex():
        step = x.abs().max().item() / 100 or 0.01 if x.is_floating_point() else 1
        out = [x.detach().clone() for _ in range(2)]
        for t, at in zip(out, (0, -1)):
            t[(at,) * t.dim()] += step
        return out
    if isinstance(x, (list, tuple)) and x:
        inside = [(at, y) for at in {0, len(x) - 1} for y in off(x[at])]
        return [type(x)([*x[:at], y, *x[at + 1 :]]) for at, y in inside] if type(x) in (list, tuple) else []
    return []


def other_shapes(x) -> list:
    "The right answer in another type or shape."
    if isinstance(x, bool) or x is None or isinstance(x, str):
        return [[x], int(x) if isinstance(x, bool) else repr(x)]
    if is_number(x):
        return [str(x), [x], None]
    if isinstance(x, Tensor) and x.ndim:
        return [x[None], x[..., None]] + [x.reshape(-1)] * (x.ndim > 1)
    if isinstance(x, Tensor):
        return [str(x.item()), x[None]]
    if isinstance(x, (list, tuple, range)) and len(x):
        x = list(x)
        return [x[:-1], [*x, x[-1]], [x], str(x), None]
    return []


def negated(x):
    if is_number(x) or isinstance(x, Tensor) and x.dtype != torch.bool:
        return -x
    return type(x)(map(negated, x)) if type(x) in (list, tuple) else x


def spoil(x) -> bool:
    "Change something in place, where there is something to change."
    if isinstance(x, Tensor) and x.numel() and not x.is_inference():
        with torch.no_grad():
            x[(-1,) * x.dim()].add_(1) if x.dtype != torch.bool else x.logical_not_()
    elif isinstance(x, np.ndarray) and x.size:
        x.flat[-1] += 1
    elif isinstance(x, list) and x:
        x.append(x[0])
    elif isinstance(x, dict) and x:
        x.popitem()
    elif isinstance(x, nn.Module):
        return spoil(next(x.parameters(), None))
    else:
        return False
    return True


ONLY = {  # right only for some inputs
    "nothing negative": lambda v: min(v, default=0) >= 0,
    "sorted": lambda v: all(a <= b for a, b in zip(v, v[1:])),
    "of even length": lambda v: len(v) % 2 == 0,
    "without equals": lambda v: len(set(v)) == len(v),
    "one length": None,
}
CONSTANTS = (0, 1, -1, 0.5, None, True, False, math.nan, math.inf, "", "a", (), [0], {}, torch.tensor(1.0))


def wrong_answers(solution: Callable, calls: list) -> Iterator[tuple[str, str, Callable]]:
    "Kind, name and attempt; `calls` are those of another run of the check."
    right = lambda *a: plain(solution(*a))
    for c in CONSTANTS:
        yield "constant", f"always {c!r}", lambda *a, c=c: frozen(c)
    error = lambda e: lambda *a: (_ for _ in ()).throw(e)
    yield "raises", "ValueError", error(ValueError("too hard"))
    yield "raises", "AssertionError", error(AssertionError("too hard"))
    yield "raises", "SystemExit", error(SystemExit(0))
    if not calls or not calls[0][0]:
        return
    first = calls[0][0]
    for i in range(len(first)):
        yield "argument", f"argument {i + 1}", lambda *a, i=i: a[i]
        if len(first) > 1:
            yield ("ignored", f"argument {i + 1} ignored", lambda *a, i=i: right(*a[:i], frozen(first[i]), *a[i + 1 :]))
        if spoil(frozen(first[i])):
            yield "in place", f"argument {i + 1} changed", lambda *a, i=i: (right(*a), spoil(a[i]))[0]
    table = {key(args): answer for args, answer in calls}
    for args, answer in list({key(a): (a, a) for _, a in calls}.values())[:3]:
        yield "constant", f"the answer {str(answer)[:30]}", lambda *a, c=answer: frozen(c)
    for default in (None, calls[0][1]):
        yield "table", f"a table, else {str(default)[:30]}", lambda *a, d=default: frozen(table.get(key(a), d))
    sample = next((answer for _, answer in calls[len(calls) // 2 :] if answer is not None), None)
    for j in range(0 if sample is None else len(other_shapes(sample))):
        yield (
            "shape",
            f"as {str(other_shapes(sample)[j])[:30]}",
            lambda *a, j=j: (lambda o: o[j] if j < len(o) else None)(other_shapes(right(*a))),
        )
    for j in range(len(off(sample))):
        yield (
            "off",
            f"off {j}",
            lambda *a, j=j: (lambda y, o: o[j] if j < len(o) else y)(*(lambda y: (y, off(y)))(right(*a))),
        )
    if any(key(negated(answer)) != key(answer) for _, answer in calls):
        yield "sign", "negated", lambda *a: negated(right(*a))
    for i in range(len(first)):
        inputs = [v for args, _ in calls for v in values(args[i])]
        counts = all(isinstance(v, (int, np.integer)) and v >= 0 for v in inputs)
        equals = any(len(set(v)) < len(v) for args, _ in calls if (v := values(args[i])))
        useless = ["nothing negative"] * counts + ["without equals"] * (not equals)  # for counts; for numbers by chance
        for name, holds in ONLY.items():
            if values(first[i]) and name not in useless:
                n = len(values(first[i]))
                ok = holds or (lambda v, n=n: len(v) == n)
                yield (
                    "partly",
                    f"right where argument {i + 1} is {name}",
                    lambda *a, i=i, ok=ok: right(*a) if ok(values(a[i])) else zero_like(right(*a)),
                )


def zero_like(x):
    if isinstance(x, Tensor):
        return torch.zeros_like(x)
    if is_number(x):
        return type(x)(0)
    return type(x)(map(zero_like, x)) if type(x) in (list, tuple) else None
