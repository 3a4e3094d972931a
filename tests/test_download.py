"""data/download.py against a server on this machine."""

import pytest

from common import UserError
from data import text
from data.download import download
from tests.helpers import call
from tools import convert, embed, plot

CONTENT = bytes(range(256)) * 1000


def test_a_broken_download_leaves_nothing(tmp_path, server):
    server.files["/a.bin"], server.cut = CONTENT, 5000
    with pytest.raises(UserError, match="broke at 5000 of 256000 bytes; run this again"):
        download(f"{server.url}/a.bin", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    server.cut = None
    for _ in range(2):  # a file that is there is not downloaded again
        path = download(f"{server.url}/a.bin", str(tmp_path / "new"))
    assert path.read_bytes() == CONTENT and server.asked == ["/a.bin"] * 2
    assert list((tmp_path / "new").iterdir()) == [path]


@pytest.mark.parametrize("url", ["SERVER/nothing", "http://127.0.0.1:9/x", "http://no.invalid/x", "nonsense"])
def test_what_cannot_be_downloaded_is_one_line(tmp_path, server, url):
    url = url.replace("SERVER", server.url)
    with pytest.raises(UserError, match="by hand") as error:
        download(url, tmp_path)
    assert str(error.value).startswith(url) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", ["prepare", "convert", "embed", "plot"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tool, tmp_path, finished):
    """A limit on the size of files makes a write fail as a full disk does."""
    resource, run, out = pytest.importorskip("resource"), finished["text"], tmp_path / "new" / "out.npy"
    out.parent.mkdir()
    (tmp_path / "a.txt").write_text("many words of a text\n\n" * 999)
    script, *flags = {
        "prepare": (text, "prepare", "--input", tmp_path / "a.txt", "--vocab_size", 261, "--out", out),
        "convert": (convert, run / "ckpt.pt", out.with_suffix("")),
        "embed": (embed, tmp_path / "a.txt", "--init", run / "ckpt.pt", "--out", out, "--device", "cpu"),
        "plot": (plot, run, "--out", out.with_suffix(".png")),
    }[tool]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        _, _, err = ended = call(script, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        ended[0] == 2 and f"{out.with_suffix('')}" in err.splitlines()[-1] and ": cannot be written (" in err
    )
    assert "Traceback" not in err and list(out.parent.iterdir()) == []
