"""Threads that lose nothing, answers with serial bits, a pool under everything that can go wrong. Nothing here
depends on how fast the machine is."""

import asyncio, contextvars, copy, ctypes, gc, importlib.util, itertools, math, os, pickle, signal, subprocess, sys, threading, time
from collections import namedtuple
from concurrent.futures import CancelledError
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from threadpoolctl import threadpool_info
from torch import nn

from modelzip.data import LeNet5, minilm, mnist5k
from modelzip.kernels import use_kernels
from modelzip.pack import inspect, save
from modelzip.quant import quantize_model
from modelzip.workshop.scaling import Scaling
from modelzip.threads import (
    AsAlone,
    CallError,
    Pool,
    PoolClosed,
    PoolFull,
    Runner,
    WorkerDied,
    amdahl,
    cores,
    elsewhere,
    fit_amdahl,
    intra_op_threads,
    multi_threading,
    pool_settings,
    run_in_threads,
    save_multi_threaded_model,
    scaling,
)
from guards import FUZZ, examples, share
from poison import Poison

FAST = settings(max_examples=examples(25), deadline=None)
LONG = 60  # seconds that nothing here should need


@pytest.fixture(autouse=True)
def leaves_no_thread():
    "Every test ends with the threads and the settings that it began with."
    torch.set_num_threads(1)
    before = set(threading.enumerate())
    yield
    new = {t for t in threading.enumerate() if t.name != "tqdm_monitor"} - before
    for t in new:
        t.join(LONG)
    assert not [t for t in new if t.is_alive()]
    assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (1, 1)


def blas():
    return sorted(i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas")


# ---------------------------------------------------------------- run_in_threads


@FAST
@given(st.lists(st.integers()), st.integers(1, 9))
def test_is_map(xs, n):
    assert run_in_threads(lambda x: x * 2 + 1, n, xs) == [x * 2 + 1 for x in xs]


def test_runs_side_by_side():
    "All four must be inside at once, or the barrier would break."
    barrier = threading.Barrier(4)
    assert sorted(run_in_threads(lambda i: barrier.wait(LONG), 4)) == [0, 1, 2, 3]


def test_no_more_threads_than_asked():
    now, most, lock = [0], [0], threading.Lock()

    def f(i):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0)
        with lock:
            now[0] -= 1

    run_in_threads(f, 3, range(200))
    assert most[0] <= 3


def test_forms_of_arguments():
    f = lambda *a, **k: (a, k)
    assert run_in_threads(f, 2) == [((0,), {}), ((1,), {})]
    assert run_in_threads(f, 2, [(1, 2), 3, [4, 5], ()]) == [((1, 2), {}), ((3,), {}), (([4, 5],), {}), ((), {})]
    assert run_in_threads(f, 2, [1, 2], {"a": 3}) == [((1,), {"a": 3}), ((2,), {"a": 3})]
    assert run_in_threads(f, 2, [1, 2], [{"a": 3}, {}]) == [((1,), {"a": 3}), ((2,), {})]
    assert run_in_threads(f, 2, kwargs=[{"a": 3}]) == [((), {"a": 3})]
    assert run_in_threads(f, 2, (i for i in (1, 2))) == [((1,), {}), ((2,), {})]
    assert len(run_in_threads(f)) == cores()
    assert run_in_threads(lambda: 3, 2) == [3, 3] and run_in_threads(lambda *, a: a, 2, kwargs={"a": 4}) == [4, 4]
    assert run_in_threads(os.getpid, 2) == [os.getpid()] * 2


@pytest.mark.parametrize(
    "bad, error, words",
    [
        (dict(func=3), TypeError, "func is a int"),
        (dict(num_threads=0), ValueError, "num_threads is 0"),
        (dict(num_threads=2.0), TypeError, "num_threads is 2.0"),
        (dict(num_threads=True), TypeError, "num_threads is True"),
        (dict(args="ab"), TypeError, "args is a str"),
        (dict(args=[1], kwargs=[{}, {}]), ValueError, "kwargs has 2"),
        (dict(on_error="skip"), ValueError, "on_error is 'skip'"),
        (dict(timeout=-1), ValueError, "timeout is -1"),
        (dict(timeout="1"), TypeError, "timeout is '1'"),
        (dict(intra_op=0), ValueError, "intra_op is 0"),
    ],
)
def test_bad_arguments(bad, error, words):
    with pytest.raises(error, match=words):
        run_in_threads(**{"func": len, "num_threads": 1, **bad})


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_first_error_in_order_is_raised(threads):
    "Whatever ends first: calls 5 and 9 fail, 9 at once and 5 only after it."
    nine = threading.Event()

    def f(i):
        if i == 9:
            nine.set()
            raise KeyError("nine")
        if i == 5:
            if threads > 5:
                nine.wait(LONG)
            raise ValueError("five")
        return i

    with pytest.raises(CallError, match="Error in call 5: ValueError: five") as e:
        run_in_threads(f, threads, range(20))
    assert e.value.index == 5 and isinstance(e.value.__cause__, ValueError)
    assert e.value.results[:5] == [0, 1, 2, 3, 4] and all(isinstance(r, (int, CallError)) for r in e.value.results)


def test_errors_returned():
    def f(i):
        if i % 3 == 0:
            raise SystemExit(i)
        return i

    results = run_in_threads(f, 4, range(10), on_error="return")
    assert [r if isinstance(r, int) else (r.index, r.__cause__.code) for r in results] == [
        (i, i) if i % 3 == 0 else i for i in range(10)
    ]
    again = pickle.loads(pickle.dumps(results[3]))
    assert (again.index, str(again)) == (3, "Error in call 3: SystemExit: 3")


def test_a_result_may_be_an_error_object():
    e = CallError(7, ValueError())
    assert run_in_threads(lambda i: e, 2, [0]) == [e]


def test_cancel():
    stop, begun = threading.Event(), []

    def f(i):
        begun.append(i)
        if i == 3:
            stop.set()
        return i

    with pytest.raises(CallError, match="cancelled before it began") as e:
        run_in_threads(f, 1, range(9), cancel=stop)
    assert (begun, e.value.index, e.value.results[:4]) == ([0, 1, 2, 3], 4, [0, 1, 2, 3])
    assert isinstance(e.value.__cause__, CancelledError)
    with pytest.raises(CallError):
        run_in_threads(f, 2, range(9), cancel=stop)
    assert begun == [0, 1, 2, 3]


def test_timeout():
    gate = threading.Event()
    try:
        with pytest.raises(TimeoutError, match="1 of 3 calls had ended"):
            run_in_threads(lambda i: i and gate.wait(LONG), 1, range(3), timeout=0.2)
        late = run_in_threads(lambda i: i and gate.wait(LONG), 1, range(2), timeout=0.2, on_error="return")
        assert late[0] == 0 and isinstance(late[1].__cause__, TimeoutError)
    finally:
        gate.set()
    assert run_in_threads(abs, 2, [-1], timeout=LONG) == [1]


def test_interrupt_leaves_no_thread():
    begun, before = [], threading.active_count()

    def f(i):
        begun.append(i)
        if len(begun) == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert stop.wait(LONG)

    stop, old = threading.Event(), signal.getsignal(signal.SIGINT)

    def ctrl_c(*_):
        stop.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_threads(f, 2, range(100))
    finally:
        signal.signal(signal.SIGINT, old)
    assert len(begun) < 100 and threading.active_count() == before


