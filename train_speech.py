"""Pre-train data2vec on speech, from the waveform (Baevski et al. 2022, section 4.2).

python train_speech.py                                                  # synthetic speech, laptop CPU
python train_speech.py --preset digits --data DIR                       # DIR/{train,dev}/**/*.flac
torchrun --nproc_per_node=8 train_speech.py --preset base --data DIR    # LibriSpeech: DIR/{train,dev}-*/
"""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

import common
import model2
from common import RunConfig, due, option
from data import audio
from data.sampling import loader
from masking import exact_blocks, span_mask
from model import Encoder, Student, Teacher, WaveEmbed, init_post_norm
from targets import NORMS, feature_std, regression_loss, tau_at, top_k_average
from tools import convert, probes

CONVS = ((10, 5),) + 4 * ((3, 2),) + 2 * ((2, 2),)  # kernel, stride: 16,000 samples -> 50 frames a second


@dataclass
class Config(model2.Options2, RunConfig):
    train: list = option([], "splits of --data to train on; default: train, train-*, train.tsv or all")
    valid: list = option([], "held-out splits; default: dev, valid, val or every 20th utterance")
    init_teacher: str = option("teacher", "network of --init to start from", ("teacher", "student"))
    batch_seconds: int = option(64, "seconds of audio per update, in whole micro-batches", min_=1)
    max_samples: int = option(512_000, "samples per micro-batch, at most (16,000 a second)", min_=400)
    min_seconds: float = option(0.0, "shorter utterances are left out", min_=0)
    max_seconds: float = option(20.0, "longer utterances are cropped at random", min_=0.025)
    pad: bool = option(False, "pad micro-batches to the longest utterance; default: crop to the shortest")
    # model
    channels: int = option(64, "width of the 7 convolutions; most compute", min_=1)
    dim: int = option(128, "width D", min_=1)
    depth: int = option(4, "layers L", min_=1)
    heads: int = option(4, "attention heads", min_=1)
    ffn: int = option(512, "hidden width of the FFN", min_=1)
    pos_depth: int = 5  # position convolutions
    pos_width: int = option(95, "sum of their kernels, in frames", min_=1)
    dropout: float = option(0.0, "dropout of the student's embedding and branches", min_=0, max_=0.99)
    attn_dropout: float = option(0.0, "dropout of the student's attention weights", min_=0, max_=0.99)
    layer_drop: float = option(0.0, "probability that the student skips a layer", min_=0, max_=0.99)
    deep_norm: bool = option(False, "DeepNorm (the paper's AudioSet model)")
    ffn_dropout: float = 0.0  # fine-tuning sets it
    pos_groups: int = 16
    norm_eps: float = 1e-5
    # data2vec
    mask_p: float = option(0.65, "fraction to hide without overlaps: paper's p x span", min_=0.001, max_=1)
    mask_span: int = option(10, "frames of 20 ms in a span; short: too easy", min_=1)
    target: str = option("ffn", "layer output that is a_l", ("block", "ffn", "ffn_residual", "attention"))
    top_k: int = option(8, "layers averaged into the target, from the top", min_=1)
    norm: str = option("instance", "normalisation of each a_l; needed (see RESULTS.md)", tuple(NORMS))
    final_norm: str = option("none", "normalisation of their mean", tuple(NORMS))
    window: int = option(0, "> 0: the teacher attends at most so many frames away", min_=0)
    share_positions: bool = option(True, "the teacher has the student's position convolutions")
    beta: float = option(0.0, "where smooth L1 turns linear; 0: squared error", min_=0)
    tau_0: float = option(0.999, "teacher momentum at the start; too low: collapse", min_=0, max_=1)
    tau_e: float = option(0.9999, "teacher momentum from step tau_n on", min_=0, max_=1)
    tau_n: int = option(30_000, "steps over which tau rises", min_=0)
    guard_after: int = option(5000, "from this step on a collapsed run stops; -1: never", min_=-1)
    # optimiser
    lr: float = option(5e-4, "peak learning rate", min_=0)
    schedule: str = option("tri_stage", "hold, then decay; or a cosine", ("tri_stage", "cosine"))
    warmup: float = option(0.03, "fraction of the steps; too short: divergence", min_=0, max_=1)
    decay: float = 0.07  # tri_stage: fraction of the steps for the final decay
    final_scale: float = 0.01  # learning rate at the last step, as a fraction of lr
    weight_decay: float = option(0.01, "on all weights, as released", min_=0)
    beta2: float = 0.98  # Adam's second-moment decay
    clip: float = option(0.0, "largest gradient norm; 0: no clipping", min_=0)
    # sizes of the probes
    probe_utterances: int = 200
    eval_utterances: int = 100


