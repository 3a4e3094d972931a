"""Fine-tune a pre-trained encoder on labels, measure it, use it (Baevski et al. 2022, sections 5.1 to 5.3).

python finetune.py --init CKPT                                        # synthetic images, laptop CPU
python finetune.py --preset 10h --data DIR --init CKPT                # speech; audioset: sound events
python finetune.py --preset glue --task CoLA --data DIR --init CKPT   # or a folder of yours in DIR
python finetune.py --init BEST --eval_only --data DIR --valid test --beam 50 --lm LM.arpa
python finetune.py --init BEST --predict FILES                        # or sentences
"""

import itertools
import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import common
import train_speech
import train_text
import train_vision
from common import RunConfig, UserError, due, option, require
from data import audio, glue, images, letters, text
from data.sampling import batches, label_subset, loader
from masking import span_mask
from model import init_vision
from tools import convert, probes


@dataclass
class Config(RunConfig):
    task: str = option("images", "images, letters, sounds, a task of GLUE or a folder of yours in --data")
    train: list = option([], "recordings: splits of --data to train on")
    valid: list = option([], "recordings: splits of --data to evaluate on")
    init: str = option("none", "pre-trained or fine-tuned checkpoint; none: random weights of --model")
    init_from: str = option("student", "network of --init", ("student", "teacher", "random"))
    model: str = option("smoke", "with --init none: preset of the pre-training script")
    eval_only: bool = option(False, "only evaluate the fine-tuned --init on held-out data")
    predict: list = option([], "files, or sentences (a tab between two), for the fine-tuned --init")
    label_fraction: float = option(1.0, "fraction of the training data to use", min_=1e-9, max_=1)
    global_batch: int = option(64, "images or sentences an update", min_=1)
    micro_batch: int = option(0, "most images or sentences a process holds at once; 0: no limit", min_=0)
    batch_seconds: int = option(64, "recordings: seconds of audio an update", min_=1)
    max_samples: int = option(512_000, "recordings: most samples a process holds at once", min_=400)
    max_seconds: float = option(30.0, "recordings: longer ones are left out, or cropped (sounds)", min_=0.025)
    image_size: int = option(0, "images: pixels; 0: as pre-trained; else positions are interpolated", min_=0)
    # optimiser
    lr: float = option(1e-3, "peak learning rate of the top", min_=0)
    head_lr: float = option(0.0, "peak learning rate of the head; 0: lr", min_=0)
    layer_decay: float = option(0.75, "learning rate of a layer / of the one above", min_=0.01, max_=1)
    schedule: str = option("cosine", "of the learning rate", ("cosine", "tri_stage", "linear"))
    warmup: float = option(0.1, "fraction of the steps; too short and a large lr diverges", min_=0, max_=1)
    final_scale: float = option(1e-3, "learning rate at the last step, as a fraction of lr", min_=0, max_=1)
    weight_decay: float = option(0.05, "on matrices only", min_=0)
    clip: float = option(0.0, "largest gradient norm; 0: no clipping", min_=0)
    freeze_steps: int = option(0, "recordings: first steps, in which only the head learns", min_=0)
    # regularisation
    drop_path: float = option(0.1, "images: stochastic depth of the last layer", min_=0, max_=0.99)
    layer_drop: float = option(0.0, "recordings: probability to skip a layer", min_=0, max_=0.99)
    dropout: float = option(0.0, "of branches, attention weights, the head (not images')", min_=0, max_=0.99)
    ffn_dropout: float = option(0.0, "recordings: dropout inside the FFN", min_=0, max_=0.99)
    mask_p: float = option(0.0, "recordings: fraction of frames to hide, as in pre-training", min_=0, max_=1)
    channel_p: float = option(0.0, "recordings: fraction of channels to set to zero", min_=0, max_=1)
    mixup: float = option(0.0, "images: Beta parameter; sounds: probability; 0: off", min_=0)
    cutmix: float = option(0.0, "images: Beta parameter; 0: off", min_=0)
    erasing: float = option(0.0, "images: probability to erase a rectangle", min_=0, max_=1)
    rand_augment: float = option(0.0, "images: magnitude; 0: colour jitter instead", min_=0, max_=10)
    crop_min: float = option(0.4, "images: smallest area of the random crop", min_=0.01, max_=1)
    pool: str = option("first", "sentences: score <s>, or take the largest of all tokens", ("first", "max"))
    beam: int = option(0, "letters: width of the beam search; 0: greedy", min_=0)
    lm: str = option("", "letters: language model for the beam search, an ARPA file")
    lm_weight: float = option(2.0, "letters: weight of the language model's log10 probabilities")
    word_score: float = option(-1.0, "letters: added for each word")
    # values of presets, not options
    decay: float = 0.5
    beta2: float = 0.999
    freeze_convs: bool = True
    mask_span: int = 10


