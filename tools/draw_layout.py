"""Draws the packed layout of a small pair and its attention mask: `python -m tools.draw_layout > docs/layout.svg`.

Rows, coordinates and cells come from `diffusion.layout`, so that the drawing cannot say anything else than the code.
"""

from __future__ import annotations

import torch

from megatron_dtrpo.diffusion.layout import CLEAN, PackedSequence, lay_out, visible

BLOCK, PROMPT, RESPONSES = 4, 6, (5, 4)
MASK_ID = 0
CELL, LEFT, TOP = 18, 190, 110
INK = "#24292f"
COLOURS = {"clean sees clean": "#4c78a8", "noisy sees clean": "#9ecae9", "noisy sees its block": "#f58518"}


def sequence() -> PackedSequence:
    """A prompt of six tokens with answers of five and four in blocks of four, one noisy view each."""
    prompt = torch.arange(1, PROMPT + 1)
    responses = [torch.arange(10 * r, 10 * r + length) for r, length in enumerate(RESPONSES, start=1)]
    masked = (
        torch.tensor([[[0, 0, 0, 1], [0, 0, 1, 0]]], dtype=torch.bool),
        torch.tensor([[[0, 0, 1, 1], [0, 1, 0, 0]]], dtype=torch.bool),
    )
    weight = [each.double() for each in masked]
    return lay_out(prompt, responses, masked, weight, block_size=BLOCK, mask_id=MASK_ID, block_start="clean")


def token_name(token: int, position: int) -> str:
    if token == MASK_ID:
        return "M"
    return f"x{token}" if position < PROMPT else "yz"[token // 10 - 1] + str(token % 10 + 1)


def run_name(branch: int, view: int) -> str:
    if branch == 0:
        return "prompt's full block"
    answer = "yz"[branch - 1]
    return f"prompt's tail, {answer}: clean" if view == CLEAN else f"{answer}: noisy view"


def svg() -> str:
    packed = sequence()
    coordinates, count = packed.coordinates(), len(packed)
    sees = visible(coordinates.at((slice(None), None)), coordinates.at((None, slice(None))))
    runs = list(zip(packed.branch.tolist(), packed.view.tolist(), strict=True))
    names = [token_name(*pair) for pair in zip(packed.tokens.tolist(), packed.position.tolist(), strict=True)]
    width, height = LEFT + CELL * count + 20, TOP + CELL * count + 60
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(LEFT, 20, "packed sequence: what each row is (keys)", anchor="start", size=13),
        text(10, TOP - 12, "who looks (queries)", anchor="start", size=13),
    ]
    for i in range(count):
        middle = i * CELL + CELL / 2
        fill = "#f6c68f" if names[i] == "M" else "#ffffff" if runs[i][1] == CLEAN else "#fde8d0"
        drawn += [
            cell(LEFT + i * CELL, TOP - 30, fill),
            text(LEFT + middle, TOP - 17, names[i], size=9),
            text(LEFT - 12, TOP + middle + 4, names[i], size=9),
        ]
        for k in range(count):
            if sees[i, k]:
                kind = "clean" if runs[i][1] == CLEAN else "noisy"
                target = "clean" if runs[k][1] == CLEAN else "its block"
                colour = COLOURS[f"{kind} sees {target}"]
                drawn.append(cell(LEFT + k * CELL, TOP + i * CELL, colour))
    for begin in [i for i in range(count) if i == 0 or runs[i] != runs[i - 1]]:
        end = next((i for i in range(begin, count) if runs[i] != runs[begin]), count)
        name = run_name(*runs[begin])
        x, y = LEFT + begin * CELL, TOP + begin * CELL
        label = name if end - begin > BLOCK else name.replace(", ", "\n").replace("'s f", "'s\nf")
        for number, line in enumerate(reversed(label.split("\n"))):
            drawn.append(text(x + (end - begin) * CELL / 2, TOP - 38 - 12 * number, line, size=10))
        drawn.append(text(10, y + (end - begin) * CELL / 2 + 4, name, anchor="start", size=10))
        drawn.append(f'<path d="M{x} {TOP - 52}V{TOP + CELL * count}M10 {y}H{LEFT + CELL * count}" stroke="{INK}"/>')
    for number, (name, colour) in enumerate(COLOURS.items()):
        x, y = LEFT + 165 * number, TOP + CELL * count + 20
        drawn += [cell(x, y, colour), text(x + CELL + 6, y + 13, name, anchor="start")]
    return "\n".join([*drawn, "</svg>", ""])


def cell(x: float, y: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="#d0d7de" stroke-width="0.5"/>'


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 11) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


if __name__ == "__main__":
    print(svg(), end="")
