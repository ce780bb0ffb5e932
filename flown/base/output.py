"""Where results go: nothing of the user's is lost there, and one process writes at a time.

A claim is the system's lock of a file, so that it ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import weakref
from collections.abc import Iterable
from pathlib import Path

from flown.base.errors import FlownError
from flown.base.files import read_json

try:
    import fcntl
except ImportError:  # Windows: nothing is claimed
    fcntl = None  # type: ignore[assignment]

# Of folders that this library writes: their manifests, and how a manifest's `format` starts.
MANIFESTS = ("zoo.json", "config.json", "run.json", "progress.json", "page.json", "labels.json")
FORMATS = ("flown-zoo-", "flown-model-", "flown-run-", "flown-page-", "flown-labels-")


class OutputFile:
    """A file that this process alone will write, while the object lives.

    Args:
        overwrite: it may exist, and is replaced. resume: it may exist, and is gone on with.

    Raises:
        FlownError: it exists, is a folder, or another process writes it.
    """

    def __init__(self, path: Path | str, overwrite: bool, resume: bool = False) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise FlownError(f"{path}: a folder; name a file")
        self._claim = _claim(self.path)
        if self.path.exists() and not overwrite and not resume:
            raise FlownError(f"{path}: exists already; pass --overwrite to replace it")


class OutputFolder:
    """A folder that this process alone writes, from `begin` on and while the object lives.

    With `overwrite` it is emptied, but only if it carries the mark of this library: a manifest of
    `MANIFESTS` whose `format` is one of `FORMATS`. Resuming needs the mark as well, because a folder
    that is resumed is marked.

    Args:
        sources: what is read to make the output, and must not be removed with it.

    Raises:
        FlownError: the folder may not be used; the message says why.
    """

    def __init__(
        self,
        path: Path | str,
        overwrite: bool,
        resume: bool = False,
        sources: Iterable[Path | str] = (),
    ) -> None:
        self.path = Path(path)
        self._overwrite, self._resume, self._sources = overwrite, resume, tuple(sources)
        self._check()

    def begin(self) -> None:
        """Claims the folder, and empties one that is overwritten: from here on it is this process's.

        Raises:
            FlownError: another process writes there or has written there since, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlownError(f"{self.path}: cannot be written ({error.strerror})") from None
        self._claim = _claim(self.path)
        self._check()
        if not self._resume:
            for entry in self.path.iterdir():
                shutil.rmtree(
                    entry
                ) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _check(self) -> None:
        path = self.path
        if path.is_file():
            raise FlownError(f"{path}: a file; name a folder")
        _refuse_places(path)
        if not path.is_dir() or all(_is_scratch(entry) for entry in path.iterdir()):
            return
        if not self._resume and not self._overwrite:
            raise FlownError(f"{path}: exists already; pass --overwrite to replace it, or --resume")
        if not is_ours(path):
            raise FlownError(
                f"{path}: a folder that flown did not write; choose another, or remove it yourself"
            )
        if self._resume:
            return
        if path.is_symlink():
            raise FlownError(
                f"{path}: a link, which is not followed to remove things; name the folder"
            )
        for source in self._sources:
            if path.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
                raise FlownError(f"{path}: holds {source}, which is read; choose another folder")


def is_ours(folder: Path) -> bool:
    """Whether a folder has a manifest of this library."""
    for name in MANIFESTS:
        with contextlib.suppress(FlownError):
            content = read_json(folder / name)
            if isinstance(content, dict) and str(content.get("format")).startswith(FORMATS):
                return True
    return False


def _refuse_places(path: Path) -> None:
    here = path.resolve()
    home = Path("~").expanduser().resolve()
    for what, place in (("the working folder", Path.cwd()), ("your home folder", home)):
        if here == place or here in place.parents:
            relation = "is" if here == place else "holds"
            raise FlownError(f"{path}: {relation} {what}; name a folder for the output alone")


def _is_scratch(path: Path) -> bool:
    """What a process leaves that was killed while it wrote, or that holds a claim."""
    return path.name.startswith(".") and path.name.endswith((".tmp", ".lock"))


class _Claim:
    """A lock of a folder itself, or of a hidden file beside a file, which goes with the claim.

    So do folders that the claim made, if nothing was written there.
    """

    def __init__(self, path: Path) -> None:
        lock = path if path.is_dir() else path.with_name(f".{path.name}.lock")
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDONLY if lock == path else os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FlownError(
                f"{path}: another process writes there; wait for its end, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        self.release = weakref.finalize(
            self, _release, handle, None if lock == path else lock, made
        )


def _release(handle: int, lock: Path | None, made: list[Path]) -> None:
    if lock is not None:
        lock.unlink(missing_ok=True)
    os.close(handle)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


_claims: weakref.WeakValueDictionary[Path, _Claim] = weakref.WeakValueDictionary()


def _claim(path: Path) -> _Claim | None:
    """The process's claim of a path: the one that it has, or a new one."""
    if fcntl is None:
        return None
    place = path.resolve()
    claim = _claims.get(place)
    if claim is None:
        try:
            claim = _claims[place] = _Claim(place)
        except OSError as error:
            raise FlownError(f"{path}: cannot be written ({error.strerror})") from None
    return claim
