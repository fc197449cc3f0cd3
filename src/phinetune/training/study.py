"""A study of candidates in optuna's storage, which several processes and machines may share."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.errors import ConfigError, RunError, told_as
from phinetune.liveness import this_process

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

JOURNALS = (".log", ".journal", ".jsonl")  # endings of a journal file, which network file systems can share
FIELD, OWNER, BEAT = "field", "owner", "beat"
BEAT_EVERY = 60.0  # seconds between two signs of life of a process that trains a candidate
STALE = 15 * BEAT_EVERY  # without one for so long, a process of another host is taken for ended; clocks differ, too
TOLD = "optuna: "


@dataclass(frozen=True)
class Candidate:
    """A candidate as the study has it.

    Attributes:
        values: by key of the two dictionaries.
        scores: its losses by steps.
        state: `running`, `dropped` or `finished`.
        owner: the process that began it; empty if it ended before it could say so.
        beat: when its process last gave a sign of life, by that process's clock in seconds; None: it never did.
    """

    number: int
    values: Mapping[str, Any]
    scores: Mapping[int, float]
    state: str
    owner: Mapping[str, Any]
    beat: float | None = None

    @property
    def is_stale(self) -> bool:
        """Whether its process has given no sign of life for long."""
        return self.beat is not None and time.time() - self.beat > STALE


class Study:
    """A study, opened or made anew.

    Args:
        where: a file (SQLite, or a journal by its ending) or the URL of a database.
        name: the study's name there.
        listed: the values of the first candidates, by number; more may come later.
        ranges: from and to, by key; for candidates after those, optuna's TPE sampler looks for good values there.
        options: of other keys, all values that a candidate may have.
        field: what has to be the same for all that work on it.
        seed: of the sampler.

    Raises:
        ConfigError: optuna is not installed, or the storage can't be opened.
        RunError: the study there is of another run.
    """

    def __init__(
        self,
        where: str,
        name: str,
        *,
        listed: MutableMapping[int, Mapping[str, Any]],
        ranges: Mapping[str, tuple[float, float]],
        options: Mapping[str, Sequence[Any]],
        field: Mapping[str, Any],
        seed: int,
    ) -> None:
        optuna = _optuna()
        self.listed, self.ranges, self.options, self.seed = listed, ranges, options, seed
        with told_as(ConfigError, f"--study {where}"):
            self._storage = _storage(where)
            self._study = optuna.create_study(
                storage=self._storage, study_name=name, sampler=self._sampler(), load_if_exists=True
            )
            self._id = self._storage.get_study_id_from_name(name)
        self._check_field(where, _digest(field))

    def _check_field(self, where: str, field: str) -> None:
        found = self._study.user_attrs.get(FIELD)
        if found is None:
            self._study.set_user_attr(FIELD, field)
        elif found != field:
            raise RunError(
                f"{where}: the study there is of another run: rows, model, settings or candidates differ; delete the "
                "folder of that tune (or name another --study), or set the values back"
            )

    def _sampler(self) -> optuna.samplers.BaseSampler:
        """The listed values, then those of optuna's TPE sampler.

        It is seeded anew for each candidate, so that a study that was stopped comes to the values of one that was not.
        """
        import optuna

        listed, seed = self.listed, self.seed

        class Listed(optuna.samplers.TPESampler):
            """The listed values of a candidate, by its number."""

            def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
                return {}

            def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
                if trial.number in listed:
                    return listed[trial.number][param_name]
                fresh = optuna.samplers.TPESampler(seed=seed + trial.number, n_startup_trials=1)
                seen = _as_finished(study.get_trials(deepcopy=False), param_name, param_distribution)
                return fresh.sample_independent(seen, trial, param_name, param_distribution)

        return Listed()

    def candidates(self) -> list[Candidate]:
        """All candidates, by number."""
        return [_read(trial) for trial in self._study.get_trials(deepcopy=False)]

    def ask(self) -> Candidate:
        """Begin a candidate, which then belongs to this process."""
        trial = self._study.ask()  # the number first: another process may have asked a moment ago
        self._attribute(trial.number, OWNER, this_process())
        for key in self.listed.get(trial.number, self.ranges):
            if key in self.ranges:
                trial.suggest_float(key, *self.ranges[key], log=True)
            else:
                trial.suggest_categorical(key, self.options[key])
        begun: Candidate = self.candidates()[trial.number]
        return begun

    def take_over(self, number: int) -> None:
        """Go on with a candidate whose process has ended."""
        self._attribute(number, OWNER, this_process())

    @contextmanager
    def beating(self, number: int) -> Iterator[None]:
        """A context in which this process tells the others again and again that it trains a candidate."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_EVERY):
                with suppress(Exception):  # one sign that is lost is no reason to end a training
                    self._attribute(number, BEAT, time.time())

        self._attribute(number, BEAT, time.time())
        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def report(self, number: int, steps: int, loss: float) -> None:
        """A candidate's loss after so many steps."""
        trial = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        self._storage.set_trial_intermediate_value(trial, steps, math.inf if math.isnan(loss) else loss)

    def drop(self, number: int) -> None:
        """A candidate is out."""
        import optuna

        self._study.tell(number, state=optuna.trial.TrialState.PRUNED, skip_if_finished=True)

    def finish(self, number: int, loss: float) -> None:
        """A candidate has won."""
        self._study.tell(number, loss, skip_if_finished=True)

    def _attribute(self, number: int, key: str, value: Any) -> None:
        trial = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        self._storage.set_trial_user_attr(trial, key, value)


