"""Promise: infer requests are read and responses written as the protocol says, and no bytes lead to anything worse than
one sentence."""

import base64
import gzip
import json
import math
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InputError
from service.oip_codec import (
    DTYPES,
    InferRequest,
    RequestedOutput,
    TensorSpec,
    accepted_encoding,
    check_inputs,
    compress,
    decode_base64,
    encode_response,
    inflate,
    parse_infer,
)

NUMBERS = [name for name in DTYPES if name != "BYTES"]


def parse(body: bytes, header_length: object = None, raw_input: str | None = None) -> InferRequest:
    text = None if header_length is None else str(header_length)
    return parse_infer(body, text, max_json_bytes=100_000, raw_input=raw_input)


def with_json(**tensor: Any) -> InferRequest:
    return parse(json.dumps({"inputs": [{"name": "x", **tensor}]}).encode())


def with_binary(data: bytes, **tensor: Any) -> InferRequest:
    entry = {"name": "x", "parameters": {"binary_data_size": len(data)}, **tensor}
    head = json.dumps({"inputs": [entry]}).encode()
    return parse(head + data, len(head))


def refusal(call: Any, *arguments: Any, **named: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        call(*arguments, **named)
    return caught.value


def extremes(datatype: str) -> list[Any]:
    dtype = DTYPES[datatype]
    if dtype.kind == "b":
        return [True, False]
    limits = np.iinfo(dtype.str) if dtype.kind in "ui" else np.finfo(dtype.str)
    return [limits.min.item() if dtype.kind == "f" else int(limits.min), np.array(limits.max).item()]


# ---- tensors


@pytest.mark.parametrize("datatype", NUMBERS)
def test_binary_tensors_of_every_datatype(datatype: str) -> None:
    sent = np.array([extremes(datatype)] * 3, DTYPES[datatype])
    tensor = with_binary(sent.tobytes(), datatype=datatype, shape=[3, 2]).inputs["x"]
    assert tensor.array.dtype == DTYPES[datatype]
    assert tensor.binary
    np.testing.assert_array_equal(tensor.array, sent)


@pytest.mark.parametrize("datatype", [name for name in NUMBERS if name != "FP16"])
@pytest.mark.parametrize("nested", [False, True])
def test_json_tensors_of_every_datatype(datatype: str, nested: bool) -> None:
    sent = np.array([extremes(datatype)] * 3, DTYPES[datatype])
    data = sent.tolist() if nested else sent.ravel().tolist()
    tensor = with_json(datatype=datatype, shape=[3, 2], data=data).inputs["x"]
    assert tensor.array.dtype == DTYPES[datatype]
    assert not tensor.binary
    np.testing.assert_array_equal(tensor.array, sent)


def test_bytes_tensors() -> None:
    elements = [b"", b"\xff\xd8\0", "żółw".encode(), b"1234"]
    data = b"".join(struct.pack("<I", len(element)) + element for element in elements)
    assert with_binary(data, datatype="BYTES", shape=[2, 2]).inputs["x"].array.tolist() == [elements[:2], elements[2:]]
    texts = with_json(datatype="BYTES", shape=[2], data=["żółw", ""]).inputs["x"]
    assert texts.array.tolist() == ["żółw".encode(), b""]


def test_a_scalar_is_one_element_in_a_list_or_bare() -> None:
    for data in ([True], True):
        array = with_json(datatype="BOOL", shape=[], data=data).inputs["x"].array
        assert array.shape == ()
        assert array.item() is True


def test_several_tensors_lie_one_after_the_other() -> None:
    a, b = np.arange(6, dtype=np.uint16), np.array([1.5, -2.5])
    head = json.dumps(
        {
            "inputs": [
                {"name": "a", "datatype": "UINT16", "shape": [2, 3], "parameters": {"binary_data_size": 12}},
                {"name": "j", "datatype": "INT8", "shape": [1], "data": [-1]},
                {"name": "b", "datatype": "FP64", "shape": [2], "parameters": {"binary_data_size": 16}},
            ]
        }
    ).encode()
    inputs = parse(head + a.tobytes() + b.tobytes(), len(head)).inputs
    np.testing.assert_array_equal(inputs["a"].array, a.reshape(2, 3))
    np.testing.assert_array_equal(inputs["b"].array, b)
    assert inputs["j"].array.tolist() == [-1]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"datatype": "UINT8", "shape": [3], "data": [1, 2]}, "data has 2 elements, shape [3] needs 3"),
        ({"datatype": "UINT8", "shape": [2, 2], "data": [[1, 2], [3]]}, "nested in another way than shape [2, 2]"),
        ({"datatype": "UINT8", "shape": [2, 2], "data": [[1, 2], 3]}, "nested in another way"),
        ({"datatype": "UINT8", "shape": [2], "data": [[1], [2]]}, "must hold whole numbers for UINT8, not lists"),
        ({"datatype": "UINT8", "shape": [2], "data": [1, [2]]}, "must hold whole numbers for UINT8, not lists"),
        ({"datatype": "UINT8", "shape": [1], "data": [256]}, "from 0 to 255 for UINT8"),
        ({"datatype": "INT64", "shape": [1], "data": [2**63]}, "for INT64"),
        ({"datatype": "UINT8", "shape": [1], "data": [-1]}, "from 0 to 255"),
        ({"datatype": "UINT8", "shape": [1], "data": [1.0]}, "whole numbers for UINT8, not fractions"),
        ({"datatype": "UINT8", "shape": [1], "data": [True]}, "not true or false"),
        ({"datatype": "UINT8", "shape": [1], "data": [None]}, "not null"),
        ({"datatype": "UINT8", "shape": [1], "data": "AAAA"}, "nested in another way"),
        ({"datatype": "BOOL", "shape": [1], "data": [1]}, "true or false for BOOL, not whole numbers"),
        ({"datatype": "FP32", "shape": [1], "data": ["1"]}, "whole numbers or fractions for FP32, not strings"),
        ({"datatype": "FP32", "shape": [1], "data": [1e39]}, "within +-3.40282e+38 for FP32"),
        ({"datatype": "FP64", "shape": [1], "data": [10**400]}, "for FP64"),
        ({"datatype": "FP16", "shape": [1], "data": [1.0]}, "send it as binary data"),
        ({"datatype": "BYTES", "shape": [1], "data": ["\ud800"]}, "surrogate"),
        ({"datatype": "BYTES", "shape": [1], "data": [1]}, "strings for BYTES"),
        ({"datatype": "BF16", "shape": [1], "data": [1]}, "a datatype of BOOL, UINT8"),
        ({"datatype": None, "shape": [1], "data": [1]}, "not null"),
        ({"shape": [1], "data": [1]}, "a datatype"),
        ({"datatype": "UINT8", "shape": [-1], "data": [1]}, "dimensions of 1 to 2147483647, not [-1]"),
        ({"datatype": "UINT8", "shape": [0], "data": []}, "dimensions of 1"),
        ({"datatype": "UINT8", "shape": [2**31], "data": []}, "dimensions of 1"),
        ({"datatype": "UINT8", "shape": [1] * 9, "data": [1]}, "at most 8 dimensions"),
        ({"datatype": "UINT8", "shape": [2**31 - 1] * 8, "data": [1]}, "data has 1 elements"),
        ({"datatype": "UINT8", "shape": [1.0], "data": [1]}, "list of whole numbers"),
        ({"datatype": "UINT8", "shape": [True], "data": [1]}, "list of whole numbers"),
        ({"datatype": "UINT8", "shape": "1", "data": [1]}, "list of whole numbers"),
        ({"datatype": "UINT8", "data": [1]}, "list of whole numbers"),
        ({"datatype": "UINT8", "shape": [1]}, "has no data"),
        ({"datatype": "UINT8", "shape": [1], "parameters": 1}, "must be an object, not whole numbers"),
        ({"datatype": "UINT8", "shape": [1], "parameters": {"binary_data_size": -1}}, "from 0 on"),
        ({"datatype": "UINT8", "shape": [1], "parameters": {"binary_data_size": True}}, "from 0 on"),
        ({"datatype": "UINT8", "shape": [1], "parameters": {"binary_data_size": 1}}, "only 0 are left"),
        ({"datatype": "UINT8", "shape": [1], "data": [1], "parameters": {"binary_data_size": 0}}, "both data and"),
    ],
)
def test_a_tensor_that_contradicts_itself_is_a_sentence(tensor: dict[str, Any], message: str) -> None:
    error = refusal(with_json, **tensor)
    assert error.code == "invalid_body"
    assert message in error.message


