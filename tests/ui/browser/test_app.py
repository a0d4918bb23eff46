"""The app as people use it, in a real browser, on the demo model."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from PIL import Image

from sagewan.jobs.states import State
from sagewan.pipeline.export import read_frames, read_settings
from sagewan.ui.assets import wanted_first
from tests.shrunken import PROMPT as PROMPT_OF_SHRUNKEN
from tests.ui.browser.conftest import (
    Open,
    Page,
    Server,
    ask,
    choose,
    patiently,
    started,
    sync_api,
    tab,
    write,
)
from tests.ui.test_form import WRONG

STEPS = "document.querySelector('#field-steps textarea, #field-steps input').value"
PROMPT = "document.querySelector('#field-prompt textarea')?.value"
VIDEOS = "[...document.querySelectorAll('#sw-compare video')]"
# Of the browser's own picture of a playing video.
BRIGHTEST = """video => {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0);
  return Math.max(...context.getImageData(0, 0, canvas.width, canvas.height).data
    .filter((_, at) => at % 4 !== 3));
}"""


def test_the_page_is_there_soon(server: Server, visit: Open) -> None:
    # Processor time, since other work on this machine does not count.
    assert server.cpu < 2.5
    page = visit()
    loaded = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert {urlsplit(name).hostname for name in loaded} == {"localhost"}
    scripts = {Path(urlsplit(name).path).name for name in loaded if "/assets/" in name}
    # The browser heard of them all before the page was made, and of none for nothing.
    assert scripts == set(wanted_first())
    maps = psutil.Process(server.process.pid).memory_maps()
    assert not [one.path for one in maps if "/pandas/" in one.path]


def test_from_a_first_visit_to_a_video_and_back_from_its_file(
    server: Server, visit: Open, tmp_path: Path
) -> None:
    page = visit()
    ask(page, "a red ball rolls to the right", steps=60)
    page.click("#sw-go")
    page.wait_for_selector(".sw-stage img")
    video = page.wait_for_selector("#sw-live .sw-stage video")
    page.wait_for_function("document.querySelector('#sw-live video').readyState >= 3")
    assert page.evaluate("v => v.videoWidth", video) == 64
    assert page.evaluate(BRIGHTEST, video) > 60
    assert "ran sdpa" in page.inner_text("#sw-live")
    with page.expect_download() as download:
        page.click("#sw-live a[download]")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name == "a-red-ball-rolls-to-the-right.mp4"
    assert max(frame.max() for frame in read_frames(path)) > 60
    kept = read_settings(path)
    assert (kept["prompt"], kept["seed"], kept["steps"]) == ("a red ball rolls to the right", 1, 60)
    tab(page, "Model Settings")
    page.click("text=Reset all settings")
    page.wait_for_function(f"{STEPS} === ''")
    page.set_input_files(
        "input[type=file][accept*=mp4], #component-from-file input[type=file]", path
    )
    page.wait_for_function(f"{STEPS} === '60'")


def test_a_run_is_cancelled_in_the_middle_and_the_next_one_runs(
    server: Server, visit: Open
) -> None:
    page = visit()
    ask(page, "a red ball", steps=900)
    page.click("#sw-go")
    page.wait_for_selector("#sw-live .sw-stage img")
    page.click("#sw-live [data-act=cancel]")
    page.wait_for_selector("#sw-live >> text=Cancelled")
    write(page, "steps", "1")
    page.click("#sw-go")
    page.wait_for_selector("#sw-live video")


def test_a_fallback_is_said_with_its_reason(visit: Open) -> None:
    page = visit()
    ask(page, "a blue star")
    tab(page, "Model Settings")
    choose(page, "attention", "sageattn_3_fp4")
    page.wait_for_selector("#sw-plan >> text=gave way to")
    assert "needs an NVIDIA GPU" in page.inner_text("#sw-modes")
    tab(page, "Generate")
    page.click("#sw-go")
    page.wait_for_selector("#sw-live video")
    said = page.inner_text("#sw-live")
    assert "ran sdpa" in said
    assert re.search("sageattn_3_fp4 gave way to sdpa: needs an NVIDIA GPU", said)


def test_two_settings_are_compared(visit: Open) -> None:
    page = visit()
    ask(page, "a green ring", steps=2)
    tab(page, "Model Settings")
    page.click("#field-emulate input")
    tab(page, "Compare")
    page.click("#sw-compare-go")
    page.wait_for_selector("#sw-compare .sw-videos")
    assert page.locator("#sw-compare .sw-layers > video:not(.sw-over)").count() == 2
    cells = page.locator("#sw-compare tbody tr").nth(1).locator("td").all_inner_texts()
    assert cells[0] == "sageattn_3_fp8 (emulated)"
    assert 10 < float(cells[1]) < 90
    assert 0 < float(cells[2]) <= 1
    page.wait_for_function(f"{VIDEOS}.every(video => video.readyState >= 2)")
    page.click("#sw-compare [data-sync-play]")
    times = page.evaluate(f"{VIDEOS}.map(video => video.currentTime)")
    assert max(times) - min(times) < 0.2
    before = page.locator("#sw-compare .sw-layers").nth(1).screenshot()
    page.click("#sw-compare [data-sync-diff]")
    after = page.locator("#sw-compare .sw-layers").nth(1).screenshot()
    assert mean(after) < mean(before)


def mean(png: bytes) -> float:
    with Image.open(io.BytesIO(png)) as image:
        histogram = image.convert("L").histogram()
    return sum(level * count for level, count in enumerate(histogram)) / sum(histogram)


def test_a_wrong_value_is_refused_beside_its_field(visit: Open) -> None:
    page = visit()
    write(page, "prompt", "a ball")
    typed = {name for name in WRONG if name not in ("image", "last_image", "negative")}
    for name in ("steps", "frames", "seed", "size"):
        wrong = str(WRONG[name][name])
        (choose if name == "size" else write)(page, name, wrong)
        page.wait_for_selector(f"#field-{name} .sw-field-error")
        assert page.locator(".sw-field-error").count() == 1
        (choose if name == "size" else write)(page, name, "64x64" if name == "size" else "")
        page.wait_for_selector(".sw-field-error", state="detached")
    tab(page, "Model Settings")
    for name in ("cfg", "cfg_2", "boundary", "shift", "fps", "attention_keep_layers"):
        assert name in typed
        write(page, name, str(WRONG[name][name]))
        page.wait_for_selector(f"#field-{name} .sw-field-error")
        write(page, name, "")
        page.wait_for_selector(".sw-field-error", state="detached")


def test_nothing_runs_without_a_prompt_or_with_an_untaught_word(visit: Open) -> None:
    page = visit()
    page.click("#sw-go")
    page.wait_for_selector("#field-prompt .sw-field-error >> text=prompt is empty")
    write(page, "prompt", "a zebra")
    page.wait_for_selector("#field-prompt .sw-field-error >> text=never taught 'zebra'")
    page.click("#sw-go")
    page.wait_for_selector("#sw-summary >> text=never taught")
    assert page.locator("#sw-live .sw-empty-art").count() == 1


def draft_is_kept(page: Page) -> None:
    """Wait until what the browser keeps of the draft has been the same for half a second."""
    same = """() => {
        const now = JSON.stringify(localStorage), before = window.keptBefore;
        window.keptBefore = now;
        return now === before;
    }"""
    page.wait_for_function(same, polling=500)


def test_a_picture_that_is_none_is_refused_and_a_real_one_starts_a_video(
    visit: Open, tmp_path: Path
) -> None:
    page = visit()
    ask(page, "a red ball grows", steps=1)
    page.click("text=Start from a picture")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture at all")
    page.set_input_files("#field-image input[type=file]", bad)
    page.wait_for_selector("#field-image .sw-field-error >> text=image=bad.png is not a picture")
    page.click("#sw-go")
    page.wait_for_selector("#sw-summary >> text=is not a picture")
    assert page.locator("#sw-live .sw-empty-art").count() == 1
    draft_is_kept(page)
    page.reload()
    # Its field is folded away again, so that the line under the button says it.
    page.wait_for_selector("#sw-summary >> text=is not a picture")
    assert page.input_value("#field-prompt textarea") == "a red ball grows"
    page.click("text=Start from a picture")
    page.click("#field-image button[aria-label='Remove Image']")
    page.wait_for_selector(".sw-field-error", state="detached")
    good = tmp_path / "good.png"
    Image.new("RGB", (100, 80), "navy").save(good)
    page.set_input_files("#field-image input[type=file]", good)
    page.wait_for_selector("#field-image img")
    page.click("#sw-go")
    page.wait_for_selector("#sw-live video")


def test_a_video_from_a_first_picture_to_a_last_one(
    server: Server, visit: Open, shrunken_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = server.data / "models" / "first-to-last"
    shutil.copytree(shrunken_folder("wan2.1-flf2v-14b"), model)
    page = visit()
    tab(page, "Model Settings")
    choose(page, "model", model.name)
    page.wait_for_selector(".sw-model-info >> text=flf2v")
    tab(page, "Generate")
    ask(page, PROMPT_OF_SHRUNKEN, steps=1)
    page.click("text=Start from a picture")
    for name, colour in (("last_image", "maroon"), ("image", "navy")):
        file = tmp_path / f"{colour}.png"
        Image.new("RGB", (100, 80), colour).save(file)
        page.set_input_files(f"#field-{name} input[type=file]", file)
        page.wait_for_selector(f"#field-{name} img")
        # A last picture alone is refused beside its field.
        error = page.locator(".sw-field-error")
        if name == "last_image":
            error.wait_for()
            assert "give the first picture too" in error.inner_text()
        else:
            error.wait_for(state="detached")
    page.click("#sw-go")
    page.wait_for_selector("#sw-live video")
    with server.queue() as queue:
        (job,) = queue.of(None, State.DONE, limit=1)
    for name, colour in (("image", (0, 0, 128)), ("last_image", (128, 0, 0))):
        with Image.open(job.request[name]) as picture:
            assert picture.getpixel((50, 40)) == colour


def test_what_was_typed_survives_a_reload_and_the_other_language(visit: Open) -> None:
    page = visit()
    write(page, "prompt", "a red ball")
    write(page, "steps", "7")
    page.wait_for_selector("#sw-brief >> text=7 steps")
    page.reload()
    page.wait_for_function(f"{PROMPT} === 'a red ball'")
    page.click("text=中文")
    page.wait_for_function(f"{PROMPT} === 'a red ball'")
    assert page.inner_text("#sw-go") == "生成"
    tab(page, "模型设置")
    page.wait_for_selector("text=点击上传")
    assert page.evaluate("document.documentElement.lang").startswith("zh")


def test_a_file_that_comes_is_offered_and_one_that_goes_is_refused(
    server: Server, visit: Open
) -> None:
    page = visit()
    file = server.data / "models" / "loras" / "new-style.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    page.reload()
    page.wait_for_selector("#sw-brief .sw-chip", state="attached")
    tab(page, "Model Settings")
    page.click("#field-lora input")
    page.get_by_role("option", name="new-style.safetensors", exact=True).click()
    page.wait_for_selector("#field-lora >> text=new-style.safetensors")
    page.get_by_role("option", name="new-style.safetensors · high-noise expert only").click()
    page.wait_for_selector("#field-lora >> text=expert only")
    file.unlink()
    write(page, "shift", "4")
    page.wait_for_selector("#field-lora >> text=lora=new-style.safetensors")
    page.reload()
    tab(page, "Model Settings")
    page.wait_for_selector("#field-lora >> text=lora=new-style.safetensors")


# What stays as it is in Chinese: names of modes, formats, fields, files and units.
NAMES = re.compile(
    r"torch\.\w+|sagewan|Wan|sdpa|flash_attn|sageattn\w*|auto|torch\S*|triton|INT8|NVFP4|FP8|FP4|e4m3|e2m1|"
    r"Q·Kᵀ?|P·V|GiB|GB|MB|CPU|NVIDIA|Blackwell|LoRA|loras?|CFG|shift|unipc|euler|lcm|demo|"
    r"English|Hugging Face|A14B|json|JSON|mp4|PSNR|SSIM|dB|cpu|cuda|float\d+|bfloat\d+|none|"
    r"fp[48]_scaled|low-vram|balanced|quality|Ctrl|x|n|Intel\(R\)[^·\n]*|AMD[^·\n]*|K|"
    r"emulated\.\w+|torch\.unpacked|flow-euler|dpm\+\+2m|Linux|Python|diffusers|sm_\d+|doctor|pip|h|min|s|"
    r"radial|sta|easy|mag|attention\S*|steps\S*|emulate\S*|Xeon.*|Processor|AMX|VNNI",
)


def test_the_chinese_page_has_no_english_left(visit: Open) -> None:
    page = visit(locale="zh-CN")
    assert page.url.endswith("/zh/")
    ask(page, "红色的球", steps=1)
    page.click("#sw-go")
    page.wait_for_selector("#sw-live video")
    for name in ("生成", "模型设置", "队列与作品", "对比", "诊断"):
        tab(page, name)
        page.wait_for_timeout(400)
        for line in page.inner_text("body").splitlines():
            rest = NAMES.sub("", line)
            assert not re.search("[A-Za-z]{2,}", rest), (name, line, rest)
    tab(page, "生成")
    write(page, "frames", "6")
    page.wait_for_selector("#field-frames .sw-field-error >> text=Wan 生成 4n+1 帧")


def enqueue(server: Server, page: Page) -> None:
    """Press the button, and wait until the video is in the queue: pressed again before, it would
    be the same press."""
    with server.queue() as queue, patiently() as until:
        count = len(queue.of(None))
        page.click("#sw-go")
        until(lambda: len(queue.of(None)) == count + 1)


def test_two_visitors_share_one_queue_and_nothing_else(server: Server, visit: Open) -> None:
    first, second = visit(), visit()
    ask(first, "a red ball", steps=900)
    first.click("#sw-go")
    first.wait_for_selector("#sw-live .sw-stage img")
    write(first, "steps", "1")
    for _ in range(2):
        enqueue(server, first)
    ask(second, "a blue star", steps=1)
    second.click("#sw-go")
    second.wait_for_selector("#sw-live >> text=Place 1 in the queue")
    first.click("#sw-live [data-act=cancel]")
    second.wait_for_selector("#sw-live video")
    for page, own, other in (
        (first, "a red ball", "a blue star"),
        (second, "a blue star", "a red ball"),
    ):
        tab(page, "Queue & gallery")
        page.wait_for_selector(f"#sw-library >> text={own}")
        assert other not in page.inner_text("#sw-library")
        assert other not in page.input_value("#field-prompt textarea")
    with server.queue() as queue, patiently() as until:
        until(lambda: not queue.of(None, State.QUEUED, State.RUNNING))
        ended = sorted((job for job in queue.of(None, limit=4)), key=lambda job: job.started or 0)
    prompts = [str(job.request["prompt"]) for job in ended]
    assert prompts == ["a red ball", "a blue star", "a red ball", "a red ball"]
    job = next(job for job in ended if job.request["prompt"] == "a blue star")
    assert first.request.get(f"{server.url}video/{job.id}").status == 404
    assert second.request.get(f"{server.url}video/{job.id}").status == 200


def test_the_queue_survives_a_restart_in_the_middle(visit: Open, tmp_path: Path) -> None:
    before = started(tmp_path)
    page = visit(before.url)
    state = page.context.storage_state()
    ask(page, "a red ball", steps=60)
    for seed in (1, 2, 3):
        write(page, "seed", str(seed))
        enqueue(before, page)
    page.wait_for_selector("#sw-live .sw-stage img")
    before.stop()
    page.context.close()
    after = started(tmp_path)
    try:
        page = visit(after.url, storage_state=at(state, before.url, after.url))
        assert page.input_value("#field-prompt textarea") == "a red ball"
        with after.queue() as queue, patiently(90) as until:
            until(lambda: len(queue.of(None, State.DONE)) == 3)
            jobs = queue.of(None)
        assert sorted(job.request["seed"] for job in jobs) == [1, 2, 3]
        assert {(job.state, job.attempts) for job in jobs} == {(State.DONE, 1)}
        assert len(list((tmp_path / "outputs").rglob("*.mp4"))) == 3
        tab(page, "Queue & gallery")
        page.wait_for_selector("#sw-library .sw-card >> nth=2")
        assert page.locator("#sw-library .sw-card").count() == 3
    finally:
        after.stop()


def at(state: Any, before: str, after: str) -> Any:
    """The same browser at another port: cookies don't know ports."""
    return json.loads(json.dumps(state).replace(before, after))


