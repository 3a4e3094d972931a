"""What each kind of labels brings to fine-tuning (finetune.py): batches, a loss, a metric.

    images      classes of pictures: cross-entropy of mixed pictures; top-1, top-5
    letters     transcripts of speech: CTC over the frames; word and character error rate
    sounds      events in recordings: binary cross-entropy of frames, pooled; mean average precision
    sentences   GLUE: cross-entropy, or squared error for a score; the task's own metrics

Each is a function (cfg, build, place, accumulation, bad) -> Task: cfg finetune.py's options; build(classes) -> the model, what its
file says, the classes of its outputs; place (rank, processes, device, autocast); accumulation micro-batches a step; bad a set
that collects "file: what is wrong with it".
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import common
from common import BadInput
from data import audio, glue, images, letters, text
from masking import span_mask
from model import Recogniser, linear_softmax
from targets import average_precision


@dataclass
class Task:
    """What one kind of labels brings to the loop: images_task, letters_task, sounds_task, sentences_task."""

    model: torch.nn.Module  # an encoder and a new head
    state: dict  # of the checkpoint it comes from: "config", "classes" and, to resume, all the rest
    classes: list[str]  # what the outputs stand for
    examples: str  # such as "1000 images"
    metric: str  # of those that evaluate() returns, the one that says which checkpoint is best
    lower: bool  # is less better?
    batches: Callable[[int], Iterator]  # (step) -> this process's micro-batches of the steps after it
    weigh: Callable  # (micro-batch) -> what the loss is a mean over (images, letters, clips), how many examples these are
    loss: Callable  # (network, micro-batch, rng) -> the loss, summed over the micro-batch
    evaluate: Callable[[], dict[str, float]]  # on the held-out part; every example counts once, whatever the processes
    extra: dict = field(default_factory=dict)  # what else a checkpoint must hold


# ---- images: classes -------------------------------------------------------------------------------------------------


def images_task(cfg, build, place, accumulation, bad) -> Task:
    """Top-1 (and top-5 from 10 classes up); a subset of train/ by label_fraction, the same for every run of a seed."""
    rank, world, device, autocast = place
    train, val = images.open_folder(cfg.data) if cfg.data else images.made_images()
    if len(train.classes) < 2:
        raise BadInput(f"{cfg.data}: only one class in train/; fine-tuning needs at least two folders of classes")
    for part in (train, val):
        if -1 in part.labels:
            name = part.names[part.labels.index(-1)]
            raise BadInput(f"{name}: not in one of the {len(train.classes)} class folders of train/; move it or add the class")
    train = train.part(images.label_subset(train.labels, cfg.label_fraction, cfg.seed))
    classifier, state, classes = build(train.classes)
    classifier.to(device)
    size = classifier.encoder.embed.image_size

    def augment(img, rng):
        img = images.flip(images.random_resized_crop(img, size, (cfg.crop_min, 1.0), (3 / 4, 4 / 3), rng), rng)
        if cfg.rand_augment:
            return images.rand_augment(img, 2, cfg.rand_augment, 0.5, rng)
        return images.color_jitter(img, cfg.jitter, rng)

    def load(views, keys):
        return DataLoader(views, batch_sampler=keys, collate_fn=images.collate, num_workers=cfg.workers,
                          pin_memory=device.type == "cuda", generator=torch.Generator())  # fmt: skip

    def batches(step):
        keys = images.batches(len(train), cfg.seed, step, cfg.steps, cfg.global_batch, accumulation, world, rank)
        return iter(load(images.Views(train, augment, cfg.seed), keys))

    def weigh(batch):
        return len(batch[0]), len(batch[0])

    def loss(network, batch, rng):
        view, _, labels, broken = batch
        bad.update(broken)
        x, y = images.normalise(view.to(device)), F.one_hot(labels.to(device), len(classes)).float()
        x, y = images.mix(images.erase(x, cfg.erasing, rng), y, cfg.mixup, cfg.cutmix, rng)
        with autocast:
            logits = network(x)
        return F.cross_entropy(logits.float(), y, label_smoothing=cfg.smoothing, reduction="sum")

    @torch.no_grad()
    def evaluate():
        views = images.Views(val, lambda img, rng: images.center_crop(img, size), 0, replace=False)
        mine, hits = range(rank, len(val), world), []  # of each image: is it the first guess, the second, ... the fifth?
        classifier.eval()
        for view, _, labels, broken in load(views, [[(0, i) for i in mine[at : at + 250]] for at in range(0, len(mine), 250)]):
            bad.update(broken)
            if len(view):
                with autocast:
                    logits = classifier(images.normalise(view.to(device))).float()
                hits += (logits.topk(min(5, len(classes))).indices == labels.to(device)[:, None]).tolist()
        classifier.train()
        if not (hits := sum(common.gather(hits), [])):
            raise BadInput(f"{cfg.data}: no picture of val/ could be decoded, for instance {next(iter(bad))}; check the folder")
        first, five = np.mean([row[0] for row in hits]), np.mean([any(row) for row in hits])
        return {"top1": float(first)} | ({"top5": float(five)} if len(classes) >= 10 else {})

    return Task(classifier, state, classes, f"{len(train)} images", "top1", False, batches, weigh, loss, evaluate)


# ---- recordings: letters by CTC, sound events ---------------------------------------------------------------------------


def speech_batches(cfg, utterances, place, accumulation, step) -> Iterator:
    """This process's micro-batches after `step`, padded: at most max_samples, similar lengths together."""
    (rank, world, device, _), longest = place, round(cfg.max_seconds * audio.RATE)
    keys = audio.batches(utterances.lengths, cfg.max_samples, longest, cfg.seed, step, cfg.steps, accumulation * world, world, rank)
    return iter(DataLoader(audio.Batches(utterances, cfg.seed, longest, pad=True), batch_size=None, sampler=keys,
                           num_workers=cfg.workers, pin_memory=device.type == "cuda", generator=torch.Generator()))  # fmt: skip


