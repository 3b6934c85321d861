"""What a sandbox costs: a command, against swe-rex's local runtime (which contains nothing); 64 at once; an episode, graded.

.venv/bin/pip install swe-rex
.venv/bin/python tests/bench/sandbox.py
"""

import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from random import Random

from aem_exp.config import instantiate, load
from aem_exp.sandboxes import Image, Limits
from aem_exp.sandboxes.bwrap import Bwrap

ROUNDS = 100


def ours() -> list[float]:
    """Milliseconds of `true`."""
    with Bwrap().open(Image(), Limits()) as sandbox:
        return [_timed(lambda: sandbox.run("true", 10)) for _ in range(ROUNDS)]


def theirs() -> list[float]:
    from swerex.deployment.local import LocalDeployment
    from swerex.runtime.abstract import BashAction, CreateBashSessionRequest

    async def measure() -> list[float]:
        deployment = LocalDeployment()
        await deployment.start()
        runtime = deployment.runtime
        await runtime.create_session(CreateBashSessionRequest())
        found = []
        for _ in range(ROUNDS // 4):
            began = time.perf_counter()
            await runtime.run_in_session(BashAction(command="true"))
            found.append(1e3 * (time.perf_counter() - began))
        await deployment.stop()
        return found

    return asyncio.run(measure())


def _timed(act) -> float:
    began = time.perf_counter()
    act()
    return 1e3 * (time.perf_counter() - began)


def many(count: int) -> float:
    """Seconds to start so many sandboxes, run ten commands in each, and close them; none may be lost."""
    began = time.perf_counter()
    with ExitStack() as stack, ThreadPoolExecutor(16) as threads:
        opened = list(threads.map(lambda _: stack.enter_context(Bwrap().open(Image(), Limits())), range(count)))
        for _ in range(10):
            codes = list(threads.map(lambda sandbox: sandbox.run("echo x >> f; cat f >/dev/null", 60).code, opened))
            assert codes == [0] * count
        for sandbox in opened:
            assert sandbox.get("f") == b"x\n" * 10
    return time.perf_counter() - began


def episodes(count: int = 10, **settings: str) -> list[float]:
    """Seconds of an episode of the scripted player: a look, an edit, finish, and its grading."""
    world = instantiate(load(["env=swe"]).env.make | settings)
    env, found = world.env(), []
    for task in world.tasks("dev")[:count]:
        began = time.perf_counter()
        turn = env.reset(task)
        while not turn.done:
            turn = env.step(world.expert(env, Random(0)))
        assert turn.metrics["won"] == 1
        found.append(time.perf_counter() - began)
    env.close()
    return found


def main() -> None:
    mine = ours()
    p95 = sorted(mine)[int(0.95 * len(mine))]
    print(f"a command            {statistics.median(mine):7.1f} ms (p95 {p95:.1f})")
    try:
        other = statistics.median(theirs())
        print(f"... in swe-rex       {other:7.1f} ms: {other / statistics.median(mine):.1f} x ours, in no sandbox")
    except ImportError:
        print("... in swe-rex       not installed: pip install swe-rex")
    start = [_timed(lambda: Bwrap().open(Image(), Limits()).__enter__().close()) for _ in range(20)]
    print(f"start and close      {statistics.median(start):7.1f} ms")
    print(f"64 at once, 640 commands {many(64):5.1f} s, none lost")
    played = episodes()
    print(f"an episode, graded   {statistics.median(played):7.2f} s (at most {max(played):.2f})")


if __name__ == "__main__":
    main()
