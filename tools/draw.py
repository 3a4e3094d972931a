"""What a pre-trained network sees: python -m tools.draw CKPT INPUT... --out picture.png (needs matplotlib)

INPUT: image, recording, line of text, .txt file of lines, or folder; masks are drawn as in training. Features are
means of the normalised top K layers: the teacher's of the whole input, which are the targets, and the student's of
the masked one; their colours are principal components. Cosines are of prediction and target.
"""

import os
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import common
from data import audio, images, text
from targets import top_k_average
from tools import embed, plot

DRAWN, COMPARED, GREY = 5, 200, 0.6  # inputs; lines of text, for the nearest tokens; colour of what is hidden
SAME = ("patch", "image_size", "max_tokens")  # of networks side by side
LOOK = {"font.size": 8, "axes.titlesize": 8, "text.parse_math": False, "image.interpolation": "nearest"}


def prepare(network, source, rng):
    """-> x, seen: the input, and what the student gets; mask (1, T): batches of one. Raises as embed.read."""
    kind, cfg, words = network.kind, network.cfg, network.words
    draw_mask = embed.SCRIPTS[kind].draw_mask
    if kind == "text":
        ids = np.array([text.BOS, *words.encode(source)[: cfg.max_tokens - 2], text.EOS])
        x, seen, mask = (part[None] for part in (torch.from_numpy(ids), *draw_mask(cfg, words, ids, rng)))
    else:
        longest = round(cfg.max_seconds * audio.RATE) if kind == "speech" else None
        x = seen = embed.read(source, kind, cfg, None)[None, :longest]
        mask = draw_mask(cfg, torch.tensor([x.shape[1]]), rng) if longest else draw_mask(cfg, rng)[None]
    return SimpleNamespace(x=x, seen=seen, mask=mask)


@torch.no_grad()
def look(network, row):
    """-> own, the student's features, and y, the targets (T, D); f, predictions (M, D); cosine (T,), or nan."""
    student, teacher, cfg, mask = network.student, network.teacher, network.cfg, row.mask[0]
    f, content, _ = student(row.seen, row.mask)
    layers = teacher.from_embedded(content) if network.kind == "speech" else teacher(row.x)
    both = student.encoder(row.seen, row.mask)[1], layers
    own, y = (top_k_average(part, cfg.top_k, cfg.norm, cfg.final_norm)[0] for part in both)
    cosine = torch.full(mask.shape, torch.nan)
    cosine[mask] = F.cosine_similarity(f, y[mask], dim=-1)
    return SimpleNamespace(own=own, y=y, f=f, cosine=cosine, mean=f"{cosine.nanmean():.2f}")


def color(looks):
    """Adds rgb (2, T, 3), of own and y: three principal components of all these, 4 std from 0 to 1."""
    x = torch.cat([part for look in looks for part in (look.own, look.y)])
    x = F.pad(torch.linalg.svd(x - x.mean(0), full_matrices=False)[0], (0, 2))[:, :3]
    x = (0.5 + x / (4 * x.std(0) + 1e-9)).clamp(0, 1).split([2 * len(look.y) for look in looks])
    for look, rgb in zip(looks, x):
        look.rgb = rgb.unflatten(0, (2, -1))


def draw_vision(figure, rows, networks):
    grid, columns = networks[0].student.encoder.embed.grid, 2 + 3 * len(networks)
    figure.set_size_inches(1.1 * columns + 0.5, 1.25 * len(rows) + 0.3)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, panels):
        pixels = ((row.x[0] * images.STD + images.MEAN) / 255).clamp(0, 1)
        visible = F.interpolate(1.0 - row.mask.view(1, 1, *grid).float(), pixels.shape[1:])[0] > 0
        shown = [("input", pixels.permute(1, 2, 0)), ("mask", pixels.where(visible, GREY).permute(1, 2, 0))]
        for network, seen in zip(networks, row.looks):
            titles = "student", f"{network.name}\nteacher", f"cosine {seen.mean}"
            shown += zip(titles, [*seen.rgb.view(2, *grid, 3), seen.cosine.view(grid)])
        for panel, (title, values) in zip(line, shown):
            drawn = panel.imshow(values, vmin=0, vmax=1)
            title = title if row is rows[0] or values.ndim == 2 else ""
            panel.set(xticks=[], yticks=[], facecolor="0.85", title=title)
    figure.colorbar(drawn, ax=panels, aspect=40, pad=0.01)


