"""data2vec's networks: embedders, Transformer, student and EMA teacher (paper sections 3.1 to 3.3).

    x = embed(input)                     (B, T, D)   PatchEmbed | WaveEmbed | TokenEmbed
    f = head(encoder(x, mask))[mask]     (M, D)      Student
    a_1 .. a_L = encoder_ema(x)          (B, T, D)   Teacher

B batch, T positions (patches, frames or tokens), D width, L depth. `valid` (B, T) is True at real positions,
False at padding; `mask` (B, T) is True at positions that are hidden from the student and scored.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


class Attention(nn.Module):
    """Multi-head self-attention. k_bias: the keys have a bias, too (speech, text)."""

    def __init__(self, dim, heads, k_bias, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.k_bias = nn.Parameter(torch.zeros(dim)) if k_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim)

    def forward(self, x, bias):
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, k_bias, self.v_bias]))
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
        if x.is_cpu and q.shape[-1] < 64:  # where attention's backward pass is slow in bfloat16
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class Block(nn.Module):
    """One Transformer layer, pre-norm (vision) or post-norm (speech, text).

    target       which output is a_l: "block" (after the last residual, and norm if post-norm), "ffn" (before
                 the residual), "ffn_residual" (after it, before the norm) or "attention"
    drop_path    probability of skipping a branch, per sample
    layer_scale  pre-norm: initial gain of both branches, 0 for none (ViT-B 1e-4, ViT-L 1e-5)
    alpha        post-norm: residual gain of DeepNorm, (2L)^(1/4); 1: none
    dropout      of both branches, of the attention weights, inside the FFN
    """

    def __init__(
        self, dim, *, heads, ffn, pre_norm, eps, target, drop_path, alpha, layer_scale=0.0, dropout=(0, 0, 0)
    ):
        super().__init__()
        self.pre_norm, self.target, self.drop_path, self.alpha = pre_norm, target, drop_path, alpha
        branch_dropout, attn_dropout, ffn_dropout = dropout
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, k_bias=not pre_norm, dropout=attn_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, ffn)
        self.fc2 = nn.Linear(ffn, dim)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.dropout, self.ffn_dropout = nn.Dropout(branch_dropout), nn.Dropout(ffn_dropout)

    def ffn(self, x):
        return self.fc2(self.ffn_dropout(F.gelu(self.fc1(x))))

    def branch(self, y, scale):
        """Layer scale, then stochastic depth: a sample's branch is dropped, or scaled up to keep its mean."""
        y = y if scale is None else scale * y
        if not self.training or self.drop_path == 0:
            return y
        keep = torch.empty(len(y), 1, 1, device=y.device, dtype=y.dtype).bernoulli_(1 - self.drop_path)
        return y * keep / (1 - self.drop_path)

    def forward(self, x, bias=None):
        """x (B, T, D), bias of attention logits (broadcast to B, heads, T, T) -> x, a_l, (B, T, D) each."""
        if self.pre_norm:
            attention = self.branch(self.attn(self.norm1(x), bias), self.scale1)
            x = x + self.dropout(attention)
            ffn = self.branch(self.ffn(self.norm2(x)), self.scale2)
            x = residual = x + self.dropout(ffn)
        else:
            attention = self.attn(x, bias)
            x = self.norm1(self.alpha * x + self.dropout(self.branch(attention, None)))
            ffn = self.ffn(x)
            residual = self.alpha * x + self.dropout(self.branch(ffn, None))
            x = self.norm2(residual)
        return x, {"block": x, "ffn": ffn, "ffn_residual": residual, "attention": attention}[self.target]


