"""A stage as a job on a Ray cluster: sent, followed, stopped. It sends a command line and knows nothing of stages.

The working directory goes with it (recipe, task file, small data; not runs/ and models/), so the cluster runs
`python -m pipelines STAGE RECIPE` as it would be run here.
"""

import asyncio
import hashlib
import json
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from pipelines.console import console, say
from pipelines.errors import UserError

EXCLUDES = ["/runs", "/models", ".git", ".venv", "__pycache__", ".*_cache"]  # beside what .gitignore names
_POLL_S = 1.0
_WAKES_S = 4.0  # Ray's job manager looks after its jobs once a second


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Args:
        stage: a command of `distill` that takes a recipe.
        recipe: its path within the working directory, or the name of a shipped one.
        overrides: `key=value`, as given to --set.
        force: do it again, though it is done.
        resolved: the recipe with the overrides, as it is written into manifests.
    """

    stage: str
    recipe: str
    overrides: Sequence[str]
    force: bool
    resolved: dict[str, Any]

    def entrypoint(self) -> str:
        """The command line on the cluster.

        Raises:
            UserError: the recipe's file lies outside of what is uploaded, or its storage would be lost.
        """
        recipe, here = Path(self.recipe), Path.cwd()
        if recipe.is_file() and not recipe.resolve().is_relative_to(here.resolve()):
            raise UserError(f"recipe {self.recipe}: lies outside of {here}, which is uploaded; submit from its folder")
        storage = self.resolved["storage"]
        if "://" not in storage and not os.path.isabs(storage):
            raise UserError(
                f"storage {storage!r}: would lie in the job's own folder, which the cluster throws away; give a URI "
                "such as s3://bucket/prefix, or the absolute path of a folder that all nodes share"
            )
        sent = os.path.relpath(recipe.resolve(), here.resolve()) if recipe.is_file() else self.recipe
        command = ["python", "-m", "pipelines", self.stage, sent]
        for override in self.overrides:
            command += ["--set", override]
        return shlex.join(command + ["--force"] * self.force)

    @property
    def series(self) -> str:
        """What the ids of its jobs begin with: the same for the same recipe, overrides and stage."""
        content = json.dumps([self.resolved, self.force], sort_keys=True, default=str)
        return f"{self.resolved['name']}-{self.stage}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def connect(address: str | None) -> JobSubmissionClient:
    """The jobs of a cluster, by the address of its dashboard, e.g. http://head:8265.

    Raises:
        UserError: no cluster answers there, or it wants another token.
    """
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray would let override what we ask for
    elif not (address := os.environ.get("RAY_API_SERVER_ADDRESS")):
        raise UserError("give the cluster's dashboard: --address http://HEAD:8265, or RAY_API_SERVER_ADDRESS")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: give the dashboard's URL, e.g. http://head:8265")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(f"{address}: no Ray dashboard answers there ({_sentence(error)})") from error
    except (AuthenticationError, RuntimeError) as error:  # the loader of tokens raises the latter
        if "oken" not in str(error) and "uthenti" not in str(error):
            raise
        raise UserError(
            f"{address}: refused without the cluster's token; put it into RAY_AUTH_TOKEN, or its file into "
            "RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token)"
        ) from error


def submit(client: JobSubmissionClient, job: Job) -> str:
    """Start a job, or find it under way.

    One that has ended is started again under the next number: its stage goes on where the artefacts say.

    Returns:
        Its id.

    Raises:
        UserError: as `Job.entrypoint`, or the working directory is too large.
    """
    entrypoint = job.entrypoint()
    earlier = {n: info for info in client.list_jobs() if (n := _number(job.series, info.submission_id)) is not None}
    last = max(earlier, default=0)
    if last and not earlier[last].status.is_terminal():
        earlier[last] = _looked_after(client, f"{job.series}-{last}")
        if not earlier[last].status.is_terminal():
            say(f"job {job.series}-{last}: under way already, joined")
            return f"{job.series}-{last}"
    submission_id = f"{job.series}-{last + 1}"
    variables = {"PYTHONUNBUFFERED": "1"}
    if form := os.environ.get("DISTILL_LOG_FORMAT"):
        variables["DISTILL_LOG_FORMAT"] = form
    environment = {"working_dir": ".", "excludes": EXCLUDES, "env_vars": variables}
    try:
        # no resources for the entry point: Ray then starts it on the head, also on one that has no CPU to lend
        client.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env=environment)
    except ValueError as error:
        raise UserError(f"{Path.cwd()}: can't be uploaded: {_sentence(error)}") from error
    except RuntimeError as error:
        if f"{submission_id} already exists" not in str(error):
            raise
        say(f"job {submission_id}: another submission was faster, joined")
        return submission_id
    say(f"job {submission_id}: submitted" + (f", after {job.series}-{last} {describe(earlier[last])}" if last else ""))
    return submission_id


def _looked_after(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    """How a job that is not known to have ended really stands.

    One that died with its head is `running` in the record that the next head has from Redis, until Ray's job manager
    begins to look after its jobs, which it does at the first submission; one of the same id is refused after that.
    """
    with suppress(RuntimeError):
        client.submit_job(entrypoint="true", submission_id=submission_id)
    deadline = time.monotonic() + _WAKES_S
    while not (info := find(client, submission_id)).status.is_terminal() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return info


def find(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    """What the cluster knows of a job.

    Raises:
        UserError: no such job.
    """
    try:
        return client.get_job_info(submission_id)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        raise UserError(f"job {submission_id}: the cluster knows of none with this id") from error


def follow(client: JobSubmissionClient, submission_id: str) -> int:
    """Print a job's log from its beginning until it ends.

    Returns:
        The exit code of its command; 128 + the signal that killed it; 1 where it did not come so far.

    Raises:
        UserError: no such job, or the cluster is gone.
    """
    printed, ended = 0, False
    while True:
        try:
            more, broken = asyncio.run(_print_log(client, submission_id, printed))
            printed += more
            info = find(client, submission_id)
        except (ConnectionError, requests.RequestException) as error:
            raise UserError(
                f"job {submission_id}: the cluster no longer answers; as long as its head runs, so does the job, and "
                f"`distill job logs {submission_id} --follow` shows it"
            ) from error
        if info.status.is_terminal() and (ended or not broken):
            say(f"job {submission_id}: {describe(info)}")
            return exit_code(info)
        ended = info.status.is_terminal()  # then what was said after the connection broke is fetched once more
        time.sleep(_POLL_S)


def describe(info: JobDetails) -> str:
    """How a job stands, e.g. `failed with exit code 2`."""
    code = "" if info.driver_exit_code is None else f" with exit code {exit_code(info)}"
    return f"{info.status.value.lower()}{code}"


def exit_code(info: JobDetails) -> int:
    """The exit code of a job that has ended."""
    code: int | None = info.driver_exit_code
    if code is None:
        return 1
    return code if code >= 0 else 128 - code


async def _print_log(client: JobSubmissionClient, submission_id: str, skip: int) -> tuple[int, bool]:
    """Print what a job says after the first `skip` characters, until it ends or the connection breaks: how many
    characters, and whether the connection broke."""
    printed = 0
    try:
        async for text in client.tail_job_logs(submission_id):
            print(text[skip:], end="", file=console.file, flush=True)
            printed += len(text[skip:])
            skip = max(0, skip - len(text))
    except (RuntimeError, aiohttp.ClientError):
        return printed, True
    return printed, False


def _number(series: str, submission_id: str | None) -> int | None:
    """Which job of a series an id belongs to."""
    head, _, number = (submission_id or "").rpartition("-")
    return int(number) if head == series and number.isdecimal() else None


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
