"""The command: its verdict and exit code, its files, its refusals."""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

from diffusion_kd import pipeline
from eval import gate, images, report, run, suites

Models = tuple[Any, Any]
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def toy_suite(suite: suites.Suite, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(suites.to_line(prompt) + "\n" for prompt in suite.prompts))
    return path


@pytest.fixture
def arguments(toy_suite: pathlib.Path, tmp_path: pathlib.Path) -> list[str]:
    return [
        "--student", "mine", "--suite", str(toy_suite), "--steps", "1,2", "--teacher-steps", "5", "--batch-size", "8",
        "--device", "cpu", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "report"),
    ]  # fmt: skip


@pytest.fixture
def timeless(tmp_path: pathlib.Path) -> list[str]:
    """The shapes floor without its latency: a model is no faster than itself."""
    floor = tmp_path / "timeless.yaml"
    lines = (gate.FLOORS / "shapes.yaml").read_text().splitlines()
    floor.write_text("\n".join(line for line in lines if "metric: latency" not in line))
    return ["--floor", str(floor)]


def _report(folder: pathlib.Path) -> Any:
    return json.loads((folder / "report" / "report.json").read_text())


def test_a_bad_student_fails_and_the_report_says_why(
    tmp_path: pathlib.Path, arguments: list[str], models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*arguments, "--price-per-hour", "2"]) == 1
    written = _report(tmp_path)
    assert (written["schema_version"], written["verdict"], written["complete"]) == (2, "FAIL", True)
    assert [(row["model"], row["steps"], row["guidance_scale"]) for row in written["rows"]] == [
        ("teacher", 5, 2.0), ("student", 1, 0.0), ("student", 2, 0.0)
    ]  # fmt: skip
    teacher, student, _ = written["rows"]
    assert teacher["values"]["prompt_accuracy"]["value"] == 1
    assert student["values"]["prompt_accuracy"]["value"] == 0
    assert student["values"]["fd"]["value"] > teacher["values"]["fd"]["value"]
    assert "verdict" not in teacher
    assert any(sentence.startswith("prompt_accuracy of all prompts") for sentence in student["verdict"]["because"])
    assert teacher["speed"]["cost_usd"] == pytest.approx(teacher["speed"]["seconds_per_image"] * 2 / 3600)
    shown = capsys.readouterr().out
    assert "verdict: FAIL" in shown and "prompt_accuracy of all prompts: retention 0.000" in shown
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.html", "cases.json"}


