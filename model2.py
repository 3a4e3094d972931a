"""data2vec 2.0's networks (Baevski et al., ICML 2023): M masks a sample, only what is visible is encoded.

    x = embed(input)                         (B, T, D)      once a sample
    h = encoder(x at its visible positions)  (B * M, V, D)  M masks a sample
    f = decoder(h, and noise elsewhere)      (N, D)         at the hidden positions
    a_1 .. a_L = encoder_ema(x)              (B, T, D)      once a sample, by model.Teacher

`mask` (B * M, T) is True at hidden positions, equally many in each row; rows b * M .. b * M + M - 1 belong to
sample b. Blocks are post-norm in all modalities, and a_l is what their FFN gives, before the residual.
"""

import copy
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import option, require
from model import Encoder, PatchEmbed, TokenEmbed, WaveEmbed, convolve, gelu


@dataclass
class Options2:
    """What 2.0 adds to the options of a train script."""

    masks: int = option(0, "> 0: data2vec 2.0, this many masks for one teacher pass; 0: data2vec", min_=0)
    mask_adjust: float = option(0.0, "2.0: added to the share of blocks, which overlap", min_=0, max_=1)
    prenet: int = option(0, "2.0: extra first layers, from which no targets are made", min_=0)
    decoder_depth: int = option(3, "2.0: convolutions that predict targets from encoded positions", min_=1)
    decoder_width: int = option(128, "2.0: channels of these convolutions", min_=1)
    decoder_groups: int = option(16, "2.0: their groups; must divide --dim and their channels", min_=1)
    decoder_kernel: int = 3  # presets alone set these
    decoder_dropout: float = 0.0


