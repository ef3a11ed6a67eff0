"""Does distilling pay? `python -m eval.economics --monthly-images 50e6 --premium-usd 0.011 --turbo-usd 0.0009 ...`.

Weighs what a project costs against what it saves where a share of a premium (teacher) tier's requests goes to a turbo
(student) tier. Prints a verdict and the numbers behind it; with `--json` all of them for a program. Exit code: 0 with
any verdict, 3 for an error. Knows no models and measures nothing: prices and shares are given.
"""

import argparse
import dataclasses
import decimal
import enum
import json
import math
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from diffusion_kd import errors
from eval import command

SOON_MONTHS, HORIZON_MONTHS = 12, 36
"""A payback within the first needs no trial; one beyond the second is none."""

UTILISATIONS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
FALLBACK_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Rows of `sensitivity`: values themselves, not factors of the case's own."""

_LEAST_UTILISATION, _MOST_IMAGES = 1e-4, 1e12
_TOLERANCE = 1e-9
"""Relative: the volume that pays back within a year must not miss it for the last bits of a float."""

FIELDS: Mapping[str, str] = {
    "monthly_images": "images asked for in a month, by whichever tier they will be made",
    "premium_usd": "price of a premium (teacher) image in US dollars",
    "turbo_usd": "price of a turbo (student) image in US dollars",
    "project_usd": "what it costs once to get a student into service",
    "upkeep_usd": "what turbo costs a month beyond its images",
    "turbo_share": "share of the requests that turbo is asked first, 0 to 1",
    "fallback_share": "share of turbo's requests that premium makes again, at the cost of both, 0 to 1",
    "premium_utilisation": "share of the paid time in which premium's devices work; 1 if its price has idle time in it",
    "turbo_utilisation": "share of the paid time in which turbo's devices work; 1 if its price has idle time in it",
}
"""What each input of a case means, for whoever asks for it."""

_RANGES: Mapping[str, tuple[str, float, float]] = {
    "images": ("a number", 1, _MOST_IMAGES),
    "usd": ("US dollars", 0, 1e12),
    "share": ("a share", 0, 1),
    "utilisation": ("a share of the time", _LEAST_UTILISATION, 1),
}
"""Kind, least and most of an input, by the last word of its name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is known before money is spent; `FIELDS` says what each value means.

    Images lie in [1, 1e12], money in [0, 1e12], shares in [0, 1], utilisations in [0.0001, 1].
    Raises ConfigError for anything else, NaN and infinity included.
    """

    monthly_images: float
    premium_usd: float
    turbo_usd: float
    project_usd: float
    upkeep_usd: float
    turbo_share: float = 1.0
    fallback_share: float = 0.0
    premium_utilisation: float = 1.0
    turbo_utilisation: float = 1.0

    def __post_init__(self) -> None:
        for name in FIELDS:
            given, (kind, least, most) = getattr(self, name), _RANGES[name.rsplit("_", 1)[-1]]
            fits = type(given) in (int, float) and least <= given <= most
            errors.require(fits, name, given, f"{kind} from {least:g} to {most:g}")


_DEFAULTS = {each.name: each.default for each in dataclasses.fields(Case) if each.default is not dataclasses.MISSING}

EXAMPLES: Mapping[str, Case] = {
    "too-little-volume": Case(monthly_images=2e5, premium_usd=0.0105, turbo_usd=0.0005, project_usd=3e5, upkeep_usd=0),
    "high-volume": Case(monthly_images=50e6, premium_usd=0.011, turbo_usd=0.0009, project_usd=6e5, upkeep_usd=13e3),
    "in-between": Case(monthly_images=8e6, premium_usd=0.012, turbo_usd=0.0008, project_usd=6e5, upkeep_usd=20e3),
}


class Outcome(enum.StrEnum):
    DISTIL = "distil"
    PILOT_FIRST = "pilot first"
    DO_NOT = "do not"


def image_usd(case: Case) -> tuple[float, float]:
    """What an image of premium and one of turbo cost with the idle time of their devices."""
    return case.premium_usd / case.premium_utilisation, case.turbo_usd / case.turbo_utilisation


