"Allocation against brute force, and `compress` on models that it has never seen."

import itertools, math

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
from torch import nn

from guards import turns
from modelzip.auto import (
    DENSE,
    Recipe,
    TargetError,
    allocate,
    compress,
    greedy,
    lower_hull,
    menu_of,
    output_change,
    second_order,
    waterfill,
)
from modelzip.data import accuracy, digits, train
from modelzip.pack import inspect, load, save
from modelzip.budget import knapsack
from modelzip.recipe import Judge, fingerprint, samples_of
from modelzip.workshop import menu as menus_of_models, search
from modelzip.workshop.allocation import branch_and_bound

rng = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("fewer_choices")


# --- allocation


def test_waterfill_against_an_optimizer():
    for _ in range(5):
        c, n = rng.random(4) ** 4 + 1e-4, rng.integers(1, 30, 4).astype(float)
        budget = float(rng.uniform(0.3, 4) * n.sum())
        ours = waterfill(c, n, budget).numpy()
        found = scipy.optimize.minimize(
            lambda b: (n * c * 4.0**-b).sum(),
            np.full(4, budget / n.sum()),
            bounds=[(0, None)] * 4,
            constraints={"type": "eq", "fun": lambda b: (n * b).sum() - budget},
            method="SLSQP",
            options=dict(ftol=1e-14, maxiter=500),
        )
        assert (n * ours).sum() == pytest.approx(budget)
        assert (n * c * 4.0**-ours).sum() <= found.fun * (1 + 1e-6)
        wet = ours > 0
        slopes = c * 4.0**-ours
        assert np.allclose(slopes[wet], slopes[wet][0]) and (c[~wet] <= slopes[wet][0] * (1 + 1e-9)).all()


@pytest.mark.parametrize("wrong", [([1.0], [1, 2], 3), ([-1.0], [1], 3), ([1.0], [0], 3)])
def test_waterfill_refuses(wrong):
    with pytest.raises(ValueError):
        waterfill(*wrong)


def cost(table, picks):
    return sum(row[o] for row, o in zip(table, picks))


def menus(layers, options):
    R = np.sort(rng.integers(1, 60, (layers, options)), 1).astype(float)
    return R.tolist(), (-np.sort(-rng.random((layers, options)), 1)).tolist()


def test_allocation_against_exhaustive_search_and_the_linear_bound():
    for _ in range(15):
        R, D = menus(4, 5)
        every = [(cost(R, p), cost(D, p)) for p in itertools.product(range(5), repeat=4)]
        for budget in np.linspace(sum(r[0] for r in R), sum(r[-1] for r in R), 12):
            best = min(e for b, e in every if b <= budget)
            relaxed = scipy.optimize.linprog(
                np.ravel(D), A_ub=[np.ravel(R)], b_ub=[budget], A_eq=np.kron(np.eye(4), np.ones(5)), b_eq=np.ones(4)
            ).fun
            step = max(
                (D[i][a] - D[i][b] for i in range(4) for h in [lower_hull(R[i], D[i])] for a, b in zip(h, h[1:])),
                default=0,
            )
            for method, more in (greedy, step), (allocate, 0):
                picks = method(R, D, budget)
                assert cost(R, picks) <= budget and relaxed - 1e-7 <= best <= cost(D, picks) + 1e-12
                assert cost(D, picks) <= best + more + 1e-12


def test_greedy_is_optimal_where_a_step_ends():
    R, D = menus(4, 6)
    hulls = [lower_hull(r, d) for r, d in zip(R, D)]
    steps = sorted(
        ((D[i][b] - D[i][a]) / (R[i][b] - R[i][a]), R[i][b] - R[i][a])
        for i, h in enumerate(hulls)
        for a, b in zip(h, h[1:])
    )
    every = [(cost(R, p), cost(D, p)) for p in itertools.product(range(6), repeat=4)]
    budget = sum(R[i][h[0]] for i, h in enumerate(hulls))
    for _, more in steps:
        budget += more
        assert cost(D, greedy(R, D, budget)) == pytest.approx(min(e for b, e in every if b <= budget), abs=1e-12)


