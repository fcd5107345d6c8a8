"""Infer requests and responses of the Open Inference Protocol v2: bytes <-> tensors. Pure functions, no HTTP.

Protocol: https://github.com/kserve/open-inference-protocol (inference_rest.md). Binary tensors and compression:
Triton's binary data extension. What is strict here beyond the two:

| what                      | rule                                                                                     |
|---------------------------|------------------------------------------------------------------------------------------|
| shape                     | every dimension from 1 on; the data has exactly that many elements                       |
| JSON `data`               | flat in row-major order, or nested as `shape` says; no NaN, nothing outside the datatype |
| BYTES in JSON             | an element is a string and stands for its UTF-8 bytes                                    |
| BYTES in binary           | an element is its length as u32 little endian, then its bytes                            |
| BOOL                      | true or false in JSON, a byte of 0 or 1 in binary                                        |
| FP16                      | binary only                                                                              |
| Inference-Header-... of 0 | the body is the one element of a BYTES input, no length in front; outputs go as binary   |
| request compression       | one of gzip and deflate (zlib), around the whole body                                    |
"""

import base64
import binascii
import gzip
import json
import math
import re
import string
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from service.errors import InputError
from service.formats import weights
from service.json_text import load_json

HEADER_LENGTH = "Inference-Header-Content-Length"

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}

_DATATYPE_OF = {dtype: name for name, dtype in DTYPES.items()}
_JSON_TYPES: dict[str, tuple[type, ...]] = {"b": (bool,), "u": (int,), "i": (int,), "f": (int, float), "O": (str,)}
_MAX_RANK = 8
_MAX_DIMENSION = 2**31 - 1
_JSON_CHUNK = 65536  # elements turned into text at once
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_DATA_URI = re.compile(r"data:[^,]{0,256};base64,")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as a model declares it; -1 in `shape` is any size from 1 on."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class InputTensor:
    """An input as sent: `array` has the dtype and shape declared, and elements `bytes` for BYTES.

    `binary` tells tensors that came as binary data from those in JSON. `array` may be a read-only view of the body.
    """

    datatype: str
    array: np.ndarray
    binary: bool


@dataclass(frozen=True)
class RequestedOutput:
    """An output by name, and whether it goes back as binary data."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A checked request. `outputs` in the order asked, None where the request leaves the choice to the model.

    `binary_output` is what holds for outputs that are not asked for by name; `parameters` are without
    `binary_data_output`.
    """

    id: str | None
    parameters: dict[str, str | int | float | bool]
    inputs: dict[str, InputTensor]
    outputs: tuple[RequestedOutput, ...] | None
    binary_output: bool


# ---- requests


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo a request's Content-Encoding, never making more than `limit` bytes.

    Raises InputError: unsupported for another encoding, too_many_bytes above the limit, invalid_body for damaged data.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOW_BITS:
        raise InputError("unsupported", f"Content-Encoding {_short(encoding)} is not supported; use gzip or deflate")
    inflater = zlib.decompressobj(_WINDOW_BITS[name])
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise _bad(f"the body is not valid {name} data, as its Content-Encoding says it is") from None
    if len(plain) > limit:
        raise InputError("too_many_bytes", f"the body is larger than the {limit} bytes allowed once it is decompressed")
    if not inflater.eof:
        raise _bad(f"the {name} data of the body is cut short")
    if inflater.unused_data:
        raise _bad(f"{len(inflater.unused_data)} bytes follow the {name} data of the body")
    return plain


def parse_infer(body: bytes, header_length: str | None, *, max_json_bytes: int, raw_input: str | None) -> InferRequest:
    """A request body, decompressed -> the request.

    `header_length` is the text of the header Inference-Header-Content-Length, None where there is none. `raw_input`
    names the model's BYTES input that a body without JSON (header length 0) fills, None where there is no such input.

    Raises InputError, and nothing else whatever the bytes are: invalid_body, too_many_bytes for too much JSON,
    not_implemented for shared memory and classification.
    """
    size = len(body) if header_length is None else _header_length(body, header_length)
    if size == 0:
        if header_length is None:
            raise _bad('the body is empty; it must be a JSON object with "inputs"')
        return _raw_request(body, raw_input)
    if size > max_json_bytes:
        raise InputError(
            "too_many_bytes",
            f"the JSON has {size} bytes, more than the {max_json_bytes} allowed; send the tensors as binary data",
        )
    request = _read_json(body[:size])
    parameters = _parameters(request)
    binary_output = parameters.pop("binary_data_output", False)
    if not isinstance(binary_output, bool):
        raise _bad("parameter binary_data_output must be true or false")
    identity = request.get("id")
    if identity is not None and not isinstance(identity, str):
        raise _bad(f"id must be a string, not {_kind(identity)}")
    return InferRequest(
        identity,
        parameters,
        _inputs(request, memoryview(body)[size:]),
        _requested_outputs(request, binary_output),
        binary_output,
    )


