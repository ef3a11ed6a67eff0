"""A teacher makes the training set: prompts in, pictures in a folder out, by its own networks or over HTTP.

A picture is named after all that decides it, so it never meets another prompt, teacher or setting, and what is there
stays. What a teacher would not or could not draw leaves a note, `NAME.refused`, with the reason.
"""

import base64
import binascii
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx
import PIL.Image
import torch
from torch import Tensor

from diffusion_kd import errors, files, pipeline
from training.preparation import filters, pictures, sources

_log = logging.getLogger(__name__)

BATCH = 16
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_HOPELESS = (401, 403, 404, 405)


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """A picture to draw. name: 16 hex digits, which are its seed too."""

    name: str
    prompt: str

    @property
    def seed(self) -> int:
        return int(self.name, 16)


def wanted(prompts: Sequence[str], key: str, each: int = 1) -> list[Wanted]:
    """Names for `each` pictures of every prompt. key: whatever else decides a picture."""
    drawn: collections.Counter[str] = collections.Counter()
    result = []
    for prompt in (prompt for prompt in prompts for _ in range(each)):
        content = f"{key}\n{prompt}\n{drawn[prompt]}"
        result.append(Wanted(hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()[:16], prompt))
        drawn[prompt] += 1
    return result


def read_prompts(path: pathlib.Path) -> list[str]:
    """Of a text file, a prompt a line, or of the column `text` of a .jsonl or .csv. Raises DataError."""
    if not path.is_file():
        raise errors.DataError(f"no file {path}; give a text file with a prompt a line")
    if path.suffix == ".csv":
        texts = [str(entry["text"] or "") for _, entry in sources.csv_lines(path, ("text",))]
    elif path.suffix == ".jsonl":
        texts = []
        for where, entry in sources.json_lines(path):
            if not isinstance(entry.get("text"), str):
                raise errors.DataError(f'{where}: not of the form {{"text": …}}: {str(entry)[:80]}')
            texts.append(entry["text"])
    else:
        texts = sources.lines(path)
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise errors.DataError(f"{path} holds no prompts; write one a line")
    return found


def picture_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"{name}.png"


def _missing(folder: pathlib.Path, one: Wanted) -> bool:
    return not picture_path(folder, one.name).exists() and not (folder / f"{one.name}.refused").exists()


class Drawn:
    """Pictures of prompts, as a source. folder: where they lie; source, licence: what is said of their origin."""

    def __init__(self, folder: pathlib.Path, chosen: Sequence[Wanted], *, source: str, licence: str = "") -> None:
        self._folder, self._wanted, self._source, self._licence = folder, list(chosen), source, licence
        self.name = f"{len(chosen)} pictures drawn by {source}"
        digest = hashlib.sha256("".join(one.name for one in chosen).encode())
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._wanted)

    def items(self, start: int, stop: int) -> list[sources.Item]:
        return [self._item(one) for one in self._wanted[start:stop]]

    def _item(self, one: Wanted) -> sources.Item:
        problem = None
        refused = self._folder / f"{one.name}.refused"
        if refused.is_file():
            problem = filters.Rejection(**json.loads(refused.read_text(encoding="utf-8")))
        content = pictures.FileRange(picture_path(self._folder, one.name))
        return sources.Item(one.name, one.prompt, content, self._licence, self._source, problem)


def draw(
    sampler: pipeline.TeacherPipeline,
    texts: Mapping[Wanted, str],
    folder: pathlib.Path,
    *,
    seen: Callable[[int], object] | None = None,
    share: tuple[int, int] = (0, 1),
    **settings: Any,
) -> None:
    """Draw what is missing, in batches that do not depend on what is there.

    texts: what the teacher is told for each. seen: told how many more are done. share: (rank, number of processes).
    settings: of `pipeline.TeacherPipeline`.
    """
    chosen = list(texts)
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    for batch in batches[share[0] :: share[1]]:
        if any(_missing(folder, one) for one in batch):
            images = sampler([texts[one] for one in batch], [one.seed for one in batch], **settings)
            for one, image in zip(batch, images, strict=True):
                if _missing(folder, one):
                    _keep(folder, one, image)
        if seen is not None:
            seen(len(batch))


def _keep(folder: pathlib.Path, one: Wanted, image: Tensor) -> None:
    """image: (3, H, W) in [-1, 1], written as PNG; NaN and infinite values are refused."""
    if not bool(image.isfinite().all()):
        refuse(folder, one, filters.Rejection(filters.NOT_FINITE, f"{one.name}: the teacher drew NaN"))
        return
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    with files.replacing(picture_path(folder, one.name)) as unfinished:
        PIL.Image.fromarray(pixels).save(unfinished, "PNG")


def refuse(folder: pathlib.Path, one: Wanted, why: filters.Rejection) -> None:
    """Note that there will be no picture."""
    files.write(folder / f"{one.name}.refused", json.dumps(dataclasses.asdict(why)).encode())


