"""Images on their way to the engine: each is encoded once, and named by the hash of its pixels."""

from pathlib import Path
from threading import Lock

from PIL import Image

from thinkimg.disk import writing
from thinkimg.engine.request import ImageRef
from thinkimg.store.image_table import encode_lossless


class Media:
    """Encoder of images for the engine: into files of `folder`, or into data without one."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._refs: dict[str, ImageRef] = {}
        self._encoding: dict[str, Lock] = {}
        self._lock = Lock()

    def ref(self, uuid: str, image: Image.Image) -> ImageRef:
        """Return the reference to an image; of several threads the first encodes it and the others wait."""
        with self._lock:
            encoding = self._encoding.setdefault(uuid, Lock())
        with encoding:
            if uuid not in self._refs:
                data = encode_lossless(image)
                if self.folder is None:
                    self._refs[uuid] = ImageRef(uuid, data=data)
                else:
                    path = self.folder / f"{uuid}.webp"
                    with writing(path):  # scratch, which goes with the sampler: nothing for the file layer
                        path.write_bytes(data)
                    self._refs[uuid] = ImageRef(uuid, path=path)
            return self._refs[uuid]
