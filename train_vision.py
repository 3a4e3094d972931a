"""Pre-train data2vec on images (Baevski et al. 2022, section 4.1).

    python train_vision.py                                                  # smoke test: made images, laptop CPU
    python train_vision.py --preset cifar10 --data DIR                      # DIR/{train,val}/{class}/*.jpg
    torchrun --nproc_per_node=8 train_vision.py --preset base --data DIR    # ViT-B/16 on ImageNet-1K
"""

import contextlib
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from common import BadInput, option
from data import images
from masking import block_mask
from model import Student, Teacher, init_vision, regression_head, vision_encoder
from targets import explained, feature_std, knn, linear_probe, regression_loss, show, tau_at, top_k_average, unhealthy

from tools import convert


@dataclass
class Config:
    preset: str = option("smoke", "named set of values for the options below")
    # run
    data: str = option("", "folder with train/ and val/, each CLASS/*.jpg; empty: images made on the spot, no download")
    out: str = option("", "folder of this run; a run that is there already is only continued, never overwritten")
    resume: bool = option(False, "continue the run in --out from its ckpt.pt")
    init: str = option("", "checkpoint to start from instead of random weights; the schedule starts at 0")
    init_teacher: str = option("teacher", "with --init, the teacher is the file's teacher or a copy of its student", ("teacher", "student"))
    steps: int = option(1000, "optimiser steps (updates); all schedules end here")
    global_batch: int = option(128, "images an update, whatever the number of processes")
    micro_batch: int = option(0, "most images a process holds at once; gradients accumulate to the global batch; 0: no limit")
    seed: int = option(0, "seed of weights, order, crops and masks")
    device: str = option("auto", "auto takes the GPU if there is one", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "autocast; auto is bfloat16 where the hardware has it", ("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile both encoders (a minute at the start, then faster on a GPU)")
    workers: int = option(2, "data-loading processes for each training process; 0 loads in the loop")
    log_every: int = option(10, "steps between metric lines")
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    probe_every: int = option(1000, "steps between evaluations (explained, k-NN, linear probe); 0: only start and end")
    probe_images: int = option(5000, "training images for k-NN and probe; too few and both are noise")
    eval_images: int = option(1000, "held-out images for explained, k-NN and probe")
    # model: small values of these make the small presets
    image_size: int = option(32, "pixels, a multiple of patch")
    image_width: int = option(0, "pixels, for images that are not square; 0: as image_size")
    patch: int = option(4, "pixels a side of a patch")
    dim: int = option(128, "width D")
    depth: int = option(4, "layers L")
    heads: int = option(4, "attention heads; dim must be a multiple")
    ffn: int = option(512, "hidden width of the FFN")
    layer_scale: float = option(0.0, "initial gain of each branch; 0: none. Small values keep deep models stable, and slow")
    drop_path: float = option(0.0, "stochastic depth of the student, rising linearly to this at the last layer")
    dropout: float = option(0.0, "dropout on both branches of the student")
    attn_dropout: float = option(0.0, "dropout on the student's attention weights")
    relative: bool = option(True, "relative-position bias shared by all blocks (the paper's positions)")
    per_block: bool = option(False, "a table for every block instead, as released models are fine-tuned")
    learned_std: float = option(0.0, "> 0 adds learned absolute positions of this initial std (ours, for small models)")
    norm_eps: float = option(1e-6, "epsilon of the layer norms; weights from elsewhere may want another")
    init_std: float = option(0.02, "std of the initial weights; far larger than 1 / sqrt(dim) diverges")
    # data2vec
    mask_ratio: float = option(0.6, "share of patches hidden from the student")
    mask_block: int = option(16, "smallest hidden rectangle, in patches; 1 lets neighbours give the answer away")
    target: str = option("block", "which output of a layer is a_l", ("block", "ffn", "ffn_residual", "attention"))
    top_k: int = option(6, "layers averaged into the target, from the top")
    norm: str = option("layer", "normalisation of each a_l: over features, over the image's patches, or none (collapses)", ("layer", "instance", "none"))
    final_norm: str = option("layer", "normalisation of their mean", ("layer", "instance", "none"))
    window: int = option(0, "> 0: the teacher attends only to patches at most this far away (ablation of the context)")
    beta: float = option(2.0, "smooth L1 turns from square to absolute here; 0: squared error")
    tau_0: float = option(0.9998, "teacher momentum at the start; too low collapses, too high stands still")
    tau_e: float = option(0.9998, "teacher momentum from step tau_n on")
    tau_n: int = option(0, "steps over which tau rises")
    # optimiser
    lr: float = option(2e-3, "peak learning rate")
    min_lr: float = option(1e-5, "learning rate at the last step")
    warmup: int = option(100, "steps of linear warm-up, at most --steps; too few and a large lr diverges")
    weight_decay: float = option(0.05, "on matrices only: not on biases, norms, gains, tokens and position tables")
    beta2: float = option(0.999, "Adam's second-moment decay")
    clip: float = option(3.0, "largest gradient norm; 0: no clipping")
    # augmentation: the SAME view goes to student and teacher
    crop_min: float = option(0.2, "smallest area of the random crop, as a share of the image")
    jitter: float = option(0.4, "brightness, contrast and saturation change by up to this")
    # collapse guard (released speech code; SPEC of both thresholds there)
    guard_after: int = option(5000, "from this step on a collapsed run stops; -1: never")
    min_target_std: float = option(0.1, "collapsed if the targets' std over positions falls below")
    min_pred_std: float = option(0.01, "collapsed if the predictions' std over positions falls below")


PRESETS = {
    # python train_vision.py: 2 CPU cores, see README for seconds and numbers
    "smoke": dict(
        steps=800, global_batch=32, workers=0, probe_every=0, probe_images=2000, eval_images=1000, depth=3, guard_after=200,
        mask_block=4, top_k=3, norm="instance", final_norm="none", learned_std=0.3,
        tau_0=0.95, tau_e=0.995, tau_n=300, lr=3e-3, warmup=60,
    ),
    # python train_vision.py --preset cifar10 --data DIR: 2 CPU cores or any GPU, see README
    "cifar10": dict(
        steps=10_500, global_batch=128, log_every=50, save_every=500, probe_every=2000, eval_images=2000, workers=1,
        mask_block=4, top_k=4, norm="instance", final_norm="none", learned_std=0.3, crop_min=0.3,
        tau_0=0.95, tau_e=0.999, tau_n=5000, lr=3e-3, warmup=500, guard_after=2000,
    ),
    # torchrun --nproc_per_node=16: ImageNet-1K, 800 epochs of 625.6 steps; paper 84.2 top-1 after fine-tuning; not run here
    "base": dict(
        steps=500_456, global_batch=2048, micro_batch=128, workers=10, save_every=5000, probe_every=50_000, log_every=50,
        image_size=224, patch=16, dim=768, depth=12, heads=12, ffn=3072, layer_scale=1e-4, drop_path=0.25, attn_dropout=0.05,
        mask_ratio=120 / 196, warmup=6256,
    ),
    # ImageNet-1K, 800 epochs of 156.4 steps; not run here
    "large": dict(
        steps=125_114, global_batch=8192, micro_batch=64, workers=10, save_every=2000, probe_every=20_000, log_every=50,
        image_size=224, patch=16, dim=1024, depth=24, heads=16, ffn=4096, layer_scale=1e-5, drop_path=0.2, attn_dropout=0.15,
        mask_ratio=120 / 196, lr=1e-3, warmup=12_511,
    ),
}  # fmt: skip
# --init phase-1 ckpt.pt: the schedule restarts, the teacher becomes the student; paper 86.6 top-1; not run here
PRESETS["large_phase2"] = PRESETS["large"] | dict(init_teacher="student", tau_0=0.9999, tau_e=0.9999, warmup=6256)


def lr_at(step: int, cfg: Config) -> float:
    """Linear warm-up to lr, then cosine to min_lr at the last step. step = 1 .. steps."""
    warmup = min(cfg.warmup, cfg.steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    t = (step - warmup) / (cfg.steps - warmup)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * t))


