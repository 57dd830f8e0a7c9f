"""What things cost, and how fast a GPU is: what every plan shares."""

from typing import Annotated

from pydantic import Field, PositiveInt

from core.config import Section

Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Prices(Section):
    """What things cost, in one currency; the defaults are rounded list prices, an example.

    gpu_hour: an H100 or H200. generator_*: tokens of the endpoint that writes questions; zero, as for one's own.
    prompt_per_million: prompt tokens of the endpoint that would answer in context; with a prompt cache, give its price.
    storage_per_gb_month, put_per_thousand, get_per_thousand: object storage; a GB is 10^9 bytes.
    """

    currency: str = "USD"
    gpu_hour: Amount = 3.0
    generator_prompt_per_million: Amount = 0.0
    generator_completion_per_million: Amount = 0.0
    prompt_per_million: Amount = 0.1
    storage_per_gb_month: Amount = 0.023
    put_per_thousand: Amount = 0.005
    get_per_thousand: Amount = 0.0004


class Gpus(Section):
    """How many, and how fast. Defaults: an H100 or H200 (989 TFLOP/s dense bf16).

    utilisation: share of the peak that is reached.
    """

    gpus: PositiveInt = 1
    peak_tflops: Positive = 989.0
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.3

    @property
    def flops_per_s(self) -> float:
        """Of one GPU, as used."""
        return self.peak_tflops * 1e12 * self.utilisation
