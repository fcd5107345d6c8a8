"""The compiled Encoding kernel for ONNX Runtime: faster where it is present, missed nowhere.

A model's node `encnet::Encoding` runs the kernel when the library is registered; without it ONNX Runtime inlines the
function that the file carries. `make kernels` builds the libraries, ENCNET_KERNELS=off leaves them aside.
"""

import logging
import os
from pathlib import Path

import onnxruntime as ort

from service.errors import first_line

LIBRARY = Path(__file__).parents[1] / "build" / "kernels" / "libencnet_ort.so"
CUDA_LIBRARY = LIBRARY.with_name("libencnet_ort_cuda.so")

_log = logging.getLogger(__name__)


def register(options: ort.SessionOptions, cuda: bool = False) -> bool:
    """Make sessions with these options use the kernel on the CPU, or that in ONNX Runtime's CUDA provider.

    Where that fails, one logged line says why.
    """
    library = CUDA_LIBRARY if cuda else LIBRARY
    if os.environ.get("ENCNET_KERNELS", "").lower() == "off":
        return False
    if not library.exists():
        _log.info("no compiled Encoding kernel; the model's own function is used (make kernels builds one)")
        return False
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
        _log.warning(
            "the compiled Encoding kernel does not load, the model's own function is used: %s", first_line(error)
        )
        return False
    return True
