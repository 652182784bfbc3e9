"""iRPE: image relative position encoding (arXiv 2107.14222) in any plain ViT of timm, and the published DeiTs by name.

Each pair of a query and a key falls into one of n buckets by where the key lies from the query; a table says what a
bucket adds to the score or to the values. Distances are in patches, so that a table serves every resolution. Letters: B
images, P prefix tokens, a grid of h*w patches, N = P + h*w, T tokens and S keys where some are left out, H heads of d
numbers, n buckets, R tables read at once (2 with `cross`, else 1).
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Refusal, nearest
from .attention import Encoding, project, relative_attention
from .names import described, register

METHODS = ("product", "euclidean", "quantization", "cross")
DIRECTIONS = ("cross_rows", "cross_cols")
MODES = ("ctx", "bias")
REMEMBERED = 8  # grids besides the model's own whose tables are kept: 2.7 MB each at 24x24

Grid = tuple[int, int]


# ------------------------------------------------------------------------------------------------------- buckets


def piecewise(x: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Index of a distance x (any shape): int64, odd in x, x itself up to alpha, then logarithmic up to beta.

    Rounds half to even, and before it clips: with beta = 3.8 the last index is 3.
    """
    size = x.abs().double()
    far = alpha + (beta - alpha) * (size.clamp(min=alpha) / alpha).log() / math.log(gamma / alpha)
    index = torch.where(size <= alpha, size.round(), far.round().clamp(max=math.floor(beta)))
    return (x.sign() * index).long()


def num_buckets(method: str, ratio: float, num_prefix_tokens: int) -> int:
    """Number of buckets of a table (`cross`: of each of its two); one more if there are prefix tokens, which share it.

    Raises Refusal for an unknown method or a ratio that is not positive.
    """
    _check_method(method, ratio, (*METHODS, *DIRECTIONS))
    directed = 2 * math.floor(2 * ratio) + 1
    return (directed**2 if method == "product" else directed) + (num_prefix_tokens > 0)


def bucket_ids(method: str, grid: Grid, ratio: float, num_prefix_tokens: int) -> Tensor:
    """Bucket of each pair [query, key]: (N, N) int64, prefix tokens first, then the grid's rows (arXiv 2107.14222;
    alpha, beta, gamma = 1, 2 and 8 times `ratio`, in patches).

    `cross` gives its two tables, (2, N, N): `cross_rows`, then `cross_cols`. Raises Refusal for an unknown method.
    """
    _check_method(method, ratio, (*METHODS, *DIRECTIONS))
    if method == "cross":
        return torch.stack([bucket_ids(one, grid, ratio, num_prefix_tokens) for one in DIRECTIONS])
    h, w = grid
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    rows, columns = (places[:, None] - places[None]).unbind(-1)  # of the query from the key, (h*w, h*w)
    index = partial(piecewise, alpha=ratio, beta=2 * ratio, gamma=8 * ratio)
    middle = math.floor(2 * ratio)
    if method == "product":
        ids = (index(rows) + middle) * (2 * middle + 1) + index(columns) + middle
    elif method == "euclidean":
        ids = index((rows**2 + columns**2).double().sqrt().round()) + middle
    elif method == "quantization":
        ids = index(rows**2 + columns**2) + middle
    else:
        ids = index(rows if method == "cross_rows" else columns) + middle
    P = num_prefix_tokens
    return F.pad(ids, (P, 0, P, 0), value=num_buckets(method, ratio, P) - 1)


def _check_method(method: str, ratio: float, known: tuple[str, ...]) -> None:
    if method not in known:
        raise Refusal(f"irpe method={method!r}: expected one of {', '.join(known)}{nearest(str(method), known)}")
    if not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise Refusal(f"irpe ratio={ratio!r}: expected a positive number (1.9 in the published product models)")


# ------------------------------------------------------------------------------------ which tokens there are, and where


