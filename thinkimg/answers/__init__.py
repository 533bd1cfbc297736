"""Reading of answers, the right ones of a data set and the model's by the same functions.

    data/row ──► kinds.guess_type
    data/row, data/checks ──► right.read_right, can_be_right ──┐
    rewards/rules/answer ──────────────────────────────────────┼──► compare ──► choices, numbers, boxes, exact, votes,
    rewards/maths ──► formulas ────────────────────────────────┘               similarity ──► text

What `prepare` accepts as right the reward can read, and to the same value.
"""
