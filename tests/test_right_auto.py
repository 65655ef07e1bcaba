"""Recipes, sweeps and `compress`: a key says all that a result depends on, who judges has not learned, nothing of
the caller's changes, and a try that fails takes nothing along."""

import contextlib, copy, dataclasses, functools, itertools, math, os, threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from guards import FUZZ, codes_alone, examples, share, turns, unchanged
from modelzip import auto
from modelzip.workshop.menu import expected_change
from modelzip.auto import (
    DENSE,
    TargetError,
    allocate,
    branch_and_bound,
    compress,
    greedy,
    knapsack,
    lower_hull,
    menu_of,
    output_change,
    second_order,
    tensors_of,
    waterfill,
)
from modelzip.data import Data, Split
from modelzip.pack import load
from modelzip.quant import quantize_model
from modelzip.recipe import (
    STEPS,
    Judge,
    Recipe,
    expanded,
    file_of,
    fingerprint,
    learn,
    other_matrices,
    quantize_others,
    register_step,
    samples_of,
    sweep,
)
from modelzip.workshop import search
from modelzip.workshop.judging import likeness
from modelzip.workshop.models import Inputs, Labelled

torch.set_num_threads(1)


pytestmark = pytest.mark.usefixtures("fewer_choices")


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def net(*sizes):
    sizes = sizes or (8, 16, 4)
    return seeded(
        lambda: nn.Sequential(*[m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())][:-1]).eval()
    )


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- keys of sweeps

LIMIT = 0.0


class Counting:
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, m):
        return above(m, self.limit)


class Slotted:
    __slots__ = ("limit",)

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, m):
        return above(m, self.limit)


class Method:
    def __init__(self, limit):
        self.limit = limit

    def judge(self, m):
        return above(m, self.limit)


def above(m, limit):
    return sum(float((p > torch.as_tensor(limit)).sum()) for p in m.parameters())


def closed(limit):
    return lambda m: above(m, limit)


def closed_deep(limit):
    return lambda m: (lambda: above(m, limit))()


def defaulted(limit):
    def judge(m, limit=limit):
        return above(m, limit)

    return judge


def keyword_defaulted(limit):
    def judge(m, *, limit=limit):
        return above(m, limit)

    return judge


def attributed(limit):
    def judge(m):
        return above(m, judge.limit)

    judge.limit = limit
    return judge


def reading(limit):
    space = {"above": above, "LIMIT": limit, "__name__": "__main__"}
    exec("def judge(m): return above(m, LIMIT)", space)
    return space["judge"]


def constant(limit):
    space = {"above": above, "__name__": "__main__"}
    exec(f"def judge(m): return above(m, {limit})", space)
    return space["judge"]


def classed(limit):
    space = {"above": above, "__name__": "__main__"}
    exec(
        f"class Judge:\n    def limit(self): return {limit}\n    def __call__(self, m): return above(m, self.limit())",
        space,
    )
    return space["Judge"]()


def in_array(limit):
    table = np.zeros(5000)
    table[2500] = limit  # in the middle, where a repr has dots
    return lambda m: above(m, float(table.sum()))


def in_tensor(limit):
    return functools.partial(lambda t, m: above(m, float(t.sum())), torch.tensor([limit, 0.0]))


JUDGES = [
    Counting,
    Slotted,
    lambda l: Method(l).judge,
    closed,
    closed_deep,
    defaulted,
    keyword_defaulted,
    attributed,
    reading,
    constant,
    classed,
    in_array,
    in_tensor,
    lambda l: functools.partial(lambda limit, m: above(m, limit), l),
]


def plain(bits=4):
    return [("quantize_model", {"bits": bits})]


@pytest.mark.parametrize("i", range(len(JUDGES)))
def test_a_sweep_never_hands_out_another_judges_result(i, tmp_path):
    model = net()
    for limit in (0.0, 0.1, 0.0):
        got = sweep(plain, {"bits": [4]}, model, folder=tmp_path, evaluate=JUDGES[i](limit), progress=False)[0]
        assert got.quality == above(expanded(load(tmp_path / f"{got.key}.mz", model)), limit)
    assert len(list(tmp_path.glob("*.mz"))) == 2  # the third was the first again


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(8, 8), 1.0
        self.register_buffer("shift", torch.zeros(8), persistent=False)

    def forward(self, x):
        return self.a(x) * self.scale + self.shift


def changed(how):
    m = seeded(Plain).eval()
    if how == "an attribute":
        m.scale = -1.0
    if how == "a buffer":
        m.shift += torch.arange(8.0)
    if how == "a hook":
        m.a.register_forward_hook(lambda l, i, o: o.abs())
    if how == "a weight":
        m.a.weight.data[0, 0] += 1
    if how == "frozen":
        m.a.requires_grad_(False)
    if how == "an edited forward":

        class Plain_(Plain):
            def forward(self, x):
                return -self.a(x).relu()

        Plain_.__qualname__ = Plain_.__name__ = "Plain"
        m.__class__ = Plain_
    return m


CHANGES = ["nothing", "an attribute", "a buffer", "a hook", "a weight", "frozen", "an edited forward"]


def test_models_that_differ_in_anything_have_other_keys():
    assert len({fingerprint(changed(how)) for how in CHANGES}) == len(CHANGES)
    for how in CHANGES:
        assert fingerprint(changed(how)) == fingerprint(changed(how)) == fingerprint(copy.deepcopy(changed(how)))


def test_a_step_that_was_edited_is_followed_anew(tmp_path):
    model = net()
    try:
        for factor in (2.0, 3.0):
            space = {"__name__": "__main__", "copy": copy}
            exec(
                "def times(model):\n    new = copy.deepcopy(model)\n    for p in new.parameters(): p.data *="
                f" {factor}\n    return new",
                space,
            )
            register_step(space["times"])
            r = sweep(lambda: ["times"], [{}], model, folder=tmp_path, progress=False)[0]
            assert torch.equal(load(tmp_path / f"{r.key}.mz", model)[0].weight, factor * model[0].weight)
    finally:
        STEPS.pop("times", None)


