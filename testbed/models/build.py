"""A seeded module from a catalog name or an import path."""

import difflib
import importlib
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from testbed.errors import UserError, suggest
from testbed.models import catalog, paper

UNIFORM_BOUND = 0.5
"""Half the width of the paper's initialisation, uniform(-0.5, 0.5)."""


def build(
    name: str,
    *,
    shape: catalog.Shape,
    classes: int,
    activation: str | None,
    arguments: Mapping[str, Any],
    init: str,
    seed: int,
) -> nn.Module:
    """Build a model, with weights that depend on the seed alone.

    torch's global random state is left as it was. Only torch's CPU generator is seeded: a
    callable that initialises from another source (NumPy, `random`) is as random as that source.

    Parameters
    ----------
    name
        A name of `catalog.MODELS`, or an import path "package.module:callable". The current
        directory is put at the head of `sys.path`, and left there, as `python -m` does.
    shape
        Channels, height and width of an input. A callable gets neither it nor `classes`;
        `last_layer.find_last_layer` checks that its module fits both.
    classes
        Number of classes.
    activation
        One of `catalog.ACTIVATIONS`, or None for the built-in model's own. None for a callable.
    arguments
        Keyword arguments of the callable. Empty for a built-in model.
    init
        "uniform": every parameter, in `named_parameters` order, is filled by
        `initialise_uniform`. "torch": the module's own initialisation, drawn under the seed.
    seed
        Any integer in [0, 2**64). torch's CPU generator uses the low 32 bits.

    Returns
    -------
    nn.Module
        On the CPU, in training mode unless the callable says otherwise, float32.

    Raises
    ------
    UserError
        If a name or a value is unknown, the input does not suit the model, the callable cannot
        be imported or raises, or what it returns is not a float32 module on the CPU.
    """
    if init not in catalog.INITS:
        raise UserError(f"initialisation {init!r} is unknown: {suggest(init, catalog.INITS)}")
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every GPU too, and fork_rng restores the CPU only.
        torch.default_generator.manual_seed(seed)
        if catalog.is_import_path(name):
            module = _build_imported(name, activation, arguments)
        else:
            module = _build_paper(name, shape, classes, activation, arguments)
    if init == "uniform":
        parameters = [parameter for _, parameter in module.named_parameters()]
        sizes = [parameter.numel() for parameter in parameters]
        flat = torch.empty(sum(sizes), dtype=torch.float32)
        initialise_uniform(flat, seed)
        with torch.no_grad():
            for parameter, values in zip(parameters, flat.split_with_sizes(sizes), strict=True):
                parameter.copy_(values.view_as(parameter))
    return module


def initialise_uniform(parameters: torch.Tensor, seed: int) -> None:
    """Fill one flat tensor in place with uniform(-0.5, 0.5).

    A model's parameters, one after the other in `named_parameters` order, get the same bits as
    from `build` with init "uniform" and the same seed, on every device.

    Parameters
    ----------
    parameters
        Shape [number of parameters], float32, on any device.
    seed
        Any integer in [0, 2**64). torch's CPU generator uses the low 32 bits.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if parameters.device.type == "cpu":
            parameters.uniform_(-UNIFORM_BOUND, UNIFORM_BOUND, generator=generator)
        else:
            host = torch.empty(parameters.shape, dtype=parameters.dtype)
            host.uniform_(-UNIFORM_BOUND, UNIFORM_BOUND, generator=generator)
            parameters.copy_(host)


def _build_paper(
    name: str,
    shape: catalog.Shape,
    classes: int,
    activation: str | None,
    arguments: Mapping[str, Any],
) -> nn.Module:
    info = catalog.model_info(name)
    if arguments:
        raise UserError(
            f"model {name!r} is built in and takes no arguments, found {', '.join(arguments)};"
            " remove them, or name a model of your own by its import path"
        )
    catalog.check_input(info, shape, classes)
    chosen = activation if activation is not None else info.default_activation
    if chosen not in paper.ACTIVATION_MODULES:
        raise UserError(f"activation {chosen!r} is unknown: {suggest(chosen, catalog.ACTIVATIONS)}")
    return paper.MODULES[name](shape, classes, paper.ACTIVATION_MODULES[chosen])


def _build_imported(name: str, activation: str | None, arguments: Mapping[str, Any]) -> nn.Module:
    if activation is not None:
        raise UserError(
            f"activation {activation!r} was given with model {name!r}, which is not built in;"
            " remove it, or pass it in the model's arguments if its callable has one"
        )
    function = _import_callable(name)
    try:
        module = function(**arguments)
    # The callable is the user's: whatever it raises, a sys.exit included, is theirs to mend.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"model {name!r} called with ({_listed(arguments)}) raised {_one_line(error)};"
            " mend the callable or the model's arguments"
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"model {name!r} returned {type(module).__name__}, expected a torch.nn.Module; name a"
            " class of modules or a function that returns one"
        )
    _check_parameters(name, module)
    return module


def _import_callable(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise UserError(f"model {name!r} is not an import path: expected 'package.module:callable'")
    # A console script has its own folder there instead. Left in place, since the module may
    # import its neighbours only when it runs.
    directory = str(Path.cwd())
    if directory not in sys.path and "" not in sys.path:
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"model {name!r}: cannot import {module_name!r}: {_one_line(error)}; run from the"
            " folder that holds it, set PYTHONPATH, or install it"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        # A library's module holds hundreds of names: then only the nearest are worth a line.
        shown = difflib.get_close_matches(attribute, public, 5) if len(public) > 20 else public
        hint = suggest(attribute, shown) if shown else "name one that it has"
        raise UserError(f"model {name!r}: {module_name!r} has no {attribute!r}: {hint}")
    if not callable(function):
        raise UserError(
            f"model {name!r} is {type(function).__name__}, expected something to call; name a"
            " class of modules or a function that returns one"
        )
    return function  # type: ignore[no-any-return]


def _check_parameters(name: str, module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    if not parameters:
        raise UserError(f"model {name!r} has no parameters, expected some to train; mend it")
    for key, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"model {name!r}: parameter {key!r} has no shape yet; use layers with fixed sizes"
                " in place of lazy ones, or run one batch in the callable"
            )
        if parameter.dtype != torch.float32:
            raise UserError(
                f"model {name!r}: parameter {key!r} is {parameter.dtype}, expected torch.float32;"
                " return module.float()"
            )
        if parameter.device.type != "cpu":
            raise UserError(
                f"model {name!r}: parameter {key!r} is on {parameter.device}, expected cpu; build"
                " it there, the testbed moves it to the rank's device"
            )


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def _one_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return textwrap.shorten(text, 400, placeholder=" ...")
