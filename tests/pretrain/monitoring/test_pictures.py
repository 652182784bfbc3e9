"""Boards drawn by hand on a 2x3 grid, answers counted by hand, and what the maps and the histogram show of them."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ImageDraw
from torch import Tensor

from common import positions
from pretrain.monitoring.pictures import EMPTY, GAP, LINE, RIGHT, WRONG, board, histogram, maps
from pretrain.monitoring.tally import Tally, blind_offsets, blind_places

GRID, PATCH = (2, 3), 60
SHADES = torch.tensor([10, 50, 90, 160, 200, 240], dtype=torch.uint8)  # of the six patches; 128 is an empty place
H, W = 2 * PATCH, 3 * PATCH
NONE = (EMPTY,) * 3


def six(channels: int = 3, images: int = 1) -> Tensor:
    """Images of six flat patches."""
    image = SHADES.view(GRID).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    return image.expand(images, channels, H, W)


def read(sheet: np.ndarray, image: int = 0) -> tuple[list[int], list[int], list[tuple[int, ...]]]:
    """Of one column of the sheet: shades of the patches above, shades below, colours of the corner pixels below."""
    below = sheet.shape[0] - LINE - GAP - H
    left = GAP + image * (W + GAP)
    found: list[np.ndarray] = []
    for top, inside in ((below - GAP - H, PATCH // 2), (below, PATCH // 2), (below, 0)):
        part = sheet[top : top + H, left : left + W]
        found.append(part[inside::PATCH, inside::PATCH].reshape(6, 3))
    above, middles, corners = found
    return above[:, 0].tolist(), middles[:, 0].tolist(), [tuple(corner) for corner in corners.tolist()]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of text that are drawn."""
    lines: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def text(pen: ImageDraw.ImageDraw, place: tuple, line: str, **options: object) -> None:
        lines.append(line)
        draw(pen, place, line, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return lines


@pytest.mark.parametrize("channels", [1, 3])
def test_the_board_by_hand(channels: int, written: list[str]) -> None:
    # patches 0 and 4 right; 1 and 2 change places; 3 claims the place of 4, which covers it; 5 lies where 3 was
    sheet = board(six(channels), torch.tensor([[0, 2, 1, 4, 4, 3]]), GRID)
    above, below, edges = read(sheet)
    assert above == SHADES.tolist()
    assert below == [10, 90, 50, 240, 200, EMPTY]
    assert edges == [RIGHT, WRONG, WRONG, WRONG, RIGHT, NONE]
    assert written[-1] == "33 % of 6"
    assert " ".join(written[:-1]).endswith("green right, red wrong, grey claimed by none. 33 % of 6 right.")


def test_of_several_wrong_claims_the_last_is_seen() -> None:
    _, below, edges = read(board(six(), torch.tensor([[5, 5, 5, 5, 5, 0]]), GRID))
    assert below == [240] + [EMPTY] * 4 + [200] and edges == [WRONG] + [NONE] * 4 + [WRONG]


def test_what_was_not_kept_is_grey_and_what_was_told_has_no_edge(written: list[str]) -> None:
    kept = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])
    asked = torch.tensor([[True, True, False, False], [False, True, True, True]])
    guesses = torch.tensor([[3, 2, 0, 1], [0, 2, 1, 0]])  # those of patches that were told mean nothing
    sheet = board(six(images=2), guesses, GRID, kept, asked)
    faint = [(shade + 4 * EMPTY) // 5 for shade in SHADES.tolist()]  # a fifth is left
    above, below, edges = read(sheet, 0)
    assert above == [10, faint[1], 90, 160, faint[4], 240]
    assert below == [
        EMPTY,
        EMPTY,
        90,
        160,
        EMPTY,
        240,
    ]  # patch 0 claims the place of 3, which was told that it is there
    assert edges == [NONE, NONE, RIGHT, (160,) * 3, NONE, (240,) * 3]
    above, below, edges = read(sheet, 1)
    assert above == [faint[0], 50, 90, faint[3], 200, 240]
    assert below == [240, 50, 90, EMPTY, EMPTY, EMPTY]
    assert edges == [WRONG, (50,) * 3, RIGHT, NONE, NONE, NONE]
    assert written[-2:] == ["50 % of 2", "33 % of 3"]
    assert " ".join(written[:-2]).endswith("no edge: was told its place, grey claimed by none. 40 % of 5 right.")


def test_an_image_of_which_nothing_was_asked(written: list[str]) -> None:
    _, below, _ = read(board(six(), torch.zeros(1, 6).long(), GRID, asked=torch.zeros(1, 6).bool()))
    assert below == SHADES.tolist() and written[-1] == "none asked"


@pytest.mark.parametrize(
    ("grid", "side", "shown"),
    [((4, 4), 32, 96), ((7, 7), 28, 112), ((28, 28), 56, 224), ((28, 28), 224, 224), ((3, 3), 100, 99)],
)
def test_patches_of_the_board_can_be_seen(grid: tuple[int, int], side: int, shown: int) -> None:
    images, N = torch.zeros(2, 3, side, side, dtype=torch.uint8), math.prod(grid)
    sheet = board(images, torch.arange(N).expand(2, N), grid)
    below = sheet[-LINE - GAP - shown : -LINE - GAP, GAP : GAP + shown]
    edge, black = (below == RIGHT).all(-1), (below == 0).all(-1)
    assert (edge | black).all() and black.mean() > 0.5
    assert (sheet[-LINE - GAP] == 255).all() and (sheet[-LINE - GAP - shown : -LINE - GAP, GAP + shown] == 255).all()


def answers(tally: Tally, guesses: list[list[int]], labels: list[list[int]], asked: Tensor | None = None) -> None:
    cells = positions.coordinates(tally.cells).double()
    guessed, right = torch.tensor(guesses), torch.tensor(labels)
    tally.add(guessed, right, (cells[guessed] - cells[right]).norm(dim=-1), asked)


def test_answers_counted_by_hand() -> None:
    tally = Tally(GRID)
    answers(tally, [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]], [[0, 1, 2, 3, 4, 5]] * 2)
    answers(
        tally, [[2, 1, 5], [0, 3, 3]], [[0, 1, 2], [0, 1, 4]], torch.tensor([[True, True, False], [False, True, True]])
    )
    assert tally.asked.tolist() == [3, 4, 2, 2, 3, 2]
    assert tally.right.tolist() == [2, 2, 1, 1, 1, 1]
    assert tally.guessed.tolist() == [7, 2, 2, 3, 1, 1]
    root2, root5 = math.sqrt(2), math.sqrt(5)
    assert tally.far.tolist() == pytest.approx([2, 1 + root2, 2, 1, root2 + 1, root5])
    assert tally.spread.tolist() == [8, 5, 3]  # the diagonals 1.41 count as 1, and 2.24 as 2
    assert tally.right.sum() / tally.asked.sum() == 8 / 16 and tally.distance == pytest.approx(
        (7 + 2 * root2 + root5) / 16
    )


