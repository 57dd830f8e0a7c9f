"""Whether adapters change anything, and how much, without forming an I x O matrix."""

from torch import Tensor

from core.adapters.lora import LoraWeights
from core.adapters.spec import ATTENTION
from core.adapters.weights import AdapterWeights


def delta_norms(weights: LoraWeights) -> Tensor:
    """`[B]` Frobenius norms of the whole deltas (all A B, and C), from R x R products; not finite where a number is not."""
    square_B = weights.flat_BN.new_zeros(len(weights))
    for (layer, site, tensor), value in weights.tensors.items():
        if tensor == "A":
            b_BRO = weights.tensors[layer, site, "B"]
            square_B = square_B + ((value.mT @ value) * (b_BRO @ b_BRO.mT)).sum((1, 2))
        elif tensor == "C":
            square_B = square_B + value.square().sum(1)
    return square_B.sqrt()


def unusable(norm: float) -> bool:
    """Whether `delta_norms` says that an adapter changes nothing or is not finite."""
    return not 0 < norm < float("inf")


def changes_anything(weights: AdapterWeights) -> bool:
    """Whether the first adapter changes what a base computes.

    Of a LoRA, whether any delta A B + C is not zero, by ||A B||_F^2 = tr(A'A B B'): no I x O matrix is formed. Of a gated memory,
    whether any gate can open, which takes w and V of one head.
    """
    if not weights.spec.zeros_change_nothing:
        return True
    for (layer, site, tensor), value_B in weights.tensors.items():
        value = value_B[0].double()
        if tensor == "C" and value.any():
            return True
        if tensor == "A":
            b_RO = weights.tensors[layer, site, "B"][0].double()
            if ((value.T @ value) * (b_RO @ b_RO.T)).sum() > 0:
                return True
        if tensor == "w" and (value * weights.tensors[layer, ATTENTION, "V"][0].double().abs().sum(dim=1)).any():
            return True
    return False
