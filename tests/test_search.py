"""What a search computes once: one calibration, each tensor once at each width, sizes without files, changes without
running the beginning of a model again; and that the same comes out as without these savings."""

import collections

import pytest
import torch
import torch.nn.functional as F
from guards import unchanged
from torch import nn

from modelzip.auto import DENSE, Target, compress, menu_of
from modelzip.budget import output_errors
from modelzip.data import seeded
from modelzip.pack import inspect, load, save
from modelzip.prune import prune_model, remove_masks, sparsify_model
from modelzip.ptq import gptq, nearest_weight, quantize_with
from modelzip.quant import Dequantize, dequantize_model, quantize_model
from modelzip.recipe import Judge, Recipe, samples_of
from modelzip.workshop import menu as menus, widths
from modelzip.workshop.matrices import identity_of
from modelzip.workshop.menu import ANCHORS, SPACED, tensors_of
from modelzip.workshop.sensitivities import changes_of
from modelzip.workshop.sizes import EXACT, sizes_of
from modelzip.workshop.widths import in_turns, widths_of

pytestmark = pytest.mark.usefixtures("fewer_choices")


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chain(width=24, depth=4):
    with seeded(0):
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
        return nn.Sequential(*blocks, nn.Linear(width, 6)).eval()


def batches(*shape, n=8):
    return [noise(*shape, seed=s) for s in range(n)]


# --- sizes


@pytest.mark.parametrize("how", [{"bits": 2}, {"bits": 3, "group": 64}, {"bits": 5}, {"bits": 8}, {"levels": 3}])
def test_sizes_are_those_of_files(how, tmp_path):
    "Small tensors exactly, large ones to within a percent; tied ones count once."
    with seeded(0):
        model = nn.Sequential(nn.Linear(40, 30), nn.Linear(640, 1700), nn.Linear(30, 40))
        model[2].weight = nn.Parameter(model[0].weight.detach().t().contiguous())
        model[1].weight.data *= noise(1700, 1).exp()  # rows of different sizes
    assert model[1].weight.numel() > 4 * EXACT
    small = quantize_model(model, **how)
    taken = {line.name: line.bytes for line in inspect(save(small, tmp_path / "m.mz"), entropy=False).lines}
    sizes = sizes_of(small, tensors_of(model))
    assert sizes["0.weight"] == taken["0.weight"] and sizes["2.weight"] == taken["2.weight"]
    assert sizes["1.weight"] == pytest.approx(taken["1.weight"], rel=0.01)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_sizes_of_sparse_tensors_are_those_of_files(share, tmp_path):
    with seeded(0):
        model = nn.Sequential(nn.Linear(700, 900))
    pruned = remove_masks(prune_model(model, share, scope="layer"))
    for small in quantize_model(pruned, 3), sparsify_model(quantize_with(nearest_weight, pruned, bits=4, group=None)):
        taken = {line.name: line.bytes for line in inspect(save(small, tmp_path / "m.mz"), entropy=False).lines}
        assert sizes_of(small, ["0.weight"])["0.weight"] == pytest.approx(taken["0.weight"], rel=0.01)


def test_sizes_of_constant_tensors_are_coded(tmp_path):
    model = nn.Sequential(nn.Linear(1000, 1000))
    model[0].weight.data.fill_(0.5)
    small = quantize_model(model, 4)
    taken = {line.name: line.bytes for line in inspect(save(small, tmp_path / "m.mz"), entropy=False).lines}
    assert sizes_of(small, ["0.weight"])["0.weight"] == taken["0.weight"]


# --- each tensor once


def counted_methods(monkeypatch):
    "How often a weight is quantized at a width, by either method."
    counts = collections.Counter()

    def counting(method):
        def once(weight, statistics, **how):
            counts[identity_of(weight), how.get("bits"), how["group"], how.get("spacing")] += 1
            return method(weight, statistics, **how)

        return once

    methods = {k: (counting(method), how) for k, (method, how) in widths.METHODS.items()}
    monkeypatch.setattr(widths, "METHODS", methods)
    return counts


@pytest.mark.parametrize("data, large", [(True, True), (True, False), (False, False)])
def test_a_tensor_is_quantized_once_at_a_width(data, large, monkeypatch):
    counts, model, options = counted_methods(monkeypatch), chain(), SPACED if data else DENSE
    if large:
        monkeypatch.setattr(menus, "SMALL", 0)
    menu_of(model, samples_of(batches(10, 24) if data else None), options)
    made = len(ANCHORS if large else options) * len(tensors_of(model))  # steps between are told from these
    assert set(counts.values()) == {1} and len(counts) == made


