"""Exports of a run without training, what licences allow, and an evaluation in the card of a student that stands."""

import copy
import datetime
import json
import pathlib
from typing import Any

import pytest
import safetensors.torch
import torch

from diffusion_kd import artifact, errors, licences, pipeline
from diffusion_kd.networks import lora, sdxl
from eval import fingerprint, images
from tests import original_naming, tiny, toys
from training import checkpoint, distill, export, release
from training import config as configs

DAY = datetime.date(2026, 3, 1)
ADA = licences.Acceptance(("cc by nd",), "Ada", DAY)


@pytest.fixture
def teacher(tmp_path: pathlib.Path) -> pathlib.Path:
    artifact.save_pipeline(tmp_path / "teacher", parts=toys.tiny_parts())
    return tmp_path / "teacher"


def make_run(folder: pathlib.Path, teacher: pathlib.Path, *, averaged: bool = True, **origin: object) -> Any:
    """What training.distill leaves: config.yaml, origin.json and a checkpoint. Returns the weights in it.

    A LoRA run if the folder's name begins with lora.
    """
    rank = 4 if folder.name.startswith("lora") else 0
    unet = artifact.load(str(teacher)).unet
    unet.requires_grad_(True)
    torch.manual_seed(3)
    if rank:
        lora.add(unet, rank, 8.0)
    weights = {
        name: weight.detach() + 0.1 * torch.randn_like(weight)
        for name, weight in unet.named_parameters()
        if weight.requires_grad
    }
    said = {"teacher": str(teacher), "start": None, "data": "folder pictures, 5 images", **origin}
    configs.claim(folder, said, write=True)
    overrides = [f"lora_rank={rank}", f"lora_alpha={2 * rank}", "training.batch_size=4"]
    configs.save(configs.load(distill.DistillConfig, "shapes_add", overrides), folder / "config.yaml")
    networks: dict[str, Any] = {"student": {f"student.unet.{name}": 2 * each for name, each in weights.items()}}
    if averaged:
        networks["average"] = {"updates": 1, "values": weights}
    with checkpoint.Checkpoints(folder / "training" / checkpoint.FOLDER) as kept:
        kept.save(25, networks, healthy=True)
    return weights


def stored(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "unet").glob("*.safetensors")
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_a_run_is_exported_in_the_precision_asked_for(
    tmp_path: pathlib.Path, teacher: pathlib.Path, dtype: str, expected: torch.dtype
) -> None:
    weights = make_run(tmp_path / "run", teacher)
    export.main(["--run", str(tmp_path / "run"), "--dtype", dtype])
    found = stored(tmp_path / "run" / "student")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight.to(expected)) for name, weight in weights.items())
    lineage = artifact.read_distillation(str(tmp_path / "run" / "student")).lineage
    assert lineage["images_seen"] == 100 and lineage["checkpoint"] == "step-000000025"
    assert lineage["teacher_from"] == "folder" and lineage["teacher_sha256"] == artifact.part_hashes(str(teacher))
    assert lineage["config"]["training"]["batch_size"] == 4


def test_without_an_average_the_student_itself_is_exported(tmp_path: pathlib.Path, teacher: pathlib.Path) -> None:
    weights = make_run(tmp_path / "run", teacher, averaged=False)
    export.main(["--run", str(tmp_path / "run"), "--dtype", "fp32", "--out", str(tmp_path / "out")])
    found = stored(tmp_path / "out")
    assert all(torch.equal(found[name], 2 * weight) for name, weight in weights.items())
    assert not (tmp_path / "run" / "student").exists()


def test_a_lora_run_gives_adapters_or_a_pipeline_that_draw_the_same(
    tmp_path: pathlib.Path, teacher: pathlib.Path
) -> None:
    make_run(tmp_path / "lora", teacher)
    for more in ([], ["--fuse"], ["--format", "pipeline"]):
        out = tmp_path / "".join(["out", *more])
        export.main(["--run", str(tmp_path / "lora"), "--dtype", "fp32", "--out", str(out), *more])
    names = ["out", "out--fuse", "out--formatpipeline"]
    assert [artifact.is_lora(str(tmp_path / name)) for name in names] == [True, False, False]
    drawn = [pipeline.load_student(str(tmp_path / name))(["a red circle"], [3], steps=2) for name in names]
    assert torch.allclose(drawn[0], drawn[1], atol=1e-4) and torch.equal(drawn[1], drawn[2])
    teachers = pipeline.FewStepPipeline(artifact.load(str(teacher)), {2: [999, 499]})
    assert not torch.allclose(drawn[0], teachers(["a red circle"], [3], steps=2), atol=0.01)


