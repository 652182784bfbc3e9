"""Heads that turn tokens into answers about position, and class tokens into prototype logits.

Letters: B images, K tokens of each, D width, Q pairs of tokens, P prefix tokens.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.errors import Refusal
from common.numerics import wide

NORM_EPS = 1e-6  # of DropPos's decoder
LastLayer = Literal["normed", "weight_norm", "linear"]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


class LinearHead(nn.Module):
    """One linear layer on all D channels (MP3, arXiv 2207.07611)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = _linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, classes)."""
        return self.classifier(tokens)


class MlpHead(nn.Module):
    """Three linear layers with ReLU between them, D -> D -> D -> classes (Jigsaw-ViT, arXiv 2207.11971), drawn as
    PyTorch draws them, like the authors'."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, classes)."""
        return self.classifier(self.second(self.first(tokens).relu()).relu())


class HalfHead(nn.Module):
    """Positional Label's head (arXiv 2206.04981, Fig. 1): an MLP on the first half of the channels, D/2 -> D/2 ->
    D/4 -> classes.

    The released code has no activation before the classifier, and neither has this: 259,588 parameters for ViT-B/16.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        if width % 4:
            raise Refusal(
                f"head=half needs a width that is a multiple of 4, and this backbone has {width}: use head=linear"
            )
        self.half_width = width // 2
        self.hidden = _linear(self.half_width, self.half_width)
        self.feature = _linear(self.half_width, width // 4)
        self.classifier = _linear(width // 4, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, classes)."""
        return self.classifier(self.feature(nn.functional.gelu(self.hidden(tokens[..., : self.half_width]))))


