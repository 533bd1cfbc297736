"""Extension of vLLM's worker, inside the server: weights are reloaded in place, tied ones included."""


class WeightLoader:
    """Mix-in of vLLM's worker class (--worker-extension-cls), called through /collective_rpc."""

    def load_model_dir(self, path: str) -> None:
        """Replace all weights by those of a saved model of the same architecture.

        On a CPU vLLM 0.32's reload_weights leaves out the head of a model with tied embeddings. Its matrix is packed
        once, at the server's start, and the checkpoint has nothing of its name that would pack it again.
        Log-probabilities were off by 1.9 after a reload. So the head is packed again here; elsewhere this does nothing.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.reload_weights(weights_path=path)
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
