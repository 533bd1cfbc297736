"""Texts of a record without what public data sets put around them, for the records of all schemas alike.

    row.make_row ──► tidy ──► golds          <answer>D</answer>, \\boxed{5}
                         ├──► placeholders   <image>
                         ├──► instructions   Answer with the option's letter …
                         └──► options        (A) red (B) blue
                                └──► literals    '{"A": "red", "B": "blue"}'

What may be read in two ways stays as it is.
"""
