"""The examination: load, generate, measure, time, judge. Each step for all entrants before the next."""

import dataclasses
import functools
import hashlib
import logging
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import tqdm

from diffusion_kd import errors, pipeline
from eval import checkpoints, gate, images, measure, networks, processes, protocols, reference, stats, suites
from eval.metrics import frechet, speed

_log = logging.getLogger(__name__)

TEACHER, STUDENT, BASELINE, BESIDE = "teacher", "student", "teacher_few_steps", "other_student"
"""Models in a report: the two that are compared; the teacher at the student's step counts; a student beside it."""

UNGUIDED, STUDENT_GUIDANCE = 1.0, 0.0
MOST_LOST = 0.05
"""Share of prompts that may be lost before an entrant is refused."""

STRIP_PROMPTS, STRIP_SEEDS = 3, 6
_LEAST_PICTURES = 4
"""Below this a covariance of what is left without one group is not even defined."""

_INCOMPLETE = "{} of {} prompts were lost: the run is not complete"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is examined, with everything checked that can be checked before a model is loaded.

    as_written: whether prompts, teacher steps and guidance are the protocol's own.
    seed: of pictures and of the true renders. cache: where pictures are kept.
    """

    protocol: protocols.Protocol
    suite: suites.Suite
    floor: gate.FloorFile
    teacher: str
    student: str
    beside: str | None
    as_written: bool
    steps: tuple[int, ...]
    teacher_steps: int
    guidance_scale: float
    baseline: bool
    seed: int
    batch_size: int
    device: str
    data: pathlib.Path
    cache: pathlib.Path
    price_per_hour_usd: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """One entrant's numbers. to_teacher: set distances; verdict: None for the teacher.

    gallery, strip: its pictures; the strip shows some prompts with several seeds each.
    """

    measured: measure.Measured
    evidence: gate.Evidence
    to_teacher: dict[str, stats.Jackknife]
    precision_recall: dict[str, float]
    speed: speed.Speed
    verdict: gate.Verdict | None
    gallery: images.Gallery
    strip: images.Gallery

    @property
    def entrant(self) -> images.Entrant:
        return self.measured.entrant


@dataclasses.dataclass(frozen=True, slots=True)
class Examination:
    """Everything that a report tells. lost: prompt ids -> why they count for nobody.

    attainable: distances of other true pictures of the same prompts to the true pictures; None where there are none.
    overlong: how many prompts are longer than the CLIP network reads.
    """

    plan: Plan
    results: tuple[Result, ...]
    reference_name: str
    attainable: dict[str, stats.Jackknife] | None
    instruments: networks.Networks
    lost: dict[str, str]
    overlong: int

    @property
    def verdict(self) -> stats.Outcome:
        """The student's, over all its step counts."""
        verdicts = [each.verdict for each in self.results if each.entrant.model == STUDENT and each.verdict is not None]
        return gate.worst([verdict.outcome for verdict in verdicts])


# --- entrants ---------------------------------------------------------------------------------------


def enter(plan: Plan, device: torch.device) -> list[images.Entrant]:
    """Load the models; the teacher first."""
    options, settings = _fixed_latents(plan)
    sha256 = images.artifact_sha256(plan.teacher)
    teacher = pipeline.load_teacher(plan.teacher)
    teacher.to(device)

    def of_teacher(model: str, steps: int, scale: float) -> images.Entrant:
        own: dict[str, Any] = {}
        if plan.protocol.negative_prompt is not None:
            own["negative_prompt"] = plan.protocol.negative_prompt
        sampler = functools.partial(teacher, **options, **own)
        return images.Entrant(model, plan.teacher, sampler, sha256, steps, scale, settings | own, device.type)

    entrants = [of_teacher(TEACHER, plan.teacher_steps, plan.guidance_scale)]
    if plan.baseline:
        scales = dict.fromkeys((plan.guidance_scale, UNGUIDED))
        entrants += [of_teacher(BASELINE, steps, scale) for steps in plan.steps for scale in scales]
    for model, name in ((STUDENT, plan.student), (BESIDE, plan.beside)):
        if name is not None:
            found = images.artifact_sha256(name)
            student = pipeline.load_student(name)
            student.to(device)
            sampler = functools.partial(student, **options)
            entrants += [
                images.Entrant(model, name, sampler, found, steps, STUDENT_GUIDANCE, settings, device.type)
                for steps in plan.steps
            ]
    return entrants


