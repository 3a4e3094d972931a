"""Pre-train data2vec on images (Baevski et al. 2022, section 4.1).

python train_vision.py                                                  # synthetic images, laptop CPU
python train_vision.py --preset cifar10 --data DIR                      # DIR/{train,val}/CLASS/*.jpg
torchrun --nproc_per_node=8 train_vision.py --preset base --data DIR    # ViT-B/16 on ImageNet-1K
"""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

import common
import model2
from common import RunConfig, due, option
from data import images
from data.sampling import batches, loader
from masking import block_mask, exact_blocks
from model import Encoder, PatchEmbed, Student, Teacher, init_vision
from targets import NORMS, feature_std, regression_loss, tau_at, top_k_average
from tools import convert, probes


@dataclass
class Config(model2.Options2, RunConfig):
    init_teacher: str = option("teacher", "network of --init to start from", ("teacher", "student"))
    global_batch: int = option(128, "images per update, over all processes", min_=1)
    micro_batch: int = option(0, "most images a process holds at once; 0: no limit", min_=0)
    # model
    image_size: int = option(32, "pixels, a multiple of patch", min_=1)
    patch: int = option(4, "pixels a side of a patch", min_=1)
    dim: int = option(128, "width D", min_=1)
    depth: int = option(4, "layers L", min_=1)
    heads: int = option(4, "attention heads", min_=1)
    ffn: int = option(512, "hidden width of the FFN", min_=1)
    layer_scale: float = option(0.0, "initial gain of each branch; 0: none. For deep models; not 2.0", min_=0)
    drop_path: float = option(0.0, "stochastic depth of the student's last layer", min_=0, max_=0.99)
    attn_dropout: float = option(0.0, "dropout of the student's attention weights", min_=0, max_=0.99)
    learned_std: float = option(0.0, "> 0: learned positions, too (ours, for small models; not 2.0)", min_=0)
    relative: bool = True  # not options: for released checkpoints
    per_block: bool = False
    norm_eps: float = 1e-6
    pool_cls: bool = False  # fine-tuned models of other origin
    dropout: float = 0.0
    schedule: str = "cosine"
    # data2vec
    mask_ratio: float = option(120 / 196, "fraction of patches hidden from the student", min_=0.01, max_=1)
    mask_block: int = option(16, "patches in the smallest hidden block; 2.0: a side of a visible one", min_=1)
    class_weight: float = option(2.56, "2.0: of the class token's loss (it predicts the mean target)", min_=0)
    target: str = option("block", "layer output that is a_l", ("block", "ffn", "ffn_residual", "attention"))
    top_k: int = option(6, "layers averaged into the target, from the top", min_=1)
    norm: str = option("layer", "normalisation of each a_l; needed (see RESULTS.md)", tuple(NORMS))
    final_norm: str = option("layer", "normalisation of their mean", tuple(NORMS))
    window: int = option(0, "> 0: the teacher attends at most so many patches away", min_=0)
    beta: float = option(2.0, "where smooth L1 turns linear; 0: squared error", min_=0)
    tau_0: float = option(0.9998, "teacher momentum at the start; too low: collapse", min_=0, max_=1)
    tau_e: float = option(0.9998, "teacher momentum from step tau_n on", min_=0, max_=1)
    tau_n: int = option(0, "steps over which tau rises", min_=0)
    guard_after: int = option(5000, "from this step on a collapsed run stops; -1: never", min_=-1)
    # optimiser
    lr: float = option(2e-3, "peak learning rate", min_=0)
    warmup: float = option(0.1, "fraction of the steps; too short: divergence", min_=0, max_=1)
    final_scale: float = 0.005  # learning rate at the last step, as a fraction of lr
    weight_decay: float = option(0.05, "on matrices, not on position tables", min_=0)
    beta2: float = 0.999  # Adam's second-moment decay
    clip: float = option(3.0, "largest gradient norm; 0: no clipping", min_=0)
    # augmentation: student and teacher see the SAME view
    crop_min: float = option(0.2, "smallest area of the random crop, as a fraction", min_=0.01, max_=1)
    jitter: float = 0.4  # change of brightness, contrast and saturation
    # sizes of the probes
    probe_images: int = 5000
    eval_images: int = 1000