@pytest.mark.parametrize(
    ("data", "tensor", "message"),
    [
        (b"123", {"datatype": "UINT16", "shape": [2]}, "UINT16 of shape [2] takes 4 bytes, binary_data_size is 3"),
        (b"\2", {"datatype": "BOOL", "shape": [1]}, "byte of 0 or 1"),
        (b"\1\0\0", {"datatype": "BYTES", "shape": [1]}, "element 0 is cut short"),
        (b"\2\0\0\0a", {"datatype": "BYTES", "shape": [1]}, "element 0 is cut short"),
        (b"\xff\xff\xff\xffa", {"datatype": "BYTES", "shape": [1]}, "element 0 is cut short"),
        (b"\1\0\0\0a", {"datatype": "BYTES", "shape": [2]}, "has 1 BYTES elements, the shape needs 2"),
        (b"\0\0\0\0" * 2, {"datatype": "BYTES", "shape": [1]}, "goes on after its 1 BYTES elements"),
        (b"12", {"datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 1}}, "takes 2 bytes"),
        (b"12", {"datatype": "UINT8", "shape": [1], "parameters": {"binary_data_size": 1}}, "1 bytes follow"),
        (b"12", {"datatype": "UINT8", "shape": [3], "parameters": {"binary_data_size": 3}}, "only 2 are left"),
    ],
)
def test_binary_data_that_does_not_fit_is_a_sentence(data: bytes, tensor: dict[str, Any], message: str) -> None:
    error = refusal(with_binary, data, **tensor)
    assert error.code == "invalid_body"
    assert message in error.message


def test_shared_memory_is_refused() -> None:
    parameters = {"shared_memory_region": "r", "shared_memory_byte_size": 3}
    assert refusal(with_json, datatype="UINT8", shape=[3], parameters=parameters).code == "not_implemented"
    error = refusal(parse, request_with(outputs=[{"name": "y", "parameters": parameters}]))
    assert error.code == "not_implemented"
    assert "shared memory" in error.message


# ---- the request around them

X = {"name": "x", "datatype": "UINT8", "shape": [1], "data": [7]}


def request_with(**changes: Any) -> bytes:
    return json.dumps({"inputs": [X], **changes}).encode()


def test_id_parameters_and_outputs_are_kept() -> None:
    outputs = [
        {"name": "b", "parameters": {"binary_data": False}},
        {"name": "a"},
        {"name": "c", "parameters": {"binary_data": True}},
    ]
    parameters = {"scales": "0.5,1", "flip": True, "window": 64}
    request = parse(request_with(id="é\n", parameters={**parameters, "binary_data_output": True}, outputs=outputs))
    assert request.id == "é\n"
    assert request.parameters == parameters
    assert request.outputs == (RequestedOutput("b", False), RequestedOutput("a", True), RequestedOutput("c", True))
    assert request.binary_output


def test_left_out_parts_have_defaults() -> None:
    request = parse(request_with())
    assert (request.id, request.parameters, request.outputs, request.binary_output) == (None, {}, None, False)
    assert parse(request_with(outputs=[])).outputs is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b"{", "not valid JSON"),
        (b"\xff\xd8\xff\xe0 a picture", "not UTF-8"),
        (b"[]", "must be a JSON object"),
        (b"{}", "inputs is missing"),
        (b'{"inputs": NaN}', "NaN is not a number that JSON has"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[" * 50_000, "nested too deeply"),
        (request_with(inputs=[]), "inputs is missing or empty"),
        (request_with(inputs={}), "inputs is missing or empty"),
        (request_with(inputs={"x": 1}), "inputs must be a list of objects"),
        (request_with(inputs=[1]), "inputs[0] must be an object with a name"),
        (request_with(inputs=[{**X, "name": 1}]), "inputs[0] must be an object with a name"),
        (request_with(inputs=[X, X]), "input 'x' is given twice"),
        (request_with(outputs=[{"name": "y"}, {"name": "y"}]), "output 'y' is given twice"),
        (request_with(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]), "must be true or false"),
        (request_with(parameters={"binary_data_output": "yes"}), "must be true or false"),
        (request_with(parameters=[]), "parameters must be an object"),
        (request_with(parameters={"scales": [1]}), "parameter 'scales' must be a string, a number or a boolean"),
        (request_with(id=7), "id must be a string"),
    ],
)
def test_a_request_that_is_none_is_a_sentence(body: bytes, message: str) -> None:
    error = refusal(parse, body)
    assert error.code == "invalid_body"
    assert message in error.message
    assert len(error.message) < 300


