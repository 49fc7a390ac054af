"""The distribution of a row whose component is chosen by a one-hot latent: it lives in the core, which reads it."""

from __future__ import annotations

from pyro_ext.selected import Components, Selected

__all__ = ["Components", "Selected"]