BASE = dict(dim=768, depth=12, heads=12, ffn=3072)
BIG = dict(
    max_samples=3_800_000, workers=6, log_every=50, save_every=5000, probe_every=20_000,
    probe_utterances=1000, eval_utterances=500, min_seconds=2.0, channels=512, dropout=0.1, attn_dropout=0.1,
    layer_drop=0.05,
)  # fmt: skip
SMALL = dict(pos_width=15, share_positions=False, decay=0.3, clip=3.0, beta2=0.99)
PRESETS = {
    # 2 CPU cores, 93 seconds: explained variance .618 (RESULTS.md)
    "smoke": SMALL | dict(
        steps=500, batch_seconds=16, max_samples=256_000, max_seconds=4.0, workers=0, probe_every=0,
        probe_utterances=100, channels=48, depth=3, top_k=3, guard_after=200, tau_0=0.99, tau_e=0.999,
        tau_n=300, lr=1e-3, warmup=0.1,
    ),
    # 36 minutes of spoken digits, 1 CPU core, 1.9 hours: CTC probe .245 -> .719 (RESULTS.md)
    "digits": SMALL | dict(
        steps=18_000, batch_seconds=16, max_samples=128_000, max_seconds=8.0, workers=1, log_every=50,
        save_every=1000, probe_every=4000, dim=192, depth=6, heads=6, ffn=768, top_k=4, tau_e=0.9995,
        tau_n=3000, warmup=0.0125,
    ),
    # LibriSpeech 960 h, 63 minutes of audio per update, 16 GPUs; paper 5.5 WER; not run here
    "base": BIG | BASE | dict(steps=400_000, batch_seconds=3780),
    # Libri-Light 60k h: no recipe is published, so this one is ours; not run here
    "large": BIG | dict(
        steps=400_000, batch_seconds=3780, max_samples=1_900_000, dim=1024, depth=24, heads=16, ffn=4096,
        lr=3e-4, warmup=0.08,
    ),
    # AudioSet, 94.5 minutes per update; paper 34.5 mAP on AudioSet-20K; not run here
    "audioset": BIG | BASE | dict(
        steps=200_000, batch_seconds=5670, deep_norm=True, top_k=12, final_norm="layer", schedule="cosine",
        warmup=0.05, final_scale=0.0,
    ),
}  # fmt: skip
TWO = dict(mask_p=0.5, mask_adjust=0.05, mask_span=5, decoder_kernel=7, schedule="cosine", final_scale=0.0)
# data2vec 2.0. LibriSpeech, Libri-Light: paper 5.2, 3.5 WER with 960 h of labels, 4-gram; not run here
PRESETS["smoke2"] = PRESETS["smoke"] | TWO | dict(masks=4, decoder_width=96)
PRESETS["digits_2"] = PRESETS["digits"] | TWO | dict(masks=8, decoder_width=96, steps=12_000, batch_seconds=8)
PRESETS["base2"] = BIG | BASE | TWO | dict(
    steps=400_000, batch_seconds=500, max_samples=1_000_000, masks=8, decoder_depth=4, decoder_width=384,
    decoder_dropout=0.1, share_positions=False, tau_e=0.99999, tau_n=75_000, lr=7.5e-4, warmup=0.02,
)  # fmt: skip
PRESETS["large2"] = PRESETS["base2"] | dict(
    steps=600_000, batch_seconds=960, max_samples=320_000, masks=12, mask_p=0.55, mask_adjust=0.1, top_k=16,
    dim=1024, depth=16, prenet=8, heads=16, ffn=4096, layer_drop=0.0, decoder_width=768, tau_0=0.9997,
    tau_e=1.0, tau_n=300_000, lr=4e-4, warmup=1 / 60, clip=1.0,
)  # fmt: skip


