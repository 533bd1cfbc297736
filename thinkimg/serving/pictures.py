"""Pictures that a request names: data: URIs, files below one folder, and URLs of allowed hosts."""

import os
import stat
from collections.abc import Collection
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from thinkimg.conversation.picture import Picture, make_picture
from thinkimg.data.pictures.image_files import ImageFiles, scheme_of
from thinkimg.data.refusal import RowRefused
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits, ImageRefused, decode
from thinkimg.images.settings import ViewLimits
from thinkimg.serving.refusal import Refusal


class PictureReader:
    """Reader of pictures, for any number of threads.

    view: sizes at which the model sees them. limits: of the files. media: folder below which file: addresses may lie;
    None for none. hosts: those from which pictures may be fetched (data.url_hosts).
    """

    def __init__(self, view: ViewLimits, limits: ImageLimits, media: Path | None, hosts: Collection[str]) -> None:
        self.view, self.limits = view, limits
        self.media = None if media is None else Path(os.path.realpath(media))
        self._others = ImageFiles(Path("/"), limits, hosts)  # asked for data: and http(s): alone

    def is_remote(self, url: str) -> bool:
        """Tell whether the picture comes over the network, which may take a minute."""
        return scheme_of(url) in ("http", "https")

    def fetch(self, url: str) -> bytes:
        """Return a picture's bytes, at most a block more than the limit. Raises Refusal."""
        scheme = scheme_of(url)
        try:
            if scheme == "file":
                return self._read_file(url)
            if scheme in ("data", "http", "https"):
                return self._others.reader_of(url)()
        except RowRefused as error:
            raise Refusal(f"A picture can't be read: {error.detail}.", param="messages") from error
        except UserError as error:  # the proxy that the environment names
            raise Refusal(str(error), status=502, param="messages") from error
        raise Refusal("A picture's address must begin with data:, file://, http:// or https://.", param="messages")

    def load(self, data: bytes) -> Picture:
        """Return the picture in a file's bytes, as in training. Raises Refusal."""
        try:
            return make_picture(decode(data, self.limits), self.view)
        except ImageRefused as error:
            message = f"A picture can't be used ({error.reason}): {error.detail}."
            raise Refusal(message, param="messages", code="invalid_image") from error

    def _read_file(self, url: str) -> bytes:
        if self.media is None:
            raise Refusal("file: addresses need thinkimg chat --media.", param="messages")
        # One text for all: whether a file exists elsewhere is nobody's business.
        refusal = Refusal("There is no such picture below the folder of --media.", param="messages")
        try:
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise refusal
            path = Path(os.path.realpath(unquote(parts.path)))
            if not path.is_relative_to(self.media):
                raise refusal
            with open(path, "rb", opener=partial(open_beneath, self.media)) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise refusal
                return file.read(self.limits.max_bytes + 1)  # enough for the decoder to refuse it
        except (OSError, ValueError):  # no such file, no permission; a name that is none
            raise refusal from None


def open_beneath(folder: Path, path: str, flags: int) -> int:
    """Open a file below a folder, as `open` wants it of an opener. path: resolved; no link in it is followed.

    Another process may have put a link there since. Raises OSError.
    """
    descriptor = os.open(folder, os.O_PATH)
    *folders, name = Path(path).relative_to(folder).parts or (".",)
    # Folders need not be readable, and a pipe would be waited for.
    for part, how in [(part, os.O_PATH) for part in folders] + [(name, flags | os.O_NONBLOCK)]:
        parent = descriptor
        try:
            descriptor = os.open(part, how | os.O_NOFOLLOW, dir_fd=parent)
        finally:
            os.close(parent)
    return descriptor
