"""Heads that turn tokens into position logits."""

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
    """Positional Label's pair head (arXiv 2206.04981, Fig. 2): query's first half of the channels beside the
    key's second,
    D -> D/2 -> D/2 -> classes: 508,201 parameters for Swin-T.

    Its first layer acts on a concatenation, so it is the sum of a query part and a key part, each computed once per
    token rather than once per pair: exact, and no (B, N*N, D) tensor is ever made.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        if width % 2:
            raise Refusal(f"the relative head needs an even width, and this backbone has {width}")
        self.half_width = width // 2
        self.first = _linear(width, self.half_width)
        self.hidden = _linear(self.half_width, self.half_width)
        self.classifier = _linear(self.half_width, classes)

    def forward(self, tokens: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """tokens (B, N, D) and patch indices (B, P) of both ends of every pair -> (B, P, classes)."""
        of_query, of_key = self.first.weight.split(self.half_width, 1)
        query_part = nn.functional.linear(tokens[..., : self.half_width], of_query, self.first.bias)  # (B, N, D/2)
        key_part = nn.functional.linear(tokens[..., self.half_width :], of_key)
        pairs = _pick(query_part, queries) + _pick(key_part, keys)
        return self.classifier(self.hidden(nn.functional.gelu(pairs)))


def _pick(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens (B, N, D) at indices (B, P): (B, P, D)."""
    B, N, D = tokens.shape
    first = torch.arange(B, device=tokens.device)[:, None] * N
    return tokens.reshape(B * N, D).index_select(0, (indices + first).flatten()).view(B, -1, D)
