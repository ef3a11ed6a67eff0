"""What a teacher's or a data set's licence says of models made from it; docs/export.md has the rules, no legal advice.

A licence is known by its name, in any spelling, or by its text. One that forbids derivative works, or training models
on what the model makes, stops an export until somebody accepts it by name; that is recorded in the student's lineage.
"""

import dataclasses
import datetime
import enum
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence

import huggingface_hub
import yaml

from diffusion_kd import errors

_log = logging.getLogger(__name__)

DATA, UNKNOWN_NAME = "data", "unknown"
_MOST_CHARACTERS = 300_000
_NAME_CHARACTERS = 80
_SAYS_NOTHING = {"", "other", "unknown", "none", "null", "n-a", "na", "tbd", "proprietary-other"}


class Kind(enum.StrEnum):
    """What a licence is for one who makes a model from what it covers."""

    ALLOWS = "allows derivatives"
    NON_COMMERCIAL = "non-commercial"
    FORBIDS = "forbids derivatives"
    UNKNOWN = "unknown"


STRICTNESS = (Kind.UNKNOWN, Kind.ALLOWS, Kind.NON_COMMERCIAL, Kind.FORBIDS)


@dataclasses.dataclass(frozen=True, slots=True)
class Licence:
    """A licence that was found.

    covers: whose it is, such as `teacher NAME`, or `data`. name: SPDX's spelling where there is one. found_in: the
    file, or who said so. items: of a data set, how many are under it; 0 for a model.
    """

    covers: str
    name: str
    kind: Kind
    found_in: str
    items: int = 0

    def record(self) -> dict[str, str | int]:
        """For the lineage."""
        plain = dataclasses.asdict(self) | {"kind": str(self.kind)}
        return plain if self.items else {key: value for key, value in plain.items() if key != "items"}


@dataclasses.dataclass(frozen=True, slots=True)
class Acceptance:
    """Licences that somebody states to have accepted. by: who. on: the day they said so."""

    names: tuple[str, ...] = ()
    by: str = ""
    on: datetime.date = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date())


# --- names ------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Lower case words joined by hyphens; the plus signs of openrail++ stay."""
    return re.sub(r"[^a-z0-9+]+", "-", text.lower()).strip("-")


_VERSION = r"(?:-?v?(?:ersion)?-?(?P<version>\d+(?:-\d+)*))?"
# What else a name may say without saying anything else.
_TAIL = r"(?:-(?:licen[cs]e|only|or-later|new|simplified|revised|international|generic|public|software|the|clause))*"
_ALLOW = (
    ("Apache-{}", rf"(?:the-)?apache(?:-software)?(?:-licen[cs]e)?{_VERSION}"),
    ("MIT", r"(?:the-)?(?:mit|expat)(?:-0)?"),
    ("BSD-{}-Clause", r"(?:the-)?(?:new-|modified-|simplified-)?bsd(?:-licen[cs]e)?(?:-(?P<version>[0-4]))?"),
    ("ISC", r"isc"),
    ("Unlicense", r"(?:the-)?unlicen[cs]e"),
    ("CC0-1.0", r"(?:cc-?0|cc-?zero|creative-commons-(?:cc-?0|zero))(?:-v?1-0)?(?:-universal)?"),
    ("public-domain", r"(?:cc-)?(?:pd|pdm|public-domain)(?:-mark)?(?:-1-0)?(?:-dedication)?"),
    ("PDDL-{}", rf"pddl{_VERSION}"),
    ("ODC-By-{}", rf"odc-?by{_VERSION}"),
    ("ODbL-{}", rf"odbl{_VERSION}"),
    ("CDLA-Permissive-{}", rf"cdla-permissive{_VERSION}"),
    ("CDLA-Sharing-{}", rf"cdla-sharing{_VERSION}"),
    ("MPL-{}", rf"(?:mpl|mozilla-public(?:-licen[cs]e)?){_VERSION}"),
    ("GPL-{}", rf"(?:gnu-)?(?:gpl|general-public(?:-licen[cs]e)?)(?:-v)?{_VERSION}"),
    ("LGPL-{}", rf"(?:gnu-)?(?:lgpl|lesser-general-public(?:-licen[cs]e)?)(?:-v)?{_VERSION}"),
    ("AGPL-{}", rf"(?:gnu-)?(?:agpl|affero-general-public(?:-licen[cs]e)?)(?:-v)?{_VERSION}"),
    ("openrail++", r"(?:creativeml-)?open-?rail-?\+\+(?:-?m)?"),
    ("creativeml-openrail-m", r"creativeml-open-?rail(?:-?m)?"),
    ("bigscience-openrail-m", r"bigscience-open-?rail(?:-?m)?"),
    ("openrail", r"open-?rail(?:-?m)?"),
)
# Licences of models whose name tells what their text says of models trained on the outputs.
_FORBID = ("sai-nc", "stabilityai-nc", "stabilityai-non-commercial", "flux-1-dev", "flux-dev")
_COMMONS = re.compile(r"(?:^|-)(?:cc|creativecommons|creative-commons)(?:-|$)|^attribution(?:-|$)")
_NO_DERIVATIVES = re.compile(r"(?:^|-)nd(?:-|$)|no-?deriv")
_NO_COMMERCE = re.compile(r"(?:^|-)nc(?:-|$)|non-?commercial|research-only|academic|commons-clause|personal-use")
_VERSION_OF_COMMONS = re.compile(r"(?:^|-)(\d)-(\d)(?:-|$)")


