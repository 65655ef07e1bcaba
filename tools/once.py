"""What a run of all notebooks, or of all tests, need not do twice, or can do in a quicker way that gives the same. Nothing
of this is in the library, in a notebook that is executed to be saved, or in `make fuzz`'s questions."""

import copy, functools, hashlib, inspect, os, sys, tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

# nbformat's validator would compile a grammar of addresses in other alphabets: a second of each process, for nobody.
# So this module is imported before nbformat.
sys.modules.setdefault("rfc3987_syntax", None)


@contextmanager
def replaced(owner, name, new):
    "A block in which an attribute is another."
    old = vars(owner)[name]
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextmanager
def operations_asked_once():
    "PyTorch asks for all of its operations anew, some 120 times for an ONNX file, whenever it follows a model: here once."
    try:
        from torch._export import utils

        asked = functools.cache(utils._materialize_cpp_cia_ops)
    except (ImportError, AttributeError):
        yield
        return
    with replaced(utils, "_materialize_cpp_cia_ops", asked):
        yield


@contextmanager
def translations_read_once():
    """PyTorch reads the source of some 500 translations of its operations anew for every ONNX file, which, with the
    question above, is half of the time that a small one takes: here once. Where these parts of PyTorch, which are not
    public, look different, nothing is changed."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read = functools.cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):
        yield
        return

    def copied(*args, **kwargs):
        found = copy.copy(read(*args, **kwargs))
        found.functions = {name: [*ways] for name, ways in found.functions.items()}
        return found

    with replaced(ONNXRegistry, "from_torchlib", staticmethod(copied)), operations_asked_once():
        yield


def is_plain(model):
    "Whether nothing but the weights of a module is of its owner's making: no hooks, no attributes that compute."
    own = lambda m: [v for k, v in vars(m).items() if k not in ("_parameters", "_modules", "architecture")]
    return all(not v or isinstance(v, (bool, int, str, tuple)) for m in model.modules() for v in own(m))


def question(model, given):
    "What the weights after training are a function of: the network with its weights, the examples, the settings."
    said = hashlib.sha256(repr([type(model), model, sorted((k, v) for k, v in given.items() if k != "data")]).encode())
    for name, t in [*model.state_dict().items(), ("x", given["data"].x), ("y", given["data"].y)]:
        said.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        said.update(t.detach().contiguous().numpy())
    return said.hexdigest()


def training_kept(train, folder):
    """`modelzip.data.train` that looks into a folder first: a network that was trained in the same way before, from the
    same weights on the same examples, gets the weights and gradients of then, to the bit. Only for LeNets with nothing
    attached to them, all of whose weights learn, on one processor; and only without a loss, an optimizer or a listener
    of one's own."""
    import torch

    from modelzip import data

    own, said = ("loss", "optimizer", "after_epoch"), ("data", "epochs", "lr", "batch_size", "seed")

    @functools.wraps(train)
    def kept(*args, **kwargs):
        try:
            bound = inspect.signature(train).bind(*args, **kwargs)
        except TypeError:
            return train(*args, **kwargs)  # which says what is wrong
        bound.apply_defaults()
        model, given = bound.arguments["model"], {k: bound.arguments[k] for k in said}
        known = (
            all(bound.arguments[k] is inspect.signature(train).parameters[k].default for k in own)
            and type(model) in (data.LeNet5, data.LeNet300)
            and isinstance(given["data"], data.Split)
            and is_plain(model)
            and all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
            and torch.get_num_threads() == 1
        )
        if not known:
            return train(*args, **kwargs)
        place = Path(folder) / f"{question(model, given)}.pt"
        if not place.exists():
            train(*args, **kwargs)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                torch.save([(p.detach(), p.grad) for p in model.parameters()], file)
            os.replace(file.name, place)
            return model
        with torch.no_grad():
            for p, (weight, gradient) in zip(model.parameters(), torch.load(place)):
                p.copy_(weight)
                p.grad = gradient
        return model.eval()

    return kept


def formulas(artist):
    "The texts of a figure in which a formula may stand. (Numbers along axes are made when it is drawn.)"
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    if isinstance(artist, Text):
        yield artist.get_text()
    for child in [artist.label] if isinstance(artist, Axis) else artist.get_children():
        yield from formulas(child)


