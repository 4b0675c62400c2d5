"""A small real Ray job server on loopback: it takes jobs by Ray's REST API and runs them as processes of a shell.

What it can and Ray can't: a job may be told to run another command than its own, to be lost, or the whole server to be
lost with all it knew and to come back.
"""

import asyncio
import os
import signal
import threading
import time

import ray
from aiohttp import web


class Job:
    """A job: what was asked for, its process, its log."""

    def __init__(self, request):
        self.request, self.log, self.process = request, "", None
        self.status, self.error_type, self.exit_code, self.message = "RUNNING", None, None, "running"
        self.start_time = int(time.time() * 1000)

    def details(self):
        return {
            "type": "SUBMISSION", "submission_id": self.request["submission_id"], "status": self.status,
            "entrypoint": self.request["entrypoint"], "message": self.message, "error_type": self.error_type,
            "driver_exit_code": self.exit_code, "runtime_env": self.request.get("runtime_env"),
            "start_time": self.start_time, "metadata": self.request.get("metadata"),
        }  # fmt: skip

    @property
    def ended(self):
        return self.status != "RUNNING"


class JobServer:
    """The server in a thread of its own. `commands` replace the entrypoints of the next jobs, in order."""

    def __init__(self, port, token=None):
        self.port, self.token = port, token
        self.address = f"http://127.0.0.1:{port}"
        self.jobs, self.commands, self.asked = {}, [], []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.runner = None
        self.start()

    def start(self):
        """Listen, knowing of no job."""
        self.jobs = {}
        asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result(10)

    def vanish(self):
        """Stop listening at once, with all jobs, as a head node that dies."""
        asyncio.run_coroutine_threadsafe(self._leave(), self.loop).result(10)

    def cut(self):
        """Stop listening at once, while the jobs go on, as a way that breaks."""
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(10)

    def mend(self):
        """Listen again, knowing what was known."""
        asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result(10)

    def close(self):
        self.vanish()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def lose(self, job):
        """Have a job die with its node."""
        self.jobs[job].error_type = "JOB_SUPERVISOR_ACTOR_DIED"
        os.killpg(self.jobs[job].process.pid, signal.SIGKILL)

    async def _listen(self):
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/api/version", self._version)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_get("/api/jobs/{id}", self._info)
        app.router.add_post("/api/jobs/{id}/stop", self._stop)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def _leave(self):
        for job in self.jobs.values():
            if not job.ended:
                os.killpg(job.process.pid, signal.SIGKILL)
        await self._close()

    async def _close(self):
        if self.runner:
            await self.runner.cleanup()
            self.runner = None

    @web.middleware
    async def _guard(self, request, handler):
        self.asked.append(request.path)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text="no token")
        return await handler(request)

    async def _version(self, _):
        return web.json_response(
            {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "session"}
        )

    async def _submit(self, request):
        job = Job(await request.json())
        name = job.request["submission_id"]
        if name in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {name} already exists.")
        self.jobs[name] = job
        command = self.commands.pop(0) if self.commands else job.request["entrypoint"]
        environment = {**os.environ, **(job.request.get("runtime_env") or {}).get("env_vars", {})}
        job.process = await asyncio.create_subprocess_shell(
            command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        job.task = asyncio.create_task(self._watch(job))
        return web.json_response({"job_id": name, "submission_id": name})

    async def _watch(self, job):
        async for line in job.process.stdout:
            job.log += line.decode()
        code = await job.process.wait()
        if job.status == "STOPPING":
            job.status = "STOPPED"
        elif job.error_type:
            job.status, job.message = "FAILED", "Job supervisor actor died: its node was lost"
        else:
            job.status, job.exit_code = "SUCCEEDED" if code == 0 else "FAILED", code
            job.error_type = None if code == 0 else "JOB_ENTRYPOINT_COMMAND_ERROR"
            job.message = f"Job entrypoint command failed with exit code {code}, last available logs:\n{job.log}"

    async def _info(self, request):
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.Response(status=404, text=f"Job {request.match_info['id']} does not exist")
        return web.json_response(self._told(job))

    async def _list(self, _):
        return web.json_response([self._told(job) for job in self.jobs.values()])

    def _told(self, job):
        return {**job.details(), "status": "RUNNING" if job.status == "STOPPING" else job.status}

    async def _stop(self, request):
        job = self.jobs[request.match_info["id"]]
        job.status = "STOPPING"
        os.killpg(job.process.pid, signal.SIGTERM)
        return web.json_response({"stopped": True})

    async def _tail(self, request):
        job, socket, sent = self.jobs[request.match_info["id"]], web.WebSocketResponse(), 0
        await socket.prepare(request)
        while not job.ended or sent < len(job.log):
            if sent < len(job.log):
                some, sent = job.log[sent:], len(job.log)
                await socket.send_str(some)
            await asyncio.sleep(0.02)
        await socket.close()
        return socket
