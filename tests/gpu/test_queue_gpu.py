"""The queue's worker on a GPU: previews, events with the device's memory, a comparison."""

import threading

import pytest

from sagewan.jobs.outputs import for_queue
from sagewan.jobs.queue import Queue
from sagewan.jobs.records import default_path
from sagewan.jobs.states import State
from sagewan.jobs.worker import work
from sagewan.plan.request import Request

pytestmark = pytest.mark.gpu

REQUEST = Request(
    prompt="a red ball rolls to the right", seed=1, steps=4, size=(128, 128), frames=5
)


def test_videos_and_a_comparison_come_out_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    kept = Queue.set_preview

    def set_preview(self: Queue, job: int, step: int, image: bytes) -> None:
        assert image[8:12] == b"WEBP"
        seen.append(step)
        kept(self, job, step, image)

    monkeypatch.setattr(Queue, "set_preview", set_preview)
    with Queue(default_path()) as queue:
        queue.enqueue(for_queue(REQUEST), "me")
        changes = [{"attention": "sdpa"}, {"attention": "sageattn_3_fp8"}]
        queue.enqueue(for_queue(REQUEST), "me", changes)
    work(default_path(), threading.Event(), until_empty=True)
    with Queue(default_path()) as queue:
        jobs = queue.of("me", State.DONE)
        assert len(jobs) == 2
        assert seen == [1, 2, 3, 4] * 3
        assert any((event.memory or 0) > 0 for event in queue.events(jobs[0].id))
        first, second = (jobs[0].report or {})["videos"]
        assert first["likeness"] is None
        assert second["likeness"]["psnr"] is None or second["likeness"]["psnr"] > 20
        assert second["peak_device_bytes"] > 0
