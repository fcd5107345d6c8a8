"""Thousands of malformed uploads against a real server: no 5xx, no crash, memory back where it was.

    python -m benchmarks.malformed [--count 10000] [--url URL]

Sent are damaged files of every format that the service reads, bombs and floods, broken forms, headers, framing, options
and JSON, and requests of the Open Inference Protocol; a seed decides all of them. Every answer has to be one of the
service's own: a status below 500, a request id, an error with its code or a body that is what its Content-Type says.
Resident memory afterwards may be 10 % and 32 MB above that after the warm-up, which is requests of the same kinds.
"""

import base64
import gzip
import http.client
import itertools
import json
import random
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.command import conclude, option_parser
from benchmarks.pictures import DAMAGES, grey_png, hurtful_files, real_pictures
from benchmarks.server import Server, serving
from benchmarks.wire import Failure, Request, address, exchange, faults, form, request_bytes

MEMORY_SHARE, MEMORY_BYTES = 0.10, 32 * 2**20
WARM_UP = 2000  # requests before memory counts
TIMEOUT_MS = 240_000  # of the server started here, where pictures of 16 megapixels wait for each other
CHEAP = "scales=0.25"  # what is a picture after all is to cost little

_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream", "text/plain")
_FORMATS = ("json", "png", "overlay", "rle", "polygons", "npz", "multipart")
_JSON_TYPE = ("Content-Type", "application/json")
_ODD_TEXTS = (
    "", " ", "-1", "0", "1e999", "nan", "inf", "-inf", "9" * 400, "9" * 5000, "0x10", "1,,2", ",", "1;2", "true",
    "null", "None", "[1]", "{}", "'", '"', "\\", "<script>", "../../etc/passwd", "%00", "%0d%0aX-Evil:1", "%ff",
    "%ud800", "\u0663", "\u00b2", "\u20ac", "a" * 10_000, "1" + "0" * 310, "1," * 3000, "1.5", "32", "64", "json",
    "sky,road",
)  # fmt: skip
_ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**400, 1e308, "", "\ud800", "\x00", [], {}, [[]], [None], ["\ud800"], {"a": 1}, "9" * 5000,
    [1] * 100, "a" * 10_000, 0.5, "0.5", [0.5, "1"], "nan", 2**63, -(2**63),
)  # fmt: skip
_OPTIONS = (
    "model", "scales", "flip", "max_side", "window", "stride", "classes", "threshold", "format", "timeout_ms",
    "dry_run", "image", "nonsense",
)  # fmt: skip
_ODD_HEADERS = (
    ("Accept", "*"), ("Accept", "image/*;q=2"), ("Accept", ",;q=,/"), ("Accept", "text/html"), ("Accept", "*/*;q=0"),
    ("Accept", "a/b," * 2000), ("Accept", "application/json;q=0.0001"), ("Accept", "\xff/\xfe"),
    ("Accept-Encoding", "gzip;q=x"), ("Accept-Encoding", "identity;q=0, *;q=0"), ("Accept-Encoding", "," * 5000),
    ("X-Request-ID", ""), ("X-Request-ID", "x" * 129), ("X-Request-ID", "a b"), ("X-Request-ID", "\xe9\xff"),
    ("X-Request-ID", '"}{"'), ("X-Request-ID", "%0d%0a"), ("Content-Encoding", "gzip"), ("Content-Encoding", "br"),
    ("Expect", "100-continue"), ("Expect", "the-impossible"), ("Range", "bytes=0-0"), ("Upgrade", "h2c"),
    ("Upgrade", "websocket"), ("Connection", "close, upgrade"), ("Connection", "\xff"), ("Cookie", "a=" + "b" * 4000),
    ("Authorization", "Bearer " + "k" * 3000), ("Authorization", "\xff"), ("If-None-Match", "*"), ("Origin", "null"),
    ("X-Forwarded-For", "::1, x"), ("Forwarded", "for=;;"), ("Content-Type", ""), ("Content-Type", "/"),
    ("Content-Type", "image/png; charset=\xff"), ("Content-Type", "multipart/form-data"), ("Content-Type", "a" * 9000),
    ("Content-Type", "multipart/form-data; boundary="), ("Content-Type", "application/json; charset=utf-16"),
    ("Content-Type", "application/x-www-form-urlencoded"), ("Content-Type", "text/html, image/png"),
)  # fmt: skip
_ODD_HOSTS = ("", "[", "[::1", "a/livez?", "a b", "\xff", "user:pw@x", "x:99999", "x:y", "..", "%00", "*")
_ODD_TARGETS = (
    "*", "/", "//segment", "/segment/", "/segment/../livez", "/%2e%2e/etc/passwd", "/segment?", "/segment?&&=&=1",
    "/segment?scales", "/segment%00", "/%ff%fe", "http://elsewhere/segment", "/segment#x", "/v2/models/%2f/infer",
    "/samples/../../service/app.py", "/page/%2e%2e%2fapp.py", "/classes?model=" + "x" * 5000, "/classes?model=%ff",
    "/" + "a" * 20_000, "/segment?" + "a=1&" * 2000, "/docs?x", "/openapi.json", "/metrics/x", "/v2/models/none",
)  # fmt: skip
_BODILESS = (b"GET ", b"HEAD", b"OPTI", b"TRAC", b"DELE")


