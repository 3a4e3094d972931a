"""Fine-tune a pre-trained encoder on labelled images, evaluate it, or use it (paper section 5.1).

    python finetune.py --init runs/vision-smoke/ckpt.pt                                 # made images, laptop CPU
    python finetune.py --preset cifar10 --data DIR --init CKPT --label_fraction 0.1      # 10 % of the labels
    python finetune.py --preset cifar10 --data DIR --init none                           # the same, from scratch
    torchrun --nproc_per_node=8 finetune.py --preset base --data DIR --init CKPT         # ImageNet-1K
    python finetune.py --init runs/finetune-cifar10/best.pt --predict a.jpg b.png        # what is in these pictures?
"""

import contextlib
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
import train_vision
from common import BadInput, option
from data import images
from model import Classifier, vision_encoder
from tools import convert


@dataclass
class Config:
    preset: str = option("smoke", "named set of values for the options below")
    # run
    data: str = option("", "folder with train/ and val/, each CLASS/*.jpg; empty: the made images of train_vision.py")
    out: str = option("", "folder of this run; a run that is there already is only continued, never overwritten")
    init: str = option("none", "checkpoint: pre-trained (ours or released) or fine-tuned; none: random weights of this preset's model")
    init_from: str = option("student", "which network of a pre-trained checkpoint to start from", ("student", "teacher"))
    resume: bool = option(False, "continue the run in --out from its ckpt.pt")
    eval_only: bool = option(False, "only evaluate the fine-tuned --init on val/")
    predict: list = option([], "pictures to classify with the fine-tuned --init; nothing is trained or written")
    label_fraction: float = option(1.0, "share of train/ to use, the same images for every run of a seed, at least one a class")
    steps: int = option(500, "optimiser steps")
    global_batch: int = option(64, "images a step, whatever the number of processes")
    micro_batch: int = option(0, "most images a process holds at once; 0: no limit")
    seed: int = option(0, "seed of the head, subset, order and augmentation")
    device: str = option("auto", "auto takes the GPU if there is one", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "autocast; auto is bfloat16 where the hardware has it", ("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile the encoder")
    workers: int = option(2, "data-loading processes for each training process")
    log_every: int = option(10, "steps between metric lines")
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    probe_every: int = option(100, "steps between evaluations; the best is kept as best.pt; 0: only at the end")
    image_size: int = option(0, "pixels; 0: as pre-trained. Another size interpolates the positions")
    # optimiser
    lr: float = option(1e-3, "peak learning rate of the head; the layers below it follow by layer_decay")
    layer_decay: float = option(0.75, "each layer below the top learns this much slower; 1: all alike (from scratch)")
    min_lr: float = option(1e-6, "learning rate at the last step")
    warmup: int = option(50, "steps of linear warm-up, at most --steps")
    weight_decay: float = option(0.05, "on matrices only")
    clip: float = option(0.0, "largest gradient norm; 0: no clipping")
    # regularisers
    drop_path: float = option(0.1, "stochastic depth, rising linearly to this at the last layer")
    dropout: float = option(0.0, "dropout on both branches of a block")
    attn_dropout: float = option(0.0, "dropout on the attention weights")
    smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "Beta parameter of mixup; 0: off")
    cutmix: float = option(0.0, "Beta parameter of cutmix; 0: off. With both on, a coin decides for each batch")
    erasing: float = option(0.0, "probability to erase a random rectangle")
    rand_augment: float = option(0.0, "magnitude of RandAugment, two operations, std 0.5; 0: colour jitter instead")
    jitter: float = option(0.4, "brightness, contrast and saturation change by up to this")
    crop_min: float = option(0.4, "smallest area of the random crop, as a share of the image")


IMAGENET = dict(
    global_batch=1024, micro_batch=128, workers=10, log_every=50, save_every=2500, probe_every=6255, warmup=12_510,
    smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.25, rand_augment=9.0, crop_min=0.08,
)  # fmt: skip
PRESETS = {
    # python finetune.py [--init runs/vision-smoke/ckpt.pt]: made images, 2 CPU cores, see README
    "smoke": dict(),
    # python finetune.py --preset cifar10 --data DIR: 2 CPU cores, see README
    "cifar10": dict(steps=500, probe_every=250, save_every=0, workers=1),
    # ViT-B, 100 epochs of 1251 steps; paper 84.2 top-1; not run here
    "base": IMAGENET | dict(steps=125_100, lr=4e-3, layer_decay=0.65, drop_path=0.2),
    # ViT-L, 50 epochs; paper 86.6 top-1; not run here
    "large": IMAGENET | dict(steps=62_550, lr=5e-3, layer_decay=0.65, drop_path=0.25),
}


