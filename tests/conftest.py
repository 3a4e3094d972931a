import http.server
import os
import shutil
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"  # real data sets, where a checkout has them beside it

from data import synthetic, text  # noqa: E402
from tests import helpers  # noqa: E402
from tools import probes  # noqa: E402


def pytest_configure(config):
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def no_signals():
    """Signals mean what they mean at the start of a process, also after a run inside this one."""
    helpers.reset_signals()


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip("no real data beside this checkout")
    return SHARED


@pytest.fixture(scope="module")
def one_thread():
    """As in the processes that tests start; more threads only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Tiny data: vision/, speech/ (letters/ without words), text/, tasks/moods/; two damaged samples."""
    root = tmp_path_factory.mktemp("data")
    helpers.write_images(root / "vision")
    helpers.write_speech(root / "letters", synthetic.speech(n_train=24, n_valid=5))
    (root / "letters" / helpers.DAMAGED["speech"][1]).write_bytes(b"no sound")
    for path in (
        root / "vision" / helpers.DAMAGED["vision"][0],
        root / "letters" / helpers.DAMAGED["speech"][0],
    ):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shutil.copytree(root / "letters", root / "speech", ignore=shutil.ignore_patterns("*.txt"))
    helpers.write_text(root / "text.txt")
    text.prepare([str(root / "text.txt")], root / "text", vocab_size=300, valid_every=10)
    helpers.write_sentences(root / "tasks" / "moods")
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """{vision, speech, text, vision2, ..: folder of a finished run, its output beside it}. Tests copy it."""
    folders = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "fit_ctc", partial(probes.fit_ctc, steps=20))
        for kind, script in helpers.RUNS.items():
            folders[kind] = out = tmp_path_factory.mktemp("finished") / kind
            source = data / {"speech": "letters"}.get(kind.rstrip("2"), kind.rstrip("2"))
            flags = "--data", source, "--out", out, "--steps", 12, "--log_every", 3, "--probe_every", 6
            printed = helpers.done(helpers.call(script, *helpers.TINY[kind], *flags))
            out.with_suffix(".txt").write_text(printed)
    torch.set_num_threads(threads)
    return folders


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: .url; .files {path: bytes}; .cut: bytes after which it hangs up;
    .asked [path]."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            it.asked.append(self.path)
            if self.path not in it.files:
                return self.send_error(404)
            content = it.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: it.cut])

        def log_message(self, *args):
            pass

    it = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it.url, it.files, it.cut, it.asked = f"http://127.0.0.1:{it.server_port}", {}, None, []
    threading.Thread(target=it.serve_forever, args=(0.01,), daemon=True).start()
    yield it
    it.shutdown()
    it.server_close()