@dataclass(frozen=True)
class Where:
    """Positions of the tokens that enter an attention; all layers share one, and its ids."""

    grid: Grid
    kept: Tensor | None = None
    """(B, K) patches that are there, row-major in the grid; prefix tokens come before them. None: all."""
    keys: Tensor | None = None
    """(B, S) which of the tokens, prefix tokens included, are keys and values. None: all."""
    off: bool = False
    """No relative encoding at all."""
    ids_of: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    """The ids of each model that has asked."""


class BucketIds(nn.Module):
    """The bucket of each pair of tokens, shared by all layers of a model; no part of its state dict."""

    ids: Tensor

    def __init__(self, method: str, ratio: float, grid: Grid, num_prefix_tokens: int, device: Any = None) -> None:
        super().__init__()
        self.method, self.ratio, self.grid, self.num_prefix_tokens = method, ratio, grid, num_prefix_tokens
        self.register_buffer("ids", self._build(grid, device), persistent=False)
        self.others: dict[tuple[Grid, torch.device], Tensor] = {}  # no buffers: processes may see different grids
        self.seen: dict[int, Grid] = {}

    def reset_parameters(self) -> None:
        """Compute the ids anew; timm calls this where it initialises a model that was made without memory."""
        self.ids = self._build(self.grid, self.ids.device)

    def _build(self, grid: Grid, device: Any) -> Tensor:
        """Build ids (R, 1, N, N); the second table of `cross` is read behind the first."""
        ids = bucket_ids(self.method, grid, self.ratio, self.num_prefix_tokens)
        if self.method == "cross":
            ids[1] += num_buckets(self.method, self.ratio, self.num_prefix_tokens)
        return ids.view(-1, 1, *ids.shape[-2:]).to(device)

    def see(self, stem: Any, _: Any, patches: Tensor) -> None:
        """Forward hook of the patch embedding: which grid the tokens that now come have (dynamic_img_size)."""
        h, w = patches.shape[1:3] if patches.ndim == 4 else stem.grid_size
        if self.seen.get(h * w, self.grid) != (h, w):  # nothing to remember while the grid is the model's own
            self.seen[h * w] = h, w

    def forward(self, x: Tensor, where: Where | None) -> tuple[Tensor, Tensor]:
        """Ids for tokens x (B, T, D): [query, key] (R, 1 or B, T, S), and [key, query] (R, 1 or B, S, T) for keys.

        Raises ValueError if the tokens do not fit the grid.
        """
        T, P = x.shape[1], self.num_prefix_tokens
        grid = where.grid if where is not None else self.seen.get(T - P, self.grid)
        kept = where.kept if where is not None else None
        expected = P + (grid[0] * grid[1] if kept is None else kept.shape[1])
        if expected != T:
            what = f"a grid of {grid[0]}x{grid[1]} patches" if kept is None else f"{kept.shape[1]} kept patches"
            raise ValueError(f"iRPE was given {T} tokens: expected {expected}, {P} prefix tokens and {what}")
        whole = self._of(grid, x.device)
        if where is None or (kept is None and where.keys is None):
            return whole, whole
        if self not in where.ids_of:
            B = x.shape[0]
            prefix, whole_row = (torch.arange(count, device=x.device).expand(B, count) for count in (P, T))
            tokens = whole_row if kept is None else torch.cat([prefix, kept + P], 1)
            keys = tokens if where.keys is None else tokens.gather(1, where.keys)
            ids = whole[:, 0][:, tokens[:, :, None], keys[:, None]]
            mirrored = ids if where.keys is None else whole[:, 0][:, keys[:, :, None], tokens[:, None]]
            where.ids_of[self] = ids, mirrored
        return where.ids_of[self]

    def _of(self, grid: Grid, device: torch.device) -> Tensor:
        if grid == self.grid:
            return self.ids
        if (grid, device) not in self.others:
            if len(self.others) >= REMEMBERED:
                self.others.pop(next(iter(self.others)))
            self.others[grid, device] = self._build(grid, device)
        return self.others[grid, device]


# ---------------------------------------------------------------------------------------------------- attention


