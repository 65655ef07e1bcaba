"What crosses 01_measure: instruments against peers and by property, reports with awkward names, odd models."

import copy, json, math, re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modelzip import measure
from modelzip.data import LeNet300, LeNet5, Split
from modelzip.measure import (
    Measurement,
    Report,
    compare,
    count_parameters,
    file_bytes,
    latency,
    load_plain,
    mac_rules,
    machine,
    macs,
    mcnemar,
    peak_memory,
    save_plain,
    sqnr,
    tensor_bytes,
    wilson,
)
from guards import examples, unchanged

# ---- bytes and MACs


def test_file_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b").write_bytes(b"45")
    assert file_bytes(tmp_path / "a") == 3 and file_bytes(str(tmp_path)) == 5
    with pytest.raises(FileNotFoundError):
        file_bytes(tmp_path / "none")


def test_tied_tensors_count_once():
    m = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    m[1].weight = m[0].weight
    assert count_parameters(m) == 16 + 8 and tensor_bytes(m) == 4 * 16 + 4 * 8 + 4 * 8 + 8
    assert count_parameters(nn.Flatten()) == tensor_bytes(nn.Flatten()) == 0


def test_lenet_by_hand():
    found = macs(LeNet5(), torch.zeros(1, 1, 28, 28))
    assert found == dict(conv1=288_000, conv2=1_600_000, fc1=400_000, fc2=5_000) and sum(found.values()) == 2_293_000
    assert sum(macs(LeNet5(), torch.zeros(3, 1, 28, 28)).values()) == 3 * 2_293_000


@given(
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 1),
)
@settings(max_examples=examples(40), deadline=None)
def test_convolutions_agree_with_pytorchs_counter(dims, transposed, groups, kernel, stride, padding):
    cls = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    m, x = cls(4, 6, kernel, stride, padding, groups=groups, bias=False), torch.zeros(2, 4, *[5] * dims)
    with FlopCounterMode(display=False) as peer:
        m(x)
    assert 2 * macs(m, x)[""] == peer.get_total_flops()


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_agrees_with_pytorchs_counter(batch_first):
    m = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=6, vdim=4).train()
    q, k, v = torch.zeros(3, 5, 8), torch.zeros(3, 7, 6), torch.zeros(3, 7, 4)
    args = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    with FlopCounterMode(display=False) as peer:
        m(*args, need_weights=True)
    assert 2 * macs(m, args)[""] == peer.get_total_flops()


def test_encoder_layer_is_counted_inside():
    m = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert macs(m, torch.zeros(1, 3, 8)) == {
        "self_attn": 4 * 3 * 64 + 2 * 9 * 8,
        "linear1": 3 * 8 * 16,
        "linear2": 3 * 16 * 8,
    }


class Wrapper(nn.Module):
    "As later chapters wrap layers; it may or may not call the wrapped layer's own forward."

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.layer(x) if self.call else nn.functional.linear(x, self.layer.weight)


@pytest.mark.parametrize("call", [True, False])
def test_wrapped_layers_count_once(call):
    m = nn.Sequential(Wrapper(nn.Linear(3, 5), call), nn.ReLU())
    assert macs(m, torch.zeros(2, 3)) == {"0": 30}


def test_macs_leaves_no_trace():
    m = LeNet5().train()
    m.fc1.eval()
    macs(m, torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match="layer conv1, Conv2d"):
        macs(m, torch.zeros(1, 9))
    assert m.training and not m.fc1.training and not any(x._forward_hooks for x in m.modules())
    assert macs(nn.Sequential(a := nn.Linear(2, 2), a), torch.zeros(1, 2)) == {"0": 8}
    assert macs(nn.Flatten(), torch.zeros(1, 2)) == {}


# ---- time and memory


