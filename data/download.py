"""Downloads: a file appears when it is whole. Archives have their own checksums."""

import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from common import UserError, whole


def download(url, folder):
    """Downloads url to the folder, unless its file is there -> the file's path. Raises UserError."""
    path = Path(folder, url.split("/")[-1])
    if path.exists():
        return path
    with whole(path) as new:
        try:
            fetch(url, new)
        except (OSError, HTTPException, ValueError) as error:  # no route, 404, timeout, not a URL
            reason = f"{str(error) or type(error).__name__}; run this again, or download it by hand"
            raise UserError(f"{url}: {reason} to {path}") from error
    return path


def fetch(url, path):
    with urllib.request.urlopen(url, timeout=30) as reply, open(path, "wb") as file:
        total = int(reply.headers["Content-Length"] or 0)
        with tqdm.wrapattr(reply, "read", total=total or None, desc=url.split("/")[-1]) as stream:
            shutil.copyfileobj(stream, file)
        if file.tell() < total:
            raise OSError(f"the connection broke at {file.tell()} of {total} bytes")
