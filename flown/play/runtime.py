"""onnxruntime-web, which runs graphs in a browser: fetched once, as its makers published it.

It is larger than all of this package, so it is not in it.
"""

from __future__ import annotations

import base64
import hashlib
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from flown.base.errors import FlownError
from flown.base.files import replacing
from flown.base.progress import bar
from flown.tasks.named import cache_folder

VERSION = "1.30.0"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_PART = 1 << 20


def runtime(archive: Path | None = None) -> Path:
    """The folder of its three files, in the cache.

    Args:
        archive: the published archive, for a machine that cannot fetch it; fetched when None.

    Raises:
        FlownError: it cannot be fetched, or is not what its makers published.
    """
    folder = cache_folder() / f"onnxruntime-web-{VERSION}"
    if all((folder / name).is_file() for name in FILES):
        return folder
    if archive is None:
        with replacing(folder / "archive.tgz") as scratch:
            _fetch(scratch)
            _unpack(scratch, folder)
        (folder / "archive.tgz").unlink()
    elif archive.is_file():
        _unpack(archive, folder)
    else:
        raise FlownError(f"--runtime {archive}: no such file")
    return folder


def _fetch(to: Path) -> None:
    try:
        with urllib.request.urlopen(URL, timeout=60) as answer, to.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0) // _PART
            with bar(f"onnxruntime-web {VERSION}, MB", total) as update:
                while part := answer.read(_PART):
                    file.write(part)
                    update(file.tell() // _PART, "")
    except (urllib.error.URLError, OSError) as error:
        raise FlownError(
            f"{URL}: cannot be fetched ({error}). Fetch it elsewhere, and add --runtime FILE"
        ) from None


def _unpack(archive: Path, folder: Path) -> None:
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != SHA512:
        raise FlownError(
            f"{archive}: is not onnxruntime-web {VERSION}; it must be what {URL} gives"
        )
    with tarfile.open(archive) as opened:
        for name in FILES:
            member = opened.extractfile(f"package/dist/{name}")
            assert member is not None  # the digest says what is inside
            with replacing(folder / name) as scratch:
                scratch.write_bytes(member.read())