def test_what_nobody_can_look_into_is_not_kept_and_it_is_said(tmp_path):
    lock, counted = threading.Lock(), tmp_path / "n"

    def judge(m):
        with lock, open(counted, "a") as f:
            f.write("x")
        return 1.0

    for _ in range(2):
        with pytest.warns(UserWarning, match="no fingerprint.*lock"):
            r = sweep(plain, {"bits": [4]}, net(), folder=tmp_path / "s", evaluate=judge, progress=False)
        assert r[0].bytes and (tmp_path / "s" / f"{r[0].key}.mz").exists()
    assert len(counted.read_text()) == 4


def test_failures_of_the_machine_are_not_kept(tmp_path):
    gone = tmp_path / "gone"

    def judge(m):
        if not gone.exists():
            raise OSError("no space")
        return 1.0

    assert sweep(plain, {"bits": [4]}, net(), folder=tmp_path / "s", evaluate=judge, progress=False).failed
    gone.touch()
    assert not sweep(plain, {"bits": [4]}, net(), folder=tmp_path / "s", evaluate=judge, progress=False).failed


# --- threads


class Noisy(nn.Module):
    "Random in eval mode, and with BatchNorm and dropout for train mode to matter."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))

    def forward(self, x):
        return self.body(x + 0.1 * torch.randn_like(x))


def random_judge(m):
    assert not any(x.training for x in m.modules())
    with torch.no_grad():
        return float(m(torch.ones(3, 8)).sum()) + float(torch.rand(()))


def some_steps(bits, how):
    return {
        "plain": [("quantize_model", {"bits": bits})],
        "trained": [("prepare", {"bits": bits, "activations": None}), ("learn", {"epochs": 1}), "convert"],
    }[how]


@pytest.mark.hypothesis
@pytest.mark.parametrize("judge", [None, random_judge])
def test_threads_say_what_one_says(judge, tmp_path):
    model = seeded(Noisy).train()
    model.body[1].eval()
    data = Split(noise(60, 8), torch.arange(60) % 4)
    grid = {"bits": share([2, 3, 4, 6, 8], 2), "how": ["plain", "trained"]}
    with unchanged(model, data.x, data.y):
        one = sweep(some_steps, grid, model, data, folder=tmp_path / "one", evaluate=judge, progress=False)
    with unchanged(model, data.x, data.y), ThreadPoolExecutor(4) as pool:
        many = sweep(
            some_steps, grid, model, data, executor=pool, folder=tmp_path / "many", evaluate=judge, progress=False
        )
    told = lambda rs: [(r.options, r.key, r.bytes, r.quality, r.error) for r in rs]
    assert told(one) == told(many) and not one.failed
    for r in one:
        assert one.file(r).read_bytes() == many.file(r).read_bytes()


# --- what is held out


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.integers(0, 9), min_size=10, max_size=120))
def test_a_fifth_of_a_split_is_held_out_class_by_class(labels):
    data = Split(torch.arange(len(labels)), torch.tensor(labels))
    s = samples_of(data)
    held, rest = set(s.held.x.tolist()), set(s.train.x.tolist())
    assert not held & rest and held | rest == set(range(len(labels)))
    assert abs(len(held) - len(labels) / 5) < 1
    for c in set(labels):
        assert abs(sum(labels[i] == c for i in held) - labels.count(c) / 5) <= 1
    assert all(labels[i] == y for i, y in zip(s.held.x.tolist(), s.held.y.tolist()))


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_what_is_calibrated_on_is_never_what_is_judged_by(sizes):
    rows = iter(range(1000))
    batches = [torch.tensor([[float(next(rows))] for _ in range(n)]) for n in sizes]
    s = samples_of(batches)
    of = lambda bs: {v for b in bs or () for v in b.flatten().tolist()}
    assert not of(s.batches) & of(s.held) and len(of(s.batches) | of(s.held)) == sum(sizes)
    assert (s.held is None) == (sum(sizes) == 1) and s.batches


def test_the_same_batch_again_is_one_batch():
    x = noise(8, 3)
    s = samples_of([x] * 4)
    assert sum(map(len, s.batches)) + sum(map(len, s.held)) == 8


def test_one_example_is_no_judge():
    x = noise(1, 8)
    with pytest.raises(ValueError, match="one example alone"):
        compress(net(), [x], cosine=0.9, progress=False)
    assert compress(net(), [x], progress=False)[1].metric is None


def test_batches_that_are_not_rows_alone_stay_whole():
    pair = {"x": noise(6, 3), "names": ["a"] * 6}
    assert samples_of([pair, pair | {}]).batches[0] is pair
    s = samples_of([Inputs(noise(8, 3), scale=noise(8))])
    assert len(s.batches) == 3 and s.held[0].kwargs["scale"].shape == (2,)


# --- the judge


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Wrapped(nn.Module):
    "The same answer in many shapes."

    def __init__(self, how):
        super().__init__()
        self.how, self.body = how, net(8, 16, 4)

    def forward(self, x):
        y = self.body(x)
        loss = (0 * y).sum() + 1
        return {
            "tensor": y,
            "tuple": (y, loss),
            "loss first": (loss, y),
            "dict": {"loss": loss, "logits": y},
            "dataclass": Output(loss, y),
            "nested": [{"a": (y,)}, loss],
        }[self.how]


HOWS = ["tensor", "tuple", "loss first", "dict", "dataclass", "nested"]


@pytest.mark.parametrize("how", HOWS)
def test_a_loss_among_the_outputs_is_no_answer(how):
    x = [noise(10, 8, seed=s) for s in range(8)]
    bare, model = Wrapped("tensor").eval(), Wrapped(how).eval()
    model.load_state_dict(bare.state_dict())
    small, report = compress(model, x, cosine=0.99, tries=2, progress=False)
    with torch.no_grad():
        true = F.cosine_similarity(expanded(small).body(torch.cat(x[3::4])), bare(torch.cat(x[3::4]))).mean().item()
    assert report.quality == pytest.approx(true, abs=1e-6) and true >= 0.99


