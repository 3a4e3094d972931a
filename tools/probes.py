"""Does it learn? How much of the targets the student predicts, and what its frozen features tell.

evaluate = ImageProbe(...), SpeechProbe(...) or TextProbe(...) loads fixed batches once;
evaluate(student, teacher) -> {"explained_variance": 0.3, "probe": 0.8, "teacher_probe": 0.7, ...}
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from common import require, to_device
from data import audio, images, letters, text
from data.sampling import fixed_subset, loader
from targets import top_k_average


class Probe:
    """setup() loads self.held_out; forward() runs both networks; features() -> scores of an encoder."""

    by_position = False

    def __init__(self, cfg, train, valid, draw_mask, log, device, autocast):
        self.cfg, self.draw_mask = cfg, draw_mask
        self.log, self.device, self.autocast = log, device, autocast
        self.setup(train, valid)

    def load(self, dataset, keys):
        batches = self.log.watch(loader(dataset, keys, self.cfg.workers, self.device))
        batches, masks = [to_device(batch, self.device) for batch in batches], max(1, self.cfg.masks)
        for batch in batches:  # 2.0: one mask of each sample
            batch["mask"] = batch["mask"].flatten(0, -2)[::masks]
        return batches

    @torch.no_grad()
    def __call__(self, student, teacher):
        student.eval()
        scores = self.predictions(student, teacher)
        for prefix, encoder in (("", student.encoder), ("teacher_", teacher.encoder)):
            scores |= {prefix + name: value for name, value in self.features(encoder).items()}
        student.train()
        return scores

    def predictions(self, student, teacher):
        steps = (self.step(student, teacher, batch) for batch in self.held_out)
        return {"explained_variance": explained_variance(steps, self.by_position)}

    def step(self, student, teacher, batch):
        """-> f (M, D), y (B, T, D), mask (B, T)."""
        with self.autocast:
            f, layers = self.forward(student, teacher, batch)
        return f, top_k_average(layers, self.cfg.top_k, self.cfg.norm, self.cfg.final_norm), batch["mask"]

    def encode(self, encoder, source, lengths=None):
        with self.autocast:
            x, _ = encoder(source, None, lengths)
        return x[:, encoder.prefix :].float()


def in_parts(indices, size):
    """-> lists of about `size` keys (epoch 0, index)."""
    parts = np.array_split(indices, max(1, math.ceil(len(indices) / size)))
    return [[(0, int(i)) for i in part] for part in parts if len(part)]


def resize(size, img, rng):
    return images.center_crop(img, size)


class ImageProbe(Probe):
    """If all images have labels: knn and probe (linear) on the mean of an image's patches."""

    by_position = True

    def setup(self, train, val):
        self.held_out, self.labelled = self.fixed(val, self.cfg.eval_images), []
        require(self.held_out, f"--data {self.cfg.data}: no held-out image can be read")
        if len(train.classes) > 1 and -1 not in train.labels + val.labels:
            self.labelled = self.fixed(train, self.cfg.probe_images)

    def fixed(self, image_set, limit):
        keys = in_parts(fixed_subset(len(image_set), limit, self.cfg.seed), 125)
        crop = partial(resize, self.cfg.image_size)
        views = images.Views(image_set, crop, 0, self.draw_mask, replace=False)
        return [batch for batch in self.load(views, keys) if len(batch["images"])]

    def forward(self, student, teacher, batch):
        view = images.normalise(batch["images"])
        f, _, _ = student(view, batch["mask"])
        return f, teacher(view)

    def features(self, encoder):
        if not self.labelled:
            return {}
        fit, test = self.means(encoder, self.labelled), self.means(encoder, self.held_out)
        return {"knn": knn(*fit, *test), "probe": linear_probe(*fit, *test)}

    def means(self, encoder, batches):
        """-> features (N, D), labels (N,)."""
        x = [self.encode(encoder, images.normalise(batch["images"])).mean(1) for batch in batches]
        return torch.cat(x), torch.cat([batch["labels"] for batch in batches])


