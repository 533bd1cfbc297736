"""Chat: several messages of a user with the policy's replies between them, in place of a sample."""

from collections.abc import Sequence
from dataclasses import dataclass

from thinkimg.conversation.protocol import IMAGE_PART, Answer, Content, Protocol, text_part
from thinkimg.conversation.question import state_size
from thinkimg.records import Coordinates


@dataclass(frozen=True)
class Message:
    """One message of a user: its text, and the number of pictures that come before it."""

    text: str
    images: int = 0


@dataclass(frozen=True)
class Chat:
    """Conversation of a user so far; its last message waits for an answer.

    sample_id: name of its content, which enters the sampling seeds. images: content hashes of all messages' pictures,
    in order. replies: the answers to all messages but the last, as the user has seen them.
    """

    sample_id: str
    images: tuple[str, ...]
    messages: tuple[Message, ...]
    replies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.messages) == len(self.replies) + 1, "the last message has no reply yet"
        assert sum(message.images for message in self.messages) == len(self.images), "each picture is one message's"

    def contents(self, sizes: Sequence[tuple[int, int]], coordinates: Coordinates) -> list[Content]:
        """Return the messages as the model sees them: pictures, then their sizes and the text.

        sizes: (width, height) in pixels at which the model sees each picture. Pictures are numbered through the chat.
        """
        contents: list[Content] = []
        number = 0
        for message in self.messages:
            after = number + message.images
            statements = [state_size(i, sizes[i], coordinates) for i in range(number, after)]
            contents.append([*[IMAGE_PART] * message.images, text_part(" ".join([*statements, message.text]))])
            number = after
        return contents

    def turns(self, protocol: Protocol) -> list[str]:
        """Return the replies as turns of a protocol, without the thoughts that led to them.

        A reply that can be no answer in that protocol, as it holds its tags, stays as it is.
        """
        turns = [f"{protocol.render_thought('')}<answer>{reply}</answer>" for reply in self.replies]
        return [
            turn if isinstance(protocol.parse(turn), Answer) else reply
            for turn, reply in zip(turns, self.replies, strict=True)
        ]
