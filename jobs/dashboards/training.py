"""The dashboard of training runs."""

from __future__ import annotations

from jobs.dashboards.panel import WINDOW, Dashboard, Mark, Panel, Row, Series, per, rate

RUN = "{{run}}"
WORKER = "{{run}} worker {{worker}}"

_busy = rate("run, worker", "reknit_worker_seconds_total", 'part="compute"')
_worker_steps = rate("run, worker", "reknit_worker_steps_total")
_compute = f"{_busy} / {_worker_steps}"
_pipeline = rate("run", "reknit_worker_seconds_total", 'part=~"compute|bubble|data_wait"')
_bubble = rate("run", "reknit_worker_seconds_total", 'part="bubble"')
_data_wait = rate("run, worker", "reknit_worker_seconds_total", 'part="data_wait"')
_part = rate("run, part", "reknit_worker_seconds_total")
_all_parts = rate("run", "reknit_worker_seconds_total")
_flops = rate("run", "reknit_model_flops_total")


def _quantile(share: float) -> str:
    return f"histogram_quantile({share}, {rate('le, run', 'reknit_step_seconds_bucket')})"


_OVERVIEW = Row(
    "Now",
    (
        Panel(
            "Progress",
            "The newest committed step, as a share of the step that the run is to end with.",
            "percentunit",
            (Series(f"{per('run', 'max', 'reknit_step')} / {per('run', 'max', 'reknit_target_step')}", RUN),),
            kind="stat",
            width=6,
            low=0,
            high=1,
        ),
        Panel(
            "Goodput since the start",
            "The share of the run's wall time that went into steps which count.",
            "percentunit",
            (Series(per("run", "max", "reknit_goodput_ratio"), RUN),),
            kind="stat",
            width=6,
            low=0,
            high=1,
        ),
        Panel(
            "Recoveries since the start",
            "Losses of workers that the run has recovered from.",
            "none",
            (Series(per("run", "max", "reknit_recoveries_total"), RUN),),
            kind="stat",
            width=6,
            low=0,
        ),
        Panel(
            "Badput since the start, by cause",
            "Seconds of wall time that trained nothing.",
            "s",
            (Series(per("run, cause", "max", "reknit_badput_seconds_total") + " > 0", "{{run}} {{cause}}"),),
            kind="bargauge",
            width=6,
            low=0,
        ),
    ),
)

_LEARNING = Row(
    "Learning",
    (
        Panel(
            "Loss",
            "Mean per token or sample: of the newest step, and on data that is never trained on.",
            "short",
            (
                Series(per("run", "max", "reknit_loss"), f"{RUN} training"),
                Series(per("run", "max", "reknit_held_out_loss"), f"{RUN} held out"),
            ),
            width=12,
        ),
        Panel(
            "Gradient norm",
            "Global norm of the newest step's gradient, before clipping.",
            "short",
            (Series(per("run", "max", "reknit_gradient_norm"), RUN),),
            width=6,
            low=0,
        ),
        Panel(
            "Learning rate",
            "That of the newest step.",
            "sci",
            (Series(per("run", "max", "reknit_learning_rate"), RUN),),
            width=6,
            low=0,
        ),
    ),
)

_SPEED = Row(
    "Speed",
    (
        Panel(
            "Step time",
            "Seconds from one committed step to the next: median and 95th percentile within the histogram's "
            "buckets, and the exact mean.",
            "s",
            (
                Series(_quantile(0.5), f"{RUN} median"),
                Series(_quantile(0.95), f"{RUN} 95%"),
                Series(
                    f"{rate('run', 'reknit_step_seconds_sum')} / {rate('run', 'reknit_step_seconds_count')}",
                    f"{RUN} mean",
                ),
            ),
            low=0,
        ),
        Panel(
            "Tokens",
            "Tokens trained on per second of wall time.",
            "suffix: tokens/s",
            (Series(rate("run", "reknit_tokens_total"), RUN),),
            low=0,
        ),
        Panel(
            "Samples",
            "Samples trained on per second of wall time.",
            "suffix: samples/s",
            (Series(rate("run", "reknit_samples_total"), RUN),),
            low=0,
        ),
        Panel(
            "Model FLOPs utilisation (MFU)",
            "The model's floating-point operations in committed steps, over what the workers' devices could "
            "have done meanwhile (dense peak of the precision in use). Operations are counted from the "
            "layers; what is computed again counts once. Empty where a device's peak is not known and the "
            "recipe names none (metrics.peak_flops).",
            "percentunit",
            (Series(f"{_flops} / {per('run', 'sum', 'reknit_peak_flops')}", RUN),),
            width=12,
            low=0,
        ),
        Panel(
            "Model FLOP/s",
            "The model's floating-point operations per second of wall time, on all workers together.",
            "flops",
            (Series(_flops, RUN),),
            width=12,
            low=0,
        ),
    ),
)

_GOODPUT = Row(
    "Goodput",
    (
        Panel(
            "Where the wall time goes",
            "Shares of the wall time: productive, and what trained nothing, by cause.",
            "percentunit",
            (
                Series(rate("run", "reknit_goodput_seconds_total"), f"{RUN} productive"),
                Series(rate("run, cause", "reknit_badput_seconds_total"), "{{run}} {{cause}}"),
            ),
            stacked=True,
            width=12,
            low=0,
            high=1,
        ),
        Panel(
            "Recoveries, by phase",
            "Seconds of recovery since the start: until a loss was noticed, until the survivors agreed on a "
            "step, planning, moving state, and work of the step that was done again.",
            "s",
            (Series(per("run, phase", "max", "reknit_recovery_seconds_total"), "{{run}} {{phase}}"),),
            stacked=True,
            width=12,
            low=0,
        ),
    ),
)