def test_offsets_counted_by_hand() -> None:
    tally = Tally(GRID, relative=True)  # offsets (-1, -2) ... (1, 2) in 3 rows of 5; class 7 is (0, 0)
    answers(tally, [[7, 7, 14]], [[7, 8, 0]])
    assert tally.cells == (3, 5) and len(tally.asked) == 15
    assert tally.asked.nonzero().flatten().tolist() == [0, 7, 8] and tally.right.nonzero().tolist() == [[7]]
    assert tally.guessed[[7, 14]].tolist() == [2, 1]
    assert tally.spread.tolist() == [1, 1, 0, 0, 1]  # from (1, 2) to (-1, -2): 4.47
    tally.add(torch.tensor([[0]]), torch.tensor([[14]]), torch.tensor([[9.0]]))  # a regression may end outside
    assert tally.spread.tolist() == [1, 1, 0, 0, 2] and tally.far[14] == 9


def test_what_rounds_to_the_right_class_is_right() -> None:
    tally = Tally(GRID, relative=True)  # a regression that is off by 0.4 in both directions: 0.57 patches
    tally.add(torch.tensor([[7]]), torch.tensor([[7]]), torch.tensor([[0.57]]))
    assert tally.spread.tolist() == [1, 0, 0, 0, 0] and tally.distance == pytest.approx(0.57)


def expected_shares(distances: list[float], length: int) -> list[float]:
    counted = Counter(round(distance) for distance in distances)
    return [counted[distance] / len(distances) for distance in range(length)]


@pytest.mark.parametrize("grid", [(2, 3), (7, 7), (1, 4), (14, 14)])
def test_blind_guessing_equals_brute_force(grid: tuple[int, int]) -> None:
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    distances = [math.dist(a, b) for a in places for b in places]
    # the answer "no offset" is as far off as the pair is apart
    for shares in (blind_places(grid), blind_offsets(grid, positions.offset_prior(grid))):
        assert shares.tolist() == pytest.approx(expected_shares(distances, len(shares)))
        assert float(shares.sum()) == pytest.approx(1) and float(shares[0]) == pytest.approx(positions.chance(grid))


def test_blind_guessing_where_some_were_told_their_place() -> None:
    places = set(itertools.product(range(2), range(3)))
    left = [places - set(told) for told in itertools.combinations(places, 2)]
    shares = blind_places(GRID, 1 / 4)
    assert shares.tolist() == pytest.approx(expected_shares([math.dist(a, b) for s in left for a in s for b in s], 3))
    assert shares[0] == 1 / 4 and float(shares.sum()) == pytest.approx(1)