def test_progress_only_when_asked(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    run_in_threads(abs, 2, range(3))
    assert capsys.readouterr() == ("", "")
    run_in_threads(abs, 2, range(3), progress=True)
    out, err = capsys.readouterr()
    assert not out and "/3" in err


def test_switches_and_context_travel():
    number = contextvars.ContextVar("number", default=0)
    number.set(7)
    state = lambda i: (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        number.get(),
        torch.get_num_threads(),
    )
    assert run_in_threads(state, 2, intra_op=3) == [(True, False, 7, 3)] * 2
    with torch.no_grad():
        assert run_in_threads(state, 2)[0][:2] == (False, False)
    with torch.inference_mode():
        assert run_in_threads(state, 2)[0][:2] == (False, True)


def test_nested():
    assert run_in_threads(lambda i: run_in_threads(lambda j: i * j, 2, range(3)), 3) == [
        [0, 0, 0],
        [0, 1, 2],
        [0, 2, 4],
    ]


# ---------------------------------------------------------------- multi_threading


def test_decorator():
    @multi_threading
    def plain(x, y=1):
        "doc"
        return x, y, threading.current_thread() is threading.main_thread()

    assert plain(3) == (3, 1, True) and plain("ab")[0] == "ab" and plain((1, 2))[0] == (1, 2)
    assert plain([1, 2], y=5) == [(1, 5, False), (2, 5, False)]
    assert plain(iter("ab"), 4) == [("a", 4, False), ("b", 4, False)]
    assert plain.map("ab") == [("a", 1, False), ("b", 1, False)]
    assert plain([1, 2], [3, 4]) == [(1, 3, False), (2, 4, False)]
    assert plain([]) == [] and plain.map([]) == []
    assert (plain.__name__, plain.__doc__, plain.__wrapped__([1])) == ("plain", "doc", ([1], 1, True))


def test_decorated_method():
    class Scale:
        def __init__(self, k):
            self.k = k

        @multi_threading(num_threads=2, intra_op=2)
        def times(self, x):
            return self.k * x, torch.get_num_threads()

    assert Scale(3).times([1, 2]) == [(3, 2), (6, 2)] and Scale(3).times(2) == (6, 1)


def test_decorator_errors():
    with pytest.raises(TypeError, match="options have names"):
        multi_threading(4)
    with pytest.raises(ValueError, match="num_threads is 0"):
        multi_threading(num_threads=0)(len)
    f = multi_threading(lambda x, y=0: 1 / x)
    with pytest.raises(ValueError, match="different lengths: 2, 3"):
        f([1, 2], [1, 2, 3])
    with pytest.raises(TypeError, match="at least one"):
        f.map()
    with pytest.raises(CallError, match="Error in call 1"):
        f([1, 0])


# ---------------------------------------------------------------- intra-op threads


def test_intra_op_belongs_to_a_thread():
    with intra_op_threads(3):
        assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (3, 1)
        with intra_op_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
    with pytest.raises(KeyError):
        with intra_op_threads(3):
            raise KeyError
    assert torch.get_num_threads() == 1


def test_blas_is_limited_and_put_back():
    import scipy.linalg  # noqa: F401 (brings a BLAS with threads)

    before, barrier = blas(), threading.Barrier(3)

    def f(i):
        with intra_op_threads(i + 1):
            barrier.wait(LONG)
            seen = blas()
            barrier.wait(LONG)
        return seen

    assert all(max(s) == 1 for s in run_in_threads(f, 3, intra_op=9))
    assert blas() == before


@pytest.mark.parametrize("bad, error", [(0, ValueError), (1.5, TypeError), (None, TypeError)])
def test_intra_op_errors(bad, error):
    with pytest.raises(error, match="n is"):
        intra_op_threads(bad)


# ---------------------------------------------------------------- Amdahl


@FAST
@given(st.floats(0, 1), st.lists(st.integers(1, 64), min_size=1).filter(lambda n: max(n) > 1))
def test_fit_finds_the_share(serial, n):
    assert fit_amdahl(n, [amdahl(k, serial) for k in n]) == pytest.approx(serial, abs=1e-9)


@FAST
@given(st.floats(0, 1), st.integers(1, 1000))
def test_amdahl_bounds(serial, n):
    assert 1 - 1e-12 <= amdahl(n, serial) <= min(n, 1 / serial if serial else n) + 1e-9


def test_amdahl_errors():
    with pytest.raises(ValueError, match="serial is 2"):
        amdahl(2, 2)
    with pytest.raises(ValueError, match="n has 1 entries, speedup has 2"):
        fit_amdahl([1], [1, 2])
    with pytest.raises(ValueError, match="above 0"):
        fit_amdahl([2], [0])
    for n, speedup in (([2], [1e-320]), ([2], [1e-308]), ([2], [math.inf]), ([math.inf], [2]), ([2], [math.nan])):
        with pytest.raises(ValueError, match="all finite|near to 0"):
            fit_amdahl(n, speedup)
    for n in ([1, 2], range(1, 4), "2", None, Decimal(2), 1 + 0j, np.array([1], object), np.array(["1"])):
        with pytest.raises(TypeError, match="^n is .*; it may be a number, array or tensor of at least 1"):
            amdahl(n, 0.2)
    for n in (10**400, np.array([]), torch.ones(0), 0.5, math.nan, np.array([2, math.nan]), torch.tensor([1, 0])):
        with pytest.raises(ValueError, match="^n is "):
            amdahl(n, 0.2)
    for serial in ("0.2", None, [0.2], np.array([0.1, 0.2]), Decimal("0.2")):
        with pytest.raises(TypeError, match="^serial is "):
            amdahl(4, serial)
    for n in ([10**400], ["2"], [None]):
        with pytest.raises((TypeError, ValueError), match="^n is "):
            fit_amdahl(n, [2])
    for n in ({2: 1}, {2}, "2", 2):
        with pytest.raises(TypeError, match="^n is "):
            fit_amdahl(n, [1.5])
    with pytest.raises(ValueError, match=r"ways is \[\]"):
        Scaling([])


def test_amdahl_gives_floats():
    for n in (2, True, Fraction(5, 2), np.int64(2), np.float16(2), 1e308, math.inf):
        for serial in (0, 0.2, 1, Fraction(1, 5), np.float32(0.5), torch.tensor(0.25)):
            k, s = float(n), float(serial)
            assert type(amdahl(n, serial)) is float and amdahl(n, serial) == (1 / (s + (1 - s) / k) if s else k)
    for n, speedup in ((torch.tensor([2, 4]), torch.tensor([1.5, 2.0])), (np.array([2, 4]), np.array([1.5, 2.0]))):
        assert type(fit_amdahl(n, speedup)) is float and fit_amdahl(n, speedup) == fit_amdahl([2, 4], [1.5, 2.0])


def test_amdahl_of_arrays():
    assert amdahl(torch.tensor([1.0, 2.0]), 0.0).tolist() == [1, 2] and (amdahl(np.array([4]), 1.0) == 1).all()


# ---------------------------------------------------------------- serial bits


def alone(model, xs):
    "Each in memory of its own: on some processors the order of a sum depends on where a row begins."
    with torch.no_grad():
        return [model(x[None].clone())[0] for x in xs]


@FAST
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([1, 3, 64, 130]),
    st.sampled_from([1, 10, 96]),
    st.booleans(),
    st.integers(0, 99),
)
def test_linear_has_serial_bits(n, rows, inputs, outputs, bias, seed):
    torch.manual_seed(seed)
    layer, xs = nn.Linear(inputs, outputs, bias=bias), torch.randn(n, rows, inputs)
    for x in (xs, xs.transpose(1, 2).contiguous().transpose(1, 2)):
        with torch.no_grad(), AsAlone(n):
            together = layer(x)
        assert torch.equal(together, torch.stack(alone(layer, x)))
    flat = xs.reshape(-1, inputs)  # as layers see it that flatten tokens
    with torch.no_grad(), AsAlone(n):
        together = layer(flat)
    with torch.no_grad():
        assert torch.equal(together, torch.cat([layer(x.clone()) for x in xs]))


@FAST
@given(
    st.integers(1, 5),
    st.sampled_from([(1, 20, 5), (4, 8, 3), (6, 6, 1)]),
    st.sampled_from([1, 2]),
    st.sampled_from([0, 1, "same"]),
    st.sampled_from([1, 2]),
    st.integers(0, 9),
)
def test_convolution_has_serial_bits(n, sizes, stride, padding, dilation, seed):
    torch.manual_seed(seed)
    stride = 1 if padding == "same" else stride
    layer, x = nn.Conv2d(*sizes, stride=stride, padding=padding, dilation=dilation), torch.randn(n, sizes[0], 12, 13)
    with torch.no_grad(), AsAlone(n):
        together = layer(x)
    assert torch.equal(together, torch.stack(alone(layer, x)))


