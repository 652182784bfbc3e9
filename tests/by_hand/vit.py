"""LV-ViT and SP-ViT in NumPy, from their formulas, of parameters under the published names: for tests.

Letters: B images, N = h*w patches, D width. Everything is float64, one image, head or tap of a kernel at a time.
"""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
State = dict[str, Array]

erf = np.vectorize(math.erf)


def redraw(model: nn.Module, seed: int = 0) -> State:
    """Fill every parameter and every running statistic with numbers that hide nothing; returns them."""
    rng = np.random.default_rng(seed)
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            numbers = rng.uniform(0.5, 1.5, tensor.shape) if "var" in name else rng.normal(0, 0.3, tensor.shape)
            tensor.copy_(tensor.new_tensor(numbers))
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def linear(state: State, name: str, x: Array) -> Array:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def layer_norm(state: State, name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def convolution(weight: Array, x: Array, stride: int, padding: int) -> Array:
    """x (channels, h, w); weight (out, channels, k, k)."""
    k = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    h, w = ((side + 2 * padding - k) // stride + 1 for side in x.shape[1:])
    out = np.zeros((len(weight), h, w))
    for i in range(k):
        for j in range(k):
            tap = padded[:, i : i + stride * h : stride, j : j + stride * w : stride][:, :h, :w]
            out += np.tensordot(weight[:, :, i, j], tap, 1)
    return out


def stem(state: State, image: Array) -> Array:
    """Image (3, H, W) to (N, D), by the running statistics."""
    x = image
    for i in (1, 2, 3):
        x = convolution(state[f"patch_embed.conv{i}.weight"], x, 2 if i == 1 else 1, 3 if i == 1 else 1)
        of_bn = {key: state[f"patch_embed.bn{i}.{key}"][:, None, None] for key in ("running_mean", "running_var")}
        x = (x - of_bn["running_mean"]) / np.sqrt(of_bn["running_var"] + 1e-5)
        x = x * state[f"patch_embed.bn{i}.weight"][:, None, None] + state[f"patch_embed.bn{i}.bias"][:, None, None]
        x = np.maximum(x, 0)
    x = convolution(state["patch_embed.proj.weight"], x, 8, 0) + state["patch_embed.proj.bias"][:, None, None]
    return x.reshape(len(x), -1).T


def prior(state: State, name: str, heads: int, grid: tuple[int, int]) -> Array:
    """(heads, N, N): the network of each head asked about every pair of patches."""
    h, w = grid
    D = len(state[f"{name}.w2"])
    d = D // heads
    out = np.zeros((heads, h * w, h * w))
    for i in range(h * w):
        for j in range(h * w):
            offset = np.array([j % w - i % w, j // w - i // w])
            hidden = np.maximum(state[f"{name}.w1.weight"] @ offset + state[f"{name}.w1.bias"], 0)
            for head in range(heads):
                mine = slice(head * d, (head + 1) * d)
                out[head, i, j] = state[f"{name}.b2"][head] + hidden[mine] @ state[f"{name}.w2"][mine, 0]
    return out


def attention(state: State, name: str, x: Array, heads: int, grid: tuple[int, int]) -> Array:
    T, D = x.shape
    d = D // heads
    spatial = f"{name}.qk.weight" in state
    if spatial:
        rows = np.concatenate([linear(state, f"{name}.qk", x), linear(state, f"{name}.v", x)], 1)
        factors = prior(state, name, heads, grid)
    else:
        rows, factors = linear(state, f"{name}.qkv", x), np.ones((heads, T, T))
    out = np.zeros((T, D))
    for head in range(heads):
        q, k, v = (rows[:, part * D + head * d : part * D + (head + 1) * d] for part in range(3))
        scores = factors[head] * (q @ k.T) / math.sqrt(d)
        powers = np.exp(scores - scores.max(1, keepdims=True))
        out[:, head * d : (head + 1) * d] = powers / powers.sum(1, keepdims=True) @ v
    return linear(state, f"{name}.proj", out)


def block(state: State, name: str, x: Array, heads: int, skip_lam: float, grid: tuple[int, int]) -> Array:
    h, w = grid
    x = x + attention(state, f"{name}.attn", layer_norm(state, f"{name}.norm1", x), heads, grid) / skip_lam
    hidden = linear(state, f"{name}.mlp.fc1", layer_norm(state, f"{name}.norm2", x))
    x = x + linear(state, f"{name}.mlp.fc2", hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))) / skip_lam
    if f"{name}.pos_block.proj.0.weight" not in state:
        return x
    weight, bias = state[f"{name}.pos_block.proj.0.weight"], state[f"{name}.pos_block.proj.0.bias"]
    prefix, maps = x[: len(x) - h * w], x[len(x) - h * w :].reshape(h, w, -1)
    padded = np.pad(maps, ((1, 1), (1, 1), (0, 0)))
    moved = maps + bias
    for i in range(3):
        for j in range(3):
            moved = moved + padded[i : i + h, j : j + w] * weight[:, 0, i, j]
    return np.concatenate([prefix, moved.reshape(h * w, -1)])


def encode(state: State, patches: Array, grid: tuple[int, int], heads: int, skip_lam: float, joins: int = 0) -> Array:
    """The stem's patches (N, D) to tokens (1+N, D) after the final norm; the class token joins before block `joins`."""
    x, cls, position = patches, state["cls_token"][0], state["pos_embed"][0]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        if i == joins:
            x = np.concatenate([cls, x])
        if i == 0:
            x = x + position
        x = block(state, f"blocks.{i}", x, heads, skip_lam, grid)
    return layer_norm(state, "norm", x)


def logits(state: State, tokens: Array) -> Array:
    """Tokens (1+N, D) to the logits (C,) of eval."""
    return linear(state, "head", tokens[0]) + 0.5 * linear(state, "aux_head", tokens[1:]).max(0)