def test_a_lora_started_from_a_lora_is_written_as_a_pipeline(
    tmp_path: pathlib.Path, teacher: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "lora", teacher)
    export.main(["--run", str(tmp_path / "lora")])
    make_run(tmp_path / "lora-more", teacher, start=str(tmp_path / "lora" / "student"))
    export.main(["--run", str(tmp_path / "lora-more")])
    assert "two do not fit into one file" in caplog.text
    assert not artifact.is_lora(str(tmp_path / "lora-more" / "student"))
    first, second = (
        artifact.load(str(tmp_path / name / "student")).unet.state_dict() for name in ("lora", "lora-more")
    )
    base = artifact.load(str(teacher)).unet.state_dict()
    name = "mid_block.attentions.0.proj_in.weight"  # the same adapters twice
    assert torch.allclose(second[name] - base[name], 2 * (first[name] - base[name]), atol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "origin.json").unlink(), "no run of training.distill"),
        (lambda run: (run / "origin.json").write_text("[]"), "origin.json cannot be read"),
        (lambda run: (run / "training" / checkpoint.FOLDER).rename(run / "away"), "holds no checkpoint to go by"),
        (lambda run: (run / "config.yaml").write_text("lora_rank: 2"), "is of another student: .* weights differ"),
        (lambda run: (run / "config.yaml").write_text("sedd: 2"), "unknown config key"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(
    tmp_path: pathlib.Path, teacher: pathlib.Path, change: Any, message: str
) -> None:
    make_run(tmp_path / "run", teacher)
    change(tmp_path / "run")
    with pytest.raises(errors.ConfigError, match=message):
        export.main(["--run", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "student").exists()


def test_options_that_contradict_are_refused(tmp_path: pathlib.Path, teacher: pathlib.Path) -> None:
    make_run(tmp_path / "run", teacher)
    with pytest.raises(errors.ConfigError, match="there is no LoRA to export"):
        export.main(["--run", str(tmp_path / "run"), "--format", "lora"])
    for arguments in ([], ["--out", "x"], ["--report", "x"], ["--run", "x", "--fuse", "--format", "lora"]):
        with pytest.raises(SystemExit):
            export.main(arguments)
    with pytest.raises(errors.ConfigError, match="holds no exported student; give the run"):
        export.main(["--out", str(tmp_path / "nothing"), "--report", "report.json"])


@pytest.mark.parametrize("rank", [0, 2])
def test_a_finished_run_is_exported_again_as_it_was(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path, rank: int
) -> None:
    more = ["--teacher-licence", "mit", f"lora_rank={rank}"]
    distill.main(tiny.arguments(models, tmp_path / "run", "--data", str(pictures), *more))
    export.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--teacher-licence", "mit"])
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "run" / "student", tmp_path / "again")
    )
    assert first == second and len(first) == (1 if rank else 4)
    known = [artifact.read_distillation(str(tmp_path / name)) for name in ("run/student", "again")]
    assert known[0].student_timesteps == known[1].student_timesteps
    assert known[0].lineage == known[1].lineage and known[0].lineage["checkpoint"] == "step-000000004"


# --- licences ---------------------------------------------------------------------------------------


