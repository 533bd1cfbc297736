"""Extension of vLLM's worker, inside the server: weights are reloaded in place, tied and widened ones included."""


class WeightLoader:
    """Mix-in of vLLM's worker class (--worker-extension-cls), called through /collective_rpc."""

    def load_model_dir(self, path: str) -> None:
        """Replace all weights by those of a saved model of the same architecture.

        On a CPU vLLM 0.32's reload_weights leaves out the head of a model with tied embeddings. Its matrix is packed
        once, at the server's start, and the checkpoint has nothing of its name that would pack it again.
        Log-probabilities were off by 1.9 after a reload. So the head is packed again here; elsewhere this does nothing.

        In bfloat16 a CPU's kernels take biases in float32. Those of the start were rounded first, those of a reload are
        not: the same weights gave log-probabilities 0.08 apart. So they are rounded here.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.reload_weights(weights_path=path)
        model, dtype = self.model_runner.get_model(), self.model_runner.model_config.dtype
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
