"""Repeat a call of a denoiser from some layer on: what ran before the layer gives what it gave.

To see what a change of one layer does to the output, everything after the layer has to run again,
but nothing before it. So a call is run once, and the outputs of the denoiser's blocks (modules that
have parts) are kept with the order in which blocks and layers ran. In a repetition each block that
had ended before the layer began returns what is kept. On average half of the work is left.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from msfp_cli.pipelines.denoiser import DenoiserCall, replay

REPEATED_SHARE = 0.5  # of a call that a repetition takes, averaged over the layers


class RepeatedCall:
    """A call that was run once, and can be run again from any layer on.

    Arguments:
        denoiser: nothing but the layers to repeat from may change as long as this is used.
        call: the call; its outputs of all blocks are kept in memory.
    """

    def __init__(self, denoiser: nn.Module, call: DenoiserCall) -> None:
        self.denoiser = denoiser
        self.call = call
        self._clock = count()
        self._begin: dict[str, int] = {}  # when each module began first
        self._end: dict[nn.Module, int] = {}  # when each block ended
        self._runs = Counter[nn.Module]()
        self._outputs: dict[nn.Module, Any] = {}
        self._versions: dict[nn.Module, list[int]] = {}
        with ExitStack() as hooks:
            for name, module in denoiser.named_modules():
                begin = partial(self._note_begin, name)
                hooks.callback(module.register_forward_pre_hook(begin).remove)
                if name and next(module.children(), None) is not None:
                    hooks.callback(module.register_forward_hook(self._note_end).remove)
            replay(denoiser, call)
        for block in [block for block in self._outputs if not self._is_repeatable(block)]:
            del self._outputs[block]

    def _note_begin(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._begin.setdefault(name, next(self._clock))

    def _note_end(self, block: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._runs[block] += 1
        self._end[block] = next(self._clock)
        self._outputs[block] = output
        self._versions[block] = _versions(output)

    def _is_repeatable(self, block: nn.Module) -> bool:
        """Whether a block ran once, by its class's forward, and its output was left as it was."""
        return (
            self._runs[block] == 1
            and "forward" not in vars(block)
            and self._versions[block] == _versions(self._outputs[block])
        )

    def from_layer(self, name: str) -> Tensor:
        """Run the call again from a layer on, and return the denoiser's output."""
        begin = self._begin.get(name, next(self._clock))
        with ExitStack() as undo:
            for block, output in self._outputs.items():
                if self._end[block] < begin:
                    undo.enter_context(_answering(block, output))
            return replay(self.denoiser, self.call)


@contextmanager
def _answering(block: nn.Module, output: object) -> Iterator[None]:
    """Let a block return an output without running."""
    vars(block)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del vars(block)["forward"]


def _versions(output: object) -> list[int]:
    """Return how often each tensor of an output was written to."""
    return [tensor._version for tensor in tensors_of(output)]


def tensors_of(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a tree of arguments or outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)
