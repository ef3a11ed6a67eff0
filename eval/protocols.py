"""What is asked of every model, and what it is measured with: one protocol an id.

A number is worth comparing with another only under one protocol. Those of the literature need data and weights that
this repository may not carry; `missing` says which files, where they belong and how to get them.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_kd import errors
from eval import suites


@dataclasses.dataclass(frozen=True, slots=True)
class Requirement:
    """A file or folder below the data folder, and how to get it."""

    path: str
    how: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One way to examine models.

    about: what it is, and whose. prompts: a suite's name, or how to read the prompts from the data folder.
    images_per_prompt: two at least give a diversity.
    resolution_px: at which pictures are judged; larger ones are brought down to it by Lanczos, smaller ones refused.
    teacher_steps, guidance_scale, negative_prompt, latents: how the teacher is sampled. latents: a file below the data
        folder with the one noise that every picture starts from; None: the noise of its seed.
    reference: `renders` (the shapes domain), a folder of true pictures or an .npz of `mu` and `sigma` below the data
        folder, or None. paired: picture i of the folder is of prompt i.
    features, clip, distance: networks for set distances, CLIP score and CMMD, and LPIPS; see `eval.networks`.
    clip_scale, clip_prefix: what the source multiplies the cosine with and puts before each prompt.
    references_per_prompt: how many renders; more of them make distances less noisy and cost little.
    crop_px, crops_per_image: of patch distances. oracle: whether the shapes oracle judges.
    floor: name of a file in `eval/floors`.
    windows: metric -> (least, most) that the teacher must reach for the protocol to count as met.
    """

    id: str
    about: str
    prompts: str | Callable[[pathlib.Path], suites.Suite]
    images_per_prompt: int = 1
    resolution_px: int
    teacher_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str | None = None
    latents: str | None = None
    reference: str | None
    paired: bool = False
    references_per_prompt: int = 1
    features: str
    clip: str
    distance: str
    clip_scale: float = 1.0
    clip_prefix: str = ""
    crop_px: int = 299
    crops_per_image: int = 1
    oracle: bool = False
    floor: str = "general"
    requirements: tuple[Requirement, ...] = ()
    windows: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def suite(self, data: pathlib.Path) -> suites.Suite:
        return suites.load(self.prompts) if isinstance(self.prompts, str) else self.prompts(data)

    def missing(self, data: pathlib.Path) -> str | None:
        """What is not there, where it belongs and how to get it; None if nothing is missing."""
        absent = [need for need in self.requirements if not (data / need.path).exists()]
        if not absent:
            return None
        lines = [f"protocol {self.id} needs {len(absent)} more file{'s' if len(absent) > 1 else ''} in {data}/:"]
        lines += [f"  {need.path}\n      {need.how}" for need in absent]
        return "\n".join(lines)


# --- prompts of data sets ---------------------------------------------------------------------------


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.DataError(f"{path} cannot be read: {errors.first_line(error)}") from None