@dataclass(frozen=True)
class Stock:
    """What requests are made of: whole files, files made to hurt, and the name of the model."""

    real: dict[str, bytes]
    hurtful: dict[str, bytes]
    model: str


# ---- pictures that are none


def damaged_picture(rng: random.Random, stock: Stock) -> Request:
    name, data = rng.choice(list(stock.real.items()))
    other = rng.choice(list(stock.real.values()))
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        damage = rng.choice(DAMAGES)
        data = damage(rng, data or b"\0", other or b"\0")
        words.append(damage.__name__)
    return upload(rng, stock, f"{name} {' '.join(words)}", data)


def hurtful_picture(rng: random.Random, stock: Stock) -> Request:
    name, data = rng.choice(list(stock.hurtful.items()))
    return upload(rng, stock, name, data)


def upload(rng: random.Random, stock: Stock, name: str, data: bytes) -> Request:
    """A picture by one of the ways in, under a name and a type that may be wrong."""
    kind, filename = rng.choice(_TYPES), rng.choice(("a.png", "b.jpg", "c.tar.gz", "d", "../../e.gif", "f\u20ac.webp"))
    target = f"/segment?{CHEAP}" + rng.choice(("", "", f"&format={rng.choice(_FORMATS)}", "&dry_run=1", "&max_side=50"))
    way = rng.choice(("body", "body", "form", "form", "json", "batch", "v2", "v2 json"))
    if way == "body":
        raw = request_bytes("POST", target, [("Content-Type", kind)], data)
    elif way == "form":
        content_type, body = form([], [("image", filename, kind, data)])
        raw = request_bytes("POST", target, [("Content-Type", content_type)], body)
    elif way == "json":
        uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        raw = request_bytes("POST", target, [_JSON_TYPE], json.dumps({"image": uri}).encode())
    elif way == "batch":
        good = rng.choice(list(stock.real.values()))
        content_type, body = form([], [("image", filename, kind, data), ("image", "good", kind, good)])
        raw = request_bytes("POST", f"/segment/batch?{CHEAP}", [("Content-Type", content_type)], body)
    elif way == "v2":
        headers = [("Inference-Header-Content-Length", "0")]
        raw = request_bytes("POST", f"/v2/models/{stock.model}_encoded/infer", headers, data)
    else:
        text = base64.b64encode(data).decode()
        image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
        asked = {"inputs": [image], "parameters": {"scales": 0.25}}
        raw = request_bytes("POST", f"/v2/models/{stock.model}_encoded/infer", [_JSON_TYPE], json.dumps(asked).encode())
    return Request(f"picture, {way}: {name}", raw)


# ---- forms, framing, headers


