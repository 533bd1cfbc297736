"""The protocols: one file per way of writing a turn, named like the value of `conversation.protocol`.

Such a file defines `PROTOCOL`, an instance of a subclass of protocol.Protocol. What the model writes is parsed, never
evaluated. A turn that does not parse is answered with a sentence that tells the model how to correct it.

    sampled text ──► PROTOCOL.parse ──► ToolCall | Answer | Malformed ──► Episode ──► PROTOCOL.observation ──► tokens

A user's own is such a module elsewhere: `conversation.protocol: my_project.protocols.mine`, or an entry point of the
group `thinkimg.protocols`.
"""
