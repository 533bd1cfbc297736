"""Places of a data set's pictures: beside their table, above it, by the last parts of a path, in ZIP archives."""

import functools
import zipfile
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import IO

from thinkimg.data.refusal import Reason, RowRefused, short
from thinkimg.errors import UserError
from thinkimg.store.files import walk_files

MAX_ARCHIVES = 64
"""ZIP archives beside the tables that are opened to look for pictures."""
Parts = tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """A file in a ZIP archive."""

    archive: Path
    name: str
    opened: zipfile.ZipFile

    @property
    def parts(self) -> Parts:
        """Parts of its name below the archive's own, which is a directory once it is unpacked."""
        return (self.archive.stem, *self.name.split("/"))

    @property
    def content(self) -> tuple[int, int]:
        """Checksum and size, which are equal for copies."""
        info = self.opened.getinfo(self.name)
        return info.CRC, info.file_size

    def open(self) -> IO[bytes]:
        """Open the file for reading. Raises RowRefused where it is encrypted or damaged."""
        try:
            return self.opened.open(self.name)
        # zipfile's own: of a member with a password or of a compression that Python has not (both are RuntimeErrors),
        # and of damage. The row is refused with that reason.
        except (RuntimeError, zipfile.BadZipFile) as error:
            raise RowRefused(Reason.PATH, f"{short(self.name)} can't be unpacked: {short(str(error))}") from error


Place = Path | Member


class PicturePlaces:
    """Finder of pictures by the names that tables have for them, for any number of threads.

    A name never leads out of the data set (root, images, and `also` for absolute paths). It is tried as it is, then
    without its first directories, which are those of another machine or lie above the root, then in ZIP archives, and
    in `images` by its last parts, wherever these lie. Where two names share one file, it is that of a whole name alone.
    """

    def __init__(self, root: Path, also: Iterable[Path] = (), images: Path | None = None):
        self.root, self.images = root, images
        self.also = {place for path in also for place in (path.absolute(), path.resolve())}
        self._names: dict[tuple[str, str], str] = {}
        """Picture -> the first name that led to it."""
        self._shared: dict[tuple[str, str], str] = {}
        """Picture -> the second name, where there is one."""
        self._lock = Lock()

    def locate(self, name: str, folder: Path | None = None) -> Path:
        """Return the path of a regular file. Raises RowRefused (PATH) for any other name, also of one in an archive."""
        picture = self.find(name, folder)
        if not isinstance(picture, Path):
            raise RowRefused(Reason.PATH, f"{short(name)} lies in an archive")
        return picture

    def find(self, name: str, folder: Path | None = None) -> Place:
        """Return the picture's place. folder: directory of its table. Raises RowRefused (PATH) where there is none."""
        picture, is_named = self._search(name, folder or self.root)
        key = (str(picture), "") if isinstance(picture, Path) else (str(picture.archive), picture.name)
        whole = str(PurePosixPath(folder or self.root, name))  # without "./"
        with self._lock:
            first = self._names.setdefault(key, whole)
            second = whole if first != whole else None
            other = self._shared.setdefault(key, second) if second else self._shared.get(key)
        if other is not None and not is_named:
            # By a part of its name a picture is found: another name with that part may mean another picture, and so
            # may this one, whichever came first.
            shown = (first if first != whole else other).removeprefix(f"{self.root}/")
            detail = f"{short(name)} and {short(shown)} both lead to {short(picture.name)}"
            raise RowRefused(Reason.PATH, f"{detail}: set data.images to the folder that has their directories")
        return picture

    def _search(self, name: str, folder: Path) -> tuple[Place, bool]:
        """Return a place, and True if the whole name leads there."""
        parts = split_name(name)
        if name.startswith("/"):
            if path := self._absolute(name):
                return path, True
        else:
            for place in dict.fromkeys((folder, self.root)):
                if path := _regular(place.joinpath(*parts), name):
                    return path, True
            if (self.images and self.images.is_dir()) and (path := _regular(self.images.joinpath(*parts), name)):
                return path, True
        # The first directories may be those of another machine, or the root's own names.
        for start in range(1, len(parts)):
            for place in dict.fromkeys((folder, self.root)):
                is_own = parts[:start] == place.parts[-start:]
                is_known = name.startswith("/") and start <= len(parts) - 2  # a bare name is too little
                if (is_own or is_known) and (path := _regular(place.joinpath(*parts[start:]), name)):
                    return path, is_own
        if member := self._in_archives(parts):
            return member, count_shared(member.parts, parts) == len(parts)
        if self.images and self.images.is_dir() and (path := self._by_last_parts(parts, name)):
            return path, False
        raise RowRefused(Reason.PATH, self._missing(name))

    def _absolute(self, name: str) -> Path | None:
        """Return an absolute path that lies in the data set; None for any other. Raises RowRefused for a bad one."""
        path = Path(name)
        if ".." in path.parts:
            return None
        places = {*self.also, *(place for place in (self.root, self.images) if place)}
        try:
            inside = any(one.is_relative_to(place) for one in (path, path.resolve()) for place in places)
        except (OSError, ValueError, RuntimeError):
            raise RowRefused(Reason.PATH, f"{short(name)} is no path") from None
        return _regular(path, name) if inside else None

    def _missing(self, name: str) -> str:
        if name.startswith("/"):
            return f"{short(name)} leads out of the data set; data.images may name the folder of its pictures"
        return f"there is no file {short(name)}"

    def _in_archives(self, parts: Parts) -> Member | None:
        """Return the member of that name, or else the only one of all archives that shares the most last parts."""

        def rank(member: Member) -> tuple[bool, int]:
            return member.name == "/".join(parts), count_shared(member.parts, parts)

        members = [member for archive in self._archives for member in archive.find(parts)]
        most = max(map(rank, members), default=None)
        best = [member for member in members if rank(member) == most]
        if len({member.content for member in best}) > 1:
            shown = " and ".join(f"{short(member.name)} of {member.archive.name}" for member in best[:2])
            raise RowRefused(Reason.PATH, f"{short('/'.join(parts))} may be {shown}")
        return best[0] if best else None

    def _by_last_parts(self, parts: Parts, name: str) -> Path | None:
        """Return the only file below `images` that shares the most of the name's last parts."""
        assert self.images is not None
        best = closest(self._files_by_end, parts)
        if len(best) > 1:
            shown = " and ".join(short("/".join(path)) for path in best[:2])
            raise RowRefused(Reason.PATH, f"{short(name)} may be {shown}")
        return _regular(self.images.joinpath(*best[0]), name) if best else None

    @functools.cached_property
    def _files_by_end(self) -> list[Parts]:
        assert self.images is not None
        return sort_by_end(path.relative_to(self.images).parts for path in walk_files(self.images, "*"))

    @functools.cached_property
    def _archives(self) -> list["Archive"]:
        if self.images and self.images.is_file():
            return [Archive(self.images)]
        folders = dict.fromkeys((self.root, *([self.images] if self.images else [])))
        archives = [path for folder in folders for path in sorted(folder.glob("*.zip")) if path.is_file()]
        return [Archive(path) for path in archives[:MAX_ARCHIVES]]