VIT_B = dict(dim=768, depth=12, heads=12, ffn=3072, layer_scale=1e-4, drop_path=0.25, attn_dropout=0.05)
VIT_L = dict(dim=1024, depth=24, heads=16, ffn=4096, layer_scale=1e-5, drop_path=0.2, attn_dropout=0.15)
IMAGENET = dict(image_size=224, patch=16, workers=10, log_every=50)
SMALL = dict(mask_ratio=0.6, mask_block=4, norm="instance", final_norm="none", learned_std=0.3, tau_0=0.95)
TWO = dict(mask_block=3, target="ffn", norm="instance", beta=0.0, beta2=0.95, clip=4.0, final_scale=0.0)
SMALL2 = SMALL | TWO | dict(mask_adjust=0.07, mask_block=2, final_norm="layer", masks=8, lr=1e-3, tau_0=0.99)
PRESETS = {
    # 2 CPU cores, 95 seconds: linear probe .189 -> .282 (RESULTS.md)
    "smoke": SMALL | dict(
        steps=800, global_batch=32, workers=0, probe_every=0, probe_images=2000, depth=3, top_k=3,
        tau_e=0.995, tau_n=300, lr=3e-3, final_scale=1 / 300, warmup=0.075, guard_after=200,
    ),
    # 10,000 images, 2 CPU cores, about 2 hours: linear probe .326 -> .498 (RESULTS.md)
    "cifar10": SMALL | dict(
        steps=10_500, log_every=50, probe_every=2000, eval_images=2000, workers=1, top_k=4, crop_min=0.3,
        tau_e=0.999, tau_n=5000, lr=3e-3, final_scale=1 / 300, warmup=1 / 21, guard_after=2000,
    ),
    # ImageNet-1K, 800 epochs of 625.6 steps, 16 GPUs; paper 84.2 top-1 after fine-tuning; not run here
    "base": IMAGENET | VIT_B | dict(
        steps=500_456, global_batch=2048, micro_batch=128, save_every=5000, probe_every=50_000, warmup=1 / 80,
    ),
    # ImageNet-1K, 800 epochs of 156.4 steps; not run here
    "large": IMAGENET | VIT_L | dict(
        steps=125_114, global_batch=8192, micro_batch=64, save_every=2000, probe_every=20_000, lr=1e-3,
        final_scale=0.01,
    ),
}  # fmt: skip
# --init ckpt.pt of `large`: the schedule restarts, the teacher becomes the student; paper 86.6; not run here
PHASE2 = dict(init_teacher="student", tau_0=0.9999, tau_e=0.9999, warmup=0.05)
PRESETS["large_phase2"] = PRESETS["large"] | PHASE2
# data2vec 2.0. ImageNet-1K: paper 84.5, 86.8, 87.4 after fine-tuning; not run here
PRESETS["smoke2"] = PRESETS["smoke"] | SMALL2 | dict(masks=4, global_batch=16)
PRESETS["cifar10_2"] = PRESETS["cifar10"] | SMALL2 | dict(global_batch=32, steps=10_000, tau_e=0.9995)
PRESETS["large2"] = IMAGENET | TWO | dict(
    steps=375_300, global_batch=128, save_every=5000, probe_every=50_000, guard_after=-1, warmup=2 / 15,
    jitter=0.0, masks=16, mask_ratio=0.75, mask_adjust=0.1, top_k=18, dim=1024, depth=24, heads=16, ffn=4096,
    decoder_width=1024, decoder_kernel=5, class_weight=1.28, tau_e=0.99999, tau_n=150_000, lr=4e-4,
)  # fmt: skip
PRESETS["base2"] = PRESETS["large2"] | dict(
    global_batch=256, mask_ratio=0.8, mask_adjust=0.07, top_k=10, dim=768, depth=10, prenet=2, heads=12,
    ffn=3072, decoder_depth=6, decoder_width=768, decoder_kernel=3, class_weight=2.56, tau_n=100_000, lr=1e-3,
)  # fmt: skip
PRESETS["huge2"] = PRESETS["large2"] | dict(top_k=24, dim=1280, depth=32, ffn=5120, tau_e=0.99995)