def test_classification_is_refused() -> None:
    body = request_with(outputs=[{"name": "y", "parameters": {"classification": 3}}])
    assert refusal(parse, body).code == "not_implemented"


@pytest.mark.parametrize("text", ["", "-1", "1e3", "999", "0x10", "٣", "1" * 30])
def test_a_header_length_that_cannot_be_is_a_sentence(text: str) -> None:
    assert "Inference-Header-Content-Length" in refusal(parse, request_with(), text).message


def test_json_beyond_the_limit_is_413() -> None:
    error = refusal(parse, request_with(id="x" * 100_000))
    assert error.code == "too_many_bytes"
    assert "binary" in error.message


def test_a_raw_body_is_the_one_input() -> None:
    request = parse(b"\xff\xd8 a file", 0, raw_input="image")
    assert request.inputs["image"].array.tolist() == [b"\xff\xd8 a file"]
    assert request.binary_output
    assert "describe the inputs" in refusal(parse, b"\xff\xd8 a file", 0).message
    assert "empty" in refusal(parse, b"", 0, raw_input="image").message


# ---- what the model declares


def test_inputs_are_compared_with_the_model() -> None:
    specs = [TensorSpec("x", "UINT8", (-1, 3)), TensorSpec("s", "FP32", (-1,), optional=True)]

    def sent(**tensor: Any) -> dict[str, Any]:
        return with_json(**{"datatype": "UINT8", "shape": [1, 3], "data": [1, 2, 3], **tensor}).inputs

    check_inputs(sent(), specs, "m")
    for inputs, message in [
        (sent(name="y"), "m has no input 'y'; its inputs are x, s"),
        (sent(name="s", datatype="FP32", shape=[3]), "input x is missing; m needs it as UINT8 [-1, 3]"),
        (sent(datatype="INT8"), "input x must be UINT8, not INT8"),
        (sent(shape=[3, 1]), "input x must have shape [-1, 3] (-1: any size), not [3, 1]"),
        (sent(shape=[3]), "not [3]"),
    ]:
        error = refusal(check_inputs, inputs, specs, "m")
        assert error.code == "invalid_body"
        assert message in error.message


