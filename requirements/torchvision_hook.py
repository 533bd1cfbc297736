"""Hook that lets a CUDA build of torchvision be imported beside a CPU torch.

The registry's torchvision is a CUDA build. Beside a CPU torch its C++ library does not load, and `import torchvision`
stops at "operator torchvision::nms does not exist", although transformers, open_clip and vLLM need no more than its
Python half. Declaring the two operators that torchvision registers eagerly is enough, but has to happen in every
process, also in those that vLLM starts before any of its plugins. So this file lies in site-packages, as
_thinkimg_torchvision_hook, beside a `.pth` file that imports it when Python starts: a wheel holds both, for a clone
setup.sh copies them. All it does then is to add a finder to sys.meta_path (torch is not imported); the rest happens once
torchvision has tried to load its library itself, and only if that failed on a CPU torch. With a matching torchvision
nothing is changed.
"""

import sys

OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class Finder:
    """Meta-path finder that runs `declare_operators` right after `torchvision.extension` was executed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision.extension":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                declare_operators(module)

            spec.loader.exec_module = exec_module
        return spec


def declare_operators(extension):
    """Declare the operators (without a kernel: a call raises) if torchvision could not load its own on a CPU torch."""
    import torch

    if extension._has_ops() or torch.version.cuda is not None:
        return
    for name, signature in OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", signature)


def activate():
    """Add the finder to this process, once."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