def saved_per_image_usd(case: Case) -> float:
    """Of a request that turbo is asked first, on average, before upkeep; below 0 where turbo costs more."""
    premium_usd, turbo_usd = image_usd(case)
    return premium_usd * (1 - case.fallback_share) - turbo_usd


def monthly_saving_usd(case: Case) -> float:
    """After upkeep; below 0 where turbo costs more than it saves."""
    return case.monthly_images * case.turbo_share * saved_per_image_usd(case) - case.upkeep_usd


def payback_months(case: Case) -> float:
    """Months of saving that pay for the project; infinite where a month saves nothing, 0 for a project without cost."""
    saving_usd = monthly_saving_usd(case)
    return case.project_usd / saving_usd if saving_usd > 0 else math.inf


def break_even_images(case: Case) -> float:
    """Images a month from which a month saves anything; infinite where no volume does, 0 where every volume does."""
    return payback_images(case, math.inf)


def payback_images(case: Case, months: float = HORIZON_MONTHS) -> float:
    """Images a month from which the project is paid back within that many months; infinite where no volume does it."""
    saved_usd = case.turbo_share * saved_per_image_usd(case)
    return (case.upkeep_usd + case.project_usd / months) / saved_usd if saved_usd > 0 else math.inf


def curve(case: Case, months: int = HORIZON_MONTHS) -> tuple[float, ...]:
    """What the project has earned in US dollars after 0, 1, ... `months` months; below 0 until it is paid back."""
    saving_usd = monthly_saving_usd(case)
    return tuple(month * saving_usd - case.project_usd for month in range(months + 1))


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """because: plain sentences on the payback, now and in the worse case, and the volumes that it would take."""

    outcome: Outcome
    because: str


def worse(case: Case) -> Case:
    """The case that a project must bear to need no trial: idle devices and more pictures that premium makes again."""
    return dataclasses.replace(
        case,
        turbo_utilisation=max(case.turbo_utilisation / 2, _LEAST_UTILISATION),
        fallback_share=min(case.fallback_share + 0.2, 1.0),
    )


_WORSE = "turbo's devices are half as busy and premium makes another 20 % of its requests again"


def outcome(case: Case) -> Outcome:
    """DISTIL where the payback takes 12 months at most, in the worse case too; DO_NOT where it takes more than 36."""
    if payback_months(case) > HORIZON_MONTHS * (1 + _TOLERANCE):
        return Outcome.DO_NOT
    sure = payback_months(worse(case)) <= SOON_MONTHS * (1 + _TOLERANCE)
    return Outcome.DISTIL if sure else Outcome.PILOT_FIRST


def verdict(case: Case) -> Verdict:
    """`outcome`, with its reason in words."""
    return Verdict(outcome(case), _because(case))


def _because(case: Case) -> str:
    if math.isinf(payback_images(case)):
        return f"The project is paid back at no volume, as {_why_at_no_volume(case)}."
    soon, horizon, volume = duration(SOON_MONTHS), duration(HORIZON_MONTHS), _volume(payback_images(case))
    if math.isinf(payback_months(case)):
        return f"At this volume the project is never paid back; {volume} it would be within {horizon}."
    paid, worst_paid = _paid(case), _paid(worse(case))
    bad = f"even if {_WORSE}" if paid == worst_paid else f"or {worst_paid} if {_WORSE}"
    enough = f"{volume} it is paid back within {horizon}".capitalize()
    sure = f"{_volume(payback_images(worse(case), SOON_MONTHS))} within {soon} in the worse case too"
    return f"The project is paid back {paid}, {bad}. {enough}, and {sure}."


def _why_at_no_volume(case: Case) -> str:
    premium_usd, turbo_usd = image_usd(case)
    if turbo_usd >= premium_usd:
        return f"a turbo image ({money(turbo_usd)}) costs no less than a premium one ({money(premium_usd)})"
    if saved_per_image_usd(case) <= 0:
        return f"premium makes {percent(case.fallback_share)} of turbo's requests again, at the cost of both"
    return "no request goes to turbo"


