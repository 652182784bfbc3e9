"""Label maps on the device: top-k logits of whole images in, soft targets of crops out; pure functions of torch.

A map covers its image: cell (r, c) of (H, W) is centred at ((r + 0.5) / H, (c + 0.5) / W), in shares of the image. A
token of a crop is labelled by what the map says where the token lies, be the crop flipped, rotated, sheared or moved.
Token Labeling (arXiv 2104.10858), RelLabel's RoIAlign (arXiv 2101.05022).

Letters: B images, k classes that a cell keeps, C classes in all, H x W cells of a map, h x w tokens of a crop, N = h*w.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from common.batches.strong import MOVES

Grid = tuple[int, int]


@dataclass
class Targets:
    """Soft labels; each row sums to 1 + s/C under smoothing s, as published."""

    image: Tensor  # (B, C) of the crop as a whole
    tokens: Tensor  # (B, N, C) row-major


def unpack(records: Tensor) -> tuple[Tensor, Tensor]:
    """(logits float16, class numbers int64), (B, k, H, W) each, of records int16 (B, 2, k, H, W)."""
    return records[:, 0].view(torch.float16), records[:, 1].long() & 0xFFFF


def scatter(scores: Tensor, ids: Tensor, classes: int) -> Tensor:
    """Logits of all classes, (B, k, H, W) scores and class numbers -> float32 (B, C, H, W); absent classes have 0."""
    B, _, H, W = scores.shape
    return torch.zeros(B, classes, H, W, device=scores.device).scatter_(1, ids.long(), scores.float())


def one_hot(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Smoothed one-hot rows (B, C) of labels (B,); they sum to 1."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def smoothed(shares: Tensor, smoothing: float) -> Tensor:
    """Shares of C classes (..., C), with `smoothing` spread over all of them: q (1 - s + s/C) + s/C, as published."""
    low = smoothing / shares.shape[-1]
    return shares * (1 - smoothing + low) + low


def targets(
    scores: Tensor,
    ids: Tensor,
    classes: int,
    boxes: Tensor,
    flips: Tensor,
    grid: Grid,
    smoothing: float = 0.0,
    moves: Tensor | None = None,
    legacy_xy_swap: bool = False,
) -> Targets:
    """Soft labels of one crop of each image, from its map.

    scores, ids     (B, k, H, W) logits and class numbers of the k best classes of every cell
    boxes           (B, 4) top, left, height and width of the crop, in shares of the map
    flips           (B,) bool: whether the crop was flipped after it was cut
    grid            (h, w) tokens of the crop
    moves           (B, M, 2, 3) what its pixels were then moved by, in that order, see `transforms`; None: by nothing
    legacy_xy_swap  cut (left, top, width, height) instead, as the published training does by mistake: what it calls a
                    crop of the upper half is labelled as the left half
    """
    flipped = flips.view(-1, 1, 1, 1)
    scores, ids = (torch.where(flipped, each.flip(-1), each) for each in (scores, ids))
    top, left, height, width = boxes.float().unbind(1)
    left = torch.where(flips, 1 - left - width, left)
    order = (left, top, width, height) if legacy_xy_swap else (top, left, height, width)
    logits, boxes = scatter(scores, ids, classes), torch.stack(order, 1)
    dense, whole = (cut(logits, boxes, size, not legacy_xy_swap) for size in (grid, (1, 1)))
    if moves is not None:
        moved = (moves != moves.new_tensor([[1, 0, 0], [0, 1, 0]])).flatten(1).any(1)
        some = logits[moved], boxes[moved], moves[moved]
        dense[moved], whole[moved] = sampled(*some, grid), sampled(*some, (1, 1))
    tokens = dense.flatten(2).transpose(1, 2)
    return Targets(*(smoothed(each.softmax(-1), smoothing) for each in (whole.flatten(1), tokens)))


def cut(logits: Tensor, boxes: Tensor, grid: Grid, aligned: bool = True) -> Tensor:
    """Logits (B, C, H, W) in boxes (B, 4) of the map, by torchvision's RoIAlign: (B, C, h, w).

    Not `aligned`: as the published training calls it, which widens a box of less than a cell to the right and downwards
    and is the same otherwise.
    """
    B, _, H, W = logits.shape
    top, left, height, width = boxes.unbind(1)
    corners = torch.stack([left * W, top * H, (left + width) * W, (top + height) * H], 1)
    rows = torch.arange(B, device=logits.device, dtype=torch.float32)[:, None]
    with torch.autocast(logits.device.type, enabled=False):
        return roi_align(logits, torch.cat([rows, corners - (0.0 if aligned else 0.5)], 1), grid, aligned=aligned)


# ---------------------------------------------------------------------------- rotated, sheared, moved


def transforms(moves: Tensor, size: tuple[float, float]) -> Tensor:
    """Matrices of moves (B, M, 2), each a kind (its place in MOVES) and its signed value: (B, M, 2, 3), from a place
    (x, y) in the moved crop to where its content was, in shares of the crop, which has `size` (height, width) pixels.

    As PIL has them: Rotate about the centre, in degrees; ShearX and ShearY from the upper left corner; the translations
    in shares of a side.
    """
    kind, value = moves[..., 0], moves[..., 1].float()
    ratio = size[0] / size[1]
    angle = torch.where(kind == MOVES.index("Rotate"), -value * (math.pi / 180), 0.0)

    def where(name: str) -> Tensor:
        return torch.where(kind == MOVES.index(name), value, 0.0)

    cos, sin = angle.cos(), angle.sin()
    xy, yx = sin * ratio, -sin / ratio  # in shares, of sides that may differ
    rows = [
        torch.stack([cos, xy + where("ShearX") * ratio, where("TranslateX") + 0.5 * (1 - cos - xy)], -1),
        torch.stack([yx + where("ShearY") / ratio, cos, where("TranslateY") + 0.5 * (1 - cos - yx)], -1),
    ]
    return torch.stack(rows, -2)


def sampled(logits: Tensor, boxes: Tensor, moves: Tensor, grid: Grid) -> Tensor:
    """Logits (B, C, H, W) where the tokens of moved crops come from, (B, C, h, w): means of points, as RoIAlign takes
    them, so many a token that no cell is skipped. What comes from outside of a crop has logit 0 for every class."""
    h, w = grid
    fine = [-(-cells // tokens) * tokens for cells, tokens in zip(logits.shape[-2:], grid, strict=True)]
    y, x = ((torch.arange(n, device=logits.device) + 0.5) / n for n in fine)
    places = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1).flatten(0, 1).expand(len(logits), -1, 2)
    inside = torch.ones_like(places[..., 0], dtype=torch.bool)
    for matrix in reversed(moves.unbind(1)):  # the last one first: from where a place is to where it was
        places = places @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]
        inside &= ((places >= 0) & (places <= 1)).all(-1)
    x, y = places.unbind(-1)
    top, left, height, width = (side[:, None] for side in boxes.unbind(1))
    points = 2 * torch.stack([left + x * width, top + y * height], -1) - 1
    with torch.autocast(logits.device.type, enabled=False):
        points = points.unflatten(1, tuple(fine))  # (B, fine h, fine w, 2)
        values = F.grid_sample(logits, points, padding_mode="border", align_corners=False)
    return F.adaptive_avg_pool2d(values * inside.view(-1, 1, *fine), (h, w))


# ---------------------------------------------------------------------------- maps of a part of the image


def in_map(boxes: Tensor, sizes: Tensor, crop: float | None, side: tuple[int, int]) -> Tensor:
    """Boxes (B, 4) in shares of images of `sizes` (B, 2) pixels (height, width), in shares of their maps: of the whole
    image where `crop` is None, else of what the evaluation transform shows at size `side` (height, width): the centre,
    `crop` of the tighter side."""
    if crop is None:
        return boxes
    heights, widths = sizes.float().unbind(1)
    zoom = torch.maximum(int(side[0] / crop) / heights, int(side[1] / crop) / widths)  # as `evaluation` resizes
    shown = torch.stack([side[0] / (zoom * heights), side[1] / (zoom * widths)], 1)  # shares of the image
    return torch.cat([(boxes[:, :2] - (1 - shown) / 2) / shown, boxes[:, 2:] / shown], 1)