@dataclasses.dataclass(frozen=True, slots=True)
class ImageService:
    """A teacher that gives pictures alone: an endpoint of the OpenAI images API.

    url: of the service (`https://host`, with or without `/v1/images/generations`). size: as the API writes it,
    `1024x1024`. seeded: send each picture's seed, which OpenAI's own service does not know. attempts: how often what
    may pass (a full queue, a lost connection) is tried, waiting 1, 2, 4, ... seconds or as long as the service asks.
    """

    url: str
    model: str
    size: str
    key: str = ""
    seeded: bool = False
    timeout_s: float = 300.0
    attempts: int = 6
    wait_s: float = 1.0

    @property
    def endpoint(self) -> str:
        base = self.url.rstrip("/")
        if base.endswith("/images/generations"):
            return base
        return f"{base}/images/generations" if base.endswith("/v1") else f"{base}/v1/images/generations"

    def fetch(self, client: httpx.Client, one: Wanted, prompt: str) -> bytes | filters.Rejection:
        """An encoded picture, or why the service will not draw this prompt.

        Raises ConfigError where it will draw none (a wrong key, address), DataError where it cannot be reached.
        """
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "n": 1, "size": self.size}
        if self.seeded:
            body["seed"] = one.seed % 2**32
        answer = self._ask(client, body, one.name)
        if answer.status_code in _HOPELESS:
            raise errors.ConfigError(f"{self.endpoint} answers {_said(answer)}; check --images-from and --api-key-file")
        if answer.is_client_error:
            return filters.Rejection(filters.REFUSED, f"{one.name}: {_said(answer)}")
        return self._content(client, answer)

    def _ask(self, client: httpx.Client, body: dict[str, Any], name: str) -> httpx.Response:
        headers = {"Idempotency-Key": name} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        failure = "never asked"
        for attempt in range(self.attempts):
            pause_s = self.wait_s * 2**attempt
            try:
                answer = client.post(self.endpoint, json=body, headers=headers, timeout=self.timeout_s)
            except httpx.InvalidURL as error:
                raise errors.ConfigError(f"--images-from {self.url!r} is no address: {error}") from None
            except httpx.UnsupportedProtocol as error:
                raise errors.ConfigError(f"--images-from {self.url!r}: {error}") from None
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {errors.first_line(error)}"
            else:
                if answer.status_code not in _RETRIED:
                    return answer
                failure, pause_s = _said(answer), max(pause_s, _asked_s(answer))
            if attempt + 1 < self.attempts:
                _log.warning("%s: %s; again in %.0f s", self.endpoint, failure, pause_s)
                time.sleep(pause_s)
        raise errors.DataError(
            f"{self.endpoint} gave no picture in {self.attempts} attempts, the last: {failure}; "
            "the same command goes on where this one stopped"
        )

    def _content(self, client: httpx.Client, answer: httpx.Response) -> bytes:
        try:
            entry = answer.json()["data"][0]
            if entry.get("b64_json"):
                return base64.b64decode(entry["b64_json"], validate=True)
            fetched = client.get(entry["url"], timeout=self.timeout_s, follow_redirects=True)
            return fetched.raise_for_status().content
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, binascii.Error, httpx.HTTPError) as error:
            raise errors.DataError(
                f"{self.endpoint} answered {answer.status_code} without a picture "
                f"({type(error).__name__}: {errors.first_line(error)}): {answer.text[:200]}"
            ) from None


def _said(answer: httpx.Response) -> str:
    """Status and message of an error as the OpenAI API writes it, or the beginning of whatever came."""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.text
    return f"{answer.status_code} {' '.join(message.split())[:200]}"


def _asked_s(answer: httpx.Response) -> float:
    try:
        return min(600.0, float(answer.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0


def fetch(
    service: ImageService,
    texts: Mapping[Wanted, str],
    folder: pathlib.Path,
    *,
    workers: int = 4,
    seen: Callable[[int], object] | None = None,
) -> None:
    """Let a service draw what is missing, several at once. The first error that it raises ends it; what came stays."""

    def one_by_one(one: Wanted) -> None:
        got = service.fetch(client, one, texts[one])
        if isinstance(got, filters.Rejection):
            refuse(folder, one, got)
        else:
            files.write(picture_path(folder, one.name), got)

    missing = [one for one in texts if _missing(folder, one)]
    if seen is not None:
        seen(len(texts) - len(missing))
    with httpx.Client() as client, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one_by_one, one) for one in missing]
        try:
            for _ in _results(futures):
                if seen is not None:
                    seen(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _results(futures: Sequence["concurrent.futures.Future[None]"]) -> Iterable[None]:
    for future in concurrent.futures.as_completed(futures):
        yield future.result()
