"""Captioned pictures, or prompts alone, into a cache that distillation trains on: `python -m training.prepare`.

What is worked on is a chunk: a few hundred neighbours of the source. Its pictures are opened and cut by a pool of
threads while the networks are busy with the chunk before; it is written whole, and is there or not there. So a run that
was killed goes on where it stopped, several processes (`accelerate launch`) share the chunks, and the cache is always
the same.
"""

import argparse
import contextlib
import dataclasses
import datetime
import logging
import math
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import accelerate
import torch
import tqdm

from diffusion_kd import artifact, errors, files, pipeline
from eval import fingerprint
from training import cache, compute
from training import config as configs
from training.preparation import buckets, chunks, drawing, encoding, sources
from training.preparation.identity import Identity

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Fellows:
    """This process among those that share the work."""

    state: accelerate.PartialState

    @staticmethod
    def join() -> "Fellows":
        """They wait up to a day for one another, for one may draw while others are done."""
        # accelerate takes processes on CPUs for strangers to one another unless it is told that CPUs are meant.
        options: dict[str, Any] = {"timeout": datetime.timedelta(days=1)}
        return Fellows(accelerate.PartialState(cpu=not torch.accelerator.is_available(), **options))

    @property
    def share(self) -> tuple[int, int]:
        return self.state.process_index, self.state.num_processes

    def wait(self) -> None:
        self.state.wait_for_everyone()


def prepare(
    settings: chunks.Settings,
    teacher: str,
    parts: artifact.Parts,
    source: sources.Source,
    folder: pathlib.Path,
    *,
    fellows: Fellows,
    most_rejected: float = 0.5,
    most_bits: int = 3,
    workers: int = 2,
) -> dict[str, Any]:
    """Make a cache, or go on with one. Returns its manifest; in processes but the first, an empty one.

    most_bits: of 64 in which difference hashes may differ that count as the same picture; below 0: none do.
    Raises DataError if more than `most_rejected` of the items is rejected, ConfigError if the folder holds another one.
    """
    rank, _ = fellows.share
    identity = Identity.of(parts)
    table = buckets.build(settings.buckets, settings.size_px, parts.multiple_px)
    made: dict[str, Any] = {
        "teacher": teacher,
        "source": source.name,
        "source_digest": source.digest,
        "settings": dataclasses.asdict(settings),
    }
    configs.claim(folder, made | {"identity": identity.to_json()}, write=rank == 0)
    if rank == 0:
        _sweep(folder)
    fellows.wait()
    clip = encoding.load_clip(settings.clip) if settings.clip else None
    encoder = encoding.Encoder(parts, device=fellows.state.device, precision=settings.precision, clip=clip)
    work = chunks.Preparation(
        settings,
        source,
        encoder,
        table,
        folder,
        most_rejected=most_rejected,
        share=fellows.share,
        workers=workers,
    )
    began_s = time.perf_counter()
    work.run()
    took_s = time.perf_counter() - began_s
    _log.info("%.1f s, of which %.0f %% in the networks", took_s, 100 * encoder.network_s / max(took_s, 1e-9))
    fellows.wait()
    if rank:
        return {}
    made |= {"duplicate_bits": most_bits, "versions": fingerprint.versions()}
    return cache.finish(
        folder,
        work.chunks,
        identity=identity,
        made=made,
        most_rejected=most_rejected,
        most_bits=most_bits,
        device=fellows.state.device,
    )


