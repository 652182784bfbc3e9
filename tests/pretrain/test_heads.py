"""Heads: the papers' sizes, and what is computed once instead of for every pair."""

import copy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from common.errors import Refusal
from pretrain.heads import Decoder, HalfHead, LastLayer, LinearHead, MlpHead, PairHead, ProjectionHead


def size(head: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def test_parameter_counts_are_the_papers() -> None:
    assert size(HalfHead(768, 196)) == 259_588  # APL, ViT-B/16
    assert size(PairHead(768, 169)) == 508_201  # RPL, Swin-T
    assert size(PairHead(768, 729)) == 723_801  # RPL, 14x14
    assert size(LinearHead(768, 196)) == 768 * 196 + 196
    assert size(MlpHead(384, 196)) == 2 * (384 * 384 + 384) + 384 * 196 + 196  # Jigsaw-ViT, DeiT-S
    block = 4 * 512 * 512 + 4 * 512 + 8 * 512 * 512 + 5 * 512 + 4 * 512  # attention, MLP, two norms
    assert size(Decoder(768, 512, 2, 16)) == 768 * 512 + 512 + 2 * block + 2 * 512  # DropPos, ViT-B/16


def test_half_head_reads_the_first_half_only() -> None:
    head, tokens = HalfHead(16, 9), torch.randn(2, 9, 16)
    changed = tokens.clone()
    changed[..., 8:] += 1
    torch.testing.assert_close(head(tokens), head(changed))
    assert not torch.allclose(head(tokens), head(tokens + torch.cat([torch.ones(8), torch.zeros(8)])))


def test_mlp_head_by_hand() -> None:
    head, tokens = MlpHead(2, 1), torch.tensor([[1.0, -2.0], [-1.0, 3.0]])
    with torch.no_grad():
        for layer, weight, bias in (
            (head.first, [[1.0, 1.0], [0.0, 1.0]], [0.0, 1.0]),
            (head.second, [[1.0, -1.0], [1.0, 1.0]], [0.0, -1.0]),
            (head.classifier, [[1.0, 2.0]], [5.0]),
        ):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    # (1, -2) -> (-1, -1) -> 0, 0 -> (0, -1) -> 0, 0 -> 5; (-1, 3) -> (2, 4) -> (-2, 5) -> 0, 5 -> 15
    assert head(tokens).tolist() == [[5.0], [15.0]]


def concatenated(head: PairHead, tokens: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Every pair through all three layers, as the paper has it."""
    half = tokens.shape[-1] // 2
    both = torch.stack(
        [
            torch.stack([torch.cat([tokens[b, i, :half], tokens[b, j, half:]]) for i, j in zip(*ends, strict=True)])
            for b, ends in enumerate(zip(queries, keys, strict=True))
        ]
    )
    return head.classifier(head.hidden(nn.functional.gelu(head.first(both))))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("outputs", [2, 25, 729])
def test_factorised_pairs_equal_the_concatenation(outputs: int, dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    head, tokens = PairHead(32, outputs).to(dtype), torch.randn(3, 9, 32, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.2)
    queries, keys = torch.randint(0, 9, (2, 3, 40))
    ours, theirs = head(tokens, queries, keys), concatenated(head, tokens, queries, keys)
    torch.testing.assert_close(ours, theirs, atol=within, rtol=within)
    weights = torch.randn_like(ours) / ours.numel()
    of = [tokens, *head.parameters()]
    for mine, plain in zip(
        torch.autograd.grad((ours * weights).sum(), of), torch.autograd.grad((theirs * weights).sum(), of), strict=True
    ):
        torch.testing.assert_close(mine, plain, atol=within, rtol=10 * within)


def test_bf16_pairs_are_no_worse_for_being_factorised() -> None:
    torch.manual_seed(0)
    head, tokens = PairHead(192, 169), torch.randn(2, 49, 192)
    queries, keys = torch.randint(0, 49, (2, 2, 100))
    with torch.no_grad():
        exact = concatenated(head, tokens, queries, keys)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = head(tokens, queries, keys), concatenated(head, tokens, queries, keys)
            parts = head.parts(tokens)
    assert ours.dtype == torch.bfloat16 and {part.dtype for part in parts} == {torch.float32}
    error, reference = ((out.float() - exact).norm() / exact.norm() for out in (ours, theirs))
    assert error < 1.05 * reference < 0.02


def decoder() -> Decoder:
    torch.manual_seed(0)
    made = Decoder(12, 16, 2, 4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def test_decoder_is_told_no_position_and_mixes_all_tokens() -> None:
    made, tokens = decoder(), torch.randn(2, 7, 12)
    out = made(tokens)
    assert out.shape == (2, 7, 16)
    order = torch.tensor([0, 5, 2, 6, 1, 3, 4])  # the first is the class token
    torch.testing.assert_close(made(tokens[:, order]), out[:, order], atol=1e-5, rtol=1e-5)
    changed = tokens.clone()
    changed[:, 0] += 1
    assert ((made(changed) - out).abs().amax(-1) > 1e-4).all()


def test_decoder_by_hand() -> None:
    """Pre-norm blocks, written out."""
    made, tokens = decoder().double(), torch.randn(2, 5, 12, dtype=torch.double)
    x = made.embed(tokens)
    for block in made.blocks:
        normed = block.norm1(x)
        attention = block.self_attn
        q, k, v = (normed @ attention.in_proj_weight.T + attention.in_proj_bias).view(2, 5, 3, 4, 4).unbind(2)
        shares = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 4**0.5).softmax(-1)
        x = x + attention.out_proj(torch.einsum("bhqk,bkhd->bqhd", shares, v).reshape(2, 5, 16))
        x = x + block.linear2(nn.functional.gelu(block.linear1(block.norm2(x))))
    torch.testing.assert_close(made(tokens), made.norm(x), atol=1e-10, rtol=1e-10)


def test_decoder_is_the_same_in_training_and_evaluation() -> None:
    """torch has a faster path for the layers it uses here, taken in evaluation without gradients."""
    made, tokens = decoder(), torch.randn(2, 5, 12)
    trained = made(tokens)
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(made(tokens), trained, atol=1e-5, rtol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(made(tokens).float(), trained.detach(), atol=0.15, rtol=0.05)


def test_widths_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(Refusal, match="multiple of 4"):
        HalfHead(30, 9)
    with pytest.raises(Refusal, match="even width"):
        PairHead(31, 9)
    with pytest.raises(Refusal, match="cannot be shared by 3 heads"):
        Decoder(12, 16, 2, 3)


def by_definition(head: ProjectionHead, rows: Tensor) -> Tensor:
    """DINO's head as it is written: the rows of the last layer are normalised first."""
    normalize = nn.functional.normalize
    weight = head.last.weight if head.last.kind == "linear" else normalize(head.last.weight, dim=1)
    if head.last.kind == "weight_norm":
        weight = weight * head.last.gain
    return normalize(head.mlp(rows), dim=-1) @ weight.T


def projection(last: str) -> ProjectionHead:
    torch.manual_seed(0)
    head = ProjectionHead(12, 30, hidden=16, bottleneck=8, last=last)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    return head


def test_projection_head_has_the_sizes_of_dino() -> None:
    mlp = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256  # ViT-S
    with torch.device("meta"):
        assert size(ProjectionHead(384, 65536)) == mlp + 65536 * 256
        assert size(ProjectionHead(384, 65536, last="weight_norm")) == mlp + 65536 * 256 + 65536
        assert size(ProjectionHead(384, 65536, last="linear")) == mlp + 65536 * 256
        assert size(ProjectionHead(384, 100, layers=1)) == 384 * 256 + 256 + 256 * 100


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("last", get_args(LastLayer))
def test_projection_head_is_the_definition(last: str, dtype: torch.dtype, within: float) -> None:
    head, rows = projection(last).to(dtype), torch.randn(5, 12, dtype=dtype, requires_grad=True)
    ours, theirs = head(rows), by_definition(head, rows)
    torch.testing.assert_close(ours, theirs, atol=within, rtol=within)
    weights, of = torch.randn_like(ours), [rows, *head.parameters()]
    for mine, plain in zip(
        torch.autograd.grad((ours * weights).sum(), of), torch.autograd.grad((theirs * weights).sum(), of), strict=True
    ):
        torch.testing.assert_close(mine, plain, atol=10 * within, rtol=10 * within)


def test_a_normed_layer_gives_cosines_from_the_start() -> None:
    head = ProjectionHead(12, 500, hidden=16, bottleneck=8)
    logits = head(torch.randn(40, 12))
    assert logits.abs().max() <= 1 + 1e-6 and logits.abs().max() > 0.7
    with torch.no_grad():
        head.last.weight.mul_(7)
    torch.testing.assert_close(head(torch.zeros(1, 12)), torch.zeros(1, 500))  # eps, where the bottleneck is 0


@pytest.mark.parametrize("last", get_args(LastLayer))
def test_a_projection_head_can_be_copied_and_frozen(last: str) -> None:
    head, rows = projection(last), torch.randn(5, 12, requires_grad=True)
    twin = copy.deepcopy(head).requires_grad_(False)
    assert torch.equal(twin(rows), head(rows))
    assert list(twin.state_dict()) == list(head.state_dict())
    with torch.no_grad():
        head.last.weight.add_(1)
    assert not torch.allclose(twin(rows), head(rows))
    twin(rows).sum().backward()
    assert rows.grad.abs().sum() > 0


@pytest.mark.parametrize("last", get_args(LastLayer))
def test_a_projection_head_in_bf16_answers_in_float32(last: str) -> None:
    head, rows = projection(last), torch.randn(5, 12)
    exact = head(rows)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(rows.bfloat16())
    assert low.dtype == torch.float32
    assert 0 < (low - exact).abs().max() < 0.02 * exact.abs().max()
    low.square().sum().backward()
    assert {parameter.grad.dtype for parameter in head.parameters()} == {torch.float32}


def test_decoder_is_drawn_and_normed_as_droppos_does() -> None:
    """Xavier's uniform distribution, biases 0; 1e-6 beside the variance, which matters where a token hardly varies."""
    torch.manual_seed(0)
    made = Decoder(48, 64, 2, 4)
    drawn = {name: parameter.detach() for name, parameter in made.named_parameters()}
    assert sum(values.ndim == 2 for values in drawn.values()) == 1 + 2 * 4
    for name, values in drawn.items():
        if values.ndim == 2:  # queries, keys and values are one matrix there too
            bound = (6 / sum(values.shape)) ** 0.5
            assert 0.95 * bound < values.abs().max() <= bound, name
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
        else:
            assert (values == (0 if name.endswith("bias") else 1)).all(), name
    faint = 1e-3 * torch.randn(1, 3, 64)
    variance = faint.var(-1, correction=0, keepdim=True)
    expected = (faint - faint.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    for norm in (made.norm, made.blocks[0].norm1, made.blocks[1].norm2):  # type: ignore[union-attr]
        torch.testing.assert_close(norm(faint), expected, atol=1e-5, rtol=1e-5)  # type: ignore[operator]


def test_jigsaw_head_is_drawn_as_pytorch_draws() -> None:
    torch.manual_seed(0)
    for name, values in MlpHead(100, 50).named_parameters():
        assert 0.9 * 0.1 < values.abs().max() <= 0.1, name  # weights and biases: uniform within 1 / sqrt(100)
        assert values.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.15), name
