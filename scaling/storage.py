"""Folders on a disk or in a bucket: where the two differ, it is said here and nowhere else.

A folder on a disk is a ``pathlib.Path``; one whose name has a scheme, ``gs://bucket/folder``, is an ``epath.Path``
(etils, over fsspec). Both read, list, join and delete by the same methods, so most code takes either without asking.

What a disk has and a bucket has not: files that grow (a log, TensorBoard's), a rename (an object is copied and
deleted), locks of the kernel. What a bucket gives: an object appears whole or not at all, and whoever asks after that
sees it. Nothing here imports etils for a folder on a disk.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import TypeVar

T = TypeVar("T")

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://")
# A request takes some 50 ms, nearly all of it waiting.
_REQUESTS_AT_ONCE = 16
# What the file systems below etils raise beside OSError, by module. None of these is imported for it.
_ERRORS = {
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "google.api_core.exceptions": "GoogleAPIError",
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
}


def is_remote(folder: PurePath | str) -> bool:
    """Whether it is in a bucket."""
    return _SCHEME.match(os.fspath(folder)) is not None


def folder(name: PurePath | str) -> Path:
    """The folder called ``name``: a path on a disk, or ``gs://bucket/folder`` (and what else etils and fsspec reach).

    Raises ValueError, with what to write or install, if nothing here can reach it.
    """
    text = os.fspath(name)
    if lost := re.match(r"(gs|s3|az|hf):/(?!/)(.*)", text):  # what pathlib makes of an address
        raise ValueError(f"{text}: a folder in a bucket has two slashes: write {lost[1]}://{lost[2]}")
    if not is_remote(text):
        return Path(name)
    require_literal(text)
    # tf.io.gfile is what etils would take if TensorFlow happened to be installed: one way to a bucket is enough.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec
    from etils import epath

    scheme = _SCHEME.match(text)[1]  # type: ignore[index]  # remote: it has one
    try:
        path = epath.Path(text)
        fsspec.get_filesystem_class(scheme)
    except KeyError:
        raise ValueError(f"{text}: {scheme}:// leads nowhere: write a path, or gs://bucket/folder") from None
    except (ImportError, ValueError) as e:
        how = "pip install 'scaling[gcs]'" if scheme == "gs" else f"install the package for {scheme}://"
        raise ValueError(f"{text}: {how} ({e})") from None
    for protocol in ("gs", "gcs", "s3", "az"):
        # A listing that is kept shows a process nothing of what others, its own workers among them, write meanwhile.
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    return path


def require_literal(folder: PurePath | str) -> None:
    """Raises ValueError where a folder's own name would be taken for a pattern: etils, and Orbax with it, lists a
    folder by ``glob`` on its whole path, so that one with a [z] in it is written and never found again."""
    found = re.search(r"[*?\[\]]", os.fspath(folder))
    if found:
        raise ValueError(f"{folder}: {found[0]} in a path is read as a pattern: write a folder without *, ?, [ and ]")


def cache_dir() -> Path:
    """Where prepared data, compiled programs and timings are: ``$SCALING_CACHE``, else ``.scaling/data``.

    Raises ValueError for a bucket: data are mapped into memory from there.
    """
    text = os.environ.get("SCALING_CACHE") or os.fspath(Path(".scaling") / "data")
    if is_remote(text):
        raise ValueError(f"SCALING_CACHE is {text}: data are mapped into memory from it: write a folder on a disk")
    return Path(text)


def errors() -> tuple[type[Exception], ...]:
    """What reaching into a folder may raise: OSError, and those of the clients that are loaded by now."""
    modules = ((sys.modules.get(module), name) for module, name in _ERRORS.items())
    return (OSError, *(getattr(module, name) for module, name in modules if hasattr(module, name)))


def write(path: Path, content: str | bytes, *, synced: bool = True) -> None:
    """Writes a file so that a reader sees the old content or the new, never half of one; makes its folder.

    On a disk: a file beside it takes its place (``synced``: and is on the disk before it does, so that a power cut
    leaves one of the two). In a bucket: one object, put. Raises OSError.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        try:
            path.write_bytes(data)
        except errors() as e:
            raise OSError(f"{path}: {first_line(e)}") from e
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            if synced:
                f.flush()
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file would take what room a full disk has left
        raise


def remove_halves(folder: Path) -> None:
    """Removes from a folder on a disk what writers that were killed left of files: see ``write``. For whoever holds the
    folder alone; in a bucket there are none."""
    if not is_remote(folder) and folder.is_dir():
        for path in folder.iterdir():
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)


def set_aside(path: Path, name: str) -> Path:
    """Gives a file or a folder another name beside it, in place of what has that name."""
    aside = path.with_name(name)
    if path.is_dir():
        remove_tree(aside)
        path.rename(aside)
    else:
        path.replace(aside)
    return aside


def remove_tree(folder: Path) -> None:
    """Removes a folder and all in it, if it is there."""
    if is_remote(folder):
        folder.rmtree(missing_ok=True)  # type: ignore[attr-defined]  # an epath.Path
    elif folder.exists():
        import shutil

        shutil.rmtree(folder)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder and below; 0 where there is none."""
    if is_remote(folder):
        import fsspec

        system, path = fsspec.core.url_to_fs(os.fspath(folder))
        try:
            return int(system.du(path, total=True))
        except FileNotFoundError:
            return 0
    total = 0
    for home, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(home, name)).st_size
            except FileNotFoundError:  # removed meanwhile
                continue
    return total


def trim(folder: Path, most_bytes: int) -> None:
    """Removes the files of a folder on a disk that were longest not used, until the rest takes at most so much."""
    if not folder.is_dir():
        return
    known = []
    for path in folder.iterdir():
        try:
            known.append((max((told := path.stat()).st_atime, told.st_mtime), told.st_size, path))
        except FileNotFoundError:  # another trims
            continue
    excess = sum(size for _, size, _ in known) - most_bytes
    for _, size, path in sorted(known):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


def each(function: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    """``function`` of every path, in order: one after another on a disk, several requests at a time in a bucket."""
    paths = list(paths)
    if len(paths) < 2 or not is_remote(paths[0]):
        return [function(path) for path in paths]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, paths))


def first_line(error: Exception) -> str:
    """An error of a client in one line, by its type where it has no words."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