class Encoder(nn.Module):
    """Embed, mask, add positions, transform: the network that student and teacher have in common.

    embed       PatchEmbed, WaveEmbed or TokenEmbed:
                  embed(input, lengths) -> content x (B, T, D), valid or None (lengths: speech's samples)
                  embed.add_positions(x, valid) -> x (B, prefix + T, D), [bias of all blocks, or one of each]
                  embed.prefix: tokens in front (the class token), never masked, never a target
                  embed.mask_token: masked positions get a learned vector (text masks its ids instead)
    drop_path   of the last block, rising linearly over depth (vision)
    layer_drop  probability of skipping a layer for the whole batch, in training (Fan et al. 2019; speech)
    """

    def __init__(
        self, embed, dim, depth, *, pre_norm, eps, drop_path=0.0, layer_drop=0.0, deep_norm=False, **block
    ):
        super().__init__()
        self.embed, self.dim, self.prefix, self.layer_drop = embed, dim, embed.prefix, layer_drop
        block |= {"pre_norm": pre_norm, "eps": eps, "alpha": (2 * depth) ** 0.25 if deep_norm else 1.0}
        rates = [drop_path * l / max(depth - 1, 1) for l in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, drop_path=rate, **block) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=eps) if pre_norm else nn.Identity()
        self.mask_embedding = nn.Parameter(torch.zeros(dim)) if embed.mask_token else None

    def forward(self, input, mask=None, lengths=None, window=0):
        """input, mask (B, T), lengths as in embed -> features (B, prefix + T, D), [a_1 .. a_L] (B, T, D).

        window > 0 limits attention to positions at most that far away (ablation of the target's context)."""
        x, valid = self.embed(input, lengths)
        return self.transform(x, mask, valid, window)

    def hide(self, x, mask):  # without such a vector (2.0, in fine-tuning): by noise
        new = 0.01 * torch.randn_like(x) if self.mask_embedding is None else self.mask_embedding.to(x.dtype)
        return torch.where(mask[..., None], new, x)

    def transform(self, x, mask=None, valid=None, window=0):
        """As forward, from the content x (B, T, D) on. The mask acts before positions are added."""
        if mask is not None and self.mask_embedding is not None:
            x = self.hide(x, mask)
        x, biases = self.embed.add_positions(x, valid)
        return self.run_blocks(x, biases, valid, window)

    def run_blocks(self, x, biases, valid, window, prenet=()):
        if valid is not None or window:
            near = neighbours(self.embed.grid or (x.shape[1],), window, x.device) if window else None
            biases = [attention_mask(bias, valid, near, self.prefix) for bias in biases]
        for block in prenet:  # 2.0
            x, _ = block(x, biases[0])
        layers = []
        for l, block in enumerate(self.blocks):
            if self.training and self.layer_drop and torch.rand(()) < self.layer_drop:
                x = x + 0 * sum(p.sum() for p in block.parameters())  # zero gradients: DDP waits for them
                continue
            x, a = block(x, biases[l % len(biases)])
            layers.append(a[:, self.prefix :])
        return self.norm(x), layers


def attention_mask(bias, valid, near, prefix):
    """Forbids attention to padding, not valid (B, T), and beyond a window, not near (T, T), on top of a bias
    (broadcast to B, heads, T, T; None: the result is bool, True = attends). In a window no position attends
    to the prefix, which attends to all; a query that attends to nothing gets 0."""
    allowed = True
    if valid is not None:
        allowed = F.pad(valid, (prefix, 0), value=True)[:, None, None, :]  # (B, 1, 1, prefix + T)
    if near is not None:
        near = F.pad(near, (prefix, 0), value=False)
        allowed = allowed & F.pad(near, (0, 0, prefix, 0), value=True)
    return allowed if bias is None else bias.masked_fill(~allowed, -math.inf)


def neighbours(grid, window, device):
    """(T, T) bool: are two positions of a grid, (T,) or (H, W), at most `window` apart in every direction?"""
    places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).reshape(-1, len(grid))
    return (places[:, None] - places[None]).abs().amax(-1) <= window


