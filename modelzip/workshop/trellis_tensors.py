#| export
import math
from dataclasses import dataclass

import numpy as np
import torch
from fastcore.basics import patch
from torch import Tensor

from modelzip.quant import FLOATS, CompressedTensor, QTensor, pack_bits, packed_bytes, unpack_bits
from modelzip.workshop.compressed import Sized
from modelzip.workshop.floats import dtype_name
from modelzip.workshop.qtensor_checks import check_part, checked_meta

#| export
TAPS = {4: (1, 2), 8: (5, 2), 16: (9, 4), 32: (9, 4)}  # states → what a one on top flips, what an odd code flips


def next_states(
    states: int,  # 4, 8, 16 or 32
) -> Tensor:  # [states, 2] uint8: the next state after an even and after an odd code
    "The machine that says which grid is next (Ungerboeck 1982). `ValueError` for another number of states."
    if states not in TAPS:
        raise ValueError(f"states is {states!r}; it may be 4, 8, 16 or 32")
    top, odd = TAPS[states]
    shifted = [(s << 1) % states ^ (top if s >= states // 2 else 0) for s in range(states)]
    return torch.tensor([[s, s ^ odd] for s in shifted], dtype=torch.uint8)

#| export
def lanes_of(
    x: np.ndarray,  # flat
    run: int,  # codes in a lane
) -> np.ndarray:  # [run, lanes]: step by step
    "Cut into lanes; what is missing of the last is zero."
    lanes = -(-len(x) // run)
    return np.ascontiguousarray(np.pad(x, (0, lanes * run - len(x))).reshape(lanes, run).T)


def walk(
    streams: list[np.ndarray],  # codes of each context, signed, in the order in which they are asked for
    classes: np.ndarray | None,  # [n] uint8: the class of each weight; None: one for all
    n: int,  # weights
    run: int,  # codes in a lane
    states: int,
) -> np.ndarray:  # [n] codes on the fine grid: 2k, or 2k less its sign
    "Read codes back. `ValueError` unless there are just as many in each context as the walk asks for."
    lanes, after, half = -(-n // run), next_states(states).numpy().reshape(-1), states // 2
    grid, state, at = np.zeros((run, lanes), streams[0].dtype), np.zeros(lanes, np.uint8), [0] * len(streams)
    classes = None if classes is None else lanes_of(classes * np.uint8(2), run)
    for t in range(min(run, n)):
        m = lanes if (lanes - 1) * run + t < n else lanes - 1  # the last lane may have ended
        key = (state[:m] >= half).view(np.uint8)
        codes = take(streams, at, key if classes is None else key + classes[t, :m])
        grid[t, :m] = 2 * codes - np.sign(codes) * key
        state[:m] = after[2 * state[:m] + (codes & 1).astype(np.uint8)]
    if any(a != len(s) for a, s in zip(at, streams)):
        raise ValueError("codes are left over")
    return grid.T.reshape(-1)[:n]

#| export
def take(
    streams: list[np.ndarray],
    at: list[int],  # where each of them stands; moves on
    key: np.ndarray,  # uint8: which context each lane asks
) -> np.ndarray:  # a code for each lane
    "The next codes. `ValueError` when a context has no more."
    out, count = np.empty(len(key), streams[0].dtype), np.bincount(key, minlength=len(streams)).tolist()
    begin = list(at)
    for i, n in enumerate(count):
        at[i] += n
        if at[i] > len(streams[i]):
            raise ValueError(f"the codes of context {i} end too early")
    if len(streams) == 2:
        odd = key.view(bool)
        out[odd], out[~odd] = streams[1][begin[1] : at[1]], streams[0][begin[0] : at[0]]
    else:
        out[np.argsort(key, kind="stable")] = np.concatenate([s[a:b] for s, a, b in zip(streams, begin, at)])
    return out

#| export
def grids(
    codes: np.ndarray,  # [n] signed
    run: int,
    states: int,
) -> np.ndarray:  # [n] uint8: 1 where a code lies on the odd grid
    "Which grid each code lies on."
    k, after = lanes_of((codes & 1).astype(np.uint8), run), next_states(states).numpy().reshape(-1)
    state, odd = np.zeros(k.shape[1], np.uint8), np.empty(k.shape, np.uint8)
    for t in range(run):
        odd[t], state = state >= states // 2, after[2 * state + k[t]]
    return odd.T.reshape(-1)[: len(codes)]


def deal(
    codes: np.ndarray,  # [n] signed
    classes: np.ndarray | None,  # [n] uint8
    run: int,
    states: int,
) -> list[np.ndarray]:  # the codes of each context, as `walk` asks for them
    "Sort codes by context; two for each class."
    key = grids(codes, run, states) + (0 if classes is None else classes * np.uint8(2))
    live = lanes_of(np.ones(len(codes), bool), run).reshape(-1)
    key, codes = lanes_of(key, run).reshape(-1)[live], lanes_of(codes, run).reshape(-1)[live]
    return [codes[key == i] for i in range(2 if classes is None else 2 * (int(classes.max(initial=0)) + 1))]

#| export
VECTORS = ("row_steps", "column_steps", "row_spread", "column_spread")


@dataclass(eq=False, repr=False)
class TrellisTensor(Sized, CompressedTensor, kind="trellis"):
    "Codes on two grids in turn, and all that turns them back into numbers."

    codes: list[Tensor]  # uint8, packed: of each context; code minus half the levels is k
    counts: list[int]  # codes in each context
    levels: list[int]  # of each context: an odd number
    scale: Tensor  # []: the fine step, half of that of either grid
    shape: torch.Size  # of the tensor it stands for
    dtype: torch.dtype  # of the tensor it stands for
    states: int  # of the machine
    run: int  # weights in a lane
    vectors: dict[str, Tensor]  # of `VECTORS`, uint8: what a row or a column has of its own; {} without

    def describe(self) -> str:
        "How it is compressed, in a few words: `8-state trellis, step per column, 4 classes`."
        own = [k.partition("_")[0] for k in ("row_steps", "column_steps") if k in self.vectors]
        classes = f", {len(self.codes) // 2} classes" if len(self.codes) > 2 else ""
        return f"{self.states}-state trellis, step per {' and '.join(own) or 'tensor'}{classes}"

#| export
@patch
def parts(self: TrellisTensor) -> dict[str, Tensor]:
    "The tensors that a file stores."
    return {f"codes{i}": c for i, c in enumerate(self.codes)} | {"scale": self.scale} | self.vectors


@patch
def meta(self: TrellisTensor) -> dict:
    "What a file's manifest says of it."
    said = {"shape": list(self.shape), "dtype": dtype_name(self.dtype), "states": self.states, "run": self.run}
    return said | {"counts": list(self.counts), "levels": list(self.levels)}


@patch
def packed_parts(self: TrellisTensor) -> dict[str, tuple[int, int, int]]:
    "Which parts are packed codes: their bits, their number, and below what they are."
    each = enumerate(zip(self.counts, self.levels))
    return {f"codes{i}": ((levels - 1).bit_length(), count, levels) for i, (count, levels) in each}

#| export
@patch(cls_method=True)
def of_checked(cls: TrellisTensor, parts: dict[str, Tensor], meta: dict) -> TrellisTensor:
    "Build from parts whose numbers were looked at before; shapes and dtypes are checked."
    if not isinstance(meta, dict) or set(meta) != {"shape", "dtype", "states", "run", "counts", "levels"}:
        raise ValueError(f"meta is {meta!r:.80}")
    shape, dtype, *_ = checked_meta({"shape": meta["shape"], "dtype": meta["dtype"], "levels": 2})
    next_states(states := meta["states"] if type(meta["states"]) is int else None)
    whole = lambda v, low, high: type(v) is int and low <= v <= high
    run, counts, levels = meta["run"], meta["counts"], meta["levels"]
    if not whole(run, 1, 1 << 48):
        raise ValueError(f"run is {run!r}")
    if not all(isinstance(v, (list, tuple)) for v in (counts, levels)) or not len(counts) == len(levels):
        raise ValueError(f"counts is {counts!r:.80}, levels {levels!r:.80}; they must be lists of equal length")
    if len(counts) % 2 or not 2 <= len(counts) <= 256 or not all(whole(c, 0, 1 << 48) for c in counts):
        raise ValueError(f"counts is {counts!r:.80}; it must hold two counts for each class")
    if sum(counts) != shape.numel() or not all(whole(v, 3, 32767) and v % 2 for v in levels):
        raise ValueError(f"counts {counts!r:.80} and levels {levels!r:.80} do not fit the shape {tuple(shape)}")
    names = [f"codes{i}" for i in range(len(counts))]
    if extra := set(parts) - {*names, "scale", *VECTORS}:
        raise ValueError(f"unknown parts {sorted(extra)}")
    for name, count, most in zip(names, counts, levels):
        check_part(name, parts.get(name), (torch.uint8,), (packed_bytes(count, (most - 1).bit_length()),))
    check_part("scale", parts.get("scale"), FLOATS, ())
    vectors = {k: parts[k] for k in VECTORS if k in parts}
    for name, v in vectors.items():
        check_part(name, v, (torch.uint8,), (vector_length(shape, name),))
    if (len(counts) > 2) != bool({"row_spread", "column_spread"} & set(vectors)):
        raise ValueError("several classes need a spread of rows or columns, and only they")
    return cls([parts[n] for n in names], list(counts), list(levels), parts["scale"], shape, dtype, states, run, vectors)


def vector_length(shape: torch.Size, name: str) -> int:
    "Rows, or columns: of the steps those of dimension 1, as a `QTensor` has them; of the spread all weights of a row."
    if len(shape) < 2 or not shape.numel():
        raise ValueError(f"{name} needs a matrix, not shape {tuple(shape)}")
    return shape[0] if name.startswith("row") else shape[1] if name == "column_steps" else shape.numel() // shape[0]

#| export
@patch(cls_method=True)
def from_parts(cls: TrellisTensor, parts: dict[str, Tensor], meta: dict) -> TrellisTensor:
    "Build from stored parts; whatever does not fit together raises `ValueError` (nothing is trusted)."
    x = cls.of_checked(parts, meta)
    if not x.scale.is_meta and not bool(torch.isfinite(x.scale) & (x.scale > 0)):
        raise ValueError(f"part scale must be positive and finite; it is {x.scale}")
    if not any(c.is_meta for c in x.codes):
        x.grid()
    return x


@patch
def classes(self: TrellisTensor) -> np.ndarray | None:  # [numel] uint8
    "The class of each weight."
    if len(self.codes) == 2:
        return None
    rows, columns = (self.vectors.get(f"{k}_spread") for k in ("row", "column"))
    rows = np.zeros(1, np.uint16) if rows is None else rows.cpu().numpy().astype(np.uint16)
    columns = np.zeros(1, np.uint16) if columns is None else columns.cpu().numpy().astype(np.uint16)
    shape, last = (self.shape[0], self.shape.numel() // self.shape[0]), len(self.codes) // 2 - 1
    return np.broadcast_to(np.minimum((rows[:, None] + columns) // 2, last).astype(np.uint8), shape).reshape(-1)


@patch
def grid(self: TrellisTensor) -> Tensor:  # int16 or int32, of `self.shape`, on the CPU
    "Codes on the fine grid: each times the step of its row and column is a weight. `ValueError` for damaged codes."
    wide = np.int16 if max(self.levels) < 1 << 14 else np.int32
    streams = []
    for i, (packed, count, levels) in enumerate(zip(self.codes, self.counts, self.levels)):
        k = unpack_bits(packed.cpu(), (levels - 1).bit_length(), count).numpy()
        if count and int(k.max()) >= levels:
            raise ValueError(f"part codes{i} has code {k.max()}; {levels} levels have 0 to {levels - 1}")
        streams.append(k.astype(wide) - wide(levels // 2))
    if not (n := self.shape.numel()):
        return torch.zeros(self.shape, dtype=torch.int16)
    return torch.from_numpy(walk(streams, self.classes(), n, self.run, self.states)).reshape(self.shape)

#| export
@patch
def as_qtensor(self: TrellisTensor) -> QTensor:
    "The same numbers, to the bit, on one grid: what integer kernels take, and about one bit a code more."
    codes = self.grid()
    most = max(1, int(codes.abs().max())) if codes.numel() else 1
    step = lambda name: torch.exp2(self.vectors[name].to(torch.float32) / 8) if name in self.vectors else None
    rows, columns, levels = step("row_steps"), step("column_steps"), 2 * most + 1
    packed = pack_bits((codes + most).to(torch.uint8 if levels <= 256 else torch.int32), (levels - 1).bit_length())
    scale, axis = (self.scale, None) if rows is None else (self.scale * rows, 0)
    return QTensor(packed.to(self.device), scale, None, None, self.shape, self.dtype, levels, axis, None, columns)


@patch
def dequantize(self: TrellisTensor) -> Tensor:
    "The numbers that it stands for, in the original shape and dtype."
    if self.device.type == "meta":
        return torch.empty(self.shape, dtype=self.dtype, device="meta")
    return self.as_qtensor().dequantize()

#| export
def from_codes(
    codes: Tensor,  # signed, of the tensor's shape: k, not yet 2k
    scale: float | Tensor,  # the fine step, above 0
    dtype: torch.dtype = torch.float32,  # of the tensor it stands for
    states: int = 8,  # of the machine: 4, 8, 16 or 32
    run: int = 128,  # weights in a lane
    **vectors: Tensor | None,  # of `VECTORS`: uint8
) -> TrellisTensor:
    "Keep what was chosen along a trellis."
    vectors, shape = {k: v for k, v in vectors.items() if v is not None}, codes.shape
    whole = torch.as_tensor(scale, dtype=torch.float32)
    flat = codes.detach().cpu().reshape(-1).numpy()
    n = min(128, 1 + sum(int(v.max()) for k, v in vectors.items() if k.endswith("spread")) // 2)
    if n == 1:
        vectors = {k: v for k, v in vectors.items() if not k.endswith("spread")}
    empty = TrellisTensor([None] * 2 * n, [], [], whole, shape, dtype, states, run, vectors)
    streams = deal(flat, empty.classes(), run, states) if len(flat) else [flat, flat]
    streams += [flat[:0]] * (2 * n - len(streams))
    levels = [2 * max(1, int(np.abs(s).max(initial=0))) + 1 for s in streams]
    if max(levels) > 32767:
        raise ValueError(f"a code is {max(levels) // 2}; codes may be up to 16383 away from zero: take a larger scale")
    packed = [
        pack_bits(torch.from_numpy(s.astype(np.int32) + m // 2), (m - 1).bit_length()) for s, m in zip(streams, levels)
    ]
    return TrellisTensor(packed, list(map(len, streams)), levels, whole, shape, dtype, states, run, vectors)

#| hide
#| export
from modelzip.workshop.arguments import name_arguments

name_arguments(globals())  # errors name the argument
