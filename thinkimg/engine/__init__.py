"""vLLM: `server` starts it as a child process, `client` talks to any number of servers, tokens in and tokens out.

Nothing here keeps state between calls but the servers themselves. Prompts are compact (one image pad per image); which
pictures a prompt shows is told by uuid, the hash of the pixels that the model sees. What weights a server holds is
told by a version string that only `EngineClient.load_weights` changes, or by the name of an adapter.
"""