# ---- embedders -------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Images to patches (a strided convolution), a class token, relative positions as attention biases.

    grid         (H, W) in patches of `patch` x `patch` pixels
    relative     bias table (BEiT): (2H - 1)(2W - 1) + 3 rows with a value per head; the last three rows:
                 class token -> patch, patch -> class token, class token -> class token
    tables       0: all blocks share one table (rows, heads); L: each block has its own, (L, rows, heads)
    learned_std  > 0 adds a learned absolute position to each patch, of this initial std (not in the paper)
    """

    prefix, mask_token = 1, True

    def __init__(self, grid, patch, dim, heads, relative=True, learned_std=0.0, tables=0):
        super().__init__()
        self.grid = height, width = grid
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(dim))
        self.learned = nn.Parameter(learned_std * torch.randn(height * width, dim)) if learned_std else None
        rows = (2 * height - 1) * (2 * width - 1) + 3
        shape = (tables, rows, heads) if tables else (rows, heads)
        self.table = nn.Parameter(torch.zeros(shape)) if relative else None
        if relative:  # follows from the grid, so it is neither averaged nor saved
            self.register_buffer("index", relative_index(height, width), persistent=False)

    def forward(self, images, lengths=None):
        """images (B, 3, H * patch, W * patch) float, normalised -> (B, T, D), patches in row-major order."""
        return rearrange(self.proj(images), "b d h w -> b (h w) d"), None

    def add_positions(self, x, valid=None):
        if self.learned is not None:
            x = x + self.learned.to(x.dtype)
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        if self.table is None:
            return x, [None]
        tables = self.table if self.table.ndim == 3 else self.table[None]
        return x, [rearrange(F.embedding(self.index, table), "i j h -> 1 h i j") for table in tables]


def relative_index(height, width):
    """Row of the bias table for each (query, key): (1 + H * W, 1 + H * W) int64, the class token first."""
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    dy, dx = (place[:, None] - place[None]).unbind(-1)  # query minus key
    rows = (2 * height - 1) * (2 * width - 1)
    index = torch.full((1 + height * width, 1 + height * width), rows + 1)  # patch -> class token
    index[0, :] = rows  # class token -> patch
    index[0, 0] = rows + 2
    index[1:, 1:] = (dy + height - 1) * (2 * width - 1) + dx + width - 1
    return index


class WaveEmbed(nn.Module):
    """Waveforms to frames (strided convolutions, no padding); positions from a stack of wide convolutions.

    convs    (channels, kernel, stride) of each layer: convolution without bias, LayerNorm over channels, GELU
    kernel   of each of the pos_depth position convolutions, which have `groups` groups
    """

    prefix, mask_token, grid = 0, True, None

    def __init__(self, convs, dim, kernel, pos_depth, groups, dropout, eps):
        super().__init__()
        widths = [1] + [channels for channels, _, _ in convs]
        layers = [nn.Conv1d(w, c, k, stride, bias=False) for w, (c, k, stride) in zip(widths, convs)]
        self.content = nn.ModuleDict({"convs": nn.ModuleList(layers)})
        self.content["norms"] = nn.ModuleList(nn.LayerNorm(channels) for channels in widths[1:])
        self.content["norm"] = nn.LayerNorm(widths[-1], eps=eps)
        self.content["proj"] = nn.Linear(widths[-1], dim)
        stack = (nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(pos_depth))
        self.positions = nn.ModuleList(stack)
        self.norm, self.dropout = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)

    def frames(self, samples):
        """Frames from this many samples (int or Tensor): floor((n - kernel) / stride + 1) per layer."""
        for conv in self.content["convs"]:
            samples = (samples - conv.kernel_size[0]) // conv.stride[0] + 1
        return samples

    def forward(self, waves, lengths=None):
        """waves (B, N) float, normalised; lengths (B,) in samples, None: no padding -> (B, T, D), valid."""
        x = waves[..., None]  # (B, N, C)
        for conv, norm in zip(self.content["convs"], self.content["norms"]):
            x = gelu(norm(convolve(conv, x)))
        x = self.content["proj"](self.content["norm"](x))
        if lengths is None:
            return x, None
        return x, torch.arange(x.shape[1], device=x.device) < self.frames(lengths)[:, None]

    def add_positions(self, x, valid=None):
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)  # padding is zeroed once, as in fairseq
        return self.dropout(self.norm(x + self.position(x))), [None]

    def position(self, x):
        for conv in self.positions:
            y = convolve(conv, x)[:, : x.shape[1]]  # an even kernel gives one too many
            x = gelu(F.layer_norm(y, y.shape[-1:]))
        return x


def convolve(conv, x):
    """A Conv1d of x (B, T, C) -> (B, T', C'). In two dimensions torch need not copy x to have T last."""
    stride, padding = (1, *conv.stride), (0, *conv.padding)
    y = F.conv2d(x.mT[:, :, None], conv.weight[:, :, None], conv.bias, stride, padding, groups=conv.groups)
    return y[:, :, 0].mT


def gelu(x):
    """F.gelu of (B, T, D). On a CPU in float32, torch's kernel for contiguous tensors is off by 1e-5."""
    return F.gelu(x.mT).mT if x.is_cpu and x.dtype == torch.float32 else F.gelu(x)


