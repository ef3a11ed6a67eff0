"""Time and counts as people read them; `eval.economics` has money and shares."""


def duration(seconds: float) -> str:
    """41 ms, 1.2 s, 3.5 min."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds / 60:.1f} min"


def count(number: int, thing: str) -> str:
    """1 step, 2 steps, 32,000 images."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