class Table(nn.Module):
    """One table under its published name, zero at first: contextual (`shape` of three numbers) or a bias (of two)."""

    def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.name = "lookup_table_weight" if len(shape) == 3 else "lookup_table_bias"
        self.register_parameter(self.name, nn.Parameter(torch.zeros(shape, **options)))

    def reset_parameters(self) -> None:
        """Zero the table; timm calls this where it initialises a model that was made without memory."""
        nn.init.zeros_(getattr(self, self.name))

    def forward(self) -> Tensor:
        """The table."""
        return getattr(self, self.name)


class CrossTable(nn.Module):
    """The tables of `cross`, of the rows' and of the columns' offsets, read as one: side by side along the buckets."""

    def __init__(self, shape: tuple[int, ...], buckets: int, **options: Any) -> None:
        super().__init__()
        self.buckets = buckets
        self.rp_rows, self.rp_cols = Table(shape, **options), Table(shape, **options)

    def forward(self) -> Tensor:
        """The two tables."""
        return torch.cat([self.rp_rows(), self.rp_cols()], self.buckets)


class RelativeAttention(Attention):
    """Attention of timm with tables `rpe_q`, `rpe_k`, `rpe_v`: made of one, whose modules and settings it takes
    over."""

    rpe_q: Any
    rpe_k: Any
    rpe_v: Any
    gate: Any

    def __init__(self, attention: Attention, bucket_ids: BucketIds, on: str, mode: str, shared_head: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        self.bucket_ids, self.rpe_on, self.mode = bucket_ids, on, mode
        cross = bucket_ids.method == "cross"
        n = num_buckets(bucket_ids.method, bucket_ids.ratio, bucket_ids.num_prefix_tokens)
        h = 1 if shared_head else self.num_heads
        options = {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
        for which in on:
            shape = (h, n) if mode == "bias" else (h, n, self.head_dim) if which == "v" else (h, self.head_dim, n)
            buckets = 1 if mode == "bias" or which == "v" else 2
            self.add_module(f"rpe_{which}", CrossTable(shape, buckets, **options) if cross else Table(shape, **options))

    def forward(  # type: ignore[override]
        self, x: Tensor, where: Where | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens x (B, T, D) to (B, T, D). `where=None`: every token of the model's grid, or of the one seen last.

        Raises ValueError if the tokens do not fit the grid, and for a mask: no iRPE was ever trained with one.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("iRPE takes no attention mask: leave tokens out instead (Where.kept, Where.keys)")
        q, k, v = project(self, x, None if where is None else where.keys)
        q, k = self.q_norm(q), self.k_norm(k)
        drops = self.attn_drop if not self.fused_attn or (self.training and self.attn_drop.p > 0) else None
        q = q * self.scale  # before the lookup, which is of the scaled query
        encoding: dict[str, Any] = {}
        if where is None or not where.off:
            ids, mirrored = self.bucket_ids(x, where)
            if "k" in self.rpe_on:
                encoding.update(lookup=self._look_up(q, self.rpe_k()), ids=ids)
            if "q" in self.rpe_on:
                table = self.rpe_q() if self.mode == "bias" else self.rpe_q() * self.scale
                encoding.update(of_keys=self._look_up(k, table), ids_of_keys=mirrored)
            if "v" in self.rpe_on:
                encoding.update(values=self.rpe_v(), ids_of_values=ids)
        out = relative_attention(q, k, v, 1.0, Encoding(**encoding), drops)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _look_up(self, x: Tensor, table: Tensor) -> Tensor:
        """Amounts that each bucket would add to the scores of queries or keys x (B, H, T, d): (B, H, T, n)."""
        if self.mode == "bias":
            return table[:, None].expand(*x.shape[:3], -1)
        # one table for all heads: one product, over tokens whose heads lie beside each other
        return (x.transpose(1, 2) @ table[0]).transpose(1, 2) if len(table) == 1 else x @ table


# ------------------------------------------------------------------------------------------------------- models


def add_irpe(
    model: Any,
    on: str = "qkv",
    method: str = "product",
    mode: str = "ctx",
    shared_head: bool = True,
    ratio: float = 1.9,
) -> Any:
    """Give every attention of a plain ViT of timm its relative encoding, in place; returns the model.

    `on`: which of "q", "k" and "v" carry a table. `method`: how offsets fall into buckets (`METHODS`). `mode`: "ctx"
    (tables meet queries, keys and values) or "bias" (a number a bucket; not on values). `shared_head`: one table for
    all heads. `ratio`: alpha of the piecewise index, in patches. Tables are zero at first: nothing changes until they
    are trained or loaded. Raises Refusal for what cannot be built.
    """
    _check_method(method, ratio, METHODS)
    if mode not in MODES:
        raise Refusal(f"irpe mode={mode!r}: expected ctx or bias{nearest(str(mode), MODES)}")
    if not isinstance(on, str) or not on or len(set(on)) != len(on) or not set(on) <= set("qkv"):
        raise Refusal(f"irpe on={on!r}: expected some of the letters q, k and v, such as k, qk or qkv")
    if not isinstance(shared_head, bool):
        raise Refusal(f"irpe shared_head={shared_head!r}: expected true or false")
    if mode == "bias" and "v" in on:
        raise Refusal(
            f"irpe on={on!r} with mode=bias: a bias goes to scores, and values have none; use on=qk or mode=ctx"
        )
    _check_model(model)
    device = model.blocks[0].attn.qkv.weight.device
    ids = BucketIds(method, ratio, tuple(model.patch_embed.grid_size), model.num_prefix_tokens, device)
    for block in model.blocks:
        block.attn = RelativeAttention(block.attn, ids, on, mode, shared_head)
    model.patch_embed.register_forward_hook(ids.see)
    return model


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, VisionTransformer) or not len(model.blocks):
        raise Refusal(f"irpe goes into a plain ViT or DeiT of timm with at least one block, and {name} is none")
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if isinstance(attention, RelativeAttention):
            raise Refusal(f"this {name} has irpe already: build it anew with other options")
        if type(block) is not Block or type(attention) is not Attention:
            raise Refusal(
                f"irpe goes into timm's plain Block with Attention, and block {index} of this {name} is "
                f"{type(block).__name__} with {type(attention).__name__}"
            )
    stem: Any = model.patch_embed
    size, patch = stem.img_size, stem.patch_size
    if size is not None and (size[0] % patch[0] or size[1] % patch[1]):  # timm would ignore the remainder
        raise Refusal(f"irpe: {size[0]}x{size[1]} pixels are not divisible by patches of {patch[0]}x{patch[1]}")
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise Refusal("irpe with patch_drop_rate: which patches were dropped would be lost; set it to 0")


def _published() -> dict[str, tuple[str, dict[str, Any]]]:
    """Published name -> (size of the DeiT, options of add_irpe)."""
    product = {"method": "product", "ratio": 1.9}
    names: dict[str, tuple[str, dict[str, Any]]] = {
        f"deit_{size}_patch16_224_ctx_product_50_shared_{on}": (size, {"on": on, **product})
        for size in ("tiny", "small", "base")
        for on in ("k", "qk", "qkv")
    }
    others = (("euc_20", "euclidean", 20), ("quant_51", "quantization", 33), ("cross_56", "cross", 20))
    for short, method, ratio in others:  # these names count the buckets that a 14x14 grid uses
        options = {"on": "k", "method": method, "ratio": ratio}
        names[f"deit_small_patch16_224_ctx_{short}_shared_k"] = ("small", options)
    return names


SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}
PUBLISHED = _published()
default_cfgs = generate_default_cfgs({name: described(224 / 256, "patch_embed.proj", "head") for name in PUBLISHED})


def _with_irpe(options: dict[str, Any], **kwargs: Any) -> Any:
    return add_irpe(VisionTransformer(**kwargs), **options)


for _name, (_size, _options) in PUBLISHED.items():
    _doc = f"DeiT-{_size} (timm's VisionTransformer and its arguments) with iRPE: {_options} (arXiv 2107.14222)."
    _usual = {"patch_size": 16, "depth": 12, **SIZES[_size]}
    register(__name__, _name, _doc, partial(_with_irpe, _options), _usual, checkpoint_filter_fn)
