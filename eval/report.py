"""The report as JSON, as a table and on disk."""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import torch

import diffusion_kd
from diffusion_kd.shapes import scenes
from eval import compare, embedding, grid

SCHEMA_VERSION = 1
REPORT_NAME, SAMPLES_NAME = "report.json", "samples.png"
_SAMPLES_ROWS = 8
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow")


def build(
    exam: compare.Exam, reference: compare.Reference, rows: Sequence[compare.Row], models: Mapping[str, str]
) -> dict[str, Any]:
    """The report as plain JSON values. models: what each model name in the rows stands for."""
    return {
        "schema_version": SCHEMA_VERSION,
        "protocol": _protocol(exam, models),
        "reference": dataclasses.asdict(reference),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _protocol(exam: compare.Exam, models: Mapping[str, str]) -> dict[str, Any]:
    """Who was asked what, and what the numbers were measured with."""
    return {
        "id": "shapes",
        **dataclasses.asdict(exam.protocol),
        "prompts_held_out": exam.protocol.held_out,
        "image_seeds": {"first": exam.seeds[0], "last": exam.seeds[-1]},
        "resolution_px": scenes.IMAGE_SIZE_PX,
        "feature_network": exam.network.name,
        "metrics": _metric_names(exam.network.name),
        "models": dict(models),
        "batch_size": exam.batch_size,
        "device": embedding.device_of(exam.network).type,
        "cpu_threads": torch.get_num_threads(),
        "versions": {
            "diffusion_kd": diffusion_kd.__version__,
            "python": platform.python_version(),
            **{library: importlib.metadata.version(library) for library in _LIBRARIES},
        },
    }


def _metric_names(network: str) -> dict[str, str]:
    """What each number really is, in full."""
    return {
        "prompt_accuracy": "share of pictures in which the shapes oracle reads every fact asked for; 95 %: Wilson",
        "frechet_distance": f"FD[{network}] of 8-bit pictures to true renders of the same prompts",
        "frechet_distance_to_teacher": f"FD[{network}] of 8-bit pictures to the teacher's",
        "clip_score": f"mean cosine[{network}] of picture and prompt, not scaled",
        "lpips_to_teacher": f"LPIPS[{network}] without learnt weights, same prompt and seed as the teacher",
        "diversity": f"mean LPIPS[{network}] without learnt weights between pictures of one prompt",
        "seconds_per_image": "median over batches of the wall time of a batch, divided by its size",
    }


# --- for the terminal -------------------------------------------------------------------------------

_HEADINGS = (
    "model", "steps", "guidance", "accuracy", "95 %", "seen", "held out",
    "FD", "FD teacher", "CLIP", "LPIPS teacher", "diversity ratio", "s/image",
)  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """The rows as aligned plain text, true renders last."""
    protocol, truth = report["protocol"], report["reference"]
    lines = [_HEADINGS, *(_cells(row) for row in report["rows"])]
    lines.append(("true renders", "", "", f"{truth['prompt_accuracy']:.3f}", "", "", "",
                  f"{truth['frechet_distance']:.2f}", "", f"{truth['clip_score']:.3f}", "", "", ""))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = f"{protocol['prompts']} prompts; FD, CLIP, LPIPS, diversity: features of {protocol['feature_network']}"
    return "\n".join([title, *(_align(line, widths) for line in lines)])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["prompt_accuracy_interval"]
    return (
        row["model"],
        str(row["steps"]),
        f"{row['guidance_scale']:g}",
        f"{row['prompt_accuracy']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row['prompt_accuracy_seen']:.3f}",
        f"{row['prompt_accuracy_held_out']:.3f}",
        f"{row['frechet_distance']:.2f}",
        _number(row["frechet_distance_to_teacher"], 2),
        f"{row['clip_score']:.3f}",
        _number(row["lpips_to_teacher"], 3),
        _number(row["diversity_ratio"], 3),
        f"{row['seconds_per_image']:.4f}",
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _align(line: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = line
    cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


# --- for the eye ------------------------------------------------------------------------------------


def samples(exam: compare.Exam, works: Sequence[compare.Work]) -> PIL.Image.Image:
    """The teacher's and the students' pictures of some prompts, the same seed along each row."""
    rows = exam.protocol.spread(_SAMPLES_ROWS)
    columns = [
        grid.Column(_heading(work.entrant), work.images_uint8[rows])
        for work in works
        if work.entrant.model != compare.TEACHER_FEW_STEPS
    ]
    return grid.draw_grid(columns, [exam.prompts[row] for row in rows])


def _heading(entrant: compare.Entrant) -> str:
    return f"{entrant.model.replace('_', ' ')}\n{entrant.steps} step{'s' if entrant.steps > 1 else ''}"


# --- on disk ----------------------------------------------------------------------------------------


def write(folder: pathlib.Path, report: Mapping[str, Any], grid: PIL.Image.Image) -> None:
    """Write `report.json` and `samples.png`; an earlier report there is replaced, and no file is ever half-written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        draft = pathlib.Path(beside)
        grid.save(draft / SAMPLES_NAME)
        (draft / REPORT_NAME).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for name in (SAMPLES_NAME, REPORT_NAME):
            (draft / name).replace(folder / name)
