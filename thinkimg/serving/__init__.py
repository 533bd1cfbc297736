"""Endpoint in the form of OpenAI's chat completions, behind which the policy plays its tool loop.

    POST /v1/chat/completions ──► app ──► body.read_body ──► Question ──► service.prepare ──► Episode
                                   │                                         └─ pictures.PictureReader
                                   ▼
                 reply (JSON, SSE) ◄── Turn, Turn, … ◄── engine.play.play_episode ──► keeper.EngineKeeper ──► vLLM

The conversation is the one of training and evaluation: the same core, prompts and tools. A client sees its answer
alone; turns and pictures come beside it.
"""
