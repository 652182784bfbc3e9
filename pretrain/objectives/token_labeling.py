"""`token_labeling`: what is in the picture, and in every patch of it, as a machine sees it.

Token Labeling (arXiv 2104.10858) trains LV-ViT and SP-ViT so: an annotator has told what it sees in every cell of every
image (`pretrain/generate_labels.py`), and the class token and each patch learn to say it. Its crops are to be cut out
of the maps, so it looks at the view `global`; MixToken is an option of that view (`views.global.mix_token`). Any
backbone learns it, through a layer on its patches that is the auxiliary head of the two it was made for.

Without `labels` the class of an image stands for them: so a trained network is carried over to other classes.

Letters: B images, K classes, N = h*w patches, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batches.mixing import mix_targets, partners
from common.batches.samples import Beside
from common.batches.unreadable import Limit
from common.batches.views import View
from common.data import Images
from common.errors import Refusal
from common.features.classes import ClassHead, class_logits
from common.limits import AutoCount, BelowOne, NotNegative
from common.models import Backbone, Features
from common.models.plan import PlanSpec
from common.numerics import wide
from common.paths import if_there, path_option
from pretrain.objectives import Objective, Pass
from pretrain.token_labels import maps
from pretrain.token_labels.reader import open_labels

MACHINE = {"published": (0.5, 0.9), "sensible": (0.9, 0.5)}  # its share where it agrees with the class, and where not


@dataclass
class TokenLabelingOptions:
    """Options of `token_labeling`."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    labels: str | None = field(default=None, metadata=path_option(if_there))
    """Dense labels of the images: a file made by generate_labels, or a folder of published .pt files; null: the class
    of an image is the label of each of its patches."""
    class_weight: NotNegative = 1.0
    """Share of the loss of the image as a whole."""
    dense_weight: NotNegative = 1.0
    """Share of the loss of the patches (the paper's text: 0.5; its code: 1). 0: no layer on patches; with `labels` this
    is Re-labelling (arXiv 2101.05022), without them plain classification."""
    smoothing: BelowOne = 0.1
    """Label smoothing: this much of each label is spread evenly over all classes."""
    ground_truth: Literal["none", "published", "sensible"] = "none"
    """How much of the class of an image is mixed into what the annotator says of the image as a whole: nothing;
    published: half where the two agree and a tenth where not, as the authors' code has it; sensible: the reverse."""
    legacy_xy_swap: bool = False
    """Cut the maps with both axes exchanged, as the published training does by mistake."""
    pool: Literal["auto", "class", "mean"] = "auto"
    """What stands for the image: class (the class token), mean (of the patch tokens), or auto: the class token where
    there is one."""
    position: Literal["full", "none"] = "full"
    """Position encoding in the pass: full or none."""
    classes: AutoCount = "auto"
    """How many there are, in the data as in the labels; auto: those of the data."""
    view: Literal["global"] = "global"
    """The view that is looked at, its first crop."""