def check(cfg: Config, world: int) -> int:
    """Refuses values that cannot work. Returns the number of micro-batches an update."""
    common.check_range(cfg, 1, math.inf, "steps global_batch log_every image_size patch dim depth heads ffn top_k mask_block eval_images probe_images")  # fmt: skip
    common.check_range(cfg, 0, math.inf, "seed micro_batch workers save_every probe_every image_width warmup tau_n window beta lr min_lr weight_decay clip")  # fmt: skip
    common.check_range(cfg, 0, 1, "tau_0 tau_e jitter")
    common.check_range(cfg, 0, 0.9999, "drop_path dropout attn_dropout beta2")
    common.check_range(cfg, 1e-9, 1, "mask_ratio crop_min")
    if cfg.dim % cfg.heads:
        raise BadInput(f"--dim {cfg.dim} is not a multiple of --heads {cfg.heads}")
    if cfg.top_k > cfg.depth:
        raise BadInput(f"--top_k {cfg.top_k}: the model has only --depth {cfg.depth} layers")
    for side in (cfg.image_size, cfg.image_width):
        if side % cfg.patch:
            raise BadInput(f"image of {side} pixels: not a multiple of --patch {cfg.patch}")
    count = math.ceil(cfg.global_batch / (world * (cfg.micro_batch or cfg.global_batch)))
    if cfg.global_batch % (world * count):
        raise BadInput(f"--global_batch {cfg.global_batch}: does not split into {world} processes x {count} micro-batches; take a multiple of {world * count}")  # fmt: skip
    return count