def test_modes_of_calling():
    x, w, b = torch.randn(4, 3, 8), torch.randn(5, 8), torch.randn(5)
    with AsAlone(4):
        assert torch.equal(F.linear(x, w, bias=b), torch.stack([F.linear(i, w, b) for i in x]))
        assert torch.equal(
            F.conv1d(x, torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)), stride=[2]),
            torch.stack(
                [
                    F.conv1d(i[None], torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)), stride=[2])[0]
                    for i in x
                ]
            ),
        )
        F.linear(torch.randn(5, 8), w)
        F.linear(torch.randn(0, 8), w)
        F.linear(torch.randn(8), w)  # no multiples of 4 samples
    state = torch.random.get_rng_state()
    with AsAlone(7):
        F.linear(torch.randn(7, 11, generator=torch.Generator().manual_seed(0)), torch.ones(3, 11))
    assert torch.equal(state, torch.random.get_rng_state())  # trying the ways draws from no generator but its own


@pytest.mark.hypothesis  # so that a search comes to all of them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_small_and_coarse_products_have_serial_bits(dtype):
    "One trial of few numbers, or of 8 bits, does not show in which order a library adds."
    ways = itertools.product(range(2), (2, 8), (1, 5), (1, 3, 300), (1, 100), (True, False))
    for seed, n, rows, inputs, outputs, bias in share(ways, 19):
        torch.manual_seed(seed)
        layer, xs = nn.Linear(inputs, outputs, bias=bias).to(dtype), torch.randn(n, rows, inputs).to(dtype)
        for x in (xs, xs.transpose(1, 2).contiguous().transpose(1, 2)):
            with torch.no_grad(), AsAlone(n):
                together = layer(x)
            assert torch.equal(together, torch.stack(alone(layer, x))), (seed, n, rows, inputs, outputs, bias)
    for seed, n, channels, kernel, size, groups in itertools.product(range(3), (2,), (4,), (1, 3), (3,), (1, 2)):
        torch.manual_seed(seed)
        layer, x = (
            nn.Conv2d(channels, groups, kernel, groups=groups).to(dtype),
            torch.randn(n, channels, size, size).to(dtype),
        )
        with torch.no_grad(), AsAlone(n):
            together = layer(x)
        assert torch.equal(together, torch.stack(alone(layer, x))), (seed, n, channels, kernel, size, groups)


def test_serial_bits_under_autocast():
    layer, x = nn.Linear(300, 100), torch.randn(8, 300)
    with torch.no_grad(), AsAlone(8):
        layer(x)  # the way for float32 is known
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with AsAlone(8):
            together = layer(x)
        assert together.dtype == torch.bfloat16 and torch.equal(together, torch.cat([layer(i[None]) for i in x]))


def test_half_precision():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float64):
        layer, x = nn.Linear(40, 24).to(dtype), torch.randn(6, 40).to(dtype)
        with torch.no_grad(), AsAlone(6):
            together = layer(x)
        assert torch.equal(together, torch.stack(alone(layer, x)))


@pytest.mark.parametrize("activations", ["row", "tensor"])
@pytest.mark.parametrize("odd", [None, 0.0, 1e-30, float("nan"), float("inf")])
def test_integer_layers_have_serial_bits(activations, odd):
    "Also beside a sample that is all zeros, tiny, or holds NaN or infinity."
    torch.manual_seed(0)
    model = use_kernels(
        quantize_model(
            nn.Sequential(
                nn.Conv2d(4, 32, 3),
                nn.GELU(),
                nn.Conv2d(32, 48, 1),
                nn.Flatten(2),
                nn.Linear(25, 400),
                nn.GELU(),
                nn.Linear(400, 40),
            ),
            8,
        ),
        activations=activations,
    )
    xs = torch.randn(12, 4, 7, 7) * torch.logspace(-2, 2, 12)[:, None, None, None]
    if odd == 0 or odd == 1e-30:
        xs[3] *= odd
    elif odd is not None:
        xs[3, 0, 0, 0] = odd
    run = Runner(model)
    for part in xs.split(4):
        assert all(map(same, run.as_alone(list(part)), alone(model, part)))


def same(a, b):
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


class Net(nn.Module):
    "Several kinds of layers, one of which has no multiple of a vector's width."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.n, self.att = (
            nn.Linear(12, 37),
            nn.Linear(37, 8),
            nn.LayerNorm(8),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )
        self.drop, self.bn = nn.Dropout(0.5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.n(self.b(F.gelu(self.a(x))))
        return self.drop(self.bn(self.att(x, x, x)[0])).softmax(-1)


MODELS = {
    "LeNet-5": lambda: LeNet5(),
    "4 bits": lambda: quantize_model(LeNet5(), 4, group=25),
    "int8": lambda: use_kernels(quantize_model(LeNet5(), 8)),
    "int8 rows": lambda: use_kernels(quantize_model(LeNet5(), 8), activations="row"),
}


@pytest.mark.parametrize("name", MODELS)
def test_pool_gives_serial_bits(name):
    model, xs = MODELS[name]().eval(), list(mnist5k().test.x[:70])
    truth = alone(model, xs)
    with Pool(model, workers=2, max_batch=16) as pool:
        assert all(map(torch.equal, pool.map(xs), truth))
        assert all(map(torch.equal, run_in_threads(pool, 16, xs), truth))
        assert pool.stats.served == 140 and not pool.stats.apart


def test_pool_of_sentences():
    "Of many lengths; asked by position, by name, and without a mask."
    model, words = minilm(), [f"Return {'the largest of ' * (i % 9)}{i} numbers." for i in range(18)]
    ids = [torch.tensor(t.ids)[: sum(t.attention_mask)] for t in (model.tokenizer.encode(w) for w in words)]
    with torch.no_grad():
        truth = [model(i[None], torch.ones_like(i)[None])[0] for i in ids]
    with Pool(model, workers=2) as pool:
        assert all(map(torch.equal, pool.map([(i, torch.ones_like(i)) for i in ids]), truth))
        assert all(
            map(torch.equal, pool.map([{"attention_mask": torch.ones_like(i), "input_ids": i} for i in ids]), truth)
        )
        assert pool.stats.mean_batch > 1 and not pool.stats.apart


def test_any_model():
    "Whatever happens inside, answers are serial: where a batch changes bits it is not used."
    model, xs = Net(), [torch.randn(5, 12) for _ in range(30)]
    with torch.no_grad():
        truth = alone(copy.deepcopy(model).eval(), xs)
    with Pool(model, workers=2, max_batch=8) as pool:
        assert all(map(torch.equal, pool.map(xs), truth))
    assert model.training and model.bn.num_batches_tracked == 0


@pytest.mark.parametrize(
    "mix",
    [lambda x: x - x.mean(0), lambda x: x / x.max(), lambda x: x.flip(0), lambda x: x * len(x), lambda x: x.cumsum(0)],
)
def test_samples_that_mix_are_served_apart(mix):
    xs = [torch.randn(3) for _ in range(40)]
    with Pool(mix, workers=2, max_batch=8) as pool:
        assert all(map(torch.equal, pool.map(xs), alone(mix, xs))) and pool.stats.apart == 1


def test_close_is_close():
    "Without `exact`: the same digits, and differences in the last bits alone."
    model, xs = LeNet5().eval(), list(mnist5k().test.x[:64])
    truth = torch.stack(alone(model, xs))
    with Pool(model, workers=2, exact=False) as pool:
        answers = torch.stack(pool.map(xs))
    assert torch.equal(answers.argmax(1), truth.argmax(1)) and (answers - truth).abs().max() <= 1e-6 * truth.abs().max()


def test_max_batch_of_one_calls_as_serial_code_does():
    shapes = []

    def f(x):
        shapes.append(tuple(x.shape))
        return x

    with Pool(f, workers=2, max_batch=1) as pool:
        pool.map([torch.zeros(3)] * 9)
    assert shapes == [(1, 3)] * 9


def test_the_model_is_shared_and_left_alone():
    model = LeNet5()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with Pool(model) as pool:
        pool.map(torch.rand(9, 1, 28, 28))
        x = torch.rand(1, 28, 28)
        old = pool(x)
        with torch.no_grad():
            model.fc2.bias += 1  # the weights are shared, not copied
        assert torch.allclose(pool(x), old + 1)
        with torch.no_grad():
            model.fc2.bias -= 1
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "fc2.bias")


