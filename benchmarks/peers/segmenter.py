"""What every server here does with a request: the service's own decoder, model and encoder, in one call."""

import os

from service.engine import Engine
from service.images import decode
from service.presence import presence_rows
from service.render import mask_png
from service.settings import Settings

THREADS = "PEER_THREADS"  # environment: threads of one inference, 0 for one per core


class Segmenter:
    """Picture file -> PNG mask, to the byte what the service answers to format=png. The model is that of Settings."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.engine = Engine(self.settings.model, "cpu", int(os.environ.get(THREADS, "0")))
        self.engine.warm_up()

    def __call__(self, data: bytes) -> bytes:
        picture = decode(data, max_bytes=self.settings.max_bytes, max_pixels=self.settings.max_pixels)
        result = self.engine.segment(picture.pixels)
        metadata = self.engine.metadata
        rows = presence_rows(result.mask, result.presence, metadata.classes, self.settings.threshold)
        texts = {"model": metadata.name, "model_sha256": self.engine.sha256, "presence": rows}
        return mask_png(result.mask, metadata.classes, metadata.palette, texts)