@pytest.mark.parametrize("how", HOWS)
def test_labels_judge_answers_of_every_shape(how):
    x = noise(80, 8)
    model = Wrapped(how).eval()
    with torch.no_grad():
        y = model.body(x).argmax(1)
    trained = Recipe([("prepare", {"bits": 8, "activations": None}), ("learn", {"epochs": 1, "lr": 1e-5}), "convert"])
    small, report = compress(model, Split(x, y), recipe=trained, accuracy_loss=50, progress=False)
    assert report.metric == "accuracy" and report.baseline == 1 and report.quality >= 0.9


@pytest.mark.parametrize("last", [(), (nn.Flatten(0),)], ids=["column", "flat"])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_one_number_for_each_example_is_more_than_a_sign(last, offset):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1), *last)).eval()
    model[2].bias.data.fill_(offset)  # with 5, each answer has the same sign
    x = [noise(40, 8, seed=s) for s in range(8)]
    small, report = compress(model, x, cosine=0.99, tries=2, progress=False)
    held = torch.cat(x[3::4])
    with torch.no_grad():
        y, z = model(held).flatten(), expanded(small)(held).flatten()
    r2 = 1 - ((y - z).square().sum() / (y - y.mean()).square().sum()).item()
    assert r2 >= 0.975 and report.quality <= (1 + r2) / 2 + 0.005


def test_a_model_is_like_itself():
    dead = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    dead[0].bias.data.fill_(-0.5)
    for model, x in (
        (dead, noise(50, 4)),
        (nn.Sequential(nn.Linear(4, 1), nn.ReLU()).eval(), noise(50, 4)),
        (nn.LSTM(4, 3), noise(5, 2, 4)),
        (nn.Sequential(nn.Linear(4, 3), nn.Threshold(1e9, 0.0)).eval(), noise(9, 4)),
    ):
        assert Judge(model, samples_of([x])).baseline == 1
        same = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
        assert set(output_change(model, same, [x]).values()) == {0}
        for d in output_change(model, {n: p + 0.01 for n, p in same.items()}, [x]).values():
            assert d < 1e3


def test_the_worst_of_several_outputs_counts():
    x = torch.eye(3)
    assert likeness({"a": [x], "b": [-x]}, {"a": [x], "b": [x]}) == -1


@pytest.mark.parametrize(
    "answer", [lambda x: x.tolist(), lambda x: x.detach().numpy(), lambda x: {1, 2}, lambda x: x.long()]
)
def test_outputs_that_hide_their_numbers_cannot_judge(answer):
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return answer(self.a(x))

    with pytest.raises((TypeError, ValueError), match="evaluate="):
        compress(Hides(), [noise(8, 4)], progress=False)
    assert compress(Hides(), [noise(8, 4)], evaluate=lambda m: 1.0, progress=False)[1].quality == 1


def test_one_logit_and_labels_are_refused():
    with pytest.raises(ValueError, match="n, classes"):
        compress(net(8, 4, 1), Split(noise(20, 8), torch.arange(20) % 2), progress=False)


def test_a_model_that_spoils_its_input_is_judged_on_what_was_given():
    class Spoils(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            x.mul_(0.5).sub_(1)
            return self.a(x)

    model, x = seeded(Spoils).eval(), [noise(8, 4, seed=s) for s in range(4)]
    with unchanged(model, x):
        _, report = compress(model, x, cosine=0.9, progress=False)
    assert report.baseline == 1


@pytest.mark.parametrize("batch", [lambda x: (x, x[:, 0]), lambda x: (x, torch.arange(len(x)) % 2)])
def test_labels_or_a_mask_nobody_knows(batch):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, mask=None):
            return self.a(x) if mask is None else self.a(x) * mask[:, None]

    x = [noise(8, 4, seed=s) for s in range(4)]
    with pytest.raises(ValueError, match="may be labels, or its optional mask"):
        compress(Masked(), [batch(b) for b in x], progress=False)
    for named in (lambda b: Labelled(*batch(b)), lambda b: Inputs(*batch(b)), lambda b: {"x": b, "mask": b[:, 0]}):
        assert compress(seeded(Masked), [named(b) for b in x], tries=1, progress=False)[1].quality is not None


# --- allocation

menus = st.integers(1, 4).flatmap(
    lambda layers: st.lists(
        st.lists(
            st.tuples(st.one_of(st.integers(0, 50), st.integers(0, 10**7), st.just(math.inf)), st.floats(0, 1)),
            min_size=1,
            max_size=5,
        ),
        min_size=layers,
        max_size=layers,
    )
)


@settings(max_examples=examples(150), deadline=None)
@given(menus, st.floats(0, 1.2))
def test_allocation_is_the_best_there_is(menu, share):
    R, D = [[float(b) for b, _ in row] for row in menu], [[e for _, e in row] for row in menu]
    cost = lambda t, picks: sum(row[o] for row, o in zip(t, picks))
    every = [p for p in itertools.product(*map(lambda r: range(len(r)), R)) if math.isfinite(cost(R, p))]
    if not every:
        with pytest.raises(ValueError):
            allocate(R, D, 100.0)
        return
    least, most = min(cost(R, p) for p in every), max(cost(R, p) for p in every)
    for budget in (least + share * (most - least), math.inf):
        picks = allocate(R, D, budget)
        assert (
            cost(R, picks) <= budget and cost(D, picks) <= min(cost(D, p) for p in every if cost(R, p) <= budget) + 1e-9
        )
        assert knapsack(R, D, budget) is None or cost(R, knapsack(R, D, budget)) <= budget
    for wrong in (-1.0, -math.inf, math.nan):
        with pytest.raises(ValueError):
            allocate(R, D, wrong)
        assert knapsack(R, D, wrong) is None and branch_and_bound(R, D, wrong) is None


def test_allocation_with_large_budgets_and_many_layers():
    rng = np.random.default_rng(3)
    for layers in (5, 40):
        R, D = (
            np.sort(rng.integers(1, 10**8, (layers, 6)), 1).astype(float).tolist(),
            (-np.sort(-rng.random((layers, 6)), 1)).tolist(),
        )
        budget = 0.4 * sum(r[-1] for r in R)
        best = branch_and_bound(R, D, budget)
        assert best is not None
        for method in (greedy, knapsack):
            assert sum(d[p] for d, p in zip(D, best)) <= sum(d[p] for d, p in zip(D, method(R, D, budget))) + 1e-12


