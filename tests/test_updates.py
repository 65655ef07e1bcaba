"""Updates: a model from what has changed and the file that it changed from is the model, or there is an error."""

import copy, functools, itertools, json, os, random, zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import mutations
from guards import FUZZ, examples, share
from modelzip import pack
from modelzip.archive import PackError, open_file
from modelzip.data import LeNet5, seeded
from modelzip.pack import diff, inspect, load, read_tensor, save
from modelzip.prune import prune_model, sparsify_model
from modelzip.quant import CompressedTensor, pack_bits, quantize_model, unpack_bits
from modelzip.trellis import trellis
from modelzip.workshop import manifest as manifests, updates
from modelzip.workshop.manifest import read_manifest
from modelzip.workshop.updates import MOST_BASES, content_of


def changed(model, seed, share=0.5):
    "The same model, a little later: some of its tensors have other bits, some of them in most places, some in few."
    new, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    chance = lambda: torch.rand((), generator=rng).item()
    for item in pack.items(new):
        parts = item.value.parts() if isinstance(item.value, CompressedTensor) else {"": item.value}
        packed = {} if "" in parts else item.value.packed_parts()
        for k, t in parts.items():
            if chance() > share or k in ("codes", "positions") and k not in packed or k == "stream":
                continue
            t = t.data
            if t.is_floating_point():
                t += t * 0.01 * torch.randn(t.shape, generator=rng).to(t.dtype)
            elif t.dtype == torch.bool:
                t ^= True
            elif k not in packed and "" in parts:
                t += 1
    return new


LENETS = "LeNet, 4 bits", "LeNet, codebook", "sparse", "sparse, 4 bits", "trellis", "other widths", "expanded"


def made():
    "Name, and an old model and a new one."
    for name, m in mutations.sorts():
        yield name, (m, changed(m, 1))
    with seeded(0):
        m = LeNet5(channels=[4, 6], hidden=40).eval()
        m.conv1.bias.data[:3] = torch.tensor([torch.nan, -0.0, torch.inf])
        n = copy.deepcopy(m)
        for p in (*n.conv2.parameters(), *n.fc1.parameters()):
            p.data += 0.02 * p.data.std() * torch.randn_like(p)
        pruned = [prune_model(x, 0.7, scope="layer") for x in (m, n)]
        examples = [torch.rand(4, 1, 28, 28)]
        m.conv1.bias.data[:3] = n.conv1.bias.data[:3] = 0.5
    yield "LeNet, 4 bits", (quantize_model(m, 4, group=50), quantize_model(n, 4, group=50))
    yield "LeNet, codebook", (quantize_model(m, 3, codebook="kmeans"), quantize_model(n, 3, codebook="kmeans"))
    yield "sparse", tuple(map(sparsify_model, pruned))
    yield "sparse, 4 bits", tuple(sparsify_model(x, bits=4) for x in pruned)
    yield "trellis", tuple(trellis(x, examples, bits=3.0) for x in (m, n))
    yield "other widths", (quantize_model(m, 4), quantize_model(n, 5))
    yield "expanded", (quantize_model(m, 8), n)


@functools.cache
def models():
    "Name → an old model and a new one, when the first test asks."
    found = dict(made())
    assert [*found] == NAMES
    return found


NAMES = [*mutations.SORTS, *LENETS]


@pytest.mark.hypothesis
@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_the_model(tmp_path, name):
    "All that loads from it is what loads from a file of its own, whatever its base is like."
    old, new = models()[name]
    ways = [*itertools.product([True, False], repeat=2)]  # in turn; all in a search
    for i, (below, archive) in enumerate(ways if FUZZ else ways[NAMES.index(name) % 4 :][:1]):
        base, full = save(old, tmp_path / "old.mz", below), save(new, tmp_path / "full.mz", archive, note=i)
        update = save(new, tmp_path / "new.mz", archive, base=base, note=i)
        assert mutations.state(load(update, new)) == mutations.state(load(full, new))
        assert diff(update, full).same and inspect(update).info == {"note": i}
        for item in pack.items(new):
            assert mutations.stored(read_tensor(update, item.name)) == mutations.stored(item.value)
        if not archive and not below:
            assert mutations.state(load(update, new, mmap=True)) == mutations.state(new)
        same = save(new, tmp_path / "same.mz", archive, base=full, note=i)
        assert inspect(same).base["name"] == "full.mz" and sum(l.bytes for l in inspect(same).lines) == 0
        assert mutations.state(load(same, new)) == mutations.state(new)


def two(tmp_path, archive=True):
    "An update and its base; what they hold."
    with seeded(0):
        old = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.BatchNorm1d(40)).eval()
    new = copy.deepcopy(old)
    new[0].weight.data *= 1.001
    return save(new, tmp_path / "new.mz", archive, base=save(old, tmp_path / "old.mz", archive)), old, new


