"""What a pre-trained network sees: python -m tools.draw CKPT INPUT... --out picture.png (needs matplotlib)

INPUT: image, recording, line of text, .txt file of lines, or folder. Features are means of the top K layers,
normalised: of the teacher for the whole input (the targets), of the student for the masked one; their colours
are principal components (2.0: of what is visible). Cosines are of predictions and targets; text: nearest are
the tokens whose targets, in all lines given (its own, too), are nearest to the prediction.
"""

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

DRAWN, COMPARED, GREY = 4, 200, 0.6  # inputs; lines of text, for the nearest tokens; colour of what is hidden


def prepare(network, source, rng):
    """-> x, seen: the input, and what the student gets; mask (1, T): batches of one. Raises as embed.read."""
    kind, cfg, draw_mask = network.kind, network.cfg, embed.SCRIPTS[network.kind].draw_mask
    if kind == "text":
        ids = np.array([text.BOS, *network.words.encode(source)[: cfg.max_tokens - 2], text.EOS])
        seen, mask = draw_mask(cfg, network.words, ids, rng)
        mask = mask.view(-1, len(ids))[:1]  # 2.0 draws several masks, and changes no token
        seen = seen.masked_fill(mask[0], network.words.mask) if cfg.masks else seen
        return SimpleNamespace(x=torch.from_numpy(ids)[None], seen=seen[None], mask=mask)
    longest = round(cfg.max_seconds * audio.RATE) if kind == "speech" else None
    x = embed.read(source, kind, cfg, None)[None, :longest]
    mask = draw_mask(cfg, torch.tensor([x.shape[1]]), rng) if longest else draw_mask(cfg, rng)
    return SimpleNamespace(x=x, seen=x, mask=mask.view(-1, mask.shape[-1])[:1], name=Path(source).name)


@torch.no_grad()
def look(network, rows):
    """-> for each row own, the student's features, y, targets (T, D), rgb of both; f (M, D); cosine (T,).
    2.0: own (T - M, D), of what is visible."""
    student, teacher, cfg, looks = network.student, network.teacher, network.cfg, []
    for row in rows:
        f, content, _ = student(row.seen, row.mask)
        layers = teacher.from_embedded(content) if network.kind == "speech" else teacher(row.x)
        both = student.encoder(row.seen, row.mask)[1], layers
        own, y = (top_k_average(part, cfg.top_k, cfg.norm, cfg.final_norm)[0] for part in both)
        cosine = torch.full(y.shape[:1], torch.nan)
        cosine[row.mask[0]] = F.cosine_similarity(f, y[row.mask[0]], dim=-1)
        looks.append(SimpleNamespace(own=own, y=y, f=f, cosine=cosine, mean=f"{cosine.nanmean():.2f}"))
    x = torch.cat([part for one in looks for part in (one.own, one.y)])
    x = F.pad(torch.linalg.svd(x - x.mean(0), full_matrices=False)[0], (0, 2))[:, :3]  # in one basis
    x = (0.5 + x / (4 * x.std(0) + 1e-9)).clamp(0, 1)
    parts = iter(x.split([len(part) for one in looks for part in (one.own, one.y)]))
    for one in looks:
        one.rgb = torch.full((2, len(one.y), 3), GREY)
        shown = torch.ones(len(one.y), dtype=bool) if len(one.own) == len(one.y) else one.cosine.isnan()
        one.rgb[0, shown], one.rgb[1] = next(parts), next(parts)
    return looks


def draw_vision(figure, rows, networks, looks):
    grid, columns = networks[0].student.encoder.embed.grid, 2 + 3 * len(networks)
    figure.set_size_inches(1.1 * columns + 0.5, 1.25 * len(rows) + 0.3)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for row, line, ones in zip(rows, panels, zip(*looks)):
        pixels = ((row.x[0] * images.STD + images.MEAN) / 255).clamp(0, 1)
        visible = F.interpolate(1.0 - row.mask.view(1, 1, *grid).float(), pixels.shape[1:])[0] > 0
        shown = [("input", pixels.permute(1, 2, 0)), ("mask", pixels.where(visible, GREY).permute(1, 2, 0))]
        for network, one in zip(networks, ones):
            titles = "student", f"{network.name}\nteacher", f"cosine {one.mean}"
            shown += zip(titles, [*one.rgb.view(2, *grid, 3), one.cosine.view(grid)])
        for panel, (title, values) in zip(line, shown):
            drawn = panel.imshow(values.numpy(), vmin=0, vmax=1)
            panel.set_title(title, fontsize=8)
            panel.set(xticks=[], yticks=[], facecolor="0.85")
    figure.colorbar(drawn, ax=panels, aspect=40, pad=0.01)


