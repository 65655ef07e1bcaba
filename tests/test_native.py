"No file reaches native code with what that cannot take, and no small file makes a large network."

import re, time

import pytest
import torch
from torch import nn

import mutations, native
from guards import examples
from modelzip.archive import PackError
from modelzip.data import LeNet5, model_builders, register_model
from modelzip.exchange import from_npz, from_safetensors, to_npz, to_safetensors
from modelzip.pack import load, save
from modelzip.workshop import asked


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_no_signal_ever(tmp_path):
    """Loading, and one forward pass, of files that lie about layers of every class: refused, or a Python exception,
    or an answer; in 2 GiB and ten seconds each."""
    said = native.fuzz(len(native.SMALL) + examples(3 * len(native.NAMES) // 2 + 2), tmp_path, -len(native.SMALL))
    bad = {
        i: (native.layer_of(i) if i >= 0 else [*native.SMALL][-1 - i], what)
        for i, what in said.items()
        if what.startswith("BAD")
    }
    assert not bad, bad
    small = {[*native.SMALL][-1 - i]: what for i, what in said.items() if i < 0}
    assert {k for k, v in small.items() if not v.startswith("refused")} <= {
        "a group of 50,000,000",
        "a group of 2⁴⁸",
    }, small
    assert {native.layer_of(i) for i in said if i >= 0} >= {n for n in native.NAMES} and sum(
        what.startswith("ran") for what in said.values()
    ) > len(said) / 10


# ---- messages, and what is still allowed --------------------------------------------------------------------------
class Words(nn.LSTM):
    "Somebody's own."


class Look(nn.MultiheadAttention):
    "Somebody's own."


@pytest.mark.parametrize(
    "make, how, message",
    [
        (
            lambda: Words(3, 4),
            {"attributes": {"hidden_size": 0}},
            r"module 0 \(LSTM\) has hidden_size=0; it may be a whole number from 1",
        ),
        (
            lambda: Words(3, 4),
            {"attributes": {"hidden_size": 7}},
            r"weight_ih_l0 of shape \[16, 3\]; by its attributes it may be \[28, 3\]",
        ),
        (
            lambda: Words(3, 4),
            {"shapes": {"weight_hh_l0": [0, 3]}},
            r"weight_hh_l0 of shape \[0, 3\]; by its attributes it may be \[16, 4\]",
        ),
        (lambda: Look(8, 2), {"attributes": {"num_heads": 0}}, "num_heads=0; it may be a whole number from 1"),
        (lambda: Look(8, 2), {"attributes": {"head_dim": 3}}, "head_dim=3; by its other attributes it may be 4"),
        (lambda: nn.LSTM(3, 4), {"shapes": {"weight_hh_l0": [0, 3]}}, r"may be \[16, 4\]"),
        (
            lambda: nn.Conv2d(4, 4, 3),
            {"class": "Conv2d", "in_channels": 4, "out_channels": 4, "kernel_size": [3, 3], "stride": [0, 1]},
            r"'0' \(Conv2d\) has stride=\(0, 1\); it may be a whole number from 1, or one for each dimension",
        ),
        (
            lambda: nn.EmbeddingBag(5, 4),
            {"class": "EmbeddingBag", "num_embeddings": 5, "embedding_dim": 4, "mode": "median"},
            "mode='median'; it may be 'sum' or 'mean' or 'max'",
        ),
        (
            lambda: nn.GroupNorm(2, 4),
            {"class": "GroupNorm", "num_groups": 0, "num_channels": 4},
            "num_groups=0; it may be a whole number from 1",
        ),
    ],
)
def test_an_error_says_which_attribute(tmp_path, make, how, message):
    m = nn.Sequential(make())
    manifest, payload = mutations.opened(save(m, tmp_path / "x.mz", archive=False))
    entry = manifest["layers"]["0"]
    manifest["layers"]["0"] = (
        how
        if "class" in how
        else {"module": entry.get("module", entry.get("class"))} | {k: entry.get(k, {}) | v for k, v in how.items()}
    )
    (tmp_path / "y.mz").write_bytes(mutations.sealed(manifest, payload))
    with pytest.raises(PackError) as e:
        load(tmp_path / "y.mz", m)
    assert len(str(e.value)) < 600 and re.search(message, str(e.value)), e.value


def test_own_classes_still_change_their_size(tmp_path):
    "A smaller one of somebody's own class goes into a larger one's place: attributes and shapes agree."
    small, large = nn.Sequential(Words(3, 2, bidirectional=True)), nn.Sequential(Words(3, 4, bidirectional=True))
    x = torch.randn(5, 2, 3)
    for write, read in (save, load), (to_npz, from_npz), (to_safetensors, from_safetensors):
        got = read(write(small.eval(), tmp_path / "x"), large)
        with torch.no_grad():
            assert torch.equal(got(x)[0], small(x)[0])


def test_what_no_file_may_say_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="'0' .*padding=.5000, 5000, 5000, 5000.; it may be"):
        save(nn.Sequential(nn.ZeroPad2d((5000,) * 4)), tmp_path / "x.mz")
    assert not (tmp_path / "x.mz").exists()


# ---- builders -----------------------------------------------------------------------------------------------------
class Tabled(nn.Module):
    "Tensors that no state dict has: a buffer, an attribute, one in a list; and a number that is computed from them."

    def __init__(self, width=4, extra=1.0):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.register_buffer("table", extra * torch.arange(width).float(), persistent=False)
        self.plain, self.listed, self.number = (
            torch.ones(width) * extra,
            [torch.full((width,), extra)],
            float(self.table.sum()),
        )

    def forward(self, x):
        return self.fc(x + self.table + self.plain + self.listed[0]) * self.number


@pytest.mark.parametrize(
    "make",
    [
        lambda width=4: Tabled(width),
        lambda width=4: nn.Sequential(nn.Linear(width, 3), nn.BatchNorm1d(3)),
        lambda width=4: nn.Sequential(nn.Linear(width, width).requires_grad_(False), nn.Embedding(9, 2).half()),
    ],
)
def test_a_builder_is_called_as_before(tmp_path, monkeypatch, make):
    "Whether a network could be built without memory is not to be seen in what is loaded."
    register_model("native table", make)
    try:
        m = model_builders["native table"](width=6).eval()
        got = load(save(m, tmp_path / "x.mz"))
        for (n, a), (k, b) in zip(m.named_parameters(), got.named_parameters(), strict=True):
            assert (
                n == k
                and torch.equal(a, b)
                and a.requires_grad == b.requires_grad
                and a.dtype == b.dtype
                and b.device.type == "cpu"
            )
        x = torch.randn(2, 6)
        if isinstance(m, Tabled):
            assert torch.equal(got(x), m(x)) and torch.equal(got.listed[0], m.listed[0])
        with torch.device("meta"):
            assert not any(t.is_meta for t in load(tmp_path / "x.mz").state_dict().values())
    finally:
        del model_builders["native table"]


def test_a_network_that_lost_most_of_its_weights(tmp_path):
    "The builder's network may be far larger than what remains of it, if it takes no memory."
    register_model("native wide", lambda: nn.Sequential(nn.Linear(50000, 20000), nn.ReLU(), nn.Linear(20000, 2)))
    try:
        with torch.device("meta"):
            m = model_builders["native wide"]()
        m[0], m[2] = nn.Linear(10, 3), nn.Linear(3, 2)
        got = load(save(m.eval(), tmp_path / "x.mz"))
        assert torch.equal(got(torch.ones(1, 10)), m(torch.ones(1, 10)))
    finally:
        del model_builders["native wide"]


def test_counting_is_of_this_thread():
    import threading

    with asked.counted(3):
        done = []
        t = threading.Thread(target=lambda: done.append(LeNet5()))
        t.start()
        t.join()
        assert done and nn.Linear(2, 2).weight is not None
        with pytest.raises(asked.TooMuch):
            LeNet5()
    assert LeNet5().fc1.weight is not None


def test_an_honest_group_that_is_longer_than_rows():
    from modelzip.quant import quantize

    began = time.process_time()
    w = torch.randn(20, 30)
    a, b = quantize(w, 4, group=10**9), quantize(w, 4, axis=0, scale_dtype=torch.float16)
    assert torch.equal(a.dequantize(), b.dequantize()) and a.scale.shape == (20, 1) and time.process_time() - began < 1
