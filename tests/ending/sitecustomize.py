"""Every Python that a test starts looks here. At its end a process looks through all that PyTorch made once more, for
garbage, which takes half a second: here it does not."""

import atexit, gc

atexit.register(gc.freeze)