def _paid(case: Case) -> str:
    months = payback_months(case)
    return duration(months) if months == 0 or math.isinf(months) else f"in {duration(months)}"


def _volume(count: float) -> str:
    if count == 0 or count > _MOST_IMAGES:
        return "at no volume" if count else "at any volume"
    return f"from {images(count)} images a month"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The case with one input changed to `value`. own: it is the case's own value."""

    value: float
    own: bool
    monthly_saving_usd: float
    payback_months: float
    outcome: Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Sensitivity:
    """Rows from best to worst. turbo_utilisation: from 1 downwards. fallback_share: from 0 upwards."""

    turbo_utilisation: tuple[Row, ...]
    fallback_share: tuple[Row, ...]


def sensitivity(case: Case) -> Sensitivity:
    """What becomes of the case at other utilisations and fallback shares, its own among them.

    The values are absolute. Of a price with idle time in it, 1 is as busy as the devices were when it was set.
    """
    return Sensitivity(
        turbo_utilisation=_rows(case, "turbo_utilisation", UTILISATIONS)[::-1],
        fallback_share=_rows(case, "fallback_share", FALLBACK_SHARES),
    )


def _rows(case: Case, name: str, values: Iterable[float]) -> tuple[Row, ...]:
    own = getattr(case, name)
    cases = (dataclasses.replace(case, **{name: value}) for value in sorted({*values, own}))
    return tuple(
        Row((value := getattr(each, name)), value == own, monthly_saving_usd(each), payback_months(each), outcome(each))
        for each in cases
    )


def _digits(value: float) -> str:
    """Three digits that count, without an exponent: 492,000, 12.5, 0.0018."""
    three = decimal.Context(prec=3, rounding=decimal.ROUND_HALF_UP)
    return f"{three.create_decimal(f'{value:.12g}').normalize():,f}"


def money(usd: float) -> str:
    """Three digits that count: $492,000, $12.50, $0.0018, -$86.70. Below a nano-dollar: $0."""
    if abs(usd) < 1e-9:
        return "$0"
    whole, point, cents = _digits(abs(usd)).partition(".")
    return f"{'-' if usd < 0 else ''}${whole}{point}{cents.ljust(2, '0') if point else ''}"


def duration(months: float) -> str:
    """Of a payback: at once, 1.2 months, 12.5 years, over 100 years, never."""
    if months == 0 or math.isinf(months):
        return "never" if months else "at once"
    if not 0.05 <= months <= 1200:
        return "a day" if months < 1 else "over 100 years"
    over = any(
        limit * (1 + _TOLERANCE) < months and _span(limit) == _span(months) for limit in (SOON_MONTHS, HORIZON_MONTHS)
    )
    return f"{'just over ' if over else ''}{_span(months)}"


def _span(months: float) -> str:
    number, unit = (months, "month") if months < 23.95 else (months / 12, "year")
    text = f"{number:.1f}".removesuffix(".0")
    return f"{text} {unit}" + ("" if text == "1" else "s")