class SpeechProbe(Probe):
    """With transcripts: probe, 1 - character error rate of a linear layer on frames, trained by CTC."""

    def setup(self, train, valid):
        self.held_out, _ = self.fixed(valid, self.cfg.eval_utterances, whole=False)
        self.fit = self.fixed(train, self.cfg.probe_utterances, whole=True)
        self.test = self.fixed(valid, self.cfg.eval_utterances, whole=True)

    def fixed(self, utterances, limit, whole):
        """-> batches with masks, their transcripts; whole: only utterances with a transcript, not cropped."""
        indices, longest = range(len(utterances)), round(self.cfg.max_seconds * audio.RATE)
        if whole:
            words, lengths = utterances.transcripts, utterances.lengths
            indices = [i for i in indices if spoken(words[i]) and lengths[i] <= longest]
        if not indices:
            return [], []
        part = utterances.part(np.sort(np.random.default_rng(self.cfg.seed).permutation(indices)[:limit]))
        groups = audio.length_groups(part.lengths, self.cfg.max_samples, 0, 0, longest, sort=True)
        dataset = audio.Batches(part, 0, longest, whole, self.draw_mask)
        batches = self.load(dataset, [(0, i, tuple(group.tolist())) for i, group in enumerate(groups)])
        return batches, [spoken(part.transcripts[i]) for batch in batches for i in batch["indices"].tolist()]

    def forward(self, student, teacher, batch):
        f, x, _ = student(batch["source"], batch["mask"])
        return f, teacher.from_embedded(x)

    def features(self, encoder):
        (fit, texts), (test, test_texts) = self.fit, self.test
        if not (fit and test):
            return {}
        alphabet = ["<blank>", "|", *sorted(set("".join(texts + test_texts)) - {" "})]
        labels = [letters.encode(words, alphabet) for words in texts]
        probe = fit_ctc(list(self.frames(encoder, fit)), labels, len(alphabet))
        guesses = [letters.decode_greedy(probe(x), alphabet)[0] for x in self.frames(encoder, test)]
        return {"probe": max(0.0, 1 - letters.cer(zip(test_texts, guesses)).rate)}

    def frames(self, encoder, batches):
        """Yields (T, D) for each utterance."""
        for batch in batches:
            x = self.encode(encoder, batch["source"], batch["lengths"])
            for frames, count in zip(x, encoder.embed.frames(batch["lengths"]).tolist()):
                yield frames[:count]


def spoken(transcript):
    return letters.clean(transcript.replace("|", " "))[0]  # "|" separates words in the probe's alphabet


class TextProbe(Probe):
    """position_r2; probe: a linear layer tells a selected token, one of the 200 commonest, by its feature."""

    def setup(self, train, valid):
        self.fit = self.fixed(train, self.cfg.probe_blocks)
        self.held_out = self.fixed(valid, self.cfg.eval_blocks)

    def fixed(self, blocks, limit):
        keys = in_parts(fixed_subset(len(blocks), limit, self.cfg.seed), 50)
        return self.load(text.Batches(blocks, 0, self.draw_mask), keys)

    def predictions(self, student, teacher):
        if self.cfg.objective == "mlm":
            return {}
        scores = super().predictions(student, teacher)
        if self.cfg.masks:  # 2.0's encoder never sees a hidden position: what the decoder says of it
            scores["probe"] = self.probe(lambda batch: self.step(student, teacher, batch)[0])
        steps = ((self.step(student, teacher, batch), batch["tokens"]) for batch in self.held_out)
        targets = ((y, tokens != text.PAD) for (_, y, _), tokens in steps)
        return scores | {"position_r2": position_r2(targets, self.cfg.max_tokens)}

    def forward(self, student, teacher, batch):
        f, x, valid = student(batch["corrupted"], batch["mask"])
        return f, teacher.from_embedded(x, valid) if self.cfg.masks else teacher(batch["tokens"])

    def features(self, encoder):
        if self.cfg.masks:
            return {}
        return {"probe": self.probe(lambda batch: self.encode(encoder, batch["corrupted"])[batch["mask"]])}

    def probe(self, features):
        """features(batch) -> (N, D), of the selected tokens."""
        (x, y), (x_test, y_test) = self.selected(features, self.fit), self.selected(features, self.held_out)
        counts = torch.bincount(y, minlength=int(y_test.max()) + 1)
        rank = counts.argsort(descending=True, stable=True).argsort()  # the commonest token is 0
        fit, test = rank[y] < 200, rank[y_test] < 200
        return linear_probe(x[fit], rank[y][fit], x_test[test], rank[y_test][test])

    def selected(self, features, batches):
        """-> features (N, D) of the selected tokens, their ids (N,)."""
        x = [features(batch).float() for batch in batches]
        return torch.cat(x), torch.cat([batch["tokens"][batch["mask"]] for batch in batches])


