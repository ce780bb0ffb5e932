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

    instead = ""  # of overwriting, for messages

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

    def claim(self) -> None:
        """From here on no other process may write there.

        Raises:
            FlownError: another process does or has done since, or the folder cannot be made.
        """
        self._claim = _claim(self.path, folder=True)
        self._check()

    def begin(self) -> None:
        """Claims the folder, and empties one that is overwritten.

        Raises:
            FlownError: as `claim`, or something in it cannot be removed.
        """
        self.claim()
        if self._resume:
            return
        # The mark goes last: a folder that is half emptied can be overwritten again.
        entries = sorted(self.path.iterdir(), key=lambda entry: entry.name in MANIFESTS)
        try:
            for entry in entries:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        except OSError as error:
            raise FlownError(f"{error.filename}: cannot be removed ({error.strerror})") from None

    def _check(self) -> None:
        path = self.path
        if path.is_file():
            raise FlownError(f"{path}: a file; name a folder")
        _refuse_places(path)
        if not path.is_dir() or all(_is_left(entry) for entry in path.iterdir()):
            return
        if not self._resume and not self._overwrite:
            raise FlownError(
                f"{path}: exists already; pass --overwrite to replace it{self.instead}"
            )
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
    """Whether a folder has a manifest of this library, or nothing but what it holds at work."""
    with contextlib.suppress(OSError):
        entries = list(folder.iterdir())
        if entries and all(map(_is_scratch, entries)):
            return True
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
    """Whether a file is one that is being written, or the lock of a claim."""
    return path.name.startswith(".") and path.name.endswith((".tmp", ".lock")) and not path.is_dir()


def _is_left(path: Path) -> bool:
    """Whether a file was left by a process that was killed, or belongs to this one."""
    if not _is_scratch(path) or path.suffix != ".lock" or fcntl is None:
        return _is_scratch(path)
    if path.with_name(path.name[1 : -len(".lock")]).resolve() in _claims:
        return True
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


class _Claim:
    """A lock of a folder itself, or of a hidden file beside a file, which goes with the claim.

    So do folders that the claim made, if nothing was written there.
    """

    def __init__(self, path: Path, folder: bool) -> None:
        lock = path if folder else path.with_name(f".{path.name}.lock")
        made = [parent for parent in (path, *path.parents) if not parent.exists()][not folder :]
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        handle = _locked(lock, folder)
        if handle is None:
            raise FlownError(
                f"{path}: another process writes there; wait for its end, or choose another place"
            )
        self.release = weakref.finalize(self, _release, handle, None if folder else lock, made)


def _locked(lock: Path, folder: bool) -> int | None:
    """An open file that is locked; None where another process has it."""
    while True:
        handle = os.open(lock, os.O_RDONLY | (0 if folder else os.O_CREAT), 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            return handle  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        os.close(handle)  # who had it removed the file meanwhile


def _release(handle: int, lock: Path | None, made: list[Path]) -> None:
    if lock is not None:
        lock.unlink(missing_ok=True)
    os.close(handle)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


_claims: weakref.WeakValueDictionary[Path, _Claim] = weakref.WeakValueDictionary()


def _claim(path: Path, folder: bool = False) -> _Claim | None:
    """The process's claim of a path: the one that it has, or a new one."""
    if fcntl is None:
        return None
    place = path.resolve()
    claim = _claims.get(place)
    if claim is None:
        try:
            claim = _claims[place] = _Claim(place, folder)
        except OSError as error:
            raise FlownError(f"{path}: cannot be written ({error.strerror})") from None
    return claim
