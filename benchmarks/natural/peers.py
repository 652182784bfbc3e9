"""MAE and SimCLR as the package lightly has them, on our ViT and images, for benchmarks/results.py --natural.

    python benchmarks/natural/peers.py mae cifar10_compare data=PATH steps=1000 run=FOLDER
    python benchmarks/natural/peers.py simclr cifar10_compare data=PATH steps=1000 run=FOLDER --overwrite

lightly's are the transforms, the masked encoder and the decoder, the projection head and the losses; put together as
its documentation says: MAE (arXiv 2111.06377) hides 0.75 of the patches and predicts normalised pixels with a decoder
of one block; SimCLR (arXiv 2002.05709) compares two crops by NT-Xent, temperature 0.1, with the colours that lightly
recommends for small pictures (half as strong, no blur). Ours are the timm ViT of the recipe, the images as they are
decoded, the optimizer and its schedule, and what is written: backbone.safetensors and .json, at the end and at every
milestone, which our evaluations judge as any other run. Of the recipe, `views` gives the size alone.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.processes.launch import entry, set_threads, usable_cores

# isort: split
import contextlib
import importlib.metadata
import importlib.util
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from common import config as configuration
from common.checkpoints import public
from common.checkpoints.run_folder import commit
from common.checkpoints.storage import WEIGHTS
from common.data import Images, open_data
from common.errors import Refusal
from common.models import Backbone, create
from common.models.plan import PlanSpec
from common.training.optim import clip_gradients, parameter_groups
from common.training.schedules import rate
from pretrain.config import PretrainConfig, load

METHODS = {"mae": "mean", "simclr": "class"}  # name: what of its backbone stands for an image
HIDDEN, DECODER, TEMPERATURE = 0.75, 128, 0.1


class MAE(nn.Module):
    """lightly's masked encoder and its decoder on a timm ViT."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

        self.patch = vit.patch_embed.patch_size[0]
        self.encoder = MaskedVisionTransformerTIMM(vit)
        self.narrow = nn.Linear(vit.embed_dim, DECODER)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches, embed_dim=DECODER, depth=1, num_heads=4
        )
        self.predict = nn.Linear(DECODER, 3 * self.patch**2)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The loss of one view (B, 3, H, W)."""
        from lightly.models import utils

        (images,) = views
        size = (len(images), self.encoder.sequence_length)  # the class token comes first, and is never hidden
        kept, hidden = utils.random_token_mask(size, mask_ratio=HIDDEN, device=images.device)
        seen = self.narrow(self.encoder.encode(images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = self.decoder(utils.set_at_index(tokens, kept, seen.type_as(tokens)))
        guessed = self.predict(utils.get_at_index(tokens, hidden))  # (B, hidden, 3 * patch ** 2)
        target = utils.get_at_index(utils.patchify(images, self.patch), hidden - 1)
        return nn.functional.mse_loss(guessed.float(), utils.normalize_mean_var(target))


class SimCLR(nn.Module):
    """lightly's projection head and loss on a timm ViT's class token."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.vit = vit
        self.head = SimCLRProjectionHead(vit.embed_dim, 512, 128)
        self.criterion = NTXentLoss(temperature=TEMPERATURE)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The loss of two views (B, 3, H, W) each."""
        tokens = self.vit.forward_features(torch.cat(list(views)))
        first, second = self.head(tokens[:, 0]).float().chunk(2)
        return self.criterion(first, second)


class Pictures(torch.utils.data.Dataset):
    """Decoded images through a transform of lightly's: a list of views."""

    def __init__(self, images: Images, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(to_pil_image(self.images.read(i)))


def transform_of(method: str, config: PretrainConfig) -> Any:
    """lightly's transform of a method, for the recipe's size, mean and deviation."""
    from lightly.transforms import MAETransform, SimCLRTransform

    side: Any = config.views["global"].size
    normalize = {"mean": list(config.model.mean), "std": list(config.model.std)}
    if method == "mae":
        return MAETransform(input_size=side, normalize=normalize)
    return SimCLRTransform(input_size=side, cj_strength=0.5, gaussian_blur=0.0, normalize=normalize)


def batches(pictures: Pictures, config: PretrainConfig) -> Iterator[list[Tensor]]:
    """Yield batches of views without end, in a new order each time round."""
    workers = config.loader.workers
    if workers is None:
        workers = max(1, usable_cores() - 1)
    order = torch.Generator().manual_seed(config.seed)
    loader = torch.utils.data.DataLoader(
        pictures, config.batch, shuffle=True, drop_last=True, num_workers=workers, generator=order,
        persistent_workers=workers > 0,
    )  # fmt: skip
    if len(loader) == 0:
        raise Refusal(f"data={config.data} has {len(pictures)} images: expected a batch of {config.batch} at least")
    while True:
        yield from loader


def export(folder: Path, backbone: Backbone, method: str, config: PretrainConfig, step: int) -> None:
    """Write the backbone after `step` as evaluations read it."""
    training = {
        "recipe": f"lightly {importlib.metadata.version('lightly')}, {method}",
        "data": config.data, "step": step, "steps": config.steps, "images_seen": step * config.batch,
        "batch": config.batch, "seed": config.seed, "precision": config.precision, "commit": commit(),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    public.export(folder, backbone, public.describe(backbone, "full", METHODS[method], training), WEIGHTS)


def train(method: str, config: PretrainConfig, folder: Path) -> None:
    """Train, with a line in metrics.jsonl as ours have it, and export."""
    torch.manual_seed(config.seed)
    set_threads(config.threads)
    accelerator = Accelerator()
    device, own, steps = accelerator.device, config.optimizer, config.steps or 0
    if config.precision == "auto":
        config.precision = "bf16" if device.type == "cuda" else "fp32"
    low = config.precision == "bf16"
    backbone = create(config.model, config.views["global"].size)
    backbone.use_plans({PlanSpec(position="full")})
    task = {"mae": MAE, "simclr": SimCLR}[method](backbone.model).to(device).train()
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    peak = own.lr * config.batch / 256
    optimizer = torch.optim.AdamW(parameter_groups(task, own.weight_decay), lr=peak, betas=tuple(own.betas), fused=True)
    feed = batches(Pictures(open_data(config.data), transform_of(method, config)), config)
    seconds, losses, logged = 0.0, [], 0
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step - 1, steps, round(float(own.warmup) * steps), peak, own.min_lr)
        views = [view.to(device, non_blocking=True) for view in next(feed)]
        with torch.autocast(device.type, dtype=torch.bfloat16) if low else contextlib.nullcontext():
            loss = task(views)
        loss.backward()
        clip_gradients(accelerator, parameters, own.clip, own.clip_by)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % config.log_every == 0 or step == steps:
            mean = float(torch.stack(losses).mean())  # waits for the device
            seconds += time.perf_counter() - begun
            line = {"step": step, "loss": mean, "images_per_second": (step - logged) * config.batch / seconds}
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            seconds, losses, logged = 0.0, [], step
        else:
            seconds += time.perf_counter() - begun
        if config.milestone_every and step % config.milestone_every == 0:
            export(folder / "state" / f"step_{step:08d}", backbone, method, config, step)
    export(folder, backbone, method, config, steps)


def main(argv: list[str]) -> None:
    """Read the words, train. Raises Refusal."""
    method, recipe, *words = [word for word in argv if word != "--overwrite"] + [""] * (2 - len(argv))
    if method not in METHODS or not recipe:
        raise Refusal(f"{method or 'no method'}: expected {' or '.join(METHODS)}, a recipe, and key=value words")
    if importlib.util.find_spec("lightly") is None:
        raise Refusal(f"{method}: the package lightly is not installed: pip install --no-deps lightly lightly_utils")
    config = load(configuration.find_recipe(recipe, "pretrain"), words)
    if config.run is None or config.steps is None:
        raise Refusal("expected run=FOLDER and steps=N")
    folder = Path(config.run)
    if folder.exists() and "--overwrite" not in argv:
        raise Refusal(f"run={folder} exists: give another, or --overwrite")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        train(method, config, folder)


if __name__ == "__main__":
    entry(main)()