@pytest.mark.parametrize("bits", [-1.0, math.nan, math.inf])
def test_waterfill_refuses_such_bits(bits):
    with pytest.raises(ValueError, match="bits is"):
        waterfill([1.0, 2.0], [1, 1], bits)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=9), st.floats(0, 5))
def test_the_hull_is_what_some_price_takes(points, price):
    R, D = map(list, zip(*points))
    hull = lower_hull(R, D)
    best = min(d + price * r for r, d in points)
    assert min(D[i] + price * R[i] for i in hull) == pytest.approx(best)  # whatever the price
    slopes = [(D[i] - D[j]) / (R[j] - R[i]) for i, j in zip(hull, hull[1:])]
    assert slopes == sorted(slopes, reverse=True) and len(set(slopes)) == len(slopes) and all(s > 0 for s in slopes)


@settings(max_examples=examples(100), deadline=None)
@given(menus, st.floats(0, 1.2))
def test_greed_is_at_most_one_step_from_the_best(menu, share):
    R, D = [[float(b) for b, _ in row] for row in menu], [[e for _, e in row] for row in menu]
    cost = lambda t, picks: sum(row[o] for row, o in zip(t, picks))
    every = [p for p in itertools.product(*map(lambda r: range(len(r)), R)) if math.isfinite(cost(R, p))]
    if not every:
        return
    budget = min(cost(R, p) for p in every) + share * (max(cost(R, p) for p in every) - min(cost(R, p) for p in every))
    step = max((r[a] - r[b] for row, r in zip(R, D) for h in [lower_hull(row, r)] for a, b in zip(h, h[1:])), default=0)
    assert (
        cost(R, greedy(R, D, budget)) <= budget
        and cost(D, greedy(R, D, budget)) <= min(cost(D, p) for p in every if cost(R, p) <= budget) + step + 1e-9
    )


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(1, 50)), min_size=1, max_size=6),
    st.floats(0, 400),
    st.randoms(),
)
def test_no_other_bits_have_less_error_than_the_level(layers, bits, dice):
    c, n = map(list, zip(*layers))
    best = waterfill(c, n, bits).tolist()
    total = lambda b: sum(k * x * 4**-v for k, x, v in zip(n, c, b))
    assert all(b >= 0 for b in best) and sum(k * b for k, b in zip(n, best)) == pytest.approx(bits, abs=1e-6)
    for _ in range(20):
        other = [dice.random() ** 3 for _ in c]
        scale = bits / max(sum(k * v for k, v in zip(n, other)), 1e-12)
        assert total([v * scale for v in other]) >= total(best) * (1 - 1e-9)


@pytest.mark.parametrize(
    "known, error, right",
    [
        ([(16.0, 0.8), (0.0, 0.0)], 4.0, 0.2),
        ([(16.0, 0.8), (0.0, 0.0)], 0.0, 0.0),
        ([(0.0, 0.0), (0.0, 0.0)], 4.0, 0.25),
        ([(16.0, 0.8), (1.0, 0.0)], 4.0, 0.2),
        ([(16.0, 0.0), (1.0, 0.0)], 4.0, 0.0),
        ([(16.0, 0.8), (1.0, 0.05)], 4.0, 0.2),
    ],
)
def test_exact_references_do_not_make_options_free(known, error, right):
    assert expected_change(error, known, 16.0) == pytest.approx(right)


@pytest.mark.hypothesis  # so that a search comes here, with both numbers of bits
@pytest.mark.parametrize("bits, labels", [(2, False), *[(4, False)] * bool(FUZZ), (4, True)])
def test_a_model_that_was_rounded_before(bits, labels):
    from modelzip.quant import dequantize_model

    x = [noise(20, 8, seed=s) for s in range(8)]
    model = dequantize_model(quantize_model(net(8, 64, 4), bits))
    data = x
    if labels:
        with torch.no_grad():
            data = Split(torch.cat(x), model(torch.cat(x)).argmax(1))
    menu = menu_of(model, samples_of(data), DENSE)
    assert all(any(e > 0 for e in row) for row in menu.errors)
    plain_report = compress(model, x, recipe=Recipe([("quantize_model", {"bits": 4})]), progress=False)[1]
    small, report = compress(
        model, data, bytes=plain_report.bytes + 150, epochs=1, tries=1 if labels else 3, progress=False
    )
    assert report.met
    if not labels:
        assert report.quality >= plain_report.quality - 0.002
    else:
        assert report.quality >= 0.8


# --- failures, wishes, paths


def test_training_that_fails_is_noted():
    "A last batch of one, and a BatchNorm."
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))).eval()
    data = Data(Split(noise(65, 8), torch.arange(65) % 4), Split(noise(20, 8), torch.arange(20) % 4), None)
    small, report = compress(model, data, bytes=0.6, epochs=1, tries=2, strict=False, progress=False)
    assert report.bytes > 0 and report.best.error is None


def test_labels_out_of_range_are_noted():
    data = Split(noise(80, 8), torch.arange(80) % 9)
    small, report = compress(net(8, 64, 4), data, bytes=0.4, epochs=1, tries=3, progress=False)
    assert report.met and any(t.error for t in report.tries) and "no training" in repr(report)


def test_half_precision_on_the_cpu():
    model = net(8, 32, 4).half()
    small, report = compress(model, [noise(10, 8, seed=s).half() for s in range(4)], cosine=0.99, progress=False)
    assert report.met and next(iter(expanded(small).parameters())).dtype == torch.float16


@pytest.mark.parametrize(
    "kind",
    [
        RuntimeError,
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
        ZeroDivisionError,
        MemoryError,
        OSError,
        StopIteration,
    ],
)
def test_a_judge_that_raises_once_loses_one_try(kind):
    asked = []

    def judge(m):
        asked.append(1)
        if len(asked) == 3:
            raise kind("now and then")
        return 1.0

    small, report = compress(net(8, 32, 4), bytes=0.25, evaluate=judge, tries=3, strict=False, progress=False)
    assert [t.error is None for t in report.tries][:2] == [True, False] and kind.__name__ in report.tries[1].error
    assert f"{report.tries[1].error.splitlines()[0][:40]}" in repr(report) and report.bytes > 0


