"""Pre-train data2vec on text (Baevski et al. 2022, section 4.3).

python train_text.py                                                  # Python's own docs, laptop CPU
python train_text.py --preset corpus --data DIR                       # DIR: written by data.text prepare
torchrun --nproc_per_node=16 train_text.py --preset base --data DIR   # Books + Wikipedia
"""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common
import model2
from common import RunConfig, due, option
from data import text
from data.sampling import batches, loader
from masking import bert_mask, span_mask_tokens, uniform_mask
from model import Encoder, Student, Teacher, TokenEmbed, init_post_norm
from targets import NORMS, feature_std, regression_loss, tau_at, top_k_average
from tools import convert, probes


@dataclass
class Config(model2.Options2, RunConfig):
    init_teacher: str = option("teacher", "network of --init to start from", ("teacher", "student"))
    global_batch: int = option(32, "sequences per update, over all processes", min_=1)
    micro_batch: int = option(0, "most sequences a process holds at once; 0: no limit", min_=0)
    # model
    max_tokens: int = option(128, "tokens of a sequence, <s> and </s> included", min_=8)
    dim: int = option(128, "width D", min_=1)
    depth: int = option(4, "layers L", min_=1)
    heads: int = option(4, "attention heads", min_=1)
    ffn: int = option(512, "hidden width of the FFN", min_=1)
    dropout: float = option(0.0, "dropout of the student's embedding and branches", min_=0, max_=0.99)
    attn_dropout: float = option(0.0, "dropout of the student's attention weights", min_=0, max_=0.99)
    token_std: float = option(0.02, "initial std of the token table (all three: not in 2.0)", min_=0)
    position_std: float = option(0.02, "of the position table; if large, positions alone are learned", min_=0)
    weight_std: float = option(0.02, "of other matrices; 0: 1 / sqrt(inputs), for small widths", min_=0)
    norm_eps: float = 1e-5
    # data2vec
    objective: str = option("data2vec", "or mlm: predict the token itself, to compare", ("data2vec", "mlm"))
    mask_p: float = option(0.15, "fraction of tokens to select", min_=0.001, max_=1)
    mask_span: int = option(1, "1: BERT's 80/10/10 of single tokens; more: spans, all <mask>", min_=1)
    target: str = option("ffn", "layer output that is a_l", ("block", "ffn", "ffn_residual", "attention"))
    top_k: int = option(10, "layers averaged into the target, from the top", min_=1)
    norm: str = option("layer", "normalisation of each a_l; needed (see RESULTS.md)", tuple(NORMS))
    final_norm: str = option("none", "normalisation of their mean", tuple(NORMS))
    window: int = option(0, "> 0: the teacher attends at most so many tokens away", min_=0)
    share_embedding: bool = option(True, "the teacher has the student's embeddings, not their average")
    beta: float = option(4.0, "where smooth L1 turns linear; 0: squared error", min_=0)
    tau_0: float = option(0.999, "teacher momentum at the start; too low: collapse", min_=0, max_=1)
    tau_e: float = option(0.9999, "teacher momentum from step tau_n on", min_=0, max_=1)
    tau_n: int = option(100_000, "steps over which tau rises", min_=0)
    guard_after: int = option(5000, "from this step on a collapsed run stops; -1: never", min_=-1)
    # optimiser
    lr: float = option(2e-4, "peak learning rate", min_=0)
    schedule: str = option("tri_stage", "hold, then decay; or a cosine", ("tri_stage", "cosine"))
    warmup: float = option(0.05, "fraction of the steps; too short: divergence", min_=0, max_=1)
    decay: float = 0.15  # tri_stage: fraction of the steps for the final decay
    final_scale: float = 0.01  # learning rate at the last step, as a fraction of lr
    weight_decay: float = option(0.01, "on all weights, as released", min_=0)
    beta2: float = 0.98  # Adam's second-moment decay
    clip: float = option(5.0, "largest gradient norm; 0: no clipping", min_=0)
    # sizes of the probes
    probe_blocks: int = 400
    eval_blocks: int = 100