def test_what_is_the_same_costs_nothing(tmp_path):
    path, old, new = two(tmp_path)
    bytes_of = {l.name: (l.coder, l.bytes) for l in inspect(path).lines}
    assert bytes_of.pop("0.weight")[1] < 0.7 * 4 * 3000 and set(bytes_of.values()) == {("base", 0)}
    assert "an update of old.mz" in str(inspect(path)) and "new.mz (an update of old.mz)" in str(diff(path, path))
    assert inspect(path, entropy=False).base == inspect(path).base == json.loads(text_of(path))["base"]
    for way in "threads", "place":
        (tmp_path / way).mkdir()
        base = save(old, tmp_path / way / "old.mz")
        again = save(new, tmp_path / way / "x.mz", threads=1 + (way == "threads"), base=base)
        assert again.read_bytes() == path.read_bytes()


def text_of(path):
    with zipfile.ZipFile(path) as z:
        return z.read("manifest.json")


def test_nothing_in_common_is_no_update(tmp_path):
    base = save(nn.Linear(3, 2), tmp_path / "old.mz")
    other = save(nn.Linear(5, 4), tmp_path / "new.mz", base=base)
    base.unlink()
    assert inspect(other).base is None and load(other, nn.Linear(5, 4)).in_features == 5


@pytest.mark.parametrize("archive", [True, False])
def test_of_another_model_nothing_is_an_update(tmp_path, archive):
    "Norms begin as ones in each model, and some numbers are alike by chance: the file is the one that needs no other."
    for bits in None, 4:
        models = []
        for seed in 1, 2:
            with seeded(seed):
                models.append(nn.Sequential(nn.Linear(64, 200), nn.LayerNorm(200), nn.ReLU(), nn.Linear(200, 10)))
        a, b = models if bits is None else (quantize_model(m, bits) for m in models)
        save(a, tmp_path / "a.mz", archive=archive)
        alone = save(b, tmp_path / "alone.mz", archive=archive)
        update = save(b, tmp_path / "update.mz", archive=archive, base=tmp_path / "a.mz")
        assert update.read_bytes() == alone.read_bytes() and updates.bases_of(update) == []


class Beside(nn.Module):
    "Weights that differ from those of another seed, and a large tensor that is the same."

    def __init__(self, seed, same):
        super().__init__()
        with seeded(seed):
            self.fc = nn.Linear(100, 100)
        self.register_buffer("same", same)


@pytest.mark.parametrize("same", ["zeros", "steps"])
@pytest.mark.parametrize("archive", [True, False])
def test_what_is_spared_is_what_it_would_take(tmp_path, archive, same):
    "Numbers that are coded to next to nothing spare next to nothing; large mapped ones, zeros too, have their bytes."
    same = torch.zeros(50_000) if same == "zeros" else torch.arange(50_000).div(1000).floor()
    old, new = Beside(1, same), Beside(2, same)
    full = save(new, tmp_path / "full.mz", archive).stat().st_size
    update = save(new, tmp_path / "new.mz", archive, base=save(old, tmp_path / "old.mz", archive))
    spared = full - update.stat().st_size
    assert (inspect(update).base is None) == archive and (spared == 0 if archive else spared > 190_000)
    assert mutations.state(load(update, old)) == mutations.state(new)


def test_chains_end(tmp_path):
    m, paths = nn.Linear(4, 3), []
    for i in range(MOST_BASES + 1):
        m.weight.data += i
        paths.append(save(m, tmp_path / f"{i}.mz", i % 2 == 0, base=paths[-1] if paths else None))
    assert torch.equal(load(paths[-1], m).weight, m.weight)
    with pytest.raises(ValueError, match=f"has {MOST_BASES} files below it"):
        save(m, tmp_path / "x.mz", base=paths[-1])
    old = paths[3].read_bytes()
    with pytest.raises(ValueError, match="cannot take the place of"):
        save(m, paths[3], base=paths[-1])
    assert paths[3].read_bytes() == old
    full = save(load(paths[-1], m), tmp_path / "full.mz")
    assert diff(full, paths[-1]).same
    paths[3].unlink()
    with pytest.raises(PackError, match=r"8\.mz: its base .*7\.mz: .*4\.mz: it is an update of '3\.mz'.*not beside it"):
        load(paths[-1], m)


def test_a_chain_of_forged_updates_ends(tmp_path, monkeypatch):
    "Files that each say that the one before is below them; and one that says it of itself."
    path, old, new = two(tmp_path)
    manifest, payload = mutations.opened(path)
    monkeypatch.setattr("modelzip.workshop.updates.content_of", lambda *file: "0" * 64)
    for i in range(12):
        manifest["base"] = {"name": f"{(i + 1) % 12}.mz", "content": "0" * 64}
        (tmp_path / f"{i}.mz").write_bytes(mutations.sealed(manifest, payload))
    with pytest.raises(PackError, match=f"{MOST_BASES} files below one are the most"):
        load(tmp_path / "0.mz", new)