class TokenLabeling(Objective):
    """Cross-entropy, with soft labels, of a linear layer on what stands for the image and of another on its patches.

    MixToken's exchanged patches are labelled as what they show. An image without a class takes part by its dense
    labels; without those it takes none, as in `classification`.
    """

    Options = TokenLabelingOptions
    labelled = True
    pools = "class"
    crops_seen = "first"

    def __init__(self, options: TokenLabelingOptions, backbone: Backbone) -> None:
        super().__init__()
        if options.pool == "class" and not backbone.has_class_token:
            raise Refusal(
                f"objectives.token_labeling.pool=class: {backbone.config.name} has no class token here; use pool=mean"
            )
        if not options.class_weight + options.dense_weight > 0:
            raise Refusal("objectives.token_labeling: class_weight=0 and dense_weight=0 leave nothing to learn")
        if options.labels is None and (options.ground_truth != "none" or options.legacy_xy_swap):
            what = "legacy_xy_swap=true" if options.legacy_xy_swap else f"ground_truth={options.ground_truth}"
            raise Refusal(f"objectives.token_labeling.{what} goes with dense labels: set labels=FILE, or leave it out")
        self.options, self.pools = options, options.pool
        self.passes = {"image": Pass(options.view, PlanSpec(position=options.position))}
        self.head = ClassHead(backbone.width, options.classes, dense=backbone.width if options.dense_weight else None)
        self.dense_share = backbone.dense_share
        self.crop: tuple[int, int] = backbone.size  # pixels (height, width)
        self.covers: tuple[float | None, tuple[int, int]] = (None, (1, 1))  # of the maps, see `maps.in_map`

    def connect(self, others: Mapping[str, Objective], views: Mapping[str, View]) -> None:
        """Raises Refusal where pixels are mixed, which would say something else than the labels of their patches."""
        view = views[self.options.view]
        self.crop = view.cut_size  # a policy moves it before patches are cut out; each stays in its own cell
        if view.is_mixed and not view.mix_token > 0:
            raise Refusal(
                f"views.{self.options.view}: mixup={view.mixup} and cutmix={view.cutmix} mix pixels, and patches have "
                "labels of their own: set both to 0, and mix_token=1 to exchange patches"
            )

    def beside(self, images: Images, limit: Limit) -> Beside | None:
        """Open the dense labels of `images`. Raises Refusal where they are not theirs, or of other classes."""
        if self.options.labels is None:
            return None
        labels = open_labels(self.options.labels, images, self.options.classes, limit)
        self.covers = labels.crop, labels.size
        return labels

    def classifier(self) -> ClassHead:
        """The layer that scores classes, and the one on patches with it."""
        return self.head

    def targets(self, draws: Mapping[str, Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Soft labels of unmixed images: (of the image (B, K); of its patches (B, N, K), or (B, 1, K) for all of them
        alike; how much of them is known, (B,): 1 or 0)."""
        options, labels_B = self.options, draws["label"]
        K, known_B = options.classes, labels_B >= 0
        class_BK = maps.one_hot(labels_B.clamp(min=0), K, options.smoothing)
        if "record" not in draws:
            return class_BK, class_BK[:, None], known_B.float()
        scores, ids = maps.unpack(draws["record"])
        boxes = maps.in_map(draws["box"], draws["size"], *self.covers)
        moves = maps.transforms(draws["moves"], self.crop) if "moves" in draws else None
        cells = grid if options.dense_weight else (1, 1)
        how = options.smoothing, moves, options.legacy_xy_swap
        made = maps.targets(scores, ids, K, boxes, draws["flip"], cells, *how)
        if options.ground_truth == "none":
            return made.image, made.tokens, torch.ones_like(made.image[:, 0])
        agreeing, not_agreeing = MACHINE[options.ground_truth]
        share_B = torch.where(made.image.argmax(1) == labels_B, agreeing, not_agreeing)
        share_B1 = torch.where(known_B, share_B, 1.0)[:, None]
        return share_B1 * made.image + (1 - share_B1) * class_BK, made.tokens, torch.ones_like(share_B)

    def scores(self, features: Mapping[str, Features]) -> Tensor:
        """Scores of the classes, (B, K), float32: of LV-ViT and SP-ViT with half of the largest of their patches'."""
        return class_logits(features["image"], self.pools, self.head.tensors, self.dense_share)

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats) and the two that it is made of, class_loss and dense_loss; accuracy, share of images whose class
        is right; agreement, share of patches that say what their label says most; and chance.

        draws: "label" and "known" as in `classification`; with dense labels "record" (B, 2, k, H, W), and where the
        crop lies, "box", "flip", "size" and perhaps "moves" (see `Samples`); where patches are exchanged "shares"
        (B, 2), of an image's own label and of its neighbour's.
        """
        seen, options = features["image"], self.options
        class_BK, tokens_BNK, known_B = self.targets(draws, seen.grid)
        told = torch.where(draws["known"] > 0, draws["known"], 1.0)  # images with a class, of this part's share
        count = told if "record" not in draws else len(known_B)
        logits_BK = class_logits(seen, self.pools, self.head.tensors)
        target_BK = class_BK * known_B[:, None]
        if "shares" in draws:
            target_BK = mix_targets(target_BK, draws["shares"])
        class_loss = F.cross_entropy(logits_BK, target_BK, reduction="none").sum() / count  # 0 of what is not known
        report = {"loss": options.class_weight * class_loss, "class_loss": class_loss}
        if self.head.dense is not None:
            dense_BNK = wide(self.head.dense(seen.own_tokens))
            each_B = _dense_loss(dense_BNK, tokens_BNK)
            report["dense_loss"] = (each_B * known_B).sum() / count
            report["loss"] = report["loss"] + options.dense_weight * report["dense_loss"]
            if self.measured:
                same_BN = dense_BNK.detach().argmax(-1) == tokens_BNK.argmax(-1)
                report["agreement"] = (same_BN.float().mean(1) * known_B).sum() / count
        right_B = _right(logits_BK.detach().argmax(1), draws)
        return report | {"accuracy": right_B.sum() / told, "chance": logits_BK.new_full((), 1 / options.classes)}


def _dense_loss(logits_BNK: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each image's patches, (B,), against soft labels (B, N, K) or, the same for all, (B, 1, K)."""
    targets_BNK = targets.expand_as(logits_BNK)
    each = F.cross_entropy(logits_BNK.flatten(0, 1), targets_BNK.flatten(0, 1), reduction="none")
    return each.unflatten(0, logits_BNK.shape[:2]).mean(1)


def _right(guesses_B: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Which guesses are the class of the image, or of its neighbour where more of that is seen, (B,) bool."""
    labels_B = draws["label"]
    if "shares" in draws:
        own_B, other_B = draws["shares"].unbind(1)
        labels_B = torch.where(own_B >= other_B, labels_B, partners(labels_B))
    return guesses_B == labels_B
