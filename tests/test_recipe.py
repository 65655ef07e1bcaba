"Recipes that repeat to the last bit, and sweeps that survive what happens to sweeps."

import gc, json, multiprocessing, os, random, shutil, signal, subprocess, sys, time, warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch import nn

from modelzip.auto import compress
from modelzip.data import LeNet5, digits, mnist5k, train
from modelzip.pack import load, save
from modelzip.quant import quantize_model
from modelzip.recipe import (
    RECIPES,
    STEPS,
    Cache,
    Judge,
    Recipe,
    Results,
    file_of,
    fingerprint,
    pareto,
    quantize_others,
    register_step,
    samples_of,
    sweep,
)

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def trained(data):
    return train(net(), data.train, epochs=5, progress=False)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_named_recipes_repeat_to_the_last_bit(name, tmp_path):
    some = mnist5k()
    some = type(some)(some.train[:120], some.valid[:60], some.test[:1])
    model = LeNet5(channels=[4, 8], hidden=32)
    before = fingerprint(model)
    for f in "a", "b":
        torch.manual_seed(random.randrange(1000))  # whatever the world's random state is
        size, back = file_of(RECIPES[name](model, some), tmp_path / f, RECIPES[name])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert fingerprint(model) == before
    assert Recipe.from_file(tmp_path / "a") == RECIPES[name] == Recipe.from_json(RECIPES[name].to_json())
    assert back(some.valid.x[:3]).shape == (3, 10) and size < 48_000


def test_another_seed_is_another_result(data, trained, tmp_path):
    steps = [("learn", {"epochs": 1})]
    outputs = [Recipe(steps, seed)(trained, data)(data.valid.x) for seed in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "steps, says",
    [
        ([], "empty"),
        (["nothing"], "'nothing'"),
        ([("gptq", {"bitz": 3})], "'bitz'"),
        ([("gptq", {"batches": []})], "'batches'"),
        ([("gptq", {"bits": float("inf")})], "JSON"),
        ([("quantize_model", {"scale": 1})], "'scale'"),
        ("gptq", "list"),
        ([("gptq", 4)], "step 1"),
        ([3], "step 1"),
    ],
)
def test_wrong_recipes_are_refused_when_written(steps, says):
    with pytest.raises((ValueError, TypeError), match=says):
        Recipe(steps)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"seed": 0}',
        '{"seed": "x", "steps": ["convert"]}',
        '{"seed": 0, "steps": [["os.system", {}]]}',
        '{"seed": 0, "steps": "convert"}',
    ],
)
def test_json_that_is_no_recipe(text):
    with pytest.raises((ValueError, TypeError)):
        Recipe.from_json(text)


def test_missing_data_names_the_step(trained):
    with pytest.raises(ValueError, match="step 2, learn, needs data.*labels"):
        Recipe(["fold_batchnorm", "learn"])(trained, [torch.randn(8, 64)])
    with pytest.raises(ValueError, match="step 1, gptq, needs batches"):
        Recipe(["gptq"])(trained)


def test_a_step_that_fails_says_which(trained, data):
    with pytest.raises(ValueError) as e:
        Recipe(["fold_batchnorm", ("quantize_model", {"bits": 99})])(trained)
    assert any("step 2" in n for n in getattr(e.value, "__notes__", ["step 2"]))


def test_a_file_without_a_recipe(trained, tmp_path):
    save(trained, tmp_path / "m.mz")
    with pytest.raises(ValueError, match="holds no recipe"):
        Recipe.from_file(tmp_path / "m.mz")


def test_judge_never_looks_at_the_test_part(data, trained):
    blind = type(data)(data.train, data.valid, None)
    assert Judge(trained, samples_of(blind)).metric == "accuracy"
    assert fingerprint(samples_of(blind)) == fingerprint(samples_of(data))


def test_held_out_is_not_learned_from(data):
    s = samples_of(data.train)
    assert len(s.train) + len(s.held) == len(data.train)
    rows = {x.numpy().tobytes() for x in s.train.x}
    assert sum(x.numpy().tobytes() in rows for x in s.held.x) <= 1