def lr_at(step: int, cfg: Config) -> float:
    """Linear warm-up to lr, then cosine to min_lr at the last step. step = 1 .. steps."""
    warmup = min(cfg.warmup, cfg.steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    t = (step - warmup) / (cfg.steps - warmup)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * t))


def check(cfg: Config, world: int) -> int:
    """Refuses values that cannot work. Returns the number of micro-batches a step."""
    common.check_range(cfg, 1, math.inf, "steps global_batch log_every")
    common.check_range(cfg, 0, math.inf, "seed micro_batch workers save_every probe_every image_size warmup lr min_lr weight_decay clip mixup cutmix")  # fmt: skip
    common.check_range(cfg, 0, 1, "smoothing erasing jitter layer_decay")
    common.check_range(cfg, 0, 0.9999, "drop_path dropout attn_dropout")
    common.check_range(cfg, 0, 10, "rand_augment")
    common.check_range(cfg, 1e-9, 1, "label_fraction crop_min")
    if cfg.eval_only and cfg.resume:
        raise BadInput(f"--eval_only: writes a results.json of its own, and leaves the run in --out {cfg.out} alone; choose another --out, without --resume")
    count = math.ceil(cfg.global_batch / (world * (cfg.micro_batch or cfg.global_batch)))
    if cfg.global_batch % (world * count):
        raise BadInput(f"--global_batch {cfg.global_batch}: does not split into {world} processes x {count} micro-batches; take a multiple of {world * count}")  # fmt: skip
    return count


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="finetune")
    rank, world, device, autocast = common.start_processes(cfg.device, cfg.dtype)
    accumulation = check(cfg, world)
    torch.manual_seed(cfg.seed)
    if cfg.predict:
        return predict(cfg, device, autocast) if rank == 0 else None

    # ---- data: a subset of train/ by label_fraction, the same for every run of a seed
    train, val = images.open_folder(cfg.data) if cfg.data else images.made_images()
    if len(train.classes) < 2:
        raise BadInput(f"{cfg.data}: only one class in train/; fine-tuning needs at least two folders of classes")
    for part in (train, val):
        if -1 in part.labels:
            name = part.names[part.labels.index(-1)]
            raise BadInput(f"{name}: not in one of the {len(train.classes)} class folders of train/; move it or add the class")
    train = train.part(label_subset(train.labels, cfg.label_fraction, cfg.seed))
    stored = Path(cfg.out, "ckpt.pt")
    resuming = cfg.resume and stored.exists()
    classifier, state, size = build(replace(cfg, init=str(stored)) if resuming else cfg, train.classes)
    classifier.to(device)
    if cfg.eval_only and "classes" not in state:
        raise BadInput(f"--init {cfg.init}: not a fine-tuned checkpoint, so there is nothing to evaluate; fine-tune it first")

    # ---- optimiser: a layer learns layer_decay times as fast as the one above it (Bao et al. 2021)
    groups = {}  # of the model alone, so that a resumed run may have other values
    for name, p in classifier.named_parameters():
        layer = layer_of(name, len(classifier.encoder.blocks))
        decays = p.ndim > 1 and not name.endswith(("table", "learned"))
        groups.setdefault((layer, decays), []).append(p)
    values = [
        {"scale": cfg.layer_decay ** (len(classifier.encoder.blocks) + 1 - layer), "weight_decay": decays * cfg.weight_decay}
        for layer, decays in groups
    ]
    optimizer = torch.optim.AdamW([{"params": p} | v for p, v in zip(groups.values(), values)], lr=cfg.lr, fused=True)

    # ---- the run's folder, and what is already there
    folder = common.open_run(cfg.out, asdict(cfg), cfg.resume, rank)
    step, best, row, bad, named = 0, {"top1": -1.0}, {"seconds": 0.0}, set(), set()
    torch.manual_seed(cfg.seed * 1000 + rank)  # from here on for drop path and dropout, which differ between processes
    if resuming:
        grid = convert.patch_grid(state["config"])
        convert.load_into(classifier, state["student"], stored, grid, grid)  # strictly: this image size, these classes
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise BadInput(f"{stored}: its optimizer is of other options ({error})") from None
        for group, value in zip(optimizer.param_groups, values):
            group |= value  # this command's layer_decay and weight_decay, not the file's
        common.rng_state(device, restore=state["rng"][rank] if rank < len(state["rng"]) else None)
        step, best, row, bad = state["step"], state["best"], state["row"], set(state["bad"])
    metrics = common.open_metrics(folder, step) if rank == 0 else None
    if cfg.compile:
        classifier.encoder.compile()
    ddp = DistributedDataParallel(classifier) if world > 1 else classifier

    def augment(img, rng):
        img = images.flip(images.random_resized_crop(img, size, (cfg.crop_min, 1.0), (3 / 4, 4 / 3), rng), rng)
        if cfg.rand_augment:
            return images.rand_augment(img, 2, cfg.rand_augment, 0.5, rng)
        return images.color_jitter(img, cfg.jitter, rng)

    def load(views, keys):
        return DataLoader(views, batch_sampler=keys, collate_fn=images.collate, num_workers=cfg.workers,
                          pin_memory=device.type == "cuda", generator=torch.Generator())  # fmt: skip

    def evaluate() -> dict[str, float]:
        """top1 (and top5 from 10 classes up) on val/; every image is counted once, whatever the number of processes."""
        mine = range(rank, len(val), world)
        keys = [[(0, i) for i in mine[at : at + 250]] for at in range(0, len(mine), 250)]
        counts = torch.zeros(3, device=device, dtype=torch.float64)  # images, right at first, right among five
        classifier.eval()
        for view, _, labels, broken in load(images.Views(val, lambda img, rng: images.center_crop(img, size), 0, replace=False), keys):  # fmt: skip
            bad.update(broken)
            if not len(view):
                continue
            with torch.no_grad(), autocast:
                logits = classifier(images.normalise(view.to(device)))
            hit = logits.float().topk(min(5, logits.shape[1]), dim=1).indices == labels.to(device)[:, None]
            counts += torch.stack([torch.tensor(len(hit), device=device), hit[:, 0].sum(), hit.sum()])
        classifier.train()
        if world > 1:
            dist.all_reduce(counts)
        n, first, five = counts.tolist()
        if not n:
            raise BadInput(f"{cfg.data}: no picture of val/ could be decoded, for instance {next(iter(bad))}; check the folder")
        return {"top1": first / n} | ({"top5": five / n} if len(train.classes) >= 10 else {})

    if cfg.eval_only:
        scores = evaluate()
        if rank == 0:
            common.save(folder / "results.json", scores | {"peak_memory_gb": common.peak_memory_gb(device)})
            print(", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        return

    # ---- the loop
    keys = images.batches(len(train), cfg.seed, step, cfg.steps, cfg.global_batch, accumulation, world, rank)
    batches = iter(load(images.Views(train, augment, cfg.seed), keys))
    batches = itertools.chain([next(batches, None)], batches)  # if no picture can be read, say so before the bar
    bar = tqdm(total=cfg.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    started, mark, mark_step = time.time() - row["seconds"], time.time(), step
    while step < cfg.steps:
        step += 1
        lr = lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        loss = torch.zeros((), device=device)
        for i in range(accumulation):
            view, _, labels, broken = next(batches)
            bad.update(broken)
            rng = np.random.default_rng([cfg.seed, step, i * world + rank, 1])
            x, y = images.normalise(view.to(device)), F.one_hot(labels.to(device), len(train.classes)).float()
            x, y = mix(erase(x, cfg.erasing, rng), y, cfg, rng)
            with contextlib.nullcontext() if i == accumulation - 1 or world == 1 else ddp.no_sync():
                with autocast:
                    logits = ddp(x)
                share = F.cross_entropy(logits.float(), y, label_smoothing=cfg.smoothing) / accumulation
                share.backward()
            loss += share.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), cfg.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        bar.update()
        probe_now = step == cfg.steps or (cfg.probe_every and step % cfg.probe_every == 0)
        save_now = step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0)
        if not (probe_now or save_now or step == 1 or step % cfg.log_every == 0):
            continue
        if world > 1:
            dist.all_reduce(loss, dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.SUM)
            loss = loss if device.type == "cuda" else loss / world
        row = {"step": step, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item(), "seconds": time.time() - started}
        row["samples_per_s"] = (step - mark_step) * cfg.global_batch / (time.time() - mark)
        bar.set_postfix_str("loss {loss:.3f}, lr {lr:.1e}, {samples_per_s:.0f} images/s".format(**row))
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            bar.close()
            raise SystemExit(f"step {step}: the loss is not finite; try a smaller --lr or --dtype float32" if rank == 0 else 1)
        saved = {"student": classifier.state_dict(), "teacher": None, "config": state["config"], "classes": train.classes, "finetune": asdict(cfg)}
        if probe_now:
            row |= (scores := evaluate())
            if scores["top1"] > best["top1"]:
                best = scores | {"best_step": step}
                if rank == 0:
                    common.save(folder / "best.pt", saved | {"step": step})
            bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items())) if rank == 0 else None
        if rank == 0:
            print(json.dumps(row), file=metrics)
            for line in sorted(bad - named):
                bar.write(f"skipped {line}")
            named |= bad
        if save_now:
            rng_states = common.gather(common.rng_state(device))
            if rank == 0:
                common.save(folder / "ckpt.pt", saved | {
                    "optimizer": optimizer.state_dict(), "step": step, "rng": rng_states, "best": best, "row": row,
                    "bad": sorted(bad),
                })  # fmt: skip
        mark, mark_step = time.time(), step
    bar.close()
    if "top1" not in row:  # resumed at its last step
        row |= (scores := evaluate())
        best = max(best, scores | {"best_step": step}, key=lambda scores: scores["top1"])

    bad = set().union(*common.gather(bad))
    if rank == 0:
        for line in sorted(bad - named):  # met by other processes
            print(f"skipped {line}")
        last = {k: row[k] for k in ("top1", "top5") if k in row}
        results = {"seconds": row["seconds"], "peak_memory_gb": common.peak_memory_gb(device), "final_loss": row["loss"]}
        results |= last | {f"best_{k}": v for k, v in best.items() if k != "best_step"} | {"best_step": best["best_step"]}
        common.save(folder / "results.json", results | {"images": len(train), "skipped_files": len(bad)})
        print(f"{len(train)} labelled images, {cfg.steps} steps in {row['seconds']:.0f} s: top1 {row['top1']:.4f} at the end, "
              f"{best['top1']:.4f} at step {best['best_step']}; {folder}/results.json, best.pt, ckpt.pt")  # fmt: skip


