"""vLLM: servers, their client, and the sampling of conversations with them, tokens in and tokens out.

    stages/rollout ──► play.Sampler ──► client.EngineClient ──HTTP──► server.Server (vLLM, a child process)
                         │    ▲               ▲                         └─ worker.WeightLoader, inside vLLM
                         ▼    └── media.Media │
                conversation.Episode    rewards/judges/self

Prompts are compact: one image pad per image, and each image is named by its uuid, the hash of the pixels that the model
sees. A server's weights are named by a version, which only `EngineClient.load_weights` changes, or by an adapter's
name. Nothing here keeps state between calls but the servers.
"""
