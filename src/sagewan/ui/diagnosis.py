"""What ``sagewan doctor --json`` says, as the page shows it."""

from collections.abc import Mapping
from typing import Any

from sagewan.plan.hardware import GIB
from sagewan.ui.words import Words


def diagnosis_view(data: Mapping[str, Any], words: Words) -> dict[str, Any]:
    """The values of the template ``doctor``."""
    import json

    return {
        "problems": [words.sentence(text) for text in data["problems"]],
        "machine": _machine(data["hardware"], words),
        "modes": [_mode(mode, words) for mode in data["modes"]],
        "rows": [_row(row, words) for row in data["implementations"]],
        "blocks": [_block(block, words) for block in data["blocks"]],
        "advice": data["advice"],
        "text": json.dumps(data, indent=1, ensure_ascii=False),
    }


def _machine(hardware: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    cpu = hardware["cpu"]
    lines = [
        (words("doctor.cpu"), f"{cpu['name']} × {hardware['cores']}"),
        (words("doctor.memory"), f"{hardware['memory_total'] / GIB:.0f} GiB"),
        (words("doctor.system"), f"{hardware['system']}, Python {hardware['python']}"),
        (words("doctor.driver"), hardware["driver"] or words("doctor.no_driver")),
    ]
    for device in hardware["devices"]:
        memory = f"{device['memory_free'] / GIB:.1f} / {device['memory_total'] / GIB:.1f} GiB"
        text = f"{device['name']}, sm_{device['sm']}, {memory}"
        lines.append((words("doctor.gpu", index=device["index"]), text))
    versions = hardware["packages"]
    lines += [
        (name, versions[name]) for name in ("torch", "triton", "diffusers") if name in versions
    ]
    return lines


def _mode(mode: Mapping[str, Any], words: Words) -> dict[str, str]:
    here = words("mode.runs") if mode["itself"] else words("mode.becomes", mode=mode["runs"])
    why = mode["implementation"] if mode["why"] is None else words.sentence(mode["why"])
    return {"name": mode["name"], "here": here, "why": why}


def _block(block: Mapping[str, Any], words: Words) -> dict[str, str]:
    return {
        "name": block["name"],
        "attention": block["attention"] or words("doctor.any"),
        "error": "" if block["error"] is None else f"{block['error']:.2g}",
        "answer": _answer(block, words),
    }


def _answer(tried: Mapping[str, Any], words: Words) -> str:
    objection = tried["objection"]
    return words.sentence(objection["sentence"]) if objection else words("doctor.passed")


def _row(row: Mapping[str, Any], words: Words) -> dict[str, str]:
    return {
        "name": row["name"],
        "formats": f"{words.format(row['qk'])} / {words.format(row['pv'])}",
        "error": "" if row["error"] is None else f"{row['error']:.2g}",
        "milliseconds": "" if row["milliseconds"] is None else f"{row['milliseconds']:.3g}",
        "answer": _answer(row, words),
    }
