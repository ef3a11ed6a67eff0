"""Pictures a second of `training.prepare` and its time outside the networks: `python -m benchmarks.preparation`.

Generated folders: 64 x 64 px shapes, with shapes-teacher; and 512 x 512 px soft noise (JPEG, 640 x 600 px, so that each
is decoded, scaled and cut), with networks of random weights: SDXL's own autoencoder and text encoders narrowed by
`--narrow`, since the true ones take many seconds a picture on a CPU, beside which all else is nothing. Outside are
opening and cutting pictures as far as it is not overlapped, filters, hashing and writing. The baseline is the bare
networks: the same batches, from memory, in the same process.
"""

import argparse
import dataclasses
import io
import json
import logging
import pathlib
import sys
import tempfile
import time

import numpy as np
import PIL.Image
import torch

from diffusion_kd import artifact, errors
from diffusion_kd.networks import sdxl
from training import cache, data
from training.preparation import buckets, chunks, encoding, sources
from training.preparation.identity import Identity


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """name: for the table. parts: whose networks encode. folder: of pictures."""

    name: str
    parts: artifact.Parts
    folder: pathlib.Path
    size_px: int
    clip: str = ""


def _write(folder: pathlib.Path, pictures: list[tuple[bytes, str]], kind: str) -> pathlib.Path:
    folder.mkdir()
    lines = []
    for index, (content, caption) in enumerate(pictures):
        (folder / f"{index:06d}.{kind}").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{index:06d}.{kind}", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _encoded(pixels_uint8: "np.typing.NDArray[np.uint8]", kind: str) -> bytes:
    written = io.BytesIO()
    PIL.Image.fromarray(pixels_uint8).save(written, kind, quality=90)
    return written.getvalue()


def shapes(folder: pathlib.Path, count: int) -> Case:
    """64 x 64 px PNG files, with CLIP scores by the embedded encoder."""
    images = data.ShapesImages(count, 0)
    numbers = range(len(images))
    pairs = zip(images.images_uint8(numbers), images.captions(numbers, 0), strict=True)
    pictures = [(_encoded(pixels, "PNG"), caption) for pixels, caption in pairs]
    return Case(
        "64 px, shapes-teacher", artifact.load("shapes-teacher"), _write(folder, pictures, "png"), 64, "shapes-encoder"
    )


def photographs(folder: pathlib.Path, count: int, narrow: int) -> Case:
    """640 x 600 px JPEG files of soft noise, cut to 512 x 512."""
    pictures = []
    for index in range(count):
        coarse = np.random.default_rng(index).integers(0, 256, (60, 64, 3), np.uint8)
        soft = PIL.Image.fromarray(coarse).resize((640, 600), PIL.Image.Resampling.BICUBIC)
        pictures.append((_encoded(np.asarray(soft), "JPEG"), f"a picture of number {index} in soft colours"))
    return Case(f"512 px, SDXL / {narrow}", _narrow_sdxl(narrow), _write(folder, pictures, "jpg"), 512)


def _narrow_sdxl(narrow: int) -> artifact.Parts:
    """Random weights. The U-Net, of which only the stride counts here, is kept smaller still."""
    base = sdxl.BASE
    torch.manual_seed(0)
    dimensions = dataclasses.replace(
        base,
        size_px=512,
        unet_widths=(32, 64, 64),
        transformer_layers=(1, 1, 1),
        vae_widths=tuple(width // narrow for width in base.vae_widths),
        text_widths=tuple(64 * max(1, width // 64 // narrow) for width in base.text_widths),
        text_layers=tuple(max(2, layers // narrow) for layers in base.text_layers),
        groups=32 // narrow,
    )
    return sdxl.build_parts("cpu", dimensions)


def measure(case: Case, out: pathlib.Path, workers: int, batch_size: int) -> tuple[float, float]:
    """Prepare the folder once. Returns seconds in all, and seconds in the networks."""
    settings = chunks.Settings(
        size_px=case.size_px,
        clip=case.clip,
        clip_floor=-1.0 if case.clip else None,
        chunk_items=128,
        batch_size=batch_size,
    )
    clip = encoding.load_clip(case.clip) if case.clip else None
    encoder = encoding.Encoder(case.parts, device=torch.device("cpu"), precision="fp32", clip=clip)
    table = buckets.build("square", case.size_px, case.parts.multiple_px)
    began_s = time.perf_counter()
    work = chunks.Preparation(settings, sources.Folder(case.folder), encoder, table, out, workers=workers)
    work.run()
    cache.finish(
        out,
        work.chunks,
        identity=Identity({}, {}),
        made={},
        most_rejected=0.5,
        most_bits=3,
        device=torch.device("cpu"),
    )
    return time.perf_counter() - began_s, encoder.network_s


def bare(case: Case, batch_size: int) -> float:
    """Seconds a picture of the networks alone, one batch again and again."""
    clip = encoding.load_clip(case.clip) if case.clip else None
    encoder = encoding.Encoder(case.parts, device=torch.device("cpu"), precision="fp32", clip=clip)
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, case.size_px, case.size_px, 3), np.uint8)
    captions = [f"a picture of number {index} in soft colours" for index in range(batch_size)]
    times_s = []
    for _ in range(6):
        since_s = time.perf_counter()
        if clip is not None:
            encoder.scores(pixels, captions)
        encoder.encode(pixels, captions)
        times_s.append((time.perf_counter() - since_s) / batch_size)
    return float(np.median(times_s[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparation", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=2048, help="pictures of 64 px")
    parser.add_argument("--photographs", type=int, default=256, help="pictures of 512 px")
    parser.add_argument("--narrow", type=int, default=8, help="how many times narrower than SDXL's the networks are")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, nargs=2, default=[16, 4], help="at 64 and at 512 px")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    sys.stdout.write(f"torch {torch.__version__}, {torch.get_num_threads()} threads of its own, CPU\n")
    sys.stdout.write(f"{'':24}{'threads':>8}{'images/s':>10}{'images/min':>12}{'outside':>9}{'bare images/s':>15}\n")
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        made = [
            shapes(root / "shapes", given.shapes),
            photographs(root / "photographs", given.photographs, given.narrow),
        ]
        for case, batch_size in zip(made, given.batch_size, strict=True):
            count = len(sources.Folder(case.folder))
            alone = 1 / bare(case, batch_size)
            for workers in given.workers:
                out = root / f"{case.folder.name}-{workers}"
                whole_s, network_s = measure(case, out, workers, batch_size)
                rate = count / whole_s
                outside = 1 - network_s / whole_s
                sys.stdout.write(
                    f"{case.name:24}{workers:>8}{rate:>10.1f}{rate * 60:>12.0f}{outside:>9.1%}{alone:>15.1f}\n"
                )


if __name__ == "__main__":
    errors.run(main)