def test_allocation_of_many_layers_comes_near_the_linear_bound():
    R, D = [(np.array(r) * 1000 + rng.random()).tolist() for r in menus(60, 8)[0]], menus(60, 8)[1]
    for budget in np.linspace(1.1 * sum(r[0] for r in R), 0.9 * sum(r[-1] for r in R), 4):
        picks = allocate(R, D, budget)
        relaxed = scipy.optimize.linprog(
            np.ravel(D), A_ub=[np.ravel(R)], b_ub=[budget], A_eq=np.kron(np.eye(60), np.ones(8)), b_eq=np.ones(60)
        ).fun
        assert cost(R, picks) <= budget and relaxed <= cost(D, picks) + 1e-7 and cost(D, picks) < relaxed + 0.5


def test_allocation_refuses_too_little():
    with pytest.raises(ValueError, match="smallest"):
        allocate([[5, 6]], [[1, 0]], 4)


def test_options_that_are_not_on_offer_are_never_taken():
    assert allocate([[5, math.inf, 6]], [[1, 0, 0.5]], 1e9) == [2]


# --- sensitivity


def test_second_order_is_exact_for_linear_layers():
    torch.manual_seed(0)
    layer, x, delta = (
        nn.Linear(6, 3),
        torch.randn(4, 6),
        {"weight": 0.1 * torch.randn(3, 6), "bias": 0.1 * torch.randn(3)},
    )
    for n, d in delta.items():
        exact = output_change(layer, {n: layer.get_parameter(n).detach() + d}, [x])[n]
        assert second_order(layer, {n: d}, [x], probes=3000)[n] == pytest.approx(exact, rel=0.15)


def test_second_order_agrees_with_what_is_measured_for_small_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 5))
    x = torch.randn(40, 10)
    delta = {n: 0.003 * torch.randn_like(p) for n, p in model.named_parameters() if p.dim() > 1}
    measured = output_change(model, {n: model.get_parameter(n).detach() + d for n, d in delta.items()}, [x])
    predicted = second_order(model, delta, x.split(10), probes=200)
    for n in delta:
        assert predicted[n] == pytest.approx(measured[n], rel=0.3)


def test_a_layer_that_the_output_does_not_need_gets_the_cheapest():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    menu = menu_of(Net().eval(), samples_of([torch.randn(64, 32)]), DENSE)
    picks = dict(zip(menu.layers, menu.pick(2 * min(map(min, menu.bytes)) + 600)))
    sizes = dict(zip(menu.layers, menu.bytes))
    assert (
        sizes["unused.weight"][picks["unused.weight"]] == min(sizes["unused.weight"])
        and menu.sensitivity["unused.weight"] == 0
    )
    assert menu.options[picks["used.weight"]]["bits"] > menu.options[picks["unused.weight"]]["bits"]


@pytest.mark.parametrize("option", [{"bits": 3}, {"bits": 2, "group": 64}, {"bits": 4, "sparsity": 0.8}])
def test_a_menu_says_what_a_file_takes(option, tmp_path):
    for make in Residual, Language:
        model = make().eval()
        new = menus_of_models._all_with(model, option)
        taken = {line.name: line.bytes for line in inspect(save(new, tmp_path / "m.mz")).lines}
        menu = menu_of(model, samples_of(None), [option])
        offered = {n: b for n, (b,) in zip(menu.layers, menu.bytes) if b < math.inf}
        assert offered and all(taken[n] == b for n, b in offered.items())
        assert "sparsity" in option or len(offered) == len(menu.layers)


# --- models of all kinds


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na, self.b, self.nb = (
            nn.Conv2d(1, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
        )
        self.out = nn.Linear(12 * 16, 10)

    def forward(self, x):
        x = F.relu(self.na(self.a(x)))
        return self.out(F.max_pool2d(x + F.relu(self.nb(self.b(x))), 2).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 24, batch_first=True, bidirectional=True), nn.Linear(48, 10)

    def forward(self, x):
        return self.out(self.lstm(x.flatten(1).unflatten(1, (8, 8)))[0].mean(1))


class Language(nn.Module):
    "A transformer whose first and last layer share their weight."

    def __init__(self):
        super().__init__()
        self.words, self.body = (
            nn.Embedding(60, 32),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 1),
        )
        self.out = nn.Linear(32, 60, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids):
        return self.out(self.body(self.words(ids)))


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.EmbeddingBag(300, 32), nn.Linear(32, 16)

    def forward(self, ids):
        return F.normalize(self.out(self.words(ids)), dim=-1)