def test_when_everything_fails_it_is_said_why():
    asked = []

    def judge(m):
        asked.append(1)
        if len(asked) > 1:
            raise RuntimeError("never")
        return 1.0

    with pytest.raises(ValueError, match="nothing could be done.*never"):
        compress(net(), evaluate=judge, progress=False)


@pytest.mark.parametrize("score", [math.nan, "no number", None])
def test_a_judge_without_a_number(score):
    with pytest.raises((ValueError, TypeError)):
        compress(net(), evaluate=lambda m: score, progress=False)


def test_an_allocation_that_fails_is_noted(monkeypatch):
    monkeypatch.setattr(search, "menu_of", lambda *a, **k: 1 / 0)
    small, report = compress(net(), bytes=0.1, strict=False, progress=False)
    assert report.tries[-1].error.startswith("ZeroDivisionError") and report.bytes


@pytest.mark.parametrize("data", [True, False])
def test_a_fold_that_changes_answers_is_left_out(data, monkeypatch):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))).eval()

    def fold_batchnorm(model, example=None):
        new = copy.deepcopy(model)
        new[0].weight.data *= -1
        return new

    monkeypatch.setitem(STEPS, "fold_batchnorm", dataclasses.replace(STEPS["fold_batchnorm"], function=fold_batchnorm))
    small, report = compress(
        model, [noise(8, 8, seed=s) for s in range(4)] if data else None, example=noise(2, 8), progress=False
    )
    assert report.tries[0].error and "changes the answers" in report.tries[0].error and report.best.why == "int8"
    with torch.no_grad():
        assert F.cosine_similarity(small(noise(9, 8)), model(noise(9, 8))).mean() > 0.99


def never(*a, **k):
    raise AssertionError("the search had begun")


@pytest.mark.parametrize(
    "path, kind",
    [
        ("missing/m.mz", FileNotFoundError),
        ("", OSError),
        (".", OSError),
        ("m.pt", ValueError),
        ("m.safetensors", ValueError),
        ("m.ONNX", ValueError),
        (3.5, TypeError),
        ("a\0b", ValueError),
    ],
)
def test_paths_are_checked_first(path, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "Judge", never)
    with contextlib.chdir(tmp_path):
        with pytest.raises(kind):
            compress(net(), path=path, progress=False)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "wrong",
    [
        dict(seed=1.5),
        dict(seed="0"),
        dict(lr=0),
        dict(lr=math.nan),
        dict(tries=True),
        dict(evaluate=3),
        dict(bytes=math.inf),
        dict(bytes=True),
        dict(recipe=3),
        dict(accuracy_loss=100),
        dict(milliseconds=-1),
        dict(milliseconds=1, example=noise(3, 9)),
        dict(data=3),
        dict(data=[noise(4, 9)]),
        dict(data=[]),
    ],
)
def test_wishes_are_checked_first(wrong, monkeypatch):
    monkeypatch.setattr(auto, "_look", never)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        compress(net(), progress=False, **wrong)


@pytest.mark.parametrize("n", [7, 20, 35, 60, 93])
def test_a_tie_is_a_tie(n):
    for right in range(n + 1):
        for lost in range(0, right + 1):
            floor = right / n - (100 * lost / n) / 100 - 1e-9
            quality = (
                torch.tensor([1.0] * (right - lost) + [0.0] * (n - right + lost), dtype=torch.float64).mean().item()
            )
            assert quality >= floor and quality - 1 / n < floor


def test_exactly_the_loss_that_may_be():
    data = Split(noise(100, 8), torch.zeros(100, dtype=torch.long))
    scores = iter([0.93, *[0.92] * 50])
    assert compress(net(), accuracy_loss=1, evaluate=lambda m: next(scores), tries=1, progress=False)[1].met
    scores = iter([0.93, *[0.9199] * 50])
    with pytest.raises(TargetError):
        compress(net(), accuracy_loss=1, evaluate=lambda m: next(scores), tries=1, progress=False)


# --- recipes


def test_equal_recipes_are_written_alike(tmp_path):
    a, b = Recipe([("gptq", {"bits": 4, "group": None})]), Recipe([["gptq", {"group": None, "bits": 4.0}]])
    assert a == b and hash(a) == hash(b) and fingerprint(a) == fingerprint(b) and a.to_json() == b.to_json()
    for r, f in (a, "a"), (b, "b"):
        file_of(r(net(), [noise(8, 8)]), tmp_path / f, r)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    one, two = (
        Recipe([("gptq", {"overrides": {"0": {"bits": 3}, "*": {"bits": 2}}})]),
        Recipe([("gptq", {"overrides": {"*": {"bits": 2}, "0": {"bits": 3}}})]),
    )
    assert one != two and fingerprint(one) != fingerprint(
        two
    )  # the first pattern that matches wins, so their order is content
    file_of(one(net(), [noise(8, 8)]), tmp_path / "c", one)
    assert Recipe.from_file(tmp_path / "c") == one != two


@settings(max_examples=examples(60), deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["bits", "group", "symmetric"]),
        st.one_of(st.integers(-9, 9), st.floats(-9, 9, allow_nan=False), st.booleans(), st.none()),
    ),
    st.randoms(),
)
def test_equality_hash_and_fingerprint_go_together(how, dice):
    shuffled = list(how.items())
    dice.shuffle(shuffled)
    a = Recipe([("hqq", how)])
    for b in (
        Recipe([("hqq", dict(shuffled))]),
        Recipe.from_json(a.to_json()),
        Recipe([("hqq", {k: float(v) if type(v) is int else v for k, v in how.items()})]),
    ):
        assert a == b and hash(a) == hash(b) and fingerprint(a) == fingerprint(b)


def defined(name, text="return model"):
    space = {"__name__": "somebody", "copy": copy}
    exec(f"def {name}(model, k=1): {text}", space)
    return space[name]