def draw_speech(figure, rows, networks):
    strips = ["hidden", *(f"{part}, {n.name}" for n in networks for part in ("student", "teacher"))]
    figure.set_size_inches(9, (2.6 + 0.15 * len(strips)) * len(rows))
    panels = figure.subplots(3 * len(rows), 1, height_ratios=[3, 3, len(strips) / 2] * len(rows))
    for row, (top, middle, bottom) in zip(rows, panels.reshape(-1, 3)):
        mask, end = row.mask[0], row.x.shape[1] / audio.RATE
        time = (torch.arange(len(mask)) * audio.STRIDE + audio.MIN_SAMPLES / 2) / audio.RATE  # middles
        power = np.log(np.abs(np.fft.rfft(row.x[0].unfold(0, 400, 160) * np.hanning(400))).T + 1e-5)
        place = {"origin": "lower", "aspect": "auto", "extent": (0, end, 0, audio.RATE / 2000)}
        top.imshow(power, "magma", vmin=power.max() - 8, **place)
        top.set(title=row.name, ylabel="kHz", xticks=[])
        middle.fill_between(time, -0.2, 1, where=mask, step="mid", color="0.9")
        for network, seen in zip(networks, row.looks):
            middle.plot(time, seen.cosine, ".-", markersize=3, label=f"{network.name}, mean {seen.mean}")
        middle.set(ylabel="cosine", xlim=(0, end), ylim=(-0.2, 1), xticks=[])
        middle.legend(loc="lower right", ncols=len(networks))
        colors = [torch.where(mask, GREY, 1.0).expand(3, -1).T[None], *(seen.rgb for seen in row.looks)]
        place = {"aspect": "auto", "extent": (time[0] - 0.01, time[-1] + 0.01, len(strips) - 0.5, -0.5)}
        bottom.imshow(torch.cat(colors), **place)
        bottom.set(yticks=range(len(strips)), yticklabels=strips, xlim=(0, end), xlabel="seconds")


def draw_text(figure, rows, networks):
    """Nearest: tokens at the positions, in all lines given, whose targets have the largest cosine with f."""
    names = {i: repr(piece.decode(errors="replace"))[1:-1] for piece, i in networks[0].words.pieces.items()}
    names |= {i: name for name, i in networks[0].words.special.items()}
    names, page = {i: name.replace(" ", "·") for i, name in names.items()}, []
    ids = torch.cat([row.x[0] for row in rows])
    banks = [F.normalize(torch.cat([look.y for look in looks])) for looks in zip(*(r.looks for r in rows))]
    for row in rows[:DRAWN]:
        pairs = [
            (names[i], names[j], hidden)
            for i, j, hidden in zip(*(p[0].tolist() for p in (row.x, row.seen, row.mask)))
        ]
        line = "".join(f"[{name}]" if hidden else name for name, _, hidden in pairs)
        page += [*textwrap.wrap(line.replace("[·", "·[").replace("·", " "), 28 + 40 * len(networks)), ""]
        table = [f"{'hidden':14}{'student gets':14}"]
        table += [f"{name:14}{other:14}" for name, other, hidden in pairs if hidden]
        for network, seen, bank in zip(networks, row.looks, banks):
            cells = [f"{network.name}: mean {seen.mean}, nearest of {len(ids)}"]
            order = (F.normalize(seen.f) @ bank.T).argsort(dim=1, descending=True, stable=True)
            for cosine, found in zip(seen.cosine[row.mask[0]], ids[order].tolist()):
                cells += [f"{cosine:5.2f}  " + "  ".join(names[i] for i in [*dict.fromkeys(found)][:3])]
            table = [f"{line}{cell[:38]:40}" for line, cell in zip(table, cells)]
        page += [*table, "", ""]
    figure.set_size_inches(1.8 + 2.4 * len(networks), 0.15 * len(page))
    for n, line in enumerate(page, 1):
        figure.text(0.01, 1 - n / len(page), line, family="DejaVu Sans Mono", size=7)


def main():
    parser = common.Parser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="of pre-training")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help=f"the first {DRAWN} are drawn")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="picture, .png or .svg")
    parser.add_argument("--beside", metavar="CKPT", action="append", default=[], help="or random: untrained")
    parser.add_argument("--seed", type=int, default=0, help="of masks and random weights")
    args = parser.parse_args()
    networks = [embed.open_both(path, args.checkpoint, args.seed) for path in (args.checkpoint, *args.beside)]
    same = {(n.kind, n.words and n.words.spell(), *map(vars(n.cfg).get, SAME)) for n in networks}
    common.require(len(same) == 1, f"--beside: a network of other inputs than {args.checkpoint}")
    rows, found, kind = [], [], networks[0].kind
    for place in args.inputs:
        line = kind == "text" and not place.endswith(".txt") and not os.path.isdir(place)
        found += [("", place)] if line else embed.find(place, kind)
    found = [pair for pair in found if pair[1].strip()][: COMPARED if kind == "text" else DRAWN]
    common.require(found and args.seed >= 0, "nothing to draw: give an input, and a --seed of 0 or more")
    for i, (name, source) in enumerate(found):
        try:
            row = prepare(networks[0], source, np.random.default_rng([args.seed, i]))
        except (images.BadImage, *audio.AUDIO_ERRORS) as error:
            raise common.UserError(f"{name}: {error}") from None
        row.name, row.looks = Path(name).name, [look(network, row) for network in networks]
        rows.append(row)
    for looks in zip(*(row.looks for row in rows)):
        color(looks)
    with plot.figure(args.out, LOOK) as figure:
        {"vision": draw_vision, "speech": draw_speech, "text": draw_text}[kind](figure, rows, networks)
    print(f"{args.out}: {min(len(rows), DRAWN)} inputs, {', '.join(network.name for network in networks)}")


if __name__ == "__main__":
    common.run(main)
