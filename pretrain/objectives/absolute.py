"""`absolute`: every patch says where it is.

Positional Label's APL (arXiv 2206.04981), and with other options Jigsaw-ViT (2207.11971), MP3 (2207.07611) and DropPos
(2309.03576): see configs/pretrain/{apl,jigsaw,mp3,droppos}.yaml. Letters: B images, N patches, K kept, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import positions
from common.errors import Refusal
from common.limits import BelowOne, Count, NotNegative, PatchShare, Range
from common.models import Backbone, Features
from common.models.plan import PlanSpec, Position
from common.numerics import wide
from common.processes import collectives
from pretrain.heads import Decoder, HalfHead, LinearHead, MlpHead
from pretrain.objectives import Answers, Pass, Positional

HEADS = {"linear": LinearHead, "mlp": MlpHead, "half": HalfHead}
ATTENTIVE_TEMPERATURE = 0.1  # DropPos


@dataclass
class DecoderOptions:
    """Blocks between the encoder's tokens and the head; thrown away after training."""

    blocks: Annotated[int, Range(at_least=0)] = 0
    """Transformer blocks without position embedding; 0: no decoder. DropPos has 2."""
    width: Count = 512
    """Channels of the decoder."""
    heads: Count = 16
    """Attention heads of the decoder."""


