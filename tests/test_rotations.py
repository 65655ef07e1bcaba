"""Rotations: whatever is turned computes the same, whatever cannot be turned is left or refused, and nothing of the
caller's is changed."""

import contextlib, copy, math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from guards import examples, unchanged
from modelzip.pack import load, save
from modelzip.recipe import Recipe
from modelzip.rotations import Turn, hadamard, hadamard_transform, incoherence, orders_of, paley, rotate, turnable
from modelzip.workshop.networks import MiniLM
from modelzip.workshop.small_llama import RootNorm, SmallLlama
from modelzip.workshop.turnable import fold_norms

IDS = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("seeded")


def with_gains(model):
    "Norms that do something."
    for n, p in model.named_parameters():
        if "norm" in n:
            nn.init.uniform_(p, 0.4, 2.0)
    return model.double().eval()


def llama(**how):
    return with_gains(SmallLlama(**how))


# ---- matrices ----


@settings(max_examples=examples(30))
@given(n=st.integers(1, 400))
def test_hadamard_matrices_are_orthogonal(n):
    if (orders := orders_of(n)) is None:
        assert n % 4 or all(n % m for m in (12, 20, 28)) or n % 3 == 0 or n % 5 == 0 or n % 7 == 0
        with pytest.raises(ValueError, match=f"n is {n}"):
            hadamard(n)
        return
    assert math.prod(orders) == n
    H = hadamard(n)
    assert (H.abs() == 1).all() and torch.equal(H @ H.T, n * torch.eye(n))
    x = torch.randn(3, 2 * n, dtype=torch.float64)
    y = hadamard_transform(x, n)
    assert torch.allclose(y, (x.view(3, 2, n) @ H.double() / math.sqrt(n)).flatten(1), atol=1e-10)
    assert torch.allclose(hadamard_transform(y, n, back=True), x, atol=1e-10)


@pytest.mark.parametrize("n", [0, -4, 3, 6, 18])
def test_sizes_without_a_matrix_are_refused(n):
    with pytest.raises(ValueError):
        hadamard(n)
    with pytest.raises(ValueError, match=f"n is {n}") if n < 1 else contextlib.nullcontext():
        assert orders_of(n) is None
    with pytest.raises(ValueError, match="block"):
        hadamard_transform(torch.ones(2, 36), n)


def test_what_holds_no_vectors_is_refused_by_name():
    for odd in 1.5, True, "8":
        with pytest.raises(TypeError, match="n is .*a whole number"):
            orders_of(odd)
    for odd in torch.tensor(1.0), torch.arange(8), torch.ones(8, dtype=torch.bool):
        with pytest.raises(TypeError, match="x is torch.*it may be vectors of floats"):
            hadamard_transform(odd)
    for odd in torch.empty(0), torch.empty(3, 0), torch.empty(0, 3):
        with pytest.raises(ValueError, match="x has shape"):
            incoherence(odd)


def test_primes_of_paley():
    for q in 0, 1, 2, 9, 15, -3:
        with pytest.raises(ValueError, match="odd prime"):
            paley(q)


def test_turns_repeat_and_leave_the_global_generator_alone():
    with unchanged(torch.nn.Linear(1, 1)):
        a, b, c = Turn(48, seed=3), Turn(48, seed=3), Turn(48, seed=4)
    assert torch.equal(a.signs, b.signs) and not torch.equal(a.signs, c.signs)
    x = torch.randn(2, 5, 96)
    assert torch.allclose(a.inverse()(a(x)), x, atol=1e-5) and torch.allclose(a(a.inverse()(x)), x, atol=1e-5)
    assert torch.equal(a(x)[..., 48:], a(x[..., 48:])) and a.half()(x.half()).dtype == torch.float16


def test_blocks_of_turns():
    assert [Turn(n).block for n in (1, 2, 9, 100, 576, 11008, 14336, 7919)] == [1, 2, 1, 20, 576, 256, 14336, 1]
    with pytest.raises(ValueError, match="width is 0"):
        Turn(0)
    for width, block in (9, 4), (12, 6), (12, 0), (12, 24):
        with pytest.raises(ValueError, match=f"block is {block}; of vectors of {width}"):
            Turn(width, block)


def test_incoherence_of_spikes_and_of_their_turns():
    x = torch.zeros(300, 768)
    x[torch.arange(300), torch.randint(768, (300,))] = torch.randn(300)
    assert incoherence(x)[0] == pytest.approx(math.sqrt(768)) and incoherence(Turn(768, seed=0)(x))[0] == pytest.approx(
        1
    )


def test_incoherence_of_zeros_and_of_tiny_vectors():
    for size in 0, 1e-200, 1e200:
        assert incoherence(torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64) * size) == (1, 1)
    assert incoherence(torch.eye(4)[:1] * 1e-30) == pytest.approx((2, 4))
    assert math.isnan(incoherence(torch.tensor([1.0, math.nan]))[0])


