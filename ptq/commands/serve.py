"""``ptq serve``."""

from __future__ import annotations

import click


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(1, 65535), default=9090, show_default=True)
def serve(host: str, port: int) -> None:
    """Let ptq tune --rpc of another machine measure on this machine's GPU, through TVM's RPC.

    Whoever can reach the port can run code here: listen at an address that only you reach.
    """
    import threading

    from tvm_backend.gpu.machines import served

    with served(host, port) as taken:
        click.echo(f"listening at {host}:{taken}; stop with Ctrl-C")
        threading.Event().wait()
