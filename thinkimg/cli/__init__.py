"""The command line: main.py has the stages and the loop, artifacts.py the store, scores.py what became of rewards."""
