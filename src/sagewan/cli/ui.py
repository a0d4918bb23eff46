"""``sagewan ui``: the app in the browser."""

import argparse
import os
import threading
import webbrowser

from sagewan.cli.streams import say
from sagewan.errors import RequestError

_LOGIN = "SAGEWAN_AUTH"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it listens, and who may come in."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="127.0.0.1: this machine only; 0.0.0.0: all"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--auth",
        metavar="NAME:PASSWORD",
        help=f"ask for them; or set {_LOGIN}, which other users of this machine can't see",
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="also open it to the whole internet through gradio.live; needs --auth",
    )
    parser.add_argument("--no-browser", action="store_true", help="don't open a browser window")


def run(arguments: argparse.Namespace) -> int:
    """Serve until it is stopped."""
    from sagewan.ui.front import Site
    from sagewan.ui.serve import Address, listen, serve
    from sagewan.ui.uploads import prepare_folder

    login = _login(arguments.auth or os.environ.get(_LOGIN))
    if arguments.share and login is None:
        raise RequestError("share opens this machine to the whole internet: give --auth as well")
    listener = listen(arguments.host, arguments.port)
    address = Address(host=arguments.host, port=listener.getsockname()[1])
    loopback = arguments.host in _LOOPBACK and not arguments.share
    if login is None and not loopback:
        say("anyone who can reach this machine can use it: --auth asks for a password")

    def ready() -> None:
        print(f"sagewan is at {address.url} (Ctrl-C ends it)", flush=True)
        if not arguments.no_browser:
            threading.Thread(target=webbrowser.open, args=(address.url,), daemon=True).start()
        if arguments.share:
            threading.Thread(target=_share, args=(address.port,), daemon=True).start()

    prepare_folder()
    with listener:
        serve(listener, Site(login=login, loopback=loopback), ready)
    return 0


def _login(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise RequestError("auth: write NAME:PASSWORD")
    return name, password


def _share(port: int) -> None:
    import secrets

    from sagewan.ui.quick_gradio import import_gradio

    import_gradio()
    from gradio.networking import setup_tunnel

    try:
        url = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        say(f"share: gradio.live does not answer ({error}); the app runs on without it")
    else:
        print(f"shared at {url}, with the password, for 72 hours", flush=True)
