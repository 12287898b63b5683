"""What torch's engine is doing: whether a ``backward()`` runs, which one, and what it is for."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

__all__ = ["Backward", "accumulates", "in_backward"]


class Backward:
    """Held by a ``backward()`` until its end, and called there unless it fails."""

    over = False

    @classmethod
    def begun(cls) -> "Backward":
        """For the one that is running."""
        backward = cls()
        torch.autograd.Variable._execution_engine.queue_callback(backward)
        return backward

    def __call__(self) -> None:
        self.over = True


def in_backward() -> bool:
    """Whether this thread is in one."""
    return torch._C._current_graph_task_id() != -1


def accumulates(params: Iterable[Tensor]) -> bool:
    """Whether ``.grad`` is about to be added to, so that it is not ``torch.autograd.grad()``.

    Args:
        params: whose ``.grad`` is meant; called in a hook on a gradient.
    """
    node = torch._C._current_autograd_node()
    if node is None or _is_executed(_nearest_end(node)):
        return True
    # backward(inputs=...) reaches some parameters only.
    leaves = (get_gradient_edge(p).node for p in params if p.requires_grad)
    return any(map(_is_executed, leaves))


def _nearest_end(node: Node) -> Node:
    """What is computed last, on some short way from ``node``: the gradient of a leaf."""
    seen, layer = {node}, [node]
    while True:
        following: list[Node] = []
        for one in layer:
            functions = [function for function, _ in one.next_functions if function is not None]
            if not functions:
                return one
            following += functions
        layer = [function for function in dict.fromkeys(following) if function not in seen]
        seen.update(layer)


def _is_executed(node: Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what torch.autograd.grad() returns, rather than adding it to .grad
        return False
