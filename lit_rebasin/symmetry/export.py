"""Export a module as a graph, and say where and why if that fails."""

import contextlib
import inspect
import io
import linecache
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from lit_rebasin.symmetry.keep import attributes_kept


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> ExportedProgram:
    """Return the graph of a module, which is left as it was.

    Args:
        model: The module.
        args: Example inputs.
        kwargs: Example keyword inputs.
        training: The mode in which to export all of its parts.

    Returns:
        The graph, with parameters and buffers under the names of the state dict.

    Raises:
        ValueError: If the module cannot be exported; the sentence names the operator and the part of the module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"permutation_spec needs a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"permutation_spec needs the network inside {type(model).__name__}: give it model.module.")
    if not args and not kwargs:
        try:
            inspect.signature(model.forward).bind()
        except TypeError as error:
            raise ValueError(
                f"permutation_spec needs an example input of {type(model).__name__} ({error}), such as "
                "permutation_spec(model, torch.randn(1, 3, 32, 32))."
            ) from None
    with _mode(model, training=training):
        try:
            with _quiet():
                return torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be exported with torch.export, so its permutation groups cannot be found: "
                f"{str(error).strip().splitlines()[0].rstrip('.')}{_place(model, error)} "
                "A spec can be written by hand with PermutationSpec.from_axes."
            ) from error


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every part in one mode for a while, without the fused kernels of attention, which hide its structure."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with attributes_kept(model.modules()):
            model.train(training)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back torch's own reports of a failing export, which run over pages."""
    names = ["torch", *(name for name in logging.root.manager.loggerDict if name.startswith("torch."))]
    disabled = {name: logging.getLogger(name).disabled for name in names}
    for name in names:
        logging.getLogger(name).disabled = True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, before in disabled.items():
            logging.getLogger(name).disabled = before


def _place(model: nn.Module, error: BaseException) -> str:
    """Return where an export failed: the operator, the part of the module, and the line of its code."""
    paths = {id(part): (path, type(part).__name__) for path, part in model.named_modules()}
    operator = part = line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        function, owner = frame.f_locals.get("func"), frame.f_locals.get("self")
        if isinstance(function, OpOverload):
            operator = f"at {function._schema.name}"
        if id(owner) in paths and isinstance(owner, nn.Module):
            path, kind = paths[id(owner)]
            part = f"in {path!r} ({kind})" if path else f"in the forward of {kind}"
            called = frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl")
            line = line if called else linecache.getline(frame.f_code.co_filename, number).strip()
    if not operator and "data-dependent" in str(error):
        operator = "at aten::item"  # Python asks a tensor for its value
    found = ", ".join(piece for piece in (operator, part, line and f"`{line}`") if piece)
    return f" ({found})." if found else "."
