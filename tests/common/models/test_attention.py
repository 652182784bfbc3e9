"""Attention with priors and lookups: the definition, one number at a time, and the fused form against autograd's."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.models import attention
from common.models.attention import Encoding, relative_attention

B, H, T, S, D, BUCKETS = 3, 2, 5, 4, 3, 6
SCALE = 0.7
OF = {"prior": (), "lookup": ("ids",), "of_keys": ("ids_of_keys",), "values": ("ids_of_values",)}


def arguments(
    *names: str, per_image: bool = False, tables: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """q, k, v and what `names` need, all of them leaves with a gradient but the ids."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (B, H, T, D), "k": (B, H, S, D), "v": (B, H, S, D)}
    shapes |= {
        "prior": (H, T, S),
        "lookup": (B, H, T, BUCKETS),
        "of_keys": (B, H, S, BUCKETS),
        "values": (1, BUCKETS, D),
    }
    found: dict[str, Any] = {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name in ("q", "k", "v", *names)
    }
    for name in names:
        for ids in OF[name]:
            size = (S, T) if ids == "ids_of_keys" else (T, S)
            found[ids] = torch.randint(BUCKETS, (tables, B if per_image else 1, *size), generator=generator)
    return found


def attend(given: dict[str, Any], scale: float = SCALE, **options: Any) -> Tensor:
    q, k, v = (given[name] for name in ("q", "k", "v"))
    encoding = Encoding(**{name: tensor for name, tensor in given.items() if name not in ("q", "k", "v")})
    return relative_attention(q, k, v, scale, encoding, **options)


def outcome(given: dict[str, Any], **options: Any) -> list[Tensor]:
    """The output and the gradient of every tensor that has one."""
    leaves = [tensor for tensor in given.values() if tensor.is_floating_point()]
    out = attend(given, **options)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum() + (out**2).sum(), leaves)]


def test_the_definition() -> None:
    given = arguments("prior", "lookup", "of_keys", "values", per_image=True, tables=2)
    q, k, v, prior, lookup, of_keys, values = (
        given[name].tolist() for name in ("q", "k", "v", "prior", "lookup", "of_keys", "values")
    )
    ids, ids_of_keys, ids_of_values = (given[name].tolist() for name in ("ids", "ids_of_keys", "ids_of_values"))
    out = attend(given)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        scores = [
            prior[h][t][s] * SCALE * sum(x * y for x, y in zip(q[b][h][t], k[b][h][s], strict=True))
            + sum(lookup[b][h][t][ids[r][b][t][s]] + of_keys[b][h][s][ids_of_keys[r][b][s][t]] for r in range(2))
            for s in range(S)
        ]
        total = sum(map(math.exp, scores))
        expected = [
            sum(
                math.exp(scores[s])
                / total
                * (v[b][h][s][d] + sum(values[0][ids_of_values[r][b][t][s]][d] for r in range(2)))
                for s in range(S)
            )
            for d in range(D)
        ]
        assert out[b, h, t].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cached", [1, 2 * T * S, 5 * T * S, 10**6])  # a head at a time, an image, two and a rest, all