IMAGENET = dict(
    model="base", global_batch=1024, micro_batch=128, workers=10, log_every=50, save_every=2500,
    probe_every=6255, layer_decay=0.65, crop_min=0.08, mixup=0.8, cutmix=1.0, erasing=0.25, rand_augment=9.0,
)  # fmt: skip
CTC = dict(
    task="letters", model="base", batch_seconds=1600, max_samples=3_200_000, workers=6, log_every=50, lr=5e-5,
    save_every=1000, probe_every=1000, layer_decay=1.0, schedule="tri_stage", final_scale=0.05, beta2=0.98,
    weight_decay=0.0, layer_drop=0.1, ffn_dropout=0.1, freeze_steps=10_000, mask_p=0.65, channel_p=0.25,
)  # fmt: skip
SMALL_CTC = CTC | dict(mask_p=0.3, layer_drop=0.0, clip=3.0, freeze_steps=0, freeze_convs=False)
LARGE = dict(model="large", max_samples=1_600_000)
GLUE = dict(
    task="", workers=1, layer_decay=1.0, schedule="linear", warmup=0.06, final_scale=0.0, weight_decay=0.1,
    beta2=0.98, dropout=0.1,
)  # fmt: skip
PRESETS = {
    # images. base, large: ImageNet-1K, paper 84.2, 86.6 top-1; not run here. Others: 2 CPU cores, RESULTS.md
    "smoke": dict(steps=500, probe_every=100),
    "cifar10": dict(model="cifar10", steps=500, probe_every=250, save_every=0, workers=1),
    "base": IMAGENET | dict(steps=125_100, lr=4e-3, final_scale=2.5e-4, drop_path=0.2),
    "large": IMAGENET | LARGE | dict(steps=62_550, lr=5e-3, warmup=0.2, final_scale=2e-4, drop_path=0.25),
    # letters. 10m to 960h: labels of Libri-light, LibriSpeech (section 5.2); not run here. Others: likewise
    "speech_smoke": SMALL_CTC | dict(
        model="smoke", steps=700, batch_seconds=16, max_samples=256_000, max_seconds=4.0, workers=0,
        log_every=10, probe_every=0, save_every=0, lr=2e-3, label_fraction=0.1, channel_p=0.0,
    ),
    "digits": SMALL_CTC | dict(
        model="digits", steps=1000, batch_seconds=32, max_samples=512_000, workers=1, probe_every=250,
        save_every=250, lr=3e-4, head_lr=5e-3, channel_p=0.333,
    ),
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
    # AudioSet-20K, 21.3 minutes a batch; paper 34.5 mAP; the schedule is ours; not run here
    "audioset": CTC | dict(
        task="sounds", model="audioset", steps=13_000, batch_seconds=1280, max_samples=1_280_000,
        max_seconds=10.0, lr=3e-5, head_lr=2e-4, mask_p=0.45, mask_span=4, channel_p=0.0, mixup=0.7,
        freeze_steps=0, layer_drop=0.05, ffn_dropout=0.0,
    ),
    # glue: RoBERTa's recipe (section 5.3; --lr 1e-5 .. 4e-5), 0: by task; not run here. Others: likewise
    "glue": GLUE | dict(steps=0, global_batch=0, micro_batch=32, probe_every=0, save_every=1000, lr=2e-5),
    "glue_small": GLUE | dict(steps=1000, global_batch=32, probe_every=200, save_every=0, lr=3e-4, clip=1.0),
}  # fmt: skip