def test_base64_with_and_without_a_data_uri() -> None:
    plain = bytes(range(256))
    text = base64.b64encode(plain)
    assert decode_base64(text, "image[0]") == plain
    assert decode_base64(b"data:image/png;base64," + text, "image[0]") == plain
    assert decode_base64(base64.encodebytes(plain * 20), "image[0]") == plain * 20
    for wrong in (b"not base64!", b"abc", "ż".encode()):
        assert refusal(decode_base64, wrong, "image[0]").message.startswith("image[0] must be base64")


# ---- compression


@pytest.mark.parametrize(("encoding", "squeeze"), [("gzip", gzip.compress), ("Deflate", zlib.compress)])
def test_compressed_bodies(encoding: str, squeeze: Any) -> None:
    body = bytes(10_000)
    squeezed = squeeze(body)
    assert inflate(squeezed, encoding, 10_000) == body
    assert refusal(inflate, squeezed, encoding, 9_999).code == "too_many_bytes"
    assert "cut short" in refusal(inflate, squeezed[:-1], encoding, 10_000).message
    assert "follow" in refusal(inflate, squeezed + b"x", encoding, 10_000).message
    assert "not valid" in refusal(inflate, b"something else", encoding, 10_000).message
    assert "cut short" in refusal(inflate, b"", encoding, 10_000).message


def test_a_bomb_is_never_inflated_beyond_the_limit() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    error = refusal(inflate, bomb, "gzip", 1000)
    assert error.code == "too_many_bytes"
    assert "1000 bytes" in error.message


def test_other_encodings_are_415() -> None:
    assert inflate(b"as it is", "identity", 1) == b"as it is"
    assert refusal(inflate, b"", "br", 1000).code == "unsupported"


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("deflate, gzip;q=0.5", "deflate"),
        ("GZIP;q=0.2,deflate;q=0.9", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=nan", None),
        ("gzip;q=x, deflate;q=0.001", "deflate"),
        ("identity;q=1, gzip;q=0.1", None),
        ("gzip;q=0.5, identity;q=0.5", None),
        ("gzip;q=1.0, deflate;q=0.6, identity;q=0.3", "gzip"),
        ("*", None),
        ("*;q=0.5, gzip", "gzip"),
        ("gzip;q=0.1, *;q=0.5", None),
        ("identity;q=0, *", "gzip"),
        ("gzip;q=0, identity;q=0, *;q=0.1", "deflate"),
        ("deflate;q=0.1, *;q=0", "deflate"),
        ("identity;q=0", None),
    ],
)
def test_the_response_is_compressed_as_the_client_prefers(header: str, encoding: str | None) -> None:
    assert accepted_encoding(header) == encoding


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_what_is_compressed_can_be_inflated(encoding: str) -> None:
    body = bytes(range(256)) * 50
    assert inflate(compress(body, encoding), encoding, len(body)) == body


