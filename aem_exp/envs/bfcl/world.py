"""Multi-turn tasks of BFCL: a scripted user asks for several things, and the agent calls Python functions.

A turn of the user ends with a response that contains no calls. The checks are the benchmark's: after each turn of the user, the
objects must have the same state as after the correct calls, and the results must contain those of the correct calls.
"""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, Literal, get_args

from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task, Turn, fingerprint_of
from aem_exp.envs.bfcl.calls import Call, find_text, parse_calls
from aem_exp.envs.bfcl.wheel import VERSION, fetch_wheel, find_wheel, load_modules, read_functions, read_rows

RULES_VERSION: Final = 1  # raise when the same task would read or play differently
Category = Literal["base", "miss_func", "miss_param", "long_context"]
CATEGORIES: Final = get_args(Category)
MAX_STEPS: Final = 20  # responses with calls in one turn of the user; one more fails the task, as in the benchmark
NEW_FUNCTIONS: Final = "There are more functions now. Please try again with them."
DONE: Final = "Done."
FOLDS: Final = 8  # of each 8 consecutive numbers, 6 are for training, one is for dev, and one is for test


class _Objects:
    """The objects whose functions are called in a task."""

    def __init__(self, world: "Bfcl", row: dict[str, Any]):
        modules = load_modules(world.file)
        long_context, config = "long_context" in row["id"], row["initial_config"]
        self.by_class = {api: modules.make(api, config.get(api, {}), long_context) for api in row["involved_classes"]}
        self._functions: dict[str, Callable[..., Any]] = {}
        for api, made in self.by_class.items():
            names = [function["name"] for function in read_functions(world.file, api)]
            self._functions |= {name: getattr(made, name) for name in names if hasattr(made, name)}

    def call(self, call: Call) -> str:
        """The result of a call, or its error, in the benchmark's words."""
        try:
            if call.name not in self._functions:
                raise NameError(f"name '{call.name}' is not defined")
            result = self._functions[call.name](*call.args, **call.kwargs)
        except Exception as error:  # of any type: the functions check little, and the agent should read what was wrong
            return f"Error during execution: {error}"
        if isinstance(result, dict):
            try:
                return json.dumps(result)
            except (TypeError, ValueError):
                return str(result)
        return str(result)

    def knows(self, calls: Sequence[Call]) -> bool:
        """Whether all these functions exist."""
        return all(call.name in self._functions for call in calls)


class BfclEnv:
    """One conversation."""

    def __init__(self, world: "Bfcl"):
        self._world, self.goal, self._is_over = world, "", True

    def parse(self, response: str) -> str:
        return find_text(response)

    def reset(self, task: Task) -> Turn:
        self.task = task
        self._row, self._correct = self._world.find_row(task)
        self._agent, self._reference = _Objects(self._world, self._row), _Objects(self._world, self._row)
        self._user_turn, self._steps, self._passed, self._is_over = 0, 0, 0, False
        self._results: list[str] = []  # of all calls of the agent so far
        held_back = {name for names in self._row.get("missed_function", {}).values() for name in names}
        self.goal = self._describe(lambda name: name not in held_back)
        return self._turn(self._message())

    def step(self, response: str) -> Turn:
        calls, before = parse_calls(response), self._paid()
        if self._is_over:
            observation = ""
        elif calls:
            results = [self._agent.call(call) for call in calls]
            self._results += results
            self._steps += 1
            self._is_over = self._steps > MAX_STEPS
            observation = "\n".join(results)
        else:
            observation = self._end_user_turn()
        malformed = calls is None and find_text(response).startswith("[")
        admissible = bool(calls) and self._agent.knows(calls or ())
        reward = self._world.reward * (self._paid() - before)
        metrics = {"calls": float(len(calls or ())), "admissible": float(admissible)}
        return self._turn(observation, reward, not malformed, metrics)

    def close(self) -> None:
        """Nothing to release."""

    def correct_response(self) -> str:
        """The correct response in the current state, if all responses before it were correct."""
        correct = self._correct[self._user_turn] if not self._is_over else []
        return f"[{', '.join(correct)}]" if correct and not self._steps else DONE

    def functions(self) -> list[dict[str, Any]]:
        """The descriptions of the functions of the task."""
        return [one for api in self._row["involved_classes"] for one in read_functions(self._world.file, api)]

    @property
    def won(self) -> bool:
        return self._passed == len(self._correct)

    def _end_user_turn(self) -> str:
        """Check the user's turn that ends now; return the next message."""
        if self._passed == self._user_turn and self._is_correct():
            self._passed += 1
        self._user_turn, self._steps = self._user_turn + 1, 0
        self._is_over = self._user_turn == len(self._correct)
        return "" if self._is_over else self._message()

    def _is_correct(self) -> bool:
        """Whether the benchmark's checks pass for the current turn of the user."""
        correct = self._correct[self._user_turn]
        results = [self._reference.call(call) for text in correct for call in parse_calls(text) or ()]
        if not correct:
            return True
        modules = load_modules(self._world.file)
        return bool(
            self._steps
            and modules.state_checker(self._agent.by_class, self._reference.by_class)["valid"]
            and modules.response_checker(self._results, results, self._user_turn)["valid"]
        )

    def _message(self) -> str:
        """What the user says in the current turn."""
        if names := self._row.get("missed_function", {}).get(str(self._user_turn)):
            return f"{self._describe(lambda name: name in names)}\n{NEW_FUNCTIONS}"
        return "\n".join(message["content"] for message in self._row["question"][self._user_turn])

    def _describe(self, wanted: Callable[[str], bool]) -> str:
        """The descriptions of functions, one JSON object per line."""
        return "\n".join(json.dumps(function) for function in self.functions() if wanted(function["name"]))

    def _paid(self) -> float:
        """What the conversation has paid so far, without the factor."""
        return self._passed / len(self._correct) if self._world.pays == "score" else float(self.won)

    def _turn(
        self, observation: str, reward: float = 0.0, valid: bool = True, metrics: dict[str, float] | None = None
    ) -> Turn:
        outcome = {"won": float(self.won), "score": self._passed / len(self._correct)}
        return Turn(observation, reward, self._is_over, False, valid, None, {**outcome, **(metrics or {})})