@contextmanager
def figures_undrawn(pages=False):
    """Figures are not drawn where nobody keeps what a cell shows, which takes a tenth of a second or two each, with
    `pages` not on explorers' first pages either; only whether their formulas can be typeset is asked. The block's value
    is a list of what is wrong with them: IPython shows an error in a figure as it shows a figure, and goes on. (pyplot
    draws by itself what a cell leaves behind.)"""
    from IPython.core import pylabtools
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.cbook import is_math_text
    from matplotlib.mathtext import MathTextParser

    wrong, parser = [], MathTextParser("path")

    def read(fig, *args, **kwargs):
        for text in filter(is_math_text, formulas(fig)):
            try:
                parser.parse(text)
            except ValueError as e:
                wrong.append(f"{text}: {e}")

    def read_page(fig, form, alt):
        read(fig)
        return frames.img("", alt)

    with ExitStack() as undrawn:
        undrawn.enter_context(replaced(FigureCanvasBase, "draw_idle", lambda *args, **kwargs: None))
        for name in "retina_figure", "print_figure":
            undrawn.enter_context(replaced(pylabtools, name, read))
        if pages:
            from modelzip.workshop import frames

            undrawn.enter_context(replaced(frames, "img_of", read_page))
        yield wrong


@contextmanager
def few_rounds():
    """`modelzip.measure.compare` times models in six rounds, the fewest of which an interval can promise 95 %, where
    nobody keeps what a cell shows; no notebook asserts a time of it."""
    from modelzip import measure

    compare = measure.compare

    @functools.wraps(compare)
    def fewer(*args, **kwargs):
        bound = inspect.signature(compare).bind(*args, **kwargs)
        bound.apply_defaults()
        bound.arguments["repeats"] = min(bound.arguments["repeats"], 6)
        return compare(*bound.args, **bound.kwargs)

    with replaced(measure, "compare", fewer):
        yield


@contextmanager
def compared_whole():
    """fastcore's `test_eq` compares bytes and lists an element at a time, 5 µs each; here plain ones are compared as a
    whole, with the same result."""
    from fastcore import imports, test

    equals, plain = imports.equals, {int, str, bool}

    def quick(a, b):
        if type(a) is type(b) and type(a) in (bytes, bytearray):
            return a == b
        if type(a) is type(b) is list and {*map(type, a), *map(type, b)} <= plain:
            return a == b
        return equals(a, b)

    with replaced(imports, "equals", quick), replaced(test, "equals", quick):
        yield


@contextmanager
def pooled_by_rows():
    """PyTorch looks for the largest of 2 × 2 numbers one window after the other, a quarter of the time that a LeNet takes;
    here for all windows at once, with the same numbers and gradients, to the bit. (Of NaN in a window the gradient may
    be another's.) Where anybody watches operations, or few are asked for, nothing is changed."""
    import torch
    import torch.nn.functional as F
    from torch.overrides import has_torch_function_unary as watched

    slow, back = F.max_pool2d, torch.ops.aten.max_pool2d_with_indices_backward

    class Pool(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
            top, bottom = torch.maximum(a, b), torch.maximum(c, d)
            if ctx.needs_input_grad[0]:  # where each window's first largest stands; aten counts within an image
                height, width = x.shape[-2:]
                corners = torch.arange(0, height, 2)[:, None] * width + torch.arange(0, width, 2)
                at = torch.where(bottom > top, (d > c).long().add_(width), (b > a).long()).add_(corners)
                ctx.save_for_backward(x, at)
            return torch.maximum(top, bottom)

        @staticmethod
        def backward(ctx, gradient):
            x, at = ctx.saved_tensors
            return back(gradient, x, [2, 2], [2, 2], [0, 0], [1, 1], False, at)

    @functools.wraps(slow)
    def pooled(x, *args, **kwargs):
        seen = torch.jit.is_tracing() or torch.compiler.is_compiling() or watched(x)
        seen = seen or torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None
        if seen or type(x) is not torch.Tensor or args != (2,) or kwargs:
            return slow(x, *args, **kwargs)
        plain = x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous() and x.dim() == 4
        halved = plain and x.numel() > 50_000 and x.shape[2] % 2 == x.shape[3] % 2 == 0
        return Pool.apply(x) if halved else slow(x, *args, **kwargs)

    with replaced(F, "max_pool2d", pooled):
        yield
