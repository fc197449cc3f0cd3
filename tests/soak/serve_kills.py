"""A scripted day of `phinetune serve` in which the server or a job's process is killed at random moments.

    python tests/soak/serve_kills.py --kills 200 --seed 0

After each restart every acknowledged upload, job and answer is there, no job has two processes, and no step is told
twice. Conversations go on from answers of before the kill. At the end every job that was not cancelled has succeeded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from helpers import chat  # noqa: E402
from serving.serving_helpers import ServerProcess  # noqa: E402

ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class Day:
    """What clients were told."""

    server: ServerProcess
    client: openai.OpenAI
    draw: random.Random
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)  # what was last asked of each: train, pause, cancel
    responses: dict[str, str] = field(default_factory=dict)  # their texts
    chats: dict[str, str] = field(default_factory=dict)  # texts of chat completions with `store`
    kills: dict[str, int] = field(default_factory=lambda: {"server": 0, "job": 0})
    unheard: int = 0

    def act(self) -> None:
        """Something that a client does. The server may be gone in the middle of it."""
        try:
            self.draw.choice((self.upload, self.create, self.create, self.steer, self.look, self.talk, self.chat))()
        except (openai.APIConnectionError, httpx2.HTTPError):  # the second one in the middle of a stream
            self.unheard += 1

    def upload(self) -> None:
        rows = [chat(f"Say {self.draw.random()}", f"It is {i}.") for i in range(self.draw.randint(4, 16))]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.files[self.client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id] = content

    def create(self) -> None:
        waiting = [one for one in self.client.fine_tuning.jobs.list(limit=20).data if one.status not in ENDED]
        if not self.files or len(waiting) > 4:
            return self.look()
        file = self.draw.choice(list(self.files))
        hyper = {"n_epochs": self.draw.randint(2, 8), "batch_size": 2}
        job = self.client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters=hyper, seed=1)
        self.jobs[job.id] = "train"
        return None

    def steer(self) -> None:
        """Pause a job and resume it; one in ten is cancelled."""
        jobs = self.client.fine_tuning.jobs
        if not self.jobs:
            return
        job = self.draw.choice(list(self.jobs))
        with suppress(openai.BadRequestError):  # it has ended
            if self.draw.random() < 0.1:
                jobs.cancel(job)
                self.jobs[job] = "cancel"
            else:
                jobs.pause(job)
                jobs.resume(job)

    def look(self) -> None:
        for job in list(self.jobs)[-3:]:
            self.client.fine_tuning.jobs.list_events(job, limit=5)

    def talk(self) -> None:
        """Say something, or go on from something that was said before; base and tuned models answer."""
        before = self.draw.choice(list(self.responses)) if self.responses and self.draw.random() < 0.7 else None
        more: dict[str, Any] = {"previous_response_id": before} if before else {}
        made = self.client.responses.create(
            model=self.model(), input="and now?", max_output_tokens=4, temperature=0, **more
        )
        self.responses[made.id] = made.output_text

    def chat(self) -> None:
        asked: Any = [{"role": "user", "content": f"Say {self.draw.random()}"}]
        stream = self.client.chat.completions.create(
            model=self.model(), messages=asked, max_tokens=4, store=True, stream=True
        )
        chunks = list(stream)
        self.chats[chunks[0].id] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def model(self) -> str:
        """The base, or what a job has made of it."""
        jobs = [self.client.fine_tuning.jobs.retrieve(job) for job in list(self.jobs)[:3]]
        return self.draw.choice(["tiny", *(one.fine_tuned_model for one in jobs if one.fine_tuned_model)])

    def kill(self) -> None:
        """Kill the server and start it again, or kill a process that trains."""
        trains = self.training()
        if trains and self.draw.random() < 0.5:
            with suppress(psutil.NoSuchProcess):
                os.kill(self.draw.choice(trains).pid, signal.SIGKILL)
            self.kills["job"] += 1
            return
        self.server.kill()
        self.kills["server"] += 1
        time.sleep(self.draw.random())
        self.client = self.server.start()
        self.check()

    def training(self) -> list[psutil.Process]:
        """The processes that train a job of this server. Each config must be there once."""
        found: dict[str, psutil.Process] = {}
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            config = next((w for w in words if w.startswith(str(self.server.folder)) and w.endswith(".yaml")), None)
            if config and process.info["status"] != psutil.STATUS_ZOMBIE:
                assert config not in found, f"two processes train {config}"
                found[config] = process
        return list(found.values())

    def check(self, every: bool = False) -> None:
        """All that was acknowledged is there: files, jobs, and the newest of the answers.

        Args:
            every: look into all answers.
        """
        newest = slice(None) if every else slice(-50, None)
        for file, content in self.files.items():
            assert self.client.files.content(file).content == content, file
        for response, text in list(self.responses.items())[newest]:
            assert self.client.responses.retrieve(response).output_text == text, response
        for completion, text in list(self.chats.items())[newest]:
            kept = self.client.chat.completions.retrieve(completion)
            assert kept.choices[0].message.content == text, completion
        listed = {one.id: one for one in self.client.fine_tuning.jobs.list(limit=100)}
        for job, wish in self.jobs.items():
            seen = listed[job]
            assert seen.status != "failed", (job, seen.error)
            assert (seen.status == "cancelled") == (wish == "cancel"), (job, seen.status, wish)
            steps = [
                event.data["step"]
                for event in self.client.fine_tuning.jobs.list_events(job, limit=1000)
                if event.type == "metrics" and "train_loss" in event.data
            ]
            assert len(steps) == len(set(steps)), f"{job}: a step was told twice"

    def end(self, limit_s: float) -> dict[str, Any]:
        """Resume what is paused, and wait until every job has ended."""
        jobs, began = self.client.fine_tuning.jobs, time.monotonic()
        while True:
            left = [one for one in map(jobs.retrieve, self.jobs) if one.status not in ENDED]
            for one in left:
                if one.status == "paused":
                    jobs.resume(one.id)
            if not left:
                break
            assert time.monotonic() - began < limit_s, [one.to_dict() for one in left]
            time.sleep(1)
        self.check(every=True)
        for job, wish in self.jobs.items():
            done = jobs.retrieve(job)
            if wish == "train":
                assert done.status == "succeeded", (job, done.status)
                table = self.client.files.content(done.result_files[0]).text.splitlines()[1:]
                assert [int(line.split(",")[0]) for line in table] == list(range(1, len(table) + 1)), job
        told = {name: len(getattr(self, name)) for name in ("jobs", "files", "responses", "chats")}
        return {"kills": self.kills, **told, "unheard": self.unheard}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--every", type=float, default=12.0, help="mean seconds between two kills")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the day after so long, with its checks")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="serve-soak-"))
    server = ServerProcess(folder / "server")
    day = Day(server, server.start(), random.Random(given.seed))
    print(f"seed {given.seed}, {folder}", flush=True)
    started = time.monotonic()
    try:
        for number in range(1, given.kills + 1):
            until = time.monotonic() + day.draw.expovariate(1 / given.every)
            while time.monotonic() < until:
                day.act()
                time.sleep(day.draw.random() * 0.5)
            day.kill()
            print(f"kill {number}: {day.kills}, {len(day.jobs)} jobs, {len(day.files)} files", flush=True)
            if time.monotonic() - started > 60 * given.minutes:
                print(f"the day ends after {given.minutes:g} minutes", flush=True)
                break
        print(json.dumps(day.end(3600)))
    finally:
        server.kill()


if __name__ == "__main__":
    main()
