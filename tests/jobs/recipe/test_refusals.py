"""Recipes that are wrong: one sentence that names the file, the key and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.recipe.recipe import Recipe, RecipeError, load_recipe

FAULT = '[[faults]]\nstep = {}\nworker = {}\nat = "{}"\n'

# (text to replace, its replacement, the whole message); an empty text appends.
WRONG = {
    "misspelt key": (
        "workers =",
        "wrokers =",
        "demo.toml: parallel.wrokers is not a known key; did you mean parallel.workers?",
    ),
    "misspelt section": (
        "[optimizer]",
        "[optimiser]",
        "demo.toml: optimiser is not a known key; did you mean optimizer?",
    ),
    "key in the wrong section": (
        "steps = 10",
        "steps = 10\nmicro_batches = 4",
        "demo.toml: run.micro_batches is not a known key; did you mean parallel.micro_batches?",
    ),
    "unlike any key": (
        "",
        "[fabric]\nqq = 1\n",
        "demo.toml: fabric.qq is not a known key: remove it, or choose from fabric.inbox_limit_mb, "
        "fabric.link_bytes_per_second.",
    ),
    "missing key": (
        "steps = 10\n",
        "",
        "demo.toml: run.steps is missing: add it to [run].",
    ),
    "missing section": (
        "[optimizer]\nlearning_rate = 1\n",
        "",
        "demo.toml: optimizer is missing: add it as a section of its own.",
    ),
    "text for a whole number": (
        "workers = 4",
        'workers = "4"',
        'demo.toml: parallel.workers must be a whole number, not "4".',
    ),
    "fraction for a whole number": (
        "steps = 10",
        "steps = 10.0",
        "demo.toml: run.steps must be a whole number, not 10.0.",
    ),
    "bool for a whole number": (
        "workers = 4",
        "workers = true",
        "demo.toml: parallel.workers must be a whole number, not true.",
    ),
    "number for a text": (
        'name = "good"',
        "name = 7",
        "demo.toml: run.name must be text in quotes, not 7.",
    ),
    "not a number": (
        "learning_rate = 1",
        "learning_rate = nan",
        "demo.toml: optimizer.learning_rate must be a finite number, not NaN.",
    ),
    "not positive": (
        "learning_rate = 1",
        "learning_rate = 0",
        "demo.toml: optimizer.learning_rate must be greater than 0, not 0.",
    ),
    "no workers": (
        "workers = 4",
        "workers = 0",
        "demo.toml: parallel.workers must be greater than 0, not 0.",
    ),
    "name with a slash": (
        '"good"',
        '"a/b"',
        "demo.toml: run.name names the run's folder: it must be made of letters, digits, '.', '_' and '-', "
        'not "a/b".',
    ),
    "beta of one": (
        "learning_rate = 1",
        "learning_rate = 1\nbetas = [0.9, 1.0]",
        "demo.toml: optimizer.betas.1 must be below 1, not 1.0.",
    ),
    "one beta": (
        "learning_rate = 1",
        "learning_rate = 1\nbetas = [0.9]",
        "demo.toml: optimizer.betas must have 2 values, not 1.",
    ),
    "minimum rate as an absolute rate": (
        "learning_rate = 1",
        "learning_rate = 1\nminimum_rate = 1.5",
        "demo.toml: optimizer.minimum_rate must be at most 1, not 1.5.",
    ),
    "stages neither number nor auto": (
        "workers = 4",
        'workers = 4\nstages = "many"',
        'demo.toml: parallel.stages must be "auto" or a whole number of at least 1, not "many".',
    ),
    "unknown schedule": (
        "workers = 4",
        'workers = 4\nschedule = "2f2b"',
        'demo.toml: parallel.schedule must be "auto" or one of gpipe, 1f1b, interleaved, zero-bubble, '
        'skippipe, not "2f2b".',
    ),
    "chunks of a schedule that is to be chosen": (
        "workers = 4",
        'workers = 4\nschedule = "auto"\nchunks = 2',
        "demo.toml: parallel.chunks (2) is chosen together with the schedule: remove it, or name a schedule.",
    ),
    "teams in a search": (
        "workers = 4",
        'workers = 4\nschedule = "auto"\nsequence = 2',
        "demo.toml: parallel.sequence (2) is for runs that name their strategy: set sequence to 1 or "
        '"auto", or name the schedule, the sharding and what is recomputed.',
    ),
    "teams by search of a sequence that nobody has cut": (
        "workers = 4",
        'workers = 4\nsequence = "auto"',
        'demo.toml: parallel.sequence = "auto" leaves open how a sequence is cut, on which the bits depend: '
        "set parallel.sequence_slices to at least 2.",
    ),
    "memory without a search": (
        "workers = 4",
        'workers = 4\nmemory = "8GiB"',
        "demo.toml: parallel.memory has a meaning only for a search: set parallel.schedule, "
        'parallel.sharding, parallel.sequence or precision.recompute to "auto", or remove memory.',
    ),
    "chunks that the schedule cannot do": (
        "workers = 4",
        "workers = 4\nchunks = 2",
        "demo.toml: parallel.chunks does not fit parallel.schedule: the schedule 1f1b has one chunk a "
        "worker, not 2: choose interleaved.",
    ),
    "fewer slices than a team has workers": (
        "workers = 4",
        "workers = 4\nsequence = 3\nsequence_slices = 2",
        "demo.toml: parallel.sequence_slices (2) is smaller than parallel.sequence (3): every worker of "
        "a team needs a slice, so raise sequence_slices or lower sequence.",
    ),
    "a sequence divided among workers that keep no sums": (
        "workers = 4",
        'workers = 4\nsequence = 2\nsharding = "zero2"',
        "demo.toml: parallel.sequence needs workers that keep all parameters and sums of their stage: set "
        "parallel.sharding to ddp or zero1 without parallel.offload, or remove parallel.sequence and "
        "parallel.sequence_slices.",
    ),
    "no stages": (
        "workers = 4",
        "workers = 4\nstages = 0",
        'demo.toml: parallel.stages must be "auto" or a whole number of at least 1, not 0.',
    ),
    "negative layer": (
        "",
        "[precision]\nrecompute = [-1]\n",
        'demo.toml: precision.recompute must be "none", "all", "auto" or a list of layer numbers, counted '
        "from 0, "
        "not [-1].",
    ),
    "unknown choice": (
        "",
        '[precision]\nautocast = "fp8"\n',
        'demo.toml: precision.autocast must be one of "none", "bf16", not "fp8".',
    ),
    "text for a switch": (
        "",
        '[metrics]\nenabled = "yes"\n',
        'demo.toml: metrics.enabled must be true or false, not "yes".',
    ),
    "port out of range": (
        "",
        "[metrics]\nport = 70000\n",
        "demo.toml: metrics.port must be at most 65535, not 70000.",
    ),
    "keep nothing": (
        "",
        "[checkpoint]\nkeep = 0\n",
        "demo.toml: checkpoint.keep must be greater than 0, not 0.",
    ),
    "two GPUs for a worker": (
        "workers = 4",
        "workers = 4\ngpus_per_worker = 2",
        "demo.toml: parallel.gpus_per_worker must be at most 1, not 2.",
    ),
    "value for a section": (
        "[model]\narguments = { width = 8 }\n",
        "[model]\narguments = 3\n",
        "demo.toml: model.arguments must be a table, not 3.",
    ),
    "table for a list of tables": (
        "",
        '[faults]\nstep = 1\nworker = 0\nat = "reduce"\n',
        "demo.toml: faults must be a list, not a table.",
    ),
    "builder without a colon": (
        "[model]",
        '[model]\nbuild = "jobs.models.gpt.build"',
        'demo.toml: model.build must have the form "package.module:function", not "jobs.models.gpt.build".',
    ),
    "argument that the runtime sets": (
        "",
        "[data.arguments]\nseed = 3\n",
        "demo.toml: data.arguments.seed is set by run.seed: remove it from [data.arguments].",
    ),
    "min_workers above workers": (
        "workers = 4",
        "workers = 4\nmin_workers = 5",
        "demo.toml: parallel.min_workers (5) is larger than parallel.workers (4): lower min_workers or raise "
        "workers.",
    ),
    "stages above workers": (
        "workers = 4",
        "workers = 4\nstages = 5",
        "demo.toml: parallel.stages (5) is larger than parallel.workers (4): every stage needs a worker, so "
        "lower stages or raise workers.",
    ),
    "warm-up as long as the run": (
        "learning_rate = 1",
        "learning_rate = 1\nwarmup_steps = 10",
        "demo.toml: optimizer.warmup_steps (10) is not below run.steps (10): lower warmup_steps or raise "
        "steps.",
    ),
    "warm-up longer than the decay": (
        "learning_rate = 1",
        "learning_rate = 1\nwarmup_steps = 5\ndecay_steps = 4",
        "demo.toml: optimizer.warmup_steps (5) is not below optimizer.decay_steps (4): lower warmup_steps or "
        "raise decay_steps.",
    ),
    "fault of an unknown worker": (
        "",
        FAULT.format(1, 4, "forward"),
        "demo.toml: faults.0.worker (4) does not exist: parallel.workers is 4 and workers count from 0, so "
        "name one from 0 to 3.",
    ),
    "fault after the end": (
        "",
        FAULT.format(1, 3, "gather") + FAULT.format(11, 1, "forward"),
        "demo.toml: faults.1.step (11) is never reached: run.steps is 10, so name a step from 1 to 10.",
    ),
    "fault before the start": (
        "",
        FAULT.format(0, 1, "forward"),
        "demo.toml: faults.0.step must be greater than 0, not 0.",
    ),
    "fault at an unknown point": (
        "",
        FAULT.format(1, 1, "lunch"),
        'demo.toml: faults.0.at must be one of "forward", "backward", "reduce", "exchange", "optimizer", '
        '"gather", "backup", "checkpoint", not "lunch".',
    ),
    "micro-batch where there is none": (
        "",
        FAULT.format(1, 1, "gather") + "micro_batch = 1\n",
        "demo.toml: faults.0.micro_batch has no meaning at 'gather': remove it, or set faults.0.at to "
        '"forward" or "backward".',
    ),
    "fault of an unknown micro-batch": (
        "",
        FAULT.format(1, 1, "forward") + "micro_batch = 8\n",
        "demo.toml: faults.0.micro_batch (8) does not exist: parallel.micro_batches is 8, so name one from 0 "
        "to 7.",
    ),
    "misspelt key in a list": (
        "",
        FAULT.format(1, 1, "forward") + "micro_bach = 1\n",
        "demo.toml: faults.0.micro_bach is not a known key; did you mean faults.0.micro_batch?",
    ),
    "syntax error": (
        "steps = 10",
        "steps = ",
        "demo.toml: not valid TOML, invalid value (at line 3, column 9): mend that line.",
    ),
    "skippipe without paths": (
        "workers = 4",
        'workers = 4\nschedule = "skippipe"',
        'demo.toml: parallel.schedule = "skippipe" and [paths] belong together: give both, or neither.',
    ),
    "paths without skippipe": (
        "",
        "[paths]\nstages = 4\ntaken = 3\n",
        'demo.toml: parallel.schedule = "skippipe" and [paths] belong together: give both, or neither.',
    ),
    "key given twice": (
        "workers = 4",
        "workers = 4\nworkers = 5",
        "demo.toml: not valid TOML, cannot overwrite a value (at line 14, column 12): mend that line.",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_recipe_is_refused_in_one_sentence(good: Path, old: str, new: str, message: str) -> None:
    right = good.read_text()
    assert old in right
    good.write_text(right.replace(old, new, 1) if old else f"{right}\n{new}")
    with pytest.raises(RecipeError) as refusal:
        load_recipe(good)
    assert str(refusal.value) == message
    assert "\n" not in message


WRONG_OVERRIDES = {
    "workers": "--set workers: write it as key=value, such as parallel.workers=6.",
    "=3": "--set =3: write it as key=value, such as parallel.workers=6.",
    "parallel..workers=3": "--set parallel..workers=3: write it as key=value, such as parallel.workers=6.",
    "run.seed.x=3": "--set run.seed.x: run.seed is a value and has no keys; set it itself.",
    "faults.0.step=3": "--set: faults must be a list, not a table.",
    "run.name='a": "--set run.name='a: the value is not valid TOML; put text in quotes.",
    "run.name=": "--set run.name=: the value is not valid TOML; put text in quotes.",
    "parallel.wrokers=3": "--set: parallel.wrokers is not a known key; did you mean parallel.workers?",
    "parallel.workers=many": '--set: parallel.workers must be a whole number, not "many".',
    "parallel.min_workers=9": (
        "demo.toml: parallel.min_workers (9) is larger than parallel.workers (4): lower min_workers or raise "
        "workers."
    ),
}


@pytest.mark.parametrize(("setting", "message"), WRONG_OVERRIDES.items())
def test_wrong_override_is_refused(good: Path, setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        load_recipe(good, [setting])
    assert str(refusal.value) == message


def test_override_of_a_list_element_that_is_not_there(good: Path) -> None:
    fault = 'faults=[{step=3, worker=1, at="reduce"}]'
    for part in ("1", "x", "-1"):
        with pytest.raises(RecipeError, match=rf"^--set faults\.{part}\.step: faults is a list of 1, so"):
            load_recipe(good, [fault, f"faults.{part}.step=1"])


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: there is no such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"cannot be read \(Is a directory\)"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"^latin\.toml: byte 8 is not UTF-8: save the file as UTF-8\.$"):
        load_recipe(tmp_path / "latin.toml")


def test_recipe_from_python_checks_combinations(good: Path) -> None:
    table = load_recipe(good).model_dump()
    table["parallel"]["min_workers"] = 5
    with pytest.raises(ValidationError, match=r"parallel\.min_workers \(5\) is larger"):
        Recipe.model_validate(table)
