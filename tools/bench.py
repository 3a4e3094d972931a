"""Where the seconds of an update go, and how many times as long it takes as its matrix products alone.

python -m tools.bench train_text.py --preset base --updates 1 --rounds 1 -- --data corpus --global_batch 2

What follows -- goes to the train script, whose own loop is timed, loading in between, without dropout.
Floor: its matrix products (also of convolutions and attention) at the rate of a large one of that dtype here.
transformers: that library's models in the same loop, where the teacher of speech runs convolutions, too.
"""

import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from contextlib import ExitStack, contextmanager, redirect_stdout
from math import prod
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch.utils.benchmark import Timer, timer
from torch.utils.data import dataloader
from torch.utils.flop_counter import FlopCounterMode

import common
from data import text
from model import Student, Teacher
from model2 import Student2
from tools import embed, hub, probes

aten = torch.ops.aten
FORMULAS = {  # of shapes; torch lacks them, or has them wrong for groups; attention: (B, heads, T, d)
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * prod(q) * k[-2],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda y, q, k, *_, **__: 8 * prod(q) * k[-2],
    aten.convolution_backward: lambda y, x, w, *wanted, **_: 2 * prod(y) * prod(w[1:]) * sum(wanted[-1][:2]),
}


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
        given = {"data2vec-vision": {"bool_masked_pos": mask}, "data2vec-audio": {"mask_time_indices": mask}}
        given = given.get(self.model.config.model_type, {"attention_mask": (input != text.PAD).long()})
        y = self.model(input, output_hidden_states=True, **given)
        return y[0], [a[:, self.prefix :] for a in y.hidden_states[1:]]

    transform = forward

    def embed(self, input, lengths):
        return input, None


def run(script, flags, theirs=False):
    """main() of a train script -> {part: seconds} of each update but the first, its Log, units an update."""
    updates, seen = [Counter()], {}

    @contextmanager
    def timed(part):
        start = timer()
        yield
        updates[-1][part] += timer() - start

    def build(cfg, *sizes, build=script.build):
        student = build(cfg, *sizes)
        student.encoder = Theirs(cfg, student) if theirs else student.encoder
        return student.eval()

    def advance(log, count):  # the end of an update
        updates[-1]["all"] += timer()
        updates.append(Counter(all=-timer()))
        seen.update(log=log, count=float(count))

    new = {(script, "build"): build, (common.Log, "advance"): advance}
    new |= {(common.Log, "due"): lambda *_: False, (common, "save"): lambda *_: None}
    new |= {(probes, f"{name}Probe"): lambda *_: lambda *_: {} for name in ("Image", "Speech", "Text")}
    for part, place, *names in (
        ("loader", dataloader._BaseDataLoaderIter, "__next__"), ("backward", torch.Tensor, "backward"),
        ("teacher", Teacher, "forward", "from_embedded"), ("clip, AdamW", common, "optimizer_step"),
        ("student", Student, "forward"), ("student", Student2, "forward"), ("EMA", Teacher, "update"),
        ("targets, loss", script, "top_k_average", "regression_loss"),
    ):  # fmt: skip
        new |= {(place, name): timed(part)(getattr(place, name)) for name in names}
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack, redirect_stdout(None):
        new[sys, "argv"] = [script.__file__, *flags, "--workers", "0", "--out", out]
        for (place, name), value in new.items():
            stack.enter_context(mock.patch.object(place, name, value))
        script.main()
    return updates[1:-1], seen["log"], seen["count"]


def main():
    parser = common.Parser("bench", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, scripts = parser.add_argument, {f"train_{kind}.py": it for kind, it in embed.SCRIPTS.items()}
    add("script", choices=scripts)
    add("--preset", default="smoke", help="of the script")
    add("--updates", type=int, default=3, help="of a network in a round, after one to warm up")
    add("--rounds", type=int, default=3, help="of all networks in turn; medians are shown")
    add("--compile", action="store_true", help="with compiled encoders, too")
    args, rest = parser.split()
    common.require(min(args.updates, args.rounds) > 0, "--updates, --rounds: at least 1")
    script, flags = scripts[args.script], ["--preset", args.preset, *rest, "--steps"]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        _, log, count = run(script, [*flags, "1"])
    work, memory = counter.get_total_flops(), common.peak_memory_gb(log.device) or 0
    found = {name: [] for name in ("ours", *["compiled"] * args.compile, "transformers")}
    try:
        run(script, [*flags, "1"], theirs=True)
    except (ImportError, common.UserError) as error:
        print(f"without transformers (of requirements-dev.txt): {error}")
        del found["transformers"]
    _, _, device, autocast, _ = common.start_processes(log.cfg.device, log.cfg.dtype)
    with autocast:
        a = torch.ones(8192 if device.type == "cuda" else 2048, 1, device=device)
        a = a @ a.T
    product = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    rate = 2 * len(a) ** 3 / product.blocked_autorange(min_run_time=2).median
    for name in args.rounds * [*found]:
        words = [*flags, str(1 + args.updates), *["--compile"] * (name == "compiled")]
        found[name] += run(script, words, name == "transformers")[0]
    rows = {part: [median(one[part] for one in many) for many in found.values()] for part in found["ours"][0]}
    whole, load, floor = rows["all"], rows["loader"], work / rate
    print(f"{args.script} {args.preset}: {count:.5g} {log.unit} an update; {device}, {a.dtype}\n")
    print(f"| seconds (share) | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
    for part, row in rows.items():
        print(f"| {part} |", *(f"{t:.4f} ({t / total:.0%}) |" for t, total in zip(row, whole)))
    print("| all but loader, x floor |", *(f"{(t - l) / floor:.2f} |" for t, l in zip(whole, load)))
    print(f"\nfloor: {floor:.4g} s, {work / 1e9:.4g} GFLOP at {rate / 1e9:.4g} a second")
    print(f"loader: {count / load[0]:.4g} {log.unit} a second and core; memory: {memory:.3g} GB")


if __name__ == "__main__":
    common.run(main)
