"""Reading of answers, the right ones of a data set and the model's by the same functions.

    prepare ──► right.read_right ──┐
                                   ├──► choices, numbers, boxes ──► text
    rewards/rules/answer ──────────┘

What `prepare` accepts as right the reward can read, and to the same value.
"""
