"""What an hour of compute costs: one table, by launcher and profile.

A price that is not known has no entry; it is never guessed. `docs/costs.md` explains the sources and says what else is billed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from schema.estimate.ranges import Range

SECONDS_PER_HOUR = 3600

# Cloud Run jobs in a tier 1 region, in US dollars before tax.
CLOUD_RUN_USD_PER_VCPU_S = 0.000018  # Google's price list, a copy
CLOUD_RUN_USD_PER_GIB_S = 0.000002  # recalled; it fits a guide of 2026
CLOUD_RUN_L4_USD_PER_HOUR = 0.67  # without zonal redundancy; two blogs, one of April 2026
CLOUD_RUN_BILLING_STEP_S = 0.1  # Google's price list, a copy
CLOUD_RUN_MIN_BILLED_S = 60.0  # of a task of a job; recalled


@dataclass(frozen=True)
class Price:
    """What an hour of a profile costs, and how that is known."""

    usd_per_hour: float
    source: str
    as_of: str  # ISO date on which the price was written down
    note: str = ""
    billing_step_s: float = 0.0  # billed time is rounded up to a multiple of this
    min_billed_s: float = 0.0  # and is at least this long


def find_price(launcher: str, profile: str) -> Price | None:
    """The price of a launcher's profile; None if it is not known."""
    return PRICES.get((launcher, profile))


def bill_usd(price: Price, seconds: float) -> float:
    """What compute of that time costs, rounded and at least as billed; 0 for no time."""
    if seconds <= 0:
        return 0.0
    billed = ceil(seconds / price.billing_step_s) * price.billing_step_s if price.billing_step_s else seconds
    return max(billed, price.min_billed_s) * price.usd_per_hour / SECONDS_PER_HOUR


def estimate_usd(price: Price, seconds: Range) -> Range:
    """The price of a job that takes so long."""
    return Range(bill_usd(price, seconds.low), bill_usd(price, seconds.high))


def _sum_cloud_run_usd_per_hour(vcpus: int, memory_gib: int, gpu_usd_per_hour: float = 0.0) -> float:
    vcpu_usd = vcpus * SECONDS_PER_HOUR * CLOUD_RUN_USD_PER_VCPU_S
    memory_usd = memory_gib * SECONDS_PER_HOUR * CLOUD_RUN_USD_PER_GIB_S
    return vcpu_usd + memory_usd + gpu_usd_per_hour


_CLOUD_RUN_SOURCE = "Cloud Run's price list for vCPU, recalled for memory"
_CLOUD_RUN_NOTE = "calculated, not measured on a bill; tier 1 region, before tax and free quotas"

# No entry for cloud-run/rtx-pro-6000, whose GPU has no known price, and none for local, whose cost the deployment does not know.
PRICES: Mapping[tuple[str, str], Price] = {
    ("cloud-run", "l4"): Price(
        usd_per_hour=_sum_cloud_run_usd_per_hour(8, 32, CLOUD_RUN_L4_USD_PER_HOUR),
        source=f"{_CLOUD_RUN_SOURCE}; two blogs for the GPU",
        as_of="2026-11-21",
        note=f"{_CLOUD_RUN_NOTE}; GPU without zonal redundancy",
        billing_step_s=CLOUD_RUN_BILLING_STEP_S,
        min_billed_s=CLOUD_RUN_MIN_BILLED_S,
    ),
    ("cloud-run", "cpu"): Price(
        usd_per_hour=_sum_cloud_run_usd_per_hour(8, 32),
        source=_CLOUD_RUN_SOURCE,
        as_of="2026-11-21",
        note=_CLOUD_RUN_NOTE,
        billing_step_s=CLOUD_RUN_BILLING_STEP_S,
        min_billed_s=CLOUD_RUN_MIN_BILLED_S,
    ),
}
