"""Functions of the task: what lmms-eval shows, what its log calls a question, and when an answer is right."""


def show_images(doc) -> list:
    """Return the pictures of a question, as PIL images."""
    return [image.convert("RGB") for image in doc["images"]]


def name_sample(doc) -> str:
    """Return the id of a question: it is the `target` of lmms-eval's log."""
    return doc["sample_id"]


def compare(doc, results) -> dict[str, float]:
    """Return 1 where the answer is one of the right ones, letter case and white space around aside; else 0."""
    answer = results[0].strip().casefold()
    return {"exact_match": float(answer in {right.strip().casefold() for right in doc["answers"]})}