# ---------------------------------------------------------------- samples and answers

Both = namedtuple("Both", "double rows")


def test_forms_of_samples_and_answers():
    with Pool(lambda x: Both(x * 2, [x.sum(1), None]), workers=1) as pool:
        a = pool([1.0, 2.0])
        assert isinstance(a, Both) and a.double.tolist() == [2, 4] and a.rows[0].item() == 3 and a.rows[1] is None
        b = pool.map([np.array([1, 2], dtype=np.int16), torch.ones(2, requires_grad=True)])
        assert b[0].double.dtype == torch.int16 and not b[1].double.requires_grad
    with Pool(lambda a, b: {"sum": a + b}, workers=1) as pool:
        assert pool((1, 2.5)) == {"sum": torch.tensor(3.5)}
    with Pool(lambda a, b: a - b, workers=1) as pool:
        assert pool({"b": 1, "a": 3}).item() == 2


def test_answers_do_not_share_memory():
    with Pool(lambda x: x.repeat(1, 100), workers=1, max_batch=8, exact=False) as pool:
        answers = pool.map([torch.ones(1)] * 8)
    answers[0] += 1
    assert answers[1].sum() == 100 and all(a.untyped_storage().nbytes() == 400 for a in answers)


@pytest.mark.parametrize(
    "sample, error, words",
    [
        ("text", TypeError, "x holds a str"),
        ((1, object()), TypeError, "x holds a object"),
        ((), ValueError, "x is empty"),
        ({}, ValueError, "x is empty"),
    ],
)
def test_bad_samples(sample, error, words):
    with Pool(lambda x: x, workers=1) as pool:
        with pytest.raises(error, match=words):
            pool.submit(sample)
        with pytest.raises(error, match=words):
            pool.map([torch.ones(2), sample])


@pytest.mark.parametrize(
    "model, error, words",
    [
        (lambda x: x.sum(), ValueError, "first dimension must be 1"),
        (lambda x: x[:0], ValueError, "must be 1"),
        (lambda x: 3, TypeError, "gave a int"),
        (lambda x: x.no_such_thing, AttributeError, "no_such_thing"),
    ],
)
def test_bad_answers(model, error, words):
    with Pool(model, workers=1) as pool:
        for f in [pool.submit(torch.ones(2)) for _ in range(5)]:
            with pytest.raises(error, match=words):
                f.result(LONG)
        assert pool.stats.failed == 5


def test_collate():
    def pad(xs):
        return nn.utils.rnn.pad_sequence([torch.as_tensor(x) for x in xs], batch_first=True)

    with pytest.raises(ValueError, match="exact=False"):
        Pool(lambda x: x.sum(1), collate=pad)
    with Pool(lambda x: x.sum(1), workers=1, exact=False, collate=pad) as pool:
        assert [y.item() for y in pool.map([[1, 2], [3], [4, 5, 6]])] == [3, 3, 15]


# ---------------------------------------------------------------- a pool under stress


class Gate:
    "A model that lets its caller see when it is entered, and decide when it goes on."

    def __init__(self):
        self.open, self.entered, self.batches = threading.Event(), threading.Semaphore(0), []

    def __call__(self, x):
        self.batches.append(x.flatten().tolist())
        self.entered.release()
        assert self.open.wait(LONG)
        if (x < 0).any():
            raise ValueError("negative")
        return x * 2


def one(v):
    return torch.tensor([float(v)])


@pytest.fixture
def gate():
    g = Gate()
    yield g
    g.open.set()


def busy(gate, **options):
    "A pool whose only worker is inside the model with sample 0."
    pool = Pool(gate, workers=1, **{"exact": False, **options})
    first = pool.submit(one(0))
    assert gate.entered.acquire(timeout=LONG)
    return pool, first


def test_a_bad_sample_fails_alone(gate):
    pool, first = busy(gate)
    fs = [pool.submit(one(v)) for v in (1, -2, 3, -4)]
    gate.open.set()
    pool.close()
    assert [f.exception() and str(f.exception()) for f in fs] == [None, "negative", None, "negative"] and fs[
        2
    ].result().item() == 6
    assert (pool.stats.served, pool.stats.failed) == (3, 2)


def test_cancelled_and_late_are_not_run(gate):
    pool, first = busy(gate)
    cancelled, late, fine = pool.submit(one(1)), pool.submit(one(2), timeout=0), pool.submit(one(3), timeout=LONG)
    assert cancelled.cancel() and not first.cancel()
    gate.open.set()
    pool.close(timeout=LONG / 2)  # raises if the clock's thread slept until the deadline of the one that was served
    assert gate.batches == [[0.0], [3.0]] and fine.result().item() == 6 and first.result().item() == 0
    with pytest.raises(TimeoutError, match="waited longer"):
        late.result()
    with pytest.raises(CancelledError):
        cancelled.result()
    assert (pool.stats.served, pool.stats.cancelled, pool.stats.expired) == (2, 1, 1)


def test_full(gate):
    pool, first = busy(gate, queue_size=2)
    fs = [pool.submit(one(v)) for v in (1, 2)]
    with pytest.raises(PoolFull, match="2 requests wait"):
        pool.submit(one(3), wait=0)
    with pytest.raises(PoolFull):
        pool.submit(one(3), wait=0.02)
    with pytest.raises(PoolFull):
        pool.submit(one(3), timeout=0.02)
    fs[0].cancel()
    fs[0] = pool.submit(one(4), wait=0)  # the place of the cancelled one
    blocked = threading.Thread(target=lambda: fs.append(pool.submit(one(5))))
    blocked.start()
    assert pool.stats.waiting == 2 and pool.stats.cancelled == 1
    gate.open.set()
    blocked.join(LONG)
    pool.close()
    assert sorted(f.result().item() for f in fs) == [4, 8, 10]


def test_close_wakes_who_waits_for_room(gate):
    pool, first = busy(gate, queue_size=1)
    waiting, seen = pool.submit(one(1)), []

    def ask():
        try:
            pool.submit(one(2))
        except PoolClosed as e:
            seen.append(str(e))

    t = threading.Thread(target=ask)
    t.start()
    pool.close(wait=False, cancel=True)
    t.join(LONG)
    assert waiting.cancelled() and seen and "closed" in seen[0]
    gate.open.set()
    pool.close()
    assert first.result().item() == 0


def test_close(gate):
    pool, first = busy(gate)
    more = [pool.submit(one(v)) for v in range(5)]
    pool.close(wait=False)  # what was handed in is served
    with pytest.raises(PoolClosed):
        pool.submit(one(1))
    with pytest.raises(PoolClosed):
        pool(one(1))
    with pytest.raises(PoolClosed):
        pool.map([one(1)])
    gate.open.set()
    for _ in range(3):
        pool.close()
    assert [f.result().item() for f in more] == [0, 2, 4, 6, 8] and "closed" in repr(pool)


def test_an_error_in_the_block_cancels(gate):
    with pytest.raises(KeyboardInterrupt):
        with Pool(gate, workers=1, exact=False) as pool:
            first = pool.submit(one(0))
            assert gate.entered.acquire(timeout=LONG)
            second = pool.submit(one(1))
            second.add_done_callback(lambda f: gate.open.set())
            raise KeyboardInterrupt
    assert second.cancelled() and first.result().item() == 0


