"""Everything that can be set about a running service, each from an ENCNET_ environment variable or a file."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict

EMBEDDED_MODEL = Path(__file__).parent / "models" / "camvid.onnx"

ENCODED = "_encoded"  # ends the name under which the Open Inference Protocol's face takes picture files
_STATISTICS = "stats"  # of all models, under /v2/models where else a model's name stands
_PREFIX, _FILE = "ENCNET_", "encnet.env"
_OTHER_VARIABLES = {"ENCNET_KERNELS", "ENCNET_INSTRUCTIONS"}  # read before there are settings, by the kernels
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_\w+)?$|_PORT(_\d+_\w+)?$")  # what Kubernetes sets for a Service
PILLOW_PIXEL_GUARD = 178_956_970  # Pillow refuses larger pictures by itself, as decompression bombs


class Settings(BaseSettings):
    """Settings of the service; `ENCNET_PORT=9000` sets `port`, and so on for each field.

    The same names may stand in a file `encnet.env` in the working directory; the environment wins over it, and the
    command line over both. One that is set to nothing is not set.

    `max_pixels` bounds memory: class probabilities at the picture's own size cost H*W*C*4 bytes, so 16 megapixels with
    CamVid's 11 classes take 0.7 GB, and with ADE20K's 150 classes 9.6 GB. A run's peak is about five times that
    (benchmarks/sizing.py measures it). Lower it where memory is small.

    Raises pydantic.ValidationError for a value out of range.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_file=_FILE, env_ignore_empty=True, extra="ignore")

    model: Path = Field(default=EMBEDDED_MODEL, description="The .onnx file to serve.")
    models: Annotated[dict[str, Path], NoDecode] = Field(
        default={}, description="More models by name, as in `night=night.onnx,indoor=indoor.onnx`."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto, cpu or cuda; auto takes the GPU where there is one."
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="Threads for one inference on the CPU; 0 is one per core that it may use."
    )
    lanes: int = Field(
        default=2, ge=1, description="Pictures to run side by side on the CPU, which then share the threads."
    )
    gpu_memory_limit: int = Field(default=0, ge=0, description="Most bytes of GPU memory to use; 0 is no limit.")
    max_batch: int = Field(
        default=1, ge=1, le=64, description="Most waiting pictures of one shape to run as one batch, max_pixels in all."
    )

    max_bytes: int = Field(default=20 * 2**20, ge=1, description="Largest picture file, in bytes.")
    max_pixels: int = Field(default=16_000_000, ge=1, le=PILLOW_PIXEL_GUARD, description="Largest picture, in pixels.")
    max_items: int = Field(default=32, ge=1, description="Most pictures in one request to /segment/batch.")
    max_buffered_bytes: int = Field(
        default=512 * 2**20,
        ge=1,
        description="Most bytes of request bodies in memory at a time; beyond it 429, or 413 to one body alone.",
    )
    upload_timeout_ms: int = Field(default=60_000, ge=1, description="Time for a request's body to arrive.")
    header_timeout_ms: int = Field(
        default=10_000, ge=1, description="Time for a request's header to arrive; then the connection is closed."
    )
    send_timeout_ms: int = Field(
        default=20_000, ge=1, description="A client that reads nothing of its answer for so long is disconnected."
    )
    min_scale: float = Field(
        default=0.25, gt=0, allow_inf_nan=False, description="Smallest scale a request may ask for."
    )
    max_scale: float = Field(default=3.0, gt=0, allow_inf_nan=False, description="Largest scale a request may ask for.")
    max_scales: int = Field(default=8, ge=1, description="Most scales in one request; `flip` doubles the views.")
    threshold: float = Field(default=0.5, ge=0, le=1, description="A class counts as present from this score on.")

    max_queue_pixels: int = Field(
        default=256_000_000,
        ge=1,
        description="Most work to hold, running and waiting, in pixels x views; beyond it, 429.",
    )
    timeout_ms: int = Field(
        default=30_000,
        ge=1,
        description="Time in which a request is answered, or fails with 504, if it sets no `timeout_ms`.",
    )
    max_timeout_ms: int = Field(default=300_000, ge=1, description="Largest `timeout_ms` that a request may set.")
    deadline_share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="A request predicted to take more than this share of its `timeout_ms` gets 429.",
    )
    hang_seconds: float = Field(
        default=60.0,
        gt=0,
        description="A run counts as hung when it takes longer than this and than 10 times its prediction; "
        "so does loading again.",
    )
    grace_seconds: float = Field(
        default=30.0, ge=0, allow_inf_nan=False, description="Time to finish accepted requests when told to stop."
    )

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="Keys, separated by commas; each request must send one of them. Empty: open to all."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Web origins, separated by commas, whose pages may call the service (CORS); `*` for all.",
    )
    allow_urls: bool = Field(default=False, description="Whether a request may name a picture by URL.")
    url_timeout_ms: int = Field(default=5_000, ge=1, description="Time to fetch a picture by URL.")
    remote_control: bool = Field(
        default=False, description="Whether clients may load and unload models and set the log level through `/v2`."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="text for people, or json for programs.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level to log: debug, info, warning or error."
    )

    @field_validator("host")
    @classmethod
    def _host_can_be_looked_up(cls, value: str) -> str:
        try:
            value.encode("idna")  # as the resolver will
        except UnicodeError:
            raise ValueError(f"{value[:128]!r} is neither an address nor the name of a host") from None
        return value

    @field_validator("models", mode="before")
    @classmethod
    def _read_models(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(name.strip() and path.strip() for name, _, path in pairs):
            raise ValueError("must be NAME=FILE.onnx pairs separated by commas")
        names = [name.strip() for name, _, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the model name {twice[0]!r} is given twice; choose another for one of them")
        return {name.strip(): path.strip() for name, _, path in pairs}

    @field_validator("models")
    @classmethod
    def _names_fit_in_addresses(cls, value: dict[str, Path]) -> dict[str, Path]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"the model name {name!r} may only have letters, digits, '-', '_' and '.'")
        return value

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _read_list(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if value.strip() and not parts:
            raise ValueError("has commas and nothing between them; leave it out where none is wanted")
        return parts

    @model_validator(mode="after")
    def _settings_agree(self) -> "Settings":
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale:g} is above max_scale {self.max_scale:g}")
        if self.model.stem in self.models:
            raise ValueError(f"models: the name {self.model.stem} is that of model {self.model}; choose another")
        if own := [name for name in (self.model.stem, *self.models) if name.endswith(ENCODED)]:
            raise ValueError(f"the model name {own[0]!r} must not end in {ENCODED}: such names are taken under /v2")
        if _STATISTICS in (self.model.stem, *self.models):
            raise ValueError(f"the model name {_STATISTICS!r} is taken under /v2, by the statistics; choose another")
        if self.timeout_ms > self.max_timeout_ms:
            raise ValueError(f"timeout_ms {self.timeout_ms} is above max_timeout_ms {self.max_timeout_ms}")
        return self


def ignored_names() -> list[str]:
    """A sentence about each name, in the environment or in the settings file, that looks like a setting and is none.

    A key under a misspelt name would leave the service open to everyone, and nobody would see it.
    """
    known = [f"{_PREFIX}{name.upper()}" for name in Settings.model_fields]
    found = {name.upper(): "" for name in os.environ if name.upper().startswith(_PREFIX)}
    found = {name: "" for name in found if name not in _OTHER_VARIABLES and not _SERVICE_LINK.search(name)}
    found |= {name.upper(): f" in {_FILE}" for name in DotEnvSettingsSource(Settings).env_vars}
    sentences = []
    for name in sorted(found.keys() - set(known)):
        if name in _OTHER_VARIABLES:
            sentences.append(f"{name}{found[name]} is ignored: it is read from the environment alone")
            continue
        full = name if name.startswith(_PREFIX) else _PREFIX + name
        close = difflib.get_close_matches(full, known, n=1, cutoff=0.8)
        hint = f"; did you mean {close[0]}?" if close else ""
        sentences.append(f"{name}{found[name]} is no setting, and is ignored{hint}")
    return sentences


def settings_table() -> list[tuple[str, str, str]]:
    """Environment variable, default and meaning of every setting, for people."""
    rows = []
    for name, entry in Settings.model_fields.items():
        shown = "the embedded model" if entry.default == EMBEDDED_MODEL else entry.default
        shown = str(shown).lower() if isinstance(shown, bool) else str(shown or ("" if shown in ((), {}) else shown))
        rows.append((f"ENCNET_{name.upper()}", shown, entry.description or ""))
    return rows