_MEMBERS = Row(
    "Membership",
    (
        Panel(
            "Workers",
            "Workers that have work.",
            "none",
            (Series(per("run", "max", "reknit_workers"), RUN),),
            low=0,
        ),
        Panel(
            "Generation",
            "Counts changes of who does what: losses, joins, leaves, and work divided anew.",
            "none",
            (Series(per("run", "max", "reknit_generation"), RUN),),
            low=0,
        ),
        Panel(
            "Losses and repeats",
            "Since the start: recoveries, lost workers that prepare data, and steps computed again because a "
            "gradient outgrew its scale.",
            "none",
            (
                Series(per("run", "max", "reknit_recoveries_total"), f"{RUN} recoveries"),
                Series(per("run", "max", "reknit_feed_workers_lost_total"), f"{RUN} feed workers lost"),
                Series(per("run", "max", "reknit_step_repeats_total"), f"{RUN} repeated steps"),
            ),
            low=0,
        ),
    ),
)

_PIPELINE = Row(
    "Pipeline and workers",
    (
        Panel(
            "Pipeline bubble",
            "The share of the workers' time in forward and backward spent waiting for other stages.",
            "percentunit",
            (Series(f"{_bubble} / {_pipeline}", RUN),),
            low=0,
            high=1,
        ),
        Panel(
            "Where the workers' time goes",
            "Shares of the workers' steps, all workers together: forward and backward, the bubble, waits for "
            "data and for copies of the last version, and the rounds of messages at a step's end.",
            "percentunit",
            (Series(f"{_part} / on (run) group_left {_all_parts}", "{{run}} {{part}}"),),
            stacked=True,
            low=0,
            high=1,
        ),
        Panel(
            "Worker skew",
            "How much longer the busiest worker computes in a step than the mean one: 0 is an even division.",
            "percentunit",
            (Series(f"max by (run) ({_compute}) / avg by (run) ({_compute}) - 1", RUN),),
            low=0,
        ),
        Panel(
            "Compute per step, by worker",
            "Seconds of forward and backward in a step.",
            "s",
            (Series(_compute, WORKER),),
            low=0,
        ),
        Panel(
            "Speed, by worker",
            "Beside the usual one for the same layers: 1 is usual, 0.5 takes twice as long. What is within a "
            "quarter of the others counts as usual.",
            "short",
            (Series(per("run, worker", "max", "reknit_worker_speed_ratio"), WORKER),),
            low=0,
        ),
        Panel(
            "Steps, by worker",
            "Steps per second that a worker took part in.",
            "suffix: steps/s",
            (Series(_worker_steps, WORKER),),
            low=0,
        ),
    ),
)

_FABRIC = Row(
    "Fabric and memory",
    (
        Panel(
            "Sent, by worker",
            "Bytes per second that go out to other workers and the controller.",
            "Bps",
            (
                Series(
                    rate("run, worker", "reknit_worker_fabric_bytes_total", 'direction="sent"'),
                    WORKER,
                ),
            ),
            low=0,
        ),
        Panel(
            "Received, by worker",
            "Bytes per second that come in from other workers and the controller.",
            "Bps",
            (
                Series(
                    rate("run, worker", "reknit_worker_fabric_bytes_total", 'direction="received"'),
                    WORKER,
                ),
            ),
            low=0,
        ),
        Panel(
            "Memory, by purpose",
            "The largest worker's: parameters, gradient sums, the versions of shards and backups that it "
            "keeps, and the most that has waited in its inbox.",
            "bytes",
            (Series(per("run, kind", "max", "reknit_worker_memory_bytes"), "{{run}} {{kind}}"),),
            low=0,
        ),
    ),
)

_SAFETY = Row(
    "Snapshots and checkpoints",
    (
        Panel(
            "Snapshot lag",
            "From the end of a step until the copies of its state were in another failure domain; the "
            "slowest worker's. Until then a loss costs a step.",
            "s",
            (Series(per("run", "max", "reknit_worker_snapshot_lag_seconds"), RUN),),
            low=0,
        ),
        Panel(
            "Checkpoint lag",
            "Steps that the newest durable checkpoint is behind.",
            "suffix: steps",
            (
                Series(
                    f"{per('run', 'max', 'reknit_step')} - {per('run', 'max', 'reknit_checkpoint_step')}", RUN
                ),
            ),
            low=0,
        ),
        Panel(
            "Checkpoint age",
            "Seconds since the newest durable checkpoint, or since the start where there is none yet.",
            "s",
            (Series(f"time() - {per('run', 'max', 'reknit_checkpoint_time_seconds')}", RUN),),
            low=0,
        ),
    ),
)

_DATA = Row(
    "Data",
    (
        Panel(
            "Data wait",
            "The share of the wall time in which workers waited for data.",
            "percentunit",
            (Series(rate("run", "reknit_badput_seconds_total", 'cause="data_wait"'), RUN),),
            width=12,
            low=0,
        ),
        Panel(
            "Data wait per step, by worker",
            "Seconds of a step that a worker waits for data; only the first and the last stage read any.",
            "s",
            (Series(f"{_data_wait} / {_worker_steps}", WORKER),),
            width=12,
            low=0,
        ),
    ),
)

TRAINING = Dashboard(
    uid="reknit-training",
    title="Reknit training",
    description="Runs under way: what they learn, how fast, and what losses of workers cost them.",
    known_by="reknit_step",
    rows=(_OVERVIEW, _LEARNING, _SPEED, _GOODPUT, _MEMBERS, _PIPELINE, _FABRIC, _SAFETY, _DATA),
    marks=(
        Mark(
            "Recoveries",
            f'max by (run) (increase(reknit_recoveries_total{{run=~"$run"}}[{WINDOW}])) > 0',
            "{{run}}: a worker was lost",
        ),
    ),
)