@dataclass
class AbsoluteOptions:
    """Options of `absolute`."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    head: Literal["linear", "mlp", "half"] = "linear"
    """linear: one layer on all channels (MP3). mlp: three with ReLUs (Jigsaw-ViT). half: Positional Label's, on the
    first half of the channels."""
    keep: PatchShare = 1.0
    """Share of the patches that the encoder sees (Jigsaw-ViT 0.5, DropPos 0.25)."""
    position: Position = "none"
    """Position embedding in the pass: none (leak-free), partial (shown to some patches, which are then not asked) or
    full (as the paper's released ViT: the answer is in the token, and the audit refuses it)."""
    position_keep: BelowOne = 0.0
    """With position=partial: share of the kept patches that are told their place (DropPos 0.25)."""
    context: PatchShare = 1.0
    """Share of the kept patches that are keys and values, in every layer (MP3 0.25)."""
    loss_on: Literal["auto", "all", "hidden"] = "auto"
    """Patches that are asked: all, hidden (those not told their place), or auto: hidden where position is partial."""
    smoothing: NotNegative = 0.0
    """Width sigma of the position smoothing at the start, in patches; it falls linearly to 0 over the training
    (DropPos 1). 0: one-hot labels."""
    attentive: Literal["none", "kept", "image"] = "none"
    """Weights of the patches in the loss, by their likeness to the class token: none; kept (of this pass's own tokens);
    image (DropPos: of a second pass over the whole image, a third of a full step more). The loss is a weighted mean
    over all processes; with accumulate it is the mean of the parts' own, as later weights are not known yet."""
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    """Blocks between encoder and head."""
    view: str = "global"
    """The view whose patches are asked."""


class Absolute(Positional):
    """Cross-entropy of each patch token against its row-major index in the backbone's own grid."""

    Options = AbsoluteOptions
    crops_seen = "first"

    distances: Tensor

    def __init__(self, options: AbsoluteOptions, backbone: Backbone) -> None:
        super().__init__()
        plan = PlanSpec(options.keep, options.position, options.position_keep, options.context)
        self.options, self.grid = options, backbone.grid
        N = self.grid[0] * self.grid[1]
        _, visible, _ = plan.counts(N)
        self.only_hidden = options.loss_on == "hidden"
        if self.only_hidden and plan.position != "partial":
            raise Refusal(
                f"objectives.absolute.loss_on=hidden goes with position=partial, and position={plan.position}: no "
                "patch is told its place, or all are; use loss_on=all"
            )
        partial = plan.position == "partial"
        tokens = Pass(options.view, plan, hidden_embedding_of="absolute" if partial else None)
        self.passes = {"tokens": tokens}
        if options.attentive != "none" and not backbone.has_class_token:
            raise Refusal(
                f"objectives.absolute.attentive={options.attentive} weighs patches by their likeness to the class "
                f"token, and {backbone.config.name} has none: use attentive=none, or a model with one"
            )
        if options.attentive == "image":
            whole = PlanSpec(position="none" if plan.position == "none" else "full")
            self.passes["image"] = Pass(options.view, whole, grad=False)
        if partial:  # DropPos's mask token: what a patch has in place of the embedding that is hidden from it
            self.hidden_position = nn.Parameter(torch.empty(backbone.width))
            nn.init.normal_(self.hidden_position, std=0.02)
        self.decoder = None
        if options.decoder.blocks:
            self.decoder = Decoder(backbone.width, options.decoder.width, options.decoder.blocks, options.decoder.heads)
        self.head = HEADS[options.head](options.decoder.width if self.decoder else backbone.width, N)
        self.register_buffer("distances", positions.distances(self.grid), persistent=False)
        # Nothing seen, a patch may be at any place that no other was told to be at.
        self.chance = 1 / (N - visible) if self.only_hidden else positions.chance(self.grid)

    def logits(self, features: Mapping[str, Features]) -> Tensor:
        """Place that each kept patch believes to have, (B, K, N), float32."""
        tokens = features["tokens"].tokens
        if self.decoder is not None:
            P = features["tokens"].prefix.shape[1]
            tokens = self.decoder(torch.cat([features["tokens"].prefix, tokens], 1))[:, P:]
        return wide(self.head(tokens))

    def answers(
        self, features: Mapping[str, Features], draws: Mapping[str, Tensor], origin: Tensor | None = None
    ) -> Answers:
        return self._judge(self.logits(features), features, origin)

    def _judge(self, logits_BKN: Tensor, features: Mapping[str, Features], origin: Tensor | None = None) -> Answers:
        labels_BK = self._places(features["tokens"])
        if origin is not None:
            labels_BK = origin.gather(1, labels_BK)
        guesses_BK = logits_BKN.argmax(-1)
        asked = ~features["tokens"].plan.visible if self.only_hidden else None  # type: ignore[operator]
        return Answers(guesses_BK, labels_BK, self.distances[guesses_BK, labels_BK], asked)

    def _places(self, features: Features) -> Tensor:
        """Row-major index of every kept patch, (B, K)."""
        if features.plan.kept is not None:
            return features.plan.kept
        B, N, _ = features.tokens.shape
        return torch.arange(N, device=features.tokens.device).expand(B, N)

    def _weights(self, features: Mapping[str, Features], asked: Tensor | None) -> Tensor | None:
        """Weight of every patch in the loss, (B, K), or None for equal ones: zero where a patch is not asked, times,
        if wished, softmax(cos(class token, patch) / 0.1) (DropPos). Without gradient."""
        weights: Any = None
        if self.options.attentive != "none":
            seen = features[{"kept": "tokens", "image": "image"}[self.options.attentive]]
            alike = F.cosine_similarity(seen.prefix[:, :1].detach().float(), seen.tokens.detach().float(), dim=-1)
            weights = (alike / ATTENTIVE_TEMPERATURE).softmax(-1)
            kept = features["tokens"].plan.kept
            if self.options.attentive == "image" and kept is not None:
                weights = weights.gather(1, kept)
                weights = weights / weights.sum(1, keepdim=True)  # an image counts as much as another
        if asked is None:
            return weights
        return asked.float() if weights is None else weights * asked

    def _total(self, weights: Tensor) -> Tensor:
        """Sum of the weights, (), over all processes and divided by them, so that the mean of their losses is the
        weighted mean of all. Where they are `attentive` they follow from the tokens, so that those of a later part
        of the step are not known yet: each part is a weighted mean by itself (DropPos: of each process by itself)."""
        total = weights.sum()
        if self.options.attentive == "none":
            return total  # as many in every process
        return collectives.total(total) / collectives.processes()

    def changed(self, processes: int) -> list[str]:
        shared = processes > 1 and self.options.attentive != "none"
        return ["attentive weights are summed over all processes"] if shared else []

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats, weighted mean over the patches asked), accuracy, distance (mean, in patches), chance."""
        logits_BKN = self.logits(features)
        with torch.no_grad():
            answers = self._judge(logits_BKN, features)
            weights_BK = self._weights(features, answers.asked)
        labels = answers.labels
        sigma = self.options.smoothing * (1 - self.progress)
        if sigma > 0:
            labels = positions.smoothing(self.grid, sigma).to(labels.device)[labels]  # (B, K, N)
        if weights_BK is None:
            loss = F.cross_entropy(logits_BKN.flatten(0, 1), labels.flatten(0, 1))
        else:
            each = F.cross_entropy(logits_BKN.flatten(0, 1), labels.flatten(0, 1), reduction="none")
            loss = (each * weights_BK.flatten()).sum() / self._total(weights_BK)
        return {
            "loss": loss,
            "accuracy": answers.accuracy(),
            "distance": answers.mean(answers.distances),
            "chance": loss.new_full((), self.chance),
        }