def batches(shape, n=4, ids=None):
    return [torch.randint(0, ids, shape) if ids else torch.randn(shape) for _ in range(n)]


MODELS = {
    "residual with BatchNorm": (Residual, lambda: batches((16, 1, 8, 8))),
    "LSTM": (Recurrent, lambda: batches((16, 1, 8, 8))),
    "tied transformer": (Language, lambda: batches((8, 6), ids=60)),
    "embedding bag": (Embedder, lambda: batches((16, 5), ids=300)),
    "GRU alone": (lambda: nn.GRU(8, 32, batch_first=True), lambda: batches((8, 5, 8))),
    "transposed convolutions": (
        lambda: nn.Sequential(nn.ConvTranspose2d(8, 16, 4, stride=2), nn.ReLU(), nn.Conv2d(16, 8, 3)),
        lambda: batches((4, 8, 5, 5)),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 32, 3, groups=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, groups=32),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 8),
        ),
        lambda: batches((8, 3, 8, 8)),
    ),
}


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (a, b))))


@pytest.mark.hypothesis  # `make fuzz` comes here, with all choices
@pytest.mark.parametrize("name", MODELS)
def test_a_target_alone(name, tmp_path):
    torch.manual_seed(0)
    make, some = MODELS[name]
    model, some = make().eval(), some()
    before = fingerprint(model)
    _, plain = compress(model, progress=False)  # 8 bits, when nothing is said
    assert plain.bytes < 0.5 * plain.baseline_bytes
    wish, path = int(0.75 * plain.bytes), tmp_path / "m.mz"

    def of_bytes(data):
        small, report = compress(model, data, bytes=wish, path=path, progress=False)
        assert report.bytes == path.stat().st_size <= wish and report.met
        back = load(path, small if "BatchNorm" in repr(model) else model)  # BatchNorms are folded into other layers
        with torch.no_grad():
            assert same(back(some[0]), small(some[0]))

    def of_closeness():
        small, report = compress(model, some, cosine=0.98, progress=False)
        assert report.quality >= 0.98 and report.bytes < plain.bytes
        assert report.quality == pytest.approx(Judge(model, samples_of(some))(small), abs=1e-5)

    ways = {"bytes": lambda: of_bytes(None), "bytes, with data": lambda: of_bytes(some), "cosine": of_closeness}
    turns([*MODELS].index(name), ways, 1)
    assert fingerprint(model) == before


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def trained(data):
    return train(Residual(), data.train, epochs=6, lr=5e-3, progress=False)


def test_labels_allow_more(trained, data, tmp_path):
    path, data = tmp_path / "m.mz", type(data)(data.train[:300], data.valid, None)
    small, report = compress(trained, data, accuracy_loss=1.5, epochs=1, tries=2, path=path, progress=False)
    assert report.metric == "accuracy" and report.bytes == path.stat().st_size
    assert report.quality >= report.baseline - 0.015
    assert report.quality == pytest.approx(accuracy(small, data.valid), abs=1e-6) and accuracy(
        small, data.valid
    ) == accuracy(load(path, small), data.valid)
    assert report.bytes < report.tries[0].bytes  # int8
    again = tmp_path / "again.mz"
    compress(trained, data, recipe=Recipe.from_file(path), path=again, progress=False)
    assert again.read_bytes() == path.read_bytes()


def test_bytes_with_labels(trained, data):
    small, report = compress(trained, data.train[:500], bytes=2_800, epochs=1, tries=2, progress=False)
    assert report.met and report.bytes <= 2_800 and report.quality > 0.5


def test_labelled_batches_are_recognized(trained, data):
    loader = [(data.train.x[i : i + 50], data.train.y[i : i + 50]) for i in range(0, 200, 50)]
    assert compress(trained, loader, progress=False)[1].metric == "accuracy"
    assert compress(trained, [b[:1] for b in loader], progress=False)[1].metric == "cosine"