# ---- whole models ----


@pytest.mark.parametrize("how", [{}, dict(kv=6), dict(kv=1), dict(width=20, heads=3, kv=3), dict(width=36, hidden=9)])
def test_a_llama_computes_the_same(how):
    model = llama(**how)
    with unchanged(model, IDS):
        new = rotate(model, IDS)
    assert (new(IDS) - model(IDS)).abs().max() < 1e-10
    for block in new.blocks:
        assert (block.norm1.weight == 1).all()
    turned = [n for n, p in new.named_parameters() if not torch.equal(p, dict(model.named_parameters()).get(n, p))]
    assert {"words.weight", "blocks.0.q.weight", "blocks.1.o.weight", "blocks.1.down.weight"} <= set(turned)


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_of_the_book(tied):
    language = pytest.importorskip("modelzip.language")
    model = with_gains(language.Llama(50, 48, 2, 6, 2, 96, tied=tied))
    new = rotate(model, IDS, online=["*.down"])
    assert (new(IDS) - model(IDS)).abs().max() < 1e-10
    assert language.generate(new, [1, 2, 3], 9) == language.generate(model, [1, 2, 3], 9)  # with its cache


def test_an_untied_head_leaves_no_turn_behind():
    class Untied(SmallLlama):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(48, 50)

        def forward(self, ids):
            return self.head(self.norm(self.blocks(self.words(ids))))

    model = with_gains(Untied())
    new = rotate(model, IDS)
    assert not any(isinstance(m, Turn) for m in new.modules()) and (new(IDS) - model(IDS)).abs().max() < 1e-10


class Written(nn.Module):
    "Blocks with a norm of some class before something; what stands behind `last` differs."

    def __init__(self, norm, last=True, bias=True, f=F.silu):
        super().__init__()
        self.words, self.places = nn.Embedding(40, 24), nn.Parameter(torch.randn(7, 24))
        self.norm1, self.norm2, self.f = norm(24), norm(24) if last else nn.Identity(), f
        self.up, self.down, self.head = nn.Linear(24, 10, bias=bias), nn.Linear(10, 24), nn.Linear(24, 5, bias=bias)

    def forward(self, ids):
        x = self.words(ids) + self.places
        return self.head(self.norm2(x + self.down(self.f(self.up(self.norm1(x))))))


@pytest.mark.parametrize("norm", [nn.RMSNorm, RootNorm, nn.LayerNorm, lambda n: nn.LayerNorm(n, bias=False)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_norms_of_every_kind(norm, last, bias):
    model = with_gains(Written(norm, last, bias))
    plan = turnable(model, IDS)
    folded = [k.folded for k, i, _ in plan.norms if i is not None]
    if isinstance(model.norm1, nn.LayerNorm) and (not last or model.norm1.bias is not None and not bias):
        assert not any(folded)  # the head reads the mean; or an offset has no bias to go into
        return
    assert folded and all(folded)
    for new in fold_norms(copy.deepcopy(model), plan), rotate(model, IDS, seed=5):
        assert (new(IDS) - model(IDS)).abs().max() < 1e-10
    back = rotate(model.float(), IDS)
    assert (back(IDS) - model(IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, lambda n: nn.LayerNorm(n, bias=False)])
@pytest.mark.parametrize("between", [lambda x: 2 * x, lambda x: -x, lambda x: x / x.new_full((2, 7, 1), 3.0)])
def test_a_factor_behind_a_norm(norm, between):
    class Scaled(Written):
        def forward(self, ids):
            x = self.words(ids) + self.places
            return self.head(self.norm2(x + self.down(self.f(self.up(between(self.norm1(x)))))))

    model = with_gains(Scaled(norm))
    plan = turnable(model, IDS)
    offset = getattr(model.norm1, "bias", None) is not None  # a bias that takes it in is not scaled
    assert {k.name: k.folded for k, *_ in plan.norms} == {"norm1": not offset, "norm2": True}
    for new in fold_norms(copy.deepcopy(model), plan), rotate(model, IDS):
        assert (new(IDS) - model(IDS)).abs().max() < 1e-10


def test_what_stands_in_the_way_is_said():
    class Squared(Written):
        def forward(self, ids):
            x = self.words(ids)
            return self.head(x * x + self.places)

    with pytest.raises(ValueError, match="nothing that can be turned.*mul"):
        rotate(Squared(nn.RMSNorm), IDS)
    with pytest.raises(ValueError, match="online has 'downs'.* it may be words?|online has 'downs'.*up|down|head"):
        rotate(llama(), IDS, online=["downs"])
    with pytest.raises(ValueError, match="bfloat16"):
        rotate(SmallLlama().bfloat16(), IDS)
    with pytest.raises(ValueError, match="online names none"):
        rotate(llama(), IDS, free=False)
    with pytest.raises(ValueError, match="nothing"):
        rotate(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(2, 4))


def test_post_norm_leaves_the_stream():
    model = with_gains(MiniLM(words=40, width=24, layers=2, heads=3, hidden=32, length=9))
    plan = turnable(model, IDS)
    assert [s.size for s in plan.spaces] == [8, 8] and "gain and all" in plan.left["blocks.1.attention.query.weight"]
    for new in (
        rotate(model, IDS),
        rotate(model, IDS, online="blocks.*"),
        rotate(model, IDS, ["blocks.0.up"], free=False),
    ):
        assert (new(IDS) - model(IDS)).abs().max() < 1e-10
    assert torch.equal(new.blocks[1].attention.out.weight, model.blocks[1].attention.out.weight)


def test_hooks_and_shared_and_computed_weights_stay():
    model, seen = llama(), []
    model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    assert {s.size for s in turnable(model, IDS).spaces} == {8}  # somebody looks at the stream
    model = llama()
    model.blocks[1].o = model.blocks[0].o  # one layer in two places
    assert (rotate(model, IDS)(IDS) - model(IDS)).abs().max() < 1e-10
    model = llama()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].gate)
    assert (rotate(model, IDS)(IDS) - model(IDS)).abs().max() < 1e-10


