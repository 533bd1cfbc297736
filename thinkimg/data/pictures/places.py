"""Places of a data set's pictures: beside their table, above it, by the last parts of a path, in ZIP archives."""

import functools
import os
import unicodedata
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
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
Spell = Callable[[str], Parts]
"""Function from a name to the parts by which it is compared."""


@dataclass(frozen=True)
class Member:
    """A file in a ZIP archive."""

    archive: Path
    name: str
    opened: zipfile.ZipFile

    @property
    def path(self) -> str:
        """Its name below the archive's own, which is a directory once it is unpacked."""
        return f"{self.archive.stem}/{self.name}"

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
    in `images` by its last parts, wherever these lie. After that all of it is tried in another spelling, see `fold`.
    Where two names share one file, it is that of a whole name alone.
    """

    def __init__(self, root: Path, also: Iterable[Path] = (), images: Path | None = None):
        self.root, self.images = root, images
        self.also = {place for path in also for place in (path.absolute(), path.resolve())}
        self._names: dict[tuple[str, str], str] = {}
        """Picture -> the first name that led to it."""
        self._shared: dict[tuple[str, str], str] = {}
        """Picture -> the second name, where there is one."""
        self._lock = Lock()
        self._spelled = functools.cache(_list_spelled)
        self._files = functools.cache(self._index_files)

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
        """Return a place, and True if the whole name leads there as it is written."""
        split_name(name)
        if name.startswith("/") and (path := self._absolute(name)):
            return path, True
        if found := self._look(name, folder, split, _regular):
            return found
        if found := self._look(name.replace("\\", "/"), folder, fold, self._alike):
            return found[0], False
        raise RowRefused(Reason.PATH, self._missing(name))

    def _look(
        self, name: str, folder: Path, spell: Spell, find: Callable[[Path, Parts, str], Path | None]
    ) -> tuple[Place, bool] | None:
        """Return a place in one spelling, and True if the whole name leads there. find: a file of a directory."""
        parts = split_name(name)
        if not name.startswith("/"):
            for place in dict.fromkeys((folder, self.root)):
                if path := find(place, parts, name):
                    return path, True
            if (self.images and self.images.is_dir()) and (path := find(self.images, parts, name)):
                return path, True
        # The first directories may be those of another machine, or the root's own names.
        for start in range(1, len(parts)):
            for place in dict.fromkeys((folder, self.root)):
                is_own = spell("/".join(parts[:start])) == spell("/".join(place.parts[-start:]))
                is_known = name.startswith("/") and start <= len(parts) - 2  # a bare name is too little
                if (is_own or is_known) and (path := find(place, parts[start:], name)):
                    return path, is_own
        spelled = spell("/".join(parts))
        if member := self._in_archives(spelled, spell, name):
            return member, count_shared(spell(member.path), spelled) == len(parts)
        if self.images and self.images.is_dir() and (path := self._by_last_parts(spelled, spell, name)):
            return path, False
        return None

    def _alike(self, place: Path, parts: Parts, name: str) -> Path | None:
        """Return the only file below a directory whose path has these parts but for their spelling."""
        for part in parts:
            names = self._spelled(place).get(fold(part), [])
            if len(names) > 1 and part not in names:
                raise RowRefused(Reason.PATH, f"{short(name)} may be {short(names[0])} and {short(names[1])}")
            if not names:
                return None
            place /= part if part in names else names[0]
        return _regular(place, (), name)

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
        return _regular(path, (), name) if inside else None

    def _missing(self, name: str) -> str:
        if name.startswith("/"):
            return f"{short(name)} leads out of the data set; data.images may name the folder of its pictures"
        return f"there is no file {short(name)}"

    def _in_archives(self, parts: Parts, spell: Spell, name: str) -> Member | None:
        """Return the member of that name, or else the only one of all archives that shares the most last parts."""

        def rank(member: Member) -> tuple[bool, int]:
            return spell(member.name) == parts, count_shared(spell(member.path), parts)

        members = [member for archive in self._archives[:MAX_ARCHIVES] for member in archive.find(parts, spell)]
        most = max(map(rank, members), default=None)
        best = [member for member in members if rank(member) == most]
        if len({member.content for member in best}) > 1:
            shown = " and ".join(f"{short(member.name)} of {member.archive.name}" for member in best[:2])
            raise RowRefused(Reason.PATH, f"{short(name)} may be {shown}")
        if len(self._archives) > MAX_ARCHIVES and not (most and most[0]):
            detail = f"{short(name)} is looked for in {MAX_ARCHIVES} ZIP archives at most, and there are "
            detail += f"{len(self._archives)}: unpack them, or set data.images to the folder of the pictures"
            raise RowRefused(Reason.PATH, detail)
        return best[0] if best else None

    def _by_last_parts(self, parts: Parts, spell: Spell, name: str) -> Path | None:
        """Return the only file below `images` that shares the most of the name's last parts."""
        assert self.images is not None
        best = self._files(spell).closest(parts)
        if len(best) > 1:
            raise RowRefused(Reason.PATH, f"{short(name)} may be {short(best[0])} and {short(best[1])}")
        return _regular(self.images, (best[0],), name) if best else None

    def _index_files(self, spell: Spell) -> "NameIndex":
        assert self.images is not None
        return NameIndex((path.relative_to(self.images).as_posix() for path in walk_files(self.images, "*")), spell)

    @functools.cached_property
    def _archives(self) -> list["Archive"]:
        if self.images and self.images.is_file():
            return [Archive(self.images)]
        folders = dict.fromkeys((self.root, *([self.images] if self.images else [])))
        paths = [folder / name for folder in folders for names in self._spelled(folder).values() for name in names]
        return [Archive(path) for path in paths if path.suffix.lower() == ".zip" and path.is_file()]


