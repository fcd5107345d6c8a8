"""The JSON that the service answers with, as models that build and document it, and the price in its headers."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from service.presence import PresenceRow


class ModelIdentity(BaseModel):
    """Which model answered."""

    name: str = Field(description="Name of the model, from the .onnx file.")
    sha256: str = Field(description="Digest of the .onnx file.")


class ImageFacts(BaseModel):
    """The picture as it was read."""

    width: int = Field(description="Width in pixels after EXIF orientation.")
    height: int = Field(description="Height in pixels after EXIF orientation.")
    exif_applied: bool = Field(description="Whether EXIF orientation turned or mirrored the picture.")
    mode: str = Field(
        description="Pixel mode of the file, before conversion to RGB: `RGB`, `RGBA`, `L`, `P`, `I;16`, ..."
    )


class MaskSize(BaseModel):
    """Size of the label map: the picture's own, unless `max_side` reduced it."""

    width: int
    height: int


class PngMask(MaskSize):
    """The label map as a file."""

    format: Literal["png"] = Field(default="png", description="Indexed PNG; a pixel's value is the id of its class.")
    encoding: Literal["base64"] = "base64"
    data: str = Field(description="The PNG file in base64.")


class RleMask(MaskSize):
    """The label map as one binary mask for each class that has pixels."""

    format: Literal["rle"] = "rle"
    segments: list[dict[str, Any]] = Field(description="COCO: class, id, segmentation {size, counts}, area, bbox.")


class AttachedMask(MaskSize):
    """The label map is in the other part of the answer."""

    format: Literal["attached"] = "attached"


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    decode: float = Field(description="Picture file to pixels.")
    queue: float = Field(description="Waiting for a free worker or for the device.")
    infer: float = Field(description="The model's run: resizing, every view, merging, argmax.")
    encode: float = Field(description="Label map to the format asked for.")
    total: float = Field(
        description="From the request's first byte, in a batch from the picture's turn, to this answer."
    )


class Cost(BaseModel):
    """What the request was charged, known before it was run."""

    pixels: int = Field(description="Pixels x views, in the network and at the picture's own size.")
    predicted_ms: float = Field(
        description="Predicted time of the run and of writing the answer, from those before it."
    )


class Prediction(Cost):
    """The answer to `dry_run`: what segmenting the picture would take now."""

    wait_ms: float = Field(description="Predicted time before its turn comes.")
    queue_pixels: int = Field(description="Pixels x views in the house.")
    queue_limit_pixels: int = Field(description="Most pixels x views that are let in.")


class SegmentAnswer(BaseModel):
    """What is where in one picture."""

    id: str = Field(description="The request's id, also in the header X-Request-ID.")
    model: ModelIdentity
    image: ImageFacts
    scales: list[float] = Field(description="Scales that were averaged.")
    flip: bool = Field(description="Whether mirrored views were averaged too.")
    mask: PngMask | RleMask | AttachedMask = Field(discriminator="format")
    presence: list[PresenceRow] = Field(description="Every class asked about, the highest score first.")
    cost: Cost
    timing_ms: Timings


class ItemAnswer(BaseModel):
    """One picture of a batch: an answer or an error."""

    name: str = Field(description="The file's name, as sent.")
    answer: SegmentAnswer | None = None
    error: "Fault | None" = None


class BatchAnswer(BaseModel):
    """One item for each picture, in the order sent."""

    id: str = Field(description="The request's id, also in the header X-Request-ID.")
    items: list[ItemAnswer]


class Segment(BaseModel):
    """One class of a picture, as Hugging Face's clients read it."""

    label: str = Field(description="Name of the class.")
    score: float = Field(description="Score of being in the scene, 0..1.")
    mask: str = Field(description="Grey PNG file in base64, 255 where the class is and 0 elsewhere.")


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


class ModelEntry(BaseModel):
    """One of the models the service was started with."""

    name: str = Field(description="The name to ask for it by, in option `model`.")
    default: bool = Field(description="Whether it answers where a request names none.")
    state: str = Field(description="`ready`, `starting`, `restarting`, `failed`, `closed` or `unloaded`.")
    device: Literal["cpu", "cuda"] | None = None
    model: HealthModel | None = Field(default=None, description="What its file says; null while it is not loaded.")


class ModelsAnswer(BaseModel):
    """Every model, in the order of the settings."""

    models: list[ModelEntry]


class HealthAnswer(BaseModel):
    """The service is up and has run its model once."""

    status: Literal["ok"] = "ok"
    version: str = Field(description="Version of the service.")
    onnxruntime: str = Field(description="Version of ONNX Runtime.")
    device: Literal["cpu", "cuda"]
    model: HealthModel


class StateAnswer(BaseModel):
    """Whether the service is alive, or ready; `reasons` is empty where it is."""

    ok: bool
    reasons: list[str]


class Fault(BaseModel):
    """What went wrong."""

    code: str = Field(description="A stable word for programs.")
    message: str = Field(description="A sentence for people.")
    request_id: str


class ErrorAnswer(BaseModel):
    """Every answer that is not a success has this body."""

    error: Fault


def cost_headers(pixels: int, predicted_ms: float, phases: Mapping[str, float] | None = None) -> dict[str, str]:
    """What a request was charged, and the milliseconds of its phases where it has run; sums for several pictures."""
    headers = {"X-Cost-Pixels": str(pixels), "X-Predicted-Ms": f"{predicted_ms:.1f}"}
    if phases is not None:
        headers["Server-Timing"] = ", ".join(f"{phase};dur={ms:.2f}" for phase, ms in phases.items())
    return headers
