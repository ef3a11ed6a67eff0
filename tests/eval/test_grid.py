"""The grid: where each picture stands, and that captions fit."""

import numpy as np
import PIL.ImageFont

from eval import grid


def test_pictures_stand_in_their_cells_magnified() -> None:
    levels = np.arange(1, 7, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * 20
    columns = [grid.Column(f"c{index}", np.broadcast_to(part, (3, 64, 64, 3))) for index, part in enumerate(levels)]
    sheet = np.asarray(grid.draw_grid(columns, ["one", "two", "three"]))
    step = 128 + grid.GAP_PX
    assert sheet.shape == (grid.HEADING_PX + 3 * step, grid.CAPTION_PX + 2 * step, 3)
    for column in range(2):
        for row in range(3):
            top, left = grid.HEADING_PX + row * step, grid.CAPTION_PX + column * step
            assert (sheet[top : top + 128, left : left + 128] == levels[column, row]).all()


def test_headings_and_captions_are_written() -> None:
    columns = [grid.Column("teacher\n50 steps", np.full((1, 64, 64, 3), 255, np.uint8))]
    sheet = np.asarray(grid.draw_grid(columns, ["a red circle"]))
    assert (sheet[: grid.HEADING_PX, grid.CAPTION_PX :] < 128).any()
    assert (sheet[grid.HEADING_PX :, : grid.CAPTION_PX] < 128).any()


def test_large_pictures_keep_their_size() -> None:
    sheet = grid.draw_grid([grid.Column("x", np.zeros((1, 300, 200, 3), np.uint8))], ["x"])
    assert sheet.size == (grid.CAPTION_PX + 200 + grid.GAP_PX, grid.HEADING_PX + 300 + grid.GAP_PX)


def test_captions_break_between_words_and_lose_none() -> None:
    font = PIL.ImageFont.load_default(grid.FONT_PX)
    text = "there is a small yellow square to the right of an orange triangle against a dusk gradient"
    wrapped = grid.wrap(text, font, 150)
    assert wrapped.replace("\n", " ") == text
    assert max(font.getlength(line) for line in wrapped.split("\n")) <= 150
    assert len(wrapped.split("\n")) < 8