class FusedNorm(RootNorm):
    "Adds what it is given beside, as fused kernels do."

    def forward(self, x, more=None, factor=1.0):
        return super().forward(x if more is None else x + F.relu(more)) * factor


def test_a_norm_that_does_more_is_none():
    class Fused(Written):
        def __init__(self, **more):
            super().__init__(FusedNorm)
            self.more = more

        def forward(self, ids):
            x = self.words(ids)
            x = x + self.down(self.up(self.norm1(x, **self.more)))
            return self.head(self.norm2(x))

    for more in {"more": torch.randn(24).double()}, {"factor": 2.0}:
        model = with_gains(Fused(**more))
        assert "is given more" in turnable(model, IDS).left["up.weight"]
        assert (rotate(model, IDS)(IDS) - model(IDS)).abs().max() < 1e-10  # between up and down nothing is in the way


def test_norms_over_another_axis_are_none():
    class Across(RootNorm):
        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)

    with pytest.raises(ValueError, match="nothing that can be turned"):
        rotate(Written(Across), IDS)


@pytest.mark.parametrize(
    "norm", [lambda n: nn.LayerNorm(n, elementwise_affine=False), lambda n: nn.RMSNorm(n, elementwise_affine=False)]
)
def test_norms_without_gain_in_and_behind_the_stream(norm):
    class Post(Written):
        def forward(self, ids):
            x = self.norm1(self.words(ids))
            return self.head(x + self.down(F.silu(self.up(x))))

    model = Post(norm).double().eval()
    try:
        assert (rotate(model, IDS)(IDS) - model(IDS)).abs().max() < 1e-10
    except ValueError as e:
        assert "nothing that can be turned" in str(e)
    model = Written(norm).double().eval()
    assert (rotate(model, IDS)(IDS) - model(IDS)).abs().max() < 1e-10


def test_what_no_example_calls_is_not_pulled_apart():
    class Branch(Written):
        def __init__(self):
            super().__init__(nn.RMSNorm)
            self.other = nn.Linear(24, 10)

        def forward(self, ids, other=False):
            x = self.words(ids)
            return self.head(self.norm2(x + self.down((self.other if other else self.up)(self.norm1(x)))))

    model = with_gains(Branch())
    both = [(IDS,), (IDS, True)]
    with pytest.raises(ValueError, match="other.* may read it, which no example calls"):
        rotate(model, IDS)
    new = rotate(model, both)
    assert all((new(*args) - model(*args)).abs().max() < 1e-10 for args in both)


def test_a_turned_model_goes_through_a_file(tmp_path):
    model = llama().float()
    new = rotate(model, IDS, online=["*.down"])
    back = load(save(new, tmp_path / "x.mz"), rotate(SmallLlama(seed=1), IDS, online=["*.down"], seed=9))
    assert torch.equal(back(IDS), new(IDS)) and isinstance(back.blocks[0].down[0], Turn)
    assert back.norm[0].back and not back.norm[2].back


def test_a_recipe_can_turn():
    from modelzip.quant import Dequantize

    model = llama().float()
    made = Recipe([("rotate", {"online": ["*.down"]}), ("quantize_model", {"bits": 8})])(model, [IDS])
    assert any(isinstance(m, Dequantize) for m in made.modules())
    assert (made(IDS) - model(IDS)).abs().max() < 0.2 * model(IDS).abs().max()


def test_from_ptq():
    from modelzip import ptq

    assert ptq.rotate is rotate and "rotate" in ptq.__all__
    with pytest.raises(AttributeError, match="'modelzip.ptq' has no attribute 'turn_it'"):
        ptq.turn_it