class Archive:
    """ZIP archive of pictures. Raises UserError if it can't be read."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            hint = "data.images must be a folder or a ZIP archive; download the archive again, or unpack it."
            raise UserError(f"{self.path} is no readable ZIP archive: {error}.", hint=hint) from error

    @functools.cached_property
    def _members_by_end(self) -> list[Parts]:
        return sort_by_end(tuple(name.split("/")) for name in self._opened.namelist() if not name.endswith("/"))

    def find(self, parts: Parts) -> list[Member]:
        """Return the members that may be meant by a name: two, at most, and that of the very name."""
        best = closest(self._members_by_end, parts)
        if len(best) > 1 and "/".join(parts) in self._opened.NameToInfo:
            best = [parts]
        return [Member(self.path, "/".join(member), self._opened) for member in best]


def split_name(name: str) -> Parts:
    """Return the parts of a path from any machine. Raises RowRefused (PATH) for one that leads upwards or is none."""
    path = name if "/" in name else name.replace("\\", "/")  # of a table that was written on Windows
    parts = tuple(part for part in PurePosixPath(path).parts if part != "/")
    if not parts or ".." in parts or "\0" in name:
        problem = "leads out of the data set" if ".." in parts else "is no path"
        raise RowRefused(Reason.PATH, f"{short(name)} {problem}")
    return parts


def sort_by_end(paths: Iterable[Parts]) -> list[Parts]:
    """Return paths for `closest`: their parts from the last to the first, sorted."""
    return sorted(path[::-1] for path in paths)


def closest(candidates: Sequence[Parts], parts: Parts) -> list[Parts]:
    """Return two, at most, of the candidates that share most last parts with a path, the last one at least.

    candidates: of `sort_by_end`, so that the time does not grow with the number of files of one name. A candidate that
    shares its last part alone, while both have directories, is no match.
    """
    end = parts[::-1]
    index = bisect_left(candidates, end)
    near = candidates[max(index - 1, 0) : index + 1]
    most = max((count_shared(one[::-1], parts) for one in near), default=0)
    if most == 0:
        return []
    first = bisect_left(candidates, end[:most])
    if most == 1 and len(parts) > 1:  # a path without directories is the first of those with its last part
        fitting = [one for one in candidates[first : first + 2] if one == end[:1]]
    else:
        fitting = [one for one in candidates[first : first + 2] if one[:most] == end[:most]]
    return [one[::-1] for one in fitting]


def count_shared(a: Parts, b: Parts) -> int:
    """Return the number of last parts that two paths share."""
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(a), reversed(b), strict=False))
    return sum(1 for _ in shared)


def is_of_kernel(path: Path) -> bool:
    """Tell whether a resolved path lies in /proc, /sys or /dev, whose files may be endless; /dev/shm is memory."""
    return path.parts[1:2] in (("proc",), ("sys",), ("dev",)) and path.parts[:3] != ("/", "dev", "shm")


def _regular(path: Path, name: str) -> Path | None:
    """Return the path if it is a regular file; None if there is none. Raises RowRefused for what can't be a name."""
    try:
        if not path.is_file():
            path.stat()  # says whether the name is one at all
            return None
        resolved = path.resolve()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RuntimeError):  # too long, NUL or surrogates in it, a loop of links
        raise RowRefused(Reason.PATH, f"{short(name)} is no path") from None
    if is_of_kernel(resolved):
        raise RowRefused(Reason.PATH, f"{short(name)} leads to a file of the kernel")
    return path
