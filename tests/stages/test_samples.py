"""Samples: whatever takes some of many draws them by a seed, and a smaller draw is a part of a larger one."""

import ast
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import REPOSITORY

from thinkimg.config.load import load_config
from thinkimg.data import split
from thinkimg.data.split import draw
from thinkimg.records import AnswerType, Sample
from thinkimg.stages import evaluate, known_pairs, rollout

ROWS = 200


def sample(number: int) -> Sample:
    answer = "yes" if number < ROWS // 2 else "no"
    return Sample(
        f"row {number}", "?", (answer,), AnswerType.TEXT, (), ("ab" * 32,), "t", "held_out", {"family": "dark"}
    )


SORTED = [sample(number) for number in range(ROWS)]


class Sorted:
    """A data set whose rows are sorted by answer, and all else that a stage asks of its job."""

    digest = "d" * 64

    def split(self, name):
        return SORTED


class Caught(Exception):
    """Ends a stage once it has drawn its samples."""


def drawn_by_evaluate(count, monkeypatch):
    def catch(job, samples, *_, **__):
        raise Caught(samples)

    monkeypatch.setattr(evaluate, "play_parts", catch)
    settings = evaluate.settings_of(CONFIG, samples=count)
    return caught(evaluate.run, settings)


def drawn_by_pairs(count, monkeypatch):
    monkeypatch.setattr(known_pairs, "ImageTable", lambda artifacts: type("Images", (), {"decoded": None})())

    def catch(samples, *_, **__):
        raise Caught(samples)

    monkeypatch.setattr(known_pairs, "make_known_pairs", catch)
    return caught(known_pairs.run, known_pairs.settings_of(CONFIG, count=count))


def drawn_by_rollout(count, monkeypatch):
    return rollout.draw_samples(SORTED, count, 1, 0)


def caught(run, settings):
    job = type("Job", (), {"settings": settings, "inputs": {"dataset": Sorted()}, "work": None})()
    with pytest.raises(Caught) as info:
        run(job)
    return info.value.args[0]


CONFIG = load_config("tiny")
DRAWS = (drawn_by_evaluate, drawn_by_pairs, drawn_by_rollout)


@pytest.mark.parametrize("drawn", DRAWS)
def test_of_rows_sorted_by_their_answers_every_draw_has_both(drawn, monkeypatch):
    """The handed case: 10, 20 or 30 of rows of which the first hundred say yes."""
    before: set[str] = set()
    for count in (10, 20, 30, 100, ROWS, 10 * ROWS):
        found = drawn(count, monkeypatch)
        answers, names = Counter(row.answer for row in found), {row.sample_id for row in found}
        assert len(found) == len(names) == min(count, ROWS) and before <= names
        assert min(answers["yes"], answers["no"]) >= 0.2 * len(found)
        before = names


@given(st.integers(1, 120), st.integers(0, 130), st.integers(0, 130), st.integers(0, 3))
def test_draws_are_nested_in_order_and_every_row_is_as_likely(count, one, other, seed):
    rows = SORTED[:count]
    small, large = sorted((one, other))
    inner, outer = draw(rows, small, seed, "x"), draw(rows, large, seed, "x")
    assert len(inner) == min(small, count) and set(map(id, inner)) <= set(map(id, outer))
    assert outer == [row for row in rows if row in outer]
    assert outer == draw(rows[::-1], large, seed, "x")[::-1], "the order of the rows has no influence"


def test_every_row_is_as_likely():
    times = Counter(row.sample_id for seed in range(300) for row in draw(SORTED, 50, seed, "x"))
    counts = np.array([times[row.sample_id] for row in SORTED])
    assert abs(counts - 75).max() < 5 * np.sqrt(300 * 0.25 * 0.75)


