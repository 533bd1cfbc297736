"""Pictures on their way to the engine: each is encoded once, and sent by content hash."""

from pathlib import Path
from threading import Lock

from PIL import Image

from thinkimg.engine.client import ImageRef
from thinkimg.store.image_table import encode


class Media:
    """Encodes each unique picture once and offers it to the engine as a file in `folder`, or as data without one."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._known: dict[str, ImageRef] = {}
        self._making: dict[str, Lock] = {}
        self._lock = Lock()

    def ref(self, uuid: str, image: Image.Image) -> ImageRef:
        """For any number of threads: the first that asks for a picture makes it, the others wait for that."""
        with self._lock:
            making = self._making.setdefault(uuid, Lock())
        with making:
            if uuid not in self._known:
                data = encode(image)
                if self.folder is None:
                    self._known[uuid] = ImageRef(uuid, data=data)
                else:
                    path = self.folder / f"{uuid}.webp"
                    path.write_bytes(
                        data
                    )  # scratch for the engine's eyes, gone with the players: not for the file layer
                    self._known[uuid] = ImageRef(uuid, path=path)
            return self._known[uuid]
