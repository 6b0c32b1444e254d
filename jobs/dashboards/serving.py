"""The dashboard of services.

Several addresses may lead to one ingress (Ray Serve's proxies), and each of them is scraped: so the largest
of equal series counts, never their sum.
"""

from __future__ import annotations

from jobs.dashboards.panel import Dashboard, Panel, Row, Series, per, rate

RUN = "{{run}}"
ANSWERS = 'route=~"/v1/(completions|caption)"'


def _quantile(share: float, metric: str, *conditions: str) -> str:
    return f"histogram_quantile({share}, {rate('le, run', metric, *conditions, how='max')})"


def _quantiles(metric: str, *conditions: str) -> tuple[Series, ...]:
    return tuple(
        Series(_quantile(share, metric, *conditions), f"{RUN} {name}")
        for share, name in ((0.5, "median"), (0.95, "95%"), (0.99, "99%"))
    )


SERVING = Dashboard(
    uid="reknit-serving",
    title="Reknit serving",
    description="Services under way: how long answers take, and who waits.",
    known_by="reknit_serve_replicas",
    rows=(
        Row(
            "Latency",
            (
                Panel(
                    "Answer latency",
                    "Seconds from a request to the end of its answer, within the histogram's buckets.",
                    "s",
                    _quantiles("reknit_serve_request_seconds_bucket", ANSWERS),
                    width=12,
                    low=0,
                ),
                Panel(
                    "Time to the first token",
                    "Seconds from a request to its first tokens; an answer that is not streamed comes in "
                    "larger pieces.",
                    "s",
                    _quantiles("reknit_serve_first_token_seconds_bucket"),
                    width=12,
                    low=0,
                ),
            ),
        ),
        Row(
            "Load",
            (
                Panel(
                    "Queue",
                    "Requests that the ingress has under way; sequences that wait for room in a replica, and "
                    "those that are generated, over all replicas.",
                    "none",
                    (
                        Series(per("run", "max", "reknit_serve_under_way"), f"{RUN} under way"),
                        Series(
                            f"sum by (run) ({per('run, process', 'max', 'reknit_serve_replica_waiting')})",
                            f"{RUN} waiting",
                        ),
                        Series(
                            f"sum by (run) ({per('run, process', 'max', 'reknit_serve_replica_running')})",
                            f"{RUN} running",
                        ),
                    ),
                    low=0,
                ),
                Panel(
                    "Requests, by status",
                    "Answers per second; 429 says that the queue was full, 503 that no replica could answer.",
                    "reqps",
                    (
                        Series(
                            rate("run, status", "reknit_serve_requests_total", ANSWERS, how="max"),
                            "{{run}} {{status}}",
                        ),
                    ),
                    stacked=True,
                    low=0,
                ),
                Panel(
                    "Tokens sent",
                    "Tokens per second that go to clients.",
                    "suffix: tokens/s",
                    (Series(rate("run", "reknit_serve_tokens_total", how="max"), RUN),),
                    low=0,
                ),
            ),
        ),
        Row(
            "Replicas",
            (
                Panel(
                    "Replicas",
                    "Replicas that answer.",
                    "none",
                    (Series(per("run", "max", "reknit_serve_replicas"), RUN),),
                    width=6,
                    low=0,
                ),
                Panel(
                    "Busy, by replica",
                    "The share of the time that a replica's engine computes.",
                    "percentunit",
                    (
                        Series(
                            rate("run, process", "reknit_serve_replica_busy_seconds", how="max"),
                            "{{run}} process {{process}}",
                        ),
                    ),
                    width=6,
                    low=0,
                    high=1,
                ),
                Panel(
                    "Checkpoint, by replica",
                    "Steps behind the newest checkpoint that a replica answers with.",
                    "suffix: steps",
                    (
                        Series(
                            per("run, process", "max", "reknit_serve_replica_version"),
                            "{{run}} process {{process}}",
                        ),
                    ),
                    width=6,
                    low=0,
                ),
                Panel(
                    "Answers continued elsewhere",
                    "Since the start: answers whose replica died, and which another one went on with.",
                    "none",
                    (Series(per("run", "max", "reknit_serve_continued"), RUN),),
                    width=6,
                    low=0,
                ),
            ),
        ),
    ),
)
