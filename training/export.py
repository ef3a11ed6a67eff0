"""Export a run's student again, without training: `python -m training.export --run runs/distill --format lora`.

`--report` puts an evaluation into the card of a student that stands; `--file` writes a single `.safetensors` file as a
folder. docs/export.md and docs/models.md have examples.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_kd import artifact, errors, files
from diffusion_kd.networks import lora, lora_file
from training import checkpoint, compute, distill, release
from training import config as configs

_log = logging.getLogger(__name__)

FORMATS = ("pipeline", "lora")
_UNET = "student.unet."
"""Before the names of the student's weights in a checkpoint."""


def student_of(run: pathlib.Path, base: str | None = None) -> tuple[artifact.Parts, artifact.Distillation]:
    """The student in a run's newest readable checkpoint, beside its teacher's parts, and what is known of it.

    base: configs and tokenizers for a teacher that is a single file. The U-Net of a LoRA run carries its adapters.
    Raises ConfigError if there is no run or none that fits, ModelError for a teacher that has gone.
    """
    origin = _origin(run)
    config = configs.load(distill.DistillConfig, str(run / "config.yaml"))
    found = checkpoint.Checkpoints(run / "training" / checkpoint.FOLDER).newest()
    if found is None:
        raise errors.ConfigError(f"{run} holds no checkpoint to go by; train first, or name another run")
    parts = artifact.load(origin["teacher"], base=base or origin.get("base"))
    unet = artifact.load(origin["start"]).unet if origin["start"] else parts.unet
    if config.size_px:
        unet.register_to_config(sample_size=config.size_px // parts.downscale)
    if config.lora_rank:
        lora.add(unet, config.lora_rank, config.lora_alpha or config.lora_rank)
    else:
        unet.requires_grad_(True)
    _take(unet, _weights(found.state), run)
    scheduler = artifact.student_scheduler(parts.scheduler, config.objective.student_steps)
    student = dataclasses.replace(parts, unet=unet, scheduler=scheduler)
    seen = found.step * config.training.batch_size
    return student, distill.describe(config, student, origin, seen, release.code_version())


def _origin(run: pathlib.Path) -> dict[str, Any]:
    """teacher, start, data and, if they were recorded, base and data_licences of a run."""
    path = run / "origin.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: content[key] for key in ("teacher", "start", "data")}
        return kept | {key: content[key] for key in ("base", "data_licences") if key in content}
    except FileNotFoundError:
        raise errors.ConfigError(f"{run} is no run of training.distill: it has no origin.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.ConfigError(f"{path} cannot be read: {type(error).__name__} {errors.first_line(error)}") from None


def _weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What was trained, by the U-Net's names: the average, where one was kept, else the student as it was."""
    if "average" in state:
        return dict(state["average"]["values"])
    named = state.get("student", {}).items()
    return {name.removeprefix(_UNET): weight for name, weight in named if name.startswith(_UNET)}


@torch.no_grad()
def _take(unet: nn.Module, weights: Mapping[str, Tensor], run: pathlib.Path) -> None:
    wanted = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    differing = sorted(wanted.keys() ^ weights.keys())
    differing += [name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape]
    if differing:
        raise errors.ConfigError(
            f"the checkpoint of {run} is of another student: {len(differing)} weights differ, {differing[0]} "
            "among them; its config.yaml or its teacher has changed since"
        )
    for name, weight in wanted.items():
        weight.copy_(weights[name])
    unet.requires_grad_(False)


# --- the command line -------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", type=pathlib.Path, help="the folder of a run of training.distill")
    source.add_argument("--file", help="a model in one .safetensors file, to be written as a diffusers folder")
    parser.add_argument("--out", type=pathlib.Path, help="the folder to write; RUN/student if not given")
    parser.add_argument(
        "--format", choices=FORMATS, help="a diffusers pipeline, or a LoRA's adapters alone; as trained"
    )
    parser.add_argument("--base", help="configs and tokenizers for a .safetensors file: a folder or a hub id")
    parser.add_argument("--fuse", action="store_true", help="the same as --format pipeline, for a LoRA run")
    parser.add_argument("--dtype", choices=sorted(compute.DTYPES), default="fp16", help="of the weights")
    parser.add_argument(
        "--report", type=pathlib.Path, help="report.json of this student, for its card; a student that stands is not "
        "exported anew"
    )  # fmt: skip
    release.add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.file is not None:
        licence = given.teacher_licence or given.accept_licence or given.accepted_by
        if given.out is None or given.format or given.fuse or given.report is not None or licence:
            parser.error("--file takes --out FOLDER, --base and --dtype alone")
        return given
    if given.run is None and (given.report is None or given.out is None):
        parser.error("give --run RUN to export, or --out STUDENT --report report.json to complete a card")
    if given.fuse and given.format == "lora":
        parser.error("--fuse makes a pipeline; leave it out for --format lora")
    return given


def _write_folder(given: argparse.Namespace) -> None:
    """A single file as the folder that an evaluation and the service take."""
    if given.out.is_dir() and any(given.out.iterdir()):
        raise errors.ConfigError(f"{given.out} is not empty; give a new folder")
    parts = artifact.load(given.file, base=given.base)
    artifact.save_pipeline(given.out, parts=parts, dtype=compute.DTYPES[given.dtype])
    _log.info("wrote %s", given.out)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder: pathlib.Path = given.out or given.run / "student"
    files.check_folder(folder)
    if given.file is not None:
        _write_folder(given)
        return
    if given.report is not None and (folder / artifact.DISTILLATION_FILE).is_file():
        release.add_report(folder, given.report)
        return
    if given.run is None:
        raise errors.ConfigError(f"{folder} holds no exported student; give the run that made it with --run")
    parts, described = student_of(given.run, given.base)
    adapters = lora_file.carries_adapter(parts.unet)
    if given.format == "lora" and not adapters:
        raise errors.ConfigError(f"{given.run} trained all weights (lora_rank is 0), so there is no LoRA to export")
    release.export(
        folder,
        parts=parts,
        distillation=described,
        dtype=compute.DTYPES[given.dtype],
        lora=adapters and given.format != "pipeline" and not given.fuse,
        report=given.report,
        acceptance=release.acceptance(given),
        teacher_licence=given.teacher_licence,
    )
    _log.info("exported %s", folder)


if __name__ == "__main__":
    errors.run(main)
