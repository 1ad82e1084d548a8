"""``planish demo``."""

from __future__ import annotations

from planish.cli.options import Demo
from planish.deploy.classify import Classifier
from planish.errors import PlanishError


def execute(command: Demo) -> None:
    """Serve the page until Ctrl-C."""
    if command.threads < 1:
        raise PlanishError(f"--threads is {command.threads}: give 1 or more")
    try:
        from planish.deploy import demo
    except ImportError as error:
        raise PlanishError(
            f"planish demo needs {error.name}, which is not installed: pip install planish[demo]"
        ) from error
    with demo.listen(command.port) as bound:
        paths = [path for path in (command.against, command.model) if path is not None]
        app = demo.make_app([Classifier(path, command.threads) for path in paths])
        host, port = bound.getsockname()
        print(f"http://{host}:{port}/ asks {' and '.join(map(str, paths))}; Ctrl-C ends it", flush=True)
        try:
            demo.make_server(app).run(sockets=[bound])
        except KeyboardInterrupt:  # the usual end
            print()
