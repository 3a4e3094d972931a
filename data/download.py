"""Downloads: to NAME.part, continued after a break, then renamed; the md5 is checked. Files written whole."""

import hashlib
import os
import shutil
import urllib.request
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from common import UserError, require


def download(url, path, md5=None):
    """Downloads url to `path`, unless that file exists, and checks its md5. Raises UserError."""
    if not os.path.exists(path):
        try:
            fetch(url, f"{path}.part")
        except (OSError, HTTPException, ValueError) as error:  # no route, 404, timeout, not a URL
            reason = str(error) or type(error).__name__
            raise UserError(f"{url}: {reason}; run this again, or download it by hand to {path}") from error
        os.replace(f"{path}.part", path)
    matches = md5 is None or md5_of(path) == md5
    require(matches, f"{path}: damaged or another file, its md5 is not {md5}; remove it and run this again")


def fetch(url, path):
    """Downloads url to `path`, or only what is missing of it if the server can do that."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        size = size if reply.status == 206 else 0  # otherwise the server sends the whole file
        length = reply.headers["Content-Length"]
        total = size + int(length) if length else None
        bar = tqdm.wrapattr(reply, "read", total=total, initial=size, desc=os.path.basename(url))
        with bar as stream, open(path, "ab" if size else "wb") as file:
            shutil.copyfileobj(stream, file)
    if total and os.path.getsize(path) < total:
        raise OSError(f"the connection broke at {os.path.getsize(path)} of {total} bytes")


def md5_of(path):
    """-> md5 of a file, as hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def whole(path):
    """Yields where to write a new file or folder, which moves to `path` at the end. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
            yield Path(folder, path.name)
            os.replace(Path(folder, path.name), path)
    except OSError as error:
        raise UserError(f"{path}: not written ({error}); make room, or use another folder") from None