class PairHead(nn.Module):
    """Positional Label's pair head (arXiv 2206.04981, Fig. 2): the first half of the query's channels beside the second
    half of the key's, D -> D/2 -> D/2 -> outputs: 508,201 parameters for Swin-T's 169 classes.

    Two identities make it cheap, and change nothing:

    - The first layer acts on a concatenation, so it is the sum of a query part and a key part, each computed once per
      token rather than once per pair; no (B, K*K, D) tensor is ever made.
    - Nothing stands between the last two layers (nor in the released code), so they are one matrix, multiplied out
      once per step. That spares (D/2)^2 multiplications a pair and pays from as many pairs as there are outputs.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        if width % 2:
            raise Refusal(f"the relative head needs an even width, and this backbone has {width}: choose another model")
        self.half_width = width // 2
        self.held = 4 * self.half_width  # numbers that backward needs of a pair, beside its outputs
        self.first = _linear(width, self.half_width)
        self.hidden = _linear(self.half_width, self.half_width)
        self.classifier = _linear(self.half_width, outputs)

    def parts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that `pair_outputs` needs of tokens (B, K, D): query and key part, (B, K, D/2) each, and the last two
        layers as one, matrix (outputs, D/2) and bias (outputs,). float32 or wider, so that nothing that is summed over
        many pairs, forward or backward, is rounded at each of them."""
        of_query, of_key = self.first.weight.split(self.half_width, 1)
        query_part = nn.functional.linear(tokens[..., : self.half_width], of_query, self.first.bias)
        key_part = nn.functional.linear(tokens[..., self.half_width :], of_key)
        with torch.autocast(tokens.device.type, enabled=False):  # once per step: no reason to round it
            matrix = self.classifier.weight @ self.hidden.weight
            bias = self.classifier.weight @ self.hidden.bias + self.classifier.bias
        return wide(query_part), wide(key_part), matrix, bias

    def outputs(self, parts: Sequence[Tensor], queries: Tensor, keys: Tensor) -> Tensor:
        """`pair_outputs` of these `parts`."""
        return pair_outputs(parts, queries, keys)

    def forward(self, tokens: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """tokens (B, K, D) and token indices (B, Q) of both ends of every pair -> (B, Q, outputs)."""
        return self.outputs(self.parts(tokens), queries, keys)


class DensePairHead(nn.Module):
    """The head of dense relative localisation (arXiv 2106.03746): an MLP with ReLU on all channels of both patches,
    2D -> 512 -> 512 -> outputs, drawn as PyTorch draws it. As in `PairHead` the first layer is computed per token.

    Two layers between the tokens and the answer are needed, and weights that are not small: a distance is no sum of
    something of one patch and something of the other, and `PairHead` is nearly that before it has been trained.
    """

    def __init__(self, width: int, outputs: int, hidden: int = 512) -> None:
        super().__init__()
        self.held = 6 * hidden
        self.first = nn.Linear(2 * width, hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, outputs)

    def parts(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """All that `outputs` needs of tokens (B, K, D): query and key part, (B, K, 512) each, float32 or wider, and
        weights and biases of the last two layers."""
        of_query, of_key = self.first.weight.chunk(2, 1)
        query_part = nn.functional.linear(tokens, of_query, self.first.bias)
        key_part = nn.functional.linear(tokens, of_key)
        last = (self.hidden.weight, self.hidden.bias, self.classifier.weight, self.classifier.bias)
        return wide(query_part), wide(key_part), *last

    def outputs(self, parts: Sequence[Tensor], queries: Tensor, keys: Tensor) -> Tensor:
        """Answers (B, Q, outputs) to pairs whose ends are the tokens `queries` and `keys`, (B, Q) each."""
        query_part, key_part, matrix, bias, last_matrix, last_bias = parts
        pairs = (_pick(query_part, queries) + _pick(key_part, keys)).relu()
        return nn.functional.linear(nn.functional.linear(pairs, matrix, bias).relu(), last_matrix, last_bias)

    def forward(self, tokens: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """tokens (B, K, D) and token indices (B, Q) of both ends of every pair -> (B, Q, outputs)."""
        return self.outputs(self.parts(tokens), queries, keys)


def pair_outputs(parts: Sequence[Tensor], queries: Tensor, keys: Tensor) -> Tensor:
    """Answers (B, Q, outputs) of a `PairHead` to pairs whose ends are the tokens `queries` and `keys`, (B, Q) each;
    `parts` as `PairHead.parts` gives them."""
    query_part, key_part, matrix, bias = parts
    pairs = _pick(query_part, queries) + _pick(key_part, keys)
    return nn.functional.linear(nn.functional.gelu(pairs), matrix, bias)


def _pick(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens (B, K, D) at indices (B, Q): (B, Q, D)."""
    B, K, D = tokens.shape
    first = torch.arange(B, device=tokens.device)[:, None] * K
    return tokens.reshape(B * K, D).index_select(0, (indices + first).flatten()).view(B, -1, D)


class Decoder(nn.Module):
    """DropPos's decoder (arXiv 2309.03576: 2 blocks of width 512 with 16 heads): a linear layer to its own width,
    pre-norm transformer blocks that are told no position, and a norm. Norms add 1e-6 to the variance, and matrices are
    drawn from Xavier's uniform distribution, as there."""

    def __init__(self, width: int, decoder_width: int, blocks: int, heads: int) -> None:
        super().__init__()
        if decoder_width % heads:
            raise Refusal(
                f"a decoder of width {decoder_width} cannot be shared by {heads} heads: choose a divisor of it"
            )
        self.embed = nn.Linear(width, decoder_width)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    decoder_width, heads, 4 * decoder_width, 0.0, "gelu", NORM_EPS, batch_first=True, norm_first=True
                )
                for _ in range(blocks)
            )
        )
        self.norm = nn.LayerNorm(decoder_width, NORM_EPS)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Prefix and patch tokens together, (B, P+K, D) -> (B, P+K, decoder_width)."""
        return self.norm(self.blocks(self.embed(tokens)))


class ProjectionHead(nn.Module):
    """DINO's head (arXiv 2104.14294): an MLP with GELU to a narrow bottleneck, which is brought to length 1, then a
    last layer without bias that compares it with every prototype: D -> hidden -> hidden -> bottleneck -> prototypes.

    The rows of the last layer have length 1 (`last` normed: logits are cosines, DINO's norm_last_layer), a trainable
    length (weight_norm: DINOv2), or are as they are (linear: DINOv3).
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        last: LastLayer = "normed",
    ) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        made: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            made += [nn.GELU(), _linear(inputs, outputs)]
        self.mlp = nn.Sequential(*made[1:])
        self.last = PrototypeLayer(bottleneck, prototypes, last)

    def forward(self, rows: Tensor) -> Tensor:
        """Class or patch tokens (N, D) -> logits (N, prototypes), float32 or wider."""
        return self.last(nn.functional.normalize(wide(self.mlp(rows)), dim=-1, eps=1e-12))


class PrototypeLayer(nn.Module):
    """Linear without bias, whose weight is an ordinary parameter: nothing is hung on it, so that it can be copied, and
    its name in a checkpoint is the same however it is normalised."""

    def __init__(self, width: int, prototypes: int, kind: str) -> None:
        super().__init__()
        layer = nn.Linear(width, prototypes, bias=False)  # drawn as torch does, like DINO's
        self.weight = layer.weight
        self.kind = kind
        if kind == "linear":
            nn.init.trunc_normal_(self.weight, std=0.02)  # DINOv3: lengths matter
        self.gain = nn.Parameter(torch.ones(prototypes, 1)) if kind == "weight_norm" else None

    def forward(self, rows: Tensor) -> Tensor:
        """(N, width) -> (N, prototypes), float32 or wider."""
        if self.kind == "linear":
            return wide(nn.functional.linear(rows, self.weight))
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        with torch.autocast(device, enabled=False):
            logits: Tensor = _Cosines.apply(rows, self.weight, dtype)  # type: ignore[assignment]
        return logits if self.gain is None else logits * self.gain[:, 0]


class _Cosines(torch.autograd.Function):
    """rows (N, C) times weight (K, C) with every row of weight brought to length 1, products in `dtype`: (N, K).

    The lengths divide the logits and not the weight, and the gradient along a row of weight is read off the logits.
    Forward and backward take the time of a plain linear layer, 130 ms for 80 rows and 65,536 prototypes of 256 on one
    thread; torch's weight_norm takes 177, lengths that divide the logits under autograd 225, F.normalize 371.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        inverse_K = 1 / torch.linalg.vector_norm(weight, dim=1).clamp(min=1e-12)
        low_rows, low_weight = rows.to(dtype), weight.to(dtype)
        logits_NK = wide(low_rows @ low_weight.t()).mul_(inverse_K)
        ctx.save_for_backward(low_rows, low_weight, weight, inverse_K, logits_NK)
        return logits_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NK: Tensor) -> tuple[Tensor | None, ...]:
        rows, low_weight, weight, inverse_K, logits_NK = ctx.saved_tensors
        scaled_NK = (gradient_NK * inverse_K).to(rows.dtype)
        of_rows = (scaled_NK @ low_weight).to(logits_NK.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_rows, None, None
        along_K = (gradient_NK * logits_NK).sum(0) * inverse_K.square()  # what would only change the length
        of_weight = (scaled_NK.t() @ rows).to(weight.dtype).addcmul_(weight, along_K[:, None], value=-1)
        return of_rows, of_weight, None
