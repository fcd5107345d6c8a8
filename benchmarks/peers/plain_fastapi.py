"""FastAPI and uvicorn alone: a `def` endpoint, which FastAPI runs in its pool of 40 threads."""

from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from benchmarks.peers.segmenter import Segmenter

app = FastAPI()
segmenter = Segmenter()


async def body(request: Request) -> bytes:
    return await request.body()


@app.post("/segment")
def segment(picture: Annotated[bytes, Depends(body)]) -> Response:
    return Response(segmenter(picture), media_type="image/png")
