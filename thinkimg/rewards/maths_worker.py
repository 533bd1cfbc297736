"""Child process of maths.py: answers each line [right answer, answer] with a line [equal, reason or null].

It parses LaTeX with math-verify's grammar. math-verify's parser of plain expressions is left out, for it is sympy's
parse_expr, which is eval. The grammar calls parse_expr too, but for numbers only: see `close_eval`.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

from thinkimg.answers.formulas import SIDE_BY_SIDE, sum_mixed

SECONDS = 2.0
"""CPU time for one comparison: usual formulas take 0.001 to 0.3 s. CPU and not wall time, so that a busy machine
decides as an idle one does.
"""
MEMORY = 2 * 2**30


def close_eval() -> None:
    """Replace the eval inside sympy's parse_expr by a function that accepts numbers only."""
    import sympy.physics.units  # noqa: F401  (simplify imports it, and it evaluates its own names)
    from sympy import Float, Integer
    from sympy.parsing import sympy_parser

    def eval_expr(code: str, local_dict: dict[str, object], global_dict: dict[str, object]) -> Integer | Float:
        integer = re.fullmatch(r"Integer \(([0-9]+) \)", code)
        if integer:
            return Integer(int(integer[1]))
        decimal = re.fullmatch(r"Float \('([0-9.]+)' \)", code)
        if decimal:
            return Float(decimal[1])
        raise ValueError("not a number")

    # Checked by behaviour and not by version, for users have several (seen with sympy 1.14).
    assert "eval_expr" in sympy_parser.parse_expr.__code__.co_names, "this sympy evaluates in another way"
    sympy_parser.eval_expr = eval_expr


def parse_formulas(text: str) -> list[object]:
    """Return the formulas in a text: those between LaTeX's delimiters, or all of it. Python's ** is a power, too.

    2 2/3 is a mixed number. Other numbers side by side are no formula, for the grammar would multiply them.
    """
    from math_verify import LatexExtractionConfig, parse

    text = sum_mixed(" ".join(text.split()).replace("**", "^"))
    if "\\" not in text and SIDE_BY_SIDE.search(text):
        return []
    delimited = any(mark in text for mark in ("$", r"\(", r"\[", r"\boxed"))
    # parsing_timeout=None: math-verify's own needs SIGALRM and cannot interrupt C code; ours is the kernel's.
    latex = text if delimited else f"${text}$"
    return parse(latex, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)


def verify_pair(right: str, answer: str) -> tuple[bool, str | None]:
    """Return whether an answer equals the right one, and the reason if nothing was compared."""
    from math_verify import verify
    from sympy.core.random import seed

    seed(0)  # sympy tries random numbers
    wanted, given = parse_formulas(right), parse_formulas(answer)
    if not wanted:
        return False, None  # the texts differ, and nothing else can be compared
    if not given:
        return False, "The answer is no formula."
    return bool(verify(wanted, given, timeout_seconds=None)), None


def main() -> None:
    """Answer each line of standard input."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process without asking Python
    logging.disable(logging.CRITICAL)  # it warns of the time-outs that are off
    close_eval()
    verify_pair("x^2+1.5", "1.5+x^2")  # imports and first use count for no comparison
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        right, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        verdict = verify_pair(right, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