def test_a_search_calibrates_once_and_quantizes_once(monkeypatch):
    counts, runs, real = counted_methods(monkeypatch), [], widths.moments_of
    monkeypatch.setattr(widths, "moments_of", lambda *a: runs.append(1) or real(*a))
    _, report = compress(chain(), batches(30, 24), cosine=0.995, progress=False)
    assert report.met and len(runs) == 1 and set(counts.values()) == {1}


def test_turns_hold_what_fits_and_change_nothing(monkeypatch):
    model, x, choices = chain(), batches(10, 24, n=2), [{"bits": 3}, {"bits": 4, "group": 8}]
    at_once, runs, real = widths_of(model, choices, x), [], widths.moments_of
    monkeypatch.setattr(widths, "moments_of", lambda *a: runs.append(set(a[2])) or real(*a))
    monkeypatch.setattr(widths, "ROOM", 0)
    monkeypatch.setattr(widths, "moment_bytes", lambda m: 10**9)
    in_five = widths_of(model, choices, x)
    assert len(runs) == 5 and set.union(*runs) == {"0.0", "1.0", "2.0", "3.0", "4"}
    for one, other in zip(at_once.jobs, in_five.jobs):
        assert all(one.packed[t].q == other.packed[t].q for t in one.ties)
    assert at_once.wrong == in_five.wrong


def test_what_waits_is_made_when_it_is_asked_for():
    "Where second moments cannot be kept, all is made at once; the same in the end."
    model, x, choices = chain(), batches(10, 24, n=2), [{"spacing": s} for s in (1.0, 0.5, 0.3)]
    waiting = widths_of(model, choices, x, later=[0, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widths, "ROOM", 0)
        patch.setattr(widths, "moment_bytes", lambda m: 10**9)
        at_once = widths_of(model, choices, x, later=[0, 2])
    assert [len(job.packed) for job in waiting.jobs] == [0, 5, 0] and {len(job.packed) for job in at_once.jobs} == {5}
    for tie in waiting.jobs[0].ties:
        for i, _ in enumerate(choices):
            assert waiting.packed(i, tie) == at_once.packed(i, tie) and waiting.error(i, tie) == at_once.error(i, tie)


def test_what_is_told_between_anchors_is_nearly_what_is_made():
    "Bytes within some percent, errors within a few tenths of a decibel of what quantizing gives."
    with seeded(0):
        model = nn.Sequential(nn.Linear(300, 450), nn.Tanh(), nn.Linear(450, 300)).eval()
        for m in model[0], model[2]:
            nn.init.normal_(m.weight, std=0.05)
    x = batches(40, 300, n=6)
    menu = menu_of(model, samples_of(x), SPACED)
    parts = widths_of(model, SPACED, samples_of(x).batches)
    for i, option in enumerate(SPACED[:8]):
        sizes = sizes_of(parts.put_together(dict.fromkeys(parts.jobs[i].ties, i)), tensors_of(model))
        for n, told in zip(menu.layers, menu.bytes):
            assert told[i] == pytest.approx(sizes[n], rel=0.03), (option, n)
    for n, told in zip(menu.layers, menu.errors):
        assert told == sorted(told, reverse=True), n


def test_turns_are_full():
    ties = {(i,): [nn.Linear(4, 4)] for i in range(5)}
    sizes = iter([30, 30, 50, 200, 10])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widths, "moment_bytes", lambda m: next(sizes))
        assert list(in_turns(ties, {t: ["one"] for t in ties}, 100)) == [[(0,), (1,)], [(2,)], [(3,)], [(4,)]]


def test_data_that_reach_nothing_are_refused():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(3, 3)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="no row to any layer"):
        widths_of(Idle(), [{"bits": 4}], [noise(2, 3)])


def test_tables_alone_need_no_rows():
    with seeded(0):
        model = nn.EmbeddingBag(50, 8).eval()
    ids = [torch.randint(0, 50, (6, 4), generator=torch.Generator().manual_seed(s)) for s in range(4)]
    menu = menu_of(model, samples_of(ids), DENSE[:4])
    assert all(e > 0 for e in menu.errors[0])


# --- what a sketch is


def test_a_sketch_has_the_parts_that_were_picked():
    model, x = chain(), batches(20, 24)
    menu = menu_of(model, samples_of(x), DENSE + SPACED[:2])
    picks = [(3 * i + 4) % len(menu.options) for i, _ in enumerate(menu.layers)]
    with unchanged(model):
        sketch = menu.sketch(picks)
    for n, p in zip(menu.layers, picks):
        q, option = sketch.get_submodule(n.removesuffix(".weight")).q, menu.options[p]
        assert q.group == option.get("group") and ("spacing" in option or q.bits == option["bits"])
    judge = Judge(model, samples_of(x))
    best, worst = ([row.index(f(row)) for row in menu.errors] for f in (min, max))
    assert judge(dequantize_model(menu.sketch(best))) > judge(dequantize_model(menu.sketch(worst)))


