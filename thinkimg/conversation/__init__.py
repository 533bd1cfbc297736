"""Conversations: the protocol that turns are written in, the token stream, and the episode that joins the two."""
