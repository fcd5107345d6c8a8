"""What stands in for Triton's ONNX Runtime backend, which comes in its container only: one for Triton's Python backend.

It does with a model's folder and requests what that one does: all that a request goes through before and after is
Triton's own. Tensors are exchanged by DLPack, because the release's NumPy interface knows NumPy 1 only.
"""

import json
from pathlib import Path

import numpy
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """The names of the class and its methods are the Python backend's."""

    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, arguments):
        config = json.loads(arguments["model_config"])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        for library in config.get("model_operations", {}).get("op_library_filename", []):
            options.register_custom_ops_library(library)
        file = Path(arguments["model_repository"]) / arguments["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests):
        tensors = [
            {name: numpy.from_dlpack(triton.get_input_tensor_by_name(request, name)).copy() for name in self.inputs}
            for request in requests
        ]
        feeds = {name: numpy.concatenate([given[name] for given in tensors]) for name in self.inputs}
        answers = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        responses, start = [], 0
        for given in tensors:
            end = start + len(given["image"])
            parts = [(name, numpy.ascontiguousarray(answer[start:end])) for name, answer in answers.items()]
            responses.append(triton.InferenceResponse([triton.Tensor.from_dlpack(*part) for part in parts]))
            start = end
        return responses
