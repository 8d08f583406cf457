"""Look into a forward pass, or change it: the only place that registers hooks.

    with Tap() as tap:
        tap.on_input(down, lambda x: ...)      # see it; return a tensor to replace it, or None
        tap.on_output(block, lambda y: ...)
        tap.stop_after(block)                  # the pass ends here
        tap.run(model, input_ids=ids)

    entry = capture(model, layers, 3, input_ids=ids)
    with resume(layers, entry):                # layers 0 to 2 are skipped
        model(input_ids=ids, use_cache=False)

On any exit, also by an exception, the hooks are gone and the model is as it was.
"""

# How this works.
#
# Watching is done with PyTorch's forward hooks. `_Stop`, raised by a hook, ends a pass early; only
# `Tap.run` catches it.
#
# Resuming needs layers that do nothing. No layer is taken out of the model: a function is put in
# the `__dict__` of each skipped layer under the name `forward`, where Python finds it before the
# method of the class. The model itself still embeds the tokens, builds masks and position
# embeddings, and calls every layer. So nothing here knows how an architecture does these things,
# and a resumed pass gives the same bits as a whole one.
#
# A layer is handed its hidden states by position or by keyword, and returns a tensor or a tuple
# that begins with one, both depending on the model and on the version of transformers. Every
# function below copes with all four.

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
    """The hidden states in what a module returned: a tensor, or the first tensor of a tuple.

    Raises: TypeError for anything else.

    >>> first_tensor((torch.ones(2), None))
    tensor([1., 1.])
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return value[0]
    raise TypeError(
        f"expected a tensor or a tuple that begins with one, got {type(value).__name__}"
    )


def by_position(value: Tensor, batch: int) -> Tensor:
    """Hidden states as (batch, pos, channels), a view of `value`.

    Some architectures (OPT) hand them to their MLP as (batch * pos, channels).

    >>> by_position(torch.zeros(6, 4), batch=2).shape
    torch.Size([2, 3, 4])
    """
    return value.view(batch, -1, value.shape[-1])


def _with_first(value: Any, new: Tensor) -> Any:
    return new if isinstance(value, Tensor) else (new, *value[1:])


class Tap:
    """Hooks with a lifetime: registered inside the `with` block, gone after it.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> with Tap() as tap:
    ...     tap.on_output(layer, torch.zeros_like)
    ...     layer(torch.ones(1, 2)).tolist()
    [[0.0, 0.0]]
    >>> len(layer._forward_hooks)
    0
    """

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
        """Call `watch(x)` with the hidden states that enter `module`.

        A tensor that `watch` returns takes their place.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                new = watch(first_tensor(args[0]))
                return None if new is None else ((new, *args[1:]), kwargs)
            new = watch(first_tensor(kwargs["hidden_states"]))
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, module: nn.Module, watch: Watcher) -> None:
        """Call `watch(y)` with the hidden states that leave `module`.

        A tensor that `watch` returns takes their place.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            new = watch(first_tensor(output))
            return None if new is None else _with_first(output, new)

        self._handles.append(module.register_forward_hook(hook))

    def on_call(self, module: nn.Module, watch: Callable[[tuple[Any, ...]], None]) -> None:
        """Call `watch(args)` with all positional arguments of `module`.

        For modules that take more than hidden states.
        """

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            watch(args)

        self._handles.append(module.register_forward_pre_hook(hook))

    def stop_after(self, module: nn.Module) -> None:
        """End the pass once `module` has returned.

        Watchers of the module that were registered before still see its output.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise _Stop

        self._handles.append(module.register_forward_hook(hook))

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the model. None if the pass was stopped early."""
        try:
            return model(*args, **kwargs)
        except _Stop:
            return None


@dataclass(frozen=True)
class LayerInput:
    """The residual stream that entered layer `start`, kept so that later passes can begin there.

    Shapes: states (batch, pos, d_model). as_tuple: whether this model's layers return a tuple.
    """

    start: int
    states: Tensor
    as_tuple: bool


def capture(model: nn.Module, layers: Sequence[nn.Module], start: int, **inputs: Any) -> LayerInput:
    """Run `model(**inputs)` up to layer `start` and keep what that layer would have received.

    start: at least 1, since layer 0 has no layer below it to stop after.
    Raises: ValueError for a `start` outside 1 to the last layer.

    >>> import surgeon
    >>> model = surgeon.load_model("patient").model
    >>> layers = surgeon.Anatomy.of(model).layers
    >>> ids = torch.tensor([[0, 17, 42]])
    >>> entry = capture(model, layers, 1, input_ids=ids)
    >>> entry.states.shape
    torch.Size([1, 3, 128])
    >>> with resume(layers, entry), torch.no_grad():
    ...     resumed = model(input_ids=ids, use_cache=False).logits
    >>> torch.equal(resumed, model(input_ids=ids).logits)
    True
    """
    if not 1 <= start < len(layers):
        raise ValueError(f"start must lie in 1..{len(layers) - 1}, got {start}")
    output = _output(model, layers[start - 1], inputs)
    return LayerInput(start, first_tensor(output).detach(), isinstance(output, tuple))


def returns_tuple(model: nn.Module, layers: Sequence[nn.Module], **inputs: Any) -> bool:
    """Whether this model's layers return a tuple. Only the first layer is run, on `inputs`."""
    return isinstance(_output(model, layers[0], inputs), tuple)


def _output(model: nn.Module, module: nn.Module, inputs: dict[str, Any]) -> Any:
    """What `module` returns when `model(**inputs)` runs; the pass ends there."""
    outputs: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)
        raise _Stop

    # not `Tap.on_output`, which shows the hidden states only: here it matters what they come in
    handle = module.register_forward_hook(keep)
    try:
        Tap().run(model, **inputs, use_cache=False)
    finally:
        handle.remove()
    return outputs[0]


@contextmanager
def resume(layers: Sequence[nn.Module], entry: LayerInput) -> Iterator[None]:
    """Within the block a forward pass skips `layers[:entry.start]` and begins with the kept states.

    With `start` one past the last layer all are skipped, and the states go to what follows them.
    Call the model with the inputs that were given to `capture`, and with `use_cache=False`.
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
    """What a model gives one decoder layer besides hidden states: masks, positions, switches."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, states: Tensor) -> Tensor:
        """The states (batch, pos, d_model) that leave `layer` if `states` enter it."""
        return first_tensor(layer(states, *self.args, **self.kwargs))


def layer_calls(
    model: nn.Module, layers: Sequence[nn.Module], as_tuple: bool, **inputs: Any
) -> tuple[Tensor, list[LayerCall]]:
    """The states that would enter the first layer, and how `model(**inputs)` would call each layer.

    No layer is run, so nothing but the embedding is computed.
    as_tuple: whether this model's layers return a tuple, see `returns_tuple`.
    Shapes: states (batch, pos, d_model).
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
    """Within the block `forward` runs in the place of every one of `layers`."""
    # accelerate sets a `forward` on the instance itself; that one has to come back
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = own