def test_a_report_holds_no_parts():
    _, report = compress(chain(), batches(20, 24), cosine=0.99, progress=False)
    assert report.best.menu is None or report.best.menu.parts is None
    menu = next(t.menu for t in report.tries if t.menu is not None)
    with pytest.raises(ValueError, match="no parts"):
        menu.sketch([0] * len(menu.layers))


# --- the search


@pytest.mark.parametrize("cosine", [0.95, 0.99, 0.999])
def test_few_tries_come_near_a_cosine(cosine):
    "The next smaller budgets would not do: the file is within some percent of the smallest that does."
    model = chain(48, 3)
    _, report = compress(model, batches(60, 48), cosine=cosine, progress=False)
    assert report.met and len(report.tries) <= 6
    failed = [t for t in report.tries if t.quality < cosine]
    assert all(t.bytes < report.bytes for t in failed)


@pytest.mark.parametrize("wish", [{"cosine": 0.99}, {"bytes": 0.2}])
def test_equal_seeds_equal_files(wish, tmp_path):
    for name in "ab":
        compress(chain(), batches(20, 24), **wish, seed=3, path=tmp_path / name, progress=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_recipe_of_a_found_file_makes_it_again(tmp_path):
    model, x = chain(), batches(20, 24)
    compress(model, x, cosine=0.99, path=tmp_path / "a.mz", progress=False)
    compress(model, x, recipe=Recipe.from_file(tmp_path / "a.mz"), path=tmp_path / "b.mz", progress=False)
    assert (tmp_path / "a.mz").read_bytes() == (tmp_path / "b.mz").read_bytes()


# --- along trellises


@pytest.mark.parametrize("name, wish", [("LSTM", {"cosine": 0.99}), ("shared", {"bytes": 0.6})])
@pytest.mark.filterwarnings("ignore:rounded to nearest|given to trellis_weight")  # a layer that nobody calls
def test_a_trellis_is_tried_and_the_better_file_kept(name, wish, tmp_path):
    make, data = MODELS[name]
    with seeded(0):
        model = make().eval()
    x, paths = data() * 2, [tmp_path / "a.mz", tmp_path / "b.mz"]
    with unchanged(model, x):
        small, report = compress(model, x, **wish, trellis=True, strict=False, path=paths[0], progress=False)
    assert not any(t.error for t in report.tries)
    worth = {w: max(report.target.worth(t) for t in report.tries if (t.trellis is None) == w) for w in (True, False)}
    assert max(worth.values()) == report.target.worth(report.best)
    assert report.quality == Judge(model, samples_of(x))(small) and report.bytes == paths[0].stat().st_size
    compress(model, x, recipe=Recipe.from_file(paths[0]), path=paths[1], progress=False)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("wish", [{"cosine": 0.97}, {"bytes": 27_000}])
def test_trellises_take_fewer_bytes_or_do_less_harm(wish):
    "One large matrix: the factor of its steps is found in few tries, to within some percent of the wish."
    model = nn.Sequential(nn.Linear(256, 400))
    model[0].weight.data = noise(400, 256)
    x = [noise(100, 256, seed=s) for s in range(6)]
    small, report = compress(model, x, **wish, trellis=True, progress=False)
    rounded, along = ([t for t in report.tries[1:] if (t.trellis is None) == w] for w in (True, False))
    best = max((t for t in rounded if report.target.met_by(t)), key=report.target.worth)
    assert report.best in along and len(along) <= 4 and "trellis, spacing" in repr(report)
    if "bytes" in wish:
        assert 0.97 * wish["bytes"] < report.bytes and 1 - report.quality < 0.8 * (1 - best.quality)
    else:
        assert report.bytes < 0.95 * best.bytes and report.quality < 0.9725


def test_rounding_goes_on_where_trellises_are_no_smaller():
    "Tables of classes take more than a trellis gains: the file is what it is without one, and nothing is tried twice."
    model, x = chain(), batches(20, 24)
    plain, report = (compress(model, x, cosine=0.99, trellis=t, progress=False)[1] for t in (False, True))
    assert report.best.trellis is None and report.bytes == plain.bytes
    assert len({t.why for t in report.tries}) == len(report.tries)
    first = [t.trellis is None for t in report.tries].index(False)
    assert [t.why for t in report.tries if t.trellis is None] == [t.why for t in plain.tries] and first == 2


def norm(m):
    return m[-1].weight.square().mean().clamp(0, 1).item()


@pytest.mark.parametrize("judge, data", [(None, False), (norm, False), (lambda m: 0.5, True)])
def test_trellises_with_any_judge(judge, data):
    "With none; without data; with a measure that sees nothing."
    wish = {"bytes": 0.6} if judge is None else {"accuracy_loss": 1.0}
    x = batches(6, 16) if data else None
    _, report = compress(chain(16, 1), x, **wish, evaluate=judge, trellis=True, progress=False)
    assert report.met and not any(t.error for t in report.tries)
    assert 0 < sum(t.trellis is not None for t in report.tries) <= 4


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"trellis": 1, "bytes": 900}, "trellis is 1"),
        ({"trellis": True}, "trellis needs bytes"),
        ({"trellis": True, "milliseconds": 9.0}, "trellis needs bytes"),
        ({"trellis": True, "bytes": 0.3, "recipe": "4-bit"}, "both given"),
    ],
)
def test_a_trellis_that_would_not_be_tried_is_refused(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        compress(chain(), batches(10, 24), progress=False, **wrong)


# --- numbers of any size


@pytest.mark.parametrize("power", [-80, -40, 60, 80])
def test_what_the_output_makes_of_a_tensor_knows_no_unit(power):
    "Squares of such outputs are zero or infinite in float32."
    model, x = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)), batches(5, 6, n=2)
    model[0].weight.data, model[2].weight.data = noise(8, 6), noise(4, 8, seed=2)
    plain = output_errors(model, {n: 1.25 * p for n, p in model.named_parameters()}, x)
    model[2].weight.data *= 2.0**power
    new = {n: 1.25 * p.detach() for n, p in model.named_parameters()}
    got = changes_of(model, {identity_of(model.get_parameter(n)): [v] for n, v in new.items()}, x)
    for n, v in output_errors(model, new, x).items():
        assert v == pytest.approx(plain[n], rel=1e-6) == got[identity_of(model.get_parameter(n))][0], n


