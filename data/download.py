"""Downloads: a file appears when it is whole; its md5 is checked."""

import hashlib
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from common import UserError, require, whole


def download(url, path, md5=None):
    """Downloads url to `path`, unless that file exists, and checks its md5. Raises UserError."""
    path, digest = Path(path), hashlib.md5(usedforsecurity=False)
    if not path.exists():
        with whole(path) as new:
            try:
                fetch(url, new)
            except (OSError, HTTPException, ValueError) as error:  # no route, 404, timeout, not a URL
                reason = f"{str(error) or type(error).__name__}; run this again, or download it by hand"
                raise UserError(f"{url}: {reason} to {path}") from error
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    matches = md5 in (None, digest.hexdigest())
    require(matches, f"{path}: damaged or another file, its md5 is not {md5}; remove it and run this again")


def fetch(url, path):
    with urllib.request.urlopen(url, timeout=30) as reply, open(path, "wb") as file:
        total = int(reply.headers["Content-Length"] or 0)
        with tqdm.wrapattr(reply, "read", total=total or None, desc=url.split("/")[-1]) as stream:
            shutil.copyfileobj(stream, file)
        if file.tell() < total:
            raise OSError(f"the connection broke at {file.tell()} of {total} bytes")
