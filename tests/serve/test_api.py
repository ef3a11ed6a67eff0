"""`/v1/images` from outside: fields, refusals, seeds, files, streams, links."""

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from tests.serve.conftest import Start
from tests.serve.live import PROMPT, Live, opened, refused

GENERATIONS = "/v1/images/generations"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "turbo", "prompt": PROMPT, **fields}


def premium(**fields: Any) -> dict[str, Any]:
    return body(**({"model": "premium", "num_inference_steps": 3} | fields))


def made(user: httpx.Client, given: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = user.post(GENERATIONS, json=given, headers=headers)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def files(answer: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(image["b64_json"]) for image in answer["data"]]


def events(user: httpx.Client, given: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    with user.stream("POST", GENERATIONS, json={**given, "stream": True}, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = list(answer.iter_lines())
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names == [event["type"] for event in found]
    return found


# --- answers ----------------------------------------------------------------------------------------


def test_an_answer_has_what_the_contract_says_and_no_more(user: httpx.Client) -> None:
    answer = made(user, body(n=2, seed=5))
    assert set(answer) == {
        *("created", "data", "model", "model_version", "size", "output_format", "usage", "warnings"),
    }
    assert [set(image) for image in answer["data"]] == [{"b64_json", "seed"}] * 2
    assert set(answer["usage"]) == {"compute_ms", "cost_usd", "premium_cost_usd"}
    assert set(answer["usage"]["compute_ms"]) == {"text", "denoise", "decode", "encode", "queue"}
    assert answer["usage"]["cost_usd"] > 0 and answer["usage"]["compute_ms"]["denoise"] > 0
    assert answer["model"] == "turbo" and answer["model_version"].startswith("shapes-student@")
    assert answer["warnings"] == [] and answer["size"] == "64x64" and answer["output_format"] == "png"


def test_premium_costs_what_premium_costs_and_turbo_says_what_it_would_have(user: httpx.Client) -> None:
    turbo, of_premium = made(user, body())["usage"], made(user, premium())["usage"]
    assert of_premium["cost_usd"] == of_premium["premium_cost_usd"]
    assert turbo["premium_cost_usd"] > 2 * turbo["cost_usd"]


def test_the_seed_of_image_i_is_seed_plus_i(user: httpx.Client) -> None:
    three = made(user, body(n=3, seed=100))
    assert [image["seed"] for image in three["data"]] == [100, 101, 102]
    for index in range(3):
        alone = opened(files(made(user, body(seed=100 + index)))[0])
        apart = np.abs(np.asarray(alone, np.int16) - np.asarray(opened(files(three)[index]), np.int16))
        assert apart.max() <= 1


@pytest.mark.parametrize("given", [body(), premium()])
def test_a_drawn_seed_is_returned_and_makes_the_image_again(given: dict[str, Any], user: httpx.Client) -> None:
    first, second = made(user, given), made(user, given)
    seeds = [answer["data"][0]["seed"] for answer in (first, second)]
    assert seeds[0] != seeds[1]
    assert files(made(user, given | {"seed": seeds[0]})) == files(first)


def test_the_last_seed_works(user: httpx.Client) -> None:
    answer = made(user, body(seed=2**32 - 2, n=2))
    assert [image["seed"] for image in answer["data"]] == [2**32 - 2, 2**32 - 1]


def test_png_says_what_made_it(user: httpx.Client) -> None:
    prompt = 'a "красный" circle\n<tag> \N{SNOWMAN}'
    answer = made(user, premium(prompt=prompt, seed=9))
    text = opened(files(answer)[0]).text  # type: ignore[attr-defined]
    assert text["prompt"] == prompt
    assert (text["seed"], text["tier"], text["steps"]) == ("9", "premium", "3")
    assert text["model_version"] == answer["model_version"]


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(output_format: str, kind: str, user: httpx.Client) -> None:
    answer = made(user, body(output_format=output_format, seed=1))
    assert opened(files(answer)[0]).format == kind and answer["output_format"] == output_format


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_is_honoured(output_format: str, user: httpx.Client) -> None:
    small, large = (
        len(files(made(user, body(output_format=output_format, output_compression=quality, seed=1)))[0])
        for quality in (0, 100)
    )
    assert small < large


def test_steps_guidance_and_negative_prompt_are_honoured(user: httpx.Client) -> None:
    changes = [
        {},
        {"num_inference_steps": 4},
        {"guidance_scale": 6},
        {"guidance_scale": 1},
        {"negative_prompt": "a large red circle"},
    ]
    pictures = [files(made(user, premium(seed=3, **change)))[0] for change in changes]
    assert len({opened(picture).tobytes() for picture in pictures}) == len(changes)
    turbo = [files(made(user, body(seed=3, num_inference_steps=steps)))[0] for steps in (1, 2, 3, 4)]
    assert len({opened(picture).tobytes() for picture in turbo}) == 4


def test_what_the_text_encoders_do_not_read_is_said(user: httpx.Client) -> None:
    (warning,) = made(user, body(prompt="a red circle and " * 200))["warnings"]
    assert warning.startswith("prompt has") and "were cut" in warning
    (warning,) = made(user, body(prompt="red " * 31))["warnings"]
    assert warning == "prompt has 33 tokens and the text encoders read 32: the last was cut"
    both = made(user, premium(prompt="red " * 500, negative_prompt="blue " * 500))["warnings"]
    assert [one.split()[0] for one in both] == ["prompt", "negative_prompt"]


def test_the_longest_prompt_is_read(user: httpx.Client) -> None:
    assert made(user, body(prompt="\N{SNOWMAN}" * 4000))["warnings"]


# --- refusals ---------------------------------------------------------------------------------------

REFUSALS: list[tuple[dict[str, Any], str]] = [
    (body(prompt=""), "prompt"),
    (body(prompt="a" * 4001), "prompt"),
    (body(prompt=None), "prompt"),
    (body(prompt=["a"]), "prompt"),
    (body(prompt=7), "prompt"),
    (body(model=""), "model"),
    (body(model=3), "model"),
    (body(n=0), "n"),
    (body(n=11), "n"),
    (body(n=-1), "n"),
    (body(n="1"), "n"),
    (body(n=True), "n"),
    (body(n=1.5), "n"),
    (body(size="64x65"), "size"),
    (body(size="64"), "size"),
    (body(size="064x64"), "size"),
    (body(size="64X64"), "size"),
    (body(size=" 64x64"), "size"),
    (body(size="64x64\n"), "size"),
    (body(size="99999999x9"), "size"),
    (body(response_format="b64"), "response_format"),
    (body(output_format="gif"), "output_format"),
    (body(output_format="jpeg", output_compression=101), "output_compression"),
    (body(output_format="jpeg", output_compression=-1), "output_compression"),
    (body(output_format="png", output_compression=50), "output_compression"),
    (body(stream="true"), "stream"),
    (body(stream=True, response_format="url"), "response_format"),
    (premium(partial_images=1), "partial_images"),
    (premium(partial_images=4, stream=True), "partial_images"),
    (premium(partial_images=3, stream=True), "partial_images"),
    (body(partial_images=1, stream=True), "partial_images"),
    (body(partial_images=2, stream=True, num_inference_steps=2), "partial_images"),
    (body(user="a" * 201), "user"),
    (body(user=1), "user"),
    (body(seed=-1), "seed"),
    (body(seed=2**32), "seed"),
    (body(seed=2**32 - 1, n=2), "seed"),
    (body(seed="1"), "seed"),
    (body(num_inference_steps=5), "num_inference_steps"),
    (body(num_inference_steps=0), "num_inference_steps"),
    (premium(num_inference_steps=101), "num_inference_steps"),
    (body(guidance_scale=1), "guidance_scale"),
    (body(negative_prompt=""), "negative_prompt"),
    (body(negative_prompt="blue"), "negative_prompt"),
    (body(allow_downgrade=True), "allow_downgrade"),
    (premium(guidance_scale=-0.1), "guidance_scale"),
    (premium(guidance_scale=30.1), "guidance_scale"),
    (premium(guidance_scale="3"), "guidance_scale"),
    (premium(guidance_scale=1, negative_prompt="blue"), "negative_prompt"),
    (premium(negative_prompt="a" * 4001), "negative_prompt"),
    (premium(allow_downgrade=1), "allow_downgrade"),
    (body(quality="hd"), "quality"),
    (body(sed=1), "sed"),
    (body(webhook_url="https://example.com/"), "webhook_url"),
]


@pytest.mark.parametrize(("given", "param"), REFUSALS)
def test_what_is_not_honoured_is_refused_by_name(given: dict[str, Any], param: str, user: httpx.Client) -> None:
    message = refused(user.post(GENERATIONS, json=given), 400, param)
    assert param in message


def test_refusals_cost_nothing(live: Live) -> None:
    key = live.new_key(requests_per_minute=1)
    user, before = live.client(key["secret"]), (live.passes("turbo"), live.passes("premium"))
    for given, _ in REFUSALS:
        user.post(GENERATIONS, json=given)
    assert (live.passes("turbo"), live.passes("premium")) == before
    assert user.get("/v1/usage").json()["total"]["requests"] == 0
    made(user, body())  # nor do they count against the key's rate


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'"a"', b"7"])
def test_a_body_that_is_no_object_is_told_so(content: bytes, user: httpx.Client) -> None:
    answer = user.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    assert "JSON object" in refused(answer, 400)


@pytest.mark.parametrize(
    "content", [b"{", b'{"prompt": "a', b'{"prompt": "a"}}', b"{'prompt': 'a'}", b"\xff\xfe{", b"["]
)
def test_a_body_that_is_not_json_is_told_so(content: bytes, user: httpx.Client) -> None:
    answer = user.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    assert "JSON" in refused(answer, 400, code="invalid_json")


# --- streams ----------------------------------------------------------------------------------------


def test_a_stream_of_several_images_says_which_is_which(user: httpx.Client) -> None:
    found = events(user, premium(n=2, seed=20, partial_images=2))
    completed = [event for event in found if event["type"] == "image_generation.completed"]
    partial = [event for event in found if event["type"] == "image_generation.partial_image"]
    assert [(event["image_index"], event["seed"]) for event in completed] == [(0, 20), (1, 21)]
    assert sorted((event["image_index"], event["partial_image_index"]) for event in partial) == [
        (image, number) for image in (0, 1) for number in (0, 1)
    ]
    whole = made(user, premium(n=2, seed=20))
    assert [event["b64_json"] for event in completed] == [image["b64_json"] for image in whole["data"]]
    assert completed[0]["usage"] == completed[1]["usage"] and completed[0]["model_version"] == whole["model_version"]


def test_previews_come_nearer_to_the_image(user: httpx.Client) -> None:
    found = events(user, premium(num_inference_steps=12, seed=4, partial_images=3))
    pictures = [np.asarray(opened(base64.b64decode(event["b64_json"])), np.float32) for event in found]
    apart = [float(np.square(picture - pictures[-1]).mean()) for picture in pictures[:-1]]
    assert len(apart) == 3 and apart[0] > apart[1] > apart[2] > 0


def test_what_a_stream_refuses_it_refuses_before_it_begins(user: httpx.Client, narrow: Live) -> None:
    refused(user.post(GENERATIONS, json=body(stream=True, n=99)), 400, "n")
    with narrow.occupied(by=(flooding := narrow.user())):
        answer = flooding.post(GENERATIONS, json=premium(stream=True))
    refused(answer, 503, code="overloaded")


def test_a_full_queue_of_one_key_lets_another_in(narrow: Live) -> None:
    with narrow.occupied(by=(flooding := narrow.user())):
        refused(flooding.post(GENERATIONS, json=premium(num_inference_steps=2)), 503, code="overloaded")
        made(narrow.user(), premium(num_inference_steps=2))


def test_whoever_leaves_a_stream_frees_the_device(narrow: Live) -> None:
    with narrow.occupied() as stream:
        narrow.until(lambda: narrow.passes("premium") > 0)
        stream.close()
        narrow.until(lambda: narrow.built.service.engine.active("premium") == 0, timeout_s=1)
        before = narrow.passes("premium")
        assert made(narrow.user(), premium(num_inference_steps=2))["data"]
        assert narrow.passes("premium") - before <= 3


def test_images_that_cannot_be_kept_are_no_fault_of_the_request(
    live: Live, user: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(live.built.service.pictures, "keep", away)
    refused(user.post(GENERATIONS, json=body(response_format="url")), 503, code="images_unavailable")
    assert user.get("/v1/usage").json()["total"]["requests"] == 0


def test_whoever_leaves_pays_for_what_was_taken(live: Live) -> None:
    user = live.user()
    with user.stream("POST", GENERATIONS, json=premium(num_inference_steps=100, stream=True)) as stream:
        before = live.passes("premium")
        live.until(lambda: live.passes("premium") > before + 3)
        stream.close()
    live.until(lambda: user.get("/v1/usage").json()["total"]["requests"] == 1)
    total = user.get("/v1/usage").json()["total"]
    assert total["images"] == 0 and total["cost_usd"] > 0
    assert total["cost_usd"] == pytest.approx(
        total["compute_ms"] / 3.6e6 * live.settings.price_per_gpu_hour_usd, abs=1e-9
    )


# --- a busy tier ------------------------------------------------------------------------------------


def test_a_busy_premium_tier_is_served_by_turbo_where_that_is_allowed(narrow: Live) -> None:
    given = premium(allow_downgrade=True, guidance_scale=2.5, negative_prompt="blue", seed=11)
    user = narrow.user()
    with narrow.occupied(by=user):
        answer = user.post(GENERATIONS, json=given)
        found = events(user, premium(allow_downgrade=True))
        previews = user.post(GENERATIONS, json=premium(allow_downgrade=True, stream=True, partial_images=1))
    assert answer.status_code == 200, answer.text
    lower = answer.json()
    assert lower["model"] == "turbo" and lower["downgraded_from"] == "premium"
    assert lower["model_version"].startswith("shapes-student@")
    assert answer.headers["x-tier-served"] == "turbo"
    for word in ("busy", "turbo", "num_inference_steps", "guidance_scale", "negative_prompt"):
        assert word in lower["warnings"][0]
    assert found[-1]["model"] == "turbo" and found[-1]["downgraded_from"] == "premium"
    refused(previews, 503)  # one step of turbo has no preview to show: better refused than ignored
    assert files(made(user, body(seed=11))) == files(lower)
    # The stream that kept premium busy was left: compute without images.
    tiers = {day["tier"]: day["images"] for day in user.get("/v1/usage").json()["data"]}
    assert tiers == {"turbo": 3, "premium": 0}


def test_a_premium_tier_that_is_not_busy_serves_what_might_be_downgraded(live: Live) -> None:
    answer = live.user().post(GENERATIONS, json=premium(allow_downgrade=True))
    assert answer.headers["x-tier-served"] == "premium"
    assert answer.json()["model"] == "premium" and "downgraded_from" not in answer.json()


# --- links ------------------------------------------------------------------------------------------


def test_a_link_gives_the_image_to_whoever_has_it(live: Live, user: httpx.Client) -> None:
    (image,) = made(user, body(seed=6, response_format="url", output_format="webp"))["data"]
    assert set(image) == {"url", "seed"}
    answer = httpx.get(image["url"], trust_env=False)
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/webp"
    assert PIL.Image.open(io.BytesIO(answer.content)).format == "WEBP"
    assert answer.content == files(made(user, body(seed=6, output_format="webp")))[0]


@pytest.fixture(scope="module")
def fleeting(start: Start) -> Live:
    """Images expire after three seconds, and are swept twice a second."""
    return start(image_ttl_s=3, sweep_every_s=0.5)


def test_a_link_expires(fleeting: Live) -> None:
    (image,) = made(fleeting.user(), body(response_format="url"))["data"]
    assert httpx.get(image["url"], trust_env=False).status_code == 200
    fleeting.until(lambda: httpx.get(image["url"], trust_env=False).status_code in (403, 404))
    if image["url"].startswith(fleeting.url):
        refused(httpx.get(image["url"], trust_env=False), 404, code="not_found")


def test_a_job_outlives_its_images(fleeting: Live) -> None:
    user = fleeting.user()
    job = user.post("/v1/jobs", json=body()).json()["id"]
    fleeting.until(lambda: user.get(f"/v1/jobs/{job}").json()["status"] == "succeeded")
    fleeting.until(lambda: user.get(f"/v1/jobs/{job}").json()["result"]["data"][0]["b64_json"] is None)
    shown = user.get(f"/v1/jobs/{job}").json()
    assert shown["status"] == "succeeded" and shown["result"]["data"][0]["seed"] == shown["request"]["seed"]


@pytest.mark.parametrize(
    "image_id", ["img_x", "x", "img_" + "0" * 40, "img_" + "A" * 40, "..%2f..%2fservice.db", "%2e%2e", "img_%00", "%ff"]
)
def test_other_ids_are_no_images(image_id: str, live: Live) -> None:
    refused(live.client(None).get(f"/v1/images/{image_id}"), 404)
