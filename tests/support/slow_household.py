"""A household whose steps take $SLOW seconds, so that tests can interrupt a run. Responses that begin with $BREAKS_AT raise."""

import os
import time
from typing import Any

from aem_exp.envs import Turn
from aem_exp.envs.household import Household


class SlowHousehold(Household):
    def env(self) -> Any:
        env = super().env()
        step = env.step

        def slowly(response: str) -> Turn:
            time.sleep(float(os.environ.get("SLOW", "0")))
            if response.startswith(os.environ.get("BREAKS_AT", "\0")):
                raise OSError("the house burnt down")
            return step(response)

        env.step = slowly
        return env
