"""The JSON that the service answers with, as models: they build the answers and they are the documentation of them."""

from typing import Literal

from pydantic import BaseModel, Field

from service.presence import PresenceRow


class ModelIdentity(BaseModel):
    """Which model answered."""

    name: str = Field(description="Name of the model, from the .onnx file.")
    sha256: str = Field(description="Digest of the .onnx file.")


class ImageFacts(BaseModel):
    """The picture as it was read."""

    width: int = Field(description="Width in pixels after EXIF orientation; the mask has the same.")
    height: int = Field(description="Height in pixels after EXIF orientation; the mask has the same.")
    exif_applied: bool = Field(description="Whether EXIF orientation turned or mirrored the picture.")
    mode: str = Field(
        description="Pixel mode of the file, before conversion to RGB: `RGB`, `RGBA`, `L`, `P`, `I;16`, ..."
    )


class Mask(BaseModel):
    """The label map."""

    format: Literal["png"] = Field(default="png", description="Indexed PNG; a pixel's value is the id of its class.")
    encoding: Literal["base64"] = "base64"
    data: str = Field(description="The PNG file in base64.")


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    decode: float = Field(description="Picture file to pixels.")
    queue: float = Field(description="Waiting for a free worker or for the device.")
    infer: float = Field(description="Inside ONNX Runtime: resizing, every view, merging, argmax.")
    encode: float = Field(description="Label map to PNG.")
    total: float = Field(description="From the first byte of the request to this answer, receiving the body included.")


class SegmentAnswer(BaseModel):
    """What is where in one picture."""

    id: str = Field(description="The request's id, also in the header X-Request-ID.")
    model: ModelIdentity
    image: ImageFacts
    scales: list[float] = Field(description="Scales that were averaged.")
    flip: bool = Field(description="Whether mirrored views were averaged too.")
    mask: Mask
    presence: list[PresenceRow] = Field(description="Every class of the model, the highest score first.")
    timing_ms: Timings


class ClassEntry(BaseModel):
    """One class of the model."""

    id: int = Field(description="Value in the mask.")
    name: str
    color: tuple[int, int, int] = Field(description="Red, green, blue, 0..255.")


class ClassesAnswer(BaseModel):
    """The classes the model knows, in id order."""

    model: ModelIdentity
    classes: list[ClassEntry]


class HealthModel(ModelIdentity):
    """The model in service."""

    checkpoint_sha256: str = Field(description="Digest of the checkpoint that the file was exported from.")
    classes: int = Field(description="Number of classes.")
    base_size: int = Field(description="Long side of a picture at scale 1, in pixels.")
    scales: list[float] = Field(description="Scales used when a request gives none.")
    flip: bool = Field(description="Flip used when a request gives none.")
    description: str | None = None
    licence: str | None = None


class HealthAnswer(BaseModel):
    """The service is up and has run its model once."""

    status: Literal["ok"] = "ok"
    version: str = Field(description="Version of the service.")
    onnxruntime: str = Field(description="Version of ONNX Runtime.")
    device: Literal["cpu", "cuda"]
    model: HealthModel


class Fault(BaseModel):
    """What went wrong."""

    code: str = Field(description="A stable word for programs.")
    message: str = Field(description="A sentence for people.")
    request_id: str


class ErrorAnswer(BaseModel):
    """Every answer that is not a success has this body."""

    error: Fault
