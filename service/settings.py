"""Everything that can be set about a running service, each from an ENCNET_ environment variable."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

EMBEDDED_MODEL = Path(__file__).parent / "models" / "camvid.onnx"

PILLOW_PIXEL_GUARD = 178_956_970  # Pillow refuses larger pictures by itself, as decompression bombs


class Settings(BaseSettings):
    """Settings of the service; `ENCNET_PORT=9000` sets `port`, and so on for each field.

    `max_pixels` bounds memory: class probabilities at the picture's own size cost H*W*C*4 bytes, so 16 megapixels with
    CamVid's 11 classes take 0.7 GB, and with ADE20K's 150 classes 9.6 GB. Lower it where memory is small.

    Raises pydantic.ValidationError for a value out of range.
    """

    model_config = SettingsConfigDict(env_prefix="ENCNET_")

    model: Path = Field(default=EMBEDDED_MODEL, description="The .onnx file to serve.")
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes the GPU where there is one.")
    threads: int = Field(default=0, ge=0, description="Threads for one inference on the CPU; 0 is one per core.")
    max_bytes: int = Field(default=20 * 2**20, ge=1, description="Largest picture file, in bytes.")
    max_pixels: int = Field(default=16_000_000, ge=1, le=PILLOW_PIXEL_GUARD, description="Largest picture, in pixels.")
    min_scale: float = Field(default=0.25, gt=0, description="Smallest scale a request may ask for.")
    max_scale: float = Field(default=3.0, gt=0, description="Largest scale a request may ask for.")
    max_scales: int = Field(default=8, ge=1, description="Most scales in one request; `flip` doubles the views.")
    threshold: float = Field(default=0.5, ge=0, le=1, description="A class is present from this score on.")

    @model_validator(mode="after")
    def _scale_range_is_not_empty(self) -> "Settings":
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale:g} is above max_scale {self.max_scale:g}")
        return self