def test_latency_shape_and_order():
    calls = []
    found = latency({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=5, warmup=1, at_least=0)
    assert list(found) == ["a", "b"] and found["a"].ratio == found["a"].ratio_low == 1
    assert (
        calls[:4] == ["a", "a", "b", "b"]
        and all(set(calls[i : i + 2]) == {"a", "b"} for i in range(4, 14, 2))
        and len(calls) == 14
    )
    for t in found.values():
        assert (
            0 <= t.low <= t.median <= t.high
            and len(t.times) == 5
            and t.ratio_low <= t.ratio <= t.ratio_high
            and t.threads >= 1
        )


def test_latency_errors():
    import gc

    with pytest.raises(ValueError, match="empty"):
        latency({})
    with pytest.raises(ValueError, match="repeats"):
        latency({"a": int}, repeats=1)
    with pytest.raises(ZeroDivisionError):
        latency({"a": lambda: 1 / 0})
    assert gc.isenabled()


def test_peak_memory_sees_what_is_gone_afterwards():
    assert 38e6 < peak_memory(lambda: torch.ones(10_000_000).sum()) < 60e6
    assert peak_memory(lambda: None) < 5e6
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)


# ---- SQNR

floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=20))
@settings(max_examples=examples(100), deadline=None)
def test_sqnr_is_its_formula(pairs):
    x, e = torch.tensor(pairs, dtype=torch.float64).T
    y = x + e
    e = y - x
    if not e.any():
        assert sqnr(x, y) == math.inf
    elif not x.any():
        assert sqnr(x, y) == -math.inf
    else:
        assert sqnr(x, y) == pytest.approx(
            10 * (math.log10(math.fsum((x / x.abs().max()) ** 2)) - math.log10(math.fsum((e / e.abs().max()) ** 2)))
            + 20 * (math.log10(x.abs().max()) - math.log10(e.abs().max())),
            abs=1e-6,
        )


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_sqnr_does_not_depend_on_the_scale(scale):
    x = torch.tensor([3.0, 4.0], dtype=torch.float64) * scale
    assert sqnr(x, x * 1.1) == pytest.approx(20, abs=1e-9)


def test_sqnr_edges():
    x = torch.tensor([1.0, 2.0])
    assert sqnr(x.half(), x) == math.inf and sqnr(torch.tensor(2.0), torch.tensor(2.2)) == pytest.approx(20, abs=1e-4)
    assert sqnr(torch.tensor([3, 4]), torch.tensor([3.3, 4.4])) == pytest.approx(20, abs=1e-4)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            sqnr(x, x * bad)
        with pytest.raises(ValueError, match="finite"):
            sqnr(x * bad, x)
    with pytest.raises(ValueError, match="same shape"):
        sqnr(x, x[:1])
    with pytest.raises(ValueError, match="empty"):
        sqnr(x[:0], x[:0])


# ---- intervals


@given(
    st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.5, 0.9, 0.95, 0.999]),
)
@settings(max_examples=examples(100), deadline=None)
def test_wilson_agrees_with_scipy(kn, confidence):
    low, high = wilson(*kn, confidence)
    peer = scipy.stats.binomtest(*kn).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=1e-9) and 0 <= low <= kn[0] / kn[1] <= high <= 1


@pytest.mark.parametrize("k, n, c", [(0, 0, 0.95), (2, 1, 0.95), (-1, 3, 0.95), (1, 2, 0), (1, 2, 1)])
def test_wilson_refuses(k, n, c):
    with pytest.raises(ValueError):
        wilson(k, n, c)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=examples(60), deadline=None)
def test_mcnemar_is_a_fair_coin(b, c):
    assert mcnemar(b, c) == pytest.approx(
        scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0, abs=1e-9
    ) and mcnemar(b, c) == mcnemar(c, b)


# ---- compare and reports

NAME = '<script>alert("1")</script> & $x_1$ 90 %/../ü'


@pytest.fixture(scope="module")
def split():
    g = torch.Generator().manual_seed(0)
    return Split(torch.rand(40, 1, 28, 28, generator=g), torch.arange(40) % 10)


@pytest.fixture(scope="module")
def report(split):
    return compare({"fp32": LeNet300(), NAME: LeNet300(seed=1)}, split, batches=(1, 64), repeats=3, progress=False)