def test_judge_refuses_a_model_without_sense():
    model = net()
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Judge(model, samples_of([torch.randn(9, 64)]))


def test_recurrent_and_attention_matrices(tmp_path):
    torch.manual_seed(0)
    lstm = nn.LSTM(16, 32, num_layers=2, bidirectional=True, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    small = quantize_others(lstm, 8)
    assert (small(x)[0] - lstm(x)[0]).abs().max() < 0.01
    save(small, tmp_path / "l.mz")
    assert torch.equal(load(tmp_path / "l.mz", lstm)(x)[0], small(x)[0])
    assert (tmp_path / "l.mz").stat().st_size < 0.3 * sum(p.nbytes for p in lstm.parameters())
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    y = torch.randn(2, 5, 32)
    both = quantize_others(quantize_model(encoder, 8), 8)
    assert (both(y) - encoder(y)).abs().max() < 0.05
    save(both, tmp_path / "t.mz")
    assert torch.allclose(load(tmp_path / "t.mz", encoder)(y), both(y), atol=1e-6)


def test_a_name_that_is_taken():
    def gptq(model):
        return model

    with pytest.raises(ValueError, match="'gptq'"):
        register_step(gptq)


def test_nothing_stays_open(trained, data, tmp_path, monkeypatch):
    "No file is left to the garbage collector: a program that runs with `-X dev -W error` stays silent."
    left = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: left.append(str(u.exc_value)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for archive in True, False, "solid":
            path = save(net(), tmp_path / "m.mz", archive=archive)
            load(path, net(), mmap=archive is False)
        sweep(make, {"bits": [4, 99]}, trained, data, folder=tmp_path / "s", progress=False)
        compress(trained, bytes=3000, data=data, epochs=1, tries=2, progress=False)
        gc.collect()
    assert left == []


# --- fingerprints


def test_fingerprints_tell_apart(data, trained):
    other = net()
    other.load_state_dict(trained.state_dict())
    assert fingerprint(other) == fingerprint(trained)
    other[1].bias.data[0] += 1e-6
    assert fingerprint(other) != fingerprint(trained)
    assert fingerprint(data.train) != fingerprint(data.valid)
    assert fingerprint({"a": 1}) != fingerprint({"a": 2}) != fingerprint({"b": 2})
    assert (
        fingerprint(torch.zeros(4))
        != fingerprint(torch.zeros(2, 2))
        != fingerprint(torch.zeros(2, 2, dtype=torch.float64))
    )


def test_fingerprints_read_what_code_imports_where_it_is_used(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def a(m):
        import ours

        return ours.K

    def b(m):
        from ours import f

        return f()

    def c(m):
        import pack.sub as s

        return s.K

    def d(m):
        from pack import sub

        return sub.K

    def e(m):
        import pack.sub

        return pack.sub.K

    def none(m):
        import absent_from_here, math

        return math.pi

    found = []
    for k in 1, 2:
        (tmp_path / "pack").mkdir(exist_ok=True)
        (tmp_path / "pack/__init__.py").touch()
        for name in "ours.py", "pack/sub.py":
            (tmp_path / name).write_text(f"K = {k}\ndef f(): return K\n")
        for name in "ours", "pack", "pack.sub":
            sys.modules.pop(name, None)
        found.append([fingerprint(f) for f in (none, a, b, c, d, e)])
    assert [x != y for x, y in zip(*found)] == [False, True, True, True, True, True]
    for name in "ours", "pack", "pack.sub":
        sys.modules.pop(name, None)
    assert fingerprint(defaultdict(int, a=1)) != fingerprint(defaultdict(float, a=1))
    for hidden in lambda m: eval("K"), lambda m: globals()["K"]:
        with pytest.raises(TypeError, match="nobody can tell what it reads"):
            fingerprint(hidden)


# --- the front


def test_front_against_brute_force():
    rng = random.Random(0)
    for _ in range(200):
        rows = [
            dict(bytes=rng.randint(1, 9), ms=rng.randint(1, 9), quality=rng.choice([None, *range(9)]))
            for _ in range(rng.randint(1, 25))
        ]
        known = [r for r in rows if r["quality"] is not None]

        def dominates(a, b):
            return a["bytes"] <= b["bytes"] and a["ms"] <= b["ms"] and a["quality"] >= b["quality"] and a != b

        brute = [r for r in known if not any(dominates(o, r) for o in known)]
        got = pareto(rows, smaller=("bytes", "ms"))
        assert sorted(map(id, got)) == sorted(map(id, brute))


# --- sweeps


def make(bits, group=None):
    return [("quantize_model", {"bits": bits, "group": group})]


GRID = {"bits": [2, 4, 6, 8, 99], "group": [None, 16]}


class Travelling:
    "A judge who notes where he arrives."

    def __init__(self, book):
        self.book = book

    def __setstate__(self, state):
        vars(self).update(state)
        with open(self.book, "a") as f:
            f.write("x")

    def __call__(self, model):
        return float(sum(p.detach().abs().sum() for p in model.parameters()))


def watch_what_stays_open(book):
    "In a process of its own: what is left to the garbage collector is written down."

    def note(unraisable):
        with open(book, "a") as f:
            f.write(f"{unraisable.exc_value!r} {unraisable.object!r}\n")

    gc.collect()
    warnings.simplefilter("error", ResourceWarning)
    sys.unraisablehook = note


def processes():
    "Processes that hold nothing of this one: all of them begin as one that has imported this file, and did no more."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "distributed"])
    forkserver.ensure_running()
    return context


def test_the_watch_sees_what_stays_open(tmp_path):
    with ProcessPoolExecutor(1, processes(), watch_what_stays_open, (tmp_path / "left",)) as pool:
        pool.submit(open, tmp_path / "seen", "w").exception()  # it cannot be sent back, and nobody closes it
        pool.submit(gc.collect).result()
    assert "unclosed file" in (tmp_path / "left").read_text()


def test_serial_and_processes_agree(trained, data, tmp_path):
    judge, left = Travelling(str(tmp_path / "arrivals")), tmp_path / "left"
    one = sweep(make, GRID, trained, data, folder=tmp_path / "one", evaluate=judge, progress=False)
    with ProcessPoolExecutor(2, processes(), watch_what_stays_open, (left,)) as pool:
        two = sweep(make, GRID, trained, data, executor=pool, folder=tmp_path / "two", evaluate=judge, progress=False)
        for job in [pool.submit(gc.collect) for _ in range(4)]:
            job.result()
    assert not left.exists(), left.read_text()
    assert 1 <= len((tmp_path / "arrivals").read_text()) <= 2  # not with each of ten points
    strip = lambda rs: [(r.options, r.recipe, r.bytes, r.quality, r.key, bool(r.error)) for r in rs]
    assert strip(one) == strip(two) and len(one.failed) == 2
    assert "bits is 99" in one.failed[0].error and "Traceback" in two.failed[0].error
    for r in one:
        if not r.error:
            assert one.file(r).read_bytes() == two.file(r).read_bytes() and one.file(r).stat().st_size == r.bytes
    best = one.best(bytes=4000)
    assert best.bytes <= 4000 and all(r.quality <= best.quality for r in one if not r.error and r.bytes <= 4000)
    assert one.best(bytes=1) is None


def test_a_broken_cache_is_computed_again(trained, data, tmp_path):
    first = sweep(make, {"bits": [3, 5]}, trained, data, folder=tmp_path, progress=False)
    (tmp_path / f"{first[0].key}.json").write_text('{"bytes": 1')  # torn
    (tmp_path / f"{first[1].key}.mz").write_bytes(b"short")  # not the file that was noted
    again = sweep(make, {"bits": [3, 5]}, trained, data, folder=tmp_path, progress=False)
    assert [(r.bytes, r.quality) for r in again] == [(r.bytes, r.quality) for r in first]
    assert all(again.file(r).stat().st_size == r.bytes for r in again)


def test_a_cache_that_says_something_else_is_not_believed(trained, data, tmp_path):
    "A note of the right form with another number, a file of the right size with other bytes, a folder that is gone."
    again = lambda: sweep(make, {"bits": [3]}, trained, data, folder=tmp_path / "c", progress=False)
    (first,) = again()
    note, file = tmp_path / "c" / f"{first.key}.json", tmp_path / "c" / f"{first.key}.mz"
    good, content = json.loads(note.read_text()), file.read_bytes()
    changes = [{"quality": 0.123}, {"quality": "abc"}, {"options": {"bits": 9}}, {"error": 3}, {"bytes": float("nan")}]
    for change in changes:
        note.write_text(json.dumps(good | change))
        assert (again()[0].quality, again()[0].options) == (first.quality, {"bits": 3})
    note.write_text(json.dumps({k: v for k, v in good.items() if k != "quality"}))
    assert again()[0].quality == first.quality
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 255]) + content[-8:])
    assert again()[0].quality == first.quality and file.read_bytes() == content
    shutil.rmtree(tmp_path / "c")
    assert again()[0].quality == first.quality and file.read_bytes() == content


