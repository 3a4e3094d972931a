import http.server
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"  # real data sets, where a checkout has them beside it; never in the project


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes of training; run with `pytest -m slow`")
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:  # slow tests only when asked for
        skip = pytest.mark.skip(reason="slow: run with `pytest -m slow`")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip("no real data beside this checkout")
    return SHARED


@pytest.fixture(scope="module")
def one_thread():
    """As in the subprocesses; several threads would only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: .url, .files {path: bytes}, .cut (bytes after which it hangs up), .ranges (whether it goes
    on in the middle of a file), .asked [(path, Range header)]."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            it.asked.append((self.path, wanted := self.headers.get("Range")))
            if self.path not in it.files:
                return self.send_error(404)
            content, start = it.files[self.path], int(wanted[6:-1]) if wanted and it.ranges else 0  # bytes=START-
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : start + it.cut] if it.cut else content[start:])

        def log_message(self, *args):
            pass

    it = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it.url, it.files, it.cut, it.ranges, it.asked = f"http://127.0.0.1:{it.server_port}", {}, None, True, []
    threading.Thread(target=it.serve_forever, args=(0.01,), daemon=True).start()
    yield it
    it.shutdown()
    it.server_close()
