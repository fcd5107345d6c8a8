"""Ray Serve with two replicas: `python -m benchmarks.peers.ray_app PORT`."""

import asyncio
import signal
import sys

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers.segmenter import Segmenter


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 1})
class Segmentation:
    def __init__(self) -> None:
        self.segmenter = Segmenter()

    async def __call__(self, request: Request) -> Response:
        png = await asyncio.to_thread(self.segmenter, await request.body())
        return Response(png, media_type="image/png")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that Ray's processes are ended too
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Segmentation.bind(), route_prefix="/segment", blocking=True)  # type: ignore[attr-defined]