def canonical(name: str) -> str:
    """SPDX's spelling of a licence's name where this module knows it, else the name as given, in one line.

    `cc by nd 4.0`, its address at creativecommons.org and `Attribution-NoDerivatives 4.0` are all `CC-BY-ND-4.0`.
    """
    plain = _plain(name)
    if plain in _SAYS_NOTHING:
        return UNKNOWN_NAME
    if commons := _canonical_commons(plain):
        return commons
    for spelling, pattern in _ALLOW:
        if found := re.fullmatch(pattern + _TAIL, plain):
            version = found.groupdict().get("version")
            return spelling.format(_dotted(spelling, version)).removesuffix("-")
    return " ".join(name.split())[:_NAME_CHARACTERS]


def _dotted(spelling: str, version: str | None) -> str:
    if version is None:
        return ""
    dotted = version.replace("-", ".")
    return dotted if "." in dotted or spelling.startswith("BSD") else f"{dotted}.0"


def _canonical_commons(plain: str) -> str | None:
    """CC-BY, with its further letters and version; None for another licence."""
    by = re.search(r"(?:^|-)by(?:-|$)|(?:^|-)attribution(?:-|$)", plain)
    if not _COMMONS.search(plain) or not by:
        return None
    parts = ["CC", "BY"]
    parts += ["NC"] * bool(_NO_COMMERCE.search(plain)) + ["ND"] * bool(_NO_DERIVATIVES.search(plain))
    parts += ["SA"] * bool(re.search(r"(?:^|-)sa(?:-|$)|share-?alike", plain))
    version = _VERSION_OF_COMMONS.search(plain)
    return "-".join([*parts, f"{version[1]}.{version[2]}"] if version else parts)


def kind_of(name: str) -> Kind:
    """What a licence of this name is."""
    plain = _plain(canonical(name))
    if plain in _SAYS_NOTHING:
        return Kind.UNKNOWN
    if _NO_DERIVATIVES.search(plain) or plain.startswith(_FORBID):
        return Kind.FORBIDS
    if _NO_COMMERCE.search(plain):
        return Kind.NON_COMMERCIAL
    return Kind.ALLOWS if is_known(name) else Kind.UNKNOWN


def is_known(name: str) -> bool:
    """Whether a licence is one of the public ones, which model hubs know by name."""
    plain = _plain(canonical(name))
    return plain.startswith("cc-by") or any(re.fullmatch(pattern + _TAIL, plain) for _, pattern in _ALLOW)


