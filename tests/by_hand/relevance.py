"""Transformer attribution in NumPy, a number at a time: what goes through a block, and how relevance comes back.

Of the published parameters of ViT, DeiT, iRPE, LV-ViT and SP-ViT, in float64. Letters: N = h*w patches, T tokens, D
width, d width of a head, n buckets of a table.
"""

from typing import NamedTuple

import numpy as np
from by_hand.vit import Array, State, erf, layer_norm, linear, prior


class Shape(NamedTuple):
    """What parameters do not tell."""

    heads: int
    skip_lam: float
    grid: tuple[int, int]
    ids: Array  # (R, T, T) buckets of iRPE, each of the R tables' own; none without


def over(numerator: float, denominator: float) -> float:
    return 0.0 if denominator == 0 else numerator / (denominator + 1e-9 * np.sign(denominator))


def through_linear(R: Array, x: Array, weight: Array) -> Array:
    found = np.zeros_like(x)
    for t in range(len(x)):
        for o in range(len(weight)):
            terms = [x[t, i] * weight[o, i] for i in range(len(x[t]))]
            whole = sum(term for term in terms if term > 0)
            for i, term in enumerate(terms):
                found[t, i] += over(R[t, o], whole) * max(term, 0)
    return found


def through_product(R: Array, a: Array, b: Array) -> tuple[Array, Array]:
    of_a, of_b = np.zeros_like(a), np.zeros_like(b)
    for i, k in np.ndindex(*R.shape):
        share = over(R[i, k], sum(a[i, j] * b[j, k] for j in range(len(b))))
        for j in range(len(b)):
            of_a[i, j] += a[i, j] * b[j, k] * share / 2
            of_b[j, k] += a[i, j] * b[j, k] * share / 2
    return of_a, of_b


def through_parameters(R: Array, x: Array, table: Array) -> Array:
    """As through a product, but what would be the table's half is x's."""
    found = np.zeros_like(x)
    for i, k in np.ndindex(*R.shape):
        whole = sum(x[i, j] * table[j, k] for j in range(len(table)))
        for j in range(len(table)):
            found[i, j] += x[i, j] * table[j, k] * over(R[i, k], whole)
    return found


def through_sum(R: Array, *terms: Array) -> list[Array]:
    parts = [np.zeros_like(R) for _ in terms]
    for at in np.ndindex(*R.shape):
        for part, x in zip(parts, terms, strict=True):
            part[at] = x[at] * over(R[at], sum(each[at] for each in terms))
    sums = [part.sum() for part in parts]
    wanted = [over(abs(own) * R.sum(), sum(map(abs, sums))) for own in sums]
    return [part * over(to, own) for part, to, own in zip(parts, wanted, sums, strict=True)]


def through_copies(x: Array, *relevances: Array) -> Array:
    found = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        found[at] = x[at] * sum(over(R[at], x[at]) for R in relevances)
    return found


def tables(state: State, name: str, head: int) -> list[Array]:
    """The tables of a head, one or (cross) two, under their published names: (d, n), of values (n, d), of a bias (n,);
    none if there are none."""
    both = [state[key] for key in sorted(state, reverse=True) if key.startswith(f"{name}.")]  # rows before columns
    return [table[head % len(table)] for table in both]


def lookups(state: State, attn: str, seen: dict[str, Array], shape: Shape) -> dict[tuple[str, int], Array]:
    """{(on queries' tables "q" or keys' "k", which of the R): terms of the scores (H, T, T)}."""
    q, k, _ = seen["qkv"]  # q is scaled already
    H, T, d = q.shape
    found = {}
    for r, h in np.ndindex(len(shape.ids), H):
        for which in ("q", "k"):
            own = tables(state, f"{attn}.rpe_{which}", h)
            if not own or own[r].ndim != 2:
                continue
            term = found.setdefault((which, r), np.zeros((H, T, T)))
            for i, j in np.ndindex(T, T):
                if which == "k":
                    term[h, i, j] = q[h, i] @ own[r][:, int(shape.ids[r, i, j])]
                else:
                    term[h, i, j] = k[h, j] @ own[r][:, int(shape.ids[r, j, i])] / np.sqrt(d)
    return found


def biases(state: State, attn: str, scores: Array, shape: Shape) -> Array:
    found = np.zeros_like(scores)
    for r, (h, i, j) in ((r, at) for r in range(len(shape.ids)) for at in np.ndindex(*scores.shape)):
        for which, at in (("k", (r, i, j)), ("q", (r, j, i))):
            own = tables(state, f"{attn}.rpe_{which}", h)
            if own and own[r].ndim == 1:
                found[h, i, j] += own[r][int(shape.ids[at])]
    return found


