"""A small client of QEMU's monitor protocol, over a UNIX socket. One thread, no background reader:
events are collected while replies are read."""

import json
import socket
import time


class QmpError(Exception):
    """QEMU answered with an error; the text is QEMU's own."""


class Qmp:
    def __init__(self, path, timeout=20):
        self.events = []
        self.pending = b""
        deadline = time.monotonic() + timeout
        while True:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.greeting = self.read_message(timeout)["QMP"]
        version = self.greeting["version"]["qemu"]
        self.version = (version["major"], version["minor"], version["micro"])
        self.execute("qmp_capabilities")

    def close(self):
        self.socket.close()

    def read_message(self, timeout):
        deadline = time.monotonic() + timeout
        while b"\n" not in self.pending:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("QMP: no answer in time")
            self.socket.settimeout(left)
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("QMP: QEMU closed the connection")
            self.pending += data
        line, self.pending = self.pending.split(b"\n", 1)
        return json.loads(line)

    def execute(self, command, timeout=120, **arguments):
        """Runs a command and returns its result. Underscores of argument names become dashes."""
        message = {"execute": command}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.socket.settimeout(timeout)
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        deadline = time.monotonic() + timeout
        while True:
            answer = self.read_message(max(0.01, deadline - time.monotonic()))
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            elif "return" in answer:
                return answer["return"]

    def hmp(self, line, timeout=120):
        """Runs a line of the human monitor and returns what it printed."""
        return self.execute("human-monitor-command", timeout, command_line=line).replace("\r", "")

    def hmp_quiet(self, line, timeout=120):
        """Runs a line that prints nothing unless it fails."""
        text = self.hmp(line, timeout).strip()
        if text:
            raise QmpError(f"{line}: {text}")

    def wait_event(self, name, timeout=20):
        deadline = time.monotonic() + timeout
        while True:
            for i, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(i)
            message = self.read_message(max(0.01, deadline - time.monotonic()))
            if "event" in message:
                self.events.append(message)

    def run_job(self, command, timeout=120, **arguments):
        """Starts a job, waits for its end and dismisses it; raises with the job's error."""
        self.execute(command, job_id="job0", **arguments)
        deadline = time.monotonic() + timeout
        while True:
            job = next(j for j in self.execute("query-jobs") if j["id"] == "job0")
            if job["status"] == "concluded":
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{command}: job still {job['status']}")
            time.sleep(0.02)
        self.execute("job-dismiss", id="job0")
        if "error" in job:
            raise QmpError(f"{command}: {job['error']}")
