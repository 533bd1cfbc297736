"""Reading of answers, the right ones of a data set and the model's by the same functions.

    prepare ──► right.read_right ──┐
                                   ├──► choices, numbers, boxes, similarity ──► text
    rewards/rules/answer ──────────┤
                                   └──► formulas
    rewards/maths ───────────────────────┘

What `prepare` accepts as right the reward can read, and to the same value.
"""
