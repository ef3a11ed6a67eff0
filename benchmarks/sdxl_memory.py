"""Memory of a distillation of SDXL-base by part, full and LoRA, 512 and 1024 px, 1 and 8 GPUs: a table in Markdown.

`python -m benchmarks.sdxl_memory`: plans from `training.plan`, of the configs `sdxl_full` and `sdxl_lora` with the same
number of images at a time on every device. No GPU is needed and no weight is read.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from diffusion_kd import errors
from training import config as configs
from training import distill, plan

_SMALL_GB = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One run. micro_batch: images at a time on a device."""

    config: str
    size_px: int
    world: int
    micro_batch: int

    @property
    def title(self) -> str:
        return (
            f"{self.config.removeprefix('sdxl_')}, {self.size_px} px, {self.world} GPU{'s' if self.world > 1 else ''}"
        )

    def plan(self) -> plan.Plan:
        batch = configs.load(distill.DistillConfig, self.config).training.batch_size
        shares = [f"size_px={self.size_px}", f"training.accumulate={batch // self.world // self.micro_batch}"]
        config = configs.load(distill.DistillConfig, self.config, shares)
        return plan.make(config, "sdxl-base", plan.Machine(world=self.world), switches=False)


COLUMNS = tuple(
    Column(config, size_px, world, micro_batch)
    for config, micro_batches in (("sdxl_full", (8, 2)), ("sdxl_lora", (2, 1)))
    for size_px, micro_batch in zip((512, 1024), micro_batches, strict=True)
    for world in (1, 8)
)


def table(columns: Sequence[Column], plans: Sequence[plan.Plan]) -> str:
    """A row for each part that is 0.05 GB somewhere at its peak."""
    parts = {part for each in plans for part, size in each.at_peak_gb.items() if size >= _SMALL_GB}
    order = sorted(parts, key=lambda part: -sum(each.at_peak_gb.get(part, 0.0) for each in plans))
    rows = [
        ["GB at the peak", *(column.title for column in columns)],
        ["---", *("--:" for _ in columns)],
        ["images at a time", *(str(each.micro_batch) for each in plans)],
        *([part, *(f"{each.at_peak_gb.get(part, 0.0):.2f}" for each in plans)] for part in order),
        ["**in all**", *(f"**{each.peak_gb:.1f}**" for each in plans)],
        ["the peak is in", *(each.peak_moment for each in plans)],
        ["tera-operations an image", *(f"{each.tera_operations:.1f}" for each in plans)],
        ["seconds to rehearse", *(f"{each.rehearsed_s:.0f}" for each in plans)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.sdxl_memory", description=__doc__.splitlines()[0]).parse_args()
    sys.stdout.write(table(COLUMNS, [column.plan() for column in COLUMNS]) + "\n")


if __name__ == "__main__":
    errors.run(main)