def explained_variance(batches, by_position):
    """1 - sum |f - y|^2 / sum |y - mean y|^2 over masked positions; nan if the targets do not vary.

    batches: f (M, D), y (B, T, D), mask (B, T). by_position: a mean of each position, which then earns 0.
    """
    count = total = masked_count = masked_total = squares = residual = 0.0
    for batch in batches:
        f, y, mask = (x.cpu() for x in batch)  # Apple's GPUs have no float64
        y = y.double()
        residual += (f.double() - y[mask]).square().sum().item()
        squares += y[mask].square().sum().item()
        if not by_position:
            y, mask = y.flatten(0, 1)[:, None], mask.flatten()[:, None]  # (B * T, 1, D)
        count += len(y)
        total = total + y.sum(0)  # (T, D)
        masked_count = masked_count + mask.sum(0)[:, None]  # (T, 1)
        masked_total = masked_total + (y * mask[..., None]).sum(0)  # (T, D)
    mean = total / count
    variance = squares + (masked_count * mean.square() - 2 * mean * masked_total).sum().item()
    return 1 - residual / variance if variance > 1e-12 * squares else math.nan


def position_r2(batches, max_tokens):
    """Adjusted R^2 of the targets given their position: near 1 they tell the position and nothing else.

    batches: y (B, T, D), valid (B, T), T <= max_tokens. nan if the targets do not vary.
    """
    count = total = squares = 0.0
    for y, valid in batches:
        y, valid, padding = y.cpu(), valid.cpu(), max_tokens - y.shape[1]
        y = F.pad(y.double() * valid[..., None], (0, 0, 0, padding))
        count = count + F.pad(valid.double(), (0, padding)).sum(0)[:, None]  # (T, 1)
        total = total + y.sum(0)  # (T, D)
        squares += y.square().sum().item()
    n, used = count.sum().item(), (count > 0).sum().item()
    within = squares - (total.square() / count.clamp_min(1)).sum().item()
    variance = squares - total.sum(0).square().sum().item() / n
    if n <= used or variance <= 1e-12 * squares:
        return math.nan
    return 1 - within / (n - used) * (n - 1) / variance


def standardise(x, x_test):
    mean, std = x.mean(0), x.std(0) + 1e-6
    return (x - mean) / std, (x_test - mean) / std


def knn(x, y, x_test, y_test, k=20, temperature=0.07):
    """Top-1 of a vote of k nearest neighbours, weighted by exp(cosine / temperature) (Wu et al. 2018)."""
    x, x_test = (F.normalize(v, dim=1) for v in standardise(x, x_test))
    weight, nearest = (x_test @ x.T).topk(min(k, len(x)), dim=1)
    votes = torch.zeros(len(x_test), int(y.max()) + 1, device=x.device)
    votes.scatter_add_(1, y[nearest], (weight / temperature).exp())
    return (votes.argmax(1) == y_test).float().mean().item()


@torch.enable_grad()
def linear_probe(x, y, x_test, y_test, penalty=1e-3):
    """Top-1 of logistic regression on x (N, D), y (N,), measured on x_test (M, D), y_test (M,)."""
    x, x_test = standardise(x, x_test)
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, device=x.device, requires_grad=True)
    bias = torch.zeros(weight.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((x_test @ weight + bias).argmax(1) == y_test).float().mean().item()


@torch.enable_grad()
def fit_ctc(x, labels, classes, steps=400, lr=0.05):
    """A linear layer trained by CTC (blank 0) on frames x (T, D) and labels (list of int) of each utterance.

    In the first quarter of the steps each letter owns an equal part of its utterance: without it CTC predicts
    blanks for long. Returns a function: frames (T, D) -> log-probabilities (T, classes).
    """
    device, mean, std = x[0].device, torch.cat(x).mean(0), torch.cat(x).std(0) + 1e-6
    padded = torch.nn.utils.rnn.pad_sequence([(u - mean) / std for u in x])  # (T, B, D)
    frames, lengths = tuple(map(len, x)), tuple(map(len, labels))
    labels = [torch.tensor(label, device=device) for label in labels]
    target = torch.cat(labels)
    even = [label[torch.arange(n) * len(label) // n] for label, n in zip(labels, frames)]
    even = torch.nn.utils.rnn.pad_sequence(even, padding_value=-100)  # (T, B); -100: not scored
    weight = torch.zeros(padded.shape[-1], classes, device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr, betas=(0.9, 0.99), eps=1e-5)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        log_probs = (padded @ weight + bias).log_softmax(-1)
        if step < steps // 4:
            loss = F.nll_loss(log_probs.flatten(0, 1), even.flatten())
        else:
            loss = F.ctc_loss(log_probs, target, frames, lengths, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight, bias = weight.detach(), bias.detach()
    return lambda u: ((u - mean) / std @ weight + bias).log_softmax(-1)