def draw_speech(figure, rows, networks, looks):
    strips = [f"{part}, {network.name}" for network in networks for part in ("student", "teacher")]
    figure.set_size_inches(9, (2.8 + 0.15 * len(strips)) * len(rows))
    panels = figure.subplots(3 * len(rows), 1, height_ratios=[3, 3, len(strips) / 2] * len(rows))
    for row, (top, middle, bottom), ones in zip(rows, panels.reshape(-1, 3), zip(*looks)):
        mask, end = row.mask[0], row.x.shape[1] / audio.RATE
        time = (torch.arange(len(mask)) * audio.STRIDE + audio.MIN_SAMPLES / 2) / audio.RATE  # middles
        power = np.log(np.abs(np.fft.rfft(row.x[0].unfold(0, 400, 160).numpy() * np.hanning(400))).T + 1e-5)
        top.imshow(power, "magma", vmin=power.max() - 8, origin="lower", aspect="auto", extent=(0, end, 0, 8))
        top.set(title=row.name, ylabel="kHz", xticks=[])
        middle.fill_between(time, -1, 1, where=mask, step="mid", color="0.9", label="hidden")
        for network, one in zip(networks, ones):
            middle.plot(time, one.cosine, ".-", markersize=3, label=f"{network.name}, mean {one.mean}")
        middle.set(ylabel="cosine", xlim=(0, end), ylim=(-1, 1), xticks=[])
        middle.legend(loc="lower left", bbox_to_anchor=(0, 0.96), ncols=len(networks) + 1)
        rgb = torch.cat([one.rgb for one in ones]).numpy()
        bottom.imshow(rgb, aspect="auto", extent=(0, len(mask) / 50, len(strips), 0))
        bottom.set(yticks=np.arange(len(strips)) + 0.5, yticklabels=strips, xlim=(0, end), xlabel="seconds")


def draw_text(figure, rows, networks, looks):
    pieces, special = networks[0].words.pieces.items(), networks[0].words.special.items()
    names = {i: repr(piece.decode(errors="replace"))[1:-1].replace(" ", "·") for piece, i in pieces}
    names, page = names | {i: name for name, i in special}, []
    ids, banks = torch.cat([row.x[0] for row in rows]), [torch.cat([one.y for one in part]) for part in looks]
    for row, ones in zip(rows[:DRAWN], zip(*looks)):
        x, seen, mask = row.x[0].tolist(), row.seen[0].tolist(), row.mask[0]
        line = "".join(f"[{names[i]}]" if hidden else names[i] for i, hidden in zip(x, mask))
        line = line.replace("[·", "·[").replace("·", " ")
        page += ["", *textwrap.wrap(line, 28 + 40 * len(networks)), ""]
        hidden = mask.nonzero()[:, 0].tolist()
        table = [f"{'hidden':14}{'seen':14}", *(f"{names[x[t]]:14}{names[seen[t]]:14}" for t in hidden)]
        for network, one, bank in zip(networks, ones, banks):
            cells = [f"{network.name}: mean {one.mean}, nearest of {len(ids)}"]
            order = (F.normalize(one.f) @ F.normalize(bank).T).argsort(dim=1, descending=True, stable=True)
            for cosine, found in zip(one.cosine[mask], ids[order].tolist()):
                cells += [f"{cosine:5.2f}  " + "  ".join(names[i] for i in [*dict.fromkeys(found)][:3])]
            table = [f"{line}{cell[:38]:40}" for line, cell in zip(table, cells)]
        page += [*table, ""]
    figure.text(0, 1, "\n".join(page), family="DejaVu Sans Mono", size=7, va="top")


def main():
    parser = common.Parser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="of pre-training")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help=f"the first {DRAWN} are drawn")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="picture, .png or .svg")
    parser.add_argument("--beside", action="append", default=[], choices=["random"], help="untrained")
    parser.add_argument("--seed", type=int, default=0, help="of masks and random weights")
    args = parser.parse_args()
    networks = [embed.open_both(args.checkpoint, weights, args.seed) for weights in ("trained", *args.beside)]
    kind = networks[0].kind
    found = [source for place in args.inputs for _, source in embed.find(place, kind) if source.strip()]
    found = found[: COMPARED if kind == "text" else DRAWN]
    common.require(found, f"{args.inputs[0]}: has no text")
    try:
        rows = [prepare(networks[0], x, np.random.default_rng([args.seed, i])) for i, x in enumerate(found)]
    except (images.BadImage, *audio.AUDIO_ERRORS) as error:
        raise common.UserError(f"{', '.join(found)}: {error}") from None
    looks = [look(network, rows) for network in networks]
    with plot.figure(args.out) as figure:
        {"vision": draw_vision, "speech": draw_speech, "text": draw_text}[kind](figure, rows, networks, looks)
    print(f"{args.out}: {min(len(rows), DRAWN)} inputs of {len(rows)}")


if __name__ == "__main__":
    common.run(main)
