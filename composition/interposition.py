"""Answer a module's calls from outside of all else that acts on it."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn

from studio.errors import CompositionError

# Where torch's ``Module.__call__`` goes first, if there is something: past ``forward`` and the hooks.
_PLACE = "_compiled_call_impl"


class Interposition:
    """Has a function answer the calls of a module for the length of a ``with`` block.

    It stands before the module's hooks, its ``forward`` and what ``Module.compile`` made of them. So what
    wraps ``forward`` and puts it back, such as the hooks of accelerate and diffusers for offloading, may come
    and go meanwhile, and dynamo does not trace the function. The module's own hooks run at each evaluation.

    Args:
        module: Of torch, or what ``torch.compile`` returns.
        answer: Given the arguments of each call.
    """

    def __init__(self, module: nn.Module, answer: Callable[..., Any]) -> None:
        self._module = module
        self._answer = answer
        self._compiled: Callable[..., Any] | None = None

    def check_uncompiled(self, what: str) -> None:
        """Raise CompositionError, beginning with what cannot be done, if the whole module is compiled."""
        if self._compiled is not None or hasattr(self._module, "_orig_mod"):
            raise CompositionError(
                f"{what} of a compiled UNet. Compose on the pipeline before it is compiled, or choose "
                "another method."
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module itself answers."""
        return (self._compiled or self._module._call_impl)(*args, **kwargs)

    def attach(self) -> None:
        """Stand before the module, again if it was compiled in place since."""
        own = vars(self._module)
        if own.get(_PLACE) is not self._answer:
            self._compiled = own.get(_PLACE)
            own[_PLACE] = self._answer

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own = vars(self._module)
        if own.get(_PLACE) is self._answer:
            del own[_PLACE]
            if self._compiled is not None:
                own[_PLACE] = self._compiled