PREFIXES = {
    # what it is, if it is no sample of rows
    "lengths[:WINDOW]": "the first iterations, by their meaning",
    "results[:count]": "sorted: the best, and the caption says of how many",
    "ids[:EXAMPLES]": "names in a hint, which says how many more there are",
    "rows[:MAX_ROWS]": "sorted: the largest, and the caption says of how many",
    "rank([sample.sample_id for sample in samples], seed, purpose)[:count]": "the draw itself",
    "looks.good(order)[:self.counts[side]]": "drawn by the same ranks",
    "[id for id in train if id not in shared][:self.counts[split.TRAIN]]": "drawn by the same ranks",
    "rank((row['sample_id'] for row in rows), dataset.manifest['seed'] or 0, 'shown')[:count]": "of ranks",
    "end[:most]": "the last parts of a path",
    "one[:most]": "the last parts of a path",
    "islice(kept, wanted)": "of rows that a table drew",
    "[0][:count]": "a table of one row",
    "records[:count]": "form of a file",
    "order[:min(max(round(share * len(order)), 1), len(order) - 1)]": "of ranks",
    "queue[:count]": "of a permutation",
    "rows[:count + len(chosen)]": "sorted by hash",
    "list(chosen.items())[:count]": "by rank of their reasons, then by hash",
    "[*self._parts.values()][:count]": "what is closed of a work",
    "changes['rows'][:MAX_ROWS]": "in the order of the data, and the caption says of how many",
    "ids[:limit]": "tokens of an answer that is shown",
    "islice(trajectories, ROWS)": "batch after batch, all of them",
    "messages[:count]": "of one conversation",
    "completion[:number]": "of one conversation",
    "core.turns[:shown]": "of one conversation",
    "core.pictures[:len(core.pictures) - sum((turn.image is not None for turn in withheld))]": "of one conversation",
    "texts[:count]": "of one conversation",
    "sorted(group, key=lambda row: len(row.conversation.tokens))[:TRIED]": "the cheapest, on purpose",
    "[i for i in order if i not in chosen][:wanted - len(chosen)]": "of a permutation",
    "np.random.default_rng(0).permutation(len(rows))[:ROWS]": "of a permutation",
    "pool[:batch]": "of a permutation",
    "islice((artifact for artifact in newest if not of_rollouts(artifact)), RECENT)": "the newest, by their meaning",
    "islice(jobs, SAMPLES_PER_PART)": "one part after the other, all of them",
    "islice(read(), PEEK)": "form of a file",
    "islice(read_json_lines(path), PEEK)": "form of a file",
    "entries[:middle]": "halves, both of them",
    "ids[:budget]": "tokens of one turn",
    "plain[:match.start()]": "of a text",
    "plain[:word.start()]": "of a text",
    "islice(file, dialect.skipped, None)": "lines before the headings are left out, and none behind them",
    "value[:MAX_TURN]": "of a text",
    "rest[:MAX_LENGTH]": "of a text",
    "tail[:series[0].start]": "of a text",
    "question[:low]": "of a text",
    "text[:length].replace('\\r\\n', '\\n').split('\\n')[:lines]": "of a text, for people",
    "islice(value.items(), MAX_VALUES)": "of one record, for people",
    "islice(names, most)": "names in a sentence, which says how many more there are",
    "lines[:most]": "lines for people, of which the last one says how many more there are",
    "names[:len(parts) - 1]": "names of objects in one row",
    "values[:count]": "columns of one row",
    "filled[:count]": "columns of one row",
    "self._archives[:MAX_ARCHIVES]": "files beside a table, and a sentence says where there are more",
    "islice(decode_runs(_exactly(body, int.from_bytes(_exactly(body, 4), 'little')), limit.bit_length()), count)": (
        "of one page, as its header says"
    ),
    "piece[:length - len(piece)]": "bytes of a stream",
    "islice(sorted(complete, key=finished, reverse=True), RECENT)": "the newest, by their meaning",
    "np.hanning(2 * TAPER)[:TAPER]": "pixels",
}
SHOWN = {"SHOWN", "MAX_KINDS", "MAX_COLUMNS", "MAX_VALUES"}
"""Limits of names in a sentence or a table for people, which says how many more there are."""
ONE_ROW = {"path", "text", "turn", "key", "stem", "parts", "tokens", "images", "sizes", "asked", "general"}
"""Names whose beginnings are those of one text or list of tokens, not of rows."""


def test_no_beginning_of_a_list_is_taken_for_a_sample():
    """Every slice and islice from the start to a length that the code computes: drawn, or known to be no sample."""
    unknown = {}
    for path in sorted((REPOSITORY / "thinkimg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (text := beginning(node)) and text not in PREFIXES:
                unknown[text] = path.name
    assert unknown == {}, "draw with thinkimg.data.split.draw, or say in PREFIXES why it is no sample"


def beginning(node: ast.AST) -> str | None:
    """Return the code of a beginning whose length is no constant, of what may be rows; None for other nodes."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("islice", "head"):
        return ast.unparse(node)
    if not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice)):
        return None
    bounds = node.slice
    if bounds.lower or bounds.step or bounds.upper is None or isinstance(bounds.upper, ast.Constant | ast.UnaryOp):
        return None
    name = getattr(node.value, "id", getattr(node.value, "attr", ""))
    return None if name in ONE_ROW or getattr(bounds.upper, "id", "") in SHOWN else ast.unparse(node)


def test_the_split_itself_is_drawn_by_the_same_ranks():
    names = [row.sample_id for row in SORTED]
    assert split.rank(names, 0, "taken")[:30] == split.rank(names[::-1], 0, "taken")[:30]
