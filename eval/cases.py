"""`cases.json`: prompts on which a student falls furthest behind its teacher or gains most on it, with both pictures.

`choose` takes them from an examination, for the file and for the page alike; `load` reads a file back.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import PIL.Image
import pydantic
from numpy.typing import NDArray

from diffusion_kd import errors
from diffusion_kd.shapes import language, oracle, scenes
from eval import examine, images, report

FILE_NAME = "cases.json"
SCHEMA_VERSION: Literal[1] = 1
COUNT = 6
"""Cases of each kind, at most."""

_THUMBNAIL_PX = 256
DataUri = Annotated[str, pydantic.Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}$")]


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """uri: the picture itself, at most 256 px. seen, verdict: what the oracle says of it; None where it says nothing.

    verdict: `as asked`, or what is wrong: `shape wrong, relation wrong`.
    """

    uri: DataUri
    seen: str | None
    verdict: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt and a picture of each model, of one seed: where the oracle tells, one that shows the difference.

    student_score, teacher_score: means over all pictures of the prompt, of the metric of the `Cases`.
    lpips_to_teacher: a mean likewise; None where it is not finite. asked: the prompt in short, if the oracle reads it.
    """

    prompt_id: str
    prompt: str
    category: str
    edge_case: bool
    asked: str | None
    student_score: pydantic.FiniteFloat
    teacher_score: pydantic.FiniteFloat
    lpips_to_teacher: pydantic.FiniteFloat | None
    seed: int
    student: Picture
    teacher: Picture


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The report that the cases are of. sha256: of the bytes of its report.json; schema_version: of that file."""

    sha256: str
    schema_version: int
    protocol: str
    suite: str
    prompts_sha256: str
    seed: int
    verdict: str
    student: str
    student_sha256: str
    teacher: str
    teacher_sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Cases of the student with fewest steps. Standard prompts and edge cases are apart, the first case leads its kind.

    metric: by what they were chosen; more is better.
    """

    schema_version: Literal[1]
    report: Origin
    metric: Literal["prompt_accuracy", "clip_score"]
    student_steps: int
    teacher_steps: int
    worst: tuple[Case, ...]
    worst_edge_cases: tuple[Case, ...]
    best: tuple[Case, ...]


# --- choosing ---------------------------------------------------------------------------------------


def choose(examination: examine.Examination, reported: Mapping[str, Any]) -> Cases:
    """The cases of an examination. reported: its report, as `report.build` makes it."""
    chooser = _Chooser(examination)
    standard, edge = chooser.worst_first(edge_case=False), chooser.worst_first(edge_case=True)
    return Cases(
        schema_version=SCHEMA_VERSION,
        report=_origin(reported),
        metric=chooser.metric,
        student_steps=chooser.student.entrant.steps,
        teacher_steps=chooser.teacher.entrant.steps,
        worst=tuple(chooser.case(place) for place in standard[:COUNT]),
        worst_edge_cases=tuple(chooser.case(place) for place in edge[:COUNT]),
        best=tuple(chooser.case(place) for place in standard[::-1][:COUNT]),
    )


def _origin(reported: Mapping[str, Any]) -> Origin:
    protocol, models = reported["protocol"], reported["models"]
    return Origin(
        sha256=hashlib.sha256(report.to_json(reported).encode()).hexdigest(),
        schema_version=reported["schema_version"],
        protocol=protocol["id"],
        suite=protocol["suite"],
        prompts_sha256=protocol["prompts_sha256"],
        seed=protocol["seed"],
        verdict=reported["verdict"],
        student=models[examine.STUDENT]["source"],
        student_sha256=models[examine.STUDENT]["artifact_sha256"],
        teacher=models[examine.TEACHER]["source"],
        teacher_sha256=models[examine.TEACHER]["artifact_sha256"],
    )


def _subject(examination: examine.Examination) -> examine.Result:
    """The student with fewest steps."""
    students = [result for result in examination.results if result.entrant.model == examine.STUDENT]
    return min(students, key=lambda result: result.entrant.steps)


def usable(examination: examine.Examination) -> list[int]:
    """Places of the prompts that were not lost."""
    return [place for place, prompt in enumerate(examination.plan.suite.prompts) if prompt.id not in examination.lost]