def test_an_interrupted_sweep_leaves_no_jobs(trained, tmp_path):
    asked = []

    def judge(model):
        asked.append(1)
        time.sleep(0.5 * (len(asked) > 1))  # time enough to cancel what waits
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyboardInterrupt):
            sweep(make, {"bits": [2, 3, 4, 5]}, trained, None, pool, tmp_path, judge, progress=False)
    assert len(asked) <= 3  # what ran, and what began before the others were cancelled


def test_the_default_type_of_numbers_is_part_of_the_key(trained, tmp_path):
    from modelzip.recipe import _key

    before = _key("", trained)
    torch.set_default_dtype(torch.float64)
    try:
        assert _key("", trained) != before
    finally:
        torch.set_default_dtype(torch.float32)
    for seed in (10**20, -(10**20)):
        with pytest.raises(ValueError, match="seed is"):
            Recipe(["convert"], seed)
        with pytest.raises(ValueError, match="seed is"):
            compress(trained, bytes=1000, seed=seed, progress=False)


def test_failures_are_remembered_until_retried(trained, tmp_path):
    calls, bad = tmp_path / "calls", tmp_path / "bad"  # what changes while a judge works must not be part of it

    def judge(m):
        with open(calls, "a") as f:
            f.write(".")
        if bad.exists() and len(calls.read_text()) > 1:
            raise RuntimeError("no luck")
        return 1.0

    bad.touch()
    for retry, failed in (False, 1), (False, 1), (True, 0):
        if retry:
            bad.unlink()
        got = sweep(make, {"bits": [4]}, trained, folder=tmp_path / "s", evaluate=judge, retry=retry, progress=False)
        assert len(got.failed) == failed
    assert len(calls.read_text()) == 4  # two for each time that it was really tried