def coco_captions(path: pathlib.Path) -> list[tuple[str, str]]:
    """(file name, first caption) of every image of a COCO captions file, in the order of its images."""
    try:
        content = json.loads(_read(path))
        first: dict[int, str] = {}
        for annotation in content["annotations"]:
            first.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
        return [(image["file_name"], first[image["id"]]) for image in content["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise errors.DataError(f"{path} is not a COCO captions file: {errors.first_line(error)}") from None


def _coco17(data: pathlib.Path) -> suites.Suite:
    captions = coco_captions(data / _COCO17_CAPTIONS)
    return suites.checked(
        "coco17-5k", [suites.Prompt(pathlib.Path(name).stem, "coco", False, text) for name, text in captions]
    )


def _lines(path: str, count: int) -> Callable[[pathlib.Path], suites.Suite]:
    """The first `count` lines of a text file, one prompt each."""

    def read(data: pathlib.Path) -> suites.Suite:
        texts = _read(data / path).rstrip("\n").split("\n")
        if len(texts) < count:
            raise errors.DataError(f"{data / path} has {len(texts)} lines; this protocol asks {count} prompts")
        prompts = [suites.Prompt(f"{number:05d}", "coco", False, text) for number, text in enumerate(texts[:count])]
        return suites.checked(pathlib.Path(path).name, prompts)

    return read


def _mlperf(data: pathlib.Path) -> suites.Suite:
    path = data / _MLPERF_CAPTIONS
    rows = list(csv.DictReader(_read(path).split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE))
    if len(rows) != 5000 or "caption" not in rows[0] or "id" not in rows[0]:
        raise errors.DataError(f"{path} must hold 5000 rows with id and caption; it has {len(rows)}")
    return suites.checked("mlperf", [suites.Prompt(row["id"], "coco", False, row["caption"]) for row in rows])


# --- the protocols ----------------------------------------------------------------------------------

_INCEPTION = Requirement(
    "weights/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
_ALEXNET = Requirement(
    "weights/alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
)
_VIT_G = Requirement(
    "weights/CLIP-ViT-g-14-laion2B-s12B-b42K.safetensors",
    "hf download laion/CLIP-ViT-g-14-laion2B-s12B-b42K open_clip_model.safetensors, then rename",
)
_VIT_B = Requirement(
    "weights/ViT-B-32.pt",
    "https://openaipublic.azureedge.net/clip/models/"
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
)
_COCO17_CAPTIONS, _MLPERF_CAPTIONS = "coco2017/annotations/captions_val2017.json", "mlperf/captions_source.tsv"
_MLPERF = "https://github.com/mlcommons/inference/raw/master/text_to_image"
_WEIGHTS = (_INCEPTION, _VIT_G, _ALEXNET)
_NETWORKS: dict[str, Any] = {
    "features": f"inception:clean:{_INCEPTION.path}",
    "clip": f"open_clip:ViT-g-14:{_VIT_G.path}",
    "distance": f"lpips-alex:{_ALEXNET.path}",
}
"""Of all protocols of true pictures but MLPerf's."""


PROTOCOLS = {
    protocol.id: protocol
    for protocol in (
        Protocol(
            id="shapes",
            about="The embedded domain: every metric through its own small encoder, truth by rendering.",
            prompts="shapes",
            images_per_prompt=2,
            resolution_px=64,
            guidance_scale=2.0,
            reference="renders",
            paired=True,
            references_per_prompt=4,
            features="shapes-encoder",
            clip="shapes-encoder",
            distance="shapes-encoder",
            crop_px=32,
            crops_per_image=8,
            oracle=True,
            floor="shapes",
        ),
        Protocol(
            id="general",
            floor="general",
            about="704 prompts in 23 strata for SDXL-class models; the student against its teacher, without a truth.",
            prompts="general",
            images_per_prompt=2,
            resolution_px=512,
            reference=None,
            **_NETWORKS,
            requirements=_WEIGHTS,
        ),
        Protocol(
            id="coco17-5k-512-vitg14",
            floor="coco",
            about="5,000 captions of COCO 2017 at 512 px, CLIP ViT-g/14 (Sauer et al. 2023, section 4). The paper does "
            "not say which caption of an image, which crop, which FID code: here the first, the centre, clean-fid's.",
            prompts=_coco17,
            resolution_px=512,
            reference="coco2017/val2017",
            paired=True,
            **_NETWORKS,
            requirements=(
                Requirement(
                    _COCO17_CAPTIONS, "http://images.cocodataset.org/annotations/annotations_trainval2017.zip, unpacked"
                ),
                Requirement(
                    "coco2017/val2017", "http://images.cocodataset.org/zips/val2017.zip, unpacked (5,000 images)"
                ),
                *_WEIGHTS,
            ),
        ),
        Protocol(
            id="coco14-10k-512",
            floor="coco",
            about="10,000 captions of COCO 2014 at 512 px, clean-fid and patch FID of 299 px (Yin et al. 2024, DMD2).",
            prompts=_lines("coco10k/all_prompts.txt", 10_000),
            resolution_px=512,
            guidance_scale=6.0,
            reference="coco10k/subset",
            **_NETWORKS,
            clip_prefix="A photo depicts ",
            requirements=(
                Requirement(
                    "coco10k/all_prompts.txt",
                    "https://huggingface.co/tianweiy/DMD2/resolve/main/data/coco/coco10k.zip, unpacked; its "
                    "all_prompts.pkl as text, one prompt a line (a pickle can run anything: look before you open it)",
                ),
                Requirement("coco10k/subset", "the folder of that name in the same archive (10,000 images)"),
                *_WEIGHTS,
            ),
        ),
        Protocol(
            id="coco14-30k-256",
            floor="coco",
            about="30,000 captions of COCO 2014 at 256 px against all of val2014 (Kang et al. 2023, GigaGAN).",
            prompts=_lines("coco2014/captions_coco14_test.txt", 30_000),
            resolution_px=256,
            guidance_scale=3.0,
            reference="coco2014/val2014",
            **_NETWORKS,
            clip_prefix="A photo depicts ",
            crop_px=128,
            requirements=(
                Requirement(
                    "coco2014/captions_coco14_test.txt",
                    "https://github.com/tianweiy/DMD2/raw/main/main/coco_eval/captions_coco14_test.txt",
                ),
                Requirement(
                    "coco2014/val2014", "http://images.cocodataset.org/zips/val2014.zip, unpacked (40,504 images)"
                ),
                *_WEIGHTS,
            ),
        ),
        Protocol(
            id="mlperf-sdxl-5k",
            floor="mlperf",
            about="MLPerf inference's accuracy run of SDXL: one fixed noise, 20 Euler steps, guidance 8, 1024 px.",
            prompts=_mlperf,
            resolution_px=1024,
            teacher_steps=20,
            guidance_scale=8.0,
            negative_prompt="normal quality, low quality, worst quality, low res, blurry, nsfw, nude",
            latents="mlperf/latents.pt",
            reference="mlperf/val2014.npz",
            features=f"inception:pytorch-fid:{_INCEPTION.path}",
            clip=f"open_clip:ViT-B-32-quickgelu:{_VIT_B.path}",
            clip_scale=100.0,
            distance=f"lpips-alex:{_ALEXNET.path}",
            requirements=(
                Requirement(_MLPERF_CAPTIONS, f"{_MLPERF}/coco2014/captions/captions_source.tsv"),
                Requirement("mlperf/latents.pt", f"{_MLPERF}/tools/latents.pt"),
                Requirement("mlperf/val2014.npz", f"{_MLPERF}/tools/val2014.npz"),
                _INCEPTION,
                _VIT_B,
                _ALEXNET,
            ),
            windows={"fd": (23.01085758, 23.95007626), "clip_score": (31.68631873, 31.81331801)},
        ),
    )
}


def named(protocol_id: str) -> Protocol:
    """Raises ConfigError for an unknown id."""
    if protocol_id not in PROTOCOLS:
        raise errors.ConfigError(f"no protocol {protocol_id!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol_id]