def _as_finished(trials: Sequence[Any], name: str, distribution: Any) -> optuna.Study:
    """A study in memory with each candidate's loss at its first look, by which all can be compared.

    In the race itself those that lead still run and those that lose are pruned. TPE would take the losers for good
    ones: it looks among trials that have ended, and counts running ones among the bad.
    """
    import optuna

    seen = optuna.create_study()
    for trial in trials:
        if trial.intermediate_values and name in trial.params:
            loss = trial.intermediate_values[min(trial.intermediate_values)]
            params, kinds = {name: trial.params[name]}, {name: distribution}
            seen.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=loss))
    return seen


def _read(trial: Any) -> Candidate:
    state = {"PRUNED": "dropped", "COMPLETE": "finished", "FAIL": "dropped"}.get(trial.state.name, "running")
    owner = trial.user_attrs.get(OWNER) or {}
    beat = trial.user_attrs.get(BEAT)
    return Candidate(trial.number, dict(trial.params), dict(trial.intermediate_values), state, owner, beat)


def check_installed() -> None:
    """Make sure that optuna is there.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("optuna") is None:
        raise ConfigError("candidates are kept by optuna, which is not installed; pip install 'phinetune[tune]'")


def _optuna() -> Any:
    """optuna, whose own log lines go where all of a library's go, and nowhere twice."""
    check_installed()
    import optuna

    optuna.logging.disable_default_handler()
    library = logging.getLogger("optuna")
    if not any(isinstance(one, _ToOurLog) for one in library.handlers):
        library.addHandler(_ToOurLog())
        library.propagate = False
    return optuna


class _ToOurLog(logging.Handler):
    """Hands optuna's lines to the run's log. What it tells of each candidate is told by phinetune itself."""

    def emit(self, record: logging.LogRecord) -> None:
        level = logging.DEBUG if record.levelno < logging.WARNING else record.levelno
        logger.log(level, "%s%s", TOLD, record.getMessage())


def _storage(where: str) -> Any:
    """The storage at a URL, or in a file."""
    from optuna import storages

    if "://" in where:
        return storages.RDBStorage(where)
    path = Path(where).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in JOURNALS:
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        return JournalStorage(JournalFileBackend(str(path)))
    return storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})


def _digest(field: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(field, sort_keys=True, default=str).encode()).hexdigest()
