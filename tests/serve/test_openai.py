"""OpenAI's own client, unmodified, against the service: what it asks for and which exception each refusal is."""

import asyncio
import base64
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serve.live import ADMIN, PROMPT, Live, opened

Make = Callable[..., openai.OpenAI]


@pytest.fixture
def make(live: Live) -> Iterator[Make]:
    """A client without its own retries, which would hide refusals."""
    made: list[openai.OpenAI] = []

    def client(secret: str | None = None, **key: Any) -> openai.OpenAI:
        secret = secret or live.new_key(**key)["secret"]
        made.append(openai.OpenAI(base_url=f"{live.url}/v1", api_key=secret, max_retries=0))
        return made[-1]

    yield client
    for one in made:
        one.close()


@pytest.fixture
def client(make: Make) -> openai.OpenAI:
    return make()


def test_an_image_in_base64(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="turbo", prompt=PROMPT, response_format="b64_json")
    assert answer.data is not None and len(answer.data) == 1 and answer.data[0].url is None
    assert opened(base64.b64decode(answer.data[0].b64_json or "")).size == (64, 64)
    assert answer.created > 1_700_000_000
    # Extensions are attributes of the client's own objects.
    assert answer.model == "turbo" and isinstance(answer.data[0].seed, int)  # type: ignore[attr-defined]


def test_three_images_by_url_that_can_be_fetched_without_a_key(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="turbo", prompt=PROMPT, n=3, size="64x64", response_format="url", extra_body={"seed": 40}
    )
    assert answer.data is not None
    files = [httpx.get(image.url or "", trust_env=False) for image in answer.data]
    assert [file.status_code for file in files] == [200] * 3
    assert {file.headers["content-type"] for file in files} == {"image/png"}
    assert [opened(file.content).text["seed"] for file in files] == ["40", "41", "42"]  # type: ignore[attr-defined]


def test_a_stream_with_previews(client: openai.OpenAI) -> None:
    with client.images.generate(
        model="premium",
        prompt=PROMPT,
        stream=True,
        partial_images=3,
        extra_body={"num_inference_steps": 8, "seed": 7},
    ) as stream:
        events = list(stream)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert [event.type for event in events[3:]] == ["image_generation.completed"]
    pictures = [opened(base64.b64decode(event.b64_json)) for event in events]
    assert len({picture.tobytes() for picture in pictures}) == 4
    whole = client.images.generate(model="premium", prompt=PROMPT, extra_body={"num_inference_steps": 8, "seed": 7})
    assert whole.data is not None
    assert base64.b64decode(whole.data[0].b64_json or "") == base64.b64decode(events[-1].b64_json)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"turbo", "premium"}
    one = client.models.retrieve("turbo")
    assert one.id == "turbo" and one.object == "model" and one.owned_by == "diffusion-kd"
    assert one.created == models["turbo"].created


def test_what_openai_lets_be_null_is_its_default(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt=PROMPT, model=None, n=None, size=None, response_format=None, stream=None, partial_images=None,
        output_format=None, output_compression=None,
    )  # fmt: skip
    assert answer.data is not None and len(answer.data) == 1 and answer.data[0].b64_json
    assert answer.model == "turbo"  # type: ignore[attr-defined]


def test_the_asynchronous_client(live: Live) -> None:
    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=ADMIN, max_retries=0) as client:
            made = await asyncio.gather(
                *(client.images.generate(model="turbo", prompt=PROMPT, extra_body={"seed": seed}) for seed in (1, 2))
            )
            stream = await client.images.generate(model="turbo", prompt=PROMPT, stream=True)
            events = [event async for event in stream]
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("dall-e-9")
            return [*made, *events]

    first, second, completed = asyncio.run(both())
    assert first.data[0].b64_json != second.data[0].b64_json
    assert completed.type == "image_generation.completed" and completed.b64_json


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"n": 11}, "n", "invalid_value"),
        ({"size": "1024x1024"}, "size", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"quality": "hd"}, "quality", "unsupported_parameter"),
        ({"background": "transparent"}, "background", "unsupported_parameter"),
        ({"style": "vivid"}, "style", "unsupported_parameter"),
        ({"moderation": "low"}, "moderation", "unsupported_parameter"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"extra_body": {"guidance_scale": 3}}, "guidance_scale", "invalid_value"),
    ],
)
def test_a_field_that_is_not_honoured_is_a_bad_request(
    given: dict[str, Any], param: str, code: str, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**({"model": "turbo", "prompt": PROMPT} | given))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error" and param in caught.value.message
    assert caught.value.request_id


def test_a_stranger_is_not_authenticated(make: Make) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        make(secret="dkd_nobody").images.generate(model="turbo", prompt=PROMPT)
    assert caught.value.code == "invalid_api_key" and caught.value.type == "authentication_error"


def test_a_key_without_the_scope_is_denied(make: Make) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="'generate'") as caught:
        make(scopes=["admin"]).images.generate(model="turbo", prompt=PROMPT)
    assert caught.value.code == "missing_scope"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.images.generate(model="dall-e-9", prompt=PROMPT),
        lambda: client.models.retrieve("dall-e-9"),
    ):
        with pytest.raises(openai.NotFoundError, match="no model 'dall-e-9'; there are premium, turbo") as caught:
            ask()
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_a_reused_idempotency_key_is_a_conflict(client: openai.OpenAI) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    client.images.generate(model="turbo", prompt=PROMPT, extra_headers=headers)
    with pytest.raises(openai.ConflictError) as caught:
        client.images.generate(model="turbo", prompt="another", extra_headers=headers)
    assert caught.value.code == "idempotency_key_reused"


def test_too_many_requests_are_a_rate_limit(make: Make) -> None:
    client = make(requests_per_minute=1)
    client.images.generate(model="turbo", prompt=PROMPT)
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(model="turbo", prompt=PROMPT)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 61


def test_a_spent_budget_is_insufficient_quota(make: Make) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        make(monthly_budget_usd=0).images.generate(model="turbo", prompt=PROMPT)
    assert caught.value.code == caught.value.type == "insufficient_quota"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 31 * 86400


def test_a_full_queue_is_a_server_error_that_names_a_time(narrow: Live) -> None:
    with (
        openai.OpenAI(base_url=f"{narrow.url}/v1", api_key=ADMIN, max_retries=0) as client,
        narrow.occupied(by=narrow.client()),
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.images.generate(model="premium", prompt=PROMPT)
    assert caught.value.status_code == 503 and caught.value.code == "overloaded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
