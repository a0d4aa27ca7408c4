"""Files: a folder's volumes, names and errors as text, files that are whole or not there."""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".nii.gz", ".nii")

_REFUSES_TO_REPLACE = (errno.EEXIST, errno.EACCES, errno.EPERM, errno.EBUSY)

_unfinished: set[Path] = set()  # temporary files that are being written


def case_name(path: Path) -> str:
    """Return NAME of `NAME_0000.nii.gz`, `NAME.nii.gz` and the same with `.nii` (challenge rule).

    Raises:
        ValueError: the name has no such ending, or nothing before it.
    """
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            if name := path.name.removesuffix(suffix).removesuffix("_0000"):
                return name
            raise ValueError("nothing before _0000 names its label map")
    raise ValueError("not a .nii.gz or .nii file (the ending in lower case)")


def find_entries(source: Path) -> list[Path]:
    """Return whatever in a folder has a volume's name, sorted, without hidden files.

    Folders, pipes, links to nothing and endings in upper case are among them, so that each can be
    reported; `why_not_a_volume` has the reason.
    """
    if not source.is_dir():
        return [source]
    return sorted(
        path
        for path in source.iterdir()
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
    )


def find_cases(source: Path) -> list[Path]:
    """Return the volumes of a folder, sorted, without hidden files; or the one file named."""
    return [path for path in find_entries(source) if path == source or not why_not_a_volume(path)]


def why_not_a_volume(path: Path) -> str:
    """Return why an entry of a folder is no file to read a volume from, or ""."""
    try:
        case_name(path)
    except ValueError as error:
        return str(error)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return f"a link that leads nowhere ({error.strerror})"
        return error.strerror or "it cannot be read"
    if stat.S_ISDIR(mode):
        return "a folder, not a file"
    return "" if stat.S_ISREG(mode) else "not a regular file"


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return what identifies a file, whatever its name or link; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def printable(text: object) -> str:
    """Return one line: control characters, line ends and bytes that are not UTF-8 as escapes."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in str(text)
    )


def one_line(error: BaseException) -> str:
    """Return an error as one line for the user."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = printable(" ".join(str(error).split()))
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def spreadsheet_text(text: str) -> str:
    """Return a name as a cell of a table; a quote precedes what looks like a formula."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def output_key(name: str) -> str:
    """Return a key that is equal for case names that some file system takes for the same.

    CIFS, exFAT, NTFS and APFS ignore case; APFS and HFS+ ignore how an accent is encoded as well.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def flush_to_disk(descriptor: int) -> None:
    """Call fsync; a file system without it is no error."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name at the end of the block, if at all.

    It is written under a hidden temporary name beside it, flushed to the disk, then renamed. The
    temporary name is random, for process ids are alike in every container, and is opened only if
    nothing is there, not even a link.

    Raises:
        OSError: the file cannot be written; nothing is left under either name. Its `filename` is
            set.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    _unfinished.add(temporary)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            flush_to_disk(descriptor)
        try:
            temporary.replace(path)
        except OSError as error:
            # Some network and FUSE file systems rename, but not over a file that is there.
            if error.errno not in _REFUSES_TO_REPLACE or not path.is_file():
                raise
            aside = path.with_name(f".{secrets.token_hex(8)}.partial")
            path.replace(aside)
            try:
                temporary.replace(path)
            except BaseException:
                aside.replace(path)
                raise
            with contextlib.suppress(OSError):  # a store of files that are written once
                aside.unlink()
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:  # of a write, which names none
            error.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        _unfinished.discard(temporary)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a `whole_file`; text as UTF-8, and bytes of names that are not UTF-8 as escapes."""
    with whole_file(path) as file:
        file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)


def check_writable(folder: Path, name: str = ".abdoseg-probe") -> None:
    """Write, replace and remove a file as the outputs; access(2) is wrong on some mounts."""
    probe = folder / name
    write_atomically(probe, b"first")
    write_atomically(probe, b"second")
    with contextlib.suppress(OSError):  # a store of files that are written once
        probe.unlink()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a path for the block, against every other process and thread.

    The lock is that of a file `.NAME.lock` beside it, which stays: the path itself may be replaced
    meanwhile, or not be there. Where the file system has no locks there is none.

    Raises:
        BlockingIOError: `wait` is false and somebody holds it.
        OSError: the lock's file cannot be opened.
    """
    lock, flags = path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_CLOEXEC
    try:
        descriptor = os.open(lock, flags | os.O_RDWR, 0o666)  # NFS locks what may be written alone
    except PermissionError:
        descriptor = os.open(lock, flags | os.O_RDONLY)  # another user's
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
        yield
    finally:
        os.close(descriptor)


def discard_unfinished() -> None:
    """Remove the temporary files of a process that ends at once, in whatever thread they are."""
    for temporary in list(_unfinished):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
