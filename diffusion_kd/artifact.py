"""Models on disk: SDXL-layout diffusers folders, and students exported as such with `distillation.json`.

A model is asked for by a folder, a hub id, a `.safetensors` file in SDXL's original naming, or the names of the shipped
ones: `shapes-teacher`, `shapes-student`.

A student's folder is a plain `StableDiffusionXLPipeline` with an `LCMScheduler` that sends each step's clean
estimate through fresh noise at the trained timesteps, so `num_inference_steps=N, guidance_scale=0` in plain diffusers
is right. `distillation.json` carries what inference must not get wrong, and where the student came from. A student
that is a LoRA has a folder with its adapters alone, a scheduler and `distillation.json`, which names its base.
"""

import copy
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import diffusers
import huggingface_hub
import safetensors
import torch
from torch import nn

from diffusion_kd import _progress, card, errors, files, types
from diffusion_kd.conditioning import PromptEncoder
from diffusion_kd.networks import folders, lora_file, sdxl, single_file
from diffusion_kd.networks.parts import Parts as Parts

DISTILLATION_FILE = "distillation.json"
SCHEMA_VERSION = 1
SHIPPED = {
    name: pathlib.Path(__file__).parent / "shapes" / "weights" / name
    for name in ("shapes-teacher", "shapes-student", "shapes-encoder")
}
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
_PARTS_WEIGHTS = tuple(f"{part}/*.safetensors" for part in _NETWORKS)
_OTHER_VARIANTS = ("*fp16*", "*onnx*", "*openvino*")
_CONFIGS = ("*.json", "*.txt", lora_file.NAME, "README.md", "LICENSE*", "LICENCE*")
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
"""Whose configs and tokenizers a single file gets, if no other base is given."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Distillation:
    """What `distillation.json` holds besides its `schema_version`.

    student_timesteps: every step count the student was trained for -> its timesteps, in sampling order.
    guidance_scale: always 0: the student has learnt its teacher's guidance.
    lineage: teacher, data, code version, config and whatever else made this student.
    base: of a LoRA alone: `model`, the name of the model that it belongs on or its folder as seen from the LoRA's, and
        `probe`, a few of that model's weights.
    """

    objective: str
    student_timesteps: dict[str, list[int]]
    prediction_type: str
    size_px: int
    lineage: dict[str, Any]
    guidance_scale: float = 0.0
    base: dict[str, Any] | None = None

    def steps(self) -> dict[int, list[int]]:
        """`student_timesteps` with its keys as numbers, which JSON has not."""
        return {int(steps): [int(one) for one in timesteps] for steps, timesteps in self.student_timesteps.items()}


def resolve(name_or_path: str, weights: Sequence[str] = _PARTS_WEIGHTS) -> pathlib.Path:
    """The local folder of a shipped name, a folder, or a hub id (downloaded). Raises ModelError.

    weights: patterns of the files that are downloaded beside .json and .txt; a pipeline's parts, if not given. Of a
        part that has its weights only as a variant, such as fp16, the variant is taken.
    """
    if name_or_path in SHIPPED:
        if not SHIPPED[name_or_path].is_dir():
            raise errors.ModelError(
                f"the weights of {name_or_path} are not in this installation ({SHIPPED[name_or_path]}); "
                "install from the repository, or give a folder or a hub id"
            )
        return SHIPPED[name_or_path]
    path = pathlib.Path(name_or_path)
    if name_or_path and path.is_dir():
        return path
    shipped = ", ".join(sorted(SHIPPED))
    if name_or_path == sdxl.NAME:
        raise errors.ModelError(
            f"{sdxl.NAME} is an architecture without weights, which only --plan takes; "
            f"give a folder, a .safetensors file or a hub id, such as {BASE}"
        )
    if is_single_file(name_or_path) and path.is_file():
        raise errors.ModelError(
            f"{name_or_path} is a single file, which is taken for a teacher of a training alone; write it as a folder: "
            f"python -m training.export --file {name_or_path} --out FOLDER"
        )
    if (
        path.is_file()
        or is_single_file(name_or_path)
        or name_or_path.count("/") != 1
        or name_or_path.startswith((".", "/"))
    ):
        raise errors.ModelError(
            f"no model {name_or_path!r}: not a folder, not a hub id (owner/name), not one of {shipped}"
        )
    try:
        return _download(name_or_path, weights)
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of several libraries
        raise errors.ModelError(
            f"no model {name_or_path!r}: not a folder, not one of {shipped}, and the hub did not give it: "
            f"{errors.first_line(error)}"
        ) from None


def _download(name: str, weights: Sequence[str]) -> pathlib.Path:
    """Fetch a hub repository's configs and weights: the plain ones, where a folder of it has them, else a variant's."""
    wanted, others = [*_CONFIGS, *weights], list(_OTHER_VARIANTS)
    folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=others))
    found = {pathlib.PurePath(pattern).parent for pattern in weights if any(folder.glob(pattern))}
    if lacking := [pattern for pattern in weights if pathlib.PurePath(pattern).parent not in found]:
        others.remove("*fp16*")
        huggingface_hub.snapshot_download(name, allow_patterns=lacking, ignore_patterns=others)
    return folder


def load(name_or_path: str, *, dtype: torch.dtype = torch.float32, base: str | None = None) -> Parts:
    """Load a model, each part checked, frozen.

    name_or_path: as in `resolve`, or a `.safetensors` file in SDXL's original naming.
    dtype: float32, bfloat16 or float16; an autoencoder that overflows in float16 (`force_upcast`) stays in float32.
    base: for a single file: the folder or hub id of the pipeline whose configs, tokenizers and scheduler it gets;
        `BASE`, if not given. What the file says of its prediction type goes before its base's. For a student that is a
        LoRA: the model that it belongs on, if not the one that it names; the adapters are added to its weights.
    Raises ModelError for a missing part, an unsupported prediction type, a U-Net that is not SDXL's or does not fit the
    autoencoder, or weights that are missing or not finite in `dtype`; ConfigError for a base that is not asked for.
    """
    path = pathlib.Path(name_or_path)
    if is_single_file(name_or_path):
        parts = _load_single_file(path, base or BASE, dtype)
    elif is_lora(name_or_path):
        parts = _load_lora(name_or_path, base, dtype)
    else:
        errors.require(base is None, "base", base, "left out: only a single .safetensors file or a LoRA has one")
        parts = _load_folder(name_or_path, dtype)
    _check_kind(name_or_path, parts)
    for name, module in (("unet", parts.unet), ("vae", parts.vae), ("text encoders", parts.text)):
        _check_finite(f"{name_or_path}, {name}", module, dtype)
        module.eval().requires_grad_(False)
    return parts


def is_single_file(name_or_path: str) -> bool:
    """Whether a model is asked for by a `.safetensors` file, there or not."""
    return name_or_path.endswith(".safetensors")


def is_lora(name_or_path: str) -> bool:
    """Whether a model is an exported student that is a LoRA. Raises ModelError if there is no such model."""
    return (resolve(name_or_path) / lora_file.NAME).is_file()


def architecture(name_or_path: str, *, base: str | None = None) -> Parts:
    """The parts of a model on the device `meta`: its architecture, by its config files. No weight is read.

    name_or_path: as `load` takes it, or `sdxl-base`. Of a hub id the small files alone are downloaded; a single file is
    taken to be what its base is. Raises ModelError for what `load` refuses, but for the weights.
    """
    if name_or_path == sdxl.NAME:
        return sdxl.build_parts()
    if is_single_file(name_or_path):
        header = single_file.read_header(pathlib.Path(name_or_path))
        folder, changes = _base_folder(name_or_path, base or BASE), _said_of_noise(name_or_path, header)
    else:
        folder, changes = resolve(name_or_path, ()), {}
    folders.check(name_or_path, folder)
    try:
        parts = folders.build(folder, changes)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise errors.ModelError(f"{name_or_path} has no readable configs: {errors.first_line(error)}") from None
    _check_kind(name_or_path, parts)
    for module in (parts.unet, parts.vae, parts.text):
        module.eval().requires_grad_(False)
    return parts


def _load_folder(name_or_path: str, dtype: torch.dtype) -> Parts:
    folder = resolve(name_or_path)
    folders.check(name_or_path, folder)
    try:
        with _progress.hidden():
            return folders.load(folder, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise errors.ModelError(f"{name_or_path} cannot be loaded: {errors.first_line(error)}") from None


def _load_lora(name_or_path: str, base: str | None, dtype: torch.dtype) -> Parts:
    """A LoRA's base with the adapters in its U-Net's weights, and the LoRA's scheduler."""
    folder, distillation = resolve(name_or_path), read_distillation(name_or_path)
    named = base or _base_of(folder, distillation)
    if not is_single_file(named) and is_lora(named):
        raise errors.ModelError(f"{name_or_path}: its base {named} is a LoRA itself; give that one's teacher as base")
    parts = load(named, dtype=dtype)
    if not lora_file.fits(parts.unet, (distillation.base or {}).get("probe", {})):
        raise errors.ModelError(
            f"{name_or_path} was not made for {named}, whose weights are others; give the model that it was made for "
            f"as base (its lineage says {distillation.lineage.get('teacher')!r})"
        )
    try:
        with _progress.hidden():
            lora_file.fuse(parts.unet, folder / lora_file.NAME)
        parts.unet.register_to_config(sample_size=distillation.size_px // parts.downscale)  # it may not be its base's
        scheduler = folders.load_scheduler(folder)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise errors.ModelError(f"{name_or_path} cannot be loaded on {named}: {errors.first_line(error)}") from None
    return dataclasses.replace(parts, scheduler=scheduler)


def _base_of(folder: pathlib.Path, distillation: Distillation) -> str:
    """Where a LoRA's base is: `base` in its folder, a folder of the base's name beside it, or what it names."""
    named = (distillation.base or {}).get("model")
    if not isinstance(named, str) or not named:
        raise errors.ArtifactError(f"{folder / DISTILLATION_FILE} names no base; give the LoRA's teacher as base")
    from_here = folder / named
    beside = [folder / "base", folder.parent / pathlib.PurePath(named).name]
    if named.startswith("."):
        beside.append(from_here)
    found = next((path for path in beside if path.exists() and path != folder), None)
    if found is None and named.startswith("."):
        raise errors.ModelError(
            f"{folder} is a LoRA and its base is not at {from_here}; put it there or beside, or give it as base"
        )
    return named if found is None else str(found)


def _load_single_file(path: pathlib.Path, base: str, dtype: torch.dtype) -> Parts:
    header = single_file.read_header(path)
    folder, changes = _base_folder(str(path), base), _said_of_noise(str(path), header)
    try:
        scheduler = folders.load_scheduler(folder, changes)
        with _progress.hidden():
            networks = single_file.load(path, folder, dtype)
        text = PromptEncoder(*folders.load_tokenizers(folder), networks.text_encoder, networks.text_encoder_2)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise errors.ModelError(
            f"{path} cannot be loaded with the configs of {base}: {errors.first_line(error)}"
        ) from None
    _log.info("%s predicts %s, says %s", path, scheduler.config.prediction_type, header.said_by or base)
    return Parts(networks.unet, networks.vae, text, scheduler)


def _base_folder(name: str, base: str) -> pathlib.Path:
    try:
        folder = resolve(base, ())
        folders.check(base, folder)
    except errors.ModelError as error:
        raise errors.ModelError(
            f"{name} is a single file, which needs the configs and tokenizers of a base: {error}; "
            "give the folder of an SDXL pipeline as base"
        ) from None
    return folder


def _said_of_noise(name: str, header: single_file.Header) -> dict[str, object]:
    """What a single file changes of its base's scheduler."""
    if header.prediction_type is None:
        return {}
    changes: dict[str, object] = {"prediction_type": header.prediction_type}
    if header.zero_terminal_signal:
        # Sampling has to begin at the last timestep, where nothing but noise is left (Lin et al. 2023).
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def _check_kind(name: str, parts: Parts) -> None:
    kind = parts.scheduler.config.get("prediction_type")
    if kind is None:
        scheduler = type(parts.scheduler).__name__
        raise errors.ModelError(f"{name}: its {scheduler} has no prediction_type; give a model with SDXL's schedulers")
    try:
        types.prediction_type(kind)
    except errors.ModelError as error:
        raise errors.ModelError(f"{name}: {error}") from None
    seen, made = parts.unet.config.in_channels, parts.vae.config.latent_channels
    if seen != made:
        raise errors.ModelError(
            f"{name}: the U-Net takes {seen} channels and the autoencoder makes {made}; give a text-to-image model"
        )
    if (addition := parts.unet.config.get("addition_embed_type")) != "text_time":
        raise errors.ModelError(
            f"{name}: the U-Net's addition_embed_type is {addition!r}; an SDXL U-Net has 'text_time'"
        )


def load_tiny_decoder(
    name_or_path: str, teacher: Parts | None = None, *, dtype: torch.dtype = torch.float32
) -> diffusers.AutoencoderTiny:
    """A tiny autoencoder (TAESDXL and its kind), frozen: decodes in a fraction of the time and memory.

    `decode(latents / config.scaling_factor)` takes the U-Net's latents (B, C, h, w) and gives images in about [-1, 1],
    as the autoencoder's does. teacher: whose latents it must fit. name_or_path: a folder or a hub id.
    Raises ModelError for anything else than an AutoencoderTiny, one for other latents, or damaged weights.
    """
    folder = resolve(name_or_path, ("*.safetensors",))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (kind := config.get("_class_name")) != "AutoencoderTiny":
            raise ValueError(f"it is of the class {kind}")
        decoder = folders.load_whole(diffusers.AutoencoderTiny, folder, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
        raise errors.ModelError(
            f"{name_or_path} is no tiny decoder ({errors.first_line(error)}); give an AutoencoderTiny's folder or hub "
            "id, such as madebyollin/taesdxl"
        ) from None
    if teacher is not None:
        _check_latents(name_or_path, decoder, teacher)
    _check_finite(name_or_path, decoder, dtype)
    return decoder.eval().requires_grad_(False)


def _check_latents(name: str, decoder: diffusers.AutoencoderTiny, teacher: Parts) -> None:
    config = decoder.config
    channels, downscale = (
        config.latent_channels,
        config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1),
    )
    wanted = teacher.unet.config.in_channels, teacher.downscale
    if (channels, downscale) != wanted:
        raise errors.ModelError(
            f"{name} decodes latents of {channels} channels to {downscale} px a cell, and the teacher has {wanted[0]} "
            f"channels and {wanted[1]} px; give a tiny decoder of the teacher's latents"
        )


def _check_finite(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    if weight := _not_finite(module):
        narrow = f" in {dtype}; it may hold them in float32, or the file" if dtype == torch.float16 else "; the file"
        raise errors.ModelError(f"{name}: {weight} holds NaN or infinite values{narrow} is damaged")


def _not_finite(module: nn.Module) -> str | None:
    """The name of the first weight that holds NaN or infinite values."""
    for name, weight in module.state_dict().items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            return name
    return None


def read_distillation(name_or_path: str) -> Distillation:
    """`distillation.json` of an exported student. Raises ArtifactError if it is missing, malformed or newer than us."""
    path = resolve(name_or_path) / DISTILLATION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise errors.ArtifactError(f"{path} has schema version {version}; this release reads {SCHEMA_VERSION}")
        distillation = Distillation(**content)
        if not distillation.steps():
            raise ValueError("student_timesteps is empty")
        return distillation
    except FileNotFoundError:
        raise errors.ArtifactError(
            f"{name_or_path} is not an exported student: it has no {DISTILLATION_FILE}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.ArtifactError(f"{path} is malformed: {error}") from None


def student_scheduler(teacher: diffusers.SchedulerMixin, steps: int) -> diffusers.LCMScheduler:
    """The scheduler that samples a student trained at `steps` timesteps, on its teacher's betas.

    LCM's sampler is what a student of fresh noise needs: x0_hat, then x0_hat noised to the next timestep. Its boundary
    condition c_skip * x_t + c_out * x0_hat is scaled away: ADD has none.
    """
    config = teacher.config
    return diffusers.LCMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        trained_betas=config.get("trained_betas"),
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        original_inference_steps=steps,
        timestep_scaling=1e6,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def save_pipeline(
    folder: pathlib.Path,
    *,
    parts: Parts,
    extra: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write an SDXL-layout pipeline folder, safetensors in `dtype`. A failure leaves what stood there untouched.

    extra: further files, name -> text. Raises ModelError for weights that are not finite in `dtype`.
    """
    first, second = parts.text.tokenizers
    modules = {
        "vae": parts.vae,
        "text_encoder": parts.text.text_encoder,
        "text_encoder_2": parts.text.text_encoder_2,
        "unet": parts.unet,
    }
    halves = {name: _copy_to_cpu(module, dtype) for name, module in modules.items()}
    for name, module in halves.items():
        if weight := _not_finite(module):
            raise errors.ModelError(
                f"{name} cannot be written: {weight} holds NaN or infinite values in {dtype}; "
                "train anew, with a lower learning rate, in another folder"
            )
    pipeline = diffusers.StableDiffusionXLPipeline(
        **halves, tokenizer=first, tokenizer_2=second, scheduler=parts.scheduler, add_watermarker=False
    )
    with files.written_whole(folder) as unfinished:
        with _progress.hidden():
            pipeline.save_pretrained(unfinished)
        for part, tokenizer in (("tokenizer", first), ("tokenizer_2", second)):
            # CLIP's own files too, for libraries that read those alone (transformers 4).
            tokenizer.backend_tokenizer.model.save(str(unfinished / part))
        for part in ("unet", "vae", "scheduler"):
            for path in (unfinished / part).glob("*config.json"):
                _edit(path, remove="_name_or_path")
        for part in ("text_encoder", "text_encoder_2"):
            # transformers goes by the stored precision, diffusers loads its parts in float32, and half precision text
            # beside a float32 U-Net is an error.
            _edit(unfinished / part / "config.json", remove="_name_or_path", dtype="float32")
        for name, text in (extra or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")


def _copy_to_cpu(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype`, made weight by weight: an accelerator never holds a second model."""
    weights: dict[int, Any] = {}
    for parameter in module.parameters():
        weight = parameter.detach().to("cpu", dtype, copy=True)
        weights[id(parameter)] = nn.Parameter(weight, requires_grad=False)
    # nn.Module's own `to`: diffusers' warns of an empty list of modules that it would rather not convert.
    return nn.Module.to(copy.deepcopy(module, weights), "cpu", dtype)


def _edit(path: pathlib.Path, *, remove: str, **changes: str) -> None:
    """Change a saved config. `_name_or_path`, where a part was loaded from, tells strangers of our folders."""
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    config.pop(remove, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def export_student(
    folder: pathlib.Path, *, parts: Parts, distillation: Distillation, dtype: torch.dtype = torch.float16
) -> None:
    """Write a student as a plain diffusers folder with `distillation.json` and a model card.

    parts: the student's U-Net beside its teacher's other parts, with the scheduler of `student_scheduler`. Adapters
        that the U-Net carries are added to its weights.
    Raises ArtifactError if the student's weights are not finite in `dtype`.
    """
    if lora_file.carries_adapter(parts.unet):
        settled = _copy_to_cpu(parts.unet, torch.float32)
        lora_file.settle(settled)
        parts = dataclasses.replace(parts, unet=settled)
    try:
        save_pipeline(folder, parts=parts, extra=_described(dataclasses.replace(distillation, base=None)), dtype=dtype)
    except errors.ModelError as error:
        raise errors.ArtifactError(f"the student's {error}") from None


def export_lora(
    folder: pathlib.Path,
    *,
    parts: Parts,
    distillation: Distillation,
    base: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a student that is a LoRA: its adapters in diffusers' format, scheduler, `distillation.json`, model card.

    parts: as of `export_student`; the U-Net carries the adapters. base: the model beneath them, by name, folder or hub
        id; by the lineage, if not given: what training started from. A folder is remembered as seen from the LoRA's.
    Raises ArtifactError if there is nothing to write, no base, or a value that is not finite in `dtype`.
    """
    base = base or str(distillation.lineage.get("start") or distillation.lineage.get("teacher") or "")
    if not base:
        raise errors.ArtifactError("the lineage names no teacher, so a LoRA has no base; give the base's name")
    adapters = lora_file.weights(parts.unet, dtype)
    named = {"model": _seen_from(folder, base), "probe": lora_file.probe(parts.unet)}
    texts = _described(dataclasses.replace(distillation, base=named))
    with files.written_whole(folder) as unfinished:
        lora_file.write(unfinished, adapters)
        parts.scheduler.save_pretrained(unfinished / "scheduler")
        _edit(unfinished / "scheduler" / "scheduler_config.json", remove="_name_or_path")
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")


def _seen_from(folder: pathlib.Path, base: str) -> str:
    """A name as it is; a folder or file by its way from `folder`, which begins with a dot."""
    if base in SHIPPED or not pathlib.Path(base).exists():
        return base
    way = os.path.relpath(pathlib.Path(base).resolve(), folder.resolve())
    return way if way.startswith(".") else f"./{way}"


def content(distillation: Distillation) -> dict[str, Any]:
    """What `distillation.json` holds."""
    said = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(distillation)}
    if distillation.base is None:
        del said["base"]  # a full student's file stays what earlier releases read
    return said


def _described(distillation: Distillation) -> dict[str, str]:
    """The texts of an artifact: `distillation.json` and README.md."""
    said = content(distillation)
    return {DISTILLATION_FILE: json.dumps(said, indent=2) + "\n", card.NAME: card.text(said)}


def part_hashes(name_or_path: str) -> dict[str, str]:
    """SHA-256 of each part of a model, over its configs and weights: part -> digest; `file` -> digest of a single file.

    Reads every weight: seconds for each gigabyte. Raises ModelError if there is no such model.
    """
    if is_single_file(name_or_path):
        with pathlib.Path(name_or_path).open("rb") as file:
            return {"file": hashlib.file_digest(file, "sha256").hexdigest()}
    folder = resolve(name_or_path)
    return {part: _hash(folder / part) for part in folders.PARTS if (folder / part).is_dir()}


def _hash(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.json", "*.txt", "*.safetensors") for path in folder.glob(kind)):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
