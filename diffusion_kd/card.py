"""The model card of an exported student: README.md, as model hubs show it, made of `distillation.json` and a report.

Everything but the evaluation follows from `distillation.json`. The evaluation stands between two marks, so that it can
be put in later.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub

from diffusion_kd import licences
from diffusion_kd.networks import lora_file

NAME = "README.md"
NOT_MEASURED = "not measured"
_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"
_HASH_CHARACTERS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """What a card says of a report.

    protocol: a sentence on what was asked and measured, and with what. verdict: of the quality floor.
    models: headings of the columns. rows: the metric's full name, with network and protocol where they matter, and a
        value for each model; None where it was not measured.
    """

    protocol: str
    verdict: str
    models: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str | None]]]


def text(content: Mapping[str, Any], evaluation: Evaluation | None = None) -> str:
    """The card. content: what `distillation.json` holds. evaluation: of this very student, if there is one yet."""
    lineage = content.get("lineage") or {}
    sections = [
        f"---\n{_front_matter(content, lineage)}\n---",
        f"# {_title(content, lineage)}",
        _opening(content, lineage),
        f"## How to use\n\n{_usage(content)}",
        f"## Where it comes from\n\n{_lineage(content, lineage)}",
        f"## Licences\n\n{_licences(lineage)}",
        f"## Evaluation\n\n{_BEGIN}\n{_evaluation(evaluation)}\n{_END}",
        f"## Limits\n\n{_limits(content, lineage)}",
    ]
    return "\n\n".join(sections) + "\n"


def with_evaluation(folder: pathlib.Path, content: Mapping[str, Any], evaluation: Evaluation) -> str:
    """The card of an artifact with this evaluation: what stands around the marks of the present card stays as it is."""
    path = folder / NAME
    present = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = present.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        return text(content, evaluation)
    return f"{before}{_BEGIN}\n{_evaluation(evaluation)}\n{_END}{after}"


# --- sections ---------------------------------------------------------------------------------------


def _front_matter(content: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    tags = ["text-to-image", "stable-diffusion-xl", "distillation", "few-step", f"{content['objective']}"]
    licence: dict[str, Any] = _hub_licence(_teachers(lineage))
    card = huggingface_hub.ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=lineage.get("teacher") if lineage.get("teacher_from") == "hub" else None,
        tags=[*tags, "lora"] if content.get("base") else tags,
        **licence,
    )
    return card.to_yaml().strip()


def _teachers(lineage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in lineage.get("licences", []) if each["covers"] != licences.DATA]


def _hub_licence(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the hub's front matter calls the strictest licence of those models that the student is made from."""
    if not found:
        return {"license": "unknown"}
    name = max(found, key=lambda each: licences.STRICTNESS.index(licences.Kind(each["kind"])))["name"]
    if name == licences.UNKNOWN_NAME:
        return {"license": "unknown"}
    return {"license": name.lower()} if licences.is_known(name) else {"license": "other", "license_name": name}


