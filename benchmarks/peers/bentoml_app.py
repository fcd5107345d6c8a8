"""BentoML with two workers: `bentoml serve benchmarks.peers.bentoml_app:Segmentation`."""

from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmarks.peers.segmenter import Segmenter


@bentoml.service(workers=2)
class Segmentation:
    def __init__(self) -> None:
        self.segmenter = Segmenter()

    @bentoml.api(route="/segment")
    def segment(self, picture: bytes, /) -> Annotated[bytes, ContentType("image/png")]:
        return self.segmenter(picture)
