"""Where questions and pictures come from: public data sets and a user's own files."""