def same(name: str, other: str) -> bool:
    """Whether two spellings mean one licence. A version that only one of them has makes no difference."""
    first, second = _plain(canonical(name)), _plain(canonical(other))
    if first == second:
        return True
    short, long = sorted((first, second), key=len)
    return bool(re.fullmatch(re.escape(short) + r"-v?\d+(-\d+)*", long))


# --- texts ------------------------------------------------------------------------------------------

_REFUSAL = (
    r"(?:(?:may|shall|will|must|can|agree|do|does)\s+not|is not permitted|are not permitted|prohibit\w*|forbid\w*)"
)
_MAKING = r"(?:train|fine-?tune|distil+|create or improve|improve|develop)"
# Within a sentence: somebody may not ... train ... a model.
_FORBIDDEN_TRAINING = re.compile(rf"\b{_REFUSAL}\b[^.;]{{0,400}}?\b{_MAKING}\w*\b[^.;]{{0,160}}?\bmodels?\b", re.I)
_FORBIDDEN_WORKS = re.compile(
    rf"no derivatives?\b|noderiv\w*|\b{_REFUSAL}\b[^.;]{{0,200}}?\bderivative (?:works?|models?)\b", re.I
)
# Not "commercial or non-commercial", which allows both.
_NO_COMMERCE_IN_TEXT = re.compile(r"(?<!commercial or )(?<!commercial and )(?<!commercial/)non-?commercial", re.I)
_FREE_TEXTS = (
    ("openrail++", re.compile(r"open\s?rail\s?\+\+", re.I)),
    ("creativeml-openrail-m", re.compile(r"creativeml open\s?rail", re.I)),
    ("Apache-2.0", re.compile(r"apache license\s+version 2\.0", re.I)),
    ("MIT", re.compile(r"mit license|permission is hereby granted, free of charge, to any person obtaining", re.I)),
    ("Unlicense", re.compile(r"free and unencumbered software released into the public domain", re.I)),
    ("CC0-1.0", re.compile(r"cc0 1\.0 universal", re.I)),
)


def of_text(text: str) -> tuple[str, Kind]:
    """Name and kind of a licence by its text: by its first lines if they name it, else by what it forbids."""
    opening = [line.strip(" #*=\t") for line in text.splitlines()]
    lines = [line for line in opening if line][:2]
    head = " ".join(lines)
    for name, pattern in _FREE_TEXTS:
        if pattern.search(" ".join(text[:600].split())):
            return name, kind_of(name)
    for said in (*lines[:1], head):
        if (kind := kind_of(said)) is Kind.ALLOWS:
            return canonical(said), kind
        if _canonical_commons(_plain(said)):
            return canonical(said), _stricter(kind, _kind_of_clauses(text))
    name = canonical(lines[0]) if lines else UNKNOWN_NAME
    return name, _stricter(kind_of(name), _kind_of_clauses(text))


def _kind_of_clauses(text: str) -> Kind:
    flowing = " ".join(text.split())
    if _FORBIDDEN_TRAINING.search(flowing) or _FORBIDDEN_WORKS.search(flowing):
        return Kind.FORBIDS
    return Kind.NON_COMMERCIAL if _NO_COMMERCE_IN_TEXT.search(flowing) else Kind.UNKNOWN


def _stricter(kind: Kind, other: Kind) -> Kind:
    return max(kind, other, key=STRICTNESS.index)


# --- where they stand -------------------------------------------------------------------------------


def of_model(folder: pathlib.Path, *, covers: str, stated: str = "") -> Licence:
    """The licence of a model folder: by its README.md's front matter, else a LICENSE file, else what the user states.

    The name that a model gives itself (`license: other`, `license_name: ...`) is looked up first; where the name tells
    nothing, the text decides. Raises ConfigError if `stated` contradicts a licence that forbids derivatives.
    """
    name = _front_matter_name(folder / "README.md")
    found = Licence(covers, canonical(name), kind_of(name), "README.md") if name else None
    text = _licence_file(folder)
    if text is not None and (found is None or found.kind is Kind.UNKNOWN):
        of_file, kind = of_text(text.read_text(encoding="utf-8", errors="replace")[:_MOST_CHARACTERS])
        found = Licence(covers, found.name if found and found.name != UNKNOWN_NAME else of_file, kind, text.name)
    if found is None or found.kind is Kind.UNKNOWN:
        return _stated_or(found, covers, stated)
    if stated and not same(stated, found.name):
        if found.kind is Kind.FORBIDS:
            raise errors.ConfigError(
                f"{covers}: {found.found_in} says {found.name} and you state {stated!r}; a licence that {found.kind} "
                f"is not stated away: if you have leave to use it, give --accept-licence '{found.name}'"
            )
        _log.warning("%s: %s says %s, so the stated %s is not used", covers, found.found_in, found.name, stated)
    return found