def broken_form(rng: random.Random, stock: Stock) -> Request:
    data = rng.choice(list(stock.real.values()))
    content_type, body = form([("scales", "0.25")], [("image", "a.png", "image/png", data)])
    name = rng.choice(
        (
            "no boundary", "another boundary", "long boundary", "odd boundary", "unclosed", "junk before",
            "junk behind", "no name", "no disposition", "no colon", "line feeds only", "many fields", "many files",
            "several pictures", "text picture", "odd names", "charset", "transfer encoding", "long header",
            "many headers", "long field", "empty", "damaged", "nested", "nothing but ends",
        )
    )  # fmt: skip
    boundary = b"b0undary"
    if name == "no boundary":
        content_type = "multipart/form-data"
    elif name == "another boundary":
        content_type = "multipart/form-data; boundary=other"
    elif name == "long boundary":
        content_type = f"multipart/form-data; boundary={'b' * rng.choice((71, 257, 5000))}"
    elif name == "odd boundary":
        content_type = f"multipart/form-data; boundary={rng.choice(('', '  ', chr(34), '--', chr(255), '*', 'a;b=c'))}"
    elif name == "unclosed":
        body = body[: -rng.randrange(1, 40)]
    elif name == "junk before":
        body = rng.choice((b"junk\r\n", b"\r\n" * 1000, b"-" * 1000, rng.randbytes(100))) + body
    elif name == "junk behind":
        body += rng.choice((b"junk\r\n", b"--b0undary\r\n", body, rng.randbytes(100)))
    elif name == "no name":
        body = body.replace(b'name="image"; ', b"")
    elif name == "no disposition":
        body = body.replace(b"Content-Disposition", b"X-Disposition")
    elif name == "no colon":
        body = body.replace(b"Disposition:", b"Disposition")
    elif name == "line feeds only":
        body = body.replace(b"\r\n", b"\n")
    elif name == "many fields":
        content_type, body = form([("flip", "true")] * rng.choice((33, 2000)), [("image", "a", "image/png", data)])
    elif name == "many files":
        content_type, body = form([], [("image", "a.png", "image/png", b"x")] * rng.choice((2, 40, 500)))
    elif name == "several pictures":
        content_type, body = form([], [("image", "a.png", "", data), ("file", "b.png", "", data)])
    elif name == "text picture":
        content_type, body = form([("image", "hello")], [])
    elif name == "odd names":
        odd = rng.choice(("\x00", "\u20ac", "a" * 3000, '\\"', "image\r\nX: y", "image*", "../image"))
        content_type, body = form([(odd, odd)], [(rng.choice((odd, "image")), odd, odd, data)])
    elif name == "charset":
        odd = rng.choice(
            ("undefined", "idna", "punycode", "utf-7", "unicode_escape", "rot13", "zlib", "\xff", "", "utf-16")
        )
        content_type += f"; charset={odd}"
        body = body.replace(b'filename="a.png"', b'filename="\\ud800+2AA-\xff\xfe"')
    elif name == "transfer encoding":
        body = body.replace(b"Content-Type:", b"Content-Transfer-Encoding: base64\r\nContent-Type:")
    elif name == "long header":
        body = body.replace(b"image/png", b"image/" + b"p" * 70_000)
    elif name == "many headers":
        body = body.replace(b"Content-Type:", b"X-A: b\r\n" * 200 + b"Content-Type:")
    elif name == "long field":
        content_type, body = form([("scales", "1" * 70_000)], [("image", "a", "image/png", data)])
    elif name == "empty":
        body = b""
    elif name == "damaged":
        body = rng.choice(DAMAGES)(rng, body, data)
    elif name == "nested":
        content_type, body = form([], [("image", "a", content_type, body)])
    else:
        body = b"--" + boundary + b"--\r\n" * rng.choice((1, 1000))
    target = rng.choice(("/segment", "/segment", "/segment/batch", "/hf"))
    return Request(f"form: {name}", request_bytes("POST", f"{target}?{CHEAP}", [("Content-Type", content_type)], body))


def odd_header(rng: random.Random, stock: Stock) -> Request:
    data = rng.choice(list(stock.real.values()))
    given = rng.sample(_ODD_HEADERS, rng.choice((1, 1, 2, 3)))
    # An upgrade that the server takes up, and a connection that it is asked to close, are answered all the same.
    return Request(
        f"header: {', '.join(name for name, _ in given)}", request_bytes("POST", f"/segment?{CHEAP}", given, data)
    )