class Encoder2(Encoder):
    """The visible positions of each copy through `prenet` blocks, which give no target, and `depth` blocks.

    embed    Patches, Waves or Tokens: as in model.Encoder, but with
               embed.place(x, mask, valid) -> x with positions, (B, T, D) or (B * M, T, D)
    context  a LayerNorm before the blocks (images, speech; text only with prenet blocks)
    """

    def __init__(self, embed, dim, depth, *, prenet, context, eps, dropout, target="ffn", **block):
        block |= {"pre_norm": False, "eps": eps, "dropout": dropout, "target": target}
        super().__init__(embed, dim, depth, **block)
        self.mask_embedding = None  # hidden positions never enter
        norm = nn.LayerNorm(dim, eps=eps) if context else nn.Identity()
        blocks = (copy.deepcopy(self.blocks[min(l, depth - 1)]) for l in range(prenet))
        self.context = nn.ModuleDict({"norm": norm, "blocks": nn.ModuleList(blocks)})
        self.dropout = nn.Dropout(dropout[0] if context else 0.0)

    def transform(self, x, mask=None, valid=None, window=0):
        """Content x (B, T, D) -> features of visible positions (R, prefix + V, D), [a_1 .. a_L] (R, V, D);
        without a mask of all. The M copies of a sample share its content."""
        x = self.embed.place(x, mask, valid)
        places = torch.arange(x.shape[1], device=x.device)[None]  # (1 or B * M, V)
        if mask is not None:
            places = (~mask).nonzero()[:, 1].view(len(mask), -1)
            rows = torch.arange(len(mask), device=x.device)[:, None]
            x = x[rows * len(x) // len(mask), places]
            valid = valid if valid is None else valid[rows * len(valid) // len(mask), places]
        bias = self.embed.distance_bias(places) if isinstance(self.embed, Waves) else None
        if self.prefix:
            x = torch.cat([self.embed.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.dropout(self.context["norm"](x))
        return self.run_blocks(x, [bias], valid, window, self.context["blocks"])


class Decoder(nn.Module):
    """Convolutions over all positions: each Conv, LayerNorm, GELU, and with `residual` its input on top, if
    the widths agree; then one Linear or, of hidden > 0, two with a GELU between. grid: (H, W) of images."""

    def __init__(self, dim, width, depth, kernel, groups, grid=None, residual=True, hidden=0):
        super().__init__()
        self.grid, self.residual, conv = grid, residual, nn.Conv2d if grid else nn.Conv1d
        widths = [dim] + [width] * (depth - 1)
        self.convs = nn.ModuleList(conv(w, width, kernel, padding=kernel // 2, groups=groups) for w in widths)
        wide = (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim)) if hidden else ()
        self.head = nn.Sequential(*wide) if hidden else nn.Linear(width, dim)

    def forward(self, x):
        """x (R, T, D) -> (R, T, D)."""
        for conv in self.convs:
            if self.grid:
                height, width = self.grid
                y = conv(x.unflatten(1, self.grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                y = y[:, :height, :width].flatten(1, 2)
            else:
                y = convolve(conv, x)[:, : x.shape[1]]  # an even kernel gives one too many
            y = gelu(F.layer_norm(y, y.shape[-1:]))
            x = x + y if self.residual and y.shape == x.shape else y
        return self.head(x)


class Student2(nn.Module):
    """The encoder that learns, and the decoder that predicts the targets at hidden positions.

    After forward(), `cls` (B * M, D) is the last layer of the class token (images; None: there is none)."""

    def __init__(self, encoder, decoder, dropout=0.0, noise=0.01):
        super().__init__()
        self.encoder, self.head, self.dropout, self.noise = encoder, decoder, nn.Dropout(dropout), noise

    def forward(self, input, mask, lengths=None):
        """input, mask (B * M, T) -> f (N, D) at hidden positions, content x (B, T, D), valid."""
        x, valid = self.encoder.embed(input, lengths)
        noise = self.noise * noise_of(mask, len(x), self.encoder.dim)
        h, _ = self.encoder.transform(x, mask, valid)
        self.cls = h[:, 0] if self.encoder.prefix else None
        y = noise.to(h.dtype)
        y[~mask] = self.dropout(h[:, self.encoder.prefix :]).flatten(0, 1)
        return self.head(y)[mask], x.detach(), valid


def noise_of(mask, samples, dim):
    """Standard normal (B * M, T, D), a function of each sample's masks (M, T), which are new at each step: so
    any number of processes draw the same, and so does a step that is done again after an overflow."""
    generator, noise = torch.Generator(mask.device), []
    for part in mask.cpu().chunk(samples):
        generator.manual_seed(zlib.crc32(part.numpy().tobytes()))
        noise.append(torch.randn(*part.shape, dim, generator=generator, device=mask.device))
    return torch.cat(noise)


# ---- embedders -------------------------------------------------------------------------------------------


class Patches(PatchEmbed):
    """Fixed sine and cosine positions, added to the patches alone; the class token is the extra token."""

    def __init__(self, grid, patch, dim):
        super().__init__(grid, patch, dim, heads=0, relative=False)
        self.register_buffer("fixed", sin_cos(grid, dim), persistent=False)

    def place(self, x, mask, valid):
        return x + self.fixed.to(x.dtype)


def sin_cos(grid, dim):
    """(H * W, D) float32: the first half of the channels tells the column, the second the row."""
    frequencies = 10_000 ** (-torch.arange(dim // 4) / (dim // 4))
    row, column = torch.cartesian_prod(*(torch.arange(float(n)) for n in grid)).unbind(-1)
    angles = [place[:, None] * frequencies for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


class Waves(WaveEmbed):
    """Position convolutions hear zeros at hidden steps; attention prefers the near, by a gain a head."""

    def __init__(self, convs, dim, kernel, pos_depth, groups, heads, eps):
        super().__init__(convs, dim, kernel, pos_depth, groups, dropout=0.0, eps=eps)
        self.norm = None  # the encoder's context norm comes instead
        self.gain = nn.Parameter(torch.ones(heads))
        self.register_buffer("slopes", torch.tensor(slopes(heads)), persistent=False)

    def place(self, x, mask, valid):
        x = x if valid is None else x.masked_fill(~valid[..., None], 0)
        if mask is None:
            return x + self.position(x)
        x = x.repeat_interleave(len(mask) // len(x), dim=0)
        return x + self.position(x.masked_fill(mask[..., None], 0))

    def distance_bias(self, places):
        """places (R, V): where the steps were -> (R, heads, V, V), -slope * distance * gain (ALiBi)."""
        distance = (places[:, None, :, None] - places[:, None, None, :]).abs()
        return -distance * (self.slopes * self.gain.clamp_min(0))[:, None, None]


def slopes(heads):
    """Of the distance bias: 2^(-8 h / H) for h = 1 .. H, a power of two; else those of the next smaller one,
    followed by every other slope of twice as many heads."""
    power = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return first if power == heads else first + slopes(2 * power)[::2][: heads - power]


class Tokens(TokenEmbed):
    """Content with positions, norm and dropout: the teacher sees the very same."""

    def forward(self, ids, lengths=None):
        x, valid = super().forward(ids)
        return super().add_positions(x, valid)[0], valid

    def place(self, x, mask, valid):
        return x


def init_weights(student, std=0.02):
    """Normal(std) in Linear and Embedding, zero biases; torch's own in convolutions and the decoder's last
    Linear (unless it has two) and speech's projection; Xavier for patches, Kaiming for waves."""
    embed, head = student.encoder.embed, student.head.head
    own = [head] if isinstance(head, nn.Linear) else []
    own += [embed.content["proj"]] if isinstance(embed, Waves) else []
    for m in student.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)) and m not in own:
            nn.init.normal_(m.weight, std=std)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)
            if isinstance(m, nn.Embedding):
                m.weight.data[m.padding_idx] = 0
    if isinstance(embed, Patches):
        nn.init.xavier_uniform_(embed.proj.weight.data.flatten(1))
        nn.init.normal_(embed.cls)
    elif isinstance(embed, Waves):
        for conv in embed.content["convs"]:
            nn.init.kaiming_normal_(conv.weight)


def build(cfg, embed, layer_drop=0.0, drop_path=0.0, context=True, residual=True, hidden=0):
    """The student of these options, with random weights."""
    widths = f"--decoder_groups {cfg.decoder_groups}: must divide --dim and --decoder_width"
    require(cfg.dim % cfg.decoder_groups == cfg.decoder_width % cfg.decoder_groups == 0, widths)
    require(not embed.grid or cfg.dim % 4 == 0, f"--dim {cfg.dim}: must be a multiple of 4 (positions)")
    for name, value in (("pad", False), ("objective", "data2vec"), ("deep_norm", False)):
        require(getattr(cfg, name, value) == value, f"--{name}: not with --masks, which is data2vec 2.0")
    options = {"heads": cfg.heads, "ffn": cfg.ffn, "target": cfg.target, "eps": cfg.norm_eps}
    options |= {"prenet": cfg.prenet, "context": context}
    options["dropout"] = (cfg.dropout, cfg.attn_dropout, getattr(cfg, "ffn_dropout", 0.0))
    encoder = Encoder2(embed, cfg.dim, cfg.depth, layer_drop=layer_drop, drop_path=drop_path, **options)
    sizes = cfg.decoder_width, cfg.decoder_depth, cfg.decoder_kernel, cfg.decoder_groups
    student = Student2(encoder, Decoder(cfg.dim, *sizes, embed.grid, residual, hidden), cfg.decoder_dropout)
    init_weights(student)
    return student


def groups(cfg, student):
    """What the optimiser gets: 1.0 decays all weights, 2.0 spares 1-D ones (released: meant, not done)."""
    if not cfg.masks:
        return student.parameters()
    parts = [[p for p in student.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    return [{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}]
