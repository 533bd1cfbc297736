"""What we add to vLLM's worker: reloading weights in place, tied ones included. Runs inside the server."""


class WeightLoader:
    """Mixed into vLLM's worker class by --worker-extension-cls; called through /collective_rpc."""

    def load_model_dir(self, path: str) -> None:
        """Replace all weights by those of a saved model of the same architecture.

        vLLM's reload_weights leaves the head of a model with tied embeddings behind on a CPU: the head's matrix is
        packed once, when the server starts, and the checkpoint holds nothing of its own name that would pack it again
        (seen with vLLM 0.32: log-probabilities were off by 1.9 after a reload). Packing it again is all that is
        missing; elsewhere it does nothing.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.reload_weights(weights_path=path)
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
