"""Time and counts as people read them; `eval.economics` has money and shares."""


def duration(seconds: float) -> str:
    """41 ms, 1.2 s, 3.5 min."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds / 60:.1f} min"


def count(number: int, thing: str) -> str:
    """1 step, 2 steps, 32,000 images."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def sentence(text: str) -> str:
    """Our messages begin as fragments do; on a page they are sentences."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def printable(text: str) -> str:
    """What can be sent whatever was typed, or names a file: halves of characters become question marks."""
    return text.encode("utf-8", "replace").decode()
