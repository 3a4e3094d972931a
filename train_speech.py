"""Pre-train data2vec on speech, from the waveform (Baevski et al. 2022, section 4.2).

    python train_speech.py                                                  # smoke test: made speech, laptop CPU
    python train_speech.py --preset digits --data DIR                       # DIR/{train,dev}/SPEAKER/CHAPTER/*.flac
    torchrun --nproc_per_node=8 train_speech.py --preset base --data DIR    # LibriSpeech: DIR/{train,dev}-*/
"""

import contextlib
import functools
import itertools
import json
import math
import re
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
from data import audio, letters
from masking import span_mask
from model import Student, Teacher, convolutions, regression_head, speech_encoder
from targets import explained, feature_std, fit_ctc, regression_loss, show, tau_at, top_k_average, unhealthy
from tools import convert


@dataclass
class Config:
    preset: str = option("smoke", "named set of values for the options below")
    # run
    data: str = option("", "folder of recordings or manifests (see data/audio.py); empty: speech made on the spot, no download")
    train: list = option([], "splits of --data to train on; none: train/, else all train-*/, else train.tsv, else the whole folder")
    valid: list = option([], "held-out splits; none: dev/, valid/ or val/, else all dev-*/, else every 20th utterance")
    out: str = option("", "folder of this run; a run that is there already is only continued, never overwritten")
    resume: bool = option(False, "continue the run in --out from its ckpt.pt")
    init: str = option("", "checkpoint to start from instead of random weights; the schedule starts at 0")
    init_teacher: str = option("teacher", "with --init, the teacher is the file's teacher or a copy of its student", ("teacher", "student"))
    steps: int = option(1000, "optimiser steps (updates); all schedules end here")
    global_batch: int = option(64, "seconds of audio an update, whatever the number of processes; rounded to whole micro-batches")
    max_samples: int = option(512_000, "most samples (16,000 a second) of a micro-batch: what a process holds at once")
    min_seconds: float = option(0.0, "shorter utterances are left out")
    max_seconds: float = option(20.0, "longer utterances are cropped at random to this")
    pad: bool = option(False, "pad a micro-batch to its longest utterance instead of cropping to its shortest (the paper's way)")
    seed: int = option(0, "seed of weights, order, crops and masks")
    device: str = option("auto", "auto takes the GPU if there is one", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "autocast; auto is bfloat16 where the hardware has it", ("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile both Transformers (a minute at the start, then faster on a GPU)")
    workers: int = option(2, "data-loading processes for each training process; 0 loads in the loop")
    log_every: int = option(10, "steps between metric lines")
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    probe_every: int = option(1000, "steps between evaluations (explained, CTC probe); 0: only start and end")
    probe_utterances: int = option(200, "transcribed training utterances to fit the probe on")
    eval_utterances: int = option(100, "held-out utterances for explained and the probe")
    # model: small values of these make the small presets
    channels: int = option(64, "width of the 7 convolutions that make 50 frames a second; most of the time goes there")
    convs: list = option([], "those convolutions one by one, each as channels,kernel,stride; none: as in the paper, of that width")
    dim: int = option(128, "width D")
    depth: int = option(4, "layers L")
    heads: int = option(4, "attention heads; dim must be a multiple")
    ffn: int = option(512, "hidden width of the FFN")
    pos_depth: int = option(5, "position convolutions")
    pos_width: int = option(95, "frames that they see together; each has a kernel of pos_width / pos_depth")
    pos_groups: int = option(16, "groups of the position convolutions; dim must be a multiple")
    norm_eps: float = option(1e-5, "epsilon of the layer norms; weights from elsewhere may want another")
    dropout: float = option(0.0, "dropout of the student's embedding and of both branches")
    attn_dropout: float = option(0.0, "dropout on the student's attention weights")
    ffn_dropout: float = option(0.0, "dropout inside the student's FFNs")
    layer_drop: float = option(0.0, "probability that the student skips a layer")
    deep_norm: bool = option(False, "DeepNorm: larger residuals, smaller initial weights (the paper's AudioSet model)")
    # data2vec
    mask_p: float = option(0.65, "share of frames to hide if spans never met; about 45 % are hidden at .65")
    mask_span: int = option(10, "frames of 20 ms in a span; short spans let neighbours give the answer away")
    target: str = option("ffn", "which output of a layer is a_l", ("block", "ffn", "ffn_residual", "attention"))
    top_k: int = option(8, "layers averaged into the target, from the top")
    norm: str = option("instance", "normalisation of each a_l: over features, over the utterance's frames, or none (collapses)", ("layer", "instance", "none"))
    final_norm: str = option("none", "normalisation of their mean", ("layer", "instance", "none"))
    window: int = option(0, "> 0: the teacher attends only to frames at most this far away (ablation of the context)")
    share_positions: bool = option(True, "the teacher uses the student's position convolutions; false: their average, as released")
    beta: float = option(0.0, "smooth L1 turns from square to absolute here; 0: squared error")
    tau_0: float = option(0.999, "teacher momentum at the start; too low collapses, too high stands still")
    tau_e: float = option(0.9999, "teacher momentum from step tau_n on")
    tau_n: int = option(30_000, "steps over which tau rises")
    # optimiser
    lr: float = option(5e-4, "peak learning rate")
    schedule: str = option("tri_stage", "after the warm-up: hold and then decay exponentially, or a cosine", ("tri_stage", "cosine"))
    warmup: float = option(0.03, "share of the steps for linear warm-up; too short and a large lr diverges")
    decay: float = option(0.07, "tri_stage: share of the steps for the decay at the end")
    final_scale: float = option(0.01, "learning rate at the last step, as a share of lr")
    weight_decay: float = option(0.01, "on all weights, as released")
    beta2: float = option(0.98, "Adam's second-moment decay")
    clip: float = option(0.0, "largest gradient norm; 0: no clipping")
    # collapse guard (released speech code)
    guard_after: int = option(5000, "from this step on a collapsed run stops; -1: never")
    min_target_std: float = option(0.1, "collapsed if the targets' std over frames falls below")
    min_pred_std: float = option(0.01, "collapsed if the predictions' std over frames falls below")


BIG = dict(
    max_samples=3_800_000, workers=6, log_every=50, save_every=5000, probe_every=20_000, probe_utterances=1000, eval_utterances=500,
    min_seconds=2.0, channels=512, dropout=0.1, attn_dropout=0.1, layer_drop=0.05,
)  # fmt: skip
PRESETS = {
    # python train_speech.py: 2 CPU cores, see README for seconds and numbers
    "smoke": dict(
        steps=500, global_batch=16, max_samples=256_000, max_seconds=4.0, workers=0, probe_every=0, probe_utterances=100,
        channels=48, depth=3, top_k=3, pos_width=15, share_positions=False, guard_after=200,
        tau_0=0.99, tau_e=0.999, tau_n=300, lr=1e-3, warmup=0.1, decay=0.3, clip=3.0, beta2=0.99,
    ),
    # python train_speech.py --preset digits --data DIR: 2 CPU cores or any GPU, see README
    "digits": dict(
        steps=18_000, global_batch=16, max_samples=128_000, max_seconds=8.0, workers=1, log_every=50, save_every=1000, probe_every=4000,
        channels=64, dim=192, depth=6, heads=6, ffn=768, top_k=4, pos_width=15, share_positions=False, guard_after=5000,
        tau_e=0.9995, tau_n=3000, warmup=0.0125, decay=0.3, clip=3.0, beta2=0.99,
    ),
    # torchrun --nproc_per_node=16: LibriSpeech 960 h, 63 minutes of audio an update; paper 5.5 WER on test-other after
    # fine-tuning on all labels, with a 4-gram language model; not run here
    "base": BIG | dict(steps=400_000, global_batch=3780, dim=768, depth=12, heads=12, ffn=3072),
    # Libri-Light 60k h: no recipe is published, so this one is ours (base's, with a longer warm-up and less lr); not run here
    "large": BIG | dict(
        steps=400_000, global_batch=3780, max_samples=1_900_000, dim=1024, depth=24, heads=16, ffn=4096, lr=3e-4, warmup=0.08,
    ),
    # AudioSet, 94.5 minutes an update; paper 34.5 mAP on AudioSet-20K after fine-tuning; not run here
    "audioset": BIG | dict(
        steps=200_000, global_batch=5670, dim=768, depth=12, heads=12, ffn=3072, deep_norm=True, top_k=12, final_norm="layer",
        schedule="cosine", warmup=0.05, final_scale=0.0,
    ),
}  # fmt: skip


def lr_at(step: int, cfg: Config) -> float:
    """Linear warm-up to lr, then cosine, or hold and exponential decay, to final_scale * lr. step = 1 .. steps."""
    warmup, decay = round(cfg.warmup * cfg.steps), round(cfg.decay * cfg.steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    if cfg.schedule == "cosine":
        t = (step - warmup) / (cfg.steps - warmup)
        return cfg.lr * (cfg.final_scale + (1 - cfg.final_scale) * 0.5 * (1 + math.cos(math.pi * t)))
    t = max(0, step - (cfg.steps - decay)) / max(decay, 1)
    return cfg.lr * cfg.final_scale**t


def check(cfg: Config, world: int) -> int:
    """Refuses values that cannot work. Returns the number of micro-batches that each process takes an update."""
    common.check_range(cfg, 1, math.inf, "steps global_batch log_every probe_utterances eval_utterances channels dim depth heads ffn pos_depth pos_width pos_groups mask_span top_k")  # fmt: skip
    common.check_range(cfg, 0, math.inf, "seed workers save_every probe_every min_seconds tau_n window beta lr weight_decay clip")
    common.check_range(cfg, 0, 1, "tau_0 tau_e warmup decay final_scale")
    common.check_range(cfg, 0, 0.9999, "dropout attn_dropout ffn_dropout layer_drop beta2")
    common.check_range(cfg, 1e-9, 1, "mask_p")
    if cfg.max_samples < cfg.max_seconds * audio.RATE:
        raise BadInput(f"--max_samples {cfg.max_samples}: must be at least --max_seconds {cfg.max_seconds} x {audio.RATE} samples")
    for name in ("heads", "pos_groups"):
        if cfg.dim % getattr(cfg, name):
            raise BadInput(f"--dim {cfg.dim} is not a multiple of --{name} {getattr(cfg, name)}")
    if cfg.top_k > cfg.depth:
        raise BadInput(f"--top_k {cfg.top_k}: the model has only --depth {cfg.depth} layers")
    if cfg.schedule == "tri_stage" and (cfg.warmup + cfg.decay > 1 or cfg.decay and not cfg.final_scale):
        raise BadInput(f"--warmup {cfg.warmup} --decay {cfg.decay} --final_scale {cfg.final_scale}: shares of the steps that overlap, or a decay to nothing")  # fmt: skip
    if wrong := [conv for conv in cfg.convs if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", conv)]:
        raise BadInput(f"--convs {wrong[0]}: not three whole numbers as in 512,10,5 (channels, kernel, stride)")
    common.check_range(cfg, receptive_field(cfg) / audio.RATE, math.inf, "max_seconds")
    count = max(1, round(cfg.global_batch * audio.RATE / cfg.max_samples))
    if count % world:
        raise BadInput(f"--global_batch {cfg.global_batch}: {count} micro-batches of --max_samples {cfg.max_samples} do not split among {world} processes; change one of them")  # fmt: skip
    return count // world


def receptive_field(cfg: Config) -> int:
    """Samples that a frame sees, without which there is none: 400 with the paper's convolutions."""
    return functools.reduce(lambda n, conv: (n - 1) * conv[2] + conv[1], reversed(convolutions(cfg.channels, cfg.convs)), 1)


def build(cfg: Config) -> Student:
    """The student of these options, with random weights. finetune.py builds the same encoder from a checkpoint's config."""
    encoder = speech_encoder(
        dim=cfg.dim, depth=cfg.depth, heads=cfg.heads, ffn=cfg.ffn, convs=convolutions(cfg.channels, cfg.convs),
        kernel=max(3, cfg.pos_width // cfg.pos_depth), pos_depth=cfg.pos_depth, groups=cfg.pos_groups, dropout=cfg.dropout,
        attn_dropout=cfg.attn_dropout, ffn_dropout=cfg.ffn_dropout, layer_drop=cfg.layer_drop, target=cfg.target, deep_norm=cfg.deep_norm,
        eps=cfg.norm_eps,
    )  # fmt: skip
    return Student(encoder, regression_head(cfg.dim))


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="speech")
    rank, world, device, autocast = common.start_processes(cfg.device, cfg.dtype)
    accumulation = check(cfg, world)

    # ---- data: a micro-batch is a function of (seed, its number), whatever the rank or worker
    if cfg.data:
        least = max(cfg.min_seconds, receptive_field(cfg) / audio.RATE)
        train, valid = audio.open_folder(cfg.data, cfg.train, cfg.valid, least, show=rank == 0)
    else:
        train, valid = audio.made_speech()
    if rank == 0:
        print(f"{len(train)} training utterances ({train.lengths.sum() / audio.RATE / 3600:.2f} h), {len(valid)} held-out")

    # ---- student, teacher, optimiser
    torch.manual_seed(cfg.seed)
    student = build(cfg).to(device)
    teacher = Teacher(student.encoder, ("embed.content",) + ("embed.positions",) * cfg.share_positions, cfg.window)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6, weight_decay=cfg.weight_decay, fused=True
    )

    # ---- the run's folder, and what is already there
    folder = Path(cfg.out)
    step, begin, row, bad, named = 0, None, {"seconds": 0.0}, {*train.bad, *valid.bad}, set()
    torch.manual_seed(cfg.seed * 1000 + rank)  # from here on for dropout and layer drop, which differ between processes
    resumed = cfg.resume and (folder / "ckpt.pt").exists()
    if source := folder / "ckpt.pt" if resumed else cfg.init:
        state = convert.read(source)
        if "classes" in state:
            raise BadInput(f"{source}: a fine-tuned model; pre-training goes on from a pre-trained checkpoint")
        if "channels" not in state["config"]:
            raise BadInput(f"{source}: not a model of recordings")
        convert.load_into(student, state["student"], source, fresh=state.get("fresh", ()))
        for name in ("heads", "convs", "deep_norm", "norm_eps"):  # the shapes of weights do not tell
            if (theirs := state["config"].get(name, getattr(Config(), name))) != getattr(cfg, name):
                raise BadInput(f"{source}: was trained with --{name} {theirs}; take the same")
        teacher.update(student.encoder, tau=0.0)  # a copy of the student
        if state["teacher"] and (resumed or cfg.init_teacher == "teacher"):
            convert.load_into(teacher, state["teacher"], source)
    if resumed:
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0] |= {"weight_decay": cfg.weight_decay, "betas": (0.9, cfg.beta2)}  # this command's, not the file's
        common.rng_state(device, restore=state["rng"][rank] if rank < len(state["rng"]) else None)
        step, begin, row, bad = state["step"], state["begin"], state["row"], bad | set(state["bad"])
    common.open_run(cfg.out, asdict(cfg), cfg.resume, rank)  # now that the checkpoint fits: a refused command changes nothing
    metrics = common.open_metrics(folder, step) if rank == 0 else None
    if cfg.compile:
        for network in (student.encoder, teacher.encoder):
            network.transform = torch.compile(network.transform, dynamic=True)
    ddp = DistributedDataParallel(student) if world > 1 else student

    # ---- batches: this process's share of the run's micro-batches from `step` on; held-out utterances with fixed masks
    longest, frames_of = round(cfg.max_seconds * audio.RATE), student.encoder.embed.frames

    def hide(lengths, rng):
        return span_mask(frames_of(lengths).numpy(), cfg.mask_p, cfg.mask_span, rng, equal=not cfg.pad)

    def count(batch):  # masked frames, frames, utterances, samples
        lengths = batch["lengths"]
        return torch.stack([batch["mask"].sum(), frames_of(lengths).sum(), torch.tensor(len(lengths)), lengths.sum()])

    def load(batches, keys):
        return DataLoader(batches, batch_size=None, sampler=keys, num_workers=cfg.workers, pin_memory=device.type == "cuda",
                          generator=torch.Generator())  # fmt: skip

    def fixed(utterances, limit, spoken=False):  # the same random subset at every call, short to long, one mask each
        texts = zip(utterances.transcripts, utterances.lengths)  # spoken: those with a transcript that are not to be cropped
        fit = [i for i, (text, n) in enumerate(texts) if not spoken or n <= longest and spoken_words(text)]
        part = utterances.part(np.sort(np.random.default_rng(cfg.seed).permutation(fit)[:limit]))
        lots = audio.epoch_batches(part.lengths, cfg.max_samples, 0, 0, longest, sort=True) if fit else []
        got = list(load(audio.Batches(part, 0, longest, spoken, hide), [(0, i, tuple(lot)) for i, lot in enumerate(lots)]))
        bad.update(line for batch in got for line in batch["bad"])
        return got, [part.transcripts[i] for batch in got for i in batch["indices"].tolist()]

    keys = audio.batches(train.lengths, cfg.max_samples, longest, cfg.seed, step, cfg.steps, accumulation * world, world, rank)
    batches = iter(load(audio.Batches(train, cfg.seed, longest, cfg.pad, hide), keys))
    if rank == 0:
        held_out, _ = fixed(valid, cfg.eval_utterances)
        labelled = [fixed(train, cfg.probe_utterances, spoken=True), fixed(valid, cfg.eval_utterances, spoken=True)]
        labelled = labelled if all(got for got, _ in labelled) else []
        begin = begin or evaluate(student, teacher, held_out, labelled, cfg, device, autocast)
        print(f"step 0: {show(begin)}" + ("" if labelled else "; no transcripts, so no probe"))

    # ---- the loop
    batches = itertools.chain([next(batches, None)], batches)  # if nothing can be read, say so before the bar
    bar = tqdm(total=cfg.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    started, mark, heard = time.time() - row["seconds"], time.time(), 0
    while step < cfg.steps:
        step += 1
        lr, tau = lr_at(step, cfg), tau_at(step, cfg.tau_0, cfg.tau_e, cfg.tau_n)
        optimizer.param_groups[0]["lr"] = lr
        micro_batches = [next(batches) for _ in range(accumulation)]
        counts = sum(count(batch) for batch in micro_batches).to(device)
        if world > 1:
            dist.all_reduce(counts)  # processes hide different numbers of frames: the loss is a mean over all of them
        positions, heard = counts[0], heard + counts
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(micro_batches):
            wave, mask, samples = (batch[name].to(device, non_blocking=True) for name in ("source", "mask", "lengths"))
            bad.update(batch["bad"])
            with contextlib.nullcontext() if i == accumulation - 1 or world == 1 else ddp.no_sync():
                # ---- data2vec, in four lines (the mask was drawn with the batch) ----------------------------------
                with autocast:  # the convolutions run once: the teacher goes on from the student's content x (B, T, D)
                    f, x, valid_frames = ddp(wave, mask, samples if cfg.pad else None, content=True)  # f (M, D)
                    y = top_k_average(teacher(x, valid_frames, content=True), cfg.top_k, cfg.norm, cfg.final_norm)  # (B, T, D)
                share = regression_loss(f, y[mask], cfg.beta, scale=cfg.dim**-0.5) / positions
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
        meters = torch.stack([loss * world, feature_std(y[mask]), feature_std(f)]) / world
        if world > 1:
            dist.all_reduce(meters)
        (masked, frames, utterances, samples), seconds = heard.tolist(), time.time() - mark
        row = {"step": step} | dict(zip(("loss", "target_std", "pred_std"), meters.tolist())) | {"masked": masked / frames}
        row |= {"tau": tau, "lr": lr, "grad_norm": grad_norm.item(), "audio_s_per_s": samples / audio.RATE / seconds}
        row |= {"samples_per_s": utterances / seconds, "seconds": time.time() - started}
        bar.set_postfix_str("loss {loss:.3f}, std y {target_std:.2f} f {pred_std:.2f}, masked {masked:.2f}, tau {tau:.4f}, lr {lr:.1e}, {audio_s_per_s:.0f} s audio/s".format(**row))  # fmt: skip
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
        mark, heard = time.time(), 0
    bar.close()
    if rank == 0 and "explained" not in row:  # resumed at its last step
        row |= evaluate(student, teacher, held_out, labelled, cfg, device, autocast)

    bad = set().union(*common.gather(bad))
    if rank == 0:
        for line in sorted(bad - named):  # met by other processes
            print(f"skipped {line}")
        results = {"seconds": row["seconds"], "peak_memory_gb": common.peak_memory_gb(device), "final_loss": row["loss"]}
        begin = {name: value for name, value in begin.items() if name in row}  # resumed with other data, there may be no probe
        results |= {f"{name}_start": value for name, value in begin.items()} | {f"{name}_end": row[name] for name in begin}
        common.save(folder / "results.json", results | {"skipped_files": len(bad)})
        print(f"{cfg.steps} steps in {row['seconds']:.0f} s; {folder}/results.json, metrics.jsonl, ckpt.pt")
        for name, value in begin.items():
            print(f"  {name:18} {value:.3f} -> {row[name]:.3f}")


# ---- does it learn? -----------------------------------------------------------------------------------------------


def spoken_words(text: str) -> str:
    return letters.clean(text.replace("|", " "))[0]  # "|" is the probe's own sign, between words


@torch.no_grad()
def evaluate(student, teacher, held_out, labelled, cfg, device, autocast) -> dict[str, float]:
    """How much of the targets the student predicts, and how well letters can be read off frozen features.

    held_out   batches, cropped alike, with fixed masks, for explained
    labelled   (padded batches, transcripts) to fit the probe on and another such pair to measure it on; or empty
    returns    explained, and with transcripts probe and teacher_probe: 1 - character error rate, at least 0, of a linear
               layer on the frozen frames that is trained by CTC
    """
    student.eval()

    def pairs():
        for batch in held_out:
            wave, mask = batch["source"].to(device), batch["mask"].to(device)
            with autocast:
                f, x, _ = student(wave, mask, content=True)
                y = top_k_average(teacher(x, content=True), cfg.top_k, cfg.norm, cfg.final_norm)
            yield f, y, mask

    def features(encoder, batches):  # (T, D) of each utterance
        for batch in batches:
            samples = batch["lengths"].to(device)
            with autocast:
                x, _ = encoder(batch["source"].to(device), None, samples)
            yield from (u[:n].float() for u, n in zip(x, encoder.embed.frames(samples).tolist()))

    numbers = {"explained": explained(pairs(), by_position=False)}
    if labelled:
        (fit, said), (test, reference) = labelled
        said, reference = ([spoken_words(text) for text in texts] for texts in (said, reference))
        alphabet = ["<blank>", "|", *sorted(set("".join(said + reference)) - {" "})]  # whatever the transcripts hold
        for prefix, encoder in (("", student.encoder), ("teacher_", teacher.encoder)):
            probe = fit_ctc(list(features(encoder, fit)), [letters.encode(text, alphabet) for text in said], len(alphabet))
            guess = [letters.decode_greedy(probe(x), alphabet)[0] for x in features(encoder, test)]
            numbers[prefix + "probe"] = max(0.0, 1 - letters.cer(zip(reference, guess)).rate)
    student.train()
    return numbers


if __name__ == "__main__":
    common.run(main)
