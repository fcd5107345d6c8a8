"""From a checkpoint to one self-contained ONNX file: the whole of inference, or the network alone."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on ONNX Runtime would report its use to its makers
