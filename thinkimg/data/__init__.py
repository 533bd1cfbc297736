"""Where questions and pictures come from: public data sets, a user's own files, and the built-in puzzles."""
