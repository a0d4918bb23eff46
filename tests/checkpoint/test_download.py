import filecmp
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sagewan.checkpoint.download import plan_download, repository_of, run_download
from sagewan.checkpoint.find import REPOSITORIES, demo_folder, find_model
from sagewan.checkpoint.hubs import MODELSCOPE
from sagewan.checkpoint.hubs import Hub as Source
from sagewan.checkpoint.inspection import inspect
from sagewan.cli import main
from sagewan.errors import CheckpointError, RequestError
from tests.checkpoint.hub import Hub, serving

NAME = "wan2.2-ti2v-5b"
LARGE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """The demo model under a published name, with files that nobody needs."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for path in demo_folder().rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(demo_folder())
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy) if path.stat().st_dev == folder.stat().st_dev else copy.write_bytes(
                path.read_bytes()
            )
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.png").write_bytes(b"picture")
    (folder / "vae" / "old.bin").write_bytes(b"pickle")
    with serving(Hub(folder, REPOSITORIES[NAME])) as running:
        yield running


def source(hub: Hub, protocol: str = "hf") -> Source:
    return Source(protocol=protocol, endpoint=hub.address)


def fetch(hub: Hub, target: Path, protocol: str = "hf") -> list[tuple[str, int]]:
    told: list[tuple[str, int]] = []
    download = plan_download(NAME, source(hub, protocol), target)
    run_download(download, lambda path, count: told.append((path, count)), pause=0.001)
    return told


def same(hub: Hub, target: Path) -> bool:
    files = [path.relative_to(target) for path in target.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".part"]
    _, wrong, missing = filecmp.cmpfiles(hub.folder, target, files, shallow=False)
    return not wrong and not missing and len(files) == 12


@pytest.mark.parametrize("protocol", ["hf", MODELSCOPE])
def test_a_model_is_fetched_whole_and_nothing_else(protocol: str, hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "models" / NAME
    told = fetch(hub, target, protocol)
    assert same(hub, target)
    assert sum(count for _, count in told) == sum(
        path.stat().st_size for path in target.rglob("*") if path.is_file()
    )
    assert told[-1][0] == "model_index.json", "until then there is no model to be found"
    assert find_model(str(target)).parts.keys() == find_model("demo").parts.keys()
    assert inspect(target).problems == []
    hub.asked.clear()
    assert fetch(hub, target, protocol) == []
    assert len([path for path, _ in hub.asked if "resolve" in path]) == 0


@pytest.mark.parametrize("resumes", [True, False])
def test_a_broken_connection_is_taken_up_again(resumes: bool, hub: Hub, tmp_path: Path) -> None:
    hub.cuts, hub.cut_after, hub.resumes = 3, 400_000, resumes
    fetch(hub, tmp_path / "m")
    assert same(hub, tmp_path / "m")
    ranges = [asked for _, asked in hub.asked if asked]
    assert ranges, "the rest is asked for, not the whole"


def test_a_server_that_fails_for_a_moment_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.failures = 2
    fetch(hub, tmp_path / "m")
    assert same(hub, tmp_path / "m")


def test_what_came_stays_and_the_next_call_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.cuts, hub.cut_after = 1000, 300_000
    with pytest.raises(CheckpointError, match=r"broke 5 times.*goes on") as error:
        fetch(hub, tmp_path / "m")
    assert "\n" not in str(error.value)
    (partial,) = (tmp_path / "m").rglob("*.part")
    have = partial.stat().st_size
    assert have == 5 * 300_000
    download = plan_download(NAME, source(hub), tmp_path / "m")
    assert download.done >= have
    hub.cuts = 0
    hub.asked.clear()
    fetch(hub, tmp_path / "m")
    assert same(hub, tmp_path / "m")
    assert f"bytes={have}-" in [asked for _, asked in hub.asked]


@pytest.mark.parametrize("file", [LARGE, "vae/config.json"])
@pytest.mark.parametrize("protocol", ["hf", MODELSCOPE])
def test_a_wrong_digest_is_refused_and_removed(
    file: str, protocol: str, hub: Hub, tmp_path: Path
) -> None:
    hub.lies = {file}
    with pytest.raises(CheckpointError, match="came with the digest"):
        fetch(hub, tmp_path / "m", protocol)
    assert not (tmp_path / "m" / file).exists()
    assert not list((tmp_path / "m").rglob("*.part"))
    with pytest.raises(CheckpointError):
        find_model(str(tmp_path / "m"))
    hub.lies = set()
    fetch(hub, tmp_path / "m", protocol)
    assert same(hub, tmp_path / "m")


def test_a_part_of_other_bytes_is_found_out(hub: Hub, tmp_path: Path) -> None:
    partial = tmp_path / "m" / (LARGE + ".part")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(1000))
    with pytest.raises(CheckpointError, match="came with the digest"):
        fetch(hub, tmp_path / "m")
    fetch(hub, tmp_path / "m")
    assert same(hub, tmp_path / "m")


def test_a_disk_that_is_too_small_is_refused_first(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(CheckpointError, match=r"GB free: free some space, or .* --to"):
        fetch(hub, tmp_path / "new" / "m")
    assert not (tmp_path / "new").exists()
    assert not [path for path, _ in hub.asked if "resolve" in path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    partial = tmp_path / "m" / (LARGE + ".part")
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"the disk is full.*goes on from there"):
        fetch(hub, tmp_path / "m")


def test_files_can_t_lead_out_of_the_folder(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = Hub.describe

    def evil(self: Hub, path: Path) -> dict[str, object]:
        found = describe(self, path)
        return {**found, "path": "vae/../../evil.json"} if path.name == "config.json" else found

    monkeypatch.setattr(Hub, "describe", evil)
    download = plan_download(NAME, source(hub), hub.folder.parent / "m")
    assert not [file for file in download.files if ".." in file.path]


def test_what_is_not_there_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"404.*another source"):
        plan_download("wan2.1-t2v-14b", source(hub), tmp_path)
    nowhere = Source(protocol="hf", endpoint="http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="can't be reached"):
        plan_download(NAME, nowhere, tmp_path)
    page = Source(protocol=MODELSCOPE, endpoint=hub.address + "/nothing")
    with pytest.raises(CheckpointError):
        plan_download(NAME, page, tmp_path)
    (hub.folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="no diffusers model"):
        plan_download(NAME, source(hub), tmp_path)


def test_the_token_goes_to_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert Source.parse("hf").headers
    assert not Source.parse("modelscope").headers
    assert not Source.parse("https://mirror.example").headers
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert Source.parse("hf") == Source(protocol="hf", endpoint="https://mirror.example")
    assert not Source.parse("hf").headers


def test_names() -> None:
    assert repository_of(NAME) == REPOSITORIES[NAME]
    assert repository_of("someone/Wan-distilled") == "someone/Wan-distilled"
    with pytest.raises(RequestError, match=r"did you mean wan2\.1-t2v-14b"):
        repository_of("wan2.1-t2v-14")
    with pytest.raises(RequestError, match="choose hf, modelscope"):
        Source.parse("ftp://x")


def test_the_commands(
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))

    def said(*words: str, code: int = 0) -> tuple[str, str]:
        assert main(words) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    out, _ = said("models")
    assert NAME in next(line for line in out.splitlines() if line.startswith("not here"))
    out, err = said("download", NAME, "--dry-run")
    assert LARGE in out
    assert "0.03 GB to fetch into" in err
    out, _ = said("download", NAME)
    assert "t2v/i2v, bfloat16" in out
    out, _ = said("models")
    assert any(line.startswith(f"{NAME}: ") for line in out.splitlines())
    _, err = said("download", NAME, "--from", "nowhere", code=2)
    assert len(err.splitlines()) == 1


def test_a_download_counts_what_is_here(hub: Hub, tmp_path: Path) -> None:
    download = plan_download(NAME, source(hub), tmp_path / "m")
    assert download.done == 0
    size = {file.path: file.size for file in download.files}[LARGE]
    (tmp_path / "m" / "vae").mkdir(parents=True)
    (tmp_path / "m" / (LARGE + ".part")).write_bytes(bytes(1234))
    assert download.done == 1234
    (tmp_path / "m" / (LARGE + ".part")).write_bytes(bytes(size + 1))
    assert replace(download).done == 0