BASE = dict(
    steps=1_000_000, global_batch=256, micro_batch=16, workers=4, log_every=50, save_every=5000,
    probe_every=20_000, probe_blocks=2000, eval_blocks=500, max_tokens=512, dim=768, depth=12, heads=12,
    ffn=3072, dropout=0.1, attn_dropout=0.1,
)  # fmt: skip
SMALL = dict(weight_std=0.0, share_embedding=False, lr=1e-3, decay=0.3, beta2=0.99, clip=3.0)
PRESETS = {
    # 2 CPU cores, 124 seconds: explained variance .232, most of it the position (RESULTS.md)
    "smoke": SMALL | dict(
        steps=1600, workers=0, probe_every=0, probe_blocks=1600, eval_blocks=400, max_tokens=32, depth=3,
        top_k=3, guard_after=200, token_std=1.0, position_std=0.3, tau_0=0.99, tau_e=0.999, tau_n=300,
        warmup=0.1,
    ),
    # 12 MB of English, 1 CPU core, 1.6 hours: probe .128 -> .381 (RESULTS.md). --objective mlm wants BERT's
    # start: --lr 5e-4 --token_std 0.02 --position_std 0.02 --weight_std 0.02
    "corpus": SMALL | dict(
        steps=10_000, global_batch=64, workers=1, log_every=50, max_tokens=64, dim=192, heads=3, ffn=768,
        top_k=4, guard_after=2000, token_std=0.1, position_std=0.03, mask_p=0.3, tau_e=0.9998, tau_n=5000,
    ),
    # Books + English Wikipedia, GPT-2's vocabulary, 16 GPUs; paper 82.7 GLUE average; not run here
    "base": BASE,
    # the released configuration: spans of 4, cosine; paper 82.9 GLUE average; not run here
    "base_spans": BASE | dict(
        mask_p=0.35, mask_span=4, schedule="cosine", warmup=0.01, final_scale=0.0, tau_n=300_000,
    ),
    # no recipe is published, so this one is ours; not run here
    "large": BASE | dict(micro_batch=8, dim=1024, depth=24, heads=16, ffn=4096, lr=1e-4, warmup=0.1),
}  # fmt: skip
TWO = dict(
    mask_p=0.48, norm="instance", share_embedding=True, beta=0.0, decoder_kernel=9, decoder_groups=1,
    schedule="cosine", final_scale=0.0,
)  # fmt: skip
# data2vec 2.0. Books + English Wikipedia: paper 82.6 GLUE average; not run here
PRESETS["smoke2"] = PRESETS["smoke"] | TWO | dict(masks=4)
PRESETS["corpus_2"] = PRESETS["corpus"] | TWO | dict(masks=8, global_batch=8)
PRESETS["base2"] = BASE | TWO | dict(
    global_batch=64, micro_batch=4, masks=8, top_k=12, decoder_depth=5, decoder_width=768,
    decoder_dropout=0.1, tau_0=0.9999, tau_e=0.99999, warmup=0.004, clip=1.0,
)  # fmt: skip
PRESETS["large2"] = PRESETS["base2"] | dict(
    steps=600_000, micro_batch=2, mask_p=0.5, top_k=24, norm="layer", final_norm="instance", dim=1024,
    depth=24, heads=16, ffn=4096, lr=1e-4, warmup=1 / 150,
)  # fmt: skip


def build(cfg: Config, vocab: int) -> Student:
    """The student of these options, with random weights."""
    if cfg.masks:
        tokens = model2.Tokens(vocab, cfg.max_tokens, text.PAD, cfg.dim, cfg.dropout, cfg.norm_eps)
        return model2.build(cfg, tokens, context=cfg.prenet > 0, residual=False, hidden=2 * cfg.decoder_width)
    embed = TokenEmbed(vocab, cfg.max_tokens, text.PAD, cfg.dim, cfg.dropout, cfg.norm_eps)
    block = dict(heads=cfg.heads, ffn=cfg.ffn, target=cfg.target, dropout=(cfg.dropout, cfg.attn_dropout, 0))
    encoder = Encoder(embed, cfg.dim, cfg.depth, pre_norm=False, eps=cfg.norm_eps, **block)
    for table, std in ((embed.tokens, cfg.token_std), (embed.positions, cfg.position_std)):
        nn.init.normal_(table.weight, std=std)
        table.weight.data[text.PAD] = 0
    init_post_norm(encoder, cfg.weight_std)
    if cfg.objective == "mlm":
        return Student(encoder, nn.Linear(cfg.dim, vocab))
    head = nn.Sequential(nn.Linear(cfg.dim, 2 * cfg.dim), nn.GELU(), nn.Linear(2 * cfg.dim, cfg.dim))
    for linear in (head[0], head[2]) if cfg.weight_std else ():
        nn.init.normal_(linear.weight, std=cfg.weight_std)
        nn.init.zeros_(linear.bias)
    return Student(encoder, head)


