"Losses of distillation against NumPy and SciPy, and what `distill` leaves alone."

import copy, math

import numpy as np
import pytest
import scipy
import torch
from torch import nn

from modelzip.data import Split, accuracy, digits, train
from modelzip.distill import (
    AttentionTransfer,
    Hints,
    Labels,
    Logits,
    Relations,
    Seen,
    SoftTargets,
    Sum,
    affine,
    cosines,
    distances,
    distill,
)
from modelzip.qat import convert, prepare

rng = np.random.default_rng(0)


def net(hidden, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def teacher(data):
    return train(net(128), data.train, epochs=15, lr=5e-3, progress=False)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_targets_against_scipy(temperature):
    z, v = rng.normal(size=(7, 5)), rng.normal(size=(7, 5)) * 3
    q, p = scipy.special.log_softmax(z / temperature, 1), scipy.special.log_softmax(v / temperature, 1)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(1).mean()
    got = SoftTargets(temperature)(Seen(torch.tensor(z)), Seen(torch.tensor(v)), None)
    assert got.item() == pytest.approx(expected)


def test_hot_soft_targets_match_logits():
    z, v = torch.randn(6, 10, dtype=torch.float64, requires_grad=True), torch.randn(6, 10, dtype=torch.float64)
    z.data -= z.data.mean(1, keepdim=True)
    v -= v.mean(1, keepdim=True)
    (hot,) = torch.autograd.grad(SoftTargets(1e5)(Seen(z), Seen(v), None), z)
    (logits,) = torch.autograd.grad(Logits()(Seen(z), Seen(v), None) / 2, z)
    torch.testing.assert_close(hot, logits, rtol=1e-3, atol=1e-6)


def test_relations_against_scipy():
    x = rng.normal(size=(9, 4))
    d = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(x))
    np.testing.assert_allclose(distances(torch.tensor(x)).numpy(), d / d[d > 0].mean(), rtol=1e-6)
    angles = cosines(torch.tensor(x)).numpy()
    for i, j, k in [(0, 1, 2), (3, 5, 8), (7, 2, 4)]:
        a, b = x[j] - x[i], x[k] - x[i]
        assert angles[i, j, k] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_relations_have_a_gradient_where_examples_coincide():
    x = torch.randn(5, 3).repeat(2, 1).requires_grad_()
    Relations()(Seen(x), Seen(torch.randn(10, 6)), None).backward()
    assert x.grad.isfinite().all()
    same = torch.ones(4, 3, requires_grad=True)
    Relations()(Seen(same), Seen(torch.ones(4, 3)), None).backward()
    assert same.grad.isfinite().all()


def test_attention_against_numpy():
    a, b = rng.normal(size=(3, 4, 6, 6)), rng.normal(size=(3, 8, 6, 6))
    q = [np.square(f).sum(1).reshape(3, -1) for f in (a, b)]
    q = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in q]
    got = AttentionTransfer({"x": "y"})(Seen(None, {"x": torch.tensor(a)}), Seen(None, {"y": torch.tensor(b)}), None)
    assert got.item() == pytest.approx(np.square(q[0] - q[1]).sum(1).mean())