def test_a_step_is_replaced_by_nobody_elses():
    for name in STEPS:
        kept = STEPS[name]
        with pytest.raises(ValueError, match=f"{name!r} already"):
            register_step(defined(name))
        assert STEPS[name] is kept
    for nameless in (lambda model: model, functools.partial(print)):
        with pytest.raises(ValueError, match="by def"):
            register_step(nameless)
    try:
        register_step(defined("mine"))
        register_step(defined("mine", "return copy.copy(model)"))  # a cell, executed again

        def make(k):
            def inner_step(model):
                return model if k else None

            return inner_step

        register_step(make(1))
        register_step(make(1))
        with pytest.raises(ValueError, match="already"):
            register_step(make(2))
    finally:
        STEPS.pop("mine", None)
        STEPS.pop("inner_step", None)


def test_errors_name_the_step_and_the_layer():
    with pytest.raises(ValueError, match="step 2 of the recipe, quantize_model.*0"):
        Recipe(["fold_batchnorm", ("quantize_model", {"overrides": {"0": {"bits": 99}}})])(
            seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).eval()
        )
    try:
        for text, kind in (
            ("raise KeyError('k')", KeyError),
            ("return 3", TypeError),
            ("raise UnicodeDecodeError('utf-8', b'', 0, 1, 'why')", UnicodeDecodeError),
        ):
            register_step(defined("odd", text))
            with pytest.raises(kind) as e:
                Recipe(["odd"])(net())
            assert "step 1 of the recipe, odd" in str(e.value) + "".join(getattr(e.value, "__notes__", []))
    finally:
        STEPS.pop("odd", None)


def test_a_step_may_spoil_what_it_is_given():
    def spoils(model, teacher, batches, data):
        for m in (model, teacher):
            m[0].weight.data.zero_()
            m.seen = 1
            m.train()
        for b in batches:
            b.zero_()
        return model

    register_step(spoils, teacher="teacher", batches="batches", data="train")
    model, data = net(), Split(noise(40, 8), torch.arange(40) % 4)
    try:
        with unchanged(model, data.x, data.y):
            new = Recipe(["spoils"])(model, data)
        assert new is not model and bool((new[0].weight == 0).all())
    finally:
        STEPS.pop("spoils", None)


MATRICES = {
    "LSTM": lambda: nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True),
    "projected": lambda: nn.LSTM(8, 8, proj_size=4),
    "GRU": lambda: nn.GRU(8, 8),
    "RNN": lambda: nn.RNN(8, 8),
    "GRUCell": lambda: nn.GRUCell(8, 8),
    "LSTMCell": lambda: nn.LSTMCell(8, 8),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0),
    "decoder": lambda: nn.Sequential(nn.Linear(8, 8), nn.GRUCell(8, 8)),
}


@pytest.mark.hypothesis
@pytest.mark.parametrize("name", MATRICES)
def test_all_matrices_are_compressed_by_compress_and_recipes(name, tmp_path):
    model, x = (
        seeded(MATRICES[name]).eval(),
        noise(6, 4, 8) if "Cell" not in name and name != "decoder" else noise(12, 8),
    )
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1}
    assert set(tensors_of(model)) == matrices
    with unchanged(model, x):
        ways = {
            "cosine": lambda: compress(model, [x, x + 1, x - 1, x * 2], cosine=0.95, tries=2, progress=False)[0],
            "hqq": lambda: Recipe([("hqq", {"bits": 4, "group": None})])(model),
            "bytes": lambda: compress(model, bytes=0.5, tries=2, strict=False, progress=False)[0],
            "both": lambda: Recipe([("quantize_model", {"bits": 8}), "quantize_others"])(model),
            "others": lambda: quantize_others(model, 8),
        }
        results = turns(list(MATRICES).index(name), ways, 2)
    for how, small in results.items():
        codes_alone(model, small, x)
        left = {n for n, p in small.named_parameters() if p.dim() > 1}
        assert not left or how == "others" and not any("weight_" in n or "in_proj" in n for n in left)


def test_overrides_choose_among_the_matrices():
    model = seeded(lambda: nn.LSTM(4, 8)).eval()
    small = quantize_others(model, 8, overrides={"weight_hh_l0": None})
    assert list(other_matrices(small)) == ["weight_hh_l0"]
    with pytest.raises(ValueError, match="weight_xx"):
        quantize_others(model, overrides={"weight_xx": {"bits": 4}})


# --- nothing of the caller's changes; codes alone run


def compiled(m):
    m.forward = torch.compile(m.forward, backend="eager")


FUNCTIONS = {
    "compress": lambda m, x: compress(m, x, cosine=0.9, tries=2, progress=False)[0],
    "compress, no data": lambda m, x: compress(m, bytes=0.6, tries=2, strict=False, progress=False)[0],
    "compress, time": lambda m, x: compress(m, x, milliseconds=1e5, progress=False)[0],
    "compress, labels": lambda m, x: compress(
        m,
        Split(torch.cat(x), torch.arange(len(x) * len(x[0])) % 4),
        accuracy_loss=90,
        epochs=1,
        tries=1,
        progress=False,
    )[0],
    "recipe": lambda m, x: Recipe([("gptq", {"bits": 6, "group": None})])(m, x),
    "learn": lambda m, x: learn(m, m, Split(torch.cat(x), torch.arange(len(x) * len(x[0])) % 4), epochs=1),
    "output_change": lambda m, x: output_change(m, {n: p + 0.1 for n, p in m.named_parameters() if p.dim() > 1}, x),
    "second_order": lambda m, x: second_order(
        m, {n: 0.1 * p.detach() for n, p in m.named_parameters() if p.dim() > 1}, x
    ),
    "menu_of": lambda m, x: menu_of(m, samples_of(x), DENSE[:3]),
    "judge": lambda m, x: Judge(m, samples_of(x))(m),
    "fingerprint": lambda m, x: fingerprint(m, x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_of_the_callers_stays(name):
    class Streams(nn.Module):
        "With a state that each call moves, a cache made at first use, and dropout."

        def __init__(self):
            super().__init__()
            self.a, self.drop, self.b, self.table = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4), None
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            if self.table is None:
                self.table = torch.ones(4)
            return self.b(self.drop(torch.relu(self.a(x)))) * self.table

    model, x = seeded(Streams), [noise(8, 8, seed=s) for s in range(4)]
    model.a.eval()
    model.b.weight.requires_grad_(False)
    with unchanged(model, x):
        result = FUNCTIONS[name](model, x)
    if isinstance(result, nn.Module):
        codes_alone(model, result.eval(), x[0])


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "fingerprint"])
def test_a_forward_of_the_instance_is_refused(name):
    model, x = net(), [noise(8, 8, seed=s) for s in range(4)]
    compiled(model)
    with pytest.raises(ValueError, match="forward of its own"):
        FUNCTIONS[name](model, x)