def check_inputs(inputs: Mapping[str, InputTensor], specs: Sequence[TensorSpec], model: str) -> None:
    """Compare what was sent with what the model declares; raises InputError with the first difference."""
    declared = {spec.name: spec for spec in specs}
    for name, tensor in inputs.items():
        if name not in declared:
            raise _bad(f"{model} has no input {_short(name)}; its inputs are {', '.join(declared)}")
        spec = declared[name]
        if tensor.datatype != spec.datatype:
            raise _bad(f"input {name} must be {spec.datatype}, not {tensor.datatype}")
        fits = len(tensor.array.shape) == len(spec.shape) and all(
            wanted in (-1, given) for wanted, given in zip(spec.shape, tensor.array.shape, strict=True)
        )
        if not fits:
            raise _bad(
                f"input {name} must have shape {list(spec.shape)} (-1: any size), not {list(tensor.array.shape)}"
            )
    for name, spec in declared.items():
        if name not in inputs and not spec.optional:
            raise _bad(f"input {name} is missing; {model} needs it as {spec.datatype} {list(spec.shape)}")


def decode_base64(text: bytes, where: str) -> bytes:
    """Base64, with or without line breaks and the head of a data URI -> the bytes.

    Raises InputError that begins with `where`.
    """
    joined = text.translate(None, string.whitespace.encode())
    try:
        return base64.b64decode(_DATA_URI.sub("", joined.decode("ascii"), count=1), validate=True)
    except (ValueError, binascii.Error):
        raise _bad(f"{where} must be base64 where it is sent in JSON, or else be sent as binary data") from None


