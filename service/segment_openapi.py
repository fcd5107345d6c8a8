"""What /openapi.json and /docs say about POST /segment and /segment/batch; the routes read their bodies by hand."""

from typing import Any

from service.answers import ErrorAnswer, Prediction, SegmentAnswer
from service.errors import STATUS_OF_CODE
from service.formats import FORMATS
from service.options import Options

SEGMENT_DESCRIPTION = """
Send the picture as a multipart form, as the bare body, or in JSON as a data URI:

    curl -F image=@street.jpg http://127.0.0.1:8000/segment
    curl -F image=@street.jpg -F scales=0.75,1,1.25 -F flip=true http://127.0.0.1:8000/segment
    curl --data-binary @street.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8000/segment?format=png' -o mask.png
    curl --json '{"image": "data:image/png;base64,...", "scales": [0.75, 1], "format": "rle"}' http://127.0.0.1:8000/segment

The mask has the picture's own size, after its EXIF orientation is applied (or the size that `max_side` gives it); a
pixel's value is the id of its class. Options go in the query, the form or the JSON object. Given twice they must agree;
a blank one counts as not given.

| `format` | sent as | what it is |
|---|---|---|
| `json` | application/json | presence, facts, and the mask as indexed PNG in base64 |
| `png` | image/png | the indexed PNG alone; its palette and text chunks hold what the JSON would say |
| `overlay` | image/jpeg, image/png | the picture with the colours of the classes over it |
| `rle` | application/json | as `json`, with COCO's compressed run lengths for each class |
| `polygons` | application/geo+json | a FeatureCollection in pixels, x right, y down, along the pixels' edges |
| `npz` | application/x-npz | NumPy arrays `mask`, `probabilities` (float16), `presence`, `classes` |
| `multipart` | multipart/mixed | the JSON, and the PNG as it is |

Without `format` the Accept header chooses. All but `overlay` carry exactly the same label map.

Phases and their milliseconds are in `timing_ms` and in the `Server-Timing` header; what the request was charged is in
`cost` and in `X-Cost-Pixels`, and `dry_run=true` answers only that. A full queue answers 429 with `Retry-After`.
"""


def request_body(several: bool) -> dict[str, Any]:
    """OpenAPI of the request: the body is read by hand, as FastAPI cannot declare a form or a bare body."""
    schema = Options.model_json_schema()["properties"]
    texts = {"scales": "0.75,1,1.25", "classes": "car,pedestrian"}
    options: dict[str, dict[str, Any]] = {}
    for name, entry in schema.items():
        kind = next((one for one in entry.get("anyOf", [entry]) if one.get("type") != "null"), entry)
        kind = {"type": "string", "example": texts[name]} if name in texts else kind
        options[name] = {**kind, "description": entry.get("description", "")}
    binary = {"type": "string", "format": "binary"}
    image: dict[str, Any] = {**binary, "description": "The picture file. The field may also be called `file`."}
    if several:
        image = {"type": "array", "items": binary, "description": "The picture files."}
    form = {"type": "object", "properties": {"image": image, **options}, "required": ["image"]}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if not several:
        data_uri = {"type": "string", "example": "data:image/png;base64,iVBORw0KGgo..."}
        by_url = {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]}
        described = {"type": "object", "properties": {"image": {"anyOf": [data_uri, by_url]}}, "required": ["image"]}
        content["application/json"] = {"schema": described}
        for kind_ in ("application/octet-stream", "image/jpeg", "image/png", "image/webp"):
            content[kind_] = {"schema": binary}
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": entry, "description": entry["description"]}
            for name, entry in options.items()
        ],
        "requestBody": {"required": True, "content": content},
    }


def segment_responses() -> dict[int | str, dict[str, Any]]:
    """OpenAPI of what POST /segment may answer: the formats, and the error codes by status."""
    reasons: dict[int, list[str]] = {}
    for code, status in STATUS_OF_CODE.items():
        reasons.setdefault(status, []).append(f"`{code}`")
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        200: {
            "model": SegmentAnswer | Prediction,
            "description": "Mask, presence and timings, or the mask in the format asked for.",
            "content": {
                media_type: binary
                for known in FORMATS.values()
                for media_type in known.media_types
                if media_type != "application/json"
            },
        },
        **{
            status: {"model": ErrorAnswer, "description": "Error codes: " + ", ".join(codes)}
            for status, codes in reasons.items()
        },
    }
