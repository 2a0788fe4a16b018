"""``atlas health``: can the service work, part by part."""

import json
from dataclasses import asdict

import click

from atlas.settings import load_settings


@click.command()
@click.option("--worker", is_flag=True, help="Also: has a worker on this machine spoken in the last minute?")
@click.option("--worker-name", metavar="NAME", help="With --worker: the one of this name.")
@click.option("--app", is_flag=True, help="Also: does the app on this machine answer?")
@click.option("--app-port", default=8501, show_default=True, type=click.IntRange(1, 65535), help="Its port.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def health(worker: bool, worker_name: str | None, app: bool, app_port: int, as_json: bool) -> int:
    """Check the database, the disk and, where one is set, the broker; exit 1 when something is wrong."""
    from atlas.observe.health import check_health

    asked_port = app_port if app else None
    checks = check_health(load_settings(), worker=worker, worker_name=worker_name, app_port=asked_port)
    well = all(check.ok for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": well, "checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            click.echo(f"{'ok' if check.ok else 'FAILED':7} {check.name:9} {check.said}")
    return 0 if well else 1