def _header_length(body: bytes, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise _bad(f"{HEADER_LENGTH} must be a number of bytes, not {_short(text)}")
    size = int(text)
    if size > len(body):
        raise _bad(f"{HEADER_LENGTH} is {size}, but the body has only {len(body)} bytes")
    return size


def _raw_request(body: bytes, raw_input: str | None) -> InferRequest:
    if raw_input is None:
        raise _bad(f"{HEADER_LENGTH} 0 needs a model with one BYTES input; describe the inputs of this one in JSON")
    if not body:
        raise _bad(f"the body is empty; with {HEADER_LENGTH} 0 it must be the picture file")
    array = _object_array([bytes(body)], (1,))
    return InferRequest(None, {}, {raw_input: InputTensor("BYTES", array, True)}, None, binary_output=True)


def _read_json(text: bytes) -> dict[str, Any]:
    try:
        request = load_json(text, parse_constant=_no_constant)
    except RecursionError:
        raise _bad("the JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise _bad(
            f"the JSON is not UTF-8 text; with binary data after it, {HEADER_LENGTH} must say how long it is"
        ) from None
    except json.JSONDecodeError as error:
        raise _bad(f"the body is not valid JSON: {error}") from None
    if not isinstance(request, dict):
        raise _bad(f'the body must be a JSON object with "inputs", not {_kind(request)}')
    return request


def _no_constant(name: str) -> None:
    raise _bad(f"{name} is not a number that JSON has")


def _parameters(owner: dict[str, Any], where: str = "") -> dict[str, Any]:
    """A copy of the object's `parameters`, each a string, number or boolean."""
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise _bad(f"{where}parameters must be an object, not {_kind(parameters)}")
    for name, value in parameters.items():
        if not isinstance(value, str | int | float):
            raise _bad(f"{where}parameter {_short(name)} must be a string, a number or a boolean, not {_kind(value)}")
    return dict(parameters)


def _entries(request: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, object) for each entry of `inputs` or `outputs`, no name twice."""
    entries = request.get(key) or []
    if not isinstance(entries, list):
        raise _bad(f"{key} must be a list of objects, not {_kind(entries)}")
    named: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise _bad(f"{key}[{index}] must be an object with a name")
        if entry["name"] in named:
            raise _bad(f"{key[:-1]} {_short(entry['name'])} is given twice")
        named[entry["name"]] = entry
    return list(named.items())


def _inputs(request: dict[str, Any], binary: memoryview) -> dict[str, InputTensor]:
    entries = _entries(request, "inputs")
    if not entries:
        raise _bad("inputs is missing or empty; a request needs at least one input")
    tensors = {}
    offset = 0
    for name, entry in entries:
        where = f"input {_short(name)}"
        datatype, shape = _datatype(entry, where), _shape(entry, where)
        parameters = _parameters(entry, f"{where}: ")
        if "shared_memory_region" in parameters:
            raise InputError(
                "not_implemented", f"{where} is in shared memory, which is not supported; send it as binary data"
            )
        if "binary_data_size" not in parameters:
            tensors[name] = InputTensor(datatype, _from_json(entry, where, datatype, shape), False)
            continue
        size = parameters["binary_data_size"]
        if type(size) is not int or size < 0:
            raise _bad(f"{where}: binary_data_size must be a whole number of bytes from 0 on")
        if "data" in entry:
            raise _bad(f"{where} has both data and binary_data_size; send one of them")
        if size > len(binary) - offset:
            raise _bad(f"{where} should have {size} bytes of binary data, but only {len(binary) - offset} are left")
        tensors[name] = InputTensor(
            datatype, _from_binary(binary[offset : offset + size], where, datatype, shape), True
        )
        offset += size
    if offset < len(binary):
        raise _bad(f"{len(binary) - offset} bytes follow the last input; binary_data_size says how many belong")
    return tensors


def _datatype(entry: dict[str, Any], where: str) -> str:
    datatype = entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        given = _short(datatype) if isinstance(datatype, str) else _kind(datatype)
        raise _bad(f"{where} must have a datatype of {', '.join(DTYPES)}, not {given}")
    return datatype


def _shape(entry: dict[str, Any], where: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise _bad(f"{where} must have a shape that is a list of whole numbers")
    if len(shape) > _MAX_RANK or any(not 1 <= size <= _MAX_DIMENSION for size in shape):
        raise _bad(
            f"{where} must have at most {_MAX_RANK} dimensions of 1 to {_MAX_DIMENSION}, not {ascii(shape)[:100]}"
        )
    return tuple(shape)


def _from_json(entry: dict[str, Any], where: str, datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    if "data" not in entry:
        raise _bad(f"{where} has no data; give data, or binary_data_size and the bytes after the JSON")
    if datatype == "FP16":
        raise _bad(f"{where} is FP16, which JSON cannot carry; send it as binary data, or as FP32")
    flat = _flatten(entry["data"], where, shape)
    dtype = DTYPES[datatype]
    wanted = _JSON_TYPES[dtype.kind]
    for kind in set(map(type, flat)) - set(wanted):
        raise _bad(f"{where}: data must hold {_names(wanted)} for {datatype}, not {_names((kind,))}")
    if dtype.kind == "O":
        try:
            return _object_array([text.encode() for text in flat], shape)
        except UnicodeEncodeError:
            raise _bad(f"{where}: a string in data has half of a surrogate pair") from None
    if dtype.kind in "ui":
        low, high = int(np.iinfo(dtype.str).min), int(np.iinfo(dtype.str).max)
        if min(flat) < low or max(flat) > high:
            raise _bad(f"{where}: data must be from {low} to {high} for {datatype}")
    elif dtype.kind == "f":
        largest = float(np.finfo(dtype.str).max)
        if min(flat) < -largest or max(flat) > largest:
            raise _bad(f"{where}: data must be within +-{largest:.6g} for {datatype}")
    return np.array(flat, dtype).reshape(shape)


def _flatten(data: Any, where: str, shape: tuple[int, ...]) -> list[Any]:
    """Flat data as it is, nested data in row-major order; exactly as many elements as the shape has."""
    if isinstance(data, list) and not (data and isinstance(data[0], list)):
        if len(data) != math.prod(shape):
            raise _bad(f"{where}: data has {len(data)} elements, shape {list(shape)} needs {math.prod(shape)}")
        return data
    level = [data]
    for size in shape:
        if any(type(part) is not list or len(part) != size for part in level):
            raise _bad(f"{where}: data is nested in another way than shape {list(shape)} says")
        level = list(chain.from_iterable(level))
    return level


def _from_binary(data: memoryview, where: str, datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    count, dtype = math.prod(shape), DTYPES[datatype]
    if datatype == "BYTES":
        return _object_array(_split_bytes(data, where, count), shape)
    if len(data) != count * dtype.itemsize:
        raise _bad(
            f"{where}: {datatype} of shape {list(shape)} takes {count * dtype.itemsize} bytes, "
            f"binary_data_size is {len(data)}",
        )
    if datatype == "BOOL" and np.frombuffer(data, np.uint8).max() > 1:
        raise _bad(f"{where}: a BOOL in binary data must be a byte of 0 or 1")
    return np.frombuffer(data, dtype).reshape(shape)


def _split_bytes(data: memoryview, where: str, count: int) -> list[bytes]:
    elements: list[bytes] = []
    offset = 0
    while offset < len(data):
        if len(elements) == count:
            raise _bad(f"{where}: the binary data goes on after its {count} BYTES elements")
        start = offset + 4
        size = struct.unpack_from("<I", data, offset)[0] if start <= len(data) else 0
        if start + size > len(data):
            raise _bad(f"{where}: BYTES element {len(elements)} is cut short")
        elements.append(bytes(data[start : start + size]))
        offset = start + size
    if len(elements) < count:
        raise _bad(f"{where}: the binary data has {len(elements)} BYTES elements, the shape needs {count}")
    return elements


def _object_array(elements: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array.reshape(shape)


def _requested_outputs(request: dict[str, Any], binary_output: bool) -> tuple[RequestedOutput, ...] | None:
    outputs = []
    for name, entry in _entries(request, "outputs"):
        where = f"output {_short(name)}"
        parameters = _parameters(entry, f"{where}: ")
        if "shared_memory_region" in parameters:
            raise InputError(
                "not_implemented", f"{where} is asked for in shared memory, which is not supported; use binary_data"
            )
        if parameters.get("classification"):
            raise InputError(
                "not_implemented", f"{where}: the classification extension is not supported; ask for the whole tensor"
            )
        binary = parameters.get("binary_data", binary_output)
        if not isinstance(binary, bool):
            raise _bad(f"{where}: binary_data must be true or false")
        outputs.append(RequestedOutput(name, binary))
    return tuple(outputs) or None


def _bad(message: str) -> InputError:
    return InputError("invalid_body", message)


def _short(text: str) -> str:
    """How a text from the request is quoted in a message: never long, never unprintable."""
    return ascii(text[:64])


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(value)) or _names((type(value),))


def _names(types: tuple[type, ...]) -> str:
    words = {
        bool: "true or false",
        int: "whole numbers",
        float: "fractions",
        str: "strings",
        list: "lists",
        dict: "objects",
        type(None): "null",
    }
    return " or ".join(words[type_] for type_ in types)


# ---- responses


def encode_response(
    head: Mapping[str, Any], outputs: Sequence[tuple[RequestedOutput, np.ndarray]], *, max_json_elements: int
) -> tuple[bytes, int | None]:
    """Outputs -> (body, length of its JSON); the length is None where no output is binary and all is JSON.

    `head` is what stands beside `outputs` in the JSON: model_name, model_version, id. Arrays are of numbers or
    booleans. Raises InputError where an output that is to go as JSON has more than `max_json_elements` elements.
    """
    described: list[str] = []
    tensors: list[Any] = []
    for output, array in outputs:
        datatype = _DATATYPE_OF[array.dtype.newbyteorder("<")]
        entry = {"name": output.name, "datatype": datatype, "shape": list(array.shape)}
        if output.binary:
            tensors.append(np.ascontiguousarray(array, DTYPES[datatype]))
            described.append(json.dumps({**entry, "parameters": {"binary_data_size": array.nbytes}}))
        else:
            check_json_elements(output.name, array.size, max_json_elements)
            described.append(_fill(json.dumps({**entry, "data": []}), _json_elements(array)))
    header = _fill(json.dumps({**head, "outputs": []}), ", ".join(described)).encode()
    return (b"".join([header, *tensors]), len(header)) if tensors else (header, None)


def check_json_elements(name: str, count: int, most: int) -> None:
    """Raise InputError where an output that is to go as JSON has too many elements."""
    if count > most:
        raise _bad(
            f"output {name} has {count} elements, more than the {most} that are sent as JSON; "
            "ask for it with binary_data true"
        )


def accepted_encoding(accept_encoding: str) -> str | None:
    """What an Accept-Encoding header prefers among gzip, deflate and (None) an uncompressed body: RFC 9110, 12.5.3.

    An uncompressed body has the weight of `identity` or `*`, or the least where the header names neither; it wins ties.
    """
    asked = weights(accept_encoding)
    listed = [name for name in asked if name in _WINDOW_BITS]
    best = max(["identity", *listed, *_WINDOW_BITS], key=lambda name: asked.get(name, asked.get("*", 0.0)))
    return None if best == "identity" else best


def compress(body: bytes, encoding: str) -> bytes:
    """`body` as gzip, or as deflate, which is the zlib format; at the fastest level, as masks compress well anyway."""
    return gzip.compress(body, 1) if encoding == "gzip" else zlib.compress(body, 1)


def _fill(text: str, elements: str) -> str:
    """JSON of an object that ends with an empty list -> the same with the list's elements, which are JSON already."""
    return f"{text[:-2]}{elements}]}}"


def _json_elements(array: np.ndarray) -> str:
    """The elements in row-major order, separated by commas; in pieces, as Python objects take much room."""
    flat = array.reshape(-1)
    pieces = (flat[start : start + _JSON_CHUNK].tolist() for start in range(0, flat.size, _JSON_CHUNK))
    return ",".join(json.dumps(piece, separators=(",", ":"))[1:-1] for piece in pieces)
