"""From a checkpoint to one self-contained ONNX file: the whole of inference, or the network alone."""