@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("per_image, tables", [(False, 1), (True, 2)])
def test_fused_is_explicit(
    monkeypatch: pytest.MonkeyPatch, cached: int, kept: int, per_image: bool, tables: int
) -> None:
    monkeypatch.setattr(attention, "CACHED", cached)
    monkeypatch.setattr(attention, "KEPT", kept)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    names = list(OF)
    for names in (some for count in range(1, 5) for some in itertools.combinations(OF, count)):
        given = arguments(*names, per_image=per_image, tables=tables)
        for fused, explicit in zip(outcome(given), outcome(given, fused=False), strict=True):
            assert torch.allclose(fused, explicit, rtol=0, atol=1e-10), names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fused_is_explicit_on_a_gpu() -> None:
    given = {name: tensor.detach().cuda() for name, tensor in arguments(*OF, per_image=True, tables=2).items()}
    given |= {name: tensor.requires_grad_() for name, tensor in given.items() if tensor.is_floating_point()}
    weights = torch.randn(B, H, T, D, dtype=torch.float64, device="cuda")
    leaves = [tensor for tensor in given.values() if tensor.is_floating_point()]
    results = []
    for fused in (True, False):
        out = attend(given, fused=fused)
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_expanded_lookup_per_head_values() -> None:
    """A bias is a lookup that every image and query shares; tables of values may differ between heads."""
    given = arguments("lookup", "values")
    given["lookup"] = torch.randn(H, 1, BUCKETS, dtype=torch.float64, requires_grad=True)
    given["values"] = torch.randn(H, BUCKETS, D, dtype=torch.float64, requires_grad=True)
    results = []
    for fused in (True, False):
        leaves = [given[name] for name in ("q", "k", "v", "lookup", "values")]
        out = attend(given | {"lookup": given["lookup"].expand(B, H, T, BUCKETS)}, scale=1.0, fused=fused)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_without_anything_relative() -> None:
    given = arguments()
    expected = F.scaled_dot_product_attention(given["q"], given["k"], given["v"], scale=SCALE)
    for fused in (True, False):
        assert torch.allclose(attend(given, fused=fused), expected, atol=1e-12)


def test_gradients_only_where_wanted() -> None:
    given = arguments("prior", "lookup")
    given |= {name: given[name].detach() for name in ("k", "v", "prior")}
    attend(given).sum().backward()
    assert given["q"].grad is not None and given["lookup"].grad is not None


def test_dropout_sees_the_probabilities() -> None:
    given = arguments("lookup", "values")
    seen: list[Tensor] = []

    def keep_half(probabilities: Tensor) -> Tensor:
        seen.append(probabilities)
        return probabilities * (torch.arange(S) % 2)

    out = attend(given, dropout=keep_half)
    assert seen[0].shape == (B, H, T, S) and torch.allclose(seen[0].sum(-1), torch.ones((), dtype=torch.float64))
    kept = seen[0] * (torch.arange(S) % 2)
    of_values = given["values"][0][given["ids_of_values"][0, 0]]  # (T, S, D)
    expected = kept @ given["v"] + torch.einsum("bhts,tsd->bhtd", kept, of_values)
    assert torch.allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast: bool) -> None:
    """Autocast, and bfloat16 inputs: bfloat16 out, softmax in float32, gradients in the type of what was given."""
    wide = arguments(*OF, per_image=True, tables=2)
    exact = outcome(wide)
    dtype = torch.float32 if autocast else torch.bfloat16
    given = arguments(*OF, per_image=True, tables=2, dtype=dtype)
    for fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, *grads = outcome(given, fused=fused)
        assert out.dtype == torch.bfloat16 and all(grad.dtype == dtype for grad in grads)
        for rough, true in zip((out, *grads), exact, strict=True):
            assert (rough.double() - true).norm() / true.norm() < 0.03


def test_float64_under_autocast_stays() -> None:
    given = arguments("lookup")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(given), attend(given).double())
        assert attend(given).dtype == torch.float64


def test_no_scores_outlive_the_call() -> None:
    size = 32
    shapes = {"q": (4, 2, size, 4), "k": (4, 2, size, 4), "v": (4, 2, size, 4), "lookup": (4, 2, size, 5)}
    given: dict[str, Any] = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    given |= {"of_keys": given["lookup"], "prior": torch.randn(2, size, size, requires_grad=True)}
    given |= {"ids": torch.randint(5, (1, 1, size, size)), "ids_of_keys": torch.randint(5, (1, 1, size, size))}
    given |= {"values": torch.randn(1, 5, 4, requires_grad=True), "ids_of_values": given["ids"]}
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(given)
    assert max(saved) == 2 * size**2  # the prior; the scores would be twice that for each of four images
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(given, fused=False)
    assert max(saved) == 4 * 2 * size**2  # which is what this test can see


def test_twice_differentiated_is_an_error() -> None:
    given = arguments("lookup")
    out = attend(given)
    (grad,) = torch.autograd.grad(out.square().sum(), given["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
