import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.codec import ENCODINGS, Encoding, decode, encode, encoded_bytes

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS))
def test_fp32_is_exact(values: list[float]) -> None:
    flat_N = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(decode(encode(flat_N, "fp32"), len(values), "fp32"), flat_N)


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32)))
def test_bf16_is_a_plain_cast(values: list[float]) -> None:
    flat_N = torch.tensor(values, dtype=torch.float32)
    data = encode(flat_N, "bf16")
    assert len(data) == encoded_bytes(len(values), "bf16") == 2 * len(values)
    decoded_N = decode(data, len(values), "bf16")
    assert torch.equal(decoded_N, flat_N.to(torch.bfloat16).float())
    assert encode(decoded_N, "bf16") == data


def test_bf16_rounds_to_nearest_even() -> None:
    step = 2.0**-7
    values = torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-20])
    assert decode(encode(values, "bf16"), 3, "bf16").tolist() == [1, 1 + 2 * step, 1 + step]


def test_bytes_are_little_endian() -> None:
    assert encode(torch.tensor([1.0, -2.5]), "fp32") == struct.pack("<2f", 1.0, -2.5)
    assert encode(torch.tensor([1.0, -2.5]), "bf16") == bytes.fromhex("803f20c0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_type_any_stride_and_gradients(dtype: torch.dtype) -> None:
    flat_N = torch.arange(12, dtype=dtype, requires_grad=True)[::2]
    for encoding in ENCODINGS:
        assert decode(encode(flat_N, encoding), 6, encoding).tolist() == [0, 2, 4, 6, 8, 10]


def test_a_decoded_vector_can_be_written() -> None:
    data = encode(torch.zeros(3), "fp32")
    decode(data, 3, "fp32").add_(1)
    assert data == bytes(12)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_numbers_that_are_not_finite_are_refused(encoding: Encoding, value: float) -> None:
    with pytest.raises(ValueError, match=r"1 numbers are not finite in .* the first at 1"):
        encode(torch.tensor([0.0, value], dtype=torch.float64), encoding)


def test_overflow_of_the_cast_is_refused() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert decode(encode(largest, "fp32"), 1, "fp32") == largest
    with pytest.raises(ValueError, match="not finite in bf16"):
        encode(largest, "bf16")


def test_bytes_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        decode(bytes.fromhex("0000c07f"), 1, "fp32")
    with pytest.raises(ValueError, match="not finite"):
        decode(bytes.fromhex("807f"), 1, "bf16")


def test_a_wrong_length_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="4 numbers in bf16 are 8 bytes, not 7"):
        decode(bytes(7), 4, "bf16")


def test_unknown_encodings_and_shapes_are_refused() -> None:
    for call in (lambda: encode(torch.zeros(2), "int8"), lambda: decode(b"", 0, "int8"), lambda: encoded_bytes(2, "int8")):
        with pytest.raises(ValueError, match="'int8' is not known: this version knows fp32, bf16"):
            call()
    for bad in (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="flat vector of floats"):
            encode(bad, "fp32")
