"""Vectors to bytes and back: the bytes as stated, how far a number moves, and what is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.conversion import codec_quality
from core.adapters.codec import decode, encode
from core.adapters.layout import ENCODINGS, GROUP, Encoding, encoded_bytes
from core.adapters.spec import ATTENTION, SITES, AdapterSpec, SiteShape

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
QUANTISED: tuple[Encoding, ...] = ("int8", "int4")
LARGEST = {"int8": 127, "int4": 7}
LORA = AdapterSpec(
    ((SiteShape("q", 130, 70, True), SiteShape("down", 5, 64)), (SiteShape("q", 64, 64),), (SiteShape("q", 64, 64),)), 3
)
MEMORY = AdapterSpec(((SiteShape(ATTENTION, 9, 2),),) * 2, 5, "gated_memory", "shifted")


def flat(numel: int) -> AdapterSpec:
    """A spec of `numel` numbers: an A of one feature, a B and a C that make up the rest."""
    assert numel % 2
    return AdapterSpec(((SiteShape("q", 1, (numel - 1) // 2, True),),), 1)


def scale_of_each(spec: AdapterSpec, flat_N: torch.Tensor, largest: int) -> torch.Tensor:
    """The exact scale of each number, the largest of its group by 127.5 or 7.5, found tensor by tensor."""
    scales = []
    for entry, values in zip(spec.table, spec.split(flat_N[None]).values(), strict=True):
        axis = len(entry.shape) - (2 if entry.tensor in ("A", "W1", "V") else 1)
        groups = values[0].split(GROUP, dim=axis)
        steps = [(group.abs().amax(axis, keepdim=True) / (largest + 0.5)).expand_as(group) for group in groups]
        scales.append(torch.cat(steps, dim=axis).flatten())
    return torch.cat(scales)


@given(st.lists(FLOATS, min_size=11, max_size=11))
def test_fp32_is_exact(values: list[float]) -> None:
    flat_N = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(decode(encode(flat_N, "fp32", flat(11)), flat(11), "fp32"), flat_N)


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=11, max_size=11))
def test_bf16_is_a_plain_cast(values: list[float]) -> None:
    flat_N = torch.tensor(values, dtype=torch.float32)
    data = encode(flat_N, "bf16", flat(11))
    assert len(data) == encoded_bytes(flat(11), "bf16") == 22
    decoded_N = decode(data, flat(11), "bf16")
    assert torch.equal(decoded_N, flat_N.to(torch.bfloat16).float())
    assert encode(decoded_N, "bf16", flat(11)) == data


def test_bf16_rounds_to_nearest_even() -> None:
    step = 2.0**-7
    values = torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-20])
    assert decode(encode(values, "bf16", flat(3)), flat(3), "bf16").tolist() == [1, 1 + 2 * step, 1 + step]


def test_bytes_are_little_endian() -> None:
    values = torch.tensor([1.0, -2.5, 0.0])
    assert encode(values, "fp32", flat(3)) == struct.pack("<3f", 1.0, -2.5, 0.0)
    assert encode(values, "bf16", flat(3)) == bytes.fromhex("803f20c00000")


def test_the_bytes_of_quantised_numbers() -> None:
    """A [2, 2] has a scale for each rank (a column), B [2, 3] for each row, C [3] one: then the numbers in the table's order."""
    spec = AdapterSpec(((SiteShape("q", 2, 3, True),),), 2)
    scales, of = [0.5, 2.0, 0.25, 0.0, 1.0], [0, 1, 0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    for encoding, most in LARGEST.items():
        whole = [most, 1, -2, -most, 3, most, 0, 0, 0, 0, -5, 4, most]
        values = [(number + (0.5 if number == most else -0.5 if number == -most else 0)) for number in whole]
        flat_N = torch.tensor([value * scales[group] for value, group in zip(values, of, strict=True)])
        head = bytes.fromhex("003f 0040 803e 0000 803f")
        body = struct.pack("13b", *whole) if encoding == "int8" else bytes.fromhex("17 9e 73 00 00 4b 07")
        assert encode(flat_N, encoding, spec) == head + body
        decoded = [number * scales[group] for number, group in zip(whole, of, strict=True)]
        assert decode(head + body, spec, encoding).tolist() == decoded


def test_groups_restart_at_every_row_and_tensor() -> None:
    assert encoded_bytes(LORA, "int8") == LORA.numel + 2 * (3 * (3 + 2) + 2 + 3 * (1 + 1) + 2 * 3 * 2)
    spec = AdapterSpec(((SiteShape("q", GROUP, GROUP + 1),),), 2)
    flat_N = torch.full((spec.numel,), 1e-3)
    places = spec.split(torch.arange(spec.numel)[None])
    a_IR, b_RO = places[0, "q", "A"][0], places[0, "q", "B"][0]
    flat_N[a_IR[0, 0]] = flat_N[b_RO[1, GROUP]] = 960.0
    lost_N = decode(encode(flat_N, "int4", spec), spec, "int4") == 0
    assert lost_N.nonzero()[:, 0].tolist() == a_IR[1:, 0].tolist()


@pytest.mark.parametrize("encoding", QUANTISED)
@pytest.mark.parametrize("spec", [LORA, MEMORY])
@given(seed=st.integers(0, 2**32 - 1), sizes=st.floats(0, 30))
def test_no_number_moves_by_more_than_half_its_scale(encoding: Encoding, spec: AdapterSpec, seed: int, sizes: float) -> None:
    """However far sizes spread; a scale in bf16 is at most 2^-7 above the exact one."""
    generator = torch.Generator().manual_seed(seed)
    flat_N = torch.randn(spec.numel, generator=generator) * torch.exp(
        sizes * torch.randn(spec.numel, generator=generator).clamp(-1, 1)
    )
    flat_N[torch.rand(spec.numel, generator=generator) < 0.2] = 0
    data = encode(flat_N, encoding, spec)
    assert len(data) == encoded_bytes(spec, encoding)
    decoded_N = decode(data, spec, encoding)
    bound_N = scale_of_each(spec, flat_N, LARGEST[encoding]) * (1 + 2**-7) / 2
    assert ((decoded_N - flat_N).abs() <= bound_N * (1 + 1e-5)).all()


@given(st.lists(FLOATS, min_size=9, max_size=9))
def test_any_numbers_survive_quantisation(values: list[float]) -> None:
    flat_N = torch.tensor(values)
    for encoding in QUANTISED:
        decoded_N = decode(encode(flat_N, encoding, flat(9)), flat(9), encoding)
        bound_N = (scale_of_each(flat(9), flat_N, LARGEST[encoding]).double() * (1 + 2**-7) + 1e-40) / 2
        assert ((decoded_N.double() - flat_N.double()).abs() <= bound_N * (1 + 1e-5)).all()


def test_equal_layers_are_encoded_like_others() -> None:
    """What equal layers share is how they are computed, not what comes out."""
    one, other = (SiteShape("q", 64, 64),), (SiteShape("q", 64, 64), SiteShape("k", 7, 9))
    for encoding in QUANTISED:
        for layers in ((one, one, other), (one, other, one), (one,)):
            spec = AdapterSpec(layers, 2)
            flat_N = torch.randn(spec.numel, generator=torch.Generator().manual_seed(0))
            parts = [
                decode(encode(part_N, encoding, AdapterSpec((layer,), 2)), AdapterSpec((layer,), 2), encoding)
                for layer, part_N in zip(layers, flat_N.split(list(spec.layer_numel)), strict=True)
            ]
            assert torch.equal(decode(encode(flat_N, encoding, spec), spec, encoding), torch.cat(parts))


def test_bytes_an_adapter_of_qwen3_8b() -> None:
    """Two million in bf16 are 87 TB."""
    widths = {"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 12288, "up": 12288}
    sites = [SiteShape(site, 4096, width) for site, width in widths.items()] + [SiteShape("down", 12288, 4096)]
    spec = AdapterSpec((tuple(sorted(sites, key=lambda site: SITES.index(site.site))),) * 36, 8)
    assert spec.numel == 36 * 8 * 75_776 == 21_823_488
    assert {encoding: encoded_bytes(spec, encoding) for encoding in ENCODINGS} == {
        "fp32": 87_293_952, "bf16": 43_646_976, "int8": 22_505_472, "int4": 11_593_728,
    }  # fmt: skip
    assert round(2e6 * encoded_bytes(spec, "bf16") / 1e12) == 87


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_type_any_stride_and_gradients(dtype: torch.dtype) -> None:
    flat_N = torch.tensor([-127.0, 0, 7, 0, -7, 0, 0, 0, 7, 0], dtype=dtype, requires_grad=True)[::2]
    for encoding in ENCODINGS:
        data = encode(flat_N, encoding, flat(5))
        assert data == encode(torch.tensor([-127.0, 7, -7, 0, 7]), encoding, flat(5))
        assert torch.allclose(decode(data, flat(5), encoding), flat_N.detach().float(), rtol=0.08)


def test_a_decoded_vector_can_be_written() -> None:
    for encoding in ENCODINGS:
        data = encode(torch.zeros(3), encoding, flat(3))
        decode(data, flat(3), encoding).add_(1)
        assert data == bytes(encoded_bytes(flat(3), encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_numbers_that_are_not_finite_are_refused(encoding: Encoding, value: float) -> None:
    with pytest.raises(ValueError, match=r"1 numbers are not finite in .* the first at 1"):
        encode(torch.tensor([0.0, value, 0.0], dtype=torch.float64), encoding, flat(3))


def test_overflow_of_a_cast_is_refused() -> None:
    largest = torch.full((3,), torch.finfo(torch.float32).max)
    assert torch.equal(decode(encode(largest, "fp32", flat(3)), flat(3), "fp32"), largest)
    assert torch.allclose(decode(encode(largest, "int8", flat(3)), flat(3), "int8"), largest, rtol=0.01)
    with pytest.raises(ValueError, match="not finite in bf16"):
        encode(largest, "bf16", flat(3))


@pytest.mark.parametrize(
    ("encoding", "data", "message"),
    [
        ("fp32", "0000c07f 00000000 00000000", "1 numbers are not finite"),
        ("bf16", "807f 0000 0000", "1 numbers are not finite"),
        ("int8", "c07f 0000 0000 000000", "a scale is below 0 or"),
        ("int8", "807e 0000 807f 000000", "a scale is below 0 or"),
        ("int8", "80bf 0000 0000 010000", "a scale is below 0 or"),
        ("int8", "803f 0000 0000 800000", "a number is below -127"),
        ("int4", "803f 0000 0000 8000", "a number is below -7"),
        ("int4", "803f 0000 0000 0800", "a number is below -7"),
        ("int4", "803f 0000 0000 0010", "unused half of the last byte"),
    ],
)
def test_bytes_that_nothing_is_encoded_to_are_refused(encoding: Encoding, data: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(bytes.fromhex(data), flat(3), encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(data=st.data())
def test_any_bytes_are_refused_or_finite(encoding: Encoding, data: st.DataObject) -> None:
    size = encoded_bytes(flat(9), encoding)
    blob = data.draw(st.binary(min_size=size, max_size=size))
    try:
        decoded_N = decode(blob, flat(9), encoding)
    except ValueError:
        return
    assert decoded_N.isfinite().all()


def test_a_wrong_length_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="5 numbers in bf16 are 10 bytes, not 7"):
        decode(bytes(7), flat(5), "bf16")
    with pytest.raises(ValueError, match="5 numbers in int4 are 9 bytes, not 8"):
        decode(bytes(8), flat(5), "int4")


def test_unknown_encodings_and_shapes_are_refused() -> None:
    spec = flat(3)
    for call in (
        lambda: encode(torch.zeros(3), "int3", spec),
        lambda: decode(b"", spec, "int3"),
        lambda: encoded_bytes(spec, "int3"),
    ):
        with pytest.raises(ValueError, match="'int3' is not known: this version knows fp32, bf16, int8, int4"):
            call()
    for bad in (torch.zeros(3, 1), torch.zeros(2), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="a flat vector of 3 floats"):
            encode(bad, "fp32", spec)


def test_the_benchmark_of_quality_runs(tmp_path: Path) -> None:
    codec_quality.main(["--documents", "1", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "codec_quality.json").read_text())
    assert result["documents"] == 2 and result["questions"] > 4 and list(result["encodings"]) == list(ENCODINGS)
    errors = [result["encodings"][encoding]["relative_error"] for encoding in ENCODINGS]
    assert errors[0] == 0 and errors == sorted(errors)
    assert result["encodings"]["int4"]["bytes"] == 25_840 and [bar["name"] for bar in result["bars"]] == [
        "int8 loses",
        "int4 loses",
    ]


def test_paired_differences_are_over_documents() -> None:
    """One document of two loses both of its questions, the other none: the interval knows of two documents only."""
    lost = codec_quality.paired(np.array([1.0, 1, 1, 1]), np.array([0.0, 0, 1, 1]), np.array([0, 0, 1, 1]))
    assert (lost.mean, lost.low, lost.high) == (0.5, 0, 1)
