"""Serve an exported EncNet: a picture in, a mask and the classes that are present out. Needs ONNX Runtime, no torch."""

__version__ = "0.1.0"
