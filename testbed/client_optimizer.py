"""A client's local optimiser, on flat tensors."""

import torch


class LocalOptimizer:
    """SGD with momentum, weight decay and FedProx's proximal term, as in `torch.optim.SGD`.

    At parameters w with the gradient g of a batch, the step direction is::

        h = g + weight_decay * w + proximal * (w - w0)
        d = h in the first step, momentum * d + h in later ones

    and the step is ``w -= learning_rate * d``. The sum of the directions is the update that the
    client shares, ``(w0 - w) / learning_rate`` to rounding.

    Parameters
    ----------
    learning_rate
        Of the local steps, > 0.
    momentum
        In [0, 1).
    weight_decay
        Times the parameters, >= 0.
    proximal
        mu: the gradient of ``mu / 2 * ||w - w0||^2``, w0 being the global model, is added, >= 0.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2
    (the proximal term).
    """

    def __init__(
        self,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        proximal: float = 0.0,
    ) -> None:
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate: {learning_rate}; expected a finite number above 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: {momentum}; expected 0 <= momentum < 1")
        for name, value in (("weight_decay", weight_decay), ("proximal", proximal)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {value}; expected a finite number of 0 or more")
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._proximal = proximal
        self._first = True
        nothing = torch.empty(0)
        self._velocity = self._start = self._drift = nothing

    def begin(self, parameters: torch.Tensor) -> None:
        """Start a client's local steps: no momentum yet, and w0 are these parameters.

        Parameters
        ----------
        parameters
            float32 [P], on any device: the global model. It is copied.
        """
        self._first = True
        if self._momentum:
            self._velocity = _like(parameters, self._velocity)
        if self._proximal:
            self._start = _like(parameters, self._start)
            self._start.copy_(parameters)
            self._drift = _like(parameters, self._drift)

    def direction(self, gradient: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """Turn a gradient into the step direction, in place, and return it.

        `begin` comes first. With neither momentum, decay nor proximal term the gradient stays as
        it is, bit for bit.

        Parameters
        ----------
        gradient
            float32 [P]: overwritten.
        parameters
            float32 [P]: where it was taken.
        """
        if self._weight_decay:
            gradient.add_(parameters, alpha=self._weight_decay)
        if self._proximal:
            # The difference first: of two products that cancel, rounding errors would stay.
            torch.sub(parameters, self._start, out=self._drift)
            gradient.add_(self._drift, alpha=self._proximal)
        if self._momentum:
            if self._first:
                self._velocity.copy_(gradient)
            else:
                self._velocity.mul_(self._momentum).add_(gradient)
                # The caller may change what it gets; the velocity has to stay.
                gradient.copy_(self._velocity)
        self._first = False
        return gradient

    def step(self, parameters: torch.Tensor, direction: torch.Tensor) -> None:
        """Take the step, in place: ``parameters -= learning_rate * direction``, both [P]."""
        parameters.add_(direction, alpha=-self._learning_rate)


def _like(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Return the buffer, or a new one where it does not fit the tensor."""
    fits = buffer.shape == tensor.shape and buffer.device == tensor.device
    return buffer if fits else torch.empty_like(tensor)
