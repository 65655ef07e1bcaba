#| export
#| code-fold: true
#| code-summary: "Imports of the module"
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from modelzip.ptq import LayerStatistics, inverse_factor, quantize_with
from modelzip.workshop.floats import as_tensor, check_finite
from modelzip.workshop.scales import matrices_for, scaled_to_one
from modelzip.workshop.trellis_tensors import TrellisTensor, from_codes, grids, next_states

_all_ = ["TrellisTensor", "next_states"]  # the workshop's

#| export
def branches(
    states: int,
) -> tuple[Tensor, Tensor]:  # [2, states]: the two states that lead to each; by which kind of code: 2 · grid + parity
    "The machine backwards."
    came = next_states(states).flatten().long().argsort(stable=True).view(states, 2).t()  # 2 · state + parity
    return came // 2, 2 * (came // 2 >= states // 2) + came % 2

#| export
def best_of_kind(
    size: Tensor,  # |x| in fine steps, any shape
    odd: Tensor | int,  # 0 or 1: which grid
    parity: int,  # of the code
    bits: Tensor,  # [contexts, most + 1]: what |k| takes, with its sign
    price: Tensor | float,  # of a bit
    context: Tensor | int,  # which row of `bits`
) -> tuple[Tensor, Tensor]:  # |k|; squared error and price
    "The code of least cost among those of one parity on one grid."
    most, table = bits.shape[1] - 1, bits.flatten()
    near = (((size + odd) / 2 - parity) / 2).round_().mul_(2).add_(parity).clamp_(parity, most - (most - parity) % 2)
    below = (near - 2).clamp_(min=parity)
    cost = lambda k: (size - 2 * k + odd * (k > 0)).square_().add_(price * table[context * (most + 1) + k.long()])
    high, low = cost(near), cost(below)
    return torch.where(low < high, below, near), torch.minimum(low, high)

#| export
PRICE = 0.25  # squared fine steps for a bit


@torch.no_grad()
def trellis_codes(
    x: Tensor,  # [lanes, run] weights in fine steps
    bits: Tensor,  # [contexts, most + 1]: what |k| takes, see `code_bits`
    price: float = PRICE,  # of a bit, in squared fine steps
    states: int = 8,  # of the machine: 4, 8, 16 or 32
    classes: Tensor | None = None,  # [lanes, run] whole: contexts are 2 · class + grid
    bite: int = 4096,  # lanes at a time
) -> Tensor:  # [lanes, run] int32
    "The codes of least squared error plus price times bits, of all sequences that begin in state 0 (Viterbi 1967)."
    pieces = zip(x.split(bite), [None] * len(x) if classes is None else classes.split(bite))
    return torch.cat([search(piece, bits, price, states, some) for piece, some in pieces])


def search(x: Tensor, bits: Tensor, price: float, states: int, classes: Tensor | None) -> Tensor:
    "Some lanes."
    size, base = x.abs().t().contiguous(), 0 if classes is None else 2 * classes.t().long()
    kinds = [best_of_kind(size, odd, parity, bits, price, base + odd) for odd in (0, 1) for parity in (0, 1)]
    codes, costs = torch.stack([k for k, _ in kinds]), torch.stack([c for _, c in kinds], 1)
    (before, kind), second = branches(states), torch.empty(len(size), states, len(x), dtype=torch.bool)
    total = torch.full((states, len(x)), math.inf, dtype=x.dtype)
    total[0] = 0
    for t, step in enumerate(costs):
        one, other = (total[before[i]].add_(step[kind[i]]) for i in (0, 1))
        torch.lt(other, one, out=second[t])
        total = torch.minimum(one, other)
    taken, state = torch.empty(size.shape, dtype=torch.long), total.argmin(0)
    for t in reversed(range(len(size))):  # back along the best path
        way = second[t].gather(0, state[None])[0].long()
        taken[t], state = kind[way, state], before[way, state]
    return (codes.gather(0, taken[None])[0] * torch.where(x.t() < 0, -1, 1)).t().int()

#| export
def context_of(codes: Tensor, states: int, classes: Tensor | None = None) -> Tensor:
    "The context of each code, [lanes, run]: twice its class, plus its grid."
    odd = torch.from_numpy(grids(codes.flatten().numpy(), codes.shape[1], states)).view(codes.shape).long()
    return odd if classes is None else odd + 2 * classes


def code_bits(
    codes: Tensor,  # [lanes, run]
    context: Tensor,  # [lanes, run]
    most: int,  # the largest |k| that may be asked for
    contexts: int = 2,
) -> Tensor:  # [contexts, most + 1]
    "What |k| takes in each context, its sign included, by how often it occurs; half an occurrence is added to each."
    at = context.flatten().long() * (most + 1) + codes.flatten().abs().clamp(max=most)
    n = at.bincount(minlength=contexts * (most + 1)).view(contexts, -1) + 0.5
    return ((n.sum(1, keepdim=True) / n).log2() + (torch.arange(most + 1) > 0)).float()


