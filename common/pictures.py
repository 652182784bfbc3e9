"""Pictures that are made of patches."""

import numpy as np
import torch
from torch import Tensor

HEIGHT = 112  # small images are enlarged to about this


def board(images: Tensor, guesses: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Images above, and below each the same patches where the model believes they belong, uint8 (H, W, 3).

    images: uint8 (B, C, H, W); guesses: (B, N) predicted place of each patch. A place that no patch claims stays grey;
    where several do, the last in raster order is seen. A patch at its right place has a green edge, others a red one.
    """
    B, _, H, W = images.shape
    h, w = grid
    enlarge = max(1, HEIGHT // H)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    images = images[:, :3].repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2).cpu()
    H, W = H * enlarge, W * enlarge
    ph, pw = H // h, W // w
    placed = torch.full_like(images, 128)
    for b in range(B):
        for n, guess in enumerate(guesses[b].tolist()):
            (row, column), (to_row, to_column) = divmod(n, w), divmod(guess, w)
            patch = images[b, :, row * ph : (row + 1) * ph, column * pw : (column + 1) * pw].clone()
            edge = torch.tensor([40, 200, 80] if guess == n else [220, 50, 50], dtype=torch.uint8)[:, None]
            patch[:, 0], patch[:, -1] = edge, edge
            patch[:, :, 0], patch[:, :, -1] = edge, edge
            placed[b, :, to_row * ph : (to_row + 1) * ph, to_column * pw : (to_column + 1) * pw] = patch
    gap = 4
    sheet = torch.full((3, 2 * H + 3 * gap, B * (W + gap) + gap), 255, dtype=torch.uint8)
    for b in range(B):
        left = gap + b * (W + gap)
        sheet[:, gap : gap + H, left : left + W] = images[b]
        sheet[:, 2 * gap + H : 2 * gap + 2 * H, left : left + W] = placed[b]
    return sheet.permute(1, 2, 0).numpy()