def test_without_a_judge_all_files_are_on_the_front(tmp_path):
    got = sweep(plain, {"bits": [2, 4, 8]}, net(8, 64, 4), folder=tmp_path, progress=False)
    sizes = sorted(r.bytes for r in got)
    assert (
        [r.bytes for r in got.front] == sizes
        and got.best().bytes == sizes[-1]
        and got.best(bytes=sizes[1]).bytes == sizes[1]
        and got.best(bytes=1) is None
    )
    assert "*" in repr(got)
    with pytest.raises(ValueError, match="no quality"):
        got.plot()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: nn.Sequential(nn.LazyLinear(4)), "0.weight has no shape"),
        (lambda: net().to("meta"), "meta device"),
        (lambda: nn.Sequential(nn.ReLU()), "nothing to compress"),
    ],
)
def test_models_without_numbers_are_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        compress(make(), [noise(8, 8)], progress=False)


def test_outputs_that_are_minus_infinity_for_all():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 16)

        def forward(self, x):
            return torch.cat([torch.full((len(x), 1), -math.inf), self.a(x)], 1)

    x = [noise(8, 8, seed=s) for s in range(4)]
    with pytest.raises(ValueError, match="infinite"):
        compress(Masked(), x, cosine=0.9, progress=False)
    _, report = compress(Masked(), x, evaluate=lambda m: 1.0, bytes=0.8, tries=2, strict=False, progress=False)
    assert not any(t.error for t in report.tries)
    change = output_change(Masked(), {"a.weight": torch.zeros(16, 8)}, x)["a.weight"]
    assert 0 < change < 10


def test_output_change_and_second_order_name_what_is_unknown():
    for f in (output_change, second_order):
        with pytest.raises(ValueError, match="'9.weight'"):
            f(net(), {"9.weight": torch.zeros(1)}, [noise(4, 8)])


# --- what is random, what is there twice, what grows


class Dice(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = net(8, 16, 3)

    def forward(self, x):
        return self.l(x) + 0.1 * torch.randn(len(x), 3)


def twice(f, *objects):
    with unchanged(*objects):
        one = f()
    torch.rand(3)
    with unchanged(*objects):
        two = f()
    assert one == two
    return one


def tried(model, data, **how):
    _, r = compress(model, data, progress=False, strict=False, tries=2, epochs=1, **how)
    return [(t.why, t.bytes, t.quality, t.error) for t in r.tries]


@pytest.mark.parametrize("case", ["model", "judge", "loader", "labels"])
def test_random_numbers_of_models_judges_and_loaders_begin_anew(case):
    x, y = noise(80, 8), torch.arange(80) % 3
    model = Dice().eval() if case == "model" else net(8, 16, 3)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), 10, shuffle=True
    )  # draws from torch's own generator
    how = dict(evaluate=lambda m: torch.rand(())) if case == "judge" else {}
    data = [x[:40], x[40:]] if case in ("model", "judge") else loader
    if case == "loader":
        how = dict(cosine=0.5)
    twice(lambda: tried(model, data, recipe="int8", **how), model, x, y)


def test_recipes_in_threads():
    data, model = Split(noise(40, 8), torch.arange(40) % 3), nn.Sequential(net(8, 16, 3), nn.Dropout(0.5))
    recipe = Recipe([("learn", {"epochs": 1}), ("quantize_model", {"bits": 4})])
    want = fingerprint(recipe(model, data))
    with unchanged(model, data.x), ThreadPoolExecutor(4) as pool:
        assert {*pool.map(lambda i: fingerprint(recipe(model, data)), range(6))} == {want}


def test_equal_batches_and_equal_examples_are_on_one_side():
    same = noise(4, 8)
    with pytest.raises(ValueError, match="no judge"):
        tried(net(), [same[:1].clone() for _ in range(8)], cosine=0.9)
    s = samples_of([same, same.clone(), noise(4, 8, seed=2), same.clone(), noise(4, 8, seed=3), noise(4, 8, seed=4)])
    assert len(s.batches) == 3 and len(s.held) == 1
    x, y = noise(20, 8).repeat(3, 1), (torch.arange(20) % 2).repeat(3)
    s = samples_of(Split(x, y))
    rows = lambda split: {tuple(r.tolist()) for r in split.x}
    assert not rows(s.train) & rows(s.held) and len(rows(s.train)) == 16 and len(s.held) == 12
    with pytest.raises(ValueError, match="1 are different"):
        samples_of(Split(torch.zeros(20, 8), y[:20]))


@pytest.mark.parametrize("place", range(4))
def test_an_empty_batch_is_none(place):
    batches = [noise(6, 8, seed=s) for s in range(4)]
    assert fingerprint(samples_of([*batches[:place], noise(0, 8), *batches[place:]]).held) == fingerprint(
        samples_of(batches).held
    )
    with pytest.raises(ValueError, match="empty"):
        tried(net(), [noise(0, 8)], bytes=900)


class Past:
    def __init__(self):
        self.rows = []


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = net(8, 16, 3)

    def forward(self, x, past):
        past.rows.append(x)
        return {"logits": self.l(torch.cat(past.rows).mean(0, keepdim=True) + x), "past": past}


def test_objects_in_examples_are_not_written_to():
    from modelzip.measure import macs
    from modelzip.ptq import calibrate, gptq
    from modelzip.prune import prune_model

    model, batches = Remembers().eval(), [{"x": noise(4, 8, seed=s), "past": Past()} for s in range(4)]
    for f in (
        lambda: macs(model, batches[0]),
        lambda: calibrate(model, batches),
        lambda: gptq(model, batches, bits=4),
        lambda: prune_model(model, 0.5, "wanda", batches=batches),
        lambda: tried(model, batches, milliseconds=100, recipe="int8"),
    ):
        f()
        assert all(b["past"].rows == [] for b in batches)
    assert not [t for t in tried(model, batches, recipe="int8") if t[3]]