def images(count: float) -> str:
    """A number of images that is enough, rounded up to three digits: 1.2 million, 834,000. count: finite."""
    least = math.ceil(count * (1 - _TOLERANCE))
    step = 10 ** max(len(str(least)) - 3, 0)
    enough = -(-least // step) * step
    for size, word in ((10**9, " billion"), (10**6, " million")):
        if enough >= size:
            return _digits(enough / size) + word
    return _digits(enough)


def percent(share: float) -> str:
    """A share to a tenth of a percent: 92 %, 8.3 %; to a hundredth below one percent."""
    return f"{round(100 * share, 1 if share >= 0.01 else 2):g} %"


def text(case: Case) -> str:
    """All of it as text of at most 100 columns: verdict, numbers, and what they do under other assumptions."""
    found, tables = verdict(case), sensitivity(case)
    parts = (
        f"{found.outcome.upper()}\n{textwrap.fill(found.because, 88)}",
        *("\n".join(f"{name:22}{value}" for name, value in pairs) for pairs in (facts(case), results(case))),
        _table("turbo's devices work", tables.turbo_utilisation),
        _table("premium makes again", tables.fallback_share),
    )
    return "\n\n".join(parts)


def facts(case: Case) -> Iterator[tuple[str, str]]:
    """What is given, as pairs of a name and its value in words."""
    premium_usd, turbo_usd = image_usd(case)
    asked = "" if case.turbo_share == 1 else f", {percent(case.turbo_share)} of them from turbo first"
    gap = f", {percent(1 - turbo_usd / premium_usd)} less" if turbo_usd < premium_usd else ""
    yield "images a month", f"{case.monthly_images:,.0f}{asked}"
    yield "a premium image", money(premium_usd)
    yield "a turbo image", f"{money(turbo_usd)}{gap}"
    yield "the project, once", f"${case.project_usd:,.0f}"
    yield "upkeep a month", f"${case.upkeep_usd:,.0f}"


def results(case: Case) -> Iterator[tuple[str, str]]:
    """What follows from it, likewise."""
    yield "saved a request", f"{money(saved_per_image_usd(case))} before upkeep"
    yield "saved a month", f"{money(monthly_saving_usd(case))} after upkeep"
    yield "paid back", _paid(case)
    yield "break-even", _volume(break_even_images(case))
    yield f"pays back in {duration(HORIZON_MONTHS)}", _volume(payback_images(case))
    net_usd = curve(case)
    for month in range(12, HORIZON_MONTHS + 1, 12):
        yield f"net after year {month // 12}", money(net_usd[month])


def _table(name: str, rows: Sequence[Row]) -> str:
    lines = (
        f"{percent(row.value):>20}  {money(row.monthly_saving_usd):>16}{duration(row.payback_months):>17}"
        f"   {row.outcome}{'  (this case)' if row.own else ''}"
        for row in rows
    )
    return "\n".join((f"{name:22}{'saved a month':>16}{'paid back in':>17}   verdict", *lines))


def to_dict(case: Case) -> dict[str, Any]:
    """All of it, ready for JSON: what is infinite is None. Money in US dollars, `net_usd` at months 0 to 36."""
    numbers = (saved_per_image_usd, monthly_saving_usd, payback_months, break_even_images, payback_images)
    made = {
        "case": dataclasses.asdict(case),
        "verdict": dataclasses.asdict(verdict(case)),
        **{number.__name__: number(case) for number in numbers},
        "horizon_months": HORIZON_MONTHS,
        "net_usd": curve(case),
        "sensitivity": dataclasses.asdict(sensitivity(case)),
    }
    finite: dict[str, Any] = json.loads(json.dumps(made), parse_constant=lambda _: None)
    return finite


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="python -m eval.economics", description="Does distilling pay?")
    for name, about in FIELDS.items():
        default = f"{_DEFAULTS[name]:g} if not given" if name in _DEFAULTS else "needed"
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="N", help=f"{about} ({default})")
    parser.add_argument("--example", choices=EXAMPLES, help="a worked case; what else is given replaces its values")
    parser.add_argument("--json", action="store_true", help="all numbers, as JSON")
    return parser


def _case(given: argparse.Namespace) -> Case:
    """Raises ConfigError where a value is missing or out of range."""
    known = dataclasses.asdict(EXAMPLES[given.example]) if given.example else {}
    known |= {name: getattr(given, name) for name in FIELDS if getattr(given, name) is not None}
    if missing := ", ".join(f"--{name.replace('_', '-')}" for name in FIELDS if name not in known | _DEFAULTS):
        raise errors.ConfigError(f"no value for {missing}; give one, 0 if it costs nothing, or start from --example")
    return Case(**known)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        case = _case(given)
    except errors.DiffusionKDError as error:
        sys.stderr.write(f"error: {error}\n")
        return command.EXIT_ERROR
    shown = json.dumps(to_dict(case), indent=2, allow_nan=False) if given.json else text(case)
    sys.stdout.write(f"{shown}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