def test_choosing_beats_the_same_bits_for_all(monkeypatch):
    monkeypatch.setattr(search, "DENSE", DENSE)  # all that there is
    monkeypatch.setattr(search, "SPACED", menus_of_models.SPACED)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16)).eval()
    x = [torch.randn(100, 64) for _ in range(8)]
    _, uniform = compress(model, x, recipe=Recipe([("gptq", {"bits": 3, "group": None})]), progress=False)
    _, chosen = compress(model, x, bytes=uniform.bytes, progress=False)
    assert chosen.bytes <= uniform.bytes and chosen.quality >= uniform.quality


def test_milliseconds(trained, data):
    _, report = compress(trained, [data.train.x[:64]], milliseconds=1e4, progress=False)
    assert report.milliseconds < 1e4 and report.met
    with pytest.raises(TargetError) as e:
        compress(trained, [data.train.x[:64]], milliseconds=1e-6, progress=False)
    assert len(e.value.report.tries) >= 2 and "ms" in str(e.value)


def test_your_own_measure(trained, data):
    calls = []

    def mine(m):
        calls.append(1)
        return accuracy(m, data.valid)

    _, report = compress(trained, [data.train.x[:64]], accuracy_loss=3, evaluate=mine, tries=4, progress=False)
    assert report.metric == "score" and report.quality >= report.baseline - 0.03 and len(calls) == 1 + len(report.tries)


def test_a_target_that_cannot_be_met(trained):
    with pytest.raises(TargetError, match="nearest") as e:
        compress(trained, bytes=500, progress=False)
    assert not e.value.report.met
    small, report = compress(trained, bytes=500, strict=False, progress=False)
    assert not report.met and report.bytes == min(t.bytes for t in report.tries)


def test_the_report_can_be_argued_with(trained, data):
    _, report = compress(trained, [data.train.x[:200]], bytes=0.15, progress=False)
    text, page = repr(report), report._repr_html_()
    for t in report.tries:
        assert f"{t.bytes:,}" in text and f"{t.bytes:,}" in page
    for r in report.layers:
        assert r["name"] in text
    assert sum(r["bytes"] for r in report.layers) == report.bytes
    assert sum(r["share"] or 0 for r in report.layers) == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(accuracy_loss=1), "labels"),
        (dict(cosine=0.9), "needs data"),
        (dict(milliseconds=3), "example"),
        (dict(bytes=-1), "bytes is -1"),
        (dict(bytes="3 kB"), "bytes is '3 kB'"),
        (dict(bytes=float("nan")), "bytes"),
        (dict(recipe="magic"), "'magic'"),
        (dict(recipe=[1]), "Recipe"),
        (dict(epochs=0), "epochs"),
        (dict(data=torch.zeros(3)), "batches"),
        (dict(data=[]), "empty"),
        (dict(data=[torch.randn(8, 1, 8, 8)], cosine=1.5), "cosine is 1.5"),
        (dict(data=[torch.randn(8, 1, 8, 8)], cosine=0.9, accuracy_loss=1), "give one"),
    ],
)
def test_wrong_wishes(trained, arguments, says):
    with pytest.raises((ValueError, TypeError), match=says):
        compress(trained, progress=False, **arguments)


def test_wrong_models():
    with pytest.raises(ValueError, match="nothing to compress"):
        compress(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))
    with pytest.raises(TypeError, match="nn.Module"):
        compress(3)
    bad = nn.Linear(4, 4)
    bad.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinite values in weight"):
        compress(bad)


@pytest.mark.parametrize("method", [greedy, knapsack, branch_and_bound, allocate])
def test_lists_of_different_lengths_are_counted(method):
    for budget in (0, 10, math.inf):
        with pytest.raises(ValueError, match="bytes has 2 layers, errors has 1"):
            method([[1], [2]], [[1.0]], budget)
        with pytest.raises(ValueError, match="bytes has 2 options for number 1 of the layers, errors has 1"):
            method([[1], [2, 3]], [[1.0], [1.0]], budget)