def outlier(width=16):
    with seeded(0):
        model = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 4))
    model[0].weight.data[0, 0] = 1e4
    return model.eval()


def test_sizes_of_small_tensors_are_never_told():
    "One weight far from all others: more codes and then fewer bytes, as small parts are not coded."
    model, x = outlier(), batches(20, 16)
    menu, options = menu_of(model, samples_of(x), SPACED), range(len(SPACED))
    parts = widths_of(model, SPACED, samples_of(x).batches)
    for i in options:
        sizes = sizes_of(parts.put_together(dict.fromkeys(parts.jobs[i].ties, i)), tensors_of(model))
        assert [row[i] for row in menu.bytes] == [sizes[n] for n in menu.layers], SPACED[i]
    _, report = compress(model, x, cosine=0.99, progress=False)
    assert report.bytes < report.tries[0].bytes  # int8


def test_a_large_outlier_has_no_size_that_no_file_has(tmp_path):
    model, x = outlier(600), batches(6, 600)
    model[0] = nn.Linear(600, 500)
    model[0].weight.data[0, 0], model[2] = 1e3, nn.Linear(500, 4)
    menu = menu_of(model.eval(), samples_of(x), SPACED)
    least, most = (f(b for b in menu.bytes[0]) for f in (min, max))
    assert 0 < least and menu.bytes[0][-1] == pytest.approx(most, rel=0.2) and most < 300_000


@pytest.mark.parametrize(
    "cosine, said", [(0.9, "0.9000"), (0.9999, "0.99990"), (0.9999954, "0.9999954"), (1.0, "1.0000")]
)
def test_a_cosine_near_one_is_told_from_one(cosine, said):
    assert repr(Target(quality=cosine, metric="cosine")) == f"cosine of at least {said}"


# --- one step for the whole tensor


SPACED_MODELS = ("chain", "LSTM", "encoder", "convolutions")


