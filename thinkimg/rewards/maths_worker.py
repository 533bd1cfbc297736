"""The child of maths.py: for each line [right answer, answer] one line [equal, reason or null].

It reads LaTeX with math-verify's own grammar. Its other reader, for plain expressions, is left out, for that is sympy's
parse_expr, which is eval; the grammar uses it as well, but for nothing else than numbers: see `close_eval`.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

SECONDS = 2.0
"""CPU time for one comparison: usual formulas take 0.001 to 0.3 s. CPU and not wall time, so that a busy machine decides
as an idle one does."""
MEMORY = 2 * 2**30


def close_eval() -> None:
    """Put in place of the eval inside of sympy's parse_expr what makes the same of a number, and refuses all else."""
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

    # By what it does and not by its version: users have several (seen with sympy 1.14).
    assert "eval_expr" in sympy_parser.parse_expr.__code__.co_names, "this sympy evaluates in another way"
    sympy_parser.eval_expr = eval_expr


def read(text: str) -> list[object]:
    """The formulas in a text: what stands between LaTeX's delimiters, or all of it; Python's ** is a power as well."""
    from math_verify import LatexExtractionConfig, parse

    text = " ".join(text.split()).replace("**", "^")
    delimited = any(mark in text for mark in ("$", r"\(", r"\[", r"\boxed"))
    # parsing_timeout=None: math-verify's own needs SIGALRM and cannot interrupt C code; ours is the kernel's.
    return parse(text if delimited else f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback",
                 parsing_timeout=None)  # fmt: skip


def compare(right: str, answer: str) -> tuple[bool, str | None]:
    from math_verify import verify
    from sympy.core.random import seed

    seed(0)  # sympy tries random numbers
    wanted, found = read(right), read(answer)
    if not wanted:
        return False, None  # the texts differ, and nothing else can be compared
    if not found:
        return False, "The answer is no formula."
    return bool(verify(wanted, found, timeout_seconds=None)), None


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process without asking Python
    logging.disable(logging.CRITICAL)  # it warns of the time-outs that are off
    close_eval()
    compare("x^2+1.5", "1.5+x^2")  # the imports and first use are nobody's CPU time
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        right, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        verdict = compare(right, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
