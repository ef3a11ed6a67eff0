"""A picture of pictures: one row a prompt, one column a model."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from numpy.typing import NDArray

TILE_PX, GAP_PX, CAPTION_PX, HEADING_PX, FONT_PX = 128, 6, 216, 44, 15
"""Side of a shown picture (at least), space between, width of the captions, height of the headings, font size."""


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """heading: one or two lines. images_uint8: (R, H, W, 3), one for each row of the grid."""

    heading: str
    images_uint8: NDArray[np.uint8]


def draw_grid(columns: Sequence[Column], captions: Sequence[str]) -> PIL.Image.Image:
    """Columns side by side, each row with its caption at the left.

    Small pictures are magnified by a whole number, each pixel to a block: what was made stays what is seen.
    """
    height, width = columns[0].images_uint8.shape[1:3]
    scale = max(TILE_PX // max(height, width), 1)
    step_x, step_y = width * scale + GAP_PX, height * scale + GAP_PX
    sheet = PIL.Image.new("RGB", (CAPTION_PX + len(columns) * step_x, HEADING_PX + len(captions) * step_y), "white")
    pen, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(FONT_PX)
    for row, caption in enumerate(captions):
        middle = (GAP_PX, HEADING_PX + row * step_y + height * scale // 2)
        pen.multiline_text(middle, wrap(caption, font, CAPTION_PX - 2 * GAP_PX), "black", font, anchor="lm")
    for number, column in enumerate(columns):
        left = CAPTION_PX + number * step_x
        pen.multiline_text((left, HEADING_PX - GAP_PX), column.heading, "black", font, anchor="ld")
        for row, image_uint8 in enumerate(column.images_uint8):
            magnified = image_uint8.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet.paste(PIL.Image.fromarray(magnified), (left, HEADING_PX + row * step_y))
    return sheet


def wrap(text: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont, width_px: int) -> str:
    """Break a text between words so that each line fits; a longer word keeps a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
