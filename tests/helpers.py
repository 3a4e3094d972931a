"""What tests of the scripts share: tiny data and models, ways to run a script, to read what it left."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import common
import train_speech
import train_text
import train_vision

# ---- tiny models and data --------------------------------------------------------------------------------

SCRIPTS = {"vision": train_vision, "speech": train_speech, "text": train_text}
RUNS = SCRIPTS | {f"{kind}2": script for kind, script in SCRIPTS.items()}  # of data2vec 2.0
DAMAGED = {
    "vision": ["train/cat/04.png"],
    "speech": ["train/0/7/0-7-0004.flac", "dev/0/7/none.flac"],
    "text": [],
}
FAST = "--log_every 1 --save_every 0 --probe_every 0 --workers 0 --warmup 0 --dtype float32 --device cpu"
MODEL = "--dim 16 --depth 2 --heads 2 --ffn 32 --top_k 2 --tau_0 0.9 --tau_e 0.99 --tau_n 3 --guard_after -1"
TINY = {  # an update is two micro-batches, which hide different numbers of positions
    "vision": """--image_size 16 --patch 4 --mask_ratio 0.8 --mask_block 8 --norm layer --final_norm layer
        --global_batch 8 --micro_batch 4""",
    "speech": """--channels 8 --pos_width 15 --max_seconds 4 --max_samples 64000 --batch_seconds 8
        --share_positions true""",
    "text": "--max_tokens 32 --global_batch 8 --micro_batch 4 --share_embedding true",
}
TWO = {  # the same as runs of data2vec 2.0
    "vision": "--mask_adjust 0.07 --mask_block 2 --target ffn --norm instance --beta 0",
    "speech": "--mask_p 0.5 --mask_adjust 0.05 --mask_span 5 --share_positions false",
    "text": "--mask_p 0.48 --norm instance --beta 0",
}
MODEL2 = "--masks 3 --prenet 1 --decoder_depth 2 --decoder_width 16"
TINY |= {f"{kind}2": f"{TINY[kind]} {MODEL2} {flags}" for kind, flags in TWO.items()}
TINY = {kind: f"{FAST} {MODEL} --steps 4 --lr 2e-3 --clip 0 {flags}".split() for kind, flags in TINY.items()}


def write_images(root):
    """root/{train,val}/{cat,dog}/NN.png: 24 and 12 small images of random colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
                coarse.resize((24, 20), Image.BICUBIC).save(root / split / name / f"{i:02}.png")


def write_speech(root, splits):
    """root/{train,dev}/SPEAKER/CHAPTER/*.flac and *.trans.txt, as LibriSpeech has them."""
    for split, (waves, transcripts) in zip(("train", "dev"), splits):
        for i, (wave, words) in enumerate(zip(waves, transcripts)):
            chapter = root / split / f"{i // 6}" / "7"
            chapter.mkdir(parents=True, exist_ok=True)
            soundfile.write(chapter / f"{i // 6}-7-{i:04}.flac", wave, 16_000)
            with open(chapter / f"{i // 6}-7.trans.txt", "a") as file:
                file.write(f"{i // 6}-7-{i:04} {words}\n")


def write_text(path, documents=80):
    """Documents of one to four lines, each a walk through made words in an order that can be learned."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(100)]
    with open(path, "w") as file:
        for _ in range(documents):
            for start in rng.integers(100, size=rng.integers(1, 5)):
                line = (words[(start + i) % 100] for i in range(rng.integers(2, 12)))
                file.write(" ".join(line) + ".\n")
            file.write("\n")


def write_sentences(folder):
    """folder/{train,dev}.tsv: sentences whose class is the sort of their words."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("train", 24), ("dev", 12)):
        rows = [
            (" ".join(rng.choice(["abc", "ha"] if i % 2 else ["fed", "gab"], 4)), i % 2) for i in range(count)
        ]
        lines = [f"{words}\t{('dull', 'fine')[label]}\n" for words, label in rows]
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(lines))


# ---- to run a script -------------------------------------------------------------------------------------


def call(script, *flags):
    """`python SCRIPT flag ...` inside this process -> exit status, stdout, stderr."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        try:
            common.run(script.main)
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=err)
                code = 1
    return code, out.getvalue(), err.getvalue()


def launch(script, *flags, processes=1, limit=300):
    """The same in a process of its own, or several by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), script.__file__, *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    return ended.returncode, ended.stdout, ended.stderr


# Processes that are forked from one that has imported the scripts and done nothing else: they start fast
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["finetune", "torch._dynamo"])


def fork(script, *flags, log, env=(), prepare=None):
    """Starts it in such a process, after prepare(); what it prints goes to the file `log`."""
    arguments = script.__name__, [script.__file__, *map(str, flags)], str(log), dict(env), prepare
    process = FORKS.Process(target=_run, args=arguments)
    process.start()
    return process


def _run(name, argv, log, env, prepare):
    os.environ.update(env)
    reset_signals()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Grad strides")  # of convolutions with one channel a group
    sys.argv = argv
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115  until the process ends
    if prepare:
        prepare()
    common.run(importlib.import_module(name).main)


def fork_two(script, *flags, logs, prepare=None):
    """Two processes that train together, as torchrun starts them -> their exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [env | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [fork(script, *flags, log=log, env=env, prepare=prepare) for log, env in zip(logs, ranks)]
    try:
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()  # if it hangs


def reset_signals():
    common.received.clear()
    for number in common.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def send_after_step(step, number=signal.SIGKILL, rank="0"):
    """A process sends itself this signal when its run has written the metrics of that step."""

    def write(self, now, *rest, real=common.Log.write):
        real(self, now, *rest)
        if now == step and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), number)

    common.Log.write = write


def limit_files(size):
    """No file of this process can have more bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---- what it left ----------------------------------------------------------------------------------------


def done(result):
    """stdout of a run that ended well."""
    code, out, err = result
    assert code == 0, f"{out}\n{err}"
    return out


def refused(result, by="", silent=False):
    """The one line on stderr of a run that ended with status 2; `by` is how it starts; silent: no stdout."""
    code, out, err = result
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith(by) and "Traceback" not in err, err
    assert not (silent and out), out
    return err


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    """Lines of metrics.jsonl without what depends on the clock."""
    return [
        {name: value for name, value in row.items() if name != "seconds" and not name.endswith("_per_s")}
        for row in rows(folder)
    ]


def checkpoint(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def assert_same(ours, theirs, **tolerance):
    """Two nested states hold the same numbers: exactly, or within a tolerance."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key], **tolerance)
    elif isinstance(ours, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, **tolerance)
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, **{"rtol": 0, "atol": 0} | tolerance)
    else:
        assert ours == theirs
