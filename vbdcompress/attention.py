"""Attention whose heads can go one by one: torch's and torchvision's own, with layers in the open.

nn.MultiheadAttention and torchvision's windows read their weights without calling the layers that hold
them, and take the size of a head from the width of the input. Here queries, keys, values and the
output are Linear layers that are called, and a head's size stays when other heads go.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadAttention(nn.Module):
    """nn.MultiheadAttention, the same function and signature, with layers `q`, `k`, `v` and `out`."""

    # nn.TransformerEncoderLayer looks at these before it takes a path past the layers
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim: int = original.head_dim
        # of queries, keys and values as they come: those stay, and code around it may ask
        self.embed_dim, self.kdim, self.vdim = original.embed_dim, original.kdim, original.vdim
        self.batch_first = original.batch_first
        self.dropout = original.dropout
        if original._qkv_same_embed_dim:
            weights = _chunk(original.in_proj_weight)
        else:
            weights = tuple(getattr(original, f"{name}_proj_weight") for name in "qkv")
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if original.in_proj_bias is not None:
            biases = _chunk(original.in_proj_bias)
        self.q, self.k, self.v = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        self.out = _linear(original.out_proj.weight, original.out_proj.bias)
        self.train(original.training)

    @property
    def num_heads(self) -> int:
        """Heads that are left."""
        return self.q.weight.shape[0] // self.head_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention."""
        batched = query.dim() == 3
        first = self.batch_first or not batched
        parts = [layer(x) for layer, x in ((self.q, query), (self.k, key), (self.v, value))]
        if not batched:
            parts = [part[None] for part in parts]
        q, k, v = (self._by_head(part if first else part.transpose(0, 1)) for part in parts)
        mask = self._mask(q, attn_mask, key_padding_mask)
        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            merged = F.dropout(weights, dropout, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            merged = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        merged = merged.transpose(1, 2).flatten(2)
        if not batched:
            return self.out(merged[0]), None if weights is None else weights[0]
        return self.out(merged if first else merged.transpose(0, 1)), weights

    def _by_head(self, x: Tensor) -> Tensor:
        """[batch, positions, heads * head_dim] to [batch, heads, positions, head_dim]."""
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores, broadcastable to [batch, heads, queries, keys]."""
        masks = []
        if attn_mask is not None:
            added = _additive(attn_mask, q)
            masks.append(added.view(q.shape[0], -1, *added.shape[1:]) if added.dim() == 3 else added)
        if padding is not None:
            masks.append(_additive(padding, q).view(q.shape[0], 1, 1, -1))
        return sum(masks[1:], masks[0]) if masks else None


class HeadWindowAttention(nn.Module):
    """torchvision's shifted windows (Swin, both versions, of videos too), its layers called.

    Takes the original's layers, table and buffers under their own names.
    """

    qkv: nn.Linear
    proj: nn.Linear
    relative_position_index: Tensor
    relative_position_bias_table: Tensor
    cpb_mlp: nn.Sequential
    relative_coords_table: Tensor
    logit_scale: Tensor

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.window_size, self.shift_size = list(original.window_size), list(original.shift_size)
        self.attention_dropout, self.dropout = original.attention_dropout, original.dropout
        self.head_dim = original.qkv.in_features // original.num_heads
        self.is_cosine = type(original).__name__.endswith("V2")
        # A window larger than its input shrinks in a video; around an image the input is padded
        self.shrinks = type(original).__name__.endswith("3d")
        self._parameters |= original._parameters
        self._buffers |= original._buffers
        self._modules |= original._modules
        if self.is_cosine and original.qkv.bias is not None:  # the original does so at every call
            width = original.qkv.in_features
            with torch.no_grad():
                original.qkv.bias[width : 2 * width].zero_()
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, *sizes, channels] to the same; sizes: (height, width), of videos (time, height, width)."""
        sizes = x.shape[1:-1]
        whole = [size <= window for size, window in zip(sizes, self.window_size, strict=True)]
        shifts = [0 if one else shift for one, shift in zip(whole, self.shift_size, strict=True)]
        window = self.window_size
        if self.shrinks:
            window = [size if one else each for one, size, each in zip(whole, sizes, window, strict=True)]
        rest = [-size % each for size, each in zip(sizes, window, strict=True)]
        x = F.pad(x, (0, 0, *(pad for each in reversed(rest) for pad in (0, each))))
        shape, dims = x.shape, tuple(range(1, 1 + len(sizes)))
        if any(shifts):
            x = torch.roll(x, [-shift for shift in shifts], dims)
        windows = _to_windows(x, window)
        qkv = self.qkv(windows).view(*windows.shape[:2], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.is_cosine:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * self.logit_scale.clamp(max=math.log(100.0)).exp()
        else:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
        scores = scores + self._bias(math.prod(window))
        if any(shifts):
            mask = _shift_mask(x, window, shifts)
            of_input = scores.view(shape[0], -1, *scores.shape[1:])
            scores = (of_input + mask[:, None]).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        y = self.proj((weights @ v).transpose(1, 2).flatten(2))
        y = _from_windows(F.dropout(y, self.dropout, self.training), shape[:-1], window)
        if any(shifts):
            y = torch.roll(y, shifts, dims)
        return y[(slice(None), *(slice(size) for size in sizes))].contiguous()

    def _bias(self, positions: int) -> Tensor:
        """[heads, positions, positions]: added to the scores of each window."""
        index = self.relative_position_index
        if self.is_cosine:
            table: Tensor = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        else:
            table = self.relative_position_bias_table
        if self.shrinks:
            index = index[:positions, :positions].flatten()
        bias = table[index].view(positions, positions, -1).permute(2, 0, 1)
        return 16 * bias.sigmoid() if self.is_cosine else bias


def _to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """[batch, *sizes, channels] to [batch * windows, positions, channels]."""
    count = len(window)
    split = [part for size, each in zip(x.shape[1:-1], window, strict=True) for part in (size // each, each)]
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    x = x.permute(0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2), 2 * count + 1)
    return x.flatten(0, count).flatten(1, count)


def _from_windows(y: Tensor, shape: Sequence[int], window: Sequence[int]) -> Tensor:
    """[batch * windows, positions, channels] to [*shape, channels], with shape [batch, *sizes]."""
    count = len(window)
    numbers = [size // each for size, each in zip(shape[1:], window, strict=True)]
    y = y.view(shape[0], *numbers, *window, -1)
    pairs = (place for dim in range(1, 1 + count) for place in (dim, dim + count))
    return y.permute(0, *pairs, 2 * count + 1).reshape(*shape, -1)


def _shift_mask(x: Tensor, window: Sequence[int], shifts: Sequence[int]) -> Tensor:
    """[windows, positions, positions]: -100 between positions that were no neighbours before the shift."""
    regions = torch.zeros((), dtype=torch.long, device=x.device)
    for size, each, shift in zip(x.shape[1:-1], window, shifts, strict=True):
        place = torch.arange(size, device=x.device)
        regions = regions[..., None] * 3 + (place >= size - each).long() + (place >= size - shift).long()
    of_window = _to_windows(regions[None, ..., None], window).squeeze(-1)
    apart = of_window[:, None] != of_window[:, :, None]
    return torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill(apart, -100.0)


def _chunk(stacked: Tensor) -> tuple[Tensor, ...]:
    """Of queries, keys and values; each asks for gradients where the whole does."""
    return tuple(part.requires_grad_(stacked.requires_grad) for part in stacked.detach().chunk(3))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)


# By name: torchvision's models need not be imported for networks without them
_WINDOWS = (
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention",
)


def open_attention(module: nn.Module) -> HeadAttention | HeadWindowAttention | None:
    """Attention that is known, opened: the same function; None for other modules."""
    known = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, nn.MultiheadAttention) and type(module) is nn.MultiheadAttention:
        plain = module.bias_k is None and not module.add_zero_attn
        return HeadAttention(module) if plain else None
    if known.startswith(_WINDOWS):
        return HeadWindowAttention(module)
    return None
