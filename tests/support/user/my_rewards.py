"""A reward function as a user would write one: TRL's signature, nothing of thinkimg."""


def brevity(completions, **columns):
    """1 for an empty completion, falling with its length.

    Varies within any group, so that every group can be learnt from.
    """
    texts = ["".join(message["content"] for message in turn if message["role"] == "assistant") for turn in completions]
    return [1 / (1 + len(text) / 50) for text in texts]