class Classifier(nn.Module):
    """Mean of the patches' last layer, or the class token's with pool_cls, -> LayerNorm -> Linear."""

    def __init__(self, encoder, classes, pool_cls=False):
        super().__init__()
        self.norm = nn.LayerNorm(encoder.dim, eps=encoder.blocks[0].norm1.eps)
        encoder.norm, encoder.mask_embedding = nn.Identity(), None  # its own are not used
        self.encoder, self.pool_cls, self.out = encoder, pool_cls, nn.Linear(encoder.dim, classes)
        init_vision(self.out)

    def forward(self, images):
        """images (B, 3, S, S) -> logits (B, classes)."""
        features, _ = self.encoder(images)
        pooled = features[:, 0] if self.pool_cls else features[:, self.encoder.prefix :].mean(1)
        return self.out(self.norm(pooled))


class SentenceClassifier(nn.Module):
    """Last layer of <s> -> dropout -> Linear -> tanh -> dropout -> Linear (RoBERTa's); pool "max": of each
    token, and of these scores the largest (ours, for what no single token tells, as the order of words)."""

    def __init__(self, encoder, classes, dropout=0.0, pool="first"):
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        self.scored = {"first": 1, "max": None}[pool]
        self.dense, self.out = nn.Linear(encoder.dim, encoder.dim), nn.Linear(encoder.dim, classes)
        for linear in (self.dense, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, classes); one class: a score."""
        features, _ = self.encoder(tokens)
        scores = self.out(self.dropout(self.dense(self.dropout(features[:, : self.scored])).tanh()))
        padding = tokens[:, : self.scored, None] == self.encoder.embed.pad
        return scores.masked_fill(padding, -math.inf).amax(1)


class FrameClassifier(nn.Module):
    """Last layer of each frame -> dropout -> Linear: letters or events. frozen: only this Linear learns."""

    def __init__(self, encoder, classes, dropout=0.0):
        super().__init__()
        self.encoder, self.dropout, self.out = encoder, nn.Dropout(dropout), nn.Linear(encoder.dim, classes)
        self.frozen = False

    def forward(self, waves, samples=None, mask=None, channels=None):
        """waves (B, N), samples (B,); hides mask (B, T), channels (B, D) -> logits (B, T, C), frames (B,)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x, valid = self.encoder.embed(waves, samples)
            if mask is not None:
                x = self.encoder.hide(x, mask)
            if channels is not None:
                x = x.masked_fill(channels[:, None], 0)
            features, _ = self.encoder.transform(x, None, valid)
        frames = torch.full((len(x),), x.shape[1], device=x.device) if valid is None else valid.sum(1)
        return self.out(self.dropout(features)), frames


def linear_softmax(logits, frames):
    """Events of clips, sum p^2 / sum p over frames (Wang et al. 2019): (B, T, C), frames (B,) -> (B, C)."""
    real = torch.arange(logits.shape[1], device=logits.device) < frames[:, None]
    p = logits.float().sigmoid() * real[..., None]
    return p.square().sum(1) / p.sum(1).clamp_min(1e-7)


def average_precision(scores, truth):
    """Mean precision at the hits, from the highest score down, mean over classes with a hit; both (N, C)."""
    hits = truth.gather(0, scores.argsort(dim=0, descending=True, stable=True))
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return ((precision * hits).sum(0) / hits.sum(0)).nanmean().item()


