"torchvision's classifiers for tests and bench, also where its compiled operators do not load."

import sys

import torch

OPERATORS = """nms qnms roi_align _roi_align_backward ps_roi_align _ps_roi_align_backward roi_pool _roi_pool_backward ps_roi_pool _ps_roi_pool_backward qroi_align
    deform_conv2d _deform_conv2d_backward""".split()


def torchvision_models():
    """torchvision.models; its classifiers are plain Python, so that names are enough where its compiled operators
    do not load."""
    try:
        import torchvision
    except ImportError:
        return None
    except RuntimeError:
        for name in [n for n in sys.modules if n.startswith("torchvision")]:
            del sys.modules[name]
        global library
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            library.define(f"{name}(Tensor x) -> Tensor")
        import torchvision
    return torchvision.models
