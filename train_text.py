"""Pre-train data2vec on text (Baevski et al. 2022, section 4.3).

    python train_text.py                                                  # smoke test: Python's own docs, laptop CPU
    python train_text.py --preset corpus --data DIR                       # DIR/{train,valid}.txt, or what data.text prepared
    torchrun --nproc_per_node=16 train_text.py --preset base --data DIR   # Books + Wikipedia
"""

import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from common import BadInput, option
from data import glue, text
from masking import bert_mask, span_mask_tokens
from model import Student, Teacher, regression_head, text_encoder
from targets import explained, feature_std, linear_probe, position_share, regression_loss, show, tau_at, top_k_average, unhealthy
from tools import convert


@dataclass
class Config:
    preset: str = option("smoke", "named set of values for the options below")
    # run
    data: str = option("", "corpus: folder that data.text prepared, or with train.txt; empty: the docs that every Python carries")
    out: str = option("", "folder of this run; a run that is there already is only continued, never overwritten")
    resume: bool = option(False, "continue the run in --out from its ckpt.pt")
    init: str = option("", "checkpoint to start from instead of random weights; the schedule starts at 0")
    init_teacher: str = option("teacher", "with --init, the teacher is the file's teacher or a copy of its student", ("teacher", "student"))
    steps: int = option(1000, "optimiser steps (updates); all schedules end here")
    global_batch: int = option(32, "sequences an update, whatever the number of processes")
    micro_batch: int = option(0, "most sequences a process holds at once; gradients accumulate to the global batch; 0: no limit")
    seed: int = option(0, "seed of weights, order and masks")
    device: str = option("auto", "auto takes the GPU if there is one", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "autocast; auto is bfloat16 where the hardware has it", ("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile both encoders (a minute at the start, then faster on a GPU)")
    workers: int = option(2, "data-loading processes for each training process; 0 loads in the loop")
    log_every: int = option(10, "steps between metric lines")
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    probe_every: int = option(1000, "steps between evaluations (explained, masked-token probe); 0: only start and end")
    probe_blocks: int = option(400, "training sequences to fit the probe on")
    eval_blocks: int = option(100, "held-out sequences for explained and the probe")
    probe_data: str = option("", "folder of a labelled task (GLUE's, or train and dev as .tsv or .csv) for a probe on mean features")
    # model: small values of these make the small presets
    max_tokens: int = option(128, "tokens of a sequence, <s> and </s> included; whole documents are packed into it")
    dim: int = option(128, "width D")
    depth: int = option(4, "layers L")
    heads: int = option(4, "attention heads; dim must be a multiple")
    ffn: int = option(512, "hidden width of the FFN")
    norm_eps: float = option(1e-5, "epsilon of the layer norms; weights from elsewhere may want another")
    dropout: float = option(0.0, "dropout of the embedding and of both branches of the student")
    attn_dropout: float = option(0.0, "dropout on the student's attention weights")
    head_layers: int = option(2, "layers of the regression head")
    token_std: float = option(0.02, "std of the token table at the start; its ratio to position_std is what targets hold of each")
    position_std: float = option(0.02, "std of the position table at the start; as large as tokens', a short run learns positions alone")
    weight_std: float = option(0.02, "std of matrices in blocks and head at the start; 0: 1 / sqrt(inputs), as small widths want")
    # data2vec
    objective: str = option("data2vec", "or mlm: predict the token itself, BERT's objective, with the same model and masks (the comparison)", ("data2vec", "mlm"))
    mask_p: float = option(0.15, "share of tokens to select (spans: to hide if they never met)")
    mask_span: int = option(1, "1: BERT's 80/10/10 of single tokens; more: spans of so many, all <mask>")
    target: str = option("ffn", "which output of a layer is a_l", ("block", "ffn", "ffn_residual", "attention"))
    top_k: int = option(10, "layers averaged into the target, from the top")
    norm: str = option("layer", "normalisation of each a_l: over features, over the sequence, or none (collapses)", ("layer", "instance", "none"))
    final_norm: str = option("none", "normalisation of their mean", ("layer", "instance", "none"))
    window: int = option(0, "> 0: the teacher attends only to tokens at most this far away (ablation of the context)")
    share_embedding: bool = option(True, "the teacher uses the student's token and position embeddings; false: their average")
    beta: float = option(4.0, "smooth L1 turns from square to absolute here; 0: squared error")
    tau_0: float = option(0.999, "teacher momentum at the start; too low collapses, too high stands still")
    tau_e: float = option(0.9999, "teacher momentum from step tau_n on")
    tau_n: int = option(100_000, "steps over which tau rises")
    # optimiser
    lr: float = option(2e-4, "peak learning rate")
    schedule: str = option("tri_stage", "after the warm-up: hold and then decay exponentially, or a cosine", ("tri_stage", "cosine"))
    warmup: float = option(0.05, "share of the steps for linear warm-up; too short and a large lr diverges")
    decay: float = option(0.15, "tri_stage: share of the steps for the decay at the end")
    final_scale: float = option(0.01, "learning rate at the last step, as a share of lr")
    weight_decay: float = option(0.01, "on all weights, as released")
    beta2: float = option(0.98, "Adam's second-moment decay")
    clip: float = option(5.0, "largest gradient norm; 0: no clipping")
    # collapse guard (released speech code)
    guard_after: int = option(5000, "from this step on a collapsed run stops; -1: never")
    min_target_std: float = option(0.1, "collapsed if the targets' std over tokens falls below")
    min_pred_std: float = option(0.01, "collapsed if the predictions' std over tokens falls below")


BASE = dict(
    global_batch=256, micro_batch=16, workers=4, log_every=50, save_every=5000, probe_every=20_000, probe_blocks=2000, eval_blocks=500,
    max_tokens=512, dim=768, depth=12, heads=12, ffn=3072, dropout=0.1, attn_dropout=0.1,
)  # fmt: skip
PRESETS = {
    # python train_text.py: 2 CPU cores, see README for seconds and numbers
    "smoke": dict(
        steps=1600, workers=0, probe_every=0, probe_blocks=1600, eval_blocks=400, max_tokens=32, depth=3, top_k=3, guard_after=200,
        token_std=1.0, position_std=0.3, weight_std=0.0, share_embedding=False,
        tau_0=0.99, tau_e=0.999, tau_n=300, lr=1e-3, warmup=0.1, decay=0.3, beta2=0.99, clip=3.0,
    ),
    # python train_text.py --preset corpus --data DIR: 10 to 100 MB of text, 2 CPU cores or one GPU; 12 MB, 1.6 hours on one core: see
    # README for numbers. --objective mlm wants BERT's start: --lr 5e-4 --token_std 0.02 --position_std 0.02 --weight_std 0.02
    "corpus": dict(
        steps=10_000, global_batch=64, workers=1, log_every=50, max_tokens=64, dim=192, heads=3, ffn=768, top_k=4, guard_after=2000,
        token_std=0.1, position_std=0.03, weight_std=0.0, share_embedding=False, mask_p=0.3,
        tau_0=0.999, tau_e=0.9998, tau_n=5000, lr=1e-3, decay=0.3, beta2=0.99, clip=3.0,
    ),
    # torchrun --nproc_per_node=16: Books + English Wikipedia, GPT-2's vocabulary; paper 82.7 GLUE average; not run here
    "base": BASE | dict(steps=1_000_000),
    # the released configuration: spans of 4, cosine; paper 82.9 GLUE average; not run here
    "base_spans": BASE | dict(
        steps=1_000_000, mask_p=0.35, mask_span=4, schedule="cosine", warmup=0.01, final_scale=0.0, tau_n=300_000,
    ),
    # no recipe is published, so this one is ours: base's, deeper, with less lr and a longer warm-up; not run here
    "large": BASE | dict(steps=1_000_000, micro_batch=8, dim=1024, depth=24, heads=16, ffn=4096, lr=1e-4, warmup=0.1),
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
    """Refuses values that cannot work. Returns the number of micro-batches an update."""
    common.check_range(cfg, 1, math.inf, "steps global_batch log_every probe_blocks eval_blocks dim depth heads ffn head_layers mask_span top_k")
    common.check_range(cfg, 8, math.inf, "max_tokens")
    common.check_range(cfg, 0, math.inf, "seed micro_batch workers save_every probe_every tau_n window beta lr weight_decay clip token_std position_std weight_std")
    common.check_range(cfg, 0, 1, "tau_0 tau_e warmup decay final_scale")
    common.check_range(cfg, 0, 0.9999, "dropout attn_dropout beta2")
    common.check_range(cfg, 1e-9, 1, "mask_p")
    if cfg.dim % cfg.heads:
        raise BadInput(f"--dim {cfg.dim} is not a multiple of --heads {cfg.heads}")
    if cfg.top_k > cfg.depth:
        raise BadInput(f"--top_k {cfg.top_k}: the model has only --depth {cfg.depth} layers")
    if cfg.schedule == "tri_stage" and (cfg.warmup + cfg.decay > 1 or cfg.decay and not cfg.final_scale):
        raise BadInput(f"--warmup {cfg.warmup} --decay {cfg.decay} --final_scale {cfg.final_scale}: shares of the steps that overlap, or a decay to nothing")  # fmt: skip
    count = math.ceil(cfg.global_batch / (world * (cfg.micro_batch or cfg.global_batch)))
    if cfg.global_batch % (world * count):
        raise BadInput(f"--global_batch {cfg.global_batch}: does not split into {world} processes x {count} micro-batches; take a multiple of {world * count}")  # fmt: skip
    return count


def build(cfg: Config, vocab: int) -> Student:
    """The student of these options, with random weights. finetune.py builds the same encoder from a checkpoint's config."""
    encoder = text_encoder(
        vocab=vocab, max_length=cfg.max_tokens, pad=text.PAD, dim=cfg.dim, depth=cfg.depth, heads=cfg.heads, ffn=cfg.ffn,
        dropout=cfg.dropout, attn_dropout=cfg.attn_dropout, target=cfg.target, token_std=cfg.token_std,
        position_std=cfg.position_std, weight_std=cfg.weight_std, eps=cfg.norm_eps,
    )  # fmt: skip
    return Student(encoder, regression_head(cfg.dim, cfg.head_layers, cfg.weight_std) if cfg.objective == "data2vec" else nn.Linear(cfg.dim, vocab))


def read(path, student: Student, cfg: Config, vocabulary: text.Vocabulary) -> dict:
    """A checkpoint, its student loaded. Raises BadInput if it does not fit, also in what the shapes of weights do not tell."""
    state = convert.read(path)
    if "classes" in state:
        raise BadInput(f"{path}: a fine-tuned model; pre-training goes on from a pre-trained checkpoint")
    if "vocabulary" not in state:
        raise BadInput(f"{path}: not a model of text, or one without its vocabulary; put vocab.json and merges.txt beside it")
    theirs = text.Vocabulary.parse(state["vocabulary"])
    if (theirs.size, [*theirs.pieces.items()]) != (vocabulary.size, [*vocabulary.pieces.items()]):
        raise BadInput(f"{path}: has another vocabulary, of {theirs.size}; prepare the text with it: data.text prepare --vocab {Path(path).parent}/vocab")  # fmt: skip
    for name in ("objective", "max_tokens", "dim", "depth", "heads", "ffn", "head_layers", "norm_eps"):
        if (their_value := state["config"].get(name, getattr(Config(), name))) != getattr(cfg, name):
            raise BadInput(f"{path}: was trained with --{name} {their_value}; take the same")
    convert.load_into(student, state["student"], path, fresh=state.get("fresh", ()))
    return state


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="text")
    rank, world, device, autocast = common.start_processes(cfg.device, cfg.dtype)
    accumulation, mlm = check(cfg, world), cfg.objective == "mlm"

    # ---- data: a sample is a function of (seed, epoch, index), whatever the rank or worker
    if cfg.data and os.environ.get("LOCAL_RANK", "0") == "0":
        text.open_corpus(cfg.data, show=rank == 0)  # prepares plain text, once a machine
    common.gather(None)
    train, valid, vocabulary = text.open_corpus(cfg.data, show=False) if cfg.data else text.made_corpus()
    train, valid = text.Blocks(train, cfg.max_tokens), text.Blocks(valid, cfg.max_tokens)
    task = labelled(cfg, vocabulary) if cfg.probe_data and rank == 0 else ()
    if rank == 0:
        print(f"{len(train)} training and {len(valid)} held-out sequences of up to {cfg.max_tokens} tokens, vocabulary of {vocabulary.size}")

    # ---- student, teacher, optimiser
    torch.manual_seed(cfg.seed)
    student = build(cfg, vocabulary.size).to(device)
    teacher = Teacher(student.encoder, ("embed",) * cfg.share_embedding, cfg.window)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6, weight_decay=cfg.weight_decay, fused=True
    )

    # ---- the run's folder, and what is already there
    folder = Path(cfg.out)
    step, begin, row = 0, None, {"seconds": 0.0}
    torch.manual_seed(cfg.seed * 1000 + rank)  # from here on for dropout, which differs between processes
    if cfg.resume and (folder / "ckpt.pt").exists():
        state = read(folder / "ckpt.pt", student, cfg, vocabulary)
        convert.load_into(teacher, state["teacher"], folder / "ckpt.pt")
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0] |= {"weight_decay": cfg.weight_decay, "betas": (0.9, cfg.beta2)}  # this command's, not the file's
        common.rng_state(device, restore=state["rng"][rank] if rank < len(state["rng"]) else None)
        step, begin, row = state["step"], state["begin"], state["row"]
    elif cfg.init:
        state = read(cfg.init, student, cfg, vocabulary)
        teacher.update(student.encoder, tau=0.0)  # a copy of the student
        if cfg.init_teacher == "teacher" and state["teacher"]:
            convert.load_into(teacher, state["teacher"], cfg.init)
    teacher.update(student.encoder, tau=1.0)  # what is shared is the student's, whatever the file's run shared
    common.open_run(cfg.out, asdict(cfg), cfg.resume, rank)  # now that the checkpoint fits: a refused command changes nothing
    metrics = common.open_metrics(folder, step) if rank == 0 else None
    if rank == 0:
        vocabulary.save(folder / "vocab")
    if cfg.compile:
        student.encoder.compile()
        teacher.encoder.compile()
    ddp = DistributedDataParallel(student) if world > 1 else student

    # ---- batches: this process's share of the run's samples from `step` on; held-out sequences with fixed masks
    def hide(ids, rng):
        if cfg.mask_span > 1:
            return span_mask_tokens(ids, vocabulary.ordinary, vocabulary.mask, cfg.mask_p, cfg.mask_span, rng)
        return bert_mask(ids, vocabulary.ordinary, vocabulary.mask, cfg.mask_p, rng)

    def load(blocks, seed, keys):
        return DataLoader(text.Batches(blocks, seed, hide), batch_size=None, sampler=keys, num_workers=cfg.workers,
                          pin_memory=device.type == "cuda", generator=torch.Generator())  # fmt: skip

    def fixed(blocks, limit):  # the same random subset at every call, one mask each
        chosen = np.sort(np.random.default_rng(cfg.seed).permutation(len(blocks))[:limit])
        return list(load(blocks, 0, [[(0, int(i)) for i in part] for part in np.array_split(chosen, math.ceil(len(chosen) / 50))]))

    keys = text.batches(len(train), cfg.seed, step, cfg.steps, cfg.global_batch, accumulation, world, rank)
    batches = iter(load(train, cfg.seed, keys))
    if rank == 0:
        held_out, fit = fixed(valid, cfg.eval_blocks), fixed(train, cfg.probe_blocks)
        begin = begin or evaluate(student, teacher, held_out, fit, task, cfg, device, autocast)
        print(f"step 0: {show(begin)}")

    # ---- the loop
    bar = tqdm(total=cfg.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    started, mark, read_tokens, mark_step = time.time() - row["seconds"], time.time(), 0, step
    while step < cfg.steps:
        step += 1
        lr, tau = lr_at(step, cfg), tau_at(step, cfg.tau_0, cfg.tau_e, cfg.tau_n)
        optimizer.param_groups[0]["lr"] = lr
        micro_batches = [next(batches) for _ in range(accumulation)]
        counts = torch.tensor([[int(b["mask"].sum()), int((b["tokens"] != text.PAD).sum())] for b in micro_batches], device=device).sum(0)
        if world > 1:
            dist.all_reduce(counts)  # processes hide different numbers of tokens: the loss is a mean over all of them
        positions, read_tokens = counts[0], read_tokens + counts
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(micro_batches):
            tokens, corrupted, mask = (batch[name].to(device, non_blocking=True) for name in ("tokens", "corrupted", "mask"))
            with contextlib.nullcontext() if i == accumulation - 1 or world == 1 else ddp.no_sync():
                # ---- data2vec, in four lines (the mask was drawn with the batch) ----------------------------------
                with autocast:
                    y = tokens if mlm else top_k_average(teacher(tokens), cfg.top_k, cfg.norm, cfg.final_norm)  # (B, T, D) of the FULL text
                    f = ddp(corrupted, mask)  # (M, D) from the corrupted text, at the selected tokens
                if mlm:  # the comparison: f are logits of the vocabulary, and the target is the token
                    share = F.cross_entropy(f.float(), y[mask], reduction="sum") / positions
                else:
                    share = regression_loss(f, y[mask], cfg.beta, scale=1.0) / positions
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
        meters = torch.stack([loss * world, feature_std(f)] + ([] if mlm else [feature_std(y[mask])])) / world
        if world > 1:
            dist.all_reduce(meters)
        (masked, count), seconds = read_tokens.tolist(), time.time() - mark
        row = {"step": step} | dict(zip(("loss", "pred_std", "target_std"), meters.tolist())) | {"masked": masked / count}
        row |= {"tau": tau, "lr": lr, "grad_norm": grad_norm.item(), "tokens_per_s": count / seconds}
        row |= {"samples_per_s": (step - mark_step) * cfg.global_batch / seconds, "seconds": time.time() - started}
        stds = "" if mlm else "std y {target_std:.2f} f {pred_std:.2f}, tau {tau:.4f}, "
        bar.set_postfix_str(("loss {loss:.3f}, " + stds + "lr {lr:.1e}, {tokens_per_s:.0f} tokens/s").format(**row))
        if sick := unhealthy(row, -1 if mlm else cfg.guard_after, cfg.min_target_std, cfg.min_pred_std):
            bar.close()
            raise SystemExit(f"step {step}: {sick}" if rank == 0 else 1)
        if rank == 0:
            if probe_now:
                row |= (end := evaluate(student, teacher, held_out, fit, task, cfg, device, autocast))
                bar.write(f"step {step}: {show(end)}")
            print(json.dumps(row), file=metrics)
        if save_now:
            rng = common.gather(common.rng_state(device))
            if rank == 0:
                common.save(folder / "ckpt.pt", {
                    "student": student.state_dict(), "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "config": asdict(cfg), "rng": rng, "begin": begin, "row": row, "vocabulary": (folder / "vocab").read_text(),
                })  # fmt: skip
        mark, read_tokens, mark_step = time.time(), 0, step
    bar.close()
    if rank == 0:
        if "probe" not in row:  # resumed at its last step
            row |= evaluate(student, teacher, held_out, fit, task, cfg, device, autocast)
        results = {"seconds": row["seconds"], "peak_memory_gb": common.peak_memory_gb(device), "final_loss": row["loss"]}
        begin = {name: value for name, value in begin.items() if name in row}
        results |= {f"{name}_start": value for name, value in begin.items()} | {f"{name}_end": row[name] for name in begin}
        common.save(folder / "results.json", results)
        print(f"{cfg.steps} steps in {row['seconds']:.0f} s; {folder}/results.json, metrics.jsonl, ckpt.pt")
        for name, value in begin.items():
            print(f"  {name:18} {value:.3f} -> {row[name]:.3f}")


# ---- does it learn? -----------------------------------------------------------------------------------------------


def labelled(cfg: Config, vocabulary: text.Vocabulary, most: int = 5000) -> list[list[dict]]:
    """--probe_data in batches of sentences: at most so many rows to fit the probe on, and of the dev split. Raises BadInput."""
    folder, sets = Path(cfg.probe_data), []
    spec, splits = glue.open_task(str(folder.parent), folder.name)
    if not spec.classes:
        raise BadInput(f"--probe_data {folder}: its labels are scores; the probe tells classes apart, so give a task with classes")
    for split in ("train", spec.dev[0]):
        rows, bad = splits[split].rows, splits[split].bad
        if bad:
            print(f"{bad[0]}: left out" + (f", with {len(bad) - 1} more rows" if len(bad) > 1 else ""))
        chosen = np.sort(np.random.default_rng(cfg.seed).permutation(len(rows))[:most])
        sentences, parts = glue.Sentences(rows, vocabulary, cfg.max_tokens), np.array_split(chosen, math.ceil(len(chosen) / 50))
        sets.append([sentences[[(0, int(i)) for i in part]] for part in parts])
    return sets


@torch.no_grad()
def evaluate(student, teacher, held_out, fit, task, cfg, device, autocast, common_tokens: int = 200) -> dict[str, float]:
    """How much of the targets the student predicts, and how well frozen features tell which token is hidden.

    held_out, fit  batches of corrupted texts with fixed masks: to measure on, and to fit the probe on
    task           () or what labelled() gave
    returns        data2vec alone: explained, and position_share, what of the targets their place explains (where that is most of
                   them, explained means little); probe and teacher_probe: accuracy of a linear layer that recovers the hidden
                   token from the features at its place, among the most common ones (the rest is left out); with a task,
                   task_probe and teacher_task_probe: accuracy of a linear layer on the mean feature of a sentence
    """
    student.eval()

    def pairs():
        for batch in held_out:
            tokens, corrupted, mask = (batch[name].to(device) for name in ("tokens", "corrupted", "mask"))
            with autocast:
                f, y = student(corrupted, mask), top_k_average(teacher(tokens), cfg.top_k, cfg.norm, cfg.final_norm)
            yield f, y, mask

    def targets():
        for tokens in (batch["tokens"].to(device) for batch in held_out):
            with autocast:
                y = top_k_average(teacher(tokens), cfg.top_k, cfg.norm, cfg.final_norm)
            yield y, tokens != text.PAD

    def features(encoder, batches):  # at the selected tokens, (N, D), and which these are, (N,)
        with autocast:
            x = [encoder(batch["corrupted"].to(device))[0][batch["mask"].to(device)].float() for batch in batches]
        return torch.cat(x), torch.cat([batch["tokens"][batch["mask"]] for batch in batches]).to(device)

    def pooled(encoder, batches):  # (N, D), (N,)
        x = []
        for tokens in (batch["tokens"].to(device) for batch in batches):
            real = (tokens != text.PAD)[..., None]
            with autocast:
                x.append((encoder(tokens)[0].float() * real).sum(1) / real.sum(1))
        return torch.cat(x), torch.cat([batch["labels"] for batch in batches]).long().to(device)

    numbers = {}
    if cfg.objective == "data2vec":
        numbers = {"explained": explained(pairs(), by_position=False), "position_share": position_share(targets(), cfg.max_tokens)}
    for prefix, encoder in (("", student.encoder), ("teacher_", teacher.encoder)):
        (x, y), (x_test, y_test) = features(encoder, fit), features(encoder, held_out)
        label = torch.full((int(max(y.max(), y_test.max())) + 1,), -1, device=device)
        common_ones = torch.bincount(y).argsort(descending=True, stable=True)[:common_tokens]
        label[common_ones] = torch.arange(len(common_ones), device=device)
        (x, y), (x_test, y_test) = ((v[label[w] >= 0], label[w][label[w] >= 0]) for v, w in ((x, y), (x_test, y_test)))
        numbers[prefix + "probe"] = linear_probe(x, y, x_test, y_test)
        if task:
            numbers[prefix + "task_probe"] = linear_probe(*pooled(encoder, task[0]), *pooled(encoder, task[1]))
    student.train()
    return numbers


if __name__ == "__main__":
    common.run(main)
