"""The compiled Encoding kernel for ONNX Runtime: faster where it is present, missed nowhere.

A model's node `encnet::Encoding` runs the kernel when the library is registered; without it ONNX Runtime inlines the
function that the file carries. `make kernels` builds the library, ENCNET_KERNELS=off leaves it aside.
"""

import logging
import os
from pathlib import Path

import onnxruntime as ort

LIBRARY = Path(__file__).parents[1] / "build" / "kernels" / "libencnet_ort.so"

_log = logging.getLogger(__name__)


def register(options: ort.SessionOptions) -> bool:
    """Make sessions with these options use the kernel on the CPU; where that fails, one logged line says why."""
    if os.environ.get("ENCNET_KERNELS", "").lower() == "off":
        return False
    if not LIBRARY.exists():
        _log.info("no compiled Encoding kernel; the model's own function is used (make kernels builds one)")
        return False
    try:
        options.register_custom_ops_library(str(LIBRARY))
    except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _log.warning("the compiled Encoding kernel does not load, the model's own function is used: %s", reason)
        return False
    return True
