"""For tests on machines without a GPU: PyPI's torchvision is a CUDA build, whose operators a CPU build of torch has to be told of before it
is imported. Costs nothing in a process that never imports it."""

import sys
from importlib.abc import MetaPathFinder


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; it is asked in time."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import Library

            self.library = Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            kept.append(self)


kept = []
sys.meta_path.insert(0, _BeforeTorchvision())