def test_calls_with_timeout(gate):
    pool, first = busy(gate)
    with pytest.raises(TimeoutError, match="no answer within 0.02 s"):
        pool(one(1), timeout=0.02)
    gate.open.set()
    assert pool(one(2), timeout=LONG).item() == 4
    pool.close()
    assert [1.0] not in gate.batches  # nobody waited for it any more


def test_a_models_own_timeout_is_passed_on():
    def f(x):
        raise TimeoutError("mine")

    with Pool(f, workers=1) as pool:
        with pytest.raises(TimeoutError, match="mine"):
            pool(one(1), timeout=LONG)
        with pytest.raises(TimeoutError, match="mine"):
            pool(one(1))


def test_map_cancels_the_rest(gate):
    gate.open.set()
    pool = Pool(gate, workers=1, max_batch=1)
    with pytest.raises(ValueError, match="negative"):
        pool.map([one(v) for v in (1, 2, -3, *range(4, 200))])
    pool.close()
    assert pool.stats.served + pool.stats.failed + pool.stats.cancelled == 199


def test_batches_fill(gate):
    "One of exactly three, however slowly they come."
    pool = Pool(gate, workers=1, max_batch=3, max_wait=LONG, exact=False)
    gate.open.set()
    fs = [pool.submit(one(v)) for v in range(3)]
    assert [f.result(LONG).item() for f in fs] == [0, 2, 4] and gate.batches == [[0.0, 1.0, 2.0]]
    last = pool.submit(one(7))
    pool.close()  # does not wait for the batch to fill
    assert last.result().item() == 14


def test_batches_are_of_one_shape_and_the_oldest_goes_first(gate):
    pool, first = busy(gate, max_batch=4)
    fs = [pool.submit(torch.full((n,), float(v))) for v, n in enumerate((1, 2, 1, 3, 2, 1, 1, 1), 1)]
    gate.open.set()
    pool.close()
    assert gate.batches == [[0.0], [1.0, 3.0, 6.0, 7.0], [2.0, 2.0, 5.0, 5.0], [4.0, 4.0, 4.0], [8.0]]


def test_workers_share(gate):
    "What waits is dealt out: no worker takes all while another is idle."
    pool = Pool(gate, workers=2, exact=False)
    both = [pool.submit(one(0)), pool.submit(one(1))]
    for _ in range(2):
        assert gate.entered.acquire(timeout=LONG)  # one sample each
    assert sorted(gate.batches) == [[0.0], [1.0]]
    gate.open.set()
    pool.close()


def test_submit_in_a_callback():
    "A worker that answers may hand in more; it never waits for room or for itself."
    done, seen = threading.Event(), []
    pool = Pool(lambda x: x + 1, workers=1, queue_size=1)

    def again(f):
        y = f.result()
        if y.item() < 5:
            pool.submit(y).add_done_callback(again)
        else:
            for ask in (lambda: pool(y), lambda: pool.map([y])):
                try:
                    ask()
                except RuntimeError as e:
                    seen.append(str(e))
            pool.close()  # from its own worker: does not wait for itself
            done.set()

    pool.submit(one(0)).add_done_callback(again)
    assert done.wait(LONG) and len(seen) == 2 and "may wait for ever" in seen[0]


def test_full_in_a_callback(gate):
    pool, first = busy(gate, queue_size=1)
    pool.submit(one(1))
    full = threading.Event()

    def more(f):
        try:
            pool.submit(one(2))
        except PoolFull:
            full.set()

    first.add_done_callback(more)
    gate.open.set()
    assert full.wait(LONG)
    pool.close()


def test_two_workers_that_close(gate):
    "Neither waits for the other."
    barrier, pool = threading.Barrier(2), Pool(gate, workers=2, max_batch=1)

    def both(f):
        barrier.wait(LONG)
        pool.close()

    for v in range(2):
        pool.submit(one(v)).add_done_callback(both)
    gate.open.set()
    pool.close()
    assert pool.stats.served == 2


def test_a_future_set_by_its_holder_does_no_harm(gate):
    pool, first = busy(gate)
    first.set_result("mine")
    gate.open.set()
    assert pool(one(3)).item() == 6 and first.result() == "mine"
    pool.close()


def test_errors_of_callbacks_do_no_harm():
    with Pool(lambda x: x, workers=1) as pool:
        f = pool.submit(one(1))
        f.add_done_callback(lambda f: 1 / 0)
        f.result(LONG)
        assert pool(one(2)).item() == 2


def test_system_exit_in_a_model_is_an_answer():
    def f(x):
        sys.exit(3)

    with Pool(f, workers=1) as pool:
        with pytest.raises(SystemExit):
            pool(one(1))
        with pytest.raises(SystemExit):
            pool.submit(one(1)).result(LONG)


def test_asyncio():
    async def ask(pool):
        return await asyncio.gather(*(asyncio.wrap_future(pool.submit(one(v))) for v in range(5)))

    with Pool(lambda x: x * 2, workers=2) as pool:
        assert [y.item() for y in asyncio.run(ask(pool))] == [0, 2, 4, 6, 8]


def test_a_full_queue_does_not_stop_an_event_loop(gate):
    "Room is awaited: by those who come, those who give up, and those who learn that the pool is closed."

    async def main():
        pool, first = busy(gate, queue_size=1, max_batch=1)
        tasks = [asyncio.create_task(pool.asubmit(one(v))) for v in range(6)]
        late, refused = (asyncio.create_task(pool.asubmit(one(9), **{k: 0.01})) for k in ("timeout", "wait"))
        await asyncio.sleep(0.05)  # the loop is alive, with a full queue
        assert pool.stats.waiting == 1 and not any(t.done() for t in tasks) and late.done() and refused.done()
        tasks[3].cancel()
        gate.open.set()
        ends = await asyncio.wait_for(asyncio.gather(*tasks, late, refused, return_exceptions=True), LONG)
        assert [getattr(e, "item", e.__class__)() if isinstance(e, torch.Tensor) else type(e) for e in ends] == [
            0,
            2,
            4,
            asyncio.CancelledError,
            8,
            10,
            PoolFull,
            PoolFull,
        ]
        assert not pool._line.askers and (await pool.asubmit(one(4))).item() == 8
        gate.open.clear()
        gate.entered = threading.Semaphore(0)
        running = asyncio.create_task(pool.asubmit(one(1), timeout=0.05))
        with pytest.raises(TimeoutError, match="no answer within 0.05 s"):
            await running
        tasks = [asyncio.create_task(pool.asubmit(one(v))) for v in range(4)]
        await asyncio.sleep(0.01)
        pool.close(wait=False, cancel=True)
        gate.open.set()
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LONG)
        assert {type(e) for e in ends} == {asyncio.CancelledError, PoolClosed}
        pool.close()

    asyncio.run(main())


def throw(thread, error):
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_a_worker_that_is_struck_fails_its_requests_and_no_more(error):
    "Anywhere: nobody waits for ever, and the pool works again or says that it is closed."
    pool = Pool(lambda x: x * 2, workers=1, max_wait=0.2)  # while it gathers a batch
    fs = [pool.submit(one(v)) for v in range(3)]
    time.sleep(0.05)
    throw(pool._team[0], error)
    for f in fs:
        with pytest.raises(WorkerDied, match=f"outside the model: {error.__name__}"):
            f.result(LONG)
    assert pool(one(1), timeout=LONG).item() == 2
    throw(pool._team[0], error)  # while it waits
    for _ in range(2):
        with pytest.raises(PoolClosed, match=f"a worker ended with {error.__name__}"):
            pool(one(1), timeout=LONG)
            time.sleep(0.01)
    pool.close()


