"""Language models as Hugging Face writes them: token ids and masks by name, outputs in a dataclass."""

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, WIDTH, HEADS, LENGTH, LABELS = 50, 24, 4, 9, 3


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """Both a dict and a dataclass; holds only what is there, and a tuple of states among it."""

    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.places, self.kinds = nn.Embedding(16, WIDTH), nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("position_ids", torch.arange(16)[None], persistent=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        places = self.position_ids[:, : input_ids.size(1)]
        return self.norm(self.words(input_ids) + self.places(places) + self.kinds(kinds))


class SelfAttention(nn.Module):
    """Queries, keys and values by layers of their own; the numbers of heads kept beside them."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = HEADS, WIDTH // HEADS
        self.all_head_size = WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fused = fused

    def by_head(self, x: Tensor) -> Tensor:
        x = x.view((*x.size()[:-1], self.num_attention_heads, self.attention_head_size))
        return x.permute(0, 2, 1, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.by_head(self.query(x)), self.by_head(self.key(x)), self.by_head(self.value(x))
        weights = None
        if self.fused:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        else:
            scores = torch.matmul(q, k.transpose(-1, -2)) / self.attention_head_size**0.5
            weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
            context = torch.matmul(weights, v)
        context = context.permute(0, 2, 1, 3).contiguous()
        return context.view((*context.size()[:-2], self.all_head_size)), weights


class ShapedAttention(SelfAttention):
    """Keeps its heads' whole width, and works out the size of a head from that."""

    def __init__(self, fused: bool) -> None:
        super().__init__(fused)
        self.n_heads, self.dim = HEADS, WIDTH

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        shape = (x.size(0), -1, self.n_heads, self.dim // self.n_heads)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return context.transpose(1, 2).reshape(x.size(0), -1, self.dim), None


class ScaledAttention(ShapedAttention):
    """Its `dim` is the width that it reads: scores are scaled by it, whatever heads there are."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        shape = (x.size(0), x.size(1), self.n_heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=self.dim**-0.5)
        return context.transpose(1, 2).flatten(2), None


class Layer(nn.Module):
    def __init__(self, fused: bool, kind: type[SelfAttention] = SelfAttention) -> None:
        super().__init__()
        self.attention = kind(fused)
        self.output, self.output_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.narrow, self.norm = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        context, weights = self.attention(x, attention_mask=attention_mask)
        x = self.output_norm(self.output(context) + x)
        return self.norm(self.narrow(F.gelu(self.wide(x))) + x), weights


class Encoder(nn.Module):
    """A classifier of sequences in the manner of BERT."""

    def __init__(self, fused: bool = False, kind: type[SelfAttention] = SelfAttention) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.layers = nn.ModuleList([Layer(fused, kind) for _ in range(2)])
        self.pooler, self.classifier = nn.Linear(WIDTH, 20), nn.Linear(20, LABELS)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        assert input_ids is not None
        x = self.embeddings(input_ids, token_type_ids)
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape, device=input_ids.device)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        states = [x]
        for layer in self.layers:
            x, _ = layer(x, attention_mask=mask)
            states.append(x)
        logits = self.classifier(torch.tanh(self.pooler(x[:, 0])))
        return ModelOutput(logits, tuple(states) if output_hidden_states else None)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class DecoderLayer(nn.Module):
    """Rotated positions, two heads of queries for each of keys, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = 6, 2
        self.q_proj, self.o_proj = nn.Linear(WIDTH, 48, bias=False), nn.Linear(48, WIDTH, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, 24, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 40, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(40, WIDTH, bias=False)
        self.input_norm, self.norm = RMSNorm(WIDTH), RMSNorm(WIDTH)

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-two, one), dim=-1) * angles.sin()

    def forward(self, x: Tensor, angles: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.input_norm(x)
        shape = (*y.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotate(q, angles), self.rotate(k, angles)
        k, v = (
            part[:, :, None].expand(-1, -1, self.num_key_value_groups, -1, -1).flatten(1, 2)
            for part in (k, v)
        )
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        x = x + self.o_proj(context.transpose(1, 2).reshape(*y.shape[:-1], -1).contiguous())
        y = self.norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Decoder(nn.Module):
    """A model of the next word in the manner of Llama, its table of words tied to its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([DecoderLayer() for _ in range(2)])
        self.norm, self.lm_head = RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(3) / 3.0), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ModelOutput:
        x = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        angles = torch.arange(length, device=x.device)[:, None].to(x.dtype) * self.inv_freq
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool, device=x.device))
        seen = causal[None, None] & attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, torch.cat((angles, angles), -1), seen)
        return ModelOutput(self.lm_head(self.norm(x)))


class Conv1D(nn.Module):
    """A linear layer that holds its matrix the other way round."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.weight.size(1))


class SplitAttention(nn.Module):
    """Queries, keys and values by one layer, split at a width that is kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = self.split_size = WIDTH
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.c_attn(x).split(self.split_size, dim=2))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        projected: Tensor = self.c_proj(context.reshape(*context.shape[:-2], -1).contiguous())
        return projected


class GeneratorLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), SplitAttention(), nn.LayerNorm(WIDTH)
        self.c_fc, self.c_proj = Conv1D(40, WIDTH), Conv1D(WIDTH, 40)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), seen)
        moved: Tensor = self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return x + moved


class Generator(nn.Module):
    """A model of the next word in the manner of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList([GeneratorLayer() for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ModelOutput:
        length = input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(places)
        seen = (places[:, None] >= places)[None, None] & attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, seen)
        return ModelOutput(self.lm_head(self.ln_f(x)))


NETWORKS = {
    "encoder": Encoder,
    "encoder_fused": lambda: Encoder(fused=True),
    "encoder_shaped": lambda: Encoder(kind=ShapedAttention),
    "encoder_scaled": lambda: Encoder(kind=ScaledAttention),
    "decoder": Decoder,
    "generator": Generator,
}


def batch(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return {
        "input_ids": torch.randint(1, WORDS, (count, LENGTH), generator=generator) * mask,
        "attention_mask": mask,
    }


def built(name: str) -> nn.Module:
    torch.manual_seed(2)
    model: nn.Module = NETWORKS[name]()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()
