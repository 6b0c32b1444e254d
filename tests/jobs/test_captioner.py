"""The captioner: packing, causality, what its layers promise to whoever cuts and ties them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.models.captioner import attention_mask, build
from jobs.models.gpt import IGNORED, loss
from jobs.models.log_mel import LogMel
from strategies.model import describe
from strategies.options import OptimizerSettings, Precision
from strategies.warm_up import profile
from tests.support.expected import reference_steps

SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch": 8,
    "width": 32,
    "depth_image": 1,
    "depth_text": 2,
    "heads": 4,
    "vocabulary": 50,
    "context": 12,
}
AUDIO: dict[str, Any] = {"audio": True, "audio_rate": 8000, "audio_seconds": 0.32, "mels": 8}
CLIP = 2560


def built(**changes: Any) -> list[nn.Module]:
    torch.manual_seed(7)
    return build(**{**SIZES, **changes})[0]


def forward(layers: Sequence[nn.Module], row: Any) -> Tensor:
    for layer in layers:
        row = layer(row)
    assert isinstance(row, Tensor)
    return row


def samples(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Captions of 2 to 5 tokens, each with an image and a clip."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    return [
        {
            "tokens": integers(0, 50, 2 + number % 4),
            "image": integers(0, 256, 16, 16, 3).to(torch.uint8),
            "audio": integers(-9000, 9000, CLIP).to(torch.int16),
        }
        for number in range(count)
    ]


def packed(rows: list[list[dict[str, Tensor]]], slots: int, context: int = 12) -> tuple[Any, Tensor]:
    """Rows of samples, and as targets each token's successor (the last one has none)."""
    shape = (len(rows), slots)
    row = {
        "image": torch.zeros(*shape, 16, 16, 3, dtype=torch.uint8),
        "has_image": torch.zeros(*shape, dtype=torch.uint8),
        "audio": torch.zeros(*shape, CLIP, dtype=torch.int16),
        "has_audio": torch.zeros(*shape, dtype=torch.uint8),
        "tokens": torch.zeros(len(rows), context, dtype=torch.int64),
        "segment": torch.full((len(rows), context), -1),
        "position": torch.zeros(len(rows), context, dtype=torch.int64),
    }
    targets_BT = torch.full((len(rows), context), IGNORED)
    for b, members in enumerate(rows):
        begin = 0
        for slot, sample in enumerate(members):
            stop = begin + len(sample["tokens"])
            row["tokens"][b, begin:stop] = sample["tokens"]
            row["segment"][b, begin:stop] = slot
            row["position"][b, begin:stop] = torch.arange(stop - begin)
            targets_BT[b, begin : stop - 1] = sample["tokens"][1:]
            for what in ("image", "audio"):
                row[what][b, slot] = sample[what]
                row[f"has_{what}"][b, slot] = 1
            begin = stop
    return row, targets_BT


def test_layers_and_shapes() -> None:
    layers = built(**AUDIO)
    assert len(layers) == 1 + 1 + 1 + 2 + 1
    row, _ = packed([samples(2), samples(1)], slots=3)
    row = layers[0](row)
    assert row["media"].shape == (2, 3, 4 + 2, 32) and row["text"].shape == (2, 12, 32)
    row = layers[2](layers[1](row))
    assert row["x"].shape == (2, 3 * (1 + 2) + 12, 32) and row["media"] == 9
    assert forward(layers[3:], row).shape == (2, 12, 50)
    assert {parameter.dtype for layer in layers for parameter in layer.parameters()} == {torch.float32}
    layout = describe(layers)
    assert layout.layers == 6 and any(block.layers == (0, 5) for block in layout.blocks), "the tied weight"


@pytest.mark.parametrize("changes", [{}, AUDIO])
def test_a_packed_sample_has_the_loss_it_has_alone(changes: Any) -> None:
    layers = [layer.eval() for layer in built(**changes)]
    members = samples(3)
    row, targets_BT = packed([members], slots=4)
    logits_BTV = forward(layers, row)
    begin = 0
    for sample in members:
        stop = begin + len(sample["tokens"])
        inside = torch.full_like(targets_BT, IGNORED)
        inside[:, begin:stop] = targets_BT[:, begin:stop]
        together = loss(logits_BTV, inside)
        alone_row, alone_targets_BT = packed([[sample]], slots=1)
        alone = loss(forward(layers, alone_row), alone_targets_BT)
        assert together[1] == alone[1] > 0
        torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)
        begin = stop