def test_compare_measures_what_was_loaded(split, tmp_path):
    seen = []

    def load(path, model):
        seen.append(path.name)
        back = load_plain(path, model)
        nn.init.zeros_(back.fc3.weight)
        nn.init.zeros_(back.fc3.bias)
        back.fc3.bias.data[3] = 1
        return back

    r = compare(
        {"a": LeNet300(), "b/../b": LeNet300(seed=2)},
        split,
        save=save_plain,
        load=load,
        folder=tmp_path / "new",
        batches=(),
        progress=False,
    )
    assert [m.accuracy for m in r.rows] == [0.1, 0.1] and r.rows[1].p == 1
    assert sorted(seen) == sorted(f.name for f in (tmp_path / "new").iterdir())
    assert (
        r["a"].bytes == (tmp_path / "new" / seen[0]).stat().st_size
        and r["a"].bits_per_weight == 8 * r["a"].bytes / 266_610
    )
    again = compare({"net": LeNet300(), "file": tmp_path / "new" / seen[1]}, split, batches=(), progress=False)
    assert again["file"].bytes == r["b/../b"].bytes


def test_compare_does_not_change_models(split):
    m = LeNet300().train()
    before = copy.deepcopy(m.state_dict())
    compare({"m": m}, split, batches=(2,), repeats=2, progress=False)
    assert m.training and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_baseline_comes_first(split):
    r = compare({"a": LeNet300(), "b": LeNet5()}, split, baseline="b", batches=(), progress=False)
    assert [m.name for m in r.rows] == ["b", "a"] and r["a"].bits_per_weight == 8 * r["a"].bytes / 431_080


def test_compare_refuses(split):
    with pytest.raises(ValueError, match="empty"):
        compare({}, split)
    with pytest.raises(ValueError, match="empty"):
        compare({"a": LeNet300()}, split[:0], progress=False)
    with pytest.raises(TypeError, match="models"):
        compare({"a": 3}, split)
    with pytest.raises(ValueError, match="baseline"):
        compare({"a": LeNet300()}, split, baseline="b")
    with pytest.raises(ValueError, match="batches"):
        compare({"a": LeNet300()}, split, batches=(0,))
    with pytest.raises(ValueError, match="pass the model"):
        compare({"a": __file__}, split, progress=False)

    def broken(path, model):
        raise OSError("no")

    with pytest.raises(OSError) as e:
        compare({"a": LeNet300()}, split, load=broken, progress=False)
    assert "'a'" in "".join(getattr(e.value, "__notes__", ["'a'"]))


class NoWeights(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]


def test_model_without_parameters(split):
    r = compare(
        {"none": NoWeights()},
        split,
        save=lambda m, p: p.write_bytes(b"0"),
        load=lambda p, m: m,
        batches=(1,),
        repeats=2,
        progress=False,
    )
    assert math.isnan(r["none"].bits_per_weight) and str(r) and r.pareto()


def test_own_question(split):
    r = compare(
        {"a": LeNet300()}, split, right=lambda m, d: torch.tensor([True, True, False]), batches=(), progress=False
    )
    assert r["a"].n == 3 and r["a"].accuracy == pytest.approx(2 / 3)


def test_report_text_is_aligned(report):
    lines = str(report).splitlines()
    assert lines[0].startswith("technique") and len(lines[0]) == len(lines[1]) == len(lines[2]) == len(lines[3])
    assert report.facts["threads"] >= 1 and set(report.facts) == set(machine())


class Well(HTMLParser):
    "Collects tags and text, and complains when tags do not nest."

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        (tag in ("meta", "br")) or self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_page_is_self_contained(report, tmp_path):
    page = report.to_html(tmp_path / "r.html", title=NAME).read_text(encoding="utf8")
    p = Well()
    p.feed(page)
    p.close()
    assert not p.open and "script" not in p.tags and "svg" in p.tags and NAME in p.text
    assert (
        not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href").replace('href="#', 'ref="#'))
        and "viewport" in page
    )
    import socket, getpass

    assert (
        socket.gethostname() not in page.replace("localhost", "")
        and str(tmp_path) not in page
        and list(tmp_path.iterdir()) == [tmp_path / "r.html"]
    )
    with pytest.raises(OSError):
        report.to_html(tmp_path / "no" / "r.html")


