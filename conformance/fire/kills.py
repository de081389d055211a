"""kill -9 at random moments under mixed load: nothing acknowledged is lost, nothing is half there."""

from __future__ import annotations

import random
import time

from conformance.fire.load import Load
from conformance.fire.running import VICTIMS, Server
from conformance.fire.scene import Finding, Scene, whole

QUICK_S = (0.1, 1.2)  # of load before a kill


def kills(scene: Scene) -> list[Finding]:
    """Kill `scene.kills` times: web workers, the job worker, the supervisor, the whole group in turn."""
    chance = random.Random(scene.seed)
    done: dict[str, int] = {}
    with Server(scene.data, scene.settings) as server:
        with Load(server, may_refuse=True, seed=scene.seed) as load:
            found = []
            for number in range(scene.kills):
                time.sleep(chance.uniform(*QUICK_S))
                victim = VICTIMS[number % len(VICTIMS)] if number < 8 else chance.choice(VICTIMS)
                what = server.kill(victim, chance.choice)
                done[victim] = done.get(victim, 0) + 1
                load.rest()
                broken = load.violations + server.verify()
                scene.say(f"kill {number + 1}: {what}; {load.acknowledged} acknowledged, {load.cuts} cut")
                if broken:
                    found.append(Finding(f"kill {number + 1}, {what}", broken))
                    break
                load.go_on()
            load.rest()
            counted = load.answers
        errors = server.errors()
        status = server.stop()
    return [
        *found,
        Finding(
            f"{sum(done.values())} kills ({', '.join(f'{count} {who}' for who, count in sorted(done.items()))}), "
            f"{load.acknowledged} acknowledged writes, {load.cuts} cut: all as the model says",
            load.violations,
        ),
        Finding("the load was mixed", _unmixed(counted)),
        Finding("no 500 and no traceback", [key for key in counted if key.endswith(" 500")] + errors[:3]),
        *whole(server),
        Finding("a polite stop ends with 0", [] if status == 0 else [f"status {status}"]),
    ]


def _unmixed(counted: dict[str, int]) -> list[str]:
    verbs = {key.split()[0] for key, count in counted.items() if count and key.split()[1][0] == "2"}
    wanted = {"PUT", "DELETE", "MKCOL", "MOVE", "COPY", "PROPPATCH", "LOCK", "UNLOCK"}
    return [f"no {verb} was acknowledged" for verb in sorted(wanted - verbs)]
