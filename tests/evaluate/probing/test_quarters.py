"""evaluate/probing/quarters.py: which patches each number stands for, and grids half a patch apart."""

import torch

from common.models import ModelConfig, create
from evaluate.probing.quarters import halved, moved, quarters


def test_halves():
    assert [list(range(7))[part] for part in halved(4)] == [[0, 1], [2, 3]]
    assert [list(range(7))[part] for part in halved(5)] == [[0, 1, 2], [2, 3, 4]]
    assert [list(range(7))[part] for part in halved(1)] == [[0], [0]]


def test_moved_pixels_are_mirrored_at_the_border():
    image = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)
    assert moved(image, 0, 0).equal(image)
    assert moved(image, 0, 2)[0, 0].tolist() == [[2, 1, 0, 1], [6, 5, 4, 5], [10, 9, 8, 9]]
    assert moved(image, 1, 0)[0, 0].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]]


def test_every_number_by_hand():
    """Each block's patches under each of the four grids, averaged over quarters and grids."""
    kwargs = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    backbone = create(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs), [16, 24]).eval()  # 4 x 6 patches
    images = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8)
    with torch.no_grad():
        read = quarters(backbone, None, images)
        wanted = {"quarters1": torch.zeros(3, 32), "quarters2": torch.zeros(3, 32)}
        for down in (0, 2):
            for right in (0, 2):
                shifted = moved(images, down, right)
                for number, block in enumerate(backbone.layers(shifted, [0, 1], norm=False), 1):
                    grid = block.tokens.view(3, 4, 6, 8)
                    parts = [grid[:, :2, :3], grid[:, :2, 3:], grid[:, 2:, :3], grid[:, 2:, 3:]]
                    wanted[f"quarters{number}"] += torch.cat([part.mean((1, 2)) for part in parts], 1) / 4
    assert read.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(read[name], value)