def build(cfg: Config) -> Student:
    """The student of these options, with random weights."""
    common.require(cfg.image_size % cfg.patch == 0, f"--image_size: use a multiple of --patch {cfg.patch}")
    grid, tables = (cfg.image_size // cfg.patch,) * 2, cfg.depth if cfg.per_block else 0
    if cfg.masks:
        return model2.build(cfg, model2.Patches(grid, cfg.patch, cfg.dim), drop_path=cfg.drop_path)
    embed = PatchEmbed(grid, cfg.patch, cfg.dim, cfg.heads, cfg.relative, cfg.learned_std, tables)
    block = {"heads": cfg.heads, "ffn": cfg.ffn, "target": cfg.target, "layer_scale": cfg.layer_scale}
    block |= {"dropout": (cfg.dropout, cfg.attn_dropout, 0), "drop_path": cfg.drop_path}
    encoder = Encoder(embed, cfg.dim, cfg.depth, pre_norm=True, eps=cfg.norm_eps, **block)
    init_vision(encoder)
    head = torch.nn.Linear(cfg.dim, cfg.dim)
    init_vision(head)
    return Student(encoder, head)


def augment(cfg: Config, img, rng):
    img = images.random_resized_crop(img, cfg.image_size, (cfg.crop_min, 1.0), (3 / 4, 4 / 3), rng)
    return images.color_jitter(images.flip(img, rng), cfg.jitter, rng)


def draw_mask(cfg: Config, rng):  # -> (T,) bool; 2.0: (M, T)
    grid = (cfg.image_size // cfg.patch,) * 2
    if cfg.masks:
        return ~exact_blocks(cfg.masks, grid, 1 - cfg.mask_ratio, cfg.mask_adjust, cfg.mask_block, rng)
    return block_mask(grid, cfg.mask_ratio, cfg.mask_block, rng)


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="vision")
    common.check_sizes(cfg)
    rank, world, device, autocast, scaler = common.start_processes(cfg.device, cfg.dtype)
    accumulation = common.accumulation_steps(cfg.global_batch, cfg.micro_batch, world)
    train, val = images.open_data(cfg.data)

    # ---- student, teacher, optimiser: no weight decay on biases, norms, gains, tokens and tables
    torch.manual_seed(cfg.seed)
    student = build(cfg).to(device)
    teacher = Teacher(student.encoder, window=cfg.window)
    named, tables = list(student.named_parameters()), ("table", "learned")
    wide = {name for name, p in named if p.ndim > 1 and not name.endswith(tables)}
    wide |= {"encoder.embed.cls"} if cfg.masks else set()  # 2.0, as released
    decay, no_decay = [p for name, p in named if name in wide], [p for name, p in named if name not in wide]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    torch.manual_seed(cfg.seed * 1000 + rank)  # dropout and drop path differ between processes
    step = common.load_run(cfg, rank, student, teacher, optimizer, scaler)["step"]
    if cfg.init and step == 0:
        convert.init_run(cfg, student, teacher)
    log = common.Log(cfg, step, rank, device, "images")
    if cfg.compile:
        for network in (student.encoder, teacher.encoder):
            network.transform = torch.compile(network.transform)
    ddp = DistributedDataParallel(student) if world > 1 else student

    # ---- batches: a view and its mask depend on (seed, epoch, index) alone
    keys = batches(len(train), cfg.seed, step, cfg.steps, cfg.global_batch, accumulation, world, rank)
    views = images.Views(train, partial(augment, cfg), cfg.seed, partial(draw_mask, cfg))
    loaded = log.watch(loader(views, keys, cfg.workers, device))
    if rank == 0:
        evaluate = probes.ImageProbe(cfg, train, val, partial(draw_mask, cfg), log, device, autocast)
        if step in (0, cfg.steps) and log.scored < step:
            log.write(step, {}, evaluate(student, teacher))

    # ---- the loop
    scale = cfg.dim ** (-0.5 if cfg.masks else -1)
    while step < cfg.steps:
        step += 1
        lr, tau = common.lr_at(step, cfg), tau_at(step, cfg.tau_0, cfg.tau_e, cfg.tau_n)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [common.to_device(next(loaded), device) for _ in range(accumulation)]
        num_masked = common.all_reduce(sum(batch["mask"].sum() for batch in micro_batches))
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(micro_batches):
            view, mask = images.normalise(batch["images"]), batch["mask"].flatten(0, -2)
            ddp.require_backward_grad_sync = i == accumulation - 1
            # ---- data2vec (mask: drawn with the view)
            with autocast:
                y = top_k_average(teacher(view), cfg.top_k, cfg.norm, cfg.final_norm)  # of all patches
                y = y.repeat_interleave(cfg.masks, dim=0) if cfg.masks else y  # 2.0: M masks of a view
                f, _, _ = ddp(view, mask)  # (N, D), from the visible patches
            micro_loss = regression_loss(f, y[mask], cfg.beta, scale) / num_masked
            if cfg.masks:  # 2.0: the class token predicts the mean target
                class_loss = regression_loss(student.cls, y.mean(1), cfg.beta, scale)
                micro_loss += cfg.class_weight * class_loss / (cfg.global_batch * cfg.masks)  # of all views
            scaler.scale(micro_loss * world).backward()  # DDP averages over processes; the loss is a sum
            loss += micro_loss.detach()
        grad_norm = common.optimizer_step(optimizer, scaler, student, cfg.clip)
        if grad_norm is None:  # float16 overflowed: this step again, at a smaller scale
            step, loaded = step - 1, itertools.chain(micro_batches, loaded)
            continue
        teacher.update(student.encoder, tau)
        # ---- end of data2vec

        log.advance(cfg.global_batch)
        if log.due(step):
            metrics = {"loss": loss * world, "target_std": feature_std(y[mask]), "pred_std": feature_std(f)}
            metrics |= {"masked": mask.float().mean(), "tau": tau, "lr": lr, "grad_norm": grad_norm}
            probe_now = rank == 0 and due(step, cfg.probe_every, cfg.steps)
            log.write(step, metrics, evaluate(student, teacher) if probe_now else {})
        log.checkpoint(step, student, teacher, optimizer, scaler)
    log.finish()


if __name__ == "__main__":
    common.run(main)