@pytest.mark.filterwarnings("ignore:rounded to nearest")  # a ConvTranspose2d, of which nothing is known
@pytest.mark.parametrize("name", SPACED_MODELS)
def test_a_step_for_the_tensor_goes_everywhere(name, tmp_path):
    "Through GPTQ and a file, and half a step is the most that a weight is off where nothing makes up for another."
    make, data = MODELS[name]
    with seeded(0):
        model = make().eval()
    x = data()
    small = gptq(model, x, spacing=0.1)
    back = load(save(small, tmp_path / "m.mz"), model)
    answer = lambda m: (y[0] if isinstance(y := m(x[0]), tuple) else y).detach().flatten()
    assert torch.equal(answer(back), answer(small))
    assert F.cosine_similarity(answer(small), answer(model), dim=0) > 0.98
    plain = dict(model.named_parameters())
    for n, q in ((n, nearest_weight(p.detach(), spacing=0.1)) for n, p in plain.items() if p.dim() > 1):
        w = plain[n].detach()
        assert q.scale.unique().numel() == 1 and (q.dequantize() - w).abs().max() <= 0.5001 * q.scale.max()
        assert q.scale.max() == pytest.approx(0.1 * w.square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("bits, spacing", [(2, 1.3), (3, 0.65), (4, 0.35)])
def test_a_step_for_the_tensor_has_less_error_for_its_bytes(bits, spacing):
    model = nn.Sequential(nn.Linear(400, 600))
    model[0].weight.data = noise(600, 400)
    x = [noise(300, 400, seed=s) for s in range(4)]
    judge = Judge(model, samples_of(x))
    fixed, one = gptq(model, x, bits=bits, group=None), gptq(model, x, spacing=spacing)
    assert sizes_of(one, ["0.weight"])["0.weight"] < sizes_of(fixed, ["0.weight"])["0.weight"]
    assert 1 - judge(dequantize_model(one)) < 0.95 * (1 - judge(dequantize_model(fixed)))


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), True])
def test_a_step_is_above_zero(wrong):
    with pytest.raises(ValueError, match="spacing is"):
        gptq(chain(), batches(10, 24), spacing=wrong)


def test_a_wide_step_makes_zeros_without_a_word(recwarn):
    small = quantize_with(nearest_weight, chain(), spacing=50.0)
    assert not any(bool(m.q.dequantize().any()) for m in small.modules() if isinstance(m, Dequantize))
    assert not [w for w in recwarn if "zero" in str(w.message)]


# --- what the output makes of a tensor


class Shared(nn.Module):
    "The table of words is the head's, too, and one layer is called twice."

    def __init__(self):
        super().__init__()
        self.words, self.again = nn.Embedding(20, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.last = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, ids):
        x = self.again(self.again(self.words(ids)))
        return F.linear(self.last(x), self.words.weight)


class Borrows(nn.Module):
    "The weight of a layer that comes later is used before."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        return self.third(self.second(torch.tanh(self.first(x) @ self.third[0].weight)))


class Branches(nn.Module):
    "Not every batch takes the same way; a matrix of its own beside the layers; a layer that nobody calls."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.end, self.idle = nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return self.end(self.a(x) if x[0, 0] > 0 else self.b(x)) + self.a(x)


MODELS = {
    "chain": (lambda: chain(6, 3), lambda: batches(5, 6, n=3)),
    "shared": (
        Shared,
        lambda: [torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(s)) for s in (0, 1)],
    ),
    "borrows": (Borrows, lambda: batches(5, 6, n=2)),
    "branches": (Branches, lambda: batches(5, 6, n=4)),
    "LSTM": (lambda: nn.Sequential(nn.LSTM(6, 8, 2)), lambda: batches(3, 4, 6, n=2)),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda: batches(3, 5, 8, n=2),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3)),
            nn.Flatten(),
        ),
        lambda: batches(3, 1, 8, 8, n=2),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_changes_are_those_of_the_whole_model(name):
    make, data = MODELS[name]
    with seeded(0):
        model = make().eval()
    x = data()
    new = {n: p.detach() + 0.2 * noise(*p.shape) for n, p in model.named_parameters() if p.dim() > 1}
    new = {n: v for n, v in new.items() if n in tensors_of(model)}
    ties = {n: identity_of(model.get_parameter(n)) for n in new}
    with unchanged(model, x):
        got = changes_of(model, {ties[n]: [v, 2 * v] for n, v in new.items()}, x)
    for times in (1, 2):
        for n, wanted in output_errors(model, {n: times * v for n, v in new.items()}, x).items():
            assert got[ties[n]][times - 1] == pytest.approx(wanted, rel=1e-4, abs=1e-9), n


def test_the_beginning_is_not_run_again():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    with seeded(0):
        model = nn.Sequential(*(nn.Sequential(Counted(4, 4), nn.Tanh()) for _ in range(8))).eval()
    x = batches(5, 4, n=3)
    values = {identity_of(b[0].weight): [b[0].weight + 0.1, b[0].weight - 0.1] for b in model}
    changes_of(model, values, x)
    all_of_it = len(x) * 8 * (2 * 8 + 2)  # two changes to each, and two runs to look
    assert len(calls) < 0.75 * all_of_it