class Task:
    """Data, model, loss and metric of one kind of labels. A subclass names itself, and has

    setup() -> train, held_out {suffix of its metrics: (data set, keys)}; calls build
    loss(network, batch, rng) -> sum over a micro-batch; the loop divides by the sum of all size(batch)
    pairs(key, batch) -> (prediction, truth) of each held-out sample; measure(predictions, truths) -> metrics
    answer(path) -> text, of --predict
    """

    sign, eps = 1, 1e-8  # sign * metric: more is better

    def __init__(self, cfg, state, processes):
        self.cfg, self.state, self.skipped, self.extra = cfg, state, [], {}
        self.rank, self.world, self.device, self.autocast, *_ = processes
        self.tuned = state.get("classes") if state.get("task") == self.kind else None
        self.vocabulary = text.Vocabulary.parse(state["vocabulary"]) if "vocabulary" in state else None

    def build(self, classes):
        """The encoder of --init or --model, and a head for these classes: the file's, if it has the same."""
        cfg, keep, old = self.cfg, classes == self.tuned, self.state["config"]
        require(keep or not cfg.eval_only, f"--data {cfg.data}: its classes are not those of {cfg.init}")
        cfg.image_size = cfg.image_size or old.get("image_size", 0)
        own = ("image_size", "drop_path", "layer_drop", "dropout", "ffn_dropout")
        config = old | {name: getattr(cfg, name) for name in own} | {"attn_dropout": cfg.dropout}
        known = [f.name for f in fields(self.script.Config)]
        config = self.script.Config(**{name: config[name] for name in known if name in config})
        vocab = [self.vocabulary.size] if self.vocabulary else []
        encoder = self.script.build(config, *vocab).encoder
        options = [config.pool_cls] if self.modality == "vision" else [cfg.dropout]
        options += [cfg.pool] if self.modality == "text" else []
        self.model = self.head(encoder, len(classes), *options).to(self.device)
        self.classes, self.config = classes, asdict(config)
        if cfg.init != "none" and (cfg.init_from != "random" or self.tuned):
            network = "student" if self.tuned else cfg.init_from
            convert.load_encoder(self.model, self.state, cfg.init, network, head=keep)

    def load(self, dataset, keys):
        return self.log.watch(loader(dataset, keys, self.cfg.workers, self.device))

    def batches(self, step, accumulation):
        """This process's micro-batches after `step`."""
        cfg, split = self.cfg, (self.cfg.global_batch, accumulation, self.world, self.rank)
        return self.load(self.dataset, batches(len(self.train), cfg.seed, step, cfg.steps, *split))

    def accumulation(self):
        return common.accumulation_steps(self.cfg.global_batch, self.cfg.micro_batch, self.world)

    def size(self, batch):
        return len(batch.get("labels", batch.get("indices")))

    def call(self, network, *inputs):
        with self.autocast:
            return network(*(x if x is None else x.to(self.device) for x in inputs))

    @torch.no_grad()
    def evaluate(self):
        """{metric: value} on held-out data; each sample counts once, for any number of processes."""
        self.model.eval()
        scores = {}
        for suffix, (dataset, keys) in self.held_out.items():
            mine, found = keys[self.rank :: self.world], []
            for key, batch in zip(mine, self.load(dataset, mine)):
                found += self.pairs(key, batch)
            found = sum(common.gather(found), [])
            require(found, f"--data {self.cfg.data}: no held-out sample can be read")
            scores |= {f"{name}{suffix}": value for name, value in self.measure(*zip(*found)).items()}
        self.model.train()
        return scores

    def name_best(self, probabilities):
        values, indices = probabilities.topk(min(5, len(probabilities)))
        return ", ".join(f"{self.classes[i]} {p:.3f}" for p, i in zip(values.tolist(), indices.tolist()))


def augment(cfg, img, rng):
    img = images.random_resized_crop(img, cfg.image_size, (cfg.crop_min, 1.0), (3 / 4, 4 / 3), rng)
    img = images.flip(img, rng)
    if cfg.rand_augment:
        return images.rand_augment(img, 2, cfg.rand_augment, 0.5, rng)
    return images.color_jitter(img, 0.4, rng)


class Images(Task):
    """Classes of pictures: cross-entropy of mixed pictures; top-1, and top-5 from 10 classes up."""

    kind, modality, script, head, metric = "images", "vision", train_vision, Classifier, "top1"

    def setup(self):
        cfg = self.cfg
        train, val = images.open_data(cfg.data, self.tuned or ())
        usable = len(train.classes) > 1 and min(train.labels + val.labels) >= 0
        require(usable, f"--data {cfg.data}: train/ and val/ must hold the same class folders, at least two")
        if self.tuned == [str(i) for i in range(len(train.classes))] != train.classes:
            self.tuned, first = train.classes, ", ".join(train.classes[:9])
            common.say(f"--init {cfg.init}: no class names; taken in the order of the folders: {first} ...")
        self.build(train.classes)
        self.train = train.part(label_subset(train.labels, cfg.label_fraction, cfg.seed))
        self.dataset = images.Views(self.train, partial(augment, cfg), cfg.seed)
        views = images.Views(val, partial(probes.resize, cfg.image_size), 0, replace=False)
        self.held_out = {"": (views, probes.in_parts(range(len(val)), 250))}

    def loss(self, network, batch, rng):
        cfg = self.cfg
        x = images.normalise(batch["images"].to(self.device))
        y = F.one_hot(batch["labels"].to(self.device), len(self.classes)).float()
        x, y = images.mix(images.erase(x, cfg.erasing, rng), y, cfg.mixup, cfg.cutmix, rng)
        logits = self.call(network, x).float()
        return F.cross_entropy(logits, y, label_smoothing=0.1, reduction="sum")

    def pairs(self, key, batch):
        if len(batch["images"]) == 0:
            return []
        logits = self.call(self.model, images.normalise(batch["images"].to(self.device))).float()
        return zip(logits.topk(min(5, len(self.classes))).indices.tolist(), batch["labels"].tolist())

    def measure(self, predictions, truths):
        hits = [[guess == label for guess in guesses] for guesses, label in zip(predictions, truths)]
        top1, top5 = np.mean([row[0] for row in hits]), np.mean([any(row) for row in hits])
        return {"top1": float(top1)} | ({"top5": float(top5)} if len(self.classes) >= 10 else {})

    def answer(self, path):
        img = images.center_crop(images.load_image(path), self.cfg.image_size)
        logits = self.call(self.model, images.normalise(images.to_tensor(img)[None]))
        return self.name_best(logits[0].float().softmax(-1))