# ---- model and data ------------------------------------------------------------------------------------------------


def build(cfg: Config, classes: list[str] | None = None) -> tuple[Classifier, dict, tuple[int, int]]:
    """The classifier with the weights of --init -> classifier, what the file says (config, classes), image size in pixels.

    A fine-tuned file keeps its head when its classes are those of the data; classes=None asks for just such a file.
    """
    if cfg.init == "none":
        preset = train_vision.PRESETS.get(cfg.preset, {})
        state = {"config": asdict(train_vision.Config(**preset))}
    else:
        state = convert.read(cfg.init)
    arch = asdict(train_vision.Config()) | state["config"]
    old = (arch["image_size"], arch["image_width"] or arch["image_size"])
    size = (cfg.image_size, cfg.image_size) if cfg.image_size else old
    if size[0] % arch["patch"] or size[1] % arch["patch"]:
        raise BadInput(f"--image_size {cfg.image_size}: not a multiple of the model's patch of {arch['patch']} pixels")
    encoder = vision_encoder(
        image_size=size, patch=arch["patch"], dim=arch["dim"], depth=arch["depth"], heads=arch["heads"], ffn=arch["ffn"],
        layer_scale=arch["layer_scale"], drop_path=cfg.drop_path, dropout=cfg.dropout, attn_dropout=cfg.attn_dropout,
        relative=arch["relative"], learned_std=arch["learned_std"], init_std=arch["init_std"],
    )  # fmt: skip
    tuned = state.get("classes")
    if tuned and classes and tuned == [str(i) for i in range(len(classes))]:
        tuned = state["classes"] = classes  # a released file numbers its classes, in the order of their sorted names
    if classes is None and tuned is None:
        raise BadInput(f"--init {cfg.init}: a pre-trained encoder without classes cannot predict; fine-tune it first, then give best.pt")
    classifier = Classifier(encoder, len(classes or tuned))
    if cfg.init != "none":
        weights = state["teacher"] if cfg.init_from == "teacher" and tuned is None else state["student"]
        if weights is None:
            raise BadInput(f"--init {cfg.init}: holds no teacher; take --init_from student")
        if cfg.eval_only and tuned and classes != tuned:
            raise BadInput(f"{cfg.data}: its classes are not those of {cfg.init}; see {sorted(set(classes) ^ set(tuned))[:4]}")
        if tuned is None or classes not in (None, tuned):  # only the encoder serves: the pre-training's own parts go
            own = ("encoder.norm.", "encoder.mask_embedding")
            weights = {k: v for k, v in weights.items() if k.startswith("encoder.") and not k.startswith(own)}
            weights |= {k: v for k, v in classifier.state_dict().items() if not k.startswith("encoder.")}
        convert.load_into(classifier, weights, cfg.init, convert.patch_grid(arch), (size[0] // arch["patch"], size[1] // arch["patch"]))
    state["config"] = arch | {"image_size": size[0], "image_width": size[1]}
    return classifier, state, size


def label_subset(labels: list[int], fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of `fraction` of every class, at least one each; a function of the seed alone."""
    labels, rng = np.asarray(labels), np.random.default_rng([seed, 10])
    chosen = []
    for c in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == c))
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


def layer_of(name: str, depth: int) -> int:
    """0 for the embedding, 1 .. depth for the blocks, depth + 1 for the head and the shared position table."""
    if name.startswith("encoder.blocks."):
        return 1 + int(name.split(".")[2])
    return 0 if name.startswith("encoder.") and not name.endswith("table") else depth + 1


# ---- regularisers of a batch ------------------------------------------------------------------------------------------


def erase(x: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Random erasing (Zhong et al. 2020): noise in a rectangle of 2 to 33 % of a picture. x: (B, 3, H, W) normalised."""
    height, width = x.shape[-2:]
    for picture in x:
        if rng.random() < probability:
            area, aspect = height * width * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.standard_normal((3, h, w), dtype=np.float32)
            picture[:, top : top + h, left : left + w] = torch.from_numpy(noise).to(x.device)
    return x


def mix(x: torch.Tensor, y: torch.Tensor, cfg: Config, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of a batch with its own reverse order.

    x (B, 3, H, W) pictures, y (B, classes) soft labels; both are mixed in the same proportion.
    """
    use_cutmix = cfg.cutmix > 0 and (cfg.mixup == 0 or rng.random() < 0.5)
    if not use_cutmix and cfg.mixup == 0:
        return x, y
    keep = rng.beta(*[cfg.cutmix if use_cutmix else cfg.mixup] * 2)
    if use_cutmix:
        height, width = x.shape[-2:]
        h, w = round(height * math.sqrt(1 - keep)), round(width * math.sqrt(1 - keep))
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        other, x = x.flip(0), x.clone()
        x[..., top : top + h, left : left + w] = other[..., top : top + h, left : left + w]
        keep = 1 - h * w / (height * width)
    else:
        x = keep * x + (1 - keep) * x.flip(0)
    return x, keep * y + (1 - keep) * y.flip(0)


# ---- use it --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(cfg: Config, device: torch.device, autocast) -> None:
    """One line a picture: its path, then up to five classes with their probabilities."""
    classifier, state, size = build(cfg)
    classifier.to(device).eval()
    readable = 0
    for path in cfg.predict:
        try:
            picture = images.load_image(path)
        except images.BadImage as error:
            print(f"{path}: skipped, {error}")
            continue
        readable += 1
        view = images.normalise(images.to_tensor(images.center_crop(picture, size))[None].to(device))
        with autocast:
            probabilities = classifier(view).float().softmax(-1)[0]
        top = probabilities.topk(min(5, len(probabilities)))
        print(f"{path}: " + ", ".join(f"{state['classes'][i]} {p:.3f}" for p, i in zip(top.values.tolist(), top.indices.tolist())))
    if not readable:
        raise BadInput("--predict: none of these files is a picture that can be read")


if __name__ == "__main__":
    common.run(main)