def build(cfg: Config) -> Student:
    """The student of these options, with random weights."""
    common.require(cfg.dim % cfg.pos_groups == 0, f"--dim {cfg.dim}: must be a multiple of {cfg.pos_groups}")
    convs = [(cfg.channels, kernel, stride) for kernel, stride in CONVS]
    kernel = max(3, cfg.pos_width // cfg.pos_depth)
    if cfg.masks:
        stack = kernel, cfg.pos_depth, cfg.pos_groups, cfg.heads, cfg.norm_eps
        return model2.build(cfg, model2.Waves(convs, cfg.dim, *stack), layer_drop=cfg.layer_drop)
    embed = WaveEmbed(convs, cfg.dim, kernel, cfg.pos_depth, cfg.pos_groups, cfg.dropout, cfg.norm_eps)
    block = {"heads": cfg.heads, "ffn": cfg.ffn, "target": cfg.target, "deep_norm": cfg.deep_norm}
    block |= {"dropout": (cfg.dropout, cfg.attn_dropout, cfg.ffn_dropout), "layer_drop": cfg.layer_drop}
    encoder = Encoder(embed, cfg.dim, cfg.depth, pre_norm=False, eps=cfg.norm_eps, **block)
    for conv in embed.content["convs"]:
        torch.nn.init.kaiming_normal_(conv.weight)
    torch.nn.init.uniform_(encoder.mask_embedding)  # as in wav2vec 2.0
    init_post_norm(encoder, deep_norm=cfg.deep_norm)
    return Student(encoder, torch.nn.Linear(cfg.dim, cfg.dim))


def draw_mask(cfg: Config, lengths, rng):
    """lengths (B,) in samples -> (B, T) bool; 2.0: (B * M, T)."""
    for kernel, stride in CONVS:
        lengths = (lengths - kernel) // stride + 1
    if cfg.masks:
        rows, steps = len(lengths) * cfg.masks, int(lengths.max())
        return exact_blocks(rows, (steps,), cfg.mask_p, cfg.mask_adjust, cfg.mask_span, rng)
    return span_mask(lengths.numpy(), cfg.mask_p, cfg.mask_span, rng, equal=not cfg.pad)


def micro_batch_count(cfg: Config, world: int) -> int:
    """Micro-batches of max_samples per process and update."""
    enough = cfg.max_samples >= cfg.max_seconds * audio.RATE
    common.require(enough, f"--max_samples {cfg.max_samples}: must hold --max_seconds {cfg.max_seconds}")
    count = max(1, round(cfg.batch_seconds * audio.RATE / cfg.max_samples))
    parts = f"{count} micro-batches of --max_samples do not split among {world} processes"
    common.require(count % world == 0, f"--batch_seconds {cfg.batch_seconds}: {parts}")
    return count // world


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="speech")
    common.check_sizes(cfg)
    rank, world, device, autocast, scaler = common.start_processes(cfg.device, cfg.dtype)
    accumulation = micro_batch_count(cfg, world)
    train, valid = audio.open_data(cfg.data, cfg.train, cfg.valid, cfg.min_seconds)

    # ---- student, teacher, optimiser
    torch.manual_seed(cfg.seed)
    student = build(cfg).to(device)
    shared = ("embed.content", "embed.positions") if cfg.share_positions else ("embed.content",)
    teacher = Teacher(student.encoder, shared, cfg.window)
    betas, decay = (0.9, cfg.beta2), cfg.weight_decay
    optimizer = torch.optim.AdamW(model2.groups(cfg, student), cfg.lr, betas, 1e-6, decay, fused=True)
    torch.manual_seed(cfg.seed * 1000 + rank)  # dropout and layer drop differ between processes
    step = common.load_run(cfg, rank, student, teacher, optimizer, scaler)["step"]
    if cfg.init and step == 0:
        convert.init_run(cfg, student, teacher)
    log = common.Log(cfg, step, rank, device, "audio_s")
    log.report(train.skipped + valid.skipped)
    if cfg.compile:
        for network in (student.encoder, teacher.encoder):
            network.transform = torch.compile(network.transform, dynamic=True)
    ddp = DistributedDataParallel(student) if world > 1 else student

    # ---- batches: recordings, crops and masks depend on (seed, epoch, number of the micro-batch) alone
    longest, mask_of = round(cfg.max_seconds * audio.RATE), partial(draw_mask, cfg)
    split = step, cfg.steps, accumulation * world, world, rank
    keys = audio.batches_by_length(train.lengths, cfg.max_samples, longest, cfg.seed, *split)
    dataset = audio.Batches(train, cfg.seed, longest, cfg.pad, mask_of)
    loaded = log.watch(loader(dataset, keys, cfg.workers, device))
    if rank == 0:
        evaluate = probes.SpeechProbe(cfg, train, valid, mask_of, log, device, autocast)
        if step in (0, cfg.steps) and log.scored < step:
            log.write(step, {}, evaluate(student, teacher))

    # ---- the loop
    while step < cfg.steps:
        step += 1
        lr, tau = common.lr_at(step, cfg), tau_at(step, cfg.tau_0, cfg.tau_e, cfg.tau_n)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [common.to_device(next(loaded), device) for _ in range(accumulation)]
        counts = [torch.stack([batch["mask"].sum(), batch["lengths"].sum()]) for batch in micro_batches]
        num_masked, samples = common.all_reduce(sum(counts))
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(micro_batches):
            wave, mask, lengths = batch["source"], batch["mask"], batch["lengths"] if cfg.pad else None
            ddp.require_backward_grad_sync = i == accumulation - 1
            # ---- data2vec (mask: drawn with the batch; both networks use the content x (B, T, D))
            with autocast:
                f, x, valid_frames = ddp(wave, mask, lengths)  # f (N, D), from the visible frames
                layers = teacher.from_embedded(x, valid_frames)
                y = top_k_average(layers, cfg.top_k, cfg.norm, cfg.final_norm)  # (B, T, D), of all frames
                y = y.repeat_interleave(cfg.masks, dim=0) if cfg.masks else y  # 2.0: M masks of a recording
            micro_loss = regression_loss(f, y[mask], cfg.beta, scale=cfg.dim**-0.5) / num_masked
            scaler.scale(micro_loss * world).backward()  # DDP averages over processes; the loss is a sum
            loss += micro_loss.detach()
        grad_norm = common.optimizer_step(optimizer, scaler, student, cfg.clip)
        if grad_norm is None:  # float16 overflowed: this step again, at a smaller scale
            step, loaded = step - 1, itertools.chain(micro_batches, loaded)
            continue
        teacher.update(student.encoder, tau)
        # ---- end of data2vec

        log.advance(samples / audio.RATE)
        if log.due(step):
            metrics = {"loss": loss * world, "target_std": feature_std(y[mask]), "pred_std": feature_std(f)}
            metrics |= {"masked": mask.float().mean(), "tau": tau, "lr": lr, "grad_norm": grad_norm}
            probe_now = rank == 0 and due(step, cfg.probe_every, cfg.steps)
            log.write(step, metrics, evaluate(student, teacher) if probe_now else {})
        log.checkpoint(step, student, teacher, optimizer, scaler)
    log.finish()


if __name__ == "__main__":
    common.run(main)
