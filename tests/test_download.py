"""data/download.py against a server on this machine."""

import hashlib

import pytest

from common import UserError
from data.download import download, md5_of

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_continues(tmp_path, server, ranges):
    path, part = tmp_path / "a.bin", tmp_path / "a.bin.part"
    server.files["/a.bin"], server.cut, server.ranges = CONTENT, 5000, ranges
    with pytest.raises(UserError, match="broke at 5000 of 256000 bytes; run this again"):
        download(f"{server.url}/a.bin", path, MD5)
    assert part.stat().st_size == 5000 and not path.exists()
    server.cut = None
    download(f"{server.url}/a.bin", path, MD5)
    assert [header for _, header in server.asked] == [None, "bytes=5000-"]
    assert path.read_bytes() == CONTENT and not part.exists() and md5_of(path) == MD5


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