def _fixed_latents(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the samplers, and what of them goes into the key of the cache."""
    if plan.protocol.latents is None:
        return {}, {}
    path = plan.data / plan.protocol.latents
    latents = checkpoints.load(path)
    if not isinstance(latents, torch.Tensor) or not latents.isfinite().all():
        raise errors.DataError(f"{path} must hold one tensor of finite noise")
    return {"latents": latents}, {"latents_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def rehearse(entrants: Sequence[images.Entrant], resolution_px: int, exact: bool) -> None:
    """Let each draw one picture, so that none fails after hours of the others' work. Raises ModelError for its size."""
    for entrant in entrants:
        height, width = entrant.draw(["a rehearsal"], [0]).shape[2:]
        if (exact and (height, width) != (resolution_px, resolution_px)) or min(height, width) < resolution_px:
            raise errors.ModelError(
                f"{entrant.source} makes pictures of {width}x{height} px; this protocol judges "
                f"{resolution_px}x{resolution_px} px{'' if exact else ' or larger'}"
            )


# --- the examination --------------------------------------------------------------------------------


def examine(plan: Plan, entrants: Sequence[images.Entrant], workers: processes.Processes) -> Examination | None:
    """Examine the entrants, the teacher first. None in every process but the first. Raises DiffusionKDError."""
    device = workers.device(plan.device)
    rehearse(entrants, plan.protocol.resolution_px, exact=plan.protocol.oracle)
    everything = images.items(plan.suite, plan.protocol.images_per_prompt, plan.seed)
    galleries = [images.Gallery(plan.cache, entrant, everything, plan.batch_size) for entrant in entrants]
    strip = _strip_items(plan)
    strips = [images.Gallery(plan.cache, entrant, strip, plan.batch_size) for entrant in entrants]
    with tempfile.TemporaryDirectory(prefix="diffusion-kd-") as folder:
        judges = None
        if workers.first:  # the truth is read before the first picture is made: damage in it is told at once
            judges = _Judges(plan, device, pathlib.Path(folder))
        for gallery in (*galleries, *strips):
            gallery.fill(workers)
        workers.wait()
        return judges.judge(galleries, strips) if judges is not None else None


def _strip_items(plan: Plan) -> list[images.Item]:
    chosen = [plan.suite.prompts[place] for place in spread(plan.suite.standard.tolist(), STRIP_PROMPTS)]
    return images.items(suites.Suite("strip", tuple(chosen)), STRIP_SEEDS, plan.seed)


def spread(values: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly spaced; all, where there are fewer."""
    count = min(count, len(values))
    return [values[number * len(values) // count] for number in range(count)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """True pictures and their features."""

    pictures: reference.Pictures
    sets: measure.Sets


class _Judges:
    """The networks and the truth, and what is measured with them."""

    def __init__(self, plan: Plan, device: torch.device, workspace: pathlib.Path) -> None:
        self._plan, protocol = plan, plan.protocol
        self._instruments = networks.load(protocol, plan.data, device)
        self._ruler = measure.Ruler(protocol, plan.suite, self._instruments, workspace, batch_size=plan.batch_size)
        opened = reference.open_reference(protocol, plan.suite, plan.data, plan.seed)
        self._moments = opened if isinstance(opened, frechet.Gaussian) else None
        self._truth = self._look(opened) if isinstance(opened, reference.Pictures) else None
        rendered = self._truth is not None and protocol.reference == "renders"
        others = reference.renders(plan.suite, protocol.images_per_prompt, plan.seed + 1) if rendered else None
        self._others = None if others is None else self._look(others)

    def _look(self, pictures: reference.Pictures) -> _Seen:
        return _Seen(pictures, self._ruler.reference_sets(pictures))

    def _kept(self, seen: _Seen) -> measure.Sets:
        places = seen.pictures.places
        return seen.sets if places is None else self._ruler.kept(seen.sets, places)

    def judge(self, galleries: Sequence[images.Gallery], strips: Sequence[images.Gallery]) -> Examination:
        lost = self._exclude(galleries)
        plan, ruler, clip = self._plan, self._ruler, self._instruments.clip
        texts = [plan.protocol.clip_prefix + prompt.text for prompt in plan.suite.prompts]
        text_vectors = networks.text_vectors(clip, texts, plan.batch_size)
        found = [ruler.measure(gallery, galleries[0], text_vectors) for gallery in galleries]
        truth = self._moments if self._truth is None else self._kept(self._truth)
        speeds = _time([gallery.entrant for gallery in galleries], plan)
        remarks = [_INCOMPLETE.format(len(lost), len(plan.suite.prompts))] if lost else []
        results: list[Result] = []
        everything = zip(found, speeds, galleries, strips, strict=True)
        for measured, timed, gallery, strip in tqdm.tqdm(everything, desc="distances", total=len(found)):
            first = results[0] if results else None
            results.append(self._result(measured, timed, truth, first, remarks, gallery, strip))
        return Examination(
            plan=plan,
            results=tuple(results),
            reference_name=self._reference_name(),
            attainable=self._attainable(truth),
            instruments=self._instruments,
            lost=lost,
            overlong=sum(clip.overlong(texts)),
        )

    def _reference_name(self) -> str:
        if self._truth is not None:
            return self._truth.pictures.name
        if self._moments is None:
            return "none"
        digest = hashlib.sha256(self._moments.mean.tobytes() + self._moments.factor.tobytes())
        return f"stored moments {digest.hexdigest()[:12]}"

    def _attainable(self, truth: measure.Sets | frechet.Gaussian | None) -> dict[str, stats.Jackknife] | None:
        if self._others is None or not isinstance(truth, measure.Sets):
            return None
        return measure.distances(self._kept(self._others), truth)

    def _result(
        self,
        measured: measure.Measured,
        timed: speed.Speed,
        truth: measure.Sets | frechet.Gaussian | None,
        teacher: Result | None,
        remarks: Sequence[str],
        gallery: images.Gallery,
        strip: images.Gallery,
    ) -> Result:
        distances = {} if truth is None else measure.distances(measured.sets, truth)
        pictures, dimensions = measured.sets.whole.shape
        evidence = gate.Evidence(
            sets=distances,
            scores=measured.scores,
            latency_s=timed.latency_s,
            pictures=pictures,
            pictures_per_prompt=self._plan.protocol.images_per_prompt,
            dimensions=dimensions,
        )
        shares = measure.precision_and_recall(measured.sets, truth) if isinstance(truth, measure.Sets) else {}
        if teacher is None:
            return Result(measured, evidence, {}, shares, timed, None, gallery, strip)
        to_teacher = measure.distances(measured.sets, teacher.measured.sets)
        plan = self._plan
        verdict = gate.judge(plan.floor, evidence, teacher.evidence, plan.suite, remarks, step_counts=len(plan.steps))
        return Result(measured, evidence, to_teacher, shares, timed, verdict, gallery, strip)

    def _exclude(self, galleries: Sequence[images.Gallery]) -> dict[str, str]:
        """A prompt that one entrant could not draw counts for none. Raises ModelError where that is too many."""
        suite, lost = self._plan.suite, dict[str, str]()
        for gallery in galleries:
            mine = gallery.lost()
            if len(mine) > MOST_LOST * len(suite.prompts):
                prompt_id, why = next(iter(mine.items()))
                raise errors.ModelError(
                    f"{gallery.entrant.label} ({gallery.entrant.source}) lost {len(mine)} of {len(suite.prompts)} "
                    f"prompts, {prompt_id} among them: {why}; at most {MOST_LOST:.0%} may be lost"
                )
            lost |= {prompt_id: f"{gallery.entrant.label}: {why}" for prompt_id, why in mine.items()}
        standard = sum(suite.prompts[place].id not in lost for place in suite.standard)
        if standard * self._plan.protocol.images_per_prompt < _LEAST_PICTURES:
            raise errors.DataError(f"{standard} standard prompts are too few to measure anything on")
        self._ruler.excluded = frozenset(lost)
        return lost


def _time(entrants: Sequence[images.Entrant], plan: Plan) -> list[speed.Speed]:
    """On the first prompts of the suite, over and over: what is drawn does not change how long it takes."""
    prompts = [plan.suite.prompts[number % len(plan.suite.prompts)].text for number in range(plan.batch_size)]

    def call(entrant: images.Entrant) -> speed.Call:
        return lambda count: entrant.draw(prompts[:count], range(count))

    _log.info("timing %d models", len(entrants))
    calls = [call(entrant) for entrant in entrants]
    return speed.measure(calls, batch_size=plan.batch_size, device=torch.device(plan.device))
