"""Fine-tune a pre-trained encoder on labels, evaluate it, or use it (paper sections 5.1 to 5.3).

    images: classes of pictures (DIR/{train,val}/CLASS/*.jpg)
      python finetune.py --init runs/vision-smoke/ckpt.pt                                # made images, laptop CPU
      python finetune.py --preset cifar10 --data DIR --init CKPT --label_fraction 0.1     # 10 % of the labels
      python finetune.py --preset cifar10 --data DIR --init none                          # the same, from scratch
      torchrun --nproc_per_node=8 finetune.py --preset base --data DIR --init CKPT        # ImageNet-1K
    letters: transcripts of speech, by CTC (LibriSpeech's layout)
      python finetune.py --preset speech_smoke --init runs/speech-smoke/ckpt.pt          # made speech, laptop CPU
      torchrun --nproc_per_node=8 finetune.py --preset 10h --data DIR --init CKPT
    sounds: events in recordings (DIR/{train,valid}.csv, DIR/classes.txt)
      torchrun --nproc_per_node=8 finetune.py --preset audioset --data DIR --init CKPT
    sentences: GLUE's tasks, or one of yours (DIR/TASK/{train,dev}.tsv with columns sentence and label)
      python finetune.py --preset glue --task CoLA --data GLUE --init CKPT --sweep         # learning rates x seeds, a table
    use it: a fine-tuned file knows what it is for
      python finetune.py --init runs/finetune-cifar10/best.pt --predict a.jpg b.png      # or recordings
      python finetune.py --init runs/finetune-10h/best.pt --eval_only --data DIR --valid test-other --beam 50 --lm LM.arpa
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import train_speech
import train_text
import train_vision
from common import BadInput, option
from data import audio, glue, images, labels, letters, text
from model import Classifier, Recogniser, SentenceClassifier, linear_softmax
from tools import convert


@dataclass
class Config:
    preset: str = option("smoke", "named set of values for the options below")
    goal: str = option("images", "what the labels are: classes of images, letters or sound events of recordings, sentences", ("images", "letters", "sounds", "sentences"))
    # run
    data: str = option("", "folder (see above); empty: the made images or the made speech of pre-training")
    task: str = option("", "sentences: one of CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, or a folder of yours in --data")
    train: list = option([], "recordings: splits of --data to train on; none: as train_speech.py chooses")
    valid: list = option([], "recordings: splits of --data to evaluate on; none: as train_speech.py chooses")
    out: str = option("", "folder of this run; a run that is there already is only continued, never overwritten")
    init: str = option("none", "checkpoint: pre-trained (ours or released) or fine-tuned; none: random weights of --model")
    init_from: str = option("student", "which network of a pre-trained checkpoint to start from; random: it gives its sizes and vocabulary alone", ("student", "teacher", "random"))
    model: str = option("smoke", "with --init none: the pre-training preset whose model is built")
    resume: bool = option(False, "continue the run in --out from its ckpt.pt")
    eval_only: bool = option(False, "only evaluate the fine-tuned --init on the held-out part")
    predict: list = option([], "files to classify or to write down, or sentences (a pair: one argument, a tab between the two), with the fine-tuned --init; nothing is trained or written")
    sweep: bool = option(False, "sentences: fine-tune with every one of --lrs, each with --seeds seeds, and make a table of the means")
    lrs: list = option(["1e-5", "2e-5", "3e-5", "4e-5"], "sweep: peak learning rates (the paper's)")
    seeds: int = option(5, "sweep: seeds 0, 1, ... for each learning rate")
    label_fraction: float = option(1.0, "share of the training part to use, the same examples for every run of a seed, at least one a class")
    steps: int = option(500, "optimiser steps; 0: the paper's for a GLUE task, for one of yours 10 epochs")
    global_batch: int = option(64, "images, sentences or seconds of audio a step, whatever the number of processes; 0: the paper's for a GLUE task")
    micro_batch: int = option(0, "images, sentences: most that a process holds at once; 0: no limit")
    max_samples: int = option(512_000, "recordings: most samples (16,000 a second) that a process holds at once")
    max_seconds: float = option(30.0, "recordings: longer ones are not trained on for letters, and cropped for sounds; evaluation takes them whole")
    seed: int = option(0, "seed of the head, subset, order and augmentation")
    device: str = option("auto", "auto takes the GPU if there is one", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "autocast; auto is bfloat16 where the hardware has it", ("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile the encoder (its Transformer, for recordings)")
    workers: int = option(2, "data-loading processes for each training process")
    log_every: int = option(10, "steps between metric lines")
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    probe_every: int = option(100, "steps between evaluations; the best is kept as best.pt; 0: only at the end")
    image_size: int = option(0, "pixels; 0: as pre-trained. Another size interpolates the positions")
    # optimiser
    lr: float = option(1e-3, "peak learning rate of the head; the layers below it follow by layer_decay")
    head_lr: float = option(0.0, "peak learning rate of the head alone; 0: lr")
    layer_decay: float = option(0.75, "each layer below the top learns this much slower; 1: all alike (from scratch)")
    schedule: str = option("cosine", "after warmup to min_lr; or 10 % warm-up, 40 % lr, 50 % decay to 0.05 lr; or 6 % warm-up, then linearly to 0", ("cosine", "tri_stage", "linear"))
    min_lr: float = option(1e-6, "cosine: learning rate at the last step")
    warmup: int = option(50, "cosine: steps of linear warm-up, at most all of them")
    weight_decay: float = option(0.05, "on matrices only")
    beta2: float = option(0.999, "Adam's second-moment decay")
    clip: float = option(0.0, "largest gradient norm; 0: no clipping")
    freeze_steps: int = option(0, "recordings: the pre-trained encoder learns only after this many steps, the head at once")
    freeze_convs: bool = option(True, "recordings: the pre-trained convolutions never learn")
    # regularisers
    drop_path: float = option(0.1, "images: stochastic depth, rising linearly to this at the last layer")
    layer_drop: float = option(0.0, "recordings: probability to skip a layer")
    dropout: float = option(0.0, "dropout on both branches of a block")
    attn_dropout: float = option(0.0, "dropout on the attention weights")
    ffn_dropout: float = option(0.0, "recordings: dropout inside the FFN")
    head_dropout: float = option(0.0, "recordings, sentences: dropout before the head")
    mask_p: float = option(0.0, "recordings: share of frames to hide, if spans never met")
    mask_span: int = option(10, "recordings: frames in a hidden span")
    channel_p: float = option(0.0, "recordings: share of channels to silence, if spans never met")
    channel_span: int = option(64, "recordings: channels in a silenced span")
    smoothing: float = option(0.1, "images: label smoothing")
    mixup: float = option(0.0, "images: Beta parameter of mixup; sounds: probability to mix two clips; 0: off")
    cutmix: float = option(0.0, "images: Beta parameter of cutmix; 0: off. With both on, a coin decides for each batch")
    erasing: float = option(0.0, "images: probability to erase a random rectangle")
    rand_augment: float = option(0.0, "images: magnitude of RandAugment, two operations, std 0.5; 0: colour jitter instead")
    jitter: float = option(0.4, "images: brightness, contrast and saturation change by up to this")
    crop_min: float = option(0.4, "images: smallest area of the random crop, as a share of the image")
    # decoding of letters
    beam: int = option(0, "letters: hypotheses of the beam search in an evaluation; 0: greedy, the best letter of each frame, as in --predict")
    lm: str = option("", "letters: n-gram language model for the beam search, an ARPA file (python -m data.letters makes one)")
    lm_weight: float = option(2.0, "letters: weight of the language model's log10 probabilities")
    word_score: float = option(-1.0, "letters: added for each word; a language model alone would prefer few")


IMAGENET = dict(
    model="base", global_batch=1024, micro_batch=128, workers=10, log_every=50, save_every=2500, probe_every=6255, warmup=12_510,
    smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.25, rand_augment=9.0, crop_min=0.08,
)  # fmt: skip
CTC = dict(
    goal="letters", model="base", global_batch=1600, max_samples=3_200_000, workers=6, log_every=50, save_every=1000, probe_every=1000,
    lr=5e-5, layer_decay=1.0, schedule="tri_stage", weight_decay=0.0, beta2=0.98, layer_drop=0.1, ffn_dropout=0.1,
    freeze_steps=10_000, mask_p=0.65, channel_p=0.25,
)  # fmt: skip
LARGE = dict(model="large", max_samples=1_600_000)
PRESETS = {
    # python finetune.py [--init runs/vision-smoke/ckpt.pt]: made images, 2 CPU cores, see README
    "smoke": dict(),
    # python finetune.py --preset cifar10 --data DIR: 2 CPU cores, see README
    "cifar10": dict(model="cifar10", steps=500, probe_every=250, save_every=0, workers=1),
    # ViT-B, 100 epochs of 1251 steps; paper 84.2 top-1; not run here
    "base": IMAGENET | dict(steps=125_100, lr=4e-3, layer_decay=0.65, drop_path=0.2),
    # ViT-L, 50 epochs; paper 86.6 top-1; not run here
    "large": IMAGENET | dict(model="large", steps=62_550, lr=5e-3, layer_decay=0.65, drop_path=0.25),
    # python finetune.py --preset speech_smoke [--init runs/speech-smoke/ckpt.pt]: made speech, 2 CPU cores, see README
    "speech_smoke": CTC | dict(
        model="smoke", steps=700, global_batch=16, max_samples=256_000, max_seconds=4.0, workers=0, log_every=10, probe_every=0, save_every=0,
        lr=2e-3, freeze_steps=0, layer_drop=0.0, mask_p=0.3, label_fraction=0.1, channel_p=0.0, clip=3.0, freeze_convs=False,
    ),
    # python finetune.py --preset digits --data DIR: 2 CPU cores, see README
    "digits": CTC | dict(
        model="digits", steps=1000, global_batch=32, max_samples=512_000, workers=1, probe_every=250, save_every=250,
        lr=3e-4, head_lr=5e-3, freeze_steps=0, layer_drop=0.0, mask_p=0.3, channel_p=0.333, clip=3.0, freeze_convs=False,
    ),
    # Libri-light's and LibriSpeech's labels: section 5.2; paper's WER on test-other with a 4-gram model in README; not run here
    "10m": CTC | dict(steps=13_000),
    "1h": CTC | dict(steps=13_000),
    "10h": CTC | dict(steps=20_000, channel_p=0.5),
    "100h": CTC | dict(steps=80_000, lr=3e-5, channel_p=0.5, freeze_steps=0),
    "960h": CTC | dict(steps=320_000, lr=1e-4, mask_p=0.5, channel_p=0.1, freeze_steps=0),
    "10m_large": CTC | LARGE | dict(steps=13_000, lr=1e-4),
    "1h_large": CTC | LARGE | dict(steps=13_000, lr=3e-4, mask_p=0.75),
    "10h_large": CTC | LARGE | dict(steps=20_000, lr=1e-4, mask_p=0.75),
    "100h_large": CTC | LARGE | dict(steps=80_000, lr=3e-5, mask_p=0.5, channel_p=0.5),
    "960h_large": CTC | LARGE | dict(steps=320_000, lr=3e-5, mask_p=0.5),
    # AudioSet-20K, 21.3 minutes a batch; paper 34.5 mAP; the schedule is ours, none is published; not run here
    "audioset": CTC | dict(
        goal="sounds", model="audioset", steps=13_000, global_batch=1280, max_samples=1_280_000, max_seconds=10.0, lr=3e-5, head_lr=2e-4,
        mask_p=0.45, mask_span=4, channel_p=0.0, mixup=0.7, freeze_steps=0, layer_drop=0.05, ffn_dropout=0.0,
    ),
    # GLUE: section 5.3, RoBERTa's recipe; python finetune.py --preset glue --task CoLA --sweep; paper's numbers in README; not run here
    "glue": dict(
        goal="sentences", steps=0, global_batch=0, micro_batch=32, workers=1, probe_every=0, save_every=1000, lr=2e-5,
        layer_decay=1.0, schedule="linear", weight_decay=0.1, beta2=0.98, dropout=0.1, attn_dropout=0.1, head_dropout=0.1,
    ),
    # the same for a small model of train_text.py: python finetune.py --preset glue_small --task SST-2 --data DIR --init CKPT
    "glue_small": dict(
        goal="sentences", steps=1000, global_batch=32, workers=1, probe_every=200, save_every=0, lr=3e-4,
        layer_decay=1.0, schedule="linear", weight_decay=0.1, beta2=0.98, dropout=0.1, attn_dropout=0.1, head_dropout=0.1, clip=1.0,
    ),
}  # fmt: skip


def lr_at(step: int, cfg: Config) -> float:
    """Linear warm-up to lr, then cosine to min_lr, linearly to 0, or hold and exponential decay to 0.05 lr. step = 1 .. steps."""
    if cfg.schedule == "tri_stage":
        t = step / cfg.steps
        return cfg.lr * (max(t / 0.1, 0.01) if t < 0.1 else 0.05 ** max(0.0, (t - 0.5) / 0.5))
    if cfg.schedule == "linear":
        t = step / cfg.steps
        return cfg.lr * min(t / 0.06, (1 - t) / 0.94)
    warmup = min(cfg.warmup, cfg.steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    t = (step - warmup) / max(cfg.steps - warmup, 1)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * t))


def check(cfg: Config, world: int) -> int:
    """Refuses values that cannot work. Returns the number of micro-batches a step of each process."""
    common.check_range(cfg, 1, math.inf, "steps global_batch log_every mask_span channel_span max_samples")
    common.check_range(cfg, 0, math.inf, "seed micro_batch workers save_every probe_every image_size warmup lr head_lr min_lr weight_decay clip freeze_steps mixup cutmix beam")  # fmt: skip
    common.check_range(cfg, 0, 1, "smoothing erasing jitter layer_decay mask_p channel_p")
    common.check_range(cfg, 0, 0.9999, "drop_path dropout attn_dropout ffn_dropout head_dropout layer_drop beta2")
    common.check_range(cfg, 0, 10, "rand_augment")
    common.check_range(cfg, 1e-9, 1, "label_fraction crop_min")
    if cfg.eval_only and cfg.resume:
        raise BadInput(f"--eval_only: writes a results.json of its own, and leaves the run in --out {cfg.out} alone; choose another --out, without --resume")
    if cfg.lm and not cfg.beam:
        raise BadInput(f"--lm {cfg.lm}: only the beam search asks it; add --beam 50 or so")
    if cfg.predict and (cfg.beam or cfg.lm):
        raise BadInput("--beam, --lm: --predict takes the best letter of each frame, which tells the times; decode with a beam by --eval_only")
    if cfg.head_lr and not cfg.lr:
        raise BadInput(f"--head_lr {cfg.head_lr}: follows the schedule of --lr, which is 0; freeze the encoder by --freeze_steps instead")
    training = not (cfg.eval_only or cfg.predict)
    if cfg.goal in ("letters", "sounds"):
        common.check_range(cfg, 0, 1, "mixup")
        common.check_range(cfg, audio.MIN_SAMPLES / audio.RATE, math.inf, "max_seconds")
        if cfg.max_samples < cfg.max_seconds * audio.RATE:
            raise BadInput(f"--max_samples {cfg.max_samples}: must be at least --max_seconds {cfg.max_seconds} x {audio.RATE} samples")
        count = max(1, round(cfg.global_batch * audio.RATE / cfg.max_samples))
        if training and count % world:
            raise BadInput(f"--global_batch {cfg.global_batch}: {count} micro-batches of --max_samples {cfg.max_samples} do not split among {world} processes; change one of them")  # fmt: skip
        return count // world
    count = math.ceil(cfg.global_batch / (world * (cfg.micro_batch or cfg.global_batch)))
    if training and cfg.global_batch % (world * count):
        raise BadInput(f"--global_batch {cfg.global_batch}: does not split into {world} processes x {count} micro-batches; take a multiple of {world * count}")  # fmt: skip
    return count


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="finetune")
    place = common.start_processes(cfg.device, cfg.dtype)  # rank, number of processes, device, autocast
    if cfg.predict or cfg.eval_only:
        about = convert.read(cfg.init) if cfg.init != "none" else {}
        if "classes" not in about:
            raise BadInput(f"--init {cfg.init}: not a fine-tuned checkpoint, so it can name nothing; fine-tune it first, then give best.pt")
        if about.get("goal", "images") not in KINDS:
            raise BadInput(f"--init {cfg.init}: fine-tuned for {about['goal']}, whose mean over time is not taken here; fine-tune it anew")
        cfg = replace(cfg, goal=about.get("goal", "images"), task=cfg.task or about.get("finetune", {}).get("task", ""))
    if cfg.goal == "sentences":
        cfg = replace(cfg, steps=cfg.steps or 1, global_batch=cfg.global_batch or 1) if cfg.predict else paper_values(cfg)
    if cfg.sweep:
        return sweep(cfg, place)
    train(cfg, place)


def train(cfg: Config, place: tuple[int, int, torch.device, torch.autocast]) -> None:
    """One run: fine-tune, or evaluate, or predict."""
    rank, world, device, _ = place
    accumulation = check(cfg, world)
    torch.manual_seed(cfg.seed)
    if cfg.predict:
        return predict(cfg, place) if rank == 0 else None

    # ---- the run's folder, and what is already there
    stored, bad, named = Path(cfg.out, "ckpt.pt"), set(), set()  # bad: "file: what is wrong with it"
    resuming = cfg.resume and stored.exists()
    start = replace(cfg, init=str(stored)) if resuming else cfg
    state = read(start)  # before the data: its message is the better one for a checkpoint of another kind
    task = labels.TASKS[cfg.goal](cfg, lambda classes: build(start, classes, state), place, accumulation, bad)
    folder, model = Path(cfg.out), task.model
    if resuming and (state["goal"], state["finetune"].get("task", ""), state["classes"]) != (cfg.goal, cfg.task, task.classes):
        theirs = f"{state['finetune'].get('task') or state['goal']} with classes {', '.join(state['classes'][:4])}"
        raise BadInput(f"{stored}: a run of {theirs}, not of what this command trains for; choose another --out")

    if cfg.compile and cfg.goal in ("images", "sentences"):
        model.encoder.compile()
    elif cfg.compile:
        model.encoder.transform = torch.compile(model.encoder.transform, dynamic=True)
    if cfg.eval_only:
        common.open_run(cfg.out, asdict(cfg), cfg.resume, rank)
        scores, bad = task.evaluate(), set().union(*common.gather(bad))
        if rank == 0:
            for line in some(bad):
                print(f"skipped {line}")
            common.save(folder / "results.json", scores | {"skipped_files": len(bad), "peak_memory_gb": common.peak_memory_gb(device)})
            print(show(scores))
        return
    pretrained = cfg.init != "none" and cfg.init_from != "random"
    if cfg.goal in ("letters", "sounds") and cfg.freeze_convs and pretrained:
        for part in ("convs", "norms"):
            model.encoder.embed.content[part].requires_grad_(False)

    # ---- optimiser: a layer learns layer_decay times as fast as the one above it (Bao et al. 2021)
    groups, top = {}, len(model.encoder.blocks) + 1  # of the model alone, so that a resumed run may have other values
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and not name.endswith(("table", "learned"))
            groups.setdefault((layer_of(name, top - 1), decays, name.startswith("encoder.")), []).append(p)
    values = [
        {
            "scale": cfg.layer_decay ** (top - layer) if inside or not cfg.head_lr else cfg.head_lr / cfg.lr,
            "weight_decay": decays * cfg.weight_decay,
        }
        for layer, decays, inside in groups
    ]
    optimizer = torch.optim.AdamW(
        [{"params": p} | v for p, v in zip(groups.values(), values)], lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6 if cfg.goal == "sentences" else 1e-8,
        fused=True,
    )  # fmt: skip
    step, best, row, state = 0, {}, {"seconds": 0.0}, task.state
    torch.manual_seed(cfg.seed * 1000 + rank)  # from here on for drop path and dropout, which differ between processes
    if resuming:
        convert.load_into(model, state["student"], stored)  # strictly: this image size, these classes
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise BadInput(f"{stored}: its optimizer is of other options ({error})") from None
        for group, value in zip(optimizer.param_groups, values):
            group |= value  # this command's layer_decay and weight_decay, not the file's
        common.rng_state(device, restore=state["rng"][rank] if rank < len(state["rng"]) else None)
        step, best, row = state["step"], state["best"], state["row"]
        bad |= set(state["bad"])
    common.open_run(cfg.out, asdict(cfg), cfg.resume, rank)  # now that the checkpoint fits: a refused command changes nothing
    metrics = common.open_metrics(folder, step) if rank == 0 else None
    ddp = DistributedDataParallel(model, find_unused_parameters=cfg.goal in ("letters", "sounds")) if world > 1 else model

    # ---- the loop
    batches = task.batches(step)
    batches = itertools.chain([next(batches, None)], batches)  # if nothing can be read, say so before the bar
    bar = tqdm(total=cfg.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    started, mark, seen = time.time() - row["seconds"], time.time(), 0
    while step < cfg.steps:
        step += 1
        lr = lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        model.frozen = step <= cfg.freeze_steps and pretrained
        micro_batches = [next(batches) for _ in range(accumulation)]
        weights, examples = zip(*(task.weigh(batch) for batch in micro_batches))
        whole, seen = torch.tensor(sum(weights), device=device, dtype=torch.float32), seen + sum(examples) * world
        if world > 1:
            dist.all_reduce(whole)
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(micro_batches):
            rng = np.random.default_rng([cfg.seed, step, i * world + rank, 1])
            with contextlib.nullcontext() if i == accumulation - 1 or world == 1 else ddp.no_sync():
                share = task.loss(ddp, batch, rng) / whole
                (share * world).backward()  # DDP takes the mean over processes; this makes it their sum
            loss += share.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        bar.update()
        probe_now = step == cfg.steps or (cfg.probe_every and step % cfg.probe_every == 0)
        save_now = step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0)
        if not (probe_now or save_now or step == 1 or step % cfg.log_every == 0):
            continue
        if world > 1:
            dist.all_reduce(loss)
        row = {"step": step, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item(), "seconds": time.time() - started}
        row["samples_per_s"] = seen / (time.time() - mark)
        bar.set_postfix_str("loss {loss:.3f}, lr {lr:.1e}, {samples_per_s:.0f} ".format(**row) + f"{task.examples.split()[1]}/s")
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            bar.close()
            raise SystemExit(f"step {step}: the loss is not finite; try a smaller --lr or --dtype float32" if rank == 0 else 1)
        saved = {"student": model.state_dict(), "teacher": None, "config": state["config"], "classes": task.classes, "goal": cfg.goal, "finetune": asdict(cfg)} | task.extra  # fmt: skip
        if probe_now:
            row |= (scores := task.evaluate())
            if better(scores, best, task):
                best = scores | {"best_step": step}
                if rank == 0:
                    common.save(folder / "best.pt", saved | {"step": step})
            bar.write(f"step {step}: {show(scores)}") if rank == 0 else None
        if rank == 0:
            print(json.dumps(row), file=metrics)
            for line in some(bad - named):
                bar.write(f"skipped {line}")
            named |= bad
        if save_now:
            rng_states = common.gather(common.rng_state(device))
            if rank == 0:
                common.save(folder / "ckpt.pt", saved | {
                    "optimizer": optimizer.state_dict(), "step": step, "rng": rng_states, "best": best, "row": row,
                    "bad": sorted(bad),
                })  # fmt: skip
        mark, seen = time.time(), 0
    bar.close()
    if task.metric not in row:  # resumed at its last step
        row |= (scores := task.evaluate())
        best = scores | {"best_step": step} if better(scores, best, task) else best

    bad = set().union(*common.gather(bad))
    if rank == 0:
        for line in some(bad - named):  # met by other processes
            print(f"skipped {line}")
        results = {"seconds": row["seconds"], "peak_memory_gb": common.peak_memory_gb(device), "final_loss": row["loss"]}
        results |= {k: row[k] for k in best if k != "best_step"} | {f"best_{k}": v for k, v in best.items() if k != "best_step"}
        count, unit = task.examples.split()
        common.save(folder / "results.json", results | {"best_step": best["best_step"], unit: int(count), "skipped_files": len(bad)})
        print(f"{count} labelled {unit}, {cfg.steps} steps in {row['seconds']:.0f} s: {task.metric} {row[task.metric]:.4f} at the end, "
              f"{best[task.metric]:.4f} at step {best['best_step']}; {folder}/results.json, best.pt, ckpt.pt")  # fmt: skip


def better(scores: dict, best: dict, task: labels.Task) -> bool:
    return not best or (scores[task.metric] < best[task.metric] if task.lower else scores[task.metric] > best[task.metric])


def some(bad: set[str], most: int = 10) -> list[str]:
    lines = sorted(bad)
    return lines[:most] + [f"{len(lines) - most} more"] * (len(lines) > most)


def show(scores: dict) -> str:
    return ", ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items())


def layer_of(name: str, depth: int) -> int:
    """0 for the embedding, 1 .. depth for the blocks, depth + 1 for the head and the shared position table."""
    if name.startswith("encoder.blocks."):
        return 1 + int(name.split(".")[2])
    return 0 if name.startswith("encoder.") and not name.endswith("table") else depth + 1


# ---- the network ------------------------------------------------------------------------------------------------------

KINDS = {  # the script that pre-trains it, what a checkpoint of it is known by, its name
    "images": (train_vision, "patch", "images"), "letters": (train_speech, "channels", "recordings"),
    "sounds": (train_speech, "channels", "recordings"), "sentences": (train_text, "vocabulary", "text"),
}  # fmt: skip


def read(cfg: Config) -> dict:
    """What --init holds, or the options of --model. Raises BadInput if it is not for this goal."""
    script, mark, kind = KINDS[cfg.goal]
    if cfg.init != "none":
        state = convert.read(cfg.init)
        if mark not in state | state["config"]:
            lacking = ", or one without its vocabulary (put vocab.json and merges.txt beside it)" if kind == "text" else ""
            raise BadInput(f"--init {cfg.init}: not a model of {kind}{lacking}; --preset {cfg.preset} is for {cfg.goal}")
        return state
    if cfg.goal == "sentences":
        raise BadInput("--init none: a text model needs a vocabulary; give a checkpoint, and --init_from random for random weights")
    if cfg.model not in script.PRESETS:
        raise BadInput(f"--model {cfg.model}: no preset of {script.__name__}.py; choose from {', '.join(script.PRESETS)}")
    return {"config": script.PRESETS[cfg.model]}


def build(cfg: Config, classes: list[str] | None = None, state: dict | None = None) -> tuple[torch.nn.Module, dict, list[str]]:
    """The encoder of --init, or of --model, under a head -> model, what the file says, the classes of its outputs in order.

    A fine-tuned file keeps its head when it is for the same classes; None asks for just such a file. state: what read() gave.
    """
    (script, _, kind), state = KINDS[cfg.goal], state or read(cfg)
    arch = asdict(script.Config())
    arch |= {name: value for name, value in state["config"].items() if name in arch}
    pool_cls = "classes" in state and state["config"].get("pool_cls", False)  # how a fine-tuned model of other origin may look
    grids = [convert.patch_grid(arch)] if kind == "images" else []
    if cfg.image_size and kind == "images":
        if cfg.image_size % arch["patch"]:
            raise BadInput(f"--image_size {cfg.image_size}: not a multiple of the model's patch of {arch['patch']} pixels")
        arch |= {"image_size": cfg.image_size, "image_width": cfg.image_size}
    grids += [convert.patch_grid(arch)] if kind == "images" else []

    tuned = state.get("classes") if state.get("goal", "images") == cfg.goal else None
    if tuned and classes and tuned == [str(i) for i in range(len(classes))]:
        tuned = classes  # a released file numbers its classes, in the order of their sorted names
    keep = tuned is not None and (classes in (None, tuned) or cfg.goal == "letters" or cfg.goal == "sounds" and sorted(classes) == sorted(tuned))  # fmt: skip
    if cfg.eval_only and not keep:
        raise BadInput(f"{cfg.data}: its classes are not those of {cfg.init}; see {sorted(set(classes) ^ set(tuned or []))[:4]}")
    classes = tuned if keep else classes

    own = {name: getattr(cfg, name) for name in ("drop_path", "layer_drop", "dropout", "attn_dropout", "ffn_dropout")}
    wanted = script.Config(**arch | {name: value for name, value in own.items() if name in arch})
    if kind == "images":
        model = Classifier(script.build(wanted).encoder, len(classes), pool_cls)
    elif kind == "recordings":
        model = Recogniser(script.build(wanted).encoder, len(classes), cfg.head_dropout)
    else:
        vocabulary = text.Vocabulary.parse(state["vocabulary"])
        model = SentenceClassifier(script.build(wanted, vocabulary.size).encoder, len(classes), cfg.head_dropout)
    if cfg.init != "none" and (cfg.init_from != "random" or "classes" in state):
        weights = state["teacher" if cfg.init_from == "teacher" and "classes" not in state else "student"]
        if weights is None:
            raise BadInput(f"--init {cfg.init}: holds no teacher; take --init_from student")
        if not keep:  # only the encoder serves, without what pre-training alone needs
            fresh = model.state_dict()
            left = [name for name in weights if name.startswith(("encoder.norm.", "encoder.mask_embedding")) and name not in fresh]
            weights = {name: value for name, value in weights.items() if name.startswith("encoder.") and name not in left}
            weights |= {name: value for name, value in fresh.items() if not name.startswith("encoder.")}
        convert.load_into(model, weights, cfg.init, *grids)
    return model, state | {"config": arch | ({"pool_cls": True} if pool_cls else {})}, classes


# ---- sentences: the paper's values, the sweep -----------------------------------------------------------------------------


def paper_values(cfg: Config) -> Config:
    """Steps and batch of a GLUE task where the options say 0 (SPEC section 5; Liu et al. 2019); of one of yours, 10 epochs."""
    if not cfg.task:
        raise BadInput(f"--task: which one? {', '.join(glue.TASKS)}, or a folder of yours in --data")
    name = {known.lower(): known for known in glue.TASKS}.get(cfg.task.lower(), cfg.task)
    steps, batch = glue.RECIPES.get(name, (0, 32))
    cfg = replace(cfg, task=name, global_batch=cfg.global_batch or batch, steps=cfg.steps or steps or int(cfg.eval_only))
    if not cfg.steps:
        rows = len(glue.open_task(cfg.data, name)[1]["train"].rows)
        cfg = replace(cfg, steps=math.ceil(10 * rows * cfg.label_fraction / cfg.global_batch))
    return cfg


def sweep(cfg: Config, place) -> None:
    """--lrs x --seeds runs in folders of --out, then results.json and table.md: mean and std over seeds of the last step."""
    if cfg.goal != "sentences" or cfg.eval_only or cfg.predict:
        raise BadInput("--sweep: trains, on sentences; run finetune.py once for each value instead, and --eval_only or --predict without it")
    common.check_range(cfg, 1, math.inf, "seeds")
    try:
        lrs = [float(lr) for lr in cfg.lrs]
    except ValueError:
        lrs = []
    if not all(0 < lr < math.inf for lr in lrs) or len(set(lrs)) < len(cfg.lrs):
        raise BadInput(f"--lrs {' '.join(cfg.lrs)}: must be numbers above 0, each once")
    folder, table, metrics = common.open_run(cfg.out, asdict(cfg), cfg.resume, place[0]), {}, ()
    for name, lr in zip(cfg.lrs, lrs):
        runs = []
        for seed in range(cfg.seeds):
            out = folder / f"lr{name}-seed{seed}"
            try:
                if not (cfg.resume and (out / "results.json").exists()):
                    train(replace(cfg, sweep=False, lr=lr, seed=seed, out=str(out)), place)
            except SystemExit as end:  # of every process: the loss is not finite
                print(f"{out}: {end}; left out of the table") if place[0] == 0 else None
                break
            common.gather(None)  # rank 0 writes the results
            runs.append(json.loads((out / "results.json").read_text()))
        if len(runs) == cfg.seeds:
            metrics = [key for key in runs[0] if key.startswith(tuple(glue.METRICS))]
            table[name] = {key: (float(np.mean([run[key] for run in runs])), float(np.std([run[key] for run in runs]))) for key in metrics}
    if not table:
        raise SystemExit(f"{folder}: no learning rate of --lrs {' '.join(cfg.lrs)} has a finite loss; try smaller ones" if place[0] == 0 else 1)
    if place[0] == 0:
        best = max(table, key=lambda name: table[name][metrics[0]][0])
        lines = [f"| {cfg.task}, lr | " + " | ".join(metrics) + " |", "|---:|" + "---|" * len(metrics)]
        lines += [f"| {name} | " + " | ".join(f"{m:.4f} +- {d:.4f}" for m, d in row.values()) + " |" for name, row in table.items()]
        (folder / "table.md").write_text("\n".join(lines) + "\n")
        common.save(folder / "results.json", {k: m for k, (m, _) in table[best].items()} | {"best_lr": float(best), "seeds": cfg.seeds, "table": table})
        print("\n".join(lines) + f"\n{folder}/results.json, table.md: mean and std of {cfg.seeds} seeds; best at lr {best}")


# ---- use it --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(cfg: Config, place) -> None:
    """One line a file: its path, then up to five classes with their probabilities, or what is said and when."""
    _, _, device, autocast = place
    model, state, classes = build(cfg)
    model.to(device).eval()
    vocabulary = text.Vocabulary.parse(state["vocabulary"]) if cfg.goal == "sentences" else None

    def read(path):  # -> (1, ...), what the model takes
        if cfg.goal == "images":
            picture = images.center_crop(images.load_image(path), model.encoder.embed.image_size)
            return images.normalise(images.to_tensor(picture)[None].to(device))
        if cfg.goal == "sentences":
            parts = path.split("\t")
            wanted = state.get("parts", min(len(parts), 2))  # a file of before that was kept takes both
            if not all(map(str.strip, parts)) or len(parts) != wanted:
                raise BadInput(f"this model reads {('one sentence', 'two sentences with a tab between them')[wanted - 1]}")
            return torch.tensor([glue.sentence_ids(vocabulary, *parts, max_tokens=state["config"]["max_tokens"])], device=device)
        return torch.from_numpy(audio.normalise(audio.load_audio(path)))[None].to(device)

    readable = 0
    for path in cfg.predict:
        try:
            x = read(path)
        except (images.BadImage, audio.BadAudio, BadInput) as error:
            print(f"{path}: skipped, {error}")
            continue
        readable += 1
        with autocast:
            result = model(x)
        if cfg.goal == "letters":
            frame_s = math.prod(conv.stride[0] for conv in model.encoder.embed.content["convs"]) / audio.RATE
            said, times = letters.decode_greedy(result[0][0].float().log_softmax(-1), classes, frame_s=frame_s)
            answer = " ".join(f"{word} ({a:.2f}-{b:.2f} s)" for word, (a, b) in zip(said.split(), times))
        elif classes == ["score"]:
            answer = f"{result.item():.3f}"
        else:
            probabilities = linear_softmax(*result)[0] if cfg.goal == "sounds" else result.float().softmax(-1)[0]
            top = probabilities.topk(min(5, len(probabilities)))
            answer = ", ".join(f"{classes[i]} {p:.3f}" for p, i in zip(top.values.tolist(), top.indices.tolist()))
        print(f"{path}: {answer}")
    if not readable:
        kind = {"images": "is a picture", "sentences": "is a sentence"}.get(cfg.goal, "is a recording")
        raise BadInput(f"--predict: none of these {kind} that can be read")


if __name__ == "__main__":
    common.run(main)
