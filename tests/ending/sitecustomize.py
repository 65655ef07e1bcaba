"""Every Python that a test starts looks here. At its end a process looks through all that PyTorch made once more, for
garbage, which takes half a second: here it does not. And while PyTorch is imported, 440 times, for a fifth of a second:
here 30 times. A `sitecustomize` of the user's own, which this one hides, is run."""

import atexit, gc, os, sys
from importlib.machinery import PathFinder

gc.set_threshold(10_000, 10, 10)
atexit.register(gc.freeze)
others = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]
if (own := PathFinder.find_spec(__name__, others)) is not None and own.loader is not None:
    from importlib.util import module_from_spec

    own.loader.exec_module(module_from_spec(own))
