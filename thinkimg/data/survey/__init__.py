"""Survey of a source's rows: what is wrong with them, which are held out, which are taken.

stages/prepare ──► survey ──► passes   texts of all rows, pictures of those that are drawn
                          ├──► draw    groups, sides and ranks
                          ├──► checks ──► oddity (refused, asked or said), box_checks ──► box_forms, advice
                          └──► samples
stages/prepare ──► benchmarks (pictures of benchmarks in the store)
"""
