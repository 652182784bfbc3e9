"""What patches of real images tell about their places, on pictures whose answer is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import photo, save

from common.batches.samples import Samples
from common.batches.views import View
from common.data.images import Arrays, Images
from pretrain import audit as auditing
from pretrain.leaks import input_cues


def test_raw_pixels_tell_where_a_gradient_is_and_nothing_of_noise() -> None:
    """Brightness that rises to the lower right: its patches are found. In noise they are not."""
    torch.manual_seed(0)
    slope = torch.linspace(0, 1, 16)
    bright = (slope[:, None] * 2 + slope).expand(64, 1, 16, 16) + 0.01 * torch.rand(64, 1, 16, 16)
    for pixels, found in ((bright, True), (torch.rand(64, 1, 16, 16), False)):
        rows = input_cues.rows(input_cues.patches_of(pixels, (2, 2)))
        assert rows.shape == (64, 4, 64) and torch.equal(rows[0, 1], pixels[0, 0, :8, 8:].flatten())
        accuracy, error = input_cues.probe(rows)
        assert (accuracy - error > 0.5) == found


def test_a_patch_is_looked_at_alone() -> None:
    """Patches of different brightness have seams between them, and none at the edge of the picture: that is no cue."""
    torch.manual_seed(0)
    flat = torch.rand(2, 16, 3, 1, 1).expand(-1, -1, -1, 8, 8)
    found = input_cues.cues(flat)
    assert list(found) == ["pixels", "high-pass residue", "colour differences"]
    assert found["high-pass residue"].abs().max() < 1e-6
    assert torch.equal(found["colour differences"][..., 0, 0], flat[:, :, :2, 0, 0] - flat[:, :, 1:, 0, 0])
    assert list(input_cues.cues(flat[:, :, :1])) == ["pixels", "high-pass residue"]


def test_patches_of_a_size_that_the_grid_does_not_divide() -> None:
    images = torch.arange(5.0).expand(1, 1, 5, 5)
    assert input_cues.patches_of(images, (2, 2)).shape == (1, 4, 1, 2, 2)
    assert torch.equal(input_cues.patches_of(images[..., 1:, 1:], (2, 2))[0, 1, 0], torch.tensor([[3.0, 4.0]] * 2))


def test_right_neighbours_are_found_by_borders_and_not_across_gaps() -> None:
    """Rows of noise whose values are 4 pixels long, across each border of patches without a gap, and across none with
    one of 4 pixels."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 48, 13), dtype=np.uint8).repeat(4, 2)[:, :, 2:50]
    images = Images(Arrays(noise, "rows"), "rows")
    found = {}
    for gap, size in ((0, 48), (4, 32)):
        options = {"scale": [1, 1], "ratio": [1, 1], "jitter": 0, "grayscale": 0, "patch": 8, "patch_at": "centre"}
        samples = Samples(images, {"global": View(size, gap=gap, **options)}, 0, 1)
        crops = samples.__getitems__([(0, i) for i in range(60)]).views["global"].float()
        grid = size // 8, size // 8
        found[gap] = input_cues.neighbours(input_cues.patches_of(crops, grid), grid)
    assert found[0][0] == 1 and found[0][1] == 0
    share, error = found[4]
    assert share - error < 1 / 15 < share + error and share + error < 0.15


def test_what_the_audit_says_of_borders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The gap of a recipe reaches it, and the side of the patches is the backbone's."""
    for index in range(24):
        save(tmp_path / "data" / f"{index}.png", photo(40, 40, index))
    shares = {}
    for gap in (0, 8):
        words = ["quickstart", "--input", f"data={tmp_path / 'data'}", f"views.global.gap={gap}", "threads=1"]
        assert auditing.main([*words, "--json", str(tmp_path / "audit.json")]) == 0
        said = capsys.readouterr().out
        found, error, chance = json.loads((tmp_path / "audit.json").read_text())["input"]["borders"]
        assert f"borders {found:.2%} of the patches find their right neighbour (+-{error:.2%})" in said
        assert chance == pytest.approx(1 / 15) and f"chance is {chance:.2%}" in said
        shares[gap] = found
    assert shares[8] < shares[0]
