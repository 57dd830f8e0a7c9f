"""The tensor table: order, offsets, split, JSON, and what it refuses."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.adapters.spec import MAX_LAYERS, SITES, AdapterSpec, SiteShape, common_spec

LAYER = (SiteShape("q", 3, 5, True), SiteShape("down", 7, 2))
MEMORY = (SiteShape("attention", 9, 2),)

shapes = st.lists(st.sampled_from(SITES), unique=True, max_size=4).flatmap(
    lambda names: st.tuples(
        *(
            st.builds(SiteShape, st.just(name), st.integers(1, 6), st.integers(1, 6), st.booleans())
            for name in sorted(names, key=SITES.index)
        )
    )
)
memories = st.builds(SiteShape, st.just("attention"), st.integers(1, 20), st.integers(1, 4), st.just(False)).map(
    lambda site: (site,)
)
specs = st.builds(AdapterSpec, st.lists(shapes, min_size=1, max_size=3).map(tuple), st.integers(1, 4)) | st.builds(
    AdapterSpec,
    st.lists(memories, min_size=1, max_size=3).map(tuple),
    st.integers(1, 4),
    st.just("gated_memory"),
    st.sampled_from(["shifted", "released"]),
)


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
    assert not parts or torch.equal(spec.join(parts), flat_BN)
    assert sum(spec.layer_numel) == spec.numel == sum(entry.numel for entry in spec.table)
    for entry, part in zip(spec.table, parts.values(), strict=True):
        assert part.shape == (2, *entry.shape)
        assert torch.equal(part.flatten(1), flat_BN[:, entry.offset : entry.offset + entry.numel])
        assert part.untyped_storage().data_ptr() == flat_BN.untyped_storage().data_ptr()


@given(specs)
def test_json_round_trip(spec):
    again = AdapterSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.fingerprint == spec.fingerprint


def test_order_of_a_gated_memory_is_w1_w2_v_w():
    spec = AdapterSpec((MEMORY,) * 2, 4, "gated_memory", "shifted")
    rows = [(entry.layer, entry.site, entry.tensor, entry.shape, entry.offset) for entry in spec.table[:5]]
    assert rows == [
        (0, "attention", "W1", (2, 9, 4), 0),
        (0, "attention", "W2", (2, 4, 9), 72),
        (0, "attention", "V", (2, 9, 3), 144),
        (0, "attention", "w", (2, 3), 198),
        (1, "attention", "W1", (2, 9, 4), 204),
    ]


def test_a_lora_is_written_as_before_there_were_other_kinds():
    spec = AdapterSpec((LAYER,), 2)
    sites = [["q", 3, 5, True], ["down", 7, 2, False]]
    assert spec.to_json() == {"kind": "lora", "rank": 2, "layers": [{"count": 1, "sites": sites}]}
    assert spec.fingerprint == "cabf3312ac5b88dfeab8b25806b934514d744b758b8d08e5e17d64a13c394fe5"


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
        (((SiteShape("q", 3, 0),),), 2, "without features"),
    ],
)
def test_a_spec_that_makes_no_sense(layers, rank, message):
    with pytest.raises(ValueError, match=message):
        AdapterSpec(layers, rank)


@pytest.mark.parametrize(
    ("layers", "gate", "message"),
    [
        ((MEMORY,), None, "the gate None: give shifted or released"),
        ((MEMORY,), "open", "the gate 'open'"),
        ((LAYER,), "shifted", "unknown sites.*known are attention"),
        (((),), "shifted", "must have the one site"),
        (((SiteShape("attention", 9, 2, True),),), "shifted", "without bias"),
    ],
)
def test_a_memory_that_makes_no_sense(layers, gate, message):
    with pytest.raises(ValueError, match=message):
        AdapterSpec(layers, 2, "gated_memory", gate)


def test_a_lora_has_no_gate():
    with pytest.raises(ValueError, match="the gate 'shifted': give None"):
        AdapterSpec((LAYER,), 2, gate="shifted")


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
        {"kind": "lora", "rank": float("inf"), "layers": []},
        {"kind": "lora", "rank": 2, "layers": [], "gate": "shifted"},
        {"kind": "gated_memory", "rank": 2, "layers": [{"count": 1, "sites": [["attention", 9, 2, False]]}]},
        "lora",
    ],
)
def test_json_that_is_no_spec(value):
    with pytest.raises(ValueError, match=r"adapter|rank|unpack"):
        AdapterSpec.from_json(value)


@pytest.mark.parametrize("counts", [[10**12], [MAX_LAYERS + 1], [MAX_LAYERS, 1], [0], [-1]])
def test_json_that_counts_absurdly_many_layers(counts):
    """A few bytes of a hostile file must not become gigabytes."""
    layers = [{"count": count, "sites": [["q", 3 + index, 5, False]]} for index, count in enumerate(counts)]
    with pytest.raises(ValueError, match=f"1 to {MAX_LAYERS} in all"):
        AdapterSpec.from_json({"kind": "lora", "rank": 2, "layers": layers})


def test_common_spec_takes_the_largest_rank_and_all_sites():
    small = AdapterSpec((LAYER,), 2)
    assert common_spec([small, small.with_rank(5), small.with_rank(3)]) == small.with_rank(5)
    without_bias = AdapterSpec(((SiteShape("q", 3, 5), SiteShape("v", 3, 4)),), 3)
    both = AdapterSpec(((SiteShape("q", 3, 5, True), SiteShape("v", 3, 4), SiteShape("down", 7, 2)),), 3)
    assert common_spec([small, without_bias]) == common_spec([without_bias, small]) == both
    assert both.has_sites_of(small) and both.has_sites_of(without_bias) and both.has_sites_of(both)
    assert not small.has_sites_of(both) and not without_bias.has_sites_of(small)
    with pytest.raises(ValueError, match="different bases"):
        common_spec([small, AdapterSpec(((SiteShape("q", 3, 6),),), 2)])
    with pytest.raises(ValueError, match="different bases"):
        common_spec([small, AdapterSpec((LAYER, LAYER), 2)])
    shifted, released = (AdapterSpec((MEMORY,), 2, "gated_memory", gate) for gate in ("shifted", "released"))
    assert common_spec([shifted, shifted.with_rank(3)]) == shifted.with_rank(3)
    with pytest.raises(ValueError, match=r"kinds gated_memory \(released gate\) and gated_memory \(shifted gate\) cannot share"):
        common_spec([shifted, released])
    with pytest.raises(ValueError, match=r"kinds gated_memory \(shifted gate\) and lora cannot share"):
        common_spec([small, shifted])
    with pytest.raises(ValueError, match="no adapters"):
        common_spec([])
