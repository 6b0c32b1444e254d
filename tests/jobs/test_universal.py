"""Checkpoints to DeepSpeed's universal format and back: every bit of weights and moments, and the step."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from jobs.cli import app
from jobs.recipe.recipe import Recipe
from jobs.universal import FILES, export_checkpoint, import_checkpoint
from runtime.checkpoint import (
    ROWS,
    CheckpointReader,
    list_checkpoints,
    load_manifest,
    write_manifest,
    write_shards,
)
from runtime.run_folder import RunFolder
from strategies.model import describe
from tests.support.deepspeed import alone
from tests.support.models import build
from tests.support.ray_jobs import toy_recipe

VERSION = 7


def recipe_of(name: str = "toy", **arguments: Any) -> Recipe:
    return toy_recipe(
        name, 20, 2, "auto", model={"build": "tests.support.models:build", "arguments": arguments}
    )


def run_of(folder: Path, recipe: Recipe) -> torch.Tensor:
    """A run folder with one checkpoint of random state; returns the state, all blocks side by side."""
    created = RunFolder.create(folder, recipe.to_toml(), {})
    layout = describe(build()[0])
    generator = torch.Generator().manual_seed(3)
    pieces = {}
    for block in layout.blocks:
        state_3N = torch.zeros(ROWS, block.size)
        for tensor in block.tensors:
            state_3N[:, tensor.offset : tensor.stop] = torch.randn(ROWS, tensor.size, generator=generator)
        pieces[block.index, 0, block.size] = state_3N.abs()  # as second moments are
    file = write_shards(str(created.checkpoints), VERSION, 0, 0, pieces)
    digest = recipe.numerics_digest()
    write_manifest(str(created.checkpoints), VERSION, layout, [file], exponents=(1,) * 99, recipe=digest)
    return torch.cat(list(pieces.values()), dim=1)


def state_of(folder: Path, version: int = VERSION) -> torch.Tensor:
    root = str(RunFolder(folder).checkpoints)
    assert list_checkpoints(root) == [version]
    with CheckpointReader(root, load_manifest(root, version)) as reader:
        return torch.cat([reader.read_state(b.index, 0, b.size) for b in describe(build()[0]).blocks], dim=1)


def test_out_and_back_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    recipe = recipe_of()
    state = run_of(tmp_path / "run", recipe)
    assert export_checkpoint(tmp_path / "run", tmp_path / "universal") == VERSION
    assert import_checkpoint(tmp_path / "universal", recipe, tmp_path / "back") == VERSION
    assert torch.equal(state_of(tmp_path / "back"), state)
    root = str(RunFolder(tmp_path / "back").checkpoints)
    manifest = load_manifest(root, VERSION)
    assert manifest.recipe == recipe.numerics_digest() and manifest.exponents is None


def test_a_run_of_another_engine_is_taken_over_directly(tmp_path: Path) -> None:
    state = run_of(tmp_path / "run", recipe_of())
    engine = {"name": "deepspeed", "settings": {"zero_optimization": {"stage": 1}}}
    other = Recipe.model_validate({**recipe_of("other").model_dump(), "engine": engine})
    assert import_checkpoint(tmp_path / "run", other, tmp_path / "other") == VERSION
    assert torch.equal(state_of(tmp_path / "other"), state)


def test_the_commands_say_what_they_did(tmp_path: Path) -> None:
    recipe = recipe_of()
    run_of(tmp_path / "run", recipe)
    (tmp_path / "toy.toml").write_text(recipe.to_toml())
    run, out, back = (str(tmp_path / name) for name in ("run", "universal", "back"))
    exported = CliRunner().invoke(app, ["checkpoint", "export", run, out])
    assert exported.exit_code == 0 and "step 7 exported" in exported.output
    command = ["checkpoint", "import", out, str(tmp_path / "toy.toml"), "--run-folder", back]
    imported = CliRunner().invoke(app, command)
    assert imported.exit_code == 0 and "goes on from step 7" in imported.output
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "already holds a run" in again.output


def test_mistakes_are_named(tmp_path: Path) -> None:
    recipe = recipe_of()
    run_of(tmp_path / "run", recipe)
    export_checkpoint(tmp_path / "run", tmp_path / "universal")
    cases = [
        (tmp_path / "nowhere", recipe, "is neither a run's folder nor a universal checkpoint"),
        (tmp_path / "universal", recipe_of(width=32), "give the recipe the model of the checkpoint"),
        (tmp_path / "universal", recipe_of(depth=4), "has no folder for layers.4.norm.weight"),
        (tmp_path / "run", recipe_of(depth=4), "is a run of another model"),
    ]
    for source, wanted, sentence in cases:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            import_checkpoint(source, wanted, tmp_path / "back")
    with pytest.raises(ValueError, match="is not empty"):
        export_checkpoint(tmp_path / "run", tmp_path / "universal")
    with pytest.raises(ValueError, match="has no checkpoint of step 9"):
        export_checkpoint(tmp_path / "run", tmp_path / "other", version=9)
    for step in (tmp_path / "universal" / "zero").rglob("step.pt"):
        step.unlink()
    (tmp_path / "universal" / "zero" / "optimizer_state.pt").unlink()
    with pytest.raises(ValueError, match="tells no number of steps: say how many"):
        import_checkpoint(tmp_path / "universal", recipe, tmp_path / "back")
    assert import_checkpoint(tmp_path / "universal", recipe, tmp_path / "back", step=4) == 4


def test_an_import_into_others_checkpoints_can_be_corrected(tmp_path: Path) -> None:
    run_of(tmp_path / "run", recipe_of())
    taken = str(tmp_path / "run" / "checkpoints")
    wrong = Recipe.model_validate({**recipe_of().model_dump(), "checkpoint": {"folder": taken}})
    with pytest.raises(ValueError, match="holds checkpoints already"):
        import_checkpoint(tmp_path / "run", wrong, tmp_path / "new")
    assert import_checkpoint(tmp_path / "run", recipe_of(), tmp_path / "new") == VERSION


def flattened(folder: Path, ranks: int) -> None:
    """Makes the checkpoint one of stage 3: bare rows of elements, padded to a multiple of ``ranks``."""
    for file in FILES:
        for path in (folder / "zero").rglob(f"{file}.pt"):
            row = torch.load(path)["param"].flatten()
            torch.save(torch.cat([row, torch.full((-row.numel() % ranks,), torch.nan)]), path)


def test_a_checkpoint_of_stage_three_comes_in_without_its_padding(tmp_path: Path) -> None:
    recipe = recipe_of()
    state = run_of(tmp_path / "run", recipe)
    export_checkpoint(tmp_path / "run", tmp_path / "universal")
    flattened(tmp_path / "universal", ranks=7)
    assert import_checkpoint(tmp_path / "universal", recipe, tmp_path / "back") == VERSION
    assert torch.equal(state_of(tmp_path / "back"), state)


@pytest.mark.parametrize("ranks", [0, 1, 7])
@pytest.mark.parametrize(
    "other", [{"width": 16}, {"width": 23}, {"vocabulary": 36}, {"vocabulary": 24, "width": 37}]
)
def test_the_weights_of_another_model_are_refused(tmp_path: Path, other: dict[str, int], ranks: int) -> None:
    """``ranks``: of a stage 3 whose files are flat, 0: whole tensors. Not even a part of a model fits in."""
    run_of(tmp_path / "run", recipe_of())
    export_checkpoint(tmp_path / "run", tmp_path / "universal")
    if ranks:
        flattened(tmp_path / "universal", ranks)
    with pytest.raises(ValueError, match="give the recipe the model of the checkpoint"):
        import_checkpoint(tmp_path / "universal", recipe_of(**other), tmp_path / "back")
    assert not (tmp_path / "back").exists()


class Whole(nn.Module):
    """The toy model as a DeepSpeed user would write it."""

    def __init__(self) -> None:
        super().__init__()
        layers, self._loss = build(dropout=0.0)
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = tokens
        for layer in self.layers:
            x = layer(x)
        total: torch.Tensor = self._loss(x, (tokens * 3 + 1) % 37)[0]
        return total / tokens.numel()


@pytest.fixture
def world() -> Iterator[None]:
    with alone():
        yield


def engine_of(**more: Any) -> Any:
    import deepspeed

    torch.manual_seed(11)
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 1}, "optimizer": optimizer, **more}
    return deepspeed.initialize(
        model=Whole(), config=json.loads(json.dumps(config)), dist_init_required=False
    )[0]


def deepspeed_state(engine: Any) -> torch.Tensor:
    """What DeepSpeed itself says of its weights and moments, laid out as Reknit does."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    layout = describe(list(engine.module.layers))
    blocks = []
    for block in layout.blocks:
        state_3N = torch.zeros(ROWS, block.size)
        for use in layout.uses:
            if use.block == block.index:
                parameter = engine.module.layers[use.layer].get_parameter(use.name)
                place = slice(use.tensor.offset, use.tensor.stop)
                state_3N[0, place] = safe_get_full_fp32_param(parameter).flatten()
                for row, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
                    state_3N[row, place] = safe_get_full_optimizer_state(parameter, name).flatten()
        blocks.append(state_3N)
    return torch.cat(blocks, dim=1)


def test_deepspeeds_own_checkpoint_comes_in_and_deepspeed_reads_what_goes_out(
    tmp_path: Path, world: None
) -> None:
    from deepspeed.checkpoint import ds_to_universal

    engine = engine_of()
    tokens = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        engine.backward(engine(tokens))
        engine.step()
    state = deepspeed_state(engine)
    engine.save_checkpoint(str(tmp_path / "saved"), tag="step3")
    engine.destroy()
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    switches = {"keep_temp_folder": False, "strict": False, "inject_missing_state": True}
    folders = {"input_folder": str(tmp_path / "saved/step3"), "output_folder": str(tmp_path / "universal")}
    ds_to_universal.main(Namespace(**folders, **workers, **switches))

    assert import_checkpoint(tmp_path / "universal", recipe_of(), tmp_path / "run") == 3
    assert torch.equal(state_of(tmp_path / "run", 3), state)

    export_checkpoint(tmp_path / "run", tmp_path / "out" / "step3")
    engine = engine_of(checkpoint={"load_universal": True})
    engine.load_checkpoint(str(tmp_path / "out"), tag="step3")
    assert torch.equal(deepspeed_state(engine), state)
    assert engine.global_steps == 3
    engine.destroy()
