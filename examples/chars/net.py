"""A small decoder-only transformer, of plain layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS = 4
WIDTH = 128
HEADS = 4
CONTEXT = 128

# Of the embeddings. The usual one; with torch's default of 1 the blocks hardly count at first.
_EMBEDDING_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention.

    Its projections are nn.Linear layers, which nn.MultiheadAttention's own is not: there,
    `dfw_opt.param_groups` would find nothing to quantize.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class CharTransformer(nn.Module):
    """Predicts each next character from at most ``context`` characters before it."""

    def __init__(
        self,
        characters: int,
        layers: int = LAYERS,
        width: int = WIDTH,
        heads: int = HEADS,
        context: int = CONTEXT,
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=_EMBEDDING_STD)

    def forward(self, characters: Tensor) -> Tensor:
        positions = torch.arange(characters.shape[1], device=characters.device)
        x = self.embedding(characters) + self.position(positions)
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


def build(characters: int, seed: int) -> CharTransformer:
    """The network at its random start, the same for every optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CharTransformer(characters)


@torch.no_grad()
def sample(model: CharTransformer, start: Tensor, length: int, seed: int) -> Tensor:
    """``length`` characters that go on from ``start``, drawn one by one."""
    generator = torch.Generator().manual_seed(seed)
    text = start.clone()
    for _ in range(length):
        scores = model(text[None, -model.context :])[0, -1]
        odds = scores.float().softmax(0).cpu()
        text = torch.cat((text, torch.multinomial(odds, 1, generator=generator).to(text)))
    return text[len(start) :]
