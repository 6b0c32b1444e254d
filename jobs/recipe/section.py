"""What the tables of all recipes are made of.

Apart from the training recipe, which knows what can be trained and so imports PyTorch: workers that curate
are to start without it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A table of a recipe: immutable, without unknown keys, and nothing is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
