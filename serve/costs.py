"""What a second of the device costs. Money is counted in whole nano-dollars, so that sums are exact."""

import dataclasses

NANO = 10**9


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """per_gpu_hour_usd: what an hour of the device costs, in US dollars."""

    per_gpu_hour_usd: float

    def nanousd(self, device_s: float) -> int:
        """Of that many seconds of the device, rounded to whole nano-dollars."""
        return round(device_s * self.per_gpu_hour_usd / 3600 * NANO)


def to_usd(nanousd: int) -> float:
    return nanousd / NANO


def to_nanousd(usd: float) -> int:
    return round(usd * NANO)