def test_blind_guessing_of_offsets_between_some_patches() -> None:
    places = list(itertools.product(range(2), range(3)))
    kept = list(itertools.combinations(places, 4))
    pairs = [(a, b) for some in kept for a in some for b in some]
    shares = blind_offsets(GRID, positions.offset_prior(GRID, 1 / 4))
    assert shares.tolist() == pytest.approx(expected_shares([math.dist(a, b) for a, b in pairs], 5))
    # without pairs of a patch with itself the likeliest offset is one step to the side
    offsets = [(a[0] - b[0], a[1] - b[1]) for a, b in pairs if a != b]
    assert dict(Counter(offsets).most_common(2)) == {(0, 1): 24, (0, -1): 24}
    shares = blind_offsets(GRID, positions.offset_prior(GRID, 0))
    assert shares.tolist() == pytest.approx(expected_shares([math.dist(offset, (0, 1)) for offset in offsets], 5))
    # nor signs: (0, 1), 48 times of 72
    unsigned = [(abs(down), abs(right)) for down, right in offsets]
    assert Counter(unsigned).most_common(1)[0][0] == (0, 1)
    shares = blind_offsets(GRID, positions.distance_prior(GRID, 0))
    assert shares.tolist() == pytest.approx(expected_shares([math.dist(offset, (0, 1)) for offset in unsigned], 5))


@pytest.mark.parametrize(("height", "width", "grid"), [(28, 28, (7, 7)), (80, 64, (5, 4)), (32, 224, (2, 14))])
def test_every_picture_of_a_board_is_96_pixels_high_and_wide_at_least(
    height: int, width: int, grid: tuple[int, int]
) -> None:
    N = grid[0] * grid[1]
    pink = torch.tensor([200, 7, 90], dtype=torch.uint8)
    sheet = board(pink.view(1, 3, 1, 1).expand(1, 3, height, width), torch.zeros(1, N, dtype=torch.long), grid)
    rows, columns = (np.flatnonzero((sheet == pink.numpy()).all(-1).any(axis)) for axis in (1, 0))
    enlarge = -(-96 // min(height, width))
    # above and below an image with a gap between; the first patch alone is at its place below, inside its edge
    assert len(columns) == width * enlarge >= 96 and height * enlarge <= len(rows) < 2 * height * enlarge


def box(picture: np.ndarray, *colours: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a panel's cells in these colours; what is thin, like a colour bar, is left out."""
    found = np.any([(picture == colour).all(-1) for colour in colours], axis=0)
    rows, columns = np.flatnonzero(found.sum(1) > 40), np.flatnonzero(found.sum(0) > 40)
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


RED, BLUE, GREY = (103, 0, 31), (5, 48, 97), (204, 204, 204)  # ends of the third map's colours; never asked


def test_one_answer_to_everything_is_one_red_square() -> None:
    tally = Tally(GRID)
    answers(tally, [[5] * 6], [list(range(6))])
    picture = maps(tally, positions.chance(GRID))
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and np.array_equal(picture, maps(tally, 1 / 6))
    top, bottom, left, right = box(picture, RED, BLUE)
    assert (right - left) / (bottom - top) == pytest.approx(3 / 2, abs=0.05)
    side = (bottom - top) / 2
    assert box(picture, RED) == pytest.approx((top + side, bottom, left + 2 * side, right), abs=3)


def test_what_was_never_asked_is_grey() -> None:
    tally = Tally(GRID, relative=True)
    answers(tally, [[7, 0]], [[7, 7]])  # offset (-1, -2) is guessed but never asked; nothing else is asked than (0, 0)
    tops, sizes = [], []
    picture = maps(tally, 1 / 6)
    for panel in np.array_split(picture, 3, axis=1):
        top, bottom, left, right = box(panel, GREY)
        tops.append(top)
        sizes.append((bottom - top, right - left))
        middle = panel[(top + bottom) // 2, left + 8 : right - 8]
        assert 0.15 < (middle != GREY).any(-1).mean() < 0.25  # a fifth of the middle row
        assert (panel[top + 8 : (2 * top + bottom) // 3 - 2, left + 8 : right - 8] == GREY).all()  # no number either
    assert np.ptp(tops) <= 1 and np.ptp(sizes, axis=0).max() <= 2


def test_the_histogram_draws_the_shares() -> None:
    tally = Tally((1, 4))
    answers(tally, [[0, 1, 2, 0, 0, 0]], [[0, 1, 2, 1, 0, 2]])  # four right, one 1 off, one 2 off
    picture = histogram(tally, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    bars = (picture == (0x2A, 0x9D, 0x8F)).all(-1).sum(0)  # a column of the legend has 9
    heights = [int(np.median(run)) for run in np.split(bars, np.flatnonzero(np.diff(bars > 20)) + 1)]
    heights = [height for height in heights if height > 20]
    assert len(heights) == 3 and heights[0] > 40
    assert heights[1:] == pytest.approx([heights[0] / 4] * 2, abs=2)


def test_nothing_answered_yet_is_drawn_too() -> None:
    tally = Tally(GRID)
    assert maps(tally, 1 / 6).shape[2] == histogram(tally, blind_places(GRID)).shape[2] == 3