def test_a_teacher_that_forbids_is_refused_until_somebody_accepts(
    tmp_path: pathlib.Path, teacher: pathlib.Path
) -> None:
    make_run(tmp_path / "run", teacher)
    (teacher / "README.md").write_text("---\nlicense: cc-by-nd-4.0\n---\n")
    with pytest.raises(errors.ArtifactError, match=r"is under CC-BY-ND-4\.0 \(README\.md\), which forbids derivatives"):
        export.main(["--run", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "student").exists()
    export.main(["--run", str(tmp_path / "run"), "--accept-licence", "CC BY-ND 4.0", "--accepted-by", "Ada"])
    (accepted,) = artifact.read_distillation(str(tmp_path / "run" / "student")).lineage["acceptances"]
    today = datetime.datetime.now(datetime.UTC).date()
    assert accepted["licence"] == "CC-BY-ND-4.0" and accepted["accepted_by"] == "Ada"
    assert abs((today - datetime.date.fromisoformat(accepted["on"])).days) <= 1
    assert "Ada stated on" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_data_that_forbids_is_refused_too(tmp_path: pathlib.Path, teacher: pathlib.Path) -> None:
    make_run(tmp_path / "run", teacher, data_licences={"cc-by-4.0": 4, "CC BY-NC-ND 4.0": 1})
    with pytest.raises(errors.ArtifactError, match=r"data is under CC-BY-NC-ND-4\.0"):
        export.main(["--run", str(tmp_path / "run"), "--teacher-licence", "mit", "--accept-licence", "cc-by-nd"])
    export.main(["--run", str(tmp_path / "run"), "--teacher-licence", "mit", "--accept-licence", "cc-by-nc-nd"])
    lineage = artifact.read_distillation(str(tmp_path / "run" / "student")).lineage
    assert [(each["covers"], each["name"], each.get("items")) for each in lineage["licences"]] == [
        (f"teacher {teacher}", "MIT", None),
        ("data", "CC-BY-4.0", 4),
        ("data", "CC-BY-NC-ND-4.0", 1),
    ]


def test_the_start_has_a_licence_as_well(teacher: pathlib.Path) -> None:
    (teacher / "LICENSE").write_text("Attribution-NoDerivatives 4.0 International\n")
    said = {"teacher": "shapes-teacher", "start": str(teacher)}
    with pytest.raises(errors.ArtifactError, match=r"start .* is under CC-BY-ND-4\.0 \(LICENSE\)"):
        release.require_licences(said, licences.Acceptance())
    found = release.require_licences(said, ADA)
    assert [each["name"] for each in found["licences"]] == ["Apache-2.0", "CC-BY-ND-4.0"]
    assert [each["accepted_by"] for each in found["acceptances"]] == ["Ada"]


def test_a_single_file_has_the_licence_that_is_stated() -> None:
    for stated, expected in (("mit", "MIT"), ("", "unknown")):
        (found,) = release.require_licences({"teacher": "a.safetensors"}, ADA, teacher_licence=stated)["licences"]
        assert found["name"] == expected


# --- reports ----------------------------------------------------------------------------------------


@pytest.fixture
def student(tmp_path: pathlib.Path, teacher: pathlib.Path) -> pathlib.Path:
    make_run(tmp_path / "run", teacher)
    export.main(["--run", str(tmp_path / "run")])
    return tmp_path / "run" / "student"


def report_of(student: pathlib.Path) -> dict[str, Any]:
    value = {"name": "FD[toy]", "value": 1.25, "corrected": 1.0, "interval": [0.5, 1.5], "fingerprint": "f"}
    score = {"name": "CLIP score[toy]", "value": 0.75, "corrected": None, "interval": [0.7, 0.8], "fingerprint": "c"}
    rows = [
        {"model": "teacher", "steps": 50, "values": {"fd": value}, "speed": {"latency_s": 2.0}},
        {
            "model": "student",
            "steps": 1,
            "values": {"fd": value | {"value": None}, "clip_score": score, "fd_to_teacher": value},
            "speed": {"latency_s": 0.05},
            "verdict": {"outcome": "PASS"},
        },
    ]
    return {
        "schema_version": fingerprint.REPORT_SCHEMA_VERSION,
        "verdict": "PASS",
        "protocol": {
            "id": "shapes",
            "as_written": True,
            "prompts": 8,
            "edge_cases": 2,
            "images_per_prompt": 2,
            "resolution_px": 16,
            "device": "cpu",
        },
        "models": {"student": {"artifact_sha256": images.artifact_sha256.__wrapped__(str(student))}},
        "reference": "renders",
        "rows": rows,
        "fingerprints": {"f": {"network": "toy"}},
    }


def test_a_report_is_put_into_the_card_and_nothing_else_changes(tmp_path: pathlib.Path, student: pathlib.Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report_of(student)))
    before = {each: each.read_bytes() for each in student.rglob("*") if each.is_file() and each.name != "README.md"}
    for _ in range(2):  # the card is no part of what was judged, so it may be done again
        export.main(["--out", str(student), "--report", str(path)])
    text = (student / "README.md").read_text()
    for line in (
        "| metric | teacher, 50 steps | student, 1 step |",
        "| FD[toy], shapes | 1.25 (0.5 to 1.5 without bias) | not measured |",
        "| CLIP score[toy], shapes | not measured | 0.75 (0.7 to 0.8) |",
        "| FD[toy], shapes, to the teacher | not measured | 1.25 (0.5 to 1.5 without bias) |",
        "| recall | not measured | not measured |",
        "| seconds for one picture | 2 | 0.05 |",
        "| quality floor |  | PASS |",
        "Protocol `shapes`: 8 prompts and 2 edge cases, 2 pictures each at 16 px, on cpu.",
    ):
        assert line in text
    assert text.count("## Evaluation") == 1
    assert {each: each.read_bytes() for each in before} == before
    assert sorted(each.name for each in student.iterdir() if each.is_file()) == [
        "README.md",
        "distillation.json",
        "model_index.json",
    ]


