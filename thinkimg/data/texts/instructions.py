r"""Instructions on the form of an answer, which public sets append to their questions.

Our prompt says the form itself, for each type of answer; theirs would contradict it: "Put your answer in \boxed{}."
"""

import re

_ANSWER = r"(?:please\s+)?(?:(?:try\s+to|only|just|directly)\s+)*(?:answer|respond|reply)\b"
_GIVE = r"(?:put|write|enclose|provide|give|present|output|place|include|wrap|return|indicate|choose|select|state|pick)"
_REST = r"(?:[^\n.?!:]|e\.g\.|i\.e\.|\.\.\.){0,120}"
_OF_OPTION = (
    r"(?:(?:option|choice|answer)(?:['’]?s)?['’]?\s+letters?|letters?\s*\([A-J]\b"
    r"|letters?\s+(?:of|for|from|corresponding\s+to)\s+(?:the\s+|your\s+)?(?:(?:given|correct|right|best|chosen)\s+)*"
    r"(?:option|choice|answer)s?|letters?\s+(?:only|directly|alone)|stating\s+the\s+letter\s+followed)\b"
    r"(?::\s*(?:[A-J]\b[\s,/]*(?:or\s+)?){2,10})?"
)
_TAG = r"(?:\\boxed\b|<answer>|<think>)"
SENTENCES = (
    # Answer with the option's letter from the given choices directly. Respond with only the letter (A, B, C, or D) …
    rf"(?:{_ANSWER}|(?:please\s+)?(?:(?:only|just)\s+)?{_GIVE}\b)[^\n.?!:]{{0,80}}?{_OF_OPTION}{_REST}",
    # Answer the question using a single word or phrase. Please answer directly with a single word or phrase.
    rf"{_ANSWER}[^\n.?!:]{{0,60}}?\b(?:single|one|short|few)\s+(?:words?|phrases?|sentences?|numbers?)\b{_REST}",
    rf"{_ANSWER}(?:\s+(?:the|this)(?:\s+following)?\s+question)?(?:\s+(?:briefly|concisely|directly|shortly))+",
    r"(?:please\s+)?(?:give|provide)\s+(?:a|only\s+a|your)\s+(?:short|brief|concise)\s+answer",
    # Select the best answer to the above multiple-choice question based on the image.
    rf"(?:please\s+)?(?:select|choose|pick)\s+(?:only\s+)?(?:the|one)\s+(?:(?:most|single)\s+)?"
    rf"(?:correct|best|right|appropriate|suitable)\s+(?:answer|option|choice)\b{_REST}",
    rf"(?:please\s+)?(?:answer|select|choose|pick)\s+(?:one\s+)?(?:(?:option|answer)\s+)?from\s+(?:the\s+)?"
    rf"(?:(?:above|given|following|provided|listed)\s+)?(?:options|choices|candidates)\b{_REST}",
    # Your response should be just the letter.
    rf"your\s+(?:final\s+)?(?:answer|response)\s+(?:should|must)\s+be\s+(?:(?:just|only)\s+)?(?:the|a|one)\s+"
    rf"(?:(?:single|correct|option)\s+)*(?:letter|word|number|option)\b{_REST}",
    # Reasoning, tags and boxes.
    r"first\s+perform\s+reasoning,\s*then\s+finally\s+select\b[^\n]{0,150}?xxx",
    r"you\s+(?:must\s+)?first\s+think\s+about\s+the\s+reasoning\s+process" + _REST,
    rf"the\s+(?:reasoning|thinking)\s+process(?:\s+and\s+(?:the\s+)?answer)?\s+(?:must\s+be|should\s+be|is|are)\b{_REST}",
    rf"the\s+(?:final\s+)?answer\s+(?:must|should)\s+be\s+(?:put|written|placed|enclosed|given)\b{_REST}",
    rf"(?:let['’]s\s+|please\s+)?(?:think|reason)(?:\s+about\s+it)?\s+step[\s-]by[\s-]step\b{_REST}",
    rf"(?:first\s+)?(?:please\s+)?output\s+(?:the|your)\s+(?:thinking|reasoning)\s+process\s+in\b{_REST}",
    rf"(?:please\s+)?(?:and\s+)?{_GIVE}\s+(?:your|the)\s+(?:(?:final|short)\s+)?(?:answer|choice|result|option)\b"
    rf"[^\n.?!:]{{0,80}}?{_TAG}{_REST}",
    rf"think\s+first,\s*call\s+\**\w+\**\s+if\s+needed,\s*then\s+answer{_REST}",
    r"format\s+strictly\s+as:\s*<think>[^\n]{0,300}</answer>",
    r"hint:\s*please\s+(?:answer|solve)\b[^\n]{0,300}?at\s+the\s+end",
    r"#+\s*user\s+image\s+(?:path|size)\b[^\n]{0,400}",
)
"""Sentences that say how to answer, at the start or the end of a question; each without its full stop."""
LEAD_INS = (
    r"(?:the\s+)?(?:(?:best|correct|right|final)\s+)?answer\s*(?:is\s*[:：]?|[:：])",
    r"your\s+answer\s*(?:is\s*)?[:：]",
)
"""Beginnings of the answer, at the end of a question."""
SUFFIX = re.compile(
    r"(?:\A|(?<=[\n.?!:;)\]>。？！：…\"”])|(?<=\s)(?=(?-i:[A-Z#])))\s*"
    rf"(?:{'|'.join((*SENTENCES, *LEAD_INS))})[\s.!:*。：]*\Z",
    re.IGNORECASE,
)
PREFIX = re.compile(rf"\s*(?:{'|'.join(SENTENCES)})\s*(?:[.:!\n]+|(?=\n))\s*", re.IGNORECASE)
LABEL = re.compile(r"\s*(?:#{1,6}\s*|\*\*)?question(?:\*\*)?\s*[:：](?:\*\*)?\s*", re.IGNORECASE)
HINT = re.compile(
    r"answer|respon|reply|letter|select|choose|pick|think|reason|output|user image|boxed|put|state|give|provide",
    re.IGNORECASE,
)
"""Words that each instruction has one of: a quick look before the long one."""
ASKS = re.compile(r"\b(?:what|which|who|whose|where|when|why|how)\b", re.IGNORECASE)
"""Words of a question: "Answer in one word what the sign says." is no mere instruction."""
MAX_LENGTH = 800  # characters of an instruction
MAX_SENTENCES = 8  # instructions on each side of a question


def remove_instructions(question: str) -> str:
    """Return a question without instructions on the form of the answer around it; one of nothing else as it is."""
    start, end = 0, len(question.rstrip())
    for _ in range(MAX_SENTENCES):
        low = max(end - MAX_LENGTH, start)
        suffix = SUFFIX.search(question, low, end) if HINT.search(question, low, end) else None
        if suffix is None or suffix.start() == end or ASKS.search(suffix[0]):
            break
        end = suffix.start()
    for _ in range(MAX_SENTENCES):
        high = min(start + MAX_LENGTH, end)
        prefix = PREFIX.match(question, start, high) if HINT.search(question, start, high) else None
        label = prefix or LABEL.match(question, start, high)
        if label is None or ASKS.search(label[0]):
            break
        start = label.end()
    rest = question[start:end].strip()
    return rest if any(map(str.isalnum, rest[:MAX_LENGTH])) else question