def learned_bits(
    x: Tensor,  # [lanes, run] weights in fine steps
    price: float = PRICE,
    states: int = 8,
    classes: Tensor | None = None,  # [lanes, run]
    rounds: int = 3,  # of choosing and counting
    lanes: int = 256,  # that are looked at
) -> Tensor:  # [contexts, most + 1]
    "Prices that agree with what is chosen at them."
    most, n = int(x.abs().max() / 2) + 2, 2 if classes is None else 2 * int(classes.max()) + 2
    some = torch.linspace(0, len(x) - 1, min(lanes, len(x))).long()
    x, classes = x[some], None if classes is None else classes[some]
    codes, both = (x / 2).round().int(), torch.zeros(x.shape, dtype=torch.long)
    bits = code_bits(codes, both if classes is None else 2 * classes, most, n)
    bits[1::2] = bits[::2]
    for _ in range(rounds):
        codes = trellis_codes(x, bits.to(x.dtype), price, states, classes)
        bits = code_bits(codes, context_of(codes, states, classes), most, n)
    return bits.to(x.dtype)

#| export
def bits_a_code(
    codes: Tensor,  # [lanes, run]
    context: Tensor,  # [lanes, run]
) -> float:
    "Entropy of the codes in their contexts: bits for each."
    codes = codes.flatten().long() - codes.min()
    wide, contexts = int(codes.max()) + 1, int(context.max()) + 1
    n = (context.flatten().long() * wide + codes).bincount(minlength=contexts * wide).view(contexts, wide).double()
    spent = torch.special.xlogy(n.sum(1), n.sum(1)).sum() - torch.special.xlogy(n, n).sum()
    return spent.item() / codes.numel() / math.log(2)

#| export
@torch.no_grad()
def feedback_codes(
    x: Tensor,  # [rows, inputs] weights in fine steps
    pull: Tensor,  # [inputs, inputs] upper triangular: an error of 1 in column t moves column l by −pull[t, l]
    counts: Tensor,  # [inputs]: what a squared error in a column costs
    bits: Tensor,  # [contexts, most + 1]: what |k| takes
    price: float = PRICE,
    states: int = 8,
    run: int = 128,  # columns in a lane; it divides the inputs
    classes: Tensor | None = None,  # [rows, inputs]
) -> Tensor:  # [rows, inputs] int32
    "Trellis codes by lanes of columns; those to the right make up for the errors (after Frantar et al. 2022)."
    x, codes = x.t().clone(), torch.empty(x.shape[::-1], dtype=torch.int32)
    for i in range(0, len(x), run):
        here, some = slice(i, i + run), None if classes is None else classes[:, i : i + run].t()
        codes[here], errors = lane_with_feedback(x[here], pull[here, here], counts[here], bits, price, states, some)
        x[i + run :].addmm_(pull[here, i + run :].t(), errors, alpha=-1)
    return codes.t()

