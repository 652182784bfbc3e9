"""Heads: the paper's sizes, and the factorised first layer."""

import pytest
import torch
from torch import nn

from common.errors import Refusal
from common.heads import HalfHead, LinearHead, PairHead


def size(head: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def test_parameter_counts_are_the_papers() -> None:
    assert size(HalfHead(768, 196)) == 259_588  # APL, ViT-B/16
    assert size(PairHead(768, 169)) == 508_201  # RPL, Swin-T
    assert size(PairHead(768, 729)) == 723_801  # RPL, 14x14
    assert size(LinearHead(768, 196)) == 768 * 196 + 196


def test_half_head_reads_the_first_half_only() -> None:
    head, tokens = HalfHead(16, 9), torch.randn(2, 9, 16)
    changed = tokens.clone()
    changed[..., 8:] += 1
    torch.testing.assert_close(head(tokens), head(changed))
    assert not torch.allclose(head(tokens), head(tokens + torch.cat([torch.ones(8), torch.zeros(8)])))


def test_factorised_pairs_equal_the_concatenation() -> None:
    torch.manual_seed(0)
    head, tokens = PairHead(32, 25), torch.randn(2, 9, 32, requires_grad=True)
    queries, keys = torch.arange(81).expand(2, -1) // 9, torch.arange(81).expand(2, -1) % 9
    ours = head(tokens, queries, keys)
    both = torch.stack(
        [
            torch.stack([torch.cat([tokens[b, i, :16], tokens[b, j, 16:]]) for i in range(9) for j in range(9)])
            for b in (0, 1)
        ]
    )
    theirs = head.classifier(head.hidden(nn.functional.gelu(head.first(both))))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    of = [tokens, *head.parameters()]
    for mine, plain in zip(
        torch.autograd.grad((ours * weights).sum(), of), torch.autograd.grad((theirs * weights).sum(), of), strict=True
    ):
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)


def test_widths_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(Refusal, match="multiple of 4"):
        HalfHead(30, 9)
    with pytest.raises(Refusal, match="even width"):
        PairHead(31, 9)
