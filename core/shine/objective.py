"""What a hypernetwork is trained on: the base's loss under the adapters that it writes."""

from torch import Tensor

from core.adapters.lora import compose_groups
from core.shine.hypernetwork import Hypernetwork
from core.training.examples import Batch
from core.training.objectives import row_losses


def hypernetwork_loss(hypernetwork: Hypernetwork, batch: Batch) -> Tensor:
    """Summed loss of the frozen base under the adapters generated from the batch's contexts (paper, section 3).

    The adapters of a context's windows are composed at their full rank; what a later cut loses is not trained on. Contexts are
    padded on the left, as `collate` does it.
    """
    weights = hypernetwork.parameters_from_states(hypernetwork.memory_states(batch.context_ids_BT, batch.context_mask_BT))
    whole = compose_groups(weights, batch.windows, hypernetwork.settings.composition)
    return row_losses(hypernetwork.base, batch, whole).sum()