def forward(state: State, name: str, x: Array, shape: Shape) -> tuple[Array, dict[str, Array]]:
    """(tokens after the block (T, D), what went through it)."""
    (T, D), heads, attn = x.shape, shape.heads, f"{name}.attn"
    d, seen = D // heads, {"x": x, "normed": layer_norm(state, f"{name}.norm1", x)}
    if spatial := f"{attn}.qk.weight" in state:
        rows = np.concatenate([linear(state, f"{attn}.{part}", seen["normed"]) for part in ("qk", "v")], 1)
    else:
        rows = linear(state, f"{attn}.qkv", seen["normed"])
    seen["qkv"] = np.array([[rows[:, p * D + h * d : p * D + (h + 1) * d] for h in range(heads)] for p in range(3)])
    seen["qkv"][0] /= np.sqrt(d)
    scores = np.array([q @ k.T for q, k in zip(*seen["qkv"][:2], strict=True)])
    scores *= prior(state, attn, heads, shape.grid) if spatial else 1
    scores += sum(lookups(state, attn, seen, shape).values()) + biases(state, attn, scores, shape)
    seen["A"] = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = seen["A"] @ seen["qkv"][2]
    for h in range(heads):
        for table, ids in zip(tables(state, f"{attn}.rpe_v", h), shape.ids, strict=False):
            for i, j in np.ndindex(T, T):
                mixed[h, i] += seen["A"][h, i, j] * table[int(ids[i, j])]
    seen["mixed"] = np.concatenate(list(mixed), 1)
    seen["branch"] = linear(state, f"{attn}.proj", seen["mixed"]) / shape.skip_lam
    seen["y"] = x + seen["branch"]
    seen["normed2"] = layer_norm(state, f"{name}.norm2", seen["y"])
    hidden = linear(state, f"{name}.mlp.fc1", seen["normed2"])
    seen["hidden"] = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    seen["branch2"] = linear(state, f"{name}.mlp.fc2", seen["hidden"]) / shape.skip_lam
    return seen["y"] + seen["branch2"], seen


def back(state: State, name: str, R: Array, seen: dict[str, Array], shape: Shape) -> tuple[Array, Array]:
    """(relevance of what entered the block (T, D), of its attention (H, T, T)); of the convolution's output R."""
    R = R[-len(seen["x"]) :]  # a class token that joins after the block
    direct, branch = through_sum(R, seen["y"], seen["branch2"])
    hidden = through_linear(branch, seen["hidden"], state[f"{name}.mlp.fc2.weight"])
    R = through_linear(hidden, seen["normed2"], state[f"{name}.mlp.fc1.weight"])
    direct, branch = through_sum(through_copies(seen["y"], direct, R), seen["x"], seen["branch"])
    attn = f"{name}.attn"
    mixed = through_linear(branch, seen["mixed"], state[f"{attn}.proj.weight"])
    of_A, of_v = back_values(state, attn, mixed, seen, shape)
    of_q, of_k = back_scores(state, attn, of_A, seen, shape)
    of_rows = np.concatenate([head for part in (of_q, of_k, of_v) for head in part], 1)
    parts = ("qk", "v") if f"{attn}.qk.weight" in state else ("qkv",)
    weight = np.concatenate([state[f"{attn}.{part}.weight"] for part in parts])
    return through_copies(seen["x"], direct, through_linear(of_rows, seen["normed"], weight)), of_A


def back_values(state: State, attn: str, R: Array, seen: dict[str, Array], shape: Shape) -> tuple[Array, Array]:
    """Relevances of the probabilities (H, T, T) and of the values (H, T, d)."""
    A, v = seen["A"], seen["qkv"][2]
    H, T, d = v.shape
    heads = np.array([R[:, h * d : (h + 1) * d] for h in range(H)])
    of_A, of_v = np.zeros_like(A), np.zeros_like(v)
    if not tables(state, f"{attn}.rpe_v", 0):
        for h in range(H):
            of_A[h], of_v[h] = through_product(heads[h], A[h], v[h])
        return of_A, of_v
    own = [tables(state, f"{attn}.rpe_v", h) for h in range(H)]
    first = np.cumsum([0, *(len(table) for table in own[0])])  # of each table in all buckets
    values = [np.concatenate(each) for each in own]
    sums = np.zeros((H, T, len(values[0])))
    for r, h, i, j in np.ndindex(len(shape.ids), H, T, T):
        sums[h, i, first[r] + int(shape.ids[r, i, j])] += A[h, i, j]
    plain, encoded = through_sum(heads, A @ v, np.array([sums[h] @ values[h] for h in range(H)]))
    for h in range(H):
        direct, of_v[h] = through_product(plain[h], A[h], v[h])
        of_sums, by_table = through_parameters(encoded[h], sums[h], values[h]), np.zeros((T, T))
        for r, i, j in np.ndindex(len(shape.ids), T, T):
            bucket = first[r] + int(shape.ids[r, i, j])
            by_table[i, j] += A[h, i, j] * over(of_sums[i, bucket], sums[h, i, bucket])
        of_A[h] = through_copies(A[h], direct, by_table)
    return of_A, of_v


def back_scores(state: State, attn: str, R: Array, seen: dict[str, Array], shape: Shape) -> tuple[Array, Array]:
    """Relevances of queries and keys (H, T, d)."""
    q, k, _ = seen["qkv"]
    H, T, d = q.shape
    terms = lookups(state, attn, seen, shape)
    parts = through_sum(R, q @ k.transpose(0, 2, 1), *terms.values()) if terms else [R]
    of_q, of_k = np.zeros_like(q), np.zeros_like(k)
    for h in range(H):
        of_both = through_product(parts[0][h], q[h], k[h].T)
        copies = {"q": [of_both[0]], "k": [of_both[1].T]}
        for (which, r), part in zip(terms, parts[1:], strict=True):
            table = tables(state, f"{attn}.rpe_{which}", h)[r]
            buckets = np.zeros((T, table.shape[1]))
            for i, j in np.ndindex(T, T):
                who, whom = (i, j) if which == "k" else (j, i)
                buckets[who, int(shape.ids[r, who, whom])] += part[h, i, j]
            asks, x = ("q", q[h]) if which == "k" else ("k", k[h])
            weight = table if which == "k" else table / np.sqrt(d)
            copies[asks].append(through_parameters(buckets, x, weight))
        of_q[h], of_k[h] = through_copies(q[h], *copies["q"]), through_copies(k[h], *copies["k"])
    return of_q, of_k
