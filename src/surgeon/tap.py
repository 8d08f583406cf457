"""Look into a forward pass, or change it: the only place that registers hooks.

    with Tap() as tap:
        tap.on_input(down, lambda x: ...)          # see it; return a tensor to replace it, None to
        leave it tap.on_output(block, lambda y: ...) tap.stop_after(block)                      #
        the pass ends here tap.run(model, input_ids=ids)

    entry = capture(model, layers, 3, input_ids=ids)
    with resume(layers, entry):                    # layers 0..2 are skipped
        model(input_ids=ids, use_cache=False)

On any exit, also by exception, the hooks are gone and the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

Watcher = Callable[[Tensor], Tensor | None]


class _Stop(Exception):
    """Raised inside a forward pass by `stop_after`; never leaves `Tap.run`."""


def first_tensor(value: Any) -> Tensor:
    """The hidden states in what a module returned: the tensor itself, or the first tensor of a
    tuple.

    Decoder layers return either, by version and model.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return value[0]
    raise TypeError(
        f"expected a tensor or a tuple that begins with one, got {type(value).__name__}"
    )


def by_position(value: Tensor, batch: int) -> Tensor:
    """Hidden states as (batch, pos, channels), a view; some architectures (OPT) hand them to their
    MLP as (batch * pos, channels).
    """
    return value.view(batch, -1, value.shape[-1])


def _with_first(value: Any, new: Tensor) -> Any:
    return new if isinstance(value, Tensor) else (new, *value[1:])


class Tap:
    """Hooks with a lifetime. Register inside the `with` block; they end with it."""

    def __init__(self) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_input(self, module: nn.Module, watch: Watcher) -> None:
        """Call `watch(x)` with the hidden states that enter `module`; a tensor it returns takes
        their place.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # decoder layers receive their hidden states by position or by keyword, depending on the
            # model
            if args:
                new = watch(first_tensor(args[0]))
                return None if new is None else ((new, *args[1:]), kwargs)
            new = watch(first_tensor(kwargs["hidden_states"]))
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, module: nn.Module, watch: Watcher) -> None:
        """Call `watch(y)` with the hidden states that leave `module`; a tensor it returns takes
        their place.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            new = watch(first_tensor(output))
            return None if new is None else _with_first(output, new)

        self._handles.append(module.register_forward_hook(hook))

    def on_call(self, module: nn.Module, watch: Callable[[tuple[Any, ...]], None]) -> None:
        """Call `watch(args)` with all positional arguments of `module`; for modules that take more
        than hidden states.
        """

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            watch(args)

        self._handles.append(module.register_forward_pre_hook(hook))

    def stop_after(self, module: nn.Module) -> None:
        """End the pass once `module` has returned; its other watchers, if registered before, still
        see the output.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise _Stop

        self._handles.append(module.register_forward_hook(hook))

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the model; None if the pass was stopped early."""
        try:
            return model(*args, **kwargs)
        except _Stop:
            return None


@dataclass(frozen=True)
class LayerInput:
    """The residual stream that entered one decoder layer, kept so that later passes can begin
    there.

    Shapes: states (batch, pos, d_model). `as_tuple` tells how this model's layers return their
    states.
    """

    start: int
    states: Tensor
    as_tuple: bool


def capture(model: nn.Module, layers: Sequence[nn.Module], start: int, **inputs: Any) -> LayerInput:
    """Run `model(**inputs)` up to layer `start` (at least 1) and keep what that layer would have
    received.
    """
    if not 1 <= start < len(layers):
        raise ValueError(f"start must lie in 1..{len(layers) - 1}, got {start}")
    output = _output(model, layers[start - 1], inputs)
    return LayerInput(start, first_tensor(output).detach(), isinstance(output, tuple))


def returns_tuple(model: nn.Module, layers: Sequence[nn.Module], **inputs: Any) -> bool:
    """How this model's layers return their states; only the first is run, on `inputs`."""
    return isinstance(_output(model, layers[0], inputs), tuple)


def _output(model: nn.Module, module: nn.Module, inputs: dict[str, Any]) -> Any:
    """What `module` returns when `model(**inputs)` runs; the pass ends there."""
    kept: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append(output)
        raise _Stop

    handle = module.register_forward_hook(keep)
    try:
        Tap().run(model, **inputs, use_cache=False)
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def resume(layers: Sequence[nn.Module], entry: LayerInput) -> Iterator[None]:
    """Within the context a forward pass skips `layers[:entry.start]` and hands the kept states to
    the next one.

    With `start` one past the last layer, all are skipped and the states go to what follows the
    layers.

    The model itself still builds masks and positions and runs all that follows the layers, so this
    holds for every architecture. Call it with the inputs that were given to `capture`, and with
    `use_cache=False`.
    """

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        states = entry.states if entry.start == len(layers) else hidden_states
        return (states,) if entry.as_tuple else states

    with _replaced(layers[: entry.start], skip), Tap() as tap:
        if entry.start < len(layers):
            tap.on_input(layers[entry.start], lambda _: entry.states)
        yield


@dataclass(frozen=True)
class LayerCall:
    """All that a model calls one decoder layer with besides the hidden states: masks, positions,
    switches.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, states: Tensor) -> Tensor:
        """The states (batch, pos, d_model) that leave `layer` if `states` enter it."""
        return first_tensor(layer(states, *self.args, **self.kwargs))


def layer_calls(
    model: nn.Module, layers: Sequence[nn.Module], as_tuple: bool, **inputs: Any
) -> tuple[Tensor, list[LayerCall]]:
    """The states (batch, pos, d_model) that would enter the first layer, and how `model(**inputs)`
    would call every layer.

    No layer is run, so nothing but the embedding is computed. as_tuple: how this model's layers
    return their states, see LayerInput.
    """
    entering: list[Tensor] = []
    calls: list[LayerCall] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.pop("hidden_states")
        entering.append(states)
        calls.append(LayerCall(args[1:], kwargs))
        if len(calls) == len(layers):
            raise _Stop
        return (states,) if as_tuple else states

    with _replaced(layers, note):
        Tap().run(model, **inputs, use_cache=False)
    return entering[0], calls


@contextmanager
def _replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `forward` runs in the place of every one of `layers`."""
    skipped = list(layers)
    own = [
        layer.__dict__.get("forward") for layer in skipped
    ]  # accelerate sets one on the instance
    for layer in skipped:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, before in zip(skipped, own, strict=True):
            if before is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before