def test_failed_write_leaves_the_old_page(report, tmp_path, monkeypatch):
    path = report.to_html(tmp_path / "r.html")
    old = path.read_text()
    monkeypatch.setattr("modelzip.measure.os.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report.to_html(path, title="new")
    assert path.read_text() == old and len(list(tmp_path.iterdir())) == 1


def test_json_round_trip(report):
    report = copy.deepcopy(report).add("note", {"fp32": "ü <b>"})
    again = Report.from_json(report.to_json())
    assert again == report and again.rows[0].milliseconds.keys() == {1, 64} and str(again) == str(report)
    for bad in ("", "[]", "{}", '{"facts": {}, "rows": [{"name": "a"}]}', '{"facts": {}, "rows": []}', "3"):
        with pytest.raises(ValueError):
            Report.from_json(bad)


def test_more_columns(report):
    r = copy.deepcopy(report).add("load ms", {"fp32": 1.25}).add("who", {NAME: "<i>me</i>"})
    assert "load ms" in str(r) and "1.25" in str(r) and "&lt;i&gt;" in r._repr_html_()
    with pytest.raises(KeyError, match="fp32"):
        r.add("x", {"absent": 1})
    assert list(r.to_frame()["load ms"].dropna()) == [1.25]


def test_frame_has_plain_numbers(report):
    f = report.to_frame()
    assert (
        f.loc["fp32", "ratio_1"] == 1
        and {"bytes", "accuracy", "low", "high", "ms_64_low", "p"} <= set(f)
        and f.index.name == "name"
    )


def test_pareto_labels_do_not_cover_each_other():
    rows = [
        Measurement(f"technique number {i}", int(1e6 / 1.08**i), 32 / 1.08**i, 0.98 - 0.0004 * i, 0.97, 0.99, 1000)
        for i in range(14)
    ]
    fig = Report(rows).pareto()
    fig.canvas.draw()
    boxes = [t.get_window_extent() for t in fig.axes[0].texts if t.get_text()]
    assert len(boxes) == 14 and sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]) <= 2


def test_empty_report():
    with pytest.raises(ValueError, match="at least one"):
        Report([])


# ---- what runs is counted, and nothing of the caller's changes


class Program(nn.Module):
    "A function of a module and its inputs; one layer, one bare parameter, one vector."

    def __init__(self, f):
        super().__init__()
        self.f, self.fc, self.w, self.v = (
            f,
            nn.Linear(8, 8),
            nn.Parameter(torch.randn(8, 6)),
            nn.Parameter(torch.randn(8)),
        )

    def forward(self, x, **more):
        return self.f(self, x, **more)


X = torch.randn(2, 5, 8)
F = nn.functional
PROGRAMS = {  # program → MACs outside of `fc`, MACs of `fc`
    "linear": (lambda m, x: F.linear(x, m.w.T), 480, 0),
    "at": (lambda m, x: x @ m.w, 480, 0),
    "layer too": (lambda m, x: m.fc(x) @ m.w, 480, 640),
    "the layer's weight": (lambda m, x: F.linear(x, m.fc.weight), 640, 0),
    "vector": (lambda m, x: x @ m.v, 80, 0),
    "dot": (lambda m, x: m.v @ m.v, 8, 0),
    "einsum": (lambda m, x: torch.einsum("bld,de->ble", x, m.w), 480, 0),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 1), 480, 0),
    "inner": (lambda m, x: torch.inner(x, m.w.T), 480, 0),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), 800, 0),
    "heads": (lambda m, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None, :, :4]), 2 * 25 * 12, 0),
    "causal": (lambda m, x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True), 800, 0),
    "scores by hand": (lambda m, x: (x @ x.mT).softmax(-1) @ x, 800, 0),
    "conv": (lambda m, x: F.conv1d(x.mT, m.w.T[:, :, None]), 480, 0),
    "conv_tbc": (lambda m, x: torch.conv_tbc(x, m.w[None], torch.zeros(6)), 480, 0),
    "addmm": (lambda m, x: torch.addmm(torch.zeros(6), x[0], m.w), 240, 0),
    "baddbmm": (lambda m, x: torch.baddbmm(torch.zeros(1), x, m.w.expand(2, 8, 6)), 480, 0),
    "addmv": (lambda m, x: torch.addmv(x[0, :, 0], x[0], m.v), 40, 0),
    "addbmm": (lambda m, x: torch.addbmm(torch.zeros(5, 6), x, m.w.expand(2, 8, 6)), 480, 0),
    "vmap": (lambda m, x: torch.vmap(lambda r: r @ m.w)(x), 480, 0),
    "bilinear": (lambda m, x: F.bilinear(x, x, torch.ones(3, 8, 8)), 10 * 3 * 72, 0),
    "sparse": (lambda m, x: torch.sparse.mm(torch.eye(5, 8).to_sparse(), m.w), 30, 0),
    "csr": (lambda m, x: m.w.T.to_sparse_csr() @ x[0].T, 240, 0),
    "int8": (
        lambda m, x: torch._int_mm(torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)),
        32 * 8 * 16,
        0,
    ),
    "in place": (lambda m, x: x.mul_(2) @ m.w, 480, 0),
    "none": (lambda m, x: x + 1, 0, 0),
    "several": (lambda m, x: (m.fc(x), m.fc(x[:1]), x @ m.w), 480, 960),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_runs_is_counted(name):
    f, outside, inside = PROGRAMS[name]
    m, x = Program(f), X.clone()
    with unchanged(m, x):
        found = macs(m, x)
    assert found.get("", 0) == outside and found["fc"] == inside
    if name in (
        "linear",
        "at",
        "layer too",
        "einsum",
        "tensordot",
        "scores by hand",
        "conv",
        "addmm",
        "baddbmm",
        "vmap",
        "several",
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as peer:
            m(x)
        assert 2 * (outside + inside) == peer.get_total_flops()


@pytest.mark.parametrize(
    "layer, x, right",
    [
        (nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True), X, 10 * 2 * (16 * 12 + 16 * 12)),
        (nn.LSTM(8, 4, proj_size=2), X, 10 * (16 * 10 + 8)),
        (nn.GRU(8, 4), X, 10 * 12 * 12),
        (nn.RNN(8, 4), X, 10 * 4 * 12),
        (nn.LSTMCell(8, 4), X[0], 5 * 16 * 12),
        (nn.GRUCell(8, 4), X[0], 5 * 12 * 12),
    ],
)
def test_recurrent_layers(layer, x, right):
    assert macs(layer, x) == {"": right}