class Speech(Task):  # recordings: padded in training, one at a time in evaluation
    modality, script, head = "speech", train_speech, FrameClassifier

    def use(self, train, valid):
        cfg, self.valid, self.skipped = self.cfg, valid, train.skipped + valid.skipped + self.skipped
        self.train = train.part(label_subset([0] * len(train), cfg.label_fraction, cfg.seed))
        alone = [(0, i, (i,)) for i in range(len(valid))]
        self.held_out = {"": (audio.Batches(valid, 0, 2**40, pad=True), alone)}

    def accumulation(self):
        return train_speech.micro_batch_count(self.cfg, self.world)

    def batches(self, step, accumulation):
        cfg, longest = self.cfg, round(self.cfg.max_seconds * audio.RATE)
        split = cfg.steps, accumulation * self.world, self.world, self.rank
        keys = audio.batches_by_length(self.train.lengths, cfg.max_samples, longest, cfg.seed, step, *split)
        return self.load(audio.Batches(self.train, cfg.seed, longest, pad=True), keys)

    def logits(self, network, waves, samples, rng):
        """waves (B, N), samples (B,) -> logits (B, T, classes) float32, frames (B,), with hidden spans."""
        cfg, encoder = self.cfg, self.model.encoder
        frames, widths = encoder.embed.frames(samples).numpy(), np.full(len(waves), encoder.dim)
        mask = channels = None
        if cfg.mask_p:
            mask = span_mask(frames, cfg.mask_p, cfg.mask_span, rng, equal=False)
        if cfg.channel_p:
            channels = span_mask(widths, cfg.channel_p, 64, rng, equal=False, min_spans=0)
        logits, frames = self.call(network, waves, samples, mask, channels)
        return logits.float(), frames

    def hear(self, wave):
        """(1, N), normalised -> logits (T, classes) float32; in evaluation as in prediction."""
        return audio.in_windows(partial(self.call, self.model), wave)[0].float()

    def pairs(self, key, batch):
        if key[2] == tuple(batch["indices"].tolist()):  # else it cannot be read, and another one replaces it
            yield self.predict(self.hear(batch["source"])), self.valid.transcripts[key[2][0]]

    def answer(self, path):
        wave = torch.from_numpy(audio.normalise(audio.load_audio(path)))
        return self.describe(self.hear(wave[None]))