def test_the_base_is_asked_for_by_what_it_holds(tmp_path):
    path, old, new = two(tmp_path)
    base = tmp_path / "old.mz"
    readers = {
        "load": lambda **how: load(path, new, **how),
        "read_tensor": lambda **how: read_tensor(path, "0.weight", **how),
        "inspect": lambda **how: inspect(path, **how),
    }
    moved = base.rename(tmp_path / "moved.mz")
    for f in readers.values():
        with pytest.raises(
            PackError, match=r"new\.mz: it is an update of 'old\.mz' with the content [0-9a-f]{16}…, which"
        ):
            f()
        f(base=moved), f(base=str(moved)), f(base=os.fsencode(moved))
        with pytest.raises(FileNotFoundError):
            f(base=base)
    save(new, base)  # another file of that name
    for f in readers.values():
        for how in {}, {"base": path}:
            with pytest.raises(PackError, match=r"its base .*: it is another file: its content is .* is asked for"):
                f(**how)
    moved.replace(base)
    for f in readers.values():
        f()
        with pytest.raises(TypeError):
            f(base=3)
    with pytest.raises(ValueError, match="is no update: it needs none"):
        load(base, old, base=path)


def test_what_is_no_base(tmp_path):
    m, path = nn.Linear(3, 2), tmp_path / "x.mz"
    base = save(m, tmp_path / "old.mz", "solid")
    assert inspect(save(m, path, base=base)).base["name"] == "old.mz" and torch.equal(load(path, m).weight, m.weight)
    with pytest.raises(ValueError, match="archive is 'solid'"):
        save(m, path, "solid", base=base)
    with pytest.raises(ValueError, match="cannot take the place of"):
        save(m, base, base=base)
    with pytest.raises(ValueError, match="cannot take the place of"):
        (tmp_path / "link.mz").symlink_to(base)
        save(m, tmp_path / "link.mz", base=base)
    (tmp_path / "text.mz").write_text("no archive")
    with pytest.raises(PackError, match="its base .*text.mz"):
        save(m, path, base=tmp_path / "text.mz")
    with pytest.raises(PackError, match="folder"):
        save(m, path, base=tmp_path)
    odd = tmp_path / "a\\b.mz"
    odd.write_bytes(base.read_bytes())
    with pytest.raises(ValueError, match="cannot say such a name"):
        save(m, path, base=odd)
    mapped = save(m, tmp_path / "mapped.mz", archive=False, base=base)
    with pytest.raises(ValueError, match="old.mz, which this is an update of, is archived"):
        load(mapped, m, mmap=True)


def test_older_readers_refuse_updates_by_their_version(tmp_path, monkeypatch):
    path, _, new = two(tmp_path)
    monkeypatch.setattr(manifests, "UPDATE", 0)  # as before there were any
    with pytest.raises(PackError, match="made by a newer modelzip: it has version 7 of the format"):
        load(path, new)


def test_of_a_base_only_what_is_needed_is_read(tmp_path, monkeypatch):
    for archive in True, False:
        path, old, new = two(tmp_path, archive)
        read, names = updates.read_alone, []
        monkeypatch.setattr(updates, "read_alone", lambda f, p, name, e: names.append(name) or read(f, p, name, e))
        assert torch.equal(read_tensor(path, "1.weight"), new[1].weight) and names == ["1.weight"]
        names.clear()
        assert torch.equal(read_tensor(path, "0.weight"), new[0].weight) and names == ["0.weight"] * archive
        monkeypatch.undo()


def test_numbers_of_a_base_that_lie(tmp_path):
    "A base whose manifest and checksum are right, and whose numbers are others: the update has checksums of its own."
    path, old, new = two(tmp_path, archive=False)
    manifest, payload = mutations.opened(tmp_path / "old.mz")
    at = manifest["tensors"]["1.weight"]["offset"]
    other = bytearray(payload)
    other[at] ^= 1
    about = json.loads(text_of(path))
    (tmp_path / "old.mz").write_bytes(mutations.sealed(manifest, bytes(other)))
    with open_file(tmp_path / "old.mz") as f:
        about["base"]["content"] = content_of(f, *read_manifest(f)[1:])
    path.write_bytes(mutations.sealed(about, mutations.opened(path)[1]))
    for how in {}, {"mmap": True}:
        with pytest.raises(PackError, match="'1.weight' and its base do not make what was saved"):
            load(path, new, **how)
    assert torch.equal(read_tensor(path, "0.weight"), new[0].weight)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"dtype": "float32", "shape": [2**40], "base": 1}, "its base, but .* has none like it"),
        ({"dtype": "float16", "shape": [40], "base": 1}, "its base, but .* has none like it"),
        ({"dtype": "float32", "shape": [40], "base": 1}, "do not make what was saved"),
        ({"dtype": "float32", "shape": [40], "base": 1, "offset": 0}, "it has a base, but is no stream"),
        ({"dtype": "float32", "shape": [40], "base": 1, "coded": 3}, "unknown form"),
        ({"dtype": "float32", "shape": [40], "base": "1"}, "unknown form"),
    ],
)
def test_entries_that_lie(tmp_path, entry, words):
    path, _, new = two(tmp_path)
    manifest, payload = mutations.opened(path)
    manifest["tensors"]["1.bias"] = entry
    path.write_bytes(mutations.sealed(manifest, payload))
    for f in lambda: load(path, new), lambda: read_tensor(path, "1.bias"):
        with pytest.raises(PackError, match=words):
            f()


