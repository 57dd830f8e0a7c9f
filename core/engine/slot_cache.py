"""Keys and values of many rows of different lengths, in slots: what the decoder layers write to and attend over.

One pair of tensors a layer, `[S, kv heads, capacity, head size]`, allocated when the first keys come; capacity doubles up to
`max_length`, one layer at a time. A pass runs over slots that lie together and gets views of them: nothing is gathered. It goes
into a transformers model as `past_key_values`; no model code is patched. It knows nothing of requests.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_CAPACITY = 128


@dataclass
class _Window:
    """Where the pass under way reads, tokens 0 to `end` of `rows`, and writes: `start` to `end`, or one token a row."""

    rows: slice
    start: int
    end: int
    row_B: Tensor | None = None
    position_B: Tensor | None = None


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, slots: int, window: _Window) -> None:
        super().__init__()
        self.slots = slots
        self.window = window
        self.capacity = 0

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(self.slots, states.shape[1], self.capacity, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if window.position_B is None:
                buffer[window.rows, :, window.start : window.end] = states
            else:
                buffer[window.row_B, :, window.position_B] = states[:, :, 0]
        keys, values = self.buffers
        return keys[window.rows, :, : window.end], values[window.rows, :, : window.end]

    def grow(self, capacity: int) -> None:
        self.capacity = capacity
        if self.is_initialized:
            self.keys, self.values = (_lengthened(buffer, capacity) for buffer in self.buffers)

    def get_seq_length(self) -> int:
        return self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.start + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _lengthened(buffer: Tensor, capacity: int) -> Tensor:
    longer = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
    longer[:, :, : buffer.shape[2]] = buffer
    return longer


class SlotCache(Cache):
    """`past_key_values` for a decoder of `layers` layers; `read_prompts` or `decode` says what the next pass runs over."""

    def __init__(self, layers: int, slots: int, max_length: int) -> None:
        self._window = _Window(slice(0), 0, 0)
        self._layers = [_Layer(slots, self._window) for _ in range(layers)]
        super().__init__(layers=list(self._layers))
        self.max_length = max_length
        self.capacity = 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for layer in self._layers for buffer in layer.buffers)

    def read_prompts(self, rows: slice, start: int, end: int) -> None:
        """The next pass brings tokens `start` to `end` of every row."""
        self._fit(end)
        window = self._window
        window.rows, window.start, window.end, window.row_B, window.position_B = rows, start, end, None, None

    def decode(self, row_B: Tensor, position_B: Tensor, longest: int) -> None:
        """The next pass brings one token a row, for slots `row_B` = 0 to B - 1 at `position_B`, all below `longest`."""
        self._fit(longest)
        window = self._window
        window.rows, window.start, window.end = slice(len(row_B)), longest - 1, longest
        window.row_B, window.position_B = row_B, position_B

    def clear(self, slot: int) -> None:
        """To be called for a new occupant: a NaN left behind by another would reach it through attention weights of zero."""
        for layer in self._layers:
            for buffer in layer.buffers:
                buffer[slot].zero_()

    def move(self, source: int, target: int) -> None:
        """Copies the row of one slot to another."""
        for layer in self._layers:
            for buffer in layer.buffers:
                buffer[target] = buffer[source]

    def _fit(self, length: int) -> None:
        if length > self.capacity:
            self.capacity = min(self.max_length, max(FIRST_CAPACITY, 2 * self.capacity, length))
            for layer in self._layers:
                layer.grow(self.capacity)
