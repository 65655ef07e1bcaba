"""Write modelzip/ from the notebooks, as `nbdev_export` does, and three things that it does not.

    python tools/export.py                       all
    python tools/export.py nbs/03b_quant.ipynb …   the modules of these notebooks

What stands beside arguments comes into the docstrings (tools/docstrings.py), what `@patch` gives to a class is declared
in it for checkers of types (tools/declarations.py), and `modelzip/__init__.py` says what `import modelzip` brings: `FRONT`.
"""

import ast, gc, json, sys, textwrap
from pathlib import Path

from nbdev.config import add_init, get_config
from nbdev.doclinks import _build_modidx, nbglob
from nbdev.export import nb_export

from declarations import declarations, parsed, with_declarations, with_import
from docstrings import takes, with_parameters

FRONT = {  # module → its names that `modelzip.` has: what somebody with a model of their own calls
    "auto": "compress",
    "data": "Data Split accuracy register_model train",
    "deploy": "deploy",
    "distill": "distill",
    "exchange": "from_gguf from_hdf5 from_npz from_safetensors load_many save_many"
    " to_gguf to_hdf5 to_npz to_safetensors",
    "explore": "explore",
    "kernels": "use_kernels what_runs",
    "learned_rounding": "learned_rounding",
    "measure": "Report compare count_parameters file_bytes latency macs peak_memory",
    "onnx_export": "to_onnx",
    "pack": "PackError diff inspect load read_tensor save",
    "prune": "left_whole prune_gradually prune_model remove_masks sensitivity sparsify_model",
    "ptq": "awq calibrate correct_bias equalize gptq hqq smooth",
    "qat": "convert prepare set_bits",
    "quant": "QTensor dequantize dequantize_model floats_left quantize quantize_layer quantize_model",
    "recipe": "Recipe sweep",
    "static": "quantize_static",
    "structured": "factorize fold_batchnorm shrink",
    "trellis": "trellis",
}

INIT = '''"""{about}"""

# Made by tools/export.py. What is named here is imported when it is asked for: `import modelzip` alone takes no time.

import importlib, sys
from typing import TYPE_CHECKING, Any

__version__ = "{version}"

if TYPE_CHECKING:  # for editors and checkers of types
{imports}

_HOMES = {{
{homes}
}}
_MODULES = """
{modules}
""".split()
__all__ = [
{names}
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{{__name__}}.{{name}}")
    for home, names in _HOMES.items():
        if name in names.split():
            value = globals()[name] = getattr(importlib.import_module(f"{{__name__}}.{{home}}"), name)
            return value
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({{*__all__, *_MODULES, *(n for n in globals() if n.startswith("__"))}})
'''


def front(lib, config):
    "The text of `modelzip/__init__.py`. A function that has its module's name is that module, which can be called."
    names = [(m, n) for m, some in FRONT.items() for n in some.split()]
    wrapped = lambda text, indent="": textwrap.fill(text, 116, initial_indent=indent, subsequent_indent=indent)
    return INIT.format(
        about=config.description,
        version=config.version,
        imports="\n".join(f"    from .{m} import {n} as {n}" for m, n in names),
        homes="\n".join(f'    "{m}": "{some}",' for m, some in FRONT.items()),
        modules=wrapped(" ".join(sorted(p.stem for p in lib.glob("[a-z]*.py")))),
        names=wrapped(", ".join(f'"{n}"' for n in sorted(n for _, n in names)) + ",", "    "),
    )


def exported(path):
    "The cells of a notebook that become its module."
    for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.lstrip().startswith(("#| export", "#|export")):
            yield source


def definitions(paths):
    "Name of a function, or of a class → the definition that says what it takes, and the source of its cell."
    found = {}
    for path in paths:
        for source in exported(path):
            tree = parsed(source)
            for n in tree.body if tree else ():
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and (made := takes(n)) is not None:
                    found[n.name] = made, source
    return found


def export(paths=()):
    "Write the modules of some notebooks, or of all, and then the front page."
    every = nbglob(as_path=True).sorted("name")
    known = definitions(every)

    for path in paths or every:
        declared = declarations(exported(path))
        waits = bool(declared)  # until a cell imports

        def written(cell):
            nonlocal waits
            if cell.cell_type == "code" and {"export", "exporti", "exports"} & cell.directives_.keys():
                source = with_declarations(with_parameters(cell.source, known), declared)
                if waits and (imports := with_import(source)) is not None:
                    source, waits = imports, False
                cell.set_source(source)

        nb_export(path, procs=[written])
    if not paths:
        config = get_config()
        add_init(config.lib_path)
        (config.lib_path / "__init__.py").write_text(front(config.lib_path, config), encoding="utf-8")
        _build_modidx()


if __name__ == "__main__":
    gc.disable()  # it would walk through thousands of trees, none of which is a cycle, again and again
    export(sys.argv[1:])