def test_the_keyboard_alone_on_a_small_screen(visit: Open) -> None:
    page = visit(viewport={"width": 390, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "sw-skip"
    page.keyboard.press("Tab")
    ask(page, "", steps=1)
    page.focus("#field-prompt textarea")
    page.keyboard.type("a red ball")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "sw-go":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#sw-live video")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit: Open, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    ask(page, "a red ball", steps=1)
    page.click("#sw-go")
    page.wait_for_selector("#sw-live video")
    for name in ("Generate", "Model Settings", "Queue & gallery", "Compare", "Diagnose"):
        tab(page, name)
        page.wait_for_timeout(400)
        found = axe.run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"][:150]) for one in found] == [], name


def test_the_password_is_asked_for_and_then_everything_works(
    browser: Any, visit: Open, tmp_path: Path
) -> None:
    login = {"username": "me", "password": "pass:wörd"}
    running = started(tmp_path, "--auth", ":".join(login.values()), login=tuple(login.values()))
    try:
        for wrong in (None, {**login, "password": "word"}):
            stranger = browser.new_context(http_credentials=wrong)
            for path in ("", "en/", "en/config", "fragment/en/library", "video/1"):
                assert stranger.request.get(running.url + path).status == 401, path
            page = stranger.new_page()
            with contextlib.suppress(sync_api.Error):  # The browser's own, for a wrong password.
                page.goto(running.url)
            assert page.locator("#field-prompt").count() == 0
            stranger.close()
        page = visit(running.url, http_credentials=login)
        ask(page, "a red ball", steps=1)
        page.click("#sw-go")
        page.wait_for_selector("#sw-live video")
        page.wait_for_function("document.querySelector('#sw-live video').readyState >= 2")
    finally:
        running.stop()


def test_the_diagnosis_is_shown_and_copied(visit: Open) -> None:
    page: Page = visit(permissions=["clipboard-read", "clipboard-write"])
    tab(page, "Diagnose")
    page.click("#sw-examine")
    page.wait_for_selector(".sw-doctor")
    assert "torch.sdpa" in page.inner_text(".sw-doctor")
    page.click("[data-copy]")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["device"]["name"]