def test_a_report_of_another_student_is_refused(tmp_path: pathlib.Path, student: pathlib.Path) -> None:
    report = report_of(student)
    path = student / "unet" / "config.json"
    path.write_text(path.read_text() + "\n")
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(errors.ConfigError, match=r"is of another student than .* as it is now"):
        export.main(["--out", str(student), "--report", str(tmp_path / "report.json")])
    assert "All metrics: not measured" in (student / "README.md").read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 2}', None])
def test_what_is_no_report_is_refused(tmp_path: pathlib.Path, student: pathlib.Path, content: str | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(errors.ConfigError, match=r"schema version 1|is no report of eval"):
        export.main(["--out", str(student), "--report", str(path)])


def test_the_report_of_the_shipped_student_is_told() -> None:
    report = json.loads((artifact.SHIPPED["shapes-student"].parent / "report.json").read_text())
    told = release.evaluation(copy.deepcopy(report))
    rows = dict(told.rows)
    assert told.verdict == report["verdict"] and len(told.models) == len(report["rows"])
    assert "prompt accuracy[shapes-oracle], shapes" in rows and "FD[shapes-encoder], shapes, to the teacher" in rows
    assert all(len(values) == len(told.models) for values in rows.values())
    assert len(rows) == len(told.rows)  # no two rows of one name


def test_a_single_file_becomes_a_folder_that_everything_takes(tmp_path: pathlib.Path) -> None:
    parts = sdxl.build_parts("cpu", original_naming.NARROW)
    artifact.save_pipeline(tmp_path / "base", parts=parts)
    for weight in parts.unet.parameters():
        weight.data.add_(0.01)
    original_naming.save(tmp_path / "model.safetensors", parts, dtype=torch.float16)
    file, base = str(tmp_path / "model.safetensors"), str(tmp_path / "base")
    with pytest.raises(errors.ModelError, match=rf"training\.export --file {file} --out FOLDER"):
        images.artifact_sha256(file)
    export.main(["--file", file, "--base", base, "--out", str(tmp_path / "folder"), "--dtype", "fp32"])
    folder, single = artifact.load(str(tmp_path / "folder")), artifact.load(file, base=base)
    for part in ("unet", "vae", "text"):
        ours, theirs = getattr(folder, part).state_dict(), getattr(single, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(images.artifact_sha256(str(tmp_path / "folder"))) == 64


@pytest.mark.parametrize(
    "more", [[], ["--out", "x", "--fuse"], ["--out", "x", "--teacher-licence", "mit"], ["--run", "r"]]
)
def test_what_does_not_go_with_a_single_file_is_a_usage_error(more: list[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(["--file", "model.safetensors", *more])


def test_a_file_is_not_written_over_something_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / "diary.txt").write_text("dear")
    with pytest.raises(errors.ConfigError, match="is not empty"):
        export.main(["--file", "model.safetensors", "--out", str(tmp_path)])