class Letters(Speech):
    """Letters of each frame, trained by CTC (Graves et al. 2006); word and character error rates."""

    kind, metric, sign = "letters", "wer", -1

    def setup(self):
        cfg = self.cfg
        if cfg.eval_only and cfg.valid and cfg.data:  # no training data needed
            train = valid = audio.open_split(cfg.data, *cfg.valid)
        else:
            train, valid = audio.open_data(cfg.data, cfg.train, cfg.valid)
        self.build(self.tuned or letters.alphabet(train.transcripts))
        longest, frames = cfg.max_seconds * audio.RATE, self.model.encoder.embed.frames
        valid, self.skipped = letters.transcribed(valid, self.classes, math.inf)
        if not cfg.eval_only:
            train, left_out = letters.transcribed(train, self.classes, longest, frames)
            self.skipped += left_out
        self.use(train, valid)
        self.lm = letters.ArpaLM(cfg.lm, self.classes) if cfg.lm else None

    def size(self, batch):
        return sum(len(self.train.transcripts[i]) + 1 for i in batch["indices"].tolist())  # "|" at the end

    def loss(self, network, batch, rng):
        logits, frames = self.logits(network, batch["source"], batch["lengths"], rng)
        transcripts = [self.train.transcripts[i] for i in batch["indices"].tolist()]
        targets = [letters.encode(transcript, self.classes) for transcript in transcripts]
        joined = torch.tensor(sum(targets, []), device=self.device)
        lengths = torch.tensor([len(target) for target in targets], device=self.device)
        log_probs = logits.log_softmax(-1).transpose(0, 1)  # (T, B, letters)
        return F.ctc_loss(log_probs, joined, frames, lengths, reduction="sum", zero_infinity=True)

    def predict(self, logits):
        cfg, log_p = self.cfg, logits.log_softmax(-1)
        if not cfg.beam:
            return letters.decode_greedy(log_p, self.classes)[0]
        found = letters.decode_beam(log_p, self.classes, cfg.beam, self.lm, cfg.lm_weight, cfg.word_score)
        return found[0][0]

    def measure(self, predictions, truths):
        pairs = list(zip(truths, predictions))
        words, characters = letters.wer(pairs), letters.cer(pairs)
        return {"wer": words.rate, "cer": characters.rate} | words._asdict()

    def describe(self, logits):
        words, times = letters.decode_greedy(logits.log_softmax(-1), self.classes)
        return " ".join(f"{word} ({a:.2f}-{b:.2f} s)" for word, (a, b) in zip(words.split(), times))


class Sounds(Speech):
    """Events in clips, several a clip: pooled sigmoids; binary cross-entropy; mean average precision."""

    kind, metric = "sounds", "map"

    def setup(self):
        cfg = self.cfg
        tables = cfg.valid if cfg.eval_only else cfg.train
        classes, *splits = audio.open_events(cfg.data, tables, cfg.valid)
        self.use(*splits)
        self.build(self.tuned if sorted(self.tuned or []) == sorted(classes) else classes)

    def truth(self, transcripts):
        """(B, classes) float, 1 for the events of the clip."""
        events = [transcript.split(";") for transcript in transcripts]
        return torch.tensor([[float(name in found) for name in self.classes] for found in events])

    def loss(self, network, batch, rng):
        y = self.truth(self.train.transcripts[i] for i in batch["indices"].tolist())
        x, samples, y = audio.mix(batch["source"], batch["lengths"], y, self.cfg.mixup, rng)
        p = linear_softmax(*self.logits(network, x, samples, rng)).clamp(1e-7, 1 - 1e-7)
        return F.binary_cross_entropy(p, y.to(self.device), reduction="sum") / len(self.classes)

    def predict(self, logits):
        return linear_softmax(logits[None], torch.tensor([len(logits)], device=self.device))[0].cpu()

    def measure(self, predictions, transcripts):
        return {"map": average_precision(torch.stack(predictions), self.truth(transcripts))}

    def describe(self, logits):
        return self.name_best(self.predict(logits))


