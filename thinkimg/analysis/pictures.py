"""Pictures of stored conversations: as they were kept, or made again by the tools' calls where none were kept."""

from PIL.Image import Image, new

from thinkimg.analysis.verify_calls import replay_calls
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.images.settings import ViewLimits
from thinkimg.images.toolbox import load_tools
from thinkimg.records import Sample, Trajectory
from thinkimg.store.kinds import Dataset, Episodes
from thinkimg.tracking.trace_data import usable_tools

GREY = (128, 128, 128)
"""Colour of the images that a blind evaluation shows."""


class Pictures:
    """Pictures of the conversations of one artifact. An evaluation keeps none that tools made: their calls run again.

    tools: `conversation.tools` of the rows; none if a user's own is not on this machine, so that no boxes are drawn.
    """

    def __init__(self, episodes: Episodes, dataset: Dataset) -> None:
        self._episodes, self._table = episodes, episodes.images(dataset)
        self.tools = usable_tools(episodes)

    def of(self, row: Trajectory, sample: Sample) -> dict[str, Image]:
        """Return pixel hash -> RGB image at full resolution, of all images of a conversation.

        Raises UserError where one is not stored and can't be made again.
        """
        stored = {sha256: self._table.decoded(sha256) for sha256 in row.images if sha256 in self._table}
        return stored if set(stored) == set(row.images) else self._make_again(row, sample)

    def _make_again(self, row: Trajectory, sample: Sample) -> dict[str, Image]:
        limits = ViewLimits(**self._episodes.manifest["recipe"]["config"]["images"])
        pictures = [self._table.decoded(sha256) for sha256 in sample.images]
        for _, turn, result in replay_calls(row, pictures, limits, load_tools(self._episodes.tools)):
            if turn.image is None:
                continue
            image = result.image
            if image is not None and pixel_hash(image) != turn.image:  # a blind evaluation
                image = new("RGB", image.size, GREY)
            if image is None or pixel_hash(image) != turn.image:
                raise UserError(
                    f"The call {turn.tool} of {row.trajectory_id} does not give the image that it gave.",
                    hint=f"See `thinkimg artifacts verify {self._episodes.reference}`.",
                )
            pictures.append(image)
        return dict(zip(row.images, pictures, strict=True))