def build(cfg: Config) -> Student:
    """The student of these options, with random weights. finetune.py builds the same encoder from a checkpoint's config."""
    encoder = vision_encoder(
        image_size=(cfg.image_size, cfg.image_width or cfg.image_size), patch=cfg.patch, dim=cfg.dim, depth=cfg.depth,
        heads=cfg.heads, ffn=cfg.ffn, layer_scale=cfg.layer_scale, drop_path=cfg.drop_path, dropout=cfg.dropout,
        attn_dropout=cfg.attn_dropout, target=cfg.target, relative=cfg.relative, per_block=cfg.per_block,
        learned_std=cfg.learned_std, init_std=cfg.init_std, eps=cfg.norm_eps,
    )  # fmt: skip
    head = regression_head(cfg.dim)
    init_vision(head, cfg.init_std)
    return Student(encoder, head)


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="vision")
    rank, world, device, autocast = common.start_processes(cfg.device, cfg.dtype)
    accumulation = check(cfg, world)

    # ---- data: a sample is a function of (seed, epoch, index), whatever the rank or worker
    size = (cfg.image_size, cfg.image_width or cfg.image_size)
    grid = (size[0] // cfg.patch, size[1] // cfg.patch)
    train, val = images.open_folder(cfg.data) if cfg.data else images.made_images()
    labels = len(train.classes) > 1 and -1 not in train.labels + val.labels  # without, k-NN and probe have nothing to say
    if rank == 0:
        print(f"{len(train)} training and {len(val)} held-out images, {len(train.classes)} class" + "es" * (len(train.classes) > 1) + ("" if labels else ": no usable labels, so no k-NN and no probe"))  # fmt: skip

    def augment(img, rng):
        img = images.random_resized_crop(img, size, (cfg.crop_min, 1.0), (3 / 4, 4 / 3), rng)
        return images.color_jitter(images.flip(img, rng), cfg.jitter, rng)

    def resize(img, rng):
        return images.center_crop(img, size)

    def hide(rng):
        return block_mask(1, grid, cfg.mask_ratio, cfg.mask_block, rng)[0]

    # ---- student, teacher, optimiser
    torch.manual_seed(cfg.seed)
    student = build(cfg).to(device)
    teacher = Teacher(student.encoder, window=cfg.window)
    decay = [p for n, p in student.named_parameters() if p.ndim > 1 and not n.endswith(("table", "learned"))]
    plain = [p for n, p in student.named_parameters() if p.ndim <= 1 or n.endswith(("table", "learned"))]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)

    # ---- the run's folder, and what is already there
    folder = Path(cfg.out)
    step, begin, row, bad, named = 0, None, {"seconds": 0.0}, set(), set()
    torch.manual_seed(cfg.seed * 1000 + rank)  # from here on for dropout and drop path, which differ between processes
    if cfg.resume and (folder / "ckpt.pt").exists():
        state = convert.read(folder / "ckpt.pt")
        convert.load_into(student, state["student"], folder / "ckpt.pt", grid, grid)
        convert.load_into(teacher, state["teacher"], folder / "ckpt.pt", grid, grid)
        optimizer.load_state_dict(state["optimizer"])
        for group, weight_decay in zip(optimizer.param_groups, (cfg.weight_decay, 0.0)):
            group |= {"weight_decay": weight_decay, "betas": (0.9, cfg.beta2)}  # this command's, not the file's
        common.rng_state(device, restore=state["rng"][rank] if rank < len(state["rng"]) else None)
        step, begin, row, bad = state["step"], state["begin"], state["row"], set(state["bad"])
    elif cfg.init:
        state = convert.read(cfg.init)
        if "classes" in state:
            raise BadInput(f"--init {cfg.init}: a fine-tuned classifier; pre-training goes on from a pre-trained checkpoint")
        if "patch" not in state["config"]:
            raise BadInput(f"--init {cfg.init}: not a model of images")
        for name in ("heads", "norm_eps"):  # the shapes of weights do not tell
            if (theirs := state["config"].get(name, getattr(Config(), name))) != getattr(cfg, name):
                raise BadInput(f"--init {cfg.init}: was trained with --{name} {theirs}; take the same")
        grids = convert.patch_grid(state["config"]), grid
        convert.load_into(student, state["student"], cfg.init, *grids, fresh=state.get("fresh", ()))
        teacher.update(student.encoder, tau=0.0)  # a copy of the student
        if cfg.init_teacher == "teacher" and state["teacher"]:
            convert.load_into(teacher, state["teacher"], cfg.init, *grids)
    common.open_run(cfg.out, asdict(cfg), cfg.resume, rank)  # now that the checkpoint fits: a refused command changes nothing
    metrics = common.open_metrics(folder, step) if rank == 0 else None
    if cfg.compile:
        student.encoder.compile()
        teacher.encoder.compile()
    ddp = DistributedDataParallel(student) if world > 1 else student

    # ---- batches: this process's share of the run's samples from `step` on; held-out pictures with fixed masks
    def load(views, keys):
        return DataLoader(views, batch_sampler=keys, collate_fn=images.collate, num_workers=cfg.workers,
                          pin_memory=device.type == "cuda", generator=torch.Generator())  # fmt: skip

    def fixed(pictures, limit):  # the same random subset at every call, centre crop, one mask a picture
        chosen = np.sort(np.random.default_rng(cfg.seed).permutation(len(pictures))[:limit])
        keys = [[(0, int(i)) for i in part] for part in np.array_split(chosen, math.ceil(len(chosen) / 125))]
        got = list(load(images.Views(pictures, resize, 0, hide, replace=False), keys))
        bad.update(line for *_, broken in got for line in broken)
        if not any(len(view) for view, *_ in got):
            raise BadInput(f"{cfg.data}: no picture could be decoded, for instance {next(iter(bad))}; check the folder")
        return [batch for batch in got if len(batch[0])]

    keys = images.batches(len(train), cfg.seed, step, cfg.steps, cfg.global_batch, accumulation, world, rank)
    batches = iter(load(images.Views(train, augment, cfg.seed, hide), keys))
    if rank == 0:
        held_out, labelled = fixed(val, cfg.eval_images), fixed(train, cfg.probe_images) if labels else []
        begin = begin or evaluate(student, teacher, held_out, labelled, cfg, device, autocast)
        print(f"step 0: {show(begin)}")

    # ---- the loop
    batches = itertools.chain([next(batches, None)], batches)  # if no picture can be read, say so before the bar
    bar = tqdm(total=cfg.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    started, mark, mark_step = time.time() - row["seconds"], time.time(), step
    while step < cfg.steps:
        step += 1
        lr, tau = lr_at(step, cfg), tau_at(step, cfg.tau_0, cfg.tau_e, cfg.tau_n)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [next(batches) for _ in range(accumulation)]
        positions = torch.tensor(sum(int(mask.sum()) for _, mask, _, _ in micro_batches), device=device)
        if world > 1:
            dist.all_reduce(positions)  # processes hide different numbers of patches: the loss is a mean over all of them
        loss = torch.zeros((), device=device)
        for i, (view, mask, _, broken) in enumerate(micro_batches):
            view, mask = images.normalise(view.to(device, non_blocking=True)), mask.to(device, non_blocking=True)
            bad.update(broken)
            with contextlib.nullcontext() if i == accumulation - 1 or world == 1 else ddp.no_sync():
                # ---- data2vec, in four lines (the mask was drawn with the view) -----------------------------------
                with autocast:
                    y = top_k_average(teacher(view), cfg.top_k, cfg.norm, cfg.final_norm)  # (B, T, D) from all patches
                    f = ddp(view, mask)  # (M, D) from the visible patches, at the hidden ones
                share = regression_loss(f, y[mask], cfg.beta, scale=1 / cfg.dim) / positions
                (share * world).backward()  # DDP takes the mean over processes; this makes it their sum
            loss += share.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip or math.inf)
        optimizer.step()
        teacher.update(student.encoder, tau)
        # -----------------------------------------------------------------------------------------------------------
        optimizer.zero_grad()

        bar.update()
        probe_now = step == cfg.steps or (cfg.probe_every and step % cfg.probe_every == 0)
        save_now = step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0)
        if not (probe_now or save_now or step == 1 or step % cfg.log_every == 0):
            continue
        meters = torch.stack([loss * world, feature_std(y[mask]), feature_std(f), mask.float().mean()]) / world
        if world > 1:
            dist.all_reduce(meters)
        row = {"step": step} | dict(zip(("loss", "target_std", "pred_std", "masked"), meters.tolist()))
        row |= {"tau": tau, "lr": lr, "grad_norm": grad_norm.item(), "seconds": time.time() - started}
        row["samples_per_s"] = (step - mark_step) * cfg.global_batch / (time.time() - mark)
        bar.set_postfix_str("loss {loss:.4f}, std y {target_std:.2f} f {pred_std:.2f}, tau {tau:.4f}, lr {lr:.1e}, {samples_per_s:.0f} images/s".format(**row))  # fmt: skip
        if sick := unhealthy(row, cfg.guard_after, cfg.min_target_std, cfg.min_pred_std):
            bar.close()
            raise SystemExit(f"step {step}: {sick}" if rank == 0 else 1)
        if rank == 0:
            if probe_now:
                row |= (end := evaluate(student, teacher, held_out, labelled, cfg, device, autocast))
                bar.write(f"step {step}: {show(end)}")
            print(json.dumps(row), file=metrics)
            for line in sorted(bad - named):
                bar.write(f"skipped {line}")
            named |= bad
        if save_now:
            rng = common.gather(common.rng_state(device))
            if rank == 0:
                common.save(folder / "ckpt.pt", {
                    "student": student.state_dict(), "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "config": asdict(cfg), "rng": rng, "begin": begin, "row": row, "bad": sorted(bad),
                })  # fmt: skip
        mark, mark_step = time.time(), step
    bar.close()
    if rank == 0 and "explained" not in row:  # resumed at its last step
        row |= evaluate(student, teacher, held_out, labelled, cfg, device, autocast)

    bad = set().union(*common.gather(bad))
    if rank == 0:
        for line in sorted(bad - named):  # met by other processes
            print(f"skipped {line}")
        results = {"seconds": row["seconds"], "peak_memory_gb": common.peak_memory_gb(device), "final_loss": row["loss"]}
        for name, value in begin.items():
            results |= {f"{name}_start": value, f"{name}_end": row[name]}
        common.save(folder / "results.json", results | {"skipped_files": len(bad)})
        print(f"{cfg.steps} steps in {row['seconds']:.0f} s; {folder}/results.json, metrics.jsonl, ckpt.pt")
        for name, value in begin.items():
            print(f"  {name:18} {value:.3f} -> {row[name]:.3f}")


