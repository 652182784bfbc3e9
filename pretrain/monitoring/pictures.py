"""Pictures that are made of patches, and of what was counted about them: uint8 (H, W, 3), for a file or TensorBoard.

Letters: B images, N = h*w patches in row-major order, K kept.
"""

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from pretrain.leaks.controls import cells
from pretrain.monitoring.tally import Tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, PATCH = 96, 8  # an image shown is at least so high and wide, and so is a patch of it
GAP, LINE, LETTER = 6, 18, 13  # space between images, height of a line of text and of its letters
NARROWEST = 360  # a sheet that leaves room for its caption
EMPTY, RIGHT, WRONG = 128, (40, 200, 80), (220, 50, 50)
NUMBERED = 7  # cells in a row or column of a map up to which numbers are written into them


# ---------------------------------------------------------------------------- the board


def board(
    images: Tensor, guesses: Tensor, grid: tuple[int, int], kept: Tensor | None = None, asked: Tensor | None = None
) -> np.ndarray:
    """Draw images as the encoder saw them, and below each the same patches where the model believes they belong.

    images: uint8 (B, C, H, W). guesses: (B, K) predicted place of each kept patch. kept: (B, K) which patches those
    are; None: all. The others are grey. asked: (B, K) bool; None: all. A patch that was not asked was shown its place,
    and lies there without an edge. A patch at its right place has a green edge, others a red one. A place that no patch
    claims is grey; where several do, the one that belongs there is seen, else the last in raster order: every right
    answer shows. Their share is written below each image, and for the whole sheet at its top.
    """
    patches = _patches(images, grid)  # (B, N, ph, pw, 3)
    N = patches.shape[1]
    guesses_BK = guesses.cpu().numpy()
    kept_BK = np.broadcast_to(np.arange(N), guesses_BK.shape) if kept is None else kept.cpu().numpy()
    asked_BK = np.ones(guesses_BK.shape, bool) if asked is None else asked.cpu().numpy()
    right_BK = (guesses_BK == kept_BK) & asked_BK
    columns = []
    for image, guess, place, question, right in zip(patches, guesses_BK, kept_BK, asked_BK, right_BK, strict=True):
        dim = (image.mean(-1, keepdims=True) * 0.2 + EMPTY * 0.8).astype(np.uint8).repeat(3, -1)
        dim[place] = image[place]
        moved = image[place]
        moved[right] = _edged(moved[right], RIGHT)
        moved[question & ~right] = _edged(moved[question & ~right], WRONG)
        placed = np.full_like(image, EMPTY)
        strays = question & ~right  # first, so that a patch in its own place covers them
        placed[guess[strays]] = moved[strays]
        placed[place[~strays]] = moved[~strays]
        columns.append((_join(dim, grid), _join(placed, grid), _share(right.sum(), question.sum())))
    return _sheet(columns, _caption(right_BK.sum(), asked_BK.sum(), kept is not None, not asked_BK.all()))