@given(st.permutations(["query", "key", "value"]), st.integers(0, 3), st.booleans())
@settings(max_examples=examples(15), deadline=None)
def test_attention_in_any_order_of_keywords(order, places, first):
    m = nn.MultiheadAttention(8, 2, batch_first=first, kdim=6, vdim=4)
    q, k, v = torch.zeros(4, 1, 8), torch.zeros(6, 1, 6), torch.zeros(6, 1, 4)
    given = dict(zip(("query", "key", "value"), (t.transpose(0, 1) if first else t for t in (q, k, v))))
    args = tuple(given[n] for n in ("query", "key", "value")[:places])
    rest = {n: given[n] for n in order if n not in ("query", "key", "value")[:places]}

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = m

        def forward(self):
            return self.m(*args, **rest)

    assert macs(Caller(), ()) == {"m": 2 * 4 * 64 + 6 * 8 * 10 + 2 * 4 * 6 * 8}


def test_gpt2_and_others_from_transformers():
    t = pytest.importorskip("transformers")
    net = t.GPT2Model(
        t.GPT2Config(
            n_embd=16,
            n_layer=1,
            n_head=2,
            vocab_size=50,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    ).eval()
    ids = torch.arange(6)[None]
    found = macs(net, {"input_ids": ids})
    assert (
        found["h.0.attn.c_attn"] == 6 * 16 * 48
        and found["h.0.attn"] == 2 * 36 * 16
        and found["h.0.mlp.c_fc"] == 6 * 16 * 64
    )
    with torch.no_grad(), FlopCounterMode(display=False) as peer:
        net(ids)
    assert 2 * sum(found.values()) == peer.get_total_flops()


def test_compressed_layers_cost_what_they_stand_for():
    from modelzip.kernels import use_kernels
    from modelzip.prune import prune_model, sparsify_model, use_sparse_products
    from modelzip.quant import quantize_model

    x = torch.rand(3, 1, 28, 28)
    whole = macs(LeNet5(), x)
    for how in (dict(bits=8), dict(bits=4, group=32), dict(bits=2, symmetric=False)):
        q = quantize_model(LeNet5(), **how)
        assert macs(q, x) == whole
        for n in 1, 3:
            assert macs(use_kernels(q), x[:n]) == macs(LeNet5(), x[:n])
    sparse = sparsify_model(prune_model(LeNet300(), 0.9, scope="layer"))
    assert macs(sparse, x) == macs(LeNet300(), x)  # expanded, then multiplied
    assert macs(use_sparse_products(sparse), x)["fc1"] == 3 * 23_520  # one in ten


def test_hidden_work_is_refused_unless_a_rule_tells():
    @torch.library.custom_op("modelzip_test_measure::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    class Opaque(nn.Module):
        def forward(self, x):
            return twice(x)

    m = nn.Sequential(nn.Linear(4, 4), Opaque())
    with pytest.raises(ValueError, match="1 .Opaque. runs modelzip_test_measure::twice.*mac_rules"):
        macs(m, torch.zeros(4, 4))
    mac_rules[Opaque] = lambda m, x, y: 4 * x[0].numel()
    try:
        assert macs(m, torch.zeros(4, 4)) == {"0": 64, "1": 64}
    finally:
        del mac_rules[Opaque]


def test_wrappers_with_more_than_a_layer_are_counted_whole():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, x):
            return self.layer(x) + self.b(self.a(x))

    assert macs(nn.Sequential(Lora()), X) == {"0": 640, "0.a": 160, "0.b": 160}


def test_a_run_leaves_caches_buffers_and_random_numbers():
    class Streaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.grid = nn.Linear(8, 8), None
            self.register_buffer("seen", torch.zeros(()))
            self.e = nn.Embedding(3, 8, max_norm=0.1)

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.rand(8)
            self.seen += 1
            return self.fc(F.relu_(x)) + self.grid + self.e(torch.zeros(5, dtype=torch.long))

    m, x = Streaming().train(), torch.randn(2, 5, 8)
    with unchanged(m, x):
        assert macs(m, x) == {"fc": 640, "e": 0}


# ---- bytes, memory, intervals, decibels


def test_bytes_of_views_and_of_meta():
    w = torch.zeros(10)
    assert tensor_bytes(nn.ParameterList([w, w[:5], w.view(2, 5)])) == 40
    assert tensor_bytes(nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta"))) == 160
    m = nn.Module()
    m.register_buffer("a", torch.zeros(1).expand(100))
    m.register_buffer("b", torch.zeros(4, 4)[:, ::2])
    m.register_buffer("c", torch.zeros(100)[3:10])
    m.register_buffer("d", torch.zeros(0))
    m.register_buffer("e", torch.ones(3, dtype=torch.int8))
    m.register_buffer("f", torch.eye(3).to_sparse_csr())
    assert tensor_bytes(m) == 4 + 32 + 28 + 0 + 3 + (4 * 8 + 3 * 8 + 3 * 4)


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4
    )
)
@settings(max_examples=examples(30), deadline=None)
def test_bytes_of_any_views_of_one_storage(views):
    base, m = torch.arange(60.0), nn.Module()
    touched = set()
    for i, (start, step, rows, columns) in enumerate(views):
        t = base.as_strided((rows, columns), (step, 2), start)
        m.register_buffer(f"b{i}", t)
        touched |= {int(v) for v in t.flatten()}
    assert tensor_bytes(m) == 4 * len(touched)