def _stated_or(found: Licence | None, covers: str, stated: str) -> Licence:
    if stated:
        return Licence(covers, canonical(stated), kind_of(stated), "stated by the user")
    return found or Licence(covers, UNKNOWN_NAME, Kind.UNKNOWN, "nowhere")


def _front_matter_name(readme: pathlib.Path) -> str:
    """`license`, or `license_name` where the former is `other`; "" if there is none."""
    if not readme.is_file():
        return ""
    try:
        matter = huggingface_hub.metadata_load(readme)
    except (ValueError, OSError, yaml.YAMLError) as error:
        _log.warning("the front matter of %s cannot be read: %s", readme, errors.first_line(error))
        return ""
    if not isinstance(matter, dict):
        return ""
    said = matter.get("license") or ""
    listed = " and ".join(map(str, said)) if isinstance(said, list) else str(said)
    own = str(matter.get("license_name") or "")
    return own if own and _plain(listed) in _SAYS_NOTHING else listed


def _licence_file(folder: pathlib.Path) -> pathlib.Path | None:
    named = [path for path in folder.iterdir() if path.name.lower().startswith(("license", "licence", "copying"))]
    return min((path for path in named if path.is_file()), default=None)


def of_data(counts: Mapping[str, int]) -> list[Licence]:
    """The licences of a data set, as its manifest counts them: name -> items; "" where items say nothing."""
    summed: dict[str, int] = {}
    for name, items in counts.items():
        summed[canonical(name)] = summed.get(canonical(name), 0) + items
    return [Licence(DATA, name, kind_of(name), "the data's manifest", items) for name, items in summed.items()]


# --- decisions --------------------------------------------------------------------------------------


def require(found: Sequence[Licence], acceptance: Acceptance) -> list[dict[str, str]]:
    """Which acceptances were needed, for the lineage: licence, what it covers, who said so and when.

    A licence of unknown terms is allowed and warned of. Raises ArtifactError for one that forbids derivatives and that
    nobody accepted by name.
    """
    records, missing = [], []
    for licence in found:
        accepted = [name for name in acceptance.names if same(name, licence.name)]
        if licence.kind is Kind.FORBIDS and not accepted:
            missing.append(licence)
        elif licence.kind is Kind.FORBIDS or accepted:
            on = acceptance.on.isoformat()
            whose = {"licence": licence.name, "covers": licence.covers}
            records.append(whose | {"accepted_by": acceptance.by, "on": on})
        elif licence.kind is Kind.UNKNOWN:
            _log.warning("%s: its licence is not known (%s); the card says so", licence.covers, licence.name)
    if missing:
        said = "; ".join(f"{each.covers} is under {each.name} ({each.found_in}), which {each.kind}" for each in missing)
        options = " ".join(f"--accept-licence '{name}'" for name in dict.fromkeys(each.name for each in missing))
        raise errors.ArtifactError(
            f"{said}. Nothing is exported: choose another model or other data, or state that you have leave to do "
            f"this, with {options}; who said so is recorded in the student"
        )
    _warn_of_unused(found, acceptance)
    return records


def _warn_of_unused(found: Sequence[Licence], acceptance: Acceptance) -> None:
    for name in acceptance.names:
        if not any(same(name, licence.name) for licence in found):
            borne = ", ".join(dict.fromkeys(licence.name for licence in found)) or "none"
            _log.warning("nothing here is under the accepted licence %s; what there is: %s", name, borne)