#| export
def lane_with_feedback(
    w: Tensor,  # [run, rows]
    pull: Tensor,  # [run, run]
    counts: Tensor,  # [run]
    bits: Tensor,
    price: float,
    states: int,
    classes: Tensor | None,  # [run, rows]
) -> tuple[Tensor, Tensor]:  # [run, rows] codes; errors
    "One lane of each row. Each survivor has its own copy of the weights to come."
    (before, kind), odd, (run, rows) = branches(states), (torch.arange(states) >= states // 2).long()[:, None], w.shape
    way, second = before + kind % 2 * states, torch.empty(run, states, rows, dtype=torch.bool)
    codes, errors = (torch.empty(run, states, rows, dtype=w.dtype) for _ in range(2))
    total = torch.full((states, rows), math.inf, dtype=w.dtype)
    total[0] = 0
    w = w[:, None].expand(run, states, rows)
    for t in range(run):
        size, sign = w[0].abs(), torch.where(w[0] < 0, -1, 1).to(w.dtype)
        context = odd if classes is None else odd + 2 * classes[t]
        k, cost = zip(*(best_of_kind(size, odd, p, bits, price / counts[t], context) for p in (0, 1)))
        k, cost = torch.stack(k), (torch.stack(cost) * counts[t] + total).flatten(0, 1)
        one, other = cost[way[0]], cost[way[1]]
        later, total = torch.lt(other, one, out=second[t]), torch.minimum(one, other)
        for out, v in (codes, k * sign), (errors, (size - 2 * k + odd * (k > 0)) * sign):
            v = v.flatten(0, 1)
            torch.where(later, v[way[1]], v[way[0]], out=out[t])
        w = torch.where(later, w[1:, before[1]], w[1:, before[0]]).addcmul_(
            pull[t, t + 1 :, None, None], errors[t], value=-1
        )
    state = total.argmin(0)[None]
    for t in reversed(range(run)):
        codes[t, :1], errors[t, :1] = codes[t].gather(0, state), errors[t].gather(0, state)
        state = torch.where(second[t].gather(0, state), before[1][state], before[0][state])
    return codes[:, 0].int(), errors[:, 0]

#| export
def step_for(
    x: Tensor,  # [lanes, run] weights
    bits: float,  # that a code should take, 0.1 to 12
    price: float = PRICE,
    states: int = 8,
    classes: Tensor | None = None,  # [lanes, run]
    lanes: int = 64,  # that are tried on
) -> float:  # the fine step
    "At which step codes take so many bits, within some hundredths. `ValueError` for bits out of range."
    if not 0.1 <= bits <= 12:
        raise ValueError(f"bits is {bits!r}; it may be 0.1 to 12")
    some = torch.linspace(0, len(x) - 1, min(lanes, len(x))).long()
    step = first = first_step(x, bits)
    least = max(first / 8, x.abs().max().item() / 32000)
    x, classes = x[some], None if classes is None else classes[some]
    for _ in range(6):
        take = learned_bits(x / step, price, states, classes, rounds=2)
        codes = trellis_codes(x / step, take, price, states, classes)
        step *= 2 ** (bits_a_code(codes, context_of(codes, states, classes)) - bits)
        step = min(max(step, least), 8 * max(first, least))  # few weights may never take so many bits
    return step


def first_step(x: Tensor, bits: float) -> float:
    "What a bell would need: D = σ² 2⁻²ᵇ, and some more."
    return 1.8 * x.square().mean().sqrt().item() * 2.0**-bits

#| export
def spread_of(
    x: Tensor,  # [rows, inputs] weights in fine steps
) -> dict[str, Tensor]:  # of row_spread and column_spread, uint8, those that pay
    "How widely codes are spread in each row and column, in quarter octaves."
    if min(x.shape) < 2:
        return {}
    level = lambda dim: (4 * (x.abs().mean(dim) + 0.05).log2()).round()
    low = lambda v: (v - v.quantile(0.02).floor()).clamp(0, 40).to(torch.uint8)
    tried = {"row_spread": low(level(1)), "column_spread": low(level(0))}
    best, least = {}, math.inf
    for names in (), ("row_spread",), ("column_spread",), ("row_spread", "column_spread"):
        own = {n: tried[n] for n in names}
        takes = x.numel() * bits_a_code((x / 2).round().int(), 2 * classes_of(own, x.shape))
        takes += sum(8 * len(v) for v in own.values()) + 800 * (1 + int(classes_of(own, x.shape).max()))
        if takes < least and len(own) == len(names):
            best, least = own, takes
    return best if int(classes_of(best, x.shape).max()) else {}


def classes_of(spread: dict[str, Tensor], shape: tuple) -> Tensor:  # [rows, inputs]
    "The class of each weight: half the sum of what is known of its row and of its column."
    zero = lambda n: torch.zeros(n, dtype=torch.uint8)
    rows, columns = spread.get("row_spread", zero(shape[0])), spread.get("column_spread", zero(shape[1]))
    return (rows[:, None] + columns) // 2  # at most 40

#| export
@torch.no_grad()
def trellis_weight(
    weight: Tensor,  # [outputs, …]
    statistics: LayerStatistics | None = None,  # with second moments: the columns to the right make up for errors
    bits: float = 3.0,  # that a code should take once it is coded
    step: float | None = None,  # instead: the fine step; that of columns and rows is this in the geometric mean
    states: int = 8,  # of the machine: 4, 8, 16 or 32
    price: float = PRICE,  # of a bit, in squared fine steps
    column_steps: bool = True,  # every column its own step, as far as statistics ask for it
    importance: Tensor | None = None,  # [outputs]: what a squared error in a row counts; its step follows
    damping: float = 0.01,  # share of H's mean diagonal that is added to its diagonal
    axis: int = 0,  # which dimension holds the outputs; of others nothing is made up for
) -> TrellisTensor:
    """Trellis-coded quantization of one layer's weight (Marcellin and Fischer 1990; Fischer and Wang 1992), with
    GPTQ's feedback where the inputs are known (Frantar et al. 2022, arXiv:2210.17323). `ValueError` for a weight that
    is not finite, for options out of range, and for steps that float32 cannot say."""
    w = check_finite(as_tensor(weight, "weight"), "weight")
    shape, w = w.shape, w.reshape(len(w) if w.dim() > 1 else 1, -1).to(torch.promote_types(w.dtype, torch.float32))
    if not (step is None or 0 < step < math.inf) or not price >= 0:
        raise ValueError(f"step is {step}, price {price}; a step is above 0, a price 0 or more")
    if not w.numel() or not bool(w.any()):
        return from_codes(torch.zeros(shape, dtype=torch.int32), 1.0, weight.dtype, states, 128)
    known = statistics is not None and statistics.moment is not None
    known = known and len(matrices_for(weight, statistics, axis)) == 1 and axis == 0
    factor = inverse_factor(scaled_to_one(statistics.moment)[0].to(w.dtype), damping).to(w.dtype) if known else None
    own = {"column_steps": exponents(factor.diagonal())} if known and column_steps and w.dim() == len(shape) else {}
    if importance is not None:
        own["row_steps"] = exponents(importance.to(w.dtype).clamp(min=1e-30).rsqrt())
    rows, columns = (torch.exp2(own[k].to(w.dtype) / 8) if k in own else None for k in ("row_steps", "column_steps"))
    rows, columns = torch.ones(len(w)) if rows is None else rows, torch.ones(w.shape[1]) if columns is None else columns
    ones = (rows[:, None] * columns).to(w.dtype)
    run = run_of(w.shape[1]) if known else 128
    x, mean = w / ones, ones.log2().mean().exp2().item()
    lanes = lambda t: nn.functional.pad(t.flatten(), (0, -t.numel() % run)).view(-1, run)
    spread = spread_of(x / (first_step(x, bits) if step is None else step / mean))
    classes = lanes(classes_of(spread, x.shape)) if spread else None
    step = step_for(lanes(x), bits, price, states, classes) if step is None else step / mean
    if not torch.finfo(torch.float32).tiny < step < torch.finfo(torch.float32).max:
        raise ValueError(f"the step is {step}, which float32 cannot say")
    x = x / (step := torch.tensor(step, dtype=torch.float32).item())
    if x.abs().max() > 32700:
        raise ValueError(f"step is {step:.3g}, which is too small: the largest weight is {x.abs().max():.3g} of it")
    take = learned_bits(lanes(x), price, states, classes)
    if known:
        classes = None if classes is None else classes.view(x.shape)
        codes = feedback_codes(x, *pulls(factor, columns), take, price, states, run, classes)
    else:
        codes = trellis_codes(lanes(x), take, price, states, classes)
    return from_codes(codes.flatten()[: w.numel()].view(shape), step, weight.dtype, states, run, **own, **spread)


def exponents(size: Tensor) -> Tensor:  # uint8
    "Sizes in eighths of an octave above the smallest of them; what is more than 31 octaves above it is cut."
    return (8 * size.log2()).round().sub_((8 * size.log2()).round().min()).clamp_(0, 255).to(torch.uint8)


def pulls(factor: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    "Feedback and cost in units of the columns' own steps."
    share = columns.to(factor.dtype) / factor.diagonal()
    counts = share.square()
    return share[:, None] * factor / columns, counts / counts.mean()


def run_of(inputs: int) -> int:
    "Columns in a lane: the largest divisor up to 128; where that is below 32, the whole row."
    best = next(d for d in range(min(inputs, 128), 0, -1) if inputs % d == 0)
    return best if best >= 32 else inputs

#| export
def trellis(
    model: nn.Module,  # it is left as it is
    batches: Iterable | None = None,  # calibration data, see `feed`; None: nothing makes up for errors
    bits: float = 3.0,  # that a code should take once it is coded
    states: int = 8,  # of the machine: 4, 8, 16 or 32
    price: float = PRICE,  # of a bit, in squared fine steps
    damping: float = 0.05,  # share of H's mean diagonal added to its diagonal
    catch_up: float = 0.5,  # share of the error of earlier layers that a layer makes up for; without data 0
    overrides: dict | Callable | None = None,  # options by name or pattern, or a rule: see `quantize_with`
    **more,  # of `quantize_with` and `trellis_weight`: layers, column_steps
) -> nn.Module:  # a copy with `Dequantize` layers that hold a `TrellisTensor`
    "Trellis-coded quantization of every layer, with feedback where there are data (Fischer and Wang 1992)."
    how, catch_up = dict(bits=bits, states=states, price=price, damping=damping), catch_up if batches is not None else 0
    return quantize_with(trellis_weight, model, batches, None, None, catch_up, overrides, **how, **more)

#| hide
#| export
from modelzip.workshop.arguments import name_arguments

name_arguments(globals())  # errors name the argument
