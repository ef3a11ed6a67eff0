"""Intervals for reported numbers."""

import math
import statistics


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of a share, inside [0, 1] and of positive width even at 0 or `total` successes.

    Source: Wilson 1927; Brown, Cai, DasGupta 2001, equation 4.
    """
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = successes / total, 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / shrink
    reach = z / shrink * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(middle - reach, 0.0), min(middle + reach, 1.0)
