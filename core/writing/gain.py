"""What an adapter saves on its own document's text, from the three losses that the quality gate measures. No torch."""

import math


def gain(matched_loss: float | None, shuffled_loss: float | None, base_loss: float | None) -> float | None:
    """Nats a token that an adapter saves, against the better of another's adapter (where there was one) and none.

    None where it was not measured; NaN, which is below every threshold, where a loss of its own is not finite.
    """
    if matched_loss is None:
        return None
    beside = [loss for loss in (shuffled_loss, base_loss) if loss is not None and math.isfinite(loss)]
    return min(beside) - matched_loss if beside and math.isfinite(matched_loss) else math.nan