def test_errors_of_the_machinery(monkeypatch):
    def fails(*args):
        raise MemoryError("none left")

    with Pool(lambda x: x * 2, workers=1) as pool:
        with monkeypatch.context() as m:
            m.setattr("modelzip.workshop.workers.answer_all", fails)
            with pytest.raises(WorkerDied, match="none left"):
                pool(one(1), timeout=LONG)
        assert pool(one(1), timeout=LONG).item() == 2
    with (
        monkeypatch.context() as m,
        pytest.raises(PoolClosed, match="could not start: a worker ended with MemoryError: none left"),
    ):
        m.setattr("modelzip.workshop.workers.intra_op_threads", fails)
        Pool(lambda x: x, workers=2)
    start, started = threading.Thread.start, []

    def third(self):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="new thread"):
        m.setattr(threading.Thread, "start", third)
        Pool(lambda x: x, workers=3)
    assert not any(t.is_alive() for t in started)


def test_a_time_is_kept_while_every_worker_hangs():
    "Whoever waits with a time hears at that time, and `close` names what hangs."
    go, entered = threading.Event(), threading.Event()

    def hangs(x):
        entered.set()
        go.wait(LONG)
        return x

    pool = Pool(hangs, workers=1)
    first = pool.submit(one(1))
    assert entered.wait(LONG)
    start, told = time.monotonic(), []
    late = pool.submit(one(2), timeout=0.3)
    soon = pool.submit(one(3), timeout=0.1)
    late.add_done_callback(lambda f: told.append(pool.submit(one(4), timeout=0.05)))
    for call in (soon.result, late.result, lambda: pool.map([one(5)], timeout=0.1)):
        with pytest.raises(TimeoutError):
            call()
    with pytest.raises(TimeoutError):
        told[0].result(LONG)
    assert 0.3 < time.monotonic() - start < LONG and pool.stats.expired == 4 and pool.stats.waiting == 0
    with pytest.raises(TimeoutError, match=r"1 of 2 threads: pool-0 in hangs \(test_threads.py, line"):
        pool.close(timeout=0.1)
    go.set()
    pool.close()
    assert first.result().item() == 1
    with pytest.raises((ValueError, TypeError), match="timeout"):
        pool.close(timeout=float("nan"))


def test_a_full_batch_is_not_waited_for_longer_than_the_caller_waits():
    with Pool(lambda x: x, workers=1, max_wait=LONG if LONG < 60 else 60) as pool:
        assert pool(one(1), timeout=0.5).item() == 1


def test_samples_are_left_as_they_are():
    "A model that writes into its batch does not write into what it was given."
    x, net = torch.tensor([-1.0, 2.0]), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))
    with Pool(net, workers=1) as pool, torch.no_grad():
        for _ in range(2):
            assert torch.equal(pool(x), net(x.clone()[None])[0]) and x.tolist() == [-1, 2]
        xs = [x + k for k in range(5)]
        kept = [t.clone() for t in xs]
        assert len(pool.map(xs)) == 5 and all(map(torch.equal, xs, kept))


@pytest.mark.parametrize("error", [StopIteration(1), CancelledError(), asyncio.CancelledError()])
def test_errors_that_would_say_something_else(error):
    "StopIteration ends whoever iterates, and no coroutine hears of it; CancelledError tells of a cancelled task."

    def model(x):
        raise error

    with Pool(model, workers=1) as pool:
        for call in (lambda: pool(one(1), timeout=LONG), lambda: asyncio.run(pool.asubmit(one(1), timeout=LONG))):
            with pytest.raises(RuntimeError, match=type(error).__name__):
                call()


def test_a_callback_that_exits_is_nobody_elses_business():
    go = threading.Event()
    with Pool(lambda x: (go.wait(LONG), x)[1], workers=1, exact=False) as pool:
        fs = [pool.submit(one(v)) for v in range(4)]
        fs[1].add_done_callback(lambda f: sys.exit(3))
        go.set()
        assert [f.result(LONG).item() for f in fs] == [0, 1, 2, 3] and pool(one(5), timeout=LONG).item() == 5
    for bad, says in ((dict(collate=3, exact=False), "collate is a"), (dict(collate="x", exact=False), "collate is a")):
        with pytest.raises(TypeError, match=says):
            Pool(lambda x: x, **bad)
    with Pool(lambda **x: x, workers=1) as pool, pytest.raises(TypeError, match="x holds something as 1"):
        pool({1: one(1), "a": one(1)})


NUMBERS = [float("nan"), float("inf"), -1, True, "1", 1.5, 10**400]


def test_every_number_is_right_or_refused():
    inf = float("inf")
    for bad in NUMBERS:
        words = [
            n
            for n in ("workers", "max_batch", "intra_op", "queue_size", "max_wait")
            if (n, bad) not in (("queue_size", 10**400), ("max_wait", 1.5))
        ]
        for n in words:
            with pytest.raises((ValueError, TypeError), match=n):
                Pool(lambda x: x, **{"workers": 1, n: bad})
        for n in ("num_threads", "intra_op"):
            with pytest.raises((ValueError, TypeError), match=n):
                run_in_threads(abs, **{n: bad}, args=[1])
        if bad not in (inf, 10**400, 1.5):
            with pytest.raises((ValueError, TypeError), match="timeout"):
                run_in_threads(abs, 1, args=[1], timeout=bad)
        for n in ("threads", "batches", "intra_op"):
            with pytest.raises((ValueError, TypeError), match=n):
                scaling(nn.Linear(2, 2), torch.rand(3, 2), **{n: [bad]})
        if bad != 1.5:
            with pytest.raises((ValueError, TypeError), match="seconds"):
                scaling(nn.Linear(2, 2), torch.rand(3, 2), seconds=bad)
    with Pool(lambda x: x * 2, workers=1, queue_size=10**400, max_wait=0) as pool:
        for t in (inf, 1e10, 1e300, 10**400):
            assert pool(one(1), timeout=t).item() == 2 == pool.submit(one(1), timeout=t, wait=t).result(LONG).item()
            assert pool.map([one(1)], t)[0].item() == 2 == asyncio.run(pool.asubmit(one(1), timeout=t, wait=t)).item()
            assert run_in_threads(abs, 1, args=[-1], timeout=t) == [1]
        for t in (float("nan"), -1, True, "1"):
            for call in (
                lambda: pool(one(1), timeout=t),
                lambda: pool.submit(one(1), wait=t),
                lambda: pool.map([], t),
                lambda: asyncio.run(pool.asubmit(one(1), wait=t)),
            ):
                with pytest.raises((ValueError, TypeError), match="timeout|wait"):
                    call()


def test_nothing_is_kept():
    "An idle pool holds neither samples nor answers."
    import weakref

    with Pool(lambda x: x * 2, workers=1) as pool:
        x = torch.ones(1000)
        kept = weakref.ref(x)
        y = pool(x)
        answer = weakref.ref(y)
        pool(one(1))
        del x, y
        gc.collect()
        assert kept() is None and answer() is None


def test_a_forgotten_pool_ends():
    before = threading.active_count()
    f = Pool(lambda x: x * 2, workers=3).submit(one(1))
    assert f.result(LONG).item() == 2
    del f
    gc.collect()
    for t in threading.enumerate():
        if t.name.startswith("pool-"):
            t.join(LONG)
    assert threading.active_count() == before