def _title(content: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    kind = "LoRA student" if content.get("base") else "student"
    steps = _steps(content)
    return f"A {steps[0]} to {steps[-1]} step {kind} of {_short(lineage.get('teacher', 'an unnamed teacher'))}"


def _opening(content: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    size = content["size_px"]
    return (
        f"Draws {size}x{size} px pictures from text in {_listed(_steps(content))} steps, without guidance. Distilled "
        f"from `{_short(lineage.get('teacher', 'an unnamed teacher'))}` ({content['prediction_type']}, SDXL's "
        f"architecture) by the objective `{content['objective']}`. `distillation.json` has all of this for programs."
    )


def _usage(content: Mapping[str, Any]) -> str:
    most = _steps(content)[-1]
    lines = ["import diffusers", ""]
    if content.get("base"):
        lines += [
            f'pipe = diffusers.StableDiffusionXLPipeline.from_pretrained("{_base(content)}")',
            f'pipe.load_lora_weights("path/to/this/folder", weight_name="{lora_file.NAME}")',
            'pipe.scheduler = diffusers.LCMScheduler.from_pretrained("path/to/this/folder", subfolder="scheduler")',
        ]
    else:
        lines += ['pipe = diffusers.StableDiffusionXLPipeline.from_pretrained("path/to/this/folder")']
    # A base may be of another size; a pipeline knows its own.
    size = f", height={content['size_px']}, width={content['size_px']}" if content.get("base") else ""
    lines += [f'image = pipe("a prompt", num_inference_steps={most}, guidance_scale=0{size}).images[0]']
    code = "\n".join(lines)
    return (
        f"```python\n{code}\n```\n\nPlain diffusers is all it takes. `num_inference_steps` is one of "
        f"{_listed(_steps(content))}, `guidance_scale` is 0, and the scheduler is the one in `scheduler/`: it goes "
        f"through the timesteps that the student was trained at ({_timesteps(content)}). On a GPU, add "
        '`torch_dtype=torch.float16` (or bfloat16) and `.to("cuda")`.'
    )


def _base(content: Mapping[str, Any]) -> str:
    """What to load a LoRA's base by: its hub id, or a folder of its name somewhere."""
    model = str(content["base"]["model"])
    is_on_hub = model.count("/") == 1 and not model.startswith(".")
    return model if is_on_hub else f"path/to/{pathlib.PurePath(model).name}"


def _lineage(content: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    hashes = lineage.get("teacher_sha256") or {}
    said = "; ".join(f"{part} `{digest[:_HASH_CHARACTERS]}`" for part, digest in hashes.items())
    checkpoint = lineage.get("checkpoint")
    rows: list[tuple[str, object]] = [
        ("teacher", f"`{_short(lineage.get('teacher', 'unknown'))}`"),
        ("SHA-256 of the teacher's parts", said or "unknown"),
        ("started from", f"`{_short(lineage['start'])}`" if lineage.get("start") else "the teacher"),
        ("data", lineage.get("data", "unknown")),
        ("images seen", lineage.get("images_seen", "unknown")),
        ("checkpoint", f"`{checkpoint}`" if checkpoint else "unknown"),
        ("seed", lineage.get("seed", "unknown")),
        ("code", f"diffusion-kd `{lineage.get('code', 'unknown')}`"),
        ("form", "LoRA" if content.get("base") else "full pipeline"),
    ]
    table = _table(("", "value"), [(name, (_cell(value),)) for name, value in rows])
    config = json.dumps(lineage.get("config", {}), indent=1, ensure_ascii=False)
    folded = f"<details><summary>config</summary>\n\n```json\n{config}\n```\n\n</details>"
    return f"{table}\n\n{folded}"


def _licences(lineage: Mapping[str, Any]) -> str:
    found = lineage.get("licences", [])
    if not found:
        return "Not recorded."
    rows = [
        (
            _cell(_short(each["covers"])),
            (_cell(each["name"]), each["kind"], _counted(each.get("items")), _cell(each["found_in"])),
        )
        for each in found
    ]
    parts = [_table(("of", "licence", "kind", "items", "found in"), rows)]
    parts += [
        f"{_cell(each['accepted_by'])} stated on {each['on']} to have leave to use what is under "
        f"{_cell(each['licence'])} ({_cell(_short(each['covers']))}) for this."
        for each in lineage.get("acceptances", [])
    ]
    parts.append("Found by a program, by names and texts; no legal advice.")
    return "\n\n".join(parts)


def _counted(items: int | None) -> str:
    return f"{items:,}" if items else ""


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return (
            f"All metrics: {NOT_MEASURED}. `python -m eval.run --teacher TEACHER --student FOLDER --out REPORT`, then "
            "`python -m training.export --out FOLDER --report REPORT/report.json`, put the numbers here."
        )
    rows = [
        (_cell(name), [NOT_MEASURED if value is None else value for value in values])
        for name, values in evaluation.rows
    ]
    table = _table(("metric", *evaluation.models), rows)
    return f"{evaluation.protocol}\n\nVerdict of the quality floor: **{evaluation.verdict}**.\n\n{table}"


def _limits(content: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    steps, size = _steps(content), content["size_px"]
    points = [
        f"Made for {_listed(steps)} steps and {size}x{size} px; other step counts, sizes, schedulers or guidance give "
        "other, worse pictures.",
        "Takes no negative prompt: there is no guidance to lead away from it.",
        "Noise is drawn anew between steps: a seed does not give the teacher's picture, nor one picture at every step "
        "count.",
        "Knows what its teacher knows, with its teacher's gaps and biases, and may vary its pictures less.",
    ]
    points += [
        f"{_cell(_short(each['covers']))} is under {_cell(each['name'])}: not for commercial use."
        for each in lineage.get("licences", [])
        if each["kind"] == licences.Kind.NON_COMMERCIAL
    ]
    points += [
        f"The licence of {_cell(_short(each['covers']))} is not known ({_cell(each['name'])})."
        for each in lineage.get("licences", [])
        if each["kind"] == licences.Kind.UNKNOWN
    ]
    return "\n".join(f"- {point}" for point in points)


# --- words ------------------------------------------------------------------------------------------


def _steps(content: Mapping[str, Any]) -> list[int]:
    return sorted(int(steps) for steps in content["student_timesteps"])


def _timesteps(content: Mapping[str, Any]) -> str:
    by_steps = sorted(content["student_timesteps"].items(), key=lambda each: int(each[0]))
    return "; ".join(f"{steps}: {', '.join(map(str, timesteps))}" for steps, timesteps in by_steps)


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _short(name: object) -> str:
    """A name without the folders of the machine it was made on; a hub's owner/name stays."""
    return " ".join(
        pathlib.PurePath(word).name if word.count("/") > 1 or word.startswith((".", "/")) else word
        for word in str(name).split(" ")
    )


def _cell(value: object) -> str:
    """Text that does not break a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = [headings, ["---"] * len(headings), *((name, *cells) for name, cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
