"""The tensor table: order, offsets, split, JSON, and what it refuses."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.adapter import SITES, AdapterSpec, SiteShape, common_spec

LAYER = (SiteShape("q", 3, 5, True), SiteShape("down", 7, 2))

shapes = st.lists(st.sampled_from(SITES), unique=True, max_size=4).flatmap(
    lambda names: st.tuples(
        *(
            st.builds(SiteShape, st.just(name), st.integers(1, 6), st.integers(1, 6), st.booleans())
            for name in sorted(names, key=SITES.index)
        )
    )
)
specs = st.builds(AdapterSpec, st.lists(shapes, min_size=1, max_size=3).map(tuple), st.integers(1, 4))


def test_order_is_layer_site_then_a_b_c():
    spec = AdapterSpec((LAYER, LAYER), rank=2)
    rows = [(entry.layer, entry.site, entry.tensor, entry.shape, entry.offset) for entry in spec.table[:5]]
    assert rows == [
        (0, "q", "A", (3, 2), 0),
        (0, "q", "B", (2, 5), 6),
        (0, "q", "C", (5,), 16),
        (0, "down", "A", (7, 2), 21),
        (0, "down", "B", (2, 2), 35),
    ]
    assert spec.table[5].offset == 39 and spec.numel == 78 and spec.layer_numel == (39, 39)


@given(specs)
def test_split_tiles_the_vector(spec):
    flat_BN = torch.arange(2 * spec.numel, dtype=torch.float32).view(2, -1)
    parts = spec.split(flat_BN)
    assert list(parts) == [(entry.layer, entry.site, entry.tensor) for entry in spec.table]
    assert sum(spec.layer_numel) == spec.numel == sum(entry.numel for entry in spec.table)
    for entry, part in zip(spec.table, parts.values(), strict=True):
        assert part.shape == (2, *entry.shape)
        assert torch.equal(part.flatten(1), flat_BN[:, entry.offset : entry.offset + entry.numel])
        assert part.untyped_storage().data_ptr() == flat_BN.untyped_storage().data_ptr()


@given(specs)
def test_json_round_trip(spec):
    again = AdapterSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.fingerprint == spec.fingerprint


def test_equal_layers_are_written_once():
    assert len(AdapterSpec((LAYER,) * 36, 8).to_json()["layers"]) == 1
    assert AdapterSpec((LAYER,) * 36, 8).fingerprint != AdapterSpec((LAYER,) * 35, 8).fingerprint


def test_backward_of_split_is_one_node():
    """A slice for each tensor would fill a vector of zeros for each in backward."""
    flat_BN = torch.randn(1, AdapterSpec((LAYER,), 2).numel, requires_grad=True)
    parts = AdapterSpec((LAYER,), 2).split(flat_BN).values()
    nodes = {part.grad_fn.next_functions[0][0] for part in parts}
    assert len(nodes) == 1 and type(next(iter(nodes))).__name__.startswith("Split")


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [
        (((SiteShape("router", 3, 5),),), 2, "unknown sites.*router.*known are q"),
        (((SiteShape("k", 3, 5), SiteShape("q", 3, 5)),), 2, "in the order q"),
        (((SiteShape("q", 3, 5), SiteShape("q", 3, 5)),), 2, "each once"),
        ((LAYER,), 0, "rank is 0: give 1 or more"),
    ],
)
def test_a_spec_that_makes_no_sense(layers, rank, message):
    with pytest.raises(ValueError, match=message):
        AdapterSpec(layers, rank)


@pytest.mark.parametrize("shape", [(1, 38), (39,), (1, 1, 39)])
def test_split_refuses_another_shape(shape):
    with pytest.raises(ValueError, match=r"wants \[B, 39\]"):
        AdapterSpec((LAYER,), 2).split(torch.zeros(shape))


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "prefix", "rank": 2, "layers": []},
        {"kind": "lora", "layers": []},
        {"kind": "lora", "rank": 2, "layers": [{"sites": [["q", 3, 5, False]]}]},
        {"kind": "lora", "rank": 2, "layers": [{"count": 1, "sites": [["q", 3]]}]},
        {"kind": "lora", "rank": None, "layers": []},
        {"kind": "lora", "rank": 0, "layers": []},
        "lora",
    ],
)
def test_json_that_is_no_spec(value):
    with pytest.raises(ValueError, match=r"adapter|rank|unpack"):
        AdapterSpec.from_json(value)


def test_common_spec_takes_the_largest_rank():
    small = AdapterSpec((LAYER,), 2)
    assert common_spec([small, small.with_rank(5), small.with_rank(3)]) == small.with_rank(5)
    with pytest.raises(ValueError, match="different bases"):
        common_spec([small, AdapterSpec((LAYER, LAYER), 2)])
    with pytest.raises(ValueError, match="no adapters"):
        common_spec([])