class _Chooser:
    def __init__(self, examination: examine.Examination) -> None:
        self._examination = examination
        self.teacher, self.student = examination.results[0], _subject(examination)
        scored = "prompt_accuracy" in self.student.measured.scores
        self.metric: Literal["prompt_accuracy", "clip_score"] = "prompt_accuracy" if scored else "clip_score"
        self._ours, self._theirs = (each.measured.scores[self.metric] for each in (self.student, self.teacher))
        self._apart = self.student.measured.scores["lpips_to_teacher"]

    def worst_first(self, *, edge_case: bool) -> list[int]:
        """Places of prompts by the difference to the teacher; of equal ones first what looks least like the teacher."""
        prompts = self._examination.plan.suite.prompts
        known = [
            place
            for place in usable(self._examination)
            if np.isfinite(self._ours[place]) and prompts[place].edge_case == edge_case
        ]
        return sorted(known, key=lambda place: (self._ours[place] - self._theirs[place], -self._apart[place]))

    def case(self, place: int) -> Case:
        prompt, apart = self._examination.plan.suite.prompts[place], float(self._apart[place])
        asks, number = _asked(self._examination, place), self._telling(place)
        return Case(
            prompt_id=prompt.id,
            prompt=prompt.text,
            category=prompt.category,
            edge_case=prompt.edge_case,
            asked=None if asks is None else language.say(asks),
            student_score=float(self._ours[place]),
            teacher_score=float(self._theirs[place]),
            lpips_to_teacher=apart if math.isfinite(apart) else None,
            seed=_item(self._examination, self.student, place, number).seed,
            student=picture(self._examination, self.student, place, number),
            teacher=picture(self._examination, self.teacher, place, number),
        )

    def _telling(self, place: int) -> int:
        """Which of a prompt's pictures shows the difference between the scores best, as far as the oracle can tell."""
        wanted, count = _asked(self._examination, place), self._examination.plan.protocol.images_per_prompt
        if wanted is None:
            return 0

        def right(result: examine.Result, number: int) -> bool:
            image = result.gallery.read([_item(self._examination, result, place, number)])[0]
            return oracle.judge(oracle.read(image), wanted).correct

        gain = np.sign(self._ours[place] - self._theirs[place])
        gains = [int(right(self.student, number)) - int(right(self.teacher, number)) for number in range(count)]
        return min(range(count), key=lambda number: abs(gain - gains[number]))


# --- pictures ---------------------------------------------------------------------------------------


def _asked(examination: examine.Examination, place: int) -> scenes.Prompt | None:
    """What the oracle looks for in the pictures of a prompt; None where it does not look."""
    return examination.plan.suite.prompts[place].asks if examination.plan.protocol.oracle else None


def _item(examination: examine.Examination, result: examine.Result, place: int, number: int = 0) -> images.Item:
    """One of a prompt's pictures, counted from 0."""
    return result.gallery.items[place * examination.plan.protocol.images_per_prompt + number]


def picture(examination: examine.Examination, result: examine.Result, place: int, number: int = 0) -> Picture:
    """One of a prompt's pictures, with what the oracle says of it."""
    image = result.gallery.read([_item(examination, result, place, number)])[0]
    wanted = _asked(examination, place)
    if wanted is None:
        return Picture(uri(image), None, None)
    reading = oracle.read(image)
    return Picture(uri(image), oracle.say(reading, wanted), oracle.judge(reading, wanted).say())


def uri(image_uint8: NDArray[np.uint8]) -> str:
    """A picture as a data URI: small ones as they are, large ones as thumbnails. image_uint8: (H, W, 3) RGB."""
    picture, stream = PIL.Image.fromarray(image_uint8), io.BytesIO()
    if max(picture.size) > _THUMBNAIL_PX:
        picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), PIL.Image.Resampling.LANCZOS)
        picture.save(stream, "JPEG", quality=85)
        kind = "jpeg"
    else:
        picture.save(stream, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


# --- on disk ----------------------------------------------------------------------------------------


def to_json(chosen: Cases) -> str:
    """`load` takes it back."""
    return json.dumps(dataclasses.asdict(chosen), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


_READER = pydantic.TypeAdapter(Cases)


def load(path: pathlib.Path) -> Cases:
    """The cases in a file, or those in a report's folder. Raises DataError for anything else."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        return _READER.validate_json(file.read_bytes(), strict=True)
    except OSError as error:
        raise errors.DataError(f"{file} cannot be read: {errors.first_line(error)}") from None
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        given = "" if first["type"] == "missing" else f", not {str(first['input'])[:60]!r}"
        raise errors.DataError(
            f"{file} does not hold cases that this release reads: {where}: {first['msg']}{given}; "
            "make it again with python -m eval.run"
        ) from None
