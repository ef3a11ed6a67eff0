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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffusion_kd import errors
from eval import run

SOON_MONTHS, HORIZON_MONTHS = 12, 36
"""A payback within the first needs no trial; one beyond the second is none."""

WORSE_BUSY, WORSE_FALLBACK = 0.5, 0.2
"""The worse case: turbo's utilisation times the first, and the second added to its fallback share."""

UTILISATIONS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
FALLBACK_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Rows of `sensitivity`: values themselves, not factors of the case's own."""

_LEAST_UTILISATION, _MOST_IMAGES = 1e-4, 1e12
_TOLERANCE = 1e-9
"""Relative: the volume that pays back within a year must not miss it for the last bits of a float."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is known before money is spent. All money in US dollars.

    monthly_images: images asked for in a month, from 1 to 1e12, by whichever tier they will be made.
    premium_usd, turbo_usd: price of an image, at least 0. project_usd: once, for data, training, evaluation, people.
    upkeep_usd: a month, for what turbo needs beyond its images: monitoring, further distillation, on-call.
    turbo_share: share of the requests that turbo is asked first, in [0, 1].
    fallback_share: share of turbo's requests that premium makes again, which cost both, in [0, 1].
    premium_utilisation, turbo_utilisation: share of the paid time in which a tier's devices work, in [0.0001, 1]. A
    price for a busy device is divided by it; 1 for a price that has idle time in it.
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
        fits = _between(self.monthly_images, 1, _MOST_IMAGES)
        errors.require(fits, "monthly_images", self.monthly_images, f"a number from 1 to {_MOST_IMAGES:g}")
        for name, most in (("premium_usd", 1e6), ("turbo_usd", 1e6), ("project_usd", 1e12), ("upkeep_usd", 1e12)):
            given = getattr(self, name)
            errors.require(_between(given, 0, most), name, given, f"US dollars from 0 to {most:g}")
        for name in ("turbo_share", "fallback_share"):
            given = getattr(self, name)
            errors.require(_between(given, 0, 1), name, given, "a share from 0 to 1")
        for name in ("premium_utilisation", "turbo_utilisation"):
            given = getattr(self, name)
            fits = _between(given, _LEAST_UTILISATION, 1)
            errors.require(fits, name, given, f"a share of the time from {_LEAST_UTILISATION} to 1")


def _between(given: object, least: float, most: float) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and least <= given <= most


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

EXAMPLES: Mapping[str, Case] = {
    "too-little-volume": Case(
        monthly_images=200_000, premium_usd=0.0105, turbo_usd=0.0005, project_usd=300_000, upkeep_usd=0
    ),
    "high-volume": Case(
        monthly_images=50_000_000, premium_usd=0.011, turbo_usd=0.0009, project_usd=600_000, upkeep_usd=13_000
    ),
    "in-between": Case(
        monthly_images=8_000_000, premium_usd=0.012, turbo_usd=0.0008, project_usd=600_000, upkeep_usd=20_000
    ),
}


class Outcome(enum.StrEnum):
    DISTIL = "distil"
    PILOT_FIRST = "pilot first"
    DO_NOT = "do not"


class Factor(enum.StrEnum):
    """What a verdict hangs on most."""

    VOLUME = "volume"
    UPKEEP = "upkeep"
    PRICE_GAP = "price gap"
    FALLBACK = "fallback"
    UTILISATION = "utilisation"


# --- money and time ---------------------------------------------------------------------------------


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
    return _images_to_save(case, case.upkeep_usd)


def payback_images(case: Case, months: float = HORIZON_MONTHS) -> float:
    """Images a month from which the project is paid back within that many months; infinite where no volume does it."""
    return _images_to_save(case, case.upkeep_usd + case.project_usd / months)


def _images_to_save(case: Case, usd: float) -> float:
    saved_usd = case.turbo_share * saved_per_image_usd(case)
    return usd / saved_usd if saved_usd > 0 else math.inf


def curve(case: Case, months: int = HORIZON_MONTHS) -> tuple[float, ...]:
    """What the project has earned in US dollars after 0, 1, ... `months` months; below 0 until it is paid back."""
    saving_usd = monthly_saving_usd(case)
    return tuple(month * saving_usd - case.project_usd for month in range(months + 1))


# --- verdict ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """because: plain sentences on the payback, what decides, and what would change the outcome."""

    outcome: Outcome
    decided_by: Factor
    because: str


def worse(case: Case) -> Case:
    """The case that a project must bear to need no trial: idle devices and more pictures that premium makes again."""
    return _idler(_refused_more(case))


def _idler(case: Case) -> Case:
    return dataclasses.replace(case, turbo_utilisation=max(case.turbo_utilisation * WORSE_BUSY, _LEAST_UTILISATION))


def _refused_more(case: Case) -> Case:
    return dataclasses.replace(case, fallback_share=min(case.fallback_share + WORSE_FALLBACK, 1.0))


def _within(case: Case, months: float) -> bool:
    return payback_months(case) <= months * (1 + _TOLERANCE)


def outcome(case: Case) -> Outcome:
    """DISTIL where the payback takes 12 months at most, in the worse case too; DO_NOT where it takes more than 36."""
    if not _within(case, HORIZON_MONTHS):
        return Outcome.DO_NOT
    return Outcome.DISTIL if _within(worse(case), SOON_MONTHS) else Outcome.PILOT_FIRST


def verdict(case: Case) -> Verdict:
    """`outcome`, with its reason in words."""
    found = outcome(case)
    if found is Outcome.DISTIL:
        factor, because = _why_distil(case)
    elif found is Outcome.DO_NOT:
        factor, because = _why_not(case)
    elif _within(case, SOON_MONTHS):
        factor, because = _why_pilot_fragile(case)
    else:
        factor, because = _why_pilot_slow(case)
    return Verdict(found, factor, because)


def _why_distil(case: Case) -> tuple[Factor, str]:
    worst = worse(case)
    lead = f"The project is paid back {_paid(case)}, and {_paid(worst)} if {_IN_THE_WORSE_CASE}."
    least_images = payback_images(worst, SOON_MONTHS)
    if least_images == 0:
        return Factor.PRICE_GAP, f"{lead} {_decides(Factor.PRICE_GAP)} This holds at any volume."
    return (
        Factor.VOLUME,
        f"{lead} {_decides(Factor.VOLUME)} Below {images(least_images)} images a month a pilot should come first.",
    )


def _why_pilot_fragile(case: Case) -> tuple[Factor, str]:
    worst = worse(case)
    by_fallback = monthly_saving_usd(_refused_more(case)) <= monthly_saving_usd(_idler(case))
    factor = Factor.FALLBACK if by_fallback else Factor.UTILISATION
    lead = f"The project is paid back {_paid(case)}, but {_paid(worst)} if {_IN_THE_WORSE_CASE}."
    least_images = payback_images(worst, SOON_MONTHS)
    rest = (
        "No volume makes up for that."
        if least_images > _MOST_IMAGES
        else f"From {images(least_images)} images a month it would take {duration(SOON_MONTHS)} at most even then."
    )
    return factor, f"{lead} {_decides(factor)[:-1]}, which a pilot measures. {rest}"


def _why_pilot_slow(case: Case) -> tuple[Factor, str]:
    factor = _deciding(case, SOON_MONTHS)
    lead = f"The project is paid back {_paid(case)}, and only {duration(SOON_MONTHS)} or less would need no trial."
    least_images = payback_images(worse(case), SOON_MONTHS)
    sure = (
        f" From {images(least_images)} images a month no trial would be needed." if least_images <= _MOST_IMAGES else ""
    )
    return factor, f"{lead} {_decides(factor)} {_ways(case, SOON_MONTHS)}{sure}"


def _why_not(case: Case) -> tuple[Factor, str]:
    factor = _deciding(case, HORIZON_MONTHS)
    return factor, f"{_lack(case)} {_decides(factor)} {_ways(case, HORIZON_MONTHS)}".rstrip()


def _lack(case: Case) -> str:
    """Why the project is not paid back in time."""
    premium_usd, turbo_usd = image_usd(case)
    saving_usd = monthly_saving_usd(case)
    if case.turbo_share == 0:
        return "No request goes to turbo, and so nothing is saved."
    if turbo_usd >= premium_usd:
        costs = f"A turbo image costs {money(turbo_usd)} and a premium image {money(premium_usd)}"
        return f"{costs}, so nothing is saved at any volume."
    if saved_per_image_usd(case) <= 0:
        again = percent(case.fallback_share)
        return f"Turbo saves nothing at any volume, for premium makes {again} of its requests again."
    if saving_usd <= 0:
        upkeep = money(case.upkeep_usd, digits=_EXACT)
        saved = money(saving_usd + case.upkeep_usd)
        return f"The upkeep of {upkeep} a month is no less than the {saved} a month that turbo saves."
    project, limit = money(case.project_usd, digits=_EXACT), duration(HORIZON_MONTHS)
    return (
        f"At {money(saving_usd)} saved a month the project's {project} come back {_paid(case)}; the limit is {limit}."
    )


def _deciding(case: Case, months: int) -> Factor:
    """The one thing that keeps a project from being paid back in that many months, or else the volume."""
    premium_usd, turbo_usd = image_usd(case)
    if case.turbo_share == 0:
        return Factor.VOLUME
    if turbo_usd >= premium_usd:
        return Factor.UTILISATION if case.turbo_usd < premium_usd else Factor.PRICE_GAP
    better = {
        Factor.FALLBACK: dataclasses.replace(case, fallback_share=0.0),
        Factor.UTILISATION: dataclasses.replace(case, turbo_utilisation=1.0),
        Factor.UPKEEP: dataclasses.replace(case, upkeep_usd=0.0),
    }
    if turbo_usd > premium_usd / 2:
        better[Factor.PRICE_GAP] = dataclasses.replace(case, turbo_usd=0.0)
    enough = [factor for factor, changed in better.items() if _within(changed, months)]
    if enough:
        return enough[0]
    return Factor.VOLUME if saved_per_image_usd(case) > 0 else Factor.FALLBACK


def _ways(case: Case, months: int) -> str:
    """The single changes each of which would pay the project back in that many months, as a sentence or nothing."""
    if case.turbo_share == 0:
        return ""
    found = list(_changes(case, months))
    if not found:
        return f"No single change pays it back within {duration(months)}."
    return f"It would be paid back within {duration(months)} {', or '.join(found)}."


def _changes(case: Case, months: int) -> Iterator[str]:
    premium_usd, turbo_usd = image_usd(case)
    needed_usd = (case.upkeep_usd + case.project_usd / months) / (case.monthly_images * case.turbo_share)
    least_images = payback_images(case, months)
    if least_images <= _MOST_IMAGES:
        yield f"from {images(least_images)} images a month"
    if case.fallback_share > 0 and premium_usd > turbo_usd + needed_usd:
        most_share = 1 - (turbo_usd + needed_usd) / premium_usd
        yield f"if at most {percent(most_share, decimal.ROUND_FLOOR)} of turbo's requests fell back"
    room_usd = premium_usd * (1 - case.fallback_share) - needed_usd  # what a turbo image may cost
    if case.turbo_utilisation < 1 and room_usd >= case.turbo_usd > 0:
        least_share = percent(case.turbo_usd / room_usd, decimal.ROUND_CEILING)
        yield f"if turbo's devices worked at least {least_share} of the time"
    most_upkeep_usd = monthly_saving_usd(case) + case.upkeep_usd - case.project_usd / months
    if case.upkeep_usd > 0 and most_upkeep_usd >= 0:
        yield f"with an upkeep of at most {money(most_upkeep_usd, decimal.ROUND_FLOOR)} a month"
    if room_usd > 0 and (least_images > _MOST_IMAGES or turbo_usd > premium_usd / 2):
        most_usd = money(room_usd * case.turbo_utilisation, decimal.ROUND_FLOOR)
        yield f"with a turbo image at {most_usd} or less"


_IN_THE_WORSE_CASE = "turbo's devices are half as busy and premium makes a fifth more of its requests again"


def _decides(factor: Factor) -> str:
    return f"What decides is the {factor}."


def _paid(case: Case) -> str:
    months = payback_months(case)
    return duration(months) if months == 0 or math.isinf(months) else f"in {duration(months)}"


# --- sensitivity ------------------------------------------------------------------------------------


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
        turbo_utilisation=_rows(
            case,
            sorted({*UTILISATIONS, case.turbo_utilisation}, reverse=True),
            case.turbo_utilisation,
            lambda value: dataclasses.replace(case, turbo_utilisation=value),
        ),
        fallback_share=_rows(
            case,
            sorted({*FALLBACK_SHARES, case.fallback_share}),
            case.fallback_share,
            lambda value: dataclasses.replace(case, fallback_share=value),
        ),
    )


def _rows(case: Case, values: Sequence[float], own: float, changed: Callable[[float], Case]) -> tuple[Row, ...]:
    cases = {value: changed(value) for value in values}
    return tuple(
        Row(value, value == own, monthly_saving_usd(each), payback_months(each), outcome(each))
        for value, each in cases.items()
    )


# --- for people -------------------------------------------------------------------------------------

_DIGITS, _EXACT = 3, 12


def _shown(value: float, digits: int, rounding: str) -> decimal.Decimal:
    """Rounded to that many digits that count; the last bits of a float do not make it round up."""
    return decimal.Context(prec=digits, rounding=rounding).create_decimal(f"{value:.12g}")


def _plain(value: decimal.Decimal) -> str:
    return f"{value.normalize() + 0:,f}"


def money(usd: float, rounding: str = decimal.ROUND_HALF_UP, digits: int = _DIGITS) -> str:
    """Three digits that count, if not told otherwise: $492,000, $12.50, $0.0018, -$86.70. Below a nano-dollar: $0."""
    if abs(usd) < 1e-9:
        return "$0"
    value = _shown(abs(usd), digits, rounding).normalize()
    places = -int(value.as_tuple().exponent)
    text = f"{value:,.{max(places, 2)}f}" if places > 0 else _plain(value)
    return f"-${text}" if usd < 0 else f"${text}"


def duration(months: float) -> str:
    """Of a payback: at once, 1.2 months, 12.5 years, over 100 years, never."""
    if months == 0 or math.isinf(months):
        return "never" if months else "at once"
    if months > 1200:
        return "over 100 years"
    for limit_months in (SOON_MONTHS, HORIZON_MONTHS):
        if limit_months * (1 + _TOLERANCE) < months and _span(months) == _span(limit_months):
            return f"just over {_span(months)}"
    return _span(months)


def _span(months: float) -> str:
    if months < 0.05:
        return "a day"
    number, unit = (months, "month") if months < 23.95 else (months / 12, "year")
    text = f"{number:.1f}".removesuffix(".0")
    return f"{text} {unit}" + ("" if text == "1" else "s")


def images(count: float) -> str:
    """A number of images that is enough, rounded up to three digits: 1.2 million, 834,000. count: finite."""
    value = _shown(math.ceil(count - _TOLERANCE * count), _DIGITS, decimal.ROUND_CEILING)
    for size, word in ((10**9, " billion"), (10**6, " million")):
        if value >= size:
            return _plain(value / size) + word
    return _plain(value)


def percent(share: float, rounding: str = decimal.ROUND_HALF_UP) -> str:
    """A share to a tenth of a percent: 92 %, 8.3 %; to a hundredth below one percent."""
    value = decimal.Decimal(f"{100 * share:.12g}")
    step = decimal.Decimal("0.1" if value >= 1 else "0.01")
    return _plain(value.quantize(step, rounding)) + " %"


def text(case: Case) -> str:
    """All of it as text of at most 100 columns: verdict, numbers, and what they do under other assumptions."""
    found = verdict(case)
    tables = sensitivity(case)
    return "\n\n".join(
        (
            f"{found.outcome.upper()}\n{textwrap.fill(found.because, 88)}",
            _aligned(facts(case)),
            _aligned(results(case)),
            _table("turbo's devices work", tables.turbo_utilisation),
            _table("premium makes again", tables.fallback_share),
        )
    )


def facts(case: Case) -> Iterator[tuple[str, str]]:
    """What is given, as pairs of a name and its value in words."""
    premium_usd, turbo_usd = image_usd(case)
    asked = "" if case.turbo_share == 1 else f", {percent(case.turbo_share)} of them from turbo first"
    gap = f", {percent(1 - turbo_usd / premium_usd)} less" if turbo_usd < premium_usd else ""
    yield "images a month", f"{_plain(_shown(case.monthly_images, _EXACT, decimal.ROUND_HALF_UP))}{asked}"
    yield "a premium image", money(premium_usd)
    yield "a turbo image", f"{money(turbo_usd)}{gap}"
    yield "the project, once", money(case.project_usd, digits=_EXACT)
    yield "upkeep a month", money(case.upkeep_usd, digits=_EXACT)


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


def _volume(count: float) -> str:
    if count == 0 or count > _MOST_IMAGES:
        return "at no volume" if count else "at any volume"
    return f"from {images(count)} images a month"


def _aligned(lines: Iterator[tuple[str, str]]) -> str:
    return "\n".join(f"{name:22}{value}" for name, value in lines)


def _table(name: str, rows: Sequence[Row]) -> str:
    head = f"{name:22}{'saved a month':>16}{'paid back in':>17}   verdict"
    lines = (
        f"{percent(row.value):>20}  {money(row.monthly_saving_usd):>16}{duration(row.payback_months):>17}"
        f"   {row.outcome}{'  (this case)' if row.own else ''}"
        for row in rows
    )
    return "\n".join((head, *lines))


# --- for programs -----------------------------------------------------------------------------------


def to_dict(case: Case) -> dict[str, Any]:
    """All of it, ready for JSON: what is infinite is None. Money in US dollars, `net_usd` at months 0 to 36."""
    made: dict[str, Any] = {
        "case": dataclasses.asdict(case),
        "verdict": dataclasses.asdict(verdict(case)),
        "saved_per_image_usd": saved_per_image_usd(case),
        "monthly_saving_usd": monthly_saving_usd(case),
        "payback_months": payback_months(case),
        "break_even_images": break_even_images(case),
        "payback_images": payback_images(case),
        "horizon_months": HORIZON_MONTHS,
        "net_usd": curve(case),
        "sensitivity": dataclasses.asdict(sensitivity(case)),
    }
    return _finite(made)  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = run.Parser(
        prog="python -m eval.economics", description="Does distilling pay? Numbers like 50e6 or 50_000_000."
    )
    for field in dataclasses.fields(Case):
        default = "needed" if field.default is dataclasses.MISSING else f"{field.default:g} if not given"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=float,
            metavar=field.name.rsplit("_", 1)[-1].upper(),
            help=f"{FIELDS[field.name]} ({default})",
        )
    parser.add_argument("--example", choices=EXAMPLES, help="a worked case; what else is given replaces its values")
    parser.add_argument("--json", action="store_true", help="all numbers, as JSON")
    return parser


def _case(given: argparse.Namespace) -> Case:
    """Raises ConfigError where a value is missing or out of range."""
    known = dataclasses.asdict(EXAMPLES[given.example]) if given.example else {}
    known |= {name: getattr(given, name) for name in FIELDS if getattr(given, name) is not None}
    needed = [field.name for field in dataclasses.fields(Case) if field.default is dataclasses.MISSING]
    if missing := ", ".join(f"--{name.replace('_', '-')}" for name in needed if name not in known):
        raise errors.ConfigError(f"no value for {missing}; give one, 0 if it costs nothing, or start from --example")
    return Case(**known)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        case = _case(given)
    except errors.DiffusionKDError as error:
        sys.stderr.write(f"error: {error}\n")
        return run.EXIT_ERROR
    shown = json.dumps(to_dict(case), indent=2, allow_nan=False) if given.json else text(case)
    sys.stdout.write(f"{shown}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
