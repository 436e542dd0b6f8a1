"""Plain arguments of the constructor, each refused in one sentence where it does not fit.

Silent otherwise: a width of 0 trains nothing, a temperature of 0 gives NaN, "False" is true.
"""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np


def check_sizes(sizes: Mapping[str, Any], temperature: Any) -> None:
    """Raise ValueError unless the widths of the heads are counts, and the temperature above 0."""
    for name, value in sizes.items():
        if not is_count(value):
            raise ValueError(
                f"{name}={value!r}; expected an int of at least 1. Leave it out for the default."
            )
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(
            f"sem_temperature={temperature!r}; expected a finite number above 0, for example 0.1."
        )


def check_flags(flags: Mapping[str, Any], sync_batchnorm: Any) -> None:
    """Raise TypeError for what is no bool, such as "False", which would count as true."""
    for name, value in flags.items():
        if not _is_flag(value):
            raise TypeError(f"{name}={value!r}; expected a bool. Give {name}=True or {name}=False.")
    if sync_batchnorm is not None and not _is_flag(sync_batchnorm):
        raise TypeError(
            f"sync_batchnorm={sync_batchnorm!r}; expected a bool or None. Give None to synchronise "
            "the heads whenever several processes train."
        )


def check_local(count: Any, size: Any, augment_fn: Any) -> None:
    """Raise ValueError unless local_views is a count or 0; its companions are only with a count."""
    if not is_count(count) and (isinstance(count, bool) or count != 0):
        raise ValueError(f"local_views={count!r}; expected an int of at least 0, for example 2.")
    for name, value in (("local_size", size), ("local_augment_fn", augment_fn)):
        if not count and value is not None:
            raise ValueError(
                f"{name} came with local_views=0; expected none. Give local_views= their number, "
                "for example 2, or leave it out."
            )


def is_number(value: Any) -> bool:
    """Whether `value` is a real number of Python or numpy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether `value` is an integer of Python or numpy of at least 1, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1))