class TokenEmbed(nn.Module):
    """Token ids to vectors; learned positions, counted from pad + 1 over real tokens; LayerNorm (RoBERTa)."""

    prefix, mask_token, grid = 0, False, None

    def __init__(self, vocab, max_tokens, pad, dim, dropout, eps):
        super().__init__()
        self.pad = pad
        self.tokens = nn.Embedding(vocab, dim, padding_idx=pad)
        self.positions = nn.Embedding(max_tokens + pad + 1, dim, padding_idx=pad)
        self.norm, self.dropout = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)

    def forward(self, ids, lengths=None):
        """ids (B, T) int64, T at most max_tokens -> token vectors (B, T, D), valid (B, T)."""
        return self.tokens(ids), ids != self.pad

    def add_positions(self, x, valid):
        x = x + self.positions(valid.cumsum(1) * valid + self.pad)
        return self.dropout(self.norm(x)).masked_fill(~valid[..., None], 0), [None]


def init_vision(module, std=0.02):
    """Truncated normal weights, zero biases; output projections of block l = 1 .. L divided by sqrt(2 l)."""
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


def init_post_norm(encoder, std=0.02, deep_norm=False):
    """BERT's normal(std) (0: 1 / sqrt(inputs)), zero biases; or DeepNorm's Xavier, gain 1 for q and k."""
    gain = (8 * len(encoder.blocks)) ** -0.25
    for block in encoder.blocks:
        for linear in (block.attn.qkv, block.attn.out, block.fc1, block.fc2):
            nn.init.normal_(linear.weight, std=std or linear.in_features**-0.5)
            if deep_norm:
                nn.init.xavier_normal_(linear.weight, gain)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if deep_norm:
            for part, part_gain in zip(block.attn.qkv.weight.data.chunk(3), (1.0, 1.0, gain)):
                nn.init.xavier_normal_(part, part_gain)


class Student(nn.Module):
    """The encoder that learns, and the head that maps its features to predictions of the targets."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input, mask, lengths=None):
        """input, mask (B, T) -> f (M, D) at masked positions, unmasked content x (B, T, D), valid."""
        x, valid = self.encoder.embed(input, lengths)
        features, _ = self.encoder.transform(x, mask, valid)
        return self.head(features[:, self.encoder.prefix :][mask]), x.detach(), valid


class Teacher(nn.Module):
    """An exponential moving average of the student's encoder: a copy at the start, no gradient, always eval.

    shared  names of submodules, such as "embed", that have the student's current weights instead
    window  > 0 limits the teacher's attention (ablation of the target's context), never the student's
    """

    def __init__(self, encoder, shared=(), window=0):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False)
        self.shared, self.window = tuple(f"{name}." for name in shared), window
        self.train(False)

    def train(self, mode=True):  # always eval
        return super().train(False)

    @torch.no_grad()
    def update(self, encoder, tau):
        """delta = tau * delta + (1 - tau) * theta, in float32, after each optimiser step.
        Shared modules (and integer buffers, if any) are copied instead."""
        delta, theta = self.encoder.state_dict(), encoder.state_dict()
        average = [n for n, t in delta.items() if t.is_floating_point() and not n.startswith(self.shared)]
        if tau < 1:
            torch._foreach_lerp_([delta[n] for n in average], [theta[n].float() for n in average], 1 - tau)
        for n in delta.keys() - set(average):
            delta[n].copy_(theta[n])

    @torch.no_grad()
    def forward(self, input, lengths=None):
        """The full, unmasked input -> [a_1 .. a_L], (B, T, D) each."""
        return self.encoder(input, None, lengths, self.window)[1]

    @torch.no_grad()
    def from_embedded(self, x, valid=None):
        """As forward, from the student's content x (B, T, D) on: speech's convolutions run once per step."""
        return self.encoder.transform(x, None, valid, self.window)[1]