def _sweep(folder: pathlib.Path) -> None:
    """Remove what a killed run left half written."""
    for path in [*folder.glob(".*.unfinished"), *folder.glob("chunks/.*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--teacher",
        required=True,
        help="whose autoencoder and text encoders encode: a folder, a .safetensors file or a hub id",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the cache's folder")
    parser.add_argument("--base", help="configs and tokenizers for a .safetensors file: a folder or a hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=pathlib.Path, help="a folder with pictures and metadata.jsonl, .csv or .parquet")
    source.add_argument("--dataset", help="a Hugging Face dataset: a saved folder, a local builder or a hub id")
    source.add_argument("--shards", help="WebDataset tar files, such as 'path/{0000..0009}.tar'")
    source.add_argument("--prompts", type=pathlib.Path, help="a prompt a line, or .jsonl/.csv: the teacher draws them")
    _add_source_options(parser)
    _add_filter_options(parser)
    return parser.parse_args(arguments)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sources")
    group.add_argument("--split", default="train", help="of --dataset")
    group.add_argument("--image-column", default="image", help="of --dataset")
    group.add_argument(
        "--caption-column", help="of --dataset (text, caption or prompt if not given), key of .json in --shards"
    )
    group.add_argument("--licence", default="", help="of items that do not say what theirs is")
    drawn = parser.add_argument_group("drawn by the teacher (--prompts)")
    drawn.add_argument("--images-per-prompt", type=int, default=1)
    drawn.add_argument("--steps", type=int, default=50)
    drawn.add_argument("--guidance-scale", type=float, default=5.0)
    drawn.add_argument("--seed", type=int, default=0)
    drawn.add_argument(
        "--images-from", help="address of an OpenAI-compatible service that draws in the teacher's stead"
    )
    drawn.add_argument("--images-model", default="premium", help="the service's name of the model")
    drawn.add_argument("--images-seeded", action="store_true", help="send seeds: not all services take them")
    drawn.add_argument("--images-timeout-s", type=float, default=300.0)
    drawn.add_argument("--images-at-once", type=int, default=4, help="requests at a time")
    drawn.add_argument("--api-key-file", type=pathlib.Path, help="a file that holds the service's key")


def _add_filter_options(parser: argparse.ArgumentParser) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(chunks.Settings)}
    group = parser.add_argument_group("what is kept, and how")
    group.add_argument("--size-px", type=int, help="the teacher's own if not given")
    group.add_argument("--buckets", choices=("square", "aspect"), default=defaults["buckets"])
    group.add_argument("--min-size-px", type=int, help="of the shorter side; half of size_px if not given")
    group.add_argument("--most-aspect", type=float, default=defaults["most_aspect"], help="longer side to shorter")
    group.add_argument("--least-contrast", type=float, default=defaults["least_contrast"], help="of 255; 0: any")
    group.add_argument("--clip", default="", help="shapes-encoder, a CLIP folder or open_clip:ARCHITECTURE:WEIGHTS")
    group.add_argument("--clip-floor", type=float, help="the CLIP score (a cosine) that an item must reach")
    group.add_argument("--duplicate-bits", type=int, default=3, help="of 64 that may differ; -1 keeps duplicates")
    group.add_argument(
        "--no-scrub", action="store_true", help="leave e-mail addresses, URLs, phone numbers in captions"
    )
    group.add_argument("--most-rejected", type=float, default=0.5, help="share of the items")
    group.add_argument("--chunk-items", type=int, default=defaults["chunk_items"])
    group.add_argument("--batch-size", type=int, default=defaults["batch_size"])
    group.add_argument("--precision", choices=(*compute.DTYPES,), help="bf16 on CUDA, else fp32, if not given")
    group.add_argument("--workers", type=int, default=2, help="threads that open pictures, in each process")


def _settings(given: argparse.Namespace, size_px: int, precision: str) -> chunks.Settings:
    side = given.size_px or size_px
    return chunks.Settings(
        size_px=side,
        buckets=given.buckets,
        min_size_px=side // 2 if given.min_size_px is None else given.min_size_px,
        most_aspect=given.most_aspect,
        least_contrast=given.least_contrast,
        clip=given.clip,
        clip_floor=given.clip_floor,
        scrub=not given.no_scrub,
        licence=given.licence,
        chunk_items=given.chunk_items,
        batch_size=given.batch_size,
        precision=precision,
    )


def _check(given: argparse.Namespace) -> None:
    for name, fits, wanted in (
        ("most_rejected", 0 <= given.most_rejected <= 1, "from 0 to 1"),
        ("duplicate_bits", -1 <= given.duplicate_bits <= 32, "from -1 to 32"),
        ("images_per_prompt", given.images_per_prompt > 0, "above 0"),
        ("images_at_once", given.images_at_once > 0, "above 0"),
        ("images_timeout_s", given.images_timeout_s > 0, "above 0"),
        ("workers", given.workers > 0, "above 0"),
        ("steps", given.steps is None or given.steps > 0, "above 0"),
        ("guidance_scale", given.guidance_scale is None or 0 <= given.guidance_scale < math.inf, "finite, 0 or more"),
        ("size_px", given.size_px is None or given.size_px > 0, "above 0"),
        ("out", given.data is None or given.out.resolve() != given.data.resolve(), "another folder than --data"),
        ("images_from", not given.images_from or given.prompts is not None, "given with --prompts"),
    ):
        errors.require(fits, name, getattr(given, name), wanted)
    configs.require_seed(given.seed)
    files.check_folder(given.out)


def open_source(given: argparse.Namespace) -> sources.Source | None:
    """The source that the command line names; None for prompts, whose pictures are yet to be drawn."""
    if given.prompts is not None:
        drawing.read_prompts(given.prompts)
        return None
    if given.data is not None:
        return sources.Folder(given.data)
    if given.dataset is not None:
        return sources.HubDataset(given.dataset, given.split, given.image_column, given.caption_column)
    return sources.Shards(sources.expand(given.shards), given.caption_column)


def draw_source(
    given: argparse.Namespace, settings: chunks.Settings, parts: artifact.Parts, fellows: Fellows
) -> drawing.Drawn:
    """Let the teacher, or a service in its stead, draw the prompts into the cache's folder `images`."""
    prompts = drawing.read_prompts(given.prompts)
    folder = given.out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    if fellows.share[0] == 0:
        files.sweep(folder)
    fellows.wait()
    if given.images_from:
        decides: tuple[object, ...] = (given.images_from, given.images_model, settings.size_px, given.images_seeded)
        origin = f"{given.images_model} at {chunks.origin(given.images_from)}"
    else:
        decides = (given.teacher, given.guidance_scale, given.steps)
        origin = given.teacher
    key = "\n".join(map(str, (given.seed, settings.scrub, *decides)))
    chosen = drawing.wanted(prompts, key, given.images_per_prompt)
    spoken = {one: text for one in chosen if (text := chunks.clean_caption(one.prompt, scrub=settings.scrub)[0])}
    if given.images_from:
        _fetch(given, spoken, folder, settings.size_px, fellows)
    else:
        _draw(given, spoken, folder, parts, fellows)
    fellows.wait()
    return drawing.Drawn(folder, chosen, source=origin, licence=given.licence)


def _fetch(
    given: argparse.Namespace, spoken: dict[drawing.Wanted, str], folder: pathlib.Path, size_px: int, fellows: Fellows
) -> None:
    service = drawing.ImageService(
        url=given.images_from,
        model=given.images_model,
        size=f"{size_px}x{size_px}",
        key=_key(given.api_key_file),
        seeded=given.images_seeded,
        timeout_s=given.images_timeout_s,
    )
    rank, world = fellows.share
    mine = dict(list(spoken.items())[rank::world])
    with _pictures_bar(len(mine)) as bar:
        drawing.fetch(service, mine, folder, workers=given.images_at_once, seen=bar.update)


def _draw(
    given: argparse.Namespace,
    spoken: dict[drawing.Wanted, str],
    folder: pathlib.Path,
    parts: artifact.Parts,
    fellows: Fellows,
) -> None:
    parts.to(fellows.state.device)
    sampler = pipeline.TeacherPipeline(parts)
    with _pictures_bar(-(-len(spoken) // fellows.share[1])) as bar:
        drawing.draw(
            sampler,
            spoken,
            folder,
            seen=bar.update,
            share=fellows.share,
            steps=given.steps,
            guidance_scale=given.guidance_scale,
        )
    parts.unet.to("cpu")


def _pictures_bar(total: int) -> "tqdm.tqdm[Any]":
    return tqdm.tqdm(total=total, unit="picture", disable=None)


def _key(path: pathlib.Path | None) -> str:
    """What the file holds. Raises ConfigError."""
    if path is None:
        return ""
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.ConfigError(f"--api-key-file {path} cannot be read: {errors.first_line(error)}") from None
    errors.require(bool(key), "api_key_file", str(path), "a file that holds a key")
    return key


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    _check(given)
    fellows = Fellows.join()
    source = open_source(given)
    precision = given.precision or ("bf16" if fellows.state.device.type == "cuda" else "fp32")
    parts = artifact.load(given.teacher, dtype=compute.DTYPES[precision], base=given.base)
    settings = _settings(given, parts.size_px, precision)
    with files.held(given.out) if fellows.share[0] == 0 else contextlib.nullcontext():
        manifest = prepare(
            settings,
            given.teacher,
            parts,
            source or draw_source(given, settings, parts, fellows),
            given.out,
            fellows=fellows,
            most_rejected=given.most_rejected,
            most_bits=given.duplicate_bits,
            workers=given.workers,
        )
    if manifest:
        _log.info("%s", summary(manifest))


def summary(manifest: Mapping[str, Any]) -> str:
    """A cache in one line."""
    rejected = ", ".join(f"{count} {reason}" for reason, count in manifest["rejected"].items()) or "none"
    removed = ", ".join(f"{count} {kind}" for kind, count in manifest["scrubbed"].items()) or "nothing"
    return (
        f"{manifest['count']} of {manifest['items']} items in {len(manifest['buckets'])} buckets; "
        f"rejected: {rejected}; taken out of captions: {removed}"
    )


if __name__ == "__main__":
    errors.run(main)
