"""Start of a process that has Triton although vLLM is a CPU build: vLLM's Model Runner V2 then runs by its interpreter.

Found by Python through PYTHONPATH, in every process of a server.
"""

import importlib.abc
import importlib.machinery
import sys


class Finder(importlib.abc.MetaPathFinder):
    """Tells the module that looks for Triton that this is no CPU build, as long as it is imported."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "vllm.triton_utils.importing":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            import vllm.platforms

            tells = vllm.platforms.vllm_version_matches_substr
            vllm.platforms.vllm_version_matches_substr = lambda text: False
            try:
                run(module)
            finally:
                vllm.platforms.vllm_version_matches_substr = tells

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
