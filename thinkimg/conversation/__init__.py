"""Conversations: the protocol of turns, the token stream, and the episode that joins the two.

    sample, pictures ──► Episode ──prompt_ids, view_images──► engine
                          ▲   │ ▲                               │
                          │   │ └───────────── feed(tokens) ◄───┘
              observe(outcome)│
                          │   ▼
          images/toolbox ◄── PendingCall          trajectory() ──► records.Trajectory

protocol.py parses and writes the text of a turn, and codec.py turns text into token ids. tokens.py holds the stream of
tokens, picture.py an image with the view that the model sees. regions.py finds the region that a tool's image shows.
compare.py holds the prompt by which judges compare two images, template.py writes the chat template of an export.
Nothing here does I/O.
"""
