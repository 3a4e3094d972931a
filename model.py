"""data2vec's networks: embedders, the Transformer, the student and its EMA teacher.

    x = embed(input)                        (B, T, D)   PatchEmbed | WaveEmbed | TokenEmbed
    f = head(encoder(mask(x)))[masked]      (M, D)      Student
    a_1 .. a_L = encoder_ema(x)             (B, T, D)   Teacher

B batch, T positions (patches, frames or tokens), D width, H heads, L depth. `valid` is True where a position is
real and False where it is padding; `mask` is True where a position is hidden from the student and scored.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# ---- Transformer -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention. k_bias=False leaves keys without bias (vision; softmax does not see it anyway)."""

    def __init__(self, dim: int, heads: int, k_bias: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.k_bias = nn.Parameter(torch.zeros(dim)) if k_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, k_bias, self.v_bias]))
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
        y = attend(q, k, v, bias, self.dropout if self.training else 0.0)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v: (B, H, T, d) each -> (B, H, T, d). A boolean bias is True where a key is seen; who sees
    no key at all (padding, under a window) gets 0.

    On a CPU in bfloat16 it is written out: torch's fused one is several times slower there, above all in its backward pass.
    """
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout)
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # (B, H, T, T)
    if bias is None:
        weights = logits.softmax(-1)
    else:
        logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias
        logits = logits.clamp_min(least := torch.finfo(logits.dtype).min)  # -inf alone would make NaN
        weights = logits.softmax(-1) * (logits.amax(-1, keepdim=True) > least)
    return F.dropout(weights, dropout).to(v.dtype) @ v


class Block(nn.Module):
    """One Transformer layer, pre-norm (vision) or post-norm (speech, text), and the output of it that is a target.

    target       which output serves as a_l: "block" (after the last residual, and norm if post-norm), "ffn" (the
                 FFN's output as it is added), "ffn_residual" (their sum, before the norm) or "attention"
    layer_scale  initial gain of both branches, None for none (ViT-B 1e-4, ViT-L 1e-5)
    drop_path    probability to skip a branch, per sample
    alpha        residual gain of DeepNorm, (2L)^(1/4); 1 = plain post-norm
    """

    def __init__(
        self, dim: int, heads: int, ffn: int, *, pre_norm: bool, eps: float, k_bias: bool, target: str,
        layer_scale: float | None = None, drop_path: float = 0.0, dropout: float = 0.0, attn_dropout: float = 0.0,
        ffn_dropout: float = 0.0, alpha: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.pre_norm, self.target, self.drop_path, self.alpha = pre_norm, target, drop_path, alpha
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, k_bias, attn_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, ffn)
        self.fc2 = nn.Linear(ffn, dim)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.dropout, self.ffn_dropout = nn.Dropout(dropout), nn.Dropout(ffn_dropout)

    def ffn(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_dropout(F.gelu(self.fc1(x))))

    def branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        """Layer scale, then stochastic depth: the whole branch of a sample is dropped or scaled up to keep its mean."""
        y = y if scale is None else scale * y
        if not self.training or self.drop_path == 0:
            return y
        keep = torch.empty(len(y), 1, 1, device=y.device, dtype=y.dtype).bernoulli_(1 - self.drop_path)
        return y * keep / (1 - self.drop_path)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), bias added to the attention logits (broadcast to B, H, T, T) -> x (B, T, D), a_l (B, T, D)."""
        if self.pre_norm:
            attention = self.branch(self.attn(self.norm1(x), bias), self.scale1)
            x = x + self.dropout(attention)
            ffn = self.branch(self.ffn(self.norm2(x)), self.scale2)
            x = residual = x + self.dropout(ffn)
        else:
            attention = self.attn(x, bias)
            x = self.norm1(self.alpha * x + self.dropout(attention))
            ffn = self.ffn(x)
            residual = self.alpha * x + self.dropout(ffn)
            x = self.norm2(residual)
        return x, {"block": x, "ffn": ffn, "ffn_residual": residual, "attention": attention}[self.target]


class Encoder(nn.Module):
    """Embed, hide, place, transform: the network that student and teacher share in shape.

    embed     a module: embed(input, valid) -> (x (B, T, D), valid (B, T) or None), the content of each position, where
              `valid` goes in as the input knows it (speech: its samples (B,)) and comes out for positions;
              embed.place(x, valid) -> (x (B, prefix + T, D), bias), which adds position AFTER hiding;
              embed.prefix: tokens put in front (the class token), never masked, never a target; embed.distance(x):
              (T, T) how far apart two positions are
    blocks    the layers
    norm      applied to the last layer's output (vision), or nn.Identity() (speech and text are post-norm)
    hide      learn a mask embedding (vision, speech); text hides by a <mask> token instead
    layer_drop  probability to skip a whole layer for the whole batch, in training only (Fan et al. 2019; speech)
    """

    def __init__(
        self, embed: nn.Module, blocks: list[Block], norm: nn.Module, dim: int, hide: bool = True, layer_drop: float = 0.0
    ):
        super().__init__()
        self.dim, self.prefix, self.layer_drop = dim, embed.prefix, layer_drop
        self.embed, self.blocks, self.norm = embed, nn.ModuleList(blocks), norm
        self.mask_embedding = nn.Parameter(torch.zeros(dim)) if hide else None

    def forward(
        self, input: Tensor, mask: Tensor | None = None, valid: Tensor | None = None, window: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """input, mask (B, T) or None, valid or None -> features (B, prefix + T, D), [a_1 .. a_L] each (B, T, D).

        window > 0 limits self-attention to positions at most that far apart (the paper's target-context ablation).
        """
        x, valid = self.embed(input, valid)
        return self.transform(x, mask, valid, window)

    def transform(
        self, x: Tensor, mask: Tensor | None = None, valid: Tensor | None = None, window: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """As forward, from embedded content x (B, T, D) on: the speech teacher takes the student's features here."""
        if mask is not None and self.mask_embedding is not None:
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        x, bias = self.embed.place(x, valid)
        bias = restrict(bias, valid, self.embed.distance(x) <= window if window else None, self.prefix)
        layers = []
        for l, block in enumerate(self.blocks):
            if self.training and self.layer_drop and torch.rand(()) < self.layer_drop:
                x = x + 0 * sum(p.sum() for p in block.parameters())  # gradients of 0: DDP waits for all of them
                continue
            x, a = block(x, bias_of(bias, l))
            layers.append(a[:, self.prefix :])
        return self.norm(x), layers


def bias_of(bias: Tensor | None, l: int) -> Tensor | None:
    """The bias of block l, counted from 0: its own of (L, B, H, T, T), or everyone's."""
    return bias[l] if bias is not None and bias.ndim == 5 else bias


def restrict(bias: Tensor | None, valid: Tensor | None, near: Tensor | None, prefix: int) -> Tensor | None:
    """Forbids attention to padding and beyond a window, on top of a bias broadcastable to ([L,] B, H, T, T), or None.

    Without a bias the result is boolean, True = is seen, which scaled_dot_product_attention takes as well.

    valid (B, T) bool, near (T, T) bool. Under a window no position may look at the prefix tokens, which see everything.
    """
    if valid is None and near is None:
        return bias
    seen = True
    if valid is not None:
        seen = F.pad(valid, (prefix, 0), value=True)[:, None, None, :]  # (B, 1, 1, prefix + T)
    if near is not None:
        near = F.pad(F.pad(near, (prefix, 0), value=False), (0, 0, prefix, 0), value=True)
        seen = seen & near
    return seen if bias is None else bias.masked_fill(~seen, -math.inf)


# ---- vision ------------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Images to patches (a strided convolution), a class token in front, positions by a table of biases of the attention.

    image_size       (height, width) in pixels, each a multiple of `patch`
    learned_std      > 0 adds a learned absolute position to every patch, initialised at this std (not in the paper)
    relative         the paper's relative-position bias: (2H - 1)(2W - 1) + 3 rows of one value a head; the last three
                     are class token -> patch, patch -> class token, class token -> class token
    tables           0: all blocks share one table (rows, heads); L: each of L blocks has its own, (L, rows, heads)
    """

    prefix = 1

    def __init__(
        self, image_size: tuple[int, int], patch: int, dim: int, heads: int, relative: bool, learned_std: float, tables: int = 0
    ):
        super().__init__()
        if image_size[0] % patch or image_size[1] % patch:
            raise ValueError(f"image_size {image_size[0]} x {image_size[1]} is not a multiple of patch {patch}")
        self.image_size = tuple(image_size)
        self.grid = height, width = image_size[0] // patch, image_size[1] // patch
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(dim))
        self.learned = nn.Parameter(learned_std * torch.randn(height * width, dim)) if learned_std else None
        shape = (tables,) * (tables > 0) + ((2 * height - 1) * (2 * width - 1) + 3, heads)
        self.table = nn.Parameter(torch.zeros(shape)) if relative else None
        if relative:  # rebuilt from the grid, so it is neither averaged nor saved
            self.register_buffer("index", relative_index(height, width), persistent=False)

    def forward(self, images: Tensor, valid: None = None) -> tuple[Tensor, None]:
        """images (B, 3, h, w) float, normalised -> (B, T, D), row-major patches."""
        if images.shape[-2:] != self.image_size:
            raise ValueError(f"the model takes images of {self.image_size}, got {tuple(images.shape[-2:])}")
        return rearrange(self.proj(images), "b d h w -> b (h w) d"), None

    def place(self, x: Tensor, valid: None = None) -> tuple[Tensor, Tensor | None]:
        if self.learned is not None:
            x = x + self.learned.to(x.dtype)
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        if self.table is None:
            return x, None
        if self.table.ndim == 2:
            return x, rearrange(F.embedding(self.index, self.table), "i j h -> 1 h i j")
        rows = F.embedding(self.index, rearrange(self.table, "l r h -> r (l h)"))
        return x, rearrange(rows, "i j (l h) -> l 1 h i j", l=len(self.table))

    def distance(self, x: Tensor) -> Tensor:
        """(T, T): patches apart, the larger of rows and columns."""
        cell = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in self.grid))
        return (cell[:, None] - cell[None]).abs().amax(-1)


def relative_index(height: int, width: int) -> Tensor:
    """Row of the bias table for each (query, key): (1 + H * W, 1 + H * W) int64, the class token first."""
    cell = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    dy, dx = (cell[:, None] - cell[None]).unbind(-1)  # query minus key
    rows = (2 * height - 1) * (2 * width - 1)
    index = torch.full((1 + height * width, 1 + height * width), rows + 1)  # patch -> class token
    index[0, :], index[0, 0] = rows, rows + 2  # class token -> patch, class token -> itself
    index[1:, 1:] = (dy + height - 1) * (2 * width - 1) + dx + width - 1
    return index


def resize_grid(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of one vector a patch, (H * W, D), to another grid (h * w, D): learned positions."""
    cells = rearrange(x, "(y x) d -> 1 d y x", y=old[0])
    cells = F.interpolate(cells.float(), new, mode="bicubic", align_corners=False)
    return rearrange(cells, "1 d y x -> (y x) d").to(x.dtype)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The same for a relative-position table ([L,] rows, H): its offsets form a grid, its last three rows stay."""
    if table.ndim == 3:
        return torch.stack([resize_positions(one, old, new) for one in table])
    offsets = [(2 * height - 1, 2 * width - 1) for height, width in (old, new)]
    return torch.cat([resize_grid(table[:-3], *offsets), table[-3:]])


def vision_encoder(
    *, image_size: tuple[int, int], patch: int, dim: int, depth: int, heads: int, ffn: int, layer_scale: float,
    drop_path: float = 0.0, dropout: float = 0.0, attn_dropout: float = 0.0, target: str = "block",
    relative: bool = True, per_block: bool = False, learned_std: float = 0.0, init_std: float = 0.02, eps: float = 1e-6,
) -> Encoder:  # fmt: skip
    """The ViT of data2vec (paper section 4.1; Dosovitskiy et al. 2020, Bao et al. 2021): pre-norm, layer scale,
    drop path rising linearly over depth, no key bias, relative positions (per_block: a table for each), LayerNorm eps 1e-6."""
    embed = PatchEmbed(image_size, patch, dim, heads, relative, learned_std, depth * per_block)
    blocks = [
        Block(
            dim, heads, ffn, pre_norm=True, eps=eps, k_bias=False, target=target, layer_scale=layer_scale or None,
            drop_path=drop_path * i / max(depth - 1, 1), dropout=dropout, attn_dropout=attn_dropout,
        )
        for i in range(depth)
    ]  # fmt: skip
    encoder = Encoder(embed, blocks, nn.LayerNorm(dim, eps=eps), dim)
    init_vision(encoder, init_std)
    return encoder


def init_vision(module: nn.Module, std: float = 0.02) -> None:
    """Truncated normal weights, zero biases; block l's two output projections divided by sqrt(2 l), l = 1 .. L."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    if isinstance(module, Encoder):
        nn.init.trunc_normal_(module.embed.cls, std=std)
        nn.init.trunc_normal_(module.mask_embedding, std=std)
        for l, block in enumerate(module.blocks, start=1):
            block.attn.out.weight.data.div_(math.sqrt(2 * l))
            block.fc2.weight.data.div_(math.sqrt(2 * l))


# ---- speech ------------------------------------------------------------------------------------------------------

CONVS = ((512, 10, 5),) + 4 * ((512, 3, 2),) + 2 * ((512, 2, 2),)  # channels, kernel, stride: 16 kHz -> 50 frames a second


def convolutions(channels: int, convs: list[str]) -> tuple[tuple[int, int, int], ...]:
    """(channels, kernel, stride) of each layer from the options: `convs` spells them out, as "512,10,5"; [] is CONVS' form."""
    return tuple(tuple(int(n) for n in conv.split(",")) for conv in convs) or tuple((channels, k, s) for _, k, s in CONVS)


class WaveEmbed(nn.Module):
    """Waveforms to frames (strided convolutions, no padding), positions from a stack of wide convolutions.

    convs    (channels, kernel, stride) of each layer; every layer is conv without bias, LayerNorm over channels, GELU
    groups   of the position convolutions, a divisor of dim
    dropout  of what enters the Transformer
    eps      of the two norms that are no convolution's
    """

    prefix = 0

    def __init__(
        self, convs: tuple[tuple[int, int, int], ...], dim: int, kernel: int, depth: int, groups: int, dropout: float, eps: float
    ):
        super().__init__()
        widths = [1] + [channels for channels, _, _ in convs]
        self.content = nn.ModuleDict({
            "convs": nn.ModuleList(nn.Conv1d(w, c, k, stride, bias=False) for w, (c, k, stride) in zip(widths, convs)),
            "norms": nn.ModuleList(nn.LayerNorm(c) for c, _, _ in convs),
            "norm": nn.LayerNorm(widths[-1], eps=eps),
            "proj": nn.Linear(widths[-1], dim),
        })  # fmt: skip
        self.positions = nn.ModuleList(nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(depth))
        self.norm, self.dropout = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)

    def frames(self, samples):
        """Number of frames of so many samples (int or Tensor): floor((n - kernel) / stride + 1), layer after layer."""
        for conv in self.content["convs"]:
            samples = (samples - conv.kernel_size[0]) // conv.stride[0] + 1
        return samples

    def forward(self, waves: Tensor, samples: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """waves (B, N) normalised float, samples (B,) int64 or None (no padding) -> content (B, T, D), valid (B, T) or None."""
        x = waves[:, None].transpose(1, 2)  # (B, N, 1)
        for conv, norm in zip(self.content["convs"], self.content["norms"]):
            x = convolve(conv, norm, x)
        x = self.content["proj"](self.content["norm"](x))
        if samples is None:
            return x, None
        return x, torch.arange(x.shape[1], device=x.device) < self.frames(samples)[:, None]

    def place(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, None]:
        x = x if valid is None else x.masked_fill(~valid[..., None], 0)  # once; the layers below let padding bleed in
        y = rearrange(x, "b t d -> b d t")
        for conv in self.positions:
            y = conv(y)[..., : x.shape[1]]  # an even kernel gives one frame too many
            y = F.gelu(rearrange(F.layer_norm(rearrange(y, "b d t -> b t d"), x.shape[-1:]), "b t d -> b d t"))
        return self.dropout(self.norm(x + rearrange(y, "b d t -> b t d"))), None

    def distance(self, x: Tensor) -> Tensor:
        """(T, T): frames apart."""
        t = torch.arange(x.shape[1], device=x.device)
        return (t[:, None] - t[None]).abs()


def convolve(conv: nn.Conv1d, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """gelu(norm(conv(x))), the norm over channels, no padding: (B, N, C) -> (B, T, C').

    On a CPU in bfloat16 matrix products over the stretches of `stride` samples are several times faster than Conv1d.
    """
    if not (x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        return F.gelu(norm(conv(x.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
    (kernel,), (stride,), y = conv.kernel_size, conv.stride, 0
    frames = (x.shape[1] - kernel) // stride + 1
    for first in range(0, kernel, stride):
        taps = min(stride, kernel - first)
        stretch = x[:, first : first + frames * stride].unflatten(1, (frames, stride)) if taps == stride else (
            torch.stack([x[:, first + i :: stride][:, :frames] for i in range(taps)], 2)
        )  # (B, T, taps, C)
        weight = rearrange(conv.weight[..., first : first + taps], "o c k -> o (k c)")
        y = y + F.linear(stretch.flatten(2), weight)
    return F.gelu(norm(y))


def speech_encoder(
    *, dim: int, depth: int, heads: int, ffn: int, convs: tuple[tuple[int, int, int], ...] = CONVS, kernel: int = 19,
    pos_depth: int = 5, groups: int = 16, dropout: float = 0.0, attn_dropout: float = 0.0, ffn_dropout: float = 0.0,
    layer_drop: float = 0.0, target: str = "ffn", deep_norm: bool = False, eps: float = 1e-5,
) -> Encoder:  # fmt: skip
    """The wav2vec 2.0 encoder as data2vec changes it (paper section 4.2): post-norm, 5 position convolutions, LayerNorm
    eps 1e-5, no final norm. deep_norm: residual gain (2L)^(1/4) and smaller initial weights (AudioSet; Wang et al. 2022)."""
    embed = WaveEmbed(convs, dim, kernel, pos_depth, groups, dropout, eps)
    blocks = [
        Block(
            dim, heads, ffn, pre_norm=False, eps=eps, k_bias=True, target=target, dropout=dropout, attn_dropout=attn_dropout,
            ffn_dropout=ffn_dropout, alpha=(2 * depth) ** 0.25 if deep_norm else 1.0,
        )
        for _ in range(depth)
    ]  # fmt: skip
    encoder = Encoder(embed, blocks, nn.Identity(), dim, layer_drop=layer_drop)
    for conv in embed.content["convs"]:
        nn.init.kaiming_normal_(conv.weight)
    nn.init.uniform_(encoder.mask_embedding)  # as in wav2vec 2.0
    init_post_norm(encoder, (8 * depth) ** -0.25 if deep_norm else None)
    return encoder


# ---- text --------------------------------------------------------------------------------------------------------


class TokenEmbed(nn.Module):
    """Token ids to vectors, learned positions counted from pad + 1 over what is no padding, a LayerNorm (RoBERTa's)."""

    prefix = 0

    def __init__(self, vocab: int, max_length: int, pad: int, dim: int, dropout: float, eps: float):
        super().__init__()
        self.pad = pad
        self.tokens = nn.Embedding(vocab, dim, padding_idx=pad)
        self.positions = nn.Embedding(max_length + pad + 1, dim, padding_idx=pad)
        self.norm, self.dropout = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)

    def forward(self, ids: Tensor, valid: None = None) -> tuple[Tensor, Tensor]:
        """ids (B, T) int64 -> token vectors (B, T, D), valid (B, T) = no padding. Raises ValueError for too long a text."""
        if ids.shape[1] > (longest := len(self.positions.weight) - self.pad - 1):
            raise ValueError(f"{ids.shape[1]} tokens, but the model has positions for {longest}")
        return self.tokens(ids), ids != self.pad

    def place(self, x: Tensor, valid: Tensor) -> tuple[Tensor, None]:
        x = x + self.positions(valid.cumsum(1) * valid + self.pad)
        return self.dropout(self.norm(x)).masked_fill(~valid[..., None], 0), None

    distance = WaveEmbed.distance


def text_encoder(
    *, vocab: int, max_length: int, pad: int, dim: int, depth: int, heads: int, ffn: int, dropout: float = 0.0,
    attn_dropout: float = 0.0, ffn_dropout: float = 0.0, target: str = "ffn", token_std: float = 0.02,
    position_std: float = 0.02, weight_std: float = 0.02, eps: float = 1e-5,
) -> Encoder:  # fmt: skip
    """RoBERTa's encoder (paper section 4.3; Liu et al. 2019): post-norm, LayerNorm eps 1e-5; <mask> is a token of the input.

    token_std, position_std, weight_std  of the normal initial values: both tables, and the blocks' matrices (0: 1 / sqrt(inputs))
    """
    embed = TokenEmbed(vocab, max_length, pad, dim, dropout, eps)
    blocks = [
        Block(
            dim, heads, ffn, pre_norm=False, eps=eps, k_bias=True, target=target, dropout=dropout, attn_dropout=attn_dropout,
            ffn_dropout=ffn_dropout,
        )
        for _ in range(depth)
    ]  # fmt: skip
    encoder = Encoder(embed, blocks, nn.Identity(), dim, hide=False)
    for table, std in (embed.tokens, token_std), (embed.positions, position_std):
        nn.init.normal_(table.weight, std=std)
        table.weight.data[pad] = 0
    init_post_norm(encoder, std=weight_std)
    return encoder


def init_post_norm(encoder: Encoder, gain: float | None = None, std: float = 0.02) -> None:
    """BERT's normal(std) for all matrices of the blocks, std 0: 1 / sqrt(inputs); with a gain DeepNorm's: Xavier, query and key at 1."""
    for block in encoder.blocks:
        for linear in (block.attn.qkv, block.attn.out, block.fc1, block.fc2):
            nn.init.normal_(linear.weight, std=std or linear.in_features**-0.5)
            if gain is not None:
                nn.init.xavier_normal_(linear.weight, gain)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if gain is not None:
            for part, g in zip(block.attn.qkv.weight.data.chunk(3), (1.0, 1.0, gain)):
                nn.init.xavier_normal_(part, g)


# ---- student and teacher -----------------------------------------------------------------------------------------


class Student(nn.Module):
    """The encoder that learns, and the head that maps its features to predictions of the teacher's targets."""

    def __init__(self, encoder: Encoder, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input: Tensor, mask: Tensor, valid: Tensor | None = None, content: bool = False):
        """input, mask (B, T) bool -> predictions (M, D) of the M masked positions, row by row.

        content=True returns also the content (B, T, D) before masking, without gradient, and the positions that are valid:
        the speech teacher goes on from there, so that the convolutions run once a step.
        """
        if not content:
            return self.head(self.encoder(input, mask, valid)[0][:, self.encoder.prefix :][mask])
        x, valid = self.encoder.embed(input, valid)
        features, _ = self.encoder.transform(x, mask, valid)
        return self.head(features[:, self.encoder.prefix :][mask]), x.detach(), valid


def regression_head(dim: int, layers: int = 1, std: float = 0.0) -> nn.Module:
    """Linear(D, D) (vision, speech) or Linear(D, 2D), GELU, Linear(2D, D) (text); more layers repeat the wide one.

    std > 0 starts with BERT's normal(std) and zero biases (text) instead of torch's uniform values.
    """
    widths = [dim] + (layers - 1) * [2 * dim] + [dim]
    linears = [nn.Linear(w, v) for w, v in zip(widths, widths[1:])]
    for linear in linears if std else ():
        nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
    if layers == 1:
        return linears[0]
    return nn.Sequential(*(module for linear in linears[:-1] for module in (linear, nn.GELU())), linears[-1])


class Classifier(nn.Module):
    """Fine-tuning: mean of the positions' last layer -> LayerNorm -> Linear. The encoder's own final norm is dropped.

    pool_cls  the class token's last layer instead of the mean, as some models of other origin have it
    """

    def __init__(self, encoder: Encoder, classes: int, pool_cls: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(encoder.dim, eps=getattr(encoder.norm, "eps", 1e-6))
        encoder.norm, encoder.mask_embedding = nn.Identity(), None
        self.encoder, self.pool_cls = encoder, pool_cls
        self.out = nn.Linear(encoder.dim, classes)
        init_vision(self.out)

    def forward(self, input: Tensor) -> Tensor:
        """input -> logits (B, classes)."""
        features, _ = self.encoder(input)
        return self.out(self.norm(features[:, 0] if self.pool_cls else features[:, self.encoder.prefix :].mean(1)))


class SentenceClassifier(nn.Module):
    """Fine-tuning on text: the first token's (<s>) last layer -> dropout -> Linear -> tanh -> dropout -> Linear (RoBERTa's)."""

    def __init__(self, encoder: Encoder, classes: int, dropout: float = 0.0):
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        self.dense, self.out = nn.Linear(encoder.dim, encoder.dim), nn.Linear(encoder.dim, classes)
        for linear in (self.dense, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, classes); one class: a score."""
        features, _ = self.encoder(tokens)
        return self.out(self.dropout(self.dense(self.dropout(features[:, 0])).tanh()))


class Recogniser(nn.Module):
    """Fine-tuning on speech: every frame's last layer -> dropout -> Linear, for letters (CTC) or for sound events.

    frozen  the encoder gets no gradient while this is True (the released recipes' first updates)
    """

    def __init__(self, encoder: Encoder, classes: int, dropout: float = 0.0):
        super().__init__()
        self.encoder, self.dropout, self.out = encoder, nn.Dropout(dropout), nn.Linear(encoder.dim, classes)
        self.frozen = False

    def forward(
        self, waves: Tensor, samples: Tensor | None = None, mask: Tensor | None = None, channels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """waves (B, N), samples (B,) or None -> logits (B, T, classes), number of frames of each row (B,) int64.

        mask (B, T) bool hides frames and channels (B, D) bool zeroes features, a regulariser (as SpecAugment's, Park et al.
        2019); without them nothing is hidden.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x, valid = self.encoder.embed(waves, samples)
            if mask is not None:
                x = torch.where(mask[..., None], self.encoder.mask_embedding.to(x.dtype), x)
            if channels is not None:
                x = x.masked_fill(channels[:, None], 0)
            features, _ = self.encoder.transform(x, None, valid)
        frames = torch.full((len(x),), x.shape[1], device=x.device) if valid is None else valid.sum(1)
        return self.out(self.dropout(features)), frames


def linear_softmax(logits: Tensor, frames: Tensor) -> Tensor:
    """Which events a clip holds, from its frames: sum p^2 / sum p (Wang et al. 2019). logits (B, T, C), frames (B,) -> (B, C)."""
    real = torch.arange(logits.shape[1], device=logits.device) < frames[:, None]
    p = logits.float().sigmoid() * real[..., None]
    return p.square().sum(1) / p.sum(1).clamp_min(1e-7)


class Teacher(nn.Module):
    """An exponential moving average of the student's encoder: same weights at the start, no gradient, always eval.

    shared  names of submodules (such as "embed") that are not averaged: the teacher uses the student's current ones
    window  > 0 limits the teacher's self-attention (the paper's ablation of the target's context); the student's never
    """

    def __init__(self, encoder: Encoder, shared: tuple[str, ...] = (), window: int = 0):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False)
        self.shared, self.window = tuple(shared), window
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def update(self, encoder: Encoder, tau: float) -> None:
        """delta = tau * delta + (1 - tau) * theta, in float32, once after each optimiser step; none if tau >= 1.

        Two multi-tensor operations, not one kernel a parameter. Shared modules and integer buffers are copied.
        """
        mine, theirs = self.encoder.state_dict(), encoder.state_dict()
        average = [n for n, t in mine.items() if t.is_floating_point() and not self.is_shared(n)]
        follow = [n for n in mine if n not in set(average)]
        if average and tau < 1:
            torch._foreach_lerp_([mine[n] for n in average], [theirs[n].float() for n in average], 1 - tau)
        if follow:
            torch._foreach_copy_([mine[n] for n in follow], [theirs[n] for n in follow])

    def is_shared(self, name: str) -> bool:
        return any(name == s or name.startswith(s + ".") for s in self.shared)

    @torch.no_grad()
    def forward(self, input: Tensor, valid: Tensor | None = None, content: bool = False) -> list[Tensor]:
        """The full, unmasked input (content=True: its embedded content, from the student) -> [a_1 .. a_L], each (B, T, D)."""
        network = self.encoder.transform if content else self.encoder
        return network(input, None, valid, self.window)[1]
