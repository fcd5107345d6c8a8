"""Serve an exported EncNet: a picture in, a mask and the classes that are present out. Needs ONNX Runtime, no torch."""

import os

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on ONNX Runtime would report its use to its makers