# ---- does it learn? -----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(student, teacher, held_out, labelled, cfg, device, autocast) -> dict[str, float]:
    """How much of the targets the student predicts, and how far frozen features separate the classes.

    held_out   list of (views, masks, labels): fixed crops and masks, for explained and as test set of the probes
    labelled   list of (views, labels) to fit the probes on; empty without labels
    returns    explained, and with labels knn, probe, teacher_knn, teacher_probe: fractions of 1
    """
    student.eval()

    def pairs():
        for view, mask, *_ in held_out:
            view, mask = images.normalise(view.to(device)), mask.to(device)
            with autocast:
                yield student(view, mask), top_k_average(teacher(view), cfg.top_k, cfg.norm, cfg.final_norm), mask

    def features(encoder, batches):  # mean of patches of the frozen encoder, (N, D), and labels (N,)
        with autocast:
            x = [encoder(images.normalise(view.to(device)))[0][:, encoder.prefix :].float().mean(1) for view, *_ in batches]
        return torch.cat(x), torch.cat([labels for _, _, labels, _ in batches]).to(device)

    numbers = {"explained": explained(pairs(), by_position=True)}
    if labelled:
        for prefix, encoder in (("", student.encoder), ("teacher_", teacher.encoder)):
            fit, test = features(encoder, labelled), features(encoder, held_out)
            numbers |= {prefix + "knn": knn(*fit, *test), prefix + "probe": linear_probe(*fit, *test)}
    student.train()
    return numbers


if __name__ == "__main__":
    common.run(main)