def test_hints_learn_their_map():
    torch.manual_seed(0)
    f, truth = torch.randn(200, 6), torch.randn(6, 9)
    hints = Hints({"a": "b"})
    loss = lambda: hints(Seen(None, {"a": f}), Seen(None, {"b": f @ truth}), None)
    first = loss().item()
    optimizer = torch.optim.Adam(hints.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        l = loss()
        l.backward()
        optimizer.step()
    assert loss().item() < 1e-3 < first


def test_sums():
    a, b, y = Seen(torch.randn(4, 3)), Seen(torch.randn(4, 3)), torch.tensor([0, 1, 2, 0])
    loss = 2 * (0.5 * SoftTargets(2) + Labels()) * 0.25 + 3 * Hints({"p": "q"})
    assert (
        isinstance(loss, Sum)
        and [f for f in loss.factors] == [0.25, 0.5, 3]
        and loss.student_layers == ("p",)
        and loss.teacher_layers == ("q",)
    )
    two = 0.3 * SoftTargets(2) + 0.7 * Labels()
    assert two(a, b, y).item() == pytest.approx(0.3 * SoftTargets(2)(a, b, y).item() + 0.7 * Labels()(a, b, y).item())


def test_few_labels_and_a_teacher_beat_few_labels_alone(data, teacher):
    few = data.train[:60]
    unlabelled = Split(data.train.x, torch.zeros(len(data.train), dtype=torch.int64))
    alone = [
        accuracy(train(net(16, s), few, epochs=60, lr=1e-2, batch_size=20, seed=s, progress=False), data.valid)
        for s in (1, 2)
    ]
    taught = [
        accuracy(
            distill(net(16, s), teacher, unlabelled, SoftTargets(4), epochs=15, lr=1e-2, seed=s, progress=False),
            data.valid,
        )
        for s in (1, 2)
    ]
    assert min(taught) > max(alone)


def test_what_stays_as_it_was(data, teacher):
    before, mode = copy.deepcopy(teacher.state_dict()), teacher.training
    wants = [p.requires_grad for p in teacher.parameters()]
    distill(net(8), teacher, data.train[:128], Hints({"1": "1"}) + SoftTargets(), epochs=1, progress=False)
    assert all(torch.equal(before[n], t) for n, t in teacher.state_dict().items()) and teacher.training == mode
    assert wants == [p.requires_grad for p in teacher.parameters()] and all(
        p.grad is None for p in teacher.parameters() if not p.requires_grad
    )
    assert not any(m._forward_hooks for m in teacher.modules())


def test_the_same_seed_gives_the_same_student(data, teacher):
    loss = lambda: SoftTargets() + 0.1 * Hints({"1": "1"})
    a, b, c = (distill(net(8), teacher, data.train[:256], loss(), epochs=2, seed=s, progress=False) for s in (0, 0, 1))
    assert torch.equal(a[1].weight, b[1].weight) and not torch.equal(a[1].weight, c[1].weight)


def test_a_student_of_integers(data, teacher):
    student = distill(
        prepare(net(32), 2, batches=[data.train.x[:100]]), teacher, data.train, epochs=15, lr=1e-2, progress=False
    )
    integers = convert(student)
    with torch.no_grad():
        assert torch.equal(integers(data.valid.x), student(data.valid.x))
    assert accuracy(integers, data.valid) > 0.9


def test_affine_by_hand():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 6] = 1.0
    torch.manual_seed(0)
    assert torch.allclose(affine(x, 0, 0, 0, 0), x, atol=1e-6)
    many = affine(x.expand(500, -1, -1, -1), degrees=0, shift=1 / 9, scale=0, shear=0)
    mass = many.sum((1, 2, 3))
    columns = (many.sum((1, 2)) * torch.arange(9.0)).sum(1) / mass
    assert (
        mass.sub(1).abs().max() < 1e-4 and 4.9 < columns.min() < 5.1 and 6.9 < columns.max() < 7.1
    )  # one pixel either way
    turned = affine(x.expand(500, -1, -1, -1), degrees=90, shift=0, scale=0, shear=0)
    rows = (turned.sum((1, 3)) * torch.arange(9.0)).sum(1) / turned.sum((1, 2, 3))
    assert rows.min() < 2.3 and rows.max() > 5.7


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda t, d: distill(t, t, d), "the teacher itself"),
        (lambda t, d: distill(nn.Flatten(), t, d), r"\(2, 64\)"),
        (lambda t, d: distill(net(8), t, d[:0]), "empty"),
        (lambda t, d: distill(net(8), t, d, Hints({"9": "1"})), "no layer '9'"),
        (lambda t, d: distill(net(8), t, d, Hints({"1": "9"})), "no layer '9'"),
        (lambda t, d: distill(net(8), t, d, AttentionTransfer({"1": "1"})), "picture"),
        (lambda t, d: SoftTargets(math.inf), "temperature is inf"),
        (lambda t, d: affine(torch.zeros(3, 3)), r"\(3, 3\)"),
    ],
    ids=["self", "outputs", "empty", "student's layer", "teacher's layer", "no picture", "temperature", "no images"],
)
def test_what_is_refused(call, says, data, teacher):
    with pytest.raises(ValueError, match=says):
        call(teacher, data.train)


def test_wrong_types(data, teacher):
    with pytest.raises(TypeError, match="student is 'x'; it may be an nn.Module"):
        distill("x", teacher, data.train)
    with pytest.raises(TypeError, match="data is a Tensor"):
        distill(net(8), teacher, data.train.x)
    with pytest.raises(TypeError, match="may be a dict"):
        Hints({})
    with pytest.raises(TypeError, match="finite number"):
        math.nan * Labels()
    broken = net(8)
    broken[1].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="teacher puts out NaN"):
        distill(net(8), broken, data.train)