def test_an_error_of_the_function_is_its_own():
    def missing():
        open("/nowhere/at/all")

    with pytest.raises(FileNotFoundError):
        peak_memory(missing)


@given(st.integers(2, 40), st.sampled_from([0.5, 0.8, 0.95, 0.99]))
@settings(max_examples=examples(20), deadline=None)
def test_the_interval_covers_what_it_says(n, confidence):
    low, high, said = measure.median_interval(np.arange(float(n)), confidence)
    right = 1 - 2 * scipy.stats.binom.cdf(low, n, 0.5)  # low + 1 values, or fewer heads, lie outside on each side
    assert said == pytest.approx(right) and (said >= confidence or low == 0)


def test_two_rounds_do_not_claim_95_percent():
    assert latency({"a": int}, repeats=2, warmup=0, at_least=0)["a"].confidence == 0.5
    assert latency({"a": int}, repeats=6, warmup=0, at_least=0)["a"].confidence >= 0.95


def test_decibels_at_the_ends_of_the_range():
    d = lambda *v: torch.tensor(v, dtype=torch.float64)
    assert sqnr(d(1e308), d(-1e308)) == pytest.approx(-20 * math.log10(2)) and sqnr(
        d(5e-324), d(1e-323)
    ) == pytest.approx(0)
    assert sqnr(d(1e308, 0), d(1e308, 1e-300)) == pytest.approx(20 * 608) and math.isfinite(sqnr(d(1e-300), d(1e308)))
    assert math.isfinite(sqnr(torch.tensor([1 << 60]), torch.tensor([(1 << 60) + 1]))) and sqnr(
        torch.tensor([2**63 - 1]), torch.tensor([-(2**63)])
    ) == pytest.approx(-6.0206, abs=1e-3)
    with pytest.raises(ValueError, match="real"):
        sqnr(torch.ones(2) * 1j, torch.ones(2))