class Bfcl:
    """800 conversations: 200 in each of four categories.

    The four variants of a conversation are in the same split: 600 are for training, 100 for dev, 100 for test. The benchmark
    itself has no training split, so numbers of a trained policy do not belong on its leaderboard.

    Args:
        categories: `base`; `miss_func`: a function is described later than it is needed; `miss_param`: the user gives a parameter
            later; `long_context`: results are long.
        data: folder with the benchmark's wheel; None: the cache, into which `prepare` fetches it.
        pays: `success` pays once; `score` pays each correct turn of the user, up to the first one that is not.
        reward: what a success pays.

    Raises:
        MissingResource: the wheel is missing.
    """

    own_process = True  # a call may take long
    splits = ("train", "dev", "test")

    def __init__(
        self,
        categories: Sequence[str] = CATEGORIES,
        data: str | None = None,
        pays: Literal["success", "score"] = "success",
        reward: float = 1.0,
    ):
        for category in categories:
            if category not in CATEGORIES:
                raise ConfigError("env.make.categories", category, choices=CATEGORIES)
        if not categories or len(set(categories)) < len(categories):
            raise ConfigError("env.make.categories", ",".join(categories), "must name each category once")
        self.categories, self.pays, self.reward = list(categories), pays, reward
        self.file = find_wheel(data)
        self.fingerprint = fingerprint_of("bfcl", [RULES_VERSION, VERSION, self.categories, pays, reward])

    @classmethod
    def prepare(cls, say: Callable[[str], None], data: str | None = None, **_: Any) -> None:
        """Fetch the benchmark's wheel."""
        fetch_wheel(data, say)

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        tasks = []
        for number in range(len(read_rows(self.file, "base")[0])):
            fold = number % FOLDS
            if split == ("train" if fold < FOLDS - 2 else "dev" if fold == FOLDS - 2 else "test"):
                tasks += [
                    Task(f"{category}_{number}", number, category, {"category": category, "number": number})
                    for category in self.categories
                ]
        return tasks

    def find_row(self, task: Task) -> tuple[dict[str, Any], list[list[str]]]:
        """The row of a task, and the correct calls of each turn of the user."""
        rows, answers = read_rows(self.file, task.payload["category"])
        return rows[task.payload["number"]], answers[task.payload["number"]]

    def env(self) -> BfclEnv:
        return BfclEnv(self)

    def oracle(self, env: BfclEnv) -> str:
        """The correct calls of each turn of the user in one response."""
        return env.correct_response()

    def random_action(self, env: BfclEnv, random: Random) -> str:
        """The response of the random agent: a call without arguments, or no call."""
        return random.choice([DONE, f"[{random.choice(env.functions())['name']}()]"])
