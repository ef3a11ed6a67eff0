"""The cases of a report: which they are, what they say, and which files are refused."""

import base64
import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from diffusion_kd import errors, pipeline
from diffusion_kd.shapes import language
from eval import cases, images, run, suites

Models = tuple[Any, Any]
BEHIND, HALF_BEHIND, AHEAD, ODD = "one-3", "one-5", "two-2", "odd-6"


@pytest.fixture
def folder(
    tmp_path: pathlib.Path, suite: suites.Suite, models: Models, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """A report on a student that spoils two standard prompts, the second in one picture of two, and an edge case.

    Where it is right it draws another scene than its teacher, which spoils one standard prompt. Of the first standard
    prompt nothing is asked.
    """
    texts = {prompt.id: prompt.text for prompt in suite.prompts}
    _, second = (item.seed for item in images.items(suite, 2, 0) if item.prompt.id == HALF_BEHIND)

    def spoilt(text: str, seed: int) -> bool:
        return text in (texts[BEHIND], texts[ODD]) or seed == second

    monkeypatch.setattr(pipeline, "load_student", _spoiling(models, spoilt, shift=1))
    monkeypatch.setattr(pipeline, "load_teacher", _spoiling(models, lambda text, seed: text == texts[AHEAD]))
    first, *others = suite.prompts
    return _evaluated(tmp_path, suites.Suite("toy", (dataclasses.replace(first, asks=None), *others)))


def _spoiling(models: Models, spoils: Callable[[str, int], bool], shift: int = 0) -> Callable[[str], Any]:
    """Loads a painter that makes noise of some pictures. shift: of the seeds of the others."""
    painter, noise_maker = models

    def picture(prompt: str, seed: int) -> NDArray[np.uint8]:
        spoilt = spoils(prompt, seed)
        drawn: NDArray[np.uint8] = (
            noise_maker.picture(prompt, seed) if spoilt else painter.picture(prompt, seed + shift)
        )
        return drawn

    return lambda name: type(painter)(picture)


def _evaluated(tmp_path: pathlib.Path, suite: suites.Suite) -> pathlib.Path:
    path, out = tmp_path / "toy.jsonl", tmp_path / "report"
    path.write_text("".join(suites.to_line(prompt) + "\n" for prompt in suite.prompts))
    given = ["--student", "mine", "--suite", str(path), "--steps", "2,1", "--teacher-steps", "5", "--device", "cpu"]
    assert run.main([*given, "--cache", str(tmp_path / "cache"), "--out", str(out)]) in (0, 1, 2)
    return out


def _pixels(picture: cases.Picture) -> NDArray[np.uint8]:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))))


# --- which ------------------------------------------------------------------------------------------


def test_the_furthest_behind_leads_and_edge_cases_are_apart(folder: pathlib.Path, suite: suites.Suite) -> None:
    found = cases.load(folder)
    assert (found.metric, found.student_steps, found.teacher_steps) == ("prompt_accuracy", 1, 5)
    first, second, *others = found.worst
    assert [(each.prompt_id, each.student_score, each.teacher_score) for each in (first, second)] == [
        (BEHIND, 0, 1),
        (HALF_BEHIND, 0.5, 1),
    ]
    assert [each.student_score for each in others] == [1] * 4
    apart = [each.lpips_to_teacher or 0 for each in others]
    assert apart == sorted(apart, reverse=True) and apart[-1] > 0
    assert (found.best[0].prompt_id, found.best[0].student_score, found.best[0].teacher_score) == (AHEAD, 1, 0)
    assert found.worst_edge_cases[0].prompt_id == ODD
    assert [each.edge_case for each in found.worst + found.best] == [False] * 12
    assert [each.edge_case for each in found.worst_edge_cases] == [True] * 6


def test_a_case_has_its_prompt_and_both_pictures_of_one_seed(
    folder: pathlib.Path, suite: suites.Suite, models: Models
) -> None:
    first = cases.load(folder).worst[0]
    prompt = next(prompt for prompt in suite.prompts if prompt.id == BEHIND)
    assert prompt.asks is not None
    assert (first.prompt, first.category) == (prompt.text, "one")
    assert first.asked == language.say(prompt.asks)
    assert first.teacher.verdict == "as asked" and str(prompt.asks.objects[0].shape) in str(first.teacher.seen)
    assert first.student.seen == "not readable" and str(first.student.verdict).startswith("count wrong")
    painter, noise_maker = models
    assert np.array_equal(_pixels(first.teacher), painter.picture(prompt.text, first.seed))
    assert np.array_equal(_pixels(first.student), noise_maker.picture(prompt.text, first.seed))


def test_the_picture_shown_is_the_one_that_shows_the_difference(folder: pathlib.Path, suite: suites.Suite) -> None:
    half = cases.load(folder).worst[1]
    _, second = (item.seed for item in images.items(suite, 2, 0) if item.prompt.id == HALF_BEHIND)
    assert half.seed == second
    assert (half.student.seen, half.teacher.verdict) == ("not readable", "as asked")


def test_the_page_shows_the_same_cases(folder: pathlib.Path) -> None:
    page, found = (folder / "report.html").read_text(), cases.load(folder)
    for each in found.worst + found.worst_edge_cases + found.best:
        assert each.student.uri in page and each.teacher.uri in page
    places = [page.index(title) for title in ("falls furthest behind", "Edge cases where", "does best against")]
    assert places == sorted(places)
    assert page.index(f"{ODD.partition('-')[0]}; prompt accuracy 0.00, teacher 1.00") > places[1]


def test_what_has_no_score_is_no_case(folder: pathlib.Path, suite: suites.Suite) -> None:
    found = cases.load(folder)
    assert suite.prompts[0].id not in {each.prompt_id for each in found.worst + found.best}


