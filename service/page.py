"""The web page at `/`: its files, the sample pictures, and what its script has to know about this service."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from service.models import Models

PAGE = Path(__file__).parent / "page"
EXAMPLES = Path(__file__).parents[1] / "examples"

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "key.js": "text/javascript; charset=utf-8",
    "png.js": "text/javascript; charset=utf-8",
    "request.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

SAMPLES = {
    "street.jpg": {
        "title": "A street in Leuven",
        "credit": "OpenCV's sample leuvenA.jpg",
        "licence": "Apache-2.0",
        "source": "https://github.com/opencv/opencv/blob/4.6.0/samples/data/leuvenA.jpg",
    },
    "temple.jpg": {
        "title": "A temple in China",
        "credit": "danielbuechele, scikit-learn's sample china.jpg",
        "licence": "CC BY 2.0",
        "source": "https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_sample_images.html",
    },
}

# Beside what RequestContext gives every answer.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}
_REVALIDATE = "no-cache"  # kept by the browser, asked about each time: a new release shows at once
_KEEP_A_DAY = "public, max-age=86400"


@dataclass(frozen=True)
class _File:
    """A file held in memory with the headers it is sent with."""

    content: bytes
    headers: dict[str, str]


def page_router(models: Models) -> APIRouter:
    """Routes of the page; every file is read now, so that no request's path ever reaches the file system.

    Where the folder of examples is not installed there are no samples, and the page shows none.
    """
    page = {name: _file(PAGE / name, type_, _REVALIDATE) for name, type_ in _TYPES.items()}
    there = [name for name in SAMPLES if (EXAMPLES / name).is_file()]
    samples = {name: _file(EXAMPLES / name, "image/jpeg", _KEEP_A_DAY) for name in there}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return _answer(page["index.html"], request)

    @router.get("/page/settings")
    async def page_settings() -> Response:
        settings, metadata = models.settings, models.pipeline().engine.metadata
        return JSONResponse(
            {
                "threshold": settings.threshold,
                "max_bytes": settings.max_bytes,
                "min_scale": settings.min_scale,
                "max_scale": settings.max_scale,
                "max_scales": settings.max_scales,
                "scales": metadata.scales,
                "flip": metadata.flip,
            },
            headers={"Cache-Control": _REVALIDATE},
        )

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def page_file(name: str, request: Request) -> Response:
        if name not in page:
            raise HTTPException(404)
        return _answer(page[name], request)

    @router.get("/samples")
    async def sample_list() -> Response:
        rows = [{"name": name, "url": f"samples/{name}", **SAMPLES[name]} for name in samples]
        return JSONResponse(rows, headers={"Cache-Control": _REVALIDATE})

    @router.api_route("/samples/{name}", methods=["GET", "HEAD"])
    async def sample(name: str, request: Request) -> Response:
        if name not in samples:
            raise HTTPException(404)
        return _answer(samples[name], request)

    return router


def _file(path: Path, type_: str, caching: str) -> _File:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content, {"Content-Type": type_, "ETag": etag, "Cache-Control": caching, **_HEADERS})


def _answer(file: _File, request: Request) -> Response:
    """The file, or 304 where the browser has this very version; starlette leaves a HEAD's body out when sending."""
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.headers["ETag"] in known:
        return Response(status_code=304, headers={k: v for k, v in file.headers.items() if k != "Content-Type"})
    return Response(file.content, headers=file.headers)