# ---- responses


def test_a_response_has_json_and_binary_outputs_in_the_order_given() -> None:
    mask = np.arange(6, dtype=np.uint16).reshape(1, 2, 3)
    presence = np.array([[0.1, np.float32(1) / 3]], np.float32)
    head = {"model_name": "m", "id": "é"}
    outputs = [(RequestedOutput("mask", True), mask), (RequestedOutput("presence", False), presence)]
    body, length = encode_response(head, outputs, max_json_elements=10)
    assert length is not None
    answer = json.loads(body[:length])
    assert {"model_name": "m", "id": "é"}.items() <= answer.items()
    assert answer["outputs"] == [
        {"name": "mask", "datatype": "UINT16", "shape": [1, 2, 3], "parameters": {"binary_data_size": 12}},
        {"name": "presence", "datatype": "FP32", "shape": [1, 2], "data": [pytest.approx(0.1), pytest.approx(1 / 3)]},
    ]
    assert body[length:] == mask.tobytes()
    np.testing.assert_array_equal(np.array(answer["outputs"][1]["data"], np.float32), presence.ravel())


def test_a_response_in_json_alone_has_no_header_length() -> None:
    mask = np.random.default_rng(0).integers(0, 255, (2, 300, 200), np.uint8)  # more than one piece of text
    body, length = encode_response({}, [(RequestedOutput("mask", False), mask)], max_json_elements=mask.size)
    assert length is None
    np.testing.assert_array_equal(json.loads(body)["outputs"][0]["data"], mask.ravel())
    error = refusal(encode_response, {}, [(RequestedOutput("mask", False), mask)], max_json_elements=mask.size - 1)
    assert error.code == "invalid_body"
    assert "binary_data true" in error.message


def test_strides_and_byte_order_do_not_reach_the_wire() -> None:
    big_endian = np.arange(12, dtype=">f4").reshape(3, 4).T
    body, length = encode_response({}, [(RequestedOutput("y", True), big_endian)], max_json_elements=0)
    assert np.frombuffer(body[length:], "<f4").reshape(4, 3).tolist() == big_endian.tolist()


# ---- no bytes do harm

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
tensor_like = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("x") | json_values,
        "datatype": st.sampled_from([*DTYPES, "BF16"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | json_values, max_size=4) | json_values,
        "data": st.lists(st.integers(-1, 300) | json_values, max_size=6) | json_values,
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data_size": st.integers(-1, 40), "binary_data": st.booleans() | json_values}
        )
        | json_values,
    },
)
request_like = st.fixed_dictionaries(
    {},
    optional={
        "id": json_values,
        "parameters": json_values,
        "inputs": st.lists(tensor_like, max_size=3) | json_values,
        "outputs": st.lists(tensor_like, max_size=3) | json_values,
    },
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(request_like, st.binary(max_size=40), st.sampled_from(["right", "none", "zero", "wrong"]))
def test_whatever_the_request_holds_the_error_is_a_sentence(request: Any, tail: bytes, header: str) -> None:
    head = json.dumps(request).encode()
    length = {"right": len(head), "none": None, "zero": 0, "wrong": max(0, len(head) - 3)}[header]
    body = head + (b"" if header == "none" else tail)
    _survives(body, length)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.none() | st.integers(-3, 250) | st.text(max_size=4))
def test_whatever_the_bytes_are_the_error_is_a_sentence(body: bytes, header_length: object) -> None:
    _survives(body, header_length)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=100), st.sampled_from(["gzip", "deflate"]), st.integers(0, 90), st.integers(0, 255))
def test_damaged_compressed_bodies_are_a_sentence(body: bytes, encoding: str, position: int, value: int) -> None:
    damaged = bytearray(compress(body, encoding))
    damaged[position % len(damaged)] = value
    try:
        assert len(inflate(bytes(damaged), encoding, 200)) <= 200
    except InputError as error:
        assert error.code in ("invalid_body", "too_many_bytes")


def _survives(body: bytes, header_length: object) -> None:
    try:
        request = parse(body, header_length, raw_input="image")
    except InputError as error:
        assert error.code in ("invalid_body", "too_many_bytes", "not_implemented")
        error.message.encode()  # no half surrogate that an answer could not carry
        assert len(error.message) < 500
        return
    for tensor in request.inputs.values():
        assert tensor.array.dtype == DTYPES[tensor.datatype]
        assert math.prod(tensor.array.shape) == tensor.array.size
