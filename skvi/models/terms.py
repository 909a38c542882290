"""The terms of the evidence lower bound, per row."""

from typing import Generic, NamedTuple, TypeVar

Array = TypeVar("Array")


class ElboTerms(NamedTuple, Generic[Array]):
    r"""Both classic readings of the local bound, in nats, each of shape (N,).

    .. math::
        \mathrm{ELBO}_n = \underbrace{E_q[\log p(x_n|z_n)]}_{\text{reconstruction}}
            - \mathrm{KL}(q(z_n) \| p(z_n))
          = \underbrace{E_q[\log p(x_n, z_n)]}_{\text{energy}} + H[q(z_n)]
    """

    reconstruction: Array
    kl: Array
    energy: Array
    entropy: Array