def test_few_samples_are_inconclusive(
    tmp_path: pathlib.Path, arguments: list[str], timeless: list[str], models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_student", lambda name: models[0])  # as good as the teacher
    assert run.main([*arguments, *timeless]) == 2
    assert _report(tmp_path)["verdict"] == "INCONCLUSIVE"


def test_a_good_and_fast_student_passes_where_the_samples_suffice(
    tmp_path: pathlib.Path, arguments: list[str], models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = tmp_path / "floor.yaml"
    floor.write_text(
        "confidence: 0.95\nmin_prompts: 8\nfloors:\n"
        "  - {metric: prompt_accuracy, over: all, retention: 0.7}\n  - {metric: kid, over: all, retention: 0.0001}\n"
    )
    monkeypatch.setattr(pipeline, "load_student", lambda name: models[0])
    assert run.main([*arguments, "--floor", str(floor)]) == 2  # the second floor is of a distance near 0
    floor.write_text(floor.read_text().rpartition("  - ")[0])
    assert run.main([*arguments, "--floor", str(floor)]) == 0
    assert _report(tmp_path)["verdict"] == "PASS"


def test_every_value_has_a_name_and_a_fingerprint(tmp_path: pathlib.Path, arguments: list[str], models: Models) -> None:
    run.main(arguments)
    written = _report(tmp_path)
    prints = written["fingerprints"]
    for row in written["rows"]:
        for key, value in row["values"].items():
            made = prints[value["fingerprint"]]
            assert made["metric"] == value["name"]
            assert made["versions"]["torch"] == torch.__version__
            assert made["prompts_sha256"] == written["protocol"]["prompts_sha256"]
            assert made["samples"] == 48 and made["resolution_px"] == 64
            if key not in ("prompt_accuracy",):
                assert made["network"] == "toy" and len(made["network_sha256"]) == 64
    names = {key: value["name"] for key, value in written["rows"][1]["values"].items()}
    assert names["fd"] == names["fd_to_teacher"] == "FD[toy]"
    assert not any("FID" in name for name in names.values())
    teacher, student, _ = written["rows"]
    assert teacher["values"]["fd"]["fingerprint"] == student["values"]["fd"]["fingerprint"]
    assert student["values"]["fd"]["fingerprint"] != student["values"]["fd_to_teacher"]["fingerprint"]


def test_two_runs_say_the_same(tmp_path: pathlib.Path, arguments: list[str], models: Models) -> None:
    found = []
    for cache in ("one", "other"):
        run.main([*arguments, "--cache", str(tmp_path / cache)])
        written = _report(tmp_path)
        for row in written["rows"]:
            row.pop("speed")
            row.get("verdict", {}).pop("because", None)
            row.get("verdict", {}).update(
                checks=[each for each in row.get("verdict", {}).get("checks", []) if each["metric"] != "latency"]
            )
        written.pop("command")
        found.append(written)
    assert found[0] == found[1]


def test_a_second_student_reuses_the_teacher_s_pictures(
    tmp_path: pathlib.Path, arguments: list[str], models: Models
) -> None:
    run.main(arguments)
    teacher = models[0]
    drawn = len([call for call in teacher.asked if call == (5, 2.0)])
    run.main([*arguments, "--student", "another"])
    again = len([call for call in teacher.asked if call == (5, 2.0)]) - drawn
    assert again == 1 + 1 + 10 + 3  # the rehearsal and the timing alone


def test_other_models_stand_beside(tmp_path: pathlib.Path, arguments: list[str], models: Models) -> None:
    run.main([*arguments, "--baseline", "--beside", "another"])
    rows = [(row["model"], row["steps"], row["guidance_scale"]) for row in _report(tmp_path)["rows"]]
    assert rows == [
        ("teacher", 5, 2.0),
        *(("teacher_few_steps", steps, scale) for steps in (1, 2) for scale in (2.0, 1.0)),
        *((model, steps, 0.0) for model in ("student", "other_student") for steps in (1, 2)),
    ]


class Breaking:
    """Makes NaN for every prompt that `breaks` holds."""

    def __init__(self, model: Any, breaks: set[str]) -> None:
        self.model, self.breaks = model, breaks

    def to(self, device: str) -> None: ...

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        drawn: Tensor = self.model(prompts, seeds, steps=steps, guidance_scale=guidance_scale)
        drawn[[prompt in self.breaks for prompt in prompts]] = torch.nan
        return drawn


def test_a_lost_prompt_is_counted_and_the_run_is_not_complete(
    tmp_path: pathlib.Path,
    arguments: list[str],
    timeless: list[str],
    models: Models,
    suite: suites.Suite,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "load_student", lambda name: Breaking(models[0], {suite.prompts[2].text}))
    assert run.main([*arguments, *timeless]) == 2
    written = _report(tmp_path)
    assert written["complete"] is False
    assert list(written["lost"]) == [suite.prompts[2].id]
    assert "NaN" in written["lost"][suite.prompts[2].id]
    assert all(written["fingerprints"][row["values"]["fd"]["fingerprint"]]["samples"] == 46 for row in written["rows"])
    assert "1 of 32 prompts were lost" in written["rows"][1]["verdict"]["because"][0]


def test_a_model_that_loses_too_much_is_refused(
    tmp_path: pathlib.Path,
    arguments: list[str],
    models: Models,
    suite: suites.Suite,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    breaks = {prompt.text for prompt in suite.prompts[:3]}
    monkeypatch.setattr(pipeline, "load_student", lambda name: Breaking(models[0], breaks))
    assert run.main(arguments) == 3
    assert "student, 1 step (mine) lost 3 of 32 prompts" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_failure_leaves_the_earlier_report_whole(
    tmp_path: pathlib.Path, arguments: list[str], models: Models, suite: suites.Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.main(arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    everything = {prompt.text for prompt in suite.prompts}
    monkeypatch.setattr(pipeline, "load_student", lambda name: Breaking(models[1], everything))
    monkeypatch.setattr(images, "artifact_sha256", lambda name: "another")
    assert run.main(arguments) == 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_a_full_disk_is_one_sentence_and_what_is_made_is_kept(
    tmp_path: pathlib.Path,
    arguments: list[str],
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save, saved = PIL.Image.Image.save, []

    def fills(self: PIL.Image.Image, path: Any, *more: object, **options: object) -> None:
        saved.append(path)
        if len(saved) > 20:
            raise OSError(28, "No space left on device", str(path))
        save(self, path, *more, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image.Image, "save", fills)
        assert run.main(arguments) == 3
    assert re.search(r"error: the disk is full .*give the same command again", capsys.readouterr().err)
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 20
    assert run.main(arguments) == 1


def test_a_model_of_another_size_is_refused_before_any_work(
    arguments: list[str], models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Small:
        def to(self, device: str) -> None: ...

        def __call__(self, prompts: Sequence[str], seeds: Sequence[int], **options: object) -> Tensor:
            return torch.zeros(len(prompts), 3, 32, 48)

    monkeypatch.setattr(pipeline, "load_student", lambda name: Small())
    assert run.main(arguments) == 3
    assert "mine makes pictures of 48x32 px; this protocol judges 64x64 px" in capsys.readouterr().err
    assert models[0].drawn == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "1,zwei"], "--steps"),
        (["--steps", "0"], "--steps"),
        (["--steps", "2,2"], "--steps"),
        (["--prompts", "0"], "--prompts is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--guidance-scale", "0.5"], "--guidance-scale is 0.5"),
        (["--guidance-scale", "nan"], "--guidance-scale is nan"),
        (["--teacher-steps", "0"], "--teacher-steps is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--price-per-hour", "-2"], "--price-per-hour is -2"),
        (["--protocol", "coco"], "no protocol 'coco'; there are shapes, general"),
        (["--suite", "nowhere.jsonl"], "no prompt suite 'nowhere.jsonl'"),
        (["--floor", "nowhere.yaml"], "no floor can be read"),
        (["--student", "shapes-teacher"], "--student is the teacher itself"),
        (["--protocol", "general"], "protocol general judges SDXL-class models"),
        (["--protocol", "general", "--teacher", "a/b", "--student", "shapes-student"], "judges SDXL-class models"),
        (["--protocol", "general", "--teacher", "a/b"], "needs 3 more files in"),
    ],
)
def test_bad_settings_end_in_one_message_and_code_3(
    tmp_path: pathlib.Path,
    arguments: list[str],
    models: Models,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    message: str,
) -> None:
    assert run.main([*arguments, "--data", str(tmp_path / "data"), *wrong]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and message in said.err
    assert models[0].asked == []
    assert not (tmp_path / "report").exists() and not (tmp_path / "cache").exists()


def test_an_unknown_option_is_not_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="3"):
        run.main(["--speed"])
    assert "unrecognized arguments: --speed" in capsys.readouterr().err


def test_an_unknown_model_ends_in_code_3(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*arguments, "--teacher", "./nowhere"]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_a_file_in_the_folder_s_place_ends_in_code_3(
    tmp_path: pathlib.Path, arguments: list[str], models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").write_text("mine")
    assert run.main(arguments) == 3
    assert "is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "report").read_text() == "mine"
    assert models[0].asked == []


def test_the_page_is_whole_by_itself_and_quotes_prompts_as_text(
    tmp_path: pathlib.Path, arguments: list[str], models: Models, toy_suite: pathlib.Path
) -> None:
    lines = toy_suite.read_text().splitlines()
    first = json.loads(lines[0]) | {"text": "<script>alert('x')</script>", "asks": None}
    toy_suite.write_text("\n".join([json.dumps(first), *lines[1:]]))
    run.main(arguments)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:image/)", page)
    assert page.count("data:image/png;base64,") > 50
    for words in ("FAIL", "How to reproduce", "Where the student falls furthest behind", "many seeds", "Fingerprints"):
        assert words in page


def test_the_table_is_aligned(tmp_path: pathlib.Path, arguments: list[str], models: Models) -> None:
    run.main(arguments)
    _, heading, *lines = report.table(_report(tmp_path)).split("\n\n")[0].splitlines()
    for column in ("accuracy", "CLIP"):
        end = heading.index(column) + len(column)
        assert all(line[end - 1].isdigit() and line[end : end + 1] in ("", " ") for line in lines)


def test_two_processes_say_what_one_says(tmp_path: pathlib.Path) -> None:
    """On the shipped models: generating is shared through gloo, the numbers are the same."""
    base = [
        "-m",
        "eval.run",
        "--prompts",
        "60",
        "--steps",
        "1",
        "--teacher-steps",
        "4",
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = []
    for name, command in (("one", base), ("two", [*launch, *base])):
        folder = tmp_path / name
        options = ["--cache", str(folder / "cache"), "--out", str(folder / "report")]
        done = subprocess.run(
            [sys.executable, *command, *options], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert (folder / "report" / "report.json").is_file(), done.stderr
        found.append(_report(folder))
    one, two = found
    assert one["fingerprints"] == two["fingerprints"]
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row["values"] == other["values"]
        assert row["slices"] == other["slices"]
    pictures = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "cache").rglob("*.png")} for name in ("one", "two")
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) >= 2 * 60


def test_a_defect_of_ours_is_no_verdict(
    arguments: list[str], models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "load_student", lambda name: 1 / 0)
    assert run.main(arguments) == 3
    assert "ZeroDivisionError" in caplog.text


def test_a_suite_whose_edge_cases_alone_are_asked_still_has_a_report(
    tmp_path: pathlib.Path, arguments: list[str], models: Models, toy_suite: pathlib.Path
) -> None:
    lines = [json.loads(line) for line in toy_suite.read_text().splitlines()]
    toy_suite.write_text("\n".join(json.dumps(line if line["edge_case"] else line | {"asks": None}) for line in lines))
    assert run.main(arguments) in (1, 2)
    because = _report(tmp_path)["rows"][1]["verdict"]["because"]
    assert _report(tmp_path)["reference"] == "none"
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert because


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run.main(["--help"])
    shown = capsys.readouterr().out
    assert "INCONCLUSIVE" in shown
    assert all(f"--{name}" in shown for name in ("protocol", "suite", "floor", "cache", "data", "baseline", "beside"))
