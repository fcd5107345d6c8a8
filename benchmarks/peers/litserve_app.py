"""LitServe with two workers: `python -m benchmarks.peers.litserve_app PORT`."""

import sys
from typing import Annotated

import litserve
from fastapi import Body
from fastapi.responses import Response

from benchmarks.peers.segmenter import Segmenter


class Segmentation(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.segmenter = Segmenter()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        return request

    def predict(self, x: bytes) -> bytes:
        return self.segmenter(x)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    server = litserve.LitServer(
        Segmentation(api_path="/segment"), accelerator="cpu", devices=1, workers_per_device=2, timeout=60
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