def odd_target(rng: random.Random, stock: Stock) -> Request:
    method = rng.choice(
        ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "x", "POST" * 500)
    )
    data = b"" if method.encode()[:4] in _BODILESS else rng.choice(list(stock.real.values()))
    target = rng.choice((*_ODD_TARGETS, "/segment", "/livez"))
    headers = [("Host", rng.choice(_ODD_HOSTS))] if rng.random() < 0.3 else [("Host", "x")]
    # The answer to CONNECT has no length that a client could know.
    raw = request_bytes(method, target, headers, data, host=False)
    return Request(f"target: {method[:8]} {target[:40]}", raw, due=method != "CONNECT")


def broken_framing(rng: random.Random, stock: Stock) -> Request:
    data = rng.choice(list(stock.real.values()))
    target = f"/segment?{CHEAP}"
    plain = request_bytes("POST", target, [("Content-Type", "image/png")], data)
    chunked = [("Transfer-Encoding", "chunked")]
    head = request_bytes("POST", target, chunked, length=False)
    whole = b"%x\r\n" % len(data) + data + b"\r\n0\r\n\r\n"
    small = b"".join(b"1\r\n%c\r\n" % byte for byte in data[:2000]) + b"0\r\n\r\n"
    other_encoding = request_bytes("POST", target, [("Transfer-Encoding", "gzip")], data)
    other_version = rng.choice((b"HTTP/9.9", b"HTTP/1.0", b"ICY"))
    lengths = ("-1", "+5", "0x10", "1e3", "5, 6", "9" * 30, "\xb2", "", " ")
    name, raw, due, ends = rng.choice(
        (
            ("length too small", _with_length(target, data, str(len(data) // 2)), True, False),
            ("length too large", _with_length(target, data, str(len(data) + 100)), False, True),
            ("length far too large", _with_length(target, data, str(10**12)), True, False),
            ("odd length", _with_length(target, data, rng.choice(lengths)), False, True),
            ("two lengths", request_bytes("POST", target, [("Content-Length", "3")], data), False, True),
            ("length and chunks", request_bytes("POST", target, chunked, whole), False, True),
            ("chunks", head + whole, True, False),
            ("small chunks", head + small, True, False),
            ("chunk of no number", head + b"zz\r\n" + data, False, True),
            ("chunk too long", head + b"f" * 30 + b"\r\n" + data, False, True),
            ("chunk cut", head + b"%x\r\n" % (len(data) + 50) + data, False, True),
            ("no last chunk", head + b"%x\r\n" % len(data) + data + b"\r\n", False, True),
            ("odd transfer encoding", other_encoding, False, True),
            ("cut in the head", plain[: rng.randrange(1, 60)], False, True),
            ("cut in the body", plain[: -rng.randrange(1, len(data))], False, True),
            ("no version", plain.replace(b" HTTP/1.1", b"", 1), False, True),
            ("another version", plain.replace(b"HTTP/1.1", other_version, 1), False, True),
            ("line feeds only", plain.replace(b"\r\n", b"\n", 4), False, True),
            ("nothing but noise", rng.randbytes(200), False, True),
            ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(300), False, True),
            ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(30), False, True),
            ("folded header", plain.replace(b"Content-Type:", b"X-Folded: a\r\n b\r\nContent-Type:"), False, True),
            ("NUL in a header", plain.replace(b"image/png", b"image/\0png", 1), False, True),
            ("large head", request_bytes("POST", target, [("X-Large", "x" * 70_000)], data), False, True),
            ("many headers", request_bytes("POST", target, [("X-Many", "x")] * 2000, data), True, False),
            ("two requests at once", plain + plain, True, False),
        )
    )  # fmt: skip
    return Request(f"framing: {name}", raw, due, ends)


def _with_length(target: str, data: bytes, length: str) -> bytes:
    return request_bytes("POST", target, [("Content-Length", length)], data, length=False)


# ---- options and JSON


def odd_option(rng: random.Random, stock: Stock) -> Request:
    data = rng.choice(list(stock.real.values()))
    pairs = [(rng.choice(_OPTIONS), rng.choice(_ODD_TEXTS)) for _ in range(rng.choice((1, 1, 2, 3)))]
    pairs += [("scales", "0.25")] if rng.random() < 0.5 else []
    name = ", ".join(option for option, _ in pairs)
    if rng.random() < 0.5:
        content_type, body = form(pairs, [("image", "a.png", "image/png", data)])
        return Request(
            f"option, form: {name}", request_bytes("POST", "/segment", [("Content-Type", content_type)], body)
        )
    query = "&".join(f"{option}={''.join(_quoted(text))}" for option, text in pairs)
    return Request(f"option, query: {name}", request_bytes("POST", f"/segment?{query}", [], data))


def _quoted(text: str) -> Iterator[str]:
    """As browsers quote, except that percent signs stay as they are."""
    for character in text:
        if (character.isalnum() and character.isascii()) or character in "%,.-_;'[]{}":
            yield character
        else:
            yield "".join(f"%{byte:02x}" for byte in character.encode())


def broken_json(rng: random.Random, stock: Stock) -> Request:
    data = rng.choice(list(stock.real.values()))
    text = base64.b64encode(data).decode()
    uri = f"data:image/png;base64,{text}"
    good = {"image": uri, "scales": [0.25]}
    name = rng.choice(
        (
            "odd option", "odd picture", "not base64", "odd data URI", "cut", "damaged", "nested", "flood",
            "long number", "no object", "another encoding", "names twice", "byte order mark", "large numbers", "URL",
        )
    )  # fmt: skip
    body = json.dumps(good).encode()
    if name == "odd option":
        body = json.dumps({**good, rng.choice((*_OPTIONS, "\ud800", "")): rng.choice(_ODD_VALUES)}).encode()
    elif name == "odd picture":
        body = json.dumps({**good, "image": rng.choice(_ODD_VALUES)}).encode()
    elif name == "not base64":
        odd = rng.choice(
            (text[:-1], text + "=", text.replace("A", "-"), text[:50] + "\n" + text[50:], "\u20ac" * 40, "====")
        )
        body = json.dumps({"image": f"data:;base64,{odd}"}).encode()
    elif name == "odd data URI":
        head = rng.choice(
            ("data:", "data:,", "data:;base64", "DATA:;BASE64,", "data:" + "a" * 50_000, "data:" + ";a" * 9000)
        )
        body = json.dumps({"image": head + text}).encode()
    elif name == "cut":
        body = body[: rng.randrange(len(body))]
    elif name == "damaged":
        body = rng.choice(DAMAGES)(rng, body, data)
    elif name == "nested":
        body = rng.choice((b"[", b'{"image":', b'{"image":[')) * rng.choice((100, 100_000))
    elif name == "flood":
        body = b'{"image": "", "scales": [' + rng.choice((b"1,", b"1.5,", b"{},", b'"a",')) * 200_000 + b"1]}"
    elif name == "long number":
        body = b'{"image": "", "max_side": ' + b"9" * rng.choice((400, 4000, 100_000)) + b"}"
    elif name == "no object":
        body = rng.choice((b"", b"null", b"1", b'"a"', b"[]", b"true", b" " * 1000, b"NaN", b"\x00"))
    elif name == "another encoding":
        body = json.dumps(good).encode(rng.choice(("utf-16", "utf-32", "utf-16-be"))) + rng.choice((b"", b"\xff"))
    elif name == "names twice":
        body = b'{"scales": 0.25, "scales": 0.5, ' + body[1:]
    elif name == "byte order mark":
        body = b"\xef\xbb\xbf" + body
    elif name == "large numbers":
        body = b'{"image": "", "threshold": 1e999, "max_side": -1e-999, "scales": [NaN, Infinity]}'
    else:
        address = rng.choice(("http://127.0.0.1/", "file:///etc/passwd", "", "http://[", "\ud800", "gopher://x"))
        body = json.dumps({"image": {"url": address}}).encode()
    target = rng.choice(("/segment", "/segment", "/hf", "/segment/batch"))
    if target == "/hf":
        body = body.replace(b'"image"', b'"inputs"')
    return Request(f"json: {name}", request_bytes("POST", target, [_JSON_TYPE], body))


# ---- the Open Inference Protocol


def broken_infer(rng: random.Random, stock: Stock) -> Request:
    height, width = rng.choice(((8, 8), (1, 40), (30, 20)))
    shape = [1, height, width, 3]
    pixels = rng.randbytes(height * width * 3)
    image: dict[str, Any] = {
        "name": "image",
        "datatype": "UINT8",
        "shape": shape,
        "parameters": {"binary_data_size": len(pixels)},
    }
    asked: dict[str, Any] = {"inputs": [image], "parameters": {"scales": 0.25}}
    name = rng.choice(
        (
            "shape", "datatype", "size", "header length", "parameter", "output", "names", "no inputs", "odd entry",
            "data", "damaged", "compressed", "compression bomb", "cut compression", "other target", "files",
            "huge JSON number", "deep JSON", "small bodies", "scales",
        )
    )  # fmt: skip
    target = f"/v2/models/{stock.model}/infer"
    headers: list[tuple[str, str]] = []
    length: str | None = None
    if name == "shape":
        image["shape"] = rng.choice(
            ([], [0], [-1, 8, 8, 3], [1, 8, 8], [2**31] * 4, [1] * 40, ["8"], 8, None, [1.5], [True])
        )
    elif name == "datatype":
        image["datatype"] = rng.choice(
            ("FP32", "BYTES", "BOOL", "FP16", "INT64", "", "uint8", None, 8, "BF16", "\ud800")
        )
    elif name == "size":
        image["parameters"] = {"binary_data_size": rng.choice((0, -1, 10**30, 1.5, "8", None, True, len(pixels) - 1))}
    elif name == "header length":
        length = rng.choice(("-1", "0", "99999999999", "x", "", "1", "\xb2", "9" * 5000, "0x5"))
    elif name == "parameter":
        option = rng.choice((*_OPTIONS, "timeout", "binary_data_output", "sequence_id"))
        asked["parameters"] = {"scales": 0.25, option: rng.choice(_ODD_VALUES)}
    elif name == "output":
        entry = {"name": rng.choice(("mask", "nonsense", "probabilities", "", None, 5, "\ud800"))}
        asked["outputs"] = rng.choice(
            ([entry], [entry, entry], {}, [[]], "mask", [{**entry, "parameters": {"binary_data": 1}}])
        )
    elif name == "names":
        image["name"] = rng.choice(("Image", "", None, 1, "scales", "\ud800"))
    elif name == "no inputs":
        asked = rng.choice(({}, {"inputs": []}, {"inputs": None}, {"inputs": {}}, {"inputs": [image, image]}))
    elif name == "odd entry":
        asked["inputs"] = [rng.choice(_ODD_VALUES)]
    elif name == "data":
        del image["parameters"]
        image["data"] = rng.choice(
            (
                [],
                None,
                "abc",
                [256] * len(pixels),
                [-1] * len(pixels),
                [[0]],
                [0.5] * len(pixels),
                list(pixels),
                {"a": 1},
            )
        )
        pixels = b""
    elif name == "files":
        target = f"/v2/models/{stock.model}_encoded/infer"
        element = struct.pack("<I", rng.choice((0, 3, 2**32 - 1))) + rng.choice(list(stock.real.values()))
        image |= {"datatype": "BYTES", "shape": [rng.choice((1, 2, 40))]}
        image["parameters"] = {"binary_data_size": len(element)}
        pixels = element
    elif name == "huge JSON number":
        asked["id"] = 10**4000
    elif name == "deep JSON":
        asked["parameters"] = json.loads("[" * 500 + "]" * 500)
    elif name == "scales":
        scales = rng.choice((b"\xff" * 4, struct.pack("<f", 1e30), struct.pack("<9f", *[0.25] * 9), b"", b"\0" * 3))
        shape_of_scales = {"shape": [max(1, len(scales) // 4)], "parameters": {"binary_data_size": len(scales)}}
        asked = {"inputs": [image, {"name": "scales", "datatype": "FP32", **shape_of_scales}]}
        pixels += scales
    head = json.dumps(asked).encode()
    body = head + pixels
    if length is None:
        length = str(len(head))
    if name == "damaged":
        body = rng.choice(DAMAGES)(rng, body, head)
    elif name in ("compressed", "compression bomb", "cut compression"):
        encoding = rng.choice(("gzip", "deflate", "br", "gzip, gzip", ""))
        plain = bytes(200_000_000) if name == "compression bomb" and rng.random() < 0.1 else body
        body = gzip.compress(plain, 1, mtime=0) if encoding == "gzip" else zlib.compress(plain, 1)
        body = body[: len(body) // 2] if name == "cut compression" else body + rng.choice((b"", b"", b"x"))
        headers.append(("Content-Encoding", encoding))
    elif name == "other target":
        rest = ("versions/2/infer", "versions//infer", "stats", "config", "ready", "infer/", "x/infer")
        target = rng.choice(
            (*(f"/v2/models/{stock.model}/{end}" for end in rest), "/v2/models//infer", "/v2/repository/index")
        )
    elif name == "small bodies":
        ends = ("/v2/repository/index", f"/v2/repository/models/{stock.model}/load", "/v2/logging")
        target, length = rng.choice(ends), None
        body = rng.choice((b"", b"[", b"[]", b"null", b'{"ready": 5}', b"\xff", b"[" * 50_000, b'{"a":1}', b"9" * 5000))
    if length is not None:
        headers.append(("Inference-Header-Content-Length", length))
    return Request(f"v2: {name}", request_bytes("POST", target, headers, body))


Maker = Callable[[random.Random, Stock], Request]

_MAKERS: dict[Maker, int] = {
    damaged_picture: 60,
    hurtful_picture: 3,
    broken_form: 8,
    odd_header: 4,
    odd_target: 3,
    broken_framing: 4,
    odd_option: 6,
    broken_json: 6,
    broken_infer: 6,
}


def malformed(seed: int, stock: Stock) -> Iterator[Request]:
    """Malformed requests without end, the same for the same seed and stock."""
    rng = random.Random(seed)
    makers, weights = list(_MAKERS), list(_MAKERS.values())
    while True:
        (maker,) = rng.choices(makers, weights)
        yield maker(rng, stock)


# ---- sending them


@dataclass
class Tally:
    """What came back: answers by kind of request, status and code; and what should not have been."""

    answers: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""

    def by_code(self) -> Counter[tuple[int, str]]:
        """How many answers had which status and code; 0 for none."""
        counts: Counter[tuple[int, str]] = Counter()
        for (_, status, code), number in self.answers.items():
            counts[status, code] += number
        return counts


def send(url: str, requests: Iterable[Request], clients: int, tick: Callable[[], object] = lambda: None) -> Tally:
    """Send the requests, so many at a time, each on a connection of its own; `tick` is called after each."""
    tally = Tally()
    numbered = enumerate(requests)
    lock = threading.Lock()
    place = address(url)

    def client() -> None:
        while True:
            with lock:
                number, request = next(numbered, (0, None))
            if request is None:
                return
            try:
                answer = exchange(place, request)
                wrong = faults(request, answer)
            except (OSError, http.client.HTTPException) as error:
                answer, wrong = None, [f"{type(error).__name__} {error}"]
            with lock:
                kind = request.name.partition(":")[0].partition(",")[0]
                tally.answers[(kind, answer.status, answer.code) if answer else (kind, 0, "no answer")] += 1
                if wrong:
                    tally.failures.append(Failure(number, request, wrong))
                if answer and answer.seconds > tally.slowest_s:
                    tally.slowest_s, tally.slowest = answer.seconds, request.name
                tick()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def stock_for(url: str, max_side: int = 4000) -> Stock:
    """The stock of requests for a running server."""
    host, port = address(url)
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request("GET", "/models")
    name = json.loads(connection.getresponse().read())["models"][0]["name"]
    real = real_pictures()
    return Stock(real, hurtful_files(real, max_side), name)


def good_picture_is_answered(url: str) -> bool:
    """Whether a whole picture still gets its mask."""
    good = Request("good", request_bytes("POST", "/segment", [("Content-Type", "image/png")], grey_png(64, 48)))
    answer = exchange(address(url), good)
    return answer is not None and answer.status == 200 and not faults(good, answer)


def settled_bytes(server: Server, enough: float, seconds: float = 10) -> int:
    """Resident memory once it is at most `enough`, or at its least within some seconds."""
    end = time.monotonic() + seconds
    least = server.resident_bytes()
    while least > enough and time.monotonic() < end:
        time.sleep(0.5)
        least = min(least, server.resident_bytes())
    return least


def run(server: Server, count: int, seed: int, clients: int) -> tuple[dict[str, Any], Tally]:
    """The whole benchmark on a running server: its result, and what came back."""
    stock = stock_for(server.url)
    warm_up = itertools.islice(malformed(seed + 1, stock), min(WARM_UP, count))
    largest = [upload(random.Random(i), stock, "large", stock.hurtful["png large and allowed"]) for i in range(3)]
    before = send(server.url, itertools.chain(largest, warm_up), clients)
    base = server.resident_bytes()
    bound = base * (1 + MEMORY_SHARE) + MEMORY_BYTES
    requests = itertools.islice(malformed(seed, stock), count)
    started = time.perf_counter()
    tally = send(server.url, track(requests, "sending", total=count, console=Console(stderr=True)), clients)
    seconds = time.perf_counter() - started
    tally.failures += before.failures
    alive = server.is_alive()
    after = settled_bytes(server, bound) if alive else 0
    promises = {
        "no answer was a 5xx or not well formed": not tally.failures and sum(tally.answers.values()) == count,
        "the process lives": alive,
        "its log has no traceback": server.tracebacks() == 0,
        "memory is back": alive and after <= bound,
        "a good picture is answered": alive and good_picture_is_answered(server.url),
    }
    result = {
        "requests": count,
        "seed": seed,
        "clients": clients,
        "seconds": round(seconds, 1),
        "promises": promises,
        "memory_mb": {"warmed_up": round(base / 2**20, 1), "after": round(after / 2**20, 1)},
        "slowest": {"seconds": round(tally.slowest_s, 2), "request": tally.slowest},
        "answers": {f"{status} {code}": number for (status, code), number in sorted(tally.by_code().items())},
        "statuses_by_kind": {
            kind: {str(status): number for status, number in sorted(_statuses(tally, kind).items())}
            for kind in sorted({kind for kind, _, _ in tally.answers})
        },
        "failures": [str(failure) for failure in tally.failures[:20]],
    }
    return result, tally


def _statuses(tally: Tally, kind: str) -> Counter[int]:
    counts: Counter[int] = Counter()
    for (of, status, _), number in tally.answers.items():
        counts[status] += number if of == kind else 0
    return +counts


def table(tally: Tally) -> Table:
    """How many answers had which status and code."""
    drawn = Table("status", "code, or what the answer is", "answers", box=None, header_style="bold")
    drawn.columns[2].justify = "right"
    for (status, code), number in sorted(tally.by_code().items()):
        drawn.add_row(str(status or "-"), code, str(number))
    return drawn


def main() -> None:
    parser = option_parser("malformed", __doc__)
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="requests (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides the requests (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="requests at a time (default: %(default)s)")
    parser.add_argument("--url", help="a running server; without it, one is started with the embedded model")
    options = parser.parse_args()
    with serving(options.url, ENCNET_TIMEOUT_MS=str(TIMEOUT_MS)) as server:
        result, tally = run(server, options.count, options.seed, options.clients)
    console = Console()
    console.print(table(tally))
    console.print(f"memory {result['memory_mb']} MB, slowest {result['slowest']}")
    for failure in result["failures"]:
        console.print(failure, markup=False)
    command = f"python -m benchmarks.malformed --count {options.count} --seed {options.seed}"
    conclude("malformed.json", command, result)


if __name__ == "__main__":
    main()
