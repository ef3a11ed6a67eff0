"""The model card: what it says of a student, and that it says so where nothing was measured."""

import copy
import pathlib
from typing import Any

import huggingface_hub
import pytest

from diffusion_kd import card

LINEAGE: dict[str, Any] = {
    "teacher": "owner/teacher",
    "teacher_from": "hub",
    "teacher_sha256": {"unet": "a" * 64, "vae": "b" * 64},
    "start": None,
    "data": "folder pictures, 5 images",
    "images_seen": 800,
    "seed": 3,
    "config": {"precision": "bf16"},
    "code": "0.1.0+abc",
    "checkpoint": "step-000000100",
    "licences": [
        {
            "covers": "teacher owner/teacher",
            "name": "openrail++",
            "kind": "allows derivatives",
            "found_in": "README.md",
        },
        {
            "covers": "data",
            "name": "CC-BY-NC-4.0",
            "kind": "non-commercial",
            "found_in": "the data's manifest",
            "items": 1200,
        },
    ],
    "acceptances": [],
}
CONTENT: dict[str, Any] = {
    "schema_version": 1,
    "objective": "add",
    "student_timesteps": {"1": [999], "2": [999, 499], "4": [999, 749, 499, 249]},
    "prediction_type": "epsilon",
    "size_px": 512,
    "lineage": LINEAGE,
    "guidance_scale": 0.0,
}
LORA = CONTENT | {"base": {"model": "owner/teacher", "probe": {}}}
EVALUATION = card.Evaluation(
    "Protocol `shapes`.", "PASS", ["student, 1 step"], [("FD[a|b], shapes", ["1.2 (1 to 2)"]), ("KID", [None])]
)


def matter(text: str, tmp_path: pathlib.Path) -> Any:
    (tmp_path / "README.md").write_text(text)
    return huggingface_hub.metadata_load(tmp_path / "README.md")


def test_the_front_matter_is_what_a_hub_reads(tmp_path: pathlib.Path) -> None:
    assert matter(card.text(CONTENT), tmp_path) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "owner/teacher",
        "license": "openrail++",
        "tags": ["text-to-image", "stable-diffusion-xl", "distillation", "few-step", "add"],
    }
    assert matter(card.text(LORA), tmp_path)["tags"][-1] == "lora"


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ([], {"license": "unknown"}),
        ([("unknown", "unknown")], {"license": "unknown"}),
        ([("house licence", "unknown")], {"license": "other", "license_name": "house licence"}),
        ([("MIT", "allows derivatives")], {"license": "mit"}),
        ([("MIT", "allows derivatives"), ("CC-BY-NC-4.0", "non-commercial")], {"license": "cc-by-nc-4.0"}),
    ],
)
def test_the_student_has_the_strictest_licence_of_its_models(
    tmp_path: pathlib.Path, licences: list[tuple[str, str]], expected: dict[str, str]
) -> None:
    content = copy.deepcopy(CONTENT)
    content["lineage"]["licences"] = [
        {"covers": f"teacher {index}", "name": name, "kind": kind, "found_in": "README.md"}
        for index, (name, kind) in enumerate(licences)
    ]
    found = matter(card.text(content), tmp_path)
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected


def test_a_local_teacher_is_no_base_model_and_its_folder_stays_ours(tmp_path: pathlib.Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["lineage"] |= {"teacher": "/home/ada/models/teacher", "teacher_from": "folder"}
    content["lineage"]["licences"][0]["covers"] = "teacher /home/ada/models/teacher"
    text = card.text(content)
    assert "base_model" not in matter(text, tmp_path) and "/home/ada" not in text and "`teacher`" in text


def test_how_to_use_fits_the_student() -> None:
    full, lora = card.text(CONTENT), card.text(LORA)
    assert 'StableDiffusionXLPipeline.from_pretrained("path/to/this/folder")' in full and "load_lora" not in full
    assert 'StableDiffusionXLPipeline.from_pretrained("owner/teacher")' in lora
    assert 'load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")' in lora
    assert 'LCMScheduler.from_pretrained("path/to/this/folder", subfolder="scheduler")' in lora
    assert "guidance_scale=0, height=512, width=512)" in lora and "height" not in full
    for text in (full, lora):
        assert 'pipe("a prompt", num_inference_steps=4, guidance_scale=0' in text
        assert "is one of 1, 2 or 4" in text and "1: 999; 2: 999, 499; 4: 999, 749, 499, 249" in text
        compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_lineage_is_told_in_full() -> None:
    text = card.text(CONTENT)
    for row in (
        "| teacher | `owner/teacher` |",
        f"| SHA-256 of the teacher's parts | unet `{'a' * 16}`; vae `{'b' * 16}` |",
        "| started from | the teacher |",
        "| data | folder pictures, 5 images |",
        "| images seen | 800 |",
        "| checkpoint | `step-000000100` |",
        "| code | diffusion-kd `0.1.0+abc` |",
        "| data | CC-BY-NC-4.0 | non-commercial | 1,200 | the data's manifest |",
        "- data is under CC-BY-NC-4.0: not for commercial use.",
        '"precision": "bf16"',
    ):
        assert row in text
    assert "no legal advice" in text


def test_an_acceptance_is_told() -> None:
    content = copy.deepcopy(CONTENT)
    content["lineage"]["acceptances"] = [
        {"licence": "CC-BY-ND-4.0", "covers": "data", "accepted_by": "Ada", "on": "2026-03-01"}
    ]
    assert "Ada stated on 2026-03-01 to have leave to use what is under CC-BY-ND-4.0 (data) for this." in card.text(
        content
    )


def test_a_bare_lineage_makes_a_card_too(tmp_path: pathlib.Path) -> None:
    text = card.text(CONTENT | {"lineage": {}})
    assert matter(text, tmp_path)["license"] == "unknown"
    assert "| SHA-256 of the teacher's parts | not measured |" not in text
    assert "| SHA-256 of the teacher's parts | unknown |" in text and "Not recorded." in text


def test_an_evaluation_is_put_in_and_replaced_and_the_rest_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / card.NAME
    path.write_text(card.text(CONTENT) + "\nA note of somebody's.\n")
    assert "All metrics: not measured." in path.read_text()
    path.write_text(card.with_evaluation(tmp_path, CONTENT, EVALUATION))
    again = card.with_evaluation(tmp_path, CONTENT, EVALUATION)
    assert again == path.read_text() and again.endswith("A note of somebody's.\n")
    assert (
        "| metric | student, 1 step |\n| --- | --- |\n| FD[a\\|b], shapes | 1.2 (1 to 2) |\n| KID | not measured |"
        in again
    )
    assert "**PASS**" in again and "All metrics: not measured" not in again


@pytest.mark.parametrize("present", [None, "a card of somebody else's", "<!-- evaluation --> cut off"])
def test_a_card_without_its_marks_is_written_anew(tmp_path: pathlib.Path, present: str | None) -> None:
    if present is not None:
        (tmp_path / card.NAME).write_text(present)
    assert card.with_evaluation(tmp_path, CONTENT, EVALUATION) == card.text(CONTENT, EVALUATION)