class Sentences(Task):
    """Tasks of GLUE and yours: cross-entropy, or squared error of a score; the task's own metrics."""

    kind, modality, script, head, eps = "sentences", "text", train_text, SentenceClassifier, 1e-6

    def setup(self):
        cfg = self.cfg
        require(cfg.task, f"--task: must be one of {', '.join(glue.TASKS)}, or a folder of yours in --data")
        names = self.tuned or []
        self.spec, splits = glue.open_task(Path(cfg.data, cfg.task), not cfg.eval_only, names)
        order = glue.output_order(self.spec, names, cfg.eval_only)
        self.build(names if order else list(self.spec.classes))
        self.order = order or list(range(len(self.classes)))  # of the outputs: a file has its own
        self.train, self.held_out, self.metric = splits.pop("train", []), {}, self.spec.metrics[0]
        options = self.vocabulary, self.config["max_tokens"]
        for split, part in splits.items():
            suffix = split.removeprefix("dev").replace("_matched", "")
            self.held_out[suffix] = glue.Sentences(part, *options), probes.in_parts(range(len(part)), 64)
        self.extra = {"vocabulary": self.state["vocabulary"], "parts": len(part[0][0])}
        if self.train:
            strata = [label if len(self.classes) > 1 else 0 for _, label in self.train]
            self.train = [self.train[i] for i in label_subset(strata, cfg.label_fraction, cfg.seed)]
            self.dataset = glue.Sentences(self.train, *options)
            cfg.global_batch = cfg.global_batch or self.spec.batch
            cfg.steps = cfg.steps or self.spec.steps or math.ceil(10 * len(self.train) / cfg.global_batch)

    def loss(self, network, batch, rng):
        logits = self.call(network, batch["tokens"]).float()[:, self.order]
        labels = batch["labels"].to(self.device)
        if len(self.classes) == 1:
            return F.mse_loss(logits[:, 0], labels, reduction="sum")
        return F.cross_entropy(logits, labels.long(), reduction="sum")

    def pairs(self, key, batch):
        logits = self.call(self.model, batch["tokens"]).float()[:, self.order]
        guesses = logits[:, 0] if len(self.classes) == 1 else logits.argmax(1)
        return zip(guesses.tolist(), batch["labels"].tolist())

    def measure(self, predictions, truths):
        p, t = np.array(predictions), np.array(truths)
        return {name: float(glue.METRICS[name](p, t)) for name in self.spec.metrics}

    def answer(self, line):
        parts = line.split("\t")
        wanted = self.state.get("parts", min(len(parts), 2))
        require(len(parts) == wanted and all(map(str.strip, parts)), f"{wanted} sentences are needed")
        ids = glue.sentence_ids(self.vocabulary, *parts, max_tokens=self.config["max_tokens"])
        logits = self.call(self.model, torch.tensor([ids]))[0].float()
        return f"{logits.item():.3f}" if len(self.classes) == 1 else self.name_best(logits.softmax(-1))


KINDS = {kind.kind: kind for kind in (Images, Letters, Sounds, Sentences)}


def choose_task(cfg, processes):
    """The kind of task, with what --init or the run to resume holds, or the sizes of --model."""
    stored = Path(cfg.out, "ckpt.pt")
    source = str(stored) if cfg.resume and stored.exists() else cfg.init
    state = {} if source == "none" else convert.read(source)
    kind = cfg.task if cfg.task in KINDS else "sentences"
    if cfg.eval_only or cfg.predict:
        kind = state.get("task")
        require(kind in KINDS, f"--init {cfg.init}: not fine-tuned, or not by this script; use its best.pt")
        tuned = {"task": kind} | state.get("finetune", {})
        cfg.task, cfg.pool = tuned["task"] if cfg.task in KINDS else cfg.task, tuned.get("pool", "first")
    task = KINDS[kind]
    if not state:
        require(cfg.model in task.script.PRESETS, f"--model {cfg.model}: not in {[*task.script.PRESETS]}")
        state = {"config": asdict(task.script.Config(**task.script.PRESETS[cfg.model]))}
    found = convert.modality(state["config"])
    require(found == task.modality, f"--init {cfg.init}: of {found}; --task {cfg.task} needs {task.modality}")
    require(found != "text" or "vocabulary" in state, f"--init {cfg.init}: no vocabulary; use a checkpoint")
    return task(cfg, state, processes)


def layer_groups(cfg, model):
    """Each layer learns layer_decay times as fast as the one above it (Bao et al. 2021)."""
    top, groups = len(model.encoder.blocks) + 1, {}
    for name, p in model.named_parameters():
        layer = top  # the head, and the table of positions
        if name.startswith("encoder.blocks."):
            layer = 1 + int(name.split(".")[2])
        elif name.startswith("encoder.") and not name.endswith("table"):
            layer = 0
        decays, in_head = p.ndim > 1 and not name.endswith(("table", "learned")), name[:8] != "encoder."
        scale = cfg.head_lr / cfg.lr if cfg.head_lr and in_head else cfg.layer_decay ** (top - layer)
        group = {"params": [], "scale": scale, "weight_decay": cfg.weight_decay if decays else 0.0}
        if p.requires_grad:
            groups.setdefault((layer, decays, in_head), group)["params"].append(p)
    return list(groups.values())