def test_a_make_that_fails_is_a_result(trained, tmp_path):
    def odd(bits):
        return make(bits) if bits != 5 else 1 / 0

    got = sweep(odd, {"bits": [4, 5]}, trained, folder=tmp_path, progress=False)
    assert got[0].bytes and "ZeroDivisionError" in got[1].error and "ZeroDivisionError" in repr(got[1])


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(grid={}), "no point"),
        (dict(grid={"bits": 3}), "bits"),
        (dict(executor=3), "executor"),
        (dict(data=torch.zeros(3)), "batches"),
    ],
)
def test_wrong_arguments(trained, tmp_path, wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        sweep(make, **{"grid": GRID, "model": trained, "folder": tmp_path, "progress": False} | wrong)


def test_nothing_is_unpickled():
    import modelzip.recipe

    source = Path(modelzip.recipe.__file__).read_text()
    assert "pickle" not in source.replace("unpickled", "") and "torch.load" not in source


SLOW = """
import os, time
from pathlib import Path
def judge(model):
    with open(os.environ["ASKED"], "a") as f: f.write("x")
    time.sleep(float(os.environ.get("PAUSE", 0)))  # so that it can be killed in the middle
    return float(sum(p.detach().abs().sum() for p in model.parameters()))
def make(bits): return [("quantize_model", {"bits": bits})]
def model():
    from modelzip.data import LeNet5
    return LeNet5(channels=[2, 4], hidden=8)
"""
DRIVER = """
import sys, slow
from modelzip.recipe import sweep
if __name__ == "__main__":
    if sys.argv[2] == "dask":
        from distributed import Client
        client = Client(n_workers=1, threads_per_worker=2, dashboard_address=None)
        executor = client.get_executor()
    else: executor = None
    sweep(slow.make, {"bits": list(range(2, 14))}, slow.model(), executor=executor, folder=sys.argv[1], evaluate=slow.judge, progress=False)
"""


def killed_and_continued(tmp_path, how, path=()):
    "Kill a sweep with SIGKILL when some of it is done; what is there must be whole, and only the rest be computed."
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "driver.py").write_text(DRIVER)
    env = ENV | {
        "ASKED": str(tmp_path / "asked"),
        "PAUSE": "0.15",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *path, *sys.path]),
    }
    folder = tmp_path / "sweep"
    run = subprocess.Popen(
        [sys.executable, "driver.py", str(folder), how],
        cwd=tmp_path,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    notes = lambda: [f for f in folder.glob("*.json") if not f.name.startswith(".")] if folder.exists() else []
    until = time.time() + 120
    while len(notes()) < 3 and time.time() < until and run.poll() is None:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = notes()
    assert 3 <= len(done) < 12, "it should have been killed in the middle"
    for f in done:
        assert f.with_suffix(".mz").stat().st_size == json.loads(f.read_text())["bytes"]
    (tmp_path / "asked").write_text("")
    os.environ["ASKED"] = str(tmp_path / "asked")
    sys.path.insert(0, str(tmp_path))
    sys.modules.pop("slow", None)
    try:
        import slow

        results = sweep(
            slow.make, {"bits": list(range(2, 14))}, slow.model(), folder=folder, evaluate=slow.judge, progress=False
        )
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("slow", None)
        del os.environ["ASKED"]
    assert len((tmp_path / "asked").read_text()) == 2 * (12 - len(done))
    assert not results.failed and len({r.key for r in results}) == 12
    for r in results:
        assert load(results.file(r)) is not None


def test_kill_9_and_continue(tmp_path):
    killed_and_continued(tmp_path, "serial")


def test_kill_9_on_a_dask_cluster(tmp_path):
    pytest.importorskip("distributed")
    killed_and_continued(tmp_path, "dask")


def test_dask_agrees_and_survives_a_worker(trained, data, tmp_path):
    dask, distributed = (pytest.importorskip(name) for name in ("dask", "distributed"))
    one = sweep(make, GRID, trained, data, folder=tmp_path / "one", progress=False)
    processes()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = list(client.run(os.getpid).values())
        assert len(set(pids)) == 2 and os.getpid() not in pids
        client.run(watch_what_stays_open, str(left := tmp_path / "left"))
        two = sweep(make, GRID, trained, data, executor=client.get_executor(), folder=tmp_path / "two", progress=False)
        strip = lambda rs: [(r.options, r.bytes, r.quality, r.key, bool(r.error)) for r in rs]
        assert strip(one) == strip(two)
        client.run(gc.collect)
        assert not left.exists(), left.read_text()
        sweep(
            make,
            {"bits": [2, 3, 4, 5, 6, 7]},
            trained,
            executor=client.get_executor(),
            folder=tmp_path / "few",
            evaluate=Travelling(str(tmp_path / "arrivals")),
            progress=False,
        )
        assert 1 <= len((tmp_path / "arrivals").read_text()) <= 4  # once to each worker, and on the way
        executor = client.get_executor()

        class Killing(type(executor)):  # kills a worker once the work is under way
            submitted = 0

            def submit(self, f, *a, **k):
                job = super().submit(f, *a, **k)
                Killing.submitted += 1
                if Killing.submitted == 8:
                    os.kill(pids[0], signal.SIGKILL)
                return job

        three = sweep(make, GRID, trained, data, executor=Killing(client), folder=tmp_path / "three", progress=False)
        assert strip(one) == strip(three)