def _patches(images: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Enlarge patches of uint8 images (B, C, H, W) in raster order, (B, N, ph, pw, 3)."""
    _, C, H, W = images.shape
    h, w = grid
    enlarge = max(math.ceil(SIDE / min(H // h * h, W // w * w)), math.ceil(PATCH / min(H // h, W // w)))
    images = images.expand(-1, 3, -1, -1) if C == 1 else images[:, :3]
    images = images.cpu().repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    ph, pw = H * enlarge // h, W * enlarge // w
    return cells(images[..., : h * ph, : w * pw], grid).permute(0, 1, 3, 4, 2).numpy()


def _join(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image (H, W, 3) of its patches (N, ph, pw, 3)."""
    _, ph, pw, _ = patches.shape
    h, w = grid
    return patches.reshape(h, w, ph, pw, 3).swapaxes(1, 2).reshape(h * ph, w * pw, 3)


def _edged(patches: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Give patches (K, ph, pw, 3) an edge that leaves most of them to see."""
    thick = max(1, min(patches.shape[1:3]) // 12)
    edged = np.empty_like(patches)
    edged[:] = colour
    edged[:, thick:-thick, thick:-thick] = patches[:, thick:-thick, thick:-thick]
    return edged


def _share(right: int, asked: int) -> str:
    return f"{_percent(right / asked)} of {asked:,}" if asked else "none asked"


def _percent(share: float) -> str:
    """Format as 61 %, but 0.5 % and 99.8 %: near both ends a decimal more."""
    return f"{100 * share:.{0 if share in (0, 1) or 0.0995 <= share < 0.995 else 1}f} %"


def _caption(right: int, asked: int, some_kept: bool, some_told: bool) -> str:
    above = "Above: what the model saw" + (", grey what it did not. " if some_kept else ". ")
    no_edge = ", no edge: was told its place" if some_told else ""
    return (
        f"{above}Below: where each patch believes it is; green right, red wrong{no_edge}, grey claimed by none. "
        f"{_share(right, asked)} right."
    )


def _sheet(columns: list[tuple[np.ndarray, np.ndarray, str]], caption: str) -> np.ndarray:
    """Put columns of two images of one size with a line below, under a caption: uint8 (H, W, 3)."""
    H, W, _ = columns[0][0].shape
    width = max(GAP + len(columns) * (W + GAP), NARROWEST)
    # a font that comes with Pillow; pillow-simd may have been built without FreeType, which it takes to scale one
    font = ImageFont.load_default(LETTER) if features.check("freetype2") else ImageFont.load_default()
    lines = textwrap.wrap(caption, int(0.95 * len(caption) * (width - 2 * GAP) / font.getlength(caption)))
    top = GAP + len(lines) * LINE
    sheet = Image.new("RGB", (width, top + 2 * (H + GAP) + LINE), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = font
    for index, line in enumerate(lines):
        pen.text((GAP, GAP // 2 + index * LINE), line, fill="black")
    for index, (above, below, line) in enumerate(columns):
        left = GAP + index * (W + GAP)
        sheet.paste(Image.fromarray(above), (left, top))
        sheet.paste(Image.fromarray(below), (left, top + H + GAP))
        pen.text((left + (W - font.getlength(line)) / 2, top + 2 * H + GAP + 2), line, fill="black")
    return np.asarray(sheet)


# ---------------------------------------------------------------------------- what was counted


def maps(tally: Tally, chance: float) -> np.ndarray:
    """Draw three heat maps over the classes of a tally: accuracy, mean distance, and how often each is guessed.

    Classes lie where they are in the grid, or with `relative` where the query lies as seen from the key. `chance`: the
    accuracy of the best answer that ignores the image. A class that was never asked is grey. Bright is good in the
    first two; in the third a model that always gives the same answer shows as one red cell among blue ones.
    """
    from matplotlib.colors import LogNorm, Normalize

    asked = torch.where(tally.asked > 0, tally.asked, torch.nan)  # a class may be guessed that was never asked
    right, far, guessed = ((x / asked).view(tally.cells).numpy() for x in (100 * tally.right, tally.far, tally.guessed))
    # the rarest offsets, seen a few times, would set the scale of all the others
    often = (2 * tally.asked >= tally.asked.double().mean()).view(tally.cells).numpy()
    best, farthest, most = (
        float(np.nanmax(values[often], initial=least))
        for values, least in ((right, 200 * chance), (far, 1.0), (guessed, 2.0))
    )
    rows, columns = tally.cells
    side = 3.4 / max(rows, columns)  # inches a cell
    figure = _figure(3 * (max(columns * side, 1.2) + 1.3), max(rows * side, 0.8) + 1.2)
    noun = "offset (query as seen from key)" if tally.relative else "place"
    figure.suptitle(
        f"{_share(int(tally.right.sum()), int(tally.asked.sum()))} right, {tally.distance:.2f} patches off on average; "
        f"chance {_percent(chance)}; by {noun}",
        fontsize=10,
    )
    axes = figure.subplots(1, 3)
    bar = _map(axes[0], tally, right, "viridis", Normalize(0, best), "right, % (red line: chance)")
    bar.ax.axhline(100 * chance, color="red")
    _map(axes[1], tally, far, "viridis_r", Normalize(0, farthest), "patches off, mean")
    bar = _map(axes[2], tally, guessed, "RdBu_r", LogNorm(1 / most, most, clip=True), "times guessed / times asked")
    bar.set_ticks([1 / most, 1, most], labels=[f"{1 / most:.2g}", "1", f"{most:.2g}"], minor=False)
    bar.minorticks_off()
    return _pixels(figure)


def _map(axes: Any, tally: Tally, values: np.ndarray, colours: str, scale: Any, title: str) -> Any:
    """Draw one heat map with square cells, in each its number where there are few; returns its colour bar."""
    from matplotlib.ticker import MaxNLocator

    (rows, columns), (h, w) = tally.cells, tally.grid
    top, left = (1 - h, 1 - w) if tally.relative else (0, 0)
    axes.set_facecolor("0.8")  # seen where nothing was asked
    shown = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colours,
        norm=scale,
        extent=(left - 0.5, left + columns - 0.5, top + rows - 0.5, top - 0.5),
    )
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
    if max(rows, columns) <= NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                dark = np.dot(shown.to_rgba(value)[:3], (0.3, 0.6, 0.1)) < 0.5
                axes.text(
                    left + column, top + row, f"{value:.{0 if value >= 10 else 1}f}",
                    ha="center", va="center", fontsize=8, color="white" if dark else "black",
                )  # fmt: skip
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    return bar


def histogram(tally: Tally, blind: Tensor) -> np.ndarray:
    """Share of answers at each whole distance from the truth, 0 the right ones, beside what blind guessing gives.

    blind: (L,) shares, from `tally.blind_places` or `tally.blind_offsets`.
    """
    from matplotlib.ticker import MaxNLocator

    shares = (tally.spread / tally.spread.sum()).numpy()
    last = int(torch.nonzero(tally.spread + blind).max()) + 1
    figure = _figure(6.4, 3.2)
    axes = figure.subplots()
    bars = axes.bar(np.arange(last), 100 * shares[:last], 0.8, color="#2a9d8f")
    steps = axes.stairs(100 * blind[:last].numpy(), np.arange(last + 1) - 0.5, color="black")
    axes.legend([bars, steps], ["the model", "blind guessing"], frameon=False, fontsize=9)
    what = "offset" if tally.relative else "place"
    axes.set_xlabel(f"from the right {what} to the answered one, in patches, rounded (0: right)", fontsize=9)
    axes.set_ylabel("answers, %", fontsize=9)
    axes.set_title(
        f"{_share(int(tally.right.sum()), int(tally.asked.sum()))} right (blind {_percent(float(blind[0]))}), "
        f"{tally.distance:.2f} patches off on average",
        fontsize=10,
    )
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    return _pixels(figure)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches; no pyplot, which would keep it and ask for a display."""
    from matplotlib.figure import Figure  # a third of a second, which only runs that draw should pay

    return Figure((width, height), dpi=100, layout="constrained")


def _pixels(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