def masked_outputs(cfg, network, encoder, x, samples, place, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves x (B, N), samples (B,) -> logits (B, T, classes) float32, frames (B,), under spans of hidden frames and channels."""
    _, _, device, autocast = place

    def spans(lengths, p, span, least):
        return span_mask(lengths, p, span, rng, equal=False, least=least).to(device) if p else None

    mask = spans(encoder.embed.frames(samples).numpy(), cfg.mask_p, cfg.mask_span, 1)  # (B, T)
    channels = spans(np.full(len(x), encoder.dim), cfg.channel_p, cfg.channel_span, 0)  # (B, D)
    with autocast:
        logits, frames = network(x.to(device), samples.to(device), mask, channels)
    return logits.float(), frames


@torch.no_grad()
def outputs(cfg, recogniser: Recogniser, utterances, place, bad) -> Iterator[tuple[int, torch.Tensor]]:
    """Of each utterance of this process's share, short ones first: its index and its logits (T, classes) float32."""
    (rank, world, device, autocast), longest = place, int(utterances.lengths.max())
    lots = audio.epoch_batches(utterances.lengths, cfg.max_samples, 0, 0, longest, sort=True)[rank::world]
    recogniser.eval()
    batches = DataLoader(audio.Batches(utterances, 0, longest, pad=True), batch_size=None, num_workers=cfg.workers,
                         sampler=[(0, i, tuple(lot.tolist())) for i, lot in enumerate(lots)], generator=torch.Generator())  # fmt: skip
    for lot, batch in zip(lots, batches):
        bad.update(batch["bad"])
        with autocast:
            logits, frames = recogniser(batch["source"].to(device), batch["lengths"].to(device))
        for asked, got, row, n in zip(lot.tolist(), batch["indices"].tolist(), logits.float(), frames.tolist()):
            if asked == got:  # else it could not be read, and another stands in its place
                yield got, row[:n]
    recogniser.train()


def letters_task(cfg, build, place, accumulation, bad) -> Task:
    """Word and character error rates of letters read off every frame, trained by CTC (Graves et al. 2006)."""
    rank, world, device, autocast = place
    if cfg.data and cfg.eval_only and cfg.valid:  # the training part need not be there
        train = valid = audio.concatenate([audio.open_split(cfg.data, split, show=rank == 0) for split in cfg.valid])
    else:
        train, valid = audio.open_folder(cfg.data, cfg.train, cfg.valid, show=rank == 0) if cfg.data else audio.made_speech()
    bad |= {*train.bad, *valid.bad}
    recogniser, state, dictionary = build(letters.LETTERS)
    recogniser.to(device)
    valid, left_out = letters.transcribed(valid, dictionary, math.inf)
    bad.update(left_out)
    longest, frames = cfg.max_seconds * audio.RATE, recogniser.encoder.embed.frames
    train, left_out = (valid, []) if cfg.eval_only else letters.transcribed(train, dictionary, longest, frames)
    bad.update(left_out)
    train = train.part(images.label_subset([0] * len(train), cfg.label_fraction, cfg.seed))
    targets = [letters.encode(said, dictionary) for said in train.transcripts]
    lm = letters.ArpaLM.read(cfg.lm) if cfg.lm else None
    if lm:
        letters.check_spelling(lm, dictionary)  # now, not at the first evaluation

    def batches(step):
        return speech_batches(cfg, train, place, accumulation, step)

    def weigh(batch):
        return sum(len(targets[i]) for i in batch["indices"].tolist()), len(batch["indices"])

    def loss(network, batch, rng):
        bad.update(batch["bad"])
        logits, frames = masked_outputs(cfg, network, recogniser.encoder, batch["source"], batch["lengths"], place, rng)
        said = [targets[i] for i in batch["indices"].tolist()]
        goal, lengths = torch.tensor([letter for word in said for letter in word]), torch.tensor([len(word) for word in said])
        log_probs = logits.log_softmax(-1).transpose(0, 1)  # (T, B, letters)
        return F.ctc_loss(log_probs, goal.to(device), frames, lengths.to(device), reduction="sum", zero_infinity=True)

    def evaluate():
        pairs = []  # what was said, what was understood
        for i, logits in outputs(cfg, recogniser, valid, place, bad):
            log_probs = logits.log_softmax(-1)
            if cfg.beam:
                guess = letters.decode_beam(log_probs, dictionary, cfg.beam, lm, cfg.lm_weight, cfg.word_score)[0][0]
            else:
                guess, _ = letters.decode_greedy(log_probs, dictionary)
            pairs.append((valid.transcripts[i], guess))
        words, characters = letters.wer(pairs := sum(common.gather(pairs), [])), letters.cer(pairs)
        counts = {name: getattr(words, name) for name in ("substitutions", "deletions", "insertions", "words")}
        return {"wer": words.rate, "cer": characters.rate} | counts

    return Task(recogniser, state, dictionary, f"{len(train)} utterances", "wer", True, batches, weigh, loss, evaluate)


def sounds_task(cfg, build, place, accumulation, bad) -> Task:
    """Mean average precision of sound events, several a clip: sigmoids of every frame, pooled by linear softmax."""
    rank, world, device, autocast = place
    if not cfg.data:
        raise BadInput("--data: sound events are not made on the spot; give a folder with classes.txt, train.csv and valid.csv")
    found, train, valid = audio.open_events(cfg.data, cfg.valid if cfg.eval_only else cfg.train, cfg.valid, show=rank == 0)
    bad |= {*train.bad, *valid.bad}
    train = train.part(images.label_subset([0] * len(train), cfg.label_fraction, cfg.seed))
    recogniser, state, classes = build(found)
    recogniser.to(device)

    def truth(utterances, indices):  # (B, classes) float, 1 where the event is in the clip
        said = [utterances.transcripts[i].split(";") for i in indices]
        return torch.tensor([[float(name in events) for name in classes] for events in said])

    def batches(step):
        return speech_batches(cfg, train, place, accumulation, step)

    def weigh(batch):
        return len(batch["indices"]), len(batch["indices"])

    def loss(network, batch, rng):
        bad.update(batch["bad"])
        x, samples, y = audio.mix(batch["source"], batch["lengths"], truth(train, batch["indices"].tolist()), cfg.mixup, rng)
        logits, frames = masked_outputs(cfg, network, recogniser.encoder, x, samples, place, rng)
        p = linear_softmax(logits, frames).clamp(1e-7, 1 - 1e-7)
        return F.binary_cross_entropy(p, y.to(device), reduction="sum") / len(classes)

    def evaluate():
        scores = {}  # {index: (classes,)}
        for i, logits in outputs(cfg, recogniser, valid, place, bad):
            scores[i] = linear_softmax(logits[None], torch.tensor([len(logits)], device=device))[0].cpu()
        scores = dict(sorted(pair for part in common.gather(list(scores.items())) for pair in part))
        return {"map": average_precision(torch.stack(list(scores.values())), truth(valid, list(scores)))}

    return Task(recogniser, state, classes, f"{len(train)} clips", "map", False, batches, weigh, loss, evaluate)


# ---- sentences: GLUE ---------------------------------------------------------------------------------------------------


def sentences_task(cfg, build, place, accumulation, bad) -> Task:
    """A task's own metrics on its dev splits: accuracy, F1, Matthews, Pearson, Spearman (section 5.3)."""
    rank, world, device, autocast = place
    spec, parts = glue.open_task(cfg.data, cfg.task, training=not cfg.eval_only)
    bad |= {line for part in parts.values() for line in part.bad}
    classifier, state, classes = build(list(spec.classes) or ["score"])
    classifier.to(device)
    vocabulary, longest = text.Vocabulary.parse(state["vocabulary"]), state["config"]["max_tokens"]
    held_out = {split: glue.Sentences(part.rows, vocabulary, longest) for split, part in parts.items()}
    if train := held_out.pop("train", ()):
        strata = [label if spec.classes else 0 for *_, label in train.rows]
        train = train.part(images.label_subset(strata, cfg.label_fraction, cfg.seed))
    if rank == 0 and (cut := sum(sentences.cut() for sentences in held_out.values())):
        print(f"held-out examples that are longer than the model's {longest} tokens and lose their end: {cut}")

    def load(sentences, keys):
        return DataLoader(sentences, batch_size=None, sampler=keys, num_workers=cfg.workers, pin_memory=device.type == "cuda",
                          generator=torch.Generator())  # fmt: skip

    def batches(step):
        return iter(load(train, text.batches(len(train), cfg.seed, step, cfg.steps, cfg.global_batch, accumulation, world, rank)))

    def weigh(batch):
        return len(batch["labels"]), len(batch["labels"])

    def loss(network, batch, rng):
        tokens, labels = batch["tokens"].to(device), batch["labels"].to(device)
        with autocast:
            logits = network(tokens)
        if spec.classes:
            return F.cross_entropy(logits.float(), labels.long(), reduction="sum")
        return F.mse_loss(logits.float()[:, 0], labels, reduction="sum")

    @torch.no_grad()
    def evaluate():
        classifier.eval()
        scores = {}
        for split, sentences in held_out.items():
            found, mine = {}, range(rank, len(sentences), world)
            keys = [[(0, i) for i in mine[at : at + 64]] for at in range(0, len(mine), 64)]
            for key, batch in zip(keys, load(sentences, keys)):
                with autocast:
                    logits = classifier(batch["tokens"].to(device)).float()
                guess = logits.argmax(1) if spec.classes else logits[:, 0]
                found |= {i: pair for (_, i), *pair in zip(key, guess.tolist(), batch["labels"].tolist())}
            everywhere = {i: pair for part in common.gather(found) for i, pair in part.items()}
            guess, truth = (np.array(column) for column in zip(*(everywhere[i] for i in sorted(everywhere))))
            end = "" if split in ("dev", "dev_matched") else "_" + split.removeprefix("dev_")
            scores |= {name + end: glue.METRICS[name](guess, truth) for name in spec.metrics}
        classifier.train()
        return scores

    examples, extra = f"{len(train)} sentences", {"vocabulary": state["vocabulary"], "parts": 1 + (spec.columns[1] is not None)}
    return Task(classifier, state, classes, examples, spec.metrics[0], False, batches, weigh, loss, evaluate, extra)


TASKS = {"images": images_task, "letters": letters_task, "sounds": sounds_task, "sentences": sentences_task}
