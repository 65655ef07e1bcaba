"""Neural-network compression, derived step by step: honest bytes, honest milliseconds"""

# Made by tools/export.py. What is named here is imported when it is asked for: `import modelzip` alone takes no time.

import importlib, sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and checkers of types
    from .auto import compress as compress
    from .data import Data as Data
    from .data import Split as Split
    from .data import accuracy as accuracy
    from .data import register_model as register_model
    from .data import train as train
    from .deploy import deploy as deploy
    from .distill import distill as distill
    from .exchange import from_gguf as from_gguf
    from .exchange import from_hdf5 as from_hdf5
    from .exchange import from_npz as from_npz
    from .exchange import from_safetensors as from_safetensors
    from .exchange import load_many as load_many
    from .exchange import save_many as save_many
    from .exchange import to_gguf as to_gguf
    from .exchange import to_hdf5 as to_hdf5
    from .exchange import to_npz as to_npz
    from .exchange import to_safetensors as to_safetensors
    from .explore import explore as explore
    from .kernels import use_kernels as use_kernels
    from .kernels import what_runs as what_runs
    from .learned_rounding import learned_rounding as learned_rounding
    from .measure import Report as Report
    from .measure import compare as compare
    from .measure import count_parameters as count_parameters
    from .measure import file_bytes as file_bytes
    from .measure import latency as latency
    from .measure import macs as macs
    from .measure import peak_memory as peak_memory
    from .onnx_export import to_onnx as to_onnx
    from .pack import PackError as PackError
    from .pack import diff as diff
    from .pack import inspect as inspect
    from .pack import load as load
    from .pack import read_tensor as read_tensor
    from .pack import save as save
    from .prune import left_whole as left_whole
    from .prune import prune_gradually as prune_gradually
    from .prune import prune_model as prune_model
    from .prune import remove_masks as remove_masks
    from .prune import sensitivity as sensitivity
    from .prune import sparsify_model as sparsify_model
    from .ptq import awq as awq
    from .ptq import calibrate as calibrate
    from .ptq import correct_bias as correct_bias
    from .ptq import equalize as equalize
    from .ptq import gptq as gptq
    from .ptq import hqq as hqq
    from .ptq import smooth as smooth
    from .qat import convert as convert
    from .qat import prepare as prepare
    from .qat import set_bits as set_bits
    from .quant import QTensor as QTensor
    from .quant import dequantize as dequantize
    from .quant import dequantize_model as dequantize_model
    from .quant import floats_left as floats_left
    from .quant import quantize as quantize
    from .quant import quantize_layer as quantize_layer
    from .quant import quantize_model as quantize_model
    from .recipe import Recipe as Recipe
    from .recipe import sweep as sweep
    from .static import quantize_static as quantize_static
    from .structured import factorize as factorize
    from .structured import fold_batchnorm as fold_batchnorm
    from .structured import shrink as shrink
    from .trellis import trellis as trellis

_HOMES = {
    "auto": "compress",
    "data": "Data Split accuracy register_model train",
    "deploy": "deploy",
    "distill": "distill",
    "exchange": "from_gguf from_hdf5 from_npz from_safetensors load_many save_many to_gguf to_hdf5 to_npz to_safetensors",
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
_MODULES = """
archive auto budget channels cli coding data deploy distill exchange explore integers kernels language
learned_rounding lossless lsq measure onnx_export pack price prune ptq qat qtensor quant ranges recipe rotations
rounding saliency static structured symbols threads tour trellis
""".split()
__all__ = [
    "Data", "PackError", "QTensor", "Recipe", "Report", "Split", "accuracy", "awq", "calibrate", "compare",
    "compress", "convert", "correct_bias", "count_parameters", "deploy", "dequantize", "dequantize_model", "diff",
    "distill", "equalize", "explore", "factorize", "file_bytes", "floats_left", "fold_batchnorm", "from_gguf",
    "from_hdf5", "from_npz", "from_safetensors", "gptq", "hqq", "inspect", "latency", "learned_rounding",
    "left_whole", "load", "load_many", "macs", "peak_memory", "prepare", "prune_gradually", "prune_model",
    "quantize", "quantize_layer", "quantize_model", "quantize_static", "read_tensor", "register_model",
    "remove_masks", "save", "save_many", "sensitivity", "set_bits", "shrink", "smooth", "sparsify_model", "sweep",
    "to_gguf", "to_hdf5", "to_npz", "to_onnx", "to_safetensors", "train", "trellis", "use_kernels", "what_runs",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    for home, names in _HOMES.items():
        if name in names.split():
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(n for n in globals() if n.startswith("__"))})