def draw_mask(cfg: Config, vocabulary, ids, rng):
    """ids (T,) -> what the student sees (T,), mask (T,); 2.0: the same, mask (M, T)."""
    if cfg.masks:
        return torch.from_numpy(ids), uniform_mask(cfg.masks, len(ids), cfg.mask_p, rng)
    if cfg.mask_span > 1:
        return span_mask_tokens(ids, vocabulary.regular_ids, vocabulary.mask, cfg.mask_p, cfg.mask_span, rng)
    return bert_mask(ids, vocabulary.regular_ids, vocabulary.mask, cfg.mask_p, rng)


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="text")
    common.check_sizes(cfg)
    rank, world, device, autocast, scaler = common.start_processes(cfg.device, cfg.dtype)
    accumulation = common.accumulation_steps(cfg.global_batch, cfg.micro_batch, world)
    train, valid, vocabulary = text.open_data(cfg.data)
    blocks = text.FullBlocks if cfg.masks else text.Blocks
    train, valid = blocks(train, cfg.max_tokens), blocks(valid, cfg.max_tokens)

    # ---- student, teacher, optimiser
    torch.manual_seed(cfg.seed)
    student = build(cfg, vocabulary.size).to(device)
    teacher = Teacher(student.encoder, ("embed", "context") if cfg.share_embedding else (), cfg.window)
    betas, decay = (0.9, cfg.beta2), cfg.weight_decay
    optimizer = torch.optim.AdamW(model2.groups(cfg, student), cfg.lr, betas, 1e-6, decay, fused=True)
    torch.manual_seed(cfg.seed * 1000 + rank)  # dropout differs between processes
    spelled = vocabulary.spell()
    state = common.load_run(cfg, rank, student, teacher, optimizer, scaler)
    step = state["step"]
    same = state.get("vocabulary", spelled) == spelled
    common.require(same, f"--data {cfg.data}: has another vocabulary than this run")
    if cfg.init and step == 0:
        convert.init_run(cfg, student, teacher, vocabulary_text=spelled)
    log = common.Log(cfg, step, rank, device, "tokens")
    if cfg.compile:
        for network in (student.encoder, teacher.encoder):
            network.transform = torch.compile(network.transform)
    ddp = DistributedDataParallel(student) if world > 1 else student

    # ---- batches: a sequence and its mask depend on (seed, epoch, index) alone
    keys = batches(len(train), cfg.seed, step, cfg.steps, cfg.global_batch, accumulation, world, rank)
    mask_of = partial(draw_mask, cfg, vocabulary)
    loaded = log.watch(loader(text.Batches(train, cfg.seed, mask_of), keys, cfg.workers, device))
    if rank == 0:
        evaluate = probes.TextProbe(cfg, train, valid, mask_of, log, device, autocast)
        if step in (0, cfg.steps) and log.scored < step:
            log.write(step, {}, evaluate(student, teacher))

    # ---- the loop
    while step < cfg.steps:
        step += 1
        lr, tau = common.lr_at(step, cfg), tau_at(step, cfg.tau_0, cfg.tau_e, cfg.tau_n)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [common.to_device(next(loaded), device) for _ in range(accumulation)]
        counts = [torch.stack([b["mask"].sum(), (b["tokens"] != text.PAD).sum()]) for b in micro_batches]
        num_masked, num_tokens = common.all_reduce(sum(counts))
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(micro_batches):
            tokens, mask = batch["tokens"], batch["mask"].flatten(0, -2)
            ddp.require_backward_grad_sync = i == accumulation - 1
            # ---- data2vec (mask: drawn with the batch)
            with autocast:
                f, x, valid_tokens = ddp(batch["corrupted"], mask)  # (N, D), from the corrupted text
                layers = teacher.from_embedded(x, valid_tokens) if cfg.masks else teacher(tokens)  # FULL text
                y = top_k_average(layers, cfg.top_k, cfg.norm, cfg.final_norm)
                y = y.repeat_interleave(cfg.masks, dim=0) if cfg.masks else y  # 2.0: M masks of a text
            if cfg.objective == "mlm":  # the comparison: f are logits, the target is the token itself
                micro_loss = F.cross_entropy(f.float(), tokens[mask], reduction="sum") / num_masked
            else:
                micro_loss = regression_loss(f, y[mask], cfg.beta, scale=1.0) / num_masked
            scaler.scale(micro_loss * world).backward()  # DDP averages over processes; the loss is a sum
            loss += micro_loss.detach()
        grad_norm = common.optimizer_step(optimizer, scaler, student, cfg.clip)
        if grad_norm is None:  # float16 overflowed: this step again, at a smaller scale
            step, loaded = step - 1, itertools.chain(micro_batches, loaded)
            continue
        teacher.update(student.encoder, tau)
        # ---- end of data2vec

        log.advance(num_tokens)
        if log.due(step):
            metrics = {"loss": loss * world, "target_std": feature_std(y[mask]), "pred_std": feature_std(f)}
            metrics |= {"masked": mask.float().mean(), "tau": tau, "lr": lr, "grad_norm": grad_norm}
            probe_now = rank == 0 and due(step, cfg.probe_every, cfg.steps)
            log.write(step, metrics, evaluate(student, teacher) if probe_now else {})
        log.checkpoint(step, student, teacher, optimizer, scaler, vocabulary=spelled)
    log.finish()


if __name__ == "__main__":
    common.run(main)