END = """
import threading, torch, sys
from modelzip.threads import Pool
entered, gate = threading.Event(), threading.Event()
def f(x):
    entered.set(); gate.wait(60)
    return x
pool = Pool(f, workers=1, exact=False)
first = pool.submit(torch.ones(1)); entered.wait(60)
rest = [pool.submit(torch.ones(2)) for _ in range(5)]
rest[-1].add_done_callback(lambda f: (print("cancelled", f.cancelled(), flush=True), gate.set()))
first.add_done_callback(lambda f: print("answered", f.result().item(), flush=True))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_end_of_the_program():
    """An open pool neither hangs nor crashes it: what runs is finished, what waits is cancelled; nor where it is
    interrupted. (One process imports what both programs need.)"""
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also under nohup
    interrupted = heard + END + "import _thread, time\n_thread.interrupt_main()\ntime.sleep(60)"
    code = """if True:
        import gc, os, sys, modelzip.threads
        gc.freeze()
        for program in sys.argv[1:]:
            if not (pid := os.fork()):
                exec(program)
                break  # and ends as a program does
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            print("-", file=sys.stderr, flush=True)"""
    done = subprocess.run([sys.executable, "-c", code, END, interrupted], capture_output=True, text=True, timeout=LONG)
    said = ["cancelled True", "answered 1.0"]
    assert done.stdout.splitlines() == [*said, "0", *said, "-2"], done
    first, second, rest = done.stderr.split("-\n")
    assert (first, rest) == ("", "") and second.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_not_after_a_fork():
    with Pool(lambda x: x, workers=1) as pool:
        pid = os.fork()
        if not pid:
            try:
                pool.submit(one(1))
            except RuntimeError as e:
                os._exit(7 if "another process" in str(e) else 8)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert pool(one(1)).item() == 1


def test_numbers_of_threads():
    "Workers have theirs, everybody else keeps his; also after the end."
    import scipy.linalg  # noqa: F401

    before = blas()
    with Pool(lambda x: torch.full((len(x),), torch.get_num_threads()), workers=2, intra_op=3) as pool:
        assert pool(one(1)).item() == 3 and torch.get_num_threads() == 1 == elsewhere(torch.get_num_threads)
        with Pool(lambda x: x, workers=1, intra_op=1):
            assert not before or max(blas()) == 1
        assert pool.settings["workers"] == 2
    assert blas() == before
    with Pool(lambda x: x, intra_op=cores() + 1) as pool:
        assert pool.settings["workers"] == 1


def test_gradients_are_off_in_workers():
    layer = nn.Linear(2, 2)
    with torch.enable_grad(), Pool(layer, workers=1) as pool:
        y = pool(torch.ones(2))
        assert not y.requires_grad and not y.is_inference()
        y += 1  # an ordinary tensor


@pytest.mark.hypothesis
def test_soak():
    spec = importlib.util.spec_from_file_location(
        "bench_threads", Path(__file__).parent.parent / "bench" / "threads.py"
    )
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    n = 6400 if FUZZ else 3200
    found = bench.soak(requests=n, parts=2)
    assert found["requests"] == n and all(
        found["outcomes"][k] > n // 64 for k in ("fine", "refused", "cancelled", "late")
    )


# ---------------------------------------------------------------- settings and files


@pytest.mark.parametrize(
    "bad, error, words",
    [
        ({"workers": 0}, ValueError, "workers is 0"),
        ({"workers": 10**9}, ValueError, "at most 1024"),
        ({"max_batch": "8"}, TypeError, "max_batch is '8'"),
        ({"max_batch": True}, TypeError, "max_batch is True"),
        ({"max_wait": -1}, ValueError, "max_wait is -1"),
        ({"max_wait": 1e10}, ValueError, "max_wait is 10000000000.0; it may be at most 60 seconds"),
        ({"max_wait": float("nan")}, ValueError, "max_wait is nan"),
        ({"queue_size": 0}, ValueError, "queue_size is 0"),
        ({"queue_size": None}, TypeError, "queue_size is None"),
        ({"intra_op": 1.0}, TypeError, "intra_op is 1.0"),
        ({"exact": 0}, TypeError, "exact is 0"),
        ({"processes": "yes"}, TypeError, "processes is 'yes'"),
        ({"size": 1}, ValueError, "no setting 'size'"),
        ([], TypeError, "pool is a list"),
    ],
)
def test_bad_settings(bad, error, words, tmp_path):
    with pytest.raises(error, match=words):
        pool_settings(bad)
    with pytest.raises(error, match=words):
        save_multi_threaded_model(nn.Linear(2, 2), tmp_path / "x.mz", pool=bad)
    assert not (tmp_path / "x.mz").exists()
    if "nan" in str(bad):
        return  # JSON has no NaN
    path = save(LeNet5(), tmp_path / "bad.mz", archive=False, pool=bad)  # a file may say anything
    with pytest.raises(error, match="bad.mz asks for a pool that cannot be: .*" + words):
        Pool(path)


def test_a_file_asks_for_workers_of_this_machine(tmp_path):
    with Pool(save(LeNet5(), tmp_path / "many.mz", pool={"workers": 1024})) as pool:
        assert pool.settings["workers"] == 4 * cores()


def test_bad_models(tmp_path):
    with pytest.raises(TypeError, match="model is a int"):
        Pool(3)
    with pytest.raises(FileNotFoundError):
        Pool(tmp_path / "none.mz")

    class Stubborn(nn.Module):
        def __deepcopy__(self, memo):
            raise TypeError("no")

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="training mode"):
        Pool(Stubborn())
    with Pool(Stubborn().eval(), workers=1) as pool:
        assert pool(one(2)).item() == 2


@pytest.mark.parametrize("archive", [True, False])
def test_served_from_a_file(archive, tmp_path):
    model, xs = quantize_model(LeNet5(), 4, group=25).eval(), list(mnist5k().test.x[:20])
    settings = {
        "workers": 1,
        "max_batch": 3,
        "max_wait": 0.001,
        "queue_size": 50,
        "intra_op": 2,
        "exact": True,
        "processes": False,
    }
    path = (
        save_multi_threaded_model(model, tmp_path / "m.mz", pool=settings, note="hello")
        if archive
        else save(model, tmp_path / "m.mz", archive=False, pool=settings)
    )
    with Pool(path) as pool:
        assert pool.settings == settings
        with intra_op_threads(2):
            assert all(map(torch.equal, pool.map(xs), alone(model, xs)))
    with Pool(str(path), 2, max_batch=4, intra_op=1) as pool:  # what the caller says counts
        assert pool.settings == {**settings, "workers": 2, "max_batch": 4, "intra_op": 1}
        assert all(map(torch.equal, pool.map(xs), alone(model, xs)))


def test_saved_by_threads(tmp_path):
    model = quantize_model(LeNet5(), 4, group=25)
    one_thread, four, plain = (
        save_multi_threaded_model(model, tmp_path / f"{n}.mz", threads=n, pool={"workers": 2}, epochs=3)
        for n in (1, 4, None)
    )
    assert one_thread.read_bytes() == four.read_bytes() == plain.read_bytes()
    assert inspect(four).info == {"pool": {"workers": 2}, "epochs": 3}
    assert inspect(save_multi_threaded_model(model, tmp_path / "none.mz")).info == {}


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def lenet_file(tmp_path_factory):
    model = use_kernels(quantize_model(LeNet5(), 8)).eval()
    return model, save(model, tmp_path_factory.mktemp("served") / "int8.mz", archive=False)


posix = pytest.mark.skipif(os.name != "posix", reason="processes need Linux or macOS")


@posix
def test_processes(lenet_file, monkeypatch):
    """What stands in `sys.path` beside texts does not keep them from starting; one that hangs is killed by `close`, one
    that does not is not."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    model, path = lenet_file
    xs = list(torch.rand(40, 1, 28, 28))
    with Pool(path, workers=2, processes=True) as pool:
        pids = pool.pids
        assert len(set(pids)) == 2 and os.getpid() not in pids
        assert all(map(torch.equal, pool.map(xs), alone(model, xs)))
        if sys.platform == "linux":  # all map the same pages
            for pid in pids:
                assert "int8.mz" in Path(f"/proc/{pid}/maps").read_text()
        os.kill(pids[0], signal.SIGKILL)  # a process that dies is replaced, and nobody notices
        assert all(map(torch.equal, pool.map(xs + xs), alone(model, xs + xs)))
        pids, runs = {*pids, *pool.pids}, [*pool._runs]
        os.kill(runs[0].process.pid, signal.SIGSTOP)
        fs = [pool.submit(x) for x in xs]
        pool.close(timeout=2)  # enough for the other one to end
        for f in fs:
            try:
                assert torch.is_tensor(f.result(LONG))  # of the other one
            except (WorkerDied, CancelledError):
                pass
        assert [run.process.returncode for run in runs] == [-signal.SIGKILL, 0]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@posix
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_processes_and_errors(monkeypatch):
    """Whatever ends them, everybody gets an answer or an error by name; and they come back, also after a time when
    none could be started."""
    from modelzip.workshop.processes import Remote

    pool = Pool(Poison(), workers=1, processes=True, exact=False)
    fs = [pool.submit(one(v)) for v in (1, 2, -1, 3, -2, 4, -3, -4, -5, -6, 5)]
    ends = [f.exception(LONG) or f.result().item() for f in fs]
    assert ends[:2] == [2, 4] and ends[3] == 6 and ends[5] == 8 and ends[10] == 10
    assert isinstance(ends[2], WorkerDied) and "exit code -9" in str(ends[2]) and str(ends[4]) == "Odd: two"
    assert [(type(e), str(e)) for e in ends[6:10]] == [
        (MemoryError, "three"),
        (SystemExit, "four"),
        (KeyboardInterrupt, "five"),
        (TypeError, "stays here"),
    ]
    assert pool(torch.ones(2, dtype=torch.bfloat16)).tolist() == [2, 2]
    from modelzip.workshop.processes import reply_to

    said = []

    class Pipe:
        def send_bytes(self, data):
            said.append(pickle.loads(data))

    reply_to(
        Pipe(), Runner(Poison(), exact=False), pickle.dumps([one(-6), one(5)])
    )  # in one batch: only its own request learns of it
    (fine, error), (good, y) = said[-1]
    assert not fine and isinstance(error, TypeError) and good and y.item() == 10
    with monkeypatch.context() as m:

        def fails(self):
            raise OSError("no process left")

        m.setattr(Remote, "start", fails)
        os.kill(pool.pids[0], signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(WorkerDied, match="could not start: OSError: no process left"):
                pool(one(1), timeout=LONG)
    assert pool(one(1), timeout=LONG).item() == 2
    pid = os.fork()  # a copy holds the pipe open, and may call what it likes
    if not pid:
        pool.close()
        time.sleep(LONG)
        os._exit(0)
    (run,), (thread,) = pool._runs, pool._team
    del pool
    gc.collect()
    thread.join(LONG)  # nobody closes it
    assert run.process.returncode == 0  # it was told, and had not to be killed
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(TypeError, match="cannot be sent"):
        Pool(lambda x: x, workers=1, processes=True)


@posix
def test_processes_do_not_find_what_the_program_defines(tmp_path):
    (tmp_path / "hidden.py").write_text("from torch import nn\nclass Net(nn.Module): pass\n")
    code = """if True:
        import sys
        from torch import nn
        from modelzip.threads import Pool
        class Net(nn.Module): pass
        class Sub(nn.Module):
            def __init__(self): super().__init__(); self.net = Net()
        def batch(xs): return xs
        import hidden
        later = hidden.Net(); sys.path.remove(hidden.__file__.rpartition("/")[0])
        for model, more in ((nn.Sequential(Net()), {}), (nn.Linear(1, 1), dict(collate=batch, exact=False)), (later, {})):
            try: Pool(model, workers=1, processes=True, **more)
            except TypeError as e: print(e)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=LONG,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    said = done.stdout.splitlines()
    assert (
        len(said) == 3
        and "Net is defined in the program or notebook itself" in said[0]
        and "batch is defined" in said[1]
        and "does not find" in said[2]
        and "No module named 'hidden'" in said[2]
    ), done
    assert done.stderr == ""


@posix
def test_processes_that_cannot_start(tmp_path):
    path = save(nn.Linear(2, 2), tmp_path / "anonymous.mz", archive=False)
    with pytest.raises(Exception, match="no registered builder makes: pass a model"):
        Pool(path, workers=1, processes=True)


# ---------------------------------------------------------------- scaling


def test_scaling():
    found = scaling(
        nn.Linear(4, 4), torch.rand(10, 4), threads=(1, 2), batches=(1, 8), intra_op=(1, 2), rounds=2, seconds=0.001
    )
    assert [(w.workers, w.intra_op, w.batch) for w in found.ways] == [
        (w, i, b) for b in (1, 8) for i in (1, 2) for w in (1, 2)
    ]
    assert found.ways[0].gain == (1, 1, 1) and found.best in found.ways and list(found.serial_fraction) == [1, 8]
    assert all(0 < w.rate.low <= w.rate.median <= w.rate.high for w in found.ways)
    assert len(repr(found).splitlines()) == 9 and found._repr_html_().count("<tr>") == 9
    import matplotlib

    matplotlib.use("agg")
    assert len(found.plot()) == 2


def test_scaling_of_other_data():
    pairs = (torch.rand(3, 4), torch.rand(3, 4))
    assert len(scaling(lambda a, b: a + b, pairs, threads=[1], batches=[2], rounds=2, seconds=0).ways) == 1
    assert (
        len(scaling(lambda b, a: a + b, dict(zip("ab", pairs)), threads=[1], batches=[5], rounds=2, seconds=0).ways)
        == 1
    )
    assert scaling(LeNet5().eval(), mnist5k().test, threads=[2], batches=[1], rounds=2, seconds=0).serial_fraction == {}


@pytest.mark.parametrize(
    "bad, error, words",
    [
        (dict(threads=()), ValueError, "threads is empty"),
        (dict(batches=[0]), ValueError, "batches is 0"),
        (dict(rounds=1), ValueError, "rounds is 1"),
        (dict(intra_op=["1"]), TypeError, "intra_op is '1'"),
    ],
)
def test_scaling_errors(bad, error, words):
    with pytest.raises(error, match=words):
        scaling(nn.Linear(2, 2), torch.rand(3, 2), **bad)


# ---------------------------------------------------------------- models that hide something


def own_forward(m):
    m.forward = (lambda f: lambda x: f(x))(m.forward)


def own_forward_inside(m):
    m[0].forward = (lambda f: lambda x: f(x))(m[0].forward)


def compiled(m):
    m.forward = torch.compile(m.forward, backend="eager")


def hook(m):
    m[0].register_forward_hook(lambda l, i, o: 2 * o)


def pre_hook(m):
    m[2].register_forward_pre_hook(lambda l, i: (i[0] @ torch.eye(6),))


def closure(m):
    m[2].register_forward_hook(lambda l, i, o, first=m[0]: o + first(i[0]))


@pytest.mark.parametrize("hide", [own_forward, own_forward_inside, compiled, hook, pre_hook, closure])
def test_what_hides_is_served_as_it_is_or_refused(hide):
    "Dropout is off in what is served, whichever way a model leads back to itself."
    model, xs = (
        torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 6)),
        torch.randn(40, 6),
    )
    hide(model)
    copies = hide in (hook, pre_hook)
    if not copies:
        with pytest.raises(
            ValueError,
            match="in training mode, wholly or in part, and cannot be copied.*(forward of its own|reaches the model)",
        ):
            Pool(model)
        model.eval()[1].train()
        with pytest.raises(ValueError, match="wholly or in part"):
            Pool(model)
        model.eval()
    with torch.no_grad():
        truth = alone(copy.deepcopy(model).eval() if copies else model, xs)
    with Pool(model, workers=2, max_batch=8) as pool:
        assert all(map(torch.equal, pool.map(xs), truth))
    assert model.training == copies


def test_what_a_model_keeps_while_it_runs_belongs_to_one_thread():
    class Keeps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 3)

        def forward(self, x):
            self.kept = x * 2
            time.sleep(0.002)
            return self.fc(self.kept)

    model, xs = Keeps().eval(), torch.randn(60, 3)
    with torch.no_grad():
        truth = [model.fc(2 * x[None])[0] for x in xs]
    with Pool(model, workers=4, max_batch=1) as pool:
        assert all(map(torch.equal, pool.map(xs), truth))
    assert not hasattr(model, "kept")
