"""What a staircase of savings keeps."""

from __future__ import annotations

from strategies.search.recomputation import Staircases, _staircase


def test_of_layers_that_save_as_much_the_quickest_alone_make_steps() -> None:
    kinds = tuple((100, 1.0 + layer / 64) for layer in range(12))
    assert [saved for saved, _ in _staircase(kinds, (1,) * 12)] == [100 * count for count in range(13)]
    staircases = Staircases(*zip(*kinds, strict=True), [(0, 12)])
    assert staircases.layers(0, 12, 250) == (0, 1, 2)
