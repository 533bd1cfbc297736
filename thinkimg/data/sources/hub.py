"""Data set of the Hugging Face Hub, or a local copy of one, through `datasets`; images stay encoded."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thinkimg.data.image_files import ImageFiles
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import RawRow, Refused, Source, raw_row, require_columns
from thinkimg.errors import UserError, shorten
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath, Name
from thinkimg.store.manifest import directory_digest

if TYPE_CHECKING:
    import datasets


class Settings(RowsConfig):
    """Settings of a data set of the Hub."""

    source: Literal["hub"] = "hub"
    path: FilePath
    """Id of the data set on the Hub, or a local copy of one."""
    hub_config: Name | None = None
    """Name of its configuration."""
    hub_split: Name = "train"
    """Split of the data set that is read."""
    revision: Name | None = None
    """Commit or tag; null is the commit that its main branch is."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the data set's rows; its Arrow file is mapped, not read.

    The digest is the commit, also where the library's cache stands in for the Hub; for a local directory the hash of
    its files.
    Raises UserError if the data set can't be loaded or lacks a mapped column.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    try:
        loaded = datasets.load_dataset(data.path, data.hub_config, split=data.hub_split, revision=data.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        message = shorten(str(error))
        raise UserError(
            f"The data set {data.path} can't be loaded: {message}",
            hint="Check data.path, data.hub_config, data.hub_split and data.revision.",
        ) from error
    require_columns(data.columns, loaded.column_names, data.path)
    local = Path(data.path).is_dir()
    digest = directory_digest(Path(data.path).resolve()) if local else _commit(loaded)
    root = Path(data.path) if local else Path(datasets.config.HF_DATASETS_CACHE)
    caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.HF_CACHE_HOME), root]
    images = ImageFiles(root, limits, data.url_hosts, also=caches)
    encoded = _undecoded(loaded, {name for _, name in data.columns})
    return Source("hub" if local else data.path, digest, lambda: _rows(encoded, data, images))


def _commit(dataset: "datasets.Dataset") -> str:
    """Return the commit of a data set of the Hub: the library caches each under it.

    The library's own fingerprint where it does otherwise; it follows the commit, too.
    """
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    (folder,) = folders if len(folders) == 1 else ("",)
    return folder if re.fullmatch(r"[0-9a-f]{40}", folder) else dataset._fingerprint


def _rows(dataset: "datasets.Dataset", data: Settings, images: ImageFiles) -> Iterator[RawRow | Refused]:
    labelled = {name: dataset.features[name] for role, name in data.columns if name is not None and role != "image"}
    for number, record in enumerate(dataset, 1):
        record |= {name: _name_labels(feature, record[name]) for name, feature in labelled.items()}
        yield raw_row(record, data, images.reader_of, id=f"{data.hub_split}:{number}", where=f"row {number}")


def _name_labels(feature: Any, value: Any) -> Any:
    """Return a value with the names of its class labels; None for -1, by which the Hub says that there is no label."""
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value) if 0 <= value < feature.num_classes else None
    inner = getattr(feature, "feature", None)
    return [_name_labels(inner, one) for one in value] if isinstance(value, list) and inner is not None else value


def _undecoded(dataset: "datasets.Dataset", mapped: set[str | None]) -> "datasets.Dataset":
    """Return the data set with images as {bytes, path}, without media columns that are not mapped."""
    for name, feature in dataset.features.items():
        if not _holds_media(feature):
            continue
        if name in mapped:
            dataset = dataset.cast_column(name, _with_encoded_images(feature))
        else:
            dataset = dataset.remove_columns(name)
    return dataset


def _holds_media(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _holds_media(inner)
    if isinstance(feature, dict):
        return any(_holds_media(value) for value in feature.values())
    return hasattr(feature, "decode_example") and hasattr(feature, "decode")


def _with_encoded_images(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_with_encoded_images(feature.feature))
    raise UserError(f"A column of type {type(feature).__name__} holds no images.", hint="Set data.columns.image.")