def main():
    cfg = common.parse(Config, PRESETS, __doc__, family="finetune")
    rank, world, device, _, scaler = processes = common.start_processes(cfg.device, cfg.dtype)
    require(cfg.beam or not cfg.lm, "--lm: needs the beam search; add --beam 50")
    require(not (cfg.beam and cfg.predict), "--beam: --predict is greedy, for the times; use --eval_only")
    require(not (cfg.resume and cfg.eval_only), "--eval_only: would change the run; use another --out")
    torch.manual_seed(cfg.seed)
    task = choose_task(cfg, processes)
    if cfg.predict:
        return predict(task) if rank == 0 else None
    task.setup()
    model, speech = task.model, task.modality == "speech"
    if cfg.compile:
        model.encoder.transform = torch.compile(model.encoder.transform, dynamic=speech or None)

    # ---- optimiser, checkpoint, log
    pretrained = cfg.init != "none" and cfg.init_from != "random"
    if speech and cfg.freeze_convs and pretrained:
        for part in ("convs", "norms"):
            model.encoder.embed.content[part].requires_grad_(False)
    optimizer = torch.optim.AdamW(layer_groups(cfg, model), cfg.lr, (0.9, cfg.beta2), task.eps, fused=True)
    torch.manual_seed(cfg.seed * 1000 + rank)  # dropout and drop path differ between processes
    state = common.load_run(cfg, rank, model, None, optimizer, scaler)
    step, best, scores = state["step"], state.get("best", {}), {}
    before = (state["finetune"]["task"], state["classes"]) if step > 0 else (cfg.task, task.classes)
    require(before == (cfg.task, task.classes), f"--out {cfg.out}: a run of {before}; use another --out")
    accumulation = 1 if cfg.eval_only else task.accumulation()
    log = task.log = common.Log(cfg, step, rank, device, task.kind)
    log.report(task.skipped)
    if cfg.eval_only:
        return log.finish(**task.evaluate())

    # ---- the loop
    ddp = DistributedDataParallel(model, find_unused_parameters=speech) if world > 1 else model
    about = {"config": task.config, "classes": task.classes, "task": task.kind, "finetune": asdict(cfg)}
    loaded = iter(task.batches(step, accumulation))
    while step < cfg.steps:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = common.lr_at(step, cfg) * group["scale"]
        model.frozen = pretrained and step <= cfg.freeze_steps
        micro_batches = [next(loaded) for _ in range(accumulation)]
        size = common.all_reduce(torch.tensor(float(sum(map(task.size, micro_batches))), device=device))
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(micro_batches):
            rng = np.random.default_rng([cfg.seed, step, i * world + rank, 1])  # of mixup, erasing, masks
            ddp.require_backward_grad_sync = i == accumulation - 1
            micro_loss = task.loss(ddp, batch, rng) / size
            scaler.scale(micro_loss * world).backward()  # DDP averages over processes; the loss is a sum
            loss += micro_loss.detach()
        grad_norm = common.optimizer_step(optimizer, scaler, model, cfg.clip)
        if grad_norm is None:  # float16 overflowed: this step again, at a smaller scale
            step, loaded = step - 1, itertools.chain(micro_batches, loaded)
            continue

        log.advance(size)
        if log.due(step):
            scores = task.evaluate() if due(step, cfg.probe_every, cfg.steps) else {}
            metrics = {"loss": loss * world, "lr": common.lr_at(step, cfg), "grad_norm": grad_norm}
            log.write(step, metrics, scores)
            if scores and (not best or task.sign * (scores[task.metric] - best[f"best_{task.metric}"]) > 0):
                best = {f"best_{name}": value for name, value in scores.items()} | {"best_step": step}
                if rank == 0:
                    state = {"student": model.state_dict(), "teacher": None, "step": step} | about
                    common.save(Path(cfg.out, "best.pt"), state | task.extra)
        log.checkpoint(step, model, None, optimizer, scaler, best=best, **about, **task.extra)
    log.finish(examples=len(task.train), **(scores or task.evaluate()), **best)


@torch.no_grad()
def predict(task):
    """A line for each file or sentence: its classes with probabilities, or its words and their times."""
    task.build(task.tuned)
    task.model.eval()
    answers = 0
    for path in task.cfg.predict:
        try:
            print(f"{path}: {task.answer(path)}")
            answers += 1
        except (images.BadImage, UserError, *audio.AUDIO_ERRORS) as error:
            print(f"{path}: skipped, {error}")
    require(answers, "--predict: none of these can be read")


if __name__ == "__main__":
    common.run(main)
