"""What a configuration may say of a decoder, by name; importing it loads no framework."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

#: How attention over whole sequences is computed.
AttentionName: TypeAlias = Literal["auto", "xla", "splash", "cudnn"]
#: What a layer keeps for its backward pass; ``decoder.py`` has a policy for each.
RematName: TypeAlias = Literal["none", "dots", "dots_no_batch", "projections", "full"]
REMAT_NAMES: tuple[str, ...] = get_args(RematName)
