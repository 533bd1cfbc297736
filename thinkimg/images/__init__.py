"""Images: safe decoding, the model's view of them, coordinates, and the tools that change them.

    bytes ──► decode ──► image at full resolution ──► view (resized for the model) ──► patches (its tokens)
                             │        ▲                  │
                             ▼        │                  ▼
    a call ──► toolbox.run_tool ──► tools/*.apply ◄── coordinates.Frame (the model's ──► pixels at full resolution)

`tool` defines a tool's arguments and errors; `toolbox` finds tools by name and carries out calls of them.
"""
