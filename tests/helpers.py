"""What the tests of the scripts share: to run one, to read what it left, to compare."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch

import common


def call(script, *flags, stdin=None):
    """python SCRIPT flag ... inside this process, which saves the import of torch -> exit status, stdout, stderr."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        patch.setattr(sys, "stdin", stdin) if stdin else None
        try:
            common.run(script.main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else print(end.code, file=err) or 1
    return code, out.getvalue(), err.getvalue()


def launch(script, *flags, processes=1):
    """Starts `python SCRIPT flag ...`, or torchrun's equivalent, as a process of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, script, *map(str, flags)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process, status=0):
    """stdout and stderr of a process that ends by itself, well or as expected."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"{out}\n{err}"
    return out, err


def kill(process, folder):
    """kill -9, as soon as the run has saved something in its folder."""
    while not (folder / "ckpt.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -9, err


def done(result):
    """stdout of a run that ended well."""
    code, out, err = result
    assert code == 0, f"{out}\n{err}"
    return out


def told(result):
    """stdout and stderr of a run that ended well."""
    return done(result) + result[2]


def refused(result, by="", silent=False):
    """The one line on stderr of a run that ended with status 2; by: the script that it names, silent: nothing on stdout."""
    code, out, err = result
    assert code == 2 and err.count("\n") == 1 and err.startswith(by) and "Traceback" not in err, err
    assert not (silent and out), out
    return err


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


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
