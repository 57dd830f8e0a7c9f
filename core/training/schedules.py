"""How a learning rate decays: the share of a training that is done in, a factor out. Training and LIFT both multiply by it."""

import math
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


def decay_factor(decay: Decay, progress: float) -> float:
    """What the rate is multiplied by once `progress`, from 0 to 1, is done: from 1 down to 0, or 1 throughout."""
    match decay:
        case "constant":
            return 1.0
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
