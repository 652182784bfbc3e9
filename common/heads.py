"""Heads that turn tokens into answers about position.

Letters: B images, K tokens of each, D width, Q pairs of tokens, P prefix tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import Refusal


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
    """Three linear layers with ReLU between them, D -> D -> D -> classes (Jigsaw-ViT, arXiv 2207.11971)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first = _linear(width, width)
        self.second = _linear(width, width)
        self.classifier = _linear(width, classes)

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

    def forward(self, tokens: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """tokens (B, K, D) and token indices (B, Q) of both ends of every pair -> (B, Q, outputs)."""
        return pair_outputs(self.parts(tokens), queries, keys)


def pair_outputs(parts: Sequence[Tensor], queries: Tensor, keys: Tensor) -> Tensor:
    """What a `PairHead` says of the pairs whose ends are the tokens `queries` and `keys`, (B, Q) each: (B, Q, outputs).
    `parts` as `PairHead.parts` gives them."""
    query_part, key_part, matrix, bias = parts
    pairs = _pick(query_part, queries) + _pick(key_part, keys)
    return nn.functional.linear(nn.functional.gelu(pairs), matrix, bias)


def _pick(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens (B, K, D) at indices (B, Q): (B, Q, D)."""
    B, K, D = tokens.shape
    first = torch.arange(B, device=tokens.device)[:, None] * K
    return tokens.reshape(B * K, D).index_select(0, (indices + first).flatten()).view(B, -1, D)


def wide(values: Tensor) -> Tensor:
    """float32, or float64 where it already is: what losses are computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Decoder(nn.Module):
    """DropPos's decoder (arXiv 2309.03576: 2 blocks of width 512 with 16 heads): a linear layer to its own width,
    pre-norm transformer blocks that are told no position, and a norm."""

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
                    decoder_width, heads, 4 * decoder_width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(blocks)
            )
        )
        self.norm = nn.LayerNorm(decoder_width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Prefix and patch tokens together, (B, P+K, D) -> (B, P+K, decoder_width)."""
        return self.norm(self.blocks(self.embed(tokens)))
