"""data/download.py against a server on this machine."""

import hashlib

import pytest

from common import UserError
from data import text
from data.download import download
from tests.helpers import call
from tools import convert, embed, plot

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_a_broken_download_leaves_nothing(tmp_path, server):
    path = tmp_path / "new" / "a.bin"
    server.files["/a.bin"], server.cut = CONTENT, 5000
    with pytest.raises(UserError, match="broke at 5000 of 256000 bytes; run this again"):
        download(f"{server.url}/a.bin", path, MD5)
    assert list(path.parent.iterdir()) == []
    server.cut = None
    download(f"{server.url}/a.bin", str(path), MD5)
    assert (
        path.read_bytes() == CONTENT
        and server.asked == ["/a.bin"] * 2
        and len(list(path.parent.iterdir())) == 1
    )


def test_a_file_that_exists_is_checked_and_not_downloaded(tmp_path, server):
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    download(f"{server.url}/a.bin", path, MD5)
    path.write_bytes(b"other")
    download(f"{server.url}/a.bin", path)
    with pytest.raises(UserError, match=f"{path}: .* md5 .* remove it"):
        download(f"{server.url}/a.bin", path, MD5)
    assert server.asked == []


@pytest.mark.parametrize("url", ["SERVER/nothing", "http://127.0.0.1:9/x", "http://no.invalid/x", "nonsense"])
def test_what_cannot_be_downloaded_is_one_line(tmp_path, server, url):
    url = url.replace("SERVER", server.url)
    with pytest.raises(UserError, match="by hand") as error:
        download(url, tmp_path / "a.bin")
    assert str(error.value).startswith(url) and str(tmp_path / "a.bin") in str(error.value)
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
