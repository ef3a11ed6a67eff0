"""Numbers as people read them."""

import math


def duration(seconds: float) -> str:
    """41 ms, 1.2 s, 3.5 min."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 99.5 else f"{seconds / 60:.1f} min"


def usd(amount: float) -> str:
    """Two digits that count: $0.0021, $13, $492,000."""
    if amount == 0:
        return "$0"
    digits = max(0, 1 - math.floor(math.log10(abs(amount))))
    return f"{'-' if amount < 0 else ''}${abs(amount):,.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def count(number: int, thing: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