def test_an_update_with_a_graph_needs_no_code(tmp_path):
    with seeded(0):
        m, x = LeNet5(channels=[4, 6], hidden=40).eval(), torch.rand(2, 1, 28, 28)
    base = save(m, tmp_path / "old.mz", example=x)
    m.fc2.weight.data *= 1.01
    path = save(load(base), tmp_path / "new.mz", base=base)
    assert torch.equal(load(path)(x), load(base)(x)) and path.stat().st_size < 0.5 * base.stat().st_size
    path = save(m, tmp_path / "new.mz", example=x, base=base)
    assert torch.equal(load(path)(x), m(x)) and diff(base, path).about == []


def stored_models():
    "The two of which version7_base.mz and version7.mz were written."
    numbers = lambda *shape: (
        torch.arange(torch.Size(shape).numel()).mul(7919).remainder(1009).sub(504).reshape(shape) / 500
    )
    old = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40))
    with torch.no_grad():
        for p in old.parameters():
            p.copy_(numbers(*p.shape))
    old[1] = quantize_model(old[1], 4, group=15)
    new = copy.deepcopy(old)
    new[0].weight.data *= 1 + numbers(30, 40).sign() / 1024
    new[0].bias.data += 1
    codes = unpack_bits(new[1].packed.codes, 4, 1200).int()
    new[1].packed.codes = pack_bits((codes + (torch.arange(1200) % 17 == 0)) % new[1].q.levels, 4)
    return old, new


def test_stored_updates_are_still_read():
    old, new = stored_models()
    path = Path(__file__).with_name("files") / "version7.mz"
    assert inspect(path).version == 7 and mutations.state(load(path, new)) == mutations.state(new)
    coders = {l.name: l.coder for l in inspect(path).lines}
    assert coders["1.bias"] == "base" and "base + " in coders["0.weight"] and "base + " in coders["1.weight"]


@pytest.mark.hypothesis  # so that a search for new cases comes here, too
def test_damaged_updates_and_damaged_bases(tmp_path):
    "Damage is refused or changes nothing; forgery is refused, or all ways of reading agree."
    rng, outcomes, files = random.Random(FUZZ or 3), Counter(), []
    for i, (name, (old, new)) in enumerate(share(models().items(), 6)):
        for archive in True, False:
            base, path = tmp_path / f"{i}{archive}.mz", tmp_path / "x.mz"
            save(new, path, archive, base=save(old, base, archive))
            single = {k.name: mutations.stored(k.value) for k in pack.items(new)}
            files.append((base, new, archive, mutations.state(new), single, path.read_bytes(), mutations.opened(path)))
    kinds = [*mutations.DAMAGE, *mutations.FORGERY, *mutations.FORGERY]
    for n in range(examples(100)):
        base, new, archive, want, single, good, (manifest, payload) = files[n % len(files)]
        kind, below = kinds[(n + n // len(files)) % len(kinds)], n // 7 % 3 == 2
        target, whole = (base, base.read_bytes()) if below else (path, good)
        path.write_bytes(good)
        if kind in mutations.DAMAGE:
            target.write_bytes(mutations.DAMAGE[kind](whole, rng))
        else:
            about = mutations.opened(target) if below else (manifest, payload)
            target.write_bytes(mutations.FORGERY[kind](*about, rng))
        forged = kind in mutations.FORGERY
        try:
            outcomes[forged, below, mutations.judge(path, new, want, single, not archive, forged, rng)] += 1
        except BaseException as e:
            raise AssertionError(f"case {n} ({kind}, {base.name}, {below}): {type(e).__name__}: {e}") from e
        if below:
            target.write_bytes(whole)
    assert {o for forged, _, o in outcomes if not forged} <= {"refused", "exact"}
    assert all(outcomes[forged, below, "refused"] for forged in (True, False) for below in (True, False)), outcomes