@pytest.mark.parametrize("score", [None, "0.5", math.inf, -math.inf, torch.rand(2), [1]])
def test_a_judge_says_a_finite_number(score):
    with pytest.raises(ValueError, match="evaluate returned"):
        tried(net(), None, evaluate=lambda m: score, bytes=900)


@pytest.mark.parametrize("score", [93.0, -5.0])
def test_points_are_lost_of_a_share(score):
    with pytest.raises(ValueError, match="share"):
        tried(net(), None, evaluate=lambda m: score, accuracy_loss=1)
    assert tried(net(), None, evaluate=lambda m: score, recipe="int8")


def test_a_time_and_bytes_together_are_searched():
    _, report = compress(
        net(8, 64, 3), [noise(8, 8, seed=s) for s in range(4)], bytes=0.4, milliseconds=1000, progress=False
    )
    assert report.met and report.bytes <= 0.4 * report.baseline_bytes and report.milliseconds


def test_any_real_number_is_a_budget():
    from fractions import Fraction

    assert tried(net(), None, bytes=Fraction(1, 2)) == tried(net(), None, bytes=0.5)


# -- who waits for others holds nothing that they need; what cannot be written is not lost
# --------------------------------------


def within(seconds, work):
    "What `work` returns or raises; a thread that does not come back fails the test."
    done = []

    def run():
        try:
            done.append((work(), None))
        except Exception as e:
            done.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert done, "it waits for ever"
    if done[0][1]:
        raise done[0][1]
    return done[0][0]


def swept(model, folder, threads, evaluate=None):
    x = seeded(lambda: [torch.randn(4, 8) for _ in range(4)])
    with ThreadPoolExecutor(threads) if threads else contextlib.nullcontext() as pool:
        return sweep(
            lambda bits: Recipe([("quantize_model", {"bits": bits})]),
            {"bits": [2, 3, 8]},
            model,
            x,
            executor=pool,
            folder=folder,
            evaluate=evaluate,
            progress=False,
        )


@pytest.mark.parametrize("outer,inner", [("compress", 4), ("sweep of threads", 2), ("judge", 3)])
def test_a_sweep_on_threads_inside_a_judge(outer, inner, tmp_path):
    "It ends, says what one thread says, and its random numbers and the caller's are what they would be."

    def judge_with(threads, folder):
        def judge(model):
            a = torch.rand(1).item()
            found = [r.quality for r in swept(net(8, 5), tmp_path / folder / str(id(model)), threads)]
            return sum(found) / 4 + torch.rand(1).item() / 9 - a / 9

        return judge

    def run(threads, folder):
        judge = judge_with(threads, folder)
        if outer == "compress":
            return [
                t.quality
                for t in compress(net(), None, bytes=0.5, evaluate=judge, progress=False, tries=2, strict=False)[
                    1
                ].tries
            ]
        if outer == "judge":
            return Judge(net(), samples_of(None), judge)(net(8, 3))
        return [r.quality for r in swept(net(), tmp_path / folder, 2 if "threads" in outer else 0, judge)]

    state = torch.random.get_rng_state()
    assert within(60, lambda: run(inner, "a")) == run(0, "b")
    assert torch.equal(state, torch.random.get_rng_state())


def test_threads_of_a_judges_own_that_want_a_turn_are_told():
    def judge(model):
        with ThreadPoolExecutor(2) as pool:
            return sum(
                pool.map(lambda bits: compress(net(8, 3), None, bytes=0.5, progress=False)[1].best.bytes, range(2))
            )

    with pytest.raises(RuntimeError, match="take turns"):
        within(30, lambda: Judge(net(), samples_of(None), judge))
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(ValueError, match="executor is the one that runs this sweep"):
            within(
                30,
                lambda: pool.submit(
                    sweep,
                    lambda bits: [("quantize_model", {"bits": bits})],
                    {"bits": [4]},
                    net(),
                    None,
                    pool,
                    "nowhere",
                ).result(),
            )


def full(monkeypatch, folder):
    "No space is left in a folder."
    real = os.replace

    def replace(a, b):
        if os.fspath(b).startswith(os.fspath(folder)):
            raise OSError(28, "No space left on device")
        return real(a, b)

    monkeypatch.setattr(os, "replace", replace)


def test_a_full_disk_at_the_end_of_a_search(tmp_path, monkeypatch):
    import pickle

    x, m = seeded(lambda: [torch.randn(4, 8) for _ in range(4)]), net()
    want, report = compress(m, x, cosine=0.9, progress=False)
    full(monkeypatch, tmp_path / "full")
    (tmp_path / "full").mkdir()
    with pytest.raises(auto.WriteError, match="No space left on device; nothing is lost") as e:
        compress(m, x, cosine=0.9, progress=False, path=tmp_path / "full/m.mz")
    assert (
        e.value.errno == 28
        and e.value.filename == os.fspath(tmp_path / "full/m.mz")
        and not os.listdir(tmp_path / "full")
    )
    model, said = e.value.result
    assert torch.equal(model(x[0]), want(x[0])) and said.best.bytes == len(e.value.content) == report.best.bytes
    (tmp_path / "m.mz").write_bytes(e.value.content)
    assert torch.equal(load(tmp_path / "m.mz", net())(x[0]), want(x[0]))
    assert pickle.loads(pickle.dumps(e.value)).content == e.value.content


def test_a_full_disk_in_a_sweep(tmp_path, monkeypatch):
    want = swept(net(), tmp_path / "a", 0)
    full(monkeypatch, tmp_path / "b")
    with pytest.warns(UserWarning, match="cannot be written to .*No space left"):
        found = swept(net(), tmp_path / "b", 0)
    for r, w in zip(found, want):
        assert (
            (r.bytes, r.quality, r.error) == (w.bytes, w.quality, None)
            and r.content == want.file(w).read_bytes()
            and w.content is None
        )
    assert found.front == found.front and not os.listdir(tmp_path / "b")