@pytest.mark.parametrize(
    "text",
    [
        '{"facts": {}, "rows": [5]}',
        '{"facts": 3, "rows": [{}]}',
        '{"facts": {}, "rows": []}',
        "[" * 100_000,
        '{"rows": {"a": 1}}',
        "",
        "null",
        (
            '{"facts": {}, "rows": [{"name": "a", "bytes": "many", "bits_per_weight": 1, "accuracy": 1, "low": 1,'
            ' "high": 1, "n": 3, "milliseconds": {}, "ratios": {}}]}'
        ),
    ],
)
def test_no_report(text):
    with pytest.raises(ValueError, match="no report"):
        Report.from_json(text)


def test_comparing_leaves_models_that_load_hands_back():
    m = LeNet300().train()
    split = Split(torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.long))
    with unchanged(m, split.x):
        compare({"m": m}, split, load=lambda path, model: m, batches=(2,), repeats=2, progress=False)


def test_mcnemar_with_large_and_numpys_numbers():
    assert mcnemar(np.int64(200), np.int64(300)) == pytest.approx(scipy.stats.binomtest(200, 500).pvalue)
    assert mcnemar(20_000, 20_400) == pytest.approx(scipy.stats.binomtest(20_000, 40_400).pvalue, rel=1e-6)


def test_packed_sequences():
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 8), torch.randn(3, 8)])
    assert macs(nn.LSTM(8, 4), packed) == {"": 8 * 16 * 12}


def test_instruments_leave_what_they_look_at(tmp_path):
    m, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3), nn.BatchNorm1d(3)).train(), torch.randn(4, 8)
    m[2].eval()
    split = Split(x, torch.arange(4) % 3)
    with unchanged(m, x, split.y):
        (
            macs(m, x),
            tensor_bytes(m),
            count_parameters(m),
            save_plain(m, tmp_path / "m.safetensors"),
            load_plain(tmp_path / "m.safetensors", m),
            sqnr(x, x + 1),
            measure.is_right(m, split),
        )
        compare({"m": m, "n": m}, split, batches=(1, 3), repeats=2, progress=False)
        peak_memory(lambda: None)
        machine()


def test_a_compiled_model_is_refused_by_name():
    with pytest.raises(ValueError, match="compiled"):
        macs(torch.compile(nn.Linear(8, 3), backend="eager"), X)


class Calls(nn.Module):
    "One function of its input."

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.cdist(x, x),
        torch.linalg.inv,
        torch.linalg.qr,
        torch.linalg.eigh,
        torch.matrix_exp,
        torch.linalg.cholesky,
        torch.linalg.pinv,
        lambda x: torch.linalg.solve(x, x),
        lambda x: torch.linalg.solve_triangular(x, x, upper=True),
        lambda x: torch.linalg.lstsq(x, x)[0],
        torch.linalg.svdvals,
    ],
)
def test_products_inside_an_operation_are_named(f):
    with pytest.raises(ValueError, match=r"\(Calls\) runs aten::\w+, whose products cannot be seen"):
        macs(Calls(f), torch.eye(40))


@pytest.mark.parametrize(
    "f, right",
    [
        (lambda x: torch.nn.functional.normalize(x), 0),
        (lambda x: torch.linalg.cross(x[:, :3], x[:, :3]), 0),
        (torch.cov, 40**3),
        (lambda x: torch.linalg.norm(x), 0),
    ],
)
def test_what_looks_like_linear_algebra_and_is_not(f, right):
    assert sum(macs(Calls(f), torch.eye(40)).values()) == right
