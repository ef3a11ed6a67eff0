"""Protocols: what they ask, what they miss, and what is no data of theirs."""

import json
import pathlib
from typing import Any

import pytest

from diffusion_kd import errors
from eval import gate, protocols, suites

REAL = [name for name in protocols.PROTOCOLS if name != "shapes"]


def test_the_protocols_of_the_field_are_there() -> None:
    assert {"shapes", "coco17-5k-512-vitg14", "coco14-10k-512", "coco14-30k-256", "mlperf-sdxl-5k"} <= set(
        protocols.PROTOCOLS
    )
    with pytest.raises(errors.ConfigError, match="no protocol 'mlperf'; there are shapes, general"):
        protocols.named("mlperf")


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_a_protocol_hangs_together(name: str) -> None:
    protocol = protocols.named(name)
    assert gate.load(gate.FLOORS / f"{protocol.floor}.yaml").floors
    assert protocol.crop_px <= protocol.resolution_px
    needed = {need.path for need in protocol.requirements}
    named = {spec.split(":")[-1] for spec in (protocol.features, protocol.clip, protocol.distance)} - {"shapes-encoder"}
    named |= {path for path in (protocol.latents, protocol.reference) if path and path != "renders"}
    assert named <= needed  # every file that is opened is asked for at the start


@pytest.mark.parametrize("name", REAL)
def test_what_is_missing_is_told_with_its_place_and_source(name: str, tmp_path: pathlib.Path) -> None:
    protocol = protocols.named(name)
    told = protocol.missing(tmp_path)
    assert told is not None
    for need in protocol.requirements:
        assert need.path in told and need.how in told
        (tmp_path / need.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / need.path).touch()
    assert protocol.missing(tmp_path) is None


def test_the_embedded_protocol_needs_nothing(tmp_path: pathlib.Path) -> None:
    assert protocols.named("shapes").missing(tmp_path) is None
    assert protocols.named("shapes").suite(tmp_path) == suites.load("shapes")


def test_mlperf_s_numbers_are_mlperf_s() -> None:
    protocol = protocols.named("mlperf-sdxl-5k")
    assert (protocol.teacher_steps, protocol.guidance_scale, protocol.resolution_px) == (20, 8.0, 1024)
    assert protocol.windows == {"fd": (23.01085758, 23.95007626), "clip_score": (31.68631873, 31.81331801)}
    assert "quickgelu" in protocol.clip  # without it OpenAI's weights compute something else, and silently


def _write(path: pathlib.Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


CAPTIONS: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 3, "file_name": "000000000003.jpg"}],
    "annotations": [
        {"image_id": 3, "id": 1, "caption": "first of three"},
        {"image_id": 7, "id": 2, "caption": " a\n dog "},
        {"image_id": 3, "id": 3, "caption": "second of three"},
    ],
}


def test_coco_17_takes_the_first_caption_of_each_image(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "coco2017/annotations/captions_val2017.json", json.dumps(CAPTIONS))
    suite = protocols.named("coco17-5k-512-vitg14").suite(tmp_path)
    assert [(prompt.id, prompt.text) for prompt in suite.prompts] == [
        ("000000000007", "a dog"), ("000000000003", "first of three")
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["{", "{}", json.dumps({**CAPTIONS, "annotations": []}), json.dumps([1])])
def test_captions_that_are_none_are_refused(tmp_path: pathlib.Path, content: str) -> None:
    _write(tmp_path / "coco2017/annotations/captions_val2017.json", content)
    with pytest.raises(errors.DataError, match="not a COCO captions file"):
        protocols.named("coco17-5k-512-vitg14").suite(tmp_path)


def test_lists_of_prompts_must_be_long_enough(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "coco10k/all_prompts.txt", "a dog\n" * 9_999)
    with pytest.raises(errors.DataError, match="9999 lines; this protocol asks 10000"):
        protocols.named("coco14-10k-512").suite(tmp_path)
    _write(tmp_path / "coco10k/all_prompts.txt", "a dog\n" * 10_001)
    assert len(protocols.named("coco14-10k-512").suite(tmp_path).prompts) == 10_000


def test_mlperf_reads_its_table(tmp_path: pathlib.Path) -> None:
    heading = "id\timage_id\tcaption\theight\twidth\tfile_name\tcoco_url\n"
    rows = [f'{number}\t1\tA "quoted" dog {number}\t480\t640\tx.jpg\thttp://x\n' for number in range(5000)]
    _write(tmp_path / "mlperf/captions_source.tsv", heading + "".join(rows))
    suite = protocols.named("mlperf-sdxl-5k").suite(tmp_path)
    assert (suite.prompts[0].id, suite.prompts[-1].text) == ("0", 'A "quoted" dog 4999')
    _write(tmp_path / "mlperf/captions_source.tsv", heading + "".join(rows[:-1]))
    with pytest.raises(errors.DataError, match="5000 rows"):
        protocols.named("mlperf-sdxl-5k").suite(tmp_path)
