"""Puzzles of the demo: pictures cut from photographs, scripted conversations about them, pairs of known worth.

the model's tokens ──► geometry ──┐
                   photographs ──► scenes.make_puzzle ──► samples ──► stages/prepare
                                        │ solution
                                        ├──► demonstrations.write_script ──► stages/demonstrate
                                        ├──► demonstrations.has_right_calls ──► stages/evaluate
                                        └──► known_pairs ──► stages/known_pairs ──► the small CLIP, judges' calibration
"""
