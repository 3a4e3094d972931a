"""Where the seconds of an update go, and how many times as long it takes as its matrix products alone.

python -m tools.bench train_vision.py --preset cifar10 -- --data cifar10
python -m tools.bench train_speech.py --preset base --updates 1 --rounds 1        # on a CPU: a small batch

What follows -- goes to the train script, whose own loop is timed, loading in between, nothing dropped.
Floor: its matrix products (also of convolutions and attention) at the rate of a large one of that dtype here.
transformers: that library's models in the same loop, in turn with ours; its teacher of speech computes the
convolutions again, which ours has from the student.
"""

import contextlib
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from math import prod
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import common
from data import text
from model import Student, Teacher
from tools import embed, hub, probes

aten = torch.ops.aten
FORMULAS = {  # of shapes; torch lacks them, or has them wrong for groups; attention: (B, heads, T, d)
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * prod(q) * k[-2],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda y, q, k, *_, **__: 8 * prod(q) * k[-2],
    aten.convolution_backward: lambda y, x, w, *wanted, **_: 2 * prod(y) * prod(w[1:]) * sum(wanted[-1][:2]),
}
SMALL_BATCH = {  # of base and large on a CPU
    "train_vision.py": ["--global_batch=2"], "train_text.py": ["--global_batch=2"],
    "train_speech.py": ["--batch_seconds=20", "--max_samples=320000"],
}  # fmt: skip
NO_LOG = ["--workers", "0", "--log_every", "1e9"]


class Theirs(torch.nn.Module):
    """An Encoder of the same sizes and weights: the model of the transformers library."""

    def __init__(self, cfg, student):
        super().__init__()
        from transformers import AutoModel, logging

        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            hub.write({"config": vars(cfg), "student": student.state_dict()}, Path(folder, "model"))
            self.model = AutoModel.from_pretrained(f"{folder}/model")
        self.prefix, self.model.pooler = student.encoder.prefix, None

    def forward(self, input, mask=None, lengths=None, window=0):
        names = {"data2vec-vision": "bool_masked_pos", "data2vec-audio": "mask_time_indices"}
        masks = {names.get(self.model.config.model_type): mask}
        masks = masks if input.is_floating_point() else {"attention_mask": (input != text.PAD).long()}
        y = self.model(input, output_hidden_states=True, **masks)
        return y[0], [a[:, self.prefix :] for a in y.hidden_states[1:]]

    transform = forward

    def embed(self, input, lengths):
        return input, None


def run(script, flags, theirs=False):
    """main() of a train script -> {part: seconds} of each update but the first; what was seen on the way."""
    updates, spent, seen = [], Counter(), {}

    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(part, function):
        def call(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            spent[part] += now() - start
            return result

        return call

    def build(cfg, *sizes, build=script.build):
        student, seen["cfg"] = build(cfg, *sizes), cfg
        return (Student(Theirs(cfg, student), student.head) if theirs else student).eval()

    def load(*args, loader=script.loader):
        batches = iter(loader(*args))
        return iter(timed("loader", lambda: next(batches)), None)

    def advance(log, count):  # the end of an update
        updates.append(spent | Counter(all=now() - seen.get("end", 0)))
        spent.clear()
        seen.update(end=now(), size=float(count), unit=log.unit)

    new = [(script, "build", build), (script, "loader", load), (common.Log, "advance", advance)]
    new += [(probes, name, lambda *_: lambda *_: {}) for name in ("ImageProbe", "SpeechProbe", "TextProbe")]
    new += [(common.Log, "checkpoint", lambda *_, **__: None)]
    for part, (place, *names) in {
        "teacher": (Teacher, "forward", "from_embedded"), "student": (Student, "forward"),
        "targets, loss": (script, "top_k_average", "regression_loss"), "backward": (torch.Tensor, "backward"),
        "clip, AdamW": (common, "optimizer_step"), "EMA": (Teacher, "update"),
    }.items():  # fmt: skip
        new += [(place, name, timed(part, getattr(place, name))) for name in names]
    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
        for place, name, value in [*new, (sys, "argv", [script.__file__, *flags, *NO_LOG, "--out", out])]:
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(contextlib.redirect_stdout(None))
        script.main()
    return updates[1:], seen


def rate(device, autocast):
    """GFLOP a second of a large matrix product, and its dtype."""
    a = torch.randn(8192 if device.type == "cuda" else 2048, 1, device=device)
    with autocast:
        a = a @ a.T
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2e-9 * len(a) ** 3 / timer.blocked_autorange(min_run_time=0.5).median, a.dtype


def main():
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = common.Parser("bench", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, scripts = parser.add_argument, {f"train_{kind}.py": it for kind, it in embed.SCRIPTS.items()}
    add("script", choices=scripts)
    add("--preset", default="smoke", help="of the script")
    add("--updates", type=int, default=3, help="of a network in a round, after one to warm up")
    add("--rounds", type=int, default=3, help="of all networks in turn; medians are shown")
    add("--compile", action="store_true", help="with compiled encoders, too")
    args = parser.parse_args(sys.argv[1:at])
    common.require(min(args.updates, args.rounds) > 0, "--updates, --rounds: at least 1")
    script, flags = scripts[args.script], ["--preset", args.preset]
    if script.PRESETS.get(args.preset, {}).get("dim", 0) >= 768 and not torch.cuda.is_available():
        flags += SMALL_BATCH[args.script]
    flags += sys.argv[at + 1 :]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        _, seen = run(script, [*flags, "--steps", "1"])
    _, _, device, autocast, _ = common.start_processes(seen["cfg"].device, seen["cfg"].dtype)
    memory, size, unit = common.peak_memory_gb(device) or 0, seen["size"], seen["unit"]
    flags, found, rates = [*flags, "--steps", str(1 + args.updates)], {}, []
    for name in args.rounds * ["ours", *["compiled"] * args.compile, "transformers"]:
        rates.append(rate(device, autocast))
        with contextlib.suppress(ModuleNotFoundError):
            words = [*flags, *["--compile"] * (name == "compiled")]
            found[name] = found.get(name, []) + run(script, words, name == "transformers")[0]
    rates, (dtype, *_) = zip(*rates)
    work, speed = counter.get_total_flops() / 1e9, median(rates)
    parts = {
        part: [median(one[part] for one in many) for many in found.values()] for part in found["ours"][0]
    }
    whole, threads = parts["all"], torch.get_num_threads()
    print(f"{args.script} {args.preset}: {size:.5g} {unit} an update; {device}, {dtype}, {threads} threads")
    print(f"\n| seconds (share) | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
    for part, row in parts.items():
        print(f"| {part} |", *(f"{t:.4f} ({t / total:.0%}) |" for t, total in zip(row, whole)))
    print(
        "| all but loader, x floor |",
        *(f"{(t - l) * speed / work:.2f} |" for t, l in zip(whole, parts["loader"])),
    )
    print(f"\nfloor: {work / speed:.4g} s, {work:.4g} GFLOP at {speed:.4g} a second (matrix products)")
    print(f"loader: {size / parts['loader'][0]:.4g} {unit} a second and core; memory: {memory:.3g} GB")


if __name__ == "__main__":
    common.run(main)
