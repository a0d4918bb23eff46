"""Who may come in, who they are, and what they may see of others and of the disk."""

import base64
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request as Visit
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sagewan.jobs.outputs import outputs_folder
from sagewan.jobs.queue import Queue
from sagewan.jobs.states import State
from sagewan.plan.request import Request
from sagewan.ui.door import COOKIE, Door, owner_of
from tests.ui.conftest import finished

REQUEST = Request(prompt="a red ball", seed=1)


async def whoami(visit: Visit) -> PlainTextResponse:
    return PlainTextResponse(owner_of(visit.headers))


def door(**options: object) -> TestClient:
    app = Starlette(routes=[Route("/", whoami)])
    return TestClient(Door(app, **options), base_url="http://localhost:7860")  # type: ignore[arg-type]


def basic(name: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def test_a_visitor_keeps_one_name_and_others_have_others() -> None:
    first, second = door(), door()
    name = first.get("/").text
    assert len(name) == 32
    assert first.get("/").text == name
    assert second.get("/").text != name


def test_the_cookie_is_not_for_scripts_nor_for_other_sites() -> None:
    cookie = door().get("/").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie


@pytest.mark.parametrize("sent", ["x", "../../etc", "0" * 31, "Z" * 32, 'a"; x="b'])
def test_a_name_that_is_made_up_is_not_taken(sent: str) -> None:
    assert door().get("/", headers={"cookie": f"{COOKIE}={sent}"}).text != sent


def test_nobody_becomes_another_by_a_header() -> None:
    assert door().get("/", headers={"x-sagewan-owner": "admin"}).text != "admin"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "192.168.1.9", ""])
def test_a_server_of_this_machine_answers_to_no_other_name(host: str) -> None:
    assert door().get("/", headers={"host": host}).status_code == 421
    assert door(loopback=False).get("/", headers={"host": host or "x"}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "[::1]:7860"])
def test_a_server_of_this_machine_answers_to_its_own(host: str) -> None:
    assert door().get("/", headers={"host": host}).status_code == 200


def test_without_the_password_nothing_is_answered() -> None:
    locked = door(login=("me", "pass:wörd"))
    assert locked.get("/").status_code == 401
    assert "Basic" in locked.get("/").headers["www-authenticate"]
    for wrong in (basic("me", "pass"), basic("you", "pass:wörd"), {"authorization": "Basic %%"}):
        assert locked.get("/", headers=wrong).status_code == 401
    assert locked.get("/", headers=basic("me", "pass:wörd")).status_code == 200


def test_pages_load_nothing_from_elsewhere() -> None:
    headers = door().get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


Answer = Callable[[Visit], Awaitable[PlainTextResponse]]


def me(client: TestClient) -> str:
    client.get("/")
    return str(client.cookies[COOKIE])


def test_a_video_is_its_owners_alone(client: TestClient, queue: Queue) -> None:
    mine = finished(queue, REQUEST, me(client))
    other = finished(queue, REQUEST, "f" * 32)
    assert client.get(f"/video/{mine}").content == b"video"
    assert client.get(f"/video/{other}").status_code == 404
    assert client.get("/video/99").status_code == 404


def test_a_part_of_a_video_can_be_asked_for(client: TestClient, queue: Queue) -> None:
    job = finished(queue, REQUEST, me(client), b"0123456789")
    answer = client.get(f"/video/{job}", headers={"range": "bytes=2-4"})
    assert (answer.status_code, answer.content) == (206, b"234")
    loaded = client.get(f"/video/{job}?download=1").headers["content-disposition"]
    assert "a-red-ball.mp4" in loaded


@pytest.mark.parametrize(
    "path",
    [
        "/video/../../etc/passwd",
        "/video/%2e%2e%2fetc",
        "/video/1/x",
        "/fragment/en/../live",
        "/etc",
    ],
)
def test_a_path_from_the_client_leads_nowhere(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (404, 422)


def test_a_record_that_names_a_file_elsewhere_is_not_served(
    client: TestClient, queue: Queue, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    link = outputs_folder() / "link.mp4"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(secret)
    for path in (secret, link, Path("/etc/passwd"), outputs_folder() / ".." / "secret.mp4"):
        job = queue.enqueue(REQUEST, me(client))
        queue.start(job)
        queue.finish(job, State.DONE, report={"output": {"path": str(path)}})
        assert client.get(f"/video/{job}").status_code == 404


def test_a_preview_is_its_owners_alone(client: TestClient, queue: Queue) -> None:
    for owner, status in ((me(client), 200), ("f" * 32, 404)):
        job = queue.enqueue(REQUEST, owner)
        queue.start(job)
        queue.set_preview(job, 1, b"webp")
        assert client.get(f"/preview/{job}").status_code == status


def test_boards_show_only_the_visitors_own_and_escape_it(client: TestClient, queue: Queue) -> None:
    finished(queue, Request(prompt="<script>alert(1)</script>", seed=1), me(client))
    finished(queue, Request(prompt="somebody else's", seed=1), "f" * 32)
    html = client.get("/fragment/en/library").text
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html
    assert "somebody" not in html


def test_a_board_is_sent_again_only_if_it_changed(client: TestClient, queue: Queue) -> None:
    owner = me(client)
    first = client.get("/fragment/zh/live")
    assert "视频会显示在这里" in first.text
    tag = first.headers["etag"]
    assert client.get("/fragment/zh/live", headers={"if-none-match": tag}).status_code == 304
    queue.enqueue(REQUEST, owner)
    assert client.get("/fragment/zh/live", headers={"if-none-match": tag}).status_code == 200


def test_the_language_is_the_browsers_until_one_is_chosen(client: TestClient) -> None:
    chinese = {"accept-language": "zh-CN"}
    assert client.get("/", headers=chinese).headers["location"] == "/zh/"
    assert client.get("/language/en").headers["location"] == "/en/"
    assert client.get("/", headers=chinese).headers["location"] == "/en/"
    assert client.get("/language/xx").status_code == 404