def test_the_file_says_of_which_report_it_is(folder: pathlib.Path) -> None:
    written, origin = (folder / "report.json").read_bytes(), cases.load(folder).report
    assert origin.sha256 == hashlib.sha256(written).hexdigest()
    assert (origin.schema_version, origin.verdict) == (2, json.loads(written)["verdict"])
    assert (origin.protocol, origin.suite, origin.seed) == ("shapes", "toy.jsonl", 0)
    assert origin.prompts_sha256 == suites.load(str(folder.parent / "toy.jsonl")).sha256
    assert (origin.student, origin.student_sha256) == ("mine", "hash of mine")
    assert (origin.teacher, origin.teacher_sha256) == ("shapes-teacher", "hash of shapes-teacher")


def test_where_no_oracle_reads_there_is_the_clip_score(
    tmp_path: pathlib.Path, suite: suites.Suite, models: Models
) -> None:
    unread = tuple(
        suites.Prompt(prompt.id, prompt.category, prompt.edge_case, prompt.text)
        for prompt in suite.prompts
        if not prompt.edge_case
    )
    folder = _evaluated(tmp_path, suites.Suite("toy", unread))
    found = cases.load(folder)
    assert (found.metric, len(found.worst), found.worst_edge_cases) == ("clip_score", 6, ())
    gains = [each.student_score - each.teacher_score for each in found.worst]
    assert gains == sorted(gains)
    assert (found.worst[0].asked, found.worst[0].student.seen, found.worst[0].student.verdict) == (None, None, None)
    page = (folder / "report.html").read_text()
    assert "Edge cases where" not in page and "seen:" not in page


# --- pictures ---------------------------------------------------------------------------------------


def test_large_pictures_become_thumbnails() -> None:
    image = np.zeros((400, 800, 3), np.uint8)
    image[:, 400:] = 255
    uri = cases.uri(image)
    assert uri.startswith("data:image/jpeg;base64,")
    assert _pixels(cases.Picture(uri, None, None)).shape == (128, 256, 3)


def test_small_pictures_stay_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 64, 3), np.uint8)
    assert np.array_equal(_pixels(cases.Picture(cases.uri(image), None, None)), image)


# --- reading ----------------------------------------------------------------------------------------

PICTURE: dict[str, Any] = {"uri": "data:image/png;base64,iVBORw0KGgo=", "seen": None, "verdict": None}
CASE = {
    "prompt_id": "a-1", "prompt": "a\u2028red circle", "category": "a", "edge_case": False, "asked": "red circle",
    "student_score": 0, "teacher_score": 0.5, "lpips_to_teacher": None, "seed": 7,
    "student": PICTURE, "teacher": PICTURE,
}  # fmt: skip
ORIGIN = {
    "sha256": "0", "schema_version": 2, "protocol": "shapes", "suite": "shapes", "prompts_sha256": "1", "seed": 0,
    "verdict": "PASS", "student": "s", "student_sha256": "2", "teacher": "t", "teacher_sha256": "3",
}  # fmt: skip
FILE: dict[str, Any] = {
    "schema_version": 1, "report": ORIGIN, "metric": "prompt_accuracy", "student_steps": 1, "teacher_steps": 50,
    "worst": [CASE], "worst_edge_cases": [], "best": [CASE],
}  # fmt: skip


def test_what_is_written_is_read_back(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(FILE))
    found = cases.load(path)
    assert found.worst[0].prompt == "a\u2028red circle" and found.worst_edge_cases == ()
    path.write_text(cases.to_json(found))
    assert cases.load(tmp_path) == cases.load(path) == found


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["schema_version"], 2, "schema_version: Input should be 1, not '2'"),
        (["schema_version"], None, "schema_version: Field required"),
        (["report", "student_sha256"], None, "report.student_sha256: Field required"),
        (["worst"], {}, "worst"),
        (["worst", 0], "x", "worst.0"),
        (["worst", 0, "seed"], "7", "worst.0.seed: Input should be a valid integer, not '7'"),
        (["worst", 0, "edge_case"], 1, "worst.0.edge_case: Input should be a valid boolean"),
        (["worst", 0, "student_score"], float("nan"), "worst.0.student_score"),
        (["metric"], "fd", "metric: Input should be 'prompt_accuracy' or 'clip_score'"),
        (["best", 0, "teacher", "uri"], "https://elsewhere/x.png", "best.0.teacher.uri"),
        (["best", 0, "teacher", "uri"], "data:image/svg+xml;base64,PHN2Zz4=", "best.0.teacher.uri"),
        (["best", 0, "teacher", "uri"], PICTURE["uri"] + '" onerror="alert(1)', "best.0.teacher.uri"),
        (["best", 0, "teacher", "uri"], PICTURE["uri"] + "\n", "best.0.teacher.uri"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(
    tmp_path: pathlib.Path, where: list[str | int], value: object, message: str
) -> None:
    content = json.loads(json.dumps(FILE))
    holder = content
    for key in where[:-1]:
        holder = holder[key]
    if value is None:
        del holder[where[-1]]
    else:
        holder[where[-1]] = value
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(content))
    with pytest.raises(errors.DataError) as refused:
        cases.load(path)
    said = str(refused.value)
    assert f"{path} does not hold cases that this release reads: {message}" in said
    assert "\n" not in said and len(said) < 400 + len(str(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff"])
def test_what_is_no_such_json_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "cases.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(errors.DataError, match=r"cases\.json does not hold cases"):
        cases.load(tmp_path)


def test_an_absent_file_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.DataError, match=r"cases\.json cannot be read: .*No such file"):
        cases.load(tmp_path / "cases.json")