@pytest.mark.parametrize("what", ["image", "audio"])
def test_media_matter_for_their_own_sample_only(what: str) -> None:
    layers = [layer.eval() for layer in built(**AUDIO)]
    first, second = samples(2)
    before = forward(layers, packed([[first, second]], slots=2)[0])
    changed = {**second, what: 100 - second[what] // 2}
    after = forward(layers, packed([[first, changed]], slots=2)[0])
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.isclose(before[:, 2:5], after[:, 2:5]).all(dim=-1).any()
    row, _ = packed([[first, second]], slots=2)
    row[f"has_{what}"][0, 1] = 0
    without = forward(layers, row)
    row[what][0, 1] = 1
    assert torch.equal(without, forward(layers, row)), "what is not there is not looked at"
    assert not torch.isclose(without[:, 2:5], before[:, 2:5]).all(dim=-1).any()


def test_text_is_causal_and_padding_harmless() -> None:
    layers = [layer.eval() for layer in built()]
    row, _ = packed([samples(4)[1:]], slots=3)  # 3 + 4 + 5 tokens
    before = forward(layers, row)
    later = {**row, "tokens": row["tokens"].clone()}
    later["tokens"][:, 5:7] += 1  # the last two of the second sample
    after = forward(layers, later)
    same = [position for position in range(12) if position not in (5, 6)]
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.isclose(before[:, 5:7], after[:, 5:7]).all(dim=-1).any()


def test_attention_mask_is_block_diagonal() -> None:
    segment = torch.tensor([[0, 0, 1, 1, 0, 0, 1, -1]])
    position = torch.tensor([[0, 1, 0, 1, 2, 3, 2, 2]])
    mask = attention_mask(segment, position, media_tokens=2)[0]
    expected = [
        "xx......",
        "xx......",
        "..xx....",
        "..xx....",
        "xx..x...",
        "xx..xx..",
        "..xx..x.",
        ".......x",
    ]
    assert ["".join("x" if seen else "." for seen in line) for line in mask.tolist()] == expected


def test_gradients_reach_every_parameter() -> None:
    layers = built(**AUDIO, dropout=0.0)
    members = samples(3)
    row, targets_BT = packed([members], slots=4)
    row["has_image"][0, 1] = row["has_audio"][0, 2] = 0
    torch.autograd.backward(loss(forward(layers, row), targets_BT)[0])
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{number}.{name}"


def test_the_core_can_cut_it_anywhere() -> None:
    """The profile runs every layer by itself, with what flows between them taken apart and sent."""
    torch.manual_seed(7)
    layers, criterion = build(**{**SIZES, **AUDIO})
    from strategies.model import Model

    row, targets_BT = packed([samples(3)], slots=3)
    measured = profile(
        Model(layers, criterion, describe(layers)),
        row,
        targets_BT,
        seed=1,
        precision=Precision(),
        device=torch.device("cpu"),
    )
    assert len(measured.forward) == len(layers) and all(bytes_ > 0 for bytes_ in measured.boundary_bytes)


def test_it_learns_what_the_image_says() -> None:
    """Captions that only the image tells: the loss goes below what any caption prior can reach."""
    generator = torch.Generator().manual_seed(3)

    class Squares:
        def micro_batch(self, step: int, micro_batch: int) -> Any:
            kinds = torch.randint(0, 4, (4, 3), generator=generator)
            rows = [
                [
                    {
                        "tokens": torch.tensor([9, int(kind)]),
                        "image": torch.full((16, 16, 3), 60 * int(kind), dtype=torch.uint8),
                        "audio": torch.zeros(CLIP, dtype=torch.int16),
                    }
                    for kind in line
                ]
                for line in kinds
            ]
            return packed(rows, slots=3)

    steps = reference_steps(
        60,
        build_model=lambda: build(**SIZES),
        data=Squares(),
        micro_batches=1,
        seed=1,
        optimizer=OptimizerSettings(learning_rate=1e-2, warmup_steps=2, decay_steps=1000, clip_norm=1.0),
    )
    last = sum(step.loss for step in steps[-5:]) / 5
    assert last < 0.7 < 1.38 < steps[0].loss, "ln 4 = 1.386 without looking"


def test_log_mel_finds_a_tone() -> None:
    mel = LogMel(8000, 20)
    time = torch.arange(8000) / 8000
    for frequency in (300.0, 1000.0, 2500.0):
        tone = (8000 * torch.sin(2 * torch.pi * frequency * time)).to(torch.int16)
        energies = mel(tone[None])
        assert energies.shape == (1, 100, 20)
        top = 2595 * torch.log10(torch.tensor(1 + 4000 / 700))
        place = 2595 * torch.log10(torch.tensor(1 + frequency / 700)) / top * 21 - 1
        assert abs(int(energies[0, 50].argmax()) - float(place)) <= 1
    silence = mel(torch.zeros(1, 8000, dtype=torch.int16))
    assert bool(torch.isfinite(silence).all())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": 5}, "patch"),
        ({"width": 36}, "width"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"dropout": 1.0}, "dropout"),
        ({**AUDIO, "audio_seconds": 0.35}, "audio_seconds"),
    ],
)
def test_sizes_that_do_not_fit(changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("what", "shape"), [("image", (1, 2, 8, 8, 3)), ("audio", (1, 2, 100)), ("tokens", (1, 13))]
)
def test_data_that_do_not_fit(what: str, shape: tuple[int, ...]) -> None:
    layers = built(**AUDIO)
    row, _ = packed([samples(2)], slots=2)
    row[what] = torch.zeros(shape, dtype=row[what].dtype)
    with pytest.raises(ValueError, match=what if what != "tokens" else "context"):
        layers[0](row)


def test_no_buffer_is_kept_or_changed() -> None:
    layers = built(**AUDIO)
    buffers = {name: buffer.clone() for name, buffer in nn.Sequential(*layers).named_buffers()}
    assert buffers and not nn.Sequential(*layers).state_dict().keys() & buffers.keys()
    row, targets_BT = packed([samples(2)], slots=2)
    torch.autograd.backward(loss(forward(layers, row), targets_BT)[0])
    for name, buffer in nn.Sequential(*layers).named_buffers():
        assert torch.equal(buffer, buffers[name])