class NameIndex:
    """Names of files, found by their last parts in one spelling."""

    def __init__(self, names: Iterable[str], spell: Spell):
        self._names: dict[Parts, list[str]] = {}
        for name in names:
            self._names.setdefault(spell(name), []).append(name)
        self._by_end = sort_by_end(self._names)

    def closest(self, parts: Parts) -> list[str]:
        """Return the names that share most last parts with a path, see the function `closest`."""
        return [name for spelled in closest(self._by_end, parts) for name in self._names[spelled]]


class Archive:
    """ZIP archive of pictures. Raises UserError if it can't be read."""

    def __init__(self, path: Path):
        self.path = path
        self._index = functools.cache(self._index_members)

    @functools.cached_property
    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            hint = "data.images must be a folder or a ZIP archive; download the archive again, or unpack it."
            raise UserError(f"{self.path} is no readable ZIP archive: {error}.", hint=hint) from error

    def _index_members(self, spell: Spell) -> NameIndex:
        return NameIndex((name for name in self._opened.namelist() if not name.endswith("/")), spell)

    def find(self, parts: Parts, spell: Spell) -> list[Member]:
        """Return the members that may be meant by a name: that of the very name, or those that are closest."""
        best = self._index(spell).closest(parts)
        same = [name for name in best if spell(name) == parts]
        return [Member(self.path, name, self._opened) for name in same or best]


def split(name: str) -> Parts:
    """Return the parts of a name as it is written."""
    return tuple(name.split("/"))


def fold(name: str) -> Parts:
    r"""Return the parts of a name in the spelling that is common to all systems.

    Composed Unicode, where macOS stores é as e and an accent; / for the \ of Windows; the suffix in lower case.
    """
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    split_parts = (part.rpartition(".") for part in parts)
    return tuple(f"{stem}.{suffix.lower()}" if dot else suffix for stem, dot, suffix in split_parts)


def _list_spelled(folder: Path) -> Mapping[Parts, list[str]]:
    """Return the names in a directory by their spelling; none where it can't be read."""
    names: dict[Parts, list[str]] = {}
    try:
        for name in sorted(os.listdir(folder)):
            names.setdefault(fold(name), []).append(name)
    except OSError:
        return {}
    return names


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


def _regular(place: Path, parts: Parts, name: str) -> Path | None:
    """Return the path of a regular file; None if there is none. Raises RowRefused for what can't be a name."""
    path = place.joinpath(*parts)
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
