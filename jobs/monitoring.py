"""``reknit monitoring``: settings for a Prometheus and a Grafana that watch this user's runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from jobs.dashboards.files import local_files
from jobs.terminal import plain_console
from runtime.settings import targets_folder


def monitoring(
    output: str | Path = "monitoring",
    *,
    targets: str | Path | None = None,
    interval: str = "5s",
    token: str | Path | None = None,
    console: Console | None = None,
) -> Path:
    """Writes the files to ``output``, over older ones of the same names; returns Prometheus' own.

    ``targets``: where the runs say that they are (a recipe's ``metrics.targets``; default: this user's).
    ``interval`` is Prometheus' scrape interval. ``token`` is a file with the bearer token of services. Raises
    ValueError for a token's file that is not there.
    """
    folder = Path(output).expanduser().absolute()
    found = targets_folder() if targets is None else Path(targets).expanduser().absolute()
    bearer = None if token is None else Path(token).expanduser().absolute()
    if bearer is not None and not bearer.is_file():
        raise ValueError(f"{bearer} is no file: name one that holds the bearer token by --serve-token-file")
    found.mkdir(parents=True, exist_ok=True)  # Prometheus only watches a folder that is there
    for name, text in local_files(folder, found, interval=interval, token=bearer).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    console = console or plain_console()
    for line in (
        f"prometheus --config.file={folder / 'prometheus.yml'}",
        f"GF_PATHS_PROVISIONING={folder / 'grafana'} grafana server --homepath /usr/share/grafana",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return folder / "prometheus.yml"
